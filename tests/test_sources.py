"""Every form of SOURCE gives a model and what its pictures must look like, or one clear line that names the choices."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from lineate import checkpoint, sources
from lineate.cli.options import converted_as, settings
from lineate.convert import PRESETS, convert, record
from lineate.core import Neighborhood
from lineate.families import UnsupportedModelError
from lineate.recipes import RECIPES
from lineate.settings import SettingsError
from lineate.sources import SourceError, is_denoiser, load_denoiser, load_source
from lineate.text2image.pipelines import is_pipeline

from .tiny import aligned, dit, sd3

NAME = "vit_tiny_patch16_224"


def one_line(text: str, **settings: Any) -> str:
    with pytest.raises(SourceError) as caught:
        load_source(text, **settings)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail as soon as a model is made."""
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("work was begun"))


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(NAME, dynamic_img_size=True).eval()


@pytest.mark.parametrize("text", ["", "vit_tiny_patch16_224", "hub:x", "no/such/directory", "Embedded"])
def test_an_unknown_form_names_them_all(text: str) -> None:
    line = one_line(text)
    assert repr(text) in line
    forms = ("embedded", "timm:NAME,", "timm:NAME@CHECKPOINT", "transformers:NAME", "a directory saved by lineate")
    assert all(form in line for form in forms)


@pytest.mark.usefixtures("no_work")
def test_unknown_names_suggest_near_ones_before_any_work(tmp_path: Path) -> None:
    assert "no model 'vit_tinny_patch16_224'" in one_line("timm:vit_tinny_patch16_224")
    assert NAME in one_line("timm:vit_tinny_patch16_224").split("near names:")[1]
    assert f"{NAME}.augreg_in21k" in one_line(f"timm:{NAME}.augreg_in21").split("near names:")[1]
    assert f"{NAME}.augreg_in21k" in one_line(f"timm:{NAME}.augreg_in21@{tmp_path / 'x.pth'}").split("near names:")[1]
    assert "near names" not in one_line("timm:zzzzzzzzzzzz")
    assert "no model ''" in one_line("timm:")
    assert "no model 'hf-hub:someone/something'" in one_line("timm:hf-hub:someone/something")
    assert "no pretrained weights for 'vit_base_patch16_18x2_224'" in one_line("timm:vit_base_patch16_18x2_224")


def test_a_model_that_no_conversion_fits_is_refused_before_the_download(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def never_pretrained(*args: Any, pretrained: bool = False, **settings: Any) -> nn.Module:
        assert not pretrained, "a download was begun"
        return create(*args, **settings)

    monkeypatch.setattr(timm, "create_model", never_pretrained)
    for name in ("resnet18", "swin_tiny_patch4_window7_224", "vit_base_mci_224"):
        with pytest.raises(UnsupportedModelError, match=r"cannot be converted|no convolution `proj`"):
            load_source(f"timm:{name}")


def test_pretrained_model_takes_any_picture_size_and_brings_its_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    create, asked = timm.create_model, []

    def from_hub(name: str, pretrained: bool = False, **settings: Any) -> nn.Module:
        asked.append((name, pretrained, settings))
        return create(name, **settings)

    monkeypatch.setattr(timm, "create_model", from_hub)
    source = load_source(f"timm:{NAME}.augreg_in21k")
    assert asked[-1] == (f"{NAME}.augreg_in21k", True, {"dynamic_img_size": True})
    assert (source.name, source.image_size, source.multiple) == (f"timm:{NAME}.augreg_in21k", 224, 16)
    assert source.mean == source.std == (0.5, 0.5, 0.5)  # this model's own, not ImageNet's
    assert source.interpolated == () and source.head is None and not source.model.training
    with torch.no_grad():
        assert source.model.forward_features(torch.zeros(1, 3, 48, 80)).shape == (1, 1 + 3 * 5, 192)
    assert load_source(f"timm:{NAME}", image_size=448).image_size == 448


def test_a_failed_download_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def offline(*args: Any, pretrained: bool = False, **settings: Any) -> nn.Module:
        if pretrained:
            raise OSError("cannot reach the hub\nand much more about it")
        return create(*args, **settings)

    monkeypatch.setattr(timm, "create_model", offline)
    line = one_line(f"timm:{NAME}")
    assert f"cannot get the weights of timm:{NAME}: cannot reach the hub; " in line and "@CHECKPOINT" in line


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_local_file_fills_the_architecture(tmp_path: Path, tiny: nn.Module, suffix: str) -> None:
    file = tmp_path / f"weights{suffix}"
    state = tiny.state_dict()
    save_file(state, file) if suffix == ".safetensors" else torch.save({"model": state, "epoch": 3}, file)
    source = load_source(f"timm:{NAME}@{file}")
    assert source.name == f"timm:{NAME}@{file}" and source.interpolated == ()
    picture = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(source.model(picture), tiny(picture))


@pytest.mark.parametrize("prefix", ["", "visual.trunk."])
def test_a_grid_of_another_size_is_resampled_and_recorded(tmp_path: Path, prefix: str) -> None:
    torch.manual_seed(0)
    small = timm.create_model(NAME, img_size=96)
    save_file({prefix + name: tensor for name, tensor in small.state_dict().items()}, tmp_path / "small.safetensors")
    source = load_source(f"timm:{NAME}@{tmp_path / 'small.safetensors'}")
    assert source.interpolated == ("pos_embed",)
    assert source.model.pos_embed.shape == (1, 197, 192)
    assert torch.equal(source.model.blocks[3].attn.qkv.weight, small.blocks[3].attn.qkv.weight)
    assert record(convert(source.model, interpolated=source.interpolated)).names("interpolated") == ("pos_embed",)


def test_names_of_the_original_programs_are_translated(tmp_path: Path) -> None:
    torch.manual_seed(0)
    name = "deit3_small_patch16_224"
    model = timm.create_model(name, depth=1)
    state = {key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t for key, t in model.state_dict().items()}
    assert "blocks.0.gamma_1" in state
    save_file(state | {"blocks.0.gamma_1": torch.full((384,), 0.25)}, tmp_path / "deit3.safetensors")
    create = timm.create_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda *args, **settings: create(*args, depth=1, **settings))
        source = load_source(f"timm:{name}@{tmp_path / 'deit3.safetensors'}")
    assert torch.equal(source.model.blocks[0].ls1.gamma, torch.full((384,), 0.25)) and source.interpolated == ()


