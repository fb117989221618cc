"""
Text written by the teacher itself: sections of textbooks, and instructions with their answers.

    python benchmarks/smollm2/written.py --teacher TEACHER --output DIR --tokens N [--seed 0] [--trial]

writes `DIR/train/{textbook,instructions}.jsonl` and `DIR/held_out/{textbook,instructions}.jsonl`, a document a line,
with `written.json`, which counts them and what was dropped. A topic is held out or trained on, never both. Each batch
is drawn from the seed and its number, and appended when it is done: after a kill, the same command goes on. On a GPU
the four sets are written side by side, each by a process of its own: a step waits for Python.

An instruction's `text` is its `messages` under the teacher's chat template, without the last end-of-turn token: that
is the teacher's end-of-sequence token, which a packer of documents puts behind each anyway.
"""

import argparse
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from hf_hybrid.teacher.loading import load_pair


FOLDER = Path(__file__).parent
PARTS, DOMAINS = ("held_out", "train"), ("textbook", "instructions")
# In the order in which one process writes them: instructions have passages of their part's textbook.
SETS = tuple((part, domain) for part in PARTS for domain in DOMAINS)
TEXTBOOK_SHARE = 0.6  # of the tokens; the rest are instructions
HELD_OUT_SHARE, MOST_HELD_OUT = 0.05, 300_000  # of the topics and of the tokens; tokens of a domain, at most
SYNCHRONISE = 32  # steps between two looks at what is finished; nothing waits for the device in between
FEWEST = 128  # documents of a batch, where a batch may have as many
EXPECTED = 160  # tokens that are kept of a document that was asked for; half of the answers repeat themselves
_FEWER = 0.8  # rows are thrown out of the batch when at most this share of them is unfinished

