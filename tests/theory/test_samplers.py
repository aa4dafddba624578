"""Every sampler's law against the enumerated one, with a hostile, time-dependent denoiser."""

import itertools
import math
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
import world
from world import (
    MASK,
    TEXTS,
    L,
    V,
    ancestral_law,
    answers,
    chi_square_p,
    exact_model,
    hostile_model,
    hostile_scores,
    index,
    last,
    left_to_right_law,
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
    time_at,
)
from model import DiT
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
N = 20_000


def staggered_row(p, alpha_s, alpha_t):
    """SEDD's analytic step as its paper writes it, for scores p^ r: the score staggered by the change of sigma,
    times the transposed transition's row of MASK; chances below zero are never drawn."""
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
        p = answers(model, n / steps).exp() / V
        if n == 0:
            return torch.cat((p / p.sum(-1, keepdim=True), 0 * p[..., :1]), -1)
        return staggered_row(p, grid[n - 1], grid[n])

    return step_law(canvas, steps, row)


def euler_law(model, canvas, schedule, steps):
    """onehot + dt sigma' x reverse rate, the rate to y being the score of y and to MASK minus the sum."""

    def row(n):
        p = answers(model, n / steps).exp() / V
        if n == 0:
            return torch.cat((p / p.sum(-1, keepdim=True), 0 * p[..., :1]), -1)
        t = torch.tensor(n / steps, dtype=torch.float64)
        a = alpha(schedule, t).clamp(min=1e-13)
        flow = -dalpha(schedule, t) / a * (p * a / (1 - a)) / steps
        chance = torch.cat((flow, 1 - flow.sum(-1, keepdim=True)), -1).clamp(min=0)
        return chance / chance.sum(-1, keepdim=True)

    return step_law(canvas, steps, row)


def masking_law(model, canvas, schedule, steps):
    """D3PM's ancestral steps from dense matrices, for a network that may answer MASK: q(x_s | x_t = MASK, x0)
    with x0 replaced by the network's V + 1 probabilities."""
    a = alpha(schedule, torch.arange(steps + 1, dtype=torch.float64) / steps)

    def row(n):
        x0 = answers(model, n / steps, V + 1).exp()
        if n == 0:
            return torch.cat((x0[..., :V] / x0[..., :V].sum(-1, keepdim=True), 0 * x0[..., :1]), -1)
        to_s = a[n - 1] * torch.eye(V + 1, dtype=torch.float64)
        to_s[:, V] += 1 - a[n - 1]  # (x0, x_s)
        s_to_mask = torch.full((V + 1,), 1.0, dtype=torch.float64) * (1 - a[n] / a[n - 1])
        s_to_mask[V] = 1
        joint = x0 @ to_s * s_to_mask
        return joint / joint.sum(-1, keepdim=True)

    return step_law(canvas, steps, row)


def law_of_choice(score):
    """The law of a sampler that draws all masks and keeps the best: every outcome of every step, one by one."""

    def law(model, canvas, schedule, steps):
        state, total = {tuple(canvas.tolist()): 1.0}, int((canvas == MASK).sum())
        for n in range(steps, 0, -1):
            left = 1 - alpha(schedule, torch.tensor((n - 1) / steps, dtype=torch.float64)).item()
            after, p = {}, answers(model, n / steps).exp()
            for key, chance in state.items():
                x = torch.tensor(key)
                holes = (x == MASK).nonzero()[:, 0].tolist()
                keep = len(holes) - math.ceil(total * left - 1e-9)
                for tokens in itertools.product(range(V), repeat=len(holes) if keep else 0):
                    q = [p[index(x), i] for i in holes]
                    best = sorted(range(len(tokens)), key=lambda j: -score(q[j], tokens[j]))[:keep]
                    y = x.clone()
                    for j in best:
                        y[holes[j]] = tokens[j]
                    drawn = math.prod(q[j][v].item() for j, v in enumerate(tokens))
                    after[tuple(y.tolist())] = after.get(tuple(y.tolist()), 0) + chance * drawn
            state = after
        return torch.tensor([state.get(tuple(x), 0.0) for x in TEXTS.tolist()], dtype=torch.float64)

    return law


