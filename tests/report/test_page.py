"""The page without a browser: what is in it, that it asks for nothing, and that text from outside stays text."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from report.written_run import HOSTILE, write_run
from selectkd.cli import main
from selectkd.report.heatmap import FLOATS
from selectkd.report.page import write_report
from selectkd.report.run_files import read_run


class Parsed(HTMLParser):
    """Elements with their attributes, and the text of each kind of element."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.said: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input", "br", "img", "line", "rect", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self.said.append(" " if tag in ("td", "th", "p", "dd") else "")
        if tag in self.open:
            while self.open and self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)
        if not {"script", "style"} & set(self.open):
            self.said.append(data)

    def all_text(self) -> str:
        return "".join(self.said)


def parsed(*runs: Path, **options: Any) -> Parsed:
    return Parsed(write_report(*runs, **options).read_text("utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: Any) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "first")


def test_a_page_refers_to_nothing_outside_and_its_policy_names_its_own_style_and_script(run: Path) -> None:
    page = parsed(run)
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert name not in ("src", "href", "srcset", "action", "style") and not name.startswith("on"), (
                tag,
                name,
            )
            assert "//" not in (value or ""), (tag, name, value)
    policy = next(a["content"] for t, a in page.elements if t == "meta" and "http-equiv" in a) or ""
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    found = [
        base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()
        for one in (page.text["style"][0], page.text["script"][-1])
    ]
    assert allowed == found and policy.startswith("default-src 'none';")
    assert (
        "unsafe" not in policy
        and "@import" not in page.text["style"][0]
        and "url(" not in page.text["style"][0]
    )


def test_numbers_of_the_page_are_those_of_the_runs_files(run: Path) -> None:
    said = " ".join(parsed(run).all_text().split())
    for each in (
        "2.00 → 0.750", "12.0 → 7.00", "teacher 5.00", "3.00 GiB", "1 min 1 s", "big teaches small",
        "moved 62% closer to its teacher", "closed 71% of the gap in perplexity", "took 30% of the signal away",
    ):  # fmt: skip
        assert each in said, each
    tars = [line["probe_tar"] for line in read_run(run).evaluations]
    shown = re.findall(
        r"(\d+) (0\.\d+) (?:- -|\d+ \d+)", said[said.index("Over the run") : said.index("From the first")]
    )
    assert [float(tar) for _, tar in shown] == pytest.approx(tars, abs=6e-4)
    assert said.count("- - ", said.index("Over the run"), said.index("From the first")) == 1, (
        "the first alone"
    )


def test_packed_columns_are_those_of_the_look_to_three_digits(run: Path) -> None:
    page = parsed(run)
    data = json.loads(page.text["script"][0])
    looks = read_run(run).looks
    assert looks is not None and [one["step"] for one in data["looks"]] == [0, 10, 20]
    for packed, look in zip(data["looks"], looks.looks, strict=True):
        n = packed["n"]
        floats = unpacked(packed["floats"], 2).view(np.float16).reshape(len(FLOATS), n)
        for name, column in zip(FLOATS, floats, strict=True):
            expected = look[name].astype(np.float64)
            large = np.abs(expected) >= 1e-4  # smaller ones are shown as such
            shown = [f"{value:.3g}" for value in column[large].astype(np.float64)]
            assert np.allclose(np.array(shown, float), expected[large], rtol=6e-4 + 5e-3), name
            assert (np.abs(column[~large]) < 1.01e-4).all()
        assert unpacked(packed["rank"], 2).view("<u2").tolist() == look["rank"].tolist()
        named = [data["pieces"][one - 1] for one in unpacked(packed["proposal"], 4).view("<u4")]
        assert [one.replace("\\n", "\n") for one in named] == [
            look.pieces[one] for one in look["proposal"].tolist()
        ]
        marks = unpacked(packed["marks"], 1)
        assert ((marks % 3 == 2) == look.accepted).all() and packed["tar"] == pytest.approx(
            look.tar, abs=1e-6
        )
    flips = [(one["won"], one["lost"]) for one in data["looks"]]
    before, after = looks.looks[1].accepted, looks.looks[2].accepted
    assert flips[0] == (0, 0) and flips[2] == (int((after & ~before).sum()), int((before & ~after).sum()))


def unpacked(text: str, size: int) -> Any:
    planes = np.frombuffer(gzip.decompress(base64.b64decode(text)), np.uint8).reshape(size, -1)
    return np.ascontiguousarray(planes.T).reshape(-1)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "<img src=x onerror=alert(1)>", texts=2, words=HOSTILE)
    answers = [
        {"prompt": word, "teacher": word * 2, "before": word, "after": "x" * 1_000_000} for word in HOSTILE
    ]
    run.joinpath("texts.json").write_text(json.dumps({"texts": answers}), "utf-8")
    run.joinpath("eval.json").write_text(
        json.dumps(
            {
                "rows": [
                    {
                        "model": HOSTILE[0],
                        "task": HOSTILE[1],
                        "metric": HOSTILE[4],
                        "value": 1,
                        "low": 0,
                        "high": 1,
                        "n": 2,
                    }
                ],
                "comparisons": [],
            }
        ),
        "utf-8",
    )
    written = write_report(run)
    content = written.read_text("utf-8")
    page = Parsed(content)
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert not {"img", "iframe", "object", "embed", "form", "base", "a"} & {tag for tag, _ in page.elements}
    assert all(not name.startswith("on") for _, attributes in page.elements for name in attributes)
    for letter in "\u202e\x1b\x00\x07":
        assert letter not in content
    said = page.all_text()
    for word in ("\\u202eright", "\\x1b[31mred", "{{7*7}}", "javascript:window.hacked=1", "a\\x00b"):
        assert word in said, word
    assert written.stat().st_size < 1_000_000 and "more characters" in said


@pytest.mark.parametrize(
    ("texts", "tokens", "looks", "kept"),
    [(100, 250, (0, 7, 14, 20), 4), (200, 500, (0, 7, 14, 20), 4), (16, 500, range(200), 156)],
    ids=["25,000 four times", "100,000 four times", "8,000 200 times"],
)  # fmt: skip
def test_a_page_is_below_5_megabytes_however_many_tokens_and_measurements(
    texts: int, tokens: int, looks: Sequence[int], kept: int, tmp_path: Path
) -> None:
    words = [
        f" w{number}" for number in range(3000)
    ]  # a space and five letters, longer than tokens of real text
    run = write_run(tmp_path / "large", texts=texts, tokens=tokens, looks=looks, words=words)
    written = write_report(run)
    assert written.stat().st_size < 5_000_000
    packed = json.loads(Parsed(written.read_text("utf-8")).text["script"][0])["looks"]
    steps = [one["step"] for one in packed]
    assert (steps[0], steps[-1], len(steps)) == (looks[0], looks[-1], kept)
    numbers = [one["step"] for one in packed if "floats" in one]
    assert looks[-1] in numbers and (len(numbers) == kept or texts * tokens > 90_000 or looks[0] in numbers)
    assert all("marks" in one for one in packed)


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / one / "run") for one in "ab"]
    said = " ".join(parsed(*runs, out=tmp_path / "both.html").all_text().split())
    assert "b/run minus a/run" in said
    said = " ".join(parsed(runs[0], runs[0], out=tmp_path / "both.html").all_text().split())
    assert "run (2) minus run" in said


