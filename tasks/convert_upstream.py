"""Other projects' checkpoints as ours, for `tasks.convert`. What a file holds tells its layout:

MDLM's Lightning file   tensors "backbone...." in state_dict; ema, a list in the order of
                        parameters(); configuration and tokenizer, pickled, in hyper_parameters;
                        backbone=dimamba: tensors "backbone.model.bimamba....", see `from_dimamba`
MDLM's hub model        tensors "backbone....", a flat config.json
SEDD                    plain tensors, a nested config.json; those of a run are in model, beside
                        ema and step
nanoDD                  tensors "net...." in model, "ema_model.net...." in ema; model_args
SMDM                    tensors "transformer.h....", alone; those of a run are in model, beside
                        step_count

BD3-LM and Duo write MDLM's layout too, with models that are not masked diffusion: see `check_kind`.
"""

import math
import re
from dataclasses import asdict, fields, replace

import torch

from common import fail
from configs import SMDM_SIZES, Config, owt_mdlm, smdm, text8_d3pm
from data.tokenizer import bert_vocabulary, llama_vocabulary, tokenizer_of
from model import DiT

FIELDS = {  # theirs: ours
    "model.length": "seq_len", "model.n_heads": "n_head", "model.dropout": "dropout", "T": "T",
    "time_conditioning": "time_cond", "noise.type": "schedule", "parameterization": "loss",
    "data.train": "data", "model_length": "seq_len", "n_heads": "n_head", "dropout": "dropout",
    "model_args.n_heads": "n_head", "model_args.dropout": "dropout", "model_args.T": "T",
    "model_args.lambda_ce": "aux_ce", "training_args.seq_len": "seq_len",
    "training_args.dataset": "data", "algo.T": "T", "algo.time_conditioning": "time_cond",
    "algo.parameterization": "loss", "algo.ignore_bos": "bos",
}  # fmt: skip
VALUES = {
    "loglinear": "linear", "log-linear": "linear", "cosinesqr": "cosine2", "linear": "sigma_linear",
    "subs": "mdlm",
}  # fmt: skip
MODULES = {  # our parameter or module: theirs
    "embed.weight": "vocab_embed.embedding", "time.fc1": "sigma_map.mlp.0",
    "time.fc2": "sigma_map.mlp.2", "qkv": "attn_qkv", "mlp_in": "mlp.0", "mlp_out": "mlp.2",
    "ada": "adaLN_modulation", "final_norm": "output_layer.norm_final",
    "final_ada": "output_layer.adaLN_modulation", "head": "output_layer.linear",
}  # fmt: skip
NANODD_MODULES = MODULES | {
    "embed.weight": "vocab_embed.weight", "time.fc1": "c_embed.mlp.0", "time.fc2": "c_embed.mlp.2",
    "final_norm": "norm_final", "final_ada": "adaLN_modulation",
}  # fmt: skip
DIMAMBA = {  # pattern of DiMamba's names: what the tensor is called below
    r"model\.bimamba\.backbone\.embeddings\.word_embeddings\.weight": "vocab_embed.embedding",
    r"model\.bimamba\.backbone\.layers\.(\d+)\.norm\.": r"blocks.\1.norm1.",
    r"model\.bimamba\.backbone\.layers\.(\d+)\.adaLN": r"blocks.\1.adaLN",
    r"model\.bimamba\.backbone\.layers\.(\d+)\.mixer\.mamba_fwd\.in_proj": r"blocks.\1.in_proj",
    r"model\.bimamba\.backbone\.layers\.(\d+)\.mixer\.mamba_fwd\.out_proj": r"blocks.\1.mix_out",
    r"model\.bimamba\.backbone\.layers\.(\d+)\.mixer\.mamba_fwd": r"blocks.\1.forward_pass",
    r"model\.bimamba\.backbone\.layers\.(\d+)\.mixer\.mamba_rev": r"blocks.\1.backward_pass",
    r"dt_proj\.bias": "dt_bias",
    r"model\.bimamba\.backbone\.norm_f\.": "output_layer.norm_final.",
    r"model\.bimamba\.backbone\.adaLN_modulation_final\.": "output_layer.adaLN_modulation.",
    r"model\.lm_head\.": "output_layer.linear.",
}
NOT_WEIGHTS = {
    "rotary_emb.inv_freq", "betas", "alpha_bars", "initted", "step",
    "sampling_eps_min", "sampling_eps_max",
}  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PRIVATE = "".join(map(chr, range(0xE000, 0xE008)))  # [CLS] [SEP] [BOS] [EOS] [MASK] ...: no text
TOKENIZERS = {  # rows of upstream's embedding: (spec, id of MASK)
    50258: ({"kind": "gpt2"}, 50257),
    30522: ({"kind": "wordpiece"}, 103),  # bert-base-uncased
    35: ({"kind": "char", "characters": PRIVATE + LETTERS + " "}, 4),  # MDLM's text8
    28: ({"kind": "char", "characters": " " + LETTERS}, 27),  # nanoDD's
}
UNIFORM = "uniform-state diffusion has no MASK"
OTHER_MODELS = {"duo": UNIFORM, "udlm": UNIFORM}  # model_type in small letters: why it is refused


