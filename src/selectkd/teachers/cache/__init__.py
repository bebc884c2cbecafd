"""The teacher cache: a teacher's rows of a text, computed once, checked whenever they are read."""

from __future__ import annotations

from selectkd.teachers.cache.build import CacheOptions, build_cache, plan_of
from selectkd.teachers.cache.index import read_index, records_of
from selectkd.teachers.cache.origin import ModelOrigin, Origin
from selectkd.teachers.cache.plan import CachePlan
from selectkd.teachers.cache.reader import CachedTeacher, CacheReader, open_cache
from selectkd.teachers.cache.repair import Findings, repair, verify

__all__ = [
    "CacheOptions",
    "CachePlan",
    "CacheReader",
    "CachedTeacher",
    "Findings",
    "ModelOrigin",
    "Origin",
    "build_cache",
    "open_cache",
    "plan_of",
    "read_index",
    "records_of",
    "repair",
    "verify",
]
