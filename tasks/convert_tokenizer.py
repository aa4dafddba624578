"""Tokenizers for `tasks.convert`: --tokenizer into a spec of data/tokenizer.py, and a spec into the
two files that transformers.AutoTokenizer reads."""

import json
from pathlib import Path

from common import fail, one_line
from data.corpus import folder_of, read_meta
from data.tokenizer import LLAMA_PIECES, load_tokenizer, read_llama, read_wordpiece, tokenizer_of

MASK_NAMES = "[MASK]", "<mask>", "<|mask|>"  # what tokenizers call MASK

# --------------------------------------------------------------------------------------------------
# --tokenizer


def read_tokenizer(source):
    """(spec, id of a MASK inside the vocabulary or None) of --tokenizer: gpt2, a file, or the
    folder of a prepared corpus."""
    path = Path(source)
    if source == "gpt2":
        spec = {"kind": "gpt2"}
    elif path.is_dir():
        spec = read_meta(f"{path}/")["tokenizer"]
    elif path.is_file():
        try:
            spec = read_file(path)
        except (OSError, ValueError) as e:
            message = one_line(e)
            fail(message if message.startswith(source) else f"{source}: {message}")
    elif (folder_of(source) / "meta.json").is_file():
        spec = read_meta(source)["tokenizer"]
    else:
        fail(f"--tokenizer {source}: not gpt2, a file, or the folder of a prepared corpus")
    ids = {piece: i for i, piece in enumerate(list_pieces(spec))}
    return spec, next((ids[name] for name in MASK_NAMES if name in ids), None)


def list_pieces(spec):
    """The vocabulary in the order of the ids, as the spec spells it; [] for gpt2."""
    if spec["kind"] == "wordpiece":
        return spec["vocab"].removesuffix("\n").split("\n")
    if "json" in spec:
        ids = json.loads(spec["json"])["model"]["vocab"]
        return sorted(ids, key=ids.get)
    return list(spec.get("characters", ""))


def read_file(path):
    """The spec in a vocab.txt or in a tokenizer.json of WordPiece, Llama's or byte-level BPE;
    ValueError if it is neither."""
    text = path.read_text(encoding="utf-8")
    if not text.lstrip().startswith("{"):
        spec = read_wordpiece(path)
        load_tokenizer(spec)
        return spec
    try:
        file = json.loads(text)
        model = file["model"]
        kind = model.get("type", "WordPiece" if "merges" not in model else "BPE")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: not a tokenizer.json of the tokenizers library") from None
    if kind == "WordPiece" and '"lowercase": false' in json.dumps(file.get("normalizer")):
        raise ValueError(f"{path}: cased WordPiece: must be uncased")
    if kind == "WordPiece":
        return read_wordpiece(path)
    if kind == "BPE" and model.get("byte_fallback"):
        return read_llama(path)
    if kind == "BPE" and "ByteLevel" in json.dumps(file.get("pre_tokenizer")):
        return read_byte_level(path, file)
    raise ValueError(f"{path}: model {kind}: must be WordPiece, byte-level BPE or Llama's BPE")


def read_byte_level(path, file):
    """The spec of kind bpe in a tokenizer.json with its added tokens as plain pieces, so that no
    text can turn into one. <|endoftext|> as the last of them is the end of a text."""
    from tokenizers import pre_tokenizers

    if '"add_prefix_space": true' in json.dumps(file["pre_tokenizer"]):
        raise ValueError(f"{path}: add_prefix_space=true: must be false")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    vocab, eos = dict(file["model"]["vocab"]), False
    for token in sorted(file.get("added_tokens") or [], key=lambda token: token["id"]):
        vocab.pop(token["content"], None)
        vocab["".join(piece for piece, _ in spell(token["content"]))] = token["id"]
        eos = token["content"] == "<|endoftext|>" and token["id"] == len(vocab) - 1
    if eos:
        del vocab["<|endoftext|>"]
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(f"{path}: the ids of its pieces must be 0, 1, 2 ...")
    file["model"]["vocab"] = vocab
    file |= dict(added_tokens=[], post_processor=None, truncation=None, padding=None)
    spec = {"kind": "bpe", "json": json.dumps(file, ensure_ascii=False)} | (
        {"eos": True} if eos else {}
    )
    load_tokenizer(spec)
    return spec


# --------------------------------------------------------------------------------------------------
# For transformers: each kind as a tokenizers.Tokenizer that encodes and decodes as the spec does


