"""Checkpoints of other projects into ours, and any of them into the Hugging Face hub's layout.

python -m tasks.convert kuleshov-group/mdlm-owt out/mdlm/ckpt.pt        # hub, folder or file
python -m tasks.convert sedd.ckpt out/sedd/ckpt.pt                      # MDLM's Lightning files
python -m tasks.convert louaaron/sedd-small out/sedd_small/ckpt.pt      # SEDD's, or a run's folder
python -m tasks.convert rupspace/nanoDD-D3PM-text8 out/nanodd/ckpt.pt   # nanoDD's ckpt.pt
python -m tasks.convert nieshen/SMDM:mdm_safetensors/mdm-170M-100e18.safetensors out/smdm.pt
python -m tasks.convert mine.ckpt out/mine/ckpt.pt --tokenizer data/mine   # of another vocabulary
python -m tasks.convert out/owt_mdlm/ckpt.pt hub/mine --push ME/mine    # to a folder for the hub
python -m tasks.convert ME/mine out/back/ckpt.pt                        # and back, or from hub/mine

What SOURCE holds decides how it is read. OUT is a checkpoint if it ends in .pt, with the raw and
the averaged weights where the source has both. Otherwise it is a folder that transformers loads
with trust_remote_code=True.

Nothing in a source is executed, pickles included. A model that is not masked diffusion is refused
by name, as is a tensor that is unknown, missing or of another shape. The result has no optimizer
state: it is for sampling, evaluation and as a start.
"""

import contextlib
import json
import re
import threading
import warnings
from pathlib import Path

import torch

from common import command, fail, one_line, parser, progress
from configs import from_dict
from data.checkpoints import KIND, check_archive, read_checkpoint, save_checkpoint
from diffusion import LOSSES
from model import DiT, count_parameters
from tasks.convert_hub import OLD_VOCABULARIES, SPEC, WEIGHTS, push, read_folder, write_folder
from tasks.convert_tokenizer import read_tokenizer
from tasks.convert_upstream import from_upstream

FILES = WEIGHTS, "pytorch_model.bin", "ckpt.pt", "checkpoints-meta/checkpoint.pth"
# what reading a file that is not as expected raises
FOREIGN = AttributeError, KeyError, TypeError, ValueError, RuntimeError


def name_error(e):
    return f"{type(e).__name__}: {' '.join(str(e).split())}"


def locate(source):
    """SOURCE as a file on this machine. A model of the hub, ID, or one of its files, ID:FILE, is
    downloaded."""
    path = Path(source)
    if not path.exists():
        name, _, file = source.partition(":")
        local = not file and path.suffix in (".pt", ".pth", ".ckpt", ".safetensors")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or local:
            fail(f"{source}: no such file or folder")
        try:
            from huggingface_hub import hf_hub_download, snapshot_download

            if file:
                return Path(hf_hub_download(name, file))
            vocabularies = {file for file, _ in OLD_VOCABULARIES.values()}
            wanted = [*FILES, "config.json", SPEC, *sorted(vocabularies)]
            path = Path(snapshot_download(source, allow_patterns=wanted))
        except Exception as e:  # no network, no such model, not installed: each of another type
            fail(
                f"{source}: not on this machine, and the hub does not provide it ({name_error(e)})"
            )
    if path.is_file():
        return path
    found = [path / name for name in FILES if (path / name).is_file()]
    return found[0] if found else fail(f"{path}: has none of {', '.join(FILES)}; name the file")


def read_config(path):
    """The configuration beside a file of weights, {} if there is none."""
    same_folder, run = path.with_name("config.json"), path.resolve().parents[1]
    hydra = run / ".hydra" / "config.yaml"  # of a run of SEDD
    try:
        if path.suffix in (".safetensors", ".bin") and same_folder.is_file():
            return dict(json.loads(same_folder.read_text("utf-8")))
        if path.suffix == ".pth" and hydra.is_file():
            import yaml

            return dict(yaml.safe_load(hydra.read_text("utf-8")))
    except Exception as e:  # json's, yaml's and the disk's errors have no common base
        fail(f"{path}: the configuration beside it cannot be read ({name_error(e)})")
    return {}


def make_stand_in():
    """A class in place of one that a pickle names: it keeps its state, and does nothing."""

    class StandIn:
        state = None

        def __init__(self, *args):
            pass

        def __setstate__(self, state):
            self.state = state

    return StandIn


