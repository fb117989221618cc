"""The documentation site names what there is. `make site` builds it, and checks links and anchors."""

from importlib import import_module
from pathlib import Path

import pytest
import yaml

import hf_hybrid as hh


ROOT = Path(__file__).parents[1]
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
PAGES = {entry["page"]: entry["names"] for entry in SITE["extra"]["reference"]}
NAMES = [name for names in PAGES.values() for name in names]


def places(nav) -> list[str]:
    """The files in a navigation, which may be nested."""
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav
    return [place for entry in entries for place in places(entry)]


def test_every_public_name_is_in_the_reference_once():
    places = {
        name: NAMES.count(f"hf_hybrid.{name}") + NAMES.count(getattr(hh, name).__module__) for name in hh.__all__
    }
    assert [name for name, count in places.items() if count != 1] == []
    assert len(NAMES) == len(set(NAMES))


@pytest.mark.parametrize("name", NAMES)
def test_what_the_reference_names_exists_and_says_what_it_is(name):
    module, _, attribute = name.rpartition(".")
    found = getattr(import_module(module), attribute, None) or import_module(name)
    assert found.__doc__


def test_every_page_can_be_reached():
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").glob("*.md")}
    there |= {f"reference/{page}.md" for page in PAGES} | {"reference/command_line.md"}
    there |= {"index.md", "CONTRIBUTING.md", "ARCHITECTURE.md"}
    assert there <= set(places(SITE["nav"]))
