"""Generate text from a checkpoint: from nothing, from a prompt, or into holes.

python sample.py out/pydocs_mdlm/ckpt.pt --num 4 --watch
python sample.py out/owt_mdlm/ckpt.pt --prompt "The meaning of life" --steps 256 --top_p 0.9
python sample.py out/owt_mdlm/ckpt.pt --infill "Once upon a time ____ and so [12] the end."
python sample.py out/owt_mdlm/ckpt.pt --infill 'As in \\[1], x = data\\[0] + [3]'   # \\[1] is text
python sample.py out/owt_mdlm/ckpt.pt --infill "Hi, my name is[*] and that is why I am late."
python sample.py out/pydocs_mdlm/ckpt.pt --semi_ar --length 4096 --stride 128       # any length
python sample.py out/pydocs_mdlm/ckpt.pt --sampler threshold --threshold 0.7        # fewer calls
torchrun --nproc_per_node=8 -- sample.py out/owt_mdlm/ckpt.pt --num 64     # the same texts
python sample.py out/pydocs_mdlm/ckpt.pt --serve                                    # in a browser
"""

import sys
from functools import partial

from common import autocast, check_range, command, fail, parser, progress
from data.canvas import infill_canvas, prompt_canvas
from data.checkpoints import load
from data.command_line import (
    add_model_options,
    add_sampler_options,
    check_top_p,
    choose_sampler,
    read_sampler_options,
)
from data.processes import gather, local_device, process_group, rank_and_world, share
from data.tokenizer import tokenizer_of
from diffusion import denoiser, row_generators
from samplers import (
    ORDERS,
    SAMPLERS,
    STEPLESS,
    cached_denoiser,
    semi_ar,
    with_greedy_end,
    with_guidance,
    with_temperature,
    with_top_p,
)


