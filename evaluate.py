"""The likelihood bound of a checkpoint on a split or the zero-shot sets, with its standard error.

python evaluate.py out/pydocs_mdlm/ckpt.pt                      # test split, continuous time
python evaluate.py out/owt_mdlm/ckpt.pt --split val --json
torchrun --nproc_per_node=8 evaluate.py out/owt_mdlm/ckpt.pt --windows 2048   # 8 GPUs, part of it
python evaluate.py out/text8_d3pm/ckpt.pt --T 1000 --passes 4   # the bound of a 1000-step sampler
python evaluate.py out/owt_mdlm/ckpt.pt --order margin --per_call 4  # exact, for that sampler
python evaluate.py out/owt_mdlm/ckpt.pt --zero_shot             # MDLM's seven sets
python evaluate.py out/smdm_170/ckpt.pt --zero_shot fineweb_CC-MAIN-2024-10 --resume

Generative perplexity of samples is another command: python -m tasks.judge.
"""

import io
import math
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from common import (
    autocast,
    check_range,
    command,
    compute_dtype,
    fail,
    one_line,
    parser,
    progress,
    to_json,
)
from data.checkpoints import fingerprint, load, read_record, sibling, write_record
from data.command_line import add_model_options
from data.corpus import count_tokens, read_meta, read_split, take, unpack
from data.processes import local_device, process_group, rank_and_world
from diffusion import LOSSES, alpha, ar, draw_count, exact_count_bound, mask_tokens, philox
from samplers import ORDERS

# --------------------------------------------------------------------------------------------------
# The bound


def strata(windows, rng):
    """(windows,) uniforms: neighbours are u and 1 - u, with one u in each (windows / 2)-th
    of [0, 1). They fill the interval evenly, and a batch of whole pairs always masks the
    same number of tokens."""
    half = (windows + 1) // 2
    u = (rng.permutation(half) + rng.random(half)) / half
    return np.stack([u, 1 - u], 1).reshape(-1)[:windows]


def standard_error(nats, u, tokens):
    """Standard error of sum(nats) / sum(tokens), from nats (passes, W), u (passes, W), tokens (W,).

    It covers the random masks and the choice of windows. The dependence of nats on u is no
    source of error, because u is stratified: a cubic fits that part and is subtracted. Windows
    are then the independent units, with W - 4 degrees of freedom; see `widen`. Below 8 windows
    the error is unknown: NaN."""
    W = len(tokens)
    if W < 8:
        return math.nan
    y = nats / tokens
    residual = y - np.polyval(np.polyfit(u.ravel(), y.ravel(), 3), u)
    error = np.sqrt(((residual.mean(0) * tokens) ** 2).sum() * W / (W - 4)) / tokens.sum()
    return float(error * widen(W - 4))


def widen(df):
    """Student's t over the normal's 1.96, at 95 % and df degrees of freedom: +-1.96 errors times
    this cover the truth in 95 % of cases, also for few windows. Abramowitz and Stegun 26.7.5,
    within 0.3 % from df = 4 on."""
    z = 1.959964
    a, b = (z**2 + 1) / 4, (5 * z**4 + 16 * z**2 + 3) / 96
    c = (3 * z**6 + 19 * z**4 + 17 * z**2 - 15) / 384
    return 1 + a / df + b / df**2 + c / df**3


def choose_windows(n, L, windows):
    """(starts, lengths) of the windows of L tokens of a split of n; the last may be shorter.
    windows > 0 takes that many, evenly spaced."""
    starts = np.arange(0, n, L)
    if 0 < windows < len(starts):
        starts = starts[np.linspace(0, len(starts) - 1, windows).astype(int)]
    return starts, np.minimum(L, n - starts)


def make_jobs(lengths, L, passes, batch_size):
    """[(pass, slice of windows)]: the batches of all passes, with a shorter
    last window by itself."""
    W = len(lengths)
    batches = [slice(i, min(i + batch_size, W)) for i in range(0, W, batch_size)]
    if lengths[-1] < L and batches[-1].stop - batches[-1].start > 1:
        batches[-1:] = [slice(batches[-1].start, W - 1), slice(W - 1, W)]
    return [(p, b) for p in range(passes) for b in batches]


