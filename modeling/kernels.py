"""Which implementation of a recurrence runs: fla's kernels on CUDA tensors, our torch forms everywhere else.

The choice is made per call from the tensors' device, dtype and widths. That fla can be imported says nothing: without
triton it imports empty, and with triton but no GPU every op raises.

Whatever comes in, both implementations get the same operands: q, k and beta in v's dtype, the log decay g and the
state in fp32 (fp64 for an fp64 v). Under autocast rotary embeddings and norms give q and k in fp32 beside a bf16 v,
and Triton multiplies nothing but one dtype. The output has v's dtype.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.utils import logging

from .ops_common import check_inputs, unit, widen
from .ops_delta_rule import chunk_gated_delta_rule, recurrent_gated_delta_rule
from .ops_gla import chunk_gla, recurrent_gla
from .ops_kda import chunk_kda, recurrent_kda


logger = logging.get_logger(__name__)

KERNELS = ("auto", "torch", "fla")
_Form = Callable[..., tuple[torch.Tensor, torch.Tensor]]
# The torch forms of each family of operators: token by token, and in chunks.
_FORMS: dict[str, tuple[_Form, _Form]] = {
    "gated_delta_rule": (recurrent_gated_delta_rule, chunk_gated_delta_rule),
    "gla": (recurrent_gla, chunk_gla),
    "kda": (recurrent_kda, chunk_kda),
}
# The documents of a row, for as long as its `seq_idx` lives, and the version of that at which they were read off.
_DOCUMENTS: Any = WeakTensorKeyDictionary()
# What fla 0.6.0 can do. Its products need 16 channels at least, and more than 256 key channels are refused by
# the delta rules (fla/ops/common/chunk_delta_h.py, fla/ops/kda/chunk.py), not by gated linear attention. It says of
# odd widths that Triton miscompiles them in 16 bits (fla/ops/common/chunk_o.py).
_FLA_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_NARROWEST = 16
_WIDEST_KEY = {"gated_delta_rule": 256, "gla": None, "kda": 256}
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
            `initial_state` belongs to a row's first document, the returned state to its last.
        kernel: `"auto"` takes fla where it can run, `"torch"` never; `"fla"` raises where it cannot.

    Returns:
        The output `[B, T, H, V]` in v's dtype, and the state after the last token `[B, H, D, V]` in fp32 (fp64 for
        fp64 inputs).
    """
    inputs, state = to_one_dtype({"q": q, "k": k, "v": v, "g": g, "beta": beta}, initial_state)
    return _run("gated_delta_rule", inputs, state, seq_idx, kernel)


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
    inputs, state = to_one_dtype({"q": q, "k": k, "v": v, "g": g}, initial_state)
    return _run("gla", inputs, state, seq_idx, kernel)


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
    inputs, state = to_one_dtype({"q": q, "k": k, "v": v, "g": g, "beta": beta}, initial_state)
    return _run("kda", inputs, state, seq_idx, kernel)


