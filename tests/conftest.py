"""One thread, float32, no network, and shape comments that are assertions: so every test repeats."""
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"                    # real text for tests, where it is present
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
sys.path.insert(0, str(ROOT))

from tools import shapes  # noqa: E402

shapes.install()

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    "Each test starts from the same random state, in float32."
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def shared_text():
    "A function from the name of a shared text file to its text; the test is skipped where the file is absent."
    def read(name: str) -> str:
        if not (SHARED / name).exists(): pytest.skip(f"{name} is not here")
        return (SHARED / name).read_text(encoding="utf-8")
    return read
