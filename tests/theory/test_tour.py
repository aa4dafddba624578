"""tour.ipynb: its code is that of tiny.py, and it runs from top to bottom."""

import ast
import json
import re
import time

import pytest
from conftest import ROOT

CELLS = json.loads((ROOT / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def definitions(source):
    """{name: code without comments} of the functions and classes of a source."""
    return {
        node.name: ast.unparse(node) for node in ast.parse(source).body if hasattr(node, "name")
    }


def test_its_functions_are_those_of_tiny():
    ours = definitions("\n".join(CODE))
    tiny = definitions((ROOT / "tiny.py").read_text(encoding="utf-8"))
    assert {name: ours[name] for name in tiny if name != "main"} == {
        name: code for name, code in tiny.items() if name != "main"
    }


def test_it_needs_torch_only_and_stores_no_output():
    """So it runs on Colab as it is."""
    imported = set(re.findall(r"^(?:import|from) (\w+)", "\n".join(CODE), re.M))
    assert imported == {"math", "re", "time", "collections", "pydoc_data", "torch"}
    assert all(cell.get("outputs", []) == [] for cell in CELLS)


@pytest.mark.slow
def test_it_runs(capsys):
    """In under three minutes of a core; the network surely beats a guess without context."""
    start, names = time.process_time(), {}
    for code in CODE:
        exec(code, names)
    assert time.process_time() - start < 180
    out = capsys.readouterr().out
    bits, error = map(float, re.search(r"at most ([\d.]+) ± ([\d.]+)", out).groups())
    without = float(re.search(r"without context: +([\d.]+)", out)[1])
    assert bits + 4 * error < without < 8
    real = {name: int(n) for name, n in re.findall(r"^(\w+).* calls, +(\d+)%", out, re.M)}
    assert set(real) == {"sample", "one_by_one", "surest_first"} and min(real.values()) > 10
    assert out.count("t = ") == 5 + 4
