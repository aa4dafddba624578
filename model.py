"""The network: a diffusion transformer (DiT) over tokens.

MDLM's and SEDD's DiT, after Peebles & Xie (arXiv 2212.09748): bidirectional attention with rotary
positions, LayerNorm without bias, and adaLN-zero: a small network of t gives each block six vectors
that shift, scale and gate it. All are zero at the start, so every block begins as the identity.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import head
from diffusion import alpha, indices_of, scatter
from head import attend, modulate


def rotary_tables(length, head_dim, base=10_000):
    """cos and sin (length, head_dim) in the half-split (NeoX) convention: dimension
    j turns with j + half."""
    half = head_dim // 2
    freq = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * freq  # (length, half)
    return angle.cos().repeat(1, 2).float(), angle.sin().repeat(1, 2).float()


def rotate(x, cos, sin):
    """Turn each pair of dimensions of x (..., L, head_dim) by its position's angle. Reads x as few
    times as possible and returns a contiguous tensor for the matmul."""
    a, b = x.chunk(2, -1)
    return torch.addcmul(torch.cat((-b, a), -1).mul_(sin), x, cos)


def norm(cfg):
    """LayerNorm without bias (MDLM), or RMSNorm (SMDM)."""
    if cfg.norm == "rms":
        return nn.RMSNorm(cfg.n_embd, eps=1e-5)
    return nn.LayerNorm(cfg.n_embd, bias=False)


def take_positions(x, pick):
    """x (B, L, d) at the positions pick (B, m), or at all if pick is None."""
    return x if pick is None else x.take_along_dim(pick[..., None], 1)


def count_held(past):
    """The number of tokens whose keys and values a list per block holds; 0 for None."""
    return past[0][0].shape[2] if past and past[0] else 0


def extend(past, k, v):
    """Append the keys and values of new tokens (B, H, L, head_dim) to the list `past`; returns all
    keys, all values and the causal mask of the new tokens, None for a single one."""
    new = k.shape[2]
    if past:
        k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
    past[:] = k, v
    if new == 1:
        return k, v, None
    total = k.shape[2]
    seen = torch.ones(new, total, dtype=torch.bool, device=k.device).tril(total - new)
    return k, v, seen


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        d, f, self.gated = cfg.n_embd, cfg.mlp_width or 4 * cfg.n_embd, cfg.mlp == "swiglu"
        self.n_head, self.causal, self.dropout = cfg.n_head, cfg.causal, cfg.dropout
        self.norm1 = norm(cfg)
        self.qkv = nn.Linear(d, 3 * d, bias=False)  # rows: all of q, all of k, all of v
        self.attn_out = nn.Linear(d, d, bias=False)
        self.norm2 = norm(cfg)
        width = 2 * f if self.gated else f  # gated: gate, then value
        self.mlp_in = nn.Linear(d, width, bias=cfg.bias)
        self.mlp_out = nn.Linear(f, d, bias=cfg.bias)
        self.ada = nn.Linear(cfg.cond_dim, 6 * d) if cfg.cond_dim else None

    def attention(self, x, cos, sin, past=None, pick=None):
        """Attention of x (B, L, d); see `forward` for past and pick."""
        B, L, d = x.shape
        qkv = self.qkv(x).view(B, L, 3, self.n_head, d // self.n_head).permute(2, 0, 3, 1, 4)
        q, k = rotate(qkv[:2], cos.to(qkv.dtype), sin.to(qkv.dtype))  # (B, H, L, head_dim) each
        v = qkv[2]
        if pick is not None:
            q = q.take_along_dim(pick[:, None, :, None], 2)
        if past is None:
            y = attend(q, k, v, self.causal)
        else:
            k, v, mask = extend(past, k, v)
            y = attend(q, k, v, mask=mask)
        return self.attn_out(y.transpose(1, 2).flatten(2))

    def mlp(self, x):
        x = self.mlp_in(x)
        if not self.gated:
            return self.mlp_out(F.gelu(x, approximate="tanh"))
        gate, value = x.chunk(2, -1)
        return self.mlp_out(F.silu(gate) * value)

    def forward(self, x, c, cos, sin, past=None, pick=None):
        """x (B, L, d) float32 residual stream, c (1 or B, 1, cond_dim) or None -> (B, L, d).

        pick (B, m): compute only these positions, which still attend to all: -> (B, m, d). past:
        this block's keys and values of earlier calls, which the call extends (causal only)."""
        drop = lambda y: F.dropout(y, self.dropout, self.training)
        if c is None:
            x = take_positions(x, pick) + drop(self.attention(self.norm1(x), cos, sin, past, pick))
            return x + drop(self.mlp(self.norm2(x)))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(c).chunk(6, -1)
        y = self.attention(modulate(self.norm1, x, shift1, scale1), cos, sin, pick=pick)
        x = torch.addcmul(take_positions(x, pick), gate1, drop(y))
        y = self.mlp(modulate(self.norm2, x, shift2, scale2))
        return torch.addcmul(x, gate2, drop(y))


