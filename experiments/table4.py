"""Table 4: the models: DeiT, T⁵ and T⁵⁺.

    python experiments/table4.py --scale small --data ../shared/data/cifar10
    python experiments/table4.py --scale full      prints the commands at the paper's size: ImageNet, DeiT-T, 30 epochs a row

The paper has two sizes; give --host a DeiT-S for the commands of the second. At the small scale there is one. The calibrated
column is ours: the same tuning, after a calibration without labels.
"""

from harness import Row, Run, Table, main

TABLE = Table(
    "table4",
    "Table 4: top-1 of the models",
    ("FT", "calibrated, then FT"),
    (
        Row("DeiT-T (softmax)", (72.05, None), (Run("softmax"), None), "5.7M, 1.25G"),
        Row("T⁵-T", (71.19, None), (Run("t5-paper"), Run("t5-paper", calibrated=True)), "6.2M, 1.34G"),
        Row(
            "T⁵⁺-T",
            (72.06, None),
            (Run("t5-paper", ("neighborhood.window=5",)), Run("t5-paper", ("neighborhood.window=5",), calibrated=True)),
            "6.2M, 1.39G",
        ),
        Row("DeiT-S (softmax)", (80.24, None), (None, None), "22M, 4.59G"),
        Row("T⁵-S", (79.00, None), (None, None), "23M, 4.77G"),
        Row("T⁵⁺-S", (79.64, None), (None, None), "23M, 4.86G"),
    ),
    "Not run: the second size, whose host is a DeiT-S; the small scale has one host.",
    against="T⁵-T",
)

if __name__ == "__main__":
    main(TABLE)
