"""Generate text from a checkpoint: from nothing, from a prompt, or into holes.

python sample.py out/pydocs_mdlm/ckpt.pt --num 4 --watch
python sample.py out/owt_mdlm/ckpt.pt --prompt "The meaning of life" --steps 256 --top_p 0.9
python sample.py out/owt_mdlm/ckpt.pt --infill "Once upon a time ____ and so [12] the end."
python sample.py out/pydocs_mdlm/ckpt.pt --semi_ar --length 4096 --stride 128       # any length
python sample.py out/pydocs_mdlm/ckpt.pt --sampler threshold --threshold 0.7        # fewer calls
"""

import re
import sys
from collections import deque
from functools import partial

import torch

from common import (
    add_model_options,
    add_sampler_options,
    autocast,
    check_range,
    check_top_p,
    choose_sampler,
    command,
    fail,
    parser,
    pick_device,
    read_sampler_options,
)
from data.checkpoints import load
from data.tokenizer import tokenizer_of
from diffusion import denoiser, row_generators
from samplers import (
    SAMPLERS,
    STEPLESS,
    cached_denoiser,
    semi_ar,
    with_greedy_end,
    with_guidance,
    with_temperature,
    with_top_p,
)

HOLE = re.compile(r"_{4,}|\[\d{1,6}\]")  # ____: a token per underscore; [12]: 12 tokens


def start_ids(tokenizer, cfg):
    """The ids that every text begins with: the first token, if the model always gets it."""
    if cfg.bos and tokenizer.bos is None:
        raise ValueError("bos=True, but the tokenizer has no token that begins a text")
    return [tokenizer.bos] if cfg.bos else []


def prompt_canvas(tokenizer, prompt, length, cfg):
    """(length,) ids: the prompt's tokens, then MASK. ValueError if it does not fit."""
    ids = start_ids(tokenizer, cfg) + tokenizer.encode(prompt)
    if len(ids) > length:
        raise ValueError(f"the prompt has {len(ids)} tokens, but the length is {length}")
    return torch.tensor(ids + [cfg.mask_id] * (length - len(ids)))


def infill_canvas(tokenizer, text, cfg, subword):
    """(L,) ids of a text with MASK in its holes. Sub-word tokens carry the space before a word, so
    for them the space before a hole belongs to the hole. ValueError without a hole."""
    ids, end = start_ids(tokenizer, cfg), 0
    for hole in HOLE.finditer(text):
        piece = text[end : hole.start()]
        ids += tokenizer.encode(piece.removesuffix(" ") if subword else piece, inside=end > 0)
        size = len(hole[0]) if hole[0][0] == "_" else int(hole[0][1:-1])
        ids += [cfg.mask_id] * size
        end = hole.end()
    if cfg.mask_id not in ids:
        raise ValueError(
            "no hole in the text: write ____ (a token per underscore, 4 or more) or [12]"
        )
    return torch.tensor(ids + tokenizer.encode(text[end:], inside=True))


def frames(
    model, cfg, canvas, rows, steps, sampler, guidance=0.0, temperature=1.0, top_p=1.0,
    noise_removal="sampled", seed=0, dtype="float32", sampler_options=None, semi=None,
):  # fmt: skip
    """Yield (N, L) canvases from the masked one, (L,) or (N, L), to the text. Row number rows[i]
    has its own random numbers, so its text does not depend on the batch. sampler_options:
    parameters of that sampler only. semi: {window, stride, eos} of `semi_ar`, or None."""
    denoise = (cached_denoiser if cfg.causal else denoiser)(model, cfg)
    device = next(model.parameters()).device
    x = canvas.to(device).expand(len(rows), -1)
    if guidance:
        denoise = with_guidance(denoise, x != cfg.mask_id, guidance, cfg)
    if temperature != 1:
        denoise = with_temperature(denoise, temperature)
    if top_p != 1:
        denoise = with_top_p(denoise, top_p)
    if noise_removal == "greedy":
        denoise = with_greedy_end(denoise, 1 / steps)
    yield x
    gen, sampler = row_generators(seed, rows), partial(SAMPLERS[sampler], **sampler_options or {})
    if semi:
        sampling = semi_ar(denoise, x, steps, cfg, gen, sampler, **semi)
    else:
        sampling = sampler(denoise, x, steps, cfg, gen)
    while True:  # autocast surrounds the sampler's own work, not the caller's
        with autocast(device, dtype):
            x = next(sampling, None)
        if x is None:
            return
        yield x


def end_id(model, tokenizer, stop=False):
    """The token at which a text ends, or None. Where rows are documents (model.ends) it is the
    tokenizer's eos. In packed rows that token separates documents, so only `stop` ends a text."""
    return tokenizer.eos if model.ends or stop else None


def text_ids(ids, canvas, cfg, eos=None):
    """The part of ids that is text: without a first token that is always given, up to the first eos
    that is not in the canvas (L,); all of it if eos is None."""
    ends = [i for i, (a, b) in enumerate(zip(ids, canvas.tolist())) if a == eos and b != eos]
    return ids[cfg.bos : ends[0] if ends else None]


def generate(
    model, tokenizer, cfg, num=1, canvas=None, batch_size=16, steps=1000, sampler=None, eos=None,
    **options,
):  # fmt: skip
    """num texts from `canvas` (L,), by default all MASK, each up to `eos`, by default `end_id`;
    options: see `frames`."""
    eos = end_id(model, tokenizer) if eos is None else eos
    canvas = prompt_canvas(tokenizer, "", cfg.seq_len, cfg) if canvas is None else canvas
    texts, sampler = [], choose_sampler(cfg, sampler)
    for first in range(0, num, batch_size):
        rows = range(first, min(first + batch_size, num))
        x = deque(frames(model, cfg, canvas, rows, steps, sampler, **options), maxlen=1).pop()
        texts += [tokenizer.decode(text_ids(ids, canvas, cfg, eos)) for ids in x.tolist()]
    return texts


