"""What a latent (extra/latent.py) learns and is good for, on texts whose factors are known.

python -m tasks.latent                      # four kinds of runs, 3 seeds each: minutes on a CPU
python -m tasks.latent --steps 200 --seeds 1

Every text is a sentence of a template grammar: [BOS], then 11 words that follow from four factors
(topic, tense, number, sentiment) and from free choices, uniform and independent. So its entropy is
known, and so is whether a sample is grammatical: all words must agree on the factors.

    none     no latent, as many steps                  free     a latent, no penalty on its codes
    mmd      codes drawn to the prior by MMD           noisy    noisy codes with their whole KL

Trains what is missing, measures, writes out/latent/: a folder per run, and tables.md.
"""

import math
import zlib
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import check_range, command, parser
from configs import Config
from data.checkpoints import load
from data.corpus import finish, partial_of, read_split
from diffusion import denoiser, mask_exactly, nll, row_generators
from evaluate import bound
from extra.latent import draw, kl, mmd
from extra.with_latent import Given, from_another, from_prior, from_text, slerp
from samplers import SAMPLERS
from tasks.report import format_mean, to_markdown, train_if_missing

# --------------------------------------------------------------------------------------------------
# The grammar: a slot is a list of options per combination of the factors that it depends on

FACTORS = {
    "topic": ("animals", "food", "sport", "music"), "tense": ("past", "present"),
    "number": ("one", "many"), "sentiment": ("good", "bad"),
}  # fmt: skip
NOUNS = dict(animals="dog cat horse bird", food="soup cake bread salad",
             sport="runner skater boxer rower", music="singer band drummer choir")  # fmt: skip
VERBS = dict(animals="play sleep", food="cook cool", sport="train race", music="sound perform")
WORDS = {  # slot: (factors, {their values: words})
    "when": (("tense",), {("past",): "yesterday once earlier", ("present",): "today now always"}),
    "which": (("number",), {("one",): "this that", ("many",): "these those"}),
    "kind": (("sentiment",), {("good",): "fine lovely great", ("bad",): "poor awful dull"}),
    "noun": (("topic", "number"), {
        (t, n): " ".join(w + "s" * (n == "many") for w in NOUNS[t].split())
        for t in NOUNS for n in FACTORS["number"]}),
    "verb": (("topic", "tense"), {
        (t, n): " ".join(w + "-ed" * (n == "past") for w in VERBS[t].split())
        for t in VERBS for n in FACTORS["tense"]}),
    "how": (("sentiment",), {("good",): "well gladly", ("bad",): "badly sadly"}),
    "and": ((), {(): "and"}),
    "who": (("number",), {("one",): "it", ("many",): "they"}),
    "is": (("number", "tense"), {
        ("one", "past"): "was", ("one", "present"): "is",
        ("many", "past"): "were", ("many", "present"): "are"}),
    "mood": (("sentiment",), {("good",): "happy calm proud", ("bad",): "tired angry lost"}),
    "end": ((), {(): "."}),
}  # fmt: skip
VOCABULARY = ["[BOS]"] + sorted(
    {word for _, options in WORDS.values() for words in options.values() for word in words.split()}
)
ID = {word: i for i, word in enumerate(VOCABULARY)}
SPEC = {"kind": "char", "characters": "".join(chr(0xE100 + i) for i in range(len(VOCABULARY)))}
LENGTH = len(WORDS) + 1
# nats of a text: its factors and the free choices, of which all values of a slot have as many
ENTROPY = sum(math.log(len(values)) for values in FACTORS.values()) + sum(
    math.log(len(next(iter(options.values())).split())) for _, options in WORDS.values()
)


def make_texts(n, seed):
    """(ids (n, LENGTH), factors (n, 4) as indices)."""
    rng = np.random.default_rng(seed)
    factors = np.stack([rng.integers(len(v), size=n) for v in FACTORS.values()], 1)
    rows = np.zeros((n, LENGTH), np.uint16)
    for row, values in zip(rows, factors):
        value = {f: FACTORS[f][i] for f, i in zip(FACTORS, values)}
        for i, (needs, options) in enumerate(WORDS.values(), 1):
            row[i] = ID[rng.choice(options[tuple(value[f] for f in needs)].split())]
    return rows, factors


