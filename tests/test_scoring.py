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


# These make the same runs as ga-s2, or twice as many.
EVERY = [pytest.param(m, marks=pytest.mark.slow if m in ("gr-s2", "avg-s2") else ()) for m in METHODS]


@pytest.mark.parametrize("method", EVERY)
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


@pytest.mark.parametrize("method", EVERY)
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


# What measures all layers at once keeps one result.
AT_ONCE = ("block-influence", "ga-s1", "path-gradient", "gates")


@pytest.mark.parametrize("method", [m for m in EVERY if m.values[0] not in POSITIONAL])
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
    assert len(times) >= (2 if method in AT_ONCE else 3)  # the settings, and what was finished
    resumed = score(*dead_layer, tmp_path, method, output_dir=folder)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    whole = score(*dead_layer, tmp_path, method)
    assert [s.value for s in resumed.scores] == [s.value for s in whole.scores] and resumed.order == whole.order
    assert (resumed.tokens, resumed.tokens_forward) == (whole.tokens, whole.tokens_forward)
    with pytest.raises(ValueError, match="has scores made with seed=42, this call has 1"):
        score(*dead_layer, tmp_path, method, output_dir=folder, args=arguments(tmp_path, seed=1))


@pytest.mark.parametrize("method", ["shared", "gates", "distilled-greedy"])
def test_a_killed_training_run_goes_on_from_its_last_checkpoint(method, dead_layer, tmp_path):
    """Stopped at step 3 of 4, called again: the same result as without, and steps 1 and 2 are not made again."""
    given = {"tokens_per_layer": 4 * 4 * LENGTH, "output_dir": tmp_path / "kept"}
    seen = []

    def stop(done, total, text):
        if text == "training" and done == 3:
            raise Stop

    with pytest.raises(Stop):
        score(*dead_layer, tmp_path, method, steps=stop, **given)
    assert (tmp_path / "kept" / f"{method.split('-')[0]}_checkpoints" / "checkpoint-2" / "files.json").is_file()
    resumed = score(*dead_layer, tmp_path, method, steps=lambda *event: seen.append(event), **given)
    assert [done for done, _, text in seen if text == "training"] == [3, 4]
    whole = score(*dead_layer, tmp_path, method, tokens_per_layer=4 * 4 * LENGTH)
    assert [s.value for s in resumed.scores] == [s.value for s in whole.scores] and resumed.order == whole.order
    assert resumed.tokens == whole.tokens == 4 * 4 * LENGTH
    assert not list((tmp_path / "kept").glob("*_checkpoints"))


class TestRounds:
    GIVEN = {"tokens_per_layer": 4 * 4 * LENGTH}

    def test_a_curve_changes_nothing(self, dead_layer, tmp_path):
        plain = score(*dead_layer, tmp_path, "ga-s2", **self.GIVEN)
        curved = score(*dead_layer, tmp_path, "ga-s2", options={"rounds": 2}, **self.GIVEN)
        for a, b in zip(plain.scores, curved.scores, strict=True):
            assert a.per_sequence == b.per_sequence and a.curve == []
            assert [point[0] for point in b.curve] == [2 * 4 * LENGTH, 4 * 4 * LENGTH]
            assert b.curve[-1][1:] == [b.value, b.sem] and b.curve[0][1] != b.value

    def test_losers_stop_and_the_others_end_as_without(self, dead_layer, tmp_path):
        plain = score(*dead_layer, tmp_path, "ga-s2", layers=[0, 1, 2], **self.GIVEN)
        options = {"rounds": 2, "halving": True, "noise": 0.0}
        halved = score(*dead_layer, tmp_path, "ga-s2", layers=[0, 1, 2], k=1, options=options, **self.GIVEN)
        assert halved.order == plain.ranking and halved.order[-1] == DEAD
        for a, b in zip(plain.scores, halved.scores, strict=True):
            stopped = b.layer == DEAD
            assert b.tokens == (2 if stopped else 4) * 4 * LENGTH and len(b.curve) == (1 if stopped else 2)
            assert (a.per_sequence == b.per_sequence) != stopped

    def test_a_job_with_fewer_layers_than_are_kept_stops_none(self, dead_layer, tmp_path):
        options = {"rounds": 2, "halving": True, "noise": 0.0}
        part = score(*dead_layer, tmp_path, "ga-s2", layers=[DEAD], k=2, options=options, **self.GIVEN)
        assert [s.tokens for s in part.scores] == [4 * 4 * LENGTH]
        with pytest.raises(ValueError, match="k=2 layers cannot be chosen from 1"):
            score(*dead_layer, tmp_path, "zero-shot-greedy", layers=[DEAD], k=2)

    def test_a_stable_choice_ends_it_and_an_interrupted_one_goes_on(self, dead_layer, tmp_path):
        options = {"rounds": 4, "stability_window": 1}
        given = {"k": 1, "layers": [0, DEAD], "options": options, "output_dir": tmp_path / "kept", **self.GIVEN}

        def stop(done, total, text):
            if "layer" in text and done == 2:
                raise Stop

        with pytest.raises(Stop):
            score(*dead_layer, tmp_path, "ga-s2", steps=stop, **given)
        resumed = score(*dead_layer, tmp_path, "ga-s2", **given)
        assert resumed.top(1) == [0] and resumed.order == []
        assert [s.tokens for s in resumed.scores] == [2 * 4 * LENGTH] * 2
        whole = score(*dead_layer, tmp_path, "ga-s2", **{**given, "output_dir": None})
        assert [s.per_sequence for s in whole.scores] == [s.per_sequence for s in resumed.scores]
        assert not (tmp_path / "kept" / "rounds").exists()

    def test_bad_options(self, dead_layer, tmp_path):
        with pytest.raises(ValueError, match="a run of 2 steps has no 3 rounds"):
            score(*dead_layer, tmp_path, "ga-s2", options={"rounds": 3})
        with pytest.raises(ValueError, match="pass at least 1 round"):
            score(*dead_layer, tmp_path, "ga-s2", options={"rounds": 0})
        with pytest.raises(ValueError, match="halving or a stability window"):
            score(*dead_layer, tmp_path, "ga-s2", options={"rounds": 2, "halving": True})


