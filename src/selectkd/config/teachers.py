"""The kinds of ``teacher:``, one model per kind; a key that only one kind has decides the kind."""

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
    """How a teacher of another tokenizer is compared with the student: `spans`, or these keys."""

    pairing: Literal["spans", "index"] = "spans"
    """`spans` compares rows at the ends of the same text. `index` puts the i-th token beside the i-th; it is for
    the divergence uld alone, whose paper does so."""
    matched_weight: Share | None = None
    """Weight of the divergence on the tokens that both vocabularies have; 1 minus it weighs the sorted distance of
    the other tokens. Left out: the share of the teacher's vocabulary that the student has."""
    unverified_weight: Share | None = None
    """Loss weight of a span whose proposed token the teacher does not have. Left out: beta, the weight of a rejected
    token."""

    @model_validator(mode="before")
    @classmethod
    def _pairing_alone(cls, value: Any) -> Any:
        return {"pairing": value} if isinstance(value, str) else value


class ModelTeacher(Section):
    """A teacher held in memory."""

    model: Text
    """The teacher: a hub id, a folder, or a .gguf file."""
    revision: Text | None = None
    """Branch, tag or commit of a hub model. Left out: the hub's main branch."""
    dtype: Dtype | None = None
    """Number format of the teacher's weights in memory. Left out: bfloat16 where training.precision computes in bf16,
    float32 elsewhere."""
    quantization: Text | None = None
    """`bitsandbytes-4bit` or `bitsandbytes-8bit` makes the weights smaller; both need the package bitsandbytes.
    Left out: no quantization."""
    cross_tokenizer: CrossTokenizer | None = None
    """Needed where the teacher's tokenizer is not the student's: `spans`, or a mapping of the keys of
    cross_tokenizer."""
    placement: Literal["device", "offloaded", "sharded"] = "device"
    """Where the weights of its layers are; embeddings and head stay whole on the device. `offloaded` keeps layers
    in main memory, two at a time on the device. `sharded` gives each rank a part of every layer."""
    attn_implementation: Attention | None = None
    """How the teacher computes attention. Left out: the choice of transformers for the model."""

    @model_validator(mode="after")
    def _quantised_where_it_trains(self) -> Self:
        if self.quantization is not None and self.placement != "device":
            raise refuse(
                f"quantization = {self.quantization!r} keeps its weights on the device that trains, where placement = "
                f"{self.placement!r} would move them; leave one of the two out"
            )
        return self


class AdaptersOffTeacher(Section):
    """The model that the student's LoRA adapters sit on, without them; no second copy of weights.

    The divergence then says how far training has moved the student. It bounds a fine-tuning on the text itself
    (`objective.language_model`), or is one of several teachers.
    """

    adapters_off: Literal[True]
    """`true` makes the student's base the teacher. Needs training.lora."""


def over_tls(section: Any) -> Any:
    """The section; refused where `ca` stands beside a url without https."""
    if section.ca is not None and not section.url.startswith("https:"):
        raise refuse(
            f"ca = {section.ca!r} goes with https, and url is {section.url}; leave ca out, or use https"
        )
    return section


