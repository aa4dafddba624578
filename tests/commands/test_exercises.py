"""docs/exercises.md: the tests of the ten exercises. A test takes the reader's code from the file
that the exercise names, else the page's solution. And the promise of the README's "Extending": what
they add is found by the command line, by the benchmarks and by the tests."""

import importlib
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, tiny_run
from world import (
    MASK,
    TEXTS,
    V,
    chi_square_p,
    exact_model,
    expected_loss,
    hostile_model,
    last,
    random_joint,
    tiny,
)

import configs
import data.corpus
import data.prepare
import diffusion
import evaluate
import sample
import samplers
import train
from data.command_line import from_cli
from diffusion import alpha, dalpha, denoiser, mdlm, row_generators
from tasks import bench, compare

PAGE = (ROOT / "docs" / "exercises.md").read_text(encoding="utf-8")
SOLUTIONS = re.findall(r"^## (\d+)\..*?```python\n(.*?)```", PAGE, re.M | re.S)
REGISTRIES = [
    diffusion.SCHEDULES, diffusion.TIME_LAWS, diffusion.LOSSES, samplers.SAMPLERS,
    configs.CONFIGS, data.prepare.DATASETS, data.corpus.NAMES,
]  # fmt: skip
JOINT = random_joint()


@pytest.fixture(autouse=True)
def restored():
    """The registries are afterwards what they were before."""
    before = [dict(registry) for registry in REGISTRIES]
    yield
    for registry, entries in zip(REGISTRIES, before):
        registry.clear()
        registry.update(entries)


def solve(number, name, registry=None):
    """What the exercise asks for: the reader's, or what the page's solution makes."""
    if registry is None and (ROOT / "my_exercises.py").exists():
        mine = importlib.import_module("my_exercises")
        if hasattr(mine, name):
            return getattr(mine, name)
    names = {}
    if registry is None or name not in registry:
        exec(dict(SOLUTIONS)[str(number)], names)
    return names[name] if registry is None else registry[name]


def test_there_are_ten_exercises():
    assert [int(number) for number, _ in SOLUTIONS] == list(range(1, 11))
    assert re.findall(r"^## (\d+)\.", PAGE, re.M) == [number for number, _ in SOLUTIONS]
    for number in range(1, 11):
        assert f"test_exercise_{number}" in globals()


def test_exercise_1():
    visible = solve(1, "visible")
    assert visible.keys() == diffusion.SCHEDULES.keys() and visible["linear"] == 0.5
    assert visible["cosine"] == pytest.approx(0.5**0.5) and visible["poly2"] == 0.75


def test_exercise_2():
    solve(2, "poly3", diffusion.SCHEDULES)
    t = torch.linspace(0, 1, 21, dtype=torch.float64, requires_grad=True)
    a = alpha("poly3", t)
    assert a[0] == 1 and a[-1] == 0 and a[10] == 0.875
    slope = torch.autograd.grad(a.sum(), t)[0]
    torch.testing.assert_close(dalpha("poly3", t.detach()), slope)
    bound = expected_loss(
        "mdlm", exact_model(JOINT), torch.tensor([0, 2, 1]), tiny(schedule="poly3")
    )
    assert bound == pytest.approx(-JOINT[0, 2, 1].log().item(), abs=1e-5)


