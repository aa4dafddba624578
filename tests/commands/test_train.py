"""Training: it learns and reports, resumes exactly, runs on any number of processes, and survives
signals. test_batches.py has its data, theory/test_optimizers.py its optimizers, test_survival.py
its damaged files and closed terminals."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    LETTERS,
    ROOT,
    make_corpus,
    refused,
    tiny_run,
    unigram_bits,
    write_answers,
    write_padded_rows,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import train
from configs import as_ar, as_d3pm, as_sedd
from data import batches, runs
from data.checkpoints import load, read_checkpoint
from data.corpus import GIVEN, read_split
from evaluate import bound


@pytest.fixture
def cfg(corpus, tmp_path):
    return replace(tiny_run(corpus), out_dir=str(tmp_path / "run"))


def records(cfg, key):
    """{step: record[key]} of the lines of the log that have the key."""
    lines = (Path(cfg.out_dir) / "log.jsonl").read_text().splitlines()
    return {r["step"]: r[key] for r in map(json.loads, lines) if key in r}


def validation_nats(cfg):
    return {step: val["nats"] for step, val in records(cfg, "val").items()}


def weights(cfg, name="ckpt.pt"):
    state = read_checkpoint(Path(cfg.out_dir) / name)
    return {f"{k}.{n}": t for k in ("model", "ema") for n, t in state[k].items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def close(a, b):
    return a.keys() == b.keys() and all(a[k] == pytest.approx(b[k], rel=1e-4) for k in a)


def do_before(monkeypatch, name, action):
    """Call action(*arguments) before every call of train.<name>."""
    real = getattr(train, name)
    monkeypatch.setattr(train, name, lambda *a, **k: (action(*a), real(*a, **k))[1])


# --------------------------------------------------------------------------------------------------
# Learning


def test_training_learns_and_reports(cfg):
    """Better by five standard errors than the best prediction that ignores context."""
    long = replace(cfg, steps=300, muon_lr=0.02, lr_decay="linear", eval_every=1000)
    val = train.main(replace(long, save_every=1000))
    assert 0 < val["bits_per_char_se"] < 0.2
    assert val["bits_per_char"] < unigram_bits(cfg) - 5 * val["bits_per_char_se"]
    assert val["perplexity"] == pytest.approx(2 ** val["bits_per_token"])
    loss = records(cfg, "loss")
    assert list(loss) == list(range(10, 301, 10)) and loss[300] < loss[10]
    model, saved = load(Path(cfg.out_dir) / "ckpt.pt")
    assert saved.n_embd == 32 and model.step == 300 and not model.training
    assert model.tokenizer == {"kind": "char", "characters": LETTERS}
    assert json.loads((Path(cfg.out_dir) / "config.json").read_text())["lr"] == 3e-3


def as_ar_with_bos(cfg):
    """Its first character is given, and sampling cannot know it."""
    return replace(as_ar(cfg), bos=True, samples=0)


@pytest.mark.slow
@pytest.mark.parametrize("change", [as_ar, as_sedd, as_d3pm, as_ar_with_bos])
def test_every_baseline_trains_evaluates_and_samples(cfg, change, capsys):
    cfg = change(replace(cfg, steps=300, muon_lr=0.02, eval_every=1000, save_every=1000))
    val = train.main(cfg)
    assert val["bits_per_char"] < unigram_bits(cfg) - 5 * val["bits_per_char_se"]
    n = len(read_split(cfg.data, "val", cfg)[0])
    assert val["tokens"] == n - cfg.bos * math.ceil(n / cfg.seq_len)
    assert cfg.bos or "--- sample" in capsys.readouterr().out


@pytest.mark.parametrize("time_draw", ["iid", "importance", "counts"])
def test_every_draw_of_times_trains(cfg, time_draw):
    """Its loss is near the bound that it estimates; no draw without its weights would be."""
    cfg = replace(cfg, steps=200, time_draw=time_draw, t_min=1e-3, ema=0.9, samples=0)
    val = train.main(replace(cfg, eval_every=1000, save_every=1000))
    loss = list(records(cfg, "loss").values())[-5:]
    assert np.mean(loss) == pytest.approx(val["nats"], abs=0.5)


def test_padding_is_never_counted(cfg, tmp_path):
    rows = write_padded_rows(tmp_path / "padded")
    cfg = replace(cfg, data=str(tmp_path / "padded"), steps=2, samples=0, eval_every=100)
    val = train.main(cfg)
    assert val["tokens"] == (rows != 0).sum()
    assert 0.5 < val["bits_per_char"] / val["bits_per_token"] < 1.01


def test_only_answers_are_counted(cfg, tmp_path):
    rows = write_answers(tmp_path / "sft")
    val = train.main(replace(cfg, data=str(tmp_path / "sft"), bos=True, samples=0, steps=2))
    assert val["tokens"] == (rows < GIVEN).sum()
    assert val["bits_per_char"] == pytest.approx(val["bits_per_token"])


@pytest.mark.parametrize("bos", [False, True])
def test_short_rows_train(cfg, bos):
    cfg = replace(as_ar(cfg) if bos else cfg, bos=bos, short_rows=0.5)
    val = train.main(replace(cfg, steps=3, samples=0, eval_every=100))
    assert 0 < val["bits_per_char"] < 6


def test_wrapped_windows_train(tmp_path, cfg):
    folder = make_corpus(tmp_path / "wrapped", wrap=32)
    val = train.main(replace(cfg, data=str(folder)))
    assert val["tokens"] % 32 == 0 and math.isfinite(val["nats"])


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batches_do_not_change_the_losses(cfg, micro, tmp_path):
    split = replace(cfg, micro_batch=micro, out_dir=str(tmp_path / "split"))
    train.main(cfg)
    train.main(split)
    assert records(split, "loss") == pytest.approx(records(cfg, "loss"), rel=1e-5)


def test_without_an_average_there_is_no_second_model(cfg):
    cfg = replace(cfg, ema=0.0, eval_every=4)
    _, meta = read_split(cfg.data, "train", cfg)
    model, ema, _ = train.build(cfg, meta, torch.device("cpu"))
    assert all(a is b for a, b in zip(model.parameters(), ema.parameters()))
    report = train.main(cfg)
    saved = read_checkpoint(cfg.out_dir)
    assert same(saved["model"], saved["ema"])
    val, meta = read_split(cfg.data, "val", cfg)
    again = bound(load(cfg.out_dir)[0], val, meta, cfg, "val", batch_size=8)
    assert again["nats"] == pytest.approx(report["nats"], rel=1e-6)


def test_validation_changes_no_weight(cfg, tmp_path):
    """Dropout is on again after it, also where the average is the model."""
    often = replace(cfg, ema=0.0, dropout=0.5, eval_every=4, save_every=12)
    rare = replace(often, eval_every=12, out_dir=str(tmp_path / "rare"))
    train.main(often)
    train.main(rare)
    assert same(weights(often), weights(rare))


def test_dropout_is_new_in_every_step(cfg, monkeypatch):
    seeds = []
    do_before(monkeypatch, "train_step", lambda *a: seeds.append(torch.initial_seed()))
    train.main(replace(cfg, dropout=0.1))
    assert len(set(seeds)) == cfg.steps


# --------------------------------------------------------------------------------------------------
# Fine-tuning


def test_epochs_set_the_steps(cfg, capsys):
    """4,000 tokens are 125 rows of 32, so 2 epochs of batches of 8 are 31 steps."""
    argv = command(replace(cfg, eval_every=100, samples=0))[1:]
    train.command_line([*argv, "--epochs", "2"])
    assert read_checkpoint(cfg.out_dir)["step"] == 31
    refused(capsys, lambda: train.command_line([*argv, "--epochs=-1"]), "--epochs -1.0")


@pytest.fixture
def tuned(cfg, tmp_path):
    """One step of fine-tuning, too small to see, from the checkpoint of a run."""
    train.main(replace(cfg, samples=0))
    write_answers(tmp_path / "sft")
    start, data, out = Path(cfg.out_dir) / "ckpt.pt", tmp_path / "sft", tmp_path / "tuned"
    short = replace(cfg, bos=True, samples=0, steps=1, lr=1e-12)
    return replace(short, data=str(data), init_from=str(start), out_dir=str(out))


def test_fine_tuning_begins_with_the_averaged_weights(tuned):
    train.main(tuned)
    before, after = read_checkpoint(tuned.init_from), read_checkpoint(tuned.out_dir)["model"]
    for name, average in before["ema"].items():
        torch.testing.assert_close(after[name], average)
    assert any((before["model"][n] - a).abs().max() > 1e-4 for n, a in before["ema"].items())


def test_a_resumed_fine_tuning_does_not_begin_again(tuned, monkeypatch):
    train.main(replace(tuned, steps=2))
    do_before(monkeypatch, "copy_weights", lambda *a: pytest.fail("copied weights"))
    train.main(replace(tuned, steps=3), resume=True)
    assert read_checkpoint(tuned.out_dir)["step"] == 3


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(n_embd=64), ["its network differs", "ckpt.pt"]),
        (dict(init_from="nowhere.pt"), ["nowhere.pt: no such checkpoint"]),
        (dict(short_rows=0.5), ["short_rows=0.5", "sft"]),
        (dict(data="OTHER"), ["made with another tokenizer"]),
    ],
)
def test_fine_tuning_refuses_what_does_not_fit(tuned, change, words, tmp_path, capsys):
    other = make_corpus(tmp_path / "letters", characters="zyxwvutsrqponmlkjihgfedcba ")
    change = {name: str(other) if value == "OTHER" else value for name, value in change.items()}
    refused(capsys, lambda: train.main(replace(tuned, **change)), *words)
    assert not Path(tuned.out_dir).exists()


# --------------------------------------------------------------------------------------------------
# Resuming

RECIPES = {
    "adamw": {},
    "muon_dropout": dict(muon_lr=0.02, dropout=0.2, cond_dim=0, micro_batch=4),
    "ar": dict(loss="ar", causal=True, cond_dim=0),
    "sedd_counts_short": dict(loss="sedd", time_cond=True, time_draw="counts", short_rows=0.3),
    "d3pm": dict(
        loss="d3pm", T=50, aux_ce=0.05, time_cond=True, lr_decay="cosine", weight_decay=0.1
    ),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_resume_is_exact_to_the_bit(cfg, recipe, tmp_path, monkeypatch):
    """Stopped by SIGTERM after step 7 and resumed equals never stopped: weights, average, log."""
    cfg = replace(cfg, **RECIPES[recipe])
    straight = replace(cfg, out_dir=str(tmp_path / "straight"))
    train.main(straight)
    terminate = lambda ema, model, n, cfg: n == 7 and os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as patch:
        do_before(patch, "update_ema", terminate)
        with pytest.raises(SystemExit) as e:
            train.main(cfg)
    assert e.value.code == 128 + signal.SIGTERM and read_checkpoint(cfg.out_dir)["step"] == 7
    train.main(cfg, resume=True)
    for name in ("ckpt.pt", "best.pt"):
        assert same(weights(cfg, name), weights(straight, name))
    assert records(cfg, "val") == records(straight, "val")


def test_recomputing_is_the_same_run_to_the_bit_and_may_be_switched(cfg, tmp_path):
    cfg = replace(cfg, dropout=0.2)
    straight = replace(cfg, out_dir=str(tmp_path / "straight"))
    train.main(straight)
    train.main(replace(cfg, recompute=True, steps=6))
    train.main(replace(cfg, recompute=False), resume=True)
    assert same(weights(cfg), weights(straight))


def test_a_run_killed_before_its_first_checkpoint_starts_again(cfg, tmp_path, monkeypatch):
    """best.pt has no moments, and so no run resumes from it."""
    straight = replace(cfg, out_dir=str(tmp_path / "straight"))
    train.main(straight)
    train.main(replace(cfg, steps=6))
    os.remove(cfg.out_dir + "/ckpt.pt")
    assert read_checkpoint(Path(cfg.out_dir) / "best.pt")["optimizer"] == []
    steps, batch = [], batches.batch
    monkeypatch.setattr(batches, "batch", lambda *a: (steps.append(a[3]), batch(*a))[1])
    train.main(cfg, resume=True)
    assert steps[0] == 0 and same(weights(cfg), weights(straight))


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


@pytest.mark.parametrize("save_every, step", [(1, 13), (4, 16), (1000, 18)])
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_checkpoint(
    cfg, monkeypatch, save_every, step, factor
):
    """At the next save, validation or line of the log; nothing is saved after it."""
    train.main(cfg)
    before = weights(cfg)
    broken = lambda net, x0, *a: net(x0, a[2].float()).sum(-1) * factor
    monkeypatch.setitem(train.LOSSES, "mdlm", broken)
    with pytest.raises(SystemExit, match=f"loss .* at step {step}"):
        train.main(replace(cfg, steps=24, save_every=save_every), resume=True)
    assert same(weights(cfg), before)


# --------------------------------------------------------------------------------------------------
# Processes and signals


def command(cfg, *extra):
    return ["train.py", "pydocs_mdlm", *(f"--{k}={v}" for k, v in vars(cfg).items()), *extra]


LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(argv):
    return subprocess.Popen(argv, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE)


def wait_until(condition, process, seconds=60):
    """Until the condition holds, the process has ended or the time is over."""
    end = time.time() + seconds
    while not condition() and process.poll() is None and time.time() < end:
        time.sleep(0.05)


def torchrun(cfg, *extra):
    """Train in two processes on this CPU."""
    argv = [*LAUNCH, *command(cfg, *extra)]
    done = subprocess.run(argv, cwd=ROOT, env=ENVIRONMENT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert b"FutureWarning" not in done.stderr


@pytest.mark.slow
def test_two_processes_train_like_one_and_resume_each_other(cfg, tmp_path):
    """The losses of one process with the same global batch, and checkpoints that either resumes."""
    cfg = replace(cfg, micro_batch=2, save_every=10, eval_every=10)
    one, two = (replace(cfg, steps=20, out_dir=str(tmp_path / name)) for name in ("one", "two"))
    train.main(one)
    torchrun(two)
    assert close(records(one, "loss"), records(two, "loss"))
    assert close(validation_nats(one), validation_nats(two))
    assert list(validation_nats(one)) == [10, 20]
    train.main(replace(two, steps=40), resume=True)  # two processes' checkpoint in one
    torchrun(replace(one, steps=40), "--resume")  # and the reverse
    assert close(records(one, "loss"), records(two, "loss"))
    assert list(records(one, "loss")) == [10, 20, 30, 40]


@pytest.mark.slow
def test_two_processes_train_the_other_losses_like_one(cfg, tmp_path):
    """D3PM with two forwards per step, on padded rows: the processes have
    different numbers of tokens."""
    write_padded_rows(tmp_path / "padded")
    cfg = replace(as_d3pm(cfg), data=str(tmp_path / "padded"), micro_batch=2, eval_every=10)
    cfg = replace(cfg, steps=10, samples=0)
    one, two = (replace(cfg, out_dir=str(tmp_path / name)) for name in ("one", "two"))
    train.main(one)
    torchrun(two)
    assert close(records(one, "loss"), records(two, "loss"))
    assert close(validation_nats(one), validation_nats(two))


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", [dict(muon_lr=0.01), dict(tied=True, ema=0.0), dict(recompute=True, time_cond=True)]
)
def test_sharded_training_is_like_one_process_and_each_resumes_the_other(cfg, tmp_path, recipe):
    """FSDP: losses, weights and average. The 15 windows make unequal shares of validation."""
    cfg = replace(cfg, micro_batch=2, save_every=20, eval_every=10, eval_windows=15, **recipe)
    one, two = (replace(cfg, steps=20, out_dir=str(tmp_path / name)) for name in ("one", "two"))
    train.main(one)
    torchrun(replace(two, fsdp=True))
    train.main(replace(two, steps=30), resume=True)
    torchrun(replace(one, steps=30, fsdp=True), "--resume")
    assert close(records(one, "loss"), records(two, "loss"))
    assert close(validation_nats(one), validation_nats(two))
    for name in ("ckpt.pt", "best.pt"):
        a, b = weights(one, name), weights(two, name)
        assert a.keys() == b.keys()
        for key in a:
            if cfg.muon_lr:  # it amplifies the rounding of a gradient's smallest singular values
                assert (a[key] - b[key]).norm() <= 0.05 * a[key].norm(), key
            else:
                torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_sigterm_under_torchrun_leaves_a_checkpoint(cfg):
    """Only one of the two processes gets the signal, and both end after the same step."""
    cfg = replace(cfg, steps=100_000, save_every=100_000, eval_every=100_000)
    run, log = start([*LAUNCH, *command(cfg)]), Path(cfg.out_dir) / "log.jsonl"
    wait_until(lambda: log.exists() and log.read_text(), run)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    workers = [p for p in children if b"train.py" in Path(f"/proc/{p}/cmdline").read_bytes()]
    assert len(workers) == 2, run.stderr.read().decode()
    os.kill(int(workers[1]), signal.SIGTERM)
    run.communicate(timeout=60)
    step = read_checkpoint(cfg.out_dir)["step"]
    assert 10 <= step < 100_000 and step % 10 == 0


def test_kill_9_loses_nothing_before_the_last_checkpoint(cfg, tmp_path):
    straight = replace(cfg, steps=60, out_dir=str(tmp_path / "straight"))
    killed = replace(straight, out_dir=cfg.out_dir)
    train.main(straight)
    run, ckpt = start([sys.executable, *command(killed)]), Path(killed.out_dir) / "ckpt.pt"
    wait_until(ckpt.exists, run)
    run.kill()
    run.wait()
    assert ckpt.exists(), run.stderr.read().decode()
    step = read_checkpoint(ckpt)["step"]
    assert step < 60 and step % 4 == 0
    train.main(killed, resume=True)
    assert same(weights(killed), weights(straight))
    assert list(records(killed, "loss")) == list(records(straight, "loss"))


@pytest.fixture
def interruptible():
    """SIGINT as in a terminal: a background process may have been started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_signal_handlers_are_restored(cfg, interruptible):
    handlers = lambda: [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    before = handlers()
    train.main(cfg)
    assert handlers() == before
    with runs.catch_signals() as noted:
        os.kill(os.getpid(), signal.SIGINT)
        assert noted == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)  # the second one acts as usual
    assert handlers() == before


