"""`lineate fid`: how far pictures are from real ones, by KID and FD offline, or by FID and IS against ADM's statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lineate.cli.options import Device, OutFile, Overwrite, Split
from lineate.cli.terminal import screen

OFFLINE, INCEPTION = "efficientnet-lite0", "inception"


def fid(
    pictures: Annotated[Path, typer.Argument(metavar="PICTURES", help="A folder of pictures, or an .npz with arr_0.")],
    against: Annotated[
        str, typer.Option(metavar="REAL", help="A folder, an .npz with arr_0 or with ADM's mu and sigma, or labelled images.")
    ],
    split: Split = None,
    extractor: Annotated[
        str | None, typer.Option(help="efficientnet-lite0, dinov2-small, inception or timm:NAME (default: the first, or for "
                                      "mu and sigma inception).")
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
    chosen = extractor or (INCEPTION if statistics else OFFLINE)
    with screen() as shown:
        shown.say(f"embedding {pictures} by {chosen}")
        asked = find_extractor(chosen, place, weights=weights)
        real: Any = None if statistics else embed(asked, pictures_of(_real(against, split), batch=batch))
        made = pictures_of(pictures, batch=batch)
        if chosen == INCEPTION:
            figures = list(fid_and_is(made, read_reference(Path(against)) if statistics else real, asked))
        else:
            found = embed(asked, made)
            figures = [kid(found, real), fd(found, real, components=components)]
    for figure in figures:
        typer.echo(str(figure))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        runs.write_json(out, {"pictures": str(pictures), "against": against, "split": split, "command": runs.command_line(),
                              "created": runs.now(), "environment": runs.environment(place),
                              "figures": [figure.model_dump(mode="json") for figure in figures]})  # fmt: skip
        typer.echo(f"figures: {out}")


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
