"""The code of MDLM, SEDD, nanoDD and SMDM on a CPU, for `tasks.peers`.

`enter_clone` makes a process import a clone's modules instead of ours. What needs a GPU is
replaced: flash-attn by torch's scaled_dot_product_attention, rotary and RMSNorm kernels and
xformers' SwiGLU by what they compute. Packages that a step does not use are empty. Lightning's loop
and metrics, gradient scaling and DDP are left out, in the projects' favour. Their autocasts are
CUDA's, so here they compute in float32 or in the same CPU autocast as ours.
"""

import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace as Fields
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F

from common import autocast

CPU = torch.device("cpu")

# --------------------------------------------------------------------------------------------------
# Imports

UNUSED = """hydra lightning lightning_utilities torchmetrics transformers huggingface_hub omegaconf
    fsspec timm dataloader models.dimamba dropout_layer_norm xentropy_cuda_lib""".split()


class StubModule(types.ModuleType):
    """A package that is imported but not used: every name in it exists."""

    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)


class StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the UNUSED packages as stubs, even where they are installed."""

    def find_spec(self, name, path, target=None):
        if name in UNUSED or name.split(".")[0] in UNUSED:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return StubModule(spec.name)

    def exec_module(self, module):
        pass


def add_module(name, **contents):
    """Make a stub module with these contents importable as `name`."""
    sys.modules[name] = module = StubModule(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    vars(module).update(contents)
    return module


def hide_our_modules():
    """Remove our modules from sys.modules and our root from sys.path, where it may be "". Only the
    running script stays. Clones have modules with the same names, e.g. diffusion and data."""
    root = Path(__file__).resolve().parents[1]
    folders = {root, *(path.parent for path in root.glob("*/__init__.py"))}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and Path(file).resolve().parent in folders and "main__" not in name:
            del sys.modules[name]
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != root]


def enter_clone(clone):
    """From now on this process imports the modules of the project at `clone`."""
    hide_our_modules()
    sys.path.insert(0, str(clone.resolve()))
    sys.meta_path.insert(0, StubFinder())
    warnings.filterwarnings("ignore")
    torch.set_float32_matmul_precision("high")  # as nanoDD, SMDM and ours have it
    rotary = add_module("flash_attn.layers.rotary", apply_rotary_emb_qkv_=rotate_packed)
    attention = dict(flash_attn_varlen_qkvpacked_func=attend_packed)
    flash = add_module("flash_attn.flash_attn_interface", **attention)
    layers = add_module("flash_attn.layers", rotary=rotary)
    add_module("flash_attn", flash_attn_interface=flash, layers=layers)
    add_module("huggingface_hub", PyTorchModelHubMixin=type("PyTorchModelHubMixin", (), {}))
    torch.manual_seed(0)


# --------------------------------------------------------------------------------------------------
# What GPU kernels compute


def attend_packed(qkv, cu_seqlens, length, dropout, causal=False):
    """flash_attn_varlen_qkvpacked_func for rows of one length, without dropout."""
    q, k, v = qkv.view(-1, length, *qkv.shape[1:]).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


def rotate_packed(qkv, cos, sin):
    """flash_attn.layers.rotary.apply_rotary_emb_qkv_, but out of place: qkv (B, L, 3, H, D)."""
    a, b = qkv[:, :, :2].chunk(2, -1)
    cos, sin = cos[:, None, None], sin[:, None, None]
    return torch.cat((torch.cat((a * cos - b * sin, b * cos + a * sin), -1), qkv[:, :, 2:]), 2)


def rotate_into(a, b, cos, sin, out_a, out_b, conjugate):
    """rotary_emb.apply_rotary, in float32; conjugate: turn backwards."""
    cos, sin = cos.float(), -sin.float() if conjugate else sin.float()
    a, b = a.float(), b.float()  # the outputs may be the inputs
    out_a.copy_(a * cos - b * sin)
    out_b.copy_(b * cos + a * sin)


class SwiGLU(torch.nn.Module):
    """xformers' layer, with its parameter names."""

    def __init__(self, d, hidden, *_, **__):
        super().__init__()
        self.w1, self.w2 = (torch.nn.Linear(d, hidden, bias=False) for _ in range(2))
        self.w3 = torch.nn.Linear(hidden, d, bias=False)

    def forward(self, x):
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


