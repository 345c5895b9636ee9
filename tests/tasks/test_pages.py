"""docs/sd35.md's commands and Python, one after the other, on the stand-in: from a pipeline to a tuned one for diffusers."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from torchvision.transforms.functional import to_pil_image
from typer.testing import CliRunner

import lineate
from lineate.cli.app import app
from lineate.convert import record
from lineate.generation.classes import read
from lineate.text2image.pipelines import STAND_IN
from lineate.text2image.shapes import TrainingScenes, find_world

PAGE = Path(__file__).parents[2] / "docs" / "sd35.md"
MODEL = "stabilityai/stable-diffusion-3.5-medium"
# What makes each piece small enough to be run here; all else is as on the page.
SHORTER = {
    "calibrate": "--steps 2 --set calibration.steps=2 --set calibration.batch=2 --set calibration.pool=4",
    "generate": "--steps 2 --number 1",
    "train": "--set train.max_steps=2 --set train.batch=4 --set train.tracker=none --set train.precision=no",
}
SMALLER = {
    f"diffusers:{MODEL}": "shapes", MODEL: str(STAND_IN), '.to("cuda")': "", "steps=28": "steps=2", ", 64)": ", 4)",
    "pool=64": "pool=4, steps=2, batch=2", "num_inference_steps": "max_sequence_length=1, num_inference_steps",
}  # fmt: skip


def pieces() -> list[tuple[str, str]]:
    """The page's blocks but for the first, which installs: each "python" or "" for commands, and its text."""
    return re.findall(r"```(python|)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1:]


def command(line: str) -> None:
    words = shlex.split(
        line.replace("accelerate launch -m ", "").replace(" --device cuda", "").replace(f"diffusers:{MODEL}", "shapes")
    )
    done = CliRunner().invoke(app, [*words[1:], *SHORTER[words[1]].split()])
    assert done.exit_code == 0, (line, done.output)


def python(text: str, names: dict[str, Any]) -> None:
    for there, here in SMALLER.items():
        text = text.replace(there, here)
    exec(text, names)


@pytest.mark.slow
def test_from_a_pipeline_to_a_tuned_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import_module("lineate.models.patches")  # the stand-in's autoencoder is ours
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("a red cross\ntwo squares\n", encoding="utf-8")
    Path("DATA").mkdir()
    for index, (picture, caption) in enumerate(TrainingScenes(find_world("grid"), 8)):
        to_pil_image(picture).save(f"DATA/{index}.png")
        Path(f"DATA/{index}.txt").write_text(caption, encoding="utf-8")
    names: dict[str, Any] = {}
    kinds = []
    for kind, text in pieces():
        kinds.append(kind)
        if kind == "python":
            names.clear()  # each piece stands by itself
            python(text, names)
        else:
            for line in text.splitlines():
                command(line)
    assert kinds == ["python", "", "python", "", "python", "python"]
    for folder in ("calibrated", "calibrated-too", "tuned/model"):
        assert record(lineate.load(folder)).conversion == lineate.preset("sd35-t5")
    assert record(names["pipe"].transformer).conversion == lineate.preset("sd35-t5") and names["image"].size == (32, 32)
    assert read(Path("tuned.png")).shape == (3, 32, 32)
