"""What a host would wait for, counted with pretended CUDA tensors. test_pretended_cuda.py runs this
script and reads its JSON line. A CPU tensor that meets a pretended CUDA one raises.
"""

import json
from dataclasses import replace

import numpy as np
import torch
from pretended_cuda import CUDA, DMode, FMode, clear, cuda_module, syncs

import train
from configs import Config, as_ar
from data.batches import batch
from evaluate import bound
from model import DiT
from sample import frames
from samplers import SAMPLERS

CFG = Config(
    vocab_size=50, seq_len=32, n_layer=2, n_head=2, n_embd=32, cond_dim=16, batch_size=4,
    micro_batch=2, ema=0.0,
)  # fmt: skip
RECIPES = {
    "mdlm": CFG,
    "time_cond": replace(CFG, time_cond=True),
    "sedd": replace(CFG, loss="sedd", time_cond=True),
    "d3pm": replace(CFG, loss="d3pm", T=10),
    "ar": as_ar(CFG),
    "counts": replace(CFG, time_draw="counts"),
    "muon": replace(CFG, muon_lr=0.01),
    "large logits": replace(CFG, vocab_size=400_000),
    "bfloat16": replace(CFG, dtype="bfloat16"),
}
META = dict(pad=None, given=False, wrap=False)
IDS = np.random.default_rng(0).integers(0, 50, 1024).astype(np.uint16)


def waits_of(work):
    """(result, the number of times that the host waits during work())."""
    clear()
    return work(), sum(syncs.values())


def build(cfg, training=False):
    torch.manual_seed(0)
    return cuda_module(DiT(cfg)).train(training).requires_grad_(training)


def step(cfg):
    """(loss on pretended CUDA, loss on the CPU, waits) of one update in two micro-batches."""
    batches = [batch(IDS, META, cfg, 0, np.arange(i, i + 2)) for i in (0, 2)]
    losses = []
    for device, to in ((CUDA, cuda_module), (torch.device("cpu"), lambda model: model)):
        torch.manual_seed(0)
        model = to(DiT(cfg))
        optimizers = train.make_optimizers(model, cfg)
        for group in (g for o in optimizers for g in o.param_groups):
            group["fused"] = False  # no kernel runs here
        update = lambda m=model, o=optimizers, d=device: train.train_step(m, o, batches, 0, cfg, d)
        (loss, _), waits = waits_of(update)
        losses.append((loss.tolist(), waits))
    return losses[0][0], losses[1][0], losses[0][1]


def sampling(name):
    """(frames, waits) of two texts by a sampler."""
    cfg = RECIPES["ar" if name == "ar" else "mdlm"]
    canvas = torch.full((cfg.seq_len,), cfg.mask_id)
    given = dict(lucky=1) if name == "llada" else {}
    sampling = frames(build(cfg), cfg, canvas, range(2), 200, name, sampler_options=given)
    return waits_of(lambda: len([*sampling]) - 1)


def main():
    with torch.autograd.set_multithreading_enabled(False), FMode(), DMode():
        evaluate = lambda: bound(build(CFG), IDS, META, CFG, "", batch_size=8, passes=2)["forwards"]
        result = dict(
            train={name: step(cfg) for name, cfg in RECIPES.items()},
            evaluate=waits_of(evaluate),
            sample={name: sampling(name) for name in SAMPLERS},
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
