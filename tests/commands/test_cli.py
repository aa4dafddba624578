"""The command line, and bad data, folders and checkpoints: one clear line on stderr that says what
is allowed, exit code 2, nothing lost. test_bad_arguments.py has the table of bad arguments."""

import importlib
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, make_corpus, refused, rewrite_meta, save, tiny_run

import common
import evaluate
import sample
import train
from configs import CONFIGS, Config, as_ar
from data import runs
from data.checkpoints import read_checkpoint
from data.command_line import from_cli
from model import count_parameters
from tasks import convert

# --------------------------------------------------------------------------------------------------
# Configs from the command line


@pytest.mark.slow
def test_every_field_has_a_flag_and_every_config_is_valid():
    for name, make in CONFIGS.items():
        cfg, _ = from_cli([name])
        assert cfg == replace(make(), out_dir=f"out/{name}") and cfg.mask_id == cfg.vocab_size
        flags = [f"--{f.name}={getattr(cfg, f.name)}" for f in fields(Config)]
        assert from_cli([name, *flags])[0] == cfg
        changed = replace(cfg, steps=7, tied=True)
        assert from_cli([name, "--steps", "7", "--tied=TRUE"])[0] == changed
    assert from_cli([])[0].out_dir == "out/pydocs_mdlm" and Config().mask_id == Config().vocab_size


def test_resume_takes_the_fields_of_the_run(tmp_path, capsys):
    out, flags = f"--out_dir={tmp_path}", [("resume", ""), ("overwrite", "")]
    read = lambda *argv: from_cli([out, *argv], flags=flags)[0]
    fresh = replace(CONFIGS["pydocs_mdlm"](), out_dir=str(tmp_path))
    saved = replace(fresh, steps=60, lr=0.5)
    assert read("--resume") == fresh
    (tmp_path / "config.json").write_text(json.dumps(asdict(saved)))
    assert read("--resume") == saved
    changed = replace(saved, steps=90, wandb=True)
    assert read("--resume", "--steps=90", "--wandb") == changed
    assert read().steps != 60
    (tmp_path / "config.json").write_text("{")
    refused(capsys, lambda: read("--resume"), "config.json: damaged")


@pytest.mark.parametrize(
    "argv, steps, warmup",
    [
        ("smdm_170 --flops=6", 11_226, 112),
        ("smdm_170", 18_710, 187),
        ("smdm_170 --flops=100", 187_107, 1871),
        ("smdm_170 --flops=60 --short_rows=0.01", 112_828, 1128),
        ("smdm_1028 --flops=100", 30_932, 309),
        ("smdm_1028 --flops=3300 --batch_size=1024 --short_rows=0.01", 256_478, 2564),
        ("smdm_170_ar --steps=50 --flops=6", 50, 112),
    ],
)
def test_smdms_steps_follow_from_its_budget(argv, steps, warmup):
    """The rows of SMDM's scripts; --steps overrides the budget."""
    cfg, _ = from_cli(argv.split())
    assert (cfg.steps, cfg.warmup) == (steps, warmup) and cfg.out_dir == f"out/{argv.split()[0]}"


@pytest.mark.parametrize("data, bos", [("owt", True), ("lm1b", True), ("text8", False)])
def test_baselines_differ_from_mdlm_as_in_its_paper(data, bos):
    """AR: half the steps, and a given BOS where the data has one."""
    mdlm, sedd, ar = (CONFIGS[f"{data}_{loss}"]() for loss in ("mdlm", "sedd", "ar"))
    assert 2 * ar.steps == mdlm.steps and ar.bos == bos and ar.causal and not ar.cond_dim
    assert sedd == replace(mdlm, loss="sedd", time_cond=True)


@pytest.mark.parametrize("size, upstream", [
    ("tiny", 80_061_266), ("small", 169_627_218), ("medium", 424_477_010),
])  # fmt: skip
def test_named_sizes_are_upstreams(size, upstream):
    """MDLM's counts, which for small and medium are SEDD's too: they have a row and a bias more in
    the head, for MASK. A size changes nothing but the size."""
    for base in ("owt_mdlm", "owt_sedd"):
        cfg = CONFIGS[f"{base}_{size}"]()
        assert count_parameters(cfg) == upstream - cfg.n_embd - 1
        shape = {name: getattr(cfg, name) for name in ("n_layer", "n_head", "n_embd")}
        assert cfg == replace(CONFIGS[base](), **shape)
    families = [f"{data}_{loss}" for data in ("owt", "lm1b", "text8")
                for loss in ("mdlm", "sedd", "d3pm", "ar")]  # fmt: skip
    assert all(f"{name}_{size}" in CONFIGS for name in families)
    assert CONFIGS["lm1b_ar_small"]() == CONFIGS["lm1b_ar"]()


