"""The starter recipe: it fits the teacher and the text, passes a run's checks, and runs; what cannot be is refused."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from gguf_files import write_gguf
from runs import save_teacher, save_texts
from teachers import tiny_teacher

from hf_hybrid.cli import main
from hf_hybrid.run import starter
from hf_hybrid.run.footprint import footprint
from hf_hybrid.run.recipe import Recipe
from hf_hybrid.teacher.loading import empty_teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("models") / "teacher", max_position_embeddings=300)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_texts(tmp_path_factory.mktemp("texts") / "texts")


def init(*given: object) -> int:
    return main(["init", *map(str, given)])


def test_embedded_teacher_has_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    assert init("embedded", "--output", path, "--tokens", 6000, "--k", 3) == 0
    recipe = Recipe.load(path)
    assert (recipe.teacher, recipe.data.source, recipe.select.k) == ("embedded", "embedded-demo", 3)
    assert (recipe.align.tokens, recipe.score.tokens_per_layer, recipe.distill.tokens) == (5000, 1200, 6000)


def test_another_mixer_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    assert init("embedded", "--output", path, "--mixer", "sliding_window") == 0
    recipe = Recipe.load(path)
    assert (recipe.mixer, recipe.mixer_options) == ("sliding_window", {"window": 128, "sinks": 4})
    assert init("embedded", "--output", path, "--mixer", "kimi_delta_attention", "--force") == 0
    assert Recipe.load(path).mixer == "kimi_delta_attention" and not Recipe.load(path).mixer_options
    assert init("embedded", "--output", path, "--mixer", "window", "--force") == 2
    assert "mixer='window' is unknown; choose one of ['gated_deltanet'" in capsys.readouterr().err


def test_recipe_fits_teacher_and_text(teacher: Path, texts: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    files = f"{texts}/*.py"
    given = ("--output", path, "--fraction", 0.5, "--tokens", 100_000)
    assert init(teacher, *given, "--data-files", files) == 0
    recipe = Recipe.load(path)
    assert recipe.data.text_files == [files] and recipe.select.k == 2
    assert recipe.data.block_size <= 300, "rows longer than the teacher's positions"
    assert (recipe.align.tokens, recipe.score.tokens_per_layer) == (20_000, 5_000)
    available = sum(file.stat().st_size for file in texts.iterdir()) // 4
    held_out = recipe.data.held_out_rows + recipe.data.report_rows
    for stage in recipe.stages().values():
        assert (held_out + stage.batch_size) * recipe.data.block_size < available
    # What was given is not shrunk.
    assert init(teacher, *given, "--data-files", files, "--block-size", 250, "--rows", 7, "--force") == 0
    recipe = Recipe.load(path)
    assert (recipe.data.block_size, recipe.data.held_out_rows) == (250, 7)


def test_recipe_runs(teacher: Path, texts: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    given = ("--data-files", f"{texts}/*.py", "--tokens", 4000, "--k", 1, "--output", path)
    assert init(teacher, *given) == 0
    assert main(["run", str(path), "--output", str(tmp_path / "run")]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert len(report["selected"]) == 1


def test_only_the_config_of_a_teacher_is_read(teacher: Path, tmp_path: Path) -> None:
    copy = tmp_path / "teacher"
    shutil.copytree(teacher, copy)
    next(copy.glob("*.safetensors")).write_bytes(b"no weights")
    assert all(parameter.is_meta for parameter in empty_teacher(str(copy)).parameters())
    assert init(copy, "--output", tmp_path / "recipe.yaml") == 0


def test_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_teacher("llama", vocab_size=300))
    assert init(path, "--output", tmp_path / "recipe.yaml") == 0
    assert Recipe.load(tmp_path / "recipe.yaml").teacher == str(path)
    assert "4 layers" in (tmp_path / "recipe.yaml").read_text()


def test_footprint_is_that_of_the_models(teacher: Path) -> None:
    import hf_hybrid as hh

    model = tiny_teacher("qwen2")
    student = hh.convert(model, [])
    sizes = footprint(model, torch.float32)
    assert sizes.teacher_parameters == sum(p.numel() for p in model.parameters())
    assert sizes.student_parameters == sum(p.numel() for p in student.parameters())
    assert sizes.mixer_parameters == sum(
        p.numel() for layer in student.model.layers for p in layer.self_attn.parameters()
    )


@pytest.mark.parametrize(
    ("stage", "checkpointing", "top_mib"),
    [("distill", False, 1709), ("distill", True, 1323), ("align", False, 602), ("align", True, 521)],
)
def test_memory_model_agrees_with_what_was_measured(stage: str, checkpointing: bool, top_mib: int) -> None:
    """Against the table of docs/memory.md, for the teacher that it was measured on."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=1536,
        vocab_size=32768,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        sizes = footprint(AutoModelForCausalLM.from_config(config), torch.float32)
    estimate = sizes.stage_bytes(stage, 2, 512, half=False, checkpointing=checkpointing) / 2**20
    assert 0.85 * top_mib < estimate < 1.15 * top_mib