def from_upstream(path, data, config, loss=None, tokenizer=None):
    """What `convert.read` returns of what another project wrote. config: the configuration beside
    the file; tokenizer: of --tokenizer, as `read_tokenizer` returns it."""
    hyper = data.get("hyper_parameters", {})
    args = {name: data[name] for name in ("model_args", "training_args") if name in data}
    settings = flatten(config) | flatten(args) | flatten(hyper.get("config", {}))
    weights = strip_prefixes(data.get("state_dict", data.get("model", data)))
    if any(name.startswith("model.bimamba.") for name in weights):
        weights = from_dimamba(path, weights, settings)
    if "transformer.wte.weight" in weights:
        return from_smdm(path, weights, int(data.get("step_count", 0)), loss, tokenizer)
    words = (getattr(hyper.get("tokenizer"), "state", None) or {}).get("vocab")  # BERT's
    sedd = "graph.type" in settings or "model" in data and not args
    cfg, spec, mask = describe(path, weights, settings, sedd, loss, tokenizer, words)

    ours = averaged = translate(weights, cfg, mask, path)
    if ema := data.get("ema"):
        averaged = translate(name_averages(ema, weights, path), cfg, mask, f"{path}: ema")
    step = int(data.get("global_step", data.get("iter_num", data.get("step", 0))))
    return make_state(ours, averaged, step, cfg, spec)


def make_state(ours, averaged, step, cfg, spec):
    state = dict(model=ours, ema=averaged, step=step, best=math.inf, seconds=0.0)
    return state | dict(config=asdict(cfg), tokenizer=spec)


def flatten(node, prefix=""):
    """A nested configuration as {"model.length": 1024, ...}. OmegaConf's stand-ins hold in their
    state the _content of a container or the _val of a leaf."""
    if isinstance(state := getattr(node, "state", None), dict):
        node = state.get("_content", state.get("_val"))
    if not isinstance(node, dict):
        return {prefix.removesuffix("."): node}
    items = [flatten(child, f"{prefix}{key}.") for key, child in node.items()]
    return {name: value for item in items for name, value in item.items()}


def strip_prefixes(weights):
    """Tensors without the prefixes of the modules that wrap the network."""
    wrapping = re.compile(r"^(ema_model\.)?(backbone\.|net\.)?")
    inner = {wrapping.sub("", name): tensor for name, tensor in weights.items()}
    if len(inner) < len(weights):
        raise ValueError("some tensors are there twice, with a prefix and without")
    return inner


def from_dimamba(path, weights, settings):
    """DiMamba's tensors by the names of MDLM's DiT where it has them, else by ours. Its two
    directions share their projections, which parameters() and so the average have once."""
    for name, only in {"model.temb_strategy": "adaln", "model.tie_word_embeddings": False}.items():
        if (value := settings.get(name, only)) != only:
            fail(f"{path}: {name}={value}: must be {only}")
    found = {}
    for name, tensor in weights.items():
        name = re.sub(r"(mixer\.)mamba_rev(\.(?:in|out)_proj)", r"\1mamba_fwd\2", name)
        for pattern, ours in DIMAMBA.items():
            name = re.sub(pattern, ours, name)
        if name in found and not torch.equal(found[name], tensor):
            fail(f"{path}: {name}: differs between the two directions, which must share it")
        found.setdefault(name, tensor)
    return found


def name_averages(ema, weights, path):
    """The averaged tensors by name. Upstream's list is in the order of parameters(), as `weights`;
    it may be longer, because older noises had a parameter."""
    if "shadow_params" not in ema:
        return strip_prefixes(ema)
    names = [name for name in weights if name not in NOT_WEIGHTS]
    if len(ema["shadow_params"]) < len(names):
        count = len(ema["shadow_params"])
        fail(f"{path}: ema: {count} tensors, but the network has {len(names)}")
    return dict(zip(names, ema["shadow_params"]))


# --------------------------------------------------------------------------------------------------
# The Config


