"""scaling.py: budgets become steps, the fit finds laws that are known, and runs are kept once."""

import json
import math
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import make_corpus, refused, tiny_run

import evaluate
from configs import CONFIGS, as_ar, smdm
from model import count_parameters
from tasks import scaling

BUDGETS = (1e18, 4e18, 1e19)
WORLD = dict(mdlm=(-0.06, 3.9, 0.6, -7.5), ar=(-0.064, 3.8, 0.5, -2.5))  # alpha, beta, b, log a


def world(sigma=0.0, common=0.0, rng=None, width=1.5, offset=0.0, budgets=BUDGETS, laws=WORLD, k=6):
    """Runs whose losses are parabolas in log N with the optima of exact power laws. The sizes of a
    budget lie `width` on either side of N* e^offset. sigma: normal noise of each run; common: that
    of all runs of a loss together."""
    runs = []
    for loss, (alpha, beta, b, log_a) in laws.items():
        shift = common * rng.standard_normal() if common else 0.0
        for C in budgets:
            best = log_a + b * math.log(C)
            for x in np.linspace(best + offset - width, best + offset + width, k):
                nats = math.exp(alpha * math.log(C) + beta) + 0.04 * (x - best) ** 2 + shift
                nats += sigma * rng.standard_normal() if sigma else 0.0
                runs.append(dict(loss=loss, N=math.exp(x), C=C, nats=nats, se=common))
    return runs


# --------------------------------------------------------------------------------------------------
# Steps


def test_steps_by_hand():
    """One block of width 64: 12 x 64^2 in matrices, 5 x 64 biases of the MLP, three norms of 64."""
    cfg = replace(CONFIGS["pydocs_mdlm"](), seq_len=128, batch_size=8)
    c = scaling.resize(cfg, "50k", 1e12)
    N = 12 * 4096 + 5 * 64 + 3 * 64
    assert (
        scaling.count_inner_parameters(c) == scaling.count_inner_parameters(as_ar(c)) == N == 49_664
    )
    assert c.steps == 3277 == int(1e12 / (6 * N * 1024)) and c.warmup == 100
    assert (c.n_embd, c.n_head) == (64, 2)
    assert scaling.resize(cfg, "198k", 2.5e11).warmup == 20  # of 205 steps: a tenth
    assert scaling.resize(cfg, "50k", 1e13).warmup == 327  # of 32,771: a hundredth
    for name, (n_layer, _, d) in scaling.SIZES.items():
        if name.endswith("k"):
            assert name == f"{(n_layer * (12 * d * d + 7 * d) + d) / 1e3:.0f}k"


def test_smdms_sizes_have_the_steps_of_its_own_configs():
    for size in (6, 75, 170, 1028):
        want, got = smdm(size, flops=100.0), scaling.resize(smdm(170), str(size), 1e20)
        assert (got.steps, got.warmup) == (want.steps, want.warmup)
        assert count_parameters(got) == count_parameters(want)
        assert (got.lr_decay, got.min_lr, got.mlp) == ("cosine", 2e-5, "swiglu")


# --------------------------------------------------------------------------------------------------
# The fit


def test_the_minimum_is_that_of_a_fine_grid():
    rng = np.random.default_rng(0)
    n, nats = np.geomspace(1e5, 3e6, 7), rng.random((5, 7)) + np.linspace(-2, 2, 7) ** 2
    best, lowest, values = scaling.fit_parabolas(n, nats)
    x = np.linspace(math.log(1e5), math.log(3e6), 100_001)
    for i, y in enumerate(nats):
        p = np.polyfit(np.log(n), y, 2)
        curve = np.polyval(p, x)
        assert math.log(best[i]) == pytest.approx(x[curve.argmin()], abs=1e-4)
        assert lowest[i] == pytest.approx(curve.min(), abs=1e-8)
        np.testing.assert_allclose(values[i], np.polyval(p, np.log(n)), atol=1e-9)
    assert np.isnan(scaling.fit_parabolas(n, -nats)[0]).all()


def test_exact_laws_are_found_exactly():
    laws = scaling.fit(world(), replicates=10)
    for name, (alpha, beta, b, log_a) in WORLD.items():
        law = laws[name]
        for key, want in dict(alpha=alpha, beta=beta, b=b, log_a=log_a).items():
            np.testing.assert_allclose(law[key], want, rtol=1e-7)  # also of all replicates
        np.testing.assert_allclose(law["N"][0], np.exp(log_a) * np.array(BUDGETS) ** b, rtol=1e-8)
        assert law["sigma"] < 1e-9 and not law["outside"].any() and not law["flat"]
    # The loss of ar at C is exp(-0.064 log C + 3.8); mdlm reaches it where -0.06 log C' +
    # 3.9 is the same number.
    log_c = math.log(1e19)
    want = math.exp((-0.064 * log_c + 3.8 - 3.9) / -0.06 - log_c)
    more = scaling.compute_ratio(laws["mdlm"], laws["ar"], 1e19)
    np.testing.assert_allclose(more, want, rtol=1e-6)


