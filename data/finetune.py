"""Texts with given parts -> rows to fine-tune on, [BOS prompt | answer EOS | padding].

An item is a list of (text, trained) in order: a prompt is given, an answer is trained and ends with
EOS. Its texts are encoded one by one and join to one text with one BOS; every text but the first
begins with a space, so no token could cross a border. A model that continues its own ids sees
what it was trained on. (SMDM puts a BOS before every part, but generates without the inner ones.)

Padding is EOS and not trained: the model always sees where the answer ends, so generation needs the
length. With train_padding it is trained and counted, as in SMDM: the model learns where to end, but
learns mainly EOS.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np

from common import fail, one_line, progress
from data.corpus import GIVEN, finish, partial_of
from data.readers import read_records, report
from data.shards import fetch, find_shards, name_of, split_of
from data.tokenizer import llama_vocabulary, tokenizer_of, train_bpe

GSM8K = "openai/gsm8k"
SHAREGPT = "anon8231489123/ShareGPT_Vicuna_unfiltered"
SYSTEM = (  # of the Vicuna v1.1 template
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


# --------------------------------------------------------------------------------------------------
# The data sets


def gsm8k(
    folder, input=(), tokenizer="llama", vocab=None, vocab_size=None, wrap=256, train_padding=False
):
    """Grade-school problems, two rows of each as in SMDM: question -> thought, then question and
    thought -> answer.

    input: .jsonl or parquet with question and answer, as published, or .txt with lines
    question||thought #### answer, SMDM's augmented training data. A file's split is that of its
    name (`split_of`); test.jsonl has the prompts and answers of the split test as text. Without a
    file of val, it is the last 5 % of the training problems. Left out: rows over wrap, and answers
    without exactly one ####."""
    check_options(tokenizer, vocab, vocab_size, wrap)
    source, shards = find_shards(input, GSM8K, r"main/(train|test)-.*\.parquet")
    problems = join_files(source, read_items(shards, parse_problem))
    texts = [
        dict(prompt=question, answer=answer.removeprefix(" #### "))
        for question, _, answer in problems.get("test", [])
    ]
    splits = {
        split: [item for problem in part for item in make_items(*problem)]
        for split, part in problems.items()
    }
    spec = choose_vocabulary(tokenizer, vocab, vocab_size, splits["train"])
    return write_rows(folder, source, spec, splits, texts, wrap, train_padding)


def parse_problem(record):
    """(question, thought, answer) of a problem, or None."""
    if isinstance(record, str):
        question, *rest = record.split("||")
        rest = rest[0] if len(rest) == 1 else ""
    else:
        question, rest = record["question"], record["answer"]
    thought, *answer = rest.split("####")
    if len(answer) != 1:
        return None
    texts = f"Question: {question.strip()}", f" Answer: {thought.strip()}"
    return *texts, f" #### {answer[0].strip()}"


def make_items(question, thought, answer):
    yield [(question, False), (thought, True)]
    yield [(question, False), (thought, False), (answer, True)]


def sharegpt(
    folder, input=(), tokenizer="llama", vocab=None, vocab_size=None, wrap=2048,
    train_padding=False, first_turn=False,
):  # fmt: skip
    """Conversations with a chat assistant in the template of Vicuna v1.1, every answer trained;
    first_turn: only the first question and answer, as in SMDM.

    input: JSON, a list of {"conversations": [{"from": "human" or "gpt", "value": text}, ...]}. A
    conversation ends before the first turn that is empty or out of turn, or whose answer ends
    beyond wrap. Without a file of val, it is the last 5 %."""
    check_options(tokenizer, vocab, vocab_size, wrap)
    pattern = r"ShareGPT_V3_unfiltered_cleaned_split_no_imsorry\.json"
    source, shards = find_shards(input, SHAREGPT, pattern)
    files = read_items(shards, lambda record: parse_conversation(record, first_turn))
    splits = join_files(source, files)
    spec = choose_vocabulary(tokenizer, vocab, vocab_size, splits["train"])
    return write_rows(folder, source, spec, splits, [], wrap, train_padding)


