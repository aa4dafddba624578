"""quality.py: its figures are those of judge.py and of the data, its calls those of the sampler."""

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


def json_rows(capsys, checkpoints, *more):
    return [json.loads(line) for line in run(capsys, checkpoints, "--json", *more).splitlines()]


def test_every_sampler_and_setting_gets_the_figures_of_judge(checkpoints, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    png = tmp_path / "quality.png"
    rows = json_rows(capsys, checkpoints, "--png", png)
    assert png.read_bytes().startswith(b"\x89PNG")
    found = {(row["sampler"], row["setting"]): row for row in rows}
    names = {"validation text", *SAMPLERS} - set(quality.SAME_LAW)
    assert len(found) == len(rows) and {name for name, _ in found} == names
    calls = {key: row["calls"] for key, row in found.items()}
    assert calls["confidence", "steps=2"] == 2 and calls["first_hitting", ""] == 32
    few, many = calls["threshold", "threshold=0.1"], calls["threshold", "threshold=0.99"]
    assert few < many <= 32 and calls["remdm_cap", "steps=5"] <= 5
    assert calls["entropy_bound", "gamma=10"] < calls["entropy_bound", "gamma=0.01"]
    common = "--num 3 --batch_size 2 --device cpu --json".split()
    for more, key in (
        (["--sampler", "ddpm_cache", "--steps", "5"], ("ddpm_cache", "steps=5")),
        (["--sampler", "threshold", "--threshold", "0.3"], ("threshold", "threshold=0.3")),
    ):
        judge_task.main([*checkpoints, *common, *more])
        want = json.loads(capsys.readouterr().out)
        assert [found[key][f] for f in ("nats", "entropy")] == [want["nats"], want["entropy"]]


def test_the_first_row_is_the_validation_text(checkpoints, corpus, capsys):
    first = json_rows(capsys, checkpoints, "--samplers", "ddpm_cache")[0]
    assert first["sampler"] == "validation text" and first["calls"] is None
    ids = read_split(str(corpus), "val", tiny_run(corpus))[0]
    rows = [ids[int(i) :][:32] for i in (0, (len(ids) - 32) // 2, len(ids) - 32)]
    entropy = lambda row: -sum(p * math.log(p) for p in np.unique(row, return_counts=True)[1] / 32)
    assert first["entropy"] == pytest.approx(np.mean([entropy(row) for row in rows]))


def test_no_ema_samples_from_the_raw_weights(checkpoint, checkpoints, capsys):
    models = str(checkpoint), checkpoints[1]
    args = "--samplers", "ddpm_cache", "--temperature", "0"
    averaged, raw = (json_rows(capsys, models, *args, *more) for more in ([], ["--no_ema"]))
    assert averaged[0] == raw[0] and averaged[1]["nats"] != raw[1]["nats"]


def test_settings_are_steps_or_the_values_of_another_option():
    assert all(set(quality.VALUES) >= set(default_options(SAMPLERS[name])) for name in STEPLESS)
    assert quality.list_settings("ddpm_cache", [3, 4]) == [dict(steps=3), dict(steps=4)]
    assert quality.list_settings("first_hitting", [3, 4]) == [{}]


@pytest.mark.parametrize("more, words", [
    (["--steps", "4", "0"], ["--steps 0", "at least 1"]),
    (["--png", "nowhere/quality.png"], ["--png", "nowhere/quality.png", "no such folder"]),
    (["--num", "1"], ["--num 1", "at least 2"]),
    (["--top_p", "0"], ["--top_p 0"]),
    (["--samplers", "magic"], ["magic", "threshold"]),
])  # fmt: skip
def test_bad_arguments(checkpoints, capsys, more, words):
    refused(capsys, lambda: run(capsys, checkpoints, *more), *words)


def test_the_model_is_no_ar_model_and_the_judge_is_one(checkpoints, capsys):
    mdlm, ar = checkpoints
    refused(capsys, lambda: quality.main([ar, "--judge", ar]), "left to right")
    refused(capsys, lambda: quality.main([mdlm, "--judge", mdlm]), "judge", "AR")


def test_a_judge_that_cannot_read_the_texts(checkpoints, corpus, capsys, tmp_path):
    ar = replace(tiny_run(corpus), loss="ar", causal=True, cond_dim=0)
    judge = str(save(tmp_path / "capitals.pt", ar, {"kind": "char", "characters": LETTERS.upper()}))
    words = "capitals.pt: cannot read", "vocabulary"
    refused(capsys, lambda: run(capsys, (checkpoints[0], judge)), *words)
