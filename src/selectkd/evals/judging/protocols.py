"""The judged sets of the paper: whose answers are the reference, and how the judged model writes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Protocol:
    """A preset: the model whose answers stand in the file as the reference, and the sampling of the judged model.

    Both orders, ties .5. Source: SelecTKD (arXiv 2510.24021), evaluation; sampling of DistiLLM-2 (arXiv 2503.07067).
    """

    reference: str
    temperature: float = 0.8
    top_p: float = 0.95
    max_new_tokens: int = 512


PROTOCOLS = {
    "alpaca_eval": Protocol("text-davinci-003"),
    "evol_instruct": Protocol("gpt-3.5-turbo"),
    "ultrafeedback": Protocol("gpt-3.5-turbo"),
}
