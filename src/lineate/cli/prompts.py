"""`lineate generate --prompt` and `--prompts`: pictures from texts, laid out as GenEval's, as one picture, or both."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from lineate.cli.options import parse_size, place_to_draw
from lineate.cli.terminal import screen


def draw_prompts(
    source: str,
    texts: Sequence[str],
    file: Path | None,
    *,
    out: Path | None,
    grid: Path | None,
    images: int,
    size: str | None,
    batch: int,
    device: str,
    precision: str | None,
    **asked: Any,
) -> None:
    """Draw every text, or every prompt of the file, `images` times; `asked` are the fields of `PromptSampling` that were said."""
    from lineate import runs
    from lineate.generation.classes import grid as together
    from lineate.generation.prompted import PromptSampling, generate_prompts, plain_prompts, prompts_in
    from lineate.text2image.pipelines import load_pipeline

    prompts = plain_prompts(texts) if file is None else prompts_in(file)
    said = {name: value for name, value in asked.items() if value is not None}
    sampling = PromptSampling.model_validate(said | {"size": parse_size(size)})
    place, shared, first = place_to_draw(device, out)
    with screen() as shown, tempfile.TemporaryDirectory() as scratch:
        pipe = load_pipeline(source, runs.find_precision(precision or ("bf16" if place.type == "cuda" else "fp32"))).to(place)
        files = generate_prompts(
            pipe, prompts, out or Path(scratch), sampling, images=images, batch=batch, accelerator=shared,
            progress=shown.progress if first else None,
        )  # fmt: skip
        if grid is not None and first:
            grid.parent.mkdir(parents=True, exist_ok=True)
            together(files, images).save(grid)
    if first:
        typer.echo("; ".join(f"{what}: {path}" for what, path in (("pictures", out), ("grid", grid)) if path is not None))
