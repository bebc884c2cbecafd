"""What only a GPU can say: is the loss right there, what does it cost beside its peers, what does a whole step cost.

    python benchmarks/gpu.py [--minutes 8] [--parts correctness counts loss steps generation] [--record] [--json FILE]
    python benchmarks/gpu.py --tiny --device cpu     # the same program on small shapes, to see that it runs

``make gpu`` installs a CUDA build of torch and the peers in an environment of its own and runs it. Parts run in the
order above; none begins after the minutes are over, and each row is written as soon as it is measured.

correctness: the gradients of every divergence with kernels, n 64, v 5,003, against the plain program in fp64 on the
device: error_ratio is the larger of ||dX - fp64|| and ||dW - fp64|| over the same of the plain bf16 program.
counts: kernels and host syncs of one loss over 4,096 rows (torch.profiler, torch.cuda.set_sync_debug_mode).
loss: n 8,192, v 151,936, bf16. milliseconds, ratio_to_limit over the four bare products in the same chunks, and
peak_mib, memory at its highest minus before. All implementations in turn in every round; medians of ratios.
steps: forward, backward and AdamW of random Qwen2 shapes, 0.5B from 1.5B, bf16 compute: tokens per second and peak.
generation: tokens per second of ``selectkd.rollouts`` beside transformers' ``generate``, on the 0.5B shape.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from loss import States, differentiated, distances, exact, limit, plain, random_states, selectkd
from peers import PEERS, Peer
from record import Row, record
from step import arguments_for, hf_inputs, optimised
from torch import nn

from selectkd import DIVERGENCES, Objective
from selectkd.data.collate import collate
from selectkd.data.example import Example
from selectkd.rollouts.generate import Request, generate
from selectkd.rollouts.rules import Draw
from selectkd.rollouts.sampling import Sampling
from selectkd.teachers.live import LiveTeacher

WIDTHS = ((896, 1536), (1536, 3584), (2048, 4096))
"""d and e of Qwen2.5's 0.5B from 1.5B, 1.5B from 7B, and a 3B from an 8B."""
VOCABULARY = 151_936
DIVERGENCES_TIMED = ("forward_kl", "reverse_kl", "generalized_jsd")
PEERS_ON_A_GPU = ("trl_chunked", "liger_1024_compiled")
QWEN = {
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
    },
    "1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
    },
}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
WORST_ERROR_RATIO = 1.05
Found = Iterator[tuple[Row, str]]
"""Rows as they come, each with the name and version of the package that stands beside ours."""


class Machine:
    """The device, how it is timed and how its memory is read; shapes are small where ``tiny``."""

    def __init__(self, device: str, tiny: bool) -> None:
        self.device, self.tiny = torch.device(device), tiny
        self.on_gpu = self.device.type == "cuda"
        self.name = torch.cuda.get_device_name(self.device) if self.on_gpu else "cpu"
        self.rows = 256 if tiny else 8192
        self.vocabulary = 1000 if tiny else VOCABULARY
        self.widths = ((32, 48),) if tiny else WIDTHS
        self.rounds = 2 if tiny else 7

    def seconds(self, call: Callable[[], object]) -> float:
        """Seconds of one call, until the device has done all of it."""
        self.wait()
        started = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - started

    def peak_mib(self, call: Callable[[], object]) -> float | None:
        """MiB of device memory at its highest during a call minus before it; None on a processor."""
        if not self.on_gpu:
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.wait()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def with_spread(values: list[float]) -> tuple[float, float]:
    """(median, largest minus smallest)."""
    return statistics.median(values), max(values) - min(values)


