"""Runs under torchrun: its processes meet again after one was killed, and end with torchrun."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from attack import digest
from conftest import ROOT, tiny_run

import train
from common import UserError
from data import processes
from data.checkpoints import read_checkpoint


@pytest.fixture
def job(monkeypatch):
    """The store that torchrun keeps over restarts; its processes are threads."""
    store, ranks = dist.HashStore(), threading.local()
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(store, ranks.rank, 3)]))
    monkeypatch.setattr(processes, "job", None)

    def meet(*started):
        """The stores in which the processes of these ranks meet."""
        found = {}

        def run(rank):
            ranks.rank = rank
            found[rank] = processes.meet()[0]

        threads = [threading.Thread(target=run, args=[rank], daemon=True) for rank in started]
        for thread in threads:
            thread.start()
            time.sleep(0.1)
        for thread in threads:
            thread.join(10)
        return found

    return store, meet


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_processes_meet_where_no_dead_one_has_been(job, order):
    """Earlier attempts, complete or not, leave words and addresses in torchrun's store."""
    store, meet = job
    first = meet(0, 1, 2)
    first[1].set("address", "of a process that is dead")
    assert first[0].get("address") == first[2].get("address")
    store.set("word of 1", "of a process that was killed before they met")
    again = meet(*order)
    assert len(again) == 3 and not again[0].check(["address"])
    again[2].set("address", "new")
    assert again[0].get("address") == again[1].get("address") == b"new"


def test_a_restarted_run_resumes_its_own_and_no_other(job, corpus, tmp_path, monkeypatch):
    cfg = replace(tiny_run(corpus), out_dir=str(tmp_path / "run"), samples=0)
    train.main(cfg)  # of somebody else
    store, _ = job
    monkeypatch.setattr(processes, "job", store)
    with pytest.raises(UserError, match="holds a run"):
        train.main(replace(cfg, steps=16))
    train.main(replace(cfg, steps=16), overwrite=True)
    (tmp_path / "run" / "best.pt").unlink()
    train.main(replace(cfg, steps=20), overwrite=True)  # started again with the same options
    assert read_checkpoint(tmp_path / "run")["step"] == 20
    log = tmp_path / "run" / "log.jsonl"
    lines = log.read_text()
    assert '"step": 12' in lines  # those of the first start are still there
    assert lines.count("final") == 2 and json.loads(lines.splitlines()[-1])["step"] == 20
    train.main(replace(cfg, steps=20), overwrite=True)  # killed after its last line
    assert log.read_text() == lines


def test_processes_that_do_not_meet_end():
    """With one line, so that torchrun starts them again."""
    code = "import time; from data.processes import give_up_after\n"
    code += "with give_up_after(0.2): time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: the processes have not met within 0.2 s\n"


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.05)


def is_alive(pid):
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
def test_torchrun_continues_a_run_after_kill_9_and_takes_its_processes_along(corpus, tmp_path):
    """One rank is killed twice: the run ends equal to the bit. Then torchrun itself is killed."""
    cfg = replace(tiny_run(corpus), steps=200, save_every=10, eval_every=100, samples=0)
    launch = "-m torch.distributed.run --standalone --nproc_per_node=2 --max-restarts=3 train.py"

    def start(name, **changes):
        fields = vars(replace(cfg, out_dir=str(tmp_path / name), **changes))
        options = [f"--{field}={value}" for field, value in fields.items()]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        argv = [sys.executable, *launch.split(), *options]
        return subprocess.Popen(argv, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)

    def steps(name):
        path = tmp_path / name / "ckpt.pt"
        return read_checkpoint(path)["step"] if path.exists() else 0

    assert start("whole").wait() == 0
    run = start("killed")
    for rank, step in enumerate((10, 50)):
        wait_for(lambda step=step: steps("killed") >= step)
        os.kill(children(run.pid)[rank], signal.SIGKILL)
    assert run.wait(120) == 0
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")

    run = start("orphans", steps=10**6)
    wait_for(lambda: steps("orphans") >= 10)
    workers = children(run.pid)
    assert len(workers) == 2
    run.kill()
    run.wait()
    wait_for(lambda: not any(map(is_alive, workers)), seconds=5)
