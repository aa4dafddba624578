"""Masked (absorbing-state) diffusion: schedules, masking, losses and three samplers.

A text x0 loses its tokens one by one: at time t every token has, independently of all others, been
replaced by MASK with probability 1 - alpha(t). A network sees the masked text xt and predicts the
missing tokens. Generation runs backwards: from all MASK at t = 1 to a text at t = 0.

    B, L, V      rows of a batch, tokens of a row, size of the vocabulary
    x0, xt       (B, L) int64 ids, 0 .. V-1; mask_id = V marks a masked position of xt
    t            (B,) in [0, 1]: 0 = clean, 1 = all masked; T discrete steps: t = n / T, n = 1 .. T
    alpha(t)     P(a token is still visible), from 1 down to 0
    maskable     (B, L) bool, False on given tokens (prompts, a given BOS), which are never masked
    counted      (B, L) bool, False on padding too; nats and tokens are summed over it
    at           (B, L) bool, the N positions that the caller wants predictions for

Contracts
    model(x, t, at) -> (N, V) float32 logits, one row per True of `at`, in row-major order.
        The head has V outputs, so "the prediction is never MASK" is a shape and not a minus
        infinity. (A D3PM without zero_masking has one more output, MASK, at the end.)
    model(x, t, at, tokens) -> (-log p(tokens), log Z) at `at`, tokens (B, L, k), k a position
    denoise(x, t, at) -> (N, V) log-probabilities; guidance, temperature and top-p wrap it
    loss(model, x0, maskable, cfg, t=None, xt=None) -> (B, L) nats, 0 where nothing is lost.
        With xt given, pass `counted` for maskable: then only counted tokens are evaluated.
    sampler(denoise, x, steps, cfg, gen=None) -> yields (B, L) canvases, each a new tensor
cfg is a configs.Config. gen is a list of B generators, one per row (`row_generators`), or None.

A canvas is any x with MASK somewhere: prompts, infilling and suffixes are all just canvases.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

# --------------------------------------------------------------------------------------------------
# 1. Schedules: alpha(t) and its derivative; alpha is 1 at t = 0 and 0 at t = 1, up to rounding.
# MDLM and SEDD never quite reach t = 0 and t = 1, so their bounds need a term for each end, and
# masks are left in their samples. Here alpha reaches both ends; a schedule of the form
# alpha = exp(-sigma) is stretched affinely.


def stretch(sigma, dsigma):
    """(alpha, d alpha / dt) of exp(-sigma(t)), stretched to run from 1 to 0."""
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    first, last = torch.exp(-sigma(ends)).tolist()
    return (
        lambda t: (torch.exp(-sigma(t)) - last) / (first - last),
        lambda t: -dsigma(t) * torch.exp(-sigma(t)) / (first - last),
    )


def geometric(low, high):
    """sigma from low to high by equal factors."""
    sigma = lambda t: low ** (1 - t) * high**t
    return stretch(sigma, lambda t: sigma(t) * math.log(high / low))


def sigma_linear(low, high):
    return stretch(lambda t: low + (high - low) * t, lambda t: torch.full_like(t, high - low))


HALF_PI = math.pi / 2
SCHEDULES = {  # name: alpha(t), d alpha / dt
    "linear": (lambda t: 1 - t, lambda t: -torch.ones_like(t)),  # "loglinear" in MDLM and SEDD
    "cosine": (lambda t: torch.cos(HALF_PI * t), lambda t: -HALF_PI * torch.sin(HALF_PI * t)),
    "cosine2": (lambda t: torch.cos(HALF_PI * t) ** 2, lambda t: -HALF_PI * torch.sin(math.pi * t)),
    "poly2": (lambda t: 1 - t**2, lambda t: -2 * t),
    "geometric": geometric(1e-4, 20.0),  # SEDD's
    "sigma_linear": sigma_linear(0.0, 10.0),  # MDLM's "linear"
}
SIGMAS = {"geometric": geometric, "sigma_linear": sigma_linear}  # from sigma_min to sigma_max


def curves(schedule):
    """(alpha(t), d alpha / dt) of a cfg, or of a schedule's name."""
    if isinstance(schedule, str):
        return SCHEDULES[schedule]
    if schedule.sigma_max:
        return SIGMAS[schedule.schedule](schedule.sigma_min, schedule.sigma_max)
    return SCHEDULES[schedule.schedule]


