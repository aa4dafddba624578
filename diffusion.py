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
                          "the answer is never MASK" is a shape and not a minus infinity (a D3PM without
                          zero_masking has one more, MASK, at the end). Losses take them through `costs_of`
    denoise(x, t, at)  -> (N, V) log-probabilities; guidance, temperature, top-p and a greedy end wrap it
    loss(model, x0, maskable, cfg, t=None, xt=None)  -> (B, L) nats, never reduced, zero where nothing is lost
    sampler(denoise, x, steps, cfg, gen=None)        -> yields (B, L) canvases, each a new tensor
cfg is a configs.Config; gen a list of B torch.Generators, one per row, or None for torch's own.

A canvas is any x with some positions MASK: a prompt, an infilling and a suffix are only canvases.
"""

import inspect
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
    u = by_law(u, cfg)
    return (torch.floor(cfg.T * u) + 1) / cfg.T if cfg.T else cfg.t_min + (1 - cfg.t_min) * u


def by_law(u, cfg):
    u = u.double()
    return 0.5 - torch.sin(torch.asin(1 - 2 * u) / 3) if cfg.time_law == "bell" else u  # 3 t^2 - 2 t^3 = u


def mask_tokens(x0, alpha_t, maskable, mask_id, u=None):
    """Replace each maskable token by MASK with probability 1 - alpha_t (B,); u (B, L) are its uniforms."""
    u = torch.rand(x0.shape, dtype=torch.float64, device=x0.device) if u is None else u
    return x0.masked_fill(maskable & (u >= alpha_t[:, None]), mask_id)


def mask_exactly(x0, count, maskable, mask_id, u=None):
    """Mask exactly count (B,) of each row's maskable positions, every subset equally likely, by raising the
    masked fraction until the count-th falls. Returns xt and that fraction (B,), which is Beta(count, n + 1 -
    count) for n maskable positions: the law of the fraction given the count, independent of which fell."""
    u = torch.rand(x0.shape, dtype=torch.float64, device=x0.device) if u is None else u
    u = u.masked_fill(~maskable, 2.0)  # these come last
    fraction = u.sort(-1).values.gather(-1, count[:, None] - 1)
    return x0.masked_fill(maskable & (u <= fraction), mask_id), fraction[:, 0].clamp(max=1.0)


TIME_DRAWS = ("stratified", "iid", "importance", "counts")


def draw(x0, maskable, cfg, u, v):
    """Training's noise, from uniforms u (B,) and v (B, L): t (B,), xt (B, L), and the weights (B,) that make the
    losses' expectation that of t by the time law on [t_min, 1) again.

    stratified, iid    how the caller drew u: one in each stratum of the global batch, or independently
    importance         log t uniform (MDLM's importance sampling): the weight of a masked token is the same
                       for all t with the linear schedule
    counts             exactly l masks, l / n by the time law, from 1 / n whatever t_min: `exact_count_bound`"""
    if cfg.time_draw == "counts":
        n = maskable.sum(-1)
        count = (torch.floor(n * by_law(u, cfg)) + 1).clamp(max=n.clamp(min=1)).long()
        xt, fraction = mask_exactly(x0, count, maskable, cfg.mask_id, v)
        t = time_at(cfg.schedule, fraction)
        return t, xt, n / count / bound_weight(t, cfg)  # n / count instead of the loss's own weight
    weight = torch.ones_like(u)
    t = time_of(u, cfg)
    if cfg.time_draw == "importance":
        t = cfg.t_min ** (1 - u)
        weight = t * -math.log(cfg.t_min) / (1 - cfg.t_min)  # uniform density over that of t
    return t, mask_tokens(x0, alpha(cfg.schedule, t), maskable, cfg.mask_id, v), weight


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
# So KL = -r log p(x0 | xt): nothing of size (B, L, V) is needed, and answers at masks only. One random
# step instead of the sum costs a factor T; as T grows, T r becomes -alpha' / (1 - alpha): that is MDLM.


def places(at):
    """Where `at` (B, L) is True in the flattened canvas, (N,): the one thing that a loss waits for on a GPU."""
    return at.flatten().nonzero()[:, 0]


def spread(values, at, where=None):
    """values (N, ...) at the N positions of `at` (B, L), zero elsewhere: (B, L, ...). where: its `places`, if known."""
    zeros = values.new_zeros(at.numel(), *values.shape[1:])
    zeros = zeros.index_copy(0, places(at) if where is None else where, values)
    return zeros.view(*at.shape, *values.shape[1:])


def costs(logits, tokens):
    """All that a loss takes from logits (N, V), for tokens (N, k): -log p(tokens), (N, k) nats, and log Z, (N,),
    where Z is the mean of exp(logits): for networks whose answers do not sum to one (`sedd`)."""
    nats = -F.log_softmax(logits, -1).gather(-1, tokens)
    total = nats[:, 0] + logits.gather(-1, tokens[:, :1])[:, 0]  # the log of their sum, in no pass of its own
    return nats, total - math.log(logits.shape[-1])


def costs_of(model, xt, t, at, tokens):
    """`costs` of tokens (B, L, k) given xt: (B, L, k) and (B, L) float32, zero outside `at`. A DiT has its own
    way, which does not write large logits down."""
    if hasattr(model, "costs"):
        return model.costs(xt, t.float(), at, tokens)
    return [spread(values, at) for values in costs(model(xt, t.float(), at), tokens[at])]


def nll(model, x0, xt, t, at):
    """-log p(x0 | xt) in nats, (B, L) float32, zero outside `at`."""
    return costs_of(model, xt, t, at, x0[..., None])[0][..., 0]


def reveal_rate(t, cfg):
    """-alpha' / (1 - alpha) at t (B,): the rate at which, going back in time, a masked token is revealed."""
    masked = 1 - alpha(cfg.schedule, t)
    return -dalpha(cfg.schedule, t) / masked.clamp(min=1e-12)  # 0 near t = 0, where inf * 0 would be NaN


def reveal_chance(t, s, cfg):
    """r = (alpha_s - alpha_t) / (1 - alpha_t): a masked token's chance to be revealed in a step from t to s."""
    alpha_t = alpha(cfg.schedule, t)
    return (alpha(cfg.schedule, s) - alpha_t) / (1 - alpha_t).clamp(min=1e-12)


def bound_weight(t, cfg):
    """The weight of a masked token's nats at t (B,): both are 1 / t for the linear schedule."""
    return cfg.T * reveal_chance(t, t.double() - 1 / cfg.T, cfg) if cfg.T else reveal_rate(t, cfg)


def mdlm(model, x0, maskable, cfg, t=None, xt=None):
    """Bound on -log p(x0): weighted cross-entropy of the masked tokens, continuous (T = 0) or in T steps.

    MDLM, arXiv 2406.07524, the NELBO of section 3; T = 0 is also MD4 (2406.04329), RADD (2406.03736) and, for
    alpha = 1 - t, the CE / t of SMDM (2410.18514). x0 (B, L) -> (B, L) nats, zero where xt is visible."""
    t, xt = corrupt(x0, maskable, cfg, t, xt)
    masked = maskable & (xt == cfg.mask_id)
    return bound_weight(t, cfg).float()[:, None] * nll(model, x0, xt, t, masked)


def d3pm(model, x0, maskable, cfg, t=None, xt=None):
    """Absorbing D3PM (arXiv 2107.03006) in T steps, in three forms that are `mdlm` and more.

    aux_ce > 0             nanoDD's: T x (KL + aux_ce x cross-entropy over all tokens), and in step 1, instead,
                           T x the cross-entropy over all tokens. What goes beyond the KL is no part of the
                           bound (flukeskywalker/nanoDD, its dense posteriors summed in closed form)
    carry_over=False       the network must copy what it sees: plus the reconstruction -log p(x0 | x0) at t = 0
    zero_masking=False     the network may answer MASK, with probability m. The posterior built from it is
                           normalised by 1 - alpha + alpha m; call that (1 - alpha) exp(a):
                           KL = r (a_t - log p(x0)) + (1 - r) (a_t - a_s)
    The last two are the ablations of MDLM (arXiv 2406.07524), its "D3PM". x0 (B, L) -> (B, L) nats."""
    t, xt = corrupt(x0, maskable, cfg, t, xt)
    if cfg.aux_ce:
        weight = bound_weight(t, cfg).float()[:, None] * (maskable & (xt == cfg.mask_id))
        weight = torch.where((t * cfg.T < 1.5)[:, None], float(cfg.T), weight + cfg.T * cfg.aux_ce)
        return weight * nll(model, x0, xt, t, maskable)
    kl = mdlm if cfg.zero_masking else posterior_kl
    nats = kl(model, x0, maskable, cfg, t, xt)
    return nats if cfg.carry_over else nats + nll(model, x0, x0, torch.zeros_like(t), maskable)


def posterior_kl(model, x0, maskable, cfg, t, xt):
    """T x D3PM's KL of step n = T t for a network that may answer MASK, (B, L) nats, zero where xt is visible."""
    masked = maskable & (xt == cfg.mask_id)
    tokens = torch.stack((x0, torch.full_like(x0, cfg.mask_id)), -1)  # MASK is the last output, too
    nats, mask_nats = costs_of(model, xt, t, masked, tokens)[0].double().unbind(-1)
    m, t = (-mask_nats).exp(), t.double()[:, None]
    s = t - 1 / cfg.T
    r, alpha_t, alpha_s = reveal_chance(t, s, cfg), alpha(cfg.schedule, t), alpha(cfg.schedule, s)
    a_t = torch.log1p(m * alpha_t / (1 - alpha_t).clamp(min=1e-12))
    rest = torch.special.xlog1py(1 - r, m * alpha_s / (1 - alpha_s).clamp(min=1e-12))  # 0 at s = 0, as 1 - r
    return torch.where(masked, cfg.T * (a_t + r * nats - rest), 0).float()


# SEDD learns ratios instead ("concrete scores"): s(y) = p_t(x with y at a masked position) / p_t(x), which is
# r p(y | xt) with r = alpha / (1 - alpha), known. So its network's outputs are read as log s(y) = logit(y) +
# log(r / V), and p^ = s / r is a guess at p(. | xt) that sums to some Z instead of 1. Score entropy, Eq. 5 of
# SEDD, times sigma' = -alpha' / alpha, is then  w(t) (Z - 1 - log p^(x0)),  w the weight of `mdlm`. With
# p = p^ / Z that is  w(t) (-log p(x0) + Z - 1 - log Z):  MDLM's loss, plus what it costs not to be normalised.


def score_entropy(model, x0, xt, t, at):
    """-log p(x0) + Z - 1 - log Z in nats, (B, L) float32, zero outside `at`."""
    nats, log_z = costs_of(model, xt, t, at, x0[..., None])
    return nats[..., 0] + log_z.expm1() - log_z


def sedd(model, x0, maskable, cfg, t=None, xt=None):
    """Score entropy of SEDD's absorbing graph, arXiv 2310.16834: a bound on -log p(x0), continuous time.
    x0 (B, L) -> (B, L) nats, zero where xt is visible."""
    t, xt = corrupt(x0, maskable, cfg, t, xt)
    masked = maskable & (xt == cfg.mask_id)
    return bound_weight(t, cfg).float()[:, None] * score_entropy(model, x0, xt, t, masked)


def ar(model, x0, maskable, cfg, t=None, xt=None):
    """-log p(x0_i | the tokens before it), (B, L) nats: no bound but the likelihood; the network is causal."""
    return nll(model, x0, x0, torch.zeros(len(x0), device=x0.device), maskable)


LOSSES = {"mdlm": mdlm, "d3pm": d3pm, "sedd": sedd, "ar": ar}


def exact_count_bound(model, x0, maskable, cfg, count, xt=None):
    """The continuous bound of `mdlm` or `sedd` for evaluation, per row: mask exactly `count` (B,) of n tokens,
    and weigh by n / count. With count uniform on 1 .. n its mean is the bound: the chance of `count` masks,
    weighted by -alpha'/(1 - alpha) and integrated over t, is 1 / count for every schedule. There is no cut-off
    near t = 0 and no exploding weight. A time-conditioned model sees t drawn from its law given the count.
    x0 (B, L) -> (B,) nats per row."""
    n = maskable.sum(-1)
    fraction = count / n  # any will do when the model does not look
    if xt is None:
        xt, fraction = mask_exactly(x0, count, maskable, cfg.mask_id)
    t = time_at(cfg.schedule, fraction) if cfg.time_cond else fraction
    cost = score_entropy if cfg.loss == "sedd" else nll
    return n / count * cost(model, x0, xt, t, maskable & (xt == cfg.mask_id)).sum(-1)


# ---------------------------------------------------------------------------------------------------------
# 4. What samplers stand on: a row's own randomness, exact categorical draws, and wrappers of `denoise`.


def row_generators(seed, rows):
    """One random generator per row, so that a row's text does not depend on the rest of its batch."""
    return [torch.Generator().manual_seed(seed * 1_000_003 + row) for row in rows]


def uniform(at, gen):
    """float64 uniforms in [0, 1) for the positions `at` (B, L). With gen, row i is drawn from gen[i], and only if
    something is asked in it: what a finished row would draw must not depend on how long others take."""
    if gen is None:
        return torch.rand(at.shape, dtype=torch.float64, device=at.device)
    u = torch.zeros(at.shape, dtype=torch.float64)
    for row, g, asked in zip(u, gen, at.any(-1).tolist()):
        if asked:
            torch.rand(len(row), dtype=torch.float64, generator=g, out=row)
    return u.to(at.device)


def categorical(log_p, u):
    """One token per row of log_p (N, V), by inverting the cumulative distribution at u (N,).
    float64: float32 noise cuts off the rare tokens and quietly lowers the temperature (arXiv 2409.02908)."""

    def draw(log_p, u):
        cdf = log_p.double().exp().cumsum(-1)
        token = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0]
        return token.clamp(max=log_p.shape[-1] - 1)

    return in_parts(draw, log_p, u)


