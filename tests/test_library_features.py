"""The library's own features hold for a copy that keeps every softmax layer and for a hybrid that alternates."""

import copy
import inspect
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from teachers import tiny_teacher, tokens
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
    Qwen3NextConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.distributed.parallel_utils import _get_parameter_plan
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

import hf_hybrid as hh
from hf_hybrid.modeling import MIXERS
from hf_hybrid.modeling.modeling_hybrid import decoder_layers


ROOT = str(Path(__file__).parents[1])
COPY, ALTERNATING = [0, 1, 2, 3], [1, 3]
both = pytest.mark.parametrize("layers", [COPY, ALTERNATING], ids=["copy", "alternating"])
DECAYS = {"A_log", "dt_bias", "gk_bias"}
GATES = {"a_proj", "b_proj", "gk_proj", "f_proj"}


def hybrid(layers, family="qwen3", dtype=torch.float32, **options):
    torch.manual_seed(1)
    return hh.convert(tiny_teacher(family, dtype), layers, **options)


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@both
class TestAttentionImplementations:
    @pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
    def test_all_give_the_same(self, layers, implementation, tmp_path):
        model, ids = hybrid(layers), tokens(2, 20)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
        switched = copy.deepcopy(model)
        switched.set_attn_implementation(implementation)
        for other in (loaded, switched):
            for config in (other.config, other.config.text_config, other.base_model.config):
                assert config._attn_implementation == implementation
            torch.testing.assert_close(logits(other, ids), logits(model, ids), rtol=1e-4, atol=1e-4)
        assert torch.equal(logits(loaded, ids), logits(switched, ids))

    def test_a_teachers_own_is_kept(self, layers):
        teacher, ids = tiny_teacher(), tokens(2, 20)
        teacher.set_attn_implementation("eager")
        student = hh.convert(teacher, layers)
        assert student.config._attn_implementation == student.base_model.config._attn_implementation == "eager"
        if layers == COPY:
            assert torch.equal(logits(student, ids), logits(teacher, ids))

    def test_attentions_are_those_of_the_softmax_layers(self, layers):
        model = hybrid(layers)
        model.set_attn_implementation("eager")
        model.config.output_attentions = model.config.output_hidden_states = True
        out = model(tokens(2, 9))
        assert [x.shape for x in out.attentions] == [(2, 4, 9, 9)] * len(layers)
        assert len(out.hidden_states) == 5


@both
class TestPlacement:
    def test_device_map_auto(self, layers, tmp_path):
        model, ids = hybrid(layers), tokens(2, 20)
        model.save_pretrained(tmp_path)
        placed = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
        assert torch.equal(logits(placed, ids), logits(model, ids))

    @pytest.mark.parametrize("mixer", MIXERS)
    def test_layers_on_disk(self, layers, mixer, tmp_path):
        options = {"mixer_options": {"short_convolution": 3}} if mixer != "sliding_window" else {}
        model, ids = hybrid(layers, mixer=mixer, **options), tokens(2, 20)
        model.save_pretrained(tmp_path / "model")
        places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "disk"}
        places |= {f"model.layers.{i}": "disk" if i in (1, 2) else "cpu" for i in range(4)}
        placed = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
        )
        assert placed.hf_device_map == places
        assert all(p.device.type == "meta" for p in decoder_layers(placed)[2].self_attn.parameters())
        assert torch.equal(logits(placed, ids), logits(model, ids))
        options = {"max_new_tokens": 6, "do_sample": False}
        assert torch.equal(placed.generate(ids, **options), model.generate(ids, **options))

    def test_no_layer_is_split(self, layers):
        assert hybrid(layers)._no_split_modules == {"Qwen3DecoderLayer"}

    def test_loading_builds_on_meta_and_leaves_nothing_uninitialised(self, layers, tmp_path, monkeypatch):
        model = hybrid(layers)
        model.save_pretrained(tmp_path)
        devices, build = [], hh.HybridForCausalLM.__init__

        def record(self, config):
            build(self, config)
            devices.append({p.device.type for p in self.parameters()})

        monkeypatch.setattr(hh.HybridForCausalLM, "__init__", record)
        loaded = hh.HybridForCausalLM.from_pretrained(tmp_path)
        assert devices == [{"meta"}]
        expected = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        found = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@both
class TestVocabulary:
    @pytest.mark.parametrize("family", ["qwen2", "qwen3"])  # a tied head and one of its own
    def test_resizing_and_tying(self, layers, family, tmp_path):
        model, ids = hybrid(layers, family), tokens(2, 20)
        before = logits(model, ids)
        model.resize_token_embeddings(131)
        sizes = [model.config, model.config.text_config, model.base_model.config]
        assert [config.vocab_size for config in sizes] == [131] * 3 and model.vocab_size == 131
        torch.testing.assert_close(logits(model, ids)[..., :99], before)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(logits(loaded, ids), logits(model, ids))
        for each in (model, loaded, copy.deepcopy(loaded)):
            tied = each.get_output_embeddings().weight is each.get_input_embeddings().weight
            assert tied == (family == "qwen2") == bool(each.all_tied_weights_keys)


