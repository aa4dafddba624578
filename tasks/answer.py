"""Answers of a fine-tuned checkpoint: to GSM8K's problems, which are scored, and to MT-Bench's
questions, for FastChat's judge. Answers are appended to --out batch by batch; the same command
resumes a killed run.

python -m tasks.answer gsm8k out/gsm8k/ckpt.pt             # test.jsonl of its training data
python -m tasks.answer gsm8k smdm_gsm8k.pt --data gsm8k --length 256 --dtype auto
python -m tasks.answer mt_bench out/sharegpt/ckpt.pt --input question.jsonl --out mine.jsonl

Texts are joined as in data/finetune.py. A later text follows the ids that the model wrote, not
their decoded text. A row has --length tokens: everything after the prompt is masked, and the answer
ends at the first end-of-text. A model has seen such rows if it was fine-tuned with --train_padding,
as SMDM's are. Without --train_padding the model always saw where answers end, so pass the length:
with --new N only N tokens are masked.

Defaults are SMDM's. gsm8k: the sampler confidence, 256 steps, temperature 0.1 and guidance 0.1, for
thought and answer alike. mt_bench: ancestral sampling, 128 steps, temperature 1 and guidance 0.6.
AR models write from left to right, at the same temperatures and without guidance.
"""

import hashlib
import json
import os
import re
import sys
import time
from collections import defaultdict
from fractions import Fraction
from pathlib import Path

import torch
from tqdm import tqdm

from common import (
    add_model_options,
    add_sampler_options,
    check_range,
    check_top_p,
    choose_sampler,
    command,
    compute_dtype,
    fail,
    one_line,
    parser,
    pick_device,
    read_sampler_options,
    to_json,
)
from data.checkpoints import fingerprint, load, sibling
from data.corpus import folder_of, read_meta
from data.finetune import format_question
from data.readers import read_records
from data.tokenizer import tokenizer_of
from sample import frames

# --------------------------------------------------------------------------------------------------
# Writing


def complete(model, cfg, eos, prompts, rows, new, length, sampler, **options):
    """The ids that the model writes after each of `prompts`, lists of ids, up to the first eos.

    A row of `length` holds a prompt, at most `new` masks, then eos; a prompt that fills the row
    gets no ids. Prompt i has the random numbers of row rows[i]; options: see `frames`. The rows of
    an AR model share a batch only if their prompts are equally long: its cache of keys and values
    needs that."""
    answers, batches = [[] for _ in prompts], defaultdict(list)
    for i, prompt in enumerate(prompts):
        if len(prompt) < length:
            batches[len(prompt) if cfg.causal else 0].append(i)
    for batch in batches.values():
        canvas = torch.full((len(batch), length), eos)
        for row, i in zip(canvas, batch):
            row[: len(prompts[i])] = torch.tensor(prompts[i])
            row[len(prompts[i]) :][:new] = cfg.mask_id
        given = (canvas != cfg.mask_id).to(next(model.parameters()).device)
        for x in frames(model, cfg, canvas, [rows[i] for i in batch], sampler=sampler, **options):
            if sampler == "ar" and ((x == eos) & ~given).any(-1).all():
                break  # every row has ended
        for i, ids in zip(batch, x.tolist()):
            ids = [*ids[len(prompts[i]) :], eos]
            answers[i] = ids[: ids.index(eos)]
    return answers


def converse(model, tokenizer, cfg, questions, between, new, length, batch_size=32, **options):
    """Yield {number: answers} batch by batch, for questions {number: one or two texts}.

    The model answers a text after reading all before it, with the ids `between` after an answer.
    new: the masks of the first and the second answer, or None. Answers depend on the question and
    its number only."""
    numbers = list(questions)
    for batch in (numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)):
        context, answers = {i: [tokenizer.bos] for i in batch}, {i: [] for i in batch}
        for turn in range(max(len(questions[i]) for i in batch)):
            active = [i for i in batch if turn < len(questions[i])]
            for i in active:
                text = tokenizer.encode(questions[i][turn], inside=turn > 0)
                context[i] += between * (turn > 0) + text
            prompts, rows = [context[i] for i in active], [2 * i + turn for i in active]
            masks = new[min(turn, len(new) - 1)] if new else length
            written = complete(model, cfg, tokenizer.eos, prompts, rows, masks, length, **options)
            for i, ids in zip(active, written):
                context[i] += ids
                text = tokenizer.decode([id for id in ids if id != tokenizer.bos])
                answers[i].append(text.strip())
        yield answers


