"""Texts that appear out of masks: live in the terminal, as a page that plays, or as a picture.

python -m tasks.view out/pydocs_mdlm/ckpt.pt --num 3                        # in the terminal
python -m tasks.view out/pydocs_mdlm/ckpt.pt --num 2 --html text.html       # for any browser
python -m tasks.view A.pt B.pt --samplers ddpm_cache confidence --html compare.html
python -m tasks.view out/pydocs_mdlm/ckpt.pt --prompt "The function" --length 96 --svg text.svg

Several checkpoints or samplers use the same noise. The page is one file without network access.
"""

import codecs
import json
import re
from argparse import Namespace
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import sample
from common import check_range, command, fail, parser, pick_device
from data.checkpoints import load
from data.tokenizer import tokenizer_of
from samplers import OPTIONS, SAMPLERS, default_options
from tasks import view_terminal
from tasks.view_svg import to_svg

OTHERS = 4  # likeliest other tokens that are kept for each token
PAGE = Path(__file__).with_name("view.html")


# --------------------------------------------------------------------------------------------------
# What happens: the steps of a text, each a list of events


class Event(NamedTuple):
    """One position changed. p is the network's probability of the token, before temperature and
    top-p; None if the token was not drawn: a mask that came back, or the rest after an end."""

    position: int
    token: int
    p: float | None = None
    others: tuple = ()  # ((token, p), ...) of the likeliest other tokens


def events_between(before, now, call):
    """The events that turn the canvas `before` (L,) into `now` (L,). call: what the network was
    called with, and its answer, or None: (window of the canvas, t, at, log_p (N, V))."""
    changed, rows, ids = (now != before).nonzero()[:, 0].tolist(), {}, now.tolist()
    if call:
        seen, _, at, log_p = call
        starts = range(len(before) - len(seen) + 1)
        start = next(s for s in starts if torch.equal(before[s : s + len(seen)], seen))
        rows = {start + i: row for row, i in enumerate(at.nonzero()[:, 0].tolist())}
    drawn = [i for i in changed if i in rows and ids[i] < log_p.shape[-1]]
    if not drawn:
        return [Event(i, ids[i]) for i in changed]
    p = F.softmax(log_p[[rows[i] for i in drawn]].float(), -1)
    top = p.topk(min(OTHERS + 1, p.shape[-1]))
    events = {}
    for i, row, tokens, values in zip(drawn, p, top.indices.tolist(), top.values.tolist()):
        token = ids[i]
        others = [(other, q) for other, q in zip(tokens, values) if other != token][:OTHERS]
        events[i] = Event(i, token, row[token].item(), tuple(others))
    return [events.get(i) or Event(i, ids[i]) for i in changed]


def record(model, cfg, canvas, row, options):
    """Yield (t, events) of each step in which the sampler writes one text. Row number `row` has its
    own random numbers, so the text is the one that sample.py prints."""
    calls = []  # of the network since the last step

    def listen(denoise):
        def call(x, t, at):
            log_p = denoise(x, t, at)
            calls[:] = [(x[0], t[0].item(), at[0], log_p)]
            return log_p

        return call

    frames, t = sample.frames(model, cfg, canvas, [row], listen=listen, **options), 1.0
    before = next(frames)[0]
    for frame in frames:
        call = calls.pop() if calls else None
        t = call[1] if call else t
        yield t, events_between(before, frame[0], call)
        before = frame[0]


class Lane:
    """A text that is being written; lanes are shown side by side. `ids` is the canvas after the
    steps that were applied, `marks` {position: (when it was written, 0 to 1; p)}."""

    def __init__(self, title, tokenizer, cfg, canvas, eos, steps):
        self.title, self.tokenizer, self.cfg, self.eos = title, tokenizer, cfg, eos
        self.mask_id, self.steps, self.marks = cfg.mask_id, steps, {}
        self.canvas, self.ids = canvas, canvas.tolist()

    def apply(self, step):
        """The positions that a step changes; none if it is None."""
        t, events = step or (0, ())
        for event in events:
            self.ids[event.position] = event.token
            self.marks[event.position] = 1 - t, event.p
        return [event.position for event in events]

    def cut(self):
        """Keep what sample.py prints: no given first token, nothing after the end of the text."""
        self.ids = sample.text_ids(self.ids, self.canvas, self.cfg, self.eos)
        self.marks = {i - self.cfg.bos: mark for i, mark in self.marks.items()}

    def spell(self, ids):
        """One string per id. A character that several ids spell is in the string of the last."""
        utf8, pieces = codecs.getincrementaldecoder("utf-8")("replace"), []
        for left, token in zip(range(len(ids) - 1, -1, -1), ids):
            if token == self.mask_id:  # no part of a character stays open across a mask
                utf8.reset()
            pieces.append(utf8.decode(self.tokenizer.table[token], final=not left))
        return pieces


# --------------------------------------------------------------------------------------------------
# A recording: one line of JSON for each thing that happens, in order. view.html plays it.
# {"title", "start": pieces, "pieces"} is a new lane, {"lane", "t", "events", "pieces"} a step of
# one. An event is [position] for a mask or [position, piece, p, piece, p, ...]: the token and the
# likeliest others, p in thousandths or null. "pieces" holds the tokens that are new; a piece is
# its number among all, -1 a mask. A token is a string, or bytes if it is part of a character.


