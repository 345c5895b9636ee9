"""The commands, from a source to a report; and each bad input: one clear line, a non-zero exit, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import lineate
from lineate import checkpoint, linearize, pictures
from lineate.cli import app as cli
from lineate.cli import terminal
from lineate.cli.app import app
from lineate.cli.terminal import show_conversions
from lineate.convert import PRESETS, Conversion, core_modules, record
from lineate.core import Neighborhood
from lineate.mixers import MIXERS, TokenMixer
from lineate.mixers.base import Frozen
from lineate.mixers.linear import LinearConfig
from lineate.mixers.ttt import TTTConfig
from lineate.models.dit import DiT
from lineate.recipes import RECIPES
from lineate.report.run import load_run
from lineate.settings import SettingsError, parse_sizes, read_settings

ARCHITECTURE = "vit_tiny_patch16_224"
ONE_SITE = ("--set", 'sites=["blocks.0.attn"]')
QUICK = ("--set", "calibration.steps=2", "--set", "calibration.pool=4", "--image-size", "32")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """SOURCE of a random model that needs no network."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(timm.create_model(ARCHITECTURE).state_dict(), file)
    return f"timm:{ARCHITECTURE}@{file}"


@pytest.fixture(scope="module")
def saved(weights: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory saved by lineate."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    done("convert", weights, "--out", folder, *ONE_SITE)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    draw = torch.Generator().manual_seed(1)
    for name in ("a.png", "b.jpg", "c.png"):
        pixels = torch.randint(256, (40, 48, 3), dtype=torch.uint8, generator=draw)
        Image.frombytes("RGB", (48, 40), bytes(pixels.flatten().tolist())).save(folder / name)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "DETAIL_PX", 48)
    monkeypatch.setattr(linearize, "REPEATS", 3)


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="lineate")


def done(*arguments: Any) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, result.stderr
    return str(result.stdout)


def refused(*arguments: Any, status: int = 1) -> str:
    """The one line on stderr that begins with "error: "; status lines may stand before it."""
    result = call(*arguments)
    assert result.exit_code == status, result.output
    assert isinstance(result.exception, SystemExit) and "Traceback" not in result.output
    lines = str(result.stderr).splitlines()
    assert [line.startswith("error: ") for line in lines] == [False] * (len(lines) - 1) + [True], lines
    return lines[-1]


