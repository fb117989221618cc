"""The mixer options with which a linear layer is one that transformers and servers have themselves."""

from collections.abc import Sequence
from typing import Any


NATIVE_MIXER = "gated_deltanet"
# With these, `gated_deltanet` is the Gated DeltaNet of transformers' Qwen3-Next and Qwen3.5: it projects without
# biases, convolves q, k and v over four tokens, applies SiLU to all three and knows neither positions nor q/k norms.
NATIVE_OPTIONS: dict[str, Any] = {
    "rope": False,
    "silu_qk": True,
    "silu_v": True,
    "short_convolution": 4,
    "qk_norm": False,
    "projection_bias": False,
}
_PRESETS = {"native": NATIVE_OPTIONS}


def mixer_options_of(options: dict[str, Any] | str | None, mixer: str | Sequence[str | None]) -> dict[str, Any] | None:
    """`options` as a dict, where they may be the name of a preset: `"native"`, for [`GatedDeltaNet`] alone."""
    if not isinstance(options, str):
        return options
    if options not in _PRESETS:
        raise ValueError(
            f"mixer_options={options!r} is no preset; pass one of {sorted(_PRESETS)}, or a dict of options."
        )
    others = sorted(
        {name for name in ([mixer] if isinstance(mixer, str) else mixer) if name not in (None, NATIVE_MIXER)}
    )
    if others:
        raise ValueError(
            f"mixer_options={options!r} makes a {NATIVE_MIXER} that servers have themselves; there is none for "
            f"{others}. Pass mixer={NATIVE_MIXER!r}, or a dict of options."
        )
    return dict(_PRESETS[options])