def read_factors(x):
    """Texts (n, LENGTH) -> (factors (n, 4), grammatical (n,)). A factor that the words do not agree
    on is -1; a word in a wrong slot agrees with nothing."""
    found = []
    for row in x.tolist():
        possible = {f: set(range(len(values))) for f, values in FACTORS.items()}
        for word, (needs, options) in zip(row[1:], WORDS.values()):
            fits = [key for key, words in options.items() if VOCABULARY[word] in words.split()]
            for j, f in enumerate(needs):
                possible[f] &= {FACTORS[f].index(key[j]) for key in fits}
            if not fits and not needs:
                possible = {f: set() for f in FACTORS}
        found.append([min(values) if len(values) == 1 else -1 for values in possible.values()])
    found = torch.tensor(found)
    return found, (found >= 0).all(-1)


def make_corpus(folder):
    """train, val and test splits of 20,000, 1,000 and 1,000 texts, unless the folder is there."""
    if folder.exists():
        return
    partial_of(folder).mkdir(parents=True, exist_ok=True)
    sizes = dict(train=20_000, val=1000, test=1000)
    for split, n in sizes.items():
        make_texts(n, zlib.crc32(split.encode()))[0].tofile(partial_of(folder) / f"{split}.bin")
    tokens = {split: n * LENGTH for split, n in sizes.items()}
    finish(folder, "template grammar", SPEC, len(VOCABULARY), tokens, LENGTH)


# --------------------------------------------------------------------------------------------------
# Measurements of one run: functions (model, cfg, texts (n, LENGTH)) -> {name: number}


