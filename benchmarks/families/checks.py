"""What must hold for a model type: each check takes a tiny teacher and its hybrid, and raises where it does not."""

import contextlib
import inspect
import tempfile
from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedModel

import hf_hybrid as hh
from hf_hybrid.conversion import check_teacher
from hf_hybrid.modeling.mixer import Mixer
from hf_hybrid.modeling.modeling_hybrid import decoder_layers
from hf_hybrid.teacher.loading import load_teacher

from .models import LAYERS, NOTES, skeleton, tiny_config, tiny_model, tokens


SOFTMAX_LAYERS = [1, 3]
MAX_PARAMETERS = 12_000_000  # above it the tiny config missed a size
TOLERANCE = 1e-3  # of the largest logit, in float32
_LINEAR_ONLY = "the teacher itself mixes packed documents; linear layers keep them apart"


class NotApplicable(Exception):
    """Says why a check has no meaning for a type."""


class Subject:
    """A teacher and the hybrid that the checks share."""

    def __init__(self, model_type: str) -> None:
        self.teacher = tiny_model(model_type)
        torch.manual_seed(1)
        self.hybrid = hh.convert(self.teacher, SOFTMAX_LAYERS)


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Raises where two tensors differ by more than the tolerance, or are not finite."""
    if not torch.isfinite(got).all():
        raise AssertionError("not finite")
    error = ((got - wanted).abs().max() / wanted.abs().max()).item()
    if not error < TOLERANCE:
        raise AssertionError(f"differs by {error:.1e} of the largest value")


def softmax_copy(subject: Subject) -> None:
    copy, ids = hh.convert(subject.teacher, range(LAYERS)), tokens(2, 24)
    with torch.no_grad():
        error = (copy(ids).logits - subject.teacher(ids).logits).abs().max().item()
    if error != 0:
        raise AssertionError(f"a softmax-only copy differs by {error:.1e}")


def tensors(subject: Subject) -> None:
    report, own = subject.hybrid.conversion_report, subject.hybrid.state_dict()
    teacher = subject.teacher.state_dict()
    if set(report.copied) | set(report.not_carried) != set(teacher):
        raise AssertionError("the report misses tensors of the teacher")
    if set(report.copied) | set(report.created) != set(own):
        raise AssertionError("the report misses tensors of the hybrid")
    wrong = [name for name in report.copied if not torch.equal(own[name], teacher[name])]
    if wrong:
        raise AssertionError(f"not copied: {wrong[:3]}")


def transfer(subject: Subject) -> None:
    """Softmax attention, written out, over the q, k, v of each linear layer is the teacher's attention."""
    calls: dict[int, tuple[dict, torch.Tensor]] = {}
    teacher_layers = decoder_layers(subject.teacher)
    if any(hasattr(layer.self_attn, name) for layer in teacher_layers for name in ("sinks", "indexer")):
        raise NotApplicable("the teacher's softmax has sinks or is sparse")
    if any(getattr(layer.self_attn, "attn_logit_softcapping", None) for layer in teacher_layers):
        raise NotApplicable("the teacher's softmax is capped")
    scales: dict[int, float] = {}
    handles = [
        layer.self_attn.register_forward_hook(
            lambda module, args, kwargs, output, i=i: calls.__setitem__(i, (args, kwargs, output[0])), with_kwargs=True
        )
        for i, layer in enumerate(teacher_layers)
    ]
    with torch.no_grad():
        subject.teacher(tokens(2, 12), use_cache=False)
        for handle in handles:
            handle.remove()
        for i, mixer in mixers(subject.hybrid).items():
            scales[i] = getattr(teacher_layers[i].self_attn, "scaling", None) or mixer.head_dim**-0.5
            args, kwargs, wanted = calls[i]
            # OPT and its relatives scale their queries themselves.
            for scale in (scales[i], 1.0):
                with attending_by_softmax(mixer, scale):
                    got = mixer(*args, **kwargs)[0]
                if (error := (got - wanted).abs().max() / wanted.abs().max()) < 1e-4:
                    break
            else:
                raise AssertionError(f"q, k, v of layer {i} give another attention (by {error:.1e})")


