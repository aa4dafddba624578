"""compare.py: four losses in one command; resumable runs, a table, a plot and samples."""

import json
import re
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import refused, tiny_run

import evaluate
from configs import as_ar, as_d3pm, as_sedd
from data.checkpoints import load
from tasks import compare


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "run"
    return replace(tiny_run(corpus), cond_dim=0, out_dir=str(out))


@pytest.fixture(scope="module")
def results(base):
    return compare.main(base, seeds=2, passes=3)


def test_the_table_holds_the_means_errors_and_paired_differences(base, results):
    lines = (Path(base.out_dir) / "table.md").read_text().splitlines()[2:]
    assert [re.match(r"\| `(\w+)`", line)[1] for line in lines] == ["ar", "mdlm", "sedd", "d3pm"]
    bits = {name: [r["bits_per_char"] for r in runs] for name, runs in results.items()}
    for line, name in zip(lines, bits):
        cells = [c.strip() for c in line.split("|")[1:-1]]
        differences = [a - b for a, b in zip(bits[name], bits["mdlm"])]
        for values, text in ((bits[name], cells[2]), (differences, cells[3])):
            if text:
                mean, error = map(float, text.removeprefix("≤ ").split(" ± "))
                assert mean == pytest.approx(statistics.fmean(values), abs=6e-4)
                half_range = abs(values[0] - values[1]) / 2  # the standard error of two values
                assert error == pytest.approx(half_range, abs=6e-4)
        assert ("≤" in cells[2]) == (name != "ar") and (not cells[3]) == (name == "mdlm")


def test_the_four_differ_in_the_loss_alone(base, results):
    cfgs = {name: load(f"{base.out_dir}/{name}_1/ckpt.pt")[1] for name in results}
    changes = {"ar": as_ar, "mdlm": lambda cfg: cfg, "sedd": as_sedd, "d3pm": as_d3pm}
    for name, cfg in cfgs.items():
        same = replace(base, seed=1, out_dir=cfg.out_dir)
        assert cfg == changes[name](same)
    assert cfgs["d3pm"].T == 1000 and not cfgs["d3pm"].zero_masking and cfgs["ar"].causal


def test_plot_and_samples_exist(base, results):
    assert (Path(base.out_dir) / "curves.png").read_bytes()[:4] == b"\x89PNG"
    first, _, *rows = (Path(base.out_dir) / "samples.txt").read_text().splitlines()
    assert first.split() == ["ar", "mdlm", "sedd", "d3pm"] and rows


@pytest.mark.slow
def test_finished_runs_are_kept_and_others_resumed(base, results, capsys):
    path = Path(base.out_dir) / "mdlm_2" / "ckpt.pt"
    before = {p: p.stat().st_mtime_ns for p in Path(base.out_dir).glob("*/ckpt.pt")}
    (path.parent / "best.pt").unlink()
    path.unlink()
    again = compare.main(base, seeds=2, passes=3)
    assert again == results  # to the bit
    after = {p: p.stat().st_mtime_ns for p in before}
    assert [p for p in before if before[p] != after[p]] == [path]
    other = replace(base, eval_windows=3, device="auto")  # neither belongs to the recipe
    compare.main(other, seeds=2, passes=3)
    for bad, words in (
        (replace(base, lr=1e-3), "trained with another lr; "),
        (as_ar(base), "loss=ar"),
        (replace(base, T=10), "T=10: must be 0 for loss=ar"),
        (replace(base, time_draw="counts"), "time_draw=counts"),
    ):
        refused(capsys, lambda bad=bad: compare.main(bad, seeds=2, passes=3), words)
    assert all(p.stat().st_mtime_ns == after[p] for p in after)


def test_the_final_figures_are_of_the_averaged_weights_and_d3pms_own_steps(base, results):
    """As evaluate.py reports them, with the same number of passes."""
    for name, runs in results.items():
        for seed, result in enumerate(runs, 1):
            path = f"{base.out_dir}/{name}_{seed}/ckpt.pt"
            args = [path, "--split=val", f"--passes={1 if name == 'ar' else 3}", "--batch_size=8"]
            again = evaluate.main(args)
            assert again["bits_per_char"] == pytest.approx(result["bits_per_char"], rel=1e-6), name
            raw = evaluate.main([*args, "--no_ema"])
            assert raw["bits_per_char"] != pytest.approx(result["bits_per_char"], rel=1e-3)


def test_lowest_on_the_way(tmp_path, base):
    cfg = replace(base, out_dir=str(tmp_path))
    values = [5.0, 3.0, 4.0]
    lines = [json.dumps({"step": i, "val": {"bits_per_char": v}}) for i, v in enumerate(values)]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, json.dumps({"step": 9, "loss": 1.0})]))
    assert compare.read_curve(cfg) == {0: 5.0, 1: 3.0, 2: 4.0}
    table = compare.format_table({"mdlm": [cfg]}, {"mdlm": [dict(bits_per_char=4.0, perplexity=9)]})
    cells = table.splitlines()[2].split("|")[3:6]
    assert [c.strip() for c in cells] == ["≤ 4.000", "", "≤ 3.000"]


def test_columns_are_aligned():
    text = compare.join_columns({"a": "one two three\n\nfour", "b": "x"}, width=7)
    assert text == "a        b\n\none two  x\nthree\n\nfour\n"


@pytest.mark.slow
def test_two_processes_reach_the_figures_of_one(base, results, tmp_path):
    """torchrun -m tasks.compare: both train and evaluate, one writes and prints."""
    fields = dict(asdict(base), out_dir=str(tmp_path / "two"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, "-m", "tasks.compare", "--seeds=1", "--passes=3"]
    command += [f"--{name}={value}" for name, value in fields.items()]
    root = Path(compare.__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    table = (tmp_path / "two" / "table.md").read_text()
    assert done.stdout.count(table) == 1
    for line, (name, (first, _)) in zip(table.splitlines()[2:], results.items()):
        cells = [c.strip().removeprefix("≤ ") for c in line.split("|")[1:-1]]
        assert cells[0] == f"`{name}`"
        assert float(cells[2]) == pytest.approx(first["bits_per_char"], abs=1e-3)
        assert float(cells[5]) == pytest.approx(first["perplexity"], rel=1e-3)
