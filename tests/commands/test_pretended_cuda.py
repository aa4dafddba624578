"""The CUDA path as far as a CPU can show it: no device mix, few waits of the host for a GPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

TOOL = ROOT.parent / "shared" / "tools" / "pretended_cuda"
COMPILER = shutil.which("c++")


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """The answer of tests/pretended.py."""
    if not TOOL.exists() or not COMPILER:
        pytest.skip("needs ../shared/tools/pretended_cuda and a C++ compiler")
    library, torch_at = tmp_path_factory.mktemp("guard") / "guard.so", Path(torch.__file__).parent
    include, lib = torch_at / "include", torch_at / "lib"
    build = [COMPILER, "-std=c++20", "-shared", "-fPIC", f"-I{include}", str(TOOL / "guard.cpp")]
    build += ["-o", str(library), f"-L{lib}", "-lc10", "-ltorch_cpu"]
    subprocess.run(build, check=True)
    env = os.environ | dict(GUARD_SO=str(library), LD_LIBRARY_PATH=str(lib))
    env |= dict(LD_PRELOAD=str(library), PYTHONPATH=f"{TOOL}:{ROOT}", OMP_NUM_THREADS="1")
    script = [sys.executable, str(ROOT / "tests" / "pretended.py")]
    done = subprocess.run(script, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_step_waits_once_per_micro_batch(counted):
    for name, (pretended, on_cpu, waits) in counted["train"].items():
        assert waits == 2, name
        assert pretended == pytest.approx(on_cpu, rel=1e-5 if name != "bfloat16" else 1e-2), name


@pytest.mark.slow
def test_evaluation_and_samplers_wait_a_few_times_per_call(counted):
    forwards, waits = counted["evaluate"]
    assert forwards == 64 and waits <= 2 + 3 * 8  # 8 batches of 8 windows
    for name, (frames, waits) in counted["sample"].items():
        assert waits <= 6 * frames + 200, (name, frames, waits)  # of 200 steps
