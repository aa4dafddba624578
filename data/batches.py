"""Training batches. What a row holds and how it is masked is a pure function of (seed, step, row):
so resuming needs no state, and another number of GPUs sees the same data with the same noise.
"""

import numpy as np
import torch

from common import fail
from data.corpus import read_meta, training_rows, unpack
from diffusion import TIME_DRAWS, philox


def row_noise(seed, index, n):
    """n uniforms of training row `index`, which can be drawn in any order."""
    return philox(seed, index, stream=1).random(n)


def batch(ids, meta, cfg, step, rows):
    """Rows `rows` (N,) of the global batch of `step`: x0, counted (N, L), t (N,), xt (N, L) and
    weight (N,). Maskable tokens are masked; the loss is taken on the counted ones among them."""
    stored = training_rows(ids, meta, cfg, step * cfg.batch_size + rows)
    x0, maskable, counted = unpack(stored, meta, cfg)
    noise = [row_noise(cfg.seed, step * cfg.batch_size + row, cfg.seq_len + 4) for row in rows]
    u = torch.from_numpy(np.stack(noise))  # the time, L positions, two for `shorten`, the prompt
    time = u[:, 0]
    if cfg.time_draw != "iid":  # one in each stratum of the global batch
        time = (torch.from_numpy(rows) + time) / cfg.batch_size
    t, xt, weight = TIME_DRAWS[cfg.time_draw](x0, maskable, cfg, time, u[:, 1:-3])
    if cfg.prompt_dropout:
        dropped = u[:, -1:] < cfg.prompt_dropout
        prompt = ~maskable & (torch.arange(cfg.seq_len) >= cfg.bos)
        xt = xt.masked_fill(prompt & dropped, cfg.mask_id)
    return x0, counted, t, xt, weight


def shorten(tensors, cfg, step, rows):
    """A batch as a list of batches with the same tokens: a share short_rows of the rows is cut,
    each into rows of a random length l, uniform on 1 .. seq_len, and the remainder. (SMDM's
    stochastic length, arXiv 2410.18514, discards all but the first l tokens.) t, masks and weight
    stay those of the long row."""
    noise = [row_noise(cfg.seed, step * cfg.batch_size + row, cfg.seq_len + 3)[-2:] for row in rows]
    cut = torch.tensor([coin < cfg.short_rows for coin, _ in noise])
    batches = [tuple(a[~cut] for a in tensors)] if not cut.all() else []
    for i in cut.nonzero()[:, 0].tolist():
        x0, counted, t, xt, weight = (a[i : i + 1] for a in tensors)
        l = 1 + cfg.bos + int(noise[i][1] * (cfg.seq_len - cfg.bos))
        whole = cfg.seq_len // l * l
        for part, length in ((slice(whole), l), (slice(whole, None), cfg.seq_len - whole)):
            if length:
                x, c, y = (a[:, part].reshape(-1, length) for a in (x0, counted, xt))
                first = torch.arange(length) < cfg.bos  # every row has a given first token
                c, y = c & ~first, torch.where(first, x, y)
                batches.append((x, c, t.expand(len(x)), y, weight.expand(len(x))))
    return batches


def split_batch(cfg, world):
    """(accumulation steps, rows per forward): batch_size = world x accumulation x rows."""
    if cfg.batch_size % world:
        fail(f"batch_size={cfg.batch_size}: must be a multiple of the number of processes, {world}")
    rows = cfg.batch_size // world
    micro = min(cfg.micro_batch, rows)
    if rows % micro:
        fail(f"batch_size={cfg.batch_size}: micro_batch={micro} does not divide {rows} rows each")
    return rows // micro, micro


def steps_of(epochs, cfg):
    """The optimiser steps in which a run sees its training rows so many times, at least one."""
    sizes = read_meta(cfg.data)["splits"]
    if "train" not in sizes:
        fail(f"{cfg.data}: has no split train")
    return max(1, round(epochs * (sizes["train"]["tokens"] // cfg.seq_len) / cfg.batch_size))


def micro_batches(ids, meta, cfg, step, rank=0, world=1, pin=False):
    """One process's share of the global batch of `step`: a list with an item per forward. pin: in
    memory from which a GPU copies while it computes."""
    parts, _ = split_batch(cfg, world)
    rows = [np.arange(i * world + rank, cfg.batch_size, parts * world) for i in range(parts)]
    batches = [batch(ids, meta, cfg, step, r) for r in rows]  # strided: each has all strata of t
    if cfg.short_rows:
        batches = [b for r, whole in zip(rows, batches) for b in shorten(whole, cfg, step, r)]
    return [tuple(a.pin_memory() for a in b) for b in batches] if pin else batches
