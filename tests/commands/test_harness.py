"""The adapter for the LM Evaluation Harness: its estimators against the enumerable world, and whole runs."""

import itertools
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from world import (
    MASK,
    TEXTS,
    L,
    V,
    exact_model,
    expected_loss,
    hostile_model,
    hostile_scores,
    last,
    left_to_right_law,
    random_joint,
    tiny,
    tiny_ar,
)

from configs import Config
from data.tokenizer import load_tokenizer
from diffusion import alpha, ar, reveal_rate, time_at
from model import DiT
from sample import frames
from tasks import harness
from tasks.harness import Request, batches, chain, fit, is_greedy, mc, split, write

EVERY = [
    Request(text[:p], text[p:]) for p in range(L + 1) for text in TEXTS.tolist()
]  # all texts, all prefixes
ALL = torch.ones(1, L, dtype=torch.bool)


def conditionals(joint):
    """log p(target | prefix) of EVERY under a joint (27,)."""
    p = joint.reshape(V, V, V)
    return [(p[tuple(r.prefix + r.target)] / p[tuple(r.prefix)].sum()).log().item() for r in EVERY]


def answer(model, x, t=0.5):
    """The network's (L, V) log-probabilities for one canvas."""
    return model(x[None], torch.tensor([float(t)]), ALL).log_softmax(-1)


def network(seed=0, **fields):
    """A random network of eight tokens, sure of what it says."""
    torch.manual_seed(seed)
    model = DiT(tiny_ar(**fields) if fields.get("bos") is not None else Config(
        vocab_size=5, seq_len=8, n_embd=16, n_head=2, n_layer=2, cond_dim=8, time_cond=True, **fields
    )).eval()  # fmt: skip
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    return model, model.cfg


# ---------------------------------------------------------------------------------------------------------
# The estimators


@pytest.mark.parametrize("world", [exact_model(random_joint()), hostile_model()])
def test_the_chain_rule_is_the_law_of_the_sampler_ar(world):
    """For every text behind every prefix, with a network that looks at the time."""
    for request, got in zip(EVERY, chain(world, tiny(), EVERY)):
        canvas = torch.tensor(request.prefix + [MASK] * len(request.target))
        law = left_to_right_law(world, canvas, "linear", 1)
        want = law[(TEXTS == torch.tensor(request.prefix + request.target)).all(-1)].log().item()
        assert got == pytest.approx(want, abs=1e-5)


def test_the_chain_rule_of_the_exact_network_is_the_truth():
    joint = random_joint()
    np.testing.assert_allclose(
        chain(exact_model(joint), tiny(), EVERY), conditionals(joint), atol=1e-5
    )


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
        mass = 1 - alpha(cfg.schedule, t)
        weight = dt * reveal_rate(t, cfg) * mass ** sum(masks) * (1 - mass) ** (n - sum(masks))
        canvas = text.masked_fill(masked, MASK).repeat(nodes, 1)
        log_p = model(canvas, t, torch.ones_like(canvas, dtype=torch.bool)).view(nodes, L, V)
        total -= (weight * log_p[:, torch.arange(L), text][:, masked].sum(-1)).sum().item()
    return total


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_monte_carlo_is_the_bound_without_bias(schedule):
    """With a network that looks at the time, and few samples; error bars from independent noise."""
    model, cfg, n = hostile_model(), tiny(schedule=schedule, time_cond=True), 1500
    text = torch.tensor([1, 0, 2])
    assert bound(model, Request([], [1, 0, 2]), cfg) == pytest.approx(
        expected_loss("mdlm", model, text, cfg), abs=1e-3
    )
    for prefix, target in (([0], [2, 1]), ([], [1, 0, 2]), ([2, 2], [1])):
        runs = [Request(prefix, target, (i,)) for i in range(n)]
        runs = torch.tensor(mc(model, cfg, runs, samples=4, batch_size=2000))
        want, error = -bound(model, Request(prefix, target), cfg), runs.std() / n**0.5
        assert abs(runs.mean() - want) < 4 * error and error < 0.05


def test_the_number_of_masks_is_stratified():
    """Twice as many samples as tokens: each number of masks comes twice."""
    counts, table = [], hostile_model()

    def model(x, t, at):
        counts.extend((x == MASK).sum(-1).tolist())
        return table(x, t, at)

    mc(model, tiny(), [Request([], [1, 0, 2])], samples=6)
    assert sorted(counts) == [1, 1, 2, 2, 3, 3]