def alpha(schedule, t):
    """P(visible) at t, float64: in float32, 1 - alpha rounds to 0 near t = 0, and 0 / 0 follows.
    schedule: a cfg, or the name of a schedule with its default parameters."""
    return curves(schedule)[0](t.double())


def dalpha(schedule, t):
    """d alpha / dt at t, float64."""
    return curves(schedule)[1](t.double())


def time_at(schedule, masked):
    """The t at which a fraction `masked` of the tokens is masked: 1 - alpha, inverted."""
    low = torch.zeros_like(masked, dtype=torch.float64)
    high = torch.ones_like(masked, dtype=torch.float64)
    for _ in range(50):
        mid = (low + high) / 2
        above = 1 - alpha(schedule, mid) > masked
        low, high = torch.where(above, low, mid), torch.where(above, mid, high)
    return high


# --------------------------------------------------------------------------------------------------
# 2. Time and masking

TIME_LAWS = {  # name: uniform u in [0, 1) -> a time in [0, 1) of that law
    "uniform": lambda u: u,
    "bell": lambda u: 0.5 - torch.sin(torch.asin(1 - 2 * u) / 3),  # Beta(2, 2): 3 t^2 - 2 t^3 = u
}


def stratify(n, device=None):
    """n uniforms, one in each n-th of [0, 1): less noise in the loss than independent ones."""
    return (torch.arange(n, device=device) + torch.rand(n, dtype=torch.float64, device=device)) / n


def training_time(u, cfg):
    """Uniform u (B,) in [0, 1) -> training time t: in [t_min, 1), or n / T with n = 1 .. T.

    time_law "bell" draws t from Beta(2, 2): with the linear schedule, training then dwells where
    about half of the text is visible, which teaches a young network most (arXiv 2605.13026 has the
    idea). The losses keep their weights, so under the bell a training loss is not the bound.
    Evaluation never uses the bell."""
    u = TIME_LAWS[cfg.time_law](u.double())
    return (torch.floor(cfg.T * u) + 1) / cfg.T if cfg.T else cfg.t_min + (1 - cfg.t_min) * u


def mask_tokens(x0, alpha_t, maskable, mask_id, u=None):
    """Replace maskable tokens by MASK with probability 1 - alpha_t (B,), by uniforms u (B, L)."""
    u = torch.rand(x0.shape, dtype=torch.float64, device=x0.device) if u is None else u
    return x0.masked_fill(maskable & (u >= alpha_t[:, None]), mask_id)


def draw_count(n, u):
    """Uniform u (B,) -> a number of masks (B,) int64, uniform on 1 .. n; 1 if n is 0."""
    return (torch.floor(n * u) + 1).clamp(max=n.clamp(min=1)).long()


def mask_exactly(x0, count, maskable, mask_id, u=None):
    """Mask exactly count (B,) of each row's maskable positions, every subset equally likely.

    Raises the masked fraction until the count-th position is masked. Returns xt and that fraction
    (B,), which is Beta(count, n + 1 - count) for n maskable positions: the law of the fraction
    given the count, independent of which positions are masked. u (B, L) are uniforms."""
    u = torch.rand(x0.shape, dtype=torch.float64, device=x0.device) if u is None else u
    u = u.masked_fill(~maskable, 2.0)  # sorts these last
    fraction = u.sort(-1).values.gather(-1, count[:, None] - 1)
    return x0.masked_fill(maskable & (u <= fraction), mask_id), fraction[:, 0].clamp(max=1.0)


# How training draws its noise: from uniforms u (B,) and v (B, L) to t (B,), xt (B, L) and weights
# (B,). The weights correct for how t was drawn: a loss's mean is as if t followed the time law.


def draw_uniform(x0, maskable, cfg, u, v):
    """t by the time law; u is stratified over the global batch, or independent."""
    t = training_time(u, cfg)
    return t, mask_tokens(x0, alpha(cfg, t), maskable, cfg.mask_id, v), torch.ones_like(u)


def draw_importance(x0, maskable, cfg, u, v):
    """log t uniform, MDLM's importance sampling: under the linear schedule a masked token then has
    the same weight at every t."""
    t = cfg.t_min ** (1 - u)
    weight = t * -math.log(cfg.t_min) / (1 - cfg.t_min)  # uniform density over that of t
    return t, mask_tokens(x0, alpha(cfg, t), maskable, cfg.mask_id, v), weight