def test_names_of_dinov3s_original_program_are_translated(tmp_path: Path) -> None:
    name = "vit_small_patch16_dinov3"
    original = timm.create_model(name, dynamic_img_size=True).eval()
    stored = {key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): t for key, t in original.state_dict().items()}
    stored["storage_tokens"] = stored.pop("reg_token")
    save_file(stored, tmp_path / "model.safetensors")
    found = load_source(f"timm:{name}@{tmp_path / 'model.safetensors'}")
    x = torch.randn(1, 3, 48, 80)
    assert torch.equal(found.model(x), original(x))


def test_a_file_that_does_not_fit_is_one_clear_line(tmp_path: Path, tiny: nn.Module) -> None:
    state = tiny.state_dict()
    file = tmp_path / "weights.safetensors"
    save_file({name: tensor for name, tensor in state.items() if name != "norm.bias"}, file)
    assert "does not fit the model: missing norm.bias" in one_line(f"timm:{NAME}@{file}")
    save_file(state | {"stray": torch.zeros(1)}, file)
    assert "does not fit the model: unexpected stray" in one_line(f"timm:{NAME}@{file}")
    save_file(state | {"head.bias": torch.zeros(3)}, file)
    assert "head.bias has shape (3,) instead of (1000,)" in one_line(f"timm:{NAME}@{file}")
    save_file(state | {"pos_embed": torch.zeros(1, 12, 192)}, file)
    assert "does not fit" in one_line(f"timm:{NAME}@{file}")
    file.write_bytes(b"cut")
    assert "cannot be read" in one_line(f"timm:{NAME}@{file}")
    assert "is not there" in one_line(f"timm:{NAME}@{tmp_path / 'gone.pth'}")
    assert "no file after the @" in one_line(f"timm:{NAME}@")


VISION = {
    "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 48,
    "image_size": 48, "patch_size": 16,
}  # fmt: skip
TEXT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 99,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PROCESSOR = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "size": {"shortest_edge": 90}}


def of_transformers(folder: Path, name: str, processor: dict[str, Any] | None = None, **settings: Any) -> nn.Module:
    """A random model in a directory, with its image processor's settings."""
    architecture = getattr(transformers, name)
    model = architecture(architecture.config_class(**settings)).eval()
    model.save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ViTImageProcessor"} | processor))
    return model


