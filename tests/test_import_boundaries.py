# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The layout shows the architecture: who may import whom, what importing the package loads, and what it costs."""

import ast
import resource
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "modeling_t3d"

# File or folder -> siblings it imports. `__init__` imports its public names at once: the Auto classes and the pipeline
# registry take the classes themselves, and what that adds to torch and transformers is bounded below.
ALLOWED = {
    "presets_t3d": set(),
    "configuration_checks_t3d": set(),
    "configuration_t3d": {"configuration_checks_t3d", "presets_t3d"},
    "counter_noise_t3d": set(),
    "restoration_t3d": {"communication_t3d", "configuration_t3d", "counter_noise_t3d", "encoder_blocks_t3d"},
    "geometry_t3d": set(),
    "communication_t3d": set(),
    "classification_labels_t3d": set(),
    "pair_relations_t3d": {"communication_t3d"},
    "contrastive_loss_t3d": {"pair_relations_t3d"},
    "clustering_loss_t3d": {"communication_t3d"},
    "encoder_blocks_t3d": {"configuration_t3d"},
    "threads_t3d": set(),
    "encoder_contrast_t3d": {"encoder_blocks_t3d", "threads_t3d"},
    "encoders_t3d": {"configuration_t3d", "encoder_blocks_t3d", "encoder_contrast_t3d"},
    "volume_arithmetic_t3d": {"geometry_t3d"},
    # One reader per family of formats and one file per step of reading DICOM, so that each can be read at once;
    # `volume_io_t3d` alone is what others call.
    "volume_slices_t3d": set(),
    "volume_codestreams_t3d": {"volume_slices_t3d"},
    "volume_dicom_t3d": {
        "geometry_t3d",
        "volume_arithmetic_t3d",
        "volume_codestreams_t3d",
        "volume_headers_t3d",
        "volume_slices_t3d",
    },
    "volume_headers_t3d": {"geometry_t3d"},
    "volume_itk_t3d": {"geometry_t3d", "volume_arithmetic_t3d", "volume_headers_t3d"},
    "nifti_stream_t3d": {"geometry_t3d", "volume_arithmetic_t3d", "volume_headers_t3d"},
    "volume_io_t3d": {
        "geometry_t3d",
        "nifti_stream_t3d",
        "volume_arithmetic_t3d",
        "volume_dicom_t3d",
        "volume_headers_t3d",
        "volume_itk_t3d",
    },
    "volume_transforms_t3d": {"geometry_t3d", "volume_memory_t3d"},
    "volume_memory_t3d": set(),
    "resample_t3d": {"threads_t3d", "volume_memory_t3d"},
    "intensity_t3d": {"geometry_t3d", "volume_memory_t3d"},
    "tile_plan_t3d": {"geometry_t3d"},
    "local_views_t3d": {
        "geometry_t3d",
        "image_settings_t3d",
        "intensity_t3d",
        "prepared_volume_t3d",
        "reassembly_t3d",
        "tile_plan_t3d",
        "volume_memory_t3d",
        "volume_transforms_t3d",
    },
    "reassembly_t3d": {"geometry_t3d"},
    "prepared_volume_t3d": {
        "geometry_t3d",
        "intensity_t3d",
        "resample_t3d",
        "volume_memory_t3d",
        "volume_transforms_t3d",
    },
    "resample_affine_t3d": {"geometry_t3d", "resample_t3d", "threads_t3d"},
    "preparation_t3d": {
        "geometry_t3d",
        "intensity_t3d",
        "nifti_stream_t3d",
        "prepared_volume_t3d",
        "resample_affine_t3d",
        "resample_t3d",
        "threads_t3d",
        "volume_arithmetic_t3d",
        "volume_io_t3d",
        "volume_transforms_t3d",
    },
    "image_settings_t3d": {"intensity_t3d"},
    "image_processing_t3d": {
        "geometry_t3d",
        "image_settings_t3d",
        "local_views_t3d",
        "nifti_stream_t3d",
        "preparation_t3d",
        "resample_t3d",
        "prepared_volume_t3d",
        "volume_io_t3d",
    },
    "processing_t3d": {"image_processing_t3d", "image_settings_t3d", "reassembly_t3d"},
    "layers_t3d": {"configuration_t3d", "encoders_t3d"},
    "modeling_outputs_t3d": set(),
    # The head and the pipeline are named for the exporter of custom code alone: those imports are never executed.
    "pretrained_model_t3d": {
        "configuration_t3d",
        "encoders_t3d",
        "layers_t3d",
        "modeling_pretraining_t3d",
        "pipelines_t3d",
        "restoration_t3d",
    },
    "modeling_t3d": {
        "classification_labels_t3d",
        "communication_t3d",
        "configuration_t3d",
        "contrastive_loss_t3d",
        "encoders_t3d",
        "layers_t3d",
        "modeling_outputs_t3d",
        "pair_relations_t3d",
        "pretrained_model_t3d",
    },
    "modeling_pretraining_t3d": {
        "clustering_loss_t3d",
        "communication_t3d",
        "configuration_t3d",
        "encoders_t3d",
        "layers_t3d",
        "modeling_outputs_t3d",
        "modeling_t3d",
        "pair_relations_t3d",
        "pretrained_model_t3d",
        "restoration_t3d",
    },
    # Model and processor arrive as arguments; the checks of an image processor's arguments are the same here.
    "pipelines_t3d": {"image_settings_t3d"},
    "data": {
        "counter_noise_t3d",  # noise that every process and batch size draws alike
        "geometry_t3d",
        "image_settings_t3d",  # names of the loader's arguments, which are no part of what was prepared
        "intensity_t3d",  # the quality page asks what the processor asks: are these HU?
        "prepared_volume_t3d",  # what a store holds
        "tile_plan_t3d",  # places of views that all volumes of a batch share
        "volume_dicom_t3d",  # the table of body parts, for captions of a manifest's codes
        "volume_io_t3d",
        "volume_transforms_t3d",
    },
    "training": {"communication_t3d"},
    # The wording of prompts is the processor's.
    "evaluation": {"geometry_t3d", "processing_t3d"},
}
# Library -> the files and folders that may import it. What is beyond torch and transformers stands in the function
# that needs it, but for what `EAGER` names.
LIBRARIES = {
    "SimpleITK": {"volume_itk_t3d.py"},
    "accelerate": {"training"},
    "datasets": {"evaluation/metrics"},
    "distributed": {"data/build.py"},
    "evaluate": {"evaluation/metrics"},
    "fsspec": {"data/store_files.py", "data/store_reader.py", "training/checkpoint_copies.py"},
    "highdicom": set(),
    "isal": {"nifti_stream_t3d.py"},
    "itk": set(),
    "jinja2": {"training/model_card.py"},
    "matplotlib": {"evaluation/figures.py", "training/plots.py"},  # of which neither may import the other
    "monai": set(),
    "nibabel": {"nifti_stream_t3d.py"},
    "numcodecs": {"data/store_format.py"},
    "PIL": {"data/quality_volume.py"},
    "psutil": {"training/plan.py"},
    "pyarrow": {"data/manifest_files.py"},
    "pydicom": {"volume_dicom_t3d.py"},
    "sklearn": set(),
    "tqdm": {"data", "training/progress.py"},
    "xxhash": {"data/store_format.py"},
    "yaml": {"training/arguments.py"},
}
# Required, and in parts that `import modeling_t3d` does not load.
EAGER = {"accelerate", "datasets", "evaluate", "fsspec", "psutil", "tqdm", "xxhash"}
FOUNDATIONS = {"torch", "numpy", "transformers", "huggingface_hub", "safetensors", "tokenizers"}
TRAVELS = sorted(path for path in PACKAGE.glob("*_t3d.py"))
SUBPACKAGES = ("data", "training", "evaluation")


