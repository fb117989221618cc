"""
One policy of precision: every stage and every scoring method, from teachers of either dtype, with and without
autocast, with every mixer; and what trains is never in half precision.
"""

import contextlib
import copy
import itertools
import json

import pytest
import torch
from runs import tiny_recipe
from safetensors import safe_open
from scored import EVERY, LAYERS, arguments, rows, score, weak_student
from teachers import tiny_teacher, tokens

import hf_hybrid as hh
from hf_hybrid.evaluation import evaluate_model
from hf_hybrid.modeling import MIXERS
from hf_hybrid.modeling.modeling_hybrid import decoder_layers
from hf_hybrid.run.recipe import Recipe
from hf_hybrid.run.runner import run_recipe
from hf_hybrid.trainers import HybridTrainer, HybridTrainingArguments
from hf_hybrid.trainers.precision import AS_LOADED, Precision
from hf_hybrid.trainers.scoring.methods import METHODS


BF16 = Precision(torch.bfloat16)
TEACHERS = {"fp32": torch.float32, "bf16": torch.bfloat16}
POLICIES = {"weights": AS_LOADED, "autocast": BF16}
CELLS = [pytest.param(t, p, id=f"{n}-{m}") for (n, t), (m, p) in itertools.product(TEACHERS.items(), POLICIES.items())]


def pair_of(teacher_dtype, mixer="gated_deltanet", **changes):
    """A teacher, and the student as a run makes it: all linear, with fp32 weights."""
    teacher = tiny_teacher("qwen3", teacher_dtype, **changes)
    options = {"window": 4} if mixer == "sliding_window" else {}
    return teacher, weak_student(teacher, mixer=mixer, mixer_options=options).float()


def settings_of(policy):
    return {"bf16": policy == BF16}


