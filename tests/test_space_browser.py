"""The web demo in a real browser."""

import io
import shutil
import zipfile
from base64 import b64decode

import numpy as np
import pytest
from PIL import Image
from space_server import PATIENCE, SPACE

from unconceal.__main__ import main


sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
pytest.importorskip("gradio", reason="the demo needs the extra `space`")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytest_plugins = "space_server"  # has the fixtures `models` and `server`
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
]

EXAMPLE = SPACE / "examples" / "camouflage-1.jpg"
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
OPTIONS.append("--enable-blink-features=ComputedAccessibilityInfo")  # `computedName` of elements
# Contrast of every visible text with its background. Text over images and of disabled elements is left out.
LOW_CONTRAST = """() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    if (!text || !element.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    if (element.closest("script, style, [disabled], label:has(:disabled), b")) continue;
    const box = element.getBoundingClientRect();
    if (!box.width || !box.height) continue;
    let behind = [255, 255, 255];
    for (let at = element; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color.length < 4 || color[3] > 0.99) { behind = color; break; }
    }
    const [a, b] = [light(parse(getComputedStyle(element).color)), light(behind)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.push(`${text.slice(0, 40)}: ${ratio.toFixed(2)}`);
  }
  return [...new Set(found)];
}"""
CONTROLS = "button, input, select, textarea, a[href], [role=slider], [tabindex='0']"
UNNAMED = """(controls) => [...document.querySelectorAll(controls)]
  .filter((e) => e.checkVisibility({ visibilityProperty: true }) && e.type !== "file" && e.ariaHidden !== "true")
  .filter((e) => !e.computedName && !e.placeholder).map((e) => e.outerHTML.slice(0, 200))"""


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, server):
    """Open the page at a query and a size. Any error in the page fails the test."""
    pages, errors = [], []

    def open_page(query="", width=1440, height=1000):
        page = browser.new_page(viewport={"width": width, "height": height}, reduced_motion="reduce")
        page.set_default_timeout(1000 * PATIENCE)
        page.on("pageerror", lambda error: errors.append(str(error)))
        pages.append(page)
        page.goto(f"{server.url}/{query}")
        page.wait_for_selector(".uc")
        page.wait_for_function("document.querySelectorAll('.uc-examples img').length > 3")
        return page

    yield open_page
    for page in pages:
        page.close()
    assert errors == []


def upload(page, path):
    page.locator("#image input[type=file]").set_input_files(path)


def wait_for(page, state):
    page.wait_for_selector(f'.uc[data-state="{state}"]')


def choose(page, view):
    page.locator(".uc-views label", has_text=view).click()
    if view == "Unfold":
        page.wait_for_selector(".uc-maps[data-ready]")


def drawn(page, canvas=".uc-drawn") -> np.ndarray:
    """Return what a canvas shows, (H, W, 4)."""
    address = page.locator(canvas).evaluate("canvas => canvas.toDataURL('image/png')")
    return pixels(b64decode(address.partition(",")[2]), "RGBA")


def pixels(content: bytes, mode=None) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert(mode))


def download(page, button) -> tuple[str, bytes]:
    with page.expect_download() as started:
        page.locator(button).click()
    return started.value.suggested_filename, started.value.path().read_bytes()


