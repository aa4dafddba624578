"""Bad arguments of every command: one line on stderr that names the option and
what is allowed, exit code 2.

A new command is a line in COMMANDS; a new case is a line in BAD: the command line, then words that
the error must hold. CKPT is a checkpoint of a masked diffusion model of 27 characters and 32
tokens, AR one of an autoregressive model."""

import importlib
import shlex

import pytest
from conftest import refused, save, tiny_run

from configs import CONFIGS, as_ar

COMMANDS = {  # name: (module, function, arguments in front of every case)
    "train": ("data.command_line", "from_cli", ""),
    "sample": ("sample", "main", "CKPT"),
    "view": ("tasks.view", "main", "CKPT"),
    "evaluate": ("evaluate", "main", "CKPT"),
    "judge": ("tasks.judge", "main", "CKPT"),
    "quality": ("tasks.quality", "main", "CKPT --judge AR"),
    "harness": ("tasks.harness", "main", "CKPT --tasks lambada"),
    "answer": ("tasks.answer", "main", "gsm8k CKPT"),
    "bench": ("tasks.bench", "main", ""),
    "convert": ("tasks.convert", "main", ""),
    "prepare": ("data.prepare", "main", ""),
}

# fmt: off
BAD = {
    "train": [
        ("owt_mdln", "owt_mdln", "did you mean owt_mdlm?"),
        ("smdm170", "smdm170", "did you mean smdm_170?"),
        ("pydocs-mdlm", "did you mean pydocs_mdlm?"),
        ("steps=3", "did you mean --steps?"),
        ("xyz", "xyz", *(name for name in CONFIGS if "smdm_" not in name), "smdm_N", "1028"),
        ("owt_mdlm text8_mdlm", "text8_mdlm"),
        ("--stepz=3", "unknown option --stepz; did you mean --steps?"),
        ("--n-layers=3", "unknown option --n_layers; did you mean --n_layer?"),
        ("--xyzzy=3", "unknown option --xyzzy", "--steps", "--seq_len"),
        ("--batch-size=0", "batch_size=0", "at least 1"),  # - is the same as _
        # types
        ("--steps=many", "--steps", "int", "many"),
        ("--steps=1.5", "--steps", "1.5"),
        ("--lr=fast", "--lr", "float"),
        ("--tied=perhaps", "--tied", "perhaps"),
        ("smdm_170 --flops=much", "--flops", "float", "much"),
        # choices
        ("--loss=sedd2", "loss='sedd2'", "mdlm", "d3pm"),
        ("--schedule=quadratic", "schedule='quadratic'", "linear", "cosine"),
        ("--time_draw=sobol", "time_draw='sobol'", "stratified", "counts"),
        ("--norm=batch", "norm='batch'", "layer", "rms"),
        ("--mlp=relu", "mlp='relu'", "gelu", "swiglu"),
        ("--dtype=float16", "dtype", "bfloat16"),
        # ranges
        ("--steps=0", "steps=0", "at least 1"),
        ("--T=-1", "T=-1", "at least 0"),
        ("--T=100000000000000000000", "T=1", "2**31"),
        ("--lr=-1", "lr=-1"),
        ("--lr=nan", "lr=nan", "at least 0 and below"),
        ("--lr=0", "lr=0", "above 0"),
        ("--eps=0", "eps=0", "above 0"),
        ("--seed=-1", "seed=-1"),
        ("--seed=99999999999999999999", "seed=9", "2**31"),
        ("--dropout=1", "dropout=1", "below 1"),
        ("--t_min=1", "t_min=1", "below 1"),
        ("--short_rows=1", "short_rows=1", "below 1"),
        ("--out_dir=", "out_dir", "empty"),
        ("smdm_170 --flops=0", "flops=0", "above 0"),
        # fields that do not go together
        ("--min_lr=1", "min_lr=1", "at most lr"),
        ("--n_head=3", "n_embd=256", "n_head", "6"),
        ("--loss=d3pm", "loss=d3pm", "T"),
        ("--aux_ce=0.1", "aux_ce", "d3pm"),
        ("--zero_masking=False", "zero_masking=False", "d3pm"),
        ("--carry_over=False", "carry_over=False", "d3pm"),
        ("text8_d3pm --carry_over=False", "aux_ce=0.05", "carry_over=True"),
        ("--loss=sedd --T=10", "T=10", "must be 0", "sedd"),
        ("--loss=ar", "causal=False", "must be True"),
        ("--causal", "causal=True", "loss=ar"),
        ("owt_mdlm --loss=ar --causal", "cond_dim=128", "must be 0"),
        ("--time_cond=True --cond_dim=0", "time_cond", "cond_dim"),
        ("--time_draw=counts --T=10", "time_draw=counts", "T=0"),
        ("--time_draw=importance --time_law=uniform", "importance", "t_min"),
        ("--time_draw=importance --t_min=0.001", "importance", "time_law=uniform"),
        ("--flops=10", "--flops: not an argument of pydocs_mdlm"),
        ("--flops 0 smdm_170", "flops=0", "above 0"),  # also in front of the config
    ],
    "sample": [
        ("--steps 0", "--steps 0", "at least 1"),
        ("--steps x", "--steps", "int"),
        ("--steps 9999999999", "--steps", "2**31"),
        ("--seed 99999999999999999999", "--seed", "2**31"),
        ("--num 0", "--num 0"),
        ("--batch_size 0", "--batch_size 0"),
        ("--length 0", "--length 0"),
        ("--length 33", "33 tokens", "32"),
        ("--temperature -1", "--temperature"),
        ("--temperature nan", "--temperature"),
        ("--top_p 0", "--top_p", "above 0"),
        ("--top_p 1.1", "--top_p"),
        ("--dtype int8", "--dtype", "float32"),
        ("--device cuda:9", "cuda:9"),
        # prompts and holes
        ("--prompt 'Ünder 5'", "--prompt", "'Ü'", "'5'"),
        (f"--prompt {'a' * 40}", "--prompt", "40 tokens", "32"),
        ("--prompt abc --length 2", "--prompt", "3 tokens", "2"),
        ("--infill 'no hole'", "--infill", "____", "[12]"),
        ("--infill a[99]", "100 tokens", "32"),
        ("--nmu 3", "unknown option --nmu; did you mean --num?"),
        ("--top-p 0", "--top_p 0", "above 0"),
        ("--prompt --top-p", "expected one argument"),
        ("--prompt '--top-p 5'", "--prompt", "'-'", "'5'"),  # a value keeps its -
        ("--sampler ddpm_cash", "did you mean ddpm_cache?"),
        ("--infill a[99999999999999]", "--infill", "____"),
        ("--infill 'a ____' --prompt b", "--infill", "--prompt"),
        ("--guidance -1", "--guidance -1", "at least 0"),
        ("--guidance 1 --semi_ar", "--guidance", "--semi_ar"),
        # windows
        ("--window 8", "--window", "--semi_ar"),
        ("--stride 8", "--stride", "--semi_ar"),
        ("--semi_ar --window 64", "--window 64", "at most", "32"),
        ("--semi_ar --stride 32", "--stride 32", "below the window, 32"),
        ("--semi_ar --stride 0", "--stride 0", "at least 1"),
        # samplers and their options
        ("--sampler magic", "--sampler", "magic", "ddpm_cache", "first_hitting"),
        ("--noise_removal none", "--noise_removal", "sampled", "greedy"),
        ("--noise_removal greedy --sampler ar", "--noise_removal greedy", "no steps"),
        ("--noise_removal greedy --sampler threshold", "--noise_removal greedy", "no steps"),
        ("--noise_removal greedy --sampler margin", "--noise_removal greedy", "no steps"),
        ("--sampler llada", "--sampler llada", "luckiest", "--lucky 1"),
        ("--per_call 2", "--per_call 2", "margin", "not of ddpm_cache"),
        ("--per_call 1.5 --sampler margin", "--per_call", "int"),
        ("--threshold 0.5", "--threshold 0.5", "threshold, not of ddpm_cache", "--sampler"),
        ("--eta 0.5 --sampler ddpm", "remdm_cap and remdm_rescale, not of ddpm"),
        ("--eta 1.5 --sampler remdm_cap", "--eta 1.5", "from 0 to 1"),
        ("--threshold -1 --sampler threshold", "--threshold -1", "from 0 to 1"),
        ("--gamma nan --sampler entropy_bound", "--gamma nan", "from 0 to inf"),
        ("--gamma x --sampler entropy_bound", "--gamma", "float"),
        # the live view and the playground
        ("--fps 0", "--fps 0", "at least 0.1"),
        ("--fps nan", "--fps nan", "at least 0.1"),
        ("--serve x", "--serve x", "port", "65535"),
        ("--serve 65536", "--serve 65536", "65535"),
        ("--serve 0 --semi_ar", "--semi_ar", "not with --serve"),
        ("--serve 0 --eta 0.5", "--eta", "remdm_cap"),
        ("--serve 0 --prompt a --infill a____", "--infill", "--prompt"),
    ],
    "view": [
        ("--steps 0", "--steps 0", "at least 1"),
        ("--fps 0", "--fps 0", "at least 0.1"),
        ("--svg . ", "--svg", "file"),
        ("--svg none/a.svg", "--svg", "existing folder"),
        ("--html none/a.html", "--html", "existing folder"),
        ("--svg a.svg --seconds 0", "--seconds", "at least 1"),
        ("--svg a.svg --num 2", "--svg", "one text"),
        ("--svg a.svg --html a.html", "--svg", "without --html"),
        ("--svg a.svg --infill none", "--infill", "hole"),
        ("--html a.html --length 99", "99 tokens"),
        ("--sampler ar --samplers ddpm", "--samplers", "not both"),
        ("--samplers ddpm confidence --eta 0.5", "--eta", "remdm_cap"),
        ("--samplers ddpn", "ddpn", "ddpm_cache"),
        ("CKPT", "named twice"),
        ("none.pt", "none.pt", "no such checkpoint"),
    ],
    "evaluate": [
        ("--split dev", "dev", "train, val, test"),
        ("--T -1", "--T -1", "at least 0"),
        ("--passes 0", "--passes 0"),
        ("--pases 3", "did you mean --passes?"),
        ("--seed 99999999999999999999", "--seed", "2**31"),
        ("--batch_size 0", "--batch_size 0"),
        ("--order luck", "--order", "luck", "margin"),
        ("--order llada", "--order", "llada", "margin"),
        ("--order margin --per_call 0", "--per_call 0", "at least 1"),
        ("--per_call 2", "--per_call 2", "only with --order"),
        ("--order threshold --per_call 2", "--per_call 2", "threshold chooses"),
        ("--order margin --T 10", "--order margin", "exact", "--T"),
        ("--order margin --passes 2", "--order margin", "exact", "--passes"),
        ("--data nowhere/at/all", "nowhere/at/all/meta.json"),
        ("--zero_shot ptb --split val", "--split", "--zero_shot"),
        ("--zero_shot ptb --data here", "--data", "--zero_shot"),
        ("--zero_shot ptb c4", "c4", "ptb, wikitext2, wikitext103, lm1b_gpt2"),
        ("--zero_shot ptb", "ptb", "GPT-2", "ckpt.pt"),
        ("--zero_shot fineweb_CC-MAIN-2024-10", "fineweb_CC-MAIN-2024-10", "Llama-2's pieces"),
        *((f"--zero_shot {name}", f"{name}: there are ptb", "dumps: fineweb_CC-MAIN-2024-10")
          for name in ("fineweb", "fineweb_2024-10", "fineweb_CC-MAIN-2024-1",
                       "fineweb_CC-MAIN-2024-10_wrap32", "CC-MAIN-2024-10")),
        ("--gen_ppl gpt2-large", "python -m tasks.judge", "ckpt.pt gpt2-large"),  # where it moved
        ("--gen_ppl gpt2-large --num 5 --sampler ddpm", "tasks.judge", "ckpt.pt gpt2-large"),
    ],
    "judge": [
        ("AR --num 0", "--num 0", "at least 1"),
        ("AR --top_p 0", "--top_p 0", "above 0"),
        ("AR --temperature nan", "--temperature"),
        ("AR --sampler magic", "magic", "ddpm_cache"),
        ("AR --eta 0.1", "--eta 0.1", "remdm_cap", "not of ddpm_cache"),
        ("CKPT", "AR", "loss=mdlm", "ckpt.pt"),
        ("nowhere.pt", "nowhere.pt", "no such checkpoint"),
    ],
    "quality": [
        ("--steps 4 0", "--steps 0", "at least 1"),
        ("--num 1", "--num 1", "at least 2"),
        ("--samplers magic", "magic", "threshold"),
    ],
    "harness": [
        ("--mc 0", "--mc 0", "at least 1"),
        ("--limit 1.5", "--limit 1.5", "between 0 and 1"),
        ("--include_path nowhere", "--include_path nowhere", "no such folder"),
    ],
    "answer": [
        ("--steps 0", "--steps 0", "at least 1"),
        ("--batch_size 0", "--batch_size 0"),
        ("--limit 0", "--limit 0"),
    ],
    "bench": [
        ("sing CKPT", "sing", "train", "sample"),
        ("sample CKPT --steps 8 0", "--steps 0", "at least 1"),
        ("evaluate CKPT --repeats 1", "--repeats 1", "at least 2"),
    ],
    "convert": [
        ("no/such.pt out.pt", "no/such.pt", "no such file"),
    ],
    "prepare": [
        ("txt", "txt", "did you mean text?"),
        ("xyz", "xyz", "text8", "openwebtext"),
        ("text --inputs a", "did you mean --input?"),
        ("pydocs --input x", "--input", "pydocs"),
        ("text8 --wrap wide", "--wrap", "wide"),
    ],
}
# fmt: on

