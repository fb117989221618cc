"""Two processes on the CPU give what one gives: DDP and FSDP2, by the shipped configurations of accelerate."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from parallel_job import CASES, recorded, train
from runs import PATIENCE, copy_run, port_for_a_launcher, tiny_recipe
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_hybrid.cli import main as cli
from hf_hybrid.run.recipe import Recipe
from hf_hybrid.run.runner import RunResult, run_recipe
from hf_hybrid.trainers.sharding import check_whole_rows, check_zero_stage


pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
ENGINES = ["ddp", "fsdp2"]


def launch(engine: str, *arguments: Any) -> str:
    """Runs the job in two processes and returns what it wrote to stdout; an error shows its stderr."""
    job = str(ROOT / "tests" / "parallel_job.py")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    command += ["--config_file", str(ROOT / "recipes" / "accelerate" / f"{engine}.yaml")]
    command += ["--main_process_port", str(port_for_a_launcher())]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, job, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and the numbers of all cases in this process."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, {name: train(folder / str(i), **case) for i, (name, case) in enumerate(CASES.items())}


@pytest.fixture(scope="module", params=ENGINES)
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict]:
    """Engine, folder and numbers of the same cases in two processes."""
    folder = tmp_path_factory.mktemp(request.param)
    launch(request.param, folder)
    return request.param, folder, json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stage", ["AlignmentTrainer", "DistillationTrainer"])
class TestTrainers:
    def test_losses_are_those_of_one_process(self, alone: Any, together: Any, case: str, stage: str) -> None:
        engine, _, found = together
        expected, given = alone[1][case], found[case]
        assert (expected["processes"], given["processes"]) == (1, 2)
        shards_teacher = bool(CASES[case].get("shard_teacher"))
        assert given[f"{stage} sharded"] == ([True, shards_teacher] if engine == "fsdp2" else [False, False])
        half = CASES[case].get("dtype") == "bfloat16"
        assert len(given[stage]) == 4
        assert given[stage] == pytest.approx(expected[stage], rel=2e-2 if half else 1e-4)
        assert given[f"{stage} kl"] == pytest.approx(expected[f"{stage} kl"], rel=3e-2 if half else 1e-4)

    def test_a_sharded_head_is_called_once_a_step(self, together: Any, case: str, stage: str) -> None:
        """However many chunks its logits come in: before torch 2.13 the second finds it freed in the backward pass."""
        engine, _, found = together
        calls = [found[case][f"{stage}{when} head calls"] for when in ("", " resumed,")]
        if stage == "AlignmentTrainer":
            assert calls == [0, 0]
        elif engine == "fsdp2":
            assert calls == [4, 2]
        else:
            assert calls[0] > 4 and calls[1] > 2

    def test_going_on_from_a_checkpoint_changes_nothing(self, together: Any, case: str, stage: str) -> None:
        _, _, found = together
        assert found[case][f"{stage} resumed"] == pytest.approx(found[case][stage], rel=1e-6)

    def test_saved_models_are_ordinary_hybrids(self, alone: Any, together: Any, case: str, stage: str) -> None:
        """Same files, tensors and dtypes as from one process; fp32 decay, one tied head, no teacher."""
        here, there = (folder / str(list(CASES).index(case)) / f"{stage}_model" for folder in (alone[0], together[1]))
        assert {path.name for path in here.iterdir()} == {path.name for path in there.iterdir()}
        assert json.loads((here / "config.json").read_text()) == json.loads((there / "config.json").read_text())
        expected, given = load_file(here / "model.safetensors"), load_file(there / "model.safetensors")
        assert expected.keys() == given.keys()
        half = CASES[case].get("dtype") == "bfloat16"
        for name, tensor in expected.items():
            assert given[name].dtype == tensor.dtype, name
            if name.endswith(("A_log", "dt_bias", "gk_bias")):
                assert tensor.dtype == torch.float32
            torch.testing.assert_close(given[name], tensor, rtol=0, atol=3e-2 if half else 2e-4, msg=name)
        model = AutoModelForCausalLM.from_pretrained(there)
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert tied == (CASES[case]["family"] == "qwen2") == ("lm_head.weight" not in given)


@pytest.mark.parametrize(("engine", "kind"), [("ddp", "on the fly"), ("fsdp2", "top k")])
def test_a_run_ends_with_the_same_scores_and_weights(
    engine: str, kind: str, sources: tuple[Path, Path], tmp_path: Path
) -> None:
    """Rows come from a stream of the main process, or the teacher's top k goes with them; each is seen once."""
    given = tiny_recipe(*sources)
    given["training"]["logging_steps"] = 1
    if kind == "on the fly":
        given["data"] |= {"on_the_fly": True}
    else:
        given["distill"] |= {"teacher_topk": 20}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(given))
    recipe = Recipe.from_dict(given)
    (tmp_path / "alone").mkdir()
    with recorded(tmp_path / "alone" / "rows"):
        alone = run_recipe(recipe, tmp_path / "alone" / "run")
    said = launch(engine, tmp_path / "run", tmp_path / "recipe.yaml")
    assert said.count("The model is in") == 1
    result = run_recipe(recipe, tmp_path / "run")
    assert result.already_finished and result.selected == alone.selected
    pairs = zip(alone.scores.scores, result.scores.scores, strict=True)
    assert all(found.per_sequence == pytest.approx(score.per_sequence, rel=1e-4) for score, found in pairs)
    for key in ("kl", "kl_sem", "perplexity"):
        assert result.report["evaluation"][key] == pytest.approx(alone.report["evaluation"][key], rel=1e-3), key
    expected, found = (load_file(r.folder / "model" / "model.safetensors") for r in (alone, result))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4, msg=name)
    assert not list(result.folder.glob("*_checkpoints")) and not list(result.folder.glob("*.partial*"))
    for stage, artefact in (("align", "aligned"), ("distill", "distilled"), ("finetune", "finetuned")):
        files = [tmp_path / "alone" / "rows" / f"{stage}_checkpoints-0.jsonl"]
        files += [tmp_path / "rows" / f"{stage}_checkpoints-{rank}.jsonl" for rank in (0, 1)]
        whole, *halves = (path.read_text().splitlines() for path in files)
        assert len(halves[0]) == len(halves[1]) == len(whole) / 2 > 0
        assert Counter(halves[0] + halves[1]) == Counter(whole) and len(set(whole)) == len(whole)
        losses = [
            [entry["loss"] for entry in json.loads(path.read_text())["log_history"] if "loss" in entry]
            for path in (folder / "run" / artefact / "trainer_state.json" for folder in (tmp_path / "alone", tmp_path))
        ]
        assert len(losses[0]) > 3 and losses[1] == pytest.approx(losses[0], rel=1e-4), stage


