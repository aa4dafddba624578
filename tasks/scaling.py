"""IsoFLOP scaling laws of AR and masked diffusion, as in SMDM (Nie et al., arXiv 2410.18514).

python data/prepare.py text --input LIB/*.py --tokenizer char --out stdlib   # LIB: where os.py is
python -m tasks.scaling --data=stdlib --seq_len=128 --batch_size=8 --lr_decay=linear  # 30 minutes
python -m tasks.scaling smdm_170 --data=slimpajama --sizes 19 34 66 113 170 231 \\
    --budgets 6e18 1e19 3e19                                                 # SMDM's recipe
python -m tasks.scaling --fit assets/scaling.jsonl --out_dir=out/fit   # lines of loss, N, C, nats

The sweep trains every size with every budget C = 6 N D in FLOPs, as an MDLM and as its AR twin. N
counts the parameters without embedding and head, D the tokens of all steps, masked or not. The loss
counts every token of a row. Per budget, a parabola of the loss in log N has its minimum L* at N*;
L* and N* then follow power laws in C. A loss is a parabola only near its minimum: give each budget
sizes around it.

Any field of the config may be given, and torchrun works as with train.py. out/scaling_<config>/
receives a folder per run, runs.jsonl with a line per run, table.md and scaling.png. Runs with a
line are not repeated; a stopped run is resumed. Sweeps of other sizes and budgets may share the
folder, in turn or at once; the fit uses all lines.
"""

import json
import math
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from common import check_range, command, fail, parser, to_json
from configs import SMDM_SIZES, Config
from data.command_line import from_cli
from data.corpus import read_meta
from data.json_files import read_json
from data.processes import process_group, rank_and_world
from model import DiT
from tasks import report

SIZES = {  # name: (n_layer, n_head, n_embd); SMDM's names are their millions of parameters
    "13k": (1, 1, 32), "28k": (1, 2, 48), "50k": (1, 2, 64), "111k": (1, 3, 96),
    "198k": (1, 4, 128), "444k": (1, 6, 192), "788k": (1, 8, 256), "1773k": (1, 12, 384),
    **{str(size): shape for size, shape in SMDM_SIZES.items()},
}  # fmt: skip
INTERVAL = (2.5, 97.5)  # percentiles
VARIED = set("steps seed n_layer n_head n_embd mlp_width warmup loss causal".split())  # in a sweep


# --------------------------------------------------------------------------------------------------
# The sweep


def count_inner_parameters(cfg):
    """N: the parameters without embedding and head."""
    with torch.device("meta"):
        named = DiT(cfg).named_parameters()
        return sum(p.numel() for name, p in named if not name.startswith(("embed.", "head.")))


