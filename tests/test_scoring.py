"""Every scoring method against teachers in which the answer is known, and what all methods have in common."""

import copy
import json
import math

import datasets
import pytest
import torch
from teachers import tiny_teacher, tokens

import hf_hybrid as hh
from hf_hybrid.modeling.gated_deltanet import GatedDeltaNet
from hf_hybrid.synthetic import associative_recall
from hf_hybrid.trainers.scoring import METHODS, NEEDS_K, NO_TRAINING, TEACHER_ONLY
from hf_hybrid.trainers.scoring_rules import POSITIONAL


DEAD, LAYERS = 2, 4
LENGTH = 24


def rows(count, seed=0):
    return datasets.Dataset.from_dict({"input_ids": tokens(count, LENGTH, seed).tolist()})


def arguments(folder, **changes):
    settings = {"output_dir": str(folder), "per_device_train_batch_size": 4, "per_device_eval_batch_size": 3}
    settings |= {"learning_rate": 1e-4, "mixer_learning_rate": 3e-4, "use_cpu": True, "max_steps": 2}
    return hh.DistillationConfig(**settings | changes)


def recall_task():
    return associative_recall(6, 16, torch.arange(3, 99), torch.Generator().manual_seed(0))


def options_of(method):
    return {"task": recall_task()} if method == "ablation-recall" else {}


@pytest.fixture(scope="module")
def dead_layer():
    """
    A teacher whose layer 2 does nothing, and an all-linear student that has little of the other layers' attention.

    Attention is a small addition to the stream and there is no MLP, so what each layer adds is nearly independent.
    """
    teacher = tiny_teacher("llama")
    with torch.no_grad():
        teacher.model.embed_tokens.weight.mul_(6)
        for layer in teacher.model.layers:
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight.mul_(0.3)
        teacher.model.layers[DEAD].self_attn.o_proj.weight.zero_()
    return teacher, weak_student(teacher)


def weak_student(teacher, **options):
    torch.manual_seed(0)
    student = hh.convert(teacher, [], **options)
    with torch.no_grad():
        for layer in student.model.layers:
            if isinstance(layer.self_attn, GatedDeltaNet):
                layer.self_attn.o_proj.weight.mul_(0.1)
    return student


def score(teacher, student, folder, method, **changes):
    given = {"args": arguments(folder), "tokens_per_layer": 2 * 4 * LENGTH, "options": options_of(method)}
    given |= {"k": 2 if method in NEEDS_K else None, "method": method} | changes
    train = None if method in NO_TRAINING else rows(16)
    return hh.score_layers(None if method in TEACHER_ONLY else student, teacher, train, rows(6, seed=9), **given)


# A random model predicts random text no better with a layer than without.
UNORDERED = (*POSITIONAL, "smart", "ablation-ppl", "ablation-recall")


@pytest.mark.parametrize("method", [method for method in METHODS if method not in UNORDERED])
def test_a_layer_whose_attention_does_nothing_comes_last(method, dead_layer, tmp_path):
    teacher, student = dead_layer
    changes = {"k": 3} if method in NEEDS_K else {}
    scores = score(teacher, student, tmp_path, method, **changes)
    assert scores.ranking[-1] == DEAD
    assert sorted(scores.ranking) == list(range(LAYERS)) and scores.top(4) == [0, 1, 2, 3]
    assert scores.method == method and scores.measured_on["eval_tokens"] == 6 * LENGTH


@pytest.mark.parametrize("method", [method for method in TEACHER_ONLY if method not in POSITIONAL])
def test_what_does_nothing_scores_zero(method, dead_layer, tmp_path):
    values = {s.layer: s.value for s in score(*dead_layer, tmp_path, method).scores}
    assert values.pop(DEAD) == pytest.approx(0, abs=1e-6)
    assert all(abs(value) > 1e-4 for value in values.values())


@pytest.mark.parametrize("method", METHODS)
def test_the_student_and_the_teacher_are_given_back_as_they_were(method, dead_layer, tmp_path):
    teacher, student = dead_layer
    before = [copy.deepcopy(model.state_dict()) for model in (teacher, student)]
    score(teacher, student, tmp_path, method)
    for model, state in zip((teacher, student), before, strict=True):
        assert list(state) == list(model.state_dict())
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    assert student.full_attention_layers == [] and all(p.requires_grad for p in student.parameters())


def kl_with(student, teacher, layers):
    hybrid = copy.deepcopy(student)
    hybrid.set_full_attention_layers(layers, teacher)
    return hh.held_out_kl(hybrid, teacher, rows(6, seed=9), 3).mean


