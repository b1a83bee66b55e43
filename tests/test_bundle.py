"""Model bundles: what is exported predicts the same, and what is hostile neither runs nor writes anything."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import numpy as np
import pytest
import torch
import yaml
from conftest import SMALLEST, kitseg
from huggingface_hub import constants
from method_runs import labels_of, read, untrained

from kitseg.errors import InputError, KitsegError, UsageError
from kitseg.models.bundles.archive import MANIFEST
from kitseg.models.bundles.bundle import Bundle, bundle_of
from kitseg.models.bundles.export import export
from kitseg.models.ensemble_file import Member, write_ensemble
from kitseg.models.members import describe_model, locate, members_of, only_member, open_ensemble
from kitseg.models.model import open_model
from kitseg.models.run_folder import Run
from kitseg.models.weights import read_weights
from kitseg.runtime.files import file_digest, write_json
from kitseg.types import Geometry
from kitseg.volumes.nifti import write_image

Files = dict[str, bytes]
STAGE = "runs/0/fold_0/kidneys"
WEIGHTS = f"{STAGE}/best/0.safetensors"


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def content(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The files of a sound bundle."""
    path = tmp_path_factory.mktemp("bundle") / "sound.kitseg"
    export(run, path)
    with ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KITSEG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pack(path: Path, files: Files, stated: Callable[[dict[str, Any]], None] = lambda _: None) -> Path:
    """A bundle of these files whose manifest states their hashes, unless ``stated`` changes it."""
    manifest = json.loads(files[MANIFEST])
    rest = {name: data for name, data in files.items() if name != MANIFEST}
    manifest["files"] = {n: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in rest.items()}
    stated(manifest)
    with ZipFile(path, "w") as archive:
        for name, data in {**rest, MANIFEST: json.dumps(manifest).encode()}.items():
            archive.writestr(ZipInfo(name), data)
    return path


def refused(path: Path, cache: Path) -> str:
    """The error of a hostile bundle, one line, after which nothing of it is on the disk."""
    before = {found: found.stat().st_mtime_ns for found in path.parent.rglob("*") if cache not in found.parents}
    with pytest.raises(InputError) as error:
        locate(path)
    after = {found: found.stat().st_mtime_ns for found in path.parent.rglob("*") if cache not in found.parents}
    assert {**before, cache: 0, path.parent: 0} == {**after, cache: 0, path.parent: 0}
    assert [found for found in cache.rglob("*") if found.is_file()] == []
    assert not (path.parent / "canary").exists()
    text = str(error.value)
    assert text.startswith(f"{path}: is not a valid model bundle (")
    assert len(text.splitlines()) == 1
    return text


# --- there and back --------------------------------------------------------------------------------------------------


def test_the_same_run_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.kitseg", tmp_path / "b.kitseg"
    export(run, first)
    export(run, second)
    assert first.read_bytes() == second.read_bytes()
    moved = shutil.copytree(run, tmp_path / "elsewhere")
    export(moved, second)
    assert first.read_bytes() == second.read_bytes()


def test_what_a_bundle_states(content: Files, run: Path) -> None:
    manifest = json.loads(content[MANIFEST])
    assert (manifest["schema"], manifest["name"]) == (1, "dual-unet")
    assert manifest["licenses"] == {"code": "Apache-2.0", "weights": "CC-BY-NC-SA-4.0", "labels": "CC-BY-NC-SA-4.0"}
    (member,) = manifest["members"]
    assert member["labels"] == {"0": "background", "1": "kidney", "2": "tumor"}
    assert member["stages"]["kidneys"]["normalization"]["low"] == -79
    assert member["stages"]["kidneys"]["grid"]["pixels"] == 96
    assert member["training"]["cases"] == 2  # the third is a test case
    assert member["training"]["split_sha256"] == file_digest(run / "splits.json")
    assert b"somebody" not in b"".join(content.values())  # no case by its name
    assert {Path(name).suffix for name in content} == {".json", ".yaml", ".safetensors"}


def test_an_opened_bundle_is_a_run_with_the_same_weights(run: Path, tmp_path: Path, cache: Path) -> None:
    export(run, tmp_path / "x.kitseg", labels="ours: not to be passed on")
    member, _ = only_member(tmp_path / "x.kitseg")
    assert member.run == cache / "bundles" / file_digest(tmp_path / "x.kitseg") / "runs" / "0"
    for name in ("kidneys", "tumors"):
        (old, _), (new, _) = (*Run(run).stage(0, name).checkpoints(), *Run(member.run).stage(0, name).checkpoints())
        before, after = (read_weights(path, torch.device("cpu")) for path in (old, new))
        assert list(before) != []
        assert all(torch.equal(before[key], after[key]) for key in {*before, *after})
    line = describe_model(open_model(member.run, "cpu"))
    assert file_digest(tmp_path / "x.kitseg")[:12] in line
    assert "licenses: code Apache-2.0, weights ours: not to be passed on, labels ours: not to be passed on" in line


