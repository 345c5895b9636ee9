"""`lineate prompts`, `geneval`, `dpg` and `shapes`: files of prompts, and scores of the pictures that were made from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lineate.cli.options import Device, OutFile, Overwrite
from lineate.cli.terminal import screen, show_scores

if TYPE_CHECKING:
    from lineate.evaluate.dpg import DpgResult, Mode
    from lineate.evaluate.geneval import Detections
    from lineate.evaluate.tally import Judged

_MADE = "Pictures by prompt, as `lineate generate --prompts` lays them out"
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help=f"{_MADE}.")]
Against = Annotated[Path | None, typer.Option(metavar="FOLDER", help="Another model's, to compare prompt by prompt.")]
Hub = "a name on the hub or a directory"


def prompts(
    name: Annotated[str, typer.Argument(metavar="NAME", help="geneval, grid, free32, free64, or DPG-Bench's folder of prompts.")],
    file: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="Where to write them.")],
    overwrite: Overwrite = False,
) -> None:
    """Write a benchmark's prompts, for `lineate generate --prompts`; grid, free32 and free64 are worlds of drawn shapes."""
    from lineate import runs
    from lineate.evaluate.dpg import read_texts
    from lineate.evaluate.geneval_prompts import geneval_prompts
    from lineate.text2image.prompts import PromptError, write_prompts
    from lineate.text2image.shapes import WORLDS, benchmark

    runs.check_file(file, overwrite)
    if name == "geneval":
        found = geneval_prompts()
    elif name in WORLDS:
        found = benchmark(WORLDS[name])
    elif Path(name).is_dir():
        found = read_texts(Path(name))
    else:
        raise PromptError(f"unknown prompts {name!r}; choices: geneval, {', '.join(WORLDS)}, a folder of ITEM.txt")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_prompts(found, file)
    typer.echo(f"prompts: {file} ({len(found)})")


def shapes(
    folder: Folder,
    world: Annotated[str, typer.Option(help="The world that the prompts are of: grid, free32 or free64.")] = "grid",
    part: Annotated[str, typer.Option(help="Prompts to score: all, or those seen or held-out in training.")] = "all",
    against: Against = None, out: OutFile = None, overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """Score pictures of drawn shapes, by rule and without a network: correct, and strictly so."""
    from lineate import runs
    from lineate.evaluate.shapes import score
    from lineate.text2image.shapes import find_world

    runs.check_file(out, overwrite)
    _check_same(folder, against)
    of = find_world(world)
    scores = [score(path, of, part) for path in (folder, against) if path is not None]
    figures = {
        name: _show(f"drawn shapes, {world}, {part}: {name}", [pair[which] for pair in scores])
        for which, name in enumerate(("correct", "strict"))
    }
    _write(out, {"benchmark": f"shapes {world}", "part": part, "folder": str(folder), "against": _text(against)} | figures)


def geneval(
    folder: Folder,
    detections: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="What was found; written if not there (default: in FOLDER).")
    ] = None,
    detector: Annotated[str | None, typer.Option(metavar="NAME", help=f"A Mask2Former of COCO's classes: {Hub}.")] = None,
    clip: Annotated[str | None, typer.Option(metavar="NAME", help=f"The CLIP that tells colours: {Hub}.")] = None,
    against: Against = None,
    results: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Write a line a picture, for the published summary_scores.py.")
    ] = None,
    out: OutFile = None, overwrite: Overwrite = False, device: Device = "cpu",
) -> None:  # fmt: skip
    """GenEval: find objects and colours in the pictures, once, and score them by its rules."""
    from lineate import runs
    from lineate.evaluate import EvaluationError
    from lineate.evaluate.geneval import DETECTIONS, judged, score, write_results

    for file in (out, results):
        runs.check_file(file, overwrite)
    place = runs.find_device(device)
    _check_same(folder, against)
    files = [(folder, detections or folder / DETECTIONS)]
    files += [(against, against / DETECTIONS)] if against is not None else []
    found = [_look(path, file, detector, clip, place) for path, file in files]
    names = sorted({one.detector for of in found for one in of.values()})
    if len(names) > 1:
        raise EvaluationError(f"what {' and '.join(names)} found cannot be compared")
    verdicts = [score(path, of) for (path, _), of in zip(files, found, strict=True)]
    figures = _show(f"GenEval, detector={names[0]}", [judged(of) for of in verdicts])
    if results is not None:
        write_results(folder, verdicts[0], results)
        typer.echo(f"results: {results}")
    about = {"benchmark": "geneval", "detector": names[0], "folder": str(folder), "against": _text(against)}
    _write(out, about | {"correct": figures})


