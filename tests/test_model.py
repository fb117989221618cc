"""The model: a softmax-only copy is the teacher; layers change between the kinds; what it shares with other models."""

import copy
import json
import multiprocessing
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from teachers import FAMILIES, tiny_teacher, tokens
from transformers import AutoModelForCausalLM, DynamicCache

import hf_hybrid as hh
from hf_hybrid.modeling import MIXERS
from hf_hybrid.modeling.linear_attention import LinearAttention


# The models run in float64, but the library's norms and rotary embeddings compute in float32 whatever the dtype.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def hybrid(family, layers, dtype=torch.float64, **options):
    torch.manual_seed(1)
    return hh.convert(tiny_teacher(family, dtype), layers, mixer_options=options)


def with_adapter(teacher):
    return get_peft_model(teacher, LoraConfig(target_modules=["q_proj"])).get_base_model()


def quantised(teacher):
    weight = teacher.base_model.layers[0].self_attn.q_proj.weight
    teacher.base_model.layers[0].self_attn.q_proj.weight = torch.nn.Parameter(weight.to(torch.int8), False)
    return teacher


def offloaded(teacher):
    teacher.base_model.layers[3].self_attn.to("meta")
    return teacher


def logits_of(model, ids):
    """For another process, which has its arrays to itself."""
    return model(torch.from_numpy(ids)).logits.detach().numpy()


@pytest.mark.parametrize("family", FAMILIES)
class TestSoftmaxOnlyCopy:
    def test_logits_are_the_teachers(self, family):
        teacher, ids = tiny_teacher(family), tokens(2, 40)
        student = hh.convert(teacher, range(4))
        with torch.no_grad():
            assert (student(ids).logits - teacher(ids).logits).abs().max() == 0

    def test_generation_is_the_teachers(self, family):
        teacher, ids = tiny_teacher(family), tokens(2, 20)
        student = hh.convert(teacher, range(4))
        for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
            expected = teacher.generate(ids, max_new_tokens=8, **options)
            assert torch.equal(student.generate(ids, max_new_tokens=8, **options), expected)

    def test_every_tensor_is_copied(self, family):
        report = hh.convert(tiny_teacher(family), range(4)).conversion_report
        assert not report.created and not report.not_carried
        assert set(report.copied) == set(tiny_teacher(family).state_dict())


class TestConvolution:
    def test_starts_as_the_identity(self):
        ids = tokens(2, 30)
        plain, convolved = hybrid("qwen3", [1]), hybrid("qwen3", [1], short_convolution=4)
        convolved.load_state_dict({**convolved.state_dict(), **plain.state_dict()})
        with torch.no_grad():
            torch.testing.assert_close(convolved(ids).logits, plain(ids).logits, **CLOSE)

    @pytest.mark.parametrize("prompt", [1, 2, 3, 5, 25])
    def test_cached_decoding(self, prompt):
        model, ids = hybrid("qwen3", [1], short_convolution=4), tokens(2, 30)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, LinearAttention):
                    module.conv.weight.normal_()
            out = model(ids[:, :prompt], use_cache=True)
            pieces = [out.logits]
            for t in range(prompt, 30):
                out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
                pieces.append(out.logits)
            torch.testing.assert_close(torch.cat(pieces, 1), model(ids).logits, **CLOSE)

    @pytest.mark.parametrize("prompt", [1, 3, 25])
    def test_its_state_is_as_long_as_the_kernel(self, prompt):
        model, ids = hybrid("qwen3", [1], short_convolution=4), tokens(2, 30)
        cache = model(ids[:, :prompt], use_cache=True).past_key_values
        channels = 4 * 24 + 2 * (24 + 24)
        for _ in range(2):
            assert cache.layers[0].conv_states[0].shape == (2, channels, 4)
            model(ids[:, prompt : prompt + 1], past_key_values=cache)


