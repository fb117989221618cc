"""Where a mixer starts, against plain float64 computations: full softmax matrices, and torch.linalg.lstsq."""

import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from runs import save_teacher, save_texts, tiny_recipe
from teachers import CONFIGS, tiny_teacher, tokens
from torch import nn

import hf_hybrid as hh
from hf_hybrid.data.rows import CutRows, load_rows
from hf_hybrid.modeling.modeling_hybrid import decoder_layers
from hf_hybrid.run.recipe import Recipe
from hf_hybrid.run.runner import run_recipe
from hf_hybrid.run.stages import start_of
from hf_hybrid.teacher.loading import load_teacher
from hf_hybrid.trainers.alignment import mixer_outputs
from hf_hybrid.trainers.calibration import (
    attention_statistics,
    calibrate,
    common_direction,
    inverse_silu,
    set_gate,
    strengths_of,
)
from hf_hybrid.trainers.precision import AS_LOADED, Precision


MIXERS = ["gated_deltanet", "kimi_delta_attention", "gated_linear_attention"]


def seen_pairs(valid, document, window=None):
    """Which keys a query sees, `[B, T, T]`, pair by pair."""
    batch, length = valid.shape
    seen = torch.zeros(batch, length, length, dtype=torch.bool)
    for b in range(batch):
        for i in range(length):
            for j in range(i + 1):
                near = window is None or i - j < window
                seen[b, i, j] = valid[b, i] and valid[b, j] and document[b, i] == document[b, j] and near
    return seen


def reference(query, key, value, seen, valid, *, scaling, softcap=None, sinks=None, skip_first=False):
    """[`attention_statistics`] from the whole matrix of weights, row by row."""
    batch, length, heads, _ = query.shape
    distance, mass, entropy = (torch.zeros(batch, length, heads, dtype=query.dtype) for _ in range(3))
    output = torch.zeros_like(value)
    for b in range(batch):
        for i in range(length):
            keys = seen[b, i].nonzero().flatten()
            if not len(keys):
                continue
            for h in range(heads):
                scores = query[b, i, h] @ key[b, keys, h].T * scaling
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                total = scores.exp().sum() + (0 if sinks is None else sinks[h].exp())
                weights = scores.exp() / total
                output[b, i, h] = weights @ value[b, keys, h]
                if len(keys) > 1:
                    entropy[b, i, h] = -(weights * weights.log()).sum() / math.log(len(keys))
                away = torch.tensor([valid[b, j + 1 : i + 1].sum() for j in keys], dtype=query.dtype)
                if skip_first:
                    first = seen[b].any(0).nonzero().flatten()
                    starts = [j for j in first.tolist() if seen[b, j].sum() == 1]  # what sees itself alone
                    kept = torch.tensor([int(j) not in starts for j in keys])
                    weights, away = weights[kept], away[kept]
                distance[b, i, h], mass[b, i, h] = weights @ away, weights.sum()
    return distance, mass, entropy, output


ROWS = {
    "whole": lambda valid, document: None,
    "padded left": lambda valid, document: valid[0, :5].fill_(False),
    "padded right": lambda valid, document: valid[1, 9:].fill_(False),
    "packed": lambda valid, document: (document[0, 6:].fill_(1), document[1, 3:].fill_(1), document[1, 9:].fill_(2)),
    "packed and padded": lambda valid, document: (document[0, 6:].fill_(1), valid[0, 4:6].fill_(False)),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("chunk", [1, 4, None])
@pytest.mark.parametrize("skip_first", [False, True])
def test_attention_statistics_are_those_of_the_whole_matrix(rows, chunk, skip_first):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 13, 3, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    value = torch.randn(2, 13, 3, 5, dtype=torch.float64, generator=generator)
    valid, document = torch.ones(2, 13, dtype=torch.bool), torch.zeros(2, 13, dtype=torch.long)
    ROWS[rows](valid, document)
    masks = {"padding_mask": None if valid.all() else valid, "seq_idx": document if document.any() else None}
    found = attention_statistics(query, key, value, scaling=0.7, skip_first=skip_first, chunk=chunk, **masks)
    wanted = reference(query, key, value, seen_pairs(valid, document), valid, scaling=0.7, skip_first=skip_first)
    for given, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("change", ["window", "softcap", "sinks", "mask", "additive mask"])
def test_attention_statistics_of_other_softmaxes(change):
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, 11, 2, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    valid, document = torch.ones(2, 11, dtype=torch.bool), torch.zeros(2, 11, dtype=torch.long)
    seen = seen_pairs(valid, document, window=4 if change in ("window", "mask", "additive mask") else None)
    more = {
        "window": {"window": 4},
        "softcap": {"softcap": 0.9},
        "sinks": {"sinks": torch.tensor([0.3, -1.0], dtype=torch.float64)},
        "mask": {"attention_mask": seen[:, None]},
        "additive mask": {"attention_mask": (~seen)[:, None].double() * torch.finfo(torch.float64).min},
    }[change]
    known = {name: value for name, value in more.items() if name in ("softcap", "sinks")}
    found = attention_statistics(query, key, value, scaling=0.5, chunk=3, **more)
    wanted = reference(query, key, value, seen, valid, scaling=0.5, **known)
    for given, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)


