"""Models whose weights lie in parts over the ranks (FSDP2): loaded so, run, put together.

transformers takes a model apart (``DistributedConfig``) and is its root then. A part of it that runs outside the root's
forward pass mixes whole tensors with parts, so whatever reads such a model's weights runs ``inside`` it.
"""

# torch types an attribute of a module as Tensor | Module; what these functions read of one is neither
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import copy
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
import transformers
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.distributed.configuration_utils import DistributedConfig

from selectkd.errors import ConfigError
from selectkd.loss.head import Head
from selectkd.models.head import text_decoder_of, unwrapped
from selectkd.models.lora import adapted
from selectkd.models.vision import auto_class

T = TypeVar("T")

STYLE = "free_full_weight"
"""transformers' word for a module whose weights are whole during its own passes alone."""
CAN_SHARD = hasattr(DistributedConfig(), "dp_replicate_size")
"""Whether the installed transformers takes models apart as this module asks it to (5.23)."""


def check_transformers() -> None:
    """ConfigError where the installed transformers is too old to take a model apart."""
    if not CAN_SHARD:
        raise ConfigError(
            "training.sharding and teacher.placement: sharded need transformers 5.23 or newer, and this is "
            f"{transformers.__version__}. Install it, on Python 3.11 or newer, or leave them out."
        )


