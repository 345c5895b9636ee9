"""What a model or a block was called with: taken down while it runs, taken apart into single examples, put together again.

Tensors whose first axis is as long as the first tensor's are examples along it; all else belongs to every example alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """Arguments by place and by name."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def of(self, function: Callable[..., Any]) -> Any:
        """What `function` gives for them."""
        return function(*self.args, **self.kwargs)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor, in order; dictionaries are looked through."""
        return _tensors([*self.args, self.kwargs])

    def to(self, device: torch.device | str) -> Call:
        """The same, every tensor on `device`."""
        return _mapped(lambda tensors: tensors[0].to(device), [self])

    def __len__(self) -> int:
        """How many examples."""
        return len(next(self.tensors()))

    def each(self) -> Iterator[Call]:
        """One call an example."""
        count = len(self)

        def row(number: int, tensors: list[Tensor]) -> Tensor:
            (tensor,) = tensors
            return tensor[number : number + 1] if tensor.ndim and len(tensor) == count else tensor

        yield from (_mapped(partial(row, number), [self]) for number in range(count))


def together(calls: list[Call]) -> Call:
    """One call of all examples of `calls`, whose shapes are the same but for the first axis; what belongs to all must be equal.

    Raises ValueError where a tensor that belongs to every example is not the same in all calls.
    """
    counts = [len(call) for call in calls]

    def join(tensors: list[Tensor]) -> Tensor:
        if all(tensor.ndim and len(tensor) == count for tensor, count in zip(tensors, counts, strict=True)):
            return torch.cat(tensors)
        if any(not torch.equal(tensor, tensors[0]) for tensor in tensors[1:]):
            raise ValueError(f"calls of one shape differ in a tensor {tuple(tensors[0].shape)} that every example shares")
        return tensors[0]

    return _mapped(join, calls)


def grouped(calls: Iterable[Call], most: int) -> Iterator[Call]:
    """Calls of `most` examples from those of one, each of one shape, however they arrived; the rest comes last."""
    waiting: dict[tuple[torch.Size, ...], list[Call]] = {}
    for call in calls:
        shapes = tuple(tensor.shape for tensor in call.tensors())
        same = waiting.setdefault(shapes, [])
        same.append(call)
        if len(same) == most:
            yield together(waiting.pop(shapes))
    yield from map(together, waiting.values())


@contextmanager
def listening(modules: Iterable[nn.Module], note: Callable[[Call], None]) -> Iterator[None]:
    """Call `note` with what each of the modules is called with, before it runs."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        note(Call(args, kwargs))

    with ExitStack() as stack:
        for module in modules:  # ahead of a hook by which a host's attention gets its CPE
            stack.callback(module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True).remove)
        yield


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _mapped(function: Callable[[list[Tensor]], Tensor], calls: list[Call]) -> Call:
    """A call with `function` of the tensors that stand at the same place in all of `calls`."""

    def at(values: list[Any]) -> Any:
        first = values[0]
        if isinstance(first, Tensor):
            return function(values)
        if isinstance(first, dict):
            return {key: at([value[key] for value in values]) for key in first}
        return type(first)(at(list(parts)) for parts in zip(*values, strict=True)) if isinstance(first, list | tuple) else first

    return Call(at([call.args for call in calls]), at([call.kwargs for call in calls]))
