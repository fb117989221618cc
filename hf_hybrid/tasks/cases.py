"""
Retrieval and aggregation tasks after RULER (arXiv 2404.06654): an offline subset, made here with our own words.

A case is a prompt of a given number of tokens, which the model's own tokenizer counts, and its answers. Everything is
drawn from a seed. What differs from RULER is told in `docs/evaluation.md`: prompts are shorter and plainer, so that
models of a hundred million parameters can answer them, numbers have six digits, and every answer has one right place,
so that one forward pass can tell whether greedy decoding would give it.
"""

import random
import string
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice, product
from typing import Any

from ..data.rows import text_prefix
from ..data.tokenise import Tokeniser
from .words import ADJECTIVES, NOISE, NOUNS, essay, sentences


# Tokens that every case leaves free behind its answers, for what a model says around them when it generates.
RESERVE = 16
_SHORTEST = 128
# Of lm-eval's own tasks, those that need neither a network nor a data set of the Hub.
OFFLINE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_cwe", "ruler_fwe")

# The first n units of a haystack.
Units = Callable[[int], list[str]]


@dataclass(frozen=True)
class Slot:
    """One place in the answer text: what stands before it, given to the model, and what is to be said there."""

    given: str
    answer: str


@dataclass(frozen=True)
class Case:
    """
    One prompt with its answers.

    Args:
        task (`str`): name in [`RULER_TASKS`].
        length (`int`): tokens asked for; prompt, answers and [`RESERVE`] are at most as many.
        index (`int`): of the case in its task and length.
        prompt (`str`): up to the place where the answer is to begin, without the space before it.
        slots (`tuple[Slot, ...]`): the answer text in pieces, of which each is judged given those before it.
        answers (`tuple[str, ...]`): what a generated text is searched for.
        tokens (`int`): of the prompt and the answer text, what the tokenizer puts before a text included.
        new_tokens (`int`): how many a model may generate.
    """

    task: str
    length: int
    index: int
    prompt: str
    slots: tuple[Slot, ...]
    answers: tuple[str, ...]
    tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Draft:
    """A case whose length is still open: `prompt(n)` has a haystack of `n` units and grows with it."""

    prompt: Callable[[int], str]
    slots: tuple[Slot, ...]
    answers: tuple[str, ...]
    fewest: int = 0
    most: int = 10**6


@dataclass(frozen=True)
class RulerTask:
    """
    Args:
        name (`str`): ours.
        after (`str`): RULER's name for what it follows; empty where it is our own.
        about (`str`): one line.
        draft (`Callable`): from a random generator and the haystack's sentences to a [`Draft`].
        answer (`str`): regular expression of what counts as one answer in a generated text.
    """

    name: str
    after: str
    about: str
    draft: Callable[[random.Random, Iterator[str]], Draft]
    answer: str


def ruler_cases(
    tokenizer: Any,
    *,
    tasks: Sequence[str] | None = None,
    lengths: Sequence[int] = (512, 1024, 2048),
    cases: int = 50,
    seed: int = 0,
    texts: Sequence[str] | None = None,
) -> list[Case]:
    """
    Draws the cases of a set of tasks, the same for the same arguments.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the model's, which counts tokens.
        tasks (`Sequence[str]`, *optional*): names in [`RULER_TASKS`], by default all.
        lengths (`Sequence[int]`): tokens of a case, the answers included, at most; a few less in each case.
        cases (`int`): how many for each task and length.
        seed (`int`): of everything random.
        texts (`Sequence[str]`, *optional*): documents whose sentences are the prose between the needles, taken from a
            random one on, again from the start where they are few; by default prose that is generated here.
    """
    chosen = check_tasks(tasks)
    if cases < 1:
        raise ValueError(f"cases={cases} is too few; pass at least 1.")
    if not lengths or min(lengths) < _SHORTEST:
        raise ValueError(f"lengths={list(lengths)} are no lengths of a case; pass at least {_SHORTEST} tokens each.")
    pool = None
    if texts is not None:
        pool = sentences(texts)
        if not pool:
            raise ValueError(f"the {len(texts)} texts for the haystack are empty; pass some prose, or leave them out.")
    before, tokeniser = len(text_prefix(tokenizer)), Tokeniser(tokenizer)

    def count(text: str) -> int:
        return before + len(tokeniser([text])[0])

    def drawn(which: tuple[RulerTask, int, int]) -> Case | int:
        task, length, index = which
        rng = random.Random(f"{seed} {task.name} {length} {index}")
        prose = essay(rng) if pool is None else _from_anywhere(pool, rng)
        return _fitted(task, task.draft(rng, prose), length, index, count)

    # In threads: nearly all of the time is the tokenizer's, which lets go of Python.
    with ThreadPoolExecutor(tokeniser.workers) as threads:
        found = list(threads.map(drawn, product(chosen, lengths, range(cases))))
    needs: dict[str, int] = {}
    for (task, _, _), case in zip(product(chosen, lengths, range(cases)), found, strict=True):
        if isinstance(case, int):
            needs[task.name] = max(case, needs.get(task.name, 0))
    if needs:
        raise ValueError(
            f"lengths={list(lengths)} have too short ones for this tokenizer: "
            f"{', '.join(f'{name} needs {tokens} tokens' for name, tokens in needs.items())}; pass "
            f"{max(needs.values())} or more, or other tasks."
        )
    return [case for case in found if isinstance(case, Case)]