def test_one_image(open_page, models, tmp_path):
    segment = ["segment", str(EXAMPLE), "--model", str(models / "run"), "--output", "mask", "cutout"]
    assert not main([*segment, "--out", str(tmp_path), "--device", "cpu"])
    mask, cut = (np.asarray(Image.open(tmp_path / f"camouflage-1{end}.png")) for end in ("", "_cutout"))

    page = open_page()
    assert page.locator("#mask").is_disabled()
    upload(page, EXAMPLE)
    wait_for(page, "result")
    facts = page.locator(".uc-facts").inner_text()
    for words in ("640 × 480 px", "s on cpu", "RUN", f"{100 * (mask > 127).mean():.1f}% of the image"):
        assert words in facts

    # Left of the line is the photo, right of it the result.
    at_start = drawn(page)
    photo = np.asarray(Image.open(EXAMPLE).convert("RGB")).astype(int)
    line = at_start.shape[1] // 2
    assert np.abs(at_start[:, : line - 1, :3] - photo[:, : line - 1]).mean() < 4  # JPEG again, of high quality
    share = mask[..., None] / 255
    dark = 0.26 * (photo @ (0.299, 0.587, 0.114))[..., None] + 0.74 * np.array([18, 22, 21])
    revealed = share * photo + (1 - share) * dark
    assert np.abs(at_start[..., :3] - revealed)[:, line + 1 :].mean() < 4
    assert np.abs(at_start[..., :3] - photo)[:, line + 1 :].mean() > 8
    page.locator(".uc-split").focus()
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    assert (drawn(page)[:, line + 2 : line + 30] != at_start[:, line + 2 : line + 30]).any()

    choose(page, "Mask")
    np.testing.assert_array_equal(drawn(page)[..., 0], mask)
    page.locator(".uc-threshold").fill("50")
    np.testing.assert_array_equal(drawn(page)[..., 0], np.where(mask > 127, 255, 0))

    choose(page, "Overlay")
    page.locator(".uc-strength").fill("100")
    page.locator(".uc-color").fill("#00ff00")
    tinted = drawn(page)[..., :3]
    assert (tinted[mask > 127] == (0, 255, 0)).all()
    assert np.abs(tinted[mask <= 127] - photo[mask <= 127]).mean() < 4
    page.locator(".uc-threshold").fill("0")

    choose(page, "Cut-out")
    np.testing.assert_array_equal(drawn(page)[..., 3], mask)
    for button, kind, expected in (("#mask", "mask", mask), ("#ask-cutout", "cutout", cut)):
        name, content = download(page, button)
        assert name == f"camouflage-1_{kind}.png"
        np.testing.assert_array_equal(pixels(content), expected)

    choose(page, "Boxes")
    assert page.locator(".uc-boxes li").count() > 0
    assert drawn(page, ".uc-ink")[..., 3].any()


def test_unfolding(open_page):
    page = open_page()
    page.locator(".uc-examples button").first.click()
    wait_for(page, "result")
    choose(page, "Unfold")
    maps = page.locator(".uc-maps img")
    stage, last = page.locator(".uc-stage"), int(page.locator(".uc-stage").get_attribute("max"))

    def shown():
        return [maps.nth(index).get_attribute("src") for index in range(maps.count())]

    assert page.locator(".uc-controls").inner_text().split()[-3:] == [str(last), "of", str(last)]
    seen = [shown()]
    stage.focus()
    for k in reversed(range(last)):
        page.keyboard.press("ArrowLeft")
        assert stage.input_value() == str(k)
        seen.append(shown())
    for one, other in zip(seen, seen[1:], strict=False):
        assert one[0] != other[0], "the mask did not change between stages"
        assert one[3] != other[3], "uncertainty did not change between stages"
    assert not page.locator('[data-map="edge"] img').is_visible(), "the coarse start has no edge"
    page.locator(".uc-play").click()
    page.wait_for_function(f"document.querySelector('.uc-stage').value === '{last}'")

    # A network without stages shows another view.
    page.locator("#network label", has_text="Lesion").click()
    page.wait_for_function("document.querySelector('.uc-facts').innerText.includes('SRS')")
    assert page.locator('.uc-views input[value="unfold"]').is_disabled()
    assert page.locator(".uc").get_attribute("data-view") != "unfold"


def test_play_retries_an_unfolding_that_failed(open_page, server):
    page = open_page()
    upload(page, EXAMPLE)
    wait_for(page, "result")
    kept = {path: path.read_bytes() for path in server.files()}
    for path in kept:
        path.unlink()
    page.locator(".uc-views label", has_text="Unfold").click()
    page.wait_for_function("document.querySelector('.uc-waiting').innerText.includes('was deleted')")
    page.locator(".uc-play").click()  # the same error again
    page.wait_for_function("document.querySelector('.uc-waiting').innerText.includes('was deleted')")
    for path, content in kept.items():
        path.write_bytes(content)
    page.locator(".uc-play").click()
    page.wait_for_selector(".uc-maps[data-ready]")
    page.locator("[data-map=mask] img").evaluate("image => image.removeAttribute('src')")
    page.locator("#run").click()  # the same stages again
    page.wait_for_selector("[data-map=mask] img[src]", state="attached")


