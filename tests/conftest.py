"""What test files share: paths, prepared data, checkpoints, a web server, and the check that a
command refuses its input."""

import hashlib
import http.server
import json
import math
import os
import re
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import UserError
from configs import Config
from data.checkpoints import save_checkpoint
from data.corpus import GIVEN, VERSION, checksum, finish, partial_of, read_meta, read_split
from model import DiT

ROOT = Path(__file__).resolve().parents[1]  # of the repository
SHARED = ROOT.parent / "shared"  # real data; only on the developers' machines
if (SHARED / "tiktoken").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken"))
needs_gpt2 = pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ, reason="GPT-2's vocabulary would be downloaded"
)

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# --------------------------------------------------------------------------------------------------
# Refused input


def refused(capture, call, *words, silent=True):
    """call() must exit with 2 after one line on stderr that holds every word; silent: and print
    nothing on stdout. capture: capsys or capfd."""
    capture.readouterr()
    with pytest.raises((SystemExit, UserError)) as e:
        call()
    out, err = capture.readouterr()
    err = "".join(line for line in err.splitlines(True) if not line.startswith("warning: "))
    if isinstance(e.value, UserError):  # raised by what a library user calls; a command prints it
        err += f"error: {e.value}\n"
    else:
        assert e.value.code == 2
    assert not (silent and out), out
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    for word in words:
        assert str(word) in err, err


@pytest.fixture(name="refused")
def refused_fixture(capfd):
    """refused(call, *words) for prepare.py, which reports its progress on stdout and may
    fail in a child process."""
    return partial(refused, capfd, silent=False)


@pytest.fixture
def refuses(refused, tmp_path):
    """refuses(argv, *words): prepare.py refuses the command line and leaves nothing behind."""
    import data.prepare as prepare

    def check(argv, *words, out=tmp_path / "new" / "out"):
        refused(lambda: prepare.main([*map(str, argv), "--out", str(out)]), *words)
        assert not out.exists() and not partial_of(out).exists()

    return check


# --------------------------------------------------------------------------------------------------
# Prepared data

LETTERS = " abcdefghijklmnopqrstuvwxyz"
CHARACTERS = {"kind": "char", "characters": LETTERS}  # the tokenizer of `make_corpus`
TRICKY = [  # texts that tokenizers get wrong
    "", " ", "\n\n  \n", "plain", "naïve façade", "Привет", "日本語のテキスト", "👩‍👩‍👧‍👦 🏳️‍🌈",
    "a\u0301 \u200b\ufeff", "\x00\x7f\x1b[0m", "<|endoftext|>", "<|im_start|>[MASK]</s><pad>",
    "x" * 500, "\r\n\t\v\f", "█",
]  # fmt: skip


def make_corpus(folder, characters=LETTERS, wrap=0, n=4000):
    """A small corpus of made-up words, as prepare.py would write it."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list(characters[1:]), rng.integers(2, 6))) for _ in range(12)]
    text = " ".join(rng.choice(words, n))
    ids = np.array([characters.index(c) for c in text], np.uint16)[: n // (wrap or 1) * (wrap or 1)]
    cut = {"train": ids, "val": ids[: n // 5], "test": ids[n // 5 : n // 2]}
    partial_of(folder).mkdir(parents=True)
    for split, part in cut.items():
        part.tofile(partial_of(folder) / f"{split}.bin")
    spec = {"kind": "char", "characters": characters}
    finish(folder, "words", spec, len(characters), {s: len(p) for s, p in cut.items()}, wrap)
    return folder


def rewrite_meta(folder, **values):
    """Change fields of meta.json, so that it fits them and the files as they are now."""
    path = Path(folder) / "meta.json"
    meta = json.loads(path.read_text()) | values
    for split, sizes in meta["splits"].items():
        sizes["sha256"] = hashlib.sha256((path.parent / f"{split}.bin").read_bytes()).hexdigest()
    meta = {name: value for name, value in meta.items() if name not in ("version", "checksum")}
    path.write_text(json.dumps(meta | dict(version=VERSION, checksum=checksum(meta))))


def write_rows(folder, rows, real, **options):
    """Rows (N, L) of ids as the train and val splits of a prepared corpus. real: how many of the
    ids are neither padding nor given."""
    partial_of(folder).mkdir(parents=True)
    for split in ("train", "val"):
        rows.tofile(partial_of(folder) / f"{split}.bin")
    characters = dict.fromkeys(("train", "val"), int(real))
    finish(folder, "made up", CHARACTERS, 27, characters, rows.shape[1], **options)
    return rows


def write_padded_rows(folder):
    """200 rows of 1 to 32 tokens 1 .. 26, padded with 0."""
    rng = np.random.default_rng(0)
    rows = rng.integers(1, 27, (200, 32)).astype(np.uint16)
    rows[np.arange(32) >= rng.integers(1, 33, 200)[:, None]] = 0
    return write_rows(folder, rows, (rows != 0).sum(), pad=0)


def write_answers(folder):
    """120 rows [0 | given prompt of 3 to 9 tokens | its copy, the answer | given 0 ...]."""
    rng = np.random.default_rng(0)
    rows = np.full((120, 32), GIVEN, np.uint32)
    for row, n in zip(rows, rng.integers(3, 10, 120)):
        prompt = rng.integers(1, 27, n)
        row[1 : n + 1], row[n + 1 : 2 * n + 1] = prompt + GIVEN, prompt
    return write_rows(folder, rows, (rows < GIVEN).sum(), given=True)


def make(*argv):
    """Run prepare.py's command line; returns what it wrote: meta and {split: ids}."""
    import data.prepare as prepare

    argv = [str(a) for a in argv]
    prepare.main(argv)
    folder = Path(argv[argv.index("--out") + 1])
    meta = read_meta(str(folder))
    assert not partial_of(folder).exists()
    files = {"meta.json", *(f"{split}.bin" for split in meta["splits"])}
    assert {p.name for p in folder.iterdir()} == files
    return meta, {s: np.fromfile(folder / f"{s}.bin", meta["dtype"]) for s in meta["splits"]}


