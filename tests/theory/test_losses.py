"""The losses against their definitions: every mask of a tiny world, exact integrals over t."""

import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from world import (
    MASK,
    SUBSETS,
    TEXTS,
    L,
    V,
    chi_square_p,
    exact_model,
    expected_loss,
    hostile_model,
    hostile_scores,
    ones,
    pooled_p,
    random_joint,
    read_left_to_right,
    tiny,
)

from diffusion import (
    LOSSES,
    SCHEDULES,
    TIME_DRAWS,
    alpha,
    dalpha,
    exact_count_bound,
    mask_exactly,
    mask_tokens,
    stratify,
    time_at,
    training_time,
)

TEXT = torch.tensor([0, 2, 1])


def nats_of(loss, model, x0, cfg, t, xt):
    """A loss with every token maskable, in float64."""
    return LOSSES[loss](model, x0, ones(x0), cfg, t, xt).double()


def minus_log_p(model, x, t, x0):
    """-log p(x0 | x) of every token, from the network's logits."""
    log_p = model(x, t, ones(x)).log_softmax(-1).view(*x.shape, -1)
    return -log_p.gather(-1, x0[..., None])[..., 0]


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Schedules


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_run_from_one_to_zero_with_the_right_slope(schedule):
    t = torch.linspace(0, 1, 201, dtype=torch.float64, requires_grad=True)
    a = alpha(schedule, t)
    assert abs(a[0].item() - 1) < 1e-12 and abs(a[-1].item()) < 1e-12
    assert (a.diff() < 0).all()
    slope = torch.autograd.grad(a.sum(), t)[0]
    torch.testing.assert_close(dalpha(schedule, t.detach()), slope, rtol=1e-9, atol=1e-12)
    inner = t.detach()[1:-1]
    inverted = time_at(schedule, 1 - alpha(schedule, inner))
    torch.testing.assert_close(inverted, inner, rtol=0, atol=1e-9)


