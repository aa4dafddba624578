"""The sample command: prompts and holes are kept, rows are independent, the
terminal view is live."""

import io
import re
import sys
from dataclasses import asdict, replace

import pytest
import torch
from conftest import LETTERS, refused, save, tiny_run

import sample
from configs import Config
from data import command_line
from data.canvas import infill_canvas, prompt_canvas, split_holes
from data.checkpoints import load, save_checkpoint
from data.tokenizer import load_tokenizer, train_bpe
from model import DiT


def run(capsys, *args):
    sample.main([str(a) for a in args])
    return capsys.readouterr().out


def texts_of(out):
    """The texts that --num prints, each of one line."""
    return out.splitlines()[1::2]


def test_samples_are_texts_of_the_models_length(checkpoint, capsys):
    out = run(capsys, checkpoint)
    assert len(out) == 33 and set(out[:-1]) <= set(LETTERS)
    assert len(run(capsys, checkpoint, "--length", 7)) == 8
    three = run(capsys, checkpoint, "--num", 3)
    assert re.fullmatch(r"(--- sample \d\n[a-z ]{32}\n){3}", three)


def test_a_seed_is_a_text(checkpoint, capsys):
    three = lambda *args: run(capsys, checkpoint, "--num", 3, *args)
    first = three()
    assert three() == first != three("--seed", 1)


def lucky(sampler):
    """The options that choose a sampler at temperature 1."""
    return ["--sampler", sampler, *(["--lucky", 1] if sampler == "llada" else [])]


def test_llada_is_for_temperature_0_or_insisted_on(checkpoint, capsys):
    command = [str(checkpoint), "--sampler", "llada", "--steps", "5"]
    refused(capsys, lambda: sample.main(command), "--sampler llada", "confidence", "--lucky 1")
    greedy = run(capsys, *command, "--temperature", 0)
    assert greedy == run(capsys, *command[:2], "confidence", *command[3:], "--temperature", 0)
    assert run(capsys, *command, "--lucky", 1) != greedy


