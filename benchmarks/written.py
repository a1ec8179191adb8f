"""The end of a benchmark's command line: measure, and write one JSON file if it is named."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def measured(parser: argparse.ArgumentParser, measure: Callable[[argparse.Namespace], dict[str, Any]]) -> None:
    """Measure what the command line asks for; --out is added to it."""
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args()
    result = measure(args)
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
