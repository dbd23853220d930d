"""Pareto fronts."""

from collections.abc import Sequence


def front(keys: Sequence[tuple[float, ...]]) -> list[int]:
    """Indices, by their keys, of those than which no other is at most as large in all parts and smaller in one."""
    found: list[int] = []
    for index in sorted(range(len(keys)), key=keys.__getitem__):  # nothing is beaten by what comes after it
        if not any(_beats(keys[other], keys[index]) for other in found):
            found.append(index)
    return found


def _beats(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))
