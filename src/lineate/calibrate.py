"""Calibration: fit the new parameters of a converted model to its own softmax attention, on examples, without labels.

    min_θ  Σ ‖core_θ(q̂, k̂, v̂) - softmax(q·kᵀ/√D)·v‖² / Σ ‖softmax(q·kᵀ/√D)·v‖²        site after site, in forward order

Two streams run through the blocks side by side: the host's (q, k, v) and the converted one (q̂, k̂, v̂), behind the cores fitted
so far. A core is asked on the converted stream and told the host's answer, so that it learns to live with the errors of the
cores before it and to correct them. With `stream` "host" it is asked on the host's stream, alone: a regression of each attention
on cached activations, which is stage 1 of Diffusion Grafting (with the loss "l1").
The host is its own teacher: its attention is still there, a core is only stood aside while the host's stream passes, so no
second model is in memory. Every host weight stays frozen. Examples are pictures, or, of a denoiser, what it is called with along
its own sampling (`trajectory` of `lineate.generation`). A fixed pool of them is drawn once and only its activations at one site
are kept: memory grows with the pool (six tensors of pool × N × C), not with the number of examples.
Own design; docs/calibration.md says what was tried and what it gave. Differs from the paper, which fine-tunes on labels.
Source of the regression: Chandrasegaran et al., Diffusion Grafting, arXiv 2506.05340.

Legend: B batch, H heads, N tokens, D head dim, C = H·D channels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lineate.calls import Call, grouped, listening
from lineate.convert import is_new, record
from lineate.evaluate import Progress, batches, evaluating
from lineate.families import family
from lineate.layout import TokenLayout
from lineate.mixers.base import Frozen


class CalibrationError(ValueError):
    """The model cannot be calibrated as asked, or a core's loss left the finite numbers; the message names the site."""


class CalibrationConfig(Frozen):
    """`steps` of Adam a site on `batch` examples each, from a pool of at most `pool`.

    `loss` compares with the host's answer by squares ("l2") or by absolute values; `stream` says behind what a core is asked: the
    cores fitted so far, or the host's own attentions. Learning rates rise for a tenth of the steps and fall to zero along a
    cosine. The mix of a neighborhood branch, one number a head, learns at `mix_lr`.
    """

    steps: int = Field(1000, ge=0)
    batch: int = Field(4, ge=1)
    pool: int = Field(512, ge=1)
    lr: float = Field(1e-2, gt=0)
    mix_lr: float = Field(5e-2, gt=0)
    loss: Literal["l2", "l1"] = "l2"
    stream: Literal["converted", "host"] = "converted"
    seed: int = Field(0, ge=0, lt=2**63)


class SiteError(Frozen):
    """Relative error ‖o - o*‖ / ‖o*‖ of a core's output over the pool, before and after its own fit; not held out."""

    before: float
    after: float


class CalibrationResult(Frozen):
    """What was fitted: per site its error, the examples in the pool, the optimiser steps of all sites, wall-clock seconds."""

    sites: dict[str, SiteError]
    images: int
    steps: int
    seconds: float


@dataclass
class _Received:
    """What an attention was called with, beside which grid."""

    call: Call
    grid: tuple[int, int] | None


@dataclass
class _Piece:
    """A few examples of one shape on their way through the blocks: tokens of the host and of the converted model.

    Each is (B, N, C), or several such where a block passes on several. `beside` is what each block gets beside them: rotary
    positions, conditions.
    """

    grid: tuple[int, int] | None
    host: tuple[Tensor, ...]
    converted: tuple[Tensor, ...]
    beside: list[Call]


class _Left(Exception):
    """Raised to leave a forward pass once what it was run for is known."""


