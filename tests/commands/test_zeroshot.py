"""LM1B and the zero-shot sets: WordPiece, the detokenisers and the prepared ids, each against a
slow and obvious reference or against what MDLM's own code returned; what is wrong with the input is
one line and exit code 2."""

import hashlib
import json
import os
import random
import subprocess
import sys
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, TRICKY, make, needs_gpt2

import data.prepare as prepare
from configs import Config
from data.corpus import finish, partial_of, read_meta, read_split, training_rows, unpack
from data.detokenize import DETOKENIZERS
from data.readers import LINES
from data.shards import Documents, write_padded
from data.tokenizer import BERT_VOCAB_SHA256, bert_vocabulary, load_tokenizer, read_wordpiece

BERT = ROOT.parent / "shared" / "data" / "tokenizers" / "bert-base-uncased" / "tokenizer.json"
needs_bert = pytest.mark.skipif(not BERT.exists(), reason=f"no WordPiece vocabulary at {BERT}")


def write_parquet(path, texts, column="text"):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({column: texts, "label": [0] * len(texts)})
    pyarrow.parquet.write_table(table, path, row_group_size=5)
    return path


# --------------------------------------------------------------------------------------------------
# Detokenisers

# fmt: off
DETOKENISED = {
    'wikitext': [
        ('', ''),
        (' = Robert Boulter = \n', ' = Robert Boulter =\n'),
        (' = = Career = = \n', ' == Career ==\n'),
        (' = = = 2000 – 2005 = = = \n', ' === 2000 – 2005 ===\n'),
        (' = = = = Deep = = = = \n', ' ==== Deep ====\n'),
        (' It cost 1 @,@ 234 @.@ 5 dollars , a well @-@ known sum ; see : " the note " ( or [ this ] { here } ) . Really ? Yes ! \n', ' It cost 1,234.5 dollars, a well-known sum; see: "the note" (or [this] {here}). Really? Yes!\n'),
        (" the dogs ' tails and the cat 's ear , 'tis said \n", " the dogs'tails and the cat's ear, 'tis said\n"),
        (' at 20 ° C \n and N more \n next', ' at 20°C\nand 1 more\nnext'),
        (" he said ' so ' . . . ' and N N left \n", " he said'so'. .. ' and 1 N left\n"),
        (' ( ) "  " [ a\nb ] ( ( nested ) ) \n', ' () "" [a\nb] (( nested) )\n'),
        (' a , b , , c ; ; d \n', ' a, b, , c; ; d\n'),
    ],
    'ptb': [
        ("no it was n't black monday", "no it wasn't black monday"),
        ("the company 's shares rose N N to $ N million from $ N million", "the company's shares rose 1 1 to $1 million from $1 million"),
        ('N N N and N N', 'N 1 1 and 1 N'),
        ('mr. <unk> is chairman of <unk> n.v. the dutch publishing group', 'mr. ? is chairman of ? n.v. the dutch publishing group'),
        ("all officers ' pay \\/ perks and the # N note", "all officers' pay / perks and the #1 note"),
        ('a \n b N \n c', 'a\nb N\nc'),
        ("<unk> 's", "?'s"),
        ('N at the ends N', 'N at the ends N'),
        ("do n't and ca n't", "don't and can't"),
        ("he 's the brothers ' keeper's ", "he's the brothers' keeper's "),
    ],
    'lm1b': [
        ('The U.S. Centers for Disease Control and Prevention initially advised school systems to close if outbreaks occurred , then reversed itself .', 'The U.S. Centers for Disease Control and Prevention initially advised school systems to close if outbreaks occurred, then reversed itself.'),
        ('" Scrap the plan , " he said : " it is n\'t ours . "', '"Scrap the plan," he said: "it is n\'t ours."'),
        ("It 's the players ' choice ( or [ theirs ] ) - $ 5 or £ 3 / day ; why ? Because !", "It's the players ' choice (or [theirs]) - $5 or £3/day; why? Because!"),
        ('What ?', 'What?'),
        ('No !', 'No!'),
        ('See http : / / www.example.com / a and https : / / b.c . It works .', 'See http://www.example.com/a and https://b.c . It works.'),
        ('x . y . z . w .', 'x . y. z . w.'),
        ('A ? ? B ! ! C , , D . . . E', 'A? ? B! ! C, , D. . . E'),
        ('\'\' quoted \'\' and \' single \' and " a " b " c "', '\'\'quoted\'\'and\' single \' and "a" b "c"'),
        ('end .\n', 'end .\n'),
        ('( a ( b ) c ) [ d ] ( )', '( a (b) c ) [d] ( )'),
        ('Dr . Who . 5 . 6 % .', 'Dr . Who. 5 . 6 % .'),
    ],
    'lambada': [
        ('  “Yes,” he said, “it’s ‘fine’.”\n', '\n"Yes," he said, "it’s ‘fine’."'),
        ('\n \n', '\n'),
        ('plain text', '\nplain text'),
        (' two\nlines \t', '\ntwo\nlines'),
    ],
    'papers': [
        (' " the leptonic decay xmath0 , via ( eq . [ 1 ] ) is rare . \n see http : / / a.b / c , it \'s @xmath1 @-@ like .\nwe pay $ 5 ; fine ?', ' " the leptonic decay xmath0, via (eq. [1]) is rare.\nsee http:// a.b/c, it\'s @xmath1-like .\nwe pay $5; fine?'),
        ('approximately , one - third of patients with symptomatic vte manifests pe , whereas two - thirds manifest dvt alone .\nboth dvt and pe can be clinically silent ( asymptomatic ) .', 'approximately, one - third of patients with symptomatic vte manifests pe, whereas two - thirds manifest dvt alone .\nboth dvt and pe can be clinically silent (asymptomatic) .'),
        ("= = intro = = \n N of 's ' x ' and the authors ' view ! ", "== intro ==\nN of's' x'and the authors' view! "),
    ],
}
# fmt: on


