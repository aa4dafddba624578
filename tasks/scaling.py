"""Scaling laws from IsoFLOP curves, as SMDM's (Nie et al., arXiv 2410.18514, section 3): AR against masked diffusion.

python data/prepare.py text --input LIB/*.py --tokenizer char --out stdlib     # LIB: the folder of Python's os.py
python -m tasks.scaling --data=stdlib --seq_len=128 --batch_size=8 --lr_decay=linear # half an hour of a CPU core
python -m tasks.scaling smdm_170 --data=slimpajama --sizes 19 34 66 113 170 231 --budgets 6e18 1e19 3e19    # SMDM's recipe
python -m tasks.scaling --fit assets/scaling.jsonl --out_dir=out/fit   # no training: runs with loss, N, C and nats a line

Every size is trained with every budget C = 6 N D in FLOPs, where N counts the parameters without embedding and head
and D the tokens seen, masked or not, as an MDLM and as its AR twin. Per budget, a parabola of the loss in log N has its
minimum L* at N*; log L* and log N* are then straight lines in log C. Any field of the config may be given, too, see
train.py --help, and torchrun works as with train.py. Writes to out/scaling_<config>/: a folder per run, runs.jsonl with
a line per run, table.md and scaling.png. Runs that have their line are not run again, and one that was stopped goes on
where it stopped; sweeps of other sizes and budgets may share the folder, one after the other or at once, and the fit is
that of all its lines. Both losses count every token of a row, the first one, too. A parabola is a parabola near its minimum only: give each budget sizes around it.
"""

import json
import math
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import common
from common import check_range, fail, parser, to_json
from configs import SMDM_SIZES, Config, from_cli
from data.corpus import read_meta
from model import DiT
from tasks.compare import MAY_CHANGE, VARIANTS, final, markdown, pyplot, seeded, trained

SIZES = {  # name: (n_layer, n_head, n_embd); SMDM's have their millions of parameters for a name
    "13k": (1, 1, 32), "28k": (1, 2, 48), "50k": (1, 2, 64), "111k": (1, 3, 96), "198k": (1, 4, 128),
    "444k": (1, 6, 192), "788k": (1, 8, 256), "1773k": (1, 12, 384),
    **{str(size): shape for size, shape in SMDM_SIZES.items()},
}  # fmt: skip
INTERVAL = (2.5, 97.5)  # percentiles
OF_A_RUN = MAY_CHANGE | set("steps seed n_layer n_head n_embd mlp_width warmup loss causal".split())


# ---------------------------------------------------------------------------------------------------------
# The sweep


def parameters(cfg):
    """N: the parameters without embedding and head."""
    with torch.device("meta"):
        named = DiT(cfg).named_parameters()
        return sum(p.numel() for name, p in named if not name.startswith(("embed.", "head.")))


