"""Parsers meet any input that hypothesis invents: a value, or one line of what is wrong."""

import json
from dataclasses import asdict, fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import UserError, to_json
from configs import Config, from_dict
from data.canvas import HOLE, split_holes
from data.command_line import from_cli
from data.json_files import read_json
from data.tokenizer import load_tokenizer

NAMES = [f.name for f in fields(Config)]
VALUES = st.one_of(
    st.text(max_size=20), st.integers().map(str), st.floats().map(str), st.booleans().map(str)
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9)),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(max_size=9), inner)),
    max_leaves=8,
)
few = settings(max_examples=60, deadline=None)


def one_line(call):
    """The result of call(), or None after an error of ours in one line."""
    try:
        return call()
    except UserError as e:
        assert str(e) and "\n" not in str(e)


@pytest.mark.slow
@few
@given(st.sampled_from(NAMES), VALUES)
def test_a_field_of_the_command_line(name, value):
    cfg = one_line(lambda: from_cli([f"--{name}={value}", "--data=no_such_corpus"])[0])
    assert cfg is None or isinstance(cfg, Config)


@pytest.mark.slow
@few
@given(st.lists(st.text(max_size=12), max_size=4))
def test_any_words_on_the_command_line(words):
    words = [word for word in words if word not in ("-h", "--help")]
    one_line(lambda: from_cli([*words, "--data=no_such_corpus"]))


@few
@given(st.dictionaries(st.one_of(st.sampled_from(NAMES), st.text(max_size=9)), JSON, max_size=4))
def test_the_config_of_a_checkpoint(changes):
    cfg = one_line(lambda: from_dict(asdict(Config()) | changes, "ckpt.pt"))
    assert cfg is None or isinstance(cfg, Config)


@few
@given(st.one_of(st.text(), JSON.map(json.dumps)))
def test_a_json_file(text):
    value = one_line(lambda: read_json("meta.json", {"name": str}, text=text))
    assert value is None or isinstance(value["name"], str)


@few
@given(st.lists(st.sampled_from(["\\", "_", "____", "[", "]", "[3]", "[*]", "[0]", "a", " "])))
def test_holes_and_their_escapes(pieces):
    """Escaped, any text is text. As it is, it has a piece more than holes, or is refused."""
    text = "".join(pieces)
    escaped = HOLE.sub(lambda m: m[1] * 2 + "\\" + m[2], text)
    assert split_holes(escaped) == ([text], [])
    try:
        parts, holes = split_holes(text)
    except ValueError as e:
        assert "hole of no tokens" in str(e)
        return
    assert len(parts) == len(holes) + 1 and all(size is None or size > 0 for size in holes)


@few
@given(st.dictionaries(st.sampled_from(["kind", "characters", "json", "vocab"]), JSON))
def test_the_tokenizer_of_a_checkpoint(spec):
    try:
        load_tokenizer(spec)
    except ValueError:
        pass


@given(JSON)
def test_a_record_is_one_line_of_strict_json(value):
    line = to_json({"value": value})
    assert "\n" not in line
    json.loads(line, parse_constant=lambda name: pytest.fail(name))
