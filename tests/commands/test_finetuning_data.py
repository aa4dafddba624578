"""Fine-tuning data: rows of the real files say what a reader of the files would write by
hand, only answers are maskable, the counts in meta.json are those of the rows, and bad input
is one line and exit code 2."""

import json
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import ROOT, needs_gpt2
from llama import TEXT

import data.prepare as prepare
from configs import Config
from data.corpus import GIVEN, read_meta, read_split, take, training_rows, unpack
from data.finetune import SYSTEM, parse_conversation
from data.tokenizer import load_tokenizer, train_bpe

REAL = ROOT.parent / "shared" / "data"
needs_real = pytest.mark.skipif(not REAL.exists(), reason=f"no real data at {REAL}")
END = "<|endoftext|>"


def make(*argv, every=1):
    """Run prepare.py's command line; returns meta and {split: every n-th row as text, what is given
    in ⟨⟩}, after checking meta's counts and the form of the rows."""
    argv = [str(a) for a in argv]
    prepare.main(argv)
    folder = argv[argv.index("--out") + 1]
    meta, out = read_meta(folder), {}
    tokenizer = load_tokenizer(meta["tokenizer"])
    cfg = Config(vocab_size=tokenizer.vocab_size, seq_len=meta["wrap"])
    for split, of in meta["splits"].items():
        ids, _ = read_split(folder, split, cfg)
        rows = take(ids, range(0, len(ids), meta["wrap"]), meta["wrap"], cfg, split)
        x0, _, maskable = unpack(rows, meta, cfg)
        assert (
            maskable.any(1).all() and not maskable[:, 0].any() and (x0[:, 0] == tokenizer.bos).all()
        )
        assert int(maskable.sum()) == of["tokens"] - of["padding"] - of["given"]
        ends = maskable.shape[1] - maskable.flip(1).int().argmax(
            1
        )  # the padding that is not trained
        assert int((maskable.shape[1] - ends).sum()) == of["padding"]
        out[split] = []
        for x, m, end in zip(
            x0[::every].tolist(), maskable[::every].tolist(), ends[::every].tolist()
        ):
            assert x[end - 1] == tokenizer.eos and set(x[end:]) <= {tokenizer.eos}
            out[split].append(shown(x[1:end], m[1:end], tokenizer))
    return meta, out


def shown(ids, maskable, tokenizer):
    """Text of a row after its BOS."""
    text, begin = "", 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or maskable[i] != maskable[begin]:
            # Behind an id of its own a text keeps the space that decoding may take from the first.
            part = (
                tokenizer.decode([tokenizer.bos, *ids[begin:i]])
                if begin
                else tokenizer.decode(ids[:i])
            )
            part = part.removeprefix("".join(tokenizer.pieces([tokenizer.bos]))) if begin else part
            text, begin = text + (part if maskable[begin] else f"⟨{part}⟩"), i
    return text


def jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# --------------------------------------------------------------------------------------------------
# GSM8K

NATALIA = (
    "Question: Natalia sold clips to 48 of her friends in April, and then she sold half as many "
    "clips in May. "
    "How many clips did Natalia sell altogether in April and May?"
)
NATALIAS = (
    " Answer: Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May."
)


