"""Masked (absorbing-state) diffusion: schedules, masking, losses and samplers, each a plain function.

The world in one paragraph. A text x0 loses its tokens one by one: at time t every token has, independently
of all others, been replaced by MASK with probability 1 - alpha(t). A network sees the damaged xt and guesses
the missing tokens. Generating is the way back: from all MASK at t = 1 to a text at t = 0.

    B, L, V      rows of a batch, tokens of a row, size of the vocabulary
    x0, xt       (B, L) int64 ids, 0 .. V-1; mask_id = V marks a masked position of xt
    t            (B,) in [0, 1]: 0 = clean, 1 = all masked; with T discrete steps t = n / T, n = 1 .. T
    alpha(t)     P(a token is still visible), from 1 down to 0
    maskable     (B, L) bool, False on prompts and padding: never masked, never counted
    at           (B, L) bool, the N positions that a caller wants an answer for

Contracts
    model(x, t, at)    -> (N, V) float32 logits, one row per True of `at` in row-major order; V outputs, so
                          "the answer is never MASK" is a shape and not a minus infinity
    denoise(x, t, at)  -> (N, V) log-probabilities; temperature and top-p wrap it
    loss(model, x0, maskable, cfg, t=None, xt=None)  -> (B, L) nats, never reduced, zero where nothing is lost
    sampler(denoise, x, steps, cfg, gen=None)        -> yields (B, L) canvases, each a new tensor
cfg is a configs.Config; gen a list of B torch.Generators, one per row, or None for torch's own.

A canvas is any x with some positions MASK: a prompt, an infilling and a suffix are only canvases.
"""

import math

import torch
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------
# 1. Schedules: alpha(t) and its derivative, 1 at t = 0 and 0 at t = 1 to rounding.
# MDLM and SEDD stop short of both ends by some epsilon, which leaves a prior and a reconstruction term in the
# bound and masks in the samples. Here nothing is left at either end: epsilon is dropped, and a schedule given
# by alpha = exp(-sigma) is stretched affinely.


def stretched(sigma, dsigma):
    """(alpha, d alpha / dt) of exp(-sigma(t)), stretched to run from 1 to 0."""
    first, last = torch.exp(-sigma(torch.tensor([0.0, 1.0], dtype=torch.float64))).tolist()
    return (
        lambda t: (torch.exp(-sigma(t)) - last) / (first - last),
        lambda t: -dsigma(t) * torch.exp(-sigma(t)) / (first - last),
    )


SCHEDULES = {  # name: alpha(t), d alpha / dt
    "linear": (lambda t: 1 - t, lambda t: -torch.ones_like(t)),  # "loglinear" in MDLM and SEDD
    "cosine": (
        lambda t: torch.cos(math.pi / 2 * t),
        lambda t: -math.pi / 2 * torch.sin(math.pi / 2 * t),
    ),
    "cosine2": (
        lambda t: torch.cos(math.pi / 2 * t) ** 2,
        lambda t: -math.pi / 2 * torch.sin(math.pi * t),
    ),
    "poly2": (lambda t: 1 - t**2, lambda t: -2 * t),
    "geometric": stretched(  # SEDD's: sigma from 1e-4 to 20
        lambda t: 1e-4 ** (1 - t) * 20**t,
        lambda t: 1e-4 ** (1 - t) * 20**t * math.log(20 / 1e-4),
    ),
    "sigma_linear": stretched(lambda t: 10 * t, lambda t: torch.full_like(t, 10)),  # "linear" in MDLM
}


def alpha(schedule, t):
    """P(visible) at t, float64: in float32 1 - alpha is 0 near one end of most schedules, and 0 / 0 follows."""
    return SCHEDULES[schedule][0](t.double())


def dalpha(schedule, t):
    return SCHEDULES[schedule][1](t.double())


def time_at(schedule, masked):
    """The t at which a fraction `masked` of the tokens is masked: the inverse of 1 - alpha, by bisection."""
    low, high = torch.zeros_like(masked, dtype=torch.float64), torch.ones_like(masked, dtype=torch.float64)
    for _ in range(50):
        mid = (low + high) / 2
        above = 1 - alpha(schedule, mid) > masked
        low, high = torch.where(above, low, mid), torch.where(above, mid, high)
    return high


