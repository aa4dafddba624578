import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from configs import Config
from data.corpus import finish, partial_of

SHARED = (
    Path(__file__).parents[2] / "shared"
)  # real data for tests; absent outside the developers' machines
if (SHARED / "tiktoken").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken"))

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


LETTERS = " abcdefghijklmnopqrstuvwxyz"


def make_corpus(folder, characters=LETTERS, wrap=0, n=4000):
    """A small corpus of made-up words, as prepare.py would write it."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list(characters[1:]), rng.integers(2, 6))) for _ in range(12)]
    text = " ".join(rng.choice(words, n))
    ids = np.array([characters.index(c) for c in text], np.uint16)[: n // (wrap or 1) * (wrap or 1)]
    cut = {"train": ids, "val": ids[: n // 5], "test": ids[n // 5 : n // 2]}
    partial_of(folder).mkdir(parents=True)
    for split, part in cut.items():
        part.tofile(partial_of(folder) / f"{split}.bin")
    spec = {"kind": "char", "characters": characters}
    finish(folder, "words", spec, len(characters), {s: len(p) for s, p in cut.items()}, wrap)
    return folder


def tiny_run(corpus):
    """A whole run in a second: every part of the loop happens in its 12 steps."""
    return Config(
        data=str(corpus), vocab_size=27, seq_len=32, n_layer=2, n_head=2, n_embd=32, cond_dim=8, steps=12,
        batch_size=8, micro_batch=8, lr=3e-3, warmup=2, eval_every=6, eval_windows=8, save_every=4, samples=1,
        dtype="float32", device="cpu",
    )  # fmt: skip


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus") / "words")


@pytest.fixture(scope="session")
def checkpoint(corpus, tmp_path_factory):
    """ckpt.pt of a model of characters that knows a little."""
    import train

    out = tmp_path_factory.mktemp("run")
    cfg = replace(
        tiny_run(corpus), steps=100, eval_every=1000, save_every=1000, muon_lr=0.02, samples=0
    )
    train.main(replace(cfg, out_dir=str(out)))
    return out / "ckpt.pt"
