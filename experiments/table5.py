"""Table 5: T⁵ against other linear-time attentions at the same budget.

python experiments/table5.py --scale small --data ../shared/data/cifar10
python experiments/table5.py --scale full      prints the commands at the paper's size: ImageNet, DeiT-T, 30 epochs a row
"""

from harness import Row, Run, Table, main

TABLE = Table(
    "table5",
    "Table 5: top-1 by method, same budget",
    ("FT", "calibrated, then FT"),
    (
        Row("T⁵", (71.19, None), (Run("t5-paper"), Run("t5-paper", calibrated=True))),
        Row("Linear", (63.30, None), (Run("linear"), None)),
        Row("LiT (inherits the MLPs alone)", (69.52, None), (Run("lit"), None)),
        Row("CLEAR", (68.66, None), (Run("clear"), None), "1.11G"),
        Row("Hedgehog, unstabilised", ("NaN", None), (Run("hedgehog", ("mixer.feature=exp",)), None)),
        Row("Hedgehog, stable", (None, None), (Run("hedgehog"), Run("hedgehog", calibrated=True))),
    ),
    "Calibrated are those that have something to fit towards the host's attention.",
    against="T⁵",
)

if __name__ == "__main__":
    main(TABLE)
