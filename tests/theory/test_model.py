"""The network: its sizes against upstream's, its initial weights, and what each switch promises."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from world import kolmogorov_p

import configs
from common import autocast
from configs import CONFIGS, Config
from diffusion import LOSSES, TIME_DRAWS, alpha, cross_entropy
from head import SlicedCrossEntropy, cast_linears
from model import DiT, count_parameters, flops_per_token, rotary_tables, rotate

SMALL = Config(vocab_size=11, seq_len=16, n_layer=2, n_head=2, n_embd=16, cond_dim=8)
AR = dict(loss="ar", causal=True, cond_dim=0)
SWIGLU = dict(cond_dim=0, norm="rms", mlp="swiglu", bias=False)


def awake(cfg):
    """A DiT whose zero-initialised tensors are random, so that every path carries signal."""
    model = DiT(cfg).eval()
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.3)
    return model


def canvas(cfg, B=3):
    return torch.randint(0, cfg.vocab_size + 1, (B, cfg.seq_len)), torch.rand(B)


def in_bfloat16(enabled=True):
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def assert_near(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def saved_bytes(run):
    """(what run() returns, the bytes that autograd stores for its backward, each storage once)."""
    kept = {}

    def store(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(store, lambda tensor: tensor):
        return run(), sum(kept.values())


def gradients(model):
    """{name: gradient or None}."""
    return {name: p.grad for name, p in model.named_parameters()}


# --------------------------------------------------------------------------------------------------
# Sizes

SMDM_PARAMETERS = {
    6: 6.294784, 19: 18.880896, 34: 33.563136, 48: 47.786688, 66: 65.54944, 75: 75.38752,
    85: 85.21408, 113: 113.265408, 142: 141.581568, 170: 169.897728, 180: 179.856768,
    206: 205.550464, 231: 231.24416, 268: 268.469248, 302: 302.027776, 336: 335.586304,
    472: 471.90656, 551: 550.55744, 571: 571.001728, 629: 629.20832, 666: 666.168448,
    717: 717.285888, 761: 761.335168, 831: 830.541312, 944: 943.796736, 1028: 1027.677952,
    1233: 1233.213184, 1476: 1476.487168, 1678: 1677.826048, 2121: 2121.39328,
}  # fmt: skip


@pytest.mark.parametrize(
    "config, parameters",
    [
        ("text8_d3pm", 92_402_176),  # nanoDD, vocabulary 28
        ("owt_d3pm", 130_978_816),  # nanoDD, vocabulary 50,258
        ("owt_mdlm", 169_627_218 - 769),  # MDLM small, less the head's row and bias for MASK
        ("owt_sedd", 169_627_218 - 769),
        ("owt_ar", 162_246_482 - 769),
        ("lm1b_mdlm", 139_292_986 + 768),  # MASK is one id more, and has a row in the embedding
        ("lm1b_d3pm", 139_292_986 + 768 + 769),  # and in the head
    ],
)
def test_parameter_counts_are_upstreams(config, parameters):
    assert count_parameters(CONFIGS[config]()) == parameters


@pytest.mark.slow
def test_smdms_thirty_sizes_have_its_parameter_counts():
    """SMDM's table of parameters without embedding and head, in millions, and 64,001 rows of those.
    Its AR twin has one row less; ours keeps the row of MASK, which it never reads."""
    for size, millions in SMDM_PARAMETERS.items():
        whole = round(millions * 1e6) + 64_001 * configs.SMDM_SIZES[size][2]
        assert count_parameters(CONFIGS[f"smdm_{size}"]()) == whole
        assert count_parameters(CONFIGS[f"smdm_{size}_ar"]()) == whole
    assert SMDM_PARAMETERS.keys() == configs.SMDM_SIZES.keys() and len(SMDM_PARAMETERS) == 30


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mlp", [dict(), dict(mlp="swiglu", mlp_width=96)])
def test_flops_are_those_of_the_matrices(mlp, recompute, monkeypatch):
    """Against torch's counter of a forward and a backward, in bfloat16, where attention is plain
    matmuls and so is counted. Recomputed work is not in our number: the blocks' forward without
    their last matrix, and large logits."""
    cfg = replace(SMALL, cond_dim=0, n_embd=64, seq_len=32, recompute=recompute, **mlp)
    model = awake(cfg).train()
    x, t = canvas(cfg, 4)
    at = torch.rand(x.shape).view(-1).argsort().view(x.shape) < 48  # a multiple of 8: no padding
    ours = flops_per_token(cfg, at.double().mean().item()) * x.numel()
    head = 6 * 64 * 11 * at.sum().item()
    blocks = (ours - head) / 3 - cfg.n_layer * 2 * 64 * (cfg.mlp_width or 4 * 64) * x.numel()

    def counted(loss):
        with FlopCounterMode(display=False) as counter, in_bfloat16():
            loss().sum().backward()
        return counter.get_total_flops()

    want = ours + recompute * blocks
    assert counted(lambda: model(x, t, at)) == pytest.approx(want, rel=1e-12)
    nats = lambda: model(x, t, at, x.clamp(max=10)[..., None])[0]
    for large, again in ((2**24, 0), (0, head / 3)):  # stored logits, logits that are recomputed
        monkeypatch.setattr("head.LARGE", large)
        assert counted(nats) == pytest.approx(want + again, rel=1e-12)


def test_flops_count_the_head_on_the_tokens_that_the_loss_requests():
    nanodd = dict(loss="d3pm", T=9, aux_ce=0.1)
    for fields, share in (({}, 0.5), (AR, 1), (nanodd, 1)):
        cfg = replace(SMALL, **fields)
        assert flops_per_token(cfg) - flops_per_token(cfg, 0) == share * 6 * 16 * 11


# --------------------------------------------------------------------------------------------------
# Initial weights


def normal_cdf(x):
    return torch.special.ndtr(x)


@pytest.mark.parametrize("d", [64, 256])
@pytest.mark.parametrize("tied", [False, True])
def test_the_embedding_begins_with_its_law(tied, d):
    """Uniform on +-1 / sqrt(d), or, tied, normal with standard deviation 1 / sqrt(d) cut at 3 of
    those; also MASK's row, the last. Kolmogorov and Smirnov's test does not see the cut, which
    changes 0.3 % of the values: their largest shows it."""
    std = d**-0.5
    weights = DiT(Config(vocab_size=999, n_layer=1, n_head=2, n_embd=d, tied=tied)).embed.weight
    if tied:
        inside = 1 - 2 * normal_cdf(torch.tensor(-3.0, dtype=torch.float64))
        cdf = lambda x: (normal_cdf(x / std) - normal_cdf(-3 * torch.ones_like(x))) / inside
        assert 2.95 * std < weights.abs().max() <= 3 * std  # (2.95, 3] holds 0.05 % of them
    else:
        cdf = lambda x: (x + std) / (2 * std)
        assert weights.abs().max() <= std
    assert weights.shape == (1000, d)
    assert kolmogorov_p(weights.detach().flatten(), cdf) > 1e-4
    assert kolmogorov_p(weights.detach()[-1], cdf) > 1e-4


def test_smdms_initialisation_has_its_widths():
    cfg = replace(SMALL, **SWIGLU, mlp_width=20, init="smdm", n_embd=64)
    for name, p in DiT(cfg).named_parameters():
        if p.ndim == 2:
            writes = "attn_out" in name or "mlp_out" in name
            want = 64**-0.5 / 2 if writes else (0.4 / 64) ** 0.5
            assert abs(p.std().item() / want - 1) < 4 / (2 * p.numel()) ** 0.5, name
        else:
            assert (p == 1).all(), name  # the gains of the norms


@pytest.mark.parametrize("cond_dim", [0, 8])
def test_every_block_starts_as_the_identity_and_every_token_at_log_v(cond_dim):
    cfg = replace(SMALL, cond_dim=cond_dim)
    model, (x, t) = DiT(cfg), canvas(cfg)
    torch.testing.assert_close(model.hidden(x, t), model.final_norm(model.embed(x)))
    assert (model(x, t) == 0).all()  # uniform: each token costs log V


# --------------------------------------------------------------------------------------------------
# Layers by hand


def test_smdms_network_by_hand():
    """RMSNorm, SwiGLU and no biases, from the formulas."""
    cfg = replace(SMALL, **SWIGLU, mlp_width=20, init="smdm", n_embd=64)
    model, (x, t) = DiT(cfg).eval(), canvas(cfg)
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())
    for norm in (model.blocks[0].norm2, model.final_norm):
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
    rms = lambda h, g: h * (h.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * g
    block, h = model.blocks[0], torch.randn(2, 5, 64)
    w1, w2 = block.mlp_in.weight.chunk(2)
    assert_near(block.mlp(h), (F.silu(h @ w1.T) * (h @ w2.T)) @ block.mlp_out.weight.T)
    assert_near(block.norm2(h), rms(h, block.norm2.weight))
    h = model.embed(x)
    for b in model.blocks:
        h = h + b.attention(b.norm1(h), model.cos, model.sin)
        h = h + b.mlp(b.norm2(h))
    assert_near(model(x, t), rms(h, model.final_norm.weight) @ model.head.weight.T)


def test_rotary_scores_depend_on_distance_alone():
    """Half-split convention: (j, j + half) is one pair, turned by
    position * 10000 ** (-2j / head_dim)."""
    cos, sin = rotary_tables(64, 8)
    q, k = torch.randn(2, 8)
    score = lambda i, j: rotate(q, cos[i], sin[i]) @ rotate(k, cos[j], sin[j])
    torch.testing.assert_close(score(3, 7), score(40, 44))
    assert (score(3, 7) - score(3, 8)).abs() > 1e-3
    e = F.one_hot(torch.tensor(1), 8).float()  # second pair of four: (1, 5)
    angle = torch.tensor(5 * 10_000 ** (-2 * 1 / 8))
    want = torch.zeros(8)
    want[1], want[5] = angle.cos(), angle.sin()
    torch.testing.assert_close(rotate(e, cos[5], sin[5]), want)


def test_adaln_reads_shift_scale_gate_in_upstreams_order():
    """Six chunks: shift, scale and gate of attention, then of the MLP; two at
    the end: shift, scale."""
    model, c, (cos, sin) = awake(SMALL), torch.randn(2, 1, 8), rotary_tables(16, 8)
    block, x = model.blocks[0], torch.randn(2, 16, 16)
    m = (c @ block.ada.weight.T + block.ada.bias).view(2, 1, 6, 16).unbind(2)
    y = m[0] + (1 + m[1]) * F.layer_norm(x, (16,)) * block.norm1.weight
    h = x + m[2] * block.attention(y, cos, sin)
    y = m[3] + (1 + m[4]) * F.layer_norm(h, (16,)) * block.norm2.weight
    torch.testing.assert_close(block(x, c, cos, sin), h + m[5] * block.mlp(y))
    ids, t = canvas(SMALL)
    model.blocks = torch.nn.ModuleList()
    c = model.time(model.time_input(t))
    m = (c @ model.final_ada.weight.T + model.final_ada.bias).view(-1, 1, 2, 16).unbind(2)
    want = m[0] + (1 + m[1]) * model.final_norm(model.embed(ids))
    torch.testing.assert_close(model.hidden(ids, t), want)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_adaln_that_rows_share_equals_adaln_per_row(norm):
    """One vector for all rows against the same vector once per row: values and gradients."""
    cfg = replace(SMALL, norm=norm)
    block, x, cos_sin = awake(cfg).blocks[0], torch.randn(3, 16, 16), rotary_tables(16, 8)
    torch.nn.init.uniform_(block.norm1.weight, 0.5, 2)
    got = []
    for rows in (1, 3):
        c = torch.linspace(-1, 1, 8).expand(rows, 1, 8)
        block.zero_grad()
        y = block(x, c, *cos_sin)
        y.square().sum().backward()
        got.append([y, *(p.grad for p in block.parameters())])
    for a, b in zip(*got):
        assert_near(a, b)


def backward_names(tensor):
    """The names of all nodes of a tensor's backward graph."""
    names, stack = set(), [tensor.grad_fn]
    while stack:
        node = stack.pop()
        names.add(node.name())
        stack += [f for f, _ in node.next_functions if f is not None]
    return names


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [16, 600, 1030])
def test_attention_equals_scaled_dot_product_attention(length, causal):
    """Plain matmuls in bfloat16 training of rows up to 1,024 on CPUs,
    torch's kernel for the rest."""
    cfg = replace(SMALL, seq_len=length, **(AR if causal else {}))
    block = awake(cfg).blocks[0]
    x, (cos, sin) = torch.randn(2, length, 16), rotary_tables(length, 8)
    q, k, v = (a.view(2, length, 2, 8).transpose(1, 2) for a in block.qkv(x).chunk(3, -1))
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    want = block.attn_out(y.transpose(1, 2).reshape(2, length, 16))
    in_float32 = block.attention(x, cos, sin)
    assert_near(in_float32, want)
    exact = torch.autograd.grad(want.square().sum(), block.qkv.weight)[0]
    with in_bfloat16():
        y = block.attention(x, cos, sin)
    assert "SoftmaxBackward0" not in backward_names(in_float32)
    assert ("SoftmaxBackward0" in backward_names(y)) == (length <= 1024)
    got = torch.autograd.grad(y.float().square().sum(), block.qkv.weight)[0]
    assert (y - want).norm() < 0.03 * want.norm() and (got - exact).norm() < 0.05 * exact.norm()


