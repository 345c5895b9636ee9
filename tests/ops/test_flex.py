"""FlexAttention's masks: uncompiled on the CPU, they give what the eager tiles give."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from lineate.ops.flex import Visible, block_mask
from lineate.ops.local import in_disc, radius_attention
from lineate.ops.neighborhood import in_window, neighborhood_attention


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 12), (5, 4), (9, 17), (21, 3)])
@pytest.mark.parametrize(("first", "last"), [(0, 0), (2, 3)])
@pytest.mark.parametrize(
    ("attention", "visible", "extent"),
    [(neighborhood_attention, in_window, 5), (radius_attention, in_disc, 1), (radius_attention, in_disc, 4)],
)
def test_masks_equal_the_tiles(attention, visible: Visible, extent: int, height: int, width: int, first: int, last: int) -> None:
    tokens = first + height * width + last
    q, k, v = (torch.randn(2, 3, tokens, 16) for _ in range(3))
    q = q[:, :, first : tokens - last]
    mask = block_mask(visible, height, width, extent, first, tokens, q.device)
    found = flex_attention(q, k, v, block_mask=mask)
    torch.testing.assert_close(found, attention(q, k, v, height, width, extent, first))


def test_a_mask_is_made_once_for_a_geometry_and_leaves_far_blocks_out() -> None:
    masks = [block_mask(in_window, 64, 64, 5, 0, 4096, torch.device("cpu")) for _ in range(2)]
    assert masks[0] is masks[1]
    assert masks[0].sparsity() > 85