def check_tasks(names: Sequence[str] | None) -> list[RulerTask]:
    """The tasks of these names, by default all; a `ValueError` for another name."""
    unknown = [name for name in names or () if name not in RULER_TASKS]
    if unknown:
        raise ValueError(f"there is no task {unknown[0]!r}; choose among {', '.join(RULER_TASKS)}.")
    return [RULER_TASKS[name] for name in names or RULER_TASKS]


def _from_anywhere(pool: Sequence[str], rng: random.Random) -> Iterator[str]:
    start = rng.randrange(len(pool))
    return islice(cycle(pool), start, None)


def _fitted(task: RulerTask, draft: Draft, length: int, index: int, count: Callable[[str], int]) -> Case | int:
    """
    The case with as long a haystack as `length` has room for, give or take a hundredth of it; the tokens that it needs
    where it does not fit.
    """
    answer = answer_text(draft.slots)
    new_tokens = count(draft.prompt(draft.fewest) + answer) - count(draft.prompt(draft.fewest)) + RESERVE
    new_tokens = max(new_tokens, count(" ".join(draft.answers)) + RESERVE)

    def needed(units: int) -> int:
        return count(draft.prompt(units)) + new_tokens

    low, used = draft.fewest, needed(draft.fewest)
    if used > length:
        return used
    high = draft.most + 1  # too many, as far as is known
    step = max(1, (length - used) // 16)
    while high - low > 1 and length - used > max(RESERVE, length // 100):
        middle = min(low + step, high - 1)
        now = needed(middle)
        if now > length:
            high = middle
            step = max(1, (high - low) // 2)
        else:
            # As many more as fit, if the next ones are as long as the last.
            step = max(1, (length - now) * (middle - low) // max(1, now - used))
            low, used = middle, now
    prompt = draft.prompt(low)
    return Case(task.name, length, index, prompt, draft.slots, draft.answers, count(prompt + answer), new_tokens)


def answer_text(slots: Sequence[Slot]) -> str:
    """The whole answer, as it would stand behind the prompt."""
    return "".join(slot.given + slot.answer for slot in slots)


def _listed(answers: Sequence[str], separator: str = ",") -> tuple[Slot, ...]:
    return tuple(Slot(separator if i else "", f" {answer}") for i, answer in enumerate(answers))


def _number(rng: random.Random) -> str:
    return str(rng.randrange(100_000, 1_000_000))


def _keys(rng: random.Random, count: int) -> list[str]:
    """Distinct names such as `quiet-harbor`."""
    numbers = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
    return [f"{ADJECTIVES[n // len(NOUNS)]}-{NOUNS[n % len(NOUNS)]}" for n in numbers]


def _hidden(units: Units, depths: Sequence[float], needles: Sequence[str]) -> Callable[[int], str]:
    """From a number of units of haystack to them with the needles at these relative depths, in order."""

    def text(n: int) -> str:
        parts = list(units(n))
        # From the back, so that the places in front stay what they are.
        for depth, needle in sorted(zip(depths, needles, strict=True), key=lambda pair: pair[0], reverse=True):
            parts.insert(int(depth * (n + 1)), needle)
        return " ".join(parts)

    return text


def _first(haystack: Iterator[str]) -> Units:
    """From `n` to the first `n` units of an endless haystack, which are the same each time."""
    drawn: list[str] = []

    def units(n: int) -> list[str]:
        drawn.extend(islice(haystack, max(0, n - len(drawn))))
        return drawn[:n]

    return units


def _depths(rng: random.Random, count: int) -> list[float]:
    return sorted(rng.random() for _ in range(count))


_NUMBER = r"\d+"
_WORD = r"[A-Za-z]+"
_NEEDLE = "The magic number of {} is {}."
_TASK = "Magic numbers are hidden in the following text. Remember them.\n\n{}\n\nQuestion: {}\nAnswer: {}"


def _single(rng: random.Random, units: Units, others: int) -> Draft:
    """A number that is asked for by its name, among `others` that are not asked for."""
    keys = _keys(rng, others + 1)
    values = [_number(rng) for _ in keys]
    asked = rng.randrange(len(keys))
    needles = [_NEEDLE.format(*pair) for pair in zip(keys, values, strict=True)]
    text = _hidden(units, _depths(rng, len(keys)), needles)
    question = f"What is the magic number of {keys[asked]}?"
    answer = f"The magic number of {keys[asked]} is"
    return Draft(
        lambda n: _TASK.format(text(n), question, answer), _listed([values[asked]]), (values[asked],), fewest=1
    )


def _single_noise(rng: random.Random, prose: Iterator[str]) -> Draft:
    return _single(rng, lambda n: [NOISE] * n, 0)


def _single_prose(rng: random.Random, prose: Iterator[str]) -> Draft:
    return _single(rng, _first(prose), 0)


def _multikey_prose(rng: random.Random, prose: Iterator[str]) -> Draft:
    return _single(rng, _first(prose), 3)


def _multikey_needles(rng: random.Random, prose: Iterator[str]) -> Draft:
    keys = _keys(rng, len(ADJECTIVES) * len(NOUNS))
    values = [_number(rng) for _ in keys]
    depth = rng.random()

    def units(n: int) -> list[str]:
        return [_NEEDLE.format(*pair) for pair in zip(keys[1 : n + 1], values[1 : n + 1], strict=True)]

    text = _hidden(units, [depth], [_NEEDLE.format(keys[0], values[0])])
    question, answer = f"What is the magic number of {keys[0]}?", f"The magic number of {keys[0]} is"
    return Draft(
        lambda n: _TASK.format(text(n), question, answer),
        _listed(values[:1]),
        (values[0],),
        fewest=1,
        most=len(keys) - 1,
    )


def _multivalue(rng: random.Random, prose: Iterator[str]) -> Draft:
    (key,) = _keys(rng, 1)
    values = [_number(rng) for _ in range(4)]
    needles = [f"One of the magic numbers of {key} is {value}." for value in values]
    text = _hidden(_first(prose), _depths(rng, len(values)), needles)
    question = f"What are the magic numbers of {key}, in the order of the text?"
    answer = f"The magic numbers of {key}, in the order of the text, are"
    return Draft(lambda n: _TASK.format(text(n), question, answer), _listed(values), tuple(values), fewest=1)


def _multiquery(rng: random.Random, prose: Iterator[str]) -> Draft:
    keys = _keys(rng, 4)
    values = [_number(rng) for _ in keys]
    needles = [_NEEDLE.format(*pair) for pair in zip(keys, values, strict=True)]
    text = _hidden(_first(prose), _depths(rng, len(values)), needles)
    order = rng.sample(range(len(keys)), len(keys))
    asked = [keys[i] for i in order]
    question = f"What are the magic numbers of {', '.join(asked[:-1])} and {asked[-1]}?"
    slots = tuple(
        Slot(f". The magic number of {keys[i]} is" if place else "", f" {values[i]}") for place, i in enumerate(order)
    )
    answer = f"The magic number of {asked[0]} is"
    return Draft(lambda n: _TASK.format(text(n), question, answer), slots, tuple(values[i] for i in order), fewest=1)


def _variable_tracking(rng: random.Random, prose: Iterator[str]) -> Draft:
    letters = (string.ascii_uppercase, "AEIOU", string.ascii_uppercase)
    names = rng.sample(["".join(name) for name in product(*letters)], 6)
    chains, values = (names[:3], names[3:]), (_number(rng), _number(rng))
    needles, depths = [], []
    for (first, second, third), value in zip(chains, values, strict=True):
        needles += [f"{value} is stored in {first}."]
        needles += [f"{one} is copied to {other}." for one, other in ((first, second), (second, third))]
        depths += _depths(rng, 3)
    text = _hidden(lambda n: [NOISE] * n, depths, needles)
    first, second, third = asked = tuple(names[:3])
    slots = (
        Slot("", f" {first}"),
        Slot(f". {first} is copied to", f" {second}"),
        Slot(f". {second} is copied to", f" {third}"),
    )
    before = "In the following text numbers are stored in variables and copied from one to another. Remember them."
    question = f"Question: Which variables have the value {values[0]}?\nAnswer: {values[0]} is stored in"
    return Draft(lambda n: f"{before}\n\n{text(n)}\n\n{question}", slots, asked, fewest=1)


def _common_words(rng: random.Random, prose: Iterator[str]) -> Draft:
    words = rng.sample(NOUNS + ADJECTIVES, len(NOUNS) + len(ADJECTIVES))
    common, others = words[:10], words[10:]
    shuffle_seed = rng.random()

    def prompt(n: int) -> str:
        # As in RULER's short form, a common word comes six times as often as any other; where all other words are in
        # use, all come more often.
        times, more = divmod(n, len(others))
        listed = [w for w in common for _ in range(6 * (times + 1))] + others * times + others[:more]
        random.Random(shuffle_seed).shuffle(listed)
        numbered = " ".join(f"{i + 1}. {word}" for i, word in enumerate(listed))
        question = "Question: Which ten words come most often in this list?\nAnswer: The ten most common words are"
        return f"In this list some words come more often than others.\n\n{numbered}\n\n{question}"

    # Their order is free, so nine are given and the last one has to be found.
    last = Slot(f" {', '.join(common[:-1])},", f" {common[-1]}")
    return Draft(prompt, (last,), tuple(common))


def _frequent_words(rng: random.Random, prose: Iterator[str]) -> Draft:
    coded = ["".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(2000)]
    vocabulary = list(dict.fromkeys(coded))
    shuffle_seed = rng.random()

    def prompt(n: int) -> str:
        # Zipf's law with exponent 2, as in RULER; the most frequent rank is the noise.
        words = []
        for rank, word in enumerate(["...", *vocabulary], start=1):
            times = int(n * 0.6079 / rank**2)  # 6 / pi^2, so that the sum is about n
            if times == 0:
                break
            words += [word] * times
        random.Random(shuffle_seed).shuffle(words)
        example = "Coded text: kkq ... abc ... kkq ... xyz abc kkq ...\nMost frequent words: kkq, abc, xyz"
        return f"{example}\n\nCoded text: {' '.join(words)}\nMost frequent words:"

    # The third word, of rank 4, comes twice.
    return Draft(prompt, _listed(vocabulary[:3]), tuple(vocabulary[:3]), fewest=54)


def _copying(rng: random.Random, prose: Iterator[str]) -> Draft:
    span = rng.sample(NOUNS, 24)
    units, depth = _first(prose), rng.random()
    text = _hidden(units, [depth], [f"The list reads: {' '.join(span)}."])
    seen = f"Once more, the list reads: {' '.join(span[:4])}"
    return Draft(
        lambda n: f"{text(n)}\n\n{seen}",
        tuple(Slot("", f" {word}") for word in span[4:]),
        tuple(span[4:]),
        fewest=1,
    )


RULER_TASKS = {
    task.name: task
    for task in (
        RulerTask("single_noise", "niah_single_1", "a number in noise that repeats", _single_noise, _NUMBER),
        RulerTask("single_prose", "niah_single_2", "a number in prose", _single_prose, _NUMBER),
        RulerTask("multikey_prose", "niah_multikey_1", "one of four numbers in prose", _multikey_prose, _NUMBER),
        RulerTask("multikey_needles", "niah_multikey_2", "a number among others only", _multikey_needles, _NUMBER),
        RulerTask("multivalue", "niah_multivalue", "the four numbers of one name", _multivalue, _NUMBER),
        RulerTask("multiquery", "niah_multiquery", "the numbers of four names", _multiquery, _NUMBER),
        RulerTask("variable_tracking", "vt", "variables with one value, by two hops", _variable_tracking, r"[A-Z]+"),
        RulerTask("common_words", "cwe", "the most common words of a list", _common_words, _WORD),
        RulerTask("frequent_words", "fwe", "the most frequent words of a coded text", _frequent_words, _WORD),
        RulerTask("copying", "", "a list of words that was seen before, continued", _copying, _WORD),
    )
}
