"""What a fine-tuned checkpoint answers: to GSM8K's problems, which are scored, and to MT-Bench's questions,
for FastChat's judge. Answers are written as they come, and a run that was cut short goes on.

python -m tasks.answer gsm8k out/gsm8k/ckpt.pt                    # the problems in test.jsonl of its data
python -m tasks.answer gsm8k smdm_gsm8k.pt --data gsm8k --length 256 --dtype auto
python -m tasks.answer mt_bench out/sharegpt/ckpt.pt --input question.jsonl --out model_answer/mine.jsonl

Texts are put together as in data/finetune.py, and each goes on from the ids that the model wrote, not from
their text. A row has --length tokens; all that is behind its prompt is masked, and read up to the first
end-of-text. Such rows were seen by a model that was fine-tuned with --train_padding, and by SMDM's. To one
without, the padding has always shown where an answer ends, so it has to be told: with --new N only N tokens
are masked.

Defaults are SMDM's: for gsm8k the sampler confidence, 256 steps, temperature 0.1 and guidance 0.1, for
thought and answer alike; for mt_bench ancestral sampling, 128 steps, temperature 1 and guidance 0.6. AR
models write from left to right, at the same temperatures and without guidance.
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
    choose_sampler,
    compute_dtype,
    fail,
    one_line,
    parser,
    pick_device,
    read_sampler_options,
    sibling,
    to_json,
)
from data.corpus import folder_of, read_meta
from data.finetune import asked, records
from data.tokenizer import tokenizer_of
from evaluate import fingerprint
from model import load
from sample import frames

# ---------------------------------------------------------------------------------------------------------
# Writing


def complete(model, cfg, eos, prompts, rows, new, length, sampler, **options):
    """The ids that the model writes behind each of `prompts`, lists of ids, up to the first eos. At most
    `new` are masked in a row of `length`, and eos stand behind them; a prompt that fills the row gets
    nothing. Prompt i has the random numbers of row rows[i]; options: see `frames`. An AR model's rows share a
    batch only if their prompts are equally long, which its cache of keys and values needs."""
    written, batches = [[] for _ in prompts], defaultdict(list)
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
                break  # nothing that is read is still to come
        for i, ids in zip(batch, x.tolist()):
            ids = [*ids[len(prompts[i]) :], eos]
            written[i] = ids[: ids.index(eos)]
    return written


def dialogues(model, tokenizer, cfg, questions, between, new, length, batch_size=32, **options):
    """questions {number: one or two texts}: the model answers each text, having read all before it, with the
    ids `between` behind an answer. Yield {number: answers}, batch by batch. new: that of `complete` for the
    first and the second answer, or None. Answers depend on the question and its number, not on what else is
    asked."""
    numbers = list(questions)
    for batch in (numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)):
        context, answers = {i: [tokenizer.bos] for i in batch}, {i: [] for i in batch}
        for turn in range(max(len(questions[i]) for i in batch)):
            now = [i for i in batch if turn < len(questions[i])]
            for i in now:
                context[i] += between * (turn > 0) + tokenizer.encode(
                    questions[i][turn], inside=turn > 0
                )
            prompts, rows = [context[i] for i in now], [2 * i + turn for i in now]
            most = new[min(turn, len(new) - 1)] if new else length
            written = complete(model, cfg, tokenizer.eos, prompts, rows, most, length, **options)
            for i, ids in zip(now, written):
                context[i] += ids
                answers[i].append(
                    tokenizer.decode([id for id in ids if id != tokenizer.bos]).strip()
                )
        yield answers


# ---------------------------------------------------------------------------------------------------------
# The tasks: (record of a file, cfg, args) -> the texts that are given, and line(id, *answers), to be written


def gsm8k(record, cfg, args):
    """A prompt and its true answer: a thought, and behind it the model's answer, unless the thought has it.
    The two rows of a problem, one of which ends with the thought, look alike from the left: an AR model may
    go on or not, and is given the #### if it does not."""
    prompt, reference, begin = (
        record["prompt"] + "",
        record["answer"] + "",
        " ####" if cfg.causal else "",
    )

    def line(id, thought, answer):
        thought, sign, rest = thought.partition("####")
        answer = sign + rest if sign else f"{begin} {answer}".strip()
        right = is_right(answer, reference)
        return dict(
            id=id,
            prompt=prompt,
            thought=thought.strip(),
            answer=answer,
            reference=reference,
            right=right,
        )

    return [prompt, begin], line


def is_right(text, reference):
    """Whether the line behind the last #### states the reference. (SMDM wants a space behind ####, and no
    line below it.)"""
    stated = text.rpartition("####")[2].strip().split("\n")[0]
    return "####" in text and number(stated) == number(reference)


UNITS = (
    "square|ways|integers|dollars|mph|inches|ft|hours|km|units|points|feet|minutes|digits|cents|degrees|"
    "cm|gm|pounds|meters|meals|edges|students|multiples"
)


