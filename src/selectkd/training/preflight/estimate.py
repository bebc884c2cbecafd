"""What memory a run needs, from a recipe alone: no weight is read, every tensor is counted on the meta device.

b samples of a micro-batch, t tokens of one, c rows of a chunk of the loss, v vocabulary, d student width.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface

from selectkd.config import AdaptersOffTeacher, CacheTeacher, ModelTeacher
from selectkd.loss.by_device import chunk_rows
from selectkd.models.cut import cut_shape
from selectkd.models.fake_quantized import fake_quantize
from selectkd.models.head import backbone, head_of, unwrapped
from selectkd.models.layers import layers_of
from selectkd.models.load import DTYPES, load_shape
from selectkd.models.lora import add_lora
from selectkd.models.precision import precision_of
from selectkd.models.quantized import quantized_weights, stored_bytes
from selectkd.models.shape import UPSTREAM_ERRORS
from selectkd.teachers.cache.index import read_index
from selectkd.training.activations import LEAST_BYTES, checkpoint_activations
from selectkd.training.optimizer import state_bytes

FP32 = 4
KEPT_WIDTHS = 34
"""Hidden widths that a layer of the usual kind keeps of a token."""
COUNTED = "selectkd_counted"
"""The attention that ``activations`` counts with: the meta device has no fused one, and all use one."""


@dataclass(frozen=True)
class Memory:
    """Bytes of each part of a run at its peak, on the device that trains; process: what Python and torch take.

    merging: what saving a student with adapters takes beyond training, a copy of it being merged when activations are
    gone. saved: what one checkpoint takes on disk. offloaded: the layers of teachers in main memory beside an
    accelerator. total: the sum of the other parts, not all of which need be there at once.
    """

    process: int
    student: int
    gradient: int
    optimizer: int
    activations: int
    loss: int
    teacher: int
    best_student: int
    merging: int
    saved: int
    offloaded: int = 0

    @property
    def total(self) -> int:
        """All of the device's memory: every part but ``saved`` and ``offloaded``."""
        return sum(value for name, value in vars(self).items() if name not in ("saved", "offloaded"))

    def as_dict(self) -> dict[str, int]:
        return {**vars(self), "total": self.total}


def estimate(recipe: Any, *, length: int | None = None, device: torch.device | str = "cpu") -> Memory:
    """The memory of one process that trains ``recipe`` on ``device``; length: tokens of the longest batch, default
    max_length. The device need not be there: an accelerator is taken to have bf16 then. Of a sharded student one
    rank's share: of ``training.sharding.fsdp`` ranks, or of this run's where that is ``all``.

    Weights, gradients and optimizer are counted parameter by parameter, activations by running the backbone on the
    meta device and counting what autograd keeps; the loss by the buffers of one chunk. ConfigError for models that
    cannot be found.
    """
    training, kind = recipe.training, torch.device(device).type
    precision = precision_of(training.precision, device)
    b, t = training.batch_size, length or training.max_length
    shapes = _teacher_shapes(recipe, precision.frozen)
    teacher = [model for model, _ in shapes]
    of_student = precision.weights if training.lora is None else precision.frozen
    student = _student_shape(recipe, teacher[0] if teacher else None, of_student)
    weights, whole = _weights(recipe, student)
    head = head_of(student)
    if training.lora is not None:
        in_fp32 = precision.weights == "float32"
        student = add_lora(student, **training.lora.model_dump(), in_fp32=in_fp32)
    trained = [p for p in student.parameters() if p.requires_grad]
    adapters = 0 if training.lora is None else _bytes(trained)
    kept = activations(
        student, b, t, recomputed=training.gradient_checkpointing, autocast=precision.autocasts,
        offloaded=training.activation_offload and kind != "cpu",
    )  # fmt: skip
    v, d = head.weight.shape
    products = torch.bfloat16 if precision.autocasts else head.weight.dtype
    c = chunk_rows(b * t, v, training.chunk, products, device)
    head_trained = head.weight.requires_grad and training.lora is None
    loss = c * v * products.itemsize + b * t * d * FP32 + (_size(head.weight) if head_trained else 0)
    if products != head.weight.dtype:
        loss += v * d * products.itemsize  # the head's copy
    held = [_held(model, placement, device) for model, placement in shapes]
    taught, offloaded = (sum(each) for each in zip(*held, strict=True)) if held else (0, 0)
    forward = [*teacher, *(student for spec in recipe.teachers if isinstance(spec, AdaptersOffTeacher))]
    if forward:
        widest = max(_widest(model.config.get_text_config()) for model in forward)
        size = max(head_of(model).weight.dtype.itemsize for model in forward)
        loss += (c * v + b * t * widest * 3) * size  # its logits, and one layer of its forward pass
    elif isinstance(recipe.teacher, CacheTeacher):
        taught = _cached_head(recipe.teacher)
        loss += c * v * FP32 if taught else 0
    moments = sum(state_bytes(training.optimizer, p) for p in trained)
    memory = Memory(
        process=resident() if kind == "cpu" else 0,  # a device's own share is not among what it has free
        student=weights + adapters,
        gradient=_bytes(trained),
        optimizer=moments,
        activations=kept + whole,
        loss=loss,
        teacher=taught,
        merging=max(0, _copied(recipe, student, weights, kind) - kept - loss - _bytes(trained)),
        best_student=_bytes(trained) if training.early_stopping is not None else 0,
        saved=_bytes(trained) + moments,
        offloaded=offloaded,
    )
    return memory if training.sharding is None else _of_a_rank(memory, student, training)


