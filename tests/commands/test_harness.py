"""The adapter for the LM Evaluation Harness: its estimators against the enumerable
world, and whole runs."""

import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused, save
from world import (
    MASK,
    SCORES,
    TEXTS,
    L,
    V,
    exact_model,
    expected_loss,
    hostile_model,
    hostile_scores,
    last,
    law_of_choice,
    left_to_right_law,
    random_joint,
    tiny,
    tiny_ar,
)

from configs import Config, as_ar
from data.checkpoints import load
from data.tokenizer import load_tokenizer
from diffusion import alpha, ar, reveal_rate, time_at
from model import DiT
from sample import frames
from samplers import OPTIONS, SAMPLERS, default_options
from tasks import harness
from tasks.harness import (
    Request,
    batches,
    by_order,
    chain,
    fill,
    is_greedy,
    mc,
    split_text,
    truncate,
)

ROOT = Path(__file__).parents[2]
EVERY = [  # all texts after all prefixes
    Request(text[:p], text[p:]) for p in range(L + 1) for text in TEXTS.tolist()
]
ALL = torch.ones(1, L, dtype=torch.bool)
SCHEDULED = pytest.mark.parametrize("schedule", ["linear", "cosine"])


def conditionals(joint):
    """log p(target | prefix) of EVERY under a joint (27,)."""
    p = joint.reshape(V, V, V)
    return [(p[tuple(r.prefix + r.target)] / p[tuple(r.prefix)].sum()).log().item() for r in EVERY]


def predict(model, x, t=0.5):
    """The network's (L, V) log-probabilities for one canvas."""
    return model(x[None], torch.tensor([float(t)], dtype=torch.float64), ALL).log_softmax(-1)


def time_of(schedule, masked, total):
    """The t at which the schedule masks `masked` of `total` tokens, as the docstring says."""
    return time_at(schedule, torch.tensor(masked / total, dtype=torch.float64)).item()


