"""wandb and tensorboard beside a run's log.jsonl: each is (send(record), finish(exit_code))."""

import os
from dataclasses import asdict
from pathlib import Path

from common import fail, one_line

DEFAULTS = dict(project="nanomdlm", name=None, id=None, resume="allow")  # of wandb.init
VARIABLES = dict(id="WANDB_RUN_ID")  # the others are WANDB_PROJECT, WANDB_NAME, WANDB_RESUME


def start_trackers(cfg, step):
    """{name: (send, finish)} of the trackers that cfg selects, or one line on why there is none."""
    trackers = {}
    if cfg.wandb:
        trackers["wandb"] = start_wandb(cfg, step)
    if cfg.tensorboard:
        trackers["tensorboard"] = start_tensorboard(cfg, step)
    return trackers


def wandb_options(cfg, step):
    """Options of wandb.init: an environment variable of wandb's wins over ours. A resumed run
    continues the run whose id its folder holds."""
    path = Path(cfg.out_dir) / "wandb_id.txt"
    options = DEFAULTS | dict(name=Path(cfg.out_dir).name)
    if step and path.exists():
        options["id"] = path.read_text(encoding="utf-8").strip()
    variable = lambda option: VARIABLES.get(option, f"WANDB_{option.upper()}")
    return {
        option: value for option, value in options.items() if variable(option) not in os.environ
    }


def start_wandb(cfg, step):
    try:
        import wandb

        run = wandb.init(config=asdict(cfg), **wandb_options(cfg, step))
    except Exception as e:  # not installed, not logged in, no network: each raises another type
        fail(f"wandb=True: {one_line(e)}; WANDB_MODE=offline needs no account")

    def send(record):
        """wandb ignores steps before its last one: a resumed run makes the same ones again."""
        if texts := record.get("samples"):
            table = wandb.Table(columns=["step", "text"], data=[[record["step"], t] for t in texts])
            record = record | dict(samples=table)
        run.log(record, step=record["step"])
        if not (path := Path(cfg.out_dir) / "wandb_id.txt").exists():
            path.write_text(f"{run.id}\n", encoding="utf-8")

    return send, lambda exit_code: run.finish(exit_code=exit_code)


def start_tensorboard(cfg, step):
    """Writes to out_dir/tensorboard; a resumed run replaces what came after its checkpoint."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        fail("tensorboard=True: needs tensorboard: pip install tensorboard")
    writer = None

    def send(record):
        nonlocal writer
        if writer is None:  # the run's folder exists by now
            folder = Path(cfg.out_dir) / "tensorboard"
            writer = SummaryWriter(str(folder), purge_step=step + 1)
        for name, value in flatten(record).items():
            if isinstance(value, str):
                writer.add_text(name, value, record["step"])
            else:
                writer.add_scalar(name, value, record["step"])
        writer.flush()

    return send, lambda exit_code: writer and writer.close()


def flatten(record, prefix=""):
    """{name: number or text} of nested dicts and lists, without the step: val/nats, samples/0."""
    flat = {}
    for name, value in record.items():
        if isinstance(value, list):
            value = {str(i): item for i, item in enumerate(value)}
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}/")
        elif prefix + name != "step":
            flat[prefix + name] = value
    return flat
