"""Pictures of runs: how training went, and at which noise a model's loss is made.

python -m tasks.plot out/pydocs_mdlm                      # out/pydocs_mdlm/curves.svg
python -m tasks.plot out/A out/B --out both.png           # two runs in one picture
python -m tasks.plot out/pydocs_mdlm/ckpt.pt              # loss_by_time.svg beside the checkpoint

A run's folder gives four panels over training tokens: the validation bound with its standard
error, the training loss, the learning rate and the speed. A checkpoint gives its validation loss
as a function of t, the share of masked tokens. The area under that curve is the bound: few masks
are easy to fill in, and a row of masks says nothing. --out decides the format: svg, png or pdf.
Needs matplotlib.
"""

import json
from pathlib import Path

import numpy as np
import torch

from common import autocast, check_range, command, fail, parser, pick_device, progress
from configs import from_dict
from data.checkpoints import load
from data.command_line import add_model_options
from data.corpus import read_split, take, unpack
from data.json_files import read_json
from evaluate import batch_nats, choose_windows, window_noise
from tasks.report import check_picture, import_pyplot

FORMATS = (".svg", ".png", ".pdf")
PANELS = {  # key of a log's record: what its panel shows
    "val": "validation, bits per character",
    "loss": "training loss, nats per token",
    "lr": "learning rate",
    "tokens_per_s": "training tokens per second",
}

# --------------------------------------------------------------------------------------------------
# Runs


def read_run(folder):
    """(tokens per step, {panel: rows of step, value, standard error}) of a run's log."""
    for name in ("config.json", "log.jsonl"):
        if not (folder / name).is_file():
            fail(f"{folder / name}: no such file; name a run's folder, out/NAME, or a checkpoint")
    config = folder / "config.json"
    cfg = from_dict(read_json(config, {}), config)
    panels = {panel: [] for panel in PANELS}
    for number, line in enumerate((folder / "log.jsonl").open(encoding="utf-8"), start=1):
        if not line.endswith("\n"):  # the run is writing it
            break
        try:
            record = json.loads(line)
            for key in PANELS.keys() & record.keys():
                value, error = record[key], None
                if key == "val":
                    value, error = value["bits_per_char"], value["bits_per_char_se"]
                panels[key].append((record["step"], value, error or 0.0))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            fail(f"{folder / 'log.jsonl'}, line {number}: not a record of a run ({e})")
    return cfg.batch_size * cfg.seq_len, panels


