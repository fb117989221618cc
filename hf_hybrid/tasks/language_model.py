"""
A model in memory as a language model of lm-evaluation-harness.

lm-eval's own `HFLM` makes the logits of every token of a prompt, for a row of 8,192 tokens of a vocabulary of 49,152
1.6 GB in fp32. Here the backbone runs over all tokens and the head over those of the answers.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from hf_hybrid.trainers.digests import weights_digest
from hf_hybrid.trainers.distillation import final_hidden_states
from hf_hybrid.trainers.losses import check_logit_function, logit_function, tokens_per_chunk
from hf_hybrid.trainers.modes import evaluating
from hf_hybrid.trainers.precision import Precision

from ..data.rows import text_prefix
from ..data.tokenise import Tokeniser
from .answers import Answers, answer_key


# Tokens of one forward pass, where the caller does not say how many rows.
_BATCH_TOKENS = 2**15
# lm-eval's default.
_NEW_TOKENS = 256

# Tokens, and what belongs to them.
Row = TypeVar("Row", bound=tuple[list[int], Any])


class ModelLM(TemplateLM):
    """
    Args:
        model (`PreTrainedModel`): a causal language model, a hybrid or any other; it stays in the mode it is in.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        precision ([`Precision`]): what the model runs in.
        batch_size (`int`, *optional*): rows of one forward pass, by default as many as have 32,768 tokens.
        progress (`Callable`, *optional*): called with how many rows of a call are done, and how many there are.
        answers ([`Answers`], *optional*): where each answer is kept when its batch is done, and those of an earlier
            call are found.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        precision: Precision,
        batch_size: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        answers: Answers | None = None,
    ) -> None:
        super().__init__()
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is too small; pass at least 1.")
        check_logit_function(model, precision)
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.precision = batch_size, precision
        self.progress = progress or (lambda done, total: None)
        self.answers = answers
        self.whose = "" if answers is None else _whose(model, precision)
        self.before = text_prefix(tokenizer)
        self.tokens: dict[str, list[int]] = {}  # of the texts of the requests that are answered now
        self.max_length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._device = model.device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text, or one that begins it."""
        for token in (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id):
            if token is not None:
                return int(token)
        raise ValueError("the tokenizer has no token that ends or begins a text; set tokenizer.eos_token.")

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        return self.before[-1] if self.before else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """Where the tokenizer came from."""
        return str(self.tokenizer.name_or_path)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as one text, with the tokenizer's own template."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The tokens of a text, with what the tokenizer puts before one unless `add_special_tokens` is False."""
        tokens = self.tokens.get(string)
        if tokens is None:
            tokens = self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]
        # A chat template writes it into the text.
        has_it = tokens[: len(self.before)] == self.before
        return list(tokens) if add_special_tokens is False or has_it else [*self.before, *tokens]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """The log likelihood of each continuation behind its context, and whether greedy decoding gives it."""
        # All at once, in threads: one by one, tokenising a few thousand prompts takes longer than a small model does.
        pairs = [request.args for request in requests]
        texts = list(dict.fromkeys([text for context, more in pairs for text in (context.rstrip(), context + more)]))
        self.tokens = dict(zip(texts, (ids.tolist() for ids in Tokeniser(self.tokenizer)(texts)), strict=True))
        try:
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        finally:
            self.tokens = {}
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log likelihood of each whole text, in windows of the model's positions."""
        found = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=(self.max_length or _BATCH_TOKENS) - 1,
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in windows]
            found.append(sum(value for value, _ in self._loglikelihood_tokens([(("", ""), *pair) for pair in pairs])))
        return found

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """
        The log likelihood of each continuation behind its context, and whether greedy decoding gives it.

        A request whose tokens are the beginning of another's is answered by the same row: what a causal model says of
        a token does not depend on those that follow. For the same reason rows are padded on the right without a mask.
        """
        rows = _rows([(context, continuation) for _, context, continuation in requests])
        for tokens, _ in rows:
            self._check_length(len(tokens) - 1)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        logits, device = logit_function(self.model, self.precision), self.model.device
        chunk = tokens_per_chunk(self.model.config.get_text_config().vocab_size, self.model.device)
        keys = [self._key("likelihood", tokens, [place[1:] for place in asked]) for tokens, asked in rows]
        unknown = []
        for row, key in zip(rows, keys, strict=True):
            if (answer := self._known(key)) is None:
                unknown.append((row[0], (row[1], key)))
                continue
            for (request, _, _), (value, hit) in zip(row[1], answer, strict=True):
                found[request] = (value, hit)
        done = len(rows) - len(unknown)
        with evaluating(self.model), self.precision.running(device):
            for batch in _batches(unknown, self.batch_size):
                self.progress(done, len(rows))
                done += len(batch)
                width = max(len(tokens) for tokens, _ in batch) - 1
                ids = torch.zeros(len(batch), width, dtype=torch.int64)
                where: list[int] = []
                targets: list[int] = []
                owners: list[tuple[int, int]] = []
                for i, (tokens, (asked, _)) in enumerate(batch):
                    ids[i, : len(tokens) - 1] = torch.tensor(tokens[:-1])
                    for request, start, end in asked:
                        where += range(i * width + start - 1, i * width + end - 1)
                        targets += tokens[start:end]
                        owners.append((request, end - start))
                hidden = final_hidden_states(self.model, {"input_ids": ids.to(device)}, self.precision)
                hidden = hidden.flatten(0, 1)[torch.tensor(where, device=device)]
                wanted = torch.tensor(targets, device=device)
                values, hits = [], []
                for part, target in zip(hidden.split(chunk), wanted.split(chunk), strict=True):
                    logprobs = logits(part).float().log_softmax(-1)
                    values.append(logprobs.gather(-1, target[:, None])[:, 0])
                    hits.append(logprobs.argmax(-1) == target)
                counts = [count for _, count in owners]
                value_parts, hit_parts = torch.cat(values).cpu().split(counts), torch.cat(hits).cpu().split(counts)
                for (request, _), value, hit in zip(owners, value_parts, hit_parts, strict=True):
                    found[request] = (value.double().sum().item(), bool(hit.all()))
                self._keep([(key, [found[request] for request, _, _ in asked]) for _, (asked, key) in batch])
        return found

    def _key(self, *asked: Any) -> str:
        return "" if self.answers is None else answer_key(self.whose, *asked)

    def _known(self, key: str) -> Any:
        return None if self.answers is None else self.answers.find(key)

    def _keep(self, answers: list[tuple[str, Any]]) -> None:
        if self.answers is not None:
            self.answers.keep(answers)

    @torch.no_grad()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each context, greedily unless the request says otherwise."""
        prompts, asked = [], []
        # One batch has one set of options, whatever number of tokens each of its requests may have.
        sets: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            options = dict(request.args[1])
            most = options.pop("max_gen_toks", None) or options.pop("max_new_tokens", None) or _NEW_TOKENS
            prompts.append(self.tok_encode(request.args[0]))
            asked.append((int(most), options))
            sets.setdefault(repr(sorted(options.items())), []).append(i)
        found = [""] * len(requests)
        for numbers in sets.values():
            options = asked[numbers[0]][1]
            stops = _stop_texts(options)
            given: dict[str, Any] = {"stops": stops, "options": options}
            written = self.write_all([prompts[i] for i in numbers], [asked[i][0] for i in numbers], **given)
            for i, tokens in zip(numbers, written, strict=True):
                found[i] = _until(self.tokenizer.decode(tokens, skip_special_tokens=True), stops)
        return found

    def write_all(
        self, prompts: Sequence[list[int]], new_tokens: int | Sequence[int], **options: Any
    ) -> list[list[int]]:
        """[`write`] in batches, for prompts of any lengths, with a limit for all or one for each."""
        limits = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else list(new_tokens)
        for tokens, limit in zip(prompts, limits, strict=True):
            self._check_length(len(tokens) + limit)
        keys = [self._key("written", *asked, repr(options)) for asked in zip(prompts, limits, strict=True)]
        found: list[list[int]] = [self._known(key) or [] for key in keys]
        left = [i for i, key in enumerate(keys) if self._known(key) is None]
        left.sort(key=lambda i: (-len(prompts[i]), -limits[i]))
        while left:
            width = len(prompts[left[0]])
            size = self.batch_size or max(1, _BATCH_TOKENS // (width + limits[left[0]]))
            # All of a batch write as many as the one that may write most: the longest prompt must have room for them.
            room = None if self.max_length is None else self.max_length - width
            batch = [i for i in left[:size] if room is None or limits[i] <= room]
            most = max(limits[i] for i in batch)
            for i, tokens in zip(batch, self.write([prompts[i] for i in batch], most, **options), strict=True):
                found[i] = tokens[: limits[i]]
            self._keep([(keys[i], found[i]) for i in batch])
            written = set(batch)
            left = [i for i in left if i not in written]
            self.progress(len(prompts) - len(left), len(prompts))
        return found

    @torch.no_grad()
    def write(
        self,
        prompts: Sequence[list[int]],
        new_tokens: int,
        *,
        stops: Sequence[str] = (),
        options: dict[str, Any] | None = None,
    ) -> list[list[int]]:
        """
        The tokens that the model writes behind each of these, in one batch, greedily unless `options` of `generate`
        say otherwise: at most `new_tokens`, up to the end of the text, that token included, where it ends before.
        """
        width, device = max(map(len, prompts)), self.model.device
        ids, mask = torch.zeros(2, len(prompts), width, dtype=torch.int64)
        for i, tokens in enumerate(prompts):
            ids[i, width - len(tokens) :] = torch.tensor(tokens)
            mask[i, width - len(tokens) :] = 1
        options = dict(options or {})
        if not options.get("do_sample"):
            options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        criteria = stop_sequences_criteria(self.tokenizer, list(stops), width, len(prompts)) if stops else None
        with evaluating(self.model), self.precision.running(device):
            out = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=new_tokens,
                pad_token_id=self.eot_token_id,
                stopping_criteria=criteria,
                **options,
            )
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [self.eot_token_id if ends is None else ends])
        return [_ended(row, ends) for row in out[:, width:].tolist()]

    def _check_length(self, tokens: int) -> None:
        if self.max_length is not None and tokens > self.max_length:
            raise ValueError(
                f"a request has {tokens} tokens, the model {self.max_length} positions; pass shorter lengths."
            )


def _whose(model: Any, precision: Precision) -> str:
    """
    A digest of whose the answers are: of other weights, of another config, such as another window in the same weights,
    or in another precision they are other answers.
    """
    configs = [config.to_json_string(use_diff=False) for config in (model.config, model.generation_config)]
    return answer_key(weights_digest(model), *configs, str(precision), str(model.dtype))


def _stop_texts(options: dict[str, Any]) -> list[str]:
    until = options.pop("until", None) or []
    return [until] if isinstance(until, str) else list(until)


def _ended(tokens: list[int], ends: set[int]) -> list[int]:
    """Up to the first token that ends a text; what follows it in a batch is padding."""
    last = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: last + 1]


def _until(text: str, stops: Iterable[str]) -> str:
    for stop in stops:
        text = text.split(stop, 1)[0] if stop else text
    return text


def _rows(requests: Sequence[tuple[list[int], list[int]]]) -> list[tuple[list[int], list[tuple[int, int, int]]]]:
    """
    Rows of tokens, the longest first, and for each what is asked of it: request, start and end of the continuation.

    Rows are as few as they can be: no one is the beginning of another.
    """
    # Sorted, a sequence stands right before those that it is the beginning of.
    order = sorted(range(len(requests)), key=lambda i: requests[i][0] + requests[i][1])
    rows: list[tuple[list[int], list[tuple[int, int, int]]]] = []
    for i in reversed(order):
        context, continuation = requests[i]
        tokens, asked = context + continuation, (i, len(context), len(context) + len(continuation))
        if rows and rows[-1][0][: len(tokens)] == tokens:
            rows[-1][1].append(asked)
        else:
            rows.append((tokens, [asked]))
    return sorted(rows, key=lambda row: -len(row[0]))


def _batches(rows: Sequence[Row], batch_size: int | None) -> Iterable[Sequence[Row]]:
    """Rows, of which the longest come first, in batches of `batch_size` or of as many as have 32,768 tokens."""
    start = 0
    while start < len(rows):
        size = batch_size or max(1, _BATCH_TOKENS // len(rows[start][0]))
        yield rows[start : start + size]
        start += size
