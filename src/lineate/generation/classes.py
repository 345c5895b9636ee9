"""Pictures from a class-conditional denoiser: diffusers' schedulers, classifier-free guidance, one file and one seed a picture.

    ddpm   x_{t-1} ~ N(μ_θ, Σ_θ) on evenly spaced steps of the chain of `lineate.train.diffusion`; DiT's own has 250
    ddim   the same chain without noise (η = 0)
    flow   x ← x + u_θ(x, t, y)/steps from t = 0 to 1: Euler's method, for models that learned a velocity
    guidance   out = out_∅ + w·(out_y - out_∅); w = 1 asks for the class alone

What a DiT learned, noise or a velocity, and at which size, it keeps (`remember`); to sample it as the other is refused.

DiT's three-channel quirk: its sampler guides the first 3 of 4 latent channels, and what it published was made so; the fourth
channel and the variance are those of the class alone. `guided_channels` None guides all C, and still not the variance.

Every draw for picture i follows from (seed, i), and is made on the CPU: neither the batch, the device, the number of processes
nor a run's interruption changes what is drawn. Files appear whole, and those that are there are kept. Pixels are bytes as
`lineate.text2image.autoencoder` says.
Sources: Ho et al., arXiv 2006.11239; Song et al., arXiv 2010.02502; Ho & Salimans, arXiv 2207.12598.

Legend: B batch, C channels, h×w grid.
"""

from __future__ import annotations

import json
import os
import secrets
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lineate.calls import Call, listening
from lineate.convert import ConversionRecord
from lineate.evaluate import Progress, evaluating
from lineate.images import open_image
from lineate.mixers.base import Frozen
from lineate.models.dit import DiT
from lineate.text2image.autoencoder import GenerateError, decode, fingerprint, to_bytes
from lineate.train.diffusion import Ddpm, predict
from lineate.train.randomness import IMAGE, TRAJECTORY, derive

ABOUT = "sampling.json"
KEPT_STEPS = 8  # of a trajectory: few, so that the pool has many pictures, and enough that sampling them is not the longest part