CHECKPOINT_FIRST = [name for name, (_, _, first) in COMMANDS.items() if "CKPT" in first]


@pytest.fixture(scope="module")
def files(corpus, checkpoint, tmp_path_factory):
    """{placeholder: path} of the checkpoints that the table names."""
    ar = save(tmp_path_factory.mktemp("bad") / "ar.pt", as_ar(tiny_run(corpus)))
    return {"CKPT": str(checkpoint), "AR": str(ar)}


@pytest.fixture
def refuse(files, capsys):
    """refuse(command, line, *words): the command refuses the line, whose
    placeholders are filled in."""

    def check(command, line, *words):
        module, function, first = COMMANDS[command]
        main = getattr(importlib.import_module(module), function)
        argv = [files.get(word, word) for word in shlex.split(f"{first} {line}")]
        refused(capsys, lambda: main(argv), *words)

    return check


@pytest.mark.parametrize(
    "command, case",
    [(command, case) for command, cases in BAD.items() for case in cases],
    ids=lambda value: value if isinstance(value, str) else value[0][:40],
)
def test_a_command_refuses_bad_arguments(command, case, refuse):
    refuse(command, *case)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_refuses_an_option_that_it_has_not(command, refuse):
    arguments = {"bench": "sample CKPT", "convert": "a.pt b.pt", "prepare": "pydocs", "judge": "AR"}
    refuse(command, f"{arguments.get(command, '')} --wat=1", "--wat")


