"""A latent beside the tokens: its bounds against an enumerated marginal, the distance to the prior
against sampling, and the way of z through the network."""

from dataclasses import replace

import pytest
import torch
from test_model import SMALL, awake, canvas, gradients
from world import (
    TEXTS,
    Network,
    chi_square_p,
    exact_model,
    expected_loss,
    last,
    ones,
    random_joint,
    tiny,
)

import extra.latent
from configs import Config
from diffusion import LOSSES, denoiser, row_generators
from extra.latent import AddPenalty, draw, kl, mmd
from extra.with_latent import Given, from_another, from_text, slerp
from model import DiT
from samplers import SAMPLERS, with_guidance, with_temperature

LATENT = replace(SMALL, latent_dim=4)
NOISY = replace(LATENT, kl_weight=0.5)

# --------------------------------------------------------------------------------------------------
# A latent of two values in a world that can be enumerated: p(x) = sum over z of p(z) p(x | z)

PRIOR = torch.tensor([0.3, 0.7], dtype=torch.float64)
JOINTS = [random_joint(seed) for seed in (1, 2)]
PARTS = [exact_model(joint) for joint in JOINTS]
MARGINAL = sum(p * joint for p, joint in zip(PRIOR, JOINTS)).flatten()  # of TEXTS


class World(torch.nn.Module):
    """The exact network given z = -1 or 1 behind the time."""

    def __init__(self):
        super().__init__()
        self.parts = torch.nn.ModuleList([Network(part) for part in PARTS])

    def forward(self, x, t, at, tokens=None):
        first = (t[:, 1] < 0)[:, None]
        if tokens is None:
            both = [part(x, t[:, 0], at) for part in PARTS]
            return torch.where(first.expand(at.shape)[at][:, None], *both)
        a, b = (part(x, t[:, 0], at, tokens) for part in self.parts)
        return torch.where(first[..., None], a[0], b[0]), torch.where(first, a[1], b[1])


def given(k):
    return Given(World(), lambda tokens, rows: torch.full((rows, 1), 2.0 * k - 1))


@pytest.mark.parametrize("text", [(0, 2, 1), (1, 1, 1)])
def test_the_bound_given_z_plus_kl_bounds_the_marginal_and_is_tight_at_the_posterior(text):
    """With the exact network, the bound given z is -log p(x | z). For every q(z | x),
    E_q bound + KL(q, prior) >= -log p(x), with equality at p(z | x). The bound given z alone is
    none: with z chosen by the text it lies below -log p(x)."""
    text = torch.tensor([text])
    nats = torch.tensor(
        [expected_loss("mdlm", given(k), text, tiny()) for k in (0, 1)], dtype=torch.float64
    )
    exact = -MARGINAL[(TEXTS == text).all(-1)].log()
    torch.testing.assert_close(
        -(PRIOR.log() - nats).logsumexp(0)[None], exact, rtol=1e-5, atol=1e-5
    )
    bound = lambda q: (q * nats).sum() + torch.special.xlogy(q, q / PRIOR).sum()
    posterior = (PRIOR.log() - nats).softmax(0)
    assert abs(bound(posterior) - exact) < 1e-5
    for q in torch.linspace(0, 1, 21, dtype=torch.float64):
        assert bound(torch.stack((q, 1 - q))) > exact - 1e-5
    assert nats.min() < exact  # no bound
    assert (PRIOR * nats).sum() > exact  # z from the prior: a bound


@pytest.mark.parametrize("sampler", ["first_hitting", "ar"])
def test_texts_with_z_from_the_prior_have_the_marginals_law(sampler):
    """One z for a whole text. A new z in every call would not give this law, nor would one z for
    all texts."""
    canvas, texts = torch.full((1, 3), 3), []
    for k, n in enumerate((PRIOR * 20_000).int().tolist()):
        denoise = denoiser(given(k), tiny())
        gen = row_generators(k, range(n))
        texts.append(last(SAMPLERS[sampler](denoise, canvas.expand(n, -1), 3, tiny(), gen)))
    assert chi_square_p(torch.cat(texts), MARGINAL) > 1e-4
    assert chi_square_p(torch.cat(texts), JOINTS[1].flatten()) < 1e-6


# --------------------------------------------------------------------------------------------------
# The distance to the prior


@pytest.mark.parametrize("dim", [1, 5])
def test_mmds_closed_form_is_that_of_samples(dim):
    z, prior = 0.7 * torch.randn(6, dim) + 0.5, torch.randn(2000, dim, dtype=torch.float64)
    kernel = lambda a, b: sum(
        torch.exp(-torch.cdist(a.double(), b.double()).square() / (w * dim)) for w in (0.5, 1, 2, 4)
    )
    away = lambda k: (k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1))
    want = away(kernel(z, z)) + away(kernel(prior, prior)) - 2 * kernel(z, prior).mean()
    assert abs(mmd(z) - want) < 0.03
    assert mmd(z[:1]) == 0


