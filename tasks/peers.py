"""Upstream's own code beside ours on this machine's CPU: seconds and memory of a training step,
seconds of a batch of samples, and the bound that MDLM reaches in so many seconds of training.

git clone https://github.com/kuleshov-group/mdlm ../mdlm                         # tested: c112c52
git clone https://github.com/flukeskywalker/nanoDD ../nanodd                     # b656fc6
git clone https://github.com/louaaron/Score-Entropy-Discrete-Diffusion ../sedd   # 0605786
git clone https://github.com/ML-GSAI/SMDM ../smdm                                # 583aa47
pip install einops==0.8.2 ema_pytorch==0.8.3
python -m tasks.peers train --clones .. --vocab_size 50257 --batch_size 8
python -m tasks.peers sample --clones .. --vocab_size 27 --steps 1000 --batch_size 8
python -m tasks.peers learn --clones .. --vocab_size 2048 --batch_size 16 --data pydocs --lr 1e-3

All networks have 4 blocks of width 256; each project has its own network, ours is always MDLM's. In
`train` and `sample` every side has its own process, and the sides take turns. `learn` runs MDLM
alone; compare it with `python train.py` for as many seconds. tasks/upstream.py says what replaces
the kernels of GPUs. Two things only ours does: it keeps freed memory, and it writes attention out
where that is faster, in bfloat16 training.
"""

import itertools
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from common import autocast, check_range, command, compute_dtype, fail, parser, progress
from configs import Config
from data.corpus import read_split, training_rows, unpack
from diffusion import cross_entropy, scatter
from evaluate import bound, report
from head import cast_linears, keep_freed_memory
from model import DiT
from samplers import SAMPLERS
from tasks.bench import serve_training
from tasks.report import (
    blank_canvas,
    format_rows,
    peak_memory,
    settle_mode_options,
    start_processes,
    time_sampling,
)
from tasks.upstream import CPU, PROJECTS, build_mdlm, enter_clone, mdlm

# --------------------------------------------------------------------------------------------------
# The process of a side. Each message is answered with a tuple that starts with seconds; 0 ends.


def serve_steps(pipe, project, clone, cfg, threads):
    """Does a step for each message: (seconds, loss, peak MB). Ours is `bench.serve_training`, whose
    second number is the fraction of tokens that pass the head."""
    if project == "ours":
        return serve_training(pipe, cfg, time.perf_counter, threads)
    torch.set_num_threads(threads)
    sys.stdout = sys.stderr  # some projects print their size
    enter_clone(clone)
    PROJECTS[project](replace(cfg, vocab_size=2, n_layer=1))  # imports do not count as its memory
    before, step, number = peak_memory(), PROJECTS[project](cfg), itertools.count()
    while pipe.recv() != 0:
        start = time.perf_counter()
        loss = step(next(number))
        pipe.send((time.perf_counter() - start, loss, peak_memory() - before))


def serve_batches(pipe, side, clone, cfg, T, threads):
    """Draws a batch in T steps for each message: (seconds, network calls)."""
    torch.set_num_threads(threads)
    draw = make_our_draw(cfg, T) if side == "ours" else make_mdlm_draw(side, clone, cfg, T)
    while pipe.recv() != 0:
        pipe.send(draw())


def make_our_draw(cfg, T):
    """draw() samples with our ddpm_cache from random weights, prepared as `load` does."""
    model = DiT(cfg).eval().requires_grad_(False)
    if compute_dtype(CPU, cfg.dtype) == "bfloat16":
        cast_linears(model, torch.bfloat16)
    keep_freed_memory()
    sampling = lambda denoise, x, gen: SAMPLERS["ddpm_cache"](denoise, x, T, cfg, gen)
    canvas = blank_canvas(cfg, CPU, cfg.batch_size, cfg.seq_len)
    first = itertools.count(step=cfg.batch_size)  # other texts in every batch, like theirs
    return lambda: time_sampling(sampling, model, cfg, canvas, cfg.dtype, next(first))[:2]


