"""Upstream's own code beside ours on this machine, a CPU: seconds and memory of a training step, seconds of a batch of
samples, and the bound that MDLM reaches in so many seconds of training.

git clone https://github.com/kuleshov-group/mdlm ../mdlm                              # README's figures: c112c52
git clone https://github.com/flukeskywalker/nanoDD ../nanodd                          # b656fc6
git clone https://github.com/louaaron/Score-Entropy-Discrete-Diffusion ../sedd        # 0605786
git clone https://github.com/ML-GSAI/SMDM ../smdm                                     # 583aa47
pip install einops ema_pytorch
python peers.py train --clones .. --vocab_size 50257 --batch_size 8
python peers.py sample --clones .. --vocab_size 27 --steps 1000 --batch_size 8
python peers.py learn --clones .. --vocab_size 2048 --batch_size 16 --data pydocs --seconds 270 --lr 1e-3

One network of 4 blocks, 256 wide. Every side is a process of its own that does a step, or draws a
batch, when it is told to, in turns with the others; figures are medians. What needs a GPU is replaced: flash-attn by torch's
attention, its rotary kernel and xformers' SwiGLU by what they compute. Packages that a step does not use are left empty. Lightning's loop and its
metrics are left out, in MDLM's favour. Theirs compute in float32, since their autocasts are CUDA's, or, with
--dtype bfloat16, under the same autocast of CPUs as ours.
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

from bench import children, empty, resident, shown, timed, training
from configs import Config, check_range, fail, parser
from data.corpus import read_split
from diffusion import SAMPLERS
from evaluate import bound, report
from model import DiT, autocast, rounded

CPU = torch.device("cpu")
EMPTY = """hydra lightning torchmetrics transformers huggingface_hub omegaconf fsspec timm dataloader datasets tokenizers
    mamba_ssm causal_conv1d triton models.dimamba lightning_utilities dropout_layer_norm""".split()


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


def turned(x, cos, sin):
    """The two halves of x's last dimension, turned by the tables."""
    a, b = x.chunk(2, -1)
    return a * cos - b * sin, b * cos + a * sin


def turn_packed(qkv, cos, sin):
    """flash_attn.layers.rotary.apply_rotary_emb_qkv_, but out of place: qkv (B, L, 3, H, D)."""
    q_and_k = torch.cat(turned(qkv[:, :, :2], cos[:, None, None], sin[:, None, None]), -1)
    return torch.cat((q_and_k, qkv[:, :, 2:]), 2)


def turn_into(a, b, cos, sin, out_a, out_b, conjugate):
    """rotary_emb.apply_rotary: in float32, or backwards."""
    x = torch.cat((a, b), -1).float()
    for out, value in zip((out_a, out_b), turned(x, cos.float(), -sin.float() if conjugate else sin.float())):
        out.copy_(value)


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


def package(name):
    """A folder of the clone as a package, without what its __init__ imports."""
    sys.modules[name] = found = types.ModuleType(name)
    found.__path__ = [f"{sys.path[0]}/{name}"]


