"""The base of every section of a recipe: a strict, frozen model, and the types of values."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

Dtype = Literal["float32", "bfloat16"]
Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]
"""How a model computes attention: ways that are installed here, never a kernel of the hub."""


def refuse(message: str, *, at: str = "") -> PydanticCustomError:
    """The error of a check of several keys, its message shown unchanged; ``at``: the key below that it is about."""
    return PydanticCustomError("selectkd", "{message}", {"message": message, "at": at})


def _whole(value: Any) -> Any:
    """1e3 and 1000.0 count as 1000."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _printable(value: Any) -> Any:
    if isinstance(value, str) and any(ord(letter) < 32 or ord(letter) == 127 for letter in value):
        raise refuse("must not hold control characters")
    return value


def _component(value: Any) -> Any:
    """A component as {name, **params}; a bare name stands for its defaults."""
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict):
        raise refuse("must be a name or {name: ..., parameter: value}")
    name = value.get("name")
    if not isinstance(name, str) or not name:
        raise refuse("needs a name: write {name: ..., parameter: value}; `selectkd show` lists the names")
    _check_rate(value)
    return value


def _check_rate(component: dict[str, Any]) -> None:
    """Refuses random tokens at a rate that is no share, here or as the gate that a control repeats."""
    rate, of = component.get("rate"), component.get("of")
    if component.get("name") == "matched_random" and isinstance(rate, int | float) and not 0.0 <= rate <= 1.0:
        raise refuse(
            f"has rate = {rate}, but matched_random keeps a share of the tokens; rate lies in [0, 1]"
        )
    if isinstance(of, dict):
        _check_rate(of)


SET_BY_RENDERING = ("messages", "documents", "add_generation_prompt", "strftime_now")


def _arguments(value: Any) -> Any:
    """Arguments of a chat template; those that a rendering sets itself are refused."""
    reserved = [name for name in SET_BY_RENDERING if isinstance(value, dict) and name in value]
    if reserved:
        raise refuse(f"sets {reserved[0]}, which every rendering sets itself; leave it out")
    tools = value.get("tools", []) if isinstance(value, dict) else []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise refuse("sets tools, which must be a list of tool schemas: [{type: function, function: {...}}]")
    return value


def _moment(value: Any) -> Any:
    """A date, or a date and time, in ISO form."""
    try:
        datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise refuse(
            f"= {str(value)[:40]!r} must be a date such as 2026-01-31, or with a time: 2026-01-31T12:00:00"
        ) from None
    return value


Arguments = Annotated[dict[str, Any], BeforeValidator(_arguments)]
Moment = Annotated[str, BeforeValidator(_moment)]
Whole = BeforeValidator(_whole)
Count = Annotated[int, Field(ge=1), Whole]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Text = Annotated[str, Field(min_length=1, max_length=4096), BeforeValidator(_printable)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]{0,63}$")]
_COMPONENT_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "object", "properties": {"name": {"type": "string", "minLength": 1}}, "required": ["name"]},
    ]
}
Component = Annotated[dict[str, Any], BeforeValidator(_component), WithJsonSchema(_COMPONENT_SCHEMA)]


class Section(BaseModel):
    """A part of a recipe: frozen, strict about types, no unknown keys, no nan or infinity.

    The string below a key is its description, in `selectkd schema` and in docs/recipe.md.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=(),
        use_attribute_docstrings=True,
    )  # fmt: skip