def test_mmd_is_zero_on_average_for_codes_from_the_prior_and_no_others():
    repeated = lambda draw: torch.stack([mmd(draw()) for _ in range(400)])
    plain = repeated(lambda: torch.randn(8, 3))
    assert plain.mean().abs() < 4 * plain.std() / 20
    for wrong in (lambda: 1.5 * torch.randn(8, 3), lambda: torch.randn(8, 3) + 0.5,
                  lambda: torch.randn(8, 1).expand(8, 3)):  # fmt: skip
        values = repeated(wrong)
        assert values.mean() > 4 * values.std() / 20


def test_descending_mmd_makes_codes_normal():
    z = torch.nn.Parameter(0.3 * torch.randn(128, 2) + 1)
    optimizer = torch.optim.Adam([z], lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        mmd(z).backward()
        optimizer.step()
    assert z.mean(0).abs().max() < 0.15 and (z.T.cov() - torch.eye(2)).abs().max() < 0.3


def test_kl_is_the_mean_log_ratio():
    mean, log_var = torch.tensor([[0.5, -1.0]]), torch.tensor([[-1.0, 0.3]])
    z = draw(mean.expand(200_000, -1), log_var)
    normal = torch.distributions.Normal
    ratio = normal(mean, (log_var / 2).exp()).log_prob(z) - normal(0, 1).log_prob(z)
    error = ratio.sum(-1).std() / len(z) ** 0.5
    assert abs(kl(mean, log_var) - ratio.sum(-1).mean()) < 4 * error


def test_slerp_keeps_to_the_great_circle():
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0])
    torch.testing.assert_close(slerp(a, b, 0), a)
    torch.testing.assert_close(slerp(a, b, 1), b, atol=1e-6, rtol=0)
    torch.testing.assert_close(slerp(a, b, 1 / 3), 8 / 3 * torch.tensor([3**0.5 / 2, 0.5]))
    torch.testing.assert_close(slerp(a, 2 * a, 0.5), 1.5 * a)


# --------------------------------------------------------------------------------------------------
# The way of z through the network


def with_z(t, z):
    return torch.cat((t[:, None], z), 1)


def test_training_starts_from_the_plain_network():
    """The map from z is zero, and it is the only way from z to the logits."""
    model, (x, t) = DiT(LATENT), canvas(LATENT)
    for name, p in model.named_parameters():
        if not p.any() and name != "latent.map.weight":
            torch.nn.init.normal_(p, std=0.3)
    torch.testing.assert_close(model(x, with_z(t, torch.randn(3, 4))), model(x, t))
    torch.nn.init.normal_(model.latent.map.weight)
    assert (model(x, with_z(t, torch.randn(3, 4))) - model(x, t)).abs().max() > 1e-2


@pytest.mark.parametrize("time_cond", [False, True])
@pytest.mark.parametrize("mixer", ["attention", "mamba"])
def test_z_acts_on_its_row_through_the_conditioning(mixer, time_cond):
    """Zeros are no z; a row's z changes that row alone; few requested positions, too."""
    model = awake(replace(LATENT, mixer=mixer, time_cond=time_cond))
    x, t = canvas(LATENT)
    z = torch.randn(3, 4)
    torch.testing.assert_close(model(x, with_z(t, torch.zeros(3, 4))), model(x, t))
    y = model(x, with_z(t, z))
    other = model(x, with_z(t, z + torch.tensor([0.0, 1.0, 0.0])[:, None]))
    changed = (y - other).abs().amax((1, 2)) > 1e-3
    assert changed.tolist() == [False, True, False]
    at = torch.zeros_like(x, dtype=torch.bool)
    at[:, [2, 9]] = True
    torch.testing.assert_close(model(x, with_z(t, z), at), y[at])
    by_hand = model.time(model.time_input(t)) + (z @ model.latent.map.weight.T)[:, None]
    model.time.forward = lambda s: by_hand
    torch.testing.assert_close(model(x, t), y)


def test_wrappers_of_denoise_keep_z():
    """Rows that are finished leave the batch, guidance doubles it: z stays with them."""
    model, cfg = awake(LATENT).requires_grad_(False), LATENT
    z, (x, t) = torch.randn(4), canvas(cfg, 5)
    denoise = denoiser(Given(model, lambda tokens, rows: z.expand(rows, -1)), cfg)
    at = torch.rand(x.shape) < 0.4
    at[2] = False
    want = model(x, with_z(t, z.expand(5, -1))).log_softmax(-1)
    torch.testing.assert_close(denoise(x, t, at), want[at])
    cold = with_temperature(denoise, 0.5)(x, t, at)
    torch.testing.assert_close(cold.float(), (2 * want).log_softmax(-1)[at], rtol=1e-4, atol=1e-4)
    bare = x.masked_fill(x != 3, cfg.mask_id)
    guided = with_guidance(denoise, x != 3, 1.5, cfg)(x, t, at)
    alone = model(bare, with_z(t, z.expand(5, -1))).log_softmax(-1)
    torch.testing.assert_close(guided, (2.5 * want - 1.5 * alone).log_softmax(-1)[at])


