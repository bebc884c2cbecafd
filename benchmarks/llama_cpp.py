"""An exported GGUF file in llama.cpp beside its student: the same ids, and the same greedy answers.

    pip install xllamacpp
    selectkd export runs/demo --to gguf --type f16 --out exports/demo-f16
    python benchmarks/llama_cpp.py runs/demo exports/demo-f16 [--caches f16,f32] [--record]

The student answers in fp32. For each type of llama.cpp's cache of keys and values: how many answers are the same, and
of each other one by how many nats the student prefers its own token to llama.cpp's, at the place where they part.
"""

from __future__ import annotations

import argparse
import json
import urllib.request
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from export_text import prompts_of
from record import Row, record

from selectkd.evals.exported import Answers, answers_of, id_texts
from selectkd.evals.runs import load_student
from selectkd.models.export.exported import encoder, model_logits
from selectkd.models.export.student import Student
from selectkd.models.lora import merge
from selectkd.rollouts.generate import ends_of

CONTEXT = 1024


class LlamaCpp:
    """A server of llama.cpp in this process, one sequence at a time."""

    def __init__(self, file: Path, cache: str) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.cache_type_k = settings.cache_type_v = getattr(
            xllamacpp.ggml_type, f"GGML_TYPE_{cache.upper()}"
        )
        settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity = CONTEXT, 1, False, 0
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
        self.server = xllamacpp.Server(settings)

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.server.listening_address}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)

    def ids(self, text: str, special: bool) -> list[int]:
        return self.ask("/tokenize", {"content": text, "add_special": special, "parse_special": True})[
            "tokens"
        ]

    def answer(self, prompt: list[int], tokens: int) -> tuple[list[int], bool]:
        """(the greedy answer, whether it came to an end token, which is not among the ids)."""
        body = {"prompt": prompt, "n_predict": tokens, "temperature": 0.0, "top_k": 1, "cache_prompt": False}
        found = self.ask("/completion", {**body, "return_tokens": True})
        return found["tokens"], found["stop_type"] == "eos"


def gap(
    student: Student, prompt: list[int], answer: list[int], other: list[int], ended: bool
) -> float | None:
    """log p(answer) - log p(other) of the student at the first token where both differ; None where they are the same.

    Where one of them ends earlier, its end token stands against the other's next token.
    """
    other = [*other, min(student.ends)] if ended else other
    last_is_end = answer[-1] in student.ends and other[-1] in student.ends
    place = next((i for i, (a, b) in enumerate(zip(answer, other, strict=False)) if a != b), None)
    if place is None or (last_is_end and place == len(answer) - 1 == len(other) - 1):
        return None
    logp = model_logits(student.model)(torch.tensor([*prompt, *answer[:place]]))[-1].double().log_softmax(-1)
    return float(logp[answer[place]] - logp[other[place]])


def gaps(student: Student, server: LlamaCpp, answers: Answers, tokens: int) -> list[float]:
    """The gap of each answer that parts, from small to large."""
    found = [
        gap(student, prompt, answer, *server.answer(prompt, tokens))
        for prompt, answer in zip(answers.prompts, answers.answers, strict=True)
    ]
    return sorted(one for one in found if one is not None)


def words(same: int, of: int, apart: Sequence[float]) -> str:
    if not apart:
        return f"{same} of {of}"
    return f"{same} of {of}; the others part at gaps of {', '.join(f'{one:.2g}' for one in apart)} nats"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("student", help="a run folder or a model folder")
    parser.add_argument("export", type=Path, help="the folder of its export, or a .gguf file")
    parser.add_argument("--caches", default="f16,f32")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument(
        "--case", help="what was exported, for the row; the export's name where none is given"
    )
    parser.add_argument("--record", action="store_true")
    asked = parser.parse_args()
    file = next(asked.export.glob("*.gguf")) if asked.export.is_dir() else asked.export
    loaded = load_student(asked.student)
    student = Student(merge(loaded.model), loaded.tokenizer, loaded.source, ends_of)
    prompts = prompts_of(student.tokenizer, asked.prompts)
    answers = answers_of(student, prompts, asked.tokens)
    encode, rows = encoder(student.tokenizer), list[Row]()
    case = asked.case or file.stem
    for number, cache in enumerate(asked.caches.split(",")):
        server = LlamaCpp(file, cache)
        if not number:
            texts = id_texts(student.tokenizer, [student.tokenizer.decode(one) for one in prompts])
            equal = sum(server.ids(text, special) == encode(text, special) for text, special in texts)
            print(f"ids: {equal} of {len(texts)} texts")
            rows.append((case, "llama.cpp", f"texts with the same ids, of {len(texts)}", equal, "", 1))
        apart = gaps(student, server, answers, asked.tokens)
        same, of = len(prompts) - len(apart), len(prompts)
        print(f"greedy answers, {cache} cache: {words(same, of, apart)}")
        whose = f"llama.cpp, {cache} cache"
        rows.append((case, whose, f"greedy answers that are the same, of {of}", same, "", 1))
        if apart:
            spread = f"[{apart[0]:.2g}, {apart[-1]:.2g}]"
            rows.append((case, whose, "gap where answers part, nats", median(apart), spread, len(apart)))
        del server
    if asked.record:
        record("llama.cpp", rows, beside=f"xllamacpp {version('xllamacpp')}")


if __name__ == "__main__":
    main()
