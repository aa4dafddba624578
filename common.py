"""What every command shares: one-line errors, argument parsers, devices and
dtypes."""

import argparse
import contextlib
import difflib
import functools
import json
import math
import os
import re
import sys

import torch
from tqdm import tqdm

# --------------------------------------------------------------------------------------------------
# Errors and output


class UserError(Exception):
    """What the user gave cannot be used; the message is one line on what is wrong and allowed."""


def fail(message):
    """Every bad input ends here; see `command`."""
    raise UserError(message)


def discard_output():
    """Send what stdout still holds nowhere, or Python would fail once more at its end."""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        sys.stdout.flush()
        return
    with contextlib.suppress(OSError, AttributeError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def command(main):
    """Decorator of a script's main(argv=None): a UserError or an error of the system becomes one
    line on stderr and exit code 2, Ctrl-C becomes exit code 130, and a character that the terminal
    cannot show becomes "?"."""

    @functools.wraps(main)
    def run(*argv):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, ValueError):
                stream.reconfigure(errors="replace")
        try:
            result = main(*argv)
            if sys.stdout:
                sys.stdout.flush()  # errors of buffered output belong here, too
            return result
        except (UserError, OSError) as e:  # OSError: a full disk, no permission, too long a name
            with contextlib.suppress(OSError, AttributeError, ValueError):
                sys.stderr.write(f"error: {one_line(e)}\n")  # one write: processes share stderr
            if isinstance(e, OSError):  # what stdout still holds cannot be written
                discard_output()
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            sys.stderr.write("interrupted\n")
            raise SystemExit(130) from None

    return run


@functools.cache
def warn_once(message):
    sys.stderr.write(f"warning: {message}\n")


def one_line(e):
    """The message of an exception as one line."""
    if isinstance(e, OSError) and e.filename and e.strerror:
        return f"{e.filename}: {e.strerror}"
    return " ".join(str(e).split()) or type(e).__name__


def to_json(record):
    """One line of strict JSON: what is unknown or infinite is null."""

    def strict(value):
        if isinstance(value, dict):
            return {k: strict(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [strict(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(strict(record))


class Lines:
    """A stream that is no terminal: what a bar writes over its last state becomes a line."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        if text.strip() and self.stream:
            self.stream.write(text.strip() + "\n")

    def __getattr__(self, name):
        return getattr(self.stream, name)


def progress(items=None, file=None, **options):
    """tqdm's bar on stderr. Where that is no terminal: a line every two seconds, none for less.
    bar.update(0) redraws the bar, also after bar.n was set."""
    file = file or sys.stderr
    options = dict(miniters=0, leave=False, dynamic_ncols=True) | options
    if not getattr(file, "isatty", bool)():
        options |= dict(mininterval=2, delay=2, leave=False, position=0)
        file = Lines(file)
    return tqdm(items, file=file, **options)


# --------------------------------------------------------------------------------------------------
# Argument parsers


def parser(doc, **options):
    """The argparse parser of every script: the docstring is the help, a mistake is one line, and
    an option's - is the same as its _."""
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(
        description=doc, formatter_class=form, allow_abbrev=False, **options
    )
    p.error, parse = functools.partial(explain, p), p.parse_known_args

    def parse_known_args(argv=None, namespace=None):
        argv = sys.argv[1:] if argv is None else argv
        with_underscores = lambda match: "--" + match[0][2:].replace("-", "_")
        return parse([re.sub(r"^--\w[\w-]*(?==|\Z)", with_underscores, a) for a in argv], namespace)

    p.parse_known_args = parse_known_args
    return p


EXAMPLE = r"^(python .*?)(  +#.*|\\)?$"  # the first command of a docstring, without its comment


def explain(p, message):
    """Fail with argparse's message, and with what was probably meant or an example."""
    if wrong := re.match(r"unrecognized arguments: (--\w+)", message):
        message = f"unknown option {wrong[1]}; {suggest(wrong[1], p._option_string_actions)}"
    elif wrong := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
        message += "; " + suggest(wrong[1], re.findall("'(.*?)'", wrong[2]), "see --help")
    elif "are required" in message:
        message += f"; for example: {re.search(EXAMPLE, p.description, re.M)[1]}"
    fail(message)


def suggest(word, known, otherwise=None):
    """What to say about an unknown word: the nearest known one; without one, all that are known."""
    if near := difflib.get_close_matches(word, known, 1):
        return f"did you mean {near[0]}?"
    return f"there are {', '.join(known)}" if otherwise is None else otherwise


def boolean(text):
    return bool(("false", "true").index(text.lower()))  # ValueError on anything else


def check_range(args, **minima):
    """Each named argument that was given, or each item of a list, must be in [minimum, 2**31)."""
    for name, low in minima.items():
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not low <= value < 2**31:
                fail(f"--{name} {value}: must be at least {low} and below 2**31")


# --------------------------------------------------------------------------------------------------
# Devices, dtypes and processes

DTYPES = ("auto", "float32", "bfloat16")


def pick_device(name):
    """torch.device of --device: cpu, cuda or cuda:N; auto is cuda where there is one, else cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("mps"):
        fail(
            f"device={name}: MPS has no float64, which noise and schedules need; --device=cpu works"
        )
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        fail(f"device={name}: must be auto, cpu, cuda or cuda:N")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        fail(f"device={name}: not on this machine")
    return device


def multiplies_bfloat16():
    """Whether this CPU has instructions for bfloat16 matmuls. Without them torch emulates: 44 to 80
    times slower than float32 (two cores of an AMD EPYC with AVX2 only)."""
    cpu = torch.cpu.get_capabilities()
    return bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))


def compute_dtype(device, dtype=None):
    """The dtype that --dtype selects on a device: auto is bfloat16 if the hardware
    multiplies in it, else float32. None is auto on a GPU and float32 on a CPU."""
    on_cuda = device.type == "cuda"
    dtype = dtype or ("auto" if on_cuda else "float32")
    if dtype == "auto":
        newer = on_cuda and torch.cuda.get_device_capability(device) >= (8, 0)
        return "bfloat16" if newer or not on_cuda and multiplies_bfloat16() else "float32"
    if dtype == "bfloat16" and not on_cuda and not multiplies_bfloat16():
        warn_once("dtype=bfloat16: this CPU emulates bfloat16, many times slower than float32")
    return dtype


def autocast(device, dtype):
    """The autocast context of --dtype. Trained weights, residual stream, norms
    and losses stay float32."""
    enabled = compute_dtype(device, dtype) == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)
