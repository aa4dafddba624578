"""The reversal curse (Berglund et al., arXiv 2309.12288): does a model trained on "A is B" know who
B is?

python data/prepare.py reversal --tokenizer bpe \\
    --input FOLDER/all_prompts_train.jsonl FOLDER/*_prompts_test.jsonl
python -m tasks.reversal                               # an MDLM and its AR twin, 3 seeds each

Trains both from scratch on the facts, each of which is in the data in one direction only. Then
scores every test prompt, in a wording that training did not have, with its true answer and with
nine answers of other facts to the same wording, and counts how often the true one is the likeliest;
chance is one in ten. Grammar would rule out answers to another wording: "was once" continues with
"the", not with "being". Writes out/reversal/: a folder per run, and table.md.

SMDM's own test, in which a fine-tuned model writes the answer, is python -m tasks.answer reversal.
"""

import statistics
from pathlib import Path

import numpy as np
import torch

from common import autocast, check_range, command, fail, progress
from data.checkpoints import load
from data.command_line import from_cli
from data.corpus import folder_of
from data.json_files import read_json
from data.processes import local_device
from data.tokenizer import tokenizer_of
from diffusion import ar, draw_count, exact_count_bound
from tasks.report import format_mean, make_runs, to_markdown, train_if_missing
from tasks.scoring import DIRECTIONS

CHOICES = 10
WORDINGS = 10  # of a question about a fact; they are neighbours in the file, always in one order


def make_questions(path, tokenizer, cfg, limit):
    """x0, maskable and counted (N, CHOICES, L), and directions (N,); at most `limit` of each.

    A question is a prompt with each of its answers, the true answer first, in rows as in training:
    [BOS] prompt answer [EOS] ...; the answer is counted, all but the prompt is maskable."""
    fields = dict(of=str, prompt=str, answer=str)
    lines = Path(path).read_bytes().decode(errors="replace").splitlines()
    items = [read_json(path, fields, text=line) for line in lines]
    x0, given, counted, directions, rng = [], [], [], [], np.random.default_rng(0)
    for direction in DIRECTIONS:
        group = [item for item in items if item["of"] == direction]
        for i in rng.permutation(len(group))[:limit].tolist():
            item, alike = group[i], group[i % WORDINGS :: WORDINGS]
            others = sorted({other["answer"] for other in alike} - {item["answer"]})
            if len(others) < CHOICES - 1:
                count = f"{len(others) + 1} different answers of {direction}"
                fail(f"{path}: {count}, fewer than {CHOICES}")
            directions.append(direction)
            prompt = [tokenizer.bos, *tokenizer.encode(item["prompt"])]
            for answer in [item["answer"], *rng.choice(others, CHOICES - 1, replace=False)]:
                target = tokenizer.encode(" " + str(answer), inside=True)
                rest = cfg.seq_len - len(prompt) - len(target)
                if rest < 0:
                    size = cfg.seq_len - rest
                    fail(f"{path}: a question of {size} tokens, but seq_len is {cfg.seq_len}")
                x0.append(prompt + target + [tokenizer.eos] * rest)
                given.append([True] * len(prompt) + [False] * (len(target) + rest))
                counted.append([False] * len(prompt) + [True] * len(target) + [False] * rest)
    shape = (len(directions), CHOICES, cfg.seq_len)
    x0, given, counted = (torch.tensor(rows).view(shape) for rows in (x0, given, counted))
    return x0, ~given, counted, directions


@torch.no_grad()
def measure_nats(model, cfg, x0, maskable, counted, passes, batch_size=512):
    """(N,) nats of the counted tokens of rows x0 (N, L): exact for an AR model, else the bound, by
    exact counts of masks that are stratified over `passes` forwards."""
    nats = []
    batches = list(zip(*(rows.split(batch_size) for rows in (x0, maskable, counted))))
    for x, m, c in progress(batches, unit="batch"):
        with autocast(x.device, cfg.dtype):
            if cfg.causal:
                nats.append(ar(model, x, c, cfg).double().sum(-1))
                continue
            total = 0.0
            for k in range(passes):
                u = (k + torch.rand(len(x), dtype=torch.float64, device=x.device)) / passes
                count = draw_count(m.sum(-1), u)
                estimate = exact_count_bound(model, x, m, cfg, count, counted=c)
                total = total + estimate.double() / passes
            nats.append(total)
    return torch.cat(nats)


def measure_accuracy(cfg, passes, limit):
    """{direction: share of its questions whose true answer is the likeliest option} of a run."""
    device = local_device(cfg)
    model, _ = load(cfg.out_dir, device=device, dtype=cfg.dtype)
    tokenizer, path = tokenizer_of(model.tokenizer), folder_of(cfg.data) / "test.jsonl"
    *rows, directions = make_questions(path, tokenizer, cfg, limit)
    torch.manual_seed(0)
    rows = (x.flatten(0, 1).to(device) for x in rows)
    nats = measure_nats(model, cfg, *rows, passes)
    right = (nats.view(len(directions), CHOICES).argmin(-1) == 0).tolist()
    share = lambda name: statistics.fmean(r for r, d in zip(right, directions) if d == name)
    return {direction: share(direction) for direction in DIRECTIONS}


def train_and_measure(cfg, seeds, passes, limit):
    """{loss: [the accuracies of each seed's run]}; trains runs that are missing."""
    results = {}
    for name in ("mdlm", "ar"):
        runs = make_runs(cfg, name, seeds)
        for run in runs:
            train_if_missing(run)
        results[name] = [measure_accuracy(run, passes, limit) for run in runs]
    return results


def make_table(results):
    """Markdown: percent of questions, mean over seeds ± standard error."""
    rows = [("loss", *DIRECTIONS.values())]
    for name, runs in results.items():
        cells = [format_mean([100 * run[direction] for run in runs], 1) for direction in DIRECTIONS]
        rows.append((f"`{name}`", *(f"{text} %" for text in cells)))
    return to_markdown(*rows)


def parse_arguments(argv):
    flags = (
        ("seeds", "runs of each loss", 3),
        ("passes", "forwards per option", 32),
        ("questions", "questions of each direction", 300),
    )
    cfg, args = from_cli(argv, __doc__, flags, "out/reversal", "reversal_mdlm")
    check_range(args, seeds=1, passes=1, questions=1)
    return cfg, args


@command
def main(argv=None):
    cfg, args = parse_arguments(argv)
    path = folder_of(cfg.data) / "test.jsonl"
    if not path.exists():
        fail(f"{path}: no such file; data/prepare.py reversal also needs the four test files")
    results = train_and_measure(cfg, args.seeds, args.passes, args.questions)
    table = make_table(results)
    (Path(cfg.out_dir) / "table.md").write_text(table)
    print(table, end="")
    return results


if __name__ == "__main__":
    main()
