"""Which split a file becomes: no held-out file is ever trained on, and prepare.py says what became
of each; zero-shot corpora with their splits to train on."""

import json

import numpy as np
import pytest
from conftest import make, needs_gpt2

from data.shards import announce, split_of
from data.tokenizer import load_tokenizer


@pytest.mark.parametrize("split, names", [
    ("test", ["gtest.jsonl", "test.jsonl", "d2p_prompts_test.jsonl", "TEST-00000-of-00001.parquet",
              "news.en.heldout-00000-of-00050", "test/0000.parquet", "train/my_tests.jsonl",
              "partial-test/0.parquet"]),
    ("val", ["valid.jsonl", "wiki.valid.raw", "dev.json", "validation/chunk1/a_holdout_0.jsonl.zst",
             "partial-validation/0000.parquet"]),
    ("train", ["a.jsonl", "train.jsonl", "train_latest.jsonl", "news.en-00001-of-00100",
               "train/chunk1/b.jsonl", "test_folder/a.jsonl", "evaluation_of_cats.jsonl"]),
])  # fmt: skip
def test_the_split_of_a_name(split, names):
    for name in names:
        assert split_of(f"/home/me/{name}") == split, name
        assert split_of(f"hub:me/data:c0ffee:{name}:") == split, name


PROBLEMS = [{"question": f"{i} + 1?", "answer": f"{i} + 1 is. #### {i + 1}"} for i in range(30)]


def write(path, records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_gtest_is_never_trained_on(tmp_path, capsys):
    files = [write(tmp_path / "train.jsonl", PROBLEMS[:20]), write(tmp_path / "gtest.jsonl",
             PROBLEMS[20:])]  # fmt: skip
    options = ["--tokenizer", "bpe", "--vocab_size", 300, "--wrap", 64, "--out", tmp_path / "gsm"]
    import data.prepare as prepare

    prepare.main(["gsm8k", *map(str, ["--input", *files, *options])])
    out = capsys.readouterr().out
    assert "train.jsonl: train, 20 records\n" in out and "gtest.jsonl: test, 10 records\n" in out
    meta = json.loads((tmp_path / "gsm" / "meta.json").read_text())
    rows = {split: sizes["tokens"] // 64 for split, sizes in meta["splits"].items()}
    assert rows == {"train": 38, "val": 2, "test": 20}  # two rows a problem
    assert len((tmp_path / "gsm" / "test.jsonl").read_text().splitlines()) == 10


def test_a_file_of_val_is_val(tmp_path, capsys):
    import data.prepare as prepare

    files = [write(tmp_path / f"{name}.jsonl", PROBLEMS[a : a + 10])
             for name, a in (("dev", 0), ("train", 10))]  # fmt: skip
    options = ["--tokenizer", "bpe", "--vocab_size", 300, "--wrap", 64, "--out", tmp_path / "gsm"]
    prepare.main(["gsm8k", *map(str, ["--input", *files, *options])])
    meta = json.loads((tmp_path / "gsm" / "meta.json").read_text())
    assert {s: sizes["tokens"] // 64 for s, sizes in meta["splits"].items()} == dict(
        train=20, val=20
    )


def test_sets_without_held_out_files_refuse_them(tmp_path, refuses):
    a, b = tmp_path / "a.txt", tmp_path / "mytest.txt"
    for path in (a, b):
        path.write_text("a text of some length. " * 40)
    words = "mytest.txt: test by its name, but text trains on every file"
    refuses(["text", "--tokenizer", "char", "--input", a, b], words)
    meta, _ = make("text", "--tokenizer", "char", "--input", b, "--out", tmp_path / "one")
    assert meta["splits"].keys() == {"train", "val", "test"}  # the user's only file
    records = write(tmp_path / "valid.jsonl", [{"text": "a"}])
    refuses(["openwebtext", "--input", records], "valid.jsonl: val by its name, but openwebtext")


def test_many_files_are_announced_in_one_line_per_split(capsys):
    names, splits = [f"{i}.jsonl" for i in range(30)], ["train"] * 28 + ["test"] * 2
    announce(names, splits, [5] * 30)
    assert (
        capsys.readouterr().out == "28 files: train, 140 documents\n2 files: test, 10 documents\n"
    )
    announce(names[:2], splits[:2], [5, 6])
    assert capsys.readouterr().out == "0.jsonl: train, 5 documents\n1.jsonl: train, 6 documents\n"


@needs_gpt2
def test_zero_shot_sets_to_train_on(tmp_path, capsys):
    """Each published split, detokenised; a set without val gets the last 5 % of train."""
    lines = {s: [f" = {s} {i} = \n" for i in range(40)] for s in ("train", "valid", "test")}
    files = [tmp_path / f"wiki.{split}.raw" for split in ("test", "valid", "train")]
    for path in files:
        path.write_text("".join(lines[path.name.split(".")[1]]))
    argv = ["wikitext2", "--train", "--wrap", 16, "--input"]
    meta, ids = make(*argv, *files, "--out", tmp_path / "wiki")
    out = capsys.readouterr().out
    assert "wiki.valid.raw: val, 40 documents" in out
    assert "python train.py owt_mdlm --data=" in out
    gpt2 = load_tokenizer({"kind": "gpt2"})
    for split, name in (("train", "train"), ("val", "valid"), ("test", "test")):
        rows = ids[split].reshape(-1, 16)
        text = gpt2.decode(np.concatenate(rows[:, 1:-1]).tolist())
        want = "".join(f" = {name} {i} =\n<|endoftext|>" for i in range(40))
        assert len(text) > 200 and want.startswith(text)
    argv[3] = 8
    meta, ids = make(*argv, files[2], files[0], "--out", tmp_path / "without")
    assert meta["splits"].keys() == {"train", "val", "test"}
    assert "train 38" in gpt2.decode(ids["val"].tolist())
    assert "train 38" not in gpt2.decode(ids["train"].tolist())


def test_zero_shot_sets_without_train_are_refused(tmp_path, refuses):
    path = tmp_path / "wiki.valid.raw"
    path.write_text("a\n" * 9)
    refuses(["wikitext2", "--train", "--input", path], "no file of train")
