"""Prepare a data set: text in, data/<name>/{train,val[,test]}.bin and meta.json out (see corpus.py).

python data/prepare.py pydocs                         # Python's own documentation; nothing is downloaded
python data/prepare.py text8                          # or --input text8.zip
python data/prepare.py openwebtext --wrap 1024        # parquet from the hub, or --input FILE...
python data/prepare.py text --input a.txt b.txt       # any UTF-8 text; --tokenizer bpe, char or gpt2

A data set is one function; its keyword arguments are the options that apply to it.
"""

import ast
import hashlib
import http.client
import inspect
import json
import multiprocessing
import os
import platform
import re
import shutil
import sys
import sysconfig
import threading
import urllib.request
import warnings
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, only data/ is on the path

from configs import CONFIGS, fail, parser  # noqa: E402
from data.corpus import dtype_of, finish, folder_of, partial_of  # noqa: E402
from data.tokenizer import KINDS, tokenizer_of, train_bpe  # noqa: E402

TEXT8_URL = "http://mattmahoney.net/dc/text8.zip"
TEXT8_CHARACTERS = 100_000_000
OPENWEBTEXT = "Skylion007/openwebtext"
OPENWEBTEXT_DOCS = 8_013_769
EOT = 50256  # GPT-2's <|endoftext|>


def cut(sequence):
    """{split: part}: the first 90 %, the next 5 % and the last 5 %, as text8 is always cut."""
    n = len(sequence)
    a, b = n * 90 // 100, n * 95 // 100
    return {"train": sequence[:a], "val": sequence[a:b], "test": sequence[b:]}


def write_texts(folder, source, spec, splits):
    """Encode and write each split's text; returns meta."""
    tokenizer = tokenizer_of(spec)
    for split, text in splits.items():
        with open(partial_of(folder) / f"{split}.bin", "wb") as f:
            for i in range(0, len(text), 2**20):  # in pieces: a list of Python ints takes 36 bytes a token
                np.array(tokenizer.encode(text[i : i + 2**20]), dtype_of(tokenizer.vocab_size)).tofile(f)
    return finish(folder, source, spec, tokenizer.vocab_size, {s: len(text) for s, text in splits.items()})


# ---------------------------------------------------------------------------------------------------------
# pydocs: text that every Python has


def pydocs(folder):
    """The language reference that help() shows, and the standard library's longer docstrings."""
    documents = sorted(set(topic_sections()) | set(docstrings()), key=lambda d: (-len(d), d))
    documents = list(without_repeats(documents))
    total = sum(map(len, documents))
    if total < 500_000:
        fail(f"{stdlib()}: only {total:,} characters of documentation; is Python's source code installed?")
    # A random order that depends on nothing but the text, then whole documents to the splits.
    documents.sort(key=lambda d: hashlib.sha256(d.encode()).digest())
    ends = np.cumsum([len(d) for d in documents]) / total
    a, b = np.searchsorted(ends, [0.90, 0.95])
    splits = {"train": documents[:a], "val": documents[a:b], "test": documents[b:]}
    spec = train_bpe(splits["train"], 2048)
    source = f"pydoc_data.topics and docstrings of the standard library of Python {platform.python_version()}"
    texts = {split: "".join(d + "\n\n\n" for d in docs) for split, docs in splits.items()}
    return write_texts(folder, source, spec, texts)


def stdlib():
    return Path(sysconfig.get_paths()["stdlib"])


