# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Converters, on random values in the published layouts: outputs against MONAI's network, and every refusal."""

import hashlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from monai.networks.nets import resnet as monai_resnet
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the converters are no part of the installed package

from conversion import convert_medicalnet_to_hf, convert_monai_resnet_to_hf  # noqa: E402
from conversion.convert_medicalnet_to_hf import convert_medicalnet, medicalnet_config  # noqa: E402
from conversion.convert_monai_resnet_to_hf import convert_monai_resnet  # noqa: E402
from conversion.engine import (  # noqa: E402
    ConversionError,
    ConversionReport,
    KeyRule,
    convert_state_dict,
    provenance,
    read_state_dict,
    save_converted,
)
from conversion.resnets import (  # noqa: E402
    ARCHITECTURES,
    check_against_monai,
    check_against_reference,
    key_rules,
    resnet_config,
)
from modeling_t3d.modeling_t3d import T3DVisionModel  # noqa: E402

SMALL = [4, 8, 12, 16]
DEPTHS = sorted(ARCHITECTURES)
NORM_ENTRIES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def randomize(network):
    """Random values in every entry, statistics included, at a scale that keeps the outputs near one."""
    for key, value in network.state_dict().items():
        if key.endswith("num_batches_tracked"):
            value.fill_(7)
        elif key.endswith("running_var") or (value.ndim == 1 and key.endswith("weight")):
            value.uniform_(0.5, 1.5)
        elif value.ndim == 1:
            value.normal_(std=0.1)
    return network.eval()


def medicalnet_network(depth):
    """MONAI's network in MedicalNet's variant of a depth."""
    bias, shortcut = monai_resnet.get_medicalnet_pretrained_resnet_args(depth)
    make = getattr(monai_resnet, f"resnet{depth}")
    return make(n_input_channels=1, feed_forward=False, shortcut_type=shortcut, bias_downsample=bias, conv1_t_stride=2)


def small_network(depth=10, **kwargs):
    layer_type, depths = ARCHITECTURES[depth]
    return randomize(monai_resnet.ResNet(layer_type, depths, SMALL, **{"n_input_channels": 1, **kwargs}))