# --------------------------------------------------------------------------------------------------
# The head


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_runs_on_the_requested_positions(tied):
    cfg = replace(SMALL, tied=tied)
    model, (x, t) = awake(cfg), canvas(cfg)
    at = torch.rand(x.shape) < 0.4
    rows, full = model(x, t, at), model(x, t)
    assert rows.shape == (at.sum(), cfg.vocab_size) and rows.dtype == torch.float32
    assert full.shape == (*x.shape, cfg.vocab_size)  # V outputs: MASK cannot be predicted
    torch.testing.assert_close(rows, full[at])
    assert model(x, t, torch.zeros_like(at)).shape == (0, cfg.vocab_size)


def test_a_tied_head_is_the_first_rows_of_the_embedding():
    model, (x, t) = awake(replace(SMALL, tied=True)), canvas(SMALL)
    torch.testing.assert_close(model(x, t), model.hidden(x, t) @ model.embed.weight[:-1].T)


def test_a_tied_head_that_may_predict_mask_has_its_row():
    cfg = replace(SMALL, tied=True, loss="d3pm", T=10, zero_masking=False)
    model, (x, t) = awake(cfg), canvas(cfg)
    torch.testing.assert_close(model(x, t), model.hidden(x, t) @ model.embed.weight.T)
    assert model(x, t).shape[-1] == cfg.vocab_size + 1


