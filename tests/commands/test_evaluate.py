"""The evaluate command: whole splits, every kind of model, zero-shot sets, and resuming after a
kill. theory/test_bound.py tests the estimator."""

import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, make_corpus, needs_gpt2, refused, save, tiny_run
from llama import DOCS, OURS, TEXT, slow_ids, write_parquet

import evaluate
import train
from configs import as_ar, as_d3pm, as_sedd
from data import pretrain
from data.checkpoints import load
from data.corpus import read_meta, read_split
from data.prepare import prepare
from data.tokenizer import LLAMA
from diffusion import mdlm
from evaluate import bound
from tasks import zero_shot
from tasks.orders import row_nats

GPT2 = {"kind": "gpt2"}


def run(capsys, *args):
    """What the command prints."""
    capsys.readouterr()
    evaluate.main([str(a) for a in args])
    return capsys.readouterr().out


def result_of(capsys, *args):
    return json.loads(run(capsys, *args, "--json"))


def gpt2_model(path, change=lambda cfg: cfg):
    """A checkpoint of a small random network on GPT-2's vocabulary, for rows of 16 tokens."""
    small = dict(vocab_size=50257, n_embd=8, n_head=1, n_layer=1, seq_len=16)
    return save(path, change(replace(tiny_run("nowhere"), **small)), GPT2)


# --------------------------------------------------------------------------------------------------
# One split


def test_the_command_reports_the_whole_split(checkpoint, corpus, capsys):
    out = result_of(capsys, checkpoint, "--split", "val")
    model, cfg = load(checkpoint)
    ids, meta = read_split(str(corpus), "val", cfg)
    assert out["tokens"] == len(ids) == meta["splits"]["val"]["tokens"] and out["split"] == "val"
    direct = bound(model, ids, {}, cfg, "val", batch_size=32)
    assert out["nats"] == pytest.approx(direct["nats"], rel=1e-6)
    assert out["bits_per_char"] == pytest.approx(out["nats"] / math.log(2))  # a token a character
    assert out["perplexity"] == pytest.approx(math.exp(out["nats"]))
    assert out["perplexity_se"] == pytest.approx(math.exp(out["nats"]) * out["se"])
    text = run(capsys, checkpoint)
    assert re.search(r"bits per char +<= \d\.\d{4} ± 0\.\d{4}\n", text) and "test split" in text


def test_an_order_is_exact_and_the_same_for_every_batch_size(checkpoint, corpus, capsys, tmp_path):
    get = lambda *args: result_of(capsys, checkpoint, "--split", "val", *args)
    model, cfg = load(checkpoint)
    ids = torch.from_numpy(np.asarray(read_split(str(corpus), "val", cfg)[0][:800], np.int64))
    x0 = ids[: 25 * 32].view(25, 32)
    order = get("--order", "margin", "--per_call", 3)
    assert get("--order", "margin", "--per_call", 3, "--batch_size", 7)["nats"] == pytest.approx(
        order["nats"], rel=1e-5
    )
    assert order["T"] == 0 and order["se"] > 0
    want, _ = row_nats(model, x0, x0 >= 0, x0 >= 0, cfg, dict(sampler="margin", per_call=3))
    assert order["tokens"] == 800 and order["nats"] == pytest.approx(
        want.sum().item() / 800, rel=1e-5
    )
    assert get("--order", "margin")["nats"] != order["nats"] != get()["nats"]
    text = run(capsys, checkpoint, "--order", "margin", "--per_call", 3)
    assert "bits per char   =  " in text and "exact for the order margin, per_call 3" in text
    shutil.copy(checkpoint, tmp_path / "ckpt.pt")  # an interrupted order is no interrupted bound
    again = lambda *args: result_of(
        capsys, tmp_path / "ckpt.pt", "--split", "val", "--resume", *args
    )
    assert again("--order", "ar")["nats"] != again()["nats"] == pytest.approx(get()["nats"])


def test_an_ar_model_needs_no_order(corpus, capsys, tmp_path):
    path = save(tmp_path / "ar.pt", as_ar(tiny_run(corpus)))
    refused(capsys, lambda: evaluate.main([str(path), "--order", "ar"]), "--order ar", "AR model")


