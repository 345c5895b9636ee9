"""Table 12: DiT⁵ with its neighborhood branch and without.

python experiments/table12.py --scale small --data ../shared/data/cifar10 --threads 1
python experiments/table12.py --scale full      prints the commands at the paper's size: DiT-S/2, 50,000 steps of 256 pictures

table10.py has the command that trains its host.
"""

from harness import Row, Run, Table, main
from table10 import SMALL, STEPS

TABLE = Table(
    "table12",
    "Table 12: FID / IS in the paper; KID·1000 / FD on 64 components here",
    ("FID / IS", "10 % of the steps"),
    (
        Row("with NAT 5", ("68.52 / 20.65", None), (None, Run("dit5", (STEPS,)))),
        Row("without", ("72.98 / 19.18", None), (None, Run("dit5-nonat", (STEPS,)))),
    ),
    scale=SMALL,
)

if __name__ == "__main__":
    main(TABLE)