def describe(path, weights, settings, sedd, loss=None, tokenizer=None, words=None):
    """(Config, tokenizer's spec, upstream's id of MASK) by the tensors' shapes and the settings."""
    nanodd = "vocab_embed.weight" in weights
    embed = weights.get("vocab_embed.weight" if nanodd else "vocab_embed.embedding")
    if getattr(embed, "ndim", 0) != 2:
        names = list_names(weights)
        fail(f"{path}: not MDLM's, SEDD's, nanoDD's or SMDM's: has no embedding, but {names}")
    rows, width = embed.shape
    clock = weights.get("c_embed.mlp.0.bias" if nanodd else "sigma_map.mlp.0.bias")
    check_kind(path, settings, clock is not None)
    if sedd and rows == settings.get("tokens", 50257):
        fail(f"{path}: an embedding of {rows} rows: graph.type=uniform, without a MASK")
    spec, mask = choose_tokenizer(path, rows, tokenizer, words)

    known = dict(seq_len=256, data="text8") if nanodd else dict(seq_len=1024, data="openwebtext")
    known["loss"] = "d3pm" if nanodd else "sedd" if sedd else "ar" if clock is None else "mdlm"
    for theirs, ours in FIELDS.items():
        if (value := settings.get(theirs)) is not None:
            known[ours] = VALUES.get(value, value) if isinstance(value, str) else value
    known["loss"] = loss or known["loss"]
    known["time_cond"] = sedd or nanodd or known.get("time_cond", known["loss"] == "sedd")
    if not (sedd or nanodd) and known["data"].startswith("openwebtext"):
        known["data"] = f"openwebtext_wrap{known['seq_len']}"
    if known["loss"] == "d3pm" and not nanodd:
        known |= dict(zero_masking=bool(settings.get("subs_masking")), carry_over=False)
    if known["loss"] == "ar":
        known |= dict(causal=True, bos=True, time_cond=False, T=0)
    if settings.get("model_type") == "bd3lm":
        known["bos"] = True  # its configuration has no ignore_bos, which is True in all its recipes
    check_time(path, settings, known, nanodd)
    known["n_head"] = count_heads(path, weights, width, known.get("n_head"))
    known["n_layer"] = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    known |= dict(vocab_size=rows - (mask == rows - 1), n_embd=width)
    known["cond_dim"] = 0 if clock is None else len(clock)
    if any(".forward_pass." in name for name in weights):  # its head has no bias
        known |= dict(mixer="mamba", norm="rms", bias=mask < rows - 1)
    types = {f.name: f.type for f in fields(Config)}
    known = {name: types[name](value) for name, value in known.items()}
    return replace(text8_d3pm() if nanodd else owt_mdlm(), **known), spec, mask


def check_kind(path, settings, timed):
    """Refuse by name what the settings call a model that is not masked diffusion. Its tensors may
    look like MDLM's: Duo's have no MASK among them, and block diffusion is in no tensor."""
    get = settings.get
    model, algorithm, graph = get("model_type", "mdlm"), get("algo.name"), get("graph.type")
    length = get("model_length", get("model.length", 1024))
    block, noise = get("block_size", length), get("noise.type", "log-linear")
    causal = get("causal") or get("algo.causal_attention")
    whole = causal or block in (length, "${model.length}")  # as OmegaConf stores a reference
    why = OTHER_MODELS.get(str(model).lower(), "must be mdlm or bd3lm")
    for wrong, message in [
        (model not in ("mdlm", "bd3lm"), f"model_type={model}: {why}"),
        (algorithm not in (None, "mdlm", "bd3lm", "ar"),
         f"algo.name={algorithm}: must be mdlm, ar or bd3lm"),
        (get("diffusion", "absorbing_state") != "absorbing_state",
         f"diffusion={get('diffusion')}: must be absorbing_state"),
        (graph not in (None, "absorb"), f"graph.type={graph}: must be absorb; {UNIFORM}"),
        (not whole, f"block_size={block}: block diffusion; must be the length, {length}, as MDLM"),
        (causal and timed, "causal=True: MDLM's AR networks have no time embedding, this one has"),
        (algorithm and noise not in ("loglinear", "log-linear"),
         f"noise.type={noise}: must be log-linear where algo.name is given"),
    ]:  # fmt: skip
        if wrong:
            fail(f"{path}: {message}")


