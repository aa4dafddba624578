"""Prepare a data set: text in, data/<name>/{train,val[,test]}.bin and meta.json out (corpus.py).

python data/prepare.py pydocs                      # Python's own documentation, no download
python data/prepare.py text8                       # or --input text8.zip
python data/prepare.py openwebtext --wrap 1024     # parquet from the hub, or --input FILE...
python data/prepare.py lm1b                        # a sentence per row, or --packed; WordPiece
python data/prepare.py ptb                         # or another zero-shot set, in GPT-2's BPE
python data/prepare.py wikitext103 --train         # all its splits, to train on
python data/prepare.py slimpajama                  # in Llama-2's pieces, as in SMDM
python data/prepare.py fineweb --dump CC-MAIN-2024-18   # start of a dump, a newer text to test on
python data/prepare.py gsm8k                       # to fine-tune on: questions, thoughts, answers
python data/prepare.py sharegpt                    # to fine-tune on: conversations
python data/prepare.py text --input a.txt b.txt    # any UTF-8 text; --tokenizer bpe, char or gpt2
python data/prepare.py text --input a.jsonl b.csv --column content      # a column of such files
python data/prepare.py verify openwebtext          # compare files of any size with their hashes

A data set is one function; its keyword arguments are the options that apply to it. A killed run of
a set with --workers resumes when the command is repeated.
"""

import inspect
import shlex
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's path is data/ alone

from common import command, fail, one_line, parser, suggest
from configs import CONFIGS
from data.corpus import NAMES, default_folder, folder_of, partial_of, verify
from data.finetune import gsm8k, reversal, sharegpt
from data.pretrain import fineweb, lm1b, openwebtext, slimpajama
from data.texts import TEXT_KINDS, pydocs, text, text8
from data.zeroshot import ZERO_SHOT, zero_shot

DATASETS = {
    "pydocs": pydocs, "text8": text8, "openwebtext": openwebtext, "lm1b": lm1b,
    **{name: zero_shot(name) for name in ZERO_SHOT},
    "slimpajama": slimpajama, "fineweb": fineweb,
    "gsm8k": gsm8k, "sharegpt": sharegpt, "reversal": reversal, "text": text,
}  # fmt: skip
NAMES |= {name: {} for name in DATASETS if name not in NAMES}


def dataset_options(name):
    """{option: default} of a data set."""
    parameters = [*inspect.signature(DATASETS[name]).parameters.values()]
    return {p.name: p.default for p in parameters[1:]}  # without the folder


def prepare(name, out=None, overwrite=False, **options):
    """Make data/<name>, or the folder `out`; returns its meta. Bad input is one line and exit code
    2, and leaves the folder as it was."""
    if name not in DATASETS:
        fail(f"unknown data set {name!r}; {suggest(name, DATASETS)}")
    allowed = [*dataset_options(name), "out", "overwrite"]
    for option in options:
        if option not in allowed:
            fail(f"--{option} does not apply to {name}; its options are --{' --'.join(allowed)}")
    default = default_folder(name, **options)  # checks --dump
    folder = folder_of(out or default)
    if folder.exists() and not overwrite:
        fail(f"{folder}: exists; --overwrite replaces it")
    if folder.exists() and not (folder / "meta.json").exists():
        fail(f"{folder}: exists and is not a prepared data set; remove it yourself if you mean it")
    partial, resumable = partial_of(folder), "workers" in allowed  # these sets take long
    try:
        if not resumable:
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)
        meta = DATASETS[name](folder, **options)
    except BaseException as e:
        if not resumable or not any(partial.glob("shards/*.bin")):  # nothing to resume
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(e, OSError):
            fail(one_line(e))
        raise
    shutil.rmtree(folder / "shards", ignore_errors=True)  # last: until here a run can resume
    return meta


# --------------------------------------------------------------------------------------------------
# The command

EXAMPLES = {"gpt2": "owt_mdlm", "llama": "smdm_170"}  # kind of tokenizer: a config in that kind


