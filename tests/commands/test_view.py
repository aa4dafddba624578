"""The picture is well-formed, its frames are those of the sampler, and it ends with the text."""

import re
from xml.etree import ElementTree

import pytest
from conftest import refused

import sample
from tasks import view

SVG = "{http://www.w3.org/2000/svg}"


def picture(checkpoint, tmp_path, *args):
    """The root element of the picture that a command writes, and the file's size."""
    path = tmp_path / "text.svg"
    view.main([str(checkpoint), "--svg", str(path), *map(str, args)])
    return ElementTree.parse(path).getroot(), path.stat().st_size


def text_of(root):
    """The final text without spaces: every group that stays, in reading order."""
    shown = [e for g in root.iter(f"{SVG}g") if "gone" not in g.get("class") for e in g]
    place = lambda e: (float(e.get("y")), float(e.get("x")))
    return re.sub(r"\s", "", "".join(e.text for e in sorted(shown, key=place)))


@pytest.mark.parametrize("sampler", ["ddpm_cache", "remdm_cap", "first_hitting"])
def test_the_last_frame_is_the_sample(checkpoint, tmp_path, capsys, sampler):
    args = ["--sampler", sampler, "--steps", "20", "--prompt", "a word"]
    sample.main([str(checkpoint), *args])
    text = capsys.readouterr().out
    root, size = picture(checkpoint, tmp_path, *args)
    assert text_of(root) == re.sub(r"\s", "", text)
    given = [e.text for e in root.iter(f"{SVG}text")][: len("a word")]
    assert "".join(given) == "a word" and size < 300_000


def test_every_frame_has_its_moment(checkpoint, tmp_path, capsys):
    """One token appears in each frame of first_hitting, at an even pace after the first second."""
    root, _ = picture(checkpoint, tmp_path, "--sampler", "first_hitting", "--seconds", 5)
    assert "33 frames" in capsys.readouterr().out
    groups = [g.get("class").split() for g in root.iter(f"{SVG}g")]
    css = root.find(f"{SVG}style").text
    starts = []
    for kind, *_, name in groups:
        steps = re.search(rf"@keyframes {name} {{(.*)}}", css)[1]
        if kind == "text":
            starts.append(float(re.search(r"([\d.]+)% { visibility: visible", steps)[1]))
        else:  # a mask disappears when its token appears
            assert kind == "mask" and steps.count("visibility: hidden") == 1
    total = view.LEAD + 5 + view.HOLD
    expected = [100 * (view.LEAD + 5 * n / 32) / total for n in range(1, 33)]
    assert sorted(starts) == pytest.approx(expected, abs=0.01) and f"{total}s" in css


def test_lines_break_at_spaces_and_nothing_is_lost():
    pieces = ["word " * 20, "x" * 100, "\n", "  end\t<&>"]
    places, lines = view.lay_out(pieces)
    assert all(column + len(text) <= view.COLUMNS + 1 for p in places for _, column, text in p)
    assert ["".join(text for *_, text in p) for p in places] == [*pieces[:2], " ", "  end <&>"]
    assert places[0][0][2] == "word " * 14 and lines == 1 + max(row for row, *_ in places[3])
    assert "&lt;&amp;&gt;" in view.draw(*places[3][0], masked=False)


def test_bad_input_is_refused(checkpoint, tmp_path, capsys):
    run = lambda *args: lambda: view.main([str(checkpoint), *map(str, args)])
    refused(capsys, run("--svg", tmp_path), "--svg", "file")
    refused(capsys, run("--svg", tmp_path / "none" / "a.svg"), "--svg", "existing folder")
    refused(capsys, run("--svg", tmp_path / "a.svg", "--seconds", 0), "--seconds", "at least 1")
    refused(capsys, run("--svg", tmp_path / "a.svg", "--infill", "none"), "--infill", "hole")
    refused(capsys, run("--svg", tmp_path / "a.svg", "--length", 99), "99 tokens")
