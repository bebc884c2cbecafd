"""What a recipe may say: one frozen model per section, unknown keys refused.

A default stands here only where a paper or a definition gives it: SelecTKD (arXiv 2510.24021) and the
training recipe it inherits from DistiLLM-2 (arXiv 2503.07067).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from typing_extensions import Self

from selectkd.config.expand import expanded
from selectkd.config.migration import VERSION
from selectkd.config.policies import DatasetPolicy, Policy
from selectkd.config.section import (
    Arguments,
    Component,
    Count,
    Moment,
    Name,
    Section,
    Share,
    Text,
    Whole,
    refuse,
)
from selectkd.config.several import Several
from selectkd.config.student import Reference, Student
from selectkd.config.teachers import AdaptersOffTeacher, ModelTeacher, Teacher
from selectkd.config.training import Training


class WeightChange(Section):
    """A weight from start to end, linearly over the first ``share`` of a run's steps."""

    start: Annotated[float, Field(ge=0.0)]
    end: Annotated[float, Field(ge=0.0)]
    share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0


def _weight_kind(value: Any) -> str:
    return "change" if isinstance(value, dict | WeightChange) else "constant"


Writer = Literal["dataset", "teacher", "student", "both"]


class StreamObjective(Section):
    """What is different for one stream: keys of ``objective``, and ``weight``, the factor of its rows' loss."""

    divergence: Component | None = None
    verifier: Component | None = None
    selector: Component | None = None
    beta: Share | None = None
    weight: (
        Annotated[
            Annotated[Annotated[float, Field(ge=0.0)], Tag("constant")]
            | Annotated[WeightChange, Tag("change")],
            Discriminator(_weight_kind),
        ]
        | None
    ) = None


class SourceSection(Section):
    """One source of text: a file, a folder or a hub data set id. The format is detected unless given.

    policy: who writes its text, default data.policy. objective: what is different for it. written_by: of a file of
    `selectkd generate` the records by that writer alone.
    """

    path: Text
    name: Name | None = None
    format: Text | None = None
    split: Text | None = None
    config: Text | None = None
    limit: Count | None = None
    weight: Annotated[float, Field(gt=0.0)] | None = None
    written_by: Literal["teacher", "student"] | None = None
    policy: Policy | None = None
    objective: StreamObjective | None = None

    @property
    def reading(self) -> dict[str, Any]:
        """What the data room reads of it."""
        return self.model_dump(exclude={"policy", "objective"}, exclude_none=True)


def _evaluation_kind(value: Any) -> str:
    return "share" if isinstance(value, int | float) else "source"


class Data(Section):
    """The text: where it is, who writes it, what is held out, and what to do with records that do not fit.

    max_new_tokens: for a policy that names no limit of its own. chat_template: a file, one of the tokenizer's by name,
    or the template itself, instead of the tokenizer's; the student is saved with it. template_arguments: what it is
    given beside the turns, such as enable_thinking. date: what it is given as today; a run and its cache keep theirs.
    """

    sources: Annotated[list[SourceSection], Field(min_length=1)]
    policy: Policy = DatasetPolicy(name="dataset")
    max_new_tokens: Count | None = None
    evaluation: (
        Annotated[
            Annotated[SourceSection, Tag("source")]
            | Annotated[Annotated[float, Field(gt=0.0, lt=1.0)], Tag("share")],
            Discriminator(_evaluation_kind),
        ]
        | None
    ) = None
    on_bad_record: Literal["error", "skip"] = "error"
    on_too_long: Literal["truncate", "drop", "error"] = "truncate"
    train_on: Literal["completion", "all"] = "completion"
    packing: bool = False
    bucket: bool = False
    chat_template: Annotated[str, Field(min_length=1, max_length=400_000)] | None = None
    template_arguments: Arguments = {}
    date: Moment | None = None

    @model_validator(mode="after")
    def _one_way_to_save_padding(self) -> Self:
        if self.packing and self.bucket:
            raise refuse("packing leaves no padding for bucket to save; set one of the two to false")
        return self

    @property
    def policies(self) -> list[Policy]:
        """The policy of each source."""
        return [source.policy or self.policy for source in self.sources]

    @model_validator(mode="after")
    def _packs_text_of_known_length(self) -> Self:
        written = [policy.name for policy in self.policies if policy.name != "dataset"]
        if self.packing and written:
            raise refuse(
                f"packing needs the length of every text, and the policy {written[0]} has it written later"
            )
        return self


class BetaChange(Section):
    """beta from start to end: linearly over steps, or as the student comes to agree, up to TAR until_tar."""

    start: Share
    end: Share
    steps: Count | None = None
    until_tar: Annotated[float, Field(gt=0.0, le=1.0)] | None = None

    @model_validator(mode="after")
    def _one_pace(self) -> Self:
        if self.start != self.end and (self.steps is None) == (self.until_tar is None):
            raise refuse("a beta that changes needs exactly one of steps and until_tar")
        return self


def _beta_kind(value: Any) -> str:
    return "change" if isinstance(value, dict | BetaChange) else "constant"


