"""Table 1: how much of softmax's accuracy each linear-time operator recovers, everything inherited, no locality yet.

    python experiments/table1.py --scale small --data ../shared/data/cifar10
    python experiments/table1.py --scale full      prints the commands at the paper's size: ImageNet, DeiT-T, 30 epochs a row

Freeze trains the new parameters alone, FT everything. At full size a row is 38 million images through a DeiT-T; the
commands come with an estimate of the time, since none was measured. All linear-cost rows use the key instance norm.
"""

from harness import Row, Run, Table, main

TTT = {"TTT-1Layer-Gate": "1layer-gate", "TTT-2Layer": "2layer", "TTT-3Layer": "3layer", "TTT-SwiGLU": "swiglu"}
PAPER = {"1layer-gate": (61.95, 67.59), "2layer": (65.98, 68.14), "3layer": (67.09, 68.93), "swiglu": (67.33, 69.25)}
SIZES = {"1layer-gate": "+0.3M, 1.25G", "2layer": "+0.3M, 1.25G", "3layer": "+0.5M, 1.37G", "swiglu": "+0.5M, 1.34G"}


def ttt(inner: str, tune: str) -> Run:
    """The paper's TTT with one of its inner models and no convolutions."""
    return Run("t5-paper", (f"mixer.inner={inner}", "locality=none"), tune)


TABLE = Table(
    "table1",
    "Table 1: top-1 after inheriting, by operator",
    ("Freeze", "FT"),
    (
        Row("Softmax", (None, 72.05), (None, Run("softmax")), "1.25G"),
        Row("Linear (ELU+1)", (3.71, 63.30), (Run("linear", tune=None), Run("linear")), "+0, 1.13G"),
        Row("Linear + ProjQK", (24.39, 66.23), (Run("projqk", tune="freeze"), Run("projqk")), "+0.3M, 1.19G"),
        *(Row(label, PAPER[inner], (ttt(inner, "freeze"), ttt(inner, "ft")), SIZES[inner]) for label, inner in TTT.items()),
    ),
    "The paper's softmax row is the baseline itself; ours is tuned as long as the others. Linear attention has nothing to train "
    "under Freeze, so that cell is the conversion as it is.",
    against="TTT-2Layer",
)

if __name__ == "__main__":
    main(TABLE)