@contextlib.contextmanager
def recorded(*models):
    """Which autocast was on, by dtype or None, wherever a decoder layer or a mixer of `models` ran."""
    seen = set()

    def look(*_):
        enabled = torch.is_autocast_enabled("cpu")
        seen.add(torch.get_autocast_dtype("cpu") if enabled else None)

    modules = [part for model in models for layer in decoder_layers(model) for part in (layer, layer.self_attn)]
    handles = [module.register_forward_pre_hook(look) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def surrounded(policy):
    """Amid the other precision than `policy`: what it owns, it owns whatever is around it."""
    with torch.autocast("cpu", torch.bfloat16, enabled=policy == AS_LOADED):
        yield


@pytest.mark.parametrize(("teacher_dtype", "policy"), CELLS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_stage(mixer, teacher_dtype, policy, tmp_path):
    teacher, student = pair_of(teacher_dtype, mixer, num_hidden_layers=2)
    data, settings = rows(4), settings_of(policy) | {"max_steps": 1, "save_strategy": "no", "use_cpu": True}
    settings |= {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1}
    trained = {"model": student, "teacher": teacher, "train_dataset": data}
    with recorded(teacher, student) as seen, surrounded(policy):
        aligned = hh.AlignmentTrainer(args=hh.AlignmentConfig(str(tmp_path), **settings), **trained)
        topk = hh.write_teacher_topk(teacher, data, tmp_path / "topk", 5, precision=policy)
        student.set_full_attention_layers([1], teacher)
        distilled = hh.DistillationTrainer(args=hh.DistillationConfig(str(tmp_path), **settings), **trained)
        args = hh.DistillationConfig(str(tmp_path), teacher_topk=str(topk), **settings)
        from_topk = hh.DistillationTrainer(args=args, **trained | {"teacher": None})
        for trainer in (aligned, distilled, from_topk):
            before = copy.deepcopy(student.state_dict())
            trainer.train()
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            assert len(losses) == 1 and all(0 < loss < 20 for loss in losses), trainer
            assert {p.dtype for p in student.parameters()} == {torch.float32}
            moved = [not torch.equal(before[name], x) for name, x in student.state_dict().items()]
            assert all(moved) if trainer is not aligned else any(moved)
    assert seen == {policy.autocast}
    # The library's own Trainer enters the same autocast.
    with recorded(student) as seen:
        labelled = data.add_column("labels", data["input_ids"])
        args = HybridTrainingArguments(str(tmp_path), **settings)
        HybridTrainer(model=student, args=args, train_dataset=labelled).train()
    assert seen == {policy.autocast}
    # A finished model runs as it is loaded: in the teacher's dtype, without autocast.
    finished = student.to(teacher_dtype)
    with recorded(teacher, finished) as seen, surrounded(AS_LOADED):
        found = evaluate_model(finished, teacher, rows=rows(6, 9), batch_size=3)
    assert 0 < found.kl < 20 and found.perplexity > 1 and seen == {None}


def check_scores(method, teacher_dtype, policy, tmp_path, mixer="gated_deltanet"):
    teacher, student = pair_of(teacher_dtype, mixer)
    start = copy.deepcopy(student.state_dict())
    args = arguments(tmp_path, **settings_of(policy))
    layers = [0, 2] if method in ("ga-s2", "gr-s2", "avg-s2") else None  # each trains for itself
    with recorded(teacher, student) as seen, surrounded(policy):
        scores = score(teacher, student, tmp_path, method, args=args, layers=layers)
    assert len(scores.scores) == len(layers or range(LAYERS)) and all(abs(s.value) < 100 for s in scores.scores)
    assert seen == {policy.autocast}
    theirs = "bfloat16" if teacher_dtype == torch.bfloat16 else "float32"
    names = f"teacher {theirs}" if not EVERY[method].needs_student else f"teacher {theirs}, student float32"
    assert scores.precision == f"{policy} ({names})"
    assert all(torch.equal(start[name], x) for name, x in student.state_dict().items())


@pytest.mark.parametrize("method", EVERY)
def test_every_scoring_method_as_the_shipped_recipes_train(method, tmp_path):
    """A bf16 teacher and a student that trains in fp32 under autocast."""
    check_scores(method, torch.bfloat16, BF16, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.needs_student])
class TestScores:
    @pytest.mark.parametrize(("teacher_dtype", "policy"), CELLS[:-1])  # the last is above
    def test_in_every_precision(self, method, teacher_dtype, policy, tmp_path):
        check_scores(method, teacher_dtype, policy, tmp_path)

    @pytest.mark.parametrize("mixer", [mixer for mixer in MIXERS if mixer != "gated_deltanet"])
    def test_with_every_mixer(self, method, mixer, tmp_path):
        check_scores(method, torch.bfloat16, BF16, tmp_path, mixer)


@pytest.mark.parametrize(
    ("teacher_dtype", "policy", "floor"),
    [
        (torch.float32, AS_LOADED, 0.0),
        (torch.float32, BF16, 0.0),
        (torch.bfloat16, AS_LOADED, 1e-3),
        (torch.bfloat16, BF16, 1e-3),
    ],
)
def test_an_unchanged_model_measures_0_or_what_rounding_leaves(teacher_dtype, policy, floor):
    """In fp32 the student's stream of hidden states is not rounded after every layer, as a bf16 teacher's is."""
    teacher = tiny_teacher("qwen3", teacher_dtype)
    student = hh.convert(teacher, range(LAYERS)).float()
    kl = hh.held_out_kl(student, teacher, rows(6, 9), precision=policy).mean
    assert 0 <= kl <= floor


def test_measuring_gives_the_loss_that_training_would(tmp_path):
    """One batch, all of it: what a held-out KL is, to the last bit, in the precision of the training."""
    teacher, student = pair_of(torch.bfloat16)
    args = arguments(tmp_path, bf16=True)
    trainer = hh.DistillationTrainer(student, teacher, args, train_dataset=rows(4))
    with torch.no_grad():
        loss = trainer.compute_loss(student, {"input_ids": torch.tensor(rows(4)["input_ids"])}).item()
    found = {p: hh.held_out_kl(student, teacher, rows(4), precision=p).mean for p in (BF16, AS_LOADED)}
    assert found[BF16] == pytest.approx(loss, rel=1e-6)
    assert found[AS_LOADED] != pytest.approx(loss, rel=1e-6)


def test_scores_of_two_precisions_are_not_mixed(tmp_path):
    teacher, student = pair_of(torch.float32)
    kept = {"output_dir": tmp_path / "scores", "layers": [0]}
    score(teacher, student, tmp_path, "zero-shot", **kept)
    args = arguments(tmp_path, bf16=True)
    settings = tmp_path / "scores" / "settings.json"
    with pytest.raises(ValueError, match="bf16=False, this call has True"):
        score(teacher, student, tmp_path, "zero-shot", args=args, **kept)
    # Of a version that measured without autocast whatever it trained in, and did not write that down.
    there = json.loads(settings.read_text())
    settings.write_text(json.dumps({name: x for name, x in there.items() if name != "precision"} | {"bf16": True}))
    with pytest.raises(ValueError, match=r"precision=that of the weights, this call has bfloat16 autocast"):
        score(teacher, student, tmp_path, "zero-shot", args=args, **kept)


def test_the_top_k_of_two_precisions_is_not_mixed(tmp_path):
    teacher = tiny_teacher("qwen3", torch.bfloat16)
    hh.write_teacher_topk(teacher, rows(4), tmp_path / "topk", 5)
    with pytest.raises(ValueError, match="begun with precision=that of the weights, this call has bfloat16 autocast"):
        hh.write_teacher_topk(teacher, rows(4), tmp_path / "topk", 5, precision=BF16)


class TestPolicy:
    def test_it_is_what_the_trainer_trains_in(self, tmp_path, monkeypatch):
        def of(**changes):
            return Precision.of(arguments(tmp_path, **changes))

        assert of() == AS_LOADED and of(bf16=True) == BF16
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # accelerate launch --mixed_precision bf16
        assert of() == BF16
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
        with pytest.raises(ValueError, match="mixed precision 'fp8' is not supported"):
            of()

    def test_entered_inside_itself_it_changes_nothing(self):
        weight, x = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4)
        with BF16.running(x.device), BF16.running(x.device):
            assert (x @ weight).dtype == torch.bfloat16
            with AS_LOADED.running(x.device):
                assert (x @ weight).dtype == torch.float32
            assert (x @ weight).dtype == torch.bfloat16
        assert (x @ weight).dtype == torch.float32


