"""README and docs: the README's size, files that exist, line counts, and commands that parse."""

import ast
import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from inspect import signature
from pathlib import Path

import pytest

from configs import CONFIGS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = sorted((ROOT / "runs").glob("*.sh"))
CODE = re.compile(r"```(\w*)\n(.*?)```", re.S)
FIGURE = re.compile(r"(?<![\w.,-])[-+]?\d(?:[\d.,]*\d)?")
by_name = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def blocks(page, *languages):
    return [code for language, code in CODE.findall(page.read_text()) if language in languages]


def prose(text):
    """text without code blocks, the citation and the targets of links."""
    text = CODE.sub("", text).split("## Citation")[0]
    return re.sub(r"\]\([^)]*\)", "]", text)


def test_figures_are_counted():
    text = "1.8 ± 0.02, -3 and 1,024 of GPT-2 [a](b#3)\n```sh\n5\n```\nD3PM `6`\n## Citation\n7"
    assert FIGURE.findall(prose(text)) == ["1.8", "0.02", "-3", "1,024", "6"]


def test_the_readme_is_short():
    text = PAGES[0].read_text()
    assert text.count("\n") <= 150 and len(text.split()) <= 1300
    assert len(FIGURE.findall(prose(text))) <= 60


def test_measured_figures_have_their_error():
    """A row of the README's results that has decimals has as many ±, unless it counts its runs."""
    table = PAGES[0].read_text().split("## Eight results")[1].split("## ")[0]
    rows = [row for row in table.splitlines() if row.startswith("|")][2:]
    assert len(rows) == 8
    for row in rows:
        decimals = re.findall(r"\d\.\d+", row.split("|")[1])
        assert "two runs" in row or len(decimals) == 2 * row.count("±") > 0
        assert len(re.findall(r"\]\(docs/\w+\.md#[\w-]+\)", row)) == 1 and row.count("`") == 2


@by_name
def test_prose_wraps(page):
    text = CODE.sub("", page.read_text())
    assert [line for line in text.splitlines() if len(line) > 88 and line[0] != "|"] == []


def anchor(heading):
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@by_name
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]*)\)", CODE.sub("", page.read_text())):
        if target.startswith("https://"):
            continue
        name, _, section = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        if section:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
            assert section in map(anchor, headings), target


@by_name
def test_named_files_exist(page):
    """Paths into the repository, in prose and in code."""
    folders = "data|tasks|docs|runs|extra|tests|assets|.ci"
    for path in re.findall(rf"(?<![\w/.])(?:{folders})/[\w/]*(?:\.\w+)?", page.read_text()):
        made = path.startswith("data/") and not path.endswith(".py")  # a prepared corpus
        assert made or (ROOT / path).exists(), path
    for name in re.findall(r"`(\w+\.py)`", page.read_text()):
        assert name in ("one_loss.py", "my_exercises.py") or any(
            (ROOT / folder / name).exists() for folder in (".", "data", "tasks")
        ), name


def test_line_counts_are_right():
    rows = re.findall(r"\| \[(\w+\.py)\]\(\1\) \|[^|]*\| (\d+) \|", PAGES[0].read_text())
    names = "tiny diffusion samplers model head configs common train sample evaluate".split()
    assert [name for name, _ in rows] == [f"{name}.py" for name in names]
    for name, lines in rows:
        assert (ROOT / name).read_text().count("\n") == pytest.approx(int(lines), rel=0.1), name


def test_the_quoted_loss_is_that_of_tiny():
    """But for comments and the docstring."""

    def parse_loss(code):
        tree = ast.parse(code).body
        (loss,) = [f for f in tree if isinstance(f, ast.FunctionDef) and f.name == "loss"]
        loss.body = loss.body[ast.get_docstring(loss) is not None :]
        return ast.unparse(loss)

    _, code = blocks(PAGES[0], "python")
    assert parse_loss(code) == parse_loss((ROOT / "tiny.py").read_text())


