"""Hash ids of blocks that mean something in one scope only, as in one session, made into ids of the whole file."""

from collections.abc import Hashable, Iterable
from itertools import count

from twotower_sim.errors import InputError


class LocalHashes:
    """New ids are equal where scopes are and all ids up to there."""

    def __init__(self) -> None:
        self._next = count()
        self._new: dict[tuple[int, Hashable], int] = {}
        self._scopes: dict[Hashable, int] = {}

    def __call__(self, scope: Hashable, ids: Iterable[Hashable]) -> list[int]:
        at = self._scopes.setdefault(scope, -1 - len(self._scopes))
        out = []
        for id in ids:
            if type(id) is not int:
                raise InputError("hash_ids: expected a list of whole numbers of 64 bits")
            key = (at, id)
            if (new := self._new.get(key)) is None:
                new = self._new[key] = next(self._next)
            out.append(at := new)
        return out

    def forget(self) -> None:
        """Scopes that no further row is in."""
        self._new.clear()
        self._scopes.clear()
