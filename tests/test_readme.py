"""What the README shows runs and is true."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_hybrid.run.recipe import Recipe


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


@pytest.mark.slow
def test_python_example(tmp_path):
    """The first example as it stands, then the second on what the first has saved, in fresh processes."""
    first, second = blocks("python")
    for code in (first, second.replace("my_run/model", "hybrid")):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        if code is first:
            assert re.search(r"^\[\d, \d\] ", done.stdout, flags=re.M), done.stdout
            assert "held-out KL with the layer restored to softmax" in done.stdout


def test_recipe_is_valid():
    (text,) = blocks("yaml")
    assert Recipe.from_dict(yaml.safe_load(text)).select.k == 7


def test_named_files_exist():
    tree = re.search(r"```\n(modeling/.*?)```", README, flags=re.S).group(1)
    root = room = ""
    for line in tree.splitlines():
        found = re.match(r"( {2})?(\w+)/", line)
        if found is not None:
            root, room = (root, found[2]) if found[1] else (found[2], "")
        for name in re.findall(r"\w+\.py", line):
            assert (ROOT / root / room / name).exists(), f"{root}/{room}/{name}"
    for name in re.findall(r"`((?:recipes|benchmarks|docs|examples)/[\w./-]+)`", README):
        assert (ROOT / name).exists(), name