def test_a_damaged_cache_is_repaired(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "x.kitseg")
    folder = locate(tmp_path / "x.kitseg")
    (folder / WEIGHTS).write_bytes(b"rust")
    assert not Bundle(folder).is_complete()
    assert locate(tmp_path / "x.kitseg") == folder
    assert Bundle(folder).is_complete()


def test_an_ensemble_file_as_one_bundle(run: Path, tmp_path: Path) -> None:
    rows = [{"run": os.path.relpath(run, tmp_path), "weight": 2.0}, {"run": str(run / "fold_0"), "mirror": True}]
    steps = {"dark": {"_target_": "kitseg.postprocess.intensity.RemoveLowHuTumors", "threshold": 10}}
    (tmp_path / "best.yaml").write_text(yaml.safe_dump({"schema": 1, "members": rows, "postprocess": steps}))
    export(tmp_path / "best.yaml", tmp_path / "best.kitseg")
    opened = open_ensemble([tmp_path / "best.kitseg"], "cpu", engine="torch")
    assert (opened.weights, opened.postprocess) == ((2.0, 1.0), steps)
    assert [model.mirror for model in opened.models] == [False, True]
    assert [one["path"] for one in opened.origin()] == ["dual-unet.kitseg"] * 2
    with pytest.raises(UsageError, match="stands for 2 runs"):
        only_member(tmp_path / "best.kitseg")


def test_a_run_is_of_no_bundle(run: Path) -> None:
    assert bundle_of(Run(run)) is None
    assert members_of(run) == ([Member(run)], None)
    assert only_member(run) == (Member(run), None)


@pytest.mark.parametrize("model", ["chosen.yaml", "chosen.kitseg"])
def test_the_steps_of_predict_clean_with_the_chosen_post_processing_too(run: Path, tmp_path: Path, model: str) -> None:
    """``infer`` and ``postprocess`` give the labels of ``predict``, which are others than with the method's priors."""
    geometry = Geometry((4, 32, 32), np.diag([-3.0, -3.0, -3.0, 1])[[2, 1, 0, 3]])
    hu = np.random.default_rng(0).integers(-200, 300, geometry.shape).astype(np.int16)
    write_image(tmp_path / "data" / "a.nii.gz", hu, geometry)
    write_ensemble(tmp_path / "chosen.yaml", [Member(run)], {}, {})
    export(tmp_path / "chosen.yaml", tmp_path / "chosen.kitseg")
    for verb in (
        ("infer", f"--model={model}", "--data=data", "--engine=torch", "-o", "p"),
        ("postprocess", "p", "-o", "steps"),
        ("predict", "data", f"--model={model}", "--engine=torch", "-o", "whole"),
        ("predict", "data", f"--model={run}", "--engine=torch", "-o", "cleaned"),
    ):
        done = kitseg(tmp_path, *verb)
        assert done.code == 0, done.text
    steps, whole, cleaned = (labels_of(tmp_path / to / "a.nii.gz") for to in ("steps", "whole", "cleaned"))
    assert np.array_equal(steps, whole)
    assert not np.array_equal(steps, cleaned)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["RUN", "-o", "x.zip"], ".kitseg"),
        (["nowhere", "-o", "x.kitseg"], "neither a run nor a fold"),
        (["RUN", "-o", "x.kitseg", "--labels-license=a\nb"], "license"),
    ],
)
def test_what_cannot_be_exported(run: Path, tmp_path: Path, arguments: list[str], expected: str) -> None:
    done = kitseg(tmp_path, "export", *(str(run) if word == "RUN" else word for word in arguments))
    assert (done.code, expected in done.text) == (2, True), done.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_bundle_predicts_what_its_run_predicts(trained: Path, tmp_path: Path) -> None:
    run, scan = trained / "runs" / "two-phase-tiny", str(trained / "test" / "case_00000")
    made = kitseg(tmp_path, "export", str(run), "-o", "two-phase.kitseg")
    assert made.code == 0, made.text
    sha256 = file_digest(tmp_path / "two-phase.kitseg")
    assert sha256 in made.text
    for model, out in ((str(run), "run"), ("two-phase.kitseg", "bundle")):
        done = kitseg(tmp_path, "predict", scan, "--model", model, "-o", out)
        assert done.code == 0, done.text
    assert sha256[:12] in done.text
    assert "licenses: code Apache-2.0, weights Apache-2.0, labels Apache-2.0" in done.text  # phantoms
    own, theirs = (labels_of(tmp_path / out / "case_00000.nii.gz") for out in ("run", "bundle"))
    assert own.any()
    assert (own == theirs).all()
    facts, before = (read(tmp_path / out / "case_00000.json") for out in ("bundle", "run"))
    assert facts["models"][0]["bundle"]["sha256"] == sha256
    assert str(tmp_path) not in json.dumps(facts["models"])
    assert facts["quality"] == before["quality"]
    done = kitseg(tmp_path, "infer", "--model", "two-phase.kitseg", "--data", scan, "-o", "p")
    assert done.code == 0, done.text


