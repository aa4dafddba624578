"""Generative perplexity: judges against one prefix at a time, the error bar against scatter, and the command."""

import json
import math
import os
import re
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import LETTERS, tiny_run
from test_cli import refused

import common
import evaluate
from common import KIND
from data.tokenizer import load_tokenizer
from model import DiT, load
from sample import generate
from tasks import judge as judge_task
from tasks.judge import (
    END,
    generative_perplexity,
    join_text,
    our_judge,
    transformers_judge,
    unigram_entropy,
)

needs_gpt2 = pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ, reason="no GPT-2 vocabulary"
)
CHARACTERS = {"kind": "char", "characters": LETTERS}
WORDS = "the a cat dog saw heard one another".split()


def save(path, cfg, tokenizer=CHARACTERS, seed=0):
    """A checkpoint whose weights are all random and large: nothing in it is nearly uniform."""
    generator, model = torch.Generator().manual_seed(seed), DiT(cfg)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4, generator=generator)
    weights = model.state_dict()
    state = dict(
        kind=KIND, model=weights, ema=weights, config=asdict(cfg), tokenizer=tokenizer, step=7
    )
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def ar_cfg(corpus):
    return replace(tiny_run(corpus), loss="ar", causal=True, cond_dim=0)


@pytest.fixture(scope="module")
def checkpoints(corpus, ar_cfg, tmp_path_factory):
    """The paths of an MDLM and of an AR model of characters."""
    folder = tmp_path_factory.mktemp("models")
    return save(folder / "mdlm.pt", tiny_run(corpus)), save(folder / "ar.pt", ar_cfg, seed=1)


def slow_nats(model, ids):
    """-log p of each of ids under a causal network, which is shown one prefix after the other."""
    costs = []
    for i in range(len(ids)):
        logits = model(torch.tensor([ids[: i + 1]]), torch.zeros(1))[0, i]
        costs.append(-logits.log_softmax(-1)[ids[i]].item())
    return costs


# ---------------------------------------------------------------------------------------------------------
# The figures


def test_the_perplexity_weighs_tokens_not_texts():
    """A judge that halves at every letter and quarters at every space: 6 letters and 3 spaces, 12 bits."""
    bits = lambda text: sum(2 if c == " " else 1 for c in text)
    score = lambda texts: (
        np.array([bits(t) * math.log(2) for t in texts]),
        np.array([len(t) for t in texts]),
    )
    result = generative_perplexity(["abc  ", "ab", "d "], score)
    assert result["tokens"] == 9 and result["gen_ppl"] == pytest.approx(2 ** (12 / 9))
    uniform = lambda texts: (
        np.array([len(t) * math.log(27) for t in texts]),
        np.array([*map(len, texts)]),
    )
    result = generative_perplexity(["a" * n for n in range(1, 20)], uniform)
    assert result["gen_ppl"] == pytest.approx(27) and result["gen_ppl_se"] < 1e-9


