"""Figure 4: implicit attention of softmax, of TTT, and of TTT with convolutions on queries and keys, and how local each is.

    python experiments/figure4.py          the embedded ViT-S/14; calibrates two conversions first (minutes on a CPU)

The paper shows maps alone: softmax is local, TTT global, DWC-QK brings locality back. Here every site also gets a figure: the
mean distance, in patches, between a query and what it draws on, weighted by the implicit attention (equation 13), over a few
queries of each held-out photograph.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn

from lineate import runs
from lineate.analysis import implicit_attention
from lineate.convert import core_modules
from lineate.embedded import CALIBRATION_PHOTOS, HELD_OUT_PHOTOS, photographs
from lineate.images import centre_crop
from lineate.linearize import crops, fit, load_pair
from lineate.pictures import draw_attention, early_middle_late
from lineate.settings import read_settings

OUT = Path(__file__).parent / "results" / "figure4.json"
DOCS = Path(__file__).parents[1] / "docs"


def distance(weights: Tensor, query: int, side: int) -> float:
    """Mean distance in patches from the query to the tokens (side²) of a grid, weighted by `weights` (H, side²)."""
    index = torch.arange(side * side)
    rows, columns = index // side - query // side, index % side - query % side
    share = weights / weights.sum(-1, keepdim=True)
    return float((share * (rows.square() + columns.square()).sqrt()).sum(-1).mean())


def main() -> None:
    """Calibrate both conversions, measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="calibration steps a site")
    options = parser.parse_args()
    models: dict[str, nn.Module] = {}
    for name, locality in {"TTT": "none", "TTT + DWC-QK": "dwc-qk"}.items():
        fields = [f"locality={locality}", f"calibration.steps={options.steps}"]
        settings = read_settings(preset_name="t5", assignments=fields)
        pair = load_pair("embedded", settings.conversion)
        fit(pair.converted, crops(pair.source, photographs(CALIBRATION_PHOTOS), settings.calibration, 0), settings.calibration,
            lambda *_: None)  # fmt: skip
        models |= {"softmax": pair.original, name: pair.converted}
    source, photos = pair.source, photographs(HELD_OUT_PHOTOS)
    sites = list(core_modules(pair.converted))
    side, prefix = source.image_size // source.multiple, source.model.num_prefix_tokens
    queries = [row * side + column for row, column in product((side // 4, side // 2, 3 * side // 4), repeat=2)]
    images = [centre_crop(path, source.image_size, source.mean, source.std) for path in photos]
    figures = {
        name: {
            site: mean(
                distance(implicit_attention(model, image, site, prefix + query)[:, prefix:], query, side)
                for image, query in product(images, queries)
            )
            for site in early_middle_late(sites)
        }
        for name, model in models.items()
    }
    drawn = draw_attention(DOCS, source, models, early_middle_late(sites), photos[0])
    (DOCS / drawn.file).rename(DOCS / "pictures" / "figure4.png")
    runs.write_json(OUT, {"mean_distance_patches": figures, "grid": [side, side], "queries": len(queries), "images": len(images),
                          "steps": options.steps, "environment": runs.environment(torch.device("cpu"))})  # fmt: skip
    print(figures)


if __name__ == "__main__":
    main()
