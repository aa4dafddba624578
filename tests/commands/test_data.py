"""Data: every tokenizer returns the text, every data set equals a slow and obvious reference, and
whatever is wrong with the input is one line on stderr, exit code 2 and no folder."""

import ast
import csv
import graphlib
import gzip
import inspect
import io
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SHARED, TRICKY, make, needs_gpt2, rewrite_meta

import data.corpus as corpus_module
import data.prepare as prepare
import data.pretrain as pretrain
import data.texts as texts_module
from common import UserError
from configs import Config
from data.corpus import read_meta, read_split, training_rows
from data.tokenizer import load_tokenizer, train_bpe


def hashes(meta):
    return {split: of["sha256"] for split, of in meta["splits"].items()}


# --------------------------------------------------------------------------------------------------
# Tokenizers

SPECS = [  # text to be covered -> spec
    pytest.param(lambda text: train_bpe(["the cat sat on the mat " * 20], 300), id="bpe"),
    pytest.param(
        lambda text: {"kind": "char", "characters": "".join(sorted(set(text)))}, id="char"
    ),
    pytest.param(lambda text: {"kind": "gpt2"}, id="gpt2", marks=needs_gpt2),
]


@pytest.mark.parametrize("spec_for", SPECS)
def test_decoding_an_encoding_returns_the_text(spec_for):
    rng = random.Random(0)
    texts = TRICKY + [rng.randbytes(rng.randrange(300)).decode("latin-1") for _ in range(20)]
    texts += [
        "".join(chr(rng.choice([65, 233, 0x4E00, 0x1F600]) + rng.randrange(60)) for _ in range(80))
    ]
    spec = json.loads(json.dumps(spec_for("".join(texts))))  # as a checkpoint would return it
    tokenizer = load_tokenizer(spec)
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        pieces = tokenizer.pieces(ids)
        assert len(pieces) == len(ids)
        if text.isascii():
            assert "".join(pieces) == text
    every = tokenizer.pieces(range(tokenizer.vocab_size + 1))
    assert every[-1] == "█" and all(every) and all(isinstance(piece, str) for piece in every)
    with pytest.raises(ValueError, match="^[^\n]+$"):
        tokenizer.encode("\ud800")


@pytest.mark.parametrize("spec_for", SPECS)
def test_text_that_looks_special_is_only_text(spec_for):
    tokenizer = load_tokenizer(spec_for("<|endoftext|>"))
    ids = tokenizer.encode("<|endoftext|>")
    assert len(ids) > 1 and pretrain.EOT not in ids


def test_partial_characters_and_masks_are_shown():
    tokenizer = load_tokenizer(train_bpe([""], 256))
    assert tokenizer.vocab_size == 256
    a, b = tokenizer.encode("é")
    assert tokenizer.pieces([a, 256, b]) == ["\ufffd", "█", "\ufffd"]
    assert tokenizer.decode([a, b, 256]) == "é█"
    assert tokenizer.decode(np.array([a, b])) == "é"


def test_tokenizer_errors_are_one_line_that_names_the_culprit():
    with pytest.raises(ValueError, match=r"^not in the vocabulary: '\\n' 'é'$"):
        load_tokenizer({"kind": "char", "characters": "ab"}).encode("aéb\n")
    for spec in ({"kind": "words"}, {}):
        with pytest.raises(ValueError, match="^unknown kind .*char, bpe, gpt2, wordpiece, llama$"):
            load_tokenizer(spec)


# --------------------------------------------------------------------------------------------------
# Training a BPE