class ObjectiveSection(Section):
    """The loss: (beta + (1 - beta) a) D(p || q) a token. Defaults are SelecTKD's: greedy_topk, k = 5, .01.

    With a selector and a verifier the verifier weighs the rows the selector keeps, and the others count nothing.
    by_writer: what is different for text by its writer. language_model: the factor of a cross-entropy on the text that
    the student did not write, which nothing gates. extras: `selectkd show extras`.
    """

    divergence: Component = {"name": "forward_kl"}
    verifier: Component | None = None
    selector: Component | None = None
    beta: Annotated[
        Annotated[Share, Tag("constant")] | Annotated[BetaChange, Tag("change")], Discriminator(_beta_kind)
    ] = 0.01
    reduction: Literal["sequence_mean", "token_mean", "weight_mean"] = "sequence_mean"
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    verify_temperature: Annotated[float, Field(gt=0.0)] = 1.0
    thin_rejected: bool = False
    always_accept: list[Literal["eos"] | Annotated[Whole, Field(ge=0)]] = []
    by_writer: dict[Writer, StreamObjective | None] = {}
    language_model: Annotated[float, Field(ge=0.0)] = 0.0
    extras: list[Component] = []

    @model_validator(mode="before")
    @classmethod
    def _papers_verifier(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("verifier") is None and value.get("selector") is None:
            return {**value, "verifier": {"name": "greedy_topk", "k": 5}}
        return value

    @property
    def judge(self) -> dict[str, Any]:
        """The verifier, or the selector where there is no verifier."""
        return self.verifier or self.selector or {"name": "greedy_topk", "k": 5}


def _teacher_kind(value: Any) -> str:
    return "several teachers" if isinstance(value, list) else "one teacher"


class Recipe(Section):
    """One run: a teacher or several, a student, text, an objective and how to train.

    method: a name of `selectkd show methods`, or {name: ..., OPTION: true}; it stands for parts of data and objective,
    and what those say themselves counts more. selection: {verifier: greedy_topk, k: 5, beta: .01}, the paper's gate on
    whatever the method is. version: of the recipe's keys.
    """

    version: Literal[2] = VERSION
    teacher: Annotated[
        Annotated[Teacher, Tag("one teacher")] | Annotated[Several, Tag("several teachers")],
        Discriminator(_teacher_kind),
    ]
    student: Student
    data: Data
    reference: Reference | None = None
    objective: ObjectiveSection = Field(default_factory=lambda: ObjectiveSection.model_validate({}))
    training: Training
    method: Component | None = None
    selection: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_words(cls, value: Any) -> Any:
        return expanded(value) if isinstance(value, dict) else value

    @property
    def teachers(self) -> list[Teacher]:
        """The teacher, or each of several."""
        return (
            [member.teacher for member in self.teacher] if isinstance(self.teacher, list) else [self.teacher]
        )

    @property
    def models(self) -> list[str]:
        """The models that a run loads by name: teachers, student and reference student."""
        named = [*(one.model for one in self.teachers if isinstance(one, ModelTeacher)), self.student.model]
        return [one for one in [*named, self.reference and self.reference.model] if one is not None]

    @model_validator(mode="after")
    def _adapters_can_be_off(self) -> Self:
        if not any(isinstance(teacher, AdaptersOffTeacher) for teacher in self.teachers):
            return self
        if self.training.lora is None:
            raise refuse(
                "teacher.adapters_off needs a student with adapters, and all weights of this one are trained; set "
                "training.lora, or name the teacher: {model: ...}"
            )
        if self.student.model is None:
            raise refuse(
                "teacher.adapters_off is the student's own base, and student.from_teacher has it cut from a teacher; "
                "name the student: {model: ...}"
            )
        return self

    @model_validator(mode="after")
    def _a_teacher_to_cut_is_whole(self) -> Self:
        apart = [
            t.placement for t in self.teachers if isinstance(t, ModelTeacher) and t.placement != "device"
        ]
        if apart and self.student.from_teacher is not None:
            raise refuse(
                f"student.from_teacher cuts the teacher, which must be whole on the device for that, and "
                f"teacher.placement = {apart[0]!r}; set it to device, or name the student: {{model: ...}}"
            )
        return self

    @model_validator(mode="after")
    def _packed_samples_stay_apart(self) -> Self:
        teachers = [t.attn_implementation for t in self.teachers if isinstance(t, ModelTeacher)]
        flash = [k for k in (self.student.attn_implementation, *teachers) if k and k.startswith("flash")]
        if self.data.packing and flash:
            raise refuse(
                f"data.packing keeps samples apart by a mask that {flash[0]} does not take; use sdpa, eager or "
                "flex_attention, or packing: false"
            )
        return self

    @model_validator(mode="after")
    def _held_out_text_has_a_teacher(self) -> Self:
        routed = isinstance(self.teacher, list) and self.teacher[0].streams is not None
        if routed and isinstance(self.data.evaluation, SourceSection):
            raise refuse(
                "teacher routes by stream, and data.evaluation is a file of no stream; set it to a share such as 0.05"
            )
        return self

    @model_validator(mode="after")
    def _evaluates_on_something(self) -> Self:
        if self.training.evaluate_every is not None and self.data.evaluation is None:
            raise refuse(
                f"training.evaluate_every = {self.training.evaluate_every} needs held-out text; "
                "set data.evaluation to {path: ...} or to a share such as 0.05"
            )
        return self
