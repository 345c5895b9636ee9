"""Table 5: T⁵ against other linear-time attentions at the same budget.

python experiments/table5.py --scale small --data ../shared/data/cifar10
python experiments/table5.py --scale full      prints the commands at the paper's size: ImageNet, DeiT-T, 30 epochs a row
"""

from harness import Row, Run, Table, main

TABLE = Table(
    "table5",
    "Table 5: top-1 by method, same budget",
    ("FT",),
    (
        Row("T⁵", (71.19,), (Run("t5-paper"),)),
        Row("Linear", (63.30,), (Run("linear"),)),
        Row("LiT (inherits the MLPs alone)", (69.52,), (Run("lit"),)),
        Row("CLEAR", (68.66,), (Run("clear"),), "1.11G"),
        Row("Hedgehog, unstabilised", ("NaN",), (Run("hedgehog", ("mixer.feature=exp",)),)),
        Row("Hedgehog, stable", (None,), (Run("hedgehog"),)),
    ),
    against="T⁵",
)

if __name__ == "__main__":
    main(TABLE)
