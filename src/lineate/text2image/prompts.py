"""Prompts with what their pictures must show, and the folder of pictures made from them: GenEval's two formats.

    FILE.jsonl               a line a prompt: tag, include [{class, count, color?, position? [relation, index]}], exclude?, prompt
    FOLDER/00000/            a folder a prompt, in the file's order
      metadata.jsonl         its line
      samples/0000.png ...   its pictures

`include` must all be there: so many at least of a class, each of the colour, each in the relation to every object of the clause
at `index`, which comes before. Of what `exclude` names there must be fewer than it counts.
Source: Ghosh et al., arXiv 2310.11513.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator

from lineate.images import ImageError, find_images
from lineate.mixers.base import Frozen

Relation = Literal["left of", "right of", "above", "below"]
RELATIONS: tuple[Relation, ...] = ("left of", "right of", "above", "below")
METADATA, SAMPLES = "metadata.jsonl", "samples"


class PromptError(ValueError):
    """A file of prompts or a folder of their pictures that is not what it should be; the message names it and the reason."""


class Clause(Frozen):
    """Some objects of one class. `position` is their relation to the objects of an earlier clause, and its index."""

    model_config = ConfigDict(populate_by_name=True)

    kind: str = Field(alias="class")
    count: int = Field(ge=1)
    color: str | None = None
    position: tuple[Relation, int] | None = None


class Prompt(Frozen):
    """A text, and what a picture of it must show. `tag` is the skill that it tests."""

    tag: str
    include: tuple[Clause, ...] = ()
    exclude: tuple[Clause, ...] = ()
    prompt: str

    @model_validator(mode="after")
    def _positions_point_back(self) -> Prompt:
        for index, clause in enumerate(self.include):
            if clause.position is not None and not 0 <= clause.position[1] < index:
                raise ValueError(f"the position of clause {index} must name an earlier one, got {clause.position[1]}")
        return self

    def line(self) -> str:
        """The prompt as its line in a file, without the line's end."""
        fields: dict[str, Any] = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        return json.dumps({name: value for name, value in fields.items() if value != []})


def write_prompts(prompts: Sequence[Prompt], file: Path) -> None:
    """Write a line a prompt."""
    file.write_text("".join(f"{prompt.line()}\n" for prompt in prompts), encoding="utf-8")


def read_prompts(file: Path) -> list[Prompt]:
    """The prompts of a file, in order. Raises `PromptError` for what is no such file."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    found = [_parse(line, f"{file}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise PromptError(f"{file} holds no prompt; one JSON object a line was expected")
    return found


def prompt_folder(out: Path, index: int) -> Path:
    """Where the prompt at `index` has its metadata and pictures."""
    return out / f"{index:05}"


def sample_file(out: Path, index: int, number: int) -> Path:
    """Where picture `number` of the prompt at `index` belongs."""
    return prompt_folder(out, index) / SAMPLES / f"{number:04}.png"


def write_layout(prompts: Sequence[Prompt], out: Path) -> None:
    """Make the folders with their metadata, for pictures to be put into at `sample_file`."""
    for index, prompt in enumerate(prompts):
        (prompt_folder(out, index) / SAMPLES).mkdir(parents=True, exist_ok=True)
        write_prompts([prompt], prompt_folder(out, index) / METADATA)


def read_layout(out: Path) -> list[tuple[Prompt, list[Path]]]:
    """Each prompt of a folder with its pictures. Raises `PromptError`, also unless all have as many.

    A prompt that has fewer pictures than the others was not finished, and a mean over it would weigh the prompts unequally.
    """
    folders = _folders(out)
    if not folders:
        raise PromptError(f"{out} holds no folders 00000, 00001 ... of prompts and their pictures")
    found = [(read_prompts(folder / METADATA)[0], _pictures(folder / SAMPLES)) for folder in folders]
    usual = len(found[0][1])
    odd = next(
        (f"{folder} has {len(files)}" for folder, (_, files) in zip(folders, found, strict=True) if len(files) != usual), None
    )
    if odd:
        raise PromptError(f"{odd} pictures and {folders[0]} {usual}; every prompt needs as many")
    return found


def has_layout(out: Path) -> bool:
    """Whether a folder holds folders of prompts."""
    return bool(_folders(out))


def _folders(out: Path) -> list[Path]:
    return sorted(path for path in out.iterdir() if path.is_dir() and path.name.isdigit()) if out.is_dir() else []


def _pictures(folder: Path) -> list[Path]:
    try:
        return find_images(folder)
    except ImageError as error:
        raise PromptError(str(error)) from error


def _parse(line: str, where: str) -> Prompt:
    try:
        return Prompt.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"]))
        raise PromptError(f"{where} is no prompt: {f'{at}: ' if at else ''}{first['msg']}") from error
