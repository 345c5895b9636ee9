"""Whether a picture shows what its prompt says, by the objects found in it: GenEval's rules.

    count      at least so many of the class; of them the surest, as many as asked for, are asked for colour and place
    colour     all of these have it
    position   every one of these stands so to every one of the other clause, which must itself have been met
    exclude    fewer of the class than it counts

The relation of box a to box b, from their centres c and their widths and heights d, is read off

    off = c_a - c_b,  rev = sign(off)·max(|off| - 0.1·(d_a + d_b), 0),  (dx, dy) = rev / ‖off‖

left of below dx = -0.5, right of above 0.5, above and below likewise by dy, none if both |rev| < 0.001. Two can hold at once.
Source: Ghosh et al., arXiv 2310.11513, and the published evaluation of that paper, read for facts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lineate.mixers.base import Frozen
from lineate.text2image.prompts import Clause, Prompt, Relation

Box = tuple[float, float, float, float]  # left, top, right, bottom, in px, y down


class Found(Frozen):
    """An object in a picture: its class, box, and how sure it is."""

    kind: str
    box: Box
    score: float
    color: str | None = None


def relations(a: Box, b: Box) -> set[Relation]:
    """How a lies to b."""
    off = [(a[k] + a[k + 2]) / 2 - (b[k] + b[k + 2]) / 2 for k in (0, 1)]
    dims = [abs(a[k + 2] - a[k]) + abs(b[k + 2] - b[k]) for k in (0, 1)]
    revised = [math.copysign(max(abs(o) - 0.1 * d, 0), o) for o, d in zip(off, dims, strict=True)]
    if max(map(abs, revised)) < 1e-3:
        return set()
    dx, dy = (r / math.hypot(*off) for r in revised)
    held: dict[Relation, bool] = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation, holds in held.items() if holds}


def faults(prompt: Prompt, found: Sequence[Found], color_of: Callable[[Found], str | None] | None = None) -> list[str]:
    """What is wrong with a picture in which `found` was found; nothing if it shows the prompt.

    Asks `color_of` (default: what the object itself says) only of those objects whose colour the prompt asks for.
    """
    color_of = color_of or (lambda thing: thing.color)
    ordered = sorted(found, key=lambda thing: -thing.score)  # stable: of equals the first
    reasons: list[str] = []
    groups: list[list[Found] | None] = []
    for clause in prompt.include:
        chosen = [thing for thing in ordered if thing.kind == clause.kind][: clause.count]
        fault = _fault(clause, chosen, groups, color_of)
        groups.append(chosen if fault is None else None)
        reasons += [fault] if fault is not None else []
    for clause in prompt.exclude:
        number = sum(thing.kind == clause.kind for thing in found)
        if number >= clause.count:
            reasons.append(f"expected {clause.kind}<{clause.count}, found {number}")
    return reasons


def _fault(
    clause: Clause, chosen: Sequence[Found], groups: Sequence[Sequence[Found] | None], color_of: Callable[[Found], str | None]
) -> str | None:
    if len(chosen) < clause.count:
        return f"expected {clause.kind}>={clause.count}, found {len(chosen)}"
    if clause.color is not None:
        colors = [color_of(thing) for thing in chosen]
        if colors.count(clause.color) < clause.count:
            return f"expected {clause.color} {clause.kind}>={clause.count}, found {', '.join(map(str, colors))}"
    if clause.position is not None:
        relation, index = clause.position
        others = groups[index]
        if others is None:
            return f"no target for {clause.kind} to be {relation}"
        for true in (relations(a.box, b.box) for a in chosen for b in others):
            if relation not in true:
                return f"expected {clause.kind} {relation} {others[0].kind}, found {' and '.join(sorted(true)) or 'neither'}"
    return None
