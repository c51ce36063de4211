"""Arrays of other libraries, through DLPack: taken as they lie, and results given back in their kind."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_tensor(name: str, value: Any) -> Any:
    """A tensor on the memory of an array that has ``__dlpack__`` (NumPy, CuPy, JAX, ...); all else comes back as it is.

    Raises TypeError where the array cannot be shared, e.g. for a dtype that torch has not.
    """
    if value is None or isinstance(value, (Tensor, float, int, str)) or not hasattr(value, "__dlpack__"):
        return value
    kind = f"{type(value).__module__}.{type(value).__name__}"
    try:
        if isinstance(value, np.ma.MaskedArray):
            raise TypeError("it has a mask of its own, which would be lost")
        if isinstance(value, np.ndarray):
            # Read-only NumPy arrays do not export through DLPack; nothing here writes into arguments.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                return torch.from_numpy(value)
        return torch.from_dlpack(value)
    except (AttributeError, TypeError, ValueError, RuntimeError, BufferError) as error:
        raise TypeError(f"{name}: this {kind} cannot be taken as a tensor: {error}") from error


def is_read_only(value: Any) -> bool:
    """Whether memory that a tensor is made of may not be written: an array that says so, or that cannot say."""
    if value is None or isinstance(value, Tensor):
        return False
    return not (isinstance(value, np.ndarray) and value.flags.writeable)


def in_kind(result: Any, like: Any) -> Any:
    """The tensors of a result as arrays of the same library as ``like``, on the same memory where the device allows.

    Equals ``type(result)(*(xp.from_dlpack(t) for t in result))`` with ``xp`` the array library of ``like``.

    Args:
        result: a tensor, or a tuple of tensors such as :class:`urm_kernels.TopK`; None stays None.
        like: an array that has ``__array_namespace__`` (NumPy, CuPy, JAX, ...), or a tensor.

    Raises TypeError for anything else. Gradients end here: tensors are detached.
    """
    if result is None or isinstance(like, Tensor):
        return result
    if isinstance(result, tuple):
        return type(result)(*(in_kind(part, like) for part in result))
    result = result.detach()
    if isinstance(like, np.ndarray):
        return result.numpy(force=True)
    if not hasattr(like, "__array_namespace__"):
        raise TypeError(f"like: an array with __array_namespace__ or a tensor is wanted, {type(like).__name__} came")
    return like.__array_namespace__().from_dlpack(result)
