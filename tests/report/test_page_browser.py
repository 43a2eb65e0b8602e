"""The page in a real browser: nothing is loaded, nothing complains, nothing sticks out."""

import pytest

from hotloop.report import render_page
from support import chromium
from support import report_samples as samples
from support.chromium import OUTSIDE, TEXTS, luminance

pytestmark = pytest.mark.skipif(
    chromium.find() is None, reason="no Chromium on this machine (apt-get install chromium)"
)

SHOWN = "[...document.querySelectorAll('svg.%s')].filter(e => e.getClientRects().length).length"


@pytest.fixture(scope="module")
def browser():
    with chromium.Chromium(chromium.find()) as opened:
        yield opened


def hostile():
    """A report whose names are long and full of markup."""
    report = samples.full_report()
    report["model"] = "<script>document.title = 'broken'</script>" + "Wide" * 60
    report["notes"] = ["<img src=//example.invalid/x.png onerror=alert(1)>", "y" * 3000]
    report["operations"][0]["kernel"] = "k" * 300
    report["optimizations"][0]["change"]["command"] = "run " + "z" * 400
    report["checkpoint"] = "/" + "path" * 100
    return report


def pages():
    large = samples.machine(sockets=2, cores=32, smt=2)
    return {
        "full": render_page(samples.full_report()),
        "older": render_page(samples.report()),
        "empty": render_page({}),
        "hostile": render_page(hostile()),
        "large machine": render_page(samples.full_report(), large),
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    written = {}
    for at, (name, text) in enumerate(pages().items()):
        written[name] = folder / f"{at}.html"
        written[name].write_text(text, encoding="utf-8")
    return written


@pytest.mark.parametrize("name", ["full", "older", "empty", "hostile", "large machine"])
def test_the_page_loads_alone_and_fits(browser, files, name):
    for width in (360, 1280):
        browser.open(files[name], width=width)
        assert browser.requests() == [files[name].resolve().as_uri()]
        assert browser.complaints() == []
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.evaluate(OUTSIDE) == []
    assert browser.evaluate("document.title") != "broken"
    assert browser.evaluate("document.scripts.length") == 0


def test_scripts_and_pictures_would_be_refused(browser, tmp_path):
    # What the test above looks for does show: a page with both, under the same policy.
    page = render_page(samples.report())
    bad = "<script>document.title = 'broken'</script><img src='http://127.0.0.1:9/x.png'></body>"
    path = tmp_path / "bad.html"
    path.write_text(page.replace("</body>", bad), encoding="utf-8")
    browser.open(path, width=800)
    assert browser.evaluate("document.title") == "DigitNet: hotloop report"
    assert any("Content Security Policy" in text for text in browser.complaints())
    # An attempt is seen by the test above, whether or not the policy stopped it, as it did here.
    assert any("x.png" in url for url in browser.requests())
    failed = [e["params"] for e in browser.events if e.get("method") == "Network.loadingFailed"]
    assert [f.get("blockedReason") for f in failed] == ["csp"]


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_text_can_be_read(browser, files, dark, width):
    browser.open(files["full"], width=width, dark=dark)
    texts = browser.evaluate(TEXTS)
    assert len(texts) > 300
    behinds = set()
    for text, colour, behind, size in texts:
        behinds.add(behind)
        low, high = sorted([luminance(colour), luminance(behind)])
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, colour, behind)
        assert size >= 12, text
    assert all((luminance(behind) < 0.1) == dark for behind in behinds)


def test_one_drawing_of_each_chart_is_shown(browser, files):
    browser.open(files["full"], width=1280)
    assert (browser.evaluate(SHOWN % "wide"), browser.evaluate(SHOWN % "narrow")) == (1, 0)
    browser.open(files["full"], width=360)
    assert (browser.evaluate(SHOWN % "wide"), browser.evaluate(SHOWN % "narrow")) == (0, 1)


def test_letters_of_drawings_do_not_shrink_below_reading(browser, files):
    smallest = """
    Math.min(...[...document.querySelectorAll('svg.chart text')]
      .filter(e => e.getClientRects().length)
      .map(e => parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a / Math.cos(
        Math.atan2(e.getScreenCTM().b, e.getScreenCTM().a))))
    """
    for width in (360, 500, 720, 1000, 1280):
        browser.open(files["full"], width=width)
        assert browser.evaluate(smallest) >= 10, width


def test_paper_is_white_and_shows_all(browser, files):
    browser.open(files["full"], width=1280, dark=True)
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.send("Emulation.setEmulatedMedia", media="print", features=features)
    try:
        colour = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert colour == "rgb(255, 255, 255)"
        assert browser.evaluate(SHOWN % "wide") == 1
        pdf = browser.send("Page.printToPDF", printBackground=True)["data"]
        assert len(pdf) > 10_000
    finally:
        browser.send("Emulation.setEmulatedMedia", media="")
