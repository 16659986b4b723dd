"""Run every stage of the pipeline with the paper's shapes on eight images: `make paper-dry-run`.

    python scripts/paper_dry_run.py [--layers N]

It shows that the paper profile trains, extracts, samples, measures and reports from end to end,
before a GPU is paid for. Widths, vocabularies, codebooks, image sizes, token counts and variants
are the profile's; scaled are COUNTS below: steps, batches, images, samples. The project is copied
to scratch/paper-dry-run, with eight training and eight held-out images in the form of ImageNet and
of MS-COCO, and its pipeline runs there, so the results of the project itself are not touched. The
same command goes on where it was stopped.

On CPUs, sampling from models of 700M parameters takes hours, and the second decoder's 1.27 billion
parameters, their gradients, moments and average need 42 GB, swap included, and models and states
80 GB on the disk: nothing warns of less. `--layers 1` leaves one block of every stack, so that what
remains is checked in an hour or two, two stages at a time.
"""

import argparse
import filecmp
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from sitlib.data import ImageSource, open_captioned, open_images
from sitlib.strict import from_dict, to_dict
from workbook.paths import ROOT, resolve
from workbook.profile import Profile, read_yaml
from workbook.study import RESULTS

FOLDER = ROOT / "scratch/paper-dry-run"
IMAGES = 8  # of every split
SIDE = 576  # px of the images' shorter side: more than the largest of the profile, 512
# What the dry run has less of than profiles/paper.yaml, by section
COUNTS: dict[str, dict[str, Any]] = yaml.safe_load("""
data: {normalization_views: 32} # codebooks of 8,192 start from as many vectors: 256 of each view
tokenizer.optimizer: &few
  {steps: 2, batch_size: 2, warmup_steps: 1, decay_start: 0, log_every: 1, checkpoint_every: 1}
tokenizer.adversarial: {warmup: 1, ramp: 1}
tokenizer.evaluation.sets.imagenet: {views: 8}
tokenizer.evaluation.sets.coco: {views: 8}
tokenizer.evaluation.sets.extra: {views: 8}
tokenizer.evaluation: {inception: false} # its network is downloaded
autoregressive.codes: {views_per_image: 1, held_out_views: 8}
autoregressive.optimizer: *few
autoregressive.variants.ar_sit4_improved.optimizer: {steps: 2, batch_size: 2}
autoregressive.evaluation:
  {samples: 4, reference_views: 4, kid_subset_size: 2, neighbors: 1, guidance_sweep: [1.0, 1.5],
   top_p_sweep: [], sweep_samples: 4}
text.codes: {held_out_views: 8}
text.optimizer: *few
text.evaluation: {prompts: 4, candidates: 4, kid_subset_size: 2, neighbors: 1}
text.dual_encoder.optimizer: *few
applications:
  {images: 4, temperatures: [1.0], repeated: 1, samples: 2, previews: 2, preview_prompts: 2,
   rounds: 1, kid_subset_size: 2}
# One process without GPU; activation checkpointing stays as it is.
engine: {processes: 1, micro_batch_size: 1, data_workers: 0, images_every: 0}
""")
# Of params/paper.yaml these run: what params.yaml lists, the paper's larger model, 512 px, and a second
# decoder of a text-conditional model.
VARIANTS: dict[str, list[str]] = yaml.safe_load("""
tokenizers: [vit_vqgan, sit4, sit5, sit5_sc, sit6, vit_vqgan_512, captioned_vit_vqgan,
             captioned_sit4_sc, sit4_second, captioned_vit_vqgan_second]
codes: [vit_vqgan, sit4, sit5_sc, captioned_vit_vqgan, captioned_sit4_sc]
text_generators: [ar_captioned_vit_vqgan, ar_captioned_sit4_sc]
decoded_again: [ar_sit4_second, ar_captioned_vit_vqgan_second]
""")


