"""The commands. Each one only parses, calls what does the work, and shows what came of it.

Progress and status go to stderr, results to stdout. What is wrong is one line, "error: ...", and exit status 1; a wrong option
is typer's own usage message and 2; Ctrl-C is 130 and a line that says what was kept. No traceback for anything expected.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from lineate.cli.calibrate import calibrate
from lineate.cli.export import export
from lineate.cli.fid import fid
from lineate.cli.generate import generate
from lineate.cli.options import (
    FORMS,
    SOURCE,
    AnySource,
    Config,
    CropPct,
    Data,
    DemoPreset,
    Device,
    Epochs,
    HeldOut,
    HeldOutData,
    HeldOutSplit,
    ImageColumn,
    Images,
    ImageSize,
    LabelColumn,
    LabelsByNumber,
    Out,
    OutFile,
    Overwrite,
    Preset,
    Recipe,
    Resume,
    Seed,
    Set,
    Sizes,
    SourceArgument,
    Split,
    Stream,
    StrictData,
    Workers,
    converted_as,
)
from lineate.cli.options import settings as read
from lineate.cli.score import dpg, geneval, prompts, shapes
from lineate.cli.terminal import Screen, screen, show, show_accuracy, show_conversions, show_cost, show_recipes

if TYPE_CHECKING:
    from lineate.linearize import Plan
    from lineate.settings import Settings


def _expected() -> tuple[type[BaseException], ...]:
    """Errors that a user can cause or mend."""
    from pydantic import ValidationError

    from lineate.calibrate import CalibrationError
    from lineate.checkpoint import CheckpointError
    from lineate.convert import ConversionError
    from lineate.data import DataError
    from lineate.embedded import EmbeddedModelError
    from lineate.evaluate import EvaluationError
    from lineate.export import ExportError
    from lineate.families import UnsupportedModelError
    from lineate.images import ImageError
    from lineate.kernels.cpu import BuildError
    from lineate.released import ReleasedError
    from lineate.report import ReportError
    from lineate.runs import RunError
    from lineate.settings import SettingsError
    from lineate.sources import SourceError
    from lineate.text2image.autoencoder import GenerateError
    from lineate.text2image.prompts import PromptError
    from lineate.text2image.shapes import ShapesError
    from lineate.train import TrainError

    return (
        BuildError, CalibrationError, CheckpointError, ConversionError, DataError, EmbeddedModelError, EvaluationError,
        ExportError, GenerateError, ImageError, PromptError, ReleasedError, ReportError, RunError, SettingsError, ShapesError,
        SourceError, TrainError, UnsupportedModelError, ValidationError, ModuleNotFoundError, OSError,
    )  # fmt: skip


def _line(error: BaseException) -> str:
    """An error and its notes in one line."""
    text = str(error) or type(error).__name__
    if isinstance(error, ModuleNotFoundError):
        text += "; pip install '.[timm,diffusers,train,cli]' in a clone"
    if _ran_out(error):
        text = f"out of memory: {text}; try smaller sizes, --set calibration.batch=1, a smaller calibration.pool or train.batch"
    return "; ".join(" ".join(part.split()) for part in (text, *getattr(error, "__notes__", ())))


def _ran_out(error: BaseException) -> bool:
    """Whether memory ran out; PyTorch has a class of its own for that on a GPU only."""
    from torch import OutOfMemoryError

    return isinstance(error, MemoryError | OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


class Commands(TyperGroup):
    """The group of all commands; what each may raise is told here, once."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            kept = "; ".join(getattr(stop, "__notes__", ())) or "nothing was written"
            print(f"interrupted: {kept}", file=sys.stderr)
            raise typer.Exit(130) from None
        except Exception as error:
            if not isinstance(error, _expected()) and not _ran_out(error):
                raise
            print(f"error: {_line(error)}", file=sys.stderr)
            raise typer.Exit(1) from None


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for command in (calibrate, generate, fid, prompts, geneval, dpg, shapes, export):
    app.command()(command)


def _plan(settings: Settings, sizes: str | None, image_size: int | None, **rest: Any) -> Plan:
    from lineate.linearize import Plan
    from lineate.settings import parse_sizes

    return Plan(
        conversion=settings.conversion,
        calibration=settings.calibration,
        preset=settings.preset,
        seed=settings.calibration.seed,
        image_size=image_size if image_size is not None else settings.image_size,
        sizes=parse_sizes(sizes) if sizes is not None else settings.sizes,
        **rest,
    )