# --------------------------------------------------------------------------------------------------
# The tasks: (record of a file, cfg, args) -> the texts to answer, and make_record(id, *answers)


def gsm8k(record, cfg, args):
    """A prompt, which the model follows with a thought and, if that has no ####, with an answer.
    Training has two rows per problem, and one of them ends after the thought. From the left they
    look alike, so an AR model may stop or continue; if it stops, it gets the #### as a prompt."""
    prompt, reference = record["prompt"] + "", record["answer"] + ""  # TypeError unless texts
    begin = " ####" if cfg.causal else ""

    def make_record(id, thought, answer):
        thought, sign, rest = thought.partition("####")
        answer = sign + rest if sign else f"{begin} {answer}".strip()
        return dict(
            id=id, prompt=prompt, thought=thought.strip(), answer=answer, reference=reference,
            right=is_right(answer, reference),
        )  # fmt: skip

    return [prompt, begin], make_record


def is_right(text, reference):
    r"""Whether the line after the last #### states the number of the reference.

    SMDM's evaluate_gsm8k.py reads what follows the first "#### ", with its space, of the last line
    by sympy's LaTeX parser. The two differ in answers such as these:

        text                    reference  here   SMDM
        ' #### 0018'            '18'       right  wrong
        ' #### .5'              '0.5'      right  wrong
        ' #### 0.5'             '.5'       right  wrong
        ' #### 18.'             '18'       right  wrong
        ' #### 18 #### 19'      '19'       right  wrong
        ' ####18'               '18'       right  wrong
        ' #### 18\nmore'        '18'       right  wrong
        ' #### (18)'            '18'       wrong  right
        ' #### "18"'            '18'       wrong  right
        ' #### 6*3'             '18'       wrong  right
        ' #### 18=2*9'          '18'       wrong  right
        ' #### \\frac{36}{2}'   '18'       wrong  right
        ' #### \\boxed{18}'     '18'       wrong  right
    """
    stated = text.rpartition("####")[2].strip().split("\n")[0]
    return "####" in text and parse_number(stated) == parse_number(reference)


UNITS = (
    "square|ways|integers|dollars|mph|inches|ft|hours|km|units|points|feet|minutes|digits|cents|"
    "degrees|cm|gm|pounds|meters|meals|edges|students|multiples"
)


def parse_number(text):
    """The number that an answer states, as a Fraction, or the rest of the text if it states none.

    As Minerva (arXiv 2206.14858, appendix D) and SMDM do, remove everything up to the last =,
    articles, spaces, commas, $ and UNITS; also a full stop at the end, which they keep. They read
    LaTeX and sums too, of which this reads fractions only: 36/2 is 18."""
    text = re.sub(rf"an? |\\?\$|[\s,]|{UNITS}", "", text.rpartition("=")[2]).removesuffix(".")
    return Fraction(text) if re.fullmatch(r"[+-]?(\d+(\.\d+|/0*[1-9]\d*)?|\.\d+)", text) else text


def mt_bench(record, cfg, args):
    """A question of FastChat's file, and a record that its judge reads. SMDM answers the first turn
    only and leaves the second empty; that is --first_turn."""
    question, turns = record["question_id"], record["turns"]
    if not isinstance(turns, list) or len(turns) not in (1, 2):
        raise TypeError
    if not isinstance(question, int | str):
        raise TypeError
    texts = [format_question(turn.strip(), first=i == 0) for i, turn in enumerate(turns)]

    def make_record(id, *answers):
        choice = dict(index=0, turns=[*answers, *[""] * (len(turns) - len(answers))])
        return dict(
            question_id=question, answer_id=id, model_id=Path(args.out).stem, choices=[choice],
            tstamp=time.time(),
        )  # fmt: skip

    return texts[: 1 if args.first_turn else 2], make_record


TASKS = {"gsm8k": gsm8k, "mt_bench": mt_bench}
FIELDS = {
    "gsm8k": "prompt and answer, texts",
    "mt_bench": "question_id and turns, a list of one or two texts",
}
DEFAULTS = {  # SMDM's
    "gsm8k": dict(sampler="confidence", steps=256, temperature=0.1, guidance=0.1),
    "mt_bench": dict(sampler=None, steps=128, temperature=1.0, guidance=0.6),
}


