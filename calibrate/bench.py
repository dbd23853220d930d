"""Times of every kind of pass of the decoder, over a grid of shapes.

A pass ends with what an engine needs of it: a denoise pass commits and a decode pass chooses its tokens, both on the
host.

Repetitions are interleaved: each goes over all points before the next begins, so that a disturbance is spread over many
points instead of spoiling one. A point that does not fit into memory is skipped and noted.
"""

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

import torch

from calibrate.generate import GREEDY, Blocks
from calibrate.graphs import Passes
from calibrate.journal import Journal
from calibrate.machine import Stopwatch, free_bytes
from calibrate.model import Segment, TowerCaches, TwoTower
from calibrate.shapes import Point, Sizes, cache_bytes, context_of, contexts_of, new_tokens

Samples = dict[Point, list[float]]
Skipped = dict[Point, str]
WARM_UP = 2
USABLE = 0.9  # share of the free memory that a cache may take


class Bench:
    """Prepares and runs the passes of points that share a context; the cache is filled with noise, not with text."""

    def __init__(self, model: TwoTower, at_context: int, seed: int, graphs: bool) -> None:
        self.model, self.at_context, self._seed, self._graphs = model, at_context, seed, graphs
        self.watch = Stopwatch(model.device, model.denoiser_device)
        self._caches: TowerCaches | None = None
        self._passes: Passes | None = None

    def room(self, points: list[Point]) -> None:
        """A cache that holds any of ``points``."""
        size = self.model.config.block_size
        tokens = max(contexts_of(p, self.at_context)[-1] + 2 * new_tokens(p, size) for p in points)
        self.release()
        self._caches = self.model.cache(max(p.sequences for p in points) + 1, tokens)
        self._passes = Passes(self.model, self._caches, self._graphs)
        for cache in {id(c): c for c in (self._caches.context, self._caches.denoiser)}.values():
            generator = torch.Generator(cache.device).manual_seed(self._seed)
            for tensor in [*cache.keys.values(), *cache.values.values(), *cache.conv.values(), *cache.ssm.values()]:
                tensor.normal_(generator=generator)

    def release(self) -> None:
        """Give the memory of the cache back to its devices."""
        self._caches = self._passes = None
        torch.cuda.empty_cache()

    def time(self, point: Point) -> float:
        """Seconds of one pass of the shape of ``point``."""
        assert self._caches is not None
        for cache in (self._caches.context, self._caches.denoiser):
            cache.lengths.fill_(context_of(point, self.at_context))
            cache.lengths[: point.sequences] = torch.tensor(contexts_of(point, self.at_context), device=cache.device)
        return self.watch(self._work(point))

    def _work(self, point: Point) -> Callable[[], Any]:
        model, caches, passes = self.model, self._caches, self._passes
        assert caches is not None
        assert passes is not None
        rows, size = torch.arange(point.sequences, device=model.device), model.config.block_size
        if point.kind == "denoise":
            rows = rows.to(model.denoiser_device)
            blocks = Blocks(model, point.sequences, 0.5, size, point.block_size)
            blocks.ids[:] = self._ids(point.sequences, point.block_size)
            return lambda: [column.tolist() for column in blocks.denoise(rows, passes, GREEDY)]
        if point.kind == "extend":
            ids = self._ids(point.sequences, point.block_size)
            return lambda: passes.extend(ids, rows)
        if point.kind == "decode":
            latest = self._ids(point.sequences, 1)[:, 0]
            return lambda: GREEDY.choose(passes.decode(latest, rows))[0].tolist()
        if point.kind == "transfer":
            segment = Segment(rows, self._ids(point.sequences, point.tokens))
            return lambda: caches.update([segment])
        if point.kind == "prefill":
            prompts = self._ids(point.sequences, point.tokens)
            return lambda: model.prefill(list(prompts), range(point.sequences), caches)
        extends = point.kind == "extend+prefill"
        beside = Segment(rows, self._ids(point.sequences, size if extends else 1))
        segments = [beside, Segment(rows[-1:] + 1, self._ids(1, point.tokens))]
        if extends:
            return lambda: model.context_pass(segments, caches)
        return lambda: GREEDY.choose(model.last_logits(segments, caches))[0].tolist()

    def _ids(self, *shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self._seed)
        low = self.model.config.mask_token_id + 1
        return torch.randint(low, self.model.config.vocab_size, shape, generator=generator).to(self.model.device)


def measure(
    bench: Bench, sizes: Sizes, points: Iterable[Point], repetitions: int, journal: Journal, done: Callable[[int], Any]
) -> tuple[Samples, Skipped]:
    """Samples of every point, from the journal where it has them. ``done`` hears how many more samples there are."""
    samples: Samples = {}
    skipped: Skipped = {}
    by_context = sorted(points, key=lambda p: (context_of(p, bench.at_context), p.kind, p.values))
    for _, group in groupby(by_context, key=lambda p: context_of(p, bench.at_context)):
        todo = []
        for point in group:
            known = [journal.get(point.kind, point.values, i) for i in range(repetitions)]
            samples[point] = [seconds for seconds in known if seconds is not None]
            if why := journal.get(point.kind, point.values, "skipped"):
                skipped[point] = why
            elif len(samples[point]) < repetitions:
                todo.append(point)
                continue
            done(repetitions)
        _measure_group(bench, sizes, todo, repetitions, journal, done, samples, skipped)
    return {point: of for point, of in samples.items() if point not in skipped}, skipped


def _measure_group(bench, sizes, todo, repetitions, journal, done, samples: Samples, skipped: Skipped) -> None:
    """Points of one context, round by round; as many share a cache as fit into memory together."""

    def skip(point: Point, why: str) -> None:
        skipped[point] = why
        journal.add(why, point.kind, point.values, "skipped")
        done(repetitions - len(samples[point]))

    def needed(points: list[Point]) -> int:
        return cache_bytes(points, bench.at_context, sizes, bench.model.config.block_size)

    bench.release()  # what the last context took is free for this one
    free = min(free_bytes(device) for device in (bench.model.device, bench.model.denoiser_device))
    groups: list[list[Point]] = []
    for point in todo:
        if (size := needed([point])) > USABLE * free:
            skip(point, f"out of memory: the cache takes {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
            continue
        fitting = (group for group in groups if needed([*group, point]) <= USABLE * free)
        group = next(fitting, None)
        if group is None:
            groups.append(group := [])
        group.append(point)
    for group in groups:
        _measure_together(bench, group, repetitions, journal, done, samples, skip)


def _measure_together(bench, group, repetitions, journal, done, samples: Samples, skip: Callable) -> None:
    bench.room(group)
    for repetition in range(-WARM_UP, repetitions):
        for point in list(group):
            if 0 <= repetition < len(samples[point]):
                continue
            try:
                seconds = bench.time(point)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                torch.cuda.empty_cache()
                skip(point, f"out of memory: {str(error).splitlines()[0]}")
                group.remove(point)
                continue
            if repetition >= 0:
                samples[point].append(seconds)
                journal.add(seconds, point.kind, point.values, repetition)
                done(1)


def out_of_memory(error: RuntimeError) -> bool:
    """CUDA has a class for it; the CPU's allocator only says so."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
