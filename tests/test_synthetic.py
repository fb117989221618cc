"""Properties of the synthetic tasks."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_hybrid.synthetic import associative_recall, chained_recall, copying, ordinary_token_ids, task_accuracy


TOKEN_IDS = torch.arange(7, 207)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Lookup(nn.Module):
    """A model that is always right where the task can be known, or knows nothing."""

    device = torch.device("cpu")

    def __init__(self, perfect, vocab_size=207):
        super().__init__()
        self.perfect, self.vocab_size = perfect, vocab_size
        self.frozen = nn.Dropout().eval()

    def forward(self, input_ids, use_cache=None):
        if self.training:
            raise RuntimeError("expected eval mode")
        logits = torch.rand(*input_ids.shape, self.vocab_size, generator=seeded(5))
        if self.perfect:
            logits[:, :-1] += 2 * nn.functional.one_hot(input_ids[:, 1:], self.vocab_size)
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("length, num_pairs", [(128, None), (128, 32), (128, 8), (96, 4), (16, 1), (400, None)])
def test_recall_asks_every_defined_key_once(length, num_pairs):
    input_ids, mask = associative_recall(5, length, TOKEN_IDS, seeded(), num_pairs)
    assert input_ids.shape == mask.shape == (5, length)
    assert input_ids.dtype == torch.int64 and mask.dtype == torch.bool
    assert torch.isin(input_ids, TOKEN_IDS).all()
    block = 4 * (num_pairs or length // 4)
    for row, marked in zip(input_ids, mask, strict=True):
        keys_of_row, values_of_row = [], []
        for start in range(0, length, block):
            tokens, answers = row[start : start + block].tolist(), marked[start : start + block].tolist()
            keys, values = tokens[: block // 2 : 2], tokens[1 : block // 2 : 2]
            asked, answered = tokens[block // 2 :: 2], tokens[block // 2 + 1 :: 2]
            assert sorted(asked) == sorted(keys)
            assert [dict(zip(keys, values, strict=True))[key] for key in asked] == answered
            assert answers == [False] * (block // 2) + [False, True] * (block // 4)
            keys_of_row += keys
            values_of_row += values
        assert len(set(keys_of_row)) == len(keys_of_row)
        assert not set(keys_of_row) & set(values_of_row)


def test_recall_questions_are_shuffled_and_halves_redrawn():
    input_ids, _ = associative_recall(4, 128, TOKEN_IDS, seeded())
    definitions, questions = input_ids[:, :64:2], input_ids[:, 64::2]
    assert (definitions != questions).float().mean() > 0.8
    keys, values = definitions.flatten().tolist(), input_ids[:, 1:64:2].flatten().tolist()
    assert set(keys) & set(values)  # disjoint in each row, not over rows


@pytest.mark.parametrize("length, num_chains", [(126, None), (128, None), (128, 18), (128, 4), (40, 1), (7, 1)])
def test_chains_ask_for_the_value_of_the_value(length, num_chains):
    input_ids, mask = chained_recall(5, length, TOKEN_IDS, seeded(), num_chains)
    assert input_ids.shape == mask.shape == (5, length)
    assert input_ids.dtype == torch.int64 and mask.dtype == torch.bool
    assert torch.isin(input_ids, TOKEN_IDS).all()
    chains = num_chains or length // 7
    block = 7 * chains
    for row, marked in zip(input_ids, mask, strict=True):
        firsts_of_row = []
        for start in range(0, length, block):
            tokens, answers = row[start : start + block].tolist(), marked[start : start + block].tolist()
            pairs = dict(zip(tokens[: 4 * chains : 2], tokens[1 : 4 * chains : 2], strict=False))  # the row may end
            assert answers[: 4 * chains] == [False] * min(4 * chains, len(tokens))
            assert answers[4 * chains :] == ([False, False, True] * chains)[: max(len(tokens) - 4 * chains, 0)]
            firsts, again, thirds = (tokens[4 * chains + offset :: 3] for offset in range(3))
            assert all(one == two for one, two in zip(firsts, again, strict=False))
            assert all(pairs[pairs[one]] == three for one, three in zip(firsts, thirds, strict=False))
            assert len(set(firsts)) == len(firsts)
            if len(tokens) == block:
                assert len(pairs) == 2 * chains and sorted(firsts) == sorted(set(pairs) - set(pairs.values()))
            firsts_of_row += firsts
        assert len(set(firsts_of_row)) == len(firsts_of_row)


@pytest.mark.parametrize("length, segment", [(64, None), (64, 32), (64, 8), (63, 21), (4, 2)])
def test_copying_repeats_and_marks_what_follows(length, segment):
    input_ids, mask = copying(6, length, TOKEN_IDS, seeded(), segment)
    assert input_ids.shape == mask.shape == (6, length) and mask.dtype == torch.bool
    assert torch.isin(input_ids, TOKEN_IDS).all()
    segment = segment or length // 2
    assert torch.equal(input_ids[:, segment:], input_ids[:, :-segment])
    expected = [position >= segment and position % segment > 0 for position in range(length)]
    assert mask.tolist() == [expected] * 6


@pytest.mark.parametrize("task", [associative_recall, chained_recall, copying])
def test_the_seed_decides(task):
    first, again, other = (task(3, 64, TOKEN_IDS, seeded(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    generator = seeded(1)
    assert torch.equal(task(3, 64, TOKEN_IDS, generator)[0], first)
    assert not torch.equal(task(3, 64, TOKEN_IDS, generator)[0], first)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    task(3, 64, TOKEN_IDS, seeded())
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "task, kwargs, message",
    [
        (associative_recall, dict(length=130), "multiple of 4"),
        (associative_recall, dict(length=0), "multiple of 4"),
        (associative_recall, dict(length=128, num_pairs=7), "num_pairs=7"),
        (associative_recall, dict(length=128, num_pairs=0), "num_pairs=0"),
        (associative_recall, dict(length=404), "at least 202, got 200"),
        (chained_recall, dict(length=6), "num_chains=0"),
        (chained_recall, dict(length=128, num_chains=19), "num_chains=19"),
        (chained_recall, dict(length=490), "at least 210, got 200"),
        (copying, dict(length=63), "even"),
        (copying, dict(length=64, segment=5), "segment=5"),
        (copying, dict(length=64, segment=1), "segment=1"),
        (copying, dict(length=64, segment=64), "two copies"),
        (copying, dict(length=64, token_ids=torch.arange(1)), "too few token ids"),
        (copying, dict(length=64, token_ids=TOKEN_IDS.float()), "1-D integer"),
        (copying, dict(length=64, token_ids=TOKEN_IDS[None]), "1-D integer"),
        (copying, dict(length=64, token_ids=torch.zeros(9, dtype=torch.int64)), "distinct"),
        (copying, dict(length=64, batch_size=0), "batch_size"),
        (copying, dict(length=64, generator=0), "torch.Generator"),
    ],
)
def test_wrong_arguments_are_refused(task, kwargs, message):
    with pytest.raises(ValueError, match=message):
        task(**{"batch_size": 2, "token_ids": TOKEN_IDS, "generator": seeded(), **kwargs})


@pytest.mark.parametrize("task", [associative_recall, chained_recall, copying])
def test_accuracy_of_an_oracle_and_of_a_guesser(task):
    input_ids, mask = task(20, 128, TOKEN_IDS, seeded())
    assert task_accuracy(Lookup(perfect=True), input_ids, mask, batch_size=7) == 1.0
    assert task_accuracy(Lookup(perfect=False), input_ids, mask) < 0.05


def test_accuracy_counts_only_marked_tokens():
    input_ids, mask = copying(4, 64, TOKEN_IDS, seeded())
    model = Lookup(perfect=True)
    logits = model.eval()(input_ids).logits
    wrong = logits.clone()
    wrong[:, :-1][~mask[:, 1:]] = 0.0  # spoil every unmarked prediction
    model.forward = lambda input_ids, use_cache=None: SimpleNamespace(logits=wrong)
    assert task_accuracy(model, input_ids, mask) == 1.0
    wrong[0, :-1][mask[0, 1:]] = 0.0  # and all of one row in four
    assert task_accuracy(model, input_ids, mask) == 0.75


def test_accuracy_restores_the_mode_of_every_module():
    model = Lookup(perfect=True).train()
    model.frozen.eval()
    task_accuracy(model, *copying(2, 16, TOKEN_IDS, seeded()))
    assert model.training and not model.frozen.training


def test_accuracy_refuses_wrong_masks():
    input_ids, mask = copying(2, 16, TOKEN_IDS, seeded())
    for bad in (mask[:, 1:], mask.long(), torch.zeros_like(mask), torch.ones_like(mask)):
        with pytest.raises(ValueError):
            task_accuracy(Lookup(perfect=True), input_ids, bad)
    with pytest.raises(ValueError, match="batch_size"):
        task_accuracy(Lookup(perfect=True), input_ids, mask, batch_size=0)


def test_ordinary_token_ids_leave_special_tokens_out():
    tokenizer = SimpleNamespace(
        get_vocab=lambda: {"a": 2, "b": 1, "<eos>": 0, "<tool>": 3, "c": 4},
        all_special_ids=[0],
        added_tokens_decoder={0: "<eos>", 3: "<tool>"},
    )
    assert ordinary_token_ids(tokenizer).tolist() == [1, 2, 4]
    assert ordinary_token_ids(tokenizer, exclude=[4]).tolist() == [1, 2]
