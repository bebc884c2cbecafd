"""A gate that knows where a damaged teacher of the laboratory is wrong: an oracle for studies.

selectkd study run studies/planted.yaml --allow-plugin lab_noise
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selectkd import component
from selectkd.objective.pair import TokenPair, label_of, sequence_of
from selectkd.objective.verifiers import VerifierTraits


@component("verifier")
@dataclass(frozen=True)
class right_places:
    """a = 0 right after the tokens that ``noise`` names, where the teacher was taught wrong tokens, else 1.

    noise: the noise.json of `make lab`. The first trained token of a sequence is accepted: the token before it is none
    of the rows.
    """

    noise: str
    traits = VerifierTraits(scope="sequence", teacher_tokens=0)

    @cached_property
    def tokens(self) -> Tensor:
        """The token ids after which the teacher is wrong."""
        return torch.tensor(json.loads(Path(self.noise).read_text("utf-8"))["after"])

    def score(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, "n m"]:
        return label_of(pair, "right_places").to(torch.float32)[:, None]

    def keep(self, scores: Float[Tensor, "n m"], sequence: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        order = torch.argsort(sequence, stable=True)
        label, of = scores[order, 0].nan_to_num(nan=-1.0).long(), sequence[order]
        wrong = torch.zeros(len(order), dtype=torch.bool, device=scores.device)
        wrong[1:] = (of[1:] == of[:-1]) & torch.isin(label[:-1], self.tokens.to(label.device))
        return torch.ones_like(scores[:, 0]).scatter(0, order, 1.0 - wrong.to(scores.dtype))

    def __call__(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, " n"]:
        return self.keep(self.score(pair, uniform), sequence_of(pair))
