"""Files in other projects' exact layouts, of random weights, against what their
own networks answered."""

import contextlib
import functools
import importlib
import json
import math
import os
import pickle
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict, defaultdict
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from configs import Config
from data.checkpoints import load, read_checkpoint, save_checkpoint
from data.tokenizer import load_tokenizer
from model import DiT
from tasks import convert, convert_hub, convert_tokenizer, convert_upstream

# --------------------------------------------------------------------------------------------------
# Upstream's networks: width 16, 2 blocks, 2 heads, cond_dim 8, with the weights of `recipe`.
# ANSWERS were recorded once from the projects' own classes with these weights (strict=True), on a
# CPU in float32, with flash_attn's two functions replaced by what they compute. `shapes` has the
# names and the order of parameters().
#   mdlm, timed   models/dit.py DIT, logits at sigma = 0, sigma(t)   kuleshov-group/mdlm c112c526
#   ar            models/autoregressive.py AR, log p                 kuleshov-group/mdlm c112c526
#   sedd_hub      model/transformer.py SEDD, log score at sigma(t)   louaaron's SEDD 0605786d
#   nanodd        dit.py DiT, logits at 1000 t                       flukeskywalker/nanoDD b656fc6f
# "name rows": for the raw weights and for the EMA, of row 1 of ids(rows), positions 2 and 8,
# outputs `shown`.

D, COND, LAYERS, HEADS = 16, 8, 2, 2


def shapes(rows, kind="dit"):
    """{name: shape} of a network in the order of its parameters()."""
    if kind == "smdm":
        tensors = {"lm_head.weight": (32000, D), "transformer.wte.weight": (rows, D)}
        for i in range(LAYERS):
            b, mlp = f"transformer.h.{i}.", f"transformer.h.{i}.mlp.swiglu."
            tensors |= {b + "norm_1.weight": (D,), b + "attn.attn.weight": (3 * D, D)}
            tensors |= {b + "attn.proj.weight": (D, D), b + "norm_2.weight": (D,)}
            tensors |= {
                mlp + "w1.weight": (4 * D, D),
                mlp + "w2.weight": (4 * D, D),
                mlp + "w3.weight": (D, 4 * D),
            }
        return tensors | {"transformer.ln_f.weight": (D,)}
    linear = lambda name, n, m: {f"{name}.weight": (n, m), f"{name}.bias": (n,)}
    embed, clock, last = "vocab_embed.embedding", "sigma_map", "output_layer."
    if kind == "nanodd":
        embed, clock, last = "vocab_embed.weight", "c_embed", ""
    tensors = {embed: (rows, D)}
    if kind != "ar":
        tensors |= linear(f"{clock}.mlp.0", COND, 256) | linear(f"{clock}.mlp.2", COND, COND)
    for i in range(LAYERS):
        b = f"blocks.{i}."
        tensors |= {
            b + "norm1.weight": (D,),
            b + "attn_qkv.weight": (3 * D, D),
            b + "attn_out.weight": (D, D),
        }
        tensors |= (
            {b + "norm2.weight": (D,)}
            | linear(b + "mlp.0", 4 * D, D)
            | linear(b + "mlp.2", D, 4 * D)
        )
        tensors |= linear(b + "adaLN_modulation", 6 * D, COND) if kind != "ar" else {}
    tensors |= {last + "norm_final.weight": (D,)}
    tensors |= linear(last + "linear", rows, D) if kind != "nanodd" else {}
    return tensors | (linear(last + "adaLN_modulation", 2 * D, COND) if kind != "ar" else {})


def recipe(rows, kind="dit", seed=0):
    """Weights far from the initial ones, so that every tensor matters: uniform, from Philox."""
    weights = {}
    for i, (name, shape) in enumerate(shapes(rows, kind).items()):
        u = np.random.Generator(np.random.Philox(key=[seed, i])).random(shape)
        embedding = "wte" in name or "embed" in name and "mlp" not in name
        scale = 1.0 if embedding else 0.25 if kind == "smdm" else 0.4
        u = 0.5 + u if "norm" in name or "ln_f" in name else (2 * u - 1) * scale
        weights[name] = torch.from_numpy(u.astype(np.float32))
    return weights


