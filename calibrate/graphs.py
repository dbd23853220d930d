"""Passes as CUDA graphs, one for each kind and batch, captured when first asked for; elsewhere the passes themselves.

A graph replays fixed addresses: the pass reads static copies of its arguments, and the cache in place. What warming up
and capturing write lands in the cache's spare slot, its last, which no sequence uses.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from calibrate.model import TowerCaches, TwoTower

WARM_UP = 3  # calls before the capture: kernels compile, workspaces are allocated


class Passes:
    """The passes of a model over one pair of caches. The next call may overwrite the output of the one before."""

    def __init__(self, model: TwoTower, caches: TowerCaches, graphs: bool = True) -> None:
        self.model, self.caches = model, caches
        # a pass that crosses devices is two graphs and a copy between them: not worth it beside its transfer
        self._graphs = graphs and model.device.type == "cuda" and not model.split
        self._pool: Any = None  # of all graphs: an output is read before the next pass
        self._captured: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], Any]] = {}

    def denoise(self, ids: Tensor, rows: Tensor, masked: Tensor) -> Tensor:
        return self._run("denoise", self.model.denoise, ids, rows, masked)

    def extend(self, ids: Tensor, rows: Tensor) -> None:
        self._run("extend", self.model.extend, ids, rows)

    def decode(self, ids: Tensor, rows: Tensor) -> Tensor:
        return self._run("decode", self.model.decode, ids, rows)

    def _run(self, kind: str, call: Callable, *arguments: Tensor) -> Any:
        if not self._graphs:
            return call(*arguments, self.caches)
        key = kind, tuple(arguments[0].shape)
        if key not in self._captured:
            self._captured[key] = self._capture(call, arguments)
        graph, inputs, output = self._captured[key]
        for static, argument in zip(inputs, arguments, strict=True):
            static.copy_(argument)
        graph.replay()
        return output

    def _capture(self, call: Callable, arguments: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Any]:
        cache, device = self.caches.context, self.model.device
        inputs = [argument.to(device, copy=True) for argument in arguments]
        inputs[1].fill_(cache.slots - 1)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device), torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                cache.lengths[-1] = 0
                call(*inputs, self.caches)
            cache.lengths[-1] = 0
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=self._pool):
            output = call(*inputs, self.caches)
        return graph, inputs, output
