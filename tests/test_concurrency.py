"""What one call is told of its rows is nobody else's: calls in two threads, and layers that are computed again."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from teachers import tokens

import hf_hybrid as hh
from benchmarks.families.models import tiny_model


# StableLM's layers take keyword arguments and hand none to their attention.
families = pytest.mark.parametrize("family", ["llama", "stablelm"])


def padded(batch=2, length=24, padding=7):
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[:, :padding] = 0
    return {"input_ids": tokens(batch, length), "attention_mask": mask}


@families
def test_two_threads_on_one_model(family):
    """The threads wait for each other in every layer, between what goes into it and its attention."""
    model = hh.convert(tiny_model(family), [1])
    packed = {"input_ids": tokens(2, 24, seed=1), "position_ids": torch.arange(12).repeat(2, 2)}
    calls = [padded(), packed, {"input_ids": tokens(2, 24, seed=2)}]

    def run(inputs):
        with torch.no_grad():
            return model(**inputs, use_cache=False).logits

    expected = [run(inputs) for inputs in calls]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        barrier = threading.Barrier(2, timeout=20)

        def wait(*args, barrier=barrier):
            barrier.wait()

        hooks = [layer.input_layernorm.register_forward_hook(wait) for layer in model.base_model.layers]
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(run, (calls[one], calls[other])))
        for hook in hooks:
            hook.remove()
        assert torch.equal(found[0], expected[one]) and torch.equal(found[1], expected[other])


@pytest.mark.parametrize("reentrant", [False, True])
@families
def test_a_layer_that_is_computed_again_is_told_again(family, reentrant):
    model, inputs = hh.convert(tiny_model(family), [1]).train(), padded()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(**inputs, use_cache=False).logits[:, 7:].square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))