def network(seed=0, **fields):
    """A random network of eight tokens, sure of its predictions; with bos=..., causal."""
    torch.manual_seed(seed)
    size = dict(vocab_size=5, seq_len=8, n_embd=16, n_head=2, n_layer=2, cond_dim=8)
    model = DiT(tiny_ar(**fields) if fields else Config(**size, time_cond=True)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    return model, model.cfg


def record_calls(model):
    """The model, and a list to which it appends (canvases, times) of each call."""
    calls = []
    return lambda x, t, at: calls.append((x, t)) or model(x, t, at), calls


# --------------------------------------------------------------------------------------------------
# The estimators


@SCHEDULED
def test_the_chain_rule_enumerated(schedule):
    """Every text after every prefix, with a network that depends on t: t is that of the masked
    fraction of the target, whatever the prefix."""
    model = hostile_model()
    for request, got in zip(EVERY, chain(model, tiny(schedule=schedule), EVERY)):
        text, p, want = torch.tensor(request.prefix + request.target), len(request.prefix), 0.0
        for i in range(p, L):
            x = text.masked_fill(torch.arange(L) >= i, MASK)
            want += predict(model, x, time_of(schedule, L - i, L - p))[i, text[i]].item()
        assert got == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("name, prefixes", [("exact", L + 1), ("timeless", L + 1), ("hostile", 1)])
def test_the_chain_rule_is_the_law_of_the_sampler_ar(name, prefixes):
    """After every prefix, if the network ignores t; of whole texts also if it does not."""
    hostile = hostile_model()
    model = {
        "exact": exact_model(random_joint()),
        "timeless": lambda x, t, at: hostile(x, 0 * t, at),
        "hostile": hostile,
    }[name]
    requests = [r for r in EVERY if len(r.prefix) < prefixes]
    for request, got in zip(requests, chain(model, tiny(), requests)):
        canvas = torch.tensor(request.prefix + [MASK] * len(request.target))
        law = left_to_right_law(model, canvas, "linear", 1)
        want = law[(TEXTS == torch.tensor(request.prefix + request.target)).all(-1)].log().item()
        assert got == pytest.approx(want, abs=1e-5)


def test_the_chain_rule_of_the_exact_network_is_the_truth():
    joint = random_joint()
    got = chain(exact_model(joint), tiny(), EVERY)
    np.testing.assert_allclose(got, conditionals(joint), atol=1e-5)


@SCHEDULED
@pytest.mark.parametrize("per_call", [1, 2])
@pytest.mark.parametrize("order", SCORES)
def test_an_order_is_the_law_of_its_sampler_after_every_prefix(order, per_call, schedule):
    model, cfg = hostile_model(), tiny(schedule=schedule)
    got = by_order(model, cfg, EVERY, order=dict(sampler=order, per_call=per_call), batch_size=7)
    enumerate_law = law_of_choice(SCORES[order], lambda scores, *args: per_call)
    laws = {}
    for request, log_p in zip(EVERY, got):
        canvas = (*request.prefix, *[MASK] * len(request.target))
        if canvas not in laws:
            laws[canvas] = enumerate_law(model, torch.tensor(canvas), schedule, 1)
        text = (TEXTS == torch.tensor(request.prefix + request.target)).all(-1)
        assert math.exp(log_p) == pytest.approx(laws[canvas][text].item(), rel=1e-6)


def test_from_left_to_right_an_order_is_the_chain_rule():
    model, cfg = network()
    requests = [Request([1, 2], [3, 0, 4]), Request([], [0, 1]), Request([3], [])]
    for w in (0.0, 0.7):
        one = by_order(model, cfg, requests, w, dict(sampler="ar", per_call=1))
        np.testing.assert_allclose(one, chain(model, cfg, requests, w), atol=1e-5)


def test_scores_are_normalised():
    scores, cfg = hostile_scores(), tiny(loss="sedd")
    normal = lambda *a: scores(*a).log_softmax(-1)
    np.testing.assert_allclose(chain(scores, cfg, EVERY), chain(normal, tiny(), EVERY), atol=1e-5)
    few = partial(mc, samples=3)
    np.testing.assert_allclose(few(scores, cfg, EVERY), few(normal, tiny(), EVERY), atol=1e-5)


def bound(model, request, cfg, nodes=200):
    """The bound on -log p(target | prefix): all masks of the target enumerated, t by quadrature."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    t, dt = torch.from_numpy((x + 1) / 2), torch.from_numpy(w / 2)
    text, n, total = torch.tensor(request.prefix + request.target), len(request.target), 0.0
    for masks in itertools.product((False, True), repeat=n):
        masked = torch.tensor([False] * (L - n) + list(masks))
        mass = 1 - alpha(cfg, t)
        weight = dt * reveal_rate(t, cfg) * mass ** sum(masks) * (1 - mass) ** (n - sum(masks))
        canvas = text.masked_fill(masked, MASK).repeat(nodes, 1)
        log_p = model(canvas, t, torch.ones_like(canvas, dtype=torch.bool)).view(nodes, L, V)
        total -= (weight * log_p[:, torch.arange(L), text][:, masked].sum(-1)).sum().item()
    return total


@SCHEDULED
def test_monte_carlo_is_the_bound_without_bias(schedule):
    """With a network that depends on t, and few samples; error bars from independent noise."""
    model, cfg, n = hostile_model(), tiny(schedule=schedule, time_cond=True), 1500
    whole = expected_loss("mdlm", model, torch.tensor([1, 0, 2]), cfg)
    assert bound(model, Request([], [1, 0, 2]), cfg) == pytest.approx(whole, abs=1e-3)
    for prefix, target in (([0], [2, 1]), ([], [1, 0, 2]), ([2, 2], [1])):
        runs = [Request(prefix, target, (i,)) for i in range(n)]
        runs = torch.tensor(mc(model, cfg, runs, samples=4, batch_size=2000))
        want, error = -bound(model, Request(prefix, target), cfg), runs.std() / n**0.5
        assert abs(runs.mean() - want) < 4 * error and error < 0.05


@SCHEDULED
def test_all_of_them_take_the_time_from_the_masked_fraction_of_the_target(schedule):
    """With l of n tokens masked, chain and greedy decoding pass the t at which the schedule masks
    l / n; mc draws the masked fraction from its law given l, Beta(l, n + 1 - l)."""
    cfg, n = tiny(schedule=schedule), 2
    for decode in (
        lambda model: chain(model, cfg, [Request([1], [0, 2])]),
        lambda model: is_greedy(model, cfg, [Request([1], t) for t in ([0, 0], [0, 1], [1, 0],
                                [1, 1], [0, 2], [2, 0], [1, 2], [2, 1], [2, 2])]),
        lambda model: fill(model, cfg, torch.tensor([[1, MASK, MASK]]), [0], 0.0, "float32"),
    ):  # fmt: skip
        model, calls = record_calls(hostile_model())
        decode(model)
        pairs = [pair for x, t in calls for pair in zip((x == MASK).sum(-1).tolist(), t.tolist())]
        assert {masked for masked, _ in pairs} == {1, 2}
        assert all(abs(t - time_of(schedule, masked, n)) < 1e-6 for masked, t in pairs)
    model, calls = record_calls(hostile_model())
    mc(model, cfg, [Request([1], [0, 2])], samples=4000, batch_size=4000)
    (x, t), = calls  # fmt: skip
    for masked in (1, 2):
        fraction = 1 - alpha(schedule, t[(x == MASK).sum(-1) == masked])
        want, variance = masked / (n + 1), masked * (n + 1 - masked) / (n + 1) ** 2 / (n + 2)
        assert abs(fraction.mean() - want) < 4 * (variance / len(fraction)) ** 0.5
        assert fraction.var() == pytest.approx(variance, rel=0.15)


def test_the_number_of_masks_is_stratified():
    """Twice as many samples as tokens: each number of masks comes twice."""
    model, calls = record_calls(hostile_model())
    mc(model, tiny(), [Request([], [1, 0, 2])], samples=6)
    counts = torch.cat([(x == MASK).sum(-1) for x, _ in calls])
    assert sorted(counts.tolist()) == [1, 1, 2, 2, 3, 3]


def draw_orders(request, k, seed):
    """In place of `draw_noise`: 3 x 3! samples have every number of masks in every order once."""
    order = list(itertools.permutations(range(3)))[k % 6][: len(request.target)]
    return torch.tensor([0.5, *((place + 0.5) / 3 for place in order)]).double()


@pytest.mark.parametrize("world", ["exact", "hostile"])
def test_monte_carlo_over_all_masks_is_the_mean_over_all_orders(world, monkeypatch):
    """So it is the truth for the exact network, and else the mean of all orders' chain rules."""
    monkeypatch.setattr(harness, "draw_noise", draw_orders)
    joint, requests = random_joint(), [r for r in EVERY if len(r.target) == 3]
    table = exact_model(joint) if world == "exact" else hostile_model()
    model = lambda x, t, at: table(x, 0 * t, at)
    got = mc(model, tiny(), requests, samples=18)
    if world == "exact":
        truth = [joint[tuple(r.target)].log().item() for r in requests]
        np.testing.assert_allclose(got, truth, atol=1e-5)
    for request, value in zip(requests, got):
        text, want = torch.tensor(request.target), []
        for order in itertools.permutations(range(L)):
            x, total = torch.full((L,), MASK), 0.0
            for i in order:
                total += predict(model, x)[i, text[i]].item()
                x = torch.where(torch.arange(L) == i, text, x)
            want.append(total)
        assert value == pytest.approx(sum(want) / 6, abs=1e-5)


def test_common_random_numbers_steady_the_ranking():
    """Options that differ in one token: under the same masks the variance of their difference is
    far smaller, that of each alone the same."""
    model, cfg = network()
    options = [[1, 2, 3, 4, 0, 1], [1, 2, 3, 4, 0, 2], [1, 2, 3, 4, 0, 1, 1]]
    together = [Request([3], option) for option in options]
    apart = [Request([3], option, (i,)) for i, option in enumerate(options)]

    def variances(requests):
        runs = np.array([mc(model, cfg, requests, samples=4, seed=seed) for seed in range(150)])
        return runs.var(0), (runs[:, 1:] - runs[:, :1]).var(0)

    (alone, difference), (alone_apart, difference_apart) = variances(together), variances(apart)
    assert (difference < difference_apart / 2.5).all()
    assert (alone < 2 * alone_apart).all() and (alone_apart < 2 * alone).all()


def test_noise_depends_on_the_position_in_the_target_alone():
    noise = [harness.draw_noise(Request([1] * n, [0] * n, (7,)), 3, seed=1) for n in (2, 5)]
    assert (noise[0] == noise[1][:3]).all() and len(noise[1]) == 6
    others = (((8,), 3, 1), ((7,), 4, 1), ((7,), 3, 2))
    others = [harness.draw_noise(Request([], [0], key), k, seed)[1] for key, k, seed in others]
    assert len({noise[0][1].item(), *(u.item() for u in others)}) == 4


def requests_of_all_lengths(n=20):
    rng = np.random.default_rng(0)
    lengths = [(int(rng.integers(0, 4)), int(rng.integers(0, 5))) for _ in range(n)]
    ids = lambda size: rng.integers(0, 5, size).tolist()
    return [Request(ids(a), ids(b), (i,)) for i, (a, b) in enumerate(lengths)]


@pytest.mark.parametrize("w", [0.0, 0.8])
def test_results_do_not_depend_on_the_batch(w):
    """Alone, in batches of three, all at once, and in another order; some targets are empty."""
    model, cfg = network()
    requests = requests_of_all_lengths()
    for estimator in (chain, partial(mc, samples=6), is_greedy):
        want = estimator(model, cfg, requests, w=w, batch_size=1000)
        for got in (
            estimator(model, cfg, requests, w=w, batch_size=3),
            estimator(model, cfg, requests[::-1], w=w, batch_size=7)[::-1],
            [estimator(model, cfg, [r], w=w)[0] for r in requests],
        ):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
        for r, value in zip(requests, want):
            assert r.target or value == (True if estimator is is_greedy else 0.0)


def test_batches_are_full_and_of_one_length():
    requests = requests_of_all_lengths(40)
    lengths = [len(r.prefix + r.target) for r in requests]
    rows, seen, sizes = [3 * (n > 0) for n in lengths], [], []
    for i, k, x0, offset in batches(requests, rows, batch_size=8):
        assert {lengths[r] for r in i.tolist()} == {x0.shape[1]}
        assert (offset[:, -1] == torch.tensor([len(requests[r].target) - 1 for r in i])).all()
        seen += zip(i.tolist(), k.tolist())
        sizes.append(len(i))
    assert sorted(seen) == [(i, k) for i, n in enumerate(rows) for k in range(n)]
    full = sum(math.ceil(3 * lengths.count(n) / 8) for n in set(lengths) if n)
    assert max(sizes) == 8 and len(sizes) == full


@pytest.mark.parametrize("bos", [False, True])
def test_ar_is_exact_in_one_forward(bos):
    model, cfg = network(bos=bos)
    requests = [Request([1, 2], [3, 4, 0]), Request([4], [2, 2, 2, 1]), Request([3] * bos, [1, 1])]
    calls = []
    model.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    got = chain(model, cfg, requests)
    assert sum(calls) == len(requests)
    for request, value in zip(requests, got):
        x = torch.tensor([request.prefix + request.target])
        target = torch.arange(x.shape[1])[None] >= len(request.prefix)
        assert value == pytest.approx(-ar(model, x, target, cfg).sum().item(), abs=1e-4)


# --------------------------------------------------------------------------------------------------
# Guidance


@pytest.mark.parametrize("w", [0.0, 0.7])
def test_guided_estimators_are_those_of_the_guided_conditionals(w):
    """The same as of a network that mixes both predictions by the formula, for each prefix; w = 0
    is no guidance, to the bit."""
    model, cfg = hostile_model(), tiny()
    for p in range(L):
        requests = [r for r in EVERY if len(r.prefix) == p]

        def mixed(x, t, at, p=p):
            bare = x.masked_fill(torch.arange(L) < p, MASK)
            return ((1 + w) * model(x, t, at) - w * model(bare, t, at)).log_softmax(-1)

        for estimator in (chain, partial(mc, samples=8), is_greedy):
            got, want = estimator(model, cfg, requests, w=w), estimator(mixed, cfg, requests)
            np.testing.assert_allclose(got, want, atol=1e-5)
            plain = estimator(model, cfg, requests)
            assert got == plain if w == 0 else p == 0 or estimator is is_greedy or got != plain


def test_a_first_token_that_is_always_given_is_not_hidden():
    model, calls = record_calls(hostile_model())
    chain(model, tiny(bos=True), [Request([1, 2], [0])], w=1.0)
    assert torch.cat([x for x, _ in calls]).tolist() == [[1, 2, MASK], [1, MASK, MASK]]


# --------------------------------------------------------------------------------------------------
# Greedy answers and free text


def decode_greedily(model, prefix, schedule):
    """The surest position first, one token per call."""
    n = L - len(prefix)
    x = torch.tensor(prefix + [MASK] * n)
    for left in range(n, 0, -1):
        log_p = predict(model, x, time_of(schedule, left, n))
        i = max((i for i in range(L) if x[i] == MASK), key=lambda i: log_p[i].max().item())
        x[i] = log_p[i].argmax()
    return x.tolist()


@SCHEDULED
def test_the_greedy_flag_is_that_of_decoding(schedule):
    model, cfg = hostile_model(), tiny(schedule=schedule)
    for r, flag in zip(EVERY, is_greedy(model, cfg, EVERY, batch_size=50)):
        assert flag == (decode_greedily(model, r.prefix, schedule) == r.prefix + r.target)
    for p in range(L):
        for prefix in {tuple(r.prefix) for r in EVERY if len(r.prefix) == p}:
            canvas = torch.tensor([[*prefix] + [MASK] * (L - p)])
            got = fill(model, cfg, canvas, [0], 0.0, "float32")
            assert got[0].tolist() == decode_greedily(model, [*prefix], schedule)


def test_a_row_leaves_at_its_first_wrong_token():
    model, calls = record_calls(hostile_model())
    requests = [Request([], text) for text in TEXTS.tolist()]
    assert sum(is_greedy(model, tiny(), requests, batch_size=27)) == 1
    assert [len(x) for x, _ in calls] == [27, 9, 3]  # a third stays each time


@pytest.mark.parametrize("bos", [False, True])
def test_greedy_ar_decodes_from_left_to_right(bos):
    model, cfg = network(bos=bos)
    x = torch.tensor([[1, 3] + [cfg.mask_id] * 4, [2, 0] + [cfg.mask_id] * 4])
    for i in range(2, 6):
        x[:, i] = model(x, None, torch.arange(6).expand(2, 6) == i).argmax(-1)
    canvas = x.masked_fill(torch.arange(6) >= 2, cfg.mask_id)
    assert (fill(model, cfg, canvas, [0, 1], 0.0, "float32") == x).all()
    good = [Request(row[:2], row[2:]) for row in x.tolist()]
    bad = [Request(r.prefix, r.target[:-1] + [(r.target[-1] + 1) % 5]) for r in good]
    assert is_greedy(model, cfg, good + bad) == [True, True, False, False]


@pytest.mark.parametrize("options", [
    {}, {"temperature": 0.7}, {"top_p": 0.6}, {"w": 3.0}, {"sampler": "confidence"},
    {"sampler": "threshold", "sampler_options": {"threshold": 0.3}},
])  # fmt: skip
def test_sampled_text_is_that_of_sample_py(options):
    """Draw for draw, and whatever else is in the batch."""
    model, cfg = network()
    canvases = [torch.tensor([a, b] + [cfg.mask_id] * 5) for a in range(3) for b in range(2)]
    rows = [4, 1, 0, 5, 3, 2]
    law = dict(temperature=1.0, w=0.0, steps=4, seed=3, dtype="float32") | options
    got = fill(model, cfg, torch.stack(canvases), rows, **law)
    theirs = {"guidance" if k == "w" else k: v for k, v in law.items()}
    for text, row, canvas in zip(got, rows, canvases):
        want = frames(model, cfg, canvas, [row], **dict(sampler="ddpm_cache") | theirs)
        assert (text == last(want)[0]).all()
    assert len(got.unique(dim=0)) == 6


# --------------------------------------------------------------------------------------------------
# Text


def test_splitting_a_text():
    """Spaces that end the context move to the continuation; a token that spans the border
    does not make it empty."""
    letters = load_tokenizer({"kind": "char", "characters": " \nabc"}).encode
    assert split_text(letters, "ab \n", "c") == Request([2, 3], [0, 1, 4])
    assert split_text(letters, "ab", " c", (3,)) == Request([2, 3], [0, 4], (3,))
    assert split_text(letters, "", "c") == Request([], [4])
    assert split_text(letters, " ", "c") == Request([], [0, 4])
    assert split_text(letters, "ab", "") == Request([2, 3], [])
    pieces = {"": [], "a": [0], "b": [1], "c": [2], "ab": [3], "abc": [3, 2], "bc": [4]}
    merging = lambda text, inside=False: pieces[text]
    assert split_text(merging, "a", "b") == Request([0], [1])  # the whole text is one token
    assert split_text(merging, "a", "bc") == Request([0], [2])  # as in the harness


def test_long_texts_lose_their_beginning(capsys):
    cfg = tiny_ar(bos=True)  # eight tokens, the first of which is given
    cases = [
        (Request([1] * 4, [2] * 3, (5,)), Request([7] + [1] * 4, [2] * 3, (5,))),
        (Request([*range(6)], [8, 9]), Request([7, 1, 2, 3, 4, 5], [8, 9])),
        (Request([1], [*range(9)]), Request([7], [2, 3, 4, 5, 6, 7, 8])),
        (Request([3] * 9, []), Request([7] + [3] * 7, [])),
    ]
    given, want = map(list, zip(*cases))
    assert truncate(given, [7], cfg) == want
    assert capsys.readouterr().err == "note: 3 of 4 texts cut on the left to 8 tokens\n"
    assert truncate(given[:1], [], cfg) == given[:1] and not capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Whole runs, with the real lm_eval

WORDS = "oak elm fir ash yew"
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {docs}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
doc_to_target: "{target}"
metric_list: [{metrics}]
{more}
"""
METRIC = "{metric: !function scorer.score, aggregation: mean, higher_is_better: true}"
SCORER = """import evaluate  # a task may import this package
assert evaluate.__version__


def score(references, predictions, **_):
    return float(' ' not in predictions[0] and len(predictions[0]) <= 9)
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with a task of every kind over local data. lm_eval's own tasks are not indexed and
    the machine is not described, which takes long."""
    pytest.importorskip("lm_eval", reason="the LM Evaluation Harness is not installed")
    import lm_eval.evaluator
    import lm_eval.tasks

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
    quick = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", quick)
    rng, words = np.random.default_rng(0), WORDS.split()
    docs = [
        {"text": " ".join(rng.choice(words, 3)), "options": words, "gold": int(rng.integers(5))}
        for _ in range(6)
    ]
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (folder / "scorer.py").write_text(SCORER)
    named = lambda *names: ", ".join(f"{{metric: {name}}}" for name in names)
    pages = "{{text}} {{text}} {{text}}"
    for name, kind, target, metrics, more in (
        ("choose", "multiple_choice", "{{gold}}", named("acc"), 'doc_to_choice: "{{options}}"'),
        ("last", "loglikelihood", " {{options[gold]}}", named("perplexity", "acc"), ""),
        ("page", "loglikelihood_rolling", pages, named("bits_per_byte"), ""),
        ("free", "generate_until", "{{options[gold]}}", METRIC,
         "generation_kwargs: {until: [' '], max_gen_toks: 9}"),
    ):  # fmt: skip
        fields = dict(name=name, kind=kind, target=target, metrics=metrics, more=more)
        text = TASK.format(docs=folder / "docs.jsonl", **fields)
        (folder / f"{name}.yaml").write_text(text)
    return folder, docs


def run(capsys, *argv):
    """The command's JSON."""
    harness.main([*map(str, argv), "--json"])
    return json.loads(capsys.readouterr().out)


PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "oak", "elm", "fir", "##s"]


