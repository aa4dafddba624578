"""runs/slurm.sh and runs/torchrun.sh, with stand-ins for Slurm and torchrun that note their words:
what they start is a command that torchrun and train.py understand, on one node and on several."""

import os
import re
import subprocess
import time

import pytest
from conftest import ROOT
from torch.distributed.run import get_args_parser

from data.command_line import from_cli

MAIN = ["text8_mdlm", "lm1b_mdlm", "owt_mdlm", "owt_ar", "smdm_170 --flops=10", "smdm_1028_ar"]
STANDS_IN = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$NOTES"
case "$(basename "$0") $*" in
    "scontrol show hostnames"*) printf 'node7\\nnode8\\n' ;;
    srun*)
        echo $$ > "$NOTES.step"
        trap 'exit 143' TERM
        for _ in $(seq "${WORK:-0}"); do sleep 0.1; done ;;
    scancel*) kill -TERM "$(cat "$NOTES.step")" ;;
esac
"""


@pytest.fixture
def start(tmp_path):
    """start(script, words, **environment) -> (process, notes): what the script starts is noted."""
    for name in ("srun", "scontrol", "scancel", "torchrun"):
        (tmp_path / name).write_text(STANDS_IN)
        (tmp_path / name).chmod(0o755)

    def run(script, words, **environment):
        notes = tmp_path / "notes"
        path = f"{tmp_path}:{os.environ['PATH']}"
        job = dict(SLURM_JOB_ID="12", SLURM_NNODES="2", SLURM_JOB_NODELIST="node[7-8]")
        env = {**os.environ, **job, "PATH": path, "NOTES": str(notes), **environment}
        argv = ["bash", f"runs/{script}", *words.split()]
        return subprocess.Popen(argv, cwd=ROOT, env=env), notes

    return run


def parse(line):
    """(torchrun's options, Config, flags) of a noted line."""
    words = line.split("torchrun ")[1].split()
    options = get_args_parser().parse_args(words)
    assert options.training_script == "train.py"
    flags = [("resume", ""), ("overwrite", "")]
    return options, *from_cli(options.training_script_args, flags=flags)


@pytest.mark.parametrize("words", MAIN)
def test_scripts_start_what_train_understands(start, words):
    for script, environment in [("slurm.sh", {}), ("torchrun.sh", dict(NODES="4", HOST="node1"))]:
        process, notes = start(script, words, **environment)
        assert process.wait() == 0
        lines = [line for line in notes.read_text().splitlines() if "torchrun" in line]
        options, cfg, flags = parse(lines[0])
        assert len(lines) == 1 and flags.resume and cfg.out_dir == f"out/{words.split()[0]}"
        nodes, endpoint = ("2", "node7:29500") if script == "slurm.sh" else ("4", "node1:29500")
        assert (options.nnodes, options.rdzv_endpoint) == (nodes, endpoint)
        assert (options.nproc_per_node, options.rdzv_backend) == ("gpu", "c10d")
        notes.unlink()


def test_one_machine_needs_no_settings(start):
    process, notes = start("torchrun.sh", "owt_mdlm --seed=2", HOST="", NODES="")
    assert process.wait() == 0
    options, cfg, _ = parse(notes.read_text())
    assert (options.nnodes, options.rdzv_endpoint, cfg.seed) == ("1", "localhost:29500", 2)


def test_a_job_near_its_limit_saves_and_is_queued_again(start):
    """USR1 stops the step with SIGTERM, on which train.py saves; then the job is queued again."""
    process, notes = start("slurm.sh", "owt_mdlm", WORK="600")
    while not (notes.exists() and "srun" in notes.read_text()):
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(10)  # SIGUSR1
    assert process.wait(timeout=20) == 0
    lines = [line.split(" ")[0:2] for line in notes.read_text().splitlines()]
    assert lines[2:] == [["scancel", "--signal=TERM"], ["scontrol", "requeue"]]


def test_a_run_that_fails_fails_the_job(start, tmp_path):
    (tmp_path / "srun").write_text("#!/usr/bin/env bash\nexit 3\n")
    process, _ = start("slurm.sh", "owt_mdlm")
    assert process.wait() == 3


def test_slurm_is_asked_to_requeue_and_to_warn():
    text = (ROOT / "runs" / "slurm.sh").read_text()
    options = re.findall(r"^#SBATCH (--[\w-]+)", text, re.M)
    assert {"--requeue", "--signal", "--open-mode", "--nodes", "--gpus-per-node"} <= set(options)
    assert not re.search("partition|account|/home", text)
