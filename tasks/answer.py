"""Answers of a fine-tuned checkpoint: to GSM8K's problems and the reversal test, which are scored,
and to MT-Bench's questions, for a judge (tasks/mt_judge.py). Answers are appended to --out batch by
batch; the same command resumes a killed run.

python -m tasks.answer gsm8k out/gsm8k/ckpt.pt             # test.jsonl of its training data
python -m tasks.answer gsm8k smdm_gsm8k.pt --data gsm8k --length 256 --dtype auto
python -m tasks.answer reversal out/facts/ckpt.pt          # SMDM's evaluate_reverse.py
python -m tasks.answer mt_bench out/sharegpt/ckpt.pt --input question.jsonl --out mine.jsonl \\
    --num_choices 4                                           # four answers to each question

Texts are joined as in data/finetune.py. A later text follows the ids that the model wrote, not
their decoded text. A row has --length tokens: everything after the prompt is masked, and the answer
ends at the first end-of-text. A model has seen such rows if it was fine-tuned with --train_padding,
as SMDM's are. Without --train_padding the model always saw where answers end, so pass the length:
with --new N only N tokens are masked.

Defaults are SMDM's. gsm8k: the sampler llada, 256 steps, temperature 0.1 and guidance 0.1, for
thought and answer alike. mt_bench: ancestral sampling, 128 steps, temperature 1 and guidance 0.6.
reversal: greedy, llada, 32 steps, guidance 0.8 and rows of 52 tokens with their prompts.
AR models write from left to right, at the same temperatures and without guidance.
"""

import hashlib
import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch

from common import (
    check_range,
    command,
    compute_dtype,
    fail,
    one_line,
    parser,
    pick_device,
    progress,
    to_json,
)
from data.checkpoints import fingerprint, load, sibling
from data.command_line import (
    add_model_options,
    add_sampler_options,
    check_top_p,
    choose_sampler,
    read_sampler_options,
)
from data.corpus import folder_of, read_meta
from data.finetune import format_question
from data.readers import read_records
from data.tokenizer import tokenizer_of
from sample import frames
from tasks.scoring import character_bleu, contains, is_right, summarise

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
        sampling = frames(model, cfg, canvas, [rows[i] for i in batch], sampler=sampler, **options)
        for x in progress(sampling, unit=" calls"):
            if sampler == "ar" and ((x == eos) & ~given).any(-1).all():
                break  # every row has ended
        for i, ids in zip(batch, x.tolist()):
            ids = [*ids[len(prompts[i]) :], eos]
            answers[i] = ids[: ids.index(eos)]
    return answers


def converse(
    model, tokenizer, cfg, questions, between, new, length, guidance=0.0, batch_size=32, **options
):
    """Yield {number: answers} batch by batch, for questions {number: one or two texts}.

    The model answers a text after reading all before it, with the ids `between` after an answer.
    new: the masks of the first and the second answer, or None; guidance: a number, or one for each
    of the two. Answers depend on the question and its number only."""
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
            w = guidance[min(turn, len(guidance) - 1)] if isinstance(guidance, list) else guidance
            written = complete(
                model, cfg, tokenizer.eos, prompts, rows, masks, length, guidance=w, **options
            )
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


def reversal(record, cfg, args):
    """A prompt of the reversal test; its kind, "of", says whether it asks for a description."""
    prompt, reference, of = (record[key] + "" for key in ("prompt", "answer", "of"))

    def make_record(id, answer):
        made = dict(id=id, prompt=prompt, answer=answer, reference=reference, of=of)
        made["right"] = contains(answer, reference)
        if of in ("p2d", "d2p_reverse"):
            made["bleu"] = character_bleu(answer, reference)
        return made

    return [prompt], make_record


def mt_bench(record, cfg, args):
    """A question of FastChat's file, and a record that its judge reads. SMDM answers the first turn
    only and leaves the second empty; that is --first_turn."""
    question, turns = record["question_id"], record["turns"]
    if not isinstance(turns, list) or len(turns) not in (1, 2):
        raise TypeError
    if not isinstance(question, int | str):
        raise TypeError
    texts = [format_question(turn.strip(), first=i == 0) for i, turn in enumerate(turns)]
    texts = texts[: 1 if args.first_turn else 2]

    def make_record(id, *answers):
        parts = [answers[i : i + len(texts)] for i in range(0, len(answers), len(texts))]
        choices = [
            dict(index=i, turns=[*part, *[""] * (len(turns) - len(part))])
            for i, part in enumerate(parts)
        ]
        return dict(
            question_id=question, answer_id=id, model_id=Path(args.out).stem, choices=choices,
            tstamp=time.time(),
        )  # fmt: skip

    return texts, make_record


TASKS = {"gsm8k": gsm8k, "reversal": reversal, "mt_bench": mt_bench}
FIELDS = {
    "gsm8k": "prompt and answer, texts",
    "reversal": "prompt, answer and of, texts",
    "mt_bench": "question_id and turns, a list of one or two texts",
}
DEFAULTS = {  # SMDM's
    "gsm8k": dict(sampler="llada", steps=256, temperature=0.1, guidance=0.1),
    "reversal": dict(sampler="llada", steps=32, temperature=0.0, guidance=0.8, length=52),
    "mt_bench": dict(sampler=None, steps=128, temperature=1.0, guidance=0.6),
}


# --------------------------------------------------------------------------------------------------
# Files