def _run(plan: Plan) -> None:
    """Do the plan; then the table and, last, the report's path."""
    from lineate.linearize import linearize as run_it
    from lineate.report.run import load_run

    with screen() as shown:
        report = run_it(plan, say=shown.say, progress=shown.progress)
    show(load_run(plan.out))
    typer.echo(f"report: {report}")


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    """Turn a pretrained softmax-attention vision transformer into a linear-time one, in minutes and without labels."""
    if version:
        import lineate

        typer.echo(f"lineate {lineate.__version__}")
        raise typer.Exit


@app.command()
def linearize(
    source: SourceArgument, images: Images, out: Out, held_out: HeldOut = None, preset: Preset = None, config: Config = None,
    set_: Set = None, image_size: ImageSize = None, seed: Seed = None, sizes: Sizes = None, overwrite: Overwrite = False,
    device: Device = "cpu",
    data: Annotated[str | None, typer.Option(metavar="DATA", help=f"Labelled images to train on: {FORMS}.")] = None,
    held_out_data: HeldOutData = None, held_out_split: HeldOutSplit = None, image_column: ImageColumn = None,
    label_column: LabelColumn = None, labels_by_number: LabelsByNumber = False, stream: Stream = None,
    strict_data: StrictData = False, recipe: Recipe = None, epochs: Epochs = None, resume: Resume = False,
) -> None:  # fmt: skip
    """Convert, calibrate, with --data train, measure fidelity, time, and write OUT/report.html beside OUT/model."""
    from lineate.images import find_images
    from lineate.linearize import split
    from lineate.settings import SettingsError

    training = {"--recipe": recipe, "--epochs": epochs, "--held-out-data": held_out_data, "--stream": stream, "--resume": resume}
    if data is None and (given := [name for name, value in training.items() if value]):
        raise SettingsError(f"{given[0]} is for training, which needs --data")
    settings = read(source, preset, config, set_, seed, trains=data is not None, recipe=recipe, epochs=epochs)
    photographs = tuple(find_images(images))
    if held_out is None:
        photographs, measured = split(photographs)
        Screen().say(f"held out {len(measured)} of the photographs in {images}, every 5th in order of name")
    else:
        measured = tuple(find_images(held_out))
    _run(_plan(settings, sizes, image_size, source=source, photographs=photographs, held_out=measured, out=out,
               overwrite=overwrite, device=device, data=data, held_out_split=held_out_split, image_column=image_column,
               label_column=label_column, labels_by_number=labels_by_number, train=settings.train,
               held_out_data=held_out_data, stream=stream, strict=strict_data, resume=resume))  # fmt: skip


@app.command()
def train(
    source: AnySource, data: Data,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write, or to go on in with --resume.")],
    held_out_data: HeldOutData = None, held_out_split: HeldOutSplit = None, image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    preset: Preset = None, recipe: Recipe = None, epochs: Epochs = None, config: Config = None, set_: Set = None,
    calibrate_on: Annotated[Path | None, typer.Option(metavar="DIR", help="Photographs to calibrate on before.")] = None,
    scratch: Annotated[bool, typer.Option("--scratch", help="Draw the weights of timm:NAME or dit:NAME, not load them.")] = False,
    vae: Annotated[Path | None, typer.Option(metavar="DIR", help="diffusers' AutoencoderKL, for a denoiser of latents.")] = None,
    cache: Annotated[Path | None, typer.Option(metavar="DIR", help="A denoiser's pictures made ready (OUT.cache).")] = None,
    stream: Stream = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Of captioned pictures the first N.")] = None,
    image_size: ImageSize = None, strict_data: StrictData = False, labels_by_number: LabelsByNumber = False, seed: Seed = None,
    resume: Resume = False,
    overwrite: Overwrite = False, device: Device = "cpu",
) -> None:  # fmt: skip
    """Convert and train, a classifier or a denoiser, on labelled images; many devices: accelerate launch -m lineate train ..."""
    from lineate.evaluate.top1 import Top1
    from lineate.finetune import train as run_it
    from lineate.images import find_images
    from lineate.tasks.base import TrainPlan

    settings = read(source, preset, config, set_, seed, trains=True, recipe=recipe, epochs=epochs)
    assert settings.train is not None
    plan = TrainPlan(
        source, data, out, settings.conversion, settings.train, settings.calibration, held_out=held_out_data,
        held_out_split=held_out_split, image_column=image_column, label_column=label_column,
        photographs=tuple(find_images(calibrate_on)) if calibrate_on is not None else (), preset=settings.preset,
        recipe=settings.recipe, scratch=scratch, image_size=image_size if image_size is not None else settings.image_size,
        stream=stream, strict=strict_data, labels_by_number=labels_by_number, resume=resume, overwrite=overwrite, device=device,
        vae=vae, cache=cache, limit=limit,
    )  # fmt: skip
    with screen() as shown:
        done = run_it(plan, say=shown.say, progress=shown.progress)
    if done is not None:
        if isinstance(done.figures, Top1):
            show_accuracy({str(out / "model"): done.figures}, None)
        typer.echo(f"model: {done.model}")


