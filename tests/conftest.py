"""Environment of all tests: no network, a private cache, one thread per xdist worker. Set before any library loads."""

import atexit
import contextlib
import gc
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


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


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """For kills; seeded from the clock. The seed is printed, and `--kill-seed` gives it back."""
    number = request.config.getoption("--kill-seed") or time.time_ns() % 10**9
    print(f"--kill-seed {number}")
    return random.Random(number)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds Python, NumPy and torch before each test, and returns the seed."""
    set_seed(0)
    return 0


# What the fixtures below import takes seconds, which most tests do not need.


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A teacher's folder and a folder of texts, which no test changes."""
    from runs import save_teacher, save_texts

    folder = tmp_path_factory.mktemp("sources")
    return save_teacher(folder / "teacher"), save_texts(folder / "texts")


@pytest.fixture(scope="session")
def told() -> list[Any]:
    """Every event of the run `finished`, once that is there."""
    return []


@pytest.fixture(scope="session")
def finished(sources: tuple[Path, Path], told: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The `RunResult` of `tiny_recipe(*sources)`, in which nothing failed, and which no test changes."""
    from runs import tiny_recipe

    from hf_hybrid.run.recipe import Recipe
    from hf_hybrid.run.runner import run_recipe

    recipe, folder = Recipe.from_dict(tiny_recipe(*sources)), tmp_path_factory.mktemp("runs") / "run"
    return run_recipe(recipe, folder, progress=told.append)


@pytest.fixture(scope="session")
def finished_here(sources: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a run beside its teacher and texts, which its recipe names relative to the current folder."""
    from runs import tiny_recipe

    from hf_hybrid.run.recipe import Recipe
    from hf_hybrid.run.runner import run_recipe

    folder = tmp_path_factory.mktemp("finished")
    for source in sources:
        shutil.copytree(source, folder / source.name)
    with contextlib.chdir(folder):
        run_recipe(Recipe.from_dict(tiny_recipe("teacher", "texts")), "run")
    return folder / "run"


@pytest.fixture
def case(finished_here: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A `Case` of that run in a folder of its own, which is the current one."""
    from cases import Case

    monkeypatch.chdir(tmp_path)
    return Case(finished_here, capsys)


@pytest.fixture(scope="session")
def loopback() -> Iterator[Any]:
    from hub_server import serve

    with serve() as server:
        yield server


@pytest.fixture
def hub(loopback: Any) -> Any:
    """A `LoopbackHub` with nothing on it."""
    loopback.repos.clear()
    loopback.blobs.clear()
    loopback.dies_at, loopback.dead = None, False
    return loopback


@pytest.fixture(scope="module")
def dead_layer() -> Any:
    """A teacher whose layer `DEAD` does nothing, and its all-linear student; no test changes them."""
    from scored import dead_layer_pair

    return dead_layer_pair()


# The longest files, in the order in which they begin, so that no worker is left with one of them at the end
# (`--no-loadscope-reorder`): half a minute and more each.
LONG = (
    "robust",
    "robust_pairs",
    "multiprocess",
    "smollm2",
    "scoring_processes",
    "scoring_cli",
    "generation",
    "readme",
)
LONG += ("run", "stream", "teacher_topk", "demo", "hub")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


def pytest_collection_finish() -> None:
    """accelerate collects garbage after every training: a fifth of a second where a million objects live."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-docs", action="store_true", help="write the generated parts of docs/scoring.md")
    parser.addoption("--kill-seed", type=int, default=0, help="seed of the random kills; by default from the clock")