SMDM_FIGURE = {  # C: L* MDM, L* ARM, N* MDM, N* ARM, digitised from the paper's figures
    6e18: (3.374, 2.846, 8.4e7, 1.53e8), 1e19: (3.261, 2.749, 1.11e8, 2.25e8),
    3e19: (3.041, 2.555, 2.29e8, 4.45e8), 6e19: (2.916, 2.448, 3.62e8, 6.26e8),
    1e20: (2.830, 2.378, 4.78e8, 9.98e8),
}  # fmt: skip


def test_smdms_figures_give_its_claims():
    """Same slope, 16 times the compute, half the parameters."""
    runs = [
        dict(loss=name, N=N * step, C=C, nats=L + 0.03 * math.log(step) ** 2)
        for C, (*Ls, N_mdm, N_arm) in SMDM_FIGURE.items()
        for name, L, N in zip(("mdlm", "ar"), Ls, (N_mdm, N_arm))
        for step in (0.4, 0.7, 1.3, 2.2)
    ]
    laws = scaling.fit(runs, replicates=10)
    for name, alpha, beta, b in (("mdlm", -0.0625, 3.92, 0.63), ("ar", -0.0641, 3.82, 0.64)):
        assert laws[name]["alpha"][0] == pytest.approx(alpha, abs=3e-4)
        assert laws[name]["beta"][0] == pytest.approx(beta, abs=0.01)
        assert laws[name]["b"][0] == pytest.approx(b, abs=0.01)
    times = [scaling.compute_ratio(laws["mdlm"], laws["ar"], C)[0] for C in SMDM_FIGURE]
    assert 14.5 < min(times) and max(times) < 16.5
    half = laws["mdlm"]["N"][0] / laws["ar"]["N"][0]
    assert 0.47 < half.min() and half.max() < 0.6


def test_sigma_by_hand():
    """Four evenly spaced sizes leave residuals along (1, -3, 3, -1) / sqrt(20):
    one degree of freedom."""
    odd = 0.01 * np.array([1, -3, 3, -1])
    runs = [
        dict(loss="ar", N=math.exp(10 + i), C=C, nats=3 + (i - 1.5) ** 2 + sign * odd[i])
        for C, sign in ((1e12, 1), (1e13, -2))
        for i in range(4)
    ]
    want = math.sqrt((20e-4 + 4 * 20e-4) / 2)
    assert scaling.fit(runs, replicates=10)["ar"]["sigma"] == pytest.approx(want)
    three = [run for run in runs if run["N"] < math.exp(12.5)]
    laws = scaling.fit(three, replicates=10)
    assert math.isnan(laws["ar"]["sigma"]) and "[?]" in scaling.format_tables(laws, three)


@pytest.mark.parametrize("common", [0.0, 0.02])
def test_intervals_cover_the_truth(common):
    """95 % of them do, within the error of 300 worlds: 0.95 +- 3.5 x 0.0126. Three budgets of 5
    runs leave 6 degrees of freedom."""
    rng, hits, trials = np.random.default_rng(1), {}, 300
    for i in range(trials):
        laws = scaling.fit(world(0.005, common, rng, k=5), replicates=400, seed=i)
        true = {}
        for name, (alpha, beta, b, log_a) in WORLD.items():
            law = laws[name]
            true[name, "alpha"] = law["alpha"], alpha
            true[name, "b"] = law["b"], b
            true[name, "N"] = law["N"][:, 1], math.exp(log_a) * BUDGETS[1] ** b
            true[name, "L"] = law["L"][:, 1], math.exp(beta) * BUDGETS[1] ** alpha
        log_c = math.log(1e19)
        more = math.exp((-0.064 * log_c + 3.8 - 3.9) / -0.06 - log_c)
        true["times"] = scaling.compute_ratio(laws["mdlm"], laws["ar"], 1e19), more
        true["ratio"] = laws["mdlm"]["alpha"] / laws["ar"]["alpha"], 0.06 / 0.064
        for key, (values, want) in true.items():
            low, high = scaling.interval(values)
            hits[key] = hits.get(key, 0) + (low <= want <= high)
    assert all(0.905 < n / trials < 0.995 for n in hits.values()), hits


