"""Causal depthwise convolution over a few tokens, which starts as the identity, or as a part of it."""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .kernels import fused_convolution, fuses
from .ops_common import running_documents


class ShortConvolution(nn.Module):
    """
    `y_t = sum_j w_j * x_{t-j}` per channel, j = 0 .. kernel_size-1, within one document.

    Args:
        channels (`int`): number of channels, each with its own kernel.
        kernel_size (`int`): tokens seen, the current one included.
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        # The layout of nn.Conv1d(groups=channels): the last tap is the current token.
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size))

    def init_weights(self, scale: torch.Tensor) -> None:
        """Makes `y_t` the current token, each channel times its number in `scale` `[channels]`."""
        current = torch.zeros_like(self.weight)
        current[:, 0, -1] = scale
        init.copy_(self.weight, current)

    def forward(
        self,
        x: torch.Tensor,
        cache: Any = None,
        layer_idx: int = 0,
        seq_idx: torch.Tensor | None = None,
        kernel: str = "auto",
    ) -> torch.Tensor:
        """
        Args:
            x: `[B, T, channels]`.
            cache: the library's, which carries the last tokens on, with the layer's number in it.
            seq_idx: `[B, T]`, the document of each token.
            kernel: as in `config.kernel`; fla's runs wherever no tokens were carried on.

        Returns:
            `[B, T, channels]` in x's dtype, under autocast in that of autocast.
        """
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # which autocast leaves alone
            x = x.to(torch.get_autocast_dtype(x.device.type))
        length, before = x.shape[1], self.kernel_size - 1
        if before == 0:
            return (x * self.weight[:, 0, 0]).to(x.dtype)
        if cache is not None and cache.layers[layer_idx].has_previous_state[0]:
            padded = cache.update_conv_state(x.mT, layer_idx).mT[:, -(length + before) :]
        else:
            if cache is not None:
                # The library's layers size their buffer by what they are given first, and need one token at least.
                cache.update_conv_state(
                    nn.functional.pad(x.mT, (self.kernel_size, 0))[..., -self.kernel_size :], layer_idx
                )
            if fuses(x, kernel):
                return fused_convolution(x, self.weight[:, 0], seq_idx)
            padded = nn.functional.pad(x, (0, 0, before, 0))
        if seq_idx is not None:
            return self._within_documents(padded, seq_idx, length).to(x.dtype)
        return nn.functional.conv1d(padded.transpose(1, 2), self.weight, groups=x.shape[-1]).transpose(1, 2)

    def _within_documents(self, padded: torch.Tensor, seq_idx: torch.Tensor, length: int) -> torch.Tensor:
        history = self.kernel_size - 1
        seq_idx = running_documents(seq_idx)
        # Tokens before the row belong to its first document, so that a carried state is still seen.
        documents = torch.cat([seq_idx[:, :1].expand(-1, history), seq_idx], dim=1)
        output = padded.new_zeros(padded.shape[0], length, padded.shape[2])
        for tap in range(self.kernel_size):
            same = documents[:, tap : tap + length] == seq_idx
            output = output + padded[:, tap : tap + length] * same[..., None] * self.weight[:, 0, tap]
        return output