def make_mdlm_draw(side, clone, cfg, T):
    """draw() samples with MDLM's code; side is "mdlm" and the name of a sampler."""
    enter_clone(clone)
    model, calls = build_mdlm(cfg, side.removeprefix("mdlm "), T).eval(), 0
    forward = model.backbone.forward

    def count_and_forward(*args, **kwargs):
        nonlocal calls
        calls += 1
        return forward(*args, **kwargs)

    def draw():
        nonlocal calls
        start, calls = time.perf_counter(), 0
        with torch.no_grad(), autocast(CPU, cfg.dtype):  # casts the weights once, as ours does
            model._sample()
        return time.perf_counter() - start, calls

    model.backbone.forward = count_and_forward
    return draw


def run_in_turns(target, sides, args, cfg, warm, *more):
    """Request answers in turns from the processes target(pipe, side, clone, cfg, *more), one for
    each of sides {name: clone} and each dtype; the first `warm` rounds do not count. Returns a row
    per process, with medians of its seconds and of their ratios to ours in the same round, and the
    answers."""
    cases = {
        f"{name} {dtype}": (name, clone, replace(cfg, dtype=dtype), *more)
        for dtype in args.dtype
        for name, clone in sides.items()
    }
    runs = {name: [] for name in cases}
    with start_processes(target, cases) as request:
        for r in progress(range(warm + args.repeats), unit="round"):
            for name in cases:
                answer = request(name, 1)
                runs[name] += [answer] * (r >= warm)
    rows = []
    for name, answers in runs.items():
        row = dict(side=name, seconds=statistics.median(seconds for seconds, *_ in answers))
        for dtype in args.dtype:
            pairs = zip(answers, runs[f"ours {dtype}"])
            row[f"over_ours_{dtype}"] = statistics.median(a[0] / ours[0] for a, ours in pairs)
        rows.append(row)
    return rows, list(runs.values())


# --------------------------------------------------------------------------------------------------
# One function per mode: (args, cfg) -> rows of the output


def train(args, cfg):
    """Seconds of a step. MB: peak memory of the process beyond what it had before its network."""
    sides = {"ours": None} | {name: args.clones / name for name in args.sides}
    rows, runs = run_in_turns(serve_steps, sides, args, cfg, 2)
    for row, answers in zip(rows, runs):
        row["tokens_per_s"] = cfg.batch_size * cfg.seq_len / row["seconds"]
        row["MB"] = answers[-1][2]
        if not row["side"].startswith("ours"):
            row["loss"] = answers[-1][1]
    return rows


def sample(args, cfg):
    """Seconds of a batch and network calls, for MDLM's two samplers and our `ddpm_cache`."""
    clone = args.clones / "mdlm"
    sides = {"ours": None, "mdlm ddpm_cache": clone, "mdlm ddpm": clone}
    rows, runs = run_in_turns(serve_batches, sides, args, cfg, 1, args.steps)
    for row, answers in zip(rows, runs):
        row["calls"] = statistics.median(calls for _, calls in answers)
    return rows


class OurInterface(torch.nn.Module):
    """MDLM's network as our losses call a network: model(x, t, at, tokens)."""

    def __init__(self, net, vocab_size):
        super().__init__()
        self.net, self.vocab_size = net, vocab_size

    def forward(self, x, t, at, tokens):
        logits = self.net(x, torch.zeros(len(x)))[at][:, : self.vocab_size].float()
        return [scatter(values, at) for values in cross_entropy(logits, tokens[at])]


def train_for(seconds, step):
    """Call step(0), step(1), ... until the time is over: (number of steps, seconds)."""
    number, spent, start = 0, 0.0, time.perf_counter()
    layout = "{l_bar}{bar}| {n:.0f}/{total:.0f} s {postfix}"
    with progress(total=seconds, bar_format=layout) as bar:
        while spent < seconds:
            loss, number = step(number), number + 1
            before, spent = spent, time.perf_counter() - start
            bar.set_postfix_str(f"step {number}, loss {loss:.2f}", refresh=False)
            bar.update(spent - before)
    return number, spent


