"""Upstream's own code beside ours on this machine, a CPU: seconds and memory of a training step, seconds of a batch of
samples, and the bound that MDLM reaches in so many seconds of training.

git clone https://github.com/kuleshov-group/mdlm ../mdlm                         # README has figures of c112c52,
git clone https://github.com/flukeskywalker/nanoDD ../nanodd                     # b656fc6,
git clone https://github.com/louaaron/Score-Entropy-Discrete-Diffusion ../sedd   # 0605786
git clone https://github.com/ML-GSAI/SMDM ../smdm                                # and 583aa47
pip install einops==0.8.2 ema_pytorch==0.8.3
python -m tasks.peers train --clones .. --vocab_size 50257 --batch_size 8
python -m tasks.peers sample --clones .. --vocab_size 27 --steps 1000 --batch_size 8
python -m tasks.peers learn --clones .. --vocab_size 2048 --batch_size 16 --data pydocs --seconds 270 --lr 1e-3

One shape, 4 blocks of width 256, in each project's own network; ours is always MDLM's. In `train` and `sample` every side
is a process of its own that does a step, or draws a batch, when it is told to, in turns with the others. `learn` runs MDLM
alone, to be held against `python train.py` of as many seconds. What needs a GPU is replaced: flash-attn by torch's
scaled_dot_product_attention (ours writes attention out where that is faster, in bfloat16 training), rotary and RMSNorm
kernels and xformers' SwiGLU by what they compute. Other packages that a step does not use are empty; Lightning's loop and
metrics, gradient scaling and DDP are left out, in their favour; that freed memory is kept is ours alone. Their autocasts
are CUDA's, so theirs compute in float32 or, with --dtype bfloat16, in the same autocast of CPUs as ours.
"""

import importlib.abc
import importlib.machinery
import itertools
import statistics
import sys
import time
import types
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace as Fields
from unittest.mock import MagicMock

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import autocast, check_range, compute_dtype, fail, parser, settle_mode_options
from configs import Config
from data.corpus import read_split, training_rows, unpack
from evaluate import bound, report
from head import cast_linears, keep_freed_memory
from model import DiT
from samplers import SAMPLERS
from tasks.bench import children, empty, resident, shown, timed, training

CPU = torch.device("cpu")
EMPTY = """hydra lightning lightning_utilities torchmetrics transformers huggingface_hub omegaconf fsspec timm dataloader
    models.dimamba dropout_layer_norm xentropy_cuda_lib""".split()


class Empty(types.ModuleType):
    """A package that is imported, and of which nothing is used."""

    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name in EMPTY or name.split(".")[0] in EMPTY:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return Empty(spec.name)

    def exec_module(self, module):
        pass


def packed_attention(qkv, cu_seqlens, length, dropout, causal=False):
    """flash_attn_varlen_qkvpacked_func for rows of one length, without dropout."""
    q, k, v = qkv.view(-1, length, *qkv.shape[1:]).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


def turn_packed(qkv, cos, sin):
    """flash_attn.layers.rotary.apply_rotary_emb_qkv_, but out of place: qkv (B, L, 3, H, D)."""
    a, b = qkv[:, :, :2].chunk(2, -1)
    cos, sin = cos[:, None, None], sin[:, None, None]
    return torch.cat((torch.cat((a * cos - b * sin, b * cos + a * sin), -1), qkv[:, :, 2:]), 2)


def turn_into(a, b, cos, sin, out_a, out_b, conjugate):
    """rotary_emb.apply_rotary: in float32, or backwards."""
    cos, sin = cos.float(), -sin.float() if conjugate else sin.float()
    a, b = a.float(), b.float()  # the outputs may be the inputs
    out_a.copy_(a * cos - b * sin)
    out_b.copy_(b * cos + a * sin)


class SwiGLU(torch.nn.Module):
    """xformers' layer, with its names."""

    def __init__(self, d, hidden, *_, **__):
        super().__init__()
        self.w1, self.w2 = (torch.nn.Linear(d, hidden, bias=False) for _ in range(2))
        self.w3 = torch.nn.Linear(hidden, d, bias=False)

    def forward(self, x):
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


def module(name, **names):
    """A package of just these names."""
    sys.modules[name] = found = Empty(name)
    found.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    vars(found).update(names)
    return found