def law_of_sureness(score, count):
    """The law of a sampler that draws all masks and keeps count(scores, best first) of them, at least one, again and
    again: every outcome of every call, one by one."""

    def law(model, canvas, schedule, steps):
        state, total = {tuple(canvas.tolist()): 1.0}, int((canvas == MASK).sum())
        for left in range(total, 0, -1):  # those with most masks first: a call goes to fewer
            t = time_at(schedule, torch.tensor(left / total, dtype=torch.float64)).item()
            p = answers(model, t).exp()
            for key in [key for key in state if key.count(MASK) == left]:
                chance, x = state.pop(key), torch.tensor(key)
                holes = (x == MASK).nonzero()[:, 0].tolist()
                for tokens in itertools.product(range(V), repeat=left):
                    q = [p[index(x), i] for i in holes]
                    scores = [score(q[j], v) for j, v in enumerate(tokens)]
                    best = sorted(range(left), key=lambda j: -scores[j])
                    y = x.clone()
                    for j in best[: max(1, count([scores[j] for j in best]))]:
                        y[holes[j]] = tokens[j]
                    drawn = math.prod(q[j][v].item() for j, v in enumerate(tokens))
                    state[tuple(y.tolist())] = state.get(tuple(y.tolist()), 0) + chance * drawn
        return torch.tensor([state.get(tuple(x), 0.0) for x in TEXTS.tolist()], dtype=torch.float64)

    return law


def threshold_law(threshold):
    return law_of_sureness(
        lambda p, v: p[v].item(), lambda scores: sum(s > threshold for s in scores)
    )


def entropy_bound_law(gamma):
    """The largest k whose sum of entropies minus the largest of them is at most gamma."""

    def count(scores):
        fits = [
            k
            for k in range(1, len(scores) + 1)
            if -sum(scores[:k]) - max(-s for s in scores[:k]) <= gamma
        ]
        return max(fits)

    return law_of_sureness(lambda p, v: (p * p.log()).sum().item(), count)


def remdm_law(sigma):
    def law(model, canvas, schedule, steps):
        state = remasking_states(model, canvas, schedule, steps, sigma)[-1]
        assert state[index(TEXTS)].sum().item() == pytest.approx(1)
        return state[index(TEXTS)]

    return law


OPTION_LAWS = {  # sampler: the law for a value of its option
    "threshold": threshold_law,
    "entropy_bound": entropy_bound_law,
    "remdm_cap": lambda eta: remdm_law(lambda most: min(eta, most)),
    "remdm_rescale": lambda eta: remdm_law(lambda most: eta * most),
}


@cache  # seconds for each, and no number of steps to depend on
def limit_law(canvas, schedule):
    return ancestral_law(hostile_model(), torch.tensor(canvas), schedule, 2000)


LAWS = {  # what is not here has the ancestral law
    "first_hitting": lambda model, canvas, schedule, steps: limit_law(
        tuple(canvas.tolist()), schedule
    ),
    "euler": lambda model, *args: euler_law(lambda x, t, at: model(x, t, at) + math.log(V), *args),
    "confidence": law_of_choice(lambda p, v: p[v]),
    "margin": law_of_choice(lambda p, v: p.topk(2).values.diff().neg().item()),
    "entropy": law_of_choice(lambda p, v: (p * p.log()).sum().item()),
    "ar": left_to_right_law,
} | {
    sampler: law(*default_options(SAMPLERS[sampler]).values())
    for sampler, law in OPTION_LAWS.items()
}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "geometric"])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_law_equals_the_enumerated_one(sampler, schedule, steps):
    """All canvases in one batch, so that rows with different prompts and events ride together."""
    model, canvases = hostile_model(), torch.tensor(list(CANVASES.values()))
    x = canvases.repeat(N, 1)
    texts = last(SAMPLERS[sampler](denoiser(model, tiny()), x, steps, tiny(schedule=schedule)))
    for i, name in enumerate(CANVASES):
        law = LAWS.get(sampler, ancestral_law)(model, canvases[i], schedule, steps)
        p = chi_square_p(texts[i :: len(CANVASES)], law)
        assert p > 1e-4, f"{name}: p = {p:.2g}"


