"""What every recurrence has to pass; test_gla.py, test_delta_rule.py and test_kda.py inherit it."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


Form = Callable[..., tuple[Tensor, Tensor]]

# Document lengths: boundaries at chunk edges, several documents within a chunk, one token, and longer than a chunk.
PACKINGS = {
    "edges": [64, 64, 1],
    "many in a chunk": [3, 1, 7, 1, 1, 20, 40, 5, 2],
    "off the edges": [63, 2, 90],
    "first token": [1, 69],
}
DECAYS = {
    "none": lambda g: g * 0,
    "near 1": lambda g: g * 1e-6,
    "near 0": lambda g: g - 15,
    "-50 per token": lambda g: g * 0 - 50,
    "-1e4 per token": lambda g: g * 0 - 1e4,
    "forgets all": lambda g: torch.where(g < -0.9, -torch.inf, g),
    "strong bursts": lambda g: torch.where(g < -0.7, -50.0, g * 0.01),
    "channels apart": lambda g: g * torch.logspace(-6, 4, g.shape[-1], dtype=g.dtype),
}


def run(form: Form, inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Output, final state, and the gradients of a loss that both contribute to."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    return with_gradients(leaves, *form(**leaves, **options))


def with_gradients(leaves: dict[str, Tensor], o: Tensor, final_state: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(99)
    weights = torch.randn(o.shape, dtype=torch.float64), torch.randn(final_state.shape, dtype=torch.float64)
    ((o * weights[0].to(o.dtype)).sum() + (final_state * weights[1].to(final_state.dtype)).sum()).backward()
    gradients = {f"d_{name}": torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()}
    return {"o": o.detach(), "final_state": final_state.detach()} | gradients


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.isfinite(actual[name]).all(), name
        bound = tolerance * (1 + x.abs().max().item())
        torch.testing.assert_close(actual[name].to(x.dtype), x, rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


def seq_idx_of(lengths: list[int]) -> Tensor:
    # Not increasing, and values reappear: only a change marks a boundary.
    return torch.cat([torch.full((length,), 5 if i % 2 else 3) for i, length in enumerate(lengths)])


class RecurrenceTests:
    """`recurrent` is taken for right here; the inheriting class checks it against the paper's equation."""

    recurrent: ClassVar[Form]
    chunked: ClassVar[Form]
    has_beta: ClassVar[bool]
    decays_by_channel: ClassVar[bool] = True
    # Shapes that do not fit, of [B, T, H, K] = [2, 10, 3, 8] and V = 12, and what is said of them.
    wrong: ClassVar[list[tuple[dict[str, tuple[int, ...]], str]]] = [
        ({"k": (2, 9, 3, 8)}, r"k has shape \(2, 9, 3, 8\), expected \(2, 10, 3, 8\)"),
        ({"initial_state": (2, 3, 12, 8)}, "transpose a state"),
        ({"seq_idx": (10,)}, "one document index per token"),
    ]

    def forms(self) -> list[Form]:
        return [self.recurrent, self.chunked]

    def inputs(
        self, tokens: int, *, state: bool = True, dtype: torch.dtype = torch.float64, **dims: int
    ) -> dict[str, Tensor]:
        """q, k, v, g, beta where there is one, and, if asked for, initial_state."""
        torch.manual_seed(0)
        sizes = {"batch": 2, "heads": 3, "key": 8, "value": 12} | dims
        shape, key, value = (sizes["batch"], tokens, sizes["heads"]), sizes["key"], sizes["value"]
        inputs = {
            "q": F.normalize(torch.randn(*shape, key, dtype=dtype), dim=-1),
            "k": F.normalize(torch.randn(*shape, key, dtype=dtype), dim=-1),
            "v": torch.randn(*shape, value, dtype=dtype),
            "g": -torch.rand(*shape, *([key] if self.decays_by_channel else []), dtype=dtype),
        }
        if self.has_beta:
            inputs["beta"] = 2 * torch.rand(*shape, dtype=dtype)
        if state:
            inputs["initial_state"] = torch.randn(sizes["batch"], sizes["heads"], key, value, dtype=dtype)
        return inputs

    def alone(self, inputs: dict[str, Tensor], lengths: list[int]) -> dict[str, Tensor]:
        """What `run` gives, from one call of the recurrent form per document."""
        leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
        state = leaves.get("initial_state")
        outputs, parts = [], {name: x.split(lengths, 1) for name, x in leaves.items() if name != "initial_state"}
        for i in range(len(lengths)):
            part = {name: x[i] for name, x in parts.items()}
            o, final_state = self.recurrent(**part, initial_state=None if i else state)
            outputs.append(o)
        return with_gradients(leaves, torch.cat(outputs, dim=1), final_state)

    @pytest.mark.parametrize("state", [False, True], ids=["zeros", "initial_state"])
    @pytest.mark.parametrize("tokens", [1, 2, 17, 63, 64, 65, 500])
    def test_chunk_equals_recurrent(self, tokens: int, state: bool) -> None:
        inputs = self.inputs(tokens, state=state)
        assert_close(run(self.chunked, inputs), run(self.recurrent, inputs))

    @pytest.mark.parametrize("state", [False, True], ids=["zeros", "initial_state"])
    def test_a_token_of_a_compiled_step(self, state: bool) -> None:
        """Which reads the state once for key and query: another form, whatever it is compiled to."""
        inputs = self.inputs(1, state=state)
        torch.compiler.reset()
        compiled = torch.compile(self.recurrent, backend="eager", fullgraph=True)
        assert_close(run(compiled, inputs, scale=0.7), run(self.recurrent, inputs, scale=0.7))

    @pytest.mark.parametrize("chunk_size", [16, 64, 128])
    def test_chunk_size_and_scale(self, chunk_size: int) -> None:
        inputs = self.inputs(150)
        expected = run(self.recurrent, inputs, scale=0.7)
        assert_close(run(self.chunked, inputs, scale=0.7, chunk_size=chunk_size), expected)

    @pytest.mark.parametrize("dims", [{"key": 5, "value": 3}, {"key": 32, "value": 8}, {"batch": 3, "heads": 12}])
    def test_other_shapes(self, dims: dict[str, int]) -> None:
        inputs = self.inputs(70, **dims)
        assert_close(run(self.chunked, inputs), run(self.recurrent, inputs))

    @pytest.mark.parametrize("used", [0, 1], ids=["o", "final_state"])
    def test_gradient_from_one_result_only(self, used: int) -> None:
        found = []
        for form in self.forms():
            leaves = {name: x.requires_grad_() for name, x in self.inputs(70).items()}
            loss = form(**leaves)[used].square().sum()
            options = {"allow_unused": True, "materialize_grads": True}
            gradients = torch.autograd.grad(loss, list(leaves.values()), **options)
            found.append(dict(zip(leaves, gradients, strict=True)))
        assert_close(found[1], found[0])

    @pytest.mark.parametrize("lengths", PACKINGS.values(), ids=PACKINGS.keys())
    def test_packed_documents_equal_documents_alone(self, lengths: list[int]) -> None:
        inputs = self.inputs(sum(lengths), batch=1)
        seq_idx, expected = seq_idx_of(lengths)[None], self.alone(inputs, lengths)
        for form in self.forms():
            assert_close(run(form, inputs, seq_idx=seq_idx), expected)

    def test_rows_are_packed_independently(self) -> None:
        rows = [PACKINGS["many in a chunk"] + [20], [33, 67]]
        seq_idx = torch.stack([seq_idx_of(lengths) for lengths in rows])
        inputs = self.inputs(100)
        expected = run(self.recurrent, inputs, seq_idx=seq_idx)
        assert_close(run(self.chunked, inputs, seq_idx=seq_idx.to(torch.int32)), expected)
        for row, lengths in enumerate(rows):
            alone = self.alone({name: x[row : row + 1] for name, x in inputs.items()}, lengths)
            torch.testing.assert_close(expected["o"][row], alone["o"][0], rtol=0, atol=1e-11)

    def test_no_leak_between_documents(self) -> None:
        """What one document contains changes nothing in the others, to the last bit, nor do gradients cross."""
        inputs, seq_idx = self.inputs(150, batch=1), seq_idx_of([20, 60, 70])[None]
        changed = {name: x.clone() for name, x in inputs.items()}
        names = [name for name in inputs if name != "initial_state"]
        for name in names:
            changed[name][:, 20:80] *= 0.3
        for form in self.forms():
            first, second = form(**inputs, seq_idx=seq_idx), form(**changed, seq_idx=seq_idx)
            assert torch.equal(first[0][:, :20], second[0][:, :20])
            assert not torch.equal(first[0][:, 20:80], second[0][:, 20:80])
            assert torch.equal(first[0][:, 80:], second[0][:, 80:])
            assert torch.equal(first[1], second[1])
            leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
            form(**leaves, seq_idx=seq_idx)[0][:, 80:].sum().backward()
            assert all(leaves[name].grad[:, :80].eq(0).all() for name in names)
            assert leaves["initial_state"].grad is None or leaves["initial_state"].grad.eq(0).all()

    @pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
    @pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS.keys())
    def test_decay_range(self, decay: Callable, packed: bool) -> None:
        inputs = self.inputs(130)
        inputs["g"] = decay(inputs["g"])
        options = {"seq_idx": seq_idx_of([10, 54, 3, 63]).expand(2, -1) if packed else None}
        expected = run(self.recurrent, inputs, **options)
        assert_close(run(self.chunked, inputs, **options), expected, 1e-11)
        # 3e-6: rounding of 130 float32 updates; the decays add nothing, however strong.
        assert_close(run(self.chunked, {name: x.float() for name, x in inputs.items()}, **options), expected, 3e-6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype: torch.dtype) -> None:
        # Computed in float32 from rounded inputs, so that only the rounding of results remains: 2^-8 for bfloat16.
        inputs = self.inputs(100, dtype=torch.float32)
        half = {name: x.to(dtype) if name in ("q", "k", "v", "beta") else x for name, x in inputs.items()}
        expected = run(self.recurrent, {name: x.double() for name, x in half.items()})
        for form in self.forms():
            found = run(form, half)
            assert found["o"].dtype == found["d_q"].dtype == dtype
            assert found["final_state"].dtype == found["d_g"].dtype == torch.float32
            assert_close(found, expected, 1e-2)
            assert_close({"s": found["final_state"]}, {"s": expected["final_state"]}, 1e-5)

    def test_autocast_does_not_reach_the_products(self) -> None:
        inputs = self.inputs(70, dtype=torch.float32)
        for form in self.forms():
            leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
            with torch.autocast("cpu", dtype=torch.bfloat16):
                results = form(**leaves)
            assert_close(with_gradients(leaves, *results), run(form, inputs), 1e-6)

    @pytest.mark.parametrize("cut", [1, 64, 100])
    def test_split_sequence_carries_the_state(self, cut: int) -> None:
        inputs = self.inputs(150)
        start = inputs.pop("initial_state")
        before = start.clone()
        o, state = self.recurrent(**inputs, initial_state=start)
        for form in self.forms():
            head, between = form(**{name: x[:, :cut] for name, x in inputs.items()}, initial_state=start)
            tail, end = form(**{name: x[:, cut:] for name, x in inputs.items()}, initial_state=between)
            assert_close({"o": torch.cat([head, tail], dim=1), "s": end}, {"o": o, "s": state}, 1e-12)
        assert torch.equal(start, before)  # nothing is done in place to the caller's state

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_under_gradient_checkpointing(self, reentrant: bool) -> None:
        inputs = self.inputs(70)
        expected = run(self.chunked, inputs)
        leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}

        def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            return self.chunked(**dict(zip(leaves, tensors, strict=True)))

        assert_close(with_gradients(leaves, *checkpoint(call, *leaves.values(), use_reentrant=reentrant)), expected)

    @pytest.mark.parametrize("tokens", [1, 70])
    def test_no_rows(self, tokens: int) -> None:
        inputs = self.inputs(tokens, batch=0)
        for form in self.forms():
            found = run(form, inputs)
            assert found["o"].shape == (0, tokens, 3, 12) and found["final_state"].shape == (0, 3, 8, 12)
            assert found["d_k"].shape == inputs["k"].shape

    def test_strided_inputs(self) -> None:
        inputs = self.inputs(70)
        strided = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in inputs.items()}
        assert_close(run(self.chunked, strided), run(self.chunked, inputs), 1e-12)

    def test_memory_of_the_graph_is_linear(self) -> None:
        """What the backward pass keeps per token does not grow with the number of tokens."""
        kept = []
        for tokens in (256, 512):
            inputs = {name: x.requires_grad_() for name, x in self.inputs(tokens).items()}
            sizes: dict[int, int] = {}
            with torch.autograd.graph.saved_tensors_hooks(
                lambda x, sizes=sizes: sizes.setdefault(x.data_ptr(), x.untyped_storage().nbytes()) and x, lambda x: x
            ):
                self.chunked(**inputs)
            kept.append(sum(sizes.values()) / tokens)
        assert kept[1] < 1.1 * kept[0]

    def test_wrong_shapes(self) -> None:
        for changes, message in self.wrong + RecurrenceTests.wrong:
            wrong = {
                name: torch.zeros(shape, dtype=torch.int64 if name == "seq_idx" else torch.float64)
                for name, shape in changes.items()
            }
            for form in self.forms():
                with pytest.raises(ValueError, match=message):
                    form(**self.inputs(10) | wrong)

    def test_other_wrong_arguments(self) -> None:
        with pytest.raises(ValueError, match="power of 2"):
            self.chunked(**self.inputs(10), chunk_size=48)
        with pytest.raises(ValueError, match="expected integers"):
            self.chunked(**self.inputs(10), seq_idx=torch.zeros(2, 10))