def enter(clone):
    """From here on this process imports a clone's modules, several of which have the names of ours."""
    ours = Path(__file__).resolve().parents[1]
    for name, found in list(sys.modules.items()):
        folder = Path(getattr(found, "__file__", None) or "/").resolve().parent
        if folder in (ours, ours / "data", ours / "tasks") and "main__" not in name:
            del sys.modules[name]
    sys.path[:] = [str(clone.resolve())] + [p for p in sys.path if Path(p).resolve() != ours]
    sys.meta_path.insert(0, Finder())
    warnings.filterwarnings("ignore")
    torch.set_float32_matmul_precision("high")  # as nanoDD, SMDM and ours have it
    rotary = module("flash_attn.layers.rotary", apply_rotary_emb_qkv_=turn_packed)
    flash = module(
        "flash_attn.flash_attn_interface", flash_attn_varlen_qkvpacked_func=packed_attention
    )
    module(
        "flash_attn", flash_attn_interface=flash, layers=module("flash_attn.layers", rotary=rotary)
    )
    module("huggingface_hub", PyTorchModelHubMixin=type("PyTorchModelHubMixin", (), {}))
    torch.manual_seed(0)


def made_up(cfg):
    """A batch of token ids for step i: they cost what real ones cost."""
    return lambda i: torch.randint(cfg.vocab_size, (cfg.batch_size, cfg.seq_len))


# ---------------------------------------------------------------------------------------------------------
# One function per project: a Config of ours -> step(i), which does what its training loop does and returns its loss.


def mdlm_model(cfg, sampler="ddpm_cache", steps=0):
    """MDLM's Diffusion with the settings of its OpenWebText run, without dropout."""

    class Lightning(torch.nn.Module):
        dtype, device = torch.float32, CPU
        save_hyperparameters = lambda self: None

    module("lightning", LightningModule=Lightning)
    module("torchmetrics", aggregation=Fields(MeanMetric=torch.nn.Identity))
    module("timm.scheduler", CosineLRScheduler=type("CosineLRScheduler", (), {}))
    from diffusion import Diffusion

    settings = Fields(
        sampling=Fields(predictor=sampler, steps=steps, noise_removal=True), loader=Fields(eval_batch_size=cfg.batch_size),
        eval=Fields(gen_ppl_eval_model_name_or_path=""), optim=Fields(lr=cfg.lr), parameterization="subs", backbone="dit", T=0,
        subs_masking=False, time_conditioning=False, noise=Fields(type="loglinear", sigma_min=1e-4, sigma_max=20),
        training=Fields(antithetic_sampling=True, importance_sampling=False, change_of_variables=False, ema=0.9999, sampling_eps=1e-3),
        model=Fields(hidden_size=cfg.n_embd, n_heads=cfg.n_head, n_blocks=cfg.n_layer, cond_dim=cfg.cond_dim, dropout=0.0,
                     scale_by_sigma=True, length=cfg.seq_len),
    )  # fmt: skip
    return Diffusion(settings, Fields(vocab_size=cfg.vocab_size, mask_token=None))


def mdlm(cfg, rows=None, warmup=2500):
    d, rows = mdlm_model(cfg), rows or made_up(cfg)
    d.train()
    params = [*d.backbone.parameters(), *d.noise.parameters()]
    optimizer = torch.optim.AdamW(params, lr=cfg.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0)

    def step(i):
        x = rows(i)
        with autocast(CPU, cfg.dtype):
            loss = d._loss(x, torch.ones_like(x)).loss
        optimizer.param_groups[0]["lr"] = cfg.lr * min(1, (i + 1) / warmup)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        d.ema.update(params)
        return loss.item()

    step.model = d
    return step


def nanodd(cfg):
    from d3pm_absorbing import D3PMAbsorbing
    from ema_pytorch import EMA

    rows, shape = made_up(cfg), (cfg.vocab_size, cfg.n_embd, cfg.n_head, cfg.n_layer, cfg.cond_dim)
    model = D3PMAbsorbing(*shape, dropout=0.0, T=1000, lambda_ce=0.05)
    settings = dict(
        update_after_step=100, update_every=1, inv_gamma=1.0, power=1.0, include_online_model=False
    )
    ema = EMA(model, beta=0.9999, **settings)
    groups = [
        dict(
            params=[p for p in model.parameters() if (p.dim() >= 2) == decays],
            weight_decay=0.1 * decays,
        )
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.98))
    model.train()

    def step(i):
        with autocast(CPU, cfg.dtype):
            _, loss, _ = model(rows(i))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update()
        return loss.item()

    return step


