"""Pictures become tensors of the shape, place and values asked for; what cannot be read is named, never silently replaced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from lineate.images import Crops, ImageError, centre_crop, find_images, open_image, whole

ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def gradient(path: Path, width: int, height: int, blue: int = 0) -> Path:
    """A picture whose red is its x and whose green is its y, as shares of the side, so that a crop tells where it came from."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    pixels = np.stack((x * 255, y * 255, np.full_like(x, blue)), axis=-1).round().astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def crops(paths: list[Path], size: int | tuple[int, int] = 16, count: int = 8, **settings: object) -> Crops:
    return Crops(paths, size, count, **({"mean": ZERO, "std": ONE} | settings))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deeper").mkdir()
    for index, name in enumerate(("b.png", "a.PNG", "deeper/c.jpg")):
        gradient(tmp_path / name, 80, 60, blue=100 * index)
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / "._b.png").write_bytes(b"what a Mac leaves behind")
    return tmp_path


def test_find_images_lists_every_picture_in_order(folder: Path) -> None:
    assert find_images(folder) == [folder / "a.PNG", folder / "b.png", folder / "deeper" / "c.jpg"]


def test_find_images_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"holds no picture; endings looked for: .*\.png"):
        find_images(tmp_path)
    with pytest.raises(ImageError, match="nowhere is not there"):
        find_images(tmp_path / "nowhere")
    with pytest.raises(ImageError, match="is not a folder"):
        find_images(gradient(tmp_path / "a.png", 8, 8))


@pytest.mark.parametrize("content", [b"", b"not a picture", None])
def test_an_unreadable_picture_is_one_clear_error(tmp_path: Path, content: bytes | None) -> None:
    path = gradient(tmp_path / "a.png", 80, 60)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)
    with pytest.raises(ImageError, match=r"a\.png cannot be read as a picture") as caught:
        open_image(path)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ImageError, match=r"gone.png cannot be read as a picture.*No such file"):
        open_image(tmp_path / "gone.png")


