"""The options that commands share, and the settings that they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from lineate.convert import Conversion
    from lineate.settings import Settings

SOURCE = "embedded, timm:NAME, timm:NAME@CHECKPOINT, transformers:NAME, or a directory that lineate wrote"
SourceArgument = Annotated[str, typer.Argument(metavar="SOURCE", help=f"The model: {SOURCE}.")]
# What commands take that are not about pictures seen alone.
AnySource = Annotated[
    str, typer.Argument(metavar="SOURCE", help=f"The model: {SOURCE}; dit:NAME@CHECKPOINT; of texts shapes or diffusers:NAME.")
]
Preset = Annotated[
    str | None,
    typer.Option(help="Name of a conversion; `lineate presets` lists them (default: t5; of a denoiser dit5, of texts sd35-t5)."),
]
DemoPreset = Annotated[str | None, typer.Option(help="Name of a conversion; `lineate presets` lists them (default: t5-plus).")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="One field, for example mixer.inner=2layer.")]
Config = Annotated[Path | None, typer.Option(metavar="FILE.json", help="Conversion, calibration, training; a run.json will do.")]
Images = Annotated[Path, typer.Option(metavar="DIR", help="Folder of photographs, searched through; no labels.")]
HeldOut = Annotated[Path | None, typer.Option(metavar="DIR", help="Photographs to measure on (default: every 5th of --images).")]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder to write, which must not exist.")]
OutFile = Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write the figures there too.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run wrote there.")]
ImageSize = Annotated[int | None, typer.Option(metavar="PX", help="Side of the pictures (default: the model's own).")]
Sizes = Annotated[str | None, typer.Option(metavar="PX,...", help="Sizes to time at: 224,448 or 448x672.")]
FORMS = "a folder with a sub-folder per class, a folder or file of parquet, hf:NAME or hf:NAME:CONFIG"
Data = Annotated[str, typer.Option(metavar="DATA", help=f"Labelled images: {FORMS}.")]
Split = Annotated[str | None, typer.Option(help="Which part of DATA (default: validation, else test, else the only one).")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read and decode pictures.")]
StrictData = Annotated[bool, typer.Option("--strict-data", help="Stop at a picture that cannot be read; default: leave it out.")]
ImageColumn = Annotated[str | None, typer.Option(metavar="NAME", help="Where DATA has its pictures (default: found by type).")]
LabelColumn = Annotated[str | None, typer.Option(metavar="NAME", help="Where DATA has its labels (default: found by type).")]
HeldOutSplit = Annotated[
    str | None, typer.Option(metavar="NAME", help="Split to measure on (default: validation, else test, else the only one).")
]
LabelsByNumber = Annotated[
    bool, typer.Option("--labels-by-number", help="Labels count as the model's classes do, whatever the names say.")
]
HeldOutData = Annotated[str | None, typer.Option(metavar="DATA", help="What to measure on (default: in --data).")]
Stream = Annotated[int | None, typer.Option(min=1, metavar="N", help="Read in passing, N pictures an epoch.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from OUT's newest checkpoint.")]
CropPct = Annotated[float | None, typer.Option(help="Share of the resized picture that is kept (default: the model's own).")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything that is drawn (default: 0).")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Recipe = Annotated[
    str | None,
    typer.Option(
        help="Name of a training: t5, t5-freeze, t5-lora, deit; of classes dit5, dit; of texts sd35-t5, sd35-ft "
        "(default: t5, dit5 or sd35-t5)."
    ),
]
Epochs = Annotated[float | None, typer.Option(metavar="N", help="Epochs, with the recipe's warm-up in proportion.")]

Scheduler = Annotated[
    str | None, typer.Option(help="Of classes: ddpm, ddim, or flow for a velocity (default: for what the model learned).")
]
AllChannels = Annotated[
    bool, typer.Option("--all-channels", help="Guide every channel; default: the first 3, as DiT's sampler does.")
]


def settings(
    source: str, preset: str | None, config: Path | None, assignments: list[str] | None, seed: int | None, **training: Any
) -> Settings:
    """What the options say of a source, from where a classifier or a denoiser begins."""
    from lineate.settings import read_settings
    from lineate.sources import is_denoiser
    from lineate.text2image.pipelines import is_pipeline

    default = "sd35-t5" if is_pipeline(source) else "dit5" if is_denoiser(source) else "t5"
    return read_settings(
        preset_name=preset, config=config, assignments=assignments or (), seed=seed, converted=converted_as(source),
        default=default, **training,
    )  # fmt: skip


def converted_as(source: str) -> Conversion | None:
    """The conversion of what a directory holds; None for a source that is still to be converted."""
    from lineate.checkpoint import read_record, saved_in

    conversion = read_record(saved).conversion if (saved := saved_in(source)) is not None else None
    return None if conversion is None or conversion.keeps_softmax else conversion


def place_to_draw(device: str, out: Path | None) -> tuple[torch.device, Accelerator | None, bool]:
    """The device, what the processes share if there are several, and whether this is the first of them, which alone speaks."""
    from lineate import runs
    from lineate.evaluate.top1 import processes
    from lineate.text2image.autoencoder import GenerateError

    shared = processes(place := runs.find_device(device))
    if shared is None:
        return place, None, True
    if out is None:
        raise GenerateError("several processes need --out, a folder that all of them write into")
    return shared.device, shared, bool(shared.is_main_process)


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Height and width of "1024" or "768x1280". Raises `GenerateError`."""
    from lineate.text2image.autoencoder import GenerateError

    if text is None:
        return None
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip(), re.ASCII | re.IGNORECASE)
    if found is None:
        raise GenerateError(f"--size takes pixels like 1024 or 768x1280 (height x width), got {text!r}")
    return int(found[1]), int(found[2] or found[1])