def dataset(ids, **columns):
    return datasets.Dataset.from_dict(
        {"input_ids": ids.tolist(), **{name: column.tolist() for name, column in columns.items()}}
    )


def teacher_weights(teacher, ids):
    """
    The teacher's own attention matrices `[B, H, T, T]`, whose softmax the library makes in fp32, and what each layer's
    attention was given.
    """
    given = {}
    handles = [
        layer.self_attn.register_forward_hook(
            lambda module, args, kwargs, output, i=i: given.__setitem__(i, kwargs), with_kwargs=True
        )
        for i, layer in enumerate(decoder_layers(teacher))
    ]
    teacher.set_attn_implementation("eager")
    with torch.no_grad():
        weights = teacher(ids, output_attentions=True, use_cache=False).attentions
    teacher.set_attn_implementation("sdpa")
    for handle in handles:
        handle.remove()
    return weights, given


def decays(mixer, x):
    """Log decay of each token and head as the mixers' docstrings say, `[B, T, H or H D]`."""
    if hasattr(mixer, "gk_bias"):
        return nn.functional.logsigmoid(mixer.gk_proj(x) + mixer.gk_bias) / 16
    project = mixer.a_proj if hasattr(mixer, "a_proj") else mixer.f_proj
    step = nn.functional.softplus(project(x) + mixer.dt_bias)
    rate = mixer.A_log.exp()
    return -step * (rate if hasattr(mixer, "a_proj") else rate.repeat_interleave(mixer.head_dim))


@torch.no_grad()
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("family", CONFIGS)
def test_memories_halve_over_the_distance_that_the_teacher_looks_back(family, mixer):
    teacher = tiny_teacher(family, torch.float64)
    ids = tokens(5, 40)
    student = hh.convert(teacher, [], mixer=mixer)
    found = calibrate(student, teacher, dataset(ids), half_life=0.9, skip_first=False, scale=None, batch_size=2)
    assert found.tokens == 200 and not found.left
    place = torch.arange(40, dtype=torch.float64)
    weights, given = teacher_weights(teacher, ids)
    for i, layer in enumerate(decoder_layers(student)):
        wanted = 0.9 * (weights[i] * (place[:, None] - place)).sum(-1).mean((0, 2))  # per head
        torch.testing.assert_close(torch.tensor(found.half_life[i], dtype=torch.float64), wanted, rtol=1e-6, atol=0)
        log_decay = decays(layer.self_attn, given[i]["hidden_states"])
        heads = log_decay.unflatten(-1, (4, -1))
        expected = (-math.log(2) / wanted)[:, None].expand_as(heads)
        torch.testing.assert_close(heads, expected, rtol=1e-6, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["padding", "packed"])
