# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What the benchmarks share: pages that are written only where `--output` says."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    """`--output`, without a default: a quick run must not replace a committed table."""
    parser.add_argument("--output", type=Path, help="Markdown file to write; without it the page is only printed")


def publish(lines: Sequence[str], output: Path | None) -> None:
    """Print a page, and write it where asked."""
    text = "\n".join(lines) + "\n"
    print(text)
    if output is not None:
        output.write_text(text, encoding="utf-8")


__all__ = ["add_output_argument", "publish"]
