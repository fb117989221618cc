"""Every mixer in a model: caches, padding, packing, beams, storage and training change nothing that they must not."""

import copy
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from teachers import FAMILIES, tiny_teacher, tokens
from test_standalone import run
from transformers import AutoConfig, AutoModelForCausalLM

import hf_hybrid as hh
from hf_hybrid.modeling import MIXERS
from hf_hybrid.modeling.modeling_hybrid import decoder_layers


NEW = ["gated_linear_attention", "kimi_delta_attention", "sliding_window"]
MIXED = ["gated_deltanet", None, "kimi_delta_attention", "sliding_window"]
# A window shorter than the texts here.
OPTIONS = {"sliding_window": {"mixer_options": {"window": 8}}}
# The models run in float64, but the library's norms and rotary embeddings compute in float32 whatever the dtype.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}

# What a family has of its own (biases, norms, widths, a window) does not depend on the mixer.
each = pytest.mark.parametrize(
    ("family", "mixer"),
    [(family, "gated_deltanet") for family in FAMILIES]
    + [("qwen3", mixer) for mixer in NEW]
    + [("qwen2", "mixed"), ("qwen2", "convolution")],  # with a bias, padding does not project to zero
)


def hybrid(family, mixer, layers=(1,), dtype=torch.float64):
    torch.manual_seed(1)
    if mixer == "mixed":
        return hh.convert(
            tiny_teacher(family, dtype), [1], mixer=MIXED, mixer_options={"sliding_window": {"window": 8}}
        )
    if mixer == "convolution":
        model = hh.convert(tiny_teacher(family, dtype), layers, mixer_options={"short_convolution": 4})
        for name, parameter in model.named_parameters():
            if name.endswith("conv.weight"):  # it starts as the identity, which mixes nothing
                torch.nn.init.normal_(parameter)
        return model
    return hh.convert(tiny_teacher(family, dtype), layers, mixer=mixer, **OPTIONS.get(mixer, {}))


@each
class TestGeneration:
    def test_cached_decoding_is_the_full_forward(self, family, mixer):
        model, ids = hybrid(family, mixer), tokens(2, 40)
        with torch.no_grad():
            full = model(ids, use_cache=False).logits
            for prompt in (3, 25):  # shorter and longer than the window
                out = model(ids[:, :prompt], use_cache=True)
                pieces = [out.logits]
                for start, stop in ((prompt, prompt + 1), (prompt + 1, 31), (31, 32), (32, 40)):
                    out = model(ids[:, start:stop], past_key_values=out.past_key_values, use_cache=True)
                    pieces.append(out.logits)
                torch.testing.assert_close(torch.cat(pieces, 1), full, **CLOSE)
                assert out.past_key_values.get_seq_length() == 40

    def test_generate_with_and_without_cache(self, family, mixer):
        model, ids = hybrid(family, mixer), tokens(2, 12)
        for options in ({}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}):
            cached = model.generate(ids, max_new_tokens=9, do_sample=False, **options)
            plain = {key: value for key, value in options.items() if key == "num_beams"}
            uncached = model.generate(ids, max_new_tokens=9, do_sample=False, use_cache=False, **plain)
            assert torch.equal(cached, uncached), options

    def test_padding(self, family, mixer):
        model, ids = hybrid(family, mixer), tokens(2, 30)
        padded = torch.cat([torch.zeros(2, 7, dtype=torch.long), ids], 1)
        mask = (torch.arange(37) >= 7).long().expand(2, -1).clone()
        padded[1], mask[1] = torch.cat([ids[1], ids[0, :7]]), 1  # one row padded, the other full
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            left = model(padded, attention_mask=mask, position_ids=positions).logits
            torch.testing.assert_close(left[0, 7:], model(ids[:1]).logits[0], **CLOSE)
            torch.testing.assert_close(left[1], model(padded[1:]).logits[0], **CLOSE)
            mask = torch.ones(2, 30, dtype=torch.long)
            mask[0, 21:] = 0
            right = model(ids, attention_mask=mask).logits
            torch.testing.assert_close(right[0, :21], model(ids[:1, :21]).logits[0], **CLOSE)
            torch.testing.assert_close(right[1], model(ids[1:]).logits[0], **CLOSE)

    def test_left_padded_generation(self, family, mixer):
        model, ids = hybrid(family, mixer), tokens(1, 5)
        options = {"min_new_tokens": 8, "max_new_tokens": 8, "do_sample": False}
        alone = model.generate(ids, **options)[0, 5:]
        batch = torch.cat([torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], 1), tokens(1, 10, seed=5)])
        mask = torch.ones_like(batch)
        mask[0, :5] = 0
        assert torch.equal(model.generate(batch, attention_mask=mask, **options)[0, 10:], alone)