class RemoteTeacher(Section):
    """A server that is asked for the teacher's rows over HTTP, in token ids; kind vllm with images beside them."""

    url: Url
    """Address of the server, `http://HOST:PORT` or `https://HOST`, without a key in it."""
    kind: Literal["vllm", "sglang", "openai", "selectkd"]
    """The program that serves: vllm, sglang, another with OpenAI's completions, or `selectkd serve-teacher`."""
    model: Text | None = None
    """Name of the model on the server. Needed only where the server has several."""
    tokenizer: Text | None = None
    """Folder or hub id of the tokenizer the server uses; for prompts with images the served model's own, whose
    processor is compared. Needed for every kind but selectkd, whose server tells it."""
    k: Count | None = None
    """Number of best tokens the server is asked for at each position. Left out: hidden states, which only kind
    selectkd can send."""
    api_key_env: Variable | None = None
    """Name of the environment variable that holds the API key. The key is sent to this URL alone."""
    ca: Text | None = None
    """File (PEM) of the authority behind an https server's certificate, or of a self-signed certificate. Left out:
    the authorities of this machine or of SSL_CERT_FILE."""
    timeout: Seconds = 120.0
    """Seconds one answer may take in all. The default is a choice of ours."""
    wait: Annotated[float, Field(ge=0.0, le=86400.0)] = 60.0
    """Seconds to keep asking a server that is away, busy or stalled. The default is three times the outage in the
    tests."""
    retries: Annotated[int, Field(ge=0, le=100), Whole] = 3
    """How often a wrong answer is asked for again. The default is a choice of ours."""
    concurrency: Annotated[int, Field(ge=1, le=256), Whole] = 8
    """Requests under way at once. The default is a micro-batch of usual size."""
    check_every: Count = 1
    """Batches from one check that the server still has the same model to the next. The default checks each batch, by
    two prompts of at most 24 tokens and, where the text has images, a sample with one."""

    @model_validator(mode="after")
    def _names_k_and_tokenizer(self) -> Self:
        if self.kind != "selectkd" and self.k is None:
            raise refuse(
                f"kind {self.kind} answers with its best tokens; set their number, for example k: 32"
            )
        if self.kind != "selectkd" and self.tokenizer is None:
            raise refuse(
                f"kind {self.kind} answers in token ids; name its tokenizer, which is compared with the "
                "student's: tokenizer: FOLDER"
            )
        return over_tls(self)


class CacheTeacher(Section):
    """A folder of the teacher's rows, which `selectkd cache build` fills and a run reads.

    A build needs model or server. A run needs neither: a key that is given must be the cache's own.
    """

    cache: Text
    """Folder of the cache; `selectkd cache build` makes it."""
    server: RemoteTeacher | None = None
    """The server that a build asks for the rows, in place of model."""
    model: Text | None = None
    """The teacher that a build runs: a hub id, a folder, or a .gguf file."""
    revision: Text | None = None
    """Branch, tag or commit of a hub model. Left out: the hub's main branch."""
    dtype: Dtype | None = None
    """Number format of the teacher's weights during the build. Left out: as for a teacher in memory."""
    quantization: Text | None = None
    """`bitsandbytes-4bit` or `bitsandbytes-8bit`, for the build. Left out: no quantization."""
    attn_implementation: Attention | None = None
    """How the teacher computes attention during the build. Left out: the choice of transformers."""
    payload: Literal["hidden", "top_k", "sampled"] | None = None
    """What is stored of each row. `hidden`: last hidden states, exact; `top_k`: the k best tokens; `sampled`: k
    drawn ids. Left out: hidden, or what the server gives."""
    k: Count | None = None
    """Tokens stored per row, for the payloads top_k and sampled."""
    precision: Literal["bfloat16", "float32", "packed"] | None = None
    """Number format of the stored rows. Left out: bfloat16 for hidden, packed (16 bits a log-probability) for the
    others."""
    shard_rows: Count | None = None
    """Most rows in one file of the cache. Left out: 65,536 rows or 256 MiB, whichever is less."""


def _kind(value: Any) -> str:
    """The tag of the kind that is meant; a mapping without any kind's own key is read as a model."""
    keys = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    kinds = {"cache": "a cache", "url": "a server", "adapters_off": "the student's base"}
    return next((kind for key, kind in kinds.items() if key in keys), "a model")


# A tag with a space cannot be a key, which `problems` relies on.
Teacher = Annotated[
    Annotated[ModelTeacher, Tag("a model")]
    | Annotated[CacheTeacher, Tag("a cache")]
    | Annotated[RemoteTeacher, Tag("a server")]
    | Annotated[AdaptersOffTeacher, Tag("the student's base")],
    Discriminator(_kind),
]
