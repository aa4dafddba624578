"""Generative perplexity: samples of a checkpoint under a judge, beside their unigram entropy.

python -m tasks.judge out/owt_mdlm/ckpt.pt gpt2-large --steps 256             # a judge of the hub
python -m tasks.judge out/text8_mdlm/ckpt.pt out/text8_ar/ckpt.pt --num 256   # our AR checkpoint

A judge is a function score(texts) -> (nats, tokens), two arrays with one number per text: its cost
under the judge, and how many tokens were counted. Texts contain END where the model wrote BOS or
EOS, however its tokenizer spells them; the judge reads its end-of-text token there.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import (
    add_model_options,
    add_sampler_options,
    check_range,
    check_top_p,
    choose_sampler,
    command,
    compute_dtype,
    fail,
    parser,
    pick_device,
    progress,
    read_sampler_options,
    to_json,
)
from data.checkpoints import load
from data.tokenizer import tokenizer_of
from diffusion import ar
from evaluate import figure, widen
from sample import generate, start_ids
from samplers import SAMPLERS, STEPLESS, default_options

END = "<|endoftext|>"


def join_text(ids, tokenizer):
    """The text of ids, with END for every BOS and EOS."""
    pieces = [[]]
    for i in ids:
        if i in (tokenizer.bos, tokenizer.eos):
            pieces.append([])
        else:
            pieces[-1].append(i)
    return END.join(map(tokenizer.decode, pieces))


def unigram_entropy(ids):
    """Entropy in nats of a sample's token frequencies, at most ln(len(ids)): the diversity of arXiv
    2409.02908. Report it beside generative perplexity, which repetition lowers."""
    frequency = np.unique(ids, return_counts=True)[1] / len(ids)
    return float((frequency * np.log(1 / frequency)).sum())


def ratio(values, weights):
    """sum(values) / sum(weights) and its standard error to first order, for independent pairs,
    widened for few of them."""
    n, total = len(values), np.sum(weights)
    if not total:
        return math.nan, math.nan
    mean = np.sum(values) / total
    variance = ((values - mean * weights) ** 2).sum() * n / (n - 1) if n >= 8 else math.nan
    return float(mean), float(np.sqrt(variance) / total * widen(max(n - 1, 1)))


def generative_perplexity(texts, score):
    """exp(total nats / counted tokens) of texts under a judge; texts are the units of its error.

    As in MDLM's code (arXiv 2406.07524), the judge tokenises the text and counts all of it, also
    after an end-of-text, but only the first end-of-text token. Two things differ: MDLM's code
    counts a token of padding in a padded text without end-of-text, and drops an incomplete last
    batch. SEDD's code averages the perplexities of single samples over the model's tokens, which
    is not comparable."""
    nats, tokens = score(texts)
    mean, se = ratio(nats, tokens)
    perplexity = math.exp(min(mean, 700))
    return {
        "gen_ppl": perplexity, "gen_ppl_se": perplexity * se,
        "nats": mean, "se": se, "tokens": int(np.sum(tokens)),
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Judges


def make_judge(nll, encode, eos, length, start, cut):
    """score() of a causal network, text by text: no padding, and sampling takes far longer.

    nll: ids -> nats (n,) of all of them, or of all but the first; encode: text without END -> ids;
    eos: the id for END, or None. A window has `length` ids; `start` precedes each and is not
    counted. cut: read only the first window of a text."""
    room = length - len(start)

    def cost(text):
        ids = []
        for i, piece in enumerate(text.split(END)):
            ids += [eos] * (i > 0 and eos is not None) + encode(piece)
        counted = np.array([i != eos or eos not in ids[:k] for k, i in enumerate(ids)], bool)
        if start and ids[: len(start)] == start:  # the text already begins with it
            ids, counted = ids[len(start) :], counted[len(start) :]
        nats, tokens = 0.0, 0
        for i in range(0, min(len(ids), room) if cut else len(ids), room):
            part, count = ids[i : i + room], counted[i : i + room]
            costs = nll([*start, *part])[-len(part) :].double().cpu().numpy()
            count = count[len(part) - len(costs) :]
            nats, tokens = nats + costs[count].sum(), tokens + count.sum()
        return nats, tokens

    return torch.no_grad()(lambda texts: np.array([*map(cost, progress(texts, desc="judging"))]).T)


def our_judge(path, device):
    """An AR checkpoint of this project, in windows of its seq_len. It predicts the first token too,
    unless that is a given BOS."""
    model, cfg = load(path, device=device)
    if not cfg.causal:
        fail(f"judge {path}: must be an AR model, but this one has loss={cfg.loss}")
    tokenizer = tokenizer_of(model.tokenizer)

    def nll(ids):
        x = torch.tensor([ids], device=device)
        return ar(model, x, x >= 0, cfg)[0]

    start = start_ids(tokenizer, cfg)
    return make_judge(nll, tokenizer.encode, tokenizer.eos, cfg.seq_len, start, cut=False)


def transformers_judge(name, device):
    """A causal language model of the hub or of a local folder, in float32. As in MDLM's code, it
    reads a text up to its context's length and does not count the first token: GPT-2 has no start
    symbol to predict it from."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        fail(f"judge {name}: needs transformers: pip install transformers")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name).float().to(device).eval()
    except Exception as e:  # no such model, no network, no such format: each raises another type
        fail(f"judge {name}: {(str(e).strip() or type(e).__name__).splitlines()[0]}")

    def nll(ids):
        x = torch.tensor([ids], device=device)
        return F.cross_entropy(model(x).logits[0, :-1], x[0, 1:], reduction="none")

    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
    start = [i for i in tokenizer("").input_ids if i == tokenizer.bos_token_id]  # GPT-2: none
    length = getattr(model.config, "max_position_embeddings", None) or 1024
    return make_judge(nll, encode, tokenizer.eos_token_id, length, start, cut=True)


