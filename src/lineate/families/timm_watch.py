"""Looking at what passes through timm's attentions, the hosts' own and the converted ones of `timm_attention.py`.

`listener.py` hears a host's at `scaled_dot_product_attention`, so while it is watched a host's softmax attention runs fused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from lineate.families.base import Note, UnsupportedModelError
from lineate.families.listener import Listener
from lineate.families.timm_attention import CONVERTIBLE, ConvertedAttention


@contextmanager
def watch(model: nn.Module, sites: Collection[str], note: Note) -> Iterator[None]:
    """Call `note(site, attended)` at every forward pass of these sites. Raises `UnsupportedModelError` for an unknown kind."""
    found: dict[str, Any] = {site: model.get_submodule(site) for site in sites}
    for site, attention in found.items():
        if type(attention) not in (ConvertedAttention, *CONVERTIBLE):
            raise UnsupportedModelError(f"{site} cannot be looked into: its attention is {type(attention).__name__}")
    listener = Listener(note)
    with ExitStack() as stack:
        for site, attention in found.items():
            handles = [attention.proj.register_forward_pre_hook(partial(listener.leave, site))]
            if isinstance(attention, ConvertedAttention):
                handles.append(attention.core.register_forward_pre_hook(listener.asked))
            else:
                handles.append(attention.register_forward_pre_hook(partial(listener.enter, site)))
                stack.callback(setattr, attention, "fused_attn", attention.fused_attn)
                attention.fused_attn = True
            for handle in handles:
                stack.callback(handle.remove)
        stack.enter_context(listener)
        yield
