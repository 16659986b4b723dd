"""The explorer's panels: what they draw, that widgets follow, uploads; and the whole notebook in a real browser."""

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import closing
from datetime import datetime

import ipywidgets
import nbformat
import pytest
import torch
from PIL import Image
from test_applications import PLAIN, model_of, photographs, tokenizer_of
from tiny import CLASSES

from sitlib.data import ImageError
from workbook.paths import ROOT
from workbook.reporting.explorer import (
    WAVELETS,
    Pictures,
    PromptPanel,
    codes_panel,
    edit_panel,
    png_of,
    wavelet_panel,
)


def pictures():
    return Pictures(64, {f"photograph {i}": image for i, image in enumerate(photographs(3))})


def widgets_in(widget, kind):
    found = [widget] if isinstance(widget, kind) else []
    return found + [w for child in getattr(widget, "children", ()) for w in widgets_in(child, kind)]


def shown(widget):
    return [image.value for image in widgets_in(widget, ipywidgets.Image)]


@pytest.mark.parametrize("wavelet", WAVELETS.values())
@pytest.mark.parametrize("levels", [1, 3])
def test_an_image_without_a_band_lacks_that_band_and_nothing_else(wavelet, levels):
    panel = wavelet_panel(pictures())
    values = panel.values() | {"wavelet": wavelet, "levels": levels}
    whole = panel.draw(**values)["without the band"]
    torch.testing.assert_close(whole, photographs(3)[0], atol=1e-4, rtol=0)
    rest = panel.draw(**values | {"zeroed": (levels, -1)})["without the band"]
    thirds = [
        panel.draw(**values | {"zeroed": (levels, third)})["without the band"] for third in range(3)
    ]
    torch.testing.assert_close(sum(whole - x for x in thirds), whole - rest, atol=1e-4, rtol=0)
    assert (whole - rest).abs().max() > 0.02


def test_an_edit_keeps_what_it_says_and_answers_an_empty_caption_in_words():
    panel = edit_panel(model_of("text"), tokenizer_of(), PLAIN, pictures(), "a red cat")
    live, values = panel.live(), panel.values()
    whole = panel.draw(**values | {"keep": 5})
    torch.testing.assert_close(whole["edited"], tokenizer_of().reconstruct(photographs(3)[:1])[0])
    drawn = panel.draw(**values | {"keep": 2})
    assert drawn["what stays"].shape == (3, 8, 8) and not torch.equal(
        drawn["edited"], whole["edited"]
    )
    before = shown(live)
    panel.controls["keep"].value = 0
    assert shown(live)[2] != before[2]
    panel.controls["caption"].value = " "
    assert any("is empty" in html.value for html in widgets_in(live, ipywidgets.HTML))


def test_bands_that_are_still_there_stay_chosen():
    panel = wavelet_panel(pictures())
    panel.controls["zeroed"].value = (2, 1)
    panel.controls["levels"].value = 4
    assert panel.controls["zeroed"].value == (2, 1)


def test_bands_of_a_level_that_is_gone_are_no_longer_offered():
    panel = wavelet_panel(pictures())
    panel.controls["zeroed"].value = (3, -1)
    panel.controls["levels"].value = 2
    assert panel.controls["zeroed"].value == (-1, -1)
    assert max(scale for _, (scale, _) in panel.controls["zeroed"].options.items()) == 2


def test_codes_panel_swaps_and_keeps_scales():
    tokenizer, three = tokenizer_of(), photographs(3)
    panel = codes_panel(tokenizer, pictures())
    values, (first, second) = panel.values(), (tokenizer.encode(three[i : i + 1]) for i in (0, 1))

    def drawn(**changes):
        return list(panel.draw(**values | changes).values())[-1]

    torch.testing.assert_close(drawn(), tokenizer.decode(first)[0])
    torch.testing.assert_close(drawn(kept=2), tokenizer.decode(first, 2)[0])
    mixed = torch.cat([second[:, :1], first[:, 1:]], dim=1)
    torch.testing.assert_close(drawn(swap_1=True), tokenizer.decode(mixed)[0])
    everything = {f"swap_{scale}": True for scale in range(1, 6)}
    torch.testing.assert_close(drawn(**everything), tokenizer.decode(second)[0])


