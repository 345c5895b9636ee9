"""Figure 5: multiply-adds against resolution, DeiT and DiT with softmax and with T⁵, counted on fake tensors (any machine).

    python experiments/figure5.py          writes results/figure5.json and docs/pictures/figure5.png

A multiply-add counts one, as in the paper. Its axes carry no figures that could be read off exactly; at 224 px it has
DeiT-T 1.25G, T⁵-T 1.34G, T⁵⁺-T 1.39G, DeiT-S 4.59G, T⁵-S 4.77G, T⁵⁺-S 4.86G (Table 4). DiT's pictures are eight times as wide and
high as its latents; the autoencoder is not counted.
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
from lineate.models.dit import DIT_MODELS, DiT

OUT = Path(__file__).parent / "results" / "figure5.json"
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "figure5.png"
HOSTS = {"T": "deit_tiny_patch16_224", "S": "deit_small_patch16_224"}
PRESETS = {"DeiT": "softmax", "T⁵": "t5", "T⁵⁺": "t5-plus"}
DITS = {"DiT": "softmax", "DiT⁵": "dit5"}
SIZES = (224, 384, 512, 768, 1024, 1536, 2048)
DIT_SIZES = (256, 384, 512, 768, 1024, 1536, 2048)


def gmacs(host: str, preset: str) -> dict[str, float]:
    """GMACs of one square picture by its side, through the host with its class token dropped, converted by `preset`."""
    options = {"class_token": False, "global_pool": "avg", "fc_norm": False, "dynamic_img_size": True}
    model = lineate.convert(timm.create_model(host, pretrained=False, **options).eval(), preset)
    return {str(size): count_operator_macs(model, torch.empty(1, 3, size, size)) for size in SIZES}


def denoiser_gmacs(preset: str) -> dict[str, float]:
    """GMACs of one step of DiT-XL/2 on one picture by its side, converted by `preset`; all blocks are alike."""
    arguments = DIT_MODELS["DiT-XL/2"]
    short = [lineate.convert(DiT(**arguments | {"depth": depth}).eval(), preset) for depth in (1, 2)]
    of = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    counts = {}
    for px in DIT_SIZES:
        one, two = (count_operator_macs(model, torch.empty(1, 4, px // 8, px // 8), *of) for model in short)
        counts[str(px)] = one + (arguments["depth"] - 1) * (two - one)
    return counts


def main() -> None:
    """Count, write the JSON and draw."""
    counts = {f"{name}-{letter}": gmacs(host, preset) for letter, host in HOSTS.items() for name, preset in PRESETS.items()}
    counts |= {f"{name}-XL/2": denoiser_gmacs(preset) for name, preset in DITS.items()}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    runs.write_json(OUT, {"unit": "GMACs", "counts": counts, "environment": runs.environment(torch.device("cpu"))})
    draw(counts)
    print(json.dumps(counts, indent=1, ensure_ascii=False))


def draw(counts: dict[str, dict[str, float]]) -> None:
    """One panel a host: GMACs against the side of the picture."""
    figure, panels = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    hosts = {**dict.fromkeys(HOSTS, PRESETS), "XL/2": DITS}
    for axis, (letter, names) in zip(panels, hosts.items(), strict=True):
        for name in names:
            label = f"{name}-{letter}"
            axis.plot([int(size) for size in counts[label]], counts[label].values(), marker="o", markersize=3, label=label)
        axis.set(xlabel="side of the picture, px", ylabel="multiply-adds, 10⁹", xticks=SIZES[::2])
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=150)


if __name__ == "__main__":
    main()
