"""Data: records become samples, examples, batches, and positions that are trained."""

from __future__ import annotations

from selectkd.data.alignment import Alignment, align, template_fingerprint, tokenizer_fingerprint
from selectkd.data.collate import Batch, block_mask, collate, collate_packed, pack
from selectkd.data.files import Records, read_records
from selectkd.data.formats import FORMATS, Sample, detect_format, to_sample
from selectkd.data.inspect import Check, check, pieces
from selectkd.data.render import Dropped, Example, eos_ids_of, pad_id_of, render
from selectkd.data.sources import Source, batches, dataset_source, draw, plan
from selectkd.data.supervised import Supervised, supervised
from selectkd.data.template import ChatTemplate

__all__ = [
    "FORMATS",
    "Alignment",
    "Batch",
    "ChatTemplate",
    "Check",
    "Dropped",
    "Example",
    "Records",
    "Sample",
    "Source",
    "Supervised",
    "align",
    "batches",
    "block_mask",
    "check",
    "collate",
    "collate_packed",
    "dataset_source",
    "detect_format",
    "draw",
    "eos_ids_of",
    "pack",
    "pad_id_of",
    "pieces",
    "plan",
    "read_records",
    "render",
    "supervised",
    "template_fingerprint",
    "to_sample",
    "tokenizer_fingerprint",
]
