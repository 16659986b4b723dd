"""The story of the front page in five figures, and the headline beside the paper's: from metrics, examples and executed notebooks."""

import base64
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import matplotlib.pyplot as plt
import nbformat
from matplotlib.figure import Figure

from workbook.reporting.comparison import BASELINE, Scores, change, with_interval
from workbook.reporting.exhibits import compare_exhibit, scale_exhibit
from workbook.reporting.generation_plots import throughput_bars
from workbook.reporting.names import label
from workbook.reporting.page import Place, figure, inline
from workbook.reporting.paper import CLASS_FID, FULL_SIZE, RECONSTRUCTION, TEXT_FID
from workbook.reporting.plots import colour, png, style, svg

Records = Mapping[str, Sequence[Scores]]  # variant -> metrics of its seeds

OVERVIEW_ALT = (
    "A photograph, its wavelet pyramid cut into the same number of patches at every scale, the codes of each scale "
    "as coloured cells, and the reconstruction from the codes."
)


@dataclass(frozen=True)
class Results:
    """What a run left behind, as far as the front page tells of it; what is missing is left out of the page."""

    headline: Mapping[str, Any]
    tokenizers: Records = field(default_factory=dict)
    generation: Records = field(default_factory=dict)
    text: Records = field(default_factory=dict)
    throughput: Mapping[str, Any] | None = None
    applications: Mapping[str, Any] | None = None
    examples: Mapping[str, Any] | None = None
    overview: bytes | None = None
    notebooks: Mapping[str, nbformat.NotebookNode] = field(default_factory=dict)  # by stem

    @property
    def judged(self) -> tuple[str, int] | None:
        """Set of images and side in px at which tokenizers are compared; None where the baseline was not judged."""
        for record in self.tokenizers.get(BASELINE, []):
            if "sets" in record:
                images = next(iter(record["sets"]))
                return images, max(map(int, record["sets"][images]))
        return None


def against_baseline(results: Results) -> list[dict[str, Any]]:
    """Every tokenizer of the paper's table beside the baseline: change in PSNR, dB, and ratio of LPIPS, ours as (value, low, high)."""
    if results.judged is None:
        return []
    images, size = results.judged
    paper = {row.variant: row for row in RECONSTRUCTION if row.size == FULL_SIZE}
    base, rows = results.tokenizers[BASELINE], []
    for name, row in paper.items():
        if name != BASELINE and name in results.tokenizers:
            both, base_psnr = (results.tokenizers[name], base), paper[BASELINE].psnr
            rows.append(
                {
                    "variant": name,
                    "psnr": change(*both, "psnr", "difference", images, size),
                    "lpips": change(*both, "lpips_alex", "ratio", images, size),
                    "paper_psnr": None
                    if row.psnr is None or base_psnr is None
                    else row.psnr - base_psnr,
                    "paper_lpips": row.lpips / paper[BASELINE].lpips,
                }
            )
    return rows


def _mean(records: Sequence[Scores], key: str) -> float:
    return statistics.fmean(record[key] for record in records)


def headline_rows(results: Results) -> list[dict[str, Any]]:
    """Differences (dB) and ratios to the baseline, the paper's beside ours, a row for each model and measure."""
    rows = []

    def add(model: str, measure: str, paper: str | None, ours: str) -> None:
        rows.append({"model": label(model), "measure": measure, "paper": paper, "ours": ours})

    for row in against_baseline(results):
        paper = None if row["paper_psnr"] is None else f"{row['paper_psnr']:+.1f}"
        add(row["variant"], "PSNR, dB ↑", paper, with_interval(*row["psnr"], sign="+"))
        add(
            row["variant"],
            "LPIPS ↓",
            f"x {row['paper_lpips']:.2f}",
            f"x {with_interval(*row['lpips'])}",
        )
    for records, reported in ((results.generation, CLASS_FID), (results.text, TEXT_FID)):
        for (ours, base), (paper, paper_base) in reported.items():
            if ours in records and base in records:
                ratio = _mean(records[ours], "fd_lite0") / _mean(records[base], "fd_lite0")
                add(
                    ours,
                    "distance to real images ↓",
                    f"x {paper / paper_base:.2f}",
                    f"x {ratio:.2f}",
                )
    for row in (results.throughput or {"rows": []})["rows"]:
        if row["geometry"] == "paper" and row["paper_ratio"]:
            size = f" at {row['size']} px"
            ratios = (f"x {row['paper_ratio']:.2f}", f"x {row['ratio']:.2f}")
            add(next(iter(row["images_per_second"])), f"images a second{size} ↑", *ratios)
    return rows


