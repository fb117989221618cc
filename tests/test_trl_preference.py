"""TRL's preference and reward trainers on a hybrid: DPOTrainer and GRPOTrainer."""

import copy
import math

import pytest
import torch
from finetuning import hybrid, losses, nats, plain_training, preferences, prompts, settings, tokenizer
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

import hf_hybrid as hh


BETA = 0.1
RATE = 1e-4


def log_probability(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Of the whole completion after the prompt."""
    return -nats(model, prompt + completion)[len(prompt) - 1 :].sum()


def dpo_loss(policy, reference) -> torch.Tensor:
    """The mean over pairs of -log sigmoid of beta times the difference of log ratios (arXiv 2305.18290, eq. 7)."""
    own, terms = tokenizer(), []
    for row in preferences():
        prompt = own(row["prompt"])["input_ids"]
        ratios = []
        for name in ("chosen", "rejected"):
            whole = own(row["prompt"] + row[name])["input_ids"]
            assert whole[: len(prompt)] == prompt
            completion = whole[len(prompt) :] + [own.eos_token_id]
            with torch.no_grad():
                old = log_probability(reference, prompt, completion)
            ratios.append(log_probability(policy, prompt, completion) - old)
        terms.append(-torch.nn.functional.logsigmoid(BETA * (ratios[0] - ratios[1])))
    return torch.stack(terms).mean()


def dpo(model, tmp_path, ref_model=None, **changes):
    return DPOTrainer(
        model=model,
        ref_model=ref_model,
        args=DPOConfig(**settings(tmp_path, len(preferences()), **{"beta": BETA, "learning_rate": RATE, **changes})),
        train_dataset=preferences(),
        processing_class=tokenizer(),
    )


def test_dpo_losses_are_those_of_a_plain_loop(tmp_path):
    model = hybrid()
    reference = copy.deepcopy(model).eval()
    plain = plain_training(model, lambda own: dpo_loss(own, reference), rate=RATE)
    trainer = dpo(model, tmp_path, ref_model=reference)
    trainer.train()
    assert losses(trainer) == pytest.approx(plain, abs=1e-3)
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)  # policy and reference are equal
    assert losses(trainer)[-1] < math.log(2) - 0.05


def test_dpo_makes_its_reference_from_the_saved_hybrid(tmp_path):
    """Not from the teacher, which is where the weights came from: the first loss is log 2 for the hybrid alone."""
    hybrid().save_pretrained(tmp_path / "hybrid")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid")
    trainer = dpo(model, tmp_path)
    trainer.train()
    assert trainer.ref_model.full_attention_layers == [2, 3]
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)


def test_dpo_of_a_hybrid_in_memory_needs_its_reference_named(tmp_path):
    """There is nowhere to load it from, and the teacher's path would be the wrong model."""
    with pytest.raises((OSError, ValueError)):
        dpo(hybrid(), tmp_path)
    trainer = dpo(hybrid(), tmp_path, precompute_ref_log_probs=True)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)


def test_dpo_of_an_adapter_has_the_hybrid_as_its_reference(tmp_path):
    model = hybrid()
    adapted = get_peft_model(model, hh.lora_config(model, r=4))
    trainer = dpo(adapted, tmp_path, learning_rate=1e-2)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses(trainer)[-1] < math.log(2) - 0.05


def test_reference_models_keep_the_attention_implementation():
    assert hybrid().config._attn_implementation == "sdpa"
    eager = hh.embedded_teacher()
    eager.set_attn_implementation("eager")
    assert hh.convert(eager, [2]).config._attn_implementation == "eager"


def grpo_loss(policy, old, completions: list[tuple[list[int], list[int], float]]) -> torch.Tensor:
    """The clipped objective over all completion tokens; advantages are within groups of two (arXiv 2402.03300)."""
    total = torch.zeros((), dtype=torch.float64)
    for first in range(0, len(completions), 2):
        rewards = torch.tensor([reward for _, _, reward in completions[first : first + 2]], dtype=torch.float64)
        for (prompt, completion, _), advantage in zip(
            completions[first : first + 2], (rewards - rewards.mean()) / (rewards.std() + 1e-4), strict=True
        ):
            with torch.no_grad():
                before = nats(old, prompt + completion)[len(prompt) - 1 :]
            ratio = (before - nats(policy, prompt + completion)[len(prompt) - 1 :]).exp()
            total = total - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()
    return total / sum(len(completion) for _, completion, _ in completions)


def grpo(model, tmp_path, reward, **changes):
    return GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(
            **settings(tmp_path, 4, num_generations=2, max_completion_length=8, learning_rate=RATE, **changes)
        ),
        train_dataset=prompts(),
        processing_class=tokenizer(),
    )


def test_grpo_generates_and_trains_on_the_clipped_objective(tmp_path):
    """Two steps on one generation: the loss of the first is 0 by symmetry, that of the second shows the gradient."""
    own, model, seen = tokenizer(), hybrid(), []

    def reward(prompts, completions, completion_ids, **kwargs):
        # Half a point more for the second of a group: whatever is drawn, the two differ, and there is a gradient.
        values = [len(set(text)) + 0.5 * (i % 2) for i, text in enumerate(completions)]
        seen.extend(zip((own(prompt)["input_ids"] for prompt in prompts), completion_ids, values, strict=True))
        return values

    start = copy.deepcopy(model)
    trainer = grpo(model, tmp_path, reward, num_iterations=2, max_steps=2)
    trainer.train()
    assert len(seen) == 4 and {len(prompt) for prompt, *_ in seen} != {1}
    plain = plain_training(start, lambda policy: grpo_loss(policy, start, seen), steps=2, rate=RATE)
    assert losses(trainer) == pytest.approx(plain, abs=1e-3)
    assert abs(plain[1]) > 0.01


def test_grpo_generation_in_a_padded_batch_is_that_of_each_prompt_alone(tmp_path):
    own, model, seen = tokenizer(), hybrid(), {}

    def reward(prompts, completions, completion_ids, **kwargs):
        seen.update(zip(prompts, completion_ids, strict=True))
        return [0.0] * len(prompts)

    alone = {}
    for row in prompts():
        ids = own(row["prompt"], return_tensors="pt")["input_ids"]
        new = model.eval().generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
        alone[row["prompt"]] = new
    grpo(model, tmp_path, reward, max_steps=1, generation_kwargs={"do_sample": False}).train()
    assert len(seen) == 2 and all(alone[prompt] == got for prompt, got in seen.items())


def test_continuous_batching_is_refused_with_what_to_do(tmp_path):
    trainer = grpo(hybrid(), tmp_path, lambda completions, **_: [0.0] * 4, use_transformers_continuous_batching=True)
    with pytest.raises(ValueError, match=r"states of layers \[0, 1, 4, 5\]; use generate"):
        trainer.train()
