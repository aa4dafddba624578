"""A run's folder, out/<config>/: ckpt.pt (last), best.pt (lowest validation bound), log.jsonl and
config.json. Who may continue it, who may write to it, its log and its bar.
"""

import contextlib
import errno
import json
import math
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from common import compute_dtype, fail, one_line, to_json
from configs import Config, from_dict
from data.checkpoints import VERSION, check_weights, load, read_checkpoint, save_checkpoint
from data.processes import is_ours, take_over
from data.trackers import start_trackers
from model import count_parameters, flops_per_token

try:
    import fcntl
except ImportError:  # Windows: no lock on a run's folder
    fcntl = None

# Fields that a resumed run may change; all others are its recipe.
MAY_CHANGE = set(
    "data micro_batch recompute device dtype compile fsdp eval_every eval_windows save_every"
    " samples out_dir wandb tensorboard val_data val_samples judge keep_every steps"
    " init_from".split()
)


def find_checkpoint(cfg, meta, resume, overwrite):
    """The checkpoint to resume from, or None for a new run. Changes nothing on disk. A run that
    torchrun starts again resumes, whatever the options say, also if it was killed at its end."""
    out, again = Path(cfg.out_dir), is_ours(cfg.out_dir)
    path, files = out / "ckpt.pt", ("ckpt.pt", "best.pt", "log.jsonl")
    if again:
        resume, overwrite = True, False
    if resume and overwrite:
        fail("--resume and --overwrite exclude each other")
    if not resume and not overwrite and any((out / name).exists() for name in files):
        fail(f"{out}: holds a run; --resume continues it, --overwrite deletes it; or use --out_dir")
    if not resume or not path.exists():
        return None  # new, or stopped before its first checkpoint
    state = read_checkpoint(path)
    check_same_recipe(state, path, cfg, meta)
    step = state["step"]
    if step > cfg.steps or step == cfg.steps and not again and is_finished(out / "log.jsonl", step):
        fail(f"{path}: already at step {step} of {cfg.steps}; raise --steps to continue")
    return state


def check_same_recipe(state, path, cfg, meta):
    """A resumed run keeps its recipe, its tokenizer and its data."""
    for name in ("optimizer", "best", "seconds", "data"):
        if name not in state:
            fail(f"{path}: lacks {name}, which resuming needs")
    before = asdict(from_dict(state["config"], path))  # fields that it lacks have their defaults
    if not state["optimizer"]:
        fail(f"{path}: converted weights, without the optimizer's state that resuming needs")
    for name, value in before.items():
        now = getattr(cfg, name)
        if name not in MAY_CHANGE and now != value:
            fail(f"{path}: trained with {name}={value}, not {now}; a resumed run keeps its recipe")
    if state["tokenizer"] != meta["tokenizer"]:
        fail(f"{cfg.data}: made with another tokenizer than {path}")
    if state["data"] != meta["splits"]["train"]["sha256"]:
        fail(f"{cfg.data}: not the data that {path} was trained on")
    if state["version"] < VERSION:
        start = f"--init_from={path} --out_dir=NEW starts from its weights"
        fail(f"{path}: of version {state['version']}, which drew rows and noise otherwise; {start}")


def is_finished(path, step):
    """Whether the log holds the final validation of this step: a run killed during it is not."""
    try:
        with open(path, encoding="utf-8", errors="replace") as log:
            return any("final" in r and r.get("step") == step for r in read_log(log))
    except OSError:
        return False


def read_log(log):
    """Yield the records of an open log.jsonl up to the first line that is damaged or cut short."""
    while (line := log.readline()).endswith("\n"):
        try:
            record = json.loads(line)
            record.get("step", 0) + 0  # a note has no step
        except (AttributeError, TypeError, ValueError, RecursionError):
            return
        yield record


def copy_weights(model, path, meta):
    """Copy the averaged weights of the checkpoint `path` into the model."""
    source, _ = load(path, device=next(model.parameters()).device)
    if source.tokenizer != meta["tokenizer"]:
        fail(f"init_from={path}: made with another tokenizer than the data")
    try:
        model.load_state_dict(source.state_dict())
    except RuntimeError as e:
        fail(f"init_from={path}: its network differs ({str(e).splitlines()[1].strip()})")


