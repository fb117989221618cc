"""Tiny random teachers of each family, with weights large enough that a wrong path shows."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config, Qwen3Config


_SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

CONFIGS = {
    "llama": lambda **k: LlamaConfig(**{**_SIZES, **k}),  # grouped key/value heads, no bias
    "llama_mha": lambda **k: LlamaConfig(**{**_SIZES, "num_key_value_heads": 4, **k}),
    "llama_mqa": lambda **k: LlamaConfig(**{**_SIZES, "num_key_value_heads": 1, "attention_bias": True, **k}),
    "qwen2": lambda **k: Qwen2Config(**{**_SIZES, "tie_word_embeddings": True, **k}),  # biases, tied head
    "qwen3": lambda **k: Qwen3Config(**{**_SIZES, "head_dim": 24, **k}),  # q/k norm, head_dim != hidden / heads
    "mistral": lambda **k: MistralConfig(**{**_SIZES, "sliding_window": 16, **k}),
}
FAMILIES = ["llama", "qwen2", "qwen3", "mistral"]


def tiny_teacher(family: str = "qwen3", dtype: torch.dtype = torch.float32, **changes: int) -> PreTrainedModel:
    """A random teacher; the same one for the same arguments."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = AutoModelForCausalLM.from_config(CONFIGS[family](**changes))
        with torch.no_grad():
            for parameter in teacher.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.15)
                else:  # norms and biases: away from 1 and 0, so that dropping one shows
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        teacher.tie_weights()
    return teacher.to(dtype).eval()


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids `[batch, length]` that are no special tokens."""
    return torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(seed))
