"""The reversal curse (Berglund et al., arXiv 2309.12288): who has read "A is B", and is asked who B is?

python data/prepare.py reversal --input FOLDER/all_prompts_train.jsonl FOLDER/*_prompts_test.jsonl --tokenizer bpe
python -m tasks.reversal                               # an MDLM and its AR twin, 3 seeds each

Both are trained from scratch on the facts, each of which is told in one direction only. Then every test prompt, of
which no wording was seen, is put with its true answer and nine that other facts have to the same wording (another's
would be told by its grammar: "was once" goes on with "the", not with "being"): how often is the true one the
likeliest? By chance in one of ten. Writes out/reversal/: a folder per run, and table.md.
"""

import json
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
from common import autocast, check_range, fail
from configs import from_cli
from data.corpus import folder_of, read_meta
from data.tokenizer import tokenizer_of
from diffusion import ar, exact_count_bound
from model import load
from tasks.compare import VARIANTS, cell, markdown, seeded, trained

OPTIONS = 10
WORDINGS = 10  # of a question about a fact, which stand together and in one order
QUESTIONS = {  # of the test files: what is asked, and whether the facts were told in that direction
    "p2d": "who -> what, as told",
    "d2p": "what -> who, as told",
    "d2p_reverse": "who -> what, reversed",
    "p2d_reverse": "what -> who, reversed",
}


def questions(path, tokenizer, cfg, most):
    """x0 (N, OPTIONS, L), maskable: each prompt with each of its options, the true answer first, in rows as they were
    trained on, [BOS] prompt answer [EOS] ...; and of (N,), the kind of each question. At most `most` of a kind."""
    items = [json.loads(line) for line in Path(path).read_text().splitlines()]
    x0, maskable, of, rng = [], [], [], np.random.default_rng(0)
    for kind in QUESTIONS:
        mine = [item for item in items if item["of"] == kind]
        for i in rng.permutation(len(mine))[:most].tolist():
            item, alike = mine[i], mine[i % WORDINGS :: WORDINGS]
            others = sorted({other["answer"] for other in alike} - {item["answer"]})
            if len(others) < OPTIONS - 1:
                fail(f"{path}: {len(others) + 1} different answers of {kind}, fewer than {OPTIONS}")
            of.append(kind)
            prompt = [tokenizer.bos, *tokenizer.encode(item["prompt"])]
            for answer in [item["answer"], *rng.choice(others, OPTIONS - 1, replace=False)]:
                target = tokenizer.encode(" " + str(answer), inside=True)
                rest = cfg.seq_len - len(prompt) - len(target)
                if rest < 0:
                    fail(
                        f"{path}: a question of {cfg.seq_len - rest} tokens, but seq_len is {cfg.seq_len}"
                    )
                x0.append(prompt + target + [tokenizer.eos] * rest)
                maskable.append([False] * len(prompt) + [True] * len(target) + [False] * rest)
    shape = (len(of), OPTIONS, cfg.seq_len)
    return torch.tensor(x0).view(shape), torch.tensor(maskable).view(shape), of


@torch.no_grad()
def costs(model, cfg, x0, maskable, samples, batch_size=512):
    """(N,) nats of the maskable tokens of rows x0 (N, L): exact for an AR model, else the bound by exact counts, which
    are stratified over `samples` forwards."""
    parts = []
    for x, m in tqdm(
        list(zip(x0.split(batch_size), maskable.split(batch_size))), leave=False, unit="batch"
    ):
        with autocast(x.device, cfg.dtype):
            if cfg.causal:
                parts.append(ar(model, x, m, cfg).double().sum(-1))
                continue
            n, total = m.sum(-1), 0.0
            for k in range(samples):
                u = (k + torch.rand(len(x), dtype=torch.float64, device=x.device)) / samples
                count = torch.minimum(torch.floor(n * u).long() + 1, n)
                total = total + exact_count_bound(model, x, m, cfg, count).double() / samples
            parts.append(total)
    return torch.cat(parts)


def accuracy(cfg, samples, most):
    """{kind: share of its questions whose true answer is the likeliest of the options} of a trained run."""
    device = common.local_device(cfg)
    model, _ = load(cfg.out_dir, device=device, dtype=cfg.dtype)
    tokenizer = tokenizer_of(model.tokenizer)
    x0, maskable, of = questions(folder_of(cfg.data) / "test.jsonl", tokenizer, cfg, most)
    torch.manual_seed(0)
    nats = costs(
        model, cfg, x0.flatten(0, 1).to(device), maskable.flatten(0, 1).to(device), samples
    )
    right = (nats.view(len(of), OPTIONS).argmin(-1) == 0).tolist()
    return {kind: statistics.fmean(r for r, k in zip(right, of) if k == kind) for kind in QUESTIONS}


def main(cfg, seeds, samples, most):
    path = folder_of(cfg.data) / "test.jsonl"
    if not path.exists():
        fail(
            f"{path}: no such file; python data/prepare.py reversal needs its four test files, too"
        )
    cfg = replace(cfg, vocab_size=read_meta(cfg.data)["vocab_size"])
    results = {}
    for name in ("mdlm", "ar"):
        runs = seeded(cfg, name, VARIANTS[name], seeds)
        for run in runs:
            trained(run)
        results[name] = [accuracy(run, samples, most) for run in runs]
    rows = [("loss", *QUESTIONS.values())]
    for name, of_seed in results.items():
        cells = [cell([100 * r[kind] for r in of_seed], 1) for kind in QUESTIONS]
        rows.append((f"`{name}`", *(f"{c} %" for c in cells)))
    (Path(cfg.out_dir) / "table.md").write_text(markdown(*rows))
    print(markdown(*rows), end="")
    return results


if __name__ == "__main__":
    cfg, args = from_cli(
        doc=__doc__,
        flags=(
            ("seeds", "runs of each loss", 3),
            ("passes", "forwards per option", 32),
            ("most", "questions of each kind", 300),
        ),
        out="out/reversal",
        config="reversal_mdlm",
    )
    check_range(args, seeds=1, passes=1, most=1)
    main(cfg, args.seeds, args.passes, args.most)