def test_lm1bs_d3pm_differs_from_mdlm_as_in_its_paper():
    d3pm = dict(loss="d3pm", T=1000, zero_masking=False, carry_over=False, time_cond=True)
    assert CONFIGS["lm1b_d3pm"]() == replace(CONFIGS["lm1b_mdlm"](), **d3pm)


@pytest.mark.parametrize(
    "main, word", [(sample.main, "--infill"), (evaluate.main, "--passes"), (None, "--resume")]
)
def test_help_is_the_docstring(main, word, capsys):
    flags = [("resume", "continue from ckpt.pt")]
    with pytest.raises(SystemExit) as e:
        main(["--help"]) if main else from_cli(["--help"], doc=train.__doc__, flags=flags)
    out = capsys.readouterr().out
    assert e.value.code == 0 and word in out and re.search(r"python \w+\.py", out)


def read_help(capsys, *argv):
    with pytest.raises(SystemExit) as e:
        from_cli([*argv, "--help"], doc=train.__doc__)
    assert e.value.code == 0
    return capsys.readouterr().out


def test_help_shows_the_values_of_the_named_config(capsys):
    mdlm, smdm = read_help(capsys, "owt_mdlm"), read_help(capsys, "smdm_170", "--flops=3")
    assert re.search(r"--lr float +\[0.0003\]", mdlm) and "[openwebtext_wrap1024]" in mdlm
    assert "[out/owt_mdlm]" in mdlm and "--flops" not in mdlm
    assert "arguments of smdm_170:\n  --flops FLOPS" in smdm and "[slimpajama]" in smdm
    for text in (mdlm, smdm, read_help(capsys)):
        titles = re.findall(r"^(\w+):$", text, re.M)
        assert titles == ["options", "data", "model", "diffusion", "optimisation", "run"]
        assert text.count("smdm_N") == 2 and len(re.findall("smdm_[0-9]+_ar", text)) == 0
        known = set(re.findall(r"^  --(\w+) ", text, re.M))
        assert known >= {f.name for f in fields(Config)}


def test_options_may_be_written_with_dashes():
    cfg, _ = from_cli(["--batch-size=32", "--micro-batch", "8", "--data=my-own"])
    assert (cfg.batch_size, cfg.micro_batch, cfg.data) == (32, 8, "my-own")


def test_vocab_size_is_that_of_the_data(corpus, tmp_path, capsys):
    """Unless it is on the command line, or the run that is resumed has another."""
    data = f"--data={corpus}"
    assert from_cli([data])[0].vocab_size == 27 and from_cli(["owt_mdlm", data])[0].vocab_size == 27
    assert from_cli([data, "--vocab_size=30"])[0].vocab_size == 30
    assert from_cli([])[0].vocab_size == 2048
    saved = replace(CONFIGS["pydocs_mdlm"](), out_dir=str(tmp_path), data=str(corpus))
    (tmp_path / "config.json").write_text(json.dumps(asdict(saved)))
    argv = ["--resume", f"--out_dir={tmp_path}"]
    assert from_cli(argv, flags=[("resume", "")])[0].vocab_size == 2048


# --------------------------------------------------------------------------------------------------
# Progress, where stderr is no terminal


def test_progress_is_a_line_every_two_seconds(monkeypatch):
    clock, out = SimpleNamespace(seconds=0.0), io.StringIO()
    monkeypatch.setattr("tqdm.std.time", lambda: clock.seconds)

    def work(seconds):
        for _ in common.progress(range(100), file=out, desc="work"):
            clock.seconds += seconds / 100
        return out.getvalue().splitlines()

    assert work(1.9) == []
    lines = work(10)
    assert len(lines) == 4 and all(line.startswith("work: ") for line in lines)
    assert "\r" not in out.getvalue() and " 20%" in lines[0] and "00:02<00:0" in lines[0]
    bar = common.progress(file=out, desc="waiting")
    for _ in range(3):  # nothing is counted, yet it says that work goes on
        clock.seconds += 3
        bar.update(0)
    assert len(out.getvalue().splitlines()) == 7


