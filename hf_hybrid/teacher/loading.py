"""
Loading of teachers, tokenizers and finished models. What does not load, or does not fill its config exactly, is a
`ValueError` of one sentence that names it and says what to do.
"""

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import RemoteEntryNotFoundError
from peft import PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    FineGrainedFP8Config,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import find_adapter_config_file
from transformers.utils.quantization_config import Mxfp4Config

from hf_hybrid.modeling import HybridConfig  # which registers the hybrid with the Auto classes

from ..adapters import merged
from ..run.recipe import check_dtype
from .embedded import embedded_teacher, embedded_tokenizer
from .gguf_file import (
    find_gguf,
    finish_gguf,
    finish_gguf_tokenizer,
    gguf_note,
    gguf_origin,
    load_gguf,
    load_gguf_tokenizer,
    parsed_once,
    read_gguf,
)
from .names import check_folder, check_name


# Formats whose weights the library makes plain ones as it reads them, if it is asked to.
_DEQUANTISED_WHILE_LOADING = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}
_ADAPTER = "adapter_model.safetensors"
_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.int64, torch.bool)


def load_pair(
    teacher: str,
    *,
    trust_remote_code: bool = False,
    dtype: str = "auto",
    revision: str | None = None,
    gguf_file: str | None = None,
) -> tuple[Any, Any]:
    """
    Returns a teacher in eval mode and its tokenizer; `"embedded"` is the one that ships with the package.

    `revision` is a branch, tag or commit of a teacher on the Hub. Both come from one commit, also where the branch
    moves in between. `gguf_file` is as in [`load_teacher`].
    """
    check_dtype(dtype)
    if teacher == "embedded":
        for name, value in (("revision", revision), ("gguf_file", gguf_file)):
            if value is not None:
                raise ValueError(f"{name}={value!r}, but the embedded teacher ships with the package; leave it out.")
        model = embedded_teacher()
        return (model if dtype == "auto" else model.to(getattr(torch, dtype))), embedded_tokenizer()
    check_name(teacher)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "gguf_file": gguf_file}
    gguf = _find_gguf(teacher, gguf_file, checked_revision(teacher, revision))
    with contextlib.nullcontext() if gguf is None else parsed_once():
        model = load_teacher(teacher, dtype=dtype, revision=revision, **options)
        commit = model.config._commit_hash or revision
        return model, load_tokenizer(teacher, revision=commit, **options)


def load_teacher(
    teacher: str | os.PathLike,
    *,
    trust_remote_code: bool = False,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    gguf_file: str | None = None,
) -> PreTrainedModel:
    """
    Returns a causal language model from the Hub or a folder, in eval mode, with weights that fill its config exactly.

    They come from safetensors and GGUF files only: nothing is unpickled. Code that comes with the model runs only
    where the caller says so. Quantised weights are dequantised and an adapter is merged into its base; a warning says
    so. `teacher` may be a GGUF file, or a folder with one; `gguf_file` names one of several, or one on the Hub.
    """
    model, notes = prepared_teacher(
        teacher, trust_remote_code=trust_remote_code, dtype=dtype, revision=revision, gguf_file=gguf_file
    )
    for note in notes:
        warnings.warn(f"{teacher}: {note}.", UserWarning, stacklevel=2)
    return model


def prepared_teacher(
    teacher: str | os.PathLike,
    *,
    trust_remote_code: bool = False,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    gguf_file: str | None = None,
) -> tuple[PreTrainedModel, list[str]]:
    """As [`load_teacher`], with notes of what was done to it in the place of warnings."""
    model, notes = _load(teacher, dtype, trust_remote_code, revision, dequantise=True, gguf_file=gguf_file)
    local = Path(teacher).exists()
    model.config._commit_hash = None if local else _commit_of(str(teacher), revision, gguf_file or "config.json")
    return model, notes


def empty_teacher(
    name: str, *, trust_remote_code: bool = False, revision: str | None = None, gguf_file: str | None = None
) -> PreTrainedModel:
    """
    Returns the model that [`load_teacher`] would load, without its weights: on the device "meta", from its config
    alone. An adapter stands for its base. The embedded teacher is small, and comes with its weights.
    """
    if name == "embedded":
        return embedded_teacher()
    check_name(name)
    revision = checked_revision(name, revision)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    gguf = _find_gguf(name, gguf_file, revision)
    if gguf is not None:
        with parsed_once():
            read_gguf(gguf)
            with _explained(gguf):
                config = AutoConfig.from_pretrained(gguf.parent, gguf_file=str(gguf.absolute()))
    else:
        check_folder(name)
        with _explained(name):
            adapter = find_adapter_config_file(str(name), revision=revision)
        if adapter is not None:
            with _explained(name, "adapter"):
                base = PeftConfig.from_pretrained(str(Path(adapter).parent))
            if not base.base_model_name_or_path:
                raise ValueError(f"the adapter in {name} names no base model; write it into its adapter_config.json.")
            return empty_teacher(base.base_model_name_or_path, revision=base.revision, **options)
        if Path(name).is_dir() and next(Path(name).glob("*.safetensors"), None) is None:
            raise ValueError(f"the folder {name} holds no safetensors weights; save the model there again.")
        with _explained(name):
            config = AutoConfig.from_pretrained(name, revision=revision, **options)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # it is dequantised as it is loaded
    with torch.device("meta"), _explained(name):
        return AutoModelForCausalLM.from_config(config, **options)