def announce(meta, name, out=None, **options):
    """Print what was made and the command that uses it."""
    for split, sizes in meta["splits"].items():
        print(f"{split:5} {sizes['tokens']:14,} tokens {sizes['characters']:16,} characters")
    data, example = out or meta["name"], EXAMPLES.get(meta["tokenizer"]["kind"])
    if "train" in meta["splits"]:
        folder = default_folder(name, **options)
        print(f"now train on it: {training_command(meta, name, data, folder, example)}")
    else:
        command = f"python evaluate.py out/{example}/ckpt.pt --data={shlex.quote(data)}"
        print(f"now evaluate a model on it: {command}")


def training_command(meta, name, data, folder, example):
    config = closest_config(name, folder, example, meta["given"])
    cfg, command = CONFIGS[config](), f"python train.py {config}"
    fields = dict(data=data, seq_len=meta["wrap"])
    for field, value in fields.items():
        if value and value != getattr(cfg, field):
            command += f" --{field}={shlex.quote(str(value))}"
    if meta["given"] and not cfg.bos:
        command += " --bos=True"
    if meta["given"] and example:
        command += f" --init_from=out/{example}/ckpt.pt"
    if data != cfg.data:  # another run than the config's
        command += f" --out_dir={shlex.quote('out/' + meta['name'])}"
    return command


def closest_config(name, folder, example, given):
    """The config made for this folder, or else for one that is packed alike, or for the same text,
    or in the same tokenizer."""

    def rank(config):
        made_for = CONFIGS[config]().data
        same_text = made_for.partition("_")[0] == name
        alike = same_text and ("_wrap" in made_for) == ("_wrap" in folder)
        in_kind = config == example and (same_text or given or name in ZERO_SHOT)
        return made_for == folder, alike, same_text, in_kind

    return max(CONFIGS, key=rank)


def parse_arguments(argv):
    """{option: value} of the options that were given."""
    p = parser(__doc__)
    flag = dict(action="store_true", default=None)
    add = p.add_argument
    add("name", help=", ".join(DATASETS))
    add("--input", nargs="+", metavar="FILE", help="read these files instead of downloading")
    add("--out", help="folder: a bare name is under data/, anything with a slash is a path")
    kinds = f"text: {', '.join(TEXT_KINDS)} [bpe]; gsm8k, sharegpt, reversal: bpe, gpt2, llama"
    add("--tokenizer", help=f"{kinds} [llama]")
    add("--vocab_size", type=int, help="bpe: number of ids [2048]")
    add("--vocab", metavar="FILE", help="BERT's or Llama-2's tokenizer.json [download]")
    columns = "column of .jsonl, .json, .csv and parquet files [text]"
    add("--column", help=f"text, openwebtext, slimpajama: {columns}")
    add("--dump", help="fineweb: [CC-MAIN-2024-10]")
    add("--tokens", type=int, help="fineweb: size of test [209715200]")
    add("--packed", help="lm1b: rows of many sentences", **flag)
    add("--wrap", type=int, help="rows of this length; openwebtext: [0], uncut")
    add("--train", help="zero-shot sets: with the splits to train on", **flag)
    add("--no_eot", help="zero-shot sets: no EOT after documents", **flag)
    add(
        "--train_padding", help="gsm8k, sharegpt, reversal: train the EOS that fill rows up", **flag
    )
    add("--first_turn", help="sharegpt: only the first turn", **flag)
    add("--val_docs", type=int, help="openwebtext, lm1b, slimpajama: size of val")
    add("--workers", type=int, help="the large sets: processes [one per core]")
    add("--overwrite", help="replace the folder once the new one is complete", **flag)
    return {k: v for k, v in vars(p.parse_args(argv)).items() if v is not None}


@command
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["verify"]:
        for name in argv[1:] or fail("verify: needs the name or folder of a prepared data set"):
            verify(name)
        return
    options = parse_arguments(argv)
    announce(prepare(**options), **options)


if __name__ == "__main__":
    main()
