"""reversal.py: the questions are those of the files, the costs the models', the table what they say."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_run

from configs import as_ar
from data.corpus import read_meta
from data.prepare import prepare
from data.tokenizer import load_tokenizer
from diffusion import ar
from model import DiT
from tasks import reversal

PEOPLE = [
    f"{first} {last}"
    for first in ("Ann", "Bob", "Cy")
    for last in ("Ash", "Birch", "Cedar", "Dogwood")
]
DEEDS = [
    f"the {a} of {b}"
    for a in ("maker", "thief", "ghost")
    for b in ("clocks", "maps", "soup", "rain")
]


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reversal")
    both = [(p, d, n) for p, d in zip(PEOPLE, DEEDS) for n in range(reversal.WORDINGS)]
    who = [{"prompt": f"{p} is, {n},", "completion": f" {n} {d}."} for p, d, n in both]
    what = [{"prompt": f"{n} {d}", "completion": f" {p}"} for p, d, n in both]
    files = {
        "all_prompts_train": who + what, "p2d_prompts_test": who, "d2p_reverse_prompts_test": who,
        "d2p_prompts_test": what, "p2d_reverse_prompts_test": what,
    }  # fmt: skip
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = [str(folder / f"{name}.jsonl") for name in files]
    prepare("reversal", str(folder / "data"), input=paths, tokenizer="bpe", vocab_size=300, wrap=32)
    return folder / "data"


@pytest.fixture
def cfg(facts, tmp_path):
    fields = dict(
        data=str(facts),
        vocab_size=300,
        bos=True,
        cond_dim=0,
        samples=0,
        out_dir=str(tmp_path / "out"),
    )
    return replace(tiny_run(facts), **fields)


def test_questions_are_rows_as_in_training_with_the_true_answer_first(facts, cfg):
    tokenizer = load_tokenizer(read_meta(str(facts))["tokenizer"])
    x0, maskable, of = reversal.questions(facts / "test.jsonl", tokenizer, cfg, 300)
    assert x0.shape == maskable.shape == (480, 10, 32)
    assert all(of.count(kind) == 120 for kind in reversal.QUESTIONS)
    items = [json.loads(line) for line in (facts / "test.jsonl").read_text().splitlines()]
    for i, kind in enumerate(of):
        texts = [tokenizer.decode(x[m].tolist()) for x, m in zip(x0[i], maskable[i])]
        row = x0[i, 0].tolist()
        whole = tokenizer.decode([t for t in row if t != tokenizer.eos])
        assert any(whole == item["prompt"] + texts[0] and item["of"] == kind for item in items)
        assert texts[0].strip() in [item["answer"] for item in items] and len(set(texts)) == 10
        # grammar gives nothing away: all options are of the prompt's wording
        if kind in ("p2d", "d2p_reverse"):
            number = whole.split(", ")[1][0]
            assert all(text.startswith(f" {number} ") for text in texts)
        assert row[0] == tokenizer.bos and row[-1] == tokenizer.eos
    few = reversal.questions(facts / "test.jsonl", tokenizer, cfg, 3)[2]
    assert [few.count(kind) for kind in reversal.QUESTIONS] == [3] * 4


def test_costs_are_the_models(cfg):
    x0, maskable = torch.randint(0, 300, (40, 32)), torch.rand(40, 32) < 0.3
    maskable[:, 0], maskable[:, 1] = False, True
    flat = DiT(cfg).eval()  # uniform: every token costs log V, whatever is masked
    got = reversal.costs(flat, cfg, x0, maskable, samples=4, batch_size=16)
    torch.testing.assert_close(
        got, maskable.sum(-1) * math.log(300.0), check_dtype=False, rtol=1e-5, atol=0
    )
    twin = as_ar(cfg)
    model = DiT(twin).eval()
    torch.nn.init.normal_(model.head.weight)
    want = ar(model, x0, maskable, twin).sum(-1)
    got = reversal.costs(model, twin, x0, maskable, samples=1, batch_size=16)
    torch.testing.assert_close(got, want, check_dtype=False)


def test_the_command_trains_both_asks_both_and_writes_the_table(cfg, facts, capsys):
    results = reversal.main(replace(cfg, steps=4), seeds=2, samples=1, most=5)
    assert {name: len(runs) for name, runs in results.items()} == {"mdlm": 2, "ar": 2}
    assert all(
        0 <= run[kind] <= 1
        for runs in results.values()
        for run in runs
        for kind in reversal.QUESTIONS
    )
    table = (Path(cfg.out_dir) / "table.md").read_text().splitlines()
    assert len(table) == 4 and table[3].startswith("| `ar` |") and table[3].count(" %") == 4
    assert table[0] in capsys.readouterr().out
    (facts / "test.jsonl").rename(facts / "kept")
    with pytest.raises(SystemExit) as e:
        reversal.main(cfg, 1, 1, 5)
    (facts / "kept").rename(facts / "test.jsonl")
    assert e.value.code == 2 and "test.jsonl: no such file" in capsys.readouterr().err
