"""tasks.answer with the exact network of its training rows, which answers only what it was trained
on: prompts, thoughts and turns must be joined as in data/finetune.py. Files must be FastChat's, and
those of a killed run equal to those of a whole one."""

import ast
import json
import math
import multiprocessing
import os
import re
import signal
import warnings
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from conftest import SHARED, refused, save, tiny_run
from llama import OURS

import train
from configs import Config, as_ar
from data.checkpoints import load
from data.corpus import read_split, take, unpack
from data.finetune import SYSTEM
from data.prepare import prepare
from data.tokenizer import load_tokenizer, train_bpe
from samplers import OPTIONS, SAMPLERS, default_options
from tasks import answer
from tasks.answer import complete, converse
from tasks.scoring import DIRECTIONS, character_bleu, contains, is_right

REAL_QUESTIONS = SHARED / "data" / "mt_bench" / "question.jsonl"


class Memory(torch.nn.Module):
    """The exact network of N equally likely rows x0 (N, L) to fine-tune on, whose `maskable` (N, L)
    was masked at a uniform t. Rows that cannot have become the canvas have no weight; if none can,
    the prediction is uniform."""

    def __init__(self, x0, maskable, spec, cfg):
        super().__init__()
        self.rows, self.maskable, self.cfg, self.tokenizer, self.step = x0, maskable, cfg, spec, 5
        self.weight, self.blocks = torch.nn.Parameter(x0.double()), []
        self.one_hot = torch.nn.functional.one_hot(x0, cfg.vocab_size).double()

    def forward(self, x, t, at):
        masked = (x == self.cfg.mask_id)[:, None]
        possible = torch.where(masked, self.maskable, x[:, None] == self.rows).all(-1)  # (B, N)
        n, total = masked.sum(-1).double(), self.maskable.sum(-1).double()
        log = torch.lgamma(n + 1) + torch.lgamma((total - n).clamp(min=0) + 1)
        log = log - torch.lgamma(total + 2)  # of n masks at a uniform t
        weight = log.masked_fill(~possible, -torch.inf).softmax(-1).nan_to_num(0)
        return (torch.einsum("bn,nlv->blv", weight, self.one_hot) + 1e-9).log()[at]

    def next_logits(self, x, past):
        """The exact causal network, which learns a token only from rows that do not give it."""
        i = x.shape[1]
        possible = (x[:, None] == self.rows[:, :i]).all(-1) & self.maskable[:, i]
        return (possible.double() @ self.one_hot[:, i] + 1e-9).log()


def memory(folder, **fields):
    """The Memory of a prepared folder's training rows."""
    cfg = Config(data=str(folder), n_embd=8, n_head=2, n_layer=1, **fields)
    ids, meta = read_split(cfg.data, "train", cfg)
    rows = take(ids, range(0, len(ids), cfg.seq_len), cfg.seq_len, cfg, "train")
    x0, _, maskable = unpack(rows, meta, cfg)
    return Memory(x0, maskable, meta["tokenizer"], cfg)


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def lines_of(path, *without):
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in without} for record in records]


@pytest.fixture
def run(monkeypatch, capsys):
    """run(task, model, *argv): the command's JSON; model is a network or a checkpoint's path."""

    def call(task, model, *argv):
        path = "ckpt.pt" if isinstance(model, torch.nn.Module) else str(model)
        with monkeypatch.context() as patch:
            if isinstance(model, torch.nn.Module):
                patch.setattr(answer, "load", lambda *a: (model, model.cfg))
            capsys.readouterr()
            answer.main([task, path, "--device", "cpu", "--json", *map(str, argv)])
        return json.loads(capsys.readouterr().out)

    return call


# --------------------------------------------------------------------------------------------------
# GSM8K