def test_every_option_reaches_the_bound(checkpoint, corpus, capsys):
    get = lambda *args: result_of(capsys, checkpoint, "--dtype", "float32", *args)
    base = get()
    assert get() == base and get("--seed", 1)["nats"] != base["nats"]
    assert get("--batch_size", 5)["nats"] == pytest.approx(base["nats"], rel=1e-6)
    assert get("--no_ema")["nats"] != base["nats"] and get("--data", corpus)["nats"] == base["nats"]
    many = get("--passes", 8)
    assert many["forwards"] == 8 * base["forwards"] and many["se"] < base["se"]
    assert abs(many["nats"] - base["nats"]) < 4 * base["se"]
    one, hundred = get("--T", 1, "--passes", 4), get("--T", 100, "--passes", 4)
    assert one["nats"] > hundred["nats"] > many["nats"] - 4 * many["se"]  # fewer steps cost more
    assert base["dtype"] == "float32" and base["step"] == 100 and base["T"] == 0


def test_windows_are_a_part_of_the_split(checkpoint, corpus, capsys):
    out = result_of(capsys, checkpoint, "--windows", 9)
    model, cfg = load(checkpoint)
    ids, meta = read_split(str(corpus), "test", cfg)
    want = bound(model, ids, meta, cfg, "test", windows=9, batch_size=32)
    assert out["forwards"] == out["windows"] == 9 and out["tokens"] < len(ids)
    assert out["nats"] == pytest.approx(want["nats"], rel=1e-6)
    assert result_of(capsys, checkpoint)["windows"] == 0
    argv = [str(checkpoint), "--windows", "-1"]
    refused(capsys, lambda: evaluate.main(argv), "--windows -1", "at least 0")


