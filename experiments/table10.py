"""Table 10: which weights a DiT⁵ inherits.

python experiments/table10.py --scale small --data ../shared/data/cifar10 --threads 1
python experiments/table10.py --scale full      prints the commands at the paper's size: DiT-S/2, 50,000 steps of 256 pictures

The paper's host is DiT-S/2 after 400,000 steps of 256, 80 epochs:
    accelerate launch --num_processes 8 -m lineate train dit:DiT-S/2 --scratch --data IMAGENET --vae VAE --preset softmax \
        --recipe dit --epochs 80 --out runs/dit-s --device cuda
"""

from generation import budget, in_steps, scale
from harness import Row, Run, Table, main

STEPS = budget(0.1)  # the paper's are 12.5 % of its host's
SMALL = scale("runs/dit-s/model", in_steps(50_000, 256), 1.0)

TABLE = Table(
    "table10",
    "Table 10: FID / IS in the paper; KID·1000 / FD on 64 components here",
    ("FID / IS", "10 % of the steps"),
    (
        Row("Softmax", ("68.40", None), (None, Run("softmax", (STEPS,)))),
        Row("MLP weights only", ("89.71 / 15.84", None), (None, Run("dit5", ("inherit=mlp", STEPS)))),
        Row("attention weights only", ("93.18 / 14.69", None), (None, Run("dit5", ("inherit=attention", STEPS)))),
        Row("all", ("68.52 / 20.65", None), (None, Run("dit5", (STEPS,)))),
    ),
    scale=SMALL,
)

if __name__ == "__main__":
    main(TABLE)