# ---------------------------------------------------------------------------------------------------------
# 2. Time and masking

TIME_LAWS = ("uniform", "bell")


def stratified(n, device=None):
    """n uniforms, one in each n-th of [0, 1): far less noise in the loss than n independent ones."""
    return (torch.arange(n, device=device) + torch.rand(n, dtype=torch.float64, device=device)) / n


def time_of(u, cfg):
    """Uniform u in [0, 1) -> training time t: continuous in [t_min, 1), or n / T with n = 1 .. T.

    time_law "bell" makes it Beta(2, 2) instead of uniform: with the linear schedule, training dwells where
    about half of the text is visible, from which a young network learns most (arXiv 2605.13026 has the idea).
    The losses keep their weights, so a training loss then averages the bound's terms over the bell instead
    of evenly: it is not the bound. Evaluation never uses it."""
    u = u.double()
    if cfg.time_law == "bell":
        u = 0.5 - torch.sin(torch.asin(1 - 2 * u) / 3)  # solves 3 t^2 - 2 t^3 = u
    return (torch.floor(cfg.T * u) + 1) / cfg.T if cfg.T else cfg.t_min + (1 - cfg.t_min) * u


def mask_tokens(x0, alpha_t, maskable, mask_id, u=None):
    """Replace each maskable token by MASK with probability 1 - alpha_t (B,); u (B, L) are its uniforms."""
    u = torch.rand(x0.shape, dtype=torch.float64, device=x0.device) if u is None else u
    return x0.masked_fill(maskable & (u >= alpha_t[:, None]), mask_id)


def mask_exactly(x0, count, maskable, mask_id):
    """Mask exactly count (B,) of each row's maskable positions, every subset equally likely."""
    u = torch.rand(x0.shape, dtype=torch.float64, device=x0.device)
    rank = u.masked_fill(~maskable, 2.0).argsort(-1).argsort(-1)  # maskable positions come first
    return x0.masked_fill(maskable & (rank < count[:, None]), mask_id)


def corrupt(x0, maskable, cfg, t, xt):
    """What a loss was not given: t stratified over the batch, xt masked at that t."""
    t = time_of(stratified(len(x0), x0.device), cfg) if t is None else t
    xt = mask_tokens(x0, alpha(cfg.schedule, t), maskable, cfg.mask_id) if xt is None else xt
    return t, xt


# ---------------------------------------------------------------------------------------------------------
# 3. Losses. They are one loss: -log p(x0 | xt) on masked positions, times a weight that depends on t alone.
#
# D3PM's bound is a sum over the steps n = 1 .. T of KL(q(x_s | xt, x0) || p(x_s | xt)), where t = n / T and
# s = (n - 1) / T. Look at one position.
#   If it is visible in xt, it stays as it is under q and p alike: KL = 0.
#   If it is masked, q reveals it with probability r = (alpha_s - alpha_t) / (1 - alpha_t), as x0, and leaves
#   MASK with probability 1 - r. The model never answers MASK, so p leaves MASK with the same probability, and
#   reveals v with probability r p(v | xt). The MASK terms cancel: KL = r log(r / (r p(x0 | xt))).
# So KL = -r log p(x0 | xt): nothing of size (B, L, V) is needed but the logits, and those at masks only. One
# random step instead of the sum costs a factor T; as T grows, T r becomes -alpha' / (1 - alpha): that is MDLM.


def nll(model, x0, xt, t, at):
    """-log p(x0 | xt) in nats, (B, L) float32, zero outside `at`. The head runs on `at` only."""
    loss = F.cross_entropy(model(xt, t.float(), at), x0[at], reduction="none")
    return torch.zeros_like(x0, dtype=loss.dtype).masked_scatter(at, loss)


def bound_weight(t, cfg):
    """The weight of a masked token's nats at t (B,): -alpha' / (1 - alpha), or T r of step n = T t.
    Both are 1 / t for the linear schedule."""
    alpha_t = alpha(cfg.schedule, t)
    masked = (1 - alpha_t).clamp(min=1e-12)  # 0 near t = 0, where nothing is masked; inf * 0 would be NaN
    if not cfg.T:
        return -dalpha(cfg.schedule, t) / masked
    return cfg.T * (alpha(cfg.schedule, t.double() - 1 / cfg.T) - alpha_t) / masked