def test_every_kind_of_picture_opens_as_upright_rgb(tmp_path: Path) -> None:
    ramp = np.arange(256).reshape(16, 16)
    Image.fromarray((ramp * 257).astype(np.uint16)).save(tmp_path / "16bit.png")
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "gray.png")
    for name in ("16bit.png", "gray.png"):
        image = open_image(tmp_path / name)
        assert image.mode == "RGB" and np.array_equal(np.asarray(image)[..., 1], ramp), name
    turned = Image.fromarray(np.zeros((10, 30, 3), np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was held upright
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (10, 30)


def test_crops_depend_on_seed_and_index_alone(folder: Path) -> None:
    paths = find_images(folder)
    first, again, other = crops(paths), crops(paths), crops(paths, seed=1)
    backwards = [again[i] for i in reversed(range(len(again)))][::-1]
    assert all(torch.equal(first[i], backwards[i]) for i in range(len(first)))
    assert torch.equal(crops(paths, count=3)[2], first[2])
    assert not any(torch.equal(first[i], other[i]) for i in range(len(first)))
    assert len({tuple(first[i].flatten().tolist()) for i in range(len(first))}) == len(first)


def test_crops_take_the_pictures_in_turn(folder: Path) -> None:
    paths = find_images(folder)[:2]
    blues = [round(item[2].mean().item() * 255) for item in crops(paths, count=4)]
    assert blues == [100, 0, 100, 0]


def corners(item: Tensor) -> tuple[float, float, float, float]:
    """Width and height of a crop as shares of the picture, and its middle, read off the gradient."""
    red, green = item[0].mean(0), item[1].mean(1)
    stretch = item.shape[-1] / (item.shape[-1] - 1), item.shape[-2] / (item.shape[-2] - 1)
    width, height = (red[-1] - red[0]).abs() * stretch[0], (green[-1] - green[0]) * stretch[1]
    return width.item(), height.item(), red.mean().item(), green.mean().item()


@pytest.mark.parametrize("size", [16, (16, 40)])
def test_crops_cover_the_share_asked_for_in_the_aspect_asked_for(tmp_path: Path, size: int | tuple[int, int]) -> None:
    width, height = 600, 400
    path = gradient(tmp_path / "a.png", width, height)
    dataset = crops([path], size, count=200, scale=(0.1, 0.4))
    target = size[1] / size[0] if isinstance(size, tuple) else 1.0
    boxes = [corners(item) for item in dataset]
    aspects = [w * width / (h * height) / target for w, h, *_ in boxes]
    assert 0.70 < min(aspects) < 0.80 and 1.25 < max(aspects) < 1.40
    areas = [w * h for w, h, *_ in boxes]
    assert max(areas) < 0.42 and (min(areas) > 0.095 or size != 16)
    xs, ys = [x for *_, x, _ in boxes], [y for *_, y in boxes]
    assert min(xs) < 0.35 and max(xs) > 0.65 and min(ys) < 0.35 and max(ys) > 0.65


def test_about_half_the_crops_are_flipped(tmp_path: Path) -> None:
    dataset = crops([gradient(tmp_path / "a.png", 80, 60)], count=200)
    flipped = sum(bool(item[0, 0, 0] > item[0, 0, -1]) for item in dataset)
    assert 70 < flipped < 130
    assert all(item[1, 0, 0] < item[1, -1, 0] for item in dataset)  # never upside down


def test_the_whole_picture_is_the_largest_crop(tmp_path: Path) -> None:
    """A panorama cannot fill a square crop of its whole area: the crop shrinks to fit, and is not squeezed."""
    dataset = crops([gradient(tmp_path / "a.png", 800, 50)], count=50, scale=(1.0, 1.0))
    for w, h, *_ in map(corners, dataset):
        assert 0.7 < w * 800 / (h * 50) < 1.4 and h < 1.03


def test_normalisation_and_loader(folder: Path) -> None:
    paths, mean, std = find_images(folder), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    plain, normal = crops(paths), crops(paths, mean=mean, std=std)
    for raw, scaled in zip(plain, normal, strict=True):
        assert raw.dtype == torch.float32 and raw.min() >= 0 and raw.max() <= 1
        torch.testing.assert_close(scaled, (raw - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])
    batches = list(DataLoader(plain, batch_size=3))
    assert [tuple(batch.shape) for batch in batches] == [(3, 3, 16, 16), (3, 3, 16, 16), (2, 3, 16, 16)]
    with pytest.raises(IndexError):
        plain[len(plain)]


def test_an_unreadable_picture_is_passed_over_and_noted(folder: Path) -> None:
    paths = find_images(folder)[:2]
    broken = folder / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff")
    dataset = crops([broken, *paths], count=6)
    items = list(dataset)
    assert len(items) == 6 and list(dataset.skipped) == [broken] and "cannot be read" in dataset.skipped[broken]
    assert [round(item[2].mean().item() * 255) for item in items] == [100, 100, 0, 100, 100, 0]


def test_no_readable_picture_at_all_is_an_error(tmp_path: Path) -> None:
    broken = [tmp_path / f"{i}.jpg" for i in range(2)]
    for path in broken:
        path.write_bytes(b"no")
    dataset = crops(broken)
    for _ in range(2):
        with pytest.raises(ImageError, match="none of the 2 pictures can be read"):
            dataset[0]
    with pytest.raises(ImageError, match="list of paths is empty"):
        crops([])
    with pytest.raises(ValueError, match=r"scale .* got \(0.5, 0.2\)"):
        crops(broken, scale=(0.5, 0.2))


@pytest.mark.parametrize(("width", "height", "shape"), [(300, 200, (56, 84)), (200, 300, (84, 56)), (500, 20, (56, 1400))])
def test_whole_keeps_the_aspect_and_rounds_to_the_patch(tmp_path: Path, width: int, height: int, shape: tuple[int, int]) -> None:
    picture = whole(gradient(tmp_path / "a.png", width, height), 56, ZERO, ONE, 14)
    assert picture.shape == (1, 3, *shape)
    w, h, x, y = corners(picture[0])
    torch.testing.assert_close(torch.tensor((w, h, x, y)), torch.tensor((1.0, 1.0, 0.5, 0.5)), atol=0.03, rtol=0)


def test_whole_rounds_the_short_side_too(tmp_path: Path) -> None:
    assert whole(gradient(tmp_path / "a.png", 90, 60), 60, ZERO, ONE, 14).shape == (1, 3, 56, 84)
    assert whole(gradient(tmp_path / "b.png", 90, 60), 5, ZERO, ONE, 14).shape == (1, 3, 14, 14)


def test_centre_crop_is_the_middle_square(tmp_path: Path) -> None:
    picture = centre_crop(gradient(tmp_path / "a.png", 300, 100), 32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert picture.shape == (1, 3, 32, 32)
    w, h, x, y = corners((picture[0] + 1) / 2)
    torch.testing.assert_close(torch.tensor((w, h, x, y)), torch.tensor((1 / 3, 1.0, 0.5, 0.5)), atol=0.02, rtol=0)


def test_jitter_changes_colours_and_nothing_else_repeatably(tmp_path: Path) -> None:
    path = gradient(tmp_path / "a.png", 60, 40, blue=80)
    plain, coloured, again = (crops([path], jitter=jitter) for jitter in (0.0, 0.4, 0.4))
    assert any(not torch.equal(plain[i], coloured[i]) for i in range(8))
    for i in range(8):
        assert torch.equal(coloured[i], again[i])
        assert coloured[i].min() >= 0 and coloured[i].max() <= 1
        brightness = torch.stack((plain[i].mean(0).flatten(), coloured[i].mean(0).flatten()))
        assert torch.corrcoef(brightness)[0, 1] > 0.8  # the same place in the picture
    with pytest.raises(ValueError, match="jitter must be a share"):
        crops([path], jitter=1.0)