def train_plainly(texts, vocab_size):
    """The spec of a BPE whose words are not cut."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    return {"kind": "bpe", "json": model.to_str()}


@pytest.mark.parametrize(
    "name", ["tinyshakespeare", pytest.param("pydocs", marks=pytest.mark.slow)]
)
def test_ordinary_text_has_the_same_vocabulary_as_without_cut_words(name):
    if name == "tinyshakespeare":
        path = SHARED / "data" / "tinyshakespeare.txt"
        if not path.exists():
            pytest.skip(f"no real data at {path}")
        documents = path.read_text(encoding="utf-8").splitlines(keepends=True)
    else:
        documents = list(texts_module.drop_repeats(sorted(set(texts_module.read_docstrings()))))
    assert train_bpe(documents, 2048) == train_plainly(documents, 2048)


@pytest.mark.parametrize("letters", ["ACGT", "A"])
def test_text_without_spaces_trains_in_seconds(letters):
    text = "".join(random.Random(0).choices(letters, k=10**6))
    start = time.monotonic()
    tokenizer = load_tokenizer(train_bpe([text], 2048))
    ids = tokenizer.encode(text)
    assert time.monotonic() - start < 60  # about 5; without cut words several minutes
    assert tokenizer.decode(ids) == text and len(ids) < 300_000


def test_an_error_in_the_texts_ends_the_training():
    def break_off():
        yield "some text"
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        train_bpe(break_off(), 300)


@pytest.mark.slow
def test_long_training_shows_progress_and_ends_with_ctrl_c(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{i} {i * i}\n" for i in range(10**6)))
    code = "import data.prepare as p; p.main()"
    argv = ["text", "--input", tmp_path / "a.txt", "--out", tmp_path / "out"]
    with subprocess.Popen(
        [sys.executable, "-c", code, *argv], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as run:
        line = run.stderr.readline()
        assert re.match(r"training the tokenizer: [\d.]+M characters \[00:0[2-4]", line), line
        run.send_signal(signal.SIGINT)
        start = time.monotonic()
        rest = run.stderr.read().splitlines()
    assert run.returncode == 130 and time.monotonic() - start < 10
    assert rest[-1] == "interrupted" and all(line.startswith("training") for line in rest[:-1])
    assert {p.name for p in tmp_path.iterdir()} == {"a.txt"}


# --------------------------------------------------------------------------------------------------
# pydocs


@pytest.mark.slow
def test_pydocs(tmp_path, capsys):
    meta, ids = make("pydocs", "--out", tmp_path / "a")
    assert "python train.py pydocs_mdlm --data=" in capsys.readouterr().out
    assert meta["vocab_size"] == 2048 == load_tokenizer(meta["tokenizer"]).vocab_size
    assert f"Python {sys.version.split()[0]}" in meta["source"]
    text = {split: load_tokenizer(meta["tokenizer"]).decode(part) for split, part in ids.items()}
    sizes = {split: of["characters"] for split, of in meta["splits"].items()}
    assert sizes == {split: len(t) for split, t in text.items()}
    total = sum(sizes.values())
    assert 1_000_000 < total < 4_000_000
    assert abs(sizes["train"] / total - 0.90) < 0.02 and abs(sizes["val"] / total - 0.05) < 0.02
    assert 2.5 < total / sum(map(len, ids.values())) < 4  # characters per token

    # No document and no long paragraph appears twice, be it in one split or in two.
    documents = [d for t in text.values() for d in re.split(r"\n\n\n+", t) if d]
    assert len(documents) == len(set(documents)) > 1500
    paragraphs = [" ".join(p.split()) for d in documents for p in re.split(r"\n\s*\n", d)]
    paragraphs = [p for p in paragraphs if len(p) >= 80]
    assert len(paragraphs) == len(set(paragraphs))
    assert any("Return a context manager" in d for d in documents)
    assert any("Assert statements are a convenient way" in d for d in documents)

    # The same in another process, whose hashes of strings differ.
    command = [sys.executable, ROOT / "data" / "prepare.py", "pydocs", "--out", tmp_path / "b"]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    assert hashes(read_meta(f"{tmp_path}/b")) == hashes(meta)
    assert read_meta(f"{tmp_path}/b")["tokenizer"] == meta["tokenizer"]


def test_pydocs_goes_on_without_topics(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert list(texts_module.read_topics()) == []


# --------------------------------------------------------------------------------------------------
# text8


@pytest.fixture
def small_text8(tmp_path, monkeypatch):
    rng = random.Random(1)
    text = "".join(rng.choice(" etaoinshrdlucmfwypvbgkjqxz") for _ in range(10_007))
    with zipfile.ZipFile(tmp_path / "text8.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("text8", text)
    monkeypatch.setattr(texts_module, "TEXT8_CHARACTERS", len(text))
    return text


def check_text8(text, meta, ids):
    expected = [0 if c == " " else "abcdefghijklmnopqrstuvwxyz".index(c) + 1 for c in text]
    n = len(text)
    assert ids["train"].tolist() == expected[: int(0.9 * n)]
    assert ids["val"].tolist() == expected[int(0.9 * n) : int(0.95 * n)]
    assert ids["test"].tolist() == expected[int(0.95 * n) :]
    assert meta["vocab_size"] == 27 and meta["dtype"] == "uint16" and meta["wrap"] == 0
    assert load_tokenizer(meta["tokenizer"]).decode(ids["test"]) == text[int(0.95 * n) :]


def test_text8_from_a_zip_and_from_the_raw_file(small_text8, tmp_path, capsys):
    check_text8(
        small_text8, *make("text8", "--input", tmp_path / "text8.zip", "--out", tmp_path / "a")
    )
    (tmp_path / "text8").write_text(small_text8)
    check_text8(small_text8, *make("text8", "--input", tmp_path / "text8", "--out", tmp_path / "b"))
    command = f"python train.py text8_mdlm --data={tmp_path}/b --out_dir=out/b\n"
    assert command in capsys.readouterr().out


def test_text8_download(small_text8, tmp_path, serve, monkeypatch, refuses):
    files = {"/text8.zip": (tmp_path / "text8.zip").read_bytes()}
    for url, words in {
        serve(files) + "/other.zip": ["404"],
        serve(files, cut=9) + "/text8.zip": ["text8.zip: the download stopped after"],
        "http://127.0.0.1:9/text8.zip": ["refused"],
    }.items():
        monkeypatch.setattr(texts_module, "TEXT8_URL", url)
        refuses(["text8"], *words)
    monkeypatch.setattr(texts_module, "TEXT8_URL", serve(files) + "/text8.zip")
    check_text8(small_text8, *make("text8", "--out", tmp_path / "a"))


def test_text8_bad_input(small_text8, tmp_path, refuses):
    good = (tmp_path / "text8.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as z:
        z.writestr("enwik8", small_text8)
    corrupt = bytearray(good)
    corrupt[len(good) // 2] ^= 255
    for name, content, words in [
        ("gone.zip", None, ["No such file"]),
        ("not.zip", b"hello", ["not a zip"]),
        ("half.zip", good[: len(good) // 2], ["not a zip file, or incomplete"]),
        ("corrupt.zip", corrupt, ["not a zip file, or incomplete"]),
        ("other.zip", (tmp_path / "other.zip").read_bytes(), ["no member named text8"]),
        ("short", small_text8[:-1].encode(), ["10,006 characters", "10,007"]),
        ("empty", b"", ["0 characters"]),
        (
            "capital",
            small_text8[:77].encode() + b"A" + small_text8[78:].encode(),
            ["byte 65 at offset 77"],
        ),
    ]:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        refuses(["text8", "--input", tmp_path / name], name, *words)
    refuses(
        ["text8", "--input", tmp_path / "text8.zip", tmp_path / "short"],
        "short: text8 is made of one file",
    )


# --------------------------------------------------------------------------------------------------
# openwebtext

DOCS = [
    f"Document {i}: "
    + " ".join(["naïve", "cats 🐈 sat", "\n\n", "<|endoftext|>"][: i % 5]) * (i % 7)
    for i in range(45)
]
DOCS[3] = ""  # an empty document is still a document


def write_shards(folder, docs=DOCS, sizes=(30, 15), column="text"):
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(exist_ok=True)
    paths, docs = [], list(docs)
    for i, n in enumerate(sizes):
        paths.append(folder / f"train-{i:05}-of-{len(sizes):05}.parquet")
        table = pyarrow.table({column: docs[:n]})
        pyarrow.parquet.write_table(table, paths[-1], row_group_size=7)
        docs = docs[n:]
    return paths


def reference_openwebtext(val_docs, wrap=0):
    import tiktoken

    encoding, splits = tiktoken.get_encoding("gpt2"), {}
    for split, docs in {"train": DOCS[:-val_docs], "val": DOCS[-val_docs:]}.items():
        ids = []
        for doc in docs:
            ids += encoding.encode(doc, disallowed_special=()) + [50256]
        if wrap:
            rows = []
            while len(ids) >= wrap - 2:
                rows += [50256, *ids[: wrap - 2], 50256]
                ids = ids[wrap - 2 :]
            ids = rows
        splits[split] = ids
    return splits


@needs_gpt2
@pytest.mark.parametrize(
    "val_docs", [4, 15, 21]
)  # cuts inside the last shard, between shards, inside the first
@pytest.mark.parametrize("wrap", [0, 16])
def test_openwebtext(tmp_path, wrap, val_docs, capsys):
    paths = write_shards(tmp_path / "shards")
    options = ["--val_docs", val_docs, "--workers", 2, "--wrap", wrap]
    meta, ids = make("openwebtext", "--input", *paths, *options, "--out", tmp_path / "a")
    expected = reference_openwebtext(val_docs, wrap)
    assert {split: part.tolist() for split, part in ids.items()} == expected
    assert (
        list(meta["splits"]) == ["train", "val"]
        and meta["wrap"] == wrap
        and meta["vocab_size"] == 50257
    )
    assert meta["tokenizer"] == {"kind": "gpt2"}
    assert {split: of["tokens"] for split, of in meta["splits"].items()} == {
        s: len(x) for s, x in expected.items()
    }
    for split, docs in {"train": DOCS[:-val_docs], "val": DOCS[-val_docs:]}.items():
        text = load_tokenizer({"kind": "gpt2"}).decode([i for i in expected[split] if i != 50256])
        whole = "".join(docs)
        # Wrapping drops the end; one character may be cut in two and be counted on neither side.
        assert abs(meta["splits"][split]["characters"] - len(text)) <= (4 if wrap else 0)
        assert whole.startswith(text.rstrip("\ufffd"))
    assert f"train.py {'owt_mdlm' if wrap else 'owt_d3pm'} --data=" in capsys.readouterr().out


@needs_gpt2
def test_openwebtext_default_folders(tmp_path, monkeypatch):
    monkeypatch.setattr("data.corpus.ROOT", tmp_path)
    paths = write_shards(tmp_path / "shards")
    for options in ([], ["--wrap", "16"]):
        prepare.main(["openwebtext", "--val_docs", "9", "--input", *map(str, paths), *options])
    assert read_meta("openwebtext")["wrap"] == 0 and read_meta("openwebtext_wrap16")["wrap"] == 16


@needs_gpt2
def test_openwebtext_resumes_after_a_failure(tmp_path, refused, monkeypatch):
    one, two = write_shards(tmp_path / "shards")
    argv = [
        "openwebtext",
        "--input",
        str(one),
        str(two),
        "--val_docs",
        "9",
        "--workers",
        "1",
        "--out",
        f"{tmp_path}/a",
    ]
    whole, work = two.read_bytes(), tmp_path / "a.partial" / "shards"
    two.write_bytes(whole[:-100])
    refused(lambda: prepare.main(argv), two)
    assert (
        (work / "00000.bin").exists()
        and not (work / "00001.bin").exists()
        and not (tmp_path / "a").exists()
    )
    before = (work / "00000.bin").stat()
    two.write_bytes(whole)

    for other in (["--wrap", "16"], ["--val_docs", "8"], ["--input", str(two), str(one)]):
        refused(
            lambda other=other: prepare.main([*argv, *other]),
            tmp_path / "a.partial",
            "other inputs or options",
        )
    with (
        monkeypatch.context() as patch,
        pytest.raises(ZeroDivisionError),
    ):  # killed again, at the very end
        patch.setattr("data.shards.finish", lambda *a: 1 / 0)
        prepare.main(argv)
    after = (work / "00000.bin").stat()
    assert (after.st_ino, after.st_mtime_ns) == (
        before.st_ino,
        before.st_mtime_ns,
    )  # not done again
    assert (work / "00001.bin").exists()
    meta, ids = make(*argv)
    assert {split: part.tolist() for split, part in ids.items()} == reference_openwebtext(9)


@needs_gpt2
def test_openwebtext_redoes_a_shard_whose_file_changed(tmp_path, refused):
    one, two = write_shards(tmp_path / "shards", docs=DOCS[::-1])
    argv = [
        "openwebtext",
        "--input",
        str(one),
        str(two),
        "--val_docs",
        "9",
        "--out",
        f"{tmp_path}/a",
    ]
    two.write_bytes(b"PAR1")
    refused(lambda: prepare.main(argv), two)
    write_shards(tmp_path / "shards")  # both have other contents now
    meta, ids = make(*argv)
    assert {split: part.tolist() for split, part in ids.items()} == reference_openwebtext(9)


@needs_gpt2
@pytest.mark.slow
def test_openwebtext_from_the_hub(tmp_path, serve):
    """The real huggingface_hub against a small imitation of the hub, in a process of its own
    (HF_ENDPOINT)."""
    one, two = write_shards(tmp_path / "shards")
    sha, repo = "c0ffee" * 6 + "c0de", pretrain.OPENWEBTEXT
    names = ["README.md", f"data/{two.name}", f"data/{one.name}", "data/test-0.parquet"]
    info = dict(
        id=repo, sha=sha, siblings=[dict(rfilename=n) for n in names], tags=[], downloads=0, likes=0
    )
    files = {f"/api/datasets/{repo}": json.dumps({**info, "private": False}).encode()}
    for path in (one, two):
        files[f"/datasets/{repo}/resolve/{sha}/data/{path.name}"] = path.read_bytes()
    env = dict(
        os.environ,
        HF_ENDPOINT=serve(files),
        HF_HOME=str(tmp_path / "hf"),
        HF_HUB_DISABLE_TELEMETRY="1",
    )

    def run(docs, *more):
        code = (
            f"import data.prepare as p, data.pretrain as d; d.OPENWEBTEXT_DOCS = {docs}; p.main()"
        )
        argv = ["openwebtext", "--val_docs", "9", "--out", tmp_path / "a", *more]
        return subprocess.run(
            [sys.executable, "-c", code, *argv], env=env, cwd=ROOT, capture_output=True, text=True
        )

    wrong = run(46)
    assert wrong.returncode == 2, wrong.stderr
    assert wrong.stderr.count("\n") == 1 and "45 documents, but there should be 46" in wrong.stderr
    right = run(45)
    assert right.returncode == 0, right.stderr
    meta = read_meta(f"{tmp_path}/a")
    assert sha in meta["source"]
    for split, expected in reference_openwebtext(9).items():
        assert np.fromfile(tmp_path / "a" / f"{split}.bin", np.uint16).tolist() == expected
    env["HF_ENDPOINT"] = serve({})
    gone = run(45, "--overwrite")
    assert gone.returncode == 2 and gone.stderr.count("\n") == 1 and repo in gone.stderr, (
        gone.stderr
    )
    assert read_meta(f"{tmp_path}/a") == meta


@needs_gpt2
def test_openwebtext_bad_input(tmp_path, refuses):
    one, two = write_shards(tmp_path / "shards")
    (other,) = write_shards(tmp_path / "other", sizes=[45], column="body")
    (numbers,) = write_shards(tmp_path / "numbers", docs=[1, 2], sizes=[2])
    half, notes = tmp_path / "half.parquet", tmp_path / "notes.txt"
    half.write_bytes(one.read_bytes()[:500])
    notes.write_text("not a parquet file at all")
    run = ["openwebtext", "--workers", 1, "--input"]
    refuses([*run, tmp_path / "gone.parquet"], "gone.parquet: no such file")
    refuses([*run, other], other, "no column 'text'", "body")
    refuses([*run, numbers], numbers, "row 1: its field 'text' is not text")
    refuses([*run, half], half)
    refuses([*run, notes], notes)
    refuses(["openwebtext", "--wrap", 2, "--input", one], "--wrap=2: must be at least 3")
    refuses(["openwebtext", "--val_docs", 0, "--input", one], "--val_docs=0")
    refuses(["openwebtext", "--workers", 0, "--input", one], "--workers=0")


@needs_gpt2
@pytest.mark.parametrize("options, words", [
    (["--val_docs", "45"], ["45 documents, too few for --val_docs=45"]),
    (["--val_docs", "1", "--wrap", "4096"], ["too little text in train"]),
])  # fmt: skip
def test_openwebtext_too_small(tmp_path, refused, options, words):
    argv = [
        "openwebtext",
        "--input",
        *map(str, write_shards(tmp_path / "s")),
        "--out",
        f"{tmp_path}/a",
        *options,
    ]
    refused(lambda: prepare.main(argv), *words)
    assert not (tmp_path / "a").exists()


# --------------------------------------------------------------------------------------------------
# text


@pytest.mark.parametrize("tokenizer", ["char", "bpe", pytest.param("gpt2", marks=needs_gpt2)])
def test_text_of_the_users(tmp_path, tokenizer, capsys):
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_bytes("\ufeffFirst file, naïve 🐈.\r\nNo newline at its end".encode() * 40)
    b.write_bytes(b"<|endoftext|> second\n" * 60)
    one = a.read_bytes().decode()[1:] + "\n"
    whole = one + one + b.read_bytes().decode()
    n = len(whole)
    expected = dict(
        train=whole[: n * 9 // 10],
        val=whole[n * 9 // 10 : n * 95 // 100],
        test=whole[n * 95 // 100 :],
    )
    meta, ids = make(
        "text", "--input", a, a, b, "--tokenizer", tokenizer, "--out", tmp_path / "mine"
    )
    codec = load_tokenizer(meta["tokenizer"])
    assert {split: codec.decode(part) for split, part in ids.items()} == expected
    assert meta["vocab_size"] == codec.vocab_size and meta["source"] == "a.txt, a.txt, b.txt"
    assert {s: of["characters"] for s, of in meta["splits"].items()} == {
        s: len(t) for s, t in expected.items()
    }
    command = f"train.py pydocs_mdlm --data={tmp_path}/mine --out_dir=out/mine\n"
    assert command in capsys.readouterr().out
    if tokenizer == "char":
        assert meta["tokenizer"]["characters"] == "".join(sorted(set(whole)))
    assert read_split(str(tmp_path / "mine"), "val", Config(vocab_size=codec.vocab_size))[1] == meta


RECORDS = [dict(id=i, text=f'Text {i}, naïve 🐈.\nTwo "lines"\n' * (i % 3)) for i in range(30)]
JOINED = "".join(r["text"] + "\n" for r in RECORDS if r["text"])


def write_records(path, column="text"):
    """RECORDS in the format of the file's name, with a byte order mark and a blank line."""
    name, records = path.name.lower(), [{"id": r["id"], column: r["text"]} for r in RECORDS]
    if name.endswith(".parquet"):
        return write_shards(path.parent, [r["text"] for r in RECORDS], [30], column)[0]
    text = io.StringIO(newline="")
    if ".csv" in name:
        csv.writer(text, lineterminator="\r\n").writerows([records[0], *map(dict.values, records)])
    elif name.endswith(".list.json"):
        json.dump(records, text)
    else:
        text.write("\n".join(json.dumps(r, ensure_ascii=r["id"] % 2 == 0) for r in records[:9]))
        text.write("\n \n" + "".join(json.dumps(r) + "\r\n" for r in records[9:]))
    raw = ("\ufeff" + text.getvalue()).encode()
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return path


