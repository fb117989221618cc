"""PEFT's adapters on a hybrid: what they reach, train, save, load and merge into."""

import json
import os
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from finetuning import TEXTS, hybrid, losses, settings, texts, tokenizer
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from teachers import tiny_teacher, tokens
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, NemotronConfig, Phi3Config
from trl import SFTConfig, SFTTrainer

import hf_hybrid as hh
from benchmarks.families.models import tiny_model


EVERY_LAYER = "the adapter reaches the attention of 6 of 6 layers: softmax [2, 3], linear [0, 1, 4, 5]"
DECAY = ("A_log", "dt_bias")
TINY = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def ids() -> torch.Tensor:
    return torch.tensor([tokenizer()(TEXTS[3])["input_ids"]])


def train(model, tmp_path, peft_config=None, **changes):
    """A few steps of LoRA by TRL, whose merged model is then near enough to its start to compare in fp32."""
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**settings(tmp_path, len(TEXTS), **{"packing": True, "max_length": 128, **changes})),
        train_dataset=texts(),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


def test_default_targets_reach_every_layer():
    model = hybrid()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted = get_peft_model(model, hh.lora_config(model, r=4))
        coverage = hh.adapter_coverage(adapted)
    assert str(coverage) == EVERY_LAYER
    names = {f"self_attn.{name}_proj" for name in "qkvo"}
    assert set(hh.lora_targets(hybrid())) == names
    adapters = {n.split(".lora_A")[0].split(".layers.")[1] for n, _ in adapted.named_parameters() if ".lora_A" in n}
    assert adapters == {f"{i}.{name}" for i in range(6) for name in names}


def test_a_lora_config_without_targets_reaches_every_layer(tmp_path):
    trainer = train(hybrid(), tmp_path, LoraConfig(task_type="CAUSAL_LM", r=4), max_steps=1)
    assert str(hh.adapter_coverage(trainer.model)) == EVERY_LAYER


@pytest.mark.parametrize("model_type", ["phi3", "persimmon", "deepseek_v3", "opt", "afmoe"])
def test_peft_finds_by_itself_what_is_read_off_the_model(model_type):
    model = hh.convert(tiny_model(model_type), [0, 2])
    targets = set(hh.lora_targets(model))
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2))
    found = {n.split(".lora_A")[0].split(".layers.")[1][2:] for n, _ in adapted.named_parameters() if ".lora_A" in n}
    gates = {"self_attn.gate_proj"}  # not every family has one, and PEFT's own defaults leave gates alone
    assert found - gates == targets - gates
    assert hh.adapter_coverage(adapted).missed == []


@pytest.mark.parametrize("layers", [(), range(6)])
def test_default_targets_where_all_layers_are_of_one_kind(layers):
    model = hybrid(layers)
    assert hh.adapter_coverage(get_peft_model(model, hh.lora_config(model))).missed == []


def test_default_targets_are_read_off_the_teacher_not_assumed():
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(Phi3Config(**TINY))
    model = hh.convert(teacher, [1])
    assert hh.lora_targets(model) == ["self_attn.o_proj", "self_attn.qkv_proj"]
    assert hh.adapter_coverage(get_peft_model(model, hh.lora_config(model))).missed == []


@pytest.mark.parametrize(
    ("kwargs", "missed"),
    [
        ({"target_modules": ["g_proj"]}, "softmax [], linear [0, 1, 4, 5]; it misses [2, 3]"),
        ({"target_modules": ["gate_proj", "up_proj"]}, "linear []; it misses [0, 1, 2, 3, 4, 5]"),
        ({"layers_to_transform": [0, 2]}, "softmax [2], linear [0]; it misses [1, 3, 4, 5]"),
        ({"target_modules": r".*layers\.[45]\..*q_proj"}, "softmax [], linear [4, 5]; it misses [0, 1, 2, 3]"),
        ({"exclude_modules": r".*layers\.3\..*"}, "softmax [2], linear [0, 1, 4, 5]; it misses [3]"),
    ],
)
def test_targets_that_miss_layers_are_told_before_and_after(kwargs, missed):
    model = hybrid()
    with pytest.warns(UserWarning, match="lora_targets") as told:
        config = hh.lora_config(model, **kwargs)
    assert missed in str(told[0].message)
    adapted = get_peft_model(model, config)
    with pytest.warns(UserWarning, match="lora_targets") as told:
        coverage = hh.adapter_coverage(adapted)
    assert missed in str(coverage) and missed in str(told[0].message)


def test_all_linear_misses_nothing():
    model = hybrid()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted = get_peft_model(model, hh.lora_config(model, target_modules="all-linear"))
        assert hh.adapter_coverage(adapted).missed == []


