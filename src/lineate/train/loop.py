"""The one loop that everything learns in: `fit`.

    for each step:   rates of the step -> gradients of its batches, each with its own seed -> clip -> optimiser -> average

How many processes, on which devices, replicated (DDP) or sharded (FSDP2), is accelerate's own business: `accelerate launch` and
its config file say so, and nothing here does. Exact resume follows from `lineate.train.randomness`: a run that was killed and
resumed gives bit for bit what one never stopped gives, on the same machine with as many processes, and on a GPU with
`deterministic`. Training stops at the first loss or gradient that is not finite, before it reaches a weight.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, LoggerType, gather_object, send_to_device
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lineate.convert import ConversionRecord, core_modules
from lineate.evaluate import Progress, evaluating
from lineate.mixers.base import Frozen
from lineate.train import TrainError, checkpoints
from lineate.train.checkpoints import Epoch, State
from lineate.train.config import TrainConfig
from lineate.train.data import Batches
from lineate.train.objectives import Objective
from lineate.train.optim import make_optimizer, make_schedule, total_steps
from lineate.train.protocols import choose, leave_unreached, merge, train_mode
from lineate.train.randomness import STEP, derive, left_alone, seed_all

Evaluate = Callable[[nn.Module], dict[str, float]]
REPLICATED = (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
NAMED = 4  # parameters in one line
# Settings that may change between a run and its resumption: they do not reach a weight.
WITHOUT_EFFECT = {"max_steps", "checkpoint_steps", "keep", "eval_epochs", "log_steps", "tracker", "workers", "grad_checkpointing"}


@dataclass(frozen=True)
class Lesson:
    """What is learned: from which batches, what is minimised, and what is measured on the way."""

    batches: Batches
    objective: Objective
    evaluate: Evaluate | None = None


class FitResult(Frozen):
    """What a run did: its history, optimiser steps, images seen by all processes, wall-clock seconds of all its parts.

    `skipped` are the pictures that could not be read, and why.
    `learning` counts the parameters that learned; `finished` is False where `max_steps` came before the schedule's end.
    """

    history: tuple[Epoch, ...]
    steps: int
    images: int
    seconds: float
    learning: int
    finished: bool
    skipped: dict[str, str]


@dataclass(frozen=True)
class _Run:
    """One run: the model as it is and as accelerate wrapped it, what steps it, and how long it goes."""

    accelerator: Accelerator
    model: nn.Module
    wrapped: nn.Module
    optimizer: Any
    schedule: Any
    average: ModelEmaV3 | None
    objective: Objective
    config: TrainConfig
    out: Path
    identity: dict[str, Any]
    evaluate: Evaluate | None
    global_batch: int
    per_epoch: int
    total: int
    stop: int


def _nothing(*_: object) -> None:
    """Neither say nor show anything."""


def fit(
    model: nn.Module,
    batches: Batches,
    objective: Objective,
    config: TrainConfig,
    out: Path,
    *,
    evaluate: Evaluate | None = None,
    resume: bool = False,
    keep_start: bool = False,
    about: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = _nothing,
    progress: Progress = _nothing,
) -> FitResult:
    """Train `model` in place, on the kind of device that it is on; it ends there in eval mode with the weights to keep.

    Those are the averaged ones with `config.ema`, and LoRA's updates are merged. Writes `out`/checkpoints, `out`/history.jsonl
    and the tracker's files in `out`/logs. With `resume` it goes on from the newest whole checkpoint there, or begins. With
    `keep_start` the model before the first step is the first checkpoint, since it took long to come by; not where it is sharded.
    `evaluate(model)` gives metrics for the history, on every process. `about` is what else must be the same for a run to be
    resumed, as JSON. `say` and `progress(done, total, what)` are called by the main process alone.
    Raises `TrainError`; a note on it, or on a KeyboardInterrupt, says which checkpoint was kept. The model is then unfinished.
    """
    accelerator = _accelerator(model, config, out)
    if not accelerator.is_main_process:
        say = progress = _nothing
    if checkpoints.newest(out) is not None and not resume:
        raise TrainError(f"{checkpoints.folder(out)} holds a run's checkpoints; resume it, or choose another folder")
    with left_alone(), _deterministic(config), _tf32(config), _noting(out):
        run = _prepare(accelerator, model, batches, objective, config, out, evaluate, about, say)
        learning = sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad)
        state = checkpoints.resume(accelerator, out, run.identity, say, needed=keep_start) if resume else State()
        # Not of a sharded optimiser: to write its state before any step, torch makes it take one, and it counts.
        if keep_start and checkpoints.newest(out) is None and not accelerator.is_fsdp2:
            checkpoints.save(accelerator, out, state, run.identity, config.keep)
        state = _train(run, batches, state, say, progress)
        _finish(run, model)
    return FitResult(
        history=state.history,
        steps=state.step,
        images=state.step * run.global_batch,
        seconds=state.seconds,
        learning=learning,
        finished=state.step >= run.total,
        skipped=state.skipped,
    )


def check(model: nn.Module, config: TrainConfig, out: Path) -> None:
    """Raise `TrainError` for what `fit` would refuse of this model and config; the model stays as it is, and no weight is copied.

    What the objective and the batches refuse, they refuse when they are made.
    """
    _accelerator(model, config, out)
    tensors = (*model.parameters(), *model.buffers())
    bare = {id(tensor): tensor.detach().to("meta") for tensor in tensors}
    bare |= {id(parameter): nn.Parameter(bare[id(parameter)], parameter.requires_grad) for parameter in model.parameters()}
    trial = copy.deepcopy(model, bare)
    choose(trial, config)
    make_optimizer(trial, config, config.batch)


def _train(run: _Run, batches: Batches, state: State, say: Callable[[str], None], progress: Progress) -> State:
    """All steps from `state` on; the state at the end."""
    accelerator, config, first, before = run.accelerator, run.config, state.step, state.seconds
    began = time.perf_counter()
    aside = 0.0  # seconds that were no learning: evaluations, checkpoints
    stream = batches.stream(first, run.stop, accelerator.process_index, accelerator.num_processes)
    train_mode(run.model, config.protocol)
    for done in range(first + 1, run.stop + 1):
        run.schedule.step_update(done - 1)
        losses = _step(run, list(islice(stream, config.accumulate)), done)
        if run.average is not None:
            run.average.update(run.model, done if config.ema_warmup else None)
        elapsed = time.perf_counter() - began
        speed = (done - first) * run.global_batch / (elapsed - aside)
        state = state.after_step(losses, before + elapsed)
        progress(done, run.stop, f"epoch {_epoch(run, done)}, loss {losses['loss']:.4g}, {speed:.0f} images/s")
        if done % config.log_steps == 0:
            accelerator.log(losses | {"lr": _rate(run), "images_per_second": speed}, step=done)
        ends = done == run.stop or done % run.per_epoch == 0
        if ends:
            metrics = _metrics(run, done)
            accelerator.log(metrics, step=done)
            state = state.after_epoch(done / run.per_epoch, done * run.global_batch, _rate(run), metrics)
            left = timedelta(seconds=round((elapsed - aside) / (done - first) * (run.stop - done)))
            say(f"epoch {_epoch(run, done)}: {state.history[-1].figures()}; {speed:.0f} images/s, {left} of learning left")
        if done == run.stop or (ends if config.checkpoint_steps is None else done % config.checkpoint_steps == 0):
            unread = {name: why for some in gather_object([dict(batches.skipped)]) for name, why in some.items()}
            now = {"seconds": before + time.perf_counter() - began, "skipped": state.skipped | unread}
            state = state.model_copy(update=now)
            checkpoints.save(accelerator, run.out, state, run.identity, config.keep)
        aside += time.perf_counter() - began - elapsed
    return state


def _step(run: _Run, micro: Sequence[Any], number: int) -> dict[str, float]:
    """One optimiser step on a process's batches; the objective's terms, mean over batches and processes.

    Raises `TrainError` before a weight is touched if the loss or a gradient is not finite. With fp16 a gradient may be: the
    scaler then leaves the step out and scales less.
    """
    accelerator = run.accelerator
    terms: dict[str, list[Tensor]] = {}
    for index, batch in enumerate(micro):
        last = index + 1 == len(micro)
        with nullcontext() if last else accelerator.no_sync(run.wrapped):
            losses = _ask(run, run.wrapped, batch, number, index)
            accelerator.backward(losses["loss"] / len(micro))
        for name, value in losses.items():
            terms.setdefault(name, []).append(value.detach().float())
    means = accelerator.reduce(torch.stack([torch.stack(values).mean() for values in terms.values()]), "mean")
    found = dict(zip(terms, means.tolist(), strict=True))
    if not math.isfinite(found["loss"]):
        raise TrainError(f"the loss became {found['loss']} at step {number}; {_first_site(run, micro, number)}")
    accelerator.unscale_gradients()
    learning = [parameter for parameter in run.wrapped.parameters() if parameter.grad is not None]
    norm = get_total_norm([parameter.grad for parameter in learning if parameter.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if not bool(torch.isfinite(norm)) and accelerator.scaler is None:
        raise TrainError(f"a gradient became {float(norm)} at step {number}; {_first_gradient(run.model)}")
    if run.config.clip_grad is not None:
        clip_grads_with_norm_(learning, run.config.clip_grad, norm)
    run.optimizer.step()
    run.optimizer.zero_grad()
    return found


def _ask(run: _Run, model: nn.Module, batch: Any, number: int, index: int) -> dict[str, Tensor]:
    """The objective's terms for one batch, whose every draw follows from the step and its place among all processes' batches."""
    accelerator = run.accelerator
    place = accelerator.process_index * run.config.accumulate + index
    seed_all(derive(STEP, run.config.seed, number, place, 0))
    with accelerator.autocast():
        return run.objective(model, send_to_device(batch, accelerator.device, non_blocking=True))


@torch.no_grad()
def _first_site(run: _Run, micro: Sequence[Any], number: int) -> str:
    """Which core's output left the finite numbers first when this step's batches are shown again."""
    bad: list[str] = []

    def look(site: str, output: Tensor) -> None:
        if not bool(torch.isfinite(output).all()):
            bad.append(site)

    cores = core_modules(run.model)
    handles = [
        core.register_forward_hook(lambda module, args, output, site=site: look(site, output)) for site, core in cores.items()
    ]
    for index, batch in enumerate(micro):
        _ask(run, run.model, batch, number, index)
    for handle in handles:
        handle.remove()
    first = next((site for site in gather_object(bad[:1]) if site), None)
    return f"the first core whose output is not finite: {first}" if first else "the output of every core is finite"


def _first_gradient(model: nn.Module) -> str:
    """The first parameter, in the model's order, whose gradient is not finite."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return f"the first of them: {name}"
    return "their squares are too large to sum"


