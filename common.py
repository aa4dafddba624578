"""What every command shares: one-line errors, argument parsers, devices and
dtypes, checkpoint files."""

import argparse
import contextlib
import functools
import json
import os
import re
import struct
import sys
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist

from samplers import OPTIONS, SAMPLERS, default_options

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
    """One line of strict JSON: an unknown error is null, not NaN."""

    def strict(value):
        if isinstance(value, dict):
            return {k: strict(v) for k, v in value.items()}
        return None if value != value else value

    return json.dumps(strict(record))


# --------------------------------------------------------------------------------------------------
# Argument parsers


def parser(doc):
    """The argparse parser of every script: the docstring is the help, a mistake is one line."""
    p = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.error = fail
    return p


def boolean(text):
    return bool(("false", "true").index(text.lower()))  # ValueError on anything else


def check_range(args, **minima):
    """Each named argument that was given, or each item of a list, must be in [minimum, 2**31)."""
    for name, low in minima.items():
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not low <= value < 2**31:
                fail(f"--{name} {value}: must be at least {low} and below 2**31")


def add_model_options(p):
    """Options of every script that runs a trained network."""
    p.add_argument("--no_ema", action="store_true", help="use the raw weights")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--dtype", default="float32", choices=DTYPES)


def add_sampler_options(p, steps=1000, temperature=1.0):
    """Options of every script that samples. A script may change the
    defaults; None: chosen later."""
    p.add_argument(
        "--sampler", choices=SAMPLERS, help="default: ddpm_cache, or what the model needs"
    )
    p.add_argument(
        "--steps",
        type=int,
        default=steps,
        help="diffusion steps; ddpm_cache never calls more often than tokens",
    )
    p.add_argument("--temperature", type=float, default=temperature, help="0: greedy")
    p.add_argument("--top_p", type=float, default=1.0, help="nucleus sampling")
    for name in OPTIONS:
        defaults = {s: default_options(f).get(name) for s, f in SAMPLERS.items()}
        users = ", ".join(
            f"{s} [{default}]" for s, default in defaults.items() if default is not None
        )
        p.add_argument(f"--{name}", type=float, help=f"of the sampler {users}")


def choose_sampler(cfg, name=None):
    """The sampler of this name, or the one whose law the model's loss bounds."""
    if cfg.causal and name not in (None, "ar"):
        fail(f"--sampler {name}: an AR model writes from left to right, with --sampler ar")
    return name or ("ar" if cfg.causal else "ddpm_cache" if cfg.zero_masking else "ddpm")


def check_top_p(args):
    if not 0 < args.top_p <= 1:
        fail(f"--top_p {args.top_p}: must be above 0 and at most 1")


def read_sampler_options(args, sampler):
    """{name: value} of the sampler's own options that were given, each in its range."""
    given = {name: value for name in OPTIONS if (value := getattr(args, name)) is not None}
    for name, value in given.items():
        if name not in default_options(SAMPLERS[sampler]):
            users = " and ".join(s for s, f in SAMPLERS.items() if name in default_options(f))
            fail(f"--{name} {value}: an option of {users}, not of {sampler}; choose with --sampler")
        if not 0 <= value <= OPTIONS[name]:
            fail(f"--{name} {value}: must be from 0 to {OPTIONS[name]:g}")
    return given


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


def compute_dtype(device, dtype):
    """The dtype that --dtype selects on a device: auto is bfloat16 if the hardware
    multiplies in it, else float32."""
    on_cuda = device.type == "cuda"
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


def local_device(cfg):
    """This process's device: cuda:LOCAL_RANK under torchrun on GPUs, otherwise that of cfg."""
    on_cuda = cfg.device.startswith("cuda") or cfg.device == "auto" and torch.cuda.is_available()
    if dist.is_torchelastic_launched() and on_cuda:
        return pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
    return pick_device(cfg.device)


@contextlib.contextmanager
def process_group(cfg):
    """The process group of torchrun's processes; without torchrun, nothing."""
    if not dist.is_torchelastic_launched():
        yield
        return
    if (device := local_device(cfg)).type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield
    dist.destroy_process_group()


def rank_and_world():
    """(rank, number of processes); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


# --------------------------------------------------------------------------------------------------
# Checkpoint files: a dict of plain tensors, numbers, strings and dicts

KIND = "nanoMDLM checkpoint"


def save_checkpoint(path, **state):
    """Written to a temporary file, synced to the disk, renamed: complete or not there at all. An
    error leaves what was there before and no temporary file."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save({"kind": KIND, "torch": str(torch.__version__), **state}, f)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as e:  # torch turns some errors of the disk into RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        kept = f"; {path} is still the one before" if path.exists() else ""
        fail(f"{path}: cannot be saved ({one_line(e)}){kept}")


FIELDS = dict(  # of a checkpoint, with their types
    model=dict, ema=dict, step=int, config=dict, tokenizer=dict,
    optimizer=list, best=float, seconds=float, losses=torch.Tensor, ends=bool,
)  # fmt: skip
NEEDED = ("model", "ema", "step", "config", "tokenizer")  # the others are for resuming


def read_checkpoint(path, device="cpu"):
    """The dict that train.py saved: kind, model, ema, optimizer, step, config, tokenizer, torch ...
    Nothing in the file is executed. Fails in one line."""
    path = Path(path)
    if path.is_dir():
        path = path / "ckpt.pt"  # a run's folder
    if not path.is_file():
        fail(f"{path}: no such checkpoint")
    check_archive(path)
    try:
        ckpt = torch.load(path, map_location=device, weights_only=True)
    except Exception as e:  # torch raises half a dozen types for a damaged or foreign file
        fail(f"{path}: damaged, or not a checkpoint of plain tensors ({type(e).__name__})")
    if not isinstance(ckpt, dict) or ckpt.get("kind") != KIND:
        fail(f"{path}: not a checkpoint of this project")
    for name, kind in FIELDS.items():
        value = ckpt.get(name, None if name in NEEDED else kind())
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            fail(f"{path}: damaged: {name} is {type(value).__name__}")
    for name in ("model", "ema"):
        for key, value in ckpt[name].items():
            if not isinstance(key, str) or not isinstance(value, torch.Tensor):
                fail(f"{path}: damaged: {name} holds more than named tensors")
    return ckpt


def check_archive(path):
    """Verify the checksums of a file that torch.save wrote: torch.load does not, and would read
    changed numbers. Such a file stores its members uncompressed; a zip bomb does not."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            stored = all(m.compress_type == zipfile.ZIP_STORED for m in members)
            if not stored or sum(m.file_size for m in members) > path.stat().st_size:
                fail(f"{path}: not a checkpoint of this project: it is compressed")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, RuntimeError, struct.error) as e:
        fail(f"{path}: damaged, or not a checkpoint of plain tensors ({type(e).__name__})")
    if damaged:
        fail(f"{path}: damaged: wrong checksum in {damaged}")


def sibling(ckpt, name):
    """The path of a file in the folder of a checkpoint; ckpt may be that folder."""
    return (Path(ckpt) if Path(ckpt).is_dir() else Path(ckpt).parent) / name
