"""Training: data and noise as pure functions, exact resume, any number of processes, one folder per run."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LETTERS, make_corpus, tiny_run
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import train
from common import read_checkpoint
from configs import CONFIGS, Config, as_ar, as_d3pm, as_sedd
from data import batches, runs
from data.corpus import GIVEN, finish, partial_of, read_split, training_rows
from diffusion import LOSSES, alpha
from evaluate import bound
from extra import muon
from model import DiT, load

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cfg(corpus, tmp_path):
    return replace(tiny_run(corpus), out_dir=str(tmp_path / "run"))


def records(cfg, key):
    lines = (Path(cfg.out_dir) / "log.jsonl").read_text().splitlines()
    return {r["step"]: r[key] for r in map(json.loads, lines) if key in r}


def weights(cfg, name="ckpt.pt"):
    state = read_checkpoint(Path(cfg.out_dir) / name)
    return {f"{k}.{n}": t for k in ("model", "ema") for n, t in state[k].items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------------------------------------------------


def test_a_batch_is_a_pure_function_of_seed_step_and_row(cfg):
    ids, meta = read_split(cfg.data, "train", cfg)
    whole = batches.batch(ids, meta, cfg, 5, np.arange(8))
    for rows in ([3], [7, 1], [0, 2, 4, 6]):
        part = batches.batch(ids, meta, cfg, 5, np.array(rows))
        assert all(torch.equal(a[rows], b) for a, b in zip(whole, part))
    x0, maskable, t, xt, weight = whole
    assert (torch.floor(t * 8) == torch.arange(8)).all()  # stratified over the whole batch
    log_t = batches.batch(
        ids, meta, replace(cfg, time_draw="importance", t_min=1e-3), 5, np.arange(8)
    )[2].log()
    assert (
        torch.floor((1 - log_t / math.log(1e-3)) * 8) == torch.arange(8)
    ).all()  # importance, too
    iid = torch.cat(
        [
            batches.batch(ids, meta, replace(cfg, time_draw="iid"), s, np.arange(8))[2]
            for s in range(40)
        ]
    )
    assert (torch.floor(iid * 8) != torch.arange(8).repeat(40)).double().mean() > 0.8  # 7 of 8
    assert abs(iid.mean() - 0.5) < 4 / (12 * 320) ** 0.5 and (weight == 1).all()
    assert ((xt == x0) | (xt == cfg.mask_id)).all() and maskable.all()
    for other in (replace(cfg, seed=2), cfg):
        step = 5 if other.seed == 2 else 6
        differs = batches.batch(ids, meta, other, step, np.arange(8))
        assert not torch.equal(differs[0], x0) and not torch.equal(differs[2], t)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_batches_are_masked_by_the_schedule(cfg, schedule):
    cfg = replace(cfg, schedule=schedule, batch_size=4)
    ids, meta = read_split(cfg.data, "train", cfg)
    masked, wanted = 0.0, 0.0
    for step in range(150):
        _, _, t, xt, _ = batches.batch(ids, meta, cfg, step, np.arange(4))
        masked += (xt == cfg.mask_id).double().mean().item() / 150
        wanted += (1 - alpha(schedule, t)).mean().item() / 150
    assert abs(masked - wanted) < 4 * 0.5 / math.sqrt(150 * 4 * 32)


def test_training_learns_and_reports(cfg):
    """Better than the best that ignores context, the entropy of single characters, by five standard errors."""
    val = train.main(
        replace(cfg, steps=300, muon_lr=0.02, lr_decay="linear", eval_every=1000, save_every=1000)
    )
    ids, _ = read_split(cfg.data, "val", cfg)
    p = np.bincount(ids) / len(ids)
    unigram = -(p[p > 0] * np.log2(p[p > 0])).sum()
    assert (
        val["bits_per_char"] < unigram - 5 * val["bits_per_char_se"]
        and 0 < val["bits_per_char_se"] < 0.2
    )
    assert val["perplexity"] == pytest.approx(2 ** val["bits_per_token"])
    loss = records(cfg, "loss")
    assert list(loss) == list(range(10, 301, 10)) and loss[300] < loss[10]
    model, saved = load(Path(cfg.out_dir) / "ckpt.pt")
    assert (
        saved.n_embd == 32
        and model.step == 300
        and model.tokenizer == {"kind": "char", "characters": LETTERS}
    )
    assert (
        not model.training
        and json.loads((Path(cfg.out_dir) / "config.json").read_text())["lr"] == 3e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [as_ar, as_sedd, as_d3pm, lambda cfg: replace(as_ar(cfg), bos=True)]
)
def test_every_baseline_trains_evaluates_and_samples(cfg, change, capsys):
    """Better than single characters, as above; the given first character is none that sampling could know."""
    bos = change(cfg).bos
    cfg = change(
        replace(
            cfg, steps=300, muon_lr=0.02, eval_every=1000, save_every=1000, samples=0 if bos else 1
        )
    )
    val = train.main(cfg)
    ids, _ = read_split(cfg.data, "val", cfg)
    p = np.bincount(ids) / len(ids)
    assert (
        val["bits_per_char"] < -(p[p > 0] * np.log2(p[p > 0])).sum() - 5 * val["bits_per_char_se"]
    )
    assert val["tokens"] == len(ids) - bos * math.ceil(len(ids) / cfg.seq_len)
    assert bos or "--- sample" in capsys.readouterr().out


def padded_corpus(folder, pad=0):
    """Rows of 1 to 32 tokens 1 .. 26, filled up with 0."""
    rng, partial = np.random.default_rng(0), partial_of(folder)
    partial.mkdir(parents=True)
    rows = rng.integers(1, 27, (200, 32)).astype(np.uint16)
    rows[np.arange(32) >= rng.integers(1, 33, 200)[:, None]] = pad
    for split in ("train", "val"):
        rows.tofile(partial / f"{split}.bin")
    spec = {"kind": "char", "characters": LETTERS}
    finish(
        folder,
        "made up",
        spec,
        27,
        dict.fromkeys(("train", "val"), int((rows != pad).sum())),
        32,
        pad,
    )
    return rows


def test_padding_is_never_masked_trained_or_counted(cfg, tmp_path):
    """Every token counts the same, whatever the length of its row, and however the batch is split."""
    rows = padded_corpus(tmp_path / "padded")
    cfg = replace(cfg, data=str(tmp_path / "padded"), steps=2, samples=0, eval_every=100)
    ids, meta = read_split(cfg.data, "train", cfg)
    x0, maskable, t, xt, _ = batches.batch(ids, meta, cfg, 0, np.arange(8))
    assert (maskable == (x0 != 0)).all() and (xt == 0)[~maskable].all() and not maskable.all()
    device, grads = torch.device("cpu"), []
    for micro in (8, 2):
        torch.manual_seed(0)
        model = DiT(cfg)
        parts = [
            batches.batch(ids, meta, cfg, 0, np.arange(i, i + micro)) for i in range(0, 8, micro)
        ]
        got, _ = train.train_step(model, train.make_optimizers(model, cfg), parts, 1, cfg, device)
        grads.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        torch.manual_seed(0)
        nats = LOSSES["mdlm"](DiT(cfg), x0, maskable, cfg, t, xt)
        assert got.item() == pytest.approx(nats.sum().item() / maskable.sum().item(), rel=1e-5)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    val = train.main(cfg)
    assert (
        val["tokens"] == (rows != 0).sum()
        and 0.5 < val["bits_per_char"] / val["bits_per_token"] < 1.01
    )


def answers_corpus(folder):
    """Rows [0 | given prompt of 3 to 9 | its copy, the answer | 0 ..., given]."""
    rng, partial = np.random.default_rng(0), partial_of(folder)
    partial.mkdir(parents=True)
    rows = np.full((120, 32), GIVEN, np.uint32)
    for row, n in zip(rows, rng.integers(3, 10, 120)):
        prompt = rng.integers(1, 27, n)
        row[1 : n + 1], row[n + 1 : 2 * n + 1] = prompt + GIVEN, prompt
    for split in ("train", "val"):
        rows.tofile(partial / f"{split}.bin")
    spec, answers = {"kind": "char", "characters": LETTERS}, int((rows < GIVEN).sum())
    finish(folder, "made up", spec, 27, dict.fromkeys(("train", "val"), answers), 32, given=True)
    return rows


def test_answers_alone_are_noised_and_trained_on(cfg, tmp_path):
    rows = answers_corpus(tmp_path / "sft")
    cfg = replace(cfg, data=str(tmp_path / "sft"), bos=True, samples=0, steps=2)
    ids, meta = read_split(cfg.data, "train", cfg)
    stored = torch.from_numpy(training_rows(ids, meta, cfg, np.arange(8)).astype(np.int64))
    x0, maskable, t, xt, _ = batches.batch(ids, meta, cfg, 0, np.arange(8))
    assert (maskable == (stored < GIVEN)).all() and (x0 == stored % GIVEN).all() and x0.max() < 27
    assert (xt == x0)[~maskable].all() and (xt == cfg.mask_id).any()
    dropped = [
        batches.batch(ids, meta, replace(cfg, prompt_dropout=0.3), s, np.arange(8))
        for s in range(40)
    ]
    prompts, answers = [], []
    for _, m, _, y, _ in dropped:
        prompt = (
            ~m & (torch.arange(32) > 0) & (torch.arange(32) <= m.int().argmax(-1, keepdim=True))
        )
        masked = y == cfg.mask_id
        assert (
            (masked & prompt).any(-1) == (masked | ~prompt).all(-1)
        ).all()  # a row's prompt as a whole
        assert (
            not masked[:, 0].any() and not (masked & ~m & ~prompt).any()
        )  # neither BOS nor what is behind
        prompts.append((masked & prompt).any(-1))
        answers.append(masked & m)
    assert abs(torch.cat(prompts).double().mean() - 0.3) < 4 * (0.21 / 320) ** 0.5
    plain = [batches.batch(ids, meta, cfg, s, np.arange(8)) for s in range(40)]
    assert all(torch.equal((p[3] == cfg.mask_id) & p[1], a) for p, a in zip(plain, answers))
    val = train.main(cfg)
    assert val["tokens"] == (rows < GIVEN).sum() and val["bits_per_char"] == pytest.approx(
        val["bits_per_token"]
    )


def test_fine_tuning_begins_with_the_averaged_weights(cfg, tmp_path, capsys):
    train.main(replace(cfg, samples=0))
    start = Path(cfg.out_dir) / "ckpt.pt"
    answers_corpus(tmp_path / "sft")
    tuned = replace(
        cfg, data=str(tmp_path / "sft"), bos=True, samples=0, steps=1, lr=1e-12, init_from=str(start),
        out_dir=str(tmp_path / "tuned"),
    )  # fmt: skip
    train.main(tuned)
    averaged, after = (
        read_checkpoint(start)["ema"],
        read_checkpoint(tmp_path / "tuned/ckpt.pt")["model"],
    )
    for name in averaged:
        torch.testing.assert_close(after[name], averaged[name])
    assert any(
        (read_checkpoint(start)["model"][n] - averaged[n]).abs().max() > 1e-4 for n in averaged
    )
    train.main(replace(tuned, steps=3), resume=True)  # goes on, and does not begin again
    for change, words in (
        (dict(n_embd=64), ("its network differs", "ckpt.pt")),
        (dict(init_from="nowhere.pt"), ("nowhere.pt: no such checkpoint",)),
        (dict(short_rows=0.5), ("short_rows=0.5", "sft")),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            train.main(replace(tuned, out_dir=str(tmp_path / "other"), **change))
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.count("\n") == 1 and all(w in err for w in words), err
        assert not (tmp_path / "other").exists()
    other = make_corpus(tmp_path / "letters", characters="zyxwvutsrqponmlkjihgfedcba ")
    with pytest.raises(SystemExit):
        train.main(replace(tuned, data=str(other), out_dir=str(tmp_path / "other")))
    assert "made with another tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("bos", [False, True])
def test_short_rows_are_cut_at_random_and_nothing_is_thrown_away(cfg, bos):
    """SMDM's stochastic length: the same tokens, masks and times, in rows of every length."""
    cfg = replace(as_ar(cfg) if bos else cfg, bos=bos, short_rows=0.5)
    ids, meta = read_split(cfg.data, "train", cfg)
    lengths, cut = set(), 0
    for step in range(30):
        rows = np.arange(8)
        whole = batches.batch(ids, meta, cfg, step, rows)
        parts = batches.shorten(whole, cfg, step, rows)
        flat = lambda batches, i: torch.cat([b[i].reshape(-1) for b in batches])
        long = [b for b in parts if b[0].shape[1] == 32]
        lengths |= {b[0].shape[1] for b in parts}
        cut += 8 - sum(len(b[0]) for b in long)
        for i in (0, 3) if not bos else (0,):  # x0, and the masks: all are there
            assert torch.equal(flat(parts, i).sort().values, flat([whole], i).sort().values)
        for x, m, t, y, weight in parts:
            assert len(x) == len(m) == len(t) == len(y) == len(weight) and (y == x)[~m].all()
            assert m[:, 1:].all() and (m[:, 0] != bos).all()
            if x.shape[1] < 32:
                assert t.unique().numel() == 1 and t[0] in whole[2]
        again = batches.shorten(
            batches.batch(ids, meta, cfg, step, rows[[2, 5]]), cfg, step, rows[[2, 5]]
        )
        shapes = sorted(
            tuple(b[0].shape)
            for r in (2, 5)
            for b in batches.shorten(
                batches.batch(ids, meta, cfg, step, rows[[r]]), cfg, step, rows[[r]]
            )
            if b[0].shape[1] < 32
        )
        assert (
            sorted(tuple(b[0].shape) for b in again if b[0].shape[1] < 32) == shapes
        )  # a row's own draw
    assert abs(cut - 120) < 4 * 60**0.5 and len(lengths) > 25
    val = train.main(replace(cfg, steps=3, samples=0, eval_every=100))
    assert 0 < val["bits_per_char"] < 6


