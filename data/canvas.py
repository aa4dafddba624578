"""Prompts and texts with holes -> canvases: (L,) ids with MASK where the model is to write."""

import re

import torch

# ____: a token per underscore; [12]: 12 tokens; [*]: as many as fill the model's length
HOLE = re.compile(r"_{4,}|\[\d{1,6}\]|\[\*\]")


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


def infill_canvas(tokenizer, text, cfg, subword):
    """(L,) ids of a text with MASK in its holes. Sub-word tokens carry the space before a word, so
    for them the space before a hole belongs to the hole. ValueError without a hole."""
    ids, end = start_ids(tokenizer, cfg), 0
    for hole in HOLE.finditer(text):
        piece = text[end : hole.start()]
        ids += tokenizer.encode(piece.removesuffix(" ") if subword else piece, inside=end > 0)
        if hole[0] == "[*]":
            ids += [STAR]
        else:
            ids += [cfg.mask_id] * (len(hole[0]) if hole[0][0] == "_" else int(hole[0][1:-1]))
        end = hole.end()
    if not {cfg.mask_id, STAR} & {*ids}:
        raise ValueError(
            "no hole in the text: write ____ (a token per underscore, 4 or more), [12] or [*]"
        )
    return torch.tensor(widen_star(ids + tokenizer.encode(text[end:], inside=True), cfg))


STAR = -1  # stands for the hole [*]


def widen_star(ids, cfg):
    """ids with the masks of [*]: as SEDD's prefix and suffix, the text then has cfg.seq_len tokens.
    ValueError if there are two such holes, or if no token is left for one."""
    n = cfg.seq_len - (len(ids) - ids.count(STAR))
    if STAR in ids and (ids.count(STAR) > 1 or n < 1):
        raise ValueError(f"[*] may come once and needs a token: {n} of {cfg.seq_len} are left")
    i = ids.index(STAR) if STAR in ids else len(ids)
    return ids[:i] + [cfg.mask_id] * n * (i < len(ids)) + ids[i + 1 :]
