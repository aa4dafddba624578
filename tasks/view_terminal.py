"""The live view in a terminal: texts side by side, new tokens highlighted, masks dim.

It redraws the terminal's second screen at a visible pace. Afterwards the last frame is printed on
the first screen, where it stays. Text from a model is never sent to the terminal as it is: control
characters could move the cursor or worse, so they are shown as pictures (␛).
"""

import shutil
import sys
import time
import unicodedata
from itertools import chain, groupby, zip_longest

SECONDS = 4  # a text takes at least as long
NARROW, GAP = 28, 3  # the least width of a column, and the space between columns
TAB = 4
# Of the 256 colours; readable on black and on white.
AGES = (33, 38, 36, 71, 136, 172, 166)  # the first tokens are blue, the last orange
RESET, DIM, NEW, LIKELY, UNLIKELY = "0", "2", "7", "1", "4"  # NEW swaps text and background
LEGEND = (
    f"first \x1b[38;5;{AGES[0]}mblue\x1b[0m, last \x1b[38;5;{AGES[-1]}morange\x1b[0m; "
    "\x1b[1mbold\x1b[0m: p ≥ 0.5; \x1b[4munderlined\x1b[0m: p < 0.1"
)


# --------------------------------------------------------------------------------------------------
# Characters to lines


def cells_of(character):
    """(what is shown, its width in columns) of a character."""
    kind = unicodedata.category(character)
    if character == "\t":
        return " " * TAB, TAB
    if character == "\n":
        return " ", 1
    if kind in ("Mn", "Me") or character in "\u200d\ufe0e\ufe0f":
        return character, 0  # joins the one before: accents, and the parts of an emoji
    if kind == "Cf" or character == "\r":  # marks of direction could reorder the whole line
        return "", 0
    if kind == "Cc":
        return chr(0x2400 + min(ord(character), 0x21)), 1  # ␛ for escape; ␡ and later: ␡
    if not character.isprintable():
        return " ", 1
    return character, 2 if unicodedata.east_asian_width(character) in "WF" else 1


def wrap(pieces, columns):
    """Lines of cells (text, width, number of its piece). Lines break after spaces where there are
    any, and have at most `columns` columns, not counting a last cell that is a space."""
    lines, used = [[]], 0
    for number, piece in enumerate(pieces):
        for character in piece:
            text, width = cells_of(character)
            lines[-1].append((text, width, number))
            used += width
            if character == "\n":
                lines.append([])
                used = 0
            elif used > columns:
                spaces = (i for i, (text, *_) in enumerate(lines[-1], 1) if text.isspace())
                cut = max(spaces, default=len(lines[-1]) - 1) or 1
                lines[-1:] = [lines[-1][:cut], lines[-1][cut:]]
                used = sum(width for _, width, _ in lines[-1])
    return lines


# --------------------------------------------------------------------------------------------------
# Frames


def styles_of(lane, new=()):
    """One style per position. Hue: when the token appeared. Weight: how probable it was."""
    for position, token in enumerate(lane.ids):
        age, p = lane.marks.get(position, (None, None))
        if token == lane.mask_id:
            yield DIM
        elif position in new:
            yield NEW
        elif age is None:  # given
            yield RESET
        else:
            style = f"38;5;{AGES[min(int(age * len(AGES)), len(AGES) - 1)]}"
            weight = "" if p is None else LIKELY if p >= 0.5 else UNLIKELY if p < 0.1 else ""
            yield f"{style};{weight}" if weight else style


def paint(lane, columns, new=()):
    """The lines of a lane as strings with colours, each at most `columns` columns wide."""
    styles, lines = list(styles_of(lane, new)), []
    for line in wrap(lane.spell(lane.ids), columns):
        while sum(width for _, width, _ in line) > columns:  # the space or newline at the end
            line = line[:-1]
        runs = groupby(line, key=lambda cell: styles[cell[2]])
        shown = (f"\x1b[0;{style}m{''.join(text for text, *_ in run)}" for style, run in runs)
        lines.append("".join(shown) + "\x1b[0m")
    return lines


def place(lanes):
    """(columns of a lane, lanes beside each other, lines of a lane) in the terminal's present
    size."""
    width, height = shutil.get_terminal_size()
    beside = max(1, min(len(lanes), (width + GAP) // (NARROW + GAP)))
    rows = -(-len(lanes) // beside)
    return (width - GAP * (beside - 1)) // beside, beside, max((height - 1) // rows, 2)


def draw(lanes, new):
    """One frame as a string. Every line is put in its place, so that a character whose width
    the terminal sees differently moves nothing else."""
    columns, beside, lines = place(lanes)
    out = []
    for number, (lane, fresh) in enumerate(zip(lanes, new)):
        top, left = number // beside * lines + 1, number % beside * (columns + GAP) + 1
        masks = lane.ids.count(lane.mask_id)
        title = f"{lane.title} · {len(lane.ids) - masks} of {len(lane.ids)}"[:columns]
        shown = [f"\x1b[1m{title}\x1b[0m", *paint(lane, columns, fresh)][:lines]
        shown += [""] * (lines - len(shown))
        out += [
            f"\x1b[{top + i};{left}H\x1b[{columns}X{line}"  # X clears the lane's part of the line
            for i, line in enumerate(shown)
        ]
    return "".join(out)


def play(lanes, fps=None, show=None, clock=time.monotonic, sleep=time.sleep):
    """Show the lanes until their texts are complete, in the terminal's second screen.

    A frame waits for the moment at which SECONDS have passed as far as tokens have appeared, or for
    1 / fps. Ctrl-C gives the first screen and the cursor back."""
    show = show or (lambda text: print(text, end="", flush=True))
    started, size, masks = clock(), None, sum(lane.ids.count(lane.mask_id) for lane in lanes)
    show("\x1b[?1049h\x1b[?25l")
    try:
        start, frames = [[None] * len(lanes)], 0  # the first frame shows the masks
        for steps in chain(start, zip_longest(*(lane.steps for lane in lanes))):
            new = [lane.apply(step) for lane, step in zip(lanes, steps)]
            if frames and not any(new):  # nothing happened in this step
                continue
            left = sum(lane.ids.count(lane.mask_id) for lane in lanes)
            wait = frames / fps if fps else SECONDS * (1 - left / max(masks, 1))
            sleep(max(started + wait - clock(), 0))
            clear = "\x1b[2J" * (size != (size := shutil.get_terminal_size()))
            show(clear + draw(lanes, new))
            frames += 1
    finally:
        show("\x1b[?25h\x1b[?1049l")


def print_last(lanes):
    """The last frame of each lane: the text, in colours, as wide as the terminal."""
    width = shutil.get_terminal_size().columns
    for lane in lanes:
        lane.cut()
        print(f"--- {lane.title}", *paint(lane, width), sep="\n")


def watch(lanes, fps=None):
    """Show as many lanes at once as fit side by side, then the next; print each last frame."""
    if not sys.stdout.isatty():
        for lane in lanes:
            for step in lane.steps:
                lane.apply(step)
            lane.cut()
            print(f"--- {lane.title}", lane.tokenizer.decode(lane.ids), sep="\n")
        return
    while lanes:
        _, beside, _ = place(lanes)
        play(lanes[:beside], fps)
        print_last(lanes[:beside])
        lanes = lanes[beside:]
    print(LEGEND)