@pytest.mark.parametrize("time_draw", ["iid", "importance", "counts"])
def test_every_draw_of_times_trains(cfg, time_draw):
    """Its loss is near the bound it is to estimate, which no draw without its weights would be."""
    cfg = replace(cfg, steps=200, time_draw=time_draw, t_min=1e-3, ema=0.9, samples=0)
    val = train.main(replace(cfg, eval_every=1000, save_every=1000))
    loss = list(records(cfg, "loss").values())[-5:]
    assert np.mean(loss) == pytest.approx(val["nats"], abs=0.5)


@pytest.mark.parametrize("recipe", ["adamw", "muon_dropout", "d3pm", "ar", "sedd_counts_short"])
def test_resume_is_exact_to_the_bit(cfg, recipe, tmp_path, monkeypatch):
    """Stopped by SIGTERM after step 7 and resumed = never stopped: weights, average, log."""
    cfg = replace(
        cfg,
        **{
            "adamw": {},
            "muon_dropout": dict(muon_lr=0.02, dropout=0.2, cond_dim=0, micro_batch=4),
            "ar": dict(loss="ar", causal=True, cond_dim=0),
            "sedd_counts_short": dict(
                loss="sedd", time_cond=True, time_draw="counts", short_rows=0.3
            ),
            "d3pm": dict(
                loss="d3pm", T=50, aux_ce=0.05, time_cond=True, lr_decay="cosine", weight_decay=0.1
            ),
        }[recipe],
    )
    straight = replace(cfg, out_dir=str(tmp_path / "straight"))
    train.main(straight)

    update_ema = train.update_ema
    monkeypatch.setattr(
        train,
        "update_ema",
        lambda *a: (update_ema(*a), a[2] == 7 and os.kill(os.getpid(), signal.SIGTERM)),
    )
    with pytest.raises(SystemExit) as e:
        train.main(cfg)
    assert (
        e.value.code == 128 + signal.SIGTERM
        and read_checkpoint(cfg.out_dir + "/ckpt.pt")["step"] == 7
    )
    monkeypatch.setattr(train, "update_ema", update_ema)
    train.main(cfg, resume=True)
    assert same(weights(cfg), weights(straight)) and same(
        weights(cfg, "best.pt"), weights(straight, "best.pt")
    )
    assert records(cfg, "val") == records(straight, "val")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.slow
