"""The hub's folder for `tasks.convert`: weights, configuration, tokenizer, card and code.

model.safetensors        the weights, under the names of our checkpoints behind "model."
config.json              what transformers needs, and our Config under "nanomdlm"
nanomdlm_tokenizer.json  the tokenizer's spec (data/tokenizer.py), for the way back
tokenizer.json, tokenizer_config.json            the same tokenizer for transformers
modeling_nanomdlm.py and the core files that it imports
README.md                the card
"""

import hashlib
import json
import math
import re
import textwrap
from dataclasses import asdict
from pathlib import Path

from common import fail
from model import count_parameters
from tasks.convert_tokenizer import write_fast

ROOT = Path(__file__).resolve().parents[1]
CODE = Path(__file__).with_name("modeling_nanomdlm.py")
WEIGHTS, SPEC = "model.safetensors", "nanomdlm_tokenizer.json"
OLD_VOCABULARIES = {  # kind: (file, key of the spec) of folders written before SPEC
    "bpe": ("tokenizer.json", "json"),
    "llama": ("tokenizer.json", "json"),
    "wordpiece": ("vocab.txt", "vocab"),
}

# --------------------------------------------------------------------------------------------------
# The code

# `from X import ...` and `import X`, which transformers finds by a regular expression, too
IMPORT = re.compile(r"^( *)(?:from ([\w.]+) import|import (\w+))\b", re.MULTILINE)


def collect_code():
    """{file name: source} of the modeling file and, recursively, of our modules that it imports.
    The folder is flat: extra/mamba.py becomes extra_mamba.py."""
    sources, queue = {}, [(CODE.name, CODE)]
    while queue:
        name, path = queue.pop()
        if name not in sources:
            sources[name], modules = make_relative(path.read_text("utf-8"))
            queue += [(f"{flat_name(m)}.py", find_module(m)) for m in modules]
    return sources


def make_relative(source):
    """(the source with relative imports of our modules, the names of these modules)"""
    modules = []

    def relative(match):
        indent, origin, name = match.groups()
        if not find_module(origin or name).is_file():
            return match[0]
        modules.append(origin or name)
        start = f"from .{flat_name(origin)} import" if origin else f"from . import {name}"
        return indent + start

    return IMPORT.sub(relative, source), modules


def flat_name(module):
    return module.replace(".", "_")


def find_module(name):
    return ROOT / f"{name.replace('.', '/')}.py"


# --------------------------------------------------------------------------------------------------
# The card

CARD = """---
library_name: transformers
{tag}tags: [masked-diffusion, mdlm, nanomdlm]
---

# {name}

A language model by nanoMDLM: loss {loss}, {parameters:,} parameters, {step:,} optimiser
steps{best}.

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

model = AutoModelForMaskedLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
inputs = tokenizer([{example}], padding=True, truncation=True, return_tensors="pt")
logits = model(**inputs).logits  # (B, L, {outputs}); [MASK] has the id {mask}
```

{fill}`AutoModel` returns the hidden states. `labels=` adds `loss`, the mean cross-entropy in nats
over the positions whose label is not -100. It is not the bound of the training loss.

`timesteps=` takes a t in [0, 1] per row, 0 for a clean text and 1 for nothing but MASK. By
default it is that of the fraction of MASK in the row.{note}

Padding does not change a row's result. A row has at most {length} tokens; `truncation=True`
cuts longer texts.
{tokens}

These do not work: `generate`, `resize_token_embeddings`, and an `attention_mask` with zeros
between a row's tokens. For samples, use nanoMDLM: `python -m tasks.convert {name} ckpt.pt`,
then `python sample.py ckpt.pt`.

Without `trust_remote_code=True`, `AutoTokenizer` asks for it and waits, although it runs no code
of this folder.

| field | value |
|---|---|
{table}
"""
FILL = """```python
from transformers import pipeline

pipeline("fill-mask", model="{name}", trust_remote_code=True)({example})
```

"""
NO_FILL = """There is no `pipeline_tag`: `pipeline("fill-mask")` runs, but a causal model reads
only the tokens before a [MASK], not those behind it.

"""
NOTES = {
    "ar": "\nA causal model: position i is predicted from the tokens before it, whatever t is.",
    "sedd": "\nThe log scores of SEDD are these logits + log(alpha / (1 - alpha)) - log V.",
}
SHOWN = "data vocab_size seq_len n_layer n_head n_embd cond_dim time_cond tied schedule T".split()


