"""Finished and unchanged files stay, others are made again, and a killed or stopped prediction resumes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import kitseg, kitseg_process

pytestmark = pytest.mark.slow
ALL = os.environ.get("KITSEG_ALL") == "1"
heavy = pytest.mark.skipif(not ALL, reason="minutes, which takes KITSEG_ALL=1")
RUN = "runs/two-phase-tiny"
MODEL = (f"--model={RUN}", "--engine=torch")


@pytest.fixture
def here(trained: Path, tmp_path: Path) -> Path:
    """A folder with two scans of its own and the run."""
    for number in (0, 1):
        shutil.copy(trained / "test" / f"case_0000{number}" / "imaging.nii.gz", tmp_path / f"scan_{number}.nii.gz")
    (tmp_path / "runs").symlink_to(trained / "runs")
    (tmp_path / "in").mkdir()
    for scan in tmp_path.glob("scan_*"):
        scan.rename(tmp_path / "in" / scan.name)
    return tmp_path


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """When each file was written, and what is in it but for times."""
    return {path.name: (path.stat().st_mtime_ns, without_times(path)) for path in folder.iterdir()}


def without_times(path: Path) -> bytes:
    if path.suffix != ".json":
        return path.read_bytes()
    facts = json.loads(path.read_text())
    return json.dumps({key: value for key, value in facts.items() if key != "seconds"}).encode()


def contents(folder: Path) -> dict[str, bytes]:
    return {name: content for name, (_, content) in state(folder).items()}


def change_scan(path: Path) -> None:
    """Another scan under the same name."""
    scan = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(scan.dataobj)[::-1].copy(), scan.affine), path)


def test_each_verb_leaves_what_is_done(here: Path) -> None:
    verbs = (
        (("infer", f"--run={RUN}", "--data=in", "--engine=torch", "-o", "p"), "p"),
        (("ensemble", "p", "p", "-o", "mean"), "mean"),
        (("postprocess", "mean", "-o", "steps"), "steps"),
        (("predict", "in", *MODEL, "-o", "whole"), "whole"),
    )
    for verb, out in verbs:
        assert "unchanged" not in kitseg(here, *verb).text
        before = state(here / out)
        again = kitseg(here, *verb)
        assert again.code == 0, again.text
        assert again.text.count("unchanged") == 2
        after = state(here / out)
        assert after.keys() == before.keys()
        assert {n: after[n] for n in after if n != "manifest.json"} == {
            n: before[n] for n in before if n != "manifest.json"
        }

    change_scan(here / "in" / "scan_1.nii.gz")  # each verb does that case again, and nothing else
    for verb, out in verbs:
        before = state(here / out)
        again = kitseg(here, *verb)
        assert again.text.count("unchanged") == 1, again.text
        after = state(here / out)
        assert all(after[name] == before[name] for name in after if name.startswith("scan_0."))
        assert after["scan_1.json"] != before["scan_1.json"]


def test_a_file_that_is_damaged_or_gone_is_made_again(here: Path) -> None:
    predict = ("predict", "in", *MODEL, "-o", "out")
    assert kitseg(here, *predict).code == 0
    whole = contents(here / "out")
    (here / "out" / "scan_0.png").unlink()
    with (here / "out" / "scan_1.nii.gz").open("ab") as labels:
        labels.write(b"more")
    assert "unchanged" not in kitseg(here, *predict).text
    assert contents(here / "out") == whole
    (here / "out" / "scan_0.json").write_text('{\n "schema": 3,\n "case": "scan_0",\n "volumes_ml": {}\n}')
    assert kitseg(here, *predict).text.count("unchanged") == 1
    assert contents(here / "out") == whole


def test_other_settings_make_it_anew(here: Path) -> None:
    predict = ("predict", "in", *MODEL, "-o", "out")
    assert kitseg(here, *predict).code == 0
    assert "unchanged" not in kitseg(here, *predict, "--mirror").text
    assert kitseg(here, *predict, "--mirror").text.count("unchanged") == 2
    moved = ("predict", "in", f"--model={(here / RUN).resolve()}", "--engine=torch", "-o", "out", "--mirror")
    assert kitseg(here, *moved).text.count("unchanged") == 2, "the same model in another place"


def test_the_record_is_written_last(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predict = ("predict", "in", *MODEL, "-o", "out")
    assert kitseg(here, *predict).code == 0
    whole = contents(here / "out")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("kitseg.report.pictures.case_picture", full)
        change_scan(here / "in" / "scan_1.nii.gz")
        failed = kitseg(here, *predict)
    assert failed.code == 1
    assert "1 of 2 cases done" in failed.text
    assert not (here / "out" / "scan_1.json").exists(), "new labels beside an old record"
    assert kitseg(here, *predict).text.count("unchanged") == 1
    assert contents(here / "out").keys() == whole.keys()


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 300
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=heavy), signal.SIGKILL])
def test_a_stopped_prediction_resumes(here: Path, number: signal.Signals) -> None:
    infer = ("infer", f"--run={RUN}", "--data=in", "--engine=torch", "--device=cpu")
    assert kitseg(here, *infer, "-o", "undisturbed").code == 0
    process = kitseg_process(here, *infer, "-o", "out", "--processes=2")
    wait_for(lambda: len(list((here / "out").glob(".kitseg*.lock"))) == 2, process)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=300)
    if number == signal.SIGKILL:
        assert process.returncode == -number
        time.sleep(1)  # its children end with it
    else:
        assert process.returncode == 128 + number
        assert "the same command" in printed
        assert "Traceback" not in printed
        assert not list((here / "out").glob(".*"))
    again = kitseg(here, *infer, "-o", "out")
    assert again.code == 0, again.text
    assert "2 of 2 cases done" in again.text
    assert contents(here / "out") == contents(here / "undisturbed"), "the same files, and no hidden one"


WATCHED = """
import sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        print("NETWORK", event, arguments, flush=True)

