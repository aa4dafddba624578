"""Measure training speed and memory, the samplers' seconds and calls, the estimators' noise.

python -m tasks.bench train owt_mdlm --batch_size 8 --micro_batch 8   # tokens/s, share of the peak
python -m tasks.bench train --n_layer 4 --sweep seq_len=128,256,512   # how the cost grows
python -m tasks.bench train --n_layer 4 --sweep dtype=float32,bfloat16 --profile  # parts of a step
python -m tasks.bench sample out/pydocs_mdlm/ckpt.pt --steps 64 1000 --length 64 256
python -m tasks.bench semi_ar out/pydocs_mdlm/ckpt.pt                 # long texts, in windows
python -m tasks.bench evaluate out/pydocs_mdlm/ckpt.pt --repeats 30   # error per forward

Machines are noisy: cases run in turns, figures are medians, and only ratios within one run count.
"""

import itertools
import math
import statistics
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import torch

import train
from common import (
    autocast,
    check_range,
    command,
    compute_dtype,
    fail,
    parser,
    pick_device,
    progress,
)
from data.batches import micro_batches, split_batch
from data.checkpoints import load
from data.command_line import add_model_options, choose_sampler, from_cli
from data.corpus import read_split, take, unpack
from diffusion import LOSSES, alpha, mask_tokens, stratify, training_time
from evaluate import bound, report
from model import flops_per_token
from samplers import SAMPLERS, semi_ar
from tasks.report import blank_canvas, format_rows, peak_memory, start_processes, time_sampling

# --------------------------------------------------------------------------------------------------
# Samplers


def load_model(args):
    """(model, cfg, device) of the command line's checkpoint."""
    device = pick_device(args.device)
    return *load(args.ckpt, not args.no_ema, device, args.dtype), device


def time_in_turns(jobs, repeats):
    """{name: (median seconds, calls, head rows)} of jobs {name: () -> those three}."""
    results = {name: [] for name in jobs}
    for _ in progress(range(repeats), unit="repeat"):
        for name, job in jobs.items():
            results[name].append(job())
    return {
        name: (statistics.median(seconds for seconds, *_ in runs), *runs[-1][1:])
        for name, runs in results.items()
    }


def bench_sample(args):
    """Seconds, calls and head rows of samplers for one batch, with the same weights, for each
    number of steps and row length; times_faster: than the first sampler there."""
    model, cfg, device = load_model(args)
    names = args.samplers or (["ar"] if cfg.causal else list(SAMPLERS))
    lengths = args.length or [cfg.seq_len]
    for length in lengths:
        if not 1 <= length <= cfg.seq_len:
            fail(f"--length {length}: must be from 1 to the model's seq_len, {cfg.seq_len}")

    def run(steps, length, name):
        sampling = lambda denoise, x, gen: SAMPLERS[name](denoise, x, steps, cfg, gen)
        canvas = blank_canvas(cfg, device, args.batch_size, length)
        return time_sampling(sampling, model, cfg, canvas, args.dtype)

    for name in names:
        run(4, lengths[0], choose_sampler(cfg, name))  # warm-up
    jobs = {job: partial(run, *job) for job in itertools.product(args.steps, lengths, names)}
    results = time_in_turns(jobs, args.repeats)
    rows = []
    for (steps, length, name), (seconds, calls, head_rows) in results.items():
        row = dict(sampler=name, steps=steps, length=length, seconds=seconds, calls=calls)
        faster = results[steps, length, names[0]][0] / seconds
        rows.append(row | dict(head_rows=head_rows, times_faster=faster))
    return rows