def write_card(state, cfg, name, names):
    """README.md; `names` are the tokenizer's special tokens."""
    spec, best = state["tokenizer"], state["best"]
    letter = next(filter(str.isalpha, spec.get("characters", "")), "a")
    example = f"{letter}[MASK]{letter}" if spec["kind"] == "char" else "The [MASK] of the house."
    texts = dict(name=name, example=json.dumps(example, ensure_ascii=False))
    return CARD.format(
        **texts, loss=cfg.loss, parameters=count_parameters(cfg), step=state["step"],
        best="" if math.isinf(best) else f", at best {best:.4f} nats per token of validation data",
        tag="" if cfg.causal else "pipeline_tag: fill-mask\n", mask=cfg.mask_id,
        fill=NO_FILL if cfg.causal else FILL.format(**texts), note=NOTES.get(cfg.loss, ""),
        outputs=cfg.vocab_size + (not cfg.zero_masking), length=cfg.seq_len,
        tokens=describe_tokenizer(spec["kind"], cfg, names),
        table="\n".join(f"| {field} | {getattr(cfg, field)} |" for field in SHOWN),
    )  # fmt: skip


def describe_tokenizer(kind, cfg, names):
    added = "adds no token to a text"
    if kind == "wordpiece":
        added = "puts [CLS] and [SEP] around a text"
    elif cfg.bos and "bos_token" in names:
        added = f"puts {names['bos_token']} in front of a text"
    lines = [f"The tokenizer ({kind}) {added}."]
    if kind == "char":
        lines.append("A character that it does not know is an error.")
    if names["pad_token"] == "[MASK]":
        lines.append("Its padding is [MASK], too: with several [MASK] in a text, the `sequence`")
        lines.append("that the pipeline shows lacks the others.")
    return textwrap.fill(" ".join(lines), 88)


# --------------------------------------------------------------------------------------------------
# The folder


def write_folder(out, state, cfg, name, ema=True):
    """Write all files of the folder; `name` is the model's on the hub."""
    from safetensors.torch import save_file

    files, names = write_fast(state["tokenizer"], cfg)
    files |= collect_code() | {"README.md": write_card(state, cfg, name, names)}
    files[SPEC] = json.dumps(state["tokenizer"], ensure_ascii=False, indent=1)
    out.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{name}": tensor for name, tensor in state["ema" if ema else "model"].items()}
    save_file(weights, out / WEIGHTS, metadata={"format": "pt"})
    config = describe(state, cfg, names)
    config["nanomdlm"]["sha256"] = hash_file(out / WEIGHTS)  # safetensors has no checksums
    files["config.json"] = json.dumps(config, indent=1)
    for file, text in files.items():
        (out / file).write_text(text, "utf-8")


def hash_file(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def describe(state, cfg, names):
    """config.json as a dict."""
    classes = dict(AutoConfig="NanoMDLMConfig", AutoModel="NanoMDLMModel")
    classes["AutoModelForMaskedLM"] = "NanoMDLMForMaskedLM"
    best = None if math.isinf(state["best"]) else state["best"]
    return {
        "architectures": ["NanoMDLMForMaskedLM"], "model_type": "nanomdlm", "dtype": "float32",
        "auto_map": {auto: f"{CODE.stem}.{name}" for auto, name in classes.items()},
        "vocab_size": cfg.vocab_size + 1, "mask_token_id": cfg.mask_id,
        "tie_word_embeddings": False,
        "nanomdlm": dict(config=asdict(cfg), step=state["step"], best=best),
    }  # fmt: skip


def read_folder(path, weights, config):
    """What `convert.read` returns of the weights in a folder that `write_folder` made."""
    if config.get("sha256") not in (None, hash_file(path)):
        fail(f"{path}: damaged: its sha256 is not that of config.json")
    weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    state = dict(model=weights, ema=weights, step=config["step"], seconds=0.0)
    state |= dict(best=config["best"] or math.inf, config=config["config"])
    return state | dict(tokenizer=read_spec(path.parent, config))


def read_spec(folder, config):
    try:
        if "tokenizer" not in config:
            return json.loads((folder / SPEC).read_text("utf-8"))
        spec = config["tokenizer"]  # before SPEC
        file, key = OLD_VOCABULARIES.get(spec["kind"], (None, None))
        return {**spec, key: (folder / file).read_text("utf-8")} if file else spec
    except OSError as e:
        fail(f"{e.filename}: {e.strerror}")


def push(out, name):
    """Upload the folder as the hub's model `name`."""
    try:
        from huggingface_hub import HfApi

        HfApi().create_repo(name, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=out)
    except Exception as e:  # not logged in, no network, a bad name: each of another type
        fail(f"--push {name}: {type(e).__name__}: {' '.join(str(e).split())}; {out} is complete")
