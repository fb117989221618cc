"""Every way to generate gives what the uncached forward pass gives, for every mixer; what cannot is refused."""

import warnings

import pytest
import torch
from teachers import tiny_teacher, tokens
from transformers import CompileConfig, DynamicCache, GenerationConfig, StaticCache

import hf_hybrid as hh
from hf_hybrid.modeling import MIXERS, kernels


WINDOW = {"sliding_window": {"mixer_options": {"window": 6}}}
GREEDY = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

mixers = pytest.mark.parametrize("mixer", MIXERS)
layouts = pytest.mark.parametrize("layers", [[1, 3], []], ids=["alternating", "all_linear"])


# torch's own compiler, which takes half a minute a model, for the mixer that is there by default; for the others what
# can be wrong in our code: that a step is one graph, and with which shapes.
compilers = pytest.mark.parametrize(
    ("mixer", "backend"), [(m, "inductor" if m == "gated_deltanet" else "aot_eager") for m in MIXERS]
)


def hybrid(mixer="gated_deltanet", layers=(1, 3), num_layers=4, **options):
    """A hybrid in fp32 whose logits are of the size of a trained model's, on which 1e-5 says something."""
    torch.manual_seed(1)
    teacher = tiny_teacher(num_hidden_layers=num_layers)
    model = hh.convert(teacher, list(layers), mixer=mixer, **{**WINDOW.get(mixer, {}), **options})
    with torch.no_grad():
        model.lm_head.weight.mul_(0.3)
    return model


def left_padded(lengths=(4, 11, 9)):
    """Prompts of these lengths, padded on the left, their mask, and the prompts alone `[1, T]`."""
    longest = max(lengths)
    alone = [tokens(1, n, seed=n) for n in lengths]
    ids = torch.cat([torch.nn.functional.pad(x, (longest - x.shape[1], 0)) for x in alone])
    mask = torch.stack([torch.arange(longest) >= longest - n for n in lengths]).long()
    return ids, mask, alone


def tensors_of(cache):
    """All tensors of a cache: keys, values, states and counts."""
    held = [x for layer in cache.layers for x in vars(layer).values()]
    held += [x for states in held if isinstance(states, dict) for x in states.values()]
    return [x for x in held if isinstance(x, torch.Tensor)]


def by_hand(model, ids, steps=8):
    """Greedy decoding without a cache: ids `[1, T + steps]` and the logits `[steps, vocabulary]`."""
    logits = []
    with torch.no_grad():
        for _ in range(steps):
            last = model(ids, use_cache=False).logits[:, -1].clone()
            logits.append(last[0].clone())
            last[:, 2] = -torch.inf  # min_new_tokens: the end-of-sequence token is not chosen
            ids = torch.cat([ids, last.argmax(-1, keepdim=True)], 1)
    return ids, torch.stack(logits)


@mixers
@layouts
class TestGreedy:
    def test_padded_batch_is_each_prompt_decoded_by_hand(self, mixer, layers):
        model, (ids, mask, alone) = hybrid(mixer, layers), left_padded()
        expected = [by_hand(model, prompt) for prompt in alone]
        options = GREEDY | {"attention_mask": mask, "output_logits": True, "return_dict_in_generate": True}
        for how in (
            {},
            {"prefill_chunk_size": 1},
            {"prefill_chunk_size": 3},
            {"prefill_chunk_size": 100},
            {"cache_implementation": "static", "disable_compile": True},
            {"use_cache": False},
        ):
            out = model.generate(ids, **options, **how)
            for row, (prompt, (sequence, logits)) in enumerate(zip(alone, expected, strict=True)):
                assert torch.equal(out.sequences[row, ids.shape[1] :], sequence[0, prompt.shape[1] :]), how
                torch.testing.assert_close(torch.stack(out.logits)[:, row], logits, **CLOSE, msg=str(how))

    def test_one_padded_prompt(self, mixer, layers):
        model, prompt = hybrid(mixer, layers), tokens(1, 9)
        ids, mask = torch.nn.functional.pad(prompt, (5, 0)), torch.ones(1, 14, dtype=torch.long)
        mask[:, :5] = 0
        got = model.generate(ids, attention_mask=mask, **GREEDY)
        assert torch.equal(got[:, 14:], by_hand(model, prompt)[0][:, 9:])

    @pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
    def test_continuing_from_a_returned_cache(self, mixer, layers, static):
        model, (ids, mask, _) = hybrid(mixer, layers), left_padded()
        cache = StaticCache(config=model.config, max_cache_len=40) if static else None
        options = GREEDY | {"return_dict_in_generate": True, "disable_compile": True}
        whole = model.generate(ids, attention_mask=mask, **options).sequences
        short = options | {"max_new_tokens": 3, "min_new_tokens": 3}
        first = model.generate(ids, attention_mask=mask, past_key_values=cache, **short)
        assert torch.equal(first.sequences, whole[:, :-5])
        options |= {"max_new_tokens": 5, "min_new_tokens": 5}
        mask = torch.nn.functional.pad(mask, (0, 3), value=1)
        rest = model.generate(first.sequences, attention_mask=mask, past_key_values=first.past_key_values, **options)
        assert torch.equal(rest.sequences, whole)

    def test_another_turn_in_the_same_cache(self, mixer, layers):
        model, ids = hybrid(mixer, layers), tokens(1, 20)
        cache = DynamicCache(config=model.config)
        first = model.generate(ids[:, :12], past_key_values=cache, **GREEDY)
        turn = torch.cat([first, ids[:, 12:]], 1)
        got = model.generate(turn, past_key_values=cache, **GREEDY)
        assert torch.equal(got, by_hand(model, turn)[0])


