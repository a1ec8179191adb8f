"""What a user gets: the wheel in an empty environment, and the README's lines run from there, far from the checkout.

    python tests/installed_wheel.py dist/0.2.0/compressible_dynamics-0.2.0-py3-none-any.whl

The core's ten lines run as they stand; those of Deep LoRA with a BERT of two small layers in the place of
bert-base-cased, and with the names that they leave to the reader. It downloads PyTorch, some GB, and takes minutes, so
that it is part of `make release` and not of the tests.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
# What the README's reader has: a model of that name, a batch, a Trainer's arguments, rows.
BEFORE = """
import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=100)
BertForSequenceClassification(BertConfig(num_labels=1, **sizes)).save_pretrained("bert-base-cased")
row = lambda k: {"input_ids": torch.arange(k, k + 8), "attention_mask": torch.ones(8, dtype=torch.long), "labels": 1.0}
rows = [row(k) for k in range(16)]
first_batch = {"input_ids": torch.stack([r["input_ids"] for r in rows]), "labels": torch.ones(16)}
arguments = TrainingArguments("trained", max_steps=3, report_to=[], use_cpu=True, disable_tqdm=True)
"""
AFTER = """
again = peft.PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained("bert-base-cased"), "adapter")
for name, value in model.state_dict().items():
    assert name not in again.state_dict() or torch.equal(value, again.state_dict()[name]), name
cd.save_as_lora(model, "lora")
print("adapter saved and loaded:", sorted(p.name for p in __import__("pathlib").Path("adapter").iterdir()))
"""
# The library that runs is the installed one; it lies in no checkout, and has its data files and types with it.
WHERE = """
import compressible, pathlib
from compressible.data import manifest
place = pathlib.Path(compressible.__file__)
assert "site-packages" in place.parts and (place.parent / "py.typed").is_file(), place
print(compressible.__version__, len(manifest.load_manifest()), "files in the manifest")
"""


def main(wheel: Path) -> int:
    """Install the wheel and run the lines; the exit status of the first that fails, else 0."""
    core, deep = BLOCK.findall(README.read_text(encoding="utf-8"))[:2]
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder, "empty", "bin", "python")
        subprocess.run([sys.executable, "-m", "venv", python.parent.parent], check=True)
        install = [python, "-m", "pip", "install", "-q"]
        for named, code in ((wheel, WHERE + core), (f"{wheel}[adapters]", WHERE + BEFORE + deep + AFTER)):
            print(f"pip install {Path(str(named)).name}", flush=True)
            for command in ([*install, str(named)], [python, "-c", code]):
                if status := subprocess.run(command, cwd=folder, env=_environment(), check=False).returncode:
                    return status
    return 0


def _environment() -> dict[str, str]:
    """This one without what leads to the checkout or to a hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COMPRESSIBLE_"))}
    return kept | {"HF_HUB_OFFLINE": "1"}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
