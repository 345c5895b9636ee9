"""Table 2: what the keys are normed by, with DWC-QK, everything tuned.

python experiments/table2.py --scale small --data ../shared/data/cifar10
python experiments/table2.py --scale full      prints the commands at the paper's size: ImageNet, DeiT-T, 30 epochs a row
"""

from harness import Row, Run, Table, main

NORMS = {
    "none": ("none", "0.37 (diverges)"),
    "RMSNorm": ("rms", 57.38),
    "LayerNorm": ("layer", 57.25),
    "InstanceNorm": ("instance", 71.19),
    "InstanceNorm without ÷std": ("instance-no-std", 71.15),
    "InstanceNorm without −mean": ("instance-no-mean", "51.43 (unstable)"),
}


def run(norm: str) -> Run:
    """The paper's T⁵ with this key norm; its own is not set, so that other tables share the run."""
    return Run("t5-paper", () if norm == "instance" else (f"key_norm={norm}",))


TABLE = Table(
    "table2",
    "Table 2: top-1 by key norm",
    ("FT",),
    tuple(Row(label, (paper,), (run(norm),)) for label, (norm, paper) in NORMS.items()),
    against="InstanceNorm",
)

if __name__ == "__main__":
    main(TABLE)
