"""Code that exists for speed or memory only, each trick behind one function, with its measurement.

Measured on 2 cores of an Intel Xeon with AMX, torch 2.13.0, unless it says otherwise. model.py
reads as equations without this file; every function here returns what the plain equation returns.
"""

import contextlib
import ctypes
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn

from diffusion import cross_entropy, in_parts

# Above this many logits, recompute them in the backward pass instead of storing them.
LARGE = 2**24


def head_cross_entropy(h, weight, bias, tokens):
    """`diffusion.cross_entropy` of the logits h @ weight.T + bias, for h (N, d) and tokens (N, k);
    more than LARGE logits are never stored. Forward and backward of 1,024 tokens, d = 256, V =
    50,257: 443 ms in float32, 192 in bfloat16; with stored logits 383 and 198; torch's
    F.linear_cross_entropy, which stores none either, 2,054 and 2,089."""
    if len(h) * len(weight) <= LARGE:
        return cross_entropy(F.linear(h, weight, bias).float(), tokens)
    if torch.is_autocast_enabled(h.device.type):
        h = h.to(torch.get_autocast_dtype(h.device.type))
    return SlicedCrossEntropy.apply(h, weight, bias, tokens)


class SlicedCrossEntropy(torch.autograd.Function):
    """Logits by slices of the vocabulary that fit a CPU's cache, computed once forward
    and once more backward: a third more arithmetic. On a GPU this saves memory; its
    time was not measured."""

    @staticmethod
    def forward(ctx, h, weight, bias, tokens):
        ctx.size = max((2**26 if h.is_cuda else 2**20) // max(len(h), 1) // 64, 4) * 64
        top = torch.full((len(h),), -math.inf, device=h.device)
        total = torch.zeros_like(top)  # sum of exp(logit - top)
        target = torch.zeros(tokens.shape, device=h.device)  # the logits of `tokens`
        for start, x, _ in logit_slices(h, weight, bias, ctx.size):
            inside, column = columns_in(tokens, start, x)
            target = torch.where(inside, x.gather(1, column), target)
            before, top = top, torch.maximum(top, x.amax(-1))
            total = total * (before - top).exp() + x.sub_(top[:, None]).exp_().sum(-1)
        log_sum = top + total.log()
        ctx.save_for_backward(h, weight, bias, tokens, log_sum)
        return log_sum[:, None] - target, log_sum - math.log(len(weight))

    @staticmethod
    def backward(ctx, grad, grad_z):
        h, weight, bias, tokens, log_sum = ctx.saved_tensors
        grad_sum = (grad.sum(-1) + grad_z)[:, None]
        grad_h = torch.zeros_like(h, dtype=torch.float32)
        grad_weight = torch.empty_like(weight)
        grad_bias = None if bias is None else torch.empty_like(bias)
        for start, x, w in logit_slices(h, weight, bias, ctx.size):
            x = x.sub_(log_sum[:, None]).exp_().mul_(grad_sum)  # now the gradient of the logits
            inside, column = columns_in(tokens, start, x)
            x.scatter_add_(1, column, torch.where(inside, -grad, 0))
            part = slice(start, start + len(w))
            if bias is not None:
                grad_bias[part] = x.sum(0)
            x = x.to(h.dtype)
            grad_h += x @ w
            grad_weight[part] = x.T @ h
        return grad_h.to(h.dtype), grad_weight, grad_bias, None


def logit_slices(h, weight, bias, size):
    """Yield (start, float32 logits (N, <= size), the slice of weight in h's dtype)."""
    for start in range(0, len(weight), size):
        part = slice(start, start + size)
        w = weight[part].to(h.dtype)
        yield start, F.linear(h, w, None if bias is None else bias[part].to(h.dtype)).float(), w


def columns_in(tokens, start, x):
    """Which tokens (N, k) lie in the slice x (N, n) that begins at `start`,
    and their columns there."""
    column = tokens - start
    return (column >= 0) & (column < x.shape[1]), column.clamp(0, x.shape[1] - 1)


def pad_rows(h):
    """h (N, d) with zero rows up to a round N. The number of masked tokens changes with every
    batch, and a CPU compiles and keeps a matmul for each new shape: 10 to 40 ms and 7 MB."""
    n = len(h)
    return F.pad(h, (0, 0, 0, -n % (64 if n > 512 else 8)))


def attend(q, k, v, causal=False, mask=None):
    """Softmax attention of q, k, v (B, H, L, head_dim). In training in bfloat16 on a CPU, plain
    matmuls are 1.4 to 3 times faster than torch's kernel up to L = 1,024; in float32, and without
    gradients, the kernel wins at every length."""
    slow_kernel = not q.is_cuda and q.requires_grad and q.dtype == torch.bfloat16
    if not slow_kernel or q.shape[2] > 1024 or mask is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    return scores.softmax(-1) @ v


def modulate(layer, x, shift, scale):
    """layer(x) * (1 + scale) + shift. If all rows share shift and scale, they fold into a
    LayerNorm's gain and bias: one pass over x instead of three, and half as many backward."""
    if len(scale) != 1 or not isinstance(layer, nn.LayerNorm):
        return layer(x) * (1 + scale) + shift
    gain = layer.weight * (1 + scale[0, 0])
    return F.layer_norm(x, layer.normalized_shape, gain, shift[0, 0].to(gain.dtype), layer.eps)


def hidden_for_inference(model, x, t, at):
    """(hidden states (B, m, d), their part of `at` (B, m)). On a CPU, rows pass the trunk by parts
    of about 512 tokens (1,024 in bfloat16), whose activations fit its caches. If every row requests
    at most a quarter of its positions, as samplers do, the last block runs on those only."""
    count, pick = int(at.sum(-1).amax()) if len(x) else 0, ()
    if 0 < 4 * count <= x.shape[1]:
        pick = (at.byte().sort(dim=-1, descending=True, stable=True).indices[:, :count],)
        at = at.gather(1, *pick)
    tokens = 1024 if torch.is_autocast_enabled("cpu") else 512
    whole = x.is_cuda or model.cfg.fsdp  # under FSDP all processes call the trunk equally often
    rows = max(1, len(x) if whole else tokens // x.shape[1])
    return in_parts(model.hidden, x, t, *pick, rows=rows), at


def cast_linears(model, dtype):
    """Cast the linear layers to autocast's dtype once instead of in every call: 1.5 times faster
    sampling in bfloat16 on a CPU. Inference only, and only under that autocast."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.to(dtype)
    return model


def keep_freed_memory():
    """Linux: do not return a freed tensor's memory to the kernel, which would clear it page by page
    for the next one: up to a tenth of a training step and a quarter of sampling. The peak stays
    within a few percent."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt if sys.platform == "linux" else lambda *_: None
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap, too
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