def test_transformers_model_brings_its_processors_statistics_and_keeps_them(tmp_path: Path) -> None:
    processor = PROCESSOR | {"crop_size": {"height": 70, "width": 70}}
    model = of_transformers(tmp_path / "host", "ViTForImageClassification", processor, **VISION, num_labels=5)
    source = load_source(f"transformers:{tmp_path / 'host'}")
    assert source.name == f"transformers:{tmp_path / 'host'}"
    assert (source.mean, source.std) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    assert (source.image_size, source.multiple) == (64, 16)  # the crop's 70 px, in whole patches
    picture = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(aligned(source.model)(picture).logits, model(picture).logits)
    checkpoint.save(convert(source.model), tmp_path / "saved")
    again = load_source(str(tmp_path / "saved"))
    assert (again.mean, again.std, again.image_size) == (source.mean, source.std, 64)


def test_of_two_towers_the_one_that_sees_is_taken(tmp_path: Path) -> None:
    model = of_transformers(
        tmp_path, "SiglipModel", PROCESSOR | {"do_center_crop": False}, vision_config=VISION, text_config=TEXT
    )
    source = load_source(f"transformers:{tmp_path}")
    assert type(source.model) is transformers.SiglipVisionModel and source.image_size == 80
    picture = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(aligned(source.model)(picture).pooler_output, model.get_image_features(picture).pooler_output)


def test_what_transformers_cannot_give_is_one_clear_line(tmp_path: Path) -> None:
    of_transformers(tmp_path / "bare", "Dinov2Model", **VISION)
    assert "no image processor that tells the mean and std" in one_line(f"transformers:{tmp_path / 'bare'}")
    assert "cannot read the configuration" in one_line(f"transformers:{tmp_path / 'gone'}")
    assert "no name after transformers:" in one_line("transformers:")
    model = of_transformers(tmp_path / "whole", "Dinov2Model", PROCESSOR, **VISION)
    convert(model).save_pretrained(tmp_path / "converted")
    assert "is converted already" in one_line(f"transformers:{tmp_path / 'converted'}")
    checkpoint.save(model, tmp_path / "saved")
    assert "set image_mean and image_std of model.config" in one_line(str(tmp_path / "saved"))
    (tmp_path / "whole" / "model.safetensors").unlink()
    assert "cannot get the weights" in one_line(f"transformers:{tmp_path / 'whole'}")


def test_a_transformers_model_that_no_conversion_fits_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    of_transformers(tmp_path, "VideoMAEModel", PROCESSOR, **VISION)
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(UnsupportedModelError, match="videomae"):
        load_source(f"transformers:{tmp_path}")


def test_directory_is_the_saved_model(tmp_path: Path) -> None:
    model = timm.create_model(f"{NAME}.augreg_in21k", img_size=64, num_classes=3, dynamic_img_size=True).eval()
    checkpoint.save(convert(model, "t5", interpolated=("pos_embed",)), tmp_path / "m")
    source = load_source(str(tmp_path / "m"))
    assert record(source.model) == record(model) and source.interpolated == ("pos_embed",)
    assert (source.image_size, source.multiple, source.mean) == (64, 16, (0.5, 0.5, 0.5))
    picture = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(source.model(picture), model(picture))
    assert load_source(str(tmp_path / "m"), image_size=32).image_size == 32


def test_a_directory_that_keeps_softmax_is_a_host_to_convert(tmp_path: Path) -> None:
    model = timm.create_model(NAME, img_size=64, num_classes=3, dynamic_img_size=True).eval()
    checkpoint.save(convert(model, "softmax"), tmp_path / "m")
    source = load_source(str(tmp_path / "m"))
    assert not hasattr(source.model, "lineate_record")
    picture = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(source.model(picture), model(picture))
    convert(source.model, "t5")


def test_only_a_conversion_that_changes_nothing_keeps_softmax() -> None:
    assert {name for name, conversion in PRESETS.items() if conversion.keeps_softmax} == {"softmax"}
    changes: tuple[dict[str, Any], ...] = ({"inherit": "mlp"}, {"locality": "cpe"}, {"neighborhood": Neighborhood()})
    assert not any(PRESETS["softmax"].model_copy(update=change).keeps_softmax for change in changes)
    assert PRESETS["softmax"].model_copy(update={"outside": "exact", "sites": ("blocks.0.*",)}).keeps_softmax


@pytest.mark.parametrize("size", [0, 15, 100])
def test_an_image_size_that_is_no_multiple_of_the_patch_is_refused(tmp_path: Path, size: int) -> None:
    model = timm.create_model(NAME, img_size=64, num_classes=3, depth=1, dynamic_img_size=True)
    checkpoint.save(convert(model), tmp_path / "m")
    line = one_line(str(tmp_path / "m"), image_size=size)
    assert f"image size {size} is not a multiple of the patch (16 px)" in line
    assert ("near: 96, 112" if size == 100 else "near: 16, 32") in line