def test_two_runs_are_compared_with_paired_intervals_and_the_keys_that_differ(
    run: Path, tmp_path: Path
) -> None:
    other = write_run(tmp_path / "other")
    for path in (other / "probe").glob("step-*"):  # as the first, but for the last step
        path.write_bytes((run / "probe" / path.name).read_bytes())
    (other / "probe" / "step-0000020.safetensors").write_bytes(
        (run / "probe" / "step-0000000.safetensors").read_bytes()
    )
    page = parsed(run, other, out=tmp_path / "both.html")
    said = " ".join(page.all_text().split())
    first = read_run(run).looks
    assert first is not None
    changed = int((first.first.accepted != first.last.accepted).sum())
    assert re.search(rf"other minus first .*\[.*\] {changed} ", said)
    assert "What differs" in said and said.count("better") >= 6
    broken = write_run(tmp_path / "broken", finished=False)
    said = " ".join(parsed(run, broken, out=tmp_path / "both.html").all_text().split())
    said = said[said.index("What differs") : said.index("Curves")]
    assert "teacher.model" not in said, "a recipe is the same whether its run came to an end or not"


def test_a_run_that_broke_off_says_so_and_what_is_damaged_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "broken", finished=False, looks=(0, 10))
    (run / "checkpoints" / "step-00000012").mkdir(parents=True)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "lo')
    said = parsed(run).all_text()
    assert "broke off at step 20 of 20" in said and "newest checkpoint is of step 12" in said
    (run / "probe" / "step-0000010.safetensors").write_bytes(b"cut short")
    (run / "manifest.json").write_text("{")
    (run / "other.json").write_text('{"some": "thing"}')
    (run / "stopped.json").write_text(json.dumps({"error": "loss nan", "exit_code": 6}))
    said = parsed(run).all_text()
    for each in (
        "is damaged",
        "manifest.json: JSONDecodeError",
        "not understood: other.json",
        "failed at step 20 of 20: loss nan",
        "noted nothing of single tokens",
    ):
        assert each in said, each
    (run / "metrics.jsonl").write_text("")
    assert "How close the student is to its teacher was not measured" in parsed(run).all_text()