def test_rows_with_padding_or_documents_give_what_their_documents_give(kind):
    teacher = tiny_teacher("llama", torch.float64)
    first, second = tokens(1, 20, seed=1), tokens(1, 12, seed=2)
    students = [hh.convert(teacher, []) for _ in range(2)]
    for student in students[1:]:
        student.load_state_dict(students[0].state_dict())
    if kind == "packed":
        positions = torch.cat((torch.arange(20), torch.arange(12)))[None]
        rows = dataset(torch.cat((first, second), 1), position_ids=positions)
    else:
        mask = torch.ones(2, 20, dtype=torch.long)
        mask[1, :8] = 0
        rows = dataset(torch.cat((first, nn.functional.pad(second, (8, 0)))), attention_mask=mask)
    apart = datasets.Dataset.from_dict({"input_ids": first.tolist() + second.tolist()})
    options: dict = {"write_strength": "entropy", "scale": "gate"}
    found = [
        calibrate(students[0], teacher, rows, batch_size=2, **options),
        calibrate(students[1], teacher, apart, batch_size=1, **options),
    ]
    assert found[0].tokens == found[1].tokens == 32
    for name, tensor in students[0].state_dict().items():  # padded rows turn q and k further, in fp32
        torch.testing.assert_close(
            tensor, students[1].state_dict()[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@torch.no_grad()
@pytest.mark.parametrize("scale", ["norm", "gate"])
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "llama_mqa"])
def test_scales_are_those_of_least_squares(family, mixer, scale):
    """GQA, MQA and MHA; against torch.linalg.lstsq over all tokens, of all heads or of one."""
    torch.manual_seed(0)
    teacher = tiny_teacher(family, torch.float64)
    ids = tokens(4, 30)
    student, before = (hh.convert(teacher, [], mixer=mixer) for _ in range(2))
    before.load_state_dict(student.state_dict())
    calibrate(before, teacher, dataset(ids), scale=None)
    found = calibrate(student, teacher, dataset(ids), scale=scale)
    weights, given = teacher_weights(teacher, ids)
    for i, layer in enumerate(decoder_layers(student)):
        own, other = layer.self_attn, decoder_layers(before)[i].self_attn
        _, _, value = other.project(**given[i])
        wanted = torch.einsum("bhij,bjhv->bihv", weights[i], value).flatten(0, 1)
        heads = []
        handle = other.o_proj.register_forward_pre_hook(lambda module, args, into=heads: into.append(args[0]))
        other(**given[i])
        handle.remove()
        got = heads[0].view_as(wanted.view(4, 30, *wanted.shape[1:])).flatten(0, 1)  # [tokens, H, V]
        norm = torch.stack(
            [
                torch.linalg.lstsq(got[..., v].reshape(-1, 1), wanted[..., v].reshape(-1, 1)).solution[0, 0]
                for v in range(got.shape[-1])
            ]
        )
        torch.testing.assert_close(own.o_norm.weight, norm, rtol=1e-5, atol=1e-7)
        squares = wanted.square().sum()
        assert found.error[i][0] == pytest.approx(float((wanted - got).square().sum() / squares), rel=1e-6)
        if scale == "norm":
            assert torch.equal(own.g_proj.weight, other.g_proj.weight)
            assert found.error[i][1] == pytest.approx(float((wanted - got * norm).square().sum() / squares), rel=1e-6)
            continue
        middle = 0.5 if own.output_gate == "sigmoid" else 1.0
        most = 0.95 if own.output_gate == "sigmoid" else None
        gates = torch.empty_like(got[0])
        for h in range(got.shape[1]):
            for v in range(got.shape[2]):
                factor = torch.linalg.lstsq(got[:, h, v, None], wanted[:, h, v, None]).solution[0, 0]
                gates[h, v] = (middle * factor / norm[v]).clamp(0.05, most)
        x = given[i]["hidden_states"]
        mean_input = own.g_proj(x).flatten(0, 1).mean(0).view_as(gates)
        act = torch.sigmoid if own.output_gate == "sigmoid" else nn.functional.silu
        torch.testing.assert_close(act(mean_input), gates, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("mixer", MIXERS)
def test_calibrated_mixers_are_nearer_to_the_teacher(mixer):
    """On rows that the calibration did not see."""
    torch.manual_seed(0)
    teacher = tiny_teacher("llama")
    student = hh.convert(teacher, [], mixer=mixer)
    errors = []
    for _ in range(2):
        outputs = mixer_outputs(student, teacher, {"input_ids": tokens(8, 64, seed=5)}, AS_LOADED)
        errors.append(sum(float((wanted - got).square().sum()) for _, wanted, got, _ in outputs))
        calibrate(student, teacher, dataset(tokens(16, 64)))
    assert errors[1] < 0.95 * errors[0], errors


@torch.no_grad()
@pytest.mark.parametrize("mixer", MIXERS[:2])
def test_write_strengths_have_the_mean_that_is_asked_for(mixer):
    teacher = tiny_teacher("llama", torch.float64)
    ids = tokens(4, 30)
    student = hh.convert(teacher, [], mixer=mixer)
    found = calibrate(student, teacher, dataset(ids), write_strength=0.2, gate=False, half_life=None, scale=None)
    _, given = teacher_weights(teacher, ids)
    for i, layer in enumerate(decoder_layers(student)):
        logits = layer.self_attn.b_proj(given[i]["hidden_states"]).flatten(0, 1).mean(0)
        torch.testing.assert_close(torch.sigmoid(logits), torch.full_like(logits, 0.2), rtol=1e-6, atol=0)
        assert found.write_strength[i] == [0.2] * 4
    assert not (found.gate_spread or found.half_life or found.error)
    entropies = torch.tensor([0.2, 0.8, 0.5], dtype=torch.float64)
    torch.testing.assert_close(strengths_of(entropies), torch.tensor([0.7, 0.3, 0.5], dtype=torch.float64))


def test_the_common_direction_is_the_least_squares_fit_of_a_constant():
    x = torch.randn(500, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    w, spread = common_direction(x.T @ x / 500, x.mean(0))
    plain = torch.linalg.lstsq(x, torch.ones(500, 1, dtype=torch.float64)).solution[:, 0]
    torch.testing.assert_close(w, plain / (x @ plain).mean(), rtol=5e-3, atol=2e-3)  # but for its ridge
    assert (x @ w).mean() == pytest.approx(1)
    assert spread == pytest.approx((x @ w).std(correction=0).item(), rel=1e-6)


@torch.no_grad()
def test_a_gate_is_what_it_is_set_to():
    values = torch.tensor([0.05, 0.5, 1.0, 3.0, 40.0], dtype=torch.float64)
    torch.testing.assert_close(nn.functional.silu(inverse_silu(values)), values, rtol=1e-12, atol=0)
    teacher = tiny_teacher("llama", torch.float64)
    for mixer, wanted in (("gated_deltanet", 1.3), ("kimi_delta_attention", 0.3)):
        own = decoder_layers(hh.convert(teacher, [], mixer=mixer))[0].self_attn
        common = torch.zeros(64, dtype=torch.float64)
        common[0] = 1.0
        set_gate(own, common, wanted)
        gate = own.g_proj(torch.eye(64, dtype=torch.float64)[0])
        act = nn.functional.silu if mixer == "gated_deltanet" else torch.sigmoid
        torch.testing.assert_close(act(gate), torch.full_like(gate, wanted), rtol=1e-9, atol=0)


def test_what_cannot_be_calibrated_is_said():
    teacher = tiny_teacher("llama")
    rows = dataset(tokens(2, 16))
    with pytest.raises(ValueError, match="no layer of the student has a recurrence to calibrate.*SlidingWindow"):
        calibrate(hh.convert(teacher, [], mixer="sliding_window"), teacher, rows)
    with pytest.raises(ValueError, match="all keep softmax"):
        calibrate(hh.convert(teacher, range(4)), teacher, rows)
    student = hh.convert(teacher, [], mixer_options={"output_norm": False})
    assert calibrate(student, teacher, rows).left[0] == "the scale of GatedDeltaNet, which has no output norm,"
    for option, value in (("half_life", 0.0), ("write_strength", 1.5), ("write_strength", "most"), ("scale", "all")):
        with pytest.raises(ValueError, match=f"{option}={value!r}"):
            calibrate(student, teacher, rows, **{option: value})
    mixed = hh.convert(teacher, [0], mixer=["gated_deltanet", "gated_deltanet", "sliding_window", MIXERS[2]])
    softmax = {name: tensor.clone() for name, tensor in decoder_layers(mixed)[0].state_dict().items()}
    found = calibrate(mixed, teacher, rows, write_strength=0.3)
    assert found.left == {2: "all of SlidingWindowAttention"} and set(found.half_life) == {1, 3}
    assert set(found.write_strength) == {1}  # gated linear attention has none
    assert "left as they are: all of SlidingWindowAttention in layer 2" in str(found)
    assert all(torch.equal(tensor, softmax[name]) for name, tensor in decoder_layers(mixed)[0].state_dict().items())


def test_a_mixer_of_ones_own_gets_gate_and_norm(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    from retention import RetentionHybrid

    teacher = tiny_teacher("llama")
    student = hh.convert(teacher, [], mixer="retention", model_class=RetentionHybrid)
    found = calibrate(student, teacher, dataset(tokens(4, 32)))
    assert found.left == dict.fromkeys(range(4), "the decay of Retention")
    assert set(found.error) == set(range(4)) and not (found.half_life or found.write_strength)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"output_gate": None}, {"rope": False}, {"short_convolution": 4}])