def test_from_a_source_to_a_report(tmp_path: Path, weights: str, images: Path) -> None:
    (images / "broken.png").write_bytes((images / "a.png").read_bytes()[:100])
    out = tmp_path / "run"
    run_it = ("linearize", weights, "--images", images, "--out", out, *ONE_SITE, *QUICK, "--sizes", "32,32x48", "--seed", "7")
    result = call(*run_it)
    assert result.exit_code == 0, result.stderr
    assert "held out 1 of the photographs" in result.stderr and "skipped 1 unreadable: broken.png" in result.stderr
    shown = " ".join(result.stdout.split())
    run = load_run(out)
    fidelity, before = run.results.fidelity, run.results.fidelity_before
    assert before is not None and f"patch tokens │ {before.patch_cosine:.3f} │ {fidelity.patch_cosine:.3f}" in shown
    assert run.results.cost is not None and run.results.cost.crossover_note[1:] in shown
    assert "32×48" in shown and shown.endswith(f"report: {out / 'report.html'}")
    assert run.seed == run.config.conversion["seed"] == 7 and run.preset == "t5"
    assert record(lineate.load(out / "model")).sites == ("blocks.0.attn",)

    assert "exists; pass --overwrite" in refused(*run_it)
    # A run.json gives the whole configuration again, sizes and all.
    again = tmp_path / "again"
    done("linearize", weights, "--images", images, "--out", again, "--config", out / "run.json")
    assert load_run(again).config == run.config
    states = [lineate.load(folder / "model").state_dict() for folder in (out, again)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    (out / "report.html").unlink()
    assert "patch tokens" in done("report", out) and (out / "report.html").is_file()


def test_a_step_of_a_dit_is_timed_with_random_weights_or_saved_ones(tmp_path: Path) -> None:
    tiny = "dit:input_size=8,in_channels=3,hidden_size=16,depth=1,num_heads=2"
    shown = done("bench", tiny, "--precision", "bf16", "--out", tmp_path / "bench.json")
    found = json.loads((tmp_path / "bench.json").read_text())
    rows, conversion = found["cost"]["rows"], found["conversion"]
    assert [(row["height"], row["width"], row["tokens"]) for row in rows] == [(8, 8, 16), (16, 16, 64), (32, 32, 256)]
    assert found["cost"]["dtype"] == "bfloat16" and conversion["neighborhood"] is not None and "32×32" in shown
    lineate.save(lineate.convert(DiT(input_size=8, hidden_size=16, depth=1, num_heads=2), "hyena-x"), tmp_path / "saved")
    done("bench", tmp_path / "saved", "--sizes", "8x12", "--out", tmp_path / "saved.json")
    found = json.loads((tmp_path / "saved.json").read_text())
    assert found["conversion"]["mixer"]["name"] == "hyena" and found["cost"]["rows"][0]["tokens"] == 24
    done("bench", "timm:vit_tiny_patch16_224", "--sizes", "224", "--set", 'sites=["blocks.0.attn"]')  # downloads nothing
    assert "unknown precision 'fp8'; choices: fp32, bf16, fp16" in refused("bench", tiny, "--precision", "fp8")


def test_convert_calibrate_bench_and_analyze(tmp_path: Path, saved: Path, images: Path) -> None:
    model = lineate.load(saved)
    assert record(model).sites == ("blocks.0.attn",)
    done("calibrate", saved, "--images", images, "--out", tmp_path / "fit", *QUICK)
    before, after = (core_modules(m)["blocks.0.attn"].state_dict() for m in (model, lineate.load(tmp_path / "fit")))
    assert not torch.equal(before["mixer.w1"], after["mixer.w1"])
    run = json.loads((tmp_path / "fit" / "run.json").read_text())
    assert run["source"] == str(saved) and run["command"][0] == "lineate" and run["environment"]["versions"]["torch"]
    assert run["config"]["conversion"] == record(model).conversion.model_dump(mode="json")
    assert run["config"]["calibration"]["steps"] == 2 and run["config"]["image_size"] == 32
    assert run["results"]["images"] == {"calibration": 3, "skipped": {}}
    assert run["results"]["calibration"]["sites"].keys() == {"blocks.0.attn"}
    # It repeats the run, over the earlier one, though it says the conversion of a source that is converted already.
    config = tmp_path / "run.json"
    shutil.copy(tmp_path / "fit" / "run.json", config)
    done("calibrate", saved, "--images", images, "--out", tmp_path / "fit", "--overwrite", "--config", config)
    again = core_modules(lineate.load(tmp_path / "fit"))["blocks.0.attn"].state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in after.items())

    shown = done("bench", saved, "--sizes", "32,48", "--out", tmp_path / "bench.json")
    figures = json.loads((tmp_path / "bench.json").read_text())["cost"]
    assert [row["height"] for row in figures["rows"]] == [32, 48] and "48×48" in shown
    assert figures["rows"][0]["original_gmacs"] != figures["rows"][0]["converted_gmacs"]
    assert "exists; pass --overwrite" in refused("bench", saved, "--out", tmp_path / "bench.json")

    done("analyze", saved, "--images", images, "--out", tmp_path / "analysis", "--image-size", "32")
    shift = json.loads((tmp_path / "analysis" / "analysis.json").read_text())["key_shift"]
    assert set(shift) == {"original", "converted"} and len(shift["original"]) == 12
    assert shift["original"]["blocks.0.attn"] == pytest.approx(shift["converted"]["blocks.0.attn"])  # nothing changed before it
    assert shift["original"]["blocks.1.attn"] != shift["converted"]["blocks.1.attn"]
    assert (tmp_path / "analysis" / "pictures" / "attention.png").is_file()


