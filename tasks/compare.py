"""AR, MDLM, SEDD and D3PM with the same network, data, order of batches and number of steps.

python -m tasks.compare                                  # the demo's network and data, 3 seeds
python -m tasks.compare --data=mine --steps=600 --seeds 5          # any field of any config
torchrun --nproc_per_node=8 -m tasks.compare owt_mdlm --seeds 1

Writes to out/compare_<config>/: a folder per run, table.md, curves.png and samples.txt. Finished
runs are kept; a stopped run is resumed.
"""

import statistics
import textwrap
from itertools import zip_longest
from pathlib import Path

from common import check_range, command, fail
from data.checkpoints import load
from data.command_line import from_cli
from data.processes import local_device, process_group, rank_and_world
from data.runs import read_log
from data.tokenizer import tokenizer_of
from diffusion import LOSSES
from model import count_parameters
from sample import generate
from tasks.report import (
    VARIANTS,
    evaluate_final,
    format_mean,
    import_pyplot,
    make_runs,
    mean_error,
    to_markdown,
    train_if_missing,
)

COLUMNS = (
    "loss", "parameters", "bits/char", "minus `mdlm`'s", "lowest on the way",
    "perplexity per token",
)  # fmt: skip


def read_curve(cfg):
    """{step: validation bits per character} from the log of a run."""
    with open(Path(cfg.out_dir) / "log.jsonl", encoding="utf-8", errors="replace") as log:
        return {r["step"]: r["val"]["bits_per_char"] for r in read_log(log) if "val" in r}


def format_table(runs, results):
    """Markdown, a row per loss: the final bits per character; their difference from mdlm's, paired
    by seed; the lowest validation of each run, which shows whether it overfits."""
    rows = [COLUMNS]
    for name, reports in results.items():
        bits = [r["bits_per_char"] for r in reports]
        paired = [b - r["bits_per_char"] for b, r in zip(bits, results["mdlm"])]
        lowest = [min(read_curve(cfg).values()) for cfg in runs[name]]
        perplexity = [r["perplexity"] for r in reports]
        sign = "" if name == "ar" else "≤ "
        figures = [sign + format_mean(values) for values in (bits, lowest, perplexity)]
        figures.insert(1, "" if name == "mdlm" else format_mean(paired))
        rows.append((f"`{name}`", f"{count_parameters(runs[name][0]):,}", *figures))
    return to_markdown(*rows)


def plot_curves(runs, path):
    """Validation bits per character over training tokens: mean ± standard error over seeds."""
    if not (plt := import_pyplot(path.name)):
        return
    plt.figure(figsize=(7, 4.5))
    for name, cfgs in runs.items():
        logs, cfg = [read_curve(cfg) for cfg in cfgs], cfgs[0]
        steps = sorted(logs[0])
        values = [[log[step] for log in logs] for step in steps]
        means, errors = map(statistics.fmean, values), map(mean_error, values)
        tokens = [step * cfg.batch_size * cfg.seq_len / 1e6 for step in steps]
        plt.errorbar(tokens, list(means), list(errors), label=name, capsize=3, marker=".")
    plt.xlabel("million tokens")
    plt.ylabel("validation bits per character")
    plt.title(f"{cfg.data}, {len(cfgs)} seeds")
    plt.grid(alpha=0.3)
    plt.legend()
    plt.savefig(path, dpi=150, bbox_inches="tight")
    plt.close()


def generate_samples(runs):
    """{loss: a text of the first seed's model, or the reason why there is none}."""
    texts = {}
    for name, (cfg, *_) in runs.items():
        model, _ = load(cfg.out_dir, device=local_device(cfg), dtype=cfg.dtype)
        try:
            texts[name] = generate(model, tokenizer_of(model.tokenizer), cfg, dtype=cfg.dtype)[0]
        except ValueError as e:  # the tokenizer has no token that begins a text
            texts[name] = str(e)
    return texts


def join_columns(texts, width=36):
    """{name: text} as columns of wrapped text, side by side."""
    columns = []
    for name, text in texts.items():
        lines = [textwrap.wrap(line, width) or [""] for line in text.splitlines()]
        columns.append([name, "", *sum(lines, [])])
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join("  ".join(c.ljust(width) for c in row).rstrip() for row in rows) + "\n"


def main(cfg, seeds, passes):
    """Train what is missing; write and print the table and samples. Returns {loss: reports}."""
    if cfg.loss != "mdlm":
        fail(f"loss={cfg.loss}: compare starts from a config of loss=mdlm")
    runs = {name: make_runs(cfg, name, seeds) for name in VARIANTS | LOSSES}
    for same_seed in zip(*runs.values()):
        for run in same_seed:
            train_if_missing(run)
    results = {name: [evaluate_final(run, passes) for run in runs[name]] for name in runs}
    texts = generate_samples(runs)
    if rank_and_world()[0] == 0:
        out = Path(cfg.out_dir)
        table, samples = format_table(runs, results), join_columns(texts)
        (out / "table.md").write_text(table)
        (out / "samples.txt").write_text(samples)
        plot_curves(runs, out / "curves.png")
        print(f"\n{table}\n{samples}\n{out}: table.md, curves.png, samples.txt")
    return results


@command
def command_line(argv=None):
    flags = (
        ("seeds", "runs of each loss", 3),
        ("passes", "forwards per window of the final bounds", 16),
    )
    cfg, args = from_cli(argv, doc=__doc__, flags=flags, out="out/compare_{}")
    check_range(args, seeds=1, passes=1)
    with process_group(cfg):
        main(cfg, args.seeds, args.passes)


if __name__ == "__main__":
    command_line()
