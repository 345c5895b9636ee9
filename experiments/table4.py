"""Table 4: the models: DeiT, T⁵ and T⁵⁺.

    python experiments/table4.py --scale small --data ../shared/data/cifar10
    python experiments/table4.py --scale full      prints the commands at the paper's size: ImageNet, DeiT-T, 30 epochs a row

The paper has two sizes (T, and S: 80.24, 79.00, 79.64); give --host a DeiT-S for the commands of the second. The calibrated
column is ours: the same tuning, after a calibration without labels.
"""

from harness import Row, Run, Table, main

TABLE = Table(
    "table4",
    "Table 4: top-1 of the models",
    ("FT", "calibrated, then FT"),
    (
        Row("DeiT-T (softmax)", (72.05, None), (Run("softmax"), None)),
        Row("T⁵-T", (71.19, None), (Run("t5-paper"), Run("t5-paper", calibrated=True))),
        Row(
            "T⁵⁺-T",
            (72.06, None),
            (Run("t5-paper", ("neighborhood.window=5",)), Run("t5-paper", ("neighborhood.window=5",), calibrated=True)),
        ),
    ),
)

if __name__ == "__main__":
    main(TABLE)
