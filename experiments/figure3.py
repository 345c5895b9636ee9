"""Figure 3, its bottom half: how far off-centre the keys of a pretrained model are, against one at random.

    python experiments/figure3.py                                     the embedded ViT-S/14 and the photographs of Python packages
    python experiments/figure3.py --source timm:deit_tiny_patch16_224 --images DIR

The paper has about 0.5 for a pretrained ViT (5K images, N = 196) and 0.07 at random initialisation. Key shift is equation 11:
0 centred, 1 one big shift; a figure is a mean over sites, and the picture shows every site. The paper does not say whether its
mean key is of a picture or of all; here each picture has its own, and `pooled` has one of all.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
import torch
from torch import nn

from lineate import runs
from lineate.analysis import key_shift
from lineate.embedded import CALIBRATION_PHOTOS, HELD_OUT_PHOTOS, photographs
from lineate.images import centre_crop, find_images
from lineate.sources import load_source

OUT = Path(__file__).parent / "results" / "figure3.json"
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "figure3.png"


def redrawn(model: nn.Module) -> nn.Module:
    """A copy with timm's own random initialisation."""
    torch.manual_seed(0)
    copied = copy.deepcopy(model)
    copied.init_weights()  # type: ignore[operator]
    return copied


def main() -> None:
    """Measure both models, write the JSON and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default="embedded")
    parser.add_argument("--images", type=Path)
    options = parser.parse_args()
    source = load_source(options.source)
    paths = find_images(options.images) if options.images else photographs(CALIBRATION_PHOTOS + HELD_OUT_PHOTOS)
    images = [centre_crop(path, source.image_size, source.mean, source.std) for path in paths]
    models = {"pretrained": source.model, "random": redrawn(source.model)}
    shift = {name: key_shift(model, images) for name, model in models.items()}
    pooled = {name: mean(key_shift(model, images, pooled=True).values()) for name, model in models.items()}
    summary = {name: mean(sites.values()) for name, sites in shift.items()}
    environment = runs.environment(torch.device("cpu"))
    OUT.parent.mkdir(parents=True, exist_ok=True)
    runs.write_json(
        OUT,
        {
            "source": options.source,
            "images": len(images),
            "mean": summary,
            "pooled": pooled,
            "sites": shift,
            "environment": environment,
        },
    )
    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for name, sites in shift.items():
        axis.plot(range(len(sites)), list(sites.values()), marker="o", markersize=4, label=f"{name}, mean {summary[name]:.2f}")
    axis.set(xlabel="attention site", ylabel="key shift", ylim=(0, 1), xticks=range(len(shift["random"])))
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=150)
    print(summary, pooled)


if __name__ == "__main__":
    main()
