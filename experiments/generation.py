"""The small scale of generation: CIFAR-10 in pixels and a DiT that a CPU can train, as long a sequence as the paper's (N = 256).

    python experiments/generation.py          prints the commands that train the softmax host into results/small/dit/host

The host is trained once, for `HOST_STEPS` steps, to a flow: at so few steps it learns faster than DDPM. Every row of the tables
is a conversion of it, perhaps calibrated along its own sampling, and tuned for a share of its steps, all rows alike; then the
same seeds are sampled from each. Figures: KID and FD on 64 principal components, of ImageNet's EfficientNet-lite0, against test
pictures. They are not FID, and of a host this small; what can be read off them is how rows differ.
"""

from __future__ import annotations

import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, Run, Scale, Table
from torch import Tensor, nn
from torchvision.utils import make_grid, save_image

import lineate
from lineate import checkpoint, runs
from lineate.calibrate import CalibrationConfig
from lineate.convert import record
from lineate.data import open_data
from lineate.evaluate.fid import Features, embed, fd, find_extractor, kid, pictures_of
from lineate.generation.classes import Denoiser, Sampling, denoiser, sample, trajectory
from lineate.recipes import dit5
from lineate.settings import read_settings
from lineate.statistics import mean_interval
from lineate.text2image.autoencoder import to_bytes
from lineate.train import TrainError
from lineate.train.config import Denoise, TrainConfig
from lineate.train.diffusion import denoising
from lineate.train.latents import CachedBatches, cache
from lineate.train.loop import fit
from lineate.train.randomness import IMAGE, derive

HOST = RESULTS / "dit" / "host"
WORK = Path("runs/generation")
DATA = "../shared/data/cifar10"
PX, CLASSES, PICTURES = 32, 10, 50_000
BATCH, HOST_STEPS = 32, 6000
SAMPLES, REFERENCE, COMPONENTS = 500, 2000, 64
SAMPLING = Sampling(scheduler="flow", steps=20, guidance=1.0)
CALIBRATION = CalibrationConfig(steps=300, batch=8, pool=256)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPUS = 8  # at full size
Tuning = Callable[[float], list[str]]  # the options that tune, at full size, for a share of the host's steps


