"""What a recipe may say: one frozen model per section, unknown keys refused.

A default stands here only where a paper or a definition gives it: SelecTKD (arXiv 2510.24021) and the
training recipe it inherits from DistiLLM-2 (arXiv 2503.07067).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator
from typing_extensions import Self

from selectkd.config.credentials import no_secrets, no_secrets_in_url
from selectkd.config.expand import expanded
from selectkd.config.quantization import check_trainable
from selectkd.config.rollouts import DatasetPolicy, Policy
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
    """A weight that moves linearly from start to end."""

    start: Annotated[float, Field(ge=0.0)]
    """The weight at the first step."""
    end: Annotated[float, Field(ge=0.0)]
    """The weight from the end of the change on."""
    share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the run's steps that the change takes. The default is the whole run."""


def _pace(value: Any) -> str:
    return "change" if isinstance(value, dict | Section) else "constant"


Writer = Literal["dataset", "teacher", "student", "both"]


class StreamObjective(Section):
    """What is different for one stream of text; a key that is left out is the objective's."""

    divergence: Component | None = None
    """Divergence for this text: a name of `selectkd show divergences`, or {name: ..., parameter: value}."""
    verifier: Component | None = None
    """Verifier for this text: a name of `selectkd show verifiers`, or {name: ..., parameter: value}."""
    selector: Component | None = None
    """Selector for this text: a name of `selectkd show selectors`, or {name: ..., parameter: value}."""
    beta: Share | None = None
    """Weight of a rejected token of this text."""
    weight: (
        Annotated[
            Annotated[Annotated[float, Field(ge=0.0)], Tag("constant")]
            | Annotated[WeightChange, Tag("change")],
            Discriminator(_pace),
        ]
        | None
    ) = None
    """Factor of the loss on this text: a number, or a weight that changes. Left out: 1."""


class SourceSection(Section):
    """One source of text."""

    path: Annotated[Text, AfterValidator(no_secrets_in_url)]
    """A file, a folder, a URL such as s3://BUCKET/FOLDER, or a hub data set id. Files are JSON Lines, JSON, CSV, TSV or
    plain text, each also .gz or .zst, Parquet or Arrow."""
    name: Name | None = None
    """Name of the source in metrics and in teacher.streams. Left out: a name from the path."""
    format: Text | None = None
    """Format of the records, such as messages or prompt_completion. Left out: detected from their fields."""
    split: Text | None = None
    """Split of a folder or a hub data set; of the hub also a part, such as train[:10%]. Left out: train where there is
    one."""
    config: Text | None = None
    """Configuration of a hub data set. Left out: its only one."""
    revision: Text | None = None
    """Revision of a hub data set: a branch, a tag or a commit. Left out: the newest."""
    storage_options: Annotated[Arguments, AfterValidator(no_secrets)] | None = None
    """Options of the file system behind a URL, such as {anon: true}. Credentials belong into the environment."""
    limit: Count | None = None
    """Most records that are read of it. Left out: all."""
    weight: Annotated[float, Field(gt=0.0)] | None = None
    """How often each record is seen in an epoch: 2 twice, 0.5 every other epoch. Left out: 1."""
    written_by: Literal["teacher", "student"] | None = None
    """Of a file of `selectkd generate`, takes the records of this writer alone. Left out: all of them."""
    image_folder: Text | None = None
    """Folder in which the images lie that records name by path; no path may leave it. Left out: that of the file."""
    image_urls: bool | None = None
    """`true` fetches images that records name by URL, when the text is tokenised. Left out: URLs are refused."""
    max_pixels: Count | None = None
    """Larger images are scaled down to so many pixels; a record's own max_pixels counts more. Left out: the model's
    processor alone decides."""
    policy: Policy | None = None
    """Who writes the text of this source. Left out: data.policy."""
    objective: StreamObjective | None = None
    """Keys of the objective that differ for this source."""

    @property
    def reading(self) -> dict[str, Any]:
        """The keys that ``selectkd.data`` reads."""
        return self.model_dump(exclude={"policy", "objective"}, exclude_none=True)


def _evaluation_kind(value: Any) -> str:
    return "share" if isinstance(value, int | float) else "source"