def test_free_text_is_what_follows_the_prompt(monkeypatch, capsys):
    """Up to a stop string or the end of text, with its first space. Prompts lose their beginning,
    equal shapes share a batch, and other settings do not."""
    pytest.importorskip("lm_eval", reason="the LM Evaluation Harness is not installed")
    from lm_eval.api.instance import Instance

    spec = {"kind": "wordpiece", "vocab": "\n".join(PIECES)}
    cfg = Config(vocab_size=8, seq_len=8, n_embd=8, n_head=2, n_layer=1, bos=True)
    calls = []

    def fill(model, cfg, x, rows, w, dtype, temperature, top_p, seed):
        assert (w, dtype, seed) == (0.5, "float32", 9)
        calls.append((x.tolist(), rows, temperature, top_p))
        n = int((x[0] == 8).sum())
        new = torch.tensor([5, 7, 6, 3, 4])[:n]  # elms fir [SEP] oak
        return torch.cat((x[:, :-n], new.repeat(len(x), 1)), 1)

    def generate(requests, **overrides):
        calls.clear()
        instances = [Instance("generate_until", {}, r, i) for i, r in enumerate(requests)]
        return harness.make_adapter(
            DiT(cfg), cfg, load_tokenizer(spec), chain, 0.5, "float32", overrides, {"seed": 9},
            batch_size=2,
        ).generate_until(instances)  # fmt: skip

    monkeypatch.setattr(harness, "fill", fill)
    requests = [
        ("oak", {"until": ["fir"], "max_gen_toks": 5}),
        ("elm", {"until": "nothing", "max_gen_toks": 5}),
        ("fir", {"max_gen_toks": 5, "do_sample": True, "temperature": 0.3}),
        ("fir", {"max_gen_toks": 5}),
        ("oak elm fir oak", {"max_gen_toks": 5}),
        ("oak", {}),
    ]
    assert generate(requests) == [" elms ", *[" elms fir"] * 5]
    assert calls == [
        ([[2, 4, 8, 8, 8, 8, 8], [2, 5, 8, 8, 8, 8, 8]], [0, 1], 0.0, 1.0),
        ([[2, 6, 8, 8, 8, 8, 8]], [3], 0.0, 1.0),
        ([[2, 6, 8, 8, 8, 8, 8]], [2], 0.3, 1.0),
        ([[2, 6, 4, 8, 8, 8, 8, 8]], [4], 0.0, 1.0),
        ([[2, 4, 8, 8, 8, 8]], [5], 0.0, 1.0),  # half of the model's length
    ]
    settings = {"max_gen_toks": 5, "temperature": 0.3, "top_p": 0.8}
    generate([("oak", settings)])
    assert calls[0][2:] == (0.3, 0.8)
    generate([("oak", settings)], temperature=0.9)
    assert calls[0][2:] == (0.9, 0.8)
    for bad in ({"top_p": 0}, {"temperature": -1, "do_sample": True}):
        request = ("oak", {"max_gen_toks": 5} | bad)
        refused(capsys, lambda request=request: generate([request]), "temperature=", "in (0, 1]")


