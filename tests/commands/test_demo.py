"""The README's promise, kept in CI: the demo, from nothing, as a newcomer runs it, and then the
commands that it names. All tests share one run; see conftest.py."""

import json
import re

import numpy as np
import pytest

import evaluate
import sample
from data.corpus import ROOT, read_meta
from data.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow


def words_of(text):
    return re.findall(r"[a-z]{4,}", text.lower())


@pytest.fixture(scope="module")
def known():
    """The words of the demo's training text."""
    ids = np.fromfile(ROOT / "pydocs" / "train.bin", np.uint16)
    return set(words_of(load_tokenizer(read_meta("pydocs")["tokenizer"]).decode(ids.tolist())))


def assert_words(text, known, least):
    """The text has at least so many words of four letters or more, and most are words."""
    words = words_of(text)
    assert len(words) > least and sum(word in known for word in words) > 0.6 * len(words), text


def test_the_demo_learns(demo):
    """Below 1.95 bits per character by two standard errors."""
    bits, error = demo.bits
    assert bits + 2 * error < 1.95, demo.output


def test_the_demos_samples_hold_words(demo, known):
    samples = demo.output.split("--- sample\n")[1:]
    assert len(samples) == 4
    assert_words(" ".join(samples).split("Next:")[0], known, 100)


def test_the_demo_names_the_commands_that_come_next(demo):
    for command in ("sample.py", "evaluate.py"):
        assert f"python {command} {demo.folder}/ckpt.pt" in demo.output


def test_evaluate_finds_the_demos_bound(demo, capsys):
    """On the validation split, with other masks: within four standard errors of the difference."""
    evaluate.main([str(demo.folder), "--split", "val", "--seed", "1", "--json"])
    out = json.loads(capsys.readouterr().out)
    bits, error = demo.bits
    assert abs(out["bits_per_char"] - bits) < 4 * 2**0.5 * error
    assert 0 < out["bits_per_char_se"] < 2 * error


def test_the_demo_continues_a_prompt_at_any_length(demo, known, capsys):
    """In sub-word tokens: the prompt, then words, over several windows."""
    prompt = "The function returns a"
    argv = [str(demo.folder), "--prompt", prompt, "--semi_ar", "--length", "600", "--steps", "64"]
    sample.main(argv)
    out = capsys.readouterr().out
    assert out.startswith(prompt)
    assert_words(out, known, 60)


def test_the_demo_fills_holes(demo, capsys):
    sample.main([str(demo.folder), "--infill", "Return a list [8] of the string.", "--num", "4"])
    texts = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("Return a list") for line in texts) == 4
    assert sum(line.endswith(" of the string.") for line in texts) == 4