@pytest.mark.parametrize("dtype, close", [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("V", [11, 5000])
@pytest.mark.parametrize("kind", [dict(), dict(tied=True), dict(bias=False)])
def test_costs_without_stored_logits_are_those_with_them(V, kind, dtype, close, monkeypatch):
    """With one slice of the vocabulary and with many: values, every gradient, and the (N, V)
    numbers that are not stored."""
    cfg = replace(SMALL, vocab_size=V, **kind)
    model, (x, t) = awake(cfg), canvas(cfg, 80)
    at, tokens = torch.rand(x.shape) < 0.5, torch.randint(0, V, (*x.shape, 2))
    N = int(at.sum())
    monkeypatch.setattr("head.LARGE", N * V - 1)
    weight = torch.rand(N, 3) * 2 - 0.5  # of both signs
    weight[:5] = 0

    def run(costs):
        model.zero_grad()
        with in_bfloat16(dtype == "bfloat16"):
            (nats, log_z), kept = saved_bytes(costs)
        cost = torch.cat((nats, log_z[:, None]), 1)
        (cost * weight).sum().backward()
        return cost.detach(), gradients(model), kept

    stored = run(lambda: cross_entropy(model(x, t, at), tokens[at]))
    sliced = run(lambda: [cost[at] for cost in model(x, t, at, tokens)])
    torch.testing.assert_close(stored[0], sliced[0])
    for name, a in stored[1].items():
        assert (a - sliced[1][name]).norm() <= close * a.norm(), name
    if V > 11:  # but for a few numbers per token
        assert stored[2] - sliced[2] > 3.9 * V * N


def test_costs_of_no_position_are_zero():
    model, (x, t) = awake(SMALL), canvas(SMALL)
    tokens = torch.randint(0, 11, (*x.shape, 2))
    nats, log_z = model(x, t, torch.zeros_like(x, dtype=torch.bool), tokens)
    assert nats.shape == tokens.shape and not nats.any() and not log_z.any()


def test_costs_without_stored_logits_survive_large_logits():
    """Logits of hundreds, whose exponentials overflow; the gradient of a certain token is 0."""
    h, y = torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2)
    for size in (300.0, -300.0):
        weight = torch.nn.Parameter(size * torch.eye(4, 4))
        nats, log_z = SlicedCrossEntropy.apply(h, weight, None, y[:, None])
        logits = h @ weight.T
        torch.testing.assert_close(nats[:, 0], F.cross_entropy(logits, y, reduction="none"))
        torch.testing.assert_close(log_z, logits.logsumexp(-1) - math.log(4))
        nats.sum().backward()
        if size > 0:
            assert not weight.grad.any()


LOSS_FIELDS = [
    dict(), dict(loss="sedd"), AR, dict(loss="d3pm", T=9), dict(loss="d3pm", T=9, aux_ce=0.1),
    dict(loss="d3pm", T=9, zero_masking=False),
]  # fmt: skip


@pytest.mark.parametrize("fields", LOSS_FIELDS, ids=str)
def test_no_loss_stores_large_logits(fields, monkeypatch):
    """The same loss and gradients, and no (N, V) tensor is stored for the backward pass."""
    V = 5000
    cfg = replace(SMALL, vocab_size=V, **fields)
    model, x0 = awake(cfg).train(), torch.randint(0, V, (80, 16))
    maskable = torch.ones(x0.shape, dtype=torch.bool)
    t, xt, _ = TIME_DRAWS[cfg.time_draw](x0, maskable, cfg, torch.rand(80), torch.rand(x0.shape))

    def run(large):
        monkeypatch.setattr("head.LARGE", large)
        model.zero_grad()
        nats, kept = saved_bytes(lambda: LOSSES[cfg.loss](model, x0, maskable, cfg, t, xt))
        nats.mean().backward()
        return nats.detach(), torch.cat([p.grad.flatten() for p in model.parameters()]), kept

    (nats, grad, kept), (nats2, grad2, kept2) = run(2**40), run(0)
    torch.testing.assert_close(nats, nats2, rtol=1e-4, atol=1e-4)
    assert (grad - grad2).norm() < 1e-4 * grad.norm()
    logits = 4 * V * (x0.numel() if cfg.causal or cfg.aux_ce else int((xt == V).sum()))
    assert kept > logits and kept - kept2 > 0.8 * logits


def test_the_head_gets_few_sizes(monkeypatch):
    """Around 1,000 tokens, as from batch to batch in training: two sizes instead of forty; and the
    logits of the requested tokens."""
    sizes, linear = set(), F.linear
    model, (x, t) = awake(replace(SMALL, seq_len=300)), canvas(replace(SMALL, seq_len=300), 4)

    def count(h, w, *bias):
        if w is model.head.weight:
            sizes.add(len(h))
        return linear(h, w, *bias)

    for n in [*range(1000, 1040), 1, 7, 9]:
        at = torch.randperm(x.numel()).view(x.shape) < n
        with monkeypatch.context() as patch:
            patch.setattr(F, "linear", count)
            got = model(x, t, at)
        assert got.shape == (n, 11)
        assert_near(got, model(x, t)[at])
    assert sizes == {1024, 1088, 8, 16}


@pytest.mark.parametrize("large", [2**24, 0])
def test_padding_the_head_changes_no_gradient(large, monkeypatch):
    monkeypatch.setattr("head.LARGE", large)
    model, (x, t) = awake(replace(SMALL, seq_len=300)), canvas(replace(SMALL, seq_len=300), 4)
    at, x0, n = torch.randperm(x.numel()).view(x.shape) < 9, torch.randint(11, x.shape), 9
    parameters, weight = list(model.parameters()), torch.arange(1, n + 1)
    padded = model(x, t, at, x0[..., None])[0][at][:, 0]
    plain = F.cross_entropy(model(x, t)[at], x0[at], reduction="none")
    assert padded.shape == plain.shape == (n,)
    pairs = (torch.autograd.grad((loss * weight).sum(), parameters) for loss in (padded, plain))
    for a, b in zip(*pairs):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Causal networks


@pytest.mark.parametrize("kind", [{}, AR, AR | dict(bos=True)], ids=str)
def test_a_causal_network_sees_only_the_past_and_others_see_everything(kind):
    """A causal network's prediction at a position does not depend on the token there."""
    cfg = replace(SMALL, **kind)
    model, (x, t) = awake(cfg), canvas(cfg, 1)
    changed = x.clone()
    changed[0, 9] = (x[0, 9] + 1) % cfg.vocab_size
    same = (model(x, t) - model(changed, t)).abs().amax(-1)[0] < 1e-6
    assert not same[10:].any() and same[:10].all().item() == cfg.causal


def test_a_causal_network_reads_the_start_symbol_or_begins_after_a_given_token():
    """Shifted by hand: with bos, position i reads the trunk over the tokens at i - 1; without, the
    trunk over MASK and then the tokens at i."""
    plain, given = awake(replace(SMALL, **AR)), awake(replace(SMALL, **AR, bos=True))
    (x, t), cfg = canvas(SMALL), SMALL
    x = x.clamp(max=cfg.vocab_size - 1)
    start = F.pad(x, (1, 0), value=cfg.mask_id)[:, :-1]
    torch.testing.assert_close(plain(x, t), plain.logits(plain.trunk(start, t)))
    torch.testing.assert_close(given(x, t)[:, 1:], given.logits(given.trunk(x, t))[:, :-1])
    at = torch.rand(x.shape) < 0.5
    torch.testing.assert_close(given(x, t, at), given(x, t)[at])


@pytest.mark.parametrize("bos", [False, True])
def test_reading_in_pieces_is_reading_at_once(bos):
    model, (x, t) = awake(replace(SMALL, **AR, bos=bos)), canvas(SMALL)
    x, past = x.clamp(max=SMALL.vocab_size - 1), [[] for _ in model.blocks]
    for i in (1, 2, 5, 6, 11):
        assert_near(model.next_logits(x[:, :i], past), model(x, t)[:, i])


def test_a_shorter_row_is_a_prefix_of_positions():
    """Any length up to seq_len runs; positions count from 0."""
    model, (x, t) = awake(replace(SMALL, **AR)), canvas(SMALL)
    torch.testing.assert_close(model(x[:, :7], t), model(x, t)[:, :7])


# --------------------------------------------------------------------------------------------------
# Time, dropout, recomputation


@pytest.mark.parametrize("time_input", ["sigma", "step"])
def test_time_conditioning_is_per_row_and_can_be_switched_off(time_input):
    cfg = replace(SMALL, time_cond=True, time_input=time_input)
    model, (x, _) = awake(cfg), canvas(cfg, 2)
    a, b = model(x, torch.tensor([0.2, 0.9])), model(x, torch.tensor([0.2, 0.3]))
    torch.testing.assert_close(a[0], b[0])
    assert (a[1] - b[1]).abs().max() > 1e-3
    model.cfg = replace(cfg, time_cond=False)
    a, b = model(x, torch.tensor([0.2, 0.9])), model(x, torch.tensor([1.0, 0.3]))
    torch.testing.assert_close(a, b)


def test_the_time_embedding_reads_upstreams_numbers():
    t = torch.tensor([0.001, 0.5, 1.0])
    read = lambda **fields: DiT(replace(SMALL, time_cond=True, **fields)).time_input(t).float()
    torch.testing.assert_close(read(), -torch.log1p(-(1 - 1e-3) * t))  # MDLM's loglinear noise
    torch.testing.assert_close(read(time_input="step"), 1000 * t)  # nanoDD's step of 1000
    want = -torch.log(1e-3 + 0.999 * alpha("cosine", t)).float()
    torch.testing.assert_close(read(schedule="cosine"), want)
    assert torch.isfinite(want).all()


def test_dropout_acts_in_training_only():
    cfg = replace(SMALL, dropout=0.5)
    model, (x, t) = awake(cfg), canvas(cfg)
    assert (model(x, t) == model(x, t)).all()
    model.train()
    assert (model(x, t) - model(x, t)).abs().max() > 1e-3


KINDS = [dict(dropout=0.3), dict(dropout=0.3, time_cond=True), AR]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_recomputing_blocks_changes_memory_and_no_bit_of_a_gradient(kind):
    """With the same dropout. Of a block, only its input is stored."""
    cfg = replace(SMALL, n_layer=6, n_embd=64, seq_len=64, **kind)
    x, t = canvas(cfg, 8)

    def run(recompute):
        torch.manual_seed(3)
        model = awake(replace(cfg, recompute=recompute)).train()
        weights = sum(p.numel() * 4 for p in model.parameters())
        with in_bfloat16(cfg.causal):
            h, kept = saved_bytes(lambda: model.hidden(x, t))
        next_random = torch.rand(3)
        h.square().sum().backward()
        return h.detach(), next_random, gradients(model), kept - weights

    (h, random, grads, kept), (h2, random2, grads2, kept2) = run(False), run(True)
    assert torch.equal(h, h2) and torch.equal(random, random2)
    for name, a in grads.items():
        assert a is grads2[name] is None or torch.equal(a, grads2[name]), name
    assert kept2 < kept / 4


# --------------------------------------------------------------------------------------------------
# Compilation, bfloat16, inference


@pytest.mark.parametrize(
    "changes", [{}, dict(time_cond=True), dict(cond_dim=0), dict(dropout=0.1), AR, AR | SWIGLU]
)
def test_the_trunk_compiles_as_one_graph(changes):
    """No graph break, and one compilation for all steps of a run."""
    cfg = replace(SMALL, **changes)
    model = awake(cfg)
    torch._dynamo.reset()
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    trunk = torch.compile(model.hidden, backend=backend, fullgraph=True)
    for _ in range(3):
        x, t = canvas(cfg)
        with in_bfloat16():
            torch.testing.assert_close(trunk(x, t), model.hidden(x, t))
    assert len(compilations) == 1


def test_bfloat16_autocast_keeps_the_residual_stream_and_logits_in_float32():
    model, (x, t) = awake(SMALL), canvas(SMALL)
    want = model(x, t)
    with in_bfloat16():
        hidden, logits = model.hidden(x, t), model(x, t)
    assert hidden.dtype == logits.dtype == torch.float32
    assert 0 < (logits - want).abs().max() < 0.05 * want.abs().max()


@pytest.mark.parametrize(
    "change", [{}, dict(tied=True, bias=False), SWIGLU, dict(time_cond=True), AR], ids=str
)
def test_casting_linear_layers_once_changes_no_bit_of_the_logits(change):
    cfg = replace(SMALL, **change)
    model, (x, t) = awake(cfg).requires_grad_(False), canvas(cfg)
    x = x.clamp(max=cfg.vocab_size - 1) if cfg.causal else x

    def logits():
        with autocast(torch.device("cpu"), "bfloat16"):
            cached = [model.next_logits(x[:, :5], [[] for _ in model.blocks])] if cfg.causal else []
            return [model(x, t), *cached]

    before = logits()
    cast_linears(model, torch.bfloat16)
    matrices = [p for block in model.blocks for p in block.parameters() if p.ndim == 2]
    assert {p.dtype for p in matrices} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(before, logits()))
    assert model.embed.weight.dtype == torch.float32 == model.final_norm.weight.dtype