def correctness(machine: Machine) -> Found:
    """Every divergence with a verifier beside it, and both gradients, against fp64 on the device."""
    for name in DIVERGENCES:
        if name == "uld":  # compares sorted probabilities: no gradient at ties, and no kernel
            continue
        states = random_states((64, 96, 5003), 64, machine.device).to(torch.bfloat16)
        _, true = exact(name, states)
        ours, ordinary = (
            distances(differentiated(loss)(states)[1:], true)
            for loss in (selectkd(States, name, "greedy_topk"), plain(States, name))
        )
        ratio = max(a / b for a, b in zip(ours, ordinary, strict=True))
        yield ("n 64, v 5003, bfloat16, " + name, "selectkd", "error_ratio", ratio, "", 1), ""
        if machine.on_gpu and ratio > WORST_ERROR_RATIO:
            raise SystemExit(f"{name}: the error on {machine.name} is {ratio:.3f} times the plain program's")


def counts(machine: Machine) -> Found:
    """Kernels and host syncs of one loss with its gradients."""
    n = 64 if machine.tiny else 4096
    states = random_states((*machine.widths[0], machine.vocabulary), n, machine.device).to(torch.bfloat16)
    for divergence in ("forward_kl", "adaptive_kl"):
        loss = selectkd(States, divergence, "greedy_topk")
        leaves = [x.detach().requires_grad_() for x in (states.hidden, states.head)]

        def call(loss: Any = loss, leaves: list[torch.Tensor] = leaves) -> None:
            loss(*leaves, states.teacher, states.teacher_head).backward()

        call()
        case = f"n {n}, v {machine.vocabulary}, bfloat16, {divergence}"
        if not machine.on_gpu:
            continue
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            call()
            machine.wait()
        kernels = sum(event.count for event in seen.key_averages() if not event.key.startswith("Mem"))
        yield (case, "selectkd", "kernels", kernels, "", 1), ""
        with warnings.catch_warnings(record=True) as waited:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            call()
            torch.cuda.set_sync_debug_mode("default")
        yield (case, "selectkd", "host syncs", len(waited), "", 1), ""


def loss_time(machine: Machine) -> Found:
    """Ours, the peers and the bare products in turn."""
    beside: dict[str, Peer] = {peer.name: peer for peer in PEERS if peer.name in PEERS_ON_A_GPU}
    absent = {name: why for name, peer in beside.items() if (why := peer.absence())}
    for name, why in absent.items():
        print(f"absent: {name}: {why}", flush=True)
    for d, e in machine.widths:
        states = random_states((d, e, machine.vocabulary), machine.rows, machine.device).to(torch.bfloat16)
        for divergence in DIVERGENCES_TIMED:
            case = f"n {machine.rows}, d {d}, e {e}, v {machine.vocabulary}, bfloat16, {divergence}"
            calls: dict[str, Callable[[States], object]] = {"limit": limit}
            calls["selectkd"] = differentiated(selectkd(States, divergence, "greedy_topk"))
            for name, peer in beside.items():
                if name not in absent and divergence in peer.offers:
                    calls[name] = differentiated(peer.load(divergence))
            peaks: dict[str, float | None] = {}
            for name, call in list(calls.items()):
                try:
                    call(states)  # compiles
                    peaks[name] = machine.peak_mib(partial(call, states))
                except (RuntimeError, ValueError) as error:
                    print(f"failed: {name}, {case}: {str(error).splitlines()[0]}", flush=True)
                    del calls[name]
            spent: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(machine.rounds):
                for name, call in calls.items():
                    spent[name].append(machine.seconds(partial(call, states)))
            for name, values in spent.items():
                package = f"{beside[name].package} {beside[name].version}" if name in beside else ""
                ratios = [a / b for a, b in zip(values, spent["limit"], strict=True)]
                yield (
                    (case, name, "milliseconds", *with_spread([1e3 * x for x in values]), len(values)),
                    package,
                )
                yield (case, name, "ratio_to_limit", *with_spread(ratios), len(values)), package
                if peaks[name] is not None:
                    yield (case, name, "peak_mib", peaks[name], "", 1), package


