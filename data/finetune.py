"""Texts that are in part given -> rows of one length, [BOS prompt | answer EOS | padding], to fine-tune on.

An item is a list of (text, trained) in order: a prompt is given, an answer is trained and ends with EOS. Its
texts are encoded one by one and join to one text, with one BOS: a space begins every text but the first, so that
no token could reach over a border. A model that goes on from its own ids sees what it was trained on. (SMDM
has a BOS in front of every part but, when it generates, none inside of the text that it goes on from.)

Padding is EOS and not trained: the model always sees it and with it where the answer ends, so that generation has
to be told. With train_padding it is trained and counted, as in SMDM: the model learns where to end, at the
price that most of what it learns is EOS.
"""

import json
import re
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import fail, one_line
from data.corpus import GIVEN, finish, partial_of
from data.shards import fetch, find_shards, name_of
from data.tokenizer import tokenizer_of, train_bpe

GSM8K = "openai/gsm8k"
SHAREGPT = "anon8231489123/ShareGPT_Vicuna_unfiltered"
SYSTEM = (  # of the Vicuna v1.1 template
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


# ---------------------------------------------------------------------------------------------------------
# The data sets


def gsm8k(
    folder, input=(), tokenizer="llama", vocab=None, vocab_size=None, wrap=256, train_padding=False
):
    """Grade-school problems, two rows of each as in SMDM: question -> thought, question and thought -> answer.

    input: .jsonl or parquet with question and answer, as published, or lines question||thought #### answer in
    .txt, SMDM's augmented training data; files with test in their name are the split test, and test.jsonl has
    its prompts and answers as text. val is the last 5 % of the training problems. Not in the data: rows over
    wrap, and what has not just one ####."""
    source, shards = find_shards(input, GSM8K, r"main/(train|test)-.*\.parquet")
    train, tests = read(shards, problem)
    tests = [one for _, problems in tests for one in problems]
    splits = last_to_val(source, train) | ({"test": tests} if tests else {})
    texts = [
        dict(prompt=question, answer=answer.removeprefix(" #### ")) for question, _, answer in tests
    ]
    splits = {
        split: [item for one in part for item in two_items(*one)] for split, part in splits.items()
    }
    return write(folder, source, splits, texts, tokenizer, vocab, vocab_size, wrap, train_padding)


def problem(record):
    """The three texts of a problem, or None."""
    if isinstance(record, str):
        question, *rest = record.split("||")
        rest = rest[0] if len(rest) == 1 else ""
    else:
        question, rest = record["question"], record["answer"]
    thought, *answer = rest.split("####")
    if len(answer) == 1:
        return (
            f"Question: {question.strip()}",
            f" Answer: {thought.strip()}",
            f" #### {answer[0].strip()}",
        )


def two_items(question, thought, answer):
    yield [(question, False), (thought, True)]
    yield [(question, False), (thought, False), (answer, True)]


def sharegpt(
    folder, input=(), tokenizer="llama", vocab=None, vocab_size=None, wrap=2048, train_padding=False,
    first_turn=False,
):  # fmt: skip
    """Conversations with a chat assistant in the template of Vicuna v1.1, every answer trained; first_turn: only
    the first question and answer, as in SMDM.

    input: JSON, a list of {"conversations": [{"from": "human" or "gpt", "value": text}, ...]}. A conversation ends
    before the first turn that is empty or out of turn, or whose answer ends behind wrap. val is the last 5 %."""
    source, shards = find_shards(
        input, SHAREGPT, r"ShareGPT_V3_unfiltered_cleaned_split_no_imsorry\.json"
    )
    train, tests = read(shards, lambda record: conversation(record, first_turn))
    splits = last_to_val(source, train) | (
        {"test": sum((items for _, items in tests), [])} if tests else {}
    )
    return write(folder, source, splits, [], tokenizer, vocab, vocab_size, wrap, train_padding)


def asked(question, first):
    """What is given before an answer: the first question of a conversation, or a later one."""
    return f"{SYSTEM if first else ''} USER: {question} ASSISTANT:"


def conversation(record, first_turn=False):
    turns, item = [(turn["from"], turn["value"].strip()) for turn in record["conversations"]], []
    for (asks, question), (answers, answer) in zip(turns[::2], turns[1::2]):
        if (asks, answers) != ("human", "gpt") or not question or not answer or first_turn and item:
            break
        item += [(asked(question, first=not item), False), (f" {answer}", True)]
    return item or None


def reversal(
    folder, input=(), tokenizer="llama", vocab=None, vocab_size=None, wrap=64, train_padding=False
):
    """The reversal curse: facts about people who do not exist, each from name to description or the other way.
    As in SMDM a fact is trained as a whole: prompt and completion are one text, and only BOS is given.

    input: all_prompts_train.jsonl and any of the *_prompts_test.jsonl from data/reverse_experiments/
    june_version_7921032488 of github.com/lukasberglund/reversal_curse. The tests ask for the trained facts in
    other words, so nothing is held out from training: val is the tests in the direction that was trained, test
    those in reverse, with given prompts; test.jsonl has them all as text, each with its file's name in "of"."""
    if not input:
        fail("reversal: needs --input all_prompts_train.jsonl [*_prompts_test.jsonl]")
    source, shards = find_shards(input, None, None)
    facts, tests = read(shards, lambda record: (record["prompt"] + "", record["completion"] + ""))
    splits = {"train": facts} if tests else last_to_val(source, facts)
    splits = {
        split: [[(prompt + end, True)] for prompt, end in part] for split, part in splits.items()
    }
    for name, pairs in tests:
        split = splits.setdefault("test" if "reverse" in name else "val", [])
        split += [[(prompt, False), (completion, True)] for prompt, completion in pairs]
    if "val" not in splits:
        fail(
            f"{source}: has tests in reverse only; give those in the direction that is trained, too"
        )
    texts = [
        dict(prompt=prompt, answer=completion.strip(), of=name.removesuffix("_prompts_test.jsonl"))
        for name, pairs in tests
        for prompt, completion in pairs
    ]
    return write(folder, source, splits, texts, tokenizer, vocab, vocab_size, wrap, train_padding)


# ---------------------------------------------------------------------------------------------------------
# Files -> items


def read(shards, parse):
    """What `parse` makes of the records of all training files, and [(file name, the same)] of the test files."""
    train, tests = [], []
    for shard in shards:
        name, items = Path(name_of(shard)).name, []
        try:
            for number, record in enumerate(records(fetch(shard)[0]), 1):
                try:
                    items.append(parse(record))
                except (KeyError, TypeError, AttributeError):
                    raise ValueError(f"record {number}: not of this data set's form") from None
        except Exception as e:  # files and the hub: no common base
            fail(f"{name_of(shard)}: {one_line(e)}")
        kept = [item for item in items if item is not None]
        if not kept:
            fail(f"{name_of(shard)}: holds nothing of this data set's form")
        if len(kept) < len(items):
            print(
                f"{name}: left out {len(items) - len(kept):,} of {len(items):,}, not of the right form"
            )
        if "test" in re.split("[-_.]", name):
            tests.append((name, kept))
        else:
            train += kept
    return train, tests


def records(path):
    """Those of a parquet, .json or .jsonl file; lines of any other."""
    with open(path, "rb") as f:
        if f.read(4) == b"PAR1":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
    text, kind, out = Path(path).read_bytes().decode(), Path(path).suffix, []
    if kind == ".json":
        return [whole_characters(record) for record in json.loads(text)]
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        try:
            out.append(whole_characters(json.loads(line)) if kind == ".jsonl" else line)
        except ValueError:
            raise ValueError(f"line {number}: not JSON") from None
    return out


def whole_characters(record):
    """With ? for every half of a surrogate pair, which JSON can hold and UTF-8 cannot."""
    return json.loads(json.dumps(record, ensure_ascii=False).encode(errors="replace"))


def last_to_val(source, items):
    n = len(items) - max(1, len(items) // 20)
    if n < 1:
        fail(f"{source}: needs two or more to train on, the last 5 % of which are val")
    return {"train": items[:n], "val": items[n:]}


# ---------------------------------------------------------------------------------------------------------
# Items -> rows


def write(folder, source, splits, tests, tokenizer, vocab, vocab_size, wrap, train_padding):
    """Write the items of each split in rows, and `tests`, what to generate answers to, into test.jsonl."""
    if wrap < 3:
        fail(f"--wrap={wrap}: must be at least 3: BOS, a token, EOS")
    spec = vocabulary(tokenizer, vocab, vocab_size, splits["train"])
    tokenizer, characters = tokenizer_of(spec), {}
    for split, items in splits.items():
        rows = n = 0
        with open(partial_of(folder) / f"{split}.bin", "wb") as f:
            for i in tqdm(range(0, len(items), 1000), desc=split, leave=False, disable=None):
                for ids, trained in rows_of(items[i : i + 1000], tokenizer, wrap):
                    fill = tokenizer.eos if train_padding else tokenizer.eos | GIVEN
                    np.array(ids + [fill] * (wrap - len(ids)), np.uint32).tofile(f)
                    rows, n = rows + 1, n + trained
        if not rows:
            fail(f"{source}: no row of {split} fits into --wrap={wrap}")
        if rows < len(items):
            print(
                f"{split}: left out {len(items) - rows:,} of {len(items):,} rows, over --wrap={wrap}"
            )
        characters[split] = n
    if tests:
        lines = [json.dumps(test, ensure_ascii=False) + "\n" for test in tests]
        (partial_of(folder) / "test.jsonl").write_text("".join(lines))
    return finish(folder, source, spec, tokenizer.vocab_size, characters, wrap, given=True)


def vocabulary(tokenizer, vocab, vocab_size, items):
    """The spec of a tokenizer that has an EOS; bpe is trained on the items."""
    from data.prepare import llama_vocabulary  # not at the top: it imports this file

    if tokenizer not in ("bpe", "gpt2", "llama"):
        fail(f"--tokenizer={tokenizer}: must be bpe, gpt2 or llama")
    if vocab is not None and tokenizer != "llama":
        fail(f"--vocab={vocab}: only for --tokenizer=llama")
    if vocab_size is not None and (tokenizer != "bpe" or not 257 < vocab_size <= 2**16):
        fail(f"--vocab_size={vocab_size}: only for --tokenizer=bpe, 258 to {2**16}")
    if tokenizer == "llama":
        return llama_vocabulary(vocab)
    if tokenizer == "gpt2":
        return {"kind": "gpt2"}
    return train_bpe((text for item in items for text, _ in item), (vocab_size or 2048) - 1) | {
        "eos": True
    }


def rows_of(items, tokenizer, wrap):
    """(ids, characters of its answers) of every item, up to its last answer that ends within wrap, if any does."""
    firsts = tokenizer.encode_batch([item[0][0] for item in items])
    others = iter(
        tokenizer.encode_batch([text for item in items for text, _ in item[1:]], prefix="")
    )
    for item, first in zip(items, firsts):
        row, answers, whole = [tokenizer.bos | GIVEN], 0, (0, 0)
        for (text, trained), ids in zip(item, [first, *(next(others) for _ in item[1:])]):
            row += [*ids, tokenizer.eos] if trained else [i | GIVEN for i in ids]
            if trained and len(row) <= wrap:
                answers += len(text)
                whole = len(row), answers
        if whole[0]:
            yield row[: whole[0]], whole[1]
