"""Data sets that are one long text, cut by characters: pydocs, text8, and the user's own files."""

import ast
import hashlib
import http.client
import os
import platform
import re
import sysconfig
import urllib.request
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

from common import fail, one_line, progress
from data.corpus import dtype_of, finish, partial_of
from data.readers import COLUMN_FILES, kind_of, open_bytes, read_documents, report
from data.shards import refuse_held_out
from data.tokenizer import KINDS, tokenizer_of, train_bpe

TEXT8_URL = "http://mattmahoney.net/dc/text8.zip"
TEXT8_CHARACTERS = 100_000_000
TEXT_KINDS = [kind for kind in KINDS if kind not in ("wordpiece", "llama")]  # need no --vocab


def cut(sequence):
    """{split: part}: the first 90 %, the next 5 % and the last 5 %, as text8 is always cut."""
    n = len(sequence)
    a, b = n * 90 // 100, n * 95 // 100
    return {"train": sequence[:a], "val": sequence[a:b], "test": sequence[b:]}


def write_texts(folder, source, spec, splits):
    """Encode and write each split's text; returns meta."""
    tokenizer, piece = tokenizer_of(spec), 2**20  # a list of Python ints takes 36 bytes a token
    dtype = dtype_of(tokenizer.vocab_size)
    for split, text in splits.items():
        with open(partial_of(folder) / f"{split}.bin", "wb") as f:
            for i in progress(range(0, len(text), piece), desc=f"encoding {split}", unit="MB"):
                np.array(tokenizer.encode(text[i : i + piece]), dtype).tofile(f)
    characters = {split: len(text) for split, text in splits.items()}
    return finish(folder, source, spec, tokenizer.vocab_size, characters)


# --------------------------------------------------------------------------------------------------
# pydocs: text that every Python has


def pydocs(folder):
    """The language reference that help() shows, and the standard library's longer docstrings."""
    documents = sorted(set(read_topics()) | set(read_docstrings()), key=lambda d: (-len(d), d))
    documents = list(drop_repeats(documents))
    total = sum(map(len, documents))
    if total < 500_000:
        found = f"only {total:,} characters of documentation"
        fail(f"{library_folder()}: {found}; is Python's source code installed?")
    # A random order that depends on the text alone, then whole documents to the splits.
    documents.sort(key=lambda d: hashlib.sha256(d.encode()).digest())
    ends = np.cumsum([len(d) for d in documents]) / total
    a, b = np.searchsorted(ends, [0.90, 0.95])
    splits = {"train": documents[:a], "val": documents[a:b], "test": documents[b:]}
    spec = train_bpe(splits["train"], 2048)
    version = f"standard library of Python {platform.python_version()}"
    texts = {split: "".join(d + "\n\n\n" for d in docs) for split, docs in splits.items()}
    return write_texts(folder, f"pydoc_data.topics and docstrings of the {version}", spec, texts)


def library_folder():
    return Path(sysconfig.get_paths()["stdlib"])


