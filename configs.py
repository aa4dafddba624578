"""Every experiment as a Python function that returns one frozen Config.

python train.py                                   # pydocs_mdlm, the demo
python train.py text8_d3pm --lr=5e-4 --seed=2     # a config and typed overrides
"""

from dataclasses import dataclass, fields, replace
from functools import partial
from importlib import import_module

from common import DTYPES, fail, one_line
from diffusion import LOSSES, SCHEDULES, SIGMAS, TIME_DRAWS, TIME_LAWS
from extra.smdm import SMDM_SIZES, fields_of

LR_DECAYS = ("constant", "cosine", "linear")
TIME_INPUTS = ("sigma", "step")
NORMS, MLPS, INITS = ("layer", "rms"), ("gelu", "swiglu"), ("zero", "smdm")
MIXERS = ("attention", "mamba")
CHOICES = dict(
    loss=LOSSES, schedule=SCHEDULES, time_law=TIME_LAWS, time_draw=TIME_DRAWS, lr_decay=LR_DECAYS,
    time_input=TIME_INPUTS, dtype=DTYPES, norm=NORMS, mlp=MLPS, init=INITS, mixer=MIXERS,
)  # fmt: skip
AT_LEAST_ONE = (
    "vocab_size seq_len n_layer n_head n_embd steps batch_size micro_batch eval_every".split()
    + ["save_every"]
)
BELOW_ONE = ("prompt_dropout", "t_min", "short_rows", "dropout", "ema", "beta1", "beta2")