def qwen(name: str, machine: Machine) -> nn.Module:
    """A random Qwen2 of the shape, fp32 weights, on the device."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = TINY if machine.tiny else QWEN[name]
    config = Qwen2Config(
        vocab_size=machine.vocabulary,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        use_cache=False,
        **shape,
    )
    torch.manual_seed(0)
    with machine.device:
        return Qwen2ForCausalLM(config)


def steps(machine: Machine) -> Found:
    """Optimizer steps of ours and of TRL's trainers, bf16 compute and fp32 master weights for all."""
    samples, length = (2, 32) if machine.tiny else (8, 1024)
    seed = torch.Generator().manual_seed(0)
    ids = torch.randint(0, machine.vocabulary, (samples, length), generator=seed).tolist()
    marks = [False] * (length // 8) + [True] * (length - length // 8)
    batch = collate(
        [Example(input_ids=row, completion=marks, stream=0, origin="random") for row in ids], pad_id=0
    )
    for divergence, beta in (("forward_kl", 0.0), ("generalized_jsd", 0.5)):
        case = f"random Qwen2 0.5B from 1.5B, {samples} x {length} tokens, {divergence}"
        calls, packages = {}, {}
        for name, make in (
            ("selectkd", our_step),
            ("trl_gkd", gkd_step),
            ("trl_distillation", distillation_step),
        ):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    calls[name], packages[name] = make(machine, batch, divergence, beta, folder)
                    calls[name]()
                except (ImportError, RuntimeError, ValueError, TypeError) as error:
                    calls.pop(name, None)
                    print(f"failed: {name}, {case}: {str(error).splitlines()[0]}", flush=True)
        peaks = {name: machine.peak_mib(call) for name, call in calls.items()}
        spent: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(machine.rounds):
            for name, call in calls.items():
                spent[name].append(machine.seconds(call))
        for name, values in spent.items():
            rates = [samples * length / x for x in values]
            yield (case, name, "tokens_per_second", *with_spread(rates), len(values)), packages[name]
            if peaks[name] is not None:
                yield (case, name, "peak_mib", peaks[name], "", 1), packages[name]
        del calls


def mixed(kind: Any, machine: Machine, folder: str, **more: Any) -> Any:
    """Training arguments with bf16 compute where the device has it."""
    settings = arguments_for(kind, folder, bf16=machine.on_gpu, **more)
    if machine.on_gpu:
        settings.use_cpu = False
    return settings


def our_step(machine: Machine, batch: Any, divergence: str, beta: float, folder: str) -> tuple[Any, str]:
    """LedgerTrainer's own step."""
    from transformers import TrainingArguments

    from selectkd.training.feed import BatchFeed
    from selectkd.training.ledger import Ledger
    from selectkd.training.step import DistillationModel
    from selectkd.training.trainer import LedgerTrainer

    student, teacher = qwen("0.5B", machine), qwen("1.5B", machine).requires_grad_(False).eval().bfloat16()
    trainer = LedgerTrainer(
        DistillationModel(student, LiveTeacher(teacher)), BatchFeed(lambda _: [batch]),
        Ledger(Objective(divergence, "greedy_topk", beta=1.0), "token_mean"),
        mixed(TrainingArguments, machine, folder),
    )  # fmt: skip
    model: Any = trainer.model

    def gradients() -> None:
        for micro_batch in trainer.ledger.begin([batch]):
            trainer.training_step(model, micro_batch)

    return optimised(student, gradients), ""


def gkd_step(machine: Machine, batch: Any, divergence: str, beta: float, folder: str) -> tuple[Any, str]:
    """TRL's GKD trainer on the same text; it never generates here."""
    import datasets
    import trl
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    student, teacher = qwen("0.5B", machine), qwen("1.5B", machine).requires_grad_(False).eval().bfloat16()
    settings = mixed(
        GKDConfig, machine, folder, lmbda=0.0, beta=beta, gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    trainer = GKDTrainer(
        model=student, teacher_model=teacher, args=settings, processing_class=word_tokenizer(),
        train_dataset=datasets.Dataset.from_list([{"messages": [{"role": "user", "content": "-"}] * 2}]),
        data_collator=lambda rows: rows,
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    inputs = {name: x.to(machine.device) for name, x in hf_inputs(batch).items()}
    return optimised(
        student, lambda: trainer.training_step(student, dict(inputs), None)
    ), f"trl {trl.__version__}"


def distillation_step(
    machine: Machine, batch: Any, divergence: str, beta: float, folder: str
) -> tuple[Any, str]:
    """The chunked kernel of TRL's DistillationTrainer behind both backbones, the step it takes once text is written."""
    import trl

    loss = next(peer for peer in PEERS if peer.name == "trl_chunked").load(divergence)
    student, teacher = qwen("0.5B", machine), qwen("1.5B", machine).requires_grad_(False).eval().bfloat16()
    given = {name: x.to(machine.device) for name, x in batch.model_inputs().items()}
    trained = batch.completion[:, 1:].to(machine.device)

    def gradients() -> None:
        with torch.autocast(machine.device.type, torch.bfloat16, enabled=machine.on_gpu):
            ours = student.model(**given)[0][:, :-1][trained]
            with torch.no_grad():
                theirs = teacher.model(**given)[0][:, :-1][trained]
            head = student.lm_head.weight.to(ours.dtype)
            loss(ours, head, theirs, teacher.lm_head.weight.to(theirs.dtype)).backward()

    return optimised(student, gradients), f"trl {trl.__version__}"


def word_tokenizer() -> Any:
    """A tokenizer for a trainer that demands one and never asks it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"-": 0, "<eos>": 1}, unk_token="-"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")


def generation(machine: Machine) -> Found:
    """Greedy text of 32 prompts by both, the same prompts."""
    import transformers

    model: Any = qwen("0.5B", machine).eval()
    if machine.on_gpu:
        model.bfloat16()
    count, prompt, new = (4, 8, 8) if machine.tiny else (32, 64, 128)
    seed = torch.Generator().manual_seed(0)
    ids = torch.randint(0, machine.vocabulary, (count, prompt), generator=seed)
    requests = [Request(row, new) for row in ids.tolist()]
    on_device = ids.to(machine.device)

    def ours() -> object:
        return generate(
            [model], requests, Draw(Sampling(temperature=0.0)), ends=frozenset(), width=machine.vocabulary
        )

    def theirs() -> object:
        with torch.no_grad():
            return model.generate(
                on_device, attention_mask=torch.ones_like(on_device), max_new_tokens=new, do_sample=False,
                pad_token_id=0, eos_token_id=None, use_cache=True,
            )  # fmt: skip

    calls = {"selectkd": ours, "transformers": theirs}
    for call in calls.values():
        call()
    case = f"random Qwen2 0.5B, {count} prompts of {prompt} tokens, {new} new, greedy"
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(3):
        for name, call in calls.items():
            rates[name].append(count * new / machine.seconds(call))
    for name, values in rates.items():
        beside = f"transformers {transformers.__version__}" if name == "transformers" else ""
        yield (case, name, "tokens_per_second", *with_spread(values), len(values)), beside


PARTS: dict[str, Callable[[Machine], Found]] = {
    "correctness": correctness,
    "counts": counts,
    "loss": loss_time,
    "steps": steps,
    "generation": generation,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that the program runs")
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    parser.add_argument("--record", action="store_true", help="append the rows to results.csv")
    wanted = parser.parse_args()
    if wanted.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; `--tiny --device cpu` shows that the program runs.")
    machine, until, rows = Machine(wanted.device, wanted.tiny), time.monotonic() + 60 * wanted.minutes, []
    print(f"{machine.name}, torch {torch.__version__}", flush=True)
    for part in wanted.parts:
        for row, package in PARTS[part](machine):
            rows.append((part, *row))
            print(f"{part}: {row[0]}: {row[1]}: {row[2]} {row[3]:.5g}", flush=True)
            if wanted.record:
                record("gpu", [row], beside=package, device=machine.name)
            if wanted.json is not None:
                wanted.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            if time.monotonic() > until:
                break
        if time.monotonic() > until:
            print(f"the time is over within {part}", flush=True)
            break
    with suppress(RuntimeError):
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
