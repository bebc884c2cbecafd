"""``selectkd init RECIPE``: a commented recipe to start from."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from selectkd.cli.terminal import say
from selectkd.config.shipped import shipped_recipe
from selectkd.errors import ConfigError

STARTER = """\
# A selectkd recipe. Run it with: selectkd train THIS_FILE
# Change a key for one run with: --set training.learning_rate=1e-4

teacher:
  model: $teacher      # a hub id, a folder, or a .gguf file
  # placement: offloaded             # its layers in main memory, where the device has no room for them

student:
$student

data:
  sources:
    - path: $data         # .jsonl, .parquet, a folder or a hub data set id; the format is detected
  evaluation: 0.05                   # a share held out, or {path: ...}
  train_on: completion               # completion | all

method: kd                           # plain distillation: forward KL on every token; `selectkd show methods` has others
# SelecTKD's gate over it, as in the paper (method: selectkd-paper); `selectkd doctor` says if it is likely to help:
$gate

training:
  output_dir: runs/first             # a new or empty folder
$steps
  max_length: 1024
  max_prompt_length: 512
  precision: auto                    # auto | bf16 | bf16-pure | fp32 | tf32; auto is bf16 on a GPU that has it
$weights
"""

LOADED = {
    "student": """\
  model: $student             # must share the teacher's tokenizer
  # or cut the student from the teacher:
  # from_teacher: {layers: 20, choose: measured}   # measured | even | a list of layers""",
    "gate": """\
# selection: {verifier: greedy_topk, k: 5, beta: 0.01}   # beta: weight of a token that the teacher rejects""",
    "steps": """\
  epochs: 2                          # or max_steps
  batch_size: 8
  gradient_accumulation: 4
  learning_rate: 5e-5""",
    "weights": """\
  lora: {r: 16, alpha: 128, dropout: 0.05}   # null trains every weight
  evaluate_every: 100""",
}
"""What a starter says about a student that is loaded."""

CUT = {
    "student": """\
  from_teacher: {layers: $layers, choose: measured}   # measured | even | a list of layers
  # or load one that shares the teacher's tokenizer:
  # model: Qwen/Qwen2-1.5B""",
    "gate": """\
# selection: {verifier: greedy_topk, k: 5, beta: {start: 1.0, end: 0.01, until_tar: 0.5}}
# beta is the weight of a token that the teacher rejects: 1 at first, where a cut student agrees seldom""",
    "steps": """\
  epochs: 1                          # or max_steps
  batch_size: 8
  learning_rate: 2e-4""",
    "weights": """\
  evaluate_every: 20                 # steps""",
}
"""And about one that is cut from its teacher, as in the demo's recipe."""


def starter(teacher: str, student: str, layers: int | None, data: str) -> str:
    """The starter for models and text by name; layers: of a student that is cut from the teacher."""
    parts = LOADED if layers is None else CUT
    named = {"student": _scalar(student), "layers": str(layers)}
    filled = {key: Template(part).substitute(named) for key, part in parts.items()}
    return Template(STARTER).substitute(filled, teacher=_scalar(teacher), data=_scalar(data))


def _scalar(text: str) -> str:
    """Text as a scalar of YAML."""
    return text if re.fullmatch(r"[A-Za-z./][\w./-]*", text, re.ASCII) else json.dumps(text)


def init(
    recipe: Annotated[Path, typer.Argument(help="The file to write. An existing file is never overwritten.")],
    origin: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="NAME", help="Start from a recipe that comes with selectkd, such as demo."
        ),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", metavar="MODEL", help="A hub id, a folder or a .gguf file.")
    ] = None,
    student: Annotated[
        str | None, typer.Option("--student", metavar="MODEL", help="A model with the teacher's tokenizer.")
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            "--layers", metavar="N", min=1, help="Cut a student of N layers from the teacher instead."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="PATH", help="Your text, such as chats.jsonl.")
    ] = None,
) -> None:
    """Write a commented recipe to start from."""
    named = [teacher, student if layers is None else str(layers), data]
    if origin is not None and any(one is not None for one in (*named, student)):
        raise ConfigError(
            "--from takes a recipe as it is. Leave --teacher, --student, --layers and --data out."
        )
    if student is not None and layers is not None:
        raise ConfigError("--student loads a model and --layers cuts one from the teacher. Give one of them.")
    if origin is None:
        text = starter(
            teacher or "Qwen/Qwen2-7B-Instruct",
            student or "Qwen/Qwen2-1.5B",
            layers,
            data or "data/train.jsonl",
        )
    else:
        text = shipped_recipe(origin).read_text(encoding="utf-8")
    _write_new(recipe, text)
    missing = [name for name, one in zip(("teacher", "student", "data"), named, strict=True) if one is None]
    edit = f"Set {', '.join(missing)} in it, then" if missing and origin is None else "Next"
    say(f"wrote {recipe}. {edit}: selectkd doctor {shlex.quote(str(recipe))}")


def _write_new(recipe: Path, text: str) -> None:
    if not recipe.parent.is_dir():
        raise ConfigError(f"there is no folder {recipe.parent}; make it first.")
    try:
        with recipe.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(
            f"{recipe} exists and is left as it is. Name another file, or delete this one."
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(recipe)[:200]} cannot be written: {error}.") from None