def _metrics(run: _Run, done: int) -> dict[str, float]:
    """What `evaluate` says of the weights to keep, where it is due."""
    epochs = run.config.eval_epochs
    due = done == run.stop or (epochs > 0 and done % (epochs * run.per_epoch) == 0)
    if run.evaluate is None or not due:
        return {}
    model = run.model if run.average is None else run.average.module
    with evaluating(model), run.accelerator.autocast():
        return run.evaluate(model)


def _epoch(run: _Run, done: int) -> str:
    return f"{-(-done // run.per_epoch)}/{-(-run.total // run.per_epoch)}"


def _rate(run: _Run) -> float:
    """The learning rate of what was inherited."""
    return min(float(group["lr"]) / float(group["lr_scale"]) for group in run.optimizer.param_groups)


def _accelerator(model: nn.Module, config: TrainConfig, out: Path) -> Accelerator:
    """accelerate's view of the processes and devices. Raises `TrainError` for what this loop does not do."""
    device = next(model.parameters()).device.type
    if device == "cpu" and config.precision == "fp16":
        raise TrainError("precision: fp16 needs a GPU; choices on a CPU: no, bf16")
    _check_tracker(config.tracker)
    if not torch.distributed.is_initialized():  # precision and device of an earlier run would stay, and contradict this one's
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision="no" if config.precision == "tf32" else config.precision,
        dynamo_backend="inductor" if config.compile else None,
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=str(out / "logs"),
    )
    kind, sharded = accelerator.distributed_type, os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if sharded and kind == DistributedType.MULTI_CPU:
        raise TrainError("accelerate shards on GPUs only, and would take DDP without a word; launch without FSDP on CPUs")
    if kind not in (DistributedType.NO, *REPLICATED) and not accelerator.is_fsdp2:
        raise TrainError(f"{kind.value} is not supported; choices: one process, DDP, FSDP with fsdp_version 2")
    if accelerator.is_fsdp2 and config.ema is not None:
        raise TrainError("ema: the average of sharded weights is not supported; train without ema, or with DDP")
    return accelerator


