"""What sequence parallelism (docs/scale.md) should cost on large pictures: a model on paper, nothing here is measured.

    python benchmarks/scale.py                       the tables of docs/scale.md, as Markdown
    python benchmarks/scale.py --processes 64 --link 50e9

One picture, a plain ViT in bf16, the preset t5 (SwiGLU inner model, one class token answered exactly), and as its rival softmax
attention in a ring, where each process's keys and values pass by all others. The formulas are `Setting`'s: each says what it
counts.

Legend: N tokens, C channels, D head dim, L blocks, R processes, p patch, S px a side; a multiply-add counts two FLOP.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

SIDES = (1024, 2048, 4096, 8192, 16384)
HALF, FULL = 2, 4  # bytes of bf16 and fp32
MATRICES = 3  # of the inner model: SwiGLU
INNER = 9  # forward, in units of 2·D² FLOP a token and head (SwiGLU, inner product)
PASSES = 7  # over a (N, C) tensor in memory that a fused operator takes
COLLECTIVES = 7  # a layer: mean, variance, gradients; halos of q and k; peak and sums of the class token's softmax
EAGER_BYTES = 64  # peak a token and channel of the eager code's forward pass: 125 MiB at 5330 tokens of 384 channels (README)


@dataclass(frozen=True)
class Setting:
    """The model and the machines: all that is assumed."""

    processes: int = 8
    channels: int = 1024
    head_dim: int = 64
    blocks: int = 24
    patch: int = 16
    flops: float = 400e12  # sustained, a process
    memory: float = 2.5e12  # bytes/s, sustained
    link: float = 200e9  # bytes/s that a process sends while it receives as many
    latency: float = 20e-6  # s, a collective

    def tokens(self, side: int) -> int:
        """N = (S/p)², without the class token."""
        return (side // self.patch) ** 2

    def sums(self) -> int:
        """Bytes of the totals of a layer, forward: mean and variance C each, gradients, softmax of one class token; fp32."""
        heads = self.channels // self.head_dim
        return FULL * (2 * self.channels + MATRICES * self.channels * self.head_dim + heads * (self.head_dim + 2))

    def halos(self, side: int) -> int:
        """Bytes of the rows of a layer, forward: q's and k's, one to each neighbour; bf16."""
        return 4 * HALF * (side // self.patch) * self.channels

    def ring(self, side: int) -> int:
        """Bytes that softmax attention in a ring sends a layer and process, forward: keys and values, R - 1 of R parts; bf16."""
        return 2 * HALF * self.tokens(side) * self.channels * (self.processes - 1) // self.processes

    def gather(self, side: int) -> int:
        """Bytes that a process receives behind the last block; once a model."""
        return HALF * self.tokens(side) * self.channels * (self.processes - 1) // self.processes

    def entry(self, side: int) -> int:
        """Bytes, not divided: the picture, its tokens as convolved and as laid out (bf16), resampled positions twice (fp32)."""
        return HALF * 3 * side**2 + self.tokens(side) * self.channels * (2 * HALF + 2 * FULL)

    def weights(self) -> int:
        """Bytes of 12·C² weights a block; bf16."""
        return HALF * 12 * self.channels**2 * self.blocks

    def inference_bytes(self, side: int) -> float:
        """A process's peak: at the entry, or in a block beside the tokens gathered behind the last one."""
        block = EAGER_BYTES * self.tokens(side) * self.channels / self.processes
        return self.weights() + max(self.entry(side), block + HALF * self.tokens(side) * self.channels)

    def training_bytes(self, side: int) -> float:
        """The same with each block computed again in the backward pass: the blocks' inputs, and twice a block's forward peak."""
        share = self.tokens(side) * self.channels / self.processes
        return self.inference_bytes(side) + share * (HALF * self.blocks + EAGER_BYTES)

    def _seconds(self, side: int, attention: float) -> float:
        """A forward pass: projections and MLP, 24·N·C² FLOP a block, the attention, and the patch embedding, whole."""
        n, c = self.tokens(side), self.channels
        linear = 24 * n * c**2 / self.processes / self.flops
        return self.blocks * (linear + attention) + 6 * self.patch**2 * n * c / self.flops + self.gather(side) / self.link

    def t5_seconds(self, side: int) -> float:
        """Memory or arithmetic of the operator, whichever is longer, then what is sent, none of it hidden."""
        n, c = self.tokens(side) / self.processes, self.channels
        operator = max(2 * INNER * n * c * self.head_dim / self.flops, PASSES * HALF * n * c / self.memory)
        sent = (2 * self.sums() + self.halos(side)) / self.link + COLLECTIVES * self.latency
        return self._seconds(side, operator + (sent if self.processes > 1 else 0))

    def softmax_seconds(self, side: int) -> float:
        """4·N²·C FLOP a block, or the ring behind it, whichever is longer."""
        n, c = self.tokens(side), self.channels
        return self._seconds(side, max(4 * n**2 * c / self.processes / self.flops, self.ring(side) / self.link))


def tables(setting: Setting) -> str:
    """Markdown: what is sent, then memory and time."""
    sent = ["| px a side | tokens | totals | rows | both | softmax in a ring |", "| --- | --- | --- | --- | --- | --- |"]
    cost = [
        "| px a side | GiB, inference | GiB, training | ms, t5 | ms, softmax | ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for side in SIDES:
        sums, halos, ring = (x / 1e6 for x in (setting.sums(), setting.halos(side), setting.ring(side)))
        cells = (f"{setting.tokens(side):,}", f"{sums:.2f}", f"{halos:.2f}", f"{sums + halos:.2f}", f"{ring:,.0f}")
        sent.append(f"| {side} | {' | '.join(cells)} |")
        gib = (f"{x / 2**30:.1f}" for x in (setting.entry(side), setting.inference_bytes(side), setting.training_bytes(side)))
        t5, softmax = (x * 1e3 for x in (setting.t5_seconds(side), setting.softmax_seconds(side)))
        cost.append(f"| {side} | {' | '.join(gib)} | {t5:,.1f} | {softmax:,.1f} | {softmax / t5:.1f} |")
    return "\n".join((*sent, "", *cost))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in vars(Setting()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    print(tables(Setting(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
