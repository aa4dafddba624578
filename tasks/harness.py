"""Tasks of the LM Evaluation Harness on a checkpoint: likelihoods, greedy answers and free text,
batched across requests. Needs: pip install lm_eval==0.4.13

python -m tasks.harness out/owt_mdlm/ckpt.pt --tasks lambada_standard hellaswag --limit 200
python -m tasks.harness smdm_1028.pt --tasks openbookqa --estimator chain --guidance 1.6 --json
python -m tasks.harness out/pydocs_mdlm/ckpt.pt --tasks mine --include_path my_tasks   # YAML files
python -m tasks.harness out/gsm8k/ckpt.pt --tasks gsm8k --sampler threshold --threshold 0.7

The likelihood of a target given its prefix is a Monte Carlo bound (mc), exact for the order from
left to right (chain), or exact for another order, one or --per_call tokens per call (tasks/orders);
an AR model's is exact. Free text is greedy, the surest token first, or, with
a temperature or --sampler, sampled; --temperature and --top_p replace the task's and --gen_kwargs'.

A time-conditioned network gets t by the masked fraction of the target, since the prefix is never
masked: mc draws t given the number of masks, as the bound does; chain and greedy decoding, which
have no time, take the t at which the schedule masks that fraction.
"""

import math
import sys
from collections import defaultdict, deque
from contextlib import contextmanager, redirect_stdout
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from common import autocast, check_range, command, compute_dtype, fail, parser, progress, to_json
from data.canvas import start_ids
from data.checkpoints import load
from data.command_line import (
    add_model_options,
    add_sampler_options,
    check_top_p,
    choose_sampler,
    read_sampler_options,
)
from data.processes import gather, local_device, process_group, rank_and_world, share
from data.tokenizer import tokenizer_of
from diffusion import denoiser, draw_count, mask_exactly, scatter, time_at
from sample import frames
from samplers import ORDERS, with_guidance
from tasks.orders import describe, order_arguments, order_nats


class Request(NamedTuple):
    prefix: list  # given ids
    target: list  # ids whose probability is requested
    noise_key: tuple = (0,)  # requests with the same key get the same random numbers


def split_text(encode, context, continuation, noise_key=(0,)):
    """The Request of a context and its continuation, as the harness splits: spaces that end the
    context go to the continuation, whose tokens are those of the whole text after the context's."""
    stem = context.rstrip()
    text = context[len(stem) :] + continuation
    prefix = encode(stem)
    target = encode(stem + text)[len(prefix) :]  # empty if one token spans the border
    return Request(prefix, target or encode(text, inside=True), noise_key)


def truncate(requests, start, cfg):
    """The requests with `start` in front, cut on the left to seq_len tokens."""
    room = cfg.seq_len - len(start)
    if long := sum(len(r.prefix + r.target) > room for r in requests):
        note = f"{long} of {len(requests)} texts cut on the left to {cfg.seq_len} tokens"
        sys.stderr.write(f"note: {note}\n")
    prefix = lambda r: (r.prefix + r.target)[-room:][: -len(r.target) or None]
    return [Request(start + prefix(r), r.target[-room:], r.noise_key) for r in requests]


def batches(requests, rows, batch_size=32, device="cpu", quiet=True):
    """Batches of equally long rows, the longest first; a bidirectional network would read padding
    as text. Request i takes rows[i] rows. Yields i (B,) the request of each row, k (B,) the row's
    number within it, x0 (B, L) ids, offset (B, L) positions from the target's first token."""
    sizes = [len(r.prefix + r.target) for r in requests]
    with progress(total=sum(rows), disable=quiet, unit=" rows") as bar:
        for L in sorted(set(sizes), reverse=True):
            jobs = ((i, k) for i, size in enumerate(sizes) if size == L for k in range(rows[i]))
            while batch := list(islice(jobs, batch_size)):
                part = [requests[i] for i, _ in batch]
                x0 = torch.tensor([r.prefix + r.target for r in part], device=device)
                first = torch.tensor([[len(r.prefix)] for r in part], device=device)
                i, k = torch.tensor(batch, device=device).T
                yield i, k, x0, torch.arange(L, device=device) - first
                bar.update(len(batch))


