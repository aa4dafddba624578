"""peers.py and upstream.py, on a project that has MDLM's names and does next to nothing and, where
they have been cloned, on the real ones."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks import peers

ROOT = Path(peers.__file__).parents[1]
MDLM = """
import time
import torch
import hydra.utils, lightning as L, torchmetrics, transformers, dataloader
import flash_attn.layers.rotary
from timm.scheduler import CosineLRScheduler

class Ema:
    def update(self, parameters):
        self.seen = len(list(parameters))
    def copy_to(self, parameters):
        for p in parameters:
            p.data.zero_()

class Loss:
    pass

class Net(torch.nn.Module):
    def __init__(self, V):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(V + 1))
    def forward(self, x, sigma):
        return self.bias.expand(*x.shape, -1)

class Diffusion(L.LightningModule):
    def __init__(self, config, tokenizer):
        super().__init__()
        self.config, self.V = config, tokenizer.vocab_size
        self.backbone, self.noise, self.ema = Net(self.V), torch.nn.Module(), Ema()
    def _loss(self, x, mask):
        time.sleep(0.02)
        assert mask.shape == x.shape and x.max() < self.V
        loss = Loss()
        loss.loss = -self.backbone(x, None).log_softmax(-1).gather(-1, x[..., None]).mean()
        return loss
    def _sample(self):
        x = torch.zeros(self.config.loader.eval_batch_size, self.config.model.length).long()
        cached = self.config.sampling.predictor == "ddpm_cache"
        for _ in range(self.config.sampling.steps // (2 if cached else 1)):
            self.backbone(x, None)
        time.sleep(0.1)
        return x
"""
SMALL = "--vocab_size 27 --seq_len 32 --n_layer 1 --batch_size 2".split()


@pytest.fixture
def clones(tmp_path):
    (tmp_path / "mdlm").mkdir()
    (tmp_path / "mdlm" / "diffusion.py").write_text(MDLM)  # a name that ours has, too
    return tmp_path


def rows(clones, what, *args):
    """Run in another process: `learn` leaves only upstream's modules behind."""
    command = [sys.executable, "-m", "tasks.peers", what, "--clones", str(clones), *SMALL]
    command += [*map(str, args), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


HIDDEN = """
import importlib.util, sys
from pathlib import Path
assert sys.path[0] == ""
import diffusion, data.batches, extra.muon
from tasks import report, upstream
ours = {name for name, module in sys.modules.items() if module.__name__ != "__main__" and
        str(getattr(module, "__file__", "") or "").startswith(sys.argv[1])}
assert {"diffusion", "common", "train", "data.batches", "extra.muon", "tasks.report"} <= ours, ours
upstream.enter_clone(Path(sys.argv[2]))
assert not ours & sys.modules.keys(), ours & sys.modules.keys()
for name in ("diffusion", "data", "extra", "tasks"):  # a package of ours becomes theirs
    assert __import__(name).THEIRS, name
assert importlib.util.find_spec("head") is None  # only ours has it
"""


def test_our_modules_are_hidden_from_upstream(tmp_path):
    """From a process in our root whose sys.path has it as "", as an interpreter's has."""
    for name in ("diffusion", "data", "extra", "tasks"):
        (tmp_path / f"{name}.py").write_text("THEIRS = True")
    command = [sys.executable, "-c", HIDDEN, str(ROOT), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_learning_ends_after_its_seconds_and_is_measured_by_our_bound(clones, corpus):
    args = "--data", corpus, "--seconds", 1, "--lr", 0.1, "--dtype", "float32"
    (row,) = rows(clones, "learn", *args)
    assert 1 <= row["seconds"] < 2 and 5 < row["steps"] <= 50 and row["data"] == str(corpus)
    uniform = math.log2(27)  # its average, put back, answers every letter alike
    assert row["average"] == pytest.approx(uniform, abs=1e-5) and row["last"] < uniform - 0.1


@pytest.mark.slow
def test_training_in_turns(clones):
    ours, theirs = rows(clones, "train", "--sides", "mdlm", "--dtype", "float32", "--repeats", 2)
    assert (ours["side"], theirs["side"]) == ("ours float32", "mdlm float32")
    assert theirs["seconds"] > 0.02
    assert theirs["tokens_per_s"] == pytest.approx(64 / theirs["seconds"])
    assert ours["over_ours_float32"] == 1 and ours["MB"] > 0 and theirs["over_ours_float32"] > 0
    untrained = math.log(28)  # MASK is among its answers
    assert theirs["loss"] == pytest.approx(untrained, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", peers.FAST_DTYPES)
def test_sampling_in_turns(clones, dtype):
    got = rows(clones, "sample", "--steps", 40, "--dtype", dtype, "--repeats", 1)
    calls = {r["side"].removesuffix(f" {dtype}"): r["calls"] for r in got}
    assert calls.keys() == {"ours", "mdlm ddpm_cache", "mdlm ddpm"} and 0 < calls["ours"] <= 32
    assert calls["mdlm ddpm"] == 40 and calls["mdlm ddpm_cache"] == 20
    assert all(r["seconds"] > 0.1 for r in got if r["side"].startswith("mdlm"))


@pytest.mark.parametrize("args, words", [
    (["train"], "has no folder mdlm"),
    (["train", "--sides", "nanodd"], "has no folder nanodd"),
    (["train", "--n_layer", "0"], "n_layer=0"),
    (["sample", "--steps", "0"], "--steps 0"),
    (["learn", "--data", "nowhere"], "nowhere"),
    (["learn", "--dtype", "float32", "bfloat16"], "--dtype float32 bfloat16"),
    (["learn", "--steps", "7"], "--steps: not for learn"),
    (["train", "--lr", "1"], "--lr: not for train"),
    (["sample", "--sides", "sedd"], "--sides: not for sample"),
])  # fmt: skip
def test_what_cannot_run_ends_in_one_line(args, words, clones, tmp_path, capsys):
    at = tmp_path if args[0] != "train" or "--n_layer" in args else tmp_path / "mdlm"
    for name in ("nanodd", "sedd", "smdm") if "--n_layer" in args else ():
        (tmp_path / name).mkdir()
    with pytest.raises(SystemExit) as e:
        peers.main([*args, "--clones", str(at)])
    err = capsys.readouterr().err
    assert e.value.code == 2 and words in err and err.count("\n") == 1


DEFAULTS = """
import common
common.multiplies_bfloat16 = lambda: NATIVE
from tasks import peers
print([options["dtype"] for options in peers.MODES.values()])
"""


@pytest.mark.slow
@pytest.mark.parametrize("native, dtypes", [
    (True, [["float32", "bfloat16"], ["float32", "bfloat16"], ["bfloat16"]]),
    (False, [["float32"], ["float32"], ["float32"]]),
])  # fmt: skip
def test_no_mode_emulates_bfloat16_by_default(native, dtypes):
    command = [sys.executable, "-c", DEFAULTS.replace("NATIVE", str(native))]
    assert eval(subprocess.check_output(command, cwd=ROOT)) == dtypes


@pytest.mark.slow
def test_the_real_projects():
    """Every project trains, and its loss after three steps of warm-up is near that of a guess among
    27 letters."""
    at = Path(os.environ.get("NANOMDLM_CLONES", ROOT.parent))
    missing = ", ".join(name for name in peers.PROJECTS if not (at / name).is_dir())
    if missing:
        pytest.skip(f"no clone of {missing} in {at}; NANOMDLM_CLONES=DIR says where they are")
    got = {r["side"]: r for r in rows(at, "train", "--repeats", 1)}
    assert len(got) == 5 * len(peers.FAST_DTYPES)
    assert all(r["seconds"] > 0 and r["MB"] > 0 for r in got.values())
    for dtype in peers.FAST_DTYPES:
        guess = {name: got[f"{name} {dtype}"]["loss"] / math.log(27) for name in peers.PROJECTS}
        assert 0.5 < guess["mdlm"] < 2 and 0.3 < guess["smdm"] < 3 and 0 < guess["sedd"] < 300
        assert 0 < guess["nanodd"] < 2  # a T-th of the bound, and a part of the cross-entropy
    got = {r["side"]: r for r in rows(at, "sample", "--repeats", 1, "--steps", 20)}
    assert got["mdlm ddpm float32"]["calls"] == 21 >= got["mdlm ddpm_cache float32"]["calls"] > 1
