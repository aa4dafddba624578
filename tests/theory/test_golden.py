"""Golden runs: from a seed to the losses of the first steps, for every loss and way to draw times.

A change of these numbers changes what a seed means: batches, noise, initialisation, loss or update.
Such a change must say why, raise the version of checkpoints if runs can no longer resume, and
renew the numbers: GOLDEN=print python -m pytest -n 0 -s tests/theory/test_golden.py

The numbers are exact where MADE_ON names the torch, the processor's maker and its vector units.
Elsewhere kernels add in another order, and the numbers agree to a relative 1e-5, or 1e-3 with Muon,
which multiplies in bfloat16 on a CPU that has it. That finds a change of meaning, not of rounding.
"""

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from configs import Config, as_ar, as_d3pm, as_sedd
from data.batches import micro_batches
from diffusion import philox

TINY = Config(
    vocab_size=27, seq_len=32, n_layer=2, n_head=2, n_embd=32, cond_dim=8, steps=5, batch_size=8,
    micro_batch=4, lr=3e-3, warmup=0, device="cpu", dtype="float32", init="smdm", seed=3,
)  # fmt: skip
RUNS = {
    "mdlm, two optimizers": replace(TINY, muon_lr=0.02),
    "mdlm, iid times, cosine": replace(TINY, time_draw="iid", schedule="cosine"),
    "mdlm, counts, bell, short rows": replace(
        TINY, time_draw="counts", time_law="bell", short_rows=0.3
    ),
    "mdlm, importance": replace(TINY, time_draw="importance", t_min=1e-3),
    "sedd": as_sedd(TINY),
    "d3pm": as_d3pm(TINY),
    "ar, dropout": as_ar(replace(TINY, dropout=0.1)),
}
MADE_ON = "torch 2.13.0, AuthenticAMD, AVX512"
GOLDEN = {  # losses of the steps, then the sum of the averaged weights
    "mdlm, two optimizers": [
        3.8162283897399902, 3.6408917903900146, 2.9707651138305664,
        3.386803150177002, 3.5595834255218506, 199.08689944221965,
    ],
    "mdlm, iid times, cosine": [
        2.6998050212860107, 4.796592712402344, 3.1346652507781982,
        4.020267963409424, 4.428531169891357, 198.97068112993247,
    ],
    "mdlm, counts, bell, short rows": [
        3.508104085922241, 3.3893990516662598, 3.1446681022644043,
        3.1514170169830322, 3.1489028930664062, 195.97775314725732,
    ],
    "mdlm, importance": [
        3.3442931175231934, 2.8256936073303223, 3.0167415142059326,
        3.605886459350586, 3.0559234619140625, 198.0596506890003,
    ],
    "sedd": [
        3.8435580730438232, 3.578516960144043, 2.8728413581848145,
        3.329805374145508, 3.4958770275115967, 195.57212046860172,
    ],
    "d3pm": [
        7.687614440917969, 6.724968433380127, 5.683416366577148,
        5.99396276473999, 5.853264808654785, 204.7732037610549,
    ],
    "ar, dropout": [
        3.438016653060913, 3.223196268081665, 3.1095144748687744,
        3.287653923034668, 3.221245527267456, 185.35492908830344,
    ],
}  # fmt: skip


def name_machine():
    cpuinfo = Path("/proc/cpuinfo")
    maker = re.search(r"vendor_id\s*: (\S+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    version = str(torch.__version__).partition("+")[0]
    return f"torch {version}, {maker and maker[1]}, {torch.backends.cpu.get_cpu_capability()}"


def run(cfg):
    """The losses of the first steps, from made-up ids."""
    ids = (27 * philox(7, 0, stream=0).random(2000) ** 2).astype(np.uint16)
    meta = dict(wrap=0, pad=None, given=False)
    model, ema, optimizers = train.build(cfg, meta, torch.device("cpu"))
    losses = []
    for step in range(cfg.steps):
        torch.manual_seed(step)  # of dropout
        batches = micro_batches(ids, meta, cfg, step)
        loss, _ = train.train_step(model, optimizers, batches, step, cfg, torch.device("cpu"))
        train.update_ema(ema, model, step + 1, cfg)
        losses.append(float(loss))
    return [*losses, float(sum(p.double().sum() for p in ema.parameters()))]


@pytest.mark.parametrize("name", RUNS)
def test_a_seed_keeps_its_meaning(name):
    numbers = run(RUNS[name])
    if os.environ.get("GOLDEN") == "print":
        print(f'\n    "{name}": {numbers},  # {name_machine()}')
        return
    if name_machine() == MADE_ON:
        assert numbers == GOLDEN[name]
    assert numbers == pytest.approx(GOLDEN[name], rel=1e-3 if RUNS[name].muon_lr else 1e-5)
