"""The page of a run for a publication: what its files state, and "not recorded" for the rest."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from conftest import kitseg


def items(page: Path) -> dict[int, str]:
    """The text of each item of CLAIM."""
    rows = re.findall(r'<th scope="row">(\d+)</th><td>.*?</td><td[^>]*>(.*?)</td>', page.read_text())
    return {int(number): text for number, text in rows}


def test_a_run_states_its_methods(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "two-phase-tiny"
    shutil.copytree(trained / "runs" / "two-phase-tiny", run)
    assert kitseg(tmp_path, "report", str(run), "-o", "before").code == 0
    found = items(tmp_path / "before" / "methods.html")
    assert found[7].startswith("6 phantoms")
    assert "5 folds" in found[20]
    assert "VNet (coarse)" in found[22]
    assert "trained for" in found[25]
    assert {number for number, text in found.items() if text == "not recorded"} >= {5, 8, 16, 28, 29, 33, 35, 37}
    case = {"kidney": {"dice": 0.9}, "tumor": {"dice": 0.4}}
    scores = {
        "schema": 1,
        "protocol": "kits19",
        "cases": {"case_00000": case},
        "mean": case,
        "ci95": {"kidney": {"dice": [0.8, 0.95]}, "tumor": {"dice": None}},
        "groups": [{"kind": "slices", "name": "over 3 mm", "cases": 1, "dice": {"tumor": 0.4}}],
        "strata": {},
        "missing": ["case_00000"],
        "failed": {"case_00000": "another grid", "case_00001": "its reference can't be read"},
        "undefined": {"kidney": {"hd95_mm": 0}, "tumor": {"hd95_mm": 1}},
        "detection": {
            "sizes": {"all": {"reference": 2, "found": 1, "predicted": 1, "true": 1, "recall": 0.5, "dice": 0.4}}
        },
    }
    (run / "validation").mkdir()
    (run / "validation" / "scores.json").write_text(json.dumps(scores))
    model = {"constant": 0.5, "weights": {}, "doubtful": 0.3}
    flags = {"aurc": 0.456, "curve": [0.4, 0.5], "caught": 1.0}
    confidence = {"reviewed": 4, "cases": 20, "failed": 1, "model": model, "orderings": {"flags": flags}}
    (run / "validation" / "confidence.json").write_text(json.dumps({"schema": 1, **confidence}))
    done = kitseg(tmp_path, "report", str(run), "-o", "after")
    assert done.code == 0, done.text
    assert "after/methods.html" in done.text
    found = items(tmp_path / "after" / "methods.html")
    assert "kidney 0.900 (0.800 to 0.950), tumor 0.400" in found[35]
    assert "of 1 cases (1 as background, without a usable prediction)" in found[35]
    assert found[33].startswith("1 cases scored out of fold, 1 of them as background")
    assert "1 not scored" in found[33]
    assert "background: 1 cases" in found[13]
    assert "below 0.5 in 1 of 1 cases; lowest: case_00000 0.400" in found[37]
    assert "slices over 3 mm (1): tumor 0.400" in found[30]
    choices = (tmp_path / "after" / "methods.html").read_text().partition("<h2>Metrics Reloaded</h2>")[2]
    assert "segmentation of kidney, tumor; instance segmentation of tumors" in choices
    assert "recall 0.500, precision undefined, dice 0.400" in choices
    assert "1 of 2 found, 1 of 1 predicted ones true" in choices
    assert "Cases without a value: tumor HD95 (mm) in 1." in choices
    paragraph = re.search(r"<h2>Methods</h2>\s*<p>(.*?)</p>", (tmp_path / "after" / "methods.html").read_text())
    assert paragraph is not None
    assert "not recorded" not in paragraph[1]
    page = (tmp_path / "after" / "methods.html").read_text()
    assert 'points="20.0,120.0 40.0,100.0 "' in page
    assert "<td>0.456</td>" in page
    assert "Wei et al. 2019" in paragraph[1]
    (run / "validation" / "confidence.json").write_text(json.dumps({"schema": 1, **confidence, "cases": 2}))
    damaged = kitseg(tmp_path, "report", str(run), "-o", "damaged")
    assert damaged.code == 1
    assert "confidence.json" in damaged.text


def test_a_damaged_run_and_other_files_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("chain: [")
    done = kitseg(tmp_path, "report", "run")
    assert (done.code, "config.yaml" in done.text) == (1, True)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "methods.html").write_text("mine")
    assert kitseg(tmp_path, "report", "run").code == 2
