"""The page of tasks.view in a headless Chromium: play, scrub, keys, hover, phone, screen reader.

Without chromium these tests are skipped."""

import json

import pytest
from browser import Page, needs_chromium
from conftest import save
from test_view import big_page, lanes_of, replay, tiny, write  # noqa: F401

from tasks import view
from tasks.view import Event

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with Page(tmp_path_factory.mktemp("chromium")) as page:
        yield page
    assert page.errors == []
    assert all(address.startswith("file://") for address in page.requests)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A page of two samplers and two rows, and the lines that it holds."""
    folder = tmp_path_factory.mktemp("page")
    ckpt = save(folder / "random.pt", tiny())
    args = ["--samplers", "remdm_cap", "first_hitting", "--eta", 0.5, "--num", 2, "--steps", 20]
    lines = list(map(view.to_line, view.messages(lanes_of(ckpt, *args, "--prompt", "of a"))))
    path = folder / "compared.html"
    path.write_text(view.to_html(lines), encoding="utf-8")
    return path, lines


def canvases_at(lines, step):
    """The texts after a step of every lane, masks as None."""
    steps, kept = {}, []
    for line in lines:
        message = json.loads(line)
        if "lane" in message:
            steps[message["lane"]] = number = steps.get(message["lane"], 0) + 1
            if number > step:
                message["events"] = []
        kept.append(json.dumps(message))
    return replay(kept)[1]


SHOWN = """lanes.map(lane => lane.spans.map(
    span => span.classList.contains("mask") ? null : span.textContent))"""


def test_scrubbing_shows_every_step_both_ways(page, compared):
    path, lines = compared
    page.open(f"file://{path}", still=True)
    steps = page.js("last()")
    assert page.js("lanes.length") == 4 and steps == 28
    for step in (steps, 0, 7, 20, 3, 28, 11):
        page.js(f'$("scrub").value = {step}; $("scrub").oninput()')
        assert page.js(SHOWN) == canvases_at(lines, step)
        assert page.js('$("count").textContent') == f"{step} of {steps}"
        assert page.js("document.querySelectorAll('.given').length") == 16
        new = page.js("document.querySelectorAll('.new').length")
        assert (new > 0) == (step > 0)


def test_it_plays_by_itself_pauses_and_starts_again(page, compared):
    page.open(f"file://{compared[0]}")
    page.until("playing && step > 2")
    page.point("#play", click=True)
    step = page.js("[playing, step]")
    assert step[0] is False and page.js('$("play").textContent') == "Play"
    page.js('$("speed").value = 4')
    page.press(" ")
    page.until("!playing && step === last()")
    assert None not in sum(page.js(SHOWN), [])
    page.press(" ")
    assert page.js("playing && step < last()")
    page.press("Home")
    assert page.js("[playing, step]") == [False, 0]


def test_a_short_text_plays_for_four_seconds(page, compared):
    page.open(f"file://{compared[0]}", still=True)
    assert page.js("last() / stepsPerSecond()") == pytest.approx(4)
    page.js('$("speed").value = 0.5')
    assert page.js("last() / stepsPerSecond()") == pytest.approx(8)


def test_keys(page, compared):
    page.open(f"file://{compared[0]}", still=True)
    for key, expected in (
        ("Home", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 28),
        ("ArrowRight", 28),
    ):  # fmt: skip
        page.press(key)
        assert page.js("step") == expected
    for key, speed in (("+", "2"), ("+", "4"), ("+", "4"), ("-", "2")):
        page.press(key)
        assert page.js('$("speed").value') == speed
    page.press("t")
    assert page.js("root.theme") == "dark"


def test_a_token_shows_its_step_probability_and_alternatives(page, compared):
    """By pointer, by touch and by keyboard; the facts are those of the recording."""
    path, lines = compared
    page.open(f"file://{path}", still=True)
    pieces = sum((json.loads(line).get("pieces", []) for line in lines), [])
    written = [m for m in map(json.loads, lines) if m.get("lane") == 2 and m["events"]]
    position, piece, p, *others = written[4]["events"][0]
    selector = f"article:nth-child(3) .text span:nth-child({position + 1})"
    page.point(selector)
    card = page.js('$("card").innerText').replace("\n", " ")
    quoted = lambda piece: pieces[piece].replace(" ", "·")
    assert f"token {position + 1}, step 5 of 28, t = " in card
    shares = [(piece, p), *zip(others[::2], others[1::2])]
    for piece, p in shares:
        assert f"{quoted(piece)} {f'{p / 10:.1f} %' if p else '< 0.1 %'}" in card
    assert card.count("%") == 1 + view.OTHERS
    assert "step 5 of 28" in page.js('$("details").innerText')
    page.point("h1")
    assert page.js('$("card").hidden')
    page.js("document.querySelectorAll('article')[2].focus()")
    page.press("ArrowDown")
    assert "token 1: given" in page.js('$("card").innerText')
    for _ in range(4):
        page.press("ArrowDown")
    assert "token 5, step" in page.js('$("card").innerText')
    page.press("Home")
    assert "token 5: masked, written in step" in page.js('$("card").innerText')
    page.press("Escape")
    assert page.js('$("card").hidden')


def test_masks_are_as_wide_as_their_tokens(page, compared):
    """Nothing moves while a text appears, as long as no token is replaced."""
    page.open(f"file://{compared[0]}", still=True)
    boxes = "lanes[2].spans.map(s => { const b = s.getBoundingClientRect(); return [b.x, b.y]; })"
    end = page.js(boxes)
    page.press("Home")
    assert page.js(boxes) == end


def test_a_phone_has_one_column_and_nothing_sticks_out(page, compared):
    page.open(f"file://{compared[0]}", width=360, height=740, still=True, phone=True)
    columns = "new Set([...document.querySelectorAll('article')].map(a => a.offsetLeft)).size"
    assert page.js(columns) == 1 and page.js("document.documentElement.scrollWidth") <= 360
    page.point("article .text .late", click=True)
    box = page.js("(b => [b.left, b.right, b.bottom])($('card').getBoundingClientRect())")
    assert box[0] >= 0 and box[1] <= 360
    assert box[2] <= page.js("$('controls').getBoundingClientRect().top")
    page.open(f"file://{compared[0]}", width=1400, still=True)
    assert page.js(columns) > 1


def contrast(page, selector):
    """The contrast ratio of an element's text against its lane, by WCAG."""
    return page.js(f"""(() => {{
        const rgb = (color) => {{ const c = new OffscreenCanvas(1, 1).getContext("2d");
            c.fillStyle = color; c.fillRect(0, 0, 1, 1); return c.getImageData(0, 0, 1, 1).data; }};
        const light = (color) => [...rgb(color)].slice(0, 3).map((v) => v / 255)
            .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const back = getComputedStyle(document.querySelector("article")).backgroundColor;
        const all = [...document.querySelectorAll({json.dumps(selector)})].map((e) => {{
            const [a, b] = [light(getComputedStyle(e).color), light(back)];
            return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); }});
        return Math.min(...all); }})()""")


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_in_both_themes(page, compared, dark):
    page.open(f"file://{compared[0]}", still=True, dark=dark)
    assert page.js("root.theme") == ("dark" if dark else "light")
    for selector in (".text .early", ".text .late", ".text .given", "article small", ".legend"):
        assert contrast(page, selector) >= 4.5, selector


