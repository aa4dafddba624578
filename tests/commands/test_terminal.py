"""The live view in a real terminal, tmux: narrow, wide, resized, with emoji and CJK, interrupted.

Without tmux these tests are skipped."""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT, save
from test_view import tiny

import sample

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux"),
]
PROMPT = "中文字🎉é a\tb\r\nc\x1b[31md"
QUOTED = "$'中文字🎉é a\\tb\\r\\nc\\e[31md'"  # for bash
CHARACTERS = "".join(sorted(set(PROMPT) | set("efg")))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A model of characters that terminals find difficult; its tokens have 1 or 2 columns."""
    spec = {"kind": "char", "characters": CHARACTERS}
    cfg = tiny(vocab_size=len(CHARACTERS), seq_len=64)
    return save(tmp_path_factory.mktemp("terminal") / "random.pt", cfg, spec)


class Terminal:
    """A tmux session of its own server."""

    def __init__(self, folder, width, height):
        self.socket, self.env = str(folder / "tmux"), {**os.environ, "LC_ALL": "C.UTF-8"}
        self.env.pop("TMUX", None)
        size = ("-x", str(width), "-y", str(height))
        self("-f", "/dev/null", "new-session", "-d", "-s", "view", *size, "bash --norc --noprofile")

    def __call__(self, *words):
        words = ("tmux", "-u", "-S", self.socket, *words)
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, check=True)
        return done.stdout

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self("kill-server")

    def run(self, *argv):
        words = [sys.executable, "sample.py", *map(str, argv)]
        command = f"cd {ROOT}; clear; COLUMNS= LINES= {' '.join(words)}; echo exit $?"
        self("send-keys", "-t", "view", command, "Enter")

    def text(self, *options):
        return self("capture-pane", "-p", "-t", "view", *options)

    def modes(self):
        """Whether the second screen is on, and whether the cursor is visible."""
        return self("display-message", "-p", "-t", "view", "#{alternate_on} #{cursor_flag}").strip()

    def until(self, condition, seconds=90):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.text()
            time.sleep(0.05)


def expect(weights, capsys, *args):
    """What stays on the terminal: the plain texts without spaces, controls as pictures."""
    sample.main([str(weights), *map(str, args)])
    text = re.sub("--- sample .", "", capsys.readouterr().out)
    return re.sub(r"\s", "", text.replace("\x1b", "␛"))


@pytest.mark.parametrize("width, height", [(30, 12), (100, 30)])
def test_it_shows_the_text_and_leaves_it(weights, tmp_path, capsys, width, height):
    args = ["--num", "2", "--steps", "40", "--prompt"]
    with Terminal(tmp_path, width, height) as terminal:
        terminal.run(weights, *args, QUOTED, "--watch")
        terminal.until(lambda: terminal.modes() == "1 0")
        began = time.monotonic()
        terminal.until(lambda: "█" in terminal.text())
        titles = "ddpm_cache · sample 1" in terminal.text()
        assert titles and ("sample 2" in terminal.text()) == (width == 100)
        terminal.until(lambda: "exit 0" in terminal.text("-S", "-"))
        assert time.monotonic() - began > 3.5 * (1 + (width == 30)) and terminal.modes() == "0 1"
        kept = terminal.text("-J", "-S", "-").split("--- ddpm_cache · sample 1")[1]
    first, second = kept.split("first blue")[0].split("--- ddpm_cache · sample 2")
    shown = "".join(re.sub(r"\s", "", part) for part in (first, second))
    assert shown == expect(weights, capsys, *args, PROMPT)
    assert shown.count("中文字🎉éabc␛[31md") == 2


def test_a_resized_terminal_is_redrawn(weights, tmp_path):
    with Terminal(tmp_path, 100, 30) as terminal:
        terminal.run(weights, "--num", "2", "--sampler", "first_hitting", "--watch", "--fps", "5")
        terminal.until(lambda: "sample 2" in terminal.text() and "█" in terminal.text())
        terminal("resize-window", "-t", "view", "-x", "40", "-y", "30")
        heads = lambda: [line for line in terminal.text().splitlines() if "· sample" in line]
        terminal.until(lambda: len(heads()) == 2 and "█" in terminal.text())
        for line in heads():
            assert line.count("sample") == 1  # below each other now, and nothing is left over
        terminal("resize-window", "-t", "view", "-x", "120", "-y", "20")
        terminal.until(lambda: len(heads()) == 1 and heads()[0].count("sample") == 2)
        terminal.until(lambda: "exit 0" in terminal.text())


def test_ctrl_c_restores_the_cursor_and_the_screen(weights, tmp_path):
    with Terminal(tmp_path, 80, 24) as terminal:
        terminal.run(weights, "--watch", "--fps", "1")
        terminal.until(lambda: terminal.modes() == "1 0" and "█" in terminal.text())
        terminal("send-keys", "-t", "view", "C-c")
        terminal.until(lambda: "exit 130" in terminal.text())
        assert terminal.modes() == "0 1" and "interrupted" in terminal.text()


def test_a_pipe_gets_plain_text(weights, tmp_path, capsys):
    with Terminal(tmp_path, 80, 24) as terminal:
        terminal.run(weights, "--watch", "--num", "2", "|", "cat", "-v", ">", tmp_path / "out")
        terminal.until(lambda: "exit 0" in terminal.text())
    sample.main([str(weights), "--num", "2"])
    plain = capsys.readouterr().out
    piped = (tmp_path / "out").read_text()
    assert piped.count("--- sample") == 2 and "^[[" not in piped.replace("^[[^[", "")
    assert plain.count("\x1b") == piped.count("^[")
