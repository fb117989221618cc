"""The commands `generate` and `chat`: what a model writes, beside what its teacher writes."""

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .text import GGUF_HELP, SEEDS, check_numbers


if TYPE_CHECKING:
    from rich.console import Console

_ENDINGS = ("/exit", "/quit")


@dataclass
class Writer:
    """
    A model that writes, and its tokenizer.

    Args:
        model (`PreTrainedModel`): in eval mode, on its device.
        tokenizer (`PreTrainedTokenizerBase`): its own; a teacher of another vocabulary may stand beside a model.
        positions (`int`, *optional*): tokens of a prompt and its continuation at most; None where nothing bounds them.
    """

    model: Any
    tokenizer: Any
    positions: int | None


@dataclass
class Written:
    """
    One continuation.

    Args:
        text (`str`): without special tokens.
        tokens (`list[int]`): new ones, with the one that ends the text where it ended.
        ended (`bool`): whether the model ended it; otherwise it was cut off.
        seconds (`float`): what prompt and continuation took.
    """

    text: str
    tokens: list[int]
    ended: bool
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        return {
            "text": self.text,
            "tokens": self.tokens,
            "ended": self.ended,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
        }


def _add_model_options(parser: argparse.ArgumentParser, new_tokens: int, temperature: float | None) -> None:
    greedy = "0, greedy" if temperature == 0 else "as the model's generation config says"
    parser.add_argument("--revision", help="branch, tag or commit of a MODEL on the Hub (default: its main branch)")
    parser.add_argument("--gguf-file", metavar="NAME", help=GGUF_HELP.format("MODEL"))
    parser.add_argument("--teacher", help="Hub id or folder, GGUF file, or 'embedded'; writes beside the model")
    parser.add_argument("--teacher-revision", help="branch, tag or commit of a teacher on the Hub (default: likewise)")
    parser.add_argument("--teacher-gguf-file", metavar="NAME", help=GGUF_HELP.format("the teacher"))
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the weights; auto: as they are stored (default: %(default)s)",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=new_tokens, help="of a text at most (default: %(default)s)"
    )
    parser.add_argument("--temperature", type=float, default=temperature, help=f"0 is greedy (default: {greedy})")
    parser.add_argument("--seed", type=int, default=0, help="seed of what is sampled (default: %(default)s)")


def add_generate_options(parser: argparse.ArgumentParser) -> None:
    """Adds what says which model writes, behind what, and how."""
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id, GGUF file, or 'embedded'")
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="what to go on with (default: standard input)")
    parser.add_argument("--prompt-file", metavar="FILE", help="a file that is one prompt, without its last line break")
    _add_model_options(parser, 128, 0.0)


def add_chat_options(parser: argparse.ArgumentParser) -> None:
    """Adds what says which model answers, and how."""
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id, or GGUF file, with a chat template")
    _add_model_options(parser, 512, None)


def prompts_of(options: argparse.Namespace) -> list[str]:
    """The prompts that the options give, or the one on standard input."""
    if options.prompts and options.prompt_file is not None:
        raise ValueError("prompts and --prompt-file were both given; give one.")
    prompts = list(options.prompts)
    if options.prompt_file is not None:
        try:
            prompts = [Path(options.prompt_file).read_text("utf-8")]
        except OSError as error:
            reason = (error.strerror or "it cannot be read").lower()
            raise ValueError(f"--prompt-file {options.prompt_file}: {reason}; check the path.") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompt-file {options.prompt_file} is no text in UTF-8; convert it.") from error
    elif not prompts:
        if sys.stdin.isatty():
            raise ValueError("generate needs a PROMPT: an argument, --prompt-file, or text on standard input.")
        prompts = [sys.stdin.read()]
    if not options.prompts:
        prompts = [prompts[0].removesuffix("\n")]  # an editor's or echo's, which would change the next token
    if "" in prompts:
        raise ValueError("a prompt is empty; give a text to go on with.")
    return prompts


def check_options(options: argparse.Namespace) -> None:
    """Raises a `ValueError` for what can be told to be wrong before a library is imported."""
    from ..teacher.names import check_found

    check_numbers(options, max_new_tokens=(1, math.inf), temperature=(0, math.inf), seed=SEEDS)
    for name in ("teacher_revision", "teacher_gguf_file"):
        if getattr(options, name) is not None and options.teacher is None:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} {getattr(options, name)!r} needs --teacher, the model it is one of.")
    check_found(options.model, options.gguf_file)
    if options.teacher is not None:
        check_found(options.teacher, options.teacher_gguf_file)


