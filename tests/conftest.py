import os
from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).parents[2] / "shared"  # real data for tests; absent outside the developers' machines
if (SHARED / "tiktoken").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken"))

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