def in_parts(function, *tensors, rows=1024):
    """function(*tensors) by parts of so many rows: in float64, a large vocabulary's are larger than the network."""
    return torch.cat([function(*part) for part in zip(*(a.split(rows) for a in tensors), strict=True)])


def denoiser(model, cfg):
    """denoise(x, t, at) of a model. Rows in which nothing is asked are not run.

    Two networks' answers do not sum to one: p^ = s / r of SEDD, and D3PM's without the probability of MASK.
    `ddpm`, `analytic` and `euler` look at the sum; everything else takes them as if normalised."""

    @torch.no_grad()
    def denoise(x, t, at):
        rows = at.any(-1)
        return log_probabilities(model(x[rows], t[rows].float(), at[rows]).float(), cfg)

    return denoise


def log_probabilities(logits, cfg):
    if cfg.loss == "sedd":
        return logits - math.log(logits.shape[-1])
    return F.log_softmax(logits, -1)[:, : cfg.vocab_size]


def cached_denoiser(model, cfg):
    """denoise of a causal network for `ar`: what was read in earlier calls is not read again. Serves a batch
    whose rows are at the same position; for any other call there is no cache to use, and none is used."""
    plain, past, seen = denoiser(model, cfg), None, None

    @torch.no_grad()
    def denoise(x, t, at):
        nonlocal past, seen
        columns = at.any(0).nonzero()
        if len(columns) != 1 or (i := int(columns)) < cfg.bos:
            return plain(x, t, at)
        if seen is None or len(seen) != len(x) or seen.shape[1] >= i or (seen != x[:, : seen.shape[1]]).any():
            past = [[] for _ in model.blocks]
        seen = x[:, :i].clone()
        return log_probabilities(model.next_logits(seen, past)[at[:, i]], cfg)

    return denoise


