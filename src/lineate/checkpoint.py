"""Checkpoints: a directory with `model.safetensors` (in shards when large) and `lineate.json`, which says what was done.

A full checkpoint reloads by itself: the host is built again from its description without weights, converted again, and filled
strictly. A delta keeps only the tensors below `.core.` and is laid over the original model, which must be the very same.
Loading uses no network and never unpickles. Everything is checked before a byte is written, and a directory appears whole or
not at all: it is written under another name beside its place and then renamed.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub import save_torch_state_dict
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lineate.convert import ConversionRecord, convert, is_new, record
from lineate.families import family
from lineate.mixers.base import Frozen
from lineate.version import __version__

FORMAT = 1
MANIFEST = "lineate.json"
RUN = "run.json"  # what a command did to get here, for its reader: loading passes it over

Shapes = Mapping[str, tuple[int, ...]]


class CheckpointError(ValueError):
    """A checkpoint cannot be written or is not what it should be; the message is one line."""


class SavedFile(Frozen):
    """One file beside `lineate.json`, so that a truncated or altered one is noticed."""

    name: str = Field(pattern=r"^model[\w.-]*$")  # a bare name: nothing outside the directory is ever read
    bytes: int
    sha256: str


class Manifest(Frozen):
    """What `lineate.json` holds; `seal` is the SHA-256 of all else in it, `host_sha256` that of the host a delta belongs to."""

    format: int = FORMAT
    lineate: str
    kind: Literal["full", "delta"]
    record: ConversionRecord
    tied: dict[str, str]  # the name of a tensor that is not stored -> the name under which the same tensor is
    host_sha256: str | None = None
    classes: tuple[str, ...] | None = None  # what a classifier's outputs stand for, where it is known
    image_size: int | None = None  # side in px of the pictures that it was fitted to, where they were not of the host's own size
    files: tuple[SavedFile, ...]
    seal: str = ""


def save(
    model: nn.Module,
    path: str | Path,
    *,
    delta: bool = False,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Save a converted model into the directory `path` (made with its parents) and return it.

    `delta` keeps only the cores; `max_shard_size` is in bytes or like "5GB". With `overwrite` an older checkpoint at `path` is
    replaced, once the new one is complete; a directory with anything else in it never is.
    Raises `ConversionError` if the model is not converted and `CheckpointError` for all else; then nothing has changed on disk.
    """
    done = record(model)
    _check_model(model, done, delta)
    target = Path(path).resolve()
    check_target(target, overwrite)
    state = model.state_dict()
    stored, tied = _untie({name: tensor for name, tensor in state.items() if is_new(name) or not delta})
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        save_torch_state_dict(stored, temporary, max_shard_size=max_shard_size)
        manifest = Manifest(
            lineate=__version__,
            kind="delta" if delta else "full",
            record=done,
            tied=tied,
            host_sha256=_fingerprint(state) if delta else None,
            classes=family(done.family).class_names(model),
            image_size=kept_size(model),
            files=tuple(
                SavedFile(name=file.name, bytes=file.stat().st_size, sha256=_digest(file)) for file in sorted(temporary.iterdir())
            ),
        )
        data = manifest.model_dump(mode="json")
        (temporary / MANIFEST).write_text(json.dumps(data | {"seal": _seal(data)}, indent=2) + "\n", encoding="utf-8")
        _move(temporary, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot save to {path}: {_first_line(error)}; nothing was changed there") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # still there only if something went wrong, Ctrl-C included
    return Path(path)


def load(path: str | Path, *, base: nn.Module | None = None) -> nn.Module:
    """The model that `save` wrote to the directory `path`, converted, in eval mode, on the CPU, bit for bit.

    A delta needs `base`, the original unconverted model: it is converted in place, filled and returned, on its own device.
    Raises `CheckpointError`, before `base` is changed, for a directory of another origin, a file that is missing, truncated
    or altered, tensors that do not fit, or a base that is not the delta's host.
    """
    folder = Path(path)
    manifest = _read_manifest(folder)
    if manifest.kind == "full" and base is not None:
        raise CheckpointError(f"{path} is a full checkpoint; base= is for deltas only")
    if manifest.kind == "delta" and base is None:
        raise CheckpointError(f"{path} is a delta: it holds the cores only; pass the original model as base=")
    tensors: dict[str, Tensor] = {}
    for file in manifest.files:
        tensors |= _read_tensors(folder, file)
    try:
        tensors |= {name: tensors[kept] for name, kept in manifest.tied.items()}
    except KeyError as error:
        raise CheckpointError(f"{path} does not fit its record: missing {error.args[0]}") from error
    model = _fill_host(folder, manifest, tensors) if base is None else _fill_base(folder, manifest, tensors, base)
    for name, kept in manifest.tied.items():
        owner, _, leaf = name.rpartition(".")
        kept_owner, _, kept_leaf = kept.rpartition(".")
        setattr(model.get_submodule(owner), leaf, getattr(model.get_submodule(kept_owner), kept_leaf))
    cast(Any, model).lineate_record = manifest.record
    if manifest.classes is not None:
        family(manifest.record.family).name_classes(model, manifest.classes)
    keep_size(model, manifest.image_size)
    return model.eval()


def kept_size(model: nn.Module) -> int | None:
    """Side in px of the pictures that `model` was loaded for, where that was said."""
    found: int | None = getattr(model, "lineate_image_size", None)
    return found


def keep_size(model: nn.Module, size: int | None) -> None:
    """Note that side; `save` keeps it."""
    cast(Any, model).lineate_image_size = size


def saved_in(place: str | Path) -> Path | None:
    """Where a model is saved: `place` itself, or `place`/model, where a run leaves it; None if in neither."""
    folders = (Path(place), Path(place) / "model") if str(place) else ()
    return next((folder for folder in folders if (folder / MANIFEST).is_file()), None)


def read_record(path: str | Path) -> ConversionRecord:
    """The record of the model in the directory `path`, without its tensors. Raises `CheckpointError`."""
    return _read_manifest(Path(path)).record


def original_of(model: nn.Module) -> nn.Module:
    """The unconverted host of a converted `model`, in eval mode, with the model's own host weights (shared, not copied).

    A class token that the conversion dropped is not there either: it is the host that the cores stand in.
    Raises `ConversionError` if the model is not converted, `CheckpointError` if its host cannot be had again.
    """
    done = record(model)
    if done.host is None:
        raise CheckpointError(f"the original of this {type(model).__name__} cannot be built again from a description")
    if redrawn := [name for name in done.names("new") if not is_new(name)]:
        raise CheckpointError(f"the original is gone: {_some(redrawn)} drawn anew")
    host = _rebuild(done, "cpu", original=True)
    state = {name: tensor for name, tensor in model.state_dict().items() if not is_new(name)}
    if trouble := disagreement(shapes(host.state_dict()), shapes(state)):
        raise CheckpointError(f"the model was changed after its conversion: {trouble}")
    _fill(host, state)
    if (names := family(done.family).class_names(model)) is not None:
        family(done.family).name_classes(host, names)
    keep_size(host, kept_size(model))
    return host.to(next(model.parameters()).device).eval()


def disagreement(expected: Shapes, found: Shapes) -> str | None:
    """How the tensors found differ from those expected: one line naming at most three of each kind, or None."""
    parts = []
    if missing := [name for name in expected if name not in found]:
        parts.append(f"missing {_some(missing)}")
    if unexpected := [name for name in found if name not in expected]:
        parts.append(f"unexpected {_some(unexpected)}")
    if misshapen := [name for name in expected if name in found and tuple(expected[name]) != tuple(found[name])]:
        parts.append(_some(f"{name} has shape {tuple(found[name])} instead of {tuple(expected[name])}" for name in misshapen))
    return "; ".join(parts) or None


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _some(items: Iterable[str]) -> str:
    listed = list(items)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _seal(data: dict[str, Any]) -> str:
    """SHA-256 of the manifest without its seal: a setting edited by hand may change no tensor's shape, yet every output."""
    body = {key: value for key, value in data.items() if key != "seal"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, types, shapes and values of the tensors that are not a core's."""
    digest = hashlib.sha256()
    for name in sorted(name for name in state if not is_new(name)):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _rebuild(done: ConversionRecord, device: str = "meta", *, original: bool = False) -> nn.Module:
    """The model that the record describes, or its unconverted host: without values on "meta", freshly drawn elsewhere."""
    assert done.host is not None
    try:
        with torch.device(device):
            host = family(done.family).build(done.host)
            return host if original else convert(host, done.conversion)
    except (ImportError, AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"the {done.family} host cannot be built again: {_first_line(error)}") from error


def _check_model(model: nn.Module, done: ConversionRecord, delta: bool) -> None:
    """Raise `CheckpointError` unless what would be saved can be loaded again."""
    state = model.state_dict()
    if empty := [name for name, tensor in state.items() if tensor.is_meta]:
        raise CheckpointError(f"the model has no values to save: {_some(empty)} on the meta device")
    if delta:
        if redrawn := [name for name in done.names("new") if not is_new(name)]:
            raise CheckpointError(
                f"a delta keeps the cores only, but {_some(redrawn)} drawn anew; save the whole model (delta=False)"
            )
        if done.conversion.class_token == "drop" and done.names("dropped"):
            raise CheckpointError(
                "a delta keeps the cores only, but class_token='drop' changed the host; save the whole model (delta=False)"
            )
        expected = _core_shapes(done)
        found = {name: shape for name, shape in shapes(state).items() if is_new(name)}
    elif done.host is None:
        raise CheckpointError(
            f"this {type(model).__name__} cannot be built again from a description, as a full checkpoint must be; "
            "save a delta (delta=True) and load it with base="
        )
    else:
        expected, found = shapes(_rebuild(done).state_dict()), shapes(state)
    if trouble := disagreement(expected, found):
        raise CheckpointError(f"the model was changed after its conversion: {trouble}")


def _core_shapes(done: ConversionRecord) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for tensor in done.tensors if is_new(tensor.name)}


def check_target(target: Path, overwrite: bool) -> None:
    """Raise `CheckpointError` if something stands at `target` that must not be replaced."""
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file; a checkpoint is a directory")
    if not overwrite:
        raise CheckpointError(f"{target} exists; pass overwrite=True (--overwrite) to replace it")
    ours = (MANIFEST, RUN) if (target / MANIFEST).is_file() else ()
    foreign = [file.name for file in sorted(target.iterdir()) if file.name not in ours and not _is_weights(file.name)]
    if foreign:
        raise CheckpointError(f"{target} also holds {_some(foreign)}, which is no part of a checkpoint; it is not overwritten")


def _is_weights(name: str) -> bool:
    return name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json"))


def _move(temporary: Path, target: Path) -> None:
    """Rename `temporary` to `target`; what stood there is put aside first, and back if that fails."""
    if not target.exists():
        temporary.rename(target)
        return
    aside = temporary.with_name(f"{temporary.name}.old")
    try:
        target.rename(aside)
        temporary.rename(target)
    except BaseException:
        if aside.exists() and not target.exists():
            aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _untie(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to store, each once, and for every name left out the name that its tensor is stored under."""
    stored: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in first:
            tied[name] = first[place]
        else:
            first[place] = name
            # A window into a larger storage is copied out: safetensors refuses storages shared between names.
            shared = tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
            stored[name] = tensor.detach().clone() if shared else tensor.detach()
    return stored, tied


def _read_manifest(folder: Path) -> Manifest:
    """`lineate.json`, checked against its seal."""
    file = folder / MANIFEST
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is {'a file' if folder.exists() else 'not there'}; a checkpoint is a directory")
    if not file.is_file():
        raise CheckpointError(f"{folder} has no {MANIFEST}, so it was not saved by lineate")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {_first_line(error)}") from error
    version = data.get("format") if isinstance(data, dict) else None
    if not isinstance(version, int):
        raise CheckpointError(f"{file} has no format number, so it was not saved by lineate")
    if version > FORMAT:
        raise CheckpointError(
            f"{file} has format {version}, written by lineate {data.get('lineate')}; this one reads up to {FORMAT}: upgrade it"
        )
    if data.get("seal") != _seal(data):
        raise CheckpointError(f"{file} was changed after it was written: it does not match its own seal")
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{file} is not valid: {where}: {first['msg']}") from error


def _read_tensors(folder: Path, saved: SavedFile) -> dict[str, Tensor]:
    """The tensors of one file, after checking it whole; the shards' index, which other tools read, holds none."""
    file = folder / saved.name
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    if (size := file.stat().st_size) != saved.bytes:
        raise CheckpointError(f"{file} has {size} bytes instead of {saved.bytes}: it is truncated or was altered")
    if _digest(file) != saved.sha256:
        raise CheckpointError(f"{file} was altered: its SHA-256 is not the one that {MANIFEST} records")
    if file.suffix != ".safetensors":
        return {}
    try:
        # Copied: what lies askew in a mapped file gives products that differ in their last bits from the saved model's.
        found: dict[str, Tensor] = {name: tensor.clone() for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {_first_line(error)}") from error
    return found


def _fill_host(folder: Path, manifest: Manifest, tensors: dict[str, Tensor]) -> nn.Module:
    """Build, convert and fill the host; the tensors read become the model's, with their types."""
    if manifest.record.host is None:
        raise CheckpointError(f"{folder / MANIFEST} does not say how to build the host")
    model = _rebuild(manifest.record)
    if trouble := disagreement(shapes(model.state_dict()), shapes(tensors)):
        raise CheckpointError(f"{folder} does not fit its record: {trouble}")
    if {name for name, _ in model.named_buffers()} - tensors.keys():
        model = _rebuild(manifest.record, "cpu")  # a buffer that is never stored gets its values only where it is built
    _fill(model, tensors)
    return model


def _fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make the tensors, with their types, the model's own; buffers that are never stored take the type that the others share."""
    types = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(types) == 1:
        model.to(types.pop())
    model.load_state_dict(tensors, assign=True)


def _fill_base(folder: Path, manifest: Manifest, tensors: dict[str, Tensor], base: nn.Module) -> nn.Module:
    """Check that `base` is the delta's host, convert it in place and fill its cores."""
    done = manifest.record
    if trouble := disagreement(_core_shapes(done), shapes(tensors)):
        raise CheckpointError(f"{folder} does not fit its record: {trouble}")
    state = base.state_dict()
    host = {t.name: t.shape for t in done.tensors if t.status != "dropped" and not is_new(t.name)}
    if trouble := disagreement(host, shapes({name: tensor for name, tensor in state.items() if not is_new(name)})):
        raise CheckpointError(f"base is not the model that {folder} was made from: {trouble}")
    if _fingerprint(state) != manifest.host_sha256:
        raise CheckpointError(f"base is not the model that {folder} was made from: its weights have other values or types")
    try:
        convert(base, done.conversion)
    except ValueError as error:
        raise CheckpointError(f"base cannot be converted as {folder} asks: {_first_line(error)}") from error
    here = base.state_dict()
    base.load_state_dict({name: tensor.to(here[name].device) for name, tensor in tensors.items()}, strict=False, assign=True)
    return base