def build_char(spec):
    """A character outside the vocabulary is an error: there is no piece for it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    fast = Tokenizer(models.WordLevel({c: i for i, c in enumerate(spec["characters"])}))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    fast.decoder = decoders.Fuse()
    return fast


def build_bpe(spec):
    from tokenizers import Tokenizer

    fast = Tokenizer.from_str(spec["json"])
    if spec.get("eos"):
        fast.add_special_tokens(["<|endoftext|>"])
    return fast


def build_gpt2(spec):
    """tiktoken has the pieces in the order of their merges, but not the pairs."""
    import tiktoken
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer_of(spec)  # fails in one line where the vocabulary cannot be fetched
    encoding = tiktoken.get_encoding("gpt2")
    pieces = [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]
    ranks = {piece: i for i, piece in enumerate(pieces)}
    spell, invisible = {}, 0  # byte-level BPE spells each byte as one visible character
    for b in range(256):
        visible = 33 <= b <= 126 or 161 <= b <= 255 and b != 173
        spell[b] = chr(b if visible else 256 + invisible)
        invisible += not visible
    spelled = lambda piece: "".join(spell[b] for b in piece)
    merges = [tuple(map(spelled, halve(piece, ranks))) for piece in pieces if len(piece) > 1]
    fast = Tokenizer(models.BPE({spelled(piece): i for i, piece in enumerate(pieces)}, merges))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<|endoftext|>"])
    return fast


def halve(piece, ranks):
    """The two pieces that were merged into `piece`: merge its bytes, lowest rank first."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def build_wordpiece(spec):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    ids = {piece: i for i, piece in enumerate(list_pieces(spec))}
    fast = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    fast.normalizer = normalizers.BertNormalizer(lowercase=True)
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.decoder = decoders.WordPiece(cleanup=False)
    return fast


def build_llama(spec):
    """Only the start of a text gets Llama's space in front, as with inside=True behind a hole. Two
    steps, because Metaspace adds none to a text that begins with its own replacement."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.pre_tokenizers import Metaspace, Sequence

    file = json.loads(spec["json"])
    merges = [m.split(" ") if isinstance(m, str) else m for m in file["model"]["merges"]]
    file["model"]["merges"] = [m for m in merges if "".join(m) not in LLAMA_PIECES]
    file |= dict(added_tokens=[], normalizer=None, pre_tokenizer=None, post_processor=None)
    fast = Tokenizer.from_str(json.dumps(file | dict(decoder=None, truncation=None, padding=None)))
    fast.normalizer = normalizers.Replace(" ", "▁")
    start, rest = Metaspace(" ", "first", split=False), Metaspace("▁", "never", split=False)
    fast.pre_tokenizer = Sequence([start, rest])
    steps = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
    fast.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return fast


BUILDERS = dict(
    char=build_char, bpe=build_bpe, gpt2=build_gpt2, wordpiece=build_wordpiece, llama=build_llama
)


def free_name(fast, name):
    """`fast` with another spelling for a piece called `name`, so that MASK can have the name."""
    from tokenizers import Tokenizer

    file = json.loads(fast.to_str())
    vocab = file["model"]["vocab"]
    if name not in vocab:
        return fast
    id = vocab.pop(name)
    vocab[f"{name[:-1]} {id}{name[-1]}"] = id  # [MASK 103]
    return Tokenizer.from_str(json.dumps(file))


def write_fast(spec, cfg):
    """({file name: text} of what AutoTokenizer reads, {role: name} of the special tokens).

    [MASK] has the id V. Nothing is added to a text but what the rows of training have: [CLS] and
    [SEP] around WordPieces, and the given first token of bos=True. Where no piece can serve as
    padding, MASK does."""
    from tokenizers import AddedToken, processors

    ours, mask = tokenizer_of(spec), "[MASK]"
    fast = free_name(BUILDERS[spec["kind"]](spec), mask)
    vocab = fast.get_vocab()
    find = lambda *names: next((name for name in names if name in vocab), None)
    bos, eos = (None if id is None else fast.id_to_token(id) for id in (ours.bos, ours.eos))
    names = dict(unk_token=find("[UNK]", "<unk>"), bos_token=bos, eos_token=eos)
    names["pad_token"] = find("[PAD]") or eos or mask
    names = {role: name for role, name in names.items() if name} | {"mask_token": mask}
    absorbs = spec["kind"] in ("bpe", "gpt2", "llama")  # there a space belongs to the next piece
    fast.add_special_tokens([name for name in names.values() if name in vocab])
    fast.add_special_tokens([AddedToken(mask, lstrip=absorbs, normalized=False)])
    if fast.token_to_id(mask) != cfg.mask_id:
        fail(f"tokenizer {spec['kind']}: {ours.vocab_size} pieces, but vocab_size={cfg.vocab_size}")
    framed = spec["kind"] == "wordpiece"
    if framed or cfg.bos and bos:
        template = f"{bos} $A {eos}" if framed else f"{bos} $A"
        tokens = [(bos, ours.bos)] + [(eos, ours.eos)] * framed
        fast.post_processor = processors.TemplateProcessing(template, special_tokens=tokens)
    settings = dict(
        tokenizer_class="PreTrainedTokenizerFast", model_max_length=cfg.seq_len,
        model_input_names=["input_ids", "attention_mask"], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    text = json.dumps(settings | names, indent=1)
    return {"tokenizer.json": fast.to_str(), "tokenizer_config.json": text}, names
