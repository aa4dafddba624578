"""The losses and samplers against numbers that upstream's own code gave on the same inputs.

Recorded in float64 by running these, with `network` in place of the backbone and the t, xt and
uniforms below in place of random ones:
    kuleshov-group/mdlm                               c112c526d193436838c98d81455ee51f90309470
    louaaron/Score-Entropy-Discrete-Diffusion         0605786da5ccb5747545e26d66fdf477187598b6
    flukeskywalker/nanoDD                             b656fc6f158fc43a811558890f958453cd4e0550
Upstream's alpha ends at 1e-3, ours at 0: 1 - 0.999 t instead of 1 - t, and so on. That cancels in
the losses and in the samplers' steps, which depend on alpha through alpha' / (1 - alpha) and
(alpha_s - alpha_t) / (1 - alpha_t). It does not cancel in the time that upstream's backbone reads:
the masked fraction, 0.999 t.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from world import ones

import diffusion
from configs import Config
from diffusion import LOSSES, TIME_DRAWS, denoiser, training_time
from samplers import SAMPLERS

B, L, V, T = 4, 6, 5, 1000
MASK = V


def inputs():
    """Random logits by position, by the token there and by the time; a text; where it is masked."""
    u = np.random.Generator(np.random.Philox(240607524)).random
    table, answer, clock = 8 * u((B, L, V + 1)) - 4, 4 * u((V + 1, V + 1)) - 2, 4 * u(V + 1) - 2
    x0, hidden = (V * u((B, L))).astype(np.int64), u((B, L)) < 0.6
    return map(torch.from_numpy, (table, answer, clock, x0, hidden))


TABLE, ANSWER, CLOCK, X0, HIDDEN = inputs()
XT = X0.masked_fill(HIDDEN, MASK)
TIMES = torch.tensor([0.05, 0.357, 0.6180339887, 0.93], dtype=torch.float64)
STEPS = torch.tensor([2, 357, 620, 999], dtype=torch.float64) / T  # n / T
FIRST_STEP = torch.tensor([1, 357, 620, 999], dtype=torch.float64) / T


def network(time=0.0, outputs=V):
    """The backbone that upstream's code was run with. It reads `time` * t."""

    def model(x, t, at):
        return (TABLE + ANSWER[x] + time * t.double()[:, None, None] * CLOCK)[..., :outputs][at]

    return model


def config(**fields):
    return Config(vocab_size=V, seq_len=L, n_embd=8, n_head=2, n_layer=1, cond_dim=0, **fields)


def stretch(t):
    """Our alpha' / (1 - alpha) at t of the geometric schedule over upstream's; the same for
    (alpha_s - alpha_t) / (1 - alpha_t). Upstream's alpha starts at exp(-1e-4), ours at 1."""
    alpha = math.exp(-(1e-4 ** (1 - t) * 20**t))
    return (1 - alpha) / (math.exp(-1e-4) - alpha)


# Nats of each row, summed over its tokens.
LOSS = {
    "mdlm loglinear": [302.709491, 51.9411954, 43.5333524, 12.1263591],
    "mdlm cosine": [600.566897, 87.4304115, 59.8477657, 21.3308152],
    "mdlm cosinesqr": [599.639794, 80.1799165, 43.1949162, 4.21852743],
    "mdlm linear": [231.561624, 4.64373352, 0.416831628, 0.0111208738],  # sigma from 0 to 10
    "mdlm geometric": [183.341465, 194.883404, 222.874908, 0.254432153],  # sigma from 1e-4 to 20
    "mdlm T=1000": [7513.04313, 51.9411954, 43.4319162, 11.2865156],
    "d3pm subs_masking": [7528.88702, 73.8725009, 66.8987893, 30.2252993],
    "d3pm": [10646.3481, 86.9348446, 68.2781416, 32.4638981],
    "d3pm, its reconstruction": [16.6832565, 24.3918613, 24.0248082, 20.8745843],
    "sedd loglinear": [780.591205, 89.6738902, 149.361307, 67.830101],  # SEDD's own, and MDLM's
    "sedd geometric": [448.385194, 275.396013, 403.053889, 0.48559042],
    "ar": [10.9853806, 21.8830901, 19.9658528, 18.3290866],
    "nanoDD": [18.6623673, 1.4487027, 1.59902266, 0.776799708],  # steps 1, 357, 620, 999
}


