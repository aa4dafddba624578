"""plot.py: its panels hold the numbers of the log; the area under the loss over t is the bound."""

import json
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
from conftest import refused, save, tiny_run

import train
from configs import as_ar, as_d3pm
from data.checkpoints import load
from data.corpus import read_split
from evaluate import bound
from tasks import plot

OPTIONS = dict(device="cpu", dtype="float32", no_ema=False, windows=0, batch_size=7, points=32)


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """Two finished runs with another rate."""
    out = tmp_path_factory.mktemp("plot")
    for name, lr in (("a", 3e-3), ("b", 1e-3)):
        train.main(replace(tiny_run(corpus), steps=40, lr=lr, samples=0, out_dir=str(out / name)))
    return [out / "a", out / "b"]


def test_panels_hold_the_numbers_of_the_log(runs):
    tokens, panels = plot.read_run(runs[0])
    records = [json.loads(line) for line in (runs[0] / "log.jsonl").read_text().splitlines()]
    assert tokens == 8 * 32 and list(panels) == ["val", "loss", "lr", "tokens_per_s"]
    for key in ("loss", "lr", "tokens_per_s"):
        assert panels[key] == [(r["step"], r[key], 0.0) for r in records if key in r]
    val = [(r["step"], r["val"]) for r in records if "val" in r]
    assert panels["val"] == [(s, v["bits_per_char"], v["bits_per_char_se"]) for s, v in val]
    assert len(val) == 7 and [step for step, *_ in panels["loss"]] == [10, 20, 30, 40]


def test_smoothing_keeps_means_and_ends():
    assert plot.smooth([1.0, 2.0, 6.0], 0).tolist() == [1, 2, 6]
    assert plot.smooth([1.0, 2.0, 6.0, 3.0], 3).tolist() == pytest.approx([1.5, 3, 11 / 3, 4.5])


@pytest.mark.parametrize("ending", ["svg", "png", "pdf"])
def test_a_picture_of_two_runs(runs, ending, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / f"both.{ending}"
    plot.main([*map(str, runs), "--out", str(out)])
    assert capsys.readouterr().out == f"{out}\n"
    starts = dict(svg=b"<?xml", png=b"\x89PNG", pdf=b"%PDF")
    assert out.read_bytes().startswith(starts[ending])
    if ending == "svg":
        words = [*map(str, runs), *plot.PANELS.values(), "million training tokens"]
        assert all(word in out.read_text() for word in words)


def test_a_picture_lies_beside_its_run(runs, capsys):
    pytest.importorskip("matplotlib")
    plot.main([str(runs[0])])
    plot.main([str(runs[0] / "ckpt.pt"), "--windows", "9", "--points", "3"])
    assert (runs[0] / "curves.svg").exists()
    text = (runs[0] / "loss_by_time.svg").read_text()
    assert "nats per masked token" in text and "nats per token" in text


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_area_under_the_loss_is_the_bound(corpus, tmp_path, schedule):
    """Whatever the schedule: t is the share of masked tokens. The midpoints of 32 intervals hold
    each number of masks of 32 tokens once."""
    path = save(tmp_path / "ckpt.pt", replace(tiny_run(corpus), schedule=schedule))
    t, mean, error = plot.loss_by_time(path, Namespace(**OPTIONS))
    model, cfg = load(path)
    ids, meta = read_split(cfg.data, "val", cfg)
    expected = bound(model, ids, meta, cfg, "val", passes=16)
    assert len(t) == 32 and abs(t.mean() - 0.5) < 1e-9
    tolerance = 4 * (expected["se"] ** 2 + (error**2).mean() / 32) ** 0.5
    assert abs(mean.mean() - expected["nats"]) < tolerance < 0.15 * expected["nats"]


def test_the_loss_rises_with_t(checkpoint):
    """A trained model guesses better from more visible tokens."""
    _, mean, error = plot.loss_by_time(checkpoint, Namespace(**OPTIONS | dict(points=4)))
    assert mean[0] + 2 * np.hypot(error[0], error[-1]) < mean[-1]


def test_bad_arguments_are_refused(runs, corpus, checkpoint, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    cfg = replace(tiny_run(corpus), cond_dim=0)
    ar, d3pm = (save(tmp_path / f"{v.__name__}.pt", v(cfg)) for v in (as_ar, as_d3pm))
    refuse = lambda *argv: lambda: plot.main([*map(str, argv)])
    refused(capsys, refuse(tmp_path), "config.json", "out/NAME")
    refused(capsys, refuse(runs[0], checkpoint), "do not go into one picture")
    refused(capsys, refuse(runs[0], "--out", "a.gif"), "a.gif", ".svg")
    refused(capsys, refuse(runs[0], "--out", "no/such/a.svg"), "no/such")
    refused(capsys, refuse(ar), "as_ar.pt", "no loss as a function of t")
    refused(capsys, refuse(d3pm), "as_d3pm.pt", "MASK")
    (tmp_path / "config.json").write_text((runs[0] / "config.json").read_text())
    (tmp_path / "log.jsonl").write_text('{"step": 1, "val": 3}\n')
    refused(capsys, refuse(tmp_path), "log.jsonl, line 1")


def test_a_line_that_is_being_written_is_left_out(runs, tmp_path):
    for name in ("config.json", "log.jsonl"):
        (tmp_path / name).write_text((runs[0] / name).read_text())
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 41, "lo')
    assert plot.read_run(tmp_path) == plot.read_run(runs[0])


def test_without_matplotlib_there_is_a_hint(runs, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    plot.main([str(runs[0])])
    assert capsys.readouterr().out == "no curves.svg: pip install matplotlib\n"