@app.command()
def demo(
    out: Out, source: Annotated[str, typer.Option(help=f"The model: {SOURCE}.")] = "embedded", preset: DemoPreset = None,
    config: Config = None, set_: Set = None, image_size: ImageSize = None, seed: Seed = None, sizes: Sizes = None,
    overwrite: Overwrite = False, device: Device = "cpu",
) -> None:  # fmt: skip
    """Linearize the embedded ViT-S/14 on photographs that Python packages ship; the default preset here is t5-plus."""
    from lineate.embedded import CALIBRATION_PHOTOS, HELD_OUT_PHOTOS, photographs

    if preset is None and config is None and converted_as(source) is None:
        preset = "t5-plus"
    settings = read(source, preset, config, set_, seed)
    _run(_plan(settings, sizes, image_size, source=source, photographs=tuple(photographs(CALIBRATION_PHOTOS)),
               held_out=tuple(photographs(HELD_OUT_PHOTOS)), out=out, overwrite=overwrite, device=device))  # fmt: skip


@app.command()
def convert(
    source: AnySource, out: Out, preset: Preset = None, config: Config = None, set_: Set = None, seed: Seed = None,
    delta: Annotated[bool, typer.Option("--delta", help="Save the new tensors alone.")] = False, overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """Convert without calibrating, and save, with a run.json beside the model."""
    from lineate import convert as convert_model
    from lineate import runs, save
    from lineate.checkpoint import RUN, check_target
    from lineate.linearize import describe, tensor_counts
    from lineate.sources import is_denoiser, load_denoiser, load_source
    from lineate.text2image.pipelines import is_pipeline, load_pipeline

    if converted_as(source) is not None:
        from lineate.convert import ConversionError

        raise ConversionError(f"{source} is converted already; choices: embedded, timm:NAME ...")
    settings = read(source, preset, config, set_, seed)
    check_target(out.resolve(), overwrite)
    assert settings.conversion is not None
    if is_pipeline(source):
        model = convert_model(load_pipeline(source).transformer, settings.conversion)
    elif is_denoiser(source):
        model = convert_model(load_denoiser(source), settings.conversion)
    else:
        loaded = load_source(source)
        model = convert_model(loaded.model, settings.conversion, interpolated=loaded.interpolated)
    saved = save(model, out, delta=delta, overwrite=overwrite)
    about = describe(source, model, None, preset=settings.preset, seed=settings.conversion.seed)
    runs.write_json(saved / RUN, about | {"results": {"tensors": tensor_counts(model)}})
    typer.echo(f"model: {saved}")


@app.command()
def bench(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help=f"The model: {SOURCE}; dit:NAME or dit:NAME@CHECKPOINT.")],
    preset: Preset = None, config: Config = None, set_: Set = None, sizes: Sizes = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Time both models through torch.compile.")] = False,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16, of both models.")] = "fp32",
    out: OutFile = None, overwrite: Overwrite = False, device: Device = "cpu",
) -> None:  # fmt: skip
    """Time original and converted model side by side, and count their multiply-adds and memory; no calibration is needed.

    Of a DiT one step is timed, at sizes of its latents. Weights of timm's and of a DiT without a checkpoint are random: they take
    as long, and nothing is downloaded.
    """
    from lineate import runs
    from lineate.convert import record
    from lineate.linearize import choose_sizes, load_timed, measure_cost
    from lineate.settings import parse_sizes

    settings = read(source, preset, config, set_, None)
    wanted = parse_sizes(sizes) if sizes is not None else settings.sizes
    place, dtype = runs.find_device(device), runs.find_precision(precision)
    runs.check_file(out, overwrite)
    with screen() as shown:
        original, converted = (model.to(dtype) for model in load_timed(source, settings.conversion, device))
        figures = measure_cost(original, converted, choose_sizes(original, wanted), shown.progress, compiled)
    show_cost(figures)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        conversion = record(converted).conversion.model_dump(mode="json")
        runs.write_json(out, {"source": source, "command": runs.command_line(), "created": runs.now(),
                        "conversion": conversion, "environment": runs.environment(place),
                        "cost": figures.model_dump(mode="json")})  # fmt: skip
        typer.echo(f"figures: {out}")