def test_every_kind_of_task_end_to_end(tasks, checkpoint, capsys):
    """A second run gives the same numbers, other batches nearly, and they are the estimators'."""
    import evaluate

    folder, docs = tasks
    argv = (checkpoint, "--include_path", folder, "--mc", 8, "--tasks")
    argv = (*argv, "choose", "last", "page", "free")
    first = run(capsys, *argv)
    assert run(capsys, *argv) == first
    results = first["results"]
    assert results["free"]["score,none"] == 1
    for name, other in run(capsys, *argv, "--batch_size", 5)["results"].items():
        for key, value in other.items():
            want = results[name][key]
            assert value == (pytest.approx(want, rel=1e-3) if isinstance(value, float) else want)
    assert run(capsys, *argv, "--seed", 1)["results"]["last"] != results["last"]
    assert evaluate.bound  # ours again

    model, cfg = load(checkpoint)
    encode, pages = load_tokenizer(model.tokenizer).encode, []
    log_p = [
        mc(model, cfg, [Request(encode(doc["text"]), encode(f" {word}"), (i,))], samples=8)[0]
        for i, doc in enumerate(docs)
        for word in doc["options"]
    ]
    log_p, gold = np.array(log_p).reshape(6, 5), np.array([doc["gold"] for doc in docs])
    assert results["choose"]["acc,none"] == pytest.approx((log_p.argmax(-1) == gold).mean())
    perplexity = math.exp(-log_p[range(6), gold].mean())
    assert results["last"]["perplexity,none"] == pytest.approx(perplexity, rel=1e-4)
    for i, doc in enumerate(docs):
        ids = encode(" ".join([doc["text"]] * 3))
        starts = range(0, len(ids), cfg.seq_len)
        pages += [Request([], ids[a : a + cfg.seq_len], (i, a)) for a in starts]
    size = sum(len(page.target) for page in pages)  # characters are bytes here
    bits = -sum(mc(model, cfg, pages, samples=8)) / size / math.log(2)
    assert results["page"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)


