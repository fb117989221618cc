"""Methods that need the teacher alone, against numbers computed by hand."""

import pytest
import torch
from scored import LENGTH, arguments, recall_task, rows, score
from teachers import tiny_teacher, tokens

import hf_hybrid as hh


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