def with_buffer(weights, prefix=""):
    """As a state_dict: with the buffer of rotary frequencies where upstream's modules have it."""
    freq = 1 / 10_000 ** (torch.arange(0, D // HEADS, 2).float() / (D // HEADS))
    items = list(weights.items())
    at = next(i for i, (name, _) in enumerate(items) if name.startswith("blocks."))
    items.insert(at, ("rotary_emb.inv_freq", freq))
    return OrderedDict((prefix + name, tensor) for name, tensor in items)


MASK = {50258: 50257, 30522: 103, 35: 4, 28: 27}  # by rows of the embedding
T_UP = torch.tensor([0.25, 0.7])


def ids(rows):
    """(2, 12) ids, a third of them MASK, positions 2 and 8 of row 1 too."""
    x = torch.from_numpy(
        np.random.Generator(np.random.Philox(key=[9, 9])).integers(5, rows - 1, (2, 12))
    )
    x[x == MASK[rows]] += 1
    return x.index_fill(1, torch.tensor([0, 2, 8, 11]), MASK[rows])


def sigma(t):
    return -torch.log1p(-(1 - 1e-3) * t)


def shown(rows):
    """Outputs to compare: across the vocabulary, both ends of it, never MASK."""
    return [v for v in (0, 5, 11, rows // 2, rows - 3, rows - 1) if v != MASK[rows]]


ANSWERS = {
    "mdlm 50258": [
        [[0.03787, 0.85254, 0.34400, -1.62006, 0.39681],
         [0.07129, 0.85286, 0.33237, -1.66247, 0.39419]],
        [[-2.02757, -1.25307, -1.96788, 3.54706, -1.39273],
         [-2.49843, -2.00082, -2.24488, 3.53033, -1.85437]],
    ],
    "mdlm 35": [
        [[0.58844, -1.39528, -0.34183, 0.44297, -0.28301, -1.54162],
         [0.55058, -1.44317, -0.26693, 0.62315, -0.30227, -1.40526]],
        [[-1.50415, -0.98690, -2.45250, 3.82269, -1.69192, -1.49731],
         [-1.62775, -1.01373, -2.52746, 3.78718, -1.70890, -1.70518]],
    ],
    "timed 50258": [
        [[-0.35363, 0.72593, 0.61788, -1.47026, 0.76772],
         [-0.34730, 0.73805, 0.60702, -1.48937, 0.77317]],
        [[-1.96905, -1.44117, -1.68369, 3.80094, -1.31074],
         [-2.24483, -1.88409, -1.87468, 3.83826, -1.60651]],
    ],
    "timed 30522": [
        [[0.25422, 0.09375, 0.98677, 0.93564, -0.99344, -1.95010],
         [0.26319, 0.29151, 1.08710, 1.09152, -1.27253, -1.98255]],
        [[-1.28733, -1.89997, -1.03345, -4.70389, -1.48999, -0.50479],
         [-1.38406, -1.72521, -2.45301, -3.34773, 1.24214, -0.71121]],
    ],
    "timed 35": [
        [[0.29524, -1.37001, -0.41051, 0.63296, -0.69315, -1.46875],
         [0.26059, -1.40052, -0.36851, 0.71877, -0.71652, -1.39237]],
        [[-1.78934, -1.06442, -2.46312, 3.52251, -2.05522, -0.86878],
         [-1.78730, -0.77489, -2.67954, 3.93417, -1.74401, -1.09638]],
    ],
    "ar 50258": [
        [[-11.79841, -10.05579, -12.58461, -11.09689, -13.69794],
         [-11.26925, -10.24910, -12.32223, -10.95442, -13.78996]],
        [[-12.60766, -11.71231, -12.78236, -12.00732, -9.98160],
         [-11.45283, -11.49089, -12.56109, -12.01233, -9.66672]],
    ],
    "ar 30522": [
        [[-11.72814, -10.25074, -11.69503, -12.93943, -13.13034, -10.02548],
         [-10.75270, -10.33439, -12.03971, -12.19464, -12.24507, -9.39117]],
        [[-11.43214, -11.24064, -10.94825, -10.72280, -10.02512, -10.83036],
         [-11.69335, -10.89927, -12.04551, -11.04918, -9.98309, -11.54965]],
    ],
    "sedd_hub 50258": [
        [[-12.02250, -10.94294, -11.05099, -13.13914, -10.90116],
         [-12.01618, -10.93083, -11.06186, -13.15824, -10.89571]],
        [[-13.63792, -13.11004, -13.35256, -7.86793, -12.97961],
         [-13.91370, -13.55297, -13.54355, -7.83061, -13.27539]],
    ],
    "nanodd 28": [
        [[-2.41375, -2.23854, -1.14337, -0.58828, 0.55338],
         [-2.39711, -2.23981, -1.10696, -0.64068, 0.64696]],
        [[-2.67416, 3.90976, -2.27568, -5.45235, 1.55665],
         [-2.59044, 3.85780, -2.07335, -5.42791, 1.64534]],
    ],
}  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Their files


@contextlib.contextmanager
def foreign(*names):
    """Classes "module.Name" that can be pickled inside and are not to be found outside."""
    made, before = {}, dict(sys.modules)
    for full in names:
        module, name = full.rsplit(".", 1)
        parts = module.split(".")
        for i in range(len(parts)):
            sys.modules[".".join(parts[: i + 1])] = types.ModuleType(".".join(parts[: i + 1]))
    for full in names:
        module, name = full.rsplit(".", 1)
        made[name] = type(name, (), {"__module__": module})
        setattr(sys.modules[module], name, made[name])
    try:
        yield types.SimpleNamespace(**made)
    finally:
        for name in set(sys.modules) - set(before):
            del sys.modules[name]
        sys.modules.update(before)


def omegaconf(classes, value, parent=None):
    """A nested dict as OmegaConf's objects, with the attributes that they pickle."""
    node = classes.DictConfig() if isinstance(value, dict) else classes.AnyNode()
    meta = classes.ContainerMetadata() if isinstance(value, dict) else classes.Metadata()
    meta.__dict__ |= dict(ref_type=object, object_type=dict, optional=True, key=None, flags={})
    meta.__dict__ |= dict(flags_root=False, resolver_cache=defaultdict(dict))
    node.__dict__ |= dict(_metadata=meta, _parent=parent)
    if isinstance(value, dict):
        node._content = {k: omegaconf(classes, v, node) for k, v in value.items()}
    else:
        node._val = value
    return node


HYDRA = {
    "backbone": "dit", "parameterization": "subs", "time_conditioning": False, "T": 0,
    "subs_masking": False,
    "noise": {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20},
    "model": {"name": "small", "length": 32, "n_heads": HEADS, "dropout": 0.1, "hidden_size": D},
    "data": {"train": "openwebtext-train", "tokenizer_name_or_path": "gpt2"},
    "training": {"ema": 0.9999, "change_of_variables": False},
    "trainer": {"max_steps": 1_000_000, "devices": "${device_count:}"},
}  # fmt: skip


def lightning(path, rows, kind="dit", vocab=None, extra=(), edit=None, **config):
    """A .ckpt as Lightning and MDLM's hooks write it."""
    raw, ema = recipe(rows, kind), recipe(rows, kind, seed=1)
    om, base = "omegaconf.dictconfig.DictConfig", "omegaconf.base."
    names = [om, "omegaconf.nodes.AnyNode", base + "Metadata", base + "ContainerMetadata"]
    names += ["transformers.models.gpt2.tokenization_gpt2_fast.GPT2TokenizerFast"]
    names += ["tokenizers.Tokenizer", "tokenizers.AddedToken", "functools_.partial"]
    with foreign(*names) as classes:
        classes.Tokenizer.__getstate__ = lambda self: b'{"version": "1.0"}'
        classes.Tokenizer.__setstate__ = lambda self, state: None
        tokenizer = classes.GPT2TokenizerFast()
        tokenizer.__dict__ |= dict(
            _tokenizer=classes.Tokenizer(), _eos_token=classes.AddedToken(), never_split={"a", "b"}
        )
        if vocab:
            tokenizer.vocab = OrderedDict((token, i) for i, token in enumerate(vocab))
        ckpt = {
            "epoch": 0, "global_step": 4321, "pytorch-lightning_version": "2.2.1",
            "state_dict": with_buffer(raw, "backbone."),
            "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"done": 0}}}},
            "callbacks": {"ModelCheckpoint{'monitor': None}": {
                "best_k_models": {}, "score": torch.ones(())}},
            "optimizer_states": [{"state": {0: {
                "step": torch.ones(()), "exp_avg": torch.ones(3)}}}],
            "lr_schedulers": [{"last_epoch": 4321, "lr_lambdas": [{}]}],
            "hparams_name": "kwargs",
            "hyper_parameters": {
                "config": omegaconf(classes, HYDRA | config), "tokenizer": tokenizer},
            "ema": {"decay": 0.9999, "num_updates": 4321, "shadow_params": [*ema.values(), *extra]},
            "sampler": {"random_state": None},
        }  # fmt: skip
        if edit:
            edit(ckpt)
        torch.save(ckpt, path)
    return path


def hub_mdlm(folder, weights=None, **config):
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    known = dict(model_type="mdlm", vocab_size=50258, model_length=24, hidden_dim=D, cond_dim=COND)
    known |= dict(n_blocks=LAYERS, n_heads=HEADS, dropout=0.1, time_conditioning=False)
    (folder / "config.json").write_text(json.dumps(known | config))
    weights = with_buffer(recipe(50258), "backbone.") if weights is None else weights
    save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


SEDD = {
    "ngpus": 8, "tokens": 50257, "training": {"batch_size": 512, "ema": 0.9999},
    "graph": {"type": "absorb"}, "data": {"train": "openwebtext", "valid": "wikitext103"},
    "noise": {"type": "loglinear"}, "model": {
        "name": "small", "hidden_size": D, "length": 40, "n_heads": HEADS, "dropout": 0.1},
}  # fmt: skip


def hub_sedd(folder, rows=50258, **config):
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SEDD | config))
    save_file(dict(with_buffer(recipe(rows))), folder / "model.safetensors")
    return folder


def run_sedd(folder):
    """A run's folder: Hydra's configuration and the checkpoint to resume from."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(json.dumps(SEDD))  # YAML has JSON in it
    (folder / "checkpoints-meta").mkdir()
    ema = {
        "decay": 0.9999,
        "num_updates": 70,
        "shadow_params": list(recipe(50258, seed=1).values()),
    }
    state = {
        "optimizer": {"state": {}, "param_groups": [{"lr": 3e-4, "betas": (0.9, 0.999)}]},
        "ema": ema,
    }
    state |= {"model": with_buffer(recipe(50258)), "step": 70}
    torch.save(state, folder / "checkpoints-meta" / "checkpoint.pth")
    return folder


def file_nanodd(path, T=1000):
    betas, alphas = torch.zeros(T + 1), torch.linspace(1, 0, T + 1)
    state = lambda seed: (
        {"betas": betas, "alpha_bars": alphas} | with_buffer(recipe(28, "nanodd", seed), "net.")
    )
    args = dict(
        vocab_size=27,
        n_embed=D,
        n_heads=HEADS,
        n_blocks=LAYERS,
        n_cond=COND,
        dropout=0.025,
        T=T,
        lambda_ce=0.05,
    )
    ema = {"initted": torch.tensor(True), "step": torch.tensor(77)}
    ema |= {f"ema_model.{name}": tensor for name, tensor in state(1).items()}
    ckpt = {
        "model": OrderedDict(state(0)),
        "ema": OrderedDict(ema),
        "optimizer": {"state": {}, "param_groups": []},
    }
    ckpt |= dict(
        model_cls="D3PMAbsorbing", model_args=args, training_args={"batch_size": 256}, iter_num=77
    )
    torch.save(ckpt | dict(total_batch_size=1024, best_val_loss=1.3), path)
    return path


# --------------------------------------------------------------------------------------------------


def run(*args):
    convert.main([str(a) for a in args])


def refused(capsys, *args):
    """The one line with which these arguments are refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        run(*args)
    out, err = capsys.readouterr()
    assert e.value.code == 2 and not out and err.count("\n") == 1 and err.startswith("error: "), err
    return err


BERT = [f"[unused{i}]" if 0 < i < 99 else f"piece{i}" for i in range(30522)]
for i, token in {
    0: "[PAD]",
    100: "[UNK]",
    101: "[CLS]",
    102: "[SEP]",
    103: "[MASK]",
    1037: "a",
}.items():
    BERT[i] = token
TEXT8 = dict(data={"train": "text8"}, model=HYDRA["model"] | {"length": 16})
LM1B = dict(data={"train": "lm1b"}, T=1000, time_conditioning=True, parameterization="d3pm")
SCORES = dict(parameterization="sedd", time_conditioning=True)
WORDS = dict(parameterization="ar", backbone="ar", model=HYDRA["model"] | {"causal": True})

LAYOUTS = {  # name: (SOURCE, key of ANSWERS, fields of our Config)
    "mdlm_hub": (hub_mdlm, "mdlm 50258", dict(
        loss="mdlm", seq_len=24, data="openwebtext_wrap24", time_cond=False, n_head=2,
        vocab_size=50257)),
    "subs": (lambda p: lightning(p, 35, **TEXT8), "mdlm 35", dict(
        loss="mdlm", seq_len=16, data="text8", dropout=0.1, vocab_size=35, T=0)),
    "subs_1000": (
        lambda p: lightning(p, 50258, T=1000, noise={"type": "cosinesqr"}), "mdlm 50258", dict(
            loss="mdlm", T=1000, schedule="cosine2", data="openwebtext_wrap32")),
    "d3pm": (lambda p: lightning(p, 30522, vocab=BERT, **LM1B), "timed 30522", dict(
        loss="d3pm", T=1000, time_cond=True, zero_masking=False, carry_over=False,
        vocab_size=30522, data="lm1b")),
    "d3pm_subs": (
        lambda p: lightning(p, 30522, vocab=BERT, **LM1B, subs_masking=True), "timed 30522", dict(
            zero_masking=True, carry_over=False)),
    "sedd": (lambda p: lightning(p, 50258, **SCORES), "timed 50258", dict(
        loss="sedd", time_cond=True)),
    "sedd_text8": (lambda p: lightning(p, 35, **SCORES), "timed 35", dict(
        loss="sedd", vocab_size=35)),
    "ar": (lambda p: lightning(p, 50258, "ar", **WORDS), "ar 50258", dict(
        loss="ar", causal=True, bos=True, cond_dim=0)),
    "ar_bert": (lambda p: lightning(p, 30522, "ar", vocab=BERT, **WORDS), "ar 30522", dict(
        loss="ar")),
    "sedd_hub": (hub_sedd, "sedd_hub 50258", dict(
        loss="sedd", time_cond=True, seq_len=40, data="openwebtext", dropout=0.1)),
    "sedd_run": (run_sedd, "sedd_hub 50258", dict(
        loss="sedd", time_cond=True, seq_len=40)),
    "nanodd": (file_nanodd, "nanodd 28", dict(
        loss="d3pm", T=1000, aux_ce=0.05, tied=True, time_input="step", time_cond=True,
        seq_len=256, data="text8", zero_masking=True, carry_over=True, vocab_size=27)),
}  # fmt: skip


def answers(model, cfg, key):
    """Our model on the same ids, as upstream's class would put it: (2, outputs shown)."""
    rows = int(key.split()[1])
    x = ids(rows)
    x = x.masked_fill(x == MASK[rows], cfg.mask_id)
    y = model(x, T_UP)[1]  # (L, V)
    positions = torch.tensor([2, 8])
    if cfg.loss == "ar":  # upstream's output j is about token j + 1
        y, positions = y.log_softmax(-1), positions + 1
    if key.startswith("sedd_hub"):
        y = y - torch.log(torch.expm1(sigma(T_UP[1]))) - math.log(cfg.vocab_size)
    if (
        cfg.loss == "sedd" and cfg.vocab_size == rows
    ):  # SEDD counts rows - 1 real tokens, our scale V of them
        y = y - math.log(cfg.vocab_size / (rows - 1))
    return y[positions][:, shown(rows)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_gives_upstreams_logits(name, tmp_path):
    build, key, known = LAYOUTS[name]
    run(build(tmp_path / "source"), tmp_path / "out" / "ckpt.pt")
    for ema in (False, True):
        model, cfg = load(tmp_path / "out", ema=ema)  # a folder with ckpt.pt in it
        seed = int(ema and not name.endswith("_hub"))  # the hub's have one set of weights
        torch.testing.assert_close(
            answers(model, cfg, key), torch.tensor(ANSWERS[key][seed]), atol=1e-4, rtol=0
        )
    assert {field: getattr(cfg, field) for field in known} == known
    assert (cfg.n_layer, cfg.n_head, cfg.n_embd) == (LAYERS, HEADS, D)
    rows = int(key.split()[1])
    vocab = {"vocab": "".join(f"{piece}\n" for piece in BERT)} if rows == 30522 else {}
    assert model.tokenizer == convert_upstream.TOKENIZERS[rows][0] | vocab
    assert model.step == {"sedd_run": 70, "nanodd": 77}.get(
        name, 0 if name.endswith("_hub") else 4321
    )
    if MASK[rows] < rows - 1:  # an id that no text has
        y = model(ids(rows), T_UP)
        assert y[..., : cfg.vocab_size].softmax(-1)[..., MASK[rows]].max() == 0
    if name == "d3pm":  # may answer MASK, with upstream's logit
        assert (y[..., -1] > -100).all() and y.shape[-1] == 30523


def test_text8s_special_tokens_are_no_text():
    tokenizer = load_tokenizer(convert_upstream.TOKENIZERS[35][0])
    assert tokenizer.vocab_size == 35
    assert tokenizer.encode("az ") == [8, 33, 34]  # Text8Tokenizer, dataloader.py of MDLM
    assert all(
        len(piece) == 1 and "\ue000" <= piece <= "\ue007" for piece in tokenizer.pieces(range(8))
    )


def test_the_result_samples_and_evaluates(corpus, tmp_path, capsys):
    import evaluate
    import sample

    run(file_nanodd(tmp_path / "nanodd.pt"), tmp_path / "ckpt.pt")
    sample.main(
        [
            str(tmp_path / "ckpt.pt"),
            "--prompt",
            "ab",
            "--length",
            "12",
            "--steps",
            "4",
            "--device",
            "cpu",
        ]
    )
    assert capsys.readouterr().out.splitlines()[-1].startswith("ab")
    result = evaluate.main(
        [str(tmp_path / "ckpt.pt"), "--data", str(corpus), "--device", "cpu", "--json"]
    )
    assert result["step"] == 77 and math.isfinite(result["nats"])


# --------------------------------------------------------------------------------------------------
# SMDM: lit_gpt/diffmodel.py TransEncoder and lit_gpt/model.py GPT, ML-GSAI/SMDM 583aa477, recorded
# as the others, with its RMSNorm in Python, xformers' SwiGLU and flash_attn's rotary kernel
# replaced by what they compute: logits of row 1 of smdm_ids, positions 3, 21 and 45, outputs 0, 5,
# 11, 16000, 31998 and 31999, with rotary tables in bfloat16, as upstream has them, and in float32.

SMDM_ANSWERS = {
    ("mdlm", "bfloat16"): [
        [-0.201966, 0.600388, -0.173546, 0.845630, -1.198632, -0.654340],
        [-0.232259, 0.612856, -0.160600, 0.816871, -1.168431, -0.669196],
        [-0.236612, 0.617209, -0.149940, 0.793945, -1.165518, -0.665375]],
    ("mdlm", "float32"): [
        [-0.202059, 0.600274, -0.173494, 0.845617, -1.198584, -0.654334],
        [-0.232362, 0.612893, -0.160607, 0.816845, -1.168377, -0.669275],
        [-0.236627, 0.617101, -0.149892, 0.793901, -1.165504, -0.665325]],
    ("ar", "bfloat16"): [
        [0.425552, -0.622112, -0.178556, -1.135177, 0.277260, 0.170146],
        [-0.483954, 0.174349, -0.582180, 0.628017, -0.244366, -0.653731],
        [-0.212639, 0.575279, 0.104043, -0.845197, -0.176720, -0.608257]],
    ("ar", "float32"): [
        [0.425524, -0.622066, -0.178582, -1.135191, 0.277242, 0.170130],
        [-0.483836, 0.174417, -0.582001, 0.628066, -0.244427, -0.653747],
        [-0.212548, 0.575262, 0.104131, -0.845258, -0.176691, -0.608150]],
}  # fmt: skip


def smdm_ids(loss):
    """(2, 48) ids; for masked diffusion each third is MASK."""
    x = torch.from_numpy(
        np.random.Generator(np.random.Philox(key=[9, 9])).integers(5, 31999, (2, 48))
    )
    return x.index_fill(1, torch.arange(0, 48, 3), 32000) if loss == "mdlm" else x


def smdm_answers(y, loss):
    """Of logits (2, 48, V); upstream's causal output j is about token j + 1."""
    return y[1, torch.tensor([3, 21, 45]) + (loss == "ar")][:, [0, 5, 11, 16000, 31998, 31999]]


def smdm_file(path, loss="mdlm", **changes):
    """A .safetensors file, or a run's .pth; a change to None leaves the tensor out."""
    from safetensors.torch import save_file

    weights = recipe({"mdlm": 32001, "ar": 32000}[loss], "smdm") | changes
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        adam = {
            "state": {0: {"step": torch.ones(()), "exp_avg": torch.ones(3)}},
            "param_groups": [],
        }
        ckpt = dict(model=weights, optimizer=adam, hparams={"model_name": "Diff_LLaMA_6M"})
        torch.save(ckpt | dict(iter_num=640, step_count=20), path)
    return path


def llama_json(pieces):
    """A tokenizer.json in the layout of Llama's: three special tokens, 256 bytes, then text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        *"▁the",
        "th",
        "the",
        "▁the",
        *("<", "0", "x", "4", "1", ">", "<0", "<0x", "<0x4", "1>"),
    ]
    ids = {word: i for i, word in enumerate(words + [f"w{i}" for i in range(pieces - len(words))])}
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("<", "0"), ("<0", "x"), ("<0x", "4")]
    merges += [("1", ">"), ("<0x4", "1>")]  # text would become a byte
    model = models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    spaces = (
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    )
    tokenizer.decoder = decoders.Sequence(list(spaces))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer.to_str()


@pytest.fixture
def llama(tmp_path, monkeypatch):
    """The arguments --tokenizer FILE. The table of sizes gets that of the test's network."""
    monkeypatch.setitem(convert_upstream.SMDM_SIZES, 0, (LAYERS, HEADS, D))
    (tmp_path / "tokenizer.json").write_text(llama_json(32000), "utf-8")
    return "--tokenizer", tmp_path / "tokenizer.json"


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("loss", ["mdlm", "ar"])
def test_smdms_files_give_its_logits(loss, suffix, tmp_path, llama):
    run(smdm_file(tmp_path / f"smdm{suffix}", loss), tmp_path / "ckpt.pt", *llama)
    model, cfg = load(tmp_path / "ckpt.pt")
    answers = lambda: smdm_answers(model(smdm_ids(loss), T_UP), loss)
    upstream = lambda tables: torch.tensor(SMDM_ANSWERS[loss, tables])
    torch.testing.assert_close(answers(), upstream("float32"), atol=1e-5, rtol=0)
    torch.testing.assert_close(answers(), upstream("bfloat16"), atol=1e-3, rtol=0)
    for table in model.cos, model.sin:  # the tables are all that differs
        table.copy_(table.bfloat16())
    torch.testing.assert_close(answers(), upstream("bfloat16"), atol=1e-5, rtol=0)

    assert model.step == (20 if suffix == ".pth" else 0) and model.tokenizer["kind"] == "llama"
    assert model.tokenizer["json"] == llama[1].read_text("utf-8")
    assert (cfg.loss, cfg.causal, cfg.bos) == (
        ("ar", True, True) if loss == "ar" else ("mdlm", False, False)
    )
    assert (cfg.vocab_size, cfg.seq_len, cfg.n_head, cfg.mlp_width) == (32000, 2048, HEADS, 4 * D)
    assert model.embed.weight[-1].any() == (loss == "mdlm")  # AR has no MASK


SMDM_BAD = {
    "missing: transformer.h.1.mlp.swiglu.w2.weight": {"transformer.h.1.mlp.swiglu.w2.weight": None},
    "missing: lm_head.weight": {"lm_head.weight": None},
    "unknown: transformer.h.0.attn.attn.bias": {"transformer.h.0.attn.attn.bias": torch.ones(48)},
    "transformer.h.0.attn.attn.weight [32, 16] instead of [48, 16]": {
        "transformer.h.0.attn.attn.weight": torch.ones(32, 16)},  # grouped queries
    "lm_head.weight [32000, 16] instead of [32000, 16]": {
        "lm_head.weight": torch.ones(32000, 16, dtype=torch.int8)},
    "an embedding of 50257 rows, but SMDM's have 32001, or 32000 if AR": {
        "transformer.wte.weight": torch.ones(50257, 16)},  # GPT-2
    "3 layers of width 16: none of SMDM's sizes": {"transformer.h.2.norm_1.weight": torch.ones(16)},
    "has no embedding, but lm_head.weight": {"transformer.wte.weight": None},
    "not as nanoMDLM, MDLM, SEDD, nanoDD or SMDM write it": {
        "transformer.wte.weight": torch.ones(16)},
}  # fmt: skip


@pytest.mark.parametrize("message", SMDM_BAD)
def test_smdms_tensors_that_do_not_fit_are_named(message, tmp_path, llama, capsys):
    source = smdm_file(tmp_path / "x.safetensors", **SMDM_BAD[message])
    assert message in refused(capsys, source, tmp_path / "x.pt", *llama)
    assert not (tmp_path / "x.pt").exists()


def test_smdms_choices_that_do_not_fit_are_named(tmp_path, llama, capsys):
    source, out = smdm_file(tmp_path / "x.safetensors"), tmp_path / "x.pt"
    assert "an embedding of 32001 rows is for loss=mdlm" in refused(
        capsys, source, out, "--loss", "ar", *llama
    )
    assert "none.json" in refused(capsys, source, out, "--tokenizer", tmp_path / "none.json")
    llama[1].write_text(llama_json(300), "utf-8")
    line = refused(capsys, source, out, *llama)
    assert "an embedding of 32001 rows, but SMDM's have 301, or 300 if AR" in line


def test_smdms_layers_and_width_determine_its_heads():
    """No two of the 30 sizes have the same layers and width."""
    assert len({(n_layer, d) for n_layer, _, d in convert_upstream.SMDM_SIZES.values()}) == 30


def test_one_file_of_a_repository(tmp_path, llama, capsys, monkeypatch):
    """And no more of it: SMDM's has hundreds of gigabytes."""
    calls, file = [], "mdm_safetensors/mdm-19M-6e18.safetensors"
    smdm_file(tmp_path / "x.safetensors")
    download = lambda *args: calls.append(args) or str(tmp_path / "x.safetensors")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    run(f"nieshen/SMDM:{file}", tmp_path / "x.pt", *llama)
    assert calls == [("nieshen/SMDM", file)] and load(tmp_path / "x.pt")[1].n_embd == D
    for local in "models/x.safetensors", "models/sub/x.safetensors", "no/such/folder:x.pt":
        assert "no such file or folder" in refused(capsys, local, tmp_path / "y.pt")


# --------------------------------------------------------------------------------------------------
# What is refused


def test_an_ema_may_be_longer_but_not_shorter(tmp_path, capsys):
    lightning(tmp_path / "a.ckpt", 35, extra=[torch.zeros(())])  # older noises had a parameter
    run(tmp_path / "a.ckpt", tmp_path / "a.pt")
    lightning(tmp_path / "b.ckpt", 35, edit=lambda ckpt: ckpt["ema"]["shadow_params"].pop())
    assert "ema: 29 tensors, but the network has 30" in refused(
        capsys, tmp_path / "b.ckpt", tmp_path / "b.pt"
    )
    lightning(tmp_path / "c.ckpt", 35, edit=lambda ckpt: ckpt["ema"]["shadow_params"].reverse())
    assert "vocab_embed.embedding [32] instead of [35, 16]" in refused(
        capsys, tmp_path / "c.ckpt", tmp_path / "c.pt"
    )
    lightning(tmp_path / "d.ckpt", 35, edit=lambda ckpt: ckpt.pop("ema"))  # training.ema=0
    run(tmp_path / "d.ckpt", tmp_path / "d.pt")
    ckpt = read_checkpoint(tmp_path / "d.pt")
    assert all(torch.equal(ckpt["model"][name], ckpt["ema"][name]) for name in ckpt["model"])
    assert not (tmp_path / "b.pt").exists() and not (tmp_path / "c.pt").exists()


def change(name, tensor=None):
    def edit(ckpt):
        weights = ckpt["state_dict"]
        weights.pop(name, None)
        weights |= {} if tensor is None else {name: tensor}

    return edit


FREQ = "backbone.rotary_emb.inv_freq"
BAD_TENSORS = {
    "missing: blocks.1.mlp.0.bias": change("backbone.blocks.1.mlp.0.bias"),
    "unknown: blocks.1.moe.weight": change("backbone.blocks.1.moe.weight", torch.ones(3)),
    "unknown: loss_scale": change("loss_scale", torch.ones(3)),
    "blocks.0.attn_qkv.weight [48, 15] instead of [48, 16]": change(
        "backbone.blocks.0.attn_qkv.weight", torch.ones(48, 15)
    ),
    "output_layer.linear.bias [35] instead of [35]": change(
        "backbone.output_layer.linear.bias", torch.ones(35, dtype=torch.long)
    ),
    "not MDLM's, SEDD's, nanoDD's or SMDM's: has no embedding, but sigma_map.mlp.0.weight": change(
        "backbone.vocab_embed.embedding"
    ),
    "an embedding of 77 rows": change("backbone.vocab_embed.embedding", torch.ones(77, 16)),
    "rotary_emb.inv_freq: not of base 10000": change(FREQ, torch.tensor([1, 0.3, 0.1, 0.03])),
    "inv_freq is of heads of 4": change(FREQ, torch.tensor([1.0, 0.01])),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_named(message, tmp_path, capsys):
    lightning(tmp_path / "x.ckpt", 35, edit=BAD_TENSORS[message])
    assert message in refused(capsys, tmp_path / "x.ckpt", tmp_path / "x.pt")
    assert not (tmp_path / "x.pt").exists()


def test_a_long_list_of_names_is_cut(tmp_path, capsys):
    hub_mdlm(tmp_path / "hub", {f"layers.{i}.mixer.A_log": torch.ones(2) for i in range(20)})
    line = refused(capsys, tmp_path / "hub", tmp_path / "x.pt")
    assert "layers.0.mixer.A_log" in line and line.endswith("and 12 more\n")


BAD_SETTINGS = {
    "graph.type=uniform": lambda p: hub_sedd(p, graph={"type": "uniform"}),
    "rows: graph.type=uniform, without a MASK": lambda p: hub_sedd(p, rows=50257),
    "noise.type=geometric": lambda p: hub_sedd(p, noise={"type": "geometric"}),
    "change_of_variables=True": lambda p: lightning(
        p, 35, **SCORES, training={"change_of_variables": True}),
    "T=500": lambda p: file_nanodd(p, T=500),
    "schedule='polynomial'": lambda p: lightning(p, 35, noise={"type": "polynomial"}),
    "loss='ddim'": lambda p: lightning(p, 35, parameterization="ddim"),
    "could not convert string to float: '${x}'": lambda p: hub_mdlm(p, dropout="${x}"),
    "has none of model.safetensors": lambda p: p.mkdir() or p,
    "beside it cannot be read": lambda p: (hub_mdlm(p) / "config.json").write_text("{") and p,
    "model.safetensors: damaged": lambda p: (
        (hub_mdlm(p) / "model.safetensors").write_bytes(b"x") and p),
    "damaged": lambda p: p.write_bytes(lightning(p, 35).read_bytes()[:9999]) and p,
}  # fmt: skip


BD3LM = dict(
    model_type="bd3lm", block_size=24, attn_backend="sdpa", cross_attn=True, var_min=True,
    sampling_eps_min=0.001, sampling_eps_max=0.999, causal=False,
)  # fmt: skip
BUFFERS = {"sampling_eps_min": torch.tensor(1e-3), "sampling_eps_max": torch.tensor(1.0)}
ALGO = dict(
    name="mdlm", parameterization="subs", T=0, time_conditioning=False, causal_attention=False,
)  # fmt: skip


def successor(path, kind="dit", edit=None, **changes):
    """A .ckpt as BD3-LM's and Duo's repositories write it: MDLM's, with other settings."""
    nested = dict(algo=ALGO | changes, parameterization=None, T=None, time_conditioning=None)
    return lightning(path, 50258, kind, edit=edit, **nested)


OTHER_KINDS = {  # what must be named: models whose tensors look like MDLM's
    "model_type=DUO: uniform-state diffusion has no MASK": lambda p: hub_mdlm(
        p, model_type="DUO", causal=False, var_min=True),
    "model_type=duo: uniform-state": lambda p: hub_mdlm(p, model_type="duo"),
    "model_type=udlm: uniform-state": lambda p: hub_mdlm(p, model_type="udlm"),
    "model_type=gpt2: must be mdlm or bd3lm": lambda p: hub_mdlm(p, model_type="gpt2"),
    "block_size=4: block diffusion; must be the length, 24": lambda p: hub_mdlm(
        p, **BD3LM | dict(block_size=4)),
    "time_conditioning=True: BD3-LM's sigma(t)": lambda p: hub_mdlm(
        p, **BD3LM | dict(time_conditioning=True)),
    "causal=True: MDLM's AR networks have no time embedding": lambda p: hub_mdlm(
        p, **BD3LM | dict(causal=True)),
    "diffusion=uniform: must be absorbing_state": lambda p: lightning(
        p, 30522, vocab=BERT, **LM1B, diffusion="uniform"),
    **{f"algo.name={name}: must be mdlm, ar or bd3lm": lambda p, name=name: successor(p, name=name)
       for name in ("duo", "duo_base", "distillation", "ot-finetune", "sedd", "d3pm")},
    "block_size=16: block diffusion; must be the length, 32": lambda p: successor(p, name="bd3lm")
        and lightning(p, 50258, algo=ALGO | dict(name="bd3lm"), block_size=16),
    "noise.type=cosine: must be log-linear": lambda p: lightning(
        p, 50258, algo=ALGO, noise={"type": "cosine"}),
}  # fmt: skip


@pytest.mark.parametrize("message", OTHER_KINDS)
def test_models_of_other_kinds_are_refused_by_name(message, tmp_path, capsys):
    assert message in refused(capsys, OTHER_KINDS[message](tmp_path / "x"), tmp_path / "x.pt")
    assert not (tmp_path / "x.pt").exists()


def test_block_diffusion_in_one_block_is_mdlm(tmp_path):
    """With BD3-LM's two buffers; its first token is always given."""
    weights = with_buffer(recipe(50258), "backbone.") | BUFFERS
    run(hub_mdlm(tmp_path / "hub", weights, **BD3LM), tmp_path / "hub.pt")
    add = lambda ckpt: ckpt["state_dict"].update(BUFFERS)
    source = successor(tmp_path / "x.ckpt", edit=add, name="bd3lm", ignore_bos=True)
    run(source, tmp_path / "lightning.pt")
    for name, length in dict(hub=24, lightning=32).items():
        model, cfg = load(tmp_path / f"{name}.pt", ema=False)
        assert (cfg.loss, cfg.seq_len, cfg.bos, cfg.time_cond) == ("mdlm", length, True, False)
        expected = torch.tensor(ANSWERS["mdlm 50258"][0])
        torch.testing.assert_close(answers(model, cfg, "mdlm 50258"), expected, atol=1e-4, rtol=0)


def test_the_successors_ar_is_read(tmp_path):
    changes = dict(name="ar", parameterization="ar", causal_attention=True)
    run(successor(tmp_path / "x.ckpt", "ar", **changes), tmp_path / "x.pt")
    model, cfg = load(tmp_path / "x.pt", ema=False)
    expected = torch.tensor(ANSWERS["ar 50258"][0])
    torch.testing.assert_close(answers(model, cfg, "ar 50258"), expected, atol=1e-4, rtol=0)


# --------------------------------------------------------------------------------------------------
# --tokenizer


def byte_level(path, added=("<pad>", "[MASK]"), last=()):
    """A tokenizer.json of byte-level BPE as people train it: special tokens in front and behind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=270, special_tokens=list(added), initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(["the cat sat on the mat, the bat sat on the hat"], trainer)
    fast.add_special_tokens(list(last))
    if added:
        fast.post_processor = processors.TemplateProcessing(
            f"{added[0]} $A", special_tokens=[(added[0], 0)]
        )
    fast.save(str(path))
    return fast


PIECES = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "cat",
    "mat",
    "sat",
    "on",
    "##s",
    ",",
]


def vocab_txt(path, pieces=PIECES):
    path.write_text("\n".join(pieces) + "\n", "utf-8")
    return path


needs_gpt2 = pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ, reason="no GPT-2 vocabulary"
)
OWN = {  # name: (its file, made of a path; items of its spec; number of pieces)
    "bpe": (lambda p: byte_level(p, ["<pad>"]), {"kind": "bpe"}, 270),
    "eos": (lambda p: byte_level(p, [], ["<|endoftext|>"]), {"kind": "bpe", "eos": True}, 271),
    "vocab.txt": (lambda p: vocab_txt(p, PIECES[:4] + PIECES[5:]), {"kind": "wordpiece"}, 11),
    "llama": (lambda p: p.write_text(llama_json(300), "utf-8"), {"kind": "llama"}, 300),
}


@pytest.mark.parametrize("name", OWN)
def test_the_vocabulary_may_be_ones_own(name, tmp_path, capsys):
    build, items, V = OWN[name]
    build(file := tmp_path / "tokenizer.json")
    source = lightning(tmp_path / "x.ckpt", V + 1)
    line = refused(capsys, source, tmp_path / "x.pt")
    assert f"an embedding of {V + 1} rows" in line and "--tokenizer" in line
    run(source, tmp_path / "x.pt", "--tokenizer", file)
    model, cfg = load(tmp_path / "x.pt")
    assert cfg.vocab_size == V and items.items() <= model.tokenizer.items()
    assert torch.equal(model.embed.weight, recipe(V + 1, seed=1)["vocab_embed.embedding"])
    ours = load_tokenizer(model.tokenizer)
    assert ours.vocab_size == V and ours.decode(ours.encode("the mat")) == "the mat"
    short = lightning(tmp_path / "y.ckpt", V - 1)
    line = refused(capsys, short, tmp_path / "y.pt", "--tokenizer", file)
    assert f"an embedding of {V - 1} rows, but a vocabulary of {V} pieces\n" in line


def test_no_text_becomes_a_special_token_of_ones_own(tmp_path):
    """Nor does encoding add one, though the file asks for <pad> in front of every text."""
    fast = byte_level(tmp_path / "t.json", ["<pad>"], ["<eot>"])
    spec, mask = convert_tokenizer.read_tokenizer(str(tmp_path / "t.json"))
    ours, text = load_tokenizer(spec), "the <pad> cat<eot>"
    assert fast.encode(text).ids.count(0) == 2 and mask is None
    assert not {0, 270} & set(ours.encode(text)) and ours.decode(ours.encode(text)) == text
    assert ours.decode([0, 270]) == "<pad><eot>" and ours.vocab_size == 271


@pytest.mark.parametrize("name", ["[MASK]", "<mask>", "<|mask|>", "vocab.txt"])
def test_mask_may_be_a_piece_of_ones_own_vocabulary(name, tmp_path, capsys):
    if name == "vocab.txt":
        file, V, inside = vocab_txt(tmp_path / name), 12, 4
    else:
        byte_level(file := tmp_path / "t.json", ["<pad>", name])
        V, inside = 270, 1
    source = lightning(tmp_path / "x.ckpt", V)
    run(source, tmp_path / "x.pt", "--tokenizer", file)
    model, cfg = load(tmp_path / "x.pt", ema=False)
    assert cfg.vocab_size == V and torch.equal(model.embed.weight[V], model.embed.weight[inside])
    assert torch.equal(model.embed.weight[:V], recipe(V)["vocab_embed.embedding"])
    assert model.head.bias.argmin() == inside
    byte_level(tmp_path / "none.json", ["<pad>"])
    line = refused(
        capsys, lightning(tmp_path / "y.ckpt", 270), tmp_path / "y.pt",
        "--tokenizer", tmp_path / "none.json",
    )  # fmt: skip
    assert "an embedding of 270 rows, but a vocabulary of 270 pieces, none of them MASK" in line


@pytest.mark.parametrize("name", ["folder", "bare name"])
def test_the_vocabulary_of_a_prepared_corpus(name, tmp_path, corpus, monkeypatch):
    monkeypatch.setattr("data.corpus.ROOT", corpus.parent)
    source, out = lightning(tmp_path / "x.ckpt", 28), tmp_path / "x.pt"
    run(source, out, "--tokenizer", corpus if name == "folder" else corpus.name)
    assert load(out)[0].tokenizer == CHAR


@needs_gpt2
def test_the_vocabulary_may_be_gpt2s(tmp_path, capsys):
    run(hub_mdlm(tmp_path / "hub"), tmp_path / "x.pt", "--tokenizer", "gpt2")
    assert load(tmp_path / "x.pt")[0].tokenizer == {"kind": "gpt2"}
    line = refused(
        capsys, lightning(tmp_path / "x.ckpt", 35), tmp_path / "y.pt", "--tokenizer", "gpt2"
    )
    assert "an embedding of 35 rows, but a vocabulary of 50257 pieces" in line


def test_smdms_vocabulary_may_be_ones_own(tmp_path, llama):
    """And its tensors then have other numbers of rows."""
    llama[1].write_text(llama_json(300), "utf-8")
    changes = {"lm_head.weight": torch.ones(300, D), "transformer.wte.weight": torch.ones(301, D)}
    run(smdm_file(tmp_path / "x.safetensors", **changes), tmp_path / "x.pt", *llama)
    model, cfg = load(tmp_path / "x.pt")
    assert cfg.vocab_size == 300 and cfg.loss == "mdlm" and model.head.weight.shape == (300, D)


def edited(path, edit):
    """A byte-level tokenizer.json after edit(dict)."""
    byte_level(path, [])
    file = json.loads(path.read_text("utf-8"))
    edit(file)
    path.write_text(json.dumps(file), "utf-8")


CASED = {
    "normalizer": {"type": "BertNormalizer", "lowercase": False},
    "model": {"type": "WordPiece", "vocab": {piece: i for i, piece in enumerate(PIECES)}},
}
BAD_TOKENIZERS = {
    "not gpt2, a file, or the folder of a prepared corpus": lambda p: None,
    "t.json: not a tokenizer.json of the": lambda p: p.write_text("{"),
    "t.json: not a WordPiece vocabulary: has no": lambda p: p.write_text("a\nb\n"),
    "some pieces appear twice": lambda p: vocab_txt(p, PIECES * 2),
    "t.json: 'utf-8' codec can't decode byte": lambda p: p.write_bytes(b"\xff"),
    "meta.json: no such file": lambda p: p.mkdir(),
    "model Unigram: must be WordPiece, byte-level BPE or Llama's": lambda p: p.write_text(
        '{"model": {"type": "Unigram", "vocab": []}}'),
    "cased WordPiece: must be uncased": lambda p: p.write_text(json.dumps(CASED)),
    "add_prefix_space=true": lambda p: edited(
        p, lambda file: file["pre_tokenizer"].update(add_prefix_space=True)),
    "the ids of its pieces must be 0, 1, 2": lambda p: edited(
        p, lambda file: file["model"]["vocab"].update(the=900)),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_TOKENIZERS)
def test_tokenizers_that_we_cannot_follow_are_refused(message, tmp_path, capsys):
    BAD_TOKENIZERS[message](file := tmp_path / "t.json")
    source, out = lightning(tmp_path / "x.ckpt", 271), tmp_path / "x.pt"
    assert message in refused(capsys, source, out, "--tokenizer", file)


def test_our_own_checkpoints_have_their_tokenizer(tmp_path, capsys):
    ckpt = checkpoint_of(tmp_path / "ckpt.pt", SMALL, CHAR)
    run(ckpt, tmp_path / "hub")
    for source in ckpt, tmp_path / "hub":
        for option in ("--tokenizer", vocab_txt(tmp_path / "vocab.txt")), ("--loss", "sedd"):
            assert "this one has its own" in refused(capsys, source, tmp_path / "x.pt", *option)


@pytest.mark.parametrize("message", BAD_SETTINGS)
def test_settings_that_we_cannot_follow_are_refused(message, tmp_path, capsys):
    assert message in refused(capsys, BAD_SETTINGS[message](tmp_path / "x"), tmp_path / "x.pt")


def test_what_a_file_does_not_tell(tmp_path, capsys):
    """Tensors alone: MDLM unless --loss says otherwise; a SEDD reads the time."""
    torch.save(with_buffer(recipe(50258)), tmp_path / "pytorch_model.bin")
    run(tmp_path, tmp_path / "mdlm.pt")
    run(tmp_path, tmp_path / "sedd.pt", "--loss", "sedd")
    state = run_sedd(tmp_path / "run") / "checkpoints-meta" / "checkpoint.pth"
    torch.save(
        {k: v for k, v in torch.load(state).items() if k != "optimizer"}, tmp_path / "lean.pth"
    )
    run(tmp_path / "lean.pth", tmp_path / "lean.pt")
    fields = lambda cfg: (cfg.loss, cfg.time_cond, cfg.seq_len, cfg.n_head)
    assert fields(load(tmp_path / "mdlm.pt")[1]) == ("mdlm", False, 1024, 2)
    assert (
        fields(load(tmp_path / "sedd.pt")[1])
        == fields(load(tmp_path / "lean.pt")[1])
        == ("sedd", True, 1024, 2)
    )
    torch.save(
        with_buffer(recipe(35)) | {"backbone.output_layer.linear.bias": torch.ones(35)},
        tmp_path / "twice.bin",
    )
    assert "some tensors are there twice" in refused(
        capsys, tmp_path / "twice.bin", tmp_path / "twice.pt"
    )


def test_nothing_is_overwritten_or_misread(tmp_path, capsys, monkeypatch):
    source = file_nanodd(tmp_path / "nanodd.pt")
    run(source, tmp_path / "x.pt")
    before = (tmp_path / "x.pt").read_bytes()
    assert "exists; add --overwrite" in refused(capsys, source, tmp_path / "x.pt")
    run(source, tmp_path / "x.pt", "--overwrite")
    assert (tmp_path / "x.pt").read_bytes() == before
    assert "no such file or folder" in refused(capsys, "no/such.pt", tmp_path / "y.pt")
    assert "are for a folder" in refused(capsys, source, tmp_path / "y.pt", "--push", "me/x")
    assert "none.txt" in refused(
        capsys, source, tmp_path / "y.pt", "--tokenizer", tmp_path / "none.txt"
    )

    def no_network(*args, **options):
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    assert "the hub does not provide it" in refused(capsys, "someone/something", tmp_path / "y.pt")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_network)
    lightning(tmp_path / "bert.ckpt", 30522)
    assert "--vocab" in refused(capsys, tmp_path / "bert.ckpt", tmp_path / "y.pt")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n")
    line = refused(
        capsys, tmp_path / "bert.ckpt", tmp_path / "y.pt", "--tokenizer", tmp_path / "vocab.txt"
    )
    assert "an embedding of 30522 rows, but a vocabulary of 4 pieces" in line
    (tmp_path / "vocab.txt").write_text("\n".join(BERT))
    run(tmp_path / "bert.ckpt", tmp_path / "y.pt", "--tokenizer", tmp_path / "vocab.txt")
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *a, **k: str(hub_mdlm(tmp_path / "hub"))
    )
    run("kuleshov-group/mdlm-owt", tmp_path / "z.pt")


# --------------------------------------------------------------------------------------------------
# Pickles that mean harm. Each tries to write a file; it may be refused or come to nothing.


class Calls:
    """Pickles as a call of `function` with `args`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def zipped(path, pickled):
    """A file as torch.save's, with this pickle."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as z:
        records = {name: z.read(name) for name in z.namelist()}
    with zipfile.ZipFile(path, "w") as z:
        for name, content in records.items():
            z.writestr(name, pickled if name.endswith("data.pkl") else content)
    return path


def harm(marker):
    touch, code = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    text = lambda s: b"X" + len(s).to_bytes(4, "little") + s.encode()
    system = (
        b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n"
        + text("os")
        + b"\x85R"
        + text("system")
        + b"tR"
    )
    return {
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "subprocess": Calls(subprocess.call, touch.split()),
        "partial": Calls(functools.partial(open, str(marker), "w")),
        "map": Calls(list, Calls(map, eval, [code])),
        "os.system": Calls(os.system, touch),
        "old names": b"\x80\x02c__builtin__\neval\n" + text(code) + b"\x85R.",
        "getattr": b"\x80\x02" + system + text(touch) + b"\x85R.",
        "inst": b"\x80\x02(" + text(touch) + b"iposix\nsystem\n.",
        "stack": b"\x80\x04" + text("posix") + text("system") + b"\x93" + text(touch) + b"\x85R.",
        "dotted": b"\x80\x04ctorch\nserialization.os.system\n" + text(touch) + b"\x85R.",
        "build": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(N}"
        + text("__defaults__")
        + b"Nstb.",
    }


HARM = list(harm("x"))


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("route", HARM)
def test_a_pickle_cannot_run(route, protocol, tmp_path, capsys):
    marker, path, out = tmp_path / "marker", tmp_path / "x.ckpt", tmp_path / "x.pt"
    payload, defaults = harm(marker)[route], torch._utils._rebuild_tensor_v2.__defaults__
    if isinstance(payload, bytes):
        zipped(path, payload)
    else:  # where Lightning keeps the tokenizer, of an otherwise good file
        weights = with_buffer(recipe(35), "backbone.")
        ckpt = {"state_dict": weights, "hyper_parameters": {"tokenizer": payload}}
        torch.save(ckpt, path, pickle_protocol=protocol)
    with contextlib.suppress(SystemExit):
        run(path, out)
    assert not marker.exists() and torch._utils._rebuild_tensor_v2.__defaults__ == defaults
    assert out.exists() == (
        protocol == 2 and route in ("eval", "exec", "subprocess", "map")
    )  # no effect
    assert out.exists() or capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("route", HARM[:-1])  # "build" would change torch itself
def test_the_harm_is_real(route, tmp_path):
    """Unpickled in the usual way, the routes above run."""
    payload = harm(tmp_path / "marker")[route]
    with contextlib.suppress(Exception):
        pickle.loads(payload if isinstance(payload, bytes) else pickle.dumps(payload, 2))
    assert (tmp_path / "marker").exists()


def test_a_file_without_zip_is_refused(tmp_path, capsys):
    torch.save({"model": {}}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    assert "not a zip file of torch.save" in refused(capsys, tmp_path / "x.pt", tmp_path / "y.pt")


def test_strided_and_shared_tensors_come_out_right(tmp_path):
    """Two views of one storage, one of them transposed."""
    base = recipe(35)["blocks.0.attn_out.weight"]
    both = torch.stack((base, base.T))

    def edit(ckpt):
        ckpt["state_dict"]["backbone.blocks.0.attn_out.weight"] = both[1].T
        ckpt["state_dict"]["backbone.blocks.1.attn_out.weight"] = both[0]

    lightning(tmp_path / "x.ckpt", 35, edit=edit)
    run(tmp_path / "x.ckpt", tmp_path / "x.pt")
    run(tmp_path / "x.ckpt", tmp_path / "hub", "--no_ema")
    for weights in (
        convert.read(tmp_path / "x.pt")[0]["model"],
        convert.read(tmp_path / "hub")[0]["model"],
    ):
        assert torch.equal(weights["blocks.0.attn_out.weight"], base)
        assert torch.equal(weights["blocks.1.attn_out.weight"], base)


# --------------------------------------------------------------------------------------------------
# Out to the hub


def checkpoint_of(path, cfg, tokenizer, best=1.5):
    """A checkpoint of ours whose weights are all random, the EMA's others than the raw ones."""
    raw, ema = (
        {k: torch.randn_like(v) * 0.2 for k, v in DiT(cfg).state_dict().items()} for _ in range(2)
    )
    state = dict(model=raw, ema=ema, step=12, best=best, seconds=3.0, tokenizer=tokenizer)
    save_checkpoint(path, **state, optimizer=[1], config=asdict(cfg), data="abc")
    return path


SMALL = Config(vocab_size=27, seq_len=16, n_layer=1, n_head=2, n_embd=16, cond_dim=8, data="words")
SMDM = replace(SMALL, cond_dim=0, norm="rms", mlp="swiglu", bias=False, init="smdm", mlp_width=24)
CHAR = {"kind": "char", "characters": " abcdefghijklmnopqrstuvwxyz"}
EXPORTS = {
    "mdlm": SMALL,
    "timed": replace(SMALL, time_cond=True, schedule="cosine"),
    "no_ada": replace(SMALL, cond_dim=0),
    "nanodd": replace(
        SMALL, loss="d3pm", T=1000, aux_ce=0.05, tied=True, time_cond=True, time_input="step"
    ),
    "d3pm": replace(SMALL, loss="d3pm", T=10, zero_masking=False, carry_over=False),
    "sedd": replace(SMALL, loss="sedd", time_cond=True),
    "ar": replace(SMALL, loss="ar", causal=True, cond_dim=0),
    "ar_bos": replace(SMALL, loss="ar", causal=True, cond_dim=0, bos=True),
    "smdm": SMDM,
    "smdm_ar": replace(SMDM, loss="ar", causal=True, bos=True),
}


ELSEWHERE = """
import importlib.util, sys, torch
from pathlib import Path
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

assert not any(map(importlib.util.find_spec, ("model", "diffusion", "tasks")))
x, t, masked = torch.load("inputs.pt")
outputs, trust = {}, dict(trust_remote_code=True)
for folder in sorted(Path("folders").iterdir()):
    config = AutoConfig.from_pretrained(folder, **trust)
    assert (config.vocab_size, config.mask_token_id, config.model_type) == (28, 27, "nanomdlm")
    model, info = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True, **trust)
    assert not any(info.values()) and not model.training, info
    model.save_pretrained("again")
    again = AutoModelForMaskedLM.from_pretrained("again", **trust)
    trunk = AutoModel.from_pretrained(folder, **trust)
    with torch.no_grad():
        outputs[folder.name] = dict(
            logits=model(x, timesteps=t).logits, masked=model(masked).logits,
            again=again(x, timesteps=t).logits,
            hidden=trunk(x, timesteps=t).last_hidden_state,
        )
torch.save(outputs, "outputs.pt")
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """(folder, inputs, outputs): all EXPORTS loaded by a process that cannot see the repository."""
    root, seed = tmp_path_factory.mktemp("elsewhere"), torch.manual_seed(0)
    x, t = torch.randint(0, 28, (3, 16), generator=seed), torch.tensor([0.1, 0.5, 0.9])
    inputs = x, t, x.index_fill(1, torch.arange(4), 27)
    torch.save(inputs, root / "inputs.pt")
    for name, cfg in EXPORTS.items():
        run(checkpoint_of(root / f"{name}.pt", cfg, CHAR), root / "folders" / name)
    hidden = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env = hidden | dict(HF_HUB_OFFLINE="1", HF_HOME=str(root / "cache"))
    command = [sys.executable, "-I", "-c", ELSEWHERE]
    result = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return root, inputs, torch.load(root / "outputs.pt")


@pytest.mark.parametrize("name", EXPORTS)
def test_the_hub_folder_gives_our_logits_without_the_repository(name, elsewhere):
    folder, (x, t, masked), outputs = elsewhere
    ours, cfg = load(folder / f"{name}.pt")
    close = functools.partial(torch.testing.assert_close, atol=1e-6, rtol=0)
    close(outputs[name]["logits"], ours(x, t))
    close(outputs[name]["hidden"], ours.hidden(x, t))
    fraction = (masked == 27).double().mean(-1)  # of MASK: the default t is its time
    default = fraction if cfg.schedule == "linear" else 2 / math.pi * (1 - fraction).acos()
    close(outputs[name]["masked"], ours(masked, default.float()))
    assert torch.equal(outputs[name]["again"], outputs[name]["logits"])


def test_the_folders_code_is_the_core_with_relative_imports(tmp_path):
    from transformers.dynamic_module_utils import get_imports, get_relative_import_files

    assert importlib.import_module("tasks.modeling_nanomdlm").NanoMDLMModel  # a module of ours
    sources = convert_hub.collect_code()
    assert {"modeling_nanomdlm.py", "model.py", "head.py", "diffusion.py"} <= sources.keys()
    assert not sources.keys() & {"train.py", "sample.py", "evaluate.py", "convert.py"}
    for name, source in sources.items():
        (tmp_path / name).write_text(source)
        ours = {path.stem for path in convert_hub.ROOT.glob("*.py")} | {"extra", "data", "tasks"}
        assert not ours & set(get_imports(tmp_path / name)), name
    found = get_relative_import_files(tmp_path / "modeling_nanomdlm.py")
    assert {*found, str(tmp_path / "modeling_nanomdlm.py")} == {
        str(tmp_path / name) for name in sources
    }


def test_imports_become_relative():
    source = "import head\nimport math\nif x:\n    from extra.muon import (\n        Muon)\n"
    relative, modules = convert_hub.make_relative(source)
    assert modules == ["head", "extra.muon"]
    assert relative == source.replace("import head", "from . import head").replace(
        "from extra.muon", "from .extra_muon"
    )


# --------------------------------------------------------------------------------------------------
# As people call it


def train_small_bpe(eos):
    from data.tokenizer import train_bpe

    spec = train_bpe(["the cat sat on the mat, the bat sat on the hat"], 270)
    return spec | ({"eos": True} if eos else {})


SPECS = {
    "char": lambda: CHAR,
    "bpe": lambda: train_small_bpe(eos=False),
    "bpe_eos": lambda: train_small_bpe(eos=True),
    "gpt2": lambda: {"kind": "gpt2"},
    "wordpiece": lambda: {"kind": "wordpiece", "vocab": "\n".join(PIECES) + "\n"},
    "llama": lambda: {"kind": "llama", "json": llama_json(300)},
}
KINDS_OF_TOKENIZERS = [
    pytest.param(name, marks=needs_gpt2) if name == "gpt2" else name for name in SPECS
]


def hub_of(path, kind, **fields):
    """(folder for the hub, our model, our tokenizer) of a network of that kind's vocabulary."""
    spec = SPECS[kind]()
    ours = load_tokenizer(spec)
    cfg = replace(SMALL, vocab_size=ours.vocab_size, **fields)
    run(checkpoint_of(path / "ckpt.pt", cfg, spec), path / kind)
    return path / kind, load(path / "ckpt.pt")[0], ours


@pytest.mark.parametrize("kind", KINDS_OF_TOKENIZERS)
def test_the_folders_tokenizer_is_ours(kind, tmp_path, transformers):
    folder, _, ours = hub_of(tmp_path, kind)
    theirs = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    texts = ["the cat", "  the  mat"]
    if kind != "char":
        texts += ["the\ncat, [dog] 12", "é 日本 😀", "▁the", "", "the <0x41>[UNK <|end"]
    for text in texts:
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode(ids) == ours.decode(ids)
    V = ours.vocab_size
    assert theirs.mask_token == "[MASK]" and theirs.mask_token_id == V and len(theirs) == V + 1
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos, ours.eos)
    start, end = ([ours.bos], [ours.eos]) if kind == "wordpiece" else ([], [])
    ids = [
        *start,
        *ours.encode("the"),
        V,
        *ours.encode("the" if kind == "char" else " the", True),
        *end,
    ]
    spaces = ("the[MASK]the",) if kind == "char" else ("the [MASK] the", "the[MASK] the")
    assert all(theirs(text)["input_ids"] == ids for text in spaces)
    assert (
        theirs.model_max_length == 16
        and len(theirs("cat " * 9, truncation=True)["input_ids"]) <= 16
    )
    run(folder, tmp_path / "back.pt")
    assert read_checkpoint(tmp_path / "back.pt")["tokenizer"] == SPECS[kind]()


@pytest.mark.parametrize("kind", ["bpe_eos", "llama", "wordpiece"])
def test_a_first_token_that_is_given_is_added(kind, tmp_path, transformers):
    folder, _, ours = hub_of(tmp_path, kind, bos=True)
    theirs = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert theirs("the cat")["input_ids"][: len(ours.encode("the")) + 1] == [
        ours.bos, *ours.encode("the")]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS_OF_TOKENIZERS)
def test_the_folder_works_as_people_call_it(kind, tmp_path, transformers):
    folder, ours, tokenizer = hub_of(tmp_path, kind)
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
    theirs = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    text = "the[MASK]mat" if kind == "char" else "the [MASK] mat"
    inputs = theirs(text, return_tensors="pt")
    assert "attention_mask" in inputs
    logits = model(**inputs, token_type_ids=torch.zeros_like(inputs["input_ids"])).logits
    x = inputs["input_ids"]
    expected = ours(x, (x == tokenizer.vocab_size).float().mean(-1))
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=0)

    many = theirs([text, "the", "mat" * 9], padding=True, truncation=True, return_tensors="pt")
    assert many["input_ids"].shape[1] <= 16
    torch.testing.assert_close(model(**many).logits[0, : x.shape[1]], logits[0], atol=1e-6, rtol=0)

    fill = transformers.pipeline("fill-mask", model=str(folder), trust_remote_code=True)
    first, second = fill(text, top_k=2)
    p = expected[0, (x[0] == tokenizer.vocab_size).nonzero().item()].softmax(-1)
    assert first["token"] == p.argmax() and p[second["token"]] == p.topk(2).values[1]
    assert first["score"] == pytest.approx(p.max().item(), abs=1e-6)
    masks = (x[0] == tokenizer.vocab_size).nonzero().item()
    filled = x[0].index_fill(0, torch.tensor(masks), first["token"])
    assert first["sequence"] == theirs.decode(filled, skip_special_tokens=True)
    assert len(fill([text, text])) == 2 and len(fill(text + text)) == 2

    trunk = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    hidden = trunk(**many).last_hidden_state
    assert (
        hidden.shape == (*many["input_ids"].shape, 16)
        and not hidden[many["attention_mask"] == 0].any()
    )
    collate = transformers.DataCollatorForLanguageModeling(theirs, mlm_probability=1.0)
    batch = collate([theirs("the mat"), theirs("the")])
    assert batch["labels"].max() >= 0 and model(**batch).loss > 0


@pytest.fixture(scope="module")
def exported(tmp_path_factory, transformers):
    """{name: the AutoModelForMaskedLM of a folder}: of a bidirectional and of a causal network."""
    root, models = tmp_path_factory.mktemp("exported"), {}
    for name in "timed", "ar":
        run(checkpoint_of(root / f"{name}.pt", EXPORTS[name], CHAR), root / name)
        models[name] = transformers.AutoModelForMaskedLM.from_pretrained(
            root / name, trust_remote_code=True
        )
    return models


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["timed", "ar"])
def test_padding_changes_nothing(name, side, exported):
    """Not even the gradient, nor the default time, whatever ids the padding has."""
    model, lengths = exported[name], [16, 5, 0, 5, 1, 9]
    x = torch.randint(0, 28, (6, 16))
    real = torch.arange(16) < torch.tensor(lengths)[:, None]
    real = real if side == "right" else real.flip(1)
    for padding in 27, 0:
        batch = torch.where(real, x, padding)
        logits = model(batch, attention_mask=real.long()).logits
        for i, n in enumerate(lengths):
            if n:
                alone = model(x[i][real[i]][None]).logits[0]
                torch.testing.assert_close(logits[i][real[i]], alone, atol=1e-6, rtol=0)
    labels = torch.randint(0, 27, (6, 16))
    gradients = []
    for row_by_row in False, True:
        model.zero_grad()
        if row_by_row:
            rows = [
                (x[i][real[i]][None], labels[i][real[i]][None]) for i, n in enumerate(lengths) if n
            ]
            sums = [model(a, labels=b).loss * b.numel() for a, b in rows]
            loss = sum(sums) / sum(lengths)
        else:
            loss = model(batch, attention_mask=real, labels=labels).loss
        loss.backward()
        gradients.append((loss, model.model.blocks[0].qkv.weight.grad.clone()))
    model.zero_grad(set_to_none=True)
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_labels_give_the_mean_cross_entropy(exported):
    model, x = exported["timed"], torch.randint(0, 28, (2, 16))
    labels = torch.randint(0, 27, (2, 16)).index_fill(1, torch.arange(0, 16, 3), -100)
    output = model(x, labels=labels)
    nats = -output.logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(output.loss, nats[labels != -100].mean())
    loss, logits = model(x, labels=labels, return_dict=False)
    assert torch.equal(loss, output.loss) and torch.equal(logits, output.logits)
    assert model(x).loss is None


