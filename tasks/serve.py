"""The playground of `sample.py CKPT --serve [PORT]`: a page on this machine to type a text with
holes, choose a sampler, and watch it write. The page is view.html with the form of serve.html.

Who may use it. The server listens on 127.0.0.1 only. Its address holds a secret token, new in each
run: other users of this machine do not know it. A foreign web site may make a browser send
requests here, so requests must name this machine (Host), not come from another site (Origin), and
carry the token in a header, which a form of another site cannot.

What it refuses. A request's options pass the checks of the command line. One text is written at a
time; a few requests wait, and the others are refused at once. Size, waiting, writing and reading
each have a limit. A client that does not read, or sends half a request, is cut off; others are not
affected.
"""

import contextlib
import hmac
import html
import json
import math
import secrets
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import sample
from common import UserError, fail, one_line
from data.canvas import split_holes
from data.command_line import choose_sampler
from samplers import OPTIONS, SAMPLERS, default_options
from tasks import view

BODY = 65_536  # bytes of a request's body
TOKENS, STEPS = 8192, 4096  # of a request, in all its texts; per text
SECONDS = 60  # of writing
WAIT, WAITING = 30, 8  # seconds in the queue, and requests in it
IDLE = 10  # seconds without a byte from a client, or to it
CONNECTIONS = 64  # at once
FORM = Path(__file__).with_name("serve.html")
LOCAL = ("127.0.0.1", "localhost")
# name: label, minimum, maximum, step; the form has the command's own values
FIELDS = {
    "steps": ("Steps", 1, STEPS, 1),
    "temperature": ("Temperature", 0, None, "any"),
    "top_p": ("Top-p", 0.01, 1, "any"),
    "guidance": ("Guidance", 0, None, "any"),
    **{name: (name.capitalize(), 0, maximum, "any") for name, maximum in OPTIONS.items()},
    "length": ("Length", 1, None, 1),
    "num": ("Texts", 1, 8, 1),
    "seed": ("Seed", 0, None, 1),
}


class Refused(Exception):
    """An answer with an error: status and one line."""


# --------------------------------------------------------------------------------------------------
# From a request to lanes


def find_holes(text, limit):
    """The sizes of the holes, None for [*]; refuses too long ones before they become ids."""
    try:
        _, holes = split_holes(text)
    except ValueError as e:
        raise UserError(one_line(e)) from None
    if (total := sum(size or 0 for size in holes)) > limit:
        raise UserError(f"the holes have {total} tokens, but the model has {limit}")
    return holes


def read_request(request, ckpt, limit):
    """The arguments of tasks.view that a request {"text", "samplers", "steps", ...} stands for."""
    if not isinstance(request, dict) or set(request) - {"text", "samplers", *FIELDS}:
        raise UserError(f"a request has the fields text, samplers, {', '.join(FIELDS)}")
    text, samplers = request.get("text", ""), request.get("samplers", [])
    if not isinstance(text, str) or not isinstance(samplers, list) or len(samplers) > 2:
        raise UserError("text: must be a string; samplers: a list of at most two names")
    if wrong := [s for s in samplers if s not in list(SAMPLERS)]:
        raise UserError(f"samplers: {wrong[0]} is none of {', '.join(SAMPLERS)}")
    holes = find_holes(text, limit)
    length = request.get("length") or 0
    if isinstance(length, int) and length > limit:
        raise UserError(f"the text would have {length} tokens, but the model has {limit}")
    argv = [ckpt, f"--infill={text}" if holes else f"--prompt={text}"]
    for name in FIELDS:
        value = request.get(name)
        if value is not None and not (holes and name == "length"):
            argv.append(f"--{name}={str(value)[:40]}")
    args = view.parse_arguments([*argv, *(["--samplers", *samplers] if samplers else [])])
    tokens = args.num * len(args.samplers) * (args.length or limit)
    if args.steps > STEPS or tokens > TOKENS and args.num * len(args.samplers) > 1:
        raise UserError(f"at most {STEPS} steps, and {TOKENS} tokens in all texts of a request")
    return args