def resize(cfg, size, budget):
    """cfg at one of SIZES, for the C / (6 N tokens of a step) steps, rounded down, that the budget
    C pays for. The warm-up is SMDM's, a hundredth of the steps and at least 100, but at most a
    tenth; a decaying rate decays until the last step."""
    n_layer, n_head, n_embd = SIZES[size]
    shape = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    shape["mlp_width"] = 1600 if size == "75" else 0
    cfg = replace(cfg, **shape, decay_steps=0, samples=0)
    steps = int(budget / (6 * count_inner_parameters(cfg) * cfg.batch_size * cfg.seq_len))
    if not 1 <= steps < 2**31:
        fail(f"--budgets {budget:g}: {steps:,} steps of size {size}; must be from 1 to 2**31 - 1")
    return replace(cfg, steps=steps, warmup=min(max(100, steps // 100), steps // 10))


def shared_recipe(cfg):
    """The fields that all runs of a sweep share, where they differ from Config's defaults."""
    ours, default = asdict(cfg), asdict(Config())
    fields = [f for f in default if f not in report.MAY_CHANGE | VARIED]
    return {f: ours[f] for f in fields if ours[f] != default[f]}


def read_runs(path, *more):
    """The lines of a runs.jsonl as dicts. Each needs loss, N, C, nats and the keys `more`; se may
    be null or absent."""
    runs = []
    for i, line in enumerate(Path(path).read_bytes().decode(errors="replace").splitlines(), 1):
        run = read_json(f"{path}, line {i}", {}, "; not a run", text=line)
        try:
            numbers, se = [float(run[key]) for key in ("N", "C", "nats")], float(run.get("se") or 0)
            if not all(0 < x < math.inf for x in numbers) or not 0 <= se < math.inf:
                raise ValueError("N, C and nats must be above 0, and se not below")
            runs.append({**run, "loss": str(run["loss"]), **{key: run[key] for key in more}})
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            fail(f"{path}, line {i}: not a run: {f'no {e}' if isinstance(e, KeyError) else e}")
    return runs


def index_runs(path):
    """{(loss, size, C, seed): run} of a sweep's own runs.jsonl; empty without the file."""
    runs = {}
    for i, run in enumerate(read_runs(path, "size", "seed") if path.exists() else (), 1):
        key = run["loss"], run["size"], run["C"], run["seed"]
        if key in runs:
            fail(f"{path}, line {i}: a second line of {key}")
        runs[key] = run
    return runs


def read_done(path, recipe):
    """`index_runs` as rank 0 reads it, so that all ranks train the same runs. Cuts off the
    incomplete line of a killed sweep, and refuses runs of another recipe."""
    rank, world = rank_and_world()
    if rank == 0 and path.exists() and not (text := path.read_text()).endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1])
    read = [index_runs(path) if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(read)
    for key, run in read[0].items():
        before = run.get("config", recipe)
        fields = {**before, **recipe}
        if changed := ", ".join(f for f in fields if before.get(f) != recipe.get(f)):
            fail(f"{path}: {key} has another {changed}; use another --out_dir")
    return read[0]


def sweep(cfg, sizes, budgets, seeds, passes):
    """Train and evaluate the runs that are not in runs.jsonl; returns all its runs."""
    path, rank = Path(cfg.out_dir) / "runs.jsonl", rank_and_world()[0]
    tokens = read_meta(cfg.data)["splits"]["train"]["tokens"]
    plan = [(resize(cfg, size, C), size, C) for C in sorted(budgets) for size in sizes]
    recipe = shared_recipe(plan[0][0])
    done = read_done(path, recipe)
    for (resized, size, C), loss in product(plan, ("mdlm", "ar")):  # small budgets first
        for c in report.make_runs(resized, loss, seeds, f"{loss}_{size}_{C:g}"):
            key = loss, size, C, c.seed
            if key in done:
                continue
            report.train_if_missing(c)
            result, D = report.evaluate_final(c, passes), c.steps * c.batch_size * c.seq_len
            done[key] = dict(
                loss=loss, size=size, N=count_inner_parameters(c), C=C, D=D, steps=c.steps,
                seed=c.seed, nats=result["nats"], se=result["se"], epochs=D / tokens, config=recipe,
            )  # fmt: skip
            if rank == 0 and key not in index_runs(path):  # a parallel sweep may have been faster
                with open(path, "a") as f:
                    f.write(to_json(done[key]) + "\n")
    return list((done if rank else index_runs(path)).values())


# --------------------------------------------------------------------------------------------------
# The fit. Row 0 of every array is the estimate, the other rows are bootstrap replicates.
#
# A parabola has few runs, mostly of one seed each: resampled with replacement, they would often
# have too few sizes. So the bootstrap is parametric. What differs between runs (initialisation, and
# a loss that is no parabola) is normal noise. The residuals of all budgets of a loss together give
# its standard deviation. They are few, so every replicate draws the deviation too, from its
# chi-square law, as a t interval does. The windows and masks of the validation are common to all
# runs and leave no residuals: their standard error enters as one shift of all runs of a loss. One
# seed cannot show what a seed does to all sizes alike.


def fit_parabolas(n, nats):
    """N*, L* (R,) and values (R, k) of the parabolas in log n (k,) through nats (R, k). N* and L*
    are NaN without a minimum: the parabola opens downwards, or is so flat that the numbers overflow
    or L* is below 0."""
    middle = np.log(n).mean()
    x = np.log(n) - middle
    design = np.stack([x**2, x, np.ones(len(n))], 1)
    a, b, c = coefficients = np.linalg.pinv(design) @ nats.T
    log_n, lowest = middle - b / (2 * a), c - b**2 / (4 * a)
    exists = (a > 0) & (abs(log_n) < 100) & (lowest > 0)
    best, lowest = np.exp(np.where(exists, log_n, np.nan)), np.where(exists, lowest, np.nan)
    return best, lowest, coefficients.T @ design.T


def fit_line(budgets, y):
    """Slope and intercept (R,) of log y (R, m) over log C (m,), by least squares."""
    x = np.log(budgets) - np.log(budgets).mean()
    slope = (np.log(y) @ x) / (x @ x)
    return slope, np.log(y).mean(1) - slope * np.log(budgets).mean()


def fit_curves(runs, loss):
    """({budget: (n, nats, their parabola's values, se)}, sigma, degrees of freedom) of a loss.
    sigma is the standard deviation of a run about its parabola, NaN without a degree of freedom."""
    curves, squares, freedom = {}, 0.0, 0
    for budget in sorted({run["C"] for run in runs if run["loss"] == loss}):
        mine = [run for run in runs if (run["loss"], run["C"]) == (loss, budget)]
        columns = ([float(run.get(key) or 0) for run in mine] for key in ("N", "nats", "se"))
        n, nats, se = map(np.array, columns)
        if (count := len(set(n))) < 3:
            fail(f"{loss}, C={budget:g}: {count} of the 3 or more sizes that a parabola needs")
        values = fit_parabolas(n, nats[None])[2][0]
        curves[budget] = n, nats, values, se
        squares += ((nats - values) ** 2).sum()
        freedom += len(n) - 3
    return curves, math.sqrt(squares / freedom) if freedom else math.nan, freedom


def fit_loss(runs, loss, replicates, rng):
    """The law of one loss, see `fit`."""
    curves, sigma, freedom = fit_curves(runs, loss)
    deviation = sigma * np.sqrt(freedom / rng.chisquare(max(freedom, 1), replicates))
    shift, optima, flat = rng.standard_normal(replicates), {}, []
    for budget, (n, nats, values, se) in curves.items():
        noise = deviation[:, None] * rng.standard_normal((replicates, len(n)))
        simulated = values + (noise + shift[:, None] * se)
        best, lowest, _ = fit_parabolas(n, np.concatenate((nats[None], simulated)))
        if math.isnan(best[0]):
            flat.append(budget)
        else:
            optima[budget] = best, lowest, not n.min() <= best[0] <= n.max()
    if (count := len(optima)) < 2:
        fail(f"{loss}: {count} of the 2 or more budgets with a minimum that a power law needs")
    N, L, outside = (np.stack(column, -1) for column in zip(*optima.values()))
    C = np.array(list(optima))
    (alpha, beta), (b, log_a) = fit_line(C, L), fit_line(C, N)
    return dict(
        points=curves, sigma=sigma, C=C, N=N, L=L, outside=outside, flat=flat,
        alpha=alpha, beta=beta, b=b, log_a=log_a,
    )  # fmt: skip


def fit(runs, replicates=4000, seed=0):
    """{loss: dict} of the laws of all losses in runs:

    points            {budget: (n, nats, their parabola's values, se)}
    sigma             standard deviation of a run about its parabola, in nats
    C, N, L, outside  budgets (m,), their optima N* and L* (R, m), whether N* is beyond the sizes
    flat              budgets without a minimum, left out
    alpha, beta       log L* = alpha log C + beta, as SMDM fits, without an irreducible loss
    b, log_a          N* = a C^b, hence D* = C / (6 N*) ~ C^(1 - b)"""
    rng, losses = np.random.default_rng(seed), sorted({run["loss"] for run in runs}, reverse=True)
    return {loss: fit_loss(runs, loss, replicates, rng) for loss in losses}


def compute_ratio(law, other, budget):
    """(R,) how many times more compute `law` needs to reach the loss of `other` at `budget`: the
    distance of their lines along C."""
    log_c = (other["alpha"] * math.log(budget) + other["beta"] - law["beta"]) / law["alpha"]
    return np.exp(np.clip(log_c - math.log(budget), -99, 99))  # nearly flat lines would overflow


# --------------------------------------------------------------------------------------------------
# Output


def interval(values):
    """The 95 % interval of the replicates, NaN if there are none."""
    replicates = values[1:][~np.isnan(values[1:])]
    return np.percentile(replicates, INTERVAL) if len(replicates) else np.full(2, math.nan)


def format_estimate(values, digits=3):
    """The estimate and its 95 % interval."""
    low, high = (f"{bound:.{digits}g}" for bound in interval(values))
    return f"{values[0]:.{digits}g} " + ("[?]" if low == "nan" else f"[{low}, {high}]")


def list_optima(laws):
    """Table rows: N*, D* and L* of each loss and budget."""
    rows = [("loss", "C, FLOPs", "sizes", "N*", "D*", "L*, nats per token")]
    for name, law in laws.items():
        for C, N, L, outside in zip(law["C"], law["N"].T, law["L"].T, law["outside"]):
            n = law["points"][C][0]
            mark = " **outside the sizes: extrapolated**" if outside else ""
            figures = format_estimate(N) + mark, format_estimate(C / (6 * N)), format_estimate(L, 4)
            rows.append((f"`{name}`", f"{C:.3g}", f"{n.min():.3g} to {n.max():.3g}", *figures))
    return rows


def compare_losses(laws):
    """Table rows: how much more compute mdlm needs than ar, at the budgets of ar."""
    rows = [("C of `ar`", "`mdlm` needs more compute, times", "N* of `mdlm` / N* of `ar`")]
    if not {"ar", "mdlm"} <= laws.keys():
        return rows
    ar, mdlm = laws["ar"], laws["mdlm"]
    for i, C in enumerate(ar["C"]):
        more = compute_ratio(mdlm, ar, C)
        mark = " (extrapolated beyond its budgets)" if more[0] * C > mdlm["C"].max() else ""
        same = np.flatnonzero(mdlm["C"] == C)
        ratio = format_estimate(mdlm["N"][:, same[0]] / ar["N"][:, i]) if len(same) else ""
        rows.append((f"{C:.3g}", format_estimate(more) + mark, ratio))
    return rows


def list_notes(laws, runs):
    """What a reader of the tables must know."""
    notes = []
    for name, law in laws.items():
        for C in law["flat"]:
            notes.append(f"`{name}`, C = {C:.3g}: the parabola has no minimum; left out.")
        lost = np.isnan(law["N"][1:]).any(1).mean()
        if lost and not math.isnan(law["sigma"]):
            without = f"{lost:.1%} of the replicates lack a minimum"
            notes.append(f"`{name}`: {without}; intervals leave them out.")
    if {"ar", "mdlm"} <= laws.keys():
        ar, mdlm = laws["ar"]["alpha"], laws["mdlm"]["alpha"]
        ratio, difference = format_estimate(mdlm / ar), format_estimate(mdlm - ar)
        notes.append(f"alpha of `mdlm` / alpha of `ar`: {ratio}; their difference: {difference}.")
    epochs = max(run.get("epochs") or 0 for run in runs)
    seen = f", which see the data {epochs:.2g} times at most." if epochs else ""
    notes.append(f"{len(runs)} runs{seen}")
    if (recipes := len({json.dumps(run.get("config")) for run in runs})) > 1:
        notes.append(f"The runs have {recipes} different recipes.")
    return notes


def format_tables(laws, runs):
    """Markdown: the optima, the laws, MDLM against AR, and notes."""
    head = ("loss", "alpha, L* ~ C^alpha", "beta", "N* ~ C^b", "D* ~ C^(1-b)", "sd of a run, nats")
    fits = [head]
    for name, law in laws.items():
        exponents = map(format_estimate, (law["alpha"], law["beta"], law["b"], 1 - law["b"]))
        fits.append((f"`{name}`", *exponents, f"{law['sigma']:.2g}"))
    tables = list_optima(laws), fits, compare_losses(laws)
    texts = [report.to_markdown(*rows) for rows in tables if len(rows) > 1]
    return "\n".join([*texts, "".join(f"- {note}\n" for note in list_notes(laws, runs))])


def plot(laws, path):
    """Left the loss over N with the parabolas, right L* over C with the power laws."""
    if not (plt := report.import_pyplot(path.name)):
        return
    _, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    budgets = sorted({C for law in laws.values() for C in law["points"]})
    color = dict(zip(budgets, plt.cm.viridis(np.linspace(0, 0.85, len(budgets)))))
    for (name, law), style in zip(laws.items(), ("o-", "s--", "D:", "^-.")):
        look = dict(fillstyle="full" if style == "o-" else "none")
        for C, (n, nats, values, _) in law["points"].items():
            label = f"{name}, C = {C:.3g}"
            left.plot(n, nats, style[0], color=color[C], label=label, **look)
            x = np.geomspace(n.min(), n.max(), 100)
            y = np.polyval(np.polyfit(np.log(n), values, 2), np.log(x))
            left.plot(x, y, style[1:], color=color[C])
        left.plot(law["N"][0], law["L"][0], "*", color="crimson", markersize=10)
        label = f"{name}: L* = {math.exp(law['beta'][0]):.3g} C^({law['alpha'][0]:.4f})"
        (points,) = right.plot(law["C"], law["L"][0], style[0], label=label)
        error = np.abs(np.stack([interval(L) for L in law["L"].T], 1) - law["L"][0])
        look = dict(fmt="none", color=points.get_color(), capsize=3)
        right.errorbar(law["C"], law["L"][0], error, **look)
        fitted = np.exp(law["beta"][0]) * np.array(budgets) ** law["alpha"][0]
        right.plot(budgets, fitted, style[1:], color=points.get_color())
    n_label, c_label = "N, parameters without embedding and head", "C = 6 N D, FLOPs"
    left.set(xscale="log", xlabel=n_label, ylabel="nats per token")
    right.set(xscale="log", yscale="log", xlabel=c_label, ylabel="L*, nats per token")
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
    """Sweep, unless `runs` are given; fit them and write table and plot. Returns the laws."""
    if runs is None:
        if cfg.loss != "mdlm" or cfg.cond_dim:
            fail(f"loss={cfg.loss}, cond_dim={cfg.cond_dim}: must be mdlm and 0 (AR has no adaLN)")
        cfg = replace(cfg, vocab_size=read_meta(cfg.data)["vocab_size"])
        runs = sweep(cfg, sizes, budgets, seeds, passes)
    if rank_and_world()[0]:
        return None
    laws, out = fit(runs), Path(cfg.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    text = format_tables(laws, runs)
    (out / "table.md").write_text(text)
    plot(laws, out / "scaling.png")
    print(f"\n{text}\n{out}: table.md, scaling.png")
    return laws


def parse_arguments(argv=None):
    p = parser(__doc__)
    sizes = "28k 50k 111k 198k 444k".split()
    p.add_argument("--sizes", nargs="+", default=sizes, help=", ".join(SIZES))
    budgets = [4e11, 1.2e12, 3.6e12]
    p.add_argument("--budgets", nargs="+", type=float, default=budgets, metavar="FLOPS")
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


@command
def command_line(argv=None):
    cfg, args = parse_arguments(argv)
    with process_group(cfg):
        runs = read_runs(args.fit) if args.fit else None
        main(cfg, args.sizes, args.budgets, args.seeds, args.passes, runs)


if __name__ == "__main__":
    command_line()