def test_freed_memory_is_used_again():
    """Ten tensors of 64 MB, one after the other: the pages of one, instead of each. Each is a little smaller, since
    an aligned block is cut from a larger one: where one was, the next of its size fits only if a neighbour is free."""
    count = """
import resource, sys, torch, train
sys.argv[1] == "keep" and train.keep_freed_memory()
used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = [used(), [torch.ones(2**24 - 2**12 * i).sum() for i in range(10)]][0]
print((used() - before) * resource.getpagesize() / 2**26)
"""
    pages = lambda how: float(
        subprocess.check_output([sys.executable, "-c", count, how], cwd=ROOT, env=environment())
    )
    assert pages("free") > 5
    assert pages("keep") < 1.5


def test_recomputing_is_the_same_run_to_the_bit_and_may_be_switched(cfg, tmp_path):
    cfg = replace(cfg, dropout=0.2)
    straight = replace(cfg, out_dir=str(tmp_path / "straight"))
    train.main(straight)
    train.main(replace(cfg, recompute=True, steps=6))
    train.main(replace(cfg, recompute=False), resume=True)
    assert same(weights(cfg), weights(straight))


def command(cfg, *extra):
    return ["train.py", "pydocs_mdlm", *(f"--{k}={v}" for k, v in vars(cfg).items()), *extra]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_sigterm_under_torchrun_leaves_a_checkpoint(cfg):
    """Only one of the two processes hears it, and both end after the same step."""
    cfg = replace(cfg, steps=100_000, save_every=100_000, eval_every=100_000)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = subprocess.Popen(
        [*launch, *command(cfg)], cwd=ROOT, env=environment(), stderr=subprocess.PIPE
    )
    log = Path(cfg.out_dir) / "log.jsonl"
    for _ in range(1200):
        if run.poll() is not None or (log.exists() and log.read_text()):
            break
        time.sleep(0.05)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    workers = [p for p in children if b"train.py" in Path(f"/proc/{p}/cmdline").read_bytes()]
    assert len(workers) == 2, run.stderr.read().decode()
    os.kill(int(workers[1]), signal.SIGTERM)
    run.communicate(timeout=60)
    step = read_checkpoint(Path(cfg.out_dir) / "ckpt.pt")["step"]
    assert 10 <= step < 100_000 and step % 10 == 0


