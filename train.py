"""Train a masked diffusion language model.

python train.py                                            # the demo: minutes on a CPU, no download
python train.py text8_mdlm --batch_size=256 --lr=6e-4      # a config and typed overrides
torchrun --nproc_per_node=8 train.py owt_mdlm              # 8 GPUs of one machine
torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py owt_mdlm
python train.py owt_mdlm --resume                          # goes on where the run stopped; on CPU to the bit

A run lives in out/<config>/: ckpt.pt (last), best.pt (lowest validation bound), log.jsonl, config.json.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - an older Python must get as far as this line
    sys.stderr.write("error: Python 3.11 or later is needed; this is {}.{}\n".format(*sys.version_info))
    raise SystemExit(2)
try:  # torch comes last: its import takes seconds
    import numpy, tokenizers, tqdm, torch  # noqa: E401, F401, I001
except ModuleNotFoundError as e:
    sys.stderr.write(f"error: {e.name} is missing: pip install -r requirements.txt\n")
    raise SystemExit(2) from None

import contextlib
import copy
import json
import math
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from configs import fail, from_cli, from_dict
from data.corpus import folder_of, read_split, training_rows, unpack
from data.prepare import prepare
from data.tokenizer import tokenizer_of
from diffusion import LOSSES, draw
from evaluate import bound, figure, report, to_json
from model import (
    KIND,
    DiT,
    autocast,
    compute_dtype,
    count_parameters,
    flops_per_token,
    keep_freed_memory,
    load,
    pick_device,
    read_checkpoint,
)
from sample import generate, prompt_canvas

try:
    import fcntl
except ImportError:  # Windows: no lock on a run's folder
    fcntl = None

LOG_EVERY = 10  # steps


# ---------------------------------------------------------------------------------------------------------
# Data: what a row holds and how it is masked is a pure function of (seed, step, row). So resuming needs no
# state, and another number of GPUs sees the same data with the same noise.


def batch(ids, meta, cfg, step, rows):
    """Rows `rows` (N,) of the global batch of `step`: x0, maskable (N, L), t (N,), xt (N, L), weight (N,)."""
    x0, maskable = unpack(training_rows(ids, meta, cfg, step * cfg.batch_size + rows), meta, cfg)
    noise = [row_noise(cfg.seed, step * cfg.batch_size + row, cfg.seq_len + 4) for row in rows]
    u = torch.from_numpy(np.stack(noise))  # float64: the time, L positions, two for `shorten`, the prompt
    time = u[:, 0]
    if cfg.time_draw != "iid":  # one in each stratum of the global batch
        time = (torch.from_numpy(rows) + time) / cfg.batch_size
    t, xt, weight = draw(x0, maskable, cfg, time, u[:, 1:-3])
    if cfg.prompt_dropout:
        dropped = u[:, -1:] < cfg.prompt_dropout
        prompt = ~maskable & (maskable.flip(-1).cumsum(-1).flip(-1) > 0)  # not what stands behind all answers
        prompt &= torch.arange(cfg.seq_len) >= cfg.bos
        xt = xt.masked_fill(prompt & dropped, cfg.mask_id)
    return x0, maskable, t, xt, weight


def shorten(tensors, cfg, step, rows):
    """A batch of rows as a list of batches with the same tokens: a share short_rows of the rows is cut, each into
    rows of its own l tokens, l uniform on 1 .. seq_len, and what is left (SMDM's stochastic length, arXiv
    2410.18514, which throws all but the first l tokens away). t, masks and weight stay those of the long row."""
    noise = [row_noise(cfg.seed, step * cfg.batch_size + row, cfg.seq_len + 3)[-2:] for row in rows]
    cut = torch.tensor([coin < cfg.short_rows for coin, _ in noise])
    batches = [tuple(a[~cut] for a in tensors)] if not cut.all() else []
    for i in cut.nonzero()[:, 0].tolist():
        x0, maskable, t, xt, weight = (a[i : i + 1] for a in tensors)
        l = 1 + cfg.bos + int(noise[i][1] * (cfg.seq_len - cfg.bos))
        whole = cfg.seq_len // l * l
        for part, length in ((slice(whole), l), (slice(whole, None), cfg.seq_len - whole)):
            if length:
                x, m, y = (a[:, part].reshape(-1, length) for a in (x0, maskable, xt))
                m = m & (torch.arange(length) >= cfg.bos)  # a given first token, in every row
                batches.append((x, m, t.expand(len(x)), torch.where(m, y, x), weight.expand(len(x))))
    return batches


def row_noise(seed, index, n):
    """n uniforms of training row `index`. Philox is counter-based: any row at once, none depends on another.
    The counter starts elsewhere than that of the epochs' orders, which have the same keys."""
    return np.random.Generator(np.random.Philox(key=[seed, index], counter=[0, 0, 0, 1])).random(n)


