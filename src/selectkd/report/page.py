"""The page: the parts of one or more runs put into one HTML file that asks nothing of any network.

Everything from outside goes through Jinja2's autoescape or is built by ``markupsafe``; the content security policy
allows the page's own style and script by their hashes and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from selectkd import __version__
from selectkd.data.durable import write_plain
from selectkd.report import heatmap, provenance
from selectkd.report.charts import counted, draw, number
from selectkd.report.curves import calibrations, of_probe, over_steps
from selectkd.report.escapes import clean, shortened
from selectkd.report.interactive import packed_program, program, specification
from selectkd.report.results import read_results
from selectkd.report.run_files import LONGEST_NAME, RunFiles, read_run
from selectkd.report.verdict import RULES, interval, paired, sentences, tiles

NAME = "report.html"
NOTHING = ["'none'"]
PAIRED = (("divergence", "divergence, nats a token"), ("acceptance", "share of tokens accepted"))


def write_report(
    *runs: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    extra: Sequence[Path] = (),
    interactive: bool = False,
) -> Path:
    """Writes the page about run folders, by default report.html in the first one, and returns its path.

    extra: JSON files of results, shown with the first run. interactive: charts that answer a pointer, by the extra
    ``report``, which make the page 0.9 MB larger. ConfigError where one is no run folder, DataError for a
    file of ``extra`` that cannot be read, ResourceError where the page cannot be written.
    """
    read = _distinct([read_run(run, extra if not number_of else ()) for number_of, run in enumerate(runs)])
    path = Path(runs[0]).expanduser() / NAME if out is None else Path(out).expanduser()
    write_plain(path, page(read, interactive=interactive).encode("utf-8", "backslashreplace"))
    return path


def page(runs: Sequence[RunFiles], *, interactive: bool = False) -> str:
    """The page about runs as HTML."""
    first = runs[0]
    results = read_results(first.results)
    style, script, chart_script = (template_file(name) for name in ("page.css", "page.js", "charts.js"))
    errors, calibration = ([], []) if first.looks is None else calibrations(first.looks)
    curves, probe_charts = over_steps(runs), [] if first.looks is None else of_probe(first.looks)
    every = [*curves, *probe_charts, *calibration, *results.charts] if interactive else []
    specifications = {one.title: specification(one) for one in every if not one.empty}
    scripts = [script, program(), chart_script] if specifications else [script]
    return template("page.html.j2").render(
        policy=policy_of(style, scripts),
        specifications=specifications,
        specifications_json=_json(specifications),
        program=packed_program() if specifications else "",
        chart_script=Markup(chart_script),
        style=Markup(style),
        script=Markup(script),
        runs=[{"run": run, "tiles": tiles(run), "sentences": sentences(run), "of": _of(run)} for run in runs],
        rules=RULES,
        curves=curves,
        paired=_paired(runs),
        differing=provenance.differing(runs) if len(runs) > 1 else [],
        probe=_probe(runs),
        probe_charts=probe_charts,
        streams=_streams(first),
        errors=errors,
        calibration=calibration,
        results=results,
        recipe=provenance.recipe_rows(first),
        facts=provenance.facts(first),
        commands=provenance.commands(first, results.kinds),
        missing=provenance.missing(first, results),
        version=__version__,
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _distinct(runs: Sequence[RunFiles]) -> list[RunFiles]:
    """Runs of one name by as many folders above them as tell them apart, and one that is there twice by a number."""
    named: list[RunFiles] = []
    for run in runs:
        parts = run.folder.resolve().parts
        others = [other.folder.resolve().parts for other in runs if other.name == run.name]
        more = next((n for n in range(1, len(parts)) if sum(p[-n:] == parts[-n:] for p in others) == 1), 1)
        name = run.name if more == 1 else shortened("/".join(parts[-more:]), LONGEST_NAME, keep="")
        taken = sum(one.name == name or one.name.startswith(f"{name} (") for one in named)
        named.append(replace(run, name=f"{name} ({taken + 1})" if taken else name))
    return named


@lru_cache(maxsize=2)
def template(name: str) -> Template:
    """A template of this package; all that is put into it is escaped."""
    environment = Environment(
        loader=PackageLoader("selectkd.report", "template"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=_visible,
    )  # fmt: skip
    environment.filters |= {"number": number, "counted": counted, "draw": draw}
    return environment.get_template(name)


def _visible(value: Any) -> Any:
    """What an expression of the template gives, its control and direction characters as escapes."""
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _of(run: RunFiles) -> dict[str, str]:
    """Teacher, student and data in a word each."""
    manifest, settings = run.manifest or {}, run.settings
    sources = [(manifest.get(who) or {}).get("source") for who in ("teacher", "student")]
    return {
        "teacher": str(sources[0] or settings.get("teacher.model") or "a teacher"),
        "student": _cut(
            str(sources[1] or settings.get("student.model") or "some of its own layers"), sources[0]
        ),
        "gate": _gate(settings),
    }


def _cut(student: str, teacher: object) -> str:
    """A student with how many layers it has of a model, where its name lists them all."""
    found = re.fullmatch(r"(.*) with layers (\d+(?:, \d+)*)", student, re.S)
    if found is None:
        return student
    n = found[2].count(",") + 1
    return f"{number(n)} of its own layers" if found[1] == teacher else f"{counted(n, 'layer')} of {found[1]}"


def _gate(settings: dict[str, Any]) -> str:
    for kind in ("verifier", "selector"):
        name = settings.get(f"objective.{kind}.name") or settings.get(f"objective.{kind}")
        if name:
            prefix = f"objective.{kind}."
            rest = [
                f"{k.removeprefix(prefix)}\u00a0=\u00a0{v}"
                for k, v in settings.items()
                if k.startswith(prefix) and not k.endswith(".name")
            ]
            return f"{name}{' (' + ', '.join(rest) + ')' if rest else ''}"
    return "not noted"


def _probe(runs: Sequence[RunFiles]) -> dict[str, Any] | None:
    """The heat-map of the first run that has looks, with those of other runs at the same texts."""
    with_looks = [(run.name, run.looks) for run in runs if run.looks is not None]
    if not with_looks:
        return None
    _, looks = with_looks[0]
    same = [(name, one) for name, one in with_looks if one.same_texts(looks)]
    every = heatmap.shown(same)
    of_first = [one for one in every if one.run == same[0][0]]
    return {
        "texts": heatmap.texts_of(looks, of_first[-1]),
        "before": heatmap.texts_of(looks, of_first[0]) if len(of_first) > 1 and looks.tokens <= 8000 else [],
        "looks": every,
        "index": len(of_first) - 1,
        "rows": looks.last.rows,
        "tokens": looks.tokens,
        "several": len(same) > 1,
        "other_texts": [name for name, one in with_looks if (name, one) not in same],
        "data": _json(heatmap.packed(every, len(of_first) - 1)),
        "change": [(unit, interval(paired(looks.first, looks.last, name))) for name, unit in PAIRED],
    }


def _paired(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """The last look of each other run minus that of the first, over the same texts, with intervals."""
    first = runs[0].looks
    found = []
    for run in runs[1:]:
        same = first is not None and run.looks is not None and run.looks.same_texts(first)
        last = (first.last, run.looks.last) if same and first and run.looks else None
        found.append(
            {
                "name": f"{run.name} minus {runs[0].name}",
                "values": [(unit, interval(last and paired(*last, name))) for name, unit in PAIRED],
                "verdicts": None if last is None else int((last[0].accepted != last[1].accepted).sum()),
            }
        )
    return found


def _streams(run: RunFiles) -> list[dict[str, Any]]:
    """TAR and KL of each stream where it was last measured; a stream is a source, and who wrote its text."""
    last: dict[str, dict[str, Any]] = {}
    first: dict[str, dict[str, Any]] = {}
    for line in run.steps:
        for name, values in (line.get("streams") or {}).items():
            last[name] = values
            first.setdefault(name, values)
    rows = []
    for name, values in last.items():
        source, _, writer = name.partition(".")
        rows.append(
            {"source": source, "writer": writer or "the data set", "first": first[name], "last": values}
        )
    return rows


def _json(content: Any) -> Markup:
    """JSON that ends no script element."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


def template_file(name: str) -> str:
    """The text of a file beside the templates."""
    return Path(__file__).with_name("template").joinpath(name).read_text("utf-8")


def policy_of(style: str, scripts: Sequence[str] = ()) -> str:
    """The content security policy of a page with this style and these scripts, and nothing from elsewhere."""
    of_style, *of_scripts = (
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in (style, *scripts)
    )
    return (
        f"default-src 'none'; style-src {of_style}; script-src {' '.join(of_scripts or NOTHING)}; "
        "base-uri 'none'; form-action 'none'"
    )