def test_convert_leaves_a_run_that_says_what_was_done(saved: Path, weights: str) -> None:
    run = json.loads((saved / "run.json").read_text())
    done_to = record(lineate.load(saved))
    assert run["source"] == weights and run["preset"] == "t5" and run["seed"] == 0
    assert Conversion.model_validate(run["config"]["conversion"]) == done_to.conversion
    assert run["results"]["tensors"]["new"]["parameters"] == done_to.count("new")


def test_a_run_json_is_no_reason_to_overwrite_what_is_no_checkpoint(tmp_path: Path, weights: str) -> None:
    (tmp_path / "run.json").write_text("{}")
    line = refused("convert", weights, "--out", tmp_path, "--overwrite")
    assert "also holds run.json, which is no part of a checkpoint" in line


def test_memory_that_ran_out_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # PyTorch's own words, from an allocation that no machine can serve.
    for failure in ("cpu", torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB"), MemoryError()):

        def fail(*_: Any, failure: Any = failure) -> None:
            if failure == "cpu":
                torch.empty(2**60, dtype=torch.uint8)
            raise failure

        monkeypatch.setattr(cli, "_run", fail)
        line = refused("demo", "--out", tmp_path / "run")
        assert line.startswith("error: out of memory: ") and "try smaller sizes" in line


def test_another_runtime_error_is_a_bug_and_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "_run", fail)
    assert isinstance(call("demo", "--out", tmp_path / "run").exception, RuntimeError)


def test_zero_and_a_seed_out_of_range_are_refused(tmp_path: Path, weights: str, images: Path) -> None:
    given = ("calibrate", weights, "--images", images, "--out", tmp_path / "out")
    assert "image size 0 is not a multiple" in refused(*given, "--image-size", "0")
    for seed in (-1, 2**63):
        assert refused(*given, "--seed", seed) == f"error: --seed must be 0 to 2**63 - 1, got {seed}"
    assert read_settings(seed=2**63 - 1).calibration.seed == 2**63 - 1
    assert not (tmp_path / "out").exists()


def test_the_command_without_its_extra_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None; from lineate.__main__ import main; main()"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stderr == "error: the lineate command needs typer: pip install '.[cli]' in a clone\n"


