"""The losses of every stage, as pure functions.

Shapes: B batch, T tokens, N tokens in a row of all batches, H hidden width, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from hf_hybrid.modeling.linear_attention import widen

from .modes import evaluating
from .precision import Precision


# Logits of one chunk of tokens, of one model: 64 MiB in fp32.
_CHUNK_ELEMENTS = 2**24
# On CUDA chunks are so many times as wide: each reads and writes the gradient of the whole head, and launches kernels.
_WIDER_ON_CUDA = (4, 16)
_BYTES_OF_A_LOGIT = 24  # at most, of all that is as large as a chunk's logits

LogitFunction = Callable[[torch.Tensor], torch.Tensor]


def kl_per_token(teacher_logits: torch.Tensor, student_logits: torch.Tensor) -> torch.Tensor:
    """
    `KL(teacher || student)` of each token, in nats: `sum_v p_T (log p_T - log p_S)`, 0 where the models agree.

    Args:
        teacher_logits, student_logits: `[..., V]`. Half precision is raised to fp32 first. Entries of the vocabulary
            may be masked with `-inf`: what the teacher never says contributes nothing, whatever the student makes of
            it, and what it does say and the student cannot makes the KL infinite.

    Returns:
        `[...]`.
    """
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher logits have shape {tuple(teacher_logits.shape)}, student logits {tuple(student_logits.shape)}; "
            "both models must share one vocabulary and see the same tokens."
        )
    return _kl(widen(teacher_logits).log_softmax(-1), widen(student_logits).log_softmax(-1))


def _kl(log_teacher: torch.Tensor, log_student: torch.Tensor) -> torch.Tensor:
    """`sum_v p_T (log p_T - log p_S)` of log-probabilities, `0 log 0` being 0, and its gradient too."""
    mass = log_teacher.exp()
    # Before the product: -inf - -inf is nan, in the gradient as well.
    return (mass * (log_teacher - log_student).masked_fill(mass == 0, 0)).sum(-1)


def tokens_per_chunk(vocab_size: int, device: torch.device) -> int:
    """
    How many tokens' logits are held at once, by default: as many as stay within 64 MiB in fp32; on CUDA within 256 MiB
    to 1 GiB, as much of that as an eighth of the free memory holds with all that is computed of them.
    """
    least = max(1, _CHUNK_ELEMENTS // vocab_size)
    return least if device.type != "cuda" else wide_chunk(least, vocab_size, free_memory(device))


def wide_chunk(chunk_tokens: int, vocab_size: int, free: int) -> int:
    """The default on CUDA with so many bytes free, where it is `chunk_tokens` elsewhere."""
    least, most = _WIDER_ON_CUDA
    fitting = free // 8 // (_BYTES_OF_A_LOGIT * vocab_size)
    return min(max(fitting, least * chunk_tokens), most * chunk_tokens)


def free_memory(device: torch.device) -> int:
    """Bytes that torch can still have on a CUDA device, those that it holds in reserve among them."""
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + reserve


def chunked_kl_per_token(
    teacher_hidden: torch.Tensor,
    student_hidden: torch.Tensor,
    teacher_logits: LogitFunction,
    student_logits: LogitFunction,
    vocab_size: int,
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """
    [`kl_per_token`] from final hidden states, without ever holding the logits of more than one chunk of tokens.

    The backward pass makes each chunk's logits once more. TRL's fused divergence is not used because it computes in
    fp32 only, allocates tiles of 32,768 columns whatever the vocabulary, and is not a public function.

    Args:
        teacher_hidden, student_hidden: `[N, H]`; the widths may differ.
        teacher_logits, student_logits: from hidden states `[n, H]` to logits `[n, V]`, see [`logit_function`].
        vocab_size: V, to size the chunks.
        chunk_tokens: tokens in a chunk; by default those of [`tokens_per_chunk`].

    Returns:
        `[N]`, in nats.
    """
    if chunk_tokens is None:
        chunk_tokens = tokens_per_chunk(vocab_size, student_hidden.device)

    def chunk_kl(teacher_chunk: torch.Tensor, student_chunk: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            reference = teacher_logits(teacher_chunk)
        return kl_per_token(reference, student_logits(student_chunk))

    return _in_chunks(chunk_kl, (teacher_hidden, student_hidden), chunk_tokens)


def chunked_kl_sum(
    teacher_hidden: torch.Tensor,
    student_hidden: torch.Tensor,
    teacher_logits: LogitFunction,
    student_logits: LogitFunction,
    weights: torch.Tensor,
    head: Sequence[torch.Tensor],
    vocab_size: int,
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """
    `sum_i weights_i KL_i` of [`kl_per_token`], from final hidden states. What training minimises: as the weights are
    known before, each chunk's gradients are made with its logits, which are made once and not once more in the
    backward pass. The backward pass can be run once.

    Args:
        teacher_hidden, student_hidden, teacher_logits, student_logits: as in [`chunked_kl_per_token`].
        weights: `[N]`, without gradients.
        head: the tensors of `student_logits` that gradients may go to.
        vocab_size: V, to size the chunks.
        chunk_tokens: tokens in a chunk; by default those of [`tokens_per_chunk`].

    Returns:
        A scalar, in nats.
    """
    if chunk_tokens is None:
        chunk_tokens = tokens_per_chunk(vocab_size, student_hidden.device)
    functions = teacher_logits, student_logits, chunk_tokens
    total: torch.Tensor = _KLSum.apply(functions, teacher_hidden, student_hidden, weights, *head)
    return total


class KLOfChunk(torch.nn.Module):
    """The weighted KL of one chunk and the gradient of its logits; a module, so that it can be compiled in place."""

    @torch.no_grad()
    def forward(
        self, teacher_logits: torch.Tensor, student_logits: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Of logits `[n, V]` and `weights` `[n]`: `sum_i weights_i KL_i`, in fp32 or wider, and its gradient `[n, V]` in
        the student's dtype, which is p_S - p_T as long as the teacher's probabilities add up to 1.
        """
        wide = torch.promote_types(student_logits.dtype, torch.float32)
        log_teacher = teacher_logits.log_softmax(-1, dtype=wide)
        log_student = student_logits.log_softmax(-1, dtype=wide)
        # Each of these is as large as the logits, and what is not needed any more is written over.
        mass = log_teacher.exp()
        apart = log_teacher.sub_(log_student).masked_fill_(mass == 0, 0)  # before the product: -inf - -inf is nan
        slope = log_student.exp_().sub_(mass).mul_(weights[:, None].to(wide)).to(student_logits.dtype)
        return (mass.mul_(apart).sum(-1) * weights).sum(), slope


