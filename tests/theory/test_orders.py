"""The exact likelihood of an order, against enumeration and against samples."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import refused
from world import (
    MASK,
    SCORES,
    SUBSETS,
    TEXTS,
    L,
    V,
    chi_square_p,
    exact_model,
    hostile_model,
    hostile_scores,
    last,
    law_of_choice,
    ones,
    random_joint,
    tiny,
)

import evaluate
from data.checkpoints import load
from data.corpus import read_split
from diffusion import denoiser, exact_count_bound, nll
from samplers import ORDERS, SAMPLERS, with_temperature
from tasks import orders
from tasks.orders import average, list_settings, make_rows, order_nats, row_nats

OPTIONS = {"threshold": [0.0, 0.4, 0.6, 1.0], "entropy_bound": [0.0, 0.4, 0.8, 9.0]}
NAMES = {"threshold": "threshold", "entropy_bound": "gamma"}
SETTINGS = [
    (order, {NAMES.get(order, "per_call"): value})
    for order in ORDERS
    for value in OPTIONS.get(order, (1, 2, 3))
]
EVERY = pytest.mark.parametrize("order, option", SETTINGS)
SCHEDULED = pytest.mark.parametrize("schedule", ["linear", "cosine", "geometric"])


def law_by(order, option, model=None, cfg=None):
    """(27,) probabilities exp(-nats) of all texts."""
    cfg = cfg or tiny()
    denoise = denoiser(model or hostile_model(), cfg)
    nats, _ = order_nats(denoise, TEXTS, ones(TEXTS), cfg, order, **option)
    return (-nats.sum(-1)).exp()


@SCHEDULED
@EVERY
def test_the_probabilities_of_all_texts_sum_to_one(order, option, schedule):
    """With a network that depends on the time."""
    assert abs(law_by(order, option, cfg=tiny(schedule=schedule)).sum().item() - 1) < 1e-12


def test_llada_is_no_order():
    """A rule that ranks by the drawn token has no such likelihood: the test above tells."""
    assert abs(law_by("llada", dict(per_call=1)).sum().item() - 1) > 0.01


@SCHEDULED
@pytest.mark.parametrize("per_call", [1, 2, 3])
@pytest.mark.parametrize("order", SCORES)
def test_it_is_the_enumerated_law_after_every_prompt(order, per_call, schedule):
    """Given tokens cost nothing. The enumeration multiplies out all paths of the sampler."""
    model, cfg = hostile_model(), tiny(schedule=schedule)
    enumerate_law = law_of_choice(SCORES[order], lambda scores, *args: per_call)
    for canvas in torch.tensor([[MASK] * 3, [1, MASK, MASK], [MASK, MASK, 2], [MASK, 1, MASK]]):
        fits = TEXTS[((canvas == MASK) | (canvas == TEXTS)).all(-1)]
        maskable = (canvas == MASK).expand(fits.shape)
        nats, calls = order_nats(
            denoiser(model, cfg), fits, maskable, cfg, order, per_call=per_call
        )
        law = enumerate_law(model, canvas, schedule, 1)
        rows = [(TEXTS == text).all(-1).nonzero().item() for text in fits]
        torch.testing.assert_close((-nats.sum(-1)).exp(), law[rows])
        assert not nats[~maskable].any()
        assert (calls == -(-int(maskable[0].sum()) // per_call)).all()


def agrees_with_samples(order, option, n):
    cfg = tiny(schedule="cosine")
    x = torch.full((n, L), MASK)
    texts = last(SAMPLERS[order](denoiser(hostile_model(), cfg), x, 1, cfg, **option))
    return chi_square_p(texts, law_by(order, option, cfg=cfg)) > 1e-4


@EVERY
def test_samples_agree(order, option):
    assert agrees_with_samples(order, option, 20_000)


@pytest.mark.slow
@EVERY
def test_many_samples_agree(order, option):
    assert agrees_with_samples(order, option, 200_000)


def test_one_token_per_call_of_the_exact_network_is_the_truth():
    joint = random_joint().flatten()
    for order in SCORES:
        torch.testing.assert_close(
            law_by(order, dict(per_call=1), exact_model(joint.view(V, V, V))), joint
        )
        assert (
            law_by(order, dict(per_call=3), exact_model(joint.view(V, V, V))) - joint
        ).abs().max() > 0.01


def test_the_bound_is_the_mean_over_all_orders():
    """Any-order AR: the mean over all L! orders of the chain rule's nats is the bound over counts,
    for a network that ignores the time."""
    hostile = hostile_model()
    model = lambda x, t, at: hostile(x, 0 * t, at)
    x0, total = TEXTS, 0
    for order in itertools.permutations(range(L)):
        for k, i in enumerate(order):
            hidden = torch.isin(torch.arange(L), torch.tensor(order[k:])).expand(x0.shape)
            at = torch.arange(L).expand(x0.shape) == i
            xt = x0.masked_fill(hidden, MASK)
            total = total + nll(model, x0, xt, torch.zeros(len(x0)), at).double().sum(-1)
    bound = 0
    for masks in SUBSETS[1:]:  # each count has weight 1 / L, each subset of it 1 / C(L, count)
        count = masks.sum().expand(len(x0))
        xt = x0.masked_fill(masks, MASK)
        part = exact_count_bound(model, x0, ones(x0), tiny(), count, xt).double()
        bound = bound + part / L / math.comb(L, int(count[0]))
    torch.testing.assert_close(total / math.factorial(L), bound, rtol=1e-5, atol=1e-5)


def test_scores_are_normalised():
    scores = hostile_scores()
    normal = lambda *args: scores(*args).log_softmax(-1)
    for order, option in SETTINGS:
        sedd = law_by(order, option, scores, tiny(loss="sedd"))
        torch.testing.assert_close(sedd, law_by(order, option, normal))


def test_a_temperature_reshapes_the_draws_but_not_the_order():
    cfg, option = tiny(), dict(per_call=1)
    denoise = with_temperature(denoiser(hostile_model(), cfg), 0.5)
    nats, _ = order_nats(denoise, TEXTS, ones(TEXTS), cfg, "margin", **option)
    law = (-nats.sum(-1)).exp()
    assert abs(law.sum().item() - 1) < 1e-12 and (law - law_by("margin", option)).abs().max() > 0.01
    texts = last(SAMPLERS["margin"](denoise, torch.full((20_000, L), MASK), 1, cfg, **option))
    assert chi_square_p(texts, law) > 1e-4


def test_rows_do_not_depend_on_their_batch_and_padding_is_not_counted():
    model, cfg, order = hostile_model(), tiny(), dict(sampler="entropy", per_call=2)
    maskable, counted = torch.rand(27, L) < 0.7, torch.rand(27, L) < 0.7
    counted &= maskable
    together, _ = row_nats(model, TEXTS, maskable, counted, cfg, order)
    for i in range(27):
        part = (a[i : i + 1] for a in (TEXTS, maskable, counted))
        torch.testing.assert_close(row_nats(model, *part, cfg, order)[0], together[i : i + 1])
    both, _ = order_nats(denoiser(model, cfg), TEXTS, maskable, cfg, **order)
    torch.testing.assert_close(together, (both * counted).sum(-1))


def test_settings_have_one_option():
    settings = list_settings(["ar", "threshold"], [1, 4])
    assert settings == {
        ("ar", "per_call=1"): dict(sampler="ar", per_call=1),
        ("ar", "per_call=4"): dict(sampler="ar", per_call=4),
        ("threshold", "threshold=0.9"): dict(sampler="threshold", threshold=0.9),
    }


def test_differences_are_paired_by_window_and_averaged_over_checkpoints():
    windows = np.array([1.0, 2.0, 4.0])
    figures = {
        ("bound", ""): (windows, 64),
        ("ar", "per_call=1"): (windows - [0.1, 0.2, 0.3], 9),
        ("ar", "per_call=2"): (windows + 0.5, 5),
    }
    bound, one, two = make_rows("a.pt", figures, 2.0)
    assert bound["bits"] == pytest.approx(14 / 3) and "minus_bound" not in bound
    assert bound["bits_se"] == pytest.approx(2 * windows.std(ddof=1) / 3**0.5)
    assert one["minus_bound"] == pytest.approx(-0.4) and "minus_one" not in one
    assert one["minus_bound_se"] == pytest.approx(2 * 0.1 / 3**0.5)
    assert two["minus_bound"] == pytest.approx(1) and two["minus_bound_se"] == pytest.approx(0)
    assert two["minus_one"] == pytest.approx(2 * (0.5 + 0.2))
    rows = [dict(order="ar", option="", calls=4, bits=bits) for bits in (1.0, 2.0)]
    assert average(rows) == [dict(order="ar", option="", calls=4.0, bits="1.500 ± 0.500")]


def test_the_command_agrees_with_evaluate_and_pairs_windows(checkpoint, corpus, capsys):
    """On the same windows: an order's bits, and the bound within its error."""
    argv = [str(checkpoint), "--windows", "9", "--passes", "40", "--json", "--device", "cpu"]
    orders.main([*argv, "--orders", "ar", "entropy_bound", "--per_call", "1", "4"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    bound, one, four, by_entropy = rows
    names = [(row["order"], row["option"]) for row in rows]
    assert names[:3] == [("bound", ""), ("ar", "per_call=1"), ("ar", "per_call=4")]
    assert (bound["calls"], one["calls"], four["calls"]) == (40, 32, 8)
    assert one["minus_bound"] == pytest.approx(one["bits"] - bound["bits"])
    assert four["minus_one"] == pytest.approx(four["bits"] - one["bits"]) and "minus_one" not in one
    model, cfg = load(checkpoint)
    ids, meta = read_split(str(corpus), "val", cfg)
    fair = evaluate.bound(model, ids, meta, cfg, "val", passes=40, windows=9)
    factor = fair["split_tokens"] / meta["splits"]["val"]["characters"] / math.log(2)
    assert bound["bits"] == pytest.approx(fair["nats"] * factor, abs=5 * bound["bits_se"])
    exact = evaluate.bound(
        model, ids, meta, cfg, "val", windows=9, order=dict(sampler="ar", per_call=4)
    )
    if len(ids) % cfg.seq_len == 0:  # else evaluate also counts the shorter last window
        assert four["bits"] == pytest.approx(exact["nats"] * factor, rel=1e-5)


@pytest.mark.parametrize("argv, words", [
    (["--orders", "llada"], ["llada", "margin"]), (["--per_call", "0"], ["--per_call 0"]),
    (["--passes", "0"], ["--passes 0", "at least 1"]), (["--windows", "-1"], ["--windows -1"]),
])  # fmt: skip
def test_bad_arguments(argv, words, checkpoint, capsys):
    refused(capsys, lambda: orders.main([str(checkpoint), *argv]), *words)
