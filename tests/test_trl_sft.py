"""TRL's SFTTrainer on a hybrid: every way of making batches trains on the cross entropy of each document alone."""

import pytest
import torch
from finetuning import CHATS, TEXTS, chats, hybrid, losses, nats, plain_training, settings, texts, tokenizer
from trl import SFTConfig, SFTTrainer


def documents() -> list[list[int]]:
    """The texts as TRL tokenises them: with an end-of-sequence token."""
    own = tokenizer()
    return [own(text)["input_ids"] + [own.eos_token_id] for text in TEXTS]


def cross_entropy(model, rows: list[list[int]]) -> torch.Tensor:
    """The mean over the tokens of rows that know nothing of one another."""
    return torch.cat([nats(model, row) for row in rows]).mean()


def train(model, tmp_path, dataset, rows: int, **changes) -> list[float]:
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**settings(tmp_path, rows, **changes)),
        train_dataset=dataset,
        processing_class=tokenizer(),
    )
    trainer.train()
    return losses(trainer)


PACKED = {"packing": True, "max_length": 128}


@pytest.mark.parametrize(
    "batching",
    [
        {},
        {"gradient_checkpointing": False},
        {"padding_free": True, "max_length": None},
        {"padding_free": True, "max_length": None, "pad_to_multiple_of": 64},
        PACKED,
    ],
    ids=lambda batching: "-".join(batching) or "plain",
)
def test_losses_are_those_of_a_plain_loop_over_single_documents(tmp_path, batching):
    """The first loss shows the forward, the later ones the gradients."""
    model, rows = hybrid(), documents()
    plain = plain_training(model, lambda own: cross_entropy(own, rows))
    assert train(model, tmp_path, texts(), len(TEXTS), **batching) == pytest.approx(plain, abs=1e-3)
    assert plain[-1] < plain[0] - 0.05


def test_bf16(tmp_path):
    model = hybrid()
    plain = cross_entropy(model, documents()).item()
    first, *_, last = train(model, tmp_path, texts(), len(TEXTS), bf16=True)
    assert first == pytest.approx(plain, abs=0.02)
    assert last < first - 0.05


@pytest.mark.parametrize(
    ("layers", "mixer", "options"),
    [
        ((), "gated_deltanet", {}),
        ((0, 1, 2, 3, 4, 5), "gated_deltanet", {}),
        ((2, 3), "gated_deltanet", {"short_convolution": 4}),
        ((2, 3), "gated_linear_attention", {}),
        ((2, 3), "kimi_delta_attention", {}),
        ((2, 3), "sliding_window", {"window": 16}),
    ],
)
def test_packed_documents_stay_apart_in_every_mixer(tmp_path, layers, mixer, options):
    model, rows = hybrid(layers, mixer=mixer, mixer_options=options), documents()
    plain = plain_training(model, lambda own: cross_entropy(own, rows), steps=2)
    assert train(model, tmp_path, texts(), len(TEXTS), max_steps=2, **PACKED) == pytest.approx(plain, abs=1e-3)


def test_wrapped_packing_is_one_stream_cut_into_rows(tmp_path):
    model = hybrid()
    stream = [token for document in documents() for token in document]
    rows = [stream[i : i + 32] for i in range(0, len(stream), 32)]
    plain = plain_training(model, lambda own: cross_entropy(own, rows))
    wrapped = {"packing": True, "packing_strategy": "wrapped", "max_length": 32}
    assert train(model, tmp_path, texts(), len(rows), **wrapped) == pytest.approx(plain, abs=1e-3)


@pytest.mark.parametrize("packing", [False, True])
def test_assistant_only_loss_counts_assistant_tokens(tmp_path, packing):
    own, model, masked = tokenizer(), hybrid(), []
    for row in chats():
        made = own.apply_chat_template(
            row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        mask = torch.tensor(made["assistant_masks"], dtype=torch.bool)
        assert 0 < int(mask.sum()) < len(mask)
        masked.append((made["input_ids"], mask))
    plain = plain_training(model, lambda own: torch.cat([nats(own, ids)[mask[1:]] for ids, mask in masked]).mean())
    changes = {"assistant_only_loss": True, "packing": packing, "max_length": 256}
    assert train(model, tmp_path, chats(), len(CHATS), **changes) == pytest.approx(plain, abs=1e-3)


def test_gradient_accumulation_weighs_tokens_not_batches(tmp_path):
    model, rows = hybrid(), documents()
    plain = plain_training(model, lambda own: cross_entropy(own, rows))
    got = train(model, tmp_path, texts(), 2, gradient_accumulation_steps=len(TEXTS) // 2)
    assert got == pytest.approx(plain, abs=1e-3)


def test_resumes(tmp_path):
    def trainer(**changes):
        return SFTTrainer(
            model=hybrid(),
            args=SFTConfig(**settings(tmp_path, 4, **PACKED, save_strategy="steps", save_steps=2, **changes)),
            train_dataset=texts(),
            processing_class=tokenizer(),
        )

    whole = trainer(max_steps=4)
    whole.train()
    resumed = trainer(max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(whole)


def test_evaluation_of_packed_rows(tmp_path):
    model = hybrid().eval()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**settings(tmp_path, 1, per_device_eval_batch_size=8, **PACKED)),
        train_dataset=texts(),
        eval_dataset=texts(),
        processing_class=tokenizer(),
    )
    plain = cross_entropy(model, documents()).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain, abs=1e-3)
