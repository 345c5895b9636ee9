"""For every test: annotated shapes of ops, mixers and core are checked at each call, one thread, one seed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from jaxtyping import config, install_import_hook

# Before anything imports lineate: modules imported earlier would go unchecked.
install_import_hook(["lineate.ops", "lineate.mixers", "lineate.core"], "beartype.beartype")

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels then run on the CPU

os.environ["LINEATE_CPU_KERNELS"] = "0"  # but in their own tests, which compile them; no other should depend on that

if TYPE_CHECKING:
    from timm.models import VisionTransformer

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers, whichever tests run before it."""
    torch.manual_seed(0)


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """For code that is traced by torch.compile or torch.export, whose sizes are symbols and not ints."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture
def tiny_vit() -> Callable[..., VisionTransformer]:
    """A maker of random timm ViTs: 2 blocks, 3 heads of 8 channels, patches of 8 px, any picture size, eval mode."""
    from timm.models import VisionTransformer

    def make(**changes: Any) -> VisionTransformer:
        geometry = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
        return VisionTransformer(**(geometry | {"dynamic_img_size": True} | changes)).eval()

    return make
