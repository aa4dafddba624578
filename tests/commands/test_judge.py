"""Generative perplexity: judges against one prefix at a time, the error bar against scatter, and
the command."""

import json
import math
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CHARACTERS, LETTERS, needs_gpt2, refused, save, tiny_run

import common
from configs import as_ar
from data.checkpoints import load
from data.tokenizer import load_tokenizer
from evaluate import widen
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

WORDS = "the a cat dog saw heard one another".split()


@pytest.fixture(scope="module")
def ar_cfg(corpus):
    return as_ar(tiny_run(corpus))


@pytest.fixture(scope="module")
def checkpoints(corpus, ar_cfg, tmp_path_factory):
    """The paths of an MDLM and of an AR model of characters."""
    folder = tmp_path_factory.mktemp("models")
    return save(folder / "mdlm.pt", tiny_run(corpus)), save(folder / "ar.pt", ar_cfg, seed=1)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(CHARACTERS)


def slow_nats(model, ids):
    """-log p of each of ids under a causal network that reads one prefix after the other."""
    costs = []
    for i in range(len(ids)):
        logits = model(torch.tensor([ids[: i + 1]]), torch.zeros(1))[0, i]
        costs.append(-logits.log_softmax(-1)[ids[i]].item())
    return costs


# --------------------------------------------------------------------------------------------------
# The figures


def test_the_perplexity_weighs_tokens_not_texts():
    """A judge that halves at every letter and quarters at every space: 6 letters and 3 spaces cost
    12 bits."""
    bits = lambda text: sum(2 if c == " " else 1 for c in text)
    score = lambda texts: np.array([(bits(t) * math.log(2), len(t)) for t in texts]).T
    result = generative_perplexity(["abc  ", "ab", "d "], score)
    assert result["tokens"] == 9 and result["gen_ppl"] == pytest.approx(2 ** (12 / 9))
    uniform = lambda texts: np.array([(len(t) * math.log(27), len(t)) for t in texts]).T
    result = generative_perplexity(["a" * n for n in range(1, 20)], uniform)
    assert result["gen_ppl"] == pytest.approx(27) and result["gen_ppl_se"] < 1e-9


def test_the_error_bar_is_honest():
    """2,000 sets of 64 texts with random lengths and nats that depend on each other: the scatter of
    the perplexity is known to 1.6 %; the error, to first order and from 64 texts, is right to a few
    percent more."""
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
    assert unigram_entropy([0, 1, 0, 2]) == pytest.approx(1.5 * math.log(2))  # 1/2, 1/4, 1/4


# --------------------------------------------------------------------------------------------------
# Our AR models as judges


def test_our_judge_against_one_prefix_at_a_time(checkpoints, tokenizer):
    """Texts of every length around the window of 32; every token counts, also the first."""
    model, _ = load(checkpoints[1])
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list(LETTERS), n)) for n in (0, 1, 2, 31, 32, 33, 64, 100)]
    nats, tokens = our_judge(checkpoints[1], "cpu")(texts)
    assert tokens.tolist() == [len(text) for text in texts]
    for text, found in zip(texts, nats):
        windows = [text[i : i + 32] for i in range(0, len(text), 32)]
        want = sum(sum(slow_nats(model, tokenizer.encode(window))) for window in windows)
        assert found == pytest.approx(want, rel=1e-5)
    one, other = our_judge(checkpoints[1], "cpu")([f"ab{END}{END}c{END}", "abc"]).T
    assert one.tolist() == other.tolist()  # characters have no end-of-text


@needs_gpt2
@pytest.mark.parametrize("bos", [False, True])
def test_our_judge_reads_end_of_text(ar_cfg, tmp_path, bos):
    """END is the judge's token. The first one counts; the others do not, but the text after them
    depends on them. With bos=True the row begins with a given one, which the text may lack."""
    cfg = replace(ar_cfg, vocab_size=50257, n_embd=8, n_head=1, n_layer=1, seq_len=12, bos=bos)
    path, eos = save(tmp_path / "ar.pt", cfg, {"kind": "gpt2"}), 50256
    model, tokenizer = load(path)[0], load_tokenizer({"kind": "gpt2"})
    a, b, c = [tokenizer.encode(text) for text in (" one two three", " four", " five six")]
    score = our_judge(path, "cpu")
    cases = [
        (f" one two three{END} four{END}", [*a, eos, *b, eos], [1, 1, 1, 1, 1, 0]),
        (f"{END} four{END}{END} five six", [eos, *b, eos, eos, *c], [not bos, 1, 0, 0, 1, 1]),
    ]
    for text, ids, counted in cases:
        row = ids if not bos or ids[0] == eos else [eos, *ids]
        costs = np.array(slow_nats(model, row)[len(row) - len(ids) :])
        nats, tokens = score([text])
        assert tokens[0] == sum(counted)
        assert nats[0] == pytest.approx(costs[np.array(counted, bool)].sum(), rel=1e-5)


