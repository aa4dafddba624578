"""JSON files, checked before they are used."""

import json
from pathlib import Path

from common import fail, one_line


def read_json(path, fields, advice="", text=None):
    """The dict in a JSON file, or in `text` from it. Fails in one line if it is damaged, or if one
    of the fields {name: type} is missing or of another type."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8") if text is None else text)
    except (ValueError, RecursionError) as e:
        fail(f"{path}: damaged ({one_line(e)}){advice}")
    return check_fields(value, fields, path, advice)


def check_fields(value, fields, where, advice=""):
    """The value, if it is a dict with these fields {name: type}; a bool is no int."""
    if not isinstance(value, dict):
        fail(f"{where}: damaged: {type(value).__name__} instead of named fields{advice}")
    for name, kind in fields.items():
        found = value.get(name)
        if not isinstance(found, kind) or isinstance(found, bool) != (kind is bool):
            fail(f"{where}: damaged: {name} is {type(found).__name__}{advice}")
    return value