def test_what_cannot_be_opened_says_why(open_page, server, tmp_path):
    page = open_page(f"?network=lesion&url={server.url}/a.png")

    def reads(words):
        page.wait_for_function("words => document.querySelector('.uc-reason').innerText.includes(words)", arg=words)
        assert page.locator("#mask").is_disabled()

    reads("not on the open internet")
    assert page.locator("#network input:checked").get_attribute("value") == "lesion"
    page.locator("#address input").fill("file:///etc/passwd")
    page.locator("#address button").click()
    reads("must begin with http")
    (tmp_path / "notes.png").write_text("<b>not an image</b>")
    upload(page, tmp_path / "notes.png")
    reads("This file is not an image")
    upload(page, EXAMPLE)
    wait_for(page, "result")
    page.locator("#image button[aria-label*='Remove'], #image button[aria-label='Clear']").first.click()
    wait_for(page, "empty")
    assert page.locator("#mask").is_disabled()


def test_many_images(open_page, tmp_path):
    (tmp_path / "notes.png").write_text("not an image")
    page = open_page()
    page.get_by_role("tab", name="Many images").click()
    files = [*sorted((SPACE / "examples").glob("infrared-*")), tmp_path / "notes.png"]
    page.locator("#images input[type=file]").set_input_files(files)
    page.wait_for_function("document.querySelectorAll('#images .file').length === 3")
    page.get_by_label("Cut-outs").check()
    page.locator("#run-batch").click()
    _, content = download(page, "#archive a")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        expected = {f"infrared-{n}_{kind}.png" for n in (1, 2) for kind in ("mask", "cutout")}
        assert set(archive.namelist()) == {*expected, "report.csv"}
    report = page.locator("#report").inner_text()
    assert report.count("done") == 2
    assert "This file is not an image" in report


@pytest.mark.parametrize(("width", "height", "theme"), [(390, 844, "dark"), (1440, 1000, "light")])
def test_looks(open_page, width, height, theme):
    page = open_page(f"?__theme={theme}", width, height)
    assert page.evaluate("document.body.classList.contains('dark')") == (theme == "dark")

    def place():
        return page.locator("#downloads").bounding_box()["y"] + page.evaluate("scrollY")

    # The page moves while it builds itself up.
    seen = [place()]
    while len(seen) < 3 or len(set(seen[-3:])) > 1:
        page.wait_for_timeout(300)
        seen.append(place())
    for state in ("empty", "Unfold", "Boxes", "Reveal"):
        if state == "Unfold":
            page.locator(".uc-examples button").first.click()
            wait_for(page, "result")
        if state != "empty":
            choose(page, state)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "wider than the screen"
        assert page.evaluate(LOW_CONTRAST) == []
        assert page.evaluate(UNNAMED, CONTROLS) == []
        assert abs(place() - seen[-1]) <= 2, f"the buttons below the viewer moved: {state}"


def test_everything_is_reached_by_keyboard(open_page):
    page = open_page()
    page.locator("#network input").first.focus()
    reached = ""

    def tab() -> bool:
        nonlocal reached
        page.keyboard.press("Tab")
        reached += page.evaluate("(e => e.className + ' ' + e.id + ' ' + (e.name || ''))(document.activeElement)")
        return page.evaluate("document.activeElement.closest('.uc-examples') !== null")

    assert any(tab() for _ in range(40)), "no example can be reached"
    page.keyboard.press("Enter")
    wait_for(page, "result")
    for _ in range(40):
        tab()
    for name in ("uc-view", "uc-split", "run", "mask", "ask-cutout"):
        assert name in reached, f"{name} cannot be reached"
