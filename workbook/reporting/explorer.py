"""Panels to play with, in JupyterLab: bands of a wavelet transform, scales of a code, edits, prompts and previews.

A panel is live where somebody can move its sliders, and a figure of some of its settings where nobody can (in the pipeline, in a report):
the same function draws both. How long a slider move takes is measured where the figures are made.
"""

import io
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor

from sitlib.data import ImageError, decode_rgb, rgb_to_tensor
from sitlib.model.generator import AutoregressiveModel
from sitlib.model.generator_config import SamplingConfig
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.model.wavelets import dwt2, idwt2, max_levels
from sitlib.sample.applications import Preview, edit, preview, refine
from workbook.figures import show
from workbook.site.examples import pyramid_mosaic

SHOWN = 192  # px at which an image is shown
WAVELETS = {
    "Haar": "haar",
    "Daubechies 2": "db2",
    "LeGall 5/3": "bior2.2",
    "CDF 9/7": "bior4.4",
    "Symlet 8": "sym8",
}
ORIENTATIONS = ("horizontal", "vertical", "diagonal")  # the thirds of a scale's details
Drawing = dict[str, Tensor]  # title -> image [3, h, w] in [0, 1]


# -- pictures --------------------------------------------------------------------------------------------------------------------------


@dataclass
class Pictures:
    """Square images by name, [3, size, size] in [0, 1], and the pickers that offer them.

    Attributes:
        pickers: menus of the pictures by panel and description, the latest of each: a cell that is run again makes a new one.
        listeners: of the panels by name; called when a picture has been replaced by another of its name.
    """

    size: int
    images: dict[str, Tensor]
    pickers: dict[tuple[str, str], widgets.Dropdown] = field(default_factory=dict)
    listeners: dict[str, Callable[[], None]] = field(default_factory=dict)

    def picker(self, panel: str, description: str, value: str | None = None) -> widgets.Dropdown:
        """A menu of the pictures for a panel, of those added later, too."""
        names = list(self.images)
        made = widgets.Dropdown(options=names, value=value or names[0], description=description)
        self.pickers[panel, description] = made
        return made

    def add(self, name: str, content: bytes) -> str:
        """Takes an image file in: its middle square at the size of the others. Returns the name that it is offered by.

        Raises:
            ImageError: the file is not an image that can be read.
        """
        square = ImageOps.fit(decode_rgb(content), (self.size, self.size), Image.Resampling.BICUBIC)
        is_new = name not in self.images
        self.images[name] = rgb_to_tensor(square).float() / 255
        for (_, description), made in self.pickers.items():
            if is_new:
                chosen = made.value
                made.options = list(self.images)
                made.value = chosen
            if description == "image":
                made.value = name
        if not is_new:
            for listener in self.listeners.values():
                listener()
        return name

    def uploader(self) -> widgets.VBox:
        """A button for PNG, JPEG and other image files from the user's disk."""
        button = widgets.FileUpload(accept="image/*", multiple=True, description="Your image")
        said = widgets.HTML()

        def take(change: Mapping[str, Any]) -> None:
            texts = []
            for file in change["new"]:
                try:
                    texts.append(
                        f"{self.add(file['name'], bytes(file['content']))} is in the menus now."
                    )
                except ImageError as error:
                    texts.append(f"{file['name']}: {error}.")
            said.value = escape(" ".join(texts))

        button.observe(take, "value")
        return widgets.VBox([button, said])


# -- panels ----------------------------------------------------------------------------------------------------------------------------