def restore(state, model, ema, optimizers, cfg, rank, world):
    """Copy a checkpoint's weights and moments; returns the losses that it had not logged yet."""
    where, shard_like = f"{cfg.out_dir}/ckpt.pt", lambda tensor, like: tensor
    if cfg.fsdp:
        from extra.fsdp import shard_like
    for network, name in ((model, "model"), (ema, "ema")):
        check_weights(state[name], cfg, where)
        like = network.state_dict()
        network.load_state_dict({n: shard_like(t, like[n]) for n, t in state[name].items()})
    if len(state["optimizer"]) != len(optimizers):
        fail(f"{where} has {len(state['optimizer'])} optimizers, must have {len(optimizers)}")
    for optimizer, saved in zip(optimizers, state["optimizer"]):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        try:
            for i, moments in saved["state"].items():
                for name, moment in moments.items():  # fused AdamW reads out of bounds otherwise
                    shape = () if name == "step" else params[i].shape
                    if moment.shape != shape or moment.dtype != torch.float32:
                        fail(f"{where}: {name} of tensor {i} must be float32 {tuple(shape)}")
                    moments[name] = shard_like(moment, params[i])
            groups = optimizer.state_dict()["param_groups"]  # rates are those of cfg
            optimizer.load_state_dict(dict(state=saved["state"], param_groups=groups))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
            fail(f"{where}: the optimizer's state does not fit ({one_line(e)})")
    losses = state.get("losses", torch.zeros(world, 0))  # (processes, steps since the last log)
    losses = losses[rank] if len(losses) == world else losses.mean(0)
    return list(losses.to(next(model.parameters()).device))


def check_same_step(cfg, step):
    """All processes must have read the same checkpoint."""
    dist.all_gather_object(steps := [None] * dist.get_world_size(), step)
    if len(set(steps)) > 1:
        fail(f"{cfg.out_dir}: processes see checkpoints of steps {steps}; they must share it")


def save_run(run, name):
    """Write the checkpoint out_dir/name. Only best.pt cannot be resumed: it has no moments."""
    losses = torch.stack(run.losses) if run.losses else torch.zeros(0, device=run.device)
    losses = losses[None]  # (processes, steps since the last log)
    if run.world > 1:
        dist.all_gather(parts := [torch.empty_like(losses) for _ in range(run.world)], losses)
        losses = torch.cat(parts)
    optimizer = [o.state_dict() for o in run.optimizers if name != "best.pt"]
    state = dict(model=run.model.state_dict(), ema=run.ema.state_dict(), optimizer=optimizer)
    if run.cfg.fsdp:
        from extra.fsdp import whole

        state = whole(state)
    if run.rank == 0:
        save_checkpoint(
            Path(run.cfg.out_dir) / name, **state, step=run.step, best=run.best,
            config=asdict(run.cfg), seconds=run.seconds, tokenizer=run.meta["tokenizer"],
            data=run.meta["splits"]["train"]["sha256"], losses=losses.cpu(),
            ends=run.model.ends,
        )  # fmt: skip