def window_noise(seed, starts, p, L):
    """(B, L) uniforms that mask the windows at starts (B,) in pass p: a function of window and
    pass, so the bound does not depend on the batch size."""
    return np.stack([philox(seed, start // L, stream=3, step=p).random(L) for start in starts])


def batch_nats(model, x0, maskable, counted, cfg, T, u, v, order=None):
    """One estimate of the bound per row, (B,) float64 nats, from uniforms u (B,) for the time and
    v (B, L) for the masks: exact mask counts in continuous time (T = 0), else one step of D3PM's
    T-step bound. An AR model's likelihood is exact, as is that of an order: {sampler, options}."""
    if cfg.causal:
        return ar(model, x0, counted, cfg).double().sum(-1)
    if order:
        from tasks.orders import row_nats

        return row_nats(model, x0, maskable, counted, cfg, order)[0]
    if not T:
        count = draw_count(maskable.sum(-1), u)
        return exact_count_bound(model, x0, maskable, cfg, count, None, v, counted).double()
    # without nanoDD's auxiliary loss; SEDD's p, normalised, in the steps of `ddpm`
    loss = "d3pm" if cfg.loss == "d3pm" else "mdlm"
    in_steps = replace(cfg, aux_ce=0.0, T=T, loss=loss, time_draw="stratified")
    t = (torch.floor(u * T) + 1).clamp(max=T) / T
    xt = mask_tokens(x0, alpha(cfg, t), maskable, cfg.mask_id, v)
    return LOSSES[loss](model, x0, counted, in_steps, t, xt).double().sum(-1)


@torch.no_grad()
def bound(
    model, ids, meta, cfg, where, T=0, passes=1, windows=0, batch_size=16, seed=0, dtype="float32",
    quiet=True, partial=None, split_tokens=None, span=(0.0, 1.0), order=None,
):  # fmt: skip
    """The bound on -log p of a split in nats per token: nats, se, tokens, split_tokens
    (counted in the whole split) and forwards.

    See `choose_windows` and `batch_nats`. Padding and given tokens are not counted. Under
    torch.distributed the ranks share the windows, and all return the result of all. partial: a file
    of one process that receives each batch's nats and tokens, 16 bytes per window; after a kill the
    same call resumes from it, to the same result. split_tokens: what an earlier call counted. span:
    the part of the times [0, 1) that the bound is limited to; a partition's parts add up to it."""
    device, (rank, world) = next(model.parameters()).device, rank_and_world()
    starts, lengths = choose_windows(len(ids), cfg.seq_len, windows)
    W, rng = len(starts), np.random.Generator(np.random.Philox(seed))
    (low, high), u = span, np.stack([strata(W, rng) for _ in range(passes)])
    u = low + (high - low) * u
    jobs = make_jobs(lengths, cfg.seq_len, passes, batch_size)
    turns = range(rank, -(-len(jobs) // world) * world, world)  # equally many: see extra/fsdp.py
    nats, tokens = torch.zeros(2, passes, W, dtype=torch.float64, device=device)
    saved = open(partial, "r+b" if Path(partial).exists() else "w+b") if partial else io.BytesIO()
    for turn in progress(turns, disable=quiet or rank > 0, unit="batch"):
        p, b = jobs[turn % len(jobs)]
        if before := read_record(saved, 2 * 8 * (b.stop - b.start)):
            nats[p, b], tokens[p, b] = torch.frombuffer(before, dtype=torch.float64).view(2, -1)
        else:
            stored = take(ids, starts[b], int(lengths[b.start]), cfg, where)
            x0, maskable, counted = (a.to(device) for a in unpack(stored, meta, cfg))
            v = window_noise(seed, starts[b], p, cfg.seq_len)[:, : x0.shape[1]]
            noise = (torch.from_numpy(a).to(device) for a in (u[p, b], v))
            tokens[p, b] = counted.sum(-1).double()
            with autocast(device, dtype):
                nats[p, b] = batch_nats(model, x0, maskable, counted, cfg, T, *noise, order)
            write_record(saved, torch.stack((nats[p, b], tokens[p, b])).cpu().numpy().tobytes())
        if turn >= len(jobs):  # another process's batch
            nats[p, b], tokens[p, b] = 0.0, 0.0
    saved.close()
    if world > 1:
        dist.all_reduce(nats)
        dist.all_reduce(tokens)
    nats, tokens = nats.cpu().numpy(), tokens[0].cpu().numpy()
    kept = tokens > 0  # a window may be all padding
    if not kept.any():
        fail(f"{where}: nothing to predict, only padding or given tokens")
    nats, tokens, u = nats[:, kept] * (high - low), tokens[kept], u[:, kept]
    return {
        "nats": float(nats.mean(0).sum() / tokens.sum()),
        "se": standard_error(nats, u, tokens),
        "tokens": int(tokens.sum()),
        "split_tokens": split_tokens or count_tokens(ids, meta, cfg),
        "forwards": passes * W,
    }


def report(result, meta, split):
    """The figures people quote, with their standard errors, from a result of `bound`. Bits per
    character are the split's total nats over its characters of text, for every layout of rows."""
    bits, per_char = 1 / math.log(2), result["split_tokens"] / meta["splits"][split]["characters"]
    nats, se = result["nats"], result["se"]
    perplexity = math.exp(min(nats, 700))
    return {
        "split": split,
        "bits_per_char": nats * bits * per_char,
        "bits_per_char_se": se * bits * per_char,
        "bits_per_token": nats * bits,
        "bits_per_token_se": se * bits,
        "perplexity": perplexity,
        "perplexity_se": perplexity * se,
        **result,
    }


def figure(result, name, digits=3):
    """A figure of `report` with its standard error, as text."""
    error = result[name + "_se"]
    return f"{result[name]:.{digits}f} ± " + ("?" if math.isnan(error) else f"{error:.{digits}f}")


# --------------------------------------------------------------------------------------------------
# The command: a function per mode, (model, cfg, args) -> (record for JSON, text to print)


def settle_T(args, cfg):
    """Set args.T, by default the model's; returns the sign before a figure
    and the figure's kind."""
    if args.order:
        if args.parts:
            fail("--parts: not with --order, which has no steps")
        from tasks.orders import settle_order

        return "=", settle_order(args, cfg)
    args.T = cfg.T if args.T is None else args.T
    if args.T and cfg.causal:
        fail(f"--T {args.T}: an AR model has no diffusion steps")
    if args.parts and (not args.T or args.resume or not cfg.carry_over):
        fail("--parts: needs --T above 0 and carry_over=True, and excludes --resume")
    if not args.T and not cfg.zero_masking:
        fail("--T 0: a model that may predict MASK (zero_masking=False) needs steps, e.g. --T 1000")
    if cfg.causal:
        return "=", "exact"
    return "<=", f"bound in {args.T} steps" if args.T else "bound in continuous time"


def evaluate_split(data, split, model, cfg, args):
    """`report` of a split of a prepared corpus."""
    if read_meta(data)["tokenizer"] != model.tokenizer:
        fail(f"{data}: made with another tokenizer than {args.ckpt}")
    ids, meta = read_split(data, split, cfg)
    dtype, partial = compute_dtype(next(model.parameters()).device, args.dtype), None
    settings = dict(
        T=args.T, passes=args.passes, windows=args.windows, batch_size=args.batch_size,
        seed=args.seed, dtype=dtype, order=args.order,
    )  # fmt: skip
    if args.resume:  # each process has its own part and file
        about = dict(sha256=meta["splits"][split]["sha256"], part=rank_and_world())
        key = fingerprint(model, **about, **settings)
        partial = sibling(args.ckpt, f"evaluate-{key[:16]}.partial")
        args.partials.append(partial)
    where = f"{data}/{split}.bin"
    try:
        settings |= dict(quiet=args.json, partial=partial)
        if args.parts:
            from tasks.parts import bound_in_parts as bound_of
        else:
            bound_of = bound
        result = bound_of(model, ids, meta, cfg, where, **settings)
    except OSError as e:
        fail(one_line(e))
    return report(result, meta, split) | {"data": data}


def evaluate_one(model, cfg, args):
    """One split of a prepared corpus."""
    sign, kind = settle_T(args, cfg)
    result = evaluate_split(args.data or cfg.data, args.split or "test", model, cfg, args)
    if model.latent is not None:
        from extra.with_latent import bounds_given_z

        result |= bounds_given_z(model, cfg, args, result)
    names = "bits_per_char", "bits_per_token", "perplexity"
    lines = [f"{name.replace('_', ' '):15} {sign:2} {figure(result, name, 4)}" for name in names]
    lines += [f"{part:15} {sign:2} {figure(result, part, 4)} bits per token"
              for part in ("kl", "reconstruction") if part in result]  # fmt: skip
    latent = result.get("latent", {}).items()
    lines += [f"{name.replace('_', ' '):28} {value:.4f}" for name, value in latent]
    about = f"{result['tokens']:,} tokens, {kind}, {result['forwards']:,} forwards"
    lines.append(f"{result['split']} split of {result['data']}, {about}")
    return result, "\n".join(lines)


def parse_arguments(argv):
    p = parser(__doc__)
    p.add_argument("ckpt")
    p.add_argument("--split", help="train, val or test [test]")
    p.add_argument(
        "--data", help="another prepared corpus with the same tokenizer [the training data]"
    )
    p.add_argument(
        "--zero_shot",
        nargs="*",
        metavar="SET",
        help="the bound on these [MDLM's seven]; fineweb_<dump>",
    )
    p.add_argument(
        "--T", type=int, help="diffusion steps of the bound, 0: continuous time [the model's]"
    )
    p.add_argument("--passes", type=int, default=1, help="forwards per window [1]")
    p.add_argument("--parts", action="store_true", help="with T: KL and reconstruction apart")
    p.add_argument("--windows", type=int, default=0, help="of a split, spread evenly [all]")
    p.add_argument("--order", choices=ORDERS, help="the exact likelihood of this sampler instead")
    p.add_argument("--per_call", type=int, help="tokens per call of --order [1]")
    p.add_argument(
        "--resume", action="store_true",
        help="keep partial results beside the checkpoint and resume from them after a kill",
    )  # fmt: skip
    p.add_argument("--batch_size", type=int, default=32)
    p.add_argument("--seed", type=int, default=0)
    add_model_options(p)
    p.add_argument("--json", action="store_true", help="one JSON line on stdout, nothing else")
    p.add_argument("--gen_ppl", nargs="*", help="moved: python -m tasks.judge CKPT JUDGE")
    args, unknown = p.parse_known_args(argv)
    if args.gen_ppl is not None:
        judge = " ".join(args.gen_ppl) or "JUDGE"
        fail(f"--gen_ppl moved: python -m tasks.judge {shlex.quote(args.ckpt)} {judge}")
    if unknown:
        p.error(f"unrecognized arguments: {' '.join(unknown)}")
    check_range(args, T=0, passes=1, windows=0, per_call=1, batch_size=1, seed=0)
    if args.per_call and not args.order:
        fail(f"--per_call {args.per_call}: only with --order")
    for name in ("split", "data"):
        if args.zero_shot is not None and getattr(args, name):
            fail(f"--{name}: not with --zero_shot")
    return args


def run(args, device):
    """The result of the arguments; one of the processes prints it."""
    args.partials = []
    model, cfg = load(args.ckpt, not args.no_ema, device, args.dtype)
    if args.zero_shot is None:
        result, text = evaluate_one(model, cfg, args)
    else:
        from tasks.zero_shot import evaluate_sets

        result, text = evaluate_sets(model, cfg, args)
    result |= {
        "T": args.T, "passes": args.passes, "windows": args.windows, "ckpt": args.ckpt,
        "step": model.step, "seed": args.seed, "ema": not args.no_ema,
        "dtype": compute_dtype(device, args.dtype),
    }  # fmt: skip
    if rank_and_world()[0] == 0:
        print(to_json(result) if args.json else text, flush=True)
    for path in args.partials:
        path.unlink(missing_ok=True)
    return result


@command
def main(argv=None):
    args = parse_arguments(argv)
    with process_group(args):
        return run(args, local_device(args))


if __name__ == "__main__":
    main()
