"""DPG-Bench: dense prompts, and a graph of yes-or-no questions to each, asked of a grid of four pictures.

    PROMPTS/ITEM.txt   the prompts                    GRIDS/ITEM.png   four pictures of one, 2×2 without padding
    QUESTIONS.csv      a row a question: item_id, proposition_id, dependency ("0", or the questions without which this one is
                       moot: "1,3"), category_broad, category_detailed, question_natural_language and others
    ANSWERS.csv        item, image (0 to 3, row by row), question (proposition_id), answer: whoever can see may fill it in

    fixed      a question counts 1 if its answer is "yes", and 0 if any that it depends on counts 0, in the order of rows;
               picture: the mean over questions; prompt: over its four pictures; overall: over prompts.
               A category: the mean of its questions' counts over all pictures
    official   as the published script computes it: the file's first row is skipped, and a category is the mean of its questions
               without dependencies in each grid's last picture; trust its overall alone

Figures depend on who answered: the published ones are mPLUG-large's, and no others compare with them. All scores lie in 0 to 1;
the paper's are times 100. Source: Hu et al., arXiv 2403.05135, and its published script (Apache-2.0), read for facts.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from lineate.evaluate import EvaluationError, Progress
from lineate.evaluate.tally import Judged
from lineate.images import find_images, open_image
from lineate.mixers.base import Frozen
from lineate.statistics import Interval, bootstrap

if TYPE_CHECKING:
    from PIL.Image import Image

Mode = Literal["fixed", "official"]
Answers = Mapping[tuple[str, int, int], str]  # (item, image, question) -> answer
COLUMNS = ("item", "image", "question", "answer")
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


class Viewer(Protocol):
    """Answers a question about a picture."""

    def __call__(self, picture: Image, question: str) -> str:
        """The answer: yes, or another."""
        ...


class DpgResult(Frozen):
    """`prompts` hold the score of each picture; `broad` and `detailed` the means of categories."""

    prompts: tuple[Judged, ...]
    broad: dict[str, float]
    detailed: dict[str, float]

    def overall(self) -> Interval:
        """The mean over prompts with its bootstrap interval. Raises `EvaluationError` for a single prompt."""
        if len(self.prompts) < 2:
            raise EvaluationError(f"an interval needs at least 2 prompts, got {len(self.prompts)}")
        return bootstrap([prompt.mean for prompt in self.prompts])


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


def read_answers(file: Path) -> dict[tuple[str, int, int], str]:
    """Answers by item, image and question, in lower case. Raises `EvaluationError`."""
    found = {}
    for number, row in enumerate(_rows(file, COLUMNS), start=2):
        try:
            key = row["item"], int(row["image"]), int(row["question"])
        except ValueError as error:
            raise EvaluationError(f"{file}:{number}: image and question are whole numbers: {error}") from error
        found[key] = row["answer"].strip().lower()
    return found


def ask(grids: Path, questions: Sequence[Question], viewer: Viewer, file: Path, *, progress: Progress | None = None) -> None:
    """Ask `viewer` what `file` does not answer yet, and add its answers there, a picture's at a time."""
    known = read_answers(file) if file.is_file() else {}
    texts = _by_item(questions)
    paths = {path.stem: path for path in find_images(grids)}
    _check_grids(grids, paths, texts)
    todo = [
        (item, image) for item in paths for image in range(PICTURES)
        if any((item, image, question.number) not in known for question in texts[item])
    ]  # fmt: skip
    with file.open("a", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        if not known:
            writer.writerow(COLUMNS)
        for done, (item, image) in enumerate(todo, start=1):
            picture = quarter(open_image(paths[item]), image)
            new = [question for question in texts[item] if (item, image, question.number) not in known]
            writer.writerows([(item, image, question.number, viewer(picture, question.text)) for question in new])
            out.flush()
            if progress is not None:
                progress(done, len(todo), "asking about pictures")


def score(questions: Sequence[Question], answers: Answers, mode: Mode = "fixed") -> DpgResult:
    """The scores of all items that have answers. Raises `EvaluationError` if an answer of one of these is missing."""
    items = _by_item(questions[1:] if mode == "official" else questions)
    answered = {item for item, _, _ in answers}
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


def read_texts(folder: Path) -> dict[str, str]:
    """The prompts of a folder by item, in order of name. Raises `EvaluationError` if there is none."""
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise EvaluationError(f"{folder} holds no prompts ITEM.txt")
    return {file.stem: file.read_text(encoding="utf-8").strip() for file in files}


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


def _by_item(questions: Sequence[Question]) -> dict[str, list[Question]]:
    items: dict[str, list[Question]] = {}
    for question in questions:
        items.setdefault(question.item, []).append(question)
    return items


def _check_grids(grids: Path, paths: Mapping[str, Path], texts: Mapping[str, object]) -> None:
    strange = next((path for item, path in paths.items() if item not in texts), None)
    if strange is not None:
        raise EvaluationError(f"there are no questions to {strange}; grids in {grids} are called as their item, ITEM.png")


def _answer(answers: Answers, item: str, image: int, question: Question) -> str:
    key = (item, image, question.number)
    if key not in answers:
        raise EvaluationError(f"question {question.number} about picture {image} of {item} has no answer")
    return answers[key]


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
