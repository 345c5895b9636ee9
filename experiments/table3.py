"""Table 3: where locality comes from, everything tuned.

python experiments/table3.py --scale small --data ../shared/data/cifar10
python experiments/table3.py --scale full      prints the commands at the paper's size: ImageNet, DeiT-T, 30 epochs a row
"""

from harness import Row, Run, Table, main

TABLE = Table(
    "table3",
    "Table 3: top-1 by locality",
    ("FT",),
    (
        Row("none", (69.25,), (Run("t5-paper", ("mixer.inner=swiglu", "locality=none")),)),
        Row("CPE", (69.64,), (Run("t5-paper", ("locality=cpe",)),)),
        Row("DWC(v)", (70.47,), (Run("t5-paper", ("locality=dwc-v",)),)),
        Row("DWC-QK", (71.19,), (Run("t5-paper"),), "6.2M, 1.34G"),
        Row("DWC-QK + NAT3", (71.67,), (Run("t5-paper", ("neighborhood.window=3",)),), "1.36G"),
        Row("DWC-QK + NAT5", (72.06,), (Run("t5-paper", ("neighborhood.window=5",)),), "1.39G"),
    ),
    "The paper's multiply-adds fit twice a window's two products; ours count them once.",
    against="none",
)

if __name__ == "__main__":
    main(TABLE)