def check_time(path, settings, known, nanodd):
    """Refuse networks whose time embedding reads something that ours does not."""
    if nanodd and known["T"] != 1000:
        fail(f"{path}: T={known['T']}: the network reads the step n, ours 1000 t: T must be 1000")
    if not known["time_cond"]:
        return
    if known.get("schedule") in ("geometric", "sigma_linear"):
        noise = settings["noise.type"]
        fail(f"{path}: noise.type={noise}: the network reads a sigma(t) that ours does not")
    if settings.get("training.change_of_variables"):
        fail(f"{path}: training.change_of_variables=True: the network reads t, ours sigma(t)")
    if "block_size" in settings:
        fail(f"{path}: time_conditioning=True: BD3-LM's sigma(t) is not that of ours")


def choose_tokenizer(path, rows, given, words):
    """(spec, upstream's id of MASK) for an embedding of so many rows. given: of --tokenizer; words:
    {piece: id} of BERT's tokenizer in the file."""
    if not given and rows not in TOKENIZERS:
        known = ", ".join(map(str, TOKENIZERS))
        fail(
            f"{path}: an embedding of {rows} rows, but upstream's have {known}; "
            "name the vocabulary with --tokenizer"
        )
    spec, mask = given or TOKENIZERS[rows]
    if spec == {"kind": "wordpiece"} and words:
        spec = {**spec, "vocab": "".join(f"{word}\n" for word in sorted(words, key=words.get))}
    elif spec == {"kind": "wordpiece"}:
        spec = bert_vocabulary()
    if spec["kind"] == "wordpiece" or given:
        pieces = tokenizer_of(spec).vocab_size
        mask = pieces if rows == pieces + 1 else mask
        if rows not in (pieces, pieces + 1) or mask is None:
            missing = ", none of them MASK" if rows == pieces else ""
            fail(
                f"{path}: an embedding of {rows} rows, but a vocabulary of {pieces} pieces{missing}"
            )
    return spec, mask


