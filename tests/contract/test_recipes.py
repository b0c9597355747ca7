"""The recipes of deploy/ for several machines, run with stand-ins for what no test has: Slurm, ssh, a cluster."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows.stack.members import POOLS
from tessera.running import launch

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SCRIPTS = ("slurm/worker.sbatch", "slurm/training.sbatch", "ssh/workers.sh")
OPTIONS = {  # of sbatch, that the recipes use; those of its manual
    "job-name", "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "time", "signal", "requeue",
    "open-mode", "output",
}  # fmt: skip
COMMAND = "exec python -m tessera.running train_prior x --out data/priors/x"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder with stand-ins in bin/, of which each says what it was asked."""
    (tmp_path / "bin").mkdir()
    return tmp_path


def stand_in(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def run(machine: Path, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{machine / 'bin'}{os.pathsep}{os.environ['PATH']}"
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TESSERA_", "SLURM_", "PREFECT_"))}
    command = ["bash" if script.endswith("sbatch") else "sh", str(DEPLOY / script), *arguments]
    return subprocess.run(
        command, cwd=machine, env={**kept, "PATH": path, **environment}, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_scripts_and_name_what_sbatch_knows(script: str) -> None:
    shell = "bash" if script.endswith("sbatch") else "sh"
    assert subprocess.run([shell, "-n", str(DEPLOY / script)], capture_output=True).returncode == 0
    text = (DEPLOY / script).read_text()
    options = re.findall(r"^#SBATCH --([a-z-]+)", text, re.MULTILINE)
    assert set(options) <= OPTIONS and len(options) == len(set(options)) == text.count("\n#SBATCH")
    if options:  # sbatch reads them up to the first command
        assert text.index("set -euo") > text.rindex("#SBATCH")


def test_a_training_on_two_nodes_is_dvc_on_the_first_and_the_command_of_the_stage_on_the_other(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = 'echo "$0 $* node=$TESSERA_NODE of=$TESSERA_NODES at=$TESSERA_RENDEZVOUS processes=$TESSERA_PROCESSES"'
    stand_in(machine, "bin/dvc", f"#!/bin/sh\n{told}\n")
    stand_in(machine, "bin/python", f'#!/bin/sh\nif [ "$1" = -c ]; then echo "{COMMAND}"; else {told}; fi\n')
    stand_in(machine, "bin/scontrol", '#!/bin/sh\nprintf "node17\\nnode18\\n"\n')
    stand_in(machine, "bin/srun", '#!/bin/sh\nshift\nfor n in 0 1; do SLURM_NODEID=$n "$@" || exit; done\n')
    slurm = {"SLURM_JOB_ID": "4321", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[17-18]"}
    done = run(machine, "slurm/training.sbatch", "train_prior@x", **slurm)
    assert done.returncode == 0, done.stderr
    of = "of=2 at=node17:29821 processes=auto"
    assert done.stdout.splitlines() == [
        f"{machine}/bin/dvc repro --single-item train_prior@x node=0 {of}",
        f"{machine}/bin/python {COMMAND.removeprefix('exec python ')} node=1 {of}",
    ]
    for name, value in {"PROCESSES": "auto", "NODES": "2", "NODE": "1", "RENDEZVOUS": "node17:29821"}.items():
        monkeypatch.setenv(f"TESSERA_{name}", value)
    assert launch.asked("train_prior", gpus=8) == launch.Launch(8, 2, 1, "node17:29821")
    assert run(machine, "slurm/training.sbatch", **slurm).returncode != 0


def test_a_worker_of_slurm_has_a_checkout_and_a_home_of_its_own(machine: Path) -> None:
    stand_in(machine, ".venv/bin/prefect", '#!/bin/sh\necho "$PWD $* $PREFECT_HOME $TESSERA_DEVICE_LOCKS $KEY"\n')
    (machine / ".env").write_text("KEY=of-the-remote\n")
    (machine / ".gitignore").write_text(".venv\n.env\nbin\nlocal\n")
    for command in ("init --quiet", "add --all", "-c user.name=t -c user.email=t@localhost commit --quiet -m start"):
        subprocess.run(["git", *command.split()], cwd=machine, check=True)
    local = machine / "local"
    slurm = {"SLURM_JOB_ID": "7", "SLURM_TMPDIR": str(local), "SLURM_GPUS_ON_NODE": "2"}
    done = run(machine, "slurm/worker.sbatch", **slurm)
    assert done.returncode == 0, done.stderr
    place = local / "tessera-7"
    assert done.stdout.startswith(f"{place}/checkout worker start --pool gpu --type process --limit 2 --name ")
    assert done.stdout.endswith(f" {place}/prefect {place}/devices of-the-remote\n")
    assert not place.exists()


def test_workers_by_ssh_outlive_the_connection_and_end_when_they_are_told(machine: Path) -> None:
    """The stand-in for ssh runs the command here; the one for prefect ends as Prefect does, by SIGINT to itself."""
    stand_in(machine, "bin/ssh", '#!/bin/sh\nexec sh -c "$4"\n')
    checkout = machine / "checkout"
    checkout.mkdir()
    (checkout / ".env").write_text("KEY=of-the-remote\n")
    stand_in(
        checkout,
        ".venv/bin/prefect",
        f"#!{sys.executable}\nimport json, os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))\n"
        "pathlib.Path('asked.new').write_text(json.dumps([sys.argv[1:], os.environ['KEY']]))\n"
        "pathlib.Path('asked.new').rename('asked.json')\ntime.sleep(60)\n",
    )
    (checkout / ".venv/bin/python").symlink_to(sys.executable)
    given = {"TESSERA_CHECKOUT": str(checkout), "TESSERA_LIMIT": "2"}

    def workers(what: str) -> tuple[int, str]:
        done = run(machine, "ssh/workers.sh", what, "gpu1", **given)
        return done.returncode, re.sub(r"\d+$", "N", done.stdout.strip()) + done.stderr

    assert workers("status") == (1, "gpu1: does not run")
    assert workers("start") == (0, "gpu1: started, process N")
    assert workers("start") == (0, "gpu1: runs already, process N")
    for _ in range(100):
        if (checkout / "asked.json").exists():
            break
        subprocess.run(["sleep", "0.1"], check=True)
    line = ["worker", "start", "--pool", "gpu", "--type", "process", "--limit", "2"]
    assert json.loads((checkout / "asked.json").read_text()) == [line, "of-the-remote"]
    assert workers("status") == (0, "gpu1: runs, process N")
    assert workers("stop") == (0, "gpu1: stopped")
    assert workers("stop") == (0, "gpu1: does not run")
    (checkout / ".env").unlink()
    code, said = workers("start")
    assert code == 1 and "no .env in" in said
    done = run(machine, "ssh/workers.sh", "start", "gpu1", TESSERA_LIMIT="all")
    assert done.returncode == 2 and "TESSERA_LIMIT is 'all': expected a number" in done.stderr


def test_the_manifests_of_kubernetes_fit_together_and_hold_no_secret() -> None:
    text = (DEPLOY / "kubernetes/workers.yaml").read_text()
    found = {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(text)}
    assert {kind for kind, _ in found} == {"ConfigMap", "Job", "Deployment"}
    assert {each["metadata"]["namespace"] for each in found.values()} == {"tessera"}
    pools = set()
    for (kind, name), each in found.items():
        if kind == "ConfigMap":
            assert not any(re.search(r"PASSWORD|SECRET|AUTH|KEY", key) for key in each["data"])
            assert all(isinstance(value, str) for value in each["data"].values())
            continue
        template = each["spec"]["template"]
        if kind == "Deployment":
            assert each["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"] == {"app": name}
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["automountServiceAccountToken"] is False
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert {next(iter(source.values()))["name"] for source in container["envFrom"]} == {"tessera"}
            line = " ".join([*container["command"], *container.get("args", [])])
            pools |= set(re.findall(r"--pool (\w+)", line))
            is_of_gpu = "--pool gpu" in line
            assert ("nvidia.com/gpu" in container.get("resources", {}).get("limits", {})) == is_of_gpu
    assert pools == set(POOLS.values())
    deploy = found["Job", "tessera-deploy"]["spec"]["template"]["spec"]["containers"][0]["args"][0]
    assert f"for pool in {' '.join(POOLS.values())}" in deploy and "prefect --no-prompt deploy --all" in deploy