def test_presets_tells_a_mixer_by_its_own_docstring(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Mean(TokenMixer):
        """The mean of the values [of all].

        More.
        """

    class MeanConfig(Frozen):
        name: str = "mean"
        depth: int = 3

    monkeypatch.setitem(MIXERS, "mean", Mean)
    fields = {name: getattr(Conversion(), name) for name in Conversion.model_fields} | {"mixer": MeanConfig()}
    show_conversions({"mine": Conversion.model_construct(**fields)})
    shown = capsys.readouterr().out
    assert "The mean of the values [of all]." in shown and "mixer.depth=3" in shown and "More" not in shown


def test_a_delta_holds_the_cores_alone(tmp_path: Path, weights: str) -> None:
    done("convert", weights, "--out", tmp_path / "delta", "--delta", "--preset", "linear")
    base = timm.create_model(ARCHITECTURE, dynamic_img_size=True)
    with pytest.raises(checkpoint.CheckpointError, match="its weights have other values"):
        lineate.load(tmp_path / "delta", base=base)


def test_presets_and_version() -> None:
    assert all(f"│ {name} " in done("recipes") for name in RECIPES)
    shown = done("presets")
    assert all(f"│ {name} " in shown for name in PRESETS)
    assert done("--version").strip() == f"lineate {lineate.__version__}"
    module = subprocess.run([sys.executable, "-m", "lineate", "--version"], capture_output=True, text=True, check=True)
    assert module.stdout.strip() == f"lineate {lineate.__version__}"


def test_set_changes_one_field_of_the_conversion_or_of_the_calibration() -> None:
    def conversion(*assignments: str, preset_name: str | None = None) -> Conversion | None:
        return read_settings(preset_name=preset_name, assignments=assignments).conversion

    assert conversion() == PRESETS["t5"] and conversion(preset_name="t5-plus") == PRESETS["t5-plus"]

    def t5(**fields: Any) -> Conversion:
        return PRESETS["t5"].model_copy(update=fields)

    assert conversion("mixer.inner=2layer") == t5(mixer=TTTConfig(inner="2layer"))
    assert conversion("neighborhood.window=3") == t5(neighborhood=Neighborhood(window=3))
    for mix in ("half", "learned"):
        found = conversion("neighborhood.window=3", f"neighborhood.mix={mix}", preset_name="t5-plus")
        assert found == t5(neighborhood=Neighborhood(window=3, mix=mix))
    assert conversion("neighborhood=null", preset_name="t5-plus") == t5()
    assert conversion('sites=["blocks.0.attn"]', "locality=none") == t5(sites=("blocks.0.attn",), locality="none")
    assert conversion("mixer.name=linear") == t5(mixer=LinearConfig())
    assert conversion("mixer.start_std=1e-1", "mixer.name=ttt") == t5()  # the new mixer begins at its own defaults
    settings = read_settings(assignments=("calibration.steps=50",), seed=3)
    assert settings.calibration.steps == 50 and settings.conversion is not None
    assert settings.conversion.seed == settings.calibration.seed == 3
    assert read_settings(assignments=("calibration.lr=0.5",), converted=Conversion()).conversion is None


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("mixer.inner=huge", ["mixer.inner", "'huge'", "'swiglu'", "'2layer'"]),
        ("mixer.depth=3", ["unknown field 'mixer.depth'", "inner, loss, start_std"]),
        ("mixer.name=mamba", ["mixer.name", "'mamba'", "'ttt'", "'projqk'"]),
        ("mixr.inner=2layer", ["unknown field 'mixr'", "mixer, key_norm"]),
        ("colour=red", ["unknown field 'colour'", "mixer, key_norm", "calibration"]),
        ("neighborhood.size=5", ["unknown field 'neighborhood.size'", "window, mix"]),
        ("neighborhood.window=4", ["neighborhood.window", "odd number", "4"]),
        ("key_norm.eps=1", ["key_norm is 'instance' and has no fields"]),
        ("key_norm_eps=0", ["key_norm_eps", "0", "greater than 0"]),
        ("calibration.steps=many", ["calibration.steps", "'many'", "integer"]),
        ("calibration.steps=-1", ["calibration.steps", "-1", "greater than or equal to 0"]),
        ("calibration.speed=9", ["unknown field 'calibration.speed'", "steps, batch"]),
        ("calibration=9", ["calibration has fields", "9"]),
        ("steps", ["FIELD=VALUE", "'steps'"]),
        ("mixer..inner=2layer", ["FIELD=VALUE", "'mixer..inner=2layer'"]),
    ],
)
def test_an_unknown_field_or_value_is_named_with_the_choices(
    tmp_path: Path, images: Path, assignment: str, words: list[str]
) -> None:
    line = refused("linearize", "embedded", "--images", images, "--out", tmp_path / "run", "--set", assignment)
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[1]", "must hold an object with conversion, calibration, train, image_size, sizes; got a list"),
        ('{"mixer": {}}', "got 'mixer'"),
        ('{"conversion": 3}', "conversion must be an object, got 3"),
        ('{"conversion": {"key_norm": "batch"}}', "key_norm: unknown value 'batch'; choices: 'instance'"),
        ('{"calibration": {"lr": 0}}', "calibration.lr: cannot be 0"),
    ],
)
def test_a_bad_config_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    assert words in refused("convert", "embedded", "--config", file, "--out", tmp_path / "model")
    assert "cannot be read" in refused("convert", "embedded", "--config", tmp_path / "no.json", "--out", tmp_path / "model")