def learn(args, cfg):
    """Train MDLM for args.seconds, the first 100 steps a warm-up. Bits per character of its last
    and its averaged weights by our bound, with 4 forwards per window in float32."""
    cfg = replace(cfg, data=args.data, seed=args.seed)
    (ids, meta), (val, _) = (read_split(args.data, split, cfg) for split in ("train", "val"))
    if meta["given"] or meta["pad"] is not None:
        fail(f"{args.data}: has given tokens or padding, which MDLM's step would train on here")

    def rows(i):
        index = i * cfg.batch_size + np.arange(cfg.batch_size)
        x0, _, counted = unpack(training_rows(ids, meta, cfg, index), meta, cfg)
        return x0, counted.long()

    rows(0)  # damaged data fails here
    enter_clone(args.clones / "mdlm")
    torch.manual_seed(args.seed)
    try:
        step = mdlm(cfg, rows, warmup=100)
    except ImportError as e:
        fail(str(e))
    number, spent = train_for(args.seconds, step)
    model = step.model.eval()
    net = OurInterface(model.backbone, cfg.vocab_size)
    bits = lambda: report(bound(net, val, meta, cfg, "val.bin", passes=4), meta, "val")
    row = dict(data=args.data, lr=cfg.lr, seed=args.seed, dtype=cfg.dtype)
    row |= dict(steps=number, seconds=spent, last=bits()["bits_per_char"])
    model.ema.copy_to(model.backbone.parameters())
    return [row | dict(average=bits()["bits_per_char"])]


# --------------------------------------------------------------------------------------------------
# The command

FAST_DTYPES = list(dict.fromkeys(("float32", compute_dtype(CPU, "auto"))))  # none is emulated
MODES = {  # the options that a mode has, with their defaults
    train: dict(sides=list(PROJECTS), dtype=FAST_DTYPES, repeats=5),
    sample: dict(steps=1000, dtype=FAST_DTYPES, repeats=5),
    learn: dict(data="pydocs", lr=1e-3, seconds=270.0, seed=1, dtype=FAST_DTYPES[-1:]),
}


def parse_arguments(argv):
    """(mode, args) of the command line."""
    p = parser(__doc__)
    p.add_argument("what", choices=[mode.__name__ for mode in MODES])
    p.add_argument("--clones", type=Path, default=Path(".."), help="holds mdlm, nanodd, sedd, smdm")
    p.add_argument("--vocab_size", type=int, default=50257)
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--seq_len", type=int, default=256)
    p.add_argument("--n_layer", type=int, default=4)
    dtypes = "learn: one; bfloat16 is a default only where the CPU multiplies in it"
    p.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), help=dtypes)
    p.add_argument("--sides", nargs="+", choices=PROJECTS, help="train: beside ours [all]")
    p.add_argument("--repeats", type=int, help="train, sample: rounds [5]")
    p.add_argument("--steps", type=int, help="sample: diffusion steps [1000]")
    p.add_argument("--data", help="learn: a corpus of data/prepare.py [pydocs]")
    p.add_argument("--lr", type=float, help="learn: [1e-3]")
    p.add_argument("--seconds", type=float, help="learn: of training [270]")
    p.add_argument("--seed", type=int, help="learn: [1]")
    p.add_argument("--json", action="store_true", help="one JSON line per row instead of the table")
    args = p.parse_args(argv)
    (mode,) = (mode for mode in MODES if mode.__name__ == args.what)
    settle_mode_options(args, MODES, mode, f"not for {args.what}")
    check_range(args, steps=1, repeats=1, seconds=0, seed=0)
    if mode is learn and len(args.dtype) > 1:
        fail(f"--dtype {' '.join(args.dtype)}: learn takes one")
    for name in args.sides or ["mdlm"]:
        if not (args.clones / name).is_dir():
            fail(f"--clones {args.clones}: has no folder {name}; --help has the addresses")
    return mode, args


def make_config(args):
    """The Config of all sides; micro_batch: no accumulation."""
    names = ("vocab_size", "seq_len", "n_layer", "batch_size")
    fields = {name: getattr(args, name) for name in names}
    fields |= dict(micro_batch=args.batch_size, lr=3e-4 if args.lr is None else args.lr)
    try:
        return Config(**fields, t_min=1e-3, dtype=args.dtype[0], device="cpu")
    except ValueError as e:
        fail(f"--{e}")


@command
def main(argv=None):
    mode, args = parse_arguments(argv)
    print(format_rows(mode(args, make_config(args)), args.json))


if __name__ == "__main__":
    main()
