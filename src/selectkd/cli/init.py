"""``selectkd init RECIPE``: a commented recipe to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from selectkd.cli.terminal import say
from selectkd.config.shipped import shipped_recipe
from selectkd.errors import ConfigError

STARTER = """\
# A selectkd recipe. Run it with: selectkd train THIS_FILE
# Change a key for one run with: --set training.learning_rate=1e-4

teacher:
  model: Qwen/Qwen2-7B-Instruct      # a hub id, a folder, or a .gguf file
  # placement: offloaded             # its layers in main memory, where the device has no room for them

student:
  model: Qwen/Qwen2-1.5B             # must share the teacher's tokenizer
  # or cut the student from the teacher:
  # from_teacher: {layers: 20, choose: measured}   # measured | even | a list of layers

data:
  sources:
    - path: data/train.jsonl         # .jsonl, .parquet, a folder or a hub data set id; the format is detected
  evaluation: 0.05                   # a share held out, or {path: ...}
  train_on: completion               # completion | all

objective:                           # `selectkd show` lists divergences, verifiers and selectors
  divergence: {name: forward_kl}
  verifier: {name: greedy_topk, k: 5}   # accepted: the student's best token is among the teacher's 5 best
  beta: 0.01                         # weight of a rejected token; for a student that agrees nowhere yet:
  # beta: {start: 1.0, end: 0.01, until_tar: 0.5}

training:
  output_dir: runs/first             # a new or empty folder
  epochs: 2                          # or max_steps
  batch_size: 8
  gradient_accumulation: 4
  learning_rate: 5e-5
  max_length: 1024
  max_prompt_length: 512
  precision: auto                    # auto | bf16 | bf16-pure | fp32 | tf32; auto is bf16 on a GPU that has it
  lora: {r: 16, alpha: 128, dropout: 0.05}   # null trains every weight
  evaluate_every: 100
"""


def init(
    recipe: Annotated[Path, typer.Argument(help="The file to write. An existing file is never overwritten.")],
    origin: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="NAME", help="Start from a recipe that comes with selectkd, such as demo."
        ),
    ] = None,
) -> None:
    """Write a commented recipe to start from."""
    text = STARTER if origin is None else shipped_recipe(origin).read_text(encoding="utf-8")
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
    say(f"wrote {recipe}. Set teacher, student and data, then: selectkd train {recipe}")