LAST = [dict(), dict(time_cond=True), dict(cond_dim=0), dict(cond_dim=0, mlp="swiglu", norm="rms")]


def wide_awake(**fields):
    """A network of two blocks with random weights in every tensor, on rows of 48 tokens."""
    fields = dict(cond_dim=8) | fields
    model = DiT(Config(vocab_size=27, seq_len=48, n_embd=32, n_head=4, n_layer=2, **fields)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    return model


@pytest.mark.parametrize("fields", LAST, ids=str)
def test_the_last_block_runs_only_on_few_requested_positions(fields):
    """The same logits in the same order, with rows that request different numbers of tokens. The
    last block's MLP runs on no more positions than the row that requests most."""
    model, seen = wide_awake(**fields), []
    note = lambda module, args, out: seen.append(args[0].shape[1])
    model.blocks[1].mlp_in.register_forward_hook(note)
    x, t = torch.randint(0, 28, (4, 48)), torch.rand(4)
    everywhere = model(x, t)
    at = torch.zeros(4, 48, dtype=torch.bool)
    at[0, [3, 47]], at[1, [0, 11, 12, 30, 31]], at[3, 20] = True, True, True
    torch.testing.assert_close(model(x, t, at), everywhere[at])
    at[1] = True
    torch.testing.assert_close(model(x, t, at), everywhere[at])
    assert seen == [48, 5, 48]
    assert model(x[:0], t[:0], at[:0]).shape == model(x, t, at & False).shape == (0, 27)


def test_recompute_acts_in_training_only():
    model = wide_awake()
    x, t, few = torch.randint(0, 28, (4, 48)), torch.rand(4), torch.arange(48).expand(4, 48) < 3
    again = DiT(replace(model.cfg, recompute=True)).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x, t, few), model(x, t, few))


@pytest.mark.parametrize("bf16, sizes", [(False, [2, 2, 1]), (True, [5])])
def test_rows_pass_the_trunk_by_parts_of_about_512_tokens_on_a_cpu(bf16, sizes):
    """Twice as many in bfloat16; in training all at once."""
    cfg = Config(vocab_size=27, seq_len=200, n_embd=32, n_head=4, n_layer=1, cond_dim=0)
    model, seen = DiT(cfg).eval(), []
    torch.nn.init.normal_(model.head.weight)
    model.blocks[0].register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    x, t, at = torch.randint(0, 28, (5, 200)), torch.rand(5), torch.rand(5, 200) < 0.5
    with in_bfloat16(bf16):
        got = model(x, t, at)
        torch.testing.assert_close(got, model(x, t)[at])
        model.train()(x, t, at)
    assert seen == [*sizes, 5, 5]
