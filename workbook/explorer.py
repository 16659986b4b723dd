"""Panels to play with in JupyterLab: bands of a transform, scales of a code, edits, previews.

A panel is live where somebody can move its sliders, and a figure of some of its settings where
nobody can, as in a report. The same function draws both. Images are [3, h, w] in [0, 1].
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

import ipywidgets as widgets
import torch
import torch.nn.functional as F
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor

from sitlib.data import ImageError, decode_rgb, rgb_to_tensor
from sitlib.model.config import SamplingConfig
from sitlib.model.generator import AutoregressiveModel
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.model.wavelets import dwt2, idwt2, max_levels
from sitlib.sample.applications import edit, preview, refine
from workbook.figures.core import image_grid, picture_uri, show
from workbook.site.examples import pyramid_mosaic

# fmt: off
WAVELETS = {"Haar": "haar", "Daubechies 2": "db2", "LeGall 5/3": "bior2.2",
            "CDF 9/7": "bior4.4", "Symlet 8": "sym8"}
# fmt: on
ORIENTATIONS = ("horizontal", "vertical", "diagonal")  # the thirds of a scale's details
WRAP = widgets.Layout(flex_flow="row wrap")
Drawing = Mapping[str, Tensor]  # title -> image


@dataclass
class Pictures:
    """Square images by name, and the menus that offer them."""

    size: int  # px
    images: dict[str, Tensor]
    menus: list[widgets.Dropdown] = field(default_factory=list)

    def menu(self, description: str, number: int = 0) -> widgets.Dropdown:
        """Make a menu of all pictures, also of later ones, that begins with the one of `number`."""
        names = list(self.images)
        menu = widgets.Dropdown(options=names, value=names[number], description=description)
        self.menus.append(menu)
        return menu

    def add(self, name: str, content: bytes) -> str:
        """Add the middle square of an image file and choose it in the menus "image"; its name.

        Raises:
            ImageError: the file cannot be decoded.
        """
        square = ImageOps.fit(decode_rgb(content), (self.size, self.size), Image.Resampling.BICUBIC)
        names = [name, *(f"{name} ({k})" for k in range(2, len(self.images) + 2))]
        name = next(name for name in names if name not in self.images)
        self.images[name] = rgb_to_tensor(square).float() / 255
        for menu in self.menus:
            chosen = name if menu.description == "image" else menu.value
            menu.options = list(self.images)  # this chooses the first one
            menu.value = chosen
        return name

    def uploader(self) -> widgets.VBox:
        """A button that adds PNG, JPEG and other image files from the user's disk."""
        button = widgets.FileUpload(accept="image/*", multiple=True, description="Your image")
        message = widgets.HTML()

        def add(change: Mapping[str, Any]) -> None:
            sentences = []
            for file in change["new"]:
                try:
                    name = self.add(file["name"], bytes(file["content"]))
                    sentences.append(f"{name} is in the menus now.")
                except ImageError as error:
                    sentences.append(f"{file['name']}: {error}.")
            message.value = escape(" ".join(sentences))

        button.observe(add, "value")
        return widgets.VBox([button, message])


@dataclass
class Panel:
    """Controls, what is drawn for their values, and buttons that draw something more."""

    controls: Mapping[str, widgets.ValueWidget]
    draw: Callable[..., Drawing]  # of the controls' values; ValueError: a sentence for the user
    examples: Mapping[str, Mapping[str, Any]]  # caption -> values that differ from the first ones
    buttons: Mapping[str, Callable[[], Drawing]] = field(default_factory=dict)
    side: int = 192  # px of a shown image

    def values(self) -> dict[str, Any]:
        return {name: control.value for name, control in self.controls.items()}

    def live(self) -> widgets.VBox:
        """Controls above images that follow them."""
        images, more = widgets.HTML(), widgets.HTML()

        def redraw(_: Any = None) -> None:
            images.value = _html(lambda: self.draw(**self.values()), self.side)
            more.value = ""  # it was of other images

        def press(button: widgets.Button) -> None:
            more.value = _html(self.buttons[button.description], side=384)

        for control in self.controls.values():
            control.observe(redraw, "value")
        width = {"width": f"{self.side}px", "margin": "0 8px 0 0"}  # one below each image
        row = [widgets.Button(description=name, layout=width) for name in self.buttons]
        for button in row:
            button.on_click(press)
        redraw()
        controls = widgets.Box([*self.controls.values()], layout=WRAP)
        return widgets.VBox([controls, images, widgets.HBox(row, layout=WRAP), more])

    def static(self) -> Figure:
        """A row of images for each example; small ones are enlarged by whole pixels."""
        first = self.values()
        rows = [self.draw(**first | dict(changes)) for changes in self.examples.values()]
        images = [image[None] for row in rows for image in row.values()]
        size = max(image.shape[-1] for image in images)
        images = torch.cat([F.interpolate(image, (size, size)) for image in images])
        return image_grid(images, list(rows[0]), list(self.examples), columns=len(rows[0]))


