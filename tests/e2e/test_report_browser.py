"""The report in a real browser: it fetches nothing, fits the screen, reads well in light and dark."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from report_fixtures import HOSTILE, make_run
from stillhouse.report import write_report

pytestmark = pytest.mark.browser

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
CONTRAST = """(selector) => [...document.querySelectorAll(selector)]
  .filter(e => e.getClientRects().length && e.textContent.trim())
  .map(e => {
    let ground = e, color = "rgba(0, 0, 0, 0)";
    while (ground && color === "rgba(0, 0, 0, 0)") {
      color = getComputedStyle(ground).backgroundColor; ground = ground.parentElement;
    }
    return [getComputedStyle(e).color, color, e.textContent.trim().slice(0, 40)];
  })"""


def find_chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if found := shutil.which(name):
            return found
    pytest.fail("no Chromium on PATH: install one (apt-get install chromium) to test the report in a browser")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=find_chromium(), args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(make_run(tmp_path_factory.mktemp("runs")))


@contextmanager
def opened(browser: Any, report: Path, *, scheme: str = "light", width: int = 1280, **options: Any) -> Iterator[Any]:
    """The report in a fresh context; on leaving, it must have complained of nothing and fetched only itself."""
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900}, **options)
    page = context.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(report.as_uri())
    yield page
    assert complaints == []
    assert [url for url in requests if url != report.as_uri() and not url.startswith("data:")] == []
    context.close()


def luminance(color: str) -> float:
    red, green, blue = (int(part) / 255 for part in re.findall(r"\d+", color)[:3])
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def worst_contrast(page: Any, selector: str) -> tuple[float, str]:
    found = []
    for text, ground, sample in page.evaluate(CONTRAST, selector):
        high, low = sorted((luminance(text), luminance(ground)), reverse=True)
        found.append(((high + 0.05) / (low + 0.05), sample))
    assert found, f"nothing visible matches {selector}"
    return min(found)


def is_dark(page: Any) -> bool:
    return luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) < 0.2


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390), ("dark", 390)])
def test_the_page_fits_and_reads(browser: Any, report: Path, scheme: str, width: int) -> None:
    with opened(browser, report, scheme=scheme, width=width) as page:
        assert is_dark(page) == (scheme == "dark")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        boxes = page.evaluate(
            "[...document.querySelectorAll('svg.plot')]"
            ".map(e => e.getBoundingClientRect()).map(b => [b.width, b.height])"
        )
        assert len(boxes) > 15
        assert all(250 < across <= width and down > 60 for across, down in boxes)
        sizes = page.evaluate(
            "[...document.querySelectorAll('svg.plot text')].map(e => e.getBoundingClientRect().height)"
        )
        assert min(sizes) > 9  # CSS pixels: a line of text one can read
        for selector in ("p, dd, dt, h1, h2, h3, h4, pre, summary, a", "th, td, td strong, .keys li"):
            contrast, sample = worst_contrast(page, selector)
            assert contrast >= 4.5, f"{sample!r} has a contrast of {contrast:.2f}"
        fills = set(page.evaluate("[...document.querySelectorAll('svg.plot text')].map(e => getComputedStyle(e).fill)"))
        ground = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        for fill in fills:
            high, low = sorted((luminance(fill), ground), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5


def test_the_toggle_switches_and_switches_back(browser: Any, report: Path) -> None:
    for scheme in ("light", "dark"):
        with opened(browser, report, scheme=scheme) as page:
            before = is_dark(page)
            assert page.inner_text("#theme") == ("Light" if before else "Dark")
            page.click("#theme")
            assert is_dark(page) != before
            assert page.inner_text("#theme") == ("Dark" if before else "Light")
            page.click("#theme")
            assert is_dark(page) == before


def test_the_page_is_whole_without_scripts(browser: Any, report: Path) -> None:
    with opened(browser, report, java_script_enabled=False) as page:
        assert not page.is_visible("#theme")
        assert page.is_visible("text=Held-out text")
        page.locator("#training figure summary").first.click()
        assert page.locator("#training figure table").first.is_visible()


def test_text_comes_through_exactly(browser: Any, report: Path) -> None:
    with opened(browser, report) as page:
        outputs = page.evaluate("[...document.querySelectorAll('.outputs pre')].map(e => e.textContent)")
        assert outputs[1] == "\n    if not line:\n        return None\n    return line.split(':')"
        assert outputs[3] == HOSTILE
        assert page.evaluate("getComputedStyle(document.querySelector('.outputs pre')).whiteSpace") == "pre-wrap"


def test_wide_tables_scroll_inside_their_box(browser: Any, report: Path) -> None:
    with opened(browser, report, width=390) as page:
        inner, outer = page.evaluate(
            "(e => [e.scrollWidth, e.clientWidth])(document.querySelector('#configuration .scroll'))"
        )
        assert inner > outer


def test_print_is_dark_on_light(browser: Any, report: Path) -> None:
    with opened(browser, report, scheme="dark") as page:
        page.emulate_media(media="print", color_scheme="dark")
        assert not is_dark(page)
        assert not page.is_visible("#theme")


@pytest.mark.parametrize(("status", "words"), [("running", "Unfinished"), ("failed", "This run failed")])
def test_runs_that_did_not_finish(browser: Any, tmp_path: Path, status: str, words: str) -> None:
    error = f"RuntimeError: {HOSTILE}" if status == "failed" else None
    with opened(browser, write_report(make_run(tmp_path, status=status, error=error)), width=390) as page:
        assert words in page.inner_text(".state")
        assert page.locator(".state").bounding_box()["y"] < 900
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert worst_contrast(page, ".state p, .state pre")[0] >= 4.5


def test_pictures_are_shown_and_their_scripts_are_not_run(browser: Any, report: Path) -> None:
    with opened(browser, report) as page:
        sizes = page.eval_on_selector_all("#pictures img", "images => images.map(i => i.naturalWidth)")
        assert sizes == [40]
        assert "owned" not in page.title()
        assert "picture & co" in page.locator("#pictures figcaption").inner_text()
