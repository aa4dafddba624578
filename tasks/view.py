"""A text that appears out of masks: live in the terminal (`watch`), or an animated SVG for a page.

python -m tasks.view out/pydocs_mdlm/ckpt.pt --svg text.svg
python -m tasks.view out/pydocs_mdlm/ckpt.pt --prompt "The function" --length 96 --svg text.svg

CSS animates the file, so it also moves inside an <img>; without animation it shows the final text.
"""

import shutil
from collections import defaultdict
from itertools import groupby
from pathlib import Path
from xml.sax.saxutils import escape

import sample
from common import (
    add_model_options,
    add_sampler_options,
    check_range,
    command,
    fail,
    parser,
    pick_device,
)
from data.checkpoints import load
from data.tokenizer import tokenizer_of

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
    """Break a text into lines of at most COLUMNS characters, at spaces where there are any.

    Returns [[(line, column, text), ...] for each piece] and the number of lines. A newline takes a
    place at the end of its line, where its mask can be seen."""
    lines = [[]]
    for token, piece in enumerate(pieces):
        for character in piece:
            lines[-1].append((character if character.isprintable() else " ", token))
            if character == "\n":
                lines.append([])
            elif len(lines[-1]) > COLUMNS:
                spaces = (i for i, (c, _) in enumerate(lines[-1], 1) if c == " ")
                cut = max(spaces, default=COLUMNS)
                lines[-1:] = [lines[-1][:cut], lines[-1][cut:]]
    places = [[] for _ in pieces]
    for row, line in enumerate(lines):
        for token, run in groupby(enumerate(line), key=lambda item: item[1][1]):
            column, text = zip(*((i, c) for i, (c, _) in run))
            places[token].append((row, column[0], "".join(text)))
    return places, len(lines)


def draw(row, column, text, masked):
    """The SVG element of a piece of text in its place, or of the mask in that place."""
    x, y, width = MARGIN + column * WIDTH, MARGIN + row * HEIGHT, len(text) * WIDTH
    if masked:
        return f'<rect x="{x + 1:.1f}" y="{y + 2}" width="{width - 2:.1f}" height="17" rx="3"/>'
    return f'<text x="{x:.1f}" y="{y + 16}" textLength="{width:.1f}">{escape(text)}</text>'


def group_elements(canvases, tokenizer):
    """{(kind, first, end): SVG elements that are visible in the frames first .. end - 1} and the
    number of lines. Places are those of the final text, so nothing moves while tokens appear; a
    token that the sampler replaces later is cut to the place of the final one."""
    places, lines = lay_out(tokenizer.pieces(canvases[-1]))
    groups = defaultdict(list)
    for here, history in zip(places, find_stays(canvases)):
        for i, first, end in history:
            masked, shown = i == tokenizer.vocab_size, here
            if not masked and end < len(canvases):
                piece = tokenizer.pieces([i])[0].replace("\n", " ")
                shown = [(row, column, piece[: len(text)]) for row, column, text in here[:1]]
            kind = "mask" if masked else "text" if first else "given"
            kind += " gone" * (end < len(canvases))  # not in the final text
            groups[kind, first, end] += [draw(*place, masked) for place in shown]
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


def to_svg(canvases, tokenizer, seconds):
    """The animated SVG of one text, as a string. canvases: its frames, lists of ids; the text
    appears within `seconds`, stays for HOLD seconds and starts again."""
    groups, lines = group_elements(canvases, tokenizer)
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


def parse_arguments(argv):
    p = parser(__doc__)
    p.add_argument("ckpt")
    p.add_argument("--svg", type=Path, required=True, metavar="FILE", help="the picture to write")
    p.add_argument("--prompt", default="", help="text that the sample begins with")
    p.add_argument("--infill", help="text with holes, as in sample.py")
    p.add_argument("--length", type=int, help="tokens; default: the model's")
    p.add_argument("--seconds", type=int, default=8, help="in which the text appears")
    p.add_argument("--seed", type=int, default=0)
    add_sampler_options(p)
    add_model_options(p)
    p.set_defaults(num=1, batch_size=1, guidance=0.0, noise_removal="sampled")  # sample.py's other
    p.set_defaults(semi_ar=False, window=None, stride=None)  # options, which its checks read
    return p.parse_args(argv)


def watch(tokenizer, xs, header):
    """Redraw one row in the terminal as it is revealed: new tokens bright green, masks dim. Uses
    the terminal's alternate screen, cut to what fits; returns the final ids."""
    print("\x1b[?1049h", end="")
    previous = None
    try:
        for x in xs:
            ids = x[0].tolist()
            width, height = shutil.get_terminal_size()
            lines, column = [""], 0
            for piece, now, before in zip(tokenizer.pieces(ids), ids, previous or ids):
                style = "2" if now == tokenizer.vocab_size else "1;32" if now != before else "0"
                for character in piece:
                    if character == "\n" or column == width:
                        lines, column = [*lines, ""], 0
                    if character != "\n":
                        lines[-1] += f"\x1b[{style}m{character}"
                        column += 1
            screen = "\x1b[0m\x1b[K\n".join([header[:width], "", *lines[: height - 3]])
            print(f"\x1b[H{screen}\x1b[0m\x1b[J", end="", flush=True)
            previous = ids
    finally:
        print("\x1b[?1049l", end="", flush=True)
    return ids


def watch_all(model, tokenizer, cfg, canvas, num, eos, options):
    """Yield num texts, each shown while it is generated."""
    for row in range(num):
        header = f"sample {row + 1} of {num} · {options['sampler']}, {options['steps']} steps"
        ids = watch(tokenizer, sample.frames(model, cfg, canvas, [row], **options), header)
        yield tokenizer.decode(sample.text_ids(ids, canvas, cfg, eos))


@command
def main(argv=None):
    args = parse_arguments(argv)
    sample.check_arguments(args)
    check_range(args, seconds=1)
    if args.svg.is_dir() or not args.svg.parent.is_dir():
        fail(f"--svg {args.svg}: must be a file in an existing folder")
    model, cfg = load(args.ckpt, not args.no_ema, pick_device(args.device), args.dtype)
    tokenizer = tokenizer_of(model.tokenizer, cfg.vocab_size)
    options = sample.sampling_options(args, cfg, eos=None)
    canvas = sample.make_canvas(args, cfg, tokenizer, subword=model.tokenizer["kind"] != "char")
    canvases = [x[0].tolist() for x in sample.frames(model, cfg, canvas, [0], **options)]
    args.svg.write_text(to_svg(canvases, tokenizer, args.seconds), encoding="utf-8")
    print(f"{args.svg}: {len(canvases)} frames, {args.svg.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
