"""A world small enough to enumerate: texts of L = 3 tokens from V = 3 letters, and their 64
canvases. The exact law of every sampler and the expectation of every loss, in float64."""

import itertools
import math
from collections import deque

import numpy as np
import torch
import torch.nn.functional as F

from configs import Config
from diffusion import LOSSES, alpha, cross_entropy, scatter, time_at

L, V = 3, 3
MASK = V
CANVASES = torch.tensor(list(itertools.product(range(V + 1), repeat=L)))  # (64, L)
TEXTS = torch.tensor(list(itertools.product(range(V), repeat=L)))  # (27, L)
SUBSETS = torch.tensor(list(itertools.product((False, True), repeat=L)))  # (8, L): all masks


def ones(x):
    return torch.ones_like(x, dtype=torch.bool)


def index(x):
    """Canvases (..., L) -> their rows in CANVASES."""
    return (x * torch.tensor([(V + 1) ** (L - 1 - i) for i in range(L)])).sum(-1)


def tiny(**fields):
    return Config(vocab_size=V, seq_len=L, n_embd=8, n_head=2, n_layer=1, **fields)


def tiny_ar(**fields):
    """A causal network of eight tokens."""
    return Config(
        vocab_size=5, seq_len=8, n_embd=16, n_head=2, n_layer=2,
        cond_dim=0, causal=True, loss="ar", **fields,
    )  # fmt: skip


def last(frames):
    return deque(frames, maxlen=1).pop()


# --------------------------------------------------------------------------------------------------
# Networks: functions (x, t, at) -> (N, V), tables over all canvases


def random_joint(seed=0):
    """(V, V, V) probabilities of every text, far from independent."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(V**L, dtype=torch.float64, generator=g).mul(1.5).softmax(0).view(V, V, V)


def exact_model(joint):
    """The perfect network for a joint: p(x0_i | the visible tokens)."""
    table = torch.zeros(len(CANVASES), L, V, dtype=torch.float64)
    for k, canvas in enumerate(CANVASES):
        agree = ((canvas == MASK) | (canvas == TEXTS)).all(-1)
        for text, p in zip(TEXTS[agree], joint.flatten()[agree]):
            for i in range(L):
                table[k, i, text[i]] += p
    table = (table / table.sum(-1, keepdim=True)).log()
    return lambda x, t, at: table[index(x)][at]


def hostile_model(seed=0, outputs=V):
    """An arbitrary network that depends on the canvas, the position and, strongly, the time, and is
    sometimes sure of a wrong token."""
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, len(CANVASES), L, outputs, dtype=torch.float64, generator=g).mul(1.5)

    def model(x, t, at):
        k = index(x)
        logits = a[k] + b[k] * (4 * t.double() - 2)[:, None, None]
        return logits.log_softmax(-1)[at]

    return model


def hostile_scores(seed=0):
    """A network whose outputs, read as SEDD's scores, sum to anything from 1/2 to 2, not to 1."""
    normal, size = hostile_model(seed), hostile_model(seed + 1)
    scale = lambda x, t, at: math.log(V) + 0.7 * torch.sin(5 * size(x, t, at)[:, :1])
    return lambda x, t, at: normal(x, t, at) + scale(x, t, at)


def read_left_to_right(model):
    """`model` at time 0 as a causal network: it sees only the tokens before a position."""
    hide = lambda x, i: x.masked_fill(torch.arange(L) >= i, MASK)

    def causal(x, t, at):
        parts = [model(hide(x, i), 0 * t, ones(x)).view(len(x), L, V)[:, i] for i in range(L)]
        return torch.stack(parts, 1)[at]

    return causal


def predictions(model, t, outputs=V):
    """The network's (64, L, outputs) log-probabilities for all canvases at time t."""
    t = torch.full((len(CANVASES),), t, dtype=torch.float64)
    return model(CANVASES, t, ones(CANVASES)).view(len(CANVASES), L, outputs)


# --------------------------------------------------------------------------------------------------
# Laws of samplers. A canvas is (L,), or (..., L) for as many laws at once.


def where_at(canvas):
    """(..., 64): all probability on the canvas itself."""
    return (CANVASES == canvas[..., None, :]).all(-1).double()


def transition(step):
    """(64 from, 64 to) from the probabilities (64, L, V + 1) of each token of each canvas, which
    change independently."""
    return torch.stack([step[:, i, CANVASES[:, i]] for i in range(L)]).prod(0)