def test_a_stage_of_convert_shows_its_time(monkeypatch, capsys):
    """Also when it fails; what takes no time shows nothing."""
    ticks = itertools.count(step=3.0)
    with convert.show_time("reading a"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("tqdm.std.time", lambda: next(ticks))
    with pytest.raises(ValueError), convert.show_time("reading b"):
        time.sleep(0.5)
        raise ValueError
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2 and all(re.fullmatch(r"reading b: 00:\d\d", line) for line in lines)


@pytest.mark.parametrize(
    "command, word",
    [
        ("sample CKPT --num 3 --batch_size 2", " tokens]"),
        ("evaluate CKPT", "batch"),
        ("tasks.judge CKPT AR --num 3", "judging"),
        ("data.prepare text --input TEXT --out OUT/new", "training the tokenizer"),
        ("data.prepare text --input TEXT --out OUT/new", "encoding train"),
        ("data.prepare text --input TEXT --out OUT/new", "checking val"),
        ("train --data=WORDS --steps=3 --n_embd=32 --out_dir=OUT/run", "loss"),
        (
            "train --data=WORDS --steps=3 --n_embd=32 --out_dir=OUT/run",
            "1024/1024",
        ),  # tokens of samples
    ],
)
def test_long_work_shows_progress(command, word, corpus, checkpoint, tmp_path, capsys, monkeypatch):
    """With a clock that runs so fast that all work is long."""
    ticks = itertools.count(step=3.0)
    monkeypatch.setattr("tqdm.std.time", lambda: next(ticks))
    ar = save(tmp_path / "ar.pt", as_ar(tiny_run(corpus)))
    (tmp_path / "text").write_text("a text that is repeated. " * 99)
    paths = dict(CKPT=checkpoint, AR=ar, TEXT=tmp_path / "text", OUT=tmp_path, WORDS=corpus)
    name, *argv = re.sub("|".join(paths), lambda m: str(paths[m[0]]), command).split()
    module = importlib.import_module(name)
    (module.command_line if name == "train" else module.main)(argv)
    assert word in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Data


@pytest.fixture
def run(corpus, tmp_path):
    return replace(tiny_run(corpus), out_dir=str(tmp_path / "run"))


def refuses(capsys, cfg, *words, **flags):
    """train.main refuses cfg."""
    refused(capsys, lambda: train.main(cfg, **flags), *words)


def edit_meta(**values):
    return lambda folder: rewrite_meta(folder, **values)


def write_large_ids(folder):
    ids = np.fromfile(folder / "train.bin", np.uint16)
    ids[:] = 27
    ids.tofile(folder / "train.bin")
    rewrite_meta(folder)


def change_a_byte(folder):
    whole = (folder / "val.bin").read_bytes()
    (folder / "val.bin").write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])


def truncate(folder):
    with open(folder / "val.bin", "r+b") as f:
        f.truncate(101)


def overwrite_meta(text):
    return lambda folder: (folder / "meta.json").write_text(text)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda folder: (folder / "train.bin").unlink(), ["train.bin", "0 bytes"]),
        (truncate, ["val.bin", "101 bytes"]),
        (change_a_byte, ["val.bin: damaged", "sha256", "prepare"]),
        (write_large_ids, ["train.bin", "token id 27", "vocab_size is 27"]),
        (lambda folder: (folder / "meta.json").unlink(), ["meta.json", "prepare"]),
        (overwrite_meta("{"), ["meta.json", "damaged"]),
        (overwrite_meta("[]"), ["meta.json", "damaged"]),
        (edit_meta(dtype="float99"), ["meta.json", "damaged"]),
        (edit_meta(vocab_size=50), ["vocab_size 50", "--vocab_size=50"]),
        (edit_meta(wrap=64), ["64", "seq_len is 32"]),
    ],
)
def test_bad_data_is_refused_before_anything_is_written(run, tmp_path, capsys, change, words):
    folder = shutil.copytree(run.data, tmp_path / "bad")
    change(folder)
    refuses(capsys, replace(run, data=str(folder)), *words)
    assert not Path(run.out_dir).exists()


