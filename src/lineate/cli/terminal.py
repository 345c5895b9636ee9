"""What a user sees on the terminal: a status line and a progress bar while it works (stderr), tables when it is done (stdout)."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from lineate.report import words

if TYPE_CHECKING:
    from lineate.convert import Conversion
    from lineate.evaluate.tally import Comparison, Tally
    from lineate.evaluate.top1 import Paired, Top1
    from lineate.report.run import Accuracy, Run
    from lineate.report.run import Interval as Shown
    from lineate.report.run import Paired as Compared
    from lineate.statistics import Interval
    from lineate.train.config import TrainConfig

LOG_SECONDS = 60.0


class Screen:
    """Status lines and one progress bar with the time left, on stderr; a line every `LOG_SECONDS` where that is no terminal."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, emoji=False)
        self.bar: Progress | None = None
        self.task: TaskID
        self.began: tuple[int, float] | None = None  # the first step seen, and when; without a terminal
        self.told = 0.0

    def say(self, text: str) -> None:
        """Show a line."""
        self.console.print(text, markup=False, soft_wrap=True)

    def progress(self, done: int, total: int, what: str) -> None:
        """Move the bar; it comes with the first step and goes with the last."""
        if not self.console.is_terminal:
            self._log(done, total, what)
            return
        if self.bar is None:
            left = TimeRemainingColumn(compact=True)
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), left, TextColumn("left"))
            self.bar = Progress(*columns, console=self.console, refresh_per_second=4, transient=True)
            self.task = self.bar.add_task(what, total=total)
            self.bar.start()
        self.bar.update(self.task, completed=done, description=what)
        if done >= total:
            self.close()

    def _log(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        if self.began is None:
            self.began, self.told = (done, now), now
        first, began = self.began
        if now - self.told >= LOG_SECONDS and done > first:
            left = timedelta(seconds=round((now - began) / (done - first) * (total - done)))
            self.say(f"{what}: {done} of {total}, {left} left")
            self.told = now
        if done >= total:
            self.began = None

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


@contextmanager
def screen() -> Iterator[Screen]:
    """A screen whose bar is gone afterwards, whatever happened."""
    shown = Screen()
    try:
        yield shown
    finally:
        shown.close()


def show_conversions(conversions: Mapping[str, Conversion]) -> None:
    """A row a conversion: its name and what it is."""
    table = Table("preset", "what it is", show_lines=True)
    for name, conversion in conversions.items():
        table.add_row(name, escape(_words(conversion)))
    Console(highlight=False).print(table)


def show_recipes(recipes: Mapping[str, Callable[[], TrainConfig]]) -> None:
    """A row a recipe: its name, what it is, and its main numbers under the names that --set train.NAME=VALUE takes."""
    table = Table("recipe", "what it is", show_lines=True)
    for name, make in recipes.items():
        config = make()
        length = "epochs" if config.steps is None else "steps"
        main = ("protocol", length, "batch", "lr", "lr_base_size", "min_lr", "new_lr_multiplier", "weight_decay", "ema")
        fields = ", ".join(f"{key}={value}" for key in main if (value := getattr(config, key)) is not None)
        table.add_row(name, escape(f"{(inspect.getdoc(make) or name).splitlines()[0]}\n{fields}"))
    Console(highlight=False).print(table)


def _words(conversion: Conversion) -> str:
    """A conversion in words, its fields under the names that --set takes."""
    from lineate.mixers import MIXERS

    mixer = conversion.mixer.model_dump()
    kind = mixer.pop("name")
    name = (inspect.getdoc(MIXERS[kind]) or kind).partition("\n")[0]
    fields = {f"mixer.{key}": value for key, value in mixer.items()}
    fields |= {"key_norm": conversion.key_norm, "locality": conversion.locality}
    if conversion.neighborhood is not None:
        fields |= {f"neighborhood.{key}": value for key, value in conversion.neighborhood.model_dump().items()}
    return f"{name}\n" + ", ".join(f"{key}={value}" for key, value in fields.items())


def show(run: Run) -> None:
    """Fidelity before and after, latency, and where the two models cross; accuracy of both where one was trained."""
    before, after = run.results.fidelity_before, run.results.fidelity
    names = {"patch_cosine": "patch tokens", "class_cosine": "class token", "pooled_cosine": "mean of patches"}
    title = f"{run.source}, {words.counted(after.images, 'held-out image')}"
    table = Table("cosine to the original", "before calibration", "after", title=title)
    for name, shown in names.items():
        if getattr(after, name) is not None:
            table.add_row(shown, words.fixed(getattr(before, name) if before else None), words.fixed(getattr(after, name)))
    console = Console(highlight=False)
    console.print(table)
    if run.results.cost is not None:
        show_cost(run.results.cost)
    if (held_out := run.results.held_out) is not None:
        show_accuracy({"original": held_out.original, "trained": held_out.converted}, held_out)
    typer.echo(words.headline(run)[-1].replace(words.NBSP, " "))


def show_cost(cost: Any) -> None:
    """A row a size: latency of both models, speed-up, multiply-adds, memory; then where they cross."""
    columns = ("px", "original ms", "converted ms", "speed-up", "GMACs", "peak MiB")
    table = Table(*columns, title=f"Latency on {cost.device}")
    for row in cost.rows:
        table.add_row(
            f"{row.height}×{row.width}", words.number(row.original_ms), words.number(row.converted_ms), f"{row.speedup:.2f}×",
            f"{words.number(row.original_gmacs)} → {words.number(row.converted_gmacs)}",
            f"{words.number(row.original_peak_mib)} → {words.number(row.converted_peak_mib)}",
        )  # fmt: skip
    Console(highlight=False).print(table)
    typer.echo(words.sentence(cost.crossover_note))


def show_accuracy(models: Mapping[str, Top1 | Accuracy], paired: Paired | Compared | None) -> None:
    """A row a model: top-1, top-5 and cross-entropy with 95 % intervals; then how two models compare."""
    images = next(iter(models.values())).images
    table = Table("model", "top-1 %", "top-5 %", "loss", title=f"{words.counted(images, 'image')}, 95 % intervals")
    for name, figures in models.items():
        table.add_row(escape(name), _share(figures.top1), _share(figures.top5), f"{figures.loss:.4f}")
    Console(highlight=False).print(table)
    if paired is not None:
        agreement = f"Same prediction on {_share(paired.agreement)} %; right" if paired.agreement is not None else "Right"
        typer.echo(
            f"{agreement} in the original only: {paired.only_original}, "
            f"here only: {paired.only_converted}; McNemar's exact p = {paired.p:.3g}"
        )


def show_scores(title: str, tallies: Sequence[Tally], comparison: Comparison | None) -> None:
    """A row a tag, and overall: scores with 95 % intervals; of two models also the difference and its p."""
    of = tallies[0]
    columns = ("score %", "against %", "difference", "p") if comparison is not None else ("score %",)
    title = f"{title}: {words.counted(of.pictures, 'picture')} of {words.counted(of.prompts, 'prompt')}, 95 % intervals"
    table = Table("", *columns, title=escape(title))
    for tag in (*(of.tags if len(of.tags) > 1 else ()), None):
        cells = [_share(found.overall if tag is None else found.tags[tag]) for found in tallies]
        if comparison is not None:
            difference = comparison.overall if tag is None else comparison.tags[tag]
            cells += [_share(difference.value), f"{difference.p:.3g}"]
        table.add_row("overall" if tag is None else escape(tag), *cells)
    Console(highlight=False, emoji=False).print(table)  # a folder may be called hf:eyes:


def _share(share: Interval | Shown | None) -> str:
    """A share of one and its interval, in per cent."""
    return "–" if share is None else f"{100 * share.value:.2f} ({100 * share.low:.2f} to {100 * share.high:.2f})"
