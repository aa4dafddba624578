"""Documents in files -> token ids in splits.

A shard is one file: a path, or hub:<repo>:<commit>:<file>:<sha256> for a file on the Hugging Face hub. Every
shard is tokenised by a process of its own into the .partial folder, where finished ones survive a run that is
killed. Then each split, a range of all documents, is written in one pass, a few MB at a time in memory.
"""

import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import threading
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common import fail
from data.corpus import dtype_of, partial_of
from data.detokenize import DETOKENIZERS
from data.tokenizer import load_tokenizer, tokenizer_of


class Recipe(NamedTuple):
    """What happens to every document: read, detokenise, encode, cut to `limit` ids, put ids around it."""

    tokenizer: dict  # spec
    column: str = "text"  # of parquet and jsonl files
    lines: str = "none"  # key of LINES: how files of neither kind are read
    detokenizer: str = "none"  # key of DETOKENIZERS
    before: tuple = ()
    after: tuple = ()
    limit: int = 0  # 0: none
    skip: tuple = ()  # (column, field, value) of documents to leave out, in files that have the column
    tokens: int = 0  # so many ids, from the start, are enough: what comes after is not read; 0: all


class Documents(NamedTuple):
    """All documents of a data set in order, tokenised."""

    files: list  # of ids, one after the other
    dtype: np.dtype
    tokens: np.ndarray  # (N,) ids of each document, those around it included
    characters: np.ndarray  # (N,) characters of text that they stand for
    counts: list  # documents of each shard
    sha256: list  # of each shard


def one_line(e):
    if isinstance(e, OSError) and e.filename and e.strerror:
        return f"{e.filename}: {e.strerror}"
    return " ".join(str(e).split()) or type(e).__name__


# ---------------------------------------------------------------------------------------------------------
# Where shards are


def find_shards(input, repo, pattern, revision=None, under=None):
    """(source, shards in order): the user's files or, if there are none, the hub's whose names match.

    under: the folder that they are in, where a list of all files of the repo would be too long."""
    if input:
        for path in input:
            if not Path(path).is_file():
                fail(f"{path}: no such file")
        return ", ".join(Path(p).name for p in input), [os.path.abspath(p) for p in input]
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(repo, revision=revision, files_metadata=not under)
        files = info.siblings
        if under:
            files = [*HfApi().list_repo_tree(repo, under, revision=info.sha, repo_type="dataset")]
    except Exception as e:  # the hub's and httpx' errors have no common base
        fail(f"{repo}: cannot list its files on the hub ({one_line(e)}); or give --input FILE...")
    sha256 = {f.rfilename: f.lfs.sha256 if f.lfs else "" for f in files}
    names = sorted(name for name in sha256 if re.fullmatch(pattern, name))
    if not names:
        fail(f"{repo}: the hub has no {pattern} at revision {info.sha}; or give --input FILE...")
    return f"{repo}@{info.sha}", [f"hub:{repo}:{info.sha}:{name}:{sha256[name]}" for name in names]


def name_of(shard):
    """What a message calls it: a path, or <repo>@<commit>/<file>."""
    if not shard.startswith("hub:"):
        return shard
    _, repo, commit, name, _ = shard.split(":")
    return f"{repo}@{commit}/{name}"


def identity(shard):
    """What a finished shard is recognised by: a file may have changed, a commit of the hub cannot."""
    about = None if shard.startswith("hub:") else os.stat(shard)
    return [shard, about.st_size, about.st_mtime_ns] if about else [shard]


def fetch(shard):
    """(path, sha256) of a shard; a file of the hub's comes from its own cache, and must be what the hub lists."""
    path, expected = shard, ""
    if shard.startswith("hub:"):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # one bar, of documents, is enough
        _, repo, commit, name, expected = shard.split(":")
        path = hf_hub_download(repo, name, repo_type="dataset", revision=commit)
    with open(path, "rb") as f:
        sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    if expected not in ("", sha256):
        raise ValueError(f"sha256 is {sha256}, must be {expected}; remove {path} and try again")
    return path, sha256


