"""An animated SVG of one text that appears out of masks, for a README or a page.

CSS animates the file, so it also moves inside an <img>; without animation it shows the final text.
"""

from collections import defaultdict
from itertools import groupby
from xml.sax.saxutils import escape

from tasks.view_terminal import wrap

COLUMNS, WIDTH, HEIGHT, MARGIN = 72, 8.4, 21, 20  # pixels of a character and around the text
LEAD, GLOW, HOLD = 1, 0.9, 4  # seconds: before the first token, of a highlight, at the end
PANEL, NEW, OLD = "#0d1117", "#56d364", "#e6edf3"  # a dark panel, readable on any page
SHOW, HIDE = "visibility: visible", "visibility: hidden"
STYLE = """
text { font: 14px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre }
g { animation: 1s step-end infinite } .gone { visibility: hidden }
.mask { fill: #3d444d } .given { fill: #79c0ff } .text { fill: #e6edf3 }
@media (prefers-reduced-motion: reduce) { g { animation: none !important } }
"""


def find_stays(canvases):
    """[[(id, first, end), ...] for each position]: it holds id in the frames first .. end - 1."""
    histories, frames = [], len(canvases)
    for ids in zip(*canvases):
        ends = [*(f for f in range(1, frames) if ids[f] != ids[f - 1]), frames]
        histories.append([(ids[first], first, end) for first, end in zip([0, *ends], ends)])
    return histories


def lay_out(pieces):
    """[[(line, column, width, text), ...] for each piece] and the number of lines. A newline takes
    a place at the end of its line, where its mask can be seen."""
    places, lines = [[] for _ in pieces], wrap(pieces, COLUMNS)
    for row, line in enumerate(lines):
        column = 0
        for token, run in groupby(line, key=lambda cell: cell[2]):
            texts, widths, _ = zip(*run)
            places[token].append((row, column, sum(widths), "".join(texts)))
            column += sum(widths)
    return places, len(lines)


def draw(row, column, width, text, masked):
    """The SVG element of a piece of text in its place, or of the mask in that place."""
    x, y, width = MARGIN + column * WIDTH, MARGIN + row * HEIGHT, width * WIDTH
    if masked:
        return f'<rect x="{x + 1:.1f}" y="{y + 2}" width="{width - 2:.1f}" height="17" rx="3"/>'
    return f'<text x="{x:.1f}" y="{y + 16}" textLength="{width:.1f}">{escape(text)}</text>'


def group_elements(canvases, mask_id, spell):
    """{(kind, first, end): SVG elements that are visible in the frames first .. end - 1} and the
    number of lines. Places are those of the final text, so nothing moves while tokens appear; a
    token that the sampler replaces later is squeezed into the place of the final one."""
    places, lines = lay_out(spell(canvases[-1]))
    groups = defaultdict(list)
    for here, history in zip(places, find_stays(canvases)):
        for i, first, end in history:
            masked, shown = i == mask_id, here
            if not masked and end < len(canvases):
                piece = "".join(text for line in wrap(spell([i]), COLUMNS) for text, *_ in line)
                shown = [(*place, piece[: len(text)]) for *place, text in here[:1]]
            kind = "mask" if masked else "text" if first else "given"
            kind += " gone" * (end < len(canvases))  # not in the final text
            groups[kind, first, end] += [draw(*place, masked) for place in shown if place[2]]
    return groups, lines


def keyframes(kind, first, end, frames, percent):
    """CSS steps of a group: visible from frame `first`, new text highlighted, to frame `end`."""
    stop = percent(end) if end < frames else 100
    steps = [(0, HIDE), (percent(first), SHOW)] if first else [(0, SHOW)]
    if first and not kind.startswith("mask"):
        steps[-1] = percent(first), f"{SHOW}; fill: {NEW}; animation-timing-function: ease-in"
        steps.append((min(percent(first, GLOW), stop), f"fill: {OLD}"))
    steps += [(stop, HIDE)] * (end < frames)
    return " ".join(f"{at:.2f}% {{ {css} }}" for at, css in steps)


def to_svg(canvases, mask_id, spell, seconds):
    """The animated SVG of one text, as a string. canvases: its frames, lists of ids; spell(ids)
    gives one string per id. The text appears within `seconds`, stays for HOLD seconds and starts
    again."""
    groups, lines = group_elements(canvases, mask_id, spell)
    total, pace = LEAD + seconds + HOLD, seconds / max(len(canvases) - 1, 1)
    percent = lambda frame, more=0: 100 * (LEAD + pace * frame + more) / total
    css, body = [f"<style>{STYLE}g {{ animation-duration: {total}s }}"], []
    for number, ((kind, first, end), elements) in enumerate(groups.items()):
        steps = keyframes(kind, first, end, len(canvases), percent)
        css.append(f".k{number} {{ animation-name: k{number} }} @keyframes k{number} {{ {steps} }}")
        body += [f'<g class="{kind} k{number}">', *elements, "</g>"]
    width, height = round(2 * MARGIN + (COLUMNS + 1) * WIDTH), 2 * MARGIN + lines * HEIGHT
    start = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
    start += f' viewBox="0 0 {width} {height}">'
    panel = f'</style><rect width="100%" height="100%" rx="10" fill="{PANEL}"/>'
    return "\n".join([start, *css, panel, *body, "</svg>\n"])