def save_medicalnet(network, path, **kwargs):
    state_dict = {f"module.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state_dict}, path, **kwargs)
    return state_dict


def assert_same_outputs(folder, network, num_channels=1):
    model = T3DVisionModel.from_pretrained(folder).eval()
    pixel_values = torch.randn(2, num_channels, 33, 32, 24)
    with torch.no_grad():
        result, expected = model(pixel_values).pooler_output, network(pixel_values)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    return model


def run(module, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"conversion.{module}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)


# --- MedicalNet


def test_medicalnet_from_the_command_line(tmp_path):
    network = randomize(medicalnet_network(10))
    save_medicalnet(network, tmp_path / "resnet_10.pth", _use_new_zipfile_serialization=False)  # as published
    arguments = ["--checkpoint", tmp_path / "resnet_10.pth", "--depth", 10, "--output-dir", tmp_path / "out"]
    result = run("convert_medicalnet_to_hf", *arguments)
    assert result.returncode == 0, result.stderr
    assert f"{len(network.state_dict())} tensors converted, 0 ignored" in result.stdout
    model = assert_same_outputs(tmp_path / "out", network)
    facts = model.config.provenance
    assert facts["parent"] == "TencentMedicalNet/MedicalNet-Resnet10"
    assert facts["parent_file"] == "resnet_10.pth"
    assert facts["parent_sha256"] == hashlib.sha256((tmp_path / "resnet_10.pth").read_bytes()).hexdigest()
    assert facts["license"] == "mit"
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize("depth", DEPTHS)
def test_every_medicalnet_layout_maps_key_by_key(depth):
    with torch.device("meta"):
        source = medicalnet_network(depth).state_dict()
        target = T3DVisionModel(medicalnet_config(depth)).state_dict()
    source = {key: torch.zeros((), dtype=v.dtype).expand(v.shape) for key, v in source.items()}
    if depth == 50:
        assert len(source) == 318
        assert source["conv1.weight"].shape == (64, 1, 7, 7, 7)
        assert source["layer1.0.downsample.0.weight"].shape == (256, 64, 1, 1, 1)
    assert any("downsample" in key for key in source) == (depth not in (18, 34))
    tensors, report = convert_state_dict(source, target, key_rules())
    assert not report.failures
    assert not report.ignored
    assert tensors.keys() == target.keys()
    assert all(key == name.removeprefix("encoder.") for name, key in report.converted.items())


@pytest.mark.slow
@pytest.mark.parametrize("depth", DEPTHS)
def test_every_medicalnet_depth_in_full_size(depth, tmp_path):
    network = randomize(medicalnet_network(depth))
    save_medicalnet(network, tmp_path / "weights.pth")
    convert_medicalnet(tmp_path / "weights.pth", depth, tmp_path / "out")
    assert_same_outputs(tmp_path / "out", network)


def test_medicalnet_of_another_depth_is_refused(tmp_path):
    save_medicalnet(medicalnet_network(10), tmp_path / "weights.pth")
    with pytest.raises(ConversionError, match="does not fit the model") as error:
        convert_medicalnet(tmp_path / "weights.pth", 18, tmp_path / "out")
    report = error.value.report
    assert report.unused == [
        f"layer{stage}.0.downsample.{entry}"
        for stage in (2, 3, 4)
        for entry in ("0.weight", *(f"1.{name}" for name in NORM_ENTRIES))
    ]
    assert "encoder.layer1.1.conv1.weight" in report.missing
    assert "missing: encoder.layer1.1.conv1.weight" in str(error.value)
    assert not (tmp_path / "out").exists()


# --- MONAI


@pytest.mark.parametrize("depth", DEPTHS)
def test_monai_in_small_widths(depth, tmp_path):
    network = small_network(depth, n_input_channels=2, feed_forward=False)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    convert_monai_resnet(tmp_path / "weights.pt", depth, tmp_path / "out", license="apache-2.0")
    model = assert_same_outputs(tmp_path / "out", network, num_channels=2)
    assert model.config.provenance["license"] == "apache-2.0"
    assert model.config.provenance["parent"] == "weights.pt"


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"shortcut_type": "A"}, {}),
        ({"bias_downsample": False}, {}),
        ({"conv1_t_size": (3, 5, 7), "conv1_t_stride": (1, 2, 2)}, {"stem_stride": [1, 2, 2]}),
        ({"no_max_pool": True, "conv1_t_stride": 2}, {"stem_stride": 2, "stem_pool": False}),
    ],
    ids=["shortcut-A", "no-bias", "stem", "no-pool"],
)
def test_monai_variants(settings, options, tmp_path):
    network = small_network(18, feed_forward=False, **settings)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    convert_monai_resnet(tmp_path / "weights.safetensors", 18, tmp_path / "out", license="mit", **options)
    assert_same_outputs(tmp_path / "out", network)


def test_monai_classifier_is_left_out_and_said(tmp_path):
    network = small_network(feed_forward=True, num_classes=3)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    report = convert_monai_resnet(tmp_path / "weights.pt", 10, tmp_path / "out", license="mit")
    assert report.ignored == ["fc.weight", "fc.bias"]
    assert "2 ignored on purpose" in str(report)
    network.fc = torch.nn.Identity()
    assert_same_outputs(tmp_path / "out", network)


def test_monai_from_the_command_line_with_all_options(tmp_path):
    network = small_network(feed_forward=False, conv1_t_stride=(1, 2, 2), no_max_pool=True)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    arguments = ["--checkpoint", str(tmp_path / "weights.pt"), "--depth", "10", "--license", "mit", "--parent", "mine"]
    arguments += ["--output-dir", str(tmp_path / "out"), "--stem-stride", "1", "2", "2", "--no-stem-pool"]
    convert_monai_resnet_to_hf.main(arguments)
    assert assert_same_outputs(tmp_path / "out", network).config.provenance["parent"] == "mine"


def test_a_planar_network_is_refused(tmp_path):
    torch.save(small_network(spatial_dims=2, feed_forward=False).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ConversionError, match="only 3D networks"):
        convert_monai_resnet(tmp_path / "weights.pt", 10, tmp_path / "out", license="mit")