@pytest.mark.parametrize("schedule", ["linear", "geometric"])
@pytest.mark.parametrize(
    "sampler, value",
    [
        ("threshold", 0.3), ("threshold", 0.6), ("entropy_bound", 0.4), ("entropy_bound", 1.0),
        ("remdm_cap", 0.3), ("remdm_cap", 1.0), ("remdm_rescale", 0.5), ("remdm_rescale", 1.0),
    ],
)  # fmt: skip
def test_the_law_follows_a_samplers_own_option(sampler, value, schedule):
    """And it is not that of the default: the option is passed on."""
    model, canvases = hostile_model(), torch.tensor(list(CANVASES.values()))
    own = {name: value for name in default_options(SAMPLERS[sampler])}
    x, cfg = canvases.repeat(N, 1), tiny(schedule=schedule)
    texts = last(SAMPLERS[sampler](denoiser(model, tiny()), x, 5, cfg, **own))
    law = OPTION_LAWS[sampler](value)
    for i, name in enumerate(CANVASES):
        p = chi_square_p(texts[i :: len(CANVASES)], law(model, canvases[i], schedule, 5))
        assert p > 1e-4, f"{name}: p = {p:.2g}"
    assert (
        chi_square_p(texts[:: len(CANVASES)], LAWS[sampler](model, canvases[0], schedule, 5)) < 1e-6
    )


@pytest.mark.parametrize("schedule", ["linear", "cosine", "geometric"])
@pytest.mark.parametrize(
    "sampler, eta", [("remdm_cap", 0.2), ("remdm_rescale", 0.6), ("remdm_rescale", 1.0)]
)
def test_remdm_keeps_the_marginals_and_has_the_law_of_its_steps(sampler, eta, schedule):
    """The canvases after every step, of a prompt and of nothing, with the exact network of a joint; a position that is
    not given is visible with probability alpha in all of them, as without remasking."""
    model, steps, cfg = exact_model(random_joint()), 4, tiny(schedule=schedule)
    for canvas in torch.tensor([CANVASES["empty"], CANVASES["prompt"]]):
        frames = list(
            SAMPLERS[sampler](denoiser(model, cfg), canvas.repeat(N, 1), steps, cfg, eta=eta)
        )
        sigma = {
            "remdm_cap": lambda most: min(eta, most),
            "remdm_rescale": lambda most: eta * most,
        }[sampler]
        states = remasking_states(model, canvas, schedule, steps, sigma)
        assert len(frames) == len(states) == steps
        for n, (x, state) in enumerate(zip(frames, states)):
            s = torch.tensor(1 - (n + 1) / steps, dtype=torch.float64)
            shown = (state[:, None] * (world.CANVASES != MASK)).sum(0)[canvas == MASK]
            torch.testing.assert_close(shown, alpha(schedule, s).expand_as(shown))
            assert chi_square_p(x, state) > 1e-4


@pytest.mark.parametrize("sampler", ["remdm_cap", "remdm_rescale"])
def test_remdm_without_remasking_is_ddpm(sampler):
    model, canvases = hostile_model(), torch.tensor(list(CANVASES.values()))
    texts = last(
        SAMPLERS[sampler](denoiser(model, tiny()), canvases.repeat(N, 1), 4, tiny(), eta=0.0)
    )
    for i, name in enumerate(CANVASES):
        p = chi_square_p(texts[i :: len(CANVASES)], ancestral_law(model, canvases[i], "linear", 4))
        assert p > 1e-4, f"{name}: p = {p:.2g}"


@pytest.mark.parametrize("name", ["hole", "prompt"])
def test_remdm_has_its_law_with_a_generator_per_row(name):
    """A row with no mask left draws on: its tokens may still be masked again."""
    model, canvas, cfg = hostile_model(), torch.tensor(CANVASES[name]), tiny()
    gen = row_generators(0, range(4000))
    texts = last(
        SAMPLERS["remdm_rescale"](
            denoiser(model, cfg), canvas.repeat(4000, 1), 5, cfg, gen, eta=0.5
        )
    )
    assert chi_square_p(texts, OPTION_LAWS["remdm_rescale"](0.5)(model, canvas, "linear", 5)) > 1e-4


def test_remdm_asks_for_what_it_reveals_alone():
    """At most one call per step, none in a step that reveals nothing, and a token that is masked again is drawn anew."""
    denoise, calls = counting(V)
    x = torch.full((2, 40), MASK)
    frames = [
        x,
        *SAMPLERS["remdm_rescale"](denoise, x, 50, tiny(), row_generators(0, range(2)), eta=0.5),
    ]
    pairs = list(zip(frames, frames[1:]))
    revealed = [int(((a == MASK) & (b != MASK)).sum()) for a, b in pairs]
    assert calls == [n for n in revealed if n] and len(calls) <= 50
    masked_again = sum(int(((a != MASK) & (b == MASK)).sum()) for a, b in pairs)
    assert masked_again > 40 and sum(revealed) == 2 * 40 + masked_again