ASPECTS = (
    "the main ideas", "its history", "common misconceptions", "everyday examples", "how it works step by step",
    "the most important terms", "its uses", "open questions", "causes and effects", "how it is taught",
    "a comparison with related subjects", "practical advice", "the people behind it", "a worked example",
    "why it matters", "its limits and dangers", "how it changed over time", "the evidence for what is known",
)  # fmt: skip
AUDIENCES = (
    "young children", "middle school students", "high school students", "college students", "adults without any "
    "background", "professionals in another field", "teachers", "curious travelers", "parents", "researchers",
)  # fmt: skip
STYLES = (
    "Use a clear and friendly tone.", "Use several headings.", "Write in long, connected paragraphs.",
    "Include at least two concrete examples.", "Define each new term when it first appears.",
    "Begin with a question and answer it in the course of the text.", "End with a short summary and three exercises.",
    "Use numbers and facts where you can.", "Do not use lists.", "Tell it as a story with named characters.",
    "Explain why, not only what.", "Be precise and sober.",
)  # fmt: skip
FORMS = (
    "Write a section of a textbook about {topic} for {audience}. Focus on {aspect}. {style}",
    "Write a long course unit on {topic} for {audience}, with a focus on {aspect}. {style}",
    "Write an encyclopedia article about {topic}. Readers are {audience}. Cover {aspect}. {style}",
    "Write a detailed blog post about {topic} for {audience}, on {aspect}. {style}",
    "Write the transcript of a lecture on {topic} for {audience}. The lecture is about {aspect}. {style}",
    "Write a magazine article for {audience} about {topic} and {aspect}. {style}",
    "Write a chapter of a book about {subject}. The chapter is about {topic}, and deals with {aspect}. {style}",
    "Write a story for {audience} in which somebody learns about {topic}. {style}",
    "Write an essay about {topic}: {aspect}. It is for {audience}. {style}",
)
SYSTEMS = (
    "You are a helpful assistant.", "You are a patient teacher who explains things simply.",
    "You answer briefly and precisely.", "You are an expert in {subject}.", "You are a careful writer and editor.",
    "You are a friendly tutor. Answer in full sentences.",
)  # fmt: skip
SHORT = {
    "explain": ("Explain {topic} to {audience}.", "What should I know about {topic}?", "Can you explain {topic}? "
                "I am interested in {aspect}.", "How would you describe {topic} in a few paragraphs?"),
    "list": ("List ten facts about {topic}.", "Give me five ideas for a lesson on {topic}.", "What are the most "
             "important terms in connection with {topic}? List and define them.", "Name seven questions that a "
             "beginner might ask about {topic}."),
    "compare": ("Compare {topic} and {other}.", "What do {topic} and {other} have in common, and how do they differ?",
                "Which would you rather learn about first, {topic} or {other}? Give reasons."),
    "how-to": ("Give step-by-step advice to {audience} who want to learn about {topic}.", "Make a study plan of one "
               "week on {topic}.", "How can I prepare a talk on {topic} for {audience}?"),
    "quiz": ("Write a quiz of five questions on {topic}, with answers.", "Ask me a hard question about {topic} and "
             "then answer it.", "Write three multiple-choice questions on {topic} and mark the right answers."),
    "story": ("Write a short story about {topic}.", "Write a dialogue between two friends who disagree about {topic}.",
              "Write a poem about {topic}.", "Invent a day in the life of somebody who works with {topic}."),
    "letter": ("Write an email to a colleague about {topic}.", "Write a letter to the editor of a newspaper on "
               "{topic}.", "Draft a short speech on {topic} for {audience}."),
    "reasons": ("What speaks for and against spending more money on {topic}?", "Why does {topic} matter to "
                "{audience}? Give three reasons.", "What are common mistakes when people talk about {topic}?"),
    "code": ("Write a Python function that {task}.", "Write a Python program that {task}, and explain how it works.",
             "Write a class in Python with tests that {task}.", "How do I write a function that {task}? Show two ways "
             "in Python.", "Write a JavaScript function that {task}."),
}  # fmt: skip
FOLLOW_UPS = (
    "Can you make that shorter?", "Please explain the last point in more detail.", "Give me an example.",
    "Now say the same to a child.", "What is the most important sentence of your answer?", "Why is that so?",
    "Can you turn that into a list?", "What could I read or do next?", "Is there anything that speaks against it?",
    "Summarize what you said in two sentences.", "What do you mean by the first sentence?", "Translate the main idea "
    "into plain, everyday words.",
)  # fmt: skip
WITH_PASSAGE = {
    "summarize": ("Summarize the following text in three sentences.\n\n{passage}", "{passage}\n\nWhat is the main "
                  "point of this text?", "Give the following text a title and explain your choice.\n\n{passage}"),
    "answer": ("{passage}\n\nAccording to this text, what is the most important thing about {topic}?", "Read the text "
               "and answer the question.\n\nText: {passage}\n\nQuestion: Which examples does the text give?",
               "{passage}\n\nWrite three questions that this text answers, and answer them."),
    "rewrite": ("Rewrite the following text for {audience}.\n\n{passage}", "Turn this text into a list of "
                "points.\n\n{passage}", "Correct and improve the style of this text.\n\n{passage}"),
    "copy": ("Repeat the following text word for word.\n\n{passage}", "{passage}\n\nCopy the text above exactly."),
    "look up": ("Here is a list of rooms.\n\n{rooms}\n\nIn which room is {name}?", "{rooms}\n\nWho is in room "
                "{room}? Answer with the name only.", "Somebody wrote down the following.\n\n{rooms}\n\n{passage}\n\n"
                "Where can I find {name}?"),
}  # fmt: skip
NAMES = (
    "Alice Ben Clara David Emma Felix Grace Henry Iris Jack Kate Liam Maria Noah Olivia Paul Quinn Rosa Sam Tara Uma "
    "Victor Wendy Xavier Yara Zoe Amir Bella Carlos Diana Elif Farid Gina Hugo Ines Jonas Kofi Lena Mei Nora"
)


@dataclass
class Request:
    """What one document is asked for: its messages so far, and what they were made of."""

    messages: list[dict[str, str]]
    kind: str
    topics: list[str]
    ids: list[int] = field(default_factory=list)
    answer: str = ""


@dataclass
class Topics:
    """The topics and coding tasks of one part, each topic with its subject."""

    topics: list[tuple[str, str]]
    tasks: list[str]