@dataclass
class Panel:
    """Controls and what is drawn for their values.

    Attributes:
        name: of the panel among those of one set of pictures.
        draw: takes the values of the controls by name; raises ValueError with a sentence for the user.
        pictures: what it shows, whose replacement it follows.
        examples: caption -> values that differ from the first ones, for the figure.
    """

    name: str
    controls: Mapping[str, widgets.ValueWidget]
    draw: Callable[..., Drawing]
    pictures: Pictures
    examples: dict[str, dict[str, Any]]

    def values(self) -> dict[str, Any]:
        return {name: control.value for name, control in self.controls.items()}

    def live(self) -> widgets.VBox:
        """Controls above images that follow them."""
        row, said = widgets.HBox(layout=_WRAPPING), widgets.HTML()
        shown: dict[str, widgets.Image] = {}

        def follow(_: Any = None) -> None:
            start = time.perf_counter()
            try:
                drawing = self.draw(**self.values())
            except ValueError as error:
                said.value = escape(str(error))
                return
            if list(drawing) != list(shown):
                shown.clear()
                shown.update(
                    {
                        title: widgets.Image(format="png", width=SHOWN, height=SHOWN)
                        for title in drawing
                    }
                )
                row.children = [_titled(title, image) for title, image in shown.items()]
            for title, image in drawing.items():
                shown[title].value = png_of(image)
            said.value = f"drawn in {1000 * (time.perf_counter() - start):.0f} ms"

        for control in self.controls.values():
            control.observe(follow, "value")
        self.pictures.listeners[self.name] = follow
        follow()
        boxes = [made for made in self.controls.values() if isinstance(made, widgets.Checkbox)]
        others = [made for made in self.controls.values() if made not in boxes]
        return widgets.VBox([*others, widgets.HBox(boxes, layout=_WRAPPING), row, said])

    def milliseconds(self, rounds: int = 9) -> float:
        """What a slider move costs: drawing and packing the images, median of several."""
        values, times = self.values(), []
        for _ in range(rounds):
            start = time.perf_counter()
            for image in self.draw(**values).values():
                png_of(image)
            times.append(1000 * (time.perf_counter() - start))
        return statistics.median(times)

    def static(self) -> Figure:
        """A row for each example."""
        start = self.values()
        return _figure(
            {caption: self.draw(**start | changes) for caption, changes in self.examples.items()}
        )


def present(panel: "Panel | PromptPanel", live: bool, alt: str) -> None:
    """Shows a panel: live, or as a figure with a text alternative."""
    if live:
        display(panel.live())
        return
    show(panel.static(), alt)
    if isinstance(panel, Panel):
        print(
            f"A slider move takes {panel.milliseconds():.0f} ms here, without the way to the browser."
        )


def wavelet_panel(pictures: Pictures) -> Panel:
    """Wavelet, number of levels, and a band that is set to zero before the image is put together again."""
    deepest = max_levels(pictures.size, pictures.size) - 1
    levels = widgets.IntSlider(3, 1, deepest, description="levels")
    band = widgets.Dropdown(options=_bands(3), description="zeroed")

    def offer(change: Mapping[str, Any]) -> None:
        chosen, offered = band.value, _bands(change["new"])
        band.options = offered
        band.value = chosen if chosen in offered.values() else (-1, -1)

    levels.observe(offer, "value")
    controls = {
        "name": pictures.picker("bands", "image"),
        "wavelet": widgets.Dropdown(options=WAVELETS, description="wavelet"),
        "levels": levels,
        "zeroed": band,
    }

    def draw(name: str, wavelet: str, levels: int, zeroed: tuple[int, int]) -> Drawing:
        image = pictures.images[name][None]
        coefficients = dwt2(image, wavelet, levels)
        scale, third = zeroed
        if 0 <= scale <= levels:
            bands = coefficients[scale]
            width = bands.shape[1] // 3 if third >= 0 else bands.shape[1]
            start = max(third, 0) * width
            coefficients[scale] = torch.cat(
                [
                    bands[:, :start],
                    torch.zeros_like(bands[:, start : start + width]),
                    bands[:, start + width :],
                ],
                dim=1,
            )
        mosaic = pyramid_mosaic([x[0] for x in coefficients])
        return {
            "image": image[0],
            "coefficients": mosaic,
            "without the band": idwt2(coefficients, wavelet)[0],
        }

    examples = {
        "Haar": {},
        "Haar, finest details zeroed": {"zeroed": (3, -1)},
        "Haar, coarsest details zeroed": {"zeroed": (1, -1)},
        "CDF 9/7, finest details zeroed": {"wavelet": "bior4.4", "zeroed": (3, -1)},
    }
    return Panel("bands", controls, draw, pictures, examples)


def _bands(levels: int) -> dict[str, tuple[int, int]]:
    """Names of the bands -> (scale, third); scale -1: none, third -1: all of the scale."""
    named = {"nothing": (-1, -1), "approximation": (0, -1)}
    for scale in range(1, levels + 1):
        of = f"details {scale} of {levels}"
        named[of] = (scale, -1)
        named |= {f"{of}, {name}": (scale, third) for third, name in enumerate(ORIENTATIONS)}
    return named


