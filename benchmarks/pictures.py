"""The pictures of docs/concepts/verifiers.md: what each verifier makes of the same four positions.

    python benchmarks/pictures.py [--out docs/figures]

The positions are made up, eight tokens wide; the verifiers are the package's own. One SVG a verifier.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from selectkd.objective.pair import TokenPair, dense_pair, entropy
from selectkd.objective.registry import parameters
from selectkd.objective.verifiers import VERIFIERS

SHOWN = (
    "always", "greedy_topk", "spec_k", "expected_spec_k", "hellinger", "teacher_entropy", "student_entropy",
    "label_top_k", "prefix_gate", "sigmoid_entropy_gap",
)  # fmt: skip
TITLES = (
    "both sure, they agree",
    "sure of different tokens",
    "both unsure, they agree",
    "unsure teacher, other token",
)
TEACHER = (
    (0.88, 0.05, 0.03, 0.01, 0.01, 0.01, 0.005, 0.005),
    (0.85, 0.07, 0.04, 0.02, 0.01, 0.005, 0.0025, 0.0025),
    (0.24, 0.20, 0.17, 0.14, 0.12, 0.08, 0.03, 0.02),
    (0.30, 0.26, 0.20, 0.12, 0.08, 0.02, 0.01, 0.01),
)
STUDENT = (
    (0.70, 0.12, 0.06, 0.04, 0.03, 0.02, 0.02, 0.01),
    (0.10, 0.05, 0.05, 0.04, 0.04, 0.60, 0.07, 0.05),
    (0.20, 0.23, 0.15, 0.14, 0.11, 0.09, 0.05, 0.03),
    (0.03, 0.03, 0.04, 0.05, 0.06, 0.05, 0.69, 0.05),
)
LABELS = (0, 0, 6, 1)
K = 3
UNIFORM = 0.7
"""The number that stands for chance: spec-k accepts where its probability exceeds it."""

WIDTH, HEIGHT, PANEL, BASE, TALL = 720, 236, 172, 150, 110
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#24292f}.s{font-size:11px;fill:#57606a}.p{fill:#54aeff}.q{fill:#fb8f44}"
    ".m{fill:#1a7f37}.y{stroke:#1a7f37;fill:#dafbe1}.n{stroke:#cf222e;fill:#ffebe9}.h{stroke:#8250df;fill:#fbefff}"
    ".b{fill:#fff}.l{stroke:#d0d7de}"
)


def pair() -> TokenPair:
    """The four positions as one text of four tokens."""
    made = dense_pair(torch.tensor(TEACHER).log(), torch.tensor(STUDENT).log())
    return replace(made, label=torch.tensor(LABELS), sequence=torch.zeros(4, dtype=torch.long))


def picture(name: str, acceptance: Tensor, positions: TokenPair) -> str:
    """The SVG of one verifier: p and q at each position, and its acceptance below."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(name)}: the acceptance of four positions"><style>{STYLE}</style>'
        f'<rect class="b" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
    ]
    unsure = entropy(positions.logp), entropy(positions.logq)
    for i, title in enumerate(TITLES):
        left = 18 + i * PANEL
        parts.append(f'<text x="{left}" y="20" class="s">{i + 1}. {title}</text>')
        parts.append(f'<line class="l" x1="{left}" x2="{left + 152}" y1="{BASE}" y2="{BASE}"/>')
        for token, (p, q) in enumerate(zip(TEACHER[i], STUDENT[i], strict=True)):
            x = left + token * 19
            for offset, kind, value in ((0, "p", p), (8, "q", q)):
                tall = value * TALL
                parts.append(
                    f'<rect class="{kind}" x="{x + offset}" y="{BASE - tall:.1f}" width="7" height="{tall:.1f}"/>'
                )
            if token == int(positions.student_top[i]):
                parts.append(
                    f'<text x="{x + 9}" y="{BASE - max(p, q) * TALL - 5:.1f}" text-anchor="middle">?</text>'
                )
        parts.append(
            f'<text class="s" x="{left}" y="{BASE + 16}">H {unsure[0][i]:.2f}, {unsure[1][i]:.2f}; '
            f"overlap {positions.overlap[i]:.2f}</text>"
        )
        a = float(acceptance[i])
        kind, word = (
            ("y", "accepted") if a == 1 else ("n", "rejected") if a == 0 else ("h", f"weight {a:.2f}")
        )
        parts.append(f'<rect class="{kind}" x="{left}" y="{BASE + 26}" width="110" height="22" rx="11"/>')
        parts.append(f'<text x="{left + 55}" y="{BASE + 41}" text-anchor="middle">{word}</text>')
    parts.append(
        f'<rect class="p" x="18" y="{HEIGHT - 22}" width="10" height="10"/><text class="s" x="33" y="{HEIGHT - 13}">'
        f'teacher p</text><rect class="q" x="100" y="{HEIGHT - 22}" width="10" height="10"/>'
        f'<text class="s" x="115" y="{HEIGHT - 13}">student q, ? its proposal; H: entropy of p and of q, nats</text>'
        "</svg>\n"
    )
    return "".join(parts)


def pictures() -> dict[str, str]:
    """The SVG of each verifier, by its name."""
    positions, uniform = pair(), torch.full((4, 8), UNIFORM)
    drawn = {}
    for name in SHOWN:
        known = parameters(VERIFIERS[name])
        verifier = VERIFIERS[name](**({"k": K} if "k" in known else {}))
        drawn[name] = picture(name, verifier(positions, uniform), positions)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    out = parser.parse_args().out
    for name, svg in pictures().items():
        (out / f"verifier-{name}.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