def _run(
    family: str,
    inputs: dict[str, torch.Tensor],
    state: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    kernel: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What suits `inputs`, of [`to_one_dtype`]. In a compiled decoding step that is the torch form on a GPU, too: it
    becomes a part of the graph and writes the state into the cache, where one of fla's kernels would cut the graph and
    leave the state to be copied. Whoever names fla gets fla.
    """
    if not torch.compiler.is_compiling():
        return _choose(family, inputs, state, seq_idx, kernel)
    if inputs["q"].shape[1] == 1 and kernel in ("auto", "torch"):
        return _FORMS[family][0](**inputs, initial_state=state, seq_idx=seq_idx)
    return _outside_graphs(family, inputs, state, seq_idx, kernel)


def _choose(
    family: str,
    inputs: dict[str, torch.Tensor],
    state: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    kernel: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """fla's operator, or the torch form for so many tokens."""
    if _runs_on_fla(family, inputs, kernel):
        return _fla(family, inputs, state, seq_idx)
    recurrent, chunked = _FORMS[family]
    form = recurrent if inputs["q"].shape[1] == 1 else chunked
    return form(**inputs, initial_state=state, seq_idx=seq_idx)


# fla's operators and our chunked forms are left out of graphs in any case; here the choice between them is, too.
_outside_graphs = torch.compiler.disable(_choose)


def delta_rule_of_logits(
    family: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    decay: torch.Tensor,
    write: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    padding_mask: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    kernel: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    A delta rule from what is projected, with `g = -exp(A_log) softplus(decay + dt_bias)`, `beta = sigmoid(write)`, and
    q and k brought to unit length. fla's kernels do all that themselves, but for padding, which they do not know.

    Args:
        family: `"gated_delta_rule"` or `"kda"`.
        q, k, v, initial_state, seq_idx, kernel: as in [`gated_delta_rule`], q and k of any length.
        decay: `[B, T, H]`, or `[B, T, H, D]` of `"kda"`.
        write: `[B, T, H]`.
        A_log: `[H]`.
        dt_bias: `[H]`, or `[H D]` of `"kda"`.
        padding_mask: `[B, T]`, 1 for tokens and 0 for padding, which neither decays nor writes.

    Returns:
        As [`gated_delta_rule`].
    """
    by_channel = family == "kda"
    if padding_mask is None and fuses(v, kernel, family, q.shape[-1]):
        inputs, state = to_one_dtype({"q": q, "k": k, "v": v, "beta": write}, initial_state)
        return _fla(family, inputs | {"g": decay}, state, seq_idx, {"A_log": A_log, "dt_bias": dt_bias})
    bias, rate = widen(dt_bias), widen(A_log).exp()
    if by_channel:
        bias, rate = bias.unflatten(-1, decay.shape[-2:]), rate[..., None]
    g = -rate * torch.nn.functional.softplus(widen(decay) + bias)
    beta = torch.sigmoid(widen(write))
    if padding_mask is not None:  # no decay and no write: the state passes over padding unchanged
        g = g * padding_mask.view(*padding_mask.shape, *(1,) * (g.ndim - 2))
        beta = beta * padding_mask[..., None]
    rule = kimi_delta_attention if by_channel else gated_delta_rule
    return rule(unit(q), unit(k), v, g=g, beta=beta, initial_state=initial_state, seq_idx=seq_idx, kernel=kernel)


def fuses(v: torch.Tensor, kernel: str, family: str = "gated_delta_rule", key_width: int = _NARROWEST) -> bool:
    """Whether fla's kernels do the elementwise work around them too: wherever they run, outside of compiled graphs."""
    if torch.compiler.is_compiling():
        return False
    # Widths first: a CPU names those that kernel="fla" cannot do, as [`_runs_on_fla`] says.
    return why_unfit(family, v.dtype, key_width, v.shape[-1]) is None and use_fla(v.device, kernel)


def fused_gated_norm(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float, activation: str
) -> torch.Tensor:
    """RMS norm over the last axis of `x` `[B, T, H, V]`, times `weight` `[V]` and the activated `gate`, by fla."""
    operators = importlib.import_module("fla.modules.norm.fused_norm_gate")
    normed: torch.Tensor = operators.rms_norm_gated(x, gate, weight, None, activation=activation, eps=eps)
    return normed


def fused_convolution(x: torch.Tensor, weight: torch.Tensor, seq_idx: torch.Tensor | None) -> torch.Tensor:
    """The causal convolution of `x` `[B, T, C]` with `weight` `[C, K]`, each document by itself, by fla."""
    operators = importlib.import_module("fla.modules.causal_conv1d")
    if seq_idx is None:
        convolved: torch.Tensor = operators.causal_conv1d(x, weight)[0]
        return convolved
    row = x.reshape(1, -1, x.shape[-1])
    convolved = operators.causal_conv1d(row, weight, cu_seqlens=documents_of(seq_idx).offsets)[0]
    return convolved.view(x.shape)


def to_one_dtype(
    inputs: dict[str, torch.Tensor], initial_state: torch.Tensor | None
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """
    The operands as every implementation gets them: q, k and beta in v's dtype, `g` and the state in fp32, or fp64 for
    an fp64 v. Raises a `ValueError` for what is no floating-point number or on another device than v.
    """
    v = inputs["v"]
    for name, x in {**inputs, "initial_state": initial_state}.items():
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{name} has dtype {x.dtype}, expected a floating-point dtype: convert it first.")
        if x is not None and x.device != v.device:
            raise ValueError(f"{name} is on {str(x.device)!r} and v on {str(v.device)!r}: move them to one device.")
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    operands = {name: x.to(wide if name == "g" else v.dtype) for name, x in inputs.items()}
    return operands, None if initial_state is None else initial_state.to(wide)


def why_unfit(family: str, dtype: torch.dtype, key_width: int, value_width: int) -> str | None:
    """The reason why fla's operators of `family` cannot take operands of this dtype and these widths, or None."""
    if dtype not in _FLA_DTYPES:
        return f"fla computes in fp32, bf16 and fp16, and the operands are {str(dtype).removeprefix('torch.')}"
    widths = f"heads have {key_width} key and {value_width} value channels"
    if min(key_width, value_width) < _NARROWEST:
        return f"fla needs {_NARROWEST} channels or more, and {widths}"
    widest = _WIDEST_KEY[family]
    if widest is not None and key_width > widest:
        return f"fla's {family} takes {widest} key channels at most, and {widths}"
    if dtype != torch.float32 and (key_width % 2 or value_width % 2):
        return f"fla needs even widths in 16 bits, and {widths}"
    return None


def _runs_on_fla(family: str, inputs: dict[str, torch.Tensor], kernel: str) -> bool:
    """Whether fla takes this call; raises where `kernel="fla"` and it cannot."""
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r} is unknown; choose one of {', '.join(map(repr, KERNELS))}.")
    q, v = inputs["q"], inputs["v"]
    unfit = why_unfit(family, v.dtype, q.shape[-1], v.shape[-1])
    if kernel == "fla" and unfit is not None:  # before the device is looked at: a CPU refuses what a GPU would
        raise ValueError(f"kernel='fla' cannot run: {unfit}. Use kernel='auto' or 'torch'.")
    if not use_fla(v.device, kernel):
        if kernel == "auto" and v.device.type == "cuda":
            _warn(why_not_fla())
        return False
    if unfit is not None:
        _warn(unfit)
    return unfit is None


def _warn(reason: str | None) -> None:
    if not torch.compiler.is_compiling():  # a compiled graph has no place for it, and was warned when run without
        logger.warning_once(
            f"fla's kernels do not run here: {reason}. The torch form of the recurrence runs instead, several times "
            "slower on a GPU; kernel='torch' asks for it without this warning."
        )


def use_fla(device: torch.device, kernel: str = "auto") -> bool:
    """Whether fla's kernels run for tensors on `device`; raises the reason where `kernel="fla"` cannot be had."""
    if kernel == "torch" or (kernel == "auto" and device.type != "cuda"):
        return False
    reason = f"the tensors are on {device.type!r}, not 'cuda'" if device.type != "cuda" else why_not_fla()
    if reason is None:
        tune_norms_by_width()
        return True
    if kernel == "fla":
        raise ValueError(f"kernel='fla' cannot run: {reason}. Use kernel='auto' or 'torch', or mend the cause.")
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


@functools.cache
def tune_norms_by_width() -> None:
    """
    Lets fla choose once for each width of a vector how its norms run. By itself it does so for every 65,536 vectors
    (`NB`): each other length of a prompt or a batch would wait for 34 kernels to be compiled.
    """
    gated = importlib.import_module("fla.modules.norm.fused_norm_gate")
    unit_length = importlib.import_module("fla.modules.norm.l2norm")
    for module in (gated, unit_length):
        autotuner = module.triton.runtime.autotuner
        for kernel in vars(module).values():
            tuner = kernel.fn if isinstance(kernel, autotuner.Heuristics) else kernel
            if isinstance(tuner, autotuner.Autotuner):
                tuner.keys = [key for key in tuner.keys if key != "NB"]


def _triton_version() -> tuple[int, ...] | None:
    """Triton's version; torch's nightly builds come with one under another name."""
    for package in ("triton", "pytorch-triton"):
        try:
            version = importlib.metadata.version(package)
        except ModuleNotFoundError:
            continue
        return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    return None


class Documents(NamedTuple):
    """
    Where the documents of packed rows begin and end, all rows in one.

    Args:
        offsets: `[N + 1]`, int64, the first token of each of the N documents, and the number of tokens.
        first, last: `[B]`, each row's first and last document.
        most: documents of the row that has the most.
    """

    offsets: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    most: int


def documents_of(seq_idx: torch.Tensor) -> Documents:
    """
    Reads the documents off `seq_idx` `[B, T]`. On a GPU the host has to wait for that, so it is done once: all layers
    of a forward pass get the same tensor, also where they are computed again in the backward pass. fla, too, knows its
    offsets by their identity, and makes what follows from them once.
    """
    version = -1 if seq_idx.is_inference() else seq_idx._version
    known = _DOCUMENTS.get(seq_idx)
    if known is not None and known[0] == version:
        found: Documents = known[1]
        return found
    starts = seq_idx != torch.nn.functional.pad(seq_idx[:, :-1], (1, 0))
    starts[:, 0] = True
    offsets = torch.nn.functional.pad(starts.flatten().nonzero().flatten(), (0, 1), value=seq_idx.numel())
    count = starts.sum(dim=1)
    last = count.cumsum(0) - 1
    found = Documents(offsets.to(torch.int64), last + 1 - count, last, int(count.max()))
    _DOCUMENTS[seq_idx] = version, found
    return found


class FlaCall(NamedTuple):
    """What goes to fla: the operator's name, its keyword arguments, and of packed rows each row's last document."""

    operator: str
    arguments: dict[str, Any]
    last_document: torch.Tensor | None


def prepare_fla(
    family: str,
    inputs: dict[str, torch.Tensor],
    initial_state: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    of_logits: dict[str, torch.Tensor] | None = None,
) -> FlaCall:
    """
    What fla is called with, on any device.

    Arguments go by keyword: their order differs between the operators of a family.

    Args:
        family: the folder of the operators, `fla.ops.<family>`.
        inputs: q, k, v, g and, but for "gla", beta, `[B, T, ...]`, from [`to_one_dtype`].
        initial_state: `[B, H, D, V]`.
        seq_idx: `[B, T]`. fla wants packed rows as one row with cumulative lengths of its documents.
        of_logits: `A_log` and `dt_bias` where g and beta are logits and q and k of any length, see
            [`delta_rule_of_logits`].
    """
    q = inputs["q"]
    check_inputs(
        q,
        inputs["k"],
        inputs["v"],
        inputs["g"],
        inputs.get("beta"),
        initial_state,
        seq_idx,
        decay_per_channel=family != "gated_delta_rule",
    )
    batch, length = q.shape[:2]
    tensors = [*inputs.values(), *(of_logits or {}).values(), *([] if initial_state is None else [initial_state])]
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    # The recurrent kernels have no backward, and some say so only by leaving the gradient out.
    short = not needs_grad and length <= _SHORT
    operator = f"fused_recurrent_{family}" if short else f"chunk_{family}"
    if family == "gla" and short:
        inputs = {"gk" if key == "g" else key: x for key, x in inputs.items()}
    arguments: dict[str, Any] = {"scale": q.shape[-1] ** -0.5, "output_final_state": True}
    if of_logits is not None:
        arguments |= {"use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
        arguments |= {"use_gate_in_kernel": True, **of_logits}
    last = None
    if seq_idx is not None:
        inputs = {key: x.reshape(1, batch * length, *x.shape[2:]) for key, x in inputs.items()}
        documents = documents_of(seq_idx)
        arguments["cu_seqlens"], last = documents.offsets, documents.last
        if initial_state is not None:  # a row's belongs to its first document
            empty = initial_state.new_zeros(len(documents.offsets) - 1, *initial_state.shape[1:])
            initial_state = empty.index_put((documents.first,), initial_state)
    # The kernels step through memory as if every tensor were contiguous.
    arguments |= {key: x.contiguous() for key, x in inputs.items()}
    arguments["initial_state"] = None if initial_state is None else initial_state.contiguous()
    return FlaCall(operator, arguments, last)


def _fla(
    family: str,
    inputs: dict[str, torch.Tensor],
    initial_state: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    of_logits: dict[str, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs fla's operator on what [`to_one_dtype`] gives; returns what the torch forms do."""
    call = prepare_fla(family, inputs, initial_state, seq_idx, of_logits)
    operator = getattr(importlib.import_module(f"fla.ops.{family}"), call.operator)
    output, state = operator(**call.arguments)
    if call.last_document is not None:
        state = state[call.last_document]
    return output.reshape(inputs["v"].shape).to(inputs["v"].dtype), state