class Spread(NamedTuple):
    """``replicate`` copies of a model, each in parts over ``fsdp`` ranks."""

    fsdp: int
    replicate: int = 1

    @classmethod
    def of(cls, sharding: Any, key: str = "training.sharding") -> Spread:
        """What a section {fsdp, replicate} (None: all ranks share one copy) means with the ranks of this run.

        ConfigError naming ``key`` where their number does not fit.
        """
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if ranks == 1:
            raise ConfigError(
                f"{key} shares a model among several ranks, and this is one process. Start several: torchrun "
                "--nproc-per-node N -m selectkd train RECIPE, or leave the key out."
            )
        replicate = 1 if sharding is None else sharding.replicate
        fsdp = "all" if sharding is None else sharding.fsdp
        if fsdp == "all" and ranks % replicate == 0 and ranks > replicate:
            return cls(ranks // replicate, replicate)
        if fsdp == "all" or fsdp * replicate != ranks:
            raise ConfigError(
                f"{key}: {{fsdp: {fsdp}, replicate: {replicate}}} does not fit {ranks} ranks. fsdp times replicate "
                f"must be {ranks}, and fsdp 2 or more."
            )
        return cls(fsdp, replicate)


def parts_of(spread: Spread, shape: Any) -> DistributedConfig:
    """How transformers takes a model of this shape apart: each layer by itself.

    shape: the model itself, or one on the meta device. ConfigError for a model without a list of layers.
    """
    check_transformers()
    decoder = text_decoder_of(shape)
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ConfigError(
            f"{type(decoder).__name__} has no list of layers, so it cannot be sharded layer by layer. Leave out "
            "training.sharding and teacher.placement: sharded."
        )
    name = next(name for name, module in unwrapped(shape).named_modules() if module is layers)
    return DistributedConfig(
        fsdp_size=spread.fsdp, dp_replicate_size=spread.replicate, fsdp_plan={f"{name}.*": STYLE}
    )


def shard(model: Any, spread: Spread) -> Any:
    """A whole model in memory taken apart in place, as ``load_model`` with ``spread`` loads one."""
    kind: Any = type(model)
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    tied: Any = head if head is not None and head.weight is embedding.weight else None
    if (
        tied is not None
    ):  # a tensor of two modules would be cut with both: two tensors meanwhile, one again afterwards
        tied.weight = nn.Parameter(tied.weight.detach().clone(), tied.weight.requires_grad)
    parts, _, mesh = kind.prepare_distribute_model(parts_of(spread, model))
    model = kind.maybe_distribute_model(model, parts, mesh)
    if tied is not None:
        tied.weight = embedding.weight
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights of a model, in an adapter's wrapper or not, lie in parts over the ranks."""
    return _root(model) is not None


def held_by(model: nn.Module, holder: nn.Module) -> None:
    """``holder``, whose forward pass runs ``model``, is the root where it is sharded around the model (accelerate)."""
    # a reference that does not keep the holder, nor take it along in a copy of the model
    vars(unwrapped(model))["_holder"] = weakref.ref(holder)


def inside(model: nn.Module, work: Callable[[], T]) -> T:
    """What ``work()`` returns, run where the weights it reads are whole; a collective call where ``model`` is sharded.

    It runs as the forward pass of the model's root, with the head whole, so gradients are reduced as after any forward
    pass; without gradients the weights are in parts again afterwards. It returns tensors, or a nest of them. A model
    that is not sharded, and one that ``work`` is inside of already, runs it as it is.
    """
    root = _root(model)
    if root is None or vars(root).get("_at_work"):
        return work()
    if not hasattr(root, "run_inside"):
        root.run_inside = types.MethodType(_run_inside, root)
        register_fsdp_forward_method(root, "run_inside")
    try:
        return root.run_inside(model, work)
    finally:
        if not torch.is_grad_enabled() and not vars(root).get("_whole"):
            _apart(root)


@contextmanager
def at_work(root: nn.Module) -> Iterator[None]:
    """The forward pass of ``root`` is under way: ``inside`` runs what it is given as it is."""
    before = vars(root).get("_at_work", False)
    vars(root)["_at_work"] = True
    try:
        yield
    finally:
        vars(root)["_at_work"] = before


def head_whole(model: nn.Module) -> None:
    """Puts the head of a sharded model together, within a forward pass of its root that does not run the head."""
    layer = unwrapped(model).get_output_embeddings()
    if isinstance(layer, FSDPModule):
        layer.unshard()


@contextmanager
def whole_while(model: nn.Module) -> Iterator[None]:
    """All weights of a sharded model whole on every rank while it lasts: each may run it as often as it likes.

    A collective call where it begins; nothing where the model is not sharded.
    """
    root = _root(model)
    if root is None:
        yield
        return
    plain = unwrapped(model)
    parts = [module for module in root.modules() if isinstance(module, FSDPModule)]
    layers: Any = text_decoder_of(model).layers
    freed = {*layers}
    if not plain.all_tied_weights_keys:
        freed.add(plain.get_input_embeddings())
    for module in parts:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    vars(root)["_whole"] = True
    try:
        yield
    finally:
        vars(root)["_whole"] = False
        for module in parts:
            module.set_reshard_after_forward(module in freed, recurse=False)
        _apart(root)


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from its parts, a collective call; any other as it is."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def whole_head(head: Head) -> Head:
    """The head with its tensors put together for good: what a teacher's rows are multiplied by outside its passes."""
    bias = None if head.bias is None else whole(head.bias)
    return replace(head, weight=whole(head.weight), bias=bias) if isinstance(head.weight, DTensor) else head


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor in the parts of ``parameter``; a collective call where that has any."""
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """The mean over ranks of the gradients of parameters that FSDP does not know (adapters added later), in place.

    One that has no gradient on a rank counts as 0 there; a collective call.
    """
    plain = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
    for dtype in dict.fromkeys(p.dtype for p in plain):
        group = [p for p in plain if p.dtype == dtype]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in group])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for p, part in zip(group, flat.split([p.numel() for p in group]), strict=True):
            p.grad = part.reshape(p.shape)


@torch.no_grad()
def plain_copy(model: Any) -> Any:
    """The model in one piece in main memory on rank 0, adapters on it as they are; None on the others. A collective
    call.
    """
    state = model.state_dict()
    first = dist.get_rank() == 0
    held: dict[str, Tensor] = {}
    for name, tensor in state.items():
        value = whole(tensor)
        if first:
            held[name] = value.to("cpu", copy=True)
    if not first:
        return None
    plain = unwrapped(model)
    config = copy.deepcopy(plain.config)
    vars(config).pop("distributed_config", None)
    with torch.device("meta"):
        whole_model: Any = auto_class(config).from_config(config, dtype=plain.dtype)
        if model is not plain:
            whole_model = adapted(whole_model, copy.deepcopy(model.active_peft_config))
    whole_model.load_state_dict(held, assign=True)
    unwrapped(whole_model).tie_weights()
    unwrapped(whole_model).generation_config = copy.deepcopy(plain.generation_config)
    return whole_model.eval()


def _root(model: nn.Module) -> Any:
    """The module that is FSDP's root: the Hugging Face model, or what holds it; None where there is none."""
    plain = unwrapped(model)
    if isinstance(plain, FSDPModule):
        return plain
    holder = vars(plain).get("_holder", lambda: None)()
    return holder if isinstance(holder, FSDPModule) else None


def _run_inside(root: nn.Module, model: nn.Module, work: Callable[[], T]) -> T:
    with at_work(root):
        head_whole(model)
        return work()


def _apart(root: nn.Module) -> None:
    """What a forward pass left whole in parts again."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
