"""What this machine has, and which kernels would run on it."""

import importlib.metadata
import platform
from typing import Any


_PACKAGES = {
    "hf_hybrid": "hf_hybrid",
    "torch": "torch",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "trl": "trl",
    "peft": "peft",
    "datasets": "datasets",
    "safetensors": "safetensors",
    "fla": "flash-linear-attention",
    "triton": "triton",
}


def describe_environment() -> dict[str, Any]:
    """Returns versions (None for what is not installed), and for each device which kernel runs there and why."""
    versions = {"python": platform.python_version(), **{name: _version(dist) for name, dist in _PACKAGES.items()}}
    return {"platform": platform.platform(), "versions": versions, "devices": _devices()}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        if distribution == "hf_hybrid":  # a checkout that is not installed
            from hf_hybrid import __version__

            return __version__
        return None


def _devices() -> list[dict[str, Any]]:
    import torch

    names = {"cpu": platform.processor() or platform.machine()}
    if torch.cuda.is_available():
        names |= {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    if torch.backends.mps.is_available():
        names["mps"] = "Apple GPU"
    return [{"device": device, "name": name, **_kernel(torch.device(device))} for device, name in names.items()]


def _kernel(device: Any) -> dict[str, str]:
    from hf_hybrid.modeling.kernels import use_fla, why_not_fla

    if use_fla(device):
        return {"kernel": "fla", "why": "a CUDA device, and fla's operators import"}
    if device.type != "cuda":
        return {"kernel": "torch", "why": f"fla's kernels need CUDA tensors, these are on {device.type}"}
    return {"kernel": "torch", "why": why_not_fla() or "fla was not chosen"}
