"""The teacher's top k from disk: the loss against the full KL, and what training with it gives."""

import os
import signal
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from runs import PATIENCE, fork, results, run_and_die, save_teacher, save_texts, tiny_recipe
from safetensors.torch import load_file
from teachers import tiny_teacher, tokens

import hf_hybrid as hh
from hf_hybrid.run.recipe import Recipe
from hf_hybrid.run.runner import RunResult, run_recipe
from hf_hybrid.trainers.losses import chunked_topk_kl_per_token, kl_per_token, topk_kl_per_token, topk_of_logits


V = 99


def rows(count: int = 16, length: int = 24, seed: int = 0, **columns: Any) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"input_ids": tokens(count, length, seed).tolist(), **columns})


def padded_and_packed() -> datasets.Dataset:
    """Rows of one length with padding left, right and nowhere, and rows of two documents."""
    ids, mask = tokens(8, 24).tolist(), torch.ones(8, 24, dtype=torch.int64)
    mask[1, 17:], mask[2, :5], mask[6, 23:] = 0, 0, 0
    return datasets.Dataset.from_dict({"input_ids": ids, "attention_mask": mask.tolist()})


def packed() -> datasets.Dataset:
    positions = [[*range(cut), *range(24 - cut)] for cut in (10, 24, 1, 23, 5, 7, 24, 12)]
    return rows(8, position_ids=positions)


def arguments(folder: Path, **changes: Any) -> hh.DistillationConfig:
    settings = {"output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no"}
    settings |= {"disable_tqdm": True, "learning_rate": 3e-3, "use_cpu": True, "logging_steps": 1}
    return hh.DistillationConfig(**{**settings, **changes})


def losses(folder: Path, teacher: Any, data: Any, **changes: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    student = _student()
    trainer = hh.DistillationTrainer(
        model=student, teacher=teacher, args=arguments(folder, **changes), train_dataset=data
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], student.state_dict()


def _student() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return hh.convert(tiny_teacher(), [1])


class TestLoss:
    @pytest.mark.parametrize("k", [1, 7, V - 1, V])
    def test_against_a_sum_over_outcomes(self, k: int) -> None:
        teacher, student = torch.randn(11, V).double() * 3, torch.randn(11, V).double() * 3
        got = topk_kl_per_token(*topk_of_logits(teacher, k), student)
        p, q = teacher.softmax(-1), student.softmax(-1)
        for i in range(11):
            kept = p[i].argsort(descending=True)[:k].tolist()
            outcomes = [(p[i, j], q[i, j]) for j in kept]
            if k < V:
                others = [j for j in range(V) if j not in kept]
                outcomes.append((p[i, others].sum(), q[i, others].sum()))
            wanted = sum(a * (a / b).log() for a, b in outcomes)
            assert got[i].item() == pytest.approx(wanted.item(), abs=1e-12)

    def test_all_tokens_give_the_full_kl_and_its_gradient(self) -> None:
        teacher, student = torch.randn(65, V) * 3, (torch.randn(65, V) * 3).requires_grad_()
        full, found = kl_per_token(teacher, student), topk_kl_per_token(*topk_of_logits(teacher, V), student)
        torch.testing.assert_close(found, full, rtol=1e-6, atol=1e-6)
        wanted, got = (torch.autograd.grad(loss.mean(), student)[0] for loss in (full, found))
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)

    def test_fewer_tokens_give_a_lower_bound_that_rises(self) -> None:
        teacher, student = torch.randn(64, V).double() * 2, torch.randn(64, V).double() * 2
        full = kl_per_token(teacher, student)
        found = [topk_kl_per_token(*topk_of_logits(teacher, k), student) for k in (1, 2, 8, 32, 98, 99)]
        for fewer, more in zip(found, [*found[1:], full], strict=True):
            assert (fewer <= more + 1e-12).all()
        assert (found[0] < full).all() and (found[0] >= 0).all()

    def test_equal_models_score_zero(self) -> None:
        logits = torch.randn(5, V) * 10
        assert topk_kl_per_token(*topk_of_logits(logits, 8), logits).abs().max() < 1e-6

    def test_a_tail_that_fp32_cannot_add_to_one(self) -> None:
        """A mass of 1e-12 beside one of 1: 1 minus the sum would be 0."""
        logits = torch.zeros(1, V)
        logits[0, 3] = 32.0
        tail = topk_of_logits(logits, 1)[2]
        assert tail.item() == pytest.approx(torch.log(98 * torch.exp(torch.tensor(-32.0))).item(), abs=1e-4)

    @pytest.mark.parametrize("chunk_tokens", [1, 4, 63, 64, 65, None])
    def test_chunks_change_neither_value_nor_gradient(self, chunk_tokens: int | None) -> None:
        head, hidden = (torch.randn(*shape).double().requires_grad_() for shape in ((V, 8), (64, 8)))
        topk = topk_of_logits(torch.randn(64, V).double(), 9)
        whole = topk_kl_per_token(*topk, hidden @ head.T)
        pieces = chunked_topk_kl_per_token(topk, hidden, lambda h: h @ head.T, V, chunk_tokens)
        torch.testing.assert_close(pieces, whole)
        wanted, got = (torch.autograd.grad(loss.square().sum(), (hidden, head)) for loss in (whole, pieces))
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b)


