"""`lineate fid`: how far pictures are from real ones, by KID and FD offline, or by FID and IS against ADM's statistics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lineate.cli.options import Device, OutFile, Overwrite, Split
from lineate.cli.terminal import screen

if TYPE_CHECKING:
    from lineate.evaluate.fid import Figure

OFFLINE, INCEPTION = "efficientnet-lite0", "inception"


def fid(
    pictures: Annotated[Path, typer.Argument(metavar="PICTURES", help="A folder of pictures, or an .npz with arr_0.")],
    against: Annotated[
        str, typer.Option(metavar="REAL", help="A folder, an .npz with arr_0 or with ADM's mu and sigma, or labelled images.")
    ],
    compare: Annotated[
        list[Path] | None,
        typer.Option(metavar="PICTURES", help="As many others, measured alike, in one table; may be given several times."),
    ] = None,
    split: Split = None,
    extractor: Annotated[
        str | None, typer.Option(help="efficientnet-lite0, dinov2-small, inception, timm:NAME, or your own FILE.py:FUNCTION "
                                      "of (B, 3, h, w) uint8, giving (B, d) (default: the first, or for mu and sigma inception).")
    ] = None,
    weights: Annotated[Path | None, typer.Option(metavar="FILE", help="Weights of inception; else they are fetched.")] = None,
    components: Annotated[int, typer.Option(min=1, max=64, help="Principal components of FD, offline.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 64,
    out: OutFile = None, overwrite: Overwrite = False, device: Device = "cpu",
) -> None:  # fmt: skip
    """KID and FD of PICTURES against real ones, or FID and IS; each with its numbers of pictures and its extractor."""
    from lineate import runs
    from lineate.evaluate import EvaluationError
    from lineate.evaluate.fid import embed, fd, fid_and_is, find_extractor, kid, pictures_of, read_reference

    runs.check_file(out, overwrite)
    place, statistics = runs.find_device(device), _statistics(against)
    if statistics and extractor not in (None, INCEPTION):
        raise EvaluationError(f"the statistics in {against} are of inception's features, not of {extractor}'s")
    chosen, sources = extractor or (INCEPTION if statistics else OFFLINE), [pictures, *(compare or ())]
    _check_numbers(sources)
    with screen() as shown:
        asked = find_extractor(chosen, place, weights=weights)
        real: Any = read_reference(Path(against)) if statistics else embed(asked, pictures_of(_real(against, split), batch=batch))

        def measure(source: Path) -> list[Figure]:
            shown.say(f"embedding {source} by {chosen}")
            made = pictures_of(source, batch=batch)
            if chosen == INCEPTION:
                return list(fid_and_is(made, real, asked))
            found = embed(asked, made)
            return [kid(found, real), fd(found, real, components=components)]

        first, *others = [measure(source) for source in sources]
    _show(sources, first, others)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        told, *compared = (
            {"pictures": str(source), "figures": [figure.model_dump(mode="json") for figure in row]}
            for source, row in zip(sources, (first, *others), strict=True)
        )
        runs.write_json(out, {"against": against, "split": split, "command": runs.command_line(), "created": runs.now(),
                              "environment": runs.environment(place), **told, "compared": compared})  # fmt: skip
        typer.echo(f"figures: {out}")


def _show(sources: Sequence[Path], first: list[Figure], others: list[list[Figure]]) -> None:
    """The figures, a line each; or, of several folders, a table, and below it what all figures of a column depend on."""
    from lineate.evaluate.fid import difference

    if not others:
        for figure in first:
            typer.echo(str(figure))
        return
    heads = [head for figure in first for head in (figure.metric, f"minus {sources[0].name}'s")]
    table = Table("pictures", *heads)
    table.add_row(str(sources[0]), *(cell for figure in first for cell in (figure.short, "")))
    for source, row in zip(sources[1:], others, strict=True):
        apart = (f"{difference(one, other):+.4g}" for one, other in zip(first, row, strict=True))
        table.add_row(str(source), *(cell for pair in zip((figure.short for figure in row), apart, strict=True) for cell in pair))
    Console().print(table)
    for figure in first:
        typer.echo(f"{figure.metric}: {figure.basis}")


def _check_numbers(sources: Sequence[Path]) -> None:
    """Raise `EvaluationError` unless all have as many pictures: figures at different numbers are not compared."""
    from lineate.evaluate import EvaluationError
    from lineate.evaluate.fid import count_pictures

    counts = {source: count_pictures(source) for source in sources}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{count:,} in {source}" for source, count in counts.items())
        raise EvaluationError(f"figures at different numbers of pictures are not compared; there are {said}")


def _statistics(against: str) -> bool:
    """Whether these are ADM's mean and covariance."""
    import zipfile

    path = Path(against)
    if path.suffix != ".npz" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as stored:
        return {"mu.npy", "sigma.npy"} <= set(stored.namelist())


def _real(against: str, split: str | None) -> Any:
    """Real pictures: a folder of them or an .npz, or else labelled images."""
    from lineate.data import open_data

    path = Path(against)
    flat = path.is_dir() and any(file.suffix.lower() in (".png", ".jpg", ".jpeg") for file in path.iterdir())
    return path if split is None and (flat or path.suffix == ".npz") else open_data(against, split=split)