# --------------------------------------------------------------------------------------------------
# The server


class Playground(ThreadingHTTPServer):
    """A thread per connection, at most CONNECTIONS; one request writes at a time."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port, args, model, cfg):
        self.args, self.model, self.cfg = args, model, cfg
        self.token = secrets.token_urlsafe(16)
        self.open = threading.BoundedSemaphore(CONNECTIONS)
        self.queue = threading.BoundedSemaphore(WAITING + 1)
        self.writing = threading.Lock()
        super().__init__(("127.0.0.1", port), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}/?token={self.token}"

    def process_request(self, request, client_address):
        if not self.open.acquire(blocking=False):
            with contextlib.suppress(OSError):
                request.settimeout(1)
                request.sendall(b"HTTP/1.0 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
            return self.shutdown_request(request)
        return super().process_request(request, client_address)

    def process_request_thread(self, request, client_address):
        # a client that sends or reads a byte now and then is cut off, too
        kill = threading.Timer(IDLE + WAIT + SECONDS, cut_off, [request])
        kill.daemon = True
        kill.start()
        try:
            # a client that does not read is noticed after this many bytes
            request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BODY)
            super().process_request_thread(request, client_address)
        finally:
            kill.cancel()
            self.open.release()

    def handle_error(self, request, client_address):
        """A client that went away is no error of ours; any other exception is shown."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def lanes(self, request):
        args = read_request(request, self.args.ckpt, self.cfg.seq_len)
        args.dtype, args.noise_removal = self.args.dtype, self.args.noise_removal
        samplers = [choose_sampler(self.cfg, name) for name in args.samplers]
        return view.make_lanes(args, {"": (self.model, self.cfg)}, samplers)


def cut_off(connection):
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class Handler(BaseHTTPRequestHandler):
    timeout, disable_nagle_algorithm = IDLE, True  # Nagle's algorithm would collect small lines
    server_version, sys_version = "nanoMDLM", ""

    def log_message(self, *args):
        """Nothing: an address holds the token."""

    def do_GET(self):
        self.answer(self.get)

    def do_POST(self):
        self.answer(self.post)

    def answer(self, method):
        try:
            method()
        except Refused as e:
            status, message = e.args
            self.start(status, "application/json")
            self.wfile.write(json.dumps({"error": message}).encode())
            self.discard()

    def discard(self):
        """Read what the client still sends: a close before that would reset the connection, and
        the client would not see the answer."""
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(1)
        for _ in range(32):
            if not self.connection.recv(BODY):
                return

    def start(self, status, kind):
        self.send_response(status)
        for name, value in {
            "Content-Type": f"{kind}; charset=utf-8", "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin",
        }.items():  # fmt: skip
            self.send_header(name, value)
        self.end_headers()

    def check(self, token):
        host = self.headers.get("Host", "")
        if host.rpartition(":")[0] not in LOCAL and host not in LOCAL:  # a name that leads here
            raise Refused(403, "this server answers to 127.0.0.1 and localhost only")
        if self.headers.get("Origin", f"http://{host}") != f"http://{host}":
            raise Refused(403, "other web sites may not use this server")
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            raise Refused(403, "open the address that sample.py printed: it ends with a token")

    def get(self):
        path, _, query = self.path.partition("?")
        if path != "/":
            raise Refused(404, "there is nothing here")
        self.check(query.removeprefix("token="))
        self.start(200, "text/html")
        self.wfile.write(page(self.server).encode())

    def post(self):
        if self.path != "/write":
            raise Refused(404, "there is nothing here")
        self.check(self.headers.get("X-Token", ""))
        request = self.read_body()
        if not self.server.queue.acquire(blocking=False):
            raise Refused(503, "too many requests are waiting; try again in a minute")
        try:
            if not self.server.writing.acquire(timeout=WAIT):
                raise Refused(503, "other requests took too long; try again")
            try:
                self.write(request)
            finally:
                self.server.writing.release()
        finally:
            self.server.queue.release()

    def read_body(self):
        size = self.headers.get("Content-Length", "")
        if not size.isdecimal() or int(size[:9]) > BODY or len(size) > 9:
            status = 413 if size.isdecimal() else 411
            raise Refused(status, f"a request needs a Content-Length of at most {BODY} bytes")
        try:
            return json.loads(self.rfile.read(int(size)))
        except (ValueError, RecursionError):
            raise Refused(400, "the body must be JSON") from None

    def write(self, request):
        """Stream a recording. A client that goes away ends it: the next line cannot be sent."""
        try:
            messages = view.messages(self.server.lanes(request))
            first = next(messages)
        except UserError as e:
            raise Refused(400, one_line(e)) from None
        self.start(200, "application/x-ndjson")
        self.wfile.write(view.to_line(first).encode())
        end, last = time.monotonic() + SECONDS, {"done": True}
        try:
            for message in messages:
                self.wfile.write(view.to_line(message).encode())
                if time.monotonic() > end:
                    fail(f"stopped after {SECONDS} seconds: ask for fewer steps or tokens")
        except UserError as e:
            last = {"error": one_line(e)}
        self.wfile.write(view.to_line(last).encode())


