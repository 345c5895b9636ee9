"""The loop: what it minimises, what it leaves behind, and what stops it."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lineate
from lineate.convert import core_modules, is_new
from lineate.data import LabelledImages
from lineate.train import TrainError, checkpoints
from lineate.train.config import Augment, Distill, TrainConfig
from lineate.train.loop import FitResult
from lineate.train.objectives import objective

Models = Callable[..., nn.Module]
Small = Callable[..., TrainConfig]
Train = Callable[..., FitResult]
VARIED = Augment(auto_augment="rand-m9-mstd0.5-inc1", erasing=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1)


def equal(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def accuracy(pictures: LabelledImages) -> Callable[[nn.Module], dict[str, float]]:
    images = torch.stack([torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).view(32, 32, 3) for p, _ in pictures])
    shown = images.permute(0, 3, 1, 2) / 127.5 - 1

    def measure(model: nn.Module) -> dict[str, float]:
        assert not any(module.training for module in model.modules())
        with torch.no_grad():
            return {"accuracy": float((model(shown).argmax(-1) == pictures.labels).float().mean())}

    return measure


@pytest.mark.parametrize("protocol", ["ft", "lora", "freeze"])
def test_a_model_learns_to_tell_colours_apart(
    tmp_path: Path, converted: Models, small: Small, train: Train, pictures: LabelledImages, protocol: str
) -> None:
    said: list[str] = []
    shown: list[tuple[int, int]] = []
    model, before = (converted(global_pool="avg", class_token=False) for _ in range(2))
    config = small(protocol=protocol, epochs=8, lr=1e-2, new_lr_multiplier=3)
    result = train(
        model, config, tmp_path, evaluate=accuracy(pictures), say=said.append,
        progress=lambda done, total, what: shown.append((done, total)),
    )  # fmt: skip
    assert result.finished and (result.steps, result.images) == (40, 320)
    assert shown == [(step, 40) for step in range(1, 41)] and len(said) == 8
    last = result.history[-1]
    assert last.losses["loss"] < result.history[0].losses["loss"]
    assert last.metrics == accuracy(pictures)(model) and last.metrics["accuracy"] > 0.5
    assert [json.loads(line)["epoch"] for line in (tmp_path / "history.jsonl").read_text().splitlines()] == [*range(1, 9)]
    state = model.state_dict()
    changed = {name for name, tensor in before.state_dict().items() if not torch.equal(tensor, state[name])}
    if protocol == "freeze":
        assert changed and all(is_new(name) for name in changed)
    lineate.save(model, tmp_path / "model")
    assert equal(lineate.load(tmp_path / "model"), model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_baseline_without_conversion_trains(tmp_path: Path, tiny_vit: Models, small: Small, train: Train) -> None:
    model = tiny_vit()
    before = copy.deepcopy(model)
    assert train(model, small(max_steps=2), tmp_path).learning == sum(p.numel() for p in model.parameters())
    assert not equal(model, before)


def test_accumulating_is_a_larger_batch(tmp_path: Path, converted: Models, small: Small, train: Train) -> None:
    whole, parts = converted(), converted()
    train(whole, small(max_steps=3, opt="sgd", batch=8), tmp_path / "whole")
    train(parts, small(max_steps=3, opt="sgd", batch=4, accumulate=2), tmp_path / "parts")
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_clipping_bounds_the_gradient(tmp_path: Path, converted: Models, small: Small, train: Train) -> None:
    """Plain gradient descent moves the weights by lr times the gradient, whose norm is at most `clip_grad`."""
    model, before = converted(), converted()
    train(model, small(max_steps=1, opt="momentum", clip_grad=1e-3, lr=1.0, weight_decay=0), tmp_path)
    pairs = zip(model.parameters(), before.parameters(), strict=True)
    moved = sum(float((a.detach() - b.detach()).square().sum()) for a, b in pairs) ** 0.5
    assert moved == pytest.approx(1e-3, rel=1e-2)


def test_the_same_run_twice_is_the_same_and_leaves_the_generators_alone(
    tmp_path: Path, converted: Models, small: Small, train: Train
) -> None:
    one, other = converted(proj_drop_rate=0.2), converted(proj_drop_rate=0.2)
    train(one, small(augment=VARIED, deterministic=True), tmp_path / "one")
    assert not torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    train(other, small(augment=VARIED), tmp_path / "other")
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert equal(one, other)
    third = converted(proj_drop_rate=0.2)
    train(third, small(augment=VARIED, seed=1), tmp_path / "third")
    assert not equal(one, third)


def test_bf16_leaves_no_trace_in_the_model(tmp_path: Path, converted: Models, small: Small, train: Train) -> None:
    model, wide = converted(), converted()
    kept = set(vars(model))
    train(model, small(max_steps=3, precision="bf16"), tmp_path / "bf16")
    train(wide, small(max_steps=3), tmp_path / "fp32")
    assert set(vars(model)) == kept and not equal(model, wide)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.head.bias.add_(1)  # type: ignore[union-attr,operator]
        images = torch.rand(1, 3, 32, 32)
        torch.testing.assert_close(twin(images), model(images) + 1)


def test_fp16_is_refused_on_a_cpu(tmp_path: Path, converted: Models, small: Small, train: Train) -> None:
    with pytest.raises(TrainError, match="fp16 needs a GPU; choices on a CPU: no, bf16"):
        train(converted(), small(precision="fp16"), tmp_path)


@pytest.mark.parametrize("warmup", [True, False])
def test_averaged_weights_are_evaluated_and_kept(
    tmp_path: Path, converted: Models, small: Small, train: Train, pictures: LabelledImages, warmup: bool
) -> None:
    """a_t = d·a + (1 - d)·w by hand: d rises from the weights after the first step on, or is constant from those before it."""
    averaged, start, steps = converted(), converted(), [converted(), converted(), converted()]
    result = train(averaged, small(max_steps=3, ema=0.3, ema_warmup=warmup), tmp_path / "average", evaluate=accuracy(pictures))
    for count, model in enumerate(steps, start=1):
        train(model, small(max_steps=count), tmp_path / f"{count}")
    assert result.history[-1].metrics == accuracy(pictures)(averaged)
    for name, tensor in averaged.state_dict().items():
        expected = start.state_dict()[name]
        for done in (1, 2, 3):
            decay = min(0.3, 1 - done ** (-2 / 3)) if warmup else 0.3
            expected = torch.lerp(expected, steps[done - 1].state_dict()[name], 1 - decay)
        torch.testing.assert_close(tensor, expected)


def test_evaluation_is_due_every_so_many_epochs_and_at_the_end(
    tmp_path: Path, converted: Models, small: Small, train: Train, pictures: LabelledImages
) -> None:
    watched, alone = converted(proj_drop_rate=0.2), converted(proj_drop_rate=0.2)
    result = train(watched, small(epochs=5, eval_epochs=2), tmp_path / "watched", evaluate=accuracy(pictures))
    assert [bool(epoch.metrics) for epoch in result.history] == [False, True, False, True, True]
    train(alone, small(epochs=5), tmp_path / "alone")
    assert equal(watched, alone)


def test_the_tracker_gets_the_figures(tmp_path: Path, converted: Models, small: Small, train: Train) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(converted(), small(tracker="tensorboard", max_steps=4, log_steps=2), tmp_path)
    events = EventAccumulator(str(tmp_path / "logs" / "lineate")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4]
    assert {"loss", "lr", "images_per_second"} <= set(events.Tags()["scalars"])


def test_distillation_trains_in_the_loop(tmp_path: Path, converted: Models, small: Small, train: Train) -> None:
    original, config = converted("softmax"), small(epochs=3, distill=Distill(labels=0, logits=1, features=1))
    before = copy.deepcopy(original)
    result = train(converted(), config, tmp_path, objective=objective(config, 5, original))
    assert result.history[-1].losses["features"] < result.history[0].losses["features"]
    assert equal(original, before)


def _poisoned(config: TrainConfig, model: nn.Module, at_step: int, site: str) -> Any:
    """The usual objective, and from a step on one core that answers with infinities."""
    usual, asked = objective(config, 5), [0]

    def poison(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * (torch.inf if asked[0] >= at_step else 1)

    core_modules(model)[site].register_forward_hook(poison)

    def ask(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        asked[0] += 1
        return usual(model, batch)

    return ask


def test_a_loss_that_is_not_finite_stops_before_the_weights(
    tmp_path: Path, converted: Models, small: Small, train: Train
) -> None:
    model, config = converted(), small(checkpoint_steps=3)
    with pytest.raises(TrainError) as stopped:
        train(model, config, tmp_path, objective=_poisoned(config, model, 5, "blocks.1.attn"))
    assert str(stopped.value) == "the loss became nan at step 5; the first core whose output is not finite: blocks.1.attn"
    kept = tmp_path / "checkpoints" / "step_00000003"
    assert stopped.value.__notes__ == [f"{kept} is kept, and resuming goes on from it"] and kept.is_dir()
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def test_a_gradient_that_is_not_finite_stops_too(tmp_path: Path, converted: Models, small: Small, train: Train) -> None:
    """The square root of 0 is 0, and its gradient infinite."""
    config = small()
    usual = objective(config, 5)

    def steep(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        zero = model.get_parameter("norm.weight").sum() * 0
        return {"loss": usual(model, batch)["loss"] + zero.sqrt()}

    with pytest.raises(TrainError, match=r"a gradient became nan at step 1; the first of them: norm\.weight") as stopped:
        train(converted(), config, tmp_path, objective=steep)
    assert stopped.value.__notes__ == ["no checkpoint had been written"]


def test_an_interrupt_says_what_is_kept(tmp_path: Path, converted: Models, small: Small, train: Train) -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        train(converted(), small(), tmp_path, progress=interrupt)
    assert "step_00000005 is kept" in stopped.value.__notes__[0]


@pytest.mark.parametrize("changes", [{}, {"ema": 0.9}, {"protocol": "lora"}, {"precision": "bf16", "accumulate": 2, "batch": 4}])
def test_a_run_resumed_equals_one_never_stopped(
    tmp_path: Path, converted: Models, small: Small, train: Train, changes: dict[str, Any]
) -> None:
    """Stopped in the middle of an epoch, and resumed with another number of workers from a checkpoint within an epoch."""
    config = small(epochs=3, augment=VARIED, checkpoint_steps=2, **changes)
    whole, resumed = (converted(proj_drop_rate=0.2) for _ in range(2))
    expected = train(whole, config, tmp_path / "whole")

    def interrupt(done: int, total: int, what: str) -> None:
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(converted(proj_drop_rate=0.2), config, tmp_path / "part", progress=interrupt)
    found = train(resumed, config.model_copy(update={"workers": 1}), tmp_path / "part", resume=True)
    assert equal(whole, resumed)
    assert [epoch.losses for epoch in found.history] == [epoch.losses for epoch in expected.history]
    assert (found.steps, found.images, found.learning) == (expected.steps, expected.images, expected.learning)


def test_a_finished_run_resumes_to_its_end(tmp_path: Path, converted: Models, small: Small, train: Train) -> None:
    one, again = converted(), converted()
    done = train(one, small(), tmp_path)
    assert train(again, small(), tmp_path, resume=True).history == done.history
    assert equal(one, again)


def test_the_last_k_are_kept_and_the_newest_whole_one_is_found(
    tmp_path: Path, converted: Models, small: Small, train: Train
) -> None:
    whole, resumed, config = converted(), converted(), small(checkpoint_steps=2, keep=3)
    train(whole, config, tmp_path)
    found = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert found == ["step_00000006", "step_00000008", "step_00000010"]
    newest = tmp_path / "checkpoints" / found[-1] / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    (tmp_path / "checkpoints" / found[-2] / checkpoints.STATE).write_text('{"step": 8')
    said: list[str] = []
    train(resumed, config, tmp_path, resume=True, say=said.append)
    assert [line.split(" ")[0] for line in said[:3]] == ["passing", "passing", "resuming"]
    assert "model.safetensors is damaged" in said[0] and f"resuming from {tmp_path}/checkpoints/step_00000006" == said[2]
    assert equal(whole, resumed)


def test_where_the_start_is_kept_a_run_needs_a_whole_checkpoint(
    tmp_path: Path, converted: Models, small: Small, train: Train
) -> None:
    """The start changes no weight, and is the first of the last k; without any whole one the run cannot begin as it did."""
    plain, kept, config = converted(), converted(), small(max_steps=2, checkpoint_steps=1, keep=3)
    train(plain, config, tmp_path / "plain")
    train(kept, config, tmp_path, keep_start=True)
    assert equal(plain, kept)
    found = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert found == ["step_00000000", "step_00000001", "step_00000002"]
    for name in found:
        (tmp_path / "checkpoints" / name / checkpoints.STATE).unlink()
    with pytest.raises(TrainError, match=r"no checkpoint in .* is whole, and this run cannot begin without; --overwrite begins"):
        train(converted(), config, tmp_path, keep_start=True, resume=True)


def test_resuming_without_a_checkpoint_begins(tmp_path: Path, converted: Models, small: Small, train: Train) -> None:
    said: list[str] = []
    assert train(converted(), small(max_steps=2), tmp_path, resume=True, say=said.append).steps == 2
    assert "beginning at the beginning" in said[0]


def test_another_run_is_not_resumed(tmp_path: Path, converted: Models, small: Small, train: Train) -> None:
    train(converted(), small(max_steps=2), tmp_path, about={"source": "embedded"})
    for changes, said in (
        ({"config": small(lr=1e-2)}, "config.lr was 0.001 and is 0.01"),
        ({"model": converted("t5-2layer")}, r"model\.conversion\.mixer\.inner was \"swiglu\" and is \"2layer\""),
        ({"about": {"source": "timm:x"}}, 'about.source was "embedded" and is "timm:x"'),
    ):
        given: dict[str, Any] = {"model": converted(), "config": small(), "about": {"source": "embedded"}} | changes
        with pytest.raises(TrainError, match=f"step_00000002 belongs to another run: .*{said}"):
            train(given.pop("model"), given.pop("config"), tmp_path, resume=True, **given)
    with pytest.raises(TrainError, match="holds a run's checkpoints; resume it, or choose another folder"):
        train(converted(), small(), tmp_path)


@pytest.mark.slow
def test_a_compiled_model_trains(tmp_path: Path, converted: Models, small: Small, train: Train, unchecked_shapes: None) -> None:
    compiled, eager = converted(depth=1), converted(depth=1)
    train(compiled, small(max_steps=2, compile=True), tmp_path / "compiled")
    train(eager, small(max_steps=2), tmp_path / "eager")
    for (name, a), b in zip(compiled.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3, msg=name)
