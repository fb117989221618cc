"""Environment of all tests: no network, a private cache, one thread per xdist worker. Set before any library loads."""

import atexit
import os
import shutil
import tempfile


# Each process has its own cache: code that travels with checkpoints is cached by name, and two workers (or an
# earlier run) would otherwise see each other's files.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf_hybrid_tests_")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
os.environ["HF_HUB_OFFLINE"] = "1"
IS_XDIST_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IS_XDIST_WORKER:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import set_seed  # noqa: E402


if IS_XDIST_WORKER:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds Python, NumPy and torch before each test, and returns the seed."""
    set_seed(0)
    return 0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kill-seed", type=int, default=0, help="seed of the random kills; by default from the clock")
