"""The likelihood bound of a checkpoint on a split or on the zero-shot sets, and the generative perplexity of its
samples under a judge, each with its standard error.

python evaluate.py out/pydocs_mdlm/ckpt.pt                      # test split, continuous time
python evaluate.py out/owt_mdlm/ckpt.pt --split val --json
python evaluate.py out/text8_d3pm/ckpt.pt --T 1000 --passes 4   # the bound of a 1000-step sampler
python evaluate.py out/owt_mdlm/ckpt.pt --zero_shot             # MDLM's seven sets; or --zero_shot ptb lambada
python evaluate.py out/smdm_170/ckpt.pt --zero_shot fineweb_CC-MAIN-2024-10 fineweb_CC-MAIN-2024-18 --resume
python evaluate.py out/owt_mdlm/ckpt.pt --gen_ppl gpt2-large --steps 256
python evaluate.py out/text8_mdlm/ckpt.pt --gen_ppl out/text8_ar/ckpt.pt --num 256
"""

import hashlib
import io
import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from configs import check_range, device_options, fail, options_of_mode, parser
from data.corpus import folder_of, read_meta, read_split, take, unpack
from data.shards import one_line
from data.tokenizer import tokenizer_of
from diffusion import LOSSES, OPTIONS, SAMPLERS, STEPLESS, ar, exact_count_bound, options_of
from model import autocast, compute_dtype, load, pick_device
from sample import check_top_p, generate, opening, own_of, own_options, sampler_for

# ---------------------------------------------------------------------------------------------------------
# The bound


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
    model, ids, meta, cfg, where, T=0, passes=1, windows=0, batch_size=16, seed=0, dtype="float32", quiet=True,
    partial=None,
):  # fmt: skip
    """The bound on -log p of a split in nats per token: {"nats", "se", "tokens", "forwards"}.

    The split is cut into fixed windows of seq_len (the last may be shorter); windows > 0 takes that many,
    evenly spaced. T = 0: exact mask counts (`exact_count_bound`), else D3PM's T-step bound, step stratified;
    an AR model has no T: its likelihood is exact. Padding and given first tokens are not counted.
    Under torch.distributed the ranks share the windows, and all return the result of all.
    partial: a file, of one process, in which every batch leaves its nats and tokens, 16 bytes per window, so
    that after a kill the same call goes on, to the same result."""
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
    if T and not cfg.causal:  # without nanoDD's auxiliary loss; SEDD's p, normalised, in the steps of `ddpm`
        loss = "d3pm" if cfg.loss == "d3pm" else "mdlm"
        in_steps = replace(cfg, aux_ce=0.0, T=T, loss=loss, time_draw="stratified")

    nats, tokens = torch.zeros(2, passes, W, dtype=torch.float64, device=device)
    mine = list(enumerate(jobs))[rank::world]
    saved = open(partial, "r+b" if Path(partial).exists() else "w+b") if partial else io.BytesIO()
    for job, (p, b) in tqdm(mine, disable=quiet or rank > 0, unit="batch", leave=False):
        size = 2 * 8 * (b.stop - b.start)
        if len(before := saved.read(size)) == size:
            nats[p, b], tokens[p, b] = torch.frombuffer(bytearray(before), dtype=torch.float64).view(2, -1)
            continue
        saved.seek(-len(before), io.SEEK_CUR)  # a batch that was cut short
        torch.manual_seed(seed * 1_000_003 + job)  # of the job, not of the rank: any world gives one result
        x0, maskable = unpack(take(ids, starts[b], int(lengths[b.start]), cfg, where), meta, cfg)
        x0, maskable = x0.to(device), maskable.to(device)
        v = torch.from_numpy(u[p, b]).to(device)
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
        saved.write(torch.stack((nats[p, b], tokens[p, b])).cpu().numpy().tobytes())
        saved.flush()
    saved.close()
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
    text = of["tokens"] - of.get("padding", 0) - of.get("given", 0)
    bits, per_char = 1 / math.log(2), text / of["characters"]
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