def assert_close(got, want):
    want = torch.as_tensor(want, dtype=torch.float64)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    "name, time, fields",
    [
        ("mdlm loglinear", 0.999, dict()),
        ("mdlm cosine", 0, dict(schedule="cosine")),
        ("mdlm cosinesqr", 0, dict(schedule="cosine2")),
        ("mdlm linear", 0, dict(schedule="sigma_linear")),
        ("mdlm geometric", 0, dict(schedule="geometric")),
        ("mdlm T=1000", 0.999, dict(T=T)),
        ("mdlm T=1000", 0.999, dict(loss="d3pm", T=T)),
        ("sedd loglinear", 0.999, dict(loss="sedd")),
        ("sedd geometric", 0, dict(loss="sedd", schedule="geometric")),
    ],
)
def test_loss_of_masked_tokens(name, time, fields):
    cfg = config(**fields)
    t = STEPS if cfg.T else TIMES
    nats = LOSSES[cfg.loss](network(time), X0, ones(X0), cfg, t, XT)
    assert (nats[~HIDDEN] == 0).all() and (nats[HIDDEN] > 0).all()
    if cfg.schedule == "geometric":
        nats = nats / torch.tensor([[stretch(t)] for t in TIMES.tolist()])
    assert_close(nats.sum(-1), LOSS[name])


def test_d3pm_with_and_without_zero_masking():
    """MDLM's d3pm with subs_masking and without. Step 1 is left out: upstream's KL is 0 / 0 there,
    and it never draws it. So is step T: upstream replaces t by 0.9999, which is 1e-4 off."""

    def loss(net, **fields):
        return LOSSES["d3pm"](net, X0, ones(X0), config(loss="d3pm", T=T, **fields), STEPS, XT)

    assert_close(loss(network(0.999), carry_over=False).sum(-1), LOSS["d3pm subs_masking"])
    free = network(0.999, V + 1)
    assert_close(loss(free, carry_over=False, zero_masking=False).sum(-1), LOSS["d3pm"])
    kl = loss(free, zero_masking=False)
    assert (kl[~HIDDEN] == 0).all()
    reconstruction = torch.tensor(LOSS["d3pm, its reconstruction"])
    assert_close(kl.sum(-1), torch.tensor(LOSS["d3pm"]) - reconstruction)


def test_ar():
    """Upstream's output at position i predicts token i + 1, ours token i; the first is given."""
    maskable = ones(X0)
    maskable[:, 0] = False
    model = lambda x, t, at: F.pad((TABLE + ANSWER[x])[:, :-1, :V], (0, 0, 1, 0))[at]
    nats = LOSSES["ar"](model, X0, maskable, config(loss="ar", causal=True, bos=True))
    assert_close(nats.sum(-1), LOSS["ar"])


def test_nanodd():
    """Its loss is that of one step; ours is T times as much. In step 1 it is the cross-entropy."""
    cfg = config(loss="d3pm", T=T, aux_ce=0.05)
    nats = LOSSES["d3pm"](network(1.0), X0, ones(X0), cfg, FIRST_STEP, XT)
    assert_close(nats.sum(-1) / T, LOSS["nanoDD"])


def test_importance_sampling():
    """MDLM's times and losses for given uniforms. Ours has the same times with upstream's t_min.
    Both weights are constant: ours is log(1 / t_min) / (1 - t_min), an average over t in
    [t_min, 1); upstream's is -log(1 - exp(-1e-3)), 9e-4 less."""
    sigma_min = 1e-3
    t_min = (1 - math.exp(-sigma_min)) / (1 - 1e-3)
    stratified = (torch.tensor([0.1, 0.8, 0.3, 0.95], dtype=torch.float64) + torch.arange(B)) / B
    u = training_time(stratified, config(t_min=1e-3))  # its sampling_eps comes first
    cfg = config(t_min=t_min, time_draw="importance")
    t, _, weight = TIME_DRAWS[cfg.time_draw](X0, ones(X0), cfg, u, torch.zeros(X0.shape))
    assert_close(t, [0.00119711738, 0.0224786094, 0.0532558469, 0.917360877])
    nats = LOSSES["mdlm"](network(), X0, ones(X0), cfg, t, XT).sum(-1) * weight
    ratio = -math.log(1 - math.exp(-sigma_min)) * (1 - t_min) / math.log(1 / t_min)
    assert_close(nats * ratio, [103.775085, 110.729564, 138.840685, 84.0245631])