# --- hostile bundles -------------------------------------------------------------------------------------------------

CONFIGURATIONS = {
    "a target": ("_target_: kitseg.links.regions.Square", "_target_: os.mkdir\n      path: CANARY", "os.mkdir"),
    "torch.load": ("_target_: kitseg.nets.unet.UNet", "_target_: torch.load", "torch.load"),
    "a neighbour's import": ("_target_: torch.optim.Adam", "_target_: kitseg.nets.unet.Tensor", "unet.Tensor"),
    "a part where a stage belongs": (
        "_target_: kitseg.stages.model.SliceModel", "_target_: torch.nn.Identity", "stages.kidneys",
    ),
    "the environment": ("paper: ", "paper: ${oc.env:HOME} ", "oc.env:HOME"),
    "a tag": ("paper: ", "evil: !!python/object/apply:os.mkdir [CANARY]\npaper: ", "python/object"),
    "an alias": ("name: dual-unet", "a: &a [1, 2]\nb: [*a, *a]\nname: dual-unet", "alias"),
    "a stage outside": ("- kidneys\n", "- ../../kidneys\n", "is not a name"),
    "a name of escapes": ("name: dual-unet", 'name: "\\e[2J"', "is not a name"),
}  # fmt: skip


@pytest.mark.parametrize("what", CONFIGURATIONS)
def test_a_hostile_configuration(content: Files, tmp_path: Path, cache: Path, what: str) -> None:
    old, new, expected = CONFIGURATIONS[what]
    text = content["runs/0/config.yaml"].decode()
    assert old in text
    text = text.replace(old, new.replace("CANARY", str(tmp_path / "canary")), 1)
    if what == "a stage outside":
        text = text.replace("  kidneys:\n", "  ../../kidneys:\n", 1)
    assert expected in refused(pack(tmp_path / "x.kitseg", {**content, "runs/0/config.yaml": text.encode()}), cache)


@pytest.mark.parametrize("what", CONFIGURATIONS)
def test_a_hostile_configuration_of_a_run(run: Path, tmp_path: Path, what: str) -> None:
    old, new, expected = CONFIGURATIONS[what]
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace(old, new.replace("CANARY", str(tmp_path / "canary")), 1))
    with pytest.raises(KitsegError) as error:
        open_model(tmp_path / "run", "cpu")
    assert not (tmp_path / "canary").exists()
    assert len(str(error.value).splitlines()) == 1
    assert expected in str(error.value) or what == "a stage outside"