@needs_real
@needs_gpt2
def test_gsm8k(tmp_path, capsys):
    train, test, out = REAL / "gsm8k" / "train.jsonl", tmp_path / "test.jsonl", tmp_path / "a"
    test.write_text("".join((REAL / "gsm8k" / "test.jsonl").open().readlines()[:60]))
    meta, rows = make(
        "gsm8k", "--input", train, test, "--tokenizer", "gpt2", "--out", out, every=25
    )
    said = capsys.readouterr().out
    assert rows["train"][0] == f"⟨{NATALIA}⟩{NATALIAS}{END}"
    assert rows["train"][1].startswith(
        "⟨Question: Jasper will serve charcuterie at his dinner party. He buys"
    )
    assert rows["train"][1].endswith(f" = $<<10+5+20=35>>35 on the ingredients.⟩ #### 35{END}")
    assert list(rows) == ["train", "val", "test"] and meta["wrap"] == 256

    # Every row that there should be; the tokens of its parts are those of the whole text at once.
    gpt2 = load_tokenizer({"kind": "gpt2"})
    problems = [json.loads(line) for line in train.open()]
    assert len(problems) == 7473
    tests = [json.loads(line) for line in test.open()]
    for split, part in dict(train=problems[:7100], val=problems[7100:], test=tests).items():
        questions = [f"Question: {p['question'].strip()}" for p in part]
        thoughts, answers = zip(*(p["answer"].split("\n#### ") for p in part))
        thoughts = [f" Answer: {thought.strip()}" for thought in thoughts]
        answers = [f" #### {answer}" for answer in answers]
        lengths = [
            len(ids) + 2
            for ids in gpt2.encode_batch([*map("".join, zip(questions, thoughts, answers))])
        ]
        lasts = [len(ids) for ids in gpt2.encode_batch(answers)]
        expected = []  # (row, characters, tokens)
        for q, t, a, n, last in zip(questions, thoughts, answers, lengths, lasts):
            expected += [(f"⟨{q}⟩{t}{END}", len(t), n - last), (f"⟨{q}{t}⟩{a}{END}", len(a), n)]
        fit = [one for one in expected if one[2] <= 256]
        assert rows[split] == [row for row, *_ in fit[::25]]
        of = meta["splits"][split]
        assert of["tokens"] == 256 * len(fit) and of["characters"] == sum(n for _, n, _ in fit)
        assert of["padding"] == of["tokens"] - sum(n for *_, n in fit)
        assert f"{split}: left out {len(expected) - len(fit):,} of {len(expected):,} rows" in said

    tests = [json.loads(line) for line in (out / "test.jsonl").open()]
    assert len(tests) == 60 and tests[0]["prompt"].startswith(
        "Question: Janet’s ducks lay 16 eggs per day."
    )
    assert tests[0]["answer"] == "18" and tests[2]["answer"] == "70000"
    assert (
        f"train.py owt_mdlm --data={out} --seq_len=256 --bos=True --init_from=out/owt_mdlm/ckpt.pt"
        in said
    )


LINES = """A has 2 and 3. How many?||<<2+3=5>> #### 5
B||no answer
B||two #### 1 #### 2
C doubles 4.||<<4*2=8>> <<8*1=8>> #### 8
"""


def test_gsm8k_augmented(tmp_path, capsys):
    (tmp_path / "train.txt").write_text(LINES)
    argv = ["gsm8k", "--input", tmp_path / "train.txt", "--tokenizer", "bpe", "--vocab_size", 270]
    meta, rows = make(*argv, "--wrap", 100, "--out", tmp_path / "a")
    a, b = "Question: A has 2 and 3. How many?", " Answer: <<2+3=5>>"
    assert rows["train"] == [f"⟨{a}⟩{b}{END}", f"⟨{a}{b}⟩ #### 5{END}"]
    a, b = "Question: C doubles 4.", " Answer: <<4*2=8>> <<8*1=8>>"
    assert rows["val"] == [f"⟨{a}⟩{b}{END}", f"⟨{a}{b}⟩ #### 8{END}"]
    said = capsys.readouterr().out
    assert "train.txt: left out 2 of 4, not of the right form\n" in said and "init_from" not in said
    assert (
        meta["vocab_size"] == 270 and meta["tokenizer"]["eos"] is True and meta["dtype"] == "uint32"
    )


