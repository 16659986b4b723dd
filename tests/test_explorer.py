"""The explorer: what panels draw, that widgets follow, uploads, and the notebook in a browser."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from datetime import datetime

import ipywidgets
import pytest
import torch
from PIL import Image, ImageOps
from tiny import encoded, model_of, photographs, tokenizer_of

from workbook.explorer import WAVELETS, Pictures, codes_panel, edit_panel, wavelet_panel
from workbook.figures.core import picture_uri
from workbook.paths import ROOT

SCREENSHOTS = os.environ.get("SIT_SCREENSHOTS")  # a folder, for the pictures of the README


def pictures():
    return Pictures(64, {f"photograph {i}": image for i, image in enumerate(photographs(3))})


def widgets_in(widget, kind):
    children = [w for child in getattr(widget, "children", ()) for w in widgets_in(child, kind)]
    return [widget] * isinstance(widget, kind) + children


def html_of(widget):
    return " ".join(html.value for html in widgets_in(widget, ipywidgets.HTML))


def shown(widget):
    """The source of each image that a live panel shows."""
    return re.findall('src="([^"]*)"', html_of(widget))


@pytest.mark.parametrize("wavelet", WAVELETS.values())
@pytest.mark.parametrize("levels", [1, 3])
def test_an_image_without_a_band_lacks_that_band_and_nothing_else(wavelet, levels):
    panel = wavelet_panel(pictures())
    values = panel.values() | {"wavelet": wavelet, "levels": levels}

    def restored(*zeroed):
        return panel.draw(**values | {"zeroed": zeroed})["without the band"]

    whole, rest = restored(-1, -1), restored(levels, -1)
    torch.testing.assert_close(whole, photographs(3)[0], atol=1e-4, rtol=0)
    lost = sum(whole - restored(levels, third) for third in range(3))
    torch.testing.assert_close(lost, whole - rest, atol=1e-4, rtol=0)
    assert (whole - rest).abs().max() > 0.02


def test_an_edit_keeps_what_it_says_and_answers_an_empty_caption_in_words():
    panel = edit_panel(model_of("text"), tokenizer_of(), pictures(), "a red cat")
    live, values = panel.live(), panel.values()
    whole, some = (panel.draw(**values | {"keep": keep}) for keep in (5, 2))
    torch.testing.assert_close(whole["edited"], tokenizer_of().reconstruct(photographs(3)[:1])[0])
    assert some["what stays"].shape == (3, 8, 8)
    assert not torch.equal(some["edited"], whole["edited"])
    before = shown(live)
    panel.controls["keep"].value = 0
    assert shown(live)[2] != before[2]
    panel.controls["caption"].value = " "
    assert "is empty" in html_of(live) and not shown(live)


def test_codes_panel_swaps_and_keeps_scales():
    tokenizer, panel = tokenizer_of(), codes_panel(tokenizer_of(), pictures())
    first, second = tokenizer.encode(photographs(3)[:2]).split(1)
    mixed = torch.cat([second[:, :1], first[:, 1:]], dim=1)
    for changes, codes, scales in (
        ({}, first, None),
        ({"kept": 2}, first, 2),
        ({"swap_1": True}, mixed, None),
        ({f"swap_{scale}": True for scale in range(1, 6)}, second, None),
    ):
        drawn = panel.draw(**panel.values() | changes)["what the codes give"]
        torch.testing.assert_close(drawn, tokenizer.decode(codes, scales)[0])


def test_an_image_of_the_user_joins_every_menu_and_is_shown():
    ours = pictures()
    scales = codes_panel(tokenizer_of(), ours)
    live, uploader = scales.live(), ours.uploader()
    (button,) = widgets_in(uploader, ipywidgets.FileUpload)

    def upload(name, content):
        about = {"type": "image/png", "size": 1, "last_modified": datetime.now()}
        button.value = ({"name": name, "content": content, **about},)

    for color, name in (("red", "mine.png"), ("blue", "mine.png (2)")):
        upload("mine.png", encoded(Image.new("RGB", (90, 70), color)))
        assert scales.controls["first"].value == name and name in scales.controls["second"].options
        assert shown(live)[0] == picture_uri(ours.images[name], 3)
    upload("<b>.png", b"no image")
    assert "&lt;b&gt;.png: it cannot be decoded" in html_of(uploader)
    assert "<b>.png" not in ours.images


@pytest.fixture
def lab(tmp_path):
    """Address of the explorer's notebook in a JupyterLab."""
    shutil.copy(ROOT / "notebooks/05b_explorer.ipynb", tmp_path / "explorer.ipynb")
    # Keep every cell on the page, and ask nothing of the network.
    for name, values in {
        "notebook-extension/tracker": {"windowingMode": "none"},
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    }.items():
        path = tmp_path / f"LAB_SETTINGS_DIR/@jupyterlab/{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    folders = ("_CONFIG_DIR", "_DATA_DIR", "LAB_SETTINGS_DIR", "LAB_WORKSPACES_DIR")
    environment = os.environ | {f"JUPYTER{name}": str(tmp_path / name) for name in folders}
    environment["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    environment["JUPYTER_PREFER_ENV_PATH"] = "1"
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--ServerApp.port={port}", f"--ServerApp.root_dir={tmp_path}"]
    command += ["--IdentityProvider.token="]
    with (tmp_path / "lab.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
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
def test_the_explorer_lives_in_jupyterlab(browser, lab, tmp_path):
    """Widgets appear and images follow them; SIT_SCREENSHOTS makes the README's pictures."""
    from playwright.sync_api import expect

    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.goto(lab)
    expect(page.get_by_text("Python 3 (ipykernel) | Idle")).to_be_visible(timeout=60_000)
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$")).click()
    button = page.get_by_role("button", name="Finish 1", exact=True)
    expect(button).to_be_visible(timeout=100_000)
    assert page.locator(".jp-OutputArea-output[data-mime-type*='error']").count() == 0
    panels = page.locator(".jupyter-widgets.widget-vbox", has=page.locator(".widget-slider"))
    bands, scales, _, prompts = panels.all()
    expect(bands).to_contain_text(re.compile(r"drawn in \d+ ms"))
    expect(bands.locator("img")).to_have_count(4)

    @contextmanager
    def changes(image):
        before = image.get_attribute("src")
        yield
        expect(image).not_to_have_attribute("src", before)

    image, mosaic, _, enlarged = bands.locator("img").all()
    with changes(enlarged):
        bands.locator("select").last.select_option("details 3 of 3")
    with changes(mosaic):
        bands.get_by_role("slider").first.press("ArrowLeft")
    Image.new("RGB", (80, 100), "orange").save(tmp_path / "own.png")
    with changes(image):
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name=re.compile("Your image")).click()
        chooser.value.set_files(tmp_path / "own.png")
    expect(page.get_by_text("own.png is in the menus now.")).to_be_visible()
    with changes(scales.locator("img").last):
        scales.get_by_role("checkbox").first.check()
    page.get_by_role("button", name="Finish 2", exact=True).click()
    expect(prompts.get_by_text("preview 2 finished")).to_be_visible()
    if SCREENSHOTS is not None:
        for panel in (bands, scales):
            with changes(panel.locator("img").first), changes(panel.locator("img").last):
                panel.locator("select").first.select_option("landscapes 1")
        with changes(mosaic):
            bands.locator("select").last.select_option("details 2 of 2")
        for panel, name in zip(panels.all(), ("bands", "scales", "edits", "prompts"), strict=True):
            # As wide as its images, so that little of the picture is white.
            page.set_viewport_size({"width": 1250 if name == "bands" else 1060, "height": 1000})
            page.wait_for_timeout(1000)
            path = ROOT / SCREENSHOTS / f"explorer-{name}.png"
            panel.screenshot(path=path)
            picture = Image.open(path).convert("RGB")
            picture.crop(ImageOps.invert(picture).getbbox()).save(path, optimize=True)
