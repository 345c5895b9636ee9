"""Converted transformers models by `save_pretrained` and the Auto classes: bit for bit with lineate, never without it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lineate
from lineate.autoclasses import ReloadError
from lineate.families import detect

from .tiny import PLAIN, TEXT, VISION, aligned

PICTURES = torch.linspace(-1, 1, 2 * 3 * 32 * 48).sin().view(2, 3, 32, 48)


def make(model: str, config: str, **settings: Any) -> Any:
    return getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()


def dinov2(**changes: Any) -> Any:
    return make("Dinov2Model", "Dinov2Config", **VISION | changes)


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = detect(model).features(aligned(model), PICTURES).tokens
    return found


@pytest.mark.parametrize(
    ("host", "auto"),
    [
        (("Dinov2Model", "Dinov2Config", VISION | {"use_swiglu_ffn": True}), "AutoModel"),
        (("DINOv3ViTModel", "DINOv3ViTConfig", PLAIN), "AutoModel"),
        (("ViTForImageClassification", "ViTConfig", PLAIN | {"num_labels": 5}), "AutoModelForImageClassification"),
        (("DeiTForImageClassificationWithTeacher", "DeiTConfig", PLAIN), "AutoModelForImageClassification"),
        (("SiglipVisionModel", "SiglipVisionConfig", PLAIN), "AutoModel"),
        (("SiglipModel", "SiglipConfig", {"vision_config": PLAIN, "text_config": TEXT}), "AutoModel"),
        (
            ("CLIPForImageClassification", "CLIPConfig", {"vision_config": PLAIN, "text_config": TEXT}),
            "AutoModelForImageClassification",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_converted_model_reloads_bit_for_bit(host: tuple[str, str, dict[str, Any]], auto: str, tmp_path: Path) -> None:
    model = make(host[0], host[1], **host[2])
    lineate.convert(model, "t5-plus", interpolated=("pos",))
    model.save_pretrained(tmp_path / "a")
    again = getattr(transformers, auto).from_pretrained(tmp_path / "a")
    assert torch.equal(run(again), run(model))
    assert lineate.record(again) == lineate.record(model)
    assert isinstance(again, type(model)) and again.config.architectures == [type(model).__name__]
    again.save_pretrained(tmp_path / "b")
    assert torch.equal(run(getattr(transformers, auto).from_pretrained(tmp_path / "b")), run(model))


def test_names_of_an_older_release_are_translated_as_the_hosts_are(tmp_path: Path) -> None:
    """What transformers itself wrote and read again is under names that it translates on the way."""
    dinov2().save_pretrained(tmp_path / "host")
    model = lineate.convert(transformers.AutoModel.from_pretrained(tmp_path / "host"), "t5")
    model.save_pretrained(tmp_path / "converted", max_shard_size="20kB")
    assert len(list((tmp_path / "converted").glob("*.safetensors"))) > 1
    assert torch.equal(run(transformers.AutoModel.from_pretrained(tmp_path / "converted")), run(model))


def test_unconverted_sites_reload_unconverted(tmp_path: Path) -> None:
    model = dinov2()
    lineate.convert(model, lineate.Conversion(sites=("encoder.layer.1.*",)))
    model.save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path)
    assert len(lineate.record(again).sites) == 1 and torch.equal(run(again), run(model))


@pytest.mark.parametrize("lost", [".core.mixer.w1", "norm1.weight"])
def test_a_missing_tensor_is_named_whether_a_cores_or_the_hosts(lost: str, tmp_path: Path) -> None:
    lineate.convert(dinov2(), "t5").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = {name: tensor for name, tensor in load_file(file).items() if not name.endswith(f"layer.0.{lost}") and not (
        name.endswith(lost) and "layer.0." in name)}  # fmt: skip
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ReloadError, match=rf"does not fit its config; .*layer\.0\..*{lost.rpartition('.')[2]}"):
        transformers.AutoModel.from_pretrained(tmp_path)


def test_another_conversion_than_the_weights_were_made_by_is_refused(tmp_path: Path) -> None:
    lineate.convert(dinov2(), "t5").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["lineate"]["conversion"]["mixer"]["inner"] = "2layer"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ReloadError, match="w3"):
        transformers.AutoModel.from_pretrained(tmp_path)


def test_a_converted_backbone_takes_a_new_head(tmp_path: Path) -> None:
    model = lineate.convert(dinov2(), "t5")
    model.save_pretrained(tmp_path)
    classifier = transformers.AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=7)
    assert torch.equal(run(classifier), run(model))
    assert classifier(PICTURES).logits.shape == (2, 7)


WITHOUT = """
import sys
from transformers import AutoModel, Dinov2Model, SiglipVisionModel
for path, host in ((sys.argv[1], Dinov2Model), (sys.argv[2], SiglipVisionModel)):
    for cls in (AutoModel, host):
        try:
            cls.from_pretrained(path)
        except ValueError as error:
            print(" ".join(str(error).split())[:400])
assert "lineate" not in sys.modules
"""
WITH = """
import sys
{imports}
import torch
model = AutoModel.from_pretrained(sys.argv[1])
saved = torch.load(sys.argv[3])
torch.set_num_threads(1)
for tensor in (*model.parameters(), *model.buffers()):
    tensor.data = tensor.data.clone()  # as `aligned` does
with torch.no_grad():
    print(torch.equal(model(saved["x"]).last_hidden_state, saved["y"]), len(lineate.record(model).sites))
"""


def test_other_processes_reload_it_with_lineate_and_fail_loudly_without(tmp_path: Path) -> None:
    """Whichever of the two libraries is imported first."""
    model = lineate.convert(dinov2(), "t5")
    model.save_pretrained(tmp_path / "dinov2")
    lineate.convert(make("SiglipVisionModel", "SiglipVisionConfig", **PLAIN), "t5").save_pretrained(tmp_path / "siglip")
    torch.save({"x": PICTURES, "y": run(model)}, tmp_path / "saved.pt")

    def say(code: str) -> list[str]:
        command = [sys.executable, "-c", code, *(str(tmp_path / name) for name in ("dinov2", "siglip", "saved.pt"))]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    said = say(WITHOUT)
    for auto, model_type in zip(said[::2], ("lineate_dinov2", "lineate_siglip_vision_model"), strict=True):
        assert f"`{model_type}`" in auto and "does not recognize" in auto
    assert len(said) == 4 and all('attn_implementation="lineate"` is not supported' in stock for stock in said[1::2])
    lineate_first = "import lineate; assert 'transformers' not in sys.modules\nfrom transformers import AutoModel"
    for imports in (lineate_first, "from transformers import AutoModel, Dinov2Model\nimport lineate"):
        assert say(WITH.format(imports=imports)) == ["True 2"]