def split_topics(seed: int) -> dict[str, Topics]:
    """Shares topics and tasks out to `held_out` and `train` by the seed."""
    lines = (FOLDER / "topics.txt").read_text("utf-8").splitlines()
    topics = []
    for line in lines:
        subject, _, rest = line.partition(": ")
        topics += [(subject, topic.strip()) for topic in rest.split(";")]
    tasks = [task.strip() for task in (FOLDER / "tasks.txt").read_text("utf-8").split(";")]
    draw = random.Random(f"{seed} topics")
    draw.shuffle(topics)
    draw.shuffle(tasks)
    few, some = round(HELD_OUT_SHARE * len(topics)), round(HELD_OUT_SHARE * len(tasks))
    return {"held_out": Topics(topics[:few], tasks[:some]), "train": Topics(topics[few:], tasks[some:])}


def textbook_request(topics: Topics, draw: random.Random) -> Request:
    """Asks for a section of a textbook."""
    subject, topic = draw.choice(topics.topics)
    form = draw.choice(FORMS)
    words = {"topic": topic, "subject": subject, "aspect": draw.choice(ASPECTS)}
    content = form.format(**words, audience=draw.choice(AUDIENCES), style=draw.choice(STYLES))
    return Request([{"role": "user", "content": content}], "textbook", [topic])


def instruction_request(topics: Topics, passages: list[tuple[str, str]], draw: random.Random) -> Request:
    """Asks for one of many things; where there are `passages` (topic, text), about one of them."""
    forms = WITH_PASSAGE if passages else SHORT
    kind = draw.choice(list(forms))
    subject, topic = draw.choice(topics.topics)
    other = draw.choice([other for _, other in topics.topics if other != topic])
    words = {"topic": topic, "other": other, "aspect": draw.choice(ASPECTS), "audience": draw.choice(AUDIENCES)}
    used = [topic]
    if passages:
        words["topic"], text = draw.choice(passages)
        words["passage"] = cut_passage(text, draw)
        used = [words["topic"]]
        names, rooms = draw.sample(NAMES.split(), 30), draw.sample(range(100, 1000), 30)
        many = draw.randrange(8, 31)
        words["rooms"] = "\n".join(f"{n}: room {r}" for n, r in zip(names[:many], rooms, strict=False))
        asked = draw.randrange(many)
        words["name"], words["room"] = names[asked], str(rooms[asked])
    if kind == "code":
        words["task"] = draw.choice(topics.tasks)
        used = [words["task"]]
    form = draw.choice(forms[kind])
    if "{other}" in form:
        used.append(other)
    messages = [{"role": "user", "content": form.format(**words)}]
    if draw.random() < 0.5:
        messages.insert(0, {"role": "system", "content": draw.choice(SYSTEMS).format(subject=subject)})
    return Request(messages, kind, used)


def cut_passage(text: str, draw: random.Random) -> str:
    """Some whole sentences of a text, of 40 to 250 words."""
    sentences = re.split(r"(?<=[.!?])\s+", text)
    start, most = draw.randrange(max(1, len(sentences) - 4)), draw.randrange(60, 251)
    passage = sentences[start]
    for sentence in sentences[start + 1 :]:
        if len(passage.split()) + len(sentence.split()) > most:
            break
        passage += " " + sentence
    return passage.strip()


# Sampling.


class Preallocated(DynamicLayer):
    """
    Keys and values of one layer in a buffer for `length` tokens: a step copies nothing of what came before.

    Args:
        length (`int`): tokens that there is room for.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.filled = length, 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps `[B, H, T, D]` keys and values of `T` more tokens; returns all that are kept."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            shape = (*key_states.shape[:2], self.length, key_states.shape[-1])
            self.buffers = [states.new_empty(shape) for states in (key_states, value_states)]
        end = self.filled + key_states.shape[-2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.filled : end] = states
        self.filled = end
        self._view()
        keys, values = (buffer[:, :, :end] for buffer in self.buffers)
        return keys, values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps only some rows, one buffer after the other: two whole copies never lie in memory."""
        self.keys = self.values = torch.empty(0)
        for place in range(2):
            self.buffers[place] = self.buffers[place][indices]
        self._view()

    def _view(self) -> None:
        self.keys, self.values = (buffer[:, :, : self.filled] for buffer in self.buffers)