@mixers
class TestOtherWays:
    @pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
    def test_beams(self, mixer, how):
        model, (ids, mask, _) = hybrid(mixer), left_padded()
        wanted = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY, **how)
        for cache in ({}, {"cache_implementation": "static", "disable_compile": True}):
            assert torch.equal(model.generate(ids, attention_mask=mask, **cache, **GREEDY, **how), wanted), cache

    def test_sampling(self, mixer):
        model, (ids, mask, _) = hybrid(mixer), left_padded()
        how = {"do_sample": True, "top_k": 20, "temperature": 0.8, "num_return_sequences": 2, "max_new_tokens": 8}
        texts = []
        for cache in ({}, {"cache_implementation": "static", "disable_compile": True}, {"use_cache": False}):
            torch.manual_seed(3)
            texts.append(model.generate(ids, attention_mask=mask, **cache, **how))
        assert torch.equal(texts[0], texts[2]) and torch.equal(texts[1], texts[2])

    def test_embeddings_for_a_prompt(self, mixer):
        model, ids = hybrid(mixer), tokens(2, 9)
        embeddings = model.get_input_embeddings()(ids)
        assert torch.equal(model.generate(inputs_embeds=embeddings, **GREEDY), model.generate(ids, **GREEDY)[:, 9:])

    @layouts
    def test_steps_with_a_static_cache_have_the_same_shapes(self, mixer, layers):
        model, (ids, mask, _) = hybrid(mixer, layers), left_padded()
        shapes = []

        def note(module, args, kwargs):
            shapes.append({name: x.shape for name, x in kwargs.items() if isinstance(x, torch.Tensor)})

        wanted = model.generate(ids, attention_mask=mask, **GREEDY)
        model.register_forward_pre_hook(note, with_kwargs=True)
        static = {"cache_implementation": "static", "disable_compile": True}
        assert torch.equal(model.generate(ids, attention_mask=mask, **static, **GREEDY), wanted)
        assert len(shapes) == 8 and "attention_mask" in shapes[1]
        assert all(shape == shapes[1] for shape in shapes[1:])

    @layouts
    def test_steps_write_a_static_cache_where_it_is(self, mixer, layers):
        """A CUDA graph reads and writes fixed addresses."""
        convolution = {} if mixer == "sliding_window" else {"mixer_options": {"short_convolution": 4}}
        model, ids = hybrid(mixer, layers, **convolution), tokens(2, 20)
        cache, seen = StaticCache(config=model.config, max_cache_len=20), []
        with torch.no_grad():
            for piece in ids.split([9, 1, 1, 5, 1, 3], dim=1):
                logits = model(piece, past_key_values=cache, use_cache=True).logits[:, -1]
                seen.append([x.data_ptr() for x in tensors_of(cache)])
            torch.testing.assert_close(logits, model(ids, use_cache=False).logits[:, -1], **CLOSE)
        assert len(seen[0]) >= 4 and all(addresses == seen[0] for addresses in seen)
        assert int(cache.get_seq_length()) == 20


