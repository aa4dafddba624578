"""Upstream's recipes in small, trained by upstream's own code and by ours from the same initial
weights, on the same rows in the same order, with times of the same law. Only the random times and
masks differ, so both curves and both bounds on held-out text must agree within their noise.

python -m tasks.recipes run text8_mdlm --clones .. --seed 1       # appends a line to --out
python -m tasks.recipes table                                     # all lines of --out
runs/recipes.sh CLONES TEXT VOCAB                                 # corpora, 3 seeds of each, table

The clones are those of tasks.peers. What is scaled down: width, depth, length, batch and steps. The
rest is the recipe: loss, law of times, optimizer, clipping, averaging, tokenizer and rows. The rate
is constant after a warm-up on both sides, because upstream's schedules are in scripts that need
GPUs. SMDM's Llama vocabulary is replaced by the demo's.
"""

import json
import multiprocessing
import re
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import train
from common import check_range, command, fail, one_line, parser, progress, to_json
from configs import lm1b_mdlm, owt_mdlm, smdm, text8_d3pm, text8_mdlm
from data.checkpoints import load, save_checkpoint
from data.corpus import read_split, training_rows, unpack
from evaluate import bound, report
from tasks.convert_upstream import make_state, strip_prefixes, translate, translate_smdm
from tasks.report import check_picture, format_mean, import_pyplot, mean_error, to_markdown
from tasks.upstream import PROJECTS, enter_clone