class TestLayers:
    def test_restoring_every_layer_gives_the_teacher(self):
        teacher, ids = tiny_teacher("qwen2"), tokens(2, 20)
        student = hh.convert(teacher, [])
        student.set_full_attention_layers(range(4), teacher)
        with torch.no_grad():
            assert (student(ids).logits - teacher(ids).logits).abs().max() == 0
        assert student.config.layer_types == ["full_attention"] * 4

    def test_flipping_equals_converting(self):
        teacher, ids = tiny_teacher("qwen3"), tokens(2, 20)
        student = hh.convert(teacher, [])
        student.set_full_attention_layers([2], teacher)
        student.set_full_attention_layers([0, 2], teacher)
        other = hh.convert(teacher, [0, 2])
        other.load_state_dict(student.state_dict())
        with torch.no_grad():
            assert torch.equal(student(ids).logits, other(ids).logits)
        student.set_full_attention_layers([0])
        assert student.linear_attention_layers == [1, 2, 3]
        assert torch.isfinite(student(ids).logits).all()

    def test_a_restored_layer_does_not_share_weights_with_the_teacher(self):
        teacher = tiny_teacher("qwen3")
        student = hh.convert(teacher, [])
        student.set_full_attention_layers([1], teacher)
        own = student.base_model.layers[1].self_attn.q_proj.weight
        assert own.data_ptr() != teacher.base_model.layers[1].self_attn.q_proj.weight.data_ptr()

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            (lambda: tiny_teacher(num_key_value_heads=4), r"num_key_value_heads \(4, the hybrid's 2\)"),
            (lambda: tiny_teacher(rms_norm_eps=1e-3), r"rms_norm_eps \(0.001, the hybrid's 1e-06\)"),
            (lambda: tiny_teacher(rope_parameters={"rope_type": "default", "rope_theta": 500.0}), "rope_parameters"),
            (lambda: tiny_teacher(num_hidden_layers=5), r"num_hidden_layers \(5, the hybrid's 4\)"),
            (lambda: tiny_teacher("llama"), "a LlamaForCausalLM, the hybrid's is a Qwen3ForCausalLM"),
            (lambda: hh.convert(tiny_teacher(), [1]), "the teacher is a hybrid itself"),
            (lambda: torch.nn.Linear(2, 2), "no model of transformers"),
            (lambda: with_adapter(tiny_teacher()), "q_proj.*without adapters"),
            (lambda: quantised(tiny_teacher()), "q_proj.weight of the teacher's layer 0 is torch.int8"),
            (lambda: offloaded(tiny_teacher()), "is not in memory"),
        ],
        ids=["heads", "norm", "angles", "layers", "family", "hybrid", "module", "adapter", "quantised", "offloaded"],
    )
    def test_another_teacher_is_refused(self, other, message):
        student, ids = hh.convert(tiny_teacher(), [1]), tokens(1, 8)
        expected = student(ids).logits
        with pytest.raises(ValueError, match=message):
            student.set_full_attention_layers([0, 1, 3], other())
        assert student.full_attention_layers == [1] and torch.equal(student(ids).logits, expected)

    def test_a_restored_layer_is_the_teachers_after_loading_too(self, tmp_path):
        """Of a teacher that is evaluated, frozen and hooked, and made for another length."""
        teacher, ids = tiny_teacher(max_position_embeddings=2048), tokens(2, 12)
        calls = []
        teacher.base_model.layers[0].self_attn.register_forward_hook(lambda *args: calls.append(1))
        teacher.base_model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda *args: calls.append(2))
        teacher.requires_grad_(False)
        student = hh.convert(tiny_teacher(), [])
        student.save_pretrained(tmp_path / "linear")
        student = hh.HybridForCausalLM.from_pretrained(tmp_path / "linear")
        student.set_full_attention_layers([0, 2], teacher)
        expected = hh.convert(tiny_teacher(), [0, 2])
        for layer in (0, 2):
            found, wanted = (model.base_model.layers[layer].self_attn for model in (student, expected))
            assert type(found) is type(wanted) and found.state_dict().keys() == wanted.state_dict().keys()
            for name, parameter in found.named_parameters():
                assert torch.equal(parameter, wanted.get_parameter(name)) and parameter.requires_grad
        logits = student(ids).logits
        assert not calls
        student.save_pretrained(tmp_path / "restored")
        assert torch.equal(hh.HybridForCausalLM.from_pretrained(tmp_path / "restored")(ids).logits, logits)

    def test_the_report_follows(self):
        teacher, student = tiny_teacher(), hh.convert(tiny_teacher(), [1])
        student.set_full_attention_layers([0, 2], teacher)
        expected = hh.convert(teacher, [0, 2]).conversion_report
        assert str(student.conversion_report) == str(expected)
        assert student.conversion_report.created == expected.created

    def test_restoring_needs_the_teacher(self):
        student = hh.convert(tiny_teacher("qwen3"), [])
        with pytest.raises(ValueError, match="pass teacher="):
            student.set_full_attention_layers([1])
        assert student.full_attention_layers == []


