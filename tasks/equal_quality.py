"""Seconds at equal quality: an AR model with its cache of keys and values against an MDM, whose
quality depends on its steps (SMDM, arXiv 2410.18514: an MDM is 1.4 times as fast as an AR model).

python -m tasks.equal_quality out/owt_ar/ckpt.pt out/owt_mdlm/ckpt.pt --judge gpt2-large
python -m tasks.equal_quality AR MDM --judge JUDGE --steps 16 32 64 128 --batch_size 1 --num 64

A row for the AR model and one for each number of steps: seconds per text, nats per token under the
judge, entropy of a text's tokens. The last line says how many seconds the MDM takes where its nats
are those of the AR model, by interpolation over log seconds. Repetition lowers nats and entropy
alike, so such a point means something only where the entropies are near each other, too.
"""

import math
import time
from types import SimpleNamespace

from common import check_range, command, fail, parser, pick_device, progress
from data.checkpoints import load
from data.command_line import add_model_options, check_top_p, choose_sampler
from data.tokenizer import tokenizer_of
from sample import generate
from samplers import SAMPLERS, STEPLESS
from tasks.judge import judge_rows, load_judge
from tasks.report import format_rows


def load_pair(args, device):
    """(AR model, MDM), each with its cfg, of the same tokenizer and length."""
    pair = []
    for path, causal in ((args.ar, True), (args.mdm, False)):
        model, cfg = load(path, not args.no_ema, device, args.dtype)
        if cfg.causal != causal:
            fail(f"{path}: must be {'an AR model' if causal else 'no AR model'}: the first is AR")
        pair.append(SimpleNamespace(path=path, model=model, cfg=cfg))
    ar, mdm = pair
    if ar.model.tokenizer != mdm.model.tokenizer or ar.cfg.seq_len != mdm.cfg.seq_len:
        fail(f"{args.mdm}: must have the tokenizer and the length of {args.ar}")
    return pair


def measure(net, score, args, sampler, steps):
    """A row: seconds per text of generating, without judging; the first batch warms up."""
    tokenizer = tokenizer_of(net.model.tokenizer)._replace(decode=list)  # generate returns ids
    options = dict(steps=steps, sampler=sampler, batch_size=args.batch_size, dtype=args.dtype,
                   temperature=args.temperature, top_p=args.top_p, seed=args.seed)  # fmt: skip
    generate(net.model, tokenizer, net.cfg, args.batch_size, **options)
    start = time.perf_counter()
    rows = generate(net.model, tokenizer, net.cfg, args.num, **options)
    seconds = (time.perf_counter() - start) / args.num
    result = judge_rows(rows, tokenizer_of(net.model.tokenizer), score)
    figures = {k: result[k] for k in ("nats", "entropy", "entropy_se")} | dict(nats_se=result["se"])
    order = "nats", "nats_se", "entropy", "entropy_se"
    return dict(model=net.path, sampler=sampler, steps=steps, seconds=seconds) | {
        key: figures[key] for key in order
    }


def seconds_at(nats, rows):
    """The seconds at which rows of (seconds, nats) reach `nats`, interpolated over log seconds
    between the first two neighbours that enclose it; None if none do."""
    rows = sorted(rows)
    for (s0, n0), (s1, n1) in zip(rows, rows[1:]):
        if min(n0, n1) <= nats <= max(n0, n1) and n0 != n1:
            return math.exp(math.log(s0) + (nats - n0) / (n1 - n0) * math.log(s1 / s0))
    return None


def conclude(ar, mdm):
    """The last line, from the AR model's row and the MDM's rows."""
    seconds = seconds_at(ar["nats"], [(row["seconds"], row["nats"]) for row in mdm])
    if seconds is None:
        best = min(mdm, key=lambda row: abs(row["nats"] - ar["nats"]))
        return f"no setting reaches {ar['nats']:.3f} nats; the nearest has {best['nats']:.3f}"
    ratio = ar["seconds"] / seconds
    word = f"{ratio:.2f} times as fast as" if ratio >= 1 else f"{1 / ratio:.2f} times as slow as"
    return f"at {ar['nats']:.3f} nats the MDM takes {seconds:.3g} s a text: {word} the AR model"


def parse_arguments(argv):
    p = parser(__doc__)
    p.add_argument("ar", help="checkpoint of an AR model")
    p.add_argument("mdm", help="checkpoint of a masked diffusion model")
    p.add_argument("--judge", required=True, help="a model of transformers or an AR checkpoint")
    p.add_argument(
        "--sampler", choices=[s for s in SAMPLERS if s not in (*STEPLESS, "llada")], help="MDM's"
    )
    p.add_argument("--steps", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256])
    p.add_argument("--num", type=int, default=32, help="texts of each row")
    p.add_argument("--temperature", type=float, default=1.0)
    p.add_argument("--top_p", type=float, default=1.0)
    p.add_argument("--batch_size", type=int, default=8, help="texts at once, of both")
    p.add_argument("--seed", type=int, default=0)
    add_model_options(p)
    p.add_argument("--json", action="store_true", help="one JSON line per row instead of the table")
    args = p.parse_args(argv)
    check_range(args, steps=1, num=2, batch_size=1, temperature=0, seed=0)
    check_top_p(args)
    return args


@command
def main(argv=None):
    args = parse_arguments(argv)
    device = pick_device(args.device)
    ar, mdm = load_pair(args, device)
    score, sampler = load_judge(args.judge, device), choose_sampler(mdm.cfg, args.sampler)
    rows = [measure(ar, score, args, "ar", None)]
    for steps in progress(args.steps, unit="setting"):
        rows.append(measure(mdm, score, args, sampler, steps))
    print(format_rows(rows, args.json))
    if not args.json:
        print(conclude(rows[0], rows[1:]))
    return rows


if __name__ == "__main__":
    main()
