"""Texts of a run while it trains: train.py --val_samples=N [--judge=NAME] logs N texts of the
averaged weights at every validation and, with a judge, their perplexity and entropy.

tail -n 1 out/owt_mdlm/log.jsonl shows them; wandb and tensorboard get them too.
"""

from sample import generate
from tasks.judge import judge_rows, load_judge


def make_monitor(cfg, tokenizer, canvas, device, micro):
    """write_texts(ema, num, **options) -> the record to log. Everything that could fail, such as
    the judge's name, fails now."""
    score = load_judge(cfg.judge, device) if cfg.judge else None
    ids_only = tokenizer._replace(decode=list)  # generate then returns ids

    def write_texts(ema, num, **options):
        options = dict(batch_size=micro, dtype=cfg.dtype, seed=cfg.seed) | options
        rows = generate(ema.eval(), ids_only, cfg, num, canvas, **options)
        record = dict(samples=[tokenizer.decode(ids) for ids in rows])
        if score and any(rows):
            record["judge"] = judge_rows([ids for ids in rows if ids], tokenizer, score)
        return record

    return write_texts