# --------------------------------------------------------------------------------------------------
# The command


def parse_arguments(argv):
    p = parser(__doc__)
    p.add_argument("ckpt")
    p.add_argument("--prompt", default="", help="text that the sample begins with")
    p.add_argument("--infill", help='text with holes: "____" (a token per underscore) or "[12]"')
    p.add_argument("--num", type=int, default=1, help="number of samples")
    p.add_argument("--length", type=int, help="tokens; default: the model's")
    add_sampler_options(p)
    p.add_argument(
        "--noise_removal", default="sampled", choices=("sampled", "greedy"), help="the last step"
    )
    p.add_argument(
        "--guidance", type=float, default=0.0, help="w of classifier-free guidance by the prompt"
    )
    p.add_argument("--latent_of", metavar="TEXT", help="a latent model: texts with z of this one")
    p.add_argument("--interpolate", nargs=2, metavar="TEXT", help="num texts, z between these two")
    p.add_argument("--semi_ar", action="store_true", help="any length, window by window")
    p.add_argument("--stop", action="store_true", help="end a text at its first end-of-text")
    p.add_argument("--window", type=int, help="semi_ar: tokens of a window; default: the model's")
    p.add_argument(
        "--stride", type=int, help="semi_ar: new tokens of a window; default: half of it"
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--batch_size", type=int, default=16, help="changes memory and speed, not the text"
    )
    p.add_argument(
        "--watch", action="store_true", help="see the text appear; plain output when piped"
    )
    add_model_options(p)
    return p.parse_args(argv)


def check_arguments(args):
    """What can be checked without the model."""
    check_range(args, num=1, steps=1, length=1, temperature=0, guidance=0, seed=0)
    check_range(args, batch_size=1, window=2, stride=1)
    check_top_p(args)
    if args.infill is not None and (args.prompt or args.length):
        fail("--infill sets the whole text and its length; it excludes --prompt and --length")
    if not args.semi_ar and (args.window or args.stride):
        fail("--window and --stride: only with --semi_ar")


def sampling_options(args, cfg, eos):
    """The options of `frames`, checked against the model."""
    window = args.window or cfg.seq_len
    if args.guidance and (args.semi_ar or cfg.causal):
        fail("--guidance: not with --semi_ar, and not for an AR model")
    if window > cfg.seq_len:
        fail(f"--window {window}: must be at most the model's length, {cfg.seq_len}")
    if args.stride and args.stride >= window:
        fail(f"--stride {args.stride}: must be below the window, {window}")
    sampler = choose_sampler(cfg, args.sampler)
    if args.noise_removal == "greedy" and sampler in STEPLESS:
        fail(f"--noise_removal greedy: the sampler {sampler} has no steps, and so no last one")
    semi = dict(window=window, stride=args.stride, eos=eos) if args.semi_ar else None
    return dict(
        steps=args.steps, sampler=sampler, guidance=args.guidance, temperature=args.temperature,
        top_p=args.top_p, noise_removal=args.noise_removal, seed=args.seed, dtype=args.dtype,
        sampler_options=read_sampler_options(args, sampler), semi=semi,
    )  # fmt: skip


def make_canvas(args, cfg, tokenizer, subword):
    """The canvas (L,) of --prompt or --infill."""
    try:
        if args.infill is not None:
            canvas = infill_canvas(tokenizer, args.infill, cfg, subword)
        else:
            canvas = prompt_canvas(tokenizer, args.prompt, args.length or cfg.seq_len, cfg)
    except ValueError as e:
        fail(f"--{'prompt' if args.infill is None else 'infill'}: {e}")
    if len(canvas) > cfg.seq_len and not args.semi_ar:
        fail(f"the text would have {len(canvas)} tokens, but the model has {cfg.seq_len};"
             " --semi_ar writes longer texts window by window")  # fmt: skip
    return canvas


def watch_all(model, tokenizer, cfg, canvas, num, eos, options):
    """Yield num texts, each shown while it is generated."""
    from tasks.view import watch

    for row in range(num):
        header = f"sample {row + 1} of {num} · {options['sampler']}, {options['steps']} steps"
        ids = watch(tokenizer, frames(model, cfg, canvas, [row], **options), header)
        yield tokenizer.decode(text_ids(ids, canvas, cfg, eos))


@command
def main(argv=None):
    args = parse_arguments(argv)
    check_arguments(args)
    model, cfg = load(args.ckpt, not args.no_ema, pick_device(args.device), args.dtype)
    tokenizer = tokenizer_of(model.tokenizer)
    if args.stop and tokenizer.eos is None:
        fail("--stop: the model's tokenizer has no end-of-text")
    eos = end_id(model, tokenizer, args.stop)
    options = sampling_options(args, cfg, eos)
    canvas = make_canvas(args, cfg, tokenizer, subword=model.tokenizer["kind"] != "char")
    if args.latent_of or args.interpolate:
        from extra.with_latent import sample_given_z

        texts = sample_given_z(model, tokenizer, cfg, canvas, eos, options, args)
    elif args.watch and sys.stdout.isatty():
        texts = watch_all(model, tokenizer, cfg, canvas, args.num, eos, options)
    else:
        texts = generate(
            model, tokenizer, cfg, args.num, canvas, args.batch_size, eos=eos, **options
        )
    for i, text in enumerate(texts):
        if args.num > 1:
            print(f"--- sample {i + 1}")
        print(text)


if __name__ == "__main__":
    main()