def scaled(profile: dict[str, Any], layers: int | None) -> dict[str, Any]:
    """The paper profile with COUNTS, and at most `layers` blocks in every stack.

    Raises KeyError if COUNTS names what the profile has not.
    """
    for path, values in COUNTS.items():
        section = profile
        for key in path.split("."):
            section = section[key]
        for key, value in values.items():
            section[key]  # no new settings
            section[key] = value
    return shallow(profile, layers) if layers else profile


def shallow(settings: Any, layers: int) -> Any:
    """Settings in which no number of layers is above `layers`."""
    if not isinstance(settings, dict):
        return settings
    return {
        key: min(value, layers)
        if key.endswith("layers") and isinstance(value, int)
        else shallow(value, layers)
        for key, value in settings.items()
    }


def write_images(folder: Path) -> None:
    """Images of each split in the forms of ImageNet, `imagenet/train/class/name.jpg`, and MS-COCO,
    `coco/train2014/name.jpg` with captions; they are the project's, enlarged.
    """
    for split, name in (("train", "train"), ("test", "val")):
        photographs = open_images(resolve("data/landscapes"), split)
        captioned = open_captioned(resolve("data/emoji"), split, "names", count=5)
        listed: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
        for i in range(IMAGES):
            write_jpeg(photographs, i, folder / f"imagenet/{name}/class{i % 2}/{i}.jpg")
            position = i * (len(captioned.names) // IMAGES)
            write_jpeg(captioned.images, position, folder / f"coco/{name}2014/{i}.jpg")
            listed["images"].append({"id": i, "file_name": f"{i}.jpg"})
            texts = captioned.captions[position]
            listed["annotations"] += [{"image_id": i, "caption": text} for text in texts]
        file = folder / f"coco/annotations/captions_{name}2014.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(listed))


def write_jpeg(source: ImageSource, position: int, path: Path) -> None:
    _, image = source.picture(position)
    share = SIDE / min(image.size)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize([round(share * side) for side in image.size], Image.Resampling.BICUBIC).save(path)


def copy_project(folder: Path) -> None:
    """Copy the project's files that have changed; of results only those of the study."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in listed.splitlines():
        source, copy = ROOT / name, folder / name
        is_made = name.startswith(("metrics/", "reports/", "dvc.lock"))
        if is_made and not name.startswith(RESULTS):
            continue
        if source.is_file() and not (copy.is_file() and filecmp.cmp(source, copy, False)):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)


def prepare(folder: Path, layers: int | None) -> None:
    """Make `folder` a project of its own, with images, profile and parameters of the dry run."""
    copy_project(folder)
    if not (folder / "data/coco").exists():
        write_images(folder / "data")
    file = folder / "profiles/paper.yaml"  # with every default, without a base
    profile = to_dict(from_dict(Profile, read_yaml(file), file.name))
    write(file, scaled(profile, layers))
    params = read(folder / "params/paper.yaml") | {"throughput": {"rounds": 1, "batch_size": 1}}
    for name, variants in VARIANTS.items():
        params[name] = {f"{v}-seed0": params[name][f"{v}-seed0"] for v in variants}
    write(folder / "params.yaml", params)
    # Else every model is in DVC's cache a second time, where the file system knows no reflinks.
    (folder / ".dvc/config.local").write_text("[cache]\n    type = reflink,hardlink,copy\n")
    if not (folder / ".git").exists():  # DVC needs a repository of its own
        subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)


def read(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text())


def write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(yaml.safe_dump(content, sort_keys=False))


def run(folder: Path, jobs: int) -> int:
    """Exit status of the pipeline in the copy, whose own package comes first."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "JUPYTER_PREFER_ENV_PATH": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = ["workbook.run_stages", "dvc.yaml", "--jobs", str(jobs), "--alone", "throughput"]
    return subprocess.run([sys.executable, "-m", *command], cwd=folder, env=environment).returncode


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, help="most blocks in a stack (default: the paper's)")
    layers = parser.parse_args().layers
    if layers is not None and layers < 1:
        parser.error(f"--layers must be at least 1, it is {layers}")
    prepare(FOLDER, layers)
    # Stages of one block have room for two at a time: some 6 GB.
    sys.exit(run(FOLDER, 2 if layers else 1))


if __name__ == "__main__":
    main()
