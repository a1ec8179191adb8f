"""Slurm and Kubernetes by the profiles: a real Slurm of one node, and what the Kubernetes executor would submit."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, write_notebook

PROFILES, PLUGINS = REPOSITORY / "profiles", "snakemake_executor_plugin_"


def installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) for package in packages)


@pytest.fixture
def cluster() -> None:
    if os.environ.get("NO_CLUSTER") == "1":
        pytest.skip("NO_CLUSTER is 1")


@pytest.fixture
def figures_of(checkout, add_notebook) -> list[str]:
    """A notebook that fails, one for the CPU, and one for a GPU, with what a batch needs beside them."""
    shutil.copy(REPOSITORY / "Snakefile", checkout)
    ids = [add_notebook(name) for name in ("00_bad", "01_good", "02_on_gpu")]
    write_notebook(checkout / "notebooks" / f"{ids[0]}.ipynb", "raise RuntimeError('as intended')")
    entries = {id.partition("/")[2]: {"paper": {"minutes": 0.1, "gpu": id.endswith("gpu")}} for id in ids}
    (checkout / "notebooks/kwon2024/presets.yaml").write_text(yaml.safe_dump(entries))
    return ids


SLURM = """\
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=32000 Gres=gpu:1 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
GRES = "NodeName={host} Name=gpu File=/dev/null\n"
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "sinfo", "scontrol")


def without_slurm() -> str:
    """Why no Slurm can be started here; "" where one can."""
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    if lacking:
        return f"{', '.join(lacking)} not found: apt-get install slurmctld slurmd slurm-client munge"
    if not installed(f"{PLUGINS}slurm"):
        return "the extra cluster is not installed"
    if os.geteuid():
        return "only root can start Slurm's daemons"
    return "this machine has a Slurm of its own" if Path("/etc/slurm/slurm.conf").exists() else ""


