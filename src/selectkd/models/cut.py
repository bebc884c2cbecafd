"""A student cut out of its teacher: some of its layers, all of the rest.

n compared rows, t positions, d width, v vocabulary.
"""

# torch types an attribute of a module as Tensor | Module; what these functions read of one is neither
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false, reportArgumentType=false
from __future__ import annotations

import copy
import heapq
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from selectkd.data.collate import Batch
from selectkd.data.supervised import supervised
from selectkd.errors import ConfigError
from selectkd.loss.head import Head
from selectkd.models.forward import evaluating
from selectkd.models.head import decoder_of, head_of, text_decoder_of, unwrapped
from selectkd.models.layers import check_cut, cut_config, layers_of
from selectkd.models.removals import Removals

Inputs = Mapping[str, Tensor]
HeldOut = Batch | tuple[Inputs, Tensor | None]
Progress = Callable[[int, tuple[int, ...], float], None]

PIECE_POSITIONS = 128
"""Token positions run at once: enough for fast matrix products, few enough to give a bad cut up early."""
HEAD_ROWS = 64
"""Rows whose logits exist at once; 64 rows of a 152,000-word vocabulary are 39 MB in fp32."""

NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f", "final_norm", "embedding_norm")
"""What architectures call the norm behind their last layer."""


@dataclass(frozen=True)
class CutReport:
    """How a cut was chosen: layers removed, in order, and KL(teacher || cut) after each, in nats.

    ``kl`` is empty unless the choice was measured; ``rows`` is the number of positions compared.
    """

    choose: str
    kept: list[int]
    removed: list[int]
    kl: list[float] = field(default_factory=list)
    rows: int = 0
    seconds: float = 0.0

    @property
    def searched(self) -> list[str]:
        """The time a search for layers took, and how to keep its result; empty where no search ran."""
        return [
            f"the layers were chosen in {self.seconds:.0f} s; selectkd cut writes this student as a folder for "
            f"student.model, and student.from_teacher.choose: {self.kept} keeps the choice in the recipe"
        ] * bool(self.kl)


def cut_student(
    teacher: nn.Module,
    layers: int,
    choose: str | Sequence[int] = "measured",
    batches: Iterable[HeldOut] | None = None,
    *,
    known: Removals | None = None,
    on_progress: Progress | None = None,
) -> tuple[nn.Module, list[int], CutReport]:
    """A new model with ``layers`` of the teacher's layers and copies of all else: (student, kept, report).

    choose = "even" keeps the first, the last and evenly spaced layers; a list keeps exactly those; "measured"
    removes, one at a time, the layer whose loss costs the least KL(teacher || what is left) on ``batches``,
    each a pair (model inputs, flat indices into b*t of the positions to compare; None = all that are not
    padding). ``on_progress(removed, kept, kl)`` hears of each removal, in the teacher's layer numbers. known: removals
    measured before, which grow by what is measured now (``removals_of``).
    ConfigError for a number or list of layers that does not fit, for "measured" without batches, for a
    quantised teacher, and for an architecture whose layers cannot be run one after the other.
    """
    started = time.perf_counter()
    plain = unwrapped(teacher)
    total = len(layers_of(plain))
    if getattr(plain, "is_quantized", False):
        raise ConfigError(
            "a quantised teacher cannot be cut. Load it in float32 or bfloat16 for student.from_teacher."
        )
    if not 1 <= layers <= total:
        raise ConfigError(
            f"a student of {layers} layers cannot be cut from {total}. Use 1 to {total} layers."
        )
    if not isinstance(choose, str):
        kept, report = _listed(list(choose), layers, total), "listed"
    elif choose == "even":
        kept, report = even_layers(total, layers), "even"
    elif choose == "measured":
        if batches is None:
            raise ConfigError('choose = "measured" needs held-out text. Give data.evaluation, or use "even".')
        measured = measured_layers(plain, layers, batches, known=known, on_progress=on_progress)
        kept, report = measured.kept, measured
    else:
        raise ConfigError(
            f'choose = {choose!r} is not known. Use "measured", "even" or a list of layer numbers.'
        )
    student = build(plain, kept)
    if isinstance(report, str):
        removed = [index for index in range(total) if index not in kept]
        report = CutReport(report, kept, removed, seconds=time.perf_counter() - started)
    return student, kept, report


