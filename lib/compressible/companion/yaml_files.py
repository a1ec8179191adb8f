"""Files of presets, rules and values: YAML whose numbers are what they look like and whose keys stand once."""

from __future__ import annotations

import re
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from compressible.runtime import checks


class BatchError(ValueError):
    """A notebook, preset or parameter that does not exist or does not fit; nothing was started."""


# YAML 1.1 reads 1e-3 as text, 010 as 8 and 1:30 as 90, which nobody means.
_NUMBERS = {
    "int": re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"),
    "float": re.compile(
        r"^([-+]?((\d[\d_]*\.[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF))|\.nan)$"
    ),
}


class _Loader(yaml.SafeLoader):
    """Numbers are read as everywhere else, and no key stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping; ConstructorError where a key stands twice: which value is meant?"""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in dict.fromkeys(keys) if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{', '.join(twice)} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, _NUMBERS.get(tag.rpartition(":")[2], known)) for tag, known in resolvers]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


@lru_cache(32)
def _parsed(text: str) -> Any:
    """What a YAML text holds; the few files of presets are asked for a thousand times where claims are judged."""
    return yaml.load(text, Loader=_Loader)


def read_yaml(path: Path) -> dict[str, Any]:
    """Mapping in a YAML file, {} for an empty one. Raises BatchError when it is absent or no mapping of names."""
    try:
        content = deepcopy(_parsed(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: no UTF-8, no such date, ...
        raise BatchError(f"cannot read {path}: {checks.one_line(error)}") from error
    if content is not None and not isinstance(content, dict):
        raise BatchError(f"{path} holds {checks.shown(content)}; expected a mapping of names to values")
    if other := [key for key in content or {} if not isinstance(key, str)]:
        raise BatchError(f"{path} has the key {checks.shown(other[0])}; expected the name of a parameter")
    return content or {}