def draw_counts(x0, maskable, cfg, u, v):
    """Exactly l of n tokens masked, with l / n drawn by the time law; t_min is ignored. The weight
    replaces the loss's own by n / l: see `exact_count_bound`."""
    n = maskable.sum(-1)
    count = draw_count(n, TIME_LAWS[cfg.time_law](u.double()))
    xt, fraction = mask_exactly(x0, count, maskable, cfg.mask_id, v)
    t = time_at(cfg, fraction)
    return t, xt, n / count / bound_weight(t, cfg)


TIME_DRAWS = {
    "stratified": draw_uniform,
    "iid": draw_uniform,
    "importance": draw_importance,
    "counts": draw_counts,
}


def corrupt(x0, maskable, cfg, t, xt):
    """What the caller of a loss left out: t, stratified over the batch, and xt masked at t."""
    t = training_time(stratify(len(x0), x0.device), cfg) if t is None else t
    xt = mask_tokens(x0, alpha(cfg, t), maskable, cfg.mask_id) if xt is None else xt
    return t, xt


# --------------------------------------------------------------------------------------------------
# 3. Losses. They are one loss: -log p(x0 | xt) on masked positions, times a weight that depends
# on t alone. D3PM's bound is a sum over steps n = 1 .. T from t = n / T to s = (n - 1) / T, of
# KL(q(x_s | xt, x0) || p(x_s | xt)). Look at one position:
#
#   visible in xt: it stays as it is under both q and p, so KL = 0;
#   masked: with r = (alpha_s - alpha_t) / (1 - alpha_t), q reveals x0 with probability r and keeps
#   MASK with 1 - r. The model never predicts MASK, so p reveals v with probability r p(v | xt) and
#   keeps MASK with 1 - r too. The MASK terms cancel: KL = r log(r / (r p(x0))) = -r log p(x0).
#
# So nothing of size (B, L, V) is needed, and only masked positions need the head. Drawing one
# random step instead of summing over all T multiplies its term by T. As T grows, T r becomes
# -alpha' / (1 - alpha), and D3PM becomes MDLM.


def indices_of(at):
    """Flat indices (N,) of the True positions of `at` (B, L). Synchronises with a GPU."""
    return at.flatten().nonzero()[:, 0]


def scatter(values, at, indices=None):
    """Scatter values (N, ...) to the N positions of `at` (B, L): (B, L, ...), zero elsewhere.
    indices: `indices_of(at)`, if the caller has them already."""
    indices = indices_of(at) if indices is None else indices
    zeros = values.new_zeros(at.numel(), *values.shape[1:])
    return zeros.index_copy(0, indices, values).view(*at.shape, *values.shape[1:])


def cross_entropy(logits, tokens):
    """All that the losses need of logits (N, V), for tokens (N, k): -log p(tokens), (N, k) nats,
    and log Z (N,), where Z is the mean of exp(logits). Only `sedd`, whose predictions need not sum
    to one, uses log Z."""
    nats = -F.log_softmax(logits, -1).gather(-1, tokens)
    # the log of their sum, without another pass over logits
    log_sum = nats[:, 0] + logits.gather(-1, tokens[:, :1])[:, 0]
    return nats, log_sum - math.log(logits.shape[-1])


def cross_entropy_at(model, xt, t, at, tokens):
    """`cross_entropy` of tokens (B, L, k) given xt: (B, L, k) and (B, L), zero outside `at`."""
    if isinstance(model, torch.nn.Module):  # never stores large logits; see head.py
        return model(xt, t.float(), at, tokens)
    nats, log_z = cross_entropy(model(xt, t.float(), at), tokens[at])  # any function of (x, t, at)
    return scatter(nats, at), scatter(log_z, at)


def nll(model, x0, xt, t, at):
    """-log p(x0 | xt) in nats, (B, L) float32, zero outside `at`."""
    return cross_entropy_at(model, xt, t, at, x0[..., None])[0][..., 0]


def reveal_rate(t, cfg):
    """-alpha' / (1 - alpha) at t (B,): the rate at which masks are revealed, backwards in time."""
    masked = 1 - alpha(cfg, t)
    return -dalpha(cfg, t) / masked.clamp(min=1e-12)  # 0 near t = 0, where inf * 0 is NaN


def reveal_chance(t, s, cfg):
    """r = (alpha_s - alpha_t) / (1 - alpha_t): P(a mask is revealed in the step from t to s)."""
    alpha_t = alpha(cfg, t)
    return (alpha(cfg, s) - alpha_t) / (1 - alpha_t).clamp(min=1e-12)


