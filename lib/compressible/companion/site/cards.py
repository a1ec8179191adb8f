"""What the site shows of each figure: question, answer and verdicts; the model, device and seconds of its record."""

from __future__ import annotations

import base64
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressible.companion import notebooks
from compressible.companion.claims import pages, status, writing
from compressible.companion.claims.standing import OWN, Record, Standing, count, read_records, standings

PAPERS = {
    "yaras2024": "P1, Yaras et al. 2024",
    "kwon2024": "P2, Kwon et al. 2024",
    "balzano2025": "P3, Balzano et al. 2025",
    "beyond": "Beyond the papers",
}
_MODELS = ("encoder", "encoders", "decoder", "decoders", "networks", "architectures")  # parameters that name models
FACTORS = "matrix factors"


@dataclass(frozen=True)
class Card:
    """A figure at one preset, or, without a record, a figure that was not run at full scale."""

    id: str
    question: str
    answer: str  # the title of the notebook
    record: Record | None
    standing: Sequence[Standing]  # the claims judged on the record; without one, all claims of the figure
    models: Sequence[str]
    quick: bytes = b""  # without a record, the picture of the quick preset as PNG

    @property
    def paper(self) -> str:
        """Folder of the notebook."""
        return self.id.partition("/")[0]

    @property
    def preset(self) -> str:
        """Preset of the record, "" without one."""
        return self.record["preset"] if self.record else ""

    @property
    def verdicts(self) -> dict[str, int]:
        """How many claims have each verdict that there is."""
        return {verdict: n for verdict, n in count(self.standing).items() if n}

    def file(self, suffix: str) -> str:
        """A file of the record, relative to the checkout: figures/paper/kwon2024/05_completion.png."""
        return f"figures/{self.preset}/{self.id}{suffix}"


def read(root: Path) -> tuple[list[Card], list[Standing]]:
    """All cards of a checkout, by paper and number, and how each claim stands."""
    records, standing = read_records(root / "figures"), standings(root / "figures", OWN)
    questions, named = status.questions(), model_names(root / "data" / "status.toml")
    found = []
    for paper in PAPERS:
        for id in (id for id in notebooks.ids() if id.startswith(f"{paper}/")):
            told = questions.get(id, ""), writing.title(root / "notebooks" / f"{id}.ipynb")
            found += _of_figure(id, told, standing, records, named.get(id, []))
    return found, standing


def _of_figure(
    id: str, told: tuple[str, str], standing: Sequence[Standing], records: Sequence[Record], named: Sequence[str]
) -> list[Card]:
    mine = [each for each in standing if each.claim.figure == id]
    kept = pages.own_records(id, standing, records)
    if not kept:
        notebook = notebooks.notebook_path(id)
        found = models({"parameters": notebooks.defaults(notebook)}, named)
        return [Card(id, *told, None, mine, found, quick_picture(notebook))]
    return [Card(id, *told, record, pages.judged_on(record, mine), models(record, named)) for record in kept]


def models(record: Mapping[str, Any], named: Sequence[str] = ()) -> list[str]:
    """The models of a record: those that its parameters name, else those named for the figure, else matrix factors."""
    values = [record.get("parameters", {}).get(name) for name in _MODELS]
    flat = [part for value in values if value for part in ([value] if isinstance(value, str) else value)]
    return list(dict.fromkeys(map(str, flat))) or list(named) or [FACTORS]


def model_names(path: Path) -> dict[str, list[str]]:
    """The models of figures whose parameters name none, by id: the table [models] of data/status.toml."""
    return tomllib.loads(path.read_text(encoding="utf-8")).get("models", {}) if path.exists() else {}


def quick_picture(notebook: Path) -> bytes:
    """The last picture among a notebook's outputs, as PNG; b"" without any."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    shown = [output["data"] for cell in cells for output in cell.get("outputs", []) if "data" in output]
    found = [data["image/png"] for data in shown if "image/png" in data]
    return base64.b64decode("".join(found[-1])) if found else b""