def sides(denoise):
    """What `shaped` has kept of a denoise; of another, itself and a shape that changes nothing."""
    return getattr(denoise, "plain", denoise), getattr(denoise, "shape", lambda log_p, t, at: log_p)


def shaped(denoise, shape):
    """denoise with its answers passed through shape(log_p (N, V), normalised, t (N,)). What they sum to is kept, and
    so are both of its `sides`, for `surest`: .plain is the network's own answer, .shape makes the rest of it."""
    plain, inner = sides(denoise)

    def outer(log_p, t, at):
        log_p = inner(log_p, t, at)
        log_mass = log_p.logsumexp(-1, keepdim=True)
        return shape(log_p - log_mass, t[:, None].expand(at.shape)[at]) + log_mass

    both = lambda x, t, at: outer(plain(x, t, at), t, at)
    both.plain, both.shape = plain, outer
    return both


def greedy(log_p):
    return F.log_softmax(log_p.masked_fill(log_p < log_p.amax(-1, keepdim=True), -math.inf), -1)


def with_temperature(denoise, temperature):
    """p ** (1 / temperature), normalised; 0 is greedy."""

    def tempered(log_p, t):
        if not temperature:
            return greedy(log_p)
        log_p = log_p.double()
        log_p = log_p - log_p.amax(-1, keepdim=True)  # the best at exactly 0, whatever it is divided by
        return F.log_softmax(log_p / temperature, -1)

    return shaped(denoise, tempered)


