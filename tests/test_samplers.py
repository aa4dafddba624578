"""Every sampler's law against the enumerated one, with a hostile, time-dependent denoiser."""

import math
from collections import deque

import pytest
import torch
from world import (
    MASK,
    TEXTS,
    L,
    V,
    ancestral_law,
    chi_square_p,
    exact_model,
    hostile_model,
    random_joint,
    tiny,
)

from diffusion import (
    SAMPLERS,
    SCHEDULES,
    categorical,
    denoiser,
    reveal_at,
    row_generators,
    time_at,
    with_temperature,
    with_top_p,
)

CANVASES = {  # all masks, prompt, suffix, hole, two holes
    "empty": [MASK, MASK, MASK],
    "prompt": [1, MASK, MASK],
    "suffix": [MASK, MASK, 2],
    "hole": [0, MASK, 2],
    "holes": [MASK, 1, MASK],
}
N = 20_000


def last(frames):
    return deque(frames, maxlen=1).pop()


def law_of(sampler, model, canvas, schedule, steps):
    """The enumerated law: `steps` ancestral steps, or for first_hitting so many that it is the limit."""
    return ancestral_law(model, canvas, schedule, 2000 if sampler == "first_hitting" else steps)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "geometric"])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_law_equals_the_enumerated_one(sampler, schedule, steps):
    """All canvases in one batch, so that rows with different prompts and events ride together."""
    model, canvases = hostile_model(), torch.tensor(list(CANVASES.values()))
    x = canvases.repeat(N, 1)
    texts = last(SAMPLERS[sampler](denoiser(model), x, steps, tiny(schedule=schedule)))
    for i, name in enumerate(CANVASES):
        p = chi_square_p(texts[i :: len(CANVASES)], law_of(sampler, model, canvases[i], schedule, steps))
        assert p > 1e-4, f"{name}: p = {p:.2g}"


def test_the_law_test_tells_step_counts_apart():
    """With a time-dependent denoiser 4 steps, 5 steps and infinitely many have different laws."""
    model, canvas = hostile_model(), torch.tensor(CANVASES["empty"])
    texts = last(SAMPLERS["ddpm_cache"](denoiser(model), canvas.repeat(N, 1), 4, tiny()))
    assert chi_square_p(texts, ancestral_law(model, canvas, "linear", 4)) > 1e-4
    for steps in (3, 5, 2000):
        assert chi_square_p(texts, ancestral_law(model, canvas, "linear", steps)) < 1e-6


@pytest.mark.parametrize("sampler", ["first_hitting"])
def test_the_exact_denoiser_gives_the_joint(sampler):
    joint = random_joint()
    x = torch.full((N, L), MASK)
    texts = last(SAMPLERS[sampler](denoiser(exact_model(joint)), x, 1, tiny()))
    assert chi_square_p(texts, joint.flatten()) > 1e-4


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_known_tokens_never_change_and_no_mask_survives(sampler, schedule):
    x = torch.randint(0, V + 1, (500, L))
    canvas, before = x.clone(), x
    for frame in SAMPLERS[sampler](denoiser(hostile_model()), x, 5, tiny(schedule=schedule)):
        assert (frame == before)[before != MASK].all()
        before = frame
    assert (before < V).all() and (before == canvas)[canvas != MASK].all()
    assert (x == canvas).all()  # frames are new tensors, the caller's canvas is not written to


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_full_canvas_needs_no_call(sampler):
    def nobody(x, t, at):
        raise AssertionError("called")

    assert list(SAMPLERS[sampler](nobody, torch.zeros(4, L, dtype=torch.long), 5, tiny())) == []


def counting(V=5):
    calls = []

    def denoise(x, t, at):
        calls.append(int(at.sum()))
        return torch.full((int(at.sum()), V), -math.log(V))

    return denoise, calls


@pytest.mark.parametrize("B", [1, 16])
@pytest.mark.parametrize("steps, length", [(1000, 32), (16, 64)])
def test_ddpm_cache_calls_at_most_min_of_steps_and_length(B, steps, length):
    cfg = tiny()
    x = torch.full((B, length), MASK)
    denoise, calls = counting(V)
    last(SAMPLERS["ddpm_cache"](denoise, x, steps, cfg))
    assert len(calls) <= min(steps, length) and sum(calls) == B * length  # the head: once per position, ever
    denoise, calls = counting(V)
    last(SAMPLERS["first_hitting"](denoise, x, steps, cfg))
    assert len(calls) == length and set(calls) == {B}