def test_inputs_that_do_not_fit_are_errors(exported):
    model, x = exported["timed"], torch.randint(0, 28, (2, 17))
    with pytest.raises(
        ValueError, match="17 tokens in a row, at most 16 fit; pass truncation=True"
    ):
        model(x)
    real = torch.ones_like(x).index_fill(1, torch.tensor([16]), 0)
    assert model(x, attention_mask=real).logits.shape == (2, 17, 27)
    with pytest.raises(ValueError, match="excludes tokens between"):
        model(x, attention_mask=real.index_fill(1, torch.tensor([3]), 0))
    with pytest.raises(
        ValueError, match=r"attention_mask: \[2, 5\], must be as input_ids \[2, 17\]"
    ):
        model(x, attention_mask=real[:, :5])


@pytest.mark.parametrize("name", ["timed", "smdm"])
def test_half_precision(name, tmp_path, transformers):
    run(checkpoint_of(tmp_path / "ckpt.pt", EXPORTS[name], CHAR), tmp_path / name)
    exact, half = (
        transformers.AutoModelForMaskedLM.from_pretrained(
            tmp_path / name, trust_remote_code=True, dtype=dtype
        )
        for dtype in (torch.float32, torch.bfloat16)
    )
    x = torch.randint(0, 28, (2, 16))
    a, b = exact(x).logits, half(x).logits
    assert half.dtype == torch.bfloat16 and b.dtype == torch.float32
    assert 0 < (a - b).abs().max() < 0.05 * a.abs().max()


