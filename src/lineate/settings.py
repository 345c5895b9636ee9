"""What the command line says of a conversion, its calibration and its training, made into their configs.

    --preset NAME        where to start; t5 where nothing is said, or dit5 for a denoiser
    --recipe NAME        likewise for training, where a command trains
    --config FILE.json   {"conversion": {...}, "calibration": {...}, "train": {...}}, as run.json's "config" has it; a run.json
                         itself will do, and a command that does not train passes over "train"
    --set a.b=c          one field: of the conversion, or below `calibration.` or `train.`; c is JSON, or else a string

Whatever is wrong is one line that names the value and the choices.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lineate.calibrate import CalibrationConfig
from lineate.convert import PRESETS, Conversion, preset
from lineate.core import Neighborhood
from lineate.mixers import MIXERS
from lineate.mixers.base import Frozen
from lineate.recipes import RECIPES
from lineate.train.config import Augment, Denoise, Distill, Lora, TrainConfig

TRAIN_PARTS: dict[str, type[Frozen]] = {"augment": Augment, "denoise": Denoise, "distill": Distill, "lora": Lora}


class SettingsError(ValueError):
    """A setting is unknown or has a value that it cannot have; the message names it and the choices."""


class Settings(Frozen):
    """What to do. `conversion` is None for a source that is converted already, `train` for a command that does not train.

    Sizes (h, w) in px are None where not said.
    """

    conversion: Conversion | None
    calibration: CalibrationConfig
    train: TrainConfig | None = None
    preset: str | None = None
    recipe: str | None = None
    image_size: int | None = None
    sizes: tuple[tuple[int, int], ...] | None = None


def read_settings(
    *,
    preset_name: str | None = None,
    config: Path | None = None,
    assignments: Sequence[str] = (),
    seed: int | None = None,
    converted: Conversion | None = None,
    trains: bool = False,
    recipe: str | None = None,
    epochs: float | None = None,
    default: str = "t5",
) -> Settings:
    """The settings that the options say. `seed` is the conversion's, the calibration's and the training's.

    `converted` is the conversion of a source that is converted already: no other can be said, only this and the rest. `epochs`
    shortens or lengthens a recipe with its warm-up, where `trains`. `default` names the preset and the recipe where none is said.
    Raises `SettingsError`, or `ConversionError` for an unknown preset.
    """
    if seed is not None and not 0 <= seed < 2**63:
        raise SettingsError(f"--seed must be 0 to 2**63 - 1, got {seed}")
    said = _read_config(config) if config else {}
    if converted is not None:
        if said.get("conversion") is not None and _same(said["conversion"], converted):
            del said["conversion"]
        if preset_name is not None and preset(preset_name) == converted.model_copy(update={"seed": 0}):
            preset_name = None
    pairs = [_parse(text) for text in assignments]
    if not trains and (path := next((path for path, _ in pairs if path[0] == "train"), None)):
        raise SettingsError(f"{'.'.join(path)} cannot be set where nothing is trained")
    if preset_name is not None and said.get("conversion") is not None:
        raise SettingsError(f"{config} gives a conversion whole, and --preset {preset_name} another; give one of them")
    if converted is not None:
        beyond = [".".join(path) for path, _ in pairs if path[0] not in ("calibration", "train")]
        if preset_name is not None or said.get("conversion") is not None or beyond:
            free = "calibration.* and train.*" if trains else "calibration.*"
            named = f"--preset {preset_name}" if preset_name is not None else f"the conversion in {config}"
            what = f"--set {beyond[0]}" if beyond else named
            raise SettingsError(
                f"the source is converted already, {_called(converted)}, so {what} cannot change it; only {free} can be set"
            )
    chosen = None if converted is not None or said.get("conversion") is not None else preset_name or default
    fields = said.get("conversion") if chosen is None else preset(chosen).model_dump(mode="json")
    fields = (fields or {}) | {"calibration": said.get("calibration") or {}}
    if trains:
        fields["train"] = _training(said.get("train"), recipe, epochs, config, default)
    for path, value in pairs:
        _assign(fields, path, value)
    calibration, train = fields.pop("calibration"), fields.pop("train", None)
    if seed is not None:
        for part in (fields, calibration, train):
            if part is not None:
                part["seed"] = seed
    whole = {key: value for key, value in said.items() if key in ("image_size", "sizes")}
    whole |= {"conversion": None if converted is not None else fields, "calibration": calibration, "preset": chosen}
    if trains:
        whole |= {"train": train, "recipe": None if said.get("train") else recipe or default}
    try:
        return Settings.model_validate(whole)
    except ValidationError as error:
        raise SettingsError("; ".join(_tell(item) for item in error.errors())) from error


def _training(
    said: dict[str, Any] | None, recipe: str | None, epochs: float | None, config: Path | None, default: str
) -> dict[str, Any]:
    """Fields of the training: a config's whole, or those of a recipe, made longer or shorter."""
    if said and recipe is not None:
        raise SettingsError(f"{config} gives the training whole, and --recipe {recipe} another; give one of them")
    name = recipe or default
    if name not in RECIPES:
        raise SettingsError(f"unknown recipe {name!r}; choices: {', '.join(RECIPES)}")
    fields = dict(said or RECIPES[name]().model_dump(mode="json"))
    if epochs is not None:
        if epochs <= 0:
            raise SettingsError(f"--epochs must be more than 0, got {epochs:g}")
        whole = TrainConfig.model_validate(fields)
        fields |= {"epochs": epochs, "steps": None, "warmup_epochs": whole.warmup_epochs * epochs / whole.epochs}
    return fields


