"""A prepared corpus on disk: data/<name>/{train,val[,test]}.bin and meta.json.

A .bin file holds token ids and nothing else, uint16 (uint32 for a vocabulary over 65,536), and is
memory-mapped. meta.json has name, source, tokenizer (see tokenizer.py), vocab_size, dtype, wrap (0,
or the length of the rows, each with its own BOS and EOS), pad (the id that fills up rows, or null)
and, per split, tokens, characters, sha256 and, if there is a pad, padding: the number of pad ids.
With "given": true, ids are uint32, and bit 31 marks given tokens, which are never masked, trained
or counted. Marked tokens after a row's last unmarked one are padding; `given` counts the others.
"ends" says whether rows are documents, which end: there a text stops at the first end that a model
writes. Elsewhere an end of text is only a separator.

Damage is found: whoever reads a split compares the file's sha256 with meta.json's (see `HASHED`),
and meta.json holds its own checksum.
"""

import functools
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch

from common import fail, progress
from data.json_files import check_fields, read_json
from diffusion import philox

ROOT = Path(__file__).parent
GIVEN = 1 << 31  # bit of a stored id
VERSION = 2  # of meta.json; 1 had neither a version nor a checksum, and means the same
HASHED = 2**30  # bytes: larger files are hashed only by `prepare.py verify`


def folder_of(name):
    """A bare name is a folder under data/; anything with a slash is a path."""
    return Path(name) if "/" in name else ROOT / name


def dtype_of(vocab_size):
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


# --------------------------------------------------------------------------------------------------
# Folder names: name[_<dump>][_packed][_train][_no_eot][_wrap<n>], of options not at their default

DUMP = r"CC-MAIN-\d{4}-\d\d"
ZERO_SHOT_SETS = "ptb wikitext2 wikitext103 lm1b_gpt2 lambada ag_news pubmed arxiv".split()
NAMES = {  # data set: {option in the folder's name: default of the data set's function}
    "pydocs": {}, "text8": {}, "slimpajama": {}, "text": {},
    "openwebtext": dict(wrap=0), "lm1b": dict(packed=False, wrap=128),
    **dict.fromkeys(ZERO_SHOT_SETS, dict(train=False, no_eot=False, wrap=1024)),
    "fineweb": dict(dump="CC-MAIN-2024-10"),
    "gsm8k": dict(wrap=256), "sharegpt": dict(wrap=2048), "reversal": dict(wrap=64),
}  # fmt: skip


def default_folder(name, packed=False, train=False, no_eot=False, wrap=None, dump=None, **options):
    """The folder of a data set prepared with these options; a dump is always in the name."""
    dump = dump or NAMES.get(name, {}).get("dump")
    if dump and not re.fullmatch(DUMP, dump):
        fail(f"--dump={dump}: must be named like CC-MAIN-2024-10")
    wrap = None if wrap == NAMES.get(name, {}).get("wrap") else wrap
    parts = [name, dump, packed and "packed", train and "train", no_eot and "no_eot"]
    return "_".join(filter(None, parts)) + (f"_wrap{wrap}" if wrap is not None else "")


def command_for(folder):
    """The inverse: the arguments of prepare.py that make a folder of this name, or None."""
    names = "|".join(NAMES)
    flags = "(_packed)?(_train)?(_no_eot)?"
    found = re.fullmatch(rf"({names})(?:_({DUMP}))?{flags}(?:_wrap(\d+))?", folder)
    if not found or found[1] == "text":
        return None
    name, dump, packed, train, no_eot, wrap = found.groups()
    options = dict(
        dump=dump, packed=packed and True, train=train and True, no_eot=no_eot and True,
        wrap=wrap and int(wrap),
    )  # fmt: skip
    options = {option: value for option, value in options.items() if value is not None}
    if options.keys() - NAMES[name] or default_folder(name, **options) != folder:
        return None
    words = [f"--{option}" + f" {value}" * (value is not True) for option, value in options.items()]
    return " ".join([name, *words] + ["--input FILE..."] * (name == "reversal"))


# --------------------------------------------------------------------------------------------------
# Writing: everything goes to <name>.partial, which is renamed when it is complete


def partial_of(folder):
    return folder.with_name(folder.name + ".partial")


