"""The plan of ``teacher: {cache: FOLDER}``: what can be known of a cache before it is opened, and the refusals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from selectkd.data.alignment import tokenizer_fingerprint
from selectkd.data.examples import sample_key
from selectkd.data.template import ChatTemplate
from selectkd.data.vision import Vision
from selectkd.errors import CacheError, ConfigError
from selectkd.models.head import head_of
from selectkd.models.load import Loaded, load_tokenizer
from selectkd.teachers.cache.build import differences
from selectkd.teachers.cache.index import INDEX, described
from selectkd.teachers.cache.reader import CachedTeacher, CacheReader
from selectkd.teachers.model import ModelPlan, shared_rows
from selectkd.teachers.protocol import Payload, Teacher


@dataclass
class CachePlan:
    """A cache and what the recipe says of it; a key that the recipe leaves out is taken from the cache."""

    folder: Path
    wanted: dict[str, Any] = field(default_factory=dict)
    _index: dict[str, Any] | None = field(default=None, repr=False)
    _model: ModelPlan | None = field(default=None, repr=False)

    @property
    def index(self) -> dict[str, Any]:
        """index.json, read once; CacheError where it is damaged or another teacher's."""
        if self._index is None:
            index = described(self.folder / INDEX)
            self._refuse(differences(index, self.wanted))
            self._index = index
        return self._index

    @property
    def payload(self) -> Payload:
        return self.index["payload"]

    @property
    def k(self) -> int | None:
        return self.index["k"]

    @property
    def source(self) -> str:
        return f"{self.index['teacher']['model']} (cache {self.folder.name})"

    @property
    def revision(self) -> str | None:
        return self.index["teacher"]["revision"]

    @property
    def model(self) -> str | None:
        return None if "server" in self.index["engine"] else self.index["teacher"]["model"]

    def tokenizer(self) -> Any | None:
        if self.model is None:
            return None
        return load_tokenizer(self.index["teacher"]["model"], revision=self._hub_revision())

    def check_tokenizer(self, tokenizer: Any) -> None:
        self._refuse(differences(self.index, {"tokenizer": tokenizer_fingerprint(tokenizer)}))

    def check_template(self, template: ChatTemplate) -> None:
        """CacheError where the text was rendered by another chat template, with other arguments or another date."""
        rendering = {"template": template.fingerprint}
        if template.dated and self.index.get("date") is not None:
            rendering["date"] = template.moment
        self._refuse(differences(self.index, rendering))

    def check_images(self, vision: Vision | None) -> None:
        """CacheError where the cache's images were made by another processor than this run's."""
        if "images" in self.index:
            self._refuse(differences(self.index, {"images": None if vision is None else vision.fingerprint}))

    def check_text(self, examples: Sequence[Any]) -> None:
        """CacheError unless every trained token has its row; more in the cache than in the text is fine."""
        reader = CacheReader(self.folder, self.index)
        for number, example in enumerate(examples):
            places = np.nonzero(example.completion)[0] - 1
            if (places >= 0).any():
                reader.find(sample_key(example), places[places >= 0], f"sample {number} of the text")

    def loaded(self) -> Loaded:
        """The model the cache was built with: only a cut needs it."""
        if self._model is None:
            teacher = self.index["teacher"]
            self._model = ModelPlan(
                teacher["model"],
                dtype=teacher["dtype"],
                quantization=teacher["quantization"],
                wanted_revision=self._hub_revision(),
            )
        return self._model.loaded()

    def open(self, tokenizer: Any, *, student: nn.Module, reference: Teacher | None = None) -> CachedTeacher:
        self._model = None  # a teacher that was loaded for a cut goes
        reader = CacheReader(self.folder, self.index)
        student_width = head_of(student).width
        width = self.index["head"]["vocabulary"] if self.payload == "hidden" else student_width
        shared = shared_rows(tokenizer, tokenizer, teacher_width=width, student_width=student_width)
        if self.payload != "hidden" and reference is not None:
            raise ConfigError(
                f"a reference student cannot be combined with the {self.payload} rows of {self.folder}. "
                "Build a cache of hidden states, or use a selector that needs no reference."
            )
        return CachedTeacher(reader, shared=shared, reference=reference)

    def _hub_revision(self) -> str | None:
        """The revision as ``load_model`` takes it: local models have none."""
        teacher = self.index["teacher"]
        return teacher["revision"] if teacher["revision"] and len(teacher["revision"]) == 40 else None

    def _refuse(self, differ: Sequence[str]) -> None:
        if differ:
            raise CacheError(
                f"the cache {self.folder} does not match this run: {'; '.join(differ[:5])}. "
                "Name the cache of this teacher, or build it: selectkd cache build RECIPE."
            )
