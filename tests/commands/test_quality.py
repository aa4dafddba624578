"""quality.py: its figures are those of evaluate.py and of the data, its calls those that a sampler makes."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from conftest import LETTERS, refused, save, tiny_run

from data.corpus import read_split
from samplers import SAMPLERS, STEPLESS, default_options
from tasks import judge as judge_task
from tasks import quality

ARGS = ["--num", "3", "--steps", "2", "5", "--batch_size", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def checkpoints(corpus, tmp_path_factory):
    folder, cfg = tmp_path_factory.mktemp("models"), tiny_run(corpus)
    ar = replace(cfg, loss="ar", causal=True, cond_dim=0)
    return str(save(folder / "mdlm.pt", cfg)), str(save(folder / "ar.pt", ar, seed=1))


def run(capsys, checkpoints, *more):
    ckpt, judge = checkpoints
    quality.main([ckpt, "--judge", judge, *ARGS, *map(str, more)])
    return capsys.readouterr().out


def test_every_sampler_and_setting_is_judged_as_evaluate_does(checkpoints, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    png = tmp_path / "quality.png"
    rows = [
        json.loads(line) for line in run(capsys, checkpoints, "--json", "--png", png).splitlines()
    ]
    assert png.read_bytes().startswith(b"\x89PNG")
    of = {(row["sampler"], row["setting"]): row for row in rows}
    assert len(of) == len(rows) and {name for name, _ in of} == {"validation text"} | set(
        SAMPLERS
    ) - set(quality.SAME_LAW)
    assert of["confidence", "steps=2"]["calls"] == 2 and of["first_hitting", ""]["calls"] == 32
    assert (
        of["threshold", "threshold=0.1"]["calls"] < of["threshold", "threshold=0.99"]["calls"] <= 32
    )
    assert of["entropy_bound", "gamma=10"]["calls"] < of["entropy_bound", "gamma=0.01"]["calls"]
    assert of["remdm_cap", "steps=5"]["calls"] <= 5
    ckpt, judge = checkpoints
    theirs = [
        ckpt,
        judge,
        "--num",
        "3",
        "--batch_size",
        "2",
        "--device",
        "cpu",
        "--json",
    ]
    for more, key in (
        (["--sampler", "ddpm_cache", "--steps", "5"], ("ddpm_cache", "steps=5")),
        (["--sampler", "threshold", "--threshold", "0.3"], ("threshold", "threshold=0.3")),
    ):
        judge_task.main([*theirs, *more])
        want = json.loads(capsys.readouterr().out)
        assert [of[key][f] for f in ("nats", "entropy")] == [want[f] for f in ("nats", "entropy")]


def test_the_first_row_is_the_validation_text(checkpoints, corpus, capsys):
    first = json.loads(
        run(capsys, checkpoints, "--json", "--samplers", "ddpm_cache").splitlines()[0]
    )
    assert first["sampler"] == "validation text" and first["calls"] is None
    ids = read_split(str(corpus), "val", tiny_run(corpus))[0]
    rows = [ids[int(i) :][:32] for i in (0, (len(ids) - 32) // 2, len(ids) - 32)]
    entropy = lambda row: -sum(p * math.log(p) for p in np.unique(row, return_counts=True)[1] / 32)
    assert first["entropy"] == pytest.approx(np.mean([entropy(row) for row in rows]))


def test_steps_are_of_samplers_that_have_them_and_values_of_the_others():
    assert all(set(quality.VALUES) >= set(default_options(SAMPLERS[name])) for name in STEPLESS)
    assert quality.settings("ddpm_cache", [3, 4]) == [dict(steps=3), dict(steps=4)]
    assert quality.settings("first_hitting", [3, 4]) == [{}]


@pytest.mark.parametrize("more, words", [
    (["--steps", "4", "0"], ["--steps 0", "at least 1"]),
    (["--png", "nowhere/quality.png"], ["--png", "nowhere/quality.png", "no such folder"]),
    (["--num", "1"], ["--num 1", "at least 2"]),
    (["--top_p", "0"], ["--top_p 0"]),
    (["--samplers", "magic"], ["magic", "threshold"]),
])  # fmt: skip
def test_bad_arguments(checkpoints, capsys, more, words):
    refused(capsys, lambda: run(capsys, checkpoints, *more), *words)
    refused(
        capsys, lambda: quality.main([checkpoints[1], "--judge", checkpoints[1]]), "left to right"
    )
    refused(
        capsys, lambda: quality.main([checkpoints[0], "--judge", checkpoints[0]]), "judge", "AR"
    )


def test_a_judge_that_cannot_read_the_texts(checkpoints, corpus, capsys, tmp_path):
    ar = replace(tiny_run(corpus), loss="ar", causal=True, cond_dim=0)
    judge = str(save(tmp_path / "capitals.pt", ar, {"kind": "char", "characters": LETTERS.upper()}))
    refused(
        capsys,
        lambda: run(capsys, (checkpoints[0], judge)),
        "capitals.pt: cannot read",
        "vocabulary",
    )
