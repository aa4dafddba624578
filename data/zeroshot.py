"""The zero-shot benchmark: other kinds of text than a model was trained on, in GPT-2's BPE."""

import re
from typing import NamedTuple

from common import fail
from data.pretrain import CONVERTED, EOT, LM1B, borders_of, check_options, sort_splits
from data.shards import Recipe, find_shards, tokenize, write_splits


class ZeroShot(NamedTuple):
    repo: str  # on the hub
    files: str  # a pattern of their names
    documents: int  # the number that there must be
    column: str = "text"
    detokenizer: str = "none"
    lines: str = "none"  # how plain text is read, if the set was published so
    revision: str | None = None
    sha256: str | None = None  # of the only file


PAPERS = dict(column="article", detokenizer="papers", lines="article", revision=CONVERTED)
WIKITEXT = dict(detokenizer="wikitext", lines="wikitext")

# The splits that MDLM evaluates. The counts are those of the hub's dataset cards; LAMBADA's sha256
# is that of OpenAI's lambada_test.jsonl, which the hub copies. Large converted sets lie in folders
# named partial-*: their counts tell whether a split is complete.
ZERO_SHOT = {
    "ptb": ZeroShot(
        "ptb-text-only/ptb_text_only", r"penn_treebank/validation/.*\.parquet", 3_370,
        column="sentence", detokenizer="ptb", lines="sentence", revision=CONVERTED,
    ),
    "wikitext2": ZeroShot(
        "Salesforce/wikitext", r"wikitext-2-raw-v1/validation-.*\.parquet", 3_760, **WIKITEXT
    ),
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

    def prepare_zero_shot(folder, input=(), wrap=1024, no_eot=False, train=False):
        """One split, test: detokenised documents in GPT-2's BPE, in rows [BOS] wrap-2 ids [EOS].

        <|endoftext|> ends every document (each line of WikiText, even an empty one), as in MDLM's
        code; no_eot leaves it out, as in its paper. The stream is cut once; MDLM begins a new one
        every 1000 documents and drops the rest. input: parquet, .jsonl, or plain text as first
        published: ptb.valid.txt, wiki.valid.raw, news.en.heldout-*, val.txt of arXiv and PubMed.
        Parquet of ccdv/arxiv-summarization and ccdv/pubmed-summarization also works; their white
        space differs, and so will the numbers.

        train: the published splits train, val and test, to train on; a file's split is that of its
        name (`split_of`). A set without val, such as AG News, gets the last 5 % of train."""
        row = ZERO_SHOT[name]
        check_options(wrap=wrap)
        files = re.sub("validation|test", "(train|validation|test)", row.files)
        source, shards = find_shards(input, row.repo, files if train else row.files, row.revision)
        if row.sha256 and not input:
            shards = [f"{shard.rpartition(':')[0]}:{row.sha256}" for shard in shards]
        shards = sort_splits(shards, source) if train else shards
        after = () if no_eot else (EOT,)
        recipe = Recipe({"kind": "gpt2"}, row.column, row.lines, row.detokenizer, after=after)
        documents = tokenize(folder, shards, recipe)
        n = len(documents.tokens)
        borders = {"test": (0, n)}
        if train:
            borders = borders_of(shards, documents.counts, name, lambda train: max(1, train // 20))
        if not input and not train and n != row.documents:
            fail(f"{source}: {n:,} documents, must be {row.documents:,}")
        source += ", sha256 " + " ".join(documents.sha256)
        return write_splits(folder, source, documents, borders, recipe.tokenizer, wrap)

    return prepare_zero_shot
