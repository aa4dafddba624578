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
    reveal_at,
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
    denoise and `shapes` the functions around it, because `reveal_surest` ranks by the
    network's own predictions."""

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
# 2. Samplers from the model: SEDD's two, left to right, and ReMDM's two, which take tokens back


def analytic(denoise, x, steps, cfg, gen=None):
    """SEDD's analytic sampler (Tweedie tau-leaping, section 4 of SEDD). For a masked position of
    the absorbing graph, its staggered score times its transposed transition row is r g(y) for each
    y and 1 - r mass for MASK. With normalised scores it is `ddpm`."""
    chance = lambda t, s, log_p: reveal_chance(t, s, cfg) * mass(log_p)
    yield from step_by_step(denoise, x, steps, cfg, gen, chance)


def euler(denoise, x, steps, cfg, gen=None):
    """SEDD's Euler steps (tau-leaping): the reverse rate -alpha' / (1 - alpha)
    g(y), held from t to s."""
    chance = lambda t, s, log_p: (t - s) * reveal_rate(t, cfg) * mass(log_p)
    yield from step_by_step(denoise, x, steps, cfg, gen, chance)


def left_to_right(denoise, x, steps, cfg, gen=None):
    """From left to right, one token per call, each at the time of the fraction of masks that is
    left; `steps` is not used. Given tokens stay, but a causal network does not see those to the
    right."""
    masked = x == cfg.mask_id
    left = masked.flip(-1).cumsum(-1).flip(-1)  # masks from here on
    time = time_at(cfg, left.double() / masked.sum(-1, keepdim=True).clamp(min=1))
    yield from reveal_at(denoise, x, time, cfg, gen)


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
# 3. Samplers that choose by confidence which positions to reveal. Their laws are not the model's.
# A score ranks positions: score(log_p (N, V), token (N,)) -> (N,), larger is revealed earlier.


def confidence(log_p, token):
    """log p of the token that was drawn."""
    return log_p.gather(-1, token[:, None])[:, 0]


def margin(log_p, token):
    """The lead of the likeliest token over the second."""
    best = log_p.exp().topk(min(2, log_p.shape[-1])).values
    return 2 * best[:, 0] - best.sum(-1)


def negative_entropy(log_p, token):
    """Minus the entropy, nats."""
    return torch.special.xlogy(p := log_p.exp(), p).sum(-1)


def reveal_surest(denoise, x, t, at, gen, score, count):
    """Draw a token at every position of `at` and reveal those of the highest score in each row.

    count(values (B, L)) -> (B,) is how many; values are the row's scores, sorted, -inf outside
    `at`. Scores use the network's own log_p, whatever temperature the token is drawn at."""
    shaped = Shaped(denoise)
    log_p = shaped.plain(x, t, at)
    token = categorical(shaped.reshape(log_p, t, at), uniform(at, gen)[at])
    value = in_parts(lambda p, v: score(F.log_softmax(p.double(), -1), v), log_p, token)
    value = scatter(value, at).masked_fill(~at, -math.inf)
    value, order = value.sort(dim=-1, descending=True, stable=True)
    reveal = at & (order.argsort(dim=-1) < count(value)[:, None])
    return torch.where(reveal, x.masked_scatter(at, token), x)


def by_confidence(score):
    """After step n, a fraction 1 - alpha((n-1) / steps) of the row's masks is left, rounded up;
    each step reveals the surest (MaskGIT, arXiv 2202.04200; LLaDA, 2502.09992)."""

    def sampler(denoise, x, steps, cfg, gen=None):
        total = (x == cfg.mask_id).sum(-1)
        left = 1 - alpha(cfg, torch.arange(steps, dtype=torch.float64) / steps)
        for n in range(steps, 0, -1):
            masked = x == cfg.mask_id
            reveal = masked.sum(-1) - torch.ceil(total * left[n - 1].item() - 1e-9).long()  # (B,)
            at = masked & (reveal > 0)[:, None]
            if not at.any():  # nothing to reveal in this step
                continue
            t = torch.full(x.shape[:1], n / steps, device=x.device)
            x = reveal_surest(denoise, x, t, at, gen, score, lambda value, reveal=reveal: reveal)
            yield x

    return sampler


def reveal_while_sure(denoise, x, cfg, gen, score, count):
    """Each call reveals the surest, count(values) of them but at least one, at the time at which
    the schedule has the same fraction of the row's masks left. Takes no number of steps."""
    total = (x == cfg.mask_id).sum(-1).clamp(min=1)
    while (masked := x == cfg.mask_id).any():
        t = time_at(cfg, masked.sum(-1).double() / total)
        at_least_one = lambda value: count(value).clamp(min=1)
        x = reveal_surest(denoise, x, t, masked, gen, score, at_least_one)
        yield x


def threshold(denoise, x, steps, cfg, gen=None, threshold=0.9):
    """Reveal all tokens with a probability above `threshold` at once (Fast-dLLM, arXiv 2505.22618,
    section 3.3). 0 reveals everything in one call, 1 one token per call. `steps` is not used."""
    count = lambda value: (value.exp() > threshold).sum(-1)
    yield from reveal_while_sure(denoise, x, cfg, gen, confidence, count)


def entropy_bound(denoise, x, steps, cfg, gen=None, gamma=0.1):
    """Reveal tokens at once, least entropy first, as long as the sum of their entropies
    without the largest stays within `gamma` nats (EB-sampler, arXiv 2505.24857); that sum
    bounds their mutual information. 0 reveals one token per call, more only where they are
    certain. `steps` is not used."""

    def count(value):  # in a prefix, the last entropy is the largest
        return (F.pad(-value, (1, -1)).cumsum(-1) <= gamma).sum(-1)

    yield from reveal_while_sure(denoise, x, cfg, gen, negative_entropy, count)


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
    "confidence": by_confidence(confidence),
    "margin": by_confidence(margin),
    "entropy": by_confidence(negative_entropy),
    "threshold": threshold,
    "entropy_bound": entropy_bound,
    "ar": left_to_right,
}
STEPLESS = ("first_hitting", "threshold", "entropy_bound", "ar")  # these ignore `steps`
OPTIONS = {"eta": 1.0, "threshold": 1.0, "gamma": math.inf}  # name: maximum; the minimum is 0


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
