"""The small teacher that ships with the package: enough to see every stage work on a CPU in minutes."""

from importlib.resources import as_file, files
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


_FOLDER = files("hf_hybrid") / "embedded_teacher"


def embedded_teacher() -> PreTrainedModel:
    """Returns the embedded softmax teacher, in fp32 and eval mode; its card is `embedded_teacher/README.md`."""
    with as_file(_FOLDER) as folder:
        return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).eval()


def embedded_tokenizer() -> Any:
    """Returns the embedded teacher's tokenizer: byte-level BPE trained on Python's standard library."""
    with as_file(_FOLDER) as folder:
        return AutoTokenizer.from_pretrained(folder)
