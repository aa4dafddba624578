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
import shlex
import signal
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from common import autocast, check_range, command, fail, progress
from data.batches import micro_batches, split_batch, steps_of
from data.canvas import sampling_inputs
from data.command_line import from_cli
from data.corpus import folder_of, read_split, read_val_sets
from data.prepare import prepare
from data.processes import local_device, process_group, rank_and_world
from data.runs import (
    catch_signals,
    check_same_step,
    copy_weights,
    find_checkpoint,
    introduce,
    open_log,
    restore,
    save_run,
    show_progress,
)
from diffusion import LOSSES
from evaluate import bound, figure, report
from head import keep_freed_memory
from model import DiT
from sample import generate

LOG_EVERY = 10  # steps
AHEAD = 3  # steps whose batches are made while the device trains

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
    compiled = device.type == "cuda" and cfg.compile
    if cfg.fsdp:
        from extra.fsdp import shard

        ema = shard(ema, device) if cfg.ema else model
        shard(model, device, compiled)
    elif compiled:
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
    norm = norm.full_tensor() if cfg.fsdp else norm
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * lr_at(step, cfg) / cfg.lr
        optimizer.step()
        # DDP's gradients stay views of its buckets
        optimizer.zero_grad(set_to_none=world == 1 or cfg.fsdp)
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
    val_sets = read_val_sets(cfg, meta)
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
    if world > 1 and not cfg.fsdp:
        net = DDP(model, gradient_as_bucket_view=True, forward_sync_buffers=False)

    pool = ThreadPoolExecutor(1)  # makes the next batches while this one trains
    closing.callback(pool.shutdown, cancel_futures=True)
    pin = device.type == "cuda"
    load_step = partial(micro_batches, train_ids, meta, cfg, rank=rank, world=world, pin=pin)
    upcoming = deque(pool.submit(load_step, step + i) for i in range(AHEAD))
    upcoming[0].result()  # damaged data fails here, before anything is written

    run = SimpleNamespace(
        cfg=cfg, rank=rank, world=world, device=device, micro=micro, meta=meta, val_sets=val_sets,
        tokenizer=tokenizer, canvas=canvas, model=model, ema=ema, net=net, optimizers=optimizers,
        pool=pool, load_step=load_step, upcoming=upcoming, step=step, best=best, seconds=seconds,
        losses=losses, results={}, split_tokens={}, first=step, status="", per_window=0.0,
        write_texts=None, log=lambda record: None, say=lambda text: None, stderr=sys.stderr,
    )  # fmt: skip
    check_validation(run)
    if rank == 0:
        run.log, run.say, run.stderr = open_log(cfg, step, closing)
    introduce(run, accumulation, resume or bool(state))
    return run


def check_validation(run, windows=8):
    """A short validation, and two texts if validations log texts, before anything is written, so
    that faults show now and not after hours. Training draws no number from what this draws from."""
    cfg = run.cfg
    for name, result in validate(run, windows).items():
        if not math.isfinite(result["nats"]):
            fail(f"{name} before step {run.step + 1}: {result['nats']} nats per token")
    if cfg.val_samples:
        from tasks.monitor import make_monitor

        run.write_texts = make_monitor(cfg, run.tokenizer, run.canvas, run.device, run.micro)
        run.write_texts(run.ema, 2, steps=2)
        run.model.train()  # with ema=0 the average is the model


def loop(run):
    """Train until cfg.steps; log, validate and save on the way. After a signal, save and exit."""
    cfg, stopping = run.cfg, False
    layout = "{n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}"
    run.bar = progress(total=cfg.steps, initial=run.step, disable=run.rank > 0, file=run.stderr,
                       leave=True, bar_format=layout)  # fmt: skip
    run.logged = run.timed = time.time()
    with catch_signals() as signals:
        while run.step < cfg.steps and not stopping:
            batches = run.upcoming.popleft().result()
            run.upcoming.append(run.pool.submit(run.load_step, run.step + AHEAD))
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
            keep_now = cfg.keep_every and run.step % cfg.keep_every == 0
            if log_now or eval_now or save_now or keep_now or stopping:
                loss, norm, stopping = synchronise(run, norm, signals)
            if log_now:
                log_steps(run, loss, norm)
            show_progress(run)
            pause = time.time()
            if eval_now:
                validate_and_keep_best(run)
            if save_now or stopping:
                save_run(run, "ckpt.pt")
            if keep_now:
                save_run(run, f"step_{run.step}.pt")
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


def validate_and_keep_best(run):
    """Log the validation bounds, and texts; save best.pt if the bound is the lowest."""
    start = time.time()
    results = run.results = validate(run, run.cfg.eval_windows)
    run.val = results["val"]
    run.per_window = (time.time() - start) / sum(r["forwards"] for r in results.values())
    run.log(dict(step=run.step) | results)
    if run.write_texts:
        run.log(dict(step=run.step) | run.write_texts(run.ema, run.cfg.val_samples))
        run.model.train()  # with ema=0 the average is the model
    bits = figure(run.val, "bits_per_char")
    run.say(f"step {run.step}: {bits} bits per character of validation text")
    if run.val["nats"] < run.best:
        run.best = run.val["nats"]
        save_run(run, "best.pt")


def validate(run, windows):
    """{name: the report} on `windows` windows (0: all) of each validation set. All ranks share the
    windows."""
    model, cfg, reports = run.ema.eval(), run.cfg, {}
    options = dict(T=cfg.T, windows=windows, batch_size=run.micro, dtype=cfg.dtype)
    for name, (ids, meta, corpus, split) in run.val_sets.items():
        options["split_tokens"] = run.split_tokens.get(name)  # counted once per run
        result = bound(model, ids, meta, cfg, f"{corpus}/{split}.bin", **options)
        run.split_tokens[name] = result["split_tokens"]
        reports[name] = report(result, meta, split)
    run.model.train()  # with ema=0 the average is the model
    return reports


def finish(run):
    """Validate on all windows, print samples and what to run next; returns the report."""
    cfg, out, texts = run.cfg, run.cfg.out_dir, []
    results = validate(run, 0) if cfg.eval_windows or not run.results else run.results
    val = results.pop("val")
    run.log(dict(step=run.step, final=val) | results)
    if cfg.samples:
        texts = generate(run.ema.eval(), run.tokenizer, cfg, cfg.samples, run.canvas)
    if run.rank == 0:
        bits, perplexity = figure(val, "bits_per_char", 3), figure(val, "perplexity", 1)
        run.say(f"\nvalidation: {bits} bits per character, perplexity {perplexity} per token, "
                f"after {run.seconds:.0f} s of training")  # fmt: skip
        for text in texts:
            run.say(f"\n--- sample\n{text}")
        out, ckpt = shlex.quote(out), shlex.quote(f"{out}/ckpt.pt")
        run.say(f"\nNext:\n  python sample.py {ckpt} --watch\n  python evaluate.py {ckpt}\n"
                f"  python -m tasks.plot {out}")  # fmt: skip
    return val


@command
def command_line(argv=None):
    flags = (
        ("epochs", "passes over the training rows; sets steps", 0.0),
        ("resume", "continue from ckpt.pt of out_dir, if there is one, with its fields"),
        ("overwrite", "delete the run that is in out_dir"),
    )
    cfg, args = from_cli(argv, doc=__doc__, flags=flags)
    check_range(args, epochs=0)
    with process_group(cfg):
        cfg = replace(cfg, steps=steps_of(args.epochs, cfg)) if args.epochs else cfg
        main(cfg, args.resume, args.overwrite)


if __name__ == "__main__":
    command_line()
