"""Train a masked diffusion language model.

python train.py                                            # the demo: 4 minutes on a laptop CPU
python train.py text8_mdlm --batch_size=256 --lr=6e-4      # a config and typed overrides
torchrun --nproc_per_node=8 train.py owt_mdlm              # 8 GPUs of one machine
torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py owt_mdlm
python train.py owt_mdlm --resume                          # goes on where the run stopped, to the bit

A run lives in out/<config>/: ckpt.pt (last), best.pt (lowest validation bound), log.jsonl, config.json.
"""

import copy
import json
import math
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from configs import asdict, fail, from_cli
from data.corpus import folder_of, read_split, training_rows
from data.prepare import prepare
from diffusion import LOSSES, alpha, mask_tokens, time_of
from evaluate import bound, report
from model import KIND, DiT, autocast, count_parameters, flops_per_token, pick_device, read_checkpoint
from sample import generate

LOG_EVERY = 10


# ---------------------------------------------------------------------------------------------------------
# Data: what a row holds and how it is masked is a pure function of (seed, step, row). So resuming needs no
# state, and another number of GPUs sees the same data with the same noise.


def batch(ids, meta, cfg, step, rows):
    """Rows `rows` (N,) of the global batch of `step`: x0 (N, L), maskable (N, L), t (N,), xt (N, L)."""
    x0 = torch.from_numpy(training_rows(ids, meta, cfg, step * cfg.batch_size + rows))
    maskable = torch.ones_like(x0, dtype=torch.bool)
    noise = [row_noise(cfg.seed, step * cfg.batch_size + row, cfg.seq_len + 1) for row in rows]
    u = torch.from_numpy(np.stack(noise))  # (N, L + 1) float64
    t = time_of((torch.from_numpy(rows) + u[:, 0]) / cfg.batch_size, cfg)  # stratified over the global batch
    xt = mask_tokens(x0, alpha(cfg.schedule, t), maskable, cfg.mask_id, u[:, 1:])
    return x0, maskable, t, xt


def row_noise(seed, index, n):
    """n uniforms of training row `index`. Philox is counter-based: any row at once, none depends on another."""
    return np.random.Generator(np.random.Philox(key=[seed, index], counter=[0, 0, 0, 1])).random(n)


# ---------------------------------------------------------------------------------------------------------
# Optimisation


def lr_at(step, cfg):
    """Linear warm-up, then constant (MDLM), cosine (nanoDD) or linear decay to min_lr at the last step."""
    if step < cfg.warmup:
        return cfg.lr * step / cfg.warmup
    start = cfg.steps - cfg.decay_steps if cfg.decay_steps else cfg.warmup
    done = min(max((step - start) / max(cfg.steps - start, 1), 0), 1)
    left = {"constant": 1, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done}[cfg.lr_decay]
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * left


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
        optimizers.append(torch.optim.Muon([group], lr=cfg.muon_lr, weight_decay=cfg.weight_decay))
    return optimizers


@torch.no_grad()
def update_ema(ema, model, n, cfg):
    """Average the weights after update n = 1, 2, ...; the decay warms up so that early weights fade."""
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
    "data micro_batch device dtype compile eval_every eval_windows save_every samples out_dir wandb steps".split()
)


def open_run(cfg, resume, overwrite):
    """The checkpoint to go on from, or None for a new run. Nothing on disk is touched."""
    out, ckpt = Path(cfg.out_dir), Path(cfg.out_dir) / "ckpt.pt"
    if resume and overwrite:
        fail("--resume and --overwrite exclude each other")
    if not resume:
        if not overwrite and (ckpt.exists() or (out / "log.jsonl").exists()):
            fail(
                f"{out}: holds a run; add --resume to go on with it, --overwrite to lose it, or --out_dir=..."
            )
        return None
    if not ckpt.exists():
        return None  # stopped before its first checkpoint, or never begun
    state = read_checkpoint(ckpt)
    now = asdict(cfg)
    for name, value in state["config"].items():
        if name not in MAY_CHANGE and now.get(name) != value:
            fail(f"{ckpt}: trained with {name}={value}, not {now.get(name)}; a resumed run keeps its recipe")
    if state["step"] >= cfg.steps:
        fail(f"{ckpt}: already at step {state['step']} of {cfg.steps}; add --steps to go on")
    return state