@pytest.mark.parametrize(
    "mixer", [pytest.param(m, marks=[pytest.mark.slow] if m != "gated_deltanet" else []) for m in MIXERS]
)
@layouts
def test_all_steps_with_a_static_cache_are_one_graph(mixer, layers, monkeypatch):
    """
    Traced once for prompts of two lengths and in parts, a padded batch, and sampling; what it is compiled to is
    torch's.
    """
    model, (ids, mask, _) = hybrid(mixer, layers[:1], num_layers=2), left_padded()
    graphs, choose = [], kernels._runs_on_fla

    def runs_on_fla(*args):  # on a GPU it looks for packages and versions, and what it finds cuts graphs
        if torch.compiler.is_compiling():
            raise RuntimeError("fla was asked for within a graph")
        return choose(*args)

    monkeypatch.setattr(kernels, "_runs_on_fla", runs_on_fla)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = CompileConfig(fullgraph=True, backend=backend, mode=None)
    compiled._compile_all_devices = True  # the library leaves CPUs out
    static = {"cache_implementation": "static", "compile_config": compiled, "max_cache_len": 32}
    sampled = {"do_sample": True, "top_k": 20, "max_new_tokens": 8}
    warnings.filterwarnings("error", message="Dynamo detected a call to a `functools.lru_cache`")
    for length, how in ((11, GREEDY), (9, GREEDY), (11, GREEDY | {"prefill_chunk_size": 3}), (11, sampled)):
        texts = []
        for options in (static, {}):
            torch.manual_seed(3)
            given = {"attention_mask": mask[:, -length:], **options, **how}
            texts.append(model.generate(ids[:, -length:], **given))
        assert torch.equal(*texts), (length, how)
    cache = StaticCache(config=model.config, max_cache_len=32)
    for length in (11, 9):  # one cache for several prompts, where it is
        given = {"attention_mask": mask[:, -length:], **GREEDY}
        wanted = model.generate(ids[:, -length:], **given)
        got = model.generate(ids[:, -length:], past_key_values=cache, compile_config=compiled, **given)
        assert torch.equal(got, wanted)
        addresses = [x.data_ptr() for x in tensors_of(cache)]
        cache.reset()
        assert [x.data_ptr() for x in tensors_of(cache)] == addresses and not any(tensors_of(cache)[-1].flatten())
    assert model._compiled_call is not None
    assert len(graphs) == 1


@pytest.mark.slow
@compilers
class TestTheCompiledStep:
    def test_with_a_static_cache(self, mixer, backend):
        model, ids = hybrid(mixer, [1], num_layers=2), tokens(2, 9)
        torch.compiler.reset()
        compiled = CompileConfig(fullgraph=True, backend=backend, mode=None)
        compiled._compile_all_devices = True
        got = model.generate(ids, cache_implementation="static", compile_config=compiled, **GREEDY)
        assert model._compiled_call is not None
        assert torch.equal(got, model.generate(ids, **GREEDY))

    def test_with_a_dynamic_cache(self, mixer, backend):
        model, ids = hybrid(mixer, [1], num_layers=2), tokens(2, 9)
        torch.compiler.reset()
        step = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
        with torch.no_grad():
            out = model(ids, use_cache=True)
            for _ in range(8):
                ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1)
                out = step(ids[:, -1:], past_key_values=out.past_key_values, use_cache=True)
            torch.testing.assert_close(out.logits[:, -1], model(ids).logits[:, -1], **CLOSE)


