"""What faster sampling costs: the quality of texts against network calls, for a sampler of each
law.

python -m tasks.quality out/pydocs_mdlm/ckpt.pt --judge out/compare_pydocs_mdlm/ar_1/ckpt.pt
python -m tasks.quality out/owt_mdlm/ckpt.pt --judge gpt2-large --samplers ddpm_cache remdm_cap \\
    --steps 128 1024 --top_p 0.9 --png quality.png

Quality is two figures: nats per token under the judge, which is a model of transformers or an AR
checkpoint, and the entropy of a text's tokens. Repetition lowers both, so nats alone mean nothing.
The first row is the validation text.
"""

import math
from pathlib import Path

import numpy as np

from common import (
    add_model_options,
    check_range,
    check_top_p,
    choose_sampler,
    command,
    fail,
    parser,
    pick_device,
    progress,
)
from data.checkpoints import load
from data.corpus import folder_of, read_split
from data.tokenizer import tokenizer_of
from sample import generate
from samplers import SAMPLERS, STEPLESS, default_options
from tasks.judge import judge_rows, load_judge
from tasks.report import format_rows, import_pyplot

VALUES = {  # options by which samplers without steps trade quality for calls
    "threshold": (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99),
    "gamma": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
}
SAME_LAW = ("ddpm", "analytic", "euler", "ar")  # ddpm_cache's law, nearly it, or for AR models only
VALIDATION = "validation text"


def list_settings(sampler, steps):
    """The settings of a sampler: each number of steps, or each value of its option."""
    if sampler not in STEPLESS:
        return [dict(steps=n) for n in steps]
    options = default_options(SAMPLERS[sampler])
    settings = [{option: value} for option in options for value in VALUES.get(option, ())]
    return [dict(sampler_options=setting) for setting in settings] or [{}]


def read_validation_rows(cfg, num):
    """`num` evenly spaced rows of the validation text; none if its data is not on this machine."""
    if not (folder_of(cfg.data) / "meta.json").exists():
        return []
    ids, _ = read_split(cfg.data, "val", cfg)
    starts = np.linspace(0, max(len(ids) - cfg.seq_len, 0), num).astype(int)
    return [ids[start : start + cfg.seq_len].tolist() for start in starts]


def make_row(sampler, setting, calls, texts, tokenizer, score):
    """A row of the output for texts (lists of ids), with standard errors over texts."""
    result = judge_rows(texts, tokenizer, score)
    figures = dict(nats=result["nats"], nats_se=result["se"])
    figures |= {key: result[key] for key in ("entropy", "entropy_se")}
    return dict(sampler=sampler, setting=setting, calls=calls, **figures)


def measure(args):
    """A row for each sampler and setting. `calls` are the network calls per text: how often a
    text's row passes the network."""
    device = pick_device(args.device)
    model, cfg = load(args.ckpt, not args.no_ema, device, args.dtype)
    if cfg.causal:
        fail(f"{args.ckpt}: an AR model has one sampler, from left to right")
    names = args.samplers or [s for s in SAMPLERS if s not in SAME_LAW or s == choose_sampler(cfg)]
    jobs = [(s, setting) for s in names for setting in list_settings(s, args.steps)]
    tokenizer, score = tokenizer_of(model.tokenizer), load_judge(args.judge, device)
    rows, forwards = [], 0
    if real := read_validation_rows(cfg, args.num):
        rows.append(make_row(VALIDATION, "", math.nan, real, tokenizer, score))

    def count_rows(module, inputs, output):
        nonlocal forwards
        forwards += len(inputs[0])

    model.register_forward_hook(count_rows)
    options = dict(
        num=args.num, batch_size=args.batch_size, seed=args.seed, dtype=args.dtype,
        temperature=args.temperature, top_p=args.top_p,
    )  # fmt: skip
    ids_only = tokenizer._replace(decode=list)  # generate then returns ids
    for name, setting in progress(jobs, unit="setting", disable=args.json):
        forwards = 0
        texts = generate(model, ids_only, cfg, sampler=name, **options, **setting)
        varied = setting.get("sampler_options") or setting
        label = " ".join(f"{key}={value:g}" for key, value in varied.items())
        rows.append(make_row(name, label, forwards / args.num, texts, tokenizer, score))
    return rows


def plot(rows, path):
    """Nats per token under the judge, and entropy, over network calls per text."""
    if not (plt := import_pyplot(path)):
        return
    labels = {"nats": "nats per token under the judge"}
    labels["entropy"] = "entropy of a text's tokens, nats"
    _, panels = plt.subplots(1, 2, figsize=(12, 4.8), sharex=True, layout="constrained")
    for panel, (key, label) in zip(panels, labels.items()):
        for name in dict.fromkeys(row["sampler"] for row in rows):
            same = [row for row in rows if row["sampler"] == name]
            same.sort(key=lambda row: row["calls"])
            x, y, error = ([row[k] for row in same] for k in ("calls", key, f"{key}_se"))
            if name == VALIDATION:
                panel.axhline(y[0], color="black", linestyle=":", label=name)
            else:
                panel.errorbar(x, y, error, label=name, capsize=2, marker=".")
        panel.set(xscale="log", xlabel="network calls per text", ylabel=label)
        panel.grid(alpha=0.3, which="both")
    panels[1].legend(fontsize=8, bbox_to_anchor=(1, 1), loc="upper left")
    plt.savefig(path, dpi=150)
    plt.close()


def parse_arguments(argv):
    p = parser(__doc__)
    p.add_argument("ckpt")
    p.add_argument("--judge", required=True, help="a model of transformers or an AR checkpoint")
    p.add_argument("--samplers", nargs="+", choices=SAMPLERS, help="default: one of each law")
    p.add_argument("--steps", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512])
    p.add_argument("--num", type=int, default=64, help="texts of each setting")
    p.add_argument("--temperature", type=float, default=1.0)
    p.add_argument("--top_p", type=float, default=1.0)
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--png", help="the plot")
    add_model_options(p)
    p.add_argument("--json", action="store_true", help="one JSON line per row instead of the table")
    args = p.parse_args(argv)
    check_range(args, steps=1, num=2, batch_size=1, temperature=0, seed=0)
    check_top_p(args)
    if args.png and not Path(args.png).absolute().parent.is_dir():
        fail(f"--png {args.png}: no such folder")
    return args


@command
def main(argv=None):
    args = parse_arguments(argv)
    rows = measure(args)
    print(format_rows(rows, args.json))
    if args.png:
        plot(rows, args.png)


if __name__ == "__main__":
    main()
