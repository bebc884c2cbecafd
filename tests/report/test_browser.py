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
