"""Modules for other people's training loops."""

from __future__ import annotations

from selectkd.adapters.module import SelecTKDLoss

__all__ = ["SelecTKDLoss"]
