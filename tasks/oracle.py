"""Every sampler with a perfect network: no training, no judge, seconds to run.

python -m tasks.oracle                                    # a Markov chain
python -m tasks.oracle --world grammar --png oracle.png   # sentences whose words must agree
python -m tasks.oracle --samplers ddpm_cache margin --steps 8 64 --rows 2000 --json

The world is a hidden Markov chain. So forward and backward messages give the exact p(token |
visible) for every canvas, and the exact probability of every text. They play the network, so every
error in the texts comes from the sampler. Two figures say how much, at the calls of a text:

tv      the total variation between the n-grams of the texts and the true ones, 0 to 1
nats    -log p(text) per token under the truth: above the entropy, texts are unlikely; below,
        a sampler prefers likely texts and leaves out others

The first row has exact samples: the noise floor of both. Errors are over texts.
"""

import math
from collections import deque

import torch

from common import check_range, command, fail, parser, progress
from configs import Config
from diffusion import row_generators
from samplers import SAMPLERS, STEPLESS, default_options
from tasks.quality import VALUES
from tasks.report import check_picture, format_rows, import_pyplot

EXACT = "exact samples"

# --------------------------------------------------------------------------------------------------
# Worlds: (start (S,), step (S, S), emit (S, V)) probabilities of states and of their tokens


def markov(V=8, seed=0):
    """A Markov chain of V tokens, each its own state, from its stationary law."""
    g = torch.Generator().manual_seed(seed)
    step = torch.randn(V, V, dtype=torch.float64, generator=g).mul(2).softmax(-1)
    return stationary(step), step, torch.eye(V, dtype=torch.float64)


WORDS = "the big old cat cats runs run sees see .".split()
NEXT = {  # a state is number and part of speech: its words, and the states that may follow
    "article": ("the", "adjective noun"),
    "adjective": ("big old", "adjective noun"),
    "noun": ("cat cats", "verb transitive"),
    "verb": ("runs run", "end"),
    "transitive": ("sees see", "object"),
    "object": ("the", "thing"),
    "thing": ("cat cats", "end"),
}


def grammar(typo=0.02):
    """Sentences such as "the big old cats see the cat .": the verb agrees with a noun any number of
    words before it, and "the" and the adjectives do not tell the number. With probability `typo` a
    word is any word, so every text is possible."""
    states = [(kind, number) for kind in NEXT for number in (0, 1)] + [("end", 0)]
    step = torch.zeros(len(states), len(states), dtype=torch.float64)
    emit = torch.zeros(len(states), len(WORDS), dtype=torch.float64)
    for i, (kind, number) in enumerate(states):
        words, after = NEXT[kind] if kind != "end" else (".", "article")
        words = words.split()
        agrees = kind in ("noun", "verb", "transitive")
        for word in words[number : number + 1] if agrees else words:
            emit[i, WORDS.index(word)] = 1 / (1 if agrees else len(words))
        for follower in after.split():
            for n in (0, 1) if kind == "end" else [number]:
                key = (follower, 0 if follower == "end" else n)
                step[i, states.index(key)] += 1
    step /= step.sum(-1, keepdim=True)
    return stationary(step), step, (1 - typo) * emit + typo / len(WORDS)


def stationary(step):
    """The law that `step` keeps; half a step of rest each time removes any period."""
    lazy = (step + torch.eye(len(step), dtype=step.dtype)) / 2
    return torch.linalg.matrix_power(lazy, 4096)[0]


WORLDS = {"markov": markov, "grammar": grammar}


def messages(world, x):
    """Forward messages p(state, visible tokens before i), normalised, (B, L, S); backward ones
    p(visible tokens after i | state), up to a factor; and log p(visible tokens), (B,)."""
    start, step, emit = world
    seen = torch.cat((emit.T, torch.ones_like(emit.T[:1])))[x]  # (B, L, S): p(token | state)
    before, log_p = [start.expand(len(x), -1)], 0
    for i in range(x.shape[1]):
        here = before[-1] * seen[:, i]
        log_p = log_p + here.sum(-1).log()
        before.append(here / here.sum(-1, keepdim=True) @ step)
    after = [torch.ones_like(before[0])]
    for i in range(x.shape[1] - 1, 0, -1):
        here = (after[-1] * seen[:, i]) @ step.T
        after.append(here / here.sum(-1, keepdim=True))
    return torch.stack(before[:-1], 1), torch.stack(after[::-1], 1), log_p


def denoiser_of(world):
    """The perfect denoise(x, t, at), and the list of the rows that its calls read."""
    rows = []

    def denoise(x, t, at):
        active = at.any(-1)
        rows.append(int(active.sum()))
        before, after, _ = messages(world, x[active])
        p = (before * after)[at[active]] @ world[2]
        return (p / p.sum(-1, keepdim=True)).log()

    return denoise, rows


def draw_texts(world, rows, L, seed):
    """(rows, L) exact samples."""
    start, step, emit = world
    g = torch.Generator().manual_seed(seed)
    draw = lambda p: torch.multinomial(p, 1, generator=g)[:, 0]
    state, tokens = draw(start.expand(rows, -1)), []
    for _ in range(L):
        tokens.append(draw(emit[state]))
        state = draw(step[state])
    return torch.stack(tokens, 1)


# --------------------------------------------------------------------------------------------------
# Figures


def true_ngrams(world, n):
    """The probability of every n-gram, (V**n,)."""
    start, step, emit = world
    joint = start[None]  # (n-grams so far, S)
    for i in range(n):
        joint = (joint[:, None] * emit.T).flatten(0, 1) @ (
            step if i < n - 1 else torch.eye(len(step), dtype=step.dtype)
        )
    return joint.sum(-1)


