# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""What every converter shares: safe reading, an explicit key map, a report that must be empty, provenance, saving.

A source adds its ordered table of `KeyRule`s, its configuration and a check of outputs; see `convert_*_to_hf.py`.
"""

import hashlib
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

_CHUNK_BYTES = 1 << 20
_CONTAINERS = ("state_dict", "model", "model_state_dict")  # names under which training scripts keep a state dict
_PARALLEL_PREFIX = "module."


@dataclass(frozen=True)
class KeyRule:
    r"""
    One row of a key map. The first row whose `source` matches a whole key names the target.

    Args:
        source (`str`): regular expression that the whole source key must match.
        target (`str`): the target key, with `\1` ... for the groups of `source`.
        transform (`Callable[[torch.Tensor], torch.Tensor]`, *optional*): reshapes or permutes the tensor on its way.
    """

    source: str
    target: str
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass
class ConversionReport:
    """
    What became of every key, and what was checked. A key outside `converted` and `ignored` fails the conversion.

    Attributes:
        converted (`dict[str, str]`): target key to the source key that fills it.
        ignored (`list[str]`): source keys that the source's ignore list names.
        unused (`list[str]`): source keys without a place in the model.
        missing (`list[str]`): the model's keys that no source key fills.
        mismatched (`list[str]`): shapes or kinds of numbers that differ, and targets that two source keys claim.
        invalid (`list[str]`): entries that are no tensors or hold NaN or infinity.
        checked (`list[str]`): the checks that were passed.
        assumed (`dict[str, Any]`): settings that neither the weights nor a check have shown to be the source's.
    """

    converted: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    invalid: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    assumed: dict[str, Any] = field(default_factory=dict)

    @property
    def failures(self) -> dict[str, list[str]]:
        """The entries that fail the conversion, by kind; empty if it may be used."""
        kinds = {
            "unused": self.unused,
            "missing": self.missing,
            "mismatched": self.mismatched,
            "invalid": self.invalid,
        }
        return {kind: entries for kind, entries in kinds.items() if entries}

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} tensors converted, {len(self.ignored)} ignored on purpose"]
        lines += [f"{kind}: {entry}" for kind, entries in self.failures.items() for entry in entries]
        lines += [f"checked: {check}" for check in self.checked]
        lines += [f"assumed, not checked: {name} {value}" for name, value in self.assumed.items()]
        return "\n".join(lines)


class ConversionError(ValueError):
    """A checkpoint that cannot be read or does not fit; `report` names the keys where it is about keys."""

    def __init__(self, message: str, report: ConversionReport | None = None):
        super().__init__(message)
        self.report = report


def read_tensors(path: str | Path) -> dict[str, Any]:
    """
    Read a file's mapping from names to tensors without running anything that it holds: safetensors, or PyTorch files
    restricted to tensors and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        raise ConversionError(f"there is no file {str(path)!r}; give the path of a downloaded file")
    try:
        if path.suffix.lower() == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{str(path)!r} is no checkpoint of tensors alone: loading it could run code that it carries, or it is "
            "damaged; save its state dict again as safetensors, from a source that you trust"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"{str(path)!r} is no readable checkpoint; download or copy it again") from error
    if not isinstance(content, Mapping) or not content:
        raise ConversionError(f"{str(path)!r} holds no state dict; expected a mapping from names to tensors")
    return dict(content)


def read_state_dict(path: str | Path) -> dict[str, Any]:
    """
    A checkpoint's tensors, see [`read_tensors`]: out of the usual containers, and without the `module.` that
    `DataParallel` puts before every name.
    """
    content = read_tensors(path)
    held = [name for name in _CONTAINERS if isinstance(content.get(name), Mapping) and _has_tensors(content[name])]
    if len(held) > 1:
        raise ConversionError(
            f"{str(path)!r} holds several state dicts ({', '.join(held)}); save the one to convert in its own file"
        )
    state_dict = content[held[0]] if held else content
    if not _has_tensors(state_dict):
        raise ConversionError(
            f"{str(path)!r} holds no state dict; expected a mapping from names to tensors, bare or under one of "
            f"{', '.join(_CONTAINERS)}"
        )
    if others := [key for key in state_dict if not isinstance(key, str)]:
        raise ConversionError(f"{str(path)!r} has the key {others[0]!r}, which is no name; name every tensor by text")
    if all(key.startswith(_PARALLEL_PREFIX) for key in state_dict):
        state_dict = {key.removeprefix(_PARALLEL_PREFIX): value for key, value in state_dict.items()}
    return dict(state_dict)


def _has_tensors(mapping: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, torch.Tensor) for value in mapping.values())


def convert_state_dict(
    state_dict: Mapping[str, Any],
    target: Mapping[str, torch.Tensor],
    rules: Sequence[KeyRule],
    ignore: Iterable[str] = (),
) -> tuple[dict[str, torch.Tensor], ConversionReport]:
    """
    Rename and check tensors.

    Args:
        state_dict (`Mapping[str, Any]`): the source.
        target (`Mapping[str, torch.Tensor]`): the model's state dict; only shapes and dtypes are read.
        rules (`Sequence[KeyRule]`): the key map, tried in order.
        ignore (`Iterable[str]`): regular expressions of source keys, whole, that are known to be of no use.

    Returns:
        The tensors under the target's names and dtypes, and the report; nothing is raised here.
    """
    report = ConversionReport()
    ignore = [re.compile(pattern) for pattern in ignore]
    rules = [(re.compile(rule.source), rule) for rule in rules]
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in state_dict.items():
        match, rule = next(((m, rule) for pattern, rule in rules if (m := pattern.fullmatch(key))), (None, None))
        if match is None:
            (report.ignored if any(pattern.fullmatch(key) for pattern in ignore) else report.unused).append(key)
            continue
        name = match.expand(rule.target)
        if name not in target:
            report.unused.append(key)
        elif name in report.converted:
            report.mismatched.append(f"{key} and {report.converted[name]} both claim {name}")
        else:
            report.converted[name] = key
            if not isinstance(tensor, torch.Tensor):
                report.invalid.append(f"{key} is a {type(tensor).__name__}, not a tensor")
                continue
            tensor = tensor if rule.transform is None else rule.transform(tensor)
            if _fits(key, tensor, target[name], report):
                tensors[name] = tensor.to(target[name].dtype)
    report.missing = [name for name in target if name not in report.converted]
    report.converted = {name: key for name, key in report.converted.items() if name in tensors}
    return tensors, report


