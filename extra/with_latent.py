"""Evaluate and sample a trained latent model (extra/latent.py): bounds given z, texts like another
text, and texts between two.
"""

import math
import statistics
from itertools import chain

import torch
from torch import nn

from common import autocast, fail
from data.corpus import read_split
from data.processes import gather
from evaluate import bound
from extra.latent import draw, kl
from sample import generate


class Given(nn.Module):
    """The network with z = choose(tokens, rows), (rows, dim), in every call. tokens (rows, L, k)
    are the text's, or None where there is no text to read."""

    def __init__(self, model, choose):
        super().__init__()
        self.model, self.choose = model, choose

    def forward(self, x, t, at=None, tokens=None):
        z = self.choose(tokens, len(x)).to(t.device)
        return self.model(x, torch.cat((t[:, None], z), 1), at, tokens)


def from_text(model, kls=None):
    """choose: z ~ q(z | x0) of the row's own text. The rows' KL, if codes are noisy, are appended
    to the list kls."""

    def choose(tokens, rows):
        mean, log_var = model.latent.encode(tokens[..., 0])
        if kls is not None and log_var is not None:
            kls.extend(kl(mean, log_var).tolist())
        return draw(mean, log_var)

    return choose


def from_another(model):
    """choose: z of the next row's text."""
    return lambda tokens, rows: from_text(model)(tokens, rows).roll(1, 0)


def from_prior(model):
    return lambda tokens, rows: torch.randn(rows, model.cfg.latent_dim)


def bounds_given_z(model, cfg, args, result):
    """{"latent": nats per token} beside `evaluate.report`'s result, the bound without z.

    Given z of the text itself the figure is no bound on -log p(x0), because z has read x0. Adding
    KL(q(z | x0), prior) makes it one; that of a deterministic code is infinite, so it has none.
    With z drawn from the prior instead, the mean is a bound as well."""
    if args.batch_size < 2:
        fail(f"--batch_size {args.batch_size}: a latent model needs 2, to swap the texts' codes")
    data, kls = args.data or cfg.data, []
    ids, meta = read_split(data, result["split"], cfg)
    settings = dict(T=args.T, passes=args.passes, windows=args.windows)
    settings |= dict(batch_size=args.batch_size, seed=args.seed)

    def measure(choose):
        where = f"{data}/{result['split']}.bin"
        given = Given(model, choose)
        torch.manual_seed(args.seed)
        return bound(given, ids, meta, cfg, where, dtype=args.dtype, **settings)["nats"]

    figures = {
        "nats_without_z_bound": result["nats"],
        "nats_given_z_no_bound": (given := measure(from_text(model, kls))),
        "nats_given_z_of_another_text": measure(from_another(model)),
        "nats_z_from_prior_bound": measure(from_prior(model)),
    }
    if kls:
        rows = result["forwards"] / args.passes
        per_token = statistics.fmean(chain.from_iterable(gather([kls]))) * rows / result["tokens"]
        figures |= dict(KL_per_token=per_token, nats_given_z_plus_KL_bound=given + per_token)
    return {"latent": figures}


# --------------------------------------------------------------------------------------------------
# Sampling


def code_of(model, tokenizer, cfg, text, option, dtype):
    """The mean of q(z | text), (dim,). The encoder was trained on rows of seq_len tokens; a shorter
    text is further from those the shorter it is."""
    ids = tokenizer.encode(text)[: cfg.seq_len]
    if not ids:
        fail(f"{option}: the text is empty")
    tokens = torch.tensor([ids], device=next(model.parameters()).device)
    with autocast(tokens.device, dtype):
        return model.latent.encode(tokens)[0][0]


def slerp(a, b, share):
    """The code at `share` of the way from a to b along a great circle; lengths change linearly."""
    between = math.acos(max(-1.0, min(1.0, torch.cosine_similarity(a, b, dim=0).item())))
    if between < 1e-4:
        return torch.lerp(a, b, share)
    unit = math.sin((1 - share) * between) * a / a.norm() + math.sin(share * between) * b / b.norm()
    return unit / math.sin(between) * torch.lerp(a.norm(), b.norm(), share)


def sample_given_z(model, tokenizer, cfg, canvas, eos, options, args):
    """args.num texts with z of --latent_of's text, or with z on the way between --interpolate's
    two, all of these from the same noise."""
    if model.latent is None:
        fail("--latent_of and --interpolate: the model has no latent (latent_dim=0)")
    if args.latent_of is not None and args.interpolate:
        fail("--latent_of and --interpolate exclude each other")

    def texts(z, num):
        given = Given(model, lambda tokens, rows: z.expand(rows, -1))
        end = -1 if eos is None else eos  # -1: no token ends a text
        return generate(given, tokenizer, cfg, num, canvas, args.batch_size, eos=end, **options)

    code = lambda text, option: code_of(model, tokenizer, cfg, text, option, options["dtype"])
    if args.latent_of is not None:
        return texts(code(args.latent_of, "--latent_of"), args.num)
    a, b = (code(text, "--interpolate") for text in args.interpolate)
    shares = [i / max(args.num - 1, 1) for i in range(args.num)]
    return [texts(slerp(a, b, share), 1)[0] for share in shares]