@pytest.mark.slow
def test_avg_s2_is_the_mean_of_two_ranks(dead_layer, tmp_path):
    ga, gr, mean = (score(*dead_layer, tmp_path, method) for method in ("ga-s2", "gr-s2", "avg-s2"))
    for layer, found in enumerate(mean.scores):
        assert found.value == (ga.ranking.index(layer) + gr.ranking.index(layer)) / 2 + 1
    assert mean.tokens == ga.tokens + gr.tokens


def test_gr_s2_is_a_run_of_its_own(dead_layer, tmp_path):
    """Layer 1's score equals linearising it by hand, distilling on the same batches and measuring."""
    teacher, student = dead_layer
    twin = copy.deepcopy(student)
    twin.set_full_attention_layers([0, 2, 3], teacher)
    args = arguments(tmp_path, max_steps=2, save_strategy="no", disable_tqdm=True)
    hh.DistillationTrainer(model=twin, teacher=teacher, args=args, train_dataset=rows(16)).train()
    wanted = hh.held_out_kl(twin, teacher, rows(6, seed=9), 3).mean
    assert score(*dead_layer, tmp_path, "gr-s2").scores[1].kl == pytest.approx(wanted, rel=1e-6)


def test_ga_s1_is_the_alignment_loss(dead_layer, tmp_path):
    teacher, student = dead_layer
    trainer = hh.AlignmentTrainer(model=student, teacher=teacher, args=hh.AlignmentConfig(str(tmp_path), use_cpu=True))
    with torch.no_grad():
        losses = trainer.layer_losses(student, {"input_ids": tokens(6, LENGTH, 9)})
    scores = score(teacher, student, tmp_path, "ga-s1").scores
    assert [s.value for s in scores] == pytest.approx([losses[i].item() for i in range(LAYERS)], rel=1e-5)


class TestGates:
    def test_the_shares_of_all_layers_add_up_to_the_whole(self, dead_layer, tmp_path):
        scores = score(*dead_layer, tmp_path, "path-gradient", options={"points": 6})
        assert sum(s.value for s in scores.scores) == pytest.approx(scores.baseline, rel=1e-3)
        assert scores.scores[DEAD].value == pytest.approx(0, abs=1e-7)
        assert scores.tokens == 6 * 6 * LENGTH and scores.tokens_forward == 0

    def test_the_gradient_at_the_start_is_the_slope(self, dead_layer, tmp_path):
        """Against the change of the KL when one gate opens by a little, computed with the gates themselves."""
        from hf_hybrid.trainers.both_attentions import BothAttentions
        from hf_hybrid.trainers.scoring_gates import gated

        teacher, student = (copy.deepcopy(model).double() for model in dead_layer)
        args = arguments(tmp_path)
        found = hh.score_layers(
            student, teacher, None, rows(6, 9), method="path-gradient", args=args, options={"until": 0.0}
        )
        step, kls = 1e-5, []
        with BothAttentions(student, teacher) as both:
            for opened in (0.0, step):
                with gated(both, lambda opened=opened: [opened if i == 1 else 0.0 for i in range(LAYERS)]):
                    kls.append(hh.held_out_kl(student, teacher, rows(6, 9)).mean)
        assert found.scores[1].value == pytest.approx((kls[0] - kls[1]) / step, rel=1e-3)

    def test_gates_open_where_it_pays_and_close_beyond_the_budget(self, dead_layer, tmp_path):
        given = {"tokens_per_layer": 20 * 4 * LENGTH, "k": 1}
        dear, free = (
            score(*dead_layer, tmp_path, "gates", options={"penalty": penalty, "learning_rate": 0.2}, **given)
            for penalty in (30.0, 0.0)
        )
        assert all(s.value > 0.7 for s in free.scores if s.layer != DEAD)
        assert free.scores[DEAD].value == pytest.approx(0.5, abs=0.01)
        assert sum(s.value for s in dear.scores) < 1.5 < sum(s.value for s in free.scores)
        assert dear.k == 1 and len(dear.order) == 1
        with pytest.raises(ValueError, match="at least k=1"):
            score(*dead_layer, tmp_path, "gates", k=0)


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
