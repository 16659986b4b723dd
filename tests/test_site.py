"""The committed report site in a browser without a network: whole, reached, read and moved."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import photographs, tokenizer_of

from workbook.paths import ROOT
from workbook.site.examples import examples, growing

REPORTS = ROOT / "reports"
INDEX = Path("index.html")
PAGES = sorted(path.relative_to(REPORTS) for path in (REPORTS / "pages").glob("*.html"))
# Reports of several variants and seeds come from one notebook, and are laid out alike.
LAYOUTS = list({page.stem.split("-")[0]: page for page in PAGES}.values())
RESULTS = Path("pages/02b_tokenizer_results.html")
API = Path("api/sitlib/model/tokenizer.html")
# One page of each kind for the checks that take long: a front page, results, a training run.
RESULT, TRAINING = "03c_sampling_speed", "02a_tokenizer_training-sit4-seed0"
KINDS = [INDEX, *(Path(f"pages/{name}.html") for name in (RESULT, TRAINING))]
BY_STEM = {"ids": lambda file: file.stem}


def is_near(url: str) -> bool:
    return url.startswith(("file:", "data:"))


@pytest.fixture
def open_page(browser):
    """Open a file of the site at a width and colour scheme; what goes wrong: `page.troubles`."""
    contexts = []

    def opened(file: Path, width: int = 1280, scheme: str = "light"):
        size = {"width": width, "height": 900}
        contexts.append(browser.new_context(viewport=size, color_scheme=scheme, offline=True))
        page = contexts[-1].new_page()
        page.troubles = troubles = []
        page.on("console", lambda said: said.type == "error" and troubles.append(said.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("requestfailed", lambda request: troubles.append(f"missing: {request.url[:200]}"))
        page.on("request", lambda one: is_near(one.url) or troubles.append(one.url))
        page.goto((REPORTS / file).as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()


# -- without a browser -------------------------------------------------------------------------


def test_the_site_is_small_and_has_a_page_for_every_report():
    assert sum(path.stat().st_size for path in REPORTS.rglob("*") if path.is_file()) < 30e6
    sources = [*REPORTS.glob("*.ipynb"), *(ROOT / "docs").glob("*.md")]
    assert {path.stem for path in PAGES} == {path.stem for path in sources}


def test_the_api_names_no_folder_of_a_machine():
    files = [path for path in (REPORTS / "api").rglob("*") if path.is_file()]
    named = [path for path in files if re.search(r"Path\((&#\w+;|')/", path.read_text())]
    assert files and not named


@pytest.mark.parametrize("file", [INDEX, *PAGES], **BY_STEM)
def test_outputs_are_shown_and_not_named(file):
    html = (REPORTS / file).read_text()
    assert "IPython.core.display" not in html and " object at 0x" not in html
    assert "()</td>" not in html and " nan" not in html


@pytest.mark.parametrize("file", [INDEX, *PAGES], **BY_STEM)
def test_every_link_leads_somewhere(file):
    """Files exist, and what a link names on its page or on another has that name."""
    html = (REPORTS / file).read_text()
    for url in set(re.findall(r'(?:href|src)="([^"]+)"', html)):
        if url.startswith(("https://", "data:")):
            continue
        name, _, anchor = url.partition("#")
        target = (REPORTS / file).parent / name if name else REPORTS / file
        assert target.exists(), url
        assert not anchor or f'id="{anchor}"' in target.read_text(), url


def test_examples_are_what_the_tokenizer_makes_of_the_photographs(weights_folder):
    tokenizer, views = tokenizer_of(), photographs(2)
    made = examples({"sit5_sc": tokenizer}, views, ["one", "two"])
    assert made["names"] == {"original": "the original", "sit5_sc": "SIT-SC-5"}

    def check(uri, image):
        content = base64.b64decode(uri.partition(",")[2])
        pixels = np.asarray(Image.open(io.BytesIO(content))).transpose(2, 0, 1) / 255
        assert np.allclose(pixels, image, atol=0.003)

    for photo, view in zip(made["photographs"], views, strict=True):
        again = tokenizer.reconstruct(view[None])[0].clamp(0, 1)
        check(photo["images"]["original"]["png"], view)
        check(photo["images"]["sit5_sc"]["png"], again)
        psnr = -10 * ((again - view) ** 2).mean().log10().item()
        assert photo["images"]["sit5_sc"]["psnr"] == pytest.approx(psnr, abs=1e-3)
        file, codes = growing(tokenizer, view), tokenizer.encode(view[None])
        check(file["original"], view)
        for k, step in enumerate(file["steps"], 1):
            partial = tokenizer.decode(codes, k)[0].clamp(0, 1)
            assert (step["scales"], step["size"]) == (k, partial.shape[-1])
            check(step["png"], partial)
        assert file["steps"][-1]["psnr"] == pytest.approx(psnr, abs=1e-3)
        ends = [step["bytes"] for step in file["steps"]]
        assert ends == sorted(set(ends)) and ends[-1] <= file["bytes"]


# -- in a browser ------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [INDEX, *LAYOUTS, API], **BY_STEM)
def test_a_page_is_whole_without_a_network_and_fits_a_phone(open_page, file):
    page = open_page(file, width=380)
    for answer in page.locator("details:has(summary:text-is('Answer'))").all():
        assert answer.locator("p").count() and not answer.locator("p").first.is_visible()
    page.evaluate(
        "document.querySelectorAll('details:not(.code)').forEach(one => { one.open = true; })"
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    images = page.evaluate(
        "[...document.images].map(i => [i.alt.trim().length, i.naturalWidth, i.complete])"
    )
    assert all(alt and width and complete for alt, width, complete in images)
    assert page.troubles == []


def violations(page) -> list[str]:
    """Rules of axe-core for WCAG 2.1 A and AA that a page breaks; the first are printed."""
    from axe_playwright_python.sync_playwright import Axe

    options = {"runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}}
    options["resultTypes"] = ["violations"]
    found = Axe().run(page, options=options).response["violations"]
    print(*((rule["id"], rule["nodes"][0]["html"][:200]) for rule in found), sep="\n")
    return [rule["id"] for rule in found]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("file", KINDS, **BY_STEM)  # pdoc's pages are pdoc's
def test_a_page_passes_the_checks_of_axe(open_page, file, scheme):
    """Contrast, names, roles, landmarks, with all code shown."""
    page = open_page(file, scheme=scheme)
    if (button := page.locator("button[data-code]")).count():
        button.click()
    assert violations(page) == []


def test_the_line_between_two_reconstructions_moves_by_mouse_and_keyboard(open_page):
    page = open_page(INDEX)
    box, slider = page.locator(".compare"), page.locator(".compare input")
    box.scroll_into_view_if_needed()
    place = box.bounding_box()
    page.mouse.move(place["x"] + place["width"] / 2, place["y"] + 100)
    page.mouse.down()
    page.mouse.move(place["x"] + place["width"] * 0.8, place["y"] + 120, steps=4)
    page.mouse.up()
    assert 75 <= float(slider.input_value()) <= 85
    line = box.locator(".line").bounding_box()
    assert 0.7 < (line["x"] - place["x"]) / place["width"] < 0.9
    slider.focus()
    before = float(slider.input_value())
    slider.press("ArrowLeft")
    assert float(slider.input_value()) == before - 1
    assert slider.get_attribute("aria-valuetext").startswith(f"{before - 1:.0f} % ViT-VQGAN")
    over = box.locator(".over")
    old = over.get_attribute("src")
    page.get_by_role("combobox", name="Left").select_option("original")
    assert over.get_attribute("src") != old and "original" in over.get_attribute("alt")
    said = page.locator("#compare [data-said]")
    first = said.text_content()
    page.locator("#compare input[type=radio]").first.focus()
    page.keyboard.press("ArrowRight")
    assert said.text_content() != first and "dB" in said.text_content()


def test_more_bytes_of_a_file_show_more_by_keyboard_and_mouse(open_page):
    page = open_page(INDEX)
    slider, image = page.locator("#file-end"), page.locator("#file [data-partial]")
    slider.focus()
    slider.press("Home")
    sides, sources = [], set()
    for _ in range(12):  # a tenth of the file each
        page.wait_for_function("document.querySelector('#file [data-partial]').complete")
        sides.append(image.evaluate("image => image.naturalWidth"))
        sources.add(image.get_attribute("src"))
        assert f"{sides[-1]} x {sides[-1]} px" in slider.get_attribute("aria-valuetext")
        slider.press("PageUp")
    assert sides == sorted(sides) and (sides[0], sides[-1]) == (16, 256)
    assert len(sources) == len(set(sides)) >= 4
    place = slider.bounding_box()
    page.mouse.click(place["x"] + 4, place["y"] + place["height"] / 2)
    low, high = (int(slider.get_attribute(end)) for end in ("min", "max"))
    assert int(slider.input_value()) < low + (high - low) / 10


def test_colours_are_those_of_the_system_and_code_is_shown_when_asked_for(open_page):
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = (open_page(RESULTS, scheme=x).evaluate(ground) for x in ("light", "dark"))
    assert light == "rgb(255, 255, 255)" != dark
    page = open_page(RESULTS)
    code = page.locator("details.code pre").first
    assert not code.is_visible()
    page.get_by_role("button", name="Show code").click()
    assert code.is_visible()
    page.get_by_role("button", name="Hide code").click()
    assert not code.is_visible()
    page.get_by_role("link", name="Next:").click()
    page.wait_for_url("**/02c_tokenizer_recipe.html")


def test_what_does_not_fit_can_be_scrolled_by_keyboard(open_page):
    page = open_page(RESULTS, width=380)
    table = page.get_by_role("region", name=re.compile("^The paper's reconstruction table"))
    table.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("box => box.scrollLeft > 0", arg=table.element_handle())


def test_on_paper_the_page_is_light_and_without_controls(open_page):
    page = open_page(INDEX, scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    ground = "getComputedStyle(document.documentElement).getPropertyValue('--back').trim()"
    assert page.evaluate(ground) == "#ffffff"
    assert page.locator(".compare .over").is_visible()
    assert not page.locator(".bar").is_visible()
    assert not page.locator("#compare fieldset").is_visible()