@pytest.mark.parametrize(
    "name, command",
    [
        ("text8", "text8"),
        ("openwebtext_wrap512", "openwebtext --wrap 512"),
        ("gsm8k_wrap128", "gsm8k --wrap 128"),
        ("gsm8k_wrap256", "text --input FILE... --out gsm8k_wrap256"),  # 256 is plain gsm8k
        ("mine", "text --input FILE... --out mine"),
    ],
)
def test_missing_data_says_how_to_prepare_it(run, capsys, name, command, monkeypatch, tmp_path):
    monkeypatch.setattr("data.corpus.ROOT", tmp_path)
    words = f"{name}/meta.json", f"python data/prepare.py {command}\n"
    refuses(capsys, replace(run, data=name), *words)


def test_a_row_longer_than_the_data_is_refused(run, capsys):
    long = replace(run, seq_len=8000)
    refuses(capsys, long, "train.bin", "4000 tokens", "seq_len 8000")


# --------------------------------------------------------------------------------------------------
# Batches, devices and folders


def test_batches_that_do_not_divide_are_refused(run, capsys, monkeypatch):
    refuses(capsys, replace(run, micro_batch=3), "batch_size=8", "micro_batch=3")
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(train.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(train.dist, "get_world_size", lambda: 3)
    refuses(capsys, run, "batch_size=8", "processes, 3")


@pytest.mark.parametrize(
    "device, words",
    [("cuda:9", []), ("abacus", []), ("mps", ["float64", "--device=cpu"]), ("meta", ["cuda:N"])],
)
def test_a_device_that_is_not_there_is_refused(run, capsys, device, words):
    refuses(capsys, replace(run, device=device), f"device={device}", *words)


def test_bfloat16_on_a_cpu_that_emulates_it_warns_in_one_line(capfd, monkeypatch):
    common.warn_once.cache_clear()
    cpu = torch.device("cpu")
    for capability, lines in (("avx512_bf16", 0), ("avx2", 1)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda c=capability: {c: True})
        assert [common.compute_dtype(cpu, "bfloat16") for _ in range(3)] == ["bfloat16"] * 3
        assert common.compute_dtype(cpu, "auto") == ("float32" if lines else "bfloat16")
        assert common.compute_dtype(cpu, "float32") == "float32"
        err = capfd.readouterr().err
        assert err.count("\n") == lines and ("slower than float32" in err) == bool(lines)


def test_an_out_dir_that_cannot_be_made_is_refused(run, capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    refuses(capsys, replace(run, out_dir=str(tmp_path / "file")), "out_dir", "file")
    (tmp_path / "full" / "log.jsonl").mkdir(parents=True)
    refuses(capsys, replace(run, out_dir=str(tmp_path / "full")), "out_dir", overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_in_which_another_process_trains_is_refused(run, capsys):
    train.main(replace(run, steps=8))
    other = open(run.out_dir + "/log.jsonl", "a")
    runs.fcntl.flock(other, runs.fcntl.LOCK_EX)
    refuses(capsys, run, run.out_dir, "another process", resume=True)
    other.close()
    train.main(run, resume=True)


def test_wandb_that_does_not_start_is_refused(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    refuses(capsys, replace(run, wandb=True), "wandb", "offline")
    assert not Path(run.out_dir).exists()


def read_folder(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def test_an_existing_run_is_never_lost(run, capsys):
    train.main(run)
    before = read_folder(run.out_dir)
    refuses(capsys, run, run.out_dir, "--resume", "--overwrite")
    refuses(capsys, run, "ckpt.pt", "step 12 of 12", "--steps", resume=True)
    refuses(capsys, run, "--resume", "--overwrite", resume=True, overwrite=True)
    wider = replace(run, n_embd=64, steps=20)
    refuses(capsys, wider, "ckpt.pt", "n_embd=32, not 64", resume=True)
    refuses(capsys, replace(run, seq_len=8000), "seq_len 8000", overwrite=True)
    assert read_folder(run.out_dir) == before
    train.main(replace(run, steps=4), overwrite=True)
    assert read_checkpoint(run.out_dir)["step"] == 4 and read_folder(run.out_dir) != before


def test_a_field_newer_than_the_checkpoint_has_its_default(run, capsys):
    train.main(run)
    path = Path(run.out_dir) / "ckpt.pt"
    state = torch.load(path, weights_only=True)
    del state["config"]["time_draw"]  # as an older version wrote it
    torch.save(state, path)
    changed = replace(run, time_draw="iid", steps=20)
    refuses(capsys, changed, "time_draw=stratified, not iid", resume=True)


def test_a_run_resumes_only_with_its_data(run, capsys, tmp_path):
    train.main(run)
    other = make_corpus(tmp_path / "other", characters="zyxwvutsrqponmlkjihgfedcba ")
    longer = make_corpus(tmp_path / "longer", n=5000)
    moved = shutil.copytree(run.data, tmp_path / "moved")
    with_data = lambda folder: replace(run, data=str(folder), steps=20)
    refuses(capsys, with_data(other), f"{other}", "another tokenizer", "ckpt.pt", resume=True)
    refuses(capsys, with_data(longer), f"{longer}", "not the data", "ckpt.pt", resume=True)
    train.main(with_data(moved), resume=True)


def test_converted_weights_do_not_resume(run, capsys):
    train.main(run)
    path = Path(run.out_dir) / "ckpt.pt"
    torch.save(torch.load(path, weights_only=True) | {"optimizer": []}, path)
    refuses(capsys, replace(run, steps=20), "ckpt.pt", "converted", resume=True)


# --------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.fixture
def files(checkpoint, tmp_path):
    """A folder of files that are not our checkpoints, or not whole."""
    whole = checkpoint.read_bytes()
    (tmp_path / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"model": {}, "ema": {}}, tmp_path / "foreign.pt")
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "pickled.pt")
    state = torch.load(checkpoint, weights_only=True)
    torch.save(state | {"config": state["config"] | {"n_layer": 3}}, tmp_path / "misfit.pt")
    torch.save(state | {"config": state["config"] | {"flux": 1}}, tmp_path / "future.pt")
    torch.save(state | {"tokenizer": {"kind": "runes"}}, tmp_path / "runes.pt")
    return tmp_path


@pytest.mark.parametrize("main", [sample.main, evaluate.main])
@pytest.mark.parametrize(
    "name, words",
    [
        ("absent.pt", ["no such checkpoint"]),
        ("", ["ckpt.pt: no such checkpoint"]),
        ("truncated.pt", ["damaged"]),
        ("text.pt", ["damaged, or not a checkpoint"]),
        ("foreign.pt", ["not a checkpoint of this project"]),
        ("pickled.pt", ["not a checkpoint of plain tensors"]),
        ("misfit.pt", ["do not fit", "n_layer=3"]),
        ("future.pt", ["flux"]),
    ],
)
def test_bad_checkpoints_are_refused(files, capsys, main, name, words):
    path = str(files / name)
    refused(capsys, lambda: main([path]), path, *words)


def test_an_unknown_tokenizer_is_refused(files, capsys):
    refused(capsys, lambda: sample.main([str(files / "runes.pt")]), "runes", "gpt2")


def test_evaluation_on_data_of_another_tokenizer_is_refused(checkpoint, capsys, tmp_path):
    other = make_corpus(tmp_path / "other", characters="zyxwvutsrqponmlkjihgfedcba ")
    argv = [str(checkpoint), "--data", str(other)]
    refused(capsys, lambda: evaluate.main(argv), f"{other}", "another tokenizer")


# --------------------------------------------------------------------------------------------------
# What train.py checks before it imports torch


def run_train_after(lines):
    code = f"import runpy, sys\n{lines}\ntry:\n    runpy.run_path('train.py')\n"
    code += "finally:\n    assert sys.modules.get('torch') is None\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    return done.stderr


@pytest.mark.parametrize("package", ["numpy", "tokenizers", "tqdm", "torch"])
def test_train_names_a_missing_package_before_it_imports_torch(package):
    error = run_train_after(f"sys.modules[{package!r}] = None")  # as if it were not installed
    assert error == f"error: {package} is missing: pip install -r requirements.txt\n"


def test_train_names_the_python_it_needs():
    error = run_train_after("sys.version_info = (3, 10, 4)")
    assert error == "error: Python 3.11 or later is needed; this is 3.10\n"
