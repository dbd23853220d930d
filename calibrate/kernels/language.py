"""Triton where it is installed; elsewhere names that let the kernels be defined, though not launched."""

from importlib.util import find_spec
from typing import Any

__all__ = ["dot", "jit", "tl", "triton"]

if find_spec("triton"):
    import triton
    import triton.language as tl

    jit = triton.jit
    INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
else:

    class _Absent:
        def __getattr__(self, name: str) -> Any:
            raise ImportError("the kernels need Triton, which is not installed (it is made for Linux)")

        __getitem__ = __getattr__  # a launch

    triton, tl, INTERPRETED = _Absent(), None, None

    def jit(fn: Any) -> Any:
        return triton


@jit
def dot(a, b):
    """a @ b in fp32; never in tf32, to which fp32 operands are rounded by default.

    The interpreter keeps bf16 as its raw bits, which its ``tl.dot`` multiplies as integers, so it widens them first.
    """
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")