class Data(Section):
    """The text: where it is, who writes it, what is held out, and what to do with records that do not fit."""

    sources: Annotated[list[SourceSection], Field(min_length=1)]
    """The sources of text, one or more."""
    policy: Policy = DatasetPolicy(name="dataset")
    """Who writes the text that is trained on: a name, or {name: ..., parameter: value}. The default is the text as it
    stands."""
    max_new_tokens: Count | None = None
    """Most tokens of a written answer, where the policy has no limit of its own. Left out: what training.max_length
    leaves."""
    evaluation: (
        Annotated[
            Annotated[SourceSection, Tag("source")]
            | Annotated[Annotated[float, Field(gt=0.0, lt=1.0)], Tag("share")],
            Discriminator(_evaluation_kind),
        ]
        | None
    ) = None
    """Held-out text: a share of the sources, such as 0.05, or a source of its own. Left out: no evaluation."""
    evaluation_limit: Count | None = None
    """Most held-out samples that are measured, the first ones. Left out: all; of a share of a stream 1,000 a source."""
    cache: Text | None = None
    """Folder in which tokenised text is kept for the next start. Left out: `$SELECTKD_CACHE`, or
    `~/.cache/selectkd/text`."""
    workers: Annotated[int, Field(ge=0), Whole] | None = None
    """Processes that tokenise text before the first step, and that make batches during training. Left out: one for each
    core before the first step; during training one beside an accelerator or with streaming, else none."""
    on_bad_record: Literal["error", "skip"] = "error"
    """What happens at a record that cannot be read: end the run with its file and line, or skip it."""
    on_too_long: Literal["truncate", "drop", "error"] = "truncate"
    """What happens to a sample longer than training.max_length: cut it, leave it out, or end the run."""
    train_on: Literal["completion", "all"] = "completion"
    """Which tokens are trained: those of the completion (the assistant's turns), or all."""
    train_turns: Literal["all", "last", "final_answer"] = "all"
    """Which assistant turns of a conversation are trained: `all`, the `last` one, or of the last one without tool calls
    its `final_answer`, without its reasoning."""
    system: Text | None = None
    """System prompt of conversations that have none. Left out: the chat template's own, if any."""
    streaming: bool = False
    """`true` reads and tokenises text while training goes on, for text that no disk holds. Files are read once
    before, to count their records; Parquet files say how many they have."""
    packing: bool = False
    """`true` puts several samples in one row, which saves padding. Attention reads each as it is alone; models that
    carry a state from token to token are refused. With streaming the samples of a batch share its rows."""
    bucket: bool = False
    """`true` puts samples of like length in one batch, which saves padding."""
    chat_template: Annotated[str, Field(min_length=1, max_length=400_000)] | None = None
    """Chat template in place of the tokenizer's: a file, a name of the tokenizer's, or the text itself. The student
    is saved with it."""
    template_arguments: Arguments = {}
    """Arguments of the chat template beside the messages, such as {enable_thinking: false}. `tools` are the tool
    schemas of conversations that have none."""
    date: Moment | None = None
    """Date that the chat template is given as today's, such as 2026-01-31. Left out: the day the run or its cache
    began."""

    @model_validator(mode="after")
    def _held_out_text_is_read_once(self) -> Self:
        for name in ("weight", "policy", "objective"):
            if isinstance(self.evaluation, SourceSection) and getattr(self.evaluation, name) is not None:
                raise refuse("has no effect on held-out text; take it out", at=f"evaluation.{name}")
        return self

    @model_validator(mode="after")
    def _one_way_to_save_padding(self) -> Self:
        if self.packing and self.bucket:
            raise refuse("packing leaves no padding for bucket to save; set one of the two to false")
        return self

    @model_validator(mode="after")
    def _streams_what_it_can(self) -> Self:
        if self.streaming and self.bucket:
            raise refuse(
                "bucket needs the length of every text, which streaming does not know; use packing: true instead"
            )
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
                f"packing needs the length of every text, but the policy {written[0]} writes text during training"
            )
        return self