def test_steps_may_be_astronomically_many():
    """No table of steps is made, and neighbouring events do not merge: one token per call, as in the limit."""
    denoise, calls = counting(V)
    last(SAMPLERS["ddpm_cache"](denoise, torch.full((4, 64), MASK), 2**31 - 1, tiny()))
    assert len(calls) == 64 and set(calls) == {4}


def test_time_is_each_rows_own():
    """The times a row's calls see are those of its own events, from 1 down."""
    seen = []

    def denoise(x, t, at):
        seen.append(t)
        return torch.full((int(at.sum()), V), -math.log(V))

    time = torch.tensor([[0.9, 0.1, 0.5], [0.3, 0.3, 0.3]])
    last(reveal_at(denoise, torch.full((2, 3), MASK), time, tiny(), None))
    assert torch.stack(seen).tolist() == torch.tensor([[0.9, 0.3], [0.5, 0.0], [0.1, 0.0]]).tolist()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_row_does_not_depend_on_its_batch(sampler):
    model = denoiser(hostile_model())
    run = lambda rows: last(
        SAMPLERS[sampler](model, torch.full((len(rows), L), MASK), 6, tiny(), row_generators(7, rows))
    )
    together = run(range(64))
    assert len(together.unique(dim=0)) > 5
    assert all((run([i])[0] == together[i]).all() for i in range(64))


def test_denoiser_skips_rows_in_which_nothing_is_asked():
    rows = []

    def model(x, t, at):
        rows.append(len(x))
        return hostile_model()(x, t, at)

    at = torch.zeros(5, L, dtype=torch.bool)
    at[1, 2] = at[3, 0] = at[3, 1] = True
    x, t = torch.randint(0, V + 1, (5, L)), torch.rand(5)
    got = denoiser(model)(x, t, at)
    assert rows == [2]
    torch.testing.assert_close(got, hostile_model()(x, t, at), check_dtype=False)


def test_categorical_is_exact_in_the_tails():
    """A token of probability 1e-9 is drawn when u says so; one of probability zero never is."""
    log_p = torch.tensor([[1 - 1e-9, 1e-9]], dtype=torch.float64).log()
    assert categorical(log_p, torch.tensor([1 - 2e-9], dtype=torch.float64)).item() == 0
    assert categorical(log_p, torch.tensor([1 - 0.5e-9], dtype=torch.float64)).item() == 1
    log_p = torch.tensor([[0, 0.25, 0, 0.75, 0]]).log()
    u = torch.tensor([0.0, 0.2499, 0.2501, 0.99999999999], dtype=torch.float64)
    assert categorical(log_p.repeat(4, 1), u).tolist() == [1, 1, 3, 3]


def test_temperature_and_top_p():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    denoise = lambda x, t, at: p.log()
    hot = with_temperature(denoise, 2.0)(None, None, None).exp()
    torch.testing.assert_close(hot.float(), p.sqrt() / p.sqrt().sum())
    for cold in (0, 1e-300, 1e-42, 1e-6):
        assert with_temperature(denoise, cold)(None, None, None).exp().tolist() == [[1, 0, 0, 0]]
    for top_p, kept in ((0.4, 1), (0.51, 2), (0.8, 2), (0.81, 3), (1.0, 4)):
        want = p * (torch.arange(4) < kept)
        torch.testing.assert_close(with_top_p(denoise, top_p)(None, None, None).exp(), want / want.sum())
    shuffled = torch.tensor([2, 0, 3, 1])
    cut = with_top_p(lambda x, t, at: p[:, shuffled].log(), 0.6)(None, None, None).exp()
    torch.testing.assert_close(cut, torch.tensor([[0.0, 0.625, 0.0, 0.375]]))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_unmasking_times_follow_the_schedule(schedule):
    """first_hitting's times: the masked fraction at them is uniform, its order statistics those of uniforms."""
    u = torch.rand(50_000, 2, dtype=torch.float64)
    t = time_at(schedule, u).amax(-1)  # first of two to be revealed
    below = (t < time_at(schedule, torch.tensor(0.5))).double().mean().item()
    assert abs(below - 0.25) < 4 * (0.25 * 0.75 / 50_000) ** 0.5
    assert len(TEXTS) == 27