def mdlm(model, x0, maskable, cfg, t=None, xt=None):
    """Bound on -log p(x0): weighted cross-entropy of the masked tokens, continuous (T = 0) or in T steps.

    MDLM, arXiv 2406.07524, the NELBO of section 3; T = 0 is also MD4 (2406.04329), RADD (2406.03736) and, for
    alpha = 1 - t, the CE / t of SMDM (2410.18514). x0 (B, L) -> (B, L) nats, zero where xt is visible."""
    t, xt = corrupt(x0, maskable, cfg, t, xt)
    masked = maskable & (xt == cfg.mask_id)
    return bound_weight(t, cfg).float()[:, None] * nll(model, x0, xt, t, masked)


def d3pm(model, x0, maskable, cfg, t=None, xt=None):
    """nanoDD's absorbing D3PM: T x (KL of step n + aux_ce x cross-entropy over all tokens), KL as above, but
    in step 1, instead, T x the cross-entropy over all tokens.

    D3PM, arXiv 2107.03006; flukeskywalker/nanoDD, with its dense posteriors summed in closed form. What goes
    beyond the KL helps training and is no part of the bound: with aux_ce = 0 this is `mdlm` with T steps."""
    if not cfg.aux_ce:
        return mdlm(model, x0, maskable, cfg, t, xt)
    t, xt = corrupt(x0, maskable, cfg, t, xt)
    masked = maskable & (xt == cfg.mask_id)
    first = (t * cfg.T < 1.5)[:, None]
    weight = bound_weight(t, cfg).float()[:, None] * masked
    weight = torch.where(first, float(cfg.T), weight + cfg.T * cfg.aux_ce)
    return weight * nll(model, x0, xt, t, maskable)


LOSSES = {"mdlm": mdlm, "d3pm": d3pm}


def exact_count_bound(model, x0, maskable, cfg, count, xt=None):
    """The continuous bound of `mdlm` for evaluation, per row: mask exactly `count` (B,) of n tokens, and
    weigh by n / count. With count uniform on 1 .. n its mean is the bound: the chance of `count` masks,
    weighted by -alpha'/(1 - alpha) and integrated over t, is 1 / count for every schedule. There is no cut-off
    near t = 0 and no exploding weight. A time-conditioned model sees t drawn from its law given the count:
    the masked fraction is Beta(count, n - count + 1). x0 (B, L) -> (B,) nats per row."""
    n = maskable.sum(-1)
    xt = mask_exactly(x0, count, maskable, cfg.mask_id) if xt is None else xt
    t = count / n  # any will do when the model does not look
    if cfg.time_cond:
        t = time_at(cfg.schedule, torch.distributions.Beta(count.double(), (n - count + 1).double()).sample())
    return n / count * nll(model, x0, xt, t, maskable & (xt == cfg.mask_id)).sum(-1)


# ---------------------------------------------------------------------------------------------------------
# 4. What samplers stand on: a row's own randomness, exact categorical draws, and wrappers of `denoise`.


def row_generators(seed, rows):
    """One random generator per row, so that a row's text does not depend on the rest of its batch."""
    return [torch.Generator().manual_seed(seed * 1_000_003 + row) for row in rows]


def uniform(x, gen):
    """float64 uniforms in [0, 1) of the shape of x (B, L); row i is drawn from gen[i] when gen is given."""
    if gen is None:
        return torch.rand(x.shape, dtype=torch.float64, device=x.device)
    return torch.stack([torch.rand(x.shape[1], dtype=torch.float64, generator=g) for g in gen]).to(x.device)


def categorical(log_p, u):
    """One token per row of log_p (N, V), by inverting the cumulative distribution at u (N,).
    float64: float32 noise cuts off the rare tokens and quietly lowers the temperature (arXiv 2409.02908)."""
    cdf = log_p.double().exp().cumsum(-1)
    token = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0]
    return token.clamp(max=log_p.shape[-1] - 1)