def test_two_conversions_at_once_are_refused(tmp_path: Path, saved: Path, images: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"conversion": {"locality": "none"}}')
    with pytest.raises(SettingsError, match="give one of them"):
        read_settings(preset_name="t5", config=file)
    for option in (("--preset", "t5"), ("--set", "locality=none"), ("--config", file)):
        line = refused("calibrate", saved, "--images", images, "--out", tmp_path / "out", *option)
        assert "converted already" in line
    assert "converted already" in refused("convert", saved, "--out", tmp_path / "out")


def test_sizes_are_sides_or_height_x_width() -> None:
    assert parse_sizes("224,448x672, 224") == ((224, 224), (448, 672))
    for text in ("", "big", "224,", "224x", "x224", "-14", "2.5"):
        with pytest.raises(SettingsError, match="--sizes takes pixels like"):
            parse_sizes(text)


def test_bad_inputs_of_linearize_leave_nothing(tmp_path: Path, weights: str, images: Path) -> None:
    empty, text = tmp_path / "empty", tmp_path / "text"
    for folder in (empty, text):
        folder.mkdir()
    (text / "a.png").write_text("no picture")
    (text / "b.png").write_text("no picture")
    present = {path.name for path in tmp_path.iterdir()}
    swin = "timm:swin_tiny_patch4_window7_224@x.safetensors"
    cases: list[tuple[str, Path, tuple[str, ...], str]] = [
        ("timm:vit_tinny_patch16_224", images, (), f"no model 'vit_tinny_patch16_224'; near names: {ARCHITECTURE}"),
        ("vit", images, (), "unknown source 'vit'; choices: embedded"),
        (weights + "x", images, (), "is not there"),
        (swin, images, (), "attends inside windows"),
        (weights, images, ("--preset", "t6"), "unknown preset 't6'; choices: softmax, t5"),
        (weights, images, ("--set", 'sites=["decoder.*"]'), "no attention site matches 'decoder.*'; sites: blocks.0.attn"),
        (weights, tmp_path / "none", (), "is not there; expected a folder of photographs"),
        (weights, empty, (), "holds no picture"),
        (weights, text, (), "can be read"),
        (weights, images, ("--held-out", str(text)), "none of the 2 pictures can be read"),
        (weights, images, ("--image-size", "33"), "image size 33 is not a multiple of the patch (16 px); near: 32, 48"),
        (weights, images, ("--sizes", "32,33"), "33×33 px is not a multiple"),
        (weights, images, ("--device", "tpu"), "unknown device 'tpu'; choices: cpu, cuda"),
    ]
    for source, folder, options, words in cases:
        line = refused("linearize", source, "--images", folder, "--out", tmp_path / "run", *options)
        assert words in line, line
        assert {path.name for path in tmp_path.iterdir()} == present


def test_usage_errors_exit_with_2(tmp_path: Path) -> None:
    for arguments in (("linearize",), ("linearize", "embedded"), ("nonsense",), ("bench", "embedded", "--size", "3")):
        assert call(*arguments).exit_code == 2


