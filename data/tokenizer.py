"""Text <-> token ids. A tokenizer is a plain dict, its spec, kept in meta.json and checkpoints:

{"kind": "char", "characters": " abc..."}     one id per character, in this order
{"kind": "bpe", "json": "..."}                our own byte-level BPE, as the tokenizers library
                                              writes it; with "eos": true its last id ends a text
{"kind": "gpt2"}                              GPT-2's byte-level BPE, 50,257 ids, through tiktoken
{"kind": "wordpiece", "vocab": "..."}         BERT's uncased WordPiece, with this vocab.txt
{"kind": "llama", "json": "..."}              Llama-2's BPE, 32,000 ids, with this tokenizer.json

Ids are 0..vocab_size-1; the id vocab_size is MASK, which is never encoded and is shown as █.
Text that looks like a special token, [MASK] or <|endoftext|>, is encoded like any other.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common import fail, one_line, progress

MASK_SHOWN = "█"


class Tokenizer(NamedTuple):
    vocab_size: int
    encode: (
        Callable  # text, inside=False -> ids; ValueError, one line, if it cannot express the text
    )
    encode_batch: Callable  # texts, threads -> lists of ids; prefix="" is inside=True for all texts
    decode: Callable  # ids -> text; bytes that are not UTF-8 become U+FFFD
    pieces: Callable  # ids -> list of strings, one per id, for a view of the canvas token by token
    table: list  # the bytes of every id, those of MASK last
    bos: int | None = None  # the id that begins a row, if the vocabulary has one
    eos: int | None = None  # the id that ends a document or a row


def load_tokenizer(spec):
    """The Tokenizer that a spec describes; ValueError, one line, if the kind is unknown."""
    if str(spec.get("kind")) not in KINDS:
        kinds = ", ".join(KINDS)
        raise ValueError(f"unknown kind of tokenizer {spec.get('kind')!r}; there are {kinds}")
    try:
        kind = KINDS[spec["kind"]](spec)
    except ValueError:
        raise
    except Exception as e:  # a spec lacks its vocabulary; the library raises plain Exceptions
        reason = f"{type(e).__name__}: {one_line(e)}"
        raise ValueError(f"a {spec['kind']} tokenizer that cannot be built ({reason})") from None
    table = [*kind["table"], MASK_SHOWN.encode()]  # the bytes of every id
    prefix = kind.get("prefix", "")

    def decode(ids):  # joins bytes before decoding: one character may span several tokens
        return b"".join(table[i] for i in ids).decode(errors="replace").removeprefix(prefix)

    def encode_batch(texts, threads=1, prefix=prefix):
        for text in texts:
            text.encode()  # half a surrogate pair is a ValueError for every kind
        return kind["encode"]([text and prefix + text for text in texts], threads)

    def encode(text, inside=False):  # inside: the text continues another one, e.g. after a hole
        return encode_batch([text], prefix="" if inside else prefix)[0]

    return Tokenizer(
        vocab_size=len(table) - 1,
        encode=encode,
        encode_batch=encode_batch,
        decode=decode,
        pieces=lambda ids: [table[i].decode(errors="replace") for i in ids],
        table=table,
        bos=kind.get("bos"),
        eos=kind.get("eos"),
    )


def tokenizer_of(spec, pieces=None):
    """load_tokenizer for the scripts: an error is one line and exit code 2. pieces: how many ids
    the model has that will be decoded."""
    try:
        tokenizer = load_tokenizer(spec)
    except ValueError as e:
        fail(one_line(e))
    if pieces not in (None, tokenizer.vocab_size):
        fail(f"a tokenizer of {tokenizer.vocab_size} pieces, but the model has {pieces}")
    return tokenizer


# --------------------------------------------------------------------------------------------------
# The kinds: spec -> encode (texts, threads -> lists of ids), table (the bytes of every id) and, if
# there are any, bos, eos and the prefix that encoding adds to a text and decoding removes


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

    model = BPE.from_str(spec["json"])  # without special tokens, so no text can become one
    byte_of, invisible = {}, 0  # byte-level BPE spells each byte as one visible character
    for b in range(256):
        visible = 33 <= b <= 126 or 161 <= b <= 255 and b != 173
        byte_of[chr(b if visible else 256 + invisible)] = b
        invisible += not visible
    spelled = [model.id_to_token(i) for i in range(model.get_vocab_size())]
    table = [bytes(byte_of[c] for c in piece) for piece in spelled]
    end = len(table) if spec.get("eos") else None  # also begins rows, as GPT-2's does
    return dict(
        encode=lambda texts, threads: [model.encode(text).ids for text in texts],
        table=table if end is None else [*table, b"<|endoftext|>"],
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

    def encode(texts, threads):
        if threads > 1:  # encode_ordinary_batch starts threads even for one
            return model.encode_ordinary_batch(texts, num_threads=threads)
        return [model.encode_ordinary(text) for text in texts]

    table = [model.decode_single_token_bytes(i) for i in range(model.n_vocab)]
    return dict(encode=encode, table=table, bos=model.eot_token, eos=model.eot_token)


def wordpiece(spec):
    """Lower case, no accents, words and punctuation apart, then the longest pieces that fit, [UNK]
    if none do. Not reversible: decoding writes a space before every piece that begins a word."""
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
    """Spaces are spelled ▁, and bytes without a piece <0x00> to <0xFF>. ▁ itself becomes a space.

    The prefix makes a word at the start of a text the same piece as elsewhere. Text after a hole or
    a prompt needs inside=True, or it begins with an extra space. Of the file only pieces and merges
    are used, no special tokens, template or truncation: encoding adds no ids, no text is special.
    """
    from tokenizers import Tokenizer as BPE
    from tokenizers import models, normalizers

    try:
        file = json.loads(spec["json"])["model"]
        ids = file["vocab"]
        merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in file["merges"]]
        merges = [m for m in merges if "".join(m) not in LLAMA_PIECES]
        table = sorted(ids, key=ids.get)
        if [ids[piece] for piece in table] != list(range(len(ids))) or LLAMA_PIECES - ids.keys():
            raise ValueError("needs ids from 0 on, for <s>, </s>, <unk> and 256 bytes among others")
        model = BPE(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    except Exception as e:  # the library raises plain Exceptions
        reason = f"{type(e).__name__}: {e}"
        raise ValueError(f"not a tokenizer.json of Llama's form ({reason})") from None
    model.normalizer = normalizers.Replace(" ", "▁")

    def spell(piece):
        byte = re.fullmatch("<0x(..)>", piece)
        return bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode()

    return dict(
        encode=lambda texts, threads: [model.encode(text).ids for text in texts],
        table=[spell(piece) for piece in table],
        prefix=" ",
        bos=ids["<s>"],
        eos=ids["</s>"],
    )


# pieces that no merge may make from text
LLAMA_PIECES = {"<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))}

KINDS = {"char": char, "bpe": bpe, "gpt2": gpt2, "wordpiece": wordpiece, "llama": llama}


# --------------------------------------------------------------------------------------------------
# Specs from files and from the hub

BERT = "google-bert/bert-base-uncased"
BERT_PIECES = 30_522
BERT_VOCAB_SHA256 = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
LLAMA = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"  # Llama-2's tokenizer, open to all


def read_wordpiece(path):
    """The spec in a vocab.txt, or in a tokenizer.json of the tokenizers library."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if text.lstrip().startswith("{"):
            ids = json.loads(text)["model"]["vocab"]
            text = "".join(f"{piece}\n" for piece in sorted(ids, key=ids.get))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: neither a vocab.txt nor a tokenizer.json") from None
    return {"kind": "wordpiece", "vocab": text}


def read_llama(path):
    """The spec in a tokenizer.json; ValueError if it is not of Llama's form."""
    try:
        spec = {"kind": "llama", "json": Path(path).read_text(encoding="utf-8")}
        load_tokenizer(spec)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    return spec


def read_vocabulary(read, path):
    """read(path) for the scripts: an error is one line and exit code 2."""
    try:
        return read(path)
    except (OSError, ValueError) as e:
        fail(one_line(e))


def bert_vocabulary(path=None):
    """The spec of bert-base-uncased's tokenizer, from a file or the hub."""
    path = path or fetch_from_hub(BERT, "vocab.txt")
    spec = read_vocabulary(read_wordpiece, path)
    pieces = spec["vocab"].split("\n")
    if len(pieces) == BERT_PIECES + 1:  # some copies rename unused ids, which no text reaches
        pieces[1:100] = [f"[unused{i}]" for i in range(99)]
        spec["vocab"] = "\n".join(pieces)
    sha256 = hashlib.sha256(spec["vocab"].encode()).hexdigest()
    if sha256 != BERT_VOCAB_SHA256:
        mismatch = f"sha256 is {sha256}, must be {BERT_VOCAB_SHA256}"
        fail(f"{path}: not the vocabulary of {BERT}: {mismatch}")
    return spec


def llama_vocabulary(path=None):
    """The spec of Llama-2's tokenizer, from a file or the hub."""
    return read_vocabulary(read_llama, path or fetch_from_hub(LLAMA, "tokenizer.json"))


def fetch_from_hub(repo, file):
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(repo, file)
    except Exception as e:  # the hub's and httpx' errors have no common base
        fail(f"{repo}: cannot fetch its {file} from the hub ({one_line(e)}); or give --vocab FILE")


# --------------------------------------------------------------------------------------------------
# Training a BPE

LONGEST_WORD = 256  # bytes


def train_bpe(texts, vocab_size):
    """The spec of a byte-level BPE learnt from `texts`: all 256 bytes, then the most useful merges.

    Training time is quadratic in the longest word: minutes for a megabyte of DNA, which is one
    word. So longer words are cut. The vocabulary changes only for texts that have such words."""
    from tokenizers import Tokenizer as BPE
    from tokenizers import decoders, models, pre_tokenizers, trainers

    model = BPE(models.BPE())
    model.decoder = decoders.ByteLevel()
    split_words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cut_words = pre_tokenizers.FixedLength(LONGEST_WORD)
    model.pre_tokenizer = pre_tokenizers.Sequence([split_words, cut_words])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
    )
    run_interruptibly(lambda counted: model.train_from_iterator(counted, trainer), texts)
    model.pre_tokenizer = split_words
    return {"kind": "bpe", "json": model.to_str()}


def run_interruptibly(train, texts):
    """train(texts) in a second thread: the library itself does not react to Ctrl-C."""
    characters, interrupted, errors = 0, False, []

    def count():
        nonlocal characters
        for text in texts:
            if interrupted:
                raise InterruptedError
            characters += len(text)
            yield text

    def run():
        try:
            train(count())
        except BaseException as e:
            errors.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    with progress(desc="training the tokenizer", unit=" characters", unit_scale=True) as bar:
        try:
            while True:  # at least once: a short training shows its end
                thread.join(0.2)
                bar.n = characters
                bar.update(0)
                if not thread.is_alive():
                    break
        except KeyboardInterrupt:
            interrupted = True
            thread.join(2)  # a thread that takes the GIL while the interpreter ends could abort it
            raise
    if errors:
        raise errors[0]