def sedd(cfg):
    import graph_lib
    import losses
    import noise_lib
    from model.ema import ExponentialMovingAverage
    from model.transformer import SEDD

    settings = Fields(
        graph=Fields(type="absorb"), tokens=cfg.vocab_size, noise=Fields(type="loglinear"),
        optim=Fields(optimizer="AdamW", lr=cfg.lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0, warmup=2500, grad_clip=1.0),
        model=Fields(hidden_size=cfg.n_embd, cond_dim=cfg.cond_dim, n_heads=cfg.n_head, n_blocks=cfg.n_layer, dropout=0.0,
                     scale_by_sigma=True),
    )  # fmt: skip
    net, noise, rows = SEDD(settings), noise_lib.get_noise(settings), made_up(cfg)
    plain, optimizer = (
        net.forward,
        losses.get_optimizer(settings, [*net.parameters(), *noise.parameters()]),
    )

    def forward(*args):
        with autocast(CPU, cfg.dtype):
            return plain(*args)

    net.forward = forward
    state = dict(optimizer=optimizer, scaler=torch.amp.GradScaler(enabled=False), model=net, noise=noise, step=0,
                 ema=ExponentialMovingAverage(net.parameters(), decay=0.9999))  # fmt: skip
    one = losses.get_step_fn(
        noise, graph_lib.Absorbing(cfg.vocab_size), True, losses.optimization_manager(settings), 1
    )
    return lambda i: one(state, rows(i)).item()


def smdm(cfg):
    """Its own network, without adaLN; the loop is that of its pretrain/train_mdm.py."""
    module("xformers.ops", SwiGLU=SwiGLU)
    module("rotary_emb", apply_rotary=turn_into)
    from lit_gpt import diffmodel
    from lit_gpt.config import Config as Settings
    from lit_gpt.fused_rotary_embedding import ApplyRotaryEmb

    # in place on a view, as it is called, is not allowed by this torch
    diffmodel.apply_rotary_emb_func = lambda x, cos, sin, *_: ApplyRotaryEmb.apply(
        x, cos, sin, False, False
    )
    settings = Settings.from_name(
        "Diff_LLaMA_6M", _norm_class="RMSNorm", n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd, block_size=cfg.seq_len,
        vocab_size=cfg.vocab_size, padded_vocab_size=cfg.vocab_size, intermediate_size=4 * cfg.n_embd,
    )  # fmt: skip
    net, rows = diffmodel.TransEncoder(settings), made_up(cfg)
    net.apply(partial(net._init_weights, n_layer=cfg.n_layer))
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=cfg.lr, weight_decay=0.1, betas=(0.9, 0.95), foreach=False
    )

    def step(i):
        x = rows(i)
        p = ((1 - 1e-3) * torch.rand(len(x), 1) + 1e-3).expand(x.shape)
        masked = torch.rand(x.shape) < p
        with autocast(CPU, cfg.dtype):
            logits = net(x.masked_fill(masked, cfg.vocab_size))
            loss = (
                F.cross_entropy(logits[masked].float(), x[masked], reduction="none") / p[masked]
            ).sum() / x.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


PROJECTS = {"mdlm": mdlm, "nanodd": nanodd, "sedd": sedd, "smdm": smdm}


# ---------------------------------------------------------------------------------------------------------


def steps(pipe, project, clone, cfg, threads):
    """The process of a training side. Whatever it is sent, it does a step: (seconds, loss, peak MB). Ours, which is
    `bench.training`, tells the share of masked tokens instead of the loss."""
    if project == "ours":
        return training(pipe, cfg, threads)
    torch.set_num_threads(threads)
    sys.stdout = sys.stderr  # some tell how large they are
    enter(clone)
    PROJECTS[project](replace(cfg, vocab_size=2, n_layer=1))  # imports are not its memory
    before, step, number = resident(), PROJECTS[project](cfg), itertools.count()
    while pipe.recv() != 0:
        start = time.perf_counter()
        loss = step(next(number))
        pipe.send((time.perf_counter() - start, loss, resident() - before))