def load_model(
    path: str | os.PathLike,
    *,
    dtype: Any = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    kernel: str | None = None,
    gguf_file: str | None = None,
) -> Any:
    """
    Returns a causal language model in eval mode, from safetensors files only, or from a GGUF file.

    `revision` is a branch, tag or commit of a model on the Hub, by default its main branch. A checkpoint that lacks
    some of the tensors that its config asks for, has more of them, or has them in another shape, is an error: the
    library would fill the gaps with random numbers. `kernel` is for a hybrid, see [`convert`]; by default that of its
    config. `gguf_file` is as in [`load_teacher`].
    """
    return _load(path, dtype, trust_remote_code, revision, dequantise=False, kernel=kernel, gguf_file=gguf_file)[0]


def _load(
    path: str | os.PathLike,
    dtype: Any,
    trust_remote_code: bool,
    revision: str | None,
    *,
    dequantise: bool,
    kernel: str | None = None,
    gguf_file: str | None = None,
) -> tuple[Any, list[str]]:
    check_name(path)
    revision = checked_revision(path, revision)
    gguf = _find_gguf(path, gguf_file, revision)
    if gguf is not None:
        return _load_gguf(path, gguf, dtype)
    check_folder(path)
    with _explained(path):
        adapter = find_adapter_config_file(str(path), revision=revision)
    if adapter is not None:
        return _load_merged(path, Path(adapter).parent, dtype, trust_remote_code, revision)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    if kernel is not None:
        options["kernel"] = kernel
    with _explained(path):
        stored = PreTrainedConfig.get_config_dict(path, revision=revision)[0]
    if not isinstance(stored, dict):
        raise ValueError(f"the config.json of {path} is a {type(stored).__name__}; restore the one of the model.")
    if stored.get("model_type") == HybridConfig.model_type and not isinstance(stored.get("text_config"), dict):
        # Otherwise the defaults of Llama, a model of billions of parameters, all of them random.
        raise ValueError(f"the config.json of {path} has lost its text_config, the teacher's; restore that file.")
    method = None
    if dequantise and stored.get("quantization_config") is not None:
        method = str(stored["quantization_config"].get("quant_method"))
        if method in _DEQUANTISED_WHILE_LOADING:
            options["quantization_config"] = _DEQUANTISED_WHILE_LOADING[method](dequantize=True)
    with _explained(path), _without_report(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            # Otherwise an error that names none of them.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    model, info = loaded
    _check_filled(path, info)
    notes = []
    if method is not None:
        model = _dequantised(path, model, method)
        notes.append(f"its weights were dequantised ({method}), which is exact; rounding of activations is left out")
    _check_finite(path, model)
    return model.eval(), notes


def _find_gguf(name: str | os.PathLike, gguf_file: str | None, revision: str) -> Path | None:
    if Path(name).exists():
        return find_gguf(name, gguf_file)
    with _explained(name), contextlib.suppress(RemoteEntryNotFoundError):
        return find_gguf(name, gguf_file, revision)
    raise ValueError(f"{name} has no file {gguf_file} on the Hub at {revision}; check the name.")


def _load_gguf(name: str | os.PathLike, path: Path, dtype: Any) -> tuple[Any, list[str]]:
    with parsed_once():
        reader = read_gguf(path)
        with _explained(path), _without_report():
            model, info = load_gguf(path, dtype)
    _check_filled(path, info, "the config that its metadata make")
    model = _dequantised(path, model, "gguf")
    finish_gguf(model, reader, path)
    model.config._name_or_path = str(name)  # not where the cache of the Hub keeps it
    _check_finite(path, model)
    return model.eval(), [gguf_note(gguf_origin(model.config) or {})]


def _dequantised(path: str | os.PathLike, model: Any, method: str) -> Any:
    """The model with plain weights, or a `ValueError` where the library does not make them."""
    if quantised_tensor(model) is not None:
        try:
            model = model.dequantize()
        except (NotImplementedError, ValueError, AttributeError) as error:
            raise _not_dequantised(path, method) from error
    # Weights of a method that the library does not know may be anything.
    if quantised_tensor(model) is not None or getattr(model.config, "quantization_config", None) is not None:
        raise _not_dequantised(path, method)
    return model


def _not_dequantised(path: str | os.PathLike, method: str) -> ValueError:
    return ValueError(f"{path} is quantised ({method}) and cannot be dequantised here; give the model before that.")


def _load_merged(
    path: str | os.PathLike, folder: Path, dtype: Any, trust_remote_code: bool, revision: str
) -> tuple[Any, list[str]]:
    """Loads the base of the adapter in `folder`, and merges the adapter into it."""
    if (folder / "config.json").is_file():
        raise ValueError(
            f"{path} holds a model and an adapter (adapter_config.json), and which is meant is not clear; give each a "
            "folder of its own, that of the adapter naming the other as its base."
        )
    if not Path(path).is_dir():
        with _explained(path):
            hf_hub_download(str(path), _ADAPTER, revision=revision)
    if not (folder / _ADAPTER).is_file():
        raise ValueError(f"the adapter in {path} has no {_ADAPTER}; save it again with save_pretrained().")
    with _explained(path, "adapter"):
        config = PeftConfig.from_pretrained(str(folder))
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(f"the adapter in {path} names no base model; write it into its adapter_config.json.")
    model, notes = _load(base, dtype, trust_remote_code, config.revision, dequantise=True)
    with _explained(path, "adapter"):
        adapted: Any = get_peft_model(model, config)
        loaded = adapted.load_adapter(str(folder), "default")
    keys = {"missing_keys": loaded.missing_keys, "unexpected_keys": loaded.unexpected_keys, "mismatched_keys": ()}
    _check_filled(path, keys, f"an adapter of {base}")
    model, note = merged(adapted)
    return model.eval(), [*notes, f"{note} (the base is {base})"]


def load_tokenizer(
    name: str | os.PathLike,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    gguf_file: str | None = None,
) -> Any:
    """
    Returns the tokenizer of a model in a folder or, by its main branch or `revision`, on the Hub; or that in a GGUF
    file, see [`load_teacher`].
    """
    check_name(name)
    revision = checked_revision(name, revision)
    gguf = _find_gguf(name, gguf_file, revision)
    if gguf is not None:
        with parsed_once():
            reader = read_gguf(gguf)
            with _explained(gguf, "tokenizer"):
                tokenizer = load_gguf_tokenizer(gguf)
        finish_gguf_tokenizer(tokenizer, reader, gguf)
        return tokenizer
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    with _explained(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    # Where there are no files, some classes of the library make a tokenizer without a vocabulary.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ValueError(f"{name} has no tokenizer; save the model's in that folder: tokenizer.save_pretrained(...).")
    return tokenizer


def checked_revision(name: str | os.PathLike, revision: str | None) -> str:
    """The revision of the model `name` to load, the main branch by default; a `ValueError` where it has none."""
    if revision is None:
        return "main"
    if not revision:
        raise ValueError(f"the revision of {name} is empty; give a branch, tag or commit, or leave it out.")
    if Path(name).exists():
        kind = "folder" if Path(name).is_dir() else "file"
        raise ValueError(f"revision={revision!r} is one of the Hub's, but {name} is a {kind} here; leave it out.")
    return revision


def _commit_of(name: str, revision: str | None, file: str) -> str | None:
    """The commit on the Hub that a model with that file was just loaded from: the name of its folder in the cache."""
    path = try_to_load_from_cache(name, file, revision=revision)
    return Path(path).parents[file.count("/")].name if isinstance(path, str) else None


def check_plain(model: PreTrainedModel) -> None:
    """Raises a `ValueError` where the weights of a model in memory cannot be copied as they are."""
    check_weights(model)
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            raise ValueError(
                f"the teacher has an adapter in {name}; give the peft.PeftModel, the adapter's folder, or the model "
                "with the adapter merged."
            )


def check_weights(model: Any) -> None:
    """Raises a `ValueError` where a weight is not in memory, or is not the number that it stands for."""
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise ValueError(
                f"{name} of the teacher is not in memory (its device is 'meta'); load the teacher whole, without "
                "offloading: device_map={'': device}."
            )
    quantised = quantised_tensor(model)
    if quantised is not None:
        raise ValueError(
            f"the teacher is quantised ({quantised} is not in floating point); give teacher.dequantize(), which is "
            "the teacher from then on, or its folder or Hub id."
        )


def quantised_tensor(model: Any) -> str | None:
    """The name of a tensor of the model that no plain model has, if there is one."""
    for name, tensor in model.state_dict().items():
        if tensor.dtype not in _PLAIN or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return name
    return None


def _check_filled(name: str | os.PathLike, info: dict[str, Any], config: str = "its config.json") -> None:
    """Raises a `ValueError` where the library had to make up, drop or resize a tensor of the model `name`."""
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    reshaped = {key: (list(there), list(wanted)) for key, there, wanted in info["mismatched_keys"]}
    problems = []
    if missing - reshaped.keys():
        problems.append(f"{_listed(missing - reshaped.keys())} missing")
    if unexpected:
        problems.append(f"{_listed(unexpected)} left over")
    if reshaped:
        key, (there, wanted) = min(reshaped.items())
        problems.append(f"{_listed(reshaped)} of another shape (the first is {there}, the config wants {wanted})")
    if problems:
        raise ValueError(
            f"the weights in {name} do not fill {config}: {'; '.join(problems)}. Give a folder whose config and "
            "weights were saved together."
        )


def _check_finite(name: str | os.PathLike, model: PreTrainedModel) -> None:
    for key, tensor in model.state_dict().items():
        if (
            tensor.is_floating_point()
            and tensor.dtype in _PLAIN
            and not tensor.is_meta
            and not torch.isfinite(tensor).all()
        ):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(
                f"{name} cannot be used: {key} holds values that are not finite in {kind}. Give a sound copy, or "
                "another dtype where they are only too large for this one."
            )


def _listed(names: Iterable[str]) -> str:
    """`1 tensor (a) is`, or `5 tensors (a, b, c, ...) are`."""
    ordered = sorted(names)
    shown = ", ".join(ordered[:3]) + (", ..." if len(ordered) > 3 else "")
    return f"{len(ordered)} tensor{'s' * (len(ordered) > 1)} ({shown}) {'is' if len(ordered) == 1 else 'are'}"


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """
    Keeps the library from printing its table of tensors that do not fit, which here becomes one sentence. When it is
    told so, it looks which tensors are not sharded, and speaks of those.
    """
    places = ("modeling_utils", "distributed.tensor_parallel", "integrations.tensor_parallel")
    loggers = [logging.getLogger(f"transformers.{place}") for place in places]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _explained(name: str | os.PathLike, what: str = "model") -> Iterator[None]:
    """
    Makes whatever the library raises about the model or tokenizer `name` a `ValueError` that says so in one sentence.

    Any exception: a config that was edited by hand shows in the library's code as whatever the value leads to there.
    """
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"the weights in {name} are damaged ({error}); delete that folder and make it again, or download it again."
        ) from error
    except ImportError as error:
        raise ValueError(f"{name} needs a package that is not installed: {_line(error)}") from error
    except OSError as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        # The second is what the library says of a model on the Hub.
        if any(Path(name).glob("pytorch_model*.bin")) or "cannot be loaded with `safetensors`" in first:
            raise ValueError(
                f"{name} has no safetensors weights; a pytorch_model.bin is a pickle, which can run code, and is not "
                "opened here. Where you trust it, load it with transformers once and save_pretrained() it."
            ) from error
        if Path(name).is_dir():
            raise ValueError(f"the folder {name} holds no complete {what}: {first}") from error
        if "is not a valid git identifier" in first:
            raise ValueError(f"{name} has no such revision on the Hub: {first}") from error
        raise ValueError(
            f"{str(name)!r} was found neither as a folder nor as a model on the Hub; check the spelling, the network, "
            "and, for a private or gated model, that you are logged in."
        ) from error
    except Exception as error:
        raise ValueError(_reason(name, what, error)) from error


def _reason(name: str | os.PathLike, what: str, error: Exception) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return (
            f"{name} needs code of its own to load; read that code, and if you trust it pass --trust-remote-code "
            "(trust_remote_code=True in Python)."
        )
    if "Unrecognized model" in text:
        return f"{name} holds no model that transformers knows; check the model_type in its config.json."
    if "does not recognize this architecture" in text:
        kind = re.search(r"model type `([^`]*)`", text)
        return (
            f"{name} is of the type {kind[1] if kind else 'that it names'!r}, which transformers "
            f"{transformers.__version__} does not know; check the model_type in its config.json, or install a newer "
            "transformers."
        )
    if "Unrecognized configuration class" in text and what == "model":
        config = re.search(r"(\w+)'>", text)
        return (
            f"{name} holds a model of {config[1] if config else 'a class'} that is no causal language model; give a "
            "decoder such as Llama, Qwen or Mistral."
        )
    if "GGUF" in text and "not supported" in text:
        return (
            f"{name} is of an architecture that transformers {transformers.__version__} does not read from GGUF files "
            f"({_line(error).rstrip('.')}); give the model with safetensors weights."
        )
    if what == "tokenizer":
        return f"{name} has no tokenizer that loads; save the model's in that folder again ({_line(error)})"
    return f"{name} does not load; check its config.json and its weights ({type(error).__name__}: {_line(error)})"


def _line(error: BaseException) -> str:
    """The message of an error in one line, cut where it goes on for long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."
