"""Images of records: found by path, bytes or data URL, within limits of size, and read as upright RGB.

A reference (``ImageRef``) is what a tokenised text keeps of an image: its bytes, or its path with the hash of what was
there, so that a file that has changed since is noticed.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import unquote

import numpy as np
import xxhash

from selectkd.config.extras import how_to_install
from selectkd.errors import ConfigError, DataError, IntegrityError

if TYPE_CHECKING:
    from PIL import Image

MOST_BYTES = 1 << 26
"""Bytes of an encoded image: 64 MiB is several times the largest photograph."""
MOST_PIXELS = 1 << 26
"""Pixels of a decoded image: 67 million take 200 MB, and no vision tower sees a tenth of them."""
KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Kinds of files that are read; what else Pillow opens may run other programs or be a document."""
ANIMATED = frozenset({"GIF", "WEBP", "PNG", "TIFF"})
SECONDS = 20.0
"""How long a URL may take."""
CODED = re.compile(r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR|SUkqA|TU0AK|Qk)[A-Za-z0-9+/=\s]{60,}")
"""How files of JPEG, PNG, GIF, WebP, TIFF and BMP begin in base64. No path is so long without a dot."""
DEEP = ("PPM", "PNG")
"""Kinds whose numbers of mode I are sixteen bits, whatever the file's largest."""
HEADER = struct.Struct("<cQ16s")
BY_PATH = b"p"
"""How a packed reference to a file begins."""
_FAULTS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    OverflowError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
)
"""Errors that Pillow's readers raise for bytes that are no sound image."""


@dataclass(frozen=True)
class ImageRules:
    """Where the images of a source may lie. folder: what paths are relative to, and where they must lie; urls: whether
    they may be fetched; max_pixels: larger images are scaled down to so many, where their record says nothing.
    """

    folder: Path = Path()
    urls: bool = False
    max_pixels: int | None = None


@dataclass(frozen=True)
class ImageRef:
    """An image of a record. payload: its bytes, or with ``by_path`` its path; digest: the xxh3-128 of its bytes;
    max_pixels: it is scaled down to at most so many, 0 for as it is.
    """

    payload: bytes
    by_path: bool
    digest: bytes
    max_pixels: int = 0

    def packed(self) -> bytes:
        """The reference as bytes, which ``unpacked`` reads."""
        return HEADER.pack(BY_PATH if self.by_path else b"b", self.max_pixels, self.digest) + self.payload

    @classmethod
    def unpacked(cls, raw: bytes) -> ImageRef:
        """What ``packed`` gave."""
        kind, most, digest = HEADER.unpack_from(raw)
        return cls(raw[HEADER.size :], kind == BY_PATH, digest, most)

    @property
    def identity(self) -> bytes:
        """What changes with the image that a model is shown."""
        return self.digest + self.max_pixels.to_bytes(8, "little")

    def content(self) -> bytes:
        """The bytes of the image; IntegrityError where its file is not the one that was tokenised."""
        if not self.by_path:
            return self.payload
        path = Path(self.payload.decode())
        content = path.read_bytes() if path.is_file() else b""
        if _digest(content) != self.digest:
            raise IntegrityError(
                f"{path} is not the image that was tokenised: it was changed or removed since. Put it back, or start "
                "again with another data.cache."
            )
        return content

    def image(self, where: str = "") -> Image.Image:
        """The image, upright and in RGB. DataError where it cannot be read."""
        name = where or (self.payload.decode() if self.by_path else "an image")
        return decoded(self.content(), name, max_pixels=self.max_pixels)


def found(source: Any, rules: ImageRules, where: str, *, max_pixels: int | None = None) -> ImageRef:
    """The image that a record names: a path, a data, file or web URL, bytes, base64, {bytes, path}, or one in memory.

    Raises DataError naming ``where`` for an image that is not there, too large, outside the folder, or behind a URL
    that is not allowed.
    """
    most = max_pixels or rules.max_pixels or 0
    if isinstance(source, Mapping):
        named = [
            source[key] for key in ("bytes", "url", "path", "image", "base64") if source.get(key) is not None
        ]
        if not named:
            _refuse(where, f"an image needs bytes, a path or a url, not {sorted(map(str, source))}.")
        if isinstance(source.get("base64"), str) and source["base64"] is named[0]:
            text = named[0].partition(",")[2] if named[0].startswith("data:") else named[0]
            return _of_bytes(_base64(text, where), most, where)
        return found(named[0], rules, where, max_pixels=most)
    if isinstance(source, bytes | bytearray | memoryview):
        return _of_bytes(bytes(source), most, where)
    if hasattr(source, "save") and hasattr(source, "mode"):  # Pillow's
        if source.width * source.height > MOST_PIXELS:
            _too_large(where, source.width, source.height)
        return _of_bytes(png_bytes(source), most, where)
    if not isinstance(source, str) or not source:
        _refuse(
            where, f"an image is a path, a URL or bytes, not {type(source).__name__} {repr(source)[:40]}."
        )
    if source.startswith("data:"):
        return _of_bytes(_base64(source.partition(",")[2], where), most, where)
    if "://" in source and not source.startswith("file://"):
        return _of_bytes(_fetched(source, rules, where), most, where)
    if source.startswith("file://"):
        return _of_path(unquote(source.removeprefix("file://").removeprefix("localhost")), rules, most, where)
    if in_base64(source):
        return _of_bytes(_base64(source, where), most, where)
    return _of_path(source, rules, most, where)


def in_base64(text: str) -> bool:
    """Whether a text is the file of an image in base64, by how it begins."""
    return CODED.match(text, 0, 128) is not None


