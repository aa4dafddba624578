"""Options that commands share: CONFIG --field=value ..., of train.py and of the tasks that train;
those of every script that runs a trained network, and of every one that samples."""

import argparse
import inspect
import re
from dataclasses import fields, replace
from pathlib import Path

from common import DTYPES, boolean, fail, parser, suggest
from configs import CONFIGS, SMDM_SIZES, Config, from_dict
from data.corpus import folder_of, read_meta
from data.json_files import read_json
from samplers import OPTIONS, SAMPLERS, default_options

CONFIG_NAMES = ", ".join(name for name in CONFIGS if not name.startswith("smdm_"))
CONFIG_NAMES += f", smdm_N and smdm_N_ar for N in {', '.join(map(str, SMDM_SIZES))}"


def add_fields(p, cfg):
    """An option per field of Config, in the groups of its comments. The help is the field's comment
    and its value in cfg."""
    for line in inspect.getsource(Config).split("@property")[0].splitlines():
        if title := re.fullmatch(r"    # (\w+)", line):
            group = p.add_argument_group(title[1])
        if field := re.match(r"    (\w+): [^#]*(?:# )?(.*)", line):
            value = getattr(cfg, field[1])
            kind = dict(type=boolean, nargs="?", const=True)
            kind = kind if isinstance(value, bool) else dict(type=type(value))
            note = f"{field[2]} [{value}]".strip().replace("%", "%%")
            kind |= dict(help=note, metavar=type(value).__name__, default=argparse.SUPPRESS)
            group.add_argument(f"--{field[1]}", **kind)


def own_arguments(*configs):
    """{name: default} of the arguments of configs that are not fields, such as flops."""
    parameters = [p for c in configs for p in inspect.signature(CONFIGS[c]).parameters.values()]
    return {p.name: p.default for p in parameters if not hasattr(Config, p.name)}


def make_parser(doc, flags, config, out, own, **options):
    p = parser(doc, usage="%(prog)s [CONFIG] [--field=value ...] [--flag ...]", **options)
    p.add_argument("config", nargs="?", default=config, help=CONFIG_NAMES)
    for flag, text, *default in flags:
        kind = dict(action="store_true")
        if default:
            kind = dict(type=type(default[0]), default=default[0])
        p.add_argument(f"--{flag}", help=text, **kind)
    group = p.add_argument_group(f"arguments of {config}") if own else None
    for name, default in own.items():
        kind = dict(type=type(default), default=argparse.SUPPRESS, help=f"[{default}]")
        group.add_argument(f"--{name}", **kind)
    add_fields(p, replace(CONFIGS[config](), out_dir=out.format(config)))
    return p


def from_cli(argv=None, doc=None, flags=(), out="out/{}", config="pydocs_mdlm"):
    """[CONFIG] [--field=value ...] [--flag ...] -> (Config, namespace of the flags).

    A flag is (name, help), or (name, help, default) if it takes a value of the default's type. A
    config's own arguments, such as flops, are options too. With the flag --resume, fields that are
    not given are those of the run in out_dir. Without --vocab_size it is that of the data."""
    every = make_parser(doc, flags, config, out, own_arguments(*CONFIGS), add_help=False)
    args, _ = every.parse_known_args(argv)
    if (config := args.config) not in CONFIGS:
        names = [*CONFIGS, *(f"--{f.name}" for f in fields(Config))]
        fail(f"unknown config {config!r}; {suggest(config, names, f'there are {CONFIG_NAMES}')}")
    own = own_arguments(config)
    for name in own_arguments(*CONFIGS).keys() & vars(args).keys() - own.keys():
        fail(f"--{name}: not an argument of {config}")
    args = make_parser(doc, flags, config, out, own).parse_args(argv)

    given = {f.name: vars(args).pop(f.name) for f in fields(Config) if f.name in args}
    given.setdefault("out_dir", out.format(config))
    saved = Path(given["out_dir"]) / "config.json"
    parameters = inspect.signature(CONFIGS[config]).parameters
    arguments = {name: value for name, value in (vars(args) | given).items() if name in parameters}
    try:
        cfg = CONFIGS[config](**arguments)
        if getattr(args, "resume", False) and saved.exists():
            cfg = from_dict(read_json(saved, {}), saved)
        elif (folder_of(data := given.get("data", cfg.data)) / "meta.json").exists():
            cfg = replace(cfg, vocab_size=read_meta(data)["vocab_size"])
        return replace(cfg, **given), args
    except ValueError as e:
        fail(f"{config}: {e}")


# --------------------------------------------------------------------------------------------------
# Options of scripts that run a trained network


def add_model_options(p):
    """Options of every script that runs a trained network."""
    p.add_argument("--no_ema", action="store_true", help="use the raw weights")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument(
        "--dtype",
        choices=DTYPES,
        help="default: auto on a GPU, float32 on a CPU, so that texts do not depend on its kind",
    )


def add_sampler_options(p, steps=1000, temperature=1.0):
    """Options of every script that samples. A script may change the
    defaults; None: chosen later."""
    p.add_argument(
        "--sampler", choices=SAMPLERS, help="default: ddpm_cache, or what the model needs"
    )
    p.add_argument(
        "--steps",
        type=int,
        default=steps,
        help="diffusion steps; ddpm_cache never calls more often than tokens",
    )
    p.add_argument("--temperature", type=float, default=temperature, help="0: greedy")
    p.add_argument("--top_p", type=float, default=1.0, help="nucleus sampling")
    for name in OPTIONS:
        users = {s: default_options(f).get(name) for s, f in SAMPLERS.items()}
        users = {s: default for s, default in users.items() if default is not None}
        about = ", ".join(f"{s} [{default}]" for s, default in users.items())
        kind = type(max(users.values()))
        p.add_argument(f"--{name}", type=kind, help=f"of the sampler {about}")


def choose_sampler(cfg, name=None):
    """The sampler of this name, or the one whose law the model's loss bounds."""
    if cfg.causal and name not in (None, "ar"):
        fail(f"--sampler {name}: an AR model writes from left to right, with --sampler ar")
    return name or ("ar" if cfg.causal else "ddpm_cache" if cfg.zero_masking else "ddpm")


def check_top_p(args):
    if not 0 < args.top_p <= 1:
        fail(f"--top_p {args.top_p}: must be above 0 and at most 1")


def read_sampler_options(args, sampler, cfg):
    """{name: value} of the sampler's own options that were given, each in its range."""
    given = {name: value for name in OPTIONS if (value := getattr(args, name)) is not None}
    for name, value in given.items():
        if name not in default_options(SAMPLERS[sampler]):
            users = " and ".join(s for s, f in SAMPLERS.items() if name in default_options(f))
            fail(f"--{name} {value}: an option of {users}, not of {sampler}; choose with --sampler")
        if not 0 <= value <= OPTIONS[name]:
            fail(f"--{name} {value}: must be from 0 to {OPTIONS[name]:g}")
    if cfg.causal and given.get("per_call", 1) != 1:
        fail(f"--per_call {given['per_call']}: an AR model writes one token per call")
    return given