def reconstruction_plot(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Change against the baseline, ours with intervals beside the paper's, one panel for PSNR and one for LPIPS."""
    fig, axes = plt.subplots(1, 2, figsize=(8.2, 0.55 * len(rows) + 1.5), sharey=True)
    panels = (
        ("psnr", "PSNR against ViT-VQGAN, dB (right is better)", 0),
        ("lpips", "LPIPS, times ViT-VQGAN's (left is better)", 1),
    )
    for axis, (key, title, same) in zip(axes, panels, strict=True):
        axis.axvline(same, color="0.3", linewidth=1, linestyle="--")
        for place, row in enumerate(rows):
            value, low, high = row[key]
            tone = colour(row["variant"])
            axis.errorbar(
                value, place, xerr=[[value - low], [high - value]], fmt="o", color=tone, capsize=3
            )
            if row[f"paper_{key}"] is not None:
                axis.plot(row[f"paper_{key}"], place + 0.22, "D", mfc="white", mec="0.25", ms=6)
        axis.set(xlabel=title, yticks=range(len(rows)), ylim=(len(rows) - 0.4, -0.6))
        axis.set_yticklabels([label(row["variant"]) for row in rows])
        axis.grid(axis="y", visible=False)
    handles = [
        plt.Line2D(
            [], [], marker="o", color="0.25", linestyle="-", label="here, with 95 % interval"
        ),
        plt.Line2D([], [], marker="D", mfc="white", mec="0.25", color="none", label="the paper"),
        plt.Line2D([], [], color="0.3", linestyle="--", linewidth=1, label="ViT-VQGAN"),
    ]
    fig.legend(handles=handles, loc="outside upper center", ncols=3)
    return fig


def drawn(fig: Figure) -> bytes:
    """A figure of ours as SVG, or as PNG if it shows pixels; closes it."""
    vectors = svg(fig)
    data = vectors.encode() if vectors else png(fig)
    plt.close(fig)
    return data


def from_notebook(results: Results, stem: str, begins: str) -> tuple[bytes, str] | None:
    """(PNG or SVG, text alternative) of the first figure of an executed notebook whose text alternative begins so."""
    for cell in results.notebooks[stem].cells if stem in results.notebooks else []:
        for output in cell.get("outputs", []):
            alt = output.get("metadata", {}).get("image/png", {}).get("alt", "")
            if alt.startswith(begins):
                vectors = output.data.get("image/svg+xml")
                return vectors.encode() if vectors else base64.b64decode(
                    output.data["image/png"]
                ), alt
    return None


def _about(stem: str, links: Mapping[str, str], text: str) -> str:
    return f' More: <a href="{escape(links[stem])}">{escape(text)}</a>.' if stem in links else ""


def story(
    results: Results,
    links: Mapping[str, str],
    captions: Mapping[str, Mapping[str, str]],
    place: Place = inline,
) -> list[tuple[str, str, str]]:
    """Sections of the front page that can be told of this run: (id, heading, HTML).

    Args:
        links: stem of a notebook -> its page.
        captions: of notebooks and of the front page, as in captions.yaml.
        place: where figures go.
    """
    style()
    sections, count = [], iter(range(1, 100))

    def show(data: bytes, alt: str, caption: str) -> str:
        return figure(data, alt, next(count), caption, place)

    def reused(stem: str, begins: str, more: str = "") -> str:
        found = from_notebook(results, stem, begins)
        return (
            show(*found, captions.get(stem, {}).get(begins, escape(found[1])) + more)
            if found
            else ""
        )

    if results.overview is not None:
        text = (
            "<p>A wavelet transform takes a photograph apart into scales: a small version of it, and the details that each doubling of the "
            "size adds. SIT cuts every scale into the <strong>same number of patches</strong> and replaces each patch by one code of a "
            "learned table. The finer a scale, the more values share a code. ViT-VQGAN, the usual tokenizer, cuts the pixels "
            "themselves into patches.</p>"
        )
        caption = captions["index"]["what"]
        caption += _about("01_wavelet_analysis", links, "what wavelets see in an image")
        sections.append(
            ("what", "What SIT is", text + show(results.overview, OVERVIEW_ALT, caption))
        )
    judged = results.judged
    if judged is not None and (rows := against_baseline(results)):
        said = "; ".join(
            f"{label(row['variant'])} {row['psnr'][0]:+.2f} dB PSNR and {row['lpips'][0]:.2f} times the LPIPS"
            for row in rows
        )
        tokens = f"Measured on held-out photographs at {judged[1]} px against ViT-VQGAN: {said}."
        alt = f"Change of PSNR and ratio of LPIPS against ViT-VQGAN, here and in the paper. {said}."
        caption = captions["index"]["reconstruction"]
        body = f"<p>{tokens} Move the line below to see it.</p>"
        if results.examples:
            body += compare_exhibit(results.examples)
        body += show(
            drawn(reconstruction_plot(rows)),
            alt,
            caption + _about("02b_tokenizer_results", links, "the tokenizers compared"),
        )
        sections.append(("reconstruction", "Reconstruction", body))
    generated = reused(
        "03b_generation_results",
        "A few images while they are drawn",
        _about("03b_generation_results", links, "class-conditional generation compared"),
    )
    partial = (
        scale_exhibit(results.examples)
        if results.examples and results.examples["scales_of"]
        else ""
    )
    if generated or partial:
        text = (
            "<p>The codes of a scale-causal tokenizer can be decoded from the coarsest scale on, so the first codes of a sequence are "
            "already an image. An autoregressive model that writes them one by one therefore draws from coarse to fine.</p>"
        )
        sections.append(("generation", "From coarse to fine", text + partial + generated))
    if results.applications:
        sections.append(
            (
                "applications",
                "Upsampling and editing",
                _applications(
                    results, reused, _about("05a_applications", links, "applications, measured")
                ),
            )
        )
    if results.throughput:
        sections.append(("cost", "What it costs", _cost(results, show, links, captions)))
    return sections


def _spoken(name: str) -> str:
    """Name of a model inside a sentence: "AR-SIT-SC-4 (emoji)"."""
    first, _, rest = label(name).partition(", ")
    return escape(f"{first} ({rest})" if rest else first)


def _applications(results: Results, reused, more: str) -> str:
    said, applications = [], results.applications
    assert applications is not None
    for name, shares in applications.get("upsampling", {}).items():
        share = next(iter(shares))
        ways = shares[share]
        told = next((way for way in ways if way.startswith("told, temperature 1")), None)
        if told:
            low, high = ways[told]["lpips_ratio_interval"]
            said.append(
                f"details drawn by {_spoken(name)} have {ways[told]['lpips_ratio']:.2f} [{low:.2f}, {high:.2f}] times the LPIPS of "
                f"bicubic enlargement from 1/{share} of the side, and a PSNR lower by "
                f"{ways['bicubic']['psnr'] - ways[told]['psnr']:.1f} dB"
            )
    parts = ["<p>A model over coarse-to-fine codes can be given some scales and draw the others."]
    if said:
        parts.append(f" Upsampling: {'; '.join(said)}. Such details are plausible, not right.")
    parts += ["</p>", reused("05a_applications", "AR-SIT-SC-5: images of 8 px", more)]
    if kept := applications.get("editing", {}).get("kept"):
        none, one = kept["0"]["r_precision_new"]["value"], kept["1"]["r_precision_new"]["value"]
        parts.append(
            "<p>Editing keeps the codes of the coarse scales to the bit and draws the rest for another caption. The new caption is "
            f"recognised in {none:.1f} % of the images when nothing is kept and in {one:.1f} % when one scale is "
            f"(chance: {100 / applications['editing']['candidates']:.0f} %).</p>"
        )
    return "".join([*parts, reused("05a_applications", "Six emoji in rows", more)])


def _cost(
    results: Results, show, links: Mapping[str, str], captions: Mapping[str, Mapping[str, str]]
) -> str:
    throughput = results.throughput
    assert throughput is not None
    rows = [row for row in throughput["rows"] if row["geometry"] == "profile"]
    ours, base = rows[0]["images_per_second"]
    speeds = ", ".join(f"{row['ratio']:.2f} at {row['size']} px" for row in rows)
    text = (
        "<p>A small image needs only the first scales. Images sampled and decoded a second, in this profile's geometry: "
        f"{escape(label(ours))} makes as many as {escape(label(base))}, which always draws the whole image, times {speeds}."
    )
    sizes = {
        name: records[0]["parameters"]
        for name, records in results.tokenizers.items()
        if "parameters" in records[0]
    }
    if BASELINE in sizes and "sit4" in sizes:
        text += (
            f" {label('sit4')} has {sizes['sit4'] / 1e6:.1f} million parameters where {label(BASELINE)} has "
            f"{sizes[BASELINE] / 1e6:.1f}, because approximation and details have their own."
        )
    alt = f"Images a second of {label(ours)} and {label(base)} at every size, in this profile's and in the paper's geometry: {speeds}."
    caption = captions["index"]["cost"]
    caption += _about("03c_sampling_speed", links, "how fast images are sampled")
    return f"{text}</p>" + show(drawn(throughput_bars(throughput["rows"])), alt, caption)
