"""The other samplers, the wrappers that reshape predictions, semi-autoregression and the registry.

A sampler is a generator sampler(denoise, x, steps, cfg, gen=None) that yields canvases (B, L). To
add one, write the function and its line in SAMPLERS: the command line, the tests and the benchmarks
pick it up. Parameters after `gen` become options, --NAME, if NAME is in OPTIONS.
"""

import inspect
import math

import torch
import torch.nn.functional as F

from diffusion import (
    alpha,
    categorical,
    ddpm,
    ddpm_cache,
    denoiser,
    first_hitting,
    in_parts,
    log_probabilities,
    mass,
    reveal_chance,
    reveal_rate,
    scatter,
    step_by_step,
    time_at,
    uniform,
)

# --------------------------------------------------------------------------------------------------
# 1. Wrappers of `denoise`: each returns another denoise


class Shaped:
    """denoise with its predictions passed through shape(log_p (N, V) normalised, t (N,)) -> (N, V).

    The sum over the vocabulary that the predictions had is kept. `plain` is the innermost
    denoise and `shapes` the functions around it, because an order ranks by the network's
    own predictions."""

    def __init__(self, denoise, *shapes):
        self.plain = getattr(denoise, "plain", denoise)
        self.shapes = (*getattr(denoise, "shapes", ()), *shapes)

    def __call__(self, x, t, at):
        return self.reshape(self.plain(x, t, at), t, at)

    def reshape(self, log_p, t, at):
        t = t[:, None].expand(at.shape)[at] if self.shapes else t
        for shape in self.shapes:
            log_mass = log_p.logsumexp(-1, keepdim=True)
            log_p = shape(log_p - log_mass, t) + log_mass
        return log_p


def keep_likeliest(log_p):
    """All probability on the likeliest token, shared equally in a tie."""
    return F.log_softmax(log_p.masked_fill(log_p < log_p.amax(-1, keepdim=True), -math.inf), -1)


def with_temperature(denoise, temperature):
    """p ** (1 / temperature), normalised; 0 is greedy."""

    def temper(log_p, t):
        if not temperature:
            return keep_likeliest(log_p)
        log_p = log_p.double()
        log_p = log_p - log_p.amax(-1, keepdim=True)  # the maximum is 0, so no division overflows
        return F.log_softmax(log_p / temperature, -1)

    return Shaped(denoise, temper)


def with_top_p(denoise, top_p):
    """Nucleus sampling: the smallest set of likeliest tokens with a mass of top_p, renormalised."""

    def truncate(log_p, t):
        log_p, order = log_p.sort(-1, descending=True)
        before = log_p.exp().cumsum(-1) - log_p.exp()  # mass of the likelier tokens
        log_p = log_p.masked_fill(before >= top_p, -math.inf)
        return F.log_softmax(torch.empty_like(log_p).scatter_(-1, order, log_p), -1)

    return Shaped(denoise, truncate)


def with_greedy_end(denoise, end):
    """Take the likeliest token where t <= end; with end = 1 / steps, in the last step."""
    greedy = lambda log_p, t: torch.where((t <= end)[:, None], keep_likeliest(log_p), log_p)
    return Shaped(denoise, greedy)


def with_guidance(denoise, given, w, cfg):
    """Classifier-free guidance without training (SMDM, arXiv 2410.18514, section 4):
    p(. | given) ^ (1 + w) / p(. | nothing) ^ w, normalised. `nothing` is the same canvas with the
    tokens `given` (B, L) masked too, except a first token that is always given (cfg.bos). Both
    predictions come from one call with twice the batch."""
    given = given & (torch.arange(given.shape[1], device=given.device) >= cfg.bos)

    def guided(x, t, at):
        bare = x.masked_fill(given, cfg.mask_id)
        both = denoise(torch.cat((x, bare)), torch.cat((t, t)), torch.cat((at, at)))
        with_prompt, without = both.chunk(2)
        return F.log_softmax((1 + w) * with_prompt - w * without, -1)

    return guided


