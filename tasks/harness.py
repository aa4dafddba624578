"""Tasks of the LM Evaluation Harness for a checkpoint: likelihoods by Monte Carlo or by the chain rule, greedy answers
and free text, all batched across requests. Needs: pip install lm_eval==0.4.13

python -m tasks.harness out/owt_mdlm/ckpt.pt --tasks lambada_standard hellaswag --limit 200
python -m tasks.harness smdm_1028.pt --tasks openbookqa --estimator chain --guidance 1.6 --json
python -m tasks.harness out/pydocs_mdlm/ckpt.pt --tasks my_task --include_path my_tasks   # a folder of yaml files
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
from tqdm import tqdm

from common import (
    add_model_options,
    autocast,
    check_range,
    choose_sampler,
    compute_dtype,
    fail,
    parser,
    pick_device,
    to_json,
)
from data.tokenizer import tokenizer_of
from diffusion import denoiser, mask_exactly, scatter, time_at
from model import load
from sample import frames, start_ids
from samplers import SAMPLERS, with_guidance

# ---------------------------------------------------------------------------------------------------------
# What is asked, in batches of rows of one length: padding would be text to a network that looks both ways


class Request(NamedTuple):
    prefix: list  # given ids
    target: list  # ids whose probability is asked
    noise: tuple = (0,)  # requests that agree in this get the same random numbers


def split(encode, context, continuation, noise=(0,)):
    """The Request of a text in two parts, by the harness's rules: spaces that end the context belong to the
    continuation, whose tokens are those by which the whole text has more than the context."""
    stem = context.rstrip()
    text = context[len(stem) :] + continuation
    prefix = encode(stem)
    target = encode(stem + text)[len(prefix) :]
    return Request(
        prefix, target or encode(text, inside=True), noise
    )  # none: one piece spans both parts


def fit(requests, start, cfg):
    """Requests that begin with `start` and have at most seq_len tokens: what is too much is cut off on the left."""
    room = cfg.seq_len - len(start)
    if long := sum(len(r.prefix + r.target) > room for r in requests):
        sys.stderr.write(
            f"note: {long} of {len(requests)} texts cut on the left to {cfg.seq_len} tokens\n"
        )
    cut = lambda r: (r.prefix + r.target)[-room:][: -len(r.target) or None]
    return [Request(start + cut(r), r.target[-room:], r.noise) for r in requests]


def batches(requests, rows, batch_size=32, device="cpu", quiet=True):
    """Request i takes rows[i] rows. Yield which (B,) request a row is of, k (B,) its number there, x0 (B, L) ids, and
    j (B, L) each position's place in the target, below zero in the prefix; the longest texts first."""
    size = [len(r.prefix + r.target) for r in requests]
    with tqdm(total=sum(rows), disable=quiet, unit="row", leave=False) as bar:
        for L in sorted(set(size), reverse=True):
            same = ((i, k) for i in range(len(size)) if size[i] == L for k in range(rows[i]))
            while batch := list(islice(same, batch_size)):
                which, k = torch.tensor(batch, device=device).T
                x0 = torch.tensor(
                    [requests[i].prefix + requests[i].target for i, _ in batch], device=device
                )
                first = torch.tensor([[len(requests[i].prefix)] for i, _ in batch], device=device)
                yield which, k, x0, torch.arange(L, device=device) - first
                bar.update(len(batch))


# ---------------------------------------------------------------------------------------------------------
# Estimators of log p(target | prefix): (model, cfg, requests, w, **how to batch) -> N floats. With guidance, w > 0,
# the conditionals are the guided ones, and so is the p that they define.


def answers(model, cfg, given, w):
    """denoise(x, t, at) to judge by: SEDD's scores, and what a D3PM leaves for other tokens than MASK, sum to one."""
    denoise = denoiser(model, cfg)
    if w:
        denoise = with_guidance(denoise, given, w, cfg)
    return lambda x, t, at: F.log_softmax(denoise(x, t, at), -1)


def summed(canvas, rows, model, cfg, requests, w, **how):
    """Every request's sum over its rows of weight x log p(x0 | x) where asked, with canvas(which, k, x0, j) ->
    x (B, L), t (B,), at (B, L), weight (B,)."""
    total = torch.zeros(len(requests), dtype=torch.float64)
    for which, k, x0, j in batches(requests, rows, **how):
        x, t, at, weight = canvas(which, k, x0, j)
        log_p = answers(model, cfg, j < 0, w)(x, t, at).gather(-1, x0[at][:, None])[:, 0]
        total.index_add_(0, which.cpu(), (weight * scatter(log_p.double(), at).sum(-1)).cpu())
    return total.tolist()