@pytest.mark.parametrize("mixer", [mixer for mixer in MIXERS if mixer != "sliding_window"])
class TestDtypes:
    def test_decay_is_fp32_in_half_precision_through_loading_and_saving(self, mixer, tmp_path):
        hybrid(ALTERNATING, mixer=mixer).save_pretrained(tmp_path)
        for dtype in (torch.bfloat16, torch.float16):
            model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
            model.save_pretrained(tmp_path / "half")
            for each in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "half")):
                found = {name: p.dtype for name, p in each.named_parameters()}
                decay = {name for name in found if name.split(".")[-1] in DECAYS}
                assert decay and all(found[name] == torch.float32 for name in decay)
                assert all(found[name] == dtype for name in found.keys() - decay)

    def test_decay_is_the_models_dtype_otherwise(self, mixer, tmp_path):
        hybrid(ALTERNATING, mixer=mixer).save_pretrained(tmp_path)
        flipped = hybrid([0, 1, 2, 3], mixer=mixer, dtype=torch.float64)
        flipped.set_full_attention_layers(ALTERNATING)
        models = [flipped, hybrid(ALTERNATING, mixer=mixer, dtype=torch.float64)]
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64))
        for model in models:
            assert {p.dtype for p in model.parameters()} == {torch.float64}

    def test_casting_the_module_casts_everything(self, mixer):
        # As in the library: `_keep_in_fp32_modules_strict` is for loading, `.to` is the caller's word.
        model, ids = hybrid(ALTERNATING, mixer=mixer).to(torch.bfloat16), tokens(2, 20)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert torch.isfinite(logits(model, ids)).all()

    def test_the_list_of_fp32_parameters_names_what_there_is(self, mixer):
        teacher, model = tiny_teacher(), hybrid(COPY, mixer=mixer)
        assert model._keep_in_fp32_modules_strict == set()
        model.set_full_attention_layers(ALTERNATING)
        names = {name.split(".")[-1] for name, _ in model.named_parameters()} & DECAYS
        assert model._keep_in_fp32_modules_strict == names != set()
        model.set_full_attention_layers(COPY, teacher)
        assert model._keep_in_fp32_modules_strict == set()


@both
@pytest.mark.parametrize("mixer", MIXERS)
def test_four_bits(layers, mixer, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_type="nf4"
    )
    teacher = tiny_teacher("qwen3", intermediate_size=128, head_dim=32)
    model, ids = hh.convert(teacher, layers, mixer=mixer), tokens(2, 20)
    model.save_pretrained(tmp_path / "model")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=quantization)
    for layer in decoder_layers(small):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            assert isinstance(layer.self_attn.get_submodule(name), bitsandbytes.nn.Linear4bit)
        own = {type(m) for name, m in layer.self_attn.named_modules() if name.split(".")[0] in GATES}
        assert bitsandbytes.nn.Linear4bit not in own
    small.save_pretrained(tmp_path / "small")
    found = logits(small, ids)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "small"), ids), found)
    assert small.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > 20  # token by token, as well
    if layers == COPY:
        teacher.save_pretrained(tmp_path / "teacher")
        same = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", quantization_config=quantization)
        assert torch.equal(logits(same, ids), found)


class TestGraphs:
    """What of a forward without a cache is one graph: docs/generation.md."""

    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    @staticmethod
    @torch.no_grad()
    def export(module, lengths=(), **options):
        """The exported module against the original, at `lengths`."""
        exported = torch.export.export(module, (tokens(1, 12),), **options).module()
        for length in lengths:
            torch.testing.assert_close(exported(tokens(1, length)), module(tokens(1, length)), rtol=0, atol=0)

    LENGTH: ClassVar = {"dynamic_shapes": ({1: torch.export.Dim("length", min=2, max=512)},)}

    @staticmethod
    def model(layers, mixer="gated_deltanet", num_layers=2):
        torch.manual_seed(1)
        return hh.convert(tiny_teacher(num_hidden_layers=num_layers), layers, mixer=mixer).eval()

    def test_a_copy_is_one_graph(self):
        self.export(self.Logits(self.model([0, 1])), [12, 37], strict=True, **self.LENGTH)

    @pytest.mark.parametrize("mixer", MIXERS)
    def test_a_hybrid_is_exported_at_one_length(self, mixer):
        self.export(self.Logits(self.model([1], mixer)), [12], strict=False)

    @pytest.mark.slow
    def test_a_hybrid_is_not_exported_for_every_length(self):
        with pytest.raises(torch._dynamo.exc.UserError, match="Constraints violated"):
            self.export(self.Logits(self.model([], num_layers=1)), strict=False, **self.LENGTH)

    def test_a_prompt_through_a_chunked_recurrence_is_not(self):
        """When this fails, a prompt has become one graph: say so in the docs and in `_can_compile_fullgraph`."""
        model = self.model([1])
        assert model._can_compile_fullgraph is False and hh.HybridForCausalLM._can_compile_fullgraph is False
        with pytest.raises(torch._dynamo.exc.Unsupported, match="torch.compiler.disable"):
            self.export(self.Logits(model), strict=True)
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with torch.no_grad(), pytest.raises(torch._dynamo.exc.Unsupported, match="torch.compiler.disable"):
            compiled(tokens(1, 12), use_cache=False)


