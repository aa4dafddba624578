"""A vocabulary of Llama-2's kind, but of 500 pieces, and the tokenizers library's reading of it."""

import json

from data.tokenizer import load_tokenizer

WORDS = "the cat sat on a mat , naïve façades ; 🐈 and <s> tags </s>\n\n  four    spaces\tand <unk>"
WORDS = [*WORDS.split(" "), "日本"]
DOCS = [
    " ".join(WORDS[(i * j) % len(WORDS)] for j in range(i % 23)) + " end" * (i % 3)
    for i in range(60)
]
DOCS[7] = ""  # an empty document is still a document


def llama_file():
    """(text of a tokenizer.json of Llama-2's form, the library's tokenizer of that file)."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    join = decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), *join])
    # no piece continues into the next word
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, show_progress=False, max_token_length=8
    )
    text = "the cat sat on the mat, the cats and tags    of <s> façades"
    tokenizer.train_from_iterator([text * 3], trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    file = json.loads(tokenizer.to_str())
    file["pre_tokenizer"] = None  # only training needs it
    del file["added_tokens"][3:]  # the pieces of bytes are not special
    return json.dumps(file), Tokenizer.from_str(json.dumps(file))


TEXT, LIBRARY = llama_file()
OURS = load_tokenizer({"kind": "llama", "json": TEXT})


def slow_ids(text):
    """The library's ids; special tokens in a text are ordinary text."""
    LIBRARY.encode_special_tokens = True
    return LIBRARY.encode(text, add_special_tokens=False).ids


def write_parquet(path, texts, meta=None):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"id": [*range(len(texts))], "text": texts} | ({"meta": meta} if meta else {})
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=7)
    return path
