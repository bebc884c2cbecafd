"""Recipes: YAML to a checked, frozen ``Recipe``; one error names every problem. No torch here."""

from __future__ import annotations

from selectkd.config.load import load_recipe, recipe_from
from selectkd.config.schema import (
    BetaChange,
    Data,
    ObjectiveSection,
    Recipe,
    SourceSection,
)
from selectkd.config.student import FromTeacher, Student
from selectkd.config.teachers import AdaptersOffTeacher, CacheTeacher, ModelTeacher, RemoteTeacher, Teacher
from selectkd.config.training import EarlyStopping, Lora, Training

__all__ = [
    "AdaptersOffTeacher",
    "BetaChange",
    "CacheTeacher",
    "Data",
    "EarlyStopping",
    "FromTeacher",
    "Lora",
    "ModelTeacher",
    "ObjectiveSection",
    "Recipe",
    "RemoteTeacher",
    "SourceSection",
    "Student",
    "Teacher",
    "Training",
    "load_recipe",
    "recipe_from",
]
