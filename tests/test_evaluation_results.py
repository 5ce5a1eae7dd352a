# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Results: the JSON file, the table, the protocol card and the figure."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from modeling_t3d.evaluation import protocol as protocol_module
from modeling_t3d.evaluation.findings import score_findings
from modeling_t3d.evaluation.leak import LeakReport
from modeling_t3d.evaluation.localisation import score_attention, summarise_localisation
from modeling_t3d.evaluation.probes import study_identity
from modeling_t3d.evaluation.protocol import ProtocolCard, package_versions, source_commit, split_hash
from modeling_t3d.evaluation.results import Results, load_results, plot_attention
from modeling_t3d.evaluation.retrieval import report_volume_retrieval, volume_volume_retrieval


def make_card(**changes) -> ProtocolCard:
    card = ProtocolCard(
        protocol="clean",
        unit="study",
        num_units=20,
        num_volumes=20,
        num_studies=20,
        num_patients=10,
        split_hash=split_hash(range(20), range(20)),
        prompts={"effusion": [("effusion", "no effusion")], "stone": [("stone", "no stone")]},
        score="sigmoid",
        temperature=0.07,
        de_duplication="identical reports count as right",
        thresholds={},
        threshold_source="none",
        optimistic=False,
        bootstrap={"level": "patient", "num_resamples": 20, "confidence": 0.95, "seed": 0},
        seed=0,
    )
    return replace(card, **changes)


def make_results() -> Results:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, (20, 2)).astype(float)
    labels[:, 1] = 0  # undefined
    patients = [row // 2 for row in range(20)]
    settings = {"groups": {"diffuse": ["effusion"], "focal": ["stone"]}, "num_resamples": 20}
    names = ["effusion", "stone"]
    embeds = generator.normal(size=(20, 8))
    touched = generator.random((2, 2, 2, 2)) < 0.3
    return Results(
        protocol=make_card(),
        zero_shot=score_findings(labels, generator.random((20, 2)), names, patients, **settings),
        comparisons={
            "shortcut baseline": score_findings(labels, generator.random((20, 2)), names, patients, **settings)
        },
        retrieval=report_volume_retrieval(
            embeds,
            embeds,
            study_ids=range(20),
            reports=[str(row) for row in range(20)],
            patient_ids=patients,
            num_resamples=20,
        ),
        volume_retrieval=volume_volume_retrieval(
            embeds, labels, study_ids=range(20), patient_ids=patients, num_resamples=20
        ),
        leak=LeakReport(1.6, 4.9, 127.0, None, 1),
        study_identity=study_identity(generator.normal(size=(5, 4, 3)), range(5)),
        localisation={
            "all": summarise_localisation([score_attention(generator.random((2, 2, 2, 2)), touched)], ["p"])
        },
        extra={"steps": np.int64(400), "losses": np.array([1.0, np.nan])},
    )


def test_file_is_strict_json_and_round_trips(tmp_path):
    results = make_results()
    path = results.save(tmp_path / "new folder")
    assert path == tmp_path / "new folder" / "results.json"
    text = path.read_text()
    assert "NaN" not in text
    loaded = load_results(tmp_path / "new folder")
    assert loaded == json.loads(json.dumps(results.to_dict()))
    assert loaded["zero_shot"]["findings"][1]["auroc"]["value"] is None
    assert loaded["zero_shot"]["groups"]["macro"]["num_undefined"] == 1
    assert loaded["comparisons"]["shortcut baseline"]["findings"][0]["finding"] == "effusion"
    assert loaded["retrieval"]["report_to_volume"]["recall"]["1"]["value"] == 1.0
    assert loaded["protocol"]["versions"]["torch"]
    assert loaded["protocol"]["bootstrap"]["level"] == "patient"
    assert loaded["extra"] == {"steps": 400, "losses": [1.0, None]}
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]
    assert path.stat().st_mode & 0o444 == 0o444


def test_a_failed_save_keeps_the_old_file(tmp_path):
    results = make_results()
    path = results.save(tmp_path / "scores.json")
    before = path.read_text()
    results.extra["unwritable"] = {1, 2}
    with pytest.raises(TypeError):
        results.save(path)
    assert path.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["scores.json"]


def test_files_of_another_format_are_refused(tmp_path):
    (tmp_path / "results.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99"):
        load_results(tmp_path)


def test_table_says_everything(tmp_path):
    text = make_results().to_markdown()
    lines = text.splitlines()
    assert lines[0].startswith(
        "| finding | n | positive | prevalence | AUROC (interval) | AP | AUROC, shortcut baseline |"
    )
    # Every row of a table has as many cells as its header.
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert len({row.count("|") for row in table}) == 1
    assert any(line.startswith("| stone | 20 | 0 | 0.0 % | undefined |") for line in lines)
    assert any(line.startswith("| **mean, focal** (0 findings, 1 undefined left out)") for line in lines)
    assert any(line.startswith("| **mean, macro** (1 findings, 1 undefined left out)") for line in lines)
    assert "report to volume, R@1 | 1.000 (1.000–1.000) | 0.050" in text
    for words in ("Leak control", "Study identity", "Volume to volume", "Protocol", "10 patients", "95 %", "chance"):
        assert words in text
    assert "nan" not in text