def number(text):
    """The number that an answer states, as a Fraction, or what is left of the text if it states none. Taken
    away is what Minerva (arXiv 2206.14858, appendix D), and so SMDM, takes away: all up to the last =,
    articles, spaces, commas, $ and UNITS; and a full stop at the end, which they leave. They also read LaTeX
    and do sums, of which only fractions are done here: 36/2 is 18."""
    text = re.sub(rf"an? |\\?\$|[\s,]|{UNITS}", "", text.rpartition("=")[2]).removesuffix(".")
    return Fraction(text) if re.fullmatch(r"[+-]?(\d+(\.\d+|/0*[1-9]\d*)?|\.\d+)", text) else text


def mt_bench(record, cfg, args):
    """A question of FastChat's file, and a line that its judge reads. SMDM answers the first turn alone and
    leaves the second empty; that is --first_turn."""
    question, turns = record["question_id"], record["turns"]
    if (
        not isinstance(turns, list)
        or not 1 <= len(turns) <= 2
        or not isinstance(question, int | str)
    ):
        raise TypeError
    texts = [asked(turn.strip(), first=i == 0) for i, turn in enumerate(turns)]

    def line(id, *answers):
        choice = dict(index=0, turns=[*answers, *[""] * (len(turns) - len(answers))])
        return dict(
            question_id=question, answer_id=id, model_id=Path(args.out).stem, choices=[choice],
            tstamp=time.time(),
        )  # fmt: skip

    return texts[: 1 if args.first_turn else 2], line


TASKS = {"gsm8k": gsm8k, "mt_bench": mt_bench}
FIELDS = {
    "gsm8k": "prompt and answer, texts",
    "mt_bench": "question_id and turns, a list of one or two texts",
}
DEFAULTS = {  # SMDM's
    "gsm8k": dict(sampler="confidence", steps=256, temperature=0.1, guidance=0.1),
    "mt_bench": dict(sampler=None, steps=128, temperature=1.0, guidance=0.6),
}


# ---------------------------------------------------------------------------------------------------------
# Files


def read(path, task, tokenizer, cfg, args):
    """[(texts, line)] of the records of a file of JSON lines, and for each what its id depends on."""
    try:
        found, questions = records(path), []
        for n, record in enumerate(found, 1):
            try:
                questions.append(TASKS[task](record, cfg, args))
            except (KeyError, TypeError, AttributeError):
                fail(f"{path}: record {n}: must have {FIELDS[task]}")
            if task == "mt_bench" and record["question_id"] in [
                r["question_id"] for r in found[: n - 1]
            ]:
                fail(
                    f"{path}: record {n}: question_id {record['question_id']} twice"
                )  # the judge reads one
            tokenizer.encode_batch(questions[-1][0])
    except OSError as e:
        fail(one_line(e))
    except ValueError as e:
        fail(f"{path}: {one_line(e)}")
    return questions, [f"{n} {json.dumps(record)}" for n, record in enumerate(found)]


def written_before(path, numbers):
    """{number: record} of the lines that the same command has written before, by numbers {id: number}. A last
    line that was cut short is cut off; a line of anything else ends the command."""
    content, found, size = path.read_bytes() if path.exists() else b"", {}, 0
    ours = b'{"id": "', b'{"question_id": '  # how our lines begin
    for line in content.splitlines(keepends=True):
        if not line.endswith(b"\n") and any(line.startswith(a) or a.startswith(line) for a in ours):
            break
        try:
            record = json.loads(line)
            found[numbers[record.get("answer_id") or record["id"]]] = record
        except (ValueError, KeyError, TypeError, AttributeError):
            fail(
                f"{path}: answers of another checkpoint, other options or questions; --out writes elsewhere"
            )
        size += len(line)
    if size < len(content):
        os.truncate(path, size)
    return found


# ---------------------------------------------------------------------------------------------------------


