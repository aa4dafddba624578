"""Bad input: one clear line on stderr that names what is wrong and what is allowed, exit code 2, nothing lost."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_corpus, tiny_run

import common
import evaluate
import sample
import train
from common import read_checkpoint
from configs import CONFIGS, Config, from_cli
from data import runs

HERE = Path(__file__).parents[2]


def refused(capsys, call, *words):
    """Runs call(), which must end in exit code 2 and one line of stderr that holds every word."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        call()
    out, err = capsys.readouterr()
    assert e.value.code == 2 and not out
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err, err


@pytest.mark.parametrize(
    "argv, words",
    [
        (["owt_mdln"], ["owt_mdln", *CONFIGS]),
        (["--stepz=3"], ["--stepz=3", "steps", "seq_len"]),
        (["--steps=many"], ["--steps", "int", "many"]),
        (["--steps=1.5"], ["--steps", "1.5"]),
        (["--lr=fast"], ["--lr", "float"]),
        (["--tied=perhaps"], ["--tied", "perhaps"]),
        (["--loss=sedd2"], ["loss='sedd2'", "mdlm", "d3pm"]),
        (["--schedule=quadratic"], ["schedule='quadratic'", "linear", "cosine"]),
        (["--dtype=float16"], ["dtype", "bfloat16"]),
        (["--steps=0"], ["steps=0", "at least 1"]),
        (["--T=-1"], ["T=-1", "at least 0"]),
        (["--lr=-1"], ["lr=-1"]),
        (["--lr=nan"], ["lr=nan", "at least 0 and below"]),
        (["--lr=0"], ["lr=0", "above 0"]),
        (["--eps=0"], ["eps=0", "above 0"]),
        (["--min_lr=1"], ["min_lr=1", "at most lr"]),
        (["--seed=-1"], ["seed=-1"]),
        (["--seed=99999999999999999999"], ["seed=9", "2**31"]),
        (["--T=100000000000000000000"], ["T=1", "2**31"]),
        (["--out_dir="], ["out_dir", "empty"]),
        (["--dropout=1"], ["dropout=1", "below 1"]),
        (["--n_head=3"], ["n_embd=256", "n_head", "6"]),
        (["--loss=d3pm"], ["loss=d3pm", "T"]),
        (["--aux_ce=0.1"], ["aux_ce", "d3pm"]),
        (["--zero_masking=False"], ["zero_masking=False", "d3pm"]),
        (["--carry_over=False"], ["carry_over=False", "d3pm"]),
        (["text8_d3pm", "--carry_over=False"], ["aux_ce=0.05", "carry_over=True"]),
        (["--loss=sedd", "--T=10"], ["T=10", "must be 0", "sedd"]),
        (["--loss=ar"], ["causal=False", "must be True"]),
        (["--causal"], ["causal=True", "loss=ar"]),
        (["owt_mdlm", "--loss=ar", "--causal"], ["cond_dim=128", "must be 0"]),
        (["--time_draw=sobol"], ["time_draw='sobol'", "stratified", "counts"]),
        (["--time_draw=counts", "--T=10"], ["time_draw=counts", "T=0"]),
        (["--time_draw=importance", "--time_law=uniform"], ["importance", "t_min"]),
        (["--time_draw=importance", "--t_min=0.001"], ["importance", "time_law=uniform"]),
        (["--t_min=1"], ["t_min=1", "below 1"]),
        (["--short_rows=1"], ["short_rows=1", "below 1"]),
        (["--norm=batch"], ["norm='batch'", "layer", "rms"]),
        (["--mlp=relu"], ["mlp='relu'", "gelu", "swiglu"]),
        (["--flops=10"], ["--flops=10", "steps"]),
        (["smdm_170", "--flops=0"], ["flops=0", "above 0"]),
        (["smdm_170", "--flops=much"], ["--flops", "float", "much"]),
        (["smdm_171"], ["smdm_171", "smdm_170"]),
        (["--time_cond=True", "--cond_dim=0"], ["time_cond", "cond_dim"]),
        (["owt_mdlm", "text8_mdlm"], ["text8_mdlm"]),
    ],
)
def test_bad_configs(capsys, argv, words):
    refused(capsys, lambda: from_cli(argv), *words)


