"""MT-Bench to the end: a judge rates the answers of tasks/answer.py, and a table shows the ratings.

python -m tasks.answer mt_bench out/sharegpt/ckpt.pt --input question.jsonl --out mine.jsonl
python -m tasks.mt_judge judge mine.jsonl --questions question.jsonl \\
    --prompts judge_prompts.jsonl --references gpt-4.jsonl --judge gpt-4o-2024-05-13
python -m tasks.mt_judge table mine.judged.jsonl other.judged.jsonl

question.jsonl, judge_prompts.jsonl and reference_answer/gpt-4.jsonl are files of FastChat's
fastchat/llm_judge/data. The judge is any server with OpenAI's chat completions at --url; the key is
the environment variable OPENAI_API_KEY, if it is set. As in FastChat, an answer is rated from 1 to
10, questions of math, reasoning and coding with the reference, and the second turn with the first.
Unlike there, every choice of an answer is rated, not only the first. An empty turn, as --first_turn
leaves it, is not rated. Ratings are appended to --out; the same command resumes a killed run.
"""

import http.client
import json
import os
import re
import statistics
import time
import urllib.request
from pathlib import Path

from common import command, fail, one_line, parser, progress
from data.readers import read_records
from tasks.report import format_rows, mean_error

WITH_REFERENCE = ("math", "reasoning", "coding")  # categories
RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]|\[(\d+\.?\d*)\]")
TRIES, PAUSE = 5, 2.0  # of a request; seconds before the second, then twice as long each time


def read_by(path, key):
    """{record[key]: record} of a file of JSON lines."""
    try:
        return {record[key]: record for _, record in read_records(path)}
    except (OSError, ValueError) as e:
        fail(one_line(e) if isinstance(e, OSError) else f"{path}: {one_line(e)}")
    except (KeyError, TypeError):
        fail(f"{path}: a record has no {key}")


def make_messages(question, answer, reference, prompts, turn):
    """(name of the prompt, messages) for one turn of one choice; answer and reference: lists of
    turns, reference None where the category has none."""
    name = "single-math-v1" if reference else "single-v1"
    name += "-multi-turn" * (turn == 2)
    texts = dict(question=question[0], answer=answer[0])
    for kind, turns in (("question", question), ("answer", answer), ("ref_answer", reference)):
        texts |= {f"{kind}_{i}": text for i, text in enumerate(turns or [], 1)}
    prompt = prompts[name]
    messages = [
        dict(role="system", content=prompt["system_prompt"]),
        dict(role="user", content=prompt["prompt_template"].format(**texts)),
    ]
    return name, messages