def activations(
    model: nn.Module,
    b: int,
    t: int,
    *,
    recomputed: bool = False,
    autocast: bool = False,
    offloaded: bool = False,
) -> int:
    """Bytes that autograd keeps of one forward pass over [b, t] tokens, counted on the meta device.

    Where an architecture's forward pass needs data, 34 hidden widths of 2 bytes a token and layer are taken instead
    (Korthikanti et al. 2022, equation 2 without the scores, arXiv 2205.05198).
    recomputed: with gradient checkpointing, the inputs of the layers and the inside of one of them. autocast: to bf16,
    the copies of fp32 weights included. offloaded: what ``activations_offloaded`` leaves on the device alone.
    """
    weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    text: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    AttentionInterface.register(COUNTED, _counted)
    text._attn_implementation = COUNTED
    inputs = {
        "input_ids": torch.zeros(b, t, dtype=torch.long, device="meta"),
        "position_ids": torch.zeros(b, t, dtype=torch.long, device="meta"),
        "attention_mask": torch.zeros(b, 1, t, t, device="meta"),
    }
    try:
        with _kept() as storages, Autocast() if autocast else nullcontext():
            backbone(model.train())(**inputs)
        sizes = [size for storage, size in storages.items() if storage not in weights]
    except UPSTREAM_ERRORS:
        width = next(model.parameters()).element_size() if not autocast else 2
        sizes = [KEPT_WIDTHS * b * t * text.hidden_size * width] * text.num_hidden_layers
    if offloaded:
        copies = [p.numel() * 2 for p in model.parameters() if autocast and p.ndim == 2]
        return sum(size for size in sizes if size < LEAST_BYTES) + sum(c for c in copies if c >= LEAST_BYTES)
    if not recomputed:
        return sum(sizes)
    of_layer = next(
        model.parameters()
    ).element_size()  # autocast or not, what runs between layers is the embedding's
    return text.num_hidden_layers * b * t * text.hidden_size * of_layer + sum(sizes) // text.num_hidden_layers