@needs_gpt2
def test_the_text_of_a_row_spells_out_its_ends(tokenizer):
    gpt2 = load_tokenizer({"kind": "gpt2"})
    ids = [50256, *gpt2.encode("One."), 50256, 50256, *gpt2.encode("Two…")]
    assert join_text(ids, gpt2) == f"{END}One.{END}{END}Two…" == gpt2.decode(ids)
    spec = {"kind": "wordpiece", "vocab": "[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n##b\nc\n"}
    words = load_tokenizer(spec)
    assert join_text([2, 4, 5, 6, 3, 4], words) == f"{END}ab c{END}a"
    assert join_text([], words) == "" and join_text([1, 2], tokenizer) == "ab"


# --------------------------------------------------------------------------------------------------
# Models of transformers as judges


@pytest.fixture(scope="module", params=["GPT-2's way", "with a start symbol"])
def folder(request, tmp_path_factory):
    """(path, start ids) of a tiny random GPT-2 of eight words with a context of 16. Its tokenizer
    adds <s> in front or, as GPT-2's, nothing."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    path, names = tmp_path_factory.mktemp("judge"), [END, "<s>", *WORDS]
    with_start = "start" in request.param
    model = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="a"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if with_start:
        model.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token=END, bos_token="<s>"
    )
    fast.save_pretrained(path)
    torch.manual_seed(1)
    cfg = transformers.GPT2Config(
        vocab_size=len(names), n_positions=16, n_embd=16, n_layer=2, n_head=2,
        initializer_range=0.5, bos_token_id=1, eos_token_id=0,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(cfg).save_pretrained(path)
    return path, [1] if with_start else []


def test_transformers_judge_against_one_prefix_at_a_time(folder):
    """Without a start symbol the first token is given. What exceeds the context of 16 is not
    read."""
    from transformers import AutoModelForCausalLM

    path, start = folder
    model, rng = AutoModelForCausalLM.from_pretrained(path), np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, n)) for n in (0, 1, 2, 15, 16, 17, 40)]
    texts += [f"the cat{END}a dog{END}saw", END, f"{END}the", f"the{END}{END}"]
    nats, tokens = transformers_judge(str(path), "cpu")(texts)
    for text, found, n in zip(texts, nats, tokens):
        ids = [[END, "<s>", *WORDS].index(w) for w in text.replace(END, f" {END} ").split()]
        row, want = [*start, *ids][:16], []
        for i in range(1, len(row)):
            with torch.no_grad():
                log_p = model(torch.tensor([row[:i]])).logits[0, -1].log_softmax(-1)
            if row[i] != 0 or 0 not in row[:i]:  # the first END counts
                want.append(-log_p[row[i]].item())
        assert n == len(want) and found == pytest.approx(sum(want), rel=1e-5)


# --------------------------------------------------------------------------------------------------
# The command


def run(capsys, *args):
    judge_task.main([str(a) for a in args])
    return capsys.readouterr().out


def result_of(capsys, *args):
    return json.loads(run(capsys, *args, "--json"))


SETTINGS = ["--num", 9, "--steps", 5, "--seed", 3, "--top_p", 0.9]


def test_the_command_equals_its_parts(checkpoints, tokenizer, capsys):
    """The samples of sample.py, the judge's nats and the entropy of the samples' tokens."""
    out = result_of(capsys, *checkpoints, *SETTINGS)
    model, cfg = load(checkpoints[0])
    texts = generate(model, tokenizer, cfg, 9, steps=5, seed=3, top_p=0.9)
    judge = load(checkpoints[1])[0]
    costs = [slow_nats(judge, tokenizer.encode(text)) for text in texts]
    error = lambda values: np.std(values, ddof=1) / 3 * widen(8)  # of nine texts
    assert out["tokens"] == 9 * 32 and out["samples"] == 9
    assert out["tokens_per_sample"] == out["length"] == 32
    assert out["gen_ppl"] == pytest.approx(math.exp(np.mean(costs)), rel=1e-5)
    assert out["nats"] == pytest.approx(np.mean(costs), rel=1e-5)
    assert out["gen_ppl_se"] == pytest.approx(out["gen_ppl"] * error(np.mean(costs, 1)), rel=1e-4)
    entropies = [unigram_entropy(tokenizer.encode(text)) for text in texts]
    assert out["entropy"] == pytest.approx(np.mean(entropies))
    assert out["entropy_se"] == pytest.approx(error(entropies))


def test_the_command_reports_its_settings(checkpoints, capsys):
    out = result_of(capsys, *checkpoints, *SETTINGS)
    known = dict(
        judge=str(checkpoints[1]), ckpt=str(checkpoints[0]), step=7, ema=True, dtype="float32",
        draws="float64", sampler="ddpm_cache", steps=5, temperature=1.0, top_p=0.9, seed=3,
    )  # fmt: skip
    assert {key: out[key] for key in known} == known
    assert result_of(capsys, *checkpoints, *SETTINGS, "--batch_size", 2) == out
    text = run(capsys, *checkpoints, *SETTINGS)
    assert re.search(r"generative perplexity \d+\.\d{3} ± \d+\.\d{3} under .*ar\.pt\n", text)
    assert re.search(r"unigram entropy +\d\.\d{3} ± 0\.\d{3} nats, at most 3\.466\n", text)
    assert "9 samples of 32 tokens, 32.0 each by the judge's tokenizer" in text
    assert "; ddpm_cache, 5 steps, temperature 1, top_p 0.9" in text
    assert "network in float32, draws in float64" in text


def test_an_ar_model_judges_itself(checkpoints, tokenizer, capsys):
    """Its samples cost, on average, their exact conditional entropies; the mean of both over
    samples has the same expectation."""
    path = checkpoints[1]
    out = result_of(capsys, path, path, "--num", 128)
    assert out["sampler"] == "ar" and out["steps"] is None
    model, cfg = load(path)
    rows = generate(model, tokenizer._replace(decode=list), cfg, 128)
    log_p = model(torch.tensor(rows), torch.zeros(128)).double().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).mean().item()
    assert abs(out["nats"] - entropy) < 4 * out["se"] and out["se"] < 0.05
    cold = result_of(capsys, path, path, "--num", 8, "--temperature", 0.5)
    assert cold["nats"] < out["nats"] and cold["entropy"] < out["entropy"]  # less diverse
    assert "; ar, per_call 1, " in run(capsys, path, path, "--num", 1)


def test_the_options_of_a_sampler_reach_it_and_are_reported(checkpoints, tokenizer, capsys):
    command = [*checkpoints, "--sampler", "threshold", "--num", 8, "--seed", 1]
    all_at_once, default = (result_of(capsys, *command, "--threshold", value) for value in (0, 0.9))
    assert all_at_once["threshold"] == 0 and all_at_once["steps"] is None
    assert result_of(capsys, *command)["nats"] == default["nats"]
    assert "; threshold, threshold 0.9, temperature 1" in run(capsys, *command)
    model, cfg = load(checkpoints[0])
    options = dict(sampler="threshold", sampler_options={"threshold": 0.0}, seed=1, steps=1)
    rows = generate(model, tokenizer._replace(decode=list), cfg, 8, **options)
    assert all_at_once["entropy"] == pytest.approx(np.mean([unigram_entropy(ids) for ids in rows]))
    remdm = ["--sampler", "remdm_cap", "--steps", 3, "--num", 1]
    shown = run(capsys, *checkpoints, *remdm)
    assert "; remdm_cap, eta 0.008, 3 steps, temperature 1" in shown


def test_the_command_with_a_judge_of_transformers(checkpoints, folder, tokenizer, capsys):
    """Its tokenizer reads every word here as "a": it counts the text's words."""
    model, cfg = load(checkpoints[0])
    texts = generate(model, tokenizer, cfg, 2, steps=5)
    path, start = folder
    out = result_of(capsys, checkpoints[0], path, "--num", 2, "--steps", 5)
    assert out["tokens"] == sum(min(len(t.split()), 16 - len(start)) - (not start) for t in texts)
    assert math.isfinite(out["gen_ppl"]) and out["gen_ppl_se"] is None


