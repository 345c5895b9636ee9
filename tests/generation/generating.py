"""Makes five pictures, larger than the model's own and not square, in the folder named; for test_classes.py.

In as many processes as it was started as.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from lineate.evaluate.top1 import processes
from lineate.generation.classes import Sampling, denoiser, generate
from lineate.models.dit import DiT

if __name__ == "__main__":
    torch.manual_seed(0)
    model = DiT(8, 2, 3, 16, 1, 2, num_classes=4)
    torch.nn.init.normal_(model.final_layer.linear.weight)
    generate(denoiser(model, (12, 16)), Path(sys.argv[1]), Sampling(steps=3, guidance=2), classes=(1, 3), number=5, batch=1,
             accelerator=processes(torch.device("cpu")))  # fmt: skip
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
