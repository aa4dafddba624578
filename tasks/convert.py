"""Checkpoints of other projects into ours, and any of them out to the Hugging Face hub's layout.

python -m tasks.convert kuleshov-group/mdlm-owt out/mdlm/ckpt.pt        # from the hub, a folder or a file
python -m tasks.convert sedd.ckpt out/sedd/ckpt.pt                      # MDLM's Lightning files, baselines too
python -m tasks.convert louaaron/sedd-small out/sedd_small/ckpt.pt      # SEDD's; also the folder of one of its runs
python -m tasks.convert rupspace/nanoDD-D3PM-text8 out/nanodd/ckpt.pt   # nanoDD's ckpt.pt
python -m tasks.convert nieshen/SMDM:mdm_safetensors/mdm-170M-100e18.safetensors out/smdm.pt   # one file of a repo
python -m tasks.convert out/owt_mdlm/ckpt.pt hub/mine --push ME/mine    # to a folder for the hub, and up
python -m tasks.convert ME/mine out/back/ckpt.pt                        # and back; or hub/mine, the folder

What SOURCE holds decides how it is read. OUT is a checkpoint if it ends in .pt, with the raw and the averaged
weights where the source has both, else a folder that transformers loads with trust_remote_code=True.
Nothing in a source is executed, pickles included, and a tensor that is unknown, missing or of another shape
ends the conversion. The result has no optimizer state: it is for sampling, evaluation and as a start.
"""

import ast
import inspect
import json
import math
import re
import textwrap
import warnings
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

import diffusion
import model as network
from common import KIND, fail, one_line, parser, read_checkpoint, save_checkpoint
from configs import SMDM_SIZES, Config, from_dict, owt_mdlm, smdm, text8_d3pm
from data.prepare import bert_vocabulary, llama_vocabulary, read_vocabulary
from data.tokenizer import read_wordpiece, tokenizer_of
from diffusion import LOSSES, time_at
from model import DiT, count_parameters, rotary_tables

# ---------------------------------------------------------------------------------------------------------
# 1. Files

FILES = "model.safetensors", "pytorch_model.bin", "ckpt.pt", "checkpoints-meta/checkpoint.pth"
JSON = "tokenizer.json", "json"
VOCABULARIES = {
    "bpe": JSON,
    "llama": JSON,
    "wordpiece": ("vocab.txt", "vocab"),
}  # kind: file, key of spec
FOREIGN = (
    AttributeError,
    KeyError,
    TypeError,
    ValueError,
    RuntimeError,
)  # reading what is not as expected


def named(e):
    return f"{type(e).__name__}: {' '.join(str(e).split())}"


def locate(source):
    """SOURCE as a file on this machine; a model of the hub, ID, or one file of it, ID:FILE, is downloaded."""
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
            wanted = [*FILES, "config.json", *{file for file, _ in VOCABULARIES.values()}]
            path = Path(snapshot_download(source, allow_patterns=wanted))
        except Exception as e:  # no network, no such model, not installed: each of another type
            fail(f"{source}: not on this machine, and not to be had from the hub ({named(e)})")
    if path.is_file():
        return path
    found = [path / name for name in FILES if (path / name).is_file()]
    return found[0] if found else fail(f"{path}: has none of {', '.join(FILES)}; name the file")


def read_config(path):
    """The configuration that lies beside a file of weights, {} if none does."""
    beside, above = (
        path.with_name("config.json"),
        path.resolve().parents[1] / ".hydra" / "config.yaml",
    )
    try:
        if path.suffix in (".safetensors", ".bin") and beside.is_file():
            return dict(json.loads(beside.read_text("utf-8")))
        if path.suffix == ".pth" and above.is_file():  # of a run of SEDD
            import yaml

            return dict(yaml.safe_load(above.read_text("utf-8")))
    except Exception as e:  # json's, yaml's and the disk's errors have no common base
        fail(f"{path}: the configuration beside it cannot be read ({named(e)})")
    return {}