def sized(cfg, size, budget):
    """cfg at one of SIZES, for as many steps as `budget` FLOPs pay for: C / (6 N tokens of a step), rounded down.
    The warm-up is SMDM's, a hundredth of the steps and at least 100, but at most a tenth; a rate that decays does
    so until the last step."""
    n_layer, n_head, n_embd = SIZES[size]
    shape = dict(
        n_layer=n_layer, n_head=n_head, n_embd=n_embd, mlp_width=1600 if size == "75" else 0
    )
    cfg = replace(cfg, **shape, decay_steps=0, samples=0)
    steps = int(budget / (6 * parameters(cfg) * cfg.batch_size * cfg.seq_len))
    if not 1 <= steps < 2**31:
        fail(
            f"--budgets {budget:g}: {steps:,} steps of size {size}; must be at least 1 and below 2**31"
        )
    return replace(cfg, steps=steps, warmup=min(max(100, steps // 100), steps // 10))


def recipe(cfg):
    """What the runs of a sweep have in common: the fields that are not Config's own defaults."""
    ours = asdict(cfg)
    return {f: ours[f] for f, v in asdict(Config()).items() if ours[f] != v and f not in OF_A_RUN}


def read_runs(path, *more):
    """The lines of a runs.jsonl as dicts. Each needs loss, N, C, nats and the keys `more`; se may be null or absent."""
    runs = []
    for i, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            run = json.loads(line)
            numbers = [float(run[key]) for key in ("N", "C", "nats")]
            if (
                not all(0 < x < math.inf for x in numbers)
                or not 0 <= float(run.get("se") or 0) < math.inf
            ):
                raise ValueError("N, C and nats must be above 0, and se not below")
            runs.append({**run, "loss": str(run["loss"]), **{key: run[key] for key in more}})
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            fail(f"{path}, line {i}: not a run: {f'no {e}' if isinstance(e, KeyError) else e}")
    return runs


def lines(path):
    """{(loss, size, C, seed): run} of the sweep's own file."""
    found = {}
    for i, run in enumerate(read_runs(path, "size", "seed") if path.exists() else (), 1):
        if (key := (run["loss"], run["size"], run["C"], run["seed"])) in found:
            fail(f"{path}, line {i}: a second line of {key}")
        found[key] = run
    return found


def sweep(cfg, sizes, budgets, seeds, passes):
    """Train and evaluate what is not in runs.jsonl yet; returns all its lines."""
    path, tokens = (
        Path(cfg.out_dir) / "runs.jsonl",
        read_meta(cfg.data)["splits"]["train"]["tokens"],
    )
    rank = dist.get_rank() if dist.is_initialized() else 0
    if path.exists() and not rank and not (text := path.read_text()).endswith("\n"):
        path.write_text(
            text[: text.rfind("\n") + 1]
        )  # half a line of a run that was killed: it comes again
    plan = [
        (sized(cfg, size, C), size, C) for C in sorted(budgets) for size in sizes
    ]  # cheap ones first
    read = [lines(path) if not rank else None]
    if dist.is_initialized():
        dist.broadcast_object_list(read)  # one reading for all: they train the same runs
    (done,), now = read, recipe(plan[0][0])
    for key, run in done.items():
        before = run.get("config", now)
        if differ := [f for f in {**before, **now} if before.get(f) != now.get(f)]:
            fail(f"{path}: {key} has another {', '.join(differ)}; give another --out_dir")
    for (ready, size, C), name in product(plan, ("mdlm", "ar")):
        for c in seeded(ready, f"{name}_{size}_{C:g}", VARIANTS[name], seeds):
            if (key := (name, size, C, c.seed)) in done:
                continue
            trained(c)
            result, D = final(c, passes), c.steps * c.batch_size * c.seq_len
            done[key] = dict(
                loss=name, size=size, N=parameters(c), C=C, D=D, steps=c.steps, seed=c.seed, nats=result["nats"],
                se=result["se"], epochs=D / tokens, config=now,
            )  # fmt: skip
            if not rank and key not in lines(path):  # unless a sweep beside this one was faster
                with open(path, "a") as f:
                    f.write(to_json(done[key]) + "\n")
    return list((done if rank else lines(path)).values())


# ---------------------------------------------------------------------------------------------------------
# The fit. Every quantity is an array whose row 0 is the estimate and whose other rows are bootstrap replicates.
#
# A parabola has few runs, mostly of one seed: drawn anew with replacement, they would often be of too few sizes. So
# the bootstrap is parametric. What differs from run to run (initialisation, and what the parabola is not) is normal
# noise about the parabolas, whose standard deviation comes from the residuals of all budgets of a loss together; a
# replicate draws that deviation, too, from its chi-square law, as a t interval does, since there are few residuals.
# What the runs of a loss have in common, the windows and masks of the validation, leaves no residuals: its standard
# error enters as one shift of them all. What a seed does to all sizes alike, one seed cannot show.


def minimum(n, nats):
    """N*, L* (R,) and values (R, k) of the parabolas in log n (k,) through nats (R, k); N*, L* are NaN where there is
    no minimum: the parabola opens downwards, or is so flat that the numbers overflow or L* is below 0."""
    middle = np.log(n).mean()
    design = np.stack([(np.log(n) - middle) ** 2, np.log(n) - middle, np.ones(len(n))], 1)
    a, b, c = coefficients = np.linalg.pinv(design) @ nats.T
    log_n, lowest = middle - b / (2 * a), c - b**2 / (4 * a)
    there = (a > 0) & (abs(log_n) < 100) & (lowest > 0)
    return (
        np.exp(np.where(there, log_n, np.nan)),
        np.where(there, lowest, np.nan),
        coefficients.T @ design.T,
    )


def line(budgets, y):
    """Slope and intercept (R,) of log y (R, m) over log C (m,), by least squares."""
    x = np.log(budgets) - np.log(budgets).mean()
    slope = (np.log(y) @ x) / (x @ x)
    return slope, np.log(y).mean(1) - slope * np.log(budgets).mean()


def fit(runs, replicates=4000, seed=0):
    """{loss: dict}: points, {budget: (n, nats, their parabola's values)}; sigma, the standard deviation of a run about
    its parabola in nats; C, the budgets (m,), and N, L, their optima (R, m); outside (m,), N* beyond the sizes; flat,
    the budgets without a minimum, left out; alpha and beta of log L* = alpha log C + beta, as SMDM fits, without an
    irreducible loss; b and log_a of N* = a C^b, which makes D* = C / (6 N*) go with C^(1 - b)."""
    rng, laws = np.random.default_rng(seed), {}
    for name in sorted({run["loss"] for run in runs}, reverse=True):
        curves, squares, freedom = {}, 0.0, 0
        for budget in sorted({run["C"] for run in runs if run["loss"] == name}):
            mine = [run for run in runs if (run["loss"], run["C"]) == (name, budget)]
            n, nats, se = (
                np.array([float(run.get(k) or 0) for run in mine]) for k in ("N", "nats", "se")
            )
            if len(set(n)) < 3:
                fail(
                    f"{name}, C={budget:g}: {len(set(n))} of the 3 or more sizes that a parabola needs"
                )
            values = minimum(n, nats[None])[2][0]
            curves[budget] = n, nats, values, se
            squares, freedom = squares + ((nats - values) ** 2).sum(), freedom + len(n) - 3
        sigma = (
            math.sqrt(squares / freedom) if freedom else math.nan
        )  # three sizes, one seed: unknown
        spread = sigma * np.sqrt(freedom / rng.chisquare(max(freedom, 1), replicates))
        shift, optima, flat = rng.standard_normal(replicates), {}, []
        for budget, (n, nats, values, se) in curves.items():
            noise = (
                spread[:, None] * rng.standard_normal((replicates, len(n))) + shift[:, None] * se
            )
            best, lowest, _ = minimum(n, np.concatenate((nats[None], values + noise)))
            if math.isnan(best[0]):
                flat.append(budget)
            else:
                optima[budget] = best, lowest, not n.min() <= best[0] <= n.max()
        if len(optima) < 2:
            fail(
                f"{name}: {len(optima)} of the 2 or more budgets with a minimum that a power law needs"
            )
        N, L, outside = (np.stack(of, -1) for of in zip(*optima.values()))
        C = np.array(list(optima))
        (alpha, beta), (b, log_a) = line(C, L), line(C, N)
        laws[name] = dict(
            points=curves, sigma=sigma, C=C, N=N, L=L, outside=outside, flat=flat, alpha=alpha, beta=beta, b=b, log_a=log_a
        )  # fmt: skip
    return laws


def times_more(law, other, budget):
    """(R,) how many times more compute `law` needs for the loss of `other` at `budget`: the distance of their lines
    along C."""
    log_c = (other["alpha"] * math.log(budget) + other["beta"] - law["beta"]) / law["alpha"]
    return np.exp(np.clip(log_c - math.log(budget), -99, 99))  # lines as good as flat: no overflow


def interval(values):
    kept = values[1:][~np.isnan(values[1:])]
    return np.percentile(kept, INTERVAL) if len(kept) else np.full(2, math.nan)


def cell(values, digits=3):
    """The estimate and its 95 % interval."""
    low, high = interval(values)
    return f"{values[0]:.{digits}g} [{low:.{digits}g}, {high:.{digits}g}]".replace(
        "[nan, nan]", "[?]"
    )


def table(laws, runs):
    """Markdown: the optima, the laws, MDLM against AR, and what to mind."""
    optima = [("loss", "C, FLOPs", "sizes", "N*", "D*", "L*, nats per token")]
    slopes = [
        ("loss", "alpha, L* ~ C^alpha", "beta", "N* ~ C^b", "D* ~ C^(1-b)", "sd of a run, nats")
    ]
    versus, notes = (
        [("C of `ar`", "`mdlm` needs more compute, times", "N* of `mdlm` / N* of `ar`")],
        [],
    )
    for name, law in laws.items():
        for C, N, L, outside in zip(law["C"], law["N"].T, law["L"].T, law["outside"]):
            sizes = law["points"][C][0]
            where = f"{sizes.min():.3g} to {sizes.max():.3g}"
            mark = " **outside the sizes: extrapolated**" if outside else ""
            optima.append(
                (f"`{name}`", f"{C:.3g}", where, cell(N) + mark, cell(C / (6 * N)), cell(L, 4))
            )
        exponents = (law["alpha"], law["beta"], law["b"], 1 - law["b"])
        slopes.append((f"`{name}`", *map(cell, exponents), f"{law['sigma']:.2g}"))
        notes += [
            f"`{name}`, C = {C:.3g}: the parabola has no minimum; left out." for C in law["flat"]
        ]
        if law["sigma"] >= 0 and (lost := np.isnan(law["N"][1:]).any(1).mean()):
            notes.append(
                f"`{name}`: {lost:.1%} of the replicates lack a minimum; intervals leave them out."
            )
    if {"ar", "mdlm"} <= laws.keys():
        ar, mdlm = laws["ar"], laws["mdlm"]
        for i, C in enumerate(ar["C"]):
            more = times_more(mdlm, ar, C)
            mark = " (extrapolated beyond its budgets)" if more[0] * C > mdlm["C"].max() else ""
            share = [cell(mdlm["N"][:, k] / ar["N"][:, i]) for k in np.flatnonzero(mdlm["C"] == C)]
            versus.append((f"{C:.3g}", cell(more) + mark, *(share or [""])))
        ratio, difference = cell(mdlm["alpha"] / ar["alpha"]), cell(mdlm["alpha"] - ar["alpha"])
        notes.append(f"alpha of `mdlm` / alpha of `ar`: {ratio}; their difference: {difference}.")
    seen = max(run.get("epochs") or 0 for run in runs)
    notes.append(
        f"{len(runs)} runs" + f", which see the data {seen:.2g} times at most." * (seen > 0)
    )
    if (recipes := len({json.dumps(run.get("config")) for run in runs})) > 1:
        notes.append(f"The runs have {recipes} different recipes.")
    tables = [markdown(*rows) for rows in (optima, slopes, versus) if len(rows) > 1]
    return "\n".join([*tables, "".join(f"- {note}\n" for note in notes)])


def plot(laws, path):
    """Left the loss over N with the parabolas, right L* over C with the power laws."""
    if not (plt := pyplot(path.name)):
        return
    _, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    budgets = sorted({C for law in laws.values() for C in law["points"]})
    color = dict(zip(budgets, plt.cm.viridis(np.linspace(0, 0.85, len(budgets)))))
    for (name, law), style in zip(laws.items(), ("o-", "s--", "D:", "^-.")):
        fill = "full" if style == "o-" else "none"
        for C, (n, nats, values, _) in law["points"].items():
            left.plot(
                n, nats, style[0], color=color[C], label=f"{name}, C = {C:.3g}", fillstyle=fill
            )
            x = np.geomspace(n.min(), n.max(), 100)
            left.plot(
                x,
                np.polyval(np.polyfit(np.log(n), values, 2), np.log(x)),
                style[1:],
                color=color[C],
            )
        left.plot(law["N"][0], law["L"][0], "*", color="crimson", markersize=10)
        label = f"{name}: L* = {math.exp(law['beta'][0]):.3g} C^({law['alpha'][0]:.4f})"
        (points,) = right.plot(law["C"], law["L"][0], style[0], label=label)
        error = np.abs(np.stack([interval(L) for L in law["L"].T], 1) - law["L"][0])
        right.errorbar(
            law["C"], law["L"][0], error, fmt="none", color=points.get_color(), capsize=3
        )
        fitted = np.exp(law["beta"][0]) * np.array(budgets) ** law["alpha"][0]
        right.plot(budgets, fitted, style[1:], color=points.get_color())
    left.set(
        xscale="log", xlabel="N, parameters without embedding and head", ylabel="nats per token"
    )
    right.set(xscale="log", yscale="log", xlabel="C = 6 N D, FLOPs", ylabel="L*, nats per token")
    right.yaxis.set_minor_formatter("{x:.3g}")
    sizes = sorted({x for law in laws.values() for n, *_ in law["points"].values() for x in n})
    for axis, ticks in ((left, sizes), (right, budgets)):
        axis.set_xticks(ticks, [f"{x:.3g}" for x in ticks], rotation=45, fontsize=8)
        axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axis.grid(alpha=0.3)
    left.legend(fontsize=7, bbox_to_anchor=(1, 1), loc="upper left")
    right.legend()
    plt.savefig(path, dpi=150)
    plt.close()


def main(cfg, sizes, budgets, seeds, passes, runs=None):
    """The sweep, unless there are `runs`, and the fit, which one process makes."""
    if runs is None:
        if cfg.loss != "mdlm" or cfg.cond_dim:
            fail(
                f"loss={cfg.loss}, cond_dim={cfg.cond_dim}: must be mdlm and 0, since AR has no adaLN"
            )
        cfg = replace(cfg, vocab_size=read_meta(cfg.data)["vocab_size"])
        runs = sweep(cfg, sizes, budgets, seeds, passes)
    if dist.is_initialized() and dist.get_rank():
        return
    laws, out = fit(runs), Path(cfg.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(table(laws, runs))
    plot(laws, out / "scaling.png")
    print(f"\n{(out / 'table.md').read_text()}\n{out}: table.md, scaling.png")
    return laws


def command_line(argv=None):
    p = parser(__doc__)
    p.add_argument(
        "--sizes", nargs="+", default="28k 50k 111k 198k 444k".split(), help=", ".join(SIZES)
    )
    p.add_argument(
        "--budgets", nargs="+", type=float, default=[4e11, 1.2e12, 3.6e12], metavar="FLOPS"
    )
    p.add_argument("--seeds", type=int, default=1, help="runs of each size, budget and loss")
    p.add_argument("--passes", type=int, default=4, help="forwards per window of the final bounds")
    p.add_argument("--fit", metavar="RUNS", help="train nothing, fit the runs of this file")
    args, rest = p.parse_known_args(argv)
    check_range(args, seeds=1, passes=1)
    for size in args.sizes:
        if size not in SIZES:
            fail(f"--sizes {size}: must be one of {', '.join(SIZES)}")
    for budget in args.budgets:
        if not 0 < budget < math.inf:
            fail(f"--budgets {budget}: must be above 0 and finite")
    if args.fit and not Path(args.fit).is_file():
        fail(f"--fit {args.fit}: no such file")
    return from_cli(rest, __doc__, out="out/scaling_{}")[0], args


if __name__ == "__main__":
    cfg, args = command_line()
    with common.process_group(cfg):
        runs = read_runs(args.fit) if args.fit else None
        main(cfg, args.sizes, args.budgets, args.seeds, args.passes, runs)
