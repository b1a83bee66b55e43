"""Hostile bundles, ensemble files and runs: refused in a line, quickly, in little memory, and nothing of them runs."""

from __future__ import annotations

import json
import resource
import shutil
import stat
import struct
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import bundles
import pytest
import torch
import yaml
from bundles import STAGE, WEIGHTS, Evil, Files, pack
from conftest import SMALLEST, kitseg

from kitseg import trust
from kitseg.errors import InputError, KitsegError
from kitseg.models.bundles.archive import MANIFEST
from kitseg.models.bundles.export import export
from kitseg.models.model import open_model
from kitseg.models.weights import read_weights
from kitseg.runtime.files import file_digest, write_json

run, content, cache = bundles.run, bundles.content, bundles.cache
CONFIG = "runs/0/config.yaml"
SCAN = Path(__file__).parent / "old_run" / "scan.nii.gz"
Change = Callable[[Any], Any]


def refused(path: Path, cache: Path) -> str:
    """The line that refuses a bundle, within 2 processor seconds and 200 MB; nothing of it is on the disk then."""
    before = {found: found.stat().st_mtime_ns for found in path.parent.rglob("*") if cache not in found.parents}
    with _quickly():
        done = kitseg(path.parent, "predict", str(SCAN), "--model", path.name, "-o", "out")
    after = {found: found.stat().st_mtime_ns for found in path.parent.rglob("*") if cache not in found.parents}
    assert {**before, cache: 0, path.parent: 0} == {**after, cache: 0, path.parent: 0}
    assert [found for found in cache.rglob("*") if found.is_file()] == []
    (line,) = (line for line in done.text.splitlines() if line.strip())
    assert (done.code, len(line) < 1000) == (1, True), done.text
    assert line.startswith(f"✗ {path.name}: is not a valid model bundle (")
    return line


@contextmanager
def _quickly() -> Iterator[None]:
    """The block takes at most 2 processor seconds and 200 MB more than the process has had."""
    begun, held = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - begun < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held < 200_000


# --- configurations, in bundles and in runs --------------------------------------------------------------------------

TEXTS = {
    "a target": ("_target_: kitseg.links.regions.Square", "_target_: os.mkdir\n      path: CANARY", "os.mkdir"),
    "torch.load": ("_target_: kitseg.nets.unet.UNet", "_target_: torch.load", "torch.load"),
    "a neighbour's import": ("_target_: torch.optim.Adam", "_target_: kitseg.nets.unet.Tensor", "unet.Tensor"),
    "the environment": ("paper: ", "paper: ${oc.env:HOME} ", "oc.env:HOME"),
    "a tag": ("paper: ", "evil: !!python/object/apply:os.mkdir [CANARY]\npaper: ", "python/object"),
    "an alias": ("name: dual-unet", "a: &a [1, 2]\nb: [*a, *a]\nname: dual-unet", "alias"),
    "a stage outside": ("- kidneys\n", "- ../../kidneys\n", "kidneys"),
    "a name of escapes": ("name: dual-unet", 'name: "\\e[2J"', "is not a name"),
    "lists in lists": ("\nname: ", "\nx: " + "[" * 40_000 + "\nname: ", "30 levels"),
    "a list of lists beyond any size": ("\nname: ", "\nx: " + "[" * 400_000 + "\nname: ", "more than 50000 bytes"),
    "a number of base 60": ("\nname: ", "\nx: 1" + ":1" * 20_000 + "\nname: ", "a value of 40001 characters"),
    "a longer one": ("\nname: ", "\nx: 1" + ":1" * 450_000 + "\nname: ", "more than 50000 bytes"),
    "a number of 4000 digits": ("\nname: ", f"\nx: {'9' * 4000}\nname: ", "too large"),
    "many values": ("\nname: ", f"\nx: [{'1,' * 2100}]\nname: ", "too many values"),
    "bytes": ("\nname: ", "\nx: !!binary aGk=\nname: ", "bytes"),
    "a date": ("\nname: ", "\nx: 2020-01-01\nname: ", "date"),
    "not a number": ("scale: 76.9", "scale: .nan", "not finite"),
    "infinity": ("scale: 76.9", "scale: -.inf", "not finite"),
}