def bound_weight(t, cfg):
    """The weight of a masked token's nats at t (B,): 1 / t for the linear schedule, for every T."""
    return cfg.T * reveal_chance(t, t.double() - 1 / cfg.T, cfg) if cfg.T else reveal_rate(t, cfg)


def mdlm(model, x0, maskable, cfg, t=None, xt=None):
    """Bound on -log p(x0): weighted cross-entropy of masked tokens, in T steps or continuous time.

    MDLM, arXiv 2406.07524, the NELBO of section 3. T = 0 is also MD4 (2406.04329), RADD
    (2406.03736) and, for alpha = 1 - t, the CE / t of SMDM (2410.18514). x0 (B, L) -> (B, L) nats,
    0 where visible."""
    t, xt = corrupt(x0, maskable, cfg, t, xt)
    masked = maskable & (xt == cfg.mask_id)
    return bound_weight(t, cfg).float()[:, None] * nll(model, x0, xt, t, masked)


def d3pm(model, x0, maskable, cfg, t=None, xt=None):
    """Absorbing D3PM (arXiv 2107.03006) in T steps, in three forms that are `mdlm` and more.

    aux_ce > 0           nanoDD's: T x (KL + aux_ce x cross-entropy of all tokens), and in step 1,
                         instead, T x the cross-entropy of all tokens. What exceeds the KL
                         is no part of the bound (flukeskywalker/nanoDD, its dense
                         posteriors summed in closed form).
    carry_over=False     the network must copy visible tokens: adds the reconstruction
                         -log p(x0 | x0) at t = 0.
    zero_masking=False   the network may predict MASK, with probability m. Its posterior is
                         normalised by 1 - alpha + alpha m; call that (1 - alpha) exp(a). Then
                         KL = r (a_t - log p(x0)) + (1 - r) (a_t - a_s).
    The last two are the ablations of MDLM (arXiv 2406.07524), its "D3PM".
    x0 (B, L) -> (B, L) nats."""
    t, xt = corrupt(x0, maskable, cfg, t, xt)
    if cfg.aux_ce:
        weight = bound_weight(t, cfg).float()[:, None] * (maskable & (xt == cfg.mask_id))
        weight = torch.where((t * cfg.T < 1.5)[:, None], float(cfg.T), weight + cfg.T * cfg.aux_ce)
        return weight * nll(model, x0, xt, t, maskable)
    kl = mdlm if cfg.zero_masking else posterior_kl
    nats = kl(model, x0, maskable, cfg, t, xt)
    return nats if cfg.carry_over else nats + nll(model, x0, x0, torch.zeros_like(t), maskable)


def posterior_kl(model, x0, maskable, cfg, t, xt):
    """T x D3PM's KL of step n = T t for a network that may predict MASK: (B, L)
    nats, 0 where visible."""
    masked = maskable & (xt == cfg.mask_id)
    tokens = torch.stack((x0, torch.full_like(x0, cfg.mask_id)), -1)  # MASK is the last output
    nats, _ = cross_entropy_at(model, xt, t, masked, tokens)
    nats, mask_nats = nats.double().unbind(-1)
    m, t = (-mask_nats).exp(), t.double()[:, None]
    s = t - 1 / cfg.T
    r, alpha_t, alpha_s = reveal_chance(t, s, cfg), alpha(cfg, t), alpha(cfg, s)
    a_t = torch.log1p(m * alpha_t / (1 - alpha_t).clamp(min=1e-12))
    # (1 - r) a_s, which is 0 at s = 0 because 1 - r is
    stay = torch.special.xlog1py(1 - r, m * alpha_s / (1 - alpha_s).clamp(min=1e-12))
    return torch.where(masked, cfg.T * (a_t + r * nats - stay), 0).float()


# SEDD learns ratios ("concrete scores"): how likely the text is with y at a masked position, over
# how likely it is with MASK there. The true ratio is rho P(y | xt); rho = alpha / (1 - alpha) is
# known. So its network's outputs are read as log score(y) = logit(y) + log(rho / V), and
# g = score / rho estimates P, but sums to some Z instead of 1. Score entropy, Eq. 5 of SEDD, times
# sigma' = -alpha' / alpha, is then
#   w(t) (Z - 1 - log g(x0)),  with w the weight of `mdlm`.  With p = g / Z that is
#   w(t) (-log p(x0) + Z - 1 - log Z):  MDLM's loss, plus the price of not being normalised, which
# is never negative. docs/theory.md goes through all of this more slowly.