def _tensors(header: Any, length: int | None = None) -> bytes:
    """A safetensors file with a header that may lie."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(16)


def _tensor(*shape: int, size: int = 16) -> dict[str, Any]:
    return {"net.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}


HOSTILE_WEIGHTS = {
    "a header beyond the file": _tensors(_tensor(4), length=2**63 - 1),
    "a negative header": _tensors(_tensor(4), length=2**64 - 1),
    "a huge shape": _tensors(_tensor(2**40, 2**20)),
    "an overflowing shape": _tensors(_tensor(2**32, 2**32, 2**2)),
    "bytes beyond the file": _tensors(_tensor(2**30, size=2**32)),
    "another network's": _tensors(_tensor(4)),
    "no tensors": _tensors({}),
    "nothing": b"",
    "a text": b"weights",
}


@pytest.mark.parametrize("what", HOSTILE_WEIGHTS)
def test_hostile_weights(content: Files, tmp_path: Path, cache: Path, what: str) -> None:
    text = refused(pack(tmp_path / "x.kitseg", {**content, WEIGHTS: HOSTILE_WEIGHTS[what]}), cache)
    assert "weights" in text


def test_a_pickle_in_a_bundle(content: Files, tmp_path: Path, cache: Path) -> None:
    torch.save({"state_dict": Evil(tmp_path / "canary")}, tmp_path / "evil.ckpt")
    evil = (tmp_path / "evil.ckpt").read_bytes()
    assert "hold weights" in refused(pack(tmp_path / "x.kitseg", {**content, WEIGHTS: evil}), cache)
    named = {**content, f"{STAGE}/best/0.ckpt": evil}
    assert "0.ckpt' is not a file" in refused(pack(tmp_path / "x.kitseg", named), cache)


@pytest.mark.parametrize(
    "file", ["../../../../evil.ckpt", "/etc/passwd", "best/1.safetensors", "best/../../../../../../evil.ckpt", "", 7]
)
def test_checkpoints_elsewhere(content: Files, tmp_path: Path, cache: Path, file: Any) -> None:
    torch.save({"state_dict": Evil(tmp_path / "canary")}, tmp_path / "evil.ckpt")
    done = {"schema": 1, "checkpoints": [{"file": file, "sha256": "0"}], "threshold": None}
    refused(pack(tmp_path / "x.kitseg", {**content, f"{STAGE}/done.json": json.dumps(done).encode()}), cache)


NAMES = ["../canary", "/tmp/canary", "runs/0/../../../canary", "runs\\0\\canary", "C:/canary", "canary.py", "runs/0/",
         "runs/0/fold_0/kidneys/best/0.ckpt", "runs/0/fold_0/kidneys/../tumor/done.json", "RUNS/0/run.json",
         "runs/０/run.json", "runs/0/fold_0/kidneys/best/0.safetensors\n"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_that_no_bundle_has(content: Files, tmp_path: Path, cache: Path, name: str) -> None:
    assert "is not a file" in refused(pack(tmp_path / "x.kitseg", {**content, name: b"canary"}), cache)


def test_links_and_devices(content: Files, tmp_path: Path, cache: Path) -> None:
    for kind in (stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFDIR):
        path = pack(tmp_path / "x.kitseg", content)
        with ZipFile(path, "a") as archive:
            entry = ZipInfo("runs/1/config.yaml")
            entry.external_attr = (kind | 0o777) << 16
            archive.writestr(entry, "/etc/passwd")
        assert "config.yaml is not a regular file" in refused(path, cache)


def test_a_name_twice(content: Files, tmp_path: Path, cache: Path) -> None:
    path = pack(tmp_path / "x.kitseg", content)
    with ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("runs/0/config.yaml", b"name: other\n")
    assert "config.yaml' occurs 2 times" in refused(path, cache)


def test_bombs(content: Files, tmp_path: Path, cache: Path) -> None:
    deflated = pack(tmp_path / "deflated.kitseg", content)
    with ZipFile(deflated, "a") as archive:
        archive.writestr("runs/1/config.yaml", bytes(50_000_000), ZIP_DEFLATED)
    assert "config.yaml is compressed" in refused(deflated, cache)

    claims = pack(tmp_path / "claims.kitseg", content)
    data = bytearray(claims.read_bytes())
    entry = data.index(b"PK\x01\x02")
    data[entry + 20 : entry + 28] = struct.pack("<II", 2**31, 2**31)
    claims.write_bytes(data)
    assert "claim more bytes" in refused(claims, cache)

    same = pack(tmp_path / "same.kitseg", content)  # entries that share their bytes
    data = bytearray(same.read_bytes())
    entries = [i for i in range(len(data)) if data[i : i + 4] == b"PK\x01\x02"]
    for entry in entries:
        data[entry + 42 : entry + 46] = bytes(4)
    same.write_bytes(data)
    refused(same, cache)

    many = tmp_path / "many.kitseg"
    with ZipFile(many, "w") as archive:
        for number in range(10_001):
            archive.writestr(ZipInfo(f"runs/{number}"), b"")
    assert "10001 files are too many" in refused(many, cache)

    table = tmp_path / "table.kitseg"
    with ZipFile(table, "w") as archive:
        for number in range(300):
            archive.writestr(ZipInfo(f"{number:060000d}"), b"")
    assert "its table of files is too large" in refused(table, cache)


def test_other_content_than_stated(content: Files, tmp_path: Path, cache: Path) -> None:
    def change(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
        return lambda manifest: manifest["files"][WEIGHTS].__setitem__(key, value)

    assert "0.safetensors has another hash" in refused(
        pack(tmp_path / "x.kitseg", content, change("sha256", "0")), cache
    )
    assert "not those in bundle.json" in refused(pack(tmp_path / "x.kitseg", content, change("bytes", 1)), cache)
    less = {name: data for name, data in content.items() if name != f"{STAGE}/done.json"}
    assert "kidneys" in refused(pack(tmp_path / "x.kitseg", less), cache)


EVIL_STEP = {"_target_": "kitseg.postprocess.prior.os.mkdir", "path": "canary"}
MANIFESTS = {
    "older": ({"schema": 0}, "schema 0, this version of kitseg reads 1: export it again"),
    "newer": ({"schema": 2}, "schema 2, this version of kitseg reads 1: update kitseg"),
    "no members": ({"members": []}, "it needs members"),
    "a run outside": ({"members": [{"run": "../../.."}]}, "is not a run"),
    "a run that isn't there": ({"members": [{"run": "runs/7"}]}, "runs/7"),
    "a weight": ({"members": [{"run": "runs/0", "weight": "nan"}]}, "weights"),
    "a prior": ({"postprocess": {"x": {"_target_": "os.mkdir", "name": "canary"}}}, "os.mkdir"),
    "a prior's import": ({"postprocess": {"x": EVIL_STEP}}, "not a part that kitseg builds from"),
    "a license": ({"licenses": {"code": "a", "weights": "b\n\x1b[2J", "labels": "c"}}, "name or license"),
    "no licenses": ({"licenses": {}}, "code"),
    "files": ({"files": []}, "AttributeError"),
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_hostile_manifests(content: Files, tmp_path: Path, cache: Path, what: str) -> None:
    changes, expected = MANIFESTS[what]
    found = refused(pack(tmp_path / "x.kitseg", content, lambda manifest: manifest.update(changes)), cache)
    assert expected in found or what == "files"


@pytest.mark.parametrize("data", [b"", b"text", b"PK\x05\x06" + bytes(18), b"\x1f\x8b" + bytes(100)])
def test_what_is_no_bundle(tmp_path: Path, cache: Path, data: bytes) -> None:
    (tmp_path / "x.kitseg").write_bytes(data)
    refused(tmp_path / "x.kitseg", cache)


@pytest.mark.parametrize("manifest", [b"", b"[1]", b"[" * 100_000, b"null", b'{"schema": 1}'])
def test_what_is_no_manifest(content: Files, tmp_path: Path, cache: Path, manifest: bytes) -> None:
    with ZipFile(tmp_path / "x.kitseg", "w") as archive:
        archive.writestr(MANIFEST, manifest)
    refused(tmp_path / "x.kitseg", cache)


def test_an_entry_past_the_end_of_the_file(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "x.kitseg"
    with ZipFile(path, "w") as archive:
        archive.writestr(MANIFEST, b"{}")
    data = bytearray(path.read_bytes())
    struct.pack_into("<LL", data, data.index(b"PK\x01\x02") + 20, len(data), len(data))
    path.write_bytes(data)
    assert "it is cut short" in refused(path, cache)


def test_damage_at_many_places(content: Files, tmp_path: Path, cache: Path) -> None:
    sound = pack(
        tmp_path / "x.kitseg", {n: d for n, d in content.items() if not n.endswith(".safetensors")}
    ).read_bytes()
    for place in range(0, len(sound), 97):
        for damaged in (sound[:place], sound[:place] + bytes([sound[place] ^ 0x55]) + sound[place + 1 :]):
            (tmp_path / "x.kitseg").write_bytes(damaged)
            refused(tmp_path / "x.kitseg", cache)


# --- addresses -------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """Speaks like Hugging Face: ``server.bundle`` is the one file of owner/name at revision v1."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        data, commit = self.server.bundle, "0" * 40
        sha256 = hashlib.sha256(data).hexdigest()
        self.server.asked += 1
        file = {"rfilename": "two.kitseg", "size": len(data), "blobId": "1" * 40}
        lfs = {"sha256": self.server.stated or sha256, "size": len(data), "pointerSize": 133}
        facts = {"id": "owner/name", "sha": commit, "siblings": [{"rfilename": "README.md"}, {**file, "lfs": lfs}]}
        path = self.path.partition("?")[0]
        answers = {
            "/api/models/owner/name/revision/v1": json.dumps(facts).encode(),
            f"/owner/name/resolve/{commit}/two.kitseg": data,
        }
        self.send_response(200 if path in answers else 404)
        self.send_header("Content-Length", str(len(answers.get(path, b""))))
        self.send_header("ETag", f'"{sha256}"')
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(answers.get(path, b""))

    def log_message(self, *_: object) -> None:
        """Be quiet."""


