"""
A model from a GGUF file (llama.cpp's format): where the file is, and the plain model and the tokenizer in it.

transformers reads the file and undoes what llama.cpp does to names and layouts. It passes over what it does not know;
here that is a `ValueError`, for a model without a part of itself answers, and answers worse.
"""

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedConfig, PreTrainedModel

from .names import SUFFIX


if TYPE_CHECKING:
    from gguf import GGUFReader

# The key of a teacher's config that says which file it came from.
ORIGIN = "gguf_origin"
# How byte-level vocabularies split text before their merges, by llama.cpp's names. GPT-2's way, which is what the
# library falls back to; and GPT-2's way after each digit was set apart, which it does not know.
_AS_GPT2 = frozenset({"gpt-2", "phi-2", "mpt", "olmo", "jais"})
_DIGITS_APART = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"})
# Vocabularies with words that no merges lead to, which llama.cpp takes whole; their older files do not say that a text
# begins with the beginning-of-sequence token, and llama.cpp puts it there.
_WHOLE_WORDS = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken"})
# What ends a turn or a message beside the end of text, in files of chat models.
_MORE_ENDS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
# Factors of llama.cpp that no config of the library has from a GGUF file; 0 and 1 mean that there is none.
_FACTORS = (
    "rope.scaling.factor",
    "rope.scaling.attn_factor",
    "attention.scale",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "logit_scale",
    "embedding_scale",
    "residual_scale",
)
_LOADING = threading.RLock()


def gguf_origin(config: Any) -> dict[str, str] | None:
    """
    What is known of the GGUF file that the teacher with this config came from; None where it came from none.

    `file` is its name, `sha256` that of its contents, and `quantisation` the types of its weights, the one of most
    numbers first, such as `"Q4_1, Q8_0, F32"`.
    """
    return config.__dict__.get(ORIGIN)


def gguf_note(origin: dict[str, str]) -> str:
    """What a report says of a teacher of this [`gguf_origin`]."""
    return (
        f"its weights are those of the GGUF file {origin['file']} ({origin['quantisation']}; sha256 "
        f"{origin['sha256']}), dequantised: each is the number that its block stands for, and what quantising rounded "
        "away is not in it"
    )


def find_gguf(name: str | os.PathLike, gguf_file: str | None, revision: str | None = None) -> Path | None:
    """
    The GGUF file that is meant, on this machine; None where a model of another format is.

    Args:
        name (`str`): the file itself; a folder with one, or with several of which `gguf_file` names one; or a model on
            the Hub, with `gguf_file`. A folder that has safetensors weights too stands for those.
        gguf_file (`str`, *optional*): the file's name in that folder or on the Hub.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
    """
    path = Path(name)
    if gguf_file is not None and not gguf_file.endswith(SUFFIX):
        raise ValueError(f"gguf_file={gguf_file!r} is no GGUF file; give the name of a file that ends in {SUFFIX}.")
    if path.suffix == SUFFIX and not path.is_dir():
        if gguf_file is not None and path.name != gguf_file:
            raise ValueError(f"{path} is a GGUF file, and gguf_file={gguf_file!r} names another; leave one out.")
        return _checked(path)
    if not path.is_dir():
        return None if gguf_file is None else Path(hf_hub_download(str(name), gguf_file, revision=revision))
    if gguf_file is not None:
        return _checked(path / gguf_file)
    files = sorted(path.glob(f"*{SUFFIX}"))
    if not files or next(path.glob("*.safetensors"), None) is not None:
        return None
    if len(files) > 1:
        raise ValueError(
            f"the folder {path} holds {len(files)} GGUF files ({', '.join(file.name for file in files[:4])}"
            f"{', ...' if len(files) > 4 else ''}); name one with --gguf-file (gguf_file= in Python and in a recipe)."
        )
    return _checked(files[0])


def _checked(path: Path) -> Path:
    if not path.is_file():
        there = [file.name for file in sorted(path.parent.glob(f"*{SUFFIX}"))[:4]]
        beside = f" (there: {', '.join(there)})" if there else ""
        raise ValueError(f"there is no GGUF file {path}{beside}; check the path.")
    with open(path, "rb") as stream:
        if not (start := stream.read(24)).startswith(b"GGUF") or len(start) < 24:
            raise ValueError(f"{path} is no GGUF file, or only the beginning of one; download it again.")
    return path