class TimeEmbedding(nn.Module):
    """A scalar per row -> 128 cosines and 128 sines -> a two-layer network -> (B, 1, cond_dim)."""

    def __init__(self, cond_dim):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(256, cond_dim), nn.Linear(cond_dim, cond_dim)

    def forward(self, s):
        freq = torch.exp(-math.log(10_000) / 128 * torch.arange(128, device=s.device))
        angle = s.float()[:, None] * freq
        c = self.fc2(F.silu(self.fc1(torch.cat((angle.cos(), angle.sin()), -1))))
        return F.silu(c)[:, None]  # the SiLU in front of every block's `ada`, applied once


class DiT(nn.Module):
    """model(x, t, at) -> logits, model(x, t, at, tokens) -> cross-entropies: see `forward`.

    Without zero_masking there is one more output, MASK. A causal network (loss=ar) predicts token i
    from the tokens before it: its input is shifted by one position, with MASK as the start symbol
    unless cfg.bos gives the first token.

    Initialisation is torch's own for linear layers (init="smdm": see `init_smdm`), except
        embedding        uniform +-1/sqrt(d) (MDLM, SEDD)
        tied embedding   normal 1/sqrt(d), cut at 3 sigma (nanoDD)
        ada, final_ada   zero: every block starts as the identity
        head             zero: every masked token starts at a cost of exactly ln V
    Without adaLN (cond_dim = 0) attn_out, mlp_out and Mamba's mix_out are zero, as ada is."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.ends, d = cfg, False, cfg.n_embd  # ends: rows are documents, see `load`
        self.embed = nn.Embedding(cfg.vocab_size + 1, d)  # the last row is MASK
        self.time = TimeEmbedding(cfg.cond_dim) if cfg.cond_dim else None
        make_block = Block
        if cfg.mixer == "mamba":
            from extra.mamba import MambaBlock as make_block
        self.blocks = nn.ModuleList([make_block(cfg) for _ in range(cfg.n_layer)])
        self.latent = None
        if cfg.latent_dim:
            from extra.latent import Latent

            self.latent = Latent(cfg)
        self.final_norm = norm(cfg)
        self.final_ada = nn.Linear(cfg.cond_dim, 2 * d) if cfg.cond_dim else None
        self.outputs = cfg.vocab_size + (not cfg.zero_masking)
        self.head = None if cfg.tied else nn.Linear(d, self.outputs, bias=cfg.bias)
        cos, sin = rotary_tables(cfg.seq_len, d // cfg.n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        (self.init_smdm if cfg.init == "smdm" else self.init_zero)()

    def init_zero(self):
        """MDLM's initialisation; the class docstring has the table."""
        std = self.cfg.n_embd**-0.5
        if self.cfg.tied:
            nn.init.trunc_normal_(self.embed.weight, 0, std, -3 * std, 3 * std)
        else:
            nn.init.uniform_(self.embed.weight, -std, std)
        adas = [b.ada for b in self.blocks] + [self.final_ada]
        outs = [m for b in self.blocks for n, m in b.named_children() if n.endswith("_out")]
        for layer in (adas if self.cfg.cond_dim else outs) + [self.head]:
            for p in layer.parameters() if layer is not None else ():
                nn.init.zeros_(p)

    def init_smdm(self):
        """SMDM's: every matrix normal with variance 2 / (5 d); those that write to the residual
        stream with standard deviation 1 / (sqrt(d) n_layer). Their own widths do not matter."""
        d = self.cfg.n_embd
        for name, p in self.named_parameters():
            if p.ndim == 2:
                writes = name.endswith(("attn_out.weight", "mlp_out.weight"))
                nn.init.normal_(p, 0, d**-0.5 / self.cfg.n_layer if writes else (0.4 / d) ** 0.5)

    def time_input(self, t):
        """What the time embedding reads: 1000 t (nanoDD's step of 1000), or MDLM's sigma = -log
        alpha with alpha kept above 1e-3, so that sigma is finite at t = 1. Without time_cond it is
        always 0, as in MDLM."""
        if not self.cfg.time_cond:
            return torch.zeros(1, device=t.device)
        if self.cfg.time_input == "step":
            return 1000 * t
        return -torch.log(1e-3 + (1 - 1e-3) * alpha(self.cfg, t))

    def trunk(self, x, t, pick=None, past=None):
        """ids (B, L), t (B,) -> (B, L, d). pick (B, m): only these positions of the last
        block's output. past (causal): a list per block of keys and values; x are then
        the tokens that follow."""
        start = count_held(past)
        t, shift = (t, 0) if self.latent is None else self.latent.split(t)
        c = None if self.time is None else self.time(self.time_input(t)) + shift
        part = slice(start, start + x.shape[1])
        h, cos, sin = self.embed(x), self.cos[part], self.sin[part]
        recompute = self.cfg.recompute and self.training and torch.is_grad_enabled()
        for i, block in enumerate(self.blocks):
            is_last = i == len(self.blocks) - 1
            args = h, c, cos, sin, past and past[i], pick if is_last else None
            # checkpoint: stores only the block's input, and draws the same dropout again
            h = checkpoint(block, *args, use_reentrant=False) if recompute else block(*args)
        if c is None:
            return self.final_norm(h)
        shift, scale = self.final_ada(c).chunk(2, -1)
        return modulate(self.final_norm, h, shift, scale)

    def hidden(self, x, t, pick=None):
        """The trunk aligned with the tokens: position i of (B, L, d) predicts token i. Static
        shapes: this is what gets compiled. pick: see `trunk`."""
        if not self.cfg.causal:
            return self.trunk(x, t, pick)
        if self.cfg.bos:
            return F.pad(self.trunk(x[:, :-1], t), (0, 0, 1, 0))  # nothing precedes position 0
        return self.trunk(self.with_start(x)[:, :-1], t)

    def with_start(self, x):
        """What a causal network reads: the tokens, after the start symbol if it has one."""
        return x if self.cfg.bos else F.pad(x, (1, 0), value=self.cfg.mask_id)

    def head_tensors(self):
        """(weight, bias) of the head."""
        if self.cfg.tied:
            return self.embed.weight[: self.outputs], None
        return self.head.weight, self.head.bias

    def logits(self, h):
        return F.linear(h, *self.head_tensors()).float()

    def forward(self, x, t, at=None, tokens=None):
        """Logits (N, V) for the N True positions of at (B, L), in row-major order; (B, L, V)
        without `at`. With tokens (B, L, k): their `diffusion.cross_entropy`, (B, L, k) and (B, L),
        zero outside `at`."""
        t = t if self.latent is None else self.latent(t, tokens)
        if at is None:
            return self.logits(self.hidden(x, t))
        if self.training or self.cfg.causal:
            h, at_h = self.hidden(x, t), at
        else:
            h, at_h = head.hidden_for_inference(self, x, t, at)
        indices = indices_of(at_h)  # waits for the GPU; the trunk's kernels are queued by now
        h, n = h.flatten(0, 1).index_select(0, indices), len(indices)
        h = head.pad_rows(h)
        if tokens is None:
            return self.logits(h)[:n]
        indices = indices if at_h is at else indices_of(at)
        tokens = tokens.flatten(0, 1).index_select(0, indices)
        tokens = F.pad(tokens, (0, 0, 0, len(h) - n))
        nats, log_z = head.head_cross_entropy(h, *self.head_tensors(), tokens)
        return scatter(nats[:n], at, indices), scatter(log_z[:n], at, indices)

    @torch.no_grad()
    def next_logits(self, x, past):
        """Causal: tokens x (B, i) -> logits (B, V) of token i; reads only
        what `past` does not hold."""
        new = self.with_start(x)[:, count_held(past) :]
        return self.logits(self.trunk(new, None, past=past)[:, -1])