@pytest.mark.parametrize("method", ["ga-s2", "zero-shot", "zero-shot-linearise", "shared", "zero-shot-greedy"])
def test_a_layer_whose_mixer_is_exact_comes_last(method, dead_layer, tmp_path):
    """Sliding-window attention over the whole row is the teacher's own: restoring it gives nothing."""
    teacher, exact = tiny_teacher("llama"), 1
    with torch.no_grad():
        teacher.load_state_dict(dead_layer[0].state_dict())
        teacher.model.layers[DEAD].self_attn.o_proj.weight.normal_(0, 0.05)
    mixers = ["sliding_window" if i == exact else "gated_deltanet" for i in range(LAYERS)]
    student = weak_student(teacher, mixer=mixers, mixer_options={"sliding_window": {"window": LENGTH}})
    scores = score(teacher, student, tmp_path, method, **({"k": 3} if method in NEEDS_K else {}))
    assert scores.ranking[-1] == exact
    if method == "zero-shot":
        assert scores.scores[exact].kl == pytest.approx(scores.baseline, rel=1e-5)


class TestZeroShot:
    def test_scores_are_the_kl_of_hybrids_made_by_hand(self, dead_layer, tmp_path):
        teacher, student = dead_layer
        for score_ in score(teacher, student, tmp_path, "zero-shot").scores:
            assert score_.kl == pytest.approx(kl_with(student, teacher, [score_.layer]), rel=1e-5)
        for score_ in score(teacher, student, tmp_path, "zero-shot-linearise").scores:
            others = [i for i in range(LAYERS) if i != score_.layer]
            assert score_.kl == pytest.approx(kl_with(student, teacher, others), rel=1e-5, abs=1e-6)

    def test_greedy_adds_the_best_layer_to_those_before(self, dead_layer, tmp_path):
        teacher, student = dead_layer
        scores = score(teacher, student, tmp_path, "zero-shot-greedy", k=3)
        order = []
        for chosen in scores.order:
            kls = {i: kl_with(student, teacher, [*order, i]) for i in range(LAYERS) if i not in order}
            assert chosen == min(kls, key=kls.get)
            assert scores.scores[chosen].kl == pytest.approx(kls[chosen], rel=1e-5)
            order.append(chosen)
        assert scores.k is None and scores.top(2) == sorted(order[:2]) and len(order) == 3
        assert scores.tokens == 0 and scores.tokens_forward == (4 + 3 + 2) * 6 * LENGTH

    def test_smart_keeps_its_constraints(self, dead_layer, tmp_path):
        scores = score(*dead_layer, tmp_path, "smart", k=2)
        assert scores.order[0] in (0, 1) and scores.order[1] in (2, 3)
        with pytest.raises(ValueError, match="chose its layers for k=2, which says nothing about k=1"):
            scores.top(1)


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_scores_and_json_goes_round(method, dead_layer, tmp_path):
    first, second = (score(*dead_layer, tmp_path, method) for _ in range(2))
    assert [s.value for s in first.scores] == [s.value for s in second.scores] and first.order == second.order
    first.save(tmp_path / "scores.json")
    loaded = hh.LayerScores.load(tmp_path / "scores.json")
    assert "NaN" not in (tmp_path / "scores.json").read_text()
    assert json.dumps(loaded.to_dict()) == json.dumps(first.to_dict())
    assert loaded.ranking == first.ranking and loaded.top(2) == first.top(2) and str(loaded) == str(first)


class Stop(Exception):
    pass


@pytest.mark.parametrize("method", [m for m in METHODS if m not in POSITIONAL and m != "block-influence"])
def test_an_interrupted_call_goes_on(method, dead_layer, tmp_path):
    """Stopped at its second report, and called again: nothing is measured twice, and the result is the same."""
    seen = []

    def stop(layer_score):
        seen.append(layer_score)
        if len(seen) == 2:
            raise Stop

    folder = tmp_path / "kept"
    with pytest.raises(Stop):
        score(*dead_layer, tmp_path, method, output_dir=folder, progress=stop)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}
    assert len(times) >= 3  # the settings and two results
    resumed = score(*dead_layer, tmp_path, method, output_dir=folder)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    whole = score(*dead_layer, tmp_path, method)
    assert [s.value for s in resumed.scores] == [s.value for s in whole.scores] and resumed.order == whole.order
    assert (resumed.tokens, resumed.tokens_forward) == (whole.tokens, whole.tokens_forward)
    with pytest.raises(ValueError, match="has scores made with seed=42, this call has 1"):
        score(*dead_layer, tmp_path, method, output_dir=folder, args=arguments(tmp_path, seed=1))


class TestShared:
    def test_one_run_for_all_layers(self, dead_layer, tmp_path):
        scores = score(*dead_layer, tmp_path, "shared", k=2)
        assert scores.tokens == 2 * 4 * LENGTH and scores.tokens_forward == (4 + 3) * 6 * LENGTH

    def test_trains_what_it_says(self, dead_layer, tmp_path):
        """With frozen softmax attention the restored layers are the teacher's; trained, they are not."""
        from hf_hybrid.trainers.both_attentions import BothAttentions

        teacher, student = dead_layer
        changed = {}
        for trained in (False, True):
            seen = []
            keep = BothAttentions.register

            def register(self, registered, seen=seen, keep=keep):
                if not registered and self.registered:
                    own = [attention.q_proj.weight for attention in self.softmax]
                    theirs = [layer.self_attn.q_proj.weight for layer in teacher.model.layers]
                    seen.append([torch.equal(a, b) for a, b in zip(own, theirs, strict=True)])
                keep(self, registered)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(BothAttentions, "register", register)
                options = {"train_softmax": trained, "max_size": 4}
                score(teacher, student, tmp_path, "shared", options=options, tokens_per_layer=4 * 4 * LENGTH)
            changed[trained] = seen[0]
        assert all(changed[False]) and not all(changed[True])


