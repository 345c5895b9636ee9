"""Table 11: the learning rate of the new parameters, as a multiple of the inherited ones'.

    python experiments/table11.py --scale small --data ../shared/data/cifar10
    python experiments/table11.py --scale full     prints the commands at the paper's size: ImageNet, DeiT-T, 30 epochs a row

The paper's DiT-S/2 column (1× 68.84, 2× 68.52 FID) belongs to class-conditional generation.
"""

from harness import Row, Run, Table, main

PAPER = {1: 68.14, 10: 70.71, 20: 71.19, 30: 71.29, 40: 71.36, 50: 71.31, 100: 71.35}


def run(multiplier: int) -> Run:
    """The paper's T⁵ at this rate; its own is not set, so that other tables share the run."""
    return Run("t5-paper", () if multiplier == 20 else (f"train.new_lr_multiplier={multiplier}",))


TABLE = Table(
    "table11",
    "Table 11: top-1 by learning-rate multiplier of the new parameters",
    ("FT",),
    tuple(Row(f"{multiplier}×", (paper,), (run(multiplier),)) for multiplier, paper in PAPER.items()),
    against="20×",
)

if __name__ == "__main__":
    main(TABLE)
