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


# Of one layer, forward and backward, on an H100: docs/performance.md.
TORCH_ON_CUDA = "7 to 9 times as slow as"


def describe_environment() -> dict[str, Any]:
    """Returns versions (None for what is not installed), and for each device which kernel runs there and why."""
    versions = {"python": platform.python_version(), **{name: _version(dist) for name, dist in _PACKAGES.items()}}
    return {"platform": platform.platform(), "versions": versions, "devices": _devices()}


def describe_kernels(device: Any, kernel: str = "auto") -> str:
    """
    Which implementation runs the recurrences on `device`, why, and what it costs; one sentence. Raises a `ValueError`
    where `kernel="fla"` cannot run there.
    """
    from hf_hybrid.modeling.kernels import use_fla, why_not_fla

    if use_fla(device, kernel):
        return f"the recurrences run in fla's kernels on {device.type} (triton {_version('triton')})"
    if device.type != "cuda":
        return f"the recurrences run in torch on {device.type}; fla's kernels need a CUDA device"
    reason = "kernel='torch' asks for it" if kernel == "torch" else why_not_fla()
    return f"the recurrences run in torch on cuda, {TORCH_ON_CUDA} fla's kernels: {reason}"


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
    from hf_hybrid.modeling.kernels import use_fla

    return {"kernel": "fla" if use_fla(device) else "torch", "why": describe_kernels(device)}