def _fits(key: str, tensor: torch.Tensor, target: torch.Tensor, report: ConversionReport) -> bool:
    """Whether a tensor may fill its target; the reason why not goes into the report."""
    if tensor.shape != target.shape:
        report.mismatched.append(f"{key} has shape {tuple(tensor.shape)}, the model's {tuple(target.shape)}")
    elif tensor.is_floating_point() != target.is_floating_point():
        report.mismatched.append(f"{key} is {tensor.dtype}, the model's {target.dtype}")
    elif not torch.isfinite(tensor).all():
        report.invalid.append(f"{key} holds NaN or infinity")
    else:
        return True
    return False


def load_converted(
    model: nn.Module, state_dict: Mapping[str, Any], rules: Sequence[KeyRule], ignore: Iterable[str] = ()
) -> ConversionReport:
    """Fill `model` from a foreign state dict; a [`ConversionError`] names every key that is at fault."""
    tensors, report = convert_state_dict(state_dict, model.state_dict(), rules, ignore)
    if report.failures:
        counts = ", ".join(f"{len(entries)} {kind}" for kind, entries in report.failures.items())
        raise ConversionError(
            f"the checkpoint does not fit the model ({counts}); check depth, variant and file\n{report}", report
        )
    model.load_state_dict(tensors, strict=True)
    return report


def sha256_of(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def provenance(
    path: str | Path, report: ConversionReport, *, parent: str, license: str, **details: Any
) -> dict[str, Any]:
    """
    What `config.provenance` of a converted model records.

    Args:
        path (`str` or `Path`): the source file; its name (not its folder) and hash are kept.
        report ([`ConversionReport`]): what was checked, and what was not.
        parent (`str`): name of the published checkpoint.
        license (`str`): licence of its weights, as their authors state it; kept as given, in the Hub's spelling of
            the key.
        details: anything else that JSON can hold, such as the data.
    """
    return {
        "stage": "converted",
        "parent": parent,
        "parent_file": Path(path).name,
        "parent_sha256": sha256_of(path),
        "license": license,
        "checked": report.checked,
        "assumed_not_checked": report.assumed,
        **details,
    }


def model_card(model: PreTrainedModel) -> str:
    """The `README.md` of a converted model: metadata for the Hub, and what `config.provenance` records."""
    facts = model.config.provenance
    header = ModelCardData(license=facts["license"], library_name="transformers", tags=["medical", "3d", "t3d"])
    assumed = [f"{name}: {value}" for name, value in facts["assumed_not_checked"].items()]
    known = {"parent", "parent_file", "parent_sha256", "license", "checked", "assumed_not_checked", "stage"}
    more = [f"- {name}: {value}" for name, value in facts.items() if name not in known]
    return "\n".join(
        [
            f"---\n{header.to_yaml()}\n---",
            f"# {facts['parent']}, converted",
            "",
            f"The weights of {facts['parent']} as a `{type(model).__name__}` of modeling_t3d, a re-implementation of "
            "T3D (arXiv 2312.01529) from its public description. They were converted, not trained again.",
            "",
            "**Not a medical device.** It must not be used for diagnosis, triage, treatment or any other decision "
            "about a person.",
            "",
            "## Source",
            "",
            f"- parent: {facts['parent']}",
            f"- file: {facts['parent_file']}, SHA-256 `{facts['parent_sha256']}`",
            f"- licence of the weights: {facts['license']}",
            *more,
            "",
            "## Checked",
            "",
            *(f"- {check}" for check in facts["checked"]),
            "",
            "## Assumed, not checked",
            "",
            *(f"- {entry}" for entry in assumed or ["nothing"]),
            "",
        ]
    )


def save_converted(model: PreTrainedModel, output_dir: str | Path) -> None:
    """
    `save_pretrained`, with a model card, into a new or empty folder, where links lead, which appears complete or not
    at all. `model.config.provenance` must be that of [`provenance`].
    """
    try:
        folder = Path(os.path.realpath(output_dir))
        if folder == Path.cwd():
            raise ConversionError(f"{str(output_dir)!r} is the folder you are in; choose a new folder")
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise ConversionError(f"{str(output_dir)!r} is not empty; choose a new folder or remove that one")
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            model.save_pretrained(staging)
            (staging / "README.md").write_text(model_card(model), encoding="utf-8")
            staging.chmod(0o755)
            staging.rename(folder)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    except OSError as error:
        reason = error.strerror or "the system refuses"
        raise ConversionError(
            f"{str(output_dir)!r} cannot be made ({reason}); choose a new folder where you may write"
        ) from error


__all__ = [
    "ConversionError",
    "ConversionReport",
    "KeyRule",
    "convert_state_dict",
    "load_converted",
    "model_card",
    "provenance",
    "read_state_dict",
    "read_tensors",
    "save_converted",
    "sha256_of",
]
