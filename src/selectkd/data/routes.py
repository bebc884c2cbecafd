"""Which of several teachers a record names, by the values of its fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from selectkd.errors import DataError


@dataclass(frozen=True)
class Routes:
    """A teacher for each entry of ``when``: {field: value or list of values}, all of which a record must have."""

    when: tuple[Mapping[str, Any], ...]

    def __call__(self, record: Mapping[str, Any], origin: str) -> int:
        """The number of the teacher whose ``when`` a record meets; DataError where none or two of them do."""
        fits = [
            index
            for index, wanted in enumerate(self.when)
            if all(_meets(record.get(field), value) for field, value in wanted.items())
        ]
        if len(fits) == 1:
            return fits[0]
        fields = dict.fromkeys(field for wanted in self.when for field in wanted)
        has = ", ".join(f"{field} = {record.get(field)!r}" for field in fields)
        if fits:
            raise DataError(
                f"{origin}: {has} meets the `when` of two teachers. Make them exclude each other."
            )
        wanted = "; ".join(
            ", ".join(f"{field}: {value!r}" for field, value in one.items()) for one in self.when
        )
        raise DataError(
            f"{origin}: {has} meets no teacher's `when` ({wanted}). Add the value under one of them, or set "
            "data.on_bad_record: skip."
        )


def _meets(have: Any, wanted: Any) -> bool:
    """Whether a field has the value, or one of the values; 1 is not True here."""
    values = wanted if isinstance(wanted, list) else [wanted]
    return any(type(have) is type(value) and have == value for value in values)
