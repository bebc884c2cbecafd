"""A student as the draft of a vLLM or SGLang server: a model folder, and the settings that the server is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from selectkd.data.alignment import align
from selectkd.data.durable import json_bytes
from selectkd.errors import ConfigError
from selectkd.models.export.folders import write_folder
from selectkd.models.export.student import Options, Student
from selectkd.models.head import head_of
from selectkd.models.load import PACKAGED, Loaded

SETTINGS = "speculative.json"


def check_pair(student: Student, options: Options) -> Loaded:
    """The target, once the student may draft for it; ConfigError where a server would refuse the pair or drafts would
    mean other tokens.
    """
    target = options.target
    if target is None:
        raise ConfigError(
            "a draft is written for its target. Name the model that the server serves with --target."
        )
    widths = [head_of(model).width for model in (target.model, student.model)]
    align(target.tokenizer, student.tokenizer, teacher_width=widths[0], student_width=widths[1])
    if widths[0] != widths[1]:
        raise ConfigError(
            f"the target's head has {widths[0]} rows and the draft's {widths[1]}: servers take a draft of the target's "
            f"vocab_size alone. Resize the student's embeddings to {widths[0]} before training."
        )
    lengths = [_length(model) for model in (target.model, student.model)]
    if lengths[1] < lengths[0]:
        raise ConfigError(
            f"the draft reads {lengths[1]} tokens and the target {lengths[0]}. Serve the target with "
            f"--max-model-len {lengths[1]}, after setting its max_position_embeddings so."
        )
    return target


def _length(model: Any) -> int:
    """The tokens that a model reads at most."""
    return int(model.config.get_text_config().max_position_embeddings)


def vllm_settings(folder: str, options: Options) -> dict[str, Any]:
    """What vLLM takes as ``--speculative-config``."""
    return {"method": "draft_model", "model": folder, "num_speculative_tokens": options.draft_length}


def sglang_flags(folder: str, options: Options) -> list[str]:
    """SGLang's flags for a draft model of its own: a chain of tokens, one candidate a step."""
    length = options.draft_length or 1
    return [
        "--speculative-algorithm", "STANDALONE", "--speculative-draft-model-path", folder,
        "--speculative-num-steps", str(length), "--speculative-eagle-topk", "1",
        "--speculative-num-draft-tokens", str(length + 1),
    ]  # fmt: skip


def target_folder(options: Options) -> tuple[str, list[str]]:
    """(the target as a server can load it, what is to be done first): servers know folders and names on the hub."""
    name = str(options.target_name)
    if name != PACKAGED and not name.endswith(".gguf"):
        return name, []
    folder = f"exports/{Path(name).stem}"
    return folder, [
        f"servers load no {name}: first write the target as a folder, `selectkd export {name} --to hf --out {folder}`"
    ]


def write_vllm(student: Student, folder: Path, options: Options) -> dict[str, Any]:
    """The folder, and ``speculative.json`` for ``vllm serve TARGET --speculative-config``."""
    write_folder(student, folder, options)
    settings = vllm_settings(str(options.folder), options)
    (folder / SETTINGS).write_bytes(json_bytes(settings))
    target, notes = target_folder(options)
    command = f"vllm serve {target} --speculative-config '{json.dumps(settings)}'"
    return {"speculative_config": settings, "notes": notes, "command": command}


def write_sglang(student: Student, folder: Path, options: Options) -> dict[str, Any]:
    """The folder, and ``speculative.json`` with the flags of ``sglang.launch_server``."""
    write_folder(student, folder, options)
    flags = sglang_flags(str(options.folder), options)
    (folder / SETTINGS).write_bytes(json_bytes({"flags": flags}))
    target, notes = target_folder(options)
    command = f"python -m sglang.launch_server --model-path {target} {' '.join(flags)}"
    return {"flags": flags, "notes": notes, "command": command}
