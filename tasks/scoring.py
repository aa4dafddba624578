"""How the records of tasks/answer.py are scored: GSM8K's numbers, the reversal test's texts."""

import math
import re
import statistics
import sys
from collections import Counter
from fractions import Fraction

# --------------------------------------------------------------------------------------------------
# GSM8K


def is_right(text, reference):
    r"""Whether the line after the last #### states the number of the reference.

    SMDM's evaluate_gsm8k.py reads what follows the first "#### ", with its space, of the last line
    by sympy's LaTeX parser. The two differ in answers such as these:

        text                    reference  here   SMDM
        ' #### 0018'            '18'       right  wrong
        ' #### .5'              '0.5'      right  wrong
        ' #### 0.5'             '.5'       right  wrong
        ' #### 18.'             '18'       right  wrong
        ' #### 18 #### 19'      '19'       right  wrong
        ' ####18'               '18'       right  wrong
        ' #### 18\nmore'        '18'       right  wrong
        ' #### (18)'            '18'       wrong  right
        ' #### "18"'            '18'       wrong  right
        ' #### 6*3'             '18'       wrong  right
        ' #### 18=2*9'          '18'       wrong  right
        ' #### \\frac{36}{2}'   '18'       wrong  right
        ' #### \\boxed{18}'     '18'       wrong  right
    """
    stated = text.rpartition("####")[2].strip().split("\n")[0]
    return "####" in text and parse_number(stated) == parse_number(reference)


UNITS = (
    "square|ways|integers|dollars|mph|inches|ft|hours|km|units|points|feet|minutes|digits|cents|"
    "degrees|cm|gm|pounds|meters|meals|edges|students|multiples"
)


def parse_number(text):
    """The number that an answer states, as a Fraction, or the rest of the text if it states none.

    As Minerva (arXiv 2206.14858, appendix D) and SMDM do, remove everything up to the last =,
    articles, spaces, commas, $ and UNITS; also a full stop at the end, which they keep. They read
    LaTeX and sums too, of which this reads fractions only: 36/2 is 18."""
    text = re.sub(rf"an? |\\?\$|[\s,]|{UNITS}", "", text.rpartition("=")[2]).removesuffix(".")
    return Fraction(text) if re.fullmatch(r"[+-]?(\d+(\.\d+|/0*[1-9]\d*)?|\.\d+)", text) else text


# --------------------------------------------------------------------------------------------------
# The reversal test

DIRECTIONS = {  # of the test files: what the prompt gives and the answer states
    "p2d": "who -> what, as trained",
    "d2p": "what -> who, as trained",
    "d2p_reverse": "who -> what, reversed",
    "p2d_reverse": "what -> who, reversed",
}


def contains(answer, reference):
    """Whether the answer has the reference in it, as SMDM's evaluate_reverse.py counts accuracy."""
    return reference.strip().lower() in answer.lower()


def character_bleu(answer, reference):
    """BLEU of up to four characters in a row, as NLTK's sentence_bleu of two plain strings, which
    is what SMDM's evaluate_reverse.py computes."""
    log_p = 0.0
    for n in range(1, 5):
        grams, wanted = (
            Counter(text[i : i + n] for i in range(len(text) - n + 1))
            for text in (answer, reference)
        )
        found = (grams & wanted).total()
        if n == 1 and not found:
            return 0.0
        log_p += math.log(found / max(grams.total(), 1) if found else sys.float_info.min) / 4
    return math.exp(log_p + min(0.0, 1 - len(reference) / len(answer)))


# --------------------------------------------------------------------------------------------------
# The figures of all records: dict, text


def share(bits):
    """(mean, standard error) of a list of bools."""
    p = sum(bits) / len(bits)
    return p, (p * (1 - p) / len(bits)) ** 0.5


def summarise_gsm8k(done):
    right = sum(record["right"] for record in done)
    accuracy, error = share([record["right"] for record in done])
    text = (
        f"accuracy {100 * accuracy:.2f} ± {100 * error:.2f} %, {right:,} of {len(done):,} problems"
    )
    return dict(right=right, accuracy=accuracy, accuracy_se=error), text


def summarise_reversal(done):
    """Accuracy of each kind of question and, for descriptions, the mean BLEU."""
    result, lines = {}, []
    for kind in dict.fromkeys(record["of"] for record in done):
        group = [record for record in done if record["of"] == kind]
        accuracy, error = share([record["right"] for record in group])
        result[kind] = dict(questions=len(group), accuracy=accuracy, accuracy_se=error)
        line = (
            f"{DIRECTIONS.get(kind, kind):24} accuracy {100 * accuracy:6.2f} ± {100 * error:.2f} %"
        )
        if "bleu" in group[0]:
            result[kind]["bleu"] = statistics.fmean(record["bleu"] for record in group)
            line += f", BLEU {100 * result[kind]['bleu']:.1f}"
        lines.append(f"{line}, {len(group):,} questions")
    return dict(kinds=result), "\n".join(lines)


SUMMARIES = {"gsm8k": summarise_gsm8k, "reversal": summarise_reversal}


def summarise(done, questions, task, out):
    """The figures of the records, and the same as text; questions: (texts, _) of each."""
    n, empty = len(done), 0
    for record, (texts, _) in zip(done, questions):
        if task == "mt_bench":
            groups = [choice["turns"] for choice in record["choices"]]
        else:
            groups = [[record[key] for key in ("thought", "answer") if key in record]]
        for answers in groups:
            empty += sum(not answer.strip("#") for _, answer in zip(texts, answers))
    result, text = dict(task=task, questions=n, empty=empty), ""
    if task in SUMMARIES:
        figures, text = SUMMARIES[task](done)
        result |= figures
    return result, f"{text}\n{n:,} questions, {empty:,} of their answers empty, in {out}".strip()
