"""The README's commands are started, in their order and in one folder, as a reader does. Those that
take more than seconds are shortened; those that download are only parsed (test_readme.py)."""

import importlib
import re
import shlex

import pytest
from conftest import ROOT
from test_readme import PAGES, commands, split_target

import train

SMALL = "--n_embd=32 --seq_len=64 --batch_size=4 --micro_batch=4 --steps=8 --samples=1 --device=cpu"
STARTED = {  # the first words of a command: what is appended to shorten it
    "tasks.view out/pydocs_mdlm/ckpt.pt": "--length 20",
    "train.py": SMALL,
    "sample.py out/pydocs_mdlm/ckpt.pt": "",
    "tasks.bench evaluate": "--repeats 3",
    "data/prepare.py text": "",
    "train.py pydocs_mdlm --data=mine": SMALL,
}
NOT_STARTED = {  # why
    "tasks.convert kuleshov-group/mdlm-owt": "downloads; test_convert.py has files of its format",
    "data/prepare.py openwebtext": "downloads; test_pretraining_data.py has such files",
    "train.py owt_mdlm": "needs OpenWebText and GPUs; test_train.py starts torchrun",
    "evaluate.py out/owt_mdlm/ckpt.pt": "downloads; test_zeroshot.py has such sets",
    "tiny.py": "takes minutes; test_tiny.py runs it",
    "pytest": "this is it",
}


def find(words, table):
    """The longest key of the table that the command begins with, or None."""
    keys = [key for key in table if words[: len(key.split())] == key.split()]
    return max(keys, key=len, default=None)


def list_commands():
    """The README's commands, the training that makes a checkpoint first."""
    found = [[target, *rest] for target, rest in map(split_target, commands(PAGES[0]))]
    found = [words for i, words in enumerate(found) if words not in found[:i]]
    return sorted(found, key=lambda words: words != ["train.py"])


def test_every_command_is_started_or_has_a_reason():
    used = set()
    for words in list_commands():
        key = find(words, STARTED | NOT_STARTED)
        assert key and (key != "train.py" or words == ["train.py"]), words
        used.add(key)
    assert used == STARTED.keys() | NOT_STARTED.keys()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A reader's folder: data of its own, in which pydocs is a short text, and my.txt."""
    prepare = importlib.import_module("data.prepare")
    monkeypatch.setattr("data.corpus.ROOT", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").mkdir()
    pages = "\n\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    (tmp_path / "my.txt").write_text(pages, encoding="utf-8")
    (tmp_path / "data").mkdir()
    prepare.prepare("text", out="pydocs", input=["my.txt"], vocab_size=400)
    return tmp_path


def start(words):
    name = words[0].removesuffix(".py").replace("/", ".")
    module = importlib.import_module(name)
    (module.command_line if name == "train" else module.main)(words[1:])


def test_the_readmes_commands_run(folder, capsys):
    outputs = {}
    for words in list_commands():
        if (key := find(words, STARTED | NOT_STARTED)) in STARTED:
            start([*words, *STARTED[key].split()])
            outputs[key] = capsys.readouterr().out
    assert (folder / "assets" / "sample.svg").read_text().startswith("<svg")
    assert outputs["sample.py out/pydocs_mdlm/ckpt.pt"].startswith("The function returns")
    assert "exact counts" in outputs["tasks.bench evaluate"]
    assert (
        "now train on it: python train.py pydocs_mdlm --data=mine --out_dir=out/mine\n"
        in (outputs["data/prepare.py text"])
    )
    for key, out in [("train.py", "pydocs_mdlm"), ("train.py pydocs_mdlm --data=mine", "mine")]:
        assert "validation: " in outputs[key] and (folder / "out" / out / "best.pt").exists()
    printed = [line.split() for line in outputs["train.py"].splitlines() if line[:9] == "  python "]
    assert [words[1:3] for words in printed] == [
        ["sample.py", "out/pydocs_mdlm/ckpt.pt"],
        ["evaluate.py", "out/pydocs_mdlm/ckpt.pt"],
        ["-m", "tasks.plot"],
    ]
    texts = []
    for _ in range(2):  # the commands that a run names work as printed, and repeat their output
        for words in printed:
            start(words[2:] if words[1] == "-m" else words[1:])
        texts.append(re.sub("curves.svg|no .*", "", capsys.readouterr().out))
    assert texts[0] == texts[1]


def test_printed_commands_are_quoted(folder, capsys):
    """A folder with a space: the printed commands are copied into a shell as they are."""
    (folder / "my text").mkdir()
    start(["data/prepare.py", "text", "--input", "my.txt", "--out", "./my text/corpus it's"])
    printed = capsys.readouterr().out.split("now train on it: ")[1]
    words = shlex.split(printed)
    assert words[:3] == ["python", "train.py", "pydocs_mdlm"] and len(words) == 5
    train.command_line([*words[2:], *SMALL.split()])
    for line in capsys.readouterr().out.split("Next:\n")[1].splitlines():
        words = shlex.split(line)
        assert any("out/corpus it's" in word for word in words)
        start(words[2:] if words[1] == "-m" else words[1:])
    assert (ROOT / "out" / "corpus it's").exists() is False
