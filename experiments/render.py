"""docs/results.md: every table and figure of this folder beside the paper's figures, from the committed result files.

python experiments/render.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import figure6
import generation
import small
import starts
import table1
import table2
import table3
import table4
import table5
import table6
import table7
import table10
import table11
import table12
import tune
from harness import RESULTS, Table, markdown

from lineate.text2image.pipelines import STAND_IN
from lineate.text2image.shapes import held_out

OUT = Path(__file__).parents[1] / "docs" / "results.md"
TABLES = (table1.TABLE, table2.TABLE, table3.TABLE, table4.TABLE, table5.TABLE, table11.TABLE)
OURS = (tune.TABLE, starts.TABLE)
GENERATION = (table6.TABLE, table10.TABLE, table12.TABLE)


def read(file: Path) -> dict[str, Any] | None:
    """A result file, or None where there is none yet."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def host() -> Iterator[str]:
    """What the small scale is."""
    run = read(small.HOST / "run.json")
    yield "## The small scale"
    yield ""
    shape = "3 blocks, 48 channels, 2 heads of 24, patch 2 on 32×32 px (256 tokens), mean pooling, no class token"
    yield f"CIFAR-10 (50,000 training, 10,000 test images) and a ViT: {shape}."
    if run is None:
        yield "Its softmax baseline: not run."
        return
    top1, device = run["final"]["top1"], run["environment"]["device"]
    yield (
        f"Its softmax baseline, {run['train']['epochs']:g} epochs, has top-1 {100 * top1['value']:.2f} % "
        f"(Wilson {100 * top1['low']:.2f} to {100 * top1['high']:.2f}); {run['tuning']['seconds'] / 60:.0f} minutes on {device}. "
        "Every row is a conversion of this host, tuned for a tenth of its epochs at a tenth of its rate, the new "
        "parameters at 20 times that. A cell is a mean over seeds "
        "± half of Student's 95 % interval (seeds); of one seed, Wilson's. Where a column compares with a row, it gives the "
        "difference in points over the same images and seeds, with a 95 % interval over images. Parameters and multiply-adds are "
        "of DeiT-T at 224 px, ours counted without weights. The host is small and was trained briefly, and so were its "
        "conversions."
    )


def table(shown: Table) -> Iterator[str]:
    """A table with its title and note."""
    yield f"## {shown.title}"
    yield ""
    yield markdown(shown)
    if shown.note:
        yield f"\n{shown.note}"
    if shown is tune.TABLE:
        yield f"\n{tune.goal()}"
    yield f"\n`python experiments/{shown.name}.py`"


def denoiser() -> Iterator[str]:
    """What the small scale of generation is."""
    yield "## The small scale of generation"
    yield ""
    run = read(generation.HOST / "run.json")
    yield "A DiT of CIFAR-10's pixels: 4 blocks, 64 channels, 2 heads, patch 2 on 32×32 px (256 tokens), trained to a flow."
    if run is None:
        yield "Its softmax host: not run."
        return
    done = run["results"]["training"]
    yield (
        f"Its softmax host has seen {done['images']:,} pictures in {done['steps']:,} steps, {done['seconds'] / 60:.0f} minutes "
        f"on {run['environment']['device']}, shared with others. Every row is a conversion of it, tuned for a share of its "
        "steps, all alike; a cell is KID·1000 / FD on 64 principal components of EfficientNet-lite0, a mean over (seeds)."
    )


def grids() -> Iterator[str]:
    """The pictures that rows of the generation tables made, a column a class, the same noise in each."""
    shown = [run for table in GENERATION for run in table.every()]
    for run in dict.fromkeys(shown):
        if (file := RESULTS / "dit" / run.name / "seed0.png").is_file():
            yield f"\n{run.name}\n\n![pictures of ten classes](../{file.relative_to(OUT.parents[1])})"