def test_the_card_says_what_works(tmp_path):
    cards = {}
    for name in "mdlm", "ar", "sedd":
        run(checkpoint_of(tmp_path / "ckpt.pt", EXPORTS[name], CHAR), tmp_path / name)
        cards[name] = (tmp_path / name / "README.md").read_text("utf-8")
        (tmp_path / "ckpt.pt").unlink()
    assert (
        "pipeline_tag: fill-mask" in cards["mdlm"] and 'pipeline("fill-mask", mod' in cards["mdlm"]
    )
    assert "pipeline_tag: fill-mask" not in cards["ar"] and "reads\nonly the tokens" in cards["ar"]
    assert "log scores of SEDD" in cards["sedd"] and "generate" in cards["mdlm"]
    assert 'tokenizer(["a[MASK]a"]' in cards["mdlm"]  # characters that this tokenizer has


def test_folders_of_older_versions_are_read(tmp_path):
    """They had the vocabulary in tokenizer.json or vocab.txt, the rest of it in config.json."""
    for kind, (file, key) in convert_hub.OLD_VOCABULARIES.items():
        folder = hub_of(tmp_path, kind)[0]
        (tmp_path / "ckpt.pt").unlink()
        (folder / convert_hub.SPEC).unlink()
        spec = SPECS[kind]()
        (folder / file).write_text(spec.pop(key), "utf-8")
        config = json.loads((folder / "config.json").read_text())
        config["nanomdlm"]["tokenizer"] = spec
        (folder / "config.json").write_text(json.dumps(config))
        run(folder, tmp_path / f"{kind}.pt")
        assert read_checkpoint(tmp_path / f"{kind}.pt")["tokenizer"] == SPECS[kind]()