def count_ngrams(texts, V, n):
    """(B, V**n) counts of each text."""
    powers = V ** torch.arange(n - 1, -1, -1)
    keys = (texts.unfold(-1, n, 1) * powers).sum(-1)
    counts = torch.zeros(len(texts), V**n, dtype=torch.float64)
    return counts.scatter_add_(1, keys, torch.ones_like(keys, dtype=torch.float64))


def total_variation(counts, truth):
    """Between the n-grams of all texts, counts (B, K), and truth (K,); its standard error from 50
    bootstrap samples of the texts."""
    distance = lambda total: (total / total.sum(-1, keepdim=True) - truth).abs().sum(-1) / 2
    g = torch.Generator().manual_seed(0)
    B = len(counts)
    drawn = torch.randint(B, (50, B), generator=g)
    weights = torch.zeros(50, B, dtype=counts.dtype).scatter_add_(
        1, drawn, torch.ones(50, B, dtype=counts.dtype)
    )
    return distance(counts.sum(0)).item(), distance(weights @ counts).std().item()


def make_row(sampler, setting, calls, texts, world, n):
    L, V = texts.shape[1], world[2].shape[1]
    nats = -messages(world, texts)[2] / L
    tv, tv_se = total_variation(count_ngrams(texts, V, n), true_ngrams(world, n))
    figures = dict(tv=tv, tv_se=tv_se, nats=nats.mean().item())
    figures["nats_se"] = nats.std().item() / len(nats) ** 0.5
    return dict(sampler=sampler, setting=setting, calls=calls) | figures


def list_settings(sampler, steps):
    """[(steps, options)] of a sampler: each number of steps, or each value of the option by which a
    sampler without steps trades quality for calls."""
    own = [name for name in default_options(SAMPLERS[sampler]) if name in VALUES]
    if sampler in STEPLESS and own:
        return [(1, {own[0]: value}) for value in VALUES[own[0]]]
    return [(1, {})] if sampler in STEPLESS else [(n, {}) for n in steps]


def measure(args):
    """A row for exact samples, then one for each sampler and setting."""
    world = WORLDS[args.world]()
    V, L = world[2].shape[1], args.length
    cfg = Config(vocab_size=V, seq_len=L)
    rows = [
        make_row(EXACT, "", math.nan, draw_texts(world, args.rows, L, args.seed), world, args.n)
    ]
    jobs = [(s, *setting) for s in args.samplers for setting in list_settings(s, args.steps)]
    for sampler, steps, option in progress(jobs, unit="setting", disable=args.json):
        denoise, read = denoiser_of(world)
        x, gen = torch.full((args.rows, L), V), row_generators(args.seed, range(args.rows))
        x = deque(SAMPLERS[sampler](denoise, x, steps, cfg, gen, **option), maxlen=1).pop()
        named = option or ({} if sampler in STEPLESS else dict(steps=steps))
        label = " ".join(f"{key}={value:g}" for key, value in named.items())
        rows.append(make_row(sampler, label, sum(read) / args.rows, x, world, args.n))
    return rows


def plot(rows, path, title):
    """Total variation and nats over network calls, a line for each sampler."""
    if not (plt := import_pyplot(path)):
        return
    _, panels = plt.subplots(1, 2, figsize=(12, 4.8), sharex=True, layout="constrained")
    labels = {"tv": "total variation of n-grams", "nats": "nats per token under the truth"}
    for panel, (key, label) in zip(panels, labels.items()):
        panel.axhline(rows[0][key], color="black", linestyle=":", label=EXACT)
        panel.set_prop_cycle(color=plt.get_cmap("tab20").colors)
        for name in dict.fromkeys(row["sampler"] for row in rows[1:]):
            same = sorted((r for r in rows if r["sampler"] == name), key=lambda row: row["calls"])
            x, y, error = ([row[k] for row in same] for k in ("calls", key, f"{key}_se"))
            panel.errorbar(x, y, error, label=name, capsize=2, marker=".")
        panel.set(xscale="log", xlabel="network calls per text", ylabel=label)
        panel.grid(alpha=0.3, which="both")
    panels[0].set(yscale="log", title=title)
    panels[1].legend(fontsize=8, bbox_to_anchor=(1, 1), loc="upper left")
    plt.savefig(path, dpi=150)
    plt.close()


def parse_arguments(argv):
    p = parser(__doc__)
    p.add_argument("--world", choices=WORLDS, default="markov")
    p.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS))
    p.add_argument("--steps", type=int, nargs="+", default=[4, 8, 16, 32, 64, 256])
    p.add_argument("--rows", type=int, default=512, help="texts of each setting")
    p.add_argument("--length", type=int, default=64, help="tokens of a text")
    p.add_argument("--n", type=int, default=2, help="of the n-grams")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--png", help="the plot; a name that ends in .svg makes an SVG")
    p.add_argument("--json", action="store_true", help="one JSON line per row instead of the table")
    args = p.parse_args(argv)
    check_range(args, steps=1, rows=2, length=2, n=1, seed=0)
    if args.n > min(args.length, 5):
        fail(f"--n {args.n}: must be at most 5 and at most --length {args.length}")
    check_picture("--png", args.png)
    return args


@command
def main(argv=None):
    args = parse_arguments(argv)
    rows = measure(args)
    print(format_rows(rows, args.json))
    if args.png:
        plot(rows, args.png, f"{args.world}, {args.length} tokens")
    return rows


if __name__ == "__main__":
    main()