def main(argv=None):
    p = parser(__doc__)
    p.add_argument("task", choices=TASKS)
    p.add_argument("ckpt")
    p.add_argument("--data", help="gsm8k: prepared data with a test.jsonl [the training data]")
    p.add_argument("--input", metavar="FILE", help="mt_bench: FastChat's question.jsonl")
    p.add_argument(
        "--first_turn", action="store_true", help="mt_bench: the second turn is left empty"
    )
    p.add_argument("--out", metavar="FILE", help="JSON lines [<task>.jsonl beside the checkpoint]")
    p.add_argument("--limit", type=int, help="the first so many questions")
    p.add_argument(
        "--length", type=int, help="tokens of a row, its prompt among them [the model's]"
    )
    p.add_argument(
        "--new", type=int, nargs="+", metavar="N", help="most tokens of the first, second answer"
    )
    add_sampler_options(p, steps=None, temperature=None)
    p.add_argument("--guidance", type=float, help="w of classifier-free guidance by what is given")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--batch_size", type=int, default=32, help="changes memory and speed, not the answers"
    )
    add_model_options(p)
    p.add_argument("--json", action="store_true", help="one JSON line on stdout, nothing else")
    args = p.parse_args(argv)
    check_range(args, limit=1, length=2, steps=1, temperature=0, guidance=0, seed=0, batch_size=1)
    if args.new and (len(args.new) > 2 or not all(0 < n < 2**31 for n in args.new)):
        fail(f"--new {' '.join(map(str, args.new))}: must be one or two numbers, at least 1")
    for option in ("input", "first_turn") if args.task == "gsm8k" else ("data",):
        if getattr(args, option):
            fail(f"--{option}: not for {args.task}")
    if args.task == "mt_bench" and not args.input:
        fail("mt_bench: needs --input question.jsonl")

    device = pick_device(args.device)
    model, cfg = load(args.ckpt, not args.no_ema, device, args.dtype)
    tokenizer, length = tokenizer_of(model.tokenizer), args.length or cfg.seq_len
    if tokenizer.eos is None:
        fail(f"{args.ckpt}: its tokenizer has no end-of-text, so the model cannot end an answer")
    if length > cfg.seq_len:
        fail(f"--length {length}: must be at most the model's, {cfg.seq_len}")
    if cfg.causal and args.guidance:
        fail("--guidance: not for an AR model")
    sampling = DEFAULTS[args.task] | (dict(sampler=None, guidance=0.0) if cfg.causal else {})
    sampling |= {name: value for name in sampling if (value := getattr(args, name)) is not None}
    sampling["sampler"] = choose_sampler(cfg, sampling["sampler"])
    own = read_sampler_options(args, sampling["sampler"])
    options = sampling | dict(
        seed=args.seed, dtype=compute_dtype(device, args.dtype), sampler_options=own
    )
    told = dict(length=length, new=args.new)

    path = Path(args.input) if args.input else folder_of(args.data or cfg.data) / "test.jsonl"
    args.out = args.out or sibling(args.ckpt, f"{args.task}.jsonl")
    if args.task == "gsm8k" and not path.exists():
        fail(
            f"{path}: no such file; python data/prepare.py gsm8k makes it of files with test in their names"
        )
    questions, ids = read(path, args.task, tokenizer, cfg, args)
    key = fingerprint(model, task=args.task, first_turn=args.first_turn, **told, **options)
    ids = [hashlib.sha256(f"{key} {id}".encode()).hexdigest()[:24] for id in ids]
    out, n = Path(args.out), min(args.limit or len(ids), len(ids))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lines = written_before(out, {id: i for i, id in enumerate(ids)})
        todo = {i: questions[i][0] for i in range(n) if i not in lines}
        known = not cfg.causal and not args.new and (folder_of(cfg.data) / "meta.json").exists()
        if known and read_meta(cfg.data)["splits"].get("train", {}).get("padding"):
            note = "without --train_padding the model has to be told where answers end: --new"
            sys.stderr.write(f"note: {note}\n")
        bar = tqdm(total=n, initial=n - len(todo), unit="question", leave=False, disable=args.json)
        between = [] if args.task == "gsm8k" else [tokenizer.eos]
        how = dict(between=between, batch_size=args.batch_size, **told, **options)
        with open(out, "ab") as f, bar:
            for batch in dialogues(model, tokenizer, cfg, todo, **how):
                lines |= {i: questions[i][1](ids[i], *answers) for i, answers in batch.items()}
                f.write("".join(json.dumps(lines[i]) + "\n" for i in batch).encode())
                f.flush()
                bar.update(len(batch))
    except OSError as e:
        fail(one_line(e))

    done = [lines[i] for i in range(n)]
    written = [
        r["choices"][0]["turns"] if "choices" in r else [r["thought"], r["answer"]] for r in done
    ]
    empty = sum(
        not answer.strip("#")
        for (texts, _), own in zip(questions, written)
        for _, answer in zip(texts, own)
    )
    result, text = dict(task=args.task, questions=n, empty=empty), ""
    if args.task == "gsm8k":
        right = sum(r["right"] for r in done)
        error = (right / n * (1 - right / n) / n) ** 0.5
        result |= dict(right=right, accuracy=right / n, accuracy_se=error)
        text = (
            f"accuracy {100 * right / n:.2f} ± {100 * error:.2f} %, {right:,} of {n:,} problems\n"
        )
    text += f"{n:,} questions, {empty:,} of their answers empty, in {out}\n"
    told |= {name: value for name, value in options.items() if name != "own"} | own
    text += ", ".join(f"{name} {value}" for name, value in told.items() if value is not None)
    result |= told | {
        "out": str(out),
        "ckpt": args.ckpt,
        "step": model.step,
        "ema": not args.no_ema,
    }
    print(to_json(result) if args.json else text)
    return result


if __name__ == "__main__":
    main()
