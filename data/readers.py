"""Files -> records -> texts: parquet, JSON, JSON lines, CSV and plain lines, compressed or not.

JSON lines as found in the wild are accepted: blank lines, a byte order mark, names like A.JSONL or
a.json.gz. A null is left out and half a surrogate pair becomes ?; both are counted and reported.
Anything else that is wrong is a ValueError that names the line.
"""

import csv
import io
import json
import re
from collections import Counter
from pathlib import Path

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
HALF = re.compile(r"\\u[dD][89a-fA-F]")  # of a surrogate pair, as JSON spells it
COLUMN_FILES = ".jsonl, .json, .csv or parquet file"


def kind_of(path):
    """parquet, json, csv or plain, by the name; parquet also by its first bytes."""
    with open(path, "rb") as f:
        if f.read(4) == b"PAR1":
            return "parquet"
    name = re.sub(r"\.(gz|zst)$", "", str(path).lower())
    return KINDS.get(Path(name).suffix, "plain")


def open_bytes(path):
    """The file, decompressed if its name ends in .gz or .zst."""
    compression = COMPRESSIONS.get(Path(path).suffix.lower())
    if not compression:
        return open(path, "rb")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression=compression), 2**20)


def read_lines(path):
    """Yield (line number, text with its newline), without a byte order mark."""
    with open_bytes(path) as f:
        for number, line in enumerate(f, 1):
            try:
                text = line.decode()
            except UnicodeDecodeError:
                raise ValueError(f"line {number}: not UTF-8") from None
            yield number, text.removeprefix("\ufeff") if number == 1 else text


# --------------------------------------------------------------------------------------------------
# Files -> records


def read_records(path, columns=None, notes=None):
    """Yield (place, record): dicts with at least `columns`, whatever JSON holds, or plain lines.
    A place is "line 3", or "row 3" of parquet. notes: a Counter of what had to be repaired."""
    notes = Counter() if notes is None else notes
    kind = kind_of(path)
    if kind == "parquet":
        yield from read_parquet(path, columns)
    elif kind == "csv":
        yield from read_csv(path, columns)
    elif kind == "json":
        yield from read_json(path, notes)
    else:
        yield from ((f"line {number}", line) for number, line in read_lines(path))


def read_parquet(path, columns):
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as parquet:
        names = parquet.schema_arrow.names
        if columns:
            check_column(columns[0], names)
            columns = [name for name in columns if name in names]
        batches = parquet.iter_batches(1000, columns=columns)
        records = (record for batch in batches for record in batch.to_pylist())
        yield from ((f"row {number}", record) for number, record in enumerate(records, 1))


def read_csv(path, columns):
    """The first line names the columns. A short row has nulls. The place is a row's last line."""
    csv.field_size_limit(2**31 - 1)  # by default a field may have 131,072 characters
    number = 0

    def count_lines():
        nonlocal number
        for at, line in read_lines(path):
            number = at
            yield line

    rows = csv.DictReader(count_lines(), strict=True)
    try:
        if columns:
            check_column(columns[0], rows.fieldnames or [])
        for record in rows:
            yield f"line {number}", record
    except csv.Error as e:
        raise ValueError(f"line {number}: not CSV ({e})") from None


def check_column(column, names):
    if column not in names:
        raise ValueError(f"has no column {column!r}, only {', '.join(names)}")


def read_json(path, notes):
    """A value a line, or in a .json file one list of all values."""
    if re.search(r"\.json(\.gz|\.zst)?$", str(path).lower()):
        with open_bytes(path) as f:
            is_list = f.read(2**16).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        if is_list:
            text = "".join(line for _, line in read_lines(path))
            for number, value in enumerate(parse_json(text, 1), 1):
                yield f"record {number}", replace_halves(value, notes)
            return
    for number, line in read_lines(path):
        if line.strip():
            value = parse_json(line.strip(), number)
            yield f"line {number}", replace_halves(value, notes) if HALF.search(line) else value


def parse_json(text, line):
    """The value of a text that begins in this line of its file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise ValueError(f"line {line + e.lineno - 1}: not JSON ({e.msg})") from None


def replace_halves(value, notes):
    """With ? for each half of a surrogate pair, which JSON can hold and UTF-8 cannot."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        notes["halves"] += 1
        return json.loads(text.encode(errors="replace"))
    return value


# --------------------------------------------------------------------------------------------------
# Records -> texts


def join_paragraphs(line):
    """The text of a line of the original arXiv and PubMed files: JSON with a list of paragraphs."""
    return "\n".join(json.loads(line)["article_text"])


LINES = {  # how plain lines become texts
    "sentence": str.strip,
    "wikitext": lambda line: line if line.strip() else "",  # every line is a document
    "article": join_paragraphs,
}


def read_documents(path, column, lines="none", skip=(), notes=None, size=1000):
    """Yield lists of `size` texts: a column of a file that has columns, else plain lines in the way
    LINES[lines]. skip: (column, field, value) of records to leave out, if they have the column.
    notes: a Counter of what was left out or repaired."""
    notes = Counter() if notes is None else notes
    plain = kind_of(path) == "plain"
    if plain and lines not in LINES:
        raise ValueError(f"must be a {COLUMN_FILES} with a column {column!r}")
    texts = []
    for place, record in read_records(path, [column, *skip[:1]], notes):
        if not plain and skip and is_skipped(record, *skip):
            continue
        text = parse_line(record, lines, place) if plain else find_text(record, column, place)
        if text is None:
            notes["nulls"] += 1
            continue
        texts.append(text)
        if len(texts) == size:
            yield texts
            texts = []
    yield texts


def is_skipped(record, column, field, value):
    about = record.get(column) if isinstance(record, dict) else None
    return isinstance(about, dict) and about.get(field) == value


def parse_line(line, lines, place):
    try:
        return LINES[lines](line)
    except json.JSONDecodeError:
        raise ValueError(f"{place}: not JSON") from None
    except (KeyError, TypeError):
        raise ValueError(f"{place}: must have a field 'article_text'") from None


def find_text(record, column, place):
    """The text in a column, or None for a null."""
    if not isinstance(record, dict) or column not in record:
        raise ValueError(f"{place}: must have a field {column!r}")
    text = record[column]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{place}: its field {column!r} is not text")
    return text


def report(name, notes, column=None):
    """Print what was left out or repaired in the file."""
    if notes.get("nulls"):
        print(f"{name}: left out {notes['nulls']:,} records whose {column!r} is null")
    if notes.get("halves"):
        print(f"{name}: put ? for half a surrogate pair in {notes['halves']:,} records")