def enter(clone):
    """From here on this process imports a clone's modules, several of which have the names of ours."""
    ours = Path(__file__).resolve().parent
    for name, found in list(sys.modules.items()):
        folder = Path(getattr(found, "__file__", None) or "/").resolve().parent
        if folder in (ours, ours / "data") and "main__" not in name:
            del sys.modules[name]
    sys.path[:] = [str(clone)] + [p for p in sys.path if Path(p).resolve() != ours]
    sys.meta_path.insert(0, Finder())
    warnings.filterwarnings("ignore")
    rotary = module("flash_attn.layers.rotary", apply_rotary_emb_qkv_=turn_packed)
    flash = Fields(flash_attn_varlen_qkvpacked_func=packed_attention)
    module("flash_attn.flash_attn_interface", **vars(flash))
    module("flash_attn", flash_attn_interface=flash, layers=Fields(rotary=rotary), flash_attn_func=None)
    module("flash_attn.layers", rotary=rotary)
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

    model, rows = (
        D3PMAbsorbing(cfg.vocab_size, cfg.n_embd, cfg.n_head, cfg.n_layer, 128, 0.0, 1000, 0.05),
        made_up(cfg),
    )
    ema = EMA(
        model,
        beta=0.9999,
        update_after_step=100,
        update_every=1,
        inv_gamma=1.0,
        power=1.0,
        include_online_model=False,
    )
    groups = [
        dict(params=[p for p in model.parameters() if (p.dim() >= 2) == decays], weight_decay=0.1 * decays)
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
    package("model")
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
    plain, optimizer = net.forward, losses.get_optimizer(settings, [*net.parameters(), *noise.parameters()])

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

    class Missing:
        __init__ = lambda self, *_: None
        __bool__ = lambda self: False

    module("lightning_utilities.core.imports", RequirementCache=Missing)
    module("lightning.fabric.loggers", CSVLogger=object)
    module("xformers.ops", SwiGLU=SwiGLU)
    module("rotary_emb", apply_rotary=turn_into)
    package("lit_gpt")
    importlib.import_module("lit_gpt.model")  # before its config: they import each other
    from lit_gpt import diffmodel
    from lit_gpt.config import Config as Settings
    from lit_gpt.fused_rotary_embedding import ApplyRotaryEmb

    # in place on a view, as it is called, is not allowed by this torch
    diffmodel.apply_rotary_emb_func = lambda x, cos, sin, *_: ApplyRotaryEmb.apply(x, cos, sin, False, False)
    settings = Settings.from_name(
        "Diff_LLaMA_6M", _norm_class="RMSNorm", n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd, block_size=cfg.seq_len,
        vocab_size=cfg.vocab_size, padded_vocab_size=cfg.vocab_size, padding_multiple=1, intermediate_size=4 * cfg.n_embd,
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


def steps_of(pipe, project, clone, cfg, threads):
    """The process of a training side, as `bench.training`: so many steps -> (seconds per step, None, peak MB)."""
    if project == "ours":
        return training(pipe, cfg, threads)
    torch.set_num_threads(threads)
    sys.stdout = sys.stderr  # some tell how large they are
    enter(clone)
    before, step, number = resident(), None, itertools.count()
    while (n := pipe.recv()) != 0:
        step = step or PROJECTS[project](cfg)
        start = time.perf_counter()
        for _ in range(n):
            step(next(number))
        pipe.send(((time.perf_counter() - start) / n, None, resident() - before))


def chains_of(pipe, side, clone, cfg, steps, threads):
    """The process of a sampling side: whatever it is sent, it draws a batch and sends back (seconds, calls)."""
    torch.set_num_threads(threads)
    if side == "ours":
        model = rounded(DiT(cfg).eval().requires_grad_(False), CPU, cfg.dtype)
        sampling = lambda denoise, x, gen: SAMPLERS["ddpm_cache"](denoise, x, steps, cfg, gen)
        canvas = empty(cfg, CPU, cfg.batch_size, cfg.seq_len)
        draw = lambda: timed(sampling, model, cfg, canvas, cfg.dtype)[:2]
    else:
        enter(clone)
        d, calls = mdlm_model(cfg, side, steps).eval().requires_grad_(False), [0]
        network = d.backbone.forward

        def counted(*args, **kwargs):
            calls[0] += 1
            return network(*args, **kwargs)

        d.backbone.forward = counted

        def draw():
            start, calls[0] = time.perf_counter(), 0
            with torch.no_grad(), autocast(CPU, cfg.dtype):
                d._sample()
            return time.perf_counter() - start, calls[0]

    while pipe.recv() != 0:
        pipe.send(draw())


def side_by_side(target, sides, args, cfg, warm, *more):
    """(rows, answers of all rounds by row) of sides {name: clone} in every dtype, in turns: median seconds, and how many
    times those of ours in each dtype."""
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
    seconds = {name: statistics.median(answer[0] for answer in of) for name, of in runs.items()}
    over = lambda name: {
        f"over_ours_{dtype}": seconds[name] / seconds[f"ours {dtype}"] for dtype in args.dtype
    }
    return [dict(side=name, seconds=seconds[name], **over(name)) for name in cases], list(runs.values())


def train(args, cfg):
    """Seconds of a step. MB: the most memory of the side's process, beyond what it had before the network was made."""
    sides = {"ours": None} | {name: args.clones / name for name in args.sides}
    rows, runs = side_by_side(steps_of, sides, args, cfg, 2)
    tokens = cfg.batch_size * cfg.seq_len
    return [row | dict(tokens_per_s=tokens / row["seconds"], MB=of[-1][2]) for row, of in zip(rows, runs)]


def sample(args, cfg):
    """Seconds of a batch and calls of the network, with MDLM's two samplers and our `ddpm_cache`."""
    sides = {"ours": None, "ddpm_cache": args.clones / "mdlm", "ddpm": args.clones / "mdlm"}
    rows, runs = side_by_side(chains_of, sides, args, cfg, 1, args.steps)
    return [row | dict(calls=of[-1][1]) for row, of in zip(rows, runs)]


def learn(args, cfg):
    """MDLM's validation bound by our estimator, 4 forwards per window in float32, after so many seconds of steps:
    of its last weights, and of their average."""
    cfg = replace(cfg, data=args.data, dtype=args.dtype[-1])
    (ids, meta), (val, _) = (read_split(args.data, split, cfg) for split in ("train", "val"))
    rng, L = np.random.default_rng(args.seed), cfg.seq_len

    def rows(i):
        starts = rng.integers(len(ids) - L, size=cfg.batch_size)
        return torch.from_numpy(np.stack([ids[j : j + L] for j in starts]).astype(np.int64))

    enter(args.clones / "mdlm")
    torch.manual_seed(args.seed)
    step, start = mdlm(cfg, rows, warmup=100), time.perf_counter()
    with tqdm(
        total=args.seconds, unit="s", bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s {postfix}"
    ) as bar:
        for i in itertools.count():
            if (spent := time.perf_counter() - start) >= args.seconds:
                break
            bar.set_postfix_str(f"step {i}, loss {step(i):.2f}")
            bar.update(min(time.perf_counter() - start, args.seconds) - bar.n)
    d = step.model.eval()

    class Answers(torch.nn.Module):
        """MDLM's network as bound() wants it."""

        def __init__(self):
            super().__init__()
            self.net = d.backbone

        def forward(self, x, t, at):
            return self.net(x, torch.zeros(len(x)))[at][:, : cfg.vocab_size].float()

    bits = lambda: report(bound(Answers(), val, meta, cfg, "val.bin", passes=4), meta, "val")["bits_per_char"]
    last = bits()
    d.ema.copy_to(d.backbone.parameters())
    return [dict(data=args.data, lr=cfg.lr, seed=args.seed, n_layer=cfg.n_layer, batch_size=cfg.batch_size, dtype=cfg.dtype,
                 steps=i, seconds=spent, last=last, average=bits())]  # fmt: skip


def main(argv=None):
    p = parser(__doc__)
    p.add_argument("what", choices=("train", "sample", "learn"))
    p.add_argument(
        "--clones", type=Path, default=Path(".."), help="the folder that holds mdlm, nanodd, sedd, smdm"
    )
    p.add_argument("--sides", nargs="*", choices=PROJECTS, default=list(PROJECTS), help="train: beside ours")
    p.add_argument(
        "--dtype",
        nargs="+",
        choices=("float32", "bfloat16"),
        default=["float32", "bfloat16"],
        help="learn: the last",
    )
    p.add_argument("--vocab_size", type=int, default=50257)
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--seq_len", type=int, default=256)
    p.add_argument("--n_layer", type=int, default=4)
    p.add_argument("--steps", type=int, default=1000, help="sample: diffusion steps")
    p.add_argument("--repeats", type=int, default=5, help="rounds")
    p.add_argument("--data", default="pydocs", help="learn: made by data/prepare.py")
    p.add_argument("--lr", type=float, default=3e-4)
    p.add_argument("--seconds", type=float, default=270, help="learn")
    p.add_argument("--seed", type=int, default=1, help="learn")
    p.add_argument("--json", action="store_true", help="one JSON line per row instead of the table")
    args = p.parse_args(argv)
    check_range(args, steps=1, repeats=1, seconds=0, seed=0)
    for name in args.sides if args.what == "train" else ["mdlm"]:
        if not (args.clones / name).is_dir():
            fail(f"--clones {args.clones}: has no folder {name}; --help has the addresses")
    try:
        shape = {
            name: getattr(args, name) for name in ("vocab_size", "seq_len", "n_layer", "batch_size", "lr")
        }
        cfg = Config(**shape, micro_batch=args.batch_size, warmup=2500, t_min=1e-3, steps=10**6, device="cpu")
    except ValueError as e:
        fail(f"--{e}")
    print(shown({"train": train, "sample": sample, "learn": learn}[args.what](args, cfg), args.json))


if __name__ == "__main__":
    main()