def open_folder(cfg, step):
    """Create out_dir or take it over at `step`; returns its log.jsonl, open for appending and
    locked. Cuts off what a stopped run logged after its last checkpoint: those steps come again."""
    out = Path(cfg.out_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
        log = open(out / "log.jsonl", "a+", buffering=1, encoding="utf-8", errors="replace")
        lock(log)
    except BlockingIOError:
        fail(f"{out}: another process is training here")
    except OSError as e:
        fail(f"out_dir={out}: {e.strerror}")
    log.seek(0)
    end = 0
    for record in read_log(log) if step else ():
        again = "final" in record and record.get("step") == cfg.steps  # killed at its very end
        if record.get("step", 0) > step or again:
            break
        end = log.tell()
    log.truncate(end)
    if not step:
        names = ("ckpt.pt", "best.pt", "wandb_id.txt")
        for path in (*map(out.joinpath, names), *out.glob("step_*.pt")):
            path.unlink(missing_ok=True)
    take_over(out)
    (out / "config.json").write_text(json.dumps(asdict(cfg), indent=1), encoding="utf-8")
    return log


def lock(file):
    """Lock an open file against other processes; BlockingIOError if one of them has it. Some
    network file systems have no locks: there two runs in one folder go unnoticed."""
    if not fcntl:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
            raise


class Stream:
    """A stream for output that nobody may be reading: after its first error it stays silent, and
    `error` says why. Training goes on when a terminal closes or a disk of logs is full."""

    def __init__(self, stream):
        self.stream, self.error = stream, ""

    def write(self, text):
        self.attempt("write", text)

    def flush(self):
        self.attempt("flush")

    def attempt(self, method, *arguments):
        if not self.error:
            try:
                getattr(self.stream, method)(*arguments)
            except (OSError, ValueError, AttributeError) as e:  # full, closed, or None
                self.error = one_line(e)

    def __getattr__(self, name):  # tqdm asks for isatty, encoding and fileno
        return getattr(self.stream, name)

    def __eq__(self, other):  # tqdm clears its bars on the streams that equal stdout or stderr
        return self.stream is getattr(other, "stream", other)

    __hash__ = object.__hash__


def open_log(cfg, step, closing):
    """(log, say, stderr): log(record) appends to log.jsonl and to the trackers, say(text) prints
    above the bar, which writes to stderr. Trouble with a tracker or the terminal is noted once, in
    the log."""
    trackers = start_trackers(cfg, step)
    sending = {name: send for name, (send, _) in trackers.items()}
    file = closing.enter_context(open_folder(cfg, step))
    stdout, stderr, noted = Stream(sys.stdout), Stream(sys.stderr), set()

    def note(where, error):
        if error and where not in noted:
            noted.add(where)
            file.write(to_json({"note": f"{where}: {error}; training continues"}) + "\n")

    def log(record):
        file.write(to_json(record) + "\n")
        note("stdout", stdout.error)
        note("stderr", stderr.error)
        for name, send in [*sending.items()]:
            try:
                send(record)
            except Exception as e:  # any type: wandb wraps those of its network library
                del sending[name]
                note(name, one_line(e))
                say(f"{name}: {one_line(e)}; training continues without it")

    def end(error, *_):
        for name, (_, finish) in trackers.items():
            try:
                finish(int(error is not None))
            except Exception as e:
                note(name, one_line(e))

    def say(text):
        tqdm.write(text, file=stdout)

    closing.push(end)
    return log, say, stderr


def introduce(run, accumulation, resume):
    """Say what is trained, on what and from where."""
    cfg, out, say = run.cfg, run.cfg.out_dir, run.say
    work = flops_per_token(cfg) * cfg.batch_size * cfg.seq_len / 1e9
    tokens, dtype = run.meta["splits"]["train"]["tokens"], compute_dtype(run.device, cfg.dtype)
    say(f"{out}: {count_parameters(cfg):,} parameters, {tokens:,} tokens of {cfg.data}")
    say(f"{cfg.steps:,} steps of {cfg.batch_size} rows of {cfg.seq_len} tokens: {run.world} x "
        f"{run.device.type}, {accumulation} x {run.micro} rows each in {dtype}; "
        f"{work:,.0f} GFLOP a step")  # fmt: skip
    differing = asdict(cfg).items() - asdict(Config(out_dir=out)).items()
    fields = " ".join(f"{name}={value}" for name, value in sorted(differing))
    say(f"fields that are not at their default: {fields}")
    if resume:
        say(f"resumed at step {run.step}" if run.step
            else f"{out} has no checkpoint: starting at step 0")  # fmt: skip


def show_progress(run):
    """Move the bar and show the time that is left, with the validations to come. Until one has been
    timed, its forward counts a third of a training step on as many tokens."""
    cfg, now, done = run.cfg, time.time(), run.step - run.first
    per_step = (now - run.timed) / max(done - 1, 1)
    if done == 1:  # the first step warms up caches and kernels: it does not count
        run.timed = now
    sizes = [math.ceil(len(ids) / cfg.seq_len) for ids, *_ in run.val_sets.values()]
    windows, some = sum(sizes), sum(min(cfg.eval_windows or n, n) for n in sizes)
    per_window = run.per_window or per_step / cfg.batch_size / 3
    to_come = math.ceil(cfg.steps / cfg.eval_every) - (run.step - 1) // cfg.eval_every
    windows_left = some * to_come + (windows if cfg.eval_windows else 0)
    left = (cfg.steps - run.step) * per_step + windows_left * per_window
    run.bar.set_postfix_str(f"{run.status}{tqdm.format_interval(left)} left", refresh=False)
    run.bar.update()


@contextlib.contextmanager
def catch_signals():
    """Yield a list that collects Ctrl-C and SIGTERM, so that the loop can finish its step and save.
    A second signal acts as usual. SIGHUP, of a terminal that closes, is ignored."""

    def note(number, frame):
        noted.append(number)
        signal.signal(number, before[number])

    noted, before = [], {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    if hasattr(signal, "SIGHUP"):  # not on Windows
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
