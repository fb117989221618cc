"""The stages: what trains, what does not, against losses computed by hand; scores that are what they say."""

import copy
import weakref

import datasets
import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from teachers import tiny_teacher, tokens
from transformers import TrainerCallback

import hf_hybrid as hh
from hf_hybrid.trainers.alignment import mixer_outputs
from hf_hybrid.trainers.losses import kl_per_token
from hf_hybrid.trainers.precision import AS_LOADED
from hf_hybrid.trainers.scoring.methods import steps_for


def rows(count, length=24, seed=0, **columns):
    return datasets.Dataset.from_dict({"input_ids": tokens(count, length, seed).tolist(), **columns})


def arguments(kind, folder, **changes):
    settings = {"output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "no"}
    return kind(**{**settings, "disable_tqdm": True, "learning_rate": 3e-3, "use_cpu": True, **changes})


class Saved:
    """A tensor that autograd keeps for a backward pass."""

    def __init__(self, tensor):
        self.tensor = tensor


class TestAlignment:
    def test_trains_the_mixers_and_nothing_else(self, tmp_path):
        teacher = tiny_teacher()
        student = hh.convert(teacher, [2])
        before = {name: p.detach().clone() for name, p in student.named_parameters()}
        trainer = hh.AlignmentTrainer(
            model=student, teacher=teacher, args=arguments(hh.AlignmentConfig, tmp_path), train_dataset=rows(16)
        )
        trainer.train()
        for name, parameter in student.named_parameters():
            linear = ".self_attn." in name and ".layers.2." not in name
            assert torch.equal(before[name], parameter) != linear, name
        assert all(p.requires_grad for p in student.parameters())  # and all is trainable again

    def test_loss_is_the_distance_of_attention_outputs(self, tmp_path):
        teacher = tiny_teacher()
        student, ids = hh.convert(teacher, []), tokens(3, 24)
        trainer = hh.AlignmentTrainer(model=student, teacher=teacher, args=arguments(hh.AlignmentConfig, tmp_path))
        with torch.no_grad():
            got = trainer.compute_loss(student, {"input_ids": ids}).item()
            calls = {}
            for i, layer in enumerate(teacher.base_model.layers):
                layer.self_attn.register_forward_hook(
                    lambda m, args, kwargs, out, i=i: calls.update({i: (kwargs, out[0])}), with_kwargs=True
                )
            teacher(ids)
            distances = []
            for i, (given, wanted) in calls.items():
                mixer = student.base_model.layers[i].self_attn
                output, _ = mixer(given["hidden_states"], position_embeddings=given["position_embeddings"])
                distances.append(((wanted - output).square().sum(-1).sqrt() / 64**0.5).mean().item())
        assert got == pytest.approx(sum(distances) / 4, rel=1e-5)

    def test_lowers_the_loss(self, tmp_path):
        teacher, data = tiny_teacher(), rows(16)
        args = arguments(hh.AlignmentConfig, tmp_path, max_steps=25)
        trainer = hh.AlignmentTrainer(
            model=hh.convert(teacher, []), teacher=teacher, args=args, train_dataset=data, eval_dataset=data
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < 0.95 * before

    def test_packed_documents_are_kept_apart(self, tmp_path):
        teacher = tiny_teacher()
        student, ids = hh.convert(teacher, []), tokens(1, 24)
        trainer = hh.AlignmentTrainer(model=student, teacher=teacher, args=arguments(hh.AlignmentConfig, tmp_path))
        positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
        with torch.no_grad():
            packed = trainer.compute_loss(student, {"input_ids": ids, "position_ids": positions}).item()
            alone = [trainer.compute_loss(student, {"input_ids": x}).item() for x in ids.split([10, 14], dim=1)]
        assert packed == pytest.approx((10 * alone[0] + 14 * alone[1]) / 24, rel=1e-5)

    def test_checkpointing_recomputes_each_mixer_and_changes_nothing(self, tmp_path):
        teacher, data, results = tiny_teacher(), rows(16), []
        for checkpointing in (False, True):
            torch.manual_seed(0)
            student, calls = hh.convert(teacher, [2]), []
            student.base_model.layers[0].self_attn.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
            args = arguments(hh.AlignmentConfig, tmp_path, max_steps=3, gradient_checkpointing=checkpointing)
            hh.AlignmentTrainer(model=student, teacher=teacher, args=args, train_dataset=data).train()
            assert len(calls) == (6 if checkpointing else 3)
            results.append(student.state_dict())
        assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])

    @pytest.mark.parametrize("mask", [False, True])
    def test_a_backward_pass_for_each_layer_gives_the_same_gradients(self, tmp_path, mask):
        """And holds the activations of one mixer: they are gone before the next mixer runs."""
        teacher, ids = tiny_teacher("qwen2"), tokens(3, 24)
        inputs = {"input_ids": ids} | (
            {"attention_mask": (torch.arange(24) < 20).long().expand(3, -1)} if mask else {}
        )
        found = {}
        for layerwise in (False, True):
            torch.manual_seed(0)
            student = hh.convert(teacher, [2])
            args = arguments(hh.AlignmentConfig, tmp_path, layerwise_backward=layerwise)
            trainer = hh.AlignmentTrainer(model=student, teacher=teacher, args=args)
            saved, held = [], []

            def keep(tensor, saved=saved):
                kept = Saved(tensor)
                saved.append(weakref.ref(kept))
                return kept

            for i in student.linear_attention_layers:
                student.base_model.layers[i].self_attn.register_forward_pre_hook(
                    lambda *_, saved=saved, held=held: held.append(sum(ref() is not None for ref in saved))
                )
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
                loss = trainer.compute_loss(student, inputs)
            found[layerwise] = loss.item(), held
            (0.5 * loss).backward()
            found[layerwise] += ({name: p.grad for name, p in student.named_parameters()},)
        assert found[True][0] == pytest.approx(found[False][0], rel=1e-6)
        assert found[True][1] == [0, 0, 0] and 0 < found[False][1][1] < found[False][1][2]
        for name, gradient in found[False][2].items():
            if gradient is None or ".self_attn." not in name or ".layers.2." in name:
                continue
            torch.testing.assert_close(found[True][2][name], gradient, rtol=1e-5, atol=1e-8)

    def test_what_the_teacher_said_of_a_layer_is_let_go_of_when_the_next_one_is_asked_for(self):
        teacher, seen = tiny_teacher("qwen2"), []
        student = hh.convert(teacher, [2])
        for _, wanted, _, _ in mixer_outputs(student, teacher, {"input_ids": tokens(3, 24)}, AS_LOADED):
            assert all(ref() is None for ref in seen)
            seen.append(weakref.ref(wanted))
        assert len(seen) == 3

    def test_one_backbone_serves_both_while_it_trains(self, tmp_path):
        """Frozen weights are the teacher's own tensors, whatever the student's dtype, and the student's afterwards."""
        teacher = tiny_teacher("qwen2", torch.bfloat16)
        student = hh.convert(teacher, [1]).float()
        student.base_model.layers[3].mlp.up_proj.weight.data += 1  # not the teacher's any more
        before = copy.deepcopy(student.state_dict())
        seen = []

        class Look(TrainerCallback):
            def on_step_begin(self, *args, **kwargs):
                theirs = {name: p.data_ptr() for name, p in teacher.named_parameters()}
                seen.append({name for name, p in student.named_parameters() if p.data_ptr() == theirs.get(name)})

        args = arguments(hh.AlignmentConfig, tmp_path, max_steps=2, bf16=True)
        trainer = hh.AlignmentTrainer(
            model=student, teacher=teacher, args=args, train_dataset=rows(16), callbacks=[Look()]
        )
        trainer.train()
        frozen = {n for n, _ in student.named_parameters() if ".self_attn." not in n or ".layers.1." in n}
        assert seen[0] == seen[1] == frozen - {"model.layers.3.mlp.up_proj.weight"}
        theirs = {parameter.data_ptr() for parameter in teacher.parameters()}
        assert all(p.data_ptr() not in theirs and p.dtype == torch.float32 for p in student.parameters())
        assert all(torch.equal(before[name], student.state_dict()[name]) for name in frozen)

    def test_a_backward_pass_for_each_layer_is_refused_where_it_would_be_another(self, tmp_path, monkeypatch):
        teacher = tiny_teacher()
        monkeypatch.setattr("hf_hybrid.trainers.alignment.uses_fsdp2", lambda accelerator: True)
        args = arguments(hh.AlignmentConfig, tmp_path, layerwise_backward=True)
        with pytest.raises(ValueError, match="layerwise_backward is on, and does not go with FSDP2"):
            hh.AlignmentTrainer(model=hh.convert(teacher, []), teacher=teacher, args=args)

    def test_nothing_to_align(self, tmp_path):
        teacher = tiny_teacher()
        with pytest.raises(ValueError, match="nothing to align"):
            hh.AlignmentTrainer(
                model=hh.convert(teacher, range(4)), teacher=teacher, args=arguments(hh.AlignmentConfig, tmp_path)
            )