def test_options_reach_the_estimators(tasks, checkpoint, capsys):
    argv = (checkpoint, "--include_path", tasks[0], "--limit", 3, "--tasks")
    chained = run(capsys, *argv, "last", "--estimator", "chain")
    assert chained["estimator"] == "chain rule" and chained["results"]["last"]["sample_len"] == 3
    guided = run(capsys, *argv, "last", "--estimator", "chain", "--guidance", 0.5)
    perplexity = lambda record: record["results"]["last"]["perplexity,none"]
    assert perplexity(guided) != perplexity(chained)
    one = run(capsys, *argv, "last", "--estimator", "ar")
    assert perplexity(one) == pytest.approx(perplexity(chained), rel=1e-4)
    two = run(capsys, *argv, "last", "free", "--estimator", "ar", "--per_call", 2)
    assert two["estimator"] == "exact for the order ar, per_call 2"
    assert perplexity(two) != pytest.approx(perplexity(one), rel=1e-3)
    harness.main([*map(str, argv), "free", "--gen_kwargs", "temperature=1,max_gen_toks=4"])
    out = capsys.readouterr().out
    assert "|free" in out and "likelihood: bound, 128 samples; guidance 0, seed 0, float32" in out
    with pytest.raises(SystemExit):
        run(capsys, *argv, "free", "--gen_kwargs", "max_gen_toks=32")
    assert "error: max_gen_toks=32: must be below 32" in capsys.readouterr().err