def format_question(question, first):
    """The given text before an answer: with the system's text before the first question."""
    return f"{SYSTEM if first else ''} USER: {question} ASSISTANT:"


def parse_conversation(record, first_turn=False):
    turns, item = [(turn["from"], turn["value"].strip()) for turn in record["conversations"]], []
    for (asks, question), (answers, answer) in zip(turns[::2], turns[1::2]):
        if (asks, answers) != ("human", "gpt") or not question or not answer or first_turn and item:
            break
        item += [(format_question(question, first=not item), False), (f" {answer}", True)]
    return item or None


def reversal(
    folder, input=(), tokenizer="llama", vocab=None, vocab_size=None, wrap=64, train_padding=False
):
    """The reversal curse: facts about invented people, each from name to description or the other
    way. As in SMDM a fact is trained as a whole: prompt and completion are one text, and only BOS
    is given.

    input: all_prompts_train.jsonl and any of the *_prompts_test.jsonl from
    data/reverse_experiments/june_version_7921032488 of github.com/lukasberglund/reversal_curse.
    The tests state the trained facts in other words, so nothing is held out: val is the tests in
    the trained direction, test those in reverse, with given prompts. test.jsonl has them all as
    text, each with its file's name in "of"."""
    if not input:
        fail("reversal: needs --input all_prompts_train.jsonl [*_prompts_test.jsonl]")
    check_options(tokenizer, vocab, vocab_size, wrap)
    source, shards = find_shards(input, None, None)
    held_out = lambda shard: "test" if "reverse" in Path(shard).name else "val"
    files = read_items(
        shards, lambda r: (r["prompt"] + "", r["completion"] + ""),
        lambda shard: "train" if split_of(shard) == "train" else held_out(shard),
    )  # fmt: skip
    facts = [fact for _, split, items in files for fact in items if split == "train"]
    tests = [file for file in files if file[1] != "train"]
    splits = {"train": facts} if tests else split_off_val(source, facts)
    for split, part in splits.items():
        splits[split] = [[(prompt + completion, True)] for prompt, completion in part]
    texts = []
    for name, split, pairs in tests:
        splits[split] = splits.get(split, []) + [
            [(prompt, False), (completion, True)] for prompt, completion in pairs
        ]
        about = name.removesuffix("_prompts_test.jsonl")
        texts += [dict(prompt=p, answer=c.strip(), of=about) for p, c in pairs]
    if "val" not in splits:
        fail(f"{source}: has tests in reverse only; add those in the direction that is trained")
    spec = choose_vocabulary(tokenizer, vocab, vocab_size, splits["train"])
    return write_rows(folder, source, spec, splits, texts, wrap, train_padding)


# --------------------------------------------------------------------------------------------------
# Files -> items


def read_items(shards, parse, split_of=split_of):
    """[(file name, split, parse(record) of its records)] of all files; a record is left out if that
    is None. Prints what became of each file."""
    files = []
    for shard in shards:
        name, items, notes = Path(name_of(shard)).name, [], Counter()
        try:
            for place, record in read_records(fetch(shard)[0], notes=notes):
                try:
                    items.append(parse(record))
                except (KeyError, TypeError, AttributeError):
                    raise ValueError(f"{place}: not of this data set's form") from None
        except Exception as e:  # files and the hub: no common base
            fail(f"{name_of(shard)}: {one_line(e)}")
        kept = [item for item in items if item is not None]
        if not kept:
            fail(f"{name_of(shard)}: holds nothing of this data set's form")
        report(name, notes)
        if skipped := len(items) - len(kept):
            print(f"{name}: left out {skipped:,} of {len(items):,}, not of the right form")
        files.append((name, split_of(shard), kept))
        print(f"{name}: {split_of(shard)}, {len(kept):,} records")
    return files