def test_kl_and_reconstruction_apart(checkpoint, corpus, capsys):
    """Of the bound in 4 steps, step 1 is the reconstruction: a quarter of the tokens masked, each
    at the cost of its nats. Both parts add up to the bound."""
    out = result_of(capsys, checkpoint, "--T", 4, "--parts", "--passes", 8)
    whole = result_of(capsys, checkpoint, "--T", 4, "--passes", 8)
    assert out["kl"] + out["reconstruction"] == pytest.approx(out["bits_per_token"])
    assert abs(out["nats"] - whole["nats"]) < 4 * math.hypot(out["se"], whole["se"])
    assert out["forwards"] == 2 * whole["forwards"]
    model, cfg = load(checkpoint)
    ids, _ = read_split(str(corpus), "test", cfg)
    x0 = torch.from_numpy(ids[: len(ids) // 32 * 32].astype(np.int64)).view(-1, 32).repeat(8, 1)
    t, every = torch.full((len(x0),), 0.25), torch.ones_like(x0, dtype=torch.bool)
    nats = mdlm(model, x0, every, replace(cfg, T=4), t) / 4  # of its 4 steps, this one
    found, error = nats.mean().item() / math.log(2), nats.mean(1).std().item() / len(x0) ** 0.5
    assert abs(out["reconstruction"] - found) < 4 * (out["reconstruction_se"] + error)
    text = run(capsys, checkpoint, "--T", 4, "--parts")
    assert re.search(r"kl +<= \d\.\d{4} ± \d\.\d{4} bits per token\nreconstruction +<= \d\.", text)
    for more in (["--parts"], ["--parts", "--T", "4", "--resume"]):
        argv = [str(checkpoint), *more]
        refused(capsys, lambda argv=argv: evaluate.main(argv), "--parts: needs --T above 0")


KINDS = {  # name: (change of the config, the --T with a bound, {--T without one: the reason})
    "mdlm": (lambda cfg: cfg, (0, 1, 50), {}),
    "mdlm in steps": (lambda cfg: replace(cfg, T=20, schedule="cosine"), (0, 20), {}),
    "sedd": (as_sedd, (0, 50), {}),
    "d3pm": (
        lambda cfg: replace(cfg, loss="d3pm", T=20, aux_ce=0.1, time_cond=True), (0, 20, 50), {}
    ),
    "d3pm with MASK": (as_d3pm, (1, 1000), {0: "zero_masking=False"}),
    "ar": (as_ar, (0,), {5: "no diffusion steps"}),
    "ar with BOS": (lambda cfg: replace(as_ar(cfg), bos=True), (0,), {5: "no diffusion steps"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_in_steps_and_in_continuous_time(kind, corpus, tmp_path, capsys):
    """--T reaches the bound, the default is the model's T, and a T without a bound is refused."""
    change, Ts, refusals = KINDS[kind]
    path = save(tmp_path / "ckpt.pt", change(tiny_run(corpus)))
    model, cfg = load(path)
    ids, meta = read_split(str(corpus), "test", cfg)
    for T in (None, *Ts):
        out = result_of(capsys, path, *([] if T is None else ["--T", T]))
        assert out["T"] == (cfg.T if T is None else T)
        want = bound(model, ids, meta, cfg, "test", out["T"], batch_size=32)
        assert out["nats"] == pytest.approx(want["nats"], rel=1e-6) and out["nats"] > 0
        assert out["tokens"] == len(ids) - (len(ids) + 31) // 32 * cfg.bos
    for T, word in refusals.items():
        refused(capsys, lambda T=T: evaluate.main([str(path), "--T", str(T)]), f"--T {T}", word)
    in_time = f"bound in {cfg.T} steps" if cfg.T else "bound in continuous time"
    text = run(capsys, path)
    assert f", {'exact' if cfg.causal else in_time}, " in text
    assert ("perplexity      = " in text) == cfg.causal


# --------------------------------------------------------------------------------------------------
# Zero-shot sets


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """Texts of two zero-shot sets where the others would be downloaded; yields the
    names as they are prepared."""
    monkeypatch.setattr("data.corpus.ROOT", tmp_path)
    prepared = []
    texts = {"ptb": " mr. <unk> is N years old \n", "wikitext2": " = Title = \n some text \n"}
    for name, line in texts.items():
        (tmp_path / f"{name}.txt").write_text(line * 20)

    def prepare_from_file(name, **options):
        prepared.append((name, options))
        return prepare(name, input=[str(tmp_path / f"{name}.txt")], **options)

    monkeypatch.setattr("tasks.zero_shot.prepare", prepare_from_file)
    return prepared


@needs_gpt2
def test_zero_shot_figures_are_the_bounds_on_the_sets(tmp_path, sets, capsys):
    """Missing sets are prepared for the model's length, once."""
    path, names = gpt2_model(tmp_path / "mdlm.pt"), ["ptb", "wikitext2"]
    out = result_of(capsys, path, "--zero_shot", *names)
    assert sets == [("ptb", {"wrap": 16}), ("wikitext2", {"wrap": 16})]
    assert list(out["sets"]) == names and out["T"] == 0 and out["ckpt"] == str(path)
    model, cfg = load(path)
    for name, result in out["sets"].items():
        assert result["data"] == f"{name}_wrap16"
        ids, meta = read_split(result["data"], "test", cfg)
        assert result["tokens"] == len(ids) and meta["wrap"] == 16 and len(ids) % 16 == 0
        want = bound(model, ids, meta, cfg, name, batch_size=32)
        assert result["nats"] == pytest.approx(want["nats"], rel=1e-6)
        assert result["perplexity"] == pytest.approx(math.exp(want["nats"]), rel=1e-5)
        assert result["bits_per_token"] == pytest.approx(want["nats"] / math.log(2), rel=1e-6)
    stepped = result_of(capsys, path, "--zero_shot", "ptb", "ptb", "--T", 7, "--passes", 2)
    assert list(stepped["sets"]) == ["ptb"] and (stepped["T"], stepped["passes"]) == (7, 2)
    assert stepped["sets"]["ptb"]["nats"] != out["sets"]["ptb"]["nats"]
    assert len(sets) == 2  # not prepared again


def row_of(name, result):
    """The pattern of a set's row in the table."""
    perplexity, bits = (
        re.escape(evaluate.figure(result, figure)) for figure in ("perplexity", "bits_per_token")
    )
    return rf"{name} +<= {perplexity} +<= {bits} +{result['tokens']:,}"


@needs_gpt2
def test_the_zero_shot_table_holds_the_figures(tmp_path, sets, capsys):
    command = [gpt2_model(tmp_path / "mdlm.pt"), "--zero_shot", "ptb", "wikitext2"]
    out, table = result_of(capsys, *command), run(capsys, *command)
    for name, result in out["sets"].items():
        assert re.search(rf"\n{row_of(name, result)}\n", table)
    assert table.endswith("cut to rows [BOS] 14 tokens [EOS]\n")
    assert "bound in continuous time" in table


@needs_gpt2
def test_zero_shot_evaluates_every_kind_of_model(tmp_path, sets, capsys):
    ar = gpt2_model(tmp_path / "ar.pt", lambda cfg: replace(as_ar(cfg), bos=True))
    tokens = result_of(capsys, ar, "--zero_shot", "ptb")["sets"]["ptb"]["tokens"]
    assert tokens % 15 == 0  # BOS of each row is given
    table = run(capsys, ar, "--zero_shot", "ptb")
    assert re.search(rf"\nptb +[^<]= [\d.]+ ± .* {tokens:,}\nexact; ", table)
    for name, change in (("sedd", as_sedd), ("d3pm", as_d3pm)):
        path = gpt2_model(tmp_path / f"{name}.pt", change)
        out = result_of(capsys, path, "--zero_shot", "ptb")
        assert out["T"] == change(tiny_run("nowhere")).T
        assert math.isfinite(out["sets"]["ptb"]["nats"])


def test_zero_shot_prepares_the_papers_sets_by_default(sets, tmp_path, capsys, monkeypatch):
    """But not a set that is there. A prepared set of another tokenizer is refused."""
    command = [str(gpt2_model(tmp_path / "mdlm.pt")), "--zero_shot"]
    make_corpus(tmp_path / "ptb_wrap16")
    refused(capsys, lambda: evaluate.main([*command, "ptb"]), "ptb_wrap16", "another tokenizer")
    assert not sets
    prepared = []
    monkeypatch.setattr("tasks.zero_shot.prepare", lambda name, wrap: prepared.append((name, wrap)))
    monkeypatch.setattr(zero_shot, "evaluate_split", lambda *args: evaluate.fail("here"))
    refused(capsys, lambda: evaluate.main(command), "here")
    papers = ["wikitext103", "lm1b_gpt2", "lambada", "ag_news", "pubmed", "arxiv"]
    assert prepared == [(name, 16) for name in papers]


def test_zero_shot_refuses_sets_of_another_vocabulary(tmp_path, capsys):
    llama = replace(tiny_run("nowhere"), vocab_size=OURS.vocab_size)
    path = str(save(tmp_path / "llama.pt", llama, {"kind": "llama", "json": TEXT}))
    argv = [path, "--zero_shot", "fineweb_CC-MAIN-2024-10", "ptb"]
    refused(capsys, lambda: evaluate.main(argv), "ptb: is in GPT-2's BPE")


# --------------------------------------------------------------------------------------------------
# The temporal test: dumps of FineWeb


def serve_hub(texts_of, tmp_path, serve):
    """The address of a hub that has Llama-2's tokenizer and, of FineWeb, a file of each dump."""
    sha, fineweb = "c0ffee" * 6 + "c0de", pretrain.FINEWEB
    info = dict(sha=sha, tags=[], downloads=0, likes=0, private=False, id=fineweb)
    files = {f"/{LLAMA}/resolve/main/tokenizer.json": TEXT.encode()}
    files[f"/api/datasets/{fineweb}"] = json.dumps(info).encode()
    for dump, texts in texts_of.items():
        name = f"data/{dump}/000_00000.parquet"
        tree = [dict(type="file", path=name, size=9, oid="0")]
        files[f"/api/datasets/{fineweb}/tree/{sha}/data%2F{dump}"] = json.dumps(tree).encode()
        path = write_parquet(tmp_path / f"{dump}.parquet", texts)
        files[f"/datasets/{fineweb}/resolve/{sha}/{name}"] = path.read_bytes()
    return serve(files)


EVALUATE_DUMPS = """
import sys, json, pathlib, evaluate, data.corpus, data.prepare as p
ckpt, root, *argv = sys.argv[1:]
data.corpus.ROOT = pathlib.Path(root)
p.fineweb.__defaults__ = ((), 'CC-MAIN-2024-10', 1200, None, 1)  # instead of 209,715,200 tokens
evaluate.main([ckpt, *argv, '--json'])
evaluate.main([ckpt, *argv])
"""


def evaluate_dumps(tmp_path, address, names):
    """(record, lines of the table) of a process that reads the hub at this address."""
    hub = dict(HF_ENDPOINT=address, HF_HOME=f"{tmp_path}/hf", HF_HUB_DISABLE_TELEMETRY="1")
    argv = [f"{tmp_path}/run", str(tmp_path), "--passes", "3", "--zero_shot", *names]
    argv, env = [sys.executable, "-c", EVALUATE_DUMPS, *argv], os.environ | hub
    done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record, *table = done.stdout.splitlines()
    return json.loads(record), table


@pytest.mark.slow
def test_perplexity_over_time(tmp_path, serve, monkeypatch):
    """A model of some text, in SlimPajama's form, predicts a dump of such text better than one of
    other text. Both dumps come from the hub when they are needed; their figures are `bound` of the
    ids that the tokenizers library gives."""
    monkeypatch.setattr("data.corpus.ROOT", tmp_path)
    (tmp_path / "llama.json").write_text(TEXT)
    source = [str(write_parquet(tmp_path / f"{i}.parquet", DOCS)) for i in range(9)]
    prepare("slimpajama", input=source, vocab=f"{tmp_path}/llama.json", val_docs=60, workers=1)
    small = replace(tiny_run("slimpajama"), vocab_size=OURS.vocab_size, eval_every=1000)
    small = replace(small, steps=100, muon_lr=0.02, samples=0, save_every=1000)
    train.main(replace(small, out_dir=f"{tmp_path}/run"))

    texts = {"CC-MAIN-2024-10": DOCS, "CC-MAIN-2024-18": [text.upper() for text in DOCS]}
    names = [f"fineweb_{dump}" for dump in texts]
    out, table = evaluate_dumps(tmp_path, serve_hub(texts, tmp_path, serve), names)
    assert list(out["sets"]) == names and out["passes"] == 3
    model, cfg = load(f"{tmp_path}/run")
    for name, docs in zip(names, texts.values()):
        ids = np.array([i for text in docs for i in [1, *slow_ids(text)]][:1200], np.uint16)
        want, result = bound(model, ids, {}, cfg, name, passes=3, batch_size=32), out["sets"][name]
        assert result["nats"] == pytest.approx(want["nats"], rel=1e-6)
        assert result["tokens"] == 1200 and name[8:] in read_meta(name)["source"]
        assert any(re.fullmatch(row_of(name, result), line) for line in table)
    one, two = out["sets"].values()
    assert one["nats"] + 4 * math.hypot(one["se"], two["se"]) < two["nats"]
    assert table[-4].startswith("set".ljust(len(names[0]) + 11) + "perplexity")  # right-aligned
    rows = "of a set one after the other, <s> before each, cut to rows of 32 tokens"
    assert table[-1].endswith(rows)


# --------------------------------------------------------------------------------------------------
# Resuming after a kill


def kill_in(call, argv):
    """Run the command and kill it from within this call of the network's loss."""

    def target():
        loss, count = evaluate.exact_count_bound, itertools.count(1)
        evaluate.exact_count_bound = lambda *args: (
            os.kill(os.getpid(), signal.SIGKILL) if next(count) == call else loss(*args)
        )
        evaluate.main([*map(str, argv)])

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture
def calls(monkeypatch):
    """A list that grows with every call of the network's loss."""
    calls, loss = [], evaluate.exact_count_bound
    monkeypatch.setattr(evaluate, "exact_count_bound", lambda *args: calls.append(1) or loss(*args))
    return calls


def test_a_killed_evaluation_resumes_to_the_same_numbers(checkpoint, tmp_path, capsys, calls):
    """To the bit, also after a batch that was cut short; no batch is evaluated twice, and another
    evaluation in between does not disturb it."""
    path = tmp_path / "ckpt.pt"
    path.write_bytes(checkpoint.read_bytes())
    argv, partials = [path, "--batch_size", 5, "--passes", 2, "--json"], "*.partial"
    want, other = run(capsys, *argv), run(capsys, *argv, "--seed", 1)
    calls.clear()
    assert run(capsys, *argv, "--resume") == want != other
    batches = len(calls)
    assert batches > 12 and not [*tmp_path.glob(partials)]
    for call, torn in ((1, 0), (4, 0), (batches // 2 + 1, 1), (batches, 15)):
        kill_in(call, [*argv, "--resume"])
        (left,) = tmp_path.glob(partials)
        left.write_bytes(left.read_bytes()[: -torn or None])
        before = left.read_bytes()
        assert run(capsys, *argv, "--resume", "--seed", 1) == other
        assert [*tmp_path.glob(partials)] == [left] and left.read_bytes() == before
        if call > 4:  # and again, behind the batch that was cut short
            kill_in(2, [*argv, "--resume"])
            call += torn == 0
        calls.clear()
        assert run(capsys, *argv, "--resume") == want
        assert len(calls) == batches + 1 - call and not [*tmp_path.glob(partials)]


@needs_gpt2
def test_zero_shot_sets_resume_too(tmp_path, sets, capsys, calls):
    """Killed in the second set, the first is not evaluated again."""
    argv = [gpt2_model(tmp_path / "mdlm.pt"), "--json", "--zero_shot", "ptb", "wikitext2"]
    want = run(capsys, *argv)
    batches = len(calls)
    kill_in(batches, [*argv, "--resume"])
    calls.clear()
    assert run(capsys, *argv, "--resume") == want and len(calls) == 1
    assert not [*tmp_path.glob("*.partial")]


def test_whatever_changes_a_number_changes_the_partial_files_name(
    checkpoint, tmp_path, capsys, monkeypatch
):
    """Options, weights and data."""
    state, names = torch.load(checkpoint, weights_only=True), set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        torch.save(state, tmp_path / name / "ckpt.pt")
        state["ema"]["embed.weight"] = state["ema"]["embed.weight"] * 1.001

    def note(*args, partial, **options):
        names.add(partial.name)
        evaluate.fail("noted")

    monkeypatch.setattr(evaluate, "bound", note)
    for argv in (
        "a", "b/ckpt.pt", "a --passes 2", "a --T 9", "a --seed 1", "a --no_ema", "a --batch_size 6",
        "a --dtype bfloat16", "a --split val",
        "a/ckpt.pt --T 0",  # as the first
    ):  # fmt: skip
        command = f"{tmp_path}/{argv} --resume".split()
        refused(capsys, lambda command=command: evaluate.main(command), "noted")
    assert len(names) == 9
    assert all(re.fullmatch(r"evaluate-[0-9a-f]{16}\.partial", name) for name in names)


def test_another_processs_batch_counts_once_also_when_it_is_read_back(
    checkpoint, tmp_path, monkeypatch
):
    """Two processes with an odd number of batches: the second repeats a batch of the first."""
    model, cfg = load(checkpoint)
    ids, meta = read_split(cfg.data, "val", cfg)
    parts = []
    monkeypatch.setattr(evaluate.dist, "all_reduce", lambda total: parts.append(total.clone()))
    monkeypatch.setattr(evaluate, "rank_and_world", lambda: (1, 2))
    windows = -(-len(ids) // cfg.seq_len)
    assert windows % 2 or windows // 2 % 2  # batches of two windows: an odd number of them
    for _ in range(2):
        bound(model, ids, meta, cfg, "val", batch_size=2, partial=tmp_path / "partial")
    assert torch.equal(parts[0], parts[2]) and torch.equal(parts[1], parts[3])
    assert not parts[1][0, :2].any()  # tokens of the first process's first batch


def test_an_unwritable_partial_file_is_refused(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "sibling", lambda ckpt, name: tmp_path / "gone" / name)
    argv = [str(checkpoint), "--resume"]
    refused(capsys, lambda: evaluate.main(argv), "gone", "No such file")
