"""Every sampler's law against the enumerated one, with a hostile, time-dependent denoiser."""

import math
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import world
from world import (
    MASK,
    SCORES,
    TEXTS,
    L,
    V,
    ancestral_law,
    by_schedule,
    chi_square_p,
    exact_model,
    hostile_model,
    hostile_scores,
    index,
    kolmogorov_p,
    last,
    law_of_choice,
    left_to_right_law,
    ones,
    pooled_p,
    predictions,
    random_joint,
    remasking_states,
    step_law,
    tiny,
    tiny_ar,
)

from diffusion import (
    SCHEDULES,
    alpha,
    categorical,
    dalpha,
    denoiser,
    reveal_at,
    row_generators,
    uniform,
)
from model import DiT
from sample import end_id
from samplers import (
    OPTIONS,
    SAMPLERS,
    STEPLESS,
    analytic,
    cached_denoiser,
    default_options,
    semi_ar,
    with_greedy_end,
    with_guidance,
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
ALL = torch.tensor(list(CANVASES.values()))
N = 20_000


def sample(sampler, model, canvas, steps, cfg, gen=None, n=N, **options):
    """n texts of each canvas, all in one batch: a sampler's rows differ in prompts and events."""
    x = canvas.repeat(n, 1)
    return last(SAMPLERS[sampler](denoiser(model, cfg), x, steps, cfg, gen, **options))


def assert_laws(texts, laws, names=tuple(CANVASES)):
    """texts (n x canvases, L) of `sample` have the law of their canvas."""
    for i, (name, law) in enumerate(zip(names, laws, strict=True)):
        p = chi_square_p(texts[i :: len(names)], law)
        assert p > 1e-4, (
            f"{name}: p = {p:.2g}; a sampler whose law is not ddpm's needs its law in LAWS"
        )


def even_denoiser(V=5):
    """A denoise that finds all tokens equally likely, and the list of its numbers of positions."""
    calls = []

    def denoise(x, t, at):
        calls.append(int(at.sum()))
        return torch.full((int(at.sum()), V), -math.log(V))

    return denoise, calls


# --------------------------------------------------------------------------------------------------
# Laws, enumerated: law(model, canvas, schedule, steps) -> (..., 27)


def clean_row(p):
    """The last step: no MASK is left, p (64, L, V) need not be normalised."""
    return F.pad(p / p.sum(-1, keepdim=True), (0, 1))


def staggered_row(p, alpha_s, alpha_t):
    """SEDD's analytic step as its paper writes it, for scores p^ r: the score staggered
    by the change of sigma, times the transposed transition's row of MASK. Probabilities
    below zero are never drawn."""
    score = torch.cat((p * alpha_t / (1 - alpha_t), torch.ones_like(p[..., :1])), -1)
    ratio = alpha_s / alpha_t  # e^(sigma_t - sigma_s)
    staggered = ratio * score
    staggered[..., V] += (1 - ratio) * score.sum(-1)
    transition = torch.full((V + 1,), 1.0, dtype=torch.float64) * (1 - 1 / ratio)
    transition[V] += 1 / ratio
    chance = (staggered * transition).clamp(min=0)
    return chance / chance.sum(-1, keepdim=True)


def analytic_law(model, canvas, schedule, steps):
    grid = alpha(schedule, torch.arange(steps + 1, dtype=torch.float64) / steps).clamp(min=1e-13)

    def row(n):
        p = predictions(model, n / steps).exp() / V
        return staggered_row(p, grid[n - 1], grid[n]) if n else clean_row(p)

    return step_law(canvas, steps, row)


def euler_law(model, canvas, schedule, steps):
    """onehot + dt sigma' x reverse rate; the rate to y is the score of y, and
    to MASK minus their sum."""

    def row(n):
        p = predictions(model, n / steps).exp() / V
        if n == 0:
            return clean_row(p)
        t = torch.tensor(n / steps, dtype=torch.float64)
        a = alpha(schedule, t).clamp(min=1e-13)
        flow = -dalpha(schedule, t) / a * (p * a / (1 - a)) / steps
        chance = torch.cat((flow, 1 - flow.sum(-1, keepdim=True)), -1).clamp(min=0)
        return chance / chance.sum(-1, keepdim=True)

    return step_law(canvas, steps, row)


def masking_law(model, canvas, schedule, steps):
    """D3PM's ancestral steps from dense matrices, for a network that may predict MASK:
    q(x_s | x_t = MASK, x0) with x0 replaced by the network's V + 1 probabilities."""
    a = alpha(schedule, torch.arange(steps + 1, dtype=torch.float64) / steps)

    def row(n):
        x0 = predictions(model, n / steps, V + 1).exp()
        if n == 0:
            return clean_row(x0[..., :V])
        to_s = a[n - 1] * torch.eye(V + 1, dtype=torch.float64)
        to_s[:, V] += 1 - a[n - 1]  # (x0, x_s)
        s_to_mask = torch.full((V + 1,), 1.0, dtype=torch.float64) * (1 - a[n] / a[n - 1])
        s_to_mask[V] = 1
        joint = x0 @ to_s * s_to_mask
        return joint / joint.sum(-1, keepdim=True)

    return step_law(canvas, steps, row)


def threshold_law(threshold):
    count = lambda scores, *args: sum(score > threshold for score in scores)
    return law_of_choice(SCORES["confidence"], count)


def entropy_bound_law(gamma):
    """Keeps the largest k for which the sum of entropies minus the largest is at most gamma."""

    def count(scores, *args):
        excess = lambda first: -sum(first) - max(-s for s in first)
        return max(k for k in range(1, len(scores) + 1) if excess(scores[:k]) <= gamma)

    return law_of_choice(SCORES["entropy"], count)


def remdm_law(sigma):
    def law(model, canvas, schedule, steps):
        state = remasking_states(model, canvas, schedule, steps, sigma)[-1]
        assert state[index(TEXTS)].sum().item() == pytest.approx(1)
        return state[index(TEXTS)]

    return law


SIGMAS = {  # of ReMDM, for an eta: the limit -> sigma
    "remdm_cap": lambda eta: lambda limit: min(eta, limit),
    "remdm_rescale": lambda eta: lambda limit: eta * limit,
}
OPTION_LAWS = {  # sampler: the law for a value of its option
    "threshold": threshold_law,
    "entropy_bound": entropy_bound_law,
    "remdm_cap": lambda eta: remdm_law(SIGMAS["remdm_cap"](eta)),
    "remdm_rescale": lambda eta: remdm_law(SIGMAS["remdm_rescale"](eta)),
}


@cache  # takes seconds and does not depend on `steps`
def limit_laws(schedule):
    laws = ancestral_law(hostile_model(), ALL, schedule, 2000)
    return {tuple(canvas): law for canvas, law in zip(ALL.tolist(), laws)}


LAWS = {  # a sampler that is not here has the ancestral law
    "first_hitting": lambda model, canvas, schedule, steps: limit_laws(schedule)[*canvas.tolist()],
    "euler": lambda model, *args: euler_law(lambda x, t, at: model(x, t, at) + math.log(V), *args),
    **{name: law_of_choice(score, by_schedule) for name, score in SCORES.items()},
    "llada": law_of_choice(lambda p, v: p[v], by_schedule),  # the only one to see the token
    "ar": left_to_right_law,
    **{name: law(*default_options(SAMPLERS[name]).values()) for name, law in OPTION_LAWS.items()},
}


def laws_of(sampler, model, schedule, steps):
    """[law] of the sampler for ALL canvases."""
    law = LAWS.get(sampler, ancestral_law)
    return [law(model, canvas, schedule, steps) for canvas in ALL]


# --------------------------------------------------------------------------------------------------
# Samplers have their laws


@pytest.mark.parametrize("schedule", ["linear", "cosine", "geometric"])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_law_equals_the_enumerated_one(sampler, schedule, steps):
    texts = sample(sampler, hostile_model(), ALL, steps, tiny(schedule=schedule))
    assert_laws(texts, laws_of(sampler, hostile_model(), schedule, steps))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("per_call", [1, 2, 3])
@pytest.mark.parametrize("sampler", SCORES)
def test_orders_reveal_so_many_per_call(sampler, per_call, schedule):
    texts = sample(sampler, hostile_model(), ALL, 5, tiny(schedule=schedule), per_call=per_call)
    law = law_of_choice(SCORES[sampler], lambda scores, *args: per_call)
    assert_laws(texts, [law(hostile_model(), canvas, schedule, 5) for canvas in ALL])


def test_llada_is_confidence_at_temperature_0_only():
    """Draw for draw; at temperature 1 it has another law."""
    x, denoise = torch.full((500, L), MASK), denoiser(hostile_model(), tiny())
    greedy = with_temperature(denoise, 0)
    a, b = (list(SAMPLERS[s](greedy, x, 3, tiny())) for s in ("confidence", "llada"))
    assert len(a) == len(b) and all((p == q).all() for p, q in zip(a, b))
    texts = sample("llada", hostile_model(), ALL[:1], 3, tiny())
    assert chi_square_p(texts, LAWS["confidence"](hostile_model(), ALL[0], "linear", 3)) < 1e-6


@pytest.mark.parametrize("schedule", ["linear", "geometric"])
@pytest.mark.parametrize(
    "sampler, value",
    [
        ("threshold", 0.3), ("threshold", 0.6), ("entropy_bound", 0.4), ("entropy_bound", 1.0),
        ("remdm_cap", 0.3), ("remdm_cap", 1.0), ("remdm_rescale", 0.5), ("remdm_rescale", 1.0),
    ],
)  # fmt: skip
def test_law_follows_a_samplers_option(sampler, value, schedule):
    """And differs from the law of the default."""
    option = {name: value for name in default_options(SAMPLERS[sampler])}
    texts = sample(sampler, hostile_model(), ALL, 5, tiny(schedule=schedule), **option)
    law = OPTION_LAWS[sampler](value)
    assert_laws(texts, [law(hostile_model(), canvas, schedule, 5) for canvas in ALL])
    default = LAWS[sampler](hostile_model(), ALL[0], schedule, 5)
    assert chi_square_p(texts[:: len(ALL)], default) < 1e-6


def test_the_law_test_tells_step_counts_apart():
    """With a time-dependent denoiser 3, 4, 5 and infinitely many steps have different laws."""
    texts = sample("ddpm_cache", hostile_model(), ALL[:1], 4, tiny())
    law = lambda steps: ancestral_law(hostile_model(), ALL[0], "linear", steps)
    assert chi_square_p(texts, law(4)) > 1e-4
    for other in (law(3), law(5), limit_laws("linear")[*ALL[0].tolist()]):
        assert chi_square_p(texts, other) < 1e-6


def test_the_exact_denoiser_gives_the_joint():
    joint = random_joint()
    texts = sample("first_hitting", exact_model(joint), ALL[:1], 1, tiny())
    assert chi_square_p(texts, joint.flatten()) > 1e-4


@pytest.mark.parametrize("schedule", ["linear", "cosine", "geometric"])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("sampler", ["analytic", "euler"])
def test_sedds_samplers_have_the_law_of_its_dense_kernels(sampler, steps, schedule):
    """With scores that are not normalised, whose sum both samplers use, and
    noise removal at the end."""
    model, cfg = hostile_scores(), tiny(loss="sedd", schedule=schedule)
    law = {"analytic": analytic_law, "euler": euler_law}[sampler]
    assert_laws(sample(sampler, model, ALL, steps, cfg), law(model, ALL, schedule, steps))


def test_the_sum_of_the_scores_matters_to_sedds_samplers():
    model = hostile_scores()
    texts = sample("analytic", model, ALL[:1], 4, tiny(loss="sedd"))
    normalised = lambda *args: model(*args).log_softmax(-1)
    assert chi_square_p(texts, ancestral_law(normalised, ALL[0], "linear", 4)) < 1e-6


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddpm_has_d3pms_law_when_the_network_may_predict_mask(schedule):
    model = hostile_model(outputs=V + 1)
    cfg = tiny(loss="d3pm", T=4, zero_masking=False, schedule=schedule)
    assert_laws(sample("ddpm", model, ALL, 4, cfg), masking_law(model, ALL, schedule, 4))


def test_analytic_is_ddpm_draw_for_draw_when_scores_are_normalised():
    x, denoise = torch.full((500, L), MASK), denoiser(hostile_model(), tiny())
    run = lambda name: list(SAMPLERS[name](denoise, x, 7, tiny(), row_generators(0, range(500))))
    a, b = run("ddpm"), run("analytic")
    assert len(a) == len(b) and all((p == q).all() for p, q in zip(a, b))


# --------------------------------------------------------------------------------------------------
# When positions are revealed

MASKED = {  # schedule: the masked fraction at t, in closed form
    "linear": lambda t: t,
    "cosine": lambda t: 1 - torch.cos(math.pi / 2 * t),
}


def order_statistic(schedule, m, k):
    """The distribution function of the k-th largest of m times at which the masked fraction f is
    uniform: sum over j < k of C(m, j) (1 - f)^j f^(m - j)."""

    def cdf(t):
        f = MASKED[schedule](t)
        return sum(math.comb(m, j) * (1 - f) ** j * f ** (m - j) for j in range(k))

    return cdf


@pytest.mark.parametrize("with_generators", [False, True])
@pytest.mark.parametrize("schedule", MASKED)
def test_first_hittings_times_are_order_statistics(schedule, with_generators):
    """Call k of a row with m masks passes the k-th largest of m times and requests one position;
    all orders of the positions are equally likely."""
    times, order = [], []

    def denoise(x, t, at):
        times.append(t)
        order.append(at)
        return torch.full((int(at.sum()), V), -math.log(V))

    n = 4000 if with_generators else N
    x = torch.tensor([CANVASES["empty"], CANVASES["prompt"]]).repeat(n, 1)
    gen = row_generators(3, range(2 * n)) if with_generators else None
    last(SAMPLERS["first_hitting"](denoise, x, 1, tiny(schedule=schedule), gen))
    assert len(times) == L  # one call per mask of the emptiest canvas
    for row, m in ((0, 3), (1, 2)):
        for k in range(1, m + 1):
            assert kolmogorov_p(times[k - 1][row::2], order_statistic(schedule, m, k)) > 1e-4
            assert (order[k - 1][row::2].sum(-1) == 1).all()
    first, second = (at[::2].int().argmax(-1) for at in order[:2])
    counts = torch.bincount(3 * first + second)
    assert pooled_p(counts[counts > 0], torch.full((6,), n / 6, dtype=torch.float64)) > 1e-4


@pytest.mark.parametrize("B", [1, 16])
@pytest.mark.parametrize("steps, length", [(1000, 32), (16, 64)])
def test_ddpm_cache_calls_at_most_min_of_steps_and_length(B, steps, length):
    """And the head runs once per position; first_hitting makes a call per mask."""
    x = torch.full((B, length), MASK)
    denoise, calls = even_denoiser(V)
    last(SAMPLERS["ddpm_cache"](denoise, x, steps, tiny()))
    assert len(calls) <= min(steps, length) and sum(calls) == B * length
    denoise, calls = even_denoiser(V)
    last(SAMPLERS["first_hitting"](denoise, x, steps, tiny()))
    assert len(calls) == length and set(calls) == {B}


def test_steps_may_be_astronomically_many():
    """No table of steps is made, and neighbouring events do not merge: one token per call."""
    denoise, calls = even_denoiser(V)
    last(SAMPLERS["ddpm_cache"](denoise, torch.full((4, 64), MASK), 2**31 - 1, tiny()))
    assert len(calls) == 64 and set(calls) == {4}


def test_a_row_passes_the_times_of_its_own_events():
    seen = []

    def denoise(x, t, at):
        seen.append(t)
        return torch.full((int(at.sum()), V), -math.log(V))

    time = torch.tensor([[0.9, 0.1, 0.5], [0.3, 0.3, 0.3]])
    last(reveal_at(denoise, torch.full((2, 3), MASK), time, tiny(), None))
    assert torch.stack(seen).tolist() == torch.tensor([[0.9, 0.3], [0.5, 0.0], [0.1, 0.0]]).tolist()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_only_stepless_samplers_ignore_the_steps(sampler):
    denoise, x = denoiser(hostile_model(), tiny()), torch.full((400, L), MASK)
    gen = lambda: row_generators(0, range(400))
    one, nine = (last(SAMPLERS[sampler](denoise, x, steps, tiny(), gen())) for steps in (1, 9))
    assert (one == nine).all() == (sampler in STEPLESS)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_known_tokens_never_change_and_no_mask_survives(sampler, schedule):
    """Frames are new tensors: the caller's canvas is not written to."""
    x = torch.randint(0, V + 1, (500, L))
    canvas, before = x.clone(), x
    denoise, cfg = denoiser(hostile_model(), tiny()), tiny(schedule=schedule)
    for frame in SAMPLERS[sampler](denoise, x, 5, cfg):
        assert (frame == canvas)[canvas != MASK].all()
        stays = (frame == before) | (frame == MASK) if "remdm" in sampler else frame == before
        assert stays[before != MASK].all()
        before = frame
    assert (before < V).all() and (before == canvas)[canvas != MASK].all()
    assert (x == canvas).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_full_canvas_needs_no_call(sampler):
    def fail(x, t, at):
        raise AssertionError("called")

    assert list(SAMPLERS[sampler](fail, torch.zeros(4, L, dtype=torch.long), 5, tiny())) == []


# --------------------------------------------------------------------------------------------------
# Noise of rows


def test_rows_of_different_seeds_share_no_noise():
    at = torch.ones(40, 2, dtype=torch.bool)
    noise = torch.stack([uniform(at, row_generators(seed, range(40))) for seed in range(40)])
    assert noise.unique().numel() == noise.numel()
    part = uniform(at[:3], row_generators(7, [5, 0, 39]))
    assert torch.equal(part, noise[7, [5, 0, 39]])  # a row's noise depends on its number only


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_row_does_not_depend_on_its_batch(sampler):
    """Rows of all kinds of canvases in one batch, each with its generator; and window by window,
    where rows end at different times."""
    model = denoiser(hostile_model(), tiny())

    def run(rows):
        x = ALL[torch.tensor(rows) % len(ALL)]
        return last(SAMPLERS[sampler](model, x, 6, tiny(), row_generators(7, rows)))

    def run_long(rows, eos):
        x, gen = torch.full((len(rows), 9), MASK), row_generators(7, rows)
        windows = dict(window=3, stride=2, eos=eos)
        return last(semi_ar(model, x, 6, tiny(), gen, SAMPLERS[sampler], **windows))

    texts = 0
    for call in (run, *(partial(run_long, eos=eos) for eos in range(V))):
        together = call(list(range(40)))
        texts += len(together.unique(dim=0))
        assert all((call([i])[0] == together[i]).all() for i in range(40))
    assert texts > 15


# --------------------------------------------------------------------------------------------------
# ReMDM


@pytest.mark.parametrize("schedule", ["linear", "cosine", "geometric"])
@pytest.mark.parametrize(
    "sampler, eta", [("remdm_cap", 0.2), ("remdm_rescale", 0.6), ("remdm_rescale", 1.0)]
)
def test_remdm_keeps_the_marginals_and_has_the_law_of_its_steps(sampler, eta, schedule):
    """After every step, with the exact network of a joint, from nothing and from a prompt. A
    position that is not given is visible with probability alpha, as without remasking."""
    model, steps, cfg = exact_model(random_joint()), 4, tiny(schedule=schedule)
    for canvas in ALL[:2]:
        x = canvas.repeat(N, 1)
        frames = list(SAMPLERS[sampler](denoiser(model, cfg), x, steps, cfg, eta=eta))
        states = remasking_states(model, canvas, schedule, steps, SIGMAS[sampler](eta))
        assert len(frames) == len(states) == steps
        for n, (x, state) in enumerate(zip(frames, states)):
            s = torch.tensor(1 - (n + 1) / steps, dtype=torch.float64)
            shown = (state[:, None] * (world.CANVASES != MASK)).sum(0)[canvas == MASK]
            torch.testing.assert_close(shown, alpha(schedule, s).expand_as(shown))
            assert chi_square_p(x, state) > 1e-4


@pytest.mark.parametrize("sampler", ["remdm_cap", "remdm_rescale"])
def test_remdm_without_remasking_is_ddpm(sampler):
    texts = sample(sampler, hostile_model(), ALL, 4, tiny(), eta=0.0)
    assert_laws(texts, ancestral_law(hostile_model(), ALL, "linear", 4))


@pytest.mark.parametrize("name", ["hole", "prompt"])
def test_remdm_has_its_law_with_a_generator_per_row(name):
    """A row without masks still draws: its tokens may be masked again."""
    model, canvas = hostile_model(), torch.tensor(CANVASES[name])
    gen = row_generators(0, range(4000))
    texts = sample("remdm_rescale", model, canvas[None], 5, tiny(), gen, n=4000, eta=0.5)
    assert chi_square_p(texts, OPTION_LAWS["remdm_rescale"](0.5)(model, canvas, "linear", 5)) > 1e-4


def test_remdm_requests_only_what_it_reveals():
    """At most one call per step and none in a step that reveals nothing. A token that is masked
    again is drawn anew."""
    denoise, calls = even_denoiser(V)
    x, gen = torch.full((2, 40), MASK), row_generators(0, range(2))
    frames = [x, *SAMPLERS["remdm_rescale"](denoise, x, 50, tiny(), gen, eta=0.5)]
    pairs = list(zip(frames, frames[1:]))
    revealed = [int(((a == MASK) & (b != MASK)).sum()) for a, b in pairs]
    assert calls == [n for n in revealed if n] and len(calls) <= 50
    masked_again = sum(int(((a != MASK) & (b == MASK)).sum()) for a, b in pairs)
    assert masked_again > 40 and sum(revealed) == 2 * 40 + masked_again


def test_remdm_leaves_earlier_windows_as_they_are():
    """For a window, a prompt and the text of the window before it are given."""
    denoise, x = even_denoiser(V)[0], torch.full((50, 9), MASK)
    always = partial(SAMPLERS["remdm_rescale"], eta=1.0)
    before, remasked = x, 0
    for frame in semi_ar(denoise, x, 6, tiny(), None, always, window=6, stride=3):
        remasked += int(((before != MASK) & (frame == MASK)).sum())
        if (before[:, :6] != MASK).all():  # the first window is full: the second is being written
            assert (frame[:, :6] == before[:, :6]).all()
        before = frame
    assert remasked > 50 and (before != MASK).all()


# --------------------------------------------------------------------------------------------------
# Orders: tests/theory/test_orders.py has their likelihoods


@pytest.mark.parametrize(
    "sampler, option, sizes",
    [
        ("threshold", dict(threshold=0.0), [14]),
        ("threshold", dict(threshold=1.0), [14, 12, 10, 8, 7, 6, 5, 4, 3, 2, 1]),
        ("entropy_bound", dict(gamma=99.0), [14]),
        ("entropy_bound", dict(gamma=0.0), [14, 12, 10, 8, 7, 6, 5, 4, 3, 2, 1]),
        ("entropy_bound", dict(gamma=2 * math.log(V) + 1e-9), [14, 8, 5, 2]),  # three at a time
    ],
)
def test_options_lead_from_all_at_once_to_one_by_one(sampler, option, sizes):
    """Two rows of 11 and 3 masks with equally likely tokens; the shorter row leaves the
    batch when it is done."""
    denoise, calls = even_denoiser(V)
    x = torch.where(torch.arange(11) < torch.tensor([[11], [3]]), MASK, 0)
    last(SAMPLERS[sampler](denoise, x, 7, tiny(), **option))
    assert calls == sizes


@pytest.mark.parametrize(
    "sampler, option, calls",
    [("threshold", dict(threshold=1.0), 5), ("entropy_bound", dict(gamma=0.0), 1)],
)
def test_certain_tokens_come_together_unless_the_threshold_is_1(sampler, option, calls):
    """No probability is above 1, so threshold 1 always reveals one by one."""
    one = torch.ones(1, dtype=torch.long)
    certain = lambda x, t, at: F.one_hot(one.expand(int(at.sum())), V).double().log()
    frames = list(SAMPLERS[sampler](certain, torch.full((2, 5), MASK), 1, tiny(), **option))
    assert len(frames) == calls and (frames[-1] == 1).all()


def test_every_option_of_a_sampler_has_a_range():
    defaults = [default_options(sampler) for sampler in SAMPLERS.values()]
    assert {name for default in defaults for name in default} == OPTIONS.keys()
    assert all(0 <= v <= OPTIONS[name] for default in defaults for name, v in default.items())


ROWS = torch.tensor(
    [[0.50, 0.46, 0.04], [0.45, 0.28, 0.27], [0.40, 0.59, 0.01], [0.62, 0.19, 0.19]]
)
ORDER = {
    "ar": [0, 1, 2, 3], "confidence": [3, 2, 0, 1], "margin": [3, 2, 1, 0], "entropy": [2, 0, 3, 1],
    "llada": [3, 2, 0, 1],
}  # fmt: skip


@pytest.mark.parametrize("temperature, top_p", [(1, 1), (0, 1), (1, 0.3)])
@pytest.mark.parametrize("sampler", ORDER)
def test_the_surest_token_comes_first_by_each_score(sampler, temperature, top_p):
    """By the network's own probabilities, also where temperature 0 or a small top_p makes every
    token certain. Only `llada` ranks by the token that was drawn."""
    denoise = lambda x, t, at: ROWS.log().repeat(len(x), 1, 1)[at]
    denoise = with_top_p(with_temperature(denoise, temperature), top_p)
    frames = list(SAMPLERS[sampler](denoise, torch.full((200, 4), MASK), 4, tiny()))
    shown = torch.stack([frame != MASK for frame in frames])  # (4, 200, 4)
    assert (shown.sum(-1) == torch.arange(1, 5)[:, None]).all()  # one in each step
    order = shown.int().argmax(0).argsort(-1)  # (200, 4) positions
    random = (temperature, top_p) == (1, 1)
    if sampler == "llada" and random:
        assert len(order.unique(dim=0)) > 4
    else:
        assert (order == torch.tensor(ORDER[sampler])).all()
    assert random or (frames[-1] == ROWS.argmax(-1)).all()


def test_a_step_reveals_as_many_as_the_schedule_says():
    """Ten masks in ten steps, one each in spite of rounding; rows may have
    different numbers of masks."""
    denoise, _ = even_denoiser(V)
    masks_left = lambda frames: [(f == MASK).sum(-1).tolist() for f in frames]
    frames = SAMPLERS["confidence"](denoise, torch.full((3, 10), MASK), 10, tiny())
    assert masks_left(frames) == [[n] * 3 for n in range(9, -1, -1)]
    x = torch.where(torch.arange(10) < torch.tensor([[10], [4], [0]]), MASK, 0)
    frames = SAMPLERS["confidence"](denoise, x, 2, tiny())
    assert masks_left(frames) == [[5, 2, 0], [0, 0, 0]]


# --------------------------------------------------------------------------------------------------
# Texts of any length


def read_any_length(model):
    """A network of the tiny world that also reads windows shorter than L: a token 0 fills them."""

    def padded(x, t, at):
        pad = L - x.shape[1]
        return model(F.pad(x, (0, pad)), t, F.pad(at, (0, pad)))

    return padded


def window_law(law, canvas, starts, window):
    """{text: probability} of a canvas whose windows are filled one after the other, each with the
    law (canvas of L tokens) -> (27,)."""
    state = {tuple(canvas.tolist()): 1.0}
    for start in starts:
        after = {}
        for x, chance in state.items():
            part = torch.tensor([*x[start : start + window], *[0] * (L - window)])
            for text, p in zip(TEXTS.tolist(), law(part).tolist()):
                if p:
                    after[x[:start] + tuple(text[:window]) + x[start + window :]] = chance * p
        state = after
    return state


@pytest.mark.parametrize(
    "window, stride, starts", [(3, 1, (0, 1, 2)), (3, 2, (0, 2)), (2, 1, (0, 1, 2, 3))]
)
@pytest.mark.parametrize("sampler", ["ddpm", "ar"])
def test_semi_ar_has_the_law_of_its_windows(sampler, window, stride, starts):
    """A canvas of five tokens, one of them given."""
    cfg, model = tiny(), hostile_model()
    canvas, weights = torch.tensor([MASK, 2, MASK, MASK, MASK]), (V + 1) ** torch.arange(4, -1, -1)
    law = lambda part: LAWS.get(sampler, ancestral_law)(model, part, "linear", 4)
    denoise, x = denoiser(read_any_length(model), cfg), canvas.repeat(N, 1)
    texts = last(semi_ar(denoise, x, 4, cfg, None, SAMPLERS[sampler], window, stride))
    counts = torch.bincount((texts * weights).sum(-1), minlength=4**5)
    expected = torch.zeros(4**5, dtype=torch.float64)
    for text, p in window_law(law, canvas, starts, window).items():
        expected[(torch.tensor(text) * weights).sum()] = p * N
    assert counts[expected == 0].sum() == 0 and expected.sum().item() == pytest.approx(N)
    assert pooled_p(counts, expected) > 1e-4


# Of each text of five tokens, in the order of base 3, how many of 20,000 sample_subs_guidance of
# kuleshov-group/mdlm at c112c52 wrote: stride 2, one stride, dt 1/4, and for its backbone the table
# of PACKED, the perfect network of rows [2] ... [2].
UPSTREAM_SEMI_AR = [
    0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 26, 0, 0, 1, 1, 0, 5,
    1, 0, 4, 0, 1, 2, 1, 0, 1, 0, 0, 1, 0, 0, 1, 1, 0, 2, 0, 0, 14, 3, 0, 0, 0, 0, 1, 0, 0, 1,
    0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 12, 0, 0, 1, 0, 1, 7, 4, 0, 9, 1, 1, 4,
    0, 0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 38, 9, 1, 567, 10, 4, 27, 1, 0, 1, 1, 0, 1, 0, 0, 1, 0, 1,
    1, 0, 0, 1, 0, 0, 0, 1, 1, 12, 4, 1, 401, 3, 1, 20, 0, 0, 2, 0, 0, 0, 0, 0, 2, 0, 0, 2, 0,
    0, 0, 0, 0, 0, 0, 1, 15, 0, 0, 187, 4, 1, 8, 1, 1, 32, 17, 3, 23, 6, 2, 18, 1, 1, 16, 0, 0,
    7, 0, 0, 11, 7, 1, 67, 15, 6, 1080, 15, 9, 58, 3, 3, 60, 47, 7, 47, 9, 3, 43, 1, 0, 35, 0,
    0, 10, 1, 0, 10, 96, 31, 964, 203, 36, 13615, 161, 91, 598, 9, 6, 70, 37, 4, 46, 7, 1, 39,
    4, 1, 66, 1, 0, 28, 1, 0, 16, 3, 0, 52, 6, 1, 652, 11, 4, 20,
]  # fmt: skip
TILT = torch.tensor([1.0, 1, 30], dtype=torch.float64)
PACKED = random_joint() * TILT[:, None, None] * TILT
PACKED /= PACKED.sum()


def test_semi_ar_of_packed_rows_writes_on_behind_separators():
    """Rows [2] ... [2] packed from documents, BOS = EOS = 2: `end_id` gives no end, every window is
    filled, and the law is that of the windows. With 2 as an end, the law would be another. MDLM's
    own sampler has the same law."""
    cfg, model = tiny(), exact_model(PACKED)
    packed, tokenizer = SimpleNamespace(ends=False), SimpleNamespace(bos=2, eos=2)
    canvas, weights = torch.tensor([MASK] * 5), (V + 1) ** torch.arange(4, -1, -1)
    law = window_law(lambda part: ancestral_law(model, part, "linear", 4), canvas, (0, 2), 3)
    expected = torch.zeros(4**5, dtype=torch.float64)
    for text, p in law.items():
        expected[(torch.tensor(text) * weights).sum()] = p * N

    def p_value(stop):
        eos = end_id(packed, tokenizer, stop)
        x = canvas.repeat(N, 1)
        texts = last(semi_ar(denoiser(model, cfg), x, 4, cfg, None, window=3, stride=2, eos=eos))
        counts = torch.bincount((texts * weights).sum(-1), minlength=4**5)
        return pooled_p(counts, expected)

    assert p_value(stop=False) > 1e-4 > p_value(stop=True)
    places = (torch.cartesian_prod(*[torch.arange(3)] * 5) * weights).sum(-1)
    upstream = torch.zeros(4**5, dtype=torch.float64)
    upstream[places] = torch.tensor(UPSTREAM_SEMI_AR, dtype=torch.float64)
    assert upstream.sum() == N and pooled_p(upstream, expected) > 1e-4


def test_semi_ar_stops_rows_that_have_ended():
    """A row that has written eos leaves the batch, and the rest of it becomes eos. An eos of the
    prompt does not end a row."""
    batches = []

    def denoise(x, t, at):  # row 0 writes eos = 2 in its first window, row 1 never
        batches.append(len(x))
        token = torch.where(at & (x[:, :1] == 0), 2, 1)[at]
        return F.one_hot(token, V).double().log()

    x = torch.tensor([[0] + [MASK] * 8, [2] + [MASK] * 8])
    frames = list(semi_ar(denoise, x, 1, tiny(), None, SAMPLERS["ddpm"], 3, 2, eos=2))
    assert frames[-1].tolist() == [[0] + [2] * 8, [2] + [1] * 8]
    assert batches == [2, 1, 1, 1] and len(frames) == 5  # one more frame fills the finished row
    with pytest.raises(ValueError, match="stride=4: must be at most the window, 3"):
        list(semi_ar(denoise, x, 1, tiny(), None, SAMPLERS["ddpm"], 3, 4))


def test_what_a_window_wrote_behind_eos_becomes_eos():
    def denoise(x, t, at):  # from left to right 1, 2 = eos, 1, 1 ...
        position = torch.arange(x.shape[1]).expand(x.shape)[at]
        return F.one_hot(torch.where(position == 1, 2, 1), V).double().log()

    x = torch.full((1, 7), MASK)
    x[0, 5] = 0  # a given token stays
    texts = last(semi_ar(denoise, x, 1, tiny(), None, SAMPLERS["ddpm"], 4, 2, eos=2))
    assert texts.tolist() == [[1, 2, 2, 2, 2, 0, 2]]


# --------------------------------------------------------------------------------------------------
# What wraps `denoise`


@pytest.mark.parametrize("w", [0.0, 0.7])
def test_guidance_has_the_law_of_its_formula(w):
    """The law of p(. | prompt)^(1 + w) / p(. | prompt masked)^w, enumerated; w = 0 is no guidance.
    Rows of one batch have different prompts, and each is guided by its own."""
    model, steps = hostile_model(), 3
    names = ("prompt", "hole", "holes", "empty")
    canvases = torch.tensor([CANVASES[name] for name in names])
    x = canvases.repeat(N, 1)
    denoise = with_guidance(denoiser(model, tiny()), x != MASK, w, tiny())
    texts = last(SAMPLERS["ddpm_cache"](denoise, x, steps, tiny()))

    def guided_law(canvas):
        def guided(y, t, at):
            with_it, without = (model(z, t, at) for z in (y, y.masked_fill(canvas != MASK, MASK)))
            return ((1 + w) * with_it - w * without).log_softmax(-1)

        return ancestral_law(guided, canvas, "linear", steps)

    assert_laws(texts, map(guided_law, canvases), names)
    p = chi_square_p(texts[:: len(names)], ancestral_law(model, canvases[0], "linear", steps))
    assert p > 1e-4 if w == 0 else p < 1e-6


def test_a_greedy_end_takes_the_likeliest_token_there_alone():
    p = torch.tensor([[0.5, 0.3, 0.2]]).log()
    denoise = with_greedy_end(lambda x, t, at: p.repeat(int(at.sum()), 1), 0.25)
    at = torch.tensor([[True, True], [True, False], [False, True]])
    got = denoise(None, torch.tensor([0.25, 0.5, 0.1]), at).exp()
    torch.testing.assert_close(got[[0, 1, 3]].float(), torch.tensor([[1.0, 0, 0]]).repeat(3, 1))
    torch.testing.assert_close(got[2].float(), p[0].exp())
    torch.testing.assert_close(denoise(None, torch.tensor([0.5, 0.5, 0.5]), at), p.repeat(4, 1))


PROBABILITIES = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
HERE = (None, torch.tensor([0.5]), torch.tensor([[True]]))


def test_temperature_is_a_power():
    denoise = lambda x, t, at: PROBABILITIES.log()
    root = PROBABILITIES.sqrt()
    hot = with_temperature(denoise, 2.0)(*HERE).exp()
    torch.testing.assert_close(hot.float(), root / root.sum())
    for cold in (0, 1e-300, 1e-42, 1e-6):
        got = with_temperature(denoise, cold)(*HERE).exp()
        assert got[0, 0] == pytest.approx(1, abs=1e-6) and not got[0, 1:].any()


def test_top_p_keeps_the_smallest_set_and_comes_after_the_temperature():
    p, denoise = PROBABILITIES, lambda x, t, at: PROBABILITIES.log()
    for top_p, kept in ((0.4, 1), (0.51, 2), (0.8, 2), (0.81, 3), (1.0, 4)):
        want = p * (torch.arange(4) < kept)
        torch.testing.assert_close(with_top_p(denoise, top_p)(*HERE).exp(), want / want.sum())
    shuffled = torch.tensor([2, 0, 3, 1])
    cut = with_top_p(lambda x, t, at: p[:, shuffled].log(), 0.6)(*HERE).exp()
    torch.testing.assert_close(cut, torch.tensor([[0.0, 0.625, 0.0, 0.375]]))
    both = with_top_p(with_temperature(denoise, 0.5), 0.6)(*HERE).exp()
    torch.testing.assert_close(both.float(), torch.tensor([[1.0, 0.0, 0.0, 0.0]]))  # 0.25 of 0.3575


def test_shaping_keeps_what_scores_sum_to():
    """`analytic` with a temperature next to 1 is `analytic`, and so is `ddpm` of a
    network that predicts MASK."""
    canvas = ALL[0]
    shape = lambda denoise: with_top_p(with_temperature(denoise, 1.0000001), 0.9999999)
    model, cfg = hostile_scores(), tiny(loss="sedd")
    texts = last(analytic(shape(denoiser(model, cfg)), canvas.repeat(N, 1), 4, cfg))
    assert chi_square_p(texts, analytic_law(model, canvas, "linear", 4)) > 1e-4
    model, cfg = hostile_model(outputs=V + 1), tiny(loss="d3pm", T=4, zero_masking=False)
    texts = last(SAMPLERS["ddpm"](shape(denoiser(model, cfg)), canvas.repeat(N, 1), 4, cfg))
    assert chi_square_p(texts, masking_law(model, canvas, "linear", 4)) > 1e-4


def test_denoiser_skips_rows_without_a_requested_position():
    rows = []

    def model(x, t, at):
        rows.append(len(x))
        return hostile_model()(x, t, at)

    at = torch.zeros(5, L, dtype=torch.bool)
    at[1, 2] = at[3, 0] = at[3, 1] = True
    x, t = torch.randint(0, V + 1, (5, L)), torch.rand(5)
    got = denoiser(model, tiny())(x, t, at)
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


# --------------------------------------------------------------------------------------------------
# The cache of a causal network


def causal_network(bos):
    """(model, cfg, list of the numbers of tokens that its calls read)."""
    cfg, read = tiny_ar(bos=bos), []
    torch.manual_seed(1)
    model = DiT(cfg).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    model.embed.register_forward_hook(lambda module, args, out: read.append(args[0].shape[1]))
    return model, cfg, read


@pytest.mark.parametrize("bos", [False, True])
def test_ar_with_a_cache_is_ar_without_draw_for_draw(bos):
    """A call reads one new token. Rows at different positions cannot use the
    cache, but are served too."""
    model, cfg, read = causal_network(bos)
    gen = lambda: row_generators(2, range(4))
    draw = lambda maker, x: list(SAMPLERS["ar"](maker(model, cfg), x, 1, cfg, gen()))
    x = torch.full((4, cfg.seq_len), cfg.mask_id)
    x[:, 0], x[:, 4] = 1, 3  # a prompt, and a given token further on
    plain = draw(denoiser, x)
    assert set(read) == {cfg.seq_len - bos}
    read.clear()
    cached = draw(cached_denoiser, x)
    assert len(plain) == len(cached) == cfg.seq_len - 2
    assert all((a == b).all() for a, b in zip(plain, cached))
    assert read[0] <= 2 and set(read[1:]) <= {1, 2} and sum(read) == cfg.seq_len - bos
    x[2, :3] = torch.tensor([1, 0, 2])
    assert all((a == b).all() for a, b in zip(draw(denoiser, x), draw(cached_denoiser, x)))


@pytest.mark.parametrize("bos", [False, True])
def test_the_cache_is_not_used_for_other_tokens(bos):
    model, cfg, _ = causal_network(bos)
    denoise, at = cached_denoiser(model, cfg), torch.zeros(4, cfg.seq_len, dtype=torch.bool)
    at[:, 6], t = True, ones(at[:, 0]).float()
    for token in (1, 2):
        x = torch.full_like(at, token, dtype=torch.long)
        torch.testing.assert_close(denoise(x, t, at), denoiser(model, cfg)(x, t, at))
