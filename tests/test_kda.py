"""Kimi Delta Attention: the chunked form against the token-by-token one, and that against the paper's equation."""

import torch
from recurrences import BY_CHANNEL, DeltaRuleTests, assert_close, run

from hf_hybrid.modeling.ops_delta_rule import chunk_gated_delta_rule
from hf_hybrid.modeling.ops_kda import chunk_kda, recurrent_kda


class TestKimiDeltaAttention(DeltaRuleTests):
    recurrent = staticmethod(recurrent_kda)
    chunked = staticmethod(chunk_kda)
    wrong = BY_CHANNEL

    def test_recurrent_form_is_the_paper_equation(self):
        inputs = self.inputs(5, batch=1, heads=1)
        o, final_state = recurrent_kda(**inputs)
        q, k, v, g = (inputs[name][0, :, 0] for name in "qkvg")
        beta, state = inputs["beta"][0, :, 0], inputs["initial_state"][0, 0]
        for t in range(5):
            erase = torch.eye(len(k[t]), dtype=torch.float64) - beta[t] * torch.outer(k[t], k[t])
            state = erase @ torch.diag(g[t].exp()) @ state + beta[t] * torch.outer(k[t], v[t])
            torch.testing.assert_close(o[0, t, 0], q.shape[-1] ** -0.5 * state.T @ q[t], rtol=0, atol=1e-12)
        torch.testing.assert_close(final_state[0, 0], state, rtol=0, atol=1e-12)

    def test_equal_decays_are_the_gated_delta_rule(self):
        inputs = self.inputs(130)
        inputs["g"] = inputs["g"][..., :1].expand_as(inputs["g"]).clone()
        found = run(chunk_kda, inputs)
        expected = run(chunk_gated_delta_rule, inputs | {"g": inputs["g"][..., 0]})
        found["d_g"] = found["d_g"].sum(-1)
        assert_close(found, expected)
