"""DPG-Bench: dense prompts, and a graph of yes-or-no questions to each, asked of a grid of four pictures.

    PROMPTS/ITEM.txt   the prompts
    GRIDS/ITEM.png     four pictures of one, 2×2 without padding; or the folders of `lineate.text2image.prompts`, where an item is
                       its prompt's tag
    QUESTIONS.csv      a row a question: item_id, proposition_id, dependency ("0", or the questions without which this one is
                       moot: "1,3"), category_broad, category_detailed, question_natural_language and others
    ANSWERS.csv        item, image (0 to 3, row by row), question (proposition_id), answer, and perhaps viewer, who answered:
                       whoever can see may fill it in

    fixed      a question counts 1 if its answer is "yes", and 0 if any that it depends on counts 0, in the order of rows;
               picture: the mean over questions; prompt: over its four pictures; overall: over prompts.
               A category: the mean of its questions' counts over all pictures
    official   as the published script computes it: the file's first row is skipped, and a category is the mean of its questions
               without dependencies in each grid's last picture; trust its overall alone

Figures depend on the viewer: the published ones are mPLUG-large's, and no others compare with them. All scores lie in 0 to 1;
the paper's are times 100. Source: Hu et al., arXiv 2403.05135, and its published script (Apache-2.0), read for facts.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from lineate.evaluate import EvaluationError, Progress
from lineate.evaluate.tally import Judged
from lineate.images import find_images, open_image
from lineate.mixers.base import Frozen
from lineate.text2image.prompts import Prompt, has_layout, read_layout

if TYPE_CHECKING:
    from PIL.Image import Image

Mode = Literal["fixed", "official"]
COLUMNS = ("item", "image", "question", "answer")
VIEWER, ANSWERS = "viewer", "answers.csv"
_NEEDED = ("item_id", "proposition_id", "dependency", "category_broad", "category_detailed", "question_natural_language")
PICTURES = 4


class Question(Frozen):
    """One question; `parents` are the numbers of those of the same item on which it depends."""

    item: str
    number: int
    parents: tuple[int, ...]
    broad: str
    detailed: str
    text: str


@dataclass(frozen=True)
class Answers:
    """Answers by item, image and question, and whose they are; "unnamed" where a file does not say."""

    viewer: str
    given: Mapping[tuple[str, int, int], str]


class Viewer(Protocol):
    """Answers a question about a picture; `name` goes beside every answer."""

    name: str

    def __call__(self, picture: Image, question: str) -> str:
        """The answer: yes, or another."""
        ...


class DpgResult(Frozen):
    """`prompts` hold the score of each picture; `broad` and `detailed` the means of categories."""

    prompts: tuple[Judged, ...]
    broad: dict[str, float]
    detailed: dict[str, float]


def read_questions(file: Path) -> list[Question]:
    """The rows of a question graph, in order. Raises `EvaluationError`."""
    found = [_question(row, f"{file}:{number}") for number, row in enumerate(_rows(file, _NEEDED), start=2)]
    numbers: dict[str, set[int]] = {}
    for question in found:
        if question.number in numbers.setdefault(question.item, set()):
            raise EvaluationError(f"{file}: {question.item} has two questions {question.number}")
        numbers[question.item].add(question.number)
    for question in found:
        unknown = set(question.parents) - numbers[question.item]
        if unknown:
            raise EvaluationError(
                f"{file}: question {question.number} of {question.item} depends on {min(unknown)}, which is not there"
            )
    return found


def by_item(questions: Sequence[Question]) -> dict[str, list[Question]]:
    """The questions of each item, in order."""
    items: dict[str, list[Question]] = {}
    for question in questions:
        items.setdefault(question.item, []).append(question)
    return items


def read_answers(file: Path) -> Answers:
    """The answers of a file, in lower case. Raises `EvaluationError`, also if they are of several viewers."""
    given, viewers = {}, set()
    for number, row in enumerate(_rows(file, COLUMNS), start=2):
        try:
            key = row["item"], int(row["image"]), int(row["question"])
        except ValueError as error:
            raise EvaluationError(f"{file}:{number}: image and question are whole numbers: {error}") from error
        given[key] = row["answer"].strip().lower()
        viewers.add(row.get(VIEWER) or "unnamed")
    if len(viewers) != 1:
        raise EvaluationError(f"{file} must hold the answers of one viewer, got {' and '.join(sorted(viewers)) or 'none'}")
    return Answers(viewers.pop(), given)


def read_pictures(folder: Path) -> dict[str, Callable[[int], Image]]:
    """What opens picture 0 to 3 of each item. Raises `EvaluationError`, `PromptError` or `ImageError`."""
    if not has_layout(folder):
        return {path.stem: partial(_quarter_of, path) for path in find_images(folder)}
    found: dict[str, Callable[[int], Image]] = {}
    for prompt, files in read_layout(folder):
        if len(files) != PICTURES or prompt.tag in found:
            raise EvaluationError(f"{folder}: every item needs one folder of {PICTURES} pictures; {prompt.tag} has {len(files)}")
        found[prompt.tag] = partial(_picture_of, files)
    return found


def unanswered(pictures: Iterable[str], questions: Sequence[Question], answers: Answers | None) -> list[tuple[str, int]]:
    """The items and images about which a question is open. Raises `EvaluationError` for an item without questions."""
    texts = by_item(questions)
    strange = next((item for item in pictures if item not in texts), None)
    if strange is not None:
        raise EvaluationError(
            f"there are no questions to {strange!r}; pictures are called as their item, {next(iter(texts))} ..."
        )
    known = answers.given if answers is not None else {}
    return [
        (item, image) for item in pictures for image in range(PICTURES)
        if any((item, image, question.number) not in known for question in texts[item])
    ]  # fmt: skip


def ask(folder: Path, questions: Sequence[Question], viewer: Viewer, file: Path, *, progress: Progress | None = None) -> None:
    """Ask `viewer` what `file` does not answer yet, and add its answers there, a picture's at a time."""
    known = read_answers(file) if file.is_file() else None
    if known is not None and known.viewer != viewer.name:
        raise EvaluationError(f"{file} holds the answers of {known.viewer}, not of {viewer.name}; choose another file")
    texts, pictures = by_item(questions), read_pictures(folder)
    todo = unanswered(pictures, questions, known)
    with file.open("a", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        if known is None:
            writer.writerow((*COLUMNS, VIEWER))
        for done, (item, image) in enumerate(todo, start=1):
            picture = pictures[item](image)
            new = [question for question in texts[item] if known is None or (item, image, question.number) not in known.given]
            writer.writerows([(item, image, question.number, viewer(picture, question.text), viewer.name) for question in new])
            out.flush()
            if progress is not None:
                progress(done, len(todo), "asking about pictures")


def score(questions: Sequence[Question], answers: Answers, mode: Mode = "fixed") -> DpgResult:
    """The scores of all items that have answers. Raises `EvaluationError` if an answer of one of these is missing."""
    items = by_item(questions[1:] if mode == "official" else questions)
    answered = {item for item, _, _ in answers.given}
    if not answered & set(items):
        raise EvaluationError("there is no answer to any of the questions")
    prompts = []
    categories: dict[tuple[str, str], list[float]] = {}
    for item, asked in items.items():
        if item not in answered:
            continue
        scores = []
        for image in range(PICTURES):
            plain = {question.number: float(_answer(answers, item, image, question) == "yes") for question in asked}
            counts = _counted(asked, plain)
            scores.append(sum(counts.values()) / len(counts))
            if mode == "fixed" or image == PICTURES - 1:
                for question in asked:
                    value = (counts if mode == "fixed" else plain)[question.number]
                    categories.setdefault((question.broad, question.detailed), []).append(value)
        prompts.append(Judged(tag="dpg", prompt=item, scores=tuple(scores)))
    return DpgResult(prompts=tuple(prompts), broad=_means(categories, 0), detailed=_means(categories, 1))


def quarter(grid: Image, index: int) -> Image:
    """Picture `index` of a 2×2 grid, row by row. Raises `EvaluationError` for a grid of odd sides."""
    width, height = grid.size
    if width % 2 or height % 2:
        raise EvaluationError(f"a grid of 2x2 pictures has even sides, got {width}x{height} px")
    left, top = index % 2 * width // 2, index // 2 * height // 2
    return grid.crop((left, top, left + width // 2, top + height // 2))


def join(pictures: Sequence[Image]) -> Image:
    """Four pictures of one size as a grid. Raises `EvaluationError` for any others."""
    from PIL import Image as pil

    if len(pictures) != PICTURES or len({picture.size for picture in pictures}) != 1:
        raise EvaluationError(f"a grid takes {PICTURES} pictures of one size, got {[picture.size for picture in pictures]}")
    width, height = pictures[0].size
    grid = pil.new("RGB", (2 * width, 2 * height))
    for index, picture in enumerate(pictures):
        grid.paste(picture, (index % 2 * width, index // 2 * height))
    return grid


def write_grids(folder: Path, out: Path) -> None:
    """The pictures of a folder as grids ITEM.png, which the published script reads."""
    out.mkdir(parents=True, exist_ok=True)
    for item, picture in read_pictures(folder).items():
        join([picture(index) for index in range(PICTURES)]).save(out / f"{item}.png")


def read_texts(folder: Path) -> list[Prompt]:
    """The prompts of a folder, in order of name, tagged with their item. Raises `EvaluationError` if there is none."""
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise EvaluationError(f"{folder} holds no prompts ITEM.txt")
    return [Prompt(tag=file.stem, prompt=file.read_text(encoding="utf-8").strip()) for file in files]


def _quarter_of(grid: Path, index: int) -> Image:
    return quarter(open_image(grid), index)


def _picture_of(files: Sequence[Path], index: int) -> Image:
    return open_image(files[index])


def _rows(file: Path, needed: Sequence[str]) -> Iterator[dict[str, str]]:
    try:
        with file.open(encoding="utf-8", newline="") as stored:
            reader = csv.DictReader(stored)
            missing = [name for name in needed if name not in (reader.fieldnames or ())]
            if missing:
                raise EvaluationError(f"{file} has no column {missing[0]!r}; it needs {', '.join(needed)}")
            yield from reader
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise EvaluationError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _question(row: Mapping[str, str], where: str) -> Question:
    try:
        parents = tuple(number for part in row["dependency"].split(",") if (number := int(part)) != 0)
        return Question(
            item=row["item_id"], number=int(row["proposition_id"]), parents=parents, broad=row["category_broad"],
            detailed=row["category_detailed"], text=row["question_natural_language"],
        )  # fmt: skip
    except ValueError as error:
        raise EvaluationError(f"{where} is no question: {str(error).splitlines()[0]}") from error


def _answer(answers: Answers, item: str, image: int, question: Question) -> str:
    key = (item, image, question.number)
    if key not in answers.given:
        raise EvaluationError(f"question {question.number} about picture {image} of {item} has no answer")
    return answers.given[key]


def _counted(asked: Sequence[Question], plain: Mapping[int, float]) -> dict[int, float]:
    """What each question counts; in the order of rows, so that a moot parent makes its later children moot too."""
    counts = dict(plain)
    for question in asked:
        if any(counts.get(parent) == 0 for parent in question.parents):  # a parent in a skipped row is passed over
            counts[question.number] = 0.0
    return counts


def _means(categories: Mapping[tuple[str, str], Sequence[float]], level: int) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for names, values in categories.items():
        groups.setdefault(names[level], []).extend(values)
    return {name: sum(values) / len(values) for name, values in sorted(groups.items())}
