"""Scores of two processes on the CPU (gloo, DDP) are those of one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import PATIENCE, port_for_a_launcher
from scoring_job import CASES, score_all


pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """All cases in this process, and in two processes of a launcher."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    command += ["--main_process_port", str(port_for_a_launcher())]
    command += ["--config_file", str(ROOT / "recipes" / "accelerate" / "ddp.yaml"), str(ROOT / "tests/scoring_job.py")]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-6000:]
    return score_all(tmp_path_factory.mktemp("one")), json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_one_process(case: str, both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    alone, together = both
    assert together[f"{case} first"]["values"] == pytest.approx(alone[f"{case} first"]["values"], rel=1e-3, abs=1e-6)
    for key in ("order", "tokens"):
        assert together[f"{case} first"][key] == alone[f"{case} first"][key]
    assert together[f"{case} again"] == together[f"{case} first"]
