"""A run's folder, out/<config>/: ckpt.pt (last), best.pt (lowest validation bound), log.jsonl and
config.json. Who may continue it, who may write to it, and its log.
"""

import contextlib
import errno
import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from common import fail, one_line, to_json
from configs import from_dict
from data.checkpoints import VERSION, check_weights, load, read_checkpoint
from data.processes import is_ours, take_over

try:
    import fcntl
except ImportError:  # Windows: no lock on a run's folder
    fcntl = None

# Fields that a resumed run may change; all others are its recipe.
MAY_CHANGE = set(
    "data micro_batch recompute device dtype compile eval_every eval_windows save_every samples"
    " out_dir wandb steps init_from".split()
)


def find_checkpoint(cfg, meta, resume, overwrite):
    """The checkpoint to resume from, or None for a new run. Changes nothing on disk. A run that
    torchrun starts again resumes, whatever the options say, also if it was killed at its end."""
    out, again = Path(cfg.out_dir), is_ours(cfg.out_dir)
    if again:
        resume, overwrite = True, False
    paths = [p for p in (out / "ckpt.pt", out / "best.pt") if p.exists()]
    if resume and overwrite:
        fail("--resume and --overwrite exclude each other")
    if not resume and not overwrite and (paths or (out / "log.jsonl").exists()):
        fail(f"{out}: holds a run; --resume continues it, --overwrite deletes it; or use --out_dir")
    if not resume or not paths:
        return None  # new, or stopped before its first checkpoint
    state = read_checkpoint(paths[0])
    check_same_recipe(state, paths[0], cfg, meta)
    step, log = state["step"], out / "log.jsonl"
    if step > cfg.steps or step == cfg.steps and not again and is_finished(log, step):
        fail(f"{paths[0]}: already at step {step} of {cfg.steps}; raise --steps to continue")
    return state | dict(path=paths[0])


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
    where = state["path"]
    for network, name in ((model, "model"), (ema, "ema")):
        check_weights(state[name], cfg, where)
        network.load_state_dict(state[name])
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
            groups = optimizer.state_dict()["param_groups"]  # rates are those of cfg
            optimizer.load_state_dict(dict(state=saved["state"], param_groups=groups))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
            fail(f"{where}: the optimizer's state does not fit ({one_line(e)})")
    losses = state.get("losses", torch.zeros(world, 0))  # (processes, steps since the last log)
    losses = losses[rank] if len(losses) == world else losses.mean(0)
    return list(losses.to(next(model.parameters()).device))


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
        for name in ("ckpt.pt", "best.pt"):
            (out / name).unlink(missing_ok=True)
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


def start_wandb(cfg):
    """(log, finish) of wandb for this run, or one line on why there is none."""
    try:
        import wandb

        run = wandb.init(project="nanomdlm", name=Path(cfg.out_dir).name, config=asdict(cfg))
    except Exception as e:  # not installed, not logged in, no network: each raises another type
        fail(f"wandb=True: {one_line(e)}; WANDB_MODE=offline needs no account")

    def send(record):
        run.log(record, step=record["step"])

    return send, run.finish


def open_log(cfg, step, closing):
    """(log, say, stderr): log(record) appends to log.jsonl and to wandb, say(text) prints above the
    bar, which writes to stderr. Trouble with wandb or the terminal is noted once, in the log."""
    send, finish = start_wandb(cfg) if cfg.wandb else (None, None)
    file = closing.enter_context(open_folder(cfg, step))
    stdout, stderr, noted = Stream(sys.stdout), Stream(sys.stderr), set()

    def note(where, error):
        if error and where not in noted:
            noted.add(where)
            file.write(to_json({"note": f"{where}: {error}; training continues"}) + "\n")

    def log(record):
        nonlocal send
        file.write(to_json(record) + "\n")
        note("stdout", stdout.error)
        note("stderr", stderr.error)
        try:
            if send:
                send(record)
        except Exception as e:  # any type: wandb wraps those of its network library
            send = None
            note("wandb", one_line(e))
            say(f"wandb: {one_line(e)}; training continues without it")

    def end(error, *_):
        try:
            if finish:
                finish(exit_code=int(error is not None))
        except Exception as e:
            note("wandb", one_line(e))

    def say(text):
        tqdm.write(text, file=stdout)

    closing.push(end)
    return log, say, stderr


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