def writers_of(options: argparse.Namespace, chats: bool = False) -> dict[str, Writer]:
    """The `"model"`, and the `"teacher"` where there is one; with a chat template each where they are to chat."""
    import torch

    from ..environment import describe_kernels
    from ..teacher.loading import load_model, load_pair, load_tokenizer

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    remote, dtype = options.trust_remote_code, options.dtype
    named: dict[str, Any] = {"revision": options.revision, "gguf_file": options.gguf_file}

    def checked(tokenizer: Any, who: str) -> Any:
        if chats and tokenizer.chat_template is None:
            raise ValueError(
                f"the tokenizer of the {who}, {getattr(options, who)}, has no chat template, so it was not made to "
                "chat; use hf-hybrid generate, which goes on with a text."
            )
        return tokenizer

    if options.model == "embedded":
        pairs = {"model": load_pair(options.model, dtype=dtype, **named)}
    else:
        # Before the model, which takes longer.
        tokenizer = checked(load_tokenizer(options.model, trust_remote_code=remote, **named), "model")
        pairs = {"model": (load_model(options.model, dtype=dtype, trust_remote_code=remote, **named), tokenizer)}
    if options.teacher is not None:
        named = {"revision": options.teacher_revision, "gguf_file": options.teacher_gguf_file}
        pairs["teacher"] = load_pair(options.teacher, trust_remote_code=remote, dtype=dtype, **named)
    writers = {}
    for who, (model, tokenizer) in pairs.items():
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        writers[who] = Writer(model.to(device), checked(tokenizer, who), positions)
        if model.config.model_type == "hf_hybrid":
            print(describe_kernels(device, model.config.kernel, model.config.layer_mixers), file=sys.stderr)
    return writers


def write(
    writer: Writer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float | None,
    ends: Sequence[int] | None = None,
    streamer: Any = None,
) -> Written:
    """
    Goes on with the tokens of a prompt, with the model's generation config.

    Args:
        max_new_tokens (`int`): at most, and no more than the positions of the model leave.
        temperature (`float`, *optional*): 0 is greedy; None leaves it and whether to sample to the generation config.
        ends (`Sequence[int]`, *optional*): tokens that end a text, in the place of the generation config's.
        streamer (`BaseStreamer`, *optional*): takes the tokens as they come.
    """
    import torch

    model, tokenizer = writer.model, writer.tokenizer
    if ends is None:
        stored = model.generation_config.eos_token_id
        ends = stored if isinstance(stored, list) else [] if stored is None else [stored]
    if writer.positions is not None:
        max_new_tokens = min(max_new_tokens, writer.positions - len(prompt))
    sampling: dict[str, Any] = {}
    if temperature == 0:
        sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    elif temperature is not None:
        sampling = {"do_sample": True, "temperature": temperature}
    padding = tokenizer.pad_token_id  # of one row there is nothing to pad; the library asks for it all the same
    ids = torch.tensor([list(prompt)], device=model.device)
    start = time.perf_counter()
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        eos_token_id=list(ends) or None,
        pad_token_id=padding if padding is not None else next(iter(ends), 0),
        streamer=streamer,
        **sampling,
    )
    tokens = out[0, len(prompt) :].tolist()  # which waits for the device
    seconds = time.perf_counter() - start
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return Written(text, tokens, bool(tokens) and tokens[-1] in ends, seconds)


def check_room(writer: Writer, prompt: Sequence[int], what: str, advice: str) -> None:
    """Raises a `ValueError` where a prompt leaves no position to write in."""
    if writer.positions is not None and len(prompt) >= writer.positions:
        raise ValueError(
            f"{what} has {len(prompt):,} tokens, and the model {writer.positions:,} positions, of which at least one "
            f"must be left to write in; {advice}."
        )


def generate(options: argparse.Namespace, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """
    Lets the model, and the teacher where there is one, go on with each prompt.

    Without a teacher and `--json`, the text is printed as it is written. Returns a dictionary for each prompt.
    """
    from transformers import TextStreamer, set_seed

    from ..data.rows import text_prefix
    from ..tasks.repetition import common_prefix

    writers = writers_of(options)
    # Each prompt's tokens for each writer, all of them before anything is written.
    tokenized: list[dict[str, list[int]]] = []
    for prompt in prompts:
        tokenized.append({})
        for who, writer in writers.items():
            tokens = writer.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
            tokenized[-1][who] = [*text_prefix(writer.tokenizer), *tokens]
            check_room(writer, tokenized[-1][who], f"a prompt ({prompt[:30]!r}...)", "give a shorter one")
    one_vocabulary = len({tuple(sorted(writer.tokenizer.get_vocab().items())) for writer in writers.values()}) == 1
    how: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature}
    for who, writer in writers.items():
        if writer.model.device.type != "cpu":  # kernels are compiled at their first call
            write(writer, tokenized[0][who], **{**how, "max_new_tokens": 2})
    results = []
    for prompt, tokens in zip(prompts, tokenized, strict=True):
        written = {}
        for who, writer in writers.items():
            streamer = None
            if len(writers) == 1 and not options.json:
                if len(prompts) > 1:
                    print(f"--- {prompt}")
                streamer = TextStreamer(writer.tokenizer, skip_prompt=True, skip_special_tokens=True)
            set_seed(options.seed)  # model and teacher draw the same numbers
            written[who] = write(writer, tokens[who], streamer=streamer, **how)
            room = writer.positions
            if room is not None and not written[who].ended and options.max_new_tokens > room - len(tokens[who]):
                print(f"The {who}'s text was cut off at its {room:,} positions.", file=sys.stderr)
        result = {"prompt": prompt, "prompt_tokens": len(tokens["model"]), "model": written["model"].to_dict()}
        if "teacher" in written:
            agree = common_prefix(written["model"].tokens, written["teacher"].tokens) if one_vocabulary else None
            result |= {"teacher": written["teacher"].to_dict(), "first_tokens_that_agree": agree}
        results.append(result)
    return results


