"""GenEval: whether pictures show the objects, numbers, colours and places that their prompts name.

    detect     objects of COCO's 80 classes in every picture, and the colours of those whose colour is asked for, written down as
               a line a picture (FILE.jsonl), so that no picture is looked at twice and rules need no weights
    score      of them those surer than 0.3, than 0.9 where objects are counted, at most the 16 surest of a class; then the rules
               of `lineate.evaluate.rules`, and means by tag (`lineate.evaluate.tally`)

What looks is named in every line, and figures of different lookers are not compared: the published figures are those of an
mmdetection Mask2Former. Source: Ghosh et al., arXiv 2310.11513, and its published evaluation, read for facts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pydantic import ValidationError

from lineate.evaluate import EvaluationError, Progress
from lineate.evaluate.rules import Found, faults
from lineate.evaluate.tally import Judged
from lineate.images import open_image
from lineate.mixers.base import Frozen
from lineate.text2image.prompts import Prompt, read_layout

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

SURE, SURE_TO_COUNT = 0.3, 0.9
MOST_OF_A_CLASS = 16
DETECTIONS = "detections.jsonl"


@dataclass(frozen=True)
class Sighting:
    """An object with its pixels, (h, w) bool, if the detector gives them."""

    found: Found
    mask: Tensor | None = None


class Detector(Protocol):
    """Finds objects in a picture, of any score; `name` goes into every line that it writes."""

    name: str

    def __call__(self, picture: Image) -> list[Sighting]:
        """The objects."""
        ...


ColorClassifier = Callable[["Image", Sighting], str]


class Detections(Frozen):
    """What was found in one picture; `picture` is its path inside the folder."""

    picture: str
    detector: str
    objects: tuple[Found, ...]


class Verdict(Frozen):
    """Whether one picture is right, and what is wrong if not."""

    picture: str
    prompt: Prompt
    faults: tuple[str, ...]


def kept(prompt: Prompt, objects: Sequence[Found]) -> list[Found]:
    """The objects that count, the surest first."""
    least = SURE_TO_COUNT if prompt.tag == "counting" else SURE
    seen: Counter[str] = Counter()
    chosen = []
    for thing in sorted(objects, key=lambda thing: -thing.score):
        seen[thing.kind] += 1
        if thing.score > least and seen[thing.kind] <= MOST_OF_A_CLASS:
            chosen.append(thing)
    return chosen


def detect(folder: Path, file: Path, detector: Detector, color_of: ColorClassifier, *, progress: Progress | None = None) -> None:
    """Look at every picture of a folder that `file` does not have yet, and add a line for each."""
    known = read_detections(file) if file.is_file() else {}
    _check_detector(known, file, detector.name)
    todo = unseen(folder, known)
    with file.open("a", encoding="utf-8") as out:
        for done, (prompt, path) in enumerate(todo, start=1):
            objects = look(prompt, open_image(path), detector, color_of)
            line = Detections(picture=_name(folder, path), detector=detector.name, objects=tuple(objects))
            out.write(line.model_dump_json(exclude_none=True) + "\n")
            out.flush()
            if progress is not None:
                progress(done, len(todo), "looking at pictures")


def unseen(folder: Path, known: Mapping[str, Detections]) -> list[tuple[Prompt, Path]]:
    """The pictures of a folder that have no detections, with their prompts."""
    layout = read_layout(folder)
    return [(prompt, path) for prompt, paths in layout for path in paths if _name(folder, path) not in known]


def look(prompt: Prompt, picture: Image, detector: Detector, color_of: ColorClassifier) -> list[Found]:
    """The objects in a picture that may count for its prompt, with the colours of those that it asks of."""
    sightings = {id(sighting.found): sighting for sighting in detector(picture)}
    objects = kept(prompt, [sighting.found for sighting in sightings.values()])
    asked = {
        id(thing)
        for clause in prompt.include if clause.color is not None
        for thing in [thing for thing in objects if thing.kind == clause.kind][: clause.count]
    }  # fmt: skip
    return [
        thing.model_copy(update={"color": color_of(picture, sightings[id(thing)])}) if id(thing) in asked else thing
        for thing in objects
    ]


def read_detections(file: Path) -> dict[str, Detections]:
    """The lines of a file by picture. Raises `EvaluationError`."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    found = {}
    for number, line in enumerate(lines, start=1):
        try:
            one = Detections.model_validate_json(line)
        except ValidationError as error:
            raise EvaluationError(f"{file}:{number} is no line of detections: {error.errors()[0]['msg']}") from error
        found[one.picture] = one
    _check_detector(found, file)
    return found


def score(folder: Path, detections: Mapping[str, Detections]) -> list[list[Verdict]]:
    """Verdicts on the pictures of each prompt. Raises `EvaluationError` if a picture has no detections."""
    verdicts = []
    for prompt, paths in read_layout(folder):
        names = [_name(folder, path) for path in paths]
        missing = next((name for name in names if name not in detections), None)
        if missing is not None:
            raise EvaluationError(f"there are no detections of {folder / missing}")
        of_prompt = [(name, tuple(faults(prompt, kept(prompt, detections[name].objects)))) for name in names]
        verdicts.append([Verdict(picture=name, prompt=prompt, faults=wrong) for name, wrong in of_prompt])
    return verdicts


def judged(verdicts: Sequence[Sequence[Verdict]]) -> list[Judged]:
    """The verdicts as scores, for `lineate.evaluate.tally`."""
    return [
        Judged(tag=of[0].prompt.tag, prompt=of[0].prompt.prompt, scores=tuple(float(not verdict.faults) for verdict in of))
        for of in verdicts
    ]


def write_results(folder: Path, verdicts: Sequence[Sequence[Verdict]], file: Path) -> None:
    """A line a picture as the published evaluation writes them, which its `summary_scores.py` reads."""
    lines = (
        {
            "filename": str(folder / verdict.picture), "tag": verdict.prompt.tag, "prompt": verdict.prompt.prompt,
            "correct": not verdict.faults, "reason": "\n".join(verdict.faults), "metadata": verdict.prompt.line(),
        }
        for of in verdicts for verdict in of
    )  # fmt: skip
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def _check_detector(found: Mapping[str, Detections], file: Path, name: str | None = None) -> None:
    names = {one.detector for one in found.values()} | ({name} if name is not None else set())
    if len(names) > 1:
        raise EvaluationError(f"{file} holds what different detectors found, {' and '.join(sorted(names))}; choose another file")