def test_the_error_bar_is_honest():
    """2,000 sets of 64 texts whose lengths and nats are random and depend on each other: the
    scatter of the perplexity is known to 1.6 %; the error, to first order and from 64 texts, is
    right to a few percent more."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(2000):
        tokens = rng.integers(1, 100, 64)
        nats = tokens * (3 + 0.5 * rng.standard_normal(64) + tokens / 100)
        result = generative_perplexity((nats, tokens), lambda texts: texts)
        found.append((result["gen_ppl"], result["gen_ppl_se"]))
    perplexity, error = np.array(found).T
    assert 0.93 < np.sqrt((error**2).mean()) / perplexity.std() < 1.07


def test_too_little_text_has_no_figure_and_no_error():
    few = generative_perplexity(["a"] * 7, lambda texts: (np.ones(7), np.arange(1, 8)))
    assert math.isfinite(few["gen_ppl"]) and math.isnan(few["gen_ppl_se"])
    nothing = generative_perplexity([""], lambda texts: (np.zeros(1), np.zeros(1)))
    assert nothing["tokens"] == 0 and math.isnan(nothing["gen_ppl"])
    assert json.loads(common.to_json(nothing))["gen_ppl"] is None


def test_unigram_entropy():
    assert unigram_entropy([5] * 32) == 0 and unigram_entropy([3]) == 0
    assert unigram_entropy(list(range(1024))) == pytest.approx(math.log(1024))
    assert unigram_entropy([0, 1, 0, 2]) == pytest.approx(
        1.5 * math.log(2)
    )  # halves, quarters: 1.5 bits


# ---------------------------------------------------------------------------------------------------------
# Our AR models as judges


def test_our_judge_against_one_prefix_at_a_time(checkpoints):
    """Texts of every length around the window of 32, in which every token counts, the first from nothing."""
    model, _ = load(checkpoints[1])
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list(LETTERS), n)) for n in (0, 1, 2, 31, 32, 33, 64, 100)]
    nats, tokens = our_judge(checkpoints[1], "cpu")(texts)
    assert tokens.tolist() == [len(text) for text in texts]
    encode = load_tokenizer(CHARACTERS).encode
    for text, found in zip(texts, nats):
        want = [
            x for i in range(0, len(text), 32) for x in slow_nats(model, encode(text[i : i + 32]))
        ]
        assert found == pytest.approx(sum(want), rel=1e-5)
    one, other = our_judge(checkpoints[1], "cpu")([f"ab{END}{END}c{END}", "abc"]).T
    assert one.tolist() == other.tolist()  # it has no end-of-text: nothing to read there


@needs_gpt2
@pytest.mark.parametrize("bos", [False, True])
def test_our_judge_reads_end_of_text(ar_cfg, tmp_path, bos):
    """END is the judge's own token; the first one counts, the others do not, but for the
    text after them they are there. With bos=True the row begins with one that is given,
    whether or not the text had it."""
    cfg, eos = (
        replace(ar_cfg, vocab_size=50257, n_embd=8, n_head=1, n_layer=1, seq_len=12, bos=bos),
        50256,
    )
    path = save(tmp_path / "ar.pt", cfg, {"kind": "gpt2"})
    model, tokenizer = load(path)[0], load_tokenizer({"kind": "gpt2"})
    a, b, c = [tokenizer.encode(text) for text in (" one two three", " four", " five six")]
    score = our_judge(path, "cpu")
    cases = [
        (f" one two three{END} four{END}", [*a, eos, *b, eos], [1, 1, 1, 1, 1, 0]),
        (f"{END} four{END}{END} five six", [eos, *b, eos, eos, *c], [not bos, 1, 0, 0, 1, 1]),
    ]
    for text, ids, counted in cases:
        seen = ids if not bos or ids[0] == eos else [eos, *ids]
        want = np.array(slow_nats(model, seen)[len(seen) - len(ids) :])
        nats, tokens = score([text])
        assert tokens[0] == sum(counted)
        assert nats[0] == pytest.approx(want[np.array(counted, bool)].sum(), rel=1e-5)


@needs_gpt2
def test_text_of_a_row():
    gpt2 = load_tokenizer({"kind": "gpt2"})
    ids = [50256, *gpt2.encode("One."), 50256, 50256, *gpt2.encode("Two…")]
    assert join_text(ids, gpt2) == f"{END}One.{END}{END}Two…" == gpt2.decode(ids)
    words = load_tokenizer(
        {"kind": "wordpiece", "vocab": "[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n##b\nc\n"}
    )
    assert join_text([2, 4, 5, 6, 3, 4], words) == f"{END}ab c{END}a"
    assert join_text([], words) == "" and join_text([1, 2], load_tokenizer(CHARACTERS)) == "ab"


# ---------------------------------------------------------------------------------------------------------
# Models of transformers as judges


@pytest.fixture(scope="module", params=["GPT-2's way", "with a start symbol"])
def folder(request, tmp_path_factory):
    """A tiny random GPT-2 of eight words, context 16, saved with a tokenizer that adds <s> or, as GPT-2's, nothing."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    path, names = tmp_path_factory.mktemp("judge"), [END, "<s>", *WORDS]
    model = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="a"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if "start" in request.param:
        model.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token=END, bos_token="<s>"
    )
    fast.save_pretrained(path)
    torch.manual_seed(1)
    cfg = transformers.GPT2Config(
        vocab_size=len(names), n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5,
        bos_token_id=1, eos_token_id=0,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(cfg).save_pretrained(path)
    return path, [1] if "start" in request.param else []


def test_transformers_judge_against_one_prefix_at_a_time(folder):
    """Without a start symbol the first token is given. What exceeds the context of 16 is not read."""
    from transformers import AutoModelForCausalLM

    path, start = folder
    model, rng = AutoModelForCausalLM.from_pretrained(path), np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, n)) for n in (0, 1, 2, 15, 16, 17, 40)]
    texts += [f"the cat{END}a dog{END}saw", END, f"{END}the", f"the{END}{END}"]
    nats, tokens = transformers_judge(str(path), "cpu")(texts)
    for text, found, n in zip(texts, nats, tokens):
        ids = [([END, "<s>", *WORDS]).index(w) for w in text.replace(END, f" {END} ").split()]
        row, want = [*start, *ids][:16], []
        for i in range(1, len(row)):
            with torch.no_grad():
                cost = -model(torch.tensor([row[:i]])).logits[0, -1].log_softmax(-1)[row[i]].item()
            want += [cost] if row[i] != 0 or 0 not in row[:i] else []
        assert n == len(want) and found == pytest.approx(sum(want), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------
# The command


def run(capsys, *args):
    judge_task.main([str(a) for a in args])
    return capsys.readouterr().out


def test_the_command_against_its_parts(checkpoints, capsys):
    """The samples of sample.py, the judge's nats and the entropy of the samples' own tokens."""
    model_path, judge_path = checkpoints
    args = [
        model_path,
        judge_path,
        "--num",
        9,
        "--steps",
        5,
        "--seed",
        3,
        "--top_p",
        0.9,
    ]
    out = json.loads(run(capsys, *args, "--json"))
    model, cfg = load(model_path)
    texts = generate(model, load_tokenizer(CHARACTERS), cfg, 9, steps=5, seed=3, top_p=0.9)
    judge, encode = load(judge_path)[0], load_tokenizer(CHARACTERS).encode
    costs = [slow_nats(judge, encode(text)) for text in texts]
    assert (
        out["tokens"] == 9 * 32
        and out["tokens_per_sample"] == out["length"] == 32
        and out["samples"] == 9
    )
    assert out["gen_ppl"] == pytest.approx(math.exp(np.mean(costs)), rel=1e-5)
    assert out["nats"] == pytest.approx(np.mean(costs), rel=1e-5)
    assert out["gen_ppl_se"] == pytest.approx(
        out["gen_ppl"] * np.mean(costs, 1).std(ddof=1) / 3 * evaluate.widen(8), rel=1e-4
    )
    entropies = [unigram_entropy(encode(text)) for text in texts]
    assert out["entropy"] == pytest.approx(np.mean(entropies))
    assert out["entropy_se"] == pytest.approx(np.std(entropies, ddof=1) / 3 * evaluate.widen(8))
    known = dict(
        judge=str(judge_path), sampler="ddpm_cache", steps=5, temperature=1.0, top_p=0.9, seed=3
    )
    known |= dict(dtype="float32", draws="float64", ckpt=str(model_path), step=7, ema=True)
    assert {key: out[key] for key in known} == known
    assert json.loads(run(capsys, *args, "--json", "--batch_size", 2)) == out
    text = run(capsys, *args)
    assert re.search(r"generative perplexity \d+\.\d{3} ± \d+\.\d{3} under .*ar\.pt\n", text)
    assert re.search(r"unigram entropy +\d\.\d{3} ± 0\.\d{3} nats, at most 3\.466\n", text)
    assert (
        "9 samples of 32 tokens, 32.0 each by the judge's tokenizer; ddpm_cache, 5 steps, temperature 1, top_p 0.9"
        in text
    )
    assert "network in float32, draws in float64" in text


def test_an_ar_model_judges_itself(checkpoints, capsys):
    """Its own samples cost, on average, the entropy of what it says: the mean over samples of the
    exact conditional entropies, which has the same expectation."""
    path = checkpoints[1]
    out = json.loads(run(capsys, path, path, "--num", 128, "--json"))
    assert out["sampler"] == "ar" and out["steps"] is None
    model, cfg = load(path)
    rows = generate(model, load_tokenizer(CHARACTERS)._replace(decode=list), cfg, 128)
    log_p = model(torch.tensor(rows), torch.zeros(128)).double().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).mean().item()
    assert abs(out["nats"] - entropy) < 4 * out["se"] and out["se"] < 0.05
    cold = json.loads(run(capsys, path, path, "--num", 8, "--temperature", 0.5, "--json"))
    assert (
        cold["nats"] < out["nats"] and cold["entropy"] < out["entropy"]
    )  # flattered, and less diverse
    assert "; ar, a token per call, " in run(capsys, path, path, "--num", 1)


