"""Models that cannot be taken: each gets one sentence that names it, from the command line and in Python."""

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import tiny_recipe
from safetensors.torch import load_file, save_file
from teachers import tiny_teacher
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    Gemma3Config,
    LlamaConfig,
    LlavaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_hybrid as hh
from hf_hybrid import cli
from hf_hybrid.teacher.loading import load_model, load_pair


SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def configured(**changes: Any) -> Callable[[Path], None]:
    """Another config.json for the same weights; None removes a key."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config |= changes
        kept = {key: value for key, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return change


def layers(number: int) -> Callable[[Path], None]:
    return configured(num_hidden_layers=number, layer_types=["full_attention"] * number)


def written(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def without(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Other weights for the same config."""

    def rewrite(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return rewrite


def relabelled_llama(folder: Path) -> None:
    tiny_teacher("llama", vocab_size=300).save_pretrained(folder)
    configured(model_type="qwen2", architectures=["Qwen2ForCausalLM"])(folder)


def truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def sharded(folder: Path) -> None:
    """Three files of which one is missing."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="150KB")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def only_gguf(folder: Path) -> None:
    emptied(folder)
    (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF")


def parent(folder: Path) -> None:
    """The model one folder deeper."""
    folder.rename(folder.with_name("moved"))
    folder.mkdir()
    folder.with_name("moved").rename(folder / "model")


def replaced(make: Callable[[], Any]) -> Callable[[Path], None]:
    """Another model beside the tokenizer."""

    def save(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        make().save_pretrained(folder)

    return save


def t5() -> Any:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=300, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    )


def gemma3() -> Any:
    vision = {**SMALL, "image_size": 16, "patch_size": 8}
    config = Gemma3Config(
        text_config={**SMALL, "vocab_size": 300, "head_dim": 16, "num_key_value_heads": 2},
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=299,
    )
    return AutoModelForCausalLM.from_config(config)


def llava() -> Any:
    vision = {**SMALL, "image_size": 16, "patch_size": 8, "model_type": "clip_vision_model"}
    config = LlavaConfig(text_config=LlamaConfig(vocab_size=300, **SMALL), vision_config=vision)
    return AutoModel.from_config(config)


def bert() -> Any:
    return AutoModelForCausalLM.from_config(BertConfig(vocab_size=300, is_decoder=True, **SMALL))


def base_model() -> Any:
    return tiny_teacher("qwen3", vocab_size=300).base_model


def three_heads(folder: Path) -> None:
    """A Llama, for Qwen3's heads have a width of their own."""
    replaced(lambda: AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=300, **SMALL)))(folder)
    configured(num_attention_heads=3)(folder)


def quantised_to_nothing_known(folder: Path) -> None:
    configured(quantization_config={"quant_method": "magic", "bits": 3})(folder)


def bad_tensor(value: float) -> Callable[[Path], None]:
    return tensors(lambda weights: weights["model.layers.1.mlp.up_proj.weight"][0].fill_(value))