def read_questions(path, cfg, tokenizer, args):
    """[(texts, make_record)] of the records of a file of JSON lines, and a key of each record."""
    if args.task != "mt_bench" and not path.exists():
        tests = f"python data/prepare.py {args.task} makes it of files with test in their names"
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
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
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
    p.add_argument("--data", help="prepared data with a test.jsonl [the training data]")
    p.add_argument("--input", metavar="FILE", help="mt_bench: FastChat's question.jsonl")
    p.add_argument("--first_turn", action="store_true", help="mt_bench: leave the second empty")
    p.add_argument("--num_choices", type=int, default=1, help="mt_bench: answers to a question [1]")
    p.add_argument("--out", metavar="FILE", help="JSON lines [<task>.jsonl beside the checkpoint]")
    p.add_argument("--limit", type=int, help="number of questions, from the first")
    p.add_argument("--length", type=int, help="tokens of a row with its prompt [the model's]")
    p.add_argument(
        "--new", type=int, nargs="+", metavar="N", help="masks of each answer, or of all"
    )
    add_sampler_options(p, steps=None, temperature=None)
    p.add_argument(
        "--guidance", type=float, nargs="+", metavar="W",
        help="of classifier-free guidance by the prompt, of each answer or of all",
    )  # fmt: skip
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--batch_size", type=int, default=32, help="for memory and speed only")
    add_model_options(p)
    p.add_argument("--json", action="store_true", help="one JSON line on stdout, nothing else")
    args = p.parse_args(argv)
    check_range(
        args,
        num_choices=1,
        limit=1,
        length=2,
        steps=1,
        temperature=0,
        guidance=0,
        seed=0,
        batch_size=1,
    )
    check_top_p(args)
    if args.new and (len(args.new) > 2 or not all(0 < n < 2**31 for n in args.new)):
        fail(f"--new {' '.join(map(str, args.new))}: must be one or two numbers, at least 1")
    if args.guidance and len(args.guidance) > 2:
        fail(f"--guidance {' '.join(map(str, args.guidance))}: must be one or two numbers")
    for option in ("data",) if args.task == "mt_bench" else ("input", "first_turn"):
        if getattr(args, option):
            fail(f"--{option}: not for {args.task}")
    if args.task != "mt_bench" and args.num_choices > 1:
        fail(f"--num_choices: not for {args.task}")
    if args.task == "mt_bench" and not args.input:
        fail("mt_bench: needs --input question.jsonl")
    return args


def settle_options(args, cfg, device):
    """The options of `converse` that change the answers: given, the task's, or the model's."""
    if args.length and args.length > cfg.seq_len:
        fail(f"--length {args.length}: must be at most the model's, {cfg.seq_len}")
    if cfg.causal and any(args.guidance or []):
        fail("--guidance: not for an AR model")
    if args.guidance and len(args.guidance) == 1:
        args.guidance = args.guidance[0]
    options = DEFAULTS[args.task] | (dict(sampler=None, guidance=0.0) if cfg.causal else {})
    options.setdefault("length", cfg.seq_len)
    options |= {name: value for name in options if (value := getattr(args, name)) is not None}
    options["sampler"] = choose_sampler(cfg, options["sampler"])
    given = read_sampler_options(args, options["sampler"], cfg)
    if args.sampler is None and options["sampler"] == "llada":
        given = dict(lucky=1) | given  # SMDM's rule, at its temperature
    return options | dict(
        length=min(options["length"], cfg.seq_len), new=args.new, top_p=args.top_p, seed=args.seed,
        dtype=compute_dtype(device, args.dtype),
        sampler_options=given,
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
    waiting = {  # choice c of question i has the number i + c N of N questions
        i + c * len(ids): questions[i][0]
        for i in range(n)
        if i not in done
        for c in range(args.num_choices)
    }
    written = defaultdict(list)  # answers to questions that lack some of their choices
    note_untrained_padding(cfg, args)
    wanted = lambda i: args.num_choices * len(questions[i][0])
    between = [tokenizer.eos] if args.task == "mt_bench" else []
    left = len(waiting) // args.num_choices
    bar = progress(total=n, initial=n - left, unit=" questions", disable=args.json)
    with open(out, "ab") as f, bar:
        options = options | dict(batch_size=args.batch_size)
        for batch in converse(model, tokenizer, cfg, waiting, between, **options):
            for number, answers in batch.items():
                written[number % len(ids)] += answers
            whole = [i for i in written if len(written[i]) == wanted(i)]
            done |= {i: questions[i][1](ids[i], *written.pop(i)) for i in whole}
            f.write("".join(json.dumps(done[i]) + "\n" for i in whole).encode())
            f.flush()
            bar.update(len(whole))
    return [done[i] for i in range(n)]


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
    about = dict(task=args.task, first_turn=args.first_turn, num_choices=args.num_choices)
    run = fingerprint(model, **about, **options)
    ids = [hashlib.sha256(f"{run} {key}".encode()).hexdigest()[:24] for key in keys]

    try:
        done = answer_questions(model, cfg, tokenizer, questions, ids, options, args)
    except OSError as e:
        fail(one_line(e))

    result, text = summarise(done, questions, args.task, args.out)
    options |= options.pop("sampler_options")
    shown = ", ".join(f"{name} {value}" for name, value in options.items() if value is not None)
    about = dict(out=args.out, ckpt=args.ckpt, step=model.step, ema=not args.no_ema)
    result |= options | about
    print(to_json(result) if args.json else f"{text}\n{shown}")
    return result


if __name__ == "__main__":
    main()