def bench_semi_ar(args):
    """One text of 16 x seq_len tokens, window by window, beside 16 independent texts of seq_len,
    in one batch and one by one."""
    for name in ("samplers", "steps"):
        if len(given := getattr(args, name) or []) > 1:
            fail(f"--{name} {' '.join(map(str, given))}: semi_ar takes one")
    model, cfg, device = load_model(args)
    L, steps = cfg.seq_len, args.steps[0]
    sampler = SAMPLERS[choose_sampler(cfg, *(args.samplers or []))]
    plain = lambda denoise, x, gen: sampler(denoise, x, steps, cfg, gen)

    def run(sampling, rows, length, first=0):
        canvas = blank_canvas(cfg, device, rows, length)
        return time_sampling(sampling, model, cfg, canvas, args.dtype, first)

    def run_one_by_one():
        return [sum(column) for column in zip(*(run(plain, 1, L, i) for i in range(16)))]

    def run_windows(stride):
        options = dict(sampler=sampler, stride=stride)
        long = lambda denoise, x, gen: semi_ar(denoise, x, steps, cfg, gen, **options)
        return run(long, 1, 16 * L)

    jobs = {"16 texts, one batch": partial(run, plain, 16, L)}
    jobs["16 texts, one by one"] = run_one_by_one
    for stride in (L // 4, L // 2, L * 3 // 4, L - 1):
        jobs[f"one text, stride {stride}"] = partial(run_windows, stride)
    run(plain, 1, L)  # warm-up
    return [
        dict(tokens=16 * L, case=name, seconds=s, calls=calls, tokens_per_s=16 * L / s)
        for name, (s, calls, _) in time_in_turns(jobs, args.repeats).items()
    ]


# --------------------------------------------------------------------------------------------------
# Estimators of the bound


def estimate_by_time(model, cfg, x0, maskable, counted, draw, args):
    """The bound in nats per token of rows (N, L), with a time per row from the uniforms draw(n)."""
    nats, loss = 0.0, "sedd" if cfg.loss == "sedd" else "mdlm"
    plain = dict(T=0, aux_ce=0.0, carry_over=True, time_law="uniform", time_draw="stratified")
    cfg = replace(cfg, loss=loss, t_min=1e-3, **plain)
    with torch.no_grad(), autocast(x0.device, args.dtype):
        for rows in torch.randperm(len(x0)).split(args.batch_size):
            x, m, c = (a[rows.to(x0.device)] for a in (x0, maskable, counted))
            t = training_time(draw(len(x)), cfg).to(x0.device)
            xt = mask_tokens(x, alpha(cfg, t), m, cfg.mask_id)
            nats += LOSSES[loss](model, x, c, cfg, t, xt).double().sum().item()
    return nats / counted.sum().item()


def bench_evaluate(args):
    """Scatter of the bound over repeated estimates with one forward per window: with independent
    times; with MDLM's times, stratified within a batch and at least 1e-3; with our exact counts."""
    model, cfg, device = load_model(args)
    if cfg.causal or not cfg.zero_masking:
        fail(f"{args.ckpt}: loss={cfg.loss} has no continuous-time bound to estimate")
    ids, meta = read_split(cfg.data, "val", cfg)
    ids = ids[: len(ids) // cfg.seq_len * cfg.seq_len]  # whole windows only
    if not len(ids):
        fail(f"{cfg.data}/val.bin: shorter than one window of {cfg.seq_len}")
    rows = take(ids, range(0, len(ids), cfg.seq_len), cfg.seq_len, cfg, "val.bin")
    data = [tensor.to(device) for tensor in unpack(rows, meta, cfg)]
    iid = lambda n: torch.rand(n, dtype=torch.float64)
    draws, ours = {"iid t": iid, "stratified t (MDLM)": stratify}, "exact counts"
    estimates, reported = {name: [] for name in (*draws, ours)}, []
    settings = dict(batch_size=args.batch_size, dtype=args.dtype)
    for seed in progress(range(args.repeats), unit="repeat"):
        torch.manual_seed(seed)
        for name, draw in draws.items():
            estimates[name].append(estimate_by_time(model, cfg, *data, draw, args))
        result = bound(model, ids, meta, cfg, "val.bin", seed=seed, **settings)
        estimates[ours].append(result["nats"])
        reported.append(result["se"])
    per_token = report(result | dict(nats=1.0, se=0.0), meta, "val")
    bits = per_token["bits_per_char"]  # per nat per token
    best = np.std(estimates[ours], ddof=1) * bits
    error = 1 / math.sqrt(2 * (args.repeats - 1))  # relative error of a standard deviation
    table = []
    for name, values in estimates.items():
        mean, std = float(np.mean(values) * bits), float(np.std(values, ddof=1) * bits)
        row = dict(estimator=name, bits_per_char=mean, std=std, std_error=std * error)
        table.append(row | dict(forwards_for_equal_error=float((std / best) ** 2)))
    last = dict(estimator="reported error of exact counts", std=float(np.mean(reported)) * bits)
    return [*table, last]


# --------------------------------------------------------------------------------------------------
# Training. Each case has its own process, so that its memory is measured alone.

PARTS = {  # part of a step: marks in the name of an operation or of one that calls it; first match
    "head and loss": ("SlicedCrossEntropy", "_log_softmax", "LogSoftmax", "gather", "Gather"),
    "optimizer": ("Optimizer.",),
    "average": ("aten::lerp", "_foreach_lerp"),
    "clipping": ("linalg_vector_norm", "_foreach_norm", "_foreach_mul_"),
    "attention": ("scaled_dot_product", "aten::bmm", "aten::baddbmm", "aten::_softmax"),
    "matrices": ("aten::mm", "aten::addmm"),  # also the head's where it stores the logits
    "embedding": ("embedding",),
    "casts and copies": ("aten::copy_",),
}


def find_part(event):
    """The part of a step that a profiler's event belongs to."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    for part, marks in PARTS.items():
        if any(mark in name for mark in marks for name in names):
            return part
    return "elementwise and the rest"


def profile_parts(step, wait, cuda):
    """{part: milliseconds of a step}, the mean of three steps. Kernels of a GPU count at the
    operation that launches them."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(3):
            step()
        wait()
    parts = Counter()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CPU:
            spent = event.self_device_time_total if cuda else event.self_cpu_time_total
            parts[find_part(event)] += spent / 3000  # microseconds of three steps
    return dict(parts)


def measure_matmul(device, dtype):
    """FLOP/s of a product of two square matrices, the fastest of five."""
    torch.set_float32_matmul_precision("high")  # as in training
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device).to(getattr(torch, dtype))
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = []
    for _ in range(6):  # the first is a warm-up
        start = time.perf_counter()
        a @ b
        wait()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


def make_step(cfg, device, pool):
    """step() does a step of train.py on random tokens, which cost as much as real ones, and returns
    the fraction of the tokens that pass the head. `pool` makes the next batch meanwhile."""
    rng = np.random.default_rng(0)
    ids = rng.integers(cfg.vocab_size, size=200_000 + 2 * cfg.seq_len, dtype=np.uint32)
    meta = dict(wrap=0, pad=None, given=False)
    model, ema, optimizers = train.build(cfg, meta, device)
    numbers, load_step = itertools.count(1), partial(micro_batches, ids, meta, cfg)
    upcoming = pool.submit(load_step, 0)

    def step():
        nonlocal upcoming
        number = next(numbers)
        batches, upcoming = upcoming.result(), pool.submit(load_step, number)
        train.train_step(model, optimizers, batches, number, cfg, device)
        train.update_ema(ema, model, number, cfg)
        predicted = total = 0
        for _, maskable, _, xt, _ in batches:
            masked = maskable & (xt == cfg.mask_id)
            at = maskable if cfg.causal or cfg.aux_ce else masked
            predicted, total = predicted + int(at.sum()), total + at.numel()
        return predicted / total

    return step


def serve_training(pipe, cfg, clock, threads):
    """The process of one case. The message is a number of steps to train, the answer (seconds per
    step, fraction of the tokens that pass the head, peak MB so far). Message None: the answer is
    `profile_parts`. Message 0: end."""
    torch.set_num_threads(threads)
    device = pick_device(cfg.device)
    cuda = device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    before = peak_memory()  # of torch itself
    with ThreadPoolExecutor(1) as pool:
        step = make_step(cfg, device, pool)
        while (n := pipe.recv()) != 0:
            if n is None:
                pipe.send(profile_parts(step, wait, cuda))
                continue
            wait()
            start = clock()
            predicted = statistics.fmean(step() for _ in range(n))
            wait()
            seconds = (clock() - start) / n
            MB = peak_memory() - before
            if cuda:
                MB = torch.cuda.max_memory_allocated(device) / 2**20
            pipe.send((seconds, predicted, MB))


def bench_train(cases, repeats, profile, clock=time.perf_counter):
    """(rows, parts) of {name: Config}, whose steps run in turns; parts only with `profile`. tflops
    are those of flops_per_token, for the fraction of tokens that was masked. of_peak is their share
    of peak_<dtype>, the fastest product of two matrices between the rounds (TFLOP/s), in the dtype
    that the case computes in; nan if that is an emulated bfloat16. MB is the case's peak memory."""
    device = pick_device(next(iter(cases.values())).device)
    runs = {name: [] for name in cases}
    peak = dict.fromkeys(("float32", compute_dtype(device, "auto")), 0.0)
    with start_processes(
        serve_training, {name: (cfg, clock) for name, cfg in cases.items()}
    ) as request:
        n = {}  # steps per message: long enough that the clock's resolution does not matter
        for name in cases:
            request(name, 1)  # warm-up, and compilation
            n[name] = max(1, round(0.2 / request(name, 1)[0]))
        for _ in progress(range(repeats), unit="repeat"):
            for name in cases:
                runs[name].append(request(name, n[name]))
            for dtype in peak:
                peak[dtype] = max(peak[dtype], measure_matmul(device, dtype))
        spent = {name: request(name, None) for name in cases} if profile else {}
    rows = []
    for name, cfg in cases.items():
        dtype = compute_dtype(device, cfg.dtype)
        rows.append(dict(case=name, dtype=dtype) | summarise(cfg, runs[name], dtype, peak))
        if len(cases) > 1:
            rows[-1] |= {f"times_{key}": rows[-1][key] / rows[0][key] for key in ("ms", "gflop")}
    parts = []
    for name, times in spent.items():
        for part, ms in sorted(times.items(), key=lambda item: -item[1]):
            parts.append(dict(case=name, part=part, ms=ms, share=ms / sum(times.values())))
    return rows, parts


def summarise(cfg, runs, dtype, peak):
    """The figures of one case from its answers (seconds, masked, MB) and {dtype: peak FLOP/s}."""
    seconds = statistics.median(run[0] for run in runs)
    masked = statistics.fmean(run[1] for run in runs)
    tokens = cfg.batch_size * cfg.seq_len
    flops = flops_per_token(cfg, masked) * tokens
    return dict(
        ms=seconds * 1e3, tokens_per_s=tokens / seconds, masked=masked, gflop=flops / 1e9,
        tflops=flops / seconds / 1e12, of_peak=flops / seconds / peak.get(dtype, math.nan),
        MB=runs[-1][2], **{f"peak_{name}": rate / 1e12 for name, rate in peak.items()},
    )  # fmt: skip


BENCHES = {"sample": bench_sample, "semi_ar": bench_semi_ar, "evaluate": bench_evaluate}


def parse_cases(argv):
    """({name: Config}, args) of `bench train`: a case, or one for each value of --sweep."""
    flags = (
        ("repeats", "rounds, of which the medians are taken", 5),
        ("profile", "also where the time of a step goes"),
        ("cpu_time", "time of the CPU instead of the clock's: on a machine that others use too"),
        ("json", "one JSON line per row instead of the table"),
        ("sweep", "FIELD=VALUE,VALUE,...: a case for each", ""),
    )
    cfg, args = from_cli(argv, __doc__, flags)
    check_range(args, repeats=1)
    cases = {args.config: cfg}
    if args.sweep:
        field, _, values = args.sweep.partition("=")
        if field not in asdict(cfg) or not values:
            fail(f"--sweep {args.sweep}: must be FIELD=VALUE,VALUE,... with a field of the config")
        settings = [f"{field}={value}" for value in values.split(",")]
        cases = {name: from_cli([*argv, f"--{name}"], __doc__, flags)[0] for name in settings}
    for cfg in cases.values():  # fail here, not in every process
        split_batch(cfg, 1)
        pick_device(cfg.device)
    return cases, args


def main_train(argv):
    cases, args = parse_cases(argv)
    clock = time.process_time if args.cpu_time else time.perf_counter
    for rows in bench_train(cases, args.repeats, args.profile, clock):
        if rows:
            print(format_rows(rows, args.json) + "\n" * (not args.json))


def parse_arguments(argv):
    p = parser(__doc__)
    p.add_argument("what", choices=["train", *BENCHES])
    p.add_argument("ckpt")
    integers = dict(type=int, nargs="+")
    p.add_argument("--steps", **integers, default=[1000], help="sample, semi_ar: diffusion steps")
    p.add_argument("--length", **integers, help="sample: tokens of a row [the model's seq_len]")
    p.add_argument("--samplers", nargs="+", choices=SAMPLERS, help="sample [all]; semi_ar: one")
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--repeats", type=int, default=5)
    add_model_options(p)
    p.add_argument("--json", action="store_true", help="one JSON line per row instead of the table")
    args = p.parse_args(argv)
    if args.length and args.what != "sample":
        fail(f"--length: not for {args.what}, whose rows are the model's seq_len long")
    check_range(args, steps=1, batch_size=1, repeats=2 if args.what == "evaluate" else 1)
    return args


@command
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:
        return main_train(argv[1:])
    args = parse_arguments(argv)
    print(format_rows(BENCHES[args.what](args), args.json))


if __name__ == "__main__":
    main()
