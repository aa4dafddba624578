"""The exact likelihood of an order, and what orders and several tokens per call cost: no judge.

python -m tasks.orders out/pydocs_1/ckpt.pt out/pydocs_2/ckpt.pt out/pydocs_3/ckpt.pt
python -m tasks.orders out/pydocs_mdlm/ckpt.pt --orders margin threshold --per_call 1 16 --windows 8
python evaluate.py out/pydocs_mdlm/ckpt.pt --order margin --per_call 4    # one order, whole split

If the next position depends on nothing that is hidden, a text has one path through the sampler, and
p(text) is the product of p(token | visible) along it (DUEL, arXiv 2603.01367). The bound averages
over all orders. So its distance from an order's likelihood shows how loose it is for that order,
and the distance from one token per call to k shows the price of drawing k tokens independently.

Each checkpoint reads the same windows, and differences are taken window by window. The checkpoints
are runs of one config with different seeds; their means follow, with the error over seeds.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from common import autocast, check_range, command, fail, parser, pick_device, progress
from data.checkpoints import load
from data.command_line import add_model_options
from data.corpus import count_tokens, read_split, take, unpack
from diffusion import denoiser, in_parts, scatter
from evaluate import batch_nats, choose_windows, window_noise
from samplers import ORDERS, SAMPLERS, Shaped, default_options
from tasks.report import format_mean, format_rows, mean_error

# --------------------------------------------------------------------------------------------------
# The likelihood


class Forced(Shaped):
    """denoise whose draws are the tokens of x0 (B, L). nats (B, L): their -log p, float64; calls
    (B,): how often a row passed the network."""

    def __init__(self, denoise, x0):
        super().__init__(denoise)
        self.x0, self.nats = x0, torch.zeros_like(x0, dtype=torch.float64)
        self.calls = torch.zeros_like(x0[:, 0])

    def reshape(self, log_p, t, at):
        log_p, token = super().reshape(log_p, t, at), self.x0[at][:, None]
        nats = lambda part, token: -F.log_softmax(part.double(), -1).gather(-1, token)[:, 0]
        self.nats += scatter(in_parts(nats, log_p, token), at)
        self.calls += at.any(-1)
        return torch.full_like(log_p, -math.inf).scatter_(-1, token, 0.0)


def order_nats(denoise, x0, maskable, cfg, sampler, **options):
    """-log p of each token of x0 given what is visible when it is revealed: (B, L) nats, zero where
    given, and the network calls of each row, (B,). Their sum is -log p(x0), exactly, if `sampler`
    is in ORDERS: run it with the draws forced to x0. The predictions are normalised in float64."""
    forced = Forced(denoise, x0)
    x = x0.masked_fill(maskable, cfg.mask_id)
    for _ in SAMPLERS[sampler](forced, x, x0.shape[1], cfg, **options):
        pass
    return forced.nats, forced.calls


def row_nats(model, x0, maskable, counted, cfg, order):
    """-log p of the counted tokens of each row, (B,), and its network calls, (B,). order: the
    arguments {sampler, its option} of `order_nats`."""
    nats, calls = order_nats(denoiser(model, cfg), x0, maskable, cfg, **order)
    return nats.masked_fill(~counted, 0).sum(-1), calls


def order_arguments(order, given):
    """The arguments of `order_nats` for an order and its options that were given, by default one
    token per call."""
    option = default_options(SAMPLERS[order]) | given
    if "per_call" in option:
        option["per_call"] = option["per_call"] or 1
    return dict(sampler=order, **option)


def describe(order):
    """What its likelihood is, from {sampler, its option}."""
    name, *option = order.items()
    return f"exact for the order {name[1]}, " + ", ".join(f"{k} {v:g}" for k, v in option)


def settle_order(args, cfg):
    """Turn --order and --per_call into args.order = {sampler, its option}; returns what it is."""
    if cfg.causal:
        fail(f"--order {args.order}: an AR model is exact from left to right, without --order")
    if args.T is not None or args.passes != 1:
        fail(f"--order {args.order}: is exact, so --T and --passes do not apply")
    if args.per_call and "per_call" not in default_options(SAMPLERS[args.order]):
        fail(f"--per_call {args.per_call}: the order {args.order} chooses the number of tokens")
    given = dict(per_call=args.per_call) if args.per_call else {}
    args.T, args.order = 0, order_arguments(args.order, given)
    return describe(args.order)


# --------------------------------------------------------------------------------------------------
# The experiment


def list_settings(orders, per_call):
    """{name: arguments of `order_nats`}; an order that chooses the number of tokens has its default
    option."""
    settings = {}
    for order in orders:
        own = default_options(SAMPLERS[order])
        values = per_call if "per_call" in own else list(own.values())
        for value in values:
            option = {name: value for name in own}
            label = " ".join(f"{name}={value:g}" for name, value in option.items())
            settings[order, label] = dict(sampler=order, **option)
    return settings


@torch.no_grad()
def measure(path, args):
    """{(order, option): (nats per token of each window (W,), calls per window)} of a checkpoint,
    the bound first, and the factor from nats per token to bits per character."""
    device = pick_device(args.device)
    model, cfg = load(path, not args.no_ema, device, args.dtype)
    if cfg.causal or not cfg.zero_masking:
        fail(f"{path}: an AR model has one order, and one that may predict MASK none")
    ids, meta = read_split(args.data or cfg.data, args.split, cfg)
    starts, lengths = choose_windows(len(ids), cfg.seq_len, args.windows)
    starts = starts[lengths == cfg.seq_len]
    settings = list_settings(args.orders, args.per_call)
    nats = {name: np.zeros(len(starts)) for name in [("bound", ""), *settings]}
    calls = {name: 0 for name in nats}
    jobs = [(b, name) for b in range(0, len(starts), args.batch_size) for name in nats]
    for first, name in progress(jobs, disable=args.json, desc=str(path)):
        b = slice(first, first + args.batch_size)
        stored = take(ids, starts[b], cfg.seq_len, cfg, args.split)
        x0, maskable, counted = (a.to(device) for a in unpack(stored, meta, cfg))
        with autocast(device, args.dtype):
            if name in settings:
                total, n = row_nats(model, x0, maskable, counted, cfg, settings[name])
                calls[name] += n.sum().item() / len(starts)
            else:
                total, calls[name] = bound_nats(model, cfg, x0, maskable, counted, starts[b], args)
        nats[name][b] = (total / counted.sum(-1)).cpu().numpy()
    tokens = count_tokens(ids, meta, cfg)
    factor = tokens / meta["splits"][args.split]["characters"] / math.log(2)
    return {name: (nats[name], calls[name]) for name in nats}, factor


def bound_nats(model, cfg, x0, maskable, counted, starts, args):
    """The bound of each row (B,), from --passes numbers of masks that fill the range evenly, and
    that number."""
    total = 0
    for p in range(args.passes):
        v = torch.from_numpy(window_noise(0, starts, p, cfg.seq_len)).to(x0.device)
        u = torch.from_numpy(window_noise(1, starts, p, 1)[:, 0]).to(x0.device)
        u = (p + u) / args.passes
        total = total + batch_nats(model, x0, maskable, counted, cfg, 0, u, v)
    return total / args.passes, args.passes


def error_of(values):
    """Standard error of the mean over windows."""
    return mean_error(values.tolist())


def make_rows(path, figures, factor):
    """A row for each order of a checkpoint: bits per character with its error over windows, and
    minus the bound and minus one token per call of the same order, with errors paired by window."""
    rows, bound = [], figures["bound", ""][0]
    for (order, option), (nats, calls) in figures.items():
        row = dict(ckpt=str(path), order=order, option=option, calls=calls)
        row |= dict(bits=nats.mean() * factor, bits_se=error_of(nats) * factor)
        for name, other in (
            ("bound", bound),
            ("one", figures.get((order, "per_call=1"), (None,))[0]),
        ):
            if other is not None and other is not nats:
                row[f"minus_{name}"] = (nats - other).mean() * factor
                row[f"minus_{name}_se"] = error_of(nats - other) * factor
        rows.append({k: float(v) if isinstance(v, np.floating) else v for k, v in row.items()})
    return rows


def average(rows):
    """A row for each order with means over checkpoints ± errors over them, as text."""
    means = []
    for key in dict.fromkeys((row["order"], row["option"]) for row in rows):
        same = [row for row in rows if (row["order"], row["option"]) == key]
        row = dict(order=key[0], option=key[1], calls=np.mean([r["calls"] for r in same]).item())
        for name in ("bits", "minus_bound", "minus_one"):
            if name in same[0]:
                row[name] = format_mean([r[name] for r in same])
        means.append(row)
    return means


def parse_arguments(argv):
    p = parser(__doc__)
    p.add_argument("ckpts", nargs="+", metavar="CKPT", help="runs that differ in the seed")
    p.add_argument("--orders", nargs="+", choices=ORDERS, default=list(ORDERS[:4]))
    p.add_argument("--per_call", type=int, nargs="+", default=[1, 2, 4, 8], help="tokens per call")
    p.add_argument("--windows", type=int, default=32, help="evenly spaced; 0: the whole split")
    p.add_argument("--passes", type=int, default=64, help="forwards per window of the bound")
    p.add_argument("--split", default="val", help="train, val or test")
    p.add_argument("--data", help="another prepared corpus with the same tokenizer")
    p.add_argument("--batch_size", type=int, default=32, help="for memory and speed only")
    add_model_options(p)
    p.add_argument("--json", action="store_true", help="one JSON line per row, nothing else")
    args = p.parse_args(argv)
    check_range(args, per_call=1, windows=0, passes=1, batch_size=1)
    return args


@command
def main(argv=None):
    args = parse_arguments(argv)
    rows = [row for path in args.ckpts for row in make_rows(path, *measure(path, args))]
    print(format_rows(rows, args.json))
    if len(args.ckpts) > 1 and not args.json:
        print("\n" + format_rows(average(rows), False))
    return rows


if __name__ == "__main__":
    main()
