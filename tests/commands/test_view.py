"""A recording is what the sampler did, with the network's own probabilities; the picture, the page
and the terminal show it, and each ends with the text that sample.py prints."""

import json
import os
import random
import re
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from conftest import save
from test_sample import lucky

import sample
from configs import Config
from data.checkpoints import load
from data.tokenizer import load_tokenizer, train_bpe
from samplers import SAMPLERS
from tasks import view, view_svg, view_terminal
from tasks.view import Event

SVG = "{http://www.w3.org/2000/svg}"
TRICKY = "a\tb\r\nc\x1b[31m\x7f\x9b 中文字 é e\u0301 🎉 👩\u200d👩 \u202edlrow </script>&<!--"


def tiny(**fields):
    """A config of random weights: no training."""
    fields = dict(vocab_size=27, seq_len=32, n_layer=1, n_head=2, n_embd=32, cond_dim=8) | fields
    return Config(data="none", device="cpu", **fields)


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    return save(tmp_path_factory.mktemp("view") / "random.pt", tiny())


def lanes_of(ckpt, *args):
    args = view.parse_arguments([str(ckpt), *map(str, args)])
    return view.make_lanes(args, view.load_all(args, args.ckpt), args.samplers)


def lane_of(pieces, steps, tokenizer=None):
    """A lane of made-up steps. pieces: what the ids 0, 1, ... spell."""
    table = [*(piece if isinstance(piece, bytes) else piece.encode() for piece in pieces), b"M"]
    cfg = SimpleNamespace(mask_id=len(pieces), bos=False)
    length = 1 + max(event.position for _, events in steps for event in events)
    canvas = torch.full((length,), cfg.mask_id)
    decode = lambda ids: b"".join(table[i] for i in ids).decode(errors="replace")
    tokenizer = SimpleNamespace(table=table, decode=decode)
    return view.Lane("a title", tokenizer, cfg, canvas, None, iter(steps))


def write(pieces):
    """A lane that writes each piece in its own step, from left to right, and surely."""
    steps = [(1 - i / len(pieces), [Event(i, i, 0.9)]) for i in range(len(pieces))]
    return lane_of(pieces, steps)


def written(pieces):
    lane = write(pieces)
    for step in lane.steps:
        lane.apply(step)
    return lane


# --------------------------------------------------------------------------------------------------
# The recording