def field(name, value, samplers):
    """The HTML of a number. samplers: {name: its default} of those that have an option; it is
    shown only for them."""
    label, low, high, step = FIELDS[name]
    users = f' data-of="{" ".join(samplers)}"' if samplers else ""
    default = f' placeholder="{next(iter(samplers.values()))}"' if samplers else ""
    given = "" if value is None else f' value="{value}"'
    high = "" if high in (None, math.inf) else f' max="{high}"'
    number = f'name="{name}" type="number" min="{low}"{high} step="{step}"{given}{default}'
    return f"<label{users}>{label} <input {number}></label>"


def page(server):
    """The page: the viewer, with the form."""
    args, cfg = server.args, server.cfg
    own = ["ar"] if cfg.causal else list(SAMPLERS)
    options = lambda chosen: "".join(
        f"<option{' selected' * (name == chosen)}>{name}</option>" for name in own
    )
    fields, length = [], args.length or min(cfg.seq_len, 128)
    for name in FIELDS:
        users = {s: default_options(SAMPLERS[s]).get(name) for s in own}
        users = {s: default for s, default in users.items() if default is not None}
        if users or name not in OPTIONS:
            value = length if name == "length" else getattr(args, name)
            fields.append(field(name, value, users))
    parts = {
        "SAMPLERS": options(choose_sampler(cfg, args.sampler)), "OTHERS": options(None),
        "FIELDS": "\n    ".join(fields), "TOKEN": server.token,
        "TEXT": html.escape(args.infill or args.prompt),
    }  # fmt: skip
    form = view.fill(FORM.read_text(encoding="utf-8"), parts)
    return view.to_html([], form, connect="'self'")


def serve(args):
    """What `sample.py --serve` does, until Ctrl-C."""
    if not args.serve.isdecimal() or int(args.serve) > 65_535:
        fail(f"--serve {args.serve}: must be a port, 0 to 65535; 0 takes any that is free")
    ((_, (model, cfg)),) = view.load_all(args, [args.ckpt]).items()
    if args.semi_ar or args.stop:
        fail("--semi_ar and --stop: not with --serve")
    sample.sampling_options(args, cfg, None)
    try:
        server = Playground(int(args.serve), args, model, cfg)
    except OSError as e:
        fail(f"--serve {args.serve}: {one_line(e)}; another port may be free, 0 takes any")
    print(
        f"{server.address}\nOpen this address in a browser on this machine. Ctrl-C ends.",
        flush=True,
    )
    with server:
        server.serve_forever(poll_interval=0.2)