@pytest.mark.parametrize("tokenizer", ["char", "bpe", pytest.param("gpt2", marks=needs_gpt2)])
def test_text_of_a_column(tmp_path, tokenizer):
    names = "a.jsonl a.JSONL a.json a.json.gz a.Jsonl.gz a.list.json a.csv a.CSV.gz a.parquet"
    for i, name in enumerate(names.split()):
        (tmp_path / f"{i}").mkdir()
        path = write_records(tmp_path / f"{i}" / name, "content")
        run = ["--tokenizer", tokenizer, "--column", "content", "--out", tmp_path / f"{i}" / "out"]
        meta, ids = make("text", "--input", path, *run)
        codec = load_tokenizer(meta["tokenizer"])
        assert "".join(codec.decode(part) for part in ids.values()) == JOINED, name
    assert make("text", "--input", write_records(tmp_path / "a.jsonl"), "--out", tmp_path / "b")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(JOINED.encode()))
    run = ["--tokenizer", "char", "--out", tmp_path / "c"]
    meta, ids = make("text", "--input", tmp_path / "a.txt.gz", tmp_path / "a.jsonl", *run)
    text = "".join(load_tokenizer(meta["tokenizer"]).decode(part) for part in ids.values())
    assert text == JOINED + JOINED


@needs_gpt2
def test_nulls_and_halves_of_surrogate_pairs(tmp_path, capsys):
    """A null is left out, half a pair becomes ?, and both are counted."""
    rows = ["one", None, "half \ud83d end", "a pair \ud83d\udc08", None]
    expected = ["one", "half ? end", "a pair 🐈"]
    a, b, c = tmp_path / "a.jsonl", tmp_path / "b.csv", tmp_path / "c.json"
    a.write_text("".join(json.dumps(dict(body=row)) + "\n" for row in rows))
    b.write_text("id,body\n1,one\n2\n3,half ? end\n4,a pair 🐈\n", encoding="utf-8")
    c.write_text(json.dumps([dict(body=row) for row in rows]))
    (d,) = write_shards(tmp_path / "d", ["one", None, *expected[1:]], [4], "body")
    argv = ["--column", "body", "--val_docs", 3, "--workers", 1, "--out", tmp_path / "owt"]
    meta, ids = make("openwebtext", "--input", a, b, c, d, *argv)
    gpt2 = load_tokenizer({"kind": "gpt2"})
    wanted = [i for text in expected for i in [*gpt2.encode(text), gpt2.eos]]
    assert ids["train"].tolist() == wanted * 3 and ids["val"].tolist() == wanted
    out = capsys.readouterr().out
    for path, n in {a: 2, b: 1, c: 2, d: 1}.items():
        assert f"{path}: left out {n} records whose 'body' is null\n" in out
    for path in (a, c):
        assert f"{path}: put ? for half a surrogate pair in 1 records\n" in out
    assert f"{b}: put" not in out and f"{d}: put" not in out
    make("text", "--input", a, "--column", "body", "--tokenizer", "char", "--out", tmp_path / "t")
    assert f"{a}: left out 2 records whose 'body' is null\n" in capsys.readouterr().out