def test_images_follow_the_controls():
    for panel, name, value in (
        (wavelet_panel(pictures()), "zeroed", (3, -1)),
        (codes_panel(tokenizer_of(), pictures()), "kept", 1),
    ):
        live = panel.live()
        before = shown(live)
        panel.controls[name].value = value
        after = shown(live)
        assert len(before) == len(after) == 3 and before[0] == after[0] and before[-1] != after[-1]
        assert Image.open(io.BytesIO(after[-1])).size == (192, 192)


def png(size=(90, 70), colour="red"):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def test_an_image_of_the_user_joins_every_menu_and_is_shown():
    own = pictures()
    panels = wavelet_panel(own), codes_panel(tokenizer_of(), own)
    live, uploader = panels[0].live(), own.uploader()
    button = widgets_in(uploader, ipywidgets.FileUpload)[0]
    about = {"type": "image/png", "size": 1, "last_modified": datetime.now()}
    button.value = ({"name": "mine.png", "content": png(), **about},)
    assert all("mine.png" in picker.options for picker in own.pickers.values())
    assert (
        own.images["mine.png"].shape == (3, 64, 64)
        and panels[0].controls["name"].value == "mine.png"
    )
    assert (
        panels[1].controls["first"].value == "mine.png"
        and panels[1].controls["second"].value == "photograph 1"
    )
    assert shown(live)[0] == png_of(own.images["mine.png"])
    before = shown(live)
    button.value = (
        {"name": "mine.png", "content": png(colour="blue"), **about},
    )  # the same name again
    assert shown(live)[0] == png_of(own.images["mine.png"]) != before[0]
    drawn = panels[1].draw(**panels[1].values())
    torch.testing.assert_close(
        drawn["what the codes give"], tokenizer_of().reconstruct(own.images["mine.png"][None])[0]
    )
    said = widgets_in(uploader, ipywidgets.HTML)[0]
    button.value = ({"name": "<b>.png", "content": b"no image", **about},)
    assert "&lt;b&gt;.png: it cannot be decoded" in said.value and "<b>.png" not in own.images
    with pytest.raises(ImageError):
        own.add("x", b"")


@pytest.mark.parametrize("kind", ["class", "text"])
def test_previews_appear_and_the_one_that_is_chosen_is_finished(kind):
    panel = PromptPanel(
        model_of(kind),
        tokenizer_of(),
        PLAIN,
        CLASSES[1] if kind == "class" else "a red cat",
        count=3,
    )
    live = panel.live()
    buttons = {button.description: button for button in widgets_in(live, ipywidgets.Button)}
    assert [name for name in buttons if name.startswith("Finish")] == [
        "Finish 1",
        "Finish 2",
        "Finish 3",
    ]
    finished = widgets_in(live, ipywidgets.Image)[-1]
    assert finished.layout.display == "none"
    buttons["Finish 2"].click()
    assert finished.layout.display is None and len(finished.value) > 100
    before = shown(live)
    panel.sampler["seed"].value = 1
    buttons["Preview"].click()
    assert shown(live)[:3] != before[:3]


def test_a_prompt_that_cannot_be_is_answered_in_words():
    panel = PromptPanel(model_of("text"), tokenizer_of(), PLAIN, "a red cat", count=2)
    live = panel.live()
    panel.prompt.value = " "
    next(b for b in widgets_in(live, ipywidgets.Button) if b.description == "Preview").click()
    assert any("is empty" in html.value for html in widgets_in(live, ipywidgets.HTML))


def test_static_figures_show_every_example():
    for panel in (wavelet_panel(pictures()), codes_panel(tokenizer_of(), pictures())):
        fig = panel.static()
        assert len([axis for axis in fig.axes if axis.images]) == 3 * len(panel.examples)


# -- in a browser ----------------------------------------------------------------------------------------------------------------------


def browser_or_reason():
    """Path of an installed Chromium, or why the browser test is skipped."""
    path = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if path is None:
        return None, "no Chromium is installed (Debian: apt install chromium)"
    try:
        import playwright  # noqa: F401
    except ImportError:
        return None, "the package playwright is not installed"
    return path, ""


CHROMIUM, REASON = browser_or_reason()
SCREENSHOTS = os.environ.get("SIT_SCREENSHOTS")  # a folder, for the pictures of the README