def chain(model, cfg, requests, w=0.0, **how):
    """The chain rule from left to right, with what is not read yet masked: exactly the law of the sampler `ar`. A
    row per token of the target, with the head at one position; a causal network needs one row for all of them."""

    def canvas(which, k, x0, j):
        if cfg.causal:
            return x0, torch.zeros_like(k), j >= 0, torch.ones_like(k)
        unread = j >= k[:, None]
        t = time_at(cfg.schedule, unread.double().mean(-1))
        return x0.masked_fill(unread, cfg.mask_id), t, j == k[:, None], torch.ones_like(k)

    rows = [min(len(r.target), 1) if cfg.causal else len(r.target) for r in requests]
    return summed(canvas, rows, model, cfg, requests, w, **how)


def noise(request, k, seed):
    """Uniforms of sample k: one for the number of masks, then one per token of the target. They depend on nothing
    else, so that the options of a question are compared under the same masks, whatever their lengths."""
    return torch.from_numpy(
        np.random.default_rng([seed, *request.noise, k]).random(1 + len(request.target))
    )


def mc(model, cfg, requests, w=0.0, samples=128, seed=0, **how):
    """An unbiased estimate of a lower bound: what diffusing the target alone costs. As in `exact_count_bound`, of n
    tokens exactly l are masked and weighed by n / l; l is stratified over the samples."""

    def canvas(which, k, x0, j):
        draws = [
            noise(requests[i], s, seed).to(x0.device) for i, s in zip(which.tolist(), k.tolist())
        ]
        u = torch.stack([F.pad(draw[1:], (x0.shape[1] - len(draw) + 1, 0)) for draw in draws])
        n = (j >= 0).sum(-1)
        count = torch.floor(n * (k + torch.stack([draw[0] for draw in draws])) / samples).long() + 1
        x, fraction = mask_exactly(x0, torch.minimum(count, n), j >= 0, cfg.mask_id, u)
        return x, time_at(cfg.schedule, fraction), x == cfg.mask_id, n / count / samples

    rows = [samples * min(len(r.target), 1) for r in requests]
    return summed(canvas, rows, model, cfg, requests, w, **how)


# ---------------------------------------------------------------------------------------------------------
# Greedy answers and free text


def commit(denoise, x, total, cfg):
    """x (B, L) with one mask of every row replaced by its likeliest token: where the network is surest, or, if it is
    causal, the next. total (B,): the masks that there were at first."""
    masked = x == cfg.mask_id
    asked = masked & (masked.cumsum(-1) == 1) if cfg.causal else masked
    best, token = denoise(x, time_at(cfg.schedule, masked.sum(-1) / total), asked).max(-1)
    surest = scatter(best, asked).masked_fill(~asked, -math.inf).argmax(-1, keepdim=True)
    now = asked & (torch.arange(x.shape[1], device=x.device) == surest)
    return torch.where(now, x.masked_scatter(asked, token), x)


def is_greedy(model, cfg, requests, w=0.0, **how):
    """Whether greedy decoding, told the target's length, writes the target: N bools. A row leaves its batch at its
    first wrong token."""
    right = [True] * len(requests)
    for which, _, x0, j in batches(requests, [min(len(r.target), 1) for r in requests], **how):
        x, total = x0.masked_fill(j >= 0, cfg.mask_id), (j >= 0).sum(-1)
        while len(x):
            x = commit(answers(model, cfg, j < 0, w), x, total, cfg)
            masked = x == cfg.mask_id
            wrong = ((x != x0) & ~masked).any(-1)
            for i in which[wrong].tolist():
                right[i] = False
            on = masked.any(-1) & ~wrong
            which, x0, j, total, x = (a[on] for a in (which, x0, j, total, x))
    return right


def write(
    model, cfg, x, rows, w=0.0, temperature=0.0, top_p=1.0, dtype="float32", sampler=None, steps=1000, seed=0
):  # fmt: skip
    """Fill canvases x (B, L): as sample.py does, where row number rows[i] has random numbers of its own, or, with no
    temperature and no sampler, greedily."""
    if temperature or sampler or cfg.causal:
        name = choose_sampler(cfg, sampler)
        xs = frames(model, cfg, x, rows, steps, name, w, temperature, top_p, seed=seed, dtype=dtype)
        return deque(xs, maxlen=1).pop()
    given = x != cfg.mask_id
    total = (~given).sum(-1)
    with autocast(x.device, dtype):
        for _ in range(int(total.max())):
            x = commit(answers(model, cfg, given, w), x, total, cfg)
    return x


