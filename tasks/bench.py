"""Measure: training speed and memory, seconds and network calls of the samplers, noise of the estimators.

python -m tasks.bench train owt_mdlm --batch_size 8 --micro_batch 8                   # tokens/s, share of the peak, memory
python -m tasks.bench train --n_layer 4 --sweep seq_len=128,256,512,1024,2048,4096    # how cost grows; any field
python -m tasks.bench train --n_layer 4 --sweep dtype=float32,bfloat16 --profile      # and where the time goes
python -m tasks.bench sample out/pydocs_mdlm/ckpt.pt --steps 64 1000 --length 64 256  # each sampler, same weights
python -m tasks.bench semi_ar out/pydocs_mdlm/ckpt.pt                                 # long texts, window by window
python -m tasks.bench evaluate out/pydocs_mdlm/ckpt.pt --repeats 30                   # error per forward

Machines are noisy: runs are interleaved, figures are medians, and what counts is the ratio within one run.
"""

import contextlib
import itertools
import math
import multiprocessing
import re
import statistics
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import train
from common import (
    add_model_options,
    autocast,
    check_range,
    choose_sampler,
    compute_dtype,
    fail,
    parser,
    pick_device,
    to_json,
)
from configs import from_cli
from data import batches
from data.corpus import read_split, take, unpack
from diffusion import LOSSES, denoiser, row_generators, stratify, training_time
from evaluate import bound, report
from model import flops_per_token, load
from samplers import SAMPLERS, cached_denoiser, semi_ar


def timed(sampling, model, cfg, canvas, dtype, first=0):
    """(seconds, calls, rows through the head) of sampling(denoise, canvas, gen), a generator of canvases, for the
    texts from number `first` on: when a text's tokens are revealed, and so its calls, depends on its number."""
    count, plain = [0, 0], (cached_denoiser if cfg.causal else denoiser)(model, cfg)

    def counted(x, t, at):
        count[0] += 1
        count[1] += int(at.sum())
        return plain(x, t, at)

    start = time.perf_counter()
    with autocast(canvas.device, dtype):
        for x in sampling(counted, canvas, row_generators(0, range(first, first + len(canvas)))):
            x.sum().item()  # waits for the device, as a reader of the frames would
    return time.perf_counter() - start, *count


def interleaved(jobs, repeats):
    """{name: (median seconds, calls, head rows)} of jobs {name: () -> those three}, run in turns."""
    runs = {name: [] for name in jobs}
    for _ in tqdm(range(repeats), unit="repeat", leave=False):
        for name, job in jobs.items():
            runs[name].append(job())
    return {name: (statistics.median(r[0] for r in of), *of[-1][1:]) for name, of in runs.items()}


def empty(cfg, device, *shape):
    """A canvas of masks, behind a first token where the model is always given one: any will do."""
    canvas = torch.full(shape, cfg.mask_id, device=device)
    canvas[:, : cfg.bos] = 0
    return canvas


def bench_sample(args):
    """Seconds, calls and head rows of samplers for one batch, from the same weights, for each number of steps and
    each length of rows; how many times faster each is than the first there."""
    device = pick_device(args.device)
    model, cfg = load(args.ckpt, device=device, dtype=args.dtype)
    names = args.samplers or (["ar"] if cfg.causal else list(SAMPLERS))
    lengths = args.length or [cfg.seq_len]
    if not 1 <= min(lengths) <= max(lengths) <= cfg.seq_len:
        fail(
            f"--length {max(lengths)}: must be at least 1 and at most the model's seq_len, {cfg.seq_len}"
        )

    def run(name, steps, length):
        sampling = lambda denoise, x, gen: SAMPLERS[name](denoise, x, steps, cfg, gen)
        return timed(sampling, model, cfg, empty(cfg, device, args.batch_size, length), args.dtype)

    for name in names:
        run(choose_sampler(cfg, name), 4, lengths[0])  # warm-up
    jobs = list(itertools.product(args.steps, lengths, names))
    figures = interleaved({job: partial(run, job[2], *job[:2]) for job in jobs}, args.repeats)
    return [
        dict(sampler=name, steps=steps, length=length, seconds=s, calls=calls, head_rows=rows,
             times_faster=figures[steps, length, names[0]][0] / s)
        for (steps, length, name), (s, calls, rows) in figures.items()
    ]  # fmt: skip


