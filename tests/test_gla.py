"""Gated linear attention: the chunked form against the token-by-token one, and that against the paper's equation."""

import torch
from recurrences import BY_CHANNEL, RecurrenceTests, assert_close, run

from hf_hybrid.modeling.ops_gla import chunk_gla, recurrent_gla


class TestGatedLinearAttention(RecurrenceTests):
    recurrent = staticmethod(recurrent_gla)
    chunked = staticmethod(chunk_gla)
    has_beta = False
    wrong = BY_CHANNEL

    def test_recurrent_form_is_the_paper_equation(self):
        inputs = self.inputs(5, batch=1, heads=1)
        o, final_state = recurrent_gla(**inputs)
        q, k, v, g = (inputs[name][0, :, 0] for name in "qkvg")
        state = inputs["initial_state"][0, 0]
        for t in range(5):
            state = torch.diag(g[t].exp()) @ state + torch.outer(k[t], v[t])
            torch.testing.assert_close(o[0, t, 0], q.shape[-1] ** -0.5 * state.T @ q[t], rtol=0, atol=1e-12)
        torch.testing.assert_close(final_state[0, 0], state, rtol=0, atol=1e-12)

    def test_without_decay_it_is_causal_attention_without_softmax(self):
        inputs = self.inputs(70, state=False)
        inputs["g"] = torch.zeros_like(inputs["g"])
        scores = torch.einsum("bihk,bjhk->bhij", inputs["q"], inputs["k"]).tril()
        expected = torch.einsum("bhij,bjhv->bihv", scores, inputs["v"])
        torch.testing.assert_close(chunk_gla(**inputs, scale=1.0)[0], expected, rtol=0, atol=1e-11)

    def test_identical_keys(self):
        """Nothing erases what the same key wrote before: the state grows with every token."""
        inputs = self.inputs(256, key=64, value=64, heads=2)
        inputs["k"] = inputs["k"][:, :1].expand_as(inputs["k"]).clone()
        inputs["g"] *= 1e-4
        expected = run(recurrent_gla, inputs)
        assert_close(run(chunk_gla, inputs), expected, 1e-11)
        assert_close(run(chunk_gla, {name: x.float() for name, x in inputs.items()}), expected, 3e-6)