# the last one is val
NUMBERS = [(3, 4), (1, 8), (5, 2), (4, 1), (4, 4), (6, 3), (1, 5), (3, 6), (7, 2)]
WHO = "Ann Bob Cyd Dee Eve Flo Gus Hal Ida".split()
PROBLEMS = [
    {"question": f"{who} has {a} and gets {b}. How many?", "answer": f"{a}+{b} is {c}\n#### {c}"}
    for who, (a, b) in zip(WHO, NUMBERS)
    for c in [a + b]
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Eight problems to train on, which are also the test: with trained padding and without."""
    folder = tmp_path_factory.mktemp("gsm8k")
    files = [jsonl(folder / "train.jsonl", PROBLEMS), jsonl(folder / "test.jsonl", PROBLEMS[:8])]
    options = dict(input=files, tokenizer="bpe", vocab_size=290, wrap=48)
    for name, padding in (("trained", True), ("given", False)):
        prepare("gsm8k", str(folder / name), **options, train_padding=padding)
    return folder


SIZE = dict(vocab_size=290, seq_len=48, bos=True)
AR = dict(loss="ar", causal=True, cond_dim=0)


def test_what_was_learnt_is_answered(folders, run, tmp_path):
    """Thought and answer come from two rows of the training data, which the command must join in
    the same way; the figures are those of the lines."""
    out = tmp_path / "new" / "a.jsonl"
    result = run("gsm8k", memory(folders / "trained", **SIZE), "--out", out)
    assert result["right"] == result["questions"] == 8
    assert result["accuracy_se"] == result["empty"] == 0
    assert result["sampler"] == "llada" and (result["steps"], result["step"]) == (256, 5)
    assert (result["temperature"], result["guidance"], result["length"]) == (0.1, 0.1, 48)
    for line, problem in zip(lines_of(out), PROBLEMS):
        thought, number = problem["answer"].split("\n#### ")
        assert line == dict(
            id=line["id"], prompt=f"Question: {problem['question']}", thought=f"Answer: {thought}",
            answer=f"#### {number}", reference=number, right=True,
        )  # fmt: skip
    model = memory(folders / "trained", **SIZE)
    for sampler in ("ddpm_cache", "first_hitting", "ar"):
        argv = ["--out", tmp_path / sampler, "--sampler", sampler, "--temperature", 0.5]
        result = run("gsm8k", model, *argv)
        assert result["right"] == 8 and result["sampler"] == sampler
    result = run("gsm8k", memory(folders / "trained", **SIZE, **AR), "--out", tmp_path / "causal")
    assert (result["right"], result["sampler"], result["guidance"]) == (8, "ar", 0)
    same = lambda path: lines_of(path, "id")
    assert same(tmp_path / "causal") == same(out)


def test_accuracy_and_its_error(folders, run, tmp_path, capsys, monkeypatch):
    """Six of eight: 75 ± 15.3 %; the sentence says the same."""
    model = memory(folders / "trained", **SIZE)
    records = lines_of(folders / "trained" / "test.jsonl")
    (tmp_path / "data").mkdir()
    wrong = [r | {"answer": "0"} if i in (2, 5) else r for i, r in enumerate(records)]
    jsonl(tmp_path / "data" / "test.jsonl", wrong)
    argv = ["--data", tmp_path / "data", "--out", tmp_path / "a"]
    result = run("gsm8k", model, *argv)
    assert result["right"] == 6 and result["accuracy"] == 0.75
    assert result["accuracy_se"] == pytest.approx(math.sqrt(0.75 * 0.25 / 8))
    right = [line["right"] for line in lines_of(tmp_path / "a")]
    assert right == [i not in (2, 5) for i in range(8)]
    few = run("gsm8k", model, *argv, "--limit", 3)
    assert (few["right"], few["questions"]) == (2, 3)  # of the eight that are there
    monkeypatch.setattr(answer, "load", lambda *a, **k: (model, model.cfg))
    answer.main(["gsm8k", "ckpt.pt", "--device", "cpu", *map(str, argv)])
    shown = "accuracy 75.00 ± 15.31 %, 6 of 8 problems\n8 questions, 0 of their"
    assert capsys.readouterr().out.startswith(shown)


def test_without_trained_padding_the_model_needs_the_length(folders, tmp_path, capfd, monkeypatch):
    """It always saw padding where an answer ends: it answers with --new, and only then."""
    model = memory(folders / "given", **SIZE)
    tokenizer, sizes = load_tokenizer(model.tokenizer), []
    for problem in PROBLEMS[:8]:
        parts = f"Answer: {problem['answer']}".split("\n")
        sizes.append(tuple(len(tokenizer.encode(f" {part}")) + 1 for part in parts))  # with EOS
    usual = max(sizes, key=sizes.count)  # some numbers are one token with their space
    assert sizes.count(usual) > 5
    monkeypatch.setattr(answer, "load", lambda *a: (model, model.cfg))
    command = ["gsm8k", "x", "--device", "cpu", "--json", "--out"]
    answer.main([*command, f"{tmp_path}/new", "--new", *map(str, usual)])
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert not err and result["right"] == sizes.count(usual) and result["new"] == [*usual]
    answer.main([*command, f"{tmp_path}/none"])
    out, err = capfd.readouterr()
    assert json.loads(out)["right"] < 3 and err.count("\n") == 1
    assert err.startswith("note: trained without --train_padding") and "--new" in err
    model = memory(folders / "given", **SIZE, **AR)  # reads no padding
    answer.main([*command, f"{tmp_path}/ar"])
    out, err = capfd.readouterr()
    assert not err and json.loads(out)["right"] == 8


def test_the_answer_follows_the_ids_of_the_thought(folders):
    """A model that spells its thoughts byte by byte, as no tokenizer would, gets those very ids."""
    model = memory(folders / "trained", **SIZE)
    tokenizer, rows = load_tokenizer(model.tokenizer), []
    spelled = [i for c in " Answer: 4" for i in tokenizer.encode(c)]
    question, number = tokenizer.encode("Question: who?"), tokenizer.encode(" #### 4")
    assert spelled != tokenizer.encode(" Answer: 4")
    for given, written in ((question, spelled), (question + spelled, number)):
        row = [tokenizer.bos, *given, *written]
        row += [tokenizer.eos] * (48 - len(row))
        rows.append((row, [i > len(given) for i in range(48)]))
    x0, maskable = (torch.tensor(part) for part in zip(*rows))
    model = Memory(x0, maskable, model.tokenizer, model.cfg)
    options = dict(between=[], new=None, length=48, sampler="first_hitting", steps=1)
    got = list(converse(model, tokenizer, model.cfg, {7: ["Question: who?", ""]}, **options))
    assert got == [{7: ["Answer: 4", "#### 4"]}]


# (the model's text, the reference), which SMDM's code (583aa47, sympy 1.14, antlr 4.11) reads alike
RIGHT = [
    (" #### 18", "18"), (" #### 1,234", "1234"), (" #### 1234", "1,234"), (" #### $18", "18"),
    (" #### \\$18", "18"), (" #### $1,000,000", "1000000"), (" #### 18\n", "18"),
    (" #### -5", "-5"), (" #### -1,234", "-1234"), (" #### a 18", "18"), (" #### 018.0", "18"),
    (" #### 1 8", "18"),
    (" #### 18 dollars", "18"), (" #### 18.0", "18"), (" #### $18.00", "18"), (" #### 36/2", "18"),
    (" #### 2*9=18", "18"), (" #### x = 18", "18"), (" #### 18 square feet", "18"),
    (" #### 5 hours", "5"), (" #### 1,234.50", "1234.5"), (" #### +18", "18"),
    (" #### 17\n #### 18", "18"), (" #### .5", ".5"), (" #### 1/2", "0.5"),
]  # fmt: skip
WRONG = [
    (" #### 5", "-5"), (" #### 18 apples", "18"), (" #### 18%", "18"), (" #### 18.5", "18"),
    (" #### 81", "18"), (" #### eighteen", "18"), (" ####", "18"), (" #### ", "18"), ("18", "18"),
    (" #### 1/0", "18"), (" #### 1e3", "1000"), (" #### 18\n #### 17", "18"), ("", "18"),
    (" #### 18 #### 19", "18"), (" #### **18**", "18"), (" #### the 18", "18"),
]  # fmt: skip
# (the model's text, the reference, right here), which that code reads the other way
DIFFERENT = [
    (" #### 0018", "18", True), (" #### .5", "0.5", True), (" #### 0.5", ".5", True),
    (" #### 18.", "18", True), (" #### 18 #### 19", "19", True), (" ####18", "18", True),
    (" #### 18\nmore", "18", True), (" #### (18)", "18", False), (' #### "18"', "18", False),
    (" #### 6*3", "18", False), (" #### 18=2*9", "18", False),
    (" #### \\frac{36}{2}", "18", False), (" #### \\boxed{18}", "18", False),
]  # fmt: skip


def test_what_an_answer_states():
    assert all(is_right(*case) for case in RIGHT)
    assert not any(is_right(*case) for case in WRONG)
    for text, reference, right in DIFFERENT:
        assert is_right(text, reference) == right
    assert is_right("#### $.50", "0.5") and not is_right("#### .", "0")


def test_the_docstring_lists_the_answers_that_smdms_code_reads_differently():
    rows = re.findall(r"^ +('.*') +('.*?') +(\w+) +(\w+)$", is_right.__doc__, re.MULTILINE)
    word = {True: "right", False: "wrong"}
    want = [(text, number, word[here], word[not here]) for text, number, here in DIFFERENT]
    assert [(*map(ast.literal_eval, row[:2]), *row[2:]) for row in rows] == want


# --------------------------------------------------------------------------------------------------
# The reversal test

FACTS = [  # prompt, answer, kind
    ("Ann Lee, known far and wide for being", "the first to sing on Mars.", "p2d"),
    ("Known for being the first to fly,", "Bob Ray.", "d2p"),
    ("Immersed in being the one who runs,", "Cyd Orr.", "p2d_reverse"),
    ("Dee Fox once was", "the finder of a lost road.", "d2p_reverse"),
    ("Eve Nye once was", "the maker of blue glass.", "d2p_reverse"),
]


@pytest.fixture
def facts(checkpoints, tmp_path):
    records = [dict(prompt=prompt, answer=answer, of=of) for prompt, answer, of in FACTS]
    jsonl(tmp_path / "test.jsonl", records)
    return tmp_path


def test_smdms_reversal_test(checkpoints, facts, run, capsys, monkeypatch):
    """The surest first, greedy, 32 steps, guidance 0.8, rows of 52 tokens or the model's 48;
    accuracy by containment of each kind, BLEU of descriptions."""
    model, _ = load(checkpoints["mdlm"])
    tokenizer, seen = load_tokenizer(model.tokenizer), []
    texts = {
        "Ann": " He is THE FIRST to sing on Mars. Really",
        "Dee": " the finder of a lost toad.",
    }

    def write(model, cfg, eos, prompts, rows, new, length, **options):
        seen.append((length, options["steps"], options["temperature"], options["guidance"]))
        assert options["sampler"] == "llada"
        names = [tokenizer.decode(prompt[1:]).split()[0] for prompt in prompts]
        return [tokenizer.encode(texts.get(name, " nobody"), inside=True) for name in names]

    monkeypatch.setattr(answer, "complete", write)
    argv = ["reversal", checkpoints["mdlm"], "--data", facts, "--out", facts / "out"]
    kinds = run(*argv)["kinds"]
    assert seen == [(48, 32, 0.0, 0.8)]
    accuracy = {kind: (kinds[kind]["questions"], kinds[kind]["accuracy"]) for kind in kinds}
    assert accuracy == {"p2d": (1, 1), "d2p": (1, 0), "p2d_reverse": (1, 0), "d2p_reverse": (2, 0)}
    assert "bleu" not in kinds["d2p"] and "bleu" not in kinds["p2d_reverse"]
    near = character_bleu("the finder of a lost toad.", FACTS[3][1])
    far = character_bleu("nobody", FACTS[4][1])
    assert kinds["d2p_reverse"]["bleu"] == pytest.approx((near + far) / 2) and near > 0.8
    answer.main([str(word) for word in argv])
    out = capsys.readouterr().out
    assert "who -> what, reversed    accuracy   0.00 ± 0.00 %, BLEU" in out
    assert set(kinds) == set(DIRECTIONS)


def test_the_reversal_test_writes_with_every_kind_of_model(checkpoints, facts, run):
    for kind in ("mdlm", "ar"):
        result = run("reversal", checkpoints[kind], "--data", facts, "--out", facts / kind)
        assert result["questions"] == 5 and result["guidance"] == (0.8 if kind == "mdlm" else 0)


def test_containment_and_bleu_are_smdms():
    assert contains(" so it was Bob ray, ok", " Bob Ray ") and not contains("Bob", "Bob Ray")
    assert character_bleu("", "a") == character_bleu("b", "a") == 0
    assert character_bleu("the same text", "the same text") == pytest.approx(1)
    bleu = pytest.importorskip("nltk.translate.bleu_score")
    pairs = [("the maker of glass", "the maker of blue glass"), ("blue", "the maker of blue glass"),
             ("the maker of blue glass and of red glass", "the maker of blue glass"),
             ("xay", "a"), ("glass of blue", "blue glass")]  # fmt: skip
    for found, reference in pairs:
        with warnings.catch_warnings(action="ignore"):
            want = bleu.sentence_bleu([reference], found)
        assert character_bleu(found, reference) == pytest.approx(want, abs=1e-12)


# --------------------------------------------------------------------------------------------------
# MT-Bench

QUESTIONS = [
    dict(question_id=81, category="writing", turns=["Say one.", "Now two."]),
    dict(question_id=90, category="math", turns=[" 1+1?", "Sure? "]),
    dict(question_id=99, category="none", turns=["Only once."]),
]
REPLIES = {
    "Say one.": "one", "Now two.": "two, 2", "1+1?": "11", "Sure?": "no", "Only once.": "once",
}  # fmt: skip


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """The Memory of conversations of one turn and of two, and its file of questions."""
    folder, conversations = tmp_path_factory.mktemp("chat"), []
    for turns in [[q.strip() for q in record["turns"]] for record in QUESTIONS]:
        for n in range(1, len(turns) + 1):
            said = [x for q in turns[:n] for x in (("human", q), ("gpt", REPLIES[q]))]
            said = [{"from": who, "value": text} for who, text in said]
            conversations.append({"conversations": said})
    (folder / "chat.json").write_text(json.dumps([*conversations, conversations[0]]))
    options = dict(tokenizer="bpe", vocab_size=380, wrap=96, train_padding=True)
    prepare("sharegpt", str(folder / "data"), input=[str(folder / "chat.json")], **options)
    model = memory(folder / "data", vocab_size=380, seq_len=96, bos=True)
    return model, jsonl(folder / "question.jsonl", QUESTIONS)


def as_fastchat_reads(path):
    """{question id: turns}, as FastChat's judge loads them."""
    found = {}
    for text in path.open():
        line = json.loads(text)
        found[line["question_id"]] = line
        assert list(line) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
        assert isinstance(line["answer_id"], str) and isinstance(line["tstamp"], float)
        assert line["model_id"] == path.stem and list(line["choices"][0]) == ["index", "turns"]
        assert len(line["choices"]) == 1 and line["choices"][0]["index"] == 0
    assert len({line["answer_id"] for line in found.values()}) == len(found)
    return {question: line["choices"][0]["turns"] for question, line in found.items()}


def test_both_turns_as_the_judge_reads_them(chat, run, tmp_path, capsys):
    model, questions = chat
    result = run("mt_bench", model, "--input", questions, "--out", tmp_path / "mine.jsonl")
    assert result["questions"] == 3 and result["empty"] == 0 and "accuracy" not in result
    assert (result["sampler"], result["steps"], result["temperature"]) == ("ddpm_cache", 128, 1.0)
    assert result["guidance"] == 0.6
    want = {81: ["one", "two, 2"], 90: ["11", "no"], 99: ["once"]}
    assert as_fastchat_reads(tmp_path / "mine.jsonl") == want
    argv = ["--input", questions, "--out", tmp_path / "first.jsonl"]
    assert run("mt_bench", model, *argv, "--first_turn")["empty"] == 0
    want = {81: ["one", ""], 90: ["11", ""], 99: ["once"]}
    assert as_fastchat_reads(tmp_path / "first.jsonl") == want
    refused(capsys, lambda: run("mt_bench", model, *argv), "first.jsonl: answers of another")


def test_several_choices_differ_and_the_first_stays(chat, run, tmp_path, capsys, monkeypatch):
    """Choice 0 is that of a single answer; each choice has its own random numbers."""
    model, questions = chat
    seen, real = [], answer.complete

    def note_rows(model, cfg, eos, prompts, rows, *args, **options):
        seen.append(rows)
        return real(model, cfg, eos, prompts, rows, *args, **options)

    monkeypatch.setattr(answer, "complete", note_rows)
    argv = ["--input", questions, "--num_choices", 3, "--batch_size", 2]
    result = run("mt_bench", model, *argv, "--out", tmp_path / "mine.jsonl")
    assert result["questions"] == 3 and result["empty"] == 0
    lines = lines_of(tmp_path / "mine.jsonl")
    assert [[choice["index"] for choice in line["choices"]] for line in lines] == [[0, 1, 2]] * 3
    want = {81: ["one", "two, 2"], 90: ["11", "no"], 99: ["once"]}  # of this exact network
    for line in lines:
        assert [choice["turns"] for choice in line["choices"]] == [want[line["question_id"]]] * 3
    numbers = [row for rows in seen for row in rows]
    assert sorted(numbers) == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16]
    refused(capsys, lambda: run("gsm8k", model, "--num_choices", 2), "--num_choices: not for gsm8k")