@pytest.fixture
def slurm(tmp_path_factory, cluster) -> Iterator[None]:
    """A Slurm of this one node, without accounting; its settings are where its own programs look for them."""
    if reason := without_slurm():
        pytest.skip(reason)
    folder, host, places = tmp_path_factory.mktemp("slurm"), socket.gethostname().partition(".")[0], Path("/etc/slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    settings = SLURM.format(host=host, folder=folder, ports=free_ports(2))
    written = {places / "slurm.conf": settings, places / "gres.conf": GRES.format(host=host)}
    pids = {name: folder / f"{name}.pid" for name in ("slurmd", "slurmctld", "munged")}
    try:
        for path, text in written.items():
            path.write_text(text)
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log",
                 "seed-file": "munged.seed"}  # fmt: skip
        options = [f"--{option}={folder / name}" for option, name in files.items()]
        for command in (["munged", "--force", *options], ["slurmctld"], ["slurmd"]):
            subprocess.run(command, check=True, capture_output=True, timeout=30)
        until(lambda: "idle" in subprocess.run(["sinfo"], capture_output=True, text=True, check=False).stdout, 30)
        yield
    finally:
        for pid in pids.values():
            if pid.is_file():
                os.kill(int(pid.read_text()), signal.SIGTERM)
        for path in written:
            path.unlink(missing_ok=True)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def until(holds, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert holds()


def test_a_real_slurm_without_accounting_runs_all_jobs_and_the_batch_ends(slurm, figures_of):
    bad, good, on_gpu = figures_of
    command = [sys.executable, "-m", "snakemake", "--profile", str(PROFILES / "slurm"), "--resources", "gpu=1"]
    told = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    told["CUDA_VISIBLE_DEVICES"] = ""  # Slurm shows a job its GPU
    done = subprocess.run(
        [*command, "--config", "preset=paper"], env=told, capture_output=True, text=True, timeout=300, check=False
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 1 and said.count("has been submitted with SLURM jobid") == 3, said
    shown = {id: json.loads(Path(f"figures/paper/{id}.json").read_text())["gpus"] for id in (good, on_gpu)}
    assert shown == {good: "", on_gpu: "0"}
    assert "as intended" in Path(f"figures/paper/failed/{bad}.txt").read_text()


CLUSTER = """\
import json, os, sys
import kubernetes
from snakemake_executor_plugin_kubernetes import Executor

sent = []

def create(self, namespace, body):
    sent.append(kubernetes.client.ApiClient().sanitize_for_serialization(body))
    open("sent.json", "w").write(json.dumps(sent))
    return body

kubernetes.config.load_kube_config = lambda *given, **named: None
kubernetes.client.BatchV1Api.create_namespaced_job = create
kubernetes.client.CoreV1Api.create_namespaced_secret = lambda *given, **named: None
kubernetes.client.CoreV1Api.delete_namespaced_secret = lambda *given, **named: None

async def check(self, active):
    if len(sent) == int(sys.argv[1]):  # all that can run is submitted
        os._exit(0)
    for job in active:
        yield job

Executor.check_active_jobs = check
from snakemake.cli import main
main(sys.argv[2:])
"""


@contextmanager
def bucket() -> Iterator[tuple[str, dict[str, bytes]]]:
    """An object storage on this machine: its address, and what was put into it."""
    kept: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, content: bytes = b"") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_HEAD(self) -> None:
            path = self.path.partition("?")[0].strip("/")
            self.answer(200 if "/" not in path or path in kept else 404)

        def do_GET(self) -> None:
            self.answer(200, b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>")

        def do_PUT(self) -> None:
            kept[self.path.partition("?")[0].strip("/")] = self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(200)

        def log_message(self, *args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}", kept
    finally:
        http.shutdown()
        http.server_close()


def test_kubernetes_gets_jobs_that_its_api_server_takes_with_all_sources(cluster, figures_of, checkout):
    if not installed(f"{PLUGINS}kubernetes", "snakemake_storage_plugin_s3"):
        pytest.skip("the extra cluster is not installed")
    for command in (["git", "init", "-q"], ["git", "add", "-A"]):
        subprocess.run(command, check=True, cwd=checkout)
    told = os.environ | {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    with bucket() as (address, kept):
        options = ["--profile", str(PROFILES / "kubernetes"), "--container-image", "registry/image"]
        options += ["--default-storage-prefix", "s3://bucket/mine", "--storage-s3-endpoint-url", address]
        done = subprocess.run(
            [sys.executable, "-c", CLUSTER, "3", *options, "--config", "preset=paper"],
            env=told, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    sent = json.loads((checkout / "sent.json").read_text())
    pods = [job["spec"]["template"]["spec"] for job in sent]
    containers = {figure_of(pod, figures_of): pod["containers"][0] for pod in pods}
    assert {container["image"] for container in containers.values()} == {"registry/image"}
    for id, container in containers.items():
        limits, requests = container["resources"]["limits"], container["resources"]["requests"]
        assert limits.keys() == requests.keys() and limits["memory"] == requests["memory"] == "8000M"
        assert limits.get("nvidia.com/gpu") == requests.get("nvidia.com/gpu") == ("1" if "gpu" in id else None)
        assert {each["name"] for each in container["env"]} >= {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    tolerating = [figure_of(pod, figures_of) for pod in pods if pod.get("tolerations")]
    assert tolerating == [figures_of[2]]  # a job without a GPU may not take a place on a node with some
    (sources,) = [content for name, content in kept.items() if "snakemake-workflow-sources" in name]
    (checkout / "sources.tar.xz").write_bytes(sources)
    with tarfile.open(checkout / "sources.tar.xz") as archive:
        names = set(archive.getnames())
    needed = {"Snakefile", "pyproject.toml", f"notebooks/{figures_of[1]}.ipynb", "lib/compressible/__init__.py"}
    assert needed <= names, needed - names


def figure_of(pod: dict, ids: list[str]) -> str:
    """Which figure a pod is to make."""
    (found,) = [id for id in ids if f"id={id}" in " ".join(pod["containers"][0]["args"])]
    return found


def test_profiles_name_only_options_that_snakemake_has_with_its_plugins():
    """Where no plugin is installed, the options of snakemake's own are checked."""
    from snakemake.cli import get_argument_parser

    known = {option.lstrip("-") for action in get_argument_parser()._actions for option in action.option_strings}
    for kind in ("slurm", "kubernetes"):
        settings = yaml.safe_load((PROFILES / kind / "config.yaml").read_text())
        assert settings["executor"] == kind
        unknown = [name for name in settings if name not in known and not name.startswith(kind)]
        assert not unknown, unknown


def test_the_image_installs_what_jobs_need_and_no_library(tmp_path):
    """Its list of packages is made by a line of its own, which is run here."""
    text = (REPOSITORY / "Containerfile").read_text().replace("\\\n", "")
    assert "pip install --no-cache-dir -c constraints.txt -r needed.txt" in text and "COPY lib" not in text
    command = text.partition('python -c "')[2].partition('" >')[0]
    done = subprocess.run([sys.executable, "-c", command], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    listed = done.stdout.splitlines()
    assert any(line.startswith("torch>=") for line in listed) and not any("compressible" in line for line in listed)
    assert {"snakemake-storage-plugin-s3", "papermill", "peft"} <= {line.partition(">=")[0] for line in listed}
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
    }
    assert {line.partition(">=")[0].lower() for line in listed} <= pinned
