"""Masked diffusion language models (MDLM) on one page. Run `python tiny.py`: one learns to write.

A text x0 is a row of L tokens. Noise hides them: at time t each token, independently of the
others, is replaced by MASK with probability t. At t = 0 the text is whole, at t = 1 all is hidden:

    t = 0      the value of the object        x0
    t = 1/2    the _____ __ the ______        xt
    t = 1      ___ _____ __ ___ ______

A network learns to guess the hidden tokens from the visible ones. That is enough to write: start
from masks only and let t fall to 0. Each token appears at a random moment, drawn from the guess
that the network makes from all tokens that have appeared before, on both sides.
Shapes: B rows of L tokens, ids 0 .. V-1, and mask_id = V stands for MASK.
"""

import math
import re
import time
from collections import Counter
from pydoc_data.topics import topics  # the pages of Python's help(): every installation has them

import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    """xt (B, L) -> logits (B, L, V): a guess at every token, never MASK. It needs no t: masks fall
    without regard to the text, so once the visible tokens are known, t adds nothing."""

    def __init__(self, V, d=128):
        super().__init__()
        self.embed = nn.Embedding(V + 1, d)  # V tokens and MASK
        self.near = nn.Conv1d(d, d, 7, padding=3)  # each position reads its neighbours, in order
        options = dict(dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True)
        self.far = nn.TransformerEncoderLayer(d, 4, 4 * d, **options)  # ... and all others
        self.head = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, V))

    def forward(self, xt):
        return self.head(self.far(self.near(self.embed(xt).mT).mT))


def loss(model, x0, mask_id, t=None, xt=None):
    """(B,) nats, mean >= -log p(x0). / t: a mask is revealed in the last dt with chance dt / t."""
    B, L = x0.shape
    t = (torch.arange(1, B + 1) - torch.rand(B)) / B if t is None else t  # one per 1/B of (0, 1]
    xt = torch.where(torch.rand(B, L) < t[:, None], mask_id, x0) if xt is None else xt
    nats = F.cross_entropy(model(xt).mT, x0, reduction="none")  # (B, L)
    return (nats * (xt == mask_id)).sum(1) / t


@torch.no_grad()
def sample(model, xt, steps, mask_id):
    """Time runs from 1 to 0, from t to s in each step; yields xt (B, L). Visible tokens stay."""
    for n in range(steps, 0, -1):
        t, s = n / steps, (n - 1) / steps
        x0 = torch.distributions.Categorical(logits=model(xt)).sample()  # a guess at every token
        reveal = torch.rand(xt.shape) < (t - s) / t  # P(visible at s | masked at t)
        xt = torch.where((xt == mask_id) & reveal, x0, xt)
        yield xt


def tokenize(V):
    """The text as ids (N,), and the string of each id: letters, and pairs that often meet (BPE)."""
    strings = list(" abcdefghijklmnopqrstuvwxyz")
    text = re.sub("[^a-z]+", " ", " ".join(topics.values()).lower())
    text = "".join(chr(strings.index(c)) for c in text)  # from here on a character is a token's id
    while len(strings) < V:
        (a, b), _ = Counter(zip(text[:100_000], text[1:])).most_common(1)[0]
        text = text.replace(a + b, chr(len(strings)))
        strings.append(strings[ord(a)] + strings[ord(b)])
    return torch.tensor([ord(c) for c in text]), strings


def main(steps=4000, B=16, L=64, V=512):
    torch.manual_seed(0)
    data, strings = tokenize(V)
    train, unseen = data[: -64 * L], data[-64 * L :].view(64, L)
    write = lambda ids: "".join([*strings, "_"][i] for i in ids.flatten().tolist())
    model, start = Net(V), time.time()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)  # up, then down
    for step in range(1, steps + 1):
        x0 = train[torch.randint(len(train) - L, (B, 1)) + torch.arange(L)]
        optimizer.zero_grad()
        loss(model, x0, mask_id=V).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), decay.step()
        if step % 200 == 0:
            nats = sum(loss(model, unseen, mask_id=V).sum().item() for _ in range(4)) / 4
            bits = nats / math.log(2) / len(write(unseen))  # per character
            print(f"step {step}: {bits:.2f} bits per character, {time.time() - start:.0f} s")
    for n, xt in enumerate(sample(model, torch.full((3, L), V), L, mask_id=V), start=1):
        if n % (L // 4) == 0:
            print(f"\nt = {1 - n / L}", *map(write, xt), sep="\n")


if __name__ == "__main__":
    main()
