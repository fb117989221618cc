"""Which implementation of a recurrence runs: fla's kernels on CUDA tensors, our torch forms everywhere else.

The choice is made per call from the tensors' device. That fla can be imported says nothing: without triton it imports
empty, and with triton but no GPU every op raises.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
from typing import Any

import torch

from .delta_rule import chunk_gated_delta_rule, recurrent_gated_delta_rule


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
        return _fla_gated_delta_rule(q, k, v, g, beta, initial_state, seq_idx)
    form = recurrent_gated_delta_rule if q.shape[1] == 1 else chunk_gated_delta_rule
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
    triton_version = tuple(int(part) for part in importlib.metadata.version("triton").split("+")[0].split(".")[:3])
    low, high = _BROKEN_ON_HOPPER
    if torch.cuda.get_device_capability()[0] == 9 and low <= triton_version < high:
        return (
            f"triton {'.'.join(map(str, triton_version))} computes wrong gradients on Hopper; install 3.7.1 or later"
        )
    try:
        importlib.import_module("fla.ops.gated_delta_rule")
    except ImportError as error:
        return f"fla's operators do not import ({error})"
    return None


def _fla_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    ops = importlib.import_module("fla.ops.gated_delta_rule")
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, g, beta))
    short = not needs_grad and q.shape[1] <= _SHORT  # the recurrent kernel has no backward
    op = ops.fused_recurrent_gated_delta_rule if short else ops.chunk_gated_delta_rule
    options: dict[str, Any] = {"scale": q.shape[-1] ** -0.5, "output_final_state": True}
    if seq_idx is None:
        return op(q, k, v, g=g, beta=beta.to(v.dtype), initial_state=initial_state, **options)
    if initial_state is not None:
        raise ValueError("packed rows (seq_idx) start from no state; got an initial_state. Unpack them to continue.")
    batch, length = q.shape[:2]
    flat = [x.reshape(1, batch * length, *x.shape[2:]) for x in (q, k, v, g, beta.to(v.dtype))]
    starts = seq_idx != torch.nn.functional.pad(seq_idx[:, :-1], (1, 0), value=-1)
    starts[:, 0] = True
    offsets = torch.nn.functional.pad(starts.flatten().nonzero().flatten(), (0, 1), value=batch * length)
    output, states = op(*flat[:3], g=flat[3], beta=flat[4], cu_seqlens=offsets.to(torch.int64), **options)
    last_document = starts.sum(dim=1).cumsum(0) - 1
    return output.reshape(batch, length, *output.shape[2:]), states[last_document]