BY_CHANNEL: list[tuple[dict[str, tuple[int, ...]], str]] = [
    ({"q": (2, 10, 8)}, r"expected \[B, T, H, K\]"),
    ({"q": (2, 0, 3, 8)}, "no tokens"),
    ({"v": (2, 10, 1, 8)}, "repeat_interleave"),
    ({"g": (2, 10, 3)}, "one log decay per token, head and key channel"),
]


class DeltaRuleTests(RecurrenceTests):
    """Those that erase before they write, with a strength beta."""

    has_beta = True

    @pytest.mark.parametrize(("beta", "tolerance"), [(1.0, 1e-5), (1.99, 1e-4)])
    def test_identical_keys(self, beta: float, tolerance: float) -> None:
        """The worst case for the inverse of the triangular system: its Neumann powers overflow, its entries do not."""
        inputs = self.inputs(256, key=64, value=64, heads=2)
        inputs["k"] = inputs["k"][:, :1].expand_as(inputs["k"]).clone()
        inputs["beta"] = torch.full_like(inputs["beta"], beta)
        inputs["g"] *= 1e-4
        expected = run(self.recurrent, inputs)
        assert_close(run(self.chunked, inputs), expected, 1e-9)
        assert_close(run(self.chunked, {name: x.float() for name, x in inputs.items()}), expected, tolerance)

    def test_zero_beta_has_a_gradient(self) -> None:
        inputs = self.inputs(70)
        inputs["beta"] = inputs["beta"] * (inputs["beta"] > 1)
        assert_close(run(self.chunked, inputs), run(self.recurrent, inputs))
