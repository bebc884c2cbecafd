"""The page in headless Chromium, where one is found: it asks for nothing, and its tokens answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from report.opened import Opened
from report.written_run import HOSTILE, write_run
from selectkd.report.page import write_report
from selectkd.report.run_files import read_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: Any) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "first")


def test_tokens_answer_to_pointer_keys_and_slider_with_the_numbers_of_the_look(
    browser: Any, run: Path
) -> None:
    page = Opened(browser, write_report(run))
    tab, looks = page.tab, read_run(run).looks
    assert looks is not None and page.quiet(), page.messages
    names = {
        "p_proposal": "p_proposal", "q_proposal": "q_proposal", "divergence": "divergence", "weight": "weight",
        "teacher_entropy": "teacher_entropy", "student_entropy": "student_entropy", "share": "share",
    }  # fmt: skip

    def shown() -> dict[str, str]:
        tab.wait_for_selector("#tip:not([hidden])")
        return tab.eval_on_selector_all(
            "#tip dd", "all => Object.fromEntries(all.map(d => [d.dataset.name, d.textContent]))"
        )

    def check(at: int, look: Any) -> None:
        found = shown()
        for name, column in names.items():
            value = float(look[column][at])
            said = found[name]
            assert (
                said == "< 0.0001" if 0 < value < 9.99e-5 else float(said) == pytest.approx(value, rel=6e-3)
            ), name
        assert found["rank"] == str(look["rank"][at])
        assert found["verdict"].startswith("accepted" if look.accepted[at] else "rejected")

    tab.locator(".tokens").nth(1).locator("i").nth(7).click()
    check(47, looks.last)
    tab.keyboard.press("Escape")
    tab.locator(".tokens").nth(0).focus()
    tab.keyboard.press("Home")
    check(0, looks.last)
    tab.keyboard.press("ArrowRight")
    check(1, looks.last)
    tab.keyboard.press("Shift+ArrowRight")
    rejected = int(np.flatnonzero(~looks.last.accepted[2:])[0]) + 2
    check(rejected, looks.last)
    tab.locator("#look").fill("0")
    tab.locator("#looked", has_text="step 0:").wait_for()
    check(rejected, looks.first)
    assert f"TAR {looks.first.tar:.3g}" in tab.locator("#looked").text_content()
    kinds = tab.eval_on_selector_all(".tokens i", r"all => all.map(one => /\br\d/.test(one.className))")
    assert kinds == (~looks.first.accepted).tolist()
    assert page.quiet()


def test_hostile_text_does_nothing_and_a_large_page_opens(browser: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "hostile", texts=2, words=HOSTILE)
    answers = [
        {"prompt": word, "teacher": word, "before": word, "after": "x" * 1_000_000} for word in HOSTILE
    ]
    run.joinpath("texts.json").write_text(json.dumps({"texts": answers}), "utf-8")
    page = Opened(browser, write_report(run), viewport={"width": 390, "height": 800})
    for at in range(0, 40, 7):
        page.tab.locator(".tokens i").nth(at).click(force=True)
    assert page.tab.evaluate("window.hacked") is None and page.quiet(), page.messages
    assert page.tab.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")

    words = [f" word{number}" for number in range(3000)]
    run = write_run(tmp_path / "large", texts=100, tokens=500, looks=(10, 20), words=words)
    large = Opened(browser, write_report(run))
    last = large.tab.locator(".tokens").nth(99)
    last.locator("i").nth(499).click()
    large.tab.wait_for_selector("#tip:not([hidden])")
    assert large.quiet(), large.messages


def test_a_page_without_scripts_shows_texts_before_and_after(browser: Any, run: Path) -> None:
    tab = Opened(browser, write_report(run), java_script_enabled=False).tab
    assert tab.locator("noscript .tokens").count() == 6 and tab.locator("#heat .tokens").count() == 6
    assert tab.locator(".nojs").first.is_visible() and not tab.locator(".control").is_visible()


def test_numbers_that_were_left_out_are_named_and_verdicts_stay(browser: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "large", texts=200, tokens=500)
    page = Opened(browser, write_report(run))
    tab, looks = page.tab, read_run(run).looks
    assert looks is not None
    token = tab.locator(".tokens").nth(0).locator("i").nth(3)
    token.click()
    tab.wait_for_selector("#tip dd[data-name=divergence]")
    tab.locator("#look").fill("1")
    tab.locator("#tip", has_text="were left out").wait_for()
    assert tab.locator("#tip dd").count() == 1
    kinds = tab.eval_on_selector_all(".tokens i", r"all => all.map(one => /\br\d/.test(one.className))")
    assert kinds == (~looks.looks[1].accepted).tolist() and page.quiet(), page.messages


SPLIT = """() => [...document.querySelectorAll("table:is(.numbers, .matrix) :is(th, td)")].filter((cell) => {
  if (/[\\s-]/.test(cell.textContent.trim())) return false;
  const range = document.createRange();
  range.selectNodeContents(cell);
  return new Set([...range.getClientRects()].map((one) => Math.round(one.x < 0 ? 0 : one.y))).size > 1;
}).map((cell) => cell.textContent)"""


@pytest.mark.parametrize("width", [1280, 390])
def test_no_word_or_number_of_a_table_is_broken(width: int, browser: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "second")
    gates = ["greedy_topk", "sigmoid_entropy_gap", *(f"matched_{i}" for i in range(19))]
    one = {"rate": 0.5, "loss_removed": 0.00632, "gradient_removed": 0.00274}
    jaccard = {name: dict.fromkeys(gates, 0.046) for name in gates}
    results = {
        "panel": {"gates": dict.fromkeys(gates, one), "jaccard": jaccard, "n": 2537},
        "eval": {
            "rows": [
                {
                    "model": "runs/second", "task": "own", "metric": "perplexity",
                    "value": 8.9, "low": 7.9, "high": 10.0, "n": 24,
                }
            ],
            "comparisons": [],
        },
        "speculate": {
            "rows": [
                {"draft": "runs/second", "temperature": 1.0, "draft_length": n, "acceptance_by_position": [0.9] * n}
                for n in (2, 4)
            ],
            "acceptance_by_position": None,
        },
    }  # fmt: skip
    for name, content in results.items():
        run.joinpath(f"{name}.json").write_text(json.dumps(content), "utf-8")
    page = Opened(browser, write_report(run), viewport={"width": width, "height": 900})
    assert page.tab.locator("table.matrix td").count() > 400
    assert page.tab.evaluate(SPLIT) == []
    assert page.tab.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    legend = page.tab.locator("figure", has_text="Draft tokens").locator(".key li").all_inner_texts()
    assert len(set(legend)) == len(legend) == 2, "lines of one draft are told apart"


def test_what_is_folded_is_printed(browser: Any, run: Path) -> None:
    tab = Opened(browser, write_report(run)).tab
    assert tab.locator("details[open]").count() == 0
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert tab.locator("details:not([open])").count() == 0
    tab.evaluate("dispatchEvent(new Event('afterprint'))")
    assert tab.locator("details[open]").count() == 0


def test_a_token_low_on_a_phone_is_not_under_its_own_numbers(browser: Any, run: Path) -> None:
    tab = Opened(browser, write_report(run), viewport={"width": 390, "height": 700}).tab
    token = tab.locator(".tokens").nth(2).locator("i").nth(5)
    token.evaluate("one => scrollTo(0, one.getBoundingClientRect().bottom + scrollY - innerHeight + 20)")
    token.dispatch_event("click")
    tab.wait_for_selector("#tip:not([hidden])")
    foot = token.evaluate("one => one.getBoundingClientRect().bottom")
    assert foot <= tab.evaluate("document.getElementById('tip').getBoundingClientRect().top")


def test_an_answer_of_no_text_says_so(browser: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    one = {"prompt": "What is it?", "teacher": "A thing.", "before": "", "after": "A thing."}
    run.joinpath("answers.json").write_text(json.dumps({"texts": [one]}), "utf-8")
    tab = Opened(browser, write_report(run)).tab
    assert tab.locator(".answers .none").all_inner_texts() == ["no text: it ended at once"]