def test_resume_takes_the_fields_of_the_run(tmp_path, capsys):
    out, flags = f"--out_dir={tmp_path}", [("resume", ""), ("overwrite", "")]
    saved = replace(CONFIGS["pydocs_mdlm"](), steps=60, lr=0.5, out_dir=str(tmp_path))
    assert from_cli([out, "--resume"], flags=flags)[0] == replace(
        CONFIGS["pydocs_mdlm"](), out_dir=str(tmp_path)
    )
    (tmp_path / "config.json").write_text(json.dumps(asdict(saved)))
    assert from_cli([out, "--resume"], flags=flags)[0] == saved
    assert from_cli([out, "--resume", "--steps=90", "--wandb"], flags=flags)[0] == replace(
        saved, steps=90, wandb=True
    )
    assert from_cli([out], flags=flags)[0].steps != 60
    (tmp_path / "config.json").write_text("{")
    refused(capsys, lambda: from_cli([out, "--resume"], flags=flags), "config.json", "not a config")


@pytest.mark.parametrize(
    "argv, steps, warmup",
    [
        (["smdm_170", "--flops=6"], 11_226, 112),
        (["smdm_170"], 18_710, 187),
        (["smdm_170", "--flops=100"], 187_107, 1871),
        (["smdm_170", "--flops=60", "--short_rows=0.01"], 112_828, 1128),
        (["smdm_1028", "--flops=100"], 30_932, 309),
        (["smdm_1028", "--flops=3300", "--batch_size=1024", "--short_rows=0.01"], 256_478, 2564),
        (["smdm_170_ar", "--steps=50", "--flops=6"], 50, 112),
    ],
)
def test_smdms_steps_follow_from_its_budget(argv, steps, warmup):
    """The rows of SMDM's scripts; a field that is given has the last word."""
    cfg, _ = from_cli(argv)
    assert (cfg.steps, cfg.warmup) == (steps, warmup) and cfg.out_dir == f"out/{argv[0]}"


def test_ar_baselines_see_half_the_steps_and_are_given_bos_where_there_is_one():
    for data, bos in (("owt", True), ("lm1b", True), ("text8", False)):
        mdlm, ar = CONFIGS[f"{data}_mdlm"](), CONFIGS[f"{data}_ar"]()
        assert 2 * ar.steps == mdlm.steps and ar.bos == bos and ar.causal and not ar.cond_dim
        sedd = CONFIGS[f"{data}_sedd"]()
        assert sedd == replace(mdlm, loss="sedd", time_cond=True)
    d3pm = CONFIGS["lm1b_d3pm"]()
    assert d3pm == replace(
        CONFIGS["lm1b_mdlm"](),
        loss="d3pm",
        T=1000,
        zero_masking=False,
        carry_over=False,
        time_cond=True,
    )


def test_every_field_has_a_flag_and_every_config_is_valid():
    for name, make in CONFIGS.items():
        cfg, _ = from_cli([name])
        assert cfg == replace(make(), out_dir=f"out/{name}") and cfg.mask_id == cfg.vocab_size
        flags = [f"--{f.name}={getattr(cfg, f.name)}" for f in fields(Config)]
        assert from_cli([name, *flags])[0] == cfg
        assert from_cli([name, "--steps", "7", "--tied=TRUE"])[0] == replace(
            cfg, steps=7, tied=True
        )
    assert from_cli([])[0].out_dir == "out/pydocs_mdlm" and Config().mask_id == Config().vocab_size


@pytest.fixture
def run(corpus, tmp_path):
    return replace(tiny_run(corpus), out_dir=str(tmp_path / "run"))


def bad_data(tmp_path, corpus, change):
    folder = tmp_path / "bad"
    shutil.copytree(corpus, folder)
    change(folder)
    return str(folder)


def edit_meta(folder, **values):
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def beyond(folder):
    ids = np.fromfile(folder / "train.bin", np.uint16)
    ids[:] = 27
    ids.tofile(folder / "train.bin")


