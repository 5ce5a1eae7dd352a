# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Transformers' own common tests, imported from the sources that `TRANSFORMERS_SOURCE` names.

They are not installed with the library. A checkout of its repository serves, or its unpacked source distribution:
`pip download transformers==VERSION --no-deps --no-binary transformers`, then `tar xf`. Take the installed version: the
tests follow the library from day to day.
"""

import importlib
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import pytest

VARIABLE = "TRANSFORMERS_SOURCE"

# A source distribution holds the common tests themselves, but not what they take from folders beside them. In its
# place stand empty classes (no test of exporters or generation is run then) and arguments of every configuration.
STAND_INS = {
    "tests/__init__.py": "",
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/generation/__init__.py": "",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/utils/__init__.py": "",
    "tests/utils/test_configuration_utils.py": (
        "config_common_kwargs = {\n"
        '    "return_dict": False, "output_hidden_states": True, "dtype": "float16", "chunk_size_feed_forward": 5,\n'
        '    "architectures": ["BertModel"], "id2label": {0: "label"}, "label2id": {"label": "0"},\n'
        '    "problem_type": "regression",\n'
        "}\n"
    ),
    "utils/fetch_hub_objects_for_ci.py": "def url_to_local_path(url):\n    return url\n",
}

_assembled: list[tempfile.TemporaryDirectory] = []


def _assemble(source: Path) -> Path:
    """A folder that looks like the sources, made of links to them; what they lack is a stand-in."""
    _assembled.append(tempfile.TemporaryDirectory(prefix="transformers_common_"))
    folder = Path(_assembled[-1].name)
    for name in ("tests", "utils"):
        (folder / name).mkdir()
        for entry in (source / name).glob("*"):
            (folder / name / entry.name).symlink_to(entry.resolve())
    for name, text in STAND_INS.items():
        path = folder / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    return folder


def common_tests(name: str) -> ModuleType:
    """The module `tests.<name>` of Transformers; skips the module that asks, with the reason, where there is none."""
    source = os.environ.get(VARIABLE)
    if not source:
        pytest.skip(f"{VARIABLE} names no sources of Transformers with their common tests", allow_module_level=True)
    if not (Path(source) / "tests" / f"{name}.py").is_file():
        raise FileNotFoundError(f"{VARIABLE}={source} holds no tests/{name}.py; name the root of the sources")
    if not _assembled:
        sys.path.insert(0, str(_assemble(Path(source))))
    return importlib.import_module(f"tests.{name}")
