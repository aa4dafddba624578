"""The sample command: prompts and holes are kept, rows are independent, the terminal view is live."""

import io
import re
import sys

import pytest
import torch
from conftest import LETTERS

import common
import sample
from configs import Config
from data.tokenizer import load_tokenizer, train_bpe
from model import load


def run(capsys, *args):
    sample.main([str(a) for a in args])
    return capsys.readouterr().out


def test_samples_are_text_of_the_models_length(checkpoint, capsys):
    out = run(capsys, checkpoint)
    assert len(out) == 33 and set(out[:-1]) <= set(LETTERS)
    assert len(run(capsys, checkpoint, "--length", 7)) == 8
    three = run(capsys, checkpoint, "--num", 3)
    assert re.fullmatch(r"(--- sample \d\n[a-z ]{32}\n){3}", three)


def test_a_seed_is_a_text(checkpoint, capsys):
    first = run(capsys, checkpoint, "--num", 3)
    assert (
        run(capsys, checkpoint, "--num", 3)
        == first
        != run(capsys, checkpoint, "--num", 3, "--seed", 1)
    )


@pytest.mark.parametrize("sampler", sample.SAMPLERS)
def test_a_row_does_not_depend_on_its_batch(checkpoint, capsys, sampler):
    get = lambda *args: run(capsys, checkpoint, "--sampler", sampler, "--steps", 20, *args)
    texts = get("--num", 6)
    assert get("--num", 6, "--batch_size", 1) == get("--num", 6, "--batch_size", 4) == texts
    assert get("--num", 2) == texts[: 2 * len(texts) // 6]
    lines = texts.splitlines()[1::2]
    assert len(set(lines)) == 6


@pytest.mark.parametrize(
    "sampler, option, low, high",
    [
        ("threshold", "--threshold", 0, 1), ("entropy_bound", "--gamma", 0, 999),
        ("remdm_cap", "--eta", 0, 1), ("remdm_rescale", "--eta", 0, 1),
    ],
)  # fmt: skip
def test_a_samplers_own_option_reaches_it(
    checkpoint, capsys, monkeypatch, sampler, option, low, high
):
    """From the command line, alone and window by window; without the option the default is used."""
    seen, real = [], sample.SAMPLERS[sampler]

    def spy(denoise, x, steps, cfg, gen=None, **own):
        seen.append(own)
        return real(denoise, x, steps, cfg, gen, **own)

    get = lambda *args: run(
        capsys, checkpoint, "--sampler", sampler, "--steps", 20, "--num", 2, *args
    )
    default = get()
    value = common.default_options(real)[option[2:]]
    assert get(option, value) == default
    assert get(option, low) != get(option, high)
    monkeypatch.setattr(common, "default_options", lambda f: {option[2:]: value})
    monkeypatch.setitem(sample.SAMPLERS, sampler, spy)
    get(option, low, "--semi_ar", "--length", 40)
    assert len(seen) == 2 and all(own == {option[2:]: low} for own in seen)
    seen.clear()
    assert get() == default and seen == [{}]


@pytest.mark.parametrize(
    "args, words",
    [
        (
            ["--threshold", "0.5"],
            ["--threshold 0.5", "an option of threshold, not of ddpm_cache", "--sampler"],
        ),
        (["--eta", "0.5", "--sampler", "ddpm"], ["remdm_cap and remdm_rescale, not of ddpm"]),
        (["--eta", "1.5", "--sampler", "remdm_cap"], ["--eta 1.5", "from 0 to 1"]),
        (["--threshold", "-1", "--sampler", "threshold"], ["--threshold -1", "from 0 to 1"]),
        (["--gamma", "nan", "--sampler", "entropy_bound"], ["--gamma nan", "from 0 to inf"]),
        (["--gamma", "x", "--sampler", "entropy_bound"], ["--gamma", "float"]),
        (
            ["--noise_removal", "greedy", "--sampler", "threshold"],
            ["--noise_removal greedy", "no steps"],
        ),
    ],
)
def test_options_that_the_sampler_has_not_are_refused(checkpoint, capsys, args, words):
    with pytest.raises(SystemExit) as stop:
        run(capsys, checkpoint, *args)
    out, err = capsys.readouterr()
    assert (
        stop.value.code == 2
        and not out
        and err.count("\n") == 1
        and all(word in err for word in words)
    )


def test_help_names_the_samplers_of_every_option(capsys):
    with pytest.raises(SystemExit):
        run(capsys, "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "--eta ETA of the sampler remdm_cap [0.008], remdm_rescale [0.015]" in shown
    assert "--gamma GAMMA of the sampler entropy_bound [0.1]" in shown


def test_prompts_and_texts_around_holes_are_kept(checkpoint, capsys):
    for sampler in sample.SAMPLERS:
        own = ("--sampler", sampler, "--steps", 9, *(("--eta", 1) if "remdm" in sampler else ()))
        out = run(capsys, checkpoint, "--infill", "one ____ two [3]end", *own)
        assert re.fullmatch(r"one [a-z ]{4} two [a-z ]{3}end\n", out)
    assert re.fullmatch(r"the cat [a-z ]{24}\n", run(capsys, checkpoint, "--prompt", "the cat "))
    assert run(capsys, checkpoint, "--prompt", "abc", "--length", 3) == "abc\n"
    out = run(capsys, checkpoint, "--infill", "one ____ two [3]end")
    assert re.fullmatch(r"one [a-z ]{4} two [a-z ]{3}end\n", out)


def test_temperature_zero_is_greedy_and_top_p_cuts(checkpoint, capsys):
    get = lambda *args: run(capsys, checkpoint, "--length", 1, "--num", 64, *args).split("\n")[1::2]
    model, cfg = load(checkpoint)
    p = model(torch.full((1, 1), cfg.mask_id), torch.ones(1)).softmax(-1)[0, 0]
    assert set(get("--temperature", 0)) == {LETTERS[p.argmax()]}
    order = p.argsort(descending=True)
    kept = {LETTERS[i] for i in order[: int((p[order].cumsum(0) < 0.3).sum()) + 1]}
    assert set(get("--top_p", 0.3)) <= kept < set(get())


def test_holes_take_the_space_before_a_subword():
    """Sub-word tokens begin with their space: "a ____ b" leaves no lone space token in front of the hole."""
    text = "to be or not to be that is the question " * 40
    spec = train_bpe([text], 300)
    tokenizer = load_tokenizer(spec)
    mask, cfg = tokenizer.vocab_size, Config(vocab_size=tokenizer.vocab_size)
    ids = sample.infill_canvas(tokenizer, "to be [2] not to", cfg, subword=True).tolist()
    assert ids == [*tokenizer.encode("to be"), mask, mask, *tokenizer.encode(" not to")]
    assert ids.count(mask) == 2 and tokenizer.decode(ids) == "to be██ not to"
    for hole, size in (("____", 4), ("______", 6), ("[1]", 1), ("[12]", 12)):
        canvas = sample.infill_canvas(tokenizer, f"to {hole}", cfg, subword=True)
        assert (canvas == mask).sum() == size
    with pytest.raises(ValueError, match="no hole"):
        sample.infill_canvas(tokenizer, "a ___ b [x]", cfg, subword=True)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_watch_redraws_a_terminal_and_is_plain_in_a_pipe(checkpoint, capsys, monkeypatch):
    plain = run(capsys, checkpoint, "--seed", 5, "--steps", 8)
    assert (
        run(capsys, checkpoint, "--seed", 5, "--steps", 8, "--watch") == plain
        and "\x1b" not in plain
    )
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    sample.main([str(checkpoint), "--seed", "5", "--steps", "8", "--watch", "--num", "2"])
    shown = terminal.getvalue()
    assert (
        shown.count("\x1b[?1049h") == shown.count("\x1b[?1049l") == 2
    )  # the second screen, and back
    views = [
        part.split("\x1b[?1049l")[0].split("\x1b[H")[1:] for part in shown.split("\x1b[?1049h")[1:]
    ]
    for i, frames in enumerate(views):
        assert f"sample {i + 1} of 2" in frames[0]
        masks = [f.count("█") for f in frames]
        assert masks[0] == 32 and masks[-1] == 0 and masks == sorted(masks, reverse=True)
        assert 3 < len(frames) <= 9  # the canvas and at most 8 events
        bright = [f.count("\x1b[1;32m") for f in frames]
        assert bright == [0, *(-b for b in torch.tensor(masks).diff().tolist())]
    left = re.sub(
        r"\x1b\[\?1049h.*?\x1b\[\?1049l", "", shown, flags=re.DOTALL
    )  # what stays on the terminal
    assert left.startswith(f"--- sample 1\n{plain}--- sample 2\n") and "\x1b" not in left


def test_watch_fits_the_terminal(checkpoint, monkeypatch):
    """Long lines wrap, what is too tall is cut, and no frame scrolls."""
    monkeypatch.setenv("COLUMNS", "10")
    monkeypatch.setenv("LINES", "5")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    sample.main([str(checkpoint), "--watch", "--steps", "3"])
    view = terminal.getvalue().split("\x1b[?1049l")[0]
    for frame in view.split("\x1b[H")[1:]:
        lines = re.sub(r"\x1b\[[0-9;]*[a-zA-Z]", "", frame).split("\n")
        assert (
            len(lines) == 4 and max(map(len, lines)) == 10 and len(lines[2]) == len(lines[3]) == 10
        )


def test_caller_work_between_frames_is_not_autocast(checkpoint):
    model, cfg = load(checkpoint)
    canvas = torch.full((8,), cfg.mask_id)
    for _ in sample.frames(model, cfg, canvas, [0], 4, "ddpm", dtype="bfloat16"):
        assert not torch.is_autocast_enabled("cpu")


# ---------------------------------------------------------------------------------------------------------


def test_semi_ar_writes_any_length_and_keeps_prompt_and_holes(checkpoint, capsys):
    out = run(capsys, checkpoint, "--semi_ar", "--length", 100, "--prompt", "the cat ")
    assert re.fullmatch(r"the cat [a-z ]{92}\n", out)
    half = run(capsys, checkpoint, "--semi_ar", "--length", 100, "--window", 16, "--stride", 4)
    assert re.fullmatch(r"[a-z ]{100}\n", half) and half != run(
        capsys, checkpoint, "--semi_ar", "--length", 100
    )
    out = run(capsys, checkpoint, "--semi_ar", "--infill", f"one ____{'x' * 40}[3]end")
    assert re.fullmatch(f"one [a-z ]{{4}}{'x' * 40}[a-z ]{{3}}end\n", out)
    short = run(
        capsys, checkpoint, "--length", 20
    )  # a text of one window is that of the plain sampler
    assert run(capsys, checkpoint, "--semi_ar", "--length", 20) == short
    texts = run(capsys, checkpoint, "--semi_ar", "--length", 50, "--num", 5)
    assert (
        run(capsys, checkpoint, "--semi_ar", "--length", 50, "--num", 5, "--batch_size", 2) == texts
    )


def test_guidance_by_the_prompt(checkpoint, capsys):
    """It changes the text, unless nothing is given to guide it, and does not depend on the batch."""
    run_with = lambda *args: run(capsys, checkpoint, "--steps", 50, "--num", 4, *args)
    guided = run_with("--prompt", "the cat ", "--guidance", 2)
    assert guided != run_with("--prompt", "the cat ") and guided.count("the cat ") == 4
    assert guided == run_with("--prompt", "the cat ", "--guidance", 2, "--batch_size", 3)
    assert run_with("--guidance", 2) == run_with()


def test_a_text_ends_at_the_first_eos_that_was_written():
    canvas = torch.tensor([9, 1, 50, 50, 50])  # 9 ends texts, and begins this one
    assert sample.text_ids([9, 1, 2, 9, 9], canvas, Config(), 9) == [9, 1, 2]
    assert sample.text_ids([9, 1, 2, 3, 4], canvas, Config(), 9) == [9, 1, 2, 3, 4]
    assert sample.text_ids([9, 1, 2, 9, 9], canvas, Config()) == [9, 1, 2, 9, 9]
    assert sample.text_ids([9, 1, 2, 9, 9], canvas, Config(bos=True), 9) == [
        1,
        2,
    ]  # which is no text


def test_the_greedy_end_acts_in_the_last_step(checkpoint, capsys):
    """With one step that is everything: every text is the same. With many, it is hardly anything."""
    greedy = ("--noise_removal", "greedy", "--num", 4)
    lines = run(capsys, checkpoint, "--steps", 1, *greedy).splitlines()[1::2]
    assert (
        len(set(lines)) == 1
        and len(set(run(capsys, checkpoint, "--steps", 1, "--num", 4).splitlines()[1::2])) == 4
    )
    assert len(set(run(capsys, checkpoint, "--steps", 1000, *greedy).splitlines()[1::2])) == 4