def frames(
    model, cfg, canvas, rows, steps, sampler, guidance=0.0, temperature=1.0, top_p=1.0,
    noise_removal="sampled", seed=0, dtype="float32", sampler_options=None, semi=None, listen=None,
):  # fmt: skip
    """Yield (N, L) canvases from the masked one, (L,) or (N, L), to the text. Row number rows[i]
    has its own random numbers, so its text does not depend on the batch. sampler_options:
    parameters of that sampler only. semi: {window, stride, eos} of `semi_ar`, or None. listen:
    a wrapper of `denoise`, inside temperature and top-p, for callers that show predictions."""
    if sampler == "llada" and temperature and not (sampler_options or {}).get("lucky"):
        fail("--sampler llada: keeps the luckiest draws above --temperature 0, no law of the model;"
             " use --sampler confidence, or insist with --lucky 1")  # fmt: skip
    denoise = (cached_denoiser if cfg.causal else denoiser)(model, cfg)
    device = next(model.parameters()).device
    x = canvas.to(device).expand(len(rows), -1)
    if guidance:
        denoise = with_guidance(denoise, x != cfg.mask_id, guidance, cfg)
    if listen:
        denoise = listen(denoise)
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
    options: see `frames`. All processes of torchrun share the work and return all texts."""
    eos = end_id(model, tokenizer) if eos is None else eos
    canvas = prompt_canvas(tokenizer, "", cfg.seq_len, cfg) if canvas is None else canvas
    texts, sampler = [], choose_sampler(cfg, sampler)
    numbers = range(num) if cfg.fsdp else share(range(num))  # FSDP: all call it equally often
    masks, quiet = int((canvas == cfg.mask_id).sum()), rank_and_world()[0] > 0
    with progress(total=len(numbers) * masks, unit=" tokens", disable=quiet) as bar:
        for first in range(0, len(numbers), batch_size):
            rows = numbers[first : first + batch_size]
            for x in frames(model, cfg, canvas, rows, steps, sampler, **options):
                bar.n = (first + len(rows)) * masks - int((x == cfg.mask_id).sum())
                bar.update(0)
            texts += [tokenizer.decode(text_ids(ids, canvas, cfg, eos)) for ids in x.tolist()]
    return texts if cfg.fsdp else gather(texts)


# --------------------------------------------------------------------------------------------------
# The command


def add_length_options(p):
    p.add_argument("--length", type=int, help="tokens; default: the model's")
    p.add_argument("--semi_ar", action="store_true", help="any length, window by window")
    p.add_argument("--window", type=int, help="semi_ar: tokens of a window; default: the model's")
    p.add_argument("--stride", type=int, help="semi_ar: new tokens of a window; default: half")
    ends = ("sampled", "greedy")
    p.add_argument("--noise_removal", default="sampled", choices=ends, help="the last step")


def add_options(p):
    """The options of every command that writes texts; `check_arguments` reads them."""
    p.add_argument("--prompt", default="", help="text that the sample begins with")
    p.add_argument(
        "--infill", help='text with holes: "____" (a token per underscore), "[12]", "[*]"'
    )
    p.add_argument("--num", type=int, default=1, help="number of samples")
    add_sampler_options(p)
    add_length_options(p)
    p.add_argument(
        "--guidance", type=float, default=0.0, help="w of classifier-free guidance by the prompt"
    )
    p.add_argument("--stop", action="store_true", help="end a text at its first end-of-text")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--fps", type=float, help="of the live view; default: 4 seconds or more a text")
    add_model_options(p)


def parse_arguments(argv):
    p = parser(__doc__)
    p.add_argument("ckpt")
    add_options(p)
    p.add_argument("--latent_of", metavar="TEXT", help="a latent model: texts with z of this one")
    p.add_argument("--interpolate", nargs=2, metavar="TEXT", help="num texts, z between these two")
    p.add_argument("--batch_size", type=int, default=16, help="changes speed, not the text")
    p.add_argument("--watch", action="store_true", help="see the text appear; plain when piped")
    p.add_argument(
        "--serve", nargs="?", const="8000", metavar="PORT", help="a page to type in [port 8000]"
    )
    args = p.parse_args(argv)
    check_range(args, batch_size=1)
    if (args.watch or args.serve) and (args.latent_of is not None or args.interpolate):
        fail("--latent_of and --interpolate: not with --watch or --serve")
    return args


def check_arguments(args):
    """What can be checked without the model."""
    check_range(args, num=1, steps=1, length=1, temperature=0, guidance=0, seed=0)
    check_range(args, window=2, stride=1, fps=0.1)
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
    if args.noise_removal == "greedy" and sampler in (*STEPLESS, *ORDERS, "llada"):
        fail(f"--noise_removal greedy: the sampler {sampler} has no steps in time, so no last one")
    semi = dict(window=window, stride=args.stride, eos=eos) if args.semi_ar else None
    return dict(
        steps=args.steps, sampler=sampler, guidance=args.guidance, temperature=args.temperature,
        top_p=args.top_p, noise_removal=args.noise_removal, seed=args.seed, dtype=args.dtype,
        sampler_options=read_sampler_options(args, sampler, cfg), semi=semi,
    )  # fmt: skip


def make_canvas(args, cfg, tokenizer, subword):
    """The canvas (L,) of --prompt or --infill; its length is checked before so many ids exist."""
    length, canvas = args.length or cfg.seq_len, None
    try:
        if args.infill is not None:
            canvas = infill_canvas(tokenizer, args.infill, cfg, subword)
            length = len(canvas)
        if length > cfg.seq_len and not args.semi_ar:
            fail(f"the text would have {length} tokens, but the model has {cfg.seq_len};"
                 " --semi_ar writes longer texts window by window")  # fmt: skip
        return prompt_canvas(tokenizer, args.prompt, length, cfg) if canvas is None else canvas
    except ValueError as e:
        fail(f"--{'prompt' if args.infill is None else 'infill'}: {e}")


def read_arguments(args, model, cfg, tokenizer):
    """The canvas (L,), the options of `frames`, and the id that ends a text, or None."""
    if args.stop and tokenizer.eos is None:
        fail("--stop: the model's tokenizer has no end-of-text")
    eos = end_id(model, tokenizer, args.stop)
    options = sampling_options(args, cfg, eos)
    canvas = make_canvas(args, cfg, tokenizer, subword=model.tokenizer["kind"] != "char")
    return canvas, options, eos


@command
def main(argv=None):
    args = parse_arguments(argv)
    check_arguments(args)
    if args.serve:
        from tasks.serve import serve

        return serve(args)
    if args.watch and sys.stdout.isatty():
        from tasks.view import watch

        return watch(args, [args.ckpt], [args.sampler])
    with process_group(args):
        model, cfg = load(args.ckpt, not args.no_ema, local_device(args), args.dtype)
        tokenizer = tokenizer_of(model.tokenizer, cfg.vocab_size)
        canvas, options, eos = read_arguments(args, model, cfg, tokenizer)
        if args.latent_of is not None or args.interpolate:
            from extra.with_latent import sample_given_z

            texts = sample_given_z(model, tokenizer, cfg, canvas, eos, options, args)
        else:
            options |= dict(batch_size=args.batch_size, eos=eos)
            texts = generate(model, tokenizer, cfg, args.num, canvas, **options)
        if rank_and_world()[0] > 0:
            return
        for i, text in enumerate(texts):
            if args.num > 1:
                print(f"--- sample {i + 1}")
            print(text)


if __name__ == "__main__":
    main()
