"""SlimPajama and FineWeb in Llama-2's pieces: the tokenizer equals the tokenizers library with
the pipeline of Llama-2's own file, the prepared ids equal a slow and obvious reference,
whatever the files' form and even if the run was killed, and whatever is wrong with the input is
one line and exit code 2."""

import gzip
import json
import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, TRICKY, make
from llama import DOCS, LIBRARY, OURS, TEXT, slow_ids, write_parquet

import data.prepare as prepare
import data.pretrain as pretrain
import data.shards as shards
from data.corpus import read_meta
from data.tokenizer import LLAMA, MASK_SHOWN, load_tokenizer, read_llama, train_bpe

GITHUB = {"redpajama_set_name": "RedPajamaGithub"}


@pytest.fixture
def vocab(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(TEXT)
    return path


def metas(texts):
    return [
        GITHUB if i % 5 == 1 else {"redpajama_set_name": "RedPajamaC4"} for i in range(len(texts))
    ]


def slow_slimpajama(texts, github=True):
    kept = [text for text, meta in zip(texts, metas(texts)) if github or meta is not GITHUB]
    return [i for text in kept for i in [*slow_ids(text), 2]]


# --------------------------------------------------------------------------------------------------
# The tokenizer


def test_llama_is_what_the_library_makes_of_its_file(vocab):
    spec = read_llama(vocab)
    assert spec == {"kind": "llama", "json": TEXT}
    llama = load_tokenizer(json.loads(json.dumps(spec)))
    assert (llama.vocab_size, llama.bos, llama.eos) == (LIBRARY.get_vocab_size(), 1, 2)
    for text in [
        *TRICKY,
        *DOCS,
        " leading",
        "  two",
        "trailing ",
        "a▁b",
        "<0x0A>\n<s><unk></s>▁",
        "\u2581",
    ]:
        ids = llama.encode(text)
        assert ids == slow_ids(text) == llama.encode_batch([text, "the"], 4)[0]
        assert not {0, 1, 2} & set(ids)  # neither unknown nor special
        assert (
            llama.decode(ids)
            == LIBRARY.decode(ids, skip_special_tokens=False)
            == text.replace("▁", " ")
        )
        pieces = llama.pieces(ids)
        assert len(pieces) == len(ids) and (
            not text.isascii() or "".join(pieces).removeprefix(" ") == text
        )
    assert any(
        len(llama.encode(text)) < len(text) / 2 for text in DOCS
    )  # there is something to merge
    assert llama.pieces([1, 2, 3 + 0x41, llama.vocab_size]) == ["<s>", "</s>", "A", MASK_SHOWN]
    with pytest.raises(ValueError, match="^[^\n]+$"):
        llama.encode("\ud800")


def test_text_behind_other_text_begins_without_a_space():
    for text in (*DOCS, "a  b", " the cat", ". The cat"):
        for cut in (0, 1, 3, 7):
            ids = OURS.encode(text[:cut]) + OURS.encode(text[cut:], inside=cut > 0)
            assert OURS.decode(ids) == text
    assert OURS.encode("the cat") == OURS.encode("the") + OURS.encode(" cat", inside=True)
    assert OURS.encode("cat") == OURS.encode(" cat", inside=True) != OURS.encode("cat", inside=True)
    assert OURS.encode("", inside=True) == OURS.encode("") == []
    bpe = load_tokenizer(train_bpe(["the cat"], 260))  # and for the others it makes no difference
    assert bpe.encode(" cat", inside=True) == bpe.encode(" cat")


def test_of_the_file_only_pieces_and_merges_matter():
    file = json.loads(TEXT)
    file["model"]["merges"] = [
        " ".join(pair) for pair in file["model"]["merges"]
    ]  # as it was written once
    file["truncation"] = {
        "max_length": 3,
        "stride": 0,
        "strategy": "LongestFirst",
        "direction": "Right",
    }
    token = dict(
        id=999, single_word=False, lstrip=False, rstrip=False, normalized=True, special=False
    )
    file |= dict(normalizer=None, added_tokens=[*file["added_tokens"], token | {"content": "cat"}])
    other = load_tokenizer({"kind": "llama", "json": json.dumps(file)})
    assert other.vocab_size == OURS.vocab_size
    assert other.encode_batch(DOCS) == OURS.encode_batch(DOCS)

    pieces = file["model"]["vocab"]
    for piece in ("s>", "<s"):  # pieces that </s> and <s> could be merged from
        pieces.setdefault(piece, len(pieces))
    file["model"]["merges"] = ["s >", "< s>", *file["model"]["merges"]]
    special = load_tokenizer({"kind": "llama", "json": json.dumps(file)})
    assert 1 not in special.encode("a<s>") and special.decode(special.encode("a<s>")) == "a<s>"


def test_other_files_are_no_llama_vocabulary(tmp_path, refuses):
    docs = write_parquet(tmp_path / "docs.parquet", DOCS)
    for name, change in {
        "half": lambda file: None,
        "gap": lambda file: file["model"]["vocab"].update({"gap": 1000}),
        "bytes": lambda file: file["model"]["vocab"].pop("<0xFF>"),
        "merges": lambda file: file["model"]["merges"].append(["the", "missing"]),
        "wordpiece": lambda file: file["model"].pop("merges"),
        "list": lambda file: file.update(model=[]),
    }.items():
        file, path = json.loads(TEXT), tmp_path / f"{name}.json"
        change(file)
        path.write_text(json.dumps(file)[: 100 if name == "half" else None])
        for data in ("slimpajama", "fineweb"):
            refuses(
                [data, "--input", docs, "--vocab", path],
                f"{path}: not a tokenizer.json of Llama's form",
            )
    (tmp_path / "latin").write_bytes(b"\xff")
    refuses(["slimpajama", "--input", docs, "--vocab", tmp_path / "latin"], "latin: ")
    refuses(["slimpajama", "--input", docs, "--vocab", tmp_path / "gone"], "gone: No such file")


# --------------------------------------------------------------------------------------------------
# slimpajama


def test_slimpajama(tmp_path, vocab, capsys):
    """Files as on the hub, in any order; GitHub's documents are left out."""
    parts = {
        "validation-00000-of-00001-ab": DOCS[:9],
        "train-00001-of-00002-cd": DOCS[40:],
        "test-0": DOCS[9:12],
    }
    parts["train-00000-of-00002-ef"] = DOCS[12:40]
    paths = [
        write_parquet(tmp_path / "s" / f"{name}.parquet", part, metas(part))
        for name, part in parts.items()
    ]
    argv = ["--input", *paths[:1], paths[3], *paths[1:3], "--vocab", vocab, "--workers", 2]
    meta, ids = make("slimpajama", *argv, "--out", tmp_path / "a")
    expected = {
        "train": slow_slimpajama(DOCS[12:40], False) + slow_slimpajama(DOCS[40:], False),
        "val": slow_slimpajama(DOCS[:9], False),
        "test": slow_slimpajama(DOCS[9:12], False),
    }
    assert {split: part.tolist() for split, part in ids.items()} == expected and list(ids) == list(
        expected
    )
    assert (
        meta["tokenizer"] == {"kind": "llama", "json": TEXT}
        and meta["vocab_size"] == OURS.vocab_size
    )
    assert meta["dtype"] == "uint16" and meta["wrap"] == 0 and meta["pad"] is None
    kept = [text for text, about in zip(DOCS[:9], metas(DOCS[:9])) if about is not GITHUB]
    assert meta["splits"]["val"]["characters"] == sum(map(len, kept))
    command = f"python train.py smdm_170 --data={tmp_path}/a --out_dir=out/a\n"
    assert command in capsys.readouterr().out


def test_slimpajama_as_first_published(tmp_path, vocab):
    """.jsonl.zst of several frames in folders of splits and chunks; .jsonl.gz and .jsonl will do as
    well."""
    parts = {
        "train/chunk1/example_train_0.jsonl.zst": DOCS[:25],
        "train/chunk1/example_train_1.jsonl.gz": DOCS[25:30],
    }
    parts |= {
        "validation/chunk2/example_holdout_0.jsonl.zst": DOCS[30:50],
        "train/chunk2/a.jsonl": DOCS[50:],
    }
    for name, part in parts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        lines = [
            json.dumps(dict(text=t, meta=m), ensure_ascii=False) for t, m in zip(part, metas(part))
        ]
        raw = "".join(f"{line}\n" for line in lines).encode()
        if name.endswith("gz"):
            raw = gzip.compress(raw)
        if name.endswith("zst"):
            raw = b"".join(bytes(pyarrow.compress(half, "zstd")) for half in (raw[:333], raw[333:]))
        (tmp_path / name).write_bytes(raw)
    argv = ["slimpajama", "--input", *(tmp_path / name for name in parts), "--vocab", vocab]
    meta, ids = make(*argv, "--out", tmp_path / "a")
    train = [part for name, part in parts.items() if name.startswith("train")]
    assert ids["train"].tolist() == sum([slow_slimpajama(part, False) for part in train], [])
    assert ids["val"].tolist() == slow_slimpajama(DOCS[30:50], False) and list(ids) == [
        "train",
        "val",
    ]


def test_slimpajama_without_validation_files_and_meta(tmp_path, vocab):
    """Any parquet with texts will do, FineWeb's for example; val is then the end."""
    one, two = (write_parquet(tmp_path / f"00{i}.parquet", DOCS[i * 30 :][:30]) for i in range(2))
    argv = [
        "slimpajama",
        "--input",
        one,
        two,
        "--val_docs",
        35,
        "--vocab",
        vocab,
        "--out",
        tmp_path / "a",
    ]
    meta, ids = make(*argv)
    assert ids["train"].tolist() == slow_slimpajama(DOCS[:25])
    assert ids["val"].tolist() == slow_slimpajama(DOCS[25:])


def test_a_killed_run_is_gone_on_with(tmp_path, vocab):
    one, two = (write_parquet(tmp_path / f"00{i}.parquet", DOCS[i * 30 :][:30]) for i in range(2))
    argv = ["slimpajama", "--input", one, two, "--val_docs", 9, "--vocab", vocab, "--workers", 1]

    def killed():  # the whole run, from within its worker, when it has come to the second file
        fetch = shards.fetch
        shards.fetch = lambda shard: (
            fetch(shard) if shard == str(one) else os.kill(os.getppid(), signal.SIGKILL)
        )
        prepare.main([*map(str, argv), "--out", f"{tmp_path}/a"])

    run = multiprocessing.get_context("fork").Process(target=killed)
    run.start()
    run.join(30)
    assert run.exitcode == -signal.SIGKILL and not (tmp_path / "a").exists()
    work = tmp_path / "a.partial" / "shards"
    before = (work / "00000.bin").stat()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.shards.finish", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare.main([*map(str, argv), "--out", f"{tmp_path}/a"])
    after = (work / "00000.bin").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    meta, ids = make(*argv, "--out", tmp_path / "a")
    assert ids["train"].tolist() + ids["val"].tolist() == slow_slimpajama(DOCS)


def test_slimpajama_bad_input(tmp_path, vocab, refuses):
    docs = write_parquet(tmp_path / "docs.parquet", DOCS)
    val = write_parquet(tmp_path / "validation" / "0.parquet", DOCS)
    run = ["slimpajama", "--vocab", vocab, "--input"]
    refuses([*run, tmp_path / "gone.parquet"], "gone.parquet: no such file")
    refuses([*run, val], "0.parquet: has no file of train")
    refuses([*run, docs, val, "--val_docs", 5], "--val_docs=5: val is made of the validation files")
    refuses([*run, docs, "--val_docs", 0], "--val_docs=0")
    refuses([*run, docs, "--workers", 0], "--workers=0")
    refuses([*run, docs, "--dump", "CC-MAIN-2024-10"], "--dump does not apply to slimpajama")
    lines = "".join(json.dumps(dict(text="the cat")) + "\n" for _ in range(50)).encode()
    for name, raw, words in [
        ("half.jsonl.zst", bytes(pyarrow.compress(lines, "zstd"))[:-4], ["Truncated"]),
        ("not.jsonl.zst", b"hello", ["ZSTD decompress failed"]),
        ("not.jsonl", b'{"text": "a"}\nhello\n', ["line 2: not JSON"]),
        ("list.jsonl", b'{"text": "a"}\n["text"]\n', ["line 2: must have a field 'text'"]),
        ("number.jsonl", b'{"text": 1}\n', ["line 1: its field 'text' is not text"]),
        ("notes.txt", b"the cat", ["must be a .jsonl, .json, .csv or parquet file"]),
    ]:
        (tmp_path / name).write_bytes(raw)
        refuses([*run, tmp_path / name, "--workers", 1], name, *words)


def test_slimpajama_too_small(tmp_path, vocab, refused):
    argv = [
        "slimpajama",
        "--input",
        str(write_parquet(tmp_path / "d.parquet", DOCS)),
        "--vocab",
        str(vocab),
    ]
    refused(
        lambda: prepare.main([*argv, "--out", f"{tmp_path}/a"]),
        "60 documents, too few for --val_docs=10000",
    )


# --------------------------------------------------------------------------------------------------
# fineweb


def slow_fineweb(tokens):
    return [i for text in DOCS for i in [1, *slow_ids(text)]][:tokens]


@pytest.mark.parametrize("tokens", [1, 100, 383, 1200])
def test_fineweb(tmp_path, vocab, tokens, capsys):
    """The first ids, of as few files as will do, be they cut in the middle of a document or of a
    file."""
    files = [write_parquet(tmp_path / f"{i}.parquet", DOCS[i * 15 :][:15]) for i in range(4)]
    sizes = np.cumsum(
        [sum(1 + len(slow_ids(text)) for text in DOCS[i * 15 :][:15]) for i in range(4)]
    )
    assert sizes[0] < 383 < 1200 < sizes[-1] and (tokens != 383 or tokens < sizes[1])
    needed = int(np.searchsorted(sizes, tokens)) + 1
    if tokens == 383:
        for path in files[needed:]:  # never looked into
            path.write_bytes(b"PAR1")
    argv = ["fineweb", "--input", *files, "--tokens", tokens, "--vocab", vocab, "--workers", 2]
    meta, ids = make(*argv, "--out", tmp_path / "a")
    assert list(ids) == ["test"] and ids["test"].tolist() == slow_fineweb(tokens)
    whole, _, rest = "".join(map(chr, slow_fineweb(tokens))).rpartition("\x01")  # ids as characters
    expected = sum(map(len, DOCS[: whole.count("\x01")])) + len(OURS.decode(map(ord, rest)))
    assert (
        abs(meta["splits"]["test"]["characters"] - expected) <= 4
    )  # it may end inside of a character
    assert "CC-MAIN-2024-10, sha256 " in meta["source"] and meta["source"].count(" ") < 8 + needed
    assert f"evaluate.py out/smdm_170/ckpt.pt --data={tmp_path}/a\n" in capsys.readouterr().out


def test_of_a_large_file_no_more_is_read_than_is_needed(tmp_path, vocab, monkeypatch):
    path = write_parquet(tmp_path / "0.parquet", ["the cat sat"] * 5000)
    monkeypatch.setattr("data.shards.finish", lambda *a: 1 / 0)
    argv = ["fineweb", "--input", path, "--tokens", 1500, "--vocab", vocab, "--out", tmp_path / "a"]
    with pytest.raises(ZeroDivisionError):
        prepare.main([*map(str, argv)])
    assert (tmp_path / "a.partial" / "shards" / "00000.sizes").stat().st_size == 8 * 1000


def test_fineweb_bad_input(tmp_path, vocab, refuses, refused):
    docs = write_parquet(tmp_path / "docs.parquet", DOCS)
    run = ["fineweb", "--vocab", vocab, "--input", docs]
    refuses([*run, "--tokens", 0], "--tokens=0: must be at least 1")
    refuses([*run, "--workers", 0], "--workers=0")
    for dump in ("2024-10", "../CC-MAIN-2024-10", "CC-MAIN-2024-1"):
        refuses([*run, "--dump", dump], f"--dump={dump}: must be named like CC-MAIN-2024-10")
    refuses(["pydocs", "--dump", "CC-MAIN-2024-10"], "--dump does not apply to pydocs")
    argv = [*map(str, run), "--tokens", "99999", "--out", f"{tmp_path}/a"]
    refused(lambda: prepare.main(argv), "tokens, fewer than --tokens=99999")


def test_default_folders_and_hints(tmp_path, vocab, monkeypatch, refused):
    monkeypatch.setattr("data.corpus.ROOT", tmp_path)
    docs = str(write_parquet(tmp_path / "docs.parquet", DOCS))
    run = ["fineweb", "--vocab", str(vocab), "--input", docs, "--tokens", "99"]
    prepare.main(run)
    prepare.main([*run, "--dump", "CC-MAIN-2024-18"])
    assert "CC-MAIN-2024-18" in read_meta("fineweb_CC-MAIN-2024-18")["source"]
    assert read_meta("fineweb_CC-MAIN-2024-10")["splits"]["test"]["tokens"] == 99
    for folder, how in {
        "slimpajama": "slimpajama\n",
        "fineweb_CC-MAIN-2023-50": "fineweb --dump CC-MAIN-2023-50\n",
        "fineweb": "text --input FILE... --out fineweb\n",
        "slimpajama_CC-MAIN-2024-18": "text --input FILE... --out slimpajama_CC-MAIN-2024-18\n",
        "openwebtext_wrap1024": "openwebtext --wrap 1024\n",
    }.items():
        refused(lambda folder=folder: read_meta(folder), f"first: python data/prepare.py {how}")


# --------------------------------------------------------------------------------------------------
# From the hub


def test_from_the_hub(tmp_path, serve):
    """The real huggingface_hub against a small imitation of the hub, in a process of its own
    (HF_ENDPOINT). Of the dump only the file that is needed is there."""
    sha, dump, files = "c0ffee" * 6 + "c0de", "CC-MAIN-2024-18", {}
    info = dict(sha=sha, tags=[], downloads=0, likes=0, private=False)
    slim = {
        "data/train-00000-of-00001-a": DOCS[:30],
        "data/validation-0": DOCS[30:40],
        "data/test-0": DOCS[40:],
    }
    for name, part in slim.items():
        path = write_parquet(tmp_path / name, part, metas(part))
        files[f"/datasets/{pretrain.SLIMPAJAMA}/resolve/{sha}/{name}.parquet"] = path.read_bytes()
    siblings = [dict(rfilename=f"{name}.parquet") for name in slim] + [dict(rfilename="README.md")]
    answer = dict(info, id=pretrain.SLIMPAJAMA, siblings=siblings)
    files[f"/api/datasets/{pretrain.SLIMPAJAMA}"] = json.dumps(answer).encode()

    path = write_parquet(tmp_path / "web.parquet", DOCS)
    names = [f"data/{dump}/000_0000{i}.parquet" for i in range(3)]
    tree = [
        dict(type="file", path=name, size=9, oid="0")
        for name in [*names[::-1], f"data/{dump}/README.md"]
    ]
    files[f"/datasets/{pretrain.FINEWEB}/resolve/{sha}/{names[0]}"] = path.read_bytes()
    about = json.dumps(dict(info, id=pretrain.FINEWEB)).encode()
    files[f"/api/datasets/{pretrain.FINEWEB}"] = about
    files[f"/api/datasets/{pretrain.FINEWEB}/tree/{sha}/data%2F{dump}"] = json.dumps(tree).encode()
    files[f"/{LLAMA}/resolve/main/tokenizer.json"] = TEXT.encode()

    runs = [
        ["slimpajama", "--workers", "2", "--out", f"{tmp_path}/a"],
        ["fineweb", "--dump", dump, "--tokens", "500", "--out", f"{tmp_path}/b"],
        ["fineweb", "--dump", "CC-MAIN-2030-01", "--out", f"{tmp_path}/c"],
    ]
    code = (
        "import sys, data.prepare as p\nfor run in "
        + repr(runs)
        + ":\n try: p.main(run)\n except SystemExit: pass"
    )
    env = dict(
        os.environ, HF_ENDPOINT=serve(files), HF_HOME=f"{tmp_path}/hf", HF_HUB_DISABLE_TELEMETRY="1"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stderr.startswith(
        f"error: {pretrain.FINEWEB}: cannot list its files on the hub ("
    ), done.stderr
    assert (
        done.stderr.count("\n") == 1
        and "CC-MAIN-2030-01" in done.stderr
        and not (tmp_path / "c").exists()
    )
    for split, name in zip(("train", "val", "test"), slim):
        ids = np.fromfile(tmp_path / "a" / f"{split}.bin", np.uint16)
        assert ids.tolist() == slow_slimpajama(slim[name], False)
    assert read_meta(f"{tmp_path}/a")["source"] == f"{pretrain.SLIMPAJAMA}@{sha}"
    assert np.fromfile(tmp_path / "b" / "test.bin", np.uint16).tolist() == slow_fineweb(500)
    assert read_meta(f"{tmp_path}/b")["source"].startswith(
        f"{pretrain.FINEWEB}@{sha}, {dump}, sha256 "
    )
