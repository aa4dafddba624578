"""The bound in T steps as nanoDD reports it: python evaluate.py CKPT --T 1000 --parts."""

import math

from evaluate import bound


def bound_in_parts(*args, T, **options):
    """`evaluate.bound` in T steps, estimated in two parts with as many forwards each, in bits per
    token: the KL of the steps T to 2, and the reconstruction of step 1, in which one token in T is
    masked. Drawn together, step 1 would come once in T windows and weigh T times as much."""
    spans = {"kl": (1 / T, 1.0), "reconstruction": (0.0, 1 / T)}
    parts = {name: bound(*args, T=T, span=span, **options) for name, span in spans.items()}
    total = parts["kl"] | {
        "nats": sum(part["nats"] for part in parts.values()),
        "se": math.hypot(*(part["se"] for part in parts.values())),
        "forwards": sum(part["forwards"] for part in parts.values()),
    }
    for name, part in parts.items():
        total |= {name: part["nats"] / math.log(2), f"{name}_se": part["se"] / math.log(2)}
    return total