# --------------------------------------------------------------------------------------------------
# Estimators of log p(target | prefix): (model, cfg, requests, w, **batching) -> N floats. With
# guidance, w > 0, p is the product of guided conditionals.


def normalized_denoiser(model, cfg, given, w):
    """denoise(x, t, at) whose predictions sum to one, also for SEDD and for a D3PM that predicts
    MASK; guided by the tokens `given` (B, L) if w > 0."""
    denoise = denoiser(model, cfg)
    if w:
        denoise = with_guidance(denoise, given, w, cfg)
    return lambda x, t, at: F.log_softmax(denoise(x, t, at), -1)


def time_of(x, maskable, cfg):
    """t (B,) at which the schedule masks the fraction of `maskable` (B, L) that x (B, L) masks."""
    masked = (x == cfg.mask_id).sum(-1).double()
    return time_at(cfg, masked / maskable.sum(-1))


def sum_log_p(make_rows, rows, model, cfg, requests, w, **batching):
    """Per request, the sum over its rows of weight * log p(x0 | x) at the positions `at`, where
    make_rows(i, k, x0, offset) -> x (B, L), t (B,), at (B, L), weight (B,)."""
    total = torch.zeros(len(requests), dtype=torch.float64)
    for i, k, x0, offset in batches(requests, rows, **batching):
        x, t, at, weight = make_rows(i, k, x0, offset)
        log_p = normalized_denoiser(model, cfg, offset < 0, w)(x, t, at)
        log_p = scatter(log_p.gather(-1, x0[at][:, None])[:, 0].double(), at)
        total.index_add_(0, i.cpu(), (weight * log_p.sum(-1)).cpu())
    return total.tolist()


def chain(model, cfg, requests, w=0.0, **batching):
    """The chain rule from left to right: row k masks the target from token k on and predicts that
    token; a causal network needs one row for all. The law of the sampler `ar`."""

    def make_rows(i, k, x0, offset):
        if cfg.causal:
            return x0, torch.zeros_like(k), offset >= 0, torch.ones_like(k)
        x = x0.masked_fill(offset >= k[:, None], cfg.mask_id)
        return x, time_of(x, offset >= 0, cfg), offset == k[:, None], torch.ones_like(k)

    rows = [min(len(r.target), 1) if cfg.causal else len(r.target) for r in requests]
    return sum_log_p(make_rows, rows, model, cfg, requests, w, **batching)


def by_order(model, cfg, requests, w=0.0, order=None, **batching):
    """Exact for an order, {sampler, its option}: `order_nats` of the target."""
    total, rows = torch.zeros(len(requests)).double(), [min(len(r.target), 1) for r in requests]
    for i, _, x0, offset in batches(requests, rows, **batching):
        denoise = normalized_denoiser(model, cfg, offset < 0, w)
        nats, _ = order_nats(denoise, x0, offset >= 0, cfg, **order)
        total[i.cpu()] = -nats.sum(-1).cpu()
    return total.tolist()


def draw_noise(request, k, seed):
    """Uniforms of sample k: one for the number of masks, then one per token of the target. They
    depend on nothing else, so a question's options are compared under the same masks."""
    rng = np.random.default_rng([seed, *request.noise_key, k])
    return torch.from_numpy(rng.random(1 + len(request.target)))


def mc(model, cfg, requests, w=0.0, samples=128, seed=0, **batching):
    """Unbiased estimate of a lower bound, the negative loss of diffusing the target alone: as in
    `exact_count_bound`, mask exactly l of n tokens, l stratified over samples; weight by n / l."""

    def make_rows(i, k, x0, offset):
        pairs = zip(i.tolist(), k.tolist())
        noise = [draw_noise(requests[r], sample, seed).to(x0.device) for r, sample in pairs]
        u = torch.stack([F.pad(v[1:], (x0.shape[1] - len(v) + 1, 0)) for v in noise])
        target = offset >= 0
        n = target.sum(-1)
        count = draw_count(n, (k + torch.stack([v[0] for v in noise])) / samples)
        x, fraction = mask_exactly(x0, count, target, cfg.mask_id, u)
        return x, time_at(cfg, fraction), x == cfg.mask_id, n / count / samples

    rows = [samples * min(len(r.target), 1) for r in requests]
    return sum_log_p(make_rows, rows, model, cfg, requests, w, **batching)


