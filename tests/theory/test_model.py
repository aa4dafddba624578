"""The network: sizes against upstream's, and what each switch promises."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import configs
from common import autocast
from configs import CONFIGS, Config
from diffusion import LOSSES, TIME_DRAWS, alpha, cross_entropy
from head import SlicedCrossEntropy, cast_linears
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
        SMALL,
        cond_dim=0,
        norm="rms",
        mlp="swiglu",
        mlp_width=20,
        bias=False,
        init="smdm",
        n_embd=64,
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


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mlp", [dict(), dict(mlp="swiglu", mlp_width=96)])
def test_flops_are_those_of_the_matrices(mlp, recompute, monkeypatch):
    """Against torch's own counter on both ways of a step, from the logits. In bfloat16 attention is written out, and
    so is counted. What is worked out again is not the model's: the blocks' way forward but for their last matrix."""
    cfg = replace(SMALL, cond_dim=0, n_embd=64, seq_len=32, recompute=recompute, **mlp)
    model = awake(cfg).train()
    x, t = canvas(cfg, 4)
    at = (
        torch.rand(x.shape).view(-1).argsort().view(x.shape) < 48
    )  # a multiple of 8: nothing is padded
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
        model(x, t, at).sum().backward()
    ours = flops_per_token(cfg, at.double().mean().item()) * x.numel()
    head = 6 * 64 * 11 * at.sum().item()
    blocks = (ours - head) / 3 - cfg.n_layer * 2 * 64 * (cfg.mlp_width or 4 * 64) * x.numel()
    assert counter.get_total_flops() == pytest.approx(ours + recompute * blocks, rel=1e-12)
    for large, again in (
        (2**24, 0),
        (0, head / 3),
    ):  # logits that are kept, and that are worked out twice
        monkeypatch.setattr("head.LARGE", large)
        with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
            model(x, t, at, x.clamp(max=10)[..., None])[0].sum().backward()
        assert counter.get_total_flops() == pytest.approx(
            ours + recompute * blocks + again, rel=1e-12
        )


def test_flops_count_the_head_on_the_tokens_that_the_loss_asks_for():
    for cfg, share in (
        (SMALL, 0.5),
        (replace(SMALL, **AR), 1),
        (replace(SMALL, loss="d3pm", T=9, aux_ce=0.1), 1),
    ):
        head = flops_per_token(cfg) - flops_per_token(cfg, 0)
        assert head == share * 6 * 16 * 11


def saved_bytes(run):
    """(what run() returns, bytes that autograd keeps of it for the way back, each storage once)."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda a: (
            kept.__setitem__(a.untyped_storage().data_ptr(), a.untyped_storage().nbytes()),
            a,
        )[1],
        lambda a: a,
    ):
        return run(), sum(kept.values())


@pytest.mark.parametrize(
    "kind",
    [
        dict(dropout=0.3),
        dict(dropout=0.3, time_cond=True),
        dict(loss="ar", causal=True, cond_dim=0),
    ],
)
def test_recomputing_blocks_changes_memory_and_no_bit_of_a_gradient(kind):
    """With the same dropout, too. What is kept of a block is then its input."""
    cfg = replace(SMALL, n_layer=6, n_embd=64, seq_len=64, **kind)
    (x, t), got = canvas(cfg, 8), []
    for recompute in (False, True):
        torch.manual_seed(3)
        model = awake(replace(cfg, recompute=recompute)).train()
        weights = sum(p.numel() * 4 for p in model.parameters())
        with torch.autocast("cpu", torch.bfloat16, enabled=cfg.causal):
            h, kept = saved_bytes(lambda: model.hidden(x, t))  # noqa: B023
        after = torch.rand(3)
        h.square().sum().backward()
        got.append(
            (h.detach(), {n: p.grad for n, p in model.named_parameters()}, after, kept - weights)
        )
    (h, grads, after, kept), (h2, grads2, after2, kept2) = got
    assert torch.equal(h, h2) and torch.equal(after, after2)
    assert all(
        (grads[n] is None and grads2[n] is None) or torch.equal(grads[n], grads2[n]) for n in grads
    )
    assert kept2 < kept / 4