def test_remdm_leaves_earlier_windows_as_they_are():
    """What a window finds, a prompt or the window before it, is given."""
    denoise, x = counting(V)[0], torch.full((50, 9), MASK)
    always = partial(SAMPLERS["remdm_rescale"], eta=1.0)
    before, remasked = x, 0
    for frame in semi_ar(denoise, x, 6, tiny(), None, always, window=6, stride=3):
        remasked += int(((before != MASK) & (frame == MASK)).sum())
        if (before[:, :6] != MASK).all():  # the first window is full: the second is being written
            assert (frame[:, :6] == before[:, :6]).all()
        before = frame
    assert remasked > 50 and (before != MASK).all()


@pytest.mark.parametrize(
    "sampler, own, sizes",
    [
        ("threshold", dict(threshold=0.0), [14]),
        ("threshold", dict(threshold=1.0), [14, 12, 10, 8, 7, 6, 5, 4, 3, 2, 1]),
        ("entropy_bound", dict(gamma=99.0), [14]),
        ("entropy_bound", dict(gamma=0.0), [14, 12, 10, 8, 7, 6, 5, 4, 3, 2, 1]),
        ("entropy_bound", dict(gamma=2 * math.log(V) + 1e-9), [14, 8, 5, 2]),  # three at a time
    ],
)
def test_from_all_at_once_to_one_by_one(sampler, own, sizes):
    """Two rows of 11 and 3 masks; every token is as sure as every other, and the shorter row leaves when it is done."""
    denoise, calls = counting(V)
    x = torch.where(torch.arange(11) < torch.tensor([[11], [3]]), MASK, 0)
    last(SAMPLERS[sampler](denoise, x, 7, tiny(), **own))
    assert calls == sizes


@pytest.mark.parametrize(
    "sampler, own, calls",
    [("threshold", dict(threshold=1.0), 5), ("entropy_bound", dict(gamma=0.0), 1)],
)
def test_certain_tokens(sampler, own, calls):
    """Nothing is above 1, so 1 is one by one, always; but nothing is lost by taking certain tokens together."""
    certain = lambda x, t, at: (
        F.one_hot(torch.ones(int(at.sum()), dtype=torch.long), V).double().log()
    )
    frames = list(SAMPLERS[sampler](certain, torch.full((2, 5), MASK), 1, tiny(), **own))
    assert len(frames) == calls and (frames[-1] == 1).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_mean_nothing_to_the_stepless_alone(sampler):
    model, x = denoiser(hostile_model(), tiny()), torch.full((400, L), MASK)
    one, many = (
        last(SAMPLERS[sampler](model, x, steps, tiny(), row_generators(0, range(400))))
        for steps in (1, 9)
    )
    assert (one == many).all() == (sampler in STEPLESS)


def test_every_option_of_a_sampler_has_a_range():
    own = {
        name: default
        for sampler in SAMPLERS.values()
        for name, default in default_options(sampler).items()
    }
    assert own.keys() == OPTIONS.keys() and all(0 <= own[name] <= OPTIONS[name] for name in own)


def test_the_law_test_tells_step_counts_apart():
    """With a time-dependent denoiser 4 steps, 5 steps and infinitely many have different laws."""
    model, canvas = hostile_model(), torch.tensor(CANVASES["empty"])
    texts = last(SAMPLERS["ddpm_cache"](denoiser(model, tiny()), canvas.repeat(N, 1), 4, tiny()))
    assert chi_square_p(texts, ancestral_law(model, canvas, "linear", 4)) > 1e-4
    for steps in (3, 5, 2000):
        assert chi_square_p(texts, ancestral_law(model, canvas, "linear", steps)) < 1e-6


