"""Documents in one row, however the library says where they begin: each gets what it gets alone, gradients too."""

import pytest
import torch
from teachers import tiny_teacher, tokens
from transformers import DataCollatorWithFlattening, DynamicCache

import hf_hybrid as hh
from hf_hybrid.modeling import MIXERS
from hf_hybrid.modeling.short_convolution import ShortConvolution
from hf_hybrid.trainers.alignment import mixer_outputs
from hf_hybrid.trainers.distillation import final_hidden_states
from hf_hybrid.trainers.precision import AS_LOADED


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


def assert_same(model, packed, alone):
    """Logits of the documents in a row are those of each alone, and so are the gradients that come through them."""
    weight = torch.randn(1, sum(LENGTHS), 99, dtype=torch.float64)
    (packed * weight).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    (alone * weight).sum().backward()
    torch.testing.assert_close(packed, alone, **CLOSE)
    for name, parameter in model.named_parameters():
        error = (gradients[name] - parameter.grad).abs().max() / parameter.grad.abs().max()
        assert error < 1e-5, f"{name}: {error:.1e} of the largest gradient"


def check(model, how, masked):
    ids = tokens(1, sum(LENGTHS))
    row = packed_row(how, ids)
    if masked:
        row["attention_mask"] = torch.ones_like(ids)
    alone = torch.cat([model(piece).logits for piece in ids.split(LENGTHS, dim=1)], 1)
    assert_same(model, model(**row).logits, alone)


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask of ones"])
@pytest.mark.parametrize("how", HOW)
class TestEachDocumentAsIfAlone:
    @pytest.mark.parametrize("mixer", MIXERS)
    def test_mixers(self, how, masked, mixer):
        options = {"window": 8} if mixer == "sliding_window" else {"short_convolution": 4}
        check(hybrid(mixer, **options), how, masked)

    @pytest.mark.parametrize("family", ["llama", "mistral"])
    def test_softmax_layers(self, how, masked, family):
        check(hybrid(layers=range(3), family=family), how, masked)


def padded_row(how, ids):
    """
    Four documents `LENGTHS` of `ids`, padded before or behind or not at all, in one row: `(row, their slots)`. One
    stretch of padding is a document of its own.
    """
    around = ((0, 3), (2, 0), (0, 0), (4, 1))
    pieces, slots, ends, begin = [], [], [0], 0
    for piece, (before, behind) in zip(ids.split(LENGTHS, dim=1), around, strict=True):
        pieces.append(torch.nn.functional.pad(piece, (before, behind), value=7))
        slots.append(torch.arange(begin + before, begin + before + piece.shape[1]))
        begin += pieces[-1].shape[1]
        ends.append(begin)
    pieces.append(torch.full((1, 5), 7))
    ends.append(begin + 5)
    row = {"input_ids": torch.cat(pieces, dim=1)}
    documents = torch.cat([torch.full((1, piece.shape[1]), i) for i, piece in enumerate(pieces)], dim=1)
    row["attention_mask"] = torch.zeros_like(row["input_ids"])
    row["attention_mask"][0, torch.cat(slots)] = 1
    if "position_ids" in how:  # those of padding go on, as in a document that is padded to a multiple
        row["position_ids"] = torch.cat([torch.arange(piece.shape[1])[None] for piece in pieces], dim=1)
    if "zeros" in how:
        row["position_ids"] = row["position_ids"] * row["attention_mask"]
    if "cu_seq_lens" in how:
        row["cu_seq_lens_q"] = row["cu_seq_lens_k"] = torch.tensor(ends, dtype=torch.int32)
    if "seq_idx" in how:
        row["seq_idx"] = documents
    return row, slots


