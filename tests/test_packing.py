"""Documents in one row, however the library says where they begin: each gets what it gets alone, gradients too."""

import pytest
import torch
from teachers import tiny_teacher, tokens
from transformers import DataCollatorWithFlattening, DynamicCache

import hf_hybrid as hh
from hf_hybrid.modeling import MIXERS


LENGTHS = (13, 1, 30, 16)
HOW = {
    "position_ids": {"return_position_ids": True},
    "position_ids and cu_seq_lens": {"return_position_ids": True, "return_flash_attn_kwargs": True},
    "all": {"return_position_ids": True, "return_flash_attn_kwargs": True, "return_seq_idx": True},
    "cu_seq_lens alone": {"return_position_ids": False, "return_flash_attn_kwargs": True},
    "seq_idx alone": {"return_position_ids": False, "return_seq_idx": True},
}
# The models run in float64, but the library's norms and rotary embeddings compute in float32 whatever the dtype.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def hybrid(mixer="gated_deltanet", layers=(1,), family="qwen3", **options):
    torch.manual_seed(1)
    model = hh.convert(tiny_teacher(family, torch.float64), list(layers), mixer=mixer, mixer_options=options)
    for name, parameter in model.named_parameters():
        if name.endswith("conv.weight"):  # it starts as the identity, which mixes nothing
            torch.nn.init.normal_(parameter)
    return model


def packed_row(how, ids):
    """What the library's padding-free collator makes of the documents."""
    collate = DataCollatorWithFlattening(return_tensors="pt", **HOW[how])
    row = collate([{"input_ids": piece[0].tolist()} for piece in ids.split(LENGTHS, dim=1)])
    row.pop("labels")
    assert torch.equal(row["input_ids"], ids)
    return row


def check(model, how, masked):
    ids = tokens(1, sum(LENGTHS))
    weight = torch.randn(1, sum(LENGTHS), 99, dtype=torch.float64)
    row = packed_row(how, ids)
    if masked:
        row["attention_mask"] = torch.ones_like(ids)
    packed = model(**row).logits
    (packed * weight).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    alone = torch.cat([model(piece).logits for piece in ids.split(LENGTHS, dim=1)], 1)
    (alone * weight).sum().backward()
    torch.testing.assert_close(packed, alone, **CLOSE)
    for name, parameter in model.named_parameters():
        error = (gradients[name] - parameter.grad).abs().max() / parameter.grad.abs().max()
        assert error < 1e-5, f"{name}: {error:.1e} of the largest gradient"


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask of ones"])
@pytest.mark.parametrize("how", HOW)
class TestEachDocumentAsIfAlone:
    @pytest.mark.parametrize("mixer", MIXERS)
    def test_mixers(self, how, masked, mixer):
        options = {"window": 8} if mixer == "sliding_window" else {"short_convolution": 4}
        check(hybrid(mixer, **options), how, masked)

    @pytest.mark.parametrize("family", ["llama", "mistral"])
    def test_softmax_layers(self, how, masked, family):
        check(hybrid(layers=range(4), family=family), how, masked)


class TestRefused:
    def test_positions_that_do_not_restart(self):
        row = packed_row("cu_seq_lens alone", tokens(1, 60)) | {"position_ids": torch.arange(60)[None]}
        with pytest.raises(ValueError, match="go on across documents that cu_seq_lens_q"):
            hybrid()(**row)

    def test_boundaries_of_several_rows(self):
        with pytest.raises(ValueError, match="batch of 2 rows"):
            hybrid()(tokens(2, 30), cu_seq_lens_q=torch.tensor([0, 20, 60]))

    def test_packed_rows_in_a_cache(self):
        model = hybrid()
        row = packed_row("position_ids", tokens(1, 60))
        with pytest.raises(ValueError, match="is put into a cache"):
            model(**row, past_key_values=DynamicCache(config=model.config))

    def test_packed_rows_with_padding(self):
        row = packed_row("position_ids", tokens(1, 60))
        row["attention_mask"] = (torch.arange(60) < 55).long()[None]
        with pytest.raises(ValueError, match="Pack without padding"):
            hybrid()(**row)
