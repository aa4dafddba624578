"""InfoMDLM: a latent z of the whole text beside its tokens. Used if latent_dim > 0.

InfoDiffusion (arXiv 2306.08757) for masked text. An encoder q(z | x0) reads the clean text. z is
added to the adaLN conditioning through a map that starts at zero, so training starts from the plain
network. The loss is the bound given z, and per token
    mmd_weight MMD^2(q(z), N(0, I)) + kl_weight mean KL(q(z | x0), N(0, I)) / L.
With kl_weight = 0 the code is deterministic, z = its mean. z = 0 means "no z": training drops a
tenth of them, so the same network is also the unconditional model.
"""

from dataclasses import replace

import torch
from torch import nn

from data.processes import rank_and_world

LAYERS, DROP = 2, 0.1  # blocks of the encoder; share of the training rows without z
WIDTHS = 0.5, 1.0, 2.0, 4.0  # of the kernels, in units of z's dimensions


def configure(cfg):
    """The config `cfg` with a latent."""
    return replace(cfg, latent_dim=32, cond_dim=128)


def mmd(z):
    """Unbiased MMD^2 between codes z (N, dim) and N(0, I), for a sum of kernels exp(-|a - b|^2 / s)
    with s = WIDTHS x dim. The normal's side is in closed form, so it adds no noise:
    E exp(-|a - y|^2 / s) = (s / (s + 2))^(dim/2) exp(-|a|^2 / (s + 2)), and
    E exp(-|y - y'|^2 / s) = (s / (s + 4))^(dim/2). A single code has no MMD: 0."""
    z, (N, dim) = z.float(), z.shape
    if N < 2:
        return z.sum() * 0
    square = z.square().sum(-1)
    between = (square[:, None] + square - 2 * z @ z.T).clamp(min=0)
    total = 0
    for s in (width * dim for width in WIDTHS):
        pairs = (torch.exp(-between / s).sum() - N) / (N * (N - 1))
        cross = (s / (s + 2)) ** (dim / 2) * torch.exp(-square / (s + 2)).mean()
        total = total + pairs - 2 * cross + (s / (s + 4)) ** (dim / 2)
    return total


def kl(mean, log_var):
    """KL(N(mean, exp(log_var)) || N(0, I)), (N,) nats."""
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(-1)


def draw(mean, log_var):
    """z (N, dim) ~ q(z | x0)."""
    return mean if log_var is None else mean + (log_var / 2).exp() * torch.randn_like(mean)


class AddPenalty(torch.autograd.Function):
    """z itself; backward adds the gradient of `penalty`. So the penalty is minimised although the
    losses, which return nats per token, do not know it."""

    @staticmethod
    def forward(ctx, z, penalty):
        return z.view_as(z)

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.ones((), device=grad.device)


class Latent(nn.Module):
    """The encoder, and the map from z to the conditioning.

    A time t (B,) with z behind it, (B, 1 + dim), is how z reaches the network: whatever passes t on
    passes z on. t alone means no z."""

    def __init__(self, cfg):
        super().__init__()
        from model import Block, norm  # model.py imports this file

        inner = replace(
            cfg, cond_dim=0, time_cond=False, latent_dim=0, kl_weight=0.0, mixer="attention"
        )
        self.cfg, self.noisy = cfg, cfg.kl_weight > 0
        self.embed = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        nn.init.uniform_(self.embed.weight, -(cfg.n_embd**-0.5), cfg.n_embd**-0.5)
        self.blocks = nn.ModuleList([Block(inner) for _ in range(LAYERS)])
        self.norm = norm(cfg)
        self.code = nn.Linear(cfg.n_embd, cfg.latent_dim * (1 + self.noisy))
        self.map = nn.Linear(cfg.latent_dim, cfg.cond_dim, bias=False)
        nn.init.zeros_(self.map.weight)

    def encode(self, tokens):
        """Tokens (B, L) -> mean and log-variance of q(z | x0), (B, dim) float32 each; None instead
        of the variance if the code is deterministic. All positions are pooled, padding too."""
        from model import rotary_tables

        h, head_dim = self.embed(tokens), self.cfg.n_embd // self.cfg.n_head
        cos, sin = (table.to(h.device) for table in rotary_tables(tokens.shape[1], head_dim))
        for block in self.blocks:
            h = block(h, None, cos, sin)
        code = self.code(self.norm(h.mean(1))).float()
        return code.chunk(2, -1) if self.noisy else (code, None)

    def forward(self, t, tokens):
        """Before the trunk, with the text tokens (B, L, k) of a loss: in training, t (B,) becomes
        (B, 1 + dim). In evaluation it stays: the network's own figures are those without z."""
        if tokens is None or not self.training or t.ndim == 2:
            return t
        mean, log_var = self.encode(tokens[..., 0])
        penalty = self.cfg.mmd_weight * mmd(mean if log_var is None else draw(mean, log_var))
        if log_var is not None:
            penalty = penalty + self.cfg.kl_weight * kl(mean, log_var).mean() / tokens.shape[1]
        share = len(t) * rank_and_world()[1] / self.cfg.batch_size  # of the batch; DDP averages
        z = AddPenalty.apply(draw(mean, log_var), share * penalty)
        return torch.cat((t[:, None], z * (torch.rand(len(z), 1, device=z.device) >= DROP)), 1)

    def split(self, t):
        """t as the trunk gets it -> the times (B,), what z adds to the conditioning (B, 1, c)."""
        return (t, 0) if t.ndim < 2 else (t[:, 0], self.map(t[:, 1:])[:, None])