def with_top_p(denoise, top_p):
    """The smallest set of likeliest tokens that holds a mass of top_p, renormalised (nucleus sampling)."""

    def truncated(log_p, t):
        log_p, order = log_p.sort(-1, descending=True)
        before = log_p.exp().cumsum(-1) - log_p.exp()  # mass of the likelier tokens
        log_p = log_p.masked_fill(before >= top_p, -math.inf)
        return F.log_softmax(torch.empty_like(log_p).scatter_(-1, order, log_p), -1)

    return shaped(denoise, truncated)


def with_greedy_end(denoise, end):
    """The likeliest token instead of a drawn one where t <= end; with end one step, in the last of them."""
    return shaped(denoise, lambda log_p, t: torch.where((t <= end)[:, None], greedy(log_p), log_p))


def with_guidance(denoise, given, w, cfg):
    """Classifier-free guidance that needs no training of its own (SMDM, arXiv 2410.18514, section 4): p(. | given)
    ^ (1 + w) / p(. | nothing) ^ w, normalised, where nothing is the same canvas with the tokens `given` (B, L)
    masked as well, but for a first token that always is given. Both are of one call, of twice the batch."""
    given = given & (torch.arange(given.shape[1], device=given.device) >= cfg.bos)

    def guided(x, t, at):
        both = denoise(
            torch.cat((x, x.masked_fill(given, cfg.mask_id))), torch.cat((t, t)), torch.cat((at, at))
        )
        with_it, without = both.chunk(2)
        return F.log_softmax((1 + w) * with_it - w * without, -1)

    return guided


