"""Measure: seconds and network calls of the samplers, noise of the likelihood estimators.

python bench.py sample out/pydocs_mdlm/ckpt.pt --steps 1000 --batch_size 8      # each sampler, same weights
python bench.py semi_ar out/pydocs_mdlm/ckpt.pt                                 # long texts, window by window
python bench.py evaluate out/pydocs_mdlm/ckpt.pt --repeats 30                   # error per forward

Machines are noisy: runs are interleaved, figures are medians, and what counts is the ratio within one run.
"""

import json
import math
import statistics
import time
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from configs import check_range, device_options, fail, parser
from data.corpus import read_split, take, unpack
from diffusion import (
    LOSSES,
    SAMPLERS,
    cached_denoiser,
    denoiser,
    row_generators,
    semi_ar,
    stratified,
    time_of,
)
from evaluate import bound, report
from model import autocast, load, pick_device
from sample import sampler_for


def timed(sampling, model, cfg, canvas, dtype):
    """(seconds, calls, rows through the head) of sampling(denoise, canvas, gen), a generator of canvases."""
    count, plain = [0, 0], (cached_denoiser if cfg.causal else denoiser)(model, cfg)

    def counted(x, t, at):
        count[0] += 1
        count[1] += int(at.sum())
        return plain(x, t, at)

    start = time.perf_counter()
    with autocast(canvas.device, dtype):
        for x in sampling(counted, canvas, row_generators(0, range(len(canvas)))):
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
    """Seconds, calls and head rows of samplers for one batch, from the same weights; how many times faster each
    is than the first."""
    device = pick_device(args.device)
    model, cfg = load(args.ckpt, device=device)
    names = args.samplers or (["ar"] if cfg.causal else list(SAMPLERS))
    canvas = empty(cfg, device, args.batch_size, cfg.seq_len)
    run = lambda name, steps: timed(
        lambda denoise, x, gen: SAMPLERS[name](denoise, x, steps, cfg, gen), model, cfg, canvas, args.dtype
    )
    for name in names:
        run(sampler_for(cfg, name), 4)  # warm-up
    figures = interleaved({n: partial(run, n, args.steps) for n in names}, args.repeats)
    first = figures[names[0]][0]
    return [
        dict(sampler=name, seconds=s, times_faster=first / s, calls=calls, head_rows=rows)
        for name, (s, calls, rows) in figures.items()
    ]


def bench_semi_ar(args):
    """One text of 16 x seq_len tokens, window by window, beside as many tokens in 16 texts of seq_len that know
    nothing of each other: in one batch, and one at a time."""
    if args.samplers and len(args.samplers) > 1:
        fail(f"--samplers {' '.join(args.samplers)}: semi_ar takes one")
    device = pick_device(args.device)
    model, cfg = load(args.ckpt, device=device)
    L, sampler = cfg.seq_len, SAMPLERS[sampler_for(cfg, *(args.samplers or []))]
    plain = lambda denoise, x, gen: sampler(denoise, x, args.steps, cfg, gen)
    run = lambda sampling, canvas: timed(sampling, model, cfg, canvas, args.dtype)
    long = lambda stride: run(
        lambda denoise, x, gen: semi_ar(denoise, x, args.steps, cfg, gen, sampler, stride=stride),
        empty(cfg, device, 1, 16 * L),
    )
    alone = lambda: [
        sum(column) for column in zip(*(run(plain, empty(cfg, device, 1, L)) for _ in range(16)))
    ]
    jobs = {
        "16 texts, one batch": partial(run, plain, empty(cfg, device, 16, L)),
        "16 texts, one by one": alone,
    }
    jobs |= {
        f"one text, stride {stride}": partial(long, stride) for stride in (L // 4, L // 2, L * 3 // 4, L - 1)
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
    model, cfg = load(args.ckpt, device=device)
    if cfg.causal or not cfg.zero_masking:
        fail(
            f"{args.ckpt}: the estimators are of a continuous-time bound, which loss={cfg.loss} does not have"
        )
    ids, meta = read_split(cfg.data, "val", cfg)
    ids = ids[: len(ids) // cfg.seq_len * cfg.seq_len]  # whole windows, the same for all
    if not len(ids):
        fail(f"{cfg.data}/val.bin: shorter than one window of {cfg.seq_len}")
    rows = take(ids, range(0, len(ids), cfg.seq_len), cfg.seq_len, cfg, "val.bin")
    x0, maskable = (a.to(device) for a in unpack(rows, meta, cfg))
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
                t = time_of(draw(len(x)), theirs).to(device)
                nats += LOSSES[loss](model, x, m, theirs, t).double().sum().item()
        return nats / maskable.sum().item()

    def by_count(seed):
        return bound(
            model, ids, meta, cfg, "val.bin", batch_size=args.batch_size, seed=seed, dtype=args.dtype
        )

    estimates = {"iid t": [], "stratified t (MDLM)": [], "exact counts": []}
    reported = []
    for seed in tqdm(range(args.repeats), unit="repeat", leave=False):
        torch.manual_seed(seed)
        estimates["iid t"].append(by_time(lambda n: torch.rand(n, dtype=torch.float64)))
        estimates["stratified t (MDLM)"].append(by_time(stratified))
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
    rows.append(dict(estimator="reported error of exact counts", std=float(np.mean(reported)) * bits))
    return [{k: float(v) if isinstance(v, np.floating) else v for k, v in row.items()} for row in rows]


BENCHES = {"sample": bench_sample, "semi_ar": bench_semi_ar, "evaluate": bench_evaluate}


def table(rows):
    """Rows of equal keys as aligned text."""
    keys = list(rows[0])
    cell = lambda v: f"{v:.4g}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else str(v)
    cells = [keys] + [[cell(row.get(k, "")) for k in keys] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    return "\n".join("  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))) for line in cells)  # fmt: skip


def main(argv=None):
    p = parser(__doc__)
    p.add_argument("what", choices=BENCHES)
    p.add_argument("ckpt")
    p.add_argument("--steps", type=int, default=1000, help="sample, semi_ar: diffusion steps")
    p.add_argument("--samplers", nargs="+", choices=SAMPLERS, help="sample: default all; semi_ar: one")
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--repeats", type=int, default=5)
    device_options(p)
    p.add_argument("--json", action="store_true", help="one JSON line per row instead of the table")
    args = p.parse_args(argv)
    check_range(args, steps=1, batch_size=1, repeats=2 if args.what == "evaluate" else 1)
    rows = BENCHES[args.what](args)
    print("\n".join(map(json.dumps, rows)) if args.json else table(rows))


if __name__ == "__main__":
    main()