@pytest.fixture
def write(tasks, checkpoint, capsys, monkeypatch):
    """write(*options): the texts of the task `free` with these options, and the record."""

    def call(*options):
        texts, whole = [], harness.fill

        def fill(*args, **kwargs):
            texts.extend((x := whole(*args, **kwargs)).tolist())
            return x

        with monkeypatch.context() as patch:
            patch.setattr(harness, "fill", fill)
            argv = ("--include_path", tasks[0], "--tasks", "free", *options)
            record = run(capsys, checkpoint, *argv)
        return texts, record

    return call


def test_temperature_and_top_p_of_free_text(write):
    """The options replace the task's; a tiny nucleus is greedy."""
    greedy, record = write()
    assert "temperature" not in record and record["sampler"] is None
    hot, record = write("--temperature", 1)
    assert record["temperature"] == 1 and hot != greedy
    assert write("--gen_kwargs", "temperature=1")[0] == hot
    assert write("--gen_kwargs", "temperature=1", "--temperature", 0)[0] == greedy
    assert write("--temperature", 1, "--seed", 1)[0] != hot
    assert write("--temperature", 1, "--steps", 1)[0] != hot
    small, record = write("--temperature", 1, "--top_p", 1e-9)
    assert record["top_p"] == 1e-9
    assert small == write("--sampler", "ddpm_cache")[0] != hot
    assert write("--gen_kwargs", "temperature=1,top_p=1e-9")[0] == small
    assert write("--gen_kwargs", "temperature=1,top_p=1e-9", "--top_p", 1)[0] == hot


