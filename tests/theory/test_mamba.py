"""The selective scan against the recurrence step by step, and what a Mamba block promises."""

from dataclasses import replace

import pytest
import torch
from test_model import SMALL, awake, canvas, gradients, in_bfloat16
from torch.utils.flop_counter import FlopCounterMode

import extra.scan
from common import autocast
from configs import CONFIGS, Config
from diffusion import denoiser, row_generators
from extra.mamba import EXPAND, STATES, WINDOW, MambaBlock, Pass, multiply_adds
from extra.scan import scan
from head import cast_linears
from model import DiT, count_parameters, flops_per_token
from samplers import cached_denoiser, left_to_right
from train import make_optimizers

MAMBA = replace(SMALL, mixer="mamba", norm="rms")
CAUSAL = replace(MAMBA, loss="ar", causal=True, cond_dim=0)
BOTH = pytest.mark.parametrize("cfg", [MAMBA, CAUSAL], ids=["both ways", "causal"])


def step_by_step(dt, u, A, B, C, h):
    """The recurrence, one token after the other; h (R, d, n)."""
    ys = []
    for t in range(u.shape[1]):
        decay = torch.exp(dt[:, t, :, None] * A)
        h = decay * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        ys.append((h * C[:, t, None]).sum(-1))
    return torch.stack(ys, 1), h


def scan_inputs(R, L, d=6, n=4):
    """With steps dt from 0.001 to 3: states that last for the row and states that are gone at
    once."""
    dt = 1e-3 * 3000 ** torch.rand(R, L, d)
    return (
        dt,
        torch.randn(R, L, d),
        -4 * torch.rand(d, n),
        torch.randn(R, L, n),
        torch.randn(R, L, n),
    )


