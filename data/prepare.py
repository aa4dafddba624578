"""Prepare a data set: text in, data/<name>/{train,val[,test]}.bin and meta.json out (see corpus.py).

python data/prepare.py pydocs                         # Python's own documentation; nothing is downloaded
python data/prepare.py text8                          # or --input text8.zip
python data/prepare.py openwebtext --wrap 1024        # parquet from the hub, or --input FILE...
python data/prepare.py lm1b                           # a sentence per row, or --packed; WordPiece
python data/prepare.py ptb                            # and the other sets of the zero-shot benchmark, GPT-2's BPE
python data/prepare.py slimpajama                     # likewise; Llama-2's pieces, as in SMDM
python data/prepare.py fineweb --dump CC-MAIN-2024-18 # start of a Common Crawl dump, a newer text to test on
python data/prepare.py gsm8k                          # to fine-tune on: questions, thoughts, answers, in rows
python data/prepare.py sharegpt                       # ... and conversations, see finetune.py
python data/prepare.py text --input a.txt b.txt       # any UTF-8 text; --tokenizer bpe, char or gpt2

A data set is one function; its keyword arguments are the options that apply to it.
"""

import ast
import hashlib
import http.client
import inspect
import os
import platform
import re
import shutil
import sys
import sysconfig
import urllib.request
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # as a script, only data/ is on the path

from common import fail, one_line, parser
from configs import CONFIGS
from data.corpus import dtype_of, finish, folder_of, partial_of  # noqa: E402
from data.finetune import gsm8k, reversal, sharegpt  # noqa: E402
from data.shards import Recipe, find_shards, name_of, tokenize, write_splits
from data.tokenizer import KINDS, read_llama, read_wordpiece, tokenizer_of, train_bpe  # noqa: E402

TEXT8_URL = "http://mattmahoney.net/dc/text8.zip"
TEXT8_CHARACTERS = 100_000_000
OPENWEBTEXT = "Skylion007/openwebtext"
OPENWEBTEXT_DOCS = 8_013_769
LM1B = "billion-word-benchmark/lm1b"
LM1B_SENTENCES = 30_301_028, 306_688  # train, test
BERT = "google-bert/bert-base-uncased"
BERT_PIECES = 30_522
BERT_VOCAB_SHA256 = (
    "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"  # of vocab.txt
)
SLIMPAJAMA = "DKYoon/SlimPajama-6B"
FINEWEB = "HuggingFaceFW/fineweb"
LLAMA = (
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"  # has Llama-2's tokenizer, open to all
)
CONVERTED = "refs/convert/parquet"  # the hub's own conversion of data sets that are only a script
EOT, PAD = 50256, 0  # GPT-2's <|endoftext|>, BERT's [PAD]


def cut(sequence):
    """{split: part}: the first 90 %, the next 5 % and the last 5 %, as text8 is always cut."""
    n = len(sequence)
    a, b = n * 90 // 100, n * 95 // 100
    return {"train": sequence[:a], "val": sequence[a:b], "test": sequence[b:]}


def write_texts(folder, source, spec, splits):
    """Encode and write each split's text; returns meta."""
    tokenizer = tokenizer_of(spec)
    for split, text in splits.items():
        with open(partial_of(folder) / f"{split}.bin", "wb") as f:
            for i in range(
                0, len(text), 2**20
            ):  # in pieces: a list of Python ints takes 36 bytes a token
                np.array(
                    tokenizer.encode(text[i : i + 2**20]), dtype_of(tokenizer.vocab_size)
                ).tofile(f)
    return finish(
        folder, source, spec, tokenizer.vocab_size, {s: len(text) for s, text in splits.items()}
    )


# ---------------------------------------------------------------------------------------------------------
# pydocs: text that every Python has