class TestTheClass:
    """What the library asks of a class, before there is an instance with a teacher."""

    def test_capabilities(self):
        generic, model = hh.HybridForCausalLM, hybrid(ALTERNATING)
        names = list(inspect.signature(generic.forward).parameters)
        assert names[1:4] == ["input_ids", "attention_mask", "position_ids"] and "labels" in names
        assert generic._supports_sdpa and generic.supports_gradient_checkpointing
        assert type(model).forward is type(tiny_teacher()).forward

    def test_capabilities_of_an_instance_are_its_teachers(self):
        from transformers import GptOssConfig, GptOssForCausalLM

        config = GptOssConfig(num_hidden_layers=1, hidden_size=32, vocab_size=9, layer_types=["full_attention"])
        # Before there is an instance of the teacher: the library keeps what it finds out of a class.
        model = hh.HybridForCausalLM._from_config(hh.HybridConfig.from_teacher(config, [0]))
        for name in ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "base_model_prefix"):
            assert getattr(type(model), name) == getattr(GptOssForCausalLM, name)
        assert model._can_set_experts_implementation() and model._can_set_attn_implementation()
        implementation = GptOssForCausalLM._from_config(config).config._experts_implementation
        assert model.config._experts_implementation == implementation is not None

    def test_default_config_builds(self):
        config = hh.HybridConfig()
        assert config.text_config.model_type == "llama" and config.full_attention_layers == list(range(32))

    @pytest.mark.parametrize("config_class", [LlamaConfig, Qwen3Config, Gemma2Config, MistralConfig])
    def test_config_from_parts(self, config_class):
        sizes = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
        sizes |= {"vocab_size": 9, "intermediate_size": 16, "pad_token_id": 0}
        kinds = get_layer_types_and_kwargs(config_class(**sizes))[0]
        mixed = ["linear_attention", kinds[1], "linear_attention"]
        configs = [hh.HybridConfig(text_config=config_class(**sizes)) for _ in range(2)]
        configs[0].full_attention_layers, configs[1].layer_types = [1], mixed
        configs.append(hh.HybridConfig(text_config=config_class(**sizes), layer_types=mixed))
        text = config_class(**sizes)
        text.layer_types = mixed
        configs += [hh.HybridConfig(text_config=text), hh.HybridConfig(text_config=text.to_dict())]
        configs.append(hh.HybridConfig.from_teacher(config_class(**sizes), [1]))
        for config in configs:
            assert (config.layer_types, config.softmax_layer_types) == (mixed, kinds)
        assert hh.HybridForCausalLM(configs[3]).linear_attention_layers == [0, 2]

    def test_settings_of_the_teacher_reach_its_backbone(self, tmp_path):
        sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 9}
        config = hh.HybridConfig(text_config=LlamaConfig(**sizes), intermediate_size=24, rms_norm_eps=0.5)
        config.attention_bias, config.not_a_setting_of_llamas = True, 1
        backbone = hh.HybridForCausalLM(config).model
        assert backbone.layers[0].mlp.up_proj.out_features == 24 and backbone.norm.variance_epsilon == 0.5
        assert backbone.layers[0].self_attn.o_proj.bias is not None
        assert (
            "attention_bias" not in config.to_dict() and "not_a_setting_of_llamas" not in config.text_config.to_dict()
        )
        config.save_pretrained(tmp_path)
        again = hh.HybridConfig.from_pretrained(tmp_path, attention_dropout=0.25)
        assert again.text_config.attention_bias and again.text_config.attention_dropout == 0.25
        assert again.not_a_setting_of_llamas == 1

    @pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
    def test_rotary_settings_are_the_teachers(self, name, tmp_path):
        model, ids = hybrid(COPY), tokens(1, 20)
        assert model.config.rope_parameters is model.config.text_config.rope_parameters
        yarn = model.config.rope_parameters | {"rope_type": "yarn", "factor": 4.0}
        teacher = tiny_teacher()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of rope_scaling, which everyone has in their scripts
            for each in (model, teacher):
                each.save_pretrained(tmp_path / type(each).__name__)
                setattr(each.config, name, dict(yarn))
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "HybridForCausalLM", **{name: dict(yarn)})
        wanted = type(teacher)(teacher.config)
        wanted.load_state_dict(teacher.state_dict())
        configured = hh.HybridForCausalLM(model.config)
        configured.load_state_dict(model.state_dict())
        assert not torch.equal(logits(wanted.eval(), ids), logits(teacher, ids))
        for each in (loaded, configured.eval()):
            assert torch.equal(logits(each, ids), logits(wanted, ids))

    def test_a_teacher_with_linear_layers_of_its_own_is_refused(self):
        for build in (
            lambda config: hh.HybridConfig(text_config=config),
            lambda c: hh.HybridConfig.from_teacher(c, []),
        ):
            with pytest.raises(ValueError, match="the teacher must be a softmax model"):
                build(Qwen3NextConfig(num_hidden_layers=4))

    def test_a_backbone_saved_alone_is_a_hybrids(self, tmp_path):
        model, ids = hybrid(ALTERNATING), tokens(2, 10)
        model.base_model.save_pretrained(tmp_path)
        loaded, report = hh.HybridForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert report["missing_keys"] == {"lm_head.weight"} and not report["unexpected_keys"]
        hidden = [each.base_model(ids).last_hidden_state for each in (model, loaded)]
        assert torch.equal(*hidden)

    def test_a_teachers_checkpoint_is_no_hybrids(self, tmp_path):
        tiny_teacher().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"config of a 'qwen3' model, not of a hybrid; convert the model with"):
            hh.HybridForCausalLM.from_pretrained(tmp_path)

    def test_tensor_parallel_plan_leaves_attention_whole(self):
        model = hybrid(ALTERNATING)
        names = [name for name, _ in model.named_modules()]
        assert "lm_head" in model.tp_plan
        assert not any("self_attn" in pattern for pattern in model.tp_plan)
        for pattern in model.tp_plan:
            assert any(_get_parameter_plan(name, {pattern: ""}, is_weight=False) is not None for name in names)

    def test_pipelines_know_it(self):
        model, tokenizer = hh.convert(hh.embedded_teacher(), [1]), hh.embedded_tokenizer()
        with CaptureLogger(logging.get_logger("transformers.pipelines.base")) as log:
            writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
            text = writer("import os", max_new_tokens=4, do_sample=False)[0]["generated_text"]
        assert "not supported" not in log.out and text.startswith("import os")

    def test_label_smoothing_shifts_the_labels(self, tmp_path):
        args = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to="none", use_cpu=True)
        ids, losses = tokens(2, 20), []
        for model in (tiny_teacher(), hybrid(COPY)):
            losses.append(Trainer(model, args).compute_loss(model, {"input_ids": ids, "labels": ids}))
        assert torch.equal(*losses)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_tensor_parallelism(family, tmp_path):
    hybrid(ALTERNATING, family).save_pretrained(tmp_path / "model")
    (tmp_path / "ranks.py").write_text(textwrap.dedent(_RANKS))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", str(tmp_path / "ranks.py"), str(tmp_path / "model")]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"})


