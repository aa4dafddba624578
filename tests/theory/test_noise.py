"""Noise depends on seed and row, or on window and pass, and on nothing else."""

import numpy as np
import pytest
import torch
from world import Network, V, hostile_model, tiny

from configs import Config
from data import batches
from data.corpus import training_rows
from diffusion import philox, row_generators, uniform
from evaluate import bound, standard_error, widen


def test_no_row_of_any_seed_shares_its_noise_with_another():
    """32 bits of seed * 1,000,003 + row made row 1,000,003 of seed 0 equal to row 0 of seed 1."""
    pairs = [(0, 0), (0, 1), (1, 0), (0, 1_000_003), (1, 1), (2**31 - 1, 0), (0, 2**32), (7, 2**40)]
    first = [row_generators(seed, [row])[0].random() for seed, row in pairs]
    assert len(set(first)) == len(pairs)


def test_the_four_streams_of_one_key_differ():
    """Epochs, training, sampling and evaluation use the same keys."""
    values = [philox(5, 3, stream).random() for stream in range(4)]
    values += [philox(5, 3, 3, step=1).random()]
    assert len(set(values)) == 5
    assert batches.row_noise(5, 3, 1)[0] == values[1]


def test_an_epochs_windows_are_of_stream_zero():
    """The offset of its windows, then their order."""
    cfg = Config(vocab_size=1000, seq_len=10, seed=5)
    ids, windows = np.arange(1000, dtype=np.uint16), (1000 - 9) // 10
    rows = training_rows(ids, {"wrap": 0}, cfg, 3 * windows + np.arange(windows))
    rng = philox(5, 3, stream=0)
    offset, order = rng.integers(10), rng.permutation(windows)
    assert rows[:, 0].tolist() == (10 * order + offset).tolist()


def test_a_row_draws_only_while_it_has_masks():
    at = torch.tensor([[True, False], [False, False]])
    gen = row_generators(0, [4, 5])
    first, second = uniform(at, gen), uniform(~at, gen)
    alone = row_generators(0, [4])[0], row_generators(0, [5])[0]
    assert first[0].tolist() == alone[0].random(2).tolist() and not first[1].any()
    assert second.tolist() == [alone[0].random(2).tolist(), alone[1].random(2).tolist()]


@pytest.mark.parametrize("fields", [dict(), dict(time_cond=True), dict(loss="sedd")])
@pytest.mark.parametrize("T", [0, 5])
def test_the_bound_does_not_depend_on_the_batch_size(fields, T):
    """Nor on which other windows are evaluated, but for the strata of their times."""
    ids = np.random.default_rng(0).integers(0, V, 3 * 51).astype(np.uint16)
    cfg, meta = tiny(**fields), dict(pad=None, given=False)
    model = Network(hostile_model())

    def run(size, **more):
        return bound(model, ids, meta, cfg, "ids", T, 2, batch_size=size, **more)

    want = run(51)
    for batch in (1, 7, 16):
        got = run(batch)
        assert got["nats"] == pytest.approx(want["nats"], rel=1e-6)
        assert got["se"] == pytest.approx(want["se"], rel=1e-5) and got["tokens"] == want["tokens"]
    assert abs(run(16, seed=1)["nats"] - want["nats"]) > 1e-4  # the noise is there


@pytest.mark.parametrize("windows, least", [(8, 0.93), (16, 0.93), (64, 0.93)])
def test_the_standard_error_covers_the_truth_with_few_windows(windows, least):
    """nats = trend in u + window effect + noise: +-1.96 errors cover the mean in 95 % of cases."""
    rng, covered, trials = np.random.default_rng(1), 0, 2000
    for _ in range(trials):
        u = (rng.permutation(windows) + rng.random(windows)) / windows
        nats = 3 + 2 * (u - 0.5) + rng.normal(0, 1, windows)
        se = standard_error(100 * nats[None], u[None], np.full(windows, 100.0))
        covered += abs(nats.mean() - 3) < 1.96 * se
    assert least < covered / trials < 0.985


def test_widen_is_students_t():
    for df, t in ((4, 2.7764), (12, 2.1788), (60, 2.0003), (10**6, 1.9600)):
        assert widen(df) * 1.959964 == pytest.approx(t, rel=3e-3)