def topic_sections():
    """The topics, cut at their underlined titles: many a topic is a section of a larger one."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return
    for text in topics.values():
        starts = [m.start() for m in re.finditer(r"^\S.*\n([*=~^\"-])\1{3,}$", text, re.MULTILINE)]
        for a, b in zip([0, *starts], [*starts, len(text)]):
            yield text[a:b].strip()


def docstrings():
    """Docstrings of the standard library, read from its source: importing modules has side effects."""
    skip = set("site-packages dist-packages test tests idlelib lib2to3 turtledemo pydoc_data".split())
    paths = []
    for folder, folders, files in os.walk(stdlib()):
        folders[:] = set(folders) - skip  # os.walk then goes no further there
        paths += [Path(folder) / name for name in files if name.endswith(".py")]
    for path in paths:
        try:
            with warnings.catch_warnings(action="ignore"):  # invalid escapes, here and there
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield (ast.get_docstring(node) or "").strip()  # through inspect.cleandoc


def without_repeats(documents, shortest=200, paragraph=80):
    """Drop every long paragraph that was seen before, then what is too short to be worth reading.

    Topics quote each other and docstrings are copied from class to class: without this, about a
    tenth of the validation text is in the training text too."""
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


# ---------------------------------------------------------------------------------------------------------
# text8: the first 100 MB of cleaned Wikipedia, 27 characters


def text8(folder, input=None):
    """Matt Mahoney's text8, 90M/5M/5M characters; space is 0, a..z are 1..26 (the ids of nanoDD)."""
    if input and len(input) > 1:
        fail(f"{input[1]}: text8 is made of one file, text8.zip or text8")
    path = Path(input[0]) if input else download(TEXT8_URL, partial_of(folder) / "text8.zip")
    where, text = input[0] if input else TEXT8_URL, path.read_bytes()
    if path.suffix == ".zip" or text.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as z:
                text = z.read("text8")
        except KeyError:
            fail(f"{where}: has no member named text8")
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as e:
            fail(f"{where}: not a zip file, or not all of it ({e})")
    if len(text) != TEXT8_CHARACTERS:
        fail(f"{where}: {len(text):,} characters, but text8 has {TEXT8_CHARACTERS:,}")
    characters = " abcdefghijklmnopqrstuvwxyz"
    table = np.full(256, 255, np.uint16)
    table[list(characters.encode())] = np.arange(27)
    ids = table[np.frombuffer(text, np.uint8)]
    if ids.max() == 255:
        at = int(ids.argmax())
        fail(f"{where}: byte {text[at]} at offset {at}, but text8 has only a..z and space")
    for split, part in cut(ids).items():
        part.tofile(partial_of(folder) / f"{split}.bin")
    (partial_of(folder) / "text8.zip").unlink(missing_ok=True)
    sizes = {split: len(part) for split, part in cut(ids).items()}
    return finish(folder, "text8, " + TEXT8_URL, {"kind": "char", "characters": characters}, 27, sizes)