@contextlib.contextmanager
def attending_by_softmax(mixer: Mixer, scale: float) -> Iterator[None]:
    """Plain causal softmax in the place of the recurrence."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: object) -> torch.Tensor:
        groups = query.shape[2] // key.shape[2]
        key, value = key.repeat_interleave(groups, dim=2), value.repeat_interleave(groups, dim=2)
        scores = torch.einsum("bthd,bshd->bhts", query, key) * scale
        causal = torch.ones(scores.shape[-2:]).tril().bool()
        weights = scores.masked_fill(~causal, float("-inf")).softmax(-1)
        return torch.einsum("bhts,bshv->bthv", weights, value)

    mixer.attend = attend
    try:
        yield
    finally:
        del mixer.attend


def mixers(model: PreTrainedModel) -> dict[int, Mixer]:
    return {i: decoder_layers(model)[i].self_attn for i in model.linear_attention_layers}


def backward(subject: Subject) -> None:
    model, ids = subject.hybrid, tokens(2, 24)
    model.zero_grad()
    logits = model(ids, use_cache=False).logits.float()
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for i, mixer in mixers(model).items():
        for name, parameter in mixer.named_parameters():
            if parameter.grad is None:
                raise AssertionError(f"{name} of linear layer {i} has no gradient")
    infinite = [
        name for name, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()
    ]
    if infinite:
        raise AssertionError(f"gradients not finite: {infinite[:3]}")


@torch.no_grad()
def cached(subject: Subject) -> None:
    model, ids = subject.hybrid, tokens(2, 30)
    full = model(ids, use_cache=False).logits
    out = model(ids[:, :20], use_cache=True)
    pieces = [out.logits]
    for start, stop in ((20, 21), (21, 22), (22, 29), (29, 30)):
        out = model(ids[:, start:stop], past_key_values=out.past_key_values, use_cache=True)
        pieces.append(out.logits)
    close(torch.cat(pieces, 1), full)


@torch.no_grad()
def left_padding(subject: Subject) -> None:
    ids = tokens(2, 24)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0  # the padding holds ordinary tokens, so that one that is read shows
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    arguments = {"attention_mask": mask, "use_cache": False}
    if takes_positions(subject.hybrid):
        arguments["position_ids"] = positions
    got = subject.hybrid(ids, **arguments).logits
    close(got[0, 7:], subject.hybrid(ids[:1, 7:], use_cache=False).logits[0])
    close(got[1], subject.hybrid(ids[1:], use_cache=False).logits[0])


@torch.no_grad()
def right_padding(subject: Subject) -> None:
    ids = tokens(2, 24)
    mask = torch.ones_like(ids)
    mask[0, 17:] = 0
    got = subject.hybrid(ids, attention_mask=mask, use_cache=False).logits
    close(got[0, :17], subject.hybrid(ids[:1, :17], use_cache=False).logits[0])
    close(got[1], subject.hybrid(ids[1:], use_cache=False).logits[0])


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether positions can be given at all; a decoder without the argument counts them off its mask."""
    return "position_ids" in inspect.signature(model.forward).parameters


@torch.no_grad()
def packed(subject: Subject) -> str:
    """Each document of a packed row gets what it gets alone; returns a note where the teacher's does not."""
    if not takes_positions(subject.hybrid):
        raise NotApplicable("the model takes no position_ids, so rows cannot be packed")
    if not mixes_documents(subject.teacher):
        check_packed(subject.hybrid)
        return ""
    check_packed(hh.convert(subject.teacher, []))
    return _LINEAR_ONLY


def check_packed(model: PreTrainedModel) -> None:
    ids, lengths = tokens(1, 30), (9, 1, 12, 8)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    alone = torch.cat([model(piece, use_cache=False).logits for piece in ids.split(lengths, dim=1)], 1)
    for mask in (None, torch.ones_like(ids)):
        close(model(ids, position_ids=positions, attention_mask=mask).logits, alone)


def mixes_documents(teacher: PreTrainedModel) -> bool:
    ids = tokens(1, 20)
    positions = torch.arange(10).repeat(2)[None]
    alone = teacher(ids[:, 10:], use_cache=False).logits
    got = teacher(ids, position_ids=positions, use_cache=False).logits[:, 10:]
    return bool((got - alone).abs().max() > TOLERANCE * alone.abs().max())