Q = "model.layers.1.self_attn.q_proj.weight"
HEADER = struct.pack("<Q", 8) + b'{"a": 1}'
# What is done to the folder of a good teacher, and what is then said of it.
FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "more layers in the config": (layers(6), "22 tensors (model.layers.4.input_layernorm.weight, "),
    "fewer layers in the config": (layers(2), "22 tensors (model.layers.2.input_layernorm.weight, "),
    "a Llama as Qwen2": (relabelled_llama, "12 tensors (model.layers.0.self_attn.k_proj.bias, "),
    "another vocabulary": (
        configured(vocab_size=200),
        "2 tensors (lm_head.weight, model.embed_tokens.weight) are of another shape (the first is [300, 64], the "
        "config wants [200, 64])",
    ),
    "another width": (configured(hidden_size=32, head_dim=24), "are of another shape (the first is "),
    "other key heads": (configured(num_key_value_heads=4), "8 tensors (model.layers.0.self_attn.k_proj.weight, "),
    "a tensor lost": (tensors(lambda w: w.pop(Q)), f"1 tensor ({Q}) is missing"),
    "a tensor renamed": (
        tensors(lambda w: w.update(extra=w.pop(Q))),
        f"1 tensor ({Q}) is missing; 1 tensor (extra) is left over",
    ),
    "a tensor added": (
        tensors(lambda w: w.update({"score.weight": torch.zeros(1, 64)})),
        "1 tensor (score.weight) is left over",
    ),
    "a tensor transposed": (
        tensors(lambda w: w.update({Q: w[Q].T.contiguous()})),
        "(the first is [64, 96], the config wants [96, 64])",
    ),
    "the model without its head": (replaced(base_model), "1 tensor (lm_head.weight) is missing"),
    "heads that do not divide": (three_heads, "(32) is not a multiple of the number of attention heads (3)"),
    "no heads": (configured(num_attention_heads=0), "does not load"),
    "a negative width": (configured(hidden_size=-64), "does not load"),
    "words for a number": (configured(hidden_size="wide"), "does not load"),
    "a list for a number": (configured(num_hidden_layers=[4]), "does not load"),
    "an unknown activation": (configured(hidden_act="zigzag"), "zigzag"),
    "an unknown rotary type": (configured(rope_parameters={"rope_type": "spiral"}), "does not load"),
    "layer types that do not fit": (configured(layer_types=["full_attention"]), "does not load"),
    "an unknown layer type": (configured(layer_types=["psychic_attention"] * 4), "`layer_types` entries must be in ("),
    "a dtype that is none": (configured(dtype="float17"), "float17"),
    "no model type": (configured(model_type=None), "holds no model that transformers knows"),
    "an unknown model type": (configured(model_type="qwen99"), "is of the type 'qwen99', which transformers"),
    "an empty config": (written("config.json", b"{}"), "holds no model that transformers knows"),
    "a config that is a list": (written("config.json", b"[1, 2]"), "the config.json of mine is a list"),
    "a config that is empty": (written("config.json", b""), "is not a valid JSON file"),
    "a config cut off": (written("config.json", b'{"model_type": "qwen3", '), "is not a valid JSON file"),
    "a config of bytes": (written("config.json", bytes(range(128, 256))), "is not a valid JSON file"),
    "no config": (without("config.json"), "has no config.json (it holds generation_config.json, model.safetensors, "),
    "no weights": (without("model.safetensors"), "holds no complete model"),
    "only a pickle": (pickled, "has no safetensors weights"),
    "weights cut off": (truncated, "are damaged"),
    "weights of no bytes": (written("model.safetensors", b""), "are damaged"),
    "weights of zeros": (written("model.safetensors", bytes(4096)), "are damaged"),
    "weights that are a page": (written("model.safetensors", b"<!DOCTYPE html><html>not found</html>"), "are damaged"),
    "weights left in Git LFS": (
        written("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"),
        "are damaged",
    ),
    "weights with a strange header": (written("model.safetensors", HEADER), "are damaged"),
    "a shard missing": (sharded, "holds no complete model"),
    "an index cut off": (
        lambda folder: (
            without("model.safetensors")(folder) or written("model.safetensors.index.json", b'{"weight_map": ')(folder)
        ),
        "does not load",
    ),
    "an index without a map": (
        lambda folder: (
            without("model.safetensors")(folder)
            or written("model.safetensors.index.json", b'{"metadata": {}}')(folder)
        ),
        "does not load",
    ),
    "an empty folder": (emptied, "has no config.json (it is empty)"),
    "a GGUF file in a folder": (only_gguf, "model-Q4_K_M.gguf is no GGUF file, or only the beginning of one"),
    "the folder above": (parent, "did you mean "),
    "no tokenizer": (
        without("tokenizer.json", "tokenizer_config.json"),
        "mine has no tokenizer; save the model's in that folder",
    ),
    "a tokenizer cut off": (written("tokenizer.json", b'{"version": "1.0", '), "has no tokenizer that loads"),
    "an encoder-decoder": (replaced(t5), "holds a model of T5Config that is no causal language model"),
    "an encoder": (replaced(bert), "BertLMHeadModel has no list of 2 decoder layers with a self_attn"),
    "a vision model": (replaced(gemma3), "is a composite model (Gemma3Config)"),
    "another vision model": (replaced(llava), "holds a model of LlavaConfig that is no causal language model"),
    "a hybrid": (
        replaced(lambda: hh.convert(tiny_teacher("qwen3", vocab_size=300), [1])),
        "is a hybrid already",
    ),
    "NaN in the weights": (
        bad_tensor(float("nan")),
        "model.layers.1.mlp.up_proj.weight holds values that are not finite in float32",
    ),
    "infinity in the weights": (
        bad_tensor(float("inf")),
        "model.layers.1.mlp.up_proj.weight holds values that are not finite in float32",
    ),
    "an unknown quantisation": (quantised_to_nothing_known, "mine is quantised (magic)"),
    "code of its own": (
        configured(auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}, model_type="mine"),
        "needs code of its own",
    ),
}
# Names that are no folder with a model. None of them asks the Hub.
NAMES = {
    "./nope": "there is no folder ./nope; check the path",
    "../nope/model": "there is no folder ../nope/model",
    "/nope": "there is no folder /nope",
    "~/nope": "there is no folder ~/nope (~ is not expanded here",
    "a/b/c": "there is no folder a/b/c",
    "models\\mine": "there is no folder models\\mine",
    "nope.gguf": "there is no GGUF file nope.gguf here; check the path",
    "nope/model.safetensors": "there is no folder nope/model.safetensors",
    "file.txt": "file.txt is a file; give the folder that holds the model",
    "model.gguf": "model.gguf is no GGUF file, or only the beginning of one",
    "": "the model's name is empty",
    " ": "the model's name is empty",
    "two words": "'two words' is neither a folder here nor a possible name on the Hub",
    "me/a--b": "'me/a--b' is neither a folder here nor a possible name on the Hub",
    "https://huggingface.co/me/model": "there is no folder https://huggingface.co/me/model",
}
_ONLY_WITH_A_TOKENIZER = ("no tokenizer", "a tokenizer cut off")