def _same(said: dict[str, Any], conversion: Conversion) -> bool:
    """Whether a config says just this conversion, as the run.json of a run on a saved directory does."""
    try:
        return Conversion.model_validate(said) == conversion
    except ValidationError:
        return False


def _called(conversion: Conversion) -> str:
    """The preset that a conversion is, whatever its seed, or its mixer's name."""
    plain = conversion.model_copy(update={"seed": 0})
    found = next((name for name, known in PRESETS.items() if known == plain), None)
    return f"as {found}" if found is not None else f"as no preset says (mixer {conversion.mixer.name})"


def parse_sizes(text: str) -> tuple[tuple[int, int], ...]:
    """Sizes like "224,448x672" as ((224, 224), (448, 672)): side, or height x width, in px. Raises `SettingsError`."""
    sizes = [re.fullmatch(r"(\d+)(?:x(\d+))?", part.strip(), re.ASCII | re.IGNORECASE) for part in text.split(",")]
    if not all(sizes):
        raise SettingsError(f"--sizes takes pixels like 224,448 or 448x672, got {text!r}")
    return tuple(dict.fromkeys((int(size[1]), int(size[2] or size[1])) for size in sizes if size))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise SettingsError(f"{path} is not JSON: {error}") from error
    if isinstance(data, dict) and isinstance(data.get("config"), dict):
        data = data["config"]
    keys = ("conversion", "calibration", "train", "image_size", "sizes")
    if not isinstance(data, dict) or (set(data) - set(keys)):
        got = f"{', '.join(map(repr, sorted(set(data) - set(keys))))}" if isinstance(data, dict) else f"a {type(data).__name__}"
        raise SettingsError(f"{path} must hold an object with {', '.join(keys)}; got {got}")
    for key in keys[:3]:
        if not isinstance(data.get(key) or {}, dict):
            raise SettingsError(f"{path}: {key} must be an object, got {data[key]!r}")
    return data


def _parse(text: str) -> tuple[list[str], Any]:
    name, equals, value = text.partition("=")
    path = name.strip().split(".")
    if not equals or not all(path):
        raise SettingsError(f"--set takes FIELD=VALUE, like mixer.inner=2layer, got {text!r}")
    try:
        return path, json.loads(value)
    except ValueError:
        return path, value


def _assign(fields: dict[str, Any], path: list[str], value: Any) -> None:
    """Set one field in place; fields above it that are None begin as {}; another mixer begins at its own defaults."""
    if path == ["mixer", "name"]:
        path, value = ["mixer"], {"name": value}
    here = fields
    for depth, key in enumerate(path[:-1], start=1):
        if here.get(key) is None:
            _check_known(path[:depth])
            here[key] = {"name": "ttt"} if key == "mixer" else {}
        if not isinstance(here[key], dict):
            raise SettingsError(f"{'.'.join(path[:depth])} is {here[key]!r} and has no fields, so {'.'.join(path)} cannot be set")
        here = here[key]
    if path in (["calibration"], ["train"]) and not isinstance(value, dict):
        raise SettingsError(f"{path[0]} has fields, {', '.join(_choices([*path, '']))}; got {value!r}")
    here[path[-1]] = value


def _check_known(path: Sequence[str]) -> None:
    if path[-1] not in _choices(path):
        raise SettingsError(_unknown(path))


def _choices(path: Iterable[str]) -> list[str]:
    """The fields that stand beside the last name of a path."""
    match list(path):
        case ["mixer", kind, _] if kind in MIXERS:
            return list(MIXERS[kind].config_type.model_fields)
        case ["neighborhood", _]:
            return list(Neighborhood.model_fields)
        case ["calibration", _]:
            return list(CalibrationConfig.model_fields)
        case ["train", _]:
            return list(TrainConfig.model_fields)
        case ["train", part, _] if part in TRAIN_PARTS:
            return list(TRAIN_PARTS[part].model_fields)
        case _:
            return [*Conversion.model_fields, "calibration", "train"]


def _name(path: Sequence[str]) -> str:
    """A path as `--set` takes it: pydantic puts the mixer's kind between the mixer and its field."""
    inner = path[0] == "mixer" and len(path) > 1 and path[1] in MIXERS
    return ".".join([path[0], *path[2:]] if inner else path)


def _unknown(path: Sequence[str]) -> str:
    return f"unknown field {_name(path)!r}; choices: {', '.join(_choices(path))}"


def _tell(item: Any) -> str:
    """One of pydantic's errors, in a phrase."""
    path = [str(part) for part in item["loc"]]
    path = path[1:] if path[0] == "conversion" else path
    if not path:
        return f"the conversion: {item['msg']}"
    match item["type"]:
        case "extra_forbidden":
            return _unknown(path)
        case "literal_error":
            return f"{_name(path)}: unknown value {item['input']!r}; choices: {item['ctx']['expected']}"
        case "union_tag_invalid":
            return f"{_name(path)}.name: unknown value {item['ctx']['tag']!r}; choices: {item['ctx']['expected_tags']}"
        case "value_error" if isinstance(item["input"], dict):
            return f"{_name(path)}: {item['msg'].removeprefix('Value error, ')}"
        case _:
            problem = item["msg"].removeprefix("Value error, ")
            return f"{_name(path)}: cannot be {item['input']!r}: {problem[:1].lower()}{problem[1:]}"
