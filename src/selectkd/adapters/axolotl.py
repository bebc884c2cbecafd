"""Plugin: axolotl's own trainer with the distillation loss, by a ``selectkd:`` section of its YAML file.

    plugins: [selectkd.adapters.axolotl.Plugin]
    selectkd: {teacher: runs/cache/qwen, verifier: {name: greedy_topk, k: 5}, beta: 0.01}

``axolotl`` is imported where the plugin is made. b rows, t tokens, K stored tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from selectkd.adapters.hf import batch_of, distil
from selectkd.data.collate import Batch
from selectkd.errors import ConfigError
from selectkd.loss.options import LossOptions
from selectkd.loss.teacher_rows import CachedRows
from selectkd.objective.objective import Objective

IDS, LOGP = "target_token_ids", "target_logprobs"
"""The columns in which axolotl's data sets keep a teacher's best tokens, one list for each token of the text."""


class Settings(BaseModel):
    """The ``selectkd:`` section."""

    model_config = ConfigDict(extra="forbid")

    teacher: str | dict[str, Any] | None = Field(
        None, description="A model, a cache folder or a server; left out: the columns of the data set."
    )
    divergence: str | dict[str, Any] = Field(
        "forward_kl", description="A name, or {name: ..., PARAMETER: value}."
    )
    verifier: str | dict[str, Any] = Field(
        "greedy_topk", description="A name, or {name: ..., PARAMETER: value}."
    )
    beta: float = Field(0.01, ge=0, le=1, description="Weight of a rejected token.")
    reduction: str = Field("token_mean", description="token_mean, sequence_mean or weight_mean.")
    temperature: float = Field(1.0, gt=0, description="Of both models in the divergence.")


class Arguments(BaseModel):
    """What axolotl adds to the keys of its YAML file."""

    selectkd: Settings | None = None


def trainer_of(base: type[Any], settings: Settings) -> type[Any]:
    """A subclass of axolotl's trainer ``base`` with the loss of ``settings``; it takes the arguments of ``base``."""

    class SelecTKDTrainer(distil(base)):
        def __init__(self, *args: Any, **given: Any) -> None:
            super().__init__(
                *args,
                teacher=ColumnTeacher() if settings.teacher is None else settings.teacher,
                objective=Objective(settings.divergence, settings.verifier, settings.beta),
                reduction=settings.reduction,
                options=LossOptions(temperature=settings.temperature, also_kl=True),
                **given,
            )

        def batch_of(self, inputs: Any) -> Batch:
            return with_columns(inputs)

        def _set_signature_columns_if_needed(self) -> None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = list(dict.fromkeys([*self._signature_columns, IDS, LOGP]))

    return SelecTKDTrainer


@dataclass(frozen=True)
class ColumnBatch(Batch):
    """A batch with a teacher's best tokens: those at i are of the distribution that token i was drawn from."""

    teacher_ids: Tensor | None = None  # [b, t, K]
    teacher_logp: Tensor | None = None  # [b, t, K]


def with_columns(inputs: Any) -> Batch:
    """The batch of a collator's tensors, with the columns of its teacher where there are some."""
    batch = batch_of(inputs)
    if IDS not in inputs:
        return batch
    values = {
        name: getattr(batch, name) for name in Batch.__dataclass_fields__ if name not in ("origin", "found")
    }
    return ColumnBatch(**values, teacher_ids=inputs[IDS], teacher_logp=inputs[LOGP])


class ColumnTeacher:
    """The teacher whose K best tokens stand in the data set itself."""

    def __call__(self, batch: Any, position: Tensor) -> CachedRows:
        """The rows of the tokens that are predicted at ``position`` [n]."""
        if not isinstance(batch, ColumnBatch) or batch.teacher_ids is None or batch.teacher_logp is None:
            raise ConfigError(
                f"the data set has no columns {IDS} and {LOGP}. Name a teacher: selectkd: {{teacher: MODEL}}."
            )
        ids, logp = (
            x.reshape(-1, x.shape[-1])[position + 1] for x in (batch.teacher_ids, batch.teacher_logp)
        )
        return CachedRows(ids, logp.float())


@cache
def _plugin() -> type[Any]:
    from axolotl.integrations.base import BasePlugin  # pyright: ignore[reportMissingImports]

    class Plugin(BasePlugin):
        """axolotl's plugin: ``get_input_args`` names the section, ``get_trainer_cls`` the trainer."""

        def get_input_args(self) -> str:
            return f"{__name__}.Arguments"

        def get_trainer_cls(self, cfg: Any) -> type[Any] | None:
            if not cfg.selectkd:
                return None
            from axolotl.core.trainers import AxolotlTrainer  # pyright: ignore[reportMissingImports]

            given = cfg.selectkd
            return trainer_of(
                AxolotlTrainer, given if isinstance(given, Settings) else Settings(**dict(given))
            )

    return Plugin


def __getattr__(name: str) -> Any:
    if name == "Plugin":
        return _plugin()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
