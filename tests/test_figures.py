"""Figures and tables: exact pixels, stable bytes, alternatives, colours told apart by everybody."""

import base64
import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image
from skimage.color import rgb2lab
from tiny import encoded

from workbook.figures import core, tables
from workbook.names import label, of_each
from workbook.paths import ROOT

# How colours look without one kind of cones, on linear RGB (Machado, Oliveira & Fernandes 2009).
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


def line(points=3):
    figure, axis = plt.subplots(figsize=(5, 3))
    axis.plot(np.random.default_rng(0).random(points), label="PSNR")
    axis.legend()
    return figure


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_models_keep_their_colour_and_name():
    same = {core.colour(name) for name in ("sit4", "sit4-seed1", "ar_sit4-0")}
    assert len(same) == 1 and core.colour("vit_vqgan") not in same
    assert core.colour("anything else") in core.SPARE_COLOURS
    names = {"vit_vqgan": "ViT-VQGAN", "ar_sit5-seed1": "AR-SIT-5, seed 1", "top_k": "top k"}
    names["ar_captioned_sit4_sc"] = "AR-SIT-SC-4, captioned"
    assert {name: label(name) for name in names} == names
    told = of_each({"ar_sit4": 0.3, "ar_vit_vqgan": 0.6})
    assert told == "0.3 for AR-SIT-4, 0.6 for AR-ViT-VQGAN"


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
    rgb = np.array([plt.matplotlib.colors.to_rgb(core.colour(name)) for name in together])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.transpose(DEFICIENCIES[deficiency]), 0, 1)
    lab = rgb2lab(np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055))
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


@pytest.mark.parametrize("rows", [(), ["original", "decoded from codes"]])
def test_image_grid_draws_pixels_as_exact_squares(rows):
    images = np.random.default_rng(0).random((4, 3, 16, 16)).astype(np.float32)
    titles = ["a", "b"] if rows else list("abcd")
    drawn = core.png(core.image_grid(images, titles=titles, row_labels=rows, scale=3))
    drawn = np.asarray(Image.open(io.BytesIO(drawn)).convert("RGB"))
    for image in images:
        tile = (image.transpose(1, 2, 0) * 255 + 0.5).astype(np.uint8).repeat(3, 0).repeat(3, 1)
        windows = np.lib.stride_tricks.sliding_window_view(drawn, tile.shape)[:, :, 0]
        assert (windows == tile).all(axis=(2, 3, 4)).sum() == 1


def test_image_grid_fills_a_page_and_no_more_and_refuses_what_does_not_fit():
    figure = core.image_grid(np.zeros((16, 1, 64, 64)), row_labels=["original", "ViT-VQGAN"])
    width, height = figure.get_size_inches() * figure.dpi
    assert 8 * 128 < width <= core.PAGE_WIDTH and height > 2 * 128
    for shape, options, sentence in (
        ((2, 8, 8), {}, r"not \[2, 8, 8\]"),
        ((4, 3, 8, 8), {"titles": list("abc")}, "give 4 titles"),
        ((4, 3, 8, 8), {"row_labels": list("abc")}, "3 row labels for 2 rows of 2"),
    ):
        with pytest.raises(ValueError, match=sentence):
            core.image_grid(np.zeros(shape), columns=2, **options)


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
    names = ("kid", "psnr", "parameters", "not measured")
    scores = [{"kid": 0.1, "psnr": 20.0, "parameters": 1_500_000}]
    scores.append(scores[0] | {"kid": 0.3, "psnr": 22.0})
    text = tables.text_table([tables.cells([one], names) for one in scores], "Scores", best=True)
    assert "KID x 1000" in text and "100.00*" in text and "22.00*" in text and " 1.50" in text
    both = tables.cells(scores, ["kid"])["KID x 1000"]
    assert both["mean"] == 200 and both["seeds"] == 2 and 141 < both["std"] < 142


def test_small_pictures_keep_photographs_and_drawings_close():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert np.array_equal(pixels(core.small_picture(encoded(noise))), noise)
    figure, axis = plt.subplots(dpi=100)
    for phase in range(8):
        axis.plot(np.sin(np.arange(200) / 20 + phase), color=core.colour(f"{phase}"), alpha=0.7)
    drawing = core.png(figure)
    smaller = core.small_picture(drawing)
    assert len(smaller) < 0.7 * len(drawing)
    assert np.abs(pixels(smaller).astype(int) - pixels(drawing)).mean() < 0.5
    clear = np.zeros((8, 8, 4), dtype=np.uint8)
    assert core.small_picture(encoded(clear)) == encoded(clear)
    photograph = np.asarray(Image.open(ROOT / "docs/photo.jpg"))[400:, 256:512]
    smaller = core.small_picture(encoded(photograph))
    assert smaller.startswith(b"\xff\xd8")  # a JPEG
    assert np.abs(pixels(smaller).astype(int) - photograph).mean() < 2.5


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
