"""Text <-> token ids. A tokenizer is a plain dict, its spec, kept in meta.json and inside every checkpoint:

{"kind": "char", "characters": " abc..."}     one id per character, in this order
{"kind": "bpe", "json": "..."}                byte-level BPE of our own, as the tokenizers library writes it
{"kind": "gpt2"}                              GPT-2's byte-level BPE, 50,257 ids, through tiktoken

Ids are 0..vocab_size-1; the id vocab_size is MASK, which is never encoded and is shown as █.
"""

from collections.abc import Callable
from typing import NamedTuple

from configs import fail

MASK_SHOWN = "█"


class Tokenizer(NamedTuple):
    vocab_size: int
    encode: Callable  # text -> list of ids; ValueError, one line, on text that it cannot express
    decode: Callable  # ids -> text; bytes that are not UTF-8 become U+FFFD
    pieces: Callable  # ids -> list of strings, one per id, for a view of the canvas token by token


def load_tokenizer(spec):
    """The Tokenizer that a spec describes; ValueError, one line, if it is none of ours."""
    if spec.get("kind") not in KINDS:
        raise ValueError(f"unknown kind of tokenizer {spec.get('kind')!r}; there are {', '.join(KINDS)}")
    encode, table = KINDS[spec["kind"]](spec)
    table = [*table, MASK_SHOWN.encode()]  # the bytes of every id

    def decode(ids):  # joins bytes before decoding: one character may be spread over several tokens
        return b"".join(table[i] for i in ids).decode(errors="replace")

    def checked(text):
        text.encode()  # half a surrogate pair, as a terminal may send: a ValueError for every kind
        return encode(text)

    return Tokenizer(len(table) - 1, checked, decode, lambda ids: [decode([i]) for i in ids])


def tokenizer_of(spec):
    """load_tokenizer for the scripts: one line and exit code 2 instead of an error."""
    try:
        return load_tokenizer(spec)
    except ValueError as e:
        fail(e)


def char(spec):
    characters = spec["characters"]
    ids = {c: i for i, c in enumerate(characters)}

    def encode(text):
        if missing := set(text) - ids.keys():
            raise ValueError(f"not in the vocabulary: {' '.join(map(repr, sorted(missing)))}")
        return [ids[c] for c in text]

    return encode, [c.encode() for c in characters]


def bpe(spec):
    from tokenizers import Tokenizer as BPE

    model = BPE.from_str(spec["json"])  # has no special tokens, so no text can turn into one
    byte_of, invisible = {}, 0  # byte-level BPE spells each byte as one visible character
    for b in range(256):
        visible = 33 <= b <= 126 or 161 <= b <= 255 and b != 173
        byte_of[chr(b if visible else 256 + invisible)] = b
        invisible += not visible
    spelled = [model.id_to_token(i) for i in range(model.get_vocab_size())]
    return lambda text: model.encode(text).ids, [bytes(byte_of[c] for c in piece) for piece in spelled]


def gpt2(spec):
    import tiktoken

    try:
        model = tiktoken.get_encoding("gpt2")
    except OSError as e:
        raise ValueError(
            f"cannot fetch GPT-2's vocabulary, which tiktoken downloads once ({type(e).__name__}); "
            "set TIKTOKEN_CACHE_DIR to a folder that has it"
        ) from None
    return model.encode_ordinary, [model.decode_single_token_bytes(i) for i in range(model.n_vocab)]


KINDS = {"char": char, "bpe": bpe, "gpt2": gpt2}


def train_bpe(texts, vocab_size):
    """The spec of a byte-level BPE learnt from `texts`: all 256 bytes, then the most useful merges."""
    from tokenizers import Tokenizer as BPE
    from tokenizers import decoders, models, pre_tokenizers, trainers

    model = BPE(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(texts, trainer)
    return {"kind": "bpe", "json": model.to_str()}
