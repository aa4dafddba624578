"""Attacks on runs, files and command lines, each with a table of what happened:

python tests/attack.py kills 150         # kill -9 at random instants, also inside saving
python tests/attack.py restarts 50       # the same of one of two processes under torchrun
python tests/attack.py damage 500 200    # damaged checkpoints, damaged files of prepared data
python tests/attack.py lines 300         # random command lines of all scripts

--seed=N repeats an attack. Exit code 1 if a promise is broken. Needs Linux. The tests run a short
version of each; the long ones are in docs/promises.md.
"""

import contextlib
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from conftest import ROOT, make_corpus, tiny_run

import data.corpus as corpus
import train
from common import UserError, command, parser
from data.checkpoints import load, read_checkpoint

FORK = multiprocessing.get_context("fork")  # a run starts in milliseconds, without its imports


def make_run(folder):
    """The config of a run of a second: it saves every 3 steps and validates every 10."""
    words = folder / "words"
    data = words if words.exists() else make_corpus(words)
    cfg = replace(tiny_run(data), n_layer=1, steps=60, save_every=3, eval_every=10, samples=0)
    return replace(cfg, muon_lr=0.02, out_dir=str(folder / "whole"))


def digest(out):
    """A hash of what a run leaves: both checkpoints without times, the log without speed."""
    found = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            found.update(value.numpy().tobytes())
        elif isinstance(value, dict):
            for name in sorted(value, key=str):
                found.update(str(name).encode())
                add(value[name])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            found.update(repr(value).encode())

    for name in ("ckpt.pt", "best.pt"):
        state = read_checkpoint(Path(out) / name)
        del state["seconds"], state["config"]["out_dir"]
        add(state)
    for line in Path(out, "log.jsonl").read_text().splitlines():
        add({k: v for k, v in json.loads(line).items() if k != "tokens_per_s"})
    return found.hexdigest()


def in_child(call, *args):
    """Start call(*args) in a separate process, without output."""

    def run():
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
            with contextlib.redirect_stderr(null):
                call(*args)

    child = FORK.Process(target=run)
    child.start()
    return child


# --------------------------------------------------------------------------------------------------
# Kills


def attack_runs(kills, rng, folder):
    """Kill runs until `kills` have hit; Counter of kills, of those while a checkpoint was being
    written, of runs, and of runs that do not equal the one that nobody killed."""
    cfg, count = make_run(folder), Counter()
    start = time.time()
    in_child(train.main, cfg).join()
    seconds, want = time.time() - start, digest(cfg.out_dir)
    while count["kills"] < kills:
        out = folder / "killed"
        shutil.rmtree(out, ignore_errors=True)
        child = None
        while child is None or child.exitcode == -signal.SIGKILL:
            child = in_child(train.main, replace(cfg, out_dir=str(out)), True)
            delay, in_save = rng.uniform(0, seconds), rng.random() < 0.4
            at = time.time() + delay
            while child.exitcode is None:
                saving = any(out.glob("*.tmp"))
                if time.time() > at and count["kills"] < kills and saving >= in_save:
                    child.kill()
                    child.join()
                    count["kills"] += child.exitcode == -signal.SIGKILL
                    count["while saving"] += saving and child.exitcode == -signal.SIGKILL
                time.sleep(0.0005)
        count["runs"] += 1
        count["differ"] += child.exitcode != 0 or digest(out) != want
        print(dict(count), file=sys.stderr, flush=True)
    return count