_RANKS = """
    import sys
    import torch
    import torch.distributed as dist
    from transformers.distributed.configuration_utils import DistributedConfig
    from hf_hybrid.modeling import HybridForCausalLM
    from hf_hybrid.trainers.processes import exit_process

    dist.init_process_group("gloo")
    whole = HybridForCausalLM.from_pretrained(sys.argv[1])
    sharded = HybridForCausalLM.from_pretrained(sys.argv[1], distributed_config=DistributedConfig(tp_size=2))
    sizes = {name: parameter.to_local().shape if hasattr(parameter, "to_local") else parameter.shape
             for name, parameter in sharded.named_parameters()}
    assert sizes["model.layers.0.mlp.gate_proj.weight"] == (48, 64)
    ids = torch.randint(3, 99, (2, 20), generator=torch.Generator().manual_seed(0))
    outputs = [model(ids, labels=ids) for model in (whole, sharded)]
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits, rtol=1e-4, atol=1e-4)
    for output in outputs:
        output.loss.backward()
    for name, parameter in sharded.named_parameters():
        gradient = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        expected = whole.get_parameter(name).grad
        assert (gradient - expected).abs().max() < 1e-4 * expected.abs().max(), name
    texts = [model.generate(ids, max_new_tokens=5, do_sample=False) for model in (whole, sharded)]
    assert torch.equal(*texts)
    exit_process(0)
"""
