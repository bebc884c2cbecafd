"""One probe text as an SVG, before and after training: a figure for a README or a paper, light and dark."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import escape

from selectkd.errors import ConfigError
from selectkd.report.charts import counted
from selectkd.report.escapes import shortened
from selectkd.report.heatmap import ACCEPTED, shown
from selectkd.report.looks import Looks
from selectkd.report.run_files import RunFiles

LETTER, LINE, WIDE, MARGIN = 8.4, 27.0, 92, 22.0
"""Width of a letter and height of a line in pixels; letters in a line; the margin."""
MOST_TOKENS = 120
STYLE = """
text { font: 14px ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #1c2430; }
.name { font: 600 15px ui-sans-serif, system-ui, sans-serif; }
.soft { font: 13px ui-sans-serif, system-ui, sans-serif; fill: #566072; }
.prompt { fill: #566072; }
.page { fill: #fbfaf7; }
.a { fill: #266ebe; } .r { fill: #e06c14; } .under { fill: #d05c08; }
@media (prefers-color-scheme: dark) {
  text { fill: #e7eaef; } .soft, .prompt { fill: #a3adbb; }
  .page { fill: #14181e; }
  .a { fill: #488cdc; } .r { fill: #e26e1e; } .under { fill: #f08030; }
}
"""
STRENGTH = (0.05, 0.1, 0.18, 0.27, 0.37, 0.48)


def heatmap_svg(run: RunFiles, text: int | None = None) -> str:
    """The first and the last look at a probe text as an SVG document.

    text: its number from 1; by default the one with the most changed verdicts among those of at most MOST_TOKENS
    tokens. ConfigError where the run has no looks, or no such text.
    """
    looks = run.looks
    if looks is None:
        raise ConfigError(
            f"{run.folder} noted nothing of single tokens. Set training.probe_samples above 0 and train."
        )
    number = _chosen(looks) if text is None else text - 1
    if not 0 <= number < len(looks.texts) or not (looks.last["sample"] == number).any():
        raise ConfigError(f"--text {text}: the run has texts 1 to {len(looks.texts)}.")
    every = shown([(run.name, looks)])
    prompt, answer = _pieces(looks, number)
    lines = [_row(f"Prompt: {prompt}", 0)]
    panels = [("before training", every[0]), (f"after {counted(looks.last.step, 'step')}", every[-1])]
    height = MARGIN + LINE
    parts: list[str] = []
    for name, one in panels if len(every) > 1 else panels[1:]:
        here = one.look["sample"] == number
        drawn, rows = _panel(
            answer, one.verdict[here].tolist(), one.level[here].tolist(), height + LINE * 1.55
        )
        kept = int((one.verdict[here] == ACCEPTED).sum())
        parts.append(f'<text class="name" x="{MARGIN}" y="{height + LINE * 0.7:.1f}">{escape(name)}</text>')
        parts.append(
            f'<text class="soft" x="{MARGIN + 170}" y="{height + LINE * 0.7:.1f}">'
            f"the teacher accepts {kept} of {int(here.sum())} tokens</text>"
        )
        parts += drawn
        height += LINE * (1.8 + rows)
    lines += parts
    lines.append(_legend(height + LINE * 0.6))
    width, tall = WIDE * LETTER + 2 * MARGIN, height + LINE * 1.4
    label = f"Tokens the teacher accepts and rejects, {' and '.join(name for name, _ in panels)}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {tall:g}" '
        f'role="img" aria-label="{escape(label)}">'
        f'<style>{STYLE}</style><rect class="page" width="{width:g}" height="{tall:g}" rx="10"/>'
        + "\n".join(lines)
        + "</svg>\n"
    )


def _chosen(looks: Looks) -> int:
    sample = looks.last["sample"]
    changed = np.bincount(sample, weights=looks.first.accepted != looks.last.accepted)
    fits = np.bincount(sample) <= MOST_TOKENS
    return int(np.argmax(np.where(fits, changed, -1)))


def _pieces(looks: Looks, number: int) -> tuple[str, list[str]]:
    """The end of the prompt, and the supervised tokens; the first of several turns alone."""
    places = looks.last["token"][looks.last["sample"] == number].tolist()
    tokens = looks.texts[number].tokens
    prompt = " ".join("".join(tokens[: places[0]]).split())
    for mark in ("<|im_start|>assistant", "<|im_end|>"):  # what chat templates end a prompt with
        prompt = prompt.removesuffix(mark).strip()
    prompt = prompt.rpartition("<|im_start|>user")[2].strip() or prompt
    if len(prompt) > WIDE - 10:
        prompt = "... " + prompt[-(WIDE - 14) :].partition(" ")[2]
    return shortened(prompt, WIDE, keep=""), [
        shortened(tokens[at], 40, keep="") for at in places[:MOST_TOKENS]
    ]


def _row(text: str, row: int) -> str:
    return f'<text class="prompt" x="{MARGIN}" y="{MARGIN + LINE * (row + 0.5):.1f}">{escape(text)}</text>'


def _panel(
    tokens: Sequence[str], verdicts: Sequence[int], levels: Sequence[int], top: float
) -> tuple[list[str], int]:
    """Each token as a coloured box with its letters, and how many rows they take."""
    parts, column, row = [], 0, 0
    for token, verdict, level in zip(tokens, verdicts, levels, strict=False):
        token = token.replace("\\n", "\u21b5")
        if column + len(token) > WIDE:
            column, row = 0, row + 1
        x, y, width = MARGIN + column * LETTER, top + row * LINE, len(token) * LETTER
        kind = "a" if verdict == ACCEPTED else "r"
        parts.append(
            f'<rect class="{kind}" fill-opacity="{STRENGTH[level]}" x="{x:.1f}" y="{y - 15:.1f}" '
            f'width="{width:.1f}" height="21"/>'
        )
        if kind == "r":
            parts.append(f'<rect class="under" x="{x:.1f}" y="{y + 4:.1f}" width="{width:.1f}" height="2"/>')
        letters = token.strip()
        if letters:
            begin = x + (len(token) - len(token.lstrip())) * LETTER
            parts.append(
                f'<text x="{begin:.1f}" y="{y:.1f}" textLength="{len(letters) * LETTER:.1f}" '
                f'lengthAdjust="spacingAndGlyphs">'
                f"{escape(letters)}</text>"
            )
        column += len(token)
    return parts, row + 1


def _legend(y: float) -> str:
    return (
        f'<rect class="a" fill-opacity=".3" x="{MARGIN}" y="{y - 12:.1f}" width="16" height="16"/>'
        f'<text class="soft" x="{MARGIN + 22}" y="{y:.1f}">accepted</text>'
        f'<rect class="r" fill-opacity=".4" x="{MARGIN + 96}" y="{y - 12:.1f}" width="16" height="16"/>'
        f'<rect class="under" x="{MARGIN + 96}" y="{y + 2:.1f}" width="16" height="2"/>'
        f'<text class="soft" x="{MARGIN + 118}" y="{y:.1f}">'
        "rejected; the stronger the colour, the larger the divergence</text>"
    )