def join_files(source, files):
    """{split: the items of its files}; without a file of val, it is split off train."""
    splits = {}
    for _, split, items in files:
        splits[split] = splits.get(split, []) + items
    if not splits.get("train"):
        fail(f"{source}: no file of train; a file's split is that of its name")
    if "val" not in splits:
        splits |= split_off_val(source, splits["train"])
    return {split: splits[split] for split in ("train", "val", "test") if split in splits}


def split_off_val(source, items):
    n = len(items) - max(1, len(items) // 20)
    if n < 1:
        fail(f"{source}: needs two or more to train on, the last 5 % of which are val")
    return {"train": items[:n], "val": items[n:]}


# --------------------------------------------------------------------------------------------------
# Items -> rows


def check_options(tokenizer, vocab, vocab_size, wrap):
    if tokenizer not in ("bpe", "gpt2", "llama"):
        fail(f"--tokenizer={tokenizer}: must be bpe, gpt2 or llama")
    if vocab is not None and tokenizer != "llama":
        fail(f"--vocab={vocab}: only for --tokenizer=llama")
    if vocab_size is not None and (tokenizer != "bpe" or not 257 < vocab_size <= 2**16):
        fail(f"--vocab_size={vocab_size}: only for --tokenizer=bpe, 258 to {2**16}")
    if wrap < 3:
        fail(f"--wrap={wrap}: must be at least 3: BOS, a token, EOS")


def choose_vocabulary(tokenizer, vocab, vocab_size, items):
    """The spec of a tokenizer that has an EOS; bpe is trained on the items."""
    if tokenizer == "llama":
        return llama_vocabulary(vocab)
    if tokenizer == "gpt2":
        return {"kind": "gpt2"}
    texts = (text for item in items for text, _ in item)
    return train_bpe(texts, (vocab_size or 2048) - 1) | {"eos": True}


def write_rows(folder, source, spec, splits, tests, wrap, train_padding):
    """Write each split's items in rows, and `tests`, prompts with answers, into test.jsonl."""
    tokenizer, characters = tokenizer_of(spec), {}
    padding = tokenizer.eos if train_padding else tokenizer.eos | GIVEN
    for split, items in splits.items():
        rows = n = 0
        with open(partial_of(folder) / f"{split}.bin", "wb") as f:
            for i in progress(range(0, len(items), 1000), desc=split):
                for ids, trained in make_rows(items[i : i + 1000], tokenizer, wrap):
                    np.array(ids + [padding] * (wrap - len(ids)), np.uint32).tofile(f)
                    rows, n = rows + 1, n + trained
        if not rows:
            fail(f"{source}: no row of {split} fits into --wrap={wrap}")
        if long := len(items) - rows:
            print(f"{split}: left out {long:,} of {len(items):,} rows, over --wrap={wrap}")
        characters[split] = n
    if tests:
        lines = [json.dumps(test, ensure_ascii=False) + "\n" for test in tests]
        (partial_of(folder) / "test.jsonl").write_text("".join(lines), encoding="utf-8")
    return finish(folder, source, spec, tokenizer.vocab_size, characters, wrap, given=True)


def make_rows(items, tokenizer, wrap):
    """(ids, characters of its answers) of every item, up to its last answer that ends within wrap;
    nothing for an item without one."""
    firsts = tokenizer.encode_batch([item[0][0] for item in items])
    later = [text for item in items for text, _ in item[1:]]
    others = iter(tokenizer.encode_batch(later, prefix=""))
    for item, first in zip(items, firsts):
        row, answers, whole = [tokenizer.bos | GIVEN], 0, (0, 0)
        for (text, trained), ids in zip(item, [first, *(next(others) for _ in item[1:])]):
            row += [*ids, tokenizer.eos] if trained else [i | GIVEN for i in ids]
            if trained and len(row) <= wrap:
                answers += len(text)
                whole = len(row), answers
        if whole[0]:
            yield row[: whole[0]], whole[1]
