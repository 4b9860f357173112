"""docs/cluster/: the script for Slurm, run with stand-ins for its commands; the manifest and the Dockerfile, read."""

import ast
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from common.config import load_config
from tests.commands import CONFIG

PROJECT = Path(__file__).parents[1]
CLUSTER = PROJECT / "docs" / "cluster"
SCRIPT = CLUSTER / "train.sbatch"
JOB = str(os.getpid())  # the script's port follows from it


# Slurm's commands as far as the script uses them. As seen with Slurm: srun that is told to end kills its tasks.
STAND_INS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; "$@" & echo $! > "$SLURM/agent"\n'
    "trap 'kill -KILL $!' TERM; wait $!",
    "scancel": '[ "$*" = "--signal=TERM $SLURM_JOB_ID" ] && kill -TERM "$(cat "$SLURM/agent")"',
    "scontrol": 'if [ "$1 $2" = "show job" ]; then cat "$SLURM/job"; else echo "$*" >> "$SLURM/asked"; fi',
    "hostname": "echo localhost",
}


class Slurm:
    """A folder that stands for Slurm: `start` does what Slurm does with a job whose turn has come."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "job").write_text("JobState=RUNNING PreemptTime=None\n")
        for name, text in STAND_INS.items():
            executable(folder / name, text)
        self.started: list[subprocess.Popen] = []

    def start(self, *arguments: object, cwd: Path) -> subprocess.Popen:
        environment = {
            "PATH": f"{self.folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SLURM": str(self.folder),
            "SLURM_JOB_ID": JOB,
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_JOB_NODELIST": "here",
            "SLURM_CPUS_ON_NODE": "2",
            "SLURM_RESTART_COUNT": str(len(self.started)),
            "NPROC_PER_NODE": "2",
            "OMP_NUM_THREADS": "1",
        }
        script = subprocess.Popen(
            ["bash", str(SCRIPT), *map(str, arguments)],
            cwd=cwd,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started.append(script)
        return script

    @property
    def agent(self) -> int:
        wait_for(lambda: (self.folder / "agent").exists() and (self.folder / "agent").read_text())
        return int((self.folder / "agent").read_text())

    @property
    def requeued(self) -> int:
        asked = self.folder / "asked"
        lines = asked.read_text().splitlines() if asked.exists() else []
        assert set(lines) <= {f"requeue {JOB}"}
        return len(lines)


def executable(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def slurm(tmp_path):
    folder = tmp_path / "slurm"
    folder.mkdir()
    made = Slurm(folder)
    yield made
    for script in made.started:
        if script.poll() is None:  # the test has failed
            with contextlib.suppress(OSError):
                os.kill(made.agent, signal.SIGTERM)
            script.kill()
        script.communicate()


@pytest.fixture
def config(small_data, tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG.format(folder=small_data))
    return path


# -- train.sbatch --


def test_the_script_is_bash_and_asks_slurm_for_its_signal():
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", SCRIPT.read_text(), re.M))
    assert options["ntasks-per-node"] == "1"
    assert "requeue" in options
    seconds = re.fullmatch(r"B:USR1@(\d+)", options["signal"])[1]
    assert int(seconds) >= 60  # training takes up to 20 s to save, torchrun waits for 30


def agent_of(folder: Path, *, ends_with: int | None = None, on_term: int = 1) -> None:
    """A stand-in for torchrun, in `folder`'s environment: it ends by itself, or when it is told to."""
    (folder / ".venv" / "bin").mkdir(parents=True)
    work = "while :; do sleep 0.05; done" if ends_with is None else f"sleep 0.2; exit {ends_with}"
    executable(
        folder / ".venv" / "bin" / "torchrun",
        f"trap 'sleep 0.3; touch saved; exit {on_term}' TERM; echo \"torchrun $*\"; touch running; {work}",
    )


@pytest.mark.parametrize("status", [0, 1])
def test_a_run_that_ends_by_itself_is_not_queued_again(slurm, tmp_path, status):
    agent_of(tmp_path, ends_with=status)
    script = slurm.start("-c", "a.yaml", "-o", "output=out", cwd=tmp_path)
    said, _ = script.communicate(timeout=20)
    assert script.returncode == status
    assert slurm.requeued == 0
    assert re.search(r"--nnodes 1 --nproc-per-node 2 .* train.py -c a.yaml -o output=out --resume$", said, re.M)


