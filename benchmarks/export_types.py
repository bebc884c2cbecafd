"""What each number format of an export costs a model: KL of model to export, best tokens, greedy answers.

    python benchmarks/export_types.py MODEL... [--types f16,bf16,q8_0,q5_1,q4_0] [--prompts 50] [--record]
        [--calibrate RECORDS]

MODEL is a run folder or a model. GGUF files all, on the prompts and the greedy answers that `selectkd export` measures.
--calibrate: q8_0, q5_1 and q4_0 are rounded for 128 of these records as well.
The bounds of `selectkd.evals.exported.BOUNDS` are read off these figures.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from export_text import prompts_of
from record import Row, record

from selectkd.cli.export import CALIBRATION, LONGEST
from selectkd.evals.exported import answers_of, fidelity
from selectkd.evals.prompts import read_texts
from selectkd.evals.runs import load_student
from selectkd.models.export.kinds import CALIBRATED
from selectkd.models.export.student import Options, Student
from selectkd.models.export.targets import read_gguf, write_gguf
from selectkd.models.lora import merge
from selectkd.rollouts.generate import ends_of


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+")
    parser.add_argument("--types", default="f32,f16,bf16,q8_0,q5_1,q4_0")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--calibrate", type=Path)
    parser.add_argument("--record", action="store_true")
    asked = parser.parse_args()
    rows: list[Row] = []
    for name in asked.models:
        loaded = load_student(name)
        student = Student(merge(loaded.model), loaded.tokenizer, loaded.source, ends_of)
        answers = answers_of(student, prompts_of(student.tokenizer, asked.prompts), asked.tokens)
        kinds = [(kind, ()) for kind in asked.types.split(",")]
        if asked.calibrate is not None:
            texts = read_texts(asked.calibrate, student.tokenizer, limit=CALIBRATION, longest=LONGEST)
            kinds += [(kind, texts) for kind, _ in kinds if kind in CALIBRATED]
        for kind, texts in kinds:
            with tempfile.TemporaryDirectory() as folder:
                options = Options(kind, Path(folder), calibration=texts)
                write_gguf(student, Path(folder), options)
                found = fidelity(student, read_gguf(Path(folder), student, options), answers, [])
            how = f"{kind}, rounded for texts" if texts else kind
            kl, top1 = found.kl, found.top1
            print(
                f"{Path(name).name:<16}{how:<26}KL {kl.value:.3g} [{kl.low:.3g}, {kl.high:.3g}]  same best token "
                f"{top1.value:.4f}  same greedy answer {found.greedy()}",
                flush=True,
            )
            case, n = f"{Path(name).name}, {found.texts} prompts", found.texts
            rows += [
                (case, how, "kl", kl.value, f"[{kl.low:.3g}, {kl.high:.3g}]", n),
                (case, how, "same best token", top1.value, f"[{top1.low:.3g}, {top1.high:.3g}]", n),
                (case, how, "same greedy answers", found.greedy_same, "", n),
            ]
    if asked.record:
        record("export types", rows)


if __name__ == "__main__":
    main()