def truncate(folder):
    with open(folder / "val.bin", "r+b") as f:
        f.truncate(101)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda f: (f / "train.bin").unlink(), ["train.bin", "0 bytes"]),
        (truncate, ["val.bin", "101 bytes"]),
        (beyond, ["train.bin", "token id 27", "vocab_size is 27"]),
        (lambda f: (f / "meta.json").unlink(), ["meta.json", "prepare"]),
        (lambda f: (f / "meta.json").write_text("{"), ["meta.json", "damaged"]),
        (lambda f: (f / "meta.json").write_text("[]"), ["meta.json", "damaged"]),
        (lambda f: edit_meta(f, dtype="float99"), ["meta.json", "damaged"]),
        (lambda f: edit_meta(f, vocab_size=50), ["vocab_size 50", "--vocab_size=50"]),
        (lambda f: edit_meta(f, wrap=64), ["64", "seq_len is 32"]),
    ],
)
def test_bad_data(run, tmp_path, corpus, capsys, change, words):
    cfg = replace(run, data=bad_data(tmp_path, corpus, change))
    refused(capsys, lambda: train.main(cfg), *words)
    assert not Path(cfg.out_dir).exists()


@pytest.mark.parametrize(
    "name, how",
    [
        ("text8", "python data/prepare.py text8\n"),
        ("openwebtext_wrap512", "python data/prepare.py openwebtext --wrap 512\n"),
        ("gsm8k_wrap128", "python data/prepare.py gsm8k --wrap 128\n"),
        (
            "gsm8k_wrap256",
            "python data/prepare.py text --input FILE... --out gsm8k_wrap256\n",
        ),  # 256: gsm8k
        ("mine", "python data/prepare.py text --input FILE... --out mine\n"),
    ],
)
def test_missing_data_says_how_to_prepare_it(run, capsys, name, how, monkeypatch, tmp_path):
    monkeypatch.setattr("data.corpus.ROOT", tmp_path)
    refused(capsys, lambda: train.main(replace(run, data=name)), f"{name}/meta.json", how)


def test_a_row_longer_than_the_data(run, capsys):
    refused(
        capsys,
        lambda: train.main(replace(run, seq_len=8000)),
        "train.bin",
        "4000 tokens",
        "seq_len 8000",
    )