def step_law(canvas, steps, row):
    """P(text | canvas) (..., 27) of a sampler that changes all positions independently in each of
    `steps` steps. row(n) (64, L, V + 1): probabilities of each token at a masked position in step
    n; row(0): those of the step that removes masks that are left, if any."""
    masked = CANVASES == MASK
    stay = F.one_hot(CANVASES, V + 1).double()  # visible tokens stay
    state = where_at(canvas)
    for n in range(steps, -1, -1):
        if n == 0 and state[..., masked.any(-1)].sum() < 1e-12:
            break
        state = state @ transition(torch.where(masked[..., None], row(n), stay))
    assert state[..., masked.any(-1)].sum() < 1e-12 and ((state.sum(-1) - 1).abs() < 1e-9).all()
    return state[..., index(TEXTS)]


def ancestral_law(model, canvas, schedule, steps):
    """P(text | canvas) (..., 27) of ancestral sampling."""
    grid = alpha(schedule, torch.arange(steps + 1, dtype=torch.float64) / steps)

    def row(n):
        r = (grid[n - 1] - grid[n]) / (1 - grid[n])
        p = predictions(model, n / steps).exp()
        return torch.cat((r * p, (1 - r).expand(len(CANVASES), L, 1)), -1)

    return step_law(canvas, steps, row)


def remasking_states(model, canvas, schedule, steps, sigma):
    """P(canvas | `canvas`) (64,) after each of `steps` steps of ReMDM, transitions multiplied out.

    From t to s, with sigma = sigma((1 - alpha_s) / alpha_t, at most 1), a token that is not given
    becomes (1 - sigma) itself + sigma MASK, and MASK becomes
    (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t) the prediction
    + (1 - alpha_s - sigma alpha_t) / (1 - alpha_t) MASK: q_sigma(z_s | z_t, x) of arXiv 2503.00307
    with the network's prediction for x."""
    grid = alpha(schedule, torch.arange(steps + 1, dtype=torch.float64) / steps)
    state, states = where_at(canvas), []
    stay = F.one_hot(CANVASES, V + 1).double()
    mask, given = torch.eye(V + 1, dtype=torch.float64)[MASK], (canvas != MASK)[None, :, None]
    for n in range(steps, 0, -1):
        alpha_t, alpha_s = grid[n].item(), grid[n - 1].item()
        again = sigma(min(1.0, (1 - alpha_s) / alpha_t) if alpha_t else 1.0)
        shown = torch.where(given, stay, (1 - again) * stay + again * mask)
        p = F.pad(predictions(model, n / steps).exp(), (0, 1))
        hidden = (alpha_s - (1 - again) * alpha_t) * p + (1 - alpha_s - again * alpha_t) * mask
        step = torch.where((CANVASES == MASK)[..., None], hidden / (1 - alpha_t), shown)
        state = state @ transition(step)
        states.append(state)
    return states


def left_to_right_law(model, canvas, schedule, steps):
    """P(text | canvas) (27,) of one token after the other, at the times of the schedule."""
    state, masked = {tuple(canvas.tolist()): 1.0}, canvas == MASK
    for i in range(L):
        t = time_at(schedule, masked[i:].sum() / masked.sum().clamp(min=1)).item()
        p, after = predictions(model, t).exp(), {}
        for x, chance in state.items():
            for v in range(V) if x[i] == MASK else [x[i]]:
                q = p[index(torch.tensor(x)), i, v].item() if x[i] == MASK else 1
                after[x[:i] + (v,) + x[i + 1 :]] = chance * q
        state = after
    return law_of(state)


def law_of(state):
    """{text: probability} -> (27,)."""
    return torch.tensor([state.get(tuple(x), 0.0) for x in TEXTS.tolist()], dtype=torch.float64)


def outcomes(key, p, score, count):
    """Yield (canvas, probability) of a call that draws a token at every mask of the canvas `key`
    from p (64, L, V) and reveals the best by score(p (V,), token): count(scores, best first). A
    score that ignores the token is an order."""
    x = torch.tensor(key)
    holes = (x == MASK).nonzero()[:, 0].tolist()
    q = [p[index(x), i] for i in holes]
    for tokens in itertools.product(range(V), repeat=len(holes)):
        scores = [float(score(q[j], v)) for j, v in enumerate(tokens)]
        best = sorted(range(len(holes)), key=lambda j: -scores[j])
        y = x.clone()
        for j in best[: max(1, count([scores[j] for j in best]))]:
            y[holes[j]] = tokens[j]
        yield tuple(y.tolist()), math.prod(q[j][v].item() for j, v in enumerate(tokens))


