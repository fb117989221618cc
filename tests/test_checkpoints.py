"""Checkpoints of earlier releases give what they gave, and carry this release's code once they are saved again."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_standalone import run
from transformers import AutoModel, AutoModelForCausalLM

import hf_hybrid as hh
from hf_hybrid.modeling import HybridModel


FOLDERS = sorted(Path(__file__).parent.glob("checkpoints/*/*/"))
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # logits up to 10 in fp32, perhaps of another processor

each = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: "-".join(folder.parts[-2:]))


def test_there_are_some_and_together_they_have_every_mixer():
    mixers = {name for folder in FOLDERS for name in hh.HybridConfig.from_pretrained(folder).layer_mixers}
    assert mixers == {*hh.HybridForCausalLM.mixers, None}


@each
@pytest.mark.parametrize("loader", [hh.HybridForCausalLM, AutoModelForCausalLM])
@torch.no_grad()
def test_it_gives_what_it_gave(folder, loader):
    expected = load_file(folder / "expected.safetensors")
    model, info = loader.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, hh.HybridForCausalLM)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(model(expected["ids"], use_cache=False).logits, expected["logits"], **CLOSE)
    assert torch.equal(model.generate(expected["ids"], **GREEDY), expected["text"])
    backbone = AutoModel.from_pretrained(folder)
    assert isinstance(backbone, HybridModel)
    assert torch.equal(backbone(expected["ids"])[0], model.base_model(expected["ids"])[0])


def test_saved_again_they_carry_this_releases_code(tmp_path):
    """The code runs without the package, on whichever transformers runs this test, caches included."""
    for i, folder in enumerate(FOLDERS):
        hh.HybridForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / str(i))
    run(
        f"""
        import torch
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM
        for i, folder in enumerate({[str(folder) for folder in FOLDERS]}):
            expected = load_file(folder + "/expected.safetensors")
            model = AutoModelForCausalLM.from_pretrained(str(i), trust_remote_code=True)
            torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"], **{CLOSE})
            for options in ({{}}, {{"cache_implementation": "static"}}, {{"prefill_chunk_size": 7}}):
                text = model.generate(expected["ids"], **{GREEDY}, **options)
                assert torch.equal(text, expected["text"]), (folder, options)
        """,
        tmp_path,
    )