class Pieces:
    """Numbers for the tokens of a recording; `new` are those since the last `take`."""

    def __init__(self):
        self.numbers, self.new = {}, []

    def number(self, lane, token):
        if token == lane.mask_id:
            return -1
        data = lane.tokenizer.table[token]
        if data not in self.numbers:
            self.numbers[data] = len(self.numbers)
            try:
                self.new.append(data.decode())
            except UnicodeDecodeError:
                self.new.append(list(data))
        return self.numbers[data]

    def take(self):
        new, self.new = self.new, []
        return {"pieces": new} if new else {}


def messages(lanes):
    """The dicts of a recording, one step of each lane in turn."""
    pieces = Pieces()
    thousandths = lambda p: None if p is None else round(1000 * p)

    def pack(lane, event):
        if event.token == lane.mask_id:
            return [event.position]
        packed = [event.position, pieces.number(lane, event.token), thousandths(event.p)]
        for token, p in event.others:
            packed += [pieces.number(lane, token), thousandths(p)]
        return packed

    for lane in lanes:
        start = [pieces.number(lane, token) for token in lane.ids]
        yield {"title": lane.title, "start": start, **pieces.take()}
    for steps in zip_longest(*(lane.steps for lane in lanes)):
        for number, (lane, step) in enumerate(zip(lanes, steps)):
            if step:
                events = [pack(lane, event) for event in step[1]]
                yield {"lane": number, "t": round(step[0], 4), "events": events, **pieces.take()}


def to_line(message):
    """A message as one line of JSON that may stand inside <script>."""
    text = json.dumps(message, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c") + "\n"


def to_html(lines, form="", connect="'none'"):
    """The page that plays a recording. form: what the playground adds; connect: the address with
    which the page may talk."""
    read = lambda kind: PAGE.with_suffix(kind).read_text(encoding="utf-8")
    parts = {"STYLE": read(".css"), "SCRIPT": read(".js"), "FORM": form, "CONNECT": connect}
    return fill(read(".html"), {**parts, "RECORDING": "".join(lines)})


def fill(page, parts):
    """The page with {{NAME}} replaced; what is put in is not searched again."""
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda name: parts[name[1]], page)


# --------------------------------------------------------------------------------------------------
# The command


def make_lanes(args, models, samplers):
    """A lane for each checkpoint, sampler and row. models: {name: (model, cfg)}. The rows of all
    have the same noise. A sampler's own option, such as --eta, goes to those that have it."""
    users = {name: [s for s in samplers if s in SAMPLERS and name in default_options(SAMPLERS[s])]
             for name in OPTIONS}  # fmt: skip
    lanes = []
    for name, (model, cfg) in models.items():
        tokenizer = tokenizer_of(model.tokenizer, cfg.vocab_size)
        for sampler in samplers:
            others = {o: None for o, have in users.items() if have and sampler not in have}
            own = Namespace(**{**vars(args), **others, "sampler": sampler})
            canvas, options, eos = sample.read_arguments(own, model, cfg, tokenizer)
            for row in range(args.num):
                title = [name] * (len(models) > 1) + [options["sampler"]]
                title += [f"sample {row + 1}"] * (args.num > 1)
                steps = record(model, cfg, canvas, row, options)
                lanes.append(Lane(" · ".join(title), tokenizer, cfg, canvas, eos, steps))
    return lanes


def load_all(args, ckpts):
    """{short name: (model, cfg)} of the checkpoints; the names differ."""
    names = [str(Path(ckpt)) for ckpt in ckpts]
    if len(set(names)) < len(names):
        fail("a checkpoint is named twice; --samplers compares samplers, --num shows several texts")
    device = pick_device(args.device)
    return {n: load(n, not args.no_ema, device, args.dtype) for n in names}


def watch(args, ckpts, samplers):
    """What `sample.py --watch` does."""
    view_terminal.watch(make_lanes(args, load_all(args, ckpts), samplers), args.fps)


def parse_arguments(argv):
    p = parser(__doc__)
    p.add_argument("ckpt", nargs="+", help="several are shown side by side")
    p.add_argument("--samplers", nargs="+", choices=SAMPLERS, help="several, side by side")
    p.add_argument("--html", type=Path, metavar="FILE", help="the page to write")
    p.add_argument("--svg", type=Path, metavar="FILE", help="the picture to write, of one text")
    p.add_argument("--seconds", type=int, default=8, help="svg: in which the text appears")
    sample.add_options(p)
    args = p.parse_args(argv)
    sample.check_arguments(args)
    check_range(args, seconds=1)
    if args.sampler and args.samplers:
        fail("--sampler or --samplers, not both")
    args.samplers = list(dict.fromkeys(args.samplers or [args.sampler]))
    for name in ("html", "svg"):
        path = getattr(args, name)
        if path and (path.is_dir() or not path.parent.is_dir()):
            fail(f"--{name} {path}: must be a file in an existing folder")
    if args.svg and (args.html or args.num * len(args.ckpt) * len(args.samplers) > 1):
        fail("--svg: shows one text, without --html")
    return args


@command
def main(argv=None):
    args = parse_arguments(argv)
    if not (args.html or args.svg):
        return watch(args, args.ckpt, args.samplers)
    lanes = make_lanes(args, load_all(args, args.ckpt), args.samplers)
    if args.html:
        page, what = to_html(map(to_line, messages(lanes))), f"{len(lanes)} texts"
    else:
        (lane,) = lanes
        canvases = [lane.ids.copy(), *(lane.ids.copy() for step in lane.steps if lane.apply(step))]
        page = to_svg(canvases, lane.mask_id, lane.spell, args.seconds)
        what = f"{len(canvases)} frames"
    path = args.html or args.svg
    path.write_text(page, encoding="utf-8")
    print(f"{path}: {what}, {path.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