@pytest.mark.parametrize("name", DETOKENISED)
def test_detokenisers_do_what_upstreams_do(name):
    """Inputs and what the functions of kuleshov-group/mdlm's dataloader.py (commit c112c52)
    returned for them."""
    for text, expected in DETOKENISED[name]:
        assert DETOKENIZERS[name](text) == expected


# --------------------------------------------------------------------------------------------------
# WordPiece

PIECES = "[PAD] [unused0] [UNK] [CLS] [SEP] [MASK] the cat cats ##s ##at un ##happiness we ' . , ! ? & $ 中 [ ]"
PIECES = [
    *PIECES.split(),
    *"abcdefghijklmnopqrstuvwxyz",
    *(f"##{c}" for c in "abcdefghijklmnopqrtuvwxy"),
]
SPEC = {"kind": "wordpiece", "vocab": "".join(f"{piece}\n" for piece in PIECES)}
SENTENCES = [
    "The cat sat , the cats sat .", "We were n't UNHAPPY !", "naïve café", "unhappiness zz", "[MASK] [SEP] the [PAD]",
    "", "   ", "中the中", "x" * 100, "x" * 101, "\t a\u200b\x00b\ufffd ", "It 's $ 5 & up ?", "ünhäppyiness",
]  # fmt: skip


def slow_wordpiece(text, pieces=PIECES):
    """Lower case without accents, split at spaces, punctuation and Chinese, then the longest pieces
    that fit."""
    text = "".join(
        c
        for c in text
        if c in "\t\n\r" or c not in "\0\ufffd" and unicodedata.category(c)[0] != "C"
    )
    text = "".join(
        c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn"
    )
    apart = lambda c: (
        "\u4e00" <= c <= "\u9fff" or unicodedata.category(c)[0] == "P" or c in "$+<=>^`|~"
    )
    ids = []
    for word in "".join(f" {c} " if apart(c) else c for c in text).split():
        found, rest = [], word
        while rest and len(word) <= 100:
            prefix = "##" if found else ""
            fits = [n for n in range(1, len(rest) + 1) if prefix + rest[:n] in pieces]
            if not fits:
                break
            found.append(pieces.index(prefix + rest[: fits[-1]]))
            rest = rest[fits[-1] :]
        ids += [pieces.index("[UNK]")] if rest else found
    return ids


def test_wordpiece_equals_the_slow_one():
    tokenizer = load_tokenizer(SPEC)
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (len(PIECES), 3, 4)
    rng = random.Random(0)
    texts = SENTENCES + ["".join(rng.choices("the cats ,.'é中z", k=30)) for _ in range(50)]
    for text in texts:
        assert tokenizer.encode(text) == slow_wordpiece(text), text
    assert tokenizer.encode_batch(texts) == [slow_wordpiece(text) for text in texts]
    special = {PIECES.index(p) for p in ("[PAD]", "[unused0]", "[CLS]", "[SEP]", "[MASK]")}
    assert not special & {i for text in (*texts, *PIECES) for i in tokenizer.encode(text)}


