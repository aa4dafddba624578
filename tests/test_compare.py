"""compare.py: one command, four losses, every run resumable, a table, a plot and samples."""

import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import tiny_run

import compare
from configs import as_ar, as_d3pm, as_sedd
from model import load


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory):
    return replace(tiny_run(corpus), cond_dim=0, out_dir=str(tmp_path_factory.mktemp("compare") / "run"))


@pytest.fixture(scope="module")
def results(base):
    return compare.main(base, seeds=2, passes=3)


def test_the_table_holds_the_means_errors_and_paired_differences(base, results):
    lines = (Path(base.out_dir) / "table.md").read_text().splitlines()[2:]
    assert [re.match(r"\| `(\w+)`", line)[1] for line in lines] == ["ar", "mdlm", "sedd", "d3pm"]
    bits = {name: [r["bits_per_char"] for r in runs] for name, runs in results.items()}
    for line, name in zip(lines, bits):
        cells = [c.strip() for c in line.split("|")[1:-1]]
        for values, text in (
            (bits[name], cells[2]),
            ([a - b for a, b in zip(bits[name], bits["mdlm"])], cells[3]),
        ):
            if text:
                mean, error = map(float, text.removeprefix("≤ ").split(" ± "))
                assert mean == pytest.approx(statistics.fmean(values), abs=6e-4)
                assert error == pytest.approx(
                    abs(values[0] - values[1]) / 2, abs=6e-4
                )  # of two: half the range
        assert ("≤" in cells[2]) == (name != "ar") and (not cells[3]) == (name == "mdlm")


def test_the_four_differ_in_the_loss_alone(base, results):
    cfgs = {name: load(f"{base.out_dir}/{name}_1/ckpt.pt")[1] for name in results}
    changes = {"ar": as_ar, "mdlm": lambda cfg: cfg, "sedd": as_sedd, "d3pm": as_d3pm}
    for name, cfg in cfgs.items():
        same = replace(base, seed=1, out_dir=cfg.out_dir)
        assert cfg == changes[name](same)
    assert cfgs["d3pm"].T == 1000 and not cfgs["d3pm"].zero_masking and cfgs["ar"].causal


def test_plot_and_samples_are_there(base, results):
    assert (Path(base.out_dir) / "curves.png").read_bytes()[:4] == b"\x89PNG"
    first, _, *rows = (Path(base.out_dir) / "samples.txt").read_text().splitlines()
    assert first.split() == ["ar", "mdlm", "sedd", "d3pm"] and rows


def test_complete_runs_are_kept_and_others_go_on(base, results, capsys):
    path = Path(base.out_dir) / "mdlm_2" / "ckpt.pt"
    before = {p: p.stat().st_mtime_ns for p in Path(base.out_dir).glob("*/ckpt.pt")}
    (path.parent / "best.pt").unlink()
    path.unlink()
    again = compare.main(base, seeds=2, passes=3)
    assert again == results  # to the bit
    after = {p: p.stat().st_mtime_ns for p in before}
    assert [p for p in before if before[p] != after[p]] == [path]
    with pytest.raises(SystemExit):
        compare.main(replace(base, lr=1e-3), seeds=2, passes=3)
    assert "of another recipe" in capsys.readouterr().err and path.stat().st_mtime_ns == after[path]
    with pytest.raises(SystemExit):
        compare.main(as_ar(base), seeds=1, passes=1)
    assert "loss=ar" in capsys.readouterr().err


def test_columns_are_aligned():
    text = compare.side_by_side({"a": "one two three\n\nfour", "b": "x"}, width=7)
    assert text == "a        b\n\none two  x\nthree\n\nfour\n"