def test_the_gate_is_judged_by_its_control_alone(run: Path, tmp_path: Path) -> None:
    rows = [
        {"selection": kind, "held_out_kl": kl, "method": "kd", "seed": 1}
        for kind, kl in (("selected", 1.2), ("matched_random", 1.0))
    ]
    compared = tmp_path / "compare.json"
    compared.write_text(json.dumps(rows))
    said = parsed(run, out=tmp_path / "a.html", extra=[compared]).all_text()
    assert "was worse than random rows at its rate (KL +0.200): turn it off" in said
    compared.write_text(json.dumps([{**row, "held_out_kl": 2.2 - row["held_out_kl"]} for row in rows]))
    assert "better than random rows" in parsed(run, out=tmp_path / "a.html", extra=[compared]).all_text()


def test_report_verb_writes_the_page_and_refuses_a_folder_that_is_no_run(
    run: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "page.html"
    assert main(["report", str(run), "--out", str(out)]) == 0 and out.is_file()
    assert f"report: {out}" in capsys.readouterr().out
    assert main(["report", str(tmp_path)]) == 2 and "is no run folder" in capsys.readouterr().err
    assert main(["report", str(run), "--results", str(tmp_path / "none.json")]) == 3


def test_a_heat_map_for_a_readme_is_one_svg_with_every_token_of_its_text(
    run: Path, tmp_path: Path, capsys: Any
) -> None:
    from xml.etree import ElementTree

    out = tmp_path / "heat.svg"
    assert main(["report", str(run), "--heatmap-svg", str(out), "--text", "2"]) == 0
    tree = ElementTree.fromstring(out.read_text("utf-8"))
    drawn = [one for one in tree.iter() if one.tag.endswith("rect")]
    looks = read_run(run).looks
    assert looks is not None
    here = looks.last["sample"] == 1
    rejected = [int((~look.accepted[here]).sum()) for look in (looks.first, looks.last)]
    kinds = [one.get("class") for one in drawn]
    # the page, a sample of each colour in the legend, and of each look 40 tokens
    assert kinds.count("a") + kinds.count("r") == 80 + 2 and kinds.count("under") == sum(rejected) + 1
    said = "".join(tree.itertext())
    assert f"accepts {40 - rejected[1]} of 40 tokens" in said and "after 20 steps" in said
    assert not [
        one for one in tree.iter() if any(name.startswith("on") or "href" in name for name in one.attrib)
    ]
    assert main(["report", str(run), "--heatmap-svg", str(out), "--text", "9"]) == 2
    assert "texts 1 to 6" in capsys.readouterr().err