def test_errors():
    with pytest.raises(ValueError, match="mixers='all' is unknown; choose one of"):
        hh.lora_config(hybrid(), mixers="all")
    with pytest.raises(ValueError, match="without an adapter"):
        hh.adapter_coverage(hybrid())


@pytest.mark.parametrize(
    ("mixers", "kwargs"),
    [
        ("lora", {}),
        ("lora", {"use_rslora": True}),
        ("lora", {"use_dora": True}),
        ("gates", {}),
        ("full", {}),
    ],
    ids=["lora", "rslora", "dora", "gates", "full"],
)
def test_trains_saves_loads_and_merges(tmp_path, mixers, kwargs):
    start, model = hybrid().eval(), hybrid()
    adapted = get_peft_model(model, hh.lora_config(model, mixers=mixers, r=4, lora_alpha=8, **kwargs))
    trainer = train(adapted, tmp_path)
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.02
    assert losses(trainer)[0] == pytest.approx(train(hybrid(), tmp_path, max_steps=1).state.log_history[0]["loss"])
    adapted = trainer.model.eval()
    logits = adapted(ids()).logits
    assert (logits - start(ids()).logits).abs().max() > 0.1
    with adapted.disable_adapter():
        assert torch.equal(adapted(ids()).logits, start(ids()).logits)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(hybrid().eval(), tmp_path / "adapter")
    assert torch.equal(loaded(ids()).logits, logits)
    logits = adapted.double()(ids()).logits  # in fp32, logits of 15 are themselves only known to 1e-5
    merged = adapted.merge_and_unload()
    assert isinstance(merged, hh.HybridForCausalLM)
    assert (merged(ids()).logits - logits).abs().max() < 1e-5
    merged.float().save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(again(ids()).logits, merged(ids()).logits)
    changed = {
        name.split(".")[-1]
        for name, parameter in merged.named_parameters()
        if not torch.equal(parameter, start.get_parameter(name))
    } & set(DECAY)
    assert changed == (set(DECAY) if mixers == "full" else set())


def test_gates_train_what_only_mixers_have():
    model = hybrid(mixer_options={"short_convolution": 4})
    adapted = get_peft_model(model, hh.lora_config(model, mixers="gates", modules_to_save=["embed_tokens"]))
    whole = {
        name.split(".modules_to_save.")[0].split(".")[-1]
        for name, parameter in adapted.named_parameters()
        if ".modules_to_save." in name and parameter.requires_grad
    }
    assert whole == {"a_proj", "b_proj", "g_proj", "o_norm", "conv", "embed_tokens"}


@pytest.mark.parametrize("mixer", ["gated_linear_attention", "kimi_delta_attention", "sliding_window"])
@pytest.mark.parametrize("mixers", ["lora", "gates", "full"])
def test_every_mixer_takes_every_kind_of_adapter(mixer, mixers):
    model = hh.convert(tiny_teacher("qwen2"), [1], mixer=mixer)
    adapted = get_peft_model(model, hh.lora_config(model, mixers=mixers, init_lora_weights=False)).train()
    assert hh.adapter_coverage(adapted).missed == []
    adapted(tokens(1, 9), labels=tokens(1, 9)).loss.backward()
    assert [n for n, p in adapted.named_parameters() if p.requires_grad and p.grad is None] == []
    logits = adapted.eval().double()(tokens(2, 9)).logits
    assert (adapted.merge_and_unload()(tokens(2, 9)).logits - logits).abs().max() < 1e-5


