"""AR, MDLM, SEDD and D3PM on the same data in the same order, for the same steps, with the same network.

python -m tasks.compare                                          # the demo's network and data, 3 seeds
python -m tasks.compare --data=mine --steps=600 --seeds 5        # any field of any config
torchrun --nproc_per_node=8 -m tasks.compare owt_mdlm --seeds 1

Writes to out/compare_<config>/: a folder per run, table.md, curves.png and samples.txt. Runs that are complete are
not run again, and one that was stopped goes on where it stopped.
"""

import json
import statistics
import textwrap
from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path

import torch.distributed as dist

import common
import data.runs
import train
from common import check_range, fail
from configs import as_ar, as_d3pm, as_sedd, from_cli
from data.corpus import read_split
from data.tokenizer import tokenizer_of
from evaluate import bound, report
from model import count_parameters, load
from sample import generate

MAY_CHANGE = data.runs.MAY_CHANGE - {"data", "steps"}
VARIANTS = {"ar": as_ar, "mdlm": lambda cfg: cfg, "sedd": as_sedd, "d3pm": as_d3pm}


def seeded(cfg, name, make, seeds):
    """make(cfg) for so many seeds from its own on, each with a folder <name>_<seed> in out_dir."""
    try:
        return [
            replace(make(cfg), seed=seed, out_dir=f"{cfg.out_dir}/{name}_{seed}")
            for seed in range(cfg.seed, cfg.seed + seeds)
        ]
    except ValueError as e:  # a field that this one does not have
        fail(f"{name}: {e}")


def trained(cfg):
    """Train cfg, unless its folder holds the result."""
    path = Path(cfg.out_dir) / "ckpt.pt"
    if path.exists():
        model, saved = load(path)
        differ = [
            f for f in asdict(cfg) if getattr(cfg, f) != getattr(saved, f) and f not in MAY_CHANGE
        ]
        if differ:
            fail(
                f"{path}: trained with another {', '.join(differ)}; give another --out_dir, or remove that run"
            )
        if model.step == cfg.steps:
            return
    train.main(cfg, resume=True)


def final(cfg, passes):
    """The report on the whole validation split of the averaged weights."""
    model, _ = load(cfg.out_dir, device=common.local_device(cfg), dtype=cfg.dtype)
    ids, meta = read_split(cfg.data, "val", cfg)
    result = bound(
        model, ids, meta, cfg, f"{cfg.data}/val.bin", cfg.T, 1 if cfg.causal else passes,
        batch_size=cfg.micro_batch, dtype=cfg.dtype,
    )  # fmt: skip
    return report(result, meta, "val")


def cell(values, digits=3):
    """Mean over seeds ± its standard error."""
    error = (
        f" ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    )
    return f"{statistics.fmean(values):.{digits}f}{error}"


def curve(cfg):
    """{step: validation bits per character} of a run, as it logged them."""
    records = map(json.loads, (Path(cfg.out_dir) / "log.jsonl").read_text().splitlines())
    return {r["step"]: r["val"]["bits_per_char"] for r in records if "val" in r}


def markdown(*rows):
    """The table whose first row is its head."""
    head, *body = ("| " + " | ".join(row) + " |\n" for row in rows)
    return head + "|---" * len(rows[0]) + "|\n" + "".join(body)


COLUMNS = (
    "loss",
    "parameters",
    "bits/char",
    "minus `mdlm`'s",
    "lowest on the way",
    "perplexity per token",
)


def table(cfgs, results):
    """Markdown: bits per character of each loss at the end; the difference from mdlm, paired by seed; the lowest
    of each run's own validations, which tells whether it overfits."""
    rows = [COLUMNS]
    for name, runs in results.items():
        bits = [r["bits_per_char"] for r in runs]
        paired = [a - r["bits_per_char"] for a, r in zip(bits, results["mdlm"])]
        lowest = [min(curve(cfg).values()) for cfg in cfgs[name]]
        bound = "" if name == "ar" else "≤ "
        rows.append((
            f"`{name}`", f"{count_parameters(cfgs[name][0]):,}", bound + cell(bits),
            "" if name == "mdlm" else cell(paired), bound + cell(lowest),
            bound + cell([r["perplexity"] for r in runs]),
        ))  # fmt: skip
    return markdown(*rows)


def pyplot(name):
    """matplotlib's, for a picture of this name and without a screen; or None, after a hint."""
    try:
        import matplotlib
    except ImportError:
        return print(f"no {name}: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def curves(cfgs, path):
    """Validation bits per character over training tokens, mean ± standard error over seeds."""
    if not (plt := pyplot(path.name)):
        return
    plt.figure(figsize=(7, 4.5))
    for name, runs in cfgs.items():
        logs = [curve(cfg) for cfg in runs]
        steps = sorted(logs[0])
        values = [[log[step] for log in logs] for step in steps]
        error = [statistics.stdev(v) / len(v) ** 0.5 if len(v) > 1 else 0 for v in values]
        tokens = [step * runs[0].batch_size * runs[0].seq_len / 1e6 for step in steps]
        plt.errorbar(
            tokens, [statistics.fmean(v) for v in values], error, label=name, capsize=3, marker="."
        )
    plt.xlabel("million tokens")
    plt.ylabel("validation bits per character")
    plt.title(f"{runs[0].data}, {len(runs)} seeds")
    plt.grid(alpha=0.3)
    plt.legend()
    plt.savefig(path, dpi=150, bbox_inches="tight")
    plt.close()


def side_by_side(texts, width=36):
    """{name: text} as columns."""
    columns = [[name, "", *sum((textwrap.wrap(line, width) or [""] for line in text.splitlines()), [])]
               for name, text in texts.items()]  # fmt: skip
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join("  ".join(c.ljust(width) for c in row).rstrip() for row in rows) + "\n"


def main(cfg, seeds, passes):
    if cfg.loss != "mdlm":
        fail(f"loss={cfg.loss}: compare starts from a config of loss=mdlm")
    cfgs = {name: seeded(cfg, name, make, seeds) for name, make in VARIANTS.items()}
    for one_of_each in zip(*cfgs.values()):  # seed by seed
        for c in one_of_each:
            trained(c)
    results = {name: [final(c, passes) for c in runs] for name, runs in cfgs.items()}
    if dist.is_initialized() and dist.get_rank():
        return results
    out = Path(cfg.out_dir)
    (out / "table.md").write_text(table(cfgs, results))
    curves(cfgs, out / "curves.png")
    texts = {}
    for name, (c, *_) in cfgs.items():
        model, _ = load(c.out_dir, device=common.local_device(c), dtype=c.dtype)
        try:
            texts[name] = generate(model, tokenizer_of(model.tokenizer), c, dtype=c.dtype)[0]
        except ValueError as e:  # nothing to begin a text with
            texts[name] = str(e)
    (out / "samples.txt").write_text(side_by_side(texts))
    print(
        f"\n{(out / 'table.md').read_text()}\n{side_by_side(texts)}\n{out}: table.md, curves.png, samples.txt"
    )
    return results


if __name__ == "__main__":
    cfg, args = from_cli(
        doc=__doc__,
        flags=(
            ("seeds", "runs of each loss", 3),
            ("passes", "forwards per window of the final bounds", 16),
        ),
        out="out/compare_{}",
    )
    check_range(args, seeds=1, passes=1)
    with common.process_group(cfg):
        main(cfg, args.seeds, args.passes)
