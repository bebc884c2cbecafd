"""What Python asks of tensors on a pretended GPU: where they are, moves, and new tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gpu.pretended import CPU, Gpu, Refused, tensors_in

COPIES = (torch.tensor, torch.as_tensor, torch.asarray)
"""What makes a tensor of the host's numbers: on a device, a copy that waits."""
EMPTY = (
    torch.empty,
    torch.empty_like,
    torch.empty_strided,
    torch.Tensor.new_empty,
    torch.Tensor.new_empty_strided,
)
"""What makes a tensor without a kernel."""
INTO_FP32 = (torch.mm, torch.addmm, torch.bmm, torch.baddbmm)
"""Products of narrow matrices that CUDA can write in fp32 (``out_dtype``)."""


class Asked(TorchFunctionMode):
    """Answers for a pretended GPU; all else goes to the real function."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu
        self.answers: dict[Any, Callable[..., Any]] = {
            torch.Tensor.device.__get__: gpu.of,
            torch.Tensor.is_cuda.__get__: lambda x: gpu.of(x).type == "cuda",
            torch.Tensor.is_cpu.__get__: lambda x: gpu.of(x).type == "cpu",
            torch.Tensor.get_device: lambda x: gpu.of(x).index if gpu.of(x).type == "cuda" else -1,
            torch.Tensor.to: self.to,
            torch.Tensor.cuda: self.cuda,
            torch.Tensor.cpu: lambda x, *_, **__: self.moved(x, CPU, x.dtype, waits=True),
            torch.Tensor.pin_memory: lambda x, *_: gpu.pin(x.clone()),
            torch.Tensor.is_pinned: lambda x, *_: gpu.is_pinned(x),
            torch.Tensor.record_stream: lambda *_: None,
            torch.Tensor.tolist: self.tolist,
            torch.Tensor.numpy: self.numpy,
            torch.Tensor.__array__: self.numpy,
            torch.Tensor.backward: self.backward,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpu, kwargs = self.gpu, dict(kwargs or {})
        answer = self.answers.get(func)
        if answer is not None:
            return answer(*args, **kwargs)
        if func in INTO_FP32 and "out_dtype" in kwargs:
            return self.product(func, args, **kwargs)
        if kwargs.pop("pin_memory", False):
            return gpu.pin(func(*args, **kwargs))
        device = named_device(kwargs.get("device"))
        if device is not None and device.type == "cuda":
            return self.made(func, args, kwargs, gpu.numbered(device))
        if device is None and type(func).__name__ in ("builtin_function_or_method", "method_descriptor"):
            # what C++ makes inside such a call, like a tensor's options, lies where the first tensor does
            first = next(iter(tensors_in((args, kwargs))), None)
            home = None if first is None else gpu.of(first)
            before, gpu.home_of_new = (
                gpu.home_of_new,
                home if home is not None and home.type == "cuda" else None,
            )
            try:
                return func(*args, **kwargs)
            finally:
                gpu.home_of_new = before
        return func(*args, **kwargs)

    def made(self, func: Any, args: Any, kwargs: dict[str, Any], device: torch.device) -> Any:
        """A new tensor on a GPU."""
        gpu = self.gpu
        sources = tensors_in((args, kwargs))
        if func in COPIES and sources:
            source = sources[0]
            dtype = kwargs.get("dtype") or source.dtype
            if func is not torch.tensor and gpu.of(source) == device and dtype == source.dtype:
                return source
            return self.moved(source, device, dtype, waits=True)
        with gpu.silence():
            out = func(*args, **{**kwargs, "device": CPU})
        if func in COPIES:
            gpu.sync("numbers of the host to the device")
        elif func not in EMPTY:
            gpu.launch(getattr(func, "__name__", str(func)), device)
        for x in tensors_in(out):
            gpu.put(x, device)
        return out

    def product(
        self, func: Any, args: Any, *, out_dtype: torch.dtype, out: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """A product of narrow matrices that is summed and written in fp32."""
        gpu = self.gpu
        homes = {gpu.of(x) for x in (*args, out) if isinstance(x, Tensor)}
        if len(homes) != 1:
            raise Refused(f"{func.__name__} of tensors on {homes}")
        (home,) = homes
        if home.type != "cuda":
            raise Refused(f"{func.__name__}(out_dtype=) is CUDA's alone; the tensors are on {home}")
        gpu.launch(func.__name__, home)
        with gpu.silence():
            found = func(*(x.to(out_dtype) if isinstance(x, Tensor) else x for x in args), out=out, **kwargs)
        return gpu.put(found, home)

    def to(self, tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        """``Tensor.to``."""
        gpu = self.gpu
        if args and isinstance(args[0], Tensor):
            args = (gpu.of(args[0]), args[0].dtype, *args[1:])
        if args and isinstance(args[0], int) and not isinstance(args[0], bool):
            args = (torch.device("cuda", args[0]), *args[1:])
        if isinstance(kwargs.get("device"), int):
            kwargs["device"] = torch.device("cuda", kwargs["device"])
        if len(args) > 1 and isinstance(args[-1], bool) and isinstance(args[-2], bool):
            args, copy = args[:-1], args[-1]
        device, dtype, without_waiting, layout = torch._C._nn._parse_to(*args, **kwargs)
        here = gpu.of(tensor)
        there = here if device is None else gpu.numbered(device)
        dtype = dtype or tensor.dtype
        if there == here or "cuda" not in (here.type, there.type):
            where = {} if there == here else {"device": there}
            shape = {} if layout is None else {"memory_format": layout}
            return torch.Tensor.to(tensor, dtype=dtype, copy=copy, **where, **shape)
        return self.moved(tensor, there, dtype, waits=not without_waiting)

    def cuda(self, tensor: Tensor, device: Any = None, non_blocking: bool = False, **_: Any) -> Tensor:
        """``Tensor.cuda``."""
        there = self.gpu.numbered(named_device(device) or torch.device("cuda"))
        return self.moved(tensor, there, tensor.dtype, waits=not non_blocking)

    def moved(self, tensor: Tensor, there: torch.device, dtype: torch.dtype, *, waits: bool) -> Tensor:
        """A tensor on another device, with its gradient's way back."""
        gpu = self.gpu
        if gpu.of(tensor) == there and dtype == tensor.dtype:
            return tensor
        if there.type != "meta":
            gpu.copied(tensor, there, waits=waits)
        if tensor.requires_grad and torch.is_grad_enabled():
            return _Move.apply(tensor, there, dtype, gpu)
        return _copy(tensor, there, dtype, gpu)

    def backward(
        self, tensor: Tensor, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False,
        inputs: Any = None,
    ) -> None:  # fmt: skip
        """``Tensor.backward``; hooks inside are answered too."""
        with self:
            torch.autograd.backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)

    def tolist(self, tensor: Tensor) -> Any:
        """``Tensor.tolist``."""
        if self.gpu.of(tensor).type == "cuda":
            self.gpu.sync("tolist")
        with self.gpu.silence():
            return torch.Tensor.tolist(tensor)

    def numpy(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        """``Tensor.numpy``."""
        home = self.gpu.of(tensor)
        if home.type != "cpu":
            raise TypeError(
                f"can't convert {home} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory."
            )
        return torch.Tensor.numpy(tensor, **kwargs)


def named_device(device: Any) -> torch.device | None:
    """A device as torch names it; a number is a GPU's."""
    if device is None or isinstance(device, torch.device):
        return device
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def _copy(tensor: Tensor, there: torch.device, dtype: torch.dtype, gpu: Gpu) -> Tensor:
    with gpu.silence():
        if there.type == "meta":
            return torch.Tensor.to(tensor, there, dtype)
        return gpu.put(torch.Tensor.to(tensor.detach(), dtype, copy=True), there)


class _Move(torch.autograd.Function):
    """A copy between devices: its gradient goes back where the tensor came from."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, there: torch.device, dtype: torch.dtype, gpu: Gpu) -> Tensor:
        ctx.back = gpu.of(tensor), tensor.dtype, gpu
        return _copy(tensor, there, dtype, gpu)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        here, dtype, gpu = ctx.back
        gpu.launch("copy", gpu.of(gradient))
        return _copy(gradient, here, dtype, gpu), None, None, None
