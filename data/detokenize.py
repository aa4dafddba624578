"""Tokenised benchmarks -> ordinary text, with the rules of MDLM's evaluation, in their order.

The order matters, and so do the characters that a match uses up: of two punctuation marks in a row,
` . . `, only the first loses its space.
"""

import re

MARKS = ":;.!?,"


def compile_rules(*pairs):
    """A function that applies pairs (regular expression, replacement) to a text, one by one."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in pairs]

    def detokenize(text):
        for pattern, replacement in compiled:
            text = pattern.sub(replacement, text)
        return text

    return detokenize


def close_up(marks):
    """Rules: punctuation between two spaces loses the first of them."""
    return [(f" {re.escape(c)} ", f"{c} ") for c in marks]


wikitext = compile_rules(
    ("s '", "s'"),  # plural possessives
    *((f" @{re.escape(c)}@ ", c) for c in "-,."),  # hyphens and separators within words and numbers
    *close_up(MARKS),
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),  # no space inside brackets and quotes
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
    (" N ", " 1 "),  # N stands for a number
    (" 's", "'s"),
)

ptb = compile_rules(
    (" 's", "'s"),
    ("s ' ", "s' "),
    (" n't", "n't"),
    (" \n ", "\n"),
    (r"\\/", "/"),
    (" N(?= )", " 1"),  # every N, in N N too
    (r"([$#]) 1", r"\g<1>1"),
    ("<unk>", "?"),
)

lm1b = compile_rules(
    ("(https?) : / / ", r"\1://"),
    (r" '(?=\w)", "'"),
    (r" (\w+) \. ", r" \1. "),
    (r" (\w+) \.$", r" \1."),
    (r" \? ", "? "),
    (r" \?$", "?"),
    (" ! ", "! "),
    (" !$", "!"),
    *close_up(",:;"),
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