LINEAR = {"_target_": "torch.nn.Linear", "in_features": 30_000, "out_features": 30_000}
RESIDUAL = {
    "_target_": "kitseg.nets.residual_unet.ResidualUNet", "channels_in": 1, "channels_out": 2, "widths": [4, 4],
    "strides": [[1, 1, 1], [2, 2, 2]], "kernels": [[3, 3, 3], [3, 3, 3]],
}  # fmt: skip
VNET = {"_target_": "kitseg.nets.vnet.VNet"}
SLIDING = {"_target_": "kitseg.inference.windows.SlidingWindow", "size": [64, 64, 64], "overlap": 0.5}
SQUARE = {"_target_": "kitseg.links.regions.Square"}
AROUND = {"_target_": "kitseg.links.regions.AroundForeground", "margin": 20}
KIDNEYS = {"_target_": "kitseg.postprocess.kidneys.KeepKidneys"}


def _stage(**changes: Any) -> Change:
    return lambda config: config["stages"]["kidneys"].update(changes)


def _module(**changes: Any) -> Change:
    return lambda config: config["stages"]["kidneys"]["module"].update(changes)


VALUES: dict[str, tuple[Change, str]] = {
    "a layer in a region": (_stage(region=LINEAR), "can't be used there"),
    "a layer in a region's argument": (_stage(region={**SQUARE, "pixels": LINEAR}), "can't be used there"),
    "a layer as intensities": (_stage(intensity=LINEAR), "can't be used there"),
    "a layer in a window": (_module(window={**SLIDING, "size": LINEAR}), "can't be used there"),
    "a layer in a prior": (lambda c: c.update(postprocess={"x": {**KIDNEYS, "most": LINEAR}}), "can't be used there"),
    "a layer as a prior": (lambda c: c.update(postprocess={"x": LINEAR}), "can't be used there"),
    "a layer as a stage": (_stage(module={**LINEAR, "window": SLIDING}), "stages.kidneys"),
    "a larger network": (_module(net=LINEAR), "weights of its network"),
    "many convolutions": (_module(net={**VNET, "down": [100_000, 1, 1, 1]}), "at most 16 convolutions"),
    "many blocks": (_module(net={**RESIDUAL, "blocks": [1, 10**6]}), "1 to 16 blocks"),
    "many networks": (_module(net={"_target_": "torch.nn.Sequential", "_args_": [VNET] * 40}), "too many"),
    "many layers": (_module(net={"_target_": "torch.nn.Sequential", "_args_": [LINEAR] * 60}), "too many"),
    "repeated layers": (_module(net={"_target_": "torch.nn.LSTM", "input_size": 1, "num_layers": 10**6}), "LSTM"),
    "a huge width": (_module(net={"_target_": "kitseg.nets.unet.UNet", "width": 10**9}), "too large"),
    "a long text": (_module(net={"_target_": "kitseg.nets.unet.UNet", "width": "9" * 3_000}), "too large"),
    "windows that hardly move": (_module(window={**SLIDING, "overlap": 0.999999}), "0 to 0.9"),
    "a huge window": (_module(window={**SLIDING, "size": [10_000] * 3}), "2**27"),
    "no step": (_module(window={"_target_": "kitseg.inference.windows.DepthWindow", "size": 8, "step": 0}), "step"),
    "a negative batch": (_module(window={"_target_": "kitseg.inference.windows.Slices", "batch": -1}), "batch"),
    "a huge square": (_stage(region={**SQUARE, "pixels": 500_000}), "2048"),
    "a huge body": (_stage(region={"_target_": "kitseg.links.regions.Body", "at_least": [10**6, 1, 1]}), "2048 voxels"),
    "a deep square": (_stage(region={**SQUARE, "pixels": 64, "slices": 10**6}), "2048 voxels"),
    "a huge box": (_stage(region={**AROUND, "at_least": [2000] * 3}), "2**27"),
    "a fine grid": (_stage(grid={"inplane": 1e-6}), "0.2"),
    "a long chain": (lambda c: c.update(chain=["kidneys"] * 1500), "chain has no entries or more than 8"),
    "no chain": (lambda c: c.update(chain=[]), "chain has no entries"),
    "many outputs": (lambda c: c.update(outputs={f"t{n}": "kidneys.foreground" for n in range(500)}), "outputs has"),
    "many priors": (lambda c: c.update(postprocess={f"p{n}": KIDNEYS for n in range(300)}), "must name each prior"),
    "priors in a list": (lambda c: c.update(postprocess=[KIDNEYS]), "must name each prior"),
    "epochs of another type": (_stage(epochs="many"), "stages.kidneys.epochs"),
    "heads of another type": (_stage(heads=7), "not iterable"),
    "stages of another type": (lambda c: c.update(stages=[]), "does not describe a method"),
}  # fmt: skip


