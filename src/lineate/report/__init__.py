"""RUN/run.json and RUN/pictures to RUN/report.html: one page that needs nothing but itself.

Pictures are embedded, charts are inline SVG, and a content security policy in the page forbids every request. Stands alone:
nothing here imports torch or the rest of lineate, so a run can be reported where it could not be made.
"""

from __future__ import annotations

import base64
import shlex
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, StrictUndefined

from lineate.report import charts, words
from lineate.report.run import Kind, Picture, ReportError, Run, load_run

__all__ = ["ReportError", "render"]

PNG = b"\x89PNG\r\n\x1a\n"


class Embedded(NamedTuple):
    """A picture ready for the page: its words, its data URI and its size in px."""

    title: str
    caption: str
    uri: str
    width: int
    height: int


def render(run: Path) -> Path:
    """Write `run`/report.html from `run`/run.json and the pictures it names; return the page's path.

    A page that is there already is replaced, and only when the new one is whole.
    Raises `ReportError` for a run.json that is missing or invalid, a picture likewise, or a page that cannot be written.
    """
    page, path = _page(run, load_run(run)), run / "report.html"
    partial = path.with_suffix(".html.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ReportError(f"{path} cannot be written: {error.strerror}") from None
    return path


def _page(folder: Path, run: Run) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    said = (words.number, words.fixed, words.percent, words.share, words.duration, words.counted, words.pixels, words.flat)
    environment.filters |= {word.__name__: word for word in (*said, words.sentence)} | {"command": shlex.join}
    template = environment.from_string(resources.files(__name__).joinpath("template.html.j2").read_text(encoding="utf-8"))
    found, pictures = run.results, _pictures(folder, run)
    before = found.fidelity_before.sites if found.fidelity_before else {}
    return template.render(
        run=run, found=found, pictures=pictures, headline=words.headline(run), figures=words.figures(run),
        latency=charts.latency(found.cost) if found.cost and found.cost.rows else None,
        errors=charts.site_errors(before, found.fidelity.sites) if found.fidelity.sites else None,
        key_shift=charts.key_shift(found.key_shift) if found.key_shift else None,
    )  # fmt: skip


def _pictures(folder: Path, run: Run) -> dict[Kind, list[Embedded]]:
    """The pictures by kind, each kind in the order of run.json."""
    kinds: dict[Kind, list[Embedded]] = {"pca": [], "attention": [], "saliency": []}
    for picture in run.pictures:
        kinds[picture.kind].append(_embed(folder, picture))
    return kinds


def _embed(folder: Path, picture: Picture) -> Embedded:
    path = folder / picture.file
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ReportError(f"{folder / 'run.json'} names the picture {picture.file!r}, which lies outside the run's folder")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ReportError(f"{path}, named in run.json, cannot be read: {error.strerror}") from None
    if not data.startswith(PNG) or len(data) < 24:
        raise ReportError(f"{path}, named in run.json, is not a PNG picture")
    width, height = (int.from_bytes(data[start : start + 4], "big") for start in (16, 20))  # the header chunk comes first
    uri = f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"
    return Embedded(picture.title, picture.caption, uri, width, height)