class Sampling(Frozen):
    """How pictures are drawn. `guided_channels` None is all; see the module docstring for DiT's 3."""

    scheduler: Literal["ddpm", "ddim", "flow"] = "ddpm"
    steps: int = Field(250, ge=1, le=1000)
    guidance: float = Field(1.0, ge=0)
    guided_channels: int | None = Field(3, ge=1)
    seed: int = Field(0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _steps_fit(self) -> Sampling:
        if self.scheduler == "ddpm" and self.steps < 2:
            raise ValueError("ddpm needs at least 2 steps: the first is that of pure noise, the last that of least")
        if self.scheduler == "ddim" and Ddpm().steps % self.steps:
            raise ValueError(f"ddim strides evenly over {Ddpm().steps} steps, so steps must divide that; got {self.steps}")
        return self


@dataclass(frozen=True)
class Denoiser:
    """A model (x, t, y) -> C or 2C channels with what it makes, (C, h, w), of `classes` classes; `null` is the label for none.

    `learned` says whether it gives a variance; `null` is None where the model knows no such label, and `objective`, "ddpm" for
    noise or "flow" for a velocity, where it does not say what it learned.
    """

    model: nn.Module
    shape: tuple[int, int, int]
    classes: int
    learned: bool
    null: int | None
    objective: str | None = None

    @property
    def default_guidance(self) -> float:
        """What is asked for where nothing is said, along a trajectory: the paper's, or none where there is no null label."""
        return 1.5 if self.null is not None else 1.0

    def scheduler(self, of_noise: str) -> str:
        """The scheduler for what was learned: flow for a velocity, and `of_noise` for noise, or where that is not known."""
        return "flow" if self.objective == "flow" else of_noise


def denoiser(model: nn.Module, size: tuple[int, int] | None = None) -> Denoiser:
    """`model` as what can be sampled: this project's DiT or diffusers', at `size` of its latents or the one it learned last.

    Raises `GenerateError` for any other model, and for a size that it cannot have.
    """
    if isinstance(model, DiT):
        of = model.arguments
        null = of["num_classes"] if of["class_dropout_prob"] > 0 else None
        height, width = size or of["sample_size"] or of["input_size"]
        if height < 1 or width < 1 or height % model.patch_size or width % model.patch_size:
            raise GenerateError(f"latents of {height}x{width} are no multiples of the patch of {model.patch_size}")
        made = (of["in_channels"], height, width)
        return Denoiser(model, made, of["num_classes"], of["learn_sigma"], null, of["objective"])
    config: Any = getattr(model, "config", None)
    classes = getattr(config, "num_embeds_ada_norm", None)
    if classes is None or not hasattr(config, "sample_size") or getattr(config, "norm_type", "") != "ada_norm_zero":
        raise GenerateError(
            f"{type(model).__name__} is no class-conditional denoiser; choices: DiT, diffusers' DiTTransformer2DModel"
        )
    channels, side = config.in_channels, config.sample_size
    if size not in (None, (side, side)):
        raise GenerateError(f"a {type(model).__name__} draws at its own size alone, latents of {side}x{side}; got {size}")
    return Denoiser(model, (channels, side, side), classes, (config.out_channels or channels) == 2 * channels, classes)


def remember(model: nn.Module, objective: str, size: tuple[int, int] | None = None) -> None:
    """Keep in a denoiser, converted or not, what it learns from now on and at which size of its latents.

    Raises `GenerateError` where it says that it learned otherwise, or is diffusers' and so cannot keep it.
    """
    found = denoiser(model)
    if found.objective not in (None, objective):
        raise GenerateError(
            f"the model learned {found.objective}, and {objective} is another objective; choices: train.denoise.objective="
            f"{found.objective}, or the model from before"
        )
    if isinstance(model, DiT):
        model.arguments |= {"objective": objective} | ({"sample_size": list(size)} if size is not None else {})
        if isinstance(done := getattr(model, "lineate_record", None), ConversionRecord):
            host = {"arguments": dict(model.arguments)}
            cast(Any, model).lineate_record = done.model_copy(update={"host": host})
    elif objective != "ddpm" or size not in (None, found.shape[1:]):
        raise GenerateError(
            f"a {type(model).__name__} cannot keep that it learned {objective} at {size}; choices: ddpm at {found.shape[1:]}, or "
            "dit:NAME@FOLDER, which makes it a DiT of this project"
        )


def make_scheduler(sampling: Sampling, learned: bool) -> Any:
    """diffusers' scheduler with its steps set, for the chain that the objectives use."""
    from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

    if sampling.scheduler == "flow":
        made = FlowMatchEulerDiscreteScheduler(shift=1.0)
        made.set_timesteps(sigmas=[1 - step / sampling.steps for step in range(sampling.steps)])
        return made
    chain = Ddpm()
    noise = {"num_train_timesteps": chain.steps, "beta_start": chain.beta_start, "beta_end": chain.beta_end, "clip_sample": False}
    if sampling.scheduler == "ddpm":
        variance = "learned_range" if learned else "fixed_large"
        made = DDPMScheduler(variance_type=variance, timestep_spacing="linspace", **noise)
    else:  # its steps are chain // steps apart whatever the spacing, and only "trailing" has them so
        made = DDIMScheduler(timestep_spacing="trailing", **noise)
    made.set_timesteps(sampling.steps)
    return made


def guided(with_class: Tensor, without: Tensor, strength: float, channels: int) -> Tensor:
    """Outputs (B, C or 2C, h, w): the first `channels` moved away from those of no class, the others those of the class."""
    start = without[:, :channels]
    return torch.cat((start + strength * (with_class[:, :channels] - start), with_class[:, channels:]), 1)


@torch.inference_mode()
def sample(made_by: Denoiser, labels: Sequence[int], seeds: Sequence[int], sampling: Sampling) -> Tensor:
    """(B, C, h, w) fp32: what the model makes of these labels, one seed each. Raises `GenerateError` if it did not learn that."""
    _check_sampling(made_by, sampling)
    from diffusers.utils.torch_utils import randn_tensor

    reference = next(made_by.model.parameters())
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    x: Tensor = randn_tensor((len(labels), *made_by.shape), generator=draws, device=reference.device, dtype=torch.float32)
    ask = _asker(made_by, torch.tensor(labels, device=reference.device), sampling)
    scheduler = make_scheduler(sampling, made_by.learned)
    with evaluating(made_by.model):
        for t in scheduler.timesteps:
            if sampling.scheduler == "flow":  # its σ runs from noise to data too, but as 1 - t, against our velocity
                output = -ask(x.to(reference.dtype), 1 - t / scheduler.config.num_train_timesteps)[:, : x.shape[1]]
            else:
                output = ask(x.to(reference.dtype), t)
                output = output if sampling.scheduler == "ddpm" else output[:, : x.shape[1]]
            x = scheduler.step(output, t, x, generator=draws).prev_sample
    return x


def trajectory(
    made_by: Denoiser, sampling: Sampling, count: int, *, batch: int = 16, progress: Progress | None = None
) -> list[Call]:
    """`count` calls of the model, one example each and in host memory, as sampling makes them, for `lineate.calibrate`.

    Classes are drawn evenly. Of every picture `KEPT_STEPS` steps are kept, drawn evenly from all; with guidance those of no class
    are among them. All follows from the sampling's seed.
    """
    draw = torch.Generator().manual_seed(derive(TRAJECTORY, sampling.seed))
    kept: list[Call] = []
    while len(kept) < count:
        steps = torch.randperm(sampling.steps, generator=draw)[:KEPT_STEPS].tolist()
        labels = torch.randint(made_by.classes, (batch,), generator=draw).tolist()
        seeds = torch.randint(2**62, (batch,), generator=draw).tolist()
        heard: list[Call] = []
        with listening([made_by.model], heard.append):
            sample(made_by, labels, seeds, sampling)
        kept += [single.to("cpu") for step in steps for single in heard[step].each()]
        if progress is not None:
            progress(min(len(kept), count), count, "sampling")
    return [kept[index] for index in torch.randperm(len(kept), generator=draw)[:count].tolist()]


def _asker(made_by: Denoiser, labels: Tensor, sampling: Sampling) -> Callable[[Tensor, Tensor], Tensor]:
    """(x, t ()) -> the model's output in fp32, guided."""
    if sampling.guidance == 1:
        return lambda x, t: predict(made_by.model, x, t.to(x.device).expand(len(x)), labels)
    assert made_by.null is not None
    both = torch.cat((labels, torch.full_like(labels, made_by.null)))
    channels = min(sampling.guided_channels or made_by.shape[0], made_by.shape[0])

    def ask(x: Tensor, t: Tensor) -> Tensor:
        output = predict(made_by.model, torch.cat((x, x)), t.to(x.device).expand(len(both)), both)
        with_class, without = output.chunk(2)
        return guided(with_class, without, sampling.guidance, channels)

    return ask


def generate(
    made_by: Denoiser,
    out: Path,
    sampling: Sampling,
    *,
    classes: Sequence[int],
    number: int,
    vae: nn.Module | None = None,
    batch: int = 16,
    accelerator: Any = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write pictures `out`/00000.png to `number` - 1, of the classes in turn; those that are there from before are kept.

    Latents go through `vae`, on the model's device; a model of three channels makes pixels. `accelerator` is an
    `accelerate.Accelerator` or `PartialState` where several processes share the work. All files are there when this returns.
    Raises `GenerateError`, also if `out` holds pictures made otherwise.
    """
    _check(made_by, classes, number, batch, vae)
    _check_sampling(made_by, sampling)
    about = {"sampling": sampling.model_dump(mode="json"), "classes": list(classes), "model": fingerprint(made_by.model)}
    claim(out, about | {"autoencoder": fingerprint(vae) if vae is not None else None})
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator is not None else (0, 1)
    files = [out / f"{index:05}.png" for index in range(number)]
    mine = [index for index in range(rank, number, world) if not files[index].is_file()]
    for first in range(0, len(mine), batch):
        indices = mine[first : first + batch]
        seeds = [derive(IMAGE, sampling.seed, index) for index in indices]
        x = sample(made_by, [classes[index % len(classes)] for index in indices], seeds, sampling)
        pixels = to_bytes(x if vae is None else decode(vae, x)).cpu()
        for index, picture in zip(indices, pixels, strict=True):
            write_picture(files[index], picture)
        if progress is not None:
            progress(min(first + batch, len(mine)), len(mine), "generating")
    if accelerator is not None:
        accelerator.wait_for_everyone()
    return files


def grid(files: Sequence[Path], columns: int) -> Any:
    """The pictures side by side, as one PIL picture."""
    from torchvision.utils import make_grid

    return _picture(make_grid(torch.stack([read(file) for file in files]), nrow=columns, padding=2, pad_value=255))


def pack(files: Sequence[Path], target: Path) -> None:
    """The pictures, all of one size, as `arr_0` (n, h, w, 3) in an .npz, for ADM's evaluation; one at a time is in memory."""
    import numpy as np

    partial, shape = target.with_name(f".{target.stem}.{secrets.token_hex(4)}.npz"), read(files[0]).shape
    about: Any = {"descr": "|u1", "fortran_order": False, "shape": (len(files), *shape[1:], 3)}
    try:
        with zipfile.ZipFile(partial, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            np.lib.format.write_array_header_1_0(stream, about)
            for file in files:
                if (picture := read(file)).shape != shape:
                    raise GenerateError(f"{file} is another size than {files[0]}; an .npz holds pictures of one")
                stream.write(picture.permute(1, 2, 0).numpy().tobytes())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def read(file: Path) -> Tensor:
    """A picture as uint8 (3, h, w)."""
    from torchvision.transforms.functional import pil_to_tensor

    found: Tensor = pil_to_tensor(open_image(file))
    return found


def _check_sampling(made_by: Denoiser, sampling: Sampling) -> None:
    """Raise `GenerateError` for a scheduler or a guidance that the model did not learn."""
    if made_by.objective is not None and (made_by.objective == "flow") != (sampling.scheduler == "flow"):
        choices = "flow" if made_by.objective == "flow" else "ddpm, ddim"
        raise GenerateError(f"the model learned {made_by.objective}, not what {sampling.scheduler} asks; choices: {choices}")
    if made_by.null is None and sampling.guidance != 1:
        raise GenerateError(f"guidance {sampling.guidance:g} needs a model with a null label; choices here: 1")


def _check(made_by: Denoiser, classes: Sequence[int], number: int, batch: int, vae: nn.Module | None) -> None:
    """Raise `GenerateError` for what is asked in vain, before anything is made."""
    if not classes or number < 1 or batch < 1:
        raise GenerateError(f"classes, number and batch must not be empty, got {list(classes)}, {number} and {batch}")
    wrong = [label for label in classes if not 0 <= label < made_by.classes]
    if wrong:
        raise GenerateError(f"no class {wrong[0]}; the model has classes 0 to {made_by.classes - 1}")
    channels, takes = made_by.shape[0], getattr(getattr(vae, "config", None), "latent_channels", None)
    if vae is None and channels != 3:
        raise GenerateError(f"the model makes latents of {channels} channels, which need an autoencoder to become pictures")
    if vae is not None and takes != channels:
        raise GenerateError(f"the autoencoder takes latents of {takes} channels, and the model makes {channels}")


def claim(out: Path, about: Mapping[str, Any]) -> None:
    """Write down how the pictures in `out` are made, or find that it says the same."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        strangers = any(out.glob("*.png"))  # asked first: another process writes pictures after its note alone
        if not (out / ABOUT).is_file():
            if strangers:
                raise GenerateError(f"{out} holds pictures and no {ABOUT} that says how they were made; choose another folder")
            partial = out / f".{secrets.token_hex(4)}"
            partial.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            os.replace(partial, out / ABOUT)
        found = json.loads((out / ABOUT).read_text(encoding="utf-8"))
    except (FileExistsError, json.JSONDecodeError) as error:
        raise GenerateError(f"{out} is no folder of generated pictures: {error}") from error
    other = [name for name, value in about.items() if not isinstance(found, dict) or found.get(name) != value]
    if other:
        raise GenerateError(f"{out} holds pictures made otherwise, its {other[0]} differs; choose another folder")


def _picture(pixels: Tensor) -> Any:
    """uint8 (3, h, w) as PIL's."""
    from torchvision.transforms.functional import to_pil_image

    return to_pil_image(pixels)


def write_picture(file: Path, pixels: Tensor) -> None:
    """Write uint8 (3, h, w) as PNG, whole or not at all."""
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        _picture(pixels).save(partial, format="PNG")
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
