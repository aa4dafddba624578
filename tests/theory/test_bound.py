"""The estimator of the bound: unbiased, with an honest standard error, over every token."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from world import (
    MASK,
    TEXTS,
    L,
    Network,
    exact_model,
    expected_loss,
    hostile_model,
    ones,
    random_joint,
    tiny,
)

import common
import evaluate
from configs import Config
from diffusion import mdlm, stratify, training_time
from evaluate import bound, strata


class Markov:
    """Texts of an order-1 chain over 5 letters. Its exact denoiser needs only the
    nearest visible tokens."""

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
        forward = self.power[(i - left).clamp(0, self.L), a]
        forward = torch.where((left < 0)[..., None], self.start, forward)
        backward = self.power[(right - i).clamp(0, self.L), :, b]
        backward = torch.where((right == self.L)[..., None], 1.0, backward)
        return (forward * backward).log()[at]


@pytest.fixture(scope="module")
def runs():
    """(150, 4): exact nats per token of independent texts of 32 windows, our estimate, its error,
    and MDLM's estimate."""
    chain, rng, rows = Markov(), np.random.default_rng(0), []
    for seed in range(150):
        x = chain.text(32, rng)
        ours = bound(Network(chain.model), x.reshape(-1), {}, chain.cfg, "text", seed=seed)
        x0 = torch.from_numpy(x)
        t = training_time(stratify(32), chain.cfg)
        mdlms = mdlm(chain.model, x0, ones(x0), chain.cfg, t).mean().item()
        rows.append((chain.nats(x).mean().item() / chain.L, ours["nats"], ours["se"], mdlms))
    return np.array(rows)


def test_the_bound_is_unbiased(runs):
    exact, ours, _, mdlms = runs.T
    for estimate in (ours, mdlms):
        error = estimate - exact
        assert abs(error.mean()) < 4 * error.std() / len(error) ** 0.5


def test_the_standard_error_is_honest(runs):
    """Over texts and masks, estimates scatter as much as it says. The scatter of 150 is known to
    1 / sqrt(300) = 6 %; 20 % is 3.5 of those."""
    _, ours, se, _ = runs.T
    assert 0.8 < ours.std() / np.sqrt((se**2).mean()) < 1.2


def test_exact_counts_are_less_noisy_than_stratified_times(runs):
    """At one forward per window, the noise of the masks: MDLM's estimator against ours."""
    exact, ours, _, mdlms = runs.T
    assert (mdlms - exact).std() > 1.4 * (ours - exact).std()


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

    cfg, ids = Config(vocab_size=5, seq_len=64), np.zeros(64 * 32, np.int64)
    bound(Network(model), ids, {}, cfg, "text", batch_size=8)
    assert counts == [8 * 65 // 2] * 4


@pytest.mark.parametrize("T", [0, 1, 4])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_every_T_estimates_its_bound(T, schedule):
    """With a time-dependent network each T has another bound; a split that repeats
    one text converges to it."""
    model, text = hostile_model(), torch.tensor([0, 2, 1])
    cfg, ids = tiny(schedule=schedule, time_cond=True, cond_dim=8), np.tile(text.numpy(), 20_000)
    got = bound(Network(model), ids, {}, cfg, "text", T=T, batch_size=10_000)
    want = expected_loss("mdlm", model, text, replace(cfg, T=T)) / L
    assert abs(got["nats"] - want) < 4 * got["se"] + 1e-9 and got["se"] < 0.02


@pytest.mark.slow
def test_the_last_short_window_and_every_token_count():
    """10 texts and one token more: that token is a window by itself, predicted from nothing."""
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
    ids = TEXTS[:4].numpy().reshape(-1)
    result = bound(Network(exact_model(random_joint())), ids, {}, tiny(), "text")
    assert math.isnan(result["se"]) and math.isfinite(result["nats"])
    meta = {"splits": {"val": {"tokens": 12, "characters": 12}}}
    report = evaluate.report(result, meta, "val")
    assert evaluate.figure(report, "perplexity").endswith("± ?")
    assert json.loads(common.to_json({"val": report}))["val"]["se"] is None
    huge = evaluate.report(result | {"nats": 1e6}, meta, "val")["perplexity"]
    assert huge == pytest.approx(math.exp(700))


def test_windows_are_evenly_spaced():
    seen = []

    def model(x, t, at):
        seen.append(x)
        return torch.zeros(int(at.sum()), 50)

    ids = np.repeat(np.arange(50), 8)  # window n holds eight tokens n
    result = bound(Network(model), ids, {}, Config(vocab_size=50, seq_len=8), "text", windows=10)
    rows = torch.cat(seen)
    visible = [row[row < 50].unique().tolist() for row in rows]  # [] if all is masked
    want = np.linspace(0, 49, 10).astype(int).tolist()
    assert result["tokens"] == 80 and len(visible) == 10
    assert all(found in ([], [n]) for found, n in zip(visible, want)) and sum(visible, [])


def test_a_uniform_model_costs_exactly_log_v():
    """Every token ln 27, whatever the masks; the standard error is then zero."""
    ids, cfg = np.random.default_rng(0).integers(0, 27, 1203), Config(vocab_size=27, seq_len=32)
    flat = Network(lambda x, t, at: torch.zeros(int(at.sum()), 27))
    result = bound(flat, ids, {}, cfg, "test")
    assert result["nats"] == pytest.approx(math.log(27), rel=1e-6) and result["se"] < 1e-6
