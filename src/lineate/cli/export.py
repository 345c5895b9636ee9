"""`lineate export`: a model as an ONNX graph or a program of torch.export, checked beside the model at several sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lineate.cli.options import SOURCE, Overwrite
from lineate.cli.terminal import screen

_RUN = f"a run's folder that holds one, {SOURCE}, or dit:NAME@CHECKPOINT"


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help=f"The model: {_RUN}.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Write it there: *.onnx, or *.pt2 for torch.")],
    format: Annotated[str, typer.Option(help="onnx, or torch for a program of torch.export.")] = "onnx",
    outputs: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="logits, last_hidden_state, class_token (default: the first that it has)."),
    ] = None,
    opset: Annotated[int | None, typer.Option(min=18, help="ONNX's opset (default: torch's own).")] = None,
    overwrite: Overwrite = False,
) -> None:
    """A file that runs without lineate, for pictures of any size, checked against the model before it appears."""
    from lineate import runs
    from lineate.export import export as write
    from lineate.sources import is_denoiser, load_denoiser, load_source

    runs.check_file(out, overwrite)
    with screen() as shown:
        shown.say(f"loading {run}")
        model = load_denoiser(run) if is_denoiser(run) else load_source(run).model
        shown.say(f"tracing, writing and checking {out}")
        asked: Any = {"format": format, "outputs": [name.strip() for name in outputs.split(",")] if outputs else ()}
        agreements = write(model.float(), out, opset=opset, **asked)
    table = Table("size", "largest relative error of an output", title="The file beside the model")
    for row in agreements:
        table.add_row(f"{row.height}×{row.width}", f"{row.error:.1e}")
    Console().print(table)
    typer.echo(f"file: {out}")
