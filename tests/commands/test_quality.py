"""quality.py: its figures are those of judge.py and of the data, its calls those of the sampler."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from conftest import LETTERS, refused, save, tiny_run

from data.corpus import read_split
from data.tokenizer import load_tokenizer
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


@pytest.mark.slow
def test_every_sampler_and_setting_gets_the_figures_of_judge(checkpoints, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    png = tmp_path / "quality.png"
    rows = json_rows(capsys, checkpoints, "--png", png)
    assert png.read_bytes().startswith(b"\x89PNG")
    found = {(row["sampler"], row["setting"]): row for row in rows}
    names = {"validation text", "pasted fragments", *SAMPLERS} - set(quality.SAME_LAW)
    assert len(found) == len(rows) and {name for name, _ in found} == names
    calls = {key: row["calls"] for key, row in found.items()}
    assert calls["confidence", "steps=2"] == calls["llada", "steps=2"] == 2
    assert calls["ar", "per_call=4"] == 8 and calls["first_hitting", ""] == 32
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
    starts = np.linspace(0, len(ids) - 32, 6).astype(int)
    rows, held_out = ([ids[i : i + 32].tolist() for i in starts[k::2]] for k in (0, 1))
    entropy = lambda row: -sum(p * math.log(p) for p in np.unique(row, return_counts=True)[1] / 32)
    assert first["entropy"] == pytest.approx(np.mean([entropy(row) for row in rows]))
    counts = [quality.count_ngrams(part, 2) for part in (rows, held_out)]
    assert first["divergence"] == pytest.approx(quality.divergence(*counts))


def test_the_divergence_of_ngrams():
    """Against the definition, for pairs; 0 for the same texts, log 2 if they share no pair."""
    a, b = [[0, 1, 0, 1, 2]], [[0, 1, 1, 1, 2]]
    p, q = {"01": 0.5, "10": 0.25, "12": 0.25}, {"01": 0.25, "11": 0.5, "12": 0.25}
    mean = {key: (p.get(key, 0) + q.get(key, 0)) / 2 for key in p | q}
    half = lambda law: sum(x * math.log(x / mean[key]) for key, x in law.items()) / 2
    count = lambda rows: quality.count_ngrams(rows, 2)
    assert quality.divergence(count(a), count(b)) == pytest.approx(half(p) + half(q))
    assert quality.divergence(count(a + b), count(b + a)) == pytest.approx(0)
    assert quality.divergence(count(a), count([[3, 3, 3]])) == pytest.approx(math.log(2))


def test_the_error_of_the_divergence_is_the_scatter_of_repetitions():
    rng, values = np.random.default_rng(0), []
    score = lambda texts: (np.ones(len(texts)), np.ones(len(texts)))
    tokenizer = load_tokenizer({"kind": "char", "characters": LETTERS})
    held_out = rng.integers(4, size=(40, 12)).tolist()
    for _ in range(60):
        texts = (rng.integers(4, size=(40, 12)) * rng.integers(2, size=(40, 1))).tolist()
        row = quality.make_row("", "", 0.0, texts, tokenizer, score, held_out, 1)
        values.append((row["divergence"], row["divergence_se"]))
    figures, errors = np.array(values).T
    assert figures.std(ddof=1) == pytest.approx(errors.mean(), rel=0.3)


def test_pasted_fragments_are_the_most_frequent_of_different_tokens():
    ids = np.array([1, 2, 3, 9, 1, 2, 3, 8, 8, 8, 8, 8, 1, 2, 3, 7], np.uint16)
    texts = quality.paste_fragments(ids, 7, 20, seed=0, size=3, bank=1)
    assert texts == [[1, 2, 3, 1, 2, 3, 1]] * 20
    many = quality.paste_fragments(ids, 6, 20, seed=0, size=3, bank=5)
    assert many == quality.paste_fragments(ids, 6, 20, seed=0, size=3, bank=5)
    fragments = {tuple(text[i : i + 3]) for text in many for i in (0, 3)}
    assert (8, 8, 8) not in fragments and (1, 2, 3) in fragments and len(fragments) > 2


def test_a_sweep_of_the_temperature_is_a_curve(checkpoints, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    png = tmp_path / "sweep.png"
    common = "--samplers", "ddpm_cache", "llada", "--steps", "3", "--png", png
    rows = json_rows(capsys, checkpoints, *common, "--temperature", 0.1, 1, 3)
    assert png.read_bytes().startswith(b"\x89PNG")
    found = {(r["sampler"], r["temperature"]): r["entropy"] for r in rows[2:]}
    assert len(found) == 6 and found["ddpm_cache", 0.1] < found["ddpm_cache", 3]
    alone = json_rows(capsys, checkpoints, *common[:-2], "--temperature", 3)
    assert [row for row in rows if row["temperature"] == 3] == alone[2:]


def test_no_ema_samples_from_the_raw_weights(checkpoint, checkpoints, capsys):
    models = str(checkpoint), checkpoints[1]
    args = "--samplers", "ddpm_cache", "--temperature", "0"
    averaged, raw = (json_rows(capsys, models, *args, *more) for more in ([], ["--no_ema"]))
    assert averaged[:2] == raw[:2] and averaged[2]["nats"] != raw[2]["nats"]


def test_settings_are_steps_or_the_values_of_another_option():
    assert all(set(quality.VALUES) >= set(default_options(SAMPLERS[name])) for name in STEPLESS)
    assert quality.list_settings("ddpm_cache", [3, 4]) == [dict(steps=3), dict(steps=4)]
    assert quality.list_settings("first_hitting", [3, 4]) == [{}]
    lucky = dict(steps=3, sampler_options=dict(lucky=1))  # llada's flag above temperature 0
    assert quality.list_settings("llada", [3]) == [lucky]


@pytest.mark.parametrize("more, words", [
    (["--steps", "4", "0"], ["--steps 0", "at least 1"]),
    (["--png", "nowhere/quality.png"], ["--png", "nowhere/quality.png", "no such folder"]),
    (["--num", "1"], ["--num 1", "at least 2"]),
    (["--n", "0"], ["--n 0", "at least 1"]),
    (["--temperature", "1", "-1"], ["--temperature -1", "at least 0"]),
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
