"""Tokenised benchmarks -> ordinary text, rule by rule as in MDLM's evaluation, so that numbers can be compared.

A detokeniser is a list of substitutions in order. The order matters, and so does what a pattern consumes: two
punctuation marks in a row, ` . . `, lose only the first of their spaces.
"""

import re

MARKS = ":;.!?,"


def rules(*pairs):
    """One function of text from pairs (regular expression, replacement), which are applied one after the other."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in pairs]

    def detokenize(text):
        for pattern, replacement in compiled:
            text = pattern.sub(replacement, text)
        return text

    return detokenize


def closed_up(marks):
    """Punctuation between two spaces loses the first of them."""
    return [(f" {re.escape(c)} ", f"{c} ") for c in marks]


wikitext = rules(
    ("s '", "s'"),  # plural possessives
    *(
        (f" @{re.escape(c)}@ ", c) for c in "-,."
    ),  # hyphens and separators inside of words and numbers
    *closed_up(MARKS),
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),  # what is in brackets or quotes touches them
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"\{\s*([^}]*?)\s*\}", r"{\1}"),
    (r'"\s*([^"]*?)\s*"', r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    ("= = = =", "===="),  # headings
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),  # numbers that were replaced by N
    (" 's", "'s"),
)

ptb = rules(
    (" 's", "'s"),
    ("s ' ", "s' "),
    (" n't", "n't"),
    (" \n ", "\n"),
    (r"\\/", "/"),
    (" N(?= )", " 1"),  # every N, in N N too
    (r"([$#]) 1", r"\g<1>1"),
    ("<unk>", "?"),
)

lm1b = rules(
    ("(https?) : / / ", r"\1://"),
    (r" '(?=\w)", "'"),
    (r" (\w+) \. ", r" \1. "),
    (r" (\w+) \.$", r" \1."),
    (r" \? ", "? "),
    (r" \?$", "?"),
    (" ! ", "! "),
    (" !$", "!"),
    *closed_up(",:;"),
    (" / ", "/"),
    (r'" ([^"]+) "', r'"\1"'),
    (r"' ([^']+) '", r"'\1'"),
    (r"\( ([^\(\)]+) \)", r"(\1)"),
    (r"\[ ([^\[\]]+) \]", r"[\1]"),
    (r"([$£]) ", r"\1"),
)


def lambada(text):
    """Straight double quotes, and the newline that GPT-2's authors put first."""
    return "\n" + text.replace("“", '"').replace("”", '"').strip()


DETOKENIZERS = {
    "wikitext": wikitext,
    "ptb": ptb,
    "lm1b": lm1b,
    "lambada": lambada,
    "papers": lambda text: lm1b(wikitext(text)),
    "none": lambda text: text,
}