def test_batches_that_do_not_divide(run, capsys, monkeypatch):
    refused(
        capsys, lambda: train.main(replace(run, micro_batch=3)), "batch_size=8", "micro_batch=3"
    )
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(train.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(train.dist, "get_world_size", lambda: 3)
    refused(capsys, lambda: train.main(run), "batch_size=8", "processes, 3")


def test_a_device_that_is_not_there(run, capsys):
    refused(capsys, lambda: train.main(replace(run, device="cuda:9")), "device=cuda:9")
    refused(capsys, lambda: train.main(replace(run, device="abacus")), "device=abacus")
    refused(
        capsys,
        lambda: train.main(replace(run, device="mps")),
        "device=mps",
        "float64",
        "--device=cpu",
    )
    refused(capsys, lambda: train.main(replace(run, device="meta")), "device=meta", "cuda:N")


def test_an_out_dir_that_cannot_be_made(run, capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(
        capsys, lambda: train.main(replace(run, out_dir=str(tmp_path / "file"))), "out_dir", "file"
    )
    (tmp_path / "full" / "log.jsonl").mkdir(parents=True)
    refused(
        capsys,
        lambda: train.main(replace(run, out_dir=str(tmp_path / "full")), overwrite=True),
        "out_dir",
    )
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_in_which_another_process_trains(run, capsys):
    train.main(replace(run, steps=8))
    other = open(run.out_dir + "/log.jsonl", "a")
    runs.fcntl.flock(other, runs.fcntl.LOCK_EX)
    refused(capsys, lambda: train.main(run, resume=True), run.out_dir, "another process")
    other.close()
    train.main(run, resume=True)


def test_wandb_that_does_not_start(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    refused(capsys, lambda: train.main(replace(run, wandb=True)), "wandb", "offline")
    assert not Path(run.out_dir).exists()


def test_an_existing_run_is_never_lost(run, capsys):
    train.main(run)
    before = {p.name: p.read_bytes() for p in Path(run.out_dir).iterdir()}
    unchanged = lambda: before == {p.name: p.read_bytes() for p in Path(run.out_dir).iterdir()}
    refused(capsys, lambda: train.main(run), run.out_dir, "--resume", "--overwrite")
    refused(capsys, lambda: train.main(run, resume=True), "ckpt.pt", "step 12 of 12", "--steps")
    refused(capsys, lambda: train.main(run, resume=True, overwrite=True), "--resume", "--overwrite")
    state = torch.load(before_path := Path(run.out_dir) / "ckpt.pt", weights_only=True)
    del state["config"]["time_draw"]  # as an older version wrote it
    torch.save(state, before_path)
    changed = replace(run, time_draw="iid", steps=20)
    refused(capsys, lambda: train.main(changed, resume=True), "time_draw=stratified, not iid")
    before = {p.name: p.read_bytes() for p in Path(run.out_dir).iterdir()}
    changed = replace(run, n_embd=64, steps=20)
    refused(capsys, lambda: train.main(changed, resume=True), "ckpt.pt", "n_embd=32, not 64")
    bad = replace(run, seq_len=8000)
    refused(
        capsys, lambda: train.main(bad, overwrite=True), "seq_len 8000"
    )  # checked before anything is lost
    assert unchanged()
    train.main(replace(run, steps=4), overwrite=True)
    assert read_checkpoint(run.out_dir + "/ckpt.pt")["step"] == 4 and not unchanged()


def test_resume_with_other_data(run, capsys, tmp_path):
    train.main(run)
    other = make_corpus(tmp_path / "other", characters="zyxwvutsrqponmlkjihgfedcba ")
    changed = replace(run, data=str(other), steps=20)
    refused(
        capsys, lambda: train.main(changed, resume=True), str(other), "another tokenizer", "ckpt.pt"
    )
    longer = make_corpus(tmp_path / "longer", n=5000)
    changed = replace(run, data=str(longer), steps=20)
    refused(
        capsys, lambda: train.main(changed, resume=True), str(longer), "not the data", "ckpt.pt"
    )
    path = Path(run.out_dir) / "ckpt.pt"
    torch.save(
        torch.load(path, weights_only=True) | {"optimizer": []}, path
    )  # as convert.py leaves it
    refused(capsys, lambda: train.main(replace(run, steps=20), resume=True), "ckpt.pt", "converted")
    shutil.rmtree(run.out_dir)
    train.main(run)
    moved = shutil.copytree(run.data, tmp_path / "moved")
    train.main(replace(run, data=str(moved), steps=20), resume=True)


# ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(checkpoint, tmp_path):
    """Things that are not checkpoints of ours, or not whole."""
    whole = checkpoint.read_bytes()
    (tmp_path / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"model": {}, "ema": {}}, tmp_path / "foreign.pt")
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "pickled.pt")
    state = torch.load(checkpoint, weights_only=True)
    torch.save(state | {"config": state["config"] | {"n_layer": 3}}, tmp_path / "misfit.pt")
    torch.save(state | {"config": state["config"] | {"flux": 1}}, tmp_path / "future.pt")
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
def test_bad_checkpoints(files, capsys, main, name, words):
    path = str(files / name)
    refused(capsys, lambda: main([path]), path, *words)


@pytest.mark.parametrize(
    "args, words",
    [
        (["--steps", "0"], ["--steps 0", "at least 1"]),
        (["--steps", "x"], ["--steps", "int"]),
        (["--num", "0"], ["--num 0"]),
        (["--length", "0"], ["--length 0"]),
        (["--length", "33"], ["33 tokens", "32"]),
        (["--temperature", "-1"], ["--temperature"]),
        (["--temperature", "nan"], ["--temperature"]),
        (["--top_p", "0"], ["--top_p", "above 0"]),
        (["--top_p", "1.1"], ["--top_p"]),
        (["--sampler", "magic"], ["--sampler", "magic", "ddpm_cache", "first_hitting"]),
        (["--prompt", "Ünder 5"], ["--prompt", "'Ü'", "'5'"]),
        (["--prompt", "a" * 40], ["--prompt", "40 tokens", "32"]),
        (["--prompt", "abc", "--length", "2"], ["--prompt", "3 tokens", "2"]),
        (["--infill", "no hole"], ["--infill", "____", "[12]"]),
        (["--infill", "a[99]"], ["100 tokens", "32"]),
        (["--infill", "a[99999999999999]"], ["--infill", "____"]),
        (["--seed", "99999999999999999999"], ["--seed", "2**31"]),
        (["--steps", "9999999999"], ["--steps", "2**31"]),
        (["--infill", "a ____", "--prompt", "b"], ["--infill", "--prompt"]),
        (["--guidance", "-1"], ["--guidance -1", "at least 0"]),
        (["--guidance", "1", "--semi_ar"], ["--guidance", "--semi_ar"]),
        (["--window", "8"], ["--window", "--semi_ar"]),
        (["--stride", "8"], ["--stride", "--semi_ar"]),
        (["--semi_ar", "--window", "64"], ["--window 64", "at most", "32"]),
        (["--semi_ar", "--stride", "32"], ["--stride 32", "below the window, 32"]),
        (["--semi_ar", "--stride", "0"], ["--stride 0", "at least 1"]),
        (["--noise_removal", "none"], ["--noise_removal", "sampled", "greedy"]),
        (["--noise_removal", "greedy", "--sampler", "ar"], ["--noise_removal greedy", "no steps"]),
        (["--dtype", "int8"], ["--dtype", "float32"]),
        (["--device", "cuda:9"], ["cuda:9"]),
        (["--wat"], ["--wat"]),
    ],
)
def test_bad_sample_arguments(checkpoint, capsys, args, words):
    refused(capsys, lambda: sample.main([str(checkpoint), *args]), *words)


@pytest.mark.parametrize(
    "args, words",
    [
        (["--split", "dev"], ["dev", "train, val, test"]),
        (["--T", "-1"], ["--T -1", "at least 0"]),
        (["--passes", "0"], ["--passes 0"]),
        (["--seed", "99999999999999999999"], ["--seed", "2**31"]),
        (["--batch_size", "0"], ["--batch_size 0"]),
        (["--data", "nowhere/at/all"], ["nowhere/at/all/meta.json"]),
    ],
)
def test_bad_evaluate_arguments(checkpoint, capsys, args, words):
    refused(capsys, lambda: evaluate.main([str(checkpoint), *args]), *words)


def test_a_tokenizer_that_cannot_be_loaded(checkpoint, tmp_path, capsys):
    state = torch.load(checkpoint, weights_only=True)
    torch.save(state | {"tokenizer": {"kind": "runes"}}, tmp_path / "runes.pt")
    refused(capsys, lambda: sample.main([str(tmp_path / "runes.pt")]), "runes", "gpt2")


def test_evaluation_on_data_of_another_tokenizer(checkpoint, capsys, tmp_path):
    other = make_corpus(tmp_path / "other", characters="zyxwvutsrqponmlkjihgfedcba ")
    refused(
        capsys,
        lambda: evaluate.main([str(checkpoint), "--data", str(other)]),
        str(other),
        "another tokenizer",
    )


def test_help_is_the_docstring(capsys):
    for main, word in (
        (sample.main, "--infill"),
        (evaluate.main, "--passes"),
        (from_cli, "--resume"),
    ):
        with pytest.raises(SystemExit) as e:
            main(["--help"], **(dict(doc=train.__doc__) if main is from_cli else {}))
        out = capsys.readouterr().out
        assert e.value.code == 0 and word in out and re.search(r"python \w+\.py", out)


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


def test_train_names_what_is_missing_before_it_imports_torch(tmp_path):
    """Run as a newcomer would, with a package hidden: one line, the pip command, exit code 2, and quickly."""
    for package in ("numpy", "tokenizers", "tqdm", "torch"):
        code = f"""
import runpy, sys
sys.modules[{package!r}] = None  # as if it were not installed
try:
    runpy.run_path("train.py")
finally:
    assert sys.modules.get("torch") is None
"""
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"error: {package} is missing: pip install -r requirements.txt\n"


def test_train_names_the_python_it_needs():
    """`sys.version_info` is what an old interpreter would say; the lines that check it are old syntax, too."""
    code = "import sys; sys.version_info = (3, 10, 4); import runpy; runpy.run_path('train.py')"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert (
        done.returncode == 2
        and done.stderr == "error: Python 3.11 or later is needed; this is 3.10\n"
    )