def test_parameters_of_a_schedule_are_fields():
    """sigma from sigma_min to sigma_max, stretched so that alpha runs from 1 to 0; losses and
    samplers take them from the config."""
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    cfg = tiny(schedule="geometric", sigma_min=1e-3, sigma_max=5.0)
    sigma = 1e-3 ** (1 - t) * 5.0**t
    want = ((-sigma).exp() - math.exp(-5)) / (math.exp(-1e-3) - math.exp(-5))
    torch.testing.assert_close(alpha(cfg, t), want, rtol=0, atol=1e-12)
    same = tiny(schedule="geometric", sigma_min=1e-4, sigma_max=20.0)
    assert torch.equal(alpha(same, t), alpha("geometric", t)) and not cfg == same
    straight = tiny(schedule="sigma_linear", sigma_min=1e-3, sigma_max=7.0)
    want = ((-(1e-3 + 6.999 * t)).exp() - math.exp(-7)) / (math.exp(-1e-3) - math.exp(-7))
    torch.testing.assert_close(alpha(straight, t), want, rtol=0, atol=1e-12)
    joint = random_joint()
    bound = expected_loss("mdlm", exact_model(joint), TEXT, cfg)
    assert bound == pytest.approx(-joint[tuple(TEXT)].log().item(), abs=1e-5)
    folders = [ROOT, *(ROOT / name for name in ("tasks", "extra", "data"))]
    for path in (path for folder in folders for path in folder.glob("*.py")):
        assert not re.search(r"(alpha|time_at)\(cfg\.schedule", path.read_text()), path
    for fields, words in (
        (dict(sigma_max=5.0), "sigma_max=5.0: only for schedule=geometric or sigma_linear"),
        (dict(schedule="geometric", sigma_max=5.0), "sigma_min=0.0: must be above 0"),
        (dict(schedule="sigma_linear", sigma_min=5.0), "sigma_min=5.0: must be below sigma_max"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            tiny(**fields)


# --------------------------------------------------------------------------------------------------
# Bounds


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("text", [[0, 2, 1], [1, 1, 1]])
def test_continuous_bound_is_tight_for_the_exact_denoiser(schedule, text):
    joint = random_joint()
    bound = expected_loss("mdlm", exact_model(joint), torch.tensor(text), tiny(schedule=schedule))
    assert bound == pytest.approx(-joint[tuple(text)].log().item(), abs=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_score_entropy_is_tight_for_the_exact_scores(schedule):
    joint = random_joint()
    logits = lambda x, t, at: exact_model(joint)(x, t, at) + math.log(V)  # log(s V / r)
    bound = expected_loss("sedd", logits, TEXT, tiny(schedule=schedule, loss="sedd"))
    assert bound == pytest.approx(-joint[tuple(TEXT)].log().item(), abs=1e-5)


def test_score_entropy_is_that_of_the_paper():
    """At masks, sigma' (sum_y s(y) - r log s(x0) + r (log r - 1)) for the scores
    s = exp(logits) r / V."""
    model, cfg = hostile_scores(), tiny(loss="sedd", schedule="cosine")
    x0, t = torch.randint(0, V, (300, L)), torch.rand(300, dtype=torch.float64)
    xt = mask_tokens(x0, alpha("cosine", t), ones(x0), MASK)
    a = alpha("cosine", t)[:, None]
    r, dsigma = a / (1 - a), -dalpha("cosine", t)[:, None] / a
    log_s = model(xt, t, ones(x0)).view(*x0.shape, V) - math.log(V) + r.log()[..., None]
    entropy = log_s.exp().sum(-1) - r * log_s.gather(-1, x0[..., None])[..., 0] + r * (r.log() - 1)
    assert_close(nats_of("sedd", model, x0, cfg, t, xt), dsigma * entropy * (xt == MASK))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("loss", ["mdlm", "sedd"])
def test_continuous_losses_are_a_poisson_kl_of_reverse_rates(loss, schedule):
    """Dense: the sum over all tokens y of r^ - r + r log(r / r^), where r and r^ are the true and
    the model's rates at which a masked position becomes y."""
    model = hostile_scores() if loss == "sedd" else hostile_model()
    x0, t = TEXTS, torch.linspace(0.05, 0.95, len(TEXTS), dtype=torch.float64)
    xt = x0.masked_fill(SUBSETS[torch.arange(len(x0)) % len(SUBSETS)], MASK)
    rate = (-dalpha(schedule, t) / (1 - alpha(schedule, t)))[:, None, None]
    r = rate * F.one_hot(x0, V)
    g = model(xt, t, ones(xt)).exp().view(*x0.shape, V) / (V if loss == "sedd" else 1)
    terms = rate * g - r + torch.special.xlogy(r, r / (rate * g))
    want = terms.sum(-1) * (xt == MASK)
    assert_close(nats_of(loss, model, x0, tiny(schedule=schedule, loss=loss), t, xt), want)


def test_score_entropy_costs_more_than_mdlm_unless_scores_are_normalised():
    model, cfg = hostile_scores(), tiny(loss="sedd", schedule="cosine")
    x0, t = torch.randint(0, V, (300, L)), torch.rand(300, dtype=torch.float64)
    xt = mask_tokens(x0, alpha("cosine", t), ones(x0), MASK)
    nats = nats_of("sedd", model, x0, cfg, t, xt)
    mdlm = nats_of("mdlm", model, x0, tiny(schedule="cosine"), t, xt)  # normalises the logits
    assert (nats >= mdlm - 1e-5).all() and (nats > mdlm + 0.01).any()
    normalised = lambda x, t, at: model(x, t, at).log_softmax(-1) + math.log(V)
    assert_close(nats_of("sedd", normalised, x0, cfg, t, xt), mdlm)


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "ar"])
def test_every_loss_is_a_bound(loss):
    joint, cfg = random_joint(), tiny(loss=loss, T=10 if loss == "d3pm" else 0)
    scale = math.log(V) if loss == "sedd" else 0.0  # its scores are normalised to V
    model = lambda x, t, at: exact_model(joint)(x, t, at) + scale
    bounds = [expected_loss(loss, model, text, cfg, nodes=100) for text in TEXTS]
    mean = (joint.flatten() * torch.tensor(bounds)).sum()
    entropy = -(joint * joint.log()).sum()
    needs = "a loss needs a mean over texts and masks of at least the entropy of the texts"
    assert mean > entropy - 1e-4, needs


def test_ar_is_the_chain_rule():
    joint = random_joint()
    causal = read_left_to_right(exact_model(joint))
    nats = LOSSES["ar"](causal, TEXTS, ones(TEXTS), tiny(loss="ar", causal=True, cond_dim=0))
    assert_close(nats.sum(-1).double(), -joint.flatten().log())


@pytest.mark.parametrize("form", ["mdlm", "d3pm", "copies", "may_predict_mask"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_discrete_bound_falls_to_the_exact_likelihood(form, schedule):
    """T = 1 reveals everything at once: the sum of the marginals. More steps only help; 2,000 are
    nearly exact. The exact network copies what it sees and never predicts MASK, so D3PM's further
    terms cost nothing."""
    joint = random_joint()
    model, exact = exact_model(joint), -joint[tuple(TEXT)].log().item()
    loss, fields = form, {}
    if form in ("copies", "may_predict_mask"):
        loss, fields = "d3pm", dict(carry_over=False, zero_masking=form == "copies")
    if form == "may_predict_mask":
        model = lambda x, t, at: F.pad(exact_model(joint)(x, t, at), (0, 1), value=-math.inf)
    cfgs = (tiny(schedule=schedule, loss=loss, T=T, **fields) for T in (1, 2000))
    at_once, nearly = (expected_loss(loss, model, TEXT, cfg) for cfg in cfgs)
    marginals = [joint.sum([j for j in range(L) if j != i])[TEXT[i]].log().item() for i in range(L)]
    assert at_once == pytest.approx(-sum(marginals), abs=1e-5)
    steep = schedule in ("geometric", "sigma_linear")
    assert nearly == pytest.approx(exact, abs=0.02 if steep else 2e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bounds_hold_on_average_over_texts(schedule):
    """Averaged over texts, the exact network's bound is the entropy in continuous time and more
    than that in 4 steps."""
    joint = random_joint()
    entropy = -(joint * joint.log()).sum().item()

    def mean_bound(T):
        cfg, model = tiny(schedule=schedule, T=T), exact_model(joint)
        bounds = (expected_loss("mdlm", model, x, cfg, nodes=100) for x in TEXTS)
        return sum(p.item() * bound for p, bound in zip(joint.flatten(), bounds))

    assert mean_bound(4) > entropy + 1e-3 and mean_bound(0) == pytest.approx(entropy, abs=1e-3)


def dense_d3pm(model, x0, xt, t, cfg):
    """(B, L) of T x KL(q(x_s | xt, x0) || p(x_s | xt)) and of -log p(x0), from the matrices Q_t.
    D3PM, arXiv 2107.03006, section 3: q(x_s | xt, x0) ~ Q_{s->t}[x_s, xt] Qbar_s[x0, x_s]."""
    K = V + 1
    kl, ce = torch.zeros(2, *x0.shape, dtype=torch.float64)
    absorb, eye = torch.zeros(K, K, dtype=torch.float64), torch.eye(K, dtype=torch.float64)
    absorb[:, MASK] = 1
    for b in range(len(x0)):
        a_t, a_s = alpha(cfg, t[b]).item(), alpha(cfg, t[b] - 1 / cfg.T).item()
        qbar_s = a_s * eye + (1 - a_s) * absorb
        q_st = (a_t / a_s) * eye + (1 - a_t / a_s) * absorb
        row = xt[b : b + 1]
        prediction = model(row, t[b : b + 1], ones(row)).softmax(-1)  # (L, V or K)
        for i in range(L):
            pair = q_st[:, xt[b, i]] * qbar_s  # (K, K): q(x_s, xt | x0), as [x0, x_s]
            q, p = pair[x0[b, i]], prediction[i] @ pair[: prediction.shape[1]]
            if xt[b, i] == MASK:
                q, p = q / q.sum(), p / p.sum()
                kl[b, i] = torch.where(q > 0, q * (q / p).log(), 0).sum()
            ce[b, i] = -prediction[i, x0[b, i]].log()
    return cfg.T * kl, ce


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("T", [1, 2, 7, 1000])
def test_losses_equal_the_dense_d3pm_posterior_kl(schedule, T):
    """mdlm in T steps is D3PM's KL over the whole vocabulary. aux_ce adds nanoDD's
    cross-entropy of all tokens, and in step 1 is T times that alone; without carry_over the
    network also pays for copying x0."""
    model = hostile_model()
    x0 = torch.randint(0, V, (60, L))
    t = torch.randint(1, T + 1, (60,)).double() / T
    t[:10] = 1 / T
    xt = mask_tokens(x0, alpha(schedule, t), ones(x0), MASK)
    xt[:3] = MASK
    cfg = tiny(schedule=schedule, T=T)
    kl, ce = dense_d3pm(model, x0, xt, t, cfg)
    check = lambda loss, model, want, **fields: assert_close(
        nats_of(loss, model, x0, replace(cfg, loss=loss, **fields), t, xt), want
    )
    check("mdlm", model, kl)
    check("d3pm", model, kl)
    in_step_1 = (t * T).round()[:, None] == 1
    check("d3pm", model, torch.where(in_step_1, T * ce, kl + T * 0.05 * ce), aux_ce=0.05)
    check("d3pm", model, kl + minus_log_p(model, x0, 0 * t, x0), carry_over=False)
    may_predict_mask = hostile_model(outputs=V + 1)
    kl, _ = dense_d3pm(may_predict_mask, x0, xt, t, cfg)
    check("d3pm", may_predict_mask, kl, zero_masking=False)


@pytest.mark.parametrize("T", [0, 100])
def test_mdlm_is_cross_entropy_over_t(T):
    """Linear schedule, any T: cross-entropy / t on masked positions, zero elsewhere."""
    model, x0 = hostile_model(), torch.randint(0, V, (500, L))
    t = torch.randint(1, 101, (500,)).double() / 100
    xt = mask_tokens(x0, 1 - t, ones(x0), MASK)
    want = minus_log_p(model, xt, t, x0) / t[:, None] * (xt == MASK)
    assert_close(nats_of("mdlm", model, x0, tiny(T=T), t, xt), want)


FORMS = {
    "mdlm": dict(),
    "mdlm, 10 steps": dict(T=10),
    "d3pm": dict(loss="d3pm", T=10),
    "d3pm, nanoDD": dict(loss="d3pm", T=10, aux_ce=0.05),
    "d3pm, copies": dict(loss="d3pm", T=10, carry_over=False),
    "d3pm, may predict MASK": dict(loss="d3pm", T=10, zero_masking=False),
    "d3pm, MDLM's": dict(loss="d3pm", T=10, zero_masking=False, carry_over=False),
    "sedd": dict(loss="sedd"),
    "ar": dict(loss="ar", causal=True, cond_dim=0),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_prompt_is_never_masked_and_never_counted(form):
    cfg = tiny(**FORMS[form])
    network = hostile_model(outputs=V + (not cfg.zero_masking))
    x0 = torch.randint(0, V, (400, L))
    maskable = torch.rand(x0.shape) < 0.6
    calls = []

    def model(x, t, at):
        calls.append((x, at))
        return network(x, t, at)

    nats = LOSSES[cfg.loss](model, x0, maskable, cfg)
    xt, at = calls[0]
    masked = xt == MASK
    assert (xt == x0)[~maskable].all() and (cfg.loss == "ar" or masked[maskable].any())
    assert (nats[~maskable] == 0).all() and not at[~maskable].any() and nats.sum() > 0
    if not cfg.aux_ce and cfg.carry_over and cfg.loss != "ar":
        assert (nats[~masked] == 0).all() and (at == masked).all()  # the head runs on masks only


# --------------------------------------------------------------------------------------------------
# Masks and times


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_masked_fraction_follows_the_schedule(schedule):
    t = torch.tensor([0.0, 0.03, 0.5, 0.97, 1.0], dtype=torch.float64)
    x0 = torch.zeros(5, 40_000, dtype=torch.long)
    fraction = (mask_tokens(x0, alpha(schedule, t), ones(x0), MASK) == MASK).double().mean(-1)
    p = 1 - alpha(schedule, t)
    assert fraction[0] == 0 and fraction[-1] == 1
    assert ((fraction - p).abs() <= 4 * (p * (1 - p) / 40_000).clamp(min=0).sqrt() + 1e-9).all()


def test_stratified_times_fill_every_stratum_once():
    for _ in range(20):
        u = stratify(64)
        assert (torch.floor(u * 64) == torch.arange(64)).all()
        assert (training_time(u, tiny(T=64)) * 64).round().tolist() == list(range(1, 65))
    assert training_time(torch.tensor([0.0, 0.999999]), tiny(T=5)).tolist() == [0.2, 1.0]
    t = training_time(stratify(100_000), tiny(t_min=0.25))
    assert 0.25 <= t.min() < 0.2501 and 0.9999 < t.max() <= 1
    assert abs(t.mean().item() - 0.625) < 1e-4


def test_the_bell_is_beta_2_2_in_continuous_time_and_in_steps():
    """Its distribution function is 3 t^2 - 2 t^3."""
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    t = training_time(u, tiny(time_law="bell"))
    torch.testing.assert_close(3 * t**2 - 2 * t**3, u)
    n = training_time(stratify(60_000), tiny(time_law="bell", T=4)) * 4
    share = torch.bincount(n.round().long(), minlength=5)[1:] / 60_000
    cdf = 3 * (k := torch.arange(5) / 4) ** 2 - 2 * k**3
    torch.testing.assert_close(share.float(), cdf.diff(), atol=1e-3, rtol=0)


def test_mask_exactly_draws_every_subset_equally_often():
    n, maskable = 30_000, torch.tensor([True, False, True, True, True])
    x0 = torch.zeros(n, 5, dtype=torch.long)
    xt, _ = mask_exactly(x0, torch.full((n,), 2), maskable.repeat(n, 1), MASK)
    masked = xt == MASK
    assert (masked.sum(-1) == 2).all() and not masked[:, 1].any()
    counts = torch.bincount((masked * 2 ** torch.arange(5)).sum(-1))
    counts = counts[counts > 0]
    assert len(counts) == math.comb(4, 2)
    assert pooled_p(counts, torch.full((6,), n / 6, dtype=torch.float64)) > 1e-4


def test_the_fraction_of_mask_exactly_is_beta_whatever_was_masked():
    """Two of four maskable positions: Beta(2, 3), also given that a certain one is masked."""
    n, maskable = 30_000, torch.tensor([True, False, True, True, True])
    x0 = torch.zeros(n, 5, dtype=torch.long)
    xt, fraction = mask_exactly(x0, torch.full((n,), 2), maskable.repeat(n, 1), MASK)
    mean, var = 2 / 5, 2 * 3 / (25 * 6)
    assert abs(fraction.mean().item() - mean) < 4 * (var / n) ** 0.5
    assert abs(fraction.var().item() - var) < 1e-3
    for i in (0, 2, 3, 4):
        given_i = fraction[xt[:, i] == MASK]  # half of the rows
        assert abs(given_i.mean().item() - mean) < 4 * (var / (n / 2)) ** 0.5


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("loss", ["mdlm", "sedd"])
@pytest.mark.parametrize("time_draw", TIME_DRAWS)
def test_every_draw_of_times_estimates_the_bound(time_draw, loss, schedule):
    """With a strongly time-dependent network. Importance sampling leaves out t < t_min, which costs
    less than 2e-3 nats."""
    cfg = tiny(loss=loss, schedule=schedule, time_draw=time_draw, t_min=1e-4, time_cond=True)
    model, n = hostile_scores() if loss == "sedd" else hostile_model(), 60_000
    want = expected_loss(loss, model, TEXT, replace(cfg, time_draw="stratified"))
    x0, u = TEXT.repeat(n, 1), torch.rand(n, dtype=torch.float64)
    if time_draw == "stratified":
        u = (torch.arange(n) + u) / n
    v = torch.rand(n, L, dtype=torch.float64)
    t, xt, weight = TIME_DRAWS[time_draw](x0, ones(x0), cfg, u, v)
    nats = nats_of(loss, model, x0, cfg, t, xt).sum(-1) * weight
    assert abs(nats.mean().item() - want) < 4 * nats.std().item() / n**0.5 + 2e-3
    if time_draw in ("importance", "counts"):
        assert abs((nats / weight).mean().item() - want) > 0.05  # the weights matter


def test_importance_sampling_is_log_uniform_with_one_weight_for_all():
    cfg, x0 = tiny(time_draw="importance", t_min=1e-3), torch.zeros(1000, L, dtype=torch.long)
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    v = torch.rand(1000, L, dtype=torch.float64)
    t, _, weight = TIME_DRAWS["importance"](x0, ones(x0), cfg, u, v)
    torch.testing.assert_close(t.log() / math.log(1e-3), 1 - u)
    constant = torch.full_like(t, math.log(1000) / 0.999)  # 6.9: MDLM's
    torch.testing.assert_close(weight / t, constant)


def draw_counts(cfg, maskable, u):
    x0, v = torch.zeros(maskable.shape, dtype=torch.long), torch.rand(maskable.shape).double()
    return TIME_DRAWS["counts"](x0, maskable, cfg, u, v)


def test_drawn_counts_are_exact_and_even():
    cfg = tiny(time_draw="counts", t_min=0.3)
    maskable = torch.arange(8) < torch.tensor([8, 5, 1]).repeat(1000)[:, None]
    u, n = torch.rand(3000, dtype=torch.float64), maskable.sum(-1)
    t, xt, weight = draw_counts(cfg, maskable, u)
    count = (xt == MASK).sum(-1)
    assert (count == torch.floor(u * n) + 1).all() and count.min() == 1
    assert not (xt == MASK)[~maskable].any()
    torch.testing.assert_close(weight / t, n / count.double())

    almost_1 = torch.full((3000,), 1 - 2**-53, dtype=torch.float64)
    _, xt, _ = draw_counts(cfg, maskable, (511 + almost_1) / 512)  # rounds to 1: count n, not n + 1
    assert ((xt == MASK).sum(-1) == n).all()

    _, xt, _ = draw_counts(replace(cfg, time_law="bell"), maskable, u)
    share = (xt == MASK).sum(-1) / n
    assert share[::3].std() < 0.9 * (count / n)[::3].std()  # the bell prefers the middle


# --------------------------------------------------------------------------------------------------
# The bound from exact counts


@pytest.mark.parametrize("loss", ["mdlm", "sedd"])
def test_exact_count_bound_is_tight_when_enumerated(loss):
    """SEDD's scores are twice too large: that costs Z - 1 - log Z = 1 - log 2 per token."""
    joint, scale = random_joint(), 2.0 if loss == "sedd" else 1.0
    model = lambda x, t, at: exact_model(joint)(x, t, at) + math.log(V * scale)
    total, too_much = 0.0, L * (scale - 1 - math.log(scale))
    for subset in SUBSETS[1:]:
        count = subset.sum()
        x0 = TEXT[None]
        xt = x0.masked_fill(subset, MASK)
        nats = exact_count_bound(model, x0, ones(x0), tiny(loss=loss), count[None], xt).item()
        total += nats / L / math.comb(L, count.item())
    assert total == pytest.approx(-joint[tuple(TEXT)].log().item() + too_much, abs=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_exact_count_bound_of_a_time_conditioned_network_is_its_continuous_bound(schedule):
    model, cfg, n = hostile_model(), tiny(schedule=schedule, time_cond=True, cond_dim=8), 60_000
    want = expected_loss("mdlm", model, TEXT, cfg)
    x0, count = TEXT.repeat(n, 1), torch.arange(n) % L + 1
    nats = exact_count_bound(model, x0, ones(x0), cfg, count).double()
    assert abs(nats.mean().item() - want) < 4 * nats.std().item() / n**0.5
    at_time_0 = lambda x, t, at: model(x, 0 * t, at)
    wrong = exact_count_bound(at_time_0, x0, ones(x0), cfg, count).double()
    assert abs(wrong.mean().item() - want) > 0.1  # the test can tell


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_losses_stay_finite_next_to_the_ends(schedule):
    """1 - alpha rounds to 0 near t = 0 in most schedules: nothing is masked there, and
    the loss is 0, not NaN."""
    t = torch.tensor([0.0, 1e-300, 1e-12, 1e-9, 1 - 1e-12, 1.0], dtype=torch.float64)
    x0 = torch.randint(0, V, (len(t), L))
    nats = LOSSES["mdlm"](hostile_model(), x0, ones(x0), tiny(schedule=schedule), t)
    assert torch.isfinite(nats).all() and (nats[:2] == 0).all() and (nats[-1] >= 0).all()


def test_the_chi_square_test_can_fail():
    law = torch.full((27,), 1 / 27, dtype=torch.float64)
    fair = TEXTS[torch.randint(0, 27, (20_000,))]
    unfair = torch.where(torch.rand(20_000, 1) < 0.03, TEXTS[:1], fair)
    assert chi_square_p(fair, law) > 1e-3 and chi_square_p(unfair, law) < 1e-6
