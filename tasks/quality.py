"""What faster sampling costs: the quality of texts against network calls and temperature, for a
sampler of each law.

python -m tasks.quality out/pydocs_mdlm/ckpt.pt --judge out/compare_pydocs_mdlm/ar_1/ckpt.pt
python -m tasks.quality out/pydocs_mdlm/ckpt.pt --judge out/compare_pydocs_mdlm/ar_1/ckpt.pt \\
    --samplers ddpm_cache margin --steps 256 --temperature 0.6 0.8 1 1.2 --png frontier.png
python -m tasks.quality out/owt_mdlm/ckpt.pt --judge gpt2-large --samplers ddpm_cache remdm_cap \\
    --steps 128 1024 --top_p 0.9 --png quality.png

Quality is three figures. Nats per token under the judge, which is a model of transformers or an AR
checkpoint, and the entropy of a text's tokens: repetition lowers both, so nats alone mean nothing.
With several temperatures the plot is one curve per sampler of nats against entropy; compare curves
and not points (arXiv 2604.02718). Both look at one text at a time, so texts that are incoherent or
all alike can pass (arXiv 2606.08417). The third figure cannot be passed that way: the divergence of
the n-grams of all texts from those of as much held-out text, in nats, 0 to log 2.

The first row is validation text, other windows than the held-out ones. The second is a baseline
without parameters or sense, `paste_fragments`: it pleases the judge at the entropy of real text.
"""

import math
from collections import Counter

import numpy as np

from common import check_range, command, fail, parser, pick_device, progress
from data.checkpoints import load
from data.command_line import add_model_options, check_top_p, choose_sampler
from data.corpus import folder_of, read_split
from data.tokenizer import tokenizer_of
from sample import generate
from samplers import SAMPLERS, STEPLESS, default_options
from tasks.judge import judge_rows, load_judge
from tasks.report import check_picture, format_rows, import_pyplot

VALUES = {  # options by which samplers without steps trade quality for calls
    "threshold": (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99),
    "gamma": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    "per_call": (1, 2, 4, 8),
}
SAME_LAW = ("ddpm", "analytic", "euler")  # ddpm_cache's law, or nearly
VALIDATION, PASTED = "validation text", "pasted fragments"


def list_settings(sampler, steps):
    """The settings of a sampler: each number of steps, or each value of its option."""
    if sampler not in STEPLESS:
        insist = dict(sampler_options=dict(lucky=1)) if sampler == "llada" else {}
        return [dict(steps=n, **insist) for n in steps]
    options = default_options(SAMPLERS[sampler])
    settings = [{option: value} for option in options for value in VALUES.get(option, ())]
    return [dict(sampler_options=setting) for setting in settings] or [{}]


def read_rows(cfg, split, num):
    """`num` evenly spaced rows of a split; none if its data is not on this machine."""
    if not (folder_of(cfg.data) / "meta.json").exists():
        return []
    ids, _ = read_split(cfg.data, split, cfg)
    starts = np.linspace(0, max(len(ids) - cfg.seq_len, 0), num).astype(int)
    return [ids[start : start + cfg.seq_len].tolist() for start in starts]