@contextlib.contextmanager
def parsed_once() -> Iterator[None]:
    """
    Inside, a `gguf.GGUFReader` of a file that was read before and has not changed takes over what was parsed then.

    Parsing takes seconds, most of them for the words of the vocabulary, and the library does it anew for the config,
    the model and the tokenizer. Nothing is kept afterwards; threads that are inside take turns.
    """
    try:
        from gguf import GGUFReader
    except ImportError:  # which `read_gguf` explains
        yield
        return
    reader_class: Any = GGUFReader
    parsed: dict[tuple[Any, ...], dict[str, Any]] = {}
    with _LOADING:
        parse = reader_class.__init__

        def parse_once(self: Any, path: str | os.PathLike, mode: str = "r") -> None:
            found = os.stat(path)
            key = (os.path.realpath(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
            if mode == "r" and key in parsed:
                self.__dict__.update(parsed[key])
                return
            parse(self, path, mode)
            if mode == "r":  # in other modes what one reader writes is not what another is to read
                parsed[key] = dict(self.__dict__)

        reader_class.__init__ = parse_once
        try:
            yield
        finally:
            reader_class.__init__ = parse


def read_gguf(path: Path) -> "GGUFReader":
    """Opens a GGUF file; its tensors are read where they are asked for."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ValueError(
            f"{path} is a GGUF file, and the package gguf is not installed; pip install gguf, or hf_hybrid[gguf]."
        ) from error
    try:
        reader = GGUFReader(path)
    except Exception as error:  # whatever numpy says of bytes that are not there
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); download it again.") from error
    if _value(reader, "split.count", 1) > 1:
        raise ValueError(f"{path} is one part of several; put them together with llama-gguf-split --merge.")
    return reader


def _origin_of(reader: "GGUFReader", path: Path) -> dict[str, str]:
    """The [`gguf_origin`] of a model from the file at `path`, which `reader` has open."""
    numbers: dict[str, int] = {}
    for tensor in reader.tensors:
        numbers[tensor.tensor_type.name] = numbers.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    quantisation = ", ".join(sorted(numbers, key=lambda name: -numbers[name]))
    return {"file": path.name, "sha256": digest, "quantisation": quantisation}


def load_gguf(path: Path, dtype: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Returns the model with its weights dequantised, and what the library says of tensors that do not fit."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path.parent,
        # The whole path: a file of that name in the current folder would be taken instead.
        gguf_file=str(path.absolute()),
        use_safetensors=True,  # nothing beside the file is unpickled either
        # Otherwise weights may stay in GGUF's blocks, which can be neither saved nor trained.
        quantization_config=GgufConfig(dequantize=True),
        dtype=dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    model, info = loaded
    # Older releases give a weight the shape that it has in the file, whatever the config says.
    with torch.device("meta"):
        wanted = type(model)(model.config).state_dict()
    reshaped = {
        (name, tensor.shape, wanted[name].shape)
        for name, tensor in model.state_dict().items()
        if name in wanted and tensor.shape != wanted[name].shape
    }
    return model, info | {"mismatched_keys": set(info["mismatched_keys"]) | reshaped}


def finish_gguf(model: PreTrainedModel, reader: "GGUFReader", path: Path) -> None:
    """
    Checks that all of the file is in the model, and gives it what the library leaves out: every token that ends an
    answer, and its [`gguf_origin`].
    """
    _check_tensors(model, reader, path)
    _check_settings(model.config, reader, path)
    config = model.config
    config.__dict__.pop("_model_name_or_path", None)  # what the file calls itself
    setattr(config, ORIGIN, _origin_of(reader, path))
    ends = [_value(reader, key) for key in _MORE_ENDS]
    if model.generation_config is not None and model.generation_config.eos_token_id is not None:
        first = model.generation_config.eos_token_id
        every = list(dict.fromkeys([first, *(end for end in ends if end is not None)]))
        model.generation_config.eos_token_id = every if len(every) > 1 else first


def _check_tensors(model: PreTrainedModel, reader: "GGUFReader", path: Path) -> None:
    """
    Raises a `ValueError` where a tensor of the file has no place in the model: the library drops it without a word.

    All of the model's are filled by now, so nothing was dropped where it has as many numbers as the file.
    """
    own = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
    if sum(own.values()) == sum(int(tensor.n_elements) for tensor in reader.tensors):
        return
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = _value(reader, "general.architecture")
    names = get_tensor_name_map(
        next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture),
        model.config.get_text_config().num_hidden_layers,
    )
    known = {names.get_name(key, try_suffixes=(".weight", ".bias")) for key in model.state_dict()}
    left = sorted(tensor.name for tensor in reader.tensors if tensor.name not in known)
    shown = f" ({', '.join(left[:3])}{', ...' if len(left) > 3 else ''})" if left else ""
    raise ValueError(
        f"{path} has tensors{shown} that have no place in the {type(model).__name__} that transformers makes of it, "
        "which would be another model without them; give the model with safetensors weights."
    )


def _check_settings(config: PreTrainedConfig, reader: "GGUFReader", path: Path) -> None:
    """Raises a `ValueError` where the file says something of how the model computes that its config has not taken."""
    architecture = _value(reader, "general.architecture")

    def said(key: str, default: Any = None) -> Any:
        return _value(reader, f"{architecture}.{key}", default)

    given: Any = config.get_text_config().to_dict()
    rotary = given.get("rope_parameters") or {}
    of_layers = [value for value in rotary.values() if isinstance(value, dict)] or [rotary]
    wrong = []
    if all(one.get("rope_type", "default") == "default" for one in of_layers):
        if said("rope.scaling.type", "none") != "none":
            wrong.append("rope.scaling.type")
        wrong += [key for key in _FACTORS if said(key, 0) not in (0, 1)]
    theta = said("rope.freq_base")
    if theta is not None and all(one.get("rope_theta") != theta for one in of_layers):
        wrong.append("rope.freq_base")
    turned = said("rope.dimension_count")
    if turned is not None:
        head_dim = given.get("head_dim") or config.hidden_size // config.num_attention_heads
        if all(int(head_dim * one.get("partial_rotary_factor", 1.0)) != turned for one in of_layers):
            wrong.append("rope.dimension_count")
    # Some configs have a window by default, which is none of the file's.
    windows = {said("attention.sliding_window", 0), given.get("sliding_window") or 0}
    if len(windows) > 1 and any(0 < window < said("context_length", 0) for window in windows):
        wrong.append("attention.sliding_window")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if said(key) not in (None, 0, given.get(key)):
            wrong.append(key)
    if wrong:
        shown = ", ".join(f"{architecture}.{key} = {said(key)}" for key in wrong)
        raise ValueError(
            f"{path} says {shown}, which transformers does not take from a GGUF file, so the model would be another "
            "one; give the model with safetensors weights."
        )


def load_gguf_tokenizer(path: Path) -> Any:
    """Returns the tokenizer of the file as the library makes it."""
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=str(path.absolute()))


def finish_gguf_tokenizer(tokenizer: Any, reader: "GGUFReader", path: Path) -> None:
    """
    Lets the tokenizer split text as the file says where the library does not, or raises a `ValueError`: text in pieces
    that the model never saw still makes tokens, and the model is merely worse.
    """
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    count = len(_value(reader, "tokenizer.ggml.tokens"))
    if any(token["id"] >= count for token in stored["added_tokens"]):
        # The library's class for such vocabularies adds GPT-2's own end of text where there is none, and the model has
        # no embedding for it.
        stored["added_tokens"] = [token for token in stored["added_tokens"] if token["id"] < count]
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(stored))
    if _value(reader, "tokenizer.ggml.model") != "gpt2":
        return
    way, backend = _value(reader, "tokenizer.ggml.pre", "default"), tokenizer.backend_tokenizer
    if way in _DIGITS_APART:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    # The library puts a sequence there where it knows the way.
    elif way not in _AS_GPT2 and not isinstance(backend.pre_tokenizer, pre_tokenizers.Sequence):
        raise ValueError(
            f"{path} splits text before its merges in a way ({way!r}) that neither transformers nor hf_hybrid has; "
            "give the model with safetensors weights and its own tokenizer."
        )
    if way in _WHOLE_WORDS:
        backend.model.ignore_merges = True
        if _value(reader, "tokenizer.ggml.add_bos_token") is None:
            tokenizer.add_bos_token = True


def _value(reader: "GGUFReader", key: str, default: Any = None) -> Any:
    field = reader.get_field(key)
    return default if field is None else field.contents()