def test_wordpiece_decodes_to_words():
    tokenizer = load_tokenizer(SPEC)
    ids = [tokenizer.bos, *tokenizer.encode("The cats, unhappiness"), tokenizer.eos, len(PIECES)]
    assert tokenizer.decode(ids) == "[CLS] the cats , unhappiness [SEP]█"
    assert tokenizer.pieces(ids) == [
        " [CLS]", " the", " cats", " ,", " un", "happiness", " [SEP]", "█"
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer.encode("we were")) == "we were"
    with pytest.raises(ValueError, match="^[^\n]+$"):
        tokenizer.encode("\ud800")


def test_wordpiece_files(tmp_path):
    """A vocab.txt and a tokenizer.json of the same pieces are one spec; whatever else is one
    line."""
    (tmp_path / "vocab.txt").write_text(SPEC["vocab"])
    shuffled = random.Random(1).sample(list(enumerate(PIECES)), len(PIECES))
    as_json = {"model": {"type": "WordPiece", "vocab": {piece: i for i, piece in shuffled}}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(as_json))
    assert (
        read_wordpiece(tmp_path / "vocab.txt")
        == read_wordpiece(tmp_path / "tokenizer.json")
        == SPEC
    )
    for text in ("{", "{}", '{"model": {"vocab": ["a"]}}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="bad.json: neither"):
            read_wordpiece(tmp_path / "bad.json")
    with pytest.raises(ValueError, match=r"has no \[CLS\], \[PAD\]"):
        load_tokenizer({"kind": "wordpiece", "vocab": "[UNK]\n[SEP]\na"})
    with pytest.raises(ValueError, match="appear twice"):
        load_tokenizer({"kind": "wordpiece", "vocab": SPEC["vocab"] + "cat\n"})


@needs_bert
def test_wordpiece_equals_the_original():
    from tokenizers import Tokenizer

    original, tokenizer = Tokenizer.from_file(str(BERT)), load_tokenizer(read_wordpiece(BERT))
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (30522, 101, 102)
    ordinary = [t for t in TRICKY if "[MASK]" not in t]
    rng = random.Random(3)
    texts = [
        *SENTENCES[:4],
        *SENTENCES[5:],
        *ordinary,
        "Don't: co-operate? (1,234.5%) #hashtag @user a_b/c\\d ~$5",
    ]
    texts += [
        "İstanbul ΑΣ ß ﬁ Ⅷ ½ x² 東京 ひらがな 한국어 عربى हिन्दी ไทย",
        "supercalifragilistic" * 6,
        "e\u0301\u0327",
    ]
    texts += [rng.randbytes(200).decode("latin-1") for _ in range(50)]
    texts += ["".join(chr(rng.randrange(0x20, 0x3000)) for _ in range(100)) for _ in range(50)]
    for text in texts:
        text = text.replace("[", "(")
        assert tokenizer.encode(text) == original.encode(text, add_special_tokens=False).ids, text
    # Only what looks special differs, which MDLM lets the text decide.
    assert original.encode("[MASK]", add_special_tokens=False).ids == [103]
    assert tokenizer.pieces(tokenizer.encode("[MASK]")) == [" [", " mask", " ]"]


@needs_bert
def test_the_vocabulary_that_is_asked_for_is_berts(refused, tmp_path):
    """This copy of tokenizer.json has other names for ids 1 to 19, which no text makes; BERT's are
    put back."""
    copy, spec = read_wordpiece(BERT), bert_vocabulary(BERT)
    assert hashlib.sha256(spec["vocab"].encode()).hexdigest() == BERT_VOCAB_SHA256
    differ = [
        i
        for i, (a, b) in enumerate(zip(copy["vocab"].split("\n"), spec["vocab"].split("\n")))
        if a != b
    ]
    assert differ == list(range(1, 20))
    (tmp_path / "vocab.txt").write_text(spec["vocab"].replace("\nhello\n", "\nhallo2\n"))
    refused(lambda: bert_vocabulary(tmp_path / "vocab.txt"), "not the vocabulary of google-bert")


# --------------------------------------------------------------------------------------------------
# LM1B

LM1B = (
    SENTENCES[:5]
    + [f"the cat {i} is as unhappy as the {'cats ' * (i % 9)}!" for i in range(20)]
    + ["a ? b ."]
)


@pytest.fixture
def vocab(tmp_path, monkeypatch):
    """vocab.txt of the small vocabulary, which is accepted in place of BERT's."""
    monkeypatch.setattr(
        "data.tokenizer.BERT_VOCAB_SHA256", hashlib.sha256(SPEC["vocab"].encode()).hexdigest()
    )
    (tmp_path / "vocab.txt").write_text(SPEC["vocab"])
    return tmp_path / "vocab.txt"


@pytest.fixture
def sentences(tmp_path):
    """Files in both of the real formats: 20 sentences to train on, 6 to test."""
    (tmp_path / "news.en-00001-of-00100").write_text("".join(f"{s}\n" for s in LM1B[:12]))
    (tmp_path / "blob").write_text("".join(f"{s}\n" for s in LM1B[20:23]))  # as in the hub's cache
    (tmp_path / "news.en.heldout-00000-of-00050").symlink_to("blob")
    return [
        tmp_path / "news.en.heldout-00000-of-00050", write_parquet(tmp_path / "train" / "0000.parquet", LM1B[12:20]),
        tmp_path / "news.en-00001-of-00100", write_parquet(tmp_path / "test" / "0000.parquet", LM1B[23:]),
    ]  # fmt: skip


LM1B_SPLITS = {
    "train": (LM1B[12:20] + LM1B[:12])[:15],
    "val": (LM1B[12:20] + LM1B[:12])[15:],
    "test": LM1B[20:],
}


def clean(sentence):
    return DETOKENIZERS["lm1b"](sentence.strip())


def test_lm1b_padded(tmp_path, vocab, sentences, capsys):
    L, options = 12, ["--val_docs", 5, "--vocab", vocab, "--wrap", 12, "--workers", 2]
    meta, ids = make("lm1b", "--input", *sentences, *options, "--out", tmp_path / "lm1b")
    assert (meta["wrap"], meta["pad"], meta["vocab_size"], meta["tokenizer"]) == (
        L,
        0,
        len(PIECES),
        SPEC,
    )
    some_cut = 0
    for split, texts in LM1B_SPLITS.items():
        expected, characters = [], 0
        for text in map(clean, texts):
            whole = slow_wordpiece(text)
            some_cut += len(whole) > L - 2
            row = [3, *whole[: L - 2], 4]
            expected.append(row + [0] * (L - len(row)))
            characters += len(text) if len(whole) <= L - 2 else len(text) * (L - 2) // len(whole)
        assert ids[split].reshape(-1, L).tolist() == expected
        of = meta["splits"][split]
        assert of["characters"] == characters and of["tokens"] == len(expected) * L
        assert of["padding"] == sum(row.count(0) for row in expected)
    assert some_cut > 3
    command = f" --data={tmp_path}/lm1b --seq_len=12 --out_dir=out/lm1b\n"
    assert command in capsys.readouterr().out

    # What train.py reads: whole rows in random order, nothing maskable but text and its ends.
    cfg = Config(data=str(tmp_path / "lm1b"), vocab_size=len(PIECES), seq_len=L)
    rows = training_rows(*read_split(cfg.data, "train", cfg), cfg, range(15))
    assert sorted(rows.tolist()) == sorted(ids["train"].reshape(-1, L).tolist())
    maskable = unpack(torch.from_numpy(rows), meta, cfg)[2]
    assert (maskable.numpy() == (rows != 0)).all() and not maskable.all()
    maskable = unpack(torch.from_numpy(rows), meta, replace(cfg, bos=True))[2]
    assert not maskable[:, 0].any() and (maskable[:, 1:].numpy() == (rows != 0)[:, 1:]).all()


def test_rows_are_padded_in_several_pieces(tmp_path):
    rng, files = np.random.default_rng(0), [tmp_path / "a", tmp_path / "b"]
    tokens = rng.integers(1, 9, 20)
    ids = rng.integers(1, 99, tokens.sum()).astype(np.uint16)
    ids[:31].tofile(files[0])
    ids[31:].tofile(files[1])
    documents = Documents(files, ids.dtype, tokens, tokens, [20], [], [])
    for rows in (3, 100):
        write_padded(tmp_path / "out", documents, 2, 19, 8, 0, rows)
        ends = np.cumsum(tokens)
        expected = [ids[end - n : end].tolist() + [0] * (8 - n) for n, end in zip(tokens, ends)][
            2:19
        ]
        assert np.fromfile(tmp_path / "out", np.uint16).reshape(-1, 8).tolist() == expected


def test_lm1b_packed(tmp_path, vocab, sentences):
    options = ["--val_docs", 5, "--vocab", vocab, "--wrap", 16, "--packed"]
    meta, ids = make("lm1b", "--input", *sentences, *options, "--out", tmp_path / "packed")
    assert (meta["wrap"], meta["pad"]) == (16, None) and "padding" not in meta["splits"]["test"]
    for split, texts in LM1B_SPLITS.items():
        stream = [i for text in texts for i in (*slow_wordpiece(clean(text)), 4)]
        n = len(stream) // 14
        assert ids[split].reshape(-1, 16).tolist() == [
            [3, *stream[i * 14 : i * 14 + 14], 4] for i in range(n)
        ]
        left = sum(len(clean(text)) for text in texts) - meta["splits"][split]["characters"]
        assert 0 <= left <= len(load_tokenizer(SPEC).decode(stream[n * 14 :]))


@needs_bert
def test_lm1b_with_the_real_vocabulary(tmp_path):
    news = [
        " Mr. Smith 's company , based in New York , said $ 5 million ( £ 3m ) was lost . ",
        "Why ?",
        "Naïve ! " * 70,
    ]
    (tmp_path / "news.en-1").write_text("".join(f"{s}\n" for s in news))
    (tmp_path / "heldout").write_text(f"{news[1]}\n")
    inputs = [
        "--input",
        tmp_path / "news.en-1",
        tmp_path / "heldout",
        "--vocab",
        BERT,
        "--val_docs",
        1,
    ]
    meta, ids = make("lm1b", *inputs, "--out", tmp_path / "a")
    from tokenizers import Tokenizer

    original = Tokenizer.from_file(
        str(BERT)
    )  # what MDLM's tokenizer runs, with max_length 128 and padding to it
    original.enable_truncation(128)
    original.enable_padding(length=128)
    expected = [original.encode(clean(text)).ids for text in news]
    assert [*ids["train"].reshape(-1, 128).tolist(), ids["val"].tolist()] == expected
    assert ids["test"].tolist() == expected[1]
    assert load_tokenizer(meta["tokenizer"]).decode(expected[1][:4]) == "[CLS] why ? [SEP]"


def test_lm1b_bad_input(tmp_path, vocab, sentences, refuses, refused):
    heldout, _, train, _ = sentences
    run = ["lm1b", "--vocab", vocab, "--val_docs", 5, "--input"]
    refuses([*run, train], "no test file", "test or heldout")
    refuses([*run, heldout], "no train file")
    refuses([*run, train, tmp_path / "gone"], "gone: no such file")
    for options, words in [
        (["--wrap", 2], "--wrap=2: must be at least 3"), (["--wrap", 0], "--wrap=0: must be at least 3"),
        (["--wrap", -1, "--packed"], "--wrap=-1"), (["--val_docs", 0], "--val_docs=0"), (["--workers", 0], "--workers=0"),
        (["--vocab", tmp_path / "no.txt"], "no.txt: No such file"), (["--vocab", train], "not the vocabulary of"),
    ]:  # fmt: skip
        refuses([*run, train, heldout, *options], words)
    other = write_parquet(tmp_path / "other.parquet", ["a"], column="body")
    (tmp_path / "latin").write_bytes(b"fine\ncaf\xe9\n")
    for i, (path, words) in enumerate(
        {other: "no column 'text', only body", tmp_path / "latin": "line 2: not UTF-8"}.items()
    ):
        argv = [*map(str, run), str(path), str(heldout), "--out", f"{tmp_path}/bad{i}"]
        refused(lambda argv=argv: prepare.main(argv), f"{path}: ", words)
        assert not (tmp_path / f"bad{i}").exists()

    # What is finished is kept, for a run with the same options only.
    argv = [*map(str, run), str(train), str(heldout), "--out", f"{tmp_path}/out"]
    refused(
        lambda: prepare.main([*argv, "--val_docs", "12"]), "12 documents, too few for --val_docs=12"
    )
    refused(
        lambda: prepare.main([*argv, "--val_docs", "12", "--packed"]),
        "out.partial",
        "other inputs or options",
    )
    refused(lambda: prepare.main([*argv, "--val_docs", "12"]), "12 documents")


# --------------------------------------------------------------------------------------------------
# Zero-shot sets

TEXTS = [
    " = Heading = \n", "", " one , two @-@ three ( four ) 's N N . \n", "“Quoted” text , and <unk> n't ; $ 5 !",
    "<|endoftext|> is only text", "naïve 🐈 \" a b \" end .", *(f"document number {i} : " + "words " * i for i in range(20)),
]  # fmt: skip
PLAIN = {"ptb": "ptb.valid.txt", "wikitext2": "wiki.valid.raw", "wikitext103": "wiki.valid.raw"}
PLAIN |= {"lm1b_gpt2": "news.en.heldout-00000-of-00050", "pubmed": "val.txt", "arxiv": "val.txt"}


def write_plain(path, name, texts):
    """The texts as they were first published; returns the documents that this makes."""
    if path.suffix == ".jsonl":
        path.write_text(
            "".join(json.dumps({prepare.ZERO_SHOT[name].column: t}) + "\n" for t in texts)
        )
        return texts
    if name in ("pubmed", "arxiv"):
        path.write_text(
            "".join(json.dumps({"article_text": [t, "."], "article_id": "1"}) + "\n" for t in texts)
        )
        return [f"{t}\n." for t in texts]
    lines = [t.replace("\n", "") + "\n" for t in texts]
    path.write_text("".join(lines))
    return [line if name.startswith("wiki") and line.strip() else line.strip() for line in lines]


def reference_zero_shot(name, documents, wrap, eot=True):
    import tiktoken

    encoding, ids = tiktoken.get_encoding("gpt2"), []
    for text in documents:
        ids += (
            encoding.encode_ordinary(DETOKENIZERS[prepare.ZERO_SHOT[name].detokenizer](text))
            + [50256] * eot
        )
    rows = [ids[i : i + wrap - 2] for i in range(0, len(ids), wrap - 2)]
    return [[50256, *row, 50256] for row in rows if len(row) == wrap - 2]


@needs_gpt2
@pytest.mark.parametrize("name", prepare.ZERO_SHOT)
def test_zero_shot_sets(name, tmp_path, capsys):
    of = prepare.ZERO_SHOT[name]
    first = write_parquet(tmp_path / "0000.parquet", TEXTS, of.column)
    second = tmp_path / PLAIN.get(name, "some.jsonl")
    documents = TEXTS + write_plain(second, name, TEXTS[::-1])
    meta, ids = make(name, "--input", first, second, "--wrap", 32, "--out", tmp_path / name)
    expected = reference_zero_shot(name, documents, 32)
    assert ids["test"].reshape(-1, 32).tolist() == expected and list(meta["splits"]) == ["test"]
    assert (meta["wrap"], meta["pad"], meta["tokenizer"], meta["vocab_size"]) == (
        32,
        None,
        {"kind": "gpt2"},
        50257,
    )
    for path in (first, second):
        assert (
            path.name in meta["source"]
            and hashlib.sha256(path.read_bytes()).hexdigest() in meta["source"]
        )
    whole = sum(len(DETOKENIZERS[of.detokenizer](text)) for text in documents)
    assert whole - 30 * 8 < meta["splits"]["test"]["characters"] <= whole
    assert (
        f"python evaluate.py out/owt_mdlm/ckpt.pt --data={tmp_path}/{name}\n"
        in capsys.readouterr().out
    )


@needs_gpt2
def test_zero_shot_without_eot_and_default_folders(tmp_path, monkeypatch, refused):
    monkeypatch.setattr("data.corpus.ROOT", tmp_path)
    path = tmp_path / "some.jsonl"
    write_plain(path, "ag_news", TEXTS * 20)
    for options in ([], ["--no_eot", "--wrap", "32"], ["--wrap", "1024", "--overwrite"]):
        prepare.main(["ag_news", "--input", str(path), *options])
    assert read_meta("ag_news")["wrap"] == 1024 and len([*tmp_path.glob("ag_news*")]) == 2
    ids = np.fromfile(tmp_path / "ag_news_no_eot_wrap32" / "test.bin", np.uint16)
    assert ids.reshape(-1, 32).tolist() == reference_zero_shot("ag_news", TEXTS * 20, 32, eot=False)
    for folder, how in {
        "ptb": "ptb", "lm1b_packed": "lm1b --packed", "lm1b_gpt2": "lm1b_gpt2", "text8_wrap9": "text --input FILE",
        "ag_news_no_eot_wrap64": "ag_news --no_eot --wrap 64", "lm1b_packed_wrap64": "lm1b --packed --wrap 64",
        "openwebtext_wrap1024": "openwebtext --wrap 1024", "mine": "text --input FILE... --out mine",
        f"{tmp_path}/x/lm1b": f"lm1b --out {tmp_path}/x/lm1b",
    }.items():  # fmt: skip
        refused(
            lambda folder=folder: read_meta(folder),
            f"prepare the data first: python data/prepare.py {how}",
        )


@needs_gpt2
def test_zero_shot_bad_input(tmp_path, refuses):
    def check(name, file, content, *words):
        (tmp_path / file).write_bytes(content)
        refuses([name, "--input", tmp_path / file], file, *words)

    check("lambada", "a.jsonl", b'{"text": "fine"}\n{"text"\n', "line 2: not JSON")
    check("lambada", "b.jsonl", b'{"body": "fine"}\n', "line 1: must have a field 'text'")
    check("lambada", "c.jsonl", b'["fine"]\n', "line 1: must have a field 'text'")
    check("lambada", "d.jsonl", b'{"text": 5}\n', "line 1: its field 'text' is not text")
    check("lambada", "f.jsonl", b"", "too little text in test for one row of --wrap=1024")
    check("lambada", "g.txt", b"plain\n", "must be a .jsonl, .json, .csv or parquet file")
    check("ptb", "h.txt", b"caf\xe9\n", "line 1: not UTF-8")
    check("arxiv", "val.txt", b'{"text": "x"}\n', "line 1: must have a field 'article_text'")
    check("arxiv", "i.parquet", b"PAR1 and no more", "arquet")
    refuses(["ptb", "--wrap", 2], "--wrap=2: must be at least 3")
    refuses(["ptb", "--input", tmp_path / "gone.txt"], "gone.txt: no such file")


def test_the_table_of_zero_shot_sets_is_whole():
    for of in prepare.ZERO_SHOT.values():
        assert of.detokenizer in DETOKENIZERS and of.lines in (*LINES, "none")


HUB = """
import json, os, sys
import data.prepare as p, data.pretrain as pretrain, data.tokenizer as tokenizer
for argv, sentences, vocab, lambada in json.loads(sys.argv[1]):
    pretrain.LM1B_SENTENCES, tokenizer.BERT_VOCAB_SHA256 = tuple(sentences), vocab
    for name, of in p.ZERO_SHOT.items():
        p.ZERO_SHOT[name] = of._replace(documents=26, sha256=of.sha256 and lambada)
    try:
        p.main(argv)
    except SystemExit as e:
        assert e.code == 2
"""


@needs_gpt2
def test_from_the_hub(tmp_path, serve, sentences):
    """The real huggingface_hub against a small imitation of the hub, in a process of its own
    (HF_ENDPOINT)."""
    sha, listing, files = "c0ffee" * 6 + "c0de", {}, {}
    sha256 = lambda content: hashlib.sha256(content).hexdigest()

    def publish(repo, revision, name, content, listed=None, lfs=True):
        file = dict(rfilename=name, size=len(content), blobId="0" * 40)
        if lfs:
            file["lfs"] = dict(sha256=listed or sha256(content), size=len(content), pointerSize=130)
        listing.setdefault((repo, revision), []).append(file)
        files[f"/datasets/{repo}/resolve/{sha}/{name}"] = content

    parquet = lambda texts, column="text": write_parquet(
        tmp_path / "file.parquet", texts, column
    ).read_bytes()
    lm1b, converted = "billion-word-benchmark/lm1b", "/revision/refs%2Fconvert%2Fparquet"
    publish(lm1b, converted, "plain_text/train/index.duckdb", b"")
    publish(lm1b, converted, "plain_text/train/0001.parquet", parquet(LM1B[12:20]))
    publish(lm1b, converted, "plain_text/train/0000.parquet", parquet(LM1B[:12]), lfs=False)
    publish(lm1b, converted, "plain_text/test/0000.parquet", parquet(LM1B[20:]))
    news = parquet(TEXTS)
    publish("fancyzhx/ag_news", "", "data/test-00000-of-00001.parquet", news)
    publish("fancyzhx/ag_news", "", "data/train-00000-of-00001.parquet", parquet(["other"] * 26))
    publish(
        "ptb-text-only/ptb_text_only",
        converted,
        "penn_treebank/validation/0000.parquet",
        parquet(TEXTS, "sentence"),
        "0" * 64,
    )
    publish(
        "Salesforce/wikitext",
        "",
        "wikitext-2-raw-v1/validation-00000-of-00001.parquet",
        parquet(TEXTS[1:]),
    )
    write_plain(tmp_path / "x.jsonl", "lambada", TEXTS)
    publish(
        "EleutherAI/lambada_openai",
        "",
        "data/lambada_test.jsonl",
        (tmp_path / "x.jsonl").read_bytes(),
        lfs=False,
    )
    for (repo, revision), siblings in listing.items():
        files[f"/api/datasets/{repo}{revision}"] = json.dumps(
            dict(id=repo, sha=sha, siblings=siblings)
        ).encode()
    files["/google-bert/bert-base-uncased/resolve/main/vocab.txt"] = SPEC["vocab"].encode()

    run = lambda name, *more: [
        name,
        "--out",
        f"{tmp_path}/out/{name}{len(more)}",
        "--wrap",
        "16",
        *more,
    ]
    right = (20, 6), sha256(SPEC["vocab"].encode()), sha256((tmp_path / "x.jsonl").read_bytes())
    runs = [[run(name), *right] for name in ("ag_news", "ptb", "wikitext2", "lambada", "arxiv")]
    runs += [
        [run("lm1b", "--val_docs", "5"), (20, 7), *right[1:]],
        [run("lm1b", "--val_docs", "5"), *right],
    ]
    runs += [
        [run(name, "--overwrite"), (20, 6), "0" * 64, "0" * 64] for name in ("lambada", "lm1b")
    ]
    env = dict(
        os.environ,
        HF_ENDPOINT=serve(files),
        HF_HOME=str(tmp_path / "hf"),
        HF_HUB_DISABLE_TELEMETRY="1",
    )
    command = [sys.executable, "-c", HUB, json.dumps(runs)]
    result = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for error, words in zip(result.stderr.splitlines(), [
        (f"ptb_text_only@{sha}/penn_treebank/validation/0000.parquet: sha256 is ", f"must be {'0' * 64}"),
        (f"Salesforce/wikitext@{sha}: 25 documents, must be 26",),
        ("armanc/scientific_papers: cannot list its files",),
        (f"billion-word-benchmark/lm1b@{sha}: 20 + 6 sentences, must be 20 + 7",),
        ("data/lambada_test.jsonl: sha256 is ", f"must be {'0' * 64}"),
        ("vocab.txt: not the vocabulary of google-bert",),
    ], strict=True):  # fmt: skip
        assert all(word in error for word in words), error
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["ag_news0", "lambada0", "lm1b2"]
    for name in ("ag_news", "lambada"):
        ids = np.fromfile(tmp_path / "out" / f"{name}0" / "test.bin", np.uint16)
        assert ids.reshape(-1, 16).tolist() == reference_zero_shot(name, TEXTS, 16)
    assert sha256(news) in read_meta(f"{tmp_path}/out/ag_news0")["source"]
    lm1b = tmp_path / "out" / "lm1b2"
    ids = [np.fromfile(lm1b / f"{split}.bin", np.uint16).reshape(-1, 16) for split in LM1B_SPLITS]
    rows = [[3, *slow_wordpiece(clean(text))[:14], 4] for text in LM1B]
    assert np.concatenate(ids).tolist() == [row + [0] * (16 - len(row)) for row in rows]
    assert sha in read_meta(str(lm1b))["source"]


# --------------------------------------------------------------------------------------------------
# Padding


def test_padding_is_counted_and_never_maskable(tmp_path):
    folder = tmp_path / "padded"
    partial_of(folder).mkdir()
    x0 = np.array([[3, 5, 4, 0], [3, 4, 0, 0], [3, 0, 6, 4]], np.uint16)
    x0.tofile(partial_of(folder) / "test.bin")
    meta = finish(folder, "here", SPEC, len(PIECES), {"test": 9}, wrap=4, pad=0)
    assert meta == read_meta(str(folder)) and meta["pad"] == 0
    of = meta["splits"]["test"]
    assert of["tokens"] == 12 and of["padding"] == 4
    assert of["sha256"] == hashlib.sha256((folder / "test.bin").read_bytes()).hexdigest()
    x0, cfg = torch.from_numpy(x0.astype(np.int64)), Config(vocab_size=len(PIECES), seq_len=4)
    assert unpack(x0, meta, cfg)[1].all()  # masked, or its place would tell the length
    assert unpack(x0, meta, cfg)[2].tolist() == [[i > 0 for i in row] for row in x0.tolist()]

    old = json.loads((folder / "meta.json").read_text())  # before there was padding
    del old["version"], old["checksum"], old["pad"], old["ends"], old["splits"]["test"]["padding"]
    (folder / "meta.json").write_text(json.dumps(old))
    assert read_meta(str(folder))["pad"] is None
    assert unpack(x0, old, cfg)[1].all()
    assert (~unpack(x0, old, replace(cfg, bos=True))[1]).nonzero().tolist() == [
        [0, 0],
        [1, 0],
        [2, 0],
    ]
