"""A causal language model that knows how to copy, and nothing else; by hand, without weights that were trained."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class LookupConfig(PreTrainedConfig):
    model_type = "lookup_test"

    def __init__(self, vocab_size: int = 300, constant: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.vocab_size, self.constant, self.hidden_size = vocab_size, constant, vocab_size
        self.num_hidden_layers, self.num_attention_heads = 1, 1


class LookupBackbone(nn.Module):
    """The hidden state is the next token, one-hot: what came behind the longest match of what stands before it."""

    def __init__(self, config: LookupConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, input_ids: Tensor, **options: Any) -> BaseModelOutputWithPast:
        following = torch.stack([self.following(row) for row in input_ids])
        hidden = nn.functional.one_hot(following, self.config.vocab_size).float() * 20
        return BaseModelOutputWithPast(last_hidden_state=hidden)

    def following(self, row: Tensor) -> Tensor:
        if self.config.constant is not None:
            return torch.full_like(row, self.config.constant)
        text, length, found = "".join(map(chr, row.tolist())), 0, [0] * len(row)
        for t in range(1, len(text)):
            # A match is at most one longer than the one before.
            length += 1
            while length and (start := text.rfind(text[t + 1 - length : t + 1], 0, t)) < 0:
                length -= 1
            if length:
                found[t] = int(row[start + length])
        return torch.tensor(found)


class LookupModel(PreTrainedModel, GenerationMixin):
    config_class = LookupConfig
    base_model_prefix = "model"

    def __init__(self, config: LookupConfig) -> None:
        super().__init__(config)
        self.model = LookupBackbone(config)
        self.lm_head = nn.Linear(config.vocab_size, config.vocab_size, bias=False)
        with torch.no_grad():
            self.lm_head.weight.copy_(torch.eye(config.vocab_size))

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        return CausalLMOutputWithPast(logits=self.lm_head(self.model(input_ids).last_hidden_state))

    def prepare_inputs_for_generation(self, input_ids: Tensor, attention_mask: Any = None, **options: Any) -> dict:
        return {"input_ids": input_ids}


def lookup_model(vocab_size: int, constant: int | None = None) -> LookupModel:
    """Copies; or, with a `constant`, always says that token."""
    return LookupModel(LookupConfig(vocab_size=vocab_size, constant=constant)).eval()