@pytest.mark.parametrize("schedule", ["linear", "cosine", "geometric"])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("sampler", ["analytic", "euler"])
def test_sedds_samplers_have_the_law_of_its_dense_kernels(sampler, steps, schedule):
    """With scores that are not normalised, whose sum the two look at, and noise removal at the end."""
    model, canvases = hostile_scores(), torch.tensor(list(CANVASES.values()))
    cfg = tiny(loss="sedd", schedule=schedule)
    texts = last(SAMPLERS[sampler](denoiser(model, cfg), canvases.repeat(N, 1), steps, cfg))
    law = {"analytic": analytic_law, "euler": euler_law}[sampler]
    for i, name in enumerate(CANVASES):
        p = chi_square_p(texts[i :: len(CANVASES)], law(model, canvases[i], schedule, steps))
        assert p > 1e-4, f"{name}: p = {p:.2g}"


def test_the_sum_of_the_scores_matters_to_sedds_samplers():
    model, canvas, cfg = hostile_scores(), torch.tensor(CANVASES["empty"]), tiny(loss="sedd")
    texts = last(analytic(denoiser(model, cfg), canvas.repeat(N, 1), 4, cfg))
    assert (
        chi_square_p(
            texts, ancestral_law(lambda *a: model(*a).log_softmax(-1), canvas, "linear", 4)
        )
        < 1e-6
    )


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddpm_has_d3pms_law_when_the_network_may_answer_mask(schedule):
    model, canvases = hostile_model(outputs=V + 1), torch.tensor(list(CANVASES.values()))
    cfg = tiny(loss="d3pm", T=4, zero_masking=False, schedule=schedule)
    texts = last(SAMPLERS["ddpm"](denoiser(model, cfg), canvases.repeat(N, 1), 4, cfg))
    for i, name in enumerate(CANVASES):
        p = chi_square_p(texts[i :: len(CANVASES)], masking_law(model, canvases[i], schedule, 4))
        assert p > 1e-4, f"{name}: p = {p:.2g}"


def test_analytic_is_ddpm_draw_for_draw_when_scores_are_normalised():
    x, model = torch.full((500, L), MASK), hostile_model()
    a, b = (
        list(SAMPLERS[s](denoiser(model, tiny()), x, 7, tiny(), row_generators(0, range(500))))
        for s in ("ddpm", "analytic")
    )
    assert len(a) == len(b) and all((p == q).all() for p, q in zip(a, b))


@pytest.mark.parametrize("window, stride", [(3, 1), (3, 2), (2, 1)])
@pytest.mark.parametrize("sampler", ["ddpm", "ar"])
def test_semi_ar_has_the_law_of_its_windows(sampler, window, stride):
    """A canvas of five tokens, with one given: windows multiplied out one after the other."""
    cfg, timed = tiny(), sampler != "ar"  # whose times would be those of a row of three tokens
    model = lambda x, t, at: hostile_model()(x, t * timed, at)
    canvas, wide = torch.tensor([MASK, 2, MASK, MASK, MASK]), (V + 1) ** torch.arange(4, -1, -1)

    def in_window(
        x, t, at
    ):  # the tiny network reads three tokens; shorter windows get a token 0 behind them
        pad = L - x.shape[1]
        return model(F.pad(x, (0, pad)), t, F.pad(at, (0, pad)))

    starts = {(3, 1): (0, 1, 2), (3, 2): (0, 2), (2, 1): (0, 1, 2, 3)}[window, stride]
    state = {tuple(canvas.tolist()): 1.0}
    for start in starts:
        after = {}
        for x, chance in state.items():
            part = torch.tensor([*x[start : start + window], *[0] * (L - window)])
            law = LAWS.get(sampler, ancestral_law)
            for text, p in zip(TEXTS.tolist(), law(model, part, "linear", 4).tolist()):
                if p:
                    after[x[:start] + tuple(text[:window]) + x[start + window :]] = chance * p
        state = after
    x = canvas.repeat(N, 1)
    texts = last(
        semi_ar(denoiser(in_window, cfg), x, 4, cfg, None, SAMPLERS[sampler], window, stride)
    )
    counts = torch.bincount((texts * wide).sum(-1), minlength=4**5)
    expected = torch.zeros(4**5, dtype=torch.float64)
    for text, p in state.items():
        expected[(torch.tensor(text) * wide).sum()] = p * N
    assert counts[expected == 0].sum() == 0 and expected.sum().item() == pytest.approx(N)
    common = expected >= 5
    chi2 = ((counts - expected)[common] ** 2 / expected[common]).sum()
    assert torch.special.gammaincc((common.sum() - 1) / 2, chi2 / 2) > 1e-4


