"""`sit doctor`: what it says of a machine that lacks something."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml

from sitlib.cli import doctor, main
from sitlib.cli.doctor import Finding, line
from workbook.paths import ROOT


def absent(name):
    raise ModuleNotFoundError(f"No module named {name!r}")


def only(**modules):
    """An importer to which all other modules are absent."""
    return lambda name: modules[name] if name in modules else absent(name)


def cuda(available, **properties):
    return only(
        torch=SimpleNamespace(
            cuda=SimpleNamespace(
                is_available=lambda: available,
                device_count=lambda: 1,
                get_device_properties=lambda index: SimpleNamespace(**properties),
                is_bf16_supported=lambda including_emulation: properties["bf16"],
            )
        )
    )


def vision(kept):
    """A torchvision whose operator answers, or fails as one for another torch does."""

    def nms(boxes, scores, limit):
        if kept is None:
            raise RuntimeError("operator torchvision::nms does not exist")
        return torch.tensor(kept)

    return only(
        torch=torch, torchvision=SimpleNamespace(ops=SimpleNamespace(nms=nms), __version__="0")
    )


WEIGHTS = "python -m sitlib.metrics.weights"
CASES = {
    "python": (lambda: doctor.python((3, 11, 0)), True, True, ""),
    "old python": (lambda: doctor.python((3, 10, 9)), False, True, "Install Python 3.11"),
    "packages": (lambda: doctor.packages(listed=["torch>=2", "numpy"]), True, True, ""),
    "absent package": (
        lambda: doctor.packages(listed=["no-such-thing>=1"]),
        False,
        True,
        "pip install -e .",
    ),
    "old package": (lambda: doctor.packages(listed=["numpy>=99"]), False, True, "pip install -e ."),
    "part lab": (lambda: doctor.packages("lab", ["no-such-thing"]), False, False, '".[lab]"'),
    "nothing listed": (lambda: doctor.packages(listed=[]), False, True, "pip install -e ."),
    "torch pair": (doctor.torch_pair, True, True, ""),
    "no torch": (
        lambda: doctor.torch_pair(absent),
        False,
        True,
        "pip install --force-reinstall torch torchvision",
    ),
    "other torch": (lambda: doctor.torch_pair(vision(None)), False, True, "from one index"),
    "wrong operator": (lambda: doctor.torch_pair(vision([0])), False, True, "from one index"),
    "no kernel": (lambda: doctor.kernel(absent), False, False, "ipykernel install"),
    "reachable": (
        lambda: doctor.weights("no/such/folder", lambda: True),
        False,
        False,
        f"fetched: run {WEIGHTS}",
    ),
    "offline": (
        lambda: doctor.weights("no/such/folder", lambda: False),
        False,
        False,
        "connect this machine",
    ),
    "untrained": (
        lambda: doctor.trained_models("no/such/folder"),
        False,
        False,
        "make repro (or dvc repro)",
    ),
    "disk": (lambda: doctor.disk(5e9), True, True, ""),
    "full disk": (lambda: doctor.disk(1e9), False, True, "Free 2 GB"),
    "little memory": (lambda: doctor.memory(1e9), False, False, "batch_size"),
    "memory": (lambda: doctor.memory(8e9), True, False, ""),
    "no gpu": (lambda: doctor.gpu(cuda(False), ""), True, False, ""),
    "driver without gpu": (
        lambda: doctor.gpu(cuda(False), "/bin/nvidia-smi"),
        False,
        False,
        "CUDA version",
    ),
    "no browser": (lambda: doctor.browser(lambda name: None), False, False, "apt install chromium"),
    "browser": (lambda: doctor.browser(lambda name: f"/bin/{name}"), True, False, ""),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_absent_is_found_and_mended_in_one_sentence(name):
    check, ok, needed, remedy = CASES[name]
    found = check()
    assert (found.ok, found.needed) == (ok, needed), found
    shown = line(found)
    if ok:
        assert shown.startswith("ok ") and "->" not in shown
    else:
        assert (
            remedy in found.remedy and found.remedy.endswith(".") and shown.endswith(found.remedy)
        )
        assert shown.startswith("missing" if needed else "optional")


def test_findings_name_what_they_are_about(tmp_path):
    assert "no-such-thing is missing" in doctor.packages(listed=["no-such-thing>=1"]).what
    assert "is not >=99" in doctor.packages(listed=["numpy>=99"]).what
    assert "operator torchvision::nms does not exist" in doctor.torch_pair(vision(None)).what
    gpu = doctor.gpu(cuda(True, name="GPU 9", total_memory=8e9, bf16=False))
    assert gpu.ok and gpu.what == "GPU: GPU 9 with 8 GB, without bf16"
    (tmp_path / "alexnet_lpips.safetensors").touch()
    lacking = doctor.weights(tmp_path, lambda: True)
    assert lacking.what == "weights of metrics: vgg16_lpips.safetensors not there"
    (tmp_path / "vgg16_lpips.safetensors").touch()
    assert doctor.weights(tmp_path, lambda: pytest.fail("asked the index")).ok


def test_a_kernel_of_another_python_is_told(tmp_path):
    def with_kernel(executable):
        spec = SimpleNamespace(get_kernel_spec=lambda name: SimpleNamespace(argv=[executable]))
        return only(**{"ipykernel": None, "jupyter_client.kernelspec": spec})

    assert doctor.kernel(with_kernel(sys.executable)).ok
    other = doctor.kernel(with_kernel(str(tmp_path / "python")))
    assert not other.ok and "another Python" in other.remedy and str(tmp_path) in other.what


def test_trained_models_are_those_of_the_pipeline(tmp_path):
    runs = doctor.pipeline_runs(yaml.safe_load((ROOT / "params.yaml").read_text()))
    assert {"tokenizer/sit5_sc_second-seed0", "autoregressive/ar_sit4-seed1"} <= set(runs)
    for run in runs[1:]:
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "model.safetensors").touch()
    found = doctor.trained_models(tmp_path)
    assert (
        f"{len(runs) - 1} of {len(runs)}, without {runs[0].split('/')[1]}" in found.what
        and not found.ok
    )


def test_the_exit_code_says_whether_something_needed_is_missing(monkeypatch, capsys):
    def check(ok, needed):
        return lambda: Finding("it", ok, "Mend it.", needed)

    def broken():
        raise RuntimeError("it cannot be")

    for checks, code, last in (
        ([check(True, True)], 0, "everything needed is there"),
        (
            [check(True, True), check(False, False), broken],
            0,
            "everything needed is there; 2 optional missing",
        ),
        ([check(False, True), check(True, True)], 1, "1 needed missing"),
    ):
        monkeypatch.setattr(doctor, "CHECKS", checks)
        assert main(["doctor"]) == code
        shown = capsys.readouterr().out.splitlines()
        assert len(shown) == len(checks) + 1 and shown[-1] == last
    monkeypatch.setattr(doctor, "CHECKS", [broken])
    main(["doctor"])
    assert (
        "broken: could not be looked at -> RuntimeError: it cannot be." in capsys.readouterr().out
    )


def test_every_check_runs_on_this_machine(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "weights_can_be_fetched", lambda: True)  # asks the network
    main(["doctor"])
    shown = capsys.readouterr().out
    assert (
        len(shown.splitlines()) == len(doctor.CHECKS) + 1 and "could not be looked at" not in shown
    )
    assert "whose operators work" in shown and "ok        packages: all" in shown


def test_a_machine_without_torch_is_examined_to_the_end():
    """In a process of its own, in which torch cannot be imported."""
    code = "import sys; sys.modules['torch'] = None; from sitlib.cli import main; sys.exit(main(['doctor']))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    shown = done.stdout.splitlines()
    assert done.returncode == 1 and done.stderr == ""
    assert len(shown) == len(doctor.CHECKS) + 1 and shown[-1].startswith("1 needed missing")
    assert [text.split()[1] for text in shown[:-1] if text.startswith("missing")] == ["torch"]