@pytest.fixture
def lab(tmp_path):
    """Address of a JupyterLab on a folder with the explorer's notebook, set to the smallest profile if no screenshots are made."""
    notebook = nbformat.read(ROOT / "notebooks/05b_explorer.ipynb", as_version=4)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    if SCREENSHOTS is None:
        cell.source = cell.source.replace('"quick"', '"smoke"')
    nbformat.write(notebook, tmp_path / "explorer.ipynb")
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    chosen = {  # every cell is kept on the page, and nothing is asked of the network
        "notebook-extension/tracker": {"windowingMode": "none"},
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    }
    for name, values in chosen.items():
        path = tmp_path / f"lab-settings/@jupyterlab/{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    environment = {
        **os.environ,
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "JUPYTER_DATA_DIR": str(tmp_path / "data"),
        "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "lab-settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces"),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}",
    }
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        f"--ServerApp.port={port}",
        "--allow-root",
    ]
    options = [f"--ServerApp.root_dir={tmp_path}", "--IdentityProvider.token="]
    log = (tmp_path / "lab.log").open("w")
    server = subprocess.Popen([*command, *options], env=environment, stdout=log, stderr=log)
    try:
        for _ in range(120):
            with closing(socket.socket()) as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, (tmp_path / "lab.log").read_text()[-2000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/lab/tree/explorer.ipynb?reset"
    finally:
        server.terminate()
        server.wait(20)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason=REASON)
def test_the_explorer_lives_in_jupyterlab(lab, tmp_path):
    """Widgets appear and a slider changes the picture; with SIT_SCREENSHOTS the panels are photographed in the quick profile."""
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.goto(lab)
        expect(page.locator(".jp-Notebook .jp-Cell").first).to_be_visible(timeout=60_000)
        expect(page.get_by_text("Python 3 (ipykernel) | Idle")).to_be_visible(timeout=60_000)
        page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
        page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$")).click()
        panels = page.locator(
            ".jupyter-widgets.widget-vbox", has=page.locator(".widget-slider")
        ).locator("xpath=self::*[not(ancestor::*[contains(@class, 'widget-vbox')])]")
        expect(page.get_by_role("button", name="Finish 1", exact=True)).to_be_visible(
            timeout=100_000
        )
        assert page.locator(".jp-OutputArea-output[data-mime-type*='error']").count() == 0
        first = panels.first
        first.scroll_into_view_if_needed()
        images = first.locator("img")
        expect(images).to_have_count(3)
        before = images.last.get_attribute("src")
        first.locator("select").last.select_option("details 3 of 3")
        page.wait_for_function(
            "([image, old]) => image.src !== old", arg=[images.last.element_handle(), before]
        )
        middle, before = images.nth(1), images.nth(1).get_attribute("src")
        slider = first.get_by_role("slider").first
        slider.focus()
        slider.press("ArrowLeft")
        page.wait_for_function(
            "([image, old]) => image.src !== old", arg=[middle.element_handle(), before]
        )
        expect(first).to_contain_text(re.compile(r"drawn in \d+ ms"))
        own, before = tmp_path / "own.png", images.first.get_attribute("src")
        Image.new("RGB", (80, 100), "orange").save(own)
        with page.expect_file_chooser() as asked:
            page.get_by_role("button", name=re.compile("Your image")).click()
        asked.value.set_files(own)
        expect(page.get_by_text("own.png is in the menus now.")).to_be_visible()
        page.wait_for_function(
            "([image, old]) => image.src !== old", arg=[images.first.element_handle(), before]
        )
        mixed = panels.nth(1).locator("img").last
        before = mixed.get_attribute("src")
        panels.nth(1).get_by_role("checkbox").first.check()
        page.wait_for_function(
            "([image, old]) => image.src !== old", arg=[mixed.element_handle(), before]
        )
        page.get_by_role("button", name="Finish 2", exact=True).click()
        expect(page.get_by_text("preview 2 finished in")).to_be_visible()
        if SCREENSHOTS is not None:
            for panel in (panels.nth(0), panels.nth(1)):
                panel.locator("select").first.select_option("photograph 1")
            page.wait_for_timeout(1000)
            for panel, name in zip(
                panels.all(), ("bands", "scales", "edits", "prompts"), strict=True
            ):
                panel.screenshot(path=ROOT / SCREENSHOTS / f"explorer-{name}.png")
        browser.close()
