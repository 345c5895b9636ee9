"""The main job: a whole run leaves all that it promises and can be repeated; one that fails leaves nothing half-written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import nn

import lineate
from lineate import checkpoint, linearize, pictures, runs
from lineate.calibrate import CalibrationConfig
from lineate.checkpoint import CheckpointError, original_of
from lineate.convert import Conversion, ConversionError, core_modules, is_new
from lineate.evaluate import EvaluationError
from lineate.images import ImageError
from lineate.linearize import Plan, split
from lineate.report.run import load_run
from lineate.runs import RunError, check_folder, run_folder, write_json
from lineate.sources import Source, load_source

QUICK = CalibrationConfig(steps=3, pool=4, batch=2)


@pytest.fixture
def photographs(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "photographs"
    folder.mkdir()
    draw = torch.Generator().manual_seed(1)
    paths = [folder / f"{i}.png" for i in range(5)]
    for path in paths:
        pixels = torch.randint(256, (40, 48, 3), dtype=torch.uint8, generator=draw)
        Image.frombytes("RGB", (48, 40), bytes(pixels.flatten().tolist())).save(path)
    return paths


@pytest.fixture(autouse=True)
def source(monkeypatch: pytest.MonkeyPatch, tiny_vit: Callable[..., nn.Module]) -> Source:
    """Whatever source is asked for, it is a tiny random ViT; pictures and timings are kept small too."""
    found = Source(tiny_vit(), "timm:tiny", (0.5,) * 3, (0.25,) * 3, 32, 8)
    monkeypatch.setattr(linearize, "load_source", lambda text, image_size=None: found)
    monkeypatch.setattr(pictures, "DETAIL_PX", 40)
    monkeypatch.setattr(linearize, "REPEATS", 3)
    return found


def plan(tmp_path: Path, paths: list[Path], **changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "source": "timm:tiny", "photographs": tuple(paths[1:]), "held_out": (paths[0],), "out": tmp_path / "run",
        "conversion": Conversion(), "calibration": QUICK, "preset": "t5", "sizes": ((32, 32), (16, 40)),
    }  # fmt: skip
    return Plan(**(fields | changes))


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_run_leaves_a_model_that_loads_a_run_that_validates_and_a_report(tmp_path: Path, photographs: list[Path]) -> None:
    said: list[str] = []
    steps: list[tuple[int, int, str]] = []
    report = linearize.linearize(
        plan(tmp_path, photographs), say=said.append, progress=lambda *step: steps.append(step)
    )  # fmt: skip
    out = tmp_path / "run"
    assert report == out / "report.html"
    weights = {"model/model.safetensors", "model/lineate.json"}
    assert files(out) == weights | {"run.json", "report.html", "pictures/pca_0.png", "pictures/attention.png"}
    run = load_run(out)
    found = run.results
    assert run.source == "timm:tiny" and run.preset == "t5" and run.config.sizes == ((32, 32), (16, 40))
    assert Conversion.model_validate(run.config.conversion) == Conversion()
    assert CalibrationConfig.model_validate(run.config.calibration) == QUICK
    assert found.sites == ("blocks.0.attn", "blocks.1.attn") and set(found.key_shift) == set(found.sites)
    assert found.calibration is not None and found.calibration.steps == 3 * 2
    assert found.fidelity_before is not None and found.fidelity.patch_cosine != found.fidelity_before.patch_cosine
    assert found.cost is not None and [(row.height, row.width) for row in found.cost.rows] == [(16, 40), (32, 32)]
    assert (found.images.calibration, found.images.held_out, found.images.skipped) == (4, 1, {})
    assert {"load", "calibrate", "fidelity", "cost", "analysis", "total"} == set(run.seconds)
    for picture in run.pictures:
        with Image.open(out / picture.file) as drawn:
            assert 1100 <= drawn.width <= 1600
    assert (6, 6) in {step[:2] for step in steps} and any("2 sites" in line for line in said)
    # The model in the folder is the one that was measured.
    loaded = lineate.load(out / "model")
    counts = found.tensors
    assert counts.new.parameters == sum(t.numel() for name, t in loaded.state_dict().items() if is_new(name))
    assert counts.inherited.tensors == sum(not is_new(name) for name in loaded.state_dict())


def test_the_same_plan_gives_the_same_model(tmp_path: Path, photographs: list[Path], monkeypatch: pytest.MonkeyPatch,
                                            tiny_vit: Callable[..., nn.Module]) -> None:  # fmt: skip
    states = []
    for name in ("a", "b"):
        torch.manual_seed(0)
        fresh = Source(tiny_vit(), "timm:tiny", (0.5,) * 3, (0.25,) * 3, 32, 8)
        torch.manual_seed(hash(name))  # nothing may depend on the process's own generator
        monkeypatch.setattr(linearize, "load_source", lambda text, image_size=None, fresh=fresh: fresh)
        linearize.linearize(plan(tmp_path, photographs, out=tmp_path / name))
        states.append(lineate.load(tmp_path / name / "model").state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_a_saved_directory_is_calibrated_on_and_measured_against_its_own_original(
    tmp_path: Path, photographs: list[Path], source: Source
) -> None:
    picture = torch.randn(1, 3, 32, 40)
    with torch.no_grad():
        host = source.model(picture)
        lineate.convert(source.model, Conversion(sites=("blocks.1.attn",)))
        original = original_of(source.model)
        assert torch.equal(original(picture), host)
        assert not torch.equal(source.model(picture), host)
    linearize.linearize(plan(tmp_path, photographs, conversion=None))
    run = load_run(tmp_path / "run")
    assert run.config.conversion["sites"] == ["blocks.1.attn"] and run.results.sites == ("blocks.1.attn",)


@pytest.mark.parametrize("name", ["Dinov2ForImageClassification", "SiglipVisionModel"])
def test_a_transformers_model_runs_from_start_to_finish(
    tmp_path: Path, photographs: list[Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    size = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
    architecture = getattr(transformers, name)
    host = architecture(architecture.config_class(**size))
    host.config.image_mean, host.config.image_std = [0.5] * 3, [0.25] * 3  # told by the config where there is no processor
    host.save_pretrained(tmp_path / "host")
    monkeypatch.setattr(linearize, "load_source", load_source)
    linearize.linearize(plan(tmp_path, photographs, source=f"transformers:{tmp_path / 'host'}"))
    found = load_run(tmp_path / "run").results
    assert len(found.sites) == 2 and set(found.key_shift) == set(found.sites)
    assert found.cost is not None and [row.tokens for row in found.cost.rows] == [10 + ("Dino" in name), 16 + ("Dino" in name)]
    assert (found.fidelity.class_cosine is None, found.fidelity.agreement is None) == ("Siglip" in name,) * 2
    loaded = lineate.load(tmp_path / "run" / "model")
    linearize.analyze(
        str(tmp_path / "run" / "model"), photographs, tmp_path / "seen", image_size=None, device="cpu", overwrite=False
    )  # fmt: skip
    assert (tmp_path / "seen" / "pictures" / "attention.png").is_file()
    assert isinstance(loaded, architecture) and loaded.config.model_type == f"lineate_{host.config.model_type}"


def test_the_original_of_a_redrawn_model_is_gone(tiny_vit: Callable[..., nn.Module]) -> None:
    with pytest.raises(ConversionError, match="not converted"):
        original_of(tiny_vit())
    model = lineate.convert(tiny_vit(), Conversion(inherit="attention"))
    with pytest.raises(CheckpointError, match=r"blocks\.0\.norm1\.weight, .* drawn anew"):
        original_of(model)


def test_corrupt_images_among_good_ones_are_skipped_and_counted(tmp_path: Path, photographs: list[Path]) -> None:
    photographs[2].write_bytes(photographs[2].read_bytes()[:200])
    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    said: list[str] = []
    linearize.linearize(plan(tmp_path, photographs, held_out=(broken, photographs[0])), say=said.append)
    images = load_run(tmp_path / "run").results.images
    assert (images.calibration, images.held_out) == (3, 1)
    assert set(images.skipped) == {str(photographs[2]), str(broken)}
    assert [line for line in said if line.startswith("skipped 2 unreadable: ")] != []


def test_every_fifth_picture_in_order_is_held_out_and_none_is_used_twice() -> None:
    paths = [Path(f"{i:04}.png") for i in range(3000)]
    calibration, held_out = split(paths[::-1])
    assert len(calibration) == 2400 and not set(calibration) & set(held_out)
    assert len(held_out) == 200 and set(held_out) <= set(paths[::5])
    assert split(paths[:2]) == ((paths[1],), (paths[0],))
    with pytest.raises(ImageError, match="1 picture cannot be both"):
        split(paths[:1])


def test_of_more_photographs_than_the_pool_holds_the_seed_draws_a_sample(source: Source) -> None:
    paths = [Path(f"{i:04}.png") for i in range(2000)]
    config = CalibrationConfig(pool=64)
    drawn = [linearize.crops(source, paths, config, seed).paths for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for chosen in drawn:
        assert len(set(chosen)) == 64 and chosen == sorted(chosen) and set(chosen) <= set(paths)
        assert sum(path >= paths[1000] for path in chosen) > 16  # not the first ones
    few = paths[63::-1]
    assert linearize.crops(source, few, config, 0).paths == few and linearize.crops(source, few[:5], config, 0).paths == few[:5]


def test_a_run_reports_the_photographs_that_it_used(tmp_path: Path, photographs: list[Path]) -> None:
    said: list[str] = []
    linearize.linearize(
        plan(tmp_path, photographs, calibration=CalibrationConfig(steps=1, pool=2, batch=1)), say=said.append
    )  # fmt: skip
    assert load_run(tmp_path / "run").results.images.calibration == 2
    assert any(line.endswith("2 crops of 2 photographs") for line in said)


def test_of_many_held_out_pictures_a_few_evenly_spread_are_read(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linearize, "centre_crop", lambda path, *_: torch.zeros(1))
    paths = [Path(f"{i:05}.png") for i in range(50_000)]
    images, skipped = linearize.read_held_out(source, paths)
    assert skipped == {} and list(images) == paths[::196] and 128 < len(images) <= linearize.HELD_OUT_MOST
    assert list(linearize.read_held_out(source, paths[:256])[0]) == paths[:256]


def test_nothing_is_begun_when_an_input_is_bad(tmp_path: Path, photographs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linearize, "calibrate", lambda *_, **__: pytest.fail("work was begun"))
    text = tmp_path / "text.png"
    text.write_text("no picture")
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"photographs": (text,)}, ImageError, "none of the 1 pictures can be read"),
        ({"held_out": (text,)}, ImageError, "none of the 1 pictures can be read"),
        ({"held_out": (photographs[1],)}, ImageError, "both calibrated on and held out"),
        ({"device": "tpu"}, RunError, "unknown device 'tpu'; choices: cpu, cuda"),
        ({"conversion": Conversion(sites=("decoder.*",))}, ConversionError, r"no attention site matches 'decoder.\*'; sites: "),
        ({"sizes": ((30, 32),)}, EvaluationError, "30×32 px is not a multiple"),  # last: the source is converted by then
    ]
    for changes, kind, words in cases:
        with pytest.raises(Exception, match=words) as caught:
            linearize.linearize(plan(tmp_path, photographs, **changes))
        assert isinstance(caught.value, kind)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), EvaluationError("gone")])
def test_a_run_stopped_before_its_model_is_saved_leaves_nothing(
    tmp_path: Path, photographs: list[Path], monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr(linearize, "calibrate", stop)
    before = files(tmp_path)
    with pytest.raises(type(failure)):
        linearize.linearize(plan(tmp_path, photographs, out=tmp_path / "deep" / "run"))
    assert files(tmp_path) == before and not (tmp_path / "deep").exists()


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_run_stopped_afterwards_keeps_a_model_that_loads(
    tmp_path: Path, photographs: list[Path], monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr(linearize, "cost", stop)
    with pytest.raises(type(failure)) as caught:
        linearize.linearize(plan(tmp_path, photographs))
    assert caught.value.__notes__ == [f"the model in {tmp_path / 'run' / 'model'} is whole and was kept"]
    assert files(tmp_path / "run") == {"model/model.safetensors", "model/lineate.json"}
    assert len(core_modules(lineate.load(tmp_path / "run" / "model"))) == 2


def test_a_full_disk_while_saving_leaves_nothing(
    tmp_path: Path, photographs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_torch_state_dict", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        linearize.linearize(plan(tmp_path, photographs))
    assert not (tmp_path / "run").exists()


def test_only_a_run_and_nothing_else_is_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "run"
    check_folder(out, False)
    out.mkdir()
    with pytest.raises(RunError, match="exists; pass --overwrite"):
        check_folder(out, False)
    check_folder(out, True)
    (out / "pictures").mkdir()
    with pytest.raises(RunError, match="holds 'pictures', which is no part of a run"):
        check_folder(out, True)
    (out / "run.json").write_text("{}")
    check_folder(out, True)
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match=r"holds 'thesis\.tex', which is no part of a run; it is not overwritten"):
        check_folder(out, True)
    with pytest.raises(RunError, match="is a file"):
        check_folder(out / "thesis.tex", True)


def test_an_overwritten_run_comes_back_if_the_new_one_fails(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.json").write_text("old")
    with pytest.raises(KeyboardInterrupt) as caught, run_folder(out, True):
        assert not (out / "run.json").exists()
        (out / "run.json").write_text("new")
        raise KeyboardInterrupt
    assert (out / "run.json").read_text() == "old" and caught.value.__notes__ == [f"{out} is as it was"]
    with run_folder(out, True):
        (out / "run.json").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["run"] and (out / "run.json").read_text() == "new"


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [math.nan, (1.5, math.inf)], "b": {"c": -math.inf, "d": "NaN"}})
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [None, [1.5, None]], "b": {"c": None, "d": "NaN"}}
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert (tmp_path / "x.json").read_text() == text and len(list(tmp_path.iterdir())) == 1


def test_the_environment_tells_a_checkout_from_an_installed_copy(tmp_path: Path) -> None:
    package = Path(lineate.__file__).parent
    found = runs.environment(torch.device("cpu"))
    assert found["versions"]["torch"] and found["device"].endswith("1 thread")
    (tmp_path / "__init__.py").touch()
    assert runs._commit(tmp_path) == (None, None)
    commit, dirty = runs._commit(package)
    assert commit is None or (len(commit) == 40 and isinstance(dirty, bool))