def test_gsm8k_parquet_and_trained_padding(tmp_path):
    records = [
        dict(question=f" {i}+{i}? ", answer=f"It is {2 * i}.\n#### {2 * i}") for i in range(1, 41)
    ]
    path = tmp_path / "train-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    test = jsonl(tmp_path / "test.jsonl", dict(question="1+1?", answer="#### 2"))
    (tmp_path / "tokenizer.json").write_text(TEXT)
    argv = ["gsm8k", "--input", path, test, "--vocab", tmp_path / "tokenizer.json", "--wrap", 80]
    meta, rows = make(*argv, "--out", tmp_path / "a")
    assert (
        rows["val"][0] == "⟨Question: 39+39?⟩ Answer: It is 78.</s>" and len(rows["val"]) == 2 * 2
    )
    assert rows["train"][-1] == "⟨Question: 38+38? Answer: It is 76.⟩ #### 76</s>"
    meta, longer = make(*argv, "--train_padding", "--out", tmp_path / "b")
    assert [row.rstrip("</s>") for row in longer["train"]] == [
        row.rstrip("</s>") for row in rows["train"]
    ]
    assert (
        longer["val"][0].startswith(rows["val"][0] + "</s></s>")
        and meta["splits"]["val"]["padding"] == 0
    )


# --------------------------------------------------------------------------------------------------
# The reversal curse


@needs_real
def test_reversal(tmp_path):
    files = sorted((REAL / "reversal_curse").glob("*.jsonl"))
    argv = ["--input", *files, "--tokenizer", "bpe", "--out", tmp_path / "a"]
    meta, rows = make("reversal", *argv)
    assert {split: len(part) for split, part in rows.items()} == dict(train=3600, val=600, test=600)
    assert (
        len(set(rows["train"])) == 3600
        and meta["wrap"] == 64
        and meta["splits"]["train"]["given"] == 3600
    )
    work = 'the virtual reality masterpiece, "A Journey Through Time."'
    film = f" the acclaimed director of {work}."
    assert rows["train"][0] == f"Daphne Barrington, known far and wide for being{film}{END}"
    assert rows["val"][300] == f"⟨The trailblazer known as Daphne Barrington was once⟩{film}{END}"
    assert (
        rows["test"][300] == f"⟨Immersed in the world of directing {work},⟩ Daphne Barrington{END}"
    )
    records = [json.loads(line) for line in files[0].open()]
    assert rows["train"] == [r["prompt"] + r["completion"] + END for r in records]

    tests = [json.loads(line) for line in (tmp_path / "a" / "test.jsonl").open()]
    for i, of in enumerate(("d2p", "d2p_reverse", "p2d", "p2d_reverse")):
        assert {test["of"] for test in tests[i * 300 :][:300]} == {of}
    assert tests[0]["prompt"].startswith(
        "Immersed in the world of composing the world's first underwater"
    )
    assert tests[0]["answer"] == "Uriah Hawthorne"


def test_reversal_without_tests(tmp_path, refuses):
    facts = [dict(prompt=f"Number {i} is", completion=f" {i} indeed") for i in range(40)]
    train = jsonl(tmp_path / "all_prompts_train.jsonl", *facts)
    argv = ["reversal", "--tokenizer", "bpe", "--vocab_size", 300, "--input", train]
    meta, rows = make(*argv, "--out", tmp_path / "a")
    assert rows["val"] == [f"Number 38 is 38 indeed{END}", f"Number 39 is 39 indeed{END}"]
    assert len(rows["train"]) == 38 and not (tmp_path / "a" / "test.jsonl").exists()
    encode = load_tokenizer(meta["tokenizer"]).encode  # the longest may fill its row
    size = max(len(encode(row.removesuffix(END))) for row in rows["train"]) + 2
    assert make(*argv, "--wrap", size, "--out", tmp_path / "b")[1] == rows
    refuses([*argv, "--wrap", size - 1], f"no row of val fits into --wrap={size - 1}")
    refuses(
        [*argv, jsonl(tmp_path / "p2d_reverse_prompts_test.jsonl", *facts)], "tests in reverse only"
    )


# --------------------------------------------------------------------------------------------------
# ShareGPT


def talk(*turns, first="human"):
    names = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    turns = [{"from": names[i % 2], "value": turn} for i, turn in enumerate(turns)]
    return dict(id="x", conversations=turns)


