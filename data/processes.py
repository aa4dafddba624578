"""The processes that torchrun starts: how they meet, also after one was killed, and how they end.
With --max-restarts=N torchrun starts all of them again when one dies.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
import uuid
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from common import fail, pick_device

MEET_WITHIN = 120  # seconds; torch would wait for half an hour
WAIT_AT_MOST = timedelta(hours=1)  # while one process writes a large checkpoint
job = None  # torchrun's key-value store, which outlives the processes; None without torchrun


@contextlib.contextmanager
def process_group(cfg):
    """The process group of torchrun's processes; without torchrun, nothing."""
    if not dist.is_torchelastic_launched():
        if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            fail("srun started several processes that do not know of each other; let it start one"
                 " torchrun per machine: runs/ has examples")  # fmt: skip
        yield
        return
    die_with_parent()
    if (device := local_device(cfg)).type == "cuda":
        torch.cuda.set_device(device)
    with give_up_after(MEET_WITHIN):
        store, rank, world = meet()
        options = dict(store=store, rank=rank, world_size=world, timeout=WAIT_AT_MOST)
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device, **options)
        else:
            dist.init_process_group("gloo", **options)
        dist.barrier()
    yield
    dist.destroy_process_group()


def meet():
    """(store, rank, number of processes): a store for these processes only. torchrun's own keeps
    what earlier ones wrote, also the addresses of dead processes, and whoever dials one hangs. So
    rank 0 draws a new name and sends it to each process that has stored a fresh word."""
    global job
    job, rank, world = next(dist.rendezvous("env://"))
    name, word = uuid.uuid4().hex, uuid.uuid4().hex
    if rank:
        job.set(f"word of {rank}", word)
        name = job.get(f"answer to {word}").decode()
        job.add(f"arrived at {name}", 1)
    while not rank and job.add(f"arrived at {name}", 0) < world - 1:
        for other in range(1, world):  # again and again: a word may be that of a dead process
            if job.check([f"word of {other}"]):
                job.set(f"answer to {job.get(f'word of {other}').decode()}", name)
        time.sleep(0.05)
    return dist.PrefixStore(name, job), rank, world


@contextlib.contextmanager
def give_up_after(seconds):
    """End the process if the block takes longer: then torchrun can start all of them again."""

    def end():
        sys.stderr.write(f"error: the processes have not met within {seconds} s\n")
        sys.stderr.flush()
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def die_with_parent():
    """On Linux: a killed torchrun takes its processes along. Otherwise they keep running and
    lock the run's folder."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


# Whose run is in a folder? A job that is started again resumes its own, whatever its options say.


def take_over(out):
    if job:
        job.set(f"run in {Path(out).resolve()}", "")


def is_ours(out):
    return bool(job) and job.check([f"run in {Path(out).resolve()}"])


# --------------------------------------------------------------------------------------------------
# Sharing work


def local_device(cfg):
    """This process's device: cuda:LOCAL_RANK under torchrun on GPUs, otherwise that of cfg."""
    on_cuda = cfg.device.startswith("cuda") or cfg.device == "auto" and torch.cuda.is_available()
    if dist.is_torchelastic_launched() and on_cuda:
        return pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
    return pick_device(cfg.device)


def rank_and_world():
    """(rank, number of processes); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(items):
    """This process's part of the items: every world-th, from its rank on."""
    rank, world = rank_and_world()
    return items[rank::world]


def gather(part):
    """The inverse of `share`, on all processes: a list of the items of all in their order."""
    if (world := rank_and_world()[1]) == 1:
        return list(part)
    dist.all_gather_object(parts := [None] * world, list(part))
    items = [None] * sum(map(len, parts))
    for rank, part in enumerate(parts):
        items[rank::world] = part
    return items