@pytest.mark.parametrize("sampler", sample.SAMPLERS)
def test_a_row_does_not_depend_on_its_batch(checkpoint, capsys, sampler):
    get = lambda *args: run(capsys, checkpoint, *lucky(sampler), "--steps", 20, *args)
    texts = get("--num", 6)
    assert get("--num", 6, "--batch_size", 1) == get("--num", 6, "--batch_size", 4) == texts
    assert get("--num", 2) == texts[: 2 * len(texts) // 6]
    assert len(set(texts_of(texts))) == 6


@pytest.mark.parametrize(
    "sampler, option, low, high",
    [
        ("threshold", "threshold", 0, 1), ("entropy_bound", "gamma", 0, 999),
        ("remdm_cap", "eta", 0, 1), ("remdm_rescale", "eta", 0, 1),
        ("margin", "per_call", 1, 9), ("ar", "per_call", 1, 9),
    ],
)  # fmt: skip
def test_a_samplers_option_reaches_it(checkpoint, capsys, monkeypatch, sampler, option, low, high):
    """From the command line, alone and window by window; without the option the default is used."""
    seen, real = [], sample.SAMPLERS[sampler]

    def spy(denoise, x, steps, cfg, gen=None, **options):
        seen.append(options)
        return real(denoise, x, steps, cfg, gen, **options)

    command = checkpoint, "--sampler", sampler, "--steps", 20, "--num", 2
    get = lambda *args: run(capsys, *command, *args)
    default, value = get(), command_line.default_options(real)[option]
    assert get(f"--{option}", value) == default
    assert get(f"--{option}", low) != get(f"--{option}", high)
    defaults = command_line.default_options
    known = lambda f: {option: value} if f is spy else defaults(f)
    monkeypatch.setattr(command_line, "default_options", known)
    monkeypatch.setitem(sample.SAMPLERS, sampler, spy)
    get(f"--{option}", low, "--semi_ar", "--length", 40)
    assert len(seen) == 2 and all(options == {option: low} for options in seen)
    seen.clear()
    assert get() == default and seen == [{}]


def test_help_names_the_samplers_of_every_option(capsys):
    with pytest.raises(SystemExit):
        run(capsys, "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "--eta ETA of the sampler remdm_cap [0.008], remdm_rescale [0.015]" in shown
    assert "--gamma GAMMA of the sampler entropy_bound [0.1]" in shown
    users = "ar [1], confidence [0], margin [0], entropy [0], llada [0]"
    assert f"--per_call PER_CALL of the sampler {users}" in shown


@pytest.mark.parametrize("sampler", sample.SAMPLERS)
def test_texts_around_holes_are_kept(checkpoint, capsys, sampler):
    options = [*lucky(sampler), "--steps", 9, *(["--eta", 1] if "remdm" in sampler else [])]
    out = run(capsys, checkpoint, "--infill", "one ____ two [3]end", *options)
    assert re.fullmatch(r"one [a-z ]{4} two [a-z ]{3}end\n", out)


def test_too_great_a_length_is_refused_before_its_ids_exist(checkpoint, capsys):
    argv = [str(checkpoint), "--length", str(2**31 - 1)]
    refused(capsys, lambda: sample.main(argv), "the text would have 2147483647 tokens")


def test_a_star_fills_the_models_length(checkpoint, capsys):
    out = run(capsys, checkpoint, "--infill", "one [*] two [3]end")
    assert re.fullmatch(r"one [a-z ]{17} two [a-z ]{3}end\n", out) and len(out) == 32 + 1
    assert re.fullmatch(r"one[a-z ]{29}\n", run(capsys, checkpoint, "--infill", "one[*]"))
    for text, words in ((f"{'a' * 32}[*]", "0 of 32 are left"), ("a[*]b[*]c", "may come once")):
        argv = [str(checkpoint), "--infill", text]
        refused(capsys, lambda argv=argv: sample.main(argv), "--infill: [*]", words)


def test_prompts_are_kept(checkpoint, capsys):
    assert re.fullmatch(r"the cat [a-z ]{24}\n", run(capsys, checkpoint, "--prompt", "the cat "))
    assert run(capsys, checkpoint, "--prompt", "abc", "--length", 3) == "abc\n"


def test_temperature_zero_is_greedy_and_top_p_cuts(checkpoint, capsys):
    get = lambda *args: texts_of(run(capsys, checkpoint, "--length", 1, "--num", 64, *args))
    model, cfg = load(checkpoint)
    p = model(torch.full((1, 1), cfg.mask_id), torch.ones(1)).softmax(-1)[0, 0]
    assert set(get("--temperature", 0)) == {LETTERS[p.argmax()]}
    order = p.argsort(descending=True)
    kept = {LETTERS[i] for i in order[: int((p[order].cumsum(0) < 0.3).sum()) + 1]}
    assert set(get("--top_p", 0.3)) <= kept < set(get())


def test_holes_take_the_space_before_a_subword():
    """Sub-word tokens begin with their space: "a ____ b" leaves no lone space
    token in front of the hole."""
    spec = train_bpe(["to be or not to be that is the question " * 40], 300)
    tokenizer = load_tokenizer(spec)
    mask, cfg = tokenizer.vocab_size, Config(vocab_size=tokenizer.vocab_size)
    infill = lambda text: infill_canvas(tokenizer, text, cfg, subword=True)
    ids = infill("to be [2] not to").tolist()
    assert ids == [*tokenizer.encode("to be"), mask, mask, *tokenizer.encode(" not to")]
    assert ids.count(mask) == 2 and tokenizer.decode(ids) == "to be██ not to"
    for hole, size in (("____", 4), ("______", 6), ("[1]", 1), ("[12]", 12)):
        assert (infill(f"to {hole}") == mask).sum() == size
    with pytest.raises(ValueError, match="no hole"):
        infill("a ___ b [x]")


@pytest.mark.parametrize(
    "text",
    ["x = data[0] + [1]", "____ and _____", r"\\server\[3]", r"\____\\[12]", "[0][00][1]", "a\\"],
)
def test_escaped_holes_are_text(text):
    """A backslash makes a hole text; one in front of a hole is written twice."""
    escape = lambda s: re.sub(r"(\\*)(_{4,}|\[\d{1,6}\])", r"\1\1\\\2", s)
    assert split_holes(escape(text)) == ([text], [])
    pieces = split_holes(f"{escape(text)}, [7]{escape(text)}")
    assert pieces == ([f"{text}, ", text], [7])


def test_a_backslash_in_front_of_a_hole_is_written_twice():
    assert split_holes(r"a\\[3]b\n") == (["a\\", r"b\n"], [3])


@pytest.mark.parametrize("hole", ["[0]", "[000]"])
def test_a_hole_of_no_tokens_is_an_error(hole, checkpoint, capsys):
    words = f"{hole} is a hole of no tokens", f"as text it is \\{hole}"
    refused(capsys, lambda: sample.main([str(checkpoint), "--infill", f"a {hole} [3]"]), *words)


def test_infilled_text_keeps_its_brackets(corpus, tmp_path, capsys):
    """From the command line to the text."""
    letters = " []_0123456789abcdefgh"
    cfg = replace(tiny_run(corpus), vocab_size=len(letters))
    path = save(tmp_path / "a.pt", cfg, dict(kind="char", characters=letters))
    out = run(capsys, path, "--infill", r"a\[0] \[1]\____[2]h", "--steps", 2)
    assert out.startswith("a[0] [1]____") and len(out.rstrip("\n")) == 15


def test_guidance_by_the_prompt(checkpoint, capsys):
    """It changes the text, unless there is no prompt, and does not depend on the batch."""
    get = lambda *args: run(capsys, checkpoint, "--steps", 50, "--num", 4, *args)
    guided = get("--prompt", "the cat ", "--guidance", 2)
    assert guided != get("--prompt", "the cat ") and guided.count("the cat ") == 4
    assert guided == get("--prompt", "the cat ", "--guidance", 2, "--batch_size", 3)
    assert get("--guidance", 2) == get()


def test_the_greedy_end_acts_in_the_last_step(checkpoint, capsys):
    """With one step it decides everything: all texts are the same. With many, hardly anything."""
    different = lambda *args: len(set(texts_of(run(capsys, checkpoint, "--num", 4, *args))))
    greedy = "--noise_removal", "greedy"
    assert different("--steps", 1) == 4
    assert different("--steps", 1, *greedy) == 1
    assert different("--steps", 1000, *greedy) == 4


# --------------------------------------------------------------------------------------------------
# Windows and ends


def test_semi_ar_writes_any_length_and_keeps_prompt_and_holes(checkpoint, capsys):
    get = lambda *args: run(capsys, checkpoint, "--semi_ar", *args)
    assert re.fullmatch(r"the cat [a-z ]{92}\n", get("--length", 100, "--prompt", "the cat "))
    half = get("--length", 100, "--window", 16, "--stride", 4)
    assert re.fullmatch(r"[a-z ]{100}\n", half) and half != get("--length", 100)
    out = get("--infill", f"one ____{'x' * 40}[3]end")
    assert re.fullmatch(f"one [a-z ]{{4}}{'x' * 40}[a-z ]{{3}}end\n", out)
    assert get("--length", 20) == run(capsys, checkpoint, "--length", 20)  # a single window
    texts = get("--length", 50, "--num", 5)
    assert get("--length", 50, "--num", 5, "--batch_size", 2) == texts


def test_a_text_ends_at_the_first_eos_that_was_written():
    canvas = torch.tensor([9, 1, 50, 50, 50])  # 9 ends texts, and begins this one
    cut = lambda ids, eos=None, **fields: sample.text_ids(ids, canvas, Config(**fields), eos)
    assert cut([9, 1, 2, 9, 9], 9) == [9, 1, 2]
    assert cut([9, 1, 2, 3, 4], 9) == [9, 1, 2, 3, 4]
    assert cut([9, 1, 2, 9, 9]) == [9, 1, 2, 9, 9]
    assert cut([9, 1, 2, 9, 9], 9, bos=True) == [1, 2]  # a given first token is no text


@pytest.mark.parametrize("ends", [False, True])
def test_a_prompt_gets_past_one_window_unless_rows_are_documents(ends, tmp_path, capsys):
    """A model of packed rows that writes an end-of-text, BOS = EOS, at every third position or so:
    with --semi_ar it fills the length. A model of documents, or --stop, ends at the first one."""
    spec = train_bpe(["the cat saw a dog "] * 20, 260) | {"eos": True}
    tokenizer = load_tokenizer(spec)
    cfg = replace(tiny_run("none"), vocab_size=tokenizer.vocab_size, seq_len=16)
    assert tokenizer.bos == tokenizer.eos == cfg.vocab_size - 1
    model = DiT(cfg)
    model.head.bias.data[tokenizer.eos] = 5.0
    weights = model.state_dict()
    save_checkpoint(
        tmp_path / "ckpt.pt", model=weights, ema=weights, step=1, config=asdict(cfg),
        tokenizer=spec, ends=ends,
    )  # fmt: skip
    get = lambda *args: run(
        capsys, tmp_path, "--semi_ar", "--length", 60, "--prompt", "the cat", "--seed", 1, *args
    )
    model, cfg = load(tmp_path)
    canvas = prompt_canvas(tokenizer, "the cat", 60, cfg)
    semi = dict(window=16, stride=8, eos=sample.end_id(model, tokenizer))
    ids = sample.generate(
        model, tokenizer._replace(decode=list), cfg, 8, canvas, semi=semi, steps=64
    )
    assert all(tokenizer.decode(text).startswith("the cat") for text in ids)
    if ends:
        assert max(map(len, ids)) < 60 and get() == get("--stop")
    else:
        assert all(len(text) == 60 and tokenizer.eos in text[:16] for text in ids)
        assert len(get()) > len(get("--stop"))


# --------------------------------------------------------------------------------------------------
# The terminal view


class Terminal(io.StringIO):
    def isatty(self):
        return True


def watch(monkeypatch, *args):
    """What sample.py writes to a terminal."""
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        sample.main([*map(str, args), "--watch"])
    return terminal.getvalue()


def test_watch_is_plain_output_in_a_pipe(checkpoint, capsys):
    plain = run(capsys, checkpoint, "--seed", 5, "--steps", 8)
    assert run(capsys, checkpoint, "--seed", 5, "--steps", 8, "--watch") == plain
    assert "\x1b" not in plain


def test_watch_redraws_a_terminal(checkpoint, capsys, monkeypatch):
    """In its second screen, one frame per event, both texts side by side; the first screen keeps
    the last frame."""
    plain = run(capsys, checkpoint, "--seed", 5, "--steps", 8, "--num", 2)
    shown = watch(monkeypatch, checkpoint, "--seed", 5, "--steps", 8, "--num", 2, "--fps", 999)
    assert shown.count("\x1b[?1049h") == shown.count("\x1b[?1049l") == 1
    view = shown.split("\x1b[?1049h")[1].split("\x1b[?1049l")[0]
    frames = view.split("\x1b[1;1H")[1:]
    assert "sample 1" in frames[0] and "sample 2" in frames[0]
    masks = [frame.count("█") for frame in frames]
    assert masks[0] == 64 and masks[-1] == 0 and masks == sorted(masks, reverse=True)
    assert 3 < len(frames) <= 9  # the canvas and at most 8 events
    new = [sum(map(len, re.findall(r"\x1b\[0;7m([^\x1b]*)", frame))) for frame in frames]
    assert new == [0, *(-b for b in torch.tensor(masks).diff().tolist())]
    left = re.sub(r"\x1b\[\?1049h.*?\x1b\[\?1049l", "", shown, flags=re.DOTALL)
    left = re.sub(r"\x1b\[[0-9;]*m", "", left).replace("--- ddpm_cache · ", "--- ")
    assert left.startswith(plain) and "\x1b" not in left


def test_watch_fits_the_terminal(checkpoint, monkeypatch):
    """Long lines wrap, what is too tall is cut, and no frame scrolls."""
    monkeypatch.setenv("COLUMNS", "10")
    monkeypatch.setenv("LINES", "5")
    view = watch(monkeypatch, checkpoint, "--steps", 3, "--fps", 999).split("\x1b[?1049l")[0]
    for frame in view.split("\x1b[1;1H")[1:]:
        lines = re.split(r"\x1b\[\d+;1H", frame)
        lines = [re.sub(r"\x1b\[[0-9;]*[a-zA-Z]|\x1b\[\?25h", "", line) for line in lines]
        assert len(lines) == 4 and max(map(len, lines)) <= 10
        assert "".join(lines[1:]).count("█") == 30 or "█" not in lines[0]


def test_the_callers_work_between_frames_is_not_autocast(checkpoint):
    model, cfg = load(checkpoint)
    canvas = torch.full((8,), cfg.mask_id)
    for _ in sample.frames(model, cfg, canvas, [0], 4, "ddpm", dtype="bfloat16"):
        assert not torch.is_autocast_enabled("cpu")