def cached_denoiser(model, cfg):
    """The denoise of a causal network for `left_to_right`: a cache of keys and values, so
    that no token is read twice. It serves a batch whose rows are at the same position.
    Other calls use no cache."""
    plain, past, seen = denoiser(model, cfg), None, None

    @torch.no_grad()
    def denoise(x, t, at):
        nonlocal past, seen
        columns = at.any(0).nonzero()
        if len(columns) != 1 or (i := int(columns)) < cfg.bos:
            return plain(x, t, at)
        fits = seen is not None and len(seen) == len(x) and seen.shape[1] < i
        if not fits or (seen != x[:, : seen.shape[1]]).any():
            past = [[] for _ in model.blocks]
        seen = x[:, :i].clone()
        return log_probabilities(model.next_logits(seen, past)[at[:, i]], cfg)

    return denoise


# --------------------------------------------------------------------------------------------------
# 2. Samplers with steps: SEDD's two, and ReMDM's two, which take tokens back


def analytic(denoise, x, steps, cfg, gen=None):
    """SEDD's analytic sampler (Tweedie tau-leaping, section 4 of SEDD). By its formula a masked
    position becomes y with probability r g(y), and stays MASK with 1 - r mass; `mass` is the sum of
    g. With normalised scores it is `ddpm`."""
    chance = lambda t, s, log_p: reveal_chance(t, s, cfg) * mass(log_p)
    yield from step_by_step(denoise, x, steps, cfg, gen, chance)


def euler(denoise, x, steps, cfg, gen=None):
    """SEDD's Euler steps (tau-leaping): the reverse rate -alpha' / (1 - alpha)
    g(y), held from t to s."""
    chance = lambda t, s, log_p: (t - s) * reveal_rate(t, cfg) * mass(log_p)
    yield from step_by_step(denoise, x, steps, cfg, gen, chance)


def remdm(sigma, default):
    """ReMDM (arXiv 2503.00307, sections 3 and 4): each step from t to s masks a token that it has
    written again with probability sigma(eta, limit), limit = min(1, (1 - alpha_s) / alpha_t), and
    reveals a mask with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t). A token is then
    visible at s with probability alpha_s whatever sigma is; sigma = 0 is `ddpm`. Given tokens stay.
    Late steps can correct early mistakes, so more steps than tokens help. At most `steps` calls:
    times do not depend on the network, so it is called only where something is revealed."""

    def sampler(denoise, x, steps, cfg, gen=None, eta=default):
        writable = x == cfg.mask_id
        for n in range(steps, 0, -1):
            t, s = torch.tensor([n, n - 1], dtype=torch.float64) / steps
            alpha_t, alpha_s = alpha(cfg, t).item(), alpha(cfg, s).item()
            again = sigma(eta, min(1.0, (1 - alpha_s) / max(alpha_t, 1e-12)))
            masked, u = x == cfg.mask_id, uniform(writable, gen)
            reveal = masked & (u < (alpha_s - (1 - again) * alpha_t) / (1 - alpha_t))
            remask = writable & ~masked & (u < again)
            if reveal.any():
                log_p = denoise(x, t.to(x.device).expand(len(x)), reveal)
                x = x.masked_scatter(reveal, categorical(log_p, uniform(reveal, gen)[reveal]))
            if (reveal | remask).any():
                yield (x := x.masked_fill(remask, cfg.mask_id))

    return sampler


# --------------------------------------------------------------------------------------------------
# 3. Orders. order(log_p (N, V)) -> (N,) ranks masked positions by the network's predictions, the
# greatest first, the leftmost of equals; a token is drawn after its position is chosen. So one per
# call samples an exact law of the model, prod p(x_i | visible); tasks/orders.py has its likelihood.


def confidence(log_p):
    """The log of the largest probability."""
    return log_p.amax(-1)


def margin(log_p):
    """The lead of the likeliest token over the second."""
    best = log_p.exp().topk(min(2, log_p.shape[-1])).values
    return 2 * best[:, 0] - best.sum(-1)


