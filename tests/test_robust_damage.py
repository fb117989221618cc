"""Files that were damaged after they were whole: what is not used is named, and what can go on goes on."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import Case
from safetensors.torch import save_file

from hf_hybrid.run.recipe import Recipe
from hf_hybrid.run.runner import run_recipe
from hf_hybrid.run.stages import Event
from hf_hybrid.trainers.checkpoints import newest_checkpoint, seal


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path, byte: int = 10) -> None:
    """Flips a bit; by default of a safetensors file's header."""
    data = bytearray(path.read_bytes())
    data[byte] ^= 0x80
    path.write_bytes(data)


def tensor_in(path: Path) -> int:
    """Where the first byte of the first tensor is in what torch.save wrote."""
    with zipfile.ZipFile(path) as entries:
        offset = entries.getinfo(f"{path.stem}/data/0").header_offset
    data = path.read_bytes()
    return offset + 30 + sum(int.from_bytes(data[offset + at : offset + at + 2], "little") for at in (26, 28))


def noise(path: Path) -> None:
    """Other bytes, as many as before."""
    path.write_bytes(os.urandom(path.stat().st_size))


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_damaged_weights_of_an_artefact(damage: Callable, case: Case) -> None:
    weights = case.at("distill").folder / "aligned" / "model.safetensors"
    whole = weights.read_bytes()
    damage(weights)
    assert "aligned is damaged: model.safetensors " in (line := case.fails()) and "--from align" in line
    weights.write_bytes(whole)
    case.ends("--stop-after", "distill")


def test_damaged_weights_made_again(case: Case) -> None:
    cut(case.at("score").folder / "aligned" / "model.safetensors")
    case.fails()
    case.ends("--from", "align", "--stop-after", "align")


def test_damaged_rows(case: Case) -> None:
    cut(next((case.at("align").folder / "data" / "train").rglob("*.arrow")))
    assert "data is damaged: train/" in case.fails()


@pytest.mark.parametrize(("name", "stage"), [("scores", "select"), ("selection", "distill"), ("evaluation", "model")])
def test_damaged_json(name: str, stage: str, case: Case) -> None:
    cut(case.at(stage).folder / f"{name}.json")
    assert f"{name}.json is damaged" in case.fails()


def test_a_damaged_recipe(case: Case) -> None:
    recipe = case.at("align").folder / "recipe.yaml"
    whole = recipe.read_bytes()
    cut_short = whole[: whole.index(b"finetune:")]  # YAML still
    for given, message in (
        (b"", "recipe.yaml is damaged"),
        (cut_short, "belongs to another recipe (finetune"),
    ):
        recipe.write_bytes(given)
        assert message in case.fails()


def test_a_damaged_score_of_one_layer(case: Case) -> None:
    case.at("select")
    (case.folder / "scores.json").unlink()
    cut(case.folder / "scores" / "layer_001.json")
    assert "layer_001.json is damaged" in case.fails()
    (case.folder / "scores" / "layer_001.json").write_text("{}")
    assert "layer_001.json holds no result" in case.fails()
    (case.folder / "scores" / "layer_001.json").unlink()
    case.ends("--stop-after", "score")


@pytest.mark.parametrize("damage", [cut, flip])
def test_a_damaged_teacher(damage: Callable, case: Case) -> None:
    weights = case.at("align").teacher / "model.safetensors"
    whole = weights.read_bytes()
    damage(weights)
    assert "the weights in teacher are damaged" in case.fails()
    weights.write_bytes(whole)
    case.ends("--stop-after", "align")


def test_damaged_checkpoints_are_passed_over(tmp_path: Path) -> None:
    for step in range(2, 20, 2):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text('{"global_step": 2}')
        torch.save({"moments": torch.ones(100)}, folder / "optimizer.pt")
        save_file({"weight": torch.ones(3)}, folder / "model.safetensors")
        if step != 18:
            seal(folder)
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    (tmp_path / "checkpoint-6" / "optimizer.pt").write_bytes(b"mom")
    flip(tmp_path / "checkpoint-8" / "model.safetensors", 10)  # in the header
    flip(tmp_path / "checkpoint-10" / "optimizer.pt", tensor_in(tmp_path / "checkpoint-10" / "optimizer.pt"))
    flip(tmp_path / "checkpoint-12" / "optimizer.pt", 2)  # in the signature
    noise(tmp_path / "checkpoint-14" / "optimizer.pt")
    noise(tmp_path / "checkpoint-16" / "trainer_state.json")
    size = (tmp_path / "checkpoint-2" / "optimizer.pt").stat().st_size
    notes: list[str] = []
    assert newest_checkpoint(tmp_path, notes.append) == tmp_path / "checkpoint-2"
    assert [note.split("); it is removed")[0].split(": ")[0] for note in notes] == [
        "checkpoint-18 is damaged (it has no files.json",
        "checkpoint-16 is damaged (trainer_state.json is no JSON",
        "checkpoint-14 is damaged (optimizer.pt was not written by torch.save",
        "checkpoint-12 is damaged (optimizer.pt does not match its checksum in optimizer/data.pkl",
        "checkpoint-10 is damaged (optimizer.pt does not match its checksum in optimizer/data/0",
        "checkpoint-8 is damaged (model.safetensors is no safetensors file",
        f"checkpoint-6 is damaged (optimizer.pt has 3 bytes of {size}",
        "checkpoint-4 is damaged (optimizer.pt is missing",
    ]


@pytest.mark.parametrize("left", [1, 0])
def test_a_damaged_checkpoint_is_told_and_the_run_goes_on(
    left: int, case: Case, capsys: pytest.CaptureFixture
) -> None:
    """From the checkpoint before it, or from the stage's start; to the same end."""
    case.at("align")
    recipe = Recipe.from_dict(case.recipe)

    def stop(event: Event) -> None:
        if (event.kind, event.done) == ("step", 7 if left else 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, case.folder, stop_after="align", progress=stop)
    checkpoints = sorted((case.folder / "align_checkpoints").iterdir())
    assert len(checkpoints) == left + 1
    noise(checkpoints[-1] / "optimizer.pt")
    events: list[Event] = []
    run_recipe(recipe, case.folder, stop_after="align", progress=events.append)
    notes = [event.text for event in events if (event.kind, event.stage) == ("note", "align")]
    assert notes[0].startswith(f"{checkpoints[-1].name} is damaged (optimizer.pt was not written by torch.save")
    # From the stage's start, it is calibrated again.
    after = [note for note in notes[1:] if not note.startswith("calibration")]
    assert after == ([f"going on from {checkpoints[0].name}"] if left else [])
    assert (len(after) < len(notes[1:])) is (left == 0)
    case.ends("--stop-after", "align")
