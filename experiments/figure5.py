"""Figure 5, its DeiT half: multiply-adds against resolution, softmax and T⁵, counted on fake tensors (seconds, any machine).

    python experiments/figure5.py          writes results/figure5.json and docs/pictures/figure5.png

A multiply-add counts one, as in the paper. Its axes carry no figures that could be read off exactly; at 224 px it has
DeiT-T 1.25G, T⁵-T 1.34G, T⁵⁺-T 1.39G, DeiT-S 4.59G, T⁵-S 4.77G, T⁵⁺-S 4.86G (Table 4). DiT's half belongs to generation.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import timm
import torch

import lineate
from lineate import runs
from lineate.evaluate.cost import count_operator_macs

OUT = Path(__file__).parent / "results" / "figure5.json"
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "figure5.png"
HOSTS = {"T": "deit_tiny_patch16_224", "S": "deit_small_patch16_224"}
PRESETS = {"DeiT": "softmax", "T⁵": "t5", "T⁵⁺": "t5-plus"}
SIZES = (224, 384, 512, 768, 1024, 1536, 2048)


def gmacs(host: str, preset: str) -> dict[str, float]:
    """GMACs of one square picture by its side, through the host with its class token dropped, converted by `preset`."""
    options = {"class_token": False, "global_pool": "avg", "fc_norm": False, "dynamic_img_size": True}
    model = lineate.convert(timm.create_model(host, pretrained=False, **options).eval(), preset)
    return {str(size): count_operator_macs(model, torch.empty(1, 3, size, size)) for size in SIZES}


def main() -> None:
    """Count, write the JSON and draw."""
    counts = {f"{name}-{letter}": gmacs(host, preset) for letter, host in HOSTS.items() for name, preset in PRESETS.items()}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    runs.write_json(OUT, {"unit": "GMACs", "counts": counts, "environment": runs.environment(torch.device("cpu"))})
    draw(counts)
    print(json.dumps(counts, indent=1, ensure_ascii=False))


def draw(counts: dict[str, dict[str, float]]) -> None:
    """One panel a host size: GMACs against the side of the picture."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, letter in zip(panels, HOSTS, strict=True):
        for name in PRESETS:
            label = f"{name}-{letter}"
            axis.plot(SIZES, [counts[label][str(size)] for size in SIZES], marker="o", markersize=3, label=label)
        axis.set(xlabel="side of the picture, px", ylabel="multiply-adds, 10⁹", xticks=SIZES[::2])
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=150)


if __name__ == "__main__":
    main()
