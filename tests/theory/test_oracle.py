"""tasks/oracle.py: the perfect network and the truth against sums over all texts and states."""

import itertools
import json
import math

import pytest
import torch
from conftest import refused
from world import CANVASES as ALL_CANVASES
from world import MASK, TEXTS, L, V, ancestral_law, chi_square_p, exact_model, last, tiny

from samplers import SAMPLERS, STEPLESS
from tasks import oracle
from tasks.oracle import count_ngrams, denoiser_of, draw_texts, messages, total_variation


def hidden_world(states=2):
    """A hidden chain of 2 states and 3 tokens."""
    g = torch.Generator().manual_seed(1)
    random = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=g).mul(2).softmax(-1)
    step = random(states, states)
    return oracle.stationary(step), step, random(states, V)


def joint_of(world):
    """(27,) probabilities of all texts, summed over all paths of states."""
    start, step, emit = world
    total = torch.zeros(len(TEXTS), dtype=torch.float64)
    for path in itertools.product(range(len(start)), repeat=L):
        p = start[path[0]] * math.prod(step[a, b].item() for a, b in zip(path, path[1:]))
        total += p * torch.stack([emit[s, TEXTS[:, i]] for i, s in enumerate(path)]).prod(0)
    return total


WORLDS = pytest.mark.parametrize(
    "world", [hidden_world(), oracle.markov(V)], ids=["hidden", "markov"]
)


@WORLDS
def test_the_truth_is_the_sum_over_all_paths(world):
    joint = joint_of(world)
    assert joint.sum().item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(messages(world, TEXTS)[2].exp(), joint)
    for n in (1, 2, 3):
        want = torch.zeros(V**n, dtype=torch.float64)
        keys = (TEXTS[:, :n] * V ** torch.arange(n - 1, -1, -1)).sum(-1)
        torch.testing.assert_close(oracle.true_ngrams(world, n), want.index_add(0, keys, joint))


@WORLDS
def test_the_network_is_the_posterior_of_every_canvas(world):
    x = ALL_CANVASES[(ALL_CANVASES == MASK).any(-1)]
    t, at = torch.rand(len(x)), x == MASK
    want = exact_model(joint_of(world).view(V, V, V))(x, t, at)
    denoise, rows = denoiser_of(world)
    torch.testing.assert_close(denoise(x, t, at), want)
    part = at & (torch.arange(len(x)) % 3 == 0)[:, None]
    torch.testing.assert_close(denoise(x, t, part), want[part[at]])
    assert rows == [len(x), -(-len(x) // 3)]


@WORLDS
def test_samplers_of_the_network_have_their_enumerated_law(world):
    denoise, _ = denoiser_of(world)
    joint, x = joint_of(world), torch.full((20_000, L), MASK)
    law = ancestral_law(exact_model(joint.view(V, V, V)), x[0], "linear", 2)
    assert chi_square_p(last(SAMPLERS["ddpm_cache"](denoise, x, 2, tiny())), law) > 1e-4
    for exact in ("first_hitting", "ar", "confidence", "margin", "entropy"):
        texts = last(SAMPLERS[exact](denoise, x, L, tiny()))
        assert chi_square_p(texts, joint) > 1e-4, exact
    assert chi_square_p(last(SAMPLERS["llada"](denoise, x, L, tiny())), joint) < 1e-6
    assert chi_square_p(draw_texts(world, 20_000, L, seed=0), joint) > 1e-4


def test_every_word_of_the_grammar_agrees():
    """Without typos, no noun has a verb of another number, whatever is between them."""
    start, step, emit = oracle.grammar(typo=0)
    assert start.sum().item() == pytest.approx(1) and (step.sum(-1) - 1).abs().max() < 1e-12
    torch.testing.assert_close(start @ step, start)
    assert (oracle.grammar()[2].sum(-1) - 1).abs().max() < 1e-12 and oracle.grammar()[2].min() > 0
    texts = draw_texts((start, step, emit), 200, 30, seed=0)
    sentences = 0
    for text in texts.tolist():
        words = " ".join(oracle.WORDS[v] for v in text).split(" . ")[1:-1]  # whole sentences
        for sentence in words:
            subject, verb = [w for w in sentence.split() if w not in ("the", "big", "old")][:2]
            assert subject.endswith("s") != verb.endswith("s"), sentence
            sentences += 1
    assert sentences > 500
    assert not messages((start, step, emit), texts.flip(-1))[2].isfinite().any()


def test_total_variation_and_its_error():
    texts = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1]])
    counts = count_ngrams(texts, 2, 2)
    assert counts.tolist() == [[0, 2, 1, 0], [0, 0, 0, 3]]
    truth = torch.full((4,), 0.25, dtype=torch.float64)
    assert total_variation(counts, truth)[0] == pytest.approx((1 / 4 + 1 / 12 + 1 / 12 + 1 / 4) / 2)
    g = torch.Generator().manual_seed(0)
    values = []
    for _ in range(100):  # the error is the scatter of independent repetitions
        many = torch.randint(2, (200, 5), generator=g) & torch.randint(2, (200, 5), generator=g)
        values.append(total_variation(count_ngrams(many, 2, 2), truth))
    values = torch.tensor(values)
    assert values[:, 0].std().item() == pytest.approx(values[:, 1].mean().item(), rel=0.3)


def rows_of(capsys, *argv):
    oracle.main([*map(str, argv), "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("name", oracle.WORLDS)
def test_the_command_has_a_row_for_every_sampler(name, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    argv = [
        "--world",
        name,
        "--rows",
        24,
        "--length",
        12,
        "--steps",
        3,
        "--png",
        tmp_path / "a.svg",
    ]
    first, *rows = rows_of(capsys, *argv)
    assert first["sampler"] == oracle.EXACT and first["calls"] is None
    assert {row["sampler"] for row in rows} == set(SAMPLERS)
    assert all(0 <= row["tv"] <= 1 and row["nats_se"] > 0 for row in rows)
    calls = {row["sampler"]: row["calls"] for row in rows if row["sampler"] not in STEPLESS}
    assert all(number <= 4 for number in calls.values()) and calls["ddpm_cache"] <= 3
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    assert rows_of(capsys, *argv[:8], "--samplers", "margin")[1] in rows  # the same every time


def test_llada_collapses_and_confidence_reaches_the_floor(capsys):
    argv = ["--samplers", "confidence", "llada", "--steps", 32, "--rows", 128, "--length", 32]
    floor, confidence, llada = rows_of(capsys, *argv)
    assert confidence["tv"] < 3 * floor["tv"]
    assert abs(confidence["nats"] - floor["nats"]) < 4 * math.hypot(
        confidence["nats_se"], floor["nats_se"]
    )
    assert llada["tv"] > 10 * floor["tv"] and llada["nats"] < 0.6 * floor["nats"]


@pytest.mark.parametrize("argv, words", [
    (["--steps", 0], ["--steps 0", "at least 1"]), (["--rows", 1], ["--rows 1"]),
    (["--n", 6], ["--n 6", "at most 5"]), (["--n", 3, "--length", 2], ["--n 3", "--length 2"]),
    (["--png", "nowhere/a.png"], ["nowhere/a.png", "no such folder"]),
    (["--samplers", "magic"], ["magic", "llada"]), (["--world", "flat"], ["flat", "grammar"]),
])  # fmt: skip
def test_bad_arguments(argv, words, capsys):
    refused(capsys, lambda: oracle.main([*map(str, argv)]), *words)