class TestErrors:
    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            ([31], "outside 0..3"),
            ([-1], "outside 0..3"),
            ([1, 1], "twice"),
            (["x"], "not a list"),
            (5, "not a list"),
            ((layer for layer in (1.5, 2.5)), "not a list of layer indices"),
        ],
    )
    def test_layers(self, layers, message):
        with pytest.raises(ValueError, match=message):
            hh.convert(tiny_teacher(), layers)

    def test_mixer(self):
        with pytest.raises(ValueError, match="choose one of"):
            hh.convert(tiny_teacher(), [], mixer="gated_delta_net")
        with pytest.raises(ValueError, match="choose from"):
            hh.convert(tiny_teacher(), [], mixer_options={"ropes": True})

    def test_kernel(self):
        with pytest.raises(ValueError, match="'auto', 'torch' or 'fla'"):
            hh.convert(tiny_teacher(), [], kernel="cuda")
        with pytest.raises(ValueError, match="tensors are on 'cpu'"):
            hh.convert(tiny_teacher(), [], kernel="fla")(tokens(1, 4))

    def test_the_kernel_is_whoever_runs_the_models(self, tmp_path):
        """It may be set on a model that there is, and is in no checkpoint; earlier releases stored it."""
        model, ids = hh.convert(tiny_teacher(), [1]), tokens(1, 4)
        model.config.kernel = "fla"
        with pytest.raises(ValueError, match="tensors are on 'cpu'"):
            model(ids)
        with pytest.raises(ValueError, match="'auto', 'torch' or 'fla'"):
            model.config.kernel = "cuda"
        model.save_pretrained(tmp_path)
        stored = json.loads((tmp_path / "config.json").read_text())
        assert "kernel" not in stored
        (tmp_path / "config.json").write_text(json.dumps(stored | {"kernel": "fla"}))
        assert hh.HybridForCausalLM.from_pretrained(tmp_path).config.kernel == "auto"
        given = hh.HybridForCausalLM.from_pretrained(tmp_path, kernel="torch")
        assert given.config.kernel == given.base_model.layers[0].self_attn.kernel == "torch"
        model.config.kernel = "torch"
        assert torch.equal(given(ids).logits, model(ids).logits)

    @pytest.mark.parametrize("full_attention_layers", [[], [0, 1, 3]])
    def test_a_config_that_is_changed_on_a_model(self, full_attention_layers, tmp_path):
        model = hh.convert(tiny_teacher(), [1])
        model.config.full_attention_layers = full_attention_layers
        layer = 1 if not full_attention_layers else 0
        for use in (lambda: model(tokens(1, 4)), lambda: model.save_pretrained(tmp_path)):
            with pytest.raises(ValueError, match=f"layer {layer} has .*Use set_full_attention_layers"):
                use()
        assert not list(tmp_path.glob("*.safetensors"))
        model.config.full_attention_layers = [1]
        model(tokens(1, 4))

    def test_teacher_without_self_attention(self):
        from transformers import GPT2Config

        teacher = AutoModelForCausalLM.from_config(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50))
        with pytest.raises(ValueError, match="cannot be converted"):
            hh.convert(teacher, [])

    def test_a_cache_of_another_model(self):
        model = hybrid("qwen3", [1])
        with pytest.raises(ValueError, match=r"DynamicCache\(config=model.config\)"):
            model(tokens(1, 4), past_key_values=DynamicCache(), use_cache=True)
        model(tokens(1, 4), past_key_values=DynamicCache(config=model.config), use_cache=True)

    def test_assisted_generation_is_refused_where_a_layer_is_linear(self):
        model, ids = hybrid("qwen3", [1]), tokens(1, 8)
        with pytest.raises(ValueError, match="(?i)stateful"):
            model.generate(ids, assistant_model=hybrid("qwen3", [1]), max_new_tokens=3)


class TestLibraryHabits:
    def test_deepcopy(self):
        model, ids = hybrid("qwen3", [1]), tokens(2, 10)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(ids).logits, model(ids).logits)
        twin.config.use_cache = False
        assert twin.base_model.config.use_cache is False and model.base_model.config.use_cache is True

    @pytest.mark.parametrize("how", ["pickle", "torch.save"])
    @pytest.mark.parametrize("mixer", MIXERS)
    def test_pickle(self, mixer, how, tmp_path):
        model, ids = hh.convert(tiny_teacher(), [1], mixer=mixer), tokens(2, 10)
        expected = model(ids).logits.detach()
        if how == "pickle":
            twin = pickle.loads(pickle.dumps(model))
        else:
            torch.save(model, tmp_path / "model.pt")
            twin = torch.load(tmp_path / "model.pt", weights_only=False)
        assert type(twin) is type(model)
        assert type(twin.base_model.layers[0].self_attn) is type(model.base_model.layers[0].self_attn)
        assert torch.equal(twin(ids).logits, expected)
        twin.set_full_attention_layers([])  # what it has of configs is one, as before
        assert model.full_attention_layers == [1] and twin.base_model.config._hybrid is twin.config

    @pytest.mark.slow
    def test_a_spawned_process(self):
        model, ids = hybrid("qwen3", [1]), tokens(2, 10)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = torch.from_numpy(pool.apply(logits_of, (model, ids.numpy())))
        assert torch.equal(found, model(ids).logits)

    def test_pickling_one_mixer(self):
        mixer, x = hybrid("qwen3", [1]).base_model.layers[0].self_attn, torch.randn(1, 6, 64, dtype=torch.float64)
        angles = torch.ones(1, 6, 24, dtype=torch.float64), torch.zeros(1, 6, 24, dtype=torch.float64)
        twin = pickle.loads(pickle.dumps(mixer))
        assert torch.equal(twin(x, angles)[0], mixer(x, angles)[0])

    def test_resize_keeps_the_head_tied(self):
        model = hybrid("qwen2", [1])
        model.resize_token_embeddings(120)
        assert model.config.vocab_size == 120
        assert model(tokens(1, 5)).logits.shape[-1] == 120
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight

    def test_no_tensor_parallel_plan(self):
        assert not any("self_attn" in name for name in hybrid("qwen3", [1]).tp_plan)
