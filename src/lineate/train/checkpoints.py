"""Training checkpoints: OUT/checkpoints/step_XXXXXXXX, whole or not there, what is needed to go on as if never stopped.

Each holds accelerate's state (model, sharded or not, optimiser, gradient scaler, averaged weights) and `state.json` with the
step, the history, what the run was told, and size and SHA-256 of every other file. It is written under another name and then
renamed; one that was damaged afterwards is passed over for the newest that is whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from pydantic import Field, JsonValue, ValidationError

from lineate.mixers.base import Frozen
from lineate.train import TrainError

STATE, HISTORY = "state.json", "history.jsonl"


class Epoch(Frozen):
    """One line of the history: where it ended and means over its steps. Steps, images, seconds count from the run's start."""

    epoch: float
    step: int
    images: int
    seconds: float
    lr: float
    losses: dict[str, float]
    metrics: dict[str, float]

    def figures(self) -> str:
        """Losses and metrics in words."""
        return ", ".join(f"{name} {value:.4g}" for name, value in (self.losses | self.metrics).items())


class State(Frozen):
    """Where a run is: steps done, seconds used, epochs told, sums of the losses over `summed` steps of the epoch under way."""

    step: int = 0
    seconds: float = 0.0
    history: tuple[Epoch, ...] = ()
    sums: dict[str, float] = Field(default_factory=dict)
    summed: int = 0
    skipped: dict[str, str] = Field(default_factory=dict)  # pictures that some process could not read since the start, and why

    def after_step(self, losses: Mapping[str, float], seconds: float) -> State:
        """The state one step later."""
        sums = {name: self.sums.get(name, 0.0) + value for name, value in losses.items()}
        return self.model_copy(update={"step": self.step + 1, "seconds": seconds, "sums": sums, "summed": self.summed + 1})

    def after_epoch(self, epoch: float, images: int, lr: float, metrics: Mapping[str, float]) -> State:
        """The state once the epoch is told."""
        means = {name: value / self.summed for name, value in self.sums.items()}
        told = Epoch(epoch=epoch, step=self.step, images=images, seconds=self.seconds, lr=lr, losses=means, metrics=dict(metrics))
        return self.model_copy(update={"history": (*self.history, told), "sums": {}, "summed": 0})


class _Stored(Frozen):
    """What `state.json` holds."""

    state: State
    identity: dict[str, JsonValue]
    files: dict[str, tuple[int, str]]


def folder(out: Path) -> Path:
    """Where the checkpoints of a run are."""
    return out / "checkpoints"


def save(accelerator: Accelerator, out: Path, state: State, identity: Mapping[str, Any], keep: int) -> Path:
    """Write the checkpoint of `state` and remove all but the last `keep`; every process must call it."""
    target = folder(out) / f"step_{state.step:08d}"
    temporary = target.with_name(f".{target.name}")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        stored = _Stored(state=state, identity=dict(identity), files=_digests(temporary))
        (temporary / STATE).write_text(stored.model_dump_json(), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)  # a damaged one of the same step
        temporary.rename(target)
        _write_history(out, state)
        for old in _found(out)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return target


def newest(out: Path) -> Path | None:
    """The newest checkpoint, whole or not."""
    return next(reversed(_found(out)), None)


def resume(
    accelerator: Accelerator, out: Path, identity: Mapping[str, Any], say: Callable[[str], None], *, needed: bool = False
) -> State:
    """Load the newest whole checkpoint and return its state, or an empty one if there is none; every process must call it.

    Raises `TrainError`, before anything is loaded, if the checkpoint's run was told something else; with `needed` also if there
    are checkpoints and none is whole.
    """
    found: list[Any] = [_newest_whole(out, say)] if accelerator.is_main_process else [None]
    broadcast_object_list(found)
    if found[0] is None:
        if needed and newest(out) is not None:
            raise TrainError(
                f"no checkpoint in {folder(out)} is whole, and this run cannot begin without; --overwrite begins anew"
            )
        say(f"no checkpoint in {folder(out)}; beginning at the beginning")
        return State()
    path, stored = found[0]
    if different := list(_differences(stored.identity, json.loads(json.dumps(identity)))):
        raise TrainError(f"{path} belongs to another run: {'; '.join(different)}")
    accelerator.load_state(str(path))
    say(f"resuming from {path}")
    state: State = stored.state
    return state


def _write_history(out: Path, state: State) -> None:
    """`out`/history.jsonl, for whoever looks on: a line an epoch."""
    partial = out / f".{HISTORY}"
    partial.write_text("".join(f"{epoch.model_dump_json()}\n" for epoch in state.history), encoding="utf-8")
    partial.replace(out / HISTORY)


def _found(out: Path) -> list[Path]:
    return sorted(folder(out).glob("step_*"))


def _newest_whole(out: Path, say: Callable[[str], None]) -> tuple[Path, _Stored] | None:
    for path in reversed(_found(out)):
        try:
            stored = _Stored.model_validate_json((path / STATE).read_text(encoding="utf-8"))
        except (OSError, ValidationError) as error:
            say(f"passing over {path}: {STATE} cannot be read: {str(error).splitlines()[0]}")
            continue
        actual = _digests(path)
        if damaged := [name for name, digest in stored.files.items() if actual.get(name) != digest]:
            say(f"passing over {path}: {damaged[0]} is {'damaged' if damaged[0] in actual else 'missing'}")
            continue
        return path, stored
    return None


def _digests(path: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of every file but `state.json`, by its name in the folder."""
    found = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.name != STATE:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            found[str(file.relative_to(path))] = (file.stat().st_size, digest)
    return found


def _differences(before: Any, now: Any, name: str = "") -> Any:
    """Each value that differs, by its path, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        yield f"{name} was {_short(before)} and is {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