class TestRecall:
    def test_rise_of_nll_and_errors(self, dead_layer, tmp_path):
        """Layer 0's score against logits computed by hand."""
        teacher, _ = dead_layer
        ids, answers = recall_task()

        def measures(model):
            log_p = model(ids).logits[:, :-1].log_softmax(-1)
            nll = -log_p.gather(-1, ids[:, 1:, None])[..., 0][answers[:, 1:]].mean().item()
            wrong = (log_p.argmax(-1) != ids[:, 1:])[answers[:, 1:]].double().mean().item()
            return nll, wrong

        with torch.no_grad():
            whole = measures(teacher)
            handle = teacher.model.layers[0].self_attn.register_forward_hook(lambda m, a, out: (out[0] * 0, out[1]))
            without = measures(teacher)
            handle.remove()
        for by, index in (("nll", 0), ("accuracy", 1)):
            scores = score(teacher, None, tmp_path, "ablation-recall", options={"task": recall_task(), "by": by})
            assert scores.scores[0].value == pytest.approx(without[index] - whole[index], rel=1e-4, abs=1e-6)

    def test_a_task_is_needed(self, dead_layer, tmp_path):
        with pytest.raises(ValueError, match=r"needs a task; pass options=\{'task'"):
            score(*dead_layer, tmp_path, "ablation-recall", options={})
        ids, answers = recall_task()
        with pytest.raises(ValueError, match="at least one answer in each row"):
            score(*dead_layer, tmp_path, "ablation-recall", options={"task": (ids, answers & False)})


def test_block_influence_by_hand(tmp_path):
    teacher = tiny_teacher("qwen3")
    ids = tokens(6, LENGTH, 9)
    wanted = []
    with torch.no_grad():
        for layer in teacher.model.layers:
            seen = {}
            hooks = [
                layer.register_forward_pre_hook(lambda m, args, seen=seen: seen.update(before=args[0])),
                layer.post_attention_layernorm.register_forward_pre_hook(
                    lambda m, args, seen=seen: seen.update(after=args[0])
                ),
            ]
            teacher(ids)
            wanted.append(1 - torch.cosine_similarity(seen["before"], seen["after"], dim=-1).mean().item())
            for hook in hooks:
                hook.remove()
    scores = hh.score_layers(None, teacher, None, rows(6, 9), method="block-influence", args=arguments(tmp_path))
    assert [s.value for s in scores.scores] == pytest.approx(wanted, rel=1e-4)


def test_what_cannot_be_scored(dead_layer, tmp_path):
    teacher, student = dead_layer
    held_out = rows(6, 9)
    for given, message in (
        ({"method": "best"}, r"method='best' is unknown; choose one of \['ga-s2'"),
        (
            {"method": "zero-shot", "options": {"swap": 1}},
            r"options \['swap'\] are unknown to method='zero-shot'; it",
        ),
        ({"method": "zero-shot-greedy", "options": {"swap": 1}}, r"it has \['swaps'\]"),
        ({"method": "zero-shot-greedy"}, "chooses layers together and needs k"),
        ({"method": "zero-shot-greedy", "k": 5}, r"k=5 layers cannot be chosen from 4; pass an integer in 0\.\.4"),
        ({"method": "uniform"}, "needs k, how many of them"),
        ({"method": "ga-s2"}, "trains and needs train_dataset"),
        ({"method": "shared", "options": {"subset": "all"}}, "trains and needs train_dataset"),
    ):
        with pytest.raises(ValueError, match=message):
            hh.score_layers(student, teacher, None, held_out, args=arguments(tmp_path), **given)
    with pytest.raises(ValueError, match="needs an aligned student; without one choose from"):
        hh.score_layers(None, teacher, None, held_out, args=arguments(tmp_path), method="zero-shot")
    with pytest.raises(ValueError, match="choose 'sizes' or 'single'"):
        score(teacher, student, tmp_path, "shared", options={"subset": "all"})


def test_scores_of_earlier_versions_load(tmp_path):
    entry = {"layer": 0, "kl": 0.5, "sem": 0.1, "tokens": 10, "seconds": 2.0, "per_sequence": [0.4, 0.6]}
    old = {"scores": [entry], "method": "ga-s2", "seed": 3, "evaluation_tokens": 64, "baseline": 1.5}
    (tmp_path / "scores.json").write_text(json.dumps(old))
    scores = hh.LayerScores.load(tmp_path / "scores.json")
    assert scores.scores[0].value == 0.5 and scores.tokens == 10 and scores.seconds == 2.0 and scores.top(1) == [0]
    assert math.isnan(hh.trainers.LayerScore(0, math.nan, 0, 0, 0).value)