def _configured(text: str, what: str, canary: Path) -> tuple[str, str]:
    """A configuration made hostile, and what its refusal states."""
    if what in VALUES:
        change, expected = VALUES[what]
        config = yaml.safe_load(text)
        change(config)
        return trust.dump(config), expected
    old, new, expected = TEXTS[what]
    assert old in text
    return text.replace(old, new.replace("CANARY", str(canary)), 1), expected


@pytest.mark.parametrize("what", [*TEXTS, *VALUES])
def test_a_hostile_configuration(content: Files, run: Path, tmp_path: Path, cache: Path, what: str) -> None:
    """In a bundle, and in a run that is opened as it lies there."""
    text, expected = _configured(content[CONFIG].decode(), what, tmp_path / "canary")
    assert expected in refused(pack(tmp_path / "x.kitseg", {**content, CONFIG: text.encode()}), cache)
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(text)
    with pytest.raises(KitsegError) as error:
        open_model(tmp_path / "run", "cpu")
    assert not (tmp_path / "canary").exists()
    assert len(str(error.value).splitlines()) == 1
    assert expected in str(error.value) or what == "a larger network"


# --- other files of a bundle -----------------------------------------------------------------------------------------


def _tensors(header: Any, length: int | None = None) -> bytes:
    """A safetensors file with a header that may lie."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(16)


def _tensor(*shape: int, size: int = 16, kind: str = "F32") -> dict[str, Any]:
    return {"net.weight": {"dtype": kind, "shape": shape, "data_offsets": [0, size]}}


def _evil(canary: Path) -> bytes:
    torch.save({"state_dict": Evil(canary)}, canary.parent / "evil.ckpt")
    return (canary.parent / "evil.ckpt").read_bytes()


def _done(file: Any = "best/0.safetensors", times: int = 1, **more: Any) -> str:
    rows = [{"file": file, "sha256": "0"}] * times
    return json.dumps({"schema": 1, "checkpoints": rows, "threshold": None, **more})


DONE, INFO = f"{STAGE}/done.json", "runs/0/run.json"
FACTS = {"schema": 1, "kitseg": "0.1.0", "phantom": False}
FILES: dict[str, tuple[str, str | bytes, str]] = {
    "a header beyond the file": (WEIGHTS, _tensors(_tensor(4), length=2**63 - 1), "weights"),
    "a negative header": (WEIGHTS, _tensors(_tensor(4), length=2**64 - 1), "weights"),
    "a header of 20 MB": (WEIGHTS, _tensors({"__metadata__": {"x": "y" * 20_000_000}}), "head is too large"),
    "a huge shape": (WEIGHTS, _tensors(_tensor(2**40, 2**20)), "weights"),
    "an overflowing shape": (WEIGHTS, _tensors(_tensor(2**32, 2**32, 2**2)), "weights"),
    "bytes beyond the file": (WEIGHTS, _tensors(_tensor(2**30, size=2**32)), "weights"),
    "another network's": (WEIGHTS, _tensors(_tensor(4)), "weights"),
    "no tensors": (WEIGHTS, _tensors({}), "weights"),
    "no weights": (WEIGHTS, b"", "weights"),
    "a text": (WEIGHTS, b"weights", "weights"),
    "a pickle": (WEIGHTS, "EVIL", "hold weights"),
    "a pickle by its name": (f"{STAGE}/best/0.ckpt", "EVIL", "0.ckpt' is not a file"),
    "a checkpoint above": (DONE, _done("../../../../evil.ckpt"), "done.json"),
    "a checkpoint above its folder": (DONE, _done("best/../../../../../../evil.ckpt"), "done.json"),
    "a checkpoint elsewhere": (DONE, _done("/etc/passwd"), "done.json"),
    "a checkpoint by its number": (DONE, _done(7), "done.json"),
    "a checkpoint that is a folder": (DONE, _done(""), "weights"),
    "a checkpoint that isn't there": (DONE, _done("best/1.safetensors"), "is missing"),
    "no checkpoint": (DONE, _done(times=0), "no checkpoints"),
    "many checkpoints": (DONE, _done(times=150_000), "too large"),
    "a threshold that isn't a number": (DONE, _done(threshold=float("nan")), "done.json"),
    "an infinite threshold": (DONE, _done().replace("null", "1e999"), "done.json"),
    "many cases": (INFO, json.dumps({**FACTS, "cases": ["x"] * 1_500_000}), "too large"),
    "facts within each other": (INFO, '{"schema": 1, "x": ' + "[" * 500_000, "run.json"),
    "a version of escapes": (INFO, json.dumps({**FACTS, "kitseg": "\x1b[2J"}), "trained with"),
    **{f"a file named {name!r}": (name, b"canary", "is not a file") for name in (
        "../canary", "/tmp/canary", "runs/0/../../../canary", "runs\\0\\canary", "C:/canary", "canary.py", "runs/0/",
        "runs/0/fold_0/kidneys/../tumor/done.json", "RUNS/0/run.json", "runs/\uff10/run.json", f"{WEIGHTS}\n",
    )},
}  # fmt: skip


@pytest.mark.parametrize("what", FILES)
def test_a_hostile_file_in_a_bundle(content: Files, tmp_path: Path, cache: Path, what: str) -> None:
    name, data, expected = FILES[what]
    data = _evil(tmp_path / "canary") if data == "EVIL" else data
    changed = {**content, name: data.encode() if isinstance(data, str) else data}
    assert expected in refused(pack(tmp_path / "x.kitseg", changed), cache)


MANIFESTS: dict[str, tuple[dict[str, Any], str]] = {
    "older": ({"schema": 0}, "schema 0, this version of kitseg reads 1"),
    "newer": ({"schema": 2}, "schema 2, this version of kitseg reads 1; update kitseg"),
    "no members": ({"members": []}, "it needs members"),
    "a run outside": ({"members": [{"run": "../../.."}]}, "is not a run"),
    "a run that isn't there": ({"members": [{"run": "runs/7"}]}, "runs/7"),
    "a weight": ({"members": [{"run": "runs/0", "weight": "nan"}]}, "weight"),
    "a weight that isn't a number": ({"members": [{"run": "runs/0", "weight": float("nan")}]}, "malformed"),
    "many members": ({"members": [{"run": "runs/0"}] * 10_000}, "at most 16"),
    "more members": ({"members": [{"run": "runs/0"}] * 60_000}, "bundle.json is too large"),
    "a member twice": ({"members": [{"run": "runs/0"}] * 2}, "a run occurs twice"),
    "a member twice, once without weight": (
        {"members": [{"run": "runs/0"}, {"run": "runs/0", "weight": 0}]},
        "a run occurs twice",
    ),
    "a name of 10 MB": ({"name": "x" * 10_000_000}, "bundle.json is too large"),
    "a name of 10 kB": ({"name": "x" * 10_000}, "name or license"),
    "a prior": ({"postprocess": {"x": {"_target_": "os.mkdir", "name": "canary"}}}, "os.mkdir"),
    "a prior's import": (
        {"postprocess": {"x": {"_target_": "kitseg.postprocess.kidneys.math.sin", "path": "canary"}}}, "not a part",
    ),
    "a layer in a prior": ({"postprocess": {"x": {**KIDNEYS, "most": LINEAR}}}, "can't be used there"),
    "many priors": ({"postprocess": {str(n): KIDNEYS for n in range(500)}}, "must name each prior"),
    "many values": ({"postprocess": {"x": {**KIDNEYS, "most": [0] * 100_000}}}, "too many values"),
    "a license": ({"licenses": {"code": "a", "weights": "b\n\x1b[2J", "labels": "c"}}, "name or license"),
    "more licenses": (
        {"licenses": {"code": "a", "weights": "b", "labels": "c", "\x1b[2J": "d"}}, "the licenses of code",
    ),
    "no licenses": ({"licenses": {}}, "code"),
    "no files": ({"files": {}}, "not those in bundle.json"),
    "files in a list": ({"files": []}, "files"),
}  # fmt: skip


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_hostile_manifest(content: Files, tmp_path: Path, cache: Path, what: str) -> None:
    changes, expected = MANIFESTS[what]
    assert expected in refused(pack(tmp_path / "x.kitseg", content, lambda manifest: manifest.update(changes)), cache)


@pytest.mark.parametrize("manifest", [b"", b"[1]", b"[" * 100_000, b"null", b'{"schema": 1}', b'{"schema": 1e999}'])
def test_what_is_no_manifest(tmp_path: Path, cache: Path, manifest: bytes) -> None:
    with ZipFile(tmp_path / "x.kitseg", "w") as archive:
        archive.writestr(MANIFEST, manifest)
    refused(tmp_path / "x.kitseg", cache)


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
        for number in range(2_001):
            archive.writestr(ZipInfo(f"runs/{number}"), b"")
    assert "2001 files are too many" in refused(many, cache)

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


@pytest.mark.parametrize("data", [b"", b"text", b"PK\x05\x06" + bytes(18), b"\x1f\x8b" + bytes(100)])
def test_what_is_no_bundle(tmp_path: Path, cache: Path, data: bytes) -> None:
    (tmp_path / "x.kitseg").write_bytes(data)
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
    for place in range(0, len(sound), 797):
        for damaged in (sound[:place], sound[:place] + bytes([sound[place] ^ 0x55]) + sound[place + 1 :]):
            (tmp_path / "x.kitseg").write_bytes(damaged)
            refused(tmp_path / "x.kitseg", cache)


# --- runs ----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("what", ["members", "many members", "lists", "digits", "layer", "weight", "mirror"])
def test_a_hostile_ensemble_file(run: Path, tmp_path: Path, what: str) -> None:
    member, path = f"- {{run: {run}, weight: 1}}\n", tmp_path / "best.yaml"
    whole = f"schema: 1\nmembers:\n{member}postprocess: {{}}\n"
    texts = {
        "members": (whole.replace(member, member * 40), "at most 16"),
        "many members": (whole.replace(member, member * 20_000), "bytes"),
        "lists": ("[" * 400_000, "30 levels"),
        "digits": ("1" + ":1" * 200_000, "a value of 400001 characters"),
        "layer": (whole.replace("{}", json.dumps({"x": {**KIDNEYS, "most": LINEAR}})), "can't be used there"),
        "weight": (whole.replace("weight: 1", "weight: .nan"), "weights"),
        "mirror": (whole.replace("weight: 1", "mirror: 1"), "bool"),
    }
    text, expected = texts[what]
    path.write_text(text)
    with _quickly():
        done = kitseg(tmp_path, "export", str(path), "-o", "x.kitseg")
    assert (done.code, expected in " ".join(done.text.split())) == (1, True), done.text
    assert not (tmp_path / "x.kitseg").exists()


def test_weights_that_claim_more_than_they_have(run: Path, tmp_path: Path) -> None:
    """One value that strides of 0 repeat, a pickle that is compressed, a network that is larger than its checkpoint."""
    torch.save({"state_dict": {"x": torch.zeros(1).expand(30_000, 30_000)}}, tmp_path / "x.ckpt")
    with pytest.raises(InputError, match="claims more values than it has"):
        read_weights(tmp_path / "x.ckpt", torch.device("cpu"))
    with ZipFile(tmp_path / "y.ckpt", "w", ZIP_DEFLATED) as archive:
        archive.writestr("y/data.pkl", bytes(50_000_000))
    with pytest.raises(InputError, match="it claims more than it has"):
        read_weights(tmp_path / "y.ckpt", torch.device("cpu"))
    shutil.copytree(run, tmp_path / "run")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    config["stages"]["kidneys"]["module"]["net"] = LINEAR
    (tmp_path / "run" / "config.yaml").write_text(trust.dump(config))
    with pytest.raises(KitsegError, match="larger than its checkpoints"):
        open_model(tmp_path / "run", "cpu")