class BetaChange(Section):
    """A beta that moves from start to end: linearly over steps, or as the student comes to agree."""

    start: Share
    """beta at the first step."""
    end: Share
    """beta at the end of the change."""
    steps: Count | None = None
    """Optimizer steps that the change takes, linearly. Give this or until_tar."""
    until_tar: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Token acceptance rate at which beta reaches its end, in proportion to the best rate so far. Give this or
    steps."""

    @model_validator(mode="after")
    def _one_pace(self) -> Self:
        if self.start != self.end and (self.steps is None) == (self.until_tar is None):
            raise refuse("a beta that changes needs exactly one of steps and until_tar")
        return self


class ObjectiveSection(Section):
    """The loss: (beta + (1 - beta) a) D(p || q) a token, a the acceptance of the verifier, p teacher, q student."""

    divergence: Component = {"name": "forward_kl"}
    """D(p || q): a name of `selectkd show divergences`, or {name: ..., parameter: value}. The default is
    SelecTKD's."""
    verifier: Component | None = None
    """Says how far the teacher accepts each token: a name, or {name: ..., parameter: value}. Without verifier and
    selector: SelecTKD's greedy_topk with k = 5."""
    selector: Component | None = None
    """Ranks the tokens of a step and keeps some: a name, or {name: ..., parameter: value}. With a verifier beside it,
    that one weighs the tokens kept and the rest count 0."""
    beta: Annotated[
        Annotated[Share, Tag("constant")] | Annotated[BetaChange, Tag("change")], Discriminator(_pace)
    ] = 0.01
    """Weight of a rejected token: 0 masks it, 1 is plain distillation. A mapping makes it change. The default is
    SelecTKD's."""
    reduction: Literal["sequence_mean", "token_mean", "weight_mean"] = "sequence_mean"
    """`sequence_mean` averages over each sequence, then over sequences, as SelecTKD does. `token_mean` averages
    over all tokens; `weight_mean` divides by the sum of weights."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Divides both models' logits in the divergence; the loss is not multiplied by its square. The verifier does not
    see it."""
    verify_temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Divides both models' logits where a verifier or a selector looks at them."""
    thin_rejected: bool = False
    """`true` keeps a token with probability equal to its weight and drops the rest: unbiased and cheaper, with more
    noise."""
    always_accept: list[Literal["eos"] | Annotated[int, Field(ge=0), Whole]] = []
    """Token ids that count as accepted whatever the verifier finds; `eos` stands for the end of text."""
    by_writer: dict[Writer, StreamObjective | None] = {}
    """What differs for text by its writer: {student: {divergence: reverse_kl}}, for instance. `both` is text that
    teacher and student wrote together."""
    language_model: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of a cross-entropy on text that the student did not write; no verifier gates it. The default leaves it
    out."""
    extras: list[Component] = []
    """Further terms of the loss, each a name of `selectkd show extras` or {name: ..., parameter: value}."""

    @model_validator(mode="before")
    @classmethod
    def _papers_verifier(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("verifier") is None and value.get("selector") is None:
            return {**value, "verifier": {"name": "greedy_topk", "k": 5}}
        return value

    @property
    def gate(self) -> dict[str, Any]:
        """The verifier, or the selector where there is no verifier."""
        return self.verifier or self.selector or {"name": "greedy_topk", "k": 5}


def _teacher_kind(value: Any) -> str:
    return "several teachers" if isinstance(value, list) else "one teacher"


class Recipe(Section):
    """One run: a teacher or several, a student, text, an objective and how to train."""

    teacher: Annotated[
        Annotated[Teacher, Tag("one teacher")] | Annotated[Several, Tag("several teachers")],
        Discriminator(_teacher_kind),
    ]
    """What teaches: a model, a cache, a server, the student's base, or a list of several."""
    student: Student
    """The model that learns."""
    data: Data
    """The text, and who writes it."""
    reference: Reference | None = None
    """A reference student, which some selectors compare with. Left out: none."""
    objective: ObjectiveSection = Field(default_factory=lambda: ObjectiveSection.model_validate({}))
    """The loss. The default is SelecTKD's."""
    training: Training
    """How the student is trained."""
    method: Component | None = None
    """A name of `selectkd show methods`, or {name: ..., OPTION: true}. It stands for parts of data and objective;
    what those say themselves counts more."""
    selection: dict[str, Any] | None = None
    """Lays SelecTKD's gate over the method: {verifier: greedy_topk, k: 5, beta: 0.01}."""

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

    @property
    def prompt_limit(self) -> int:
        """Most tokens of a prompt: as training says, or three quarters of a sample, fewer for long written answers."""
        if self.training.max_prompt_length is not None:
            return self.training.max_prompt_length
        length = self.training.max_length
        return max(1, length - max(1, length // 4, self.data.max_new_tokens or 0))

    @model_validator(mode="after")
    def _adapters_can_be_off(self) -> Self:
        if not any(isinstance(teacher, AdaptersOffTeacher) for teacher in self.teachers):
            return self
        if self.training.lora is None:
            raise refuse(
                "teacher.adapters_off needs a student with adapters, but all weights of this student are trained; "
                "set training.lora, or name the teacher: {model: ...}"
            )
        if self.student.model is None:
            raise refuse(
                "teacher.adapters_off uses the student's own base model, but student.from_teacher cuts the student "
                "from a teacher; name the student: {model: ...}"
            )
        return self

    @model_validator(mode="after")
    def _a_quantised_base_has_adapters(self) -> Self:
        check_trainable(self.student.quantization, self.training)
        return self

    @model_validator(mode="after")
    def _a_teacher_to_cut_is_whole(self) -> Self:
        apart = [
            t.placement for t in self.teachers if isinstance(t, ModelTeacher) and t.placement != "device"
        ]
        if apart and self.student.from_teacher is not None:
            raise refuse(
                f"student.from_teacher needs the whole teacher on the device, but teacher.placement = {apart[0]!r}; "
                "set it to device, or name the student: {model: ...}"
            )
        return self

    @model_validator(mode="after")
    def _held_out_text_has_a_teacher(self) -> Self:
        routed = isinstance(self.teacher, list) and self.teacher[0].streams is not None
        if routed and isinstance(self.data.evaluation, SourceSection):
            raise refuse(
                "the teacher is chosen by stream, but the file of data.evaluation belongs to none; set it to a "
                "share such as 0.05"
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