def paste_fragments(ids, L, num, seed, size=8, bank=64):
    """`num` texts of L tokens, pasted at random from the `bank` most frequent fragments of `size`
    different tokens in ids: each is predictable within its fragments, and no text makes sense."""
    windows = np.lib.stride_tricks.sliding_window_view(ids[: 2**22], size)  # enough, and it fits
    windows = windows[(np.diff(np.sort(windows, -1), axis=-1) > 0).all(-1)]
    if not len(windows):
        return []
    fragments, counts = np.unique(windows, axis=0, return_counts=True)
    fragments = fragments[np.argsort(-counts, kind="stable")[:bank]]
    drawn = np.random.default_rng(seed).integers(len(fragments), size=(num, -(-L // size)))
    return fragments[drawn].reshape(num, -1)[:, :L].tolist()


def count_ngrams(rows, n):
    """[{n-gram: count} of each row]."""
    return [Counter(zip(*(row[i:] for i in range(n)))) for row in rows]


def divergence(a, b):
    """Jensen-Shannon divergence in nats of the n-grams of two lists of `count_ngrams`."""
    a, b = sum(a, Counter()), sum(b, Counter())
    p, q = (np.array([c[key] for key in a | b]) / c.total() for c in (a, b))
    middle = (p + q) / 2
    return sum(float(xlogy(r, r / middle).sum()) / 2 for r in (p, q))


def xlogy(x, y):
    return x * np.log(np.where(x > 0, y, 1))


def make_row(sampler, setting, calls, texts, tokenizer, score, held_out, n, temperature=math.nan):
    """A row of the output for texts (lists of ids), with standard errors over texts; that of the
    divergence by the jackknife."""
    result = judge_rows(texts, tokenizer, score)
    figures = dict(nats=result["nats"], nats_se=result["se"])
    figures |= {key: result[key] for key in ("entropy", "entropy_se")}
    if held_out:
        counts, theirs = count_ngrams(texts, n), count_ngrams(held_out, n)
        parts = [divergence(counts[:i] + counts[i + 1 :], theirs) for i in range(len(counts))]
        se = np.std(parts) * (len(parts) - 1) ** 0.5
        figures |= dict(divergence=divergence(counts, theirs), divergence_se=float(se))
    where = dict(sampler=sampler, setting=setting, temperature=temperature)
    return where | dict(calls=calls) | figures


def measure(args):
    """A row for each sampler and setting. `calls` are the network calls per text: how often a
    text's row passes the network."""
    device = pick_device(args.device)
    model, cfg = load(args.ckpt, not args.no_ema, device, args.dtype)
    if cfg.causal:
        fail(f"{args.ckpt}: an AR model has one sampler, from left to right")
    names = args.samplers or [s for s in SAMPLERS if s not in SAME_LAW or s == choose_sampler(cfg)]
    jobs = [
        (s, setting, temperature)
        for s in names
        for setting in list_settings(s, args.steps)
        for temperature in args.temperature
    ]
    real = read_rows(cfg, "val", 2 * args.num)
    tokenizer = tokenizer_of(model.tokenizer)
    figures = tokenizer, load_judge(args.judge, device), real[1::2], args.n
    rows, forwards = [], 0
    if real:
        rows.append(make_row(VALIDATION, "", math.nan, real[::2], *figures))
        ids, _ = read_split(cfg.data, "train", cfg)
        pasted = paste_fragments(ids, cfg.seq_len, args.num, args.seed)
        rows.append(make_row(PASTED, "", 0.0, pasted, *figures))

    def count_rows(module, inputs, output):
        nonlocal forwards
        forwards += len(inputs[0])

    model.register_forward_hook(count_rows)
    options = dict(
        num=args.num, batch_size=args.batch_size, seed=args.seed, dtype=args.dtype,
        top_p=args.top_p,
    )  # fmt: skip
    ids_only = tokenizer._replace(decode=list)  # generate then returns ids
    for name, setting, temperature in progress(jobs, unit="setting", disable=args.json):
        forwards, law = 0, dict(sampler=name, temperature=temperature, **setting)
        texts = generate(model, ids_only, cfg, **options, **law)
        varied = setting if "steps" in setting else setting.get("sampler_options", {})
        label = " ".join(f"{k}={v:g}" for k, v in varied.items() if k != "sampler_options")
        rows.append(make_row(name, label, forwards / args.num, texts, *figures, temperature))
    return rows


LABELS = {
    "calls": "network calls per text",
    "nats": "nats per token under the judge",
    "entropy": "entropy of a text's tokens, nats",
    "divergence": "divergence from held-out n-grams, nats",
}


def plot(rows, path):
    """The figures over network calls per text; with several temperatures, nats and divergence over
    entropy, one curve through the temperatures of each sampler and setting."""
    if not (plt := import_pyplot(path)):
        return
    sweeps = len({row["temperature"] for row in rows if row["sampler"] in SAMPLERS}) > 1
    across, order = ("entropy", "temperature") if sweeps else ("calls", "calls")
    down = [key for key in ("nats", "entropy", "divergence") if key in rows[0] and key != across]
    _, panels = plt.subplots(1, len(down), figsize=(6 * len(down), 4.8), layout="constrained")
    label_of = lambda row: f"{row['sampler']} {row['setting']}" if sweeps else row["sampler"]
    for panel, key in zip(panels, down):
        for name in dict.fromkeys(map(label_of, rows)):
            same = sorted((row for row in rows if label_of(row) == name), key=lambda r: r[order])
            x, y, error = ([row[k] for row in same] for k in (across, key, f"{key}_se"))
            if same[0]["sampler"] not in SAMPLERS and not sweeps:
                style = dict(color="black", linestyle=":" if name == VALIDATION else "--")
                panel.axhline(y[0], label=name, **style)
            else:
                panel.errorbar(x, y, error, label=name, capsize=2, marker=".")
        panel.set(xscale="linear" if sweeps else "log", xlabel=LABELS[across], ylabel=LABELS[key])
        panel.grid(alpha=0.3, which="both")
    panels[-1].legend(fontsize=8, bbox_to_anchor=(1, 1), loc="upper left")
    plt.savefig(path, dpi=150)
    plt.close()


def parse_arguments(argv):
    p = parser(__doc__)
    p.add_argument("ckpt")
    p.add_argument("--judge", required=True, help="a model of transformers or an AR checkpoint")
    p.add_argument("--samplers", nargs="+", choices=SAMPLERS, help="default: one of each law")
    p.add_argument("--steps", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512])
    p.add_argument("--num", type=int, default=64, help="texts of each setting")
    p.add_argument("--temperature", type=float, nargs="+", default=[1.0], help="or several")
    p.add_argument("--n", type=int, default=2, help="of the n-grams of the divergence")
    p.add_argument("--top_p", type=float, default=1.0)
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--png", help="the plot")
    add_model_options(p)
    p.add_argument("--json", action="store_true", help="one JSON line per row instead of the table")
    args = p.parse_args(argv)
    check_range(args, steps=1, num=2, n=1, batch_size=1, temperature=0, seed=0)
    check_top_p(args)
    check_picture("--png", args.png)
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