def read_topics():
    """The topics, cut at their underlined titles: many topics are sections of larger ones."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions lack it
        return
    for text in topics.values():
        starts = [m.start() for m in re.finditer(r"^\S.*\n([*=~^\"-])\1{3,}$", text, re.MULTILINE)]
        for a, b in zip([0, *starts], [*starts, len(text)]):
            yield text[a:b].strip()


def read_docstrings():
    """Docstrings of the standard library, read from its source: imports have side effects."""
    skip = "site-packages dist-packages test tests idlelib lib2to3 turtledemo pydoc_data".split()
    paths = []
    for folder, folders, files in os.walk(library_folder()):
        folders[:] = set(folders) - set(skip)  # os.walk skips the folders that are removed here
        paths += [Path(folder) / name for name in files if name.endswith(".py")]
    for path in progress(paths, desc="reading docstrings", unit=" files"):
        try:
            with warnings.catch_warnings(action="ignore"):  # some files have invalid escapes
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield (ast.get_docstring(node) or "").strip()  # through inspect.cleandoc


def drop_repeats(documents, shortest=200, paragraph=80):
    """Drop long paragraphs that an earlier document has, then documents that are too short.

    Topics quote each other and classes copy docstrings: without this, the training text contains
    about a tenth of the validation text."""
    seen = set()
    for document in documents:
        fresh, prose = [], 0
        for text in re.split(r"\n(?:[ \t]*\n)+", document):
            words = " ".join(text.split())
            if len(words) < paragraph or words not in seen:
                fresh.append(text)
                prose += len(words) * (len(words) >= paragraph)
            seen.add(words)
        if prose >= shortest / 2 and len("\n\n".join(fresh)) >= shortest:
            yield "\n\n".join(fresh)


# --------------------------------------------------------------------------------------------------
# text8: the first 100 MB of cleaned Wikipedia, 27 characters


def text8(folder, input=None):
    """Matt Mahoney's text8, 90M/5M/5M characters; space is 0, a..z are 1..26 (nanoDD's ids)."""
    if input and len(input) > 1:
        fail(f"{input[1]}: text8 is made of one file, text8.zip or text8")
    path = Path(input[0]) if input else download(TEXT8_URL, partial_of(folder) / "text8.zip")
    name = input[0] if input else TEXT8_URL
    with open(path, "rb") as f:
        zipped = path.suffix == ".zip" or f.read(2) == b"PK"
    if zipped:
        text = unzip_text8(path, name)
    else:
        check_size(path.stat().st_size, name)
        text = path.read_bytes()
    characters = " abcdefghijklmnopqrstuvwxyz"
    table = np.full(256, 255, np.uint16)
    table[list(characters.encode())] = np.arange(27)
    ids = table[np.frombuffer(text, np.uint8)]
    if ids.max() == 255:
        at = int(ids.argmax())
        fail(f"{name}: byte {text[at]} at offset {at}, but text8 has only a..z and space")
    for split, part in cut(ids).items():
        part.tofile(partial_of(folder) / f"{split}.bin")
    (partial_of(folder) / "text8.zip").unlink(missing_ok=True)
    spec, sizes = {"kind": "char", "characters": characters}, cut(ids)
    sizes = {split: len(part) for split, part in sizes.items()}
    return finish(folder, "text8, " + TEXT8_URL, spec, 27, sizes)


def check_size(size, name):
    """Before anything is read: a zip bomb or another file may be larger than the memory."""
    if size != TEXT8_CHARACTERS:
        fail(f"{name}: {size:,} characters, but text8 has {TEXT8_CHARACTERS:,}")


def unzip_text8(path, name):
    try:
        with zipfile.ZipFile(path) as z:
            check_size(z.getinfo("text8").file_size, name)
            return z.read("text8")
    except KeyError:
        fail(f"{name}: has no member named text8")
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as e:
        fail(f"{name}: not a zip file, or incomplete ({e})")


def download(url, path):
    try:
        with urllib.request.urlopen(url, timeout=60) as response, open(f"{path}.tmp", "wb") as f:
            size = int(response.headers.get("Content-Length", 0))
            with progress(total=size, unit="B", unit_scale=True, desc=path.name) as bar:
                while block := response.read(2**20):
                    f.write(block)
                    bar.update(len(block))
            if size and f.tell() != size:
                raise OSError(f"the download stopped after {f.tell():,} of {size:,} bytes")
    except (OSError, http.client.HTTPException) as e:
        fail(f"{url}: {one_line(e)}; try again, or give --input FILE")
    os.replace(f"{path}.tmp", path)
    return path


# --------------------------------------------------------------------------------------------------
# text: your own files


def text(folder, input=(), tokenizer="bpe", vocab_size=None, column=None):
    """Any UTF-8 files, one after the other, cut by characters. Of .jsonl, .json, .csv and parquet
    files (.jsonl.gz, too) a column is read; a blank line ends each of its texts."""
    if not input:
        fail("text: needs --input FILE...")
    if tokenizer not in TEXT_KINDS:
        fail(f"--tokenizer={tokenizer}: must be one of {', '.join(TEXT_KINDS)}")
    if vocab_size is not None and (tokenizer != "bpe" or not 256 < vocab_size <= 2**16):
        fail(f"--vocab_size={vocab_size}: only for --tokenizer=bpe, 257 to {2**16}")
    if column and all(kind_of(path) == "plain" for path in input):
        fail(f"--column={column}: needs a {COLUMN_FILES}")
    if len(input) > 1:  # of one file the user surely means to cut all splits
        refuse_held_out(input, "text")
    parts = []
    for path in input:
        if parts and not parts[-1].endswith("\n"):
            parts.append("\n")
        parts.append(read_file(path, column or "text"))
        print(f"{path}: {len(parts[-1]):,} characters, for train, val and test")
    whole = "".join(parts)
    if len(whole) < 20:
        fail(f"{input[0]}: {len(whole)} characters are too few to cut into train, val and test")
    splits = cut(whole)
    spec = {"kind": tokenizer}
    if tokenizer == "char":
        spec["characters"] = "".join(sorted(set(whole)))
    if tokenizer == "bpe":
        spec = train_bpe(splits["train"].splitlines(keepends=True), vocab_size or 2048)
    return write_texts(folder, ", ".join(Path(p).name for p in input), spec, splits)


def read_file(path, column):
    """The text of a file, or of a column of it; fails if there is none."""
    notes = Counter()
    try:
        if kind_of(path) == "plain":
            with open_bytes(path) as f:
                text = f.read().decode().removeprefix("\ufeff")
        else:
            batches = read_documents(path, column, notes=notes)
            batches = progress(batches, desc=f"reading {path}", unit=" thousand documents")
            documents = (d for batch in batches for d in batch)
            text = "".join(d.rstrip("\n") + "\n\n" for d in documents if d.strip())
    except UnicodeDecodeError as e:
        fail(f"{path}: not UTF-8: byte {e.object[e.start]:#04x} at offset {e.start}")
    except Exception as e:  # pyarrow's errors have no common base
        message = one_line(e)
        fail(message if message.startswith(f"{path}: ") else f"{path}: {message}")
    report(path, notes, column)
    return text or fail(f"{path}: empty")