# ---------------------------------------------------------------------------------------------------------
# What is in them


def article(line):
    """A line of the original arXiv and PubMed files: JSON with a list of paragraphs."""
    return "\n".join(json.loads(line)["article_text"])


LINES = {
    "sentence": str.strip,
    "wikitext": lambda line: (
        line if line.strip() else ""
    ),  # every line is a document, its newline included
    "article": article,
}


def read_documents(path, column, lines, skip=(), size=1000):
    """Batches of texts from a parquet or .jsonl file with this column, or else from `lines` of text."""
    plain = re.sub(r"\.(zst|gz)$", "", str(path))
    with open(path, "rb") as f:
        is_parquet = f.read(4) == b"PAR1" or Path(path).suffix == ".parquet"
    if is_parquet:
        yield from read_parquet(path, column, skip, size)
        return
    text_of = LINES.get(lines)
    if plain.endswith(".jsonl"):
        text_of = lambda line: text_in(json.loads(line), column, skip)
    if text_of is None:
        raise ValueError(f"neither a parquet nor a .jsonl file with a column {column!r}")
    texts = []
    with open(path, "rb") if plain == str(path) else decompressed(path) as f:
        for number, line in enumerate(f, 1):
            try:
                texts.append(text_of(line.decode()))
            except UnicodeDecodeError:
                raise ValueError(f"line {number}: not UTF-8") from None
            except json.JSONDecodeError:
                raise ValueError(f"line {number}: not JSON") from None
            except (KeyError, TypeError) as e:
                wanted = column if isinstance(e, TypeError) else e.args[0]
                raise ValueError(f"line {number}: must have a field {wanted!r}") from None
            if texts[-1] is SKIPPED:
                texts.pop()
            elif not isinstance(texts[-1], str):
                raise ValueError(f"line {number}: its field {column!r} is not text")
            if len(texts) == size:
                yield texts
                texts = []
    yield texts


SKIPPED = object()


def text_in(record, column, skip):
    """The text of a row of a file, or SKIPPED."""
    text, about = record[column], record.get(skip[0]) if skip else None
    return SKIPPED if isinstance(about, dict) and about.get(skip[1]) == skip[2] else text


def decompressed(path):
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path)), 2**20)


def read_parquet(path, column, skip, size):
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as parquet:
        names = parquet.schema_arrow.names
        if column not in names:
            raise ValueError(f"has no column {column!r}, only {', '.join(names)}")
        columns = [name for name in (column, *skip[:1]) if name in names]
        for batch in parquet.iter_batches(size, columns=columns):
            texts = [text_in(record, column, skip) for record in batch.to_pylist()]
            texts = [text for text in texts if text is not SKIPPED]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"its column {column!r} has rows that are not text")
            yield texts


# ---------------------------------------------------------------------------------------------------------
# Shards -> ids


def tokenize(folder, shards, recipe, workers=None, **plan):
    """Documents of all shards, in shards/ of the .partial folder; a run that was killed is gone on with.

    plan: the options that a repeated run must have, too."""
    tokenizer = tokenizer_of(
        recipe.tokenizer
    )  # now: a vocabulary should be fetched once, not by every worker
    workers = os.cpu_count() if workers is None else workers
    work = partial_of(folder) / "shards"
    work.mkdir(exist_ok=True)
    begin_or_resume(work, dict(shards=shards, recipe=recipe._asdict(), **plan))
    targets, sizes, have = [], [], 0
    while len(targets) < len(shards) and have < (recipe.tokens or math.inf):
        n, more = len(targets), len(shards)
        if recipe.tokens:  # the first, then as many as will do if they are as long
            more = math.ceil((recipe.tokens - have) * n / have) if have else 1
        new = [work / f"{i:05}" for i in range(n, min(n + more, len(shards)))]
        run_workers(shards[n : n + more], new, recipe, workers)
        targets += new
        sizes += [
            np.fromfile(target.with_suffix(".sizes"), np.uint32).reshape(-1, 2) for target in new
        ]
        have = sum(int(s[:, 0].sum(dtype=np.int64)) for s in sizes)
    about = [json.loads(target.with_suffix(".json").read_text()) for target in targets]
    return Documents(
        files=[target.with_suffix(".bin") for target in targets],
        dtype=dtype_of(tokenizer.vocab_size),
        tokens=np.concatenate([s[:, 0] for s in sizes]),
        characters=np.concatenate([s[:, 1] for s in sizes]),
        counts=[len(s) for s in sizes],
        sha256=[a["sha256"] for a in about],
    )