# --------------------------------------------------------------------------------------------------


def count_parameters(cfg):
    """Number of parameters of a config's network, without allocating it."""
    with torch.device("meta"):
        return sum(p.numel() for p in DiT(cfg).parameters())


def flops_per_token(cfg, masked=None):
    """FLOPs (multiply-adds x 2) of one training step per token of the batch; backward counts twice:

        6 (n_layer (4 d^2 + mlp + 2 d seq_len) + masked d V),   mlp = 2 d f, or 3 d f for SwiGLU

    i.e. the matrices that every token passes, attention over all keys (half of them if causal), and
    the head on a fraction `masked` of the tokens: half by default, all for an AR model and for
    nanoDD's loss. Recomputation does not count, nor does adaLN, which runs once per row. The
    reconstruction term of d3pm is another pass."""
    masked = (1 if cfg.causal or cfg.aux_ce else 0.5) if masked is None else masked
    d, f = cfg.n_embd, cfg.mlp_width or 4 * cfg.n_embd
    mlp = (3 if cfg.mlp == "swiglu" else 2) * d * f
    matrices = cfg.n_layer * (4 * d * d + mlp)  # qkv 3, out 1
    attention = cfg.n_layer * 2 * d * cfg.seq_len * (0.5 if cfg.causal else 1)
    if cfg.mixer == "mamba":
        from extra.mamba import multiply_adds

        matrices, attention = cfg.n_layer * multiply_adds(cfg), 0
    passes, heads = (1, masked) if cfg.carry_over else (2, masked + 1)
    return 6 * (passes * (matrices + attention) + heads * d * cfg.vocab_size)
