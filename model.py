"""The network: a diffusion transformer (DiT) over tokens, and the only reader of checkpoints.

MDLM's and SEDD's DiT (which descends from Peebles & Xie, arXiv 2212.09748): bidirectional attention with
rotary positions, weight-only LayerNorm, and adaLN-zero: a small network of t gives each block six vectors
that shift, scale and gate it, all zero at the start, so that every block begins as the identity.
"""

import contextlib
import ctypes
import functools
import math
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from configs import fail, from_dict
from diffusion import alpha, costs, in_parts, places, spread


def rotary_tables(length, head_dim, base=10_000):
    """cos and sin (length, head_dim) of the half-split (NeoX) convention: dimension j turns with j + half."""
    half = head_dim // 2
    freq = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * freq  # (length, half)
    return angle.cos().repeat(1, 2).float(), angle.sin().repeat(1, 2).float()


def rotate(x, cos, sin):
    """Turn each pair of dimensions of x (..., L, head_dim) by its position's angle. Of several ways to write it
    this one passes over x least often, and its result is contiguous, which a product of matrices wants."""
    a, b = x.chunk(2, -1)
    return torch.addcmul(torch.cat((-b, a), -1).mul_(sin), x, cos)


def norm(cfg):
    """LayerNorm without bias (MDLM), or RMSNorm (SMDM)."""
    return nn.RMSNorm(cfg.n_embd, eps=1e-5) if cfg.norm == "rms" else nn.LayerNorm(cfg.n_embd, bias=False)


def modulated(layer, x, shift, scale):
    """layer(x) * (1 + scale) + shift; where all rows share these they are a LayerNorm's gain and bias: one pass
    over x instead of three, and half as many on the way back."""
    if len(scale) != 1 or not isinstance(layer, nn.LayerNorm):
        return layer(x) * (1 + scale) + shift
    gain = layer.weight * (1 + scale[0, 0])
    return F.layer_norm(x, layer.normalized_shape, gain, shift[0, 0].to(gain.dtype), layer.eps)


def slow_kernel(q):
    """Whether attention written out beats torch's kernel on a CPU for q (B, H, L, head_dim): in training, in bfloat16,
    by 1.4 to 3 times up to 1,024 tokens. In float32, and without gradients, the kernel wins at every length."""
    return q.requires_grad and q.dtype == torch.bfloat16 and q.shape[2] <= 1024