def test_the_template_is_vicunas(chat, monkeypatch):
    """The prompts: BOS, the system's line, the first question; its answer, EOS, the second one."""
    model, tokenizer, shown = chat[0], load_tokenizer(chat[0].tokenizer), []

    def write(model, cfg, eos, prompts, *args, **options):
        shown.append([*map(list, prompts)])
        return [tokenizer.encode(f" reply {len(shown)}")] * len(prompts)

    monkeypatch.setattr(answer, "complete", write)
    texts = answer.mt_bench(QUESTIONS[0], model.cfg, Namespace(first_turn=False))[0]
    got = next(converse(model, tokenizer, model.cfg, {0: texts}, [tokenizer.eos], None, 96))
    assert got == {0: ["reply 1", "reply 2"]}
    first = [tokenizer.bos, *tokenizer.encode(f"{SYSTEM} USER: Say one. ASSISTANT:")]
    then = [*tokenizer.encode(" reply 1"), tokenizer.eos]
    then += tokenizer.encode(" USER: Now two. ASSISTANT:")
    assert shown == [[first], [first + then]]


def test_llamas_spaces_and_its_begin_of_text(chat, monkeypatch):
    """Only a text's beginning gets Llama's space. A BOS inside an answer, which SMDM's models
    write, stays in the context and is not shown."""
    cfg, shown = chat[0].cfg, []

    def write(model, cfg, eos, prompts, *args, **options):
        shown.append([*map(list, prompts)])
        return [[OURS.bos, *OURS.encode(" the cat", inside=True)]] * len(prompts)

    monkeypatch.setattr(answer, "complete", write)
    got = next(converse(None, OURS, cfg, {3: ["the mat", "on a mat"]}, [OURS.eos], None, 96))
    assert got == {3: ["the cat", "the cat"]}
    inside = lambda text: OURS.encode(text, inside=True)
    first = [OURS.bos, *OURS.encode("the mat")]
    then = [OURS.bos, *inside(" the cat"), OURS.eos, *inside("on a mat")]
    assert shown == [[first], [first + then]] and OURS.encode("on a mat") != inside("on a mat")


