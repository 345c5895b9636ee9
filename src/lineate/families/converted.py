"""An attention whose middle is a core: whatever was the host's stays, under its own name, so that its checkpoints still load."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from lineate.core import CoreAttention
from lineate.families.base import GridTracker


class Converted(nn.Module):
    """The host's parameters, buffers and children, `core` in the middle, and the `tracker` that knows the grid."""

    optional: ClassVar[tuple[str, ...]]  # parts that not every host has; None where it has none

    def __init__(self, host: nn.Module, core: CoreAttention, tracker: GridTracker) -> None:
        super().__init__()
        for name, parameter in host.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in host.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name not in host._non_persistent_buffers_set)
        for name, child in host.named_children():
            self.add_module(name, child)
        for name in self.optional:
            if not hasattr(self, name):
                setattr(self, name, None)
        self.core = core
        self.tracker = tracker
        self.train(host.training)
