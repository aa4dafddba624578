"""The likelihood bound of a checkpoint over a whole split, with its standard error.

python evaluate.py out/pydocs_mdlm/ckpt.pt                      # test split, continuous time
python evaluate.py out/owt_mdlm/ckpt.pt --split val --json
python evaluate.py out/text8_d3pm/ckpt.pt --T 1000 --passes 4   # the bound of a 1000-step sampler
"""

import json
import math
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from configs import check_range, fail, parser
from data.corpus import maskable_of, read_meta, read_split, take
from diffusion import LOSSES, ar, exact_count_bound
from model import autocast, compute_dtype, load, pick_device


def strata(windows, rng):
    """(windows,) uniforms in neighbours of u and 1 - u, with one of the u in each (windows / 2)-th of [0, 1).
    So they fill the interval evenly, and a batch of whole pairs always masks the same number of tokens."""
    half = (windows + 1) // 2
    u = (rng.permutation(half) + rng.random(half)) / half
    return np.stack([u, 1 - u], 1).reshape(-1)[:windows]


def standard_error(nats, u, tokens):
    """Standard error of sum(nats) / sum(tokens), from nats (passes, W), u (passes, W), tokens (W,).

    It covers the random masks and the choice of windows. How nats depend on u is no source of error, since u
    is stratified: that part is fitted by a cubic and taken out. Then windows are the independent units."""
    W = len(tokens)
    if W < 8:
        return math.nan  # too few windows to tell
    y = nats / tokens
    residual = y - np.polyval(np.polyfit(u.ravel(), y.ravel(), 3), u)
    return float(np.sqrt(((residual.mean(0) * tokens) ** 2).sum() * W / (W - 4)) / tokens.sum())


@torch.no_grad()
def bound(
    model, ids, meta, cfg, where, T=0, passes=1, windows=0, batch_size=16, seed=0, dtype="float32", quiet=True
):
    """The bound on -log p of a split in nats per token: {"nats", "se", "tokens", "forwards"}.

    The split is cut into fixed windows of seq_len (the last may be shorter); windows > 0 takes that many,
    evenly spaced. T = 0: exact mask counts (`exact_count_bound`), else D3PM's T-step bound, step stratified;
    an AR model has no T: its likelihood is exact. Padding and given first tokens are not counted.
    Under torch.distributed the ranks share the windows, and all return the result of all."""
    L, device = cfg.seq_len, next(model.parameters()).device
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    starts = np.arange(0, len(ids), L)
    if 0 < windows < len(starts):
        starts = starts[np.linspace(0, len(starts) - 1, windows).astype(int)]
    lengths = np.minimum(L, len(ids) - starts)
    W = len(starts)
    rng = np.random.Generator(np.random.Philox(seed))
    u = np.stack([strata(W, rng) for _ in range(passes)])
    batches = [slice(i, min(i + batch_size, W)) for i in range(0, W, batch_size)]
    if lengths[-1] < L and batches[-1].stop - batches[-1].start > 1:  # the short last window goes alone
        batches[-1:] = [slice(batches[-1].start, W - 1), slice(W - 1, W)]
    jobs = [(p, b) for p in range(passes) for b in batches]
    in_steps = None
    if (
        T and not cfg.causal
    ):  # nanoDD's auxiliary loss is no part of the bound; SEDD in steps is `ddpm` of its p
        in_steps = replace(cfg, aux_ce=0.0, T=T, loss="d3pm" if cfg.loss == "d3pm" else "mdlm")

    nats, tokens = torch.zeros(2, passes, W, dtype=torch.float64, device=device)
    mine = list(enumerate(jobs))[rank::world]
    for job, (p, b) in tqdm(mine, disable=quiet or rank > 0, unit="batch", leave=False):
        torch.manual_seed(seed * 1_000_003 + job)  # of the job, not of the rank: any world gives one result
        x0 = torch.from_numpy(take(ids, starts[b], int(lengths[b.start]), cfg, where)).to(device)
        v = torch.from_numpy(u[p, b]).to(device)
        maskable = maskable_of(x0, meta, cfg)
        tokens[p, b] = n = maskable.sum(-1).double()
        with autocast(device, dtype):
            if cfg.causal:
                nats[p, b] = ar(model, x0, maskable, cfg).double().sum(-1)
            elif T:
                t = (torch.floor(v * T) + 1).clamp(max=T) / T
                nats[p, b] = LOSSES[in_steps.loss](model, x0, maskable, in_steps, t).double().sum(-1)
            else:
                count = torch.minimum(torch.floor(v * n) + 1, n.clamp(min=1)).long()
                nats[p, b] = exact_count_bound(model, x0, maskable, cfg, count).double()
    if world > 1:
        dist.all_reduce(nats)
        dist.all_reduce(tokens)
    nats, tokens = nats.cpu().numpy(), tokens[0].cpu().numpy()
    kept = tokens > 0  # a window may be all padding
    if not kept.any():
        fail(f"{where}: nothing to predict, only padding or given tokens")
    nats, tokens, u = nats[:, kept], tokens[kept], u[:, kept]
    return {
        "nats": float(nats.mean(0).sum() / tokens.sum()),
        "se": standard_error(nats, u, tokens),
        "tokens": int(tokens.sum()),
        "forwards": passes * W,
    }


