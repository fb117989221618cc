"""
Where a mixer starts: decay, write strength, gate and scale, set from what the teacher's attention does on a few rows.

At conversion a mixer has the teacher's projections, and gates and decays that are drawn. A gate around 0 in particular
multiplies the output of a layer by noise. Here every quantity gets the value that the teacher's own attention on
`rows` gives it, in closed form; nothing is trained.

Shapes: B batch, T tokens, H query heads, D key and V value width of a head, N hidden width.
"""

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from hf_hybrid.modeling.adopted_attention import AdoptedAttention, AttentionCall
from hf_hybrid.modeling.gated_deltanet import GatedDeltaNet
from hf_hybrid.modeling.gated_linear_attention import TEMPERATURE, GatedLinearAttention
from hf_hybrid.modeling.kimi_delta_attention import KimiDeltaAttention
from hf_hybrid.modeling.library import take_cache
from hf_hybrid.modeling.linear_attention import LinearAttention, no_rotation, widen
from hf_hybrid.modeling.modeling_hybrid import decoder_layers

from .alignment import in_dtype_of, teacher_attention
from .held_out import batches
from .modes import evaluating
from .precision import AS_LOADED, Precision
from .sharding import is_sharded
from .teacher_trainer import check_pair


# Scores of one chunk of queries: 64 MiB in fp32.
_CHUNK_ELEMENTS = 2**24
# The shortest half-life of a head's memory, in tokens: of one that looks at the last token alone.
_SHORTEST = 0.5
# What a least-squares fit adds to the diagonal, as a share of its mean: directions that the rows hardly have stay put.
_RIDGE = 1e-3
# The least and, of a sigmoid, the most that a gate is set to: at the ends it would learn nothing.
_LEAST_GATE, _MOST_GATE = 0.05, 0.95


