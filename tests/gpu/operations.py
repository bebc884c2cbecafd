"""Every operation on a pretended GPU: which devices meet in it, where its results lie, whether the host waits."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gpu.pretended import CPU, Gpu, Refused, tensors_in

WAITS = frozenset(
    (
        "_local_scalar_dense", "nonzero", "nonzero_numpy", "argwhere", "masked_select", "masked_scatter", "equal",
        "is_nonzero", "_unique2", "unique_consecutive", "unique_dim", "bincount", "histc", "_linalg_check_errors",
    )
)  # fmt: skip
"""Operations whose CUDA kernels bring a number or a size back to the host."""
NO_KERNEL = frozenset(
    (
        "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "detach_", "alias", "lift",
        "lift_fresh", "set_", "resize_", "_reshape_alias", "is_same_size", "sym_size", "sym_stride", "sym_numel",
        "prim_layout", "_fused_sdp_choice", "result_type", "_has_compatible_shallow_copy_type", "_local_scalar_dense",
    )
)  # fmt: skip
"""Operations that launch nothing."""
ANY_DEVICE = frozenset(("copy_", "_to_copy", "set_", "is_same_size", "_has_compatible_shallow_copy_type"))
"""Operations that may name tensors of several devices."""
TAKES_NUMBERS = frozenset(
    ("where", "fill", "fill_", "masked_fill", "masked_fill_", "lerp", "clamp", "clamp_")
)
"""Beside the pointwise ones: where a tensor of one number may lie on the host."""
BY_INDEX = frozenset(("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"))


class Operations(TorchDispatchMode):
    """Checks and counts what reaches the dispatcher, from Python and from C++."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpu, kwargs = self.gpu, dict(kwargs or {})
        if gpu.silent:
            return func(*args, **kwargs)
        name = getattr(getattr(func, "overloadpacket", func), "__name__", str(func))
        wanted = kwargs.get("device")
        wanted = None if wanted is None else torch.device(wanted)
        if wanted is not None and wanted.type == "cuda":
            kwargs["device"] = CPU
        tensors = tensors_in((args, kwargs))
        homes = [gpu.of(x) for x in tensors]
        home = next((h for h in homes if h.type == "cuda"), None)
        if wanted is not None and wanted.type == "cuda":
            home = gpu.numbered(wanted)
        if home is None:
            return self.on_the_host(func, args, kwargs, tensors)
        if name not in ANY_DEVICE and not name.startswith("_foreach"):
            self.check(func, name, args, tensors, homes)
        out = func(*args, **kwargs)
        if name == "copy_":
            home = homes[0]
            if {h.type for h in homes} == {"cpu", "cuda"}:
                gpu.copied(tensors[-1], home, waits=not _without_waiting(args, kwargs))
                return out
        self.count(func, name, args, kwargs, home)
        return self.placed(func, out, tensors, home)

    def on_the_host(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """An operation of CPU tensors alone; what C++ makes from nothing inside a GPU tensor's call lies with it."""
        out = func(*args, **kwargs)
        if not tensors and self.gpu.home_of_new is not None:
            for x in tensors_in(out):
                self.gpu.put(x, self.gpu.home_of_new)
        return out

    def check(
        self, func: Any, name: str, args: Any, tensors: list[Tensor], homes: list[torch.device]
    ) -> None:
        """Refuses tensors of two devices where CUDA would."""
        first = next((h for h in homes if h.type == "cuda"), homes[0] if homes else CPU)
        takes_numbers = torch.Tag.pointwise in func.tags or name in TAKES_NUMBERS
        for tensor, home in zip(tensors, homes, strict=True):
            if home == first or (home.type == "cpu" and tensor.ndim == 0 and takes_numbers):
                continue
            if home.type == "cpu" and name in BY_INDEX and homes[0].type == "cuda":
                values = args[2] if len(args) > 2 else None
                if tensor is not values or tensor.ndim == 0:
                    if tensor is not values:
                        self.gpu.sync("an index in host memory")
                    continue
            if home.type == "cpu" and "rng_state" in name:
                continue
            raise Refused(
                f"Expected all tensors to be on the same device, but found at least two devices, {first} and {home}! "
                f"({func}, shapes {[tuple(t.shape) for t in tensors]})"
            )

    def count(self, func: Any, name: str, args: Any, kwargs: Any, home: torch.device) -> None:
        """Counts a launch, and a wait where there is one."""
        if name in WAITS or (name == "repeat_interleave" and not kwargs.get("output_size")):
            self.gpu.sync(name)
        if name in BY_INDEX:
            one = len(args) > 2 and args[2].numel() == 1 and self.gpu.of(args[2]).type == "cpu"
            masks = [x for x in args[1] if isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)]
            if masks and not one:
                self.gpu.sync(f"{name} by booleans")
        if name not in NO_KERNEL and not is_view(func):
            self.gpu.launch(name, home)

    def placed(self, func: Any, out: Any, tensors: list[Tensor], home: torch.device) -> Any:
        """The results, at home; a result in an argument's memory stays where that is."""
        known = {torch.Tensor.untyped_storage(x)._cdata for x in tensors} if shares_memory(func) else set()
        for x in tensors_in(out):
            if torch.Tensor.untyped_storage(x)._cdata not in known:
                self.gpu.put(x, home)
        return out


def _without_waiting(args: Any, kwargs: Any) -> bool:
    return bool(kwargs.get("non_blocking", args[2] if len(args) > 2 else False))


@cache
def writes(func: Any) -> bool:
    """Whether an operation writes into an argument."""
    return any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)


@cache
def is_view(func: Any) -> bool:
    """Whether an operation only looks at an argument's memory in another way."""
    return not writes(func) and any(r.alias_info is not None for r in func._schema.returns)


@cache
def shares_memory(func: Any) -> bool:
    """Whether a result may lie in an argument's memory."""
    return writes(func) or is_view(func)