def orders(request, k, seed):
    """In place of `noise`: with 3 x 3! samples, every number of masks and every order, each once."""
    order = list(itertools.permutations(range(3)))[k % 6]
    return torch.tensor(
        [0.5, *((place + 0.5) / 3 for place in order[: len(request.target)])]
    ).double()


@pytest.mark.parametrize("world", ["exact", "hostile"])
def test_monte_carlo_over_all_masks_is_the_mean_over_all_orders(world, monkeypatch):
    """So it is the truth for the exact network, and else the mean of the chain rules of all orders."""
    monkeypatch.setattr(harness, "noise", orders)
    joint, requests = random_joint(), [r for r in EVERY if len(r.target) == 3]
    table = exact_model(joint) if world == "exact" else hostile_model()
    model = lambda x, t, at: table(x, 0 * t, at)
    got = mc(model, tiny(), requests, samples=18)
    if world == "exact":
        np.testing.assert_allclose(
            got, [joint[tuple(r.target)].log().item() for r in requests], atol=1e-5
        )
    for request, value in zip(requests, got):
        text, want = torch.tensor(request.target), []
        for order in itertools.permutations(range(L)):
            x, total = torch.full((L,), MASK), 0.0
            for i in order:
                total += answer(model, x)[i, text[i]].item()
                x = torch.where(torch.arange(L) == i, text, x)
            want.append(total)
        assert value == pytest.approx(sum(want) / 6, abs=1e-5)


def test_common_random_numbers_steady_the_ranking():
    """Options that differ in one token: their difference has far less variance under the same masks, while each
    alone has as much as ever."""
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
    short, long = (harness.noise(Request([1] * n, [0] * n, (7,)), 3, seed=1) for n in (2, 5))
    assert (short == long[:3]).all() and len(long) == 6
    other = [
        harness.noise(Request([], [0], key), k, s)[1]
        for key, k, s in (((8,), 3, 1), ((7,), 4, 1), ((7,), 3, 2))
    ]
    assert len({short[1].item(), *(u.item() for u in other)}) == 4


def requests_of_all_lengths(n=20):
    rng = np.random.default_rng(0)
    lengths = [(int(rng.integers(0, 4)), int(rng.integers(0, 5))) for _ in range(n)]
    return [
        Request(rng.integers(0, 5, a).tolist(), rng.integers(0, 5, b).tolist(), (i,))
        for i, (a, b) in enumerate(lengths)
    ]


@pytest.mark.parametrize("w", [0.0, 0.8])
def test_results_do_not_depend_on_the_batch(w):
    """Alone, in batches of three, all at once, and in another order; targets without tokens are among them."""
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
    for which, k, x0, j in batches(requests, rows, batch_size=8):
        assert {lengths[i] for i in which.tolist()} == {x0.shape[1]}
        assert (j[:, -1] == torch.tensor([len(requests[i].target) - 1 for i in which])).all()
        seen += zip(which.tolist(), k.tolist())
        sizes.append(len(which))
    assert sorted(seen) == [(i, k) for i, n in enumerate(rows) for k in range(n)]
    assert max(sizes) == 8 and len(sizes) == sum(
        math.ceil(3 * lengths.count(n) / 8) for n in set(lengths) if n
    )


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


# ---------------------------------------------------------------------------------------------------------
# Guidance


@pytest.mark.parametrize("w", [0.0, 0.7])
def test_guided_estimators_are_those_of_the_guided_conditionals(w):
    """Of a network that mixes both answers by the formula, for each prefix; w = 0 is no guidance, to the bit."""
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
    seen, table = [], hostile_model()

    def model(x, t, at):
        seen.append(x)
        return table(x, t, at)

    chain(model, tiny(bos=True), [Request([1, 2], [0])], w=1.0)
    assert torch.cat(seen).tolist() == [[1, 2, MASK], [1, MASK, MASK]]


# ---------------------------------------------------------------------------------------------------------
# Greedy answers and free text


def decoded(model, prefix, n):
    """Greedy decoding, token by token: the surest position first."""
    x = torch.tensor(prefix + [MASK] * n)
    for left in range(n, 0, -1):
        log_p = answer(model, x, time_at("linear", torch.tensor(left / n)))
        i = max((i for i in range(L) if x[i] == MASK), key=lambda i: log_p[i].max().item())
        x[i] = log_p[i].argmax()
    return x.tolist()


