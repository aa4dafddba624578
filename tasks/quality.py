"""What faster sampling costs: the quality of texts against the network calls that they took, for a sampler of each law.

python -m tasks.quality out/pydocs_mdlm/ckpt.pt --judge out/compare_pydocs_mdlm/ar_1/ckpt.pt --png quality.png
python -m tasks.quality out/owt_mdlm/ckpt.pt --judge gpt2-large --samplers ddpm_cache remdm_cap --steps 128 1024 --top_p 0.9

Quality is two figures: nats per token under the judge, a model of transformers or an AR checkpoint, and the entropy
of the texts' tokens, without which the first means nothing. The first row is the validation text itself.
"""

import math
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import (
    add_model_options,
    check_range,
    check_top_p,
    choose_sampler,
    fail,
    parser,
    pick_device,
)
from data.corpus import folder_of, read_split
from data.tokenizer import tokenizer_of
from model import load
from sample import generate
from samplers import SAMPLERS, STEPLESS, default_options
from tasks.bench import shown
from tasks.compare import pyplot
from tasks.judge import judge_rows, load_judge

VALUES = {  # of the options by which samplers without steps trade quality for calls
    "threshold": (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99),
    "gamma": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
}
SAME_LAW = (
    "ddpm",
    "analytic",
    "euler",
    "ar",
)  # as ddpm_cache, nearly as it, or of another kind of model


def settings(name, steps):
    """What is varied of a sampler: its steps, or without any its own option."""
    if name not in STEPLESS:
        return [dict(steps=n) for n in steps]
    return [
        dict(sampler_options={o: v})
        for o in default_options(SAMPLERS[name])
        for v in VALUES.get(o, ())
    ] or [{}]


def figures(rows, tokenizer, score):
    """Nats per token and entropy of rows of ids, each with its standard error over rows."""
    result = judge_rows(rows, tokenizer, score)
    return dict(
        nats=result["nats"],
        nats_se=result["se"],
        entropy=result["entropy"],
        entropy_se=result["entropy_se"],
    )


def qualities(args):
    """A dict per sampler and setting: its calls per text, that is the forwards of a text's row, and `figures`."""
    device = pick_device(args.device)
    model, cfg = load(args.ckpt, device=device, dtype=args.dtype)
    if cfg.causal:
        fail(f"{args.ckpt}: an AR model writes from left to right, in one way")
    names = args.samplers or [s for s in SAMPLERS if s not in SAME_LAW or s == choose_sampler(cfg)]
    jobs = [
        (name, setting)
        for name in names
        for setting in settings(choose_sampler(cfg, name), args.steps)
    ]
    tokenizer, score, rows, forwards = (
        tokenizer_of(model.tokenizer),
        load_judge(args.judge, device),
        [],
        [0],
    )
    if (folder_of(cfg.data) / "meta.json").exists():
        ids, _ = read_split(cfg.data, "val", cfg)
        starts = np.linspace(0, max(len(ids) - cfg.seq_len, 0), args.num).astype(int)
        real = [ids[i : i + cfg.seq_len].tolist() for i in starts]
        rows.append(
            dict(
                sampler="validation text",
                setting="",
                calls=math.nan,
                **figures(real, tokenizer, score),
            )
        )

    def count(module, inputs, out):
        forwards[0] += len(inputs[0])

    model.register_forward_hook(count)
    for name, setting in tqdm(jobs, unit="setting", leave=False, disable=args.json):
        forwards[0] = 0
        texts = generate(
            model, tokenizer._replace(decode=list), cfg, args.num, batch_size=args.batch_size, sampler=name, seed=args.seed,
            dtype=args.dtype, temperature=args.temperature, top_p=args.top_p, **setting,
        )  # fmt: skip
        varied = " ".join(
            f"{k}={v:g}" for k, v in (setting.get("sampler_options") or setting).items()
        )
        calls = forwards[0] / args.num
        rows.append(
            dict(sampler=name, setting=varied, calls=calls, **figures(texts, tokenizer, score))
        )
    return rows


def plot(rows, path):
    """Over network calls per text: nats per token under the judge, and entropy."""
    if not (plt := pyplot(path)):
        return
    labels = {
        "nats": "nats per token under the judge",
        "entropy": "entropy of a text's tokens, nats",
    }
    _, panels = plt.subplots(1, 2, figsize=(12, 4.8), sharex=True, layout="constrained")
    for panel, (key, label) in zip(panels, labels.items()):
        for name in dict.fromkeys(row["sampler"] for row in rows):
            of = sorted(
                (row for row in rows if row["sampler"] == name), key=lambda row: row["calls"]
            )
            y, error = ([row[k] for row in of] for k in (key, f"{key}_se"))
            if name == "validation text":
                panel.axhline(y[0], color="black", linestyle=":", label=name)
            else:
                panel.errorbar(
                    [row["calls"] for row in of], y, error, label=name, capsize=2, marker="."
                )
        panel.set(xscale="log", xlabel="network calls per text", ylabel=label)
        panel.grid(alpha=0.3, which="both")
    panels[1].legend(fontsize=8, bbox_to_anchor=(1, 1), loc="upper left")
    plt.savefig(path, dpi=150)
    plt.close()


def main(argv=None):
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
    rows = qualities(args)
    print(shown(rows, args.json))
    if args.png:
        plot(rows, args.png)


if __name__ == "__main__":
    main()