def smooth(values, width):
    """Means over `width` values around each; fewer at the ends."""
    sums, half = np.cumsum([0.0, *values]), width // 2
    first = np.maximum(np.arange(len(values)) - half, 0)
    last = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def draw_runs(plt, folders):
    """Four panels, a colour per run. The training loss is noisy: its thick line is a mean."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained", sharex=True)
    for color, folder in enumerate(folders):
        tokens_per_step, panels = read_run(folder)
        for axis, (key, rows) in zip(axes.flat, panels.items()):
            if not rows:
                continue
            steps, values, errors = np.array(rows).T
            x, style = steps * tokens_per_step / 1e6, dict(color=f"C{color}", label=str(folder))
            if key == "val":
                axis.errorbar(x, values, errors, capsize=3, marker=".", **style)
            elif key == "loss":
                axis.plot(x, values, alpha=0.25, color=f"C{color}")
                axis.plot(x, smooth(values, len(values) // 20), **style)
            else:
                axis.plot(x, values, **style)
    for axis, title in zip(axes.flat, PANELS.values()):
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("million training tokens")
        axis.set_ylim(bottom=0)
    figure.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside lower center", fontsize=9)


# --------------------------------------------------------------------------------------------------
# Checkpoints


@torch.no_grad()
def loss_by_time(path, args):
    """(t, mean, standard error), each (points,): nats per masked token of validation text where the
    share t of a row's tokens is masked. Errors are over windows."""
    device = pick_device(args.device)
    model, cfg = load(path, not args.no_ema, device, args.dtype)
    if cfg.causal or not cfg.zero_masking:
        kind = "an AR model" if cfg.causal else "a model that may predict MASK"
        fail(f"{path}: {kind} has no loss as a function of t")
    (ids, meta), where = read_split(cfg.data, "val", cfg), f"{cfg.data}/val.bin"
    starts, lengths = choose_windows(len(ids), cfg.seq_len, args.windows)
    starts = starts[lengths == cfg.seq_len]
    t = (np.arange(args.points) + 0.5) / args.points
    batches = np.array_split(starts, -(-len(starts) // args.batch_size))
    jobs = [(k, batch) for k in range(args.points) for batch in batches]
    values = [[] for _ in t]
    for k, batch in progress(jobs, desc=str(path), unit=" batches"):
        rows = unpack(take(ids, batch, cfg.seq_len, cfg, where), meta, cfg)
        x0, maskable, counted = (tensor.to(device) for tensor in rows)
        u = torch.full((len(x0),), t[k], dtype=torch.float64, device=device)
        v = torch.from_numpy(window_noise(0, batch, k, cfg.seq_len)).to(device)
        with autocast(device, args.dtype):
            nats = batch_nats(model, x0, maskable, counted, cfg, 0, u, v)
        values[k].append((nats / counted.sum(-1).clamp(min=1)).cpu())
    values = torch.stack([torch.cat(row) for row in values]).numpy()
    return t, values.mean(1), values.std(1) / np.sqrt(max(values.shape[1] - 1, 1))


def draw_checkpoints(plt, paths, args):
    """A curve per checkpoint. Its mean over t, the area under it, is the bound."""
    figure, axis = plt.subplots(figsize=(7, 4.8), layout="constrained")
    for path in paths:
        t, mean, error = loss_by_time(path, args)
        label = f"{path}: area {mean.mean():.3f} nats per token"
        axis.errorbar(t, mean, error, capsize=3, marker=".", label=label)
    axis.set(xlabel="t, the share of masked tokens", ylabel="nats per masked token", xlim=(0, 1))
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize=9)


# --------------------------------------------------------------------------------------------------
# The command


def parse_arguments(argv):
    p = parser(__doc__)
    p.add_argument("runs", nargs="+", help="folders of runs, or checkpoints")
    p.add_argument("--out", help="file of the picture [curves.svg or loss_by_time.svg of the run]")
    p.add_argument("--points", type=int, default=16, help="checkpoints: values of t")
    p.add_argument("--windows", type=int, default=64, help="checkpoints: windows of text; 0: all")
    p.add_argument("--batch_size", type=int, default=32)
    add_model_options(p)
    args = p.parse_args(argv)
    check_range(args, points=2, windows=0, batch_size=1)
    files = [Path(run).suffix == ".pt" for run in args.runs]
    if any(files) != all(files):
        fail("runs: folders and checkpoints do not go into one picture")
    folder = Path(args.runs[0])
    args.files, default = any(files), folder / "curves.svg"
    if args.files:
        default = folder.with_name("loss_by_time.svg")
    args.out = Path(args.out or default)
    if args.out.suffix not in FORMATS:
        fail(f"--out {args.out}: must end in {', '.join(FORMATS)}")
    if args.out.parent != folder:
        check_picture("--out", args.out)
    return args


@command
def main(argv=None):
    args = parse_arguments(argv)
    if not (plt := import_pyplot(args.out.name)):
        return
    plt.rcParams["svg.fonttype"] = "none"  # text stays text: small, and can be searched
    paths = [Path(run) for run in args.runs]
    draw_checkpoints(plt, paths, args) if args.files else draw_runs(plt, paths)
    plt.savefig(args.out, dpi=150)
    plt.close("all")
    print(args.out)


if __name__ == "__main__":
    main()