# ---------------------------------------------------------------------------------------------------------
# Optimisation


def lr_at(step, cfg):
    """Rate of update number `step` = 0, 1, ...: linear warm-up from 0, then constant (MDLM), or cosine (nanoDD)
    or linear decay that would reach min_lr at `steps`."""
    if step < cfg.warmup:
        return cfg.lr * step / cfg.warmup
    start = cfg.steps - cfg.decay_steps if cfg.decay_steps else cfg.warmup
    done = min(max((step - start) / max(cfg.steps - start, 1), 0), 1)
    left = {"constant": 1, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done}[cfg.lr_decay]
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * left


def orthogonalize(g, dtype):
    """Five Newton-Schulz steps in dtype: U V^T of g = U S V^T (m, n), with singular values of about 0.7 to 1.2
    instead of 1 (Muon, kellerjordan.github.io/posts/muon)."""
    x = g.to(dtype)
    x = x.T if len(g) > g.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if len(g) > g.shape[1] else x


class Muon(torch.optim.Muon):
    """torch's Muon, but its matmuls run in the dtype that the device multiplies natively. torch always takes
    bfloat16, which a CPU without bfloat16 instructions emulates, 44 to 80 times slower than float32."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p.grad))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                nesterov = p.grad.lerp(momentum, group["momentum"])
                update = orthogonalize(nesterov, getattr(torch, compute_dtype(p.device, "auto")))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * math.sqrt(max(1, len(p) / p.shape[1])))


def make_optimizers(model, cfg):
    """AdamW, with weight decay on tensors of two or more dimensions; with muon_lr the blocks' matrices go to
    Muon. Every group keeps its peak rate as "peak", which lr_at scales."""
    matrices = [p for n, p in model.blocks.named_parameters() if p.ndim == 2 and ".ada." not in n]
    muon = {id(p) for p in matrices} if cfg.muon_lr else set()
    rest = [p for p in model.parameters() if id(p) not in muon]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": cfg.weight_decay, "peak": cfg.lr},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0, "peak": cfg.lr},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)]
    if muon:
        group = {"params": matrices, "peak": cfg.muon_lr}
        optimizers.append(Muon([group], lr=cfg.muon_lr, weight_decay=cfg.weight_decay))
    return optimizers


@torch.no_grad()
def update_ema(ema, model, n, cfg):
    """Average the weights after update n = 1, 2, ...; the decay warms up so that early weights fade."""
    if not cfg.ema:
        return
    m = max(n - cfg.ema_start, 0)
    decay = min(cfg.ema, m / (m + cfg.ema_warmup)) if m else 0.0
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


# ---------------------------------------------------------------------------------------------------------
# A run's folder


def save(path, **state):
    """Complete or not at all: written aside, synced to the disk, renamed."""
    aside = path.with_suffix(".tmp")
    with open(aside, "wb") as f:
        torch.save({"kind": KIND, "torch": str(torch.__version__), **state}, f)
        f.flush()
        os.fsync(f.fileno())
    aside.replace(path)


MAY_CHANGE = set(
    "data micro_batch recompute device dtype compile eval_every eval_windows save_every samples out_dir wandb steps init_from".split()
)


def open_run(cfg, meta, resume, overwrite):
    """The checkpoint to go on from, or None for a new run. Nothing on disk is touched."""
    out = Path(cfg.out_dir)
    paths = [p for p in (out / "ckpt.pt", out / "best.pt") if p.exists()]
    if resume and overwrite:
        fail("--resume and --overwrite exclude each other")
    if not resume and not overwrite and (paths or (out / "log.jsonl").exists()):
        fail(f"{out}: holds a run; add --resume to go on with it, --overwrite to lose it, or --out_dir=...")
    if not resume or not paths:
        return None  # new, or stopped before its first checkpoint
    path, now = paths[0], asdict(cfg)
    state = read_checkpoint(path)
    before = asdict(from_dict(state["config"], path))  # fields that it does not know yet have their defaults
    if not state["optimizer"]:
        fail(f"{path}: converted weights, without an optimizer's state to go on from")
    for name, value in before.items():
        if name not in MAY_CHANGE and now.get(name) != value:
            fail(f"{path}: trained with {name}={value}, not {now.get(name)}; a resumed run keeps its recipe")
    if state["tokenizer"] != meta["tokenizer"]:
        fail(f"{cfg.data}: made with another tokenizer than {path}")
    if state["data"] != meta["splits"]["train"]["sha256"]:
        fail(f"{cfg.data}: not the data that {path} was trained on")
    if state["step"] >= cfg.steps:
        fail(f"{path}: already at step {state['step']} of {cfg.steps}; add --steps to go on")
    return state


def begin_with(model, path, meta):
    """Copy the averaged weights of the checkpoint `path` into the model."""
    start, _ = load(path, device=next(model.parameters()).device)
    if start.tokenizer != meta["tokenizer"]:
        fail(f"init_from={path}: made with another tokenizer than the data")
    try:
        model.load_state_dict(start.state_dict())
    except RuntimeError as e:
        fail(f"init_from={path}: its network is another ({str(e).splitlines()[1].strip()})")


def start_wandb(cfg):
    try:
        import wandb

        return wandb.init(project="nanomdlm", name=Path(cfg.out_dir).name, config=asdict(cfg))
    except Exception as e:  # not installed, not logged in, no network: each of another type
        fail(f"wandb=True: {' '.join(str(e).split())}; WANDB_MODE=offline needs no account")


def open_folder(cfg, step):
    """Create out_dir or take it over at `step`; returns its log.jsonl, open for appending and locked.
    What a stopped run logged after its last checkpoint, or half a line, is cut off: it will come again."""
    out = Path(cfg.out_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
        log = open(out / "log.jsonl", "a+", buffering=1)
        if fcntl:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{out}: another process is training here")
    except OSError as e:
        fail(f"out_dir={out}: {e.strerror}")
    log.seek(0)
    end = 0
    while step and (line := log.readline()).endswith("\n"):
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, TypeError, KeyError):
            break
        end = log.tell()
    log.truncate(end)
    if not step:
        for name in ("ckpt.pt", "best.pt"):
            (out / name).unlink(missing_ok=True)
    (out / "config.json").write_text(json.dumps(asdict(cfg), indent=1))
    return log


@contextlib.contextmanager
def signals_noted():
    """Ctrl-C and SIGTERM are noted in the list that this yields, for the loop to end after the step that is
    under way, with a checkpoint. A second one acts as usual."""

    def note(number, frame):
        noted.append(number)
        signal.signal(number, before[number])

    noted, before = [], {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------


def split_batch(cfg, world):
    """(accumulation steps, rows per forward) of each process: batch_size = world x accumulation x rows."""
    if cfg.batch_size % world:
        fail(f"batch_size={cfg.batch_size}: must be a multiple of the number of processes, {world}")
    rows = cfg.batch_size // world
    micro = min(cfg.micro_batch, rows)
    if rows % micro:
        fail(f"batch_size={cfg.batch_size}: {rows} rows per process must divide into micro_batch={micro}")
    return rows // micro, micro


def micro_batches(ids, meta, cfg, step, rank=0, world=1):
    """One process's share of the global batch of `step`, a list of what goes through the network at once."""
    parts, _ = split_batch(cfg, world)
    rows = [np.arange(i * world + rank, cfg.batch_size, parts * world) for i in range(parts)]
    batches = [batch(ids, meta, cfg, step, r) for r in rows]  # strided: each has all strata of t
    if cfg.short_rows:
        batches = [b for r, whole in zip(rows, batches) for b in shorten(whole, cfg, step, r)]
    return batches


