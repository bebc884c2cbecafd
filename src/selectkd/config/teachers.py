"""What ``teacher:`` may be, one model per kind; the key that only one kind has tells which kind is meant."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator
from typing_extensions import Self

from selectkd.config.section import Attention, Count, Dtype, Section, Share, Text, Whole, refuse


def _plain_url(url: str) -> str:
    """http or https, a host, a path at most: a key in a URL would be printed wherever the URL is."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise refuse(f"= {url[:60]!r} is no URL; write http://HOST:PORT") from None
    if "@" in parts.netloc:
        raise refuse("holds a user or password; name a variable of the environment: api_key_env: NAME")
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise refuse(f"= {url[:60]!r} must be http://HOST:PORT or https://HOST")
    if parts.query or parts.fragment:
        raise refuse("has a query or a fragment; write http://HOST:PORT alone")
    return url.rstrip("/").removesuffix("/v1")


def _variable(name: str) -> str:
    """The name of a variable of the environment; what is none may be a key, and is not shown."""
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,127}", name) is None:
        raise refuse(
            "is no name of a variable (its value is not shown: it may be a key itself). Put the key into a variable of "
            "the environment, and name that: api_key_env: NAME"
        )
    return name


Url = Annotated[Text, AfterValidator(_plain_url)]
Variable = Annotated[Text, AfterValidator(_variable)]
Seconds = Annotated[float, Field(gt=0.0, le=86400.0)]


class CrossTokenizer(Section):
    """How a teacher of another tokenizer is put beside the student: ``spans``, or these keys.

    pairing: ``spans`` of the same text, or the i-th token beside the i-th (``index``, for uld alone: its paper's way).
    matched_weight: what the divergence on the tokens of both counts, and 1 minus it the sorted distance of the
    others; default the part of the teacher's vocabulary that the student has. unverified_weight: weight of a span
    whose proposal the teacher has no token for; default beta, the weight of a rejected one.
    """

    pairing: Literal["spans", "index"] = "spans"
    matched_weight: Share | None = None
    unverified_weight: Share | None = None

    @model_validator(mode="before")
    @classmethod
    def _pairing_alone(cls, value: Any) -> Any:
        return {"pairing": value} if isinstance(value, str) else value


class ModelTeacher(Section):
    """The model that is distilled, held in memory: a hub id, a folder, or a .gguf file.

    cross_tokenizer: for a teacher whose tokenizer is not the student's. placement: where the weights of its layers are;
    embeddings and head are whole on the device that trains. ``device``: there too. ``offloaded``: in main memory, two
    layers at a time on the device. ``sharded``: each rank has its part, one layer at a time whole.
    attn_implementation: how it computes attention; transformers' choice for the model where it is left out.
    """

    model: Text
    revision: Text | None = None
    dtype: Dtype | None = None
    quantization: Text | None = None
    cross_tokenizer: CrossTokenizer | None = None
    placement: Literal["device", "offloaded", "sharded"] = "device"
    attn_implementation: Attention | None = None

    @model_validator(mode="after")
    def _quantised_where_it_trains(self) -> Self:
        if self.quantization is not None and self.placement != "device":
            raise refuse(
                f"quantization = {self.quantization!r} keeps its weights on the device that trains, where placement = "
                f"{self.placement!r} would move them; leave one of the two out"
            )
        return self


class AdaptersOffTeacher(Section):
    """The model that the student's adapters sit on, without them: {adapters_off: true}. No second copy of weights.

    For a student trained with ``training.lora``, whose divergence then says how far its text has moved from where it
    began: a bound on fine-tuning (``objective.language_model``), or one of several teachers.
    """

    adapters_off: Literal[True]


def over_tls(section: Any) -> Any:
    """A section with a ``ca``, which only a server of https shows a certificate of."""
    if section.ca is not None and not section.url.startswith("https:"):
        raise refuse(
            f"ca = {section.ca!r} goes with https, and url is {section.url}; leave ca out, or use https"
        )
    return section


class RemoteTeacher(Section):
    """A server that is asked for the teacher's rows: its K best tokens, or its hidden states where k is left out.

    Only kind selectkd (`selectkd serve-teacher`) has hidden states. tokenizer: the folder or hub name of the
    server's tokenizer, which only kind selectkd tells by itself. model: its name there, needed where it serves
    several. api_key_env: the variable of the environment that holds the key, which is sent to this URL alone. ca: the
    file (PEM) with the authority of an https server's certificate, or with that certificate where it is self-signed;
    without it the authorities of this machine, or of SSL_CERT_FILE.

    timeout: seconds an answer may take in all. wait: seconds a server that is away, busy or stalled is asked again
    after its first failure, three times the outage the tests make. retries: how often an answer that is wrong is asked
    for again. concurrency: questions under way at once, a micro-batch of usual size. check_every: batches from one look
    at whether the server still has the same model to the next; a look is two prompts of at most 24 tokens, asked beside
    the batch's, and every reconnect has one more.
    """

    url: Url
    kind: Literal["vllm", "sglang", "openai", "selectkd"]
    model: Text | None = None
    tokenizer: Text | None = None
    k: Count | None = None
    api_key_env: Variable | None = None
    ca: Text | None = None
    timeout: Seconds = 120.0
    wait: Annotated[float, Field(ge=0.0, le=86400.0)] = 60.0
    retries: Annotated[Whole, Field(ge=0, le=100)] = 3
    concurrency: Annotated[Count, Field(le=256)] = 8
    check_every: Count = 1

    @model_validator(mode="after")
    def _can_be_asked(self) -> Self:
        if self.kind != "selectkd" and self.k is None:
            raise refuse(f"kind {self.kind} answers with its best tokens; say how many: k: 32")
        if self.kind != "selectkd" and self.tokenizer is None:
            raise refuse(
                f"kind {self.kind} answers in token ids and does not say whose; name the tokenizer it serves with, "
                "so that it can be compared with the student's: tokenizer: FOLDER"
            )
        return over_tls(self)


class CacheTeacher(Section):
    """A folder that `selectkd cache build` fills with the teacher's rows of this text, and a run reads.

    A build needs model or server, and payload and k where the payload is not the default: hidden, or what the server
    gives. A run needs none of them: each one that is given must be the cache's own.
    """

    cache: Text
    server: RemoteTeacher | None = None
    model: Text | None = None
    revision: Text | None = None
    dtype: Dtype | None = None
    quantization: Text | None = None
    attn_implementation: Attention | None = None
    payload: Literal["hidden", "top_k", "sampled"] | None = None
    k: Count | None = None
    precision: Literal["bfloat16", "float32", "packed"] | None = None
    shard_rows: Count | None = None


def _kind(value: Any) -> str:
    """The tag of the kind that is meant; a mapping without any kind's own key is read as a model."""
    keys = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    own = {"cache": "a cache", "url": "a server", "adapters_off": "the student's base"}
    return next((kind for key, kind in own.items() if key in keys), "a model")


# A tag with a space is no key, so that `problems` tells the two apart.
Teacher = Annotated[
    Annotated[ModelTeacher, Tag("a model")]
    | Annotated[CacheTeacher, Tag("a cache")]
    | Annotated[RemoteTeacher, Tag("a server")]
    | Annotated[AdaptersOffTeacher, Tag("the student's base")],
    Discriminator(_kind),
]