@pytest.fixture
def bad(sources: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Makes, in a folder of its own, the teacher `mine` that is bad in the way named; returns what is said of it."""
    monkeypatch.chdir(tmp_path)

    def make(name: str) -> str:
        change, message = FOLDERS[name]
        shutil.copytree(sources[0], "mine")
        change(Path("mine"))
        return message

    return make


def sentence(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The one line on stderr with which the command fails; only what it was about to do may stand before it."""
    capsys.readouterr()
    code = cli.main(list(arguments))
    notes = ("run ", "evaluate ", "Loading ")
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if not line.startswith(notes)]
    assert code == 2 and len(lines) == 1, lines
    assert lines[0].startswith("hf-hybrid: ")
    assert len(lines[0]) < 700
    return lines[0]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder(name: str, bad: Callable[[str], str], capsys: pytest.CaptureFixture) -> None:
    message = bad(name)
    line = sentence(capsys, "convert", "mine", "--full-attention-layers", "1", "--output", "out")
    assert message in line
    assert not os.path.exists("out")
    if name not in _ONLY_WITH_A_TOKENIZER:
        with pytest.raises(ValueError) as raised:
            hh.convert("mine", [1])
        assert message in " ".join(str(raised.value).split())


@pytest.mark.parametrize("name", NAMES)
def test_a_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file.txt").write_text("no model")
    Path("model.gguf").write_bytes(b"GGUF")
    # With the Hub as it is outside the tests, any call to it takes long and fails.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    start = time.monotonic()
    line = sentence(capsys, "convert", name, "--full-attention-layers", "1", "--output", "out")
    assert NAMES[name] in line
    for load in (load_pair, load_model, lambda given: hh.convert(given, [1])):
        with pytest.raises(ValueError) as raised:
            load(name)
        assert NAMES[name] in str(raised.value)
    assert time.monotonic() - start < 15


# A few kinds for each of the other commands: they load models the same way.
KINDS = [
    "more layers in the config",
    "fewer layers in the config",
    "another vocabulary",
    "weights cut off",
    "a shard missing",
    "a config cut off",
    "no model type",
    "no config",
    "an empty folder",
    "no tokenizer",
    "an encoder-decoder",
    "NaN in the weights",
]