def _point_to(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_ENDPOINT does, which is read once in a process."""
    monkeypatch.setattr(constants, "ENDPOINT", server)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub(content: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.bundle, server.stated, server.asked = pack(tmp_path / "x.kitseg", content).read_bytes(), None, 0
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    _point_to(f"http://127.0.0.1:{server.server_port}", monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


ADDRESS = "hf://owner/name@v1"


def test_an_address_is_fetched_once(hub: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = locate(ADDRESS)
    assert folder == locate(tmp_path / "x.kitseg")
    assert only_member(ADDRESS)[0].run == folder / "runs" / "0"
    asked = hub.asked
    assert asked > 0
    shutil.rmtree(tmp_path / "hub")
    _point_to("http://127.0.0.1:1", monkeypatch)  # nobody is there
    assert locate(ADDRESS) == folder
    assert hub.asked == asked
    with pytest.raises(KitsegError, match="hf://owner/name@v2: the download failed"):
        locate("hf://owner/name@v2")


def test_an_address_keeps_its_bundle(hub: ThreadingHTTPServer, content: Files, tmp_path: Path) -> None:
    folder = locate(ADDRESS)
    first, hub.bundle = hub.bundle, pack(tmp_path / "y.kitseg", content, lambda m: m.update(name="new")).read_bytes()
    assert locate(ADDRESS) == folder  # nobody asked
    shutil.rmtree(folder)
    with pytest.raises(KitsegError, match="holds another bundle than before"):
        locate(ADDRESS)
    hub.bundle = first
    assert locate(ADDRESS) == folder


def test_another_file_than_the_server_states(hub: ThreadingHTTPServer, cache: Path) -> None:
    hub.stated = "0" * 64
    with pytest.raises(InputError, match=f"its hash is [0-9a-f]{{64}}, not {'0' * 64}"):
        locate(ADDRESS)
    assert not cache.exists()


@pytest.mark.parametrize("address", ["hf://owner/name", "hf://name@v1", "hf://owner/name@", "hf://a/b@v1?x=1", "hf://"])
def test_an_address_without_its_parts(address: str) -> None:
    with pytest.raises(UsageError, match="hf://owner/name@revision"):
        locate(address)


# --- hostile runs ----------------------------------------------------------------------------------------------------


def test_a_pickle_among_the_best_weights(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "fold_0" / "kidneys" / "best" / "3.ckpt"
    for evil in (Evil(tmp_path / "canary"), {"state_dict": Evil(tmp_path / "canary")}):
        torch.save(evil, path)
        with pytest.raises(InputError, match="nothing in it was run"):
            read_weights(path, torch.device("cpu"))
        with pytest.raises(InputError, match="has changed or is damaged"):
            export(tmp_path / "run", tmp_path / "x.kitseg")
        rows = [{"file": "best/3.ckpt", "sha256": file_digest(path)}]
        write_json(path.parents[1] / "done.json", 1, {"checkpoints": rows, "threshold": None})
        with pytest.raises(InputError, match="nothing in it was run"):
            export(tmp_path / "run", tmp_path / "x.kitseg")
    assert not (tmp_path / "canary").exists()
    assert sorted(found.name for found in tmp_path.iterdir()) == ["run"]


@pytest.mark.slow
def test_a_pickle_that_a_training_would_go_on_from(trained: Path, tmp_path: Path) -> None:
    for name in ("data", "test", "preprocessed"):
        (tmp_path / name).symlink_to(trained / name)
    shutil.copytree(trained / "runs", tmp_path / "runs")
    shutil.copy(trained / "splits.json", tmp_path)
    stage = tmp_path / "runs" / "two-phase-tiny" / "fold_0" / "fine"
    for file in (stage / "done.json", *stage.glob("best/*")):
        file.unlink()
    for name in ("last.ckpt", "previous.ckpt"):
        torch.save({"state_dict": Evil(tmp_path / "canary")}, stage / name)
    arguments = ("predict", "test", "--model", "runs/two-phase-tiny")
    assert kitseg(tmp_path, *arguments).code != 0
    again = kitseg(tmp_path, "train", *SMALLEST, "--jobs=1")
    assert "last.ckpt" in again.text
    assert "Traceback" not in again.text
    assert not (tmp_path / "canary").exists()
