"""Who writes the text that is trained on: ``policy:`` of the data or of one source, a model per kind."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from typing_extensions import Self

from selectkd.config.section import Count, Section, Share, Text, refuse
from selectkd.config.teachers import Url, Variable, over_tls
from selectkd.objective.registry import did_you_mean


class Sampling(Section):
    """How text is drawn; it ends at EOS."""

    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    """Divides the logits before text is drawn; 0 takes the best token. The default samples from the model itself."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Draws from the fewest tokens whose probabilities sum to this share. The default, 1, draws from all."""
    top_k: Count | None = None
    """Draws from so many best tokens. Left out: from all of them."""
    max_new_tokens: Count | None = None
    """Most tokens of one answer. Left out: data.max_new_tokens, or what training.max_length leaves."""


class Served(Section):
    """A server that writes the student's text and takes its weights from a folder now and then.

    Texts are up to refresh_every - 1 steps stale; `written.staleness` in the metrics says how many.
    """

    url: Url
    """Address of the server, `http://HOST:PORT` or `https://HOST`."""
    kind: Literal["vllm", "sglang"]
    """The program that serves. A vllm server needs VLLM_SERVER_DEV_MODE=1 in its environment."""
    model: Text
    """Name of the student on the server."""
    folder: Text
    """Folder for the student's weights, at the same path for run and server. Start vllm on it; sglang on any model of
    the student's shape."""
    refresh_every: Count = 1
    """Optimizer steps from one transfer of weights to the next. The default keeps the text fresh."""
    api_key_env: Variable | None = None
    """Name of the environment variable that holds the API key."""
    ca: Text | None = None
    """File (PEM) of the authority behind an https server's certificate. Left out: the authorities of this machine."""
    wait: Annotated[float, Field(ge=0.0, le=86400.0)] = 60.0
    """Seconds to keep asking a server that is away, as for a teacher's server."""

    @model_validator(mode="after")
    def _over_tls(self) -> Self:
        return over_tls(self)


class OwnText(Sampling):
    """The student's own text."""

    served: Served | None = None
    """A server that writes the student's text. Left out: the student in memory writes it."""


class DatasetPolicy(Section):
    """The text as it stands in the source."""

    name: Literal["dataset"]
    """Name of the policy: the text of the source as it stands."""


class TeacherPolicy(Sampling):
    """The teacher writes the answer to each prompt, once (SeqKD)."""

    name: Literal["teacher"]
    """Name of the policy: the teacher answers each prompt once."""


class StudentPolicy(OwnText):
    """The student's own text for a share of the sequences, written at the step that trains on it (GKD)."""

    name: Literal["student"]
    """Name of the policy: the student answers the prompts."""
    probability: Share = 1.0
    """Probability that a sequence's answer is the student's own; otherwise it is the source's. GKD calls it lambda.
    The default is on-policy."""
    replay: Count | None = None
    """Size of a buffer of student texts, from which the training text is drawn (ImitKD). Left out: no buffer."""


class AdaptivePolicy(OwnText):
    """DistiLLM's scheduler: fresh student text, text from a replay buffer or the source's own, by one draw a step.

    Step i of T draws r. Where r is below phi (1 - i / T) the student writes, and the buffer keeps the text. Where r is
    below phi alone, the text comes from the buffer; elsewhere it is the source's.
    """

    name: Literal["adaptive"]
    """Name of the policy: DistiLLM's adaptive scheduler."""
    start: Share = 0.0
    """phi at the start of the run, a probability. The default is DistiLLM's."""
    increase: Share = 0.1
    """How much phi rises at an evaluation that asks for it. The default is DistiLLM's."""
    margin: Annotated[float, Field(ge=0.0)] = 0.1
    """Nats by which a held-out loss must exceed that of the last rise for phi to rise. The default is DistiLLM's."""
    capacity: Count = 1000
    """Number of texts in the replay buffer. The default is DistiLLM's."""
    fill_first: bool = False
    """`true`: below phi the student writes until the buffer is full, as DistiLLM's released code does."""


class PairsPolicy(OwnText):
    """Two texts a prompt: the teacher's, written once, and the student's, written at that step (DistiLLM-2)."""

    name: Literal["pairs"]
    """Name of the policy: a text of the teacher and one of the student for each prompt."""
    teacher_text: Literal["generate", "source"] = "generate"
    """`source` takes the source's own answers for the teacher's, for files of `selectkd generate`. `generate` has
    the teacher write them."""


class InterleavedPolicy(Sampling):
    """The student proposes each token, and the teacher replaces an unlikely one (SKD)."""

    name: Literal["interleaved"]
    """Name of the policy: student and teacher write one text together."""
    window: Count = 25
    """A proposal outside so many best tokens of the teacher is replaced by a draw of the teacher's. The default is
    SKD's."""


class TeacherMixedPolicy(Sampling):
    """Each token is drawn from share * teacher + (1 - share) * student (MiniLLM)."""

    name: Literal["teacher_mixed"]
    """Name of the policy: tokens are drawn from a mixture of teacher and student."""
    share: Share = 0.2
    """The teacher's share of the mixture. The default is MiniLLM's."""
    with_source: bool = False
    """`true` adds the source's own text to the batch, for a language-modelling loss."""


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
        problem = "needs a name" if name is None else f"names no policy: {name!r}"
        raise refuse(f"{problem}.{did_you_mean(str(name), NAMES)} Known: {', '.join(NAMES)}")
    return value


def _kind(value: Any) -> str:
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", "")
    return f"the policy {name}"


# A tag with spaces cannot be a key, which `problems` relies on.
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