# --------------------------------------------------------------------------------------------------
# Files


def read_questions(path, cfg, tokenizer, args):
    """[(texts, make_record)] of the records of a file of JSON lines, and a key of each record."""
    if args.task == "gsm8k" and not path.exists():
        tests = "python data/prepare.py gsm8k makes it of files with test in their names"
        fail(f"{path}: no such file; {tests}")
    try:
        found, questions, seen = [record for _, record in read_records(path)], [], set()
        if not found:
            raise ValueError("line 1: not JSON, the file is empty")
        for n, record in enumerate(found, 1):
            try:
                questions.append(TASKS[args.task](record, cfg, args))
            except (KeyError, TypeError, AttributeError):
                fail(f"{path}: record {n}: must have {FIELDS[args.task]}")
            name = record["question_id"] if args.task == "mt_bench" else n
            if name in seen:  # the judge reads one
                fail(f"{path}: record {n}: question_id {name} twice")
            seen.add(name)
            tokenizer.encode_batch(questions[-1][0])  # ValueError outside the vocabulary
    except OSError as e:
        fail(one_line(e))
    except ValueError as e:
        fail(f"{path}: {one_line(e)}")
    return questions, [f"{n} {json.dumps(record)}" for n, record in enumerate(found)]


def read_answers(path, numbers):
    """{number: record} of the lines that the same command wrote before; numbers: {id: number}. Cuts
    off an incomplete last line; fails at a line of anything else."""
    content, found, size = path.read_bytes() if path.exists() else b"", {}, 0
    starts = b'{"id": "', b'{"question_id": '  # of our lines
    for line in content.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            if any(line.startswith(start) or start.startswith(line) for start in starts):
                break
        try:
            record = json.loads(line)
            found[numbers[record.get("answer_id") or record["id"]]] = record
        except (ValueError, KeyError, TypeError, AttributeError):
            others = "answers of another checkpoint, other options or questions"
            fail(f"{path}: {others}; --out writes elsewhere")
        size += len(line)
    if size < len(content):
        os.truncate(path, size)
    return found


# --------------------------------------------------------------------------------------------------
# The command


def parse_arguments(argv):
    p = parser(__doc__)
    p.add_argument("task", choices=TASKS)
    p.add_argument("ckpt")
    p.add_argument("--data", help="gsm8k: prepared data with a test.jsonl [the training data]")
    p.add_argument("--input", metavar="FILE", help="mt_bench: FastChat's question.jsonl")
    p.add_argument("--first_turn", action="store_true", help="mt_bench: leave the second empty")
    p.add_argument("--out", metavar="FILE", help="JSON lines [<task>.jsonl beside the checkpoint]")
    p.add_argument("--limit", type=int, help="number of questions, from the first")
    p.add_argument("--length", type=int, help="tokens of a row with its prompt [the model's]")
    p.add_argument(
        "--new", type=int, nargs="+", metavar="N", help="masks of each answer, or of all"
    )
    add_sampler_options(p, steps=None, temperature=None)
    p.add_argument("--guidance", type=float, help="w of classifier-free guidance by the prompt")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--batch_size", type=int, default=32, help="for memory and speed only")
    add_model_options(p)
    p.add_argument("--json", action="store_true", help="one JSON line on stdout, nothing else")
    args = p.parse_args(argv)
    check_range(args, limit=1, length=2, steps=1, temperature=0, guidance=0, seed=0, batch_size=1)
    check_top_p(args)
    if args.new and (len(args.new) > 2 or not all(0 < n < 2**31 for n in args.new)):
        fail(f"--new {' '.join(map(str, args.new))}: must be one or two numbers, at least 1")
    for option in ("input", "first_turn") if args.task == "gsm8k" else ("data",):
        if getattr(args, option):
            fail(f"--{option}: not for {args.task}")
    if args.task == "mt_bench" and not args.input:
        fail("mt_bench: needs --input question.jsonl")
    return args


