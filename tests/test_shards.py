"""Parts of the work put together, and finished cases taken up again."""

from __future__ import annotations

import functools
import json
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALLEST, kitseg
from nifti_files import save

from kitseg.commands import evaluate, preprocess
from kitseg.commands.evaluate import Job, Score, find_jobs, rules, score_case
from kitseg.commands.measure import Measured, measure_case, plan_measures
from kitseg.commands.report import make_page, plan_pages
from kitseg.labels import KITS19
from kitseg.report.scores import StudyScores
from kitseg.report.study_page import CaseRow
from kitseg.runtime.locks import folder_lock
from kitseg.runtime.resume import ResultCache
from kitseg.runtime.sharding import Share

CASES = 5


@pytest.fixture
def maps(tmp_path: Path) -> Path:
    """A folder with five label maps in ``pred`` and in ``ref``, kidney and tumor a little apart."""
    for name, shift in (("pred", 1), ("ref", 0)):
        (tmp_path / name).mkdir()
        for case in range(CASES):
            labels = np.zeros((6, 12, 14), np.uint8)
            labels[1:5, 2:9, 2:10] = 1
            labels[1:3, 2 + shift : 5, 2 : 4 + case] = 2
            save(tmp_path / name / f"case_{case:05d}.nii.gz", labels)
    return tmp_path


def scores(folder: Path, protocol: str) -> ResultCache[Score]:
    return ResultCache(folder / ".cases", Score, partial(score_case, rules=rules(protocol, None)))


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


EVALUATE = ("evaluate", "pred", "ref", "--protocol=kits23", "--json=out.json", "--csv=out.csv", "--jobs=1")
MEASURE = ("measure", "pred", "--json=out.json", "--csv=out.csv", "--jobs=1")


@pytest.mark.parametrize("command", [EVALUATE, MEASURE])
def test_parts_make_the_tables_of_the_whole(command: tuple[str, ...], maps: Path) -> None:
    outputs = [maps / "out.json", maps / "out.csv"]
    assert kitseg(maps, *command).code == 0
    whole = [path.read_bytes() for path in outputs]
    for path in outputs:
        path.unlink()
    for shard, left in (("2/3", 3), ("3/3", 2)):
        done = kitseg(maps, *command, f"--shard={shard}")
        assert done.code == 0
        assert f"part {shard}: {left} of {CASES} cases are left" in done.text
        assert not any(path.exists() for path in outputs)
        assert hidden(maps) == [".out.json.cases"]
    assert kitseg(maps, *command, "--shard=1/3").code == 0
    assert [path.read_bytes() for path in outputs] == whole
    assert hidden(maps) == []


def test_a_failed_case_waits_for_a_call_without_shard(maps: Path) -> None:
    broken = maps / "ref" / "case_00001.nii.gz"
    good = broken.read_bytes()
    broken.write_bytes(b"no label map")
    for shard, code in (("1/2", 0), ("2/2", 1)):
        assert kitseg(maps, *EVALUATE, f"--shard={shard}").code == code
    assert not (maps / "out.json").exists()
    assert kitseg(maps, *EVALUATE).code == 1
    content = json.loads((maps / "out.json").read_text())
    assert list(content["failed"]) == ["case_00001"]
    assert len(content["cases"]) == CASES - 1
    broken.write_bytes(good)
    assert kitseg(maps, *EVALUATE).code == 0


def test_parts_need_a_file_to_meet_in(maps: Path) -> None:
    done = kitseg(maps, "measure", "pred", "--jobs=1", "--shard=1/2")
    assert done.code == 2
    assert "name it with --json or --csv" in done.text