@pytest.mark.parametrize("V", [11, 5000])
@pytest.mark.parametrize("kind", [dict(), dict(tied=True), dict(bias=False)])
def test_the_costs_without_logits_are_those_with_them(V, kind, monkeypatch):
    """Of one slice of the vocabulary and of many; values and every gradient, in float32 and, to its precision,
    bfloat16, where sure answers are not lost in rounding; and no (N, V) numbers are kept."""
    cfg = replace(SMALL, vocab_size=V, **kind)
    model, (x, t) = awake(cfg), canvas(cfg, 80)
    at = torch.rand(x.shape) < 0.5
    tokens = torch.randint(0, V, (*x.shape, 2))
    N = int(at.sum())
    monkeypatch.setattr("head.LARGE", N * V - 1)
    weight = torch.rand(N, 3) * 2 - 0.5  # of any sign, and of none
    weight[:5] = 0
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        values, gradients, memory = [], [], []
        for way in (
            lambda: cross_entropy(model(x, t, at), tokens[at]),
            lambda: [cost[at] for cost in model(x, t, at, tokens)],
        ):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                (nats, log_z), kept = saved_bytes(way)
            cost = torch.cat((nats, log_z[:, None]), 1)
            (cost * weight).sum().backward()
            memory.append(kept)
            values.append(cost.detach())
            gradients.append([p.grad for p in model.parameters()])
        torch.testing.assert_close(*values)
        for a, b in zip(*gradients):
            assert (a - b).norm() <= close * a.norm()
        if V > 11:  # but for a few numbers per token
            assert memory[0] - memory[1] > 3.9 * V * N
    with torch.no_grad():
        nats, log_z = model(x, t, torch.zeros_like(at), tokens)
        assert nats.shape == (*x.shape, 2) and not nats.any() and not log_z.any()


def test_the_costs_without_logits_stand_large_logits_and_sure_answers():
    """Logits of hundreds, whose exponentials overflow; the gradient of a sure answer is 0, not bfloat16's rounding."""
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


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(loss="sedd"),
        AR,
        dict(loss="d3pm", T=9),
        dict(loss="d3pm", T=9, aux_ce=0.1),
        dict(loss="d3pm", T=9, zero_masking=False),
    ],
)
def test_no_loss_writes_large_logits_down(fields, monkeypatch):
    """Whatever it is made of: the same loss and gradients, and no (N, V) tensor kept for the way back."""
    V = 5000
    cfg = replace(SMALL, vocab_size=V, **fields)
    model, x0, got = awake(cfg).train(), torch.randint(0, V, (80, 16)), []
    maskable = torch.ones(x0.shape, dtype=torch.bool)
    t, xt, _ = TIME_DRAWS[cfg.time_draw](x0, maskable, cfg, torch.rand(80), torch.rand(x0.shape))
    for large in (2**40, 0):
        monkeypatch.setattr("head.LARGE", large)
        model.zero_grad()
        nats, kept = saved_bytes(lambda: LOSSES[cfg.loss](model, x0, maskable, cfg, t, xt))
        nats.mean().backward()
        got.append((nats.detach(), torch.cat([p.grad.flatten() for p in model.parameters()]), kept))
    (nats, grad, kept), (nats2, grad2, kept2) = got
    torch.testing.assert_close(nats, nats2, rtol=1e-4, atol=1e-4)
    assert (grad - grad2).norm() < 1e-4 * grad.norm()
    logits = 4 * V * (x0.numel() if cfg.causal or cfg.aux_ce else int((xt == V).sum()))
    assert kept > logits and kept - kept2 > 0.8 * logits