def attack_restarts(kills, rng, folder):
    """The same under torchrun: one of two processes is killed, torchrun starts both again."""
    cfg, count = replace(make_run(folder), steps=300, save_every=10, eval_every=100), Counter()

    def launch(out):
        fields = {f: v for f, v in asdict(cfg).items() if f != "out_dir"}
        options = [f"--{f}={v}" for f, v in fields.items()] + [f"--out_dir={out}"]
        command = "-m torch.distributed.run --standalone --nproc_per_node=2 --max-restarts=1000"
        return subprocess.Popen(
            [sys.executable, *command.split(), "train.py", *options], cwd=ROOT,
            stdout=subprocess.DEVNULL, stderr=open(folder / "errors.txt", "a"),
        )  # fmt: skip

    launch(cfg.out_dir).wait()
    want = digest(cfg.out_dir)
    while count["kills"] < kills:
        out = folder / "killed"
        shutil.rmtree(out, ignore_errors=True)
        agent = launch(out)
        for _ in range(rng.randint(3, 7)):  # some within the imports, some while training
            with contextlib.suppress(subprocess.TimeoutExpired):
                agent.wait(rng.uniform(5, 25))
            workers = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
            workers = workers.read_text().split() if agent.poll() is None else []
            if workers and count["kills"] < kills:
                os.kill(int(rng.choice(workers)), signal.SIGKILL)
                count["kills"] += 1
        with contextlib.suppress(subprocess.TimeoutExpired):
            agent.wait(300)
        count["hang"] += agent.poll() is None
        agent.kill()
        count["runs"] += 1
        count["differ"] += agent.wait() != 0 or digest(out) != want
        print(dict(count), file=sys.stderr, flush=True)
    return count


# --------------------------------------------------------------------------------------------------
# Damage


def flip(data, rng):
    i = rng.randrange(len(data))
    return data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i + 1 :]


def overwrite(data, rng, block=None):
    i, n = rng.randrange(len(data)), rng.choice((1, 16, 512, 4096))
    return data[:i] + (block or bytes)(n)[: len(data) - i] + data[i + n :]


def swap(data, rng):
    n = rng.choice((4, 64, 1024))
    i, j = sorted((rng.randrange(len(data)), rng.randrange(len(data))))
    a, b = data[i : i + n], data[j : j + n]
    return data if j < i + n else data[:i] + b + data[i + n : j] + a + data[j + n :]


DAMAGE = {
    "a bit flipped": flip,
    "cut short": lambda data, rng: data[: rng.randrange(len(data))],
    "a block of zeros": overwrite,
    "a block of noise": lambda data, rng: overwrite(data, rng, rng.randbytes),
    "two blocks swapped": swap,
    "bytes lost": lambda data, rng: data[: (i := rng.randrange(len(data)))] + data[i + 3 :],
    "bytes added": lambda data, rng: data + rng.randbytes(rng.choice((1, 100))),
}


def damage(kind, data, rng):
    while (damaged := kind(data, rng)) == data:
        pass
    return damaged


