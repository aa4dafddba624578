"""MDLM's DiMamba in its exact layout, of random weights, against what its own network answered.

Recorded once from models/dimamba.py of kuleshov-group/mdlm c112c526 (strict=True), on a CPU in
float32, with the CUDA kernels replaced: the scan by mamba_ssm's own reference recurrence, the
causal convolution by upstream's other branch, the fused RMSNorm by its formula. Width 16, 2 blocks,
cond_dim 8; as in test_convert.py, row 1 of ids(rows), positions 2 and 8, outputs `shown`.
"""

import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from test_convert import COND, HYDRA, LAYERS, MASK, T_UP, D, answers, ids, lightning, refused, run

from data.checkpoints import load

INNER, STATES, RANK = 2 * D, 16, 1
TOP = "model.bimamba.backbone."


def shapes(rows, twice=False):
    """{name: shape} in the order of parameters(), where shared projections are there once; twice:
    in that of state_dict()."""
    linear = lambda name, n, m: {f"{name}.weight": (n, m), f"{name}.bias": (n,)}
    tensors = linear("sigma_map.mlp.0", COND, 256) | linear("sigma_map.mlp.2", COND, COND)
    tensors |= {TOP + "embeddings.word_embeddings.weight": (rows, D)}
    for i in range(LAYERS):
        block = f"{TOP}layers.{i}."
        for name in ("mamba_fwd", "mamba_rev"):
            one = f"{block}mixer.{name}."
            tensors |= {one + "A_log": (INNER, STATES), one + "D": (INNER,)}
            if twice or name == "mamba_fwd":
                tensors |= {one + "in_proj.weight": (2 * INNER, D)}
            tensors |= {one + "conv1d.weight": (INNER, 1, 4), one + "conv1d.bias": (INNER,)}
            tensors |= {one + "x_proj.weight": (RANK + 2 * STATES, INNER)}
            tensors |= linear(one + "dt_proj", INNER, RANK)
            if twice or name == "mamba_fwd":
                tensors |= {one + "out_proj.weight": (D, INNER)}
        tensors |= {block + "norm.weight": (D,)} | linear(block + "adaLN_modulation", 3 * D, COND)
    tensors |= linear(TOP + "adaLN_modulation_final", 2 * D, COND)
    return tensors | {TOP + "norm_f.weight": (D,), "model.lm_head.weight": (rows, D)}


def weights_of(rows, seed=0):
    """As `test_convert.recipe`: far from the initial ones, so that every tensor matters."""
    weights = {}
    for i, (name, shape) in enumerate(shapes(rows).items()):
        u = np.random.Generator(np.random.Philox(key=[seed, i])).random(shape)
        scale = 1.0 if "embeddings" in name else 0.4
        u = 0.5 + u if "norm" in name else (2 * u - 1) * scale
        weights[name] = torch.from_numpy(u.astype(np.float32))
    return weights


def state_dict(rows, seed=0):
    weights, shared = weights_of(rows, seed), r"mamba_rev(\.(in|out)_proj)"
    return OrderedDict(
        (name, weights[re.sub(shared, r"mamba_fwd\1", name)]) for name in shapes(rows, twice=True)
    )


ANSWERS = {  # (rows, time-conditioned): raw weights, average
    (50258, False): [
        [[-1.00621, 0.80068, 0.16793, 0.33703, -1.31107],
         [-1.18614, 0.98154, 0.11835, 0.81183, -1.44423]],
        [[-0.98795, -0.03174, -1.60085, 0.61646, -0.47107],
         [-1.10492, -0.03108, -1.6942, 0.65142, -0.58749]],
    ],
    (50258, True): [
        [[-0.56331, 1.06788, 1.16089, 0.35872, -0.75189],
         [0.19704, 1.15474, 1.33925, 1.43119, -0.7113]],
        [[-1.01724, 0.04879, -1.48306, 0.72934, -0.39779],
         [-1.11976, 0.12515, -1.58909, 0.81945, -0.57447]],
    ],
    (35, False): [
        [[0.64778, 0.28872, -1.86187, -1.36178, 0.46354, -0.50056],
         [0.16268, -0.14648, -2.54743, -0.58083, 1.11069, -1.03259]],
        [[0.02223, -0.9444, -0.43184, -1.76297, -1.519, -0.23786],
         [0.02237, -1.14548, -0.29909, -1.64888, -1.40798, -0.24743]],
    ],
    (35, True): [
        [[0.53963, 0.63681, -1.10965, -1.55832, 0.21113, -0.30118],
         [-0.89142, -1.23178, -2.63494, 0.6853, 1.93953, -2.03351]],
        [[-0.03639, -1.05553, -0.36209, -1.82019, -1.45409, -0.33394],
         [-0.07214, -1.25019, -0.25893, -1.77677, -1.33535, -0.40981]],
    ],
}  # fmt: skip