def draw_tokens(logits: torch.Tensor, temperature: float, min_p: float, generator: torch.Generator) -> torch.Tensor:
    """Draws a token for each row of `[B, V]` logits, of those at least `min_p` times as probable as the likeliest."""
    logits = logits.float() / temperature
    if min_p:
        least = logits.amax(-1, keepdim=True) + torch.log(torch.tensor(min_p, device=logits.device))
        logits = logits.masked_fill(logits < least, float("-inf"))
    # The Gumbel trick, as a race of exponentials: unlike `multinomial`, no check of the device's values.
    waits = torch.empty_like(logits).exponential_(generator=generator)
    return (logits - waits.log()).argmax(-1)


@torch.inference_mode()
def complete(
    model: PreTrainedModel,
    prompts: list[list[int]],
    new_tokens: int,
    end: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    min_p: float = 0.0,
) -> list[tuple[list[int], bool]]:
    """
    Completes `prompts` and returns, for each, its new tokens without `end`, and whether it came to its end.

    All rows are at one position: what is longer than the shortest prompt is fed token by token, in place of drawn
    tokens. So there is no padding and no mask, and attention runs in its fastest form. Rows that are done leave the
    batch every so many steps.
    """
    device = model.device
    sizes = [len(prompt) for prompt in prompts]
    shortest, total = min(sizes), max(sizes) + new_tokens
    lengths = torch.tensor(sizes, device=device)
    ids = torch.full((len(prompts), total), end)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    ids = ids.to(device)
    rows, done = torch.arange(len(prompts), device=device), torch.zeros(len(prompts), dtype=torch.bool, device=device)
    stops, limits = torch.full_like(lengths, total), lengths + new_tokens
    all_ids, all_stops = ids.clone(), stops.clone()  # of the rows that left the batch, too
    layers = [Preallocated(total) for _ in range(model.config.num_hidden_layers)]
    cache = Cache(layers=[*layers])
    logits = model(ids[:, :shortest], past_key_values=cache, logits_to_keep=1).logits[:, -1]
    for position in range(shortest, total):
        forced = position < lengths
        drawn = draw_tokens(logits, temperature, min_p, generator)
        tokens = torch.where(forced, ids[:, position], drawn)
        ids[:, position] = tokens
        finished = ~forced & ~done & ((tokens == end) | (position >= limits))
        stops = torch.where(finished, position, stops)
        done |= finished
        if (position - shortest) % SYNCHRONISE == SYNCHRONISE - 1 or position == total - 1:
            left = (~done).nonzero()[:, 0]
            if position == total - 1 or len(left) <= _FEWER * len(done):
                all_ids[rows], all_stops[rows] = ids, stops
                if not len(left) or position == total - 1:
                    break
                rows, ids, lengths, limits, done, stops, tokens = (
                    part[left] for part in (rows, ids, lengths, limits, done, stops, tokens)
                )
                for layer in layers:
                    layer.batch_select_indices(left)
        logits = model(tokens[:, None], past_key_values=cache, logits_to_keep=1).logits[:, -1]
    texts = []
    for row, start, stop in zip(all_ids.tolist(), sizes, all_stops.tolist(), strict=True):
        texts.append((row[start:stop], stop < total and row[stop] == end))
    return texts


# What is kept.


def why_not(text: str, ended: bool, kind: str) -> str | None:
    """Why an answer is dropped, or nothing where it stays."""
    if not ended and kind != "textbook":
        return "cut off"
    words = re.findall(r"[a-z]+", text.lower())
    if len(words) < (60 if kind == "textbook" else 0 if kind == "look up" else 3) or not text.strip():
        return "short"
    if len(text.encode()) > 1.05 * len(text):
        return "not English"
    if (
        len(words) > 60
        and kind != "code"
        and sum(_COMMON.fullmatch(word) is not None for word in words) < 0.2 * len(words)
    ):
        return "not English sentences"
    if repeated(words) > 0.2 or (len(text) > 500 and len(zlib.compress(text.encode())) < 0.25 * len(text)):
        return "repetitive"
    return None


_COMMON = re.compile(
    r"(the|of|and|to|a|in|is|that|for|it|as|with|on|be|this|by|are|or|an|at|from|not|have|which|can|you|if|will)"
)