def test_the_options_of_a_sampler_reach_it_and_are_told(checkpoints, capsys):
    ckpt, judge = checkpoints
    args = [ckpt, judge, "--sampler", "threshold", "--num", 8, "--seed", 1]
    told = {t: json.loads(run(capsys, *args, "--threshold", t, "--json")) for t in (0, 0.9)}
    assert told[0]["threshold"] == 0 and told[0]["steps"] is None
    assert json.loads(run(capsys, *args, "--json"))["nats"] == told[0.9]["nats"]  # the default
    assert "; threshold, threshold 0.9, temperature 1" in run(capsys, *args)
    model, cfg = load(ckpt)
    rows = generate(
        model, load_tokenizer(CHARACTERS)._replace(decode=list), cfg, 8, sampler="threshold", sampler_options={"threshold": 0.0}, seed=1,
        steps=1,
    )  # fmt: skip
    assert told[0]["entropy"] == pytest.approx(
        np.mean([judge_task.unigram_entropy(ids) for ids in rows])
    )
    args = [ckpt, judge, "--sampler", "remdm_cap", "--steps", 3, "--num", 1]
    assert "; remdm_cap, eta 0.008, 3 steps, temperature 1" in run(capsys, *args)


def test_the_command_with_a_judge_of_transformers(checkpoints, folder, capsys):
    """Its tokenizer knows a single "a" for every word here: the text's words are what is counted."""
    model, cfg = load(checkpoints[0])
    texts = generate(model, load_tokenizer(CHARACTERS), cfg, 2, steps=5)
    path, start = folder
    out = json.loads(run(capsys, checkpoints[0], path, "--num", 2, "--steps", 5, "--json"))
    assert out["tokens"] == sum(min(len(t.split()), 16 - len(start)) - (not start) for t in texts)
    assert math.isfinite(out["gen_ppl"]) and out["gen_ppl_se"] is None


