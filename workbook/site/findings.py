"""What came out, in words and tables: for README, the front page and notebook 02b.

Everything is made from `metrics/results.json`; README's part stands between marks.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sitlib.files import write_json
from workbook.figures.tables import markdown_table
from workbook.names import of_each
from workbook.site.compare import RECONSTRUCTION, with_interval
from workbook.site.results import LENGTHS, ORDERED, gather, read_json

VERDICTS = {
    "holds": "Holds",
    "the other way round": "The other way round",
    "undecided": "Undecided",
}
OTHER = {"lpips_alex": "LPIPS-Alex", "psnr": "PSNR", "fd_lite0": "FD-Lite0"}  # than LPIPS-VGG
MARKS = {name: (f"<!-- {name} -->", f"<!-- end of {name} -->") for name in ("summary", "results")}
NARROW = ("model", "bits", "entropy-coded", "parameters, M", "MFLOP", "LPIPS-VGG ↓", "PSNR, dB ↑")
NARROW += ("LPIPS-VGG, x first row", "in the paper", "x at equal bits")


def claim_rows(
    claims: Mapping[str, Mapping[str, Any]], otherwise: Mapping[str, Any] | None = None
) -> list[dict[str, str]]:
    """Rows of claims: the contrast in the claim's measure with its interval, and the verdict; also
    those of other measures, `otherwise` of the results."""
    rows = []
    for name, claim in claims.items():
        digits, unit = (2, " dB") if claim["measure"] == "psnr" else (3, "")
        bounds = claim["value"], claim["low"], claim["high"]
        difference = with_interval(*bounds, digits, "+") + unit if claim["seeds"] else ""
        told = {"difference": difference, "p": p_of(claim) if claim["seeds"] else ""}
        if "costs" in claim:
            told["bits, parameters, operations"] = ", ".join(
                f"x {cost:.2f}" for cost in claim["costs"]
            )
        here = [claim["verdict"], *(turned(name, otherwise) if otherwise else [])]
        rows.append({"claim": name, **told, "here": "; ".join(here)})
    return rows


def p_of(claim: Mapping[str, Any]) -> str:
    """A p-value adjusted for all claims."""
    return "< 0.001" if claim["holm"] < 0.001 else f"{claim['holm']:.3f}"


def by_verdict(claims: Mapping[str, Mapping[str, Any]]) -> str:
    """Claims by their verdicts, with p where one is decided and costs where they differ."""
    found = {title: [] for title in VERDICTS.values()}
    for name, claim in claims.items():
        if claim["verdict"] in VERDICTS:
            costs = zip(claim["costs"], ("bits", "parameters", "operations"), strict=True)
            differ = [f"{cost:.2f} times the {what}" for cost, what in costs if abs(cost - 1) > 0.1]
            notes = [", ".join(differ)] if differ else []
            notes += [f"p {p_of(claim)}"] if claim["verdict"] != "undecided" else []
            note = f" ({'; '.join(notes)})" if notes else ""
            found[VERDICTS[claim["verdict"]]].append(name + note)
    return ". ".join(f"{title}: {'; '.join(names) or 'none'}" for title, names in found.items())


def summary_of_findings(results: Mapping[str, Any]) -> list[str]:
    """What came out, in a few sentences: as many as there are results for."""
    said, claims = [], results["claims"]
    difference = {row["claim"]: row["difference"] for row in claim_rows(claims)}
    if any(claim["seeds"] for claim in claims.values()):
        each = by_verdict({name: claim for name, claim in claims.items() if claim["paper"]})
        said += [
            "The paper's claims about tokenizers, as tested here by LPIPS-VGG, a distance to the photograph as a network sees it "
            f"(lower is better). {each}.",
            said_of_measures(results),
        ]
    ratios: dict[str, list[str]] = {}  # after the shortest training, the largest, the longest
    for row in results["lengths"]:
        (_, model), (_, measure), *of_steps = row.items()
        largest = max(of_steps, key=lambda item: float(item[1]))
        chosen = dict.fromkeys([of_steps[0], largest, of_steps[-1]])
        each = ", ".join(f"x {ratio} after {steps}" for steps, ratio in chosen)
        ratios.setdefault(model, []).append(f"{each} by {measure}")
    lifted = "A bilinear prediction helps Haar"
    own = "Own parameters for approximation and details help"
    behind = "SIT-4 reconstructs better than ViT-VQGAN at as many bits"
    ahead = (
        "Our SIT-4 with a bilinear prediction reconstructs better than ViT-VQGAN at as many bits"
    )
    parameters = {
        name: claims[name]["costs"][1] for name in (behind, ahead) if claims[name]["costs"]
    }
    if behind in parameters and (ours := ratios.get(LENGTHS["sit4"])):
        said.append(
            "Distances of SIT-4 with the paper's architecture, trained as all models here, over those of ViT-VQGAN with as many bits and "
            f"1 / {parameters[behind]:.2f} of the parameters: {'; '.join(ours)} (below 1: better; one seed; after the shortest, the "
            "worst and the longest training; the tables have three seeds). The paper has x "
            f"{RECONSTRUCTION[1].lpips / RECONSTRUCTION[0].lpips:.2f} by LPIPS, on ImageNet at 256 px."
        )
    if all(claims[name]["seeds"] for name in (lifted, own, behind)):
        change, gap = (
            (difference[name], f"{with_interval(*claims[name]['also']['psnr'], sign='+')} dB")
            for name in (lifted, behind)
        )
        said.append(
            "Why, as far as it can be told: if the details of SIT-4 are what a bilinear enlargement of the coarser scale leaves over, "
            f"LPIPS-VGG changes by {change[0]} and PSNR by {change[1]}; SIT-4 less ViT-VQGAN is {' and '.join(gap)}. Parameters of their own for "
            f"approximation and details change LPIPS-VGG by {difference[own]}."
        )
    if ahead in parameters and (ours := ratios.get(LENGTHS["sit4_ours_lifted"])):
        said.append(
            "Distances of our SIT-4, with this prediction and more, over those of ViT-VQGAN with as many bits and "
            f"1 / {parameters[ahead]:.2f} of the parameters: {'; '.join(ours)}. Whether it is better with three seeds, after the steps "
            "of the tables alone: "
            f"{', '.join([claims[ahead]['verdict'] + ' by LPIPS-VGG', *turned(ahead, results['otherwise'])])}."
        )
    for row in results.get("headline", [])[:1]:
        other = row.get("trained again")
        again = f"; all models trained once more, {other}" if other else ""
        share = parameters.get(behind)
        more = f", whose tokenizer has 1 / {share:.2f} of the parameters" if share else ""
        said.append(
            f"Images of {row['model']} are {row['ours']} as far (FD-Lite0, one seed; KID: {row['KID']}) from real ones as those of a model over "
            f"ViT-VQGAN's codes{more} (FID {row['paper']} in the paper){again}."
        )
    titles = {
        "photographs": "photographs, codes known by their vectors",
        ORDERED["own"]: "photographs, codes with embeddings of their own",
        "emoji": "emoji",
    }
    key, fewest = "nats per image ↓", []
    for images, title in titles.items():
        of = {row["order"]: row[key] for row in results["orders"] if row["images"] == images}
        if len(of) > 1 and "coarse to fine" in of:
            best = min(of, key=lambda order: of[order])
            fewest.append(f"{title}: {best} ({of[best]}; coarse to fine {of['coarse to fine']})")
    if fewest:
        said.append(
            "The order of writing in which codes take the fewest nats an image (one tokenizer, three seeds of the model): "
            f"{'; '.join(fewest)}. What coarse to fine gives is an image at any time."
        )
    return said


def said_of_measures(results: Mapping[str, Any]) -> str:
    """Verdicts on the paper's claims that another measure turns."""
    of_paper = [name for name, claim in results["claims"].items() if claim["paper"]]
    other = results["otherwise"]
    each = [f"{n}: {', '.join(said)}" for n in of_paper if (said := turned(n, other))]
    return (
        "The measure matters, and the paper does not name its LPIPS network. Other verdicts, p adjusted for all claims in all four "
        "measures (LPIPS-Alex is a part of every model's loss; FD-Lite0 is a distance between the set of all crops and that of their "
        f"reconstructions, whose error is known over seeds alone): {'; '.join(each) or 'none'}."
    )