@pytest.mark.parametrize("mixer", MIXERS)
class TestEachMixer:
    def test_docstring_counts_the_state_and_names_the_source(self, mixer):
        text = MIXERS[mixer].__doc__
        assert re.search(r"arXiv \d{4}\.\d{5}, (eq\.|section)", text)
        for part in ("Keeps of the teacher:", "Adds", "State:", "per sequence", "o_t ="):
            assert part in text

    def test_state_does_not_grow(self, mixer):
        model, ids = hybrid("qwen3", mixer, [], torch.float32), tokens(1, 90)
        sizes = []
        for length in (30, 90):
            layer = model(ids[:, :length], use_cache=True).past_key_values.layers[2]
            held = [*layer.conv_states.values(), *layer.recurrent_states.values()]
            sizes.append(sum(x.numel() * x.element_size() for x in held if x is not None))
        heads, groups, width, window = 4, 2, 24, 8
        expected = 4 * window * (2 * groups * width + 1) if mixer == "sliding_window" else 4 * heads * width * width
        assert sizes == [expected, expected]

    def test_half_precision_keeps_the_decay_in_fp32(self, mixer, tmp_path):
        model, ids = hybrid("qwen3", mixer, [1], torch.bfloat16), tokens(1, 40)
        model.set_full_attention_layers([0], tiny_teacher("qwen3", torch.bfloat16))  # layer 1 becomes linear here
        model.save_pretrained(tmp_path)
        back = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        for i in (1, 2):
            for module in (model, back):
                attention = decoder_layers(module)[i].self_attn
                own = dict(attention.named_parameters(recurse=False))
                assert all(parameter.dtype == torch.float32 for parameter in own.values())
                assert bool(own) == (mixer != "sliding_window")
                assert attention.q_proj.weight.dtype == torch.bfloat16
        assert torch.equal(back(ids).logits, model(ids).logits)
        out = model(ids, use_cache=True)
        assert out.logits.dtype == torch.bfloat16
        if mixer != "sliding_window":
            assert out.past_key_values.layers[1].recurrent_states[0].dtype == torch.float32

    def test_trains_under_autocast_and_checkpointing(self, mixer):
        model, ids = hybrid("qwen3", mixer, [1], torch.float32).train(), tokens(2, 20)
        model(ids, labels=ids).loss.backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
            torch.testing.assert_close(parameter.grad, expected[name], msg=name)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())

    def test_alignment_and_distillation_lower_their_loss(self, mixer, tmp_path):
        teacher = tiny_teacher("qwen3")
        student = hybrid("qwen3", mixer, [], torch.float32)
        rows = [{"input_ids": row} for row in tokens(8, 32).tolist()]
        options = {"max_steps": 12, "per_device_train_batch_size": 8, "report_to": "none", "save_strategy": "no"}
        options |= {"logging_steps": 1, "use_cpu": True, "learning_rate": 3e-3, "disable_tqdm": True}
        for config, trainer in (
            (hh.AlignmentConfig, hh.AlignmentTrainer),
            (hh.DistillationConfig, hh.DistillationTrainer),
        ):
            args = config(str(tmp_path), **options)
            training = trainer(model=student, teacher=teacher, args=args, train_dataset=rows)
            training.train()
            losses = [entry["loss"] for entry in training.state.log_history if "loss" in entry]
            assert losses[-1] < 0.97 * losses[0], (config.__name__, losses)