def test_the_greedy_flag_is_that_of_decoding():
    model, cfg = hostile_model(), tiny()
    for r, flag in zip(EVERY, is_greedy(model, cfg, EVERY, batch_size=50)):
        assert flag == (decoded(model, r.prefix, len(r.target)) == r.prefix + r.target)
    for p in range(L):
        for prefix in {tuple(r.prefix) for r in EVERY if len(r.prefix) == p}:
            canvas = torch.tensor([[*prefix] + [MASK] * (L - p)])
            assert write(model, cfg, canvas, [0])[0].tolist() == decoded(model, [*prefix], L - p)


def test_a_row_leaves_at_its_first_wrong_token():
    table, rows = hostile_model(), []

    def model(x, t, at):
        rows.append(len(x))
        return table(x, t, at)

    requests = [Request([], text) for text in TEXTS.tolist()]
    assert sum(is_greedy(model, tiny(), requests, batch_size=27)) == 1
    assert rows[0] == 27 and rows[1] == 9 and rows[2] == 3  # a third goes on each time


@pytest.mark.parametrize("bos", [False, True])
def test_greedy_ar_decodes_from_left_to_right(bos):
    model, cfg = network(bos=bos)
    x = torch.tensor([[1, 3] + [cfg.mask_id] * 4, [2, 0] + [cfg.mask_id] * 4])
    for i in range(2, 6):
        x[:, i] = model(x, None, torch.arange(6).expand(2, 6) == i).argmax(-1)
    canvas = x.masked_fill(torch.arange(6) >= 2, cfg.mask_id)
    assert (write(model, cfg, canvas, [0, 1]) == x).all()
    good = [Request(row[:2], row[2:]) for row in x.tolist()]
    bad = [Request(r.prefix, r.target[:-1] + [(r.target[-1] + 1) % 5]) for r in good]
    assert is_greedy(model, cfg, good + bad) == [True, True, False, False]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"top_p": 0.6}, {"w": 3.0}, {"sampler": "confidence"}]
)
def test_sampled_text_is_that_of_sample_py(options):
    """Draw for draw, and whatever else is in the batch."""
    model, cfg = network()
    canvases = [torch.tensor([a, b] + [cfg.mask_id] * 5) for a in range(3) for b in range(2)]
    rows = [4, 1, 0, 5, 3, 2]
    got = write(
        model, cfg, torch.stack(canvases), rows, steps=4, seed=3, **{"temperature": 1.0} | options
    )
    theirs = {"guidance" if k == "w" else k: v for k, v in options.items() if k != "sampler"}
    for text, row, canvas in zip(got, rows, canvases):
        sampler = options.get("sampler", "ddpm_cache")
        assert (
            text == last(frames(model, cfg, canvas, [row], 4, sampler, seed=3, **theirs))[0]
        ).all()
    assert len(got.unique(dim=0)) == 6


# ---------------------------------------------------------------------------------------------------------
# Text


def test_splitting_a_text():
    """Spaces that end the context go over to the continuation; a piece over the border does not make it free."""
    letters = load_tokenizer({"kind": "char", "characters": " \nabc"}).encode
    assert split(letters, "ab \n", "c") == Request([2, 3], [0, 1, 4])
    assert split(letters, "ab", " c", (3,)) == Request([2, 3], [0, 4], (3,))
    assert split(letters, "", "c") == Request([], [4])
    assert split(letters, " ", "c") == Request([], [0, 4])
    assert split(letters, "ab", "") == Request([2, 3], [])
    pieces = {"": [], "a": [0], "b": [1], "c": [2], "ab": [3], "abc": [3, 2], "bc": [4]}
    merging = lambda text, inside=False: pieces[text]
    assert split(merging, "a", "b") == Request([0], [1])  # whole text: one piece
    assert split(merging, "a", "bc") == Request(
        [0], [2]
    )  # the harness's rule: what the whole has more