@torch.no_grad()
def measure_gap(model, cfg, x0):
    """Nats per masked token with k of the 11 words masked, given z of the text, of another text,
    and without z."""
    maskable, figures = (torch.arange(LENGTH) > 0).expand(x0.shape), {}
    choices = dict(own=Given(model, from_text(model)), other=Given(model, from_another(model)))
    for k in (1, 4, 8, 11):
        u = torch.rand(x0.shape, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        count = torch.full((len(x0),), k)
        xt, t = mask_exactly(x0, count, maskable, cfg.mask_id, u)
        for name, network in (choices | {"none": model}).items():
            nats = nll(network, x0, xt, t, maskable & (xt == cfg.mask_id))
            figures[f"{k} {name}"] = nats.sum().item() / (k * len(x0))
    return figures


def fit_probe(x, y, x_test, y_test):
    """Accuracy of multinomial logistic regression on standardised features, trained by L-BFGS."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_test = (x - mean) / std, (x_test - mean) / std
    layer = torch.nn.Linear(x.shape[1], int(y.max()) + 1)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=30)

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(layer(x), y) + 1e-3 * layer.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (layer(x_test).argmax(-1) == y_test).float().mean().item()


def features(model, x0):
    """{name: (n, .)} of clean texts: codes, pooled hidden states, also as many principal components
    of them as a code has dimensions, bag of words."""
    with torch.no_grad():
        hidden = model.hidden(x0, torch.zeros(len(x0))).mean(1)
        sets = {"bag of words": F.one_hot(x0, len(VOCABULARY)).sum(1).float(), "pooled": hidden}
        dim = model.cfg.latent_dim or 8
        sets[f"pooled, {dim} components"] = hidden @ torch.pca_lowrank(hidden, dim, niter=4)[2]
        if model.latent is not None:
            sets["z"] = model.latent.encode(x0)[0]
    return sets


def measure_probes(model, cfg, x0, factors):
    half, figures = len(x0) // 2, {}
    for name, x in features(model, x0).items():
        for i, factor in enumerate(FACTORS):
            y = factors[:, i]
            accuracy = fit_probe(x[:half], y[:half], x[half:], y[half:])
            figures[f"{name}: {factor}"] = 100 * accuracy
    return figures


@torch.no_grad()
def measure_codes(model, cfg, x0):
    """Of all codes together: 1,000 MMD^2 to the prior; length of the mean; per dimension, the
    distance of the covariance from the identity; the number of dimensions in use, 1 if all codes
    lie on a line; KL of the Gaussian with these moments to the prior."""
    z = draw(*model.latent.encode(x0))
    dim, cov = z.shape[1], z.T.cov()
    values = torch.linalg.eigvalsh(cov).clamp(min=1e-6)
    gauss = 0.5 * (values - 1 - values.log()).sum() + 0.5 * z.mean(0).square().sum()
    error = (cov - torch.eye(dim)).norm() / dim**0.5
    used = values.sum() ** 2 / values.square().sum()
    figures = dict(MMD=1e3 * mmd(z), mean=z.mean(0).norm(), covariance=error, dimensions=used)
    return {name: value.item() for name, value in (figures | dict(KL_gauss=gauss)).items()}


@torch.no_grad()
def sample_texts(model, cfg, z, steps, n=300, seed=0):
    """n texts from all masks; z (n, dim), or None. One text at a time in the batch's rows: a call
    computes all rows, so that z stays with its row."""
    network = model if z is None else Given(model, lambda tokens, rows: z)
    x = torch.full((n, LENGTH), cfg.mask_id)
    x[:, 0] = ID["[BOS]"]
    plain = denoiser(network, cfg)

    def every_row(x, t, at):  # `denoiser` drops rows without a request, which would shift z
        everywhere = at | (torch.arange(LENGTH) == 1)
        return plain(x, t, everywhere)[at[everywhere]]

    frames = SAMPLERS["ddpm_cache"](every_row, x, steps, cfg, row_generators(seed, range(n)))
    return deque(frames, maxlen=1).pop()


def measure_samples(model, cfg, x0, n=300):
    """Percent of grammatical texts by steps, with z from several sources; of reconstructions, also
    the percent of words, and of texts with all factors right."""
    figures, sources = {}, {"no z": None}
    if model.latent is not None:
        mean = model.latent.encode(x0)[0].detach()
        values, axes = torch.linalg.eigh(mean.T.cov())
        normal = torch.randn(n, cfg.latent_dim) * values.clamp(min=0).sqrt() @ axes.T
        sources["z of the prior"] = torch.randn(n, cfg.latent_dim)
        sources["z of a Gaussian fitted to the codes"] = normal + mean.mean(0)
        sources["z of a text"] = mean[:n]
    for name, z in sources.items():
        for steps in (1, 4, 100):
            x = sample_texts(model, cfg, z, steps, n)
            found, right = read_factors(x)
            figures[f"{name}, {steps} steps"] = 100 * right.float().mean().item()
            if name == "z of a text" and steps in (1, 100):
                same = (found == read_factors(x0[:n])[0]).all(-1)
                figures[f"words, {steps} steps"] = 100 * (x == x0[:n])[:, 1:].float().mean().item()
                figures[f"factors, {steps} steps"] = 100 * same.float().mean().item()
    return figures


def measure_interpolation(model, cfg, x0, n=150):
    """Along the way from text i to text i + n of another topic: percent of texts with the first and
    the second topic, and of grammatical ones."""
    z, topics, figures = model.latent.encode(x0)[0].detach(), read_factors(x0)[0][:, 0], {}
    ends = [(i, i + n) for i in range(n) if topics[i] != topics[i + n]]
    a, b = (torch.tensor(side) for side in zip(*ends))
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        between = torch.stack([slerp(z[i], z[j], share) for i, j in ends])
        found, right = read_factors(sample_texts(model, cfg, between, 100, len(ends)))
        for name, hit in (("A", found[:, 0] == topics[a]), ("B", found[:, 0] == topics[b]),
                          ("grammatical", right)):  # fmt: skip
            figures[f"{share:g} {name}"] = 100 * hit.float().mean().item()
    return figures


@torch.no_grad()
def measure_bounds(model, cfg, ids, meta):
    """Nats per text: without z; given z; KL of a noisy code; the mean bound with z of the prior."""
    measure = lambda network: bound(network, ids, meta, cfg, "val", passes=2)["nats"] * (LENGTH - 1)
    figures = {"without z": measure(model)}
    if model.latent is not None:
        x0 = torch.from_numpy(ids.reshape(-1, LENGTH).astype(np.int64))
        figures["given z"] = measure(Given(model, from_text(model)))
        figures["z of the prior"] = measure(Given(model, from_prior(model)))
        if model.latent.noisy:
            figures["KL"] = kl(*model.latent.encode(x0)).mean().item()
            figures["given z + KL"] = figures["given z"] + figures["KL"]
    return figures


def measure(cfg):
    """{table: {name: number}} of a finished run, on the test texts."""
    model, _ = load(cfg.out_dir)
    ids, meta = read_split(cfg.data, "test", cfg)
    x0 = torch.from_numpy(ids.reshape(-1, LENGTH).astype(np.int64))
    factors = read_factors(x0)[0]
    torch.manual_seed(0)
    tables = dict(bounds=measure_bounds(model, cfg, ids, meta))
    tables["probes"] = measure_probes(model, cfg, x0, factors)
    tables["samples"] = measure_samples(model, cfg, x0)
    if model.latent is not None:
        tables["gap"] = measure_gap(model, cfg, x0)
        tables["codes"] = measure_codes(model, cfg, x0)
        tables["interpolation"] = measure_interpolation(model, cfg, x0)
    return tables


# --------------------------------------------------------------------------------------------------
# The command


def make_kinds(cfg):
    """{kind: its config}."""
    latent = replace(cfg, latent_dim=8, mmd_weight=1.0)
    noisy = replace(latent, mmd_weight=0.0, kl_weight=1.0)
    return {"none": cfg, "free": replace(latent, mmd_weight=0.0), "mmd": latent, "noisy": noisy}


def format_tables(results):
    """Markdown: per table a row per figure and a column per kind, mean over seeds ± its error."""
    text = f"Entropy of a text: {ENTROPY:.3f} nats.\n"
    for table in dict.fromkeys(name for runs in results.values() for name in runs[0]):
        kinds = [kind for kind, runs in results.items() if table in runs[0]]
        names = dict.fromkeys(name for kind in kinds for name in results[kind][0][table])
        rows = [(table, *(f"`{kind}`" for kind in kinds))]
        for name in names:
            cells = [
                format_mean([run[table][name] for run in results[kind]], 2)
                if name in results[kind][0][table]
                else ""
                for kind in kinds
            ]
            rows.append((name, *cells))
        text += f"\n{to_markdown(*rows)}"
    return text


@command
def main(argv=None):
    p = parser(__doc__)
    p.add_argument("--steps", type=int, default=500)
    p.add_argument("--seeds", type=int, default=3, help="runs of each kind")
    p.add_argument("--out_dir", default="out/latent")
    args = p.parse_args(argv)
    check_range(args, steps=1, seeds=1)
    out = Path(args.out_dir)
    make_corpus(out / "corpus")
    cfg = Config(
        data=str(out / "corpus"), vocab_size=len(VOCABULARY), seq_len=LENGTH, bos=True,
        n_layer=1, n_head=4, n_embd=64, cond_dim=64,
        steps=args.steps, batch_size=64, micro_batch=64, lr=4e-3, muon_lr=0.02, lr_decay="linear",
        samples=0, eval_every=2**30, save_every=2**30, dtype="float32",
    )  # fmt: skip
    kinds = make_kinds(cfg)
    results = {kind: [] for kind in kinds}
    for seed in range(1, args.seeds + 1):
        for kind, run in kinds.items():
            run = replace(run, seed=seed, out_dir=str(out / f"{kind}_{seed}"))
            train_if_missing(run)
            results[kind].append(measure(run))
        (out / "tables.md").write_text(text := format_tables(results))  # after each seed
    print(text)
    return results


if __name__ == "__main__":
    main()
