"""
Writes the checkpoints that later releases must load, each with what it computes: python tests/checkpoints/make.py

Run once for a release, in a checkout of it; the folders are named after it. The code that a checkpoint carries is left
out: a release loads older ones with its own.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig, PreTrainedConfig, Qwen3Config

import hf_hybrid as hh


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
MIXERS = ["gated_deltanet", "gated_linear_attention", "kimi_delta_attention", "sliding_window", None]
OPTIONS = {"gated_deltanet": {"short_convolution": 4}, "sliding_window": {"window": 6}}


def teachers() -> dict[str, tuple[PreTrainedConfig, list[int], dict]]:
    """Config, layers that keep softmax, and arguments of the conversion: every mixer, and a rotary config by layer."""
    qwen3 = Qwen3Config(num_hidden_layers=5, **SIZES)
    gemma3 = Gemma3TextConfig(num_hidden_layers=3, sliding_window=8, layer_types=KINDS, **SIZES)
    return {"qwen3": (qwen3, [4], {"mixer": MIXERS, "mixer_options": OPTIONS}), "gemma3_text": (gemma3, [1], {})}


@torch.no_grad()
def main() -> None:
    for name, (config, keep, arguments) in teachers().items():
        torch.manual_seed(0)
        teacher = AutoModelForCausalLM.from_config(config)
        for parameter in teacher.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        teacher.tie_weights()
        model = hh.convert(teacher.eval(), keep, **arguments).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:  # away from where a mixer starts, so that a tensor that is not loaded shows
                parameter.add_(torch.randn_like(parameter) * 0.05)
        ids = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(1))
        text = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
        folder = Path(__file__).parent / hh.__version__ / name
        model.save_pretrained(folder)
        expected = {"ids": ids, "logits": model(ids, use_cache=False).logits, "text": text.contiguous()}
        save_file(expected, folder / "expected.safetensors")
        for file in folder.glob("*.py"):
            file.unlink()


if __name__ == "__main__":
    main()