def open_log(cfg, step):
    """log(record) appends a line to log.jsonl, and tells wandb. Lines that a stopped run wrote after its last
    checkpoint are dropped: they will come again."""
    path = Path(cfg.out_dir) / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if step and path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    path.write_text("".join(kept))
    file = open(path, "a", buffering=1)
    run = None
    if cfg.wandb:
        import wandb

        run = wandb.init(project="nanomdlm", name=Path(cfg.out_dir).name, config=asdict(cfg))

    def log(record):
        file.write(json.dumps(record) + "\n")
        if run:
            run.log(record, step=record["step"])

    return log


# ---------------------------------------------------------------------------------------------------------


def split_batch(cfg, world):
    """(accumulation steps, rows per forward) of each process: batch_size = world x accumulation x rows."""
    if cfg.batch_size % world:
        fail(f"batch_size={cfg.batch_size}: must be a multiple of the number of processes, {world}")
    rows = cfg.batch_size // world
    micro = min(cfg.micro_batch, rows)
    if rows % micro:
        fail(
            f"batch_size={cfg.batch_size}: a process's {rows} rows must be a multiple of micro_batch={micro}"
        )
    return rows // micro, micro


def main(cfg, resume=False, overwrite=False):
    """Train cfg; returns the final validation report as a dict. Under torchrun every rank calls it."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}" if world > 1 and on_cuda(cfg) else cfg.device)
    grad_accum, micro = split_batch(cfg, world)
    if cfg.data == "pydocs" and rank == 0 and not folder_of("pydocs").exists():
        prepare("pydocs")
    if world > 1:
        dist.barrier()
    train_ids, meta = read_split(cfg.data, "train", cfg)
    val_ids, _ = read_split(cfg.data, "val", cfg)
    state = open_run(cfg, resume, overwrite)
    if state and state["tokenizer"] != meta["tokenizer"]:
        fail(f"{cfg.data}: made with another tokenizer than {cfg.out_dir}/ckpt.pt")

    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    model = DiT(cfg).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizers = make_optimizers(model, cfg)
    step, best, trained = 0, math.inf, 0.0
    if state:
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(optimizers, state["optimizer"]):
            optimizer.load_state_dict(saved)
        step, best, trained = state["step"], state["best"], state["seconds"]
    del state
    if device.type == "cuda" and cfg.compile:
        model.hidden = torch.compile(model.hidden)  # the trunk: its shapes are static, the head's are not
    # Two names from here on: `model` is saved and averaged, `net` is called.
    net = DDP(model, gradient_as_bucket_view=True) if world > 1 else model

    def load_step(step):
        rows = [np.arange(i * world + rank, cfg.batch_size, grad_accum * world) for i in range(grad_accum)]
        return [batch(train_ids, meta, cfg, step, r) for r in rows]  # strided: each has all strata of t

    pool = ThreadPoolExecutor(1)  # the next batch is made while this one trains
    upcoming = pool.submit(load_step, step)
    upcoming.result()  # what is wrong with the data shows before anything is written

    out = Path(cfg.out_dir)
    log = say = lambda *a: None
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        if not step:
            for name in ("ckpt.pt", "best.pt"):
                (out / name).unlink(missing_ok=True)
        (out / "config.json").write_text(json.dumps(asdict(cfg), indent=1))
        log, say = open_log(cfg, step), tqdm.write
    say(f"{out}: {count_parameters(cfg):,} parameters, {len(train_ids):,} tokens of {cfg.data} to train on")
    work = flops_per_token(cfg) * cfg.batch_size * cfg.seq_len
    say(f"{cfg.steps:,} steps of {cfg.batch_size} rows of {cfg.seq_len} tokens: {world} x {device.type}, "
        f"{grad_accum} x {micro} rows each; {work / 1e9:,.0f} GFLOP a step")  # fmt: skip

    def checkpoint(name):
        if rank == 0:
            save(
                out / name, model=model.state_dict(), ema=ema.state_dict(), step=step, best=best,
                optimizer=[o.state_dict() for o in optimizers], config=asdict(cfg), seconds=trained,
                tokenizer=meta["tokenizer"],
            )  # fmt: skip

    def validate(windows):
        """All ranks share the windows of the validation split; best.pt follows."""
        nonlocal best
        where, cast = f"{cfg.data}/val.bin", autocast(device, cfg.dtype)
        result = bound(ema, val_ids, cfg, where, windows=windows, batch_size=micro, cast=cast)
        val = report(result, meta, "val")
        log(dict(step=step, val=val))
        if val["nats"] < best:
            best = val["nats"]
            checkpoint("best.pt")
        return val

    stop = []  # Ctrl-C and SIGTERM end the run after the step that is under way, with a checkpoint
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, lambda number, frame: stop.append(number))

    bar = tqdm(total=cfg.steps, initial=step, disable=rank > 0, unit="step", dynamic_ncols=True)
    logged, loss_sum, since = time.time(), torch.zeros((), device=device), 0
    while step < cfg.steps and not stop:
        micro_batches, upcoming = upcoming.result(), pool.submit(load_step, step + 1)
        if cfg.dropout:
            torch.manual_seed(hash((cfg.seed, step, rank)))
        for i, tensors in enumerate(micro_batches):
            x0, maskable, t, xt = (a.to(device, non_blocking=True) for a in tensors)
            net.require_backward_grad_sync = i == grad_accum - 1  # DDP: average the gradients once per step
            with autocast(device, cfg.dtype):
                nats = LOSSES[cfg.loss](net, x0, maskable, cfg, t, xt)  # (B, L)
            loss = (nats.sum(-1) / maskable.sum(-1)).mean() / grad_accum  # per token
            loss.backward()
            loss_sum += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * lr_at(step, cfg) / cfg.lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, since = step + 1, since + 1
        update_ema(ema, model, step, cfg)
        bar.update()

        if step % LOG_EVERY == 0 or step == cfg.steps:
            if world > 1:
                dist.all_reduce(loss_sum)
            loss = loss_sum.item() / since / world  # waits for the device
            if not math.isfinite(loss):
                raise SystemExit(f"the loss is {loss} at step {step}; {out} keeps the checkpoint before it")
            seconds = time.time() - logged
            speed = since * cfg.batch_size * cfg.seq_len / seconds
            log(
                dict(step=step, loss=loss, lr=lr_at(step - 1, cfg), grad_norm=norm.item(), tokens_per_s=speed)
            )
            bar.set_postfix_str(f"loss {loss:.3f} nats/token, {speed:,.0f} tokens/s")
            trained += seconds
            logged, loss_sum, since = time.time(), torch.zeros((), device=device), 0
        if step == cfg.steps:
            break
        if step % cfg.eval_every == 0:
            val = validate(cfg.eval_windows)
            say(
                f"step {step}: validation {val['bits_per_char']:.3f} ± {val['bits_per_char_se']:.3f} bits/char"
            )
            logged = time.time()
        if step % cfg.save_every == 0 or stop:
            checkpoint("ckpt.pt")
            logged = time.time()
    bar.close()
    if step < cfg.steps:
        say(f"stopped at step {step}; go on with --resume")
        raise SystemExit(128 + stop[0])

    val = validate(0)  # the whole split
    checkpoint("ckpt.pt")
    if rank == 0:
        say(f"\nvalidation: {val['bits_per_char']:.3f} ± {val['bits_per_char_se']:.3f} bits per character, "
            f"perplexity {val['perplexity']:.1f} ± {val['perplexity_se']:.1f} per token, "
            f"after {trained:.0f} s of training")  # fmt: skip
        for text in generate(ema, meta["tokenizer"], cfg, num=cfg.samples):
            say(f"\n--- sample\n{text}")
        say(f"\nNext:\n  python sample.py {out}/ckpt.pt --watch\n  python evaluate.py {out}/ckpt.pt")
    return val


def on_cuda(cfg):
    return cfg.device.startswith("cuda") or (cfg.device == "auto" and torch.cuda.is_available())


if __name__ == "__main__":
    cfg, args = from_cli(
        doc=__doc__,
        flags=(
            ("resume", "go on from ckpt.pt of out_dir, if there is one"),
            ("overwrite", "lose the run that is in out_dir"),
        ),
    )
    if "RANK" in os.environ:
        if on_cuda(cfg):
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if on_cuda(cfg) else "gloo")
    main(cfg, args.resume, args.overwrite)
    if dist.is_initialized():
        dist.destroy_process_group()