# ---------------------------------------------------------------------------------------------------------
# 5. Samplers. `ddpm` defines a law for every number of steps; `ddpm_cache` has the same law in fewer calls,
# and `first_hitting` is its limit of infinitely many steps. `analytic` and `euler` are SEDD's, and ReMDM's two take
# tokens back. These seven sample from the model; the next five choose by confidence what to reveal, and have laws of
# their own. What a sampler's signature has behind `gen` are options of its own: --NAME where its name is in OPTIONS.


def mass(log_p):
    """What p^ of the rows of log_p (N, V) sums to, (N,) float64."""
    return in_parts(lambda part: part.double().exp().sum(-1), log_p)


def by_steps(denoise, x, steps, cfg, gen, chance):
    """One call for each of `steps` steps from t to s = t - 1 / steps: a masked position is revealed with probability
    chance(t, s, log_p), one for all or (N,). What is still masked after that is revealed at t = 0. Kept literal: a
    token is drawn for every mask, and nearly all are thrown away."""
    grid = torch.arange(steps + 1, dtype=torch.float64, device=x.device) / steps
    for n in range(steps, -1, -1):
        masked = x == cfg.mask_id
        if not masked.any():
            return
        log_p = denoise(x, grid[n].expand(len(x)), masked)
        token = x.masked_scatter(masked, categorical(log_p, uniform(masked, gen)[masked]))
        p = chance(grid[n], grid[n - 1], log_p) if n else torch.ones_like(grid[n])
        x = torch.where(masked & (uniform(masked, gen) < spread(p.expand(len(log_p)), masked)), token, x)
        yield x