# --------------------------------------------------------------------------------------------------
# Greedy answers and free text


def commit(denoise, x, maskable, cfg):
    """Replace one mask in each row of x (B, L) by its likeliest token: the mask where the network
    is surest or, if it is causal, the next one. maskable (B, L): what was masked at first."""
    masked = x == cfg.mask_id
    at = masked & (masked.cumsum(-1) == 1) if cfg.causal else masked
    best, token = denoise(x, time_of(x, maskable, cfg), at).max(-1)
    surest = scatter(best, at).masked_fill(~at, -math.inf).argmax(-1, keepdim=True)
    reveal = at & (torch.arange(x.shape[1], device=x.device) == surest)
    return torch.where(reveal, x.masked_scatter(at, token), x)


def is_greedy(model, cfg, requests, w=0.0, **batching):
    """Whether greedy decoding into as many masks as the target has tokens writes the target: N
    bools. A row leaves its batch at its first wrong token."""
    right, rows = [True] * len(requests), [min(len(r.target), 1) for r in requests]
    for i, _, x0, offset in batches(requests, rows, **batching):
        x = x0.masked_fill(offset >= 0, cfg.mask_id)
        while len(x):
            x = commit(normalized_denoiser(model, cfg, offset < 0, w), x, offset >= 0, cfg)
            masked = x == cfg.mask_id
            wrong = ((x != x0) & ~masked).any(-1)
            for request in i[wrong].tolist():
                right[request] = False
            keep = masked.any(-1) & ~wrong
            i, x0, offset, x = (a[keep] for a in (i, x0, offset, x))
    return right


def fill(model, cfg, x, rows, w, dtype, sampler=None, steps=1000, temperature=0.0, **options):
    """Fill the masks of x (B, L): with a temperature or a sampler as sample.py does, with the
    random numbers of row rows[i], else greedily. options: see `frames`."""
    if temperature or sampler or cfg.causal:
        options |= dict(guidance=w, temperature=temperature, dtype=dtype)
        xs = frames(model, cfg, x, rows, steps, choose_sampler(cfg, sampler), **options)
        return deque(progress(xs, unit=" calls"), maxlen=1).pop()
    maskable = x == cfg.mask_id
    denoise = normalized_denoiser(model, cfg, ~maskable, w)
    with autocast(x.device, dtype):
        for _ in progress(range(int(maskable.sum(-1).max())), unit=" calls"):
            x = commit(denoise, x, maskable, cfg)
    return x


# --------------------------------------------------------------------------------------------------
# The harness's side


