"""A prepared corpus on disk: data/<name>/{train,val[,test]}.bin and meta.json.

The .bin files are nothing but token ids, uint16 (uint32 for a vocabulary over 65,536), to be memory-mapped.
meta.json: name, source, tokenizer (see tokenizer.py), vocab_size, dtype, wrap (0, or the window length that
the ids were cut to, each window with its own BOS and EOS), pad (the id that fills up windows, or null) and,
per split, tokens, characters, sha256 and, where there is a pad, padding: how many of the tokens are pad.
With "given": true ids are uint32, and bit 31 marks every token that is given: never masked, trained or counted.
So is what follows a row's last token without it: padding; given is then the number of the other marked tokens.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch

from common import fail

ROOT = Path(__file__).parent
GIVEN = 1 << 31  # bit of a stored id


def folder_of(name):
    """A bare name is a folder under data/; anything with a slash is a path."""
    return Path(name) if "/" in name else ROOT / name


# ---------------------------------------------------------------------------------------------------------
# Writing: everything goes to <name>.partial, which is renamed when it is complete.


def partial_of(folder):
    return folder.with_name(folder.name + ".partial")


def finish(folder, source, tokenizer, vocab_size, characters, wrap=0, pad=None, given=False):
    """Seal the partial folder: hash its .bin files, write meta.json, rename it to `folder`.

    characters: {split: number of characters of text that the split's ids, not those given, stand for}."""
    partial, dtype = partial_of(folder), np.dtype(np.uint32) if given else dtype_of(vocab_size)
    block_size = 2**24 // (4 * wrap) * 4 * wrap if given else 2**24
    splits = {}
    for split in characters:
        sha256, tokens, padding, marked = hashlib.sha256(), 0, 0, 0
        with open(partial / f"{split}.bin", "rb") as f:
            while block := f.read(block_size):
                sha256.update(block)
                ids = np.frombuffer(block, dtype)
                tokens += len(ids)
                padding += int((ids == pad).sum()) if pad is not None else 0
                if given:  # in every row there is a token that is not
                    marks = ids.reshape(-1, wrap) >= GIVEN
                    padding += int(marks[:, ::-1].argmin(1).sum())
                    marked += int(marks.sum())
            os.fsync(f.fileno())
        splits[split] = dict(tokens=tokens, characters=characters[split], sha256=sha256.hexdigest())
        if pad is not None or given:
            splits[split]["padding"] = padding
        if given:
            splits[split]["given"] = marked - padding
    meta = dict(
        name=folder.name, source=source, tokenizer=tokenizer, vocab_size=vocab_size, dtype=dtype.name,
        wrap=wrap, pad=pad, given=given, splits=splits,
    )  # fmt: skip
    (partial / "meta.json").write_text(json.dumps(meta, indent=1))
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    return meta


def dtype_of(vocab_size):
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


# ---------------------------------------------------------------------------------------------------------
# Reading


def read_meta(name):
    """meta.json of a prepared corpus, as a dict; fails in one line when there is none or it is damaged."""
    path = folder_of(name) / "meta.json"
    if not path.exists():
        from data.prepare import options_for  # not at the top: it imports this file

        how = options_for(path.parent.name) or "text --input FILE..."
        if "/" in str(name) or how.startswith("text "):
            how += f" --out {name}"
        fail(f"{path}: no such file; prepare the data first: python data/prepare.py {how}")
    try:
        meta = json.loads(path.read_text())
        for key in ("tokenizer", "vocab_size", "wrap", "splits"):
            meta[key]
        for key, value in dict(pad=None, given=False).items():
            meta.setdefault(key, value)  # corpora prepared before there was any
        np.dtype(meta["dtype"])
    except (ValueError, KeyError, TypeError) as e:
        fail(f"{path}: damaged ({e}); prepare the data again")
    return meta


def read_split(name, split, cfg):
    """(ids, meta): a read-only memory map of one split, checked against meta.json and the config."""
    meta = read_meta(name)
    path = folder_of(name) / f"{split}.bin"
    if split not in meta["splits"]:
        fail(f"{path}: no such split; there are {', '.join(meta['splits'])}")
    if meta["vocab_size"] != cfg.vocab_size:
        fail(
            f"{path}: prepared with vocab_size {meta['vocab_size']}, but the model has {cfg.vocab_size}; "
            f"to train on this data add --vocab_size={meta['vocab_size']}"
        )
    if meta["wrap"] and meta["wrap"] != cfg.seq_len:
        fail(f"{path}: cut into windows of {meta['wrap']} tokens, but seq_len is {cfg.seq_len}")
    dtype, tokens = np.dtype(meta["dtype"]), meta["splits"][split]["tokens"]
    size = path.stat().st_size if path.exists() else 0
    if size != tokens * dtype.itemsize:
        fail(
            f"{path}: {size} bytes, but meta.json says {tokens * dtype.itemsize}; prepare the data again"
        )
    if split == "train" and tokens < cfg.seq_len:
        fail(f"{path}: {tokens} tokens, fewer than one row of seq_len {cfg.seq_len}")
    return np.memmap(path, dtype, "r"), meta


def take(ids, starts, length, cfg, where):
    """Rows ids[start : start + length] as (N, length) int64, as stored, which `unpack` reads; fails on an id
    beyond the vocabulary."""
    rows = np.stack([ids[s : s + length] for s in starts]).astype(np.int64)
    if (largest := (rows & (GIVEN - 1)).max()) >= cfg.vocab_size:
        fail(f"{where}: holds token id {largest}, but vocab_size is {cfg.vocab_size}")
    return rows


def training_rows(ids, meta, cfg, index):
    """Training rows number `index` (N,) of an endless stream -> (N, L) as of `take`, a pure function of cfg.seed.

    Every epoch cuts the corpus into windows at a new random offset (none when they are wrapped) and visits
    each window once, in random order."""
    L = cfg.seq_len
    offsets = 1 if meta["wrap"] else min(L, len(ids) - L + 1)
    per_epoch = (len(ids) - offsets + 1) // L
    starts = []
    for i in index:
        epoch, k = divmod(int(i), per_epoch)
        order, offset = epoch_order(cfg.seed, epoch, per_epoch, offsets)
        starts.append(int(order[k]) * L + offset)
    return take(ids, starts, L, cfg, f"{cfg.data}/train.bin")


_order = {}  # the last epoch's order: 4 bytes a window


def epoch_order(seed, epoch, windows, offsets):
    key = (seed, epoch, windows, offsets)
    if key not in _order:
        _order.clear()
        rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
        _order[key] = rng.integers(offsets), rng.permutation(np.arange(windows, dtype=np.uint32))
    offset, order = _order[key]
    return order, int(offset)


def unpack(rows, meta, cfg):
    """Rows (N, L) as stored -> x0 (N, L) int64 and maskable (N, L) bool: the tokens to be trained and counted,
    i.e. no padding, nothing given and no BOS that is."""
    rows = torch.as_tensor(rows)
    x0, maskable = rows & (GIVEN - 1), rows < GIVEN
    if meta.get("pad") is not None:
        maskable &= x0 != meta["pad"]
    if cfg.bos:
        maskable[:, 0] = False
    return x0, maskable