def _check_tracker(name: str) -> None:
    """Raise `TrainError` for a tracker that accelerate does not know, or that is not installed: it would leave that one out."""
    known = ["none", *(kind.value for kind in LoggerType if kind != LoggerType.ALL)]
    if name not in known:
        raise TrainError(f"tracker: unknown tracker {name!r}; choices: {', '.join(known)}")
    here = ["none", *(LoggerType(kind).value for kind in get_available_trackers())]
    if name not in here:
        raise TrainError(
            f"tracker: {name} is not installed; choices here: {', '.join(here)}; tensorboard comes with '.[train]' in a clone"
        )


def _prepare(
    accelerator: Accelerator,
    model: nn.Module,
    batches: Batches,
    objective: Objective,
    config: TrainConfig,
    out: Path,
    evaluate: Evaluate | None,
    about: Mapping[str, Any] | None,
    say: Callable[[str], None],
) -> _Run:
    """Everything that a run needs, before its first step."""
    processes, per_epoch = accelerator.num_processes, batches.steps(accelerator.num_processes)
    global_batch, total = config.batch * config.accumulate * processes, total_steps(config, per_epoch)
    trained = copy.deepcopy(model) if accelerator.is_fsdp2 else model  # sharding changes a model for good
    choose(trained, config)
    if accelerator.distributed_type in REPLICATED and not accelerator.is_fsdp2:
        _leave_idle(accelerator, trained, batches, objective, config, say)
    identity = _identity(trained, batches, config, processes, about)
    average = None
    if config.ema is not None:  # before accelerate wraps `forward`: the copy would call the original's
        average = ModelEmaV3(trained.to(accelerator.device), decay=config.ema, use_warmup=config.ema_warmup)
        accelerator.register_for_checkpointing(average)
    optimizer = make_optimizer(trained, config, global_batch)
    schedule = make_schedule(optimizer, config, global_batch, per_epoch)
    wrapped, stepper = accelerator.prepare(trained, optimizer)
    if config.tracker != "none":
        accelerator.init_trackers("lineate", config={"config": config.model_dump_json()})
    return _Run(
        accelerator, trained, wrapped, stepper, schedule, average, objective, config, out, identity, evaluate,
        global_batch, per_epoch, total, min(total, config.max_steps or total),
    )  # fmt: skip


