"""Methods that need the teacher alone, against numbers computed by hand."""

import datasets
import pytest
import torch
from scored import EVERY, LENGTH, arguments, recall_task, rows, score, weak_student
from teachers import tiny_teacher, tokens
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config

import hf_hybrid as hh
from hf_hybrid.trainers.held_out import HeldOut
from hf_hybrid.trainers.precision import AS_LOADED
from hf_hybrid.trainers.scoring.teacher import token_nll


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
    scores = hh.score_layers(
        None, teacher, None, rows(6, 9), method=EVERY["block-influence"], args=arguments(tmp_path)
    )
    assert [s.value for s in scores.scores] == pytest.approx(wanted, rel=1e-4)


def test_ablations_by_hand(dead_layer, tmp_path):
    """Layer 1's scores: KL(teacher || without it), the rise of the NLL, and the change of the final hidden states."""
    teacher, _ = dead_layer
    ids = tokens(6, LENGTH, 9)

    def seen():
        out = teacher(ids, output_hidden_states=True)
        return out.logits.double().log_softmax(-1), out.hidden_states[-1].double()

    with torch.no_grad():
        log_p, hidden = seen()
        handle = teacher.model.layers[1].self_attn.register_forward_hook(lambda m, a, out: (out[0] * 0, out[1]))
        log_q, without = seen()
        handle.remove()
    nll = [-x[:, :-1].gather(-1, ids[:, 1:, None]).mean().item() for x in (log_p, log_q)]
    wanted = {
        "ablation-kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
        "ablation-ppl": nll[1] - nll[0],
        "attention-mse": (hidden - without).square().mean().item(),
    }
    for method, value in wanted.items():
        assert score(teacher, None, tmp_path, method).scores[1].value == pytest.approx(value, rel=1e-3, abs=1e-6)


SIZES = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "pad_token_id": 0}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("family", ["gemma2", "cohere"])
def test_the_stream_after_an_attention_whose_output_is_normed_or_beside_an_mlp(family, tmp_path):
    """Gemma 2 norms the output before it is added, Cohere adds attention and MLP at once."""
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, head_dim=16) if family == "gemma2" else CohereConfig(**SIZES)
    teacher = AutoModelForCausalLM.from_config(config).eval()
    wanted, seen = [], {}
    for i, layer in enumerate(teacher.model.layers):
        added = layer.post_attention_layernorm if family == "gemma2" else layer.self_attn

        def give(module, args, out, i=i):
            seen[i, "added"] = out[0] if isinstance(out, tuple) else out

        layer.register_forward_pre_hook(lambda module, args, i=i: seen.update({(i, "before"): args[0]}))
        added.register_forward_hook(give)
    with torch.no_grad():
        teacher(tokens(6, LENGTH, 9))
    for i in range(2):
        before, after = seen[i, "before"], seen[i, "before"] + seen[i, "added"]
        wanted.append(1 - torch.cosine_similarity(before, after, dim=-1).mean().item())
    scores = hh.score_layers(
        None, teacher, None, rows(6, 9), method=EVERY["block-influence"], args=arguments(tmp_path)
    )
    assert [s.value for s in scores.scores] == pytest.approx(wanted, rel=1e-4)


def test_the_first_token_of_a_packed_document_is_not_predicted():
    teacher, ids = tiny_teacher("llama"), tokens(1, LENGTH, 9)
    positions = [[*range(10), *range(LENGTH - 10)]]
    packed = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "position_ids": positions})
    parts = [datasets.Dataset.from_dict({"input_ids": part.tolist()}) for part in (ids[:, :10], ids[:, 10:])]
    (whole,), (first,), (second,) = (
        token_nll(HeldOut(part, teacher, 1, AS_LOADED), teacher) for part in (packed, *parts)
    )
    predicted = (9, LENGTH - 11)
    assert whole == pytest.approx((9 * first + predicted[1] * second) / sum(predicted), rel=1e-5)


@pytest.mark.parametrize("method", ["ga-s1", "block-influence", "attention-mse", "path-gradient"])
def test_padding_does_not_count(method, tmp_path):
    """A row that is padded, on either side, measures as the row alone."""
    teacher, ids = tiny_teacher("llama"), tokens(2, LENGTH, 9)
    mask = torch.ones_like(ids)
    mask[0, 10:] = mask[1, :5] = 0
    padded = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": mask.tolist()})
    alone = [
        datasets.Dataset.from_dict({"input_ids": [row[keep.bool()].tolist()]})
        for row, keep in zip(ids, mask, strict=True)
    ]
    student = weak_student(teacher) if EVERY[method].needs_student else None
    both, first, second = (
        hh.score_layers(student, teacher, None, part, method=EVERY[method], args=arguments(tmp_path)).scores
        for part in (padded, *alone)
    )
    for a, b, c in zip(both, first, second, strict=True):
        assert a.per_sequence == pytest.approx([b.value, c.value], rel=1e-3, abs=1e-6)