def judge_by(checkpoints, name):
    return lambda: judge_task.main([str(checkpoints[0]), str(name), "--num", "1", "--steps", "2"])


def test_a_judge_of_another_alphabet_is_refused(checkpoints, ar_cfg, tmp_path, capsys):
    capitals = {"kind": "char", "characters": LETTERS.upper()}
    path = save(tmp_path / "capitals.pt", ar_cfg, capitals)
    words = "capitals.pt", "cannot read", "not in the vocabulary"
    refused(capsys, judge_by(checkpoints, path), *words)


def test_a_judge_of_the_hub_needs_transformers(checkpoints, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    words = "gpt2-large", "pip install transformers"
    refused(capsys, judge_by(checkpoints, "gpt2-large"), *words)


def test_an_empty_folder_is_no_judge(checkpoints, tmp_path, capsys):
    pytest.importorskip("transformers")
    (tmp_path / "empty").mkdir()
    refused(capsys, judge_by(checkpoints, tmp_path / "empty"), "judge", "empty")


def test_an_ar_model_has_one_sampler(checkpoints, capsys):
    args = [str(checkpoints[1]), str(checkpoints[1]), "--sampler", "ddpm"]
    refused(capsys, lambda: judge_task.main(args), "--sampler ddpm", "--sampler ar")
