"""Who writes the text that is trained on: ``policy:`` of the data or of one source, a model per kind."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from typing_extensions import Self

from selectkd.config.section import Count, Section, Share, Text, refuse
from selectkd.config.teachers import Url, Variable, over_tls
from selectkd.registry import did_you_mean

Positive = Annotated[float, Field(gt=0.0)]


class Sampling(Section):
    """How text is drawn. temperature 0 takes the best token; top_p and top_k cut what is drawn from; a text ends at
    EOS, or at max_new_tokens, default what training.max_length leaves.
    """

    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Count | None = None
    max_new_tokens: Count | None = None


class Served(Section):
    """A server that writes the student's text, and takes its weights from ``folder`` every ``refresh_every`` steps.

    folder: seen under this path by both; a vllm server is started on it (with VLLM_SERVER_DEV_MODE=1), an sglang
    server on any model of the student's shape. model: its name there. Texts are up to refresh_every - 1 steps stale,
    and ``written.staleness`` in the metrics says how many. ca: as for a teacher's server.
    """

    url: Url
    kind: Literal["vllm", "sglang"]
    model: Text
    folder: Text
    refresh_every: Count = 1
    api_key_env: Variable | None = None
    ca: Text | None = None
    wait: Annotated[float, Field(ge=0.0, le=86400.0)] = 60.0

    @model_validator(mode="after")
    def _over_tls(self) -> Self:
        return over_tls(self)


class OwnText(Sampling):
    """The student's own text. served: a server writes it in the student's place."""

    served: Served | None = None


class DatasetPolicy(Section):
    """The text as it stands in the source."""

    name: Literal["dataset"]


class TeacherPolicy(Sampling):
    """The teacher writes the answer to each prompt, once (SeqKD)."""

    name: Literal["teacher"]


class StudentPolicy(OwnText):
    """With probability ``probability`` a sequence's answer is the student's own, written at that step (GKD).

    replay: a student's text goes into a buffer of that many, and what is trained on is drawn from it (ImitKD).
    """

    name: Literal["student"]
    probability: Share = 1.0
    replay: Count | None = None


class AdaptivePolicy(OwnText):
    """DistiLLM's scheduler: fresh student text, text from the replay buffer or the source's own, by one draw a step.

    phi starts at ``start`` and rises by ``increase`` at each evaluation whose loss is at least ``margin`` above the
    loss of its last rise (at first: of the first evaluation). Step i of T draws r: below phi (1 - i / T) the student
    writes and the buffer of ``capacity`` texts keeps it; below phi the text comes from the buffer; else it is the
    source's. fill_first: below phi the student writes until the buffer is full, as the released code has it.
    """

    name: Literal["adaptive"]
    start: Share = 0.0
    increase: Share = 0.1
    margin: Annotated[float, Field(ge=0.0)] = 0.1
    capacity: Count = 1000
    fill_first: bool = False


class PairsPolicy(OwnText):
    """Two texts for each prompt: the teacher's, written once, and the student's, written at that step (DistiLLM-2).

    teacher_text: source takes the source's own answers for the teacher's, for files of `selectkd generate`.
    """

    name: Literal["pairs"]
    teacher_text: Literal["generate", "source"] = "generate"


class InterleavedPolicy(Sampling):
    """The student proposes each token; one outside the teacher's ``window`` best is replaced by a draw of the
    teacher's (SKD).
    """

    name: Literal["interleaved"]
    window: Count = 25


class TeacherMixedPolicy(Sampling):
    """Each token is drawn from share * teacher + (1 - share) * student (MiniLLM).

    with_source: the source's own text is in the batch too, for a language-modelling loss.
    """

    name: Literal["teacher_mixed"]
    share: Share = 0.2
    with_source: bool = False


KINDS = (
    DatasetPolicy,
    TeacherPolicy,
    StudentPolicy,
    AdaptivePolicy,
    PairsPolicy,
    InterleavedPolicy,
    TeacherMixedPolicy,
)
NAMES = tuple(str(kind.model_fields["name"].annotation.__args__[0]) for kind in KINDS)  # type: ignore[union-attr]


def _named(value: Any) -> Any:
    """A policy as {name, **parameters}; a bare name stands for its defaults."""
    value = {"name": value} if isinstance(value, str) else value
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    if name not in NAMES:
        told = "needs a name" if name is None else f"names no policy: {name!r}"
        raise refuse(f"{told}.{did_you_mean(str(name), NAMES)} Known: {', '.join(NAMES)}")
    return value


def _kind(value: Any) -> str:
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", "")
    return f"the policy {name}"


# A tag with spaces is no key, so that `problems` tells the two apart.
Policy = Annotated[
    Annotated[DatasetPolicy, Tag("the policy dataset")]
    | Annotated[TeacherPolicy, Tag("the policy teacher")]
    | Annotated[StudentPolicy, Tag("the policy student")]
    | Annotated[AdaptivePolicy, Tag("the policy adaptive")]
    | Annotated[PairsPolicy, Tag("the policy pairs")]
    | Annotated[InterleavedPolicy, Tag("the policy interleaved")]
    | Annotated[TeacherMixedPolicy, Tag("the policy teacher_mixed")],
    Discriminator(_kind),
    BeforeValidator(_named),
]
