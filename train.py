"""Train a masked diffusion language model.

python train.py                                        # the demo: minutes on a CPU, no download
python train.py text8_mdlm --batch_size=256 --lr=6e-4  # a config and typed overrides
python train.py owt_mdlm --resume                      # continue a stopped run; on a CPU to the bit
torchrun --nproc_per_node=8 train.py owt_mdlm          # 8 GPUs of one machine
torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
    train.py owt_mdlm                                  # 4 machines of 8 GPUs

A run lives in out/<config>/: ckpt.pt (last), best.pt (lowest validation bound), log.jsonl and
config.json.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - an older Python must get as far as this line
    sys.stderr.write(
        "error: Python 3.11 or later is needed; this is {}.{}\n".format(*sys.version_info)
    )
    raise SystemExit(2)
try:  # torch comes last: its import takes seconds
    import numpy, tokenizers, tqdm, torch  # noqa: E401, F401, I001
except ModuleNotFoundError as e:
    sys.stderr.write(f"error: {e.name} is missing: pip install -r requirements.txt\n")
    raise SystemExit(2) from None

import contextlib
import copy
import math
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from common import (
    autocast,
    command,
    compute_dtype,
    fail,
    local_device,
    process_group,
    rank_and_world,
)
from configs import from_cli
from data.batches import micro_batches, split_batch
from data.checkpoints import check_same_step, save_checkpoint
from data.corpus import folder_of, read_split
from data.prepare import prepare
from data.runs import catch_signals, copy_weights, find_checkpoint, open_log, restore
from data.tokenizer import tokenizer_of
from diffusion import LOSSES
from evaluate import bound, figure, report
from head import keep_freed_memory
from model import DiT, count_parameters, flops_per_token
from sample import generate, prompt_canvas

LOG_EVERY = 10  # steps

# --------------------------------------------------------------------------------------------------
# Optimisation


def lr_at(step, cfg):
    """Learning rate of update `step` = 0, 1, ...: linear warm-up from 0, then constant (MDLM),
    cosine (nanoDD) or linear decay that would reach min_lr at `steps`."""
    if step < cfg.warmup:
        return cfg.lr * step / cfg.warmup
    start = cfg.steps - cfg.decay_steps if cfg.decay_steps else cfg.warmup
    done = min(max((step - start) / max(cfg.steps - start, 1), 0), 1)
    left = dict(constant=1, cosine=0.5 * (1 + math.cos(math.pi * done)), linear=1 - done)
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * left[cfg.lr_decay]


def make_optimizers(model, cfg):
    """AdamW, with weight decay on tensors of two or more dimensions; with muon_lr, Muon for the
    blocks' matrices. Every group stores its peak learning rate as "peak", which `lr_at` scales."""
    matrices = [p for n, p in model.blocks.named_parameters() if p.ndim == 2 and ".ada." not in n]
    muon = {id(p) for p in matrices} if cfg.muon_lr else set()
    rest = [p for p in model.parameters() if id(p) not in muon]
    matrices_of_rest, vectors = [p for p in rest if p.ndim >= 2], [p for p in rest if p.ndim < 2]
    groups = [
        dict(params=matrices_of_rest, weight_decay=cfg.weight_decay, peak=cfg.lr),
        dict(params=vectors, weight_decay=0.0, peak=cfg.lr),
    ]
    betas = cfg.beta1, cfg.beta2
    optimizers = [torch.optim.AdamW(groups, lr=cfg.lr, betas=betas, eps=cfg.eps, fused=True)]
    if muon:
        from extra.muon import Muon

        group = dict(params=matrices, peak=cfg.muon_lr)
        optimizers.append(Muon([group], lr=cfg.muon_lr, weight_decay=cfg.weight_decay))
    return optimizers


@torch.no_grad()
def update_ema(ema, model, n, cfg):
    """Average the weights after update n = 1, 2, ...; the decay warms up: early weights fade."""
    if not cfg.ema:
        return
    m = max(n - cfg.ema_start, 0)
    decay = min(cfg.ema, m / (m + cfg.ema_warmup)) if m else 0.0
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


# --------------------------------------------------------------------------------------------------
# Steps


