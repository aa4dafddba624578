"""Training batches: data and noise are pure functions of (seed, step, row)."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_run, write_answers, write_padded_rows

import train
from configs import as_ar
from data import batches
from data.corpus import GIVEN, read_split, training_rows
from diffusion import LOSSES, alpha
from model import DiT

ALL = np.arange(8)  # the rows of a batch


@pytest.fixture
def cfg(corpus, tmp_path):
    return replace(tiny_run(corpus), out_dir=str(tmp_path / "run"))


def reader(cfg):
    """read(step, rows=ALL, **fields) -> x0, maskable, t, xt, weight."""
    ids, meta = read_split(cfg.data, "train", cfg)
    return lambda step, rows=ALL, **fields: batches.batch(
        ids, meta, replace(cfg, **fields), step, np.asarray(rows)
    )


def test_a_batch_is_a_pure_function_of_seed_step_and_row(cfg):
    read = reader(cfg)
    x0, maskable, t, xt, weight = whole = read(5)
    for rows in ([3], [7, 1], [0, 2, 4, 6]):
        assert all(torch.equal(a[rows], b) for a, b in zip(whole, read(5, rows)))
    assert ((xt == x0) | (xt == cfg.mask_id)).all() and maskable.all() and (weight == 1).all()
    for other in (read(5, seed=2), read(6)):
        assert not torch.equal(other[0], x0) and not torch.equal(other[2], t)


def test_times_are_stratified_over_the_batch_unless_iid(cfg):
    read = reader(cfg)
    assert (torch.floor(read(5)[2] * 8) == torch.arange(8)).all()
    t = read(5, time_draw="importance", t_min=1e-3)[2]
    assert (torch.floor((1 - t.log() / math.log(1e-3)) * 8) == torch.arange(8)).all()
    iid = torch.cat([read(step, time_draw="iid")[2] for step in range(40)])
    in_its_stratum = torch.floor(iid * 8) == torch.arange(8).repeat(40)
    assert in_its_stratum.double().mean() < 1 / 8 + 4 * (7 / 64 / 320) ** 0.5
    assert abs(iid.mean() - 0.5) < 4 / (12 * 320) ** 0.5


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_batches_are_masked_by_the_schedule(cfg, schedule):
    read, masked, wanted = reader(replace(cfg, schedule=schedule, batch_size=4)), 0.0, 0.0
    for step in range(150):
        _, _, t, xt, _ = read(step, range(4))
        masked += (xt == cfg.mask_id).double().mean().item() / 150
        wanted += (1 - alpha(schedule, t)).mean().item() / 150
    assert abs(masked - wanted) < 4 * 0.5 / math.sqrt(150 * 4 * 32)


def test_padding_is_masked_but_not_counted_and_every_token_counts_the_same(cfg, tmp_path):
    """Whatever the length of its row, and however the batch is split."""
    write_padded_rows(tmp_path / "padded")
    cfg = replace(cfg, data=str(tmp_path / "padded"))
    read, device, parameters = reader(cfg), torch.device("cpu"), []
    x0, counted, t, xt, _ = read(0)
    assert (counted == (x0 != 0)).all() and not counted.all()
    padding = torch.cat([read(step)[3][~read(step)[1]] for step in range(20)])
    assert 0.4 < (padding == cfg.mask_id).double().mean() < 0.6  # as all tokens, over all times
    torch.manual_seed(0)
    nats = LOSSES["mdlm"](DiT(cfg), x0, counted, cfg, t, xt)
    want = nats.sum().item() / counted.sum().item()
    for micro in (8, 2):
        torch.manual_seed(0)
        model = DiT(cfg)
        parts = [read(0, range(i, i + micro)) for i in range(0, 8, micro)]
        loss, _ = train.train_step(model, train.make_optimizers(model, cfg), parts, 1, cfg, device)
        parameters.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert loss.item() == pytest.approx(want, rel=1e-5)
    torch.testing.assert_close(*parameters, rtol=1e-4, atol=1e-5)


def test_answers_and_padding_are_masked_and_answers_counted(cfg, tmp_path):
    write_answers(tmp_path / "sft")
    cfg = replace(cfg, data=str(tmp_path / "sft"), bos=True)
    ids, meta = read_split(cfg.data, "train", cfg)
    stored = torch.from_numpy(training_rows(ids, meta, cfg, ALL).astype(np.int64))
    x0, counted, _, xt, _ = reader(cfg)(0)
    assert (counted == (stored < GIVEN)).all() and (x0 == stored % GIVEN).all() and x0.max() < 27
    prompt = ~counted & (counted.flip(-1).cumsum(-1).flip(-1) > 0)
    assert (xt == x0)[prompt].all() and (xt == cfg.mask_id)[counted].any()
    assert (xt == cfg.mask_id)[~counted & ~prompt].any()  # padding does not tell the length


def test_prompt_dropout_masks_whole_prompts_and_changes_no_answer(cfg, tmp_path):
    """Of a share of the rows; never BOS, and the masks of answers and padding stay as they are."""
    write_answers(tmp_path / "sft")
    read = reader(replace(cfg, data=str(tmp_path / "sft"), bos=True))
    position, dropped = torch.arange(32), []
    for step in range(40):
        _, m, _, y, _ = read(step, prompt_dropout=0.3)
        prompt = ~m & (position > 0) & (position <= m.int().argmax(-1, keepdim=True))
        masked = y == cfg.mask_id
        assert ((masked & prompt).any(-1) == (masked | ~prompt).all(-1)).all()
        assert not masked[:, 0].any()
        dropped.append((masked & prompt).any(-1))
        _, _, _, plain, _ = read(step)
        assert torch.equal((plain == cfg.mask_id) & ~prompt, masked & ~prompt)
    assert abs(torch.cat(dropped).double().mean() - 0.3) < 4 * (0.21 / 320) ** 0.5


def cut(cfg, step, rows):
    """(the batch, its list of batches with short rows)."""
    whole = reader(cfg)(step, rows)
    return whole, batches.shorten(whole, cfg, step, np.asarray(rows))


@pytest.mark.parametrize("bos", [False, True])
def test_short_rows_are_cut_at_random_and_lose_no_token(cfg, bos):
    """SMDM's stochastic length: the same tokens, masks and times in rows of every length."""
    cfg = replace(as_ar(cfg) if bos else cfg, bos=bos, short_rows=0.5)
    flat = lambda batches, i: torch.cat([b[i].reshape(-1) for b in batches]).sort().values
    lengths, rows_cut = set(), 0
    for step in range(30):
        whole, parts = cut(cfg, step, ALL)
        lengths |= {b[0].shape[1] for b in parts}
        rows_cut += 8 - sum(len(b[0]) for b in parts if b[0].shape[1] == 32)
        for i in (0, 3) if not bos else (0,):  # x0, and the masks
            assert torch.equal(flat(parts, i), flat([whole], i))
        for x, m, t, y, weight in parts:
            assert len(x) == len(m) == len(t) == len(y) == len(weight) and (y == x)[~m].all()
            assert m[:, 1:].all() and (m[:, 0] != bos).all()
            assert x.shape[1] == 32 or t.unique().numel() == 1 and t[0] in whole[2]
    assert abs(rows_cut - 120) < 4 * 60**0.5 and len(lengths) > 25