def test_semi_ar_stops_rows_that_have_ended():
    """A row that wrote eos is asked nothing more, and its rest is eos; an eos of the prompt does not end it."""
    asked = []

    def denoise(x, t, at):  # row 0 writes eos = 2 in its first window, row 1 never
        asked.append(len(x))
        token = torch.where(at & (x[:, :1] == 0), 2, 1)[at]
        return F.one_hot(token, V).double().log()

    x = torch.tensor([[0] + [MASK] * 8, [2] + [MASK] * 8])
    frames = list(semi_ar(denoise, x, 1, tiny(), None, SAMPLERS["ddpm"], 3, 2, eos=2))
    assert frames[-1].tolist() == [[0] + [2] * 8, [2] + [1] * 8]
    assert asked == [2, 1, 1, 1] and len(frames) == 5  # and one in which the finished row is filled
    with pytest.raises(ValueError, match="stride=4: must be at most the window, 3"):
        list(semi_ar(denoise, x, 1, tiny(), None, SAMPLERS["ddpm"], 3, 4))


def test_what_a_window_wrote_behind_eos_becomes_eos():
    def denoise(x, t, at):  # from left to right 1, 2 = eos, 1, 1 ...
        position = torch.arange(x.shape[1]).expand(x.shape)[at]
        return F.one_hot(torch.where(position == 1, 2, 1), V).double().log()

    x = torch.full((1, 7), MASK)
    x[0, 5] = 0  # what is given stays
    assert last(semi_ar(denoise, x, 1, tiny(), None, SAMPLERS["ddpm"], 4, 2, eos=2)).tolist() == [
        [1, 2, 2, 2, 2, 0, 2]
    ]


@pytest.mark.parametrize("w", [0.0, 0.7])
def test_guidance_has_the_law_of_its_formula(w):
    """The law of p(. | prompt)^(1 + w) / p(. | prompt masked)^w, enumerated; w = 0 is no guidance. Rows with
    prompts of different lengths ride together, and each is guided by its own."""
    model, steps = hostile_model(), 3
    canvases = torch.tensor([CANVASES[name] for name in ("prompt", "hole", "holes", "empty")])
    x = canvases.repeat(N, 1)
    denoise = with_guidance(denoiser(model, tiny()), x != MASK, w, tiny())
    texts = last(SAMPLERS["ddpm_cache"](denoise, x, steps, tiny()))
    for i, canvas in enumerate(canvases):

        def guided(y, t, at, given=canvas != MASK):
            with_it, without = (model(z, t, at) for z in (y, y.masked_fill(given, MASK)))
            return ((1 + w) * with_it - w * without).log_softmax(-1)

        assert (
            chi_square_p(texts[i :: len(canvases)], ancestral_law(guided, canvas, "linear", steps))
            > 1e-4
        )
    plain = chi_square_p(
        texts[0 :: len(canvases)], ancestral_law(model, canvases[0], "linear", steps)
    )
    assert plain > 1e-4 if w == 0 else plain < 1e-6


def test_a_greedy_end_takes_the_likeliest_token_there_alone():
    p = torch.tensor([[0.5, 0.3, 0.2]]).log()
    denoise = with_greedy_end(lambda x, t, at: p.repeat(int(at.sum()), 1), 0.25)
    at = torch.tensor([[True, True], [True, False], [False, True]])
    got = denoise(None, torch.tensor([0.25, 0.5, 0.1]), at).exp()
    torch.testing.assert_close(got[[0, 1, 3]].float(), torch.tensor([[1.0, 0, 0]]).repeat(3, 1))
    torch.testing.assert_close(got[2].float(), p[0].exp())
    torch.testing.assert_close(denoise(None, torch.tensor([0.5, 0.5, 0.5]), at), p.repeat(4, 1))