def imports_of(path: Path) -> list[tuple[int, str, bool]]:
    """(relative level, module, stands inside a function or `try`) of every import of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.Try)
        for inner in ast.walk(outer)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(0, name.name, id(node) in guarded) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or "", id(node) in guarded))
    return found


def sibling_imports(path: Path) -> set[str]:
    """Names of the package's own files and folders that a file imports, itself and its own folder left out."""
    inside = path.relative_to(PACKAGE).parts
    own = inside[0].removesuffix(".py")
    siblings = set()
    for level, module, _ in imports_of(path):
        parts = module.split(".")
        if level == 0 and parts[0] == "modeling_t3d":
            siblings.add(parts[1] if len(parts) > 1 else "__init__")
        elif level == len(inside):  # as many dots as folders: the package's top
            siblings.add(parts[0])
    return siblings - {own}


@pytest.mark.parametrize("path", TRAVELS, ids=lambda path: path.stem)
def test_travelling_file_imports_its_siblings_and_no_others(path):
    assert sibling_imports(path) == ALLOWED[path.stem]


@pytest.mark.parametrize("folder", SUBPACKAGES)
def test_subpackage_imports_its_siblings_and_no_others(folder):
    assert set().union(*map(sibling_imports, (PACKAGE / folder).rglob("*.py"))) == ALLOWED[folder]


