"""Pictures of a report in headless Chromium: 1280 and 390 pixels wide, light and dark, without JavaScript, and as PDF.

    python benchmarks/report_screenshots.py RUN/report.html FOLDER

Needs Playwright from PyPI and a Chromium, which Debian has as a package: `apt install chromium`. Prints the seconds
until the page was there, the requests it made, and the messages on its console.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

WIDTHS = (1280, 390)
TALLEST = 16_000


def chromium() -> str | None:
    """The path of a Chromium or Chrome, or None."""
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))),
        None,
    )


def pictures(browser: Browser, page: Path, folder: Path) -> list[dict[str, object]]:
    """A picture for each width and scheme, one without JavaScript, one PDF; what each page load took and did."""
    found = []
    for width in WIDTHS:
        for scheme in ("light", "dark"):
            context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
            tab = context.new_page()
            requests: list[str] = []
            messages: list[str] = []
            tab.on("request", lambda one, seen=requests: seen.append(one.url))
            tab.on("console", lambda one, seen=messages: seen.append(one.text))
            tab.on("pageerror", lambda one, seen=messages: seen.append(str(one)))
            started = time.perf_counter()
            tab.goto(page.absolute().as_uri(), wait_until="load")
            seconds = time.perf_counter() - started
            whole(tab, width, folder / f"{page.stem}-{width}-{scheme}.png")
            token = tab.locator(".tokens i").nth(20)
            if token.count():
                token.scroll_into_view_if_needed()
                token.click()
                tab.wait_for_selector("#tip:not([hidden])")
                tab.screenshot(path=folder / f"{page.stem}-{width}-{scheme}-token.png")
            beyond = tab.evaluate(
                "document.documentElement.scrollWidth > document.documentElement.clientWidth"
            )
            found.append(
                {
                    "width": width, "scheme": scheme, "seconds": round(seconds, 2), "requests": len(requests) - 1,
                    "messages": messages, "wider_than_screen": beyond,
                }
            )  # fmt: skip
            if width == WIDTHS[0] and scheme == "light":
                tab.pdf(path=folder / f"{page.stem}.pdf", format="A4")
            context.close()
    context = browser.new_context(java_script_enabled=False, viewport={"width": WIDTHS[0], "height": 900})
    tab = context.new_page()
    tab.goto(page.absolute().as_uri())
    whole(tab, WIDTHS[0], folder / f"{page.stem}-no-script.png")
    context.close()
    return found


def whole(tab: Page, width: int, path: Path) -> None:
    """A picture of the whole page, in a window as high as it is: what is out of sight is not drawn."""
    for _ in range(2):  # the height is known once all of it has been in sight
        height = tab.evaluate("document.documentElement.scrollHeight") if tab.url else 900
        tab.set_viewport_size({"width": width, "height": min(height, TALLEST)})
        tab.wait_for_timeout(150)
    height = min(tab.evaluate("Math.ceil(document.body.getBoundingClientRect().height)"), TALLEST)
    tab.screenshot(path=path, clip={"x": 0, "y": 0, "width": width, "height": height})
    tab.set_viewport_size({"width": width, "height": 900})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    path = chromium()
    if path is None:
        raise SystemExit("no Chromium was found. Install one: apt install chromium.")
    given.folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for one in pictures(browser, given.page, given.folder):
            print(json.dumps(one))
        browser.close()


if __name__ == "__main__":
    main()