# Probabilities of the V tokens and of MASK after a step from t = 3/4 to 1/2, at two
# masked positions. Upstream's categorical draw never takes a token of negative
# probability, as if it were 0.
WHERE = [1, 1], [0, 1]
KERNEL = {
    "mdlm": [
        [0.0138978017, 0.0243826661, 0.00375470056, 0.0136328969, 0.277665268, 0.666666667],
        [9.0460973e-05, 0.00904770194, 1.012248e-05, 5.94540565e-05, 0.324125594, 0.666666667],
    ],
    "d3pm": [
        [4.55662732e-4, 7.99426592e-4, 1.23104154e-4, 4.46977385e-4, 9.10372139e-3, 0.989071108],
        [9.03968175e-05, 0.00904128525, 1.01153011e-05, 5.94118913e-05, 0.323895722, 0.666903069],
    ],
    "sedd loglinear": [  # analytic and Euler; MDLM's analytic of its sedd
        [0.00857274929, 0.0150402552, 0.00231605741, 0.00840934488, 0.171275629, 0.794385964],
        [0.00279503241, 0.279552821, 0.000312760949, 0.00183699124, 10.0147225, -9.29922009],
    ],
    "sedd geometric, analytic": [
        [0.0105567999, 0.0277423985, 0.0175276651, 0.0984880194, 0.108709441, 0.736975676],
        [0.00344190608, 0.515647219, 0.00236694011, 0.0215143547, 6.35639108, -5.8993615],
    ],
    "sedd geometric, euler": [
        [0.02083721, 0.0547584675, 0.0345964348, 0.194397503, 0.214572737, 0.480837647],
        [0.0067936989, 1.01779417, 0.00467191087, 0.0424654377, 12.5463642, -12.6180894],
    ],
    "sedd, denoise": [
        [0.0401362115, 0.10547465, 0.0666389513, 0.374444531, 0.413305657, 0],
        [0.000498873132, 0.0747383971, 0.000343066545, 0.00311831098, 0.921301352, 0],
    ],
}


def law(sampler, model, cfg, step, monkeypatch):
    """(B, L, V + 1) law of a sampler's step number `step` on XT, of 4 steps and the last that
    removes the remaining masks. Exact: the two uniforms of a position, which token and whether to
    reveal it, have thresholds, found by bisection."""
    zero = torch.zeros(B, L, dtype=torch.float64)

    def frame(which, reveal):
        draws = iter([zero, zero + math.inf] * step + [which, reveal])  # nothing is revealed before
        monkeypatch.setattr(diffusion, "uniform", lambda x, gen: next(draws))
        frames = SAMPLERS[sampler](denoiser(model, cfg), XT, 4, cfg)
        for _ in range(step):
            assert torch.equal(next(frames), XT)
        return next(frames)

    def threshold(below):
        low, high = zero, zero + 1
        for _ in range(40):
            mid = (low + high) / 2
            low, high = torch.where(below(mid), mid, low), torch.where(below(mid), high, mid)
        return high

    reveal = threshold(lambda u: frame(zero, u) != MASK)
    cdf = [threshold(lambda u, y=y: frame(u, zero - 1) <= y) for y in range(V - 1)]
    token = torch.stack([zero, *cdf, zero + 1], -1).diff()
    return torch.cat((reveal[..., None] * token, 1 - reveal[..., None]), -1)


@pytest.mark.parametrize(
    "name, sampler, time, fields",
    [
        ("mdlm", "ddpm", 0.999, dict()),
        ("mdlm", "analytic", 0.999, dict()),
        ("mdlm", "euler", 0.999, dict()),
        ("d3pm", "ddpm", 0.999, dict(loss="d3pm", T=T, zero_masking=False)),
        ("sedd loglinear", "analytic", 0.999, dict(loss="sedd")),
        ("sedd loglinear", "euler", 0.999, dict(loss="sedd")),
        ("sedd geometric, analytic", "analytic", 0, dict(loss="sedd", schedule="geometric")),
        ("sedd geometric, euler", "euler", 0, dict(loss="sedd", schedule="geometric")),
        ("sedd, denoise", "analytic", 0, dict(loss="sedd")),
        ("sedd, denoise", "euler", 0, dict(loss="sedd", schedule="geometric")),
    ],
)
def test_step_of_a_sampler(name, sampler, time, fields, monkeypatch):
    cfg = config(**fields)
    model = network(time, V + (not cfg.zero_masking))
    got = law(sampler, model, cfg, 4 if "denoise" in name else 1, monkeypatch)
    assert_close(got[~HIDDEN], F.one_hot(X0[~HIDDEN], V + 1))
    want = torch.tensor(KERNEL[name], dtype=torch.float64)
    if "geometric" in name:
        want[:, :V] *= stretch(0.75)
        want[:, V] = 1 - want[:, :V].sum(-1)
    if not cfg.zero_masking:
        # Upstream's sampler is not the process whose KL its loss is: MASK should get
        # 1 - alpha_s + alpha_s m, with m the network's probability of it, but gets 1 - alpha_s.
        # Ours is that process. alpha_s = 1/2.
        m = model(XT, torch.full((B,), 0.75), ones(XT)).softmax(-1).view(B, L, V + 1)[WHERE][:, V]
        want[:, V] *= 1 + m
    want = want.clamp(min=0)
    assert_close(got[WHERE], want / want.sum(-1, keepdim=True))