def build(cfg, meta, device, init_from=""):
    """(model, its average, optimizers) before the first step, with the weights of init_from if
    given. With ema=0 the average shares the model's tensors."""
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(cfg.seed)
    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    model = DiT(cfg).to(device)
    if init_from:
        copy_weights(model, init_from, meta)
    model.ends = meta.get("ends", False)
    ema = copy.deepcopy(model).requires_grad_(False) if cfg.ema else copy.copy(model)
    if device.type == "cuda" and cfg.compile:
        model.hidden = torch.compile(model.hidden)  # the trunk has static shapes, the head does not
    return model, ema, make_optimizers(model, cfg)


def train_step(net, optimizers, batches, step, cfg, device):
    """One update from a list of micro-batches: (mean loss in nats per token, gradient norm), on the
    device. The mean is over the tokens of the global batch, so no split of it changes anything."""
    total = torch.zeros((), device=device)
    send = partial(torch.Tensor.to, device=device, non_blocking=True)  # need not wait for a GPU
    tokens = send(sum(counted.sum() for _, counted, *_ in batches))
    _, world = rank_and_world()
    if world > 1:
        dist.all_reduce(tokens)
    for i, tensors in enumerate(batches):
        x0, counted, t, xt, weight = map(send, tensors)
        net.require_backward_grad_sync = i == len(batches) - 1  # for DDP: average once
        with autocast(device, cfg.dtype):
            nats = LOSSES[cfg.loss](net, x0, counted, cfg, t, xt)  # (B, L)
        loss = (nats.sum(-1) * weight).sum() * world / tokens  # DDP averages over processes
        loss.backward()
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.grad_clip or math.inf)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * lr_at(step, cfg) / cfg.lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=world == 1)  # DDP's gradients stay views of its buckets
    return total, norm


# --------------------------------------------------------------------------------------------------
# The run: prepare, loop, finish. `run` is a namespace of what the three share.


def main(cfg, resume=False, overwrite=False):
    """Train cfg; returns the final validation report. Under torchrun every rank calls it."""
    with contextlib.ExitStack() as closing:  # closes the log and stops threads, whatever happens
        run = prepare_run(cfg, resume, overwrite, closing)
        loop(run)
        return finish(run)


def prepare_run(cfg, resume, overwrite, closing):
    """Check everything, read data and checkpoint, build the network; only then write to out_dir."""
    rank, world = rank_and_world()
    device = local_device(cfg)
    accumulation, micro = split_batch(cfg, world)
    if cfg.data == "pydocs" and rank == 0 and not folder_of("pydocs").exists():
        prepare("pydocs")
    if world > 1:
        dist.barrier()
    train_ids, meta = read_split(cfg.data, "train", cfg)
    val_ids, _ = read_split(cfg.data, "val", cfg)
    if cfg.short_rows and meta["given"]:
        fail(f"short_rows={cfg.short_rows}: would part prompts from their answers in {cfg.data}")
    tokenizer, canvas = sampling_inputs(cfg, meta)
    state = find_checkpoint(cfg, meta, resume, overwrite)

    model, ema, optimizers = build(cfg, meta, device, "" if state else cfg.init_from)
    step, best, seconds = 0, math.inf, 0.0
    losses = []
    if state:
        step, best, seconds = state["step"], state["best"], state["seconds"]
        losses = restore(state, model, ema, optimizers, cfg, rank, world)
    net = model  # two names from here on: `model` is saved and averaged, `net` is called
    if world > 1:
        check_same_step(cfg, step)
        net = DDP(model, gradient_as_bucket_view=True, forward_sync_buffers=False)

    pool = ThreadPoolExecutor(1)  # makes the next batch while this one trains
    closing.callback(pool.shutdown, cancel_futures=True)
    load_step = partial(micro_batches, train_ids, meta, cfg, rank=rank, world=world)
    upcoming = pool.submit(load_step, step)
    upcoming.result()  # damaged data fails here, before anything is written

    log = say = lambda *a: None
    stderr = sys.stderr
    if rank == 0:
        log, say, stderr = open_log(cfg, step, closing)
    work = flops_per_token(cfg) * cfg.batch_size * cfg.seq_len / 1e9
    out = cfg.out_dir
    say(f"{out}: {count_parameters(cfg):,} parameters, {len(train_ids):,} tokens of {cfg.data}")
    say(f"{cfg.steps:,} steps of {cfg.batch_size} rows of {cfg.seq_len} tokens: {world} x "
        f"{device.type}, {accumulation} x {micro} rows each in {compute_dtype(device, cfg.dtype)}; "
        f"{work:,.0f} GFLOP a step")  # fmt: skip
    if resume:
        say(f"resumed at step {step}" if step else f"{out} has no checkpoint: starting at step 0")
    return SimpleNamespace(
        cfg=cfg, rank=rank, world=world, device=device, micro=micro, meta=meta, val_ids=val_ids,
        tokenizer=tokenizer, canvas=canvas, model=model, ema=ema, net=net, optimizers=optimizers,
        pool=pool, load_step=load_step, upcoming=upcoming, log=log, say=say, stderr=stderr,
        step=step, best=best, seconds=seconds, losses=losses, val=None,
        first=step, status="", per_window=0.0,
    )  # fmt: skip