@pytest.mark.parametrize("cfg", [LATENT, NOISY], ids=["deterministic", "noisy"])
@pytest.mark.parametrize("dropped", [0.0, 1.0])
def test_the_loss_in_training_reads_the_text(cfg, dropped, monkeypatch):
    """With z of the row's own clean text, or with none of the rows'; in evaluation with none."""
    monkeypatch.setattr(extra.latent, "DROP", dropped)
    model, x0 = awake(cfg), torch.randint(0, 11, (6, 16))
    t, xt = torch.rand(6), x0.masked_fill(torch.rand(x0.shape) < 0.6, cfg.mask_id)
    loss = lambda model, seed=0: (
        torch.manual_seed(seed) and LOSSES["mdlm"](model, x0, ones(x0), cfg, t, xt)
    )
    plain = loss(model)
    model.train()
    monkeypatch.setattr(extra.latent, "mmd", lambda z: z.sum() * 0)
    if cfg is NOISY and not dropped:
        assert (loss(model) - loss(model, 1)).abs().max() > 1e-3
        return
    got = loss(model)
    want = plain if dropped else loss(Given(model, lambda x, n: model.latent.encode(x[..., 0])[0]))
    torch.testing.assert_close(got, want)
    assert dropped or (got - plain).abs().max() > 1e-3


@pytest.mark.parametrize("cfg", [LATENT, NOISY], ids=["deterministic", "noisy"])
def test_the_penalty_has_its_share_of_the_gradient(cfg, monkeypatch):
    """Two micro-batches of a batch of 12: half of mmd_weight MMD + kl_weight KL / L each, although
    the loss returns nats alone."""
    cfg = replace(cfg, batch_size=12, mmd_weight=3.0)
    monkeypatch.setattr(extra.latent, "DROP", 1.0)  # the bound itself gives z no gradient
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    model, x0 = awake(cfg).train(), torch.randint(0, 11, (6, 16))
    xt = x0.masked_fill(torch.rand(x0.shape) < 0.6, cfg.mask_id)
    LOSSES["mdlm"](model, x0, ones(x0), cfg, torch.rand(6), xt).sum().backward()
    got = gradients(model.latent)
    model.zero_grad()
    mean, log_var = model.latent.encode(x0)
    z = mean if log_var is None else mean + (log_var / 2).exp()
    penalty = 3 * mmd(z)
    if log_var is not None:
        penalty = penalty + 0.5 * kl(mean, log_var).mean() / 16
    (penalty / 2).backward()
    for name, grad in gradients(model.latent).items():
        if name == "map.weight":
            continue
        assert grad.any(), name
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-7)


def test_penalty_is_invisible_forward():
    z = torch.randn(3, 2, requires_grad=True)
    y = AddPenalty.apply(z, 5 * z.square().sum())
    assert torch.equal(y, z)
    (2 * y).sum().backward()
    torch.testing.assert_close(z.grad, 2 + 10 * z.detach())


@pytest.mark.slow
def test_a_latent_can_carry_a_text():
    """16 texts, learnt by heart: from masks alone, z of a text brings back its tokens, and z of
    another text that one's. The given first token tells where a position is: without it, rotary
    attention over nothing but masks predicts the same everywhere, whatever z says."""
    cfg = Config(
        vocab_size=20, seq_len=8, n_layer=1, n_head=2, n_embd=32, cond_dim=32, latent_dim=8,
        batch_size=16, mmd_weight=0.1, bos=True, t_min=0.5,
    )  # fmt: skip
    model, x0 = DiT(cfg).train(), torch.randint(1, 20, (16, 8))
    x0[:, 0] = 0
    maskable = x0 > 0
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(600):
        optimizer.zero_grad()
        LOSSES["mdlm"](model, x0, maskable, cfg).mean().backward()
        optimizer.step()
    model.eval().requires_grad_(False)
    blank, tokens = x0.masked_fill(maskable, cfg.mask_id), x0[..., None]
    right = lambda t, want: (model(blank, t).argmax(-1) == want)[:, 1:].float().mean()
    z = lambda choose: with_z(torch.ones(16), choose(model)(tokens, 16))
    assert right(z(from_text), x0) > 0.9
    assert right(z(from_another), x0.roll(1, 0)) > 0.9
    assert right(torch.ones(16), x0) < 0.5


@pytest.mark.parametrize(
    "fields",
    [dict(cond_dim=0), dict(loss="d3pm", T=9), dict(init="smdm"), dict(short_rows=0.1),
     dict(loss="ar", causal=True, cond_dim=0)],
)  # fmt: skip
def test_what_a_latent_does_not_go_with_is_refused(fields):
    with pytest.raises(ValueError, match="latent_dim=4: needs cond_dim > 0, loss=mdlm or sedd"):
        Config(latent_dim=4, **fields)