def group_prompts(requests, encode, start, cfg, overrides):
    """{(row length, temperature, top_p): [(request's number, prompt ids, new tokens, stop
    strings)]} of requests for free text; a batch comes from one group."""
    from lm_eval.models.utils import normalize_gen_kwargs

    groups, room = defaultdict(list), cfg.seq_len - len(start)
    for i, request in enumerate(requests):
        settings = normalize_gen_kwargs(request.args[1], min(256, cfg.seq_len // 2))
        settings = dict(temperature=0.0, top_p=1.0) | settings | overrides
        new, temperature, top_p = (settings[k] for k in ("max_gen_toks", "temperature", "top_p"))
        if not 0 < new < room:
            fail(f"max_gen_toks={new}: must be below {room}; pass --gen_kwargs max_gen_toks=N")
        if not (temperature >= 0 and 0 < top_p <= 1):
            fail(f"temperature={temperature} must be at least 0, top_p={top_p} in (0, 1]")
        prompt = start + encode(request.args[0])[new - room :]
        groups[len(prompt) + new, temperature, top_p].append((i, prompt, new, settings["until"]))
    return groups


def text_after(prompt, ids, until, tokenizer):
    """The text that ids (L,) continue the prompt with, up to the first end-of-text or stop string.
    The prompt is decoded too, because a decoder drops the space before its first word."""
    ids = ids[len(prompt) :]
    if tokenizer.eos in ids:
        ids = ids[: ids.index(tokenizer.eos)]
    text = tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :]
    for stop in filter(None, until):
        text = text.split(stop)[0]
    return text


def make_adapter(model, cfg, tokenizer, estimator, w, dtype, overrides, writing, **batching):
    """The harness's LM of a checkpoint. estimator: `chain` or `mc`; overrides: temperature, top_p
    that replace the task's; writing: options of `fill`; batching: batch_size and quiet. Under
    torchrun every process runs the harness, on answers of which it computes its share."""
    from lm_eval.api.model import LM

    start = start_ids(tokenizer, cfg)
    batching["device"] = device = next(model.parameters()).device

    def encode(text, inside=False):
        try:
            return tokenizer.encode(text, inside)
        except ValueError as e:
            fail(f"a task's text: {e}")

    class Checkpoint(LM):
        def loglikelihood(self, requests):
            parts = [split_text(encode, *r.args, (r.doc_id or 0,)) for r in requests]
            parts = share(truncate(parts, start, cfg))
            with autocast(device, dtype):
                log_p = estimator(model, cfg, parts, w=w, **batching)
                greedy = is_greedy(model, cfg, parts, w=w, **batching)
            return gather(zip(log_p, greedy))

        def loglikelihood_rolling(self, requests):
            """In disjoint windows, as evaluate.py: each token is counted once."""
            room, windows, counts = cfg.seq_len - len(start), [], []
            for r in share(requests):
                ids = encode(r.args[0])
                parts = [(first, ids[first : first + room]) for first in range(0, len(ids), room)]
                windows += [Request(start, part, (r.doc_id or 0, first)) for first, part in parts]
                counts.append(len(parts))
            with autocast(device, dtype):
                log_p = iter(estimator(model, cfg, windows, w=w, **batching))
            return gather(sum(islice(log_p, count), 0.0) for count in counts)

        def generate_until(self, requests):
            texts, mine = [""] * len(requests), set(share(range(len(requests))))
            groups = group_prompts(requests, encode, start, cfg, overrides)
            size, bar = batching["batch_size"], partial(progress, disable=batching.get("quiet"))
            for (_, temperature, top_p), group in groups.items():
                options = dict(temperature=temperature, top_p=top_p, **writing)
                group = [item for item in group if item[0] in mine]
                for first in bar(range(0, len(group), size), desc="writing"):
                    part = group[first : first + size]
                    x = torch.tensor([prompt + [cfg.mask_id] * new for _, prompt, new, _ in part])
                    x = fill(model, cfg, x.to(device), [i for i, *_ in part], w, dtype, **options)
                    for (i, prompt, _, until), ids in zip(part, x.tolist()):
                        texts[i] = text_after(prompt, ids, until, tokenizer)
            return gather(share(texts))

    return Checkpoint()


@contextmanager
def packages_only():
    """Hide the repository's root from imports: some tasks import the package `evaluate`, and must
    not get our evaluate.py."""
    ours, path, root = sys.modules.pop("evaluate", None), sys.path, Path(__file__).parents[1]
    sys.path = [p for p in path if Path(p).resolve() != root.resolve()]  # Path("") is the cwd
    try:
        yield
    finally:
        sys.path = path
        sys.modules.pop("evaluate", None)
        if ours:
            sys.modules["evaluate"] = ours


def run_tasks(lm, args):
    """The harness's results of --tasks."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager, tasks = TaskManager(include_path=args.include_path), []
    for name in dict.fromkeys(args.tasks):
        try:
            loaded = manager.load(name)
        except Exception as e:  # no such task, no network, a missing package: no common base
            message = str(e.args[0] if e.args else "") or type(e).__name__
            fail(f"--tasks {name}: {message.splitlines()[0]}")
        outermost = list(loaded["groups"].values())[:1]
        tasks += outermost or loaded["tasks"].values()
    return simple_evaluate(
        lm, tasks=tasks, num_fewshot=args.num_fewshot, limit=args.limit, gen_kwargs=args.gen_kwargs,
        task_manager=manager, log_samples=False, bootstrap_iters=1000,
    )  # fmt: skip


def parse_arguments(argv):
    p = parser(__doc__)
    p.add_argument("ckpt")
    p.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="any of lm-eval's")
    estimators = "mc", "chain", *ORDERS
    p.add_argument("--estimator", default="mc", choices=estimators, help="of likelihoods [mc]")
    p.add_argument("--mc", type=int, default=128, help="masked copies of a text [128]")
    p.add_argument("--guidance", type=float, default=0.0, help="w, classifier-free, by the prompt")
    p.add_argument("--limit", type=float, help="documents of a task; below 1: a share of them")
    p.add_argument("--num_fewshot", type=int, help="examples in the prompt [the task's]")
    p.add_argument("--include_path", metavar="DIR", help="a folder with your tasks")
    p.add_argument("--gen_kwargs", metavar="K=V,...", help="free text, e.g. max_gen_toks=64")
    add_sampler_options(p, temperature=None)
    p.set_defaults(top_p=None)  # None: the task's
    p.add_argument("--batch_size", type=int, default=32, help="for memory and speed only")
    p.add_argument("--seed", type=int, default=0)
    add_model_options(p)
    p.add_argument("--json", action="store_true", help="one JSON line on stdout, nothing else")
    args = p.parse_args(argv)
    check_range(args, mc=1, guidance=0, num_fewshot=0, steps=1, temperature=0, batch_size=1, seed=0)
    if args.top_p is not None:
        check_top_p(args)
    if args.limit is not None and not (0 < args.limit and (args.limit < 1 or args.limit % 1 == 0)):
        fail(f"--limit {args.limit}: must be a number of documents, or a share between 0 and 1")
    if args.include_path and not Path(args.include_path).is_dir():
        fail(f"--include_path {args.include_path}: no such folder")
    return args


def evaluate_tasks(args, device):
    """The harness's results with all that they depend on, and the same as text."""
    import lm_eval.utils

    model, cfg = load(args.ckpt, not args.no_ema, device, args.dtype)
    in_order = args.estimator in ORDERS  # then the own options are those of the estimator
    given = read_sampler_options(
        args, args.estimator if in_order else choose_sampler(cfg, args.sampler), cfg
    )
    if cfg.causal and args.guidance:
        fail("--guidance: not for an AR model")
    if cfg.causal and in_order:
        fail(f"--estimator {args.estimator}: an AR model has one order, and is exact without it")
    estimator, kind = chain, "exact" if cfg.causal else "chain rule"
    if in_order:
        order = order_arguments(args.estimator, given)
        estimator, kind = partial(by_order, order=order), describe(order)
    if args.estimator == "mc" and not cfg.causal:
        estimator, kind = partial(mc, samples=args.mc, seed=args.seed), f"bound, {args.mc} samples"

    writing = dict(sampler=args.sampler, steps=args.steps, seed=args.seed)
    overrides = {k: v for k in ("temperature", "top_p") if (v := getattr(args, k)) is not None}
    quiet = args.json or rank_and_world()[0] > 0
    lm = make_adapter(
        model, cfg, tokenizer_of(model.tokenizer), estimator, args.guidance, args.dtype, overrides,
        writing | dict(sampler_options={} if in_order else given),
        batch_size=args.batch_size, quiet=quiet,
    )  # fmt: skip
    with packages_only(), redirect_stdout(sys.stderr):  # the harness prints to stdout
        results = run_tasks(lm, args)

    parts = {k: results[k] for k in ("results", "groups", "versions", "n-shot") if results.get(k)}
    record = parts | {
        "estimator": kind, "guidance": args.guidance, "limit": args.limit, "ckpt": args.ckpt,
        "step": model.step, "ema": not args.no_ema, "dtype": compute_dtype(device, args.dtype),
        "lm_eval": lm_eval.__version__, "gen_kwargs": args.gen_kwargs,
        **writing, **overrides, **given,
    }  # fmt: skip
    make_table = partial(lm_eval.utils.make_table, results)
    tables = [make_table(part) for part in ("results", "groups") if part in parts]
    footer = f"likelihood: {kind}; guidance {args.guidance:g}, seed {args.seed}, {record['dtype']}"
    return record, "\n".join([*tables, footer])


@command
def main(argv=None):
    args = parse_arguments(argv)
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        fail("tasks.harness needs the LM Evaluation Harness: pip install lm_eval==0.4.13")
    with process_group(args):
        record, text = evaluate_tasks(args, local_device(args))
        if rank_and_world()[0] == 0:
            print(to_json(record) if args.json else text)
        return record


if __name__ == "__main__":
    main()