def test_a_screen_reader_hears_the_text_and_the_step(page, compared):
    path, lines = compared
    page.open(f"file://{path}", still=True)
    page.press("Home")
    page.until('$("status").textContent.startsWith("Step 0 of 28")')
    assert page.js("lanes[0].spoken.textContent").startswith("of a [28 masked]")
    assert page.js("document.querySelector('.text').ariaHidden") == "true"
    page.press("End")
    page.until('$("status").textContent.includes("first_hitting · sample 2: 32 of 32 tokens")')
    assert page.js("lanes[3].spoken.textContent") == "".join(canvases_at(lines, 28)[3])
    controls = "[...document.querySelectorAll('button, select, input')]"
    assert page.js(f"{controls}.every(e => e.ariaLabel || e.innerText)")


def test_parts_of_a_character_are_joined(page, tmp_path):
    """Whatever the order in which they appear; control characters are shown, not obeyed."""
    lane = write([b"\xf0\x9f", "中", b"\x8e\x89", "a\tb\r\n", "\x1b[31m", "<b>"])
    order = [Event(2, 2, 0.5), Event(0, 0, 0.5), Event(3, 1, 0.5), Event(4, 3), Event(5, 4)]
    lane.steps = iter([(0.5, [event]) for event in [*order, Event(1, 2, 0.5), Event(1, 5)]])
    path = tmp_path / "parts.html"
    path.write_text(view.to_html(map(view.to_line, view.messages([lane]))), encoding="utf-8")
    page.open(f"file://{path}", still=True)
    texts = "lanes[0].spans.map(span => span.textContent)"
    assert page.js(texts)[:2] == ["\ufffd", "<b>"] and page.js(texts)[3:] == [
        "中", "a\tb \n", "␛[31m",
    ]  # fmt: skip
    page.press("ArrowLeft")
    assert page.js(texts)[:3] == ["", "🎉", "\ufffd\ufffd"]


@pytest.mark.slow
def test_a_long_recording_scrubs_without_lag(page, big_page):  # noqa: F811
    """8 rows of 1,024 tokens and 1,000 steps. A step takes far less than a frame of 1/60 s on an
    idle machine; the limits are for one that is busy."""
    page.open(f"file://{big_page}", still=True)
    assert page.js("[lanes.length, last()]") == [8, 1000]
    timed = """(target) => { const start = performance.now(); jump(target);
        document.body.offsetHeight; return performance.now() - start; }"""
    steps = [page.js(f"({timed})({step})") for step in range(500, 520)]
    jumps = [page.js(f"({timed})({step})") for step in (0, 1000, 300, 800, 10)]
    print(f"steps {sorted(steps)[10]:.1f} ms, jumps {sorted(jumps)[2]:.0f} ms (medians)")
    assert sorted(steps)[10] < 100 and sorted(jumps)[2] < 1000