def commands(teacher: str, texts: Path) -> dict[str, list[str]]:
    Path("recipe.yaml").write_text(json.dumps(tiny_recipe(teacher, str(texts))))
    score = ["score", teacher, "--method", "zero-shot", "--k", "1", "--data-files", f"{texts}/*"]
    return {
        "run": ["run", "recipe.yaml", "--output", "out"],
        "score": [*score, "--block-size", "32", "--output", "out"],
        "evaluate": ["evaluate", teacher],
        "evaluate beside it": ["evaluate", "good", "--teacher", teacher],
    }


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_given_to_the_other_commands(
    name: str, bad: Callable[[str], str], sources: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    message = bad(name)
    Path("good").symlink_to(sources[0])
    for command, arguments in commands("mine", sources[1]).items():
        assert message in sentence(capsys, *arguments), command


@pytest.mark.parametrize("name", ["./nope", "nope.gguf", "model.gguf", "", "two words"])
def test_a_name_given_to_the_other_commands(
    name: str,
    sources: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good").symlink_to(sources[0])
    Path("model.gguf").write_bytes(b"GGUF")
    for command, arguments in commands(name, sources[1]).items():
        line = sentence(capsys, *arguments)
        assert NAMES[name] in line or (name == "" and "teacher" in line), (command, line)


# What is done to the folder of a finished hybrid, and what `push` and `evaluate` then say.
HYBRIDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights cut off": (truncated, "damaged"),
    "no weights": (without("model.safetensors"), "model.safetensors"),
    "no config": (without("config.json"), "config.json"),
    "a config cut off": (written("config.json", b'{"model_type": '), "JSON"),
    "a config that is a list": (written("config.json", b"[]"), "the config.json of mine is a list"),
    "another model's config": (configured(model_type="llama"), "mine"),
    "other layers linear": (
        lambda folder: nested(folder, layer_types=["full_attention", *["linear_attention"] * 3]),
        "mine",
    ),
    "an unknown mixer": (configured(mixer="rwkv9"), "mixer='rwkv9' is unknown"),
    "no teacher's config": (configured(text_config=None), "the config.json of mine has lost its text_config"),
    "a tensor lost": (tensors(lambda w: w.pop("model.layers.0.self_attn.A_log")), "A_log) is missing"),
}


def nested(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    configured(text_config=config["text_config"] | changes)(folder)


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_hybrid_that_is_damaged(
    name: str,
    sources: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["convert", str(sources[0]), "--full-attention-layers", "1", "--output", "mine"]) == 0
    change, message = HYBRIDS[name]
    change(Path("mine"))
    assert message in sentence(capsys, "evaluate", "mine")
    if name != "other layers linear":  # as many layers of each kind: only loading it shows
        sentence(capsys, "push", "mine", "me/mine", "--dry-run")


def test_a_folder_that_may_not_be_read(bad: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As root nothing is forbidden, so the system's refusal is made up."""
    bad("no tokenizer")

    def refuse(*args: Any) -> Any:
        raise PermissionError(13, "Permission denied", "mine")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(
        ValueError, match=r"the folder mine cannot be read \(Permission denied\); change its permissions"
    ):
        hh.convert("mine", [1])


def tied(folder: Path) -> None:
    replaced(lambda: tiny_teacher("qwen2", vocab_size=300))(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")


def tied_and_stored(folder: Path) -> None:
    tied(folder)
    tensors(lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))(folder)


def in_shards(folder: Path) -> None:
    replaced(lambda: tiny_teacher("qwen3", vocab_size=300))(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="150KB")


@pytest.mark.parametrize(
    "change",
    [
        tied,
        tied_and_stored,
        in_shards,
        # Checkpoints of before hold a table of angles in each layer.
        tensors(
            lambda w: w.update({f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(12) for i in range(4)})
        ),
    ],
)
def test_what_is_no_mistake(change: Callable[[Path], None], sources: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(sources[0], folder)
    change(folder)
    assert hh.convert(folder, [1]).conversion_report.logit_difference == 0
