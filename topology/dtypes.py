"""Which dtype each device holds its weights in, where the user leaves a choice.

A device's figures differ by dtype: a CPU without units for bfloat16 decodes faster in float32, in twice the memory. The
search itself knows one dtype: a device that holds another is put into its terms (`topology.picture.Node.scale`). So a
choice of dtypes is a picture, and pictures are compared by the best plan on each. All of them where devices with a real
choice are few; else all fast, all roomy, and changes of one device of the best plan at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from topology.candidate import Candidate
from topology.errors import ms
from topology.model import DTYPE_BYTES, ModelSpec
from topology.picture import Node, Picture
from topology.plan import device_of

Choice = Mapping[str, str]  # dtypes by `site/device`; the model's own where there is none

#: Choices that are all tried, and changes of one device that are tried at most where there are more.
LISTED: Final = 8
CHANGES: Final = 8
#: What is searched for one choice has this part of the work for all, where work is bounded.
SEARCHES: Final = 4
#: Another dtype than the model's must be this much better at something: what calibration repeats to.
WORTH: Final = 0.02


def allowed(asked: str | tuple[str, ...] | None, checkpoint: str) -> tuple[str, ...]:
    """The dtypes that a device may hold weights in, the one that runs between devices first.

    That is the checkpoint's where it is allowed, else the widest. "auto" is the checkpoint's and whatever holds the
    same numbers: float32 holds those of both dtypes of sixteen bits.
    """
    if asked is None:
        return (checkpoint,)
    if asked == "auto":
        return tuple(dict.fromkeys((checkpoint, "float32")))
    names = (asked,) if isinstance(asked, str) else asked
    return tuple(sorted(names, key=lambda name: (name != checkpoint, -DTYPE_BYTES[name], name)))


@dataclass(frozen=True, slots=True)
class Answer:
    """What planning with one choice gave. `cost` sorts the better first, `used` are the `site/device` keys in use."""

    cost: Any
    used: tuple[str, ...]
    found: Any


def options(pictures: Mapping[str, Picture], own: str) -> dict[str, tuple[str, ...]]:
    """The dtypes of each device that no other of its dtypes is as good as in everything, `own` first.

    `pictures`: the mesh with every device in one dtype; a device that nobody measured in it is missing there.
    """
    nodes = {dtype: nodes_of(picture) for dtype, picture in pictures.items()}
    found: dict[str, tuple[str, ...]] = {}
    for key in sorted(set().union(*nodes.values())):
        there = {dtype: by_key[key] for dtype, by_key in nodes.items() if key in by_key}
        kept: list[str] = []
        for dtype in sorted(there, key=lambda name: (name != own, -DTYPE_BYTES[name], name)):
            if all(_gains(there[dtype], there[other]) for other in kept):
                kept = [*(other for other in kept if _gains(there[other], there[dtype])), dtype]
        found[key] = tuple(kept)
    return found


def choose(
    choices: Mapping[str, tuple[str, ...]],
    pictures: Mapping[str, Picture],
    attempt: Callable[[Choice], Answer | None],
) -> Answer | None:
    """The best answer of `attempt` over the choices that are tried, or None; of equal ones the first tried."""
    fixed = {key: each[0] for key, each in choices.items()}
    free = [key for key, each in choices.items() if len(each) > 1]
    answers: dict[tuple[str, ...], Answer | None] = {}

    def best(many: Iterable[Choice]) -> tuple[Choice, Answer] | None:
        given = []
        for choice in many:
            name = tuple(choice[key] for key in free)
            if name not in answers:
                answers[name] = attempt(choice)
            answer = answers[name]
            if answer is not None:
                given.append((choice, answer))
        return min(given, key=lambda each: each[1].cost, default=None)

    if math.prod(len(choices[key]) for key in free) <= LISTED:
        ways = itertools.product(*(choices[key] for key in free))
        found = best([{**fixed, **dict(zip(free, each, strict=True))} for each in ways])
        return None if found is None else found[1]
    nodes = {dtype: nodes_of(picture) for dtype, picture in pictures.items()}

    def most(figure: Callable[[Node], float]) -> Choice:
        return {**fixed, **{key: max(choices[key], key=lambda d: figure(nodes[d][key])) for key in free}}

    found = best([fixed, most(lambda node: node.speed), most(lambda node: node.usable_bytes)])
    for _ in range(CHANGES if found is not None else 0):
        assert found is not None
        used = [key for key in free if key in found[1].used]
        changed = [{**found[0], key: dtype} for key in used for dtype in choices[key]]
        fresh = [choice for choice in changed if tuple(choice[key] for key in free) not in answers]
        other = best(fresh[:1])
        if other is not None and other[1].cost < found[1].cost:
            found = other
    return None if found is None else found[1]


def reasons(
    chosen: Candidate, choices: Mapping[str, tuple[str, ...]], pictures: Mapping[str, Picture], model: ModelSpec
) -> tuple[str, ...]:
    """A sentence for every device of the plan that holds another dtype, or might have: what each would be like."""
    nodes = {dtype: nodes_of(picture) for dtype, picture in pictures.items()}
    lines = []
    for node in (node for each in chosen.fits for node in each.nodes):
        key = f"{node.site}/{device_of(node.name)}"
        taken = node.dtype or model.dtype
        others = [dtype for dtype, by_key in nodes.items() if dtype != taken and key in by_key]
        if others and (node.dtype or len(choices[key]) > 1):
            told = ", ".join(f"{_told(nodes[dtype][key], model)} in {dtype}" for dtype in others)
            lines.append(f"{key} holds its weights in {taken}, {_told(nodes[taken][key], model)}; it would be {told}")
    return tuple(lines)


def nodes_of(picture: Picture) -> dict[str, Node]:
    """The devices of a picture by `site/device`."""
    return {node.key: node for nodes in picture.nodes.values() for node in nodes}


def _gains(new: Node, old: Node) -> bool:
    """Whether the one dtype is better than the other at anything, by as much as is worth it."""
    pairs = [(new.speed, old.speed), (new.flops, old.flops), (new.usable_bytes, old.usable_bytes)]
    pairs += [(old.layer_s or 0.0, new.layer_s or 0.0), (old.row_s, new.row_s)]
    return any(better > other * (1 + WORTH) for better, other in pairs)


def _told(node: Node, model: ModelSpec) -> str:
    took_s = model.layer_bytes / node.speed + (node.layer_s or 0.0)
    return f"{ms(took_s)} a layer and room for {node.usable_bytes // model.layer_bytes} layers"
