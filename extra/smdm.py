"""SMDM's 30 sizes, and its recipe for a budget of FLOPs. Imports nothing of ours."""

SMDM_SIZES = {  # millions of parameters without embedding and head: (n_layer, n_head, n_embd)
    6: (6, 4, 256), 19: (8, 6, 384), 34: (8, 8, 512), 48: (9, 9, 576), 66: (10, 10, 640),
    75: (16, 8, 640), 85: (13, 10, 640), 113: (12, 12, 768), 142: (15, 12, 768),
    170: (18, 12, 768), 180: (14, 14, 896), 206: (16, 14, 896), 231: (18, 14, 896),
    268: (16, 16, 1024), 302: (18, 16, 1024), 336: (20, 16, 1024), 472: (18, 10, 1280),
    551: (21, 10, 1280), 571: (18, 11, 1408), 629: (24, 10, 1280), 666: (21, 11, 1408),
    717: (19, 12, 1536), 761: (24, 11, 1408), 831: (22, 12, 1536), 944: (25, 12, 1536),
    1028: (20, 14, 1792), 1233: (24, 14, 1792), 1476: (22, 16, 2048), 1678: (25, 16, 2048),
    2121: (28, 17, 2176),
}  # fmt: skip


def fields_of(size, flops, batch_size, short_rows):
    """The fields of a Config: SMDM (Nie et al. 2024, arXiv 2410.18514; ML-GSAI/SMDM).

    flops: the budget in 10^18; steps follow from 6 x parameters x tokens, where SMDM counts
    short rows by their length, since it throws the rest away; we keep it. lr is that of SMDM's
    code, 2e-4 to 2e-5; its paper says 4e-4 to 4e-5, and which of the two trained the released
    weights is not known. Two things are not as in its code: times are stratified, and weight
    decay leaves out the norms' gains."""
    if not flops > 0:
        raise ValueError(f"flops={flops}: must be above 0, in units of 10^18")
    n_layer, n_head, n_embd = SMDM_SIZES[size]
    width = 1600 if size == 75 else 4 * n_embd
    parameters = n_layer * (4 * n_embd**2 + 3 * n_embd * width + 2 * n_embd) + n_embd
    length = 2048 * (1 - short_rows) + 0.5 * (1 + 2048) * short_rows
    steps = int(flops * 1e18 / (6 * parameters * batch_size * length))
    return dict(
        data="slimpajama", vocab_size=32000, seq_len=2048,
        n_layer=n_layer, n_head=n_head, n_embd=n_embd, mlp_width=width, cond_dim=0,
        norm="rms", mlp="swiglu", bias=False, init="smdm",
        loss="mdlm", T=0, t_min=1e-3, short_rows=short_rows,
        steps=max(steps, 1), batch_size=batch_size, micro_batch=8 if size < 1000 else 4,
        lr=2e-4, min_lr=2e-5, lr_decay="cosine", warmup=max(100, steps // 100),
        beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, grad_clip=1.0, ema=0.0,
        seed=3407, eval_every=5000, eval_windows=2048, save_every=2500,
    )  # fmt: skip