def sampling_inputs(cfg, meta):
    """(tokenizer, canvas) for the samples at the end; fails now and not after days of training."""
    if not cfg.samples:
        return None, None
    tokenizer = tokenizer_of(meta["tokenizer"])
    try:
        return tokenizer, prompt_canvas(tokenizer, "", cfg.seq_len, cfg)
    except ValueError as e:
        fail(f"{cfg.data}: {e}; --samples=0 trains without showing any")


def loop(run):
    """Train until cfg.steps; log, validate and save on the way. After a signal, save and exit."""
    cfg, upcoming, stopping = run.cfg, run.upcoming, False
    layout = "{n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}"
    run.bar = tqdm(total=cfg.steps, initial=run.step, disable=run.rank > 0, file=run.stderr,
                   dynamic_ncols=True, bar_format=layout)  # fmt: skip
    run.logged = run.timed = time.time()
    with catch_signals() as signals:
        while run.step < cfg.steps and not stopping:
            batches, upcoming = upcoming.result(), run.pool.submit(run.load_step, run.step + 1)
            if cfg.dropout or cfg.latent_dim:
                torch.manual_seed(hash((cfg.seed, run.step, run.rank)))
            loss, norm = train_step(run.net, run.optimizers, batches, run.step, cfg, run.device)
            run.losses.append(loss)
            run.step += 1
            update_ema(run.ema, run.model, run.step, cfg)

            last = run.step == cfg.steps
            every = LOG_EVERY, cfg.eval_every, cfg.save_every
            log_now, eval_now, save_now = (last or run.step % n == 0 for n in every)
            if run.world == 1:
                stopping = bool(signals)
            if log_now or eval_now or save_now or stopping:
                loss, norm, stopping = synchronise(run, norm, signals)
            if log_now:
                log_steps(run, loss, norm)
            show_progress(run)
            pause = time.time()
            if eval_now:
                validate_and_keep_best(run)
            if save_now or stopping:
                save_run(run, "ckpt.pt")
            run.logged += time.time() - pause
            run.timed += time.time() - pause
    run.bar.close()
    if run.step < cfg.steps:
        run.say(f"stopped at step {run.step}; --resume continues")
        raise SystemExit(128 + (signals or [signal.SIGTERM])[0])


def synchronise(run, norm, signals):
    """(mean loss since the last log, gradient norm, whether to stop), the same on all processes;
    waits for the device. A signal to one process stops all."""
    signalled = torch.tensor(float(len(signals)), device=run.device)
    means = torch.stack((torch.stack(run.losses).mean(), norm, signalled))
    if run.world > 1:
        dist.all_reduce(means)
    loss, norm, signalled = (means / run.world).tolist()
    if not math.isfinite(loss + norm):  # the weights are lost too, so nothing may be saved
        where = f"at step {run.step}; {run.cfg.out_dir} is as it was"
        raise SystemExit(f"loss {loss}, gradient norm {norm} {where}")
    return loss, norm, signalled > 0


def log_steps(run, loss, norm):
    """Log the steps since the last log; their time leaves out validation and saving."""
    seconds = time.time() - run.logged
    steps = min(len(run.losses), run.step - run.first)  # the others were before the resume
    speed = steps * run.cfg.batch_size * run.cfg.seq_len / seconds
    lr = lr_at(run.step - 1, run.cfg)
    run.log(dict(step=run.step, loss=loss, lr=lr, grad_norm=norm, tokens_per_s=speed))
    run.seconds += seconds
    run.logged, run.losses = time.time(), []
    run.status = f"loss {loss:.3f} nats/token, {speed:,.0f} tokens/s, "