def test_bad_files_with_columns(tmp_path, refuses):
    for name, raw, words in [
        ("a.jsonl", b'\n{"text": "fine"}\n\n{"text"\n', "line 4: not JSON (Expecting ':'"),
        ("b.jsonl", b'{"text": "fine"}\n{"text": 5}\n', "line 2: its field 'text' is not text"),
        ("c.jsonl", b'{"text": "fine"}\n["text"]\n', "line 2: must have a field 'text'"),
        ("d.jsonl", b'{"text": "caf\xe9"}\n', "line 1: not UTF-8"),
        ("e.jsonl", b'{"text": null}\n', "empty"),
        ("f.jsonl.gz", gzip.compress(b'{"text": "fine"}\n')[:-9], "f.jsonl.gz: "),
        ("g.json", b'[\n{"text": "fine"},\n{"text": }]', "line 3: not JSON"),
        ("h.json", b'[{"text": "fine"}, {"body": ""}]', "record 2: must have a field 'text'"),
        ("i.csv", b"id,body\n1,a\n", "has no column 'text', only id, body"),
        ("j.csv", b'id,text\n1,"a"b\n', "line 2: not CSV"),
        ("k.csv", b'id,text\n1,a\n2,"open\nto the end', "line 4: not CSV (unexpected end of data)"),
        ("l.csv", b"id,text\n1,caf\xe9\n", "line 2: not UTF-8"),
        ("m.csv", b"", "has no column 'text'"),
        ("n.parquet", b"PAR1 and no more", "n.parquet: "),
    ]:  # fmt: skip
        (tmp_path / name).write_bytes(raw)
        refuses(["text", "--input", tmp_path / name], name, words)
    (tmp_path / "o.txt").write_text("some text\n" * 9)
    refuses(["text", "--input", tmp_path / "o.txt", "--column", "a"], "--column=a: needs a .jsonl")
    refuses(["text", "--input", tmp_path / "gone.csv"], "error: " + str(tmp_path / "gone.csv: No"))