def test_a_minimum_outside_the_sizes_is_marked():
    inside, beyond = world(), world(offset=2.0)  # sizes from e^0.5 N* on
    for runs, marks in ((inside, 0), (beyond, 6)):
        laws = scaling.fit(runs, replicates=10)
        assert sum(law["outside"].sum() for law in laws.values()) == marks
        table = scaling.format_tables(laws, runs)
        assert table.count("**outside the sizes: extrapolated**") == marks
    np.testing.assert_allclose(laws["ar"]["b"], 0.5, rtol=1e-6)


def test_budgets_without_a_minimum_are_left_out_and_named(capsys):
    runs = world(budgets=(*BUDGETS, 1e20))
    for run in runs:
        if run["C"] == 1e20 and run["loss"] == "ar":
            run["nats"] = 6 - run["nats"]
    laws = scaling.fit(runs, replicates=10)
    assert laws["ar"]["flat"] == [1e20] and laws["ar"]["C"].tolist() == list(BUDGETS)
    np.testing.assert_allclose(laws["ar"]["alpha"], -0.064, rtol=1e-6)
    text = scaling.format_tables(laws, runs)
    assert "`ar`, C = 1e+20: the parabola has no minimum; left out" in text
    kept = [run for run in runs if run["C"] in (1e18, 1e20)]
    words = "ar: 1 of the 2 or more budgets with a minimum"
    refused(capsys, lambda: scaling.fit(kept, replicates=10), words)
    noisy = world(0.02, rng=np.random.default_rng(3), width=1.0)
    laws = scaling.fit(noisy, replicates=400)
    share = np.isnan(laws["ar"]["N"][1:]).any(1).mean()
    note = f"`ar`: {share:.1%} of the replicates lack a minimum"
    assert 0.02 < share < 0.98 and note in scaling.format_tables(laws, noisy)


def test_fewer_than_three_sizes_are_refused(capsys):
    runs = [run for run in world(k=3) if run["loss"] == "ar"]
    scaling.fit(runs, replicates=10)
    runs += [dict(run, nats=run["nats"] + 0.01) for run in runs]  # a second seed is no third size
    missing = [run for run in runs if (run["C"], run["N"]) != (runs[4]["C"], runs[4]["N"])]
    words = "ar, C=4e+18: 2 of the 3 or more sizes"
    refused(capsys, lambda: scaling.fit(missing, replicates=10), words)


def test_the_table_says_what_the_laws_are():
    rng = np.random.default_rng(2)
    runs = [dict(run, epochs=2.5, config={"lr": 1}) for run in world(0.002, rng=rng)]
    laws = scaling.fit(runs)
    text = scaling.format_tables(laws, runs)
    optima, slopes, versus, notes = text.split("\n\n")
    number = r"([\d.e+-]+) \[([\d.e+-]+), ([\d.e+-]+)\]"
    order = [(name, i) for name in ("mdlm", "ar") for i in range(3)]
    for row, (name, i) in zip(optima.splitlines()[2:], order):
        cells = [c.strip() for c in row.split("|")[1:-1]]
        N, D, L = ([float(x) for x in re.fullmatch(number, c).groups()] for c in cells[3:])
        assert cells[0] == f"`{name}`" and float(cells[1]) == BUDGETS[i]
        assert N[0] == pytest.approx(laws[name]["N"][0, i], rel=5e-3) and N[1] < N[0] < N[2]
        assert L[0] == pytest.approx(laws[name]["L"][0, i], rel=5e-4) and L[1] < L[0] < L[2]
        assert 6 * N[0] * D[0] == pytest.approx(BUDGETS[i], rel=1e-2)
    mixed = [*runs[1:], dict(runs[0], config={"lr": 2})]
    assert "recipes" not in text
    assert "have 2 different recipes" in scaling.format_tables(laws, mixed)
    for row, name in zip(slopes.splitlines()[2:], ("mdlm", "ar")):
        values = [float(re.fullmatch(number, c.strip())[1]) for c in row.split("|")[2:-2]]
        want = [laws[name][key][0] for key in ("alpha", "beta", "b")]
        assert values == pytest.approx([*want, 1 - want[2]], rel=6e-3)
    more = scaling.compute_ratio(laws["mdlm"], laws["ar"], 1e18)
    assert f"| {scaling.format_estimate(more)}" in versus
    assert versus.count("extrapolated beyond its budgets") == 3
    ratio = scaling.format_estimate(laws["mdlm"]["N"][:, 2] / laws["ar"]["N"][:, 2])
    assert versus.splitlines()[-1].endswith(f"| {ratio} |")
    assert scaling.format_estimate(laws["mdlm"]["alpha"] / laws["ar"]["alpha"]) in notes
    assert "36 runs, which see the data 2.5 times" in notes