def test_there_and_back(tmp_path, capsys):
    ckpt = checkpoint_of(tmp_path / "ckpt.pt", EXPORTS["nanodd"], CHAR)
    run(ckpt, tmp_path / "hub")
    run(ckpt, tmp_path / "raw", "--no_ema")
    run(tmp_path / "hub", tmp_path / "back.pt")
    run(tmp_path / "raw", tmp_path / "raw.pt")
    before, back, raw = (
        read_checkpoint(tmp_path / f"{name}.pt") for name in ("ckpt", "back", "raw")
    )
    assert {k: back[k] for k in ("config", "tokenizer", "step", "best")} == {
        k: before[k] for k in ("config", "tokenizer", "step", "best")
    }
    for name, tensor in before["ema"].items():
        assert torch.equal(back["ema"][name], tensor) and torch.equal(back["model"][name], tensor)
        assert torch.equal(raw["ema"][name], before["model"][name])
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "12 optimiser\nsteps, at best 1.5000 nats per token" in card and "loss d3pm" in card
    assert "exists; add --overwrite" in refused(capsys, ckpt, tmp_path / "hub")
    run(ckpt, tmp_path / "hub", "--overwrite")

    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    config["nanomdlm"]["config"]["n_embd"] = 32
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    line = refused(capsys, tmp_path / "hub", tmp_path / "x.pt")
    assert "size mismatch for embed.weight" in line
    del config["nanomdlm"]["config"]
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    assert "not as nanoMDLM, MDLM, SEDD, nanoDD or SMDM write it (KeyError: 'config')" in refused(
        capsys, tmp_path / "hub", tmp_path / "x.pt"
    )


