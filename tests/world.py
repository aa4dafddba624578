"""A world small enough to enumerate: L = 3 tokens of V = 3 letters, 64 canvases. Everything is float64."""

import itertools
import math
from collections import deque

import numpy as np
import torch

from configs import Config
from diffusion import LOSSES, alpha, time_at

L, V = 3, 3
MASK = V
CANVASES = torch.tensor(
    list(itertools.product(range(V + 1), repeat=L))
)  # (64, L), row i has index i
TEXTS = torch.tensor(list(itertools.product(range(V), repeat=L)))  # (27, L)

SUBSETS = torch.tensor(
    [[m >> i & 1 for i in range(L)] for m in range(2**L)]
).bool()  # (8, L) all masks


def ones(x):
    return torch.ones_like(x, dtype=torch.bool)


def index(x):
    """Canvases (..., L) -> their row in CANVASES."""
    return (x * torch.tensor([(V + 1) ** (L - 1 - i) for i in range(L)])).sum(-1)


def tiny(**fields):
    return Config(vocab_size=V, seq_len=L, n_embd=8, n_head=2, n_layer=1, **fields)


def tiny_ar(**fields):
    """A causal network of eight tokens."""
    return Config(
        vocab_size=5,
        seq_len=8,
        n_embd=16,
        n_head=2,
        n_layer=2,
        cond_dim=0,
        causal=True,
        loss="ar",
        **fields,
    )


def random_joint(seed=0):
    """(V, V, V) probabilities of every text, far from independent."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(V**L, dtype=torch.float64, generator=g).mul(1.5).softmax(0).view(V, V, V)


def exact_model(joint):
    """The perfect network for a joint: p(x0_i | the visible tokens), a table over all canvases."""
    table = torch.zeros(len(CANVASES), L, V, dtype=torch.float64)
    for k, canvas in enumerate(CANVASES):
        agree = ((canvas == MASK) | (canvas == TEXTS)).all(-1)
        for text, p in zip(TEXTS[agree], joint.flatten()[agree]):
            for i in range(L):
                table[k, i, text[i]] += p
    table = (table / table.sum(-1, keepdim=True)).log()
    return lambda x, t, at: table[index(x)][at]


def hostile_model(seed=0, outputs=V):
    """An arbitrary network: of the canvas, the position and, strongly, the time; sure of wrong answers too."""
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, len(CANVASES), L, outputs, dtype=torch.float64, generator=g).mul(1.5)

    def model(x, t, at):
        k = index(x)
        logits = a[k] + b[k] * (4 * t.double() - 2)[:, None, None]
        return logits.log_softmax(-1)[at]

    return model


def hostile_scores(seed=0):
    """A network whose answers, read as SEDD's scores, sum to anything between 1/2 and 2 instead of to 1."""
    normal, size = hostile_model(seed), hostile_model(seed + 1)
    return lambda x, t, at: (
        normal(x, t, at) + math.log(V) + 0.7 * torch.sin(5 * size(x, t, at)[:, :1])
    )


def causal_model(seed=0):
    """An arbitrary network whose answer at a position depends on the tokens before it alone."""
    model = hostile_model(seed)

    def causal(x, t, at):
        logits = torch.stack([
            model(x.masked_fill(torch.arange(L) >= i, MASK), 0 * t, ones(x)).view(len(x), L, V)[:, i]
            for i in range(L)
        ], 1)  # fmt: skip
        return logits[at]

    return causal


def step_law(canvas, steps, row):
    """P(text | canvas) (27,) of a sampler that goes through `steps` steps, changing all positions independently:
    row(n) (64, L, V + 1) are the chances of each token at a masked position of each canvas in step n. Transitions
    of all canvases are multiplied out; row(0) is what becomes of masks that are left, if any."""
    masked = CANVASES == MASK
    state = (CANVASES == canvas).all(-1).double()
    for n in range(steps, -1, -1):
        if n == 0 and state[masked.any(-1)].sum() < 1e-12:
            break
        stay = torch.nn.functional.one_hot(CANVASES, V + 1).double()  # visible tokens stay
        step = torch.where(masked[..., None], row(n), stay)  # (64, L, V + 1)
        to = torch.stack([step[:, i, CANVASES[:, i]] for i in range(L)]).prod(0)  # (64 from, 64 to)
        state = state @ to
    assert state[masked.any(-1)].sum() < 1e-12 and abs(state.sum() - 1) < 1e-9
    return state[index(TEXTS)]


def answers(model, t, outputs=V):
    """The network's (64, L, outputs) answers to all canvases at time t."""
    everywhere = torch.ones(len(CANVASES), L, dtype=torch.bool)
    t = torch.full((len(CANVASES),), t, dtype=torch.float64)
    return model(CANVASES, t, everywhere).view(len(CANVASES), L, outputs)