def present(panel: Panel, live: bool, alt: str, caption: str) -> None:
    """Show a panel: live, or as a figure with a text alternative and a caption."""
    if live:
        display(panel.live())
    else:
        show(panel.static(), alt=alt, caption=caption)


def _html(draw: Callable[[], Drawing], side: int) -> str:
    """Images in HTML and how long they took, or the sentence that says why there are none."""
    start = time.perf_counter()
    try:
        drawn = draw()
    except ValueError as error:
        return escape(str(error))
    images = "".join(
        f'<div style="margin-right: 8px">{escape(title)}<br><img width="{side}" '
        f'alt="{escape(title)}" src="{picture_uri(image, max(1, 192 // image.shape[-1]))}"></div>'
        for title, image in drawn.items()
    )
    note = f"drawn in {1000 * (time.perf_counter() - start):.0f} ms"
    return f'<div style="display: flex; flex-wrap: wrap">{images}</div>{note}'


def wavelet_panel(pictures: Pictures) -> Panel:
    """Transform an image, set a band to zero, and transform it back."""
    deepest = max_levels(pictures.size, pictures.size) - 1
    levels = widgets.IntSlider(3, 1, deepest, description="levels")
    zeroed = widgets.Dropdown(options=_bands(3), description="zeroed")

    def offer_bands(change: Mapping[str, Any]) -> None:
        chosen, bands = zeroed.value, _bands(change["new"])
        zeroed.options = bands
        zeroed.value = chosen if chosen in bands.values() else (-1, -1)

    levels.observe(offer_bands, "value")
    wavelet = widgets.Dropdown(options=WAVELETS, description="wavelet")
    menu = pictures.menu("image")
    controls = {"name": menu, "wavelet": wavelet, "levels": levels, "zeroed": zeroed}

    def draw(name: str, wavelet: str, levels: int, zeroed: tuple[int, int]) -> Drawing:
        image = pictures.images[name]
        scales = dwt2(image[None], wavelet, levels)
        scale, third = zeroed
        if third >= 0 and scale <= levels:
            scales[scale] = scales[scale].clone()
            scales[scale].chunk(3, dim=1)[third].zero_()
        elif 0 <= scale <= levels:
            scales[scale] = torch.zeros_like(scales[scale])
        restored = idwt2(scales, wavelet)[0]
        return {
            "image": image,
            "coefficients": pyramid_mosaic([x[0] for x in scales]),
            "without the band": restored,
            "a part of it, enlarged": restored[_liveliest(image)],
        }

    examples = {
        "Haar": {},
        "Haar, finest details zeroed": {"zeroed": (3, -1)},
        "Haar, coarsest details zeroed": {"zeroed": (1, -1)},
        "CDF 9/7 with finest details zeroed": {"wavelet": "bior4.4", "zeroed": (3, -1)},
    }
    return Panel(controls, draw, examples)


def _liveliest(image: Tensor) -> tuple[slice, slice, slice]:
    """Where an image [3, H, H] has most of its finest details: a square of a quarter of its side."""
    side = image.shape[-1] // 8  # of the square, in details
    details = dwt2(image[None], "haar", 1)[1].square().sum(1)  # [1, H/2, H/2]
    sums = F.avg_pool2d(details, side, stride=1)[0]
    top, left = (2 * place for place in divmod(int(sums.argmax()), sums.shape[-1]))
    return slice(None), slice(top, top + 2 * side), slice(left, left + 2 * side)


def _bands(levels: int) -> dict[str, tuple[int, int]]:
    """Names of the bands -> (scale, third); scale -1: none, third -1: all of the scale."""
    bands = {"nothing": (-1, -1), "approximation": (0, -1)}
    for scale in range(1, levels + 1):
        name = f"details {scale} of {levels}"
        bands[name] = (scale, -1)
        bands |= {f"{name}, {text}": (scale, third) for third, text in enumerate(ORIENTATIONS)}
    return bands


