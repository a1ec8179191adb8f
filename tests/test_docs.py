"""The pages in docs: their code runs; that of README and usage, which takes minutes or a hub, names what exists."""

import re
from pathlib import Path

import pytest

DOCS = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))
USAGE = Path(__file__).parent.parent / "docs" / "usage.md"
README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def code() -> list:
    found = [(path, block) for path in DOCS if path != USAGE for block in BLOCK.findall(path.read_text())]
    return [pytest.param(block, id=f"{path.stem}-{i}") for i, (path, block) in enumerate(found)]


@pytest.mark.parametrize("block", code())
def test_code_of_a_page_runs(block):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    exec(compile(block, "a page in docs", "exec"), {"__name__": "page"})


def test_code_of_readme_and_usage_compiles_and_names_what_exists():
    import compressible as cd

    blocks = BLOCK.findall(README.read_text() + USAGE.read_text())
    for block in blocks:
        compile(block, "README.md", "exec")
    names = set(re.findall(r"\bcd\.(\w+)", "".join(blocks)))
    assert {"DeepLoraConfig", "fine_tune", "descend"} <= names <= set(cd.__all__)


def test_the_page_for_users_of_peft_names_fields_and_functions_that_exist():
    pytest.importorskip("peft")
    import compressible as cd

    text = (Path(__file__).parent.parent / "docs" / "deep_lora_for_users_of_peft.md").read_text()
    names = set(re.findall(r"cd\.(\w+)", text))
    assert names >= {
        "DeepLoraConfig",
        "compress_adapters",
        "save_as_lora",
        "param_groups",
        "create_deep_lora_optimizer",
    }
    assert names <= set(cd.__all__)
    options = re.search(r"cd\.DeepLoraConfig\(([^)]*), \.\.\.\)", text)[1].split(", ")
    assert set(options) <= set(cd.DeepLoraConfig.__dataclass_fields__)