def report(result, meta, split):
    """The figures people quote, each with its standard error, from the nats per token of `bound`."""
    of = meta["splits"][split]
    bits, per_char = 1 / math.log(2), (of["tokens"] - of.get("padding", 0)) / of["characters"]
    nats, se = result["nats"], result["se"]
    return {
        "split": split,
        "bits_per_char": nats * bits * per_char,
        "bits_per_char_se": se * bits * per_char,
        "bits_per_token": nats * bits,
        "bits_per_token_se": se * bits,
        "perplexity": (perplexity := math.exp(min(nats, 700))),
        "perplexity_se": perplexity * se,
        **result,
    }


def figure(result, name, digits=3):
    """A figure of `report` with its standard error, as text."""
    error = result[name + "_se"]
    return f"{result[name]:.{digits}f} ± " + ("?" if math.isnan(error) else f"{error:.{digits}f}")


def to_json(record):
    """One line of strict JSON: an unknown error is null, not NaN."""
    plain = lambda v: {k: plain(x) for k, x in v.items()} if isinstance(v, dict) else None if v != v else v
    return json.dumps(plain(record))


def main(argv=None):
    p = parser(__doc__)
    p.add_argument("ckpt")
    p.add_argument("--split", default="test", help="train, val or test")
    p.add_argument(
        "--data", help="another prepared corpus with the same tokenizer; default: the training data"
    )
    p.add_argument(
        "--T", type=int, help="diffusion steps of the bound, 0: continuous time; default: the model's"
    )
    p.add_argument("--passes", type=int, default=1, help="forwards per window")
    p.add_argument("--batch_size", type=int, default=32)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--no_ema", action="store_true", help="the raw weights")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="float32", choices=("auto", "float32", "bfloat16"))
    p.add_argument("--json", action="store_true", help="one JSON line on stdout, nothing else")
    args = p.parse_args(argv)
    check_range(args, T=0, passes=1, batch_size=1, seed=0)

    device = pick_device(args.device)
    model, cfg = load(args.ckpt, ema=not args.no_ema, device=device)
    data = args.data or cfg.data
    if read_meta(data)["tokenizer"] != model.tokenizer:
        fail(f"{data}: made with another tokenizer than {args.ckpt}")
    ids, meta = read_split(data, args.split, cfg)
    T = cfg.T if args.T is None else args.T
    if T and cfg.causal:
        fail(f"--T {T}: an AR model has no diffusion steps")
    if not T and not cfg.zero_masking:
        fail("--T 0: a model that may answer MASK (zero_masking=False) needs steps, e.g. --T 1000")
    result = bound(
        model, ids, meta, cfg, f"{data}/{args.split}.bin", T, args.passes, 0, args.batch_size, args.seed, args.dtype,
        quiet=args.json,
    )  # fmt: skip
    result = report(result, meta, args.split) | {
        "ckpt": args.ckpt, "step": model.step, "data": data, "T": T, "passes": args.passes,
        "seed": args.seed, "ema": not args.no_ema, "dtype": compute_dtype(device, args.dtype),
    }  # fmt: skip
    if args.json:
        print(to_json(result))
    else:
        for name in ("bits_per_char", "bits_per_token", "perplexity"):
            print(f"{name.replace('_', ' '):15} <= {figure(result, name, 4)}")
        time = f"{T} steps" if T else "continuous time"
        print(
            f"{args.split} split of {data}, {result['tokens']:,} tokens, {time}, {result['forwards']:,} forwards"
        )
    return result


if __name__ == "__main__":
    main()