def test_bad_judges(checkpoints, ar_cfg, tmp_path, capsys, monkeypatch):
    model, judge = map(str, checkpoints)
    refuse = lambda *args: lambda: judge_task.main([model, *args, "--num", "1", "--steps", "2"])
    refused(capsys, refuse(model), "AR", "loss=mdlm", "mdlm.pt")
    refused(capsys, refuse("nowhere.pt"), "nowhere.pt", "no such checkpoint")
    capitals = save(
        tmp_path / "capitals.pt", ar_cfg, {"kind": "char", "characters": LETTERS.upper()}
    )
    refused(
        capsys,
        refuse(str(capitals)),
        "capitals.pt",
        "cannot read",
        "not in the vocabulary",
    )
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        refused(capsys, refuse("gpt2-large"), "gpt2-large", "pip install transformers")
    pytest.importorskip("transformers")
    (tmp_path / "empty").mkdir()
    refused(capsys, refuse(str(tmp_path / "empty")), "judge", "empty")


@pytest.mark.parametrize(
    "args, words",
    [
        (["--num", "0"], ["--num 0", "at least 1"]),
        (["--top_p", "0"], ["--top_p 0", "above 0"]),
        (["--temperature", "nan"], ["--temperature"]),
        (["--sampler", "magic"], ["magic", "ddpm_cache"]),
        (["--eta", "0.1"], ["--eta 0.1", "remdm_cap", "not of ddpm_cache"]),
    ],
)
def test_bad_arguments(checkpoints, capsys, args, words):
    refused(capsys, lambda: judge_task.main([str(checkpoints[0]), "x.pt", *args]), *words)


def test_evaluate_says_where_generative_perplexity_went(capsys):
    moved = "python -m tasks.judge ckpt.pt gpt2-large"
    refused(capsys, lambda: evaluate.main(["ckpt.pt", "--gen_ppl", "gpt2-large"]), moved)
    more = ["--num", "5", "--sampler", "ddpm"]  # options that moved with it
    refused(capsys, lambda: evaluate.main(["ckpt.pt", "--gen_ppl", "gpt2-large", *more]), moved)


def test_an_ar_model_has_one_sampler(checkpoints, capsys):
    args = [str(checkpoints[1]), str(checkpoints[1]), "--sampler", "ddpm"]
    refused(capsys, lambda: judge_task.main(args), "--sampler ddpm", "--sampler ar")
