"""The laboratory's text: problems with exact answers, Python functions, and instructions, cut into records of one
prompt and one completion; and tokenizers trained on them.

Problems are made by reasoning-gym. Functions are read from the packages that pip has installed here, all of them under
permissive licenses, and stay in the cache folder. Instructions are the file that `make demo` fetches.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
"""prompt, completion, and what else is needed to check a completion: task and answer of a problem."""

TASKS: Mapping[str, Mapping[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "spell_backward": {"min_word_len": 3, "max_word_len": 5},
    "leg_counting": {"min_animals": 1, "max_animals": 2, "max_instances": 5},
    "gcd": {"min_value": 1, "max_value": 30},
    "simple_equations": {"min_terms": 2, "max_terms": 2, "max_value": 9},
    "syllogism": {},
}
"""reasoning-gym's tasks, so small that a model of some million parameters learns several of them."""

PACKAGES = (
    "networkx",
    "sympy",
    "scipy",
    "pandas",
    "transformers",
    "rich",
    "pydantic",
    "httpx2",
    "accelerate",
    "peft",
)
"""Installed packages whose source is read: BSD, MIT or Apache-2.0."""

INSTRUCTIONS = Path(".cache/demo/alpaca_en_demo.json")


def problems(count: int, seed: int) -> list[Record]:
    """``count`` problems, as many of each task, mixed; no question twice."""
    import reasoning_gym

    found: dict[str, Record] = {}
    for task, settings in TASKS.items():
        wanted, of_task = count // len(TASKS), 0
        # four times as many are tried: small tasks repeat themselves
        for entry in reasoning_gym.create_dataset(task, seed=seed, size=4 * wanted, **settings):
            prompt = " ".join(entry["question"].split()) + "\n"
            if of_task < wanted and prompt not in found:
                of_task += 1
                answer = str(entry["answer"])
                found[prompt] = {"prompt": prompt, "completion": answer, "task": task, "answer": answer}
    return mixed(found.values(), seed)


def functions(count: int, seed: int) -> list[Record]:
    """At most ``count`` functions of 80 to 600 characters, their comments and docstrings left out, none twice."""
    found: dict[str, Record] = {}
    for file in mixed(_files(), seed):
        for source in _functions_in(file):
            head, _, body = source.partition("\n")
            found.setdefault(source, {"prompt": head + "\n", "completion": body, "task": "code"})
        if len(found) >= count:
            break
    return mixed(found.values(), seed)[:count]


def _files() -> list[Path]:
    files: list[Path] = []
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        for folder in [] if spec is None else spec.submodule_search_locations or []:
            files += [one for one in sorted(Path(folder).rglob("*.py")) if one.stat().st_size < 200_000]
    return files


def _functions_in(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_text("utf-8"))
    except (SyntaxError, ValueError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        node.decorator_list, node.returns = [], None
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        source = ast.unparse(node)
        if 80 <= len(source) <= 600:
            yield source


def instructions(count: int, seed: int) -> list[Record]:
    """At most ``count`` of the demo's instructions with their answers."""
    rows = json.loads(INSTRUCTIONS.read_text("utf-8"))
    records = [
        {
            "prompt": f"{row['instruction']} {row['input']}".strip() + "\n",
            "completion": row["output"],
            "task": "text",
        }
        for row in rows
    ]
    return mixed(records, seed)[:count]


def mixed(items: Any, seed: int) -> list[Any]:
    """The items in an order that the seed decides."""
    items = list(items)
    random.Random(seed).shuffle(items)
    return items


CORPORA: Mapping[str, Callable[[int, int], list[Record]]] = {
    "problems": problems,
    "code": functions,
    "instructions": instructions,
}


def tokenizer_of(records: Sequence[Record], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer of ``vocabulary`` tokens trained on the records; every digit is a token of its own,
    so that numbers keep their places."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<end>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator((one["prompt"] + one["completion"] for one in records), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def write(path: Path, records: Sequence[Record]) -> None:
    """One record a line, the file whole or not there."""
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(one) + "\n" for one in records), "utf-8")
    part.rename(path)


def read(path: Path) -> list[Record]:
    """The records of a file that ``write`` wrote."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
