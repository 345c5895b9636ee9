"""FlexAttention's masks: as dense masks, and uncompiled on the CPU, they give what the eager tiles give."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from lineate.ops.flex import Visible, block_mask
from lineate.ops.local import in_disc, radius_attention
from lineate.ops.neighborhood import in_window, neighborhood_attention


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 12), (5, 4), (9, 17), (21, 3)])
@pytest.mark.parametrize(("first", "last"), [(0, 0), (2, 3)])
@pytest.mark.parametrize(
    ("attention", "visible", "extent"),
    [(neighborhood_attention, in_window, 5), (radius_attention, in_disc, 1), (radius_attention, in_disc, 4)],
)
def test_masks_equal_the_tiles(attention, visible: Visible, extent: int, height: int, width: int, first: int, last: int) -> None:
    tokens = first + height * width + last
    q, k, v = (torch.randn(2, 3, tokens, 4, dtype=torch.float64) for _ in range(3))
    q = q[:, :, first : tokens - last]
    seen = visible(torch.tensor((height, width, extent, first)), torch.arange(height * width)[:, None], torch.arange(tokens))
    expected = attention(q, k, v, height, width, extent, first)
    torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, attn_mask=seen), expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.usefixtures("unchecked_shapes")
def test_flex_attention_reads_the_mask_so() -> None:
    q, k, v = (torch.randn(1, 2, 9 * 17 + 5, 16) for _ in range(3))
    q = q[:, :, 2:-3]
    found = flex_attention(q, k, v, block_mask=block_mask(in_window, 9, 17, 5, 2, 158, q.device))
    torch.testing.assert_close(found, neighborhood_attention(q, k, v, 9, 17, 5, 2))


def test_a_mask_is_made_once_for_a_geometry_and_leaves_far_blocks_out() -> None:
    masks = [block_mask(in_window, 32, 64, 5, 0, 2048, torch.device("cpu")) for _ in range(2)]
    assert masks[0] is masks[1]
    assert masks[0].sparsity() > 70