def test_a_foreign_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(checkpoint.CheckpointError, match="was not saved by lineate"):
        load_source(str(tmp_path))


def test_embedded_brings_its_head(monkeypatch: pytest.MonkeyPatch, tiny: nn.Module) -> None:
    """The package is not needed here: its reader has tests of its own."""
    head = nn.Identity()
    monkeypatch.setattr(sources, "embedded_model", lambda: (tiny, head))
    source = load_source("embedded")
    assert source.model is tiny and source.head is head and source.name == "embedded"
    assert source.interpolated == ("pos_embed",) and source.mean == (0.485, 0.456, 0.406)


def test_importing_pulls_in_neither_timm_nor_pillow() -> None:
    check = "import sys; from lineate import checkpoint, released, images, sources; "
    check += "print([name for name in ('timm', 'torchvision', 'PIL', 'onnx') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_runs_folder_is_the_model_in_it(tiny_vit: Any, tmp_path: Path) -> None:
    """Every question is answered alike for RUN and RUN/model; its conversion can be said again and not changed."""
    kinds = {"t5": tiny_vit(), "dit5": dit(), "sd35-t5": sd3(num_layers=6)}
    for preset, host in kinds.items():
        run = tmp_path / preset
        checkpoint.save(convert(host, preset), run / "model")
        for place in map(str, (run, run / "model")):
            assert converted_as(place) == PRESETS[preset]
            assert is_pipeline(place) is (preset == "sd35-t5")
            assert is_pipeline(place) or is_denoiser(place) is (preset == "dit5")
            assert settings(place, preset, None, (), None).conversion is None
            with pytest.raises(SettingsError, match=f"as {preset}, so --preset t5-plus cannot change it"):
                settings(place, "t5-plus", None, (), None)
            with pytest.raises(SettingsError, match=f"as {preset}, so --set locality cannot change it"):
                settings(place, None, None, ("locality=none",), None)
    for load, run in ((lambda text: load_source(text).model, "t5"), (load_denoiser, "dit5")):
        one, other = (load(str(tmp_path / run / part)).state_dict() for part in ("", "model"))
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_drop_path_is_given_to_a_model_when_it_is_made() -> None:
    """From 0 in the first block to the rate in the last, the conversion beside it; elsewhere it is refused."""
    model = convert(load_source("timm:test_vit", scratch=5, drop_path=0.1).model, "t5-paper")
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx(torch.linspace(0, 0.1, len(rates)).tolist())
    with pytest.raises(SourceError, match=r"drop_path is given to a model of timm's when it is made; choices: timm:NAME"):
        load_source("embedded", drop_path=0.1)
    assert RECIPES["deit"]().drop_path == 0.1


def test_what_is_trained_from_scratch_at_a_size_is_of_that_size_when_it_is_loaded_again(tmp_path: Path) -> None:
    made = load_source("timm:test_vit", scratch=5, image_size=64)
    checkpoint.save(convert(made.model, "t5-paper"), tmp_path / "model")
    assert made.image_size == load_source(str(tmp_path / "model")).image_size == 64
    with pytest.raises(SourceError, match=r"image size 65 is not a multiple of the patch \(16 px\); near: 64, 80"):
        load_source("timm:test_vit", scratch=5, image_size=65)


@pytest.mark.parametrize("preset", ["t5", "softmax"])
def test_a_model_that_was_loaded_for_a_size_keeps_it_and_another_can_be_asked_for(tmp_path: Path, preset: str) -> None:
    """Converted, or a host like any other; its weights stay those of its own size."""
    host = timm.create_model(NAME, img_size=64, num_classes=3, depth=1, dynamic_img_size=True)
    checkpoint.save(convert(host, preset), tmp_path / "own")
    for asked, expected in ((None, 64), (32, 32), (None, 32), (48, 48)):
        place = tmp_path / ("own" if not (tmp_path / "kept").exists() else "kept")
        source = load_source(str(place), image_size=asked)
        assert source.image_size == expected and source.model.pos_embed.shape[1] == 17
        model = source.model if preset == "t5" else convert(source.model, preset)
        checkpoint.save(model, tmp_path / "kept", overwrite=True)
        assert copy.deepcopy(checkpoint.original_of(model)).lineate_image_size == (None if expected == 64 else expected)
