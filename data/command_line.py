"""CONFIG --field=value ... as a Config: the options of train.py and of the tasks that train."""

import argparse
import inspect
import re
from dataclasses import fields, replace
from pathlib import Path

from common import boolean, fail, parser, read_json, suggest
from configs import CONFIGS, SMDM_SIZES, Config, from_dict
from data.corpus import folder_of, read_meta

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
