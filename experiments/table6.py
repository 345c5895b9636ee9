"""Table 6: class-conditional generation at 256 px, every attention replaced or half of them.

python experiments/table6.py --scale small --data ../shared/data/cifar10 --threads 1
python experiments/table6.py --scale full      prints the commands at the paper's size: DiT-XL/2, ImageNet, 50,000 pictures a row

The small scale (generation.py) tunes each for 0.57 %, 2 % and 10 % of the host's steps; the paper's DiT⁵ has 0.57 %, LiT 20 %.
The rate is constant, as the paper's; the host ended at a small one, so that this also undoes some of its training. Four rows,
which are not the paper's, let it fall instead.
Quoted by the paper from elsewhere, FID / IS: DiM-H 2.40, DiffuSSM-XL-G 2.28 / 259.1, ADM 10.94 / 101.0, LDM-4-G 3.60 / 247.7,
SimpleDiff U-ViT 2.77 / 211.8, SiT-XL 2.06 / 277.5.
"""

from generation import budget, of_epochs, scale
from harness import Row, Run, Table, main

BUDGETS = {"0.57 %": 0.0057, "2 %": 0.02, "10 %": 0.1}
HALF = 'sites=["blocks.*[13579].attn"]'
FALLING = "train.min_lr=1e-5"  # a cosine down to the host's last rate, where the paper's is constant


def falling(label: str, preset: str, calibrated: bool = False) -> Row:
    """The last budget with a falling rate."""
    run = Run(preset, (FALLING, budget(BUDGETS["10 %"])), calibrated=calibrated)
    return Row(f"{label}, falling rate", (None,) * 4, (None, None, None, run))


def row(label: str, paper: str | None, preset: str, *fields: str, calibrated: bool = False) -> Row:
    """A conversion at every budget."""
    runs = (Run(preset, (*fields, budget(share)), calibrated=calibrated) for share in BUDGETS.values())
    return Row(label, (paper, *[None] * len(BUDGETS)), (None, *runs))


TABLE = Table(
    "table6",
    "Table 6: FID / IS in the paper; KID·1000 / FD on 64 components here",
    ("FID / IS", *BUDGETS),
    (
        row("Softmax, tuned alike", "2.27 / 278.2", "softmax"),
        row("DiT⁵", "2.48 / 267.9", "dit5"),
        row("DiT⁵, calibrated first", None, "dit5", calibrated=True),
        row("Linear", None, "linear"),
        row("LiT (inherits the MLPs alone)", "2.32 / 265.2", "lit"),
        row("Hyena-X, half of the blocks", "2.74 / 273.30", "hyena-x", HALF),
        row("Hyena-Y, half of the blocks", "2.72 / 273.37", "hyena-y", HALF),
        row("Hyena-X", None, "hyena-x"),
        row("Hyena-Y", None, "hyena-y"),
        row("Sliding windows, half of the blocks", None, "swa", HALF),
        falling("Softmax", "softmax"),
        falling("DiT⁵", "dit5"),
        falling("DiT⁵, calibrated first", "dit5", calibrated=True),
        falling("Linear", "linear"),
        Row("The host as it is", (None,) * 4, (None, Run("softmax", tune=None), None, None)),
    ),
    "500 pictures against 2,000 test pictures, 20 Euler steps, no guidance; lower is better. Not comparable with FID.",
    scale("dit:DiT-XL/2@DiT-XL-2-256x256.pt", of_epochs(1400), 1.5),
)

if __name__ == "__main__":
    main(TABLE)