def codes_panel(tokenizer: SpectralTokenizer, pictures: Pictures) -> Panel:
    """Keep the first scales of an image's codes, or take some from a second image."""
    S = tokenizer.geometry.num_scales
    controls: dict[str, Any] = {
        "first": pictures.menu("image"),
        "second": pictures.menu("second", 1),
        "kept": widgets.IntSlider(S, 1, S, description="scales"),
    }
    swaps = [f"swap_{scale}" for scale in range(1, S + 1)]
    for scale, name in enumerate(swaps, 1):
        text = f"scale {scale} of the second image"
        controls[name] = widgets.Checkbox(False, description=text, indent=False)

    def draw(first: str, second: str, kept: int, **swapped: bool) -> Drawing:
        images = torch.stack([pictures.images[name] for name in (first, second)])
        codes, other_codes = tokenizer.encode(images).cpu()  # [S, N] each
        is_other = torch.tensor([swapped[name] for name in swaps])
        mixed = torch.where(is_other[:, None], other_codes, codes)
        decoded = tokenizer.decode(mixed[None], kept)[0].cpu()
        return {"image": images[0], "second": images[1], "what the codes give": decoded}

    examples = {
        f"all {S} scales": {},
        "half of the scales": {"kept": max(1, S // 2)},
        "scale 1 of the second": {swaps[0]: True},
        "fine scales of the second": dict.fromkeys(swaps[S // 2 :], True),
    }
    return Panel(controls, draw, examples)


def _sampler_controls(sampling: SamplingConfig) -> dict[str, widgets.ValueWidget]:
    """Controls of what is changed most in a sampler, by the names of its fields."""
    controls: dict[str, Any] = {
        "guidance": widgets.FloatSlider(sampling.guidance, min=1, max=6, step=0.5),
        "temperature": widgets.FloatSlider(sampling.temperature, min=0.3, max=1.5, step=0.1),
        "seed": widgets.BoundedIntText(sampling.seed, 0, 9999),
    }
    for name, control in controls.items():
        control.description, control.style = name, {"description_width": "90px"}
    return controls


def edit_panel(
    model: AutoregressiveModel, tokenizer: SpectralTokenizer, pictures: Pictures, caption: str
) -> Panel:
    """Keep the coarse scales of an image, and sample the others for another caption."""
    sampling = model.config.sampling or SamplingConfig()
    S = tokenizer.geometry.num_scales
    controls = {
        "name": pictures.menu("image"),
        "caption": widgets.Text(caption, description="caption", continuous_update=False),
        "keep": widgets.IntSlider(S - 2, 0, S, description="scales kept"),
        **_sampler_controls(sampling),
    }

    def draw(name: str, caption: str, keep: int, **changes: Any) -> Drawing:
        image = pictures.images[name]
        edited = edit(model, tokenizer, image[None], [caption], keep, replace(sampling, **changes))
        white = torch.ones_like(image)
        stays = tokenizer.decode(edited.codes, keep)[0].cpu() if keep else white
        return {"image": image, "what stays": stays, "edited": edited.images[0]}

    examples = {f"{keep} of {S} kept": {"keep": keep} for keep in range(S, -1, -1)}
    return Panel(controls, draw, examples)


def prompt_panel(
    model: AutoregressiveModel, tokenizer: SpectralTokenizer, prompt: str, count: int = 8
) -> Panel:
    """Cheap previews of several samples of a prompt, and a button under each that finishes it."""
    sampling = model.config.sampling or SamplingConfig()
    S, previews = tokenizer.geometry.num_scales, None
    controls = {
        "prompt": widgets.Text(prompt, description="prompt", continuous_update=False),
        "scales": widgets.IntSlider(1, 1, S, description="scales"),
        **_sampler_controls(sampling),
    }

    def draw(prompt: str, scales: int, **changes: Any) -> Drawing:
        nonlocal previews
        previews = preview(model, tokenizer, prompt, replace(sampling, **changes), count, scales)
        return {f"preview {i}": image for i, image in enumerate(previews.images, 1)}

    def finish(index: int) -> Drawing:
        assert previews is not None
        image = refine(model, tokenizer, previews, index).images[0]
        return {f"preview {index + 1} finished": image}

    examples = {"previews": {}, "each finished": {"scales": S}}
    buttons = {f"Finish {i + 1}": lambda i=i: finish(i) for i in range(count)}
    return Panel(controls, draw, examples, buttons=buttons, side=96)
