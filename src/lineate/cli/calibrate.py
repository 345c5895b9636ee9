"""`lineate calibrate`: a converted model, fitted to its own softmax attention on photographs, or along its own sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lineate.cli.options import (
    AllChannels,
    Config,
    Device,
    Guidance,
    ImageSize,
    Out,
    Overwrite,
    Preset,
    Scheduler,
    Seed,
    Set,
    SourceArgument,
    Steps,
    settings,
)  # fmt: skip
from lineate.cli.terminal import Screen, screen


def calibrate(
    source: SourceArgument, out: Out,
    images: Annotated[Path | None, typer.Option(metavar="DIR", help="Photographs, no labels; not for a denoiser.")] = None,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="Texts to draw, for a text-to-image pipeline.")] = None,
    preset: Preset = None, config: Config = None, set_: Set = None, image_size: ImageSize = None, scheduler: Scheduler = "ddim",
    steps: Steps = 50, guidance: Guidance = 1.5, all_channels: AllChannels = False, seed: Seed = None,
    overwrite: Overwrite = False, device: Device = "cpu",
) -> None:  # fmt: skip
    """Fit a converted model, or SOURCE converted here, to its own softmax attention, and save, with a run.json beside it.

    A denoiser is fitted on what it is asked while it samples, by --scheduler, --steps and --guidance; it needs no pictures, and a
    text-to-image pipeline needs texts.
    """
    from lineate import runs, save
    from lineate.checkpoint import RUN, check_target
    from lineate.generation.classes import Sampling
    from lineate.linearize import describe, tensor_counts
    from lineate.settings import SettingsError
    from lineate.sources import is_denoiser
    from lineate.text2image.pipelines import is_pipeline

    asked = settings(source, preset, config, set_, seed)
    check_target(out.resolve(), overwrite)
    place, size = runs.find_device(device), image_size if image_size is not None else asked.image_size
    draws = is_pipeline(source)
    denoises = draws or is_denoiser(source)
    if draws is (prompts is None):
        raise SettingsError("give --prompts FILE, texts to draw" if draws else "--prompts is for text-to-image pipelines")
    if denoises is not (images is None):
        raise SettingsError(
            "a denoiser is calibrated along its own sampling, without --images" if denoises else "give --images DIR"
        )
    with screen() as shown:
        shown.say(f"loading {source}")
        if prompts is not None:
            chosen = {"steps": steps, "guidance": guidance, "seed": asked.calibration.seed}
            model, result, drawn = _along_prompts(source, asked, prompts, chosen, place, shown)
            used, counts = {"sampling": drawn}, {"calibration": result.images}
        elif denoises:
            fields = {"scheduler": scheduler, "steps": steps, "guidance": guidance, "seed": asked.calibration.seed}
            sampling = Sampling.model_validate(fields | {"guided_channels": None if all_channels else 3})
            model, result = _along_sampling(source, asked, sampling, place, shown)
            used, counts = {"sampling": sampling.model_dump(mode="json")}, {"calibration": result.images}
        else:
            assert images is not None
            model, result, size, counts = _on_photographs(source, asked, images, size, device, shown)
            used = {}
    saved = save(model, out, overwrite=overwrite)
    about = describe(source, model, asked.calibration, preset=asked.preset, seed=asked.calibration.seed, image_size=size) | used
    results = {"tensors": tensor_counts(model), "calibration": result.model_dump(mode="json"), "images": counts}
    runs.write_json(saved / RUN, about | {"results": results})
    table = Table("site", "error before", "after", title=f"Relative error on the examples, {result.seconds:.0f} s")
    for site, error in result.sites.items():
        table.add_row(site, f"{error.before:.3f}", f"{error.after:.3f}")
    Console().print(table)
    typer.echo(f"model: {saved}")


def _on_photographs(source: str, asked: Any, images: Path, size: int | None, device: str, shown: Screen) -> tuple[Any, ...]:
    """The model, what fitting gave, the side of the pictures, and their counts."""
    from lineate.images import find_images
    from lineate.linearize import check_readable, crops, fit, load_pair

    paths = find_images(images)
    check_readable(paths)
    pair = load_pair(source, asked.conversion, image_size=size, device=device)
    pool = crops(pair.source, paths, asked.calibration, asked.calibration.seed)
    shown.say(f"calibrating on {pool.count} crops of {len(pool.paths)} photographs")
    result = fit(pair.converted, pool, asked.calibration, shown.progress)
    if pool.skipped:
        shown.say(f"skipped {len(pool.skipped)} unreadable: {', '.join(path.name for path in pool.skipped)}")
    skipped = {str(path): reason for path, reason in pool.skipped.items()}
    counts = {"calibration": len(pool.paths) - len(skipped), "skipped": skipped}
    return pair.converted, result, pair.source.image_size, counts


def _along_sampling(source: str, asked: Any, sampling: Any, place: Any, shown: Screen) -> tuple[Any, ...]:
    """The model, fitted on calls of its original, and what fitting gave."""
    from lineate import convert
    from lineate.calibrate import calibrate as fit
    from lineate.checkpoint import original_of
    from lineate.generation.classes import denoiser, trajectory
    from lineate.sources import load_denoiser

    model = load_denoiser(source).to(place)
    converted = getattr(model, "lineate_record", None) is not None
    original = denoiser(original_of(model) if converted else model)
    shown.say(f"drawing {asked.calibration.pool} examples along the original's sampling")
    examples = trajectory(original, sampling, asked.calibration.pool, progress=shown.progress)
    if not converted:
        convert(model, asked.conversion)
    shown.say(f"calibrating on {len(examples)} examples")
    return model, fit(model, examples, config=asked.calibration, progress=shown.progress)


def _along_prompts(source: str, asked: Any, file: Path, chosen: dict[str, Any], place: Any, shown: Screen) -> tuple[Any, ...]:
    """A pipeline's transformer, fitted on calls of its original while it draws texts; what fitting gave; and how it drew."""
    from lineate import convert
    from lineate.calibrate import calibrate as fit
    from lineate.checkpoint import original_of
    from lineate.generation.prompted import PromptSampling, prompts_in, trajectory
    from lineate.text2image.pipelines import load_pipeline

    texts, sampling = [prompt.prompt for prompt in prompts_in(file)], PromptSampling.model_validate(chosen)
    pipe = load_pipeline(source).to(place)
    model = pipe.transformer
    converted = getattr(model, "lineate_record", None) is not None
    pipe.transformer = original_of(model) if converted else model
    shown.say(f"drawing texts with the original, to take {asked.calibration.pool} examples on the way")
    examples = trajectory(pipe, texts, sampling, asked.calibration.pool, progress=shown.progress)
    if not converted:
        convert(model, asked.conversion)
    shown.say(f"calibrating on {len(examples)} examples")
    result = fit(model, examples, config=asked.calibration, progress=shown.progress)
    return model, result, sampling.model_dump(mode="json")
