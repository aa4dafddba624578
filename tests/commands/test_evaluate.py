"""The estimator of the bound: unbiased, with an honest standard error, over every token of a split."""

import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_corpus, tiny_run
from test_cli import refused
from test_data import ROOT, needs_gpt2
from test_data import serve as serve
from test_judge import save
from test_pretraining_data import DOCS, OURS, TEXT, slow_ids, write_parquet
from world import MASK, TEXTS, L, V, exact_model, expected_loss, hostile_model, random_joint, tiny

import common
import data.prepare as prepare_data
import evaluate
import train
from configs import Config, as_ar, as_d3pm, as_sedd
from data.corpus import read_meta, read_split
from data.prepare import prepare
from diffusion import cross_entropy, mdlm, scatter, stratify, training_time
from evaluate import bound, strata
from model import load


class Network(torch.nn.Module):
    """A function as a module, which is what `bound` is given."""

    def __init__(self, function):
        super().__init__()
        self.function, self.device_of = function, torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, t, at, tokens):
        nats, log_z = cross_entropy(self.function(x, t, at), tokens[at])
        return scatter(nats, at), scatter(log_z, at)


class Markov:
    """Text of an order-1 chain over 5 letters, whose exact denoiser needs only the nearest visible tokens."""

    V, L = 5, 64

    def __init__(self):
        g = torch.Generator().manual_seed(3)
        self.P = torch.randn(self.V, self.V, dtype=torch.float64, generator=g).mul(2).softmax(-1)
        self.power = torch.stack([torch.linalg.matrix_power(self.P, d) for d in range(self.L + 1)])
        self.start = torch.linalg.matrix_power(self.P, 1000)[0]
        self.cfg = Config(vocab_size=self.V, seq_len=self.L)

    def text(self, windows, rng):
        x = np.empty((windows, self.L), np.int64)
        cdf = self.P.cumsum(-1).numpy()
        x[:, 0] = np.searchsorted(self.start.cumsum(0).numpy(), rng.random(windows))
        for i in range(1, self.L):
            x[:, i] = (rng.random(windows)[:, None] > cdf[x[:, i - 1]]).sum(-1)
        return x

    def nats(self, x):
        """-log p of each window (W, L), exact."""
        x = torch.from_numpy(x)
        return -(self.start.log()[x[:, 0]] + self.P.log()[x[:, :-1], x[:, 1:]].sum(-1))

    def model(self, x, t, at):
        i = torch.arange(x.shape[1])
        left = torch.where(x < self.V, i, -1).cummax(-1)[0]
        right = torch.where(x < self.V, i, self.L).flip(-1).cummin(-1)[0].flip(-1)
        a = x.gather(-1, left.clamp(min=0)).clamp(max=self.V - 1)
        b = x.gather(-1, right.clamp(max=x.shape[1] - 1)).clamp(max=self.V - 1)
        forward = torch.where(
            (left < 0)[..., None], self.start, self.power[(i - left).clamp(0, self.L), a]
        )
        backward = self.power[(right - i).clamp(0, self.L), :, b]
        backward = torch.where((right == self.L)[..., None], 1.0, backward)
        return (forward * backward).log()[at]


@pytest.fixture(scope="module")
def runs():
    """150 independent texts of 32 windows: exact nats per token, our estimate and its error, MDLM's estimate."""
    world, rng, rows = Markov(), np.random.default_rng(0), []
    for seed in range(150):
        x = world.text(32, rng)
        ours = bound(Network(world.model), x.reshape(-1), {}, world.cfg, "text", seed=seed)
        x0 = torch.from_numpy(x)
        t = training_time(stratify(32), world.cfg)
        theirs = (
            mdlm(world.model, x0, torch.ones_like(x0, dtype=torch.bool), world.cfg, t).mean().item()
        )
        rows.append((world.nats(x).mean().item() / world.L, ours["nats"], ours["se"], theirs))
    return np.array(rows)