def text_to_image() -> Iterator[str]:
    """Table 7: the paper's rows, and the stand-in's."""
    training = read(STAND_IN / "training.json")
    assert training is not None
    yield "\n## Table 7: text to image\n"
    yield table7.PAPER
    yield "\n`python experiments/table7.py --scale full` prints the commands of the column that is not run.\n"
    result, device = training["result"], training["environment"]["device"]
    held = sum(held_out(table7.drawn.WORLD, prompt) for prompt in table7.PROMPTS)
    yield (
        "In the small: the stand-in that ships with the package, a Stable Diffusion 3 of "
        f"{result['learning'] / 1e6:.1f}M parameters that draws shapes, {result['steps']:,} steps in "
        f"{result['seconds'] / 60:.0f} minutes on {device}. The share of pictures that are right, mean over six tags, "
        f"{table7.IMAGES} pictures of each of {len(table7.PROMPTS)} prompts, {held} of them held out of training; intervals by "
        "bootstrap over prompts. Where nothing else is said T⁵ is calibrated first. The stand-in seldom gets relations, numbers "
        "or two colours right, so these three tags say little.\n"
    )
    yield table7.markdown()
    if table7.PICTURE.is_file():
        labels = ", ".join(row.label for row in table7.SHOWN)
        yield f"\n![pictures of the same prompts and noise](pictures/{table7.PICTURE.name})"
        yield f"\nThe same prompts and noise, from above, not tuned: {labels}."
    yield "\n`python experiments/table7.py`"


def figures() -> Iterator[str]:
    """The figures that are there."""
    if shift := read(RESULTS.parent / "figure3.json"):
        yield "## Figure 3: key shift"
        yield ""
        yield "![key shift by site](pictures/figure3.png)"
        yield (
            f"\nMean over sites: {shift['mean']['pretrained']:.2f} pretrained, {shift['mean']['random']:.2f} at random, for the "
            f"embedded ViT-S/14 on {shift['images']} photographs; with one mean key over all photographs together "
            f"{shift['pooled']['pretrained']:.2f} and {shift['pooled']['random']:.2f}. The paper has about 0.5 and 0.07, of "
            "a ViT and 5,000 images that it does not name."
        )
    if maps := read(RESULTS.parent / "figure4.json"):
        yield "\n## Figure 4: implicit attention"
        yield ""
        yield "![implicit attention of one query](pictures/figure4.png)"
        yield (
            f"\nThe embedded ViT-S/14, both conversions calibrated for {maps['steps']} steps a site. Mean distance in patches "
            f"between a query and what it draws on, over {maps['queries']} queries of each of {maps['images']} held-out "
            "photographs; the paper shows maps alone:\n"
        )
        sites = list(next(iter(maps["mean_distance_patches"].values())))
        yield f"| | {' | '.join(sites)} |\n| --- |{' --- |' * len(sites)}"
        for name, found in maps["mean_distance_patches"].items():
            yield f"| {name} | {' | '.join(f'{found[site]:.2f}' for site in sites)} |"
    if read(RESULTS.parent / "figure5.json"):
        yield "\n## Figure 5: multiply-adds against resolution"
        yield ""
        yield "![multiply-adds against resolution](pictures/figure5.png)"
    if (found := read(RESULTS.parent / "figure6.json")) and figure6.PICTURE.is_file():
        measured = "not run: it takes a GPU" if isinstance(found["run_s"], str) else "measured"
        yield "\n## Figure 6: Stable Diffusion 3.5 Medium against resolution"
        yield ""
        yield "![multiply-adds and seconds against resolution](pictures/figure6.png)"
        yield f"\nMultiply-adds are counted on the real geometry; our latency is {measured}."
    if tune.PICTURE.is_file():
        yield "\n## Calibrate, then tune\n\n![top-1 against training images](pictures/tune.png)"


def main() -> None:
    """Write the page."""
    lines = [
        "# Results beside the paper's",
        "",
        "Written by `python experiments/render.py` from `experiments/results/`. The paper's figures are of ImageNet, 30 epochs,",
        "at full size; ours are of the small scale: only the order of rows can be compared.",
        "",
        *host(),
    ]
    for shown in (*TABLES, *OURS):
        lines += ["", *table(shown)]
    lines += ["", *denoiser()]
    for shown in GENERATION:
        lines += ["", *table(shown)]
    lines += [*grids(), *text_to_image(), "", *figures()]
    OUT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(OUT)


if __name__ == "__main__":
    main()
