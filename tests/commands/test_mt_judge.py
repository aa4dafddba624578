"""MT-Bench to the end: answers of a checkpoint, rated by a stand-in server, and the table."""

import http.server
import json
import re

import pytest
from conftest import refused, start_server

from tasks import mt_judge

QUESTIONS = [
    dict(question_id=81, category="writing", turns=["Say {one}.", "Now two."]),
    dict(question_id=111, category="math", turns=["1+1?", "Sure?"]),
]
PROMPTS = [  # of FastChat's form: the fields of each are those of its file
    dict(name="single-v1", system_prompt="S1", prompt_template="Q {question} A {answer}"),
    dict(name="single-math-v1", system_prompt="S2",
         prompt_template="Q {question} R {ref_answer_1} A {answer}"),
    dict(name="single-v1-multi-turn", system_prompt="S3",
         prompt_template="Q {question_1} {question_2} A {answer_1} {answer_2}"),
    dict(name="single-math-v1-multi-turn", system_prompt="S4",
         prompt_template="Q {question_1} {question_2} R {ref_answer_1} {ref_answer_2}"
                         " A {answer_1} {answer_2}"),
]  # fmt: skip
ANSWERS = [
    dict(question_id=81, answer_id="a", model_id="mine", tstamp=1.0, choices=[
        dict(index=0, turns=["one 7", "two 5"]), dict(index=1, turns=["uno 3", ""])]),
    dict(question_id=111, answer_id="b", model_id="mine", tstamp=1.0, choices=[
        dict(index=0, turns=["2 9.5", "yes"]), dict(index=1, turns=["11 1", ""])]),
]  # fmt: skip
REFERENCES = [dict(question_id=111, choices=[dict(index=0, turns=["two", "sure"])])]


class Judge(http.server.BaseHTTPRequestHandler):
    """Rates an answer by the number that it ends with; every third request finds it busy."""

    seen, requests = [], 0

    def do_POST(self):
        type(self).requests += 1
        if self.requests % 3 == 2:
            self.send_error(503)
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.path, self.headers.get("Authorization"), body))
        number = re.search(r"([\d.]+)$", body["messages"][1]["content"])
        text = f"I think [1] so. Rating: [[{number[1]}]]" if number else "No rating."
        answer = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(mt_judge, "PAUSE", 0.0)
    handler = type("Handler", (Judge,), dict(seen=[], requests=0))
    server = start_server(handler)
    yield handler, f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


@pytest.fixture
def files(tmp_path):
    def write(name, records):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    groups = dict(answers=ANSWERS, questions=QUESTIONS, prompts=PROMPTS, references=REFERENCES)
    return {name: write(name, records) for name, records in groups.items()}


def judge(files, url, *more, without=()):
    options = [f"--{name}={files[name]}" for name in ("questions", "prompts", "references")
               if name not in without]  # fmt: skip
    mt_judge.main(["judge", files["answers"], *options, f"--url={url}", *more])


def test_every_answer_is_rated_and_tabulated(files, server, capsys, monkeypatch):
    handler, url = server
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    judge(files, url, "--judge=stand-in")
    out = files["answers"].replace(".jsonl", ".judged.jsonl")
    rated = [json.loads(line) for line in open(out)]
    scores = {(r["question_id"], r["choice"], r["turn"]): r["score"] for r in rated}
    assert scores == {
        (81, 0, 1): 7, (81, 0, 2): 5, (81, 1, 1): 3,  # an empty turn is not rated
        (111, 0, 1): 9.5, (111, 0, 2): None, (111, 1, 1): 1,
    }  # fmt: skip
    sent = [body["messages"] for _, _, body in handler.seen]
    assert [m[0]["content"] for m in sent] == ["S1", "S3", "S1", "S2", "S4", "S2"]
    assert sent[0][1]["content"] == "Q Say {one}. A one 7"
    assert sent[1][1]["content"] == "Q Say {one}. Now two. A one 7 two 5"
    assert sent[4][1]["content"] == "Q 1+1? Sure? R two sure A 2 9.5 yes"
    path, key, body = handler.seen[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert (body["model"], body["temperature"]) == ("stand-in", 0) and "secret" not in open(
        out
    ).read()

    capsys.readouterr()
    (row,) = mt_judge.main(["table", out])
    assert (row["model"], row["rated"], row["unrated"]) == ("mine", 5, 1)
    assert row["first turn"] == pytest.approx((7 + 3 + 9.5 + 1) / 4) and row["second turn"] == 5
    assert row["both"] == pytest.approx(25.5 / 5) and "mine" in capsys.readouterr().out


def test_a_killed_judge_resumes(files, server, capsys):
    handler, url = server
    judge(files, url)
    out = files["answers"].replace(".jsonl", ".judged.jsonl")
    lines = open(out).readlines()
    with open(out, "w") as file:
        file.write("".join(lines[:4]) + lines[4][:20])
    handler.seen.clear()
    judge(files, url)
    assert len(handler.seen) == 2 and len(open(out).readlines()) == 6
    judge(files, url)
    assert len(handler.seen) == 2


def test_bad_input_is_one_line(files, server, capsys, tmp_path):
    url = server[1]
    math = "question 111 of math needs --references"
    refused(capsys, lambda: judge(files, url, without=["references"]), math)
    refused(capsys, lambda: judge(files, url, without=["prompts"]), "--questions and --prompts")
    closed = "http://127.0.0.1:9"
    refused(capsys, lambda: judge(files, closed), "http://127.0.0.1:9/chat/completions: ")
    (tmp_path / "empty.jsonl").write_text('{"model": 1}\n')
    argv = ["table", str(tmp_path / "empty.jsonl")]
    refused(capsys, lambda: mt_judge.main(argv), "empty.jsonl: not ratings")
    few = files | dict(prompts=str(tmp_path / "few.jsonl"))
    (tmp_path / "few.jsonl").write_text(json.dumps(PROMPTS[0]) + "\n")
    refused(capsys, lambda: judge(few, url), "question 81: 'single-v1-multi-turn' is missing")