@pytest.mark.parametrize("sampler, name", [
    (sampler, name) for sampler, f in SAMPLERS.items() for name in default_options(f)
    if sampler != "llada"
])  # fmt: skip
def test_each_samplers_option_changes_the_free_text(sampler, name, write):
    argv = ("--temperature", 1, "--steps", 20, "--sampler", sampler, f"--{name}")
    (low, record), (high, _) = write(*argv, 0), write(*argv, min(OPTIONS[name], 9))
    assert record[name] == 0 and low != high
    default = default_options(SAMPLERS[sampler])[name]
    assert write(*argv, default)[0] == write(*argv[:-1])[0]


def test_the_ar_twin_end_to_end(tasks, tmp_path, capsys):
    cfg = as_ar(Config(vocab_size=27, seq_len=16, n_embd=16, n_head=2, n_layer=2))
    path = save(tmp_path / "ar.pt", cfg)
    state = torch.load(path, weights_only=True)
    for name, weight in state["ema"].items():
        weight.mul_(not name.startswith("head"))  # uniform predictions
    torch.save(state, path)
    argv = (path, "--include_path", tasks[0], "--tasks")
    record = run(capsys, *argv, "choose", "page", "free")
    bits = record["results"]["page"]["bits_per_byte,none"]
    assert record["estimator"] == "exact" and bits == pytest.approx(math.log2(27), rel=1e-4)
    options = ["--guidance", "1"], ["--sampler", "ddpm"], ["--estimator", "margin"]
    for option in options:
        command = [*map(str, argv), "choose", *option]
        refused(capsys, lambda command=command: harness.main(command), option[0])


def test_two_processes_share_the_answers(checkpoint, monkeypatch):
    """Each of two processes computes every second answer; together they are those of one."""
    pytest.importorskip("lm_eval", reason="the LM Evaluation Harness is not installed")
    from lm_eval.api.instance import Instance

    model, cfg = load(checkpoint)
    tokenizer, words = load_tokenizer(model.tokenizer), WORDS.split()
    adapter = harness.make_adapter(
        model, cfg, tokenizer, partial(mc, samples=4), 0.0, "float32", {}, {"seed": 0}, batch_size=2
    )
    settings = {"max_gen_toks": 5, "temperature": 1.0, "do_sample": True}
    kinds = {  # method: its requests
        "loglikelihood": [(word, f" {other}") for word in words for other in words[:2]],
        "loglikelihood_rolling": [(" ".join(words[:n]),) for n in range(1, 6)],
        "generate_until": [(word, settings) for word in words],
    }
    make = lambda kind: [
        Instance(kind, {}, request, 0, ("task", i, 1)) for i, request in enumerate(kinds[kind])
    ]
    for kind in kinds:
        whole, parts = getattr(adapter, kind)(make(kind)), []
        for rank in (0, 1):
            with monkeypatch.context() as patch:
                patch.setattr(harness, "share", lambda items, rank=rank: items[rank::2])
                patch.setattr(harness, "gather", list)
                parts.append(getattr(adapter, kind)(make(kind)))
        both = [None] * len(whole)
        both[::2], both[1::2] = parts
        assert len(parts[0]) - len(parts[1]) in (0, 1)
        if kind == "generate_until":
            assert both == whole and len(set(whole)) > 1
        else:
            assert np.allclose(both, whole, rtol=1e-5)