def negative_entropy(log_p):
    """Minus the entropy, nats."""
    return torch.special.xlogy(p := log_p.exp(), p).sum(-1)


def choose(rank, masked, count):
    """The positions (B, L) to reveal: of each row's masks those of the greatest rank (N,), at least
    one. How many: count(rank (B, L) sorted, -inf at the end, number of masks (B,)) -> (B,)."""
    rank = scatter(rank, masked).masked_fill(~masked, -math.inf)
    rank, place = rank.sort(dim=-1, descending=True, stable=True)
    number = count(rank, masked.sum(-1)).clamp(min=1)
    return masked & (place.argsort(-1) < number[:, None])


def count_by_schedule(x, steps, cfg, per_call):
    """A count for `choose`: per_call, or, if that is 0, what the row's next step reveals: at the
    end s of a step, a fraction 1 - alpha(s) of the masks of x is left, rounded up."""
    total = (x == cfg.mask_id).sum(-1)

    def count(rank, left):
        if per_call:
            return torch.full_like(left, per_call)
        fewer = (left - 1).clamp(min=0).double() / total.clamp(min=1)
        s = torch.floor(steps * time_at(cfg, fewer) + 1e-9) / steps
        return left - torch.ceil(total * (1 - alpha(cfg, s)) - 1e-9).long()

    return count


def reveal_in_order(denoise, x, cfg, gen, order, count):
    """Each call chooses positions by order(the network's own log_p), at the t at which the schedule
    masks the same fraction of the canvas, then draws their tokens at whatever temperature."""
    shaped = denoise if isinstance(denoise, Shaped) else Shaped(denoise)
    total, u = (x == cfg.mask_id).sum(-1).clamp(min=1), uniform(x == cfg.mask_id, gen)
    while (masked := x == cfg.mask_id).any():
        t = time_at(cfg, masked.sum(-1).double() / total)
        log_p = shaped.plain(x, t, masked)
        rank = in_parts(lambda part: order(F.log_softmax(part, -1)), log_p)
        now = choose(rank, masked, count)
        x = x.masked_scatter(now, categorical(shaped.reshape(log_p[now[masked]], t, now), u[now]))
        yield x


def by_order(order):
    def sampler(denoise, x, steps, cfg, gen=None, per_call=0):
        count = count_by_schedule(x, steps, cfg, per_call)
        yield from reveal_in_order(denoise, x, cfg, gen, order, count)

    return sampler


def left_to_right(denoise, x, steps, cfg, gen=None, per_call=1):
    """From left to right; `steps` is not used. The head runs only where a token is drawn. Given
    tokens stay, but a causal network does not see those to the right."""
    total, u = (x == cfg.mask_id).sum(-1).clamp(min=1), uniform(x == cfg.mask_id, gen)
    while (masked := x == cfg.mask_id).any():
        now = masked & (masked.cumsum(-1) <= max(per_call, 1))
        t = time_at(cfg, masked.sum(-1).double() / total)
        x = x.masked_scatter(now, categorical(denoise(x, t, now), u[now]))
        yield x


def threshold(denoise, x, steps, cfg, gen=None, threshold=0.9):
    """Reveal all positions whose largest probability is above `threshold` at once, as Fast-dLLM
    (arXiv 2505.22618, section 3.3) at temperature 0. 0 reveals everything in one call, 1 one token
    per call. `steps` is not used."""
    count = lambda rank, left: (rank.exp() > threshold).sum(-1)
    yield from reveal_in_order(denoise, x, cfg, gen, confidence, count)


def entropy_bound(denoise, x, steps, cfg, gen=None, gamma=0.1):
    """Reveal tokens at once, least entropy first, as long as the sum of their entropies
    without the largest stays within `gamma` nats (EB-sampler, arXiv 2505.24857); that sum
    bounds their mutual information. 0 reveals one token per call, more only where they are
    certain. `steps` is not used."""

    def count(rank, left):  # in a prefix, the last entropy is the largest
        return (F.pad(-rank, (1, -1)).cumsum(-1) <= gamma).sum(-1)

    yield from reveal_in_order(denoise, x, cfg, gen, negative_entropy, count)