# --------------------------------------------------------------------------------------------------
# Files and runs


def test_damaged_lines_are_named(tmp_path, capsys):
    path = tmp_path / "runs.jsonl"
    good = json.dumps(dict(loss="ar", N=1e5, C=1e12, nats=3.0, se=None, size="x", seed=1))
    path.write_text(good + "\n")
    assert scaling.read_runs(path)[0]["nats"] == 3.0
    assert list(scaling.index_runs(path)) == [("ar", "x", 1e12, 1)]
    nats = [good.replace("3.0", value) for value in ("NaN", "-1", '"x"', "null")]
    others = [good.replace("1000000000000.0", "0"), good.replace("null", "-0.1")]
    for bad in ("{", "[1]", "3", '{"loss": "ar", "N": 1e5, "C": 1e12}', *nats, *others):
        assert bad != good
        path.write_text(f"{good}\n{bad}\n")
        refused(capsys, lambda: scaling.read_runs(path), f"{path}, line 2: ", "not a run")
    path.write_text(f"{good}\n{good}\n")
    assert len(scaling.read_runs(path)) == 2
    words = "line 2: a second line of ('ar', 'x', 1000000000000.0, 1)"
    refused(capsys, lambda: scaling.index_runs(path), words)


# A fit needs curves with a minimum, for every seed and any noise of the bound. Of the 1,000
# characters the text uses 40. A small model has the steps to learn which. A large one has one or
# two steps and costs 0.6 nats more, or worse. With 27 characters that gap is close to the noise.
SWEEP = (["13k", "50k", "198k"], [6e8, 8e8], 1, 2)  # sizes, budgets, seeds, passes
MANY = "".join(map(chr, range(32, 1032)))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scaling")
    cfg = tiny_run(make_corpus(folder / "words", MANY))
    cfg = replace(cfg, cond_dim=0, vocab_size=5, lr=0.01, muon_lr=0.02)
    return replace(cfg, eval_every=100, save_every=100, out_dir=str(folder / "run"))


@pytest.fixture(scope="module")
def swept(base):
    return scaling.main(base, *SWEEP)


@pytest.mark.slow
def test_a_sweep_from_end_to_end(base, swept):
    out = Path(base.out_dir)
    runs = scaling.read_runs(out / "runs.jsonl")
    assert len(runs) == 12 and set(swept) == {"ar", "mdlm"}
    for run in runs:
        folder = out / f"{run['loss']}_{run['size']}_{run['C']:g}_1"
        cfg = json.loads((folder / "config.json").read_text())
        assert run["steps"] == cfg["steps"] == int(run["C"] / (6 * run["N"] * 8 * 32))
        assert cfg["loss"] == run["loss"]
        assert run["D"] == run["steps"] * 256 and run["epochs"] == run["D"] / 4000
        assert run["se"] > 0 and 0.5 < run["nats"] < math.log(len(MANY))
    args = [str(out / "mdlm_50k_8e+08_1"), "--split=val", "--passes=2", "--batch_size=8"]
    run = next(r for r in runs if (r["loss"], r["size"], r["C"]) == ("mdlm", "50k", 8e8))
    assert evaluate.main(args)["nats"] == pytest.approx(run["nats"], rel=1e-6)
    assert (out / "scaling.png").read_bytes()[:4] == b"\x89PNG"
    assert "sd of a run" in (out / "table.md").read_text()