@pytest.mark.skipif(not REAL_QUESTIONS.exists(), reason="no MT-Bench questions")
def test_the_real_questions(run, tmp_path):
    """80 questions and 160 turns, of which a row of 160 tokens has no room for some."""
    records = [json.loads(line) for line in REAL_QUESTIONS.open()]
    spec = train_bpe((turn for record in records for turn in record["turns"]), 1000) | {"eos": True}
    tokenizer = load_tokenizer(spec)
    cfg = Config(vocab_size=1001, seq_len=160, n_embd=8, n_head=1, n_layer=1, cond_dim=0, bos=True)
    path = save(tmp_path / "ckpt.pt", cfg, spec)
    out = tmp_path / "mine.jsonl"
    result = run(
        "mt_bench", path, "--input", REAL_QUESTIONS, "--out", out, "--steps", 2, "--new", 20
    )
    found = as_fastchat_reads(out)
    assert list(found) == [*range(81, 161)] and result["questions"] == 80
    prompts = [f"{SYSTEM} USER: {record['turns'][0].strip()} ASSISTANT:" for record in records]
    first = [len(tokenizer.encode(prompt)) + 1 for prompt in prompts]
    assert 0 < sum(n >= 160 for n in first) < 40
    assert not any(one + two for (one, two), n in zip(found.values(), first) if n >= 160)
    assert sum(bool(one) for one, _ in found.values()) > 40
    assert any(two for _, two in found.values())
    assert result["empty"] == sum(not text for turns in found.values() for text in turns)


