"""A run that can be studied: kept checkpoints, a second validation set, texts at every validation,
the check before step 1, wandb and tensorboard."""

import json
import math
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CHARACTERS, LETTERS, make_corpus, refused, save, tiny_run

import data.trackers as trackers
import train
from configs import Config, as_ar
from data.checkpoints import load, read_checkpoint
from data.corpus import read_split
from data.tokenizer import load_tokenizer
from evaluate import bound
from sample import generate


@pytest.fixture
def cfg(corpus, tmp_path):
    return replace(tiny_run(corpus), out_dir=str(tmp_path / "run"))


def lines(cfg):
    return [json.loads(line) for line in (Path(cfg.out_dir) / "log.jsonl").read_text().splitlines()]


def weights(cfg, name="ckpt.pt"):
    return read_checkpoint(Path(cfg.out_dir) / name)["model"]


# --------------------------------------------------------------------------------------------------
# Checkpoints and validation


def test_checkpoints_are_kept_and_go_with_their_run(cfg):
    train.main(replace(cfg, keep_every=5))
    kept = sorted(path.name for path in Path(cfg.out_dir).glob("step_*.pt"))
    assert (
        kept == ["step_10.pt", "step_5.pt"] and load(Path(cfg.out_dir) / "step_5.pt")[0].step == 5
    )
    train.main(replace(cfg, steps=5, out_dir=f"{cfg.out_dir}_5", lr_decay="constant"))
    same = weights(cfg, "step_5.pt"), weights(replace(cfg, out_dir=f"{cfg.out_dir}_5"))
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])
    train.main(replace(cfg, keep_every=0), overwrite=True)
    assert not list(Path(cfg.out_dir).glob("step_*.pt"))


def test_a_second_validation_set(cfg, tmp_path, capsys):
    """Its figure is its corpus's bound; best.pt goes by the first set."""
    other = make_corpus(tmp_path / "other", n=2000)
    train.main(replace(cfg, val_data=str(other), eval_windows=0))
    found = [line for line in lines(cfg) if "val_data" in line]
    assert [line["step"] for line in found] == [6, 12, 12] and "final" in found.pop()
    assert all("val" in line for line in found)
    model, saved = load(cfg.out_dir)
    ids, meta = read_split(str(other), "val", saved)
    want = bound(model, ids, meta, saved, "other", batch_size=8)["nats"]
    assert found[-1]["val_data"]["nats"] == pytest.approx(want, rel=1e-6)
    assert found[-1]["val_data"]["nats"] != found[-1]["val"]["nats"]
    foreign = make_corpus(tmp_path / "foreign", characters=LETTERS[:20] + "QRSTUVW")
    bad = replace(cfg, val_data=str(foreign), out_dir=str(tmp_path / "new"))
    refused(capsys, lambda: train.main(bad), "val_data=", "another tokenizer")
    assert not Path(bad.out_dir).exists()


def test_the_check_before_step_1_changes_no_weight_and_logs_nothing(cfg, monkeypatch):
    judge = save(Path(cfg.out_dir).parent / "judge.pt", as_ar(cfg))
    train.main(replace(cfg, dropout=0.1, val_samples=2, judge=str(judge)))
    assert min(line["step"] for line in lines(cfg)) == 6
    plain = replace(cfg, dropout=0.1, out_dir=f"{cfg.out_dir}_plain")
    monkeypatch.setattr(train, "check_validation", lambda run: None)
    train.main(plain)
    assert all(torch.equal(tensor, weights(plain)[name]) for name, tensor in weights(cfg).items())


def test_faults_show_before_anything_is_written(cfg, capsys, monkeypatch):
    judge = replace(cfg, val_samples=2, judge="gone.pt")
    refused(capsys, lambda: train.main(judge), "gone.pt: no such checkpoint")
    real = train.bound
    broken = lambda *args, **options: real(*args, **options) | {"nats": math.nan}
    monkeypatch.setattr(train, "bound", broken)
    refused(capsys, lambda: train.main(cfg), "val before step 1: nan nats per token")
    assert not Path(cfg.out_dir).exists()
    with pytest.raises(ValueError, match="judge=gpt2: needs val_samples"):
        Config(judge="gpt2")