def request_judgment(args, messages):
    """The judge's text: one chat completion at temperature 0; retries if the server is busy."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    body = dict(model=args.judge, messages=messages, temperature=0, max_tokens=2048)
    url = args.url.rstrip("/") + "/chat/completions"
    for i in range(TRIES):
        try:
            request = urllib.request.Request(url, json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.load(response)["choices"][0]["message"]["content"] + ""
        except (OSError, http.client.HTTPException) as e:
            busy = getattr(e, "code", 500) in (408, 429, 500, 502, 503, 504)
            if not busy or i == TRIES - 1:
                fail(f"{url}: {one_line(e)}")
            time.sleep(PAUSE * 2**i)
        except (ValueError, KeyError, IndexError, TypeError):
            fail(f"{url}: no chat completion in the answer")


def find_rating(judgment):
    """The first [[rating]], else the first [rating], else None."""
    found = sorted(RATING.finditer(judgment), key=lambda match: match[1] is None)
    return float(found[0][1] or found[0][2]) if found else None


# --------------------------------------------------------------------------------------------------
# The two commands


def list_jobs(args):
    """[(question id, model, choice, turn, prompt's name, messages)] of all that is to be rated."""
    questions = read_by(args.questions, "question_id")
    answers, prompts = read_by(args.answers[0], "question_id"), read_by(args.prompts, "name")
    references = read_by(args.references, "question_id") if args.references else {}
    jobs = []
    for id, record in answers.items():
        if id not in questions:
            fail(f"{args.answers[0]}: question_id {id} is not in {args.questions}")
        question, reference = questions[id], None
        if question.get("category") in WITH_REFERENCE:
            if id not in references:
                fail(f"question {id} of {question['category']} needs --references with its answer")
            reference = references[id]["choices"][0]["turns"]
        try:
            for choice in record["choices"]:
                turns, model = choice["turns"], record["model_id"]
                for turn in [t for t in (1, 2) if t <= len(turns) and turns[t - 1]]:
                    message = make_messages(question["turns"], turns, reference, prompts, turn)
                    jobs.append((id, model, choice["index"], turn, *message))
        except (KeyError, IndexError) as e:
            fail(f"question {id}: {e} is missing in its answer, its reference or {args.prompts}")
    return jobs


def judge(args):
    """Rate all that --out does not hold yet."""
    out = Path(args.out or re.sub(r"\.jsonl$", "", args.answers[0]) + ".judged.jsonl")
    jobs = list_jobs(args)
    key = lambda r: (r["question_id"], r["model"], r["choice"], r["turn"], r["judge"])
    done = set()
    if out.exists():
        whole = out.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]  # without a line that a kill cut short
        try:
            done = {key(json.loads(line)) for line in whole.decode().splitlines()}
        except (ValueError, KeyError, TypeError):
            fail(f"{out}: not ratings of this command; --out writes elsewhere")
        os.truncate(out, len(whole))
    with open(out, "a", encoding="utf-8") as file:
        for id, model, choice, turn, prompt, messages in progress(jobs, unit="rating"):
            record = dict(
                question_id=id, model=model, choice=choice, turn=turn, judge=args.judge,
                prompt=prompt,
            )  # fmt: skip
            if key(record) in done:
                continue
            judgment = request_judgment(args, messages)
            record |= dict(score=find_rating(judgment), judgment=judgment, tstamp=time.time())
            file.write(json.dumps(record) + "\n")
            file.flush()
    print(f"rated: python -m tasks.mt_judge table {out}")


def table(args):
    """A row per model and judge: the mean rating of each turn and of both, with its error, and how
    many judgments have no rating."""
    rows, groups = [], {}
    for path in args.answers:
        try:
            for _, record in read_records(path):
                groups.setdefault((record["model"], record["judge"]), []).append(record)
                record["turn"], record["score"]  # KeyError
        except (OSError, ValueError) as e:
            fail(one_line(e) if isinstance(e, OSError) else f"{path}: {one_line(e)}")
        except (KeyError, TypeError):
            fail(f"{path}: not ratings of tasks.mt_judge judge")
    for (model, by), records in groups.items():
        row = dict(model=model, judge=by)
        for name, turns in (("first turn", {1}), ("second turn", {2}), ("both", {1, 2})):
            rated = [r for r in records if r["turn"] in turns and r["score"] is not None]
            if scores := [r["score"] for r in rated]:
                row[name], row[f"{name} ±"] = statistics.fmean(scores), mean_error(scores)
        rows.append(row | dict(rated=len(rated), unrated=len(records) - len(rated)))
    rows.sort(key=lambda row: -row.get("both", 0))
    print(format_rows(rows, args.json))
    return rows


@command
def main(argv=None):
    p = parser(__doc__)
    p.add_argument("mode", choices=("judge", "table"))
    p.add_argument("answers", nargs="+", metavar="FILE", help="judge: answers; table: ratings")
    p.add_argument("--questions", metavar="FILE", help="judge: FastChat's question.jsonl")
    p.add_argument("--prompts", metavar="FILE", help="judge: FastChat's judge_prompts.jsonl")
    p.add_argument("--references", metavar="FILE", help="judge: answers to math, reasoning, coding")
    p.add_argument("--judge", default="gpt-4o-2024-05-13", help="judge: the server's model")
    p.add_argument("--url", default="https://api.openai.com/v1", help="judge: of the server")
    p.add_argument("--out", metavar="FILE", help="judge: [FILE.judged.jsonl]")
    p.add_argument("--json", action="store_true", help="table: one JSON line per row")
    args = p.parse_args(argv)
    if args.mode == "table":
        return table(args)
    if len(args.answers) > 1 or not args.questions or not args.prompts:
        fail("judge: takes one file of answers, --questions and --prompts")
    judge(args)


if __name__ == "__main__":
    main()