def test_overwrite_spares_what_is_no_run(tmp_path: Path, weights: str, images: Path) -> None:
    thesis = images / "thesis.tex"
    thesis.write_text("years of work")
    line = refused("linearize", weights, "--images", images, "--out", images, "--overwrite", *QUICK)
    assert "which is no part of a run; it is not overwritten" in line and thesis.read_text() == "years of work"


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path: Path, saved: Path, images: Path) -> None:
    def copy(name: str) -> Path:
        shutil.copytree(saved, tmp_path / name)
        return tmp_path / name

    truncated, tampered, sealed, foreign = copy("truncated"), copy("tampered"), copy("sealed"), tmp_path / "foreign"
    with (truncated / "model.safetensors").open("r+b") as stream:
        stream.truncate(1000)
    with (tampered / "model.safetensors").open("r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(b"evil")
    manifest = sealed / "lineate.json"
    manifest.write_text(manifest.read_text().replace('"instance"', '"layer"'))
    foreign.mkdir()
    (foreign / "config.json").write_text("{}")
    for folder, words in (
        (truncated, "truncated"),
        (tampered, "was altered"),
        (sealed, "seal"),
        (foreign, "not saved by lineate"),
    ):
        for command in ("linearize", "calibrate", "analyze"):
            assert words in refused(command, folder, "--images", images, "--out", tmp_path / "out")
        assert words in refused("bench", folder)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, weights: str, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_torch_state_dict", full)
        for command in ("linearize", "calibrate"):
            line = refused(command, weights, "--images", images, "--out", tmp_path / "run", *ONE_SITE, *QUICK)
            assert "No space left on device" in line and not (tmp_path / "run").exists()
        assert "No space left on device" in refused("convert", weights, "--out", tmp_path / "run", *ONE_SITE)
    monkeypatch.setattr(linearize, "draw", full)
    line = refused("linearize", weights, "--images", images, "--out", tmp_path / "run", *ONE_SITE, *QUICK, "--sizes", "32")
    assert "No space left on device" in line and line.endswith(f"the model in {tmp_path / 'run' / 'model'} is whole and was kept")
    assert record(lineate.load(tmp_path / "run" / "model")).sites == ("blocks.0.attn",)


def test_ctrl_c_says_what_was_kept(tmp_path: Path, weights: str, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    run_it = ("linearize", weights, "--images", images, "--out", tmp_path / "run", *ONE_SITE, *QUICK, "--sizes", "32")
    with monkeypatch.context() as patch:
        patch.setattr(linearize, "calibrate", stop)
        result = call(*run_it)
        assert result.exit_code == 130 and result.stderr.splitlines()[-1] == "interrupted: nothing was written"
        assert not (tmp_path / "run").exists()
    monkeypatch.setattr(linearize, "cost", stop)
    result = call(*run_it)
    kept = tmp_path / "run" / "model"
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == f"interrupted: the model in {kept} is whole and was kept"
    assert len(core_modules(lineate.load(kept))) == 1


def test_a_real_interrupt_in_the_middle_of_calibration(tmp_path: Path, weights: str, images: Path) -> None:
    """The signal itself, to the process itself, once its folder is there."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "lineate", "linearize", weights, "--images", images, "--out", out, *ONE_SITE,
               "--set", "calibration.steps=1000000", "--set", "calibration.pool=4", "--image-size", "32"]  # fmt: skip
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # tests run in the background inherit a SIGINT that is ignored
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(list(map(str, command)), preexec_fn=heed, **pipes) as process:
        while not out.exists() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        try:
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130 and stderr.splitlines()[-1] == "interrupted: nothing was written", stderr
    assert not out.exists() and {path.name for path in tmp_path.iterdir()} == {"images"}


def test_demo_uses_the_embedded_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []
    monkeypatch.setattr(cli, "_run", plans.append)
    done("demo", "--out", tmp_path / "run")
    (plan,) = plans
    assert plan.source == "embedded" and plan.conversion == PRESETS["t5-plus"] and plan.preset == "t5-plus"
    assert len(plan.photographs) == 14 and len(plan.held_out) == 6
    assert not set(plan.photographs) & set(plan.held_out)


def test_a_report_of_no_run_is_refused(tmp_path: Path) -> None:
    assert "has no run.json" in refused("report", tmp_path)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of as many classes as the models have, with 7 pictures; the last one is broken."""
    folder = tmp_path_factory.mktemp("labelled")
    for number in range(1000):
        (folder / f"{number:04}").mkdir()
    draw = torch.Generator().manual_seed(2)
    for number in range(7):
        pixels = torch.randint(256, (40, 48, 3), dtype=torch.uint8, generator=draw)
        Image.frombytes("RGB", (48, 40), bytes(pixels.flatten().tolist())).save(folder / f"{number:04}" / "a.png")
    (folder / "0006" / "a.png").write_bytes(b"nonsense")
    return folder


def test_evaluate_counts_and_pairs_and_writes_the_figures(tmp_path: Path, weights: str, saved: Path, labelled: Path) -> None:
    out = tmp_path / "figures" / "top1.json"
    run_it = ("evaluate", saved, "--data", labelled, "--against", weights, "--image-size", "32", "--batch", "4", "--out", out)
    result = call(*run_it)
    assert result.exit_code == 0, result.stderr
    assert f"evaluating {weights} on 7 pictures" in result.stderr and "skipped 1 unreadable" in result.stderr
    found = json.loads(out.read_text())
    ours, theirs = (found["models"][str(name)] for name in (saved, weights))
    assert ours["images"] == theirs["images"] == 6 and list(ours["skipped"]) == [str(labelled / "0006" / "a.png")]
    shown = " ".join(result.stdout.split())
    assert "6 images, 95 % intervals" in shown and f"{ours['loss']:.4f}" in shown and f"{theirs['loss']:.4f}" in shown
    assert ours["loss"] != theirs["loss"] and 0 <= found["paired"]["agreement"]["value"] <= 1
    assert (found["split"], found["data"], found["command"][0]) == ("train", str(labelled), "lineate")
    assert found["preprocessing"][weights]["image_size"] == 32 and found["environment"]["versions"]["torch"]

    assert "exists; pass --overwrite" in refused(*run_it)
    done(*run_it[:4], "--image-size", "32", "--limit", "2", "--crop-pct", "0.5", "--out", out, "--overwrite")
    found = json.loads(out.read_text())
    assert found["models"][str(saved)]["images"] == 2 and found["paired"] is found["against"] is None
    assert found["preprocessing"][str(saved)]["crop_pct"] == 0.5


def test_evaluate_refuses_what_it_cannot_measure_before_it_begins(
    tmp_path: Path, weights: str, labelled: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lineate.evaluate.top1.top_k", None)
    few = tmp_path / "few"
    for name in ("ant", "bee"):
        shutil.copytree(images, few / name)
    assert "has 2 classes (ant, bee), and the model has 1000 classes" in refused("evaluate", weights, "--data", few)
    assert "is not there; expected a folder with" in refused("evaluate", weights, "--data", tmp_path / "nowhere")
    assert "no split 'test'; choices: train" in refused("evaluate", weights, "--data", labelled, "--split", "test")
    assert "crop_pct" in refused("evaluate", weights, "--data", labelled, "--crop-pct", "2")
    assert "embedded has no classifier" in refused("evaluate", "embedded", "--data", tmp_path / "nowhere")
    assert call("evaluate", weights, "--data", labelled, "--batch", "0").exit_code == 2


@pytest.mark.parametrize("workers", ["0", "1"])
def test_strict_data_stops_at_a_broken_picture(weights: str, labelled: Path, workers: str) -> None:
    run_it = ("evaluate", weights, "--data", labelled, "--strict-data", "--image-size", "32", "--workers", workers)
    assert "0006/a.png cannot be read as a picture" in refused(*run_it)


@pytest.mark.slow
def test_two_processes_count_every_image_once(tmp_path: Path, saved: Path, labelled: Path) -> None:
    """7 places on 2 processes, gloo: the eighth that this needs counts nothing, and the broken one is told once."""
    common = ["evaluate", str(saved), "--data", str(labelled), "--image-size", "32", "--batch", "2"]
    done(*common, "--out", tmp_path / "one.json")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "lineate"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launch, *common, "--out", str(tmp_path / "two.json")]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("6 images, 95 % intervals") == found.stdout.count("figures: ") == 1
    one, two = (json.loads((tmp_path / name).read_text())["models"][str(saved)] for name in ("one.json", "two.json"))
    assert one.pop("loss") == pytest.approx(two.pop("loss"), rel=1e-6) and one == two and one["images"] == 6


def test_without_a_terminal_progress_is_a_line_a_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 2000, 20))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    shown = terminal.Screen()
    for done in range(1, 11):
        shown.progress(done, 10, f"epoch 1/1, loss {done}")
    assert capsys.readouterr().err.splitlines() == [
        "epoch 1/1, loss 4: 4 of 10, 0:02:00 left",
        "epoch 1/1, loss 7: 7 of 10, 0:01:00 left",
        "epoch 1/1, loss 10: 10 of 10, 0:00:00 left",
    ]
