"""The bound on the zero-shot sets: python evaluate.py CKPT --zero_shot [SET ...]."""

import contextlib
import re
import sys

import torch.distributed as dist

from common import fail
from data.corpus import DUMP, default_folder, folder_of
from data.prepare import prepare
from data.processes import rank_and_world
from data.zeroshot import ZERO_SHOT
from evaluate import evaluate_split, figure, settle_T

MDLM_SETS = ("ptb", "wikitext103", "lm1b_gpt2", "lambada", "ag_news", "pubmed", "arxiv")


def choose_recipes(model, cfg, args):
    """{set: arguments of `prepare`} of the sets that --zero_shot names."""
    recipes = {}
    for name in args.zero_shot or MDLM_SETS:
        dump = re.fullmatch(f"fineweb_({DUMP})", name)
        if not dump and name not in ZERO_SHOT:
            sets = f"{', '.join(ZERO_SHOT)}, and dumps: fineweb_CC-MAIN-2024-10"
            fail(f"--zero_shot {name}: there are {sets}")
        recipes[name] = (
            dict(name="fineweb", dump=dump[1]) if dump else dict(name=name, wrap=cfg.seq_len)
        )
    for name, recipe in recipes.items():
        kind, words = ("llama", "Llama-2's pieces") if "dump" in recipe else ("gpt2", "GPT-2's BPE")
        if model.tokenizer["kind"] != kind:
            fail(f"--zero_shot {name}: is in {words}, but {args.ckpt} is not")
    return recipes


def evaluate_sets(model, cfg, args):
    """The bound on each set, in rows of the model's length; prepares a set that is missing. Dumps
    of FineWeb, from after the model's training data, are SMDM's temporal test."""
    sign, kind = settle_T(args, cfg)
    rank, world = rank_and_world()
    recipes = choose_recipes(model, cfg, args)
    folders = {name: default_folder(**recipe) for name, recipe in recipes.items()}
    for name, folder in folders.items():
        if rank == 0 and not folder_of(folder).exists():
            with contextlib.redirect_stdout(sys.stderr):  # stdout may be for JSON only
                prepare(**recipes[name])
    if world > 1:
        dist.barrier()
    sets = {
        name: evaluate_split(folder, "test", model, cfg, args) for name, folder in folders.items()
    }
    width = max(12, *map(len, sets))
    lines = [f"{'set':{width}} {'perplexity':>20} {'bits per token':>20} {'tokens':>12}"]
    for name, result in sets.items():
        perplexity, bits = (f"{sign} {figure(result, f)}" for f in ("perplexity", "bits_per_token"))
        lines.append(f"{name:{width}} {perplexity:>20} {bits:>20} {result['tokens']:12,}")
    rows = f"end-of-text after each, cut to rows [BOS] {cfg.seq_len - 2} tokens [EOS]"
    if model.tokenizer["kind"] == "llama":
        rows = f"<s> before each, cut to rows of {cfg.seq_len} tokens"
    lines.append(f"{kind}; the documents of a set one after the other, {rows}")
    return {"sets": sets}, "\n".join(lines)
