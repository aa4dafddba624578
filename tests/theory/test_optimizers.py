"""Learning rates, averages and optimizers against upstream's rules, and Muon against torch's."""

from dataclasses import replace

import pytest
import torch
from world import tiny

import train
from configs import CONFIGS, Config
from extra import muon
from model import DiT


def test_learning_rates_are_upstreams():
    mdlm, nanodd = CONFIGS["owt_mdlm"](), CONFIGS["text8_d3pm"]()
    rates = lambda cfg, steps: [train.lr_at(step, cfg) for step in steps]
    want = [0, 1.5e-4, 3e-4, 3e-4]
    assert rates(mdlm, (0, 1250, 2500, 999_999)) == pytest.approx(want)
    middle = 2500 + (500_000 - 2500) // 2
    want = [0, 1e-3, 1e-5 + (1e-3 - 1e-5) / 2, 1e-5]
    assert rates(nanodd, (0, 2500, middle, 500_000)) == pytest.approx(want)
    wsd = Config(lr=1, lr_decay="linear", warmup=10, steps=100, decay_steps=20, min_lr=0.1)
    assert rates(wsd, (5, 10, 80, 90, 100)) == pytest.approx([0.5, 1, 1, 0.55, 0.1])


def decay_of_update(cfg, n):
    """The decay of the average in update n, from an average of 0 and a weight of 1."""
    average, model = (torch.nn.Linear(1, 1, bias=False) for _ in range(2))
    torch.nn.init.zeros_(average.weight)
    torch.nn.init.ones_(model.weight)
    train.update_ema(average, model, n, cfg)
    return 1 - average.weight.item()


@pytest.mark.parametrize("n", [1, 2, 50, 10**6])
def test_the_average_is_mdlms(n):
    want = min(0.9999, (1 + n) / (10 + n))
    assert decay_of_update(CONFIGS["owt_mdlm"](), n) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("n", [1, 100, 101, 102, 150, 10**6])
def test_the_average_is_nanodds(n):
    """Its ema-pytorch: copies, then 1 - 1 / (1 + e), e = n - 101."""
    want = min(0.9999, 1 - 1 / (1 + max(n - 101, 0)))
    assert decay_of_update(CONFIGS["text8_d3pm"](), n) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("muon_lr", [0.0, 0.02])
def test_every_parameter_has_one_optimizer_and_only_matrices_decay(muon_lr):
    cfg = replace(tiny(), n_layer=2, weight_decay=0.1, muon_lr=muon_lr)
    model = DiT(cfg)
    optimizers = train.make_optimizers(model, cfg)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [p for group in groups for p in group["params"]]
    assert sorted(map(id, parameters)) == sorted(map(id, model.parameters()))
    assert all((g["weight_decay"] > 0) == (p.ndim >= 2) for g in groups for p in g["params"])
    by_muon = [o.param_groups[0]["params"] for o in optimizers if isinstance(o, muon.Muon)]
    of_a_block = [[b.qkv, b.attn_out, b.mlp_in, b.mlp_out] for b in model.blocks]
    want = {id(layer.weight) for layers in of_a_block for layer in layers} if muon_lr else set()
    assert {id(p) for params in by_muon for p in params} == want


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_muon_in_bfloat16_is_torchs_to_the_bit(shape, monkeypatch):
    monkeypatch.setattr(muon, "compute_dtype", lambda device, dtype: "bfloat16")
    start = torch.randn(shape)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    options = dict(lr=0.02, weight_decay=0.1)
    optimizers = muon.Muon([ours], **options), torch.optim.Muon([theirs], **options)
    for _ in range(5):
        gradient = torch.randn(shape)
        for p, optimizer in zip((ours, theirs), optimizers):
            p.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(ours, theirs)
    assert torch.equal(*(o.state_dict()["state"][0]["momentum_buffer"] for o in optimizers))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_muon_in_float32_orthogonalises(shape):
    """The result has the gradient's singular vectors; five steps bring the singular
    values to 0.68 .. 1.14."""
    u, s, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    s = torch.linspace(1, 0.05, len(s), dtype=torch.float64)
    rotated = u.T @ muon.orthogonalize(u @ s.diag() @ vh, torch.float32).double() @ vh.T
    values = rotated.diagonal()
    assert 0.6 < values.min() and values.max() < 1.25
    assert (rotated - values.diag()).abs().max() < 1e-4
    a, b, c = 3.4445, -4.7750, 2.0315  # each step maps a singular value x to a x + b x^3 + c x^5
    x = s / s.norm()
    for _ in range(5):
        x = a * x + b * x**3 + c * x**5
    assert (values - x).abs().max() < 1e-4


@pytest.mark.parametrize(
    "capability, dtype",
    [("avx512_bf16", torch.bfloat16), ("amx_bf16", torch.bfloat16), ("avx2", torch.float32)],
)
def test_muon_multiplies_in_what_the_cpu_has_instructions_for(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True})
    seen, orthogonalize = [], muon.orthogonalize
    note = lambda g, dtype: seen.append(dtype) or orthogonalize(g, dtype)
    monkeypatch.setattr(muon, "orthogonalize", note)
    p = torch.nn.Parameter(torch.randn(4, 4))
    p.grad = torch.randn(4, 4)
    muon.Muon([p]).step()
    assert seen == [dtype]