class TestDistillation:
    def test_loss_is_the_kl(self, tmp_path):
        teacher = tiny_teacher()
        student, ids = hh.convert(teacher, [1]), tokens(3, 24)
        mask = torch.ones_like(ids)
        mask[1, 15:] = 0
        trainer = hh.DistillationTrainer(
            model=student, teacher=teacher, args=arguments(hh.DistillationConfig, tmp_path, chunk_tokens=5)
        )
        with torch.no_grad():
            got = trainer.compute_loss(student, {"input_ids": ids, "attention_mask": mask}).item()
            ours, theirs = (m(ids, attention_mask=mask).logits for m in (student, teacher))
        wanted = kl_per_token(theirs, ours)[mask.bool()].mean().item()
        assert got == pytest.approx(wanted, rel=1e-4)

    def test_two_learning_rates_and_no_decay_of_vectors(self, tmp_path):
        teacher = tiny_teacher()
        student = hh.convert(teacher, [1])
        args = arguments(
            hh.DistillationConfig, tmp_path, learning_rate=1e-5, mixer_learning_rate=1e-3, weight_decay=0.1
        )
        trainer = hh.DistillationTrainer(model=student, teacher=teacher, args=args, train_dataset=rows(8))
        settings = {id(p): g for g in trainer.create_optimizer().param_groups for p in g["params"]}
        assert len(settings) == len(list(student.parameters()))
        for name, parameter in student.named_parameters():
            mixer = ".self_attn." in name and ".layers.1." not in name
            assert settings[id(parameter)]["lr"] == (1e-3 if mixer else 1e-5), name
            decayed = parameter.ndim > 1
            assert settings[id(parameter)]["weight_decay"] == (0.1 if decayed else 0.0), name

    def test_an_adapter_is_what_trains_and_is_saved(self, tmp_path):
        """The adapted hybrid's loss, two learning rates, checkpoints that resume exactly, an adapter at the end."""
        teacher, data = tiny_teacher(), rows(32)

        def adapted():
            torch.manual_seed(0)
            student = hh.convert(teacher, [1])
            return get_peft_model(student, hh.lora_config(student, mixers="gates", r=4))

        def trained(**options):
            args = arguments(
                hh.DistillationConfig, tmp_path, save_strategy="steps", save_steps=2, mixer_learning_rate=3e-2
            )
            trainer = hh.DistillationTrainer(model=adapted(), teacher=teacher, args=args, train_dataset=data)
            trainer.train(**options)
            return trainer

        trainer = trained()
        start, student = dict(adapted().named_parameters()), trainer.model
        for name, parameter in student.named_parameters():
            assert parameter.requires_grad or torch.equal(parameter, start[name]), name
        rates = {id(p): group["initial_lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
        trainable = {name: p for name, p in student.named_parameters() if p.requires_grad}
        assert len(rates) == len(trainable) and not all(torch.equal(p, start[n]) for n, p in trainable.items())
        for name, parameter in trainable.items():
            assert rates[id(parameter)] == (3e-3 if ".layers.1." in name else 3e-2), name
        ids = tokens(3, 24, 1)
        with torch.no_grad():
            loss = trainer.compute_loss(student, {"input_ids": ids}).item()
            student.eval()
            wanted = kl_per_token(teacher(ids).logits, student(ids).logits).mean().item()
        assert loss == pytest.approx(wanted, rel=1e-4)
        resumed = trained(resume_from_checkpoint=str(tmp_path / "checkpoint-2")).model
        assert all(torch.equal(a, b) for a, b in zip(student.parameters(), resumed.parameters(), strict=True))
        trainer.save_model(str(tmp_path / "adapter"))
        saved = {path.name for path in (tmp_path / "adapter").iterdir()}
        assert "adapter_model.safetensors" in saved and "model.safetensors" not in saved
        torch.manual_seed(0)
        loaded = PeftModel.from_pretrained(hh.convert(teacher, [1]), tmp_path / "adapter").eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, student(ids).logits)

    def test_adapters_where_they_make_no_sense(self, tmp_path):
        teacher = tiny_teacher()
        student = hh.convert(teacher, [])
        prompted = get_peft_model(student, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        with pytest.raises(ValueError, match="has PROMPT_TUNING, which adds tokens"):
            hh.DistillationTrainer(
                model=prompted, teacher=teacher, args=arguments(hh.DistillationConfig, tmp_path), train_dataset=rows(4)
            )
        student = hh.convert(teacher, [])
        adapted = get_peft_model(student, hh.lora_config(student))
        with pytest.raises(ValueError, match="alignment and scores are of the mixers themselves"):
            hh.AlignmentTrainer(model=adapted, teacher=teacher, args=arguments(hh.AlignmentConfig, tmp_path))
        with pytest.raises(ValueError, match="alignment and scores are of the mixers themselves"):
            hh.score_layers(adapted, teacher, rows(8), rows(4), method="ga-s1")

    def test_lowers_the_kl_and_leaves_the_teacher_alone(self, tmp_path):
        teacher, data = tiny_teacher(), rows(16)
        frozen = copy.deepcopy(teacher.state_dict())
        student = hh.convert(teacher, [1])
        before = hh.held_out_kl(student, teacher, data).mean
        args = arguments(hh.DistillationConfig, tmp_path, max_steps=20, mixer_learning_rate=3e-3)
        hh.DistillationTrainer(model=student, teacher=teacher, args=args, train_dataset=data).train()
        assert hh.held_out_kl(student, teacher, data).mean < 0.9 * before
        assert all(torch.equal(frozen[name], tensor) for name, tensor in teacher.state_dict().items())

    def test_accumulation_is_a_larger_batch(self, tmp_path):
        teacher, results = tiny_teacher(), []
        for batch, accumulation in ((8, 1), (4, 2)):
            torch.manual_seed(0)
            student = hh.convert(teacher, [1])
            args = arguments(
                hh.DistillationConfig,
                tmp_path,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
                optim="sgd",
                mixer_learning_rate=3e-3,
            )
            hh.DistillationTrainer(model=student, teacher=teacher, args=args, train_dataset=rows(32)).train()
            results.append(student.state_dict())
        for name, tensor in results[0].items():
            torch.testing.assert_close(tensor, results[1][name], rtol=1e-4, atol=1e-6, msg=name)

    def test_accumulation_over_padded_rows_is_a_larger_batch(self, tmp_path):
        """Every token counts the same, in whichever micro-batch it is, also where one has none."""
        teacher, lengths = tiny_teacher(), (24, 3, 0, 17)
        mask = [[int(i < length) for i in range(24)] for length in lengths] * 4
        data, losses = rows(16, attention_mask=mask), {}
        hh.write_teacher_topk(teacher, data, tmp_path / "topk", 99)
        kinds = {
            "align": (hh.AlignmentTrainer, hh.AlignmentConfig, {}),
            "distil": (hh.DistillationTrainer, hh.DistillationConfig, {}),
            "topk": (hh.DistillationTrainer, hh.DistillationConfig, {"teacher_topk": str(tmp_path / "topk")}),
        }
        for name, (trainer_class, config_class, options) in kinds.items():
            for batch, accumulation in ((4, 1), (1, 4), (2, 2)):
                torch.manual_seed(0)
                student = hh.convert(teacher, [1])
                settings = {"gradient_accumulation_steps": accumulation, "optim": "sgd", "logging_steps": 1, **options}
                args = arguments(config_class, tmp_path, per_device_train_batch_size=batch, **settings)
                trainer = trainer_class(model=student, teacher=teacher, args=args, train_dataset=data)
                trainer.train()
                losses[name, batch] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            assert losses[name, 1] == pytest.approx(losses[name, 4], rel=1e-5)
            assert losses[name, 2] == pytest.approx(losses[name, 4], rel=1e-5)
        assert losses["topk", 1] == pytest.approx(losses["distil", 4], rel=1e-4)

    def test_checkpoints_hold_the_student_only_and_resume_exactly(self, tmp_path):
        teacher, data = tiny_teacher(), rows(32)

        def train(folder, **options):
            torch.manual_seed(0)
            student = hh.convert(teacher, [1])
            args = arguments(
                hh.DistillationConfig,
                folder,
                max_steps=6,
                save_strategy="steps",
                save_steps=3,
                mixer_learning_rate=1e-3,
            )
            trainer = hh.DistillationTrainer(model=student, teacher=teacher, args=args, train_dataset=data)
            trainer.train(**options)
            return student.state_dict()

        whole = train(tmp_path / "run")
        resumed = train(tmp_path / "run", resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        from safetensors.torch import load_file

        assert set(load_file(tmp_path / "run" / "checkpoint-3" / "model.safetensors")) <= set(whole)

    def test_other_teacher(self, tmp_path):
        args = arguments(hh.DistillationConfig, tmp_path)
        student = hh.convert(tiny_teacher(), [1])
        with pytest.raises(ValueError, match="vocab_size=99, the teacher 120"):
            hh.DistillationTrainer(model=student, teacher=tiny_teacher(vocab_size=120), args=args)
        with pytest.raises(ValueError, match="not a hybrid"):
            hh.DistillationTrainer(model=tiny_teacher(), teacher=tiny_teacher(), args=args)

    def test_untokenised_data(self, tmp_path):
        teacher = tiny_teacher()
        trainer = hh.DistillationTrainer(
            model=hh.convert(teacher, [1]), teacher=teacher, args=arguments(hh.DistillationConfig, tmp_path)
        )
        with pytest.raises(ValueError, match="needs input_ids"):
            trainer.compute_loss(trainer.model, {"text": ["hello"]})


class TestScores:
    @pytest.fixture
    def setting(self, tmp_path):
        teacher = tiny_teacher()
        student = hh.convert(teacher, [])
        args = arguments(hh.DistillationConfig, tmp_path, mixer_learning_rate=3e-3)
        return student, teacher, rows(16), rows(6, seed=9), args

    def test_a_score_is_a_run_of_its_own(self, setting, tmp_path):
        """Layer 2's score equals converting by hand, distilling on the same batches and measuring."""
        student, teacher, train, held_out, args = setting
        aligned = copy.deepcopy(student.state_dict())
        scores = hh.score_layers(student, teacher, train, held_out, args=args, tokens_per_layer=2 * 4 * 24)
        twin = hh.convert(teacher, [])
        twin.load_state_dict(aligned)
        twin.set_full_attention_layers([2], teacher)
        by_hand = arguments(hh.DistillationConfig, tmp_path, max_steps=2, mixer_learning_rate=3e-3)
        hh.DistillationTrainer(model=twin, teacher=teacher, args=by_hand, train_dataset=train).train()
        assert scores.scores[2].kl == pytest.approx(hh.held_out_kl(twin, teacher, held_out).mean, rel=1e-6)
        assert scores.scores[2].tokens == 2 * 4 * 24

    def test_save_load_and_print(self, setting, tmp_path):
        student, teacher, train, held_out, args = setting
        scores = hh.score_layers(student, teacher, train, held_out, args=args, tokens_per_layer=1)
        scores.save(tmp_path / "scores.json")
        assert hh.LayerScores.load(tmp_path / "scores.json") == scores
        assert scores.top(4) == [0, 1, 2, 3]
        assert scores.top(1) == [min(scores.scores, key=lambda s: s.kl).layer]
        for score in scores.scores:
            assert f"{score.kl:.4f}" in str(scores)
            spread = (
                torch.tensor(score.per_sequence, dtype=torch.float64).std().item() / len(score.per_sequence) ** 0.5
            )
            assert score.sem == pytest.approx(spread, rel=1e-9)
        with pytest.raises(ValueError, match="k=5 layers"):
            scores.top(5)

    def test_steps_cover_the_tokens(self, setting):
        *_, train, _, args = setting
        assert [steps_for(n, train, args) for n in (1, 96, 97, 960)] == [1, 1, 2, 10]

    def test_bad_input(self, setting):
        student, teacher, train, held_out, args = setting
        with pytest.raises(ValueError, match="outside 0..3"):
            hh.score_layers(student, teacher, train, held_out, args=args, layers=[4])
        with pytest.raises(ValueError, match=r"choose one of \['ga-s2'"):
            hh.score_layers(student, teacher, train, held_out, args=args, method="ga")
        with pytest.raises(ValueError, match="evaluation dataset is empty"):
            hh.score_layers(student, teacher, train, held_out.select([]), args=args)
        student.set_full_attention_layers([1], teacher)
        with pytest.raises(ValueError, match="linear everywhere"):
            hh.score_layers(student, teacher, train, held_out, args=args)
