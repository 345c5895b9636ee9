"""`lineate export`: a model as an ONNX graph, a program of torch.export, or a pipeline of diffusers, checked beside the model."""

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
    out: Annotated[Path, typer.Option(metavar="FILE", help="Write it there: *.onnx, *.pt2 for torch, a folder for diffusers.")],
    format: Annotated[
        str, typer.Option(help="onnx, torch for a program of torch.export, or, of a DiT, diffusers, which reloads with lineate.")
    ] = "onnx",
    outputs: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="logits, last_hidden_state, class_token (default: the first that it has)."),
    ] = None,
    opset: Annotated[int | None, typer.Option(min=18, help="ONNX's opset (default: torch's own).")] = None,
    vae: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="diffusers' AutoencoderKL, for a whole DiTPipeline and not its model alone."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """A file that runs without lineate, for pictures of any size, checked against the model before it appears.

    Of a DiT also diffusers' DiTPipeline, which DiffusionPipeline.from_pretrained reads after `import lineate`.
    """
    from lineate import runs
    from lineate.export import ExportError
    from lineate.export import export as write
    from lineate.generation.pipeline import export_pipeline
    from lineate.sources import is_denoiser, load_denoiser, load_source

    if format == "diffusers":
        if outputs or opset or overwrite:
            raise ExportError("--outputs, --opset and --overwrite are for files; diffusers' is a folder that must not exist")
        with screen() as shown:
            shown.say(f"loading {run}, writing and checking {out}")
            error = export_pipeline(load_denoiser(run), out, vae)
        typer.echo(f"folder: {out}; relative error of what is read back {error:.1e}")
        return
    if vae is not None:
        raise ExportError("--vae is for --format diffusers")
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