def start(cfg, meta, device, init_from=""):
    """(model, its average, optimizers) before the first step, with the weights of init_from if it is given. With
    ema=0 the average has the model's own tensors."""
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    model = DiT(cfg).to(device)
    if init_from:
        begin_with(model, init_from, meta)
    ema = copy.deepcopy(model).requires_grad_(False) if cfg.ema else copy.copy(model)
    if device.type == "cuda" and cfg.compile:
        model.hidden = torch.compile(model.hidden)  # the trunk: its shapes are static, the head's are not
    return model, ema, make_optimizers(model, cfg)


def train_step(net, optimizers, batches, step, cfg, device):
    """One update from a list of micro-batches: (mean loss in nats per token, gradient norm), on the device.
    The mean is over the tokens of the global batch, so that no split of it changes anything."""
    total = torch.zeros((), device=device)
    send = partial(torch.Tensor.to, device=device, non_blocking=True)  # need not wait for a GPU
    tokens = send(sum(maskable.sum() for _, maskable, *_ in batches))
    world = 1
    if dist.is_initialized():
        dist.all_reduce(tokens)
        world = dist.get_world_size()
    for i, tensors in enumerate(batches):
        x0, maskable, t, xt, weight = map(send, tensors)
        net.require_backward_grad_sync = i == len(batches) - 1  # for DDP: average once
        with autocast(device, cfg.dtype):
            nats = LOSSES[cfg.loss](net, x0, maskable, cfg, t, xt)  # (B, L)
        loss = (nats.sum(-1) * weight).sum() * world / tokens  # DDP averages over processes
        loss.backward()
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.grad_clip or math.inf)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * lr_at(step, cfg) / cfg.lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=world == 1)  # DDP's gradients are views of its buckets, and stay so
    return total, norm