def forge(data, rng):
    """A checkpoint whose pickle is changed under a right checksum: only its reader is attacked."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for member in old.infolist():
            content = old.read(member)
            if member.filename.endswith("data.pkl"):
                content = rng.choice((flip, swap, overwrite))(content, rng)
            new.writestr(member, content)
    return out.getvalue()


CODE_RUNS = "os.system subprocess.Popen os.exec os.posix_spawn os.fork os.remove socket.connect"


def answer_of(work, crashed):
    """What work(send) sends from a separate process; crashed(its exit code) if it sends nothing."""
    receive, send = FORK.Pipe(duplex=False)
    child = FORK.Process(target=work, args=(send,))
    child.start()
    send.close()
    try:
        answer = receive.recv()
    except EOFError:
        answer = None
    child.join()
    return crashed(child.exitcode) if answer is None else answer


def try_to_read(read, size):
    """(what came of read() in a separate process, its result): "refused", "read" or the name of
    what went wrong: a traceback, code that ran, memory above twice the size + 64 MB."""

    def run(send):
        rss = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        events, before, outcome, value = [], rss(), "read", None
        sys.addaudithook(lambda event, _: events.append(event))
        try:
            value = read()
        except UserError as e:
            outcome = "refused" if "\n" not in str(e) else "several lines"
        except BaseException:
            outcome = "traceback: " + traceback.format_exc().strip().splitlines()[-1]
        if ran := set(events) & set(CODE_RUNS.split()):
            outcome = f"code ran: {ran}"
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before > 2 * size + 2**26:
            outcome = "too much memory"
        send.send((outcome, value))

    return answer_of(run, lambda code: (f"crash: {code}", None))


def digest_of(model):
    return hashlib.sha256(b"".join(p.numpy().tobytes() for p in model.state_dict().values()))


def attack_checkpoints(n, rng, folder):
    """{kind of damage: Counter of outcomes} of n damaged copies of a checkpoint."""
    cfg, table = replace(make_run(folder), steps=12), {}
    in_child(train.main, cfg).join()
    whole, path = Path(cfg.out_dir, "ckpt.pt").read_bytes(), folder / "damaged.pt"

    def read():
        model, config = load(path)
        about = digest_of(model).hexdigest(), repr(config), model.step, model.tokenizer, model.ends
        state = read_checkpoint(path)
        return about, digest_of_state(state)

    path.write_bytes(whole)
    want = read()  # here, so that what is imported on the way does not count as memory
    kinds = DAMAGE | {"forged": forge}
    for i in range(n):
        kind = list(kinds)[i % len(kinds)]
        path.write_bytes(damage(kinds[kind], whole, rng))
        outcome, value = try_to_read(read, len(whole))
        if outcome == "read":
            outcome = "read, unchanged" if value == want else "READ WITH A CHANGED NUMBER"
            if kind == "forged":  # no checksum can tell who wrote the numbers
                outcome = "read, forged"
        table.setdefault(kind, Counter())[outcome] += 1
    return table


def digest_of_state(state):
    out = io.BytesIO()
    torch.save({k: state[k] for k in ("optimizer", "ema", "losses", "best", "data")}, out)
    return hashlib.sha256(out.getvalue()).hexdigest()


def attack_data(n, rng, folder):
    """The same of a prepared corpus: of its .bin files and of meta.json."""
    cfg, table = make_run(folder), {}
    whole, bad = Path(cfg.data), folder / "bad"

    def read():
        splits = [corpus.read_split(str(bad), s, cfg) for s in ("train", "val", "test")]
        return [hashlib.sha256(ids.tobytes()).hexdigest() for ids, _ in splits], splits[0][1]

    shutil.copytree(whole, bad)
    want, size = read(), sum(path.stat().st_size for path in bad.iterdir())
    for i in range(n):
        shutil.copytree(whole, bad, dirs_exist_ok=True)
        kind, name = list(DAMAGE)[i % len(DAMAGE)], ("train.bin", "val.bin", "meta.json")[i % 3]
        before = (bad / name).read_bytes()
        (bad / name).write_bytes(damage(DAMAGE[kind], before, rng))
        outcome, value = try_to_read(read, size)
        if outcome == "read":
            outcome = "read, unchanged" if value == want else "READ WITH A CHANGED NUMBER"
        table.setdefault(f"{name}: {kind}", Counter())[outcome] += 1
    return table


# --------------------------------------------------------------------------------------------------
# Command lines

SCRIPTS = {  # module: function, and the positional arguments of a command that works
    "train": ("command_line", ""), "sample": ("main", "CKPT"), "evaluate": ("main", "CKPT"),
    "data.prepare": ("main", "text"), "tasks.convert": ("main", "CKPT OUT"),
    "tasks.judge": ("main", "CKPT CKPT"), "tasks.quality": ("main", "CKPT"),
    "tasks.view": ("main", "CKPT"), "tasks.answer": ("main", "gsm8k CKPT"),
    "tasks.bench": ("main", "sample CKPT"), "tasks.compare": ("command_line", ""),
    "tasks.scaling": ("command_line", ""), "tasks.reversal": ("main", ""),
}  # fmt: skip
WORDS = """0 1 2 3 -1 0.5 1e9 1e-9 nan inf -inf x True none 99999999999999999999 ____ [3] [0]
\\[1]____ char cpu cuda:7 mps float32 bfloat16 ar ddpm threshold gpt2 val test bpe 27 32
CKPT DATA OUT JSON NONE FOLDER /dev/null . /"""
VALUES = [*WORDS.split(), "", " ", "a" * 300, "ä ____ \udc80", "\n", "--", "="]


def random_line(module, words, options, rng):
    """A command line: mostly the words that work, with options and values at random."""
    argv = [w for w in words.split() if rng.random() < 0.9]
    for _ in range(rng.randint(0, 4)):
        option, value = rng.choice(options), rng.choice(VALUES)
        argv += rng.choice(([option, value], [f"{option}={value}"], [option], [value]))
    if module == "train":
        fields = "seq_len=32 vocab_size=27 n_embd=32 n_head=2 steps=2 samples=0".split()
        argv = [*(f"--{f}" for f in fields), "--data=DATA", "--out_dir=OUT", *argv]
    return argv


def run_line(module, function, argv, folder, seconds=5):
    """ "refused", "ran", "still running" after some seconds, or a traceback's last line."""

    def run(send):
        def refuse(*args, **kwargs):
            raise OSError("no network")

        def end(*args):
            send.send("still running")
            os._exit(0)

        os.chdir(folder)
        os.environ |= dict(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_MODE="disabled")
        corpus.ROOT, socket.socket.connect, socket.getaddrinfo = folder, refuse, refuse
        signal.signal(signal.SIGALRM, end)
        signal.alarm(seconds)
        text = io.StringIO()
        try:
            with contextlib.redirect_stderr(text), contextlib.redirect_stdout(io.StringIO()):
                getattr(importlib.import_module(module), function)(argv)
            outcome = "ran"
        except SystemExit as e:
            outcome = "ran" if e.code in (0, None) else "refused"
            if e.code == 2 and text.getvalue().count("error: ") != 1:
                outcome = f"not one line: {text.getvalue()!r}"
        except BaseException:
            outcome = "traceback: " + "|".join(traceback.format_exc().strip().splitlines()[-3:])
        send.send(outcome)
        os._exit(0)

    return answer_of(run, lambda code: "crash")


