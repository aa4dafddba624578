"""What the tasks share: runs that are trained once, tables, plots and timings.

`train_if_missing` and `evaluate_final` make an experiment resumable: it trains only the runs that
are missing. `start_processes` gives each case of a benchmark its own process, so that memory is
measured per case and the cases run in turns.
"""

import contextlib
import multiprocessing
import re
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

import data.runs
import train
from common import UserError, autocast, fail, to_json
from configs import as_ar, as_d3pm, as_sedd
from data.checkpoints import load
from data.corpus import read_split
from data.processes import local_device
from diffusion import denoiser, row_generators
from evaluate import bound, report
from samplers import cached_denoiser

# --------------------------------------------------------------------------------------------------
# Runs

VARIANTS = {"ar": as_ar, "mdlm": lambda cfg: cfg, "sedd": as_sedd, "d3pm": as_d3pm}
MAY_CHANGE = data.runs.MAY_CHANGE - {"data", "steps"}  # fields in which a finished run may differ


def make_runs(cfg, variant, seeds, name=None):
    """Configs of one of VARIANTS, or of a loss that is none, with the seeds cfg.seed, cfg.seed + 1,
    ...; the folder of a run is <name>_<seed> in out_dir. The name is the variant's unless given."""
    name = name or variant
    change = VARIANTS.get(variant, lambda cfg: replace(cfg, loss=variant))
    try:
        return [
            replace(change(cfg), seed=seed, out_dir=f"{cfg.out_dir}/{name}_{seed}")
            for seed in range(cfg.seed, cfg.seed + seeds)
        ]
    except ValueError as e:  # a field that the variant does not allow
        fail(f"{name}: {e}")


def train_if_missing(cfg):
    """Train cfg unless its folder holds the finished run. A stopped run is resumed."""
    path = Path(cfg.out_dir) / "ckpt.pt"
    if path.exists():
        model, saved = load(path)
        now, before = asdict(cfg), asdict(saved)
        changed = ", ".join(f for f in now if now[f] != before[f] and f not in MAY_CHANGE)
        if changed:
            fail(f"{path}: trained with another {changed}; use another --out_dir or delete it")
        if model.step == cfg.steps:
            return
    train.main(cfg, resume=True)


def evaluate_final(cfg, passes):
    """`evaluate.report` of a finished run: its averaged weights on the whole validation split."""
    model, _ = load(cfg.out_dir, device=local_device(cfg), dtype=cfg.dtype)
    ids, meta = read_split(cfg.data, "val", cfg)
    where, passes = f"{cfg.data}/val.bin", 1 if cfg.causal else passes
    settings = dict(T=cfg.T, passes=passes, batch_size=cfg.micro_batch, dtype=cfg.dtype)
    return report(bound(model, ids, meta, cfg, where, **settings), meta, "val")


def settle_mode_options(args, modes, mode, misplaced):
    """Fill in and check options that only some modes have: modes is {mode: {option: default}}, and
    an option that was not given is None. The options of `mode` get their defaults; an option of
    another mode fails with --OPTION: misplaced."""
    for option in sorted({option for options in modes.values() for option in options}):
        if getattr(args, option) is None:
            setattr(args, option, modes[mode].get(option))
        elif option not in modes[mode]:
            fail(f"--{option}: {misplaced}")


# --------------------------------------------------------------------------------------------------
# Tables and plots


def mean_error(values):
    """Standard error of the mean of independent values; 0 for a single one."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def format_mean(values, digits=3):
    """The mean over seeds ± its standard error; without the error for a single seed."""
    error = f" ± {mean_error(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{error}"


def to_markdown(*rows):
    """A Markdown table of rows of strings; the first row is the head."""
    head, *body = ("| " + " | ".join(row) + " |\n" for row in rows)
    return head + "|---" * len(rows[0]) + "|\n" + "".join(body)


def format_value(value):
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def format_rows(rows, as_json):
    """Dicts as an aligned text table with a column per key, or as one JSON line each."""
    if as_json:
        return "\n".join(map(to_json, rows))
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [keys] + [[format_value(row.get(key, "")) for key in keys] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for first, *others in cells:
        aligned = [text.rjust(width) for text, width in zip(others, widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *aligned]))
    return "\n".join(lines)


def check_picture(option, path):
    """The folder of a picture must exist before the work that it shows is done."""
    if path and not Path(path).absolute().parent.is_dir():
        fail(f"{option} {path}: no such folder")


def import_pyplot(name):
    """matplotlib.pyplot for drawing into files. Without matplotlib: None, and a hint that the
    picture `name` is missing."""
    try:
        import matplotlib
    except ImportError:
        print(f"no {name}: pip install matplotlib")
        return None
    matplotlib.use("Agg")  # needs no screen
    from matplotlib import pyplot

    return pyplot


# --------------------------------------------------------------------------------------------------
# Timings


def blank_canvas(cfg, device, *shape):
    """A canvas (N, L) of masks. If the model always gets its first token, that is token 0."""
    canvas = torch.full(shape, cfg.mask_id, device=device)
    canvas[:, : cfg.bos] = 0
    return canvas


def time_sampling(sampling, model, cfg, canvas, dtype, first=0):
    """(seconds, network calls, rows through the head) of sampling(denoise, canvas, gen), which
    yields canvases. The texts have the numbers first, first + 1, ...: a text's number seeds its
    noise and so decides in which steps the network is called."""
    calls, head_rows = 0, 0
    denoise = (cached_denoiser if cfg.causal else denoiser)(model, cfg)

    def denoise_and_count(x, t, at):
        nonlocal calls, head_rows
        calls += 1
        head_rows += int(at.sum())
        return denoise(x, t, at)

    gen = row_generators(0, range(first, first + len(canvas)))
    start = time.perf_counter()
    with autocast(canvas.device, dtype):
        for x in sampling(denoise_and_count, canvas, gen):
            x.sum().item()  # synchronises with a GPU, as a viewer of the frames would
    return time.perf_counter() - start, calls, head_rows


def peak_memory():
    """Peak memory of this process in MB. Not ru_maxrss on Linux, where a child inherits it."""
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**10
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # a Mac counts bytes


def run_target(target, pipe, *args):
    """Run target(pipe, *args) and send the first line of its error, above all "out of memory"."""
    try:
        target(pipe, *args)
    except (RuntimeError, ImportError, UserError) as e:
        pipe.send(str(e).splitlines()[0])
    except EOFError:  # the parent has failed because of another case
        pass


@contextlib.contextmanager
def start_processes(target, cases):
    """Start a process for each of cases {name: args}: target(pipe, *args, threads). Yields
    request(name, message), which sends a message and returns the answer. The last message is 0."""
    spawn, processes = multiprocessing.get_context("spawn"), {}
    for name, args in cases.items():
        pipe, child_pipe = spawn.Pipe()
        args = (target, child_pipe, *args, torch.get_num_threads())
        process = spawn.Process(target=run_target, args=args, daemon=True)
        process.start()
        child_pipe.close()
        processes[name] = pipe, process

    def request(name, message):
        pipe, process = processes[name]
        try:
            pipe.send(message)
            answer = pipe.recv()
        except (EOFError, OSError):
            process.join()
            killed = ", probably out of memory" if process.exitcode == -9 else ""
            fail(f"{name}: its process ended with exit code {process.exitcode}{killed}")
        if isinstance(answer, str):
            fail(f"{name}: {answer}")
        return answer

    yield request
    for pipe, process in processes.values():
        pipe.send(0)
        process.join()
