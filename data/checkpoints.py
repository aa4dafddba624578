"""Checkpoint files: a dict of plain tensors, numbers, strings and dicts. Written complete or not at
all, read without executing anything, and turned into a network.
"""

import contextlib
import hashlib
import json
import os
import struct
import zipfile
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import torch

import head
from common import compute_dtype, fail, one_line, suggest
from configs import from_dict
from data.json_files import check_fields
from model import DiT

KIND = "nanoMDLM checkpoint"
VERSION = 2  # 1 drew rows and noise otherwise: its weights are the same, but it cannot be resumed


def save_checkpoint(path, **state):
    """Written to a temporary file, synced to the disk, renamed: complete or not there at all. An
    error leaves what was there before and no temporary file."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as f:
            about = dict(kind=KIND, version=VERSION, torch=str(torch.__version__))
            torch.save(state | about, f)
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


def read_checkpoint(path, mmap=False):
    """The dict that train.py saved: kind, model, ema, optimizer, step, config, tokenizer, torch ...
    Its tensors are on the CPU; with mmap they stay in the file until they are read. Nothing in the
    file is executed. Fails in one line."""
    path = Path(path)
    if path.is_dir():
        path = path / "ckpt.pt"  # a run's folder
    if not path.is_file():
        runs = [str(run) for run in Path("out").glob("*/ckpt.pt")]
        fail(
            f"{path}: no such checkpoint; {suggest(str(path), runs, 'train one: python train.py')}"
        )
    check_archive(path)
    try:
        ckpt = torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except Exception as e:  # torch raises half a dozen types for a damaged or foreign file
        fail(f"{path}: damaged, or not a checkpoint of plain tensors ({type(e).__name__})")
    if not isinstance(ckpt, dict) or ckpt.get("kind") != KIND:
        fail(f"{path}: not a checkpoint of this project")
    if (version := ckpt.setdefault("version", 1)) not in (1, VERSION):
        fail(f"{path}: of version {version}, but this program reads versions 1 to {VERSION}")
    optional = {name: kind() for name, kind in FIELDS.items() if name not in NEEDED}
    check_fields(optional | ckpt, FIELDS, path)
    for name in ("model", "ema"):
        for key, value in ckpt[name].items():
            if not isinstance(key, str) or not isinstance(value, torch.Tensor):
                fail(f"{path}: damaged: {name} holds more than named tensors")
        if sum(tensor.nbytes for tensor in ckpt[name].values()) > path.stat().st_size:
            fail(f"{path}: damaged: {name} claims more numbers than the file holds")
    return ckpt


def check_archive(path):
    """Verify the checksums of a file that torch.save wrote: torch.load does not, and would read
    changed numbers. Such a file stores its members uncompressed; a zip bomb does not."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            stored = all(m.compress_type == zipfile.ZIP_STORED for m in members)
            if not stored or sum(m.file_size for m in members) > path.stat().st_size:
                fail(f"{path}: compressed, or with overlapping members: not what torch.save writes")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, RuntimeError, struct.error) as e:
        reason = f"not a zip file of torch.save ({type(e).__name__})"
        fail(f"{path}: damaged, or not a checkpoint: {reason}")
    if damaged:
        fail(f"{path}: damaged: wrong checksum in {damaged}")


# --------------------------------------------------------------------------------------------------
# Partial results beside a checkpoint: records, each with a checksum that starts from its place in
# the file, so that neither a damaged nor a misplaced record is read


def write_record(file, data):
    file.write(data + checksum(data, file.tell()))
    file.flush()


def read_record(file, size):
    """The next record, of `size` bytes. If it is missing or damaged: None, and the file is cut off
    here; later records are computed again."""
    place, data, found = file.tell(), bytearray(file.read(size)), file.read(4)
    if len(data) == size and found == checksum(data, place):
        return data
    file.seek(place)
    file.truncate()


def checksum(data, place):
    return zlib.crc32(data, place).to_bytes(4, "little")


# --------------------------------------------------------------------------------------------------
# Weights


def sibling(ckpt, name):
    """The path of a file in the folder of a checkpoint; ckpt may be that folder."""
    return (Path(ckpt) if Path(ckpt).is_dir() else Path(ckpt).parent) / name


def check_weights(weights, cfg, where):
    """Check names, shapes and values of a config's weights before anything of their size exists."""
    where = f"{where}: tensors do not fit its config"
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    if len(blocks) != cfg.n_layer:
        fail(f"{where}: n_layer={cfg.n_layer}, but there are {len(blocks)} blocks")
    with torch.device("meta"):
        expected = DiT(cfg).state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights or name not in expected:
            fail(f"{where}: {'lacks the tensor' if name in expected else 'has a tensor'} {name}")
        shape, found = tuple(expected[name].shape), weights[name]
        if tuple(found.shape) != shape or not found.is_floating_point():
            fail(f"{where}: {name} is {found.dtype} {tuple(found.shape)}, must be float {shape}")
        if not found.isfinite().all():
            fail(f"{where}: {name} holds NaN or infinity")


def load(path, ema=True, device="cpu", dtype="float32"):
    """The only way a checkpoint becomes a model: (model in eval mode, its Config). model.tokenizer
    is the spec of its data's tokenizer (data/tokenizer.py), model.step the number of optimiser
    steps, model.ends whether its rows are documents that end. dtype is that of the `autocast` in
    which the model will be called."""
    ckpt, device = read_checkpoint(path, mmap=True), torch.device(device)
    cfg = replace(from_dict(ckpt["config"], path), fsdp=False)  # this network is whole
    weights = ckpt["ema" if ema else "model"]
    check_weights(weights, cfg, path)
    model = DiT(cfg).to(device)
    model.load_state_dict(weights)
    model.tokenizer, model.step = ckpt["tokenizer"], ckpt["step"]
    model.ends = bool(ckpt.get("ends"))
    model.eval().requires_grad_(False)
    if device.type == "cpu":
        head.keep_freed_memory()
    else:
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    if compute_dtype(device, dtype) == "bfloat16":
        head.cast_linears(model, torch.bfloat16)
    return model, cfg


def fingerprint(model, **settings):
    """A hash of settings and of a network, by up to 64 numbers of each tensor: partial results are
    resumed only if it matches."""
    digest = hashlib.sha256(json.dumps([asdict(model.cfg), settings], sort_keys=True).encode())
    for tensor in model.state_dict().values():
        sample = tensor.flatten()[:: tensor.numel() // 64 or 1]
        digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()
