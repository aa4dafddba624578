"""Measure: seconds and network calls of the samplers, noise of the likelihood estimators.

python bench.py sample out/pydocs_mdlm/ckpt.pt --steps 1000 --batch_size 8      # each sampler, same weights
python bench.py evaluate out/pydocs_mdlm/ckpt.pt --repeats 30                   # error per forward

Machines are noisy: runs are interleaved, figures are medians, and what counts is the ratio within one run.
"""

import json
import math
import statistics
import time
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from configs import check_range, fail, parser
from data.corpus import read_split, take
from diffusion import SAMPLERS, denoiser, mdlm, row_generators, stratified, time_of
from evaluate import bound, report
from model import autocast, load, pick_device


def bench_sample(args):
    """Seconds, calls and head rows of every sampler for one batch, all from the same weights."""
    device = pick_device(args.device)
    model, cfg = load(args.ckpt, device=device)
    canvas = torch.full((args.batch_size, cfg.seq_len), cfg.mask_id, device=device)
    seconds, calls = {name: [] for name in SAMPLERS}, {}

    def run(name, seed, steps):
        count, plain, gen = [0, 0], denoiser(model, cfg), row_generators(seed, range(args.batch_size))

        def counted(x, t, at):
            count[0] += 1
            count[1] += int(at.sum())
            return plain(x, t, at)

        start = time.perf_counter()
        with autocast(device, args.dtype):
            for x in SAMPLERS[name](counted, canvas, steps, cfg, gen):
                x.sum().item()  # waits for the device, as a reader of the frames would
        return time.perf_counter() - start, count

    jobs = [(name, seed) for seed in range(args.repeats) for name in SAMPLERS]
    for name in SAMPLERS:
        run(name, 0, 4)  # warm-up
    for name, seed in tqdm(jobs, unit="run", leave=False):
        s, calls[name] = run(name, seed, args.steps)
        seconds[name].append(s)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    return [
        dict(sampler=name, seconds=medians[name], times_faster=medians["ddpm"] / medians[name],
             calls=calls[name][0], head_rows=calls[name][1])
        for name in SAMPLERS
    ]  # fmt: skip


def bench_evaluate(args):
    """Scatter of the bound of one split over repeated estimates, one forward per window each:
    iid t, MDLM's t (stratified within a batch, at least 1e-3), and our exact counts."""
    device = pick_device(args.device)
    model, cfg = load(args.ckpt, device=device)
    ids, meta = read_split(cfg.data, "val", cfg)
    ids = ids[: len(ids) // cfg.seq_len * cfg.seq_len]  # whole windows, the same for all
    if not len(ids):
        fail(f"{cfg.data}/val.bin: shorter than one window of {cfg.seq_len}")
    x0 = torch.from_numpy(take(ids, range(0, len(ids), cfg.seq_len), cfg.seq_len, cfg, "val.bin")).to(device)
    theirs = replace(cfg, loss="mdlm", aux_ce=0.0, T=0, t_min=1e-3, time_law="uniform")

    @torch.no_grad()
    def by_time(draw):
        nats = 0.0
        with autocast(device, args.dtype):
            for rows in torch.randperm(len(x0)).split(args.batch_size):
                x = x0[rows.to(device)]
                t = time_of(draw(len(x)), theirs).to(device)
                nats += mdlm(model, x, torch.ones_like(x, dtype=torch.bool), theirs, t).double().sum().item()
        return nats / x0.numel()

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


BENCHES = {"sample": bench_sample, "evaluate": bench_evaluate}


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
    p.add_argument("--steps", type=int, default=1000, help="sample: diffusion steps")
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="float32", choices=("auto", "float32", "bfloat16"))
    p.add_argument("--json", action="store_true", help="one JSON line per row instead of the table")
    args = p.parse_args(argv)
    check_range(args, steps=1, batch_size=1, repeats=2 if args.what == "evaluate" else 1)
    rows = BENCHES[args.what](args)
    print("\n".join(map(json.dumps, rows)) if args.json else table(rows))


if __name__ == "__main__":
    main()
