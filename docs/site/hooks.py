"""
The site's pages that are not in docs/, and links that leave it.

docs/ reads well where files are shown as they are, so nothing in it is written for the site alone. The README is the
site's first page; a page or file elsewhere in the repository that a page links to comes along, at the place that it
has in the repository; the reference is made of docstrings, the page of the command line of its `--help`.
"""

import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files


ROOT = Path(__file__).parents[2]
# Not images or links of code: a link's target up to its anchor, in `[text](target#anchor)`.
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)#\s]+)")
_FENCED = re.compile(r"(^```.*?^```$)", re.M | re.S)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are made here, and what pages link to outside docs/."""
    for entry in config.extra["reference"]:
        lines = [f"# {entry['title']}", "", entry["about"], ""]
        lines += [line for name in entry["names"] for line in (f"::: {name}", "")]
        files.append(File.generated(config, f"reference/{entry['page']}.md", content="\n".join(lines)))
    files.append(File.generated(config, "reference/command_line.md", content=_command_line()))
    pages = {file.src_uri: "docs/" + file.src_uri for file in files if file.generated_by is None}
    waiting = [path for path in pages.values() if path.endswith(".md")]
    waiting += ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "CHANGELOG.md"]
    seen = set(pages.values())
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen.add(path)
            made: dict[str, Any] = {"abs_src_path": str(ROOT / path)}
            files.append(File.generated(config, _place(path), **made))
        if path.endswith(".md"):
            waiting += [target for target in _targets(path) if target not in seen]
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Turns links between files of the repository into links between places of the site."""
    path = _path(page.file)
    if path is None:
        return markdown
    here = posixpath.dirname(page.file.src_uri)

    def moved(link: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link[1]))
        return posixpath.relpath(_place(target), here or ".") if (ROOT / target).is_file() else link[1]

    parts = _FENCED.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(moved, part) for part in parts)


def _path(file: File) -> str | None:
    """Where in the repository a page comes from; None for one that was made here."""
    return None if file.abs_src_path is None else os.path.relpath(file.abs_src_path, ROOT)


def _place(path: str) -> str:
    """Where on the site a file of the repository is."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def _targets(path: str) -> list[str]:
    """Files of the repository that a page links to."""
    text = _FENCED.sub("", (ROOT / path).read_text("utf-8"))
    targets = [posixpath.normpath(posixpath.join(posixpath.dirname(path), link)) for link in _LINK.findall(text)]
    return [target for target in targets if (ROOT / target).is_file()]


def _command_line() -> str:
    """What `--help` prints, of the program and of every command."""
    whole = _help()
    parts = ["# Command line", "", "```", whole, "```", ""]
    for name in re.findall(r"^    (\w+) ", whole.partition("commands:")[2].partition("examples:")[0], re.M):
        parts += [f"## {name}", "", "```", _help(name), "```", ""]
    return "\n".join(parts)


def _help(*command: str) -> str:
    """Needs neither torch nor transformers, which are not installed beside mkdocs."""
    environment = {**os.environ, "COLUMNS": "100", "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-m", "hf_hybrid", *command, "--help"]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise PluginError(f"{' '.join(arguments)} failed: {done.stderr.strip()}")
    return done.stdout.rstrip()