class TestTraining:
    @pytest.mark.parametrize("data", [rows(), padded_and_packed(), packed()], ids=["plain", "padded", "packed"])
    def test_all_tokens_give_the_losses_and_weights_of_the_teacher(self, data: Any, tmp_path: Path) -> None:
        teacher = tiny_teacher()
        folder = hh.write_teacher_topk(teacher, data, tmp_path / "topk", V, batch_size=3, rows_per_shard=5)
        sgd = {"optim": "sgd", "mixer_learning_rate": 3e-3, "chunk_tokens": 17}
        wanted, weights = losses(tmp_path / "a", teacher, data, **sgd)
        found, ours = losses(tmp_path / "b", None, data, teacher_topk=str(folder), **sgd)
        assert len(found) == 2 and found == pytest.approx(wanted, rel=1e-5)
        for name, tensor in weights.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6, msg=name)

    def test_files_hold_what_the_teacher_said(self, tmp_path: Path) -> None:
        teacher, data = tiny_teacher(), padded_and_packed()
        for dtype in ("float32", "bfloat16"):
            hh.write_teacher_topk(teacher, data, tmp_path / dtype, 6, dtype=dtype, rows_per_shard=3, batch_size=2)
            parts = [load_file(path) for path in sorted((tmp_path / dtype).glob("*.safetensors"))]
            assert [len(part["offsets"]) - 1 for part in parts] == [3, 3, 2]
            found = {name: torch.cat([part[name] for part in parts]) for name in ("logprobs", "ids", "tail")}
            mask = torch.tensor(data["attention_mask"])
            with torch.no_grad():
                logits = teacher(torch.tensor(data["input_ids"]), attention_mask=mask).logits[mask.bool()]
            logprobs, ids, tail = topk_of_logits(logits, 6)
            assert found["ids"].dtype == torch.int32 and found["tail"].dtype == torch.float32
            assert found["logprobs"].dtype == getattr(torch, dtype) and torch.equal(found["ids"].long(), ids)
            close = 1e-4 if dtype == "float32" else 1e-2
            torch.testing.assert_close(found["logprobs"].float(), logprobs, rtol=close, atol=close)
            torch.testing.assert_close(found["tail"], tail, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(logprobs.exp().sum(-1) + tail.exp(), torch.ones(len(tail)))

    def test_few_tokens_teach_too(self, tmp_path: Path) -> None:
        teacher, data = tiny_teacher(), rows()
        folder = hh.write_teacher_topk(teacher, data, tmp_path / "topk", 8, dtype="bfloat16")
        trainer = hh.DistillationTrainer(
            model=(student := _student()),
            teacher=teacher,
            args=arguments(tmp_path, max_steps=10, mixer_learning_rate=3e-3, teacher_topk=str(folder)),
            train_dataset=data,
            eval_dataset=data,
        )
        before = trainer.evaluate()["eval_loss"]  # the full KL, with the teacher
        assert before == pytest.approx(hh.held_out_kl(student, teacher, data).mean, rel=1e-5)
        trainer.train()
        assert trainer.state.log_history[1]["loss"] < before and trainer.evaluate()["eval_loss"] < 0.95 * before

    def test_rows_of_many_lengths(self, tmp_path: Path) -> None:
        """Padded by the collator, after the files were made."""
        teacher, lengths = tiny_teacher(), [24, 24, 7, 12, 12, 1, 24, 9]
        data = datasets.Dataset.from_dict({"input_ids": [tokens(1, n, n)[0].tolist() for n in lengths]})
        folder = hh.write_teacher_topk(teacher, data, tmp_path / "topk", V, rows_per_shard=3)

        def pad(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            found = {name: torch.tensor([row[name] for row in batch]) for name in batch[0] if name != "input_ids"}
            ids = [torch.tensor(row["input_ids"]) for row in batch]
            pad_to = torch.nn.utils.rnn.pad_sequence
            found["attention_mask"] = pad_to([torch.ones_like(row) for row in ids], batch_first=True)
            return found | {"input_ids": pad_to(ids, batch_first=True)}

        step = {"optim": "sgd", "max_steps": 2}
        both = []
        for kind, given in ((None, teacher), (str(folder), None)):
            trainer = hh.DistillationTrainer(
                model=_student(),
                teacher=given,
                args=arguments(tmp_path / "run", teacher_topk=kind, **step),
                train_dataset=data,
                data_collator=pad,
            )
            trainer.train()
            both.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert both[1] == pytest.approx(both[0], rel=1e-5)


class TestFiles:
    def test_a_second_call_makes_what_is_missing_and_nothing_else(self, tmp_path: Path) -> None:
        teacher, data = tiny_teacher(), rows(10)
        for name in ("whole", "torn"):
            hh.write_teacher_topk(teacher, data, tmp_path / name, 4, rows_per_shard=3)
        lost = tmp_path / "torn" / "rows-00001.safetensors"
        os.replace(lost, lost.with_name(lost.name + ".partial"))
        kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "torn").glob("*.safetensors")}
        with pytest.raises(ValueError, match="lacks 1 of 4 files, such as rows-00001.safetensors"):
            losses(tmp_path / "run", None, data, teacher_topk=str(tmp_path / "torn"))
        said: list[tuple[int, int]] = []
        hh.write_teacher_topk(
            teacher, data, tmp_path / "torn", 4, rows_per_shard=3, progress=lambda *at: said.append(at)
        )
        assert said == [(3, 10), (6, 10), (9, 10), (10, 10)]
        assert len(kept) == 3 and all(path.stat().st_mtime_ns == then for path, then in kept.items())
        for path in sorted((tmp_path / "whole").iterdir()):
            assert path.read_bytes() == (tmp_path / "torn" / path.name).read_bytes()
        assert not list((tmp_path / "torn").glob("*.partial"))

    def test_what_belongs_to_something_else_is_refused(self, tmp_path: Path) -> None:
        teacher, data = tiny_teacher(), rows(80)
        folder = hh.write_teacher_topk(teacher, data, tmp_path / "topk", 4, rows_per_shard=50)
        other = tiny_teacher()
        other.base_model.layers[0].mlp.up_proj.weight.data += 1
        for changed, message in (
            ({"k": 5}, "begun with k=4, this call has 5"),
            ({"teacher": other}, "begun with teacher="),
            ({"dataset": rows(79)}, "begun with rows=80, this call has 79"),
        ):
            given = {"teacher": teacher, "dataset": data, "folder": folder, "k": 4, "rows_per_shard": 50} | changed
            with pytest.raises(ValueError, match=message):
                hh.write_teacher_topk(**given)
        use = {"teacher_topk": str(folder)}
        for wrong, message in (
            (rows(79), "made of a dataset of 80 rows, train_dataset has 79"),
            (rows(80, seed=1), "other tokens than train_dataset's, or in another order"),
            (data.shuffle(seed=0), "other tokens than train_dataset's, or in another order"),
            (data.to_iterable_dataset(), "has no length"),
            (None, "has no length"),
        ):
            with pytest.raises(ValueError, match=message):
                losses(tmp_path / "run", None, wrong, **use)
        ids = tokens(80 * 2, 24).tolist()
        many = datasets.Dataset.from_dict({"input_ids": ids})
        whole = hh.write_teacher_topk(teacher, many, tmp_path / "many", 4, batch_size=80)
        ids[77][3] = 5 if ids[77][3] != 5 else 6  # a row that is in no sample
        changed_one = datasets.Dataset.from_dict({"input_ids": ids})
        args = arguments(tmp_path / "run", teacher_topk=str(whole))
        trainer = hh.DistillationTrainer(model=_student(), teacher=None, args=args, train_dataset=changed_one)
        assert len(trainer.train_dataset) == 160 and trainer.train_dataset[76]["teacher_row"] == 76
        with pytest.raises(ValueError, match="row 77 of train_dataset has other tokens"):
            trainer.train_dataset[77]
        with pytest.raises(ValueError, match="vocabulary of 99, the student has 300"):
            hh.DistillationTrainer(
                model=hh.convert(tiny_teacher(vocab_size=300), [1]),
                teacher=None,
                args=arguments(tmp_path, **use),
                train_dataset=data,
            )

    def test_mistakes(self, tmp_path: Path) -> None:
        teacher, data = tiny_teacher(), rows(4)
        for changes, message in (
            ({"k": 0}, "k=0 tokens cannot be kept of a vocabulary of 99"),
            ({"k": 100}, "k=100 tokens"),
            ({"dtype": "float16"}, "dtype='float16' is unknown"),
            ({"dataset": data.select([])}, "the dataset is empty"),
        ):
            given = {"teacher": teacher, "dataset": data, "folder": tmp_path / "topk", "k": 4} | changes
            with pytest.raises(ValueError, match=message):
                hh.write_teacher_topk(**given)
        with pytest.raises(ValueError, match="has no teacher_topk.json; make it with hf_hybrid.write_teacher_topk"):
            losses(tmp_path, None, data, teacher_topk=str(tmp_path))
        with pytest.raises(ValueError, match="teacher is None; pass args.teacher_topk"):
            losses(tmp_path, None, data)
        folder = hh.write_teacher_topk(teacher, data, tmp_path / "topk", 4)
        with pytest.raises(ValueError, match="eval_dataset is measured with it"):
            hh.DistillationTrainer(
                model=_student(),
                teacher=None,
                args=arguments(tmp_path, teacher_topk=str(folder)),
                train_dataset=data,
                eval_dataset=data,
            )
        (folder / "rows-00000.safetensors").write_bytes(b"torn")
        with pytest.raises(ValueError, match="rows-00000.safetensors is damaged .* delete it"):
            losses(tmp_path, None, data, teacher_topk=str(folder))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe without scores, whose distillation goes through the top k."""
    folder = tmp_path_factory.mktemp("sources")
    recipe = tiny_recipe(save_teacher(folder / "teacher"), save_texts(folder / "texts"))
    del recipe["score"], recipe["finetune"]
    recipe["select"] = {"selector": "uniform", "k": 2}
    recipe["training"]["logging_steps"] = 1
    recipe["distill"] |= {"teacher_topk": 300}
    return recipe


@pytest.fixture(scope="module")
def run(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run_recipe(Recipe.from_dict(recipe), tmp_path_factory.mktemp("runs") / "run")


@pytest.mark.slow
class TestRun:
    def test_all_tokens_give_the_teachers_run(self, recipe: dict[str, Any], run: RunResult, tmp_path: Path) -> None:
        plain = recipe | {"distill": recipe["distill"] | {"teacher_topk": None}}
        wanted = run_recipe(Recipe.from_dict(plain), tmp_path / "run")
        ours, theirs = (results(result.folder)["distilled/trainer_state.json"] for result in (run, wanted))
        assert len(ours) == 8 and [row[1] for row in ours] == pytest.approx([row[1] for row in theirs], rel=1e-3)
        assert not list(run.folder.glob("*_checkpoints"))

    def test_a_killed_run_goes_on(self, recipe: dict[str, Any], run: RunResult, tmp_path: Path) -> None:
        for where, name in (
            ("before", "teacher_topk.json"),
            ("before", "rows-00000.safetensors"),
            ("after", "rows-00000.safetensors"),
            ("checkpoint", "distill"),
        ):
            process = fork(run_and_die, recipe, str(tmp_path / "run"), where, name)
            process.join(PATIENCE)
            assert process.exitcode == -signal.SIGKILL, f"was not killed {where} {name}"
        result = run_recipe(Recipe.from_dict(recipe), tmp_path / "run")
        assert results(result.folder) == results(run.folder)

    def test_mistakes(self, recipe: dict[str, Any], tmp_path: Path) -> None:
        for changes, message in (
            ({"distill": recipe["distill"] | {"teacher_topk": 0}}, "distill.teacher_topk=0 is too small"),
            ({"data": recipe["data"] | {"on_the_fly": True}}, "rows made by data.on_the_fly have none"),
            ({"training": {"teacher_topk": "folder"}}, "training.teacher_topk is set from the recipe's own stages"),
        ):
            with pytest.raises(ValueError, match=message):
                Recipe.from_dict(recipe | changes)
        more = recipe | {"distill": recipe["distill"] | {"teacher_topk": 301}}
        with pytest.raises(ValueError, match="teacher_topk=301 is more than the teacher's vocabulary of 300"):
            run_recipe(Recipe.from_dict(more), tmp_path / "run")