def even_layers(total: int, layers: int) -> list[int]:
    """``layers`` layer numbers spread evenly from 0 to total - 1, both ends kept; one layer is layer 0."""
    if layers == 1:
        return [0]
    return [(index * (total - 1) + (layers - 1) // 2) // (layers - 1) for index in range(layers)]


def cut_shape(teacher: Any, layers: int, choose: str | Sequence[int]) -> Any:
    """A cut of a teacher on the meta device; measured layers, which are not known yet, are taken to be the first.

    ConfigError as of ``cut_student``.
    """
    total = len(layers_of(teacher))
    if not 1 <= layers <= total:
        raise ConfigError(
            f"a student of {layers} layers cannot be cut from {total}. Use 1 to {total} layers."
        )
    if not isinstance(choose, str):
        kept = _listed(list(choose), layers, total)
    else:
        kept = even_layers(total, layers) if choose == "even" else list(range(layers))
    with torch.device("meta"):
        student = type(teacher)._from_config(cut_config(teacher.config, kept), dtype=teacher.dtype)
    check_cut(teacher, student, kept)
    return student


def build(teacher: Any, kept: Sequence[int]) -> nn.Module:
    """A model of the teacher's class with the layers ``kept``, renumbered from 0, in memory of its own.

    Built from the cut configuration, so layer_idx, per-layer lists (layer_types and the like) and tied
    weights are what they are in a model of that size; the random generators are left as they were. ConfigError
    where a model of that size would have layers of other kinds.
    """
    layers = layers_of(teacher)
    prefix = next(name for name, module in teacher.named_modules() if module is layers) + "."
    number = {str(old): str(new) for new, old in enumerate(kept)}
    state: dict[str, Tensor] = {}
    for name, value in teacher.state_dict().items():
        if name.startswith(prefix):
            old, _, rest = name.removeprefix(prefix).partition(".")
            if old in number:
                state[f"{prefix}{number[old]}.{rest}"] = value
        else:
            state[name] = value
    devices = sorted({p.device.index for p in teacher.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        student = type(teacher)._from_config(
            cut_config(teacher.config, kept),
            dtype=teacher.dtype,
            attn_implementation=teacher.config._attn_implementation,
        )
    check_cut(teacher, student, kept)
    try:
        student.load_state_dict(state)
    except RuntimeError as error:  # parts of a layer that lie elsewhere, a list of their own
        raise ConfigError(
            f"{type(teacher).__name__} keeps parts of its layers outside of them, so it cannot be cut. "
            "Name a student model."
        ) from error
    student.tie_weights()
    if getattr(teacher, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.to(next(teacher.parameters()).device)


def _listed(choice: list[int], layers: int, total: int) -> list[int]:
    wrong = [index for index in choice if not isinstance(index, int) or not 0 <= index < total]
    if wrong or len(set(choice)) != len(choice) or len(choice) != layers:
        raise ConfigError(
            f"choose = {choice} does not name {layers} different layers among 0 to {total - 1}. "
            "Make the list as long as student.from_teacher.layers."
        )
    return sorted(choice)


def measured_layers(
    teacher: nn.Module,
    layers: int,
    batches: Iterable[HeldOut],
    *,
    known: Removals | None = None,
    on_progress: Progress | None = None,
) -> CutReport:
    """The greedy choice: remove the layer without which the mean KL(teacher || rest) is least; repeat.

    Equal to running every candidate in full. What it saves: a candidate starts from the stored input of the
    layer it leaves out, and is given up once the pieces of its KL seen so far exceed the whole of another's.
    On a CPU a bfloat16 teacher is measured in an fp32 copy, since many CPUs multiply bfloat16 several times
    more slowly. known: removals measured before, which are not measured again.
    """
    started = time.perf_counter()
    known = known or Removals()
    total = len(layers_of(teacher))
    kept = list(range(total))
    pieces: list[_Piece] = []
    if len(known.order) < total - layers:
        if next(teacher.parameters()).device.type == "cpu" and teacher.dtype != torch.float32:
            teacher = copy.deepcopy(teacher).float()
        with evaluating(teacher), torch.no_grad():
            pieces = [_Piece(teacher, inputs, rows) for inputs, rows in _split(teacher, batches)]
        if not any(len(piece.rows) for piece in pieces):
            raise ConfigError(
                "the held-out text has no position to compare. Give it at least one completion."
            )
    rows = sum(len(piece.rows) for piece in pieces)
    with evaluating(teacher), torch.no_grad():
        for number in range(total - layers):
            if number == len(known.order):
                cheapest, sum_kl = _cheapest(pieces, kept)
                known.add(cheapest, sum_kl / rows, rows)
            layer, kl = known.order[number]
            for piece in pieces:
                piece.remove(layer, kept)
            kept.remove(layer)
            if on_progress is not None:
                on_progress(layer, tuple(kept), kl)
    removed = [layer for layer, _ in known.order[: total - layers]]
    history = [kl for _, kl in known.order[: total - layers]]
    return CutReport("measured", kept, removed, history, known.rows, time.perf_counter() - started)


def _cheapest(pieces: Sequence[_Piece], kept: Sequence[int]) -> tuple[int, float]:
    """The layer whose loss gives the least sum of KL over all pieces, and that sum; ties: the lower layer.

    A sum over some pieces is a lower bound of the whole, so the candidate with the smallest bound is measured
    on one piece more, until one is complete: nothing that could still win is skipped.
    """
    open_candidates = [(0.0, layer, 0) for layer in kept]
    while True:
        sum_kl, layer, done = heapq.heappop(open_candidates)
        if done == len(pieces):
            return layer, sum_kl
        heapq.heappush(open_candidates, (sum_kl + pieces[done].kl_without(layer, kept), layer, done + 1))


class _Piece:
    """A few sequences: every layer's input and other arguments, and the teacher's log-probs of the rows."""

    def __init__(self, teacher: nn.Module, inputs: Inputs, rows: Tensor) -> None:
        decoder = decoder_of(teacher)
        self.layers = layers_of(teacher)
        self.norm = _final_norm(text_decoder_of(teacher))
        self.project = getattr(
            text_decoder_of(teacher), "project_out", None
        )  # OPT's, to the width of its embeddings
        self.head: Head = head_of(teacher)
        self.rows = rows
        self.calls: list[tuple[str | None, tuple[Any, ...], dict[str, Any]]] = []
        self.inputs: dict[int, Tensor] = {}  # layer number -> its input [b, t, d]

        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            name = None if args else "hidden_states"
            self.inputs[len(self.calls)] = args[0] if args else kwargs[name]
            rest = {key: value for key, value in kwargs.items() if key != name}
            self.calls.append((name, args[1:], rest))

        hooks = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in self.layers]
        try:
            hidden = decoder(**{"use_cache": False, **inputs}).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        hidden = hidden.flatten(0, 1)[rows]  # [n, d]
        self.logp = torch.cat([torch.log_softmax(self.head.logits(h), -1) for h in hidden.split(HEAD_ROWS)])
        again = self._finish(self._run(range(len(self.layers))))
        same = len(self.calls) == len(self.layers) and again.shape == hidden.shape
        # the same operations on the same numbers, up to the order in which a norm sums a row
        close = 8 * torch.finfo(hidden.dtype).eps * hidden.abs().max()
        if not (same and (again - hidden).abs().max() <= close):
            raise ConfigError(
                f"the layers of {type(teacher).__name__} cannot be run one by one, so they cannot be measured. "
                'Use choose = "even" or a list of layer numbers.'
            )

    def kl_without(self, layer: int, kept: Sequence[int]) -> float:
        """Sum over the rows of KL(teacher || the kept layers without ``layer``)."""
        hidden = self._finish(self._run([index for index in kept if index > layer], self.inputs[layer]))
        total = 0.0
        for h, logp in zip(hidden.split(HEAD_ROWS), self.logp.split(HEAD_ROWS), strict=True):
            logq = torch.log_softmax(self.head.logits(h), -1)
            total += torch.nn.functional.kl_div(logq, logp, reduction="sum", log_target=True).item()
        return max(total, 0.0)

    def remove(self, layer: int, kept: Sequence[int]) -> None:
        """Give the layers above ``layer`` the inputs they have without it."""
        self._run([index for index in kept if index > layer], self.inputs.pop(layer), store=True)

    def _run(self, layers: Iterable[int], hidden: Tensor | None = None, *, store: bool = False) -> Tensor:
        hidden = self.inputs[0] if hidden is None else hidden
        for index in layers:
            if store:
                self.inputs[index] = hidden
            name, args, kwargs = self.calls[index]
            layer = self.layers[index]
            out = layer(hidden, *args, **kwargs) if name is None else layer(*args, **{name: hidden}, **kwargs)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden

    def _finish(self, hidden: Tensor) -> Tensor:
        hidden = self.norm(hidden.flatten(0, 1)[self.rows])  # [n, d]
        return hidden if self.project is None else self.project(hidden)


def _final_norm(decoder: nn.Module) -> nn.Module:
    for name in NORMS:
        if isinstance(module := getattr(decoder, name, None), nn.Module):
            return module
    raise ConfigError(
        f'{type(decoder).__name__} has no final norm that selectkd recognizes. Use choose = "even" or a list.'
    )


def _split(teacher: nn.Module, batches: Iterable[HeldOut]) -> Iterable[tuple[Inputs, Tensor]]:
    """Batches cut into pieces of whole sequences, about PIECE_POSITIONS long, on the teacher's device."""
    device = next(teacher.parameters()).device
    for batch in batches:
        inputs, rows = (
            (batch.model_inputs(), supervised(batch).position) if isinstance(batch, Batch) else batch
        )
        b, t = inputs["input_ids"].shape
        if rows is None:
            mask = inputs.get("attention_mask")
            used = mask if mask is not None and mask.shape == (b, t) else torch.ones(b, t)
            rows = used.flatten().nonzero().flatten()
        # images have no row of their own in their tensors, so their batches stay whole
        step = max(1, PIECE_POSITIONS // t) if "pixel_values" not in inputs else b
        for first in range(0, b, step):
            here = rows[(rows >= first * t) & (rows < min(first + step, b) * t)] - first * t
            if len(here):
                rest = step < b
                piece = {
                    name: (value[first : first + step] if rest else value).to(device)
                    for name, value in inputs.items()
                }
                yield piece, here.to(device)
