"""A latent model from the command line: it trains, resumes, is evaluated, samples and is exported;
and tasks.latent's grammar."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import refused, tiny_run, train_until

import evaluate
import sample
import train
from configs import CONFIGS
from data import runs
from data.checkpoints import load, read_checkpoint
from data.corpus import read_split
from evaluate import bound
from extra.with_latent import Given, from_text
from tasks import convert, latent


@pytest.fixture(scope="module", params=[0.0, 1.0], ids=["deterministic", "noisy"])
def run(request, corpus, tmp_path_factory):
    """A finished run of a few steps."""
    out = tmp_path_factory.mktemp("latent") / "run"
    cfg = replace(
        tiny_run(corpus), latent_dim=4, kl_weight=request.param, samples=0, out_dir=str(out)
    )
    train.main(cfg)
    return cfg


def command(main, *args):
    return main([*map(str, args), "--device", "cpu"])


def test_the_configs_are_the_plain_ones_with_a_latent():
    plain, cfg = CONFIGS["owt_mdlm"](), CONFIGS["owt_mdlm_latent"]()
    assert replace(cfg, latent_dim=0) == plain and cfg.latent_dim == 32


def test_a_resumed_run_draws_the_same_dropped_and_noisy_codes(run, tmp_path):
    """Stopped after step 7 and resumed equals never stopped, to the bit."""
    cfg = replace(run, out_dir=str(tmp_path / "run"))
    train_until(cfg, 7)
    torch.manual_seed(99)
    train.main(cfg, resume=True)
    a, b = (read_checkpoint(c.out_dir)["model"] for c in (run, cfg))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert a["latent.map.weight"].any()


def test_evaluate_reports_each_bound(run, capsys):
    result = command(evaluate.main, run.out_dir, "--split", "val", "--json")
    printed = json.loads(capsys.readouterr().out)["latent"]
    figures = result["latent"]
    assert figures["nats_without_z_bound"] == result["nats"]
    model, cfg = load(run.out_dir)
    ids, meta = read_split(cfg.data, "val", cfg)
    torch.manual_seed(0)
    want = bound(Given(model, from_text(model)), ids, meta, cfg, "val", batch_size=32)["nats"]
    assert abs(figures["nats_given_z_no_bound"] - want) < 0.05
    assert printed == figures
    if cfg.kl_weight:
        kl, total = figures["KL_per_token"], figures["nats_given_z_plus_KL_bound"]
        rows = torch.from_numpy(ids[: len(ids) // 32 * 32].reshape(-1, 32).astype(np.int64))
        mean, log_var = model.latent.encode(rows)
        want = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(-1).mean() / 32
        assert kl == pytest.approx(want.item(), rel=0.1)
        assert total == pytest.approx(figures["nats_given_z_no_bound"] + kl)
    else:  # that of a deterministic code is infinite
        assert not any("KL" in name for name in figures)
    command(evaluate.main, run.out_dir, "--split", "val")
    assert re.search(r"nats z from prior bound +\d", capsys.readouterr().out)


def test_samples_like_a_text_and_between_two(run, capsys):
    base = run.out_dir, "--steps", 4, "--length", 20
    command(sample.main, *base, "--num", 2, "--latent_of", "some text")
    assert capsys.readouterr().out.count("--- sample") == 2
    command(sample.main, *base, "--num", 3, "--interpolate", "some text", "another")
    assert capsys.readouterr().out.count("--- sample") == 3
    command(sample.main, *base, "--latent_of", "abc", "--semi_ar", "--temperature", 0.5)
    assert len(capsys.readouterr().out.strip("\n")) == 20


def test_z_of_the_option_reaches_the_network(run, monkeypatch):
    seen, forward = [], Given.forward
    note = lambda self, x, t, *a: seen.append(self.choose(None, 2)) or forward(self, x, t, *a)
    monkeypatch.setattr(Given, "forward", note)
    model, _ = load(run.out_dir)
    ids = [torch.tensor([[" abcdefghijklmnopqrstuvwxyz".index(c) for c in text]])
           for text in ("abc", "zz yy")]  # fmt: skip
    first, last = (model.latent.encode(x)[0] for x in ids)
    command(sample.main, run.out_dir, "--steps", 2, "--num", 3, "--interpolate", "abc", "zz yy")
    torch.testing.assert_close(seen[0], first.expand(2, -1))
    torch.testing.assert_close(seen[-1], last.expand(2, -1))


def test_what_does_not_fit_is_refused(run, checkpoint, capsys):
    sampling = lambda *args: lambda: command(sample.main, *args)
    refused(capsys, sampling(checkpoint, "--latent_of", "a"), "the model has no latent")
    refused(capsys, sampling(run.out_dir, "--interpolate", "", "a"), "--interpolate: the text is")
    both = "--latent_of", "a", "--interpolate", "a", "b"
    refused(capsys, sampling(run.out_dir, *both), "exclude each other")


def test_the_export_loads_in_transformers(run, tmp_path, transformers):
    convert.main([f"{run.out_dir}/ckpt.pt", str(tmp_path / "hub")])
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(
        str(tmp_path / "hub"), trust_remote_code=True
    )
    model, _ = load(run.out_dir)
    x, t = torch.randint(0, 28, (2, 32)), torch.rand(2)
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=x, timesteps=t).logits, model(x, t))


def test_recipe_fields_of_the_latent_may_not_change_on_resume():
    assert not {"latent_dim", "mmd_weight", "kl_weight", "mixer"} & runs.MAY_CHANGE


# --------------------------------------------------------------------------------------------------
# The grammar


def test_every_text_is_grammatical_and_tells_its_factors():
    rows, factors = latent.make_texts(300, 1)
    found, right = latent.read_factors(torch.from_numpy(rows.astype(np.int64)))
    assert right.all() and torch.equal(found, torch.from_numpy(factors))
    words = {len(v.split()) for _, options in latent.WORDS.values() for v in options.values()}
    for _, options in latent.WORDS.values():  # as the entropy assumes
        assert len({len(words.split()) for words in options.values()}) == 1
    assert words == {1, 2, 3, 4} and latent.LENGTH == 12
    assert latent.ENTROPY == pytest.approx(math.log(4 * 2**3 * 3**3 * 2**3 * 4))


def test_one_wrong_word_is_ungrammatical():
    rows = torch.from_numpy(latent.make_texts(50, 2)[0].astype(np.int64))
    for i, (needs, _) in enumerate(latent.WORDS.values(), 1):
        changed = rows.clone()
        changed[:, i] = latent.ID["[BOS]"]
        assert not latent.read_factors(changed)[1].any(), needs
    past, present = latent.ID["yesterday"], latent.ID["today"]
    swapped = rows.clone()
    swapped[:, 1] = torch.where(rows[:, 9] == latent.ID["was"], present, past)
    wrong = (rows[:, 9] == latent.ID["was"]) | (rows[:, 9] == latent.ID["is"])
    found, right = latent.read_factors(swapped)
    assert not right[wrong].any() and (found[wrong, 1] == -1).all()


def test_a_probe_finds_what_is_there_and_nothing_else():
    y = torch.randint(0, 3, (600,))
    x = torch.randn(600, 5)
    there = torch.cat((x, torch.nn.functional.one_hot(y, 3) + 0.1 * torch.randn(600, 3)), 1)
    split = lambda features: (features[:300], y[:300], features[300:], y[300:])
    assert latent.fit_probe(*split(there)) > 0.99
    assert latent.fit_probe(*split(x)) < 0.45


@pytest.mark.slow
def test_the_task_writes_its_tables(tmp_path):
    results = latent.main(["--steps", "2", "--seeds", "1", "--out_dir", str(tmp_path / "out")])
    text = (tmp_path / "out" / "tables.md").read_text()
    assert set(results) == {"none", "free", "mmd", "noisy"}
    for name in ("bounds", "probes", "samples", "gap", "codes", "interpolation"):
        assert f"| {name} |" in text
    uniform = 11 * math.log(len(latent.VOCABULARY))  # after two steps nothing is learnt
    assert results["none"][0]["bounds"]["without z"] == pytest.approx(uniform, rel=0.1)