def count_heads(path, weights, width, n_head=None):
    """The number of heads: n_head, checked against the rotary frequencies, which are one per two
    dimensions of a head; without both, heads of 64."""
    freq = weights.get("rotary_emb.inv_freq")
    if freq is None:
        return n_head or max(width // 64, 1)
    half = len(freq)
    expected = 10_000 ** (-torch.arange(half) / half)
    if not torch.allclose(freq.float(), expected, rtol=1e-2, atol=0):
        fail(f"{path}: rotary_emb.inv_freq: not of base 10000")
    n_head = n_head or width // (2 * half)
    if n_head * 2 * half != width:
        fail(f"{path}: n_heads={n_head}, but rotary_emb.inv_freq is of heads of {2 * half}")
    return n_head


# --------------------------------------------------------------------------------------------------
# The tensors


def list_names(names, limit=8):
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def check_tensors(weights, shapes, where):
    """Upstream's tensors must be those of `shapes`, {name: shape}; a refusal has the names."""
    if unknown := [name for name in weights if name not in {*shapes, *NOT_WEIGHTS}]:
        fail(f"{where}: unknown: {list_names(unknown)}")
    if missing := [name for name in shapes if name not in weights]:
        fail(f"{where}: missing: {list_names(missing)}")
    wrong = [
        f"{name} {list(weights[name].shape)} instead of {shape}"
        for name, shape in shapes.items()
        if list(weights[name].shape) != shape or not weights[name].is_floating_point()
    ]
    if wrong:
        fail(f"{where}: of another shape or type: {list_names(wrong)}")


def translate(weights, cfg, mask, where):
    """Upstream's tensors as ours, float32, or a refusal by name.

    MASK as the last row of upstream's embedding is where ours is, and only loses its output. A MASK
    further in front keeps its id, which no text has and which is never predicted; a copy of its row
    becomes our MASK."""
    with torch.device("meta"):
        shapes = {name: list(p.shape) for name, p in DiT(cfg).state_dict().items()}
    inside = mask < cfg.vocab_size
    if cfg.mixer == "mamba":
        weights = {n: w.flatten() if n.endswith("A_log") else w for n, w in weights.items()}
        if inside:  # the bias that keeps MASK from being predicted
            weights["output_layer.linear.bias"] = torch.zeros(cfg.vocab_size)
    for name in {"embed.weight", "head.weight", "head.bias"} & shapes.keys():
        shapes[name][0] = cfg.vocab_size + (not inside)
    table, theirs = NANODD_MODULES if cfg.tied else MODULES, {}
    for name in shapes:
        parts = re.fullmatch(r"(blocks\.\d+\.|)(.+?)(\.weight|\.bias|)", name)
        block, module, kind = parts.groups()
        theirs[name] = table.get(name) or f"{block}{table.get(module, module)}{kind}"
    check_tensors(weights, {theirs[name]: shape for name, shape in shapes.items()}, where)
    ours = {name: weights[theirs[name]].float() for name in shapes}
    outputs = [name for name in ("head.weight", "head.bias") if name in ours]
    if inside:
        for name in ("embed.weight", *outputs):
            ours[name] = torch.cat((ours[name], ours[name][mask : mask + 1]))
        ours["head.bias"][mask] = -1e9
        if cfg.loss == "sedd":  # ours divides scores by V, upstream by the V - 1 that are not MASK
            ours["head.bias"] += math.log(cfg.vocab_size / (cfg.vocab_size - 1))
    for name in outputs:
        ours[name] = ours[name][: cfg.vocab_size + (not cfg.zero_masking)]
    # of its own memory each: a tensor may be a strided view of another one
    return {k: v.clone(memory_format=torch.contiguous_format) for k, v in ours.items()}


# --------------------------------------------------------------------------------------------------
# SMDM


def from_smdm(path, weights, step, loss=None, tokenizer=None):
    """What `convert.read` returns of SMDM's tensors: masked diffusion if the embedding has a row
    for MASK, else AR. The number of heads is that of the size in SMDM's table: no tensor has it.

    Upstream always rounds its rotary cos and sin to bfloat16, we only under autocast to it. In
    float32 nothing else differs: logits of untrained weights by up to 2e-3, of those in
    tests/commands/test_convert.py by 1e-3, of sharp attention by more."""
    spec = tokenizer[0] if tokenizer else None
    V = tokenizer_of(spec).vocab_size if spec else 32000
    rows, d = weights["transformer.wte.weight"].shape
    if rows not in (V, V + 1):
        fail(f"{path}: an embedding of {rows} rows, but SMDM's have {V + 1}, or {V} if AR")
    n_layer = len({name.split(".")[2] for name in weights if name.startswith("transformer.h.")})
    sizes = [size for size, (n, _, width) in SMDM_SIZES.items() if (n, width) == (n_layer, d)]
    if not sizes:
        fail(
            f"{path}: {n_layer} layers of width {d}: none of SMDM's sizes, and no tensor has the "
            "number of heads"
        )
    cfg = replace(smdm(sizes[0], ar=rows == V), vocab_size=V)
    if loss not in (None, cfg.loss):
        fail(f"{path}: --loss {loss}: an embedding of {rows} rows is for loss={cfg.loss}")
    ours = translate_smdm(weights, cfg, rows, path)
    spec = spec or llama_vocabulary()
    if (pieces := tokenizer_of(spec).vocab_size) != V:
        fail(f"{path}: {V} tokens, but a vocabulary of {pieces}")
    return make_state(ours, ours, step, cfg, spec)


def translate_smdm(weights, cfg, rows, path):
    """SMDM's tensors as ours. An AR network gets a row of zeros for MASK, which it never reads:
    with bos=True its first token is given."""
    V, d, f, H = cfg.vocab_size, cfg.n_embd, cfg.mlp_width, cfg.n_head
    block = {
        "norm_1": [d], "norm_2": [d], "attn.attn": [3 * d, d], "attn.proj": [d, d],
        "mlp.swiglu.w1": [f, d], "mlp.swiglu.w2": [f, d], "mlp.swiglu.w3": [d, f],
    }  # fmt: skip
    shapes = {"transformer.wte": [rows, d], "transformer.ln_f": [d], "lm_head": [V, d]}
    for i in range(cfg.n_layer):
        shapes |= {f"transformer.h.{i}.{name}": shape for name, shape in block.items()}
    check_tensors(weights, {f"{name}.weight": shape for name, shape in shapes.items()}, path)

    w = lambda name: weights[f"{name}.weight"].float()
    ours = {"embed": torch.cat((w("transformer.wte"), torch.zeros(V + 1 - rows, d)))}
    ours |= {"final_norm": w("transformer.ln_f"), "head": w("lm_head")}
    for i in range(cfg.n_layer):
        a, b = f"blocks.{i}.", f"transformer.h.{i}."
        qkv = w(b + "attn.attn").reshape(H, 3, d // H, d).transpose(0, 1)  # q, k, v head by head
        gate_up = torch.cat((w(b + "mlp.swiglu.w1"), w(b + "mlp.swiglu.w2")))
        ours |= {a + "qkv": qkv.reshape(3 * d, d), a + "attn_out": w(b + "attn.proj")}
        ours |= {a + "mlp_in": gate_up, a + "mlp_out": w(b + "mlp.swiglu.w3")}
        ours |= {a + "norm1": w(b + "norm_1"), a + "norm2": w(b + "norm_2")}
    return {f"{name}.weight": tensor.clone() for name, tensor in ours.items()}