def test_adaln_that_rows_share_is_the_norms_own_gain_and_bias():
    """One vector for all rows against the same vector once per row: values and gradients."""
    for cfg in (SMALL, replace(SMALL, norm="rms")):
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
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


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
    want = torch.zeros(8).index_put(
        (torch.tensor([1, 5]),), torch.stack((angle.cos(), angle.sin()))
    )
    torch.testing.assert_close(rotate(e, cos[5], sin[5]), want)


def test_adaln_reads_shift_scale_gate_in_upstreams_order():
    """Six chunks: shift, scale and gate of attention, then of the MLP; two at the end: shift, scale."""
    model, c, (cos, sin) = awake(SMALL), torch.randn(2, 1, 8), rotary_tables(16, 8)
    block, x = model.blocks[0], torch.randn(2, 16, 16)
    m = (c @ block.ada.weight.T + block.ada.bias).view(2, 1, 6, 16).unbind(2)
    h = x + m[2] * block.attention(
        m[0] + (1 + m[1]) * F.layer_norm(x, (16,)) * block.norm1.weight, cos, sin
    )
    h = h + m[5] * block.mlp(m[3] + (1 + m[4]) * F.layer_norm(h, (16,)) * block.norm2.weight)
    torch.testing.assert_close(block(x, c, cos, sin), h)
    ids, t = canvas(SMALL)
    model.blocks = torch.nn.ModuleList()
    c = model.time(model.time_input(t))
    m = (c @ model.final_ada.weight.T + model.final_ada.bias).view(-1, 1, 2, 16).unbind(2)
    torch.testing.assert_close(
        model.hidden(ids, t), m[0] + (1 + m[1]) * model.final_norm(model.embed(ids))
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [16, 600, 1030])
def test_attention_equals_scaled_dot_product_attention(length, causal):
    """Written out in bfloat16 training of rows up to 1,024 on CPUs, torch's kernel for the rest: one law."""
    cfg = replace(SMALL, seq_len=length, **(AR if causal else {}))
    block = awake(cfg).blocks[0]
    x, (cos, sin) = torch.randn(2, length, 16), rotary_tables(length, 8)
    q, k, v = (a.view(2, length, 2, 8).transpose(1, 2) for a in block.qkv(x).chunk(3, -1))
    y = F.scaled_dot_product_attention(
        rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=causal
    )
    want = block.attn_out(y.transpose(1, 2).reshape(2, length, 16))
    plain = block.attention(x, cos, sin)
    torch.testing.assert_close(plain, want, rtol=1e-4, atol=1e-5)
    exact = torch.autograd.grad(want.square().sum(), block.qkv.weight)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y = block.attention(x, cos, sin)
    for out, written in ((plain, False), (y, length <= 1024)):
        names, todo = set(), [out.grad_fn]
        while todo:
            node = todo.pop()
            names.add(node.name())
            todo += [f for f, _ in node.next_functions if f is not None]
        assert ("SoftmaxBackward0" in names) == written
    got = torch.autograd.grad(y.float().square().sum(), block.qkv.weight)[0]
    assert (y - want).norm() < 0.03 * want.norm() and (got - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("kind", [{}, AR, AR | dict(bos=True)])
def test_causal_sees_the_past_alone_and_bidirectional_everything(kind):
    """A causal network's answer at a position does not depend on the token there, which it is to predict."""
    cfg = replace(SMALL, **kind)
    model, (x, t) = awake(cfg), canvas(cfg, 1)
    changed = x.clone()
    changed[0, 9] = (x[0, 9] + 1) % cfg.vocab_size
    same = (model(x, t) - model(changed, t)).abs().amax(-1)[0] < 1e-6
    assert not same[10:].any() and same[:10].all().item() == cfg.causal


def test_a_causal_network_reads_the_start_symbol_or_begins_after_a_given_token():
    """Shifted by hand: with bos, position i reads the trunk over the bare tokens at i - 1; without, the trunk
    over MASK and then the tokens at i."""
    plain, given = awake(replace(SMALL, **AR)), awake(replace(SMALL, **AR, bos=True))
    (x, t), cfg = canvas(SMALL), SMALL
    x = x.clamp(max=cfg.vocab_size - 1)
    start = torch.cat((torch.full((len(x), 1), cfg.mask_id), x), 1)[:, :-1]
    torch.testing.assert_close(plain(x, t), plain.logits(plain.trunk(start, t)))
    torch.testing.assert_close(given(x, t)[:, 1:], given.logits(given.trunk(x, t))[:, :-1])
    at = torch.rand(x.shape) < 0.5
    torch.testing.assert_close(given(x, t, at), given(x, t)[at])


@pytest.mark.parametrize("bos", [False, True])
def test_reading_in_pieces_is_reading_at_once(bos):
    model, (x, t) = awake(replace(SMALL, **AR, bos=bos)), canvas(SMALL)
    x, past = x.clamp(max=SMALL.vocab_size - 1), [[] for _ in model.blocks]
    for i in (1, 2, 5, 6, 11):
        torch.testing.assert_close(
            model.next_logits(x[:, :i], past), model(x, t)[:, i], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("time_input", ["sigma", "step"])
def test_time_conditioning_is_per_row_and_can_be_switched_off(time_input):
    cfg = replace(SMALL, time_cond=True, time_input=time_input)
    model, (x, _) = awake(cfg), canvas(cfg, 2)
    a, b = model(x, torch.tensor([0.2, 0.9])), model(x, torch.tensor([0.2, 0.3]))
    torch.testing.assert_close(a[0], b[0])
    assert (a[1] - b[1]).abs().max() > 1e-3
    model.cfg = replace(cfg, time_cond=False)
    torch.testing.assert_close(
        model(x, torch.tensor([0.2, 0.9])), model(x, torch.tensor([1.0, 0.3]))
    )


def test_the_time_embedding_reads_upstreams_numbers():
    t = torch.tensor([0.001, 0.5, 1.0])
    sigma = DiT(replace(SMALL, time_cond=True)).time_input(t)
    torch.testing.assert_close(
        sigma.float(), -torch.log1p(-(1 - 1e-3) * t)
    )  # MDLM's loglinear noise
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


LAST = [dict(), dict(time_cond=True), dict(cond_dim=0), dict(cond_dim=0, mlp="swiglu", norm="rms")]


@pytest.mark.parametrize("fields", LAST, ids=str)
def test_the_last_block_runs_where_few_are_asked(fields):
    """The same answers, in the same order, from rows that are asked for different numbers of tokens; and the last
    block's MLP is seen to run on no more positions than the row that is asked for most."""
    cfg = Config(
        vocab_size=27, seq_len=48, n_embd=32, n_head=4, n_layer=2, **dict(cond_dim=8) | fields
    )
    model = DiT(cfg).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    seen = []
    model.blocks[1].mlp_in.register_forward_hook(
        lambda module, args, out: seen.append(args[0].shape[1])
    )
    x, t = torch.randint(0, 28, (4, 48)), torch.rand(4)
    everywhere = model(x, t)
    at = torch.zeros(4, 48, dtype=torch.bool)
    at[0, [3, 47]], at[1, [0, 11, 12, 30, 31]], at[3, 20] = True, True, True
    torch.testing.assert_close(model(x, t, at), everywhere[at])
    at[1] = True
    torch.testing.assert_close(model(x, t, at), everywhere[at])
    assert seen == [48, 5, 48]
    again = DiT(
        replace(cfg, recompute=True)
    ).eval()  # outside of training there is nothing to work out again
    again.load_state_dict(model.state_dict())
    few = at & (torch.arange(48) < 3)
    assert torch.equal(again(x, t, few), model(x, t, few))
    assert model(x[:0], t[:0], at[:0]).shape == model(x, t, at & False).shape == (0, 27)


@pytest.mark.parametrize("bf16, sizes", [(False, [2, 2, 1]), (True, [5])])
def test_rows_go_by_parts_of_about_512_tokens_on_a_cpu(bf16, sizes):
    """Twice as many in bfloat16; in training all at once."""
    cfg = Config(vocab_size=27, seq_len=200, n_embd=32, n_head=4, n_layer=1, cond_dim=0)
    model, seen = DiT(cfg).eval(), []
    torch.nn.init.normal_(model.head.weight)
    model.blocks[0].register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    x, t, at = torch.randint(0, 28, (5, 200)), torch.rand(5), torch.rand(5, 200) < 0.5
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        got = model(x, t, at)
        torch.testing.assert_close(got, model(x, t)[at])
        model.train()(x, t, at)
    assert seen == [*sizes, 5, 5]


@pytest.mark.parametrize(
    "change",
    [
        {},
        dict(tied=True, bias=False),
        dict(norm="rms", mlp="swiglu", cond_dim=0),
        dict(time_cond=True),
        AR,
    ],
    ids=["default", "tied", "smdm", "time", "ar"],
)
def test_matrices_rounded_once_give_the_logits_of_those_rounded_in_every_call(change):
    """To the bit. And in float32 nothing is rounded."""
    cfg = replace(SMALL, **change)
    model, (x, t), cpu = awake(cfg).requires_grad_(False), canvas(cfg), torch.device("cpu")
    x = x.clamp(max=cfg.vocab_size - 1) if cfg.causal else x

    def logits():
        with autocast(cpu, "bfloat16"):
            return model(x, t), model.next_logits(
                x[:, :5], [[] for _ in model.blocks]
            ) if cfg.causal else None

    before = logits()
    cast_linears(model, torch.bfloat16)
    assert {p.dtype for b in model.blocks for p in b.parameters() if p.ndim == 2} == {
        torch.bfloat16
    }
    for a, b in zip(before, logits()):
        assert a is b is None or torch.equal(a, b)
    assert model.embed.weight.dtype == torch.float32 == model.final_norm.weight.dtype


def test_the_head_meets_few_sizes_and_answers_as_without_padding(monkeypatch):
    """Numbers of tokens around 1,000, as from batch to batch in training: two sizes instead of forty. Logits, losses and
    all gradients are those of the tokens that were asked, with logits and without."""
    sizes, plain = set(), F.linear
    cfg = replace(SMALL, seq_len=300)
    model, (x, t) = awake(cfg), canvas(cfg, 4)
    weight = model.head.weight
    for n in [*range(1000, 1040), 1, 7, 9]:
        at = torch.zeros(x.numel(), dtype=torch.bool)
        at[torch.randperm(x.numel())[:n]] = True
        at = at.view(x.shape)

        def seen(h, w, *bias):
            if w.data_ptr() == weight.data_ptr():
                sizes.add(len(h))
            return plain(h, w, *bias)

        monkeypatch.setattr(F, "linear", seen)
        got = model(x, t, at)
        monkeypatch.setattr(F, "linear", plain)
        want = model(x, t)[at]
        assert got.shape == want.shape == (n, 11)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert sizes == {1024, 1088, 8, 16}
    x0 = torch.randint(11, x.shape)
    gradients = []
    for large in (2**24, 0, None):
        monkeypatch.setattr("head.LARGE", large)
        loss = (
            F.cross_entropy(model(x, t)[at], x0[at], reduction="none")
            if large is None
            else model(x, t, at, x0[..., None])[0][at][:, 0]
        )
        assert loss.shape == (n,)
        gradients.append(
            torch.autograd.grad((loss * torch.arange(1, n + 1)).sum(), list(model.parameters()))
        )
    for a, b, c in zip(*gradients):
        torch.testing.assert_close(a, c, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(b, c, rtol=1e-3, atol=1e-5)