# --------------------------------------------------------------------------------------------------
# Speed


class Waits(TorchDispatchMode):
    """Notes in `seen` every operator whose result the host needs: it synchronises with a GPU."""

    NAMES = "nonzero", "masked_select", "masked_scatter_backward", "_local_scalar_dense"

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        indices = [i for a in args if isinstance(a, (list, tuple)) for i in a]
        by_mask = "index" in name and any(getattr(i, "dtype", 0) == torch.bool for i in indices)
        if by_mask or name in self.NAMES:
            self.seen.append("wait")
        return op(*args, **(kwargs or {}))


def as_d3pm_that_carries_over(cfg):
    return replace(as_d3pm(cfg), carry_over=True)


@pytest.mark.parametrize("large", [2**24, 0])
@pytest.mark.parametrize("change", [lambda cfg: cfg, as_sedd, as_d3pm_that_carries_over, as_ar])
def test_a_step_synchronises_once_between_trunk_and_backward(cfg, change, large, monkeypatch):
    """For where tokens are masked, once the trunk's kernels are queued: neither before nor in the
    backward pass or the update."""
    monkeypatch.setattr("head.LARGE", large)
    cfg, device, seen = change(replace(cfg, muon_lr=0.01)), torch.device("cpu"), []
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
    """Forward and backward, whatever number of tokens is masked, and to the same weights."""
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
            parts = batches.micro_batches(ids, meta, cfg, step)
            train.train_step(model, optimizers, parts, step, cfg, device)
        trained.append(list(model.parameters()))
    assert counter.frame_count == 1
    torch.testing.assert_close(*trained)