@pytest.mark.slow
@pytest.mark.parametrize(
    "signalled, preempted, status, requeued",
    [
        ("script USR1", False, 1, 1),  # the time limit is near
        ("script USR1", False, 0, 0),  # ... and training has finished meanwhile
        ("agent TERM", True, 1, 1),  # preempted, with a grace time
        ("agent TERM", False, 1, 0),  # somebody ended the agents
        ("agent KILL", False, 137, 0),
    ],
)
def test_what_is_queued_again(slurm, tmp_path, signalled, preempted, status, requeued):
    agent_of(tmp_path, on_term=status)
    script = slurm.start("-c", "a.yaml", cwd=tmp_path)
    wait_for((tmp_path / "running").exists)
    if preempted:
        (slurm.folder / "job").write_text("PreemptEligibleTime=2026-11-24T07:14:41 PreemptTime=2026-11-24T07:14:41\n")
    whom, name = signalled.split()
    os.kill({"script": script.pid, "agent": slurm.agent}[whom], signal.Signals[f"SIG{name}"])
    script.communicate(timeout=20)
    assert script.returncode == status
    assert slurm.requeued == requeued
    assert (tmp_path / "saved").exists() == (name != "KILL")


@pytest.mark.slow
def test_a_cancelled_run_is_not_queued_again(slurm, tmp_path):
    agent_of(tmp_path)
    script = slurm.start("-c", "a.yaml", cwd=tmp_path)
    wait_for((tmp_path / "running").exists)
    for process in (slurm.agent, script.pid):  # scancel's SIGTERM comes to both
        os.kill(process, signal.SIGTERM)
    script.communicate(timeout=20)
    assert script.returncode == -signal.SIGTERM
    assert slurm.requeued == 0
    wait_for((tmp_path / "saved").exists)


@pytest.mark.slow
def test_training_by_the_script(slurm, config, tmp_path):
    output = tmp_path / "output"
    script = slurm.start("-c", config, "-o", f"output={output}", "train.epochs=2", cwd=PROJECT)
    said, _ = script.communicate(timeout=100)
    assert script.returncode == 0, said
    assert slurm.requeued == 0
    assert "2 ranks x 2 clips" in said
    assert steps(output) == list(range(1, 7))


@pytest.mark.slow
def test_training_that_is_asked_to_stop_resumes_where_it_was(slurm, config, tmp_path):
    output = tmp_path / "output"
    arguments = ("-c", config, "-o", f"output={output}", "train.epochs=20")
    script = slurm.start(*arguments, cwd=PROJECT)
    wait_for(lambda: list(output.glob("checkpoints/step_*.pt")))
    script.send_signal(signal.SIGUSR1)
    said, _ = script.communicate(timeout=60)
    assert script.returncode == 1, said
    assert slurm.requeued == 1
    saved = int(re.search(r"saved step (\d+)", said)[1])
    assert 3 <= saved < 56

    script = slurm.start(*arguments, f"train.max_steps={saved + 4}", cwd=PROJECT)
    said, _ = script.communicate(timeout=200)
    assert script.returncode == 0, said
    assert slurm.requeued == 1
    assert f"job {JOB}, start 2 on here" in said
    assert f"resumed from step_{saved:08d}" in said
    assert steps(output) == list(range(1, saved + 5))


