"""Starting processes: torchrun, srun and the SLURM script, and what is told when one fails."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from processes import in_two_processes

from sitlib.train.config import ONE_PROCESS
from workbook.paths import ROOT
from workbook.profile import load_profile
from workbook.runs import launch_command, stream

EIGHT = replace(ONE_PROCESS, processes=8)


def test_one_machine_is_started_with_torchrun_and_several_with_srun(monkeypatch):
    expected = "-m torch.distributed.run --nproc-per-node 8 --standalone -m module"
    assert launch_command(EIGHT, ["-m", "module"], {})[1:] == expected.split()
    with pytest.raises(ValueError, match="start this from a SLURM job of as many nodes"):
        launch_command(replace(EIGHT, machines=4), [], {"MASTER_ADDR": "a"})
    sentence = r"job has 2 node\(s\), .* is 4: .*--nodes=4\), or set mach"
    with pytest.raises(ValueError, match=sentence):
        job = {"SLURM_JOB_NUM_NODES": "2", "MASTER_ADDR": "a"}
        launch_command(replace(EIGHT, machines=4), [], job)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    job = {"SLURM_JOB_NUM_NODES": "4", "SLURM_CPUS_PER_TASK": "64", "MASTER_ADDR": "a"}
    command = launch_command(replace(EIGHT, machines=4), ["-m", "module"], job)
    srun = "srun --nodes 4 --ntasks-per-node 1 --kill-on-bad-exit=1 --cpus-per-task 64"
    assert command[:9] == [*srun.split(), sys.executable]


FAILING = """
from sitlib.train.distributed import barrier, rank
from workbook.runs import training_command

def train(*_):
    if rank() == 1:
        raise OSError(28, 'no room')
    barrier()

training_command(train)
"""


def test_an_error_in_one_process_is_told_and_ends_the_others(tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    run = ["--profile", "smoke", "--variant", "sit4"]
    result = in_two_processes(tmp_path / "failing.py", *run, timeout=60)  # 0 would wait for hours
    assert result.returncode != 0 and "disk is full" in result.stderr, result.stderr[-2000:]


def test_what_a_program_prints_appears_and_its_exit_code_is_told(capsys):
    assert stream([sys.executable, "-c", "print('grün', flush=True); raise SystemExit(3)"]) == 3
    assert capsys.readouterr().out == "grün\n"


def test_the_slurm_script_asks_for_what_its_profile_uses():
    script = (ROOT / "scripts/slurm.sh").read_text()
    asked = dict(re.findall(r"^#SBATCH --(\S+)=(\S+)$", script, re.MULTILINE))
    (name,) = re.findall(r"PROFILE:-(\w+)", script)
    engine = load_profile(name).engine
    assert (asked["nodes"], asked["gpus-per-node"]) == (str(engine.machines), str(engine.processes))


@pytest.mark.parametrize("restarts", [0, 1])
def test_the_slurm_script_checks_its_nodes_and_after_a_requeue_removes_dvcs_marks(
    tmp_path, restarts
):
    marks = tmp_path / ".dvc/tmp/rwlock"
    for file, text in (
        (tmp_path / "programs/python", '#!/bin/sh\necho "$@" >> called\n'),
        (tmp_path / "programs/scontrol", "#!/bin/sh\necho first; echo second\n"),
        (tmp_path / ".venv/bin/activate", ""),
        (marks, "{}"),
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
    job = {"SUBMIT_DIR": tmp_path, "JOB_NODELIST": "nodes", "RESTART_COUNT": restarts}
    environment = {f"SLURM_{name}": str(value) for name, value in job.items()}
    environment["PATH"] = f"{tmp_path}/programs{os.pathsep}{os.environ['PATH']}"
    command = ["bash", ROOT / "scripts/slurm.sh", "-S", "data_folder=x"]
    subprocess.run(command, env=environment, check=True)
    assert (tmp_path / "called").read_text().splitlines() == [
        "-m workbook.preflight paper",
        "-m dvc exp run --set-param profile=paper -S data_folder=x",
    ]
    assert marks.exists() == (not restarts)