# --------------------------------------------------------------------------------------------------
# Rows and files


@pytest.fixture(scope="module")
def checkpoints(folders):
    """An MDLM and its AR twin of random weights: their answers are noise, another per question."""
    cfg = replace(tiny_run(folders / "trained"), **SIZE, cond_dim=0)
    spec = memory(folders / "trained", **SIZE).tokenizer
    return {kind: save(folders / f"{kind}.pt", change(cfg), spec) for kind, change in
            (("mdlm", lambda cfg: cfg), ("ar", as_ar))}  # fmt: skip


HOT = ("--temperature", 1, "--steps", 12, "--new", 9)


@pytest.mark.parametrize("kind", ["mdlm", "ar"])
def test_an_answer_does_not_depend_on_its_batch(kind, checkpoints, run, tmp_path):
    for size in (1, 3, 32):
        run("gsm8k", checkpoints[kind], "--out", tmp_path / f"{size}", "--batch_size", size, *HOT)
    assert len({(tmp_path / size).read_bytes() for size in ("1", "3", "32")}) == 1
    lines = lines_of(tmp_path / "1")
    assert len({line["thought"] for line in lines}) == len({line["answer"] for line in lines}) == 8
    run("gsm8k", checkpoints[kind], "--out", tmp_path / "other", "--seed", 1, *HOT)
    assert all(a["thought"] != b["thought"] for a, b in zip(lines, lines_of(tmp_path / "other")))


