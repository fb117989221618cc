"""Where text comes from and how it becomes rows: the part `data` of a recipe."""

import math
from dataclasses import dataclass, field


@dataclass
class SourceConfig:
    """
    One of several sources of text. Exactly one of `dataset` and `text_files` is given.

    Args:
        weight (`float`): its share of the characters, relative to the other sources' weights.
        dataset, subset, split, revision, streaming, text_files, text_column: as in [`DataConfig`].
    """

    weight: float = 1.0
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = True
    text_files: list[str] = field(default_factory=list)
    text_column: str = "text"

    def __post_init__(self) -> None:
        if bool(self.dataset) == bool(self.text_files):
            given = "both dataset and text_files" if self.dataset else "neither dataset nor text_files"
            raise ValueError(f"a source of data.sources gives {given}; give exactly one.")
        _check_part(self, "a source of data.sources")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"data.sources has weight={self.weight}; pass a number above 0, or leave the source out.")


@dataclass
class DataConfig:
    """
    Where text comes from and how it becomes rows. Exactly one of `dataset`, `text_files`, `sources` and `source` is
    given.

    Args:
        dataset (`str`, *optional*): name of a dataset for `datasets.load_dataset`; no code of the dataset is run.
        subset, split, revision (`str`, *optional*): which part of it.
        streaming (`bool`): read only as much of the dataset as is needed, without downloading the rest.
        text_files (`list[str]`, *optional*): paths or patterns of local files. A `.jsonl` file holds a document
            a line, any other file is one document. Files are taken in an order drawn with the seed.
        sources (`list[SourceConfig]`, *optional*): several of these with weights, mixed document by document in exact
            shares; the text ends where the first of them ends.
        source (`str`, *optional*): `"embedded-demo"`, the built-in data of the embedded teacher.
        text_column (`str`): the column, or key of a `.jsonl` line, with the text.
        block_size (`int`): tokens of a row. Stages with shorter rows cut these into equal parts.
        held_out_rows (`int`): rows that layers are scored on.
        report_rows (`int`): rows that the final model is measured on.
        respect_documents (`bool`): give each row `position_ids` that restart with each document, so that no token sees
            another document. Off, as in the paper's released code, documents run into each other.
        on_the_fly (`bool`): tokenise and pack the training rows as they are needed, in the text's order, and keep
            only the held-out rows and those of the scores on disk. By default all rows are written once and drawn in
            random order.
    """

    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = True
    text_files: list[str] = field(default_factory=list)
    sources: list[SourceConfig] = field(default_factory=list)
    source: str | None = None
    text_column: str = "text"
    block_size: int = 512
    held_out_rows: int = 64
    report_rows: int = 64
    respect_documents: bool = True
    on_the_fly: bool = False

    def __post_init__(self) -> None:
        given = [name for name in ("dataset", "text_files", "sources", "source") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"data gives {' and '.join(given) or 'no source of text'}; give exactly one of dataset, text_files, "
                "sources and source."
            )
        if self.source not in (None, "embedded-demo"):
            raise ValueError(f"data.source={self.source!r} is unknown; the only one is 'embedded-demo'.")
        if self.source and self.on_the_fly:
            raise ValueError(f"data.on_the_fly reads text, and data.source={self.source!r} has none; leave it out.")
        _check_part(self, "data")
        if isinstance(self.text_files, str):
            self.text_files = [self.text_files]
        for name in ("block_size", "held_out_rows", "report_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)} is too small; pass at least 1.")
        if self.block_size == 1:
            raise ValueError("data.block_size=1 makes rows of one token, in which nothing is predicted; pass more.")

    def all_sources(self) -> list[SourceConfig]:
        """The sources of text, each with its weight; one where there is only one."""
        if self.sources:
            return self.sources
        names = ("dataset", "subset", "split", "revision", "streaming", "text_files", "text_column")
        return [SourceConfig(**{name: getattr(self, name) for name in names})]


def _check_part(config: DataConfig | SourceConfig, where: str) -> None:
    """Raises a `ValueError` where a part of a dataset is named, and there is no dataset, or one without a name."""
    for name, default in (("subset", None), ("split", "train"), ("revision", None)):
        value = getattr(config, name)
        if value is not None and not value.strip():
            raise ValueError(f"{where} has {name}={value!r}; give a name, or leave it out.")
        if not config.dataset and value != default:
            raise ValueError(
                f"{where} has {name}={value!r}, which is a part of a dataset, and no dataset; leave it out."
            )
    if not config.text_column.strip():
        raise ValueError(f"{where} has text_column={config.text_column!r}; give the column with the text.")