EXAMPLES = {  # what a script says that was called without arguments
    "sample": "python sample.py out/pydocs_mdlm/ckpt.pt --num 4 --watch",
    "evaluate": "python evaluate.py out/pydocs_mdlm/ckpt.pt",
    "judge": "python -m tasks.judge out/owt_mdlm/ckpt.pt gpt2-large --steps 256",
    "bench": "python -m tasks.bench train owt_mdlm --batch_size 8 --micro_batch 8",
    "convert": "python -m tasks.convert kuleshov-group/mdlm-owt out/mdlm/ckpt.pt",
    "prepare": "python data/prepare.py pydocs",
}


@pytest.mark.parametrize("command", EXAMPLES)
def test_a_command_without_arguments_shows_an_example(command, capsys):
    module, function, _ = COMMANDS[command]
    main = getattr(importlib.import_module(module), function)
    refused(capsys, lambda: main([]), "required", f"for example: {EXAMPLES[command]}\n")


def test_a_checkpoint_that_is_not_there_is_looked_for(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module("sample").main
    refused(capsys, lambda: main(["mine"]), "no such checkpoint; train one: python train.py\n")
    (tmp_path / "out" / "mine").mkdir(parents=True)
    (tmp_path / "out" / "mine" / "ckpt.pt").touch()
    refused(capsys, lambda: main(["mine/ckpt.pt"]), "did you mean out/mine/ckpt.pt?")


@pytest.mark.parametrize("command", CHECKPOINT_FIRST)
def test_a_command_refuses_a_checkpoint_that_is_not_there(command, files, refuse, monkeypatch):
    if command == "harness":
        pytest.importorskip("lm_eval")  # without it the command gives another hint
    monkeypatch.setitem(files, "CKPT", "gone.pt")
    refuse(command, "AR" if command == "judge" else "", "gone.pt: no such checkpoint")