def test_kill_9_loses_nothing_before_the_last_checkpoint(cfg, tmp_path):
    straight = replace(cfg, steps=60, out_dir=str(tmp_path / "straight"))
    killed = replace(straight, out_dir=cfg.out_dir)
    train.main(straight)
    run = subprocess.Popen(
        [sys.executable, *command(killed)], cwd=ROOT, env=environment(), stderr=subprocess.PIPE
    )
    ckpt = Path(killed.out_dir) / "ckpt.pt"
    for _ in range(1200):
        if ckpt.exists() or run.poll() is not None:
            break
        time.sleep(0.05)
    run.kill()
    run.wait()
    assert ckpt.exists(), run.stderr.read().decode()
    step = read_checkpoint(ckpt)["step"]
    assert step < 60 and step % 4 == 0
    train.main(killed, resume=True)
    assert same(weights(killed), weights(straight))
    assert list(records(killed, "loss")) == list(records(straight, "loss"))


def torchrun(cfg, *extra):
    """Train in two processes on this CPU."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, *command(cfg, *extra)], cwd=ROOT, env=environment(), capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert b"FutureWarning" not in done.stderr


def close(a, b):
    return a.keys() == b.keys() and all(a[k] == pytest.approx(b[k], rel=1e-4) for k in a)


@pytest.mark.slow
def test_two_processes_train_the_other_losses_like_one(cfg, tmp_path):
    """D3PM with its two forwards per step, on padded rows, of which the processes have different numbers of tokens."""
    padded_corpus(tmp_path / "padded")
    cfg = replace(
        as_d3pm(cfg), data=str(tmp_path / "padded"), micro_batch=2, eval_every=10, samples=0
    )
    one, two = (replace(cfg, steps=10, out_dir=str(tmp_path / name)) for name in ("one", "two"))
    train.main(one)
    torchrun(two)
    assert close(records(one, "loss"), records(two, "loss"))
    assert close(*({s: v["nats"] for s, v in records(c, "val").items()} for c in (one, two)))


def test_two_processes_train_like_one_and_resume_each_other(cfg, tmp_path):
    """torchrun on two CPU processes: the losses of one process with the same global batch, and checkpoints
    that either goes on from."""
    cfg = replace(cfg, micro_batch=2, save_every=10, eval_every=10)
    one, two = (replace(cfg, steps=20, out_dir=str(tmp_path / name)) for name in ("one", "two"))
    train.main(one)
    torchrun(two)
    assert close(records(one, "loss"), records(two, "loss"))
    nats = lambda cfg: {s: v["nats"] for s, v in records(cfg, "val").items()}
    assert close(nats(one), nats(two)) and list(nats(one)) == [10, 20]

    train.main(replace(two, steps=40), resume=True)  # two processes' checkpoint in one
    torchrun(replace(one, steps=40), "--resume")  # and the other way round
    assert close(records(one, "loss"), records(two, "loss")) and list(records(one, "loss")) == [
        10,
        20,
        30,
        40,
    ]


def test_processes_share_a_batch_and_each_micro_batch_has_all_strata_of_time(cfg):
    ids, meta = read_split(cfg.data, "train", cfg)
    cfg = replace(cfg, batch_size=24, micro_batch=4)
    whole = batches.batch(ids, meta, cfg, 3, np.arange(24))
    shares = [batches.micro_batches(ids, meta, cfg, 3, rank, 2) for rank in range(2)]
    assert [[len(b[0]) for b in share] for share in shares] == [[4, 4, 4]] * 2
    for i, tensor in enumerate(whole):  # rows rank, rank + 2 x 3, ...: strided
        parts = torch.stack(
            [torch.stack([b[i] for b in share]) for share in shares]
        )  # (2, 3, 4, ...)
        assert torch.equal(parts.permute(2, 1, 0, *range(3, parts.ndim)).flatten(0, 2), tensor)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batches_do_not_change_the_losses(cfg, micro, tmp_path):
    split = replace(cfg, micro_batch=micro, out_dir=str(tmp_path / "split"))
    train.main(cfg)
    train.main(split)
    assert records(split, "loss") == pytest.approx(records(cfg, "loss"), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------


def test_learning_rates_are_upstreams():
    mdlm, nanodd = CONFIGS["owt_mdlm"](), CONFIGS["text8_d3pm"]()
    assert [train.lr_at(s, mdlm) for s in (0, 1250, 2500, 999_999)] == pytest.approx(
        [0, 1.5e-4, 3e-4, 3e-4]
    )
    middle = 2500 + (500_000 - 2500) // 2
    want = [0, 1e-3, 1e-5 + (1e-3 - 1e-5) / 2, 1e-5]
    assert [train.lr_at(s, nanodd) for s in (0, 2500, middle, 500_000)] == pytest.approx(want)
    wsd = Config(lr=1, lr_decay="linear", warmup=10, steps=100, decay_steps=20, min_lr=0.1)
    assert [train.lr_at(s, wsd) for s in (5, 10, 80, 90, 100)] == pytest.approx(
        [0.5, 1, 1, 0.55, 0.1]
    )


class Waits(TorchDispatchMode):
    """Notes in `seen` every operator whose result the host has to know: there a GPU is waited for."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        lists = [
            a for a in args if isinstance(a, (list, tuple))
        ]  # the indices of `index` and `index_put`
        by_mask = "index" in name and any(
            getattr(i, "dtype", 0) == torch.bool for a in lists for i in a
        )
        if by_mask or name in (
            "nonzero",
            "masked_select",
            "masked_scatter_backward",
            "_local_scalar_dense",
        ):
            self.seen.append("wait")
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("large", [2**24, 0])
@pytest.mark.parametrize(
    "make", [lambda cfg: cfg, as_sedd, lambda cfg: replace(as_d3pm(cfg), carry_over=True), as_ar]
)
def test_a_step_waits_for_the_device_between_trunk_and_way_back_alone(
    cfg, make, large, monkeypatch
):
    """Once, for where tokens are masked: never before the trunk is on its way, in the way back or the update."""
    monkeypatch.setattr("head.LARGE", large)
    cfg, device, seen = make(replace(cfg, muon_lr=0.01)), torch.device("cpu"), []
    ids, meta = read_split(cfg.data, "train", cfg)
    model, ema, optimizers = train.build(cfg, meta, device)
    parts = batches.micro_batches(ids, meta, cfg, 0)
    model.blocks[-1].register_forward_hook(lambda *_: seen.append("trunk"))
    back = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: back(loss, seen.append("back")))
    with Waits(seen):
        train.train_step(model, optimizers, parts, 0, cfg, device)
        train.update_ema(ema, model, 1, cfg)
    assert seen == ["trunk", "wait", "back"]