def test_a_sharded_teacher_beside_scores_is_refused(sources: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = tiny_recipe(*sources) | {"training": {"use_cpu": True, "shard_teacher": True}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(AssertionError, match="shard_teacher is on under FSDP2, but method='ga-s2' restores layers"):
        launch("fsdp2", tmp_path / "run", tmp_path / "recipe.yaml")
    assert not (tmp_path / "run" / "data").exists()


def test_jobs_share_the_scores_of_a_run(
    finished: RunResult, sources: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two jobs at once score two layers each; the run then has the scores of a run that made them all."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe(*sources)))
    command = ["score", "--recipe", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "run"), "--layers"]
    assert cli([*command, "0-1"]) == 2
    assert "has no data yet; first make it: hf-hybrid run" in capsys.readouterr().err
    recipe = Recipe.from_dict(tiny_recipe(*sources))
    copy_run(finished.folder, tmp_path / "run", "score")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    jobs = [
        subprocess.Popen(
            [sys.executable, "-m", "hf_hybrid", *command, layers], env=environment, stdout=subprocess.PIPE, text=True
        )
        for layers in ("0,3", "1-2")
    ]
    said = [job.communicate(timeout=PATIENCE)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0] and all("Kept in" in text for text in said)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "scores").glob("layer_*.json")}
    assert len(made) == 4
    result = run_recipe(recipe, tmp_path / "run", stop_after="select")
    assert {path: path.stat().st_mtime_ns for path in made} == made
    kl = [[score.per_sequence for score in scores.scores] for scores in (result.scores, finished.scores)]
    assert kl[0] == kl[1] and result.selected == finished.selected


def test_every_shipped_configuration_is_one_of_accelerate() -> None:
    """accelerate refuses keys that it does not know; DeepSpeed's settings are checked against its plugin's fields."""
    folder = ROOT / "recipes" / "accelerate"
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED"}
    assert {path.stem for path in folder.iterdir()} == set(kinds)
    known = {action.dest for action in launch_command_parser()._actions}
    for name, kind in kinds.items():
        config = load_config_from_file(str(folder / f"{name}.yaml"))
        assert config.distributed_type == kind
        assert set(config.deepspeed_config) | set(config.fsdp_config) <= known
    assert load_config_from_file(str(folder / "zero2.yaml")).deepspeed_config["zero_stage"] == 2


def test_sharding_the_students_weights_with_deepspeed_is_refused() -> None:
    plugin = SimpleNamespace(zero_stage=3)
    with pytest.raises(ValueError, match="ZeRO stage 3 leaves a student .* use FSDP2"):
        check_zero_stage(SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)))
    plugin.zero_stage = 2
    check_zero_stage(SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)))


def test_rows_are_not_shared_by_processes():
    for name in ("cp_size", "sp_size"):
        config = SimpleNamespace(**{"cp_size": 1, "sp_size": 1, name: 2})
        with pytest.raises(ValueError, match=f"parallelism_config has {name}=2, but a linear layer needs the whole"):
            check_whole_rows(SimpleNamespace(parallelism_config=config))
    check_whole_rows(SimpleNamespace(parallelism_config=SimpleNamespace(cp_size=1)))
    check_whole_rows(SimpleNamespace(parallelism_config=None))