@dataclass(frozen=True)
class Config:
    # data
    data: str = "pydocs"  # folder under data/, or a path to one, made by data/prepare.py
    vocab_size: int = 2048  # V real tokens; MASK is one more, the last row of the embedding
    seq_len: int = 256
    # model
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 256
    cond_dim: int = 128  # width of the adaLN conditioning; 0: plain pre-norm blocks, no adaLN
    time_cond: bool = False  # False: adaLN sees a constant, as in MDLM's released model
    time_input: str = "sigma"  # the time embedding reads sigma(t) (MDLM) or 1000 t (nanoDD)
    mixer: str = "attention"  # attention and an MLP (MDLM's DiT), or mamba (MDLM's DiMamba)
    norm: str = "layer"  # LayerNorm without bias (MDLM), or rms: RMSNorm (SMDM)
    mlp: str = "gelu"  # GELU (MDLM), or swiglu (SMDM)
    mlp_width: int = 0  # hidden width of the MLP; 0: 4 n_embd
    latent_dim: int = 0  # dimensions of a latent z of the whole text; 0: none (extra/latent.py)
    mmd_weight: float = 1.0  # latent: weight of the MMD between all codes and the normal prior
    kl_weight: float = 0.0  # latent: > 0 makes codes noisy; weight of their KL, 1 as in a VAE
    bias: bool = True  # in the MLP and the head
    init: str = "zero"  # every block starts as the identity (MDLM), or smdm: normal, as in SMDM
    tied: bool = False  # the head is the first V rows of the embedding, without bias (nanoDD)
    causal: bool = False  # loss=ar: position i is predicted from the tokens before it
    zero_masking: bool = True  # False: d3pm's network may answer MASK (V + 1 outputs)
    dropout: float = 0.0
    # diffusion
    loss: str = "mdlm"  # a key of diffusion.LOSSES
    schedule: str = "linear"  # a key of diffusion.SCHEDULES
    sigma_min: float = 0.0  # of the schedules geometric and sigma_linear, with sigma_max
    sigma_max: float = 0.0  # 0: both as published, 1e-4 to 20 and 0 to 10
    T: int = 0  # number of diffusion steps; 0: continuous time
    bos: bool = False  # every row's first token is given: never masked, predicted or counted
    short_rows: float = 0.0  # share of the rows that are cut into rows of a random length (SMDM)
    prompt_dropout: float = 0.0  # share of the rows whose given tokens are masked, for guidance
    t_min: float = 0.0  # smallest t drawn in continuous-time training
    time_draw: str = "stratified"  # over the global batch; iid, importance (log t), counts (exact)
    time_law: str = "uniform"  # of training times; bell: Beta(2, 2), dwells on half-masked text
    aux_ce: float = 0.0  # d3pm: weight of nanoDD's auxiliary cross-entropy over every token
    carry_over: bool = True  # False: d3pm's network must copy visible tokens (reconstruction term)
    # optimisation
    steps: int = 1000
    batch_size: int = 16  # sequences per optimiser step, all GPUs together
    micro_batch: int = 16  # most sequences per GPU per forward: changes memory, not the gradient
    recompute: bool = False  # recompute blocks in the backward pass: less memory, more time
    lr: float = 1e-3
    min_lr: float = 0.0  # where cosine and linear decay end
    lr_decay: str = "constant"  # constant, cosine or linear
    warmup: int = 100
    decay_steps: int = 0  # cosine, linear: the last so many steps decay; 0: all after the warm-up
    muon_lr: float = 0.0  # > 0: Muon at this rate for the blocks' matrices, AdamW for the rest
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # on tensors of two or more dimensions
    grad_clip: float = 1.0
    ema: float = 0.9999  # decay m / (m + ema_warmup), at most ema, m = n - ema_start; 0: none
    ema_start: int = -1  # -1 and 9: MDLM's (1 + n) / (10 + n)
    ema_warmup: int = 9
    # run
    init_from: str = ""  # checkpoint whose averaged weights a new run begins with: fine-tuning
    seed: int = 1
    device: str = "auto"  # cuda where there is one, else cpu
    dtype: str = "auto"  # autocast to bfloat16 where the hardware has it, else float32
    compile: bool = True  # torch.compile of the trunk; CUDA only
    fsdp: bool = False  # share out weights and moments over the processes: larger networks fit
    eval_every: int = 1000
    eval_windows: int = 256  # windows of the validation split per evaluation; 0: all of it
    val_data: str = ""  # another prepared corpus of the same tokenizer to validate on too
    val_samples: int = 0  # texts that every validation logs
    judge: str = ""  # of these texts: a model of the hub or an AR checkpoint, see tasks/judge.py
    save_every: int = 1000  # steps between checkpoints
    keep_every: int = 0  # steps between checkpoints that are kept, as step_<n>.pt; 0: none
    samples: int = 4  # printed at the end of a run
    out_dir: str = "out/run"  # the command line makes it out/<config>
    wandb: bool = False  # log to wandb too
    tensorboard: bool = False  # log to out_dir/tensorboard too

    @property
    def mask_id(self):
        return self.vocab_size

    def __post_init__(self):
        """Raises ValueError with one line that names the field and what is allowed."""
        for f in fields(self):
            value = getattr(self, f.name)
            kinds = (int, float) if f.type is float else f.type
            if not isinstance(value, kinds) or isinstance(value, bool) != (f.type is bool):
                raise ValueError(f"{f.name}={value!r}: must be {f.type.__name__}")
            least = 1 if f.name in AT_LEAST_ONE else -1 if f.name == "ema_start" else 0
            if f.type in (int, float) and not least <= value < 2**31:
                raise ValueError(f"{f.name}={value}: must be at least {least} and below 2**31")
            if f.name in BELOW_ONE and value >= 1:
                raise ValueError(f"{f.name}={value}: must be below 1")
            if f.name in ("lr", "eps") and not value > 0:
                raise ValueError(f"{f.name}={value}: must be above 0")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: must be one of {', '.join(allowed)}"
                )
        for wrong, name, message in self.conflicts():
            if wrong:
                raise ValueError(f"{name}={getattr(self, name)}: {message}")

    def conflicts(self):
        """[(wrong, field, message)]: values that are in range but do not go together."""
        is_d3pm, is_ar, pair = self.loss == "d3pm", self.loss == "ar", 2 * self.n_head
        discrete = self.T > 0 or is_ar
        only_d3pm = [
            (
                not is_d3pm and getattr(self, name) != getattr(Config, name),
                name,
                "only for loss=d3pm",
            )
            for name in ("aux_ce", "zero_masking", "carry_over")
        ]
        return only_d3pm + [
            (self.min_lr > self.lr, "min_lr", f"must be at most lr={self.lr}"),
            (self.sigma_max and self.schedule not in SIGMAS, "sigma_max",
             f"only for schedule={' or '.join(SIGMAS)}"),
            (self.sigma_min and self.sigma_min >= self.sigma_max, "sigma_min",
             "must be below sigma_max"),
            (self.sigma_max and self.schedule == "geometric" and not self.sigma_min, "sigma_min",
             "must be above 0 for schedule=geometric"),
            (not self.out_dir, "out_dir", "must not be empty"),
            (self.judge and not self.val_samples, "judge", "needs val_samples, e.g. 16"),
            (self.n_embd % pair, "n_embd", f"must be a multiple of 2 * n_head = {pair} (rotary)"),
            (self.seq_len * self.n_embd // self.n_head > 2**23, "seq_len", "tables above 64 MB"),
            (self.time_cond and not self.cond_dim, "time_cond", "needs cond_dim > 0"),
            (self.mixer == "mamba" and (self.mlp, self.mlp_width, self.init) != ("gelu", 0, "zero"),
             "mixer", "has no MLP: needs mlp=gelu, mlp_width=0 and init=zero"),
            (self.latent_dim and (not self.cond_dim or self.loss not in ("mdlm", "sedd")
             or self.init == "smdm" or self.short_rows), "latent_dim",
             "needs cond_dim > 0, loss=mdlm or sedd, init=zero and short_rows=0"),
            (self.latent_dim and self.mmd_weight and self.micro_batch < 2, "micro_batch",
             "the MMD of a latent needs 2 rows"),
            (self.kl_weight and not self.latent_dim, "kl_weight", "needs latent_dim > 0"),
            (is_d3pm and not self.T, "loss", "needs T, the number of steps, e.g. --T=1000"),
            (self.aux_ce and not (self.zero_masking and self.carry_over), "aux_ce",
             "needs zero_masking=True and carry_over=True"),
            (self.loss in ("sedd", "ar") and self.T, "T", f"must be 0 for loss={self.loss}"),
            (is_ar != self.causal, "causal", "must be True for loss=ar and False for the others"),
            (is_ar and self.prompt_dropout, "prompt_dropout", "must be 0 for loss=ar (no MASK)"),
            (is_ar and self.cond_dim, "cond_dim", "must be 0 for loss=ar, which has no time"),
            (self.time_draw in ("importance", "counts") and discrete, "time_draw",
             "needs continuous time, T=0, and not loss=ar"),
            (self.time_draw == "importance" and not self.t_min, "time_draw", "needs t_min above 0"),
            (self.time_draw == "importance" and self.time_law != "uniform", "time_draw",
             "needs time_law=uniform"),
        ]  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Experiments. A number without a source is ours; upstream's numbers are read off its code.


def pydocs_mdlm():
    """The demo: Python's own documentation, four minutes on two CPU cores, nothing to download. One
    block for more steps beats more blocks in that time; docs/results.md has the trials."""
    return Config(
        data="pydocs", vocab_size=2048, seq_len=256,
        n_layer=1, n_head=4, n_embd=256, cond_dim=0,
        loss="mdlm", T=0, time_law="bell",
        steps=2400, batch_size=16, micro_batch=16,
        lr=2e-3, muon_lr=0.014, lr_decay="constant", warmup=20,
        seed=1, eval_every=400, eval_windows=0, save_every=400,
    )  # fmt: skip


def reversal_mdlm():
    """The demo's recipe for tasks/reversal.py, with decay: a fact per row, from scratch."""
    return replace(
        pydocs_mdlm(), data="reversal", seq_len=64, bos=True, steps=1000, batch_size=64,
        micro_batch=64, samples=0, lr_decay="linear", eval_every=500, save_every=500,
    )  # fmt: skip


def owt_mdlm():
    """MDLM on OpenWebText, small (Sahoo et al. 2024, arXiv 2406.07524; kuleshov-group/mdlm
    configs/). Test perplexity there: at most 23.2 after 1M steps (262B masked tokens)."""
    return Config(
        data="openwebtext_wrap1024", vocab_size=50257, seq_len=1024,  # [BOS] 1022 tokens [EOS]
        n_layer=12, n_head=12, n_embd=768, cond_dim=128, time_cond=False, dropout=0.1,
        loss="mdlm", T=0, t_min=1e-3,  # sampling_eps
        steps=1_000_000, batch_size=512, micro_batch=32,
        lr=3e-4, lr_decay="constant", warmup=2500,
        beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, grad_clip=1.0, ema=0.9999,
        seed=1, eval_every=10_000, eval_windows=2048, save_every=2500,
    )  # fmt: skip


# The baselines of MDLM's paper: each changes what the paper says and nothing else.


def as_sedd(cfg):
    """Score entropy; the network is conditioned on time if it has adaLN."""
    return replace(cfg, loss="sedd", time_cond=cfg.cond_dim > 0)


def as_d3pm(cfg):
    """MDLM's D3PM: 1,000 steps and a network that may predict MASK, must copy visible tokens and is
    conditioned on time."""
    return replace(
        cfg, loss="d3pm", T=1000, zero_masking=False, carry_over=False, time_cond=cfg.cond_dim > 0
    )


def as_ar(cfg):
    """An autoregressive transformer of the same blocks, without adaLN."""
    return replace(cfg, loss="ar", causal=True, cond_dim=0, time_cond=False)


def owt_sedd():
    """SEDD as MDLM's paper trained it anew; perplexity there at most 24.10."""
    return as_sedd(owt_mdlm())


def owt_ar():
    """Every row begins with [BOS], which is given. An AR model learns from all tokens of a row, the
    others from the masked half: so half the steps. Perplexity in MDLM's paper 17.54."""
    return replace(as_ar(owt_mdlm()), bos=True, steps=500_000)


def lm1b_mdlm():
    """MDLM on the One Billion Word Benchmark: a sentence a row, in BERT's WordPieces, padded to
    128, padding not counted. MDLM's paper: at most 27.04 (33B tokens). --data=lm1b_packed is the
    other protocol, whose figures are not comparable. Upstream masks with BERT's own [MASK], id
    103; ours is one id more."""
    return replace(owt_mdlm(), data="lm1b", vocab_size=30522, seq_len=128, micro_batch=128)


def lm1b_d3pm():
    return as_d3pm(lm1b_mdlm())  # at most 76.90


def lm1b_sedd():
    return as_sedd(lm1b_mdlm())  # at most 32.79


def lm1b_ar():
    return replace(as_ar(lm1b_mdlm()), bos=True, steps=500_000)  # [CLS] is given; 22.32


def text8_mdlm():
    """MDLM's recipe at text8's standard size: 27 characters, 256 of them a row, 1M steps of
    512 rows, as D3PM (arXiv 2107.03006) and MD4 (arXiv 2406.04329) train it; others report
    at most 1.40 bits/char."""
    return replace(owt_mdlm(), data="text8", vocab_size=27, seq_len=256, micro_batch=64)


def text8_sedd():
    return as_sedd(text8_mdlm())  # others report at most 1.39


def text8_ar():
    return replace(
        as_ar(text8_mdlm()), steps=500_000
    )  # no BOS in text8: the first character counts; 1.23


def text8_d3pm():
    """nanoDD on text8 (flukeskywalker/nanoDD, configs.d3pm_text8): 92,402,176 parameters,
    reported test bound 1.37 bits/char. Our d3pm is T times nanoDD's per-step loss, so that it is
    in nats per token; the clip of 0.1 and AdamW's 1e-8 there are T times larger here, which
    makes the updates the same."""
    return Config(
        data="text8", vocab_size=27, seq_len=256,
        n_layer=12, n_head=12, n_embd=768, cond_dim=128, time_cond=True, time_input="step",
        tied=True, dropout=0.025,
        loss="d3pm", T=1000, aux_ce=0.05,
        steps=500_000, batch_size=1024, micro_batch=256,
        lr=1e-3, min_lr=1e-5, lr_decay="cosine", warmup=2500,
        beta1=0.9, beta2=0.98, eps=1e-8 * 1000, weight_decay=0.1, grad_clip=0.1 * 1000,
        ema=0.9999, ema_start=101, ema_warmup=1,  # ema-pytorch: 100 plain copies, then m / (m + 1)
        seed=1, eval_every=25_000, eval_windows=2048, save_every=2500,
    )  # fmt: skip


def owt_d3pm():
    """nanoDD on OpenWebText (configs.d3pm_openwebtext_8gpu); no result published there."""
    return replace(
        text8_d3pm(), data="openwebtext", vocab_size=50257, seq_len=1024, dropout=0.0, lr=6e-4,
        seed=9, micro_batch=16,
    )  # fmt: skip


def smdm(size, ar=False, flops=10.0, batch_size=256, short_rows=0.0):
    """SMDM at one of its 30 sizes, for a budget of flops x 10^18, and, with ar, its twin."""
    cfg = Config(**fields_of(size, flops, batch_size, short_rows))
    return replace(as_ar(cfg), bos=True) if ar else cfg


SIZES = {  # MDLM's and SEDD's; a config without a size in its name is small
    "tiny": dict(n_layer=8, n_head=8, n_embd=512),
    "small": dict(n_layer=12, n_head=12, n_embd=768),
    "medium": dict(n_layer=24, n_head=16, n_embd=1024),
}


def with_size(config, size):
    """A config of the same recipe at one of SIZES."""
    return replace(config(), **SIZES[size])


def with_part(part, config):
    """An experiment with an optional part of the network, as extra/<part>.py configures it."""
    return import_module(f"extra.{part}").configure(config())


CONFIGS = {
    f.__name__: f
    for f in (
        text8_mdlm, text8_d3pm, text8_sedd, text8_ar,
        lm1b_mdlm, lm1b_d3pm, lm1b_sedd, lm1b_ar,
        owt_mdlm, owt_d3pm, owt_sedd, owt_ar,
    )
}  # fmt: skip
CONFIGS |= {
    f"{name}_{size}": partial(with_size, config, size)
    for name, config in CONFIGS.items()
    for size in SIZES
}
CONFIGS |= {
    f"{config.__name__}_{part}": partial(with_part, part, config)
    for part in ("mamba", "latent")
    for config in (text8_mdlm, owt_mdlm)
}
CONFIGS |= {
    f"smdm_{size}{'_ar' * ar}": partial(smdm, size, ar)
    for size in SMDM_SIZES
    for ar in (False, True)
}
CONFIGS = {f.__name__: f for f in (pydocs_mdlm, reversal_mdlm)} | CONFIGS


# --------------------------------------------------------------------------------------------------


def from_dict(values, where):
    """The Config of a checkpoint's dict or of config.json; errors name the file `where`."""
    try:
        return Config(**values)
    except (TypeError, ValueError) as e:
        fail(f"{where}: not a config of this version ({one_line(e)})")
