"""Looking at what passes through timm's attentions, the hosts' own and the converted ones of `timm_attention.py`.

A core is asked for q, k and v by name; a host's are what it hands to `scaled_dot_product_attention`, after norms, rotary
positions and sharing between heads. So while it is watched a host's softmax attention runs fused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lineate.families.base import Attended, Note, UnsupportedModelError
from lineate.families.timm_attention import CONVERTIBLE, ConvertedAttention


class _Listener(TorchFunctionMode):
    """Keeps (q, k, v) of the site now running, and tells them once its output projection is reached."""

    def __init__(self, note: Note) -> None:
        super().__init__()
        self.note = note
        self.site: str | None = None  # a host's, between its first and its last module
        self.heard: tuple[Tensor, ...] = ()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.site is not None and func is F.scaled_dot_product_attention:
            self.heard = args[:3]
        return func(*args, **(kwargs or {}))

    def enter(self, site: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.site = site

    def asked(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.heard = args[:3]

    def leave(self, site: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        (q, k, v), self.heard, self.site = self.heard, (), None
        self.note(site, Attended(q, k, v, args[0]))


@contextmanager
def watch(model: nn.Module, sites: Collection[str], note: Note) -> Iterator[None]:
    """Call `note(site, attended)` at every forward pass of these sites. Raises `UnsupportedModelError` for an unknown kind."""
    found: dict[str, Any] = {site: model.get_submodule(site) for site in sites}
    for site, attention in found.items():
        if type(attention) not in (ConvertedAttention, *CONVERTIBLE):
            raise UnsupportedModelError(f"{site} cannot be looked into: its attention is {type(attention).__name__}")
    listener = _Listener(note)
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
