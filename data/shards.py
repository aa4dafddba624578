"""Documents in files -> token ids in splits.

A shard is one file: a path, or hub:<repo>:<commit>:<file>:<sha256> for a file on the Hugging Face
hub. A process per shard tokenises it into the .partial folder; complete shards survive a killed
run. Then each split, a range of all documents, is written in one pass, in a few MB of memory.
"""

import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import threading
from collections import Counter
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import fail, one_line, progress
from data.corpus import dtype_of, finish, partial_of
from data.detokenize import DETOKENIZERS
from data.json_files import read_json
from data.readers import read_documents, report
from data.tokenizer import load_tokenizer, tokenizer_of


class Recipe(NamedTuple):
    """Every document is read, detokenised, encoded, cut to `limit` ids, and put between ids."""

    tokenizer: dict  # spec
    column: str = "text"  # of files that have columns
    lines: str = "none"  # key of LINES: how plain lines are read
    detokenizer: str = "none"  # key of DETOKENIZERS
    before: tuple = ()
    after: tuple = ()
    limit: int = 0  # 0: none
    skip: tuple = ()  # (column, field, value) of documents to leave out, if they have the column
    tokens: int = 0  # stop reading after this many ids; 0: read all


class Documents(NamedTuple):
    """All documents of a data set in order, tokenised."""

    files: list  # of ids, one after the other
    dtype: np.dtype
    tokens: np.ndarray  # (N,) ids of each document, with those around it
    characters: np.ndarray  # (N,) characters of text that they stand for
    counts: list  # documents of each shard
    sha256: list  # of each shard
    names: list  # of the shards


# --------------------------------------------------------------------------------------------------
# Finding shards


def find_shards(input, repo, pattern, revision=None, under=None):
    """(source, shards in order): the user's files, or else the hub's whose names match.

    under: list only this folder of the repo; a list of all its files could be too long."""
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
    """A shard's name in messages: a path, or <repo>@<commit>/<file>."""
    if not shard.startswith("hub:"):
        return shard
    _, repo, commit, name, _ = shard.split(":")
    return f"{repo}@{commit}/{name}"


SPLITS = {  # words of file names
    "test": ("test", "heldout"), "val": ("val", "valid", "validation", "dev"),
    "train": ("train", "training"),
}  # fmt: skip


def split_of(shard):
    """The split that the name of a file says, or else that of its folder, by default train: test
    for test-00000-of-00001.parquet, val for validation/chunk1/a_holdout_0.jsonl.zst. A file with
    test anywhere in its name, such as gtest.jsonl, is never train unless its name says so too."""
    *folders, file = Path(name_of(shard)).parts[-3:]
    file = file.lower()
    folders = [folder.removeprefix("partial-") for folder in folders[::-1]]
    for words in (re.split("[^a-z]+", file), ["test" if "test" in file else ""], *zip(folders)):
        for split, names in SPLITS.items():
            if any(word in names for word in words):
                return split
    return "train"


def refuse_held_out(shards, data):
    """Fail if the name of a file says that it is no training text; `data` would train on it."""
    for shard in shards:
        if (split := split_of(shard)) != "train":
            fail(f"{name_of(shard)}: {split} by its name, but {data} trains on every file")


def announce(names, splits, counts, most=20):
    """Print what became of each file, or of more than `most` files, of how many what."""
    rows = [(name, split, count) for name, split, count in zip(names, splits, counts)]
    if len(rows) > most:
        rows = [
            (f"{splits.count(s)} files", s, sum(n for _, split, n in rows if split == s))
            for s in dict.fromkeys(splits)
        ]
    for name, split, count in rows:
        print(f"{name}: {split}, {count:,} documents")


def fingerprint(shard):
    """Identifies a shard's content: a local file may change, a commit of the hub cannot."""
    if shard.startswith("hub:"):
        return [shard]
    stat = os.stat(shard)
    return [shard, stat.st_size, stat.st_mtime_ns]


def fetch(shard):
    """(path, sha256) of a shard. A hub file comes from the hub's cache; its sha256 is checked."""
    path, expected = shard, ""
    if shard.startswith("hub:"):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # the bar of documents is enough
        _, repo, commit, name, expected = shard.split(":")
        path = hf_hub_download(repo, name, repo_type="dataset", revision=commit)
    with open(path, "rb") as f:
        sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    if expected not in ("", sha256):
        raise ValueError(f"sha256 is {sha256}, must be {expected}; remove {path} and try again")
    return path, sha256


# --------------------------------------------------------------------------------------------------
# Shards -> ids


