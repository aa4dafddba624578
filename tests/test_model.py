"""The network: sizes against upstream's, and what each switch promises."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import configs
from configs import CONFIGS, Config
from diffusion import alpha
from model import DiT, count_parameters, flops_per_token, rotary_tables, rotate

SMALL = Config(vocab_size=11, seq_len=16, n_layer=2, n_head=2, n_embd=16, cond_dim=8)
AR = dict(loss="ar", causal=True, cond_dim=0)


def awake(cfg):
    """A DiT whose zero-initialised tensors are random, so that every path carries signal."""
    model = DiT(cfg).eval()
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.3)
    return model


def canvas(cfg, B=3):
    return torch.randint(0, cfg.vocab_size + 1, (B, cfg.seq_len)), torch.rand(B)


SMDM_PARAMETERS = {
    6: 6.294784, 19: 18.880896, 34: 33.563136, 48: 47.786688, 66: 65.54944, 75: 75.38752, 85: 85.21408,
    113: 113.265408, 142: 141.581568, 170: 169.897728, 180: 179.856768, 206: 205.550464, 231: 231.24416,
    268: 268.469248, 302: 302.027776, 336: 335.586304, 472: 471.90656, 551: 550.55744, 571: 571.001728,
    629: 629.20832, 666: 666.168448, 717: 717.285888, 761: 761.335168, 831: 830.541312, 944: 943.796736,
    1028: 1027.677952, 1233: 1233.213184, 1476: 1476.487168, 1678: 1677.826048, 2121: 2121.39328,
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


def test_smdms_thirty_sizes_have_its_parameter_counts():
    """SMDM's table of parameters without embedding and head, in millions, and 64,001 rows of those. The AR twin has
    one row less there; ours keeps it, for MASK, which it never reads."""
    for size, n_m in SMDM_PARAMETERS.items():
        whole = round(n_m * 1e6) + 64_001 * configs.SMDM_SIZES[size][2]
        assert count_parameters(CONFIGS[f"smdm_{size}"]()) == whole
        assert count_parameters(CONFIGS[f"smdm_{size}_ar"]()) == whole
    assert SMDM_PARAMETERS.keys() == configs.SMDM_SIZES.keys() and len(SMDM_PARAMETERS) == 30


def test_smdms_network_by_hand():
    """RMSNorm, SwiGLU, no biases, from the formulas; and the widths of SMDM's initialisation."""
    cfg = replace(
        SMALL, cond_dim=0, norm="rms", mlp="swiglu", mlp_width=20, bias=False, init="smdm", n_embd=64
    )
    torch.manual_seed(0)
    model, (x, t) = DiT(cfg).eval(), canvas(cfg)
    std = {name: p.std().item() for name, p in model.named_parameters() if p.ndim == 2}
    for name, got in std.items():
        want = 64**-0.5 / 2 if "attn_out" in name or "mlp_out" in name else (0.4 / 64) ** 0.5
        assert got == pytest.approx(want, rel=0.1), name
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())
    for norm in (model.blocks[0].norm2, model.final_norm):
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
    rms = lambda h, g: h * (h.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * g
    block, h = model.blocks[0], torch.randn(2, 5, 64)
    w1, w2 = block.mlp_in.weight.chunk(2)
    want = (F.silu(h @ w1.T) * (h @ w2.T)) @ block.mlp_out.weight.T
    torch.testing.assert_close(block.mlp(h), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(block.norm2(h), rms(h, block.norm2.weight), rtol=1e-4, atol=1e-5)
    embedded = model.embed(x)
    for b in model.blocks:
        embedded = embedded + b.attention(b.norm1(embedded), model.cos, model.sin)
        embedded = embedded + b.mlp(b.norm2(embedded))
    want = rms(embedded, model.final_norm.weight) @ model.head.weight.T
    torch.testing.assert_close(model(x, t), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mlp", [dict(), dict(mlp="swiglu", mlp_width=96)])
def test_flops_are_those_of_the_matrices(mlp):
    """Against torch's own counter on a forward pass; 6 N per token is 3 forwards of 2 N."""
    from torch.utils.flop_counter import FlopCounterMode

    cfg = replace(SMALL, cond_dim=0, n_embd=64, seq_len=32, **mlp)
    model = awake(cfg)
    x, t = canvas(cfg, 4)
    with FlopCounterMode(display=False) as counter:
        model(x, t, torch.ones_like(x, dtype=torch.bool))
    assert counter.get_total_flops() * 3 == flops_per_token(cfg, masked=1.0) * x.numel()


@pytest.mark.parametrize("cond_dim", [0, 8])
def test_every_block_starts_as_the_identity_and_every_token_at_log_v(cond_dim):
    cfg = replace(SMALL, cond_dim=cond_dim)
    model, (x, t) = DiT(cfg), canvas(cfg)
    torch.testing.assert_close(model.hidden(x, t), model.final_norm(model.embed(x)))
    assert (model(x, t) == 0).all()  # uniform: each token costs log V


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_runs_where_it_is_asked(tied):
    cfg = replace(SMALL, tied=tied)
    model, (x, t) = awake(cfg), canvas(cfg)
    at = torch.rand(x.shape) < 0.4
    rows, full = model(x, t, at), model(x, t)
    assert rows.shape == (at.sum(), cfg.vocab_size) and rows.dtype == torch.float32
    assert full.shape == (*x.shape, cfg.vocab_size)  # V outputs: MASK cannot be answered
    torch.testing.assert_close(rows, full[at])
    assert model(x, t, torch.zeros_like(at)).shape == (0, cfg.vocab_size)


def test_a_tied_head_that_may_answer_mask_has_its_row():
    cfg = replace(SMALL, tied=True, loss="d3pm", T=10, zero_masking=False)
    model, (x, t) = awake(cfg), canvas(cfg)
    torch.testing.assert_close(model(x, t), model.hidden(x, t) @ model.embed.weight.T)
    assert model(x, t).shape[-1] == cfg.vocab_size + 1


def test_the_tied_head_is_the_first_rows_of_the_embedding():
    cfg = replace(SMALL, tied=True)
    model, (x, t) = awake(cfg), canvas(cfg)
    want = model.hidden(x, t) @ model.embed.weight[:-1].T
    torch.testing.assert_close(model(x, t), want)


def test_rotary_scores_depend_on_distance_alone():
    """Half-split convention: (j, j + half) is one pair, turned by position * 10000 ** (-2j / head_dim)."""
    cos, sin = rotary_tables(64, 8)
    q, k = torch.randn(2, 8)
    score = lambda i, j: rotate(q, cos[i], sin[i]) @ rotate(k, cos[j], sin[j])
    torch.testing.assert_close(score(3, 7), score(40, 44))
    assert (score(3, 7) - score(3, 8)).abs() > 1e-3
    e = F.one_hot(torch.tensor(1), 8).float()  # second pair of four: (1, 5)
    angle = torch.tensor(5 * 10_000 ** (-2 * 1 / 8))
    want = torch.zeros(8).index_put((torch.tensor([1, 5]),), torch.stack((angle.cos(), angle.sin())))
    torch.testing.assert_close(rotate(e, cos[5], sin[5]), want)


def test_adaln_reads_shift_scale_gate_in_upstreams_order():
    """Six chunks: shift, scale and gate of attention, then of the MLP; two at the end: shift, scale."""
    model, c, (cos, sin) = awake(SMALL), torch.randn(2, 1, 8), rotary_tables(16, 8)
    block, x = model.blocks[0], torch.randn(2, 16, 16)
    m = (c @ block.ada.weight.T + block.ada.bias).view(2, 1, 6, 16).unbind(2)
    h = x + m[2] * block.attention(m[0] + (1 + m[1]) * F.layer_norm(x, (16,)) * block.norm1.weight, cos, sin)
    h = h + m[5] * block.mlp(m[3] + (1 + m[4]) * F.layer_norm(h, (16,)) * block.norm2.weight)
    torch.testing.assert_close(block(x, c, cos, sin), h)
    ids, t = canvas(SMALL)
    model.blocks = torch.nn.ModuleList()
    c = model.time(model.time_input(t))
    m = (c @ model.final_ada.weight.T + model.final_ada.bias).view(-1, 1, 2, 16).unbind(2)
    torch.testing.assert_close(model.hidden(ids, t), m[0] + (1 + m[1]) * model.final_norm(model.embed(ids)))


@pytest.mark.parametrize("length", [16, 600])
def test_attention_equals_scaled_dot_product_attention(length):
    """Written out for short rows on CPUs, torch's kernel for the rest: one law."""
    cfg = replace(SMALL, seq_len=length)
    block = awake(cfg).blocks[0]
    x, (cos, sin) = torch.randn(2, length, 16), rotary_tables(length, 8)
    q, k, v = (a.view(2, length, 2, 8).transpose(1, 2) for a in block.qkv(x).chunk(3, -1))
    y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
    want = block.attn_out(y.transpose(1, 2).reshape(2, length, 16))
    torch.testing.assert_close(block.attention(x, cos, sin), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [{}, AR, AR | dict(bos=True)])
def test_causal_sees_the_past_alone_and_bidirectional_everything(kind):
    """A causal network's answer at a position does not depend on the token there, which it is to predict."""
    cfg = replace(SMALL, **kind)
    model, (x, t) = awake(cfg), canvas(cfg, 1)
    changed = x.clone()
    changed[0, 9] = (x[0, 9] + 1) % cfg.vocab_size
    same = (model(x, t) - model(changed, t)).abs().amax(-1)[0] < 1e-6
    assert not same[10:].any() and same[:10].all().item() == cfg.causal
    if cfg.causal:  # longer rows take another path, the one of GPUs: the same answers
        model, x = awake(replace(cfg, seq_len=600)), torch.randint(0, cfg.vocab_size, (1, 600))
        t = torch.zeros(1)
        torch.testing.assert_close(model(x, t)[:, :300], model(x[:, :300], t), rtol=1e-4, atol=1e-5)


def test_a_causal_network_reads_the_start_symbol_or_begins_after_a_given_token():
    """Shifted by hand: with bos, position i reads the trunk over the bare tokens at i - 1; without, the trunk
    over MASK and then the tokens at i."""
    plain, given = awake(replace(SMALL, **AR)), awake(replace(SMALL, **AR, bos=True))
    (x, t), cfg = canvas(SMALL), SMALL
    x = x.clamp(max=cfg.vocab_size - 1)
    start = torch.cat((torch.full((len(x), 1), cfg.mask_id), x), 1)[:, :-1]
    torch.testing.assert_close(plain(x, t), plain.logits(plain.hidden(start, t)))
    torch.testing.assert_close(given(x, t)[:, 1:], given.logits(given.hidden(x, t))[:, :-1])
    at = torch.rand(x.shape) < 0.5
    torch.testing.assert_close(given(x, t, at), given(x, t)[at])


@pytest.mark.parametrize("bos", [False, True])
def test_reading_in_pieces_is_reading_at_once(bos):
    model, (x, t) = awake(replace(SMALL, **AR, bos=bos)), canvas(SMALL)
    x, past = x.clamp(max=SMALL.vocab_size - 1), [[] for _ in model.blocks]
    for i in (1, 2, 5, 6, 11):
        torch.testing.assert_close(model.next_logits(x[:, :i], past), model(x, t)[:, i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("time_input", ["sigma", "step"])
def test_time_conditioning_is_per_row_and_can_be_switched_off(time_input):
    cfg = replace(SMALL, time_cond=True, time_input=time_input)
    model, (x, _) = awake(cfg), canvas(cfg, 2)
    a, b = model(x, torch.tensor([0.2, 0.9])), model(x, torch.tensor([0.2, 0.3]))
    torch.testing.assert_close(a[0], b[0])
    assert (a[1] - b[1]).abs().max() > 1e-3
    model.cfg = replace(cfg, time_cond=False)
    torch.testing.assert_close(model(x, torch.tensor([0.2, 0.9])), model(x, torch.tensor([1.0, 0.3])))


def test_the_time_embedding_reads_upstreams_numbers():
    t = torch.tensor([0.001, 0.5, 1.0])
    sigma = DiT(replace(SMALL, time_cond=True)).time_input(t)
    torch.testing.assert_close(sigma.float(), -torch.log1p(-(1 - 1e-3) * t))  # MDLM's loglinear noise
    steps = DiT(replace(SMALL, time_cond=True, time_input="step")).time_input(t)
    torch.testing.assert_close(steps, torch.tensor([1.0, 500.0, 1000.0]))  # nanoDD's step of 1000
    cosine = DiT(replace(SMALL, time_cond=True, schedule="cosine")).time_input(t)
    torch.testing.assert_close(cosine, -torch.log(1e-3 + 0.999 * alpha("cosine", t)))
    assert torch.isfinite(cosine).all()


def test_a_shorter_row_is_a_prefix_of_positions():
    """Any length up to seq_len runs; positions count from 0."""
    model, (x, t) = awake(replace(SMALL, **AR)), canvas(SMALL)
    torch.testing.assert_close(model(x[:, :7], t), model(x, t)[:, :7])


def test_dropout_acts_in_training_only():
    cfg = replace(SMALL, dropout=0.5)
    model, (x, t) = awake(cfg), canvas(cfg)
    assert (model(x, t) == model(x, t)).all()
    model.train()
    assert (model(x, t) - model(x, t)).abs().max() > 1e-3


SWIGLU = dict(cond_dim=0, norm="rms", mlp="swiglu", bias=False)


@pytest.mark.parametrize(
    "changes", [{}, {"time_cond": True}, {"cond_dim": 0}, {"dropout": 0.1}, AR, AR | SWIGLU]
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
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(trunk(x, t), model.hidden(x, t))
    assert len(compilations) == 1


def test_bfloat16_autocast_keeps_the_residual_stream_and_logits_in_float32():
    model, (x, t) = awake(SMALL), canvas(SMALL)
    want = model(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        hidden, logits = model.hidden(x, t), model(x, t)
    assert hidden.dtype == logits.dtype == torch.float32
    assert 0 < (logits - want).abs().max() < 0.05 * want.abs().max()