def ddpm(denoise, x, steps, cfg, gen=None):
    """Ancestral sampling, the definition: t -> s reveals with probability r = (alpha_s - alpha_t) / (1 - alpha_t).
    A network that answers MASK with probability 1 - mass reveals less often: that is D3PM's posterior, see
    `posterior_kl`. (MDLM's code drops the MASK probability of such a network.)"""

    def chance(t, s, log_p):
        if cfg.zero_masking:
            return reveal_chance(t, s, cfg)
        alpha_t, alpha_s, answered = alpha(cfg.schedule, t), alpha(cfg.schedule, s), mass(log_p)
        return (alpha_s - alpha_t) * answered / (1 - alpha_t * answered)

    yield from by_steps(denoise, x, steps, cfg, gen, chance)


def analytic(denoise, x, steps, cfg, gen=None):
    """SEDD's analytic sampler (Tweedie tau-leaping, section 4 of SEDD). Its staggered score times its transposed
    transition row, written out for a masked position of the absorbing graph, is r p^(y) for each y and 1 - r mass
    for MASK: `ddpm` when the scores are normalised."""
    chance = lambda t, s, log_p: reveal_chance(t, s, cfg) * mass(log_p)
    yield from by_steps(denoise, x, steps, cfg, gen, chance)


def euler(denoise, x, steps, cfg, gen=None):
    """SEDD's Euler steps (tau-leaping): the reverse rate -alpha' / (1 - alpha) p^(y), held from t to s."""
    chance = lambda t, s, log_p: (t - s) * reveal_rate(t, cfg) * mass(log_p)
    yield from by_steps(denoise, x, steps, cfg, gen, chance)


def reveal_at(denoise, x, time, cfg, gen):
    """Reveal every masked position of x at its given time (B, L): each row jumps from event to event, so the
    network is called only when something happens, the head only on the positions that it happens to."""
    which = uniform(x == cfg.mask_id, gen)  # a position is drawn once: that is all the randomness there is
    while (masked := x == cfg.mask_id).any():
        t = torch.where(masked, time, 0).amax(-1)  # (B,) each row's own next event
        now = masked & (time == t[:, None])  # equal, since t is a copy of one of them
        x = x.masked_scatter(now, categorical(denoise(x, t, now), which[now]))
        yield x


def ddpm_cache(denoise, x, steps, cfg, gen=None):
    """The law of `ddpm` in at most min(steps, L) calls, for any batch, prompt or time-conditioned network that
    does not answer MASK.

    When a position is revealed does not depend on the network: in step n with probability
    alpha((n-1)/steps) - alpha(n/steps), independently of all others. So draw the steps first and visit only
    those in which something happens. (MDLM's cache skips the same steps, but a change in any row of the
    batch ends it, and it is off for time-conditioned networks.)"""
    time = time_at(cfg.schedule, uniform(x == cfg.mask_id, gen))
    yield from reveal_at(denoise, x, torch.ceil(time * steps) / steps, cfg, gen)


def first_hitting(denoise, x, steps, cfg, gen=None):
    """The limit of infinitely many steps (arXiv 2409.02908): one token per call, at its own continuous time;
    `steps` is not used. L calls for L masks."""
    yield from reveal_at(denoise, x, time_at(cfg.schedule, uniform(x == cfg.mask_id, gen)), cfg, gen)


def left_to_right(denoise, x, steps, cfg, gen=None):
    """From left to right, one token per call; `steps` is not used. Given tokens stay, wherever they are, but a
    causal network does not see those to the right."""
    L = x.shape[1]
    time = (L - torch.arange(L, dtype=torch.float64, device=x.device)) / L
    yield from reveal_at(denoise, x, time_at(cfg.schedule, time).expand(x.shape), cfg, gen)


