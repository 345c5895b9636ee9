"""Files that run without lineate answer as the model does, at sizes that they were not traced at; what cannot be is one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers
from torch import Tensor, nn
from typer.testing import CliRunner

import lineate
from lineate import export as exporting
from lineate.cli.app import app
from lineate.convert import convert
from lineate.export import ExportError, export
from lineate.families import detect

from .tiny import VISION, dit

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unchecked_shapes")]


def sizes(agreements: list[exporting.Agreement]) -> list[tuple[int, int]]:
    return [(row.height, row.width) for row in agreements]


def stirred(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def session(file: Path) -> Callable[[str, Tensor], Tensor]:
    """Gives one output of an ONNX graph."""
    import onnxruntime

    loaded = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda name, x: torch.from_numpy(loaded.run([name], {"pixel_values": x.numpy()})[0])


def test_onnx_of_a_classifier_has_its_three_outputs_at_any_size(tiny_vit: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = stirred(convert(tiny_vit(depth=1), "t5"))
    file = tmp_path / "model.onnx"
    agreements = export(model, file, outputs=("logits", "last_hidden_state", "class_token"))
    assert sizes(agreements) == [(16, 48), (48, 16), (32, 32)]
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    graph = onnx.load(file).graph
    axes = {io.name: [d.dim_param or d.dim_value for d in io.type.tensor_type.shape.dim] for io in (*graph.input, *graph.output)}
    assert axes["pixel_values"] == ["batch", 3, "8*rows", "8*columns"] and axes["logits"] == ["batch", 5]
    run = session(file)
    for batch, height, width in ((1, 96, 24), (3, 64, 120)):
        x = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            found = detect(model).features(model, x)
        torch.testing.assert_close(run("logits", x), found.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(run("last_hidden_state", x), found.tokens, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(run("class_token", x), found.tokens[:, 0], rtol=1e-4, atol=1e-5)


def test_onnx_of_a_tower_of_transformers(tmp_path: Path) -> None:
    config = transformers.Dinov2Config(**VISION | {"num_hidden_layers": 1})
    model = stirred(convert(transformers.Dinov2Model(config), "t5"))
    assert sizes(export(model, tmp_path / "model.onnx")) == [(16, 48), (48, 16), (32, 32)]
    x = torch.randn(2, 3, 72, 48)
    with torch.no_grad():
        torch.testing.assert_close(
            session(tmp_path / "model.onnx")("last_hidden_state", x), model(x).last_hidden_state, rtol=1e-4, atol=1e-5
        )


def test_torch_export_of_a_denoiser_at_any_size(tmp_path: Path) -> None:
    model = convert(dit(depth=1), "dit5-nonat")
    assert sizes(export(model, tmp_path / "model.pt2", format="torch")) == [(4, 10), (12, 4), (8, 6)]
    program = torch.export.load(tmp_path / "model.pt2").module()
    inputs = torch.randn(3, 3, 26, 34), torch.tensor([3.0, 50.0, 977.0]), torch.tensor([4, 0, 1])
    with torch.no_grad():
        torch.testing.assert_close(program(*inputs)[0], model(*inputs))


def test_torch_export_of_a_model_of_one_size(tiny_vit: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = convert(tiny_vit(depth=1, img_size=(32, 40), dynamic_img_size=False), "t5")
    assert sizes(export(model, tmp_path / "model.pt2", format="torch")) == [(32, 40)]


@pytest.mark.parametrize("preset", ["clear", "swa"])
def test_windows_are_free_from_two_tiles_a_side_on(tiny_vit: Callable[..., nn.Module], tmp_path: Path, preset: str) -> None:
    model = stirred(convert(tiny_vit(depth=1), preset))
    assert sizes(export(model, tmp_path / "model.pt2", format="torch")) == [(72, 144), (144, 72), (72, 72)]
    program = torch.export.load(tmp_path / "model.pt2").module()
    for shape in ((1, 3, 136, 216), (3, 3, 80, 72)):
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(program(x)[0], model(x))
    with pytest.raises(AssertionError, match=r"Guard failed: pixel_values.size\(\)\[2\] >= 72"):
        program(torch.randn(1, 3, 64, 72))


def test_onnx_of_windows(tiny_vit: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = stirred(convert(tiny_vit(depth=1), "t5-plus"))
    export(model, tmp_path / "model.onnx")
    x = torch.randn(2, 3, 136, 216)
    with torch.no_grad():
        torch.testing.assert_close(session(tmp_path / "model.onnx")("logits", x), model(x), rtol=1e-4, atol=1e-5)


def test_a_file_that_disagrees_is_not_left_there(
    tiny_vit: Callable[..., nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever writes another model than was asked for is found out, and the older file stays."""
    file, other = tmp_path / "model.pt2", stirred(convert(tiny_vit(depth=1), "t5"))
    file.write_bytes(b"older")
    monkeypatch.setitem(exporting._WRITERS, "torch", lambda program, call, file, opset: lambda x: (other(x),))
    with pytest.raises(ExportError, match=r"the file disagrees with the model at 16×48 px: logits by .* nothing was written"):
        export(convert(tiny_vit(depth=1), "t5"), file, format="torch")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"] and file.read_bytes() == b"older"


@pytest.mark.parametrize(
    ("name", "asked", "reason"),
    [
        ("model.onnx", {"format": "tflite"}, "unknown format 'tflite'; choices: onnx, torch"),
        ("model.pt", {"format": "torch"}, r"a file of format 'torch' is named \*.pt2, got 'model.pt'"),
        ("model.pt2", {"format": "torch", "outputs": ("logit",)}, "choices: logits, last_hidden_state, class_token"),
    ],
)
def test_what_cannot_be_written_is_told_before_any_work(
    tiny_vit: Callable[..., nn.Module], tmp_path: Path, name: str, asked: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ExportError, match=reason):
        export(convert(tiny_vit(), "t5"), tmp_path / name, **asked)
    with pytest.raises(ExportError, match=r"float64 on cpu; call model\.float"):
        export(convert(tiny_vit(), "t5").double(), tmp_path / "model.pt2", format="torch")
    assert not list(tmp_path.iterdir())


def test_the_command(tiny_vit: Callable[..., nn.Module], tmp_path: Path) -> None:
    """On a run's folder; what is there is not replaced, and what is wrong is one line."""
    lineate.save(convert(tiny_vit(depth=1, dynamic_img_size=False), "linear"), tmp_path / "run" / "model")
    ask = ["export", str(tmp_path / "run"), "--format", "torch", "--out", str(tmp_path / "model.pt2")]
    done = CliRunner().invoke(app, ask)
    assert done.exit_code == 0, done.output
    assert f"file: {tmp_path / 'model.pt2'}" in done.output and "32×32" in done.output
    again = CliRunner().invoke(app, ask)
    assert again.exit_code == 1 and "exists; pass --overwrite to replace it" in again.output