def test_validations_log_texts_and_their_judgement(cfg):
    """The texts are those of sample.py for the averaged weights at that step."""
    judge = save(Path(cfg.out_dir).parent / "judge.pt", as_ar(cfg))
    train.main(replace(cfg, val_samples=3, judge=str(judge), keep_every=6))
    found = {line["step"]: line for line in lines(cfg) if "samples" in line}
    assert list(found) == [6, 12]
    for step, line in found.items():
        model, saved = load(Path(cfg.out_dir) / f"step_{step}.pt")
        texts = generate(model, load_tokenizer(CHARACTERS), saved, 3, seed=cfg.seed)
        assert line["samples"] == texts and len(set(texts)) == 3
        assert 1 < line["judge"]["gen_ppl"] and 0 < line["judge"]["entropy"] < math.log(32)
    assert found[6]["samples"] != found[12]["samples"]


# --------------------------------------------------------------------------------------------------
# wandb and tensorboard


class Wandb(types.SimpleNamespace):
    """Stands in for the package: `inits` are the options of init, `records` what was logged."""

    def __init__(self):
        super().__init__(inits=[], records=[], Table=lambda columns, data: ("table", data))

    def init(self, **options):
        self.inits.append(options)
        id = options.get("id") or f"id{len(self.inits)}"
        log = lambda record, step: self.records.append((step, record))
        return types.SimpleNamespace(id=id, log=log, finish=lambda exit_code: None)


def test_wandb_keeps_one_run_across_resumes_and_gets_a_table(cfg, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb := Wandb())
    for variable in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.delenv(variable, raising=False)
    train.main(replace(cfg, wandb=True, val_samples=2))
    train.main(replace(cfg, wandb=True, val_samples=2, steps=18), resume=True)
    train.main(replace(cfg, wandb=True), overwrite=True)
    first, resumed, new = wandb.inits
    assert (first["project"], first["name"], first["id"]) == ("nanomdlm", "run", None)
    assert resumed["id"] == "id1" and resumed["resume"] == "allow" and new["id"] is None
    tables = [(step, record["samples"]) for step, record in wandb.records if "samples" in record]
    assert [step for step, _ in tables] == [6, 12, 18]
    assert tables[0][1][0] == "table" and [row[0] for row in tables[0][1][1]] == [6, 6]


@pytest.mark.parametrize("variable, option", [
    ("WANDB_PROJECT", "project"), ("WANDB_NAME", "name"), ("WANDB_RUN_ID", "id"),
    ("WANDB_RESUME", "resume"),
])  # fmt: skip
def test_wandbs_own_variables_win(cfg, monkeypatch, variable, option):
    monkeypatch.setenv(variable, "mine")
    assert option not in trackers.wandb_options(cfg, 0)
    monkeypatch.delenv(variable)
    assert option in trackers.wandb_options(cfg, 0)


def test_tensorboard_gets_the_log(cfg, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append(("open", folder, purge_step))
            self.flush = self.close = lambda: None

        def add_scalar(self, name, value, step):
            written.append((name, float(value), step))

        def add_text(self, name, value, step):
            written.append((name, value, step))

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    train.main(replace(cfg, tensorboard=True, val_samples=2))
    train.main(replace(cfg, tensorboard=True, steps=18), resume=True)
    folder = str(Path(cfg.out_dir) / "tensorboard")
    assert [row for row in written if row[0] == "open"] == [
        ("open", folder, 1),
        ("open", folder, 13),
    ]
    log = {(key, line["step"]): line[key] for line in lines(cfg) for key in line if key != "step"}
    scalars = {(name, step): value for name, value, step in written if name != "open"}
    assert scalars["loss", 10] == log["loss", 10]
    assert scalars["val/nats", 12] == log["val", 12]["nats"]
    assert scalars["samples/1", 6] == log["samples", 6][1]


def test_tensorboard_that_is_missing_is_refused(cfg, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    words = "tensorboard=True", "pip install tensorboard"
    refused(capsys, lambda: train.main(replace(cfg, tensorboard=True)), *words)
    assert not Path(cfg.out_dir).exists()


def test_the_check_leaves_a_network_without_average_in_training(cfg, monkeypatch):
    modes, step = [], train.train_step
    monkeypatch.setattr(
        train, "train_step", lambda net, *a: (modes.append(net.training), step(net, *a))[1]
    )
    train.main(replace(cfg, ema=0.0, val_samples=1))
    assert modes == [True] * cfg.steps