@pytest.mark.parametrize("extra", ["", "--semi_ar --length 70 --window 16", "--guidance 1"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_recording_is_the_text_of_sample(random_weights, capsys, sampler, extra):
    args = [*lucky(sampler), "--steps", 12, "--prompt", "a word", "--seed", 3, *extra.split()]
    sample.main([str(random_weights), *map(str, args)])
    text = capsys.readouterr().out.removesuffix("\n")
    (lane,) = lanes_of(random_weights, *args)
    assert lane.ids[6:] == [27] * (len(text) - 6)
    for step in lane.steps:
        before = lane.ids.copy()
        changed = lane.apply(step)
        assert changed == [i for i, (a, b) in enumerate(zip(before, lane.ids)) if a != b]
        for event in step[1]:
            drawn = event.token != lane.mask_id
            assert drawn == (event.p is not None) and len(event.others) == drawn * view.OTHERS
            others = [token for token, _ in event.others]
            assert event.token not in others and len(set(others)) == len(others)
    assert lane.tokenizer.decode(lane.ids) == text


@pytest.mark.parametrize("args", ["--sampler ddpm", "--sampler confidence --temperature 0.5"])
def test_probabilities_are_the_networks_own(random_weights, args):
    """Before temperature and top-p, given the canvas before the step."""
    model, _ = load(random_weights)
    (lane,) = lanes_of(random_weights, "--steps", 6, "--top_p", 0.8, *args.split())
    for t, events in lane.steps:
        x = torch.tensor([lane.ids])
        p = model(x, torch.tensor([t]), x == x)[: x.shape[1]].softmax(-1)
        for event in events:
            assert event.p == pytest.approx(p[event.position, event.token].item(), rel=1e-3)
            top = [i for i in p[event.position].argsort(descending=True).tolist()]
            top.remove(event.token)
            assert [token for token, _ in event.others] == top[: view.OTHERS]
        lane.apply((t, events))


def test_what_was_not_drawn_has_no_probability():
    before, now = torch.tensor([2, 1, 2, 2]), torch.tensor([0, 2, 0, 2])
    at = torch.tensor([True, False])  # of a window that begins at 2
    call = (torch.tensor([2, 2]), 0.5, at, torch.tensor([[0.25, 0.75]]).log())
    events = view.events_between(before, now, call)
    assert events[:2] == [Event(0, 0), Event(1, 2)]
    assert events[2].p == pytest.approx(0.25) and events[2].others[0][0] == 1
    assert view.events_between(before, now, None)[2] == Event(2, 0)


def replay(lines):
    """(titles, canvases of strings) after the messages of a recording; None is a mask."""
    pieces, titles, canvases = [], [], []
    for message in map(json.loads, lines):
        pieces += message.get("pieces", [])
        if "title" in message:
            titles.append(message["title"])
            canvases.append([None if i < 0 else pieces[i] for i in message["start"]])
        else:
            for position, *token in message["events"]:
                canvases[message["lane"]][position] = pieces[token[0]] if token else None
    return titles, canvases


def test_messages_replay_to_the_texts(random_weights, capsys):
    args = ["--num", 2, "--steps", 9, "--samplers", "remdm_cap", "confidence", "--eta", 0.3]
    lines = list(map(view.to_line, view.messages(lanes_of(random_weights, *args))))
    titles, canvases = replay(lines)
    kinds = ["remdm_cap · sample 1", "remdm_cap · sample 2"]
    assert titles == [*kinds, "confidence · sample 1", "confidence · sample 2"]
    for sampler, canvas in zip(("remdm_cap", "confidence"), (canvases[:2], canvases[2:])):
        options = ["--eta", "0.3"] * (sampler == "remdm_cap")
        argv = [str(random_weights), "--num", "2", "--steps", "9", "--sampler", sampler, *options]
        sample.main(argv)
        assert capsys.readouterr().out.splitlines()[1::2] == ["".join(row) for row in canvas]


def test_lanes_have_the_same_noise(random_weights, tmp_path):
    """Two copies of a checkpoint write the same text."""
    copy = tmp_path / "copy.pt"
    os.link(random_weights, copy)
    lines = view.messages(lanes_of(random_weights, copy, "--steps", 5))
    titles, (one, other) = replay(map(view.to_line, lines))
    assert one == other and titles == [f"{path} · ddpm_cache" for path in (random_weights, copy)]


def test_tokens_in_a_page_are_safe_and_whole():
    lane = write(["</script>", "é".encode()[:1], "é".encode()[1:], "\u2028"])
    page = view.to_html(map(view.to_line, view.messages([lane])))
    assert page.count("</script>") == 2 and "{{" not in page
    recording = re.search(r'id="recording">(.*?)</script>', page, re.S)[1]
    _, (canvas,) = replay(recording.strip().split("\n"))
    assert canvas == ["</script>", [0xC3], [0xA9], "\u2028"]
    assert lane.spell(range(4)) == ["</script>", "", "é", "\u2028"]
    assert lane.spell([1, lane.mask_id, 2, 1]) == ["", "M", "\ufffd", "\ufffd"]


def test_a_template_is_filled_once():
    assert view.fill("a {{B}} {{C}}", {"B": "{{C}}", "C": "c"}) == "a {{C}} c"


def busy_steps(rng, V, steps=1000, length=1024):
    """As many changes as ReMDM makes: in each step tokens appear, and others are masked again."""
    masked, written = list(range(length)), []
    for n in range(steps, 0, -1):
        again = [written.pop(rng.randrange(len(written))) for _ in range(min(4, len(written)))]
        now = [masked.pop(rng.randrange(len(masked))) for _ in range(min(6, len(masked)))]
        draw = lambda: (rng.randrange(V), rng.random())
        yield (
            n / steps,
            [
                *(Event(i, V) for i in again),
                *(Event(i, *draw(), tuple(draw() for _ in range(view.OTHERS))) for i in now),
            ],
        )
        masked, written = masked + again, written + now


@pytest.fixture(scope="module")
def big_page(tmp_path_factory):
    """1,000 steps of 8 rows of 1,024 tokens of a vocabulary of GPT-2's size."""
    rng = random.Random(0)
    pieces = [f" {rng.randrange(10**6):x}" for _ in range(50_257)]
    tokenizer = SimpleNamespace(table=[piece.encode() for piece in pieces])
    cfg, canvas = SimpleNamespace(mask_id=50_257, bos=False), torch.full((1024,), 50_257)
    lane = lambda row: view.Lane(f"row {row}", tokenizer, cfg, canvas, None, busy_steps(rng, 50257))
    path = tmp_path_factory.mktemp("big") / "big.html"
    path.write_text(view.to_html(map(view.to_line, view.messages([lane(r) for r in range(8)]))))
    return path


def test_a_long_recording_is_small(big_page):
    assert 1_000_000 < big_page.stat().st_size < 5_000_000


# --------------------------------------------------------------------------------------------------
# The terminal


def play(lanes, fps=None):
    """What play() sends to a terminal, frame by frame, and the seconds that it would take."""
    out, now = [], [0.0]
    sleep = lambda seconds: now.__setitem__(0, now[0] + seconds)
    view_terminal.play(lanes, fps, out.append, clock=lambda: now[0], sleep=sleep)
    return out, now[0]


def test_a_short_text_takes_four_seconds(random_weights):
    for args in ("--steps 3", "--sampler threshold --threshold 0", "--sampler first_hitting"):
        frames, seconds = play(lanes_of(random_weights, *args.split()))
        assert seconds == pytest.approx(view_terminal.SECONDS)
    assert len(frames) == 2 + 33  # the second screen on and off, the masks, and each token
    many = ["--sampler", "ddpm", "--steps", 300]  # in most steps nothing happens
    frames, seconds = play(lanes_of(random_weights, *many), fps=16)
    assert seconds == pytest.approx((len(frames) - 3) / 16) and len(frames) < 40


def test_ctrl_c_gives_the_terminal_back():
    def interrupted():
        yield 1.0, [Event(0, 0, 0.5)]
        raise KeyboardInterrupt

    out = []
    lane = write("ab")
    lane.steps = interrupted()
    with pytest.raises(KeyboardInterrupt):
        view_terminal.play([lane], 1000, out.append)
    assert "\x1b[?1049h" in out[0] and "\x1b[?25l" in out[0]
    assert "\x1b[?1049l" in out[-1] and "\x1b[?25h" in out[-1]


def test_nothing_that_a_model_writes_controls_the_terminal():
    lane = write(TRICKY)
    out, _ = play([lane])
    left = re.sub(r"\x1b\[[0-9;?]*[A-Zmhl]", "", "".join(out))
    assert "␛[31m␡" in left and "中" in left and "e\u0301" in left and "👩\u200d👩" in left
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", left)
    lines = view_terminal.paint(lane, 80)
    assert len(lines) == 2 and "a" in lines[0] and "c" in lines[1]


@pytest.mark.parametrize("columns", [1, 2, 7, 30])
def test_lines_fit_whatever_the_width(columns):
    for text in (TRICKY, "中" * 50, "word " * 20, "x" * 99, " " * 70, "\n\n"):
        lines = view_terminal.wrap(text, columns)
        shown = view_terminal.paint(written(text), columns)
        assert len(shown) == len(lines)
        for line in lines:
            width = sum(width for _, width, _ in line)
            assert width <= max(columns, 2) or line[-1][0].isspace()
        numbers = [number for line in lines for *_, number in line]
        assert numbers == list(range(len(text)))


def test_colours_say_when_and_how_probable():
    steps = [(1.0, [Event(0, 0, 0.9)]), (0.5, [Event(1, 0, 0.3)]), (0.01, [Event(2, 0, 0.01)])]
    lane = lane_of("a", [*steps, (0.01, [Event(3, 0)])])
    assert list(view_terminal.styles_of(lane)) == [view_terminal.DIM] * 4
    for step in lane.steps:
        lane.apply(step)
    first, middle, last = view_terminal.AGES[0], view_terminal.AGES[3], view_terminal.AGES[-1]
    styles = list(view_terminal.styles_of(lane, new=[3]))
    assert styles == [f"38;5;{first};1", f"38;5;{middle}", f"38;5;{last};4", view_terminal.NEW]


def test_lanes_are_side_by_side_and_below_each_other(monkeypatch):
    lanes = [write("abc") for _ in range(4)]
    places = lambda out: set(re.findall(r"\x1b\[(\d+;\d+)H\x1b\[\d+X\x1b\[1ma title", out))
    for columns, expected in ((140, {"1;1", "1;36", "1;71", "1;106"}), (60, {"1;1", "1;32"})):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert places(view_terminal.draw(lanes, [()] * 4)) >= expected
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("LINES", "13")
    assert places(view_terminal.draw(lanes, [()] * 4)) == {"1;1", "4;1", "7;1", "10;1"}


def test_the_last_frame_stays(random_weights, monkeypatch, capsys):
    """In colours on the first screen: more rows than fit side by side, all of them."""
    monkeypatch.setattr(view_terminal.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(view_terminal, "SECONDS", 0)
    view.main([str(random_weights), "--num", "4", "--steps", "5"])
    out = re.sub(r"\x1b\[\?1049h.*?\x1b\[\?1049l", "", capsys.readouterr().out, flags=re.S)
    kept = re.sub(r"\x1b\[[0-9;]*m", "", out)
    monkeypatch.undo()
    sample.main([str(random_weights), "--num", "4", "--steps", "5"])
    texts = capsys.readouterr().out.splitlines()[1::2]
    assert re.findall(r"--- ddpm_cache · sample (\d)\n(.*)\n", kept) == [
        (str(i + 1), text) for i, text in enumerate(texts)
    ]
    assert "\x1b[38;5;" in out and "p ≥ 0.5" in kept.splitlines()[-1]


def test_piped_output_is_plain(random_weights, capsys):
    view.main([str(random_weights), "--steps", "5", "--samplers", "ar", "ddpm"])
    out = capsys.readouterr().out
    assert re.fullmatch("--- ar\n[a-z ]{32}\n--- ddpm\n[a-z ]{32}\n", out)


# --------------------------------------------------------------------------------------------------
# The picture


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
    total = view_svg.LEAD + 5 + view_svg.HOLD
    expected = [100 * (view_svg.LEAD + 5 * n / 32) / total for n in range(1, 33)]
    assert sorted(starts) == pytest.approx(expected, abs=0.01) and f"{total}s" in css


def test_lines_break_at_spaces_and_nothing_is_lost():
    pieces = ["word " * 20, "x" * 100, "\n", "  end\t<&>", "中文"]
    places, lines = view_svg.lay_out(pieces)
    for _, column, width, _ in (place for piece in places for place in piece):
        assert column + width <= view_svg.COLUMNS + 1
    texts = ["".join(text for *_, text in p) for p in places]
    assert texts == [*pieces[:2], " ", "  end    <&>", "中文"] and places[-1][0][2] == 4
    assert places[0][0][3] == "word " * 14 and lines == 1 + max(row for row, *_ in places[3])
    assert "&lt;&amp;&gt;" in view_svg.draw(*places[3][0], masked=False)


# --------------------------------------------------------------------------------------------------
# The command


def test_options_come_from_one_place(random_weights, capsys):
    """Every option that changes sample.py's text changes the view's in the same way."""
    for args in (
        "--semi_ar --length 60 --window 20 --stride 5", "--guidance 2 --prompt of",
        "--noise_removal greedy --steps 4", "--infill of____of", "--no_ema --top_p 0.5 --seed 4",
    ):  # fmt: skip
        sample.main([str(random_weights), *args.split()])
        text = capsys.readouterr().out
        view.main([str(random_weights), *args.split()])
        assert capsys.readouterr().out.split("\n", 1)[1] == text


def test_an_end_cuts_the_text(tmp_path, capsys):
    """--stop: in the terminal as in the plain output, without the given first token."""
    spec = {**train_bpe(["of the"], 256), "eos": True}
    V = load_tokenizer(spec).vocab_size
    path = save(tmp_path / "ends.pt", tiny(vocab_size=V, seq_len=48, bos=True), spec)
    args = [str(path), "--stop", "--sampler", "ar", "--num", "16", "--temperature", "9"]
    sample.main(args)
    text = capsys.readouterr().out
    view.main(args)
    assert capsys.readouterr().out.replace("--- ar · ", "--- ") == text
    assert len(set(map(len, text.split("--- sample")))) > 3
