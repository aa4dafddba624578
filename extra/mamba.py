"""Mamba blocks in place of transformer blocks: mixer=mamba. Bidirectional and with adaLN they are
those of MDLM's DiMamba (models/dimamba.py of kuleshov-group/mdlm, after Caduceus, 2403.03234).

One block has about two thirds of the parameters of a transformer block of its width, and no MLP.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from extra.scan import scan
from head import modulate

STATES, WINDOW, EXPAND = 16, 4, 2  # per channel; tokens of the convolution; channels per width


def configure(cfg):
    """The config `cfg` with MDLM's tiny-dimamba, 14 blocks; no result on text is published."""
    return replace(cfg, mixer="mamba", n_layer=14, n_head=8, n_embd=512, norm="rms", bias=False)


class Pass(nn.Module):
    """One direction, between the projections: a convolution over WINDOW tokens, SiLU, the scan."""

    def __init__(self, d, rank):
        super().__init__()
        self.conv1d = nn.Conv1d(d, d, WINDOW, groups=d)
        self.x_proj = nn.Linear(d, rank + 2 * STATES, bias=False)
        self.dt_proj = nn.Linear(rank, d, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        dt = 1e-3 * 100 ** torch.rand(d)  # from 0.001 to 0.1, uniform in the logarithm
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt
        # vectors, because Muon and weight decay act on what has two dimensions
        self.A_log = nn.Parameter(torch.arange(1.0, STATES + 1).log().repeat(d))
        self.D = nn.Parameter(torch.ones(d))

    def forward(self, u, past=None):
        """u (B, L, d) -> (B, L, d) float32. past: the inputs of all tokens so far and the state
        after them, which the call extends."""
        inputs, h = past or (u[None, :, :0], None)
        inputs, L = torch.cat((inputs[0], u), 1), u.shape[1]
        window = F.pad(inputs, (0, 0, WINDOW - 1, 0))[:, -(L + WINDOW - 1) :]
        u = self.conv1d.bias
        for k in range(WINDOW):  # twice as fast as torch's convolution on a CPU
            u = torch.addcmul(u, window[:, k : k + L], self.conv1d.weight[:, 0, k])
        u = F.silu(u)
        dt, B, C = self.x_proj(u).split((self.dt_proj.in_features, STATES, STATES), -1)
        dt = F.softplus(self.dt_proj(dt).float() + self.dt_bias)
        A, u = -self.A_log.view(-1, STATES).exp(), u.float()
        y, h = scan(dt, u, A, B.float(), C.float(), h)
        if past is not None:
            past[:] = inputs[None], h
        return y + self.D * u


class MambaBlock(nn.Module):
    """`model.Block` with one Mamba instead of attention and MLP. The two directions share their
    projections, so one product serves both: in_proj(flip(x)) = flip(in_proj(x)). A causal block has
    the forward direction alone. Without adaLN it still has its skip connection, which MDLM's
    lacks."""

    def __init__(self, cfg):
        super().__init__()
        from model import norm  # model.py imports this file

        d, inner = cfg.n_embd, EXPAND * cfg.n_embd
        self.dropout, self.norm1 = cfg.dropout, norm(cfg)
        self.in_proj = nn.Linear(d, 2 * inner, bias=False)  # rows: the channels, then their gates
        self.forward_pass = Pass(inner, -(-d // 16))
        self.backward_pass = None if cfg.causal else Pass(inner, -(-d // 16))
        self.mix_out = nn.Linear(inner, d, bias=False)
        bound = (inner * cfg.n_layer) ** -0.5
        nn.init.uniform_(self.mix_out.weight, -bound, bound)
        self.ada = nn.Linear(cfg.cond_dim, 3 * d) if cfg.cond_dim else None

    def mix(self, x, past=None, pick=None):
        """Both directions of x (B, L, d); see `model.Block.forward` for past and pick."""
        u, gate = self.in_proj(x).chunk(2, -1)
        y = self.forward_pass(u, past)
        if self.backward_pass is not None:
            y = y + self.backward_pass(u.flip(1)).flip(1)
        y = y * F.silu(gate)
        return self.mix_out(y if pick is None else y.take_along_dim(pick[..., None], 1))

    def forward(self, x, c, cos, sin, past=None, pick=None):
        """As `model.Block.forward`, without rotary positions: a recurrence knows the order."""
        drop = lambda y: F.dropout(y, self.dropout, self.training)
        kept = x if pick is None else x.take_along_dim(pick[..., None], 1)
        if c is None:
            return kept + drop(self.mix(self.norm1(x), past, pick))
        shift, scale, gate = self.ada(c).chunk(3, -1)
        return torch.addcmul(
            kept, gate, drop(self.mix(modulate(self.norm1, x, shift, scale), pick=pick))
        )


def multiply_adds(cfg):
    """Per token and block: projections, and for each direction convolution, dt, B, C and the scan,
    whose recurrence and output are a multiply-add per state each."""
    d, inner, rank = cfg.n_embd, EXPAND * cfg.n_embd, -(-cfg.n_embd // 16)
    one_pass = inner * (WINDOW + rank + 2 * STATES + rank + 2 * STATES)
    return 3 * d * inner + (1 if cfg.causal else 2) * one_pass