def download(url, path):
    try:
        with urllib.request.urlopen(url, timeout=60) as response, open(f"{path}.tmp", "wb") as f:
            size = int(response.headers.get("Content-Length", 0))
            with tqdm(total=size, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
                while block := response.read(2**20):
                    f.write(block)
                    bar.update(len(block))
            if size and f.tell() != size:
                raise OSError(f"the download stopped after {f.tell():,} of {size:,} bytes")
    except (OSError, http.client.HTTPException) as e:
        fail(f"{url}: {one_line(e)}; try again, or give --input FILE")
    os.replace(f"{path}.tmp", path)
    return path


# ---------------------------------------------------------------------------------------------------------
# openwebtext: parquet shards -> one file of ids per shard -> train and val


def openwebtext(folder, input=(), wrap=0, val_docs=100_000, workers=None):
    """OpenWebText in GPT-2 BPE, <|endoftext|> after every document; val is the last documents, as in MDLM.

    Each finished shard stays in the .partial folder, so that a run that was killed can be started again.
    wrap: cut the stream into rows [BOS] wrap-2 ids [EOS] (MDLM's packing) instead of leaving it whole."""
    workers = os.cpu_count() if workers is None else workers
    if wrap and wrap < 3:
        fail(f"--wrap={wrap}: must be at least 3: BOS, a token, EOS")
    if val_docs < 1 or workers < 1:
        fail(f"--val_docs={val_docs} --workers={workers}: must be at least 1")
    for path in input:
        if not Path(path).is_file():
            fail(f"{path}: no such file")
    gpt2 = tokenizer_of({"kind": "gpt2"})  # now: its vocabulary should be fetched once, not by every worker
    source, shards = ", ".join(Path(p).name for p in input), [str(Path(p).resolve()) for p in input]
    if not input:
        source, shards = hub_shards()
    work = partial_of(folder) / "shards"
    work.mkdir(exist_ok=True)
    begin_or_resume(work, dict(source=source, shards=shards, wrap=wrap, val_docs=val_docs))
    targets = [work / f"{i:05}" for i in range(len(shards))]
    tokenize_shards(shards, targets, workers)

    documents = (json.loads(target.with_suffix(".json").read_text())["documents"] for target in targets)
    documents = np.concatenate([np.array(d, np.int64).reshape(-1, 2) for d in documents])
    tokens, characters = documents.T
    if not input and len(tokens) != OPENWEBTEXT_DOCS:
        fail(f"{source}: {len(tokens):,} documents, but there should be {OPENWEBTEXT_DOCS:,}")
    if len(tokens) <= val_docs:
        fail(f"openwebtext: {len(tokens):,} documents, too few for --val_docs={val_docs}")
    border, sizes = len(tokens) - val_docs, {}
    for split, part in dict(train=slice(border), val=slice(border, None)).items():
        start = tokens[: part.start].sum() if part.start else 0
        path = partial_of(folder) / f"{split}.bin"
        dropped = write_stream(path, stream(targets, start, start + tokens[part].sum()), wrap)
        if not path.stat().st_size:
            fail(f"openwebtext: too little text in {split} for one row of --wrap={wrap}")
        sizes[split] = int(characters[part].sum()) - len(gpt2.decode(dropped[dropped != EOT]))
    meta = finish(folder, source, {"kind": "gpt2"}, EOT + 1, sizes, wrap)
    shutil.rmtree(folder / "shards")  # only now: everything before this can be resumed
    return meta


def hub_shards():
    """(source, URLs in order) of the data set on the hub, pinned to today's revision."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(OPENWEBTEXT)
    except Exception as e:  # the hub's and httpx' errors have no common base
        fail(f"{OPENWEBTEXT}: cannot list its files on the hub ({one_line(e)}); or give --input FILE...")
    names = sorted(s.rfilename for s in info.siblings if re.fullmatch(r"data/train-.*\.parquet", s.rfilename))
    if not names:
        fail(f"{OPENWEBTEXT}: the hub has no data/train-*.parquet at revision {info.sha}")
    return f"{OPENWEBTEXT}@{info.sha}", [f"hub:{info.sha}:{name}" for name in names]


def begin_or_resume(work, plan):
    """Write the plan of a new run, or check that the run in `work` had the same one."""
    path = work / "plan.json"
    if path.exists() and json.loads(path.read_text()) != plan:
        fail(f"{work.parent}: left by a run with other inputs or options; repeat those, or remove it")
    for left in work.glob("*.tmp"):
        left.unlink()
    (work / "plan.json.tmp").write_text(json.dumps(plan))
    os.replace(work / "plan.json.tmp", path)


def tokenize_shards(shards, targets, workers):
    threads = max(1, workers // len(shards))  # of each worker
    with ProcessPoolExecutor(min(workers, len(shards)), initializer=die_with_parent) as pool:
        jobs = [pool.submit(tokenize_shard, *one, threads) for one in zip(shards, targets)]
        try:
            for job in tqdm(as_completed(jobs), total=len(jobs), unit="shard", disable=None):
                job.result()
        except (ValueError, BrokenProcessPool) as e:
            pool.shutdown(cancel_futures=True)  # what is running now still finishes, and is kept
            fail(e)


def die_with_parent():
    """Without this, the workers of a killed run would wait for work for ever."""
    watch = lambda: (multiprocessing.parent_process().join(), os._exit(1))
    threading.Thread(target=watch, daemon=True).start()


def tokenize_shard(shard, target, threads):
    """One parquet file -> target.bin, all its ids, and target.json: [tokens, characters] of each document.

    target.json is written last and says which file it was made from: a shard that has it is finished."""
    import pyarrow
    import pyarrow.parquet
    import tiktoken

    try:
        path, identity = fetch(shard)
        if finished(target, identity):
            return
        encoding, documents, temporary = tiktoken.get_encoding("gpt2"), [], f"{target}.{os.getpid()}.tmp"
        with open(temporary, "wb") as f, pyarrow.parquet.ParquetFile(path) as parquet:
            if "text" not in parquet.schema_arrow.names:
                raise ValueError(f"has no column 'text', only {', '.join(parquet.schema_arrow.names)}")
            for batch in parquet.iter_batches(1000, columns=["text"]):
                texts = batch.column(0).to_pylist()
                if not all(isinstance(text, str) for text in texts):
                    raise ValueError("its column 'text' has rows that are not text")
                for text, ids in zip(texts, encoding.encode_ordinary_batch(texts, num_threads=threads)):
                    np.array([*ids, EOT], np.uint16).tofile(f)
                    documents.append([len(ids) + 1, len(text)])
        os.replace(temporary, target.with_suffix(".bin"))
        Path(temporary).write_text(json.dumps(dict(input=identity, documents=documents)))
        os.replace(temporary, target.with_suffix(".json"))
    except Exception as e:  # as text: not every library's exceptions survive the way to the parent process
        raise ValueError(f"{shard}: {one_line(e)}") from None


def finished(target, identity):
    """Has an earlier run left this shard complete, and made from the same file?"""
    about, ids = target.with_suffix(".json"), target.with_suffix(".bin")
    if not (about.exists() and ids.exists()):
        return False
    done = json.loads(about.read_text())
    return done["input"] == identity and ids.stat().st_size == 2 * sum(n for n, _ in done["documents"])


def fetch(shard):
    """(path, what it is) of a shard: a file of the user's, or one of the hub's, in the hub's own cache."""
    if not shard.startswith("hub:"):
        about = os.stat(shard)
        return shard, [shard, about.st_size, about.st_mtime_ns]
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # one bar, of shards, is enough
    _, revision, name = shard.split(":", 2)
    return hf_hub_download(OPENWEBTEXT, name, repo_type="dataset", revision=revision), [shard]


def stream(targets, start, stop):
    """Ids [start, stop) of all shards one after the other, as arrays of at most 32 MB."""
    at = 0
    for path in (target.with_suffix(".bin") for target in targets):
        if n := path.stat().st_size // 2:  # an empty file cannot be mapped
            ids = np.memmap(path, np.uint16, "r")[max(start - at, 0) : max(stop - at, 0)]
            yield from (ids[i : i + 2**24] for i in range(0, len(ids), 2**24))
        at += n


def write_stream(path, arrays, wrap):
    """Write the arrays one after the other, wrapped or not; returns the ids that filled no row."""
    rest = np.empty(0, np.uint16)
    with open(path, "wb") as f:
        for ids in arrays:
            if wrap:
                ids = np.concatenate([rest, ids])
                n = len(ids) // (wrap - 2)
                rows = np.full((n, wrap), EOT, np.uint16)  # BOS and EOS are both <|endoftext|>
                rows[:, 1:-1] = ids[: n * (wrap - 2)].reshape(n, wrap - 2)
                ids, rest = rows, ids[n * (wrap - 2) :]
            ids.tofile(f)
    return rest


# ---------------------------------------------------------------------------------------------------------
# text: files of your own


def text(folder, input=(), tokenizer="bpe", vocab_size=None):
    """Any UTF-8 files, one after the other, cut by characters."""
    if not input:
        fail("text: needs --input FILE...")
    if tokenizer not in KINDS:
        fail(f"--tokenizer={tokenizer}: must be one of {', '.join(KINDS)}")
    if vocab_size is not None and (tokenizer != "bpe" or not 256 < vocab_size <= 2**16):
        fail(f"--vocab_size={vocab_size}: only for --tokenizer=bpe, 257 to {2**16}")
    parts = []
    for path in input:
        try:
            part = Path(path).read_bytes().decode().removeprefix("\ufeff")
        except UnicodeDecodeError as e:
            fail(f"{path}: not UTF-8: byte {e.object[e.start]:#04x} at offset {e.start}")
        if not part:
            fail(f"{path}: empty")
        if parts and not parts[-1].endswith("\n"):
            parts.append("\n")
        parts.append(part)
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


# ---------------------------------------------------------------------------------------------------------

DATASETS = {"pydocs": pydocs, "text8": text8, "openwebtext": openwebtext, "text": text}


def prepare(name, out=None, overwrite=False, **options):
    """Make data/<name>, or the folder `out`; returns its meta. Whatever is wrong with the input is one line,
    exit code 2, and the folder as it was."""
    if name not in DATASETS:
        fail(f"unknown data set {name!r}; there are {', '.join(DATASETS)}")
    allowed = [*list(inspect.signature(DATASETS[name]).parameters)[1:], "out", "overwrite"]
    for option in options:
        if option not in allowed:
            fail(f"--{option} does not apply to {name}; its options are --{' --'.join(allowed)}")
    out = out or name + (f"_wrap{options['wrap']}" if options.get("wrap") else "")
    folder = folder_of(out)
    if folder.exists() and not overwrite:
        fail(f"{folder}: exists; --overwrite replaces it")
    if folder.exists() and not (folder / "meta.json").exists():
        fail(f"{folder}: exists and is not a prepared data set; remove it yourself if you mean it")
    partial, resumable = partial_of(folder), name == "openwebtext"
    try:
        if not resumable:
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)
        meta = DATASETS[name](folder, **options)
    except BaseException as e:
        if not resumable or not any(partial.glob("shards/*.bin")):  # nothing to resume
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(e, OSError):
            fail(one_line(e))
        raise
    return meta