class _Stand(nn.Module):
    """Stands where a core stood, and either answers as the host would, keeping the answer, or keeps the question and leaves."""

    def __init__(self, core: Any, leave: bool) -> None:
        super().__init__()
        self.heads, self.leave = core.heads, leave
        self.question: tuple[Tensor, Tensor, Tensor, TokenLayout]
        self.answer: Tensor

    def embed(self, x: Tensor, layout: TokenLayout) -> Tensor:
        return x

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        if self.leave:
            # Asked again and again, and by head: contiguous heads spare each step the copies that views of one projection need.
            self.question = q.contiguous(), k.contiguous(), v.contiguous(), layout
            raise _Left
        self.answer = F.scaled_dot_product_attention(q, k, v)
        return self.answer


@contextmanager
def _stand(attention: Any, *, leave: bool = False) -> Iterator[_Stand]:
    """The converted attention with a `_Stand` in its middle, for a while."""
    core, attention.core = attention.core, _Stand(attention.core, leave)
    try:
        yield attention.core
    finally:
        attention.core = core


_Question = tuple[Tensor, Tensor, Tensor, TokenLayout] | _Received  # q, k, v and layout; for CPE what the attention received
_Example = tuple[_Question, Tensor]  # what a core is asked, and what the host answers


class _Schedule:
    """Adam over a core's parameters, rising for a tenth of the steps and then falling along a cosine."""

    def __init__(self, core: nn.Module, config: CalibrationConfig) -> None:
        mix = [parameter for name, parameter in core.named_parameters() if name == "mix_logit"]
        rest = [parameter for name, parameter in core.named_parameters() if name != "mix_logit"]
        groups = [(group, rate) for group, rate in ((rest, config.lr), (mix, config.mix_lr)) if group]
        self.adam = torch.optim.Adam([{"params": group, "lr": rate} for group, rate in groups], betas=(0.9, 0.95))
        rising = max(1, config.steps // 10)

        def height(step: int) -> float:
            falling = (step - rising) / max(1, config.steps - rising)
            return (step + 1) / (rising + 1) if step < rising else (1 + math.cos(math.pi * falling)) / 2

        self.rate = torch.optim.lr_scheduler.LambdaLR(self.adam, height)

    def step(self, loss: Tensor) -> None:
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        self.rate.step()


class _Calibration:
    """One model, its pool of examples on the way through it, and the fits. Only parameters of cores ever change."""

    def __init__(self, model: nn.Module, config: CalibrationConfig, progress: Progress | None) -> None:
        self.model, self.config, self.progress = model, config, progress
        found = record(model)
        self.family = family(found.family)
        self.run_model: Callable[..., Any] = model
        self.blocks = self.family.blocks(model)
        self.sites: dict[str, Any] = {site: model.get_submodule(site) for site in found.sites}
        self.tracker = next(iter(self.sites.values())).tracker
        self.done = 0
        learning = sum(1 for attention in self.sites.values() if list(attention.core.parameters()))
        self.total = config.steps * learning
        self.draw = torch.Generator().manual_seed(config.seed)
        self.pieces: list[_Piece] = []

    def _step(self, what: str, loss: Tensor, schedule: _Schedule) -> None:
        if not torch.isfinite(loss.detach()):
            raise CalibrationError(
                f"{what}: the loss became {float(loss.detach())} at step {self.done + 1}; try a smaller learning rate"
            )
        schedule.step(loss)
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total, what)

    def _draw(self) -> int:
        return int(torch.randint(len(self.pieces), (1,), generator=self.draw))

    def _run(self, index: int, piece: _Piece, streams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """One block, on the host's tokens or the converted model's."""
        self.tracker.grid = piece.grid
        return self.family.run_block(self.blocks[index], streams, piece.beside[index])

    def _enter(self, call: Call) -> _Piece:
        """A call of the model, up to the first block, and what the blocks get beside: nothing, or each its own."""
        received: list[tuple[tuple[Tensor, ...], Call]] = []

        def note(call: Call) -> None:
            streams, beside = self.family.block_input(call)
            received.append((streams, beside))
            if not (beside.args or beside.kwargs) or len(received) == len(self.blocks):
                raise _Left

        with suppress(_Left), listening(self.blocks, note):  # calls may wait in host memory
            call.to(next(self.model.parameters()).device).of(self.run_model)
        streams, besides = received[0][0], [beside for _, beside in received]
        return _Piece(self.tracker.grid, streams, streams, besides if len(besides) > 1 else besides * len(self.blocks))

    def fill_pool(self, examples: Iterable[Tensor] | Iterable[Call]) -> int:
        """Take the first `pool` examples up to the first block; returns how many there were."""
        stream = iter(examples)
        first = list(islice(stream, 1))
        calls: Iterable[Any] = chain(first, stream)
        if not (first and isinstance(first[0], Call)):
            self.run_model = self.family.runner(self.model)
            calls = (Call((batch,)) for batch in batches(calls, self.model))
        singles = islice((single for call in calls for single in call.each()), self.config.pool)
        count = 0
        for same in grouped(singles, self.config.batch):
            self.pieces.append(self._enter(same))
            count += len(same)
        return count

    def fit_sites(self) -> dict[str, SiteError]:
        """Fit the cores in forward order; both streams end as the last block's output."""
        errors: dict[str, SiteError] = {}
        for index, block in enumerate(self.blocks):
            inside = {site: a for site, a in self.sites.items() if any(module is a for module in block.modules())}
            if self.config.stream == "host":
                for piece in self.pieces:
                    piece.converted = piece.host
            targets = [self._advance_host(index, inside, piece) for piece in self.pieces]
            for site, attention in inside.items():
                before = [] if self.config.stream == "converted" else [a for a in inside.values() if a is not attention]
                questions = [self._question(index, attention, before, piece) for piece in self.pieces]
                errors[site] = self._fit(site, attention, list(zip(questions, (t[site] for t in targets), strict=True)))
            if self.config.stream == "converted":
                with torch.no_grad():
                    for piece in self.pieces:
                        piece.converted = self._run(index, piece, piece.converted)
        return errors

    @torch.no_grad()
    def _advance_host(self, index: int, inside: dict[str, Any], piece: _Piece) -> dict[str, Tensor]:
        """The host's stream through one block; the attention outputs of the host on the way."""
        with ExitStack() as stack:
            stands = {site: stack.enter_context(_stand(attention)) for site, attention in inside.items()}
            piece.host = self._run(index, piece, piece.host)
        return {site: stand.answer for site, stand in stands.items()}

    @torch.no_grad()
    def _question(self, index: int, attention: Any, aside: list[Any], piece: _Piece) -> _Question:
        """What the core at `attention` is asked on the converted stream; for CPE, whose place is before the projections, more.

        Those of `aside`, in the same block, answer as the host meanwhile.
        """
        received: list[_Received] = []

        def note(call: Call) -> None:
            received.append(_Received(call, piece.grid))
            raise _Left

        with ExitStack() as stack:
            for other in aside:
                stack.enter_context(_stand(other))
            if attention.core.config.locality == "cpe":
                stack.enter_context(listening([attention], note))
            else:
                stand = stack.enter_context(_stand(attention, leave=True))
            with suppress(_Left):
                self._run(index, piece, piece.converted)
        return received[0] if received else stand.question

    def _fit(self, site: str, attention: Any, examples: list[_Example]) -> SiteError:
        size = max(sum(float(target.square().sum()) for _, target in examples), torch.finfo(torch.float64).tiny)
        before = self._error(attention, examples, size)
        if not list(attention.core.parameters()) or not self.config.steps:
            return SiteError(before=before, after=before)
        distance, scale = self._distance(examples)
        schedule = _Schedule(attention.core, self.config)
        start = {name: tensor.clone() for name, tensor in attention.core.state_dict().items()}
        try:
            for _ in range(self.config.steps):
                question, target = examples[self._draw()]
                self._step(site, distance(_answer(attention, question), target) / scale, schedule)
        except CalibrationError:
            attention.core.load_state_dict(start)
            raise
        return SiteError(before=before, after=self._error(attention, examples, size))

    def _distance(self, examples: list[_Example]) -> tuple[Callable[[Tensor, Tensor], Tensor], float]:
        """How far an answer is from the host's, and how far nothing would be."""
        count = sum(target.numel() for _, target in examples)
        absolute = self.config.loss == "l1"
        sizes = (target.abs() if absolute else target.square() for _, target in examples)
        scale = max(sum(float(size.sum()) for size in sizes), torch.finfo(torch.float64).tiny) / count
        return F.l1_loss if absolute else F.mse_loss, scale

    @torch.no_grad()
    def _error(self, attention: Any, examples: list[_Example], size: float) -> float:
        off = sum(float((_answer(attention, question) - target).square().sum()) for question, target in examples)
        return math.sqrt(off / size)


def _answer(attention: Any, question: _Question) -> Tensor:
    """The core's output for a question."""
    if not isinstance(question, _Received):
        out: Tensor = attention.core(*question)
        return out
    kept: list[Tensor] = []
    handle = attention.core.register_forward_hook(lambda module, args, output: kept.append(output))
    attention.tracker.grid = question.grid
    try:
        question.call.of(attention)
    finally:
        handle.remove()
    return kept[0]


@contextmanager
def _only_cores_learn(model: nn.Module) -> Iterator[None]:
    """Gradients for parameters below `.core.` and no others; every flag as it was afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_new(name))
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None


def _check_teacher(model: nn.Module) -> None:
    """Raise `CalibrationError` where the attention that a core would be fitted to was itself drawn anew, and so is noise."""
    done = record(model)
    redrawn = [name for name in done.names("new") if not is_new(name) and any(name.startswith(f"{s}.") for s in done.sites)]
    if redrawn:
        raise CalibrationError(
            f"inherit={done.conversion.inherit!r} drew {redrawn[0]} and {len(redrawn) - 1} other tensors of attentions anew, so "
            "there is no softmax attention left to fit the cores to; choices: inherit='all' or 'attention', or train without "
            "calibrating"
        )


def calibrate(
    model: nn.Module,
    examples: Tensor | Iterable[Tensor] | Iterable[Call],
    *,
    config: CalibrationConfig | None = None,
    progress: Progress | None = None,
) -> CalibrationResult:
    """Fit the new parameters of a converted `model`, in place, to the model's own softmax attention on `examples`.

    They are pictures, (M, 3, h, w) or an iterable of such batches or of single (3, h, w) ones, normalised as the model expects;
    or calls of the model, as `trajectory` of `lineate.generation` has them of a denoiser. They may differ in shape.
    `progress(done, total, what)` is called after every optimiser step.
    Raises `ConversionError` on an unconverted model, `EvaluationError` on unusable images, `CalibrationError` when a loss
    leaves the finite numbers, and for a model whose attentions the conversion drew anew. Whatever is raised, Ctrl-C included, the
    model stays valid: some cores fitted, the others as they were.
    """
    config = config or CalibrationConfig()
    dtype = next(model.parameters()).dtype
    if dtype not in (torch.float32, torch.float64):
        raise CalibrationError(
            f"the model is in {dtype}; calibrate it in torch.float32 (model.float()) and cast it back afterwards"
        )
    _check_teacher(model)
    started = time.perf_counter()
    calibration = _Calibration(model, config, progress)
    with evaluating(model), _only_cores_learn(model), torch.enable_grad():
        with torch.no_grad():
            count = calibration.fill_pool([examples] if isinstance(examples, Tensor) else examples)
        sites = calibration.fit_sites()
    return CalibrationResult(sites=sites, images=count, steps=calibration.done, seconds=time.perf_counter() - started)