def law_of_choice(score, count):
    """The law(model, canvas, schedule, steps) of a sampler that draws all masks and keeps
    count(scores, best first) of them, at least one, until none is left. In a call with `left` of
    the canvas's masks left, t is that at which the schedule masks this fraction."""

    def law(model, canvas, schedule, steps):
        state, total = {tuple(canvas.tolist()): 1.0}, int((canvas == MASK).sum())
        for left in range(total, 0, -1):  # canvases with most masks first: a call leaves fewer
            t = time_at(schedule, torch.tensor(left / total, dtype=torch.float64)).item()
            p = predictions(model, t).exp()
            keep = lambda scores: count(scores, total, schedule, steps)  # noqa: B023
            for key in [key for key in state if key.count(MASK) == left]:
                chance = state.pop(key)
                for y, q in outcomes(key, p, score, keep):
                    state[y] = state.get(y, 0) + chance * q
        return law_of(state)

    return law


def by_schedule(scores, total, schedule, steps):
    """How many to keep: step n = steps .. 1 leaves a fraction 1 - alpha((n - 1) / steps) of the
    masks, rounded up; steps that reveal nothing are passed over."""
    for n in range(steps, 0, -1):
        left = 1 - alpha(schedule, torch.tensor((n - 1) / steps, dtype=torch.float64)).item()
        if reveal := max(0, len(scores) - math.ceil(total * left - 1e-9)):
            return reveal


SCORES = {  # of the orders, (p (V,), token) -> number
    "ar": lambda p, v: 0,
    "confidence": lambda p, v: p.max(),
    "margin": lambda p, v: p.topk(2).values.diff().neg(),
    "entropy": lambda p, v: (p * p.log()).sum(),
}


def chi_square_p(texts, law):
    """p-value of samples (N, L) under law (27,) of texts or (64,) of canvases. Cells of less than 5
    expected samples are pooled."""
    counts = torch.bincount(index(texts), minlength=len(CANVASES)).double()
    counts = counts[index(TEXTS)] if len(law) == len(TEXTS) else counts
    assert counts.sum() == len(texts), "a sample still holds MASK"
    assert counts[law == 0].sum() == 0, "an impossible text was sampled"
    return pooled_p(counts, law * len(texts))


def pooled_p(counts, expected):
    """p-value of Pearson's chi-square; cells of less than 5 expected are one cell."""
    small = expected < 5
    pool = lambda cells: torch.cat((cells[~small], cells[small].sum()[None]))
    counts, expected = pool(counts.double()), pool(expected)
    keep = expected > 0
    chi2 = ((counts - expected)[keep] ** 2 / expected[keep]).sum()
    return torch.special.gammaincc((keep.sum() - 1) / 2, chi2 / 2).item()


def kolmogorov_p(values, cdf):
    """Asymptotic p-value of Kolmogorov and Smirnov's test of values (N,) against a continuous law
    with the distribution function cdf."""
    n = len(values)
    u = cdf(values.double().sort().values)
    i = torch.arange(n, dtype=torch.float64)
    distance = torch.maximum((i + 1) / n - u, u - i / n).max().item()
    k = np.arange(1, 101)
    tail = 2 * ((-1.0) ** (k - 1) * np.exp(-2 * n * (k * distance) ** 2)).sum()
    return float(min(max(tail, 0.0), 1.0)) if distance * n**0.5 > 0.3 else 1.0


# --------------------------------------------------------------------------------------------------


def expected_loss(loss, model, text, cfg, nodes=400):
    """The expectation of the loss's sum over a text: all masks enumerated, t by quadrature (T = 0)
    or by all T steps."""
    if cfg.T:
        t = torch.arange(1, cfg.T + 1, dtype=torch.float64) / cfg.T
        dt = torch.full_like(t, 1 / cfg.T)
    else:
        x, w = np.polynomial.legendre.leggauss(nodes)
        t, dt = torch.from_numpy((x + 1) / 2), torch.from_numpy(w / 2)
    mass = 1 - alpha(cfg, t)[:, None]  # (n, 1)
    probability = mass ** SUBSETS.sum(-1) * (1 - mass) ** (~SUBSETS).sum(-1)  # (n, 8)
    x0 = text.repeat(len(t) * len(SUBSETS), 1)
    xt = x0.masked_fill(SUBSETS.repeat(len(t), 1), MASK)
    t = t.repeat_interleave(len(SUBSETS))
    nats = LOSSES[loss](model, x0, ones(x0), cfg, t, xt).double().sum(-1)
    return (nats.view(len(dt), -1) * probability * dt[:, None]).sum().item()


class Network(torch.nn.Module):
    """A function (x, t, at) -> logits as a module, which `evaluate.bound` needs."""

    def __init__(self, function):
        super().__init__()
        self.function, self.on_device = function, torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, t, at, tokens):
        nats, log_z = cross_entropy(self.function(x, t, at), tokens[at])
        return scatter(nats, at), scatter(log_z, at)