def score_entropy(model, x0, xt, t, at):
    """-log p(x0) + Z - 1 - log Z in nats, (B, L) float32, zero outside `at`."""
    nats, log_z = cross_entropy_at(model, xt, t, at, x0[..., None])
    return nats[..., 0] + log_z.expm1() - log_z


def sedd(model, x0, maskable, cfg, t=None, xt=None):
    """Score entropy of SEDD's absorbing graph, arXiv 2310.16834: a bound on -log p(x0) in
    continuous time. x0 (B, L) -> (B, L) nats, zero where xt is visible."""
    t, xt = corrupt(x0, maskable, cfg, t, xt)
    masked = maskable & (xt == cfg.mask_id)
    return bound_weight(t, cfg).float()[:, None] * score_entropy(model, x0, xt, t, masked)


def ar(model, x0, maskable, cfg, t=None, xt=None):
    """-log p(x0_i | earlier tokens), (B, L) nats: exact, not a bound; needs a causal network."""
    return nll(model, x0, x0, torch.zeros(len(x0), device=x0.device), maskable)


LOSSES = {"mdlm": mdlm, "d3pm": d3pm, "sedd": sedd, "ar": ar}


def exact_count_bound(model, x0, maskable, cfg, count, xt=None, u=None, counted=None):
    """The continuous-time bound of `mdlm` or `sedd` for evaluation, per row: mask exactly
    `count` (B,) of n tokens and weight by n / count. With count uniform on 1 .. n its mean is
    the bound: the probability of `count` masks, weighted by -alpha'/(1 - alpha) and
    integrated over t, is 1 / count for every schedule. So there is no cut-off near t = 0 and
    no exploding weight. A time-conditioned model gets t drawn from its law given the count.
    u (B, L): the uniforms that choose the masks; counted (B, L): sum over these, by default over
    maskable. x0 (B, L) -> (B,) nats per row."""
    n = maskable.sum(-1)
    fraction = count / n  # stands in for t if the model ignores it
    if xt is None:
        xt, fraction = mask_exactly(x0, count, maskable, cfg.mask_id, u)
    t = time_at(cfg, fraction) if cfg.time_cond else fraction
    loss = score_entropy if cfg.loss == "sedd" else nll
    at = (maskable if counted is None else counted) & (xt == cfg.mask_id)
    return n / count * loss(model, x0, xt, t, at).sum(-1)


# --------------------------------------------------------------------------------------------------
# 4. What samplers need: noise per row, exact categorical draws, and log-probabilities from a model.


def philox(seed, row, stream, step=0):
    """A counter-based generator for key (seed, row). stream: 0 epochs, 1 training, 2 sampling,
    3 evaluation."""
    return np.random.Generator(np.random.Philox(key=[seed, row], counter=[0, 0, step, stream]))


def row_generators(seed, rows):
    """One generator per row. No two pairs of seed and row share a stream, so a row's text depends
    neither on its batch nor on other rows."""
    return [philox(seed, row, stream=2) for row in rows]


def uniform(at, gen):
    """float64 uniforms in [0, 1) of the shape of `at` (B, L). gen[i] draws row i and advances only
    if `at` is True somewhere in that row, so a finished row's text does not depend on its batch."""
    if gen is None:
        return torch.rand(at.shape, dtype=torch.float64, device=at.device)
    u = torch.zeros(at.shape, dtype=torch.float64)
    for row, g, alive in zip(u, gen, at.any(-1).tolist()):
        if alive:
            row.copy_(torch.from_numpy(g.random(len(row))))
    return u.to(at.device)


def in_parts(function, *tensors, rows=1024):
    """function(*tensors) by parts of `rows` rows: float64 copies of a large vocabulary's
    log-probabilities would need more memory than the network."""
    parts = zip(*(tensor.split(rows) for tensor in tensors), strict=True)
    return torch.cat([function(*part) for part in parts])


def categorical(log_p, u):
    """Draw one token per row of log_p (N, V): invert the cumulative distribution at u
    (N,), in float64. Float32 noise cuts off rare tokens and quietly lowers the
    temperature (arXiv 2409.02908)."""

    def invert(log_p, u):
        cdf = log_p.double().exp().cumsum(-1)
        token = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0]
        return token.clamp(max=log_p.shape[-1] - 1)

    return in_parts(invert, log_p, u)


def log_probabilities(logits, cfg):
    """(N, V) log-probabilities from logits. Those of two networks do not sum to one: g = c / rho of
    SEDD, and D3PM's without the probability of MASK. `ddpm`, `analytic` and `euler` use the sum."""
    if cfg.loss == "sedd":
        return logits - math.log(logits.shape[-1])
    return F.log_softmax(logits, -1)[:, : cfg.vocab_size]


