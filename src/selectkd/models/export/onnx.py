"""ONNX through transformers' own exporter: one graph, ids and mask to logits, run by ONNX Runtime.

The graph keeps no keys and values from one call to the next; transformers' ``export_for_generation`` makes the pair of
graphs that does, of the same folder.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selectkd.config.extras import how_to_install
from selectkd.errors import ConfigError
from selectkd.models.export.exported import Exported, encoder, template_of
from selectkd.models.export.student import Options, Student
from selectkd.models.shape import UPSTREAM_ERRORS, without_reports

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
EXAMPLE = (2, 7)
"""Rows and tokens of the example that the graph is traced with; both may be any number afterwards."""


def check_packages() -> None:
    """ConfigError where a package of the extra is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing or importlib.util.find_spec("transformers.exporters") is None:
        name = missing[0] if missing else "transformers.exporters, new in transformers 5.23,"
        raise ConfigError(f"--to onnx needs {name}. Install it: {how_to_install('onnx')}.")


def write_onnx(student: Student, folder: Path, options: Options) -> dict[str, Any]:
    """``model.onnx`` with its weights, the configuration and the tokenizer; ConfigError where the trace fails."""
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    model = student.model
    ids = torch.randint(student.tokenizer.vocab_size, EXAMPLE, generator=torch.Generator().manual_seed(0))
    inputs: Any = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with without_reports(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exported = OnnxExporter().export(model, inputs, OnnxConfig(dynamic=True))
        except UPSTREAM_ERRORS as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"transformers cannot export {type(model).__name__} to ONNX: {reason[:200]}. Use --to gguf or merged."
            ) from error
    exported.save_pretrained(folder)
    student.tokenizer.save_pretrained(folder)
    return {"inputs": ["input_ids", "attention_mask"], "outputs": ["logits"], "key_value_cache": False}


def read_onnx(folder: Path, student: Student, options: Options) -> Exported:
    """The graph in ONNX Runtime on the processor."""
    import onnxruntime
    from transformers import AutoTokenizer

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

    def logits(ids: Tensor) -> Tensor:
        rows = ids[None].cpu()
        feed = {"input_ids": rows.numpy(), "attention_mask": torch.ones_like(rows).numpy()}
        found: Any = session.run(["logits"], feed)[0]  # [1, t, v]
        return torch.from_numpy(found[0]).float()

    return Exported(
        encode=encoder(tokenizer),
        logits=logits,
        ends=student.ends_of(tokenizer, student.model),
        template=template_of(tokenizer),
        read_by=f"ONNX Runtime {onnxruntime.__version__}",
    )
