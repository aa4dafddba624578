"""Generative perplexity: samples of a checkpoint under a judge, beside their unigram entropy.

python -m tasks.judge out/owt_mdlm/ckpt.pt gpt2-large --steps 256             # a judge of the hub
python -m tasks.judge out/text8_mdlm/ckpt.pt out/text8_ar/ckpt.pt --num 256   # our AR checkpoint
python -m tasks.judge out/owt_mdlm/ckpt.pt gpt2-large --semi_ar --length 2048 --stride 512 \\
    --noise_removal greedy                                      # long text, MDLM's section 4.2

A judge is a function score(texts) -> (nats, tokens), two arrays with one number per text: its cost
under the judge, and how many tokens were counted. Texts contain END where the model wrote BOS or
EOS, however its tokenizer spells them; the judge reads its end-of-text token there.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import check_range, command, compute_dtype, fail, parser, progress, to_json
from data.canvas import start_ids
from data.checkpoints import load
from data.command_line import add_model_options, add_sampler_options
from data.processes import gather, local_device, process_group, rank_and_world, share
from data.tokenizer import tokenizer_of
from diffusion import ar
from evaluate import figure, widen
from sample import (
    add_length_options,
    check_arguments,
    end_id,
    generate,
    make_canvas,
    sampling_options,
)
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


def make_judge(nll, encode, eos, length, start, cut, stride=None):
    """score() of a causal network, text by text: no padding, and sampling takes far longer.

    nll: ids -> nats (n,) of all of them, or of all but the first; encode: text without END -> ids;
    eos: the id for END, or None. A window has `length` ids; `start` precedes each and is not
    counted. cut: read only the first window of a text. Windows advance by `stride` ids, by default
    by their length, as in MDLM's code. A shorter stride counts each id once, in the first window
    that has it, so that all but the first ids have at least `length - stride` before them."""
    room = length - len(start)
    stride = min(stride or room, room)

    def cost(text):
        ids = []
        for i, piece in enumerate(text.split(END)):
            ids += [eos] * (i > 0 and eos is not None) + encode(piece)
        counted = np.array([i != eos or eos not in ids[:k] for k, i in enumerate(ids)], bool)
        if start and ids[: len(start)] == start:  # the text already begins with it
            ids, counted = ids[len(start) :], counted[len(start) :]
        if cut:
            ids, counted = ids[:room], counted[:room]
        nats, tokens, done = 0.0, 0, 0
        while done < len(ids):
            i = done - (room - stride) if done else 0
            end = min(i + room, len(ids))
            costs = nll([*start, *ids[i:end]])[done - end :].double().cpu().numpy()
            count = counted[end - len(costs) : end]
            nats, tokens, done = nats + costs[count].sum(), tokens + count.sum(), end
        return nats, tokens

    def judge(texts):
        texts = progress(texts, desc="judging", disable=rank_and_world()[0] > 0)
        return np.array([*map(cost, texts)]).reshape(-1, 2).T

    return torch.no_grad()(judge)


def our_judge(path, device, whole=True, context=None, stride=None):
    """An AR checkpoint of this project, in windows of its seq_len. It always reads the whole text
    and predicts the first token too, unless that is a given BOS."""
    model, cfg = load(path, device=device)
    if not cfg.causal:
        fail(f"judge {path}: must be an AR model, but this one has loss={cfg.loss}")
    tokenizer = tokenizer_of(model.tokenizer)

    def nll(ids):
        x = torch.tensor([ids], device=device)
        return ar(model, x, x >= 0, cfg)[0]

    start = start_ids(tokenizer, cfg)
    length = limit_context(cfg.seq_len, context)
    return make_judge(nll, tokenizer.encode, tokenizer.eos, length, start, False, stride)


def limit_context(length, context):
    """The ids of a judge's window: --judge_context, which is at most the network's length."""
    if context and not 2 <= context <= length:
        fail(f"--judge_context {context}: must be from 2 to the judge's {length} tokens")
    return context or length


def transformers_judge(name, device, whole=False, context=None, stride=None):
    """A causal language model of the hub or of a local folder, in float32. As in MDLM's code, it
    reads a text up to its context's length and does not count the first token: GPT-2 has no start
    symbol to predict it from. whole: it reads the text to its end, window by window."""
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
    length = limit_context(length, context)
    return make_judge(nll, encode, tokenizer.eos_token_id, length, start, not whole, stride)


def load_judge(name, device, **reading):
    """The judge of this name: an AR checkpoint of this project, or a model of transformers. All
    processes of torchrun share the texts. reading: whole, context and stride of the judge."""
    is_ours = Path(name).suffix == ".pt" or (Path(name) / "ckpt.pt").exists()
    score = (our_judge if is_ours else transformers_judge)(name, device, **reading)

    def score_or_fail(texts):
        try:
            return np.array(gather(zip(*score(share(texts))))).T
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


def sample_and_judge(args, device):
    """The figures of samples under the judge, and all that they depend on, as one dict."""
    model, cfg = load(args.ckpt, not args.no_ema, device, args.dtype)
    tokenizer = tokenizer_of(model.tokenizer)
    options = sampling_options(args, cfg, end_id(model, tokenizer))
    canvas = make_canvas(args, cfg, tokenizer, subword=True)
    whole = args.semi_ar or args.judge_stride is not None
    score = load_judge(
        args.judge, device, whole=whole, context=args.judge_context, stride=args.judge_stride
    )
    ids_only = tokenizer._replace(decode=list)  # generate then returns ids
    rows = generate(model, ids_only, cfg, args.num, canvas, args.batch_size, **options)
    result = judge_rows(rows, tokenizer, score)
    law = "sampler", "steps", "temperature", "top_p", "noise_removal"
    shown, given = {name: options[name] for name in law}, options["sampler_options"]
    if shown["sampler"] in STEPLESS:
        shown["steps"] = None
    if args.semi_ar:
        window = args.window or cfg.seq_len
        shown |= dict(window=window, stride=args.stride or window // 2)
    return result | shown | default_options(SAMPLERS[shown["sampler"]]) | given | {
        "judge": args.judge, "judge_context": args.judge_context,
        "judge_stride": args.judge_stride, "samples": len(rows), "length": len(canvas),
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
    if "window" in result:
        law.append(f"windows of {result['window']} that advance by {result['stride']}")
    if result["noise_removal"] == "greedy":
        law.append("greedy last step")
    law = ", ".join([sampler, *(law or ["a token per call"])])
    size = f"{length} tokens, {result['tokens_per_sample']:.1f} each by the judge's tokenizer"
    return (
        f"generative perplexity {figure(result, 'gen_ppl')} under {result['judge']}\n"
        f"unigram entropy       {figure(result, 'entropy')} nats, at most {math.log(length):.3f}\n"
        f"{result['samples']} samples of {size}; {law}, temperature {result['temperature']:g}, "
        f"top_p {result['top_p']:g}, network in {result['dtype']}, draws in float64"
    )


def parse_arguments(argv):
    p = parser(__doc__)
    p.add_argument("ckpt")
    p.add_argument("judge", help="a model of transformers or an AR checkpoint")
    p.add_argument("--num", type=int, default=64, help="samples [64]")
    add_sampler_options(p)
    add_length_options(p)
    p.add_argument("--judge_context", type=int, metavar="N", help="tokens of a judge's window")
    p.add_argument("--judge_stride", type=int, metavar="N", help="by which it moves [its length]")
    p.add_argument("--batch_size", type=int, default=32)
    p.add_argument("--seed", type=int, default=0)
    add_model_options(p)
    p.add_argument("--json", action="store_true", help="one JSON line on stdout, nothing else")
    p.set_defaults(prompt="", infill=None, guidance=0.0, fps=None)  # sample.py's own options
    args = p.parse_args(argv)
    check_arguments(args)
    check_range(args, judge_stride=1, batch_size=1)
    return args


@command
def main(argv=None):
    args = parse_arguments(argv)
    with process_group(args):
        result = sample_and_judge(args, local_device(args))
        if rank_and_world()[0] == 0:
            print(to_json(result) if args.json else describe(result))
        return result


if __name__ == "__main__":
    main()