@pytest.mark.parametrize("recompute", [False, True])
def test_training_compiles_the_trunk_once(cfg, recompute):
    """There and back, whatever number of tokens the head answers, and to the same weights."""
    torch._dynamo.reset()
    cfg, device = replace(cfg, recompute=recompute), torch.device("cpu")
    counter = CompileCounterWithBackend("aot_eager")
    ids, meta = read_split(cfg.data, "train", cfg)
    trained = []
    for compiled in (False, True):
        model, _, optimizers = train.build(cfg, meta, device)
        if compiled:
            model.hidden = torch.compile(model.hidden, backend=counter, fullgraph=True)
        for step in range(4):
            train.train_step(
                model, optimizers, batches.micro_batches(ids, meta, cfg, step), step, cfg, device
            )
        trained.append(list(model.parameters()))
    assert counter.frame_count == 1
    torch.testing.assert_close(*trained)


def test_without_an_average_there_is_no_second_model_and_validation_changes_nothing(cfg, tmp_path):
    """Dropout, which a model left in evaluation would no longer have, is on again after a validation."""
    cfg = replace(cfg, ema=0.0, dropout=0.5, eval_every=4, save_every=12)
    ids, meta = read_split(cfg.data, "train", cfg)
    model, ema, _ = train.build(cfg, meta, torch.device("cpu"))
    assert all(a is b for a, b in zip(model.parameters(), ema.parameters()))
    report = train.main(cfg)
    train.main(rare := replace(cfg, eval_every=12, out_dir=str(tmp_path / "rare")))
    assert same(weights(cfg), weights(rare))
    saved = weights(cfg)
    assert all(torch.equal(t, saved[k.replace("model.", "ema.", 1)]) for k, t in saved.items())
    model, _ = load(cfg.out_dir)
    val, meta = read_split(cfg.data, "val", cfg)
    again = bound(model, val, meta, cfg, "val", batch_size=8)
    assert again["nats"] == pytest.approx(report["nats"], rel=1e-6)


