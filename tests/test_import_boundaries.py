# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""The layout shows the architecture: who may import whom, what importing the package loads, and what it costs."""

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "modeling_t3d"

# file or folder -> siblings it may import
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
        "tile_plan_t3d",
        "volume_transforms_t3d",
        "volume_io_t3d",
    },
    "processing_t3d": {"image_processing_t3d", "image_settings_t3d"},
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
    "pipelines_t3d": {"geometry_t3d", "image_settings_t3d", "modeling_t3d", "processing_t3d"},
    "data": {
        "counter_noise_t3d",
        "geometry_t3d",
        "image_settings_t3d",
        "intensity_t3d",
        "prepared_volume_t3d",
        "tile_plan_t3d",
        "volume_dicom_t3d",
        "volume_io_t3d",
        "volume_transforms_t3d",
    },
    "training": {"communication_t3d"},
    "evaluation": {"geometry_t3d", "processing_t3d", "volume_transforms_t3d"},
}
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
def test_travelling_file_imports_only_its_allowed_siblings(path):
    assert sibling_imports(path) <= ALLOWED[path.stem]


@pytest.mark.parametrize("folder", SUBPACKAGES)
def test_subpackage_imports_only_its_allowed_siblings(folder):
    for path in (PACKAGE / folder).rglob("*.py"):
        assert sibling_imports(path) <= ALLOWED[folder], path.name


@pytest.mark.parametrize("path", TRAVELS, ids=lambda path: path.stem)
def test_travelling_file_reaches_siblings_by_from_dot_import_alone(path):
    """The exporter of custom code finds only `from .sibling import Name` and copies the files flat."""
    for level, module, _ in imports_of(path):
        assert not (level == 0 and module.split(".")[0] == "modeling_t3d"), "imports through the package's name"
        assert level <= 1
        assert not (level == 1 and (not module or "." in module)), "imports the folder itself or a sub-package"


@pytest.mark.parametrize("path", TRAVELS, ids=lambda path: path.stem)
def test_travelling_file_needs_torch_and_transformers_alone(path):
    required = {"torch", "numpy", "transformers", "huggingface_hub", "safetensors", "tokenizers"}
    for level, module, guarded in imports_of(path):
        package = module.split(".")[0]
        if level == 0 and not guarded:
            assert package in required or package in sys.stdlib_module_names, f"{package} is not inside a try"
        if level == 0:
            assert package not in {"monai", "accelerate"}


def test_configuration_and_geometry_stay_light():
    assert not {module for _, module, _ in imports_of(PACKAGE / "configuration_t3d.py") if module.startswith("torch")}
    losses = ("communication_t3d", "contrastive_loss_t3d", "clustering_loss_t3d", "pair_relations_t3d")
    for name in ("geometry_t3d", "volume_transforms_t3d", *losses):
        modules = {module.split(".")[0] for _, module, _ in imports_of(PACKAGE / f"{name}.py")}
        assert "transformers" not in modules, name


def test_accelerate_is_imported_in_training_alone():
    for path in PACKAGE.rglob("*.py"):
        if "training" not in path.parts:
            assert "accelerate" not in {module.split(".")[0] for _, module, _ in imports_of(path)}, path.name


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