def llada(denoise, x, steps, cfg, gen=None, per_call=0, lucky=0):
    """MaskGIT's and LLaDA's rule (arXiv 2202.04200, 2502.09992): draw a token at every mask, keep
    the likeliest draws. At temperature 0 this is `confidence`. Above, it keeps the luckiest: no law
    of the model, little entropy even with a perfect network. `sample.frames` then needs lucky=1."""
    shaped, count = Shaped(denoise), count_by_schedule(x, steps, cfg, per_call)
    total = (x == cfg.mask_id).sum(-1).clamp(min=1)
    while (masked := x == cfg.mask_id).any():
        t = time_at(cfg, masked.sum(-1).double() / total)
        log_p = shaped.plain(x, t, masked)
        token = categorical(shaped.reshape(log_p, t, masked), uniform(masked, gen)[masked])
        of_draw = lambda part, token: F.log_softmax(part, -1).gather(-1, token)[:, 0]
        rank = in_parts(of_draw, log_p, token[:, None])
        x = torch.where(choose(rank, masked, count), x.masked_scatter(masked, token), x)
        yield x


# --------------------------------------------------------------------------------------------------
# 4. The registry, and texts of any length

SAMPLERS = {
    "ddpm": ddpm,
    "ddpm_cache": ddpm_cache,
    "first_hitting": first_hitting,
    "analytic": analytic,
    "euler": euler,
    # defaults of ReMDM's code, for 1,024 steps and top_p 0.9
    "remdm_cap": remdm(min, 0.008),
    "remdm_rescale": remdm(lambda eta, limit: eta * limit, 0.015),
    "ar": left_to_right,
    "confidence": by_order(confidence),
    "margin": by_order(margin),
    "entropy": by_order(negative_entropy),
    "threshold": threshold,
    "entropy_bound": entropy_bound,
    "llada": llada,
}
ORDERS = ("ar", "confidence", "margin", "entropy", "threshold", "entropy_bound")
STEPLESS = ("first_hitting", "threshold", "entropy_bound", "ar")  # these ignore `steps`
OPTIONS = dict(eta=1.0, threshold=1.0, gamma=math.inf, per_call=2**31, lucky=1)  # maxima


def default_options(sampler):
    """{name: default} of a sampler's parameters after `gen`."""
    return {p.name: p.default for p in list(inspect.signature(sampler).parameters.values())[5:]}


def semi_ar(
    denoise, x, steps, cfg, gen=None, sampler=ddpm_cache, window=None, stride=None, eos=None
):
    """Texts of any length (MDLM, section 4.2). `sampler` fills a window of the canvas x (B, any
    length), by default of cfg.seq_len tokens; then the window advances by `stride`, by default half
    of it, and fills the new masks given the text that it still covers. A row that has written the
    token `eos` is finished: it leaves the batch and the rest of it becomes eos. `steps` count per
    window. Yields (B, L) canvases."""
    window = window or cfg.seq_len
    stride, L, given = stride or max(window // 2, 1), x.shape[1], x != cfg.mask_id
    if stride > window:
        raise ValueError(f"stride={stride}: must be at most the window, {window}")
    rows = torch.arange(len(x), device=x.device)  # unfinished
    last = max(L - window, 0)
    for start in (*range(0, last, stride), last):
        row_gen = None if gen is None else [gen[i] for i in rows.tolist()]
        part = slice(start, start + window)
        for frame in sampler(denoise, x[rows, part], steps, cfg, row_gen):
            x = x.clone()
            x[rows, part] = frame
            yield x
        if eos is not None:
            ended = ((x == eos) & ~given).cumsum(-1) > 0  # from the first written eos on
            rows = rows[~ended[rows].any(-1)]
            if (ended & ~given & (x != eos)).any():
                x = x.masked_fill(ended & ~given, eos)
                yield x
        if not len(rows):
            return
