"""tasks.reversal: the questions are those of the files, the nats the models', the table theirs."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import refused, tiny_run

from configs import as_ar
from data.corpus import read_meta
from data.prepare import prepare
from data.tokenizer import load_tokenizer
from diffusion import ar
from model import DiT
from tasks import reversal

FIRST, LAST = ("Ann", "Bob", "Cy"), ("Ash", "Birch", "Cedar", "Dogwood")
PEOPLE = [f"{first} {last}" for first in FIRST for last in LAST]
WHO, WHOSE = ("maker", "thief", "ghost"), ("clocks", "maps", "soup", "rain")
DEEDS = [f"the {who} of {whose}" for who in WHO for whose in WHOSE]


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
    fields = dict(vocab_size=300, bos=True, cond_dim=0, samples=0, out_dir=str(tmp_path / "out"))
    return replace(tiny_run(facts), **fields)


def test_questions_are_rows_as_in_training_with_the_true_answer_first(facts, cfg):
    tokenizer = load_tokenizer(read_meta(str(facts))["tokenizer"])
    path = facts / "test.jsonl"
    x0, maskable, counted, directions = reversal.make_questions(path, tokenizer, cfg, 300)
    assert x0.shape == maskable.shape == counted.shape == (480, 10, 32)
    assert (maskable >= counted).all() and maskable[..., -1].all()  # padding is masked too
    assert all(directions.count(direction) == 120 for direction in reversal.DIRECTIONS)
    items = [json.loads(line) for line in path.read_text().splitlines()]
    for i, direction in enumerate(directions):
        texts = [tokenizer.decode(x[m].tolist()) for x, m in zip(x0[i], counted[i])]
        row = x0[i, 0].tolist()
        whole = tokenizer.decode([t for t in row if t != tokenizer.eos])
        same = [item for item in items if whole == item["prompt"] + texts[0]]
        assert direction in [item["of"] for item in same]
        assert texts[0].strip() in [item["answer"] for item in items] and len(set(texts)) == 10
        # grammar rules no option out: all are answers to the prompt's wording
        if direction in ("p2d", "d2p_reverse"):
            number = whole.split(", ")[1][0]
            assert all(text.startswith(f" {number} ") for text in texts)
        assert row[0] == tokenizer.bos and row[-1] == tokenizer.eos
    few = reversal.make_questions(path, tokenizer, cfg, 3)[3]
    assert [few.count(direction) for direction in reversal.DIRECTIONS] == [3] * 4


def test_the_nats_are_the_models(cfg):
    x0, maskable = torch.randint(0, 300, (40, 32)), torch.rand(40, 32) < 0.3
    maskable[:, 0], maskable[:, 1] = False, True
    flat = DiT(cfg).eval()  # uniform: every token costs log V, whatever is masked
    got = reversal.measure_nats(flat, cfg, x0, maskable, maskable, passes=4, batch_size=16)
    want = maskable.sum(-1).double() * math.log(300.0)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    twin = as_ar(cfg)
    model = DiT(twin).eval()
    torch.nn.init.normal_(model.head.weight)
    want = ar(model, x0, maskable, twin).sum(-1)
    got = reversal.measure_nats(model, twin, x0, maskable, maskable, passes=1, batch_size=16)
    torch.testing.assert_close(got, want, check_dtype=False)


def test_each_number_of_masks_is_as_frequent(cfg, monkeypatch):
    """Eight forwards of four maskable tokens: every row has each number of masks twice."""
    counts = []

    def bound(model, x0, maskable, cfg, count, counted):
        counts.append(count)
        return count.float()

    monkeypatch.setattr(reversal, "exact_count_bound", bound)
    x0, maskable = torch.zeros(5, 32, dtype=torch.long), torch.arange(32).expand(5, 32) < 4
    nats = reversal.measure_nats(None, cfg, x0, maskable, maskable, passes=8)
    assert (torch.stack(counts).sort(0).values.T == torch.tensor([1, 1, 2, 2, 3, 3, 4, 4])).all()
    assert (nats == 2.5).all()


def test_accuracy_counts_questions_whose_true_answer_is_the_cheapest(facts, cfg, monkeypatch):
    """Five questions of each direction, of which 5, 4, 0 and 1 have the true answer in front."""
    right = [True] * 5 + [True] * 4 + [False] * 6 + [True] + [False] * 4
    nats = torch.ones(20, 10)
    nats[:, 0] = torch.where(torch.tensor(right), 0.5, 1.5)
    model = SimpleNamespace(tokenizer=read_meta(str(facts))["tokenizer"])
    monkeypatch.setattr(reversal, "load", lambda *a, **k: (model, cfg))
    monkeypatch.setattr(reversal, "measure_nats", lambda *a: nats.flatten())
    shares = reversal.measure_accuracy(cfg, passes=1, limit=5)
    assert shares == {"p2d": 1, "d2p": 0.8, "d2p_reverse": 0, "p2d_reverse": 0.2}


def test_the_command_trains_both_and_writes_the_table(cfg, facts, capsys):
    fields = [f"--{name}={value}" for name, value in vars(replace(cfg, steps=4)).items()]
    results = reversal.main([*fields, "--seeds=2", "--passes=1", "--questions=5"])
    assert {name: len(runs) for name, runs in results.items()} == {"mdlm": 2, "ar": 2}
    for runs in results.values():
        assert all([*run] == [*reversal.DIRECTIONS] for run in runs)
        assert all(5 * share in range(6) for run in runs for share in run.values())
    table = (Path(cfg.out_dir) / "table.md").read_text()
    assert table in capsys.readouterr().out
    *_, head, _, mdlm, causal = ["", *table.splitlines()]
    assert all(name in head for name in reversal.DIRECTIONS.values())
    assert mdlm.startswith("| `mdlm` |") and mdlm.count(" %") == 4
    assert causal.startswith("| `ar` |") and causal.count(" %") == 4


def test_the_table():
    runs = [dict.fromkeys(reversal.DIRECTIONS, share) for share in (0.25, 0.5, 0.75)]
    row = reversal.make_table({"mdlm": runs}).splitlines()[-1]
    assert row == "| `mdlm` |" + " 50.0 ± 14.4 % |" * 4


@pytest.mark.parametrize("argv, words", [
    (["--seeds=0"], "--seeds 0: must be at least 1"),
    (["--passes=0"], "--passes 0: must be at least 1"),
    (["--questions=0"], "--questions 0: must be at least 1"),
    (["--data=nowhere"], "test.jsonl: no such file; data/prepare.py reversal also needs"),
])  # fmt: skip
def test_bad_arguments(argv, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(capsys, lambda: reversal.main(argv), words)
    assert not any(tmp_path.iterdir())
