"""What a power cut leaves: contents are on the disk before the name is, and the name before work goes on."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hf_hybrid.run.folder import publish
from hf_hybrid.trainers.checkpoints import damage, seal
from hf_hybrid.trainers.durable import read_json, read_record, settle, write_json
from hf_hybrid.trainers.scoring.scores import LayerScore


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is brought to the disk, by inode, and which names are given, in order."""
    happened: list[Any] = []
    sync, replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        happened.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def rename(source: Any, target: Any) -> None:
        happened.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    return happened


def inode(path: Path) -> int:
    return path.stat().st_ino


def test_a_json_file(tmp_path: Path, disk: list[Any]) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    assert disk == [inode(tmp_path / "a.json"), "a.json", inode(tmp_path)]
    assert read_json(tmp_path / "a.json") == {"a": 1} and read_json(tmp_path / "b.json") is None


def test_a_file_that_a_library_wrote(tmp_path: Path, disk: list[Any]) -> None:
    (tmp_path / "new").write_bytes(b"weights")
    settle(tmp_path / "new", tmp_path / "model.safetensors")
    assert disk == [inode(tmp_path / "model.safetensors"), "model.safetensors", inode(tmp_path)]


@pytest.mark.parametrize("listed", [False, True])
def test_a_published_folder(tmp_path: Path, disk: list[Any], listed: bool) -> None:
    with publish(tmp_path / "model", listed=listed) as partial:
        (partial / "deep" / "er").mkdir(parents=True)
        for name in ("config.json", "deep/one", "deep/er/two"):
            (partial / name).write_text(json.dumps(name))
    named = disk.index("model")
    model = tmp_path / "model"
    assert set(disk[:named]) >= {inode(path) for path in [model, *model.rglob("*")]}
    assert disk[named:] == ["model", inode(tmp_path)]
    assert damage(model) == (None if listed else "it has no files.json")


def test_a_sealed_checkpoint(tmp_path: Path, disk: list[Any]) -> None:
    for name in ("model.safetensors", "optimizer.pt"):
        (tmp_path / name).write_bytes(bytes(100))
    seal(tmp_path)
    named = disk.index("files.json")
    assert set(disk[:named]) >= {inode(path) for path in tmp_path.iterdir()}
    assert disk[named:] == ["files.json", inode(tmp_path)]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "a.json", 1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "a.json", 2)
    assert read_json(tmp_path / "a.json") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_many_may_write_one_file_at_once(tmp_path: Path) -> None:
    """As jobs do that share a run's scores: none fails, and whoever reads meanwhile sees one of the texts whole."""
    texts = [[number] * 3000 for number in range(4)]

    def write(data: list[int]) -> None:
        for _ in range(50):
            write_json(tmp_path / "a.json", data)
            assert read_json(tmp_path / "a.json") in texts

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, texts))
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("text", ["[1, 2", "", "\x00\x00\x00"])
def test_what_is_no_json_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json is damaged \(.*; delete it, and the same call makes it again"):
        read_json(tmp_path / "a.json")


def test_a_record_with_other_fields_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"layer": 1, "loss": 2.0})
    with pytest.raises(ValueError, match=r"a\.json holds no LayerScore \(.*'loss'"):
        read_record(LayerScore, tmp_path / "a.json")
