"""A run survives being killed anywhere; damaged and hostile files are refused in one line."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused, tiny_run, train_until

import train
from common import UserError
from configs import Config
from data import checkpoints
from data.checkpoints import load, read_checkpoint

ROOT = Path(train.__file__).parent


@pytest.fixture
def cfg(corpus, tmp_path):
    return replace(tiny_run(corpus), out_dir=str(tmp_path / "run"), muon_lr=0.02, samples=0)


def test_no_damaged_checkpoint_loads_with_a_changed_number(cfg, tmp_path, capsys):
    """One byte changed, anywhere: refused, or nothing that is read has changed."""
    train.main(cfg)
    whole = Path(cfg.out_dir, "ckpt.pt").read_bytes()
    state, damaged = read_checkpoint(cfg.out_dir), tmp_path / "damaged.pt"
    rng, found = np.random.default_rng(0), 0
    for i in rng.integers(0, len(whole), 100):
        damaged.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << rng.integers(8)]) + whole[i + 1 :])
        try:
            now = read_checkpoint(damaged)
        except UserError:
            found += 1
        else:
            same = [torch.equal(now[k][n], state[k][n]) for k in ("model", "ema") for n in state[k]]
            assert all(same) and now["config"] == state["config"] and now["step"] == state["step"]
    assert found > 80  # what is left are bytes of padding and of unused header fields
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        damaged.write_bytes(whole[:length])
        refused(capsys, lambda: read_checkpoint(damaged), "damaged")


def test_a_zip_bomb_is_refused_unread(tmp_path, capsys):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**8))
    refused(capsys, lambda: read_checkpoint(path), "compressed")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s["model"].update({"head.bias": s["model"]["head.bias"] * torch.nan}), "NaN"),
        (lambda s: s["model"].pop("head.bias"), "lacks the tensor head.bias"),
        (lambda s: s["model"].update(more=torch.zeros(1)), "has a tensor more"),
        (
            lambda s: s["model"].update({"head.bias": torch.zeros(3)}),
            "head.bias is torch.float32 (3,)",
        ),
        (lambda s: s["model"].update({"head.bias": torch.zeros(27, dtype=torch.long)}), "int64"),
        (lambda s: s.update(step=12.0), "step is float"),
        (lambda s: s.update(step=True), "step is bool"),
        (lambda s: s.pop("ema"), "ema is NoneType"),
        (lambda s: s["model"].update({"head.bias": "a"}), "model holds more than named tensors"),
        (lambda s: s["config"].update(n_layer=2.0), "n_layer=2.0: must be int"),
        (lambda s: s["config"].update(n_layer=10**6), "n_layer=1000000"),
        (lambda s: s["config"].update(seq_len=2**30), "seq_len"),
        (lambda s: s["config"].update(n_embd=2**16, n_head=2), "must be float"),
    ],
)
def test_a_checkpoint_must_fit_its_config(cfg, change, words, capsys):
    train.main(cfg)
    state = read_checkpoint(cfg.out_dir)
    change(state)
    torch.save(state, Path(cfg.out_dir) / "ckpt.pt")
    refused(capsys, lambda: load(cfg.out_dir, ema=False), words)


@pytest.mark.parametrize(
    "optimizer, name, value",
    [
        (0, "exp_avg", torch.zeros(1)),  # fused AdamW would read beyond it
        (0, "exp_avg_sq", torch.zeros(2, 2, dtype=torch.int64)),
        (0, "step", torch.zeros(5)),
        (1, "momentum_buffer", torch.zeros(3, 3)),
        (1, "momentum_buffer", "text"),
    ],
)
def test_moments_of_another_shape_do_not_crash_the_process(cfg, optimizer, name, value, capsys):
    train.main(cfg)
    path = Path(cfg.out_dir) / "ckpt.pt"
    state = read_checkpoint(path)
    state["optimizer"][optimizer]["state"][0][name] = value
    torch.save(state, path)
    longer = replace(cfg, steps=16)
    refused(capsys, lambda: train.main(longer, resume=True), "ckpt.pt")


def records(cfg):
    """log.jsonl without times."""
    lines = Path(cfg.out_dir, "log.jsonl").read_text().splitlines()
    return [json.dumps(json.loads(line) | {"tokens_per_s": 0}) for line in lines]


def test_a_run_killed_during_its_final_validation_finishes(cfg, monkeypatch, capsys):
    cfg = replace(cfg, steps=12, eval_windows=8)
    train.main(replace(cfg, out_dir=cfg.out_dir + "_whole"))
    real = train.validate

    def killed(run, windows):
        if not windows:  # the final one, on all windows
            raise KeyboardInterrupt
        return real(run, windows)

    monkeypatch.setattr(train, "validate", killed)
    with pytest.raises(KeyboardInterrupt):
        train.main(cfg)
    monkeypatch.undo()
    report = train.main(cfg, resume=True)
    whole = replace(cfg, out_dir=cfg.out_dir + "_whole")
    assert records(cfg) == records(whole) and report["nats"] > 0
    refused(capsys, lambda: train.main(cfg, resume=True), "already at step 12 of 12")


def test_the_log_is_exact_when_a_run_resumes_between_two_lines_of_it(cfg):
    """Saved at step 14, the loss logged at step 20 is the mean of steps 11 to 20."""
    cfg = replace(cfg, steps=24, save_every=7, eval_every=1000)
    train.main(replace(cfg, out_dir=cfg.out_dir + "_whole"))
    train_until(cfg, 17)
    assert read_checkpoint(cfg.out_dir)["losses"].shape == (1, 4)
    train.main(cfg, resume=True)
    assert records(cfg) == records(replace(cfg, out_dir=cfg.out_dir + "_whole"))


def test_a_checkpoint_is_replaced_only_by_a_complete_one(tmp_path, monkeypatch, capsys):
    path = tmp_path / "ckpt.pt"
    checkpoints.save_checkpoint(path, step=1)
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    call = lambda: checkpoints.save_checkpoint(path, step=2)
    refused(capsys, call, "No space left", "still the one before")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_training_outlives_its_terminal(cfg, tmp_path):
    """stdout and stderr closed, full, or a pipe that nobody reads: the run ends as always."""
    fields = {f: v for f, v in vars(cfg).items() if f != "out_dir"}
    for name, redirect in (
        ("closed", ">&- 2>&-"),
        ("full", ">/dev/full 2>/dev/full"),
        ("pipe", "| true"),
    ):
        out = tmp_path / name
        config = f"Config(**{fields}, out_dir='{out}')"
        code = f"from configs import Config; import train; train.main({config})"
        subprocess.run(["bash", "-c", f'"{sys.executable}" -c "$0" {redirect}', code], cwd=ROOT)
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert read_checkpoint(out)["step"] == cfg.steps and any("final" in line for line in lines)
        notes = [line["note"] for line in lines if "note" in line]
        assert len(notes) == len({note.split(":")[0] for note in notes})  # each said once
        assert notes and all("training continues" in note for note in notes), name


def test_training_outlives_wandb(cfg, monkeypatch):
    class Broken:
        def log(self, record, step):
            raise ConnectionError("no route")

        def finish(self, exit_code):
            raise ConnectionError("no route either")

    wandb = types.SimpleNamespace(init=lambda **kwargs: Broken())
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train.main(replace(cfg, wandb=True))
    lines = [json.loads(line) for line in Path(cfg.out_dir, "log.jsonl").read_text().splitlines()]
    assert [line["note"] for line in lines if "note" in line] == [
        "wandb: no route; training continues"
    ]
    assert "final" in lines[-1]


def test_sighup_does_not_end_a_run(cfg, monkeypatch):
    real = train.train_step
    monkeypatch.setattr(
        train, "train_step", lambda *a: (os.kill(os.getpid(), signal.SIGHUP), real(*a))[1]
    )
    train.main(cfg)
    assert read_checkpoint(cfg.out_dir)["step"] == cfg.steps


def test_a_log_with_foreign_bytes_does_not_stop_a_resume(cfg):
    train.main(cfg)
    log = Path(cfg.out_dir) / "log.jsonl"
    for junk in (b"\xff\xfe\n", b"[" * 100_000 + b"\n", b"[1]\n", b"null\n"):
        log.write_bytes(log.read_bytes() + junk)
    train.main(replace(cfg, steps=16), resume=True)
    assert json.loads(log.read_text().splitlines()[-1])["step"] == 16


def test_notes_in_the_log_stay_when_a_run_resumes(cfg):
    train.main(cfg)
    log = Path(cfg.out_dir) / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text('{"note": "stdout: closed; training continues"}\n' + "".join(lines))
    train.main(replace(cfg, steps=16), resume=True)
    assert "note" in log.read_text().splitlines()[0] and len(log.read_text().splitlines()) > len(
        lines
    )


def test_a_full_stdout_is_one_line(cfg):
    """Also when the output is so short that it is written at the end."""
    train.main(cfg)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    command = f'"{sys.executable}" sample.py {cfg.out_dir} --steps 2 >/dev/full'
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, "error: [Errno 28] No space left on device\n")


def test_every_field_that_has_a_comment_has_its_help():
    """The help is read from the source, which a formatter may spread over lines."""
    source = inspect.getsource(Config)
    assert not re.search(r"^    \w+: \w+ = \($", source, re.MULTILINE)