def test_the_cuts_of_a_row_do_not_depend_on_its_batch(cfg):
    cfg = replace(cfg, short_rows=0.5)
    short = lambda step, rows: [b[0] for b in cut(cfg, step, rows)[1] if b[0].shape[1] < 32]
    for step in range(10):
        together, one_by_one = short(step, [2, 5]), [*short(step, [2]), *short(step, [5])]
        assert len(together) == len(one_by_one)
        assert all(torch.equal(a, b) for a, b in zip(together, one_by_one))


def test_processes_share_a_batch_and_each_micro_batch_has_all_strata_of_time(cfg):
    ids, meta = read_split(cfg.data, "train", cfg)
    cfg = replace(cfg, batch_size=24, micro_batch=4)
    whole = reader(cfg)(3, range(24))
    shares = [batches.micro_batches(ids, meta, cfg, 3, rank, 2) for rank in range(2)]
    assert [[len(b[0]) for b in share] for share in shares] == [[4, 4, 4]] * 2
    for i, tensor in enumerate(whole):  # strided: rows rank, rank + 2 x 3, ...
        parts = torch.stack([torch.stack([b[i] for b in share]) for share in shares])
        assert torch.equal(parts.permute(2, 1, 0, *range(3, parts.ndim)).flatten(0, 2), tensor)