def relative(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


@pytest.mark.parametrize("large", [2**24, 60], ids=["at once", "by channels"])
@pytest.mark.parametrize("chunks", [None, 1, 3, 8])
@pytest.mark.parametrize("R, L", [(1, 1), (3, 2), (1, 67), (2, 64), (3, 257)])
def test_the_scan_is_the_recurrence(R, L, chunks, large, monkeypatch):
    """Outputs, the last state and every gradient, in float32 against float64, from zero and from a
    state; lengths that chunks do not divide, and fewer steps than chunks."""
    monkeypatch.setattr(extra.scan, "LARGE", large * L)
    inputs = scan_inputs(R, L)
    weight = torch.randn(R, L, 6)
    for start in (None, torch.randn(R, 4, 6)):
        ours = [x.clone().requires_grad_() for x in inputs]
        exact = [x.double().requires_grad_() for x in inputs]
        y, h = scan(*ours, start, chunks)
        begin = torch.zeros(R, 4, 6) if start is None else start
        want, last = step_by_step(*exact, begin.transpose(1, 2).double())
        assert relative(y, want) < 1e-5 and relative(h, last.transpose(1, 2)) < 1e-5
        (y * weight).sum().backward()
        (want * weight).sum().backward()
        for a, b in zip(ours, exact):
            if L > 1 or b.grad.any():  # one step from zero does not depend on A
                assert relative(a.grad, b.grad) < 1e-5


def test_the_scan_of_no_tokens_is_the_state_before():
    before = torch.randn(2, 4, 6)
    y, h = scan(*scan_inputs(2, 0), before)
    assert y.shape == (2, 0, 6) and torch.equal(h, before)


def test_the_scan_survives_strong_decay():
    """exp(dt A) of 1e-300 underflows to zero, as it should; no ratio of decays is formed."""
    dt, u, A, B, C = scan_inputs(2, 33)
    y, _ = scan(300 * dt, u, A, B, C, chunks=4)
    want, _ = step_by_step(300 * dt, u, A, B, C, torch.zeros(2, 6, 4))
    assert y.isfinite().all() and relative(y, want) < 1e-5


def test_the_kernel_gets_and_returns_its_own_layout(monkeypatch):
    """mamba_ssm's layout, (R, channels, L), around a stand-in that computes the recurrence. The
    kernel itself was not run: there was no GPU."""

    def kernel(u, delta, A, B, C, return_last_state):
        assert return_last_state and all(x.is_contiguous() for x in (u, delta, B, C))
        dt, u, B, C = (x.transpose(1, 2) for x in (delta, u, B, C))
        y, h = step_by_step(dt, u, A, B, C, torch.zeros(len(u), *A.shape))
        return y.transpose(1, 2), h

    inputs = scan_inputs(2, 9)
    plain = scan(*inputs)
    monkeypatch.setattr(extra.scan, "find_kernel", lambda x: kernel)
    for a, b in zip(scan(*inputs), plain):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# The block


def test_a_pass_by_hand():
    """Convolution over the last WINDOW tokens, SiLU, dt, B and C of the token, scan and skip D."""
    layer, u = Pass(8, 2), torch.randn(3, 11, 8)
    torch.nn.init.uniform_(layer.D, 0.5, 2)
    a = layer.conv1d(torch.nn.functional.pad(u.transpose(1, 2), (WINDOW - 1, 0))).transpose(1, 2)
    a = a * a.sigmoid()
    r, B, C = (a @ layer.x_proj.weight.T).split((2, STATES, STATES), -1)
    dt = (r @ layer.dt_proj.weight.T + layer.dt_bias).exp().log1p()
    A = -layer.A_log.view(8, STATES).exp()
    y, _ = step_by_step(dt, a, A, B, C, torch.zeros(3, 8, STATES))
    torch.testing.assert_close(layer(u), y + layer.D * a)


def test_a_pass_begins_as_mambas():
    layer = Pass(512, 4)
    dt = torch.nn.functional.softplus(layer.dt_bias)
    assert 1e-3 * 0.99 < dt.min() < 2e-3 and 0.05 < dt.max() < 0.1 * 1.01
    assert abs(dt.log().mean() - torch.tensor(1e-2).log()) < 4 * dt.log().std() / 512**0.5
    torch.testing.assert_close(
        layer.A_log.exp().view(512, STATES)[7], torch.arange(1.0, STATES + 1)
    )
    assert (layer.D == 1).all() and 0.45 < layer.dt_proj.weight.abs().max() <= 0.5


def test_flipping_the_row_and_swapping_the_passes_flips_the_answer():
    block, x = MambaBlock(MAMBA), torch.randn(2, 13, 16)
    y = block.mix(x)
    block.forward_pass, block.backward_pass = block.backward_pass, block.forward_pass
    torch.testing.assert_close(block.mix(x.flip(1)).flip(1), y)
    assert (block.mix(x) - y).abs().max() > 1e-3  # the two are not the same


def test_a_block_keeps_its_input_with_and_without_adaln():
    """MDLM's DiMamba without adaLN has no skip connection: a block whose mixer is silent would
    return zero."""
    x, c = torch.randn(2, 13, 16), torch.randn(2, 1, 8)
    for cfg in (MAMBA, CAUSAL):
        block = MambaBlock(cfg)
        torch.nn.init.zeros_(block.mix_out.weight)
        assert torch.equal(block(x, c if cfg.cond_dim else None, None, None), x)
    block = awake(MAMBA).blocks[0]
    shift, scale, gate = block.ada(c).chunk(3, -1)
    want = x + gate * block.mix(block.norm1(x) * (1 + scale) + shift)
    torch.testing.assert_close(block(x, c, None, None), want)


@BOTH
def test_every_block_starts_as_the_identity_and_every_token_at_log_v(cfg):
    model, (x, t) = DiT(cfg), canvas(cfg)
    if not cfg.causal:
        torch.testing.assert_close(model.hidden(x, t), model.final_norm(model.embed(x)))
    assert (model(x, t) == 0).all()


@BOTH
def test_who_sees_whom(cfg):
    model, (x, t) = awake(cfg), canvas(cfg, 1)
    changed = x.clone()
    changed[0, 9] = (x[0, 9] + 1) % cfg.vocab_size
    same = (model(x, t) - model(changed, t)).abs().amax(-1)[0] < 1e-7
    assert not same[10:].any() and same[:10].all().item() == cfg.causal


# --------------------------------------------------------------------------------------------------
# Sizes


def test_the_sizes_are_upstreams():
    """models/dimamba.py with configs/model/tiny-dimamba.yaml has 79,859,456 parameters at 50,258
    rows. Ours lacks the head's row of MASK."""
    cfg = CONFIGS["owt_mdlm_mamba"]()
    assert count_parameters(cfg) == 79_859_456 - 512
    assert count_parameters(replace(cfg, vocab_size=27, seq_len=256)) == count_parameters(
        CONFIGS["text8_mdlm_mamba"]()
    )
    assert (cfg.n_layer, cfg.n_embd, cfg.cond_dim, cfg.dropout) == (14, 512, 128, 0.1)


@BOTH
def test_flops_are_those_of_the_matrices(cfg):
    """torch's counter of a forward sees the products: all of ours but the convolution and the
    recurrence itself, a multiply-add for each of the WINDOW inputs and of the STATES."""
    cfg = replace(cfg, n_embd=32, seq_len=48)
    model = awake(cfg).requires_grad_(False)
    x = torch.randint(0, cfg.vocab_size, (2, 48))
    with FlopCounterMode(display=False) as counter:
        model.hidden(x, torch.rand(2))
    passes = 1 if cfg.causal else 2
    unseen = passes * EXPAND * 32 * (WINDOW + STATES)
    ada = 0
    if cfg.cond_dim:  # once per batch: the embedding of time, three vectors a block, two at the end
        ada = 2 * (256 * 8 + 8 * 8 + (cfg.n_layer * 3 + 2) * 32 * 8)
    per_token = (counter.get_total_flops() - ada) / x.numel()
    assert per_token == 2 * cfg.n_layer * (multiply_adds(cfg) - unseen)
    head = 6 * 32 * cfg.vocab_size
    assert flops_per_token(cfg, 1) == 6 * cfg.n_layer * multiply_adds(cfg) + head


# --------------------------------------------------------------------------------------------------
# What every network must do


@pytest.mark.parametrize("bos", [False, True])
def test_reading_in_pieces_is_reading_at_once(bos):
    """The convolution's inputs and the state are carried over; pieces shorter than the window."""
    model, (x, t) = awake(replace(CAUSAL, bos=bos)), canvas(SMALL)
    x, past = x.clamp(max=SMALL.vocab_size - 1), [[] for _ in model.blocks]
    for i in (1, 2, 5, 6, 11):
        got = model.next_logits(x[:, :i], past)
        torch.testing.assert_close(got, model(x, t)[:, i], rtol=1e-4, atol=1e-5)


def test_sampling_with_the_cache_is_sampling_without():
    model = awake(CAUSAL).requires_grad_(False)
    x, texts = torch.full((4, 16), CAUSAL.mask_id), []
    for make in (denoiser, cached_denoiser):
        *_, text = left_to_right(make(model, CAUSAL), x, 1, CAUSAL, row_generators(3, range(4)))
        texts.append(text)
    assert torch.equal(*texts) and len(set(map(tuple, texts[0].tolist()))) == 4


def test_the_last_block_projects_only_the_requested_positions():
    model, seen = awake(replace(MAMBA, seq_len=48)), []
    x, t = torch.randint(0, 12, (4, 48)), torch.rand(4)
    everywhere = model(x, t)
    note = lambda module, args, out: seen.append(args[0].shape[1])
    model.blocks[1].mix_out.register_forward_hook(note)
    at = torch.zeros(4, 48, dtype=torch.bool)
    at[0, [3, 47]], at[1, [0, 11, 12, 30, 31]], at[3, 20] = True, True, True
    torch.testing.assert_close(model(x, t, at), everywhere[at])
    assert seen == [5]


@BOTH
def test_recomputing_blocks_changes_no_gradient(cfg):
    cfg = replace(cfg, dropout=0.3)
    x, t = canvas(cfg)
    runs = []
    for recompute in (False, True):
        torch.manual_seed(3)
        model = awake(replace(cfg, recompute=recompute)).train()
        h = model.hidden(x, t)
        h.square().sum().backward()
        runs.append((h.detach(), gradients(model)))
    assert torch.equal(runs[0][0], runs[1][0])
    for name, a in runs[0][1].items():
        assert a is runs[1][1][name] is None or torch.equal(a, runs[1][1][name]), name


def test_dropout_acts_in_training_only():
    model, (x, t) = awake(replace(MAMBA, dropout=0.5)), canvas(SMALL)
    assert torch.equal(model(x, t), model(x, t))
    model.train()
    assert (model(x, t) - model(x, t)).abs().max() > 1e-3


@BOTH
def test_bfloat16_keeps_the_scan_in_float32_and_casting_once_changes_no_bit(cfg):
    model, (x, t) = awake(cfg).requires_grad_(False), canvas(cfg)
    x = x.clamp(max=cfg.vocab_size - 1)
    want = model(x, t)
    with in_bfloat16():
        logits = model(x, t)
    assert 0 < (logits - want).abs().max() < 0.1 * want.abs().max()
    cast_linears(model, torch.bfloat16)
    with autocast(torch.device("cpu"), "bfloat16"):
        assert torch.equal(model(x, t), logits)
    assert model.blocks[0].forward_pass.A_log.dtype == torch.float32


def test_muon_and_weight_decay_leave_the_recurrence_alone():
    cfg = replace(MAMBA, muon_lr=0.01, weight_decay=0.1)
    model = DiT(cfg)
    adam, muon = make_optimizers(model, cfg)
    by_muon = {id(p) for p in muon.param_groups[0]["params"]}
    decayed = by_muon | {id(p) for p in adam.param_groups[0]["params"]}
    one_pass = model.blocks[0].forward_pass
    assert {id(one_pass.x_proj.weight), id(one_pass.dt_proj.weight)} <= by_muon
    assert not {id(p) for p in (one_pass.A_log, one_pass.D, one_pass.dt_bias)} & decayed
    assert id(one_pass.conv1d.weight) not in by_muon


@pytest.mark.parametrize("field", [dict(init="smdm"), dict(mlp="swiglu"), dict(mlp_width=64)])
def test_what_a_mamba_block_does_not_have_is_refused(field):
    with pytest.raises(ValueError, match="mixer=mamba: has no MLP: needs mlp=gelu"):
        Config(mixer="mamba", **field)
