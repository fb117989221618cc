"""Softmax and linear attention of each layer side by side in one student."""

from typing import Any

from hf_hybrid.modeling.modeling_hybrid import decoder_layers


class BothAttentions:
    """
    The student's mixers and the teacher's softmax attention side by side, so that layers flip without a copy.

    Args:
        student ([`HybridForCausalLM`]): linear in every layer.
        teacher (`PreTrainedModel`): its attention modules are copied once.
    """

    def __init__(self, student: Any, teacher: Any) -> None:
        self.student = student
        self.layers = decoder_layers(student)
        self.registered = False
        self.linear = [layer.self_attn for layer in self.layers]
        student.set_full_attention_layers(range(len(self.layers)), teacher)
        self.softmax = [layer.self_attn for layer in self.layers]
        self.keep([])

    def keep(self, layers: Any) -> None:
        """Softmax attention in `layers`, linear attention in the others."""
        kept = set(layers)
        for i, layer in enumerate(self.layers):
            layer.self_attn = self.softmax[i] if i in kept else self.linear[i]
            if self.registered:
                layer.resting_attn = self.linear[i] if i in kept else self.softmax[i]
        self.student.config.full_attention_layers = sorted(kept)

    def register(self, registered: bool) -> None:
        """Whether the attention that a layer does not use is part of the model too: of what trains and is saved."""
        for layer in self.layers:
            if self.registered:
                del layer.resting_attn
        self.registered = registered
        self.keep([])

    def __enter__(self) -> "BothAttentions":
        return self

    def __exit__(self, *error: Any) -> None:
        self.register(False)
        self.student.set_full_attention_layers([])  # what follows from it in the model