KL_OF_CHUNK = KLOfChunk()


class _KLSum(torch.autograd.Function):
    """See [`chunked_kl_sum`]."""

    @staticmethod
    def forward(
        ctx: Any,
        functions: tuple[LogitFunction, LogitFunction, int],
        teacher_hidden: torch.Tensor,
        student_hidden: torch.Tensor,
        weights: torch.Tensor,
        *head: torch.Tensor,
    ) -> torch.Tensor:
        teacher_logits, student_logits, chunk_tokens = functions
        trained = [part for part, wanted in zip(head, ctx.needs_input_grad[4:], strict=True) if wanted]
        needs_grad = ctx.needs_input_grad[2] or bool(trained)
        d_hidden = torch.zeros_like(student_hidden)
        # In fp32, for a sum of many chunks.
        d_head = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in trained]
        total = torch.zeros((), dtype=torch.promote_types(student_hidden.dtype, torch.float32), device=weights.device)
        count = -(-len(weights) // chunk_tokens)
        size = -(-len(weights) // max(count, 1))  # of one size where that can be: it is compiled for that
        for start in range(0, len(weights), max(size, 1)):
            chunk = slice(start, start + size)
            reference = teacher_logits(teacher_hidden[chunk])
            with torch.set_grad_enabled(needs_grad):
                hidden = student_hidden[chunk].detach().requires_grad_(needs_grad)
                logits = student_logits(hidden)
            kl, slope = KL_OF_CHUNK(reference, logits.detach(), weights[chunk])
            total += kl
            del reference
            if needs_grad:
                found = torch.autograd.grad(logits, [hidden, *trained], slope)
                d_hidden[chunk] = found[0]
                for gradient, part in zip(d_head, found[1:], strict=True):
                    gradient += part
        # Not by save_for_backward, so that autograd can take them for gradients as they are, without a copy.
        ctx.gradients = d_hidden, d_head
        ctx.head_dtypes = [part.dtype for part in trained]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("a backward pass through this KL was run before, and its gradients are gone.")
        d_hidden, d_head = ctx.gradients
        ctx.gradients = None
        scaled = iter([part.mul_(d_total).to(dtype) for part, dtype in zip(d_head, ctx.head_dtypes, strict=True)])
        parts = [next(scaled) if wanted else None for wanted in ctx.needs_input_grad[4:]]
        return None, None, d_hidden.mul_(d_total) if ctx.needs_input_grad[2] else None, None, *parts


def sum_in_parts(parts: Callable[[], Iterable[torch.Tensor]], parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    The sum of the losses that `parts()` yields, each of which has its gradients computed before the next is asked for:
    the activations of one part are held, not of all. The backward pass hands the gradients out, and can be run once.

    Args:
        parts: yields scalars, which share no activations.
        parameters: all that gradients go to.
    """
    total: torch.Tensor = _SumInParts.apply(parts, *parameters)
    return total


class _SumInParts(torch.autograd.Function):
    """See [`sum_in_parts`]."""

    @staticmethod
    def forward(ctx: Any, parts: Callable[[], Iterable[torch.Tensor]], *parameters: torch.Tensor) -> torch.Tensor:
        gradients: list[torch.Tensor | None] = [None] * len(parameters)
        total = torch.zeros((), dtype=torch.float32, device=parameters[0].device)
        with torch.enable_grad():
            for loss in parts():
                total = total + loss.detach()
                for i, found in enumerate(torch.autograd.grad(loss, parameters, allow_unused=True)):
                    if found is not None:
                        before = gradients[i]
                        gradients[i] = found if before is None else before + found
                del loss
        ctx.gradients = gradients
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("a backward pass through this loss was run before, and its gradients are gone.")
        gradients, ctx.gradients = ctx.gradients, None
        return None, *(None if found is None else found.mul_(d_total) for found in gradients)


def _in_chunks(
    function: Callable[..., torch.Tensor], tensors: tuple[torch.Tensor, ...], chunk_tokens: int
) -> torch.Tensor:
    """`function` of a chunk of tokens at a time, `[N]`; its backward pass computes each chunk once more."""
    pieces = []
    for chunks in zip(*(tensor.split(chunk_tokens) for tensor in tensors), strict=True):
        if torch.is_grad_enabled():
            pieces.append(checkpoint(function, *chunks, use_reentrant=False))
        else:
            pieces.append(function(*chunks))
    return torch.cat(pieces)


def topk_of_logits(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The `k` most likely tokens of a distribution and what is left for the others.

    Args:
        logits: `[..., V]`. Half precision is raised to fp32 first.

    Returns:
        Log-probabilities `[..., k]`, token ids `[..., k]`, and the logarithm of the mass of all other tokens `[...]`,
        summed over their logits, for the difference of 1 and the first would be rounding: `-inf` where `k` is V.
    """
    logprobs = widen(logits).log_softmax(-1)
    top, ids = logprobs.topk(k, -1)
    return top, ids, _log_rest(logprobs, ids)


def _log_rest(logprobs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Logarithm of the mass of all tokens but `ids`, `[...]`; `-inf`, without a gradient, where they have none."""
    rest = logprobs.scatter(-1, ids, -torch.inf)
    none = rest.isneginf().all(-1)  # the gradient of `logsumexp` at nothing but -inf is nan
    return rest.masked_fill(none[..., None], 0).logsumexp(-1).masked_fill(none, -torch.inf)


def topk_kl_per_token(
    teacher_logprobs: torch.Tensor, ids: torch.Tensor, tail: torch.Tensor, student_logits: torch.Tensor
) -> torch.Tensor:
    """
    `KL(teacher || student)` of each token over `k + 1` outcomes, in nats: the tokens `ids`, and "any other".

    A lower bound of [`kl_per_token`], for what is told apart less differs less (the data processing inequality); equal
    to it where `k` is V, or where both models spread the rest in the same proportions.

    Args:
        teacher_logprobs, ids, tail: `[..., k]`, `[..., k]` and `[...]`, as [`topk_of_logits`] gives them. They are
            scaled to a sum of 1, which rounding to half precision misses.
        student_logits: `[..., V]`, with `-inf` as in [`kl_per_token`]. Half precision is raised to fp32 first.

    Returns:
        `[...]`.
    """
    logprobs, ids = widen(student_logits).log_softmax(-1), ids.long()
    theirs, ours = widen(teacher_logprobs), logprobs.gather(-1, ids)
    if ids.shape[-1] < logprobs.shape[-1]:  # else there is no other, and its logarithm is no number to compute with
        rest = _log_rest(logprobs, ids)[..., None]
        theirs, ours = torch.cat([theirs, tail[..., None].to(theirs.dtype)], -1), torch.cat([ours, rest], -1)
    return _kl(theirs.log_softmax(-1), ours)


def chunked_topk_kl_per_token(
    topk: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    student_hidden: torch.Tensor,
    student_logits: LogitFunction,
    vocab_size: int,
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """
    [`topk_kl_per_token`] from the student's final hidden states `[N, H]` and the teacher's `topk`, `[N, k]`, `[N, k]`
    and `[N]`. Chunks as in [`chunked_kl_per_token`].

    Returns:
        `[N]`, in nats.
    """

    def chunk_kl(hidden: torch.Tensor, logprobs: torch.Tensor, ids: torch.Tensor, tail: torch.Tensor) -> torch.Tensor:
        return topk_kl_per_token(logprobs, ids, tail, student_logits(hidden))

    if chunk_tokens is None:
        chunk_tokens = tokens_per_chunk(vocab_size, student_hidden.device)
    return _in_chunks(chunk_kl, (student_hidden, *topk), chunk_tokens)


def alignment_loss(
    teacher_output: torch.Tensor, student_output: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Distance of one layer's attention outputs: mean over tokens of `||U_T - U_S||_2 / sqrt(H)` (arXiv 2505.03005,
    step 1; not squared, as in the released code of arXiv 2512.20569).

    Args:
        teacher_output, student_output: `[B, T, H]`, after the output projection.
        mask: `[B, T]`, 1 for tokens that count.

    Returns:
        A scalar, in units of the root mean square of an activation.
    """
    width = teacher_output.shape[-1]
    distance = (widen(teacher_output) - widen(student_output)).norm(dim=-1) * width**-0.5
    return masked_mean(distance, mask)


def masked_mean(values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of `values` where `mask` is not 0; 0 where it is 0 everywhere, or there are none."""
    if mask is None:
        return values.mean() if values.numel() else values.sum()
    weight = mask.to(values.dtype)
    return (values * weight).sum() / weight.sum().clamp(min=1)


def logit_function(model: PreTrainedModel, precision: Precision, head: Any = None) -> LogitFunction:
    """
    What `model` does from its final hidden state to its logits: head, scaling, soft-capping. `head` is called in the
    place of the model's own, see [`~hf_hybrid.trainers.distillation.through_head`].

    The library keeps this inside each family's forward; the settings are read from the config as TRL reads them, and
    [`check_logit_function`] tells whether that was right for the model at hand.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings() if head is None else head
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale *= float(getattr(config, "output_multiplier", None) or 1.0)
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        with precision.running(hidden.device):
            out = head(hidden)
            if scale != 1.0:
                out = out * scale
            return out if softcap is None else softcap * torch.tanh(out / softcap)

    return logits


@torch.no_grad()
def check_logit_function(model: PreTrainedModel, precision: Precision) -> None:
    """Raises a `ValueError` where [`logit_function`] does not give `model`'s own logits."""
    inputs: dict[str, Any] = {"input_ids": torch.arange(4, device=model.device)[None] % model.config.vocab_size}
    with evaluating(model), precision.running(model.device):
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
        expected = model(**inputs, use_cache=False).logits
    given, expected = logit_function(model, precision)(hidden).float(), expected.float()
    same = given == expected  # masked entries of the vocabulary are -inf in both
    error = (given - expected).masked_fill(same, 0).abs().max().item()
    if not error <= 1e-2 * max(1.0, expected.masked_fill(expected.isinf(), 0).abs().max().item()):
        raise ValueError(
            f"{type(model).__name__} does more to its logits than its config says (they differ by {error:.3g}); its "
            "KL cannot be computed in chunks. Please report the model family."
        )