def test_finished_runs_are_kept_and_a_killed_sweep_resumes(base, swept, monkeypatch, tmp_path):
    out, whole = Path(base.out_dir), (Path(base.out_dir) / "runs.jsonl").read_text()
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/ckpt.pt")}
    again = scaling.main(base, *SWEEP)
    assert (out / "runs.jsonl").read_text() == whole
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())
    assert all(np.array_equal(again[n]["L"], swept[n]["L"], equal_nan=True) for n in swept)

    cfg = replace(base, vocab_size=len(MANY), out_dir=str(tmp_path / "run"))
    calls, evaluate_final = [], scaling.report.evaluate_final

    def killed(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt  # trained, but without a line
        if len(calls) == 4:  # a parallel sweep writes the line of this run first
            path.write_text(lines[0] + lines[1])
        return evaluate_final(*args)

    few = (["13k", "50k"], [6e8], 1, 2)
    path, lines = tmp_path / "run" / "runs.jsonl", whole.splitlines(keepends=True)
    monkeypatch.setattr(scaling.report, "evaluate_final", killed)
    with pytest.raises(KeyboardInterrupt):
        scaling.sweep(cfg, *few)
    assert path.read_text() == "".join(lines[:2])
    path.write_text(lines[0] + '{"loss": "ar", "si')
    runs = scaling.sweep(cfg, *few)
    assert path.read_text() == "".join(lines[:4]) and len(calls) == 3 + 3
    assert runs == [json.loads(line) for line in lines[:4]]


def test_another_recipe_is_refused_and_other_sizes_join(base, swept, capsys):
    path = Path(base.out_dir) / "runs.jsonl"
    whole = path.read_text()
    words = "has another lr; use another --out_dir"
    refused(capsys, lambda: scaling.main(replace(base, lr=1e-3), *SWEEP), words)
    assert path.read_text() == whole
    laws = scaling.main(base, ["111k"], [8e8], 2, 2)
    joined = scaling.read_runs(path)
    assert len(joined) == 16 and joined[12]["size"] == "111k"
    assert {run["seed"] for run in joined[12:]} == {1, 2}
    assert [len(law["points"][8e8][0]) for law in laws.values()] == [5, 5]
    elsewhere = replace(base, out_dir=base.out_dir + "_fit")
    again = scaling.main(elsewhere, [], [], 1, 1, joined)
    assert np.array_equal(again["ar"]["L"], laws["ar"]["L"], equal_nan=True)
    assert (Path(elsewhere.out_dir) / "table.md").exists()
    path.write_text(whole)


@pytest.mark.parametrize("args, words", [
    (["--sizes", "7"], "--sizes 7: must be one of 13k, "),
    (["--budgets", "0"], "--budgets 0.0: must be above 0"),
    (["--budgets", "nan"], "--budgets nan: must be above 0"),
    (["--budgets", "x"], "--budgets: invalid float value: 'x'"),
    (["--seeds", "0"], "--seeds 0: must be at least 1"),
    (["--fit", "nowhere.jsonl"], "--fit nowhere.jsonl: no such file"),
    (["--learning_rate=3"], "unknown option --learning_rate"),
])  # fmt: skip
def test_bad_input_is_one_line(args, words, capsys):
    refused(capsys, lambda: scaling.parse_arguments(args), words)


def test_the_command_line(base, capsys):
    argv = "smdm_170 --lr=4e-4 --sizes 6 19 --budgets 6e18 1e19 --out_dir=x".split()
    cfg, args = scaling.parse_arguments(argv)
    assert (cfg.lr, cfg.out_dir, args.sizes, args.budgets) == (4e-4, "x", ["6", "19"], [6e18, 1e19])
    assert scaling.parse_arguments([])[0].out_dir == "out/scaling_pydocs_mdlm"
    for bad, words in (
        (as_ar(base), "loss=ar"),
        (replace(base, cond_dim=8), "cond_dim=8: must be mdlm and 0"),
    ):
        refused(capsys, partial(scaling.main, bad, *SWEEP), words)
    words = "--budgets 1e+06: 0 steps of size 788k"
    refused(capsys, lambda: scaling.main(base, ["788k"], [1e6], 1, 1), words)


def test_the_plot_shows_the_laws(monkeypatch, tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(plt, "close", lambda: None)
    laws = scaling.fit(world(), replicates=10)
    scaling.plot(laws, tmp_path / "scaling.png")
    left, right, *_ = plt.gcf().axes
    monkeypatch.undo()
    plt.close()
    drawn = lambda axis: [np.array(line.get_data(), float) for line in axis.lines]
    for law in laws.values():
        for C, (n, nats, *_) in law["points"].items():
            assert any(np.array_equal(d, [n, nats]) for d in drawn(left))
            curves = [y for x, y in drawn(left) if len(x) == 100 and math.isclose(x[0], n[0])]
            lowest = law["L"][0, law["C"] == C][0]
            assert any(y.min() == pytest.approx(lowest, abs=1e-4) for y in curves)
        assert any(np.array_equal(d, [law["N"][0], law["L"][0]]) for d in drawn(left))  # the stars
    fitted = [line.get_data() for line in right.lines if line.get_linestyle() != "None"]
    exact = [(law["C"], law["L"][0]) for law in laws.values()]  # there is no noise
    np.testing.assert_allclose(fitted, exact)


def test_without_matplotlib_there_is_a_hint(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    scaling.plot(scaling.fit(world(), replicates=10), tmp_path / "scaling.png")
    assert "pip install matplotlib" in capsys.readouterr().out and not list(tmp_path.iterdir())
