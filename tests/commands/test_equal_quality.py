"""Seconds at equal quality: the rows are those of the judge, the crossing point is interpolated."""

import json
import math
import re
from dataclasses import replace

import pytest
from conftest import CHARACTERS, refused, save, tiny_run

from configs import as_ar
from data.checkpoints import load
from data.tokenizer import load_tokenizer
from sample import generate
from tasks import equal_quality
from tasks.equal_quality import conclude, seconds_at
from tasks.judge import judge_rows, our_judge


@pytest.fixture(scope="module")
def paths(corpus, tmp_path_factory):
    folder, cfg = tmp_path_factory.mktemp("models"), tiny_run(corpus)
    return {
        "ar": save(folder / "ar.pt", as_ar(cfg)), "mdm": save(folder / "mdm.pt", cfg, seed=1),
        "judge": save(folder / "judge.pt", as_ar(cfg), seed=2),
    }  # fmt: skip


def test_the_rows_are_the_judges(paths, capsys):
    argv = [paths["ar"], paths["mdm"], "--judge", paths["judge"], "--steps", 2, 8, "--num", 5,
            "--batch_size", 2]  # fmt: skip
    rows = equal_quality.main([*map(str, argv)])
    out = capsys.readouterr().out
    assert [(row["sampler"], row["steps"]) for row in rows] == [
        ("ar", None), ("ddpm_cache", 2), ("ddpm_cache", 8)
    ]  # fmt: skip
    tokenizer = load_tokenizer(CHARACTERS)
    for row, name in zip(rows, ("ar", "mdm", "mdm")):
        model, cfg = load(paths[name])
        texts = generate(model, tokenizer._replace(decode=list), cfg, 5, steps=row["steps"] or 1)
        want = judge_rows(texts, tokenizer, our_judge(paths["judge"], "cpu"))
        assert row["nats"] == pytest.approx(want["nats"]) and row["seconds"] > 0
        assert row["entropy"] == pytest.approx(want["entropy"])
    assert re.search(r"^(at [\d.]+ nats the MDM takes|no setting reaches)", out, re.M)
    equal_quality.main([*map(str, argv), "--json"])
    assert len([json.loads(line) for line in capsys.readouterr().out.splitlines()]) == 3


def test_the_crossing_is_interpolated_over_log_seconds():
    rows = [(0.1, 5.0), (0.4, 4.0), (1.6, 3.9)]
    assert seconds_at(4.5, rows[::-1]) == pytest.approx(0.2)  # half way from 0.1 to 0.4
    assert seconds_at(5.0, rows) == pytest.approx(0.1) and seconds_at(3.0, rows) is None
    mdm = [dict(seconds=s, nats=n) for s, n in rows]
    assert "1.50 times as fast" in conclude(dict(seconds=0.3, nats=4.5), mdm)
    assert "2.00 times as slow" in conclude(dict(seconds=0.1, nats=4.5), mdm)
    assert "nearest has 3.900" in conclude(dict(seconds=0.1, nats=3.0), mdm)
    assert math.isclose(seconds_at(4.0, [(1.0, 4.0), (2.0, 4.0), (4.0, 5.0)]), 2.0)


def test_bad_pairs_are_refused(paths, corpus, tmp_path, capsys):
    run = lambda *argv: (
        lambda: equal_quality.main([*map(str, argv), "--judge", str(paths["judge"])])
    )
    refused(capsys, run(paths["mdm"], paths["ar"]), "mdm.pt: must be an AR model")
    short = save(tmp_path / "short.pt", replace(tiny_run(corpus), seq_len=16))
    refused(capsys, run(paths["ar"], short), "short.pt: must have the tokenizer and the length")