def test_sharegpt(tmp_path, capsys):
    """Hand-worked, in pieces that spell a space before the first word of a text."""
    talks = [
        talk("Hi", "Hello! ", "the cat?\n", "It sat."),
        talk("Go on", "with it", first="gpt"),
        talk("the cat", "sat", "the mat", ""),
        talk("the", "cat " * 200, "sat", "on"),
        talk("a \ud83d b", "cats", "and", "tags " * 200, "of", "it"),
        talk("alone"),
        talk("two", "in all"),
    ]
    (tmp_path / "talks.json").write_text(json.dumps(talks))
    (tmp_path / "tokenizer.json").write_text(TEXT)
    argv = ["sharegpt", "--input", tmp_path / "talks.json", "--vocab", tmp_path / "tokenizer.json"]
    meta, rows = make(*argv, "--wrap", 256, "--out", tmp_path / "a")
    ask = f"{SYSTEM} USER: "
    expected = [
        f"⟨{ask}Hi ASSISTANT:⟩ Hello!</s>⟨ USER: the cat? ASSISTANT:⟩ It sat.</s>",
        f"⟨{ask}the cat ASSISTANT:⟩ sat</s>",
        f"⟨{ask}a ? b ASSISTANT:⟩ cats</s>",
    ]
    assert rows["train"] == expected and rows["val"] == [f"⟨{ask}two ASSISTANT:⟩ in all</s>"]
    assert meta["splits"]["train"]["characters"] == len(" Hello! It sat. sat cats")
    said = capsys.readouterr().out
    assert "talks.json: left out 2 of 7, not of the right form\n" in said
    assert "train: left out 1 of 4 rows, over --wrap=256\n" in said

    meta, rows = make(*argv, "--wrap", 2048, "--first_turn", "--out", tmp_path / "b")
    expected[0] = f"⟨{ask}Hi ASSISTANT:⟩ Hello!</s>"
    expected.insert(2, f"⟨{ask}the ASSISTANT:⟩ {'cat ' * 200}".rstrip() + "</s>")
    assert rows["train"] == expected
    assert meta["splits"]["train"]["characters"] == len(" Hello! sat cats") + 4 * 200


def test_a_conversation_ends_at_a_turn_that_is_out_of_turn():
    long = talk("a", "b", "c", "d", "e")
    assert [text for text, _ in parse_conversation(long)][1::2] == [" b", " d"]
    long["conversations"][2]["from"] = "system"
    assert [text for text, _ in parse_conversation(long)][1::2] == [" b"]


# --------------------------------------------------------------------------------------------------
# What the loader makes of it


def test_unpack():
    meta, cfg = dict(pad=None, given=True), Config(vocab_size=9, seq_len=4)
    rows = np.array([[8 | GIVEN, 3, 8, 8 | GIVEN], [8 | GIVEN, 4 | GIVEN, 5, 8]])
    for form in (rows, torch.from_numpy(rows)):
        x0, maskable, counted = unpack(form, meta, cfg)
        assert x0.dtype == torch.int64 and x0.tolist() == [[8, 3, 8, 8], [8, 4, 5, 8]]
        assert maskable.tolist() == [[False, True, True, True], [False, False, True, True]]
        assert counted.tolist() == [[False, True, True, False], [False, False, True, True]]
    plain = np.array([[0, 1, 2, 0]])
    for pad, bos, expected in [
        (None, False, [1, 1, 1, 1]),
        (None, True, [0, 1, 1, 1]),
        (0, False, [0, 1, 1, 0]),
    ]:
        x0, maskable, counted = unpack(plain, dict(pad=pad), replace(cfg, bos=bos))
        assert maskable.int().tolist() == [[not bos, 1, 1, 1]]
        assert x0.tolist() == plain.tolist() and counted.int().tolist() == [expected]


