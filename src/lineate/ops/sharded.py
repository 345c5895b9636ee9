"""Tokens spread over processes: which are whose, and what a process must have of the others.

    rows      the grid's rows h·r/R to h·(r + 1)/R are process r's, of R; tokens off the grid are everybody's, the same on all
    total     Σ over the processes, the same on all
    widened   a process's rows, with the rows next to them that others hold
    gathered  all rows, on all

The gradient of each is that of Σ_r L_r, L_r being process r's loss: a total's is a total, a row that was lent returns what it
earned. Where every process has the same loss L, as it is where all have the whole output, the mean over the processes of a
parameter's gradients is therefore exactly ∂L/∂W, whatever part of the work each did: the convention of DistributedDataParallel
and of `fully_shard`. The collectives are torch.distributed's functional ones, which differentiate.

Legend: B batch, H heads, N tokens, D head dim, C channels, h×w grid, R processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lineate.layout import TokenLayout


@dataclass(frozen=True)
class Share:
    """A process's part of every sequence, on a mesh of one dimension."""

    mesh: DeviceMesh

    def __deepcopy__(self, memo: Any) -> Share:
        """A copy of a model runs on the same processes."""
        return self

    @property
    def rank(self) -> int:
        """r."""
        return self.mesh.get_local_rank()

    @property
    def processes(self) -> int:
        """R."""
        return self.mesh.size()

    def rows(self, height: int) -> tuple[int, int]:
        """The first of a grid's rows that is this process's, and the first that is not any more."""
        return height * self.rank // self.processes, height * (self.rank + 1) // self.processes

    def part(self, layout: TokenLayout) -> TokenLayout:
        """The layout of this process's tokens, of all whose layout is given."""
        start, stop = self.rows(layout.height)
        return layout._replace(height=stop - start)

    def counted(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Of a process's tokens (..., N', D) those that it adds to a sum over all: the first one adds those off the grid."""
        return x if self.rank == 0 else x[..., layout.prefix : x.shape[-2] - layout.suffix, :]

    def total(self, x: Tensor) -> Tensor:
        """Σ over the processes."""
        summed: Tensor = collectives.all_reduce(x.contiguous(), "sum", self.mesh)
        return summed

    def largest(self, x: Tensor) -> Tensor:
        """The maximum over the processes; no gradient flows through it."""
        peak: Tensor = collectives.all_reduce(x.detach().contiguous(), "max", self.mesh)
        return peak

    def widened(self, x: Tensor, width: int, reach: int) -> tuple[Tensor, int, int]:
        """Rows (..., n·width, D) with the `reach` rows before and behind them, and how many tokens were added before and behind.

        Where the grid ends none are. Every process holds `reach` rows or more.
        """
        above, below = int(self.rank > 0), int(self.rank < self.processes - 1)
        if not (above or below):
            return x, 0, 0
        rows = x.unflatten(-2, (-1, width)).movedim(-3, 0)
        sent = torch.cat((rows[: reach * above], rows[len(rows) - reach * below :]))
        splits = [reach * (abs(other - self.rank) == 1) for other in range(self.processes)]
        received = collectives.all_to_all_single(sent.contiguous(), splits, splits, self.mesh)
        rows = torch.cat((received[: reach * above], rows, received[reach * above :]))
        return rows.movedim(0, -3).flatten(-3, -2), reach * above * width, reach * below * width

    def own(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Of all tokens (..., N, C) those of this process, (..., N', C)."""
        first, grid, last = x.split((layout.prefix, layout.grid_tokens, layout.suffix), dim=-2)
        start, stop = (row * layout.width for row in self.rows(layout.height))
        return torch.cat((first, grid[..., start:stop, :], last), dim=-2)

    def gathered(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """All tokens (B, N, C), of a process's (B, N', C)."""
        first, grid, last = x.split((layout.prefix, self.part(layout).grid_tokens, layout.suffix), dim=1)
        borders = [layout.height * rank // self.processes * layout.width for rank in range(self.processes + 1)]
        sent = grid.transpose(0, 1).repeat(self.processes, 1, 1)
        counts = [stop - start for start, stop in pairwise(borders)]
        whole = collectives.all_to_all_single(sent, counts, [len(sent) // self.processes] * self.processes, self.mesh)
        return torch.cat((first, whole.transpose(0, 1), last), dim=1)