sys.addaudithook(watch)
sys.argv = ["kitseg", *sys.argv[1:]]
if "--look" in sys.argv:
    import socket
    socket.getaddrinfo("localhost", 1)
else:
    from kitseg.cli import main
    main()
"""


def test_predict_opens_no_socket(here: Path) -> None:
    command = (sys.executable, "-c", WATCHED)
    looked = subprocess.run([*command, "--look"], capture_output=True, text=True, check=True)
    assert "NETWORK socket.getaddrinfo" in looked.stdout, "it would be seen"
    done = subprocess.run(
        [*command, "predict", "in", f"--model={RUN}", "-o", "out"],
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 cases done" in done.stdout
    assert "NETWORK" not in done.stdout


MEASURED = """
import sys
from functools import partial
from pathlib import Path
from kitseg.models.members import open_ensemble
from kitseg.commands.predict import PredictScans
from kitseg.runtime.sharding import Share
from kitseg.volumes.scan import find_scans

def pages(outcome):
    print(outcome.error or Path("/proc/self/statm").read_text().split()[1], flush=True)

model, engine = sys.argv[1:]
opened = partial(open_ensemble, [Path(model)], "cpu", engine=engine)
PredictScans(opened, Path("out"))(find_scans([Path("many")]).cases, Share(), lambda text: None, pages)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc on this system")
@pytest.mark.parametrize("engine", ["torch", pytest.param("openvino", marks=heavy)])
def test_memory_stays_flat(here: Path, engine: str) -> None:
    """Resident memory after each of many cases; it grows by 6 to 8 MB a case up to about the twelfth, then stays."""
    count, settled = (100, 20) if ALL else (18, 15)
    (here / "many").mkdir()
    for number in range(count):
        os.link(here / "in" / "scan_0.nii.gz", here / "many" / f"scan_{number:03}.nii.gz")
    command = (sys.executable, "-c", MEASURED, RUN, engine)
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    memory = [int(line) * os.sysconf("SC_PAGE_SIZE") / 1e6 for line in done.stdout.split()]
    assert len(memory) == count
    grown = np.mean(memory[-3:]) - np.mean(memory[settled - 3 : settled])
    assert grown < 12, f"{grown:.0f} MB in {count - settled} cases: {np.round(memory)}"
