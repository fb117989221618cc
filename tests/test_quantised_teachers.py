"""Teachers whose weights are not the plain ones: quantised, or with an adapter. They are made plain, or refused."""

import json
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from runs import save_teacher
from safetensors.torch import load_file, save_file
from teachers import tiny_teacher, tokens
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import hf_hybrid as hh
from hf_hybrid import cli
from hf_hybrid.teacher.loading import load_model, load_pair, load_teacher


def quantised(folder: Path, **options: bool) -> Path:
    """A folder with a teacher in 8 or 4 bits."""
    save_teacher(folder / "plain", head_dim=32, intermediate_size=128)  # rows of whole blocks of 64
    config = BitsAndBytesConfig(**options)
    AutoModelForCausalLM.from_pretrained(folder / "plain", quantization_config=config).save_pretrained(folder / "mine")
    return folder / "mine"


def fp8(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder as DeepSeek's: linear layers in FP8 with a scale for each block. And the weights that it stands for."""
    mine = save_teacher(folder / "mine")
    weights, meant = load_file(mine / "model.safetensors"), {}
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        rows, columns = weights[name].shape
        blocks = weights[name].view(rows // 8, 8, columns // 8, 8)
        scale = blocks.abs().amax((1, 3)) / 448
        weights[name] = (blocks / scale[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = scale
        meant[name] = (weights[name].float().view(rows // 8, 8, columns // 8, 8) * scale[:, None, :, None]).view(
            rows, columns
        )
    save_file(weights, mine / "model.safetensors", {"format": "pt"})
    config = json.loads((mine / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    (mine / "config.json").write_text(json.dumps(config))
    return mine, meant


def adapted(kind: type = LoraConfig, **options: object) -> torch.nn.Module:
    torch.manual_seed(1)
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"]} | options if kind is LoraConfig else options
    model = get_peft_model(tiny_teacher("qwen3", vocab_size=300), kind(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(1.0 if "ia3" in name else 0.0, 0.3)
    return model.eval()


def adapter_folder(folder: Path, base: Path | None = None) -> Path:
    model = adapted()
    model.peft_config["default"].base_model_name_or_path = str(base or save_teacher(folder / "base"))
    model.save_pretrained(folder / "mine")
    return folder / "mine"


class TestQuantised:
    def test_8_bit_is_dequantised(self, tmp_path):
        mine = quantised(tmp_path, load_in_8bit=True)
        student = hh.convert(mine, [1])
        stored, own = load_file(mine / "model.safetensors"), student.state_dict()
        for name in (name for name in stored if name.endswith(".SCB")):
            weight = name.replace("SCB", "weight")
            torch.testing.assert_close(own[weight], stored[weight].float() * stored[name][:, None] / 127)
        assert not hasattr(student.config, "quantization_config")
        assert "dequantised (bitsandbytes" in str(student.conversion_report)
        student.save_pretrained(tmp_path / "hybrid")
        assert "quantization" not in (tmp_path / "hybrid" / "config.json").read_text()

    def test_4_bit_is_dequantised(self, tmp_path):
        mine = quantised(tmp_path, load_in_4bit=True, bnb_4bit_quant_type="nf4")
        with pytest.warns(UserWarning, match="mine: its weights were dequantised .bitsandbytes"):
            teacher = load_teacher(mine)
        assert hh.convert(mine, [1]).conversion_report.logit_difference == 0
        plain = load_file(tmp_path / "plain" / "model.safetensors")
        for name, weight in teacher.state_dict().items():
            error = (weight - plain[name]).abs().max() / plain[name].abs().max()
            assert error < 0.15, name

    def test_fp8_is_dequantised(self, tmp_path):
        mine, meant = fp8(tmp_path)
        student = hh.convert(mine, [1])
        own = student.state_dict()
        for name, weight in meant.items():
            torch.testing.assert_close(own[name].float(), weight, rtol=1e-2, atol=1e-3)  # it may be in bfloat16
        assert not hasattr(student.config, "quantization_config")

    @pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
    def test_one_in_memory_is_refused(self, bits, tmp_path):
        teacher = AutoModelForCausalLM.from_pretrained(quantised(tmp_path, **{bits: True}))
        with pytest.raises(ValueError, match=r"the teacher is quantised .*give teacher.dequantize\(\)"):
            hh.convert(teacher, [1])
        assert hh.convert(teacher.dequantize(), [1]).conversion_report.logit_difference == 0


class TestAdapters:
    def test_a_folder_is_merged_into_its_base(self, tmp_path):
        mine, ids = adapter_folder(tmp_path), tokens(2, 20)
        student = hh.convert(mine, range(4))
        wanted = adapted()(ids).logits
        torch.testing.assert_close(student(ids).logits, wanted, rtol=1e-4, atol=1e-4)
        assert "its adapter was merged into its weights: its logits on 16 tokens differ by" in str(
            student.conversion_report
        )
        with pytest.warns(UserWarning, match="its adapter was merged"):
            torch.testing.assert_close(load_teacher(mine)(ids).logits, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(load_model(mine)(ids).logits, wanted, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("kind", [LoraConfig, IA3Config])
    def test_one_in_memory_is_merged_into_a_copy(self, kind):
        options = {"target_modules": ["q_proj", "v_proj"], "feedforward_modules": []} if kind is IA3Config else {}
        teacher, ids = adapted(kind, **options), tokens(2, 20)
        wanted, before = teacher(ids).logits, {name: p.clone() for name, p in teacher.named_parameters()}
        student = hh.convert(teacher, range(4))
        torch.testing.assert_close(student(ids).logits, wanted, rtol=1e-4, atol=1e-4)
        assert "its adapter was merged" in str(student.conversion_report)
        assert all(torch.equal(before[name], p) for name, p in teacher.named_parameters())

    def test_one_that_is_no_change_of_weights_is_refused(self):
        teacher = adapted(PrefixTuningConfig, num_virtual_tokens=3)
        with pytest.raises(ValueError, match="adapter of type PREFIX_TUNING cannot be merged"):
            hh.convert(teacher, [1])

    def test_layers_of_an_adapter_in_a_plain_class_are_refused(self):
        with pytest.raises(ValueError, match="the teacher has an adapter in model.layers.0.self_attn.q_proj; give"):
            hh.convert(adapted().get_base_model(), [1])


def bad_adapter(folder: Path, change: str) -> Path:
    mine = adapter_folder(folder, folder / "nope" if change == "no base" else None)
    config, weights = json.loads((mine / "adapter_config.json").read_text()), mine / "adapter_model.safetensors"
    tensors = load_file(weights)
    if change == "base unknown":
        config["base_model_name_or_path"] = None
    elif change == "more targets":
        config["target_modules"] = ["q_proj", "k_proj", "v_proj"]
    elif change == "fewer targets":
        config["target_modules"] = ["q_proj"]
    elif change == "other targets":
        config["target_modules"] = ["c_attn"]
    elif change == "another rank":
        config["r"] = 8
    elif change == "a kind that there is not":
        config["peft_type"] = "MAGIC"
    elif change == "a tensor lost":
        del tensors[next(iter(tensors))]
    save_file(tensors, weights)
    (mine / "adapter_config.json").write_text(json.dumps(config))
    if change == "a pickle":
        weights.rename(mine / "adapter_model.bin")
    elif change == "cut off":
        weights.write_bytes(weights.read_bytes()[:200])
    elif change == "a model beside it":
        save_teacher(mine)
    elif change == "no JSON":
        (mine / "adapter_config.json").write_text("{")
    return mine


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no base", "there is no folder "),
        ("base unknown", "names no base model"),
        ("more targets", "8 tensors (base_model.model.model.layers.0.self_attn.k_proj.lora_A.default.weight, "),
        ("fewer targets", "are left over"),
        ("other targets", "Target modules {'c_attn'} not found"),
        ("another rank", "size mismatch"),
        ("a kind that there is not", "MAGIC"),
        ("a tensor lost", "is missing"),
        ("a pickle", "has no adapter_model.safetensors"),
        ("cut off", "are damaged"),
        ("a model beside it", "holds a model and an adapter"),
        ("no JSON", "mine"),
    ],
)
def test_a_folder_with_a_bad_adapter(
    change: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = str(bad_adapter(tmp_path, change))
    for load in (load_pair, load_model, lambda name: hh.convert(name, [1])):
        with pytest.raises(ValueError) as raised:
            load(mine)
        assert message in " ".join(str(raised.value).split())
    capsys.readouterr()
    assert cli.main(["convert", mine, "--full-attention-layers", "1", "--output", str(tmp_path / "out")]) == 2
    first, *lines = capsys.readouterr().err.strip().splitlines()
    assert first == f"Loading {mine}." and len(lines) == 1 and message in lines[0], lines


def test_a_teacher_that_is_not_in_memory_is_refused() -> None:
    with torch.device("meta"):
        teacher = AutoModelForCausalLM.from_config(tiny_teacher("qwen3").config)
    with pytest.raises(ValueError, match=r"not in memory \(its device is 'meta'\); load the teacher whole"):
        hh.convert(teacher, [1])


def test_a_teacher_partly_on_disk_is_refused(tmp_path: Path) -> None:
    tiny_teacher("qwen3").save_pretrained(tmp_path / "mine")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i == 2 else "cpu" for i in range(4)}
    teacher = AutoModelForCausalLM.from_pretrained(
        tmp_path / "mine", device_map=places, offload_folder=tmp_path / "disk"
    )
    with pytest.raises(ValueError, match="model.layers.2.* of the teacher is not in memory"):
        hh.convert(teacher, [1])


@pytest.mark.parametrize("teacher", [None, 5, {"model": 1}, torch.nn.Linear(2, 2)])
def test_what_is_no_teacher(teacher: object) -> None:
    with pytest.raises(ValueError, match="a model is given by its Hub id or its folder, not by a "):
        hh.convert(teacher, [1])