class TestSoftmaxOnlyCopy:
    """It does what its teacher does, whatever it is given."""

    def pair(self):
        teacher = tiny_teacher()
        return teacher, hh.convert(teacher, range(4))

    def test_positions_that_repeat_in_a_cache(self):
        ids, outputs = tokens(1, 14), []
        for model in self.pair():
            cache = model(ids[:, :10], use_cache=True).past_key_values
            positions = torch.tensor([[10, 11, 11, 12]])
            out = model(ids[:, 10:], position_ids=positions, past_key_values=cache, use_cache=True)
            assert out.past_key_values is cache and cache.get_seq_length() == 14
            outputs.append(out.logits)
        assert torch.equal(*outputs)

    def test_packed_rows_with_a_cache_and_without(self):
        ids, positions = tokens(2, 12), torch.arange(6).repeat(2, 2)
        for options in ({}, {"use_cache": False}, {"use_cache": True}, {"attention_mask": torch.ones_like(ids)}):
            outputs = [model(ids, position_ids=positions, **options) for model in self.pair()]
            assert torch.equal(outputs[0].logits, outputs[1].logits)
            assert (outputs[0].past_key_values is None) == (outputs[1].past_key_values is None)

    def test_assisted_decoding(self):
        teacher, copy = self.pair()
        ids = tokens(1, 6).repeat(1, 3)
        for options in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": tiny_teacher()}):
            assert torch.equal(copy.generate(ids, **GREEDY, **options), teacher.generate(ids, **GREEDY))
        linearised = hh.convert(teacher, range(4))
        linearised.set_full_attention_layers([1])
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            linearised.generate(ids, prompt_lookup_num_tokens=2)


@mixers
@pytest.mark.parametrize("convolution", [0, 4])
def test_gradients_through_a_cache_are_those_of_the_whole_row(mixer, convolution):
    """A prompt, some tokens at once, then one at a time, all with gradients, against one pass over the row."""
    options = {"window": 6} if mixer == "sliding_window" else {"short_convolution": convolution}
    torch.manual_seed(1)
    model = hh.convert(tiny_teacher(dtype=torch.float64), [1], mixer=mixer, mixer_options=options)
    ids, weight = tokens(2, 14), torch.randn(2, 14, 99, dtype=torch.float64)
    (model(ids, use_cache=False).logits * weight).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    cache, logits = DynamicCache(config=model.config), []
    for piece in ids.split([6, 5, 1, 1, 1], dim=1):
        logits.append(model(piece, past_key_values=cache, use_cache=True).logits)
    (torch.cat(logits, dim=1) * weight).sum().backward()
    for name, parameter in model.named_parameters():
        error = (parameter.grad - expected[name]).abs().max() / expected[name].abs().max()
        assert error < 1e-5, f"{name}: {error:.1e} of the largest gradient"  # norms and angles are fp32


class TestRefused:
    """By the library's own checks, or with a message of its kind."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"prompt_lookup_num_tokens": 2}, "assisted generation is not supported with stateful models"),
            ({"assistant_early_exit": 1}, "assisted generation is not supported with stateful models"),
            ({"cache_implementation": "quantized"}, r"only full attention layers.*'linear_attention'"),
            ({"cache_implementation": "paged"}, "continuous batching cannot hold the recurrent states"),
        ],
    )
    def test_generate(self, options, message):
        with pytest.raises(ValueError, match=message):
            hybrid().generate(tokens(1, 8), max_new_tokens=3, **options)

    def test_an_assistant(self):
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            hybrid().generate(tokens(1, 8), max_new_tokens=3, assistant_model=hybrid())

    def test_continuous_batching(self):
        with pytest.raises(ValueError, match="continuous batching cannot hold the recurrent states"):
            hybrid().generate_batch([[5, 6, 7]], generation_config=GenerationConfig(max_new_tokens=3))

    def test_going_back(self):
        cache = hybrid()(tokens(1, 8), use_cache=True).past_key_values
        with pytest.raises(RuntimeError, match="does not track past states"):
            cache.crop(-1)

    def test_an_empty_prompt_as_the_library_does(self):
        empty, messages = torch.zeros(1, 0, dtype=torch.long), []
        for model in (tiny_teacher(), hybrid(), hybrid(layers=[])):
            with pytest.raises(RuntimeError) as error:
                model.generate(empty, max_new_tokens=3)
            messages.append(str(error.value))
        assert len(set(messages)) == 1

    def test_masks_that_linear_layers_cannot_follow(self):
        ids, mask = tokens(2, 8), torch.ones(2, 1, 8, 8).tril().bool()
        for bad in (mask, {"full_attention": mask}):
            with pytest.raises(ValueError, match=r"attention_mask is .*pass a mask \[batch, tokens\]"):
                hybrid()(ids, attention_mask=bad)
        model = hybrid(layers=[0, 1, 2, 3])  # softmax alone can
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, model(ids).logits, **CLOSE)
