"""Triton's interpreter, mended where version 3.6 computes something else than the compiler.

Importing this module, before any kernel, turns the interpreter on for the whole process.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from urm_kernels.backends.canonical import fma32

unmended = {name: getattr(InterpreterBuilder, name) for name in ("create_fma", "create_dot", "create_fp_to_fp")}
unmended_conversion = interpreter._convert_float


def _create_fma(self, x, y, z):
    """One rounding; the interpreter rounds the product as well."""
    if x.data.dtype != np.float32:
        raise NotImplementedError(f"fma of {x.data.dtype}")
    operands = (torch.from_numpy(np.ascontiguousarray(handle.data)) for handle in (x, y, z))
    return TensorHandle(fma32(*operands).numpy(), z.dtype.scalar)


def _create_dot(self, a, b, *rest):
    """bfloat16 is held as its 16 bits, which the interpreter multiplies as integers."""

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle(_convert_float(handle.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32)

    return unmended["create_dot"](self, widened(a), widened(b), *rest)


def _convert_float(values, source, target, rounding):
    """Bits of `target`: denormal bfloat16 are numbers, and rounding to it is to nearest, not towards zero."""
    if (source, target) == (tl.bfloat16, tl.float32):
        return values.view(np.uint16).astype(np.uint32) << 16
    if (source, target) == (tl.float32, tl.bfloat16):
        nearest = torch.from_numpy(np.ascontiguousarray(values)).view(torch.float32).bfloat16()
        return nearest.view(torch.int16).numpy().view(np.uint16)
    return unmended_conversion(values, source, target, rounding)


def _create_fp_to_fp(self, src, *rest):
    """The largest number of float8 e4m3's bits is NaN; the interpreter takes it for 480."""
    result = unmended["create_fp_to_fp"](self, src, *rest)
    if src.dtype.scalar == tl.float8e4nv:
        nan = {tl.float32: np.float32("nan"), tl.bfloat16: np.uint16(0x7FC0)}[result.dtype.scalar]
        result.data = np.where((src.data & 0x7F) == 0x7F, nan, result.data)
    return result


def mend():
    InterpreterBuilder.create_fma, InterpreterBuilder.create_dot = _create_fma, _create_dot
    InterpreterBuilder.create_fp_to_fp = _create_fp_to_fp
    interpreter._convert_float = _convert_float


mend()