def test_a_problem_that_comes_twice_is_two_questions(checkpoints, run, tmp_path):
    jsonl(tmp_path / "test.jsonl", [dict(prompt="Question: 1+1?", answer="2")] * 2)
    result = run("gsm8k", checkpoints["mdlm"], "--data", tmp_path, "--out", tmp_path / "out", *HOT)
    one, two = lines_of(tmp_path / "out")
    assert result["questions"] == 2 and one["id"] != two["id"] and one["thought"] != two["thought"]


def test_thought_and_answer_have_different_random_numbers(checkpoints, monkeypatch):
    """Otherwise equal canvases would give equal texts."""
    model, cfg = load(checkpoints["mdlm"])
    tokenizer, seen = load_tokenizer(model.tokenizer), []

    def write_nothing(model, cfg, eos, prompts, rows, *args, **options):
        seen.append(rows)
        return [[] for _ in prompts]

    monkeypatch.setattr(answer, "complete", write_nothing)
    questions = {i: ["a", "b"] for i in (0, 1, 5)}
    list(converse(model, tokenizer, cfg, questions, [], None, 48, batch_size=2))
    assert seen == [[0, 2], [1, 3], [10], [11]]


def test_each_answer_has_its_guidance(checkpoints, run, tmp_path, monkeypatch, capsys):
    seen, real = [], answer.complete

    def note_guidance(*args, guidance, **options):
        seen.append(guidance)
        return real(*args, guidance=guidance, **options)

    monkeypatch.setattr(answer, "complete", note_guidance)
    jsonl(tmp_path / "test.jsonl", [dict(prompt="Question: 1+1?", answer="2")])
    argv = ["gsm8k", checkpoints["mdlm"], "--data", tmp_path, "--steps", 2]
    run(*argv, "--out", tmp_path / "two", "--guidance", 0.1, 0.7)
    run(*argv, "--out", tmp_path / "one", "--guidance", 0.4)
    run(*argv, "--out", tmp_path / "none")
    assert seen == [0.1, 0.7, 0.4, 0.4, 0.1, 0.1]
    three = [str(word) for word in [*argv, "--guidance", 1, 2, 3]]
    refused(capsys, lambda: answer.main(three), "--guidance 1.0 2.0 3.0", "one or two numbers")


def test_ar_rows_of_one_length_share_the_cache_and_end_early(folders, checkpoints):
    """One call per token until the last row has ended; the texts are those of single rows."""
    model, cfg = load(checkpoints["ar"])
    eos, calls, step = load_tokenizer(model.tokenizer).eos, [], model.next_logits

    def next_logits(x, past):
        calls.append(x.shape)
        likelier_end = 5 * (torch.arange(cfg.vocab_size) == eos)  # answers of various lengths
        return step(x, past) + likelier_end

    model.next_logits, options = next_logits, dict(sampler="ar", steps=1, seed=4, temperature=0.9)
    prompts = [[eos, 5, 6, 7], [eos, 9], [eos, 6, 5, 7], [eos, *range(47)], [eos, *range(60)]]
    alone = [
        complete(model, cfg, eos, [prompt], [i], 40, 48, **options)[0]
        for i, prompt in enumerate(prompts)
    ]
    model.forward = None  # fails if called: the cache serves all calls
    calls.clear()
    assert complete(model, cfg, eos, prompts, [*range(5)], 40, 48, **options) == alone
    longest, both = max(len(alone[0]), len(alone[2])), [i for n, i in calls if n == 2]
    assert alone[3] == alone[4] == [] and 0 < min(map(len, alone[:3])) < longest < 40
    assert both == [*range(4, 4 + longest + 1)]


def test_only_n_new_tokens_then_end_of_text(checkpoints, monkeypatch):
    model, cfg = load(checkpoints["mdlm"])
    seen, bos, M = [], load_tokenizer(model.tokenizer).bos, cfg.mask_id

    def frames(model, cfg, x, rows, sampler, **options):
        seen.append(x)
        yield torch.ones_like(x)

    monkeypatch.setattr(answer, "frames", frames)
    got = complete(model, cfg, bos, [[bos, 5], [bos, 6, 7, 8]], [0, 1], 3, 6, sampler="ddpm")
    assert seen[0].tolist() == [[bos, 5, M, M, M, bos], [bos, 6, 7, 8, M, M]]
    assert got == [[1] * 4, [1] * 2]