def begin_or_resume(work, plan):
    """Write the plan of a new run, or check that the run in `work` had the same one."""
    path, plan = work / "plan.json", json.loads(json.dumps(plan))  # tuples are lists from now on
    if path.exists() and json.loads(path.read_text()) != plan:
        fail(
            f"{work.parent}: left by a run with other inputs or options; repeat those, or remove it"
        )
    for left in work.glob("*.tmp"):
        left.unlink()
    (work / "plan.json.tmp").write_text(json.dumps(plan))
    os.replace(work / "plan.json.tmp", path)


def run_workers(shards, targets, recipe, workers):
    done = multiprocessing.Value("q")  # documents, of all workers
    threads = max(1, workers // len(shards))  # of each worker
    with (
        ProcessPoolExecutor(
            min(workers, len(shards)), initializer=begin_worker, initargs=[done]
        ) as pool,
        tqdm(unit=" documents", unit_scale=True, disable=None) as bar,
    ):
        waiting = {
            pool.submit(tokenize_shard, *one, recipe, threads) for one in zip(shards, targets)
        }
        try:
            while waiting:
                finished_jobs, waiting = wait(waiting, timeout=0.5, return_when=FIRST_EXCEPTION)
                bar.update(done.value - bar.n)
                for job in finished_jobs:
                    job.result()
        except (ValueError, BrokenProcessPool) as e:
            pool.shutdown(cancel_futures=True)  # what is running now still finishes, and is kept
            fail(e)


def begin_worker(done):
    global progress
    progress = done
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    # Without this, the workers of a killed run would wait for work for ever.
    watch = lambda: (multiprocessing.parent_process().join(), os._exit(1))
    threading.Thread(target=watch, daemon=True).start()


def tokenize_shard(shard, target, recipe, threads):
    """One shard -> target.bin, all its ids, .sizes, [tokens, characters] of each document, and .json.

    target.json is written last and says which file it was made from: a shard that has it is finished."""
    try:
        if finished(target, identity(shard)):
            return
        about = dict(input=identity(shard))
        path, about["sha256"] = fetch(shard)
        tokenizer, detokenize = load_tokenizer(recipe.tokenizer), DETOKENIZERS[recipe.detokenizer]
        dtype, temporary = dtype_of(tokenizer.vocab_size), f"{target}.{os.getpid()}.tmp"
        with open(temporary, "wb") as ids_file, open(f"{temporary}.sizes.tmp", "wb") as sizes_file:
            for texts in read_documents(path, recipe.column, recipe.lines, recipe.skip):
                texts = [detokenize(text) for text in texts]
                sizes, out = [], []
                for text, ids in zip(texts, tokenizer.encode_batch(texts, threads)):
                    characters = len(text)
                    if recipe.limit and len(ids) > recipe.limit:
                        characters = (
                            characters * recipe.limit // len(ids)
                        )  # what is left of it, about
                        ids = ids[: recipe.limit]
                    out += [*recipe.before, *ids, *recipe.after]
                    sizes.append([len(recipe.before) + len(ids) + len(recipe.after), characters])
                np.array(out, dtype).tofile(ids_file)
                np.array(sizes, np.uint32).tofile(sizes_file)
                with progress.get_lock():
                    progress.value += len(texts)
                if recipe.tokens and ids_file.tell() >= recipe.tokens * dtype.itemsize:
                    break
            about["bytes"] = [ids_file.tell(), sizes_file.tell()]
        os.replace(temporary, target.with_suffix(".bin"))
        os.replace(f"{temporary}.sizes.tmp", target.with_suffix(".sizes"))
        Path(temporary).write_text(json.dumps(about))
        os.replace(temporary, target.with_suffix(".json"))
    except (
        Exception
    ) as e:  # as text: not every library's exceptions survive the way to the parent process
        raise ValueError(f"{name_of(shard)}: {one_line(e)}") from None


def finished(target, identity):
    """Has an earlier run left this shard complete, and made from the same file?"""
    about, *files = (target.with_suffix(suffix) for suffix in (".json", ".bin", ".sizes"))
    if not all(path.exists() for path in (about, *files)):
        return False
    done = json.loads(about.read_text())
    return done["input"] == identity and done["bytes"] == [path.stat().st_size for path in files]


# ---------------------------------------------------------------------------------------------------------
# Ids -> splits


def write_splits(folder, source, documents, borders, spec, wrap=0, pad=None, tokens=None):
    """{split: characters} of the splits written, {split: (first document, last + 1)} = borders.

    wrap: cut the stream of documents into rows [BOS] wrap-2 ids [EOS]; with pad: a row per document, filled up.
    tokens: only so many ids of a split's documents, which end in the last of them."""
    tokenizer, characters = tokenizer_of(spec), {}
    for split, (first, last) in borders.items():
        path, part = partial_of(folder) / f"{split}.bin", slice(first, last)
        characters[split] = int(documents.characters[part].sum(dtype=np.int64))
        if pad is not None:
            write_padded(path, documents, first, last, wrap, pad)
        else:
            start = documents.tokens[:first].sum(dtype=np.int64)
            stop = start + documents.tokens[part].sum(dtype=np.int64)
            end = stop if tokens is None else min(start + tokens, stop)
            dropped = write_stream(path, stream(documents, start, end), wrap, tokenizer)
            dropped = np.concatenate([dropped, *stream(documents, end, stop)])
            text = dropped[~np.isin(dropped, (tokenizer.bos, tokenizer.eos))]
            characters[split] -= len(tokenizer.decode(text))
        if not path.stat().st_size:
            row = f"one row of --wrap={wrap}" if wrap else "one token"
            fail(f"{source}: too little text in {split} for {row}")
    return characters


def stream(documents, start, stop):
    """Ids [start, stop) of all files one after the other, as arrays of at most 32 MB."""
    at, dtype = 0, documents.dtype
    for path in documents.files:
        n = path.stat().st_size // dtype.itemsize
        if max(start, at) < min(stop, at + n):  # an empty file cannot be mapped
            ids = np.memmap(path, dtype, "r")[max(start - at, 0) : stop - at]
            yield from (ids[i : i + 2**24] for i in range(0, len(ids), 2**24))
        at += n


def write_stream(path, arrays, wrap, tokenizer):
    """Write the arrays one after the other, wrapped or not; returns the ids that filled no row."""
    rest = np.empty(0, dtype_of(tokenizer.vocab_size))
    with open(path, "wb") as f:
        for ids in arrays:
            if wrap:
                ids = np.concatenate([rest, ids])
                n = len(ids) // (wrap - 2)
                rows = np.empty((n, wrap), ids.dtype)
                rows[:, 0], rows[:, -1] = tokenizer.bos, tokenizer.eos
                rows[:, 1:-1] = ids[: n * (wrap - 2)].reshape(n, wrap - 2)
                ids, rest = rows, ids[n * (wrap - 2) :]
            ids.tofile(f)
    return rest


def write_padded(path, documents, first, last, wrap, pad, rows=2**16):
    """A row of wrap ids for each of the documents [first, last)."""
    start = documents.tokens[:first].sum(dtype=np.int64)
    with open(path, "wb") as f:
        for i in range(first, last, rows):
            lengths = documents.tokens[i : min(i + rows, last)]
            stop = start + lengths.sum(dtype=np.int64)
            padded = np.full((len(lengths), wrap), pad, documents.dtype)
            padded[np.arange(wrap) < lengths[:, None]] = np.concatenate(
                [*stream(documents, start, stop)]
            )
            padded.tofile(f)
            start = stop