def denoiser(model):
    """denoise(x, t, at) of a model. Rows in which nothing is asked are not run."""

    @torch.no_grad()
    def denoise(x, t, at):
        rows = at.any(-1)
        return F.log_softmax(model(x[rows], t[rows].float(), at[rows]).float(), -1)

    return denoise


def with_temperature(denoise, temperature):
    """p ** (1 / temperature), normalised; 0 is greedy."""

    def tempered(x, t, at):
        log_p = denoise(x, t, at).double()
        log_p = log_p - log_p.amax(-1, keepdim=True)  # the best at exactly 0, whatever it is divided by
        return F.log_softmax(
            log_p / temperature if temperature else log_p.masked_fill(log_p < 0, -math.inf), -1
        )

    return tempered


def with_top_p(denoise, top_p):
    """The smallest set of likeliest tokens that holds a mass of top_p, renormalised (nucleus sampling)."""

    def truncated(x, t, at):
        log_p, order = denoise(x, t, at).sort(-1, descending=True)
        before = log_p.exp().cumsum(-1) - log_p.exp()  # mass of the likelier tokens
        log_p = log_p.masked_fill(before >= top_p, -math.inf)
        return F.log_softmax(torch.empty_like(log_p).scatter_(-1, order, log_p), -1)

    return truncated


# ---------------------------------------------------------------------------------------------------------
# 5. Samplers. `ddpm` defines a law for every number of steps; `ddpm_cache` has the same law in fewer calls,
# and `first_hitting` is its limit of infinitely many steps.


def ddpm(denoise, x, steps, cfg, gen=None):
    """Ancestral sampling, the definition: one call for each of `steps` steps, t -> s = t - 1/steps.
    A masked position is revealed with probability (alpha_s - alpha_t) / (1 - alpha_t). Kept literal: a token
    is drawn for every mask, and nearly all are thrown away."""
    alphas = alpha(cfg.schedule, torch.arange(steps + 1, dtype=torch.float64) / steps).tolist()
    for n in range(steps, 0, -1):
        masked = x == cfg.mask_id
        if not masked.any():
            return
        t = torch.full(x.shape[:1], n / steps, device=x.device)
        draw = x.masked_scatter(masked, categorical(denoise(x, t, masked), uniform(x, gen)[masked]))
        reveal = masked & (uniform(x, gen) < (alphas[n - 1] - alphas[n]) / (1 - alphas[n]))
        x = torch.where(reveal, draw, x)
        yield x


def reveal_at(denoise, x, time, cfg, gen):
    """Reveal every masked position of x at its given time (B, L): each row jumps from event to event, so the
    network is called only when something happens, the head only on the positions that it happens to."""
    which = uniform(x, gen)  # a position is drawn once, so one uniform each is all the randomness there is
    while (masked := x == cfg.mask_id).any():
        t = torch.where(masked, time, 0).amax(-1)  # (B,) each row's own next event
        now = masked & (time == t[:, None])  # equal, since t is a copy of one of them
        x = x.masked_scatter(now, categorical(denoise(x, t, now), which[now]))
        yield x


def ddpm_cache(denoise, x, steps, cfg, gen=None):
    """The law of `ddpm` in at most min(steps, L) calls, for any batch, prompt or time-conditioned network.

    When a position is revealed does not depend on the network: in step n with probability
    alpha((n-1)/steps) - alpha(n/steps), independently of all others. So draw the steps first and visit only
    those in which something happens. (MDLM's cache skips the same steps, but a change in any row of the
    batch ends it, and it is off for time-conditioned networks.)"""
    time = time_at(cfg.schedule, uniform(x, gen))
    yield from reveal_at(denoise, x, torch.ceil(time * steps) / steps, cfg, gen)


def first_hitting(denoise, x, steps, cfg, gen=None):
    """The limit of infinitely many steps (arXiv 2409.02908): one token per call, at its own continuous time;
    `steps` is not used. L calls for L masks."""
    yield from reveal_at(denoise, x, time_at(cfg.schedule, uniform(x, gen)), cfg, gen)


SAMPLERS = {"ddpm": ddpm, "ddpm_cache": ddpm_cache, "first_hitting": first_hitting}