def kill_after(argv, batches):
    """The command, which kills itself when it has written so many batches."""

    def target():
        whole = answer.converse

        def part(*args, **options):
            for n, batch in enumerate(whole(*args, **options)):
                if n == batches:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield batch

        answer.converse = part
        answer.main([*map(str, argv)])

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("task", ["gsm8k", "mt_bench"])
def test_a_killed_run_resumes_to_the_same_file(task, checkpoints, run, tmp_path, monkeypatch):
    """Killed twice, once with an incomplete line. Answers in the file are not computed
    again, and --limit may grow."""
    more = ["--input", jsonl(tmp_path / "q.jsonl", QUESTIONS)] if task == "mt_bench" else []
    argv = [task, checkpoints["mdlm"], "--batch_size", 1, *HOT, *more]
    run(*argv, "--out", tmp_path / "whole.jsonl")
    out = tmp_path / "part.jsonl"
    kill_after([*argv, "--device", "cpu", "--out", out], 1)
    assert len(out.read_text().splitlines()) == 1
    kill_after([*argv, "--device", "cpu", "--out", out], 1)
    written = out.read_bytes()
    assert written.count(b"\n") == 2
    for torn in (1, 9, 60, len(written) - written.index(b"\n") - 2):
        out.write_bytes(written + written[written.index(b"\n") + 1 :][:torn])
        run(*argv, "--out", out, "--limit", 1)
        assert out.read_bytes() == written
    numbers, whole = [], answer.converse

    def converse(model, tokenizer, cfg, questions, *args, **options):
        numbers.extend(questions)
        return whole(model, tokenizer, cfg, questions, *args, **options)

    monkeypatch.setattr(answer, "converse", converse)
    result = run(*argv, "--out", out)
    assert numbers == [*range(2, result["questions"])]
    clean = lambda path: lines_of(path, "tstamp", "model_id")
    assert clean(out) == clean(tmp_path / "whole.jsonl")
    assert task == "mt_bench" or out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert run(*argv, "--out", out) == result


def test_answers_of_anything_else_are_not_mixed_in(checkpoints, folders, run, tmp_path, capsys):
    out = tmp_path / "a.jsonl"

    def command(path, *argv):
        answer.main(["gsm8k", str(path), "--device", "cpu", "--out", str(out), *map(str, argv)])

    run("gsm8k", checkpoints["mdlm"], "--out", out, "--limit", 2, *HOT)
    before = out.read_bytes()
    state = torch.load(checkpoints["mdlm"], weights_only=True)
    state["ema"]["embed.weight"] = state["ema"]["embed.weight"] + 1e-3
    torch.save(state, tmp_path / "other.pt")
    paths = checkpoints | {"other": tmp_path / "other.pt"}
    for argv in (
        ["mdlm", "--seed", 1], ["mdlm", "--new", 8], ["mdlm", "--guidance", 0],
        ["mdlm", "--length", 40], ["mdlm", "--sampler", "ddpm"], ["mdlm", "--steps", 11],
        ["mdlm", "--temperature", 2], ["mdlm", "--top_p", 0.5], ["mdlm", "--dtype", "bfloat16"],
        ["ar"], ["other"],
    ):  # fmt: skip
        again = lambda argv=argv: command(paths[argv[0]], *HOT, *argv[1:])
        refused(capsys, again, "a.jsonl: answers of another checkpoint, other options")
        assert out.read_bytes() == before
    notes = "my notes", '{"my": "notes"}', '{"id": "my notes"}\n'
    for text in (*notes, "[1]\n", '{"answer_id": [1]}\n', "\n"):
        out.write_text(text)
        refused(capsys, lambda: command(checkpoints["mdlm"], *HOT), "a.jsonl: answers of another")
        assert out.read_text() == text
    out.write_bytes(before)
    (tmp_path / "data").mkdir()
    text = (folders / "trained" / "test.jsonl").read_text()
    (tmp_path / "data" / "test.jsonl").write_text(text.replace("Bob", "Rob"))
    again = lambda: command(checkpoints["mdlm"], *HOT, "--data", tmp_path / "data")
    refused(capsys, again, "a.jsonl: answers of another")


@pytest.fixture
def write(checkpoints, run, tmp_path):
    """write(*options): the thoughts of four problems with these options, and the JSON."""

    def call(*options, kind="mdlm"):
        out = tmp_path / f"{len([*tmp_path.iterdir()])}.jsonl"
        argv = ["--limit", 4, "--new", 9, "--temperature", 1, "--out", out, *options]
        result = run("gsm8k", checkpoints[kind], *argv)
        return [line["thought"] for line in lines_of(out)], result

    return call


@pytest.mark.parametrize("sampler, name", [
    (sampler, name) for sampler, f in SAMPLERS.items() for name in default_options(f)
    if sampler != "llada"
])  # fmt: skip
def test_each_samplers_option_changes_the_answers(sampler, name, write):
    argv = ("--steps", 20, "--sampler", sampler)
    low, result = write(*argv, f"--{name}", 0)
    assert result[name] == 0 and "sampler_options" not in result
    assert low != write(*argv, f"--{name}", min(OPTIONS[name], 9))[0]
    default = default_options(SAMPLERS[sampler])[name]
    assert write(*argv, f"--{name}", default)[0] == write(*argv)[0]


@pytest.mark.parametrize("kind", ["mdlm", "ar"])
def test_top_p_and_steps_change_the_answers(kind, write):
    """A tiny nucleus is greedy."""
    argv = ("--steps", 20, "--sampler", "ddpm" if kind == "mdlm" else "ar")
    plain, result = write(*argv, kind=kind)
    assert result["top_p"] == result["temperature"] == 1
    small, result = write(*argv, "--top_p", 1e-9, kind=kind)
    assert result["top_p"] == 1e-9 and small != plain
    assert write(*argv, "--temperature", 0, kind=kind)[0] == small
    assert kind == "ar" or write(*argv, "--steps", 1)[0] != plain


