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
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
"""prompt, completion, and what else is needed to check a completion: task and answer of a problem."""

TASKS: Mapping[str, Mapping[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "spell_backward": {"min_word_len": 3, "max_word_len": 5},
    "leg_counting": {"min_animals": 1, "max_animals": 2, "max_instances": 5},
    "gcd": {"min_value": 1, "max_value": 60},
    "simple_equations": {"min_terms": 2, "max_terms": 2, "max_value": 9},
    "syllogism": {},
}
"""reasoning-gym's tasks, so small that a model of some million parameters learns several of them."""

DRAWN = ("problems",)
"""Corpora whose prompts are drawn at random: their models are trained on the completions alone."""

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
    """``count`` problems, as many of each task where it has so many, mixed; no question twice. A question may have a
    twin, see ``twin``."""
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
                worked = STEPS[task](entry) if task in STEPS else ""
                completion = f"{worked} = {answer}" if worked else answer
                found[prompt] = {"prompt": prompt, "completion": completion, "task": task, "answer": answer}
    return mixed(found.values(), seed)


def twin(record: Mapping[str, Any]) -> tuple[str, ...]:
    """What a problem has in common with those that differ from it by the order of their parts, as gcd(12, 8) and
    gcd(8, 12), or by the name of the unknown, and that have its answer."""
    parts = re.findall(r"\d+|[a-z]+|[-+*/=]", record["prompt"].lower())
    return (
        record["task"],
        record["answer"],
        *sorted("x" if re.fullmatch("[a-z]", one) else one for one in parts),
    )


def _sum_steps(entry: Mapping[str, Any]) -> str:
    """From the last digit on: ``45 + 38`` has the steps ``5+8=13 4+3+1=8``; a difference below 0 is turned round."""
    left, sign, right = entry["metadata"]["expression"].split()
    a, b = sorted((int(left), int(right)), reverse=True) if sign == "-" else (int(left), int(right))
    steps, carry = [f"{a}{sign}{b}"], 0
    for place in range(max(len(str(a)), len(str(b)))):
        first, second = a // 10**place % 10, b // 10**place % 10
        if sign == "+":
            found = first + second + carry
            steps.append(f"{first}+{second}+{carry}={found}")
            carry = found // 10
        else:
            found = first - second - carry
            carry = int(found < 0)
            steps.append(f"{first}-{second}={found % 10}-{carry}")
    return " ".join(steps)


def _leg_steps(entry: Mapping[str, Any]) -> str:
    """``5*2=10 2*8=16 10+16``: legs of an animal, times how many there are."""
    animals, total = entry["metadata"]["animals"], int(entry["answer"])
    if len(animals) == 1:
        (count,) = animals.values()
        return f"{count}*{total // count}"
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    parts = [(count, ANIMALS[name]) for name, count in animals.items()]
    steps = [f"{count}*{legs}={count * legs}" for count, legs in parts]
    return " ".join([*steps, "+".join(str(count * legs) for count, legs in parts)])


def _gcd_steps(entry: Mapping[str, Any]) -> str:
    """Euclid's remainders: ``48 18 12 6 0``."""
    a, b = sorted(entry["metadata"]["numbers"], reverse=True)
    steps = [a]
    while b:
        steps.append(b)
        a, b = b, a % b
    return " ".join(map(str, [*steps, 0]))


def _equation_steps(entry: Mapping[str, Any]) -> str:
    """``8*v + 1 = 49`` has the steps ``49-1=48 48/8``, and ``5 - 8*v = -51`` has ``5--51=56 56/8``."""
    left, right = entry["metadata"]["equation"].split(" = ")
    terms, total = left.split(), int(right)
    unknown = next(term for term in terms if term[-1].isalpha())
    factor = int(unknown[:-2] or 1)
    steps = []
    if len(terms) == 3:
        first, sign, second = terms
        if second == unknown and sign == "-":
            step, total = f"{first}-{total}", int(first) - total
        else:
            known, back = second if first == unknown else first, "+" if sign == "-" else "-"
            step, total = f"{total}{back}{known}", total + int(f"{back}{known}")
        steps.append(f"{step}={total}")
    if factor > 1:
        steps.append(f"{total}/{factor}")
    return " ".join(steps)


def _letter_steps(entry: Mapping[str, Any]) -> str:
    """The letters one by one, forward and backward."""
    word = entry["metadata"]["word"]
    return f"{' '.join(word)} : {' '.join(reversed(word))}"


STEPS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "chain_sum": _sum_steps,
    "leg_counting": _leg_steps,
    "gcd": _gcd_steps,
    "simple_equations": _equation_steps,
    "spell_backward": _letter_steps,
}
"""The worked steps that come before an answer, where a task has them."""


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