class Files(http.server.BaseHTTPRequestHandler):
    """GET and HEAD of `files` {path: bytes}; `cut` ends every body that many bytes early."""

    files, cut = {}, 0

    def do_GET(self):
        body = self.files.get(self.path.split("?")[0])
        self.send_response(404 if body is None else 200)
        body = body or b"{}"
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", f'"{len(body)}"')
        self.send_header("X-Repo-Commit", "c0ffee" * 6 + "c0de")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) - self.cut])

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


def start_server(handler):
    """A web server on this machine, in a thread."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


@pytest.fixture
def serve(monkeypatch):
    """serve(files, cut=0) -> address of a web server on this machine."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    servers = []

    def start(files, cut=0):
        handler = type("Handler", (Files,), dict(files=files, cut=cut))
        servers.append(start_server(handler))
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus") / "words")


# --------------------------------------------------------------------------------------------------
# Runs and checkpoints


def tiny_run(corpus):
    """A whole run in a second: every part of the loop happens in its 12 steps."""
    return Config(
        data=str(corpus), vocab_size=27, seq_len=32,
        n_layer=2, n_head=2, n_embd=32, cond_dim=8,
        steps=12, batch_size=8, micro_batch=8, lr=3e-3, warmup=2,
        eval_every=6, eval_windows=8, save_every=4, samples=1, dtype="float32", device="cpu",
    )  # fmt: skip


def save(path, cfg, tokenizer=CHARACTERS, seed=0):
    """Write a checkpoint whose weights are all random and large: no
    prediction is nearly uniform."""
    generator, model = torch.Generator().manual_seed(seed), DiT(cfg)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4, generator=generator)
    weights = model.state_dict()
    save_checkpoint(
        path, model=weights, ema=weights, optimizer=[], step=7, best=math.inf, seconds=0.0,
        config=asdict(cfg), tokenizer=tokenizer,
    )  # fmt: skip
    return path


@pytest.fixture(scope="session")
def checkpoint(corpus, tmp_path_factory):
    """ckpt.pt of a model of characters that knows a little."""
    import train

    out = tmp_path_factory.mktemp("run")
    cfg = replace(tiny_run(corpus), steps=100, eval_every=1000, save_every=1000, samples=0)
    train.main(replace(cfg, muon_lr=0.02, out_dir=str(out)))
    return out / "ckpt.pt"


def unigram_bits(cfg):
    """Bits per token of the best prediction that ignores context: the entropy of the validation
    split's single tokens. A network that uses context costs less."""
    p = np.bincount(read_split(cfg.data, "val", cfg)[0])
    p = p[p > 0] / p.sum()
    return -(p * np.log2(p)).sum()


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The demo, trained in another process, as a newcomer runs it: its folder, what it printed, and
    its (bits per character, standard error). Takes minutes: only slow tests use it. Each worker of
    pytest would train it again, so all its tests are in test_demo.py."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    command = [sys.executable, "train.py", f"--out_dir={folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr[-300:])
    bits = re.search(r"validation: ([\d.]+) ± ([\d.]+) bits per character", done.stdout)
    return SimpleNamespace(folder=folder, output=done.stdout, bits=tuple(map(float, bits.groups())))


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
    """transformers without a network, its cache of code in a folder that goes away: one for all
    tests of a process, because Python looks for the package of that code only once."""
    import transformers
    from huggingface_hub import constants
    from transformers.utils import hub

    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_OFFLINE", "1")  # for child processes
    patch.setattr(constants, "HF_HUB_OFFLINE", True)  # read once, at the import
    modules = str(tmp_path_factory.getbasetemp() / "modules")
    patch.setattr(hub, "HF_MODULES_CACHE", modules)
    patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    yield transformers
    patch.undo()


def train_until(cfg, step):
    """train.main(cfg), interrupted before the update `step`, counted from 0."""
    import train

    real = train.train_step

    def interrupted(net, optimizers, batches, number, *rest):
        if number == step:
            raise KeyboardInterrupt
        return real(net, optimizers, batches, number, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.main(cfg)