def remdm(sigma, default):
    """The sampler that masks a token it has written again with probability sigma(eta, most) in each step from t to s,
    most = min(1, (1 - alpha_s) / alpha_t), and reveals a mask with probability (alpha_s - (1 - sigma) alpha_t) /
    (1 - alpha_t): a token is visible at s with probability alpha_s whatever sigma is, and sigma = 0 is `ddpm`
    (ReMDM, arXiv 2503.00307, sections 3 and 4). Given tokens stay. A late mistake can be mended, so more steps than
    tokens help. At most `steps` calls: here, too, times do not depend on the network, which answers reveals alone."""

    def sampler(denoise, x, steps, cfg, gen=None, eta=default):
        written = x == cfg.mask_id  # sooner or later
        for n in range(steps, 0, -1):
            t, s = torch.tensor([n, n - 1], dtype=torch.float64) / steps
            alpha_t, alpha_s = alpha(cfg.schedule, t).item(), alpha(cfg.schedule, s).item()
            again = sigma(eta, min(1.0, (1 - alpha_s) / max(alpha_t, 1e-12)))
            masked, u = x == cfg.mask_id, uniform(written, gen)
            reveal = masked & (u < (alpha_s - (1 - again) * alpha_t) / (1 - alpha_t))
            remask = written & ~masked & (u < again)
            if reveal.any():
                log_p = denoise(x, t.to(x.device).expand(len(x)), reveal)
                x = x.masked_scatter(reveal, categorical(log_p, uniform(reveal, gen)[reveal]))
            if (reveal | remask).any():
                yield (x := x.masked_fill(remask, cfg.mask_id))

    return sampler


def confidence(log_p, token):
    return log_p.gather(-1, token[:, None])[:, 0]


def margin(log_p, token):
    best = log_p.exp().topk(min(2, log_p.shape[-1])).values
    return 2 * best[:, 0] - best.sum(-1)  # the likeliest token's lead


def negative_entropy(log_p, token):
    return torch.special.xlogy(p := log_p.exp(), p).sum(-1)


def surest(denoise, x, t, asked, gen, score, count):
    """x with some of the positions `asked` revealed: a token is drawn for each of them, and ranked by score(log_p
    (N, V), token (N,)) -> (N,); count(values (B, L)), which are sorted, -inf where nothing is asked, is how many of a
    row's best are kept. The ranking is a row's own, and by the network's own log_p, whatever temperature the token
    was drawn at. Not a sample from the model: sure tokens come first."""
    plain, shape = sides(denoise)
    log_p = plain(x, t, asked)
    token = categorical(shape(log_p, t, asked), uniform(asked, gen)[asked])
    value = in_parts(lambda p, v: score(F.log_softmax(p.double(), -1), v), log_p, token)
    value = spread(value, asked).masked_fill(~asked, -math.inf)
    value, order = value.sort(dim=-1, descending=True, stable=True)
    kept = asked & (order.argsort(dim=-1) < count(value)[:, None])
    return torch.where(kept, x.masked_scatter(asked, token), x)


def by_confidence(score):
    """The sampler that reveals the `surest` so many that after step n a fraction 1 - alpha((n-1) / steps) of the row's
    masks is left, rounded up (MaskGIT, arXiv 2202.04200; LLaDA, 2502.09992)."""

    def sampler(denoise, x, steps, cfg, gen=None):
        total = (x == cfg.mask_id).sum(-1)
        left = 1 - alpha(cfg.schedule, torch.arange(steps, dtype=torch.float64) / steps)
        for n in range(steps, 0, -1):
            masked = x == cfg.mask_id
            reveal = masked.sum(-1) - torch.ceil(total * left[n - 1].item() - 1e-9).long()  # (B,)
            asked = masked & (reveal > 0)[:, None]  # in some steps there is nothing to reveal
            if not asked.any():
                continue
            t = torch.full(x.shape[:1], n / steps, device=x.device)
            x = surest(denoise, x, t, asked, gen, score, lambda value, reveal=reveal: reveal)
            yield x

    return sampler


