"""`lineate generate`: pictures of classes or of texts, as files, as one picture, of classes as one .npz."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from lineate.cli.options import AllChannels, Scheduler, parse_size, place_to_draw
from lineate.cli.prompts import draw_prompts
from lineate.cli.terminal import screen

MOST_COLUMNS = 16
_RUN = "a directory saved by lineate, a run's folder that holds one, dit:NAME@CHECKPOINT; of texts also shapes or diffusers:NAME"


def generate(
    run: Annotated[str | None, typer.Argument(metavar="RUN", help=f"The model: {_RUN} (default, of texts: shapes).")] = None,
    prompt: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="A text; may be given several times.")] = None,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="Texts, a line each, or GenEval's metadata.")] = None,
    classes: Annotated[str | None, typer.Option(metavar="N,...", help="Classes, taken in turn (default: all).")] = None,
    grid: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Write all pictures there, as one.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write each picture there; goes on where it stopped.")] = None,
    npz: Annotated[
        Path | None,
        typer.Option(metavar="FILE.npz", help="Write all pictures there, as ADM's evaluation takes them; of classes."),
    ] = None,
    number: Annotated[
        int | None, typer.Option(min=1, help="How many pictures (default: 4 of each of --classes, or 16); of texts, of each: 4.")
    ] = None,
    scheduler: Scheduler = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the scheduler (default: 250; of texts 28).")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Of classifier-free guidance; 1 is none (default: 4; of texts 3.5)")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="PX", help="1024, or height x width, 768x1280 (default: the model's own).")
    ] = None,
    all_channels: AllChannels = False,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at a time, in each process.")] = 16,
    vae: Annotated[Path | None, typer.Option(metavar="DIR", help="diffusers' AutoencoderKL, for a model of latents.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files at --grid and --npz.")] = False,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16 (default: fp32; of texts on a GPU bf16).")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Pictures of classes, or of texts with --prompt or --prompts; with --out on many GPUs: accelerate launch -m lineate ..."""
    from lineate import runs
    from lineate.generation.classes import Sampling, denoiser, pack
    from lineate.generation.classes import generate as make
    from lineate.generation.classes import grid as together
    from lineate.sources import load_denoiser
    from lineate.text2image.autoencoder import GenerateError, load_autoencoder, pixels_a_latent

    if grid is None and out is None and npz is None:
        raise GenerateError("nothing to write; choices: --grid FILE.png, --out DIR, of classes --npz FILE.npz, or several")
    if npz is not None and npz.suffix != ".npz":
        raise GenerateError(f"--npz names a file *.npz, got {npz.name!r}")
    for file in (grid, npz):
        runs.check_file(file, overwrite)
    if prompt or prompts is not None:
        if classes is not None or vae is not None or (prompt and prompts is not None):
            raise GenerateError(
                "--prompt TEXT, --prompts FILE and --classes N,... are three ways to say what; --vae is for classes"
            )
        given = {"--scheduler": scheduler is not None, "--all-channels": all_channels, "--npz": npz is not None}
        if any(given.values()):
            raise GenerateError(f"{next(name for name, so in given.items() if so)} is for classes, not for texts")
        draw_prompts(
            run or "shapes", prompt or (), prompts, out=out, grid=grid, images=number or 4, size=size, batch=batch, device=device,
            precision=precision, steps=steps, guidance=guidance, seed=seed,
        )  # fmt: skip
        return
    if run is None:
        raise GenerateError("no model; give RUN, or --prompt TEXT for the stand-in's pictures")
    asked = {"scheduler": scheduler, "steps": steps, "guidance": guidance}
    said = {name: value for name, value in asked.items() if value is not None}
    dtype, sides = runs.find_precision(precision or "fp32"), parse_size(size)
    place, shared, first = place_to_draw(device, out)
    with screen() as shown, tempfile.TemporaryDirectory() as scratch:
        autoencoder = load_autoencoder(vae, place) if vae is not None else None
        model = denoiser(load_denoiser(run).to(place, dtype), _latents(sides, pixels_a_latent(autoencoder)))
        usual = {"scheduler": model.scheduler("ddpm"), "steps": 250, "guidance": 4.0 if model.null is not None else 1.0}
        fields = usual | said | {"seed": seed, "guided_channels": None if all_channels else 3}
        chosen = _numbers(classes) if classes is not None else list(range(model.classes))
        count = number or (4 * len(chosen) if classes is not None else 16)
        files = make(
            model, out or Path(scratch), Sampling.model_validate(fields), classes=chosen, number=count, batch=batch,
            accelerator=shared, vae=autoencoder, progress=shown.progress if first else None,
        )  # fmt: skip
        if grid is not None and first:
            grid.parent.mkdir(parents=True, exist_ok=True)
            columns = len(chosen) if len(chosen) <= MOST_COLUMNS else min(MOST_COLUMNS, math.isqrt(count))
            together(files, columns).save(grid)
        if npz is not None and first:
            npz.parent.mkdir(parents=True, exist_ok=True)
            pack(files, npz)
    if first:
        written = (("pictures", out), ("grid", grid), ("npz", npz))
        typer.echo("; ".join(f"{what}: {path}" for what, path in written if path is not None))


def _latents(size: tuple[int, int] | None, factor: int) -> tuple[int, int] | None:
    """The size of the latents of pictures of `size` px. Raises `GenerateError` where they have none."""
    from lineate.text2image.autoencoder import GenerateError

    if size is None:
        return None
    if size[0] % factor or size[1] % factor:
        raise GenerateError(f"--size: the autoencoder makes sides that are multiples of {factor} px, got {size[0]}x{size[1]}")
    return size[0] // factor, size[1] // factor


def _numbers(text: str) -> list[int]:
    """Whole numbers between commas. Raises `GenerateError` for anything else."""
    from lineate.text2image.autoencoder import GenerateError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise GenerateError(f"classes are whole numbers between commas, as in 207,360; got {text!r}")
    return [int(part) for part in parts]