def test_options_of_a_mixer_are_followed(options):
    """The fit is of what the mixer itself gives its output projection."""
    torch.manual_seed(0)
    teacher = tiny_teacher("llama", torch.float64)
    ids = tokens(4, 30)
    student = hh.convert(teacher, [], mixer_options=options)
    found = calibrate(student, teacher, dataset(ids), scale="norm")
    weights, given = teacher_weights(teacher, ids)
    for i, layer in enumerate(decoder_layers(student)):
        own, heads = layer.self_attn, []
        _, _, value = own.project(**given[i])
        wanted = torch.einsum("bhij,bjhv->bihv", weights[i], value)
        handle = own.o_proj.register_forward_pre_hook(lambda module, args, into=heads: into.append(args[0]))
        own(**given[i])
        handle.remove()
        error = (wanted.flatten(2) - heads[0]).square().sum() / wanted.square().sum()
        assert found.error[i][1] == pytest.approx(float(error), rel=1e-6)
    assert bool(found.gate_spread) == ("output_gate" not in options)


@torch.no_grad()
def test_under_autocast_it_finds_nearly_the_same():
    teacher = tiny_teacher("llama")
    torch.manual_seed(0)
    students = [hh.convert(teacher, []) for _ in range(2)]
    students[1].load_state_dict(students[0].state_dict())
    rows = dataset(tokens(4, 32))
    plain = calibrate(students[0], teacher, rows)
    half = calibrate(students[1], teacher, rows, precision=Precision(torch.bfloat16))
    for i, values in plain.half_life.items():
        assert half.half_life[i] == pytest.approx(values, rel=0.1)
        assert half.error[i][1] == pytest.approx(plain.error[i][1], rel=0.1)