class TestSlidingWindow:
    @pytest.mark.parametrize("family", ["llama_mha", "llama_mqa", "qwen2", "qwen3"])
    def test_a_wide_window_is_the_teacher(self, family):
        teacher, ids = tiny_teacher(family), tokens(2, 40)
        student = hh.convert(teacher, [], mixer="sliding_window", mixer_options={"window": 40})
        assert not student.conversion_report.created
        with torch.no_grad():
            torch.testing.assert_close(student(ids).logits, teacher(ids).logits, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("window", [1, 5, 16, 39])
    def test_is_the_librarys_sliding_attention(self, window):
        ids = tokens(2, 40)
        teacher = tiny_teacher("mistral", sliding_window=window)
        student = hh.convert(teacher, [], mixer="sliding_window", mixer_options={"window": window})
        with torch.no_grad():
            torch.testing.assert_close(student(ids).logits, teacher(ids).logits, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("window", "message"),
        [
            (0, "=0 is not a number of tokens; pass 1 or more"),
            (-3, "=-3 is not a number of tokens; pass 1 or more"),
            (2.5, "=2.5 is of type float; pass int"),
            (True, "=True is of type bool; pass int"),
            ("8", "='8' is of type str; pass int"),
        ],
    )
    def test_a_window_is_a_number_of_tokens(self, window, message):
        with pytest.raises(ValueError, match=re.escape(f"mixer_options['window']{message}")):
            hh.convert(tiny_teacher(), [], mixer="sliding_window", mixer_options={"window": window})


class TestMixedMixers:
    def test_each_layer_has_its_own(self):
        model = hybrid("qwen3", "mixed")
        kinds = [type(layer.self_attn).__name__ for layer in decoder_layers(model)]
        assert kinds == ["GatedDeltaNet", "Qwen3Attention", "KimiDeltaAttention", "SlidingWindowAttention"]

    def test_flipping_layers_uses_the_layers_own(self):
        model, teacher = hybrid("qwen3", "mixed", dtype=torch.float32), tiny_teacher("qwen3")
        model.set_full_attention_layers([1, 2, 3], teacher)
        model.set_full_attention_layers([1])
        assert type(decoder_layers(model)[2].self_attn).__name__ == "KimiDeltaAttention"
        other = hybrid("qwen3", "mixed", dtype=torch.float32)
        other.load_state_dict(model.state_dict())
        assert torch.equal(model(tokens(1, 20)).logits, other(tokens(1, 20)).logits)
        with pytest.raises(ValueError, match="names none for layer 1"):
            model.set_full_attention_layers([0], teacher)
        assert model.full_attention_layers == [1]

    def test_config_round_trip(self, tmp_path):
        config = hybrid("qwen3", "mixed").config
        config.save_pretrained(tmp_path)
        back = AutoConfig.from_pretrained(tmp_path)
        assert back.mixer == MIXED == config.layer_mixers
        assert back.options_of("sliding_window") == {"window": 8} and back.options_of("gated_deltanet") == {}
        assert back.mixer_options == config.mixer_options

    def test_options_for_all_and_for_one(self):
        options = {"rope": False, "kimi_delta_attention": {"output_gate": None, "rope": True}}
        names = ["gated_linear_attention", "kimi_delta_attention"] * 2
        model = hh.convert(tiny_teacher(), [], mixer=names, mixer_options=options)
        first, second = (layer.self_attn.options for layer in decoder_layers(model)[:2])
        assert (first.rope, first.output_gate) == (False, "silu")
        assert (second.rope, second.output_gate) == (True, None)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"mixer": "rwkv9"}, "'rwkv9' is unknown; choose one of"),
            ({"mixer": ["gated_deltanet", "rwkv9", None, None]}, "'rwkv9' is unknown; choose one of"),
            ({"mixer": ["gated_deltanet"] * 3}, "lists 3 names, but the model has 4 decoder layers"),
            ({"mixer": ["gated_deltanet", None] * 2}, "names none for layer 3"),
            ({"mixer_options": {"window": 8}}, "unknown to gated_deltanet; choose from"),
            (
                {"mixer": "sliding_window", "mixer_options": {"rope": False}},
                r"\['rope'\] are unknown to sliding_window; choose from \['window', 'sinks'\]",
            ),
            ({"mixer_options": {"sliding_window": {"window": 8}}}, "the model's mixers are"),
            ({"mixer_options": {"rope": "no"}}, r"mixer_options\['rope'\]='no' is of type str; pass bool"),
            ({"mixer_options": {"output_norm": 1}}, r"mixer_options\['output_norm'\]=1 is of type int; pass bool"),
            (
                {"mixer_options": {"short_convolution": True}},
                "=True is of type bool; pass int",
            ),
            ({"mixer_options": {"short_convolution": 4.0}}, r"\['short_convolution'\]=4.0 is of type float; pass int"),
            ({"mixer_options": {"output_gate": False}}, r"\['output_gate'\]=False is of type bool; pass str \| None"),
            ({"mixer_options": {"output_gate": "relu"}}, r"\['output_gate'\]='relu' is unknown"),
        ],
    )
    def test_errors(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            hh.convert(tiny_teacher(), [1], **arguments)


def test_a_checkpoint_of_all_mixers_loads_anywhere(tmp_path):
    names = ["gated_deltanet", *NEW]
    options = {"sliding_window": {"window": 8}}
    model, ids = hh.convert(tiny_teacher("qwen3"), [], mixer=names, mixer_options=options), tokens(2, 20)
    model.save_pretrained(tmp_path / "model")
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    run(
        """
        from safetensors.torch import load_file, save_file
        from transformers import AutoModelForCausalLM
        ids = load_file("ids.safetensors")["ids"]
        model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)
        text = model.generate(ids, max_new_tokens=6, do_sample=False).contiguous()
        save_file({"logits": model(ids).logits.detach(), "text": text}, "out.safetensors")
        """,
        tmp_path,
    )
    got = load_file(tmp_path / "out.safetensors")
    assert torch.equal(got["logits"], model(ids).logits)
    assert torch.equal(got["text"], model.generate(ids, max_new_tokens=6, do_sample=False))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_new_tensors_are_initialised_when_a_teachers_checkpoint_is_loaded(family, mixer, tmp_path):
    teacher = tiny_teacher(family)
    teacher.save_pretrained(tmp_path)
    config = hh.HybridConfig.from_teacher(teacher.config, [1], mixer=mixer)
    model = hh.HybridForCausalLM.from_pretrained(tmp_path, config=config)
    attention = decoder_layers(model)[0].self_attn
    assert torch.equal(attention.q_proj.weight, teacher.base_model.layers[0].self_attn.q_proj.weight)
    for name, parameter in attention.named_parameters():
        assert torch.isfinite(parameter).all(), name
        if name.split(".")[0] not in attention.adopted and parameter.ndim > 1:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.3), name
    if mixer == "gated_linear_attention":
        assert attention.gk_bias.eq(0).all()
    elif mixer != "sliding_window":
        step = torch.nn.functional.softplus(attention.dt_bias)
        assert ((attention.A_log >= 0) & (attention.A_log <= 3)).all() and ((step > 9e-4) & (step < 0.11)).all()


def test_large_keys_in_half_precision():
    """The sum of gated linear attention is bounded by nothing, and fp16 ends at 65,504; the norm brings it back."""
    wide = hh.convert(tiny_teacher("llama"), [], mixer="gated_linear_attention")
    with torch.no_grad():
        for layer in wide.base_model.layers:
            layer.self_attn.k_proj.weight.mul_(1e4)
    half, ids = copy.deepcopy(wide).half(), tokens(2, 70)
    expected = wide(ids).logits
    torch.testing.assert_close(half(ids).logits.float(), expected, rtol=0.02, atol=0.02 * expected.abs().max().item())
    out = half(ids[:, :69], use_cache=True)
    last = half(ids[:, 69:], past_key_values=out.past_key_values).logits
    torch.testing.assert_close(last.float(), expected[:, 69:], rtol=0.02, atol=0.02 * expected.abs().max().item())