@pytest.mark.parametrize("path", TRAVELS, ids=lambda path: path.stem)
def test_travelling_file_reaches_siblings_by_from_dot_import_alone(path):
    """The exporter of custom code finds only `from .sibling import Name` and copies the files flat."""
    for level, module, _ in imports_of(path):
        assert not (level == 0 and module.split(".")[0] == "modeling_t3d"), "imports through the package's name"
        assert level <= 1
        assert not (level == 1 and (not module or "." in module)), "imports the folder itself or a sub-package"


@pytest.mark.parametrize("path", TRAVELS, ids=lambda path: path.stem)
def test_travelling_file_needs_torch_and_transformers_alone(path):
    for level, module, guarded in imports_of(path):
        package = module.split(".")[0]
        if level == 0 and not guarded:
            assert package in FOUNDATIONS or package in sys.stdlib_module_names, f"{package} is not inside a try"
        if level == 0:
            assert package not in {"monai", "accelerate"}


def test_configuration_and_geometry_stay_light():
    assert not {module for _, module, _ in imports_of(PACKAGE / "configuration_t3d.py") if module.startswith("torch")}
    losses = ("communication_t3d", "contrastive_loss_t3d", "clustering_loss_t3d", "pair_relations_t3d")
    for name in ("geometry_t3d", "volume_transforms_t3d", *losses):
        modules = {module.split(".")[0] for _, module, _ in imports_of(PACKAGE / f"{name}.py")}
        assert "transformers" not in modules, name


@cache
def library_imports() -> dict[str, list[tuple[Path, bool]]]:
    """Library -> (file of the package, stands inside a function or `try`) of every import of it."""
    found: dict[str, list[tuple[Path, bool]]] = {}
    for path in PACKAGE.rglob("*.py"):
        for level, module, guarded in imports_of(path):
            library = module.split(".")[0]
            if level == 0 and library not in sys.stdlib_module_names | FOUNDATIONS | {PACKAGE.name}:
                found.setdefault(library, []).append((path.relative_to(PACKAGE), guarded))
    return found


@pytest.mark.parametrize("library", sorted(LIBRARIES.keys() | library_imports().keys()))
def test_library_is_imported_in_its_files_alone(library):
    imports, places = library_imports().get(library, []), {Path(place) for place in LIBRARIES.get(library, ())}
    for path, guarded in imports:
        assert places & {path, *path.parents}, path
        assert guarded or library in EAGER, path
    unused = {place for place in places if not any(place in (path, *path.parents) for path, _ in imports)}
    assert not unused


def test_metrics_know_no_other_process():
    for path in (PACKAGE / "evaluation" / "statistics.py", *(PACKAGE / "evaluation" / "metrics").glob("*.py")):
        assert "torch" not in {module.split(".")[0] for _, module, _ in imports_of(path)}, path.name


def test_package_imports_neither_examples_nor_tests():
    for path in PACKAGE.rglob("*.py"):
        packages = {module.split(".")[0] for level, module, _ in imports_of(path) if level == 0}
        assert not packages & {"examples", "tests", "conversion", "benchmarks"}, path.name


def test_import_does_not_load_heavy_packages():
    heavy = ("monai", "nibabel", "accelerate", "evaluate")
    code = f"import sys, modeling_t3d; print(*[name for name in {heavy} if name in sys.modules])"
    baseline = (
        "import sys, torch; from transformers import PreTrainedModel, AutoModel, AutoProcessor; print(*sys.modules)"
    )
    already = set(subprocess.check_output([sys.executable, "-c", baseline], text=True).split())
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert not loaded - already


def cpu_seconds(code: str) -> float:
    """Processor time of a fresh interpreter that runs `code`: unlike the clock, it does not grow with other load."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_import_costs_little_more_than_torch_and_transformers():
    """At most 1.15 times what importing its own foundations costs, the least disturbed of interleaved runs each."""
    baseline = "import torch; from transformers import PreTrainedModel, AutoModel, AutoProcessor"
    seconds: dict[str, list[float]] = {baseline: [], "import modeling_t3d": []}
    for _ in range(3):
        for code, runs in seconds.items():
            runs.append(cpu_seconds(code))
    least = {code: min(runs) for code, runs in seconds.items()}
    assert least["import modeling_t3d"] <= 1.15 * least[baseline], least