def test_a_csv_field_may_be_long(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "abc " * 50_000 + "\n")
    run = ["--tokenizer", "char", "--out", tmp_path / "a"]
    meta, _ = make("text", "--input", tmp_path / "a.csv", *run)
    assert sum(split["tokens"] for split in meta["splits"].values()) == 200_002


@pytest.mark.slow
def test_names_that_a_windows_pipe_cannot_show(tmp_path):
    """cp1252 has no Japanese letters; the output shows ? for them."""
    (tmp_path / "本.csv").write_text('text\n"a row of text,\nand more"\n', encoding="utf-8")
    argv = ["text", "--input", tmp_path / "本.csv", "--tokenizer", "char", "--out", tmp_path / "日"]
    result = subprocess.run(
        [sys.executable, ROOT / "data" / "prepare.py", *argv],
        env=dict(os.environ, PYTHONIOENCODING="cp1252"), capture_output=True, check=True,
    )  # fmt: skip
    assert b"--data='%s/?' " % os.fsencode(tmp_path) in result.stdout and result.stderr == b""
    assert read_meta(f"{tmp_path}/日")["source"] == "本.csv"


def test_text_longer_than_one_piece(tmp_path):
    text = "".join(random.Random(2).choices("ab \n", k=2**20 * 5 // 4))
    (tmp_path / "a.txt").write_text(text)
    meta, ids = make(
        "text", "--input", tmp_path / "a.txt", "--tokenizer", "char", "--out", tmp_path / "a"
    )
    assert load_tokenizer(meta["tokenizer"]).decode(np.concatenate(list(ids.values()))) == text


def test_text_vocab_size(tmp_path):
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 30)
    meta, _ = make(
        "text", "--input", tmp_path / "a.txt", "--vocab_size", 270, "--out", tmp_path / "a"
    )
    assert meta["vocab_size"] == 270


def test_text_bad_input(tmp_path, refuses):
    good, bad, empty, small = (
        tmp_path / n for n in ("good.txt", "bad.txt", "empty.txt", "small.txt")
    )
    good.write_text("some text\n" * 100)
    bad.write_bytes(b"fine so far \xff and on")
    empty.write_text("")
    small.write_text("nineteen characters")
    refuses(["text"], "--input")
    refuses(["text", "--input", good, tmp_path / "gone.txt"], "gone.txt", "No such file")
    refuses(["text", "--input", tmp_path], tmp_path, "directory")
    refuses(["text", "--input", good, bad], "bad.txt: not UTF-8: byte 0xff at offset 12")
    refuses(["text", "--input", good, empty], "empty.txt: empty")
    refuses(["text", "--input", small], "small.txt: 19 characters are too few")
    for kind in ("words", "wordpiece"):
        refuses(
            ["text", "--input", good, "--tokenizer", kind], f"--tokenizer={kind}", "char, bpe, gpt2"
        )
    for n in (0, 256, 65537):
        refuses(["text", "--input", good, "--vocab_size", n], f"--vocab_size={n}", "257 to 65536")
    refuses(
        ["text", "--input", good, "--tokenizer", "char", "--vocab_size", 300],
        "only for --tokenizer=bpe",
    )


def test_options_and_names(tmp_path, refuses):
    refuses(["wikitext"], "'wikitext'", "did you mean wikitext2?")
    refuses(["c4"], "'c4'", "pydocs, text8, openwebtext, lm1b, ptb", "wikitext2", "text")
    refuses(["pydocs", "--input", "x"], "--input does not apply to pydocs")
    refuses(["lm1b", "--column", "x"], "--column does not apply to lm1b")
    refuses(["text8", "--wrap", "8"], "--wrap does not apply to text8", "--input")
    refuses(["text", "--workers", "2"], "--workers does not apply to text")
    refuses(["openwebtext", "--tokenizer", "char"], "--tokenizer does not apply to openwebtext")
    refuses(["openwebtext", "--packed"], "--packed does not apply to openwebtext")
    refuses(["lm1b", "--no_eot"], "--no_eot does not apply to lm1b")
    refuses(
        ["ptb", "--val_docs", "1"],
        "--val_docs does not apply to ptb",
        "--wrap --no_eot --train",
    )
    refuses(["openwebtext", "--wrap", "wide"], "--wrap", "wide")
    refuses(["pydocs", "--fast"], "--fast")


NAMED_OPTIONS = {
    "dump": ["CC-MAIN-2023-50", "CC-MAIN-2024-10"], "packed": [True], "train": [True],
    "no_eot": [True],
    "wrap": [0, 3, 64, 128, 256, 1024, 2048],
}  # fmt: skip


@pytest.mark.parametrize("name", prepare.DATASETS)
def test_the_hint_for_a_missing_folder_makes_that_folder(name, tmp_path, monkeypatch, capsys):
    """For every combination of the options that a folder's name shows, hence `evaluate --data`."""
    monkeypatch.setattr("data.corpus.ROOT", tmp_path)
    allowed = prepare.dataset_options(name)
    shown = {option: allowed[option] for option in NAMED_OPTIONS if option in allowed}
    assert corpus_module.NAMES[name] == shown and corpus_module.NAMES.keys() == {*prepare.DATASETS}
    made = []
    monkeypatch.setattr(prepare, "announce", lambda meta, **options: made.append(meta))
    choices = [[(option, value) for value in [None, *NAMED_OPTIONS[option]]] for option in shown]
    for combination in itertools.product(*choices):
        options = {option: value for option, value in combination if value is not None}
        folder = prepare.default_folder(name, **options)
        with pytest.raises(UserError) as e:
            read_meta(folder)
        hint = str(e.value).rpartition("python data/prepare.py ")[2]
        assert ("--input" in hint or "--out" in hint) == (name in ("text", "reversal"))

        def note_folder(path, **kwargs):
            return path.name

        note_folder.__signature__ = inspect.signature(prepare.DATASETS[hint.split()[0]])
        monkeypatch.setitem(prepare.DATASETS, hint.split()[0], note_folder)
        prepare.main(hint.split())
        assert made.pop() == folder


def test_other_folders_are_own_texts(tmp_path, monkeypatch, refused):
    monkeypatch.setattr("data.corpus.ROOT", tmp_path)
    for folder in (
        "mine text text8_wrap9 pydocs_packed lm1b_no_eot ptb_packed ptb_wrap1024 lm1b_wrap128 "
        "fineweb lm1b_wrap064 lm1b_wrap64_packed gsm8k_wrap256 openwebtext_wrap0 "
        "ptb_CC-MAIN-2024-10"
    ).split():
        command = f"python data/prepare.py text --input FILE... --out {folder}\n"
        refused(lambda folder=folder: read_meta(folder), command)


def test_modules_do_not_import_in_circles():
    """Nor from the folders of commands; in functions they import packages that are optional."""
    optional = {"tokenizers", "tiktoken", "pyarrow", "huggingface_hub", "pydoc_data", "wandb"}
    optional |= {"torch", "extra"}  # torch.utils.tensorboard; optional parts of ours
    others = {path.stem for path in ROOT.glob("*.py")} | {"tasks", "tests"}
    allowed = {"common", "configs", "diffusion", "head", "model", "samplers"}
    graph = {}
    for path in (ROOT / "data").glob("*.py"):
        tree, graph[f"data.{path.stem}"] = ast.parse(path.read_bytes()), set()
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for node in (node for function in functions for node in ast.walk(function)):
            assert (
                not isinstance(node, ast.Import) or node.names[0].name.partition(".")[0] in optional
            )
            assert not isinstance(node, ast.ImportFrom) or node.module.partition(".")[0] in optional
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                if node.module.startswith("data"):
                    graph[f"data.{path.stem}"].add(node.module)
                elif node.module.partition(".")[0] in others:
                    assert node.module in allowed, (path, node.module)
    assert "data.corpus" in graph["data.shards"]
    list(graphlib.TopologicalSorter(graph).static_order())  # CycleError


def test_text_files_are_opened_as_utf8():
    """On Windows the default is another encoding."""
    for path in (ROOT / "data").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            binary = any("b" in str(getattr(arg, "value", "")) for arg in node.args[1:2])
            if name in ("read_text", "write_text") or name == "open" and not binary:
                assert "encoding" in [k.arg for k in node.keywords], (path, node.lineno)


def test_a_folder_is_replaced_only_when_asked_and_only_by_a_complete_one(tmp_path, refused):
    good, bad, out = tmp_path / "good.txt", tmp_path / "bad.txt", tmp_path / "out"
    good.write_text("some text\n" * 100)
    bad.write_bytes(b"\xff" * 100)
    run = lambda path, *more: prepare.main(["text", "--input", str(path), "--out", str(out), *more])
    run(good)
    before = read_meta(str(out))
    refused(lambda: run(good), out, "exists; --overwrite replaces it")
    refused(lambda: run(bad, "--overwrite"), bad)
    assert read_meta(str(out)) == before
    good.write_text("other text\n" * 100)
    run(good, "--overwrite")
    assert hashes(read_meta(str(out))) != hashes(before)

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    out = tmp_path / "thesis"
    refused(lambda: run(good, "--overwrite"), out, "not a prepared data set")
    assert (out / "chapter1.txt").exists()


# --------------------------------------------------------------------------------------------------
# Reading


@pytest.fixture
def counting(tmp_path):
    """A corpus whose id at position p is p, so that a row shows where it came from; and its
    Config."""
    from data.corpus import finish, partial_of

    folder = tmp_path / "counting"
    partial_of(folder).mkdir()
    for split in ("train", "val"):
        np.arange(103, dtype=np.uint16).tofile(partial_of(folder) / f"{split}.bin")
    finish(folder, "made here", {"kind": "char", "characters": ""}, 103, {"train": 103, "val": 103})
    return Config(data=str(folder), vocab_size=103, seq_len=10)


def test_an_epoch_covers_every_window_once(counting):
    ids, meta = read_split(counting.data, "train", counting)
    offsets = set()
    for epoch in range(12):
        rows = training_rows(
            ids, meta, counting, range(epoch * 9, epoch * 9 + 9)
        )  # 9 = floor((103 - 9) / 10)
        assert rows.shape == (9, 10) and rows.dtype == np.int64
        assert (np.diff(rows, axis=1) == 1).all()
        starts = sorted(rows[:, 0])
        assert (
            np.diff(starts) == 10
        ).all()  # side by side: no token twice, none left out in between
        assert rows[:, 0].tolist() != starts  # in random order
        offsets.add(int(starts[0]))
    assert offsets <= set(range(10)) and len(offsets) > 4


def test_training_rows_are_a_function_of_seed_and_index(counting):
    ids, meta = read_split(counting.data, "train", counting)
    index = np.arange(60)
    rows = training_rows(ids, meta, counting, index)
    shuffled = np.random.default_rng(0).permutation(60)
    assert (training_rows(ids, meta, counting, shuffled) == rows[shuffled]).all()
    assert (training_rows(ids, meta, counting, [41])[0] == rows[41]).all()
    other = training_rows(ids, meta, replace(counting, seed=2), index)
    assert (other != rows).any()


def test_wrapped_rows_are_aligned(counting):
    ids, meta = read_split(counting.data, "train", counting)
    meta = {**meta, "wrap": 10}
    for epoch in range(3):
        rows = training_rows(ids[:100], meta, counting, range(epoch * 10, epoch * 10 + 10))
        assert sorted(rows[:, 0]) == list(range(0, 100, 10))


def test_the_smallest_corpora(counting):
    ids, meta = read_split(counting.data, "train", counting)
    for n in (10, 11, 19, 20, 29):
        rows = training_rows(ids[:n], meta, counting, range(50))
        assert rows.min() >= 0 and rows.max() < n


def test_damaged_corpora_are_refused(counting, refused):
    folder = Path(counting.data)
    read = lambda split="train", **changes: read_split(
        counting.data, split, replace(counting, **changes)
    )
    refused(lambda: read("test"), "test.bin: no such split; there are train, val")
    refused(lambda: read(vocab_size=104), "vocab_size 103", "--vocab_size=103")
    refused(lambda: read(seq_len=104), "train.bin: 103 tokens, fewer than one row of seq_len 104")
    refused(
        lambda: read_split(f"{folder}/gone", "train", counting),
        f"{folder}/gone/meta.json",
        "prepare",
    )
    text = (folder / "meta.json").read_text()

    rewrite_meta(folder, vocab_size=50)
    ids, meta = read(vocab_size=50)
    refused(
        lambda: training_rows(ids, meta, replace(counting, vocab_size=50), range(9)),
        "train.bin",
        "token id",
        "50",
    )
    rewrite_meta(folder, vocab_size=103, wrap=16)
    refused(read, "windows of 16 tokens, but seq_len is 10")
    for damaged in (text[:40], text.replace('"dtype"', '"type"'), text.replace("103", "104")):
        (folder / "meta.json").write_text(damaged)
        refused(read, "meta.json: damaged")
    (folder / "meta.json").write_text(text)

    whole = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(whole[:-1])
    refused(read, "train.bin: 205 bytes, but meta.json says 206")
    (folder / "train.bin").unlink()
    refused(read, "train.bin: 0 bytes")