@dataclass
class Calibration:
    """
    What [`calibrate`] set, by layer.

    Args:
        tokens (`int`): tokens of the rows that are not padding.
        half_life (`dict[int, list[float]]`): of each head's memory, in tokens.
        write_strength (`dict[int, list[float]]`): of each head, the mean over tokens.
        gate_spread (`dict[int, float]`): standard deviation over tokens of what was to be 1, the gate's input over
            its mean: a gate has no bias, so its weights make a constant of what all hidden states have in common.
        error (`dict[int, tuple[float, float]]`): of the mixer's output in the head, before the output projection, its
            squared distance from the teacher's over the square of the latter, before and after the scales were fitted.
        left (`dict[int, str]`): of layers of which something was left as it is, what.
    """

    tokens: int = 0
    half_life: dict[int, list[float]] = field(default_factory=dict)
    write_strength: dict[int, list[float]] = field(default_factory=dict)
    gate_spread: dict[int, float] = field(default_factory=dict)
    error: dict[int, tuple[float, float]] = field(default_factory=dict)
    left: dict[int, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """A line for each quantity that was set, and one for what was left."""
        found = [f"from {self.tokens:,} tokens of the teacher's attention"]
        if self.half_life:
            found.append(f"median half-life in tokens, by layer: {_medians(self.half_life)}")
        if self.write_strength:
            found.append(f"median write strength, by layer: {_medians(self.write_strength)}")
        if self.gate_spread:
            found.append(f"constant gates, spread over tokens, by layer: {_listed(self.gate_spread)}")
        if self.error:
            before, after = ({i: pair[place] for i, pair in self.error.items()} for place in (0, 1))
            found.append(f"relative error before the output projection, by layer: {_listed(before)}")
            found.append(f"the same with fitted scales: {_listed(after)}")
        if self.left:
            found.append("left as they are: " + ", ".join(f"{what} in layer {i}" for i, what in self.left.items()))
        return found

    def __str__(self) -> str:
        return "calibration " + "\n  ".join(self.lines())


def _medians(of: dict[int, list[float]]) -> str:
    return _listed({i: statistics.median(values) for i, values in of.items()})


def _listed(of: dict[int, float]) -> str:
    return ", ".join(f"{i}: {value:.3g}" for i, value in of.items())


@torch.no_grad()
def calibrate(
    student: Any,
    teacher: Any,
    rows: Any,
    *,
    gate: bool = True,
    half_life: float | None = math.log(2),
    skip_first: bool = True,
    write_strength: Literal["entropy"] | float | None = 0.2,
    scale: Literal["norm", "gate"] | None = "norm",
    batch_size: int = 4,
    precision: Precision = AS_LOADED,
) -> Calibration:
    """
    Sets the new tensors of the linear layers of `student` from what the teacher's attention does on `rows`; each
    option that is None or False leaves its quantity as it is.

    Args:
        student ([`HybridForCausalLM`]): changed in place.
        teacher (`PreTrainedModel`): the softmax model it came from.
        rows (`datasets.Dataset`): rows with `input_ids`, optionally `attention_mask` and `position_ids`; a few
            thousand tokens.
        gate (`bool`): make the output gate 1 (1/2 where it is a sigmoid) on the average token.
        half_life (`float`, *optional*): of a head's memory, over the mean distance that its softmax looks back. With
            `ln 2` the memory, which fades exponentially, looks back as far in the mean.
        skip_first (`bool`): measure that distance without the first token of each document, on which many heads put
            what they have no use for.
        write_strength (`float` or `str`, *optional*): of the delta rules, a number for all heads, or `"entropy"`: 0.3
            for the head of a layer that spreads its attention most, 0.7 for the one that does so least.
        scale (`str`, *optional*): `"norm"`: the output norm's weight by least squares on what the teacher's softmax
            gives, for all heads of a layer together. `"gate"`: then also the gate, for each head and channel.
        batch_size (`int`): rows at once.
        precision ([`~hf_hybrid.trainers.precision.Precision`]): what the models run in.
    """
    check_pair(student, teacher)
    if half_life is not None and not 0 < half_life < math.inf:
        raise ValueError(f"half_life={half_life} is no multiple of a distance; pass a number above 0, or None.")
    if not (write_strength in (None, "entropy") or (isinstance(write_strength, float) and 0 < write_strength < 1)):
        raise ValueError(
            f"write_strength={write_strength!r} is none; pass a number between 0 and 1, 'entropy' or None."
        )
    if scale not in (None, "norm", "gate"):
        raise ValueError(f"scale={scale!r} is unknown; choose 'norm', 'gate' or None.")
    if is_sharded(student) or is_sharded(teacher):
        raise ValueError("student or teacher is sharded; calibrate before a trainer shards them.")
    if student.device != teacher.device:
        raise ValueError(f"the student is on {student.device}, the teacher on {teacher.device}; put both on one.")
    layers, found = decoder_layers(student), Calibration()
    mixers: dict[int, LinearAttention] = {}
    for i in student.linear_attention_layers:
        mixer, attention = layers[i].self_attn, decoder_layers(teacher)[i].self_attn
        if "indexer" in attention._modules:
            found.left[i] = f"all of {type(mixer).__name__}, whose teacher's softmax sees only some tokens,"
        elif isinstance(mixer, LinearAttention):
            mixers[i] = mixer
        else:
            found.left[i] = f"all of {type(mixer).__name__}"
    if not mixers:
        raise ValueError(
            "no layer of the student has a recurrence to calibrate: "
            f"{found.left or 'all keep softmax attention'}; leave the calibration out."
        )
    with evaluating(student, teacher):
        seen = {i: _Attention() for i in mixers}
        for i, part in _teacher_parts(student, teacher, mixers, rows, batch_size, precision):
            seen[i].add(part, skip_first=skip_first)
        found.tokens = round(next(iter(seen.values())).tokens)
        for i, mixer in mixers.items():
            common, spread = seen[i].common()
            if gate and mixer.output_gate is not None:
                set_gate(mixer, common, 1.0 if mixer.output_gate == "silu" else 0.5)
                found.gate_spread[i] = spread
            if half_life is not None:
                lives = (half_life * seen[i].distance / seen[i].mass.clamp(min=1e-9)).clamp(min=_SHORTEST)
                if set_decay(mixer, math.log(2) / lives):
                    found.half_life[i] = lives.tolist()
                else:
                    found.left[i] = f"the decay of {type(mixer).__name__}"
            if write_strength is not None:
                if isinstance(write_strength, str):
                    strengths = strengths_of(seen[i].entropy / seen[i].tokens)
                else:
                    strengths = torch.full_like(seen[i].entropy, write_strength)
                if set_write_strength(mixer, common, strengths):
                    found.write_strength[i] = strengths.tolist()
        if scale is not None:
            _fit_scales(student, teacher, mixers, rows, batch_size, precision, scale, found, seen)
    return found


def set_decay(mixer: LinearAttention, rates: torch.Tensor) -> bool:
    """Makes the log decay of every token `-rates` `[H]`, in all channels; whether the mixer has one."""
    last: Any
    if isinstance(mixer, GatedDeltaNet | KimiDeltaAttention):
        mixer.A_log.zero_()
        steps = rates + torch.log(-torch.expm1(-rates))  # softplus(steps) == rates
        if isinstance(mixer, GatedDeltaNet):
            mixer.a_proj.weight.zero_()
            mixer.dt_bias.copy_(steps)
        else:
            last = mixer.f_proj[1]
            last.weight.zero_()
            mixer.dt_bias.copy_(steps.repeat_interleave(mixer.head_dim))
        return True
    if isinstance(mixer, GatedLinearAttention):
        last = mixer.gk_proj[1]
        last.weight.zero_()
        scaled = TEMPERATURE * rates
        bias = -scaled - torch.log(-torch.expm1(-scaled))  # logsigmoid(bias) == -scaled
        mixer.gk_bias.copy_(bias.repeat_interleave(mixer.head_dim))
        return True
    return False


def set_write_strength(mixer: LinearAttention, common: torch.Tensor, strengths: torch.Tensor) -> bool:
    """Makes the write strength `strengths` `[H]` where `common x` is 1, for x `[N]`; whether the mixer has one."""
    if not isinstance(mixer, GatedDeltaNet | KimiDeltaAttention):
        return False
    mixer.b_proj.weight.copy_(torch.logit(strengths)[:, None] * common)
    return True


def set_gate(mixer: LinearAttention, common: torch.Tensor, wanted: float | torch.Tensor) -> None:
    """Makes the output gate `wanted`, a number or `[H, V]`, where `common x` is 1, for hidden states x `[N]`."""
    shape = (mixer.num_heads, mixer.value_dim)
    values = torch.as_tensor(wanted, dtype=common.dtype, device=common.device).expand(shape)
    inputs = torch.logit(values) if mixer.output_gate == "sigmoid" else inverse_silu(values)
    mixer.g_proj.weight.copy_(inputs.flatten()[:, None] * common)


def inverse_silu(values: torch.Tensor) -> torch.Tensor:
    """The x of at least 0 with `x sigmoid(x)` equal to `values`, which are at least 0."""
    low, high = torch.zeros_like(values), values + 0.3  # silu(x) > x - 0.279
    for _ in range(60):
        middle = (low + high) / 2
        below = middle * torch.sigmoid(middle) < values
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def strengths_of(entropy: torch.Tensor) -> torch.Tensor:
    """Write strengths `[H]` from each head's entropy: 0.7 for the least in the layer, 0.3 for the greatest."""
    low, high = entropy.min(), entropy.max()
    return 0.7 - 0.4 * (entropy - low) / (high - low).clamp(min=1e-6)


def common_direction(moment: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, float]:
    """
    The `w` `[N]` for which `w x` is nearest to 1 over hidden states with second moment `moment` `[N, N]` and mean
    `mean` `[N]`, scaled so that its mean is 1, and the standard deviation of `w x`.
    """
    ridge = _RIDGE * moment.diagonal().mean() * torch.eye(len(mean), dtype=moment.dtype, device=moment.device)
    w = torch.linalg.solve(moment + ridge, mean)
    w = w / (w @ mean)
    return w, float((w @ moment @ w - 1).clamp(min=0).sqrt())


def fitted_scale(cross: torch.Tensor, power: torch.Tensor) -> torch.Tensor:
    """`<wanted, given> / <given, given>`, the factor of least squares; 1 where nothing is given."""
    return torch.where(power > 0, cross / power.clamp(min=1e-30), torch.ones_like(cross))


def attention_statistics(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    padding_mask: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    skip_first: bool = False,
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    What causal softmax attention looks at, without ever holding the weights of more than `chunk` queries.

    Args:
        query, key: `[B, T, H, D]`. value: `[B, T, H, V]`.
        scaling: of the scores.
        padding_mask: `[B, T]`, 1 for tokens. seq_idx: `[B, T]`, the document of each token. None without either.
        attention_mask: the teacher's own `[B or 1, 1 or H, T, T]`, true or 0 where a query sees a key.
        window: keys that a query sees, itself included. softcap, sinks `[H]`: as in the library's attention.
        skip_first: leave the first token of each document out of distance and mass.
        chunk: queries at once; by default as many as keep their scores within 64 MiB.

    Returns:
        The sums of `a_ij (i - j)` and of `a_ij` over keys, the distance counted in tokens that are not padding, the
        entropy in nats over its logarithm of the number of keys seen (0 where that is 1), all `[B, T, H]`, and the
        attention's output `[B, T, H, V]`. Of padding all are 0.
    """
    batch, tokens, heads, _ = query.shape
    query, key, value = (widen(x) for x in (query, key, value))
    if padding_mask is None:
        padding_mask = torch.ones(batch, tokens, device=query.device)
    valid = padding_mask.bool()
    document = torch.zeros_like(valid, dtype=torch.long) if seq_idx is None else seq_idx.expand(batch, tokens)
    place = valid.long().cumsum(-1)
    slots = torch.arange(tokens, device=query.device)
    counted = valid & ~_first_of_document(valid, document) if skip_first else valid
    step = chunk or max(1, _CHUNK_ELEMENTS // (batch * heads * tokens))
    parts: list[tuple[torch.Tensor, ...]] = []
    for start in range(0, tokens, step):
        here = slice(start, start + step)
        seen = (slots[None, :] <= slots[here, None])[None] & valid[:, None] & valid[:, here, None]  # [B, C, T]
        seen = seen & (document[:, here, None] == document[:, None])
        if window is not None:
            seen = seen & (slots[here, None] - slots < window)
        scores = torch.einsum("bihd,bjhd->bhij", query[:, here], key) * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        seen = seen[:, None]
        if attention_mask is not None:
            given = attention_mask[:, :, here, :tokens]
            seen = seen & (given if given.dtype == torch.bool else given == 0)
        scores = scores.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            extra = sinks.to(scores.dtype)[None, :, None, None].expand(batch, -1, scores.shape[2], 1)
            scores = torch.cat((scores, extra), -1)
        weights = scores.softmax(-1).nan_to_num(0.0)[..., :tokens]  # nan in rows of padding, which see nothing
        output = torch.einsum("bhij,bjhv->bihv", weights, value)
        entropy = torch.special.entr(weights).sum(-1)
        keys = seen.sum(-1).to(weights.dtype)
        entropy = torch.where(keys > 1, entropy / keys.log().clamp(min=1e-6), 0.0)
        looked = weights * counted[:, None, None]
        away = (place[:, here, None] - place[:, None]).to(weights.dtype)[:, None]
        parts.append(((looked * away).sum(-1).mT, looked.sum(-1).mT, entropy.mT, output))
    distance, mass, spread, context = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return distance, mass, spread, context


def _first_of_document(valid: torch.Tensor, document: torch.Tensor) -> torch.Tensor:
    """The first token of each document that is not padding, `[B, T]`."""
    earlier = valid.long().cumsum(-1) - valid.long()
    begins = torch.ones_like(valid)
    begins[:, 1:] = document[:, 1:] != document[:, :-1]
    return valid & (earlier == torch.where(begins, earlier, 0).cummax(-1).values)


@dataclass
class _Part:
    """One layer's part of one batch: what its attention is given, in the teacher and in the student."""

    given: dict[str, Any]
    padding_mask: torch.Tensor | None
    seq_idx: torch.Tensor | None
    teacher_attention: Any
    mixer: Any
    precision: Precision

    @property
    def counted(self) -> torch.Tensor:
        """Which tokens are not padding, `[B, T]`."""
        hidden = self.given["hidden_states"]
        if self.padding_mask is None:
            return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        return self.padding_mask.bool()

    def statistics(self, skip_first: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """[`attention_statistics`] of the teacher's attention."""
        adopted = AdoptedAttention(self.teacher_attention, self.mixer.layer_idx)
        given = dict(self.given)
        hidden = given["hidden_states"]
        with self.precision.running(hidden.device):
            (query, key, value), settings = adopted.capture(**given)
        mask = given.get("attention_mask")
        sinks = self.teacher_attention._parameters.get("sinks")
        scaling = settings.get("scaling")
        return attention_statistics(
            query,
            key,
            value,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            padding_mask=self.padding_mask,
            seq_idx=self.seq_idx,
            attention_mask=mask if isinstance(mask, torch.Tensor) and mask.ndim == 4 else None,
            window=settings.get("sliding_window"),
            softcap=settings.get("softcap"),
            sinks=sinks,
            skip_first=skip_first,
        )

    def mixed(self) -> torch.Tensor:
        """The mixer's output before the output projection, `[B, T, H, V]`, normed and gated."""
        mixer, given = self.mixer, dict(self.given)
        if self.precision.autocast is None:
            given = in_dtype_of(mixer, given)
        if not mixer.options.rope and given.get("position_embeddings") is not None:
            given["position_embeddings"] = no_rotation(given["position_embeddings"])
        hidden = given["hidden_states"]
        mask = None if self.padding_mask is None else self.padding_mask.to(hidden.dtype)
        with self.precision.running(hidden.device):
            (query, key, value), _ = mixer.capture(**given)
            groups = mixer.num_heads // mixer.num_kv_heads
            call = AttentionCall(hidden, None, mask, self.seq_idx)
            return widen(mixer.attend(query, key[:, :, ::groups], value[:, :, ::groups], call))


def _teacher_parts(
    student: Any, teacher: Any, mixers: dict[int, Any], rows: Any, batch_size: int, precision: Precision
) -> Iterator[tuple[int, _Part]]:
    """Each layer's part of each batch of `rows`."""
    modules = decoder_layers(teacher)
    for batch in batches(rows, batch_size, teacher.device):
        for i, given, _, padding_mask, seq_idx in teacher_attention(student, teacher, batch, precision):
            if i in mixers:
                take_cache(given)
                yield i, _Part(given, padding_mask, seq_idx, modules[i].self_attn, mixers[i], precision)


class _Attention:
    """Sums over tokens of what one layer's attention is given and looks at."""

    tokens: float = 0.0
    moment: Any = 0.0
    total: Any = 0.0
    distance: Any = 0.0
    mass: Any = 0.0
    entropy: Any = 0.0

    def common(self) -> tuple[torch.Tensor, float]:
        """[`common_direction`] of the hidden states."""
        return common_direction(self.moment.double() / self.tokens, self.total / self.tokens)

    def add(self, part: _Part, *, skip_first: bool) -> None:
        counted = part.counted
        hidden = widen(part.given["hidden_states"])[counted]
        self.tokens += len(hidden)
        self.moment = self.moment + hidden.mT @ hidden
        self.total = self.total + hidden.double().sum(0)
        distance, mass, entropy, _ = part.statistics(skip_first)
        self.distance = self.distance + distance[counted].double().sum(0)
        self.mass = self.mass + mass[counted].double().sum(0)
        self.entropy = self.entropy + entropy[counted].double().sum(0)


def _fit_scales(
    student: Any,
    teacher: Any,
    mixers: dict[int, Any],
    rows: Any,
    batch_size: int,
    precision: Precision,
    scale: str,
    found: Calibration,
    seen: dict[int, _Attention],
) -> None:
    """The weight of the output norm, and the gate where `scale` says so, by least squares."""
    cross: dict[int, Any] = dict.fromkeys(mixers, 0.0)
    power, wanted_power = dict(cross), dict(cross)
    for i, part in _teacher_parts(student, teacher, mixers, rows, batch_size, precision):
        wanted, given = (x[part.counted].double() for x in (part.statistics()[3], part.mixed()))
        cross[i] = cross[i] + (wanted * given).sum(0)
        power[i] = power[i] + given.square().sum(0)
        wanted_power[i] = wanted_power[i] + wanted.square().sum()
    for i, mixer in mixers.items():
        if mixer.o_norm is None:
            found.left[i] = f"the scale of {type(mixer).__name__}, which has no output norm,"
            continue
        factors = fitted_scale(cross[i].sum(0), power[i].sum(0))
        each = factors.expand_as(cross[i])
        if scale == "gate" and mixer.output_gate is not None:
            now = 1.0 if mixer.output_gate == "silu" else 0.5
            gates = now * fitted_scale(cross[i], power[i]) / torch.where(factors == 0, 1.0, factors)
            gates = gates.clamp(_LEAST_GATE, _MOST_GATE if mixer.output_gate == "sigmoid" else None)
            each = gates / now * factors
            set_gate(mixer, seen[i].common()[0], gates)
        errors = [
            wanted_power[i] - 2 * (s * cross[i]).sum() + (s.square() * power[i]).sum() for s in (1 + 0 * each, each)
        ]
        found.error[i] = (float(errors[0] / wanted_power[i]), float(errors[1] / wanted_power[i]))
        mixer.o_norm.weight.mul_(factors)
