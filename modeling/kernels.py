"""Which implementation of a recurrence runs: fla's kernels on CUDA tensors, our torch forms everywhere else.

The choice is made per call from the tensors' device. That fla can be imported says nothing: without triton it imports
empty, and with triton but no GPU every op raises.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import re
from typing import Any

import torch

from .delta_rule import chunk_gated_delta_rule, recurrent_gated_delta_rule
from .gla import chunk_gla, recurrent_gla
from .kda import chunk_kda, recurrent_kda


# Hopper computes wrong key, value and decay gradients with these Triton versions (fla issue 640, fixed in 3.7.1).
_BROKEN_ON_HOPPER = ((3, 4, 0), (3, 7, 1))
# Below this many tokens without gradients the recurrent kernel is quicker than the chunked one.
_SHORT = 64


def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    kernel: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The gated delta rule on whichever implementation suits the tensors.

    Args:
        q, k: `[B, T, H, D]`, of unit length over D.
        v: `[B, T, H, V]`.
        g: `[B, T, H]`, log decay, at most 0.
        beta: `[B, T, H]`, write strength.
        initial_state: `[B, H, D, V]`, the state before the first token.
        seq_idx: `[B, T]`, document index of each token of a packed row; the state restarts where it changes.
        kernel: `"auto"`, `"torch"` or `"fla"`.

    Returns:
        The output `[B, T, H, V]` in v's dtype, and the state after the last token `[B, H, D, V]` in fp32 (fp64 for
        fp64 inputs).
    """
    if use_fla(q.device, kernel):
        inputs = {"q": q, "k": k, "v": v, "g": g, "beta": beta.to(v.dtype)}
        return _fla("gated_delta_rule", inputs, initial_state, seq_idx)
    form = recurrent_gated_delta_rule if q.shape[1] == 1 else chunk_gated_delta_rule
    return form(q, k, v, g=g, beta=beta, initial_state=initial_state, seq_idx=seq_idx)


def gated_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    g: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    kernel: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Gated linear attention on whichever implementation suits the tensors.

    Takes and returns what [`gated_delta_rule`] does, but for: no `beta`, q and k of any length, and `g`
    `[B, T, H, D]`, a log decay for each key channel.
    """
    if use_fla(q.device, kernel):
        return _fla("gla", {"q": q, "k": k, "v": v, "g": g}, initial_state, seq_idx)
    form = recurrent_gla if q.shape[1] == 1 else chunk_gla
    return form(q, k, v, g=g, initial_state=initial_state, seq_idx=seq_idx)


def kimi_delta_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    kernel: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The delta rule of Kimi Delta Attention on whichever implementation suits the tensors.

    Takes and returns what [`gated_delta_rule`] does, but for `g` `[B, T, H, D]`, a log decay for each key channel.
    """
    if use_fla(q.device, kernel):
        inputs = {"q": q, "k": k, "v": v, "g": g, "beta": beta.to(v.dtype)}
        return _fla("kda", inputs, initial_state, seq_idx)
    form = recurrent_kda if q.shape[1] == 1 else chunk_kda
    return form(q, k, v, g=g, beta=beta, initial_state=initial_state, seq_idx=seq_idx)


def use_fla(device: torch.device, kernel: str = "auto") -> bool:
    """Whether fla's kernels run for tensors on `device`; raises the reason where `kernel="fla"` cannot be had."""
    if kernel == "torch" or (kernel == "auto" and device.type != "cuda"):
        return False
    reason = f"the tensors are on {device.type!r}, not 'cuda'" if device.type != "cuda" else why_not_fla()
    if reason is None:
        return True
    if kernel == "fla":
        raise RuntimeError(f"kernel='fla' cannot run: {reason}. Use kernel='auto' or 'torch', or mend the cause.")
    return False


@functools.cache
def why_not_fla() -> str | None:
    """The reason why fla's kernels cannot run on this machine's GPU, or None where they can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    for package in ("triton", "fla"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed (pip install 'hf-hybrid[gpu]')"
    # GPUs of other makers have such numbers too.
    if torch.version.hip is None and torch.cuda.get_device_capability()[0] == 9:
        version = _triton_version()
        if version is None:
            return "triton's version is unknown, and some compute wrong gradients on Hopper; install 3.7.1 or later"
        low, high = _BROKEN_ON_HOPPER
        if low <= version < high:
            return f"triton {'.'.join(map(str, version))} computes wrong gradients on Hopper; install 3.7.1 or later"
    try:
        importlib.import_module("fla.ops.gated_delta_rule")
    except ImportError as error:
        return f"fla's operators do not import ({error})"
    return None


def _triton_version() -> tuple[int, ...] | None:
    """Triton's version; torch's nightly builds come with one under another name."""
    for package in ("triton", "pytorch-triton"):
        try:
            version = importlib.metadata.version(package)
        except ModuleNotFoundError:
            continue
        return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    return None


def _fla(
    name: str,
    inputs: dict[str, torch.Tensor],
    initial_state: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Runs fla's operators in `fla.ops.<name>` on `inputs` `[B, T, ...]`, which go by keyword: the order of arguments
    differs between the operators of a family.
    """
    ops = importlib.import_module(f"fla.ops.{name}")
    tensors = list(inputs.values()) + ([] if initial_state is None else [initial_state])
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    batch, length = inputs["q"].shape[:2]
    # The recurrent kernels have no backward, and some say so only by leaving the gradient out.
    short = not needs_grad and length <= _SHORT
    op = getattr(ops, f"fused_recurrent_{name}" if short else f"chunk_{name}")
    if name == "gla" and short:
        inputs = {"gk" if key == "g" else key: x for key, x in inputs.items()}
    options: dict[str, Any] = {"scale": inputs["q"].shape[-1] ** -0.5, "output_final_state": True}
    if seq_idx is None:
        state = None if initial_state is None else initial_state.float()
        return op(**inputs, initial_state=state, **options)
    if initial_state is not None:
        raise ValueError("packed rows (seq_idx) start from no state; got an initial_state. Unpack them to continue.")
    flat = {key: x.reshape(1, batch * length, *x.shape[2:]) for key, x in inputs.items()}
    starts = seq_idx != torch.nn.functional.pad(seq_idx[:, :-1], (1, 0), value=-1)
    starts[:, 0] = True
    offsets = torch.nn.functional.pad(starts.flatten().nonzero().flatten(), (0, 1), value=batch * length)
    output, states = op(**flat, cu_seqlens=offsets.to(torch.int64), **options)
    last_document = starts.sum(dim=1).cumsum(0) - 1
    return output.reshape(batch, length, *output.shape[2:]), states[last_document]