def load_judge(name, device):
    """The judge of this name: an AR checkpoint of this project, or a model of transformers."""
    is_ours = Path(name).suffix == ".pt" or (Path(name) / "ckpt.pt").exists()
    score = (our_judge if is_ours else transformers_judge)(name, device)

    def score_or_fail(texts):
        try:
            return score(texts)
        except ValueError as e:
            fail(f"judge {name}: cannot read what the model wrote: {e}")

    return score_or_fail


def judge_rows(rows, tokenizer, score):
    """`generative_perplexity` of rows of ids, and their `unigram_entropy` with its error."""
    result = generative_perplexity([join_text(ids, tokenizer) for ids in rows], score)
    entropies = np.array([unigram_entropy(ids) for ids in rows])
    entropy, error = ratio(entropies, np.ones(len(rows)))
    return result | dict(entropy=entropy, entropy_se=error)


# --------------------------------------------------------------------------------------------------
# The command


def sample_and_judge(model, cfg, args):
    """The figures of samples under the judge, and all that they depend on, as one dict."""
    sampler = choose_sampler(cfg, args.sampler)
    given = read_sampler_options(args, sampler)
    device, tokenizer = next(model.parameters()).device, tokenizer_of(model.tokenizer)
    score = load_judge(args.judge, device)
    law = "steps", "temperature", "top_p"
    options = dict(sampler=sampler) | {name: getattr(args, name) for name in law}
    rows = generate(
        model, tokenizer._replace(decode=list), cfg, args.num, batch_size=args.batch_size,
        seed=args.seed, dtype=args.dtype, sampler_options=given, **options,
    )  # fmt: skip
    result = judge_rows(rows, tokenizer, score)
    if sampler in STEPLESS:
        options["steps"] = None
    return result | options | default_options(SAMPLERS[sampler]) | given | {
        "judge": args.judge, "samples": len(rows), "length": cfg.seq_len,
        "tokens_per_sample": result["tokens"] / len(rows), "draws": "float64",
        "ckpt": args.ckpt, "step": model.step, "seed": args.seed, "ema": not args.no_ema,
        "dtype": compute_dtype(device, args.dtype),
    }  # fmt: skip


def describe(result):
    """The result as text."""
    sampler, length = result["sampler"], result["length"]
    law = [f"{name} {result[name]:g}" for name in default_options(SAMPLERS[sampler])]
    if result["steps"]:
        law.append(f"{result['steps']} steps")
    law = ", ".join([sampler, *(law or ["a token per call"])])
    size = f"{length} tokens, {result['tokens_per_sample']:.1f} each by the judge's tokenizer"
    return (
        f"generative perplexity {figure(result, 'gen_ppl')} under {result['judge']}\n"
        f"unigram entropy       {figure(result, 'entropy')} nats, at most {math.log(length):.3f}\n"
        f"{result['samples']} samples of {size}; {law}, temperature {result['temperature']:g}, "
        f"top_p {result['top_p']:g}, network in {result['dtype']}, draws in float64"
    )


@command
def main(argv=None):
    p = parser(__doc__)
    p.add_argument("ckpt")
    p.add_argument("judge", help="a model of transformers or an AR checkpoint")
    p.add_argument("--num", type=int, default=64, help="samples [64]")
    add_sampler_options(p)
    p.add_argument("--batch_size", type=int, default=32)
    p.add_argument("--seed", type=int, default=0)
    add_model_options(p)
    p.add_argument("--json", action="store_true", help="one JSON line on stdout, nothing else")
    args = p.parse_args(argv)
    check_range(args, num=1, steps=1, temperature=0, batch_size=1, seed=0)
    check_top_p(args)
    model, cfg = load(args.ckpt, not args.no_ema, pick_device(args.device), args.dtype)
    result = sample_and_judge(model, cfg, args)
    print(to_json(result) if args.json else describe(result))
    return result


if __name__ == "__main__":
    main()