def batches(pipe, side, clone, cfg, T, threads):
    """The process of a sampling side. Whatever it is sent, it draws a batch in T steps: (seconds, calls)."""
    torch.set_num_threads(threads)
    if side == "ours":
        model = cast_linears(DiT(cfg).eval().requires_grad_(False), CPU, cfg.dtype)
        keep_freed_memory()  # as `load` does
        sampling = lambda denoise, x, gen: SAMPLERS["ddpm_cache"](denoise, x, T, cfg, gen)
        canvas = empty(cfg, CPU, cfg.batch_size, cfg.seq_len)
        first = itertools.count(step=cfg.batch_size)  # other texts every time, as theirs
        draw = lambda: timed(sampling, model, cfg, canvas, cfg.dtype, next(first))[:2]
    else:
        enter(clone)
        d, calls = mdlm_model(cfg, side.removeprefix("mdlm "), T).eval(), [0]
        network = d.backbone.forward

        def counted(*args, **kwargs):
            calls[0] += 1
            return network(*args, **kwargs)

        def draw():
            start, calls[0] = time.perf_counter(), 0
            with (
                torch.no_grad(),
                autocast(CPU, cfg.dtype),
            ):  # which rounds its matrices once, as ours are
                d._sample()
            return time.perf_counter() - start, calls[0]

        d.backbone.forward = counted
    while pipe.recv() != 0:
        pipe.send(draw())


def in_turns(target, sides, args, cfg, warm, *more):
    """(rows, answers of all rounds by row) of sides {name: clone} in every dtype: medians of seconds, and of how many
    times those of ours in the same round, in each dtype."""
    cases = {
        f"{name} {dtype}": (name, clone, replace(cfg, dtype=dtype), *more)
        for dtype in args.dtype
        for name, clone in sides.items()
    }
    runs = {name: [] for name in cases}
    with children(target, cases) as ask:
        for r in tqdm(range(warm + args.repeats), unit="round", leave=False):
            for name in cases:
                answer = ask(name, 1)
                runs[name] += [answer] * (r >= warm)

    def row(name):
        times = lambda dtype: [a[0] / b[0] for a, b in zip(runs[name], runs[f"ours {dtype}"])]
        seconds = statistics.median(answer[0] for answer in runs[name])
        over = {f"over_ours_{dtype}": statistics.median(times(dtype)) for dtype in args.dtype}
        return dict(side=name, seconds=seconds) | over

    return [row(name) for name in cases], list(runs.values())


def train(args, cfg):
    """Seconds of a step. MB: what the side's process took at most, beyond what it had before the network was made."""
    sides = {"ours": None} | {name: args.clones / name for name in args.sides}
    rows, runs = in_turns(steps, sides, args, cfg, 2)
    tokens = cfg.batch_size * cfg.seq_len
    return [
        row | dict(tokens_per_s=tokens / row["seconds"], MB=of[-1][2])
        | ({} if row["side"].startswith("ours") else dict(loss=of[-1][1]))
        for row, of in zip(rows, runs)
    ]  # fmt: skip


def sample(args, cfg):
    """Seconds of a batch and calls of the network, of MDLM's two samplers and our `ddpm_cache`."""
    clone = args.clones / "mdlm"
    sides = {"ours": None, "mdlm ddpm_cache": clone, "mdlm ddpm": clone}
    rows, runs = in_turns(batches, sides, args, cfg, 1, args.steps)
    return [
        row | dict(calls=statistics.median(calls for _, calls in of)) for row, of in zip(rows, runs)
    ]


