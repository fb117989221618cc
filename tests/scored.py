"""A teacher in which the least useful layer is known, and its scores by any method."""

import copy
import re

import datasets
import torch
from teachers import tiny_teacher, tokens

import hf_hybrid as hh
from benchmarks.selection.compared import COMPARED
from hf_hybrid.modeling.gated_deltanet import GatedDeltaNet
from hf_hybrid.synthetic import associative_recall
from hf_hybrid.trainers.scoring.methods import METHODS


# The package's methods and those of the benchmark.
EVERY = METHODS | COMPARED
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


def dead_layer_pair():
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
    record = EVERY[method]
    # By its name where it has one in the package.
    given |= {"k": 2 if record.needs_k else None, "method": method if method in METHODS else record} | changes
    train = rows(16) if record.trains else None
    return hh.score_layers(student if record.needs_student else None, teacher, train, rows(6, seed=9), **given)


def kl_with(student, teacher, layers):
    hybrid = copy.deepcopy(student)
    hybrid.set_full_attention_layers(layers, teacher)
    return hh.held_out_kl(hybrid, teacher, rows(6, seed=9), 3).mean


class Stop(Exception):
    pass


def step_of(text: str) -> int | None:
    """The step of a training run that a line of progress tells of; None for another line."""
    found = re.search(r": step (\d+) of ", text)
    return found and int(found[1])