def repeated(words: list[str], length: int = 6) -> float:
    """The share of the runs of `length` words that occurred before in the same text."""
    runs = [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def cut_back(text: str) -> str:
    """A text that was cut off, up to the end of its last whole sentence."""
    return text[: max((match.end() for match in re.finditer(r"[.!?](?=\s)", text)), default=0)]


def document(request: Request, tokenizer: Any) -> dict[str, Any]:
    """A line of a set."""
    line: dict[str, Any] = {"text": request.answer, "kind": request.kind, "topics": request.topics}
    if request.kind != "textbook":
        messages = [*request.messages, {"role": "assistant", "content": request.answer}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        line["text"], line["messages"] = text.rstrip().removesuffix(tokenizer.eos_token), messages
    return line


# The run.


@dataclass
class Settings:
    """What decides about the text; a run goes on only with the same."""

    tokens: int
    seed: int
    batch_size: int
    new_tokens: int
    temperature: float
    min_p: float


class Writer:
    """
    Writes batches until each set is full, from where an earlier call ended.

    Args:
        model, tokenizer: the teacher and its tokenizer.
        settings ([`Settings`]): what is written.
        folder (`Path`): where to.
        sets (sequence of `(part, domain)`): which; what others write in the same folder meanwhile is left alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        settings: Settings,
        folder: Path,
        sets: Sequence[tuple[str, str]] = SETS,
    ) -> None:
        self.model, self.tokenizer, self.settings, self.folder, self.sets = model, tokenizer, settings, folder, sets
        self.topics = split_topics(settings.seed)
        self.records = [record for one in sets for record in self._resume(*one)]

    def _resume(self, part: str, domain: str) -> list[dict[str, Any]]:
        """Reads what was recorded of a set, and cuts off what was written after that."""
        progress, head = self.progress(part, domain), {"settings": asdict(self.settings)}
        progress.parent.mkdir(parents=True, exist_ok=True)
        if not progress.exists():
            _append(progress, json.dumps(head) + "\n")
        lines = progress.read_bytes().splitlines(keepends=True)
        if not lines[-1].endswith(b"\n"):  # a kill amid a line
            lines.pop()
            progress.write_bytes(b"".join(lines))
        if not lines or json.loads(lines[0]) != head:
            raise ValueError(
                f"{self.folder} holds text of {lines[0].decode().strip() if lines else 'nothing'}, and "
                f"{json.dumps(head)} is asked for; give the same options, or another folder."
            )
        records = [json.loads(line) for line in lines[1:]]
        path, size = self.path(part, domain), records[-1]["bytes"] if records else 0
        path.parent.mkdir(exist_ok=True)
        if path.exists() or size:
            with open(path, "r+b") as out:
                out.truncate(size)
        else:
            path.touch()
        return records

    def progress(self, part: str, domain: str) -> Path:
        """The file of what was recorded of a set, a batch a line."""
        return self.folder / "progress" / f"{part}-{domain}.jsonl"

    def path(self, part: str, domain: str) -> Path:
        """The file of a set."""
        return self.folder / part / f"{domain}.jsonl"

    def of(self, part: str, domain: str) -> list[dict[str, Any]]:
        """The records of a set's batches."""
        return [record for record in self.records if (record["part"], record["domain"]) == (part, domain)]

    def goals(self) -> dict[tuple[str, str], int]:
        """Tokens of each set."""
        goals = {}
        for part, domain in SETS:
            share = TEXTBOOK_SHARE if domain == "textbook" else 1 - TEXTBOOK_SHARE
            goal = share * self.settings.tokens
            goals[part, domain] = int(min(HELD_OUT_SHARE * goal, MOST_HELD_OUT) if part == "held_out" else goal)
        return goals

    def passages(self, part: str) -> list[tuple[str, str]]:
        """Topic and text of each document of a part's textbook, once it is all there."""
        progress, goal = self.progress(part, "textbook"), self.goals()[part, "textbook"]
        while True:
            lines = progress.read_bytes().splitlines(keepends=True)[1:] if progress.exists() else []
            if sum(json.loads(line)["tokens"] for line in lines if line.endswith(b"\n")) >= goal:
                break
            time.sleep(1)  # another process is at it
        book = self.path(part, "textbook").read_text("utf-8").split("\n")
        return [(one["topics"][0], one["text"]) for one in map(json.loads, filter(None, book))]

    def write(self) -> None:
        """Writes what is missing."""
        for part, domain in self.sets:
            goal = self.goals()[part, domain]
            path = self.path(part, domain)
            seen = {_digest(json.loads(line)["text"]) for line in path.read_text("utf-8").split("\n") if line}
            while (tokens := sum(record["tokens"] for record in self.of(part, domain))) < goal:
                batch = len(self.of(part, domain))
                asked = sum(record["asked"] for record in self.of(part, domain))
                kept = tokens / asked if tokens else EXPECTED  # of each document that was asked for
                if batch >= 20 and not tokens:
                    raise ValueError(
                        f"nothing of the first {batch} batches of {part}/{domain} was kept "
                        f"({self.of(part, domain)[-1]['dropped']}); raise --new-tokens."
                    )
                most = self.settings.batch_size if part == "train" else max(8, self.settings.batch_size // 4)
                # No more than are needed, but a step of few rows takes as long as one of many. Instructions are of
                # another sort in each of three batches.
                missing = goal - tokens if domain == "textbook" else min(goal - tokens, goal / 3)
                few = min(most, max(FEWEST, int(missing / kept * 1.2) + 8))
                record = self._batch(part, domain, batch, few, seen)
                self.records.append(record)
                _append(self.progress(part, domain), json.dumps(record) + "\n")
                print(
                    f"{part}/{domain} {tokens + record['tokens']:,} of {goal:,} tokens, {record['speed']:,}/s",
                    flush=True,
                )

    def _batch(self, part: str, domain: str, batch: int, few: int, seen: set[bytes]) -> dict[str, Any]:
        draw = random.Random(f"{self.settings.seed} {part} {domain} {batch}")
        topics = self.topics[part]
        if domain == "textbook":
            requests = [textbook_request(topics, draw) for _ in range(few)]
        else:  # every third batch is about passages, and every third goes on to a second turn: like lengths together
            its = self.passages(part) if batch % 3 == 2 else []
            requests = [instruction_request(topics, its, draw) for _ in range(few)]
        started = time.perf_counter()
        dropped: Counter[str] = Counter()
        drawn = 0
        kept = requests
        rounds = 2 if domain == "instructions" and batch % 3 == 1 else 1
        for turn in range(rounds):
            if turn:
                for request in kept:
                    request.messages += [
                        {"role": "assistant", "content": request.answer},
                        {"role": "user", "content": draw.choice(FOLLOW_UPS)},
                    ]
                    request.kind = "several turns"
            kept, more = self._answer(kept, f"{part} {domain} {batch} {turn}", dropped)
            drawn += more
        seconds = time.perf_counter() - started
        lines = []
        for request in kept:
            line = document(request, self.tokenizer)
            digest = _digest(line["text"])
            if digest in seen:
                dropped["duplicate"] += 1
            else:
                seen.add(digest)
                lines.append(line)
        texts = [line["text"] for line in lines]
        tokens = (
            sum(map(len, self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])) if texts else 0
        )
        _append(self.path(part, domain), "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        return {
            "part": part, "domain": domain, "batch": batch, "asked": few, "documents": len(lines),
            "tokens": tokens, "drawn": drawn,
            "kinds": dict(Counter(line["kind"] for line in lines)), "dropped": dict(dropped),
            "seconds": round(seconds, 2), "speed": round(drawn / seconds),
            "bytes": self.path(part, domain).stat().st_size,
        }  # fmt: skip

    def _answer(self, requests: list[Request], name: str, dropped: Counter[str]) -> tuple[list[Request], int]:
        """Has the teacher answer; returns those that were answered well, and how many tokens were drawn."""
        settings, tokenizer = self.settings, self.tokenizer
        for request in requests:
            prompt = tokenizer.apply_chat_template(request.messages, tokenize=False, add_generation_prompt=True)
            request.ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if not requests:
            return [], 0
        generator = torch.Generator(self.model.device)
        generator.manual_seed(zlib.crc32(f"{settings.seed} {name}".encode()))
        prompts, end = [request.ids for request in requests], tokenizer.eos_token_id
        texts = complete(
            self.model, prompts, settings.new_tokens, end, generator, settings.temperature, settings.min_p
        )
        kept = []
        for request, (ids, ended) in zip(requests, texts, strict=True):
            text = tokenizer.decode(ids).strip()
            if not ended and request.kind == "textbook":
                text = cut_back(text)
            reason = (
                "special tokens" if set(ids) & set(tokenizer.all_special_ids) else why_not(text, ended, request.kind)
            )
            if reason:
                dropped[reason] += 1
            else:
                dropped["(cut back to a whole sentence, kept)"] += not ended
                request.answer = text
                kept.append(request)
        return kept, sum(len(ids) for ids, _ in texts)

    def summary(self, teacher: str) -> dict[str, Any]:
        """What `written.json` holds."""
        sets = {}
        for part, domain in self.sets:
            its = self.of(part, domain)
            kinds: Counter[str] = Counter()
            dropped: Counter[str] = Counter()
            for record in its:
                kinds.update(record["kinds"])
                dropped.update(record["dropped"])
            sets[f"{part}/{domain}"] = {
                **{key: sum(record[key] for record in its) for key in ("documents", "tokens", "drawn")},
                "seconds": round(sum(record["seconds"] for record in its), 1),
                "kinds": dict(sorted(kinds.items())),
                "dropped": dict(sorted((+dropped).items())),
            }
        device = self.model.device
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        names = {
            part: sorted({t for _, t in self.topics[part].topics} | set(self.topics[part].tasks)) for part in PARTS
        }
        return {
            "teacher": Path(teacher).name, "settings": asdict(self.settings), "device": where,
            "dtype": str(self.model.dtype).removeprefix("torch."), "sets": sets, "held_out_topics": names["held_out"],
        }  # fmt: skip


def _digest(text: str) -> bytes:
    return hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=12).digest()


def _append(path: Path, text: str) -> None:
    with open(path, "a", encoding="utf-8", newline="\n") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())