def test_exercise_3():
    law = solve(3, "late", diffusion.TIME_LAWS)
    t = law((torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000)
    assert (t.diff() > 0).all() and 0 <= t.min() and t.max() < 1
    assert t.mean() == pytest.approx(2 / 3, abs=1e-3)


def test_exercise_4():
    my_loss, model = solve(4, "my_loss"), hostile_model()
    x0, t = torch.randint(0, V, (50, 3)), torch.rand(50, dtype=torch.float64)
    xt = x0.masked_fill(torch.rand(50, 3) < t[:, None], MASK)
    expected = mdlm(model, x0, x0 >= 0, tiny(), t, xt)
    got = my_loss(model, x0, xt, t, MASK)
    torch.testing.assert_close(got, expected, check_dtype=False, rtol=1e-5, atol=1e-5)


def test_exercise_5():
    my_bound = solve(5, "my_bound")
    for x0 in TEXTS[::5]:
        expected = -JOINT[tuple(x0)].log().item()
        assert float(my_bound(exact_model(JOINT), x0, MASK)) == pytest.approx(expected, abs=1e-5)


def test_exercise_6():
    """Above mdlm by the price of log Z, which shifts of the logits change."""
    solve(6, "mdlm_z", diffusion.LOSSES)
    cfg, text = tiny(loss="mdlm_z"), torch.tensor([0, 2, 1])
    for shift in (0.0, 3.0):
        model = lambda x, t, at, shift=shift: exact_model(JOINT)(x, t, at) + shift
        z = shift - torch.tensor(float(V)).log().item()
        price = expected_loss("mdlm_z", model, text, cfg) - expected_loss(
            "mdlm", model, text, tiny()
        )
        assert price == pytest.approx(3 * 0.01 * z**2, abs=1e-5)


def test_exercise_7(capsys):
    solve(7, "pydocs_wide", configs.CONFIGS)
    cfg, _ = from_cli(["pydocs_wide", "--steps-per-warmup=60"])
    assert (cfg.n_embd, cfg.steps, cfg.warmup, cfg.out_dir) == (512, 600, 10, "out/pydocs_wide")
    with pytest.raises(SystemExit):
        from_cli(["pydocs_wide", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "pydocs_wide" in out and "--steps_per_warmup STEPS_PER_WARMUP [30]" in out


def test_exercise_8(tmp_path, capsys):
    solve(8, "zen", data.prepare.DATASETS)
    data.prepare.main(["zen", "--out", str(tmp_path / "zen")])
    meta = data.corpus.read_meta(str(tmp_path / "zen"))
    assert sum(split["characters"] for split in meta["splits"].values()) == 20 * 856
    assert "now train on it: python train.py pydocs_mdlm" in capsys.readouterr().out


def test_exercise_9():
    with_top_k = solve(9, "with_top_k")
    log_p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]).log()
    shaped = with_top_k(lambda x, t, at: log_p, 2)(None, None, None).exp()
    torch.testing.assert_close(shaped, torch.tensor([[5 / 8, 3 / 8, 0], [0, 2 / 9, 7 / 9]]))


def test_exercise_10():
    """One token per step has the joint law; all at once, the product of the marginals."""
    sampler = solve(10, "chunks", samplers.SAMPLERS)
    denoise, x = denoiser(exact_model(JOINT), tiny()), torch.full((20_000, 3), MASK)
    one = [JOINT.sum((1, 2)), JOINT.sum((0, 2)), JOINT.sum((0, 1))]
    product = torch.stack([one[0][a] * one[1][b] * one[2][c] for a, b, c in TEXTS.tolist()])
    for steps, law in ((1, product), (3, JOINT.flatten()), (7, JOINT.flatten())):
        assert chi_square_p(last(sampler(denoise, x, steps, tiny())), law) > 1e-4
    canvas = torch.tensor([[0, MASK, 2], [MASK, MASK, MASK]])
    frames = list(sampler(denoise, canvas, 2, tiny(), row_generators(0, range(2))))
    assert [(frame == MASK).sum(-1).tolist() for frame in frames] == [[0, 1], [0, 0]]
    assert (canvas == MASK).sum() == 4 and all(
        (f[0, [0, 2]] == canvas[0, [0, 2]]).all() for f in frames
    )


# --------------------------------------------------------------------------------------------------
# Extending


@pytest.fixture
def extended():
    """One more schedule, loss, config, data set and sampler, each in ten lines."""
    for number in (2, 6, 7, 8, 10):
        code = dict(SOLUTIONS)[str(number)]
        assert len([line for line in code.splitlines() if line and "import" not in line]) <= 12
        exec(code, {})


def test_the_command_line_finds_them(extended, tmp_path, capsys):
    """Prepare the data set, train the config with the loss and the schedule, sample, measure."""
    folder, out = str(tmp_path / "zen"), str(tmp_path / "run")
    data.prepare.main(["zen", "--out", folder])
    size = "--n_embd=32 --seq_len=32 --batch_size=8 --micro_batch=8 --steps=4 --samples=1".split()
    law = ["--loss=mdlm_z", "--schedule=poly3", f"--out_dir={out}", "--device=cpu"]
    train.command_line(["pydocs_wide", f"--data={folder}", *size, *law])
    assert "loss=mdlm_z" in capsys.readouterr().out
    sample.main([out, "--sampler", "chunks", "--steps", "4"])
    assert len(capsys.readouterr().out) == 33
    assert evaluate.main([out, "--json"])["nats"] < 6
    capsys.readouterr()
    bench.main(["sample", out, "--steps", "4", "--repeats", "1", "--batch_size", "2"])
    table = capsys.readouterr().out
    assert all(re.search(rf"^{name} ", table, re.M) for name in samplers.SAMPLERS if name != "ar")


@pytest.mark.slow
def test_compare_finds_the_loss(extended, corpus, tmp_path, capsys):
    cfg = replace(tiny_run(corpus), cond_dim=0, steps=2, out_dir=str(tmp_path))
    results = compare.main(cfg, seeds=1, passes=1)
    assert list(results) == ["ar", "mdlm", "sedd", "d3pm", "mdlm_z"]
    assert "mdlm_z" in (tmp_path / "table.md").read_text()


ADD = "import pathlib, re; page = pathlib.Path('docs/exercises.md').read_text(); solutions = dict(\
re.findall(r'^## (\\d+)\\..*?```python\\n(.*?)```', page, re.M | re.S))\n"


@pytest.mark.slow
def test_the_tests_find_them(tmp_path):
    """Tests of the theory are collected for the new schedule, loss and sampler, and run. The
    sampler fails one of them, which says what it needs: its law."""
    plugin = tmp_path / "extend.py"
    plugin.write_text(ADD + "for n in '2', '6', '10':\n    exec(solutions[n], {})\n")
    argv = ["-m", "pytest", "-n", "0", "-q", "-p", "extend", "tests/theory/test_losses.py"]
    argv += ["tests/theory/test_samplers.py", "-k", "poly3 or mdlm_z or chunks"]
    done = subprocess.run(
        [sys.executable, *argv], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    failed = re.findall(r"^FAILED \S+::(\w+)\[(.*?)\]", done.stdout, re.M)
    assert {name for name, _ in failed} == {"test_law_equals_the_enumerated_one"}
    assert all("chunks" in case for _, case in failed)
    assert "needs its law in LAWS" in done.stdout
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed > 20
