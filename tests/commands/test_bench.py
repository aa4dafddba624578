"""bench.py: its commands run and its counts are right; times are not tested."""

import json
import math
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_run
from torch.utils.flop_counter import FlopCounterMode

import common
import head
import train
from configs import Config, as_ar, as_d3pm, as_sedd
from data import batches
from model import flops_per_token
from tasks import bench, report


def rows(capsys, *args):
    bench.main([*map(str, args), "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


SMALL = "--n_layer=2 --n_head=2 --n_embd=32 --batch_size=4 --micro_batch=2 --device=cpu".split()
SMALL.append("--dtype=float32")


@pytest.mark.slow
def test_training_reports_speed_memory_and_work_of_every_case(capsys):
    args = ["train", *SMALL, "--vocab_size=50", "--sweep=seq_len=16,64", "--repeats=2", "--profile"]
    got = rows(capsys, *args)
    cases, parts = got[:2], got[2:]
    assert [r["case"] for r in cases] == ["seq_len=16", "seq_len=64"]
    for r, L in zip(cases, (16, 64)):
        gflop = 4 * L * 6 * (2 * (12 * 32**2 + 2 * 32 * L) + r["masked"] * 32 * 50) / 1e9
        assert r["gflop"] == pytest.approx(gflop) and 0.35 < r["masked"] < 0.65
        assert r["tokens_per_s"] == pytest.approx(4 * L / (r["ms"] / 1e3))
        assert r["tflops"] == pytest.approx(r["gflop"] / r["ms"]) and r["dtype"] == "float32"
        assert r["of_peak"] == pytest.approx(r["tflops"] / r["peak_float32"])
        assert 0 < r["of_peak"] < 1 and 0 < r["MB"] < 500
        assert r["times_gflop"] == pytest.approx(r["gflop"] / cases[0]["gflop"])
        assert r["times_ms"] == pytest.approx(r["ms"] / cases[0]["ms"])
        share = {p["part"]: p["share"] for p in parts if p["case"] == r["case"]}
        assert sum(share.values()) == pytest.approx(1)
        assert share.keys() <= {*bench.PARTS, "elementwise and the rest"}
        expected = {"head and loss", "optimizer", "average", "clipping", "attention", "matrices"}
        assert share.keys() > expected


@pytest.mark.parametrize("names, part", [
    (["aten::mm", "SlicedCrossEntropyBackward"], "head and loss"),
    (["aten::mm", "MmBackward0"], "matrices"),
    (["aten::mul_", "aten::_foreach_mul_", "train"], "clipping"),
    (["aten::copy_", "Optimizer.step#AdamW.step"], "optimizer"),
    (["aten::bmm", "aten::matmul"], "attention"),
    (["aten::fill_", "aten::embedding_dense_backward"], "embedding"),
    (["aten::gelu"], "elementwise and the rest"),
])  # fmt: skip
def test_an_operation_belongs_to_the_part_that_it_is_called_in(names, part):
    event = None
    for name in reversed(names):
        event = SimpleNamespace(name=name, cpu_parent=event)
    assert bench.find_part(event) == part


@pytest.mark.parametrize("sliced", [True, False])
def test_the_parts_of_a_step_of_this_network(sliced, monkeypatch):
    """The matrix products of a step are counted in the right part, whether the head slices or
    stores its logits. PARTS has names of torch and of head.py, which change with them."""
    monkeypatch.setattr(head, "LARGE", 0 if sliced else head.LARGE)
    cfg = Config(
        vocab_size=50, seq_len=32, n_embd=32, n_head=2, n_layer=2, cond_dim=0, batch_size=8,
        micro_batch=8, dtype="float32", device="cpu", muon_lr=0.02, ema=0.9, grad_clip=1e-3,
    )  # fmt: skip
    products, parts, find_part = Counter(), set(), bench.find_part

    def count(event):
        part = find_part(event)
        products[part] += event.name in ("aten::mm", "aten::addmm", "aten::bmm")
        parts.add(part)
        return part

    monkeypatch.setattr(bench, "find_part", count)
    with bench.ThreadPoolExecutor(1) as pool:
        step = bench.make_step(cfg, torch.device("cpu"), pool)
        times = bench.profile_parts(step, lambda: None, cuda=False)
    assert times.keys() == parts > {"average", "clipping", "embedding", "optimizer", "attention"}
    assert products.keys() >= {"head and loss", "matrices"} and not products["embedding"]
    blocks = 2 * 4  # linear layers; backward multiplies twice for each
    assert products["head and loss"] == 3 * 4 * sliced  # three steps; the logits twice
    assert products["matrices"] == 3 * 3 * (blocks + (not sliced))
    assert products["optimizer"] > 0  # Muon's


@pytest.mark.slow
def test_a_larger_case_takes_more_memory_and_has_it_for_itself(capsys):
    """49 MB of parameters, gradients, average and AdamW's two states, beside a small case. Rows are
    short, since the peak of many logits varies by 100 MB from run to run."""
    args = "--seq_len=16", "--sweep=vocab_size=50,40000", "--repeats=1"
    small, large = rows(capsys, "train", *SMALL, *args)
    states = 5 * 4 * 2 * 32 * 40_000 / 2**20
    assert 0.9 * states < large["MB"] - small["MB"] < 2 * states


def test_a_step_does_the_work_that_flops_per_token_says():
    """Torch's counter on train.py's own step, within 2 percent, which adaLN and the time embedding
    take. In bfloat16, where attention is written out: the counter does not know its kernel."""
    as_smdm = lambda cfg: replace(cfg, mlp="swiglu", norm="rms", tied=True)
    size = dict(vocab_size=300, seq_len=32, n_embd=64, n_head=2, cond_dim=8)
    for change in (lambda cfg: cfg, as_sedd, as_d3pm, as_smdm):
        cfg = change(Config(**size, batch_size=8, micro_batch=4))
        cfg = replace(cfg, dtype="bfloat16", muon_lr=0.0)
        ids, device = np.arange(10_000) % 300, torch.device("cpu")
        meta = dict(wrap=0, pad=None, given=False)
        model, ema, optimizers = train.build(cfg, meta, device)
        parts = batches.micro_batches(ids, meta, cfg, 1)
        with FlopCounterMode(display=False) as counter:
            train.train_step(model, optimizers, parts, 1, cfg, device)
        masked = sum((b[3] == cfg.mask_id).sum().item() for b in parts) / (8 * 32)
        ours = flops_per_token(cfg, masked) * 8 * 32
        assert counter.get_total_flops() == pytest.approx(ours, rel=0.02)


@pytest.mark.parametrize("native", [True, False])
def test_no_peak_is_measured_in_an_emulated_dtype(native, monkeypatch):
    """On a CPU without instructions for bfloat16, of_peak of a case in bfloat16 is unknown."""
    answers = {1: (0.1, 0.5, 7.0), 2: (0.1, 0.5, 7.0)}

    class Processes:
        __enter__ = lambda self: lambda name, n: answers[n]
        __exit__ = lambda self, *error: None

    measured = []
    monkeypatch.setattr(common, "multiplies_bfloat16", lambda: native)
    monkeypatch.setattr(bench, "start_processes", lambda target, cases: Processes())
    monkeypatch.setattr(
        bench, "measure_matmul", lambda device, dtype: measured.append(dtype) or 1e12
    )
    base = Config(device="cpu")
    cases = {dtype: replace(base, dtype=dtype) for dtype in ("auto", "bfloat16")}
    (auto, bfloat16), _ = bench.bench_train(cases, 1, False)
    assert measured == ["float32", "bfloat16"][: 1 + native]
    assert auto["dtype"] == measured[-1] and auto["of_peak"] == pytest.approx(auto["tflops"])
    assert bfloat16["dtype"] == "bfloat16" and math.isnan(bfloat16["of_peak"]) != native


@pytest.mark.parametrize("args, words", [
    (["--sweep", "colour=red"], "--sweep colour=red"),
    (["--sweep", "seq_len"], "--sweep seq_len"),
    (["--sweep", "seq_len=16,many"], "many"),
    (["--batch_size=6", "--micro_batch=4"], "batch_size=6"),
    (["--device=cuda:77"], "cuda:77"),
    (["--repeats=0"], "--repeats 0"),
    (["owt_mdml"], "owt_mdml"),
    (["--vocab_size=2000000000", "--n_embd=4096"], "pydocs_mdlm: [enforce fail"),
])  # fmt: skip
def test_training_cases_that_cannot_run_end_in_one_line(args, words, capsys):
    with pytest.raises(SystemExit) as e:
        bench.main(["train", *args])
    err = [line for line in capsys.readouterr().err.splitlines() if "repeat/s" not in line]
    assert e.value.code == 2 and words in err[0] and len(err) == 1


def test_sampling_counts_calls_and_head_rows(checkpoint, capsys):
    args = "--steps", 50, "--batch_size", 4, "--repeats", 1
    by_name = {r["sampler"]: r for r in rows(capsys, "sample", checkpoint, *args)}
    assert by_name.keys() == bench.SAMPLERS.keys()
    assert by_name["ddpm"]["times_faster"] == 1 and by_name["ddpm"]["calls"] <= 50
    for name in ("ddpm_cache", "first_hitting"):
        assert by_name[name]["calls"] <= 32 and by_name[name]["head_rows"] == 4 * 32
    assert by_name["ddpm"]["head_rows"] > 10 * 4 * 32


def test_sampling_over_steps_and_lengths(checkpoint, capsys):
    args = "--steps 2 50 --length 8 32 --repeats 1 --samplers first_hitting ddpm_cache".split()
    got = rows(capsys, "sample", checkpoint, "--batch_size", 3, *args)
    settings = [(s, L) for s in (2, 50) for L in (8, 8, 32, 32)]
    assert [(r["steps"], r["length"]) for r in got] == settings
    for r in got:
        limit = r["length"] if r["sampler"] == "first_hitting" else min(r["length"], r["steps"])
        assert 0 < r["calls"] <= limit and r["head_rows"] == 3 * r["length"]
        assert r["times_faster"] == 1 or r["sampler"] == "ddpm_cache"


def test_no_ema_measures_the_raw_weights(checkpoint, capsys):
    args = "evaluate", checkpoint, "--repeats", 2
    averaged, again, raw = (rows(capsys, *args, *more)[2] for more in ([], [], ["--no_ema"]))
    assert averaged == again and averaged["bits_per_char"] != raw["bits_per_char"]


@pytest.mark.slow
def test_semi_ar_counts_the_calls_of_its_windows(checkpoint, capsys):
    args = "--samplers", "first_hitting", "--repeats", 1
    batch, alone, *strides = rows(capsys, "semi_ar", checkpoint, *args)
    assert batch["calls"] == 32 and alone["calls"] == 16 * 32  # per token of all rows, or of one
    assert [r["case"].split()[-1] for r in strides] == ["8", "16", "24", "31"]
    assert all(r["calls"] == 16 * 32 == r["tokens"] for r in strides)  # each is revealed once


def test_one_by_one_the_texts_are_those_of_the_batch(checkpoint, capsys, monkeypatch):
    """And not one text sixteen times: a text's number decides how often the network is called."""
    seen, plain = [], report.row_generators
    record = lambda seed, rows: seen.append(list(rows)) or plain(seed, rows)
    monkeypatch.setattr(report, "row_generators", record)
    rows(capsys, "semi_ar", checkpoint, "--steps", 2, "--repeats", 1)
    _, batch, *alone = seen[:18]  # after the warm-up
    assert batch == list(range(16)) and alone == [[i] for i in range(16)]


@pytest.mark.slow
def test_ar_models_are_measured_with_their_own_sampler(corpus, tmp_path, capsys):
    cfg = replace(as_ar(tiny_run(corpus)), bos=True, samples=0, out_dir=str(tmp_path / "ar"))
    train.main(cfg)
    capsys.readouterr()
    (row,) = rows(capsys, "sample", cfg.out_dir, "--repeats", 1, "--batch_size", 2)
    assert row["sampler"] == "ar" and row["calls"] == 31
    assert len(rows(capsys, "semi_ar", cfg.out_dir, "--repeats", 1)) == 6
    for args, words in (
        (["sample", cfg.out_dir, "--samplers", "ddpm"], "--sampler ddpm"),
        (["semi_ar", cfg.out_dir, "--samplers", "ar", "ddpm"], "takes one"),
        (["evaluate", cfg.out_dir], "loss=ar"),
    ):
        with pytest.raises(SystemExit) as e:
            bench.main(args)
        err = capsys.readouterr().err
        assert e.value.code == 2 and words in err and err.count("\n") == 1


def test_estimators_agree_and_are_ranked(checkpoint, capsys):
    iid, mdlm, ours, reported = rows(capsys, "evaluate", checkpoint, "--repeats", 6)
    for other in (iid, mdlm):
        distance = abs(other["bits_per_char"] - ours["bits_per_char"])
        assert distance < 4 * (iid["std"] + reported["std"])
    assert ours["forwards_for_equal_error"] == 1 < iid["forwards_for_equal_error"]


@pytest.mark.parametrize("args", [
    "sing CKPT", "sample CKPT --steps 8 0", "sample CKPT --length 8 33", "semi_ar CKPT --steps 8 9",
    "evaluate CKPT --length 8", "evaluate CKPT --repeats 1",
])  # fmt: skip
def test_bad_arguments(args, checkpoint, capsys):
    with pytest.raises(SystemExit) as e:
        bench.main(args.replace("CKPT", str(checkpoint)).split())
    assert e.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_default_output_is_a_table(checkpoint, capsys):
    bench.main(["sample", str(checkpoint), "--steps", "4", "--repeats", "1"])
    assert capsys.readouterr().out.splitlines()[0].split()[:2] == ["sampler", "steps"]


def test_rows_are_aligned_and_every_key_has_a_column():
    rows = [dict(name="a", calls=1234, seconds=0.123456), dict(name="long", loss=2.0)]
    head, first, second = report.format_rows(rows, as_json=False).splitlines()
    assert head == "name  calls  seconds  loss"
    assert first == "a     1,234   0.1235      " and second == f"{'long':25}2"
    assert [json.loads(line) for line in report.format_rows(rows, True).splitlines()] == rows


def test_cpu_time_is_measured_with_the_processors_clock(monkeypatch):
    """The option selects the clock, and the clock that is given measures the steps."""
    seen = []
    note = lambda cases, repeats, profile, clock: seen.append(clock) or []
    monkeypatch.setattr(bench, "bench_train", note)
    for argv in ([], ["--cpu_time"]):
        bench.main(["train", *argv])
    assert seen == [time.perf_counter, time.process_time]
    asked, answers = iter([2, 0]), []
    pipe = SimpleNamespace(recv=lambda: next(asked), send=answers.append)
    step = lambda cfg, device, pool: lambda: 0.5
    monkeypatch.setattr(bench, "make_step", step)
    ticks = iter([10.0, 17.0])
    bench.serve_training(pipe, SimpleNamespace(device="cpu"), lambda: next(ticks), 1)
    assert answers[0][:2] == (3.5, 0.5)  # seconds per step of two