class TestWhatTrains:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("kind", ["align", "distil", "finetune"])
    def test_half_precision_is_refused(self, kind, dtype, tmp_path):
        teacher = tiny_teacher("qwen3", dtype)
        student, name = hh.convert(teacher, [1]), str(dtype).removeprefix("torch.")
        with pytest.raises(ValueError, match=rf"train are in {name}, such as model\..*model.float\(\), and bf16=True"):
            if kind == "align":
                hh.AlignmentTrainer(student, teacher, hh.AlignmentConfig(str(tmp_path), use_cpu=True))
            elif kind == "distil":
                hh.DistillationTrainer(student, teacher, arguments(tmp_path))
            else:
                HybridTrainer(student, HybridTrainingArguments(str(tmp_path), use_cpu=True))

    def test_a_small_rate_moves_every_weight(self, tmp_path):
        """At the paper's 7e-6 AdamW in bf16 moves 2% of them; here all that have a gradient move."""
        teacher, student = pair_of(torch.bfloat16)
        before = copy.deepcopy(student.state_dict())
        args = arguments(tmp_path, learning_rate=7e-6, mixer_learning_rate=7e-6, bf16=True)
        hh.DistillationTrainer(student, teacher, args, train_dataset=rows(16)).train()
        name = "model.layers.1.mlp.up_proj.weight"
        moved = student.state_dict()[name] != before[name]
        lost = student.state_dict()[name].bfloat16() == before[name].bfloat16()
        assert moved.float().mean() > 0.9 and lost.float().mean() > 0.9

    def test_an_adapter_in_fp32_on_weights_in_bf16_trains(self, tmp_path):
        from peft import get_peft_model

        teacher = tiny_teacher("qwen3", torch.bfloat16)
        student = hh.convert(teacher, [1])
        adapted = get_peft_model(student, hh.lora_config(student))
        assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
        for bf16 in (False, True):
            args = arguments(tmp_path, bf16=bf16)
            hh.DistillationTrainer(adapted, teacher, args, train_dataset=rows(16)).train()
        adapted.bfloat16()
        with pytest.raises(ValueError, match=r"train are in bfloat16, such as .*lora_A"):
            hh.DistillationTrainer(adapted, teacher, arguments(tmp_path), train_dataset=rows(16))

    def test_a_fp32_student_aligns_on_a_bf16_teacher_without_autocast(self, tmp_path):
        """The mixers get the teacher's hidden states in their own dtype, and lose nothing by it."""
        teacher, student = pair_of(torch.bfloat16)
        args = hh.AlignmentConfig(str(tmp_path), use_cpu=True)
        trainer = hh.AlignmentTrainer(student, teacher, args)
        found = trainer.layer_losses(student, {"input_ids": tokens(2, 20)})
        wide = hh.AlignmentTrainer(student, copy.deepcopy(teacher).float(), args)
        expected = wide.layer_losses(student, {"input_ids": tokens(2, 20)})
        assert {loss.dtype for loss in found.values()} == {torch.float32}
        for layer, loss in found.items():
            assert loss.item() == pytest.approx(expected[layer].item(), rel=0.02)