def tokenize(folder, shards, recipe, workers=None, **plan):
    """Documents of all shards, in shards/ of the .partial folder; resumes a killed run.

    plan: further options that must not change between the runs."""
    tokenizer = tokenizer_of(recipe.tokenizer)  # here first, so that one process downloads it
    workers = os.cpu_count() if workers is None else workers
    work = partial_of(folder) / "shards"
    work.mkdir(exist_ok=True)
    begin_or_resume(work, dict(shards=shards, recipe=recipe._asdict(), **plan))
    targets, sizes, have = [], [], 0
    while len(targets) < len(shards) and have < (recipe.tokens or math.inf):
        n, more = len(targets), len(shards)
        if recipe.tokens:  # the first shard, then as many as suffice if they are as long
            more = math.ceil((recipe.tokens - have) * n / have) if have else 1
        new = [work / f"{i:05}" for i in range(n, min(n + more, len(shards)))]
        run_workers(shards[n : n + more], new, recipe, workers)
        targets += new
        for target in new:
            sizes.append(np.fromfile(target.with_suffix(".sizes"), np.uint32).reshape(-1, 2))
            have += int(sizes[-1][:, 0].sum(dtype=np.int64))
    records = [read_shard_record(target) for target in targets]
    for shard, record in zip(shards, records):
        report(name_of(shard), record.get("notes", {}), recipe.column)
    return Documents(
        files=[target.with_suffix(".bin") for target in targets],
        dtype=dtype_of(tokenizer.vocab_size),
        tokens=np.concatenate([s[:, 0] for s in sizes]),
        characters=np.concatenate([s[:, 1] for s in sizes]),
        counts=[len(s) for s in sizes],
        sha256=[record["sha256"] for record in records],
        names=[name_of(shard) for shard in shards[: len(sizes)]],
    )


def begin_or_resume(work, plan):
    """Write the plan of a new run, or check that the run in `work` had the same one."""
    path, plan = work / "plan.json", json.loads(json.dumps(plan))  # turns tuples into lists
    if path.exists() and read_json(path, {}, f"; remove {work.parent}") != plan:
        fail(f"{work.parent}: from a run with other inputs or options; repeat those, or remove it")
    for temporary in work.glob("*.tmp"):
        temporary.unlink()
    (work / "plan.json.tmp").write_text(json.dumps(plan), encoding="utf-8")
    os.replace(work / "plan.json.tmp", path)


