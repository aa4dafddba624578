"""answer.py against the exact network of its training rows, which answers only what it was trained on:
prompts, thoughts and turns must come as data/finetune.py joins them. The files are FastChat's, and those of a
run that was not killed."""

import json
import math
import multiprocessing
import os
import signal
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from conftest import SHARED, refused, save, tiny_run
from llama import OURS

import train
from configs import Config, as_ar
from data.corpus import read_split, take, unpack
from data.finetune import SYSTEM
from data.prepare import prepare
from data.tokenizer import load_tokenizer, train_bpe
from model import load
from tasks import answer
from tasks.answer import complete, dialogues, is_right

QUESTIONS = SHARED / "data" / "mt_bench" / "question.jsonl"


class Memory(torch.nn.Module):
    """The exact network of some rows to fine-tune on (N, L), each as likely as the others, of which maskable
    (N, L) was masked at a uniform t: a row that could not have become the canvas has no say, and if none
    could, anything may follow."""

    def __init__(self, x0, maskable, spec, cfg):
        super().__init__()
        self.rows, self.maskable, self.cfg, self.tokenizer, self.step = x0, maskable, cfg, spec, 5
        self.weight, self.blocks = torch.nn.Parameter(x0.double()), []
        self.one_hot = torch.nn.functional.one_hot(x0, cfg.vocab_size).double()

    def forward(self, x, t, at):
        masked = (x == self.cfg.mask_id)[:, None]
        possible = torch.where(masked, self.maskable, x[:, None] == self.rows).all(-1)  # (B, N)
        n, total = masked.sum(-1).double(), self.maskable.sum(-1).double()
        chance = (
            torch.lgamma(n + 1)
            + torch.lgamma((total - n).clamp(min=0) + 1)
            - torch.lgamma(total + 2)
        )
        chance = (chance + 1e-9).masked_fill(~possible, -torch.inf).softmax(-1).nan_to_num(0)
        return (torch.einsum("bn,nlv->blv", chance, self.one_hot) + 1e-9).log()[at]

    def next_logits(self, x, past):
        """Of the exact causal network, which learns a token only from rows in which it is not given."""
        i = x.shape[1]
        possible = (x[:, None] == self.rows[:, :i]).all(-1) & self.maskable[:, i]
        return (possible.double() @ self.one_hot[:, i] + 1e-9).log()


def memory(folder, **fields):
    """The Memory of a prepared folder's training rows."""
    cfg = Config(data=str(folder), n_embd=8, n_head=2, n_layer=1, **fields)
    ids, meta = read_split(cfg.data, "train", cfg)
    x0, maskable = unpack(
        take(ids, range(0, len(ids), cfg.seq_len), cfg.seq_len, cfg, "train"), meta, cfg
    )
    return Memory(x0, maskable, meta["tokenizer"], cfg)


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def lines_of(path, *without):
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in without} for record in records]


@pytest.fixture
def run(monkeypatch, capsys):
    """run(task, model, *argv): the command with a network in place of a checkpoint, or with a path of one;
    its JSON."""

    def call(task, model, *argv):
        path = "ckpt.pt" if isinstance(model, torch.nn.Module) else str(model)
        with monkeypatch.context() as patch:
            if isinstance(model, torch.nn.Module):
                patch.setattr(answer, "load", lambda *a: (model, model.cfg))
            capsys.readouterr()
            answer.main([task, path, "--device", "cpu", "--json", *map(str, argv)])
        return json.loads(capsys.readouterr().out)

    return call


# ---------------------------------------------------------------------------------------------------------
# GSM8K