def turned(claim: str, otherwise: Mapping[str, Any]) -> list[str]:
    """Verdicts on a claim that other measures turn, and which these are."""
    found: dict[str, list[str]] = {}
    for key, title in OTHER.items():
        if of := otherwise[key].get(claim):
            p = f" (p {p_of(of)})" if of["verdict"] != "undecided" else ""
            found.setdefault(of["verdict"], []).append(title + p)
    return [f"{verdict} by {' and '.join(titles)}" for verdict, titles in found.items()]


def said_of_trials(results: Mapping[str, Any]) -> str:
    """How many trainings settings of each model were chosen by."""
    trials = "; ".join(f"{name} {count}" for name, count in results["trials"].items())
    said = f"Trainings by which settings were chosen, on photographs of their own: {trials}. 02c tells of older ones."
    ratios = [
        f"x {of['ratio']:.2f} by {name} after {of['steps']} steps"
        for name, of in results["by_optimizer"].items()
    ]
    if ratios:
        said += f" LPIPS-VGG of the paper's SIT-4 over that of ViT-VQGAN in them: {', '.join(ratios)} (one seed each)."
    return said


def findings(results: Mapping[str, Any]) -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """Name -> caption and rows of the tables of README and front page."""
    claims = results["claims"]
    of_paper, ours = (
        claim_rows(
            {name: claim for name, claim in claims.items() if claim["paper"] == paper},
            results["otherwise"],
        )
        for paper in (True, False)
    )
    protocol = results.get("protocol", {})
    sampled = [
        f"{how['samples']} samples against {how['reference_images']} held-out views of {how['reference_groups']} {of}, {how['reference_size']} px, "
        f"top-p {of_each(how['top_p'])}, guidance {of_each(how['guidance'])}"
        for name, of in (("generators", "photographs"), ("text_generators", "names"))
        if (how := protocol.get(name))
    ]
    notes = [
        "Generators, one seed of each: ratios to the model over ViT-VQGAN's codes (x), and %; what their tokenizers have more of: 03b, 04b",
        f"Distances are FD-Lite0 of {' or, captioned, '.join(sampled)}; ± is a standard error over photographs or names, brackets are over names",
        "FD of so few samples draws ratios towards 1; KID does not",
        "Other samplers: both models with each top-p and guidance of the sweeps",
        "Few samples near training views are no success by themselves: what is far from everything is far from these, too (03b, section 8)",
    ]
    if again := protocol.get("trained again"):
        how = f"tokenizers included, precision {again['precision']}"
        notes.append(f"Trained again: all of it once more, {how}")
    if shape := protocol.get("throughput"):
        how = f"{shape['tokens']:,} codes of {shape['size']} px, {shape['transformer']}"
        notes.append(
            f"Images a second: random weights, {how}; the baseline draws all codes whatever the size"
        )
    captions = {
        "claims": "The paper's claims about tokenizers, as differences of LPIPS-VGG (below 0: better) with 95 % "
        f"intervals of each alone; bits, parameters and operations of the first, times those of the second; p and verdict by Holm's "
        f"method over all {len(claims)} claims, ours included, and where another measure says otherwise, its verdict, over all claims "
        f"in all four measures. {results['measured']}",
        "reconstruction": f"Tokenizers: means over seeds and photographs. {results['measured']}",
        "lengths": "LPIPS-VGG and FD-Lite0 over those of ViT-VQGAN after as many steps of training (one seed; below 1 "
        "the model is ahead)",
        "own_claims": "Claims of ours, likewise (dB: of PSNR, above 0 is better)",
        "headline": ". ".join(notes),
        "orders": "The order of writing alone, with the same codes and transformer: means over three seeds of "
        "it, one tokenizer for each kind of images; FD-Lite0 of so many samples and as many held-out views after the tokenizer, top-p and "
        "guidance those of the models that write coarse to fine (03b, section 4)",
    }
    narrow = [{key: row[key] for key in NARROW} for row in results["reconstruction"]]
    shown = {**results, "claims": of_paper, "own_claims": ours, "reconstruction": narrow}
    return {name: (of, shown[name]) for name, of in captions.items() if shown.get(name)}


def with_results(text: str, results: Mapping[str, Any]) -> str:
    """README's text with the results between their marks."""
    tables = []
    for caption, rows in findings(results).values():
        tables += ["", f"{caption}.", "", markdown_table(rows, digits=1)]
    tables += ["", said_of_trials(results)]
    short = [f"- {sentence}" for sentence in summary_of_findings(results)]
    for lines, (start, end) in zip((short, tables), MARKS.values(), strict=True):
        before, rest = text.split(start)
        text = "\n".join([before + start, *lines, end + rest.split(end)[1]])
    return text


def write_results(root: Path) -> None:
    """Write metrics/results.json, and its headline into README.md."""
    write_json(root / "metrics/results.json", gather(root))
    results = read_json(root / "metrics/results.json")  # rounded there: both tell the same
    readme = root / "README.md"
    readme.write_text(with_results(readme.read_text("utf-8"), results), encoding="utf-8")