def test_the_lines_of_python_run_in_another_folder(checkpoint, tmp_path):
    """With a checkpoint of characters; they print the texts and the loss."""
    code, _ = blocks(PAGES[0], "python")
    code = code.replace("out/pydocs_mdlm/ckpt.pt", str(checkpoint))
    code = code.replace("The function returns a list of the names.", "abc def")
    assert len(code.split("\n\n")[1].splitlines()) == 5
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    texts, nats = done.stdout.splitlines()
    assert len(ast.literal_eval(texts)) == 2 and nats.startswith("tensor(")


def test_one_loss_prints_what_the_page_says(capsys):
    page = ROOT / "docs" / "theory.md"
    (code,), printed = blocks(page, "python"), blocks(page, "")[0]
    exec(code, {})
    out = capsys.readouterr().out
    assert out == printed and len({line.split(" ", 1)[1] for line in out.splitlines()}) == 1


# --------------------------------------------------------------------------------------------------
# Commands

TAKES_FIELDS = ("train.py", "tasks.compare", "tasks.scaling", "tasks.reversal")  # of any config


def commands(path):
    """The words after python or torchrun of every command in a page, inline too, or in a script."""
    text = path.read_text()
    if path.suffix == ".sh":
        lines = text.replace("\\\n", " ").splitlines()
    else:
        lines = "".join(blocks(path, "sh")).replace("\\\n", " ").splitlines()
        lines += re.findall(r"`((?:python|torchrun) [^`]*)`", CODE.sub("", text))
    for line in lines:
        for command in re.split(r" (?:&&|\|\||;) ", line):
            words = shlex.split(command.removeprefix("srun "), comments=True)
            if words and words[0] in ("python", "torchrun"):
                yield words[1:]


def split_target(words):
    """(script or module, its arguments) of the words after python or torchrun."""
    while re.match("--nproc|--nnodes|--rdzv", words[0]):
        words = words[1:]
    return (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])


@cache
def read_help(target, mode):
    """What --help prints. A mode is the first argument of a script with several."""
    out = io.StringIO()
    argv, sys.argv = sys.argv, [target, *mode, "--help"]
    try:
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as e:
            run = runpy.run_path if target.endswith(".py") else runpy.run_module
            run(str(ROOT / target) if target.endswith(".py") else target, run_name="__main__")
    finally:
        sys.argv = argv
    assert e.value.code in (0, None), target
    return out.getvalue()


def check_command(words):
    """The script exists, and knows the config or data set and every option by name."""
    target, arguments = split_target(words)
    if target in ("pytest", "-c"):
        return
    if target == "tiny.py":  # takes no arguments, so --help would train it
        assert not arguments and (ROOT / target).exists()
        return
    mode = tuple(arguments[:1]) if target in ("tasks.bench", "tasks.peers", "tasks.answer") else ()
    known = read_help(target, mode if mode != ("--help",) else ())
    if target in TAKES_FIELDS:
        known += read_help("train.py", ())
        name = next((word for word in arguments if re.match(r"\w", word)), "pydocs_mdlm")
        if target == "train.py" and name != "CONFIG":
            known += " ".join(f"--{field} " for field in signature(CONFIGS[name]).parameters)
    if target == "data/prepare.py":
        assert arguments[0] in known, words
    for word in arguments:
        option = word.split("=")[0]
        if re.match("--[a-z]", word) and option != "--field":
            assert re.search(rf"{option}\b", known), (option, words)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # by runpy
@pytest.mark.parametrize("path", [*PAGES, *SCRIPTS], ids=lambda path: path.name)
def test_commands_parse(path):
    for words in commands(path):
        check_command(words)


def test_a_wrong_command_is_found():
    assert len(list(commands(PAGES[0]))) > 10
    check_command(["train.py", "smdm_170", "--flops=10", "--steps=3"])
    for wrong in ("train.py --stepz=3", "-m tasks.bench sample --nmu 3", "data/prepare.py textt"):
        with pytest.raises(AssertionError):
            check_command(wrong.split())
    with pytest.raises((ImportError, FileNotFoundError)):
        check_command(["-m", "tasks.none"])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(path):
    subprocess.run(["bash", "-n", path], check=True)
    lines = path.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash" and lines[1].startswith("# ")
    assert "set -euo pipefail" in lines and path.stat().st_mode & 0o100
    assert re.search("(core|GPU)s?.*(hour|minute|day)", lines[1]), "says on what and how long"