def test_ema_rules_are_upstreams():
    """MDLM: min(0.9999, (1 + n) / (10 + n)). nanoDD's ema-pytorch: copies, then 1 - 1 / (1 + e), e = n - 101."""

    def decay(cfg, n):
        a, b = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(a.weight), torch.nn.init.ones_(b.weight)
        train.update_ema(a, b, n, cfg)
        return 1 - a.weight.item()

    mdlm, nanodd = CONFIGS["owt_mdlm"](), CONFIGS["text8_d3pm"]()
    for n in (1, 2, 50, 10**6):
        assert decay(mdlm, n) == pytest.approx(min(0.9999, (1 + n) / (10 + n)), abs=1e-6)
    for n in (1, 100, 101, 102, 150, 10**6):
        e = max(n - 101, 0)
        assert decay(nanodd, n) == pytest.approx(min(0.9999, 1 - 1 / (1 + e)), abs=1e-6)


def test_every_parameter_has_one_optimizer_and_only_matrices_decay(cfg):
    for muon_lr in (0.0, 0.02):
        model = DiT(replace(cfg, weight_decay=0.1))
        optimizers = train.make_optimizers(model, replace(cfg, weight_decay=0.1, muon_lr=muon_lr))
        groups = [g for o in optimizers for g in o.param_groups]
        owned = [id(p) for g in groups for p in g["params"]]
        assert sorted(owned) == sorted(id(p) for p in model.parameters())
        assert all((g["weight_decay"] > 0) == (p.ndim >= 2) for g in groups for p in g["params"])
        muon = [
            p
            for o in optimizers
            if isinstance(o, torch.optim.Muon)
            for p in o.param_groups[0]["params"]
        ]
        assert len(muon) == (4 * cfg.n_layer if muon_lr else 0)  # qkv, attn_out, mlp_in, mlp_out


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_muon_in_bfloat16_is_torchs_to_the_bit(shape, monkeypatch):
    monkeypatch.setattr(train, "compute_dtype", lambda device, dtype: "bfloat16")
    ours, theirs = (
        torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
        for _ in "ab"
    )
    optimizers = (
        muon.Muon([ours], lr=0.02, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1),
    )
    for step in range(5):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step + 2))
        for p, optimizer in zip((ours, theirs), optimizers):
            p.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(ours, theirs)
    assert torch.equal(*(o.state_dict()["state"][0]["momentum_buffer"] for o in optimizers))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_muon_in_float32_orthogonalises(shape):
    """Same singular vectors as the gradient's; its five steps bring singular values to 0.68 .. 1.14."""
    u, s, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    s = torch.linspace(1, 0.05, len(s), dtype=torch.float64)
    rotated = u.T @ muon.orthogonalize(u @ s.diag() @ vh, torch.float32).double() @ vh.T
    values = rotated.diagonal()
    assert 0.6 < values.min() and values.max() < 1.25
    assert (rotated - values.diag()).abs().max() < 1e-4
    a, b, c = 3.4445, -4.7750, 2.0315  # each step maps a singular value x to a x + b x^3 + c x^5
    x = s / s.norm()
    for _ in range(5):
        x = a * x + b * x**3 + c * x**5
    assert (values - x).abs().max() < 1e-4


