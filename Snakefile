# The batch: one rule for all notebooks. `make figures` calls it on this machine; directly:
#
#   snakemake --cores 2 --keep-going --config preset=quick ids="kwon2024/05_completion" args="-p seed 1"
#
# On a cluster (pip install -c constraints.txt -e ".[batch,cluster]"), with what profiles/slurm and profiles/kubernetes say:
#
#   snakemake --profile profiles/slurm --config preset=paper
#   snakemake --profile profiles/kubernetes --container-image IMAGE --default-storage-prefix s3://BUCKET/PREFIX \
#       --config preset=paper
#
# There, too, each job is one call of `python -m compressible run`, a failed notebook's traceback is on its standard error.
# It publishes figures, record and executed notebook itself, each whole or not at all. Snakemake removes the outputs of a
# job before it starts and after it fails, so that what it is told of is a stamp: an earlier figure survives whatever
# happens. Where the files of a job are on another machine (a storage provider), they are outputs, to come back.
import os
import re
import sys
from pathlib import Path

import yaml

sys.path.insert(0, str(Path("lib").resolve()))
from compressible.companion.command_line import handed_on, main
from compressible.companion.library import notebook_digest
from compressible.companion.provenance import git_state
from compressible.companion.reached import reached_digest, reached_sources

PRESET = str(config.get("preset", "quick"))
LABEL = str(config.get("label") or PRESET)
# GPUs that the batch may use at a time: make says so, a profile by its limit on the resource gpu.
LIMIT = workflow.global_resources["gpu"].value if "gpu" in workflow.global_resources else 0
GPUS = config["gpus"] = int(config.get("gpus", LIMIT))
FIGURES = Path(os.environ.get("COMPRESSIBLE_FIGURES") or "figures").expanduser() / LABEL
# By the environment, make hands over what a shell would take apart otherwise.
ARGS = str(config.get("args") or os.environ.get("COMPRESSIBLE_ARGS", "")).strip()
AWAY = workflow.storage_settings.default_storage_provider is not None
MADE = "{id}"


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


def minutes(wildcards):
    return max(10, round(4 * CHOICES[wildcards.id].get("minutes", 10)))


def any_of(ids):
    """A regular expression that matches these ids, and nothing where there is none."""
    return "|".join(map(re.escape, ids)) or "(?!)"


def here(path):
    """A file of this checkout that a job depends on; none where jobs get the sources by themselves, from the archive that
    snakemake makes of the tracked files. To name them would keep a job on this machine."""
    return [] if AWAY else path


def code(wildcards):
    """What stands for the sources: a job is made again when they have changed. Where they are inputs, too, snakemake goes
    by their times, which a clock that goes back, or a copy that keeps them, leaves behind the figure's."""
    notebook = Path("notebooks", f"{wildcards.id}.ipynb")
    return f"{reached_digest(notebook)} {notebook_digest(notebook)}"


def reached(wildcards):
    """The library's files that can move a number of this notebook, as far as its imports lead."""
    return here([os.path.relpath(file) for file in reached_sources(Path("notebooks", f"{wildcards.id}.ipynb"))])


def commit():
    """What the checkout is, for jobs that get it without its .git."""
    state = git_state()
    return f"{state['commit'] or ''}{'+dirty' if state['dirty'] else ''}" if AWAY else ""


def check(ids):
    """Refuse values that a notebook would refuse, before any job starts."""
    words = handed_on(ARGS)
    for id in ids:
        if main(["run", id, "--preset", PRESET, "--label", LABEL, "--check", *words]):
            raise WorkflowError(f"{id} refuses these values, and nothing was started")


def forget_lost(ids):
    """Remove the stamps of figures of which a file is not there any more, so that they are made again."""
    for id in ids:
        files = [FIGURES / f"{id}.{suffix}" for suffix in SUFFIXES]
        if not all(file.is_file() and file.stat().st_size for file in files):
            (FIGURES / ".batch" / id).unlink(missing_ok=True)


CHOICES = read_presets()
# A job on another machine is told which rule it is, but not the limits: there, a GPU is for who has the rule for one.
HERE = workflow.is_main_process
ON_GPU = [id for id, entry in CHOICES.items() if (GPUS or not HERE) and entry.get("gpu", False)]
IDS = choose(str(config.get("ids") or "").split())
SUFFIXES = ("json", "npz", "pdf", "png")
FILES = [f"{FIGURES}/{MADE}.{suffix}" for suffix in SUFFIXES] + [f"{FIGURES}/executed/{MADE}.ipynb"]
STAMP = f"{FIGURES}/.batch/{MADE}"
if HERE:
    check(IDS)
    forget_lost(IDS)


localrules:
    figures,


rule figures:
    input:
        expand(f"{FIGURES}/{{id}}.json" if AWAY else f"{FIGURES}/.batch/{{id}}", id=IDS),


rule figure:
    input:
        notebook=here("notebooks/{id}.ipynb"),
        presets=lambda wildcards: here(f"notebooks/{wildcards.id.split('/')[0]}/presets.yaml"),
        library=reached,
    output:
        FILES if AWAY else touch(STAMP),
    wildcard_constraints:
        id=any_of(sorted(set(CHOICES) - set(ON_GPU)) if HERE else CHOICES),
    params:
        preset=PRESET,
        label=LABEL,
        args=ARGS,
        gpus=0,
        commit=commit(),
        code=code,
    threads: 1
    priority: lambda wildcards: CHOICES[wildcards.id].get("minutes", 10)
    resources:
        runtime=minutes,
    message:
        "{wildcards.id}, preset {params.preset}"
    shell:
        # The kernel starts in the notebook's folder, where a relative path would mean another place.
        'OMP_NUM_THREADS=1 PYTHONPATH="$PWD/lib${{PYTHONPATH:+:$PYTHONPATH}}" COMPRESSIBLE_COMMIT={params.commit:q}'
        " python -m compressible run {wildcards.id}"
        " --preset {params.preset} --label {params.label} --gpus {params.gpus} {params.args}"


# Only jobs on a GPU have the resource at all: Kubernetes takes 0 GPUs for a wish to have one, and asks whose.
use rule figure as figure_on_gpu with:
    wildcard_constraints:
        id=any_of(ON_GPU),
    params:
        preset=PRESET,
        label=LABEL,
        args=ARGS,
        gpus=GPUS or 64,  # as many as the host has
        commit=commit(),
        code=code,
    resources:
        runtime=minutes,
        gpu=1,
        gpu_manufacturer="nvidia",