def test_a_checkpoint_of_ours_loses_its_optimizer_only(tmp_path):
    run(checkpoint_of(tmp_path / "ckpt.pt", SMALL, CHAR), tmp_path / "lean.pt")
    before, after = read_checkpoint(tmp_path / "ckpt.pt"), read_checkpoint(tmp_path / "lean.pt")
    assert after["optimizer"] == [] and after["data"] == ""
    for name in ("model", "ema"):
        assert all(torch.equal(before[name][k], after[name][k]) for k in before[name])


@pytest.mark.parametrize("name", ["d3pm", "subs", pytest.param("sedd_hub", marks=needs_gpt2)])
def test_upstreams_to_the_hub_and_back(name, tmp_path):
    source = LAYOUTS[name][0](tmp_path / "source")
    run(source, tmp_path / "direct.pt")
    run(source, tmp_path / "hub")
    run(tmp_path / "hub", tmp_path / "back.pt")
    direct, back = read_checkpoint(tmp_path / "direct.pt"), read_checkpoint(tmp_path / "back.pt")
    assert all(torch.equal(direct["ema"][k], back["ema"][k]) for k in direct["ema"])
    assert all(direct[k] == back[k] for k in ("config", "tokenizer", "step", "best"))


@needs_gpt2
def test_upstreams_model_in_transformers(tmp_path, transformers):
    folder = tmp_path / "owt_mdlm"
    run(hub_mdlm(tmp_path / "source"), folder)
    x, key = ids(50258), "mdlm 50258"
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
    logits = model(x).logits[1, [2, 8]][:, shown(50258)]
    torch.testing.assert_close(logits, torch.tensor(ANSWERS[key][0]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("loss", ["mdlm", "ar"])
def test_smdms_model_in_transformers(loss, tmp_path, llama, transformers):
    folder = tmp_path / f"smdm_{loss}"
    run(smdm_file(tmp_path / "x.safetensors", loss), folder, *llama)
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
    logits = smdm_answers(model(smdm_ids(loss)).logits, loss)
    torch.testing.assert_close(
        logits, torch.tensor(SMDM_ANSWERS[loss, "float32"]), atol=1e-5, rtol=0
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert tokenizer.mask_token_id == 32000
    spec = {"kind": "llama", "json": llama[1].read_text("utf-8")}
    for text in "the the", "é  h":
        theirs = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert load_tokenizer(spec).encode(text) == theirs
    run(folder, tmp_path / "back.pt")
    run(tmp_path / "x.safetensors", tmp_path / "direct.pt", *llama)
    direct, back = read_checkpoint(tmp_path / "direct.pt"), read_checkpoint(tmp_path / "back.pt")
    assert direct["tokenizer"] == back["tokenizer"] == spec and direct["config"] == back["config"]
    assert all(torch.equal(direct["ema"][k], back["ema"][k]) for k in direct["ema"])


WRITTEN = {"tokenizer_config.json", convert_hub.SPEC, *convert_hub.collect_code()}


def test_push(tmp_path, capsys, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, name, exist_ok):
            calls.append((name, exist_ok))

        def upload_folder(self, repo_id, folder_path):
            calls.append((repo_id, sorted(p.name for p in folder_path.iterdir())))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    ckpt = checkpoint_of(tmp_path / "ckpt.pt", SMALL, CHAR, best=math.inf)
    run(ckpt, tmp_path / "hub", "--push", "me/words")
    files = {"README.md", "config.json", "model.safetensors", "tokenizer.json", *WRITTEN}
    assert calls == [("me/words", True), ("me/words", sorted(files))]
    assert (
        'from_pretrained("me/words", trust_remote_code=True)'
        in (tmp_path / "hub" / "README.md").read_text()
    )
    monkeypatch.delattr(Api, "upload_folder")
    assert "--push me/words" in refused(capsys, ckpt, tmp_path / "hub2", "--push", "me/words")