def pydocs(folder):
    """The language reference that help() shows, and the standard library's longer docstrings."""
    documents = sorted(set(topic_sections()) | set(docstrings()), key=lambda d: (-len(d), d))
    documents = list(without_repeats(documents))
    total = sum(map(len, documents))
    if total < 500_000:
        fail(
            f"{stdlib()}: only {total:,} characters of documentation; is Python's source code installed?"
        )
    # A random order that depends on nothing but the text, then whole documents to the splits.
    documents.sort(key=lambda d: hashlib.sha256(d.encode()).digest())
    ends = np.cumsum([len(d) for d in documents]) / total
    a, b = np.searchsorted(ends, [0.90, 0.95])
    splits = {"train": documents[:a], "val": documents[a:b], "test": documents[b:]}
    spec = train_bpe(splits["train"], 2048)
    source = f"pydoc_data.topics and docstrings of the standard library of Python {platform.python_version()}"
    texts = {split: "".join(d + "\n\n\n" for d in docs) for split, docs in splits.items()}
    return write_texts(folder, source, spec, texts)


def stdlib():
    return Path(sysconfig.get_paths()["stdlib"])


def topic_sections():
    """The topics, cut at their underlined titles: many a topic is a section of a larger one."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return
    for text in topics.values():
        starts = [m.start() for m in re.finditer(r"^\S.*\n([*=~^\"-])\1{3,}$", text, re.MULTILINE)]
        for a, b in zip([0, *starts], [*starts, len(text)]):
            yield text[a:b].strip()


def docstrings():
    """Docstrings of the standard library, read from its source: importing modules has side effects."""
    skip = set(
        "site-packages dist-packages test tests idlelib lib2to3 turtledemo pydoc_data".split()
    )
    paths = []
    for folder, folders, files in os.walk(stdlib()):
        folders[:] = set(folders) - skip  # os.walk then goes no further there
        paths += [Path(folder) / name for name in files if name.endswith(".py")]
    for path in paths:
        try:
            with warnings.catch_warnings(action="ignore"):  # invalid escapes, here and there
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield (ast.get_docstring(node) or "").strip()  # through inspect.cleandoc


def without_repeats(documents, shortest=200, paragraph=80):
    """Drop every long paragraph that was seen before, then what is too short to be worth reading.

    Topics quote each other and docstrings are copied from class to class: without this, about a
    tenth of the validation text is in the training text too."""
    seen = set()
    for document in documents:
        fresh, prose = [], 0
        for text in re.split(r"\n(?:[ \t]*\n)+", document):
            words = " ".join(text.split())
            if len(words) < paragraph or words not in seen:
                fresh.append(text)
                prose += len(words) * (len(words) >= paragraph)
            seen.add(words)
        if prose >= shortest / 2 and len("\n\n".join(fresh)) >= shortest:
            yield "\n\n".join(fresh)


# ---------------------------------------------------------------------------------------------------------
# text8: the first 100 MB of cleaned Wikipedia, 27 characters


def text8(folder, input=None):
    """Matt Mahoney's text8, 90M/5M/5M characters; space is 0, a..z are 1..26 (the ids of nanoDD)."""
    if input and len(input) > 1:
        fail(f"{input[1]}: text8 is made of one file, text8.zip or text8")
    path = Path(input[0]) if input else download(TEXT8_URL, partial_of(folder) / "text8.zip")
    where, text = input[0] if input else TEXT8_URL, path.read_bytes()
    if path.suffix == ".zip" or text.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as z:
                text = z.read("text8")
        except KeyError:
            fail(f"{where}: has no member named text8")
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as e:
            fail(f"{where}: not a zip file, or not all of it ({e})")
    if len(text) != TEXT8_CHARACTERS:
        fail(f"{where}: {len(text):,} characters, but text8 has {TEXT8_CHARACTERS:,}")
    characters = " abcdefghijklmnopqrstuvwxyz"
    table = np.full(256, 255, np.uint16)
    table[list(characters.encode())] = np.arange(27)
    ids = table[np.frombuffer(text, np.uint8)]
    if ids.max() == 255:
        at = int(ids.argmax())
        fail(f"{where}: byte {text[at]} at offset {at}, but text8 has only a..z and space")
    for split, part in cut(ids).items():
        part.tofile(partial_of(folder) / f"{split}.bin")
    (partial_of(folder) / "text8.zip").unlink(missing_ok=True)
    sizes = {split: len(part) for split, part in cut(ids).items()}
    return finish(
        folder, "text8, " + TEXT8_URL, {"kind": "char", "characters": characters}, 27, sizes
    )