def dimamba(path, rows, edit=lambda ckpt: None, **config):
    """A Lightning file of a run with backbone=dimamba."""

    def swap(ckpt):
        weights = state_dict(rows).items()
        ckpt["state_dict"] = OrderedDict((f"backbone.{name}", w) for name, w in weights)
        ckpt["ema"]["shadow_params"] = list(weights_of(rows, seed=1).values())
        edit(ckpt)

    size = dict(temb_strategy="adaln", tie_word_embeddings=False, length=16)
    model = HYDRA["model"] | size | config.pop("model", {})
    data = dict(train="text8" if rows == 35 else "openwebtext-train")
    return lightning(path, rows, edit=swap, backbone="dimamba", model=model, data=data, **config)


@pytest.mark.parametrize("rows, timed", ANSWERS)
def test_dimambas_file_gives_its_logits(rows, timed, tmp_path):
    source = dimamba(tmp_path / "source.ckpt", rows, time_conditioning=timed)
    run(source, tmp_path / "out" / "ckpt.pt")
    for ema in (False, True):
        model, cfg = load(tmp_path / "out", ema=ema)
        got, want = answers(model, cfg, f"mdlm {rows}"), torch.tensor(ANSWERS[rows, timed][ema])
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    assert (cfg.mixer, cfg.norm, cfg.n_layer, cfg.n_embd, cfg.cond_dim) == (
        "mamba", "rms", LAYERS, D, COND,
    )  # fmt: skip
    assert cfg.time_cond is timed and cfg.loss == "mdlm"
    if rows == 35:  # an id that no text has
        y = model(ids(rows), T_UP)
        assert y.softmax(-1)[..., MASK[rows]].max() == 0


def harm(name, change):
    def edit(ckpt):
        change(ckpt["state_dict"], f"backbone.{TOP}{name}")

    return edit


FIRST = "layers.1.mixer.mamba_rev."
BAD = {
    "blocks.1.in_proj.weight: differs": harm(
        FIRST + "in_proj.weight", lambda w, name: w.update({name: w[name] + 1})
    ),
    "missing: blocks.1.backward_pass.D": harm(FIRST + "D", lambda w, name: w.pop(name)),
    "unknown: model.bimamba.backbone.layers.1.moe": harm(
        "layers.1.moe", lambda w, name: w.update({name: torch.ones(3)})
    ),
    "blocks.1.forward_pass.x_proj.weight [32, 32] instead of [33, 32]": harm(
        "layers.1.mixer.mamba_fwd.x_proj.weight", lambda w, name: w.update({name: w[name][1:]})
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_tensors_that_do_not_fit_are_named(message, tmp_path, capsys):
    source = dimamba(tmp_path / "source.ckpt", 50258, BAD[message])
    assert message in refused(capsys, source, tmp_path / "out.pt")


@pytest.mark.parametrize(
    "field, value", [("temb_strategy", "concat"), ("tie_word_embeddings", True)]
)
def test_other_kinds_of_dimamba_are_refused(field, value, tmp_path, capsys):
    source = dimamba(tmp_path / "source.ckpt", 50258, model={field: value})
    assert f"model.{field}={value}: must be" in refused(capsys, source, tmp_path / "out.pt")


def test_a_converted_dimamba_exports_to_the_hubs_folder_and_back(tmp_path, transformers):
    """transformers loads the folder's own code: the same logits, also of padded rows."""
    run(dimamba(tmp_path / "source.ckpt", 35), tmp_path / "ckpt.pt")
    run(tmp_path / "ckpt.pt", tmp_path / "hub")
    run(tmp_path / "hub", tmp_path / "back.pt")
    model, cfg = load(tmp_path / "ckpt.pt")
    again, _ = load(tmp_path / "back.pt")
    x = ids(35)
    assert torch.equal(model(x, T_UP), again(x, T_UP))
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(
        str(tmp_path / "hub"), trust_remote_code=True
    )
    real = torch.arange(x.shape[1]) < torch.tensor([[12], [7]])
    with torch.no_grad():
        got = theirs(input_ids=x, attention_mask=real.long(), timesteps=T_UP).logits
    torch.testing.assert_close(got[0], model(x[:1], T_UP[:1])[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[1, :7], model(x[1:, :7], T_UP[1:])[0], atol=1e-5, rtol=1e-5)