@pytest.mark.parametrize("argv, message", [
    (["--tasks", "nosuchtask"], "--tasks nosuchtask: "),
    (["--tasks", "choose", "--include_path", "gone"], "--include_path gone: no such folder"),
    (["--tasks", "choose", "--mc", "0"], "--mc 0: must be at least 1"),
    (["--tasks", "choose", "--limit", "1.5"], "--limit 1.5: must be a number of documents"),
    (["--tasks", "choose", "--limit", "0"], "--limit 0.0: must be a number of documents"),
    (["--tasks", "choose", "--guidance", "-1"], "--guidance -1.0: must be at least 0"),
    (["--tasks", "choose", "--temperature", "-1"], "--temperature -1.0: must be at least 0"),
    (["--tasks", "choose", "--top_p", "0"], "--top_p 0.0: must be above 0 and at most 1"),
    (["--tasks", "choose", "--eta", "0.1"], "--eta 0.1: an option of remdm_cap"),
    (["--tasks", "choose", "--sampler", "threshold", "--threshold", "2"], "--threshold 2.0: must"),
    (["--estimator", "elbo", "--tasks", "choose"], "argument --estimator: invalid choice"),
    (["--estimator", "ar", "--gamma", "1", "--tasks", "choose"], "--gamma 1.0: an option of entr"),
    ([], "the following arguments are required: --tasks"),
])  # fmt: skip
def test_bad_input_is_one_line(argv, message, tasks, checkpoint, capsys):
    argv = argv if "--include_path" in argv else [*argv, "--include_path", str(tasks[0])]
    with pytest.raises(SystemExit) as exit:
        harness.main([str(checkpoint), *argv])
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and not out
    assert err.splitlines()[-1].startswith(f"error: {message}")


def test_text_that_the_tokenizer_cannot_write_is_one_line(tasks, checkpoint, capsys):
    text = (tasks[0] / "docs.jsonl").read_text()
    (tasks[0] / "docs.jsonl").write_text(text.replace("oak", "OAK"))
    with pytest.raises(SystemExit):
        run(capsys, checkpoint, "--tasks", "choose", "--include_path", tasks[0])
    assert "error: a task's text: not in the vocabulary: 'A' 'K' 'O'" in capsys.readouterr().err


def test_without_lm_eval_there_is_a_hint(checkpoint, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    command = [str(checkpoint), "--tasks", "lambada"]
    refused(capsys, lambda: harness.main(command), "pip install lm_eval")


# --------------------------------------------------------------------------------------------------
# Our evaluate.py must not be what a task gets


@pytest.mark.parametrize("entry", ["", ".", str(ROOT), f"{ROOT}/tests/.."])
def test_the_root_is_hidden_however_it_is_spelled(entry, monkeypatch):
    monkeypatch.chdir(ROOT)
    elsewhere = [p for p in sys.path if Path(p).resolve() != ROOT.resolve()]
    monkeypatch.setattr(sys, "path", [entry, *elsewhere])
    monkeypatch.setitem(sys.modules, "evaluate", None)  # restored afterwards
    del sys.modules["evaluate"]
    source = lambda: getattr(importlib.util.find_spec("evaluate"), "origin", None)
    assert Path(source()).resolve() == ROOT.resolve() / "evaluate.py"
    with harness.packages_only():
        assert source() is None or Path(source()).resolve().parent != ROOT.resolve()
    assert sys.path[0] == entry


# In a fresh process, lm_eval's tasks not indexed and the machine not described: both take long.
QUICK = """import functools, runpy, sys
import lm_eval.evaluator, lm_eval.tasks
lm_eval.evaluator.add_env_info = lambda results: None
lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
sys.argv[0] = "harness"
runpy.run_module("tasks.harness", run_name="__main__")
"""


@pytest.mark.parametrize("launch", [
    ["-c", QUICK], pytest.param(["-m", "tasks.harness"], marks=pytest.mark.slow)
], ids=["quick", "python -m"])  # fmt: skip
def test_a_task_that_imports_evaluate_in_a_fresh_process(launch, tasks, checkpoint, tmp_path):
    """From the root: python -c has "" in sys.path, and python -m has the root itself."""
    argv = [checkpoint, "--tasks", "free", "--include_path", tasks[0], "--limit", 2, "--json"]
    env = os.environ | dict(HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=str(tmp_path / "cache"))
    command = [sys.executable, *launch, *map(str, argv)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["results"]["free"]["score,none"] == 1