def run_workers(shards, targets, recipe, workers):
    """Tokenise each shard into its target, with a bar of documents."""
    done = multiprocessing.Value("q")  # documents, of all workers
    processes, threads = min(workers, len(shards)), max(1, workers // len(shards))
    with (
        ProcessPoolExecutor(processes, initializer=begin_worker, initargs=[done]) as pool,
        progress(unit=" documents", unit_scale=True) as bar,
    ):
        jobs = zip(shards, targets)
        waiting = {pool.submit(tokenize_shard, *job, recipe, threads) for job in jobs}
        try:
            while waiting:
                ended, waiting = wait(waiting, timeout=0.5, return_when=FIRST_EXCEPTION)
                bar.update(done.value - bar.n)
                for job in ended:
                    job.result()
        except (ValueError, BrokenProcessPool) as e:
            pool.shutdown(cancel_futures=True)  # the running shards are completed and kept
            fail(e)


def begin_worker(done):
    global documents_done
    documents_done = done
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker without a traceback
    # Without this, the workers of a killed run would wait for work for ever.
    watch = lambda: (multiprocessing.parent_process().join(), os._exit(1))
    threading.Thread(target=watch, daemon=True).start()


def tokenize_shard(shard, target, recipe, threads):
    """One shard -> target.bin, all its ids, .sizes, [tokens, characters] of each document, and
    .json, which is written last and names the source: a shard that has it is complete."""
    try:
        source = fingerprint(shard)
        if is_complete(target, source):
            return
        path, sha256 = fetch(shard)
        temporary, notes = f"{target}.{os.getpid()}.tmp", Counter()
        with open(temporary, "wb") as ids_file, open(f"{temporary}.sizes.tmp", "wb") as sizes_file:
            write_ids(path, recipe, threads, ids_file, sizes_file, notes)
            sizes = [ids_file.tell(), sizes_file.tell()]
        os.replace(temporary, target.with_suffix(".bin"))
        os.replace(f"{temporary}.sizes.tmp", target.with_suffix(".sizes"))
        record = dict(input=source, sha256=sha256, bytes=sizes, notes=notes)
        Path(temporary).write_text(json.dumps(record), encoding="utf-8")
        os.replace(temporary, target.with_suffix(".json"))
    except Exception as e:  # as text: not every library's exceptions can be sent to the parent
        raise ValueError(f"{name_of(shard)}: {one_line(e)}") from None


def read_shard_record(target):
    fields, path = dict(input=list, sha256=str, bytes=list, notes=dict), target.with_suffix(".json")
    return read_json(path, fields, f"; remove {path}")


def is_complete(target, source):
    """Whether an earlier run completed this shard, from the same source."""
    record_file, *files = (target.with_suffix(suffix) for suffix in (".json", ".bin", ".sizes"))
    if not all(path.exists() for path in (record_file, *files)):
        return False
    record = read_shard_record(target)
    sizes = [path.stat().st_size for path in files]
    return record["input"] == source and record["bytes"] == sizes


def write_ids(path, recipe, threads, ids_file, sizes_file, notes):
    """Write the ids of all documents and [tokens, characters] of each."""
    tokenizer, detokenize = load_tokenizer(recipe.tokenizer), DETOKENIZERS[recipe.detokenizer]
    dtype = dtype_of(tokenizer.vocab_size)
    for texts in read_documents(path, recipe.column, recipe.lines, recipe.skip, notes):
        texts = [detokenize(text) for text in texts]
        sizes, out = [], []
        for text, ids in zip(texts, tokenizer.encode_batch(texts, threads)):
            characters = len(text)
            if recipe.limit and len(ids) > recipe.limit:
                characters = characters * recipe.limit // len(ids)  # an estimate of what remains
                ids = ids[: recipe.limit]
            out += [*recipe.before, *ids, *recipe.after]
            sizes.append([len(recipe.before) + len(ids) + len(recipe.after), characters])
        np.array(out, dtype).tofile(ids_file)
        np.array(sizes, np.uint32).tofile(sizes_file)
        with documents_done.get_lock():
            documents_done.value += len(texts)
        if recipe.tokens and ids_file.tell() >= recipe.tokens * dtype.itemsize:
            return


# --------------------------------------------------------------------------------------------------
# Ids -> splits


def write_splits(folder, source, documents, borders, spec, wrap=0, pad=None, tokens=None):
    """Write the splits, {split: (first document, last + 1)} = borders, and finish; returns meta.

    wrap: cut the stream of documents into rows [BOS] wrap-2 ids [EOS]; with pad: a row per
    document, filled up. tokens: write only the first ids of each split."""
    tokenizer, characters = tokenizer_of(spec), {}
    ends = np.cumsum(documents.counts).tolist()
    spans = list(zip([0, *ends], ends))
    announce(documents.names, [name_splits(*span, borders) for span in spans], documents.counts)
    for split, (first, last) in borders.items():
        path, part = partial_of(folder) / f"{split}.bin", slice(first, last)
        characters[split] = int(documents.characters[part].sum(dtype=np.int64))
        if pad is not None:
            write_padded(path, documents, first, last, wrap, pad)
        else:
            start = documents.tokens[:first].sum(dtype=np.int64)
            stop = start + documents.tokens[part].sum(dtype=np.int64)
            end = stop if tokens is None else min(start + tokens, stop)
            dropped = write_stream(path, read_ids(documents, start, end), wrap, tokenizer)
            dropped = np.concatenate([dropped, *read_ids(documents, end, stop)])
            text = dropped[~np.isin(dropped, (tokenizer.bos, tokenizer.eos))]
            characters[split] -= len(tokenizer.decode(text))
        if not path.stat().st_size:
            row = f"one row of --wrap={wrap}" if wrap else "one token"
            fail(f"{source}: too little text in {split} for {row}")
    return finish(folder, source, spec, tokenizer.vocab_size, characters, wrap, pad)


def name_splits(first, last, borders):
    """The splits that have some of the documents [first, last), as text."""
    names = [split for split, (a, b) in borders.items() if max(a, first) < min(b, last)]
    return " and ".join(names) or "left out"


def read_ids(documents, start, stop):
    """Ids [start, stop) of all files one after the other, as arrays of at most 32 MB."""
    at, dtype = 0, documents.dtype
    for path in documents.files:
        n = path.stat().st_size // dtype.itemsize
        if max(start, at) < min(stop, at + n):  # an empty file cannot be mapped
            ids = np.memmap(path, dtype, "r")[max(start - at, 0) : stop - at]
            pieces = progress(range(0, len(ids), 2**24), desc=f"writing {path.name}")
            yield from (ids[i : i + 2**24] for i in pieces)
        at += n


def write_stream(path, arrays, wrap, tokenizer):
    """Write the arrays one after the other, wrapped or not; returns the ids that fill no row."""
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
            ids = np.concatenate([*read_ids(documents, start, stop)])
            padded[np.arange(wrap) < lengths[:, None]] = ids
            padded.tofile(f)
            start = stop