def download(url, path):
    try:
        with urllib.request.urlopen(url, timeout=60) as response, open(f"{path}.tmp", "wb") as f:
            size = int(response.headers.get("Content-Length", 0))
            with tqdm(total=size, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
                while block := response.read(2**20):
                    f.write(block)
                    bar.update(len(block))
            if size and f.tell() != size:
                raise OSError(f"the download stopped after {f.tell():,} of {size:,} bytes")
    except (OSError, http.client.HTTPException) as e:
        fail(f"{url}: {one_line(e)}; try again, or give --input FILE")
    os.replace(f"{path}.tmp", path)
    return path


# ---------------------------------------------------------------------------------------------------------
# openwebtext: parquet shards


def openwebtext(folder, input=(), wrap=0, val_docs=100_000, workers=None):
    """OpenWebText in GPT-2 BPE, <|endoftext|> after every document; val is the last documents, as in MDLM.

    Each finished shard stays in the .partial folder, so that a run that was killed can be started again.
    wrap: cut the stream into rows [BOS] wrap-2 ids [EOS] (MDLM's packing) instead of leaving it whole."""
    check(wrap=wrap, val_docs=val_docs, workers=workers)
    source, shards = find_shards(input, OPENWEBTEXT, r"data/train-.*\.parquet")
    recipe = Recipe({"kind": "gpt2"}, after=(EOT,))
    documents = tokenize(folder, shards, recipe, workers, wrap=wrap, val_docs=val_docs)
    n = len(documents.tokens)
    if not input and n != OPENWEBTEXT_DOCS:
        fail(f"{source}: {n:,} documents, but there should be {OPENWEBTEXT_DOCS:,}")
    borders = {"train": (0, last_but(val_docs, n, "openwebtext")), "val": (n - val_docs, n)}
    characters = write_splits(folder, source, documents, borders, recipe.tokenizer, wrap)
    return finish(folder, source, recipe.tokenizer, EOT + 1, characters, wrap)


def check(wrap=0, val_docs=1, workers=None, padded=False):
    if wrap < 3 and (wrap or padded):
        fail(f"--wrap={wrap}: must be at least 3: BOS, a token, EOS")
    if val_docs < 1 or workers is not None and workers < 1:
        fail(f"--val_docs={val_docs} --workers={workers}: must be at least 1")


def last_but(val_docs, n, name):
    if n <= val_docs:
        fail(f"{name}: {n:,} documents, too few for --val_docs={val_docs}")
    return n - val_docs


# ---------------------------------------------------------------------------------------------------------
# lm1b: shuffled sentences of news


def lm1b(folder, input=(), packed=False, wrap=128, val_docs=30_000, vocab=None, workers=None):
    """The One Billion Word benchmark in BERT's uncased WordPiece, detokenised first, as in MDLM.

    Two protocols, whose perplexities do not compare: a row [CLS] sentence [SEP] for every sentence, cut or padded
    to wrap ids (MDLM, SEDD), or packed, rows [CLS] wrap-2 ids [SEP] of a stream with [SEP] after every sentence
    (D3PM). val is the last val_docs training sentences; MDLM validates on test instead.
    input: parquet, or the original files news.en-* and news.en.heldout-*; those named test or heldout are test.
    vocab: vocab.txt or tokenizer.json of bert-base-uncased, otherwise downloaded."""
    check(wrap=wrap, val_docs=val_docs, workers=workers, padded=not packed)
    source, shards = find_shards(input, LM1B, r"plain_text/(train|test)/.*\.parquet", CONVERTED)
    shards.sort(key=is_test)  # train first, both in the order in which they were
    n_train = sum(not is_test(shard) for shard in shards)
    for split, n in {"train": n_train, "test": len(shards) - n_train}.items():
        if not n:
            fail(
                f"{source}: no {split} file; files named test or heldout are test, the others train"
            )
    spec = bert_vocabulary(vocab)
    bert = tokenizer_of(spec)
    recipe = Recipe(
        spec, lines="sentence", detokenizer="lm1b", after=(bert.eos,),
        before=() if packed else (bert.bos,), limit=0 if packed else wrap - 2,
    )  # fmt: skip
    documents = tokenize(folder, shards, recipe, workers, wrap=wrap, val_docs=val_docs)
    train, test = sum(documents.counts[:n_train]), sum(documents.counts[n_train:])
    if not input and (train, test) != LM1B_SENTENCES:
        fail(
            f"{source}: {train:,} + {test:,} sentences, must be {LM1B_SENTENCES[0]:,} + {LM1B_SENTENCES[1]:,}"
        )
    border, pad = last_but(val_docs, train, "lm1b"), None if packed else PAD
    borders = {"train": (0, border), "val": (border, train), "test": (train, train + test)}
    characters = write_splits(folder, source, documents, borders, spec, wrap, pad)
    return finish(folder, source, spec, bert.vocab_size, characters, wrap, pad)


def is_test(shard):
    path = Path(name_of(shard))
    return "test" in path.name or "heldout" in path.name or path.parent.name == "test"


def bert_vocabulary(path=None):
    """The spec of bert-base-uncased's tokenizer, from a file or the hub."""
    path = path or from_hub(BERT, "vocab.txt")
    spec = read_vocabulary(read_wordpiece, path)
    pieces = spec["vocab"].split("\n")
    if (
        len(pieces) == BERT_PIECES + 1
    ):  # some copies name ids that are not in use: no text ever reaches them
        pieces[1:100] = [f"[unused{i}]" for i in range(99)]
        spec["vocab"] = "\n".join(pieces)
    sha256 = hashlib.sha256(spec["vocab"].encode()).hexdigest()
    if sha256 != BERT_VOCAB_SHA256:
        fail(
            f"{path}: not the vocabulary of {BERT}: sha256 is {sha256}, must be {BERT_VOCAB_SHA256}"
        )
    return spec


def from_hub(repo, file):
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(repo, file)
    except Exception as e:  # the hub's and httpx' errors have no common base
        fail(f"{repo}: cannot fetch its {file} from the hub ({one_line(e)}); or give --vocab FILE")


def read_vocabulary(read, path):
    try:
        return read(path)
    except (OSError, ValueError) as e:
        fail(one_line(e))


# ---------------------------------------------------------------------------------------------------------
# The zero-shot benchmark: text of other kinds than what the model was trained on


class ZeroShot(NamedTuple):
    repo: str  # on the hub
    files: str  # a pattern of their names
    documents: int  # that there must be
    column: str = "text"
    detokenizer: str = "none"
    lines: str = "none"  # how plain text is read, where that is how the set was published
    revision: str | None = None
    sha256: str | None = None  # of the only file


PAPERS = dict(column="article", detokenizer="papers", lines="article", revision=CONVERTED)
WIKITEXT = dict(detokenizer="wikitext", lines="wikitext")

# The splits are those that MDLM evaluates. The counts are those of the hub's dataset cards; LAMBADA's sha256 is
# that of OpenAI's lambada_test.jsonl, which this is a copy of. A converted set that is too large for the hub is
# in partial-* folders: its count tells whether a split is complete.
ZERO_SHOT = {
    "ptb": ZeroShot(
        "ptb-text-only/ptb_text_only", r"penn_treebank/validation/.*\.parquet", 3_370,
        column="sentence", detokenizer="ptb", lines="sentence", revision=CONVERTED,
    ),
    "wikitext2": ZeroShot("Salesforce/wikitext", r"wikitext-2-raw-v1/validation-.*\.parquet", 3_760, **WIKITEXT),
    "wikitext103": ZeroShot(
        "Salesforce/wikitext", r"wikitext-103-raw-v1/validation-.*\.parquet", 3_760, **WIKITEXT
    ),
    "lm1b_gpt2": ZeroShot(
        LM1B, r"plain_text/test/.*\.parquet", 306_688,
        detokenizer="lm1b", lines="sentence", revision=CONVERTED,
    ),
    "lambada": ZeroShot(
        "EleutherAI/lambada_openai", r"data/lambada_test\.jsonl", 5_153, detokenizer="lambada",
        sha256="4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
    ),
    "ag_news": ZeroShot("fancyzhx/ag_news", r"data/test-.*\.parquet", 7_600),
    "pubmed": ZeroShot(
        "armanc/scientific_papers", r"pubmed/(partial-)?validation/.*\.parquet", 6_633, **PAPERS
    ),
    "arxiv": ZeroShot(
        "armanc/scientific_papers", r"arxiv/(partial-)?validation/.*\.parquet", 6_436, **PAPERS
    ),
}  # fmt: skip


def zero_shot(name):
    """The function that prepares a row of ZERO_SHOT."""

    def prepare_zero_shot(folder, input=(), wrap=1024, no_eot=False):
        """One split, test: the benchmark's documents in GPT-2 BPE, detokenised, in rows [BOS] wrap-2 ids [EOS].

        Every document (a line of WikiText, an empty one too) ends with <|endoftext|>, as in MDLM's code; no_eot
        leaves that out, as in its paper. The stream is cut once, where MDLM's starts anew every 1000 documents
        and drops the rest. input: parquet, .jsonl, or plain text as first published: ptb.valid.txt,
        wiki.valid.raw, news.en.heldout-*, val.txt of arXiv and PubMed. Of the last two, ccdv/arxiv-summarization
        and ccdv/pubmed-summarization are parquet, too; their white space differs, and so will the numbers."""
        of = ZERO_SHOT[name]
        check(wrap=wrap)
        source, shards = find_shards(input, of.repo, of.files, of.revision)
        if of.sha256 and not input:
            shards = [f"{shard.rpartition(':')[0]}:{of.sha256}" for shard in shards]
        recipe = Recipe(
            {"kind": "gpt2"}, of.column, of.lines, of.detokenizer, after=() if no_eot else (EOT,)
        )
        documents = tokenize(folder, shards, recipe)
        n = len(documents.tokens)
        if not input and n != of.documents:
            fail(f"{source}: {n:,} documents, must be {of.documents:,}")
        source += ", sha256 " + " ".join(documents.sha256)
        characters = write_splits(
            folder, source, documents, {"test": (0, n)}, recipe.tokenizer, wrap
        )
        return finish(folder, source, recipe.tokenizer, EOT + 1, characters, wrap)

    return prepare_zero_shot


# ---------------------------------------------------------------------------------------------------------
# slimpajama and fineweb: SMDM's text to train on, and to test on


def llama_vocabulary(path=None):
    """The spec of Llama-2's tokenizer, from a file or the hub."""
    return read_vocabulary(read_llama, path or from_hub(LLAMA, "tokenizer.json"))


def slimpajama(folder, input=(), val_docs=None, vocab=None, workers=None):
    """SlimPajama but for its part from GitHub, in Llama-2's pieces, </s> after every document, as in SMDM.

    The hub's is a random hundredth, 6B tokens. input: any parquet, .jsonl, .jsonl.gz or .jsonl.zst files with a
    column text, e.g. those of cerebras/SlimPajama-627B; their split is what their name begins with or a folder
    is called, else train. Without validation files, val is the last val_docs documents, by default 10,000.
    vocab: tokenizer.json of Llama-2, otherwise downloaded."""
    source, shards = find_shards(input, SLIMPAJAMA, r"data/(train|validation|test)-.*\.parquet")
    splits = ["train", "val", "test"]
    shards.sort(key=lambda shard: splits.index(split_of(shard)))  # else as they were
    given = {split_of(shard) for shard in shards}
    if "train" not in given:
        fail(f"{source}: has no file of train")
    if "val" in given and val_docs is not None:
        fail(f"--val_docs={val_docs}: val is made of the validation files")
    val_docs = 10_000 if val_docs is None else val_docs
    check(val_docs=val_docs, workers=workers)
    spec = llama_vocabulary(vocab)
    llama = tokenizer_of(spec)
    recipe = Recipe(
        spec, after=(llama.eos,), skip=("meta", "redpajama_set_name", "RedPajamaGithub")
    )
    documents = tokenize(folder, shards, recipe, workers, val_docs=val_docs)
    counts = dict.fromkeys(splits, 0)
    for shard, count in zip(shards, documents.counts):
        counts[split_of(shard)] += count
    if "val" not in given:
        counts |= dict(train=last_but(val_docs, counts["train"], "slimpajama"), val=val_docs)
    ends = np.cumsum([counts[split] for split in splits]).tolist()
    borders = {
        s: (end - counts[s], end) for s, end in zip(splits, ends) if s != "test" or counts[s]
    }
    characters = write_splits(folder, source, documents, borders, spec)
    return finish(folder, source, spec, llama.vocab_size, characters)


def split_of(shard):
    """Of test-00000-of-00001.parquet: test; of validation/chunk1/example_holdout_0.jsonl.zst: val."""
    *folders, file = Path(name_of(shard)).parts[-3:]
    names = dict(train="train", validation="val", valid="val", val="val", test="test")
    found = [names[part] for part in [re.split("[-_.]", file)[0], *folders[::-1]] if part in names]
    return found[0] if found else "train"


def fineweb(
    folder, input=(), dump="CC-MAIN-2024-10", tokens=100 * 1024 * 2048, vocab=None, workers=None
):
    """The first `tokens` ids of a dump of Common Crawl in FineWeb, one split, test, in Llama-2's pieces: text
    from after a model's training data, as SMDM tests on CC-MAIN-2024-10 and CC-MAIN-2024-18.

    As there, every document begins with <s> and none ends with </s>, unlike in the training data. No more is
    downloaded and tokenised than these ids need. input: parquet or .jsonl files of the dump, in order.
    To train on FineWeb, give its files to slimpajama: --input FILE... --out NAME."""
    check(workers=workers)
    if tokens < 1:
        fail(f"--tokens={tokens}: must be at least 1")
    source, shards = find_shards(input, FINEWEB, r".*\.parquet", under=f"data/{dump}")
    spec = llama_vocabulary(vocab)
    llama = tokenizer_of(spec)
    documents = tokenize(folder, shards, Recipe(spec, before=(llama.bos,), tokens=tokens), workers)
    ends = documents.tokens.cumsum(dtype=np.int64)
    if not len(ends) or ends[-1] < tokens:
        fail(f"{source}: {ends[-1] if len(ends) else 0:,} tokens, fewer than --tokens={tokens}")
    borders = {"test": (0, int(np.searchsorted(ends, tokens)) + 1)}
    source += f", {dump}, sha256 " + " ".join(documents.sha256)
    characters = write_splits(folder, source, documents, borders, spec, tokens=tokens)
    return finish(folder, source, spec, llama.vocab_size, characters)


# ---------------------------------------------------------------------------------------------------------
# text: files of your own


TEXT_KINDS = [
    kind for kind in KINDS if kind not in ("wordpiece", "llama")
]  # any text, and no --vocab


def text(folder, input=(), tokenizer="bpe", vocab_size=None):
    """Any UTF-8 files, one after the other, cut by characters."""
    if not input:
        fail("text: needs --input FILE...")
    if tokenizer not in TEXT_KINDS:
        fail(f"--tokenizer={tokenizer}: must be one of {', '.join(TEXT_KINDS)}")
    if vocab_size is not None and (tokenizer != "bpe" or not 256 < vocab_size <= 2**16):
        fail(f"--vocab_size={vocab_size}: only for --tokenizer=bpe, 257 to {2**16}")
    parts = []
    for path in input:
        try:
            part = Path(path).read_bytes().decode().removeprefix("\ufeff")
        except UnicodeDecodeError as e:
            fail(f"{path}: not UTF-8: byte {e.object[e.start]:#04x} at offset {e.start}")
        if not part:
            fail(f"{path}: empty")
        if parts and not parts[-1].endswith("\n"):
            parts.append("\n")
        parts.append(part)
    whole = "".join(parts)
    if len(whole) < 20:
        fail(f"{input[0]}: {len(whole)} characters are too few to cut into train, val and test")
    splits = cut(whole)
    spec = {"kind": tokenizer}
    if tokenizer == "char":
        spec["characters"] = "".join(sorted(set(whole)))
    if tokenizer == "bpe":
        spec = train_bpe(splits["train"].splitlines(keepends=True), vocab_size or 2048)
    return write_texts(folder, ", ".join(Path(p).name for p in input), spec, splits)


# ---------------------------------------------------------------------------------------------------------

DATASETS = {
    "pydocs": pydocs, "text8": text8, "openwebtext": openwebtext, "lm1b": lm1b,
    **{name: zero_shot(name) for name in ZERO_SHOT},
    "slimpajama": slimpajama, "fineweb": fineweb,
    "gsm8k": gsm8k, "sharegpt": sharegpt, "reversal": reversal, "text": text,
}  # fmt: skip


DUMP = r"CC-MAIN-\d{4}-\d\d"
EXAMPLES = {
    "gpt2": "owt_mdlm",
    "llama": "smdm_170",
}  # kind of tokenizer: the config to name to the user


def options_of(name):
    """{option: default} of a data set."""
    parameters = list(inspect.signature(DATASETS[name]).parameters.values())[
        1:
    ]  # without the folder
    return {p.name: p.default for p in parameters}


def default_folder(name, packed=False, no_eot=False, wrap=None, dump=None, **options):
    """Where it goes: name[_<dump>][_packed][_no_eot][_wrap<n>], of the others what is not the default."""
    dump = dump or options_of(name).get("dump")
    if dump and not re.fullmatch(DUMP, dump):
        fail(f"--dump={dump}: must be named like CC-MAIN-2024-10")
    other = wrap is not None and wrap != options_of(name).get("wrap")
    name += f"_{dump}" if dump else ""
    return (
        name
        + "_packed" * bool(packed)
        + "_no_eot" * bool(no_eot)
        + (f"_wrap{wrap}" if other else "")
    )


def options_for(folder):
    """The other way: the command line that makes a folder of this name, or None."""
    names = "|".join(DATASETS)
    found = re.fullmatch(rf"({names})(?:_({DUMP}))?(_packed)?(_no_eot)?(?:_wrap(\d+))?", folder)
    name, *values = found.groups() if found else ("text",)
    given = dict(zip(("dump", "packed", "no_eot", "wrap"), values))
    if name == "text" or any(value and key not in options_of(name) for key, value in given.items()):
        return None
    given["wrap"] = given["wrap"] and int(given["wrap"])
    if default_folder(name, **given) != folder:
        return None
    with_value = "".join(f" --{key} {given[key]}" for key in ("dump", "wrap") if given[key])
    return (
        name
        + " --packed" * bool(given["packed"])
        + " --no_eot" * bool(given["no_eot"])
        + with_value
    )


def prepare(name, out=None, overwrite=False, **options):
    """Make data/<name>, or the folder `out`; returns its meta. Whatever is wrong with the input is one line,
    exit code 2, and the folder as it was."""
    if name not in DATASETS:
        fail(f"unknown data set {name!r}; there are {', '.join(DATASETS)}")
    allowed = [*options_of(name), "out", "overwrite"]
    for option in options:
        if option not in allowed:
            fail(f"--{option} does not apply to {name}; its options are --{' --'.join(allowed)}")
    default = default_folder(name, **options)
    folder = folder_of(out or default)
    if folder.exists() and not overwrite:
        fail(f"{folder}: exists; --overwrite replaces it")
    if folder.exists() and not (folder / "meta.json").exists():
        fail(f"{folder}: exists and is not a prepared data set; remove it yourself if you mean it")
    partial, resumable = (
        partial_of(folder),
        "workers" in allowed,
    )  # what is worth sharing out takes long
    try:
        if not resumable:
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)
        meta = DATASETS[name](folder, **options)
    except BaseException as e:
        if not resumable or not any(partial.glob("shards/*.bin")):  # nothing to resume
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(e, OSError):
            fail(one_line(e))
        raise
    shutil.rmtree(
        folder / "shards", ignore_errors=True
    )  # only now: everything before this can be resumed
    return meta