def one_line(e):
    if isinstance(e, OSError) and e.filename and e.strerror:
        return f"{e.filename}: {e.strerror}"
    return " ".join(str(e).split()) or type(e).__name__


def announce(name, out, meta):
    """Print what was made and the command that trains on it."""
    for split, of in meta["splits"].items():
        print(f"{split:5} {of['tokens']:14,} tokens {of['characters']:16,} characters")
    owt = "owt_mdlm" if meta["wrap"] else "owt_d3pm"
    config = {"text8": "text8_mdlm", "openwebtext": owt}.get(name, "pydocs_mdlm")
    cfg, command = CONFIGS[config](), f"python train.py {config}"
    for field, value in dict(data=out, vocab_size=meta["vocab_size"], seq_len=meta["wrap"]).items():
        if value and value != getattr(cfg, field):
            command += f" --{field}={value}"
    if name == "text":  # the demo's recipe, but not the demo's run
        command += f" --out_dir=out/{meta['name']}"
    print(f"now train on it: {command}")


def main(argv=None):
    p = parser(__doc__)
    p.add_argument("name", help=", ".join(DATASETS))
    p.add_argument("--input", nargs="+", metavar="FILE", help="read these files instead of downloading")
    p.add_argument("--out", help="folder: a bare name is under data/, anything with a slash is a path")
    p.add_argument("--tokenizer", help=f"text: {', '.join(KINDS)}; default bpe")
    p.add_argument("--vocab_size", type=int, help="text, bpe: number of pieces; default 2048")
    p.add_argument("--wrap", type=int, help="openwebtext: cut into rows of this length; default 0, uncut")
    p.add_argument("--val_docs", type=int, help="openwebtext: size of val in documents; default 100000")
    p.add_argument("--workers", type=int, help="openwebtext: processes; default one per core")
    p.add_argument("--overwrite", action="store_true", help="replace the folder once the new one is complete")
    given = {k: v for k, v in vars(p.parse_args(argv)).items() if v is not None}
    meta = prepare(**given)
    announce(given["name"], given.get("out", meta["name"]), meta)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
