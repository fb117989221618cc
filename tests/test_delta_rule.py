"""The chunked gated delta rule against the token-by-token one, which is checked against the paper's equation."""

import pytest
import torch
from recurrences import DeltaRuleTests, assert_close

from hf_hybrid.modeling.ops_delta_rule import chunk_gated_delta_rule, recurrent_gated_delta_rule


class TestGatedDeltaRule(DeltaRuleTests):
    recurrent = staticmethod(recurrent_gated_delta_rule)
    chunked = staticmethod(chunk_gated_delta_rule)
    decays_by_channel = False
    wrong = [
        ({"q": (2, 10, 24)}, "split the heads"),
        ({name: (2, 0, 3, 8) for name in "qkv"} | {"g": (2, 0, 3), "beta": (2, 0, 3)}, "at least one token"),
        ({"q": (2, 10, 1, 8), "k": (2, 10, 1, 8)}, "repeat_interleave"),
        ({"g": (2, 3, 10)}, r"g has shape \(2, 3, 10\), expected \(2, 10, 3\)"),
        ({"beta": (2, 10, 3, 1)}, "one write strength per token and head"),
    ]

    def test_recurrent_form_is_the_paper_equation(self):
        inputs = self.inputs(5, batch=1, heads=1)
        o, final_state = recurrent_gated_delta_rule(**inputs)
        q, k, v, g, beta = (inputs[name][0, :, 0] for name in ("q", "k", "v", "g", "beta"))
        state = inputs["initial_state"][0, 0]
        for t in range(5):
            # Eq. 10 has the state as [V, K]; this is its transpose.
            erase = torch.eye(len(k[t]), dtype=torch.float64) - beta[t] * torch.outer(k[t], k[t])
            state = g[t].exp() * erase @ state + beta[t] * torch.outer(k[t], v[t])
            torch.testing.assert_close(o[0, t, 0], q.shape[-1] ** -0.5 * state.T @ q[t], rtol=0, atol=1e-12)
        torch.testing.assert_close(final_state[0, 0], state, rtol=0, atol=1e-12)

    def test_prefill_then_decode(self):
        inputs = self.inputs(70)
        o, final_state = recurrent_gated_delta_rule(**inputs)
        state = inputs.pop("initial_state")
        found, state = chunk_gated_delta_rule(**{name: x[:, :65] for name, x in inputs.items()}, initial_state=state)
        steps = [found]
        for t in range(65, 70):
            one = {name: x[:, t : t + 1] for name, x in inputs.items()}
            step, state = recurrent_gated_delta_rule(**one, initial_state=state)
            steps.append(step)
        assert_close({"o": torch.cat(steps, dim=1), "s": state}, {"o": o, "s": final_state}, 1e-12)

    def test_an_expanded_gradient_is_accepted(self):
        """That of a sum has strides of 0."""
        found = []
        for form in self.forms():
            leaves = {name: x.requires_grad_() for name, x in self.inputs(70).items()}
            form(**leaves)[0].sum().backward()
            found.append({name: leaf.grad for name, leaf in leaves.items()})
        assert_close(found[1], found[0], 1e-11)

    def test_second_backward_raises(self):
        inputs = {name: x.requires_grad_() for name, x in self.inputs(20).items()}
        o, _ = chunk_gated_delta_rule(**inputs)
        (gradient,) = torch.autograd.grad(o.square().sum(), inputs["q"], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()
