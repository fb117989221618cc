"""Free generation: what a model writes beside what its teacher writes, and how much it repeats itself."""

from collections.abc import Callable, Sequence
from typing import Any

from hf_hybrid.trainers.held_out import standard_error
from hf_hybrid.trainers.precision import AS_LOADED, Precision

from .answers import Answers
from .language_model import ModelLM
from .repetition import agreement, common_prefix, is_looping, repetition
from .scores import Figure, GenerationSample, GenerationScore, share_error


PROMPTS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a short story about a dog that learns to swim.",
    "List five things to pack for a trip to the mountains.",
    "What is the difference between a city and a village?",
    "Give three tips for learning a new language.",
    "Describe how bread is made.",
    "Why do leaves change their color in autumn?",
    "Write a polite email that asks for a day off.",
    "What does a doctor do on a usual day?",
    "Explain what a computer program is to a child.",
    "How do plants make their food?",
    "Write a short poem about the sea.",
    "What are the main parts of a bicycle?",
    "Tell me something interesting about bees.",
    "How can one save water at home?",
    "Summarize what happens when water boils.",
    "Write a Python function that adds two numbers, and explain it.",
    "What is a good breakfast, and why?",
    "Describe a market on a busy morning.",
    "What are the seasons of the year and how do they differ?",
    "Give instructions for making a cup of tea.",
    "Why is sleep important?",
    "What is the purpose of a library?",
    "Write a dialogue between a teacher and a student about fractions.",
    "How does a bridge carry its load?",
    "Name some animals that live in the desert and how they get by.",
    "What would you show a visitor in your town?",
    "Explain how to plant a tree.",
    "What makes a good friend?",
    "How did people send messages before the telephone?",
    "Describe the life of a river from its spring to the sea.",
    "Write an advertisement for a small bakery.",
)


def free_generation(
    model: Any,
    tokenizer: Any,
    teacher: Any = None,
    *,
    prompts: Sequence[str] | None = None,
    new_tokens: int = 128,
    batch_size: int | None = None,
    precision: Precision = AS_LOADED,
    progress: Callable[[int, int], None] | None = None,
    answers: Answers | None = None,
) -> GenerationScore:
    """
    Lets a model, and its teacher beside it, write greedily behind each prompt, and compares what they wrote.

    Args:
        model, teacher (`PreTrainedModel`): of one tokenizer. Without a teacher there is only repetition to measure.
        tokenizer (`PreTrainedTokenizerBase`): theirs. Where it has a chat template, a prompt is a user's message.
        prompts (`Sequence[str]`, *optional*): by default [`PROMPTS`].
        new_tokens (`int`): how many each may write at most.
        batch_size (`int`, *optional*): rows at once, by default as many as have 32,768 tokens.
        precision ([`Precision`]): what both run in, by default each in the dtype of its weights.
        progress (`Callable`, *optional*): called with how many prompts are done, and how many there are.
        answers ([`Answers`], *optional*): a file of answers that a killed evaluation goes on behind.
    """
    prompts = list(PROMPTS if prompts is None else prompts)
    if not prompts or new_tokens < 1:
        raise ValueError(f"{len(prompts)} prompts and new_tokens={new_tokens}: pass at least one of each.")
    common: dict[str, Any] = {"batch_size": batch_size, "precision": precision, "progress": progress}
    common["answers"] = answers
    ours = _written(ModelLM(model, tokenizer, **common), prompts, new_tokens)
    theirs = None if teacher is None else _written(ModelLM(teacher, tokenizer, **common), prompts, new_tokens)
    result = GenerationScore(len(prompts), new_tokens)
    result.repetition, result.looping = _repeated(ours)
    if theirs is not None:
        result.teacher_repetition, result.teacher_looping = _repeated(theirs)
        pairs = list(zip(ours, theirs, strict=True))
        result.agreement = _figure([agreement(mine, other) for mine, other in pairs])
        result.common_prefix = _figure([float(common_prefix(mine, other)) for mine, other in pairs])
    for i, prompt in enumerate(prompts):
        texts = [None if of is None else tokenizer.decode(of[i], skip_special_tokens=True) for of in (ours, theirs)]
        result.samples.append(GenerationSample(prompt, texts[0] or "", texts[1]))
    return result


def _written(lm: ModelLM, prompts: Sequence[str], new_tokens: int) -> list[list[int]]:
    texts = list(prompts)
    if lm.tokenizer.chat_template is not None:
        texts = [lm.apply_chat_template([{"role": "user", "content": prompt}]) for prompt in prompts]
    return lm.write_all([lm.tok_encode(text) for text in texts], new_tokens)


def _repeated(written: Sequence[Sequence[int]]) -> tuple[Figure, Figure]:
    loops = [float(is_looping(tokens)) for tokens in written]
    return _figure([repetition(tokens) for tokens in written]), Figure(sum(loops) / len(loops), share_error(loops))


def _figure(values: Sequence[float]) -> Figure:
    return Figure(sum(values) / len(values), standard_error(values))