# --------------------------------------------------------------------------------------------------
# One function per project: a Config of ours -> step(i), which does one step of the project's
# training loop and returns the loss. The network is the project's own, without dropout: step.net is
# the module, step.average() its averaged tensors. rows(i) is the batch of step i: ids (B, L) and an
# attention mask (B, L), 0 on padding, which only MDLM's code has.


def random_rows(cfg):
    """rows(i): a batch of random token ids, which cost as much as real ones, without padding."""
    shape = (cfg.batch_size, cfg.seq_len)
    return lambda i: (torch.randint(cfg.vocab_size, shape), torch.ones(shape, dtype=torch.long))


def warmed_up(optimizer, cfg, i, warmup):
    """Set the learning rate of step i = 0, 1, ...: linear from 0, then constant."""
    for group in optimizer.param_groups:
        group["lr"] = cfg.lr * min(1, i / warmup) if warmup else cfg.lr


def build_mdlm(cfg, sampler="ddpm_cache", steps=0):
    """MDLM's Diffusion with the settings of its OpenWebText run."""

    class Lightning(torch.nn.Module):
        dtype, device = torch.float32, CPU
        save_hyperparameters = lambda self: None

    add_module("lightning", LightningModule=Lightning)
    add_module("torchmetrics", aggregation=Fields(MeanMetric=torch.nn.Identity))
    add_module("timm.scheduler", CosineLRScheduler=type("CosineLRScheduler", (), {}))
    from diffusion import Diffusion

    settings = Fields(
        parameterization="subs", backbone="dit", T=0, subs_masking=False, time_conditioning=False,
        noise=Fields(type="loglinear", sigma_min=1e-4, sigma_max=20),
        sampling=Fields(predictor=sampler, steps=steps, noise_removal=True),
        loader=Fields(eval_batch_size=cfg.batch_size), optim=Fields(lr=cfg.lr),
        eval=Fields(gen_ppl_eval_model_name_or_path=""),
        training=Fields(
            antithetic_sampling=True, importance_sampling=False, change_of_variables=False,
            ema=0.9999, sampling_eps=1e-3,
        ),
        model=Fields(
            hidden_size=cfg.n_embd, n_heads=cfg.n_head, n_blocks=cfg.n_layer,
            cond_dim=cfg.cond_dim, length=cfg.seq_len, dropout=0.0, scale_by_sigma=True,
        ),
    )  # fmt: skip
    return Diffusion(settings, Fields(vocab_size=cfg.vocab_size, mask_token=None))


def mdlm(cfg, rows=None, warmup=2500):
    model, rows = build_mdlm(cfg), rows or random_rows(cfg)
    model.train()
    params = [*model.backbone.parameters(), *model.noise.parameters()]
    optimizer = torch.optim.AdamW(params, lr=cfg.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0)

    def step(i):
        with autocast(CPU, cfg.dtype):
            loss = model._loss(*rows(i)).loss
        warmed_up(optimizer, cfg, i, warmup)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        model.ema.update(params)
        return loss.item()

    def average():
        model.ema.copy_to(params)
        return model.backbone.state_dict()

    step.model, step.net, step.average = model, model.backbone, average
    return step


def nanodd(cfg, rows=None, warmup=0):
    from d3pm_absorbing import D3PMAbsorbing
    from ema_pytorch import EMA

    shape = (cfg.vocab_size, cfg.n_embd, cfg.n_head, cfg.n_layer)
    model = D3PMAbsorbing(*shape, cfg.cond_dim, dropout=0.0, T=1000, lambda_ce=0.05)
    settings = dict(update_after_step=100, update_every=1, inv_gamma=1.0, power=1.0)
    ema = EMA(model, beta=0.9999, include_online_model=False, **settings)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0.0)]
    optimizer, rows = (
        torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.98)),
        rows or random_rows(cfg),
    )
    model.train()

    def step(i):
        with autocast(CPU, cfg.dtype):
            _, loss, _ = model(rows(i)[0])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        warmed_up(optimizer, cfg, i, warmup)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update()
        return loss.item()

    step.net, step.average = model, ema.ema_model.state_dict
    return step