# ---------------------------------------------------------------------------------------------------------
# The harness's side


def adapter(model, cfg, tokenizer, estimator, w=0.0, dtype="float32", writing=None, **how):
    """A checkpoint as the harness's LM. estimator: `chain`, or `mc` with its options; writing: sampler, steps and
    seed of `write`; how: batch_size and quiet of `batches`."""
    from lm_eval.api.model import LM
    from lm_eval.models.utils import normalize_gen_kwargs

    start = start_ids(tokenizer, cfg)
    how["device"] = device = next(model.parameters()).device

    def encode(text, inside=False):
        try:
            return tokenizer.encode(text, inside)
        except ValueError as e:
            fail(f"a task's text: {e}")

    def continuation(prompt, ids, until):
        """What ids (L,) say after the prompt, up to the first end-of-text or stop string."""
        end = (
            ids.index(tokenizer.eos, len(prompt))
            if tokenizer.eos in ids[len(prompt) :]
            else len(ids)
        )
        text = tokenizer.decode(ids[:end])[
            len(tokenizer.decode(prompt)) :
        ]  # a first space is no prefix here
        for stop in filter(None, until):
            text = text.split(stop)[0]
        return text

    class Checkpoint(LM):
        def loglikelihood(self, requests):
            asked = fit([split(encode, *r.args, (r.doc_id or 0,)) for r in requests], start, cfg)
            with autocast(device, dtype):
                log_p = estimator(model, cfg, asked, w=w, **how)
                return list(zip(log_p, is_greedy(model, cfg, asked, w=w, **how)))

        def loglikelihood_rolling(self, requests):
            """In windows, as evaluate.py: none sees another, and no token is counted twice."""
            room, windows, total = cfg.seq_len - len(start), [], [0.0] * len(requests)
            for i, r in enumerate(requests):
                ids = encode(r.args[0])
                parts = [(a, ids[a : a + room]) for a in range(0, len(ids), room)]
                windows += [(i, Request(start, part, (r.doc_id or 0, a))) for a, part in parts]
            with autocast(device, dtype):
                log_p = estimator(model, cfg, [window for _, window in windows], w=w, **how)
            for (i, _), value in zip(windows, log_p):
                total[i] += value
            return total

        def generate_until(self, requests):
            texts, groups, room = [""] * len(requests), defaultdict(list), cfg.seq_len - len(start)
            for i, r in enumerate(requests):
                settings = normalize_gen_kwargs(r.args[1], min(256, cfg.seq_len // 2))
                new = settings["max_gen_toks"]
                if not 0 < new < room:
                    fail(
                        f"max_gen_toks={new}: must be below {room}; set it with --gen_kwargs max_gen_toks=N"
                    )
                prompt = start + encode(r.args[0])[new - room :]
                law = settings.get("temperature", 0.0), settings.get("top_p", 1.0)
                groups[len(prompt) + new, law].append((i, prompt, new, settings["until"]))
            for (_, law), group in groups.items():
                group = iter(group)
                while part := list(islice(group, how.get("batch_size", 32))):
                    x = torch.tensor([prompt + [cfg.mask_id] * new for _, prompt, new, _ in part])
                    x = write(
                        model,
                        cfg,
                        x.to(device),
                        [i for i, *_ in part],
                        w,
                        *law,
                        dtype,
                        **writing or {},
                    )
                    for (i, prompt, _, until), ids in zip(part, x.tolist()):
                        texts[i] = continuation(prompt, ids, until)
            return texts

    return Checkpoint()


@contextmanager
def packages_only():
    """For tasks, some of which import the package `evaluate`: it must not be our evaluate.py that they get."""
    ours, path = sys.modules.pop("evaluate", None), sys.path
    sys.path = [p for p in path if Path(p).resolve() != Path(__file__).resolve().parents[1]]
    try:
        yield
    finally:
        sys.path = path
        sys.modules.pop("evaluate", None)
        if ours:
            sys.modules["evaluate"] = ours


def run(lm, args):
    """The harness's results of --tasks."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager, tasks = TaskManager(include_path=args.include_path), []
    for name in dict.fromkeys(args.tasks):
        try:
            loaded = manager.load(name)
        except (
            Exception
        ) as e:  # no such task, no network, a missing package: each has types of its own
            fail(
                f"--tasks {name}: {(str(e.args[0] if e.args else '') or type(e).__name__).splitlines()[0]}"
            )
        tasks += (
            list(loaded["groups"].values())[:1] or loaded["tasks"].values()
        )  # a group comes first
    return simple_evaluate(
        lm, tasks=tasks, num_fewshot=args.num_fewshot, limit=args.limit, gen_kwargs=args.gen_kwargs,
        task_manager=manager, log_samples=False, bootstrap_iters=1000,
    )  # fmt: skip


def main(argv=None):
    p = parser(__doc__)
    p.add_argument("ckpt")
    p.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="any of lm-eval's")
    p.add_argument(
        "--estimator", default="mc", choices=("mc", "chain"), help="[mc]; an AR model's is exact"
    )
    p.add_argument("--mc", type=int, default=128, help="masked copies of a text [128]")
    p.add_argument(
        "--guidance", type=float, default=0.0, help="w of classifier-free guidance by the prompt"
    )
    p.add_argument("--limit", type=float, help="documents of a task; below 1: a share of them")
    p.add_argument("--num_fewshot", type=int, help="examples in the prompt [the task's]")
    p.add_argument("--include_path", metavar="DIR", help="a folder with tasks of your own")
    p.add_argument(
        "--gen_kwargs", help="for free text, e.g. max_gen_toks=64,temperature=0.7,top_p=0.9"
    )
    p.add_argument("--sampler", choices=SAMPLERS, help="for free text [greedy: surest first]")
    p.add_argument("--steps", type=int, default=1000, help="of the sampler [1000]")
    p.add_argument(
        "--batch_size", type=int, default=32, help="changes memory and speed, not the results"
    )
    p.add_argument("--seed", type=int, default=0)
    add_model_options(p)
    p.add_argument("--json", action="store_true", help="one JSON line on stdout, nothing else")
    args = p.parse_args(argv)
    check_range(args, mc=1, guidance=0, num_fewshot=0, steps=1, batch_size=1, seed=0)
    if args.limit is not None and not (
        0 < args.limit < 1 or args.limit >= 1 and args.limit % 1 == 0
    ):
        fail(
            f"--limit {args.limit}: must be a number of documents, or a share of them between 0 and 1"
        )
    if args.include_path and not Path(args.include_path).is_dir():
        fail(f"--include_path {args.include_path}: no such folder")

    try:
        import lm_eval
    except ImportError:
        fail("tasks.harness needs the LM Evaluation Harness: pip install lm_eval==0.4.13")
    from lm_eval.utils import make_table

    device = pick_device(args.device)
    model, cfg = load(args.ckpt, not args.no_ema, device, args.dtype)
    choose_sampler(cfg, args.sampler)
    if cfg.causal and args.guidance:
        fail("--guidance: not for an AR model")
    estimator, kind = chain, "exact" if cfg.causal else "chain rule"
    if args.estimator == "mc" and not cfg.causal:
        estimator, kind = partial(mc, samples=args.mc, seed=args.seed), f"bound, {args.mc} samples"
    writing = dict(sampler=args.sampler, steps=args.steps, seed=args.seed)
    how = dict(batch_size=args.batch_size, quiet=args.json)
    tokenizer = tokenizer_of(model.tokenizer)
    lm = adapter(model, cfg, tokenizer, estimator, args.guidance, args.dtype, writing, **how)
    with packages_only(), redirect_stdout(sys.stderr):  # the harness prints here and there
        results = run(lm, args)
    record = {
        key: results[key] for key in ("results", "groups", "versions", "n-shot") if results.get(key)
    }
    record |= {
        "estimator": kind, "guidance": args.guidance, "limit": args.limit, "ckpt": args.ckpt, "step": model.step,
        "ema": not args.no_ema, "dtype": compute_dtype(device, args.dtype),
        "lm_eval": lm_eval.__version__, "gen_kwargs": args.gen_kwargs, **writing,
    }  # fmt: skip
    if args.json:
        print(to_json(record))
    else:
        print(
            *(make_table(results, part) for part in ("results", "groups") if results.get(part)),
            sep="\n",
        )
        print(
            f"likelihood: {kind}; guidance {args.guidance:g}, seed {args.seed}, {record['dtype']}"
        )
    return record


if __name__ == "__main__":
    main()
