"""torchrun evaluate.py, sample.py and tasks.judge: two processes share the work, one prints, and
the output is that of one process."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, save, tiny_run

from configs import as_ar

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]


def run(launch, *words):
    """stdout of a command, run by `launch`."""
    argv = [*launch, *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def both(*words):
    """stdout of a command in one process, and in two."""
    return run([sys.executable], *words), run(LAUNCH, *words)


def close(one, two):
    """Records are equal, but figures within 1e-6: a network's rounding depends on the batch."""
    one, two = json.loads(one), json.loads(two)
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert two[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value)


@pytest.mark.slow
def test_two_processes_share_the_bound(checkpoint, corpus):
    one, two = both("evaluate.py", checkpoint, "--split", "val", "--windows", 9, "--json")
    assert one == two and json.loads(one)["forwards"] == 9
    resumed = run(LAUNCH, "evaluate.py", checkpoint, "--split", "val", "--resume", "--json")
    assert not list(checkpoint.parent.glob("*.partial"))
    close(run([sys.executable], "evaluate.py", checkpoint, "--split", "val", "--json"), resumed)


@pytest.mark.slow
def test_two_processes_share_the_samples(checkpoint):
    one, two = both("sample.py", checkpoint, "--num", 5, "--steps", 8, "--batch_size", 2)
    assert one == two and one.count("--- sample") == 5
    assert run(LAUNCH, "sample.py", checkpoint, "--steps", 8).count("\n") == 1  # one has nothing


@pytest.mark.slow
def test_two_processes_share_the_judging(checkpoint, corpus, tmp_path):
    judge = save(tmp_path / "ar.pt", as_ar(tiny_run(corpus)))
    words = "-m", "tasks.judge", checkpoint, judge, "--num", 9, "--steps", 8, "--json"
    one, two = run([sys.executable], *words), run([*LAUNCH[:-1], "-m", "--"], *words[1:])
    close(one, two)
