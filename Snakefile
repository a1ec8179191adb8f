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
# There, too, each job is one call of `python -m compressible run`; figures, record and executed notebook come
# back as outputs, a failed notebook's traceback is on the job's standard error.
import os
import sys
from pathlib import Path

import yaml

sys.path.insert(0, "lib")
from compressible.companion.library import computing_sources

PRESET = str(config.get("preset", "quick"))
LABEL = str(config.get("label") or PRESET)
GPUS = config["gpus"] = int(config.get("gpus", 0))
FIGURES = Path(os.environ.get("COMPRESSIBLE_FIGURES", "figures")) / LABEL


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


CHOICES = read_presets()
IDS = choose(str(config.get("ids") or "").split())
LIBRARY = [os.path.relpath(file) for file in computing_sources()]


localrules:
    figures,


rule figures:
    input:
        expand(f"{FIGURES}/{{id}}.json", id=IDS),


rule figure:
    input:
        notebook="notebooks/{paper}/{name}.ipynb",
        presets="notebooks/{paper}/presets.yaml",
        library=LIBRARY,
    output:
        expand(f"{FIGURES}/{{{{paper}}}}/{{{{name}}}}.{{suffix}}", suffix=["json", "npz", "pdf", "png"]),
        # Published only after success; what a failed notebook left is kept under failed/, which is no output.
        f"{FIGURES}/executed/{{paper}}/{{name}}.ipynb",
    wildcard_constraints:
        paper=r"[^/]+",
        name=r"[^/]+",
    params:
        preset=PRESET,
        label=LABEL,
        args=config.get("args") or "",
    threads: 1
    resources:
        gpu=wants_gpu,
        runtime=minutes,
    message:
        "{wildcards.paper}/{wildcards.name}, preset {params.preset}"
    shell:
        "OMP_NUM_THREADS=1 PYTHONPATH=lib python -m compressible run {wildcards.paper}/{wildcards.name}"
        " --preset {params.preset} --label {params.label} --gpus $(({resources.gpu} * {config[gpus]})) {params.args}"