def as_sure(denoise, x, cfg, gen, score, count):
    """Reveal the `surest`, as many per call as `count` says but at least one, at the time at which the schedule has
    as large a part of the row's masks left as there is. Finished rows leave, and no number of steps is needed."""
    total = (x == cfg.mask_id).sum(-1).clamp(min=1)
    while (masked := x == cfg.mask_id).any():
        t = time_at(cfg.schedule, masked.sum(-1).double() / total)
        x = surest(denoise, x, t, masked, gen, score, lambda value: count(value).clamp(min=1))
        yield x


def threshold(denoise, x, steps, cfg, gen=None, threshold=0.9):
    """All tokens of a probability above `threshold` at once (Fast-dLLM, arXiv 2505.22618, section 3.3); 0 reveals
    everything in one call, 1 a token per call. `steps` is not used. At most L calls."""
    count = lambda value: (value.exp() > threshold).sum(-1)
    yield from as_sure(denoise, x, cfg, gen, confidence, count)


def entropy_bound(denoise, x, steps, cfg, gen=None, gamma=0.1):
    """As many at once, those of least entropy first, as keep the sum of their entropies without the largest, which
    bounds what they tell of each other, at most `gamma` nats (EB-sampler, arXiv 2505.24857); 0 reveals a token per
    call, more only where they are certain. `steps` is not used. At most L calls."""

    def count(value):  # the largest is a prefix's last
        return (F.pad(-value, (1, -1)).cumsum(-1) <= gamma).sum(-1)

    yield from as_sure(denoise, x, cfg, gen, negative_entropy, count)


SAMPLERS = {
    "ddpm": ddpm,
    "ddpm_cache": ddpm_cache,
    "first_hitting": first_hitting,
    "analytic": analytic,
    "euler": euler,
    "remdm_cap": remdm(min, 0.008),  # these defaults are those of ReMDM's code, for 1,024 steps and top_p 0.9
    "remdm_rescale": remdm(lambda eta, most: eta * most, 0.015),
    "confidence": by_confidence(confidence),
    "margin": by_confidence(margin),
    "entropy": by_confidence(negative_entropy),
    "threshold": threshold,
    "entropy_bound": entropy_bound,
    "ar": left_to_right,
}
STEPLESS = ("first_hitting", "threshold", "entropy_bound", "ar")  # `steps` means nothing to these
OPTIONS = {"eta": 1.0, "threshold": 1.0, "gamma": math.inf}  # of some samplers: greatest value; least is 0


def options_of(sampler):
    """{name: default} of what a sampler's signature has behind `gen`."""
    return {p.name: p.default for p in list(inspect.signature(sampler).parameters.values())[5:]}


def semi_ar(denoise, x, steps, cfg, gen=None, sampler=ddpm_cache, window=None, stride=None, eos=None):
    """Texts of any length (MDLM, section 4.2): `sampler` fills a window of the canvas x (B, any length), by default
    of cfg.seq_len tokens, which then moves on by `stride`, by default half of it, and fills what is new seeing the
    rest. A row that has written the token `eos` is finished: it leaves the batch, and the rest of it becomes eos.
    `steps` are those of each window. Yields (B, L) canvases."""
    window = window or cfg.seq_len
    stride, L, given = stride or max(window // 2, 1), x.shape[1], x != cfg.mask_id
    if stride > window:
        raise ValueError(f"stride={stride}: must be at most the window, {window}")
    rows = torch.arange(len(x), device=x.device)  # not finished yet
    last = max(L - window, 0)
    for start in (*range(0, last, stride), last):
        mine = None if gen is None else [gen[i] for i in rows.tolist()]
        part = slice(start, start + window)
        for frame in sampler(denoise, x[rows, part], steps, cfg, mine):
            x = x.clone()
            x[rows, part] = frame
            yield x
        if eos is not None:
            behind = ((x == eos) & ~given).cumsum(-1) > 0  # from the first eos that was written on
            rows = rows[~behind[rows].any(-1)]
            if (behind & ~given & (x != eos)).any():
                x = x.masked_fill(behind & ~given, eos)
                yield x
        if not len(rows):
            return