def read_tensors(path):
    """The dict in a file of safetensors or torch.save: plain containers, tensors and stand-ins.

    Pickles are read by torch's weights-only reader. It imports nothing and calls nothing but what
    rebuilds a tensor, and stops at any other name. Lightning's files have many, of OmegaConf and
    tokenizers: each gets its own stand-in, as would builtins.eval. Names in os are refused. The
    checksums of the zip file are verified first; safetensors checks that its offsets fit the file,
    but it has no checksums."""
    if path.suffix != ".safetensors":
        check_archive(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        known = torch.serialization.safe_globals([(make_stand_in(), name) for name in names])
        with known, warnings.catch_warnings(action="ignore"):
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # both libraries raise half a dozen types for a damaged or foreign file
        fail(f"{path}: damaged, unsafe, or not a zip file of torch.save ({type(e).__name__})")
    return data if isinstance(data, dict) else fail(f"{path}: holds no dict")


def read(source, loss=None, tokenizer=None):
    """Any SOURCE as (what our checkpoint holds, less its optimizer and its data's hash; Config)."""
    path = locate(source)
    config, data = read_config(path), read_tensors(path)
    ours = data.get("kind") == KIND or "nanomdlm" in config
    if ours and (loss or tokenizer):
        fail(f"{path}: --loss and --tokenizer are for other projects' files; this one has its own")
    try:
        if data.get("kind") == KIND:
            ckpt = read_checkpoint(path)
            names = "model ema step best config tokenizer seconds".split()
            state = {name: ckpt[name] for name in names}
        elif ours:
            state = read_folder(path, data, config["nanomdlm"])
        else:
            state = from_upstream(path, data, config, loss, tokenizer)
        cfg = from_dict(state["config"], path)
        with torch.device("meta"):
            for name in ("model", "ema"):
                DiT(cfg).load_state_dict(state[name], assign=True)
        return state, cfg
    except FOREIGN as e:
        fail(f"{path}: not as nanoMDLM, MDLM, SEDD, nanoDD or SMDM write it ({name_error(e)})")


# --------------------------------------------------------------------------------------------------


def read_arguments(argv):
    p = parser(__doc__)
    p.add_argument("source", help="file, folder, id on the hub, or ID:FILE")
    p.add_argument("out", help="a checkpoint, if it ends in .pt, else a folder in the hub's layout")
    p.add_argument(
        "--loss", choices=LOSSES, help="of a source that does not have it; default: mdlm, or ar"
    )
    p.add_argument(
        "--tokenizer", "--vocab", metavar="NAME",
        help="of a source whose vocabulary is not upstream's: gpt2, a vocab.txt or tokenizer.json "
        "(uncased WordPiece, byte-level BPE, Llama's), or the folder of a prepared corpus",
    )  # fmt: skip
    p.add_argument(
        "--no_ema", action="store_true", help="folder: the raw weights (a checkpoint has both)"
    )
    p.add_argument("--push", metavar="ID", help="folder: upload it as this model")
    p.add_argument("--overwrite", action="store_true", help="replace OUT")
    return p.parse_args(argv)


def check_arguments(args):
    out = Path(args.out)
    if out.suffix == ".pt" and (args.push or args.no_ema):
        fail(f"{out}: --push and --no_ema are for a folder")
    if not args.overwrite and (out.is_file() or out.is_dir() and any(out.iterdir())):
        fail(f"{out}: exists; add --overwrite to replace it")


def write(out, state, cfg, args):
    try:
        if out.suffix == ".pt":
            out.parent.mkdir(parents=True, exist_ok=True)
            save_checkpoint(out, **state, optimizer=[], data="")
        else:
            write_folder(out, state, cfg, args.push or out.name, not args.no_ema)
    except (OSError, ValueError) as e:
        fail(one_line(e))


@contextlib.contextmanager
def show_time(stage):
    """Show that a stage without countable steps goes on, and for how long it has."""
    ended, bar = threading.Event(), progress(desc=stage, bar_format="{desc}: {elapsed}")

    def tick():
        while not ended.wait(0.2):
            bar.update(0)

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        bar.close()


@command
def main(argv=None):
    args = read_arguments(argv)
    check_arguments(args)
    tokenizer = read_tokenizer(args.tokenizer) if args.tokenizer else None
    with show_time(f"reading {args.source}"):
        state, cfg = read(args.source, args.loss, tokenizer)
    out = Path(args.out)
    with show_time(f"writing {out}"):
        write(out, state, cfg, args)
    if args.push:
        push(out, args.push)
    kind, ema = state["tokenizer"]["kind"], "" if state["model"] is state["ema"] else ", with EMA"
    print(
        f"{out}: {count_parameters(cfg):,} parameters, loss={cfg.loss}, "
        f"vocab_size={cfg.vocab_size}, seq_len={cfg.seq_len}, tokenizer {kind}, "
        f"step {state['step']:,}{ema}"
    )


if __name__ == "__main__":
    main()