class Autocast(TorchFunctionMode):
    """Autocast to bf16 for the meta device, which has none: products take their fp32 operands in bf16, a weight's copy
    made once.
    """

    PRODUCTS = (
        nn.functional.linear, torch.matmul, torch.bmm, torch.mm, torch.addmm, torch.baddbmm,
        Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.mm,
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.copies: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.PRODUCTS:
            args = [self.narrow(each) if isinstance(each, Tensor) else each for each in args]
        return func(*args, **(kwargs or {}))

    def narrow(self, tensor: Tensor) -> Tensor:
        """The tensor in bf16, where it is fp32."""
        if tensor.dtype != torch.float32:
            return tensor
        if not isinstance(tensor, nn.Parameter):
            return tensor.bfloat16()
        return self.copies.setdefault(id(tensor), tensor.bfloat16())


class _Attention(torch.autograd.Function):
    """What a fused attention keeps for its backward pass: q, k and v of all heads, mask, result and a sum a row.

    It has no backward: only what the forward pass keeps is counted, on tensors without data.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor
    ) -> Tensor:  # each [b, heads, t, head width]
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, mask, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


def _counted(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **_: Any
) -> tuple[Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    if value.dtype != query.dtype:  # under autocast position encodings make fp32 of query and key
        query, key = query.to(value.dtype), key.to(value.dtype)
        mask = None if mask is None else mask.to(value.dtype)
    k, v = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    return _Attention.apply(query, k, v, mask).transpose(1, 2), None  # type: ignore[union-attr]


@contextmanager
def _kept() -> Iterator[dict[int, int]]:
    """Collects each storage that autograd keeps, and its size."""
    found: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no two storages have one address

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


def resident() -> int:
    """Bytes this process holds now, which is what Python and its packages take before any weight is read."""
    if sys.platform != "linux":
        return 0
    with open("/proc/self/status", encoding="ascii") as file:
        row = next(line for line in file if line.startswith("VmRSS:"))
    return int(row.split()[1]) * 1024


def _teacher_shapes(recipe: Any, dtype: str) -> list[tuple[Any, str]]:
    """The models that teachers hold in memory, and their placements; none for one on disk, behind a server, or without
    weights of its own.
    """
    return [
        (load_shape(spec.model, dtype=spec.dtype or dtype, revision=spec.revision), spec.placement)
        for spec in recipe.teachers
        if isinstance(spec, ModelTeacher)
    ]


def _cached_head(teacher: CacheTeacher) -> int:
    """Bytes of the head beside a cache of hidden states; 0 of other caches."""
    index = read_index(Path(teacher.cache).expanduser() / "index.json")
    return index["head"]["vocabulary"] * index["head"]["width"] * FP32 if index["payload"] == "hidden" else 0


def _held(model: Any, placement: str, device: torch.device | str) -> tuple[int, int]:
    """(bytes on the device that trains, bytes in main memory beside it) of a teacher.

    Where main memory is that device, an offloaded layer is not copied.
    """
    whole = _bytes(model.parameters()) + _bytes(model.buffers())
    if placement == "device" or (placement == "offloaded" and torch.device(device).type == "cpu"):
        return whole, 0
    layers = [_bytes(layer.parameters()) for layer in layers_of(model)]
    if placement == "offloaded":
        return whole - sum(layers) + 2 * max(layers), sum(layers)  # one at work, the next on its way
    over = int(os.environ.get("WORLD_SIZE", "1"))
    return whole - sum(layers) + sum(layers) // over + max(layers), 0


def _of_a_rank(memory: Memory, student: Any, training: Any) -> Memory:
    """What one of the ranks that share a student holds (FSDP2): a part of its weights, gradients and moments, and whole
    what is at work, all but the layers and two of these. Adapters are whole on every rank.
    """
    asked, there = training.sharding, int(os.environ.get("WORLD_SIZE", "1"))
    over = max(1, there // asked.replicate) if asked.fsdp == "all" else asked.fsdp
    adapters = 0 if training.lora is None else memory.gradient
    layers = [_bytes(layer.parameters()) for layer in layers_of(unwrapped(student))]
    weights = memory.student - adapters
    around = memory.student - sum(layers)
    held = replace(memory, student=weights // over + around + 2 * max(layers))
    if adapters:
        return held
    gradient = memory.gradient // over + around + max(layers)
    return replace(held, gradient=gradient, optimizer=memory.optimizer // over)


def check_student(recipe: Any) -> None:
    """ConfigError for a cut or for adapters that the student's model cannot have; reads no weight."""
    lora = recipe.training.lora
    if recipe.student.model is None or lora is not None or recipe.training.fake_quantization is not None:
        shape = _student_shape(recipe, None, "float32")
        if lora is not None:
            add_lora(shape, **lora.model_dump())


def _student_shape(recipe: Any, teacher: Any, dtype: str) -> Any:
    """The student without weights: its own, or the teacher's with so many layers."""
    spec = recipe.student
    if spec.model is not None:
        model = load_shape(spec.model, dtype=dtype, revision=spec.revision)
    else:
        named = _teacher_model(recipe) if teacher is None else teacher.config._name_or_path
        model = load_shape(named, dtype=dtype)
        model = cut_shape(model, spec.from_teacher.layers, spec.from_teacher.choose)
    if recipe.training.fake_quantization is not None:
        fake_quantize(model, **recipe.training.fake_quantization.model_dump())
    if recipe.training.gradient_checkpointing:
        checkpoint_activations(model)
    return model


def _weights(recipe: Any, student: Any) -> tuple[int, int]:
    """(bytes of the student's weights and buffers, those of the largest weight that 4 bits make whole for a moment)."""
    bits = recipe.student.quantization
    if bits is None:
        return _bytes(student.parameters()) + _bytes(student.buffers()), 0
    return stored_bytes(student, bits.double), max(_size(weight) for weight in quantized_weights(student))


def _copied(recipe: Any, student: Any, weights: int, kind: str) -> int:
    """Bytes of the copies of the student on the device while it is saved: merged, rounded, or none."""
    if recipe.student.quantization is not None:
        saved = DTYPES[precision_of(recipe.training.precision, kind).saved]
        return sum(p.numel() for p in student.parameters()) * saved.itemsize if kind == "cpu" else 0
    if recipe.training.fake_quantization is not None:
        return 2 * weights
    return weights if recipe.training.lora is not None else 0


def _teacher_model(recipe: Any) -> Any:
    """The model a student is cut from: the recipe's, or the one that its cache was built with."""
    spec = recipe.teacher
    if spec.model is not None or not isinstance(spec, CacheTeacher):
        return spec.model
    return read_index(Path(spec.cache).expanduser() / "index.json")["teacher"]["model"]


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _widest(text: Any) -> int:
    """The width between a layer's two large products; four times the layers' where a configuration does not say it."""
    return getattr(text, "intermediate_size", None) or 4 * text.hidden_size


def _bytes(tensors: Any) -> int:
    """Bytes of tensors, each storage once."""
    once = {tensor.untyped_storage()._cdata: tensor for tensor in tensors}
    return sum(math.prod(tensor.shape) * tensor.element_size() for tensor in once.values())
