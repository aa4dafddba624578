"""DiT, DiMamba and an AR transformer with equally many parameters, on the same data, in the same
order and for the same steps.

python data/prepare.py text --input tinyshakespeare.txt --tokenizer char --out shakespeare
python -m tasks.mixers --data shakespeare              # 3 seeds each; writes out/mixers/

A Mamba block of both directions has fewer parameters than a transformer block of its width, so the
transformers get as many blocks and a narrower MLP. All are without adaLN, as the demo is.
"""

from dataclasses import replace
from pathlib import Path

from common import check_range, command, parser
from configs import as_ar, pydocs_mdlm
from data.corpus import read_meta
from model import count_parameters
from tasks.report import evaluate_final, format_mean, to_markdown, train_if_missing


def fit_mlp(cfg, parameters):
    """cfg with the width of the MLP that brings its number of parameters nearest to this."""
    count = lambda f: count_parameters(replace(cfg, mlp_width=f))
    width = (parameters - count(1)) // (count(2) - count(1)) + 1
    return replace(cfg, mlp_width=max(width, 1))


def make_kinds(cfg):
    """{name: config}."""
    mamba = replace(cfg, mixer="mamba", norm="rms")
    dit = fit_mlp(cfg, count_parameters(mamba))
    return {"DiT": dit, "DiMamba": mamba, "AR": as_ar(dit)}


@command
def main(argv=None):
    p = parser(__doc__)
    p.add_argument("--data", default="pydocs")
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--seeds", type=int, default=3, help="runs of each kind")
    p.add_argument("--n_embd", type=int, default=64)
    p.add_argument("--out_dir", default="out/mixers")
    args = p.parse_args(argv)
    check_range(args, steps=1, seeds=1, n_embd=8)
    cfg = replace(
        pydocs_mdlm(), data=args.data, vocab_size=read_meta(args.data)["vocab_size"], seq_len=64,
        n_layer=2, n_embd=args.n_embd, steps=args.steps, batch_size=8, micro_batch=8,
        lr_decay="linear", dtype="float32", samples=0, eval_every=2**30, save_every=2**30,
        eval_windows=64,
    )  # fmt: skip
    results, kinds, out = {}, make_kinds(cfg), Path(args.out_dir)
    for seed in range(1, args.seeds + 1):
        for name, run in kinds.items():
            run = replace(run, seed=seed, out_dir=str(out / f"{name}_{seed}"))
            train_if_missing(run)
            results.setdefault(name, []).append(evaluate_final(run, 1)["bits_per_char"])
        rows = [("network", "parameters", "bits per character")]
        for name, bits in results.items():
            sign = "" if name == "AR" else "≤ "
            rows.append((name, f"{count_parameters(kinds[name]):,}", sign + format_mean(bits)))
        (out / "table.md").write_text(table := to_markdown(*rows))  # after each seed
    print(table)
    return results


if __name__ == "__main__":
    main()
