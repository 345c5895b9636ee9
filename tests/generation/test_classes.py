"""Samplers against their formulas, guidance against its definition, and pictures that depend on nothing but seed and number."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn

import lineate
from lineate.checkpoint import original_of
from lineate.convert import ConversionRecord, record
from lineate.families import family
from lineate.generation import classes as module
from lineate.generation.classes import (
    Denoiser,
    Sampling,
    denoiser,
    generate,
    grid,
    guided,
    make_scheduler,
    pack,
    read,
    remember,
    sample,
)
from lineate.models.dit import DiT
from lineate.text2image.autoencoder import GenerateError

WORKER = Path(__file__).parent / "generating.py"


class Stub(nn.Module):
    """(x, t, y) -> `outputs` channels: a convolution that time and class shift."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, channels)
        self.convolution = nn.Conv2d(channels, outputs, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.convolution(x + self.embedding(y)[:, :, None, None] + (t[:, None, None, None] / 1000).cos())
        return out.tanh()


def stub(channels: int = 4, *, learned: bool = True) -> Denoiser:
    torch.manual_seed(1)
    made = Stub(channels, 2 * channels if learned else channels)
    return Denoiser(made, (channels, 6, 6), 4, learned, 4)


def noise(seed: int, shape: tuple[int, int, int], steps: int) -> list[Tensor]:
    """What is drawn for a picture, in order, in double precision."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn((1, *shape), generator=draw).double() for _ in range(steps)]


def chain(steps: list[int]) -> tuple[list[float], list[float]]:
    """ᾱ at the steps, rising, and before each of them."""
    beta = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    bar = [math.prod(1 - b for b in beta[: t + 1]) for t in steps]
    return bar, [1.0, *bar[:-1]]


@torch.no_grad()
def ancestral(made: Denoiser, label: int, seed: int, count: int, learned: bool) -> Tensor:
    """Nichol & Dhariwal's sampler: a chain of fewer steps whose ᾱ are the original's, with Σ_θ between β̃ and β."""
    steps = [round(i * 999 / (count - 1)) for i in range(count)]
    bars, befores = chain(steps)
    x, *drawn = noise(seed, made.shape, count)
    for i in reversed(range(count)):
        bar, before, beta = bars[i], befores[i], 1 - bars[i] / befores[i]
        output = made.model(x.float(), torch.tensor([steps[i]]), torch.tensor([label])).double()
        found, v = output.chunk(2, 1) if learned else (output, torch.ones(1))
        clean = (x - math.sqrt(1 - bar) * found) / math.sqrt(bar)
        mean = (math.sqrt(before) * beta * clean + math.sqrt(1 - beta) * (1 - before) * x) / (1 - bar)
        if i == 0:
            return mean
        low, high = math.log(beta * (1 - before) / (1 - bar)), math.log(beta)
        x = mean + torch.exp(((v + 1) / 2 * high + (1 - v) / 2 * low) / 2) * drawn[count - 1 - i]
    raise AssertionError


@pytest.mark.parametrize(("count", "learned"), [(250, True), (7, True), (7, False)])
def test_ddpm_is_the_formula(count: int, learned: bool) -> None:
    made = stub(learned=learned)
    found = sample(made, [2, 3], [11, 12], Sampling(steps=count))
    expected = torch.cat([ancestral(made, label, seed, count, learned) for label, seed in ((2, 11), (3, 12))])
    assert float((found.double() - expected).abs().max() / expected.abs().max()) < 2e-5


def test_ddim_is_the_formula() -> None:
    made, count = stub(), 10
    steps = [100 * i + 99 for i in range(count)]
    bars, befores = chain(steps)
    (x,) = noise(5, made.shape, 1)
    with torch.no_grad():
        for i in reversed(range(count)):
            found = made.model(x.float(), torch.tensor([steps[i]]), torch.tensor([1])).double()[:, :4]
            clean = (x - math.sqrt(1 - bars[i]) * found) / math.sqrt(bars[i])
            x = math.sqrt(befores[i]) * clean + math.sqrt(1 - befores[i]) * found
    torch.testing.assert_close(sample(made, [1], [5], Sampling(scheduler="ddim", steps=count)).double(), x, rtol=1e-4, atol=1e-4)


def test_flow_is_eulers_method_from_noise_to_data() -> None:
    made = stub()
    (x,) = noise(5, made.shape, 1)
    with torch.no_grad():
        for step in range(8):
            x = x + made.model(x.float(), torch.tensor([step / 8]), torch.tensor([1])).double()[:, :4] / 8
    torch.testing.assert_close(sample(made, [1], [5], Sampling(scheduler="flow", steps=8)).double(), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "flow"])
def test_data_of_one_point_are_reached(scheduler: str) -> None:
    """Of a point c the exact noise is (x - √ᾱ·c)/√(1 - ᾱ) and the velocity (c - x)/(1 - t); the last step lands on c."""
    bars = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().add(1).cumprod(0).float()

    def exact(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if scheduler == "flow":
            return (0.25 - x) / (1 - t[:, None, None, None])
        bar = bars[t][:, None, None, None]
        noise = (x - bar.sqrt() * 0.25) / (1 - bar).sqrt()
        return torch.cat((noise, torch.zeros_like(x)), 1)

    made = stub()
    made.model.forward = exact  # type: ignore[method-assign]
    found = sample(made, [0], [3], Sampling(scheduler=scheduler, steps=5))
    torch.testing.assert_close(found, torch.full_like(found, 0.25), rtol=1e-3, atol=1e-3)


def test_guidance_moves_three_channels_or_all() -> None:
    with_class, without = torch.randn(2, 3, 8, 2, 2)
    three = guided(with_class, without, 1.5, 3)
    torch.testing.assert_close(three[:, :3], 1.5 * with_class[:, :3] - 0.5 * without[:, :3])
    assert torch.equal(three[:, 3:], with_class[:, 3:])
    torch.testing.assert_close(guided(with_class, without, 1.0, 4), with_class)
    torch.testing.assert_close(guided(with_class, without, 0.0, 8), without)


def test_a_guided_sample_asks_for_both_at_once() -> None:
    made = stub()
    plain = made.model.forward
    seen: list[tuple[Tensor, Tensor]] = []

    def watch(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append((x, y))
        return plain(x, t, y)

    made.model.forward = watch  # type: ignore[method-assign]
    found = [
        sample(made, [1, 2], [3, 4], Sampling(steps=3, guidance=w, guided_channels=c)) for w, c in ((4, 3), (4, None), (1, 3))
    ]
    assert seen[0][1].tolist() == [1, 2, 4, 4] and torch.equal(seen[0][0][:2], seen[0][0][2:])
    assert seen[-1][1].tolist() == [1, 2]
    assert not torch.allclose(found[0], found[1]) and not torch.allclose(found[0], found[2])


def test_a_picture_does_not_depend_on_its_company(tmp_path: Path) -> None:
    made, sampling = stub(3), Sampling(steps=4, guidance=2, seed=9)
    alone, together = (
        generate(made, tmp_path / str(batch), sampling, classes=(2, 0, 3), number=5, batch=batch) for batch in (1, 4)
    )
    assert [file.name for file in alone] == [f"0000{i}.png" for i in range(5)]
    pixels = [torch.stack([read(file).int() for file in files]) for files in (alone, together)]
    assert int((pixels[0] - pixels[1]).abs().max()) <= 1  # a level, where rounding falls to either side
    assert not torch.equal(pixels[0][0], pixels[0][3])  # the same class, another seed


def test_generating_goes_on_where_it_stopped(tmp_path: Path) -> None:
    made, sampling = stub(3), Sampling(steps=3)
    files = generate(made, tmp_path, sampling, classes=(0, 1), number=4, batch=3)
    whole = [file.read_bytes() for file in files]
    files[1].unlink()
    before = files[2].stat().st_mtime_ns
    more = generate(made, tmp_path, sampling, classes=(0, 1), number=5)
    assert [file.read_bytes() for file in more[:4]] == whole and more[4].is_file()
    assert files[2].stat().st_mtime_ns == before
    assert {path.name for path in tmp_path.iterdir()} == {file.name for file in more} | {module.ABOUT}


def test_pictures_made_otherwise_are_not_gone_on_with(tmp_path: Path) -> None:
    made, sampling = stub(3), Sampling(steps=3)
    generate(made, tmp_path / "a", sampling, classes=(0, 1), number=1)
    with pytest.raises(GenerateError, match="made otherwise, its classes differs"):
        generate(made, tmp_path / "a", sampling, classes=(1,), number=1)
    with pytest.raises(GenerateError, match="made otherwise, its sampling differs"):
        generate(made, tmp_path / "a", Sampling(steps=3, seed=1), classes=(0, 1), number=1)
    with torch.no_grad():
        made.model.convolution.bias += 1e-3  # type: ignore[union-attr,operator]
    with pytest.raises(GenerateError, match="made otherwise, its model differs"):
        generate(made, tmp_path / "a", sampling, classes=(0, 1), number=1)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "holiday.png").touch()
    with pytest.raises(GenerateError, match=r"holds pictures and no sampling\.json"):
        generate(made, tmp_path / "b", sampling, classes=(0, 1), number=1)


def test_latents_go_through_the_autoencoder(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2, layers_per_block=1,
    ).eval()  # fmt: skip
    made, sampling = stub(4), Sampling(scheduler="ddim", steps=2)
    (file,) = generate(made, tmp_path / "a", sampling, classes=(1,), number=1, vae=vae)
    latents = sample(made, [1], [module.derive(module.IMAGE, 0, 0)], sampling)
    with torch.no_grad():
        decoded = vae.decode(latents / 0.18215).sample[0]
    assert torch.equal(read(file), (127.5 * decoded + 128).clamp(0, 255).to(torch.uint8))
    with pytest.raises(GenerateError, match="need an autoencoder"):
        generate(made, tmp_path / "b", sampling, classes=(1,), number=1)
    with pytest.raises(GenerateError, match="takes latents of 4 channels, and the model makes 3"):
        generate(stub(3), tmp_path / "b", sampling, classes=(1,), number=1, vae=vae)
    assert not (tmp_path / "b").exists()


def test_dits_tell_what_they_make() -> None:
    from diffusers import DiTTransformer2DModel

    own = DiT((4, 8), 2, 3, 8, 1, 2, num_classes=4)
    made = denoiser(own)
    assert (made.shape, made.classes, made.learned, made.null) == ((3, 4, 8), 4, True, 4)
    assert sample(made, [0, 3], [0, 1], Sampling(steps=2, guidance=3)).shape == (2, 3, 4, 8)
    theirs: Any = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1, sample_size=4,
        norm_num_groups=2, num_embeds_ada_norm=4,
    )  # fmt: skip
    made = denoiser(theirs)
    assert (made.shape, made.classes, made.learned, made.null) == ((4, 4, 4), 4, True, 4)
    assert sample(made, [0], [0], Sampling(steps=2, guidance=3)).shape == (1, 4, 4, 4)
    with pytest.raises(GenerateError, match="Linear is no class-conditional denoiser"):
        denoiser(nn.Linear(2, 2))


def test_what_a_dit_learned_it_keeps() -> None:
    """Through conversion, saving and back to its host; it is not asked for anything else."""
    model = DiT((4, 8), 2, 3, 24, 1, 2, num_classes=4)
    assert denoiser(model).scheduler("ddim") == "ddim"  # a released file does not say
    remember(model, "flow", (6, 6))
    remember(lineate.convert(model, "dit5"), "flow", (8, 4))
    again = ConversionRecord.model_validate_json(record(model).model_dump_json())
    for found in (model, original_of(model), family(again.family).build(again.host or {})):
        made = denoiser(found)
        assert (made.objective, made.shape, made.scheduler("ddim")) == ("flow", (3, 8, 4), "flow")
    assert sample(denoiser(model, (4, 12)), [0], [0], Sampling(scheduler="flow", steps=2)).shape == (1, 3, 4, 12)
    with pytest.raises(GenerateError, match="learned flow, not what ddpm asks; choices: flow"):
        sample(denoiser(model), [0], [0], Sampling(steps=2))
    with pytest.raises(GenerateError, match="latents of 5x4 are no multiples of the patch of 2"):
        denoiser(model, (5, 4))
    with pytest.raises(GenerateError, match="learned flow, and ddpm is another objective"):
        remember(model, "ddpm")


def test_a_model_without_a_null_label_is_not_guided(tmp_path: Path) -> None:
    made = denoiser(DiT(4, 2, 3, 8, 1, 2, num_classes=4, class_dropout_prob=0.0))
    with pytest.raises(GenerateError, match=r"guidance 1\.5 needs a model with a null label; choices here: 1"):
        generate(made, tmp_path / "a", Sampling(guidance=1.5), classes=(0,), number=1)
    assert sample(made, [0], [0], Sampling(steps=2)).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"classes": (4,)}, "no class 4; the model has classes 0 to 3"),
        ({"number": 0}, "must not be empty"),
        ({"classes": ()}, "must not"),
    ],
)
def test_what_cannot_be_made_is_refused_first(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(GenerateError, match=reason):
        generate(stub(3), tmp_path / "a", Sampling(), **({"classes": (0,), "number": 1} | changes))
    assert not (tmp_path / "a").exists()


def test_steps_that_a_scheduler_cannot_take_are_refused() -> None:
    with pytest.raises(ValidationError, match="steps must divide that; got 30"):
        Sampling(scheduler="ddim", steps=30)
    with pytest.raises(ValidationError, match="ddpm needs at least 2 steps"):
        Sampling(steps=1)


def test_the_schedulers_steps_are_dits() -> None:
    """250 of 1000, both ends included, evenly spread."""
    times = make_scheduler(Sampling(), learned=True).timesteps.tolist()
    assert times == [round(i * 999 / 249) for i in reversed(range(250))]


def test_grid_and_npz_hold_the_pictures(tmp_path: Path) -> None:
    files = generate(stub(3), tmp_path / "a", Sampling(steps=2), classes=(0, 1), number=4)
    shown: Callable[..., Tensor] = lambda x, y: torch.from_numpy(np.array(grid(files, 2))[y : y + 6, x : x + 6]).permute(2, 0, 1)  # noqa: E731
    assert torch.equal(shown(2, 2), read(files[0])) and torch.equal(shown(10, 10), read(files[3]))
    pack(files, tmp_path / "samples.npz")
    stored = np.load(tmp_path / "samples.npz")["arr_0"]
    assert stored.shape == (4, 6, 6, 3) and stored.dtype == np.uint8
    assert np.array_equal(stored[2], np.array(Image.open(files[2])))
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".npz"] == ["samples.npz"]


@pytest.mark.slow
def test_two_processes_make_what_one_makes(tmp_path: Path) -> None:
    """Over gloo; the two go on where a process alone was killed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for name, with_launcher in (("one", []), ("two", launcher)):
        if with_launcher:
            (tmp_path / name).mkdir()
            for made in ("00001.png", module.ABOUT):
                shutil.copy2(tmp_path / "one" / made, tmp_path / name)
        command = [sys.executable, *with_launcher, str(WORKER), str(tmp_path / name)]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert len(one) == 6 and one == two and read(tmp_path / "two" / "00004.png").shape == (3, 12, 16)
    assert (tmp_path / "two" / "00001.png").stat().st_mtime_ns == (tmp_path / "one" / "00001.png").stat().st_mtime_ns
