"""A device called ``stand_in`` whose memory is the CPU's: what a GPU refuses is refused, on a machine without one.

`URM_TEST_DEVICE=stand_in` runs the tests on it. A tensor of this device holds a CPU tensor; every operation runs on
what its arguments hold, unless a CPU tensor is among them, which is an error as it is beside CUDA tensors (numbers
without dimensions, indices and copies are free to cross). It stands in for no kernel, and knows no compiler.
"""

import torch
from torch.utils._pytree import tree_leaves, tree_map

from urm_kernels.float_mode import default_float_mode

CPU = torch.device("cpu")
aten = torch.ops.aten
CROSSING = {aten.copy_, aten._copy_from, aten._to_copy}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}  # by their second argument
FACTORIES = ("empty.memory_format", "empty_strided", "_efficientzerotensor")
FACTORIES += ("arange", "arange.start", "arange.start_step")  # which would resize an empty tensor


class StandIn(torch.Tensor):
    @staticmethod
    def __new__(cls, held):
        layout = {"layout": held.layout, "dtype": held.dtype, "device": "stand_in:0"}
        if not held.is_sparse:
            layout |= {"strides": held.stride(), "storage_offset": held.storage_offset()}
        out = torch.Tensor._make_wrapper_subclass(cls, held.shape, **layout)
        out.held = held
        return out

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        if op.namespace == "urm_kernels":
            below = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
            return op.redispatch(below, *args, **(kwargs or {}))
        return run(op, *args, **(kwargs or {}))

    def tolist(self):
        return self.cpu().tolist()

    def __repr__(self, **options):
        return f"StandIn({self.cpu()!r})"


def run(op, *args, **kwargs):
    """The operation on what its arguments hold; results that are held already keep their tensor."""
    outer = {id(x.held): x for x in tree_leaves((args, kwargs)) if isinstance(x, StandIn)}
    here = "device" not in kwargs or torch.device(kwargs["device"] or "stand_in").type == "stand_in"
    if "device" in kwargs:
        kwargs["device"] = "cpu" if here else kwargs["device"]
    _refuse_strangers(op, (args[:1] + args[2:] if op.overloadpacket in INDEXED else args, kwargs))
    with default_float_mode(CPU):  # a GPU does not follow the CPU's flush-to-zero mode
        result = op(*tree_map(_held, args), **tree_map(_held, kwargs))
    for x in outer.values():
        assert x.shape == x.held.shape, f"{op} resized its argument, which the stand-in device cannot follow"
    if not here:
        return result

    def wrapped(x):
        if not isinstance(x, torch.Tensor):
            return x
        return outer[id(x)] if id(x) in outer else StandIn(x)

    return tree_map(wrapped, result)


def _held(x):
    return x.held if isinstance(x, StandIn) else x


def _refuse_strangers(op, values):
    for x in tree_leaves(values):
        if isinstance(x, torch.Tensor) and not isinstance(x, StandIn) and x.dim() and op.overloadpacket not in CROSSING:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, stand_in:0 and "
                f"{x.device}, in {op}"
            )


def _copy_from(source, target, non_blocking=False):
    _held(target).copy_(_held(source))
    return target


def _factory(op):
    return lambda *args, **kwargs: StandIn(op(*args, **{**kwargs, "device": "cpu"}))


def register():
    """Makes the device known to this process for as long as what is returned lives."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend  # since torch 2.10

    _setup_privateuseone_for_python_backend("stand_in")
    library = torch.library.Library("aten", "IMPL")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    for name in FACTORIES:
        packet, _, overload = name.partition(".")
        library.impl(name, _factory(getattr(getattr(aten, packet), overload or "default")), "PrivateUse1")
    fallback = torch.library.Library("_", "IMPL")
    fallback.fallback(run, "PrivateUse1")
    return library, fallback