def denoiser(model, cfg):
    """The denoise(x, t, at) of a model. Rows without a True in `at` do not pass the network."""

    @torch.no_grad()
    def denoise(x, t, at):
        rows = indices_of(at.any(-1))  # waits for a GPU; indexing by a mask would wait every time
        if len(rows) < len(x):
            x, t, at = x[rows], t[rows], at[rows]
        return log_probabilities(model(x, t.float(), at).float(), cfg)

    return denoise


# --------------------------------------------------------------------------------------------------
# 5. Samplers. `ddpm` defines a law for every number of steps; `ddpm_cache` has the same
# law in fewer network calls; `first_hitting` is the limit of infinitely many steps.
# samplers.py has the others.


def mass(log_p):
    """The sum of g over the vocabulary, (N,) float64, for log_p (N, V)."""
    return in_parts(lambda part: part.double().exp().sum(-1), log_p)


def step_by_step(denoise, x, steps, cfg, gen, chance):
    """One call for each of `steps` steps from t to s = t - 1 / steps. A masked position is revealed
    with probability chance(t, s, log_p), a scalar or (N,); masks left after that are revealed at t
    = 0. Kept literal: it draws a token for every mask and discards nearly all of them."""
    grid = torch.arange(steps + 1, dtype=torch.float64, device=x.device) / steps
    for n in range(steps, -1, -1):
        masked = x == cfg.mask_id
        if not masked.any():
            return
        log_p = denoise(x, grid[n].expand(len(x)), masked)
        token = x.masked_scatter(masked, categorical(log_p, uniform(masked, gen)[masked]))
        p = chance(grid[n], grid[n - 1], log_p) if n else torch.ones_like(grid[n])
        reveal = masked & (uniform(masked, gen) < scatter(p.expand(len(log_p)), masked))
        x = torch.where(reveal, token, x)
        yield x


def ddpm(denoise, x, steps, cfg, gen=None):
    """Ancestral sampling, the definition: the step t -> s reveals a mask with probability
    r = (alpha_s - alpha_t) / (1 - alpha_t). A network that predicts MASK with probability 1 - mass
    reveals less often: that is D3PM's posterior, see `posterior_kl`. (MDLM's code drops the MASK
    probability of such a network.)"""

    def chance(t, s, log_p):
        if cfg.zero_masking:
            return reveal_chance(t, s, cfg)
        alpha_t, alpha_s, p = alpha(cfg, t), alpha(cfg, s), mass(log_p)
        return (alpha_s - alpha_t) * p / (1 - alpha_t * p)

    yield from step_by_step(denoise, x, steps, cfg, gen, chance)


def reveal_at(denoise, x, time, cfg, gen):
    """Reveal every masked position of x at its time (B, L). Each row jumps from event to event, so
    the network is called only when something happens, and the head runs only where it happens."""
    u = uniform(x == cfg.mask_id, gen)  # each position is drawn once: that is all the randomness
    while (masked := x == cfg.mask_id).any():
        t = torch.where(masked, time, 0).amax(-1)  # (B,) each row's own next event
        now = masked & (time == t[:, None])  # exact comparison: t is a copy of one of them
        x = x.masked_scatter(now, categorical(denoise(x, t, now), u[now]))
        yield x


def ddpm_cache(denoise, x, steps, cfg, gen=None):
    """The law of `ddpm` in at most min(steps, L) calls, for any batch, prompt or time-conditioned
    network that does not predict MASK.

    When a position is revealed does not depend on the network: in step n with probability
    alpha((n-1)/steps) - alpha(n/steps), independently of all others. So draw the steps first and
    visit only those in which something happens. (MDLM's cache skips the same steps, but a change in
    any row of the batch ends it, and it is off for time-conditioned networks.)"""
    time = time_at(cfg, uniform(x == cfg.mask_id, gen))
    yield from reveal_at(denoise, x, torch.ceil(time * steps) / steps, cfg, gen)


def first_hitting(denoise, x, steps, cfg, gen=None):
    """The limit of infinitely many steps (arXiv 2409.02908): one token per call, each at its own
    continuous time; `steps` is not used. L calls for L masks."""
    time = time_at(cfg, uniform(x == cfg.mask_id, gen))
    yield from reveal_at(denoise, x, time, cfg, gen)
