"""
The layout of Qwen3.5 as llama.cpp reads it, a GGUF file: written with the `gguf` library, and read back.

The names of the recurrent layers are in the file one by one, so that any list of layers loads.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch


ARCHITECTURE = "qwen35"
# How far rounding may take a tensor, as a share of its length: what each type has of bits.
_ROUNDING = {"f32": 1e-5, "f16": 1e-3, "bf16": 4e-3, "q8_0": 2e-2, "q4_0": 0.2}
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
    "linear_attn.in_proj_z.weight": "attn_gate.weight",
    "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
    "linear_attn.in_proj_b.weight": "ssm_beta.weight",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight",
}
# Small, and what they compute is summed up over the text.
_KEPT_IN_FP32 = ("ssm_alpha.weight", "ssm_beta.weight", "ssm_conv1d.weight")
# How byte-level vocabularies split text before their merges: the expression in the tokenizer, and llama.cpp's name.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_SPLITS = {
    _WORDS.replace("DIGITS", digits): name for digits, name in ((r"\p{N}", "qwen2"), (r"\p{N}{1,3}", "llama-bpe"))
}
# Of a token, in llama.cpp's numbers.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def obstacles(text_config: Any) -> list[str]:
    """What of a model that fits the layout stands in the way of a file for llama.cpp, in words."""
    kind = text_config.rope_parameters.get("rope_type", "default")
    if kind != "default":
        return [f"its rotary embedding is of type {kind!r}, for which no file was tried; export it as qwen3_5"]
    return []


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            "a GGUF file is written with the package gguf, which is not installed; pip install hf_hybrid[gguf]."
        ) from error
    return gguf


def write_gguf(
    path: Path, config: Any, tensors: dict[str, torch.Tensor], tokenizer: Any, *, name: str, file_type: str
) -> None:
    """
    Writes a model as llama.cpp reads it.

    Args:
        path (`Path`): the file.
        config (`Qwen3_5TextConfig`): the model's.
        tensors (`dict[str, torch.Tensor]`): by their names in `Qwen3_5ForCausalLM`, with norms less 1.
        tokenizer (`PreTrainedTokenizerBase`): with its chat template.
        name (`str`): what the model is called.
        file_type (`str`): one of `FILE_TYPES`: of the matrices; vectors and what is small stay in fp32.
    """
    gguf = _library()
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_name(name)
    writer.add_file_type(
        getattr(gguf.LlamaFileType, f"{'ALL' if file_type == 'f32' else 'MOSTLY'}_{file_type.upper()}")
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    # Frequencies take turns among three positions, which in a text are one.
    half = config.head_dim // 2
    writer.add_rope_dimension_sections([(half + 2) // 3, (half + 1) // 3, half // 3, 0])
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
    writer.add_array(
        f"{ARCHITECTURE}.attention.recurrent_layers", [kind == "linear_attention" for kind in config.layer_types]
    )
    _add_vocabulary(writer, config, tokenizer)
    for source, tensor in tensors.items():
        target = _name(source)
        wide = _theirs(target, tensor.float()).cpu().numpy()
        kind = type_of(gguf, target, wide, file_type)
        writer.add_tensor(target, gguf.quants.quantize(wide, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(source: str) -> str:
    if source in _OUTSIDE:
        return _OUTSIDE[source]
    layer, _, rest = source.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_IN_LAYER[rest]}"


def _part(target: str) -> str:
    return target.split(".", 2)[2] if target.startswith("blk.") else target


def _theirs(target: str, tensor: torch.Tensor) -> torch.Tensor:
    """What llama.cpp has of a tensor: norms whole, and the rate of decay rather than its logarithm."""
    part = _part(target)
    if part.endswith("norm.weight") and part != "ssm_norm.weight":
        return tensor + 1
    if part == "ssm_a":
        return -tensor.exp()
    return tensor.squeeze(1) if part == "ssm_conv1d.weight" else tensor


def _ours(target: str, tensor: torch.Tensor) -> torch.Tensor:
    """The inverse of [`_theirs`]."""
    part = _part(target)
    if part.endswith("norm.weight") and part != "ssm_norm.weight":
        return tensor - 1
    if part == "ssm_a":
        return (-tensor).log()
    return tensor[:, None] if part == "ssm_conv1d.weight" else tensor


def type_of(gguf: Any, target: str, tensor: np.ndarray, file_type: str) -> Any:
    """The type, of the library's, of one tensor in a file of type `file_type`."""
    kinds = gguf.GGMLQuantizationType
    if tensor.ndim < 2 or _part(target) in _KEPT_IN_FP32:
        return kinds.F32
    kind = kinds[file_type.upper()]
    # Blocks are of whole rows; what does not divide keeps 16 bits.
    return kinds.F16 if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def _add_vocabulary(writer: Any, config: Any, tokenizer: Any) -> None:
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    if stored["model"]["type"] != "BPE" or stored["model"].get("byte_fallback"):
        raise ValueError(
            f"the tokenizer is a {stored['model']['type']} that is not byte-level, and a GGUF file is written for "
            "byte-level BPE only; export with --to qwen3_5."
        )
    tokens = {place: token for token, place in stored["model"]["vocab"].items()}
    kinds = dict.fromkeys(tokens, _NORMAL)
    for token in stored["added_tokens"]:
        tokens[token["id"]] = token["content"]
        kinds[token["id"]] = _CONTROL if token["special"] else _USER_DEFINED
    if max(tokens) >= config.vocab_size:
        raise ValueError(
            f"the tokenizer has tokens up to {max(tokens)}, the model {config.vocab_size} embeddings; give the "
            "model's own tokenizer."
        )
    every = range(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_name(stored["pre_tokenizer"]))
    writer.add_token_list([tokens.get(place, f"[PAD{place}]") for place in every])
    writer.add_token_types([kinds.get(place, _UNUSED) for place in every])
    merges = stored["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    eos = config.eos_token_id
    ends = eos if isinstance(eos, list) else [tokenizer.eos_token_id if eos is None else eos]
    for place, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (ends[0], writer.add_eos_token_id),
        (ends[1] if len(ends) > 1 else None, writer.add_eot_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if place is not None:
            add(place)
    first = tokenizer("a")["input_ids"][0]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and first == tokenizer.bos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def split_name(pre_tokenizer: Any) -> str:
    """llama.cpp's name for the way in which a byte-level tokenizer splits text; a `ValueError` where it has none."""
    parts = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    kinds = [part["type"] for part in parts]
    if kinds[-1] == "ByteLevel" and not parts[-1]["add_prefix_space"]:
        if kinds == ["ByteLevel"] and parts[0]["use_regex"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and parts[1]["use_regex"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and parts[0]["pattern"].get("Regex") in _SPLITS:
            return _SPLITS[parts[0]["pattern"]["Regex"]]
    raise ValueError(
        f"the tokenizer splits text in a way ({', '.join(kinds)}) for which hf_hybrid knows no name of llama.cpp's; "
        "export with --to qwen3_5, and convert that with llama.cpp's own script."
    )


def read_back(path: Path) -> dict[str, torch.Tensor]:
    """The tensors in a file that [`write_gguf`] wrote, dequantised, by their names in `Qwen3_5ForCausalLM`."""
    gguf = _library()
    names = {target: source for source, target in _OUTSIDE.items()}
    inside = {target: source for source, target in _IN_LAYER.items()}
    tensors = {}
    for entry in gguf.GGUFReader(path).tensors:
        tensor = torch.from_numpy(gguf.quants.dequantize(entry.data, entry.tensor_type).copy())
        if entry.name in names:
            source = names[entry.name]
        else:
            source = f"model.layers.{entry.name.split('.')[1]}.{inside[_part(entry.name)]}"
        tensors[source] = _ours(entry.name, tensor.float())
    return tensors


def check_rounding(tensors: dict[str, torch.Tensor], written: dict[str, torch.Tensor], file_type: str) -> None:
    """Raises a `ValueError` where a tensor of the file is not that of the model as its type rounds it."""
    if tensors.keys() != written.keys():
        raise ValueError(f"the file lacks, or has too much: {sorted(tensors.keys() ^ written.keys())[:3]}.")
    for name, tensor in tensors.items():
        wanted, found = tensor.float().cpu(), written[name]
        error = (found - wanted).norm() / wanted.norm().clamp(min=1e-12)
        # A matrix may have 16 bits where its rows do not divide into blocks, so the bound is the type's.
        if found.shape != wanted.shape or not error <= _ROUNDING[file_type]:
            raise ValueError(
                f"{name} is not what was written: its relative error is {error:.1e}; nothing is published."
            )
