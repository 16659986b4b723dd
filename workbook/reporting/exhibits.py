"""The interactive parts of the front page; `workbook.reporting.examples` makes what they show, `report.js` brings them to life."""

import json
from collections.abc import Mapping
from html import escape
from typing import Any

from workbook.reporting.comparison import BASELINE


def compare_exhibit(examples: Mapping[str, Any]) -> str:
    """A line to move between two versions of a photograph; `report.js` brings it to life."""
    names = list(examples["names"])
    ours = next((name for name in ("sit5", "sit4") if name in names), names[-1])
    left = BASELINE if BASELINE in names else names[0]

    def options(chosen: str) -> str:
        return "".join(
            f'<option value="{name}"{" selected" if name == chosen else ""}>{escape(examples["names"][name])}</option>'
            for name in names
        )

    first = examples["photographs"][0]

    def image(name: str, which: str) -> str:
        alt = f"{first['name']}, {examples['names'][name]}"
        png = first["images"][name]["png"]
        return f'<img class="{which}" src="{png}" width="448" height="448" alt="{escape(alt)}">'

    return (
        '<section class="exhibit" id="compare" data-compare aria-labelledby="compare-title">'
        '<h3 id="compare-title">Compare reconstructions</h3>'
        "<p>Held-out photographs, one of each class, the first of each and nothing picked. Drag the line, or use the arrow keys.</p>"
        "<fieldset data-photographs><legend>Photograph</legend></fieldset>"
        f'<div class="sides"><label>Left <select data-left>{options(left)}</select></label>'
        f"<label>Right <select data-right>{options(ours)}</select></label></div>"
        f'<div class="compare">{image(ours, "under")}{image(left, "over")}'
        '<span class="line"></span><span class="tag left"></span><span class="tag right"></span>'
        '<input type="range" min="0" max="100" value="50" aria-label="Place of the line between the left and the right version"></div>'
        '<p data-said aria-live="polite"></p></section>'
    )


def scale_exhibit(examples: Mapping[str, Any]) -> str:
    """A slider for the number of scales that are decoded, beside the original."""
    first, name = examples["photographs"][0], examples["names"][examples["scales_of"]]
    steps = first["scales"]
    return (
        '<section class="exhibit scales" id="scales" data-scales aria-labelledby="scales-title">'
        f'<h3 id="scales-title">Decode the first scales of {escape(name)}</h3>'
        "<p>The codes of a photograph, cut off after one scale, two scales and so on. Pixels are enlarged, not smoothed.</p>"
        "<fieldset data-photographs><legend>Photograph</legend></fieldset>"
        '<div class="sides"><label for="scale-count">Scales</label>'
        f'<input type="range" id="scale-count" min="1" max="{len(steps)}" value="{min(3, len(steps))}" step="1"></div>'
        '<p data-said aria-live="polite"></p>'
        f'<div class="pair"><div><img class="pixels" data-partial src="{steps[min(3, len(steps)) - 1]["png"]}" width="320" height="320" '
        f'alt="{escape(first["name"])} from its first scales">Decoded</div>'
        f'<div><img class="pixels" data-original src="{first["images"]["original"]["png"]}" width="320" height="320" '
        f'alt="{escape(first["name"])}, original">Original</div></div></section>'
    )


def embedded(examples: Mapping[str, Any]) -> str:
    """The examples as data inside the page."""
    text = json.dumps(examples).replace("</", "<\\/")
    return f'<script type="application/json" id="examples">{text}</script>'