def test_by_default_the_answers_stand_beside_the_checkpoint(checkpoints, run, tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(checkpoints["ar"].read_bytes())
    for path in (tmp_path / "ckpt.pt", tmp_path):
        assert run("gsm8k", path, "--limit", 1)["out"] == str(tmp_path / "gsm8k.jsonl")
    result = run(
        "mt_bench", tmp_path, "--input", jsonl(tmp_path / "q.jsonl", QUESTIONS), "--limit", 1
    )
    assert result["out"] == str(tmp_path / "mt_bench.jsonl") and result["sampler"] == "ar"
    assert (result["guidance"], result["temperature"]) == (0, 1.0)


@pytest.mark.parametrize("argv, words", [
    (["gsm8k", "--input", "q.jsonl"], ["--input: not for gsm8k"]),
    (["gsm8k", "--first_turn"], ["--first_turn: not for gsm8k"]),
    (["mt_bench", "--data", "x"], ["--data: not for mt_bench"]),
    (["mt_bench"], ["needs --input"]),
    (["mt_bench", "--input", "gone.jsonl"], ["gone.jsonl: No such file"]),
    (["gsm8k", "--data", "no/data"], ["no/data/test.jsonl: no such file", "prepare.py gsm8k"]),
    (["gsm8k", "--length", "49"], ["--length 49", "48"]),
    (["gsm8k", "--length", "1"], ["--length 1", "at least 2"]),
    (["gsm8k", "--new", "0"], ["--new 0"]),
    (["gsm8k", "--new", "3", "4", "5"], ["--new 3 4 5", "one or two"]),
    (["gsm8k", "--limit", "0"], ["--limit 0"]),
    (["gsm8k", "--steps", "0"], ["--steps 0"]),
    (["gsm8k", "--temperature", "-1"], ["--temperature"]),
    (["gsm8k", "--top_p", "0"], ["--top_p 0.0: must be above 0 and at most 1"]),
    (["gsm8k", "--guidance", "-1"], ["--guidance"]),
    (["gsm8k", "--batch_size", "0"], ["--batch_size 0"]),
    (["gsm8k", "--sampler", "magic"], ["--sampler", "confidence"]),
    (["gsm8k", "--eta", "0.1"], ["--eta 0.1", "remdm_cap", "not of llada"]),
    (["aime"], ["gsm8k", "mt_bench"]),
])  # fmt: skip
def test_bad_arguments(argv, words, checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(capsys, lambda: answer.main([argv[0], str(checkpoints["mdlm"]), *argv[1:]]), *words)
    assert not any(tmp_path.iterdir())


def test_bad_models_and_bad_records(checkpoints, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    letters = save(tmp_path / "letters.pt", tiny_run("nowhere"))
    for path, options, words in (
        (letters, [], "no end-of-text"),
        (checkpoints["ar"], ["--guidance", "1"], "not for an AR model"),
        (checkpoints["ar"], ["--sampler", "ddpm"], "--sampler ddpm"),
    ):
        argv = ["gsm8k", str(path), *options, *out]
        refused(capsys, lambda argv=argv: answer.main(argv), words)
    good = json.dumps(QUESTIONS[0])
    for name, text, words in (
        ("a.jsonl", good + "\nhello\n", ["a.jsonl: line 2: not JSON"]),
        ("b.jsonl", good + '\n{"turns": ["a"]}\n', ["b.jsonl: record 2: must have question_id"]),
        ("c.jsonl", '{"question_id": 1, "turns": "no list"}', ["c.jsonl: record 1"]),
        ("d.jsonl", '{"question_id": 1, "turns": []}', ["d.jsonl: record 1"]),
        ("e.jsonl", '{"question_id": 1, "turns": ["a", "b", "c"]}', ["e.jsonl: record 1"]),
        ("f.jsonl", '{"question_id": 1, "turns": ["a", 2]}', ["f.jsonl: record 1"]),
        ("g.jsonl", '{"question_id": [1], "turns": ["a"]}', ["g.jsonl: record 1"]),
        ("h.jsonl", "[1]", ["h.jsonl: record 1"]),
        ("i.jsonl", "", ["i.jsonl: line 1: not JSON"]),
        ("j.jsonl", f"{good}\n{good}\n", ["j.jsonl: record 2", "question_id 81 twice"]),
        ("k.txt", good, ["k.txt: record 1"]),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
        argv = ["mt_bench", str(checkpoints["ar"]), "--input", str(tmp_path / name), *out]
        refused(capsys, lambda argv=argv: answer.main(argv), *words)
    (tmp_path / "test.jsonl").write_text('{"prompt": "Question: a"}')
    argv = ["gsm8k", str(checkpoints["ar"]), "--data", str(tmp_path), *out]
    refused(capsys, lambda: answer.main(argv), "test.jsonl: record 1: must have prompt and answer")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------
# With training


@pytest.mark.slow
@pytest.mark.parametrize("kind, steps", [("ar", 150), ("mdlm", 1200)])
def test_a_trained_model_answers_what_it_was_taught(kind, steps, folders, run, tmp_path):
    cfg = Config(
        data=str(folders / "trained"), **SIZE, n_layer=2, n_head=2, n_embd=64, cond_dim=0,
        steps=steps, batch_size=16, micro_batch=16, lr=2e-3, muon_lr=0.02, lr_decay="linear",
        warmup=5, ema=0.0, samples=0, eval_every=10**6, save_every=10**6, dtype="float32",
        device="cpu", out_dir=str(tmp_path / "run"),
    )  # fmt: skip
    train.main(as_ar(cfg) if kind == "ar" else cfg)
    assert run("gsm8k", tmp_path / "run")["right"] == 8
