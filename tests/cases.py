"""A run that something is done to, from the command line."""

import shutil
from pathlib import Path

import pytest
import yaml
from runs import contents, copy_run, results, tiny_recipe

from hf_hybrid import cli
from hf_hybrid.run.folder import ARTEFACTS


ALL = [*ARTEFACTS.values()]


class Case:
    """A folder with a teacher, texts, a recipe that names them, and a run of it; and the command line."""

    def __init__(self, finished: Path, capsys: pytest.CaptureFixture) -> None:
        self.finished = finished
        for name in ("teacher", "texts"):
            shutil.copytree(finished.parent / name, name)
        self.folder, self.teacher = Path("run"), Path("teacher")
        self.recipe = tiny_recipe("teacher", "texts")
        self.capsys = capsys

    def at(self, stage: str) -> "Case":
        """Puts the run to where `stage` starts."""
        copy_run(self.finished, self.folder, stage)
        return self

    def run(self, *options: str) -> tuple[int, str]:
        """Exit code and last line on stderr of `hf-hybrid run`."""
        Path("recipe.yaml").write_text(yaml.safe_dump(self.recipe))
        return self.again(*options)

    def again(self, *options: str) -> tuple[int, str]:
        self.capsys.readouterr()
        code = cli.main(["run", "recipe.yaml", "--output", str(self.folder), *options])
        lines = self.capsys.readouterr().err.strip().splitlines()
        return code, lines[-1] if lines else ""

    def fails(self, *options: str) -> str:
        """The one line with which the command fails; everything that was finished is as before."""
        before = contents(self.folder, ALL)
        code, line = self.run(*options)
        assert code == 2 and line.startswith("hf-hybrid: "), line
        assert before.items() <= contents(self.folder, ALL).items()
        return line

    def ends(self, *options: str) -> None:
        """The command ends well, and what it made is what the run made in which nothing failed."""
        code, line = self.run(*options)
        assert code == 0, line
        given, expected = results(self.folder), results(self.finished)
        for name in given:
            assert given[name] == expected[name], name