def beside(ckpt, name):
    """The path of a file in a checkpoint's folder, of which `ckpt` may be the name, too."""
    return (Path(ckpt) if Path(ckpt).is_dir() else Path(ckpt).parent) / name


def identity(model, **settings):
    """A hash of a network, by some numbers of each of its tensors, and of settings: what was left behind under
    another one is not gone on with."""
    digest = hashlib.sha256(json.dumps([asdict(model.cfg), settings], sort_keys=True).encode())
    for tensor in model.state_dict().values():
        digest.update(tensor.flatten()[:: tensor.numel() // 64 or 1].float().cpu().numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------
# Generative perplexity. A judge is a function score(texts) -> (nats, tokens), two arrays of a number per text:
# what the text costs under the judge, and how many tokens were counted. A text holds END wherever the model wrote
# BOS or EOS, however its tokenizer spells them; the judge reads its own end-of-text there.

END = "<|endoftext|>"


def text_of(ids, tokenizer):
    pieces = [[]]
    for i in ids:
        if i in (tokenizer.bos, tokenizer.eos):
            pieces.append([])
        else:
            pieces[-1].append(i)
    return END.join(map(tokenizer.decode, pieces))


def unigram_entropy(ids):
    """Entropy in nats of the frequencies of a sample's tokens, at most ln(len(ids)): the measure of diversity of
    arXiv 2409.02908. It belongs beside generative perplexity, which repetition lowers."""
    frequency = np.unique(ids, return_counts=True)[1] / len(ids)
    return float((frequency * np.log(1 / frequency)).sum())


def ratio(values, weights):
    """sum(values) / sum(weights) and its standard error to first order, the pairs being independent."""
    n, total = len(values), np.sum(weights)
    if not total:
        return math.nan, math.nan
    mean = np.sum(values) / total
    variance = ((values - mean * weights) ** 2).sum() * n / (n - 1) if n >= 8 else math.nan
    return float(mean), float(np.sqrt(variance) / total)


def generative_perplexity(texts, score):
    """exp(total nats / total counted tokens) of texts under a judge, with the texts as the units of its error.

    The definition of MDLM's code (arXiv 2406.07524): the judge tokenises the text anew; all of it counts, what
    follows an end-of-text too, but of the end-of-text tokens only the first. There, however, a padded text
    without end-of-text is charged for a token of padding, and an incomplete last batch is dropped. SEDD's code
    averages the perplexities of single samples over the model's own tokens, which is not comparable."""
    nats, tokens = score(texts)
    mean, se = ratio(nats, tokens)
    return {
        "gen_ppl": (perplexity := math.exp(min(mean, 700))), "gen_ppl_se": perplexity * se,
        "nats": mean, "se": se, "tokens": int(np.sum(tokens)),
    }  # fmt: skip


def judge(nll, encode, eos, length, start, cut):
    """score() of a causal network, text by text: no padding to get wrong, and sampling took far longer anyway.

    nll: ids -> nats (n,) of all of them, or of all but the first; encode: text without END -> ids; eos: the id for
    END, or None. A window has `length` ids; those of `start` stand in front of each, and are not counted.
    cut: only the first window of a text is read."""
    room = length - len(start)

    def cost(text):
        ids = []
        for i, piece in enumerate(text.split(END)):
            ids += [eos] * (i > 0 and eos is not None) + encode(piece)
        counted = np.array([i != eos or eos not in ids[:k] for k, i in enumerate(ids)], bool)
        if start and ids[: len(start)] == start:  # the model began its text so itself
            ids, counted = ids[len(start) :], counted[len(start) :]
        nats, tokens = 0.0, 0
        for i in range(0, min(len(ids), room) if cut else len(ids), room):
            part, count = ids[i : i + room], counted[i : i + room]
            costs = nll([*start, *part])[-len(part) :].double().cpu().numpy()
            count = count[len(part) - len(costs) :]
            nats, tokens = nats + costs[count].sum(), tokens + count.sum()
        return nats, tokens

    return torch.no_grad()(lambda texts: np.array([cost(text) for text in texts]).T)


def our_judge(path, device):
    """An AR checkpoint of ours, in windows of its seq_len. It predicts the first token, too, unless given BOS."""
    model, cfg = load(path, device=device)
    if not cfg.causal:
        fail(f"judge {path}: must be an AR model, but this one has loss={cfg.loss}")
    tokenizer = tokenizer_of(model.tokenizer)

    def nll(ids):
        x = torch.tensor([ids], device=device)
        return ar(model, x, x >= 0, cfg)[0]

    return judge(nll, tokenizer.encode, tokenizer.eos, cfg.seq_len, opening(tokenizer, cfg), cut=False)


def transformers_judge(name, device):
    """A causal language model of the hub or of a local folder, in float32. As in MDLM's code, a text is cut off at
    the judge's context, and its first token is not counted, for want of a start symbol."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        fail(f"judge {name}: needs transformers: pip install transformers")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name).float().to(device).eval()
    except Exception as e:  # no such model, no network, no such format: each has types of its own
        fail(f"judge {name}: {(str(e).strip() or type(e).__name__).splitlines()[0]}")

    def nll(ids):
        x = torch.tensor([ids], device=device)
        return F.cross_entropy(model(x).logits[0, :-1], x[0, 1:], reduction="none")

    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
    start = [i for i in tokenizer("").input_ids if i == tokenizer.bos_token_id]  # GPT-2: none
    length = getattr(model.config, "max_position_embeddings", None) or 1024
    return judge(nll, encode, tokenizer.eos_token_id, length, start, cut=True)


def judge_of(name, device):
    """The judge of this name, which tells in a line what it cannot read."""
    ours = Path(name).suffix == ".pt" or (Path(name) / "ckpt.pt").exists()
    score = (our_judge if ours else transformers_judge)(name, device)

    def read(texts):
        try:
            return score(texts)
        except ValueError as e:
            fail(f"judge {name}: cannot read what the model wrote: {e}")

    return read


def judged(rows, tokenizer, score):
    """`generative_perplexity` of rows of ids, and their `unigram_entropy` with its standard error over rows."""
    result = generative_perplexity([text_of(ids, tokenizer) for ids in rows], score)
    entropy, error = ratio(np.array([unigram_entropy(ids) for ids in rows]), np.ones(len(rows)))
    return result | dict(entropy=entropy, entropy_se=error)


# ---------------------------------------------------------------------------------------------------------
# The command: a function per mode, (model, cfg, args) -> (record for JSON, text to print)


def steps_of(args, cfg):
    """Set args.T, by default the model's; returns the sign before a figure and what the figure is."""
    args.T = cfg.T if args.T is None else args.T
    if args.T and cfg.causal:
        fail(f"--T {args.T}: an AR model has no diffusion steps")
    if not args.T and not cfg.zero_masking:
        fail("--T 0: a model that may answer MASK (zero_masking=False) needs steps, e.g. --T 1000")
    if cfg.causal:
        return "=", "exact"
    return "<=", f"bound in {args.T} steps" if args.T else "bound in continuous time"


def report_on(data, split, model, cfg, args):
    """`report` of a split of a prepared corpus."""
    if read_meta(data)["tokenizer"] != model.tokenizer:
        fail(f"{data}: made with another tokenizer than {args.ckpt}")
    ids, meta = read_split(data, split, cfg)
    dtype, partial = compute_dtype(next(model.parameters()).device, args.dtype), None
    how = dict(T=args.T, passes=args.passes, batch_size=args.batch_size, seed=args.seed, dtype=dtype)
    if args.resume:
        key = identity(model, sha256=meta["splits"][split]["sha256"], **how)
        partial = beside(args.ckpt, f"evaluate-{key[:16]}.partial")
        args.partial.append(partial)
    try:
        result = bound(model, ids, meta, cfg, f"{data}/{split}.bin", quiet=args.json, partial=partial, **how)
    except OSError as e:
        fail(one_line(e))
    return report(result, meta, split) | {"data": data}


def one_split(model, cfg, args):
    sign, kind = steps_of(args, cfg)
    result = report_on(args.data or cfg.data, args.split, model, cfg, args)
    lines = [
        f"{name.replace('_', ' '):15} {sign:2} {figure(result, name, 4)}"
        for name in ("bits_per_char", "bits_per_token", "perplexity")
    ]
    about = f"{result['tokens']:,} tokens, {kind}, {result['forwards']:,} forwards"
    lines.append(f"{args.split} split of {result['data']}, {about}")
    return result | {"T": args.T, "passes": args.passes}, "\n".join(lines)


MDLM_SETS = ("ptb", "wikitext103", "lm1b_gpt2", "lambada", "ag_news", "pubmed", "arxiv")


def zero_shot(model, cfg, args):
    """The bound on each set, in rows of the model's length; a set that is not there yet is prepared first.
    Dumps of FineWeb, from after the model's training data, are SMDM's temporal test."""
    from data.prepare import DUMP, ZERO_SHOT, default_folder, prepare

    sign, kind = steps_of(args, cfg)
    made = {}  # what `prepare` makes of each
    for name in args.zero_shot or MDLM_SETS:
        dump = re.fullmatch(f"fineweb_({DUMP})", name)
        if not dump and name not in ZERO_SHOT:
            fail(f"--zero_shot {name}: there are {', '.join(ZERO_SHOT)}, and dumps: fineweb_CC-MAIN-2024-10")
        made[name] = dict(name="fineweb", dump=dump[1]) if dump else dict(name=name, wrap=cfg.seq_len)
    for name, options in made.items():
        needs, what = ("llama", "Llama-2's pieces") if "dump" in options else ("gpt2", "GPT-2's BPE")
        if model.tokenizer["kind"] != needs:
            fail(f"--zero_shot {name}: is in {what}, but {args.ckpt} is not")
    folders = {name: default_folder(**options) for name, options in made.items()}
    for name, folder in folders.items():
        if not folder_of(folder).exists():
            prepare(**made[name])
    sets = {name: report_on(folder, "test", model, cfg, args) for name, folder in folders.items()}
    wide = max(12, *map(len, sets))
    lines = [f"{'set':{wide}} {'perplexity':>20} {'bits per token':>20} {'tokens':>12}"]
    for name, result in sets.items():
        perplexity, bits = (f"{sign} {figure(result, f)}" for f in ("perplexity", "bits_per_token"))
        lines.append(f"{name:{wide}} {perplexity:>20} {bits:>20} {result['tokens']:12,}")
    rows = f"end-of-text after each, cut to rows [BOS] {cfg.seq_len - 2} tokens [EOS]"
    if model.tokenizer["kind"] == "llama":
        rows = f"<s> before each, cut to rows of {cfg.seq_len} tokens"
    lines.append(f"{kind}; the documents of a set one after the other, {rows}")
    return {"sets": sets, "T": args.T, "passes": args.passes}, "\n".join(lines)


def gen_ppl(model, cfg, args):
    """Samples of the model under a judge, with their unigram entropy and all that the figure depends on."""
    sampler = sampler_for(cfg, args.sampler)
    check_top_p(args)
    own = options_of(SAMPLERS[sampler]) | own_of(args, sampler)
    name, device, tokenizer = args.gen_ppl, next(model.parameters()).device, tokenizer_of(model.tokenizer)
    score = judge_of(name, device)
    options = dict(steps=args.steps, sampler=sampler, temperature=args.temperature, top_p=args.top_p)
    rows = generate(
        model, tokenizer._replace(decode=list), cfg, args.num, batch_size=args.batch_size, seed=args.seed,
        dtype=args.dtype, own=own, **options,
    )  # fmt: skip
    result = judged(rows, tokenizer, score)
    if sampler in STEPLESS:
        options["steps"] = None
    counted = result["tokens"] / len(rows)
    result |= options | own | {
        "judge": name, "samples": len(rows), "length": cfg.seq_len,
        "tokens_per_sample": counted, "draws": "float64",
    }  # fmt: skip
    dtype = compute_dtype(device, args.dtype)
    how = [f"{name} {value:g}" for name, value in own.items()]
    how += [f"{options['steps']} steps"] if options["steps"] else [] if own else ["a token per call"]
    return result, (
        f"generative perplexity {figure(result, 'gen_ppl')} under {name}\n"
        f"unigram entropy       {figure(result, 'entropy')} nats, at most {math.log(cfg.seq_len):.3f}\n"
        f"{len(rows)} samples of {cfg.seq_len} tokens, of the judge's {counted:.1f} each; {', '.join([sampler, *how])}, "
        f"temperature {args.temperature:g}, top_p {args.top_p:g}, network in {dtype}, draws in float64"
    )


# The options that belong to a mode, with their defaults; --zero_shot and --gen_ppl choose the mode.
MODES = {
    one_split: dict(split="test", data=None, T=None, passes=1, resume=False),
    zero_shot: dict(T=None, passes=1, resume=False),
    gen_ppl: dict(num=64, steps=1000, sampler=None, temperature=1.0, top_p=1.0) | dict.fromkeys(OPTIONS),
}


def main(argv=None):
    p = parser(__doc__)
    p.add_argument("ckpt")
    p.add_argument("--split", help="train, val or test [test]")
    p.add_argument("--data", help="another prepared corpus with the same tokenizer [the training data]")
    p.add_argument("--T", type=int, help="diffusion steps of the bound, 0: continuous time [the model's]")
    p.add_argument("--passes", type=int, help="forwards per window [1]")
    p.add_argument(
        "--resume", action="store_true", default=None,
        help="leave what is done beside the checkpoint until all is, and go on from there",
    )  # fmt: skip
    choice = p.add_mutually_exclusive_group()
    choice.add_argument(
        "--zero_shot", nargs="*", metavar="SET", help="the bound on these [MDLM's seven]; fineweb_<dump>"
    )
    choice.add_argument("--gen_ppl", metavar="JUDGE", help="a model of transformers or an AR checkpoint")
    p.add_argument("--num", type=int, help="gen_ppl: samples [64]")
    p.add_argument("--steps", type=int, help="gen_ppl: diffusion steps [1000]")
    p.add_argument("--sampler", choices=SAMPLERS, help="gen_ppl: [ddpm_cache, or what the model needs]")
    own_options(p)
    p.add_argument("--temperature", type=float, help="gen_ppl: [1], 0: greedy")
    p.add_argument("--top_p", type=float, help="gen_ppl: nucleus [1]")
    p.add_argument("--batch_size", type=int, default=32)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--no_ema", action="store_true", help="the raw weights")
    device_options(p)
    p.add_argument("--json", action="store_true", help="one JSON line on stdout, nothing else")
    args = p.parse_args(argv)
    check_range(args, T=0, passes=1, num=1, steps=1, temperature=0, batch_size=1, seed=0)
    mode = zero_shot if args.zero_shot is not None else gen_ppl if args.gen_ppl is not None else one_split
    misplaced = "only with --gen_ppl" if mode is one_split else f"not with --{mode.__name__}"
    options_of_mode(args, MODES, mode, misplaced)

    device, args.partial = pick_device(args.device), []
    model, cfg = load(args.ckpt, not args.no_ema, device, args.dtype)
    result, text = mode(model, cfg, args)
    result |= {
        "ckpt": args.ckpt, "step": model.step, "seed": args.seed, "ema": not args.no_ema,
        "dtype": compute_dtype(device, args.dtype),
    }  # fmt: skip
    print(to_json(result) if args.json else text)
    for path in args.partial:
        path.unlink(missing_ok=True)
    return result


if __name__ == "__main__":
    main()