def test_optimism_is_said():
    results = Results(protocol=make_card(protocol="ct-clip", optimistic=True))
    assert 'Protocol "ct-clip" (optimistic' in results.to_markdown()


def test_metrics_are_finite():
    metrics = make_results().metrics()
    assert metrics["report_to_volume_recall_at_1"] == 1.0
    assert "auroc_focal" not in metrics  # undefined
    assert "tma_leak" not in metrics  # undefined
    assert all(math.isfinite(value) for value in metrics.values())


def test_split_hash_sees_every_id_and_no_order():
    base = split_hash(["p", "q"], ["s", "t"], ["1", "1"])
    assert base == split_hash(["q", "p"], ["t", "s"], ["1", "1"])
    others = [
        split_hash(["p", "q"], ["s", "t"], ["1", "2"]),
        split_hash(["p", "p"], ["s", "t"], ["1", "1"]),
        split_hash(["p", "q"], ["s", "t"]),
        split_hash(["p"], ["s"], ["1"]),
    ]
    assert len({base, *others}) == 5


def test_ids_never_reach_the_file(tmp_path):
    card = make_card(split_hash=split_hash(["Jane Doe"], ["1.2.840.1"]))
    text = Results(protocol=card).save(tmp_path).read_text()
    assert "Jane" not in text
    assert "1.2.840.1" not in text


def test_versions_and_commit(tmp_path):
    versions = package_versions()
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "transformers", "numpy"} <= set(versions)
    commit = source_commit()
    assert commit is None or len(commit.removesuffix("+changes")) == 40
    # A copy outside any repository has no commit.
    copy = tmp_path / "protocol.py"
    shutil.copy(protocol_module.__file__, copy)
    script = "import protocol; print(protocol.source_commit())"
    finished = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "None"


def test_a_copy_inside_another_repository_has_no_commit(tmp_path):
    git = shutil.which("git")
    if git is None:
        pytest.skip("git is not installed")
    identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
    subprocess.run([git, "init", "-q", str(tmp_path)], check=True)
    subprocess.run([git, "-C", str(tmp_path), *identity, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    shutil.copy(protocol_module.__file__, tmp_path / "protocol.py")
    script = "import protocol; print(protocol.source_commit())"
    finished = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "None"


@pytest.mark.parametrize("center", [None, (3, 8, 8)])
def test_figure(tmp_path, center):
    pytest.importorskip("matplotlib", reason="matplotlib is in the eval extra")
    generator = np.random.default_rng(0)
    array = generator.normal(0, 100, (12, 20, 16))
    attention = generator.random((12, 20, 16)).astype(np.float32)
    attention[:3] = np.nan
    lesion = np.zeros(array.shape, dtype=bool)
    lesion[5, 8:10, 8:10] = True
    path = plot_attention(
        array,
        attention,
        tmp_path / "figures" / "a.png",
        spacing=(3, 1, 1),
        title="nodule " * 40,
        lesion=lesion,
        center=center,
    )
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert path.stat().st_size > 10_000


def test_figure_shows_the_right_side_on_the_left(tmp_path):
    image = pytest.importorskip("matplotlib.image", reason="matplotlib is in the eval extra")
    array = np.full((8, 32, 32), -1000.0)
    array[:, :, 20:] = 1000.0  # indices grow towards the right: this half is the patient's right
    attention = np.full(array.shape, 0.1, dtype=np.float32)
    attention[4, 16, 16] = 1.0
    path = plot_attention(array, attention, tmp_path / "side.png", spacing=(1, 1, 1))
    pixels = image.imread(path)[..., :3].mean(axis=-1)
    # The plain axial slice is the upper left panel.
    panel = pixels[int(0.1 * len(pixels)) : int(0.45 * len(pixels)), : pixels.shape[1] // 3]
    white, black = np.argwhere(panel > 0.98)[:, 1], np.argwhere(panel < 0.02)[:, 1]
    # The page is white too: black pixels decide, they lie right of the middle.
    assert np.median(black) > panel.shape[1] / 2
    assert len(white)


def test_figure_refusals(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is in the eval extra")
    with pytest.raises(ValueError, match="one \\(D, H, W\\) grid"):
        plot_attention(np.zeros((4, 4, 4)), np.zeros((4, 4, 5)), tmp_path / "a.png", spacing=(1, 1, 1))
    with pytest.raises(ValueError, match="no view"):
        plot_attention(np.zeros((4, 4, 4)), np.full((4, 4, 4), np.nan), tmp_path / "a.png", spacing=(1, 1, 1))
    assert not list(tmp_path.iterdir())