def codes_panel(tokenizer: SpectralTokenizer, pictures: Pictures) -> Panel:
    """How many scales of an image are kept, and which come from a second image."""
    scales = tokenizer.geometry.num_scales
    names = list(pictures.images)
    controls = {
        "first": pictures.picker("scales", "image"),
        "second": pictures.picker("scales", "second", names[1]),
        "kept": widgets.IntSlider(scales, 1, scales, description="scales"),
        **{
            f"swap_{scale}": widgets.Checkbox(
                False, description=f"scale {scale} of the second image", indent=False
            )
            for scale in range(1, scales + 1)
        },
    }
    codes_of = _Codes(tokenizer, pictures)

    def draw(first: str, second: str, kept: int, **swaps: bool) -> Drawing:
        ours, theirs = codes_of(first), codes_of(second)
        taken = torch.tensor([swaps[f"swap_{scale}"] for scale in range(1, scales + 1)])
        mixed = torch.where(taken[None, :, None], theirs, ours)
        return {
            "image": pictures.images[first],
            "second": pictures.images[second],
            "what the codes give": tokenizer.decode(mixed, kept)[0].cpu(),
        }

    swap = {f"swap_{scale}": True for scale in range(1, scales + 1)}
    coarse, fine = {"swap_1": True}, {name: True for name in list(swap)[scales // 2 :]}
    examples = {
        f"all {scales} scales": {},
        "half of the scales": {"kept": max(1, scales // 2)},
        "scale 1 of the second": coarse,
        "fine scales of the second": fine,
    }
    return Panel("scales", controls, draw, pictures, examples)


def edit_panel(
    model: AutoregressiveModel,
    tokenizer: SpectralTokenizer,
    sampling: SamplingConfig,
    pictures: Pictures,
    caption: str,
) -> Panel:
    """A new caption for an image: how many of its scales stay decides between "only texture changes" and "only layout stays"."""
    scales = tokenizer.geometry.num_scales
    controls = {
        "name": pictures.picker("edits", "image"),
        "caption": widgets.Text(caption, description="caption", continuous_update=False),
        "keep": widgets.IntSlider(scales - 2, 0, scales, description="scales kept"),
        **_sampler_controls(sampling),
    }

    def draw(
        name: str, caption: str, keep: int, guidance: float, temperature: float, seed: int
    ) -> Drawing:
        image = pictures.images[name]
        changed = replace(sampling, guidance=guidance, temperature=temperature, seed=seed)
        drawn = edit(model, tokenizer, image[None], [caption], keep, changed)
        return {
            "image": image,
            "what stays": tokenizer.decode(drawn.codes, keep)[0].cpu()
            if keep
            else torch.ones_like(image),
            "edited": drawn.images[0],
        }

    examples = {f"{keep} of {scales} kept": {"keep": keep} for keep in range(scales, -1, -1)}
    return Panel("edits", controls, draw, pictures, examples)


def _sampler_controls(sampling: SamplingConfig) -> dict[str, widgets.ValueWidget]:
    """Controls of the values of a `SamplingConfig` that change most."""
    return {
        "guidance": widgets.FloatSlider(
            sampling.guidance, min=1, max=6, step=0.5, description="guidance"
        ),
        "temperature": widgets.FloatSlider(
            sampling.temperature, min=0.3, max=1.5, step=0.1, description="temperature"
        ),
        "seed": widgets.BoundedIntText(sampling.seed, 0, 9999, description="seed"),
    }


class _Codes:
    """Codes of pictures by name, encoded when they are first asked for and again when the picture is another."""

    def __init__(self, tokenizer: SpectralTokenizer, pictures: Pictures):
        self.tokenizer, self.pictures = tokenizer, pictures
        self._known: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, name: str) -> Tensor:
        image = self.pictures.images[name]
        if name not in self._known or self._known[name][0] is not image:
            self._known[name] = image, self.tokenizer.encode(image[None]).cpu()
        return self._known[name][1]


class PromptPanel:
    """A prompt, cheap previews of several samples, and a button under each that finishes this one.

    Attributes:
        prompt: a text box, or a menu of the classes of a class-conditional model.
    """

    def __init__(
        self,
        model: AutoregressiveModel,
        tokenizer: SpectralTokenizer,
        sampling: SamplingConfig,
        prompt: str,
        count: int = 8,
    ):
        self.model, self.tokenizer, self.sampling, self.count = model, tokenizer, sampling, count
        if model.text_tokenizer is None:
            numbers = {name: number for number, name in enumerate(model.config.classes)}
            self.prompt = widgets.Dropdown(
                options=numbers, value=numbers[prompt], description="class"
            )
        else:
            self.prompt = widgets.Text(prompt, description="prompt")
        self.scales = widgets.IntSlider(1, 1, tokenizer.geometry.num_scales, description="scales")
        self.sampler = _sampler_controls(sampling)
        self._previews: Preview | None = None

    def previews(self) -> Preview:
        """Previews for the present values of the controls."""
        sampling = replace(
            self.sampling, **{name: control.value for name, control in self.sampler.items()}
        )
        return preview(
            self.model, self.tokenizer, self.prompt.value, sampling, self.count, self.scales.value
        )

    def live(self) -> widgets.VBox:
        go = widgets.Button(description="Preview", button_style="primary")
        said, row = widgets.HTML(), widgets.HBox(layout=_WRAPPING)
        finished = widgets.Image(format="png", width=2 * SHOWN, height=2 * SHOWN)
        finished.layout.display = "none"

        def show_previews(_: Any = None) -> None:
            start = time.perf_counter()
            try:
                self._previews = self.previews()
            except ValueError as error:
                said.value = escape(str(error))
                return
            row.children = [
                _titled(
                    "",
                    widgets.Image(value=png_of(image), format="png", width=96, height=96),
                    self._finisher(i, finish),
                )
                for i, image in enumerate(self._previews.images)
            ]
            finished.layout.display = "none"  # it was of other previews
            said.value = f"{self.count} previews in {time.perf_counter() - start:.2f} s; finish the one that you like"

        def finish(index: int) -> None:
            start = time.perf_counter()
            assert self._previews is not None
            image = refine(self.model, self.tokenizer, self._previews, index).images[0]
            finished.value, finished.layout.display = png_of(image), None
            said.value = f"preview {index + 1} finished in {time.perf_counter() - start:.2f} s"

        go.on_click(show_previews)
        show_previews()
        controls = [self.prompt, self.scales, *self.sampler.values(), go]
        return widgets.VBox([*controls, row, said, finished])

    def _finisher(self, index: int, finish: Callable[[int], None]) -> widgets.Button:
        button = widgets.Button(description=f"Finish {index + 1}", layout={"width": "96px"})
        button.on_click(lambda _: finish(index))
        return button

    def static(self) -> Figure:
        shown = self.previews()
        finished = [
            refine(self.model, self.tokenizer, shown, index).images[0]
            for index in range(self.count)
        ]
        previews = {f"preview {i + 1}": image for i, image in enumerate(shown.images)}
        return _figure(
            {
                "previews": previews,
                "each finished": {f"finished {i + 1}": x for i, x in enumerate(finished)},
            }
        )


# -- drawing ---------------------------------------------------------------------------------------------------------------------------

_WRAPPING = widgets.Layout(flex_flow="row wrap")


def png_of(image: Tensor) -> bytes:
    """PNG of an image [3, h, w] in [0, 1], enlarged by whole pixels to about `SHOWN` px."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    times = max(1, SHOWN // pixels.shape[0])
    file = io.BytesIO()
    Image.fromarray(pixels.repeat(times, 0).repeat(times, 1)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _titled(title: str, *parts: widgets.Widget) -> widgets.VBox:
    heading = [widgets.HTML(escape(title))] if title else []
    return widgets.VBox([*heading, *parts], layout={"margin": "4px 8px 4px 0"})


def _figure(rows: dict[str, Drawing]) -> Figure:
    columns = max(len(row) for row in rows.values())
    fig, axes = plt.subplots(
        len(rows),
        columns,
        figsize=(min(8.0, 2.0 * columns), 2.1 * len(rows) * min(1, 4 / columns)),
        squeeze=False,
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for line, (caption, drawing) in zip(axes, rows.items(), strict=True):
        for column, (axis, (title, image)) in enumerate(zip(line, drawing.items(), strict=False)):
            axis.imshow(np.asarray(image.clamp(0, 1).permute(1, 2, 0)), interpolation="none")
            axis.set_title(title if column else f"{caption}:\n{title}", fontsize=8)
    return fig
