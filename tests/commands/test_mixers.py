"""tasks.mixers: networks of equally many parameters, and its table."""

from dataclasses import replace

import pytest

from configs import pydocs_mdlm
from model import count_parameters
from tasks import mixers


@pytest.mark.parametrize("n_layer, n_embd", [(2, 64), (3, 128), (1, 256)])
def test_the_kinds_have_equally_many_parameters(n_layer, n_embd):
    kinds = mixers.make_kinds(replace(pydocs_mdlm(), n_layer=n_layer, n_embd=n_embd))
    counts = {name: count_parameters(cfg) for name, cfg in kinds.items()}
    assert counts["DiT"] == counts["AR"]
    one_more = n_layer * (2 * n_embd + 1)  # a wider MLP's parameters
    assert abs(counts["DiT"] - counts["DiMamba"]) <= one_more
    assert kinds["AR"].causal and kinds["DiMamba"].mixer == "mamba"


def test_the_task_writes_its_table(corpus, tmp_path):
    args = ["--data", corpus, "--steps", 2, "--seeds", 2, "--n_embd", 16]
    results = mixers.main([*map(str, args), "--out_dir", str(tmp_path / "out")])
    table = (tmp_path / "out" / "table.md").read_text()
    assert {name: len(bits) for name, bits in results.items()} == dict(DiT=2, DiMamba=2, AR=2)
    assert table.count("±") == 3 and table.count("≤") == 2