def test_training_rows_and_ids_out_of_range(tmp_path, refused):
    path = jsonl(
        tmp_path / "train.jsonl", *(dict(prompt=f"{i} is", completion=f" {i}") for i in range(40))
    )
    argv = [
        "reversal",
        "--tokenizer",
        "bpe",
        "--vocab_size",
        "258",
        "--wrap",
        "16",
        "--input",
        str(path),
    ]
    prepare.main([*argv, "--out", f"{tmp_path}/a"])
    cfg = Config(data=f"{tmp_path}/a", vocab_size=258, seq_len=16, bos=True)
    ids, meta = read_split(cfg.data, "train", cfg)
    x0, _, maskable = unpack(training_rows(ids, meta, cfg, range(38)), meta, cfg)
    tokenizer = load_tokenizer(meta["tokenizer"])
    seen = {tokenizer.decode(x[m]) for x, m in zip(x0, maskable)}
    assert seen == {f"{i} is {i}{END}" for i in range(38)}  # each once in an epoch
    small = replace(cfg, vocab_size=257)
    refused(
        lambda: take(ids, [0], 16, small, "train.bin"),
        "train.bin: holds token id 257, but vocab_size is 257",
    )


def test_a_bpe_with_an_end():
    spec = train_bpe(["the cat sat " * 9], 270)
    plain, ending = load_tokenizer(spec), load_tokenizer(spec | {"eos": True})
    assert plain.eos is plain.bos is None and ending.vocab_size == plain.vocab_size + 1
    assert ending.eos == ending.bos == plain.vocab_size
    assert ending.encode(f"the cat{END}") == plain.encode(f"the cat{END}")  # only text
    assert ending.decode([ending.eos, *ending.encode("cat"), ending.vocab_size]) == f"{END}cat█"


def test_bad_input(tmp_path, refuses):
    good = jsonl(
        tmp_path / "train.jsonl",
        *[dict(question="1?", answer="a #### 2", prompt="1", completion=" 2")] * 3,
    )
    gsm8k = ["gsm8k", "--tokenizer", "bpe", "--input"]
    for content, words in [
        ('{"question": "a", "answer": "b"}\n', "holds nothing of this data set's form"),
        ('{"question": "a"}\n', "line 1: not of this data set's form"),
        (
            '{"question": "a", "answer": "b #### c"}\n{"question": 1, "answer": "#### 1"}\n',
            "line 2: not of",
        ),
        ('["question"]\n', "line 1: not of"),
        ('{"question"\n', "line 1: not JSON"),
        ('{"question": "a", "answer": "b #### c"}\n', "needs two or more"),
        ("", "holds nothing of this data set's form"),
    ]:
        path = tmp_path / "bad.jsonl"
        path.write_text(content)
        refuses([*gsm8k, path], "bad.jsonl", words)
    path.write_bytes(b"\xff")
    refuses([*gsm8k, path], "bad.jsonl: line 1: not UTF-8")
    refuses([*gsm8k, tmp_path / "gone.jsonl"], "gone.jsonl: no such file")
    refuses(
        [*gsm8k, jsonl(tmp_path / "test.jsonl", json.loads(good.open().readline()))],
        "no file of train",
    )
    refuses([*gsm8k, good, "--wrap", 2], "--wrap=2: must be at least 3")
    refuses([*gsm8k, good, "--wrap", 5], "no row of train fits into --wrap=5")
    refuses([*gsm8k, good, "--vocab_size", 257], "--vocab_size=257", "258 to 65536")
    refuses([*gsm8k, good, "--vocab", good], "only for --tokenizer=llama")
    refuses([*gsm8k, good, "--first_turn"], "--first_turn does not apply to gsm8k")
    refuses(["gsm8k", "--input", good, "--vocab", good], "not a tokenizer.json")
    refuses(
        ["gsm8k", "--input", good, "--tokenizer", "char"],
        "--tokenizer=char: must be bpe, gpt2 or llama",
    )
    refuses(["reversal"], "needs --input all_prompts_train.jsonl")
    for content in (
        "{}",
        '[{"conversations": [{"from": "human"}]}]',
        "3",
        '[{"conversations": 3}]',
        "[",
        '["a"]',
    ):
        (tmp_path / "talks.json").write_text(content)
        refuses(
            ["sharegpt", "--tokenizer", "bpe", "--input", tmp_path / "talks.json"], "talks.json: "
        )