def steps(output: Path) -> list[int]:
    """Those that training has written down, one line a step."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "train/loss" in line]


# -- pytorchjob.yaml --

# Names of the fields, from pkg/apis/kubeflow.org/v1/{pytorch,common}_types.go of kubeflow/training-operator.
FIELDS = {
    "spec": {"runPolicy", "elasticPolicy", "pytorchReplicaSpecs", "nprocPerNode"},
    "elasticPolicy": {
        *("minReplicas", "maxReplicas", "rdzvBackend", "rdzvPort", "rdzvHost", "rdzvId", "rdzvConf", "standalone"),
        *("nProcPerNode", "maxRestarts", "metrics"),
    },
    "runPolicy": {
        *("cleanPodPolicy", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "backoffLimit", "schedulingPolicy"),
        "suspend",
    },
    "Worker": {"replicas", "template", "restartPolicy"},
}


@pytest.fixture
def job() -> dict:
    return yaml.safe_load((CLUSTER / "pytorchjob.yaml").read_text())


def container_of(job: dict) -> dict:
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    return container


def test_the_manifest_is_one_of_the_training_operator(job):
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    spec = job["spec"]
    assert set(spec) <= FIELDS["spec"]
    for name in ("elasticPolicy", "runPolicy"):
        assert set(spec[name]) <= FIELDS[name]
    assert list(spec["pytorchReplicaSpecs"]) == ["Worker"]  # elastic jobs have no Master
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    assert set(worker) <= FIELDS["Worker"]
    assert worker["restartPolicy"] == "OnFailure"
    elastic = spec["elasticPolicy"]
    assert elastic["rdzvBackend"] == "c10d"
    assert elastic["minReplicas"] <= worker["replicas"] <= elastic["maxReplicas"]
    assert elastic["maxRestarts"] > 0
    assert container_of(job)["name"] == "pytorch"


def test_the_pods_of_the_manifest(job):
    pod, container = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"], container_of(job)
    assert pod["terminationGracePeriodSeconds"] > 30  # for which torchrun waits
    volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes.pop(mount["name"]) for mount in container["volumeMounts"]}
    assert not volumes  # each is mounted
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert "persistentVolumeClaim" in mounts["/data"]
    assert "persistentVolumeClaim" in mounts["/runs"]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert "video" in environment["NVIDIA_DRIVER_CAPABILITIES"].split(",")
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]


@pytest.mark.slow
def test_the_command_of_the_manifest(job):
    """train.py takes it, up to the data that is not here; and any number of nodes can share the global batch."""
    launcher, option, *command = container_of(job)["command"]
    gpus = container_of(job)["resources"]["limits"]["nvidia.com/gpu"]
    assert (launcher, option) == ("torchrun", f"--nproc-per-node={gpus}")
    assert "--resume" in command
    run = subprocess.run([sys.executable, *command], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert run.returncode != 0
    assert re.fullmatch(r"train.py: error: /data/train.csv: no such manifest.*\n", run.stderr), run.stderr

    file, overrides = command[1].removeprefix("--config="), command[command.index("--override") + 1 :]
    config = load_config(str(PROJECT / file), overrides)
    assert config.output.startswith("/runs/")
    elastic = job["spec"]["elasticPolicy"]
    for nodes in range(elastic["minReplicas"], elastic["maxReplicas"] + 1):
        assert config.optim.global_batch_size % (nodes * gpus) == 0


# -- Dockerfile --


def test_the_container_has_what_setup_py_asks_for():
    text = (CLUSTER / "Dockerfile").read_text()
    in_image = set(re.search(r"^# From the image.*: (.*)$", text, re.M)[1].split())
    install = re.search(r"^RUN pip install --no-cache-dir ((?!--no-deps).*)$", text, re.M)[1]
    installed = {name_of(requirement.strip('"')) for requirement in install.split()}
    assert not in_image & installed  # nothing of it is replaced
    call = next(
        node
        for node in ast.walk(ast.parse((PROJECT / "setup.py").read_text()))
        if isinstance(node, ast.keyword) and node.arg == "install_requires"
    )
    needed = {name_of(requirement) for requirement in ast.literal_eval(call.value)}
    assert {re.sub(r"cuda\d+$", "cuda", name) for name in in_image | installed} == {
        re.sub(r"cuda\d+$", "cuda", name) for name in needed
    }
    assert re.search(r"^RUN pip install .*--no-deps.* \.$", text, re.M)  # the project itself


def name_of(requirement: str) -> str:
    return re.match(r"[\w-]+", requirement)[0].lower()


def test_the_container_sees_nvdec():
    text = (CLUSTER / "Dockerfile").read_text()
    assert re.search(r"^FROM nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3$", text, re.M)
    assert re.search(r"^ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility,video$", text, re.M)