def decoded(content: bytes, where: str, *, max_pixels: int = 0) -> Image.Image:
    """Bytes of a file as an upright image in RGB, transparent parts white, of at most ``max_pixels`` (0: as it is).

    Raises DataError for bytes that are no sound still image, or one of more than ``MOST_PIXELS``.
    """
    Image, ImageOps = pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which are looked at below, and of metadata
            with Image.open(io.BytesIO(content), formats=KINDS) as image:
                width, height = image.size
                if width * height > MOST_PIXELS:
                    _too_large(where, width, height)
                if getattr(image, "is_animated", False) and image.format in ANIMATED:
                    _refuse(where, f"the {image.format} has {image.n_frames} frames; an image has one.")
                if max_pixels and image.format == "JPEG":
                    image.draft("RGB", _size_within(width, height, max_pixels))
                deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in DEEP)
                upright = ImageOps.exif_transpose(image)
                upright = _of_deep_grey(upright, Image) if deep else _in_rgb(upright, Image)
    except Image.DecompressionBombError:
        _refuse(where, f"the image has more than {MOST_PIXELS:,} pixels. Scale it down.")
    except DataError:
        raise
    except _FAULTS as error:
        reason = " ".join(str(error).split())[:80] or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "its first bytes are those of no kind that is read"
        raise DataError(
            f"{where}: not a sound image ({reason}). What would work: {', '.join(KINDS)}, whole; or skip such rows "
            "with `on_bad_record: skip`."
        ) from error
    return _within(upright, max_pixels, Image) if max_pixels else upright


def png_bytes(image: Image.Image, *, level: int = -1) -> bytes:
    """An image as a PNG file, whose pixels are its own. level: zlib's, 1 fast to 9 small, -1 its default."""
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=level)
    return stream.getvalue()


def pillow() -> tuple[Any, Any]:
    """Pillow's ``Image`` and ``ImageOps``; ConfigError where it is not installed."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ConfigError(f"Images need Pillow: {how_to_install('vision')}.") from None
    return Image, ImageOps


def _in_rgb(image: Any, Image: Any) -> Any:
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are numbers of 32 bits ({image.mode})")
    return image.convert("RGB")


def _of_deep_grey(image: Any, Image: Any) -> Any:
    """Sixteen bits of grey, which ``convert`` would cut at 255; the grey that is transparent is white."""
    deep = np.asarray(image)
    grey = (deep >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[deep == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _within(image: Any, max_pixels: int, Image: Any) -> Any:
    if image.width * image.height <= max_pixels:
        return image
    return image.resize(_size_within(image.width, image.height, max_pixels), Image.Resampling.BICUBIC)


def _size_within(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """The size of the same shape with at most so many pixels; no side is 0."""
    scale = min(1.0, (max_pixels / (width * height)) ** 0.5)
    wide, high = max(1, int(width * scale)), max(1, int(height * scale))
    return min(wide, max_pixels), min(high, max_pixels)


def _of_bytes(content: bytes, max_pixels: int, where: str) -> ImageRef:
    if len(content) > MOST_BYTES:
        _refuse(where, f"the image has {len(content):,} bytes; at most {MOST_BYTES:,} are read.")
    return ImageRef(content, False, _digest(content), max_pixels)


def _of_path(name: str, rules: ImageRules, max_pixels: int, where: str) -> ImageRef:
    folder = rules.folder.expanduser().resolve()
    try:
        path = (folder / name).resolve()
        inside = path.is_relative_to(folder)
        there = inside and path.is_file()
        size = path.stat().st_size if there else 0
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: {name[:80]!r} is no path ({error}).") from error
    if not inside:
        _refuse(
            where,
            f"the image {name[:80]!r} lies outside {folder}. Name the images' folder: image_folder of the source.",
        )
    if not there:
        _refuse(
            where,
            f"no image {name[:80]!r} in {folder}. Name the images' folder: image_folder of the source.",
        )
    if size > MOST_BYTES:
        _refuse(where, f"the image {name[:80]!r} has {size:,} bytes; at most {MOST_BYTES:,} are read.")
    content = path.read_bytes()
    return ImageRef(str(path).encode(), True, _digest(content), max_pixels)


def _fetched(url: str, rules: ImageRules, where: str) -> bytes:
    if not url.startswith(("http://", "https://")):
        _refuse(
            where,
            f"the image {url[:80]!r} is behind a URL of a kind that is not fetched; http and https are.",
        )
    if not rules.urls:
        _refuse(
            where,
            f"the image {url[:80]!r} is a URL, which is not fetched. Set image_urls: true, or store the file.",
        )
    import httpx2 as httpx

    content = bytearray()
    try:
        with httpx.stream("GET", url, timeout=SECONDS, follow_redirects=False) as answer:
            answer.raise_for_status()
            for part in answer.iter_raw(1 << 16):
                content += part
                if len(content) > MOST_BYTES:
                    _refuse(where, f"the image behind {url[:80]!r} has more than {MOST_BYTES:,} bytes.")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise DataError(f"{where}: the image {url[:80]!r} cannot be fetched: {str(error)[:120]}.") from error
    return bytes(content)


def _base64(text: str, where: str) -> bytes:
    text = "".join(text.split())  # base64 in mails is written in lines
    if len(text) > MOST_BYTES * 4 // 3 + 4:
        _refuse(where, f"the image has more than {MOST_BYTES:,} bytes.")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(
            f"{where}: the image is no base64: {error}. Give data:image/png;base64,..."
        ) from error


def _digest(content: bytes) -> bytes:
    return xxhash.xxh3_128(content).digest()


def _too_large(where: str, width: int, height: int) -> NoReturn:
    _refuse(
        where,
        f"the image has {width:,} x {height:,} pixels; at most {MOST_PIXELS:,} are read. Scale it down.",
    )


def _refuse(where: str, problem: str) -> NoReturn:
    raise DataError(f"{where}: {problem}")
