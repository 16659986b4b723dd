"""Figures and tables: exact pixels, stable bytes, text alternatives, colours that everybody can tell apart."""

import base64
import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image
from skimage.color import rgb2lab

from workbook.figures import core, tables
from workbook.names import label, of_each

# How colours look without one kind of cones, on linear RGB (Machado, Oliveira & Fernandes 2009).
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def line(points=3):
    figure, axis = plt.subplots(figsize=(5, 3))
    axis.plot(np.random.default_rng(0).random(points), label="PSNR")
    axis.legend()
    return figure


def test_models_keep_their_colour_and_name():
    same = {core.colour(name) for name in ("sit4", "sit4-seed1", "ar_sit4-0")}
    assert len(same) == 1 and core.colour("vit_vqgan") not in same
    assert core.colour("anything else") in core.SPARE_COLOURS
    names = {
        "sit4": "SIT-4",
        "vit_vqgan": "ViT-VQGAN",
        "ar_sit5-seed1": "AR-SIT-5, seed 1",
        "ar_captioned_sit4_sc": "AR-SIT-SC-4, captioned",
        "top_k": "top k",
    }
    assert {name: label(name) for name in names} == names
    assert (
        of_each({"ar_sit4": 0.3, "ar_vit_vqgan": 0.6}) == "0.3 for AR-SIT-4, 0.6 for AR-ViT-VQGAN"
    )


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
@pytest.mark.parametrize(
    "together",
    [
        ["vit_vqgan", "sit4", "sit5", "sit5_sc", "sit5_sc_second"],
        ["ar_captioned_vit_vqgan", "ar_captioned_sit4_sc"],
        ["ar_vit_vqgan", "ar_sit4_scd"],
    ],
)
def test_models_of_one_figure_are_told_apart_by_everybody(together, deficiency):
    lab = []
    for name in together:
        rgb = np.array([int(core.colour(name)[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        seen = np.clip(np.asarray(DEFICIENCIES[deficiency]) @ linear, 0, 1)
        srgb = np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)
        lab.append(rgb2lab(srgb[None, None])[0, 0])
    pairs = [np.linalg.norm(a - b) for i, a in enumerate(lab) for b in lab[i + 1 :]]
    assert min(pairs) > 15  # in CIELAB; 2 is just noticeable side by side


def test_show_attaches_alternative_and_caption_and_closes(monkeypatch):
    shown = []
    monkeypatch.setattr(core, "display", lambda data, raw, metadata: shown.append((data, metadata)))
    figure = line()
    with pytest.raises(ValueError, match="what the figure shows"):
        core.show(figure, "  ")
    core.show(figure, "One\n  line", "Read it so.", name="curve")
    (data, metadata), (text, _) = shown
    assert metadata["image/png"] == {"alt": "One line", "caption": "Read it so.", "name": "curve"}
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert text["text/markdown"] == "*Read it so.*" and not plt.fignum_exists(figure.number)


def test_lines_are_vectors_with_equal_bytes_and_pixels_are_pixels():
    core.style()
    vectors = core.svg(line())
    assert vectors == core.svg(line()) and ">PSNR</text>" in vectors and "Date" not in vectors
    assert core.svg(line(20_000)) is None  # larger than its pixels
    figure = line()
    figure.axes[0].imshow(np.zeros((2, 2)))
    assert core.svg(figure) is None
    assert core.svg(core.image_grid(np.zeros((1, 3, 8, 8)))) is None
    plt.close("all")


@pytest.mark.parametrize("rows", [(), ["original", "decoded from codes"]])
def test_image_grid_draws_pixels_as_exact_squares(rows):
    images = np.random.default_rng(0).random((4, 3, 16, 16)).astype(np.float32)
    titles = ["a", "b"] if rows else list("abcd")
    figure = core.image_grid(images, titles=titles, row_labels=rows, scale=3)
    drawn = pixels(core.png(figure))
    plt.close(figure)
    for image in images:
        tile = (image.transpose(1, 2, 0) * 255 + 0.5).astype(np.uint8).repeat(3, 0).repeat(3, 1)
        windows = np.lib.stride_tricks.sliding_window_view(drawn, tile.shape)[:, :, 0]
        assert (windows == tile).all(axis=(2, 3, 4)).sum() == 1


def test_image_grid_fills_a_page_and_no_more_and_refuses_what_does_not_fit():
    figure = core.image_grid(np.zeros((16, 1, 64, 64)), row_labels=["original", "ViT-VQGAN"])
    width, height = figure.get_size_inches() * figure.dpi
    plt.close(figure)
    assert 8 * 128 < width <= core.PAGE_WIDTH and height > 2 * 128
    with pytest.raises(ValueError, match=r"not \[2, 8, 8\]"):
        core.image_grid(np.zeros((2, 8, 8)))
    with pytest.raises(ValueError, match="give 4 titles"):
        core.image_grid(np.zeros((4, 3, 8, 8)), titles=list("abc"), columns=2)
    with pytest.raises(ValueError, match="3 row labels for 2 rows of 2"):
        core.image_grid(np.zeros((4, 3, 8, 8)), row_labels=list("abc"), columns=2)


def test_smoothing_keeps_lines_and_means():
    values = np.arange(50.0)
    np.testing.assert_allclose(core.smoothed(values, 5)[2:-2], values[2:-2])
    np.testing.assert_allclose(core.smoothed(np.full(30, 2.5), 9), 2.5)


def test_curves_have_a_panel_for_each_column_without_missing_values():
    run = {"step": range(40), "loss": np.arange(40.0), "psnr": [np.nan] * 20 + [20.0] * 20}
    figure = core.curves("sit4", run, {"loss": "loss", "psnr": "PSNR, dB"})
    assert [axis.get_ylabel() for axis in figure.axes] == ["loss", "PSNR, dB"]
    assert [len(axis.lines[-1].get_xdata()) for axis in figure.axes] == [40, 20]
    plt.close(figure)


def test_tables_format_values_and_mark_the_best():
    rows = [
        {"model": "a<b", "PSNR": {"mean": 23.456, "std": 0.12, "seeds": 2}, "n": 12345},
        {"model": "c", "PSNR": {"mean": 24.0, "std": None, "seeds": 1}, "n": None},
        {"model": "d", "PSNR": float("nan")},
    ]
    html = tables.html_table(rows, "Scores & more", digits={"PSNR": 2}, best={"PSNR": "max"})
    cells = ("<caption>Scores &amp; more</caption>", "a&lt;b", "<td>23.46 ± 0.12</td>", "n/a")
    assert all(cell in html for cell in (*cells, "<td><strong>24.00</strong></td>"))
    text = tables.text_table(rows, "Scores", digits={"PSNR": 2}, best={"PSNR": "max"})
    assert "24.00*" in text and len(text.splitlines()) == 5


def test_cells_have_titles_factors_digits_and_directions_of_the_metrics():
    seeds = {"a": (0.1, 20.0), "b": (0.3, 22.0)}
    rows = [
        {"model": name} | tables.cells([{"kid": kid, "psnr": psnr, "parameters": 1_500_000}], names)
        for name, (kid, psnr) in seeds.items()
        for names in [("kid", "psnr", "parameters", "not measured")]
    ]
    text = tables.text_table(rows, "Scores", best=True)
    assert "KID x 1000" in text and "100.00*" in text and "22.00*" in text and " 1.50" in text
    both = tables.cells([{"kid": 0.1}, {"kid": 0.3}], ["kid"])["KID x 1000"]
    assert both["mean"] == 200 and both["seeds"] == 2 and 141 < both["std"] < 142


def test_a_sweep_is_a_line_through_means_and_a_dot_for_each_seed():
    def rows(value):
        return [{"top_p": top_p, "fd_lite0": value + top_p} for top_p in (0.1, 0.5, 1.0)]

    figure = core.sweep_curves(
        {"ar_sit4": [rows(10), rows(14)]}, "top_p", "top-p", {"fd_lite0": "FD"}
    )
    (axis,) = figure.axes
    mean, *dots = axis.lines
    assert (mean.get_xdata() == [0.1, 0.5, 1.0]).all() and len(dots) == 2
    np.testing.assert_allclose(mean.get_ydata(), [12.1, 12.5, 13.0])
    plt.close(figure)