@pytest.mark.parametrize("bos", [False, True])
def test_ar_with_a_cache_is_ar_without_draw_for_draw(bos):
    """Tokens, and the logits behind them; one call reads one token. Batches that leave step are served too."""
    cfg = tiny_ar(bos=bos)
    torch.manual_seed(1)
    model = DiT(cfg).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    read = []
    model.embed.register_forward_hook(lambda module, args, out: read.append(args[0].shape[1]))
    x = torch.full((4, cfg.seq_len), cfg.mask_id)
    x[:, 0], x[:, 4] = 1, 3  # a prompt, and a given token further on
    draw = lambda maker, x: list(
        SAMPLERS["ar"](maker(model, cfg), x, 1, cfg, row_generators(2, range(4)))
    )
    plain = draw(denoiser, x)
    assert set(read) == {cfg.seq_len - bos}
    read.clear()
    cached = draw(cached_denoiser, x)
    assert (
        all((a == b).all() for a, b in zip(plain, cached))
        and len(plain) == len(cached) == cfg.seq_len - 2
    )
    assert read[0] <= 2 and set(read[1:]) <= {1, 2} and sum(read) == cfg.seq_len - bos
    x[2, :3] = torch.tensor([1, 0, 2])  # rows at different positions: no cache to use
    assert all((a == b).all() for a, b in zip(draw(denoiser, x), draw(cached_denoiser, x)))
    denoise, at = cached_denoiser(model, cfg), torch.zeros_like(x, dtype=torch.bool)
    at[:, 6] = True
    for tokens in (1, 2):  # other tokens behind the same position: the cache must not be used
        full = torch.full_like(x, tokens)
        torch.testing.assert_close(
            denoise(full, torch.ones(4), at), denoiser(model, cfg)(full, torch.ones(4), at)
        )


@pytest.mark.parametrize("sampler", ["first_hitting"])
def test_the_exact_denoiser_gives_the_joint(sampler):
    joint = random_joint()
    x = torch.full((N, L), MASK)
    texts = last(SAMPLERS[sampler](denoiser(exact_model(joint), tiny()), x, 1, tiny()))
    assert chi_square_p(texts, joint.flatten()) > 1e-4


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_known_tokens_never_change_and_no_mask_survives(sampler, schedule):
    x = torch.randint(0, V + 1, (500, L))
    canvas, before = x.clone(), x
    for frame in SAMPLERS[sampler](
        denoiser(hostile_model(), tiny()), x, 5, tiny(schedule=schedule)
    ):
        assert (frame == canvas)[canvas != MASK].all()
        stays = (frame == before) | (frame == MASK) if "remdm" in sampler else frame == before
        assert stays[before != MASK].all()
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
    assert (
        len(calls) <= min(steps, length) and sum(calls) == B * length
    )  # the head: once per position, ever
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
    """Rows of all kinds of canvases together, each with its own generator; and window by window, where rows end
    at different times."""
    model, kinds = denoiser(hostile_model(), tiny()), torch.tensor(list(CANVASES.values()))

    def run(rows):
        x = kinds[torch.tensor(rows) % len(kinds)]
        return last(SAMPLERS[sampler](model, x, 6, tiny(), row_generators(7, rows)))

    def run_long(rows, eos):
        x, gen = torch.full((len(rows), 9), MASK), row_generators(7, rows)
        return last(
            semi_ar(model, x, 6, tiny(), gen, SAMPLERS[sampler], window=3, stride=2, eos=eos)
        )

    texts = 0
    for call in (run, partial(run_long, eos=0), partial(run_long, eos=1), partial(run_long, eos=2)):
        together = call(list(range(40)))
        texts += len(together.unique(dim=0))
        assert all((call([i])[0] == together[i]).all() for i in range(40))
    assert texts > 15


def test_denoiser_skips_rows_in_which_nothing_is_asked():
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


def test_temperature_and_top_p():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    here = (None, torch.tensor([0.5]), torch.tensor([[True]]))
    denoise = lambda x, t, at: p.log()
    hot = with_temperature(denoise, 2.0)(*here).exp()
    torch.testing.assert_close(hot.float(), p.sqrt() / p.sqrt().sum())
    for cold in (0, 1e-300, 1e-42, 1e-6):
        got = with_temperature(denoise, cold)(*here).exp()
        assert got[0, 0] == pytest.approx(1, abs=1e-6) and not got[0, 1:].any()
    for top_p, kept in ((0.4, 1), (0.51, 2), (0.8, 2), (0.81, 3), (1.0, 4)):
        want = p * (torch.arange(4) < kept)
        torch.testing.assert_close(with_top_p(denoise, top_p)(*here).exp(), want / want.sum())
    shuffled = torch.tensor([2, 0, 3, 1])
    cut = with_top_p(lambda x, t, at: p[:, shuffled].log(), 0.6)(*here).exp()
    torch.testing.assert_close(cut, torch.tensor([[0.0, 0.625, 0.0, 0.375]]))
    both = with_top_p(with_temperature(denoise, 0.5), 0.6)(
        *here
    ).exp()  # first the temperature, then the cut
    torch.testing.assert_close(both.float(), torch.tensor([[1.0, 0.0, 0.0, 0.0]]))  # 0.25 of 0.3575


