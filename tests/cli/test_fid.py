"""`lineate fid`: figures with all they depend on; what can be compared with what."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from lineate.cli.app import app
from lineate.evaluate import fid
from lineate.evaluate.fid import INCEPTION, Extractor


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["fid", *map(str, arguments)])


def draw(folder: Path, brightness: int, count: int = 12) -> Path:
    folder.mkdir(parents=True)
    made = torch.Generator().manual_seed(brightness)
    for i in range(count):
        pixels = torch.randint(40, (16, 16, 3), dtype=torch.uint8, generator=made) + brightness
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return folder


def stand_in(width: int) -> Extractor:
    """Means of the channels, as if they were many features."""

    def extract(images: Tensor) -> Tensor:
        means = images.float().mean((-1, -2)) / 255
        return torch.cat((means, means.square()), 1).repeat(1, -(-width // 6))[:, :width]

    return Extractor("inception" if width > 6 else "efficientnet-lite0", extract)


def test_pictures_that_are_nearer_have_lower_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fid, "find_extractor", lambda name, *args, **more: stand_in(6))
    real = draw(tmp_path / "real", 100)
    figures = {}
    for brightness in (110, 200):
        found = call(draw(tmp_path / str(brightness), brightness), "--against", real, "--out", tmp_path / f"{brightness}.json")
        assert found.exit_code == 0, found.output
        lines = found.stdout.splitlines()
        assert (
            lines[0].startswith("KID ") and "12 pictures against 12, efficientnet-lite0" in lines[0] and "components" in lines[1]
        )
        figures[brightness] = json.loads((tmp_path / f"{brightness}.json").read_text())["figures"]
    for near, far in zip(figures[110], figures[200], strict=True):
        assert near["metric"] == far["metric"] and near["value"] < far["value"]
    labelled = tmp_path / "labelled"
    for split in ("train", "test"):
        draw(labelled / split / "cat", 100)
    assert "12 pictures against 12" in call(tmp_path / "110", "--against", labelled, "--split", "test").stdout


OWN = """
def features(images):
    means = images.float().mean((-1, -2)) / 255
    return means
"""


def test_folders_are_compared_in_one_table_by_an_extractor_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN, encoding="utf-8")
    own, out = f"{tmp_path / 'mine.py'}:features", tmp_path / "figures.json"
    real, near, far, fewer = (draw(tmp_path / str(b), b, n) for b, n in ((100, 12), (110, 12), (200, 12), (50, 11)))
    found = call(near, "--against", real, "--compare", far, "--compare", near, "--extractor", own, "--out", out)
    assert found.exit_code == 0, found.output
    written = json.loads(out.read_text())
    values = [[figure["value"] for figure in row["figures"]] for row in (written, *written["compared"])]
    assert values[0] == values[2] and all(a < b for a, b in zip(values[0], values[1], strict=True))
    for metric, first, other in zip(("KID", "FD"), values[0], values[1], strict=True):
        assert f"{metric}: 12 pictures against 12, mine.py:features " in found.stdout
        assert f"{other - first:+.4g}"[:5] in found.stdout
    refused = call(near, "--against", real, "--compare", far, "--compare", fewer, "--extractor", own)
    assert refused.exit_code == 1 and not refused.stdout
    assert "figures at different numbers of pictures are not compared; there are 12 in" in refused.stderr
    np.savez(tmp_path / "fewer.npz", arr_0=np.zeros((11, 16, 16, 3), np.uint8))
    assert "11 in" in call(near, "--against", real, "--compare", tmp_path / "fewer.npz").stderr


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed")
def test_adms_statistics_ask_for_inception(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fid, "find_extractor", lambda name, *args, **more: stand_in(INCEPTION + 1008))
    np.savez(tmp_path / "adm.npz", mu=np.zeros(INCEPTION), sigma=np.eye(INCEPTION))
    pictures = draw(tmp_path / "made", 100)
    found = call(pictures, "--against", tmp_path / "adm.npz")
    assert found.exit_code == 0, found.output
    assert [line.split()[0] for line in found.stdout.splitlines()] == ["FID", "IS"] and "12 pictures" in found.stdout
    refused = call(pictures, "--against", tmp_path / "adm.npz", "--extractor", "efficientnet-lite0")
    assert refused.exit_code == 1 and "are of inception's features, not of efficientnet-lite0's" in refused.stderr
    assert call(pictures, "--against", tmp_path / "nowhere").exit_code == 1