def show_progress(run):
    """Move the bar and show the time that is left, with the validations to come. Until one has been
    timed, its forward counts a third of a training step on as many tokens."""
    cfg, now, done = run.cfg, time.time(), run.step - run.first
    per_step = (now - run.timed) / max(done - 1, 1)
    if done == 1:  # the first step warms up caches and kernels: it does not count
        run.timed = now
    windows = math.ceil(len(run.val_ids) / cfg.seq_len)
    some = min(cfg.eval_windows or windows, windows)
    per_window = run.per_window or per_step / cfg.batch_size / 3
    to_come = math.ceil(cfg.steps / cfg.eval_every) - (run.step - 1) // cfg.eval_every
    windows_left = some * to_come + (windows if cfg.eval_windows else 0)
    left = (cfg.steps - run.step) * per_step + windows_left * per_window
    run.bar.set_postfix_str(f"{run.status}{tqdm.format_interval(left)} left", refresh=False)
    run.bar.update()


def validate_and_keep_best(run):
    """Log the validation bound and save best.pt if it is the lowest."""
    start = time.time()
    run.val = validate(run, run.cfg.eval_windows)
    run.per_window = (time.time() - start) / run.val["forwards"]
    run.log(dict(step=run.step, val=run.val))
    bits = figure(run.val, "bits_per_char")
    run.say(f"step {run.step}: {bits} bits per character of validation text")
    if run.val["nats"] < run.best:
        run.best = run.val["nats"]
        save_run(run, "best.pt")


def save_run(run, name):
    """Write the checkpoint out_dir/name."""
    losses = torch.stack(run.losses) if run.losses else torch.zeros(0, device=run.device)
    losses = losses[None]  # (processes, steps since the last log)
    if run.world > 1:
        dist.all_gather(parts := [torch.empty_like(losses) for _ in range(run.world)], losses)
        losses = torch.cat(parts)
    if run.rank == 0:
        save_checkpoint(
            Path(run.cfg.out_dir) / name, model=run.model.state_dict(), ema=run.ema.state_dict(),
            step=run.step, best=run.best, optimizer=[o.state_dict() for o in run.optimizers],
            config=asdict(run.cfg), seconds=run.seconds, tokenizer=run.meta["tokenizer"],
            data=run.meta["splits"]["train"]["sha256"], losses=losses.cpu(),
            ends=run.model.ends,
        )  # fmt: skip


def validate(run, windows):
    """The report on `windows` windows of the validation split (0: all), which all ranks share."""
    model, cfg = run.ema.eval(), run.cfg
    options = dict(T=cfg.T, windows=windows, batch_size=run.micro, dtype=cfg.dtype)
    result = bound(model, run.val_ids, run.meta, cfg, f"{cfg.data}/val.bin", **options)
    run.model.train()  # with ema=0 the average is the model
    return report(result, run.meta, "val")


def finish(run):
    """Validate on all windows, print samples and what to run next; returns the report."""
    cfg, out = run.cfg, run.cfg.out_dir
    val = validate(run, 0) if cfg.eval_windows or not run.val else run.val
    run.log(dict(step=run.step, final=val))
    if run.rank == 0:
        bits, perplexity = figure(val, "bits_per_char", 3), figure(val, "perplexity", 1)
        run.say(f"\nvalidation: {bits} bits per character, perplexity {perplexity} per token, "
                f"after {run.seconds:.0f} s of training")  # fmt: skip
        if cfg.samples:
            for text in generate(run.ema.eval(), run.tokenizer, cfg, cfg.samples, run.canvas):
                run.say(f"\n--- sample\n{text}")
        commands = f"  python sample.py {out}/ckpt.pt --watch\n  python evaluate.py {out}/ckpt.pt"
        run.say(f"\nNext:\n{commands}")
    return val


@command
def command_line(argv=None):
    flags = (
        ("resume", "continue from ckpt.pt of out_dir, if there is one, with its fields"),
        ("overwrite", "delete the run that is in out_dir"),
    )
    cfg, args = from_cli(argv, doc=__doc__, flags=flags)
    with process_group(cfg):
        main(cfg, args.resume, args.overwrite)


if __name__ == "__main__":
    command_line()
