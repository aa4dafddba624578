"""Data sets of documents to train on: OpenWebText, LM1B, SlimPajama; FineWeb tests such models."""

import numpy as np

from common import fail
from data.shards import Recipe, find_shards, refuse_held_out, split_of, tokenize, write_splits
from data.tokenizer import bert_vocabulary, llama_vocabulary, tokenizer_of

OPENWEBTEXT = "Skylion007/openwebtext"
OPENWEBTEXT_DOCS = 8_013_769
LM1B = "billion-word-benchmark/lm1b"
LM1B_SENTENCES = 30_301_028, 306_688  # train, test
SLIMPAJAMA = "DKYoon/SlimPajama-6B"
FINEWEB = "HuggingFaceFW/fineweb"
CONVERTED = "refs/convert/parquet"  # the hub's conversion of data sets that are only a script
EOT, PAD = 50256, 0  # GPT-2's <|endoftext|>, BERT's [PAD]


def check_options(wrap=0, val_docs=1, workers=None, padded=False):
    if wrap < 3 and (wrap or padded):
        fail(f"--wrap={wrap}: must be at least 3: BOS, a token, EOS")
    if val_docs < 1 or workers is not None and workers < 1:
        fail(f"--val_docs={val_docs} --workers={workers}: must be at least 1")


def find_border(val_docs, n, name):
    """The first of the last val_docs of n documents."""
    if n <= val_docs:
        fail(f"{name}: {n:,} documents, too few for --val_docs={val_docs}")
    return n - val_docs


def openwebtext(folder, input=(), column="text", wrap=0, val_docs=100_000, workers=None):
    """OpenWebText in GPT-2's BPE, <|endoftext|> after every document; val is the last documents, as
    in MDLM.

    wrap: cut the stream into rows [BOS] wrap-2 ids [EOS] (MDLM's packing); 0: one stream.
    input: other parquet, .jsonl or .csv files with this column."""
    check_options(wrap=wrap, val_docs=val_docs, workers=workers)
    source, shards = find_shards(input, OPENWEBTEXT, r"data/train-.*\.parquet")
    refuse_held_out(shards, "openwebtext")
    recipe = Recipe({"kind": "gpt2"}, column, after=(EOT,))
    documents = tokenize(folder, shards, recipe, workers, wrap=wrap, val_docs=val_docs)
    n = len(documents.tokens)
    if not input and n != OPENWEBTEXT_DOCS:
        fail(f"{source}: {n:,} documents, but there should be {OPENWEBTEXT_DOCS:,}")
    borders = {"train": (0, find_border(val_docs, n, "openwebtext")), "val": (n - val_docs, n)}
    return write_splits(folder, source, documents, borders, recipe.tokenizer, wrap)


# --------------------------------------------------------------------------------------------------
# lm1b: shuffled sentences of news


def lm1b(folder, input=(), packed=False, wrap=128, val_docs=30_000, vocab=None, workers=None):
    """The One Billion Word benchmark, detokenised, in BERT's uncased WordPiece, as in MDLM.

    Two protocols, whose perplexities do not compare: a row [CLS] sentence [SEP] per sentence, cut
    or padded to wrap ids (MDLM, SEDD), or packed, rows [CLS] wrap-2 ids [SEP] of a stream with
    [SEP] after every sentence (D3PM). val is the last val_docs training sentences; MDLM validates
    on test instead. input: parquet, or the original files news.en-* and news.en.heldout-*; those
    with test or heldout in their names are test (`split_of`).
    vocab: vocab.txt or tokenizer.json of bert-base-uncased; the default is downloaded."""
    check_options(wrap=wrap, val_docs=val_docs, workers=workers, padded=not packed)
    source, shards = find_shards(input, LM1B, r"plain_text/(train|test)/.*\.parquet", CONVERTED)
    test = [shard for shard in shards if split_of(shard) == "test"]
    shards = [shard for shard in shards if shard not in test] + test
    n_train = len(shards) - len(test)
    refuse_held_out(shards[:n_train], "lm1b")
    for split, n in {"train": n_train, "test": len(test)}.items():
        if not n:
            rule = "files named test or heldout are test, the others train"
            fail(f"{source}: no {split} file; {rule}")
    spec = bert_vocabulary(vocab)
    bert = tokenizer_of(spec)
    recipe = Recipe(
        spec, lines="sentence", detokenizer="lm1b", after=(bert.eos,),
        before=() if packed else (bert.bos,), limit=0 if packed else wrap - 2,
    )  # fmt: skip
    documents = tokenize(folder, shards, recipe, workers, wrap=wrap, val_docs=val_docs)
    train, test = sum(documents.counts[:n_train]), sum(documents.counts[n_train:])
    if not input and (train, test) != LM1B_SENTENCES:
        expected = f"{LM1B_SENTENCES[0]:,} + {LM1B_SENTENCES[1]:,}"
        fail(f"{source}: {train:,} + {test:,} sentences, must be {expected}")
    border, pad = find_border(val_docs, train, "lm1b"), None if packed else PAD
    borders = {"train": (0, border), "val": (border, train), "test": (train, train + test)}
    return write_splits(folder, source, documents, borders, spec, wrap, pad)


