"""Prompts and texts with holes -> canvases: (L,) ids with MASK where the model is to write."""

import re

import torch

from common import fail
from data.tokenizer import tokenizer_of

# ____: a token per underscore; [12]: 12 tokens; [*]: as many as fill the model's length
HOLE = re.compile(r"(?<!\\)(\\*)(_{4,}|\[\d{1,6}\]|\[\*\])")


def start_ids(tokenizer, cfg):
    """The ids that every text begins with: the first token, if the model always gets it."""
    if cfg.bos and tokenizer.bos is None:
        raise ValueError("bos=True, but the tokenizer has no token that begins a text")
    return [tokenizer.bos] if cfg.bos else []


def prompt_canvas(tokenizer, prompt, length, cfg):
    """(length,) ids: the prompt's tokens, then MASK. ValueError if it does not fit."""
    ids = start_ids(tokenizer, cfg) + tokenizer.encode(prompt)
    if len(ids) > length:
        raise ValueError(f"the prompt has {len(ids)} tokens, but the length is {length}")
    return torch.tensor(ids + [cfg.mask_id] * (length - len(ids)))


def split_holes(text):
    """(pieces, holes) of a text: pieces[i] comes before the hole of holes[i] tokens, or None for
    [*], and the last one ends the text. Before a hole, two backslashes stand for one; a single one
    makes the hole text."""
    pieces, holes, end = [""], [], 0
    for found in HOLE.finditer(text):
        slashes, hole = found.groups()
        pieces[-1] += text[end : found.start()] + slashes[: len(slashes) // 2]
        end = found.end()
        if len(slashes) % 2:
            pieces[-1] += hole
            continue
        size = None if hole == "[*]" else len(hole) if hole[0] == "_" else int(hole[1:-1])
        if size == 0:
            raise ValueError(f"{hole} is a hole of no tokens; as text it is \\{hole}")
        holes.append(size)
        pieces.append("")
    pieces[-1] += text[end:]
    return pieces, holes


def infill_canvas(tokenizer, text, cfg, subword):
    """(L,) ids of a text with MASK in its holes. Sub-word tokens carry the space before a word, so
    for them the space before a hole belongs to the hole. With [*], as with SEDD's prefix and
    suffix, the text has cfg.seq_len tokens. ValueError without a hole, or for a wrong one."""
    (*pieces, last), holes = split_holes(text)
    if not holes:
        raise ValueError(
            "no hole in the text: write ____ (a token per underscore, 4 or more), [12] or [*]"
        )
    given = [start_ids(tokenizer, cfg)]
    for i, piece in enumerate(pieces):
        given.append(tokenizer.encode(piece.removesuffix(" ") if subword else piece, inside=i > 0))
    given.append(tokenizer.encode(last, inside=True))
    if None in holes:
        left = cfg.seq_len - sum(map(len, given)) - sum(size or 0 for size in holes)
        if holes.count(None) > 1 or left < 1:
            left = f"{left} of {cfg.seq_len} are left"
            raise ValueError(f"[*] may come once and needs a token: {left}")
        holes[holes.index(None)] = left
    ids = given[0]
    for piece, size in zip(given[1:], holes):
        ids = ids + piece + [cfg.mask_id] * size
    return torch.tensor(ids + given[-1])


def sampling_inputs(cfg, meta):
    """(tokenizer, canvas) of the samples; fails now and not after days of training."""
    if not (cfg.samples or cfg.val_samples):
        return None, None
    tokenizer = tokenizer_of(meta["tokenizer"])
    try:
        return tokenizer, prompt_canvas(tokenizer, "", cfg.seq_len, cfg)
    except ValueError as e:
        fail(f"{cfg.data}: {e}; --samples=0 trains without showing any")