def bench_semi_ar(args):
    """One text of 16 x seq_len tokens, window by window, beside as many tokens in 16 texts of seq_len that know
    nothing of each other: in one batch, and one at a time."""
    for name in ("samplers", "steps"):
        if len(getattr(args, name) or ()) > 1:
            fail(f"--{name} {' '.join(map(str, getattr(args, name)))}: semi_ar takes one")
    device = pick_device(args.device)
    model, cfg = load(args.ckpt, device=device, dtype=args.dtype)
    L, sampler = cfg.seq_len, SAMPLERS[choose_sampler(cfg, *(args.samplers or []))]
    plain = lambda denoise, x, gen: sampler(denoise, x, args.steps[0], cfg, gen)
    run = lambda sampling, canvas, first=0: timed(sampling, model, cfg, canvas, args.dtype, first)
    long = lambda stride: run(
        lambda denoise, x, gen: semi_ar(
            denoise, x, args.steps[0], cfg, gen, sampler, stride=stride
        ),
        empty(cfg, device, 1, 16 * L),
    )
    alone = lambda: [
        sum(column) for column in zip(*(run(plain, empty(cfg, device, 1, L), i) for i in range(16)))
    ]
    jobs = {
        "16 texts, one batch": partial(run, plain, empty(cfg, device, 16, L)),
        "16 texts, one by one": alone,
    }
    jobs |= {
        f"one text, stride {stride}": partial(long, stride)
        for stride in (L // 4, L // 2, L * 3 // 4, L - 1)
    }
    run(plain, empty(cfg, device, 1, L))  # warm-up
    return [
        {"tokens": 16 * L, "how": how, "seconds": s, "calls": calls, "tokens_per_s": 16 * L / s}
        for how, (s, calls, _) in interleaved(jobs, args.repeats).items()
    ]


def bench_evaluate(args):
    """Scatter of the bound of one split over repeated estimates, one forward per window each:
    iid t, MDLM's t (stratified within a batch, at least 1e-3), and our exact counts."""
    device = pick_device(args.device)
    model, cfg = load(args.ckpt, device=device, dtype=args.dtype)
    if cfg.causal or not cfg.zero_masking:
        fail(
            f"{args.ckpt}: the estimators are of a continuous-time bound, which loss={cfg.loss} does not have"
        )
    ids, meta = read_split(cfg.data, "val", cfg)
    ids = ids[: len(ids) // cfg.seq_len * cfg.seq_len]  # whole windows, the same for all
    if not len(ids):
        fail(f"{cfg.data}/val.bin: shorter than one window of {cfg.seq_len}")
    rows = take(ids, range(0, len(ids), cfg.seq_len), cfg.seq_len, cfg, "val.bin")
    x0, maskable, _ = (a.to(device) for a in unpack(rows, meta, cfg))
    loss = "sedd" if cfg.loss == "sedd" else "mdlm"
    theirs = replace(
        cfg,
        loss=loss,
        aux_ce=0.0,
        carry_over=True,
        T=0,
        t_min=1e-3,
        time_law="uniform",
        time_draw="stratified",
    )

    @torch.no_grad()
    def by_time(draw):
        nats = 0.0
        with autocast(device, args.dtype):
            for rows in torch.randperm(len(x0)).split(args.batch_size):
                x, m = x0[rows.to(device)], maskable[rows.to(device)]
                t = training_time(draw(len(x)), theirs).to(device)
                nats += LOSSES[loss](model, x, m, theirs, t).double().sum().item()
        return nats / maskable.sum().item()

    def by_count(seed):
        return bound(
            model,
            ids,
            meta,
            cfg,
            "val.bin",
            batch_size=args.batch_size,
            seed=seed,
            dtype=args.dtype,
        )

    estimates = {"iid t": [], "stratified t (MDLM)": [], "exact counts": []}
    reported = []
    for seed in tqdm(range(args.repeats), unit="repeat", leave=False):
        torch.manual_seed(seed)
        estimates["iid t"].append(by_time(lambda n: torch.rand(n, dtype=torch.float64)))
        estimates["stratified t (MDLM)"].append(by_time(stratify))
        ours = by_count(seed)
        estimates["exact counts"].append(ours["nats"])
        reported.append(ours["se"])
    bits = report(dict(nats=1.0, se=0.0), meta, "val")["bits_per_char"]  # of one nat per token
    best = np.std(estimates["exact counts"], ddof=1) * bits
    error = 1 / math.sqrt(2 * (args.repeats - 1))  # relative error of a standard deviation
    rows = []
    for name, values in estimates.items():
        mean, std = np.mean(values) * bits, np.std(values, ddof=1) * bits
        rows.append(dict(estimator=name, bits_per_char=mean, std=std, std_error=std * error,
                         forwards_for_equal_error=(std / best) ** 2))  # fmt: skip
    rows.append(
        dict(estimator="reported error of exact counts", std=float(np.mean(reported)) * bits)
    )
    return [
        {k: float(v) if isinstance(v, np.floating) else v for k, v in row.items()} for row in rows
    ]


# ---------------------------------------------------------------------------------------------------------
# Training. Every case is a process of its own, so that its memory is its own, and does a step when it is told to.

PARTS = {  # of a step: what an operation, or one that it is part of, is called; the first that fits
    "head and loss": ("Costs", "_log_softmax", "LogSoftmax", "gather", "Gather"),
    "optimizer": ("Optimizer.",),
    "average": ("aten::lerp", "_foreach_lerp"),
    "clipping": ("linalg_vector_norm", "_foreach_norm", "_foreach_mul_"),
    "attention": ("scaled_dot_product", "aten::bmm", "aten::baddbmm", "aten::_softmax"),
    "matrices": ("aten::mm", "aten::addmm"),
    "embedding": ("embedding",),
    "casts and copies": ("aten::copy_",),
}


def part_of(event):
    """The part of a step that a profiler's event belongs to."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    fits = lambda marks: any(mark in name for mark in marks for name in names)
    return next((part for part, marks in PARTS.items() if fits(marks)), "elementwise and the rest")


def matmul_rate(device, dtype):
    """FLOP/s of a product of two square matrices, the fastest of five."""
    torch.set_float32_matmul_precision("high")  # as in training
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device).to(getattr(torch, dtype))
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = []
    for _ in range(6):  # the first compiles and does not count
        start = time.perf_counter()
        a @ b
        wait()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


def resident():
    """Most MB of memory that this process has held. On Linux not ru_maxrss, which begins with its parent's."""
    if sys.platform == "linux":
        return (
            int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10
        )
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # a Mac counts bytes


def training(pipe, cfg, threads):
    """The process of one case: for each number of steps that it is sent it trains so many and sends back (seconds per
    step, fraction of the tokens that the head answers, peak MB so far); for None, {part: milliseconds} of a step;
    with 0 it ends. The steps are those of train.py, on made-up tokens, which cost the same."""
    torch.set_num_threads(threads)
    device = pick_device(cfg.device)
    cuda = device.type == "cuda"
    before = resident()  # torch itself
    peak = lambda: torch.cuda.max_memory_allocated(device) / 2**20 if cuda else resident() - before
    rng = np.random.default_rng(0)
    ids = rng.integers(cfg.vocab_size, size=200_000 + 2 * cfg.seq_len, dtype=np.uint32)
    meta = dict(wrap=0, pad=None, given=False)
    model, ema, optimizers = train.build(cfg, meta, device)
    pool, steps = ThreadPoolExecutor(1), itertools.count(1)
    load_step = partial(batches.micro_batches, ids, meta, cfg)
    upcoming = pool.submit(load_step, 0)

    def step():
        nonlocal upcoming
        number = next(steps)
        batches, upcoming = upcoming.result(), pool.submit(load_step, number)
        train.train_step(model, optimizers, batches, number, cfg, device)
        train.update_ema(ema, model, number, cfg)
        asked = sum(
            (m if cfg.causal or cfg.aux_ce else m & (x == cfg.mask_id)).sum()
            for _, m, _, x, _ in batches
        )
        return int(asked) / sum(m.numel() for _, m, *_ in batches)

    def wait():
        if cuda:
            torch.cuda.synchronize()

    while (n := pipe.recv()) != 0:
        wait()
        start = time.perf_counter()
        if n:
            masked = statistics.fmean(step() for _ in range(n))
            wait()
            seconds = (time.perf_counter() - start) / n
            pipe.send((seconds, masked, peak()))
            continue
        activities = [torch.profiler.ProfilerActivity.CPU] + cuda * [
            torch.profiler.ProfilerActivity.CUDA
        ]
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(3):
                step()
            wait()
        parts = Counter()
        for event in profile.events():
            if (
                event.device_type == torch.autograd.DeviceType.CPU
            ):  # kernels count where they are launched
                spent = event.self_device_time_total if cuda else event.self_cpu_time_total
                parts[part_of(event)] += spent / 3000  # microseconds of three steps
        pipe.send(dict(parts))
    pool.shutdown()


def attempt(target, pipe, *args):
    """target(pipe, *args), which tells in a line what it cannot do: above all, not enough memory."""
    try:
        target(pipe, *args)
    except (RuntimeError, ImportError) as e:
        pipe.send(str(e).splitlines()[0])
    except EOFError:  # another case failed
        pass


@contextlib.contextmanager
def children(target, cases):
    """For cases {name: arguments}, each in a process of its own that runs target(pipe, *arguments, threads): the
    function ask(name, n), which sends a case n and returns its answer. At the end all are sent 0."""
    spawn, pipes = multiprocessing.get_context("spawn"), {}
    for name, args in cases.items():
        here, there = spawn.Pipe()
        args = (target, there, *args, torch.get_num_threads())
        child = spawn.Process(target=attempt, args=args, daemon=True)
        child.start()
        there.close()
        pipes[name] = here, child

    def ask(name, n):
        here, child = pipes[name]
        try:
            here.send(n)
            answer = here.recv()
        except (EOFError, OSError):
            child.join()
            memory = " (memory?)" * (child.exitcode == -9)
            fail(f"{name}: its process ended with exit code {child.exitcode}{memory}")
        return fail(f"{name}: {answer}") if isinstance(answer, str) else answer

    yield ask
    for here, child in pipes.values():
        here.send(0)
        child.join()


def bench_train(cases, repeats, profile):
    """Rows of {name: Config}: the step of each in turn, medians. tflops are those of flops_per_token, for the
    fraction of tokens that were masked; `of_peak` is their share of the fastest product of two matrices, between the
    rounds, in the dtype that the config computes in (peak_*, TFLOP/s). MB is what the case's process took at most."""
    runs, spent, peak = {name: [] for name in cases}, {}, Counter()
    device = pick_device(next(iter(cases.values())).device)
    with children(training, {name: (cfg,) for name, cfg in cases.items()}) as ask:
        n = {}  # so many steps at once that the clock's own time is nothing
        for name in cases:
            ask(name, 1)  # warm-up, and compilation
            n[name] = max(1, round(0.2 / ask(name, 1)[0]))
        for _ in tqdm(range(repeats), unit="repeat", leave=False):
            for name in cases:
                runs[name].append(ask(name, n[name]))
            for dtype in ("float32", "bfloat16"):
                peak[dtype] = max(peak[dtype], matmul_rate(device, dtype))
        for name in cases if profile else ():
            spent[name] = ask(name, None)
    rows = []
    for name, cfg in cases.items():
        seconds = statistics.median(r[0] for r in runs[name])
        masked = statistics.fmean(r[1] for r in runs[name])
        tokens, dtype = cfg.batch_size * cfg.seq_len, compute_dtype(device, cfg.dtype)
        flops = flops_per_token(cfg, masked) * tokens
        rows.append(dict(
            case=name, dtype=dtype, ms=seconds * 1e3, tokens_per_s=tokens / seconds, masked=masked,
            gflop=flops / 1e9, tflops=flops / seconds / 1e12, of_peak=flops / seconds / peak[dtype],
            MB=runs[name][-1][2], **{f"peak_{d}": rate / 1e12 for d, rate in peak.items()},
        ))  # fmt: skip
        if len(cases) > 1:
            rows[-1] |= dict(
                times_ms=rows[-1]["ms"] / rows[0]["ms"], times_gflop=flops / 1e9 / rows[0]["gflop"]
            )
    parts = [
        dict(case=name, part=part, ms=ms, share=ms / sum(of.values()))
        for name, of in spent.items()
        for part, ms in sorted(of.items(), key=lambda item: -item[1])
    ]
    return rows, parts


def main_train(argv):
    flags = (
        ("repeats", "rounds, of which the medians are taken", 5),
        ("profile", "also where the time of a step goes"),
        ("json", "one JSON line per row instead of the table"),
        ("sweep", "FIELD=VALUE,VALUE,...: a case for each", ""),
    )
    case = lambda *more: from_cli([*argv, *more], __doc__, flags)
    cfg, args = case()
    field, _, values = args.sweep.partition("=")
    check_range(args, repeats=1)
    if args.sweep and (field not in asdict(cfg) or not values):
        fail(f"--sweep {args.sweep}: must be FIELD=VALUE,VALUE,... with a field of the config")
    cases = (
        {f"{field}={v}": case(f"--{field}={v}")[0] for v in values.split(",")}
        if values
        else {args.config: cfg}
    )
    for c in cases.values():
        batches.split_batch(c, 1), pick_device(c.device)  # fail here, not in every process
    for rows in filter(None, bench_train(cases, args.repeats, args.profile)):
        print(shown(rows, args.json) + "\n" * (not args.json))


BENCHES = {"sample": bench_sample, "semi_ar": bench_semi_ar, "evaluate": bench_evaluate}


def table(rows):
    """Rows of equal keys as aligned text."""
    keys = list(rows[0])
    cell = lambda v: (
        f"{v:.4g}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else str(v)
    )
    cells = [keys] + [[cell(row.get(k, "")) for k in keys] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    return "\n".join("  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))) for line in cells)  # fmt: skip


def shown(rows, as_json):
    """The table, or one JSON line per row."""
    return "\n".join(map(to_json, rows)) if as_json else table(rows)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:
        return main_train(argv[1:])
    p = parser(__doc__)
    p.add_argument("what", choices=["train", *BENCHES])
    p.add_argument("ckpt")
    p.add_argument(
        "--steps", type=int, nargs="+", default=[1000], help="sample, semi_ar: diffusion steps"
    )
    p.add_argument(
        "--length",
        type=int,
        nargs="+",
        help="sample: tokens of a row, at most seq_len, the default",
    )
    p.add_argument(
        "--samplers", nargs="+", choices=SAMPLERS, help="sample: default all; semi_ar: one"
    )
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--repeats", type=int, default=5)
    add_model_options(p)
    p.add_argument("--json", action="store_true", help="one JSON line per row instead of the table")
    args = p.parse_args(argv)
    if args.length and args.what != "sample":
        fail(f"--length: not for {args.what}, whose rows are the model's seq_len long")
    check_range(args, steps=1, batch_size=1, repeats=2 if args.what == "evaluate" else 1)
    print(shown(BENCHES[args.what](args), args.json))


if __name__ == "__main__":
    main()
