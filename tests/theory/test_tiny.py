"""tiny.py: its loss and its sampler are ours, its bound is tight, and it fits one page."""

import ast
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from world import MASK, TEXTS, L, V, ancestral_law, chi_square_p, exact_model, random_joint

import tiny
from configs import Config
from diffusion import mdlm


def whole(model):
    """tiny's model(xt) -> logits (B, L, V), of a denoise-like model(x, t, at) -> (N, V)."""
    everywhere = lambda x: torch.ones_like(x, dtype=torch.bool)
    return lambda xt: model(xt, torch.zeros(len(xt)), everywhere(xt)).view(*xt.shape, V)


def test_the_loss_is_mdlm_of_the_same_masks():
    model, t = exact_model(random_joint()), torch.rand(200)
    x0 = TEXTS[torch.randint(len(TEXTS), (200,))]
    xt = torch.where(torch.rand(200, L) < t[:, None], MASK, x0)
    cfg = Config(vocab_size=V, seq_len=L, n_embd=8, n_head=2)
    ours = mdlm(model, x0, x0 >= 0, cfg, t.double(), xt).sum(-1)
    torch.testing.assert_close(tiny.loss(whole(model), x0, MASK, t, xt).float(), ours.float())


def test_its_bound_is_tight_for_the_exact_network():
    """With the exact network the mean over times and masks is -log p(x0)."""
    joint = random_joint()
    x0 = torch.tensor([[0, 2, 1]]).repeat(100_000, 1)
    nats = tiny.loss(whole(exact_model(joint)), x0, MASK)
    error = nats.std() / len(nats) ** 0.5
    assert abs(nats.mean() + joint[0, 2, 1].log()) < 4 * error and error < 0.1


@pytest.mark.parametrize("canvas", [[MASK] * L, [MASK, 1, MASK]])
def test_its_sampler_has_the_ancestral_law(canvas):
    model, steps, n = exact_model(random_joint(3)), 4, 20_000
    x = torch.tensor(canvas)
    *_, texts = tiny.sample(whole(model), x.expand(n, -1), steps, MASK)
    assert chi_square_p(texts, ancestral_law(model, x, "linear", steps)) > 1e-4


def test_it_is_one_page_that_imports_nothing_of_ours():
    source = (ROOT / "tiny.py").read_text(encoding="utf-8")
    lines = source.splitlines()
    assert len(lines) <= 100 and max(map(len, lines)) <= 100
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert imported <= {"torch", *sys.stdlib_module_names}


def test_importing_it_trains_nothing():
    code = "import tiny; assert not [v for v in vars(tiny).values() if isinstance(v, tiny.Net)]"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_its_tokens_spell_the_text():
    ids, strings = tiny.tokenize(merges=20)
    text = "".join(strings[i] for i in ids.tolist())
    assert set(text) == set(" abcdefghijklmnopqrstuvwxyz") and len(strings) == 27 + 20
    assert "the value of" in text and len(ids) < 0.9 * len(text)


@pytest.mark.slow
def test_it_learns(capsys):
    tiny.main(steps=600)
    out = capsys.readouterr().out
    bits = [float(line.split(": ")[1].split()[0]) for line in out.splitlines() if "bits" in line]
    assert len(bits) == 3 and bits[2] < bits[0] - 0.3 and bits[2] < 3
    assert "t = 0.25" in out and "_" not in out.split("t = 0.0\n")[1]