def ancestral_law(model, canvas, schedule, steps):
    """P(text | canvas) (27,) of ancestral sampling."""
    grid = alpha(schedule, torch.arange(steps + 1, dtype=torch.float64) / steps)

    def row(n):
        r = (grid[n - 1] - grid[n]) / (1 - grid[n])
        p = answers(model, n / steps).exp()
        return torch.cat((r * p, (1 - r).expand(len(CANVASES), L, 1)), -1)

    return step_law(canvas, steps, row)


def remasking_states(model, canvas, schedule, steps, sigma):
    """P(canvas | `canvas`) (64,) after each of `steps` steps of ReMDM, transitions multiplied out: from t to s, with
    sigma = sigma((1 - alpha_s) / alpha_t, at most 1), a token that is not given becomes (1 - sigma) itself + sigma
    MASK, and MASK becomes (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t) the answer + (1 - alpha_s - sigma alpha_t)
    / (1 - alpha_t) MASK (arXiv 2503.00307, its q_sigma(z_s | z_t, x) with the network's answer for x)."""
    grid = alpha(schedule, torch.arange(steps + 1, dtype=torch.float64) / steps)
    state, states = (CANVASES == canvas).all(-1).double(), []
    mask = torch.eye(V + 1, dtype=torch.float64)[MASK]
    for n in range(steps, 0, -1):
        alpha_t, alpha_s = grid[n].item(), grid[n - 1].item()
        again = sigma(min(1.0, (1 - alpha_s) / alpha_t) if alpha_t else 1.0)
        stay = torch.nn.functional.one_hot(CANVASES, V + 1).double()
        shown = torch.where(
            (canvas != MASK)[None, :, None], stay, (1 - again) * stay + again * mask
        )
        answer = torch.nn.functional.pad(answers(model, n / steps).exp(), (0, 1))
        hidden = (alpha_s - (1 - again) * alpha_t) * answer + (1 - alpha_s - again * alpha_t) * mask
        step = torch.where((CANVASES == MASK)[..., None], hidden / (1 - alpha_t), shown)
        state = state @ torch.stack([step[:, i, CANVASES[:, i]] for i in range(L)]).prod(0)
        states.append(state)
    return states


def chi_square_p(texts, law):
    """p-value of samples (N, L) under law (27,), or (64,) of canvases; cells of less than 5 expected are pooled."""
    counts = torch.bincount(index(texts), minlength=len(CANVASES)).double()
    counts = counts[index(TEXTS)] if len(law) == len(TEXTS) else counts
    assert counts.sum() == len(texts), "a sample still holds MASK"
    expected = law * len(texts)
    assert counts[law == 0].sum() == 0, "an impossible text was sampled"
    small = expected < 5
    cells = (
        torch.cat((counts[~small], counts[small].sum()[None])),
        torch.cat((expected[~small], expected[small].sum()[None])),
    )
    keep = cells[1] > 0
    chi2 = ((cells[0] - cells[1])[keep] ** 2 / cells[1][keep]).sum()
    return torch.special.gammaincc((keep.sum() - 1) / 2, chi2 / 2).item()


def expected_loss(loss, model, text, cfg, nodes=400):
    """E of the loss's sum over a text: all masks enumerated, t by quadrature (T = 0) or by all T steps."""
    if cfg.T:
        t = torch.arange(1, cfg.T + 1, dtype=torch.float64) / cfg.T
        dt = torch.full_like(t, 1 / cfg.T)
    else:
        x, w = np.polynomial.legendre.leggauss(nodes)
        t, dt = torch.from_numpy((x + 1) / 2), torch.from_numpy(w / 2)
    mass = 1 - alpha(cfg.schedule, t)[:, None]  # (n, 1)
    probability = mass ** SUBSETS.sum(-1) * (1 - mass) ** (~SUBSETS).sum(-1)  # (n, 8)
    x0 = text.repeat(len(t) * len(SUBSETS), 1)
    xt = x0.masked_fill(SUBSETS.repeat(len(t), 1), MASK)
    nats = (
        LOSSES[loss](model, x0, ones(x0), cfg, t.repeat_interleave(len(SUBSETS)), xt)
        .double()
        .sum(-1)
    )
    return (nats.view(len(t), -1) * probability * dt[:, None]).sum().item()


def last(frames):
    return deque(frames, maxlen=1).pop()


def left_to_right_law(model, canvas, schedule, steps):
    state, masked = {tuple(canvas.tolist()): 1.0}, canvas == MASK
    for i in range(L):
        t = time_at(schedule, masked[i:].sum() / masked.sum().clamp(min=1)).item()
        p, after = answers(model, t).exp(), {}
        for x, chance in state.items():
            for v in range(V) if x[i] == MASK else [x[i]]:
                q = p[index(torch.tensor(x)), i, v].item() if x[i] == MASK else 1
                after[x[:i] + (v,) + x[i + 1 :]] = chance * q
        state = after
    return torch.tensor([state.get(tuple(x), 0.0) for x in TEXTS.tolist()], dtype=torch.float64)