def test_an_interrupted_evaluation_goes_on(maps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kitseg(maps, *EVALUATE).code == 0
    whole, cached = (maps / "out.json").read_bytes(), maps / ".out.json.cases"
    scored: list[str] = []
    score_case = evaluate.score_case

    @functools.wraps(score_case)
    def score(job: Job, **rest: Any) -> Score:
        if scored == ["case_00000", "case_00001"]:
            raise KeyboardInterrupt
        scored.append(job.case)
        return score_case(job, **rest)

    monkeypatch.setattr(evaluate, "score_case", score)
    with suppress(KeyboardInterrupt):
        assert kitseg(maps, *EVALUATE).code != 0
    assert len(list(cached.iterdir())) == 2
    (maps / "pred" / "case_00000.nii.gz").touch()  # it might hold something else now
    scored.clear()
    assert kitseg(maps, *EVALUATE).code == 0
    assert scored == ["case_00000", "case_00002", "case_00003", "case_00004"]
    assert (maps / "out.json").read_bytes() == whole
    assert not cached.exists()


def test_parts_that_end_at_the_same_time(maps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs, _ = find_jobs(maps / "pred", maps / "ref")
    cache = scores(maps, "kits19")
    for part in (Share(0, 2), Share(1, 2)):
        found = [cache.do(job) for job in part.take(jobs)]
        if part.index:
            assert cache.join_parts(jobs, part, found) == [cache.find(job) for job in jobs]
            cache.clear()  # as the other part does, which ends at the same time
        assert cache.join_parts(jobs, part, found) is None
    assert "another part, which ended at the same time, is writing the output" in capsys.readouterr().out


def test_other_rules_are_other_work(maps: Path) -> None:
    jobs, _ = find_jobs(maps / "pred", maps / "ref")
    made = [scores(maps, name).made(job)["recipe"] for name in ("kits19", "kits21", "kits23") for job in jobs]
    assert len(set(made)) == 3 * CASES


@pytest.mark.parametrize("name", ["dataset.json", "case_00000.json"])
def test_label_maps_are_read_again_where_their_ids_are_stated_since(maps: Path, name: str) -> None:
    """After an interruption, what was cached before is of the other ids."""
    ids = {"background": 0, "kidney": 2, "tumor": 1}
    record = {"schema": 4, "case": "case_00000", "labels": {"name": "own", "kidney": _part(2), "tumor": _part(1)}}
    cache, (job, *_) = scores(maps, "kits19"), find_jobs(maps / "pred", maps / "ref")[0]
    measures = ResultCache(maps / "measured", Measured, partial(measure_case, scheme=None))
    task = plan_measures(maps / "pred", None)[0]
    first, measured = cache.do(job), measures.do(task)
    assert first.dice["tumor"] > 0.4
    stated = {"labels": ids, "channel_names": {"0": "CT"}} if name == "dataset.json" else record
    (maps / "pred" / name).write_text(json.dumps(stated))
    assert cache.do(job).dice["tumor"] < 0.1
    assert measures.do(task).labels != measured.labels


def _part(number: int) -> dict[str, object]:
    return {"id": number, "name": f"part {number}", "colour": "#ffffff"}


def test_a_page_is_made_again_where_it_is_lost(maps: Path) -> None:
    command = ("report", "pred", "--jobs=1")
    for shard in ("1/2", "2/2"):
        assert kitseg(maps, *command, f"--shard={shard}").code == 0
    pages = sorted(path.name for path in (maps / "report").iterdir())
    assert pages == [*(f"case_{number:05d}.html" for number in range(CASES)), "index.html"]
    assert all(page in (maps / "report" / "index.html").read_text() for page in pages[:-1])
    (task, *_) = plan_pages(maps / "pred", [], StudyScores(), maps / "report")
    cache = ResultCache(maps / ".cases", CaseRow, partial(make_page))
    made = cache.do(task)
    assert cache.find(task) == made
    task.output.unlink()
    assert cache.find(task) is None


def test_what_is_cached_is_what_was_found(maps: Path) -> None:
    jobs, _ = find_jobs(maps / "pred", maps / "ref")
    measures = ResultCache(maps / "measured", Measured, partial(measure_case, scheme=KITS19))
    caches: list[tuple[ResultCache[Any], Any]] = [
        (scores(maps, "kits23"), jobs[0]),
        (measures, plan_measures(maps / "pred", None)[0]),
    ]
    for cache, task in caches:
        made = cache.do(task)
        assert cache.find(task) == made
        (file,) = cache.folder.iterdir()
        file.write_text(file.read_text()[:-20])
        assert cache.find(task) is None, "cut off"


@pytest.mark.slow
def test_parts_of_a_preprocessing(phantoms: Path, tmp_path: Path) -> None:
    command = ("preprocess", str(phantoms / "data"), *SMALLEST, "--jobs=1")
    found: list[set[str]] = []
    for shard in ("1/2", "2/2"):
        done = kitseg(tmp_path, *command, f"--shard={shard}")
        assert (done.code, "6 done" in done.text) == (0, True), done.text
        found.append({path.parent.name for path in (tmp_path / "preprocessed").rglob("meta.json")})
    assert (len(found[0]), len(found[1])) == (3, 6)
    assert "12 unchanged" in kitseg(tmp_path, *command).text


@pytest.mark.slow
def test_touched_files_are_read_once(phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "HOURS", 0.0)
    shutil.copytree(phantoms / "test" / "case_00000", tmp_path / "data" / "case_00000")
    command = ("preprocess", *SMALLEST, "--jobs=1")
    assert kitseg(tmp_path, *command).code == 0
    label = tmp_path / "data" / "case_00000" / "segmentation.nii.gz"
    label.touch()
    with folder_lock(tmp_path / "preprocessed", "cases"):
        assert "is writing there" in kitseg(tmp_path, *command).text, "it has to look at the label"
    assert "2 unchanged" in kitseg(tmp_path, *command).text
    for meta in (tmp_path / "preprocessed").rglob("meta.json"):
        assert json.loads(meta.read_text())["sources"]["label"]["mtime"] == label.stat().st_mtime_ns
    with folder_lock(tmp_path / "preprocessed", "cases"):
        assert "2 unchanged" in kitseg(tmp_path, *command).text, "nothing to do needs no lock"