def main(cfg, resume=False, overwrite=False):
    """Train cfg; returns the final validation report as a dict. Under torchrun every rank calls it."""
    with contextlib.ExitStack() as at_end:  # what is to be closed, however the run ends
        return run(cfg, resume, overwrite, at_end)


def run(cfg, resume, overwrite, at_end):
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    barrier = dist.barrier if world > 1 else lambda: None
    device = local_device(cfg)
    grad_accum, micro = split_batch(cfg, world)
    if cfg.data == "pydocs" and rank == 0 and not folder_of("pydocs").exists():
        prepare("pydocs")
    barrier()
    train_ids, meta = read_split(cfg.data, "train", cfg)
    val_ids, _ = read_split(cfg.data, "val", cfg)
    if cfg.samples:  # now, not after days of training
        tokenizer = tokenizer_of(meta["tokenizer"])
        try:
            canvas = prompt_canvas(tokenizer, "", cfg.seq_len, cfg)
        except ValueError as e:
            fail(f"{cfg.data}: {e}; --samples=0 trains without showing any")
    state = open_run(cfg, meta, resume, overwrite)
    if cfg.short_rows and meta["given"]:
        fail(f"short_rows={cfg.short_rows}: would part prompts from their answers in {cfg.data}")

    model, ema, optimizers = start(cfg, meta, device, "" if state else cfg.init_from)
    step, best, trained = 0, math.inf, 0.0
    if state:
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(optimizers, state["optimizer"]):
            optimizer.load_state_dict(saved)
        step, best, trained = state["step"], state["best"], state["seconds"]
    del state
    if world > 1:
        dist.all_gather_object(steps := [None] * world, step)
        if len(set(steps)) > 1:
            fail(f"{cfg.out_dir}: the processes see checkpoints of steps {steps}; they must share the folder")
    net = model  # two names from here on: `model` is saved and averaged, `net` is called
    if world > 1:
        net = DDP(model, gradient_as_bucket_view=True, forward_sync_buffers=False)
        net.costs = net.__call__  # DDP averages the gradients of what goes through its own call alone

    pool = ThreadPoolExecutor(1)  # the next batch is made while this one trains
    at_end.callback(pool.shutdown, cancel_futures=True)
    load_step = partial(micro_batches, train_ids, meta, cfg, rank=rank, world=world)
    upcoming = pool.submit(load_step, step)
    upcoming.result()  # what is wrong with the data shows before anything is written

    out = Path(cfg.out_dir)
    log = say = lambda *a: None
    if rank == 0:
        wandb = at_end.enter_context(start_wandb(cfg)) if cfg.wandb else None
        file, say = at_end.enter_context(open_folder(cfg, step)), tqdm.write

        def log(record):
            file.write(to_json(record) + "\n")
            if wandb:
                wandb.log(record, step=record["step"])

    work = flops_per_token(cfg) * cfg.batch_size * cfg.seq_len
    say(f"{out}: {count_parameters(cfg):,} parameters, {len(train_ids):,} tokens of {cfg.data}")
    say(f"{cfg.steps:,} steps of {cfg.batch_size} rows of {cfg.seq_len} tokens: {world} x {device.type}, "
        f"{grad_accum} x {micro} rows each in {compute_dtype(device, cfg.dtype)}; {work / 1e9:,.0f} GFLOP a step")  # fmt: skip
    if resume:
        say(f"resumed at step {step}" if step else f"{out} has no checkpoint: starting at step 0")

    def checkpoint(name):
        if rank == 0:
            save(
                out / name, model=model.state_dict(), ema=ema.state_dict(), step=step, best=best,
                optimizer=[o.state_dict() for o in optimizers], config=asdict(cfg), seconds=trained,
                tokenizer=meta["tokenizer"], data=meta["splits"]["train"]["sha256"],
            )  # fmt: skip

    def validate(windows):
        """The report on `windows` windows of the validation split (0: all), which all ranks share."""
        where = f"{cfg.data}/val.bin"
        result = bound(ema.eval(), val_ids, meta, cfg, where, cfg.T, 1, windows, micro, dtype=cfg.dtype)
        model.train()
        return report(result, meta, "val")

    bar = tqdm(total=cfg.steps, initial=step, disable=rank > 0, unit="step", dynamic_ncols=True)
    logged, losses, stopping = time.time(), [], False
    with signals_noted() as noted:
        while step < cfg.steps and not stopping:
            batches, upcoming = upcoming.result(), pool.submit(load_step, step + 1)
            if cfg.dropout:
                torch.manual_seed(hash((cfg.seed, step, rank)))
            loss, norm = train_step(net, optimizers, batches, step, cfg, device)
            losses.append(loss)
            step += 1
            update_ema(ema, model, step, cfg)
            bar.update()

            log_now, eval_now, save_now = (step % n == 0 for n in (LOG_EVERY, cfg.eval_every, cfg.save_every))
            last = step == cfg.steps
            if world == 1:
                stopping = bool(noted)
            if log_now or eval_now or save_now or last or stopping:
                told = torch.tensor(float(len(noted)), device=device)  # one process is enough to stop all
                means = torch.stack((torch.stack(losses).mean(), norm, told))
                if world > 1:
                    dist.all_reduce(means)
                loss, norm, told = (means / world).tolist()  # waits for the device
                stopping = told > 0
                if not math.isfinite(loss + norm):  # then the weights are lost too: nothing may be saved
                    raise SystemExit(f"loss {loss}, gradient norm {norm} at step {step}; {out} is as it was")
            if log_now or last:
                seconds = time.time() - logged
                speed = len(losses) * cfg.batch_size * cfg.seq_len / seconds
                lr = lr_at(step - 1, cfg)
                log(dict(step=step, loss=loss, lr=lr, grad_norm=norm, tokens_per_s=speed))
                bar.set_postfix_str(f"loss {loss:.3f} nats/token, {speed:,.0f} tokens/s")
                trained += seconds
                logged, losses = time.time(), []
            pause = time.time()
            if eval_now or last:
                val = validate(cfg.eval_windows)
                log(dict(step=step, val=val))
                say(f"step {step}: {figure(val, 'bits_per_char')} bits per character of validation text")
                if val["nats"] < best:
                    best = val["nats"]
                    checkpoint("best.pt")
            if save_now or last or stopping:
                checkpoint("ckpt.pt")
            logged += time.time() - pause
    bar.close()
    if step < cfg.steps:
        say(f"stopped at step {step}; go on with --resume")
        raise SystemExit(128 + (noted or [signal.SIGTERM])[0])

    val = validate(0) if cfg.eval_windows else val  # all windows
    log(dict(step=step, final=val))
    if rank == 0:
        say(f"\nvalidation: {figure(val, 'bits_per_char', 3)} bits per character, perplexity "
            f"{figure(val, 'perplexity', 1)} per token, after {trained:.0f} s of training")  # fmt: skip
        for text in generate(ema.eval(), tokenizer, cfg, cfg.samples, canvas) if cfg.samples else ():
            say(f"\n--- sample\n{text}")
        say(f"\nNext:\n  python sample.py {out}/ckpt.pt --watch\n  python evaluate.py {out}/ckpt.pt")
    return val


def on_cuda(cfg):
    return cfg.device.startswith("cuda") or (cfg.device == "auto" and torch.cuda.is_available())


def local_device(cfg):
    """This process's device, under torchrun or alone."""
    own = dist.is_torchelastic_launched() and on_cuda(cfg)
    return pick_device(f"cuda:{os.environ['LOCAL_RANK']}" if own else cfg.device)


@contextlib.contextmanager
def processes(cfg):
    """The process group of torchrun's processes; without torchrun, nothing."""
    if not dist.is_torchelastic_launched():
        yield
        return
    if (device := local_device(cfg)).type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield
    dist.destroy_process_group()


if __name__ == "__main__":
    cfg, args = from_cli(
        doc=__doc__,
        flags=(
            ("resume", "go on from ckpt.pt of out_dir, if there is one, with its fields"),
            ("overwrite", "delete the run that is in out_dir"),
        ),
    )
    with processes(cfg):
        main(cfg, args.resume, args.overwrite)