def _leave_idle(
    accelerator: Accelerator,
    model: nn.Module,
    batches: Batches,
    objective: Objective,
    config: TrainConfig,
    say: Callable[[str], None],
) -> None:
    """Freeze what no process's first batch gives a gradient to: DDP waits for the gradient of whatever could have one.

    Such are weights that stand beside what is trained, like the mask token of transformers' DINOv2.
    """
    train_mode(model.to(accelerator.device), config.protocol)
    seed_all(derive(STEP, config.seed, 0, accelerator.process_index, 0))
    batch = next(batches.stream(0, 1, accelerator.process_index, accelerator.num_processes))
    with accelerator.autocast():
        loss = objective(model, send_to_device(batch, accelerator.device))["loss"]
    loss.backward()
    reached = gather_object([name for name, parameter in model.named_parameters() if parameter.grad is not None])
    model.zero_grad()
    if left := leave_unreached(model, set(reached)):
        more = f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
        say(f"no gradient reaches {', '.join(left[:NAMED])}{more}; left as they are")


def _identity(
    model: nn.Module, batches: Batches, config: TrainConfig, processes: int, about: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What must be the same for a run to be resumed."""
    done = getattr(model, "lineate_record", None)
    tensors = "\n".join(f"{name} {tensor.dtype} {tuple(tensor.shape)}" for name, tensor in model.state_dict().items())
    return {
        "model": {
            "class": type(model).__name__,
            "tensors": hashlib.sha256(tensors.encode()).hexdigest(),
            "conversion": done.conversion.model_dump(mode="json") if isinstance(done, ConversionRecord) else None,
        },
        "data": batches.identity(),
        "config": config.model_dump(mode="json", exclude=WITHOUT_EFFECT),
        "processes": processes,
        "about": dict(about or {}),
    }


def _finish(run: _Run, model: nn.Module) -> None:
    """Leave the weights to keep in `model`, under its own names, free of everything that training hung on it."""
    if run.accelerator.is_fsdp2:
        whole = get_model_state_dict(run.wrapped, options=StateDictOptions(full_state_dict=True))
        choose(model, run.config)
        model.load_state_dict(whole)
    else:
        run.accelerator.unwrap_model(run.wrapped, keep_fp32_wrapper=False, keep_torch_compile=False)
        for left in ("forward", "_is_accelerate_prepared"):  # the method on the instance would be the original's in a copy too
            vars(model).pop(left, None)
    if run.average is not None:
        model.load_state_dict(run.average.module.state_dict())
    if run.config.protocol == "lora":
        merge(model)
    model.requires_grad_(True).zero_grad()
    model.eval()
    for tracker in run.accelerator.trackers:
        tracker.finish()
    run.accelerator.free_memory()


@contextmanager
def _deterministic(config: TrainConfig) -> Iterator[None]:
    """Only algorithms whose results repeat, where the config says so; afterwards as before."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only so
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def _tf32(config: TrainConfig) -> Iterator[None]:
    """Products of fp32 in TF32 on GPUs that have it, where the config says so; afterwards as before."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    if config.precision == "tf32":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@contextmanager
def _noting(out: Path) -> Iterator[None]:
    """Adds to whatever ends a run early which checkpoint stays."""
    try:
        yield
    except BaseException as error:
        kept = checkpoints.newest(out)
        error.add_note(f"{kept} is kept, and resuming goes on from it" if kept else "no checkpoint had been written")
        raise
