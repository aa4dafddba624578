"""The playground: it streams what sample.py prints, and refuses foreign sites and bad requests; no
number of clients, and nothing that they send or fail to read, takes its memory or stops it."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from browser import Page, needs_chromium
from conftest import ROOT, refused, save, tiny_run
from test_view import replay, tiny

import sample
from configs import as_ar
from tasks import serve


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save(tmp_path_factory.mktemp("serve") / "random.pt", tiny())


def start(weights, *args):
    args = sample.parse_arguments([str(weights), "--serve", "0", *args])
    ((_, (model, cfg)),) = serve.view.load_all(args, [args.ckpt]).items()
    server = serve.Playground(0, args, model, cfg)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


@pytest.fixture(scope="module")
def server(weights):
    server = start(weights, "--prompt", "of <a>", "--steps", "9")
    yield server
    server.shutdown()
    server.server_close()


def ask(server, method="POST", path="/write", body=None, timeout=60, **headers):
    """(status, body) of a request; by default with the right token. None removes a header."""
    with closing(http.client.HTTPConnection("127.0.0.1", server.server_port, timeout)) as client:
        if not isinstance(body, (str, bytes, type(None))):
            body = json.dumps(body)
        headers = {"X_Token": server.token} | headers
        headers = {name.replace("_", "-"): v for name, v in headers.items() if v is not None}
        client.request(method, path, body, headers)
        answer = client.getresponse()
        return answer.status, answer.read().decode()


def problem(answer, status, *words):
    assert answer[0] == status and answer[1].count("\n") == 0, answer
    for word in words:
        assert word in json.loads(answer[1])["error"]


# --------------------------------------------------------------------------------------------------
# Who may use it


def test_the_page_needs_the_token(server):
    address = f"/?token={server.token}"
    status, page = ask(server, "GET", address)
    assert status == 200 and "of &lt;a&gt;" in page and "connect-src 'self'" in page
    assert 'value="9"' in page and page.count("first_hitting</option>") == 2
    for path in ("/", "/?token=", "/?token=x", f"/?token={server.token}x", f"/?x={server.token}"):
        problem(ask(server, "GET", path), 403, "token")
    for path in ("/index.html", "/../sample.py", "//etc/passwd", "/write", "/%2e%2e/", "//["):
        problem(ask(server, "GET", path), 404)
    problem(ask(server, path="/other", body={}), 404)
    for method in ("PUT", "DELETE", "OPTIONS"):
        assert ask(server, method, address)[0] == 501


def test_foreign_sites_cannot_use_it(server):
    port = server.server_port
    problem(ask(server, body={}, X_Token=None), 403, "token")
    problem(ask(server, body={}, X_Token="é"), 403, "token")
    for origin in (
        "http://evil.example",
        "null",
        f"https://127.0.0.1:{port}",
        "http://127.0.0.1:1",
    ):
        problem(ask(server, body={}, Origin=origin), 403, "other web sites")
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "", "[::1"):
        problem(ask(server, body={}, Host=host), 403, "localhost")
        problem(ask(server, "GET", f"/?token={server.token}", Host=host), 403, "localhost")
    own = f"http://127.0.0.1:{port}"
    assert ask(server, body={"steps": 1}, Origin=own)[0] == 200
    assert ask(server, body={"steps": 1}, Host="localhost:9", Origin="http://localhost:9")[0] == 200


def test_it_listens_on_this_machine_only(server):
    assert server.socket.getsockname()[0] == "127.0.0.1"
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{22}", server.address)


# --------------------------------------------------------------------------------------------------
# What it writes


@pytest.mark.parametrize(
    "request_, args",
    [
        ({"text": "of a", "steps": 7, "length": 20}, "--prompt of~a --steps 7 --length 20"),
        ({"text": "of ____ a [5] b", "seed": 3, "length": 9}, "--infill of~____~a~[5]~b --seed 3"),
        ({"text": "--html=x", "samplers": ["ar"]}, None),
        ({"samplers": ["remdm_cap"], "eta": 0.9, "steps": 9}, "--sampler remdm_cap --eta 0.9"),
        ({"temperature": 0, "top_p": 0.5, "guidance": 1.5, "text": "a"}, "--guidance 1.5"),
    ],
)
def test_a_stream_is_the_text_of_sample(server, weights, capsys, request_, args):
    status, body = ask(server, body=request_)
    if args is None:  # a text that looks like an option is a text, here with unknown characters
        return problem((status, body), 400, "not in the vocabulary")
    words = [word.replace("~", " ") for word in args.split()]
    if "eta" in request_:
        words += ["--steps", "9"]
    if "top_p" in request_:
        words += ["--temperature", "0", "--top_p", "0.5", "--prompt", "a"]
    sample.main([str(weights), *words])
    *lines, last = body.splitlines()
    assert status == 200 and json.loads(last) == {"done": True}
    _, (canvas,) = replay(lines)
    assert "".join(canvas) == capsys.readouterr().out.removesuffix("\n")


def test_two_samplers_and_several_texts(server):
    body = {"samplers": ["ddpm", "confidence"], "num": 2, "steps": 4}
    titles, canvases = replay(ask(server, body=body)[1].splitlines()[:-1])
    assert [title.split(" · ")[0] for title in titles] == ["ddpm"] * 2 + ["confidence"] * 2
    assert all(None not in canvas for canvas in canvases)


def test_an_autoregressive_model(corpus, tmp_path):
    server = start(save(tmp_path / "ar.pt", as_ar(tiny_run(corpus))))
    _, page = ask(server, "GET", f"/?token={server.token}")
    assert page.count("<option selected>ar</option>") == 1 and "ddpm" not in page
    assert ask(server, body={"length": 5})[0] == 200
    problem(ask(server, body={"samplers": ["ddpm"]}), 400, "AR model")
    server.shutdown()
    server.server_close()


BAD = [
    ({"steps": 0}, "--steps", "at least 1"), ({"steps": 10**9}, "4096 steps"),
    ({"steps": "many"}, "--steps", "int"), ({"steps": [1]}, "--steps"), ({"num": 0}, "--num"),
    ({"num": 10**6}, "8192 tokens"), ({"length": 33}, "33 tokens"), ({"length": -1}, "--length"),
    ({"temperature": -1}, "--temperature"), ({"temperature": float("nan")}, "--temperature"),
    ({"guidance": float("inf")}, "--guidance"), ({"top_p": 2}, "--top_p"), ({"eta": 0.1}, "--eta"),
    ({"samplers": ["ddpn"]}, "ddpn"), ({"samplers": ["--html=x"]}, "--html=x"),
    ({"samplers": [["ar"]]}, "none of"), ({"samplers": ["ar"] * 3}, "two"),
    ({"samplers": 3}, "two"),
    ({"text": 3}, "text"), ({"text": "\ud800"}, "surrogate"), ({"text": "Ü"}, "vocabulary"),
    ({"text": "a" * 60}, "60 tokens"), ({"text": "[999999]" * 20}, "holes", "32"),
    ({"text": "_" * 60_000}, "holes"), ({"html": "x"}, "fields"), ({"ckpt": "x"}, "fields"),
    ([], "fields"), ("null", "fields"), ("{", "JSON"), ("", "JSON"), ("[" * 60_000, "JSON"),
    (b"\xff\xfe\x00", "JSON"), ("9" * 60_000, ""),
]  # fmt: skip


@pytest.mark.parametrize("body, words", [(body, words) for body, *words in BAD])
def test_bad_requests_are_refused_in_one_line(server, body, words):
    began = time.monotonic()
    problem(ask(server, body=body), 400, *words)
    assert time.monotonic() - began < 20 and ask(server, body={"steps": 1})[0] == 200


def test_oversized_requests_are_refused(server):
    problem(ask(server, body="x" * (serve.BODY + 1)), 413, "65536")
    problem(ask(server, body="x" * 3_000_000), 413)
    problem(ask(server, Content_Length="9" * 30, body=None), 413)
    for size in ("-1", "x", ""):
        problem(ask(server, Content_Length=size, body=None), 411)
    problem(ask(server, Transfer_Encoding="chunked", body=b"2\r\n{}\r\n0\r\n\r\n"), 411)


def test_malformed_requests_are_answered_or_cut_off(server, monkeypatch):
    monkeypatch.setattr(serve.Handler, "timeout", 1)
    for data in (
        b"\x00\xff\x00\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 9,
        b"GET /" + b"x" * 70_000, b"POST /write HTTP/1.1\r\nContent-Length: 9\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", b"POST /write HTTP/1.1\r\nHos", b"",
        b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    ):  # fmt: skip
        with socket.create_connection(("127.0.0.1", server.server_port), 15) as client:
            client.sendall(data)
            answer = b"".join(iter(lambda client=client: client.recv(4096), b""))
            assert b"Traceback" not in answer and b"200" not in answer.split(b"\r\n")[0]
    assert ask(server, body={"steps": 1})[0] == 200


# --------------------------------------------------------------------------------------------------
# Limits


def open_stream(server, buffer=65_536, **body):
    """A client that has sent a request and has not read the answer."""
    body, client = json.dumps(body).encode(), socket.socket()
    client.settimeout(30)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    client.connect(("127.0.0.1", server.server_port))
    head = f"POST /write HTTP/1.0\r\nHost: localhost\r\nX-Token: {server.token}\r\n"
    client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return client


def test_writing_has_a_time_limit(server, monkeypatch):
    monkeypatch.setattr(serve, "SECONDS", 0)
    last = ask(server, body={"steps": 20})[1].splitlines()[-1]
    assert json.loads(last)["error"].startswith("stopped after 0 seconds")


def test_a_full_queue_refuses_at_once(server, monkeypatch):
    monkeypatch.setattr(serve, "WAIT", 0.5)
    with server.writing:  # another request is being written
        problem(ask(server, body={}), 503, "took too long")
        for _ in range(serve.WAITING + 1):
            assert server.queue.acquire(blocking=False)
        problem(ask(server, body={}), 503, "too many")
        server.queue.release(serve.WAITING + 1)
    assert ask(server, body={"steps": 2})[0] == 200


def test_a_client_that_leaves_ends_its_text(server):
    for _ in range(5):
        with open_stream(server, steps=4000, samplers=["ddpm"], num=8) as client:
            assert b"200" in client.recv(1000)
        began = time.monotonic()
        assert ask(server, body={"steps": 1})[0] == 200
        assert time.monotonic() - began < 10


def test_a_client_that_does_not_read_is_cut_off(server, monkeypatch):
    monkeypatch.setattr(serve.Handler, "timeout", 0.5)
    monkeypatch.setattr(serve, "BODY", 4096)
    with open_stream(server, 4096, steps=4000, samplers=["ddpm", "analytic"], num=99):
        while not server.writing.locked():
            time.sleep(0.01)
        began = time.monotonic()
        assert ask(server, body={"steps": 1})[0] == 200 and time.monotonic() - began < 20


def test_a_slow_client_is_cut_off_in_the_end(server, monkeypatch):
    """One byte now and then keeps a connection from timing out, but not for ever."""
    for name, value in (("IDLE", 0.5), ("WAIT", 0), ("SECONDS", 0.5)):
        monkeypatch.setattr(serve, name, value)
    with socket.create_connection(("127.0.0.1", server.server_port), 15) as client:
        with pytest.raises(OSError):
            for _ in range(100):
                client.sendall(b"G")
                time.sleep(0.1)


def test_connections_are_counted(server, monkeypatch):
    taken = 0
    while server.open.acquire(blocking=False):
        taken += 1
    try:
        assert ask(server, "GET", "/")[0] == 503
    finally:
        server.open.release(taken)
    assert ask(server, body={"steps": 1})[0] == 200


def memory():
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


@pytest.mark.slow
def test_fifty_clients_at_once(server):
    """Good, bad, oversized, cancelled and silent ones: each is answered or refused, and memory
    does not grow from round to round."""

    def client(number, answers):
        kinds = (
            lambda: ask(server, body={"steps": 5, "num": 2}),
            lambda: ask(server, body={"steps": -1}),
            lambda: ask(server, body="x" * 200_000),
            lambda: ask(server, "GET", f"/?token={server.token}"),
            lambda: (0, open_stream(server, steps=2000, samplers=["ddpm"], num=8).close()),
        )
        answers[number] = kinds[number % len(kinds)]()[0]

    used = []
    for _ in range(6):
        answers = [None] * 50
        threads = [threading.Thread(target=client, args=(i, answers)) for i in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        expected = ({200, 503}, {400, 503}, {413, 503}, {200, 503}, {0})
        assert all(answers[i] in expected[i % 5] for i in range(50)), answers
        assert answers.count(200) >= 11, answers  # every page, and at least one text
        used.append(memory())
    print("MB after each round:", *(f"{mb:.0f}" for mb in used))
    assert used[-1] - used[1] < 30
    assert ask(server, body={"steps": 1})[0] == 200 and threading.active_count() < 20


# --------------------------------------------------------------------------------------------------
# The command and the page


@pytest.mark.slow
def test_the_command_prints_its_address_and_ends_with_ctrl_c(weights):
    command = [sys.executable, "sample.py", str(weights), "--serve", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    address = process.stdout.readline().decode().strip()
    port, token = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/\?token=(\S+)", address).groups()
    with closing(http.client.HTTPConnection("127.0.0.1", int(port), 30)) as client:
        client.request("GET", f"/?token={token}")
        assert client.getresponse().status == 200
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(30) == 130 and process.stderr.read() == b"interrupted\n"


def test_a_port_in_use_is_refused(weights, capsys, server):
    run = lambda: sample.main([str(weights), "--serve", str(server.server_port)])
    refused(capsys, run, "--serve", server.server_port, "another port")


@needs_chromium
def test_the_page_streams_in_a_browser(server, tmp_path):
    with Page(tmp_path) as page:
        page.open(server.address)
        assert page.js("form.elements.text.value") == "of <a>"
        page.js("form.elements.text.value = 'of a'")
        assert not page.js("[...form.querySelectorAll('[data-of]')].some(l => !l.hidden)")
        page.js("selects[0].value = 'first_hitting'; selects[1].value = 'threshold'; showOptions()")
        page.js("form.elements.threshold.value = 0.2")
        assert page.js("form.elements.eta.closest('label').hidden")
        page.js("form.elements.length.value = 32")
        page.point("#write", click=True)
        page.until("lanes.length === 2 && playing")
        page.until("!streaming && !playing && step === last()")
        assert page.js("[last(), lanes[0].masks.at(-1), lanes[1].masks.at(-1)]") == [28, 0, 0]
        request = dict(
            text="of a", samplers=["first_hitting", "threshold"], threshold=0.2, length=32
        )
        _, canvases = replay(ask(server, body=request)[1].splitlines()[:-1])
        shown = page.js("lanes.map(lane => lane.spans.map(span => span.textContent).join(''))")
        assert shown == ["".join(canvas) for canvas in canvases]
        # a problem is said; the next text starts anew; Stop ends one
        page.js("form.elements.text.value = 'Ü'")
        assert page.errors == []
        page.point("#write", click=True)
        page.until("!$('problem').hidden && $('problem').textContent.includes('vocabulary')")
        page.js("form.elements.text.value = 'a ____ b'; selects[1].value = ''; showOptions()")
        page.point("#write", click=True)
        page.until("!streaming && lanes.length === 1 && lanes[0].masks.at(-1) === 0")
        assert page.js("$('problem').hidden")
        page.js("form.elements.steps.value = 4000; form.elements.num.value = 8")
        page.js("form.elements.text.value = ''; selects[0].value = 'ddpm'")
        page.point("#write", click=True)
        page.until("lanes.length === 8 && last() > 2")
        page.point("#write", click=True)
        page.until("!streaming && $('write').textContent === 'Write'")
        assert page.js("last() < 4000 && $('problem').hidden")
        bad = "Failed to load resource: the server responded with a status of 400 (Bad Request)"
        assert page.errors == [bad]  # Chromium's own note of the refused text
        assert all(address.startswith(server.address.split("?")[0]) for address in page.requests)