def dpg(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help=f"{_MADE}, or grids of 2×2, ITEM.png.")],
    questions: Annotated[Path, typer.Option(metavar="FILE.csv", help="DPG-Bench's graph of questions.")],
    answers: Annotated[
        Path | None, typer.Option(metavar="FILE.csv", help="The answers; written if not there (default: in FOLDER).")
    ] = None,
    vqa: Annotated[str | None, typer.Option(metavar="NAME", help=f"The ViLT that answers: {Hub}.")] = None,
    official: Annotated[bool, typer.Option("--official", help="Compute as the published script does, slips and all.")] = False,
    against: Against = None,
    grids: Annotated[Path | None, typer.Option(metavar="DIR", help="Write 2×2 grids there, for the published script.")] = None,
    out: OutFile = None, overwrite: Overwrite = False, device: Device = "cpu",
) -> None:  # fmt: skip
    """DPG-Bench: ask the questions about the pictures, once, and score the answers by their graph."""
    from lineate import runs
    from lineate.evaluate import EvaluationError
    from lineate.evaluate.dpg import ANSWERS, read_answers, read_questions, score, write_grids

    runs.check_file(out, overwrite)
    place = runs.find_device(device)
    graph = read_questions(questions)
    files = [(folder, answers or folder / ANSWERS)] + ([(against, against / ANSWERS)] if against is not None else [])
    for path, file in files:
        _answer(path, file, graph, vqa, place)
    given = [read_answers(file) for _, file in files]
    if len({of.viewer for of in given}) > 1:
        raise EvaluationError(f"the answers of {' and '.join(of.viewer for of in given)} cannot be compared")
    mode: Mode = "official" if official else "fixed"
    found: list[DpgResult] = [score(graph, of, mode) for of in given]
    figures = _show(f"DPG-Bench, {mode}, answers of {given[0].viewer}", [of.prompts for of in found])
    for name, value in found[0].broad.items():
        typer.echo(f"{name}: {100 * value:.2f}")
    if grids is not None:
        write_grids(folder, grids)
        typer.echo(f"grids: {grids}")
    about = {"benchmark": "dpg", "mode": mode, "viewer": given[0].viewer, "folder": str(folder), "against": _text(against)}
    categories = {"broad": found[0].broad, "detailed": found[0].detailed}
    _write(out, about | {"scores": figures, "categories": categories})


def _look(folder: Path, file: Path, detector: str | None, clip: str | None, device: Any) -> dict[str, Detections]:
    """What `file` knows of a folder, after looking at the pictures that it does not know; models load only for that."""
    from lineate.evaluate.geneval import detect, read_detections, unseen

    known = read_detections(file) if file.is_file() else {}
    if not unseen(folder, known):
        return known
    file.parent.mkdir(parents=True, exist_ok=True)
    from lineate.evaluate.detectors import CLIP, MASK2FORMER, load_colors, load_detector

    with screen() as shown:
        shown.say(f"looking at the pictures in {folder}")
        eyes, colors = load_detector(detector or MASK2FORMER, device), load_colors(clip or CLIP, device)
        detect(folder, file, eyes, colors, progress=shown.progress)
    return read_detections(file)


def _answer(folder: Path, file: Path, graph: Any, vqa: str | None, device: Any) -> None:
    """Have the questions about a folder answered, where the file does not; the model loads only then."""
    from lineate.evaluate.dpg import ask, read_answers, read_pictures, unanswered

    if unanswered(read_pictures(folder), graph, read_answers(file) if file.is_file() else None):
        file.parent.mkdir(parents=True, exist_ok=True)
        from lineate.evaluate.vqa import VILT, load_viewer

        with screen() as shown:
            shown.say(f"asking about the pictures in {folder}")
            ask(folder, graph, load_viewer(vqa or VILT, device), file, progress=shown.progress)


def _check_same(folder: Path, against: Path | None) -> None:
    """Raise, before long work, unless both folders are of the same prompts."""
    from lineate.evaluate import EvaluationError
    from lineate.text2image.prompts import read_layout

    layout = [prompt for prompt, _ in read_layout(folder)]
    if against is not None and layout != [prompt for prompt, _ in read_layout(against)]:
        raise EvaluationError(f"{folder} and {against} are not of the same prompts; only these can be compared")


def _show(title: str, judged: Sequence[Sequence[Judged]]) -> dict[str, Any]:
    """Show the scores of one folder, or of two and how they differ; and give them for a file."""
    from lineate.evaluate.tally import compare, tally

    tallies = [tally(of) for of in judged]
    comparison = compare(judged[1], judged[0]) if len(judged) > 1 else None
    show_scores(title, tallies, comparison)
    found = {"scores": tallies[0].model_dump(mode="json"), "prompts": [of.model_dump(mode="json") for of in judged[0]]}
    if comparison is not None:
        found |= {"against": tallies[1].model_dump(mode="json"), "difference": comparison.model_dump(mode="json")}
    return found


def _write(out: Path | None, figures: dict[str, Any]) -> None:
    from lineate import runs

    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        runs.write_json(out, {"command": runs.command_line(), "created": runs.now()} | figures)
        typer.echo(f"figures: {out}")


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
