"""Model bundles: what is exported predicts the same, and addresses give the bundle that they gave before."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import bundles
import numpy as np
import pytest
import torch
import yaml
from bundles import WEIGHTS, Files, pack
from conftest import kitseg, serving
from huggingface_hub import constants
from method_runs import labels_of, read
from safetensors.torch import load, save_file

from kitseg import config
from kitseg.errors import InputError, KitsegError, UsageError
from kitseg.labels import KITS19
from kitseg.models.bundles.archive import MANIFEST
from kitseg.models.bundles.bundle import Bundle, bundle_of, open_bundle
from kitseg.models.bundles.export import ExportOptions, export
from kitseg.models.digests import digests
from kitseg.models.ensemble_file import Member, write_ensemble
from kitseg.models.members import locate, members_of, only_member, open_ensemble
from kitseg.models.model import open_model
from kitseg.models.origin import describe_model
from kitseg.models.run_folder import Run
from kitseg.models.weights import Checkpoint, as_safetensors, read_weights
from kitseg.runtime.files import file_digest
from kitseg.splits import read_split
from kitseg.training.plan import claim_run
from kitseg.types import Geometry
from kitseg.volumes.nifti import write_image

run, content, cache = bundles.run, bundles.content, bundles.cache


# --- there and back --------------------------------------------------------------------------------------------------


def test_the_same_run_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.kitseg", tmp_path / "b.kitseg"
    export(run, first)
    export(run, second)
    assert first.read_bytes() == second.read_bytes()
    moved = shutil.copytree(run, tmp_path / "elsewhere" / run.name)
    export(moved, second)
    assert first.read_bytes() == second.read_bytes()


def test_what_a_bundle_states(content: Files, run: Path) -> None:
    manifest = json.loads(content[MANIFEST])
    assert (manifest["schema"], manifest["name"]) == (1, run.name)
    assert manifest["licenses"] == {"code": "Apache-2.0", "weights": "CC-BY-NC-SA-4.0", "labels": "CC-BY-NC-SA-4.0"}
    (member,) = manifest["members"]
    assert member["labels"] == KITS19.plain() | {"regions": {"kidney": ["kidney", "tumor"], "tumor": ["tumor"]}}
    assert member["stages"]["kidneys"]["normalization"]["low"] == -79
    assert member["stages"]["kidneys"]["grid"]["pixels"] == 96
    assert member["training"]["cases"] == 1  # the second validates, the third is a test case
    assert member["training"]["split_sha256"] == file_digest(run / "splits.json")
    assert b"somebody" not in b"".join(content.values())  # no case by its name
    assert {Path(name).suffix for name in content} == {".json", ".yaml", ".safetensors"}


def test_a_bundle_holds_no_path(run: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(run, tmp_path / "mine")
    text = (mine / "config.yaml").read_text()
    assert text.count("lesions: null") == 1
    (mine / "config.yaml").write_text(text.replace("lesions: null", "lesions: /home/somebody/kits19"))
    export(mine, tmp_path / "mine.kitseg")
    assert b"somebody" not in (tmp_path / "mine.kitseg").read_bytes()
    config = Run(only_member(tmp_path / "mine.kitseg")[0].run).config
    assert config.read_text() == text.replace("lesions: null", "lesions: kits19")


def test_weights_that_began_with_those_of_a_model_keep_its_license(run: Path, tmp_path: Path) -> None:
    own = "CC0-1.0"
    licenses = {"code": "Apache-2.0", "weights": own, "labels": own}
    assert export(run, tmp_path / "x.kitseg", ExportOptions(labels=own)) == licenses
    tuned = shutil.copytree(run, tmp_path / "tuned")
    (tuned / "fold_0/kidneys/initial.json").write_text("{}")
    assert export(tuned, tmp_path / "y.kitseg", ExportOptions(labels=own)) == licenses | {"weights": "CC-BY-NC-SA-4.0"}
    assert export(tuned, tmp_path / "z.kitseg", ExportOptions(own, own)) == licenses


def test_an_opened_bundle_is_a_run_with_the_same_weights(run: Path, tmp_path: Path, cache: Path) -> None:
    export(run, tmp_path / "x.kitseg", ExportOptions(labels="ours: not to be passed on"))
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


def test_half_precision_a_name_and_a_card(run: Path, tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text("# What it learned from\n")
    export(run, tmp_path / "full.kitseg")
    export(run, tmp_path / "half.kitseg", ExportOptions(half=True, name="ours", card=tmp_path / "card.md"))
    assert (tmp_path / "half.kitseg").stat().st_size < 0.55 * (tmp_path / "full.kitseg").stat().st_size
    bundle = open_bundle(tmp_path / "half.kitseg")
    assert (bundle.path / "README.md").read_text() == "# What it learned from\n"
    opened = open_ensemble([tmp_path / "half.kitseg"], "cpu", engine="torch")
    assert opened.origin()[0]["path"] == "ours.kitseg"
    for name, stage in opened.models[0].chain.items():
        ((path, _),) = Run(run).stage(0, name).checkpoints()
        before, after = read_weights(path, torch.device("cpu")), Checkpoint(stage.checkpoints[0], stage.model).load()
        assert after.state_dict().keys() == before.keys()
        for key, value in after.state_dict().items():
            assert torch.equal(value, before[key].half().float() if value.is_floating_point() else before[key])
    with pytest.raises(UsageError, match=r"nothing\.md: can't be read"):
        export(run, tmp_path / "none.kitseg", ExportOptions(card=tmp_path / "nothing.md"))


def test_a_weight_too_large_for_half_precision_is_not_infinite(tmp_path: Path) -> None:
    save_file({"norm.running_var": torch.tensor([1.0, 70_000.0])}, tmp_path / "0.safetensors")
    assert load(as_safetensors(tmp_path / "0.safetensors"))["norm.running_var"].tolist() == [1, 70_000]
    with pytest.raises(InputError, match=r"norm\.running_var .* without --half"):
        as_safetensors(tmp_path / "0.safetensors", half=True)


def test_a_home_that_can_not_hold_the_cache(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(run, tmp_path / "a.kitseg")
    monkeypatch.delenv("KITSEG_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "a.kitseg"))
    with pytest.raises(KitsegError, match=r"the cache can't be written .*Set KITSEG_CACHE"):
        open_bundle(tmp_path / "a.kitseg")
    monkeypatch.setattr(Path, "home", lambda: Path("~nobody-of-this-name").expanduser())
    with pytest.raises(KitsegError, match=r"no home folder .*Set KITSEG_CACHE"):
        open_bundle(tmp_path / "a.kitseg")


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
    assert [one["path"] for one in opened.origin()] == [f"{run.name}.kitseg"] * 2
    with pytest.raises(UsageError, match="stands for 2 runs"):
        only_member(tmp_path / "best.kitseg")


def test_a_run_is_of_no_bundle(run: Path) -> None:
    assert bundle_of(Run(run)) is None
    assert members_of(run) == ([Member(run)], None)
    assert only_member(run) == (Member(run), None)


def test_an_ensemble_file_knows_its_networks(run: Path, tmp_path: Path) -> None:
    """A run that was trained again since is refused by every command that opens the file; raised epochs don't count."""
    mine = shutil.copytree(run, tmp_path / "runs" / "a")
    write_ensemble(tmp_path / "chosen.yaml", [Member(mine, sha256=digests(mine))], {}, {})
    ((member,), _) = members_of(tmp_path / "chosen.yaml")
    assert member.sha256.keys() == {0}
    assert members_of(shutil.copytree(tmp_path, tmp_path.with_name("moved")) / "chosen.yaml")[0][0].sha256
    settings = config.read(Run(mine).config)
    more = {name: {**stage, "epochs": stage["epochs"] + 5} for name, stage in settings["stages"].items()}
    claim_run(Run(mine), {**settings, "stages": more}, read_split(Run(mine).split))
    assert config.read(Run(mine).config)["stages"] == more
    assert members_of(tmp_path / "chosen.yaml")[0] == [member]
    done = Run(mine).stage(0, "kidneys").done
    rows = json.loads(done.read_text())
    rows["checkpoints"][0]["sha256"] = "0" * 64
    done.write_text(json.dumps(rows))
    with pytest.raises(InputError, match=r"was chosen with other networks or settings than .*runs/a holds now"):
        export(tmp_path / "chosen.yaml", tmp_path / "x.kitseg")
    write_image(tmp_path / "a.nii.gz", np.zeros((4, 32, 32), np.int16), Geometry((32, 32, 4), np.eye(4)))
    refused = kitseg(tmp_path, "predict", "a.nii.gz", "--model=chosen.yaml")
    assert (refused.code, "other networks" in refused.text) == (1, True), refused.text


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
        (["nowhere", "-o", "x.kitseg"], "there is no such model"),
        (["builtin", "-o", "x.kitseg"], "builtin.kitseg is a bundle already"),
        (["hf://a/b@v1", "-o", "x.kitseg"], "hf://a/b@v1 is a bundle already"),
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
    bundle = pack(tmp_path / "x.kitseg", content).read_bytes()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with serving(Hub, bundle=bundle, stated=None, asked=0) as server:
        _point_to(f"http://127.0.0.1:{server.server_port}", monkeypatch)
        yield server


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