COUNT_PAGES = """
import resource, sys, torch, head
sys.argv[1] == "keep" and head.keep_freed_memory()
used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = [used(), [torch.ones(2**24 - 2**12 * i).sum() for i in range(10)]][0]
print((used() - before) * resource.getpagesize() / 2**26)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.slow
@pytest.mark.parametrize("mode, low, high", [("free", 5, 11), ("keep", 0, 1.5)])
def test_freed_memory_is_used_again(mode, low, high):
    """Ten tensors of 64 MB, one after the other, need the pages of one instead of all ten. Each is
    a little smaller than the one before: an aligned block is cut from a larger one, so the next of
    the same size would fit only if a neighbour is free."""
    argv = [sys.executable, "-c", COUNT_PAGES, mode]
    pages = float(subprocess.check_output(argv, cwd=ROOT, env=ENVIRONMENT))
    assert low < pages < high


# --------------------------------------------------------------------------------------------------
# The log and the bar


class Clock:
    """train.time.time; `seconds` is what it shows."""

    def __init__(self, monkeypatch):
        self.seconds = 0.0
        monkeypatch.setattr(train.time, "time", lambda: self.seconds)

    def advance(self, seconds):
        self.seconds += seconds


def test_speeds_count_no_validation_and_all_steps(cfg, monkeypatch):
    """Validation and saving between two lines of the log are not training."""
    clock = Clock(monkeypatch)
    do_before(monkeypatch, "train_step", lambda *a: clock.advance(1))
    do_before(monkeypatch, "bound", lambda *a: clock.advance(50))
    train.main(replace(cfg, steps=25, eval_every=3))
    assert set(records(cfg, "tokens_per_s").values()) == {8 * 32}
    assert read_checkpoint(cfg.out_dir)["seconds"] == 25


class Bar:
    """Stands in for tqdm: notes (the time, the time left that it shows) at every update."""

    def __init__(self, clock):
        self.clock, self.shown = clock, []

    def __call__(self, **options):
        return self

    def format_interval(self, seconds):
        return f"{seconds:.6f}"

    def set_postfix_str(self, text, refresh):
        self.shown.append((self.clock.seconds, float(re.search(r"([\d.]+) left", text)[1])))

    def update(self):
        pass

    close = update


def test_the_time_left_counts_steps_and_validations_to_come(cfg, monkeypatch):
    """Steps of 6 s, of which the first takes 100 s and does not count. Until a validation is timed,
    a window of it costs a third of a row of training: 6 / 8 / 3 s."""
    clock = Clock(monkeypatch)
    bar = Bar(clock)
    monkeypatch.setattr(runs, "tqdm", bar)
    monkeypatch.setattr(train, "progress", bar)
    cfg = replace(cfg, steps=20, eval_every=6, eval_windows=8)  # validates at 6, 12, 18 and 20
    sets = {"val": (np.zeros(25 * 32 - 5),)}  # 25 windows, the last of them shorter
    run = SimpleNamespace(cfg=cfg, val_sets=sets, bar=bar, first=0, timed=0.0, per_window=0.0)
    run.status = ""

    def left(step, seconds):
        run.step, clock.seconds = step, seconds
        runs.show_progress(run)
        return bar.shown[-1][1]

    left(1, 100)
    assert left(5, 124) == 15 * 6 + (4 * 8 + 25) * 0.25
    run.per_window = 0.5
    assert left(7, 136) == 13 * 6 + (3 * 8 + 25) * 0.5
    run.cfg = replace(cfg, eval_windows=0)  # all windows each time, and none after the last step
    assert left(8, 142) == 12 * 6 + 3 * 25 * 0.5
    sets["val_data"] = (np.zeros(4 * 32),)  # a second set
    assert left(9, 148) == 11 * 6 + 3 * (25 + 4) * 0.5


@pytest.fixture(params=[(0, 8), (0, 0), (12, 8)], ids=["new", "all windows", "resumed"])
def progress(request, cfg, monkeypatch):
    """{step: (seconds left as shown, as they came)} of a run of 25 steps that validates every 6.
    The first step takes 1000 s and the others 24 s; a window of validation takes 1 s, a third of
    one of the 8 rows of a step."""
    first, eval_windows = request.param
    cfg = replace(cfg, eval_windows=eval_windows, steps=25, samples=0)
    if first:
        train.main(replace(cfg, steps=first))
    clock, bound, started = Clock(monkeypatch), train.bound, []
    bar = Bar(clock)
    bar.write = lambda text, file: None
    monkeypatch.setattr(train, "tqdm", bar)
    monkeypatch.setattr(runs, "tqdm", bar)
    monkeypatch.setattr(train, "progress", bar)

    def step(*args):
        clock.advance(24 if started else 1000)
        started.append(args)

    def validate(*args, **options):
        result = bound(*args, **options)
        clock.advance(result["forwards"])
        return result

    do_before(monkeypatch, "train_step", step)
    monkeypatch.setattr(train, "bound", validate)
    train.main(cfg, resume=first > 0)
    assert len(bar.shown) == cfg.steps - first
    return {first + i + 1: (left, clock.seconds - at) for i, (at, left) in enumerate(bar.shown)}


def test_the_time_left_is_exact_from_the_second_step_on(progress):
    later = [step for step in progress if step - 1 in progress]
    between = [step for step in later if step % 6]  # no validation follows
    assert len(between) > 8
    for step in between:
        left, actual = progress[step]
        assert left == actual, step


def test_the_time_left_counts_the_validation_that_follows(progress):
    for step in (18, 24):
        left, actual = progress[step]
        assert left == actual


def test_wandb_gets_the_log_offline(cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    train.main(replace(cfg, wandb=True))
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