def test_long_texts_lose_their_beginning(capsys):
    cfg = tiny_ar(bos=True)  # eight tokens, the first of which is given
    given = [
        Request([1] * 4, [2] * 3, (5,)),
        Request([*range(6)], [8, 9]),
        Request([1], [*range(9)]),
        Request([3] * 9, []),
    ]
    assert fit(given, [7], cfg) == [
        Request([7] + [1] * 4, [2] * 3, (5,)),
        Request([7, 1, 2, 3, 4, 5], [8, 9]),
        Request([7], [2, 3, 4, 5, 6, 7, 8]),
        Request([7] + [3] * 7, []),
    ]
    assert capsys.readouterr().err == "note: 3 of 4 texts cut on the left to 8 tokens\n"
    assert fit(given[:1], [], cfg) == given[:1] and not capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------
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


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with a task of every kind over local data; the harness reads no other, and looks at no machine."""
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
    named = lambda *names: ", ".join(f"{{metric: {name}}}" for name in names)
    for name, kind, target, metrics, more in (
        ("choose", "multiple_choice", "{{gold}}", named("acc"), 'doc_to_choice: "{{options}}"'),
        ("last", "loglikelihood", " {{options[gold]}}", named("perplexity", "acc"), ""),
        ("page", "loglikelihood_rolling", "{{text}} {{text}} {{text}}", named("bits_per_byte"), ""),
        ("free", "generate_until", "{{options[gold]}}", "{metric: !function scorer.score, aggregation: mean, "
         "higher_is_better: true}", "generation_kwargs: {until: [' '], max_gen_toks: 9}"),
    ):  # fmt: skip
        text = TASK.format(
            name=name,
            docs=folder / "docs.jsonl",
            kind=kind,
            target=target,
            metrics=metrics,
            more=more,
        )
        (folder / f"{name}.yaml").write_text(text)
    (folder / "scorer.py").write_text(  # a task may import the package `evaluate`
        "import evaluate\nassert evaluate.__version__\n\n\ndef score(references, predictions, **_):\n"
        "    return float(' ' not in predictions[0] and len(predictions[0]) <= 9)\n"
    )
    return folder, docs


PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "oak", "elm", "fir", "##s"]


def test_free_text_is_what_follows_the_prompt(monkeypatch):
    """Up to a stop string or the end of text, with its first space; prompts lose their beginning, equal shapes share a
    batch, and settings that differ do not."""
    pytest.importorskip("lm_eval", reason="the LM Evaluation Harness is not installed")
    from lm_eval.api.instance import Instance

    spec = {"kind": "wordpiece", "vocab": "\n".join(PIECES)}
    cfg = Config(vocab_size=8, seq_len=8, n_embd=8, n_head=2, n_layer=1, bos=True)
    calls = []

    def write(model, cfg, x, rows, w, temperature, top_p, dtype, seed):
        assert (w, top_p, dtype, seed) == (0.5, 1.0, "float32", 9)
        calls.append((x.tolist(), rows, temperature))
        new = torch.tensor([5, 7, 6, 3, 4])  # elms fir [SEP] oak
        return torch.cat(
            (x[:, : -(x == 8).sum(-1).max()], new[: (x[0] == 8).sum()].repeat(len(x), 1)), 1
        )

    monkeypatch.setattr(harness, "write", write)
    lm = harness.adapter(
        DiT(cfg), cfg, load_tokenizer(spec), chain, w=0.5, batch_size=2, writing={"seed": 9}
    )
    asked = [
        ("oak", {"until": ["fir"], "max_gen_toks": 5}),
        ("elm", {"until": "nothing", "max_gen_toks": 5}),
        ("fir", {"max_gen_toks": 5, "do_sample": True, "temperature": 0.3}),
        ("fir", {"max_gen_toks": 5}),
        ("oak elm fir oak", {"max_gen_toks": 5}),
        ("oak", {}),
    ]
    requests = [Instance("generate_until", {}, args, i) for i, args in enumerate(asked)]
    assert lm.generate_until(requests) == [
        " elms ",
        " elms fir",
        " elms fir",
        " elms fir",
        " elms fir",
        " elms fir",
    ]
    assert calls == [
        ([[2, 4, 8, 8, 8, 8, 8], [2, 5, 8, 8, 8, 8, 8]], [0, 1], 0.0),
        ([[2, 6, 8, 8, 8, 8, 8]], [3], 0.0),
        ([[2, 6, 8, 8, 8, 8, 8]], [2], 0.3),
        ([[2, 6, 4, 8, 8, 8, 8, 8]], [4], 0.0),
        ([[2, 4, 8, 8, 8, 8]], [5], 0.0),  # half of the model's length
    ]


def line(capsys, *argv):
    harness.main([*map(str, argv), "--json"])
    return json.loads(capsys.readouterr().out)


def test_every_kind_of_task_end_to_end(tasks, checkpoint, capsys):
    """A second run gives the same numbers, other batches nearly, and they are those of the estimators."""
    import evaluate

    folder, docs = tasks
    argv = (
        checkpoint,
        "--tasks",
        "choose",
        "last",
        "page",
        "free",
        "--include_path",
        folder,
        "--mc",
        8,
    )
    first = line(capsys, *argv)
    assert line(capsys, *argv) == first
    results = first["results"]
    assert results["free"]["score,none"] == 1
    for name, other in line(capsys, *argv, "--batch_size", 5)["results"].items():
        for key, value in other.items():
            assert value == (
                pytest.approx(results[name][key], rel=1e-3) if isinstance(value, float) else value
            )
    assert line(capsys, *argv, "--seed", 1)["results"]["last"] != results["last"]
    assert evaluate.bound  # ours again

    from model import load

    model, cfg = load(checkpoint)
    encode = load_tokenizer(model.tokenizer).encode
    options = [
        Request(encode(doc["text"]), encode(f" {word}"), (i,))
        for i, doc in enumerate(docs)
        for word in doc["options"]
    ]
    log_p = np.array(mc(model, cfg, options, samples=8)).reshape(6, 5)
    gold = np.array([doc["gold"] for doc in docs])
    assert results["choose"]["acc,none"] == pytest.approx((log_p.argmax(-1) == gold).mean())
    perplexity = math.exp(-log_p[range(6), gold].mean())
    assert results["last"]["perplexity,none"] == pytest.approx(perplexity, rel=1e-4)
    pages, parts = [f"{doc['text']} {doc['text']} {doc['text']}" for doc in docs], []
    for i, page in enumerate(pages):
        ids = encode(page)
        parts += [
            Request([], ids[a : a + cfg.seq_len], (i, a)) for a in range(0, len(ids), cfg.seq_len)
        ]
    bits = -sum(mc(model, cfg, parts, samples=8)) / sum(map(len, pages)) / math.log(2)
    assert results["page"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)


def test_options_reach_the_estimators(tasks, checkpoint, capsys):
    argv = (checkpoint, "--include_path", tasks[0], "--limit", 3, "--tasks")
    chained = line(capsys, *argv, "last", "--estimator", "chain")
    assert chained["estimator"] == "chain rule" and chained["results"]["last"]["sample_len"] == 3
    guided = line(capsys, *argv, "last", "--estimator", "chain", "--guidance", 0.5)
    assert (
        guided["results"]["last"]["perplexity,none"]
        != chained["results"]["last"]["perplexity,none"]
    )
    harness.main(
        [*map(str, argv), "free", "--gen_kwargs", "temperature=1,max_gen_toks=4", "--steps", "3"]
    )
    assert "|free" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        harness.main([*map(str, argv), "free", "--gen_kwargs", "max_gen_toks=32"])
    assert "max_gen_toks=32: must be below 32" in capsys.readouterr().err


def test_the_ar_twin_end_to_end(tasks, tmp_path, capsys):
    model, cfg = network(bos=False)
    cfg = Config(**{**vars(cfg), "vocab_size": 27, "seq_len": 16})
    model = DiT(cfg)
    spec = {"kind": "char", "characters": " abcdefghijklmnopqrstuvwxyz"}
    torch.save(
        {
            "kind": "nanoMDLM checkpoint",
            "config": vars(cfg),
            "tokenizer": spec,
            "step": 0,
            "ema": model.state_dict(),
        },
        tmp_path / "ar.pt",
    )
    record = line(
        capsys, tmp_path / "ar.pt", "--tasks", "choose", "page", "free", "--include_path", tasks[0]
    )
    assert record["estimator"] == "exact"
    assert record["results"]["page"]["bits_per_byte,none"] == pytest.approx(
        math.log2(27), rel=1e-4
    )  # zero head
    with pytest.raises(SystemExit):
        line(
            capsys,
            tmp_path / "ar.pt",
            "--tasks",
            "choose",
            "--include_path",
            tasks[0],
            "--guidance",
            1,
        )


@pytest.mark.parametrize("argv, message", [
    (["--tasks", "nosuchtask"], "--tasks nosuchtask: "),
    (["--tasks", "choose", "--include_path", "nosuchfolder"], "--include_path nosuchfolder: no such folder"),
    (["--tasks", "choose", "--mc", "0"], "--mc 0: must be at least 1"),
    (["--tasks", "choose", "--limit", "1.5"], "--limit 1.5: must be a number of documents"),
    (["--tasks", "choose", "--guidance", "-1"], "--guidance -1.0: must be at least 0"),
    (["--estimator", "elbo", "--tasks", "choose"], "argument --estimator: invalid choice"),
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
        line(capsys, checkpoint, "--tasks", "choose", "--include_path", tasks[0])
    assert "error: a task's text: not in the vocabulary: 'A' 'K' 'O'" in capsys.readouterr().err


def test_without_lm_eval_there_is_a_hint(checkpoint, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(SystemExit):
        harness.main([str(checkpoint), "--tasks", "lambada"])
    assert "pip install lm_eval" in capsys.readouterr().err