class TestInARun:
    """The alignment's learning rate is 0, so what it leaves is where it started."""

    def aligned(self, tmp_path: Path, *, on_the_fly: bool = False, mixer: str = "gated_deltanet", **align: Any):
        recipe = tiny_recipe(save_teacher(tmp_path / "teacher"), save_texts(tmp_path / "texts"), mixer=mixer)
        recipe["align"] |= {"learning_rate": 0.0, "mixer_learning_rate": 0.0, **align}
        recipe["data"]["on_the_fly"] = on_the_fly
        events: list[Any] = []
        run_recipe(Recipe.from_dict(recipe), tmp_path / "run", stop_after="align", progress=events.append)
        notes = [event.text for event in events if event.kind == "note" and event.stage == "align"]
        student = hh.HybridForCausalLM.from_pretrained(tmp_path / "run" / "aligned", dtype=torch.float32)
        return student, notes

    @pytest.mark.parametrize("on_the_fly", [False, True])
    def test_the_alignment_starts_calibrated_and_says_so(self, tmp_path: Path, on_the_fly: bool):
        student, notes = self.aligned(tmp_path, on_the_fly=on_the_fly)
        teacher = load_teacher(tmp_path / "teacher")
        rows = CutRows(load_rows(tmp_path / "run" / "data")["train"], 32)
        if on_the_fly:  # which has other rows than these
            assert any("from 1,024 tokens" in note for note in notes)
        else:
            fresh = hh.convert(teacher, [])  # drawn otherwise: nothing of the draw is left
            found = calibrate(fresh, teacher, datasets.Dataset.from_dict(rows[: 1024 // 32]), batch_size=2)
            assert f"calibration: {found.lines()[0]}" in notes
            for name, tensor in fresh.state_dict().items():
                torch.testing.assert_close(student.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)
        for what in ("median half-life", "write strength", "constant gates", "with fitted scales"):
            assert any(what in note for note in notes), what
        assert not decoder_layers(student)[0].self_attn.a_proj.weight.any()

    def test_it_can_be_left_out(self, tmp_path: Path):
        student, notes = self.aligned(tmp_path, calibrate=False)
        assert not [note for note in notes if "calibration" in note]
        assert (decoder_layers(student)[0].self_attn.o_norm.weight == 1).all()

    def test_a_mixer_without_a_recurrence_is_said(self, tmp_path: Path):
        _, notes = self.aligned(tmp_path, mixer="sliding_window")
        assert "sliding_window has no recurrence, so nothing of it is calibrated" in notes


def test_no_more_rows_are_calibrated_on_than_are_aligned_on(tmp_path):
    recipe = Recipe.from_dict(
        tiny_recipe("teacher", tmp_path, align={"tokens": 160, "batch_size": 2, "block_size": 32})
    )
    teacher = tiny_teacher("llama")
    rows = [{"input_ids": row} for row in tokens(200, 32).tolist()]
    seen: list[int] = []

    def counted():
        for i, row in enumerate(rows):
            seen.append(i)
            yield row

    start_of(recipe, hh.convert(teacher, []), teacher, counted(), tmp_path / "checkpoints", lambda event: None)
    assert seen == list(range(160 // 32))
