"""The experiments: a run converts, calibrates, tunes and evaluates as it says, and a table shows what its result files hold."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

import lineate
from lineate.data import open_data

ROOT = Path(__file__).parents[1] / "experiments"
TABLES = ("table1", "table2", "table3", "table4", "table5", "table11", "tune", "starts")


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT))
    found = {name: importlib.import_module(name) for name in ("small", "harness", *TABLES)}
    monkeypatch.setattr(found["harness"], "RESULTS", tmp_path / "results")
    return found


@pytest.fixture
def data(tmp_path: Path) -> Any:
    draw = torch.Generator().manual_seed(0)
    for split, name, index in [(s, f"class{c}", i) for s in ("train", "test") for c in range(10) for i in range(2)]:
        folder = tmp_path / "data" / split / name
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (32, 32, 3), generator=draw, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return [open_data(tmp_path / "data", split=split) for split in ("train", "test")]


@pytest.mark.slow
def test_a_run_leaves_its_figures_and_a_table_shows_them(
    modules: dict[str, ModuleType], data: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small, harness = modules["small"], modules["harness"]
    torch.manual_seed(0)
    lineate.save(lineate.convert(small.build(), "softmax"), tmp_path / "host")
    monkeypatch.setattr(small, "HOST", tmp_path / "host")
    quick = {"epochs": 1.0, "warmup_epochs": 0.5, "batch": 10, "compile": False}
    monkeypatch.setattr(small, "TUNING", small.TUNING.model_copy(update=quick))
    monkeypatch.setattr(small, "CALIBRATION", small.CALIBRATION.model_copy(update={"steps": 2, "batch": 2, "pool": 4}))

    run = harness.Run("t5-paper", ("train.new_lr_multiplier=3",), "freeze", calibrated=True)
    row = harness.execute(run, 1, *data)
    assert row["train"]["protocol"] == "freeze" and row["train"]["seed"] == row["conversion"]["seed"] == 1
    assert row["train"]["new_lr_multiplier"] == 3 and row["results"]["tuning"]["steps"] == 2
    assert row["results"]["calibration"]["images"] == 4
    assert row["results"]["final"]["images"] == row["results"]["calibrated_only"]["images"] == 20

    table = harness.Table("t", "t", ("FT",), (harness.Row("a row", (1.5,), (run,)),))
    assert "| a row | 1.5 | not run |" in harness.markdown(table)
    file = harness.result_file(run, 1)
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(row))
    shown = f"{100 * row['results']['final']['top1']['value']:.1f}"
    assert f"| a row | 1.5 | {shown} ±" in harness.markdown(table)

    bare = harness.execute(harness.Run("linear", tune=None), 0, *data)
    assert bare["train"] is None and set(bare["results"]) == {"new_parameters", "final"}


def test_every_row_of_every_table_is_a_conversion_and_a_training_that_exist(modules: dict[str, ModuleType]) -> None:
    for name in TABLES:
        table = modules[name].TABLE
        assert all(len(row.runs) == len(row.paper) == len(table.columns) for row in table.rows)
        for run in table.every():
            settings = modules["harness"].read_settings(preset_name=run.preset, assignments=run.conversion_fields())
            assert settings.conversion is not None
            fields = [field for field in run.set if field.startswith("train.")]
            config = modules["small"].tuning(run.tune, fields, 0)
            assert (config is None) == (run.tune is None)
    names = [run.name for name in TABLES for run in modules[name].TABLE.every()]
    assert len({run for name in TABLES for run in modules[name].TABLE.every()}) == len(set(names))