def test_small_device_gets_small_batches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    assert init("embedded", "--output", path) == 0
    roomy = Recipe.load(path)
    states = footprint(empty_teacher("embedded"), torch.float32).stage_bytes(
        "distill", 1, 256, half=False, checkpointing=True
    )
    monkeypatch.setattr(starter, "device_memory", lambda device: int(1.3 * states))
    assert init("embedded", "--output", path, "--force") == 0
    tight = Recipe.load(path)
    assert tight.distill.micro_batch_size < roomy.distill.micro_batch_size == roomy.distill.batch_size
    assert roomy.fingerprint() == tight.fingerprint(), "memory must not change what is made"
    monkeypatch.setattr(starter, "device_memory", lambda device: states // 2)
    assert init("embedded", "--output", path, "--force") == 0
    assert "more than there is here" in path.read_text()


def test_small_budgets_get_small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small steps reach more than few large ones at equal tokens, and large budgets have many steps anyway."""
    monkeypatch.setattr(starter, "device_memory", lambda device: 2**40)
    sizes = footprint(empty_teacher("embedded"), torch.float32)

    def batches(tokens: int) -> dict[str, int]:
        made = starter._Starter("x", sizes, torch.device("cuda"), torch.bfloat16, {"block_size": 2048}, 2, tokens)
        blocks = {"align": 512, "score": 2048, "distill": 2048}
        for name, batch in made.batches.items():
            assert batch == 8 or made.tokens[name] >= 500 * batch * blocks[name]
        return made.batches

    assert batches(2_000_000) == {"align": 8, "score": 8, "distill": 8}
    assert batches(100_000_000) == {"align": 64, "score": 8, "distill": 16}


def test_refusals(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("mine")
    hybrid = tmp_path / "hybrid"
    hybrid.mkdir()
    import hf_hybrid as hh

    hh.convert(hh.embedded_teacher(), [0]).save_pretrained(hybrid)
    new = ("--output", tmp_path / "new.yaml")
    for given, message in (
        (("embedded", "--output", path), "exists; choose another --output, or pass --force"),
        (("embedded", "--output", tmp_path), "no place for a file"),
        (("embedded", "--output", tmp_path / "nowhere" / "recipe.yaml"), "no place for a file"),
        ((tmp_path / "absent", *new), "there is no folder"),
        ((tmp_path / "absent.gguf", *new), "absent.gguf; check the path"),
        ((hybrid, *new), "is a hybrid already"),
        (("embedded", *new, "--k", 6), "nothing to choose; pass --k between 1 and 5"),
        (("embedded", *new, "--fraction", 0), "nothing to choose"),
        (("embedded", *new, "--k", 1, "--fraction", 0.5), "give one"),
        (("embedded", *new, "--tokens", 0), "--tokens 0 is too small"),
        (("embedded", *new, "--block-size", 1024), "longer than the 512 positions"),
        ((teacher, *new, "--data-files", tmp_path / "none" / "*.txt"), "matches no file"),
    ):
        start = time.perf_counter()
        assert init(*given) == 2, given
        assert message in capsys.readouterr().err, given
        assert time.perf_counter() - start < 5
    assert path.read_text() == "mine" and not (tmp_path / "new.yaml").exists()


def test_a_teacher_that_is_not_there_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    program = "import sys; from hf_hybrid.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", program, "init", str(tmp_path / "absent"), "--output", str(tmp_path / "new.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "there is no folder" in done.stderr