def test_the_bound_is_unbiased(runs):
    exact, ours, _, theirs = runs.T
    for estimate in (ours, theirs):
        error = estimate - exact
        assert abs(error.mean()) < 4 * error.std() / len(error) ** 0.5


def test_the_standard_error_is_honest(runs):
    """Over texts and masks, estimates scatter as much as they say: the ratio of 150 is good to 6 %."""
    _, ours, se, _ = runs.T
    assert 0.8 < ours.std() / np.sqrt((se**2).mean()) < 1.2


def test_exact_counts_are_less_noisy_than_stratified_times(runs):
    """At one forward per window, the noise of the masks alone: MDLM's estimator against ours."""
    exact, ours, _, theirs = runs.T
    assert (theirs - exact).std() > 1.4 * (ours - exact).std()


def test_strata_cover_and_pairs_mirror():
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 64, 101):
        u = strata(n, rng)
        assert len(u) == n and (0 < u).all() and (u < 1).all()
        np.testing.assert_allclose(u[: n // 2 * 2 : 2] + u[1::2], 1)
        half = (n + 1) // 2
        assert sorted(np.floor(u[::2] * half)) == list(range(half))


def test_pairs_mask_a_constant_number_of_tokens():
    counts = []

    def model(x, t, at):
        counts.append(int(at.sum()))
        return torch.zeros(counts[-1], 5)

    bound(
        Network(model),
        np.zeros(64 * 32, np.int64),
        {},
        Config(vocab_size=5, seq_len=64),
        "text",
        batch_size=8,
    )
    assert counts == [8 * 65 // 2] * 4


@pytest.mark.parametrize("T", [0, 1, 4])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_every_T_estimates_its_own_bound(T, schedule):
    """With a time-dependent network each T has another bound; a split that repeats one text converges to it."""
    model, text = hostile_model(), torch.tensor([0, 2, 1])
    cfg = tiny(schedule=schedule, time_cond=True, cond_dim=8)
    got = bound(
        Network(model), np.tile(text.numpy(), 20_000), {}, cfg, "text", T=T, batch_size=10_000
    )
    want = expected_loss("mdlm", model, text, replace(cfg, T=T)) / L
    assert abs(got["nats"] - want) < 4 * got["se"] + 1e-9 and got["se"] < 0.02


@pytest.mark.slow
def test_the_last_short_window_and_every_token_count():
    """10 texts and one token more: that token is a window of its own, predicted from nothing."""
    joint = random_joint()
    model = exact_model(joint)

    def short(x, t, at):
        if x.shape[1] == L:
            return model(x, t, at)
        assert x.shape == (1, 1) and x.item() == MASK
        return joint.sum((1, 2)).log()[None]

    ids = np.concatenate([TEXTS[:10].numpy().reshape(-1), [1]])
    result = bound(Network(short), ids, {}, tiny(), "text", passes=3000, batch_size=11)
    want = -(joint.flatten()[:10].log().sum() + joint.sum((1, 2))[1].log()).item() / 31
    assert result["tokens"] == 31 and result["forwards"] == 33_000
    assert abs(result["nats"] - want) < 0.01  # 3,000 passes


def test_few_windows_give_no_error_bar_rather_than_a_wrong_one():
    result = bound(
        Network(exact_model(random_joint())), TEXTS[:4].numpy().reshape(-1), {}, tiny(), "text"
    )
    assert math.isnan(result["se"]) and math.isfinite(result["nats"])
    meta = {"splits": {"val": {"tokens": 12, "characters": 12}}}
    shown = evaluate.report(result, meta, "val")
    assert evaluate.figure(shown, "perplexity").endswith("± ?")
    assert json.loads(common.to_json({"val": shown}))["val"]["se"] is None
    assert evaluate.report(result | {"nats": 1e6}, meta, "val")["perplexity"] == pytest.approx(
        math.exp(700)
    )


def test_windows_takes_evenly_spaced_ones():
    seen = []

    def model(x, t, at):
        seen.append(x)
        return torch.zeros(int(at.sum()), 50)

    ids = np.repeat(np.arange(50), 8)
    result = bound(Network(model), ids, {}, Config(vocab_size=50, seq_len=8), "text", windows=10)
    first = [row[row < 50].unique().tolist() for row in torch.cat(seen)]
    assert result["tokens"] == 80 and [r for row in first for r in row][:2] != [0, 1]
    assert all(len(row) <= 1 for row in first) and first[-1] in ([49], [])


# ---------------------------------------------------------------------------------------------------------


def run(capsys, *args):
    evaluate.main([str(a) for a in args])
    return capsys.readouterr()


def test_the_command_reports_the_whole_split(checkpoint, corpus, capsys):
    out = json.loads(run(capsys, checkpoint, "--split", "val", "--json").out)
    model, cfg = load(checkpoint)
    ids, meta = read_split(str(corpus), "val", cfg)
    assert out["tokens"] == len(ids) == meta["splits"]["val"]["tokens"] and out["split"] == "val"
    direct = bound(model, ids, {}, cfg, "val", batch_size=32)
    assert out["nats"] == pytest.approx(direct["nats"], rel=1e-6)
    assert out["bits_per_char"] == pytest.approx(
        out["nats"] / math.log(2)
    )  # one token is one character
    assert out["perplexity"] == pytest.approx(math.exp(out["nats"]))
    assert out["perplexity_se"] == pytest.approx(math.exp(out["nats"]) * out["se"])
    text = run(capsys, checkpoint).out
    assert re.search(r"bits per char +<= \d\.\d{4} ± 0\.\d{4}\n", text) and "test split" in text


def test_options_of_the_command(checkpoint, corpus, capsys):
    get = lambda *args: json.loads(
        run(capsys, checkpoint, "--json", "--dtype", "float32", *args).out
    )
    base = get()
    assert get() == base and get("--seed", 1)["nats"] != base["nats"]
    assert get("--batch_size", 5)["nats"] == pytest.approx(base["nats"], abs=6 * base["se"])
    assert get("--no_ema")["nats"] != base["nats"] and get("--data", corpus)["nats"] == base["nats"]
    many = get("--passes", 8)
    assert many["forwards"] == 8 * base["forwards"] and many["se"] < base["se"]
    assert abs(many["nats"] - base["nats"]) < 4 * base["se"]
    one, hundred = get("--T", 1, "--passes", 4), get("--T", 100, "--passes", 4)
    assert (
        one["nats"] > hundred["nats"] > many["nats"] - 4 * many["se"]
    )  # fewer steps, looser bound
    assert base["dtype"] == "float32" and base["step"] == 100 and base["T"] == 0
    assert read_meta(str(corpus))["vocab_size"] == 27


def test_a_uniform_model_costs_exactly_log_v(corpus):
    """The zero-initialised head: every token ln 27, whatever the masks; the error bar is then zero."""
    cfg = Config(vocab_size=27, seq_len=32)
    ids, _ = read_split(str(corpus), "test", cfg)
    flat = Network(lambda x, t, at: torch.zeros(int(at.sum()), 27))
    result = bound(flat, ids, {}, cfg, "test")
    assert result["nats"] == pytest.approx(math.log(27), rel=1e-6) and result["se"] < 1e-6
    assert len(TEXTS) == V**L


KINDS = {  # name: a config's change, the --T that it has a bound for, and those that it has not, with the reason
    "mdlm": (lambda cfg: cfg, (0, 1, 50), {}),
    "mdlm in steps": (lambda cfg: replace(cfg, T=20, schedule="cosine"), (0, 20), {}),
    "sedd": (as_sedd, (0, 50), {}),
    "d3pm": (
        lambda cfg: replace(cfg, loss="d3pm", T=20, aux_ce=0.1, time_cond=True),
        (0, 20, 50),
        {},
    ),
    "d3pm with MASK": (as_d3pm, (1, 1000), {0: "zero_masking=False"}),
    "ar": (as_ar, (0,), {5: "no diffusion steps"}),
    "ar with BOS": (lambda cfg: replace(as_ar(cfg), bos=True), (0,), {5: "no diffusion steps"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_in_steps_and_in_continuous_time(kind, corpus, tmp_path, capsys):
    """--T reaches the bound, without it the model's own T does, and what has no bound is refused."""
    change, Ts, refusals = KINDS[kind]
    path = save(tmp_path / "ckpt.pt", change(tiny_run(corpus)))
    model, cfg = load(path)
    ids, meta = read_split(str(corpus), "test", cfg)
    for T in (None, *Ts):
        out = json.loads(run(capsys, path, "--json", *([] if T is None else ["--T", T])).out)
        assert out["T"] == (cfg.T if T is None else T)
        want = bound(model, ids, meta, cfg, "test", out["T"], batch_size=32)
        assert out["nats"] == pytest.approx(want["nats"], rel=1e-6) and out["nats"] > 0
        assert out["tokens"] == len(ids) - (len(ids) + 31) // 32 * cfg.bos
    for T, word in refusals.items():
        refused(capsys, lambda T=T: evaluate.main([str(path), "--T", str(T)]), f"--T {T}", word)
    kind = (
        "exact"
        if cfg.causal
        else f"bound in {cfg.T} steps"
        if cfg.T
        else "bound in continuous time"
    )
    text = run(capsys, path).out
    assert f", {kind}, " in text and ("perplexity      = " in text) == cfg.causal


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """Texts of two zero-shot sets where the others would be downloaded; yields the names as they are prepared."""
    monkeypatch.setattr("data.corpus.ROOT", tmp_path)
    prepared = []
    for name, line in (
        ("ptb", " mr. <unk> is N years old \n"),
        ("wikitext2", " = Title = \n some text \n"),
    ):
        (tmp_path / f"{name}.txt").write_text(line * 20)

    def from_file(name, **options):
        prepared.append((name, options))
        return prepare(name, input=[str(tmp_path / f"{name}.txt")], **options)

    monkeypatch.setattr("data.prepare.prepare", from_file)
    return prepared


@needs_gpt2
def test_zero_shot(tmp_path, sets, capsys):
    """Missing sets are prepared for the model's length, once; every figure is `bound`'s on the set."""
    small = replace(
        tiny_run("nowhere"), vocab_size=50257, n_embd=8, n_head=1, n_layer=1, seq_len=16
    )
    gpt2, names = {"kind": "gpt2"}, ["ptb", "wikitext2"]
    path = save(tmp_path / "mdlm.pt", small, gpt2)
    out = json.loads(run(capsys, path, "--zero_shot", *names, "--json").out)
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
    stepped = json.loads(
        run(capsys, path, "--zero_shot", "ptb", "ptb", "--T", 7, "--passes", 2, "--json").out
    )
    assert list(stepped["sets"]) == ["ptb"] and (stepped["T"], stepped["passes"]) == (7, 2)
    assert stepped["sets"]["ptb"]["nats"] != out["sets"]["ptb"]["nats"]
    table = run(capsys, path, "--zero_shot", *names).out
    for name, result in out["sets"].items():
        figures = [re.escape(evaluate.figure(result, f)) for f in ("perplexity", "bits_per_token")]
        assert re.search(
            rf"\n{name} +<= {figures[0]} +<= {figures[1]} +{result['tokens']:,}\n", table
        )
    assert (
        table.endswith("cut to rows [BOS] 14 tokens [EOS]\n")
        and "bound in continuous time" in table
    )
    assert len(sets) == 2  # not prepared again

    exact = run(
        capsys,
        save(tmp_path / "ar.pt", replace(as_ar(small), bos=True), gpt2),
        "--zero_shot",
        "ptb",
    ).out
    rows = out["sets"]["ptb"]["tokens"] // 16
    assert re.search(rf"\nptb +[^<]= [\d.]+ ± .* {rows * 15:,}\nexact; ", exact)  # BOS is given
    for name, change in (("sedd", as_sedd), ("d3pm", as_d3pm)):
        path = save(tmp_path / f"{name}.pt", change(small), gpt2)
        result = json.loads(run(capsys, path, "--zero_shot", "ptb", "--json").out)
        assert result["T"] == change(small).T and math.isfinite(result["sets"]["ptb"]["nats"])


def test_zero_shot_by_default_and_refused(checkpoint, sets, tmp_path, capsys, monkeypatch):
    command = [str(checkpoint), "--zero_shot"]
    refused(
        capsys,
        lambda: evaluate.main([*command, "ptb", "c4"]),
        "c4",
        "ptb, wikitext2, wikitext103, lm1b_gpt2",
    )
    refused(capsys, lambda: evaluate.main([*command, "ptb"]), "GPT-2", str(checkpoint))
    assert not sets
    small = replace(tiny_run("nowhere"), vocab_size=50257, n_embd=8, n_head=1, n_layer=1)
    command[0] = str(save(tmp_path / "mdlm.pt", small, {"kind": "gpt2"}))
    make_corpus(tmp_path / "ptb_wrap32")
    refused(capsys, lambda: evaluate.main([*command, "ptb"]), "ptb_wrap32", "another tokenizer")
    asked = []
    monkeypatch.setattr("data.prepare.prepare", lambda name, wrap: asked.append((name, wrap)))
    monkeypatch.setattr(evaluate, "evaluate_split", lambda *args: evaluate.fail("here"))
    refused(capsys, lambda: evaluate.main(command), "here")
    papers = ["wikitext103", "lm1b_gpt2", "lambada", "ag_news", "pubmed", "arxiv"]
    assert asked == [(name, 32) for name in papers]  # ptb is there


# ---------------------------------------------------------------------------------------------------------
# The temporal test: dumps of FineWeb


def hub(texts_of, tmp_path, serve):
    """The address of a hub that has Llama-2's tokenizer and, of FineWeb, a file of each dump."""
    sha, fineweb = "c0ffee" * 6 + "c0de", prepare_data.FINEWEB
    info = dict(sha=sha, tags=[], downloads=0, likes=0, private=False, id=fineweb)
    files = {f"/{prepare_data.LLAMA}/resolve/main/tokenizer.json": TEXT.encode()}
    files[f"/api/datasets/{fineweb}"] = json.dumps(info).encode()
    for dump, texts in texts_of.items():
        name = f"data/{dump}/000_00000.parquet"
        tree = [dict(type="file", path=name, size=9, oid="0")]
        files[f"/api/datasets/{fineweb}/tree/{sha}/data%2F{dump}"] = json.dumps(tree).encode()
        path = write_parquet(tmp_path / f"{dump}.parquet", texts)
        files[f"/datasets/{fineweb}/resolve/{sha}/{name}"] = path.read_bytes()
    return serve(files)


@pytest.mark.slow
def test_perplexity_over_time(tmp_path, serve, monkeypatch):
    """A model of some text, in SlimPajama's form, is at home in a dump of such text and not in a later one. Both
    come from the hub when they are needed; what they cost is `bound` of ids that a reader would write."""
    monkeypatch.setattr("data.corpus.ROOT", tmp_path)
    (tmp_path / "llama.json").write_text(TEXT)
    source = [str(write_parquet(tmp_path / f"{i}.parquet", DOCS)) for i in range(9)]
    prepare("slimpajama", input=source, vocab=f"{tmp_path}/llama.json", val_docs=60, workers=1)
    small = replace(
        tiny_run("slimpajama"), vocab_size=OURS.vocab_size, steps=100, muon_lr=0.02, samples=0
    )
    train.main(replace(small, out_dir=f"{tmp_path}/run", eval_every=1000, save_every=1000))

    later = [text.upper() for text in DOCS]
    names = [f"fineweb_{dump}" for dump in ("CC-MAIN-2024-10", "CC-MAIN-2024-18")]
    address = hub({names[0][8:]: DOCS, names[1][8:]: later}, tmp_path, serve)
    code = (
        "import sys, json, pathlib, evaluate, data.corpus, data.prepare as p\n"
        "ckpt, root, *argv = sys.argv[1:]\n"
        "data.corpus.ROOT = pathlib.Path(root)\n"
        "p.fineweb.__defaults__ = ((), 'CC-MAIN-2024-10', 1200, None, 1)\n"  # in place of 209,715,200 tokens
        "evaluate.main([ckpt, *argv, '--json'])\n"
        "evaluate.main([ckpt, *argv])\n"
    )
    env = dict(
        os.environ, HF_ENDPOINT=address, HF_HOME=f"{tmp_path}/hf", HF_HUB_DISABLE_TELEMETRY="1"
    )
    argv = [
        sys.executable,
        "-c",
        code,
        f"{tmp_path}/run",
        str(tmp_path),
        "--passes",
        "3",
        "--zero_shot",
        *names,
    ]
    done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out, *table = done.stdout.splitlines()
    sets = json.loads(out)["sets"]
    assert list(sets) == names and json.loads(out)["passes"] == 3
    model, cfg = load(f"{tmp_path}/run")
    for name, texts in zip(names, (DOCS, later)):
        ids = np.array([i for text in texts for i in [1, *slow_ids(text)]][:1200], np.uint16)
        want = bound(model, ids, {}, cfg, name, passes=3, batch_size=32)
        assert sets[name]["nats"] == pytest.approx(want["nats"], rel=1e-6)
        assert sets[name]["tokens"] == 1200 and name[8:] in read_meta(name)["source"]
        figures = [
            re.escape(evaluate.figure(sets[name], f)) for f in ("perplexity", "bits_per_token")
        ]
        assert any(
            re.fullmatch(rf"{name} +<= {figures[0]} +<= {figures[1]} +1,200", line)
            for line in table
        )
    one, two = (sets[name] for name in names)
    assert one["nats"] + 4 * math.hypot(one["se"], two["se"]) < two["nats"]
    assert table[-4].startswith(
        "set".ljust(len(names[0]) + 11) + "perplexity"
    )  # right-aligned in 20
    assert table[-1].endswith(
        "of a set one after the other, <s> before each, cut to rows of 32 tokens"
    )


def test_dumps_need_llamas_pieces_and_a_name(checkpoint, tmp_path, capsys):
    dump, command = (
        "fineweb_CC-MAIN-2024-10",
        lambda *sets: evaluate.main([str(checkpoint), "--zero_shot", *sets]),
    )
    refused(capsys, lambda: command(dump), f"{dump}: is in Llama-2's pieces")
    for name in (
        "fineweb",
        "fineweb_2024-10",
        "fineweb_CC-MAIN-2024-1",
        f"{dump}_wrap32",
        "CC-MAIN-2024-10",
    ):
        refused(
            capsys,
            lambda name=name: command(name),
            f"{name}: there are ptb",
            "dumps: fineweb_CC-MAIN-2024-10",
        )
    small = replace(tiny_run("nowhere"), vocab_size=OURS.vocab_size)
    path = str(save(tmp_path / "llama.pt", small, {"kind": "llama", "json": TEXT}))
    refused(
        capsys, lambda: evaluate.main([path, "--zero_shot", dump, "ptb"]), "ptb: is in GPT-2's BPE"
    )


# ---------------------------------------------------------------------------------------------------------
# Going on after a kill


def killed(argv, call):
    """The command, killed from within this call of the network's loss."""

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


def test_a_killed_evaluation_goes_on_to_the_same_numbers(checkpoint, tmp_path, capsys, monkeypatch):
    """To the bit, with a batch cut short, too, asking nothing twice, whatever else is evaluated in between."""
    path = tmp_path / "ckpt.pt"
    path.write_bytes(checkpoint.read_bytes())
    argv = [path, "--batch_size", 5, "--passes", 2, "--json"]
    want, calls, loss = run(capsys, *argv).out, [], evaluate.exact_count_bound
    monkeypatch.setattr(evaluate, "exact_count_bound", lambda *args: calls.append(1) or loss(*args))
    assert run(capsys, *argv, "--resume").out == want
    batches, found = len(calls), lambda: [*tmp_path.glob("*.partial")]
    assert batches > 12 and not found()
    for call, torn in ((1, 0), (4, 0), (batches // 2 + 1, 1), (batches, 15)):
        killed([*argv, "--resume"], call)
        (left,) = found()
        left.write_bytes(left.read_bytes()[: -torn or None])
        before = left.read_bytes()
        assert (
            run(capsys, *argv, "--resume", "--seed", 1).out
            == run(capsys, *argv, "--seed", 1).out
            != want
        )
        assert found() == [left] and left.read_bytes() == before  # nobody else's
        if call > 4:  # and again, behind the batch that was cut short
            killed([*argv, "--resume"], 2)
            call += torn == 0
        calls.clear()
        assert run(capsys, *argv, "--resume").out == want
        assert len(calls) == batches + 1 - call and not found()


@needs_gpt2
def test_zero_shot_sets_go_on_too(tmp_path, sets, capsys):
    """Killed in the second set, the first is not evaluated again."""
    small = replace(
        tiny_run("nowhere"), vocab_size=50257, n_embd=8, n_head=1, n_layer=1, seq_len=16
    )
    argv = [
        save(tmp_path / "mdlm.pt", small, {"kind": "gpt2"}),
        "--json",
        "--zero_shot",
        "ptb",
        "wikitext2",
    ]
    want = run(capsys, *argv).out
    calls, loss = [], evaluate.exact_count_bound
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "exact_count_bound", lambda *args: calls.append(1) or loss(*args))
        run(capsys, *argv)
        batches = len(calls)
        killed([*argv, "--resume"], batches)
        calls.clear()
        assert run(capsys, *argv, "--resume").out == want and len(calls) == 1
    assert not [*tmp_path.glob("*.partial")]


def test_what_another_evaluation_left_is_another_file(checkpoint, tmp_path, capsys, monkeypatch):
    """All that changes a number changes the file's name: options, weights, data."""
    state, names = torch.load(checkpoint, weights_only=True), set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        torch.save(state, tmp_path / name / "ckpt.pt")
        state["ema"]["embed.weight"] = state["ema"]["embed.weight"] * 1.001
    command = lambda *argv: evaluate.main([*argv, "--resume"])
    found = lambda *args, partial, **how: names.add(partial.name) or evaluate.fail("found")
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "bound", found)
        for argv in (
            ["a"], ["b/ckpt.pt"], ["a", "--passes", "2"], ["a", "--T", "9"], ["a", "--seed", "1"],
            ["a", "--no_ema"], ["a", "--batch_size", "6"], ["a", "--dtype", "bfloat16"], ["a", "--split", "val"],
        ):  # fmt: skip
            refused(capsys, lambda argv=argv: command(f"{tmp_path}/{argv[0]}", *argv[1:]), "found")
        assert len(names) == 9 and all(
            re.fullmatch(r"evaluate-[0-9a-f]{16}\.partial", name) for name in names
        )
        refused(capsys, lambda: command(f"{tmp_path}/a/ckpt.pt", "--T", "0"), "found")  # as without
    assert len(names) == 9
    monkeypatch.setattr(evaluate, "sibling", lambda ckpt, name: tmp_path / "gone" / name)
    refused(capsys, lambda: command(f"{tmp_path}/a"), "gone", "No such file")