def announce(meta, name, out=None, **options):
    """Print what was made and the command that trains on it or, where there is nothing to train on, evaluates."""
    for split, of in meta["splits"].items():
        print(f"{split:5} {of['tokens']:14,} tokens {of['characters']:16,} characters")
    data, example = out or meta["name"], EXAMPLES.get(meta["tokenizer"]["kind"])
    if "train" not in meta["splits"]:
        print(f"now evaluate a model on it: python evaluate.py out/{example}/ckpt.pt --data={data}")
        return
    folder = default_folder(name, **options)

    def nearness(
        config,
    ):  # made for this folder, for one like it, for the same text in another form
        made_for = CONFIGS[config]().data
        same_text = made_for.partition("_")[0] == name
        alike = same_text and ("_wrap" in made_for) == ("_wrap" in folder)
        return (
            made_for == folder,
            alike,
            same_text,
            (same_text or meta["given"]) and config == example,
        )

    config = max(CONFIGS, key=nearness)
    cfg, command = CONFIGS[config](), f"python train.py {config}"
    for field, value in dict(
        data=data, vocab_size=meta["vocab_size"], seq_len=meta["wrap"]
    ).items():
        if value and value != getattr(cfg, field):
            command += f" --{field}={value}"
    if meta["given"]:
        command += " --bos=True" * (not cfg.bos) + f" --init_from=out/{example}/ckpt.pt" * bool(
            example
        )
    if name == "text":  # the demo's recipe, but not the demo's run
        command += f" --out_dir=out/{meta['name']}"
    print(f"now train on it: {command}")