@pytest.mark.parametrize(
    "capability, dtype",
    [("avx512_bf16", torch.bfloat16), ("amx_bf16", torch.bfloat16), ("avx2", torch.float32)],
)
def test_muon_multiplies_in_what_the_cpu_has_instructions_for(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True})
    seen, orthogonalize = [], muon.orthogonalize
    monkeypatch.setattr(
        muon, "orthogonalize", lambda g, dtype: seen.append(dtype) or orthogonalize(g, dtype)
    )
    p = torch.nn.Parameter(torch.randn(4, 4))
    p.grad = torch.randn(4, 4)
    muon.Muon([p]).step()
    assert seen == [dtype]


def test_wandb_gets_the_log_offline(cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    train.main(replace(cfg, wandb=True))
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


@pytest.mark.parametrize("save_every, step", [(1, 13), (4, 16), (1000, 18)])
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_checkpoint(
    cfg, monkeypatch, save_every, step, factor
):
    """Wherever it first shows, at a save, a validation or a line of the log: nothing is saved after it."""
    train.main(cfg)
    before = weights(cfg)
    monkeypatch.setitem(
        train.LOSSES, "mdlm", lambda net, x0, *a: net(x0, a[2].float()).sum(-1) * factor
    )
    with pytest.raises(SystemExit, match=f"loss .* at step {step}"):
        train.main(replace(cfg, steps=24, save_every=save_every), resume=True)
    assert same(weights(cfg), before)


@pytest.fixture
def interruptible():
    """SIGINT as in a terminal: a process in the background may have been started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_signals_are_given_back(cfg, interruptible):
    handlers = lambda: [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    before = handlers()
    train.main(cfg)
    assert handlers() == before
    with runs.catch_signals() as noted:
        os.kill(os.getpid(), signal.SIGINT)
        assert noted == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)  # the second one is as ever
    assert handlers() == before


def test_a_run_killed_before_its_first_checkpoint_goes_on_from_the_best(cfg, tmp_path, monkeypatch):
    straight = replace(cfg, out_dir=str(tmp_path / "straight"))
    train.main(straight)
    train.main(replace(cfg, steps=6))
    os.remove(cfg.out_dir + "/ckpt.pt")
    steps, batch = [], batches.batch
    monkeypatch.setattr(batches, "batch", lambda *a: (steps.append(a[3]), batch(*a))[1])
    train.main(cfg, resume=True)
    assert steps[0] == 6 and same(weights(cfg), weights(straight))


def test_dropout_is_new_in_every_step(cfg, monkeypatch):
    seeds, train_step = [], train.train_step
    monkeypatch.setattr(
        train, "train_step", lambda *a: (seeds.append(torch.initial_seed()), train_step(*a))[1]
    )
    train.main(replace(cfg, dropout=0.1))
    assert len(set(seeds)) == cfg.steps


@pytest.mark.parametrize(
    "damage", ['{"step": 8, "lo', "garbage\n", '{"no": 1}\n', "[1]\n", '{"step": 99, "loss": 1}\n']
)
def test_a_damaged_log_is_cut_where_the_damage_begins(cfg, damage):
    train.main(replace(cfg, steps=8))
    log = Path(cfg.out_dir) / "log.jsonl"
    whole = log.read_text()
    log.write_text(whole + damage)
    train.main(cfg, resume=True)
    assert log.read_text().startswith(whole) and list(records(cfg, "loss")) == [8, 10, 12]


def test_speeds_count_no_validation_and_all_steps(cfg, monkeypatch):
    """Pauses between two lines of the log, for validation and checkpoints, are not training."""
    clock = [0.0]
    monkeypatch.setattr(train.time, "time", lambda: clock[0])
    step, validate = train.train_step, train.bound
    monkeypatch.setattr(
        train, "train_step", lambda *a: (clock.__setitem__(0, clock[0] + 1), step(*a))[1]
    )
    monkeypatch.setattr(
        train, "bound", lambda *a, **k: (clock.__setitem__(0, clock[0] + 50), validate(*a, **k))[1]
    )
    train.main(replace(cfg, steps=25, eval_every=3))
    assert set(records(cfg, "tokens_per_s").values()) == {8 * 32}
    assert read_checkpoint(cfg.out_dir + "/ckpt.pt")["seconds"] == 25


def test_wrapped_windows_train(tmp_path, cfg):
    folder = make_corpus(tmp_path / "wrapped", wrap=32)
    val = train.main(replace(cfg, data=str(folder)))
    assert val["tokens"] % 32 == 0 and math.isfinite(val["nats"])