def epochs(steps: float) -> float:
    """Epochs of so many steps."""
    return steps / (PICTURES // BATCH)


def budget(share: float) -> str:
    """The field that tunes for a share of the host's steps."""
    return f"train.epochs={epochs(share * HOST_STEPS):.5f}"


# The paper's fine-tuning in the small: a constant rate, twice that for what is new; the average forgets soon, as runs are short.
TUNING = dit5().model_copy(
    update={
        "batch": BATCH, "lr": 5e-4, "min_lr": 5e-4, "clip_grad": 1.0, "denoise": Denoise(objective="flow"), "ema": 0.9,
        "ema_warmup": True, "tracker": "none", "workers": 0,
    }
)  # fmt: skip


def host_command(data: str) -> str:
    """Trains the host and puts it where the tables look for it."""
    fields = {
        "denoise.objective": "flow", "batch": BATCH, "lr": 1.5e-3, "min_lr": 1e-5, "warmup_epochs": epochs(100), "clip_grad": 1,
        "ema": 0.999, "ema_warmup": "true", "precision": "bf16", "checkpoint_steps": 500, "workers": 0, "tracker": "none",
    }  # fmt: skip
    train = shlex.join([
        "lineate", "train", "dit:patch_size=2,hidden_size=64,depth=4,num_heads=2", "--scratch", "--image-size", str(PX),
        "--data", data, "--cache", str(WORK / "cifar10"), "--out", "runs/generation/host", "--preset", "softmax",
        "--recipe", "dit", "--epochs", f"{epochs(HOST_STEPS):.5f}",
        *(word for name, value in fields.items() for word in ("--set", f"train.{name}={value}")),
    ])  # fmt: skip
    kept = f"mkdir -p {HOST.parent} && cp -r runs/generation/host/model {HOST} && cp runs/generation/host/run.json {HOST}"
    return f"{train} && {kept}"


def opened(data: str) -> tuple[Path, Features]:
    """The training pictures made ready, and the features of real ones; both are kept in `WORK`."""
    cache(open_data(data, split="train"), WORK / "cifar10", size=PX)
    kept = WORK / f"real{REFERENCE}.pt"
    extractor = find_extractor("efficientnet-lite0", DEVICE)
    if not kept.exists():
        torch.save(embed(extractor, pictures_of(open_data(data, split="test").limited(REFERENCE))).values, kept)
    return WORK / "cifar10", Features(extractor.name, torch.load(kept, weights_only=True))


def execute(run: Run, seed: int, folder: Path, real: Features) -> dict[str, Any]:
    """Convert the host, calibrate, tune and sample as `run` says; what a result file holds, and the pictures as a grid."""
    started = time.perf_counter()
    settings = read_settings(preset_name=run.preset, assignments=run.conversion_fields(), seed=seed)
    assert settings.conversion is not None
    host = checkpoint.original_of(checkpoint.load(HOST)).to(DEVICE)
    examples = []
    if run.calibrated:
        drawn = SAMPLING.model_copy(update={"seed": seed})
        examples = trajectory(denoiser(host), drawn, CALIBRATION.pool)
    model = lineate.convert(host, settings.conversion)
    results: dict[str, Any] = {"new_parameters": record(model).count("new")}
    if run.calibrated:
        config = CALIBRATION.model_copy(update={"seed": seed})
        results["calibration"] = lineate.calibrate(model, examples, config=config).model_dump(mode="json")
    config = tuning(run, seed)
    if config is not None:
        try:
            results["tuning"] = tune(model, config, folder)
        except TrainError as error:
            results["diverged"] = str(error)
    if "diverged" not in results:
        results["final"] = figures(model, real, RESULTS / "dit" / run.name / f"seed{seed}.png")
    return {
        "run": run.name, "seed": seed, "conversion": settings.conversion.model_dump(mode="json"),
        "train": config and config.model_dump(mode="json"), "results": results,
        "seconds": time.perf_counter() - started, "created": runs.now(),
    }  # fmt: skip


def tuning(run: Run, seed: int) -> TrainConfig | None:
    """How the conversion of a run is tuned; None where it is not."""
    if run.tune is None:
        return None
    values = dict(field.removeprefix("train.").split("=", 1) for field in run.set if field.startswith("train."))
    return TrainConfig.model_validate(TUNING.model_dump() | values | {"protocol": run.tune, "seed": seed})


def tune(model: nn.Module, config: TrainConfig, folder: Path) -> dict[str, Any]:
    """Train `model` on the cache in `folder`."""
    objective = denoising(denoiser(model).null, config.denoise)
    with tempfile.TemporaryDirectory() as work:
        return fit(model, CachedBatches(folder, config), objective, config, Path(work)).model_dump(mode="json")


def pictures(made_by: Denoiser, batch: int = 50) -> Tensor:
    """(SAMPLES, 3, h, w) uint8: the classes in turn, the same seeds for every model."""
    made = []
    for first in range(0, SAMPLES, batch):
        places = range(first, min(first + batch, SAMPLES))
        seeds = [derive(IMAGE, SAMPLING.seed, place) for place in places]
        made.append(to_bytes(sample(made_by, [place % CLASSES for place in places], seeds, SAMPLING)).cpu())
    return torch.cat(made)


def figures(model: nn.Module, real: Features, shown: Path) -> dict[str, Any]:
    """KID and FD of the model's pictures; 40 of them are kept as `shown`, a column a class."""
    made = pictures(denoiser(model))
    found = embed(find_extractor(real.extractor, DEVICE), made.split(50))
    shown.parent.mkdir(parents=True, exist_ok=True)
    save_image(make_grid(made[:40].float() / 255, nrow=CLASSES, padding=1), shown)
    measured = {"kid": kid(found, real, subset=250), "fd": fd(found, real, components=COMPONENTS)}
    return {name: figure.model_dump(mode="json") for name, figure in measured.items()}


def shown(rows: Sequence[dict[str, Any]], part: str = "final") -> str:
    """A table's cell: KID·1000 / FD, each "2.1 ± 0.3" over seeds, and the number of seeds."""
    found = [row["results"][part] for row in rows if part in row["results"]]
    diverged = len(rows) - len(found)
    if not found:
        return f"diverged ({diverged})" if diverged else "not run"
    cells = []
    for name, factor in (("kid", 1000), ("fd", 1)):
        values = [factor * figure[name]["value"] for figure in found]
        interval = mean_interval(values) if len(values) > 1 else None
        cells.append(f"{sum(values) / len(values):.1f}" + (f" ± {(interval.high - interval.low) / 2:.1f}" if interval else ""))
    return f"{' / '.join(cells)} ({len(found)})" + (f", {diverged} diverged" if diverged else "")


def command(table: Table, run: Run, host: str, data: str, *, tuning: Tuning, guidance: float) -> str:
    """The commands that do one run at full size, on `GPUS`: calibrate or not, train as `tuning` says, sample, measure."""
    out = f"runs/{table.name}/{run.name}"
    options = ["--preset", run.preset, *(word for field in run.conversion_fields() for word in ("--set", field))]
    steps, source = [], host
    if run.calibrated:
        steps.append(["lineate", "calibrate", host, *options, "--device", "cuda", "--out", f"{out}-calibrated"])
        source, options = f"{out}-calibrated", []
    many = ["accelerate", "launch", "--num_processes", str(GPUS), "-m", "lineate"]
    if run.tune is not None:
        train = [*many, "train", source, "--data", data, "--vae", "VAE", "--cache", "runs/latents", "--recipe", "dit5"]
        share = next(float(field.partition("=")[2]) for field in run.set if field.startswith("train.epochs"))
        steps.append([*train, *tuning(share / epochs(HOST_STEPS)), *options, "--device", "cuda", "--out", out])
        source = out
    sampled = ["--number", "50000", "--guidance", f"{guidance:g}", "--vae", "VAE", "--batch", "64", "--device", "cuda"]
    steps.append([*many, "generate", source, "--out", f"{out}-pictures", *sampled])
    steps.append(["lineate", "fid", f"{out}-pictures", "--against", "VIRTUAL_imagenet256_labeled.npz", "--device", "cuda"])
    return " && ".join(shlex.join(step) for step in steps)


def of_epochs(host_epochs: int) -> Tuning:
    """The same share of a host's epochs as in the small, in the recipe's steps of 16 pictures a GPU."""
    return lambda share: ["--epochs", f"{share * host_epochs:.3g}"]


def in_steps(steps: int, pictures: int) -> Tuning:
    """So many steps of so many pictures on all GPUs together, whatever the share in the small."""
    return lambda share: ["--set", f"train.steps={steps}", "--set", f"train.batch={pictures // GPUS}"]


def scale(host: str, tuning: Tuning, guidance: float) -> Scale:
    """This scale, for a table whose host at full size is that one, and is tuned there so."""
    return Scale("dit", DATA, opened, execute, shown, partial(command, tuning=tuning, guidance=guidance), host)


if __name__ == "__main__":
    print(host_command(DATA))