def test_padding_reaches_a_mixer_that_an_adapter_wraps():
    """In Nemotron's layers attention is not given what the layer was given; the mixer gets it another way."""
    torch.manual_seed(0)
    model = hh.convert(AutoModelForCausalLM.from_config(NemotronConfig(**TINY)), [1])
    adapted = get_peft_model(model, hh.lora_config(model, mixers="full")).eval()
    alone, padded = tokens(1, 7), torch.nn.functional.pad(tokens(1, 7), (4, 0), value=5)
    mask = torch.ones_like(padded)
    mask[:, :4] = 0
    got = adapted(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits[:, 4:]
    assert (got - adapted(alone).logits).abs().max() < 1e-5


@pytest.mark.parametrize("mixers", ["lora", "gates"])
def test_qlora(tmp_path, mixers):
    """Four-bit projections, adapters over them in every layer, the gates as they are or in full."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Linear4bit

    def load(*skipped: str):
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=torch.float32,
            bnb_4bit_quant_type="nf4",
            llm_int8_skip_modules=["lm_head", *skipped],
        )
        return AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=quantization)

    hybrid().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="mixers='gates' trains .*g_proj in full, but it is quantised"):
        hh.lora_config(load(), mixers="gates")
    model = load("g_proj") if mixers == "gates" else load()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert set(hh.lora_targets(model)) == set(hh.lora_targets(hybrid()))
    # TRL puts what it trains of a quantised model in bf16, so the rest has to compute in bf16 too.
    config = hh.lora_config(model, r=4, mixers=mixers)
    trainer = train(model, tmp_path, max_steps=4, bf16=True, peft_config=config)
    adapted = trainer.model
    assert str(hh.adapter_coverage(adapted)) == EVERY_LAYER
    layer = adapted.get_base_model().base_model.layers[0].self_attn
    assert isinstance(layer.q_proj.base_layer, Linear4bit)
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.02
    changed = {name for name, p in adapted.unload().named_parameters() if not torch.equal(before[name], p)}
    assert all(name.split(".")[-2] in ("a_proj", "b_proj", "g_proj", "o_norm") for name in changed)
    assert bool(changed) == (mixers == "gates")


def test_prefix_tuning_is_refused():
    """Its keys and values are no state of a recurrence; the embeddings of prompt tuning are tokens like others."""
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    prefixed = get_peft_model(hybrid(), PrefixTuningConfig(**options))
    with pytest.raises(ValueError, match="the cache has DynamicLayer for layer 0"):
        prefixed(ids())
    prompted = get_peft_model(hybrid(), PromptTuningConfig(**options))
    prompted(ids(), labels=ids()).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in prompted.parameters() if p.requires_grad)


def test_weight_decay_of_a_plain_trainer_takes_decay_rates(tmp_path):
    """Trainer leaves out biases and norms by their names; `A_log` is neither. docs/finetuning.md says what to do."""
    model = hybrid()
    trainer = train(model, tmp_path, max_steps=1)
    decayed = set(trainer.get_decay_parameter_names(model))
    vectors = {name.split(".")[-1] for name, p in model.named_parameters() if p.ndim < 2 and name in decayed}
    assert vectors == {"A_log"}
    assert trainer.args.weight_decay == 0.0  # unless asked for


# Nothing of ours can be imported, PEFT can.
REMOTE = """
import sys
for name in ("hf_hybrid", "modeling", "trainers", "fla"):
    sys.modules[name] = None
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
ids = load_file("ids.safetensors")["ids"]
"""


def run(code, tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf_home"), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", REMOTE + textwrap.dedent(code)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_adapters_on_a_hybrid_loaded_without_the_package(tmp_path):
    """There and back: adapters made here are loaded there, one made there is loaded here; all merge."""
    model = hybrid().eval()
    model.save_pretrained(tmp_path / "model")
    save_file({"ids": ids()}, tmp_path / "ids.safetensors")
    logits = {}
    for mixers in ("lora", "full"):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        adapted = get_peft_model(base, hh.lora_config(base, mixers=mixers, r=4, init_lora_weights=False))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad and "lora_" not in name:
                    parameter.mul_(1.01)
        adapted.save_pretrained(tmp_path / mixers)
        recorded = json.loads((tmp_path / mixers / "adapter_config.json").read_text())
        assert recorded["base_model_name_or_path"] == str(tmp_path / "model")
        logits[mixers] = adapted(ids()).logits.detach()
    run(
        """
        def load():
            return AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)

        for mixers in ("lora", "full"):
            adapted = PeftModel.from_pretrained(load(), mixers)
            found = AutoPeftModelForCausalLM.from_pretrained(mixers, trust_remote_code=True)
            assert torch.equal(adapted(ids).logits, found(ids).logits)
            save_file({"logits": adapted(ids).logits.detach()}, f"{mixers}.safetensors")
            adapted.merge_and_unload().save_pretrained(f"merged_{mixers}")
        config = LoraConfig(
            task_type="CAUSAL_LM", target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False
        )
        second = get_peft_model(load(), config)
        second.save_pretrained("second")
        save_file({"logits": second(ids).logits.detach()}, "second.safetensors")
        """,
        tmp_path,
    )
    for mixers, wanted in logits.items():
        assert torch.equal(load_file(tmp_path / f"{mixers}.safetensors")["logits"], wanted)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / f"merged_{mixers}")
        assert (merged(ids()).logits - wanted).abs().max() < 1e-5 * wanted.abs().max()
    second = PeftModel.from_pretrained(hybrid().eval(), tmp_path / "second")
    assert torch.equal(second(ids()).logits, load_file(tmp_path / "second.safetensors")["logits"])
    assert str(hh.adapter_coverage(second)) == EVERY_LAYER