def print_generated(results: Sequence[dict[str, Any]]) -> None:
    """Prints what model and teacher wrote in two columns; without a teacher, only the speed is left to print."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for result in results:
        ours = result["model"]
        if "teacher" not in result:
            print(f"{len(ours['tokens'])} tokens, {ours['tokens_per_second']:.1f} a second", file=sys.stderr)
            continue
        theirs = result["teacher"]
        table = Table(title=Text(result["prompt"]), show_footer=True, show_lines=True)
        for name, of in (("model", ours), ("teacher", theirs)):
            footer = f"{len(of['tokens'])} tokens, {of['tokens_per_second']:.1f} a second"
            table.add_column(name, footer=footer, ratio=1, overflow="fold")
        table.add_row(Text(ours["text"]), Text(theirs["text"]))
        console.print(table)
        agree = result["first_tokens_that_agree"]
        if agree is None:
            print("Their vocabularies differ, so their tokens are not compared.")
        else:
            longer = max(len(ours["tokens"]), len(theirs["tokens"]))
            print(f"The first {agree} of {longer} tokens agree.")


def turn_ends(writer: Writer) -> list[int]:
    """
    The tokens that end an answer: the generation config's, the tokenizer's, and the special token that the chat
    template puts behind an answer, which the config of a model that was trained further may not name.
    """
    stored, tokenizer = writer.model.generation_config.eos_token_id, writer.tokenizer
    ends = {*(stored if isinstance(stored, list) else [stored]), tokenizer.eos_token_id} - {None}
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    behind = _rendered(writer, messages, add_generation_prompt=False).rpartition("answer")[2]
    first = tokenizer(behind.lstrip(), add_special_tokens=False)["input_ids"][:1]
    ends.update(set(first) & set(tokenizer.all_special_ids))
    return sorted(ends)


def _rendered(writer: Writer, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """The conversation as one text, by the tokenizer's template."""
    from jinja2 import TemplateError

    try:
        text: str = writer.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise ValueError(f"the chat template of the tokenizer fails ({error}); mend it, or use generate.") from error
    return text


def chat(options: argparse.Namespace) -> None:
    """Answers line by line until the input ends; the teacher, where there is one, goes on with its own answers."""
    from rich.console import Console
    from transformers import set_seed

    writers = writers_of(options, chats=True)
    ends = {who: turn_ends(writer) for who, writer in writers.items()}
    console, on_terminal = Console(highlight=False), sys.stdin.isatty()
    if on_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() its history and its keys
        print("/clear begins anew; /exit or ctrl-D ends; ctrl-C stops an answer.", file=sys.stderr)
    set_seed(options.seed)
    history: dict[str, list[dict[str, str]]] = {who: [] for who in writers}
    while True:
        try:
            line = input("> " if on_terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if line in _ENDINGS:
            return
        if line == "/clear":
            history = {who: [] for who in writers}
        elif line.startswith("/") and " " not in line and on_terminal:
            print(f"There is no command {line}; there are /clear and /exit.", file=sys.stderr)
        elif line:
            before = {who: len(messages) for who, messages in history.items()}
            try:
                for who, writer in writers.items():
                    history[who].append({"role": "user", "content": line})
                    answer = _answer(writer, history[who], ends[who], who, len(writers) > 1, console, options)
                    history[who].append({"role": "assistant", "content": answer})
            except (KeyboardInterrupt, ValueError) as error:
                if not on_terminal:
                    raise
                print(f"\n{str(error) or 'Stopped.'} The last message is taken back.", file=sys.stderr)
                history = {who: messages[: before[who]] for who, messages in history.items()}
    if on_terminal:
        print()


def _answer(
    writer: Writer,
    messages: list[dict[str, str]],
    ends: list[int],
    who: str,
    named: bool,
    console: "Console",
    options: argparse.Namespace,
) -> str:
    """What the writer answers to the messages, printed as it comes; the teacher's in another colour."""
    from transformers import TextStreamer

    style = "cyan" if who == "teacher" else ""

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            console.out(text, style=style, end="\n" if stream_end else "")

    # The template writes what comes before a text.
    prompt = writer.tokenizer(_rendered(writer, messages), add_special_tokens=False, verbose=False)["input_ids"]
    check_room(writer, prompt, "the conversation", "begin anew with /clear")
    if named:
        console.out(f"{who}: ", style=f"bold {style}", end="")
    streamer = Streamer(writer.tokenizer, skip_prompt=True, skip_special_tokens=True)
    how: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature}
    written = write(writer, prompt, ends=ends, streamer=streamer, **how)
    if not written.ended:
        print(f"The {who}'s answer was cut off after {len(written.tokens)} tokens.", file=sys.stderr)
    return written.text