def list_options(module, function):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        getattr(importlib.import_module(module), function)(["--help"])
    return sorted(set(re.findall(r"(?<!\w)--\w+", text.getvalue())) - {"--help", "--push"})


def attack_lines(n, rng, folder):
    """{script: Counter of outcomes} of n random command lines."""
    cfg, table = make_run(folder), {}
    in_child(train.main, replace(cfg, steps=3)).join()
    (folder / "broken.json").write_text("[" * 10_000)
    options = {module: list_options(module, f) for module, (f, _) in SCRIPTS.items()}
    for i in range(n):
        module = list(SCRIPTS)[i % len(SCRIPTS)]
        function, words = SCRIPTS[module]
        places = dict(
            CKPT=f"{cfg.out_dir}/ckpt.pt", DATA=cfg.data, OUT=f"{folder}/out{i}", NONE="/no/such",
            JSON=f"{folder}/broken.json", FOLDER=str(folder),
        )  # fmt: skip
        argv = random_line(module, words, options[module], rng)
        for name, place in places.items():
            argv = [word.replace(name, place) for word in argv]
        outcome = run_line(module, function, argv, folder)
        if outcome not in ("ran", "refused", "still running"):
            print(module, argv, outcome, sep="\n  ", flush=True)
            outcome = outcome.split(":")[0]
        table.setdefault(module, Counter())[outcome] += 1
    return table


# --------------------------------------------------------------------------------------------------

BAD = ("differ", "hang", "READ", "traceback", "crash", "code", "too much", "several", "not one")


def is_broken(count):
    return any(n and outcome.startswith(BAD) for outcome, n in count.items())


@command
def main(argv=None):
    p = parser(__doc__)
    p.add_argument("attack", choices="kills restarts damage lines".split())
    p.add_argument("sizes", type=int, nargs="+")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    rng, name, sizes = random.Random(args.seed), args.attack, args.sizes
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if name == "damage":
            table = attack_checkpoints(sizes[0], rng, folder)
            table |= attack_data(sizes[-1], rng, folder)
        elif name == "lines":
            table = attack_lines(sizes[0], rng, folder)
        else:
            attack = dict(kills=attack_runs, restarts=attack_restarts)[name]
            table = {name: attack(sizes[0], rng, folder)}
    for row, count in table.items():
        print(f"| {row} | " + ", ".join(f"{n} {outcome}" for outcome, n in count.items()) + " |")
    return int(any(map(is_broken, table.values())))


if __name__ == "__main__":
    sys.exit(main())
