"""`lineate calibrate`: a converted model, fitted to its own softmax attention on photographs, or along its own sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lineate.cli.options import (
    AllChannels,
    AnySource,
    Config,
    Device,
    ImageSize,
    Out,
    Overwrite,
    Preset,
    Scheduler,
    Seed,
    Set,
    settings,
)  # fmt: skip
from lineate.cli.terminal import Screen, screen

# What each kind of source is told beside the conversion; the first is needed where it is a folder or a file.
CLASSIFIER, DENOISER, PIPELINE = "a classifier", "a denoiser of classes", "a text-to-image pipeline"
TOLD = {
    CLASSIFIER: ("--images", "--image-size"),
    DENOISER: ("--scheduler", "--steps", "--guidance", "--all-channels"),
    PIPELINE: ("--prompts", "--steps", "--guidance", "--image-size"),
}
NEEDED = {CLASSIFIER: "--images DIR, photographs", PIPELINE: "--prompts FILE, texts to draw"}


def calibrate(
    source: AnySource, out: Out,
    images: Annotated[Path | None, typer.Option(metavar="DIR", help="Photographs, no labels, for a classifier.")] = None,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="Texts to draw, for a text-to-image pipeline.")] = None,
    preset: Preset = None, config: Config = None, set_: Set = None, image_size: ImageSize = None, scheduler: Scheduler = None,
    steps: Annotated[int | None, typer.Option(help="Of sampling (default: 50; of texts 28).")] = None,
    guidance: Annotated[float | None, typer.Option(help="Of sampling; 1 is none (default: 1.5; of texts 3.5).")] = None,
    all_channels: AllChannels = False, seed: Seed = None, overwrite: Overwrite = False, device: Device = "cpu",
) -> None:  # fmt: skip
    """Fit a converted model, or SOURCE converted here, to its own softmax attention, and save, with a run.json beside it.

    A denoiser is fitted on what it is asked while it samples, by --scheduler, --steps and --guidance; it needs no pictures, and a
    text-to-image pipeline needs texts.
    """
    from lineate import runs, save
    from lineate.checkpoint import RUN, check_target
    from lineate.linearize import describe, tensor_counts

    asked = settings(source, preset, config, set_, seed)
    check_target(out.resolve(), overwrite)
    place, size = runs.find_device(device), image_size if image_size is not None else asked.image_size
    kind = _kind(source)
    _check_told(kind, {
        "--images": images, "--prompts": prompts, "--image-size": image_size, "--scheduler": scheduler, "--steps": steps,
        "--guidance": guidance, "--all-channels": all_channels or None,
    })  # fmt: skip
    said = {"steps": steps, "guidance": guidance, "scheduler": scheduler, "seed": asked.calibration.seed}
    chosen: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
    with screen() as shown:
        shown.say(f"loading {source}")
        if prompts is not None:
            chosen |= {"size": (size, size)} if size is not None else {}
            model, result, drawn = _along_prompts(source, asked, prompts, chosen, place, shown)
            used, counts = {"sampling": drawn}, {"calibration": result.images}
        elif kind == DENOISER:
            chosen |= {"guided_channels": None if all_channels else 3}
            model, result, drawn = _along_sampling(source, asked, chosen, place, shown)
            used, counts, size = {"sampling": drawn}, {"calibration": result.images}, None
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


def _kind(source: str) -> str:
    from lineate.sources import is_denoiser
    from lineate.text2image.pipelines import is_pipeline

    return PIPELINE if is_pipeline(source) else DENOISER if is_denoiser(source) else CLASSIFIER


def _check_told(kind: str, given: dict[str, Any]) -> None:
    """Raise `SettingsError` for an option that means nothing to this kind of source, and for one that is missing."""
    from lineate.settings import SettingsError

    if vain := next((name for name, value in given.items() if value is not None and name not in TOLD[kind]), None):
        raise SettingsError(f"{vain} means nothing to {kind}; choices: {', '.join(TOLD[kind])}")
    if kind in NEEDED and given[TOLD[kind][0]] is None:
        raise SettingsError(f"{kind} is calibrated on something; give {NEEDED[kind]}")


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


def _along_sampling(source: str, asked: Any, chosen: dict[str, Any], place: Any, shown: Screen) -> tuple[Any, ...]:
    """The model, fitted on calls of its original; what fitting gave; and how it sampled."""
    from lineate import convert
    from lineate.calibrate import calibrate as fit
    from lineate.checkpoint import original_of
    from lineate.generation.classes import Sampling, denoiser, remember, trajectory
    from lineate.sources import load_denoiser

    model = load_denoiser(source).to(place)
    converted = getattr(model, "lineate_record", None) is not None
    original = denoiser(original_of(model) if converted else model)
    usual = {"scheduler": original.scheduler("ddim"), "steps": 50, "guidance": original.default_guidance}
    sampling = Sampling.model_validate(usual | chosen)
    shown.say(f"drawing {asked.calibration.pool} examples along the original's sampling")
    examples = trajectory(original, sampling, asked.calibration.pool, progress=shown.progress)
    if not converted:
        convert(model, asked.conversion)
    if sampling.scheduler == "flow":  # said, or known before
        remember(model, "flow")
    shown.say(f"calibrating on {len(examples)} examples")
    return model, fit(model, examples, config=asked.calibration, progress=shown.progress), sampling.model_dump(mode="json")


def _along_prompts(source: str, asked: Any, file: Path, chosen: dict[str, Any], place: Any, shown: Screen) -> tuple[Any, ...]:
    """A pipeline's transformer, fitted on calls of its original while it draws texts; what fitting gave; and how it drew."""
    from lineate import convert
    from lineate.calibrate import calibrate as fit
    from lineate.checkpoint import original_of
    from lineate.generation.prompted import PromptSampling, prompts_in, trajectory
    from lineate.text2image.pipelines import load_pipeline, put_aside

    texts, sampling = [prompt.prompt for prompt in prompts_in(file)], PromptSampling.model_validate(chosen)
    pipe = load_pipeline(source).to(place)
    model = pipe.transformer
    converted = getattr(model, "lineate_record", None) is not None
    pipe.transformer = original_of(model) if converted else model
    shown.say(f"drawing texts with the original, to take {asked.calibration.pool} examples on the way")
    examples = trajectory(pipe, texts, sampling, asked.calibration.pool, progress=shown.progress)
    put_aside(pipe)
    if not converted:
        convert(model, asked.conversion)
    shown.say(f"calibrating on {len(examples)} examples")
    result = fit(model, examples, config=asked.calibration, progress=shown.progress)
    return model, result, sampling.model_dump(mode="json")