@pytest.mark.parametrize("training", [{"bf16": True}, {}], ids=["autocast", "weights"])
def test_a_run_from_a_bf16_teacher(training, sources, tmp_path):
    """As the shipped recipes: the student trains in fp32 in every stage, and the finished model is in bf16."""
    stage = {"batch_size": 4, "learning_rate": 7e-6, "mixer_learning_rate": 1e-3, "tokens": 2 * 4 * 32}
    recipe = tiny_recipe(*sources, dtype="bfloat16", training={"use_cpu": True, **training})
    recipe["data"]["block_size"] = 32
    recipe |= {"align": stage, "distill": stage | {"teacher_topk": 20}, "finetune": stage}
    recipe["score"] = {"method": "verified", "tokens_per_layer": 4 * 32, "batch_size": 4}
    recipe["select"] = {"selector": "verified", "k": 1}
    result = run_recipe(Recipe.from_dict(recipe), tmp_path / "run")
    assert result.scores.precision == f"{BF16 if training else AS_LOADED} (teacher bfloat16, student float32)"
    stored = {}
    for name in ("aligned", "distilled", "finetuned", "model"):
        with safe_open(result.folder / name / "model.safetensors", "pt") as tensors:
            stored[name] = tensors.get_tensor("model.layers.1.mlp.up_proj.weight")
    assert [tensor.dtype for tensor in stored.values()] == [torch.float32] * 3 + [torch.bfloat16]
    # Trained at the paper's rate, by steps that bf16 would have lost.
    assert (stored["aligned"] != stored["distilled"]).float().mean() > 0.9
    assert (stored["distilled"] != stored["finetuned"]).float().mean() > 0.9
    assert (stored["aligned"].bfloat16() == stored["distilled"].bfloat16()).float().mean() > 0.9


@pytest.mark.parametrize("mixer", [mixer for mixer in MIXERS if mixer != "sliding_window"])
def test_a_mixer_casts_what_it_is_given_once(mixer):
    """All its projections of the hidden states share one tensor, which autocast would make anew for each."""
    module = decoder_layers(hh.convert(tiny_teacher(), [], mixer=mixer))[0].self_attn
    hidden = torch.randn(2, 5, module.hidden_size, requires_grad=True)
    rotary = torch.ones(1, 5, module.head_dim), torch.zeros(1, 5, module.head_dim)
    given = []
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(lambda layer, args: given.append(args[0]))
    with BF16.running(hidden.device):
        module(hidden, position_embeddings=rotary, attention_mask=None)[0].sum().backward()
    shared = [x for x in given if x is given[0]]
    assert given[0].dtype == torch.bfloat16 and len(shared) >= 5
    assert hidden.grad is not None and hidden.grad.dtype == torch.float32
    given.clear()
    wide = module.double()(hidden.detach().double(), position_embeddings=rotary, attention_mask=None)[0]
    assert wide.dtype == given[0].dtype == torch.float64