def finish(folder, source, tokenizer, vocab_size, characters, wrap=0, pad=None, given=False):
    """Hash the .bin files of the partial folder, write meta.json, rename the folder; returns meta.

    characters: {split: characters of text that the split's ids stand for, without given ones}."""
    partial, dtype = partial_of(folder), np.dtype(np.uint32) if given else dtype_of(vocab_size)
    block_size = 2**24 // (4 * wrap) * 4 * wrap if given else 2**24
    splits = {}
    for split in characters:
        sha256, tokens, padding, marked = hashlib.sha256(), 0, 0, 0
        size = (partial / f"{split}.bin").stat().st_size
        bar = progress(total=size, unit="B", unit_scale=True, desc=f"checking {split}")
        with open(partial / f"{split}.bin", "rb") as f, bar:
            while block := f.read(block_size):
                sha256.update(block)
                bar.update(len(block))
                ids = np.frombuffer(block, dtype)
                tokens += len(ids)
                padding += int((ids == pad).sum()) if pad is not None else 0
                if given:  # every row has an unmarked token
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
        name=folder.name, source=source, tokenizer=tokenizer, vocab_size=vocab_size,
        dtype=dtype.name, wrap=wrap, pad=pad, given=given, ends=given or pad is not None,
        splits=splits,
    )  # fmt: skip
    file = meta | dict(version=VERSION, checksum=checksum(meta))
    (partial / "meta.json").write_text(json.dumps(file, indent=1), encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    return meta


# --------------------------------------------------------------------------------------------------
# Reading


META = dict(  # fields of meta.json with their types
    name=str, source=str, tokenizer=dict, vocab_size=int, dtype=str, wrap=int, pad=int | None,
    given=bool, ends=bool, splits=dict,
)  # fmt: skip
SIZES = dict(tokens=int, characters=int, sha256=str)  # of a split, at least


def checksum(meta):
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def preparing(name):
    """The command that prepares the corpus of this name."""
    command = command_for(folder_of(name).name) or "text --input FILE..."
    if "/" in str(name) or command.startswith("text "):
        command += f" --out {shlex.quote(str(name))}"
    return f"python data/prepare.py {command}"


def read_meta(name):
    """meta.json of a prepared corpus, as a dict; fails in one line if it is missing, damaged or of
    a later version."""
    path, command = folder_of(name) / "meta.json", preparing(name)
    if not path.exists():
        fail(f"{path}: no such file; prepare the data first: {command}")
    again = f"; prepare the data again: {command} --overwrite"
    meta = read_json(path, {}, again)
    version = meta.pop("version", 1)
    if version not in (1, VERSION):
        fail(f"{path}: of version {version}, but this program reads versions 1 to {VERSION}{again}")
    if version > 1 and meta.pop("checksum", None) != checksum(meta):
        fail(f"{path}: damaged: wrong checksum{again}")
    meta = (
        dict(pad=None, given=False, name=path.parent.name, source="") | meta
    )  # version 1 may lack
    meta.setdefault("ends", meta["given"] or meta["pad"] is not None)
    check_fields(meta, META, path, again)
    wrong = [*(meta.keys() - META), *(k for k in ("vocab_size", "wrap") if meta[k] < 0)]
    if wrong or meta["dtype"] not in ("uint16", "uint32"):
        fail(f"{path}: damaged: {(wrong or ['dtype'])[0]}{again}")
    for split, sizes in meta["splits"].items():
        check_fields(sizes, SIZES, f"{path}: {split}", again)
        if sizes["tokens"] < 0 or sizes["characters"] < 0:
            fail(f"{path}: damaged: {split} has fewer than 0 tokens or characters{again}")
    return meta


def read_split(name, split, cfg):
    """(ids, meta): a read-only memory map of a split, checked against meta.json and the config."""
    meta = read_meta(name)
    path = folder_of(name) / f"{split}.bin"
    if split not in meta["splits"]:
        fail(f"{path}: no such split; there are {', '.join(meta['splits'])}")
    if meta["vocab_size"] != cfg.vocab_size:
        fail(
            f"{path}: prepared with vocab_size {meta['vocab_size']}, but the model has "
            f"{cfg.vocab_size}; to train on this data add --vocab_size={meta['vocab_size']}"
        )
    if meta["wrap"] and meta["wrap"] != cfg.seq_len:
        fail(f"{path}: cut into windows of {meta['wrap']} tokens, but seq_len is {cfg.seq_len}")
    if split == "train" and (tokens := meta["splits"][split]["tokens"]) < cfg.seq_len:
        fail(f"{path}: {tokens} tokens, fewer than one row of seq_len {cfg.seq_len}")
    check_file(path, meta, split, HASHED)
    return np.memmap(path, meta["dtype"], "r"), meta


def check_file(path, meta, split, most=math.inf):
    """Compare a .bin file's size and, up to `most` bytes, its sha256 with meta.json."""
    sizes, again = meta["splits"][split], "; prepare the data again"
    size = path.stat().st_size if path.exists() else 0
    expected = sizes["tokens"] * np.dtype(meta["dtype"]).itemsize
    if size != expected:
        fail(f"{path}: {size} bytes, but meta.json says {expected}{again}")
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # one process of each machine is enough
    if first and size <= most and hash_file(path, path.stat().st_mtime_ns) != sizes["sha256"]:
        fail(f"{path}: damaged: its sha256 is not that of meta.json{again}")


@functools.cache
def hash_file(path, changed):
    """The file's sha256, computed once per process until the file has `changed`."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def verify(name):
    """Check every file of a prepared corpus in full, however large."""
    for split, sizes in (meta := read_meta(name))["splits"].items():
        check_file(folder_of(name) / f"{split}.bin", meta, split)
        print(f"{split:5} {sizes['tokens']:14,} tokens, size and sha256 as in meta.json")


def count_tokens(ids, meta, cfg):
    """The number of counted tokens of a whole split in windows of seq_len."""
    L = cfg.seq_len
    if meta.get("pad") is None and not meta.get("given"):
        return len(ids) - cfg.bos * -(-len(ids) // L)  # a given first token per window
    parts = (ids[i : i + 4096 * L].astype(np.int64) for i in range(0, len(ids), 4096 * L))
    return sum(int(unpack(part.reshape(-1, L), meta, cfg)[2].sum()) for part in parts)


def take(ids, starts, length, cfg, where):
    """Rows ids[start : start + length] as (N, length) int64, still with the bit GIVEN, for
    `unpack`; fails on an id beyond the vocabulary."""
    rows = np.stack([ids[s : s + length] for s in starts]).astype(np.int64)
    if (largest := (rows & (GIVEN - 1)).max()) >= cfg.vocab_size:
        fail(f"{where}: holds token id {largest}, but vocab_size is {cfg.vocab_size}")
    return rows


def training_rows(ids, meta, cfg, index):
    """Rows number `index` (N,) of an endless stream of training rows -> (N, L), as `take` returns
    them; a pure function of cfg.seed.

    Every epoch cuts the corpus into windows at a new random offset (none if the corpus is wrapped)
    and visits each window once, in random order."""
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
        rng = philox(seed, epoch, stream=0)
        _order[key] = rng.integers(offsets), rng.permutation(np.arange(windows, dtype=np.uint32))
    offset, order = _order[key]
    return order, int(offset)


def unpack(rows, meta, cfg):
    """Rows (N, L) as stored -> x0 (N, L) int64, maskable and counted (N, L) bool.

    Given tokens (prompts, a given BOS) are neither maskable nor counted. Padding is maskable, since
    visible padding would tell the network how long the text is, but it is not counted."""
    rows = torch.as_tensor(rows)
    x0, marked = rows & (GIVEN - 1), rows >= GIVEN
    text_follows = (~marked).flip(-1).cumsum(-1).flip(-1) > 0
    padding = marked & ~text_follows
    maskable = ~marked | padding
    if meta.get("pad") is not None:
        padding |= x0 == meta["pad"]
    if cfg.bos:
        maskable[:, 0] = False
    return x0, maskable, maskable & ~padding


def read_val_sets(cfg, meta):
    """{name: (ids, meta, corpus, split)}: `val`, and with val_data also that corpus's val or test
    split."""
    sets = {"val": (read_split(cfg.data, "val", cfg)[0], meta, cfg.data, "val")}
    if cfg.val_data:
        other = read_meta(cfg.val_data)
        if other["tokenizer"] != meta["tokenizer"]:
            fail(f"val_data={cfg.val_data}: made with another tokenizer than {cfg.data}")
        split = "val" if "val" in other["splits"] else "test"
        sets["val_data"] = (*read_split(cfg.val_data, split, cfg), cfg.val_data, split)
    return sets
