"""Random numbers with a key instead of a position: the same request gets the same luck whatever happens around it.

A key is mixed by the finaliser of SplitMix64 (Steele, Lea & Flood, 2014), a bijection of 64 bits that passes
statistical tests on counters, so that the draw of (seed, stream, request, block) needs no state.
"""

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1

STREAMS = {"difficulty": 1, "steps": 2, "sizes": 3, "router": 4, "spread": 5, "arrivals": 6, "input": 7, "output": 8,
           "class": 9, "acceptance": 10, "states": 11, "noise": 12, "kind": 13, "reuse": 14, "age": 15, "turns": 16,
           "wait": 17, "part": 18, "design": 19}  # fmt: skip
"""One number for each use, so that no two uses ever share a draw."""


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniform(seed: int, stream: str, *key: np.ndarray | int) -> np.ndarray:
    """Uniforms in [0, 1), float64, one for each key; the key's parts are integers and broadcast."""
    state: np.ndarray = np.asarray((seed * _GOLDEN + STREAMS[stream]) & _MASK, np.uint64)
    with np.errstate(over="ignore"):
        for part in key:
            state = _mix(state) * np.uint64(_GOLDEN) + np.asarray(part).astype(np.uint64)
        return (_mix(_mix(state)) >> np.uint64(11)) * 2.0**-53


def uniform_one(seed: int, stream: str, *key: int) -> float:
    """The same draw for one key, in plain integers: faster where an event needs just one."""

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
        return z ^ (z >> 31)

    state = (seed * _GOLDEN + STREAMS[stream]) & _MASK
    for part in key:
        state = (mix(state) * _GOLDEN + part) & _MASK
    return (mix(mix(state)) >> 11) * 2.0**-53


def seed_of(seed: int, name: str) -> int:
    """A seed of its own for a named part of something drawn."""
    return int(uniform_one(seed, "part", *name.encode()) * 2**53)


def generator(seed: int, stream: str, *key: int) -> np.random.Generator:
    """A sequential generator, where a whole workload is drawn at once."""
    return np.random.default_rng([STREAMS[stream], seed, *key])