def test_shaping_keeps_what_scores_sum_to():
    """So `analytic` with a temperature next to 1 is `analytic`, and `ddpm` of a network that answers MASK, too."""
    model, cfg, canvas = hostile_scores(), tiny(loss="sedd"), torch.tensor(CANVASES["empty"])
    shape = lambda denoise: with_top_p(with_temperature(denoise, 1.0000001), 0.9999999)
    texts = last(analytic(shape(denoiser(model, cfg)), canvas.repeat(N, 1), 4, cfg))
    assert chi_square_p(texts, analytic_law(model, canvas, "linear", 4)) > 1e-4
    model, cfg = hostile_model(outputs=V + 1), tiny(loss="d3pm", T=4, zero_masking=False)
    texts = last(SAMPLERS["ddpm"](shape(denoiser(model, cfg)), canvas.repeat(N, 1), 4, cfg))
    assert chi_square_p(texts, masking_law(model, canvas, "linear", 4)) > 1e-4


ROWS = torch.tensor(
    [[0.50, 0.46, 0.04], [0.45, 0.28, 0.27], [0.40, 0.59, 0.01], [0.62, 0.19, 0.19]]
)
ORDER = {"confidence": [3, 2, 0, 1], "margin": [3, 2, 1, 0], "entropy": [2, 0, 3, 1]}


@pytest.mark.parametrize("temperature, top_p", [(1, 1), (0, 1), (1, 0.3)])
@pytest.mark.parametrize("sampler", ORDER)
def test_the_surest_token_comes_first_by_each_score(sampler, temperature, top_p):
    """By the network's own probabilities, also where temperature 0 or a small top_p makes every token certain."""
    denoise = lambda x, t, at: ROWS.log().repeat(len(x), 1, 1)[at]
    denoise = with_top_p(with_temperature(denoise, temperature), top_p)
    frames = list(SAMPLERS[sampler](denoise, torch.full((200, 4), MASK), 4, tiny()))
    order = torch.stack([(frame != MASK).sum(-1) for frame in frames])
    assert (order == torch.arange(1, 5)[:, None]).all()  # one in each step
    first = (
        torch.stack([frame != MASK for frame in frames]).int().argmax(0).argsort(-1)
    )  # (200, 4) positions
    if sampler != "confidence" or (temperature, top_p) != (
        1,
        1,
    ):  # which looks at the token that was drawn
        assert (first == torch.tensor(ORDER[sampler])).all()
    else:
        assert len(first.unique(dim=0)) > 4
    if (temperature, top_p) != (1, 1):
        assert (frames[-1] == ROWS.argmax(-1)).all()


def test_as_many_come_per_step_as_the_schedule_says():
    """Ten masks in ten steps, one each, in spite of rounding; rows with different numbers of masks ride together."""
    denoise, _ = counting(V)
    frames = list(SAMPLERS["confidence"](denoise, torch.full((3, 10), MASK), 10, tiny()))
    assert [(f == MASK).sum(-1).tolist() for f in frames] == [[n] * 3 for n in range(9, -1, -1)]
    x = torch.where(torch.arange(10) < torch.tensor([[10], [4], [0]]), MASK, 0)
    frames = list(SAMPLERS["confidence"](denoise, x, 2, tiny()))
    assert [(f == MASK).sum(-1).tolist() for f in frames] == [[5, 2, 0], [0, 0, 0]]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_unmasking_times_follow_the_schedule(schedule):
    """first_hitting's times: the masked fraction at them is uniform, its order statistics those of uniforms."""
    u = torch.rand(50_000, 2, dtype=torch.float64)
    t = time_at(schedule, u).amax(-1)  # first of two to be revealed
    below = (t < time_at(schedule, torch.tensor(0.5))).double().mean().item()
    assert abs(below - 0.25) < 4 * (0.25 * 0.75 / 50_000) ** 0.5
    assert len(TEXTS) == 27