def learn(args, cfg):
    """MDLM's validation bound by our estimator, 4 forwards per window in float32, after so many seconds of steps, the
    first 100 a warm-up: of its last weights, and of their average."""
    cfg = replace(cfg, data=args.data, seed=args.seed)
    (ids, meta), (val, _) = (read_split(args.data, split, cfg) for split in ("train", "val"))
    if meta["given"] or meta["pad"] is not None:
        fail(f"{args.data}: has given tokens or padding, which MDLM's step is not told of here")
    numbers = np.arange(cfg.batch_size)
    rows = lambda i: unpack(training_rows(ids, meta, cfg, i * cfg.batch_size + numbers), meta, cfg)[
        0
    ]
    rows(0)  # what is wrong with the data shows now
    enter(args.clones / "mdlm")
    torch.manual_seed(args.seed)
    try:
        step = mdlm(cfg, rows, warmup=100)
    except ImportError as e:
        fail(str(e))
    number, spent, start = 0, 0.0, time.perf_counter()
    with tqdm(
        total=args.seconds, bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s {postfix}"
    ) as bar:
        while spent < args.seconds:
            loss, number = step(number), number + 1
            before, spent = spent, time.perf_counter() - start
            bar.set_postfix_str(f"step {number}, loss {loss:.2f}", refresh=False)
            bar.update(spent - before)
    d = step.model.eval()

    class Answers(torch.nn.Module):
        """MDLM's network as `bound` wants it."""

        def __init__(self):
            super().__init__()
            self.net = d.backbone

        def forward(self, x, t, at):
            return self.net(x, torch.zeros(len(x)))[at][:, : cfg.vocab_size].float()

    bits = lambda: report(bound(Answers(), val, meta, cfg, "val.bin", passes=4), meta, "val")[
        "bits_per_char"
    ]
    last = bits()
    d.ema.copy_to(d.backbone.parameters())
    return [dict(data=args.data, lr=cfg.lr, seed=args.seed, dtype=cfg.dtype, steps=number, seconds=spent, last=last,
                 average=bits())]  # fmt: skip


BOTH = ["float32", "bfloat16"]
MODES = {  # what it measures: the options that it has of its own
    train: dict(sides=list(PROJECTS), dtype=BOTH, repeats=5),
    sample: dict(steps=1000, dtype=BOTH, repeats=5),
    learn: dict(data="pydocs", lr=1e-3, seconds=270.0, seed=1, dtype=[compute_dtype(CPU, "auto")]),
}


def main(argv=None):
    p = parser(__doc__)
    p.add_argument("what", choices=[mode.__name__ for mode in MODES])
    p.add_argument("--clones", type=Path, default=Path(".."), help="holds mdlm, nanodd, sedd, smdm")
    p.add_argument("--vocab_size", type=int, default=50257)
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--seq_len", type=int, default=256)
    p.add_argument("--n_layer", type=int, default=4)
    p.add_argument(
        "--dtype",
        nargs="+",
        choices=BOTH,
        help="learn: one, [bfloat16 where the CPU multiplies in it]",
    )
    p.add_argument("--sides", nargs="+", choices=PROJECTS, help="train: beside ours [all]")
    p.add_argument("--repeats", type=int, help="train, sample: rounds [5]")
    p.add_argument("--steps", type=int, help="sample: diffusion steps [1000]")
    p.add_argument("--data", help="learn: what data/prepare.py made [pydocs]")
    p.add_argument("--lr", type=float, help="learn: [1e-3]")
    p.add_argument("--seconds", type=float, help="learn: of training [270]")
    p.add_argument("--seed", type=int, help="learn: [1]")
    p.add_argument("--json", action="store_true", help="one JSON line per row instead of the table")
    args = p.parse_args(argv)
    (mode,) = (mode for mode in MODES if mode.__name__ == args.what)
    settle_mode_options(args, MODES, mode, f"not for {args.what}")
    check_range(args, steps=1, repeats=1, seconds=0, seed=0)
    if mode is learn and len(args.dtype) > 1:
        fail(f"--dtype {' '.join(args.dtype)}: learn takes one")
    for name in args.sides or ["mdlm"]:
        if not (args.clones / name).is_dir():
            fail(f"--clones {args.clones}: has no folder {name}; --help has the addresses")
    try:
        cfg = Config(
            vocab_size=args.vocab_size, seq_len=args.seq_len, n_layer=args.n_layer, batch_size=args.batch_size, device="cpu",
            micro_batch=args.batch_size, lr=3e-4 if args.lr is None else args.lr, t_min=1e-3, dtype=args.dtype[0],
        )  # fmt: skip
    except ValueError as e:
        fail(f"--{e}")
    print(shown(mode(args, cfg), args.json))


if __name__ == "__main__":
    main()