def small_model():
    """A converted model as a converter leaves it, made from nothing."""
    model = T3DVisionModel(resnet_config(10, shortcut_type="B", downsample_bias=True, widths=SMALL))
    model.config.provenance = provenance(__file__, ConversionReport(), parent="nothing", license="mit")
    return model.eval()


def save_reference(network, path, shape=(2, 1, 24, 22, 20)):
    pixel_values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.save({"input": pixel_values, "output": network(pixel_values)}, path)


def test_a_stem_that_nothing_checks_is_said_to_be_assumed(tmp_path, capsys):
    network = small_network(feed_forward=False, conv1_t_stride=(1, 2, 2), no_max_pool=True)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    arguments = ["--checkpoint", str(tmp_path / "weights.pt"), "--depth", "10", "--license", "mit"]
    convert_monai_resnet_to_hf.main([*arguments, "--output-dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "assumed, not checked: stem_stride [1, 1, 1]\nassumed, not checked: stem_pool True\n" in printed
    facts = T3DVisionModel.from_pretrained(tmp_path / "out").config.provenance
    assert facts["assumed_not_checked"] == {
        "stem_stride": [1, 1, 1],
        "stem_pool": True,
        "activation": "relu",
        "norm_eps": 1e-5,
    }
    assert not any("stem" in check for check in facts["checked"])


def test_a_reference_checks_the_stem(tmp_path, capsys):
    network = small_network(feed_forward=False, conv1_t_stride=(1, 2, 2), no_max_pool=True)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    save_reference(network, tmp_path / "reference.pt")
    arguments = ["--checkpoint", str(tmp_path / "weights.pt"), "--depth", "10", "--license", "mit"]
    arguments += ["--output-dir", str(tmp_path / "out"), "--reference", str(tmp_path / "reference.pt")]
    for wrong in ([], ["--no-stem-pool"], ["--stem-stride", "1", "2", "2"]):
        with pytest.raises(SystemExit, match=r"error: .*pooled output differs .*reference\.pt"):
            convert_monai_resnet_to_hf.main([*arguments, *wrong])
        assert not (tmp_path / "out").exists()
    convert_monai_resnet_to_hf.main([*arguments, "--no-stem-pool", "--stem-stride", "1", "2", "2"])
    printed = capsys.readouterr().out
    assert "checked: pooled output with stem_stride [1, 2, 2], stem_pool False against the source" in printed
    assert "assumed" not in printed
    facts = assert_same_outputs(tmp_path / "out", network).config.provenance
    assert facts["assumed_not_checked"] == {}
    assert hashlib.sha256((tmp_path / "reference.pt").read_bytes()).hexdigest() in facts["checked"][-1]


def test_a_medicalnet_reference_checks_the_stem(tmp_path):
    network = randomize(medicalnet_network(10))
    save_medicalnet(network, tmp_path / "weights.pth")
    save_reference(network, tmp_path / "reference.pt")
    with pytest.raises(ConversionError, match="pooled output differs"):
        convert_medicalnet(tmp_path / "weights.pth", 10, tmp_path / "out", 1, tmp_path / "reference.pt")
    report = convert_medicalnet(tmp_path / "weights.pth", 10, tmp_path / "out", 2, tmp_path / "reference.pt")
    assert report.assumed == {}


def test_a_reference_that_every_stem_fits_checks_nothing(tmp_path):
    network = small_network(feed_forward=False)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    save_reference(network, tmp_path / "reference.pt", shape=(1, 1, 1, 1, 1))
    with pytest.raises(ConversionError, match=r"fits stem_stride .* as well, so it checks neither"):
        convert_monai_resnet(
            tmp_path / "weights.pt", 10, tmp_path / "out", license="mit", reference=tmp_path / "reference.pt"
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": None}, r"'output' of 2 axes, the second of size 16; found none"),
        ({"input": torch.zeros(2, 3, 8, 8, 8)}, r"'input' of 5 axes, the second of size 1; found shape \(2, 3"),
        ({"output": torch.zeros(2, 3)}, r"'output' of 2 axes, the second of size 16; found shape \(2, 3\)"),
        ({"output": torch.full((2, 16), float("nan"))}, "'output' of the reference .* holds NaN"),
        ({"output": torch.zeros(3, 16)}, "2 inputs and 3 outputs"),
    ],
)
def test_a_reference_of_another_form_is_refused(change, message, tmp_path):
    content = {"input": torch.zeros(2, 1, 8, 8, 8), "output": torch.zeros(2, 16), **change}
    torch.save(content, tmp_path / "reference.pt")
    with pytest.raises(ConversionError, match=message):
        check_against_reference(small_model(), tmp_path / "reference.pt")


def test_the_output_check_can_fail():
    network = small_network(feed_forward=False)
    config = resnet_config(10, shortcut_type="B", downsample_bias=True, widths=SMALL)
    model = T3DVisionModel(config).eval()
    model.encoder.load_state_dict(network.state_dict())
    assert check_against_monai(model, network.state_dict()) <= 1e-5
    with torch.no_grad():
        model.encoder.layer3[0].bn1.running_mean += 0.01
    with pytest.raises(ConversionError, match="differs from MONAI's network"):
        check_against_monai(model, network.state_dict())


def test_a_converted_folder_has_a_card(tmp_path):
    torch.save(small_network(feed_forward=False).state_dict(), tmp_path / "weights.pt")
    arguments = ["--checkpoint", str(tmp_path / "weights.pt"), "--depth", "10", "--parent", "my: resnet"]
    arguments += ["--license", "cc-by-nc-sa-4.0", "--output-dir", str(tmp_path / "out")]
    convert_monai_resnet_to_hf.main(arguments)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict() == {
        "license": "cc-by-nc-sa-4.0",
        "library_name": "transformers",
        "tags": ["medical", "3d", "t3d"],
    }
    facts = T3DVisionModel.from_pretrained(tmp_path / "out").config.provenance
    assert facts["license"] == "cc-by-nc-sa-4.0"
    digest = hashlib.sha256((tmp_path / "weights.pt").read_bytes()).hexdigest()
    for entry in (
        "# my: resnet, converted",
        "re-implementation of T3D (arXiv 2312.01529) from its public description",
        "Not a medical device.",
        "parent: my: resnet",
        f"file: weights.pt, SHA-256 `{digest}`",
        "licence of the weights: cc-by-nc-sa-4.0",
        *facts["checked"],
        "## Assumed, not checked\n\n- stem_stride: [1, 1, 1]\n- stem_pool: True\n",
    ):
        assert entry in card.text
    assert str(tmp_path) not in card.content


# --- the engine: every refusal


def damaged(change):
    state_dict = small_network(feed_forward=False).state_dict()
    change(state_dict)
    return state_dict


@pytest.mark.parametrize(
    ("change", "kind", "entry"),
    [
        (lambda s: s.update(extra=torch.zeros(1)), "unused", "extra"),
        (lambda s: s.update({"layer1.0.conv9.weight": torch.zeros(1)}), "unused", "layer1.0.conv9.weight"),
        (lambda s: s.update({"layer1.7.conv1.weight": torch.zeros(1)}), "unused", "layer1.7.conv1.weight"),
        (lambda s: s.pop("layer2.0.bn1.bias"), "missing", "encoder.layer2.0.bn1.bias"),
        (lambda s: s.pop("conv1.weight"), "missing", "encoder.conv1.weight"),
        (lambda s: s.update({"bn1.bias": torch.zeros(5)}), "mismatched", r"bn1.bias has shape \(5,\), .* \(4,\)"),
        (lambda s: s.update({"bn1.bias": torch.zeros(4).long()}), "mismatched", "bn1.bias is torch.int64"),
        (lambda s: s["bn1.bias"].fill_(float("nan")), "invalid", "bn1.bias holds NaN"),
        (lambda s: s.update({"bn1.bias": 3}), "invalid", "bn1.bias is a int, not a tensor"),
    ],
)
def test_each_fault_fails_and_is_named(change, kind, entry, tmp_path):
    torch.save(damaged(change), tmp_path / "weights.pt")
    with pytest.raises(ConversionError, match=f"{kind}: {entry}") as error:
        convert_monai_resnet(tmp_path / "weights.pt", 10, tmp_path / "out", license="mit")
    assert list(error.value.report.failures) == [kind]
    assert len(error.value.report.failures[kind]) == 1
    assert not (tmp_path / "out").exists()


def test_the_first_rule_wins_and_transforms():
    target = {"a.weight": torch.zeros(2, 3), "b": torch.zeros(2, dtype=torch.float64)}
    rules = [
        KeyRule(r"old\.(\w+)\.kernel", r"\1.weight", lambda tensor: tensor.T),
        KeyRule(r"old\.b.*", "b"),
        KeyRule(r"old.*", "nowhere"),
    ]
    source = {"old.a.kernel": torch.randn(3, 2), "old.bias": torch.ones(2), "dropped.1": torch.ones(1)}
    tensors, report = convert_state_dict(source, target, rules, ignore=[r"dropped\.\d"])
    assert torch.equal(tensors["a.weight"], source["old.a.kernel"].T)
    assert tensors["b"].dtype == torch.float64
    assert report.converted == {"a.weight": "old.a.kernel", "b": "old.bias"}
    assert (report.ignored, report.failures) == (["dropped.1"], {})
    _, report = convert_state_dict({**source, "old.b": torch.ones(2)}, target, rules, ignore=[r"dropped\.\d"])
    assert report.failures == {"mismatched": ["old.b and old.bias both claim b"]}
    _, report = convert_state_dict(source, target, rules, ignore=["dropped"])  # a pattern must match the whole key
    assert report.failures == {"unused": ["dropped.1"]}


class Payload:
    """A pickle that would write a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize(
    "writer", [lambda obj, path: torch.save(obj, path), lambda o, p: p.write_bytes(pickle.dumps(o, protocol=2))]
)
def test_a_pickle_with_code_is_refused_and_not_run(writer, tmp_path):
    checkpoint, trace = tmp_path / "weights.pth", tmp_path / "trace"
    pickle.loads(pickle.dumps(Payload(trace))).close()
    assert trace.exists()  # the payload does run where pickles are trusted
    trace.unlink()
    writer({"state_dict": {"module.conv1.weight": Payload(trace)}}, checkpoint)
    with pytest.raises(ConversionError, match=r"weights.pth.* could run code"):
        read_state_dict(checkpoint)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.pth", None, "there is no file"),
        ("empty.pth", b"", "no readable checkpoint"),
        ("text.pth", b"not a checkpoint", "no checkpoint of tensors|no readable checkpoint"),
        ("cut.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{", "no readable checkpoint"),
    ],
)
def test_unreadable_files_are_named(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConversionError, match=message) as error:
        read_state_dict(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_a_truncated_file_is_refused(tmp_path):
    torch.save(small_network(feed_forward=False).state_dict(), tmp_path / "weights.pt")
    content = (tmp_path / "weights.pt").read_bytes()
    (tmp_path / "weights.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ConversionError, match=r"weights\.pt"):
        read_state_dict(tmp_path / "weights.pt")


@pytest.mark.parametrize("content", [[torch.zeros(1)], {}, torch.zeros(3)])
def test_a_file_without_state_dict_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ConversionError, match="holds no state dict"):
        read_state_dict(tmp_path / "weights.pt")


def prefixed(state_dict):
    return {f"module.{key}": value for key, value in state_dict.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        prefixed,
        lambda s: {"state_dict": prefixed(s), "epoch": 3},
        lambda s: {"model": s, "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(1)}}}},
        lambda s: {"model_state_dict": s},
        lambda s: {"state_dict": s, "model": {"name": "resnet10"}},
    ],
    ids=["module.", "state_dict", "model", "model_state_dict", "a model without tensors"],
)
def test_usual_containers_and_parallel_prefixes_are_taken_off(wrap, tmp_path):
    state_dict = small_network(feed_forward=False).state_dict()
    torch.save(wrap(state_dict), tmp_path / "weights.pt")
    found = read_state_dict(tmp_path / "weights.pt")
    assert found.keys() == state_dict.keys()
    assert all(torch.equal(found[key], value) for key, value in state_dict.items())


def test_a_prefix_that_is_not_common_stays(tmp_path):
    tensors = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    torch.save(tensors, tmp_path / "weights.pt")
    assert read_state_dict(tmp_path / "weights.pt").keys() == tensors.keys()


def test_medicalnet_without_the_parallel_prefix(tmp_path):
    network = randomize(medicalnet_network(10))
    torch.save({"state_dict": network.state_dict()}, tmp_path / "weights.pth")
    convert_medicalnet(tmp_path / "weights.pth", 10, tmp_path / "out")
    assert_same_outputs(tmp_path / "out", network)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"state_dict": {"a": torch.zeros(1)}, "model": {"a": torch.ones(1)}},
            r"several state dicts \(state_dict, mod",
        ),
        ({1: torch.zeros(1)}, "the key 1, which is no name"),
        ({"state_dict": {"a": 1}}, "holds no state dict"),
    ],
)
def test_a_state_dict_that_is_not_clear_is_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ConversionError, match=message) as error:
        read_state_dict(tmp_path / "weights.pt")
    assert str(tmp_path / "weights.pt") in str(error.value)


def test_safetensors_are_known_in_upper_case(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "weights.SAFETENSORS")
    assert read_state_dict(tmp_path / "weights.SAFETENSORS") == {"a": torch.ones(1)}


@pytest.mark.parametrize("stride", ["0", "-1"])
def test_a_stride_that_cannot_be_is_one_line(stride, tmp_path):
    torch.save(small_network(feed_forward=False).state_dict(), tmp_path / "weights.pt")
    arguments = ["--checkpoint", str(tmp_path / "weights.pt"), "--depth", "10", "--output-dir", str(tmp_path / "out")]
    for main, more in ((convert_medicalnet_to_hf.main, []), (convert_monai_resnet_to_hf.main, ["--license", "mit"])):
        with pytest.raises(SystemExit, match=r"\Aerror: .*stem_stride must be .*\Z"):
            main([*arguments, *more, f"--stem-stride={stride}"])


def test_a_width_that_cannot_be_is_one_line(tmp_path):
    state_dict = damaged(lambda s: s.update({"conv1.weight": torch.zeros(4, 0, 7, 7, 7)}))
    torch.save(state_dict, tmp_path / "weights.pt")
    with pytest.raises(ConversionError, match=r"\Ano such network can be made.*num_channels.*\Z"):
        convert_monai_resnet(tmp_path / "weights.pt", 10, tmp_path / "out", license="mit")


def test_output_folders_that_cannot_be_are_refused(tmp_path, monkeypatch):
    model = small_model()
    (tmp_path / "here").mkdir()
    (tmp_path / "file").write_text("kept")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path / "here")
    refused = {
        ".": "folder you are in",
        "../file": "not empty",
        "../file/below": "cannot be made",
        "../loop": "cannot be made",
    }
    for name, message in refused.items():
        with pytest.raises(ConversionError, match=rf"\A'{name}' .*{message}.*\Z"):
            save_converted(model, name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "here", "loop"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_to_an_empty_or_new_folder_is_followed(exists, tmp_path):
    model = small_model()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    if exists:
        (tmp_path / "folder").mkdir()
    save_converted(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "model.safetensors").is_file()


def test_command_line_reports_without_a_traceback(tmp_path):
    torch.save(damaged(lambda s: s.pop("bn1.bias")), tmp_path / "weights.pt")
    arguments = ["--checkpoint", str(tmp_path / "weights.pt"), "--depth", "10", "--output-dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"error: the checkpoint does not fit .*\n.*\n.*missing: encoder.bn1.bias"):
        convert_monai_resnet_to_hf.main([*arguments, "--license", "mit"])
    with pytest.raises(SystemExit, match=r"error: .*unused"):
        convert_medicalnet_to_hf.main(arguments)


def test_nothing_is_overwritten_or_left_half_written(tmp_path):
    model = small_model()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.txt").write_text("kept")
    with pytest.raises(ConversionError, match="is not empty"):
        save_converted(model, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["kept.txt"]
    model.config.num_channels = 0  # saving validates the configuration
    with pytest.raises(Exception, match="num_channels"):
        save_converted(model, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