# --------------------------------------------------------------------------------------------------
# slimpajama and fineweb: SMDM's text to train on, and to test on


def slimpajama(folder, input=(), column="text", val_docs=None, vocab=None, workers=None):
    """SlimPajama without its part from GitHub, in Llama-2's pieces, </s> after every document, as
    in SMDM.

    The hub's is a random hundredth, 6B tokens. input: parquet, .jsonl (.gz, .zst) or .csv files
    with this column, e.g. those of cerebras/SlimPajama-627B, in the splits that `split_of` reads
    from their names. Without validation files, val is the last val_docs documents, by default
    10,000. vocab: Llama-2's tokenizer.json; the default is downloaded."""
    source, shards = find_shards(input, SLIMPAJAMA, r"data/(train|validation|test)-.*\.parquet")
    shards = sort_splits(shards, source)
    if val_docs is not None and "val" in map(split_of, shards):
        fail(f"--val_docs={val_docs}: val is made of the validation files")
    val_docs = 10_000 if val_docs is None else val_docs
    check_options(val_docs=val_docs, workers=workers)
    spec = llama_vocabulary(vocab)
    github = "meta", "redpajama_set_name", "RedPajamaGithub"
    recipe = Recipe(spec, column, after=(tokenizer_of(spec).eos,), skip=github)
    documents = tokenize(folder, shards, recipe, workers, val_docs=val_docs)
    borders = borders_of(shards, documents.counts, "slimpajama", lambda train: val_docs)
    return write_splits(folder, source, documents, borders, spec)


def sort_splits(shards, source):
    """The shards of train, then of val, then of test; their order is otherwise kept."""
    shards = sorted(shards, key=lambda shard: ("train", "val", "test").index(split_of(shard)))
    if split_of(shards[0]) != "train":
        fail(f"{source}: has no file of train; a file's split is that of its name")
    return shards


def borders_of(shards, counts, name, val_docs):
    """{split: (first document, last + 1)} of sorted shards of so many documents; without a file of
    val, it is the last val_docs(n) of the n documents of train."""
    sizes = {}
    for shard, count in zip(shards, counts):
        sizes[split_of(shard)] = sizes.get(split_of(shard), 0) + count
    if "val" not in sizes:
        val = val_docs(sizes["train"])
        train = find_border(val, sizes.pop("train"), name)
        sizes = dict(train=train, val=val) | sizes
    ends = np.cumsum([*sizes.values()]).tolist()
    return {split: (end - sizes[split], end) for split, end in zip(sizes, ends)}


def fineweb(
    folder, input=(), dump="CC-MAIN-2024-10", tokens=100 * 1024 * 2048, vocab=None, workers=None
):
    """The first `tokens` ids of a dump of Common Crawl in FineWeb, in Llama-2's pieces; one split,
    test: text that is newer than a model's training data, as SMDM tests on CC-MAIN-2024-10 and
    CC-MAIN-2024-18.

    As there, every document begins with <s> and none ends with </s>, unlike in the training data.
    Downloads and tokenises no more than these ids need. input: parquet or .jsonl files of the dump,
    in order. To train on FineWeb, give its files to slimpajama: --input FILE... --out NAME."""
    check_options(workers=workers)
    if tokens < 1:
        fail(f"--tokens={tokens}: must be at least 1")
    source, shards = find_shards(input, FINEWEB, r".*\.parquet", under=f"data/{dump}")
    spec = llama_vocabulary(vocab)
    recipe = Recipe(spec, before=(tokenizer_of(spec).bos,), tokens=tokens)
    documents = tokenize(folder, shards, recipe, workers)
    ends = documents.tokens.cumsum(dtype=np.int64)
    if not len(ends) or ends[-1] < tokens:
        fail(f"{source}: {ends[-1] if len(ends) else 0:,} tokens, fewer than --tokens={tokens}")
    borders = {"test": (0, int(np.searchsorted(ends, tokens)) + 1)}
    source += f", {dump}, sha256 " + " ".join(documents.sha256)
    return write_splits(folder, source, documents, borders, spec, tokens=tokens)
