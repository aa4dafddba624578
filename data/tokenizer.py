"""Text <-> token ids. A tokenizer is a plain dict, its spec, kept in meta.json and inside every checkpoint:

{"kind": "char", "characters": " abc..."}     one id per character, in this order
{"kind": "bpe", "json": "..."}                byte-level BPE of our own, as the tokenizers library writes it;
                                              with "eos": true its last id is an end of text
{"kind": "gpt2"}                              GPT-2's byte-level BPE, 50,257 ids, through tiktoken
{"kind": "wordpiece", "vocab": "..."}         BERT's uncased WordPiece, with this vocab.txt: one piece a line
{"kind": "llama", "json": "..."}              Llama-2's BPE, 32,000 ids, with this tokenizer.json

Ids are 0..vocab_size-1; the id vocab_size is MASK, which is never encoded and is shown as █.
Text that looks like a special token, [MASK] or <|endoftext|>, is encoded like any other.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common import fail

MASK_SHOWN = "█"


class Tokenizer(NamedTuple):
    vocab_size: int
    encode: Callable  # text, inside=False -> list of ids; ValueError, one line, on text it cannot express
    encode_batch: (
        Callable  # texts, threads -> list of lists of ids; prefix="" is inside=True for all
    )
    decode: Callable  # ids -> text; bytes that are not UTF-8 become U+FFFD
    pieces: Callable  # ids -> list of strings, one per id, for a view of the canvas token by token
    bos: int | None = None  # the id that begins a row, where the vocabulary has one
    eos: int | None = None  # ... and that ends a document or a row


def load_tokenizer(spec):
    """The Tokenizer that a spec describes; ValueError, one line, if it is none of ours."""
    if spec.get("kind") not in KINDS:
        raise ValueError(
            f"unknown kind of tokenizer {spec.get('kind')!r}; there are {', '.join(KINDS)}"
        )
    kind = KINDS[spec["kind"]](spec)
    table = [*kind["table"], MASK_SHOWN.encode()]  # the bytes of every id
    prefix = kind.get("prefix", "")

    def decode(ids):  # joins bytes before decoding: one character may be spread over several tokens
        return b"".join(table[i] for i in ids).decode(errors="replace").removeprefix(prefix)

    def encode_batch(texts, threads=1, prefix=prefix):
        for text in texts:
            text.encode()  # half a surrogate pair, as a terminal may send: a ValueError for every kind
        return kind["encode"]([text and prefix + text for text in texts], threads)

    def encode(text, inside=False):  # inside: the text goes on from another one, e.g. after a hole
        return encode_batch([text], prefix="" if inside else prefix)[0]

    return Tokenizer(
        vocab_size=len(table) - 1,
        encode=encode,
        encode_batch=encode_batch,
        decode=decode,
        pieces=lambda ids: [table[i].decode(errors="replace") for i in ids],
        bos=kind.get("bos"),
        eos=kind.get("eos"),
    )


def tokenizer_of(spec):
    """load_tokenizer for the scripts: one line and exit code 2 instead of an error."""
    try:
        return load_tokenizer(spec)
    except ValueError as e:
        fail(e)


# ---------------------------------------------------------------------------------------------------------
# The kinds: spec -> encode (texts, threads -> lists of ids), table (the bytes of every id) and, if any, bos,
# eos and the prefix that is put before a text to be encoded, and that decoding removes


def char(spec):
    characters = spec["characters"]
    ids = {c: i for i, c in enumerate(characters)}

    def encode(text):
        if missing := set(text) - ids.keys():
            raise ValueError(f"not in the vocabulary: {' '.join(map(repr, sorted(missing)))}")
        return [ids[c] for c in text]

    return dict(
        encode=lambda texts, threads: [encode(text) for text in texts],
        table=[c.encode() for c in characters],
    )


def bpe(spec):
    from tokenizers import Tokenizer as BPE

    model = BPE.from_str(spec["json"])  # has no special tokens, so no text can turn into one
    byte_of, invisible = {}, 0  # byte-level BPE spells each byte as one visible character
    for b in range(256):
        visible = 33 <= b <= 126 or 161 <= b <= 255 and b != 173
        byte_of[chr(b if visible else 256 + invisible)] = b
        invisible += not visible
    spelled = [model.id_to_token(i) for i in range(model.get_vocab_size())]
    end = len(spelled) if spec.get("eos") else None  # begins rows, too, as GPT-2's does
    return dict(
        encode=lambda texts, threads: [model.encode(text).ids for text in texts],
        table=[bytes(byte_of[c] for c in piece) for piece in spelled]
        + [b"<|endoftext|>"] * (end is not None),
        bos=end,
        eos=end,
    )


def gpt2(spec):
    import tiktoken

    try:
        model = tiktoken.get_encoding("gpt2")
    except OSError as e:
        raise ValueError(
            f"cannot fetch GPT-2's vocabulary, which tiktoken downloads once ({type(e).__name__}); "
            "set TIKTOKEN_CACHE_DIR to a folder that has it"
        ) from None
    return dict(
        encode=lambda texts, threads: (
            model.encode_ordinary_batch(texts, num_threads=threads)  # starts threads, be it one
            if threads > 1
            else [model.encode_ordinary(text) for text in texts]
        ),
        table=[model.decode_single_token_bytes(i) for i in range(model.n_vocab)],
        bos=model.eot_token,
        eos=model.eot_token,
    )


def wordpiece(spec):
    """Lower case, no accents, words and punctuation apart, then the longest pieces that fit, [UNK] if none do.
    Not reversible: decoding writes a space before every piece that does not continue a word."""
    from tokenizers import Tokenizer as WordPiece
    from tokenizers import models, normalizers, pre_tokenizers

    vocab = spec["vocab"].removesuffix("\n").split("\n")
    ids = {piece: i for i, piece in enumerate(vocab)}
    if missing := {"[PAD]", "[UNK]", "[CLS]", "[SEP]"} - ids.keys():
        raise ValueError(f"not a WordPiece vocabulary: has no {', '.join(sorted(missing))}")
    if len(ids) < len(vocab):
        raise ValueError("not a WordPiece vocabulary: some pieces appear twice")
    model = WordPiece(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    model.normalizer = normalizers.BertNormalizer(lowercase=True)
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return dict(
        encode=lambda texts, threads: [model.encode(text).ids for text in texts],
        table=[(piece[2:] if piece.startswith("##") else " " + piece).encode() for piece in vocab],
        prefix=" ",
        bos=ids["[CLS]"],
        eos=ids["[SEP]"],
    )


def llama(spec):
    """Spaces are spelled ▁, and what has no piece in bytes, <0x00> to <0xFF>. ▁ itself becomes a space.

    The prefix makes a word at the start of a text the same piece as elsewhere. Text behind a hole or a prompt
    has to be encoded with inside=True, or it would begin with a space too many. Of the file only pieces and
    merges are used, no special tokens, template or truncation: encoding adds no ids and no text is special."""
    from tokenizers import Tokenizer as BPE
    from tokenizers import models, normalizers

    try:
        file = json.loads(spec["json"])["model"]
        ids, merges = (
            file["vocab"],
            [m.split(" ") if isinstance(m, str) else m for m in file["merges"]],
        )
        merges = [tuple(m) for m in merges if "".join(m) not in LLAMA_PIECES]
        table = sorted(ids, key=ids.get)
        if [ids[piece] for piece in table] != list(range(len(ids))) or LLAMA_PIECES - ids.keys():
            raise ValueError(
                "its pieces must have ids from 0 on, <s>, </s>, <unk> and 256 bytes among them"
            )
        model = BPE(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    except Exception as e:  # those of tokenizers have no class of their own
        raise ValueError(
            f"not a tokenizer.json of Llama's form ({type(e).__name__}: {e})"
        ) from None
    model.normalizer = normalizers.Replace(" ", "▁")

    def spelled(piece):
        byte = re.fullmatch("<0x(..)>", piece)
        return bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode()

    return dict(
        encode=lambda texts, threads: [model.encode(text).ids for text in texts],
        table=[spelled(piece) for piece in table],
        prefix=" ",
        bos=ids["<s>"],
        eos=ids["</s>"],
    )


LLAMA_PIECES = {
    "<s>",
    "</s>",
    "<unk>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
}  # never merged from text

KINDS = {"char": char, "bpe": bpe, "gpt2": gpt2, "wordpiece": wordpiece, "llama": llama}


# ---------------------------------------------------------------------------------------------------------
# Specs that have to be made


def read_wordpiece(path):
    """The spec in a vocab.txt, or in a tokenizer.json of the tokenizers library; ValueError if it is neither."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if text.lstrip().startswith("{"):
            ids = json.loads(text)["model"]["vocab"]
            text = "".join(f"{piece}\n" for piece in sorted(ids, key=ids.get))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: neither a vocab.txt nor a tokenizer.json") from None
    return {"kind": "wordpiece", "vocab": text}


def read_llama(path):
    """The spec in a tokenizer.json; ValueError if it is none of Llama's form."""
    try:
        spec = {"kind": "llama", "json": Path(path).read_text(encoding="utf-8")}
        load_tokenizer(spec)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    return spec


def train_bpe(texts, vocab_size):
    """The spec of a byte-level BPE learnt from `texts`: all 256 bytes, then the most useful merges."""
    from tokenizers import Tokenizer as BPE
    from tokenizers import decoders, models, pre_tokenizers, trainers

    model = BPE(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    return {"kind": "bpe", "json": model.to_str()}