def sedd(cfg):
    import graph_lib
    import losses
    import noise_lib
    from model.ema import ExponentialMovingAverage
    from model.transformer import SEDD

    settings = Fields(
        graph=Fields(type="absorb"), tokens=cfg.vocab_size, noise=Fields(type="loglinear"),
        optim=Fields(
            optimizer="AdamW", lr=cfg.lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0,
            warmup=2500, grad_clip=1.0,
        ),
        model=Fields(
            hidden_size=cfg.n_embd, n_heads=cfg.n_head, n_blocks=cfg.n_layer,
            cond_dim=cfg.cond_dim, dropout=0.0, scale_by_sigma=True,
        ),
    )  # fmt: skip
    net, noise, rows = SEDD(settings), noise_lib.get_noise(settings), random_rows(cfg)
    forward = net.forward

    def forward_in_autocast(*args):
        with autocast(CPU, cfg.dtype):
            return forward(*args)

    net.forward = forward_in_autocast
    state = dict(
        model=net, noise=noise, step=0, scaler=torch.amp.GradScaler(enabled=False),
        optimizer=losses.get_optimizer(settings, [*net.parameters(), *noise.parameters()]),
        ema=ExponentialMovingAverage(net.parameters(), decay=0.9999),
    )  # fmt: skip
    graph, optimize = graph_lib.Absorbing(cfg.vocab_size), losses.optimization_manager(settings)
    step = losses.get_step_fn(noise, graph, True, optimize, 1)
    return lambda i: step(state, rows(i)[0]).item()


def smdm(cfg, rows=None, warmup=0):
    """Its network has no adaLN; the loop is that of its pretrain/train_mdm.py."""
    add_module("xformers.ops", SwiGLU=SwiGLU)
    add_module("rotary_emb", apply_rotary=rotate_into)
    from lit_gpt import diffmodel
    from lit_gpt.config import Config as Settings
    from lit_gpt.fused_rotary_embedding import ApplyRotaryEmb

    # This torch forbids SMDM's own call, which rotates a view in place.
    rotate = lambda x, cos, sin, *_: ApplyRotaryEmb.apply(x, cos, sin, False, False)
    diffmodel.apply_rotary_emb_func = rotate
    settings = Settings.from_name(
        "Diff_LLaMA_6M", _norm_class="RMSNorm", n_layer=cfg.n_layer, n_head=cfg.n_head,
        n_embd=cfg.n_embd, intermediate_size=4 * cfg.n_embd, block_size=cfg.seq_len,
        vocab_size=cfg.vocab_size, padded_vocab_size=cfg.vocab_size,
    )  # fmt: skip
    net, rows = diffmodel.TransEncoder(settings), rows or random_rows(cfg)
    net.apply(partial(net._init_weights, n_layer=cfg.n_layer))
    adamw = dict(lr=cfg.lr, weight_decay=0.1, betas=(0.9, 0.95), foreach=False)
    optimizer = torch.optim.AdamW(net.parameters(), **adamw)

    def step(i):
        x, _ = rows(i)
        p = ((1 - 1e-3) * torch.rand(len(x), 1) + 1e-3).expand(x.shape)
        masked = torch.rand(x.shape) < p
        with autocast(CPU, cfg.dtype):
            logits = net(x.masked_fill(masked, cfg.vocab_size))
            nats = F.cross_entropy(logits[masked].float(), x[masked], reduction="none")
            loss = (nats / p[masked]).sum() / x.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        warmed_up(optimizer, cfg, i, warmup)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    step.net = net
    step.average = net.state_dict  # there is none
    return step


PROJECTS = {"mdlm": mdlm, "nanodd": nanodd, "sedd": sedd, "smdm": smdm}