def settle_options(args, cfg, device):
    """The options of `converse` that change the answers: given, the task's, or the model's."""
    if args.length and args.length > cfg.seq_len:
        fail(f"--length {args.length}: must be at most the model's, {cfg.seq_len}")
    if cfg.causal and args.guidance:
        fail("--guidance: not for an AR model")
    options = DEFAULTS[args.task] | (dict(sampler=None, guidance=0.0) if cfg.causal else {})
    options |= {name: value for name in options if (value := getattr(args, name)) is not None}
    options["sampler"] = choose_sampler(cfg, options["sampler"])
    return options | dict(
        length=args.length or cfg.seq_len, new=args.new, top_p=args.top_p, seed=args.seed,
        dtype=compute_dtype(device, args.dtype),
        sampler_options=read_sampler_options(args, options["sampler"]),
    )  # fmt: skip


def note_untrained_padding(cfg, args):
    """A note if the model has not learnt where answers end, as far as its data is here."""
    if cfg.causal or args.new or not (folder_of(cfg.data) / "meta.json").exists():
        return
    if read_meta(cfg.data)["splits"].get("train", {}).get("padding"):
        note = "trained without --train_padding, so pass the length of its answers: --new"
        sys.stderr.write(f"note: {note}\n")


def answer_questions(model, cfg, tokenizer, questions, ids, options, args):
    """Answer what --out does not hold yet, and append it there; the records of all questions."""
    out, n = Path(args.out), min(args.limit or len(ids), len(ids))
    out.parent.mkdir(parents=True, exist_ok=True)
    done = read_answers(out, {id: i for i, id in enumerate(ids)})
    waiting = {i: questions[i][0] for i in range(n) if i not in done}
    note_untrained_padding(cfg, args)
    between = [] if args.task == "gsm8k" else [tokenizer.eos]
    bar = tqdm(total=n, initial=n - len(waiting), unit="question", leave=False, disable=args.json)
    with open(out, "ab") as f, bar:
        options = options | dict(batch_size=args.batch_size)
        for batch in converse(model, tokenizer, cfg, waiting, between, **options):
            done |= {i: questions[i][1](ids[i], *answers) for i, answers in batch.items()}
            f.write("".join(json.dumps(done[i]) + "\n" for i in batch).encode())
            f.flush()
            bar.update(len(batch))
    return [done[i] for i in range(n)]


def summarise(done, questions, args):
    """The figures of the records, and the same as text."""
    n, empty = len(done), 0
    for record, (texts, _) in zip(done, questions):
        if args.task == "gsm8k":
            answers = record["thought"], record["answer"]
        else:
            answers = record["choices"][0]["turns"]
        empty += sum(not answer.strip("#") for _, answer in zip(texts, answers))
    result = dict(task=args.task, questions=n, empty=empty)
    text = f"{n:,} questions, {empty:,} of their answers empty, in {args.out}"
    if args.task == "gsm8k":
        right = sum(record["right"] for record in done)
        accuracy, error = right / n, (right / n * (1 - right / n) / n) ** 0.5
        result |= dict(right=right, accuracy=accuracy, accuracy_se=error)
        share = f"accuracy {100 * accuracy:.2f} ± {100 * error:.2f} %"
        text = f"{share}, {right:,} of {n:,} problems\n{text}"
    return result, text


@command
def main(argv=None):
    args = parse_arguments(argv)
    device = pick_device(args.device)
    model, cfg = load(args.ckpt, not args.no_ema, device, args.dtype)
    tokenizer = tokenizer_of(model.tokenizer)
    if tokenizer.eos is None:
        fail(f"{args.ckpt}: its tokenizer has no end-of-text, so the model cannot end an answer")
    options = settle_options(args, cfg, device)
    path = Path(args.input) if args.input else folder_of(args.data or cfg.data) / "test.jsonl"
    args.out = str(args.out or sibling(args.ckpt, f"{args.task}.jsonl"))
    questions, keys = read_questions(path, cfg, tokenizer, args)
    run = fingerprint(model, task=args.task, first_turn=args.first_turn, **options)
    ids = [hashlib.sha256(f"{run} {key}".encode()).hexdigest()[:24] for key in keys]

    try:
        done = answer_questions(model, cfg, tokenizer, questions, ids, options, args)
    except OSError as e:
        fail(one_line(e))

    result, text = summarise(done, questions, args)
    options |= options.pop("sampler_options")
    shown = ", ".join(f"{name} {value}" for name, value in options.items() if value is not None)
    about = dict(out=args.out, ckpt=args.ckpt, step=model.step, ema=not args.no_ema)
    result |= options | about
    print(to_json(result) if args.json else f"{text}\n{shown}")
    return result


if __name__ == "__main__":
    main()
