"""tiny.py: its loss and its sampler are ours, its bound is tight, and it fits one page."""

import ast
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from world import (
    MASK,
    TEXTS,
    L,
    V,
    ancestral_law,
    chi_square_p,
    exact_model,
    hostile_model,
    ones,
    random_joint,
)

import tiny
from configs import Config
from diffusion import mdlm

ROOT = Path(tiny.__file__).parent


def hostile(x, t, at):
    """An arbitrary network that ignores t, as tiny's does; sometimes sure of a wrong token."""
    return hostile_model()(x, torch.full_like(t, 0.3), at)


def whole(model):
    """tiny's model(xt) -> logits (B, L, V), of a world's model(x, t, at) -> (N, V)."""
    return lambda xt: model(xt, torch.zeros(len(xt)), ones(xt)).view(*xt.shape, V)


def test_the_loss_is_mdlm_of_the_same_times_and_masks():
    x0, t = TEXTS[torch.randint(len(TEXTS), (500,))], torch.rand(500)
    xt = torch.where(torch.rand(500, L) < t[:, None], MASK, x0)
    cfg = Config(vocab_size=V, seq_len=L, n_embd=8, n_head=2)
    ours = mdlm(hostile, x0, ones(x0), cfg, t.double(), xt).sum(-1)
    got = tiny.loss(whole(hostile), x0, MASK, t, xt)
    torch.testing.assert_close(got.float(), ours.float(), rtol=1e-6, atol=1e-6)


def test_its_bound_is_tight_for_the_exact_network():
    """With the exact network the mean over its own times and masks is -log p(x0)."""
    joint = random_joint()
    x0 = torch.tensor([[0, 2, 1]]).repeat(100_000, 1)
    nats = tiny.loss(whole(exact_model(joint)), x0, MASK)
    error = nats.std() / len(nats) ** 0.5
    assert abs(nats.mean() + joint[0, 2, 1].log()) < 4 * error and error < 0.1


def test_its_times_fill_every_stratum_and_each_token_is_masked_with_probability_t():
    """A blind guess costs log V, so the loss is log V x masks / t and gives t away."""
    B, length, seen = 64, 5000, []
    blind = lambda xt: seen.append(xt) or torch.zeros(*xt.shape, V)
    for _ in range(10):
        x0 = torch.randint(V, (B, length))
        nats = tiny.loss(blind, x0, MASK)
        masked = seen[-1] == MASK
        assert (masked | (seen[-1] == x0)).all()
        t = (math.log(V) * masked.sum(1) / nats).nan_to_num(1e-9)  # no mask: t is near 0
        assert (t * B).floor().tolist() == list(range(B))
        error = (length * t * (1 - t)).sqrt().clamp(min=1)
        assert ((masked.sum(1) - length * t) / error).abs().max() < 5


@pytest.mark.parametrize("steps", [1, 4])
def test_its_sampler_has_the_ancestral_law(steps):
    """From all masks, a prompt, a suffix, a hole and two holes, side by side in one batch."""
    canvases = torch.tensor([[3, 3, 3], [1, 3, 3], [3, 3, 2], [0, 3, 2], [3, 1, 3]])
    x = canvases.repeat(20_000, 1)
    frames = list(tiny.sample(whole(hostile), x, steps, MASK))
    assert len(frames) == steps and (x == canvases.repeat(20_000, 1)).all()  # not written to
    for i, canvas in enumerate(canvases):
        law = ancestral_law(hostile, canvas, "linear", steps)
        p = chi_square_p(frames[-1][i :: len(canvases)], law)
        assert p > 1e-4, f"{canvas.tolist()}: p = {p:.2g}"


def test_its_masks_disappear_evenly():
    """After n of 5 steps a token is visible with probability n / 5."""
    blind = lambda xt: torch.zeros(*xt.shape, V)
    x = torch.full((100, 1000), MASK)
    for n, xt in enumerate(tiny.sample(blind, x, 5, MASK), start=1):
        visible = (xt != MASK).double().mean().item()
        assert abs(visible - n / 5) <= 5 * (n / 5 * (1 - n / 5) / x.numel()) ** 0.5


def test_its_network_sees_both_sides_and_never_answers_mask():
    torch.manual_seed(0)
    model, xt = tiny.Net(V=5), torch.randint(6, (1, 40))
    logits = model(xt)
    assert logits.shape == (1, 40, 5)
    for changed in (0, 39):
        other = xt.clone()
        other[0, changed] = (xt[0, changed] + 1) % 6
        assert ((model(other) - logits).abs().amax(-1) > 0).all()  # every position notices
    assert (model(xt.flip(1)).flip(1) - logits).abs().max() > 0.01  # and their order matters


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
    """No output, no network left behind, and no backward pass or tokens."""
    code = (
        "import torch; torch.Tensor.backward = torch.tensor = None; import tiny; "
        "assert not [v for v in vars(tiny).values() if isinstance(v, (tiny.Net, torch.Tensor))]"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_its_tokens_spell_the_text():
    ids, strings = tiny.tokenize(V=47)
    text = "".join(strings[i] for i in ids.tolist())
    assert set(text) == set(" abcdefghijklmnopqrstuvwxyz") and len(set(strings)) == 47
    assert "the value of" in text and len(ids) < 0.9 * len(text)
    assert ids.min() >= 0 and ids.max() < 47


@pytest.mark.slow
def test_it_learns(capsys):
    tiny.main(steps=600)
    out = capsys.readouterr().out
    bits = [float(line.split(": ")[1].split()[0]) for line in out.splitlines() if "bits" in line]
    assert len(bits) == 3 and bits[2] < bits[0] - 0.2 and bits[2] < 3
    assert "t = 0.25" in out and "_" not in out.split("t = 0.0\n")[1]