@app.command()
def evaluate(
    source: SourceArgument, data: Data, split: Split = None, image_column: ImageColumn = None, label_column: LabelColumn = None,
    against: Annotated[str | None, typer.Option(metavar="SOURCE", help="The original, to compare image by image.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at a time, in each process.")] = 64, workers: Workers = 0,
    crop_pct: CropPct = None, image_size: ImageSize = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many pictures, evenly spread over all.")] = None,
    strict_data: StrictData = False, labels_by_number: LabelsByNumber = False, out: OutFile = None,
    overwrite: Overwrite = False, device: Device = "cpu",
) -> None:  # fmt: skip
    """Top-1 and top-5 accuracy in timm's preprocessing; under `accelerate launch -m` on many GPUs, each image once."""
    from lineate import runs
    from lineate.data import open_data
    from lineate.evaluate import top1
    from lineate.sources import load_source

    runs.check_file(out, overwrite)
    place = runs.find_device(device)
    together = top1.processes(place)
    first = together is None or together.is_main_process
    with screen() as shown:
        models = {name: load_source(name, image_size=image_size) for name in (source, against) if name is not None}
        prepared = {name: top1.prepare(found, crop_pct=crop_pct) for name, found in models.items()}
        pictures = open_data(data, split=split, image_column=image_column, label_column=label_column, strict=strict_data)
        pictures = pictures if limit is None else pictures.limited(limit)
        say = shown.say if first else lambda _: None
        matched = {name: top1.match(pictures, found.model, by_number=labels_by_number, say=say) for name, found in models.items()}
        outcomes = {}
        for name, found in models.items():
            px = prepared[name].image_size
            say(f"evaluating {name} on {len(pictures)} pictures of {data}, split {pictures.split}, at {px} px")
            outcomes[name] = top1.top_k(
                found.model.to(place if together is None else together.device), matched[name], prepared[name].transform(),
                batch=batch, workers=workers, accelerator=together, progress=shown.progress if first else None,
            )  # fmt: skip
    if not first:
        return
    if pictures.skipped:
        shown.say(f"skipped {len(pictures.skipped)} unreadable: {', '.join(pictures.skipped)}")
    paired = None if against is None else top1.compare(outcomes[against], outcomes[source])
    show_accuracy({name: outcome.figures for name, outcome in outcomes.items()}, paired)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        runs.write_json(out, {
            "source": source, "against": against, "data": data, "split": pictures.split, "limit": limit,
            "image_column": image_column, "label_column": label_column,
            "command": runs.command_line(), "created": runs.now(), "environment": runs.environment(place),
            "preprocessing": {name: found.model_dump(mode="json") for name, found in prepared.items()},
            "models": {name: outcome.figures.model_dump(mode="json") for name, outcome in outcomes.items()},
            "paired": None if paired is None else paired.model_dump(mode="json", exclude={"original", "converted"}),
        })  # fmt: skip
        typer.echo(f"figures: {out}")


@app.command()
def analyze(
    source: SourceArgument, images: Images, out: Out, image_size: ImageSize = None, overwrite: Overwrite = False,
    device: Device = "cpu",
) -> None:  # fmt: skip
    """Key shift and implicit attention maps of a model; of original and converted, where SOURCE is a saved directory."""
    import json

    from lineate.images import find_images
    from lineate.linearize import analyze as look_into

    with screen() as shown:
        written = look_into(source, find_images(images), out, image_size=image_size, device=device, overwrite=overwrite,
                            say=shown.say)  # fmt: skip
    shift: dict[str, dict[str, float]] = json.loads(written.read_text(encoding="utf-8"))["key_shift"]
    table = Table("site", *shift, title="Key shift: near 0 centred, near 1 one big shift")
    for site in shift["original"]:
        table.add_row(site, *(f"{shift[name][site]:.3f}" for name in shift))
    Console().print(table)
    typer.echo(f"analysis: {written}")


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `lineate linearize` wrote.")]) -> None:
    """Write RUN/report.html anew from RUN/run.json and its pictures."""
    from lineate.report import render
    from lineate.report.run import load_run

    path = render(run)
    show(load_run(run))
    typer.echo(f"report: {path}")


@app.command()
def presets() -> None:
    """The named conversions and what they are; any field can be changed with --set."""
    from lineate.convert import PRESETS

    show_conversions(PRESETS)


@app.command()
def recipes() -> None:
    """The named trainings and their main numbers; any field can be changed with --set train.FIELD=VALUE."""
    from lineate.recipes import RECIPES

    show_recipes(RECIPES)


@app.command()
def build() -> None:
    """Compile the CPU kernels for this machine, once, with its C++ compiler; converted models find and use them."""
    from lineate.kernels import cpu

    with screen() as shown:
        shown.say("compiling")
        file = cpu.build()
    typer.echo(f"library: {file}")
