"""Tiny GGUF files of Llama models, written with llama.cpp's own library, as its converter writes them."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from runs import tiny_tokenizer
from transformers import PreTrainedModel


VOCABULARY = 300
CHAT = "{% for message in messages %}<eos>{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    kind: Type = Type.F32,
    fields: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> dict[str, torch.Tensor]:
    """
    Writes a Llama model with the tokenizer of the tests' teachers to `path`, matrices of the type `kind`.

    Returns the numbers that stand in the file, by the model's own names. `fields` are added to the metadata or replace
    those there (None leaves one out), `tensors` likewise.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    said: dict[str, Any] = {
        "general.name": "A teacher of the tests",
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        **tokenizer_fields(),
    }
    for key, value in (said | (fields or {})).items():
        if value is not None:
            add(writer, key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    meant, written = {}, {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = tensor.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            data = as_llama_cpp_turns(data, heads)
        stored = gguf.quants.quantize(data, kind) if data.ndim > 1 else data
        written[names.get_name(name, (".weight", ".bias"))] = (stored, kind if data.ndim > 1 else Type.F32)
        # Rows are quantised each by itself, so their order does not matter.
        own = tensor.float().numpy()
        own = gguf.quants.dequantize(gguf.quants.quantize(own, kind), kind) if own.ndim > 1 else own
        meant[name] = torch.from_numpy(own.copy())
    for name, data in (tensors or {}).items():
        written[name] = (data, Type.F32)
    for name, (data, its) in written.items():
        writer.add_tensor(name, data, raw_dtype=its)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def as_llama_cpp_turns(weight: np.ndarray, heads: int) -> np.ndarray:
    """
    The rows of a head's queries or keys, `[heads * D, width]`, in the order in which llama.cpp rotates pairs:
    neighbours are a pair there, elements i and i + D / 2 here.
    """
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def tokenizer_fields() -> dict[str, Any]:
    """The metadata of the tests' tokenizer: byte-level BPE as GPT-2's, filled up to `VOCABULARY`."""
    tokenizer = tiny_tokenizer()
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    unused = [f"[PAD{number}]" for number in range(len(words), VOCABULARY)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": words + unused,
        "tokenizer.ggml.token_type": [3] + [1] * (len(words) - 1) + [5] * len(unused),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT,
    }


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Adds one field in the type that llama.cpp gives it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_string(key, value)
