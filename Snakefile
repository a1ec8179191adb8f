# The batch: one rule for all notebooks. `make figures` calls it on this machine; directly:
#
#   snakemake --cores 2 --keep-going --config preset=quick ids="kwon2024/05_completion" args="-p seed 1"
#
# Elsewhere (pip install -c constraints.txt -e ".[batch,cluster]"; the checkout must be visible to the jobs):
#
#   Slurm       snakemake --executor slurm --jobs 20 --keep-going --default-resources slurm_partition=NAME \
#                   mem_mb=8000 --resources gpu=4 --config preset=paper gpus=4
#   Kubernetes  snakemake --executor kubernetes --jobs 20 --keep-going --container-image IMAGE \
#                   --default-storage-provider s3 --default-storage-prefix s3://BUCKET/PREFIX \
#                   --config preset=paper
#
# There, too, each job is one call of `python -m compressible run`, a failed notebook's traceback is on its standard error.
# It publishes figures, record and executed notebook itself, each whole or not at all. Snakemake removes the outputs of a
# job before it starts and after it fails, so that what it is told of is a stamp: an earlier figure survives whatever
# happens. Where the files of a job are on another machine (a storage provider), they are outputs, to come back.
import os
import shlex
import sys
from pathlib import Path

import yaml

sys.path.insert(0, str(Path("lib").resolve()))
from compressible.__main__ import main
from compressible.companion.library import computing_sources

PRESET = str(config.get("preset", "quick"))
LABEL = str(config.get("label") or PRESET)
GPUS = config["gpus"] = int(config.get("gpus", 0))
FIGURES = Path(os.environ.get("COMPRESSIBLE_FIGURES", "figures")) / LABEL
# By the environment, make hands over what a shell would take apart otherwise.
ARGS = str(config.get("args") or os.environ.get("COMPRESSIBLE_ARGS", "")).strip()
AWAY = workflow.storage_settings.default_storage_provider is not None
MADE = "{paper}/{name}"


def read_presets():
    """Entry of the chosen preset for each notebook that has one, by id."""
    files = sorted(Path("notebooks").glob("*/presets.yaml"))
    papers = {file.parent.name: yaml.safe_load(file.read_text()) or {} for file in files}
    every = {f"{paper}/{name}": entry for paper, names in papers.items() for name, entry in names.items()}
    return {id: entry[PRESET] for id, entry in every.items() if PRESET in (entry or {})}


def choose(wanted):
    """Ids to build: all that have the preset, or those that were named."""
    if not CHOICES:
        raise WorkflowError(f"no notebook has a preset {PRESET!r}")
    unknown = sorted(set(wanted) - set(CHOICES))
    if unknown:
        known = ", ".join(CHOICES)
        raise WorkflowError(f"no notebook {', '.join(unknown)} with preset {PRESET!r}; known: {known}")
    return wanted or list(CHOICES)


def wants_gpu(wildcards):
    return min(GPUS, int(CHOICES[f"{wildcards.paper}/{wildcards.name}"].get("gpu", False)))


def minutes(wildcards):
    return max(10, round(4 * CHOICES[f"{wildcards.paper}/{wildcards.name}"].get("minutes", 10)))


def check(ids):
    """Refuse values that a notebook would refuse, before any job starts."""
    for id in ids:
        if main(["run", id, "--preset", PRESET, "--label", LABEL, "--check", *shlex.split(ARGS)]):
            raise WorkflowError(f"{id} refuses these values, and nothing was started")


def forget_lost(ids):
    """Remove the stamps of figures that are not there any more, so that they are made again."""
    for id in ids:
        if not (FIGURES / f"{id}.json").is_file():
            (FIGURES / ".batch" / id).unlink(missing_ok=True)


CHOICES = read_presets()
IDS = choose(str(config.get("ids") or "").split())
LIBRARY = [os.path.relpath(file) for file in computing_sources()]
FILES = [f"{FIGURES}/{MADE}.{suffix}" for suffix in ("json", "npz", "pdf", "png")] + [f"{FIGURES}/executed/{MADE}.ipynb"]
STAMP = f"{FIGURES}/.batch/{MADE}"
if workflow.is_main_process:
    check(IDS)
    forget_lost(IDS)


localrules:
    figures,


rule figures:
    input:
        expand(f"{FIGURES}/{{id}}.json" if AWAY else f"{FIGURES}/.batch/{{id}}", id=IDS),


rule figure:
    input:
        notebook="notebooks/{paper}/{name}.ipynb",
        presets="notebooks/{paper}/presets.yaml",
        library=LIBRARY,
    output:
        FILES if AWAY else touch(STAMP),
    wildcard_constraints:
        paper=r"[^/]+",
        name=r"[^/]+",
    params:
        preset=PRESET,
        label=LABEL,
        args=ARGS,
    threads: 1
    resources:
        gpu=wants_gpu,
        runtime=minutes,
    message:
        "{wildcards.paper}/{wildcards.name}, preset {params.preset}"
    shell:
        # The kernel starts in the notebook's folder, where a relative path would mean another place.
        'OMP_NUM_THREADS=1 PYTHONPATH="$PWD/lib${{PYTHONPATH:+:$PYTHONPATH}}"'
        " python -m compressible run {wildcards.paper}/{wildcards.name}"
        " --preset {params.preset} --label {params.label} --gpus $(({resources.gpu} * {config[gpus]})) {params.args}"