def side_by_side(arguments: list[str]) -> None:
    """Writes each set in a process of its own; where one fails, the others are ended, and what they wrote stays."""
    command = [sys.executable, __file__, *arguments]
    left = [subprocess.Popen([*command, "--set", f"{part}/{domain}"]) for part, domain in SETS]
    try:
        while left:
            time.sleep(0.5)
            for process in [process for process in left if process.poll() is not None]:
                left.remove(process)
                if process.returncode:
                    raise subprocess.CalledProcessError(process.returncode, process.args)
    finally:
        for process in left:
            process.terminate()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="GGUF file, folder or Hub id")
    parser.add_argument("--output", type=Path, required=True, help="folder of the text")
    parser.add_argument("--tokens", type=int, default=20_000_000, help="of training text; held-out text comes on top")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--batch-size", type=int, default=2048, help="documents at once: 24 KB of cache per token each"
    )
    parser.add_argument("--new-tokens", type=int, default=1024, help="of an answer, at most")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument(
        "--min-p", type=float, default=0.1, help="least probability, relative to the likeliest token's"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--trial", action="store_true", help="a few short batches of 8 documents, on any device")
    names = ["/".join(one) for one in SETS]
    parser.add_argument("--set", choices=names, help="only this one, while other processes write the others")
    args = parser.parse_args(arguments)
    if args.trial:
        args.tokens, args.batch_size, args.new_tokens = 500, 8, 160
    if args.device.startswith("cuda") and not args.set:
        side_by_side(arguments)
    dtype = "bfloat16" if args.device.startswith("cuda") else "float32"
    model, tokenizer = load_pair(args.teacher, dtype=dtype)
    model.to(args.device).eval()
    settings = Settings(args.tokens, args.seed, args.batch_size, args.new_tokens, args.temperature, args.min_p)
    if args.set:
        Writer(model, tokenizer, settings, args.output, [SETS[names.index(args.set)]]).write()
        return
    writer = Writer(model, tokenizer, settings, args.output)
    writer.write()
    about = writer.summary(args.teacher)
    (args.output / "written.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")
    print(json.dumps(about["sets"], indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