@pytest.mark.parametrize(
    "how",
    ["position_ids", "position_ids, zeros for padding", "cu_seq_lens", "seq_idx", "position_ids and cu_seq_lens"],
)
class TestPaddingBetweenDocuments:
    """Padding before, behind and between the documents of a row changes nothing, in outputs and gradients."""

    def check(self, model, how):
        ids = tokens(1, sum(LENGTHS))
        row, slots = padded_row(how, ids)
        packed = model(**row).logits[:, torch.cat(slots)]
        # A convolution sees keys at the angles that their positions give them: a document is alone where it was.
        places = [row["position_ids"][:, slot] if "position_ids" in row else None for slot in slots]
        pieces = zip(ids.split(LENGTHS, dim=1), places, strict=True)
        alone = torch.cat([model(piece, position_ids=place).logits for piece, place in pieces], 1)
        assert_same(model, packed, alone)

    @pytest.mark.parametrize("mixer", MIXERS)
    def test_mixers(self, how, mixer):
        options = {"window": 8} if mixer == "sliding_window" else {"short_convolution": 4}
        self.check(hybrid(mixer, **options), how)

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    @pytest.mark.parametrize("family", ["llama", "mistral"])
    def test_softmax_layers(self, how, family, implementation):
        model = hybrid(layers=range(3), family=family)
        model.set_attn_implementation(implementation)
        self.check(model, how)


def test_rows_of_a_batch_are_padded_each_in_its_own_way():
    """One row packed, one padded on the left with positions that count tokens only, one on the right."""
    model, ids = hybrid("kimi_delta_attention", short_convolution=4), tokens(3, 24)
    mask, positions = torch.ones_like(ids), torch.arange(24).repeat(3, 1)
    mask[0, 9:12] = 0
    positions[0, 12:] -= 12
    mask[1, :5] = 0
    positions[1] = (mask[1].cumsum(0) - 1).masked_fill(mask[1] == 0, 1)
    mask[2, 20:] = 0
    got = model(ids, attention_mask=mask, position_ids=positions).logits
    for row, part in ((0, slice(0, 9)), (0, slice(12, 24)), (1, slice(5, 24)), (2, slice(0, 20))):
        torch.testing.assert_close(got[row, part], model(ids[row : row + 1, part]).logits[0], **CLOSE)


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

    def test_padding_inside_a_document_of_a_packed_row(self):
        row = packed_row("position_ids", tokens(1, 60))
        row["attention_mask"] = torch.ones(1, 60, dtype=torch.long)
        row["attention_mask"][0, 20:22] = 0
        with pytest.raises(ValueError, match="padding between the tokens of one document"):
            hybrid()(**row)

    def test_positions_that_go_on_over_the_padding_between_documents(self):
        row, _ = padded_row("cu_seq_lens", tokens(1, 60))
        with pytest.raises(ValueError, match="go on across documents that cu_seq_lens_q"):
            hybrid()(**row, position_ids=torch.arange(75)[None])

    def test_padding_does_not_hide_that_a_packed_row_is_put_into_a_cache(self):
        model, (row, _) = hybrid(), padded_row("position_ids", tokens(1, 60))
        with pytest.raises(ValueError, match="is put into a cache"):
            model(**row, past_key_values=DynamicCache(config=model.config))


@pytest.mark.parametrize("trained", ["teacher", "alignment"])
def test_trainers_keep_padded_documents_apart_in_teacher_and_student(trained):
    """The states that losses are made of, of a padded packed row, are those of its documents alone."""
    student, teacher = hybrid(), tiny_teacher("qwen3", torch.float64)
    ids = tokens(1, 60)
    row, slots = padded_row("position_ids", ids)

    def states(inputs):
        if trained == "teacher":
            return [final_hidden_states(teacher, inputs, AS_LOADED)]
        outputs = mixer_outputs(student, teacher, inputs, AS_LOADED)
        return [x for _, wanted, output, _ in outputs for x in (wanted, output)]

    packed = [x[:, torch.cat(slots)] for x in states(row)]
    alone = [torch.cat(x, 1) for x in zip(*(states({"input_ids": x}) for x in ids.split(LENGTHS, 1)), strict=True)]
    assert len(packed) == len(alone) > 0
    for x, expected in zip(packed, alone, strict=True):
        torch.testing.assert_close(x, expected, **CLOSE)


def test_a_convolution_gives_what_autocast_computes_in() -> None:
    """In packed rows too: values in fp32 would have the whole recurrence computed in fp32."""
    conv, x = ShortConvolution(8, 4), torch.randn(2, 9, 8)
    torch.nn.init.normal_(conv.weight)
    seq_idx = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2]).expand(2, -1)
    for documents in (None, seq_idx):
        with torch.autocast("cpu", torch.bfloat16):
            half = conv(x, seq_idx=documents)
        whole = conv(x, seq_idx=documents)
        assert half.dtype == torch.bfloat16 and whole.dtype == torch.float32
        torch.testing.assert_close(half.float(), whole, rtol=0.03, atol=0.03)