def picked(x, pick):
    """x (B, L, d) at the positions pick (B, m), or at all."""
    return x if pick is None else x.take_along_dim(pick[..., None], 1)


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        d, f, self.gated = cfg.n_embd, cfg.mlp_width or 4 * cfg.n_embd, cfg.mlp == "swiglu"
        self.n_head, self.causal, self.dropout = cfg.n_head, cfg.causal, cfg.dropout
        self.norm1 = norm(cfg)
        self.qkv = nn.Linear(d, 3 * d, bias=False)  # rows: all of q, all of k, all of v
        self.attn_out = nn.Linear(d, d, bias=False)
        self.norm2 = norm(cfg)
        self.mlp_in = nn.Linear(
            d, 2 * f if self.gated else f, bias=cfg.bias
        )  # gated: the gate, what it lets pass
        self.mlp_out = nn.Linear(f, d, bias=cfg.bias)
        self.ada = nn.Linear(cfg.cond_dim, 6 * d) if cfg.cond_dim else None

    def attention(self, x, cos, sin, past=None, pick=None):
        B, L, d = x.shape
        qkv = self.qkv(x).view(B, L, 3, self.n_head, d // self.n_head).permute(2, 0, 3, 1, 4)
        q, k = rotate(qkv[:2], cos.to(qkv.dtype), sin.to(qkv.dtype))  # (B, H, L, head_dim) each
        v, mask = qkv[2], None
        q = q if pick is None else q.take_along_dim(pick[:, None, :, None], 2)
        if past is not None:
            if past:
                k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
            past[:] = k, v
            if L > 1:
                mask = torch.ones(L, k.shape[2], dtype=torch.bool, device=x.device).tril(k.shape[2] - L)
        if x.is_cuda or past is not None or not slow_kernel(q):
            causal = self.causal and past is None
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        else:
            scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
            if self.causal:
                future = torch.ones(L, L, dtype=torch.bool).triu(1)
                scores = scores.masked_fill(future, -math.inf)
            y = scores.softmax(-1) @ v
        return self.attn_out(y.transpose(1, 2).flatten(2))

    def mlp(self, x):
        x = self.mlp_in(x)
        if not self.gated:
            return self.mlp_out(F.gelu(x, approximate="tanh"))
        gate, x = x.chunk(2, -1)
        return self.mlp_out(F.silu(gate) * x)

    def forward(self, x, c, cos, sin, past=None, pick=None):
        """x (B, L, d) float32 residual stream, c (1 or B, 1, cond_dim) or None -> (B, L, d), or (B, m, d): at the
        positions pick (B, m) alone, which look at all the others."""
        if c is None:
            y = self.attention(self.norm1(x), cos, sin, past, pick)
            x = picked(x, pick) + F.dropout(y, self.dropout, self.training)
            return x + F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(c).chunk(6, -1)
        y = self.attention(modulated(self.norm1, x, shift1, scale1), cos, sin, pick=pick)
        x = torch.addcmul(picked(x, pick), gate1, F.dropout(y, self.dropout, self.training))
        y = self.mlp(modulated(self.norm2, x, shift2, scale2))
        return torch.addcmul(x, gate2, F.dropout(y, self.dropout, self.training))


# Numbers in logits that a loss does not write down; fewer are kept sooner than worked out twice.
LARGE = 2**24


def logit_slices(h, weight, bias, size):
    """(start, float32 logits (N, <= size), the rows of weight that made them in h's type) of each slice."""
    for start in range(0, len(weight), size):
        part = slice(start, start + size)
        w = weight[part].to(h.dtype)
        yield start, F.linear(h, w, None if bias is None else bias[part].to(h.dtype)).float(), w


def column_of(target, start, x):
    """Which targets (N, k) lie in the slice x (N, n) that begins at `start`, and their columns (N, k) in it."""
    column = target - start
    return (column >= 0) & (column < x.shape[1]), column.clamp(0, x.shape[1] - 1)


def few_sizes(n):
    """n rounded up, so that the head, which answers another number of tokens in every call, meets few shapes: for
    each new one a CPU's matrix product is compiled and kept, in 10 to 40 ms and 7 MB."""
    return n + -n % (64 if n > 512 else 8)


class Costs(torch.autograd.Function):
    """`diffusion.costs` of the logits h @ weight.T + bias, h (N, d), target (N, k), in float32. The (N, V) logits
    never exist: they are worked out by slices of the vocabulary that stay in a CPU's cache, and once more on the
    way back, for a third more arithmetic. Logits, their softmax and both gradients, of N V numbers each, cost
    about as much to write down. On a GPU it is memory that this saves; time was not measured."""

    @staticmethod
    def forward(ctx, h, weight, bias, target):
        ctx.size = max((2**26 if h.is_cuda else 2**20) // max(len(h), 1) // 64, 4) * 64
        top = torch.full((len(h),), -math.inf, device=h.device)
        total = torch.zeros_like(top)  # sum of exp(logit - top)
        own = torch.zeros(target.shape, device=h.device)  # the targets' logits
        for start, x, *_ in logit_slices(h, weight, bias, ctx.size):
            inside, column = column_of(target, start, x)
            own = torch.where(inside, x.gather(1, column), own)
            before, top = top, torch.maximum(top, x.amax(-1))
            total = total * (before - top).exp() + x.sub_(top[:, None]).exp_().sum(-1)
        log_total = top + total.log()
        ctx.save_for_backward(h, weight, bias, target, log_total)
        return log_total[:, None] - own, log_total - math.log(len(weight))

    @staticmethod
    def backward(ctx, grad, grad_z):
        h, weight, bias, target, log_total = ctx.saved_tensors
        all_grad = (grad.sum(-1) + grad_z)[:, None]
        grad_h = torch.zeros_like(h, dtype=torch.float32)
        grad_weight = torch.empty_like(weight)
        grad_bias = None if bias is None else torch.empty_like(bias)
        for start, x, w in logit_slices(h, weight, bias, ctx.size):
            x = x.sub_(log_total[:, None]).exp_().mul_(all_grad)  # now the logits' gradients
            inside, column = column_of(target, start, x)
            x.scatter_add_(1, column, torch.where(inside, -grad, 0))
            part = slice(start, start + len(w))
            if bias is not None:
                grad_bias[part] = x.sum(0)
            x = x.to(h.dtype)
            grad_h += x @ w
            grad_weight[part] = x.T @ h
        return grad_h.to(h.dtype), grad_weight, grad_bias, None


class TimeEmbedding(nn.Module):
    """A scalar per row -> 128 cosines and 128 sines of it -> a two-layer network -> (B, 1, cond_dim)."""

    def __init__(self, cond_dim):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(256, cond_dim), nn.Linear(cond_dim, cond_dim)

    def forward(self, s):
        freq = torch.exp(-math.log(10_000) / 128 * torch.arange(128, device=s.device))
        angle = s.float()[:, None] * freq
        c = self.fc2(F.silu(self.fc1(torch.cat((angle.cos(), angle.sin()), -1))))
        return F.silu(c)[:, None]  # the SiLU in front of every block's `ada`, applied once


def tokens_read(past):
    """How many tokens the lists of keys and values already hold."""
    return past[0][0].shape[2] if past and past[0] else 0


class DiT(nn.Module):
    """model(x, t, at) -> (N, V) logits for the N True positions of `at` (B, L), row by row; (B, L, V) without
    `at`; `costs` gives a loss what it wants of them. Without zero_masking there is one more output, MASK. A causal
    network (loss=ar) answers position i from the tokens before i: its input is shifted by one, with MASK as the
    start symbol, unless cfg.bos gives the first token.

    Initialisation (init="smdm": that of SMDM's code, see `smdm_init`): torch's own for linear layers, except
        embedding        uniform +-1/sqrt(d) (MDLM, SEDD); tied: normal 1/sqrt(d), cut at 3 sigma (nanoDD)
        ada, final_ada   zero: every block starts as the identity
        head             zero: every masked token starts at a cost of exactly ln V
    Without adaLN (cond_dim = 0) attn_out and mlp_out are zero, for the same reason as ada."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, d = cfg, cfg.n_embd
        self.embed = nn.Embedding(cfg.vocab_size + 1, d)  # the last row is MASK
        self.time = TimeEmbedding(cfg.cond_dim) if cfg.cond_dim else None
        self.blocks = nn.ModuleList([Block(cfg) for _ in range(cfg.n_layer)])
        self.final_norm = norm(cfg)
        self.final_ada = nn.Linear(cfg.cond_dim, 2 * d) if cfg.cond_dim else None
        self.outputs = cfg.vocab_size + (not cfg.zero_masking)
        self.head = None if cfg.tied else nn.Linear(d, self.outputs, bias=cfg.bias)
        cos, sin = rotary_tables(cfg.seq_len, d // cfg.n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

        if cfg.init == "smdm":
            return self.smdm_init()
        std = d**-0.5
        if cfg.tied:
            nn.init.trunc_normal_(self.embed.weight, 0, std, -3 * std, 3 * std)
        else:
            nn.init.uniform_(self.embed.weight, -std, std)
        adas = [b.ada for b in self.blocks] + [self.final_ada]
        outs = [m for b in self.blocks for m in (b.attn_out, b.mlp_out)]
        for layer in (adas if cfg.cond_dim else outs) + [self.head]:
            if layer is not None:
                nn.init.zeros_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def smdm_init(self):
        """Every matrix normal with variance 2 / (5 d), those that write to the residual stream with standard
        deviation 1 / (sqrt(d) n_layer), whatever their own widths."""
        d = self.cfg.n_embd
        for name, p in self.named_parameters():
            if p.ndim == 2:
                writes = name.endswith(("attn_out.weight", "mlp_out.weight"))
                nn.init.normal_(p, 0, d**-0.5 / self.cfg.n_layer if writes else (0.4 / d) ** 0.5)

    def time_input(self, t):
        """What the time embedding reads: 1000 t (nanoDD's step of 1000), or MDLM's sigma = -log alpha with
        alpha kept above 1e-3, so that sigma is finite at t = 1. Not time_cond: always sigma = 0, as in MDLM."""
        if not self.cfg.time_cond:
            return torch.zeros(1, device=t.device)
        if self.cfg.time_input == "step":
            return 1000 * t
        return -torch.log(1e-3 + (1 - 1e-3) * alpha(self.cfg.schedule, t))

    def hidden(self, x, t, pick=None, past=None):
        """The trunk: ids (B, L), t (B,) -> (B, L, d). Static shapes: this is what gets compiled.
        pick (B, m): the positions that are wanted, of which alone the last block then makes something.
        past: for a causal network, a list per block, empty at first, that keeps the keys and values of all
        calls; x are then the tokens that come next."""
        start = tokens_read(past)
        c = None if self.time is None else self.time(self.time_input(t))
        part = slice(start, start + x.shape[1])
        h, cos, sin = self.embed(x), self.cos[part], self.sin[part]
        again = self.cfg.recompute and self.training and torch.is_grad_enabled()
        for i, block in enumerate(self.blocks):
            last = i == len(self.blocks) - 1
            args = h, c, cos, sin, None if past is None else past[i], pick if last else None
            # again: keeps a block's input alone, and draws the same dropout again
            h = checkpoint(block, *args, use_reentrant=False) if again else block(*args)
        if c is None:
            return self.final_norm(h)
        shift, scale = self.final_ada(c).chunk(2, -1)
        return modulated(self.final_norm, h, shift, scale)

    def asked(self, x, t, at):
        """(hidden states, at for them) outside of training. On a CPU rows go by parts of about 512 tokens, 1,024 in
        bfloat16, whose activations fit its caches. Where few positions of a row are asked, as samplers do, the
        others are not made, nor is what the last block would do with them."""
        most, pick = int(at.sum(-1).amax()) if len(x) else 0, ()
        if 0 < 4 * most <= x.shape[1]:
            pick = (at.byte().sort(dim=-1, descending=True, stable=True).indices[:, :most],)
            at = at.gather(1, *pick)
        tokens = 1024 if torch.is_autocast_enabled("cpu") else 512
        rows = max(1, len(x) if x.is_cuda else tokens // x.shape[1])
        return in_parts(self.hidden, x, t, *pick, rows=rows), at

    def head_tensors(self):
        if self.cfg.tied:
            return self.embed.weight[: self.outputs], None
        return self.head.weight, self.head.bias

    def logits(self, h):
        return F.linear(h, *self.head_tensors()).float()

    def costs(self, x, t, at, tokens):
        """`diffusion.costs` of tokens (B, L, k) at the positions `at`: (B, L, k) and (B, L), zero elsewhere. As from
        the logits, but without them if they are LARGE."""
        return self(x, t, at, tokens)

    def forward(self, x, t, at=None, tokens=None):
        made = at  # `asked` may make of h only a few positions of a row
        if not self.cfg.causal:
            whole = at is None or self.training
            h, made = (self.hidden(x, t), at) if whole else self.asked(x, t, at)
        elif self.cfg.bos:
            h = F.pad(self.hidden(x[:, :-1], t), (0, 0, 1, 0))  # nothing stands before position 0
        else:
            h = self.hidden(self.shifted(x)[:, :-1], t)
        if at is None:
            return self.logits(h)
        where = places(made)  # here a GPU is waited for, once the trunk is on its way
        h, n = h.flatten(0, 1).index_select(0, where), len(where)  # the head runs only where it is asked
        h = F.pad(h, (0, 0, 0, few_sizes(n) - n))
        if tokens is None:
            return self.logits(h)[:n]
        where = where if made is at else places(at)  # in the canvas again
        target = tokens.flatten(0, 1).index_select(0, where)
        if len(h) * self.outputs <= LARGE:
            both = costs(self.logits(h)[:n], target)
        else:
            if torch.is_autocast_enabled(h.device.type):
                h = h.to(torch.get_autocast_dtype(h.device.type))
            both = Costs.apply(h, *self.head_tensors(), F.pad(target, (0, 0, 0, len(h) - n)))
        return [spread(values[:n], at, where) for values in both]

    def shifted(self, x):
        """What a causal network reads: the tokens, after the start symbol if it has one."""
        return x if self.cfg.bos else F.pad(x, (1, 0), value=self.cfg.mask_id)

    @torch.no_grad()
    def next_logits(self, x, past):
        """Causal: x (B, i) tokens -> (B, V) logits of token i, reading only what `past` has not read yet."""
        return self.logits(self.hidden(self.shifted(x)[:, tokens_read(past) :], None, past=past)[:, -1])


# ---------------------------------------------------------------------------------------------------------


def count_parameters(cfg):
    """Number of parameters of a config's network, without allocating it."""
    with torch.device("meta"):
        return sum(p.numel() for p in DiT(cfg).parameters())


def flops_per_token(cfg, masked=None):
    """Multiply-adds x 2 of one training step, forward + twice that backward, per token of the batch:

        6 (n_layer (4 d^2 + mlp + 2 d seq_len) + masked d V),   mlp = 2 d f, or 3 d f for SwiGLU

    i.e. the matrices that every token passes, attention over all keys (half of them where it is causal), and the
    head on the fraction `masked` of the tokens: half by default, all for an AR model and for nanoDD's loss. What is
    worked out a second time to save memory does not count, nor does adaLN, which runs once per row. The
    reconstruction term of d3pm is a pass of its own."""
    masked = (1 if cfg.causal or cfg.aux_ce else 0.5) if masked is None else masked
    d, f = cfg.n_embd, cfg.mlp_width or 4 * cfg.n_embd
    mlp = (3 if cfg.mlp == "swiglu" else 2) * d * f
    matrices = cfg.n_layer * (4 * d * d + mlp)  # qkv 3, out 1
    attention = cfg.n_layer * 2 * d * cfg.seq_len * (0.5 if cfg.causal else 1)
    passes, heads = (1, masked) if cfg.carry_over else (2, masked + 1)
    return 6 * (passes * (matrices + attention) + heads * d * cfg.vocab_size)


def keep_freed_memory():
    """Linux: do not give the memory of a freed tensor back to the kernel, which would clear it page by page for the
    next one: up to a tenth of a step and a quarter of sampling. The peak stays within a few percent."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt if sys.platform == "linux" else lambda *_: None
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap, too
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def pick_device(name):
    """torch.device of --device: cpu, cuda or cuda:N; auto is cuda where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("mps"):
        fail(f"device={name}: MPS has no float64, which noise and schedules need; --device=cpu works")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        fail(f"device={name}: must be auto, cpu, cuda or cuda:N")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        fail(f"device={name}: not on this machine")
    return device


def compute_dtype(device, dtype):
    """What --dtype stands for on a device: auto is bfloat16 if the hardware multiplies in it, else float32."""
    if dtype == "float32" or (dtype == "bfloat16" and device.type == "cuda"):
        return dtype
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float32"
    if multiplies_bfloat16():
        return "bfloat16"
    if dtype == "bfloat16":
        warn_once("dtype=bfloat16: this CPU emulates bfloat16, many times slower than float32")
    return "float32" if dtype == "auto" else dtype


def multiplies_bfloat16():
    """Whether this CPU has instructions for bfloat16 matmuls. Without them torch emulates: 44 to 80 times slower
    than float32 (two cores of an AMD EPYC with AVX2 only)."""
    cpu = torch.cpu.get_capabilities()
    return bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))


@functools.cache
def warn_once(message):
    sys.stderr.write(f"warning: {message}\n")


def autocast(device, dtype):
    """The autocast context of --dtype. The weights that train, the residual stream, norms and losses stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=compute_dtype(device, dtype) == "bfloat16")


def rounded(model, device, dtype):
    """The model with its linear layers in what `autocast` multiplies in: the same numbers, but not rounded anew in
    every call. For inference; under another dtype it no longer runs."""
    if compute_dtype(device, dtype) == "bfloat16":
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.bfloat16()
    return model


KIND = "nanoMDLM checkpoint"


def read_checkpoint(path, device="cpu"):
    """The dict that train.py saved: kind, model, ema, optimizer, step, config, tokenizer, torch version ...
    Plain tensors, numbers, strings and dicts: nothing in the file is executed. Fails in one line."""
    path = Path(path)
    if path.is_dir():
        path = path / "ckpt.pt"  # a run's folder
    if not path.is_file():
        fail(f"{path}: no such checkpoint")
    try:
        ckpt = torch.load(path, map_location=device, weights_only=True)
    except Exception as e:  # torch raises half a dozen types for a damaged or foreign file
        fail(f"{path}: damaged, or not a checkpoint of plain tensors ({type(e).__name__})")
    if not isinstance(ckpt, dict) or ckpt.get("kind") != KIND:
        fail(f"{path}: not a checkpoint of this project")
    return ckpt


def load(path, ema=True, device="cpu", dtype="float32"):
    """The only way a checkpoint becomes a model: (model in eval mode, its Config). model.tokenizer is the
    spec of its data's tokenizer (data/tokenizer.py), model.step the number of optimiser steps. dtype: that of the
    `autocast` in which it will be called, see `rounded`."""
    ckpt, device = read_checkpoint(path, device), torch.device(device)
    cfg = from_dict(ckpt["config"], path)
    model = DiT(cfg).to(device)
    try:
        model.load_state_dict(ckpt["ema" if ema else "model"])
    except RuntimeError as e:
        fail(f"{path}: tensors do not fit its config ({str(e).splitlines()[1].strip()})")
    model.tokenizer, model.step = ckpt["tokenizer"], ckpt["step"]
    if device.type == "cpu":
        keep_freed_memory()  # but not that of the checkpoint
    return rounded(model.eval().requires_grad_(False), device, dtype), cfg