def checkpointing(subject: Subject) -> None:
    model, ids = subject.hybrid.train(), tokens(2, 20)
    gradients = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(2)
        model(ids).logits.float().square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    model.gradient_checkpointing_disable()
    model.eval()
    if gradients[0].keys() != gradients[1].keys():
        raise AssertionError("other parameters have gradients")
    for name, gradient in gradients[0].items():
        if gradient.abs().max() > 0:
            close(gradients[1][name], gradient)


@torch.no_grad()
def saving(subject: Subject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        subject.hybrid.save_pretrained(folder)
        loaded = hh.HybridForCausalLM.from_pretrained(folder)
    ids = tokens(2, 20)
    error = (loaded(ids).logits - subject.hybrid(ids).logits).abs().max().item()
    if error != 0:
        raise AssertionError(f"the loaded model differs by {error:.1e}")


def half_precision(subject: Subject) -> str:
    """Loaded in bfloat16 or float16, a softmax-only copy is the teacher, also from disk, in the teacher's dtypes."""
    kept = set()
    for dtype in (torch.bfloat16, torch.float16):
        with tempfile.TemporaryDirectory() as folder:
            subject.teacher.save_pretrained(folder)
            teacher = load_teacher(folder, dtype=dtype)
        kept |= {name.split(".")[-2] for name, tensor in teacher.state_dict().items() if tensor.dtype != dtype}
        for layers in (range(LAYERS), SOFTMAX_LAYERS):
            check_half(teacher, hh.convert(teacher, layers), dtype)
    return f"kept in float32: {', '.join(sorted(kept))}" if kept else ""


@torch.no_grad()
def check_half(teacher: PreTrainedModel, copy: PreTrainedModel, dtype: torch.dtype) -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy.save_pretrained(folder)
        loaded = hh.HybridForCausalLM.from_pretrained(folder)
    ids, wanted = tokens(2, 24), {name: tensor.dtype for name, tensor in teacher.state_dict().items()}
    logits = copy(ids).logits
    if not torch.isfinite(logits).all():
        raise AssertionError(f"{dtype}: not finite")
    if not copy.linear_attention_layers and not torch.equal(logits, teacher(ids).logits):
        raise AssertionError(f"{dtype}: a softmax-only copy differs")
    if not torch.equal(logits, loaded(ids).logits):
        raise AssertionError(f"{dtype}: the loaded model differs")
    for model in (copy, loaded):
        wrong = [name for name, tensor in model.state_dict().items() if tensor.dtype != wanted.get(name, tensor.dtype)]
        if wrong:
            raise AssertionError(f"{dtype}: {wrong[0]} has another dtype than the teacher's")


CHECKS: dict[str, Callable[[Subject], str | None]] = {
    "softmax copy": softmax_copy,
    "tensors": tensors,
    "transfer": transfer,
    "backward": backward,
    "cache": cached,
    "left padding": left_padding,
    "right padding": right_padding,
    "packed": packed,
    "checkpointing": checkpointing,
    "saving": saving,
    "half precision": half_precision,
}


def check_type(model_type: str) -> dict:
    """Every check of one type: `{"type", "checks", "notes", "refused"}`; a check is "pass", "n/a" or the reason."""
    result: dict = {"type": model_type, "checks": {}, "notes": [], "refused": None}
    try:
        config = tiny_config(model_type)
        if config.get_text_config(decoder=True) is not config:
            kind = "an encoder-decoder" if config.is_encoder_decoder else "a composite model, not a decoder alone"
            raise ValueError(kind)
        model = skeleton(model_type)
        check_teacher(model)
        if (size := sum(p.numel() for p in model.parameters())) > MAX_PARAMETERS:
            raise ValueError(f"no tiny config: {size:,} parameters")
        subject = Subject(model_type)
    except Exception as error:
        result["refused"] = one_line(error)
        return result
    if model_type in NOTES:
        result["notes"].append(NOTES[model_type])
    dropped = sorted({name.split(".self_attn.")[-1] for name in subject.hybrid.conversion_report.not_carried})
    if dropped:
        result["notes"].append("not carried over: " + ", ".join(dropped))
    for name, check in CHECKS.items():
        try:
            note = check(subject)
            result["checks"][name] = "pass"
            if note:
                result["notes"].append(note)
        except NotApplicable as reason:
            result["checks"][name] = "n/a"
            result["notes"].append(f"{name}: {reason}")
        except Exception as error:
            result["checks"][name] = one_line(error)
    return result


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 220 else text[:217] + "..."
