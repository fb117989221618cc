"""What differs between releases of transformers: the cache's name, and what a checkpointing model does with one."""

from pathlib import Path

import pytest
import torch
import versions
from teachers import tiny_teacher, tokens
from transformers import DynamicCache

import hf_hybrid as hh
from hf_hybrid.modeling.library import CACHE_NAMES, cache_argument, take_cache


def hybrid(layers=(1,), mixer="gated_deltanet"):
    torch.manual_seed(1)
    return hh.convert(tiny_teacher(dtype=torch.float64), layers, mixer=mixer).eval()


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("layers", [(1,), ()], ids=["hybrid", "all_linear"])
@torch.no_grad()
def test_the_cache_is_taken_by_either_name(layers, name):
    model, ids = hybrid(layers), tokens(2, 20)
    expected = model.base_model(ids, use_cache=False).last_hidden_state
    cache = DynamicCache(config=model.config)
    first = model.base_model(ids[:, :12], **{name: cache}).last_hidden_state
    rest = model.base_model(ids[:, 12:], **{name: cache}).last_hidden_state
    torch.testing.assert_close(torch.cat([first, rest], 1), expected, rtol=1e-4, atol=1e-5)
    assert cache.get_seq_length() == 20


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("mixer", ["gated_deltanet", "gated_linear_attention", "sliding_window"])
@torch.no_grad()
def test_a_mixer_takes_the_cache_by_either_name(mixer, name):
    model, states = hybrid(mixer=mixer), torch.randn(1, 12, 64, dtype=torch.float64)
    attention, positions = model.base_model.layers[0].self_attn, torch.arange(12)[None]
    rotation = model.base_model.rotary_emb(states, positions)
    cache = DynamicCache(config=model.config)
    attention(states, position_embeddings=rotation, attention_mask=None, **{name: cache})
    assert cache.layers[0].has_previous_state[0]


def test_the_name_is_that_of_the_callees_signature():
    class Old:
        def forward(self, hidden_states, past_key_values=None): ...

    class New:
        def forward(self, hidden_states, cache=None): ...

    class Neither:
        def forward(self, hidden_states): ...

    assert (cache_argument(Old), cache_argument(New)) == ("past_key_values", "cache")
    with pytest.raises(ValueError, match=r"Neither.forward has none of .* among its arguments \['hidden_states'\]"):
        cache_argument(Neither)


def test_two_caches_are_refused():
    cache = DynamicCache()
    arguments = {"cache": None, "past_key_values": cache, "use_cache": True}
    assert take_cache(arguments) is cache and arguments == {"use_cache": True}
    with pytest.raises(ValueError, match="two names of one argument"):
        take_cache({"cache": cache, "past_key_values": cache})
    with pytest.raises(ValueError, match="two names of one argument"):
        hybrid().base_model(tokens(1, 4), cache=cache, past_key_values=cache)


@torch.no_grad()
def test_a_model_that_checkpoints_activations_makes_no_cache():
    model, ids = hybrid().train(), tokens(1, 8)
    model.gradient_checkpointing_enable()
    out = model(ids, use_cache=True)
    torch.testing.assert_close(out.logits, model(ids, use_cache=False).logits)
    assert out[-1] is out.logits  # nothing behind them


def test_which_releases_are_run_beside_the_pinned_one():
    assert versions.releases("5.19.0", "5.24.0", "5.24.0") == {"5.19.0": True}
    assert versions.releases("5.19.0", "5.24.0", "5.25.0") == {"5.19.0": True, "5.25.0": False}
    assert versions.releases("5.19.0", "5.24.0", "5.100.0") == {"5.19.0": True, "5.100.0": False}
    assert versions.releases("5.19.0", "5.24.0", "5.23.1") == {"5.19.0": True, "5.23.1": True}


def test_the_range_of_setup_py_admits_what_is_tested():
    root = Path(__file__).parents[1]
    oldest = versions.floor((root / "setup.py").read_text())
    pin = versions.pinned((root / "constraints.txt").read_text())
    assert versions.numbers(oldest) <= versions.numbers(pin) < (6,)
    from_minor, to_minor = oldest.rpartition(".")[0], pin.rpartition(".")[0]
    assert f"transformers {from_minor} up to" in (root / "README.md").read_text()
    assert f"transformers {from_minor} to {to_minor}" in (root / "docs" / "hub.md").read_text()


@pytest.mark.parametrize(("claimed", "code"), [(True, 1), (False, 0)])
def test_a_failure_blocks_unless_the_release_is_newer_than_ours(claimed, code, monkeypatch, capsys):
    pin = versions.pinned((versions.ROOT / "constraints.txt").read_text())
    latest = "5.1.0" if claimed else "5.99.0"
    monkeypatch.setattr(versions, "floor", lambda setup: "5.0.0")
    monkeypatch.setattr(versions, "newest", lambda: latest)
    monkeypatch.setattr(versions, "run", lambda name, version, tests: name == ".venv-floor")
    assert versions.main([]) == code
    last = capsys.readouterr().out.splitlines()[-4:]
    assert any(f"transformers {latest}, newer than the {pin}" in line for line in last) is not claimed