NUMBERS = [
    (3, 4),
    (1, 8),
    (5, 2),
    (4, 1),
    (4, 4),
    (6, 3),
    (1, 5),
    (3, 6),
    (7, 2),
]  # the last is val
WHO = "Ann Bob Cyd Dee Eve Flo Gus Hal Ida".split()
PROBLEMS = [
    dict(
        question=f"{who} has {a} and gets {b}. How many?",
        answer=f"{a}+{b} is {a + b}\n#### {a + b}",
    )
    for who, (a, b) in zip(WHO, NUMBERS)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The eight problems to train on, which are the test, too: with trained padding and without."""
    folder = tmp_path_factory.mktemp("gsm8k")
    files = [jsonl(folder / "train.jsonl", PROBLEMS), jsonl(folder / "test.jsonl", PROBLEMS[:8])]
    for name, padding in (("trained", True), ("given", False)):
        out = str(folder / name)
        prepare(
            "gsm8k",
            out,
            input=files,
            tokenizer="bpe",
            vocab_size=290,
            wrap=48,
            train_padding=padding,
        )
    return folder


SIZE = dict(vocab_size=290, seq_len=48, bos=True)
AR = dict(loss="ar", causal=True, cond_dim=0)


def test_what_was_learnt_is_answered(folders, run, tmp_path):
    """Thought and answer come from two rows of the training data, whose texts the command has to put together
    alike; the figures are those of the lines."""
    out = tmp_path / "new" / "a.jsonl"
    result = run("gsm8k", memory(folders / "trained", **SIZE), "--out", out)
    assert (
        result["right"] == result["questions"] == 8
        and result["accuracy_se"] == 0 == result["empty"]
    )
    assert result["sampler"] == "confidence" and (result["steps"], result["step"]) == (256, 5)
    assert (result["temperature"], result["guidance"], result["length"]) == (0.1, 0.1, 48)
    for line, problem in zip(lines_of(out), PROBLEMS):
        thought, number = problem["answer"].split("\n#### ")
        assert line == dict(
            id=line["id"], prompt=f"Question: {problem['question']}", thought=f"Answer: {thought}",
            answer=f"#### {number}", reference=number, right=True,
        )  # fmt: skip
    model = memory(folders / "trained", **SIZE)
    for sampler in ("ddpm_cache", "first_hitting", "ar"):
        result = run(
            "gsm8k", model, "--out", tmp_path / sampler, "--sampler", sampler, "--temperature", 0.5
        )
        assert result["right"] == 8 and result["sampler"] == sampler
    result = run("gsm8k", memory(folders / "trained", **SIZE, **AR), "--out", tmp_path / "causal")
    assert (result["right"], result["sampler"], result["guidance"]) == (8, "ar", 0)
    same = lambda path: lines_of(path, "id")
    assert same(tmp_path / "causal") == same(out)


def test_accuracy_and_its_error(folders, run, tmp_path, capsys, monkeypatch):
    """Six of eight: 75 ± 15.3 %; the sentence says the same."""
    model = memory(folders / "trained", **SIZE)
    records = [
        json.loads(line) for line in (folders / "trained" / "test.jsonl").read_text().splitlines()
    ]
    (tmp_path / "data").mkdir()
    wrong = [r | {"answer": "0"} if i in (2, 5) else r for i, r in enumerate(records)]
    jsonl(tmp_path / "data" / "test.jsonl", wrong)
    argv = ["--data", tmp_path / "data", "--out", tmp_path / "a"]
    result = run("gsm8k", model, *argv)
    assert result["right"] == 6 and result["accuracy"] == 0.75
    assert result["accuracy_se"] == pytest.approx(math.sqrt(0.75 * 0.25 / 8))
    assert [line["right"] for line in lines_of(tmp_path / "a")] == [
        i not in (2, 5) for i in range(8)
    ]
    few = run("gsm8k", model, *argv, "--limit", 3)
    assert (few["right"], few["questions"]) == (2, 3)  # of the eight that are there
    monkeypatch.setattr(answer, "load", lambda *a, **k: (model, model.cfg))
    answer.main(["gsm8k", "ckpt.pt", "--device", "cpu", *map(str, argv)])
    shown = "accuracy 75.00 ± 15.31 %, 6 of 8 problems\n8 questions, 0 of their"
    assert capsys.readouterr().out.startswith(shown)


def test_without_trained_padding_the_model_has_to_be_told(folders, tmp_path, capfd, monkeypatch):
    """The padding, which it always saw, tells where an answer ends: it answers with --new, and only so."""
    model = memory(folders / "given", **SIZE)
    tokenizer = load_tokenizer(model.tokenizer)
    size = lambda text: len(tokenizer.encode(text)) + 1  # with the EOS
    sizes = [
        tuple(size(f" {part}") for part in f"Answer: {p['answer']}".split("\n"))
        for p in PROBLEMS[:8]
    ]
    two = max(sizes, key=sizes.count)  # some numbers are one token with their space
    told, most = ["--new", *map(str, two)], sizes.count(two)
    assert most > 5
    monkeypatch.setattr(answer, "load", lambda *a, **k: (model, model.cfg))
    command = ["gsm8k", "x", "--device", "cpu", "--json", "--out"]
    answer.main([*command, f"{tmp_path}/told", *told])
    out, err = capfd.readouterr()
    assert not err and json.loads(out)["right"] == most and json.loads(out)["new"] == [*two]
    answer.main([*command, f"{tmp_path}/untold"])
    out, err = capfd.readouterr()
    assert json.loads(out)["right"] < 3
    assert (
        err == "note: without --train_padding the model has to be told where answers end: --new\n"
    )
    model = memory(folders / "given", **SIZE, **AR)  # reads no padding
    answer.main([*command, f"{tmp_path}/ar"])
    out, err = capfd.readouterr()
    assert not err and json.loads(out)["right"] == 8


def test_the_answer_goes_on_from_the_ids_of_the_thought(folders):
    """A model that spells its thoughts byte by byte, as no tokenizer would, is asked with those very ids."""
    model = memory(folders / "trained", **SIZE)
    tokenizer, rows = load_tokenizer(model.tokenizer), []
    spelled = lambda text: [i for c in text for i in tokenizer.encode(c)]
    question, thought, number = tokenizer.encode("Question: who?"), " Answer: 4", " #### 4"
    assert spelled(thought) != tokenizer.encode(thought)
    for given, written in (
        (question, spelled(thought)),
        (question + spelled(thought), tokenizer.encode(number)),
    ):
        row = [tokenizer.bos, *given, *written]
        rows.append(
            (
                row + [tokenizer.eos] * (48 - len(row)),
                [False] * (len(given) + 1) + [True] * (47 - len(given)),
            )
        )
    x0, maskable = (torch.tensor(part) for part in zip(*rows))
    model = Memory(x0, maskable, model.tokenizer, model.cfg)
    how = dict(between=[], new=None, length=48, sampler="first_hitting", steps=1)
    got = list(dialogues(model, tokenizer, model.cfg, {7: ["Question: who?", ""]}, **how))
    assert got == [{7: ["Answer: 4", "#### 4"]}]


# What SMDM's code (583aa47, with sympy and antlr) says, too: (the model's text, the reference).
RIGHT = [
    (" #### 18", "18"), (" #### 1,234", "1234"), (" #### 1234", "1,234"), (" #### $18", "18"),
    (" #### \\$18", "18"), (" #### $1,000,000", "1000000"), (" #### 18\n", "18"), (" #### -5", "-5"),
    (" #### -1,234", "-1234"), (" #### a 18", "18"),
    (" #### 18 dollars", "18"), (" #### 18.0", "18"), (" #### $18.00", "18"), (" #### 36/2", "18"),
    (" #### 2*9=18", "18"), (" #### x = 18", "18"), (" #### 18 square feet", "18"),
    (" #### 5 hours", "5"), (" #### 1,234.50", "1234.5"), (" #### +18", "18"), (" #### 17\n #### 18", "18"),
]  # fmt: skip
WRONG = [
    (" #### 5", "-5"), (" #### 18 apples", "18"), (" #### 18%", "18"), (" #### 18.5", "18"),
    (" #### 81", "18"), (" #### eighteen", "18"), (" ####", "18"), (" #### ", "18"), ("18", "18"), ("", "18"),
    (" #### 1/0", "18"), (" #### 1e3", "1000"), (" #### 18\n #### 17", "18"),
]  # fmt: skip
RIGHT_HERE = [
    (" #### 18.", "18"), (" #### 18. ", "18"), (" #### 18\nmore", "18"), (" ####18", "18"),
    (" #### 17 #### 18", "18"),
]  # fmt: skip
RIGHT_THERE = [(" #### 6*3", "18"), (" #### \\boxed{18}", "18")]


def test_what_an_answer_states():
    assert all(is_right(*case) for case in RIGHT + RIGHT_HERE)
    assert not any(is_right(*case) for case in WRONG + RIGHT_THERE)
    assert is_right("#### $.50", "0.5") and not is_right("#### .", "0")


# ---------------------------------------------------------------------------------------------------------
# MT-Bench

ASKED = [
    dict(question_id=81, category="writing", turns=["Say one.", "Now two."]),
    dict(question_id=90, category="math", turns=[" 1+1?", "Sure? "]),
    dict(question_id=99, category="none", turns=["Only once."]),
]
REPLIES = {
    "Say one.": "one",
    "Now two.": "two, 2",
    "1+1?": "11",
    "Sure?": "no",
    "Only once.": "once",
}


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """The Memory of conversations of one turn and of two, and its file of questions."""
    folder, conversations = tmp_path_factory.mktemp("chat"), []
    for turns in [[q.strip() for q in record["turns"]] for record in ASKED]:
        for n in range(1, len(turns) + 1):
            said = [x for q in turns[:n] for x in (("human", q), ("gpt", REPLIES[q]))]
            conversations.append(
                {"conversations": [{"from": who, "value": text} for who, text in said]}
            )
    (folder / "chat.json").write_text(json.dumps([*conversations, conversations[0]]))
    options = dict(tokenizer="bpe", vocab_size=380, wrap=96, train_padding=True)
    prepare("sharegpt", str(folder / "data"), input=[str(folder / "chat.json")], **options)
    return memory(folder / "data", vocab_size=380, seq_len=96, bos=True), jsonl(
        folder / "question.jsonl", ASKED
    )


def as_fastchat_reads(path):
    """{question id: its line}, as the loader of FastChat's judge has it, and what the judge then takes from a
    line."""
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
    assert as_fastchat_reads(tmp_path / "first.jsonl") == {
        81: ["one", ""],
        90: ["11", ""],
        99: ["once"],
    }
    refused(capsys, lambda: run("mt_bench", model, *argv), "first.jsonl: answers of another")


def test_the_template_is_vicunas(chat, monkeypatch):
    """What the network is shown: BOS, the system's line, the first question, its answer, EOS, the second
    question."""
    model, tokenizer, shown = chat[0], load_tokenizer(chat[0].tokenizer), []

    def write(model, cfg, eos, prompts, *args, **options):
        shown.append([*map(list, prompts)])
        return [tokenizer.encode(f" reply {len(shown)}")] * len(prompts)

    monkeypatch.setattr(answer, "complete", write)
    texts = answer.mt_bench(ASKED[0], model.cfg, Namespace(first_turn=False))[0]
    got = next(dialogues(model, tokenizer, model.cfg, {0: texts}, [tokenizer.eos], None, 96))
    assert got == {0: ["reply 1", "reply 2"]}
    first = [tokenizer.bos, *tokenizer.encode(f"{SYSTEM} USER: Say one. ASSISTANT:")]
    then = [
        *tokenizer.encode(" reply 1"),
        tokenizer.eos,
        *tokenizer.encode(" USER: Now two. ASSISTANT:"),
    ]
    assert shown == [[first], [first + then]]


def test_llamas_spaces_and_its_begin_of_text(chat, monkeypatch):
    """Only a text's beginning gets Llama's space; a BOS inside of an answer, as SMDM's models write, is kept in
    the context and not shown."""
    cfg, shown = chat[0].cfg, []

    def write(model, cfg, eos, prompts, *args, **options):
        shown.append([*map(list, prompts)])
        return [[OURS.bos, *OURS.encode(" the cat", inside=True)]] * len(prompts)

    monkeypatch.setattr(answer, "complete", write)
    got = next(dialogues(None, OURS, cfg, {3: ["the mat", "on a mat"]}, [OURS.eos], None, 96))
    assert got == {3: ["the cat", "the cat"]}
    first = [OURS.bos, *OURS.encode("the mat")]
    then = [
        OURS.bos,
        *OURS.encode(" the cat", inside=True),
        OURS.eos,
        *OURS.encode("on a mat", inside=True),
    ]
    assert shown == [[first], [first + then]] and OURS.encode("on a mat") != OURS.encode(
        "on a mat", inside=True
    )


@pytest.mark.skipif(not QUESTIONS.exists(), reason=f"no MT-Bench questions at {QUESTIONS}")
def test_the_real_questions(run, tmp_path):
    """80 questions and 160 turns, of which a row of 160 tokens has no room for some."""
    records = [json.loads(line) for line in QUESTIONS.open()]
    spec = train_bpe((turn for record in records for turn in record["turns"]), 1000) | {"eos": True}
    tokenizer = load_tokenizer(spec)
    cfg = Config(vocab_size=1001, seq_len=160, n_embd=8, n_head=1, n_layer=1, cond_dim=0, bos=True)
    path = save(tmp_path / "ckpt.pt", cfg, spec)
    out = tmp_path / "mine.jsonl"
    result = run("mt_bench", path, "--input", QUESTIONS, "--out", out, "--steps", 2, "--new", 20)
    found = as_fastchat_reads(out)
    assert list(found) == [*range(81, 161)] and result["questions"] == 80
    first = [
        len(tokenizer.encode(f"{SYSTEM} USER: {r['turns'][0].strip()} ASSISTANT:")) + 1
        for r in records
    ]
    assert 0 < sum(n >= 160 for n in first) < 40
    assert not any(one + two for (one, two), n in zip(found.values(), first) if n >= 160)
    assert sum(bool(one) for one, _ in found.values()) > 40 and any(
        two for _, two in found.values()
    )
    assert result["empty"] == sum(not text for turns in found.values() for text in turns)


# ---------------------------------------------------------------------------------------------------------
# Rows and files


@pytest.fixture(scope="module")
def checkpoints(folders):
    """An MDLM and its AR twin of random weights, whose answers are noise, different for every question."""
    cfg = replace(tiny_run(folders / "trained"), **SIZE, cond_dim=0)
    spec = memory(folders / "trained", **SIZE).tokenizer
    return {kind: save(folders / f"{kind}.pt", change(cfg), spec) for kind, change in
            (("mdlm", lambda cfg: cfg), ("ar", as_ar))}  # fmt: skip


HOT = ("--temperature", 1, "--steps", 12, "--new", 9)


@pytest.mark.parametrize("kind", ["mdlm", "ar"])
def test_an_answer_does_not_depend_on_its_batch(kind, checkpoints, run, tmp_path):
    for size in (1, 3, 32):
        run("gsm8k", checkpoints[kind], "--out", tmp_path / f"{size}", "--batch_size", size, *HOT)
    assert (
        (tmp_path / "1").read_bytes()
        == (tmp_path / "3").read_bytes()
        == (tmp_path / "32").read_bytes()
    )
    lines = lines_of(tmp_path / "1")
    assert len({line["thought"] for line in lines}) == len({line["answer"] for line in lines}) == 8
    run("gsm8k", checkpoints[kind], "--out", tmp_path / "other", "--seed", 1, *HOT)
    assert all(a["thought"] != b["thought"] for a, b in zip(lines, lines_of(tmp_path / "other")))


def test_a_problem_that_comes_twice_is_two_questions(checkpoints, run, tmp_path):
    jsonl(tmp_path / "test.jsonl", [dict(prompt="Question: 1+1?", answer="2")] * 2)
    result = run("gsm8k", checkpoints["mdlm"], "--data", tmp_path, "--out", tmp_path / "out", *HOT)
    one, two = lines_of(tmp_path / "out")
    assert result["questions"] == 2 and one["id"] != two["id"] and one["thought"] != two["thought"]


def test_stages_have_random_numbers_of_their_own(checkpoints):
    """Were the answer drawn with the thought's, equal canvases would give equal texts."""
    model, cfg = load(checkpoints["mdlm"])
    tokenizer, rows = load_tokenizer(model.tokenizer), []
    with pytest.MonkeyPatch.context() as patch:
        nothing = lambda model, cfg, eos, prompts, given, *a, **k: (
            rows.append(given) or [[]] * len(prompts)
        )
        patch.setattr(answer, "complete", nothing)
        list(
            dialogues(
                model,
                tokenizer,
                cfg,
                {i: ["a", "b"] for i in (0, 1, 5)},
                [],
                None,
                48,
                batch_size=2,
            )
        )
    assert rows == [[0, 2], [1, 3], [10], [11]]


def test_ar_rows_of_one_length_share_the_cache_and_end_early(folders, checkpoints):
    """A call per token until the last has ended; in a batch all come out as alone."""
    model, cfg = load(checkpoints["ar"])
    eos, calls, step = load_tokenizer(model.tokenizer).eos, [], model.next_logits

    def next_logits(x, past):
        calls.append(x.shape)
        return step(x, past) + 5 * (
            torch.arange(cfg.vocab_size) == eos
        )  # answers of various lengths

    model.next_logits, how = next_logits, dict(sampler="ar", steps=1, seed=3, temperature=0.9)
    prompts = [[eos, 5, 6, 7], [eos, 9], [eos, 6, 5, 7], [eos, *range(47)], [eos, *range(60)]]
    alone = [complete(model, cfg, eos, [p], [i], 40, 48, **how)[0] for i, p in enumerate(prompts)]
    model.forward = None  # whatever has no cache
    calls.clear()
    assert complete(model, cfg, eos, prompts, [*range(5)], 40, 48, **how) == alone
    longest, both = max(len(alone[0]), len(alone[2])), [i for n, i in calls if n == 2]
    assert alone[3] == alone[4] == [] and 0 < min(map(len, alone[:3])) < longest < 40
    assert both == [*range(4, 4 + longest + 1)]


def test_only_n_new_tokens_then_end_of_text(checkpoints, monkeypatch):
    model, cfg = load(checkpoints["mdlm"])
    seen, bos, M = [], load_tokenizer(model.tokenizer).bos, cfg.mask_id
    monkeypatch.setattr(
        answer,
        "frames",
        lambda model, cfg, x, rows, sampler, **o: iter([seen.append(x) or x * 0 + 1]),
    )
    got = complete(model, cfg, bos, [[bos, 5], [bos, 6, 7, 8]], [0, 1], 3, 6, sampler="ddpm")
    assert seen[0].tolist() == [[bos, 5, M, M, M, bos], [bos, 6, 7, 8, M, M]]
    assert got == [[1] * 4, [1] * 2]


def killed(argv, after):
    """The command, killed from within when it has written `after` batches."""

    def target():
        whole = answer.dialogues

        def part(*args, **options):
            for n, batch in enumerate(whole(*args, **options)):
                if n == after:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield batch

        answer.dialogues = part
        answer.main([*map(str, argv)])

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("task", ["gsm8k", "mt_bench"])
def test_a_killed_run_goes_on_to_the_same_file(task, checkpoints, run, tmp_path):
    """Killed twice, once with a line cut short; what is there is not asked again, and --limit may grow."""
    own = ["--input", jsonl(tmp_path / "q.jsonl", ASKED)] if task == "mt_bench" else []
    argv = [task, checkpoints["mdlm"], "--batch_size", 1, *HOT, *own]
    run(*argv, "--out", tmp_path / "whole.jsonl")
    out = tmp_path / "part.jsonl"
    killed([*argv, "--device", "cpu", "--out", out], 1)
    assert len(out.read_text().splitlines()) == 1
    killed([*argv, "--device", "cpu", "--out", out], 1)
    written = out.read_bytes()
    assert written.count(b"\n") == 2
    for torn in (1, 9, 60, len(written) - written.index(b"\n") - 2):
        out.write_bytes(written + written[written.index(b"\n") + 1 :][:torn])
        run(*argv, "--out", out, "--limit", 1)
        assert out.read_bytes() == written
    with pytest.MonkeyPatch.context() as patch:
        asked, whole = [], answer.dialogues
        patch.setattr(
            answer,
            "dialogues",
            lambda m, t, c, todo, **k: asked.extend(todo) or whole(m, t, c, todo, **k),
        )
        result = run(*argv, "--out", out)
    assert asked == [*range(2, result["questions"])]
    clean = lambda path: lines_of(path, "tstamp", "model_id")
    assert clean(out) == clean(tmp_path / "whole.jsonl")
    assert task == "mt_bench" or out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert run(*argv, "--out", out) == result


def test_answers_of_anything_else_are_not_mixed_in(checkpoints, folders, run, tmp_path, capsys):
    out = tmp_path / "a.jsonl"
    command = lambda path, *argv: answer.main(
        ["gsm8k", str(path), "--device", "cpu", "--out", str(out), *map(str, argv)]
    )
    run("gsm8k", checkpoints["mdlm"], "--out", out, "--limit", 2, *HOT)
    before = out.read_bytes()
    state = torch.load(checkpoints["mdlm"], weights_only=True)
    state["ema"]["embed.weight"] = state["ema"]["embed.weight"] + 1e-3
    torch.save(state, tmp_path / "other.pt")
    paths = checkpoints | {"other": tmp_path / "other.pt"}
    for argv in (
        ["mdlm", *HOT, "--seed", 1], ["mdlm", *HOT, "--new", 8], ["mdlm", *HOT, "--guidance", 0],
        ["mdlm", *HOT, "--length", 40], ["mdlm", *HOT, "--sampler", "ddpm"], ["mdlm", *HOT, "--steps", 11],
        ["mdlm", *HOT, "--temperature", 2], ["mdlm", *HOT, "--dtype", "bfloat16"], ["ar", *HOT],
        ["other", *HOT],
    ):  # fmt: skip
        again = lambda argv=argv: command(paths[argv[0]], *argv[1:])
        refused(capsys, again, "a.jsonl: answers of another checkpoint, other options")
        assert out.read_bytes() == before
    for text in (
        "my notes",
        '{"my": "notes"}',
        '{"id": "my notes"}\n',
        "[1]\n",
        '{"answer_id": [1]}\n',
        "\n",
    ):
        out.write_text(text)
        refused(capsys, lambda: command(checkpoints["mdlm"], *HOT), "a.jsonl: answers of another")
        assert out.read_text() == text
    out.write_bytes(before)
    (tmp_path / "data").mkdir()
    text = (folders / "trained" / "test.jsonl").read_text()
    (tmp_path / "data" / "test.jsonl").write_text(text.replace("Bob", "Rob"))
    refused(
        capsys,
        lambda: command(checkpoints["mdlm"], *HOT, "--data", tmp_path / "data"),
        "a.jsonl: answers of another",
    )


def test_a_samplers_own_option_counts(checkpoints, run, tmp_path, capsys):
    at = lambda value, out: [
        "gsm8k", checkpoints["mdlm"], "--limit", 4, *HOT, "--sampler", "threshold", "--threshold", value, "--out",
        tmp_path / out,
    ]  # fmt: skip
    assert run(*at(0, "a"))["threshold"] == 0 and run(*at(1, "b"))["threshold"] == 1
    texts = [[json.loads(line)["thought"] for line in open(tmp_path / out)] for out in "ab"]
    assert texts[0] != texts[1]
    refused(
        capsys, lambda: answer.main([*map(str, at(1, "a")), "--device", "cpu"]), "other options"
    )


def test_by_default_the_answers_stand_beside_the_checkpoint(checkpoints, run, tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(checkpoints["ar"].read_bytes())
    for path in (tmp_path / "ckpt.pt", tmp_path):
        assert run("gsm8k", path, "--limit", 1)["out"] == str(tmp_path / "gsm8k.jsonl")
    result = run("mt_bench", tmp_path, "--input", jsonl(tmp_path / "q.jsonl", ASKED), "--limit", 1)
    assert result["out"] == str(tmp_path / "mt_bench.jsonl") and result["sampler"] == "ar"
    assert (result["guidance"], result["temperature"]) == (0, 1.0)


@pytest.mark.parametrize("argv, words", [
    (["gsm8k", "--input", "q.jsonl"], ["--input: not for gsm8k"]),
    (["gsm8k", "--first_turn"], ["--first_turn: not for gsm8k"]),
    (["mt_bench", "--data", "x"], ["--data: not for mt_bench"]),
    (["mt_bench"], ["needs --input"]),
    (["mt_bench", "--input", "gone.jsonl"], ["gone.jsonl: No such file"]),
    (["gsm8k", "--data", "nowhere/here"], ["nowhere/here/test.jsonl: no such file", "prepare.py gsm8k"]),
    (["gsm8k", "--length", "49"], ["--length 49", "48"]),
    (["gsm8k", "--length", "1"], ["--length 1", "at least 2"]),
    (["gsm8k", "--new", "0"], ["--new 0"]),
    (["gsm8k", "--new", "3", "4", "5"], ["--new 3 4 5", "one or two"]),
    (["gsm8k", "--limit", "0"], ["--limit 0"]),
    (["gsm8k", "--steps", "0"], ["--steps 0"]),
    (["gsm8k", "--temperature", "-1"], ["--temperature"]),
    (["gsm8k", "--guidance", "-1"], ["--guidance"]),
    (["gsm8k", "--batch_size", "0"], ["--batch_size 0"]),
    (["gsm8k", "--sampler", "magic"], ["--sampler", "confidence"]),
    (["gsm8k", "--eta", "0.1"], ["--eta 0.1", "remdm_cap", "not of confidence"]),
    (["aime"], ["gsm8k", "mt_bench"]),
])  # fmt: skip
def test_bad_arguments(argv, words, checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(capsys, lambda: answer.main([argv[0], str(checkpoints["mdlm"]), *argv[1:]]), *words)
    assert not any(tmp_path.iterdir())


def test_bad_models_and_bad_records(checkpoints, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    letters = save(tmp_path / "letters.pt", tiny_run("nowhere"))
    refused(capsys, lambda: answer.main(["gsm8k", str(letters), *out]), "no end-of-text")
    refused(
        capsys,
        lambda: answer.main(["gsm8k", str(checkpoints["ar"]), "--guidance", "1", *out]),
        "not for an AR model",
    )
    refused(
        capsys,
        lambda: answer.main(["gsm8k", str(checkpoints["ar"]), "--sampler", "ddpm", *out]),
        "--sampler ddpm",
    )
    good = json.dumps(ASKED[0])
    for name, text, words in (
        ("a.jsonl", good + "\nhello\n", ["a.jsonl: line 2: not JSON"]),
        ("b.jsonl", good + '\n{"turns": ["a"]}\n', ["b.jsonl: record 2: must have question_id and turns"]),
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


# ---------------------------------------------------------------------------------------------------------
# From training on


@pytest.mark.slow
@pytest.mark.parametrize("kind, steps", [("ar", 150), ("mdlm", 1200)])
def test_a_trained_model_answers_what_it_was_taught(kind, steps, folders, run, tmp_path):
    cfg = Config(
        data=str(folders / "trained"), **SIZE, n_layer=2, n_head=2, n_embd=64, cond_dim=0, steps=steps,
        batch_size=16, micro_batch=16, lr=2e-3, muon_lr=0.02, lr_decay="linear", warmup=5, ema=0.0, samples=0,
        eval_every=10**6, save_every=10**6, dtype="float32", device="cpu", out_dir=str(tmp_path / "run"),
    )  # fmt: skip
    train.main(as_ar(cfg) if kind == "ar" else cfg)
    assert run("gsm8k", tmp_path / "run")["right"] == 8