SMALL = dict(
    n_layer=2, n_head=2, n_embd=128, dropout=0.0, warmup=50, lr_decay="constant", samples=0,
    device="cpu", dtype="float32",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    project: str  # of tasks.upstream
    cfg: object  # the scaled Config
    scale: float = 1.0  # our loss over theirs


def scale_down(cfg, data, vocab_size, seq_len, batch_size, steps, lr, **more):
    sizes = dict(data=data, vocab_size=vocab_size, seq_len=seq_len, batch_size=batch_size)
    every = dict(micro_batch=batch_size, steps=steps, eval_every=steps, save_every=steps)
    return replace(cfg, **SMALL | sizes | every | more, lr=lr)


RECIPES = {
    "text8_mdlm": Recipe("mdlm", scale_down(text8_mdlm(), "letters", 27, 128, 32, 600, 3e-3)),
    "text8_d3pm": Recipe(
        "nanodd", scale_down(text8_d3pm(), "letters", 27, 128, 32, 600, 3e-3, time_draw="iid"), 1000
    ),
    "lm1b_mdlm": Recipe("mdlm", scale_down(lm1b_mdlm(), "lines", 30522, 32, 32, 300, 1e-3)),
    "owt_mdlm": Recipe("mdlm", scale_down(owt_mdlm(), "wrapped", 50257, 64, 16, 300, 1e-3)),
    "smdm_6": Recipe(
        "smdm",
        scale_down(smdm(6), "pydocs", 2048, 128, 16, 500, 1e-3, mlp_width=512, time_draw="iid"),
    ),
}
WINDOW = 20  # steps that a point of a curve is the mean of

# --------------------------------------------------------------------------------------------------
# The two sides


def their_weights(step, state, cfg, where):
    """Upstream's tensors as ours, checked by the code of `tasks.convert`."""
    if cfg.norm == "rms":
        return translate_smdm(state, cfg, cfg.vocab_size + 1, where)
    return translate(strip_prefixes(state), cfg, cfg.vocab_size, where)


def train_theirs(name, clone, seed, threads, folder):
    """In a separate process: upstream's code on our rows. Leaves initial.pt, theirs.pt and the
    losses in `folder`."""
    torch.set_num_threads(threads)
    recipe = RECIPES[name]
    cfg = replace(recipe.cfg, seed=seed)
    ids, meta = read_split(cfg.data, "train", cfg)

    def rows(i):
        index = i * cfg.batch_size + np.arange(cfg.batch_size)
        x0, _, counted = unpack(training_rows(ids, meta, cfg, index), meta, cfg)
        return x0, counted.long()

    def save(file, state, average):
        ours, averaged = (their_weights(step, s, cfg, file) for s in (state, average))
        state = make_state(ours, averaged, 0, cfg, meta["tokenizer"])
        save_checkpoint(folder / file, **state, optimizer=[], data="")

    rows(0)  # damaged data fails here
    build = PROJECTS[recipe.project]
    enter_clone(clone)
    torch.manual_seed(seed)
    step = build(cfg, rows, warmup=cfg.warmup)
    before = {key: tensor.clone() for key, tensor in step.net.state_dict().items()}
    save("initial.pt", before, before)
    bar = progress(range(cfg.steps), desc=f"{name}, {recipe.project}")
    losses = [recipe.scale * step(i) for i in bar]
    last = {key: tensor.clone() for key, tensor in step.net.state_dict().items()}
    save("theirs.pt", last, step.average())
    (folder / "theirs.json").write_text(json.dumps(losses), encoding="utf-8")


def train_ours(cfg, folder):
    """Ours from the same initial weights; returns the loss of every step."""
    losses, step = [], train.train_step

    def noted(*args):
        loss, norm = step(*args)
        losses.append(float(loss))
        return loss, norm

    train.train_step = noted
    try:
        cfg = replace(cfg, init_from=str(folder / "initial.pt"), out_dir=str(folder / "ours"))
        train.main(cfg, overwrite=True)
    finally:
        train.train_step = step
    return losses


def evaluate(path, cfg, ema):
    """Bits per character of validation text by our bound, with the same noise for both sides."""
    model, _ = load(path, ema=ema)
    ids, meta = read_split(cfg.data, "val", cfg)
    options = dict(T=cfg.T, passes=4, windows=256, batch_size=64)
    return report(bound(model, ids, meta, cfg, "val.bin", **options), meta, "val")["bits_per_char"]


def smooth(losses):
    """Means of WINDOW steps each."""
    return [statistics.fmean(losses[i : i + WINDOW]) for i in range(0, len(losses), WINDOW)]


def run(args):
    """Both sides of one recipe and seed; appends {recipe, seed, curves, bounds} to args.out."""
    recipe, folder = RECIPES[args.recipe], Path(args.out).parent / f"{args.recipe}_{args.seed}"
    clone, cfg = args.clones / recipe.project, replace(recipe.cfg, seed=args.seed)
    if not clone.is_dir():
        fail(f"--clones {args.clones}: has no folder {recipe.project}; tasks.peers has addresses")
    folder.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    arguments = (args.recipe, clone, args.seed, threads, folder)
    side = multiprocessing.get_context("spawn").Process(target=train_theirs, args=arguments)
    side.start()
    side.join()
    if side.exitcode:
        fail(f"{clone}: ended with exit code {side.exitcode}")
    theirs = json.loads((folder / "theirs.json").read_text(encoding="utf-8"))
    row = dict(recipe=args.recipe, seed=args.seed, steps=cfg.steps)
    row |= dict(ours=smooth(train_ours(cfg, folder)), theirs=smooth(theirs))
    for side, path in (("ours", folder / "ours"), ("theirs", folder / "theirs.pt")):
        row[f"{side}_last"] = evaluate(path, cfg, ema=False)
        row[f"{side}_average"] = evaluate(path, cfg, ema=True)
    with open(args.out, "a", encoding="utf-8") as f:
        f.write(to_json(row) + "\n")
    return f"{args.recipe}, seed {args.seed}: {row['ours_last']:.4f} and {row['theirs_last']:.4f}"


# --------------------------------------------------------------------------------------------------
# A text in the forms that the recipes read; the table and the picture


def split(args):
    """One text as text8's letters, as documents (OpenWebText) and as lines (LM1B)."""
    try:
        text = args.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        fail(f"--text {args.text}: {one_line(e)}")
    documents = [to_json(dict(text=part)) for part in text.split("\n\n") if part.strip()]
    lines = [line for line in text.splitlines() if line.strip()]
    files = {
        "letters.txt": re.sub("[^a-z]+", " ", text.lower()),
        "documents.jsonl": "\n".join(documents),
        "news.en-1": "\n".join(lines[:-1000]),
        "news.en.heldout-1": "\n".join(lines[-1000:]),
    }
    for name, content in files.items():
        (args.folder / name).write_text(content, encoding="utf-8")
    return f"{args.folder}: {', '.join(files)}"


def difference(rows, key):
    """Ours less theirs, paired by seed, as text."""
    return format_mean([row[f"ours_{key}"] - row[f"theirs_{key}"] for row in rows], 4)


def curve_difference(rows):
    """The mean difference of the losses over the second half of the steps, paired by seed."""
    half = lambda curve: statistics.fmean(curve[len(curve) // 2 :])
    return format_mean([half(row["ours"]) - half(row["theirs"]) for row in rows], 4)


def table(args):
    """The comparison of all recipes in args.out, and --svg, their curves."""
    try:
        lines = Path(args.out).read_text(encoding="utf-8").splitlines()
    except OSError as e:
        fail(f"{args.out}: {e.strerror}; `run` writes it")
    runs = {}
    for row in map(json.loads, lines):
        runs.setdefault(row["recipe"], {})[row["seed"]] = row
    head = ["recipe", "seeds", "ours", "upstream", "difference", "averaged weights", "loss"]
    body = []
    for name, rows in runs.items():
        rows = list(rows.values())
        means = [format_mean([row[f"{side}_last"] for row in rows]) for side in ("ours", "theirs")]
        paired = [difference(rows, "last"), difference(rows, "average"), curve_difference(rows)]
        body.append([f"`{name}`", str(len(rows)), *means, *paired])
    if args.svg and (pyplot := import_pyplot(args.svg)):
        draw(pyplot, runs, args.svg)
    return to_markdown(head, *body)


def draw(pyplot, runs, path):
    """A panel per recipe: each side's mean loss over the seeds, with its standard error."""
    figure, axes = pyplot.subplots(1, len(runs), figsize=(3 * len(runs), 2.8), squeeze=False)
    for axis, (name, rows) in zip(axes[0], runs.items()):
        for side, color in (("theirs", "tab:orange"), ("ours", "tab:blue")):
            curves = list(zip(*(row[side] for row in rows.values())))
            x = [WINDOW * (i + 0.5) for i in range(len(curves))]
            y, e = [statistics.fmean(c) for c in curves], [mean_error(c) for c in curves]
            label = "upstream" if side == "theirs" else "ours"
            axis.plot(x, y, color=color, label=label, linewidth=1)
            low, high = zip(*((a - b, a + b) for a, b in zip(y, e)))
            axis.fill_between(x, low, high, color=color, alpha=0.3, linewidth=0)
        axis.set(title=name, xlabel="step")
    axes[0][0].set_ylabel("loss, nats per token")
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


@command
def main(argv=None):
    p = parser(__doc__)
    p.add_argument("what", choices=[mode.__name__ for mode in (split, run, table)])
    p.add_argument("recipe", nargs="?", choices=RECIPES, help="run: which")
    p.add_argument("--clones", type=Path, default=Path(".."), help="holds mdlm, nanodd, smdm")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--text", type=Path, help="split: a plain text")
    p.add_argument("--folder", type=Path, help="split: where its forms go")
    p.add_argument("--out", default="out/recipes/runs.jsonl", help="a JSON line per run")
    p.add_argument("--svg", help="table: draw the curves, too")
    args = p.parse_args(argv)
    check_range(args, seed=0)
    check_picture("--svg", args.svg)
    if args.what == "run" and not args.recipe:
        fail(f"run: name a recipe, one of {', '.join(RECIPES)}")
    if args.what == "split" and not (args.text and args.folder and args.folder.is_dir()):
        fail("split: needs --text FILE and --folder, an existing one")
    print({"split": split, "run": run, "table": table}[args.what](args))


if __name__ == "__main__":
    main()
