"""
The mixer options with which a linear layer is one that transformers and servers have themselves, and the layouts that
are exported. Nothing is imported here that takes time.
"""

from collections.abc import Sequence
from typing import Any


LAYOUTS = {
    "qwen3_5": "transformers' own Qwen3_5ForCausalLM (text only), without remote code",
    "gguf": "the same for llama.cpp, in one GGUF file",
    "windows": "transformers' own Cwm, Qwen2 or Qwen3 with windows, without remote code",
}
# What becomes a linear layer of the first two, and a layer with a window of the last.
EXPORTED_MIXERS = {"qwen3_5": "gated_deltanet", "gguf": "gated_deltanet", "windows": "sliding_window"}
# What serves a hybrid that fits no layout, and is listed with them.
VLLM_PLUGIN = "vllm plugin"
# Of the weights in a GGUF file.
FILE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
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
# What such a layer has no choice about. Its convolution may be of any length, or the identity where there is none.
NEEDED_OPTIONS = {name: value for name, value in NATIVE_OPTIONS.items() if name != "short_convolution"} | {
    "output_norm": True,
    "output_gate": "silu",
}
# A layer of transformers with a window sees nothing beside it.
NEEDED_WINDOW_OPTIONS: dict[str, Any] = {"sinks": 0}
_PRESETS = {"native": NATIVE_OPTIONS}


def check_layout(to: str, where: str = "to") -> None:
    """Raises a `ValueError` where there is no layout of that name."""
    if to not in LAYOUTS:
        raise ValueError(f"{where}={to!r} is no layout; choose one of {list(LAYOUTS)}.")


def mixer_options_of(options: dict[str, Any] | str | None, mixer: str | Sequence[str | None]) -> dict[str, Any] | None:
    """`options` as a dict, where they may be the name of a preset: `"native"`, for [`GatedDeltaNet`] alone."""
    if options is None or isinstance(options, dict):
        return options
    if not isinstance(options, str):
        raise ValueError(
            f"mixer_options is a {type(options).__name__}; pass a dict, in which options of one mixer go under its "
            f"name, or one of {sorted(_PRESETS)}."
        )
    if options not in _PRESETS:
        raise ValueError(
            f"mixer_options={options!r} is no preset; pass one of {sorted(_PRESETS)}, or a dict of options."
        )
    names = [mixer] if isinstance(mixer, str) else mixer
    others = sorted({name for name in names if name not in (None, NATIVE_MIXER)})
    if others:
        raise ValueError(
            f"mixer_options={options!r} makes a {NATIVE_MIXER} that servers have themselves; there is none for "
            f"{others}. Pass mixer={NATIVE_MIXER!r}, or a dict of options."
        )
    return dict(_PRESETS[options])


def options_for(to: str, mixer: str, options: dict[str, Any], where: str = "export_to") -> dict[str, Any]:
    """
    The mixer options of a hybrid that is to be exported: those that the layout needs, and what else is in `options`.
    A `ValueError` names one that would not fit.
    """
    check_layout(to, where)
    if mixer != EXPORTED_MIXERS[to]:
        raise ValueError(f"mixer {mixer!r} cannot be exported ({where}: {to}); only {EXPORTED_MIXERS[to]!r} can.")
    plain = {name: value for name, value in options.items() if not isinstance(value, dict)}
    given = plain | options.get(mixer, {})
    windows = to == "windows"
    for name, wanted in (NEEDED_WINDOW_OPTIONS if windows else NEEDED_OPTIONS).items():
        if name in given and given[name] != wanted:
            raise ValueError(
                f"mixer_options.{name}={given[name]!r} cannot be exported ({where}: {to}), which needs {wanted!r}; "
                f"leave one of the two out."
            )
    return given if windows else NATIVE_OPTIONS | given
