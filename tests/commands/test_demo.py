"""The README's promise, kept in CI: the demo, from nothing, as a newcomer runs it."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.corpus import ROOT, read_meta
from data.tokenizer import load_tokenizer

HERE = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_demo_learns_words(tmp_path):
    """Below 1.95 bits per character by two standard errors, and most of the sampled words are words."""
    out = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "train.py", f"--out_dir={out}"], cwd=HERE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    bits, error = map(
        float,
        re.search(r"validation: ([\d.]+) ± ([\d.]+) bits per character", done.stdout).groups(),
    )
    assert bits + 2 * error < 1.95, done.stdout
    samples = done.stdout.split("--- sample\n")[1:]
    assert len(samples) == 4 and f"python sample.py {out}/ckpt.pt" in samples[-1]

    ids = np.fromfile(ROOT / "pydocs" / "train.bin", np.uint16)
    text = load_tokenizer(read_meta("pydocs")["tokenizer"]).decode(ids.tolist())
    words = lambda s: re.findall(r"[a-z]{4,}", s.lower())
    known, sampled = set(words(text)), words(" ".join(samples).split("Next:")[0])
    assert len(sampled) > 100 and sum(w in known for w in sampled) > 0.6 * len(sampled)