def stand_in():
    """A class to take the place of one that a pickle names: it keeps its state, and does nothing."""

    class StandIn:
        state = None

        def __init__(self, *args):
            pass

        def __setstate__(self, state):
            self.state = state

    return StandIn


def read_tensors(path):
    """The dict in a file of safetensors or torch.save: plain containers, tensors and stand-ins.

    Pickles are read by torch's weights-only reader, which imports nothing and calls nothing but what rebuilds
    a tensor. It stops at any other name, and Lightning's files have many, of OmegaConf and tokenizers: each
    gets a stand-in of its own, and builtins.eval would get one, too. Names in os it refuses in any case."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        known = torch.serialization.safe_globals([(stand_in(), name) for name in names])
        with known, warnings.catch_warnings(action="ignore"):
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # both libraries raise half a dozen types for a damaged or foreign file
        fail(f"{path}: damaged, unsafe, or not a zip file of torch.save ({type(e).__name__})")
    return data if isinstance(data, dict) else fail(f"{path}: holds no dict")


def read(source, loss=None, vocab=None):
    """Any SOURCE as (what our checkpoint holds, less its optimizer and the hash of its data; the Config)."""
    path = locate(source)
    config, data = read_config(path), read_tensors(path)
    try:
        if data.get("kind") == KIND:
            ckpt = read_checkpoint(path)
            state = {
                name: ckpt[name] for name in "model ema step best config tokenizer seconds".split()
            }
        elif "nanomdlm" in config:
            state = from_folder(path, data, config["nanomdlm"])
        else:
            state = from_upstream(path, data, config, loss, vocab)
        cfg = from_dict(state["config"], path)
        with torch.device("meta"):
            for name in ("model", "ema"):
                DiT(cfg).load_state_dict(state[name], assign=True)
        return state, cfg
    except FOREIGN as e:
        fail(f"{path}: not as nanoMDLM, MDLM, SEDD, nanoDD or SMDM write it ({named(e)})")


# ---------------------------------------------------------------------------------------------------------
# 2. From upstream. Five layouts, told apart by what they hold:
#   MDLM's Lightning file   tensors "backbone...." in state_dict; ema, a list in the order of parameters();
#                           configuration and tokenizer, pickled objects, in hyper_parameters
#   MDLM's hub model        tensors "backbone....", a flat config.json
#   SEDD                    tensors as they are, a nested config.json; a run's are in model, with ema and step
#   nanoDD                  tensors "net...." in model, "ema_model.net...." in ema; model_args
#   SMDM                    tensors "transformer.h....", alone; a run's are in model, with step_count

FIELDS = {  # theirs: ours
    "model.length": "seq_len", "model.n_heads": "n_head", "model.dropout": "dropout", "T": "T",
    "time_conditioning": "time_cond", "noise.type": "schedule", "parameterization": "loss",
    "data.train": "data", "model_length": "seq_len", "n_heads": "n_head", "dropout": "dropout",
    "model_args.n_heads": "n_head", "model_args.dropout": "dropout", "model_args.T": "T",
    "model_args.lambda_ce": "aux_ce", "training_args.seq_len": "seq_len", "training_args.dataset": "data",
}  # fmt: skip
VALUES = {"loglinear": "linear", "cosinesqr": "cosine2", "linear": "sigma_linear", "subs": "mdlm"}
MODULES = {  # our parameter or module: theirs
    "embed.weight": "vocab_embed.embedding", "time.fc1": "sigma_map.mlp.0", "time.fc2": "sigma_map.mlp.2",
    "qkv": "attn_qkv", "mlp_in": "mlp.0", "mlp_out": "mlp.2", "ada": "adaLN_modulation",
    "final_norm": "output_layer.norm_final", "final_ada": "output_layer.adaLN_modulation",
    "head": "output_layer.linear",
}  # fmt: skip
NANODD_MODULES = MODULES | {
    "embed.weight": "vocab_embed.weight", "time.fc1": "c_embed.mlp.0", "time.fc2": "c_embed.mlp.2",
    "final_norm": "norm_final", "final_ada": "adaLN_modulation",
}  # fmt: skip
NOT_WEIGHTS = {"rotary_emb.inv_freq", "betas", "alpha_bars", "initted", "step"}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PRIVATE = "".join(
    map(chr, range(0xE000, 0xE008))
)  # for [CLS] [SEP] [BOS] [EOS] [MASK] ...: no text
TOKENIZERS = {  # rows of upstream's embedding: (spec, id of MASK)
    50258: ({"kind": "gpt2"}, 50257),
    30522: ({"kind": "wordpiece"}, 103),  # bert-base-uncased
    35: ({"kind": "char", "characters": PRIVATE + LETTERS + " "}, 4),  # MDLM's text8
    28: ({"kind": "char", "characters": " " + LETTERS}, 27),  # nanoDD's
}


def flatten(node, prefix=""):
    """A nested configuration as {"model.length": 1024, ...}. OmegaConf's stand-ins have in their state the
    _content of a container or the _val of a leaf."""
    if isinstance(state := getattr(node, "state", None), dict):
        node = state.get("_content", state.get("_val"))
    if not isinstance(node, dict):
        return {prefix.removesuffix("."): node}
    return {
        k: v for key, child in node.items() for k, v in flatten(child, f"{prefix}{key}.").items()
    }


def bare(weights):
    """Tensors without the prefixes of what wraps the network."""
    wrapping = re.compile(r"^(ema_model\.)?(backbone\.|net\.)?")
    inner = {wrapping.sub("", name): tensor for name, tensor in weights.items()}
    if len(inner) < len(weights):
        raise ValueError("some tensors are there twice, with a prefix and without")
    return inner


def from_upstream(path, data, config, loss=None, vocab=None):
    """The state of `read` from what another project wrote."""
    hyper = data.get("hyper_parameters", {})
    args = {name: data[name] for name in ("model_args", "training_args") if name in data}
    told = flatten(config) | flatten(args) | flatten(hyper.get("config", {}))
    words = (getattr(hyper.get("tokenizer"), "state", None) or {}).get(
        "vocab"
    )  # BERT's: {piece: id}
    step = int(data.get("global_step", data.get("iter_num", data.get("step", 0))))
    weights = bare(data.get("state_dict", data.get("model", data)))
    if "transformer.wte.weight" in weights:
        return from_smdm(path, weights, int(data.get("step_count", 0)), loss, vocab)
    if vocab:
        vocab = read_vocabulary(read_wordpiece, vocab)
    elif words:
        vocab = {
            "kind": "wordpiece",
            "vocab": "".join(f"{w}\n" for w in sorted(words, key=words.get)),
        }
    a_run_of_sedd = "model" in data and not args
    cfg, spec, mask = describe(path, weights, told, a_run_of_sedd, loss, vocab)

    ours = averaged = translate(weights, cfg, mask, path)
    if ema := data.get("ema"):
        if "shadow_params" in ema:
            names = [
                name for name in weights if name not in NOT_WEIGHTS
            ]  # in the order of parameters(), too
            if len(ema["shadow_params"]) < len(
                names
            ):  # more are fine: older noises had a parameter
                fail(
                    f"{path}: ema: {len(ema['shadow_params'])} tensors, but the network has {len(names)}"
                )
            ema = dict(zip(names, ema["shadow_params"]))
        averaged = translate(bare(ema), cfg, mask, f"{path}: ema")
    return state_of(ours, averaged, step, cfg, spec)


def state_of(ours, averaged, step, cfg, spec):
    state = dict(model=ours, ema=averaged, step=step, best=math.inf, seconds=0.0)
    return state | dict(config=asdict(cfg), tokenizer=spec)


def describe(path, weights, told, a_run_of_sedd, loss=None, vocab=None):
    """(Config, tokenizer's spec, upstream's id of MASK) by the tensors' shapes and the flat configuration."""
    nanodd = "vocab_embed.weight" in weights
    embed = weights.get("vocab_embed.weight" if nanodd else "vocab_embed.embedding")
    if getattr(embed, "ndim", 0) != 2:
        fail(
            f"{path}: not MDLM's, SEDD's, nanoDD's or SMDM's: has no embedding, but {listing(weights)}"
        )
    rows, width = embed.shape
    sedd = a_run_of_sedd or "graph.type" in told  # the project; MDLM has a loss of that name
    if told.get("graph.type", "absorb") != "absorb" or sedd and rows == told.get("tokens", 50257):
        fail(
            f"{path}: graph.type=uniform, without a MASK: only SEDD's absorbing graph is masked diffusion"
        )
    if rows not in TOKENIZERS:
        fail(
            f"{path}: an embedding of {rows} rows, but upstream's have {', '.join(map(str, TOKENIZERS))}"
        )
    spec, mask = TOKENIZERS[rows]
    if spec["kind"] == "wordpiece":
        spec = vocab or bert_vocabulary()
        if (pieces := tokenizer_of(spec).vocab_size) != rows:
            fail(f"{path}: an embedding of {rows} rows, but a vocabulary of {pieces} pieces")

    clock = weights.get("c_embed.mlp.0.bias" if nanodd else "sigma_map.mlp.0.bias")
    known = (
        dict(seq_len=256, data="text8", loss="d3pm")
        if nanodd
        else dict(seq_len=1024, data="openwebtext")
    )
    known.setdefault("loss", "sedd" if sedd else "ar" if clock is None else "mdlm")
    for theirs, ours in FIELDS.items():
        if (value := told.get(theirs)) is not None:
            known[ours] = VALUES.get(value, value) if isinstance(value, str) else value
    known["loss"] = loss or known["loss"]
    known.setdefault("time_cond", known["loss"] == "sedd")  # which means nothing without
    if sedd or nanodd:
        known["time_cond"] = True
    elif known["data"].startswith("openwebtext"):
        known["data"] = f"openwebtext_wrap{known['seq_len']}"
    if known["loss"] == "d3pm" and not nanodd:
        known |= dict(zero_masking=bool(told.get("subs_masking")), carry_over=False)
    if known["loss"] == "ar":
        known |= dict(causal=True, bos=True, time_cond=False, T=0)
    if nanodd and known["T"] != 1000:
        fail(
            f"{path}: T={known['T']}: the network reads the step n, ours 1000 t, so T must be 1000"
        )
    if known.get("time_cond") and known.get("schedule") in ("geometric", "sigma_linear"):
        fail(
            f"{path}: noise.type={told['noise.type']}: the network reads a sigma(t) that ours does not"
        )
    if known.get("time_cond") and told.get("training.change_of_variables"):
        fail(f"{path}: training.change_of_variables=True: the network reads t, ours sigma(t)")

    freq = weights.get("rotary_emb.inv_freq")
    if freq is not None:
        half = len(freq)
        if not torch.allclose(
            freq.float(), 10_000 ** (-torch.arange(half) / half), rtol=1e-2, atol=0
        ):
            fail(f"{path}: rotary_emb.inv_freq: not of base 10000")
        if known.setdefault("n_head", width // (2 * half)) * 2 * half != width:
            fail(
                f"{path}: n_heads={known['n_head']}, but rotary_emb.inv_freq is of heads of {2 * half}"
            )
    known.setdefault("n_head", max(width // 64, 1))
    known["n_layer"] = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    known |= dict(vocab_size=rows - (mask == rows - 1), n_embd=width, cond_dim=0)
    known |= {} if clock is None else dict(cond_dim=len(clock))
    types = {f.name: f.type for f in fields(Config)}
    known = {name: types[name](value) for name, value in known.items()}
    return replace(text8_d3pm() if nanodd else owt_mdlm(), **known), spec, mask


def listing(words, most=8):
    words = list(words)
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def check(weights, shapes, where):
    """Upstream's tensors must be those of `shapes`, {name: shape}; a refusal has the names."""
    if unknown := [name for name in weights if name not in {*shapes, *NOT_WEIGHTS}]:
        fail(f"{where}: unknown: {listing(unknown)}")
    if missing := [name for name in shapes if name not in weights]:
        fail(f"{where}: missing: {listing(missing)}")
    if wrong := [
        f"{name} {list(weights[name].shape)} instead of {shape}"
        for name, shape in shapes.items()
        if list(weights[name].shape) != shape or not weights[name].is_floating_point()
    ]:
        fail(f"{where}: of another shape or type: {listing(wrong)}")


def translate(weights, cfg, mask, where):
    """Upstream's tensors as ours, float32, or a refusal by name.

    MASK, as the last row of upstream's embedding, is where ours is, and only loses its output. Further in
    front it keeps its id, which no text has and is never answered from here on; a copy becomes our MASK."""
    with torch.device("meta"):
        shapes = {name: list(p.shape) for name, p in DiT(cfg).state_dict().items()}
    inside = mask < cfg.vocab_size
    for name in {"embed.weight", "head.weight", "head.bias"} & shapes.keys():
        shapes[name][0] = cfg.vocab_size + (not inside)
    table, theirs = NANODD_MODULES if cfg.tied else MODULES, {}
    for name in shapes:
        block, module, kind = re.fullmatch(r"(blocks\.\d+\.|)(.+)\.(weight|bias)", name).groups()
        theirs[name] = table.get(name) or f"{block}{table.get(module, module)}.{kind}"
    check(weights, {theirs[name]: shape for name, shape in shapes.items()}, where)
    ours = {name: weights[theirs[name]].float() for name in shapes}
    outputs = [name for name in ("head.weight", "head.bias") if name in ours]
    if inside:
        for name in ("embed.weight", *outputs):
            ours[name] = torch.cat((ours[name], ours[name][mask : mask + 1]))
        ours["head.bias"][mask] = -1e9
        if (
            cfg.loss == "sedd"
        ):  # it divides scores by the number of tokens, upstream's MASK not among them
            ours["head.bias"] += math.log(cfg.vocab_size / (cfg.vocab_size - 1))
    for name in outputs:
        ours[name] = ours[name][: cfg.vocab_size + (not cfg.zero_masking)]
    return {
        name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in ours.items()
    }


def from_smdm(path, weights, step, loss=None, vocab=None):
    """The state of `read` from SMDM's tensors: masked diffusion if the embedding has a row for MASK, else AR.

    The number of heads is that of the size in SMDM's table: no tensor tells it. An AR network gets a row of
    zeros for MASK, which it never reads: with bos=True its first token is given. Upstream always rounds its
    rotary cos and sin to bfloat16, we only under autocast to it. In float32 nothing else differs, and that by
    up to 2e-3 in the logits of untrained weights, 1e-3 in tests/commands/test_convert.py, more where attention is sharp."""
    (rows, d), V = weights["transformer.wte.weight"].shape, 32000
    if rows not in (V, V + 1):
        fail(f"{path}: an embedding of {rows} rows, but SMDM's have {V + 1}, or {V} if AR")
    n_layer = len({name.split(".")[2] for name in weights if name.startswith("transformer.h.")})
    size = [
        size for size, (layers, _, width) in SMDM_SIZES.items() if (layers, width) == (n_layer, d)
    ]
    if not size:
        fail(
            f"{path}: {n_layer} layers of width {d}: none of SMDM's sizes, and no tensor tells the heads"
        )
    cfg = smdm(size[0], ar=rows == V)
    if loss not in (None, cfg.loss):
        fail(f"{path}: --loss {loss}: an embedding of {rows} rows is for loss={cfg.loss}")

    H, f = cfg.n_head, cfg.mlp_width
    shapes = {"transformer.wte": [rows, d], "transformer.ln_f": [d], "lm_head": [V, d]}
    for i in range(n_layer):
        b = f"transformer.h.{i}."
        shapes |= {
            b + "norm_1": [d],
            b + "norm_2": [d],
            b + "attn.attn": [3 * d, d],
            b + "attn.proj": [d, d],
        }
        shapes |= {
            b + "mlp.swiglu.w1": [f, d],
            b + "mlp.swiglu.w2": [f, d],
            b + "mlp.swiglu.w3": [d, f],
        }
    check(weights, {f"{name}.weight": shape for name, shape in shapes.items()}, path)
    spec = llama_vocabulary(vocab)
    if (pieces := tokenizer_of(spec).vocab_size) != V:
        fail(f"{path}: {V} tokens, but a vocabulary of {pieces}")

    w = lambda name: weights[f"{name}.weight"].float()
    ours = {"embed": torch.cat((w("transformer.wte"), torch.zeros(V + 1 - rows, d)))}
    ours |= {"final_norm": w("transformer.ln_f"), "head": w("lm_head")}
    for i in range(n_layer):
        a, b = f"blocks.{i}.", f"transformer.h.{i}."
        qkv = (
            w(b + "attn.attn").reshape(H, 3, d // H, d).transpose(0, 1)
        )  # there: q, k, v head by head
        gate_up = torch.cat((w(b + "mlp.swiglu.w1"), w(b + "mlp.swiglu.w2")))
        ours |= {a + "qkv": qkv.reshape(3 * d, d), a + "attn_out": w(b + "attn.proj")}
        ours |= {a + "mlp_in": gate_up, a + "mlp_out": w(b + "mlp.swiglu.w3")}
        ours |= {a + "norm1": w(b + "norm_1"), a + "norm2": w(b + "norm_2")}
    ours = {f"{name}.weight": tensor.clone() for name, tensor in ours.items()}
    return state_of(ours, ours, step, cfg, spec)


# ---------------------------------------------------------------------------------------------------------
# 3. The hub's folder: weights, configuration, card, vocabulary, and one file of code, taken from our source.


def from_folder(path, weights, told):
    """The state of `read` from a folder that `write_folder` made."""
    spec = told["tokenizer"]
    if spec["kind"] in VOCABULARIES:
        file, key = VOCABULARIES[spec["kind"]]
        try:
            spec = {**spec, key: path.with_name(file).read_text("utf-8")}
        except OSError as e:
            fail(f"{path.with_name(file)}: {e.strerror}")
    weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    state = dict(
        model=weights, ema=weights, step=told["step"], best=told["best"] or math.inf, seconds=0.0
    )
    return state | dict(config=told["config"], tokenizer=spec)


def source_of(code):
    """(imports, definitions): what `code` uses of diffusion.py and model.py, directly or not."""
    names_in = lambda node: {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    pieces, uses = {}, {}  # name -> its source, name -> names in it
    for module in (diffusion, network):
        source = inspect.getsource(module)
        for node in ast.parse(source).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                bound = [a.asname or a.name.split(".")[0] for a in node.names]
            else:
                bound = [n.id for n in getattr(node, "targets", [])] or [
                    getattr(node, "name", None)
                ]
            for name in bound:
                if name not in pieces:  # what model.py imports from diffusion.py is here already
                    pieces[name], uses[name] = ast.get_source_segment(source, node), names_in(node)
    wanted, queue = set(), list(names_in(ast.parse(code)))
    while queue:
        if (name := queue.pop()) in pieces and name not in wanted:
            wanted.add(name)
            queue += uses[name]
    found = dict.fromkeys(text for name, text in pieces.items() if name in wanted)
    imports = sorted(text for text in found if text.startswith(("import ", "from ")))
    return "\n".join(imports), "\n\n\n".join(text for text in found if text not in imports)


def hub_classes():
    """What transformers needs around the network. Never called: its body is the end of the modeling file."""
    from types import SimpleNamespace

    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import MaskedLMOutput

    class NanoMDLMConfig(PretrainedConfig):
        model_type = "nanomdlm"

        def __init__(self, nanomdlm=None, **kwargs):
            self.nanomdlm = nanomdlm or {}
            super().__init__(**kwargs)

    class NanoMDLMForMaskedLM(PreTrainedModel):
        config_class = NanoMDLMConfig

        def __init__(self, config):
            super().__init__(config)
            fields = config.nanomdlm["config"]
            self.model = DiT(SimpleNamespace(mask_id=fields["vocab_size"], **fields))
            self.post_init()

        def _init_weights(self, module):
            """The rotary tables are in no file; from_pretrained leaves their memory as it found it."""
            if isinstance(module, DiT):
                cos, sin = rotary_tables(len(module.cos), module.cos.shape[1])
                module.cos.copy_(cos)
                module.sin.copy_(sin)

        def forward(self, input_ids, timesteps=None):
            """input_ids (B, L), MASK is config.mask_token_id; timesteps (B,) in [0, 1], 0 is clean, by
            default the time at which such a fraction of the row is masked -> logits (B, L, V)."""
            if timesteps is None:
                masked = (input_ids == self.config.mask_token_id).double().mean(-1)
                timesteps = time_at(self.model.cfg.schedule, masked)
            return MaskedLMOutput(logits=self.model(input_ids, timesteps.float()))


CARD = """---
library_name: transformers
pipeline_tag: fill-mask
tags: [masked-diffusion, mdlm, nanomdlm]
---

# {name}

A language model by nanoMDLM: loss {loss}, {parameters:,} parameters, {step:,} optimiser steps{best}.

```python
from transformers import AutoModelForMaskedLM

model = AutoModelForMaskedLM.from_pretrained("{name}", trust_remote_code=True)
logits = model(input_ids).logits  # (B, L, {outputs}); the id {mask} is MASK
```

`model(input_ids, timesteps)` takes a t in [0, 1] per row, 0 for a clean text and 1 for nothing but MASK; by
default that of the row's masked fraction. {note}The tokenizer is {tokenizer}.

For samples, with nanoMDLM: `python -m tasks.convert {name} ckpt.pt`, then `python sample.py ckpt.pt`.

| field | value |
|---|---|
{table}
"""
NOTES = {
    "ar": "A causal model: position i is predicted from the tokens before it, whatever t is. ",
    "sedd": "The log scores of SEDD are these logits + log(alpha / (1 - alpha)) - log V. ",
}
WHERE = {kind: f"in {file}" for kind, (file, _) in VOCABULARIES.items()} | {"gpt2": "GPT-2's"}


def write_folder(out, state, cfg, name, ema=True):
    """model.safetensors, config.json, modeling_nanomdlm.py, README.md, and a vocabulary in its own file."""
    from safetensors.torch import save_file

    spec, step = dict(state["tokenizer"]), state["step"]
    best = None if math.isinf(state["best"]) else state["best"]
    shown = (
        "data vocab_size seq_len n_layer n_head n_embd cond_dim time_cond tied schedule T".split()
    )
    card = CARD.format(
        name=name, loss=cfg.loss, parameters=count_parameters(cfg), step=step, mask=cfg.mask_id,
        best="" if best is None else f", at best {best:.4f} nats per token of validation data",
        outputs=cfg.vocab_size + (not cfg.zero_masking), note=NOTES.get(cfg.loss, ""),
        tokenizer=WHERE.get(spec["kind"], "in config.json"),
        table="\n".join(f"| {field} | {getattr(cfg, field)} |" for field in shown),
    )  # fmt: skip
    wrapper = textwrap.dedent(inspect.getsource(hub_classes).split('"""\n', 1)[1])
    doc = '"""A network of nanoMDLM for transformers, with trust_remote_code=True. Written by tasks/convert.py."""'
    needed, classes = wrapper.split("\nclass ", 1)
    imports, definitions = source_of(classes := "\nclass " + classes)
    code = f"{doc}\n\n{imports}\n{needed}\n{definitions}\n\n{classes}"
    texts = {"README.md": card, f"{CODE}.py": code}
    if spec["kind"] in VOCABULARIES:
        file, key = VOCABULARIES[spec["kind"]]
        texts[file] = spec.pop(key)
    if spec["kind"] in ("bpe", "llama"):
        # transformers gives a token that the file lacks the next id, which is our MASK
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "mask_token": "<|mask|>"}
        texts["tokenizer_config.json"] = json.dumps(settings, indent=1)
    config = {
        "architectures": ["NanoMDLMForMaskedLM"], "model_type": "nanomdlm", "dtype": "float32",
        "auto_map": {
            "AutoConfig": f"{CODE}.NanoMDLMConfig", "AutoModelForMaskedLM": f"{CODE}.NanoMDLMForMaskedLM"
        },
        "vocab_size": cfg.vocab_size + 1, "mask_token_id": cfg.mask_id, "tie_word_embeddings": False,
        "nanomdlm": dict(config=asdict(cfg), tokenizer=spec, step=step, best=best),
    }  # fmt: skip
    texts["config.json"] = json.dumps(config, indent=1)
    out.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        (out / file).write_text(text, "utf-8")
    weights = {f"model.{name}": tensor for name, tensor in state["ema" if ema else "model"].items()}
    save_file(weights, out / FILES[0], metadata={"format": "pt"})


CODE = "modeling_nanomdlm"


def push(out, name):
    try:
        from huggingface_hub import HfApi

        HfApi().create_repo(name, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=out)
    except Exception as e:  # not logged in, no network, a bad name: each of another type
        fail(f"--push {name}: {named(e)}; {out} is complete")


# ---------------------------------------------------------------------------------------------------------


def main(argv=None):
    p = parser(__doc__)
    p.add_argument("source", help="file, folder, id on the hub, or ID:FILE")
    p.add_argument("out", help="a checkpoint, if it ends in .pt, else a folder in the hub's layout")
    p.add_argument(
        "--loss", choices=LOSSES, help="of a source that does not tell; default: mdlm, or ar"
    )
    p.add_argument(
        "--vocab", metavar="FILE", help="BERT's vocab.txt, Llama's tokenizer.json; else the hub's"
    )
    p.add_argument(
        "--no_ema", action="store_true", help="folder: the raw weights (a checkpoint has both)"
    )
    p.add_argument("--push", metavar="ID", help="folder: upload it as this model")
    p.add_argument("--overwrite", action="store_true", help="replace OUT")
    args = p.parse_args(argv)
    out = Path(args.out)
    if out.suffix == ".pt" and (args.push or args.no_ema):
        fail(f"{out}: --push and --no_ema are for a folder")
    if not args.overwrite and (out.is_file() or out.is_dir() and any(out.iterdir())):
        fail(f"{out}: exists; add --overwrite to replace it")
    try:
        state, cfg = read(args.source, args.loss, args.vocab)
        if out.suffix == ".pt":
            out.parent.mkdir(parents=True, exist_ok=True)
            save_checkpoint(out, **state, optimizer=[], data="")
        else:
            write_folder(out, state, cfg, args.push or out.name, not args.no_ema)
    except (OSError, ValueError) as e:  # of OUT
        fail(one_line(e))
    if args.push:
        push(out, args.push)
    print(
        f"{out}: {count_parameters(cfg):,} parameters, loss={cfg.loss}, vocab_size={cfg.vocab_size}, "
        f"seq_len={cfg.seq_len}, tokenizer {state['tokenizer']['kind']}, step {state['step']:,}"
        + ("" if state["model"] is state["ema"] else ", with EMA")
    )


if __name__ == "__main__":
    main()