def main(argv=None):
    p = parser(__doc__)
    p.add_argument("name", help=", ".join(DATASETS))
    p.add_argument(
        "--input", nargs="+", metavar="FILE", help="read these files instead of downloading"
    )
    p.add_argument(
        "--out", help="folder: a bare name is under data/, anything with a slash is a path"
    )
    p.add_argument(
        "--tokenizer",
        help=f"text: {', '.join(TEXT_KINDS)} [bpe]; gsm8k, sharegpt, reversal: bpe, gpt2, llama [llama]",
    )
    p.add_argument("--vocab_size", type=int, help="bpe: number of ids; default 2048")
    p.add_argument(
        "--vocab", metavar="FILE", help="BERT's or Llama-2's tokenizer.json, otherwise downloaded"
    )
    p.add_argument("--dump", help="fineweb: default CC-MAIN-2024-10")
    p.add_argument("--tokens", type=int, help="fineweb: size of test; default 209715200")
    p.add_argument(
        "--packed", action="store_true", default=None, help="lm1b: rows of many sentences"
    )
    p.add_argument("--wrap", type=int, help="rows of this length; openwebtext: default 0, uncut")
    p.add_argument(
        "--no_eot", action="store_true", default=None, help="zero-shot sets: no EOT after documents"
    )
    p.add_argument(
        "--train_padding", action="store_true", default=None,
        help="gsm8k, sharegpt, reversal: train the EOS that fill rows up",
    )  # fmt: skip
    p.add_argument(
        "--first_turn", action="store_true", default=None, help="sharegpt: not the later turns"
    )
    p.add_argument("--val_docs", type=int, help="openwebtext, lm1b, slimpajama: size of val")
    p.add_argument(
        "--workers", type=int, help="all but the small sets: processes; default one per core"
    )
    p.add_argument(
        "--overwrite", action="store_true", help="replace the folder once the new one is complete"
    )
    given = {k: v for k, v in vars(p.parse_args(argv)).items() if v is not None}
    announce(prepare(**given), **given)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
