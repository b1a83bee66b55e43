"""A run as data: what there is, what a user may change, and what may be built from it."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from method_runs import SIZES

from kitseg import config, method, trust
from kitseg.errors import InputError, UsageError
from kitseg.labels import KITS19
from kitseg.method import OPTIONAL, Rounds, Source, StageSpec, method_of
from kitseg.nets.vnet import VNet
from kitseg.stages.base import Stage
from kitseg.stages.model import StageModel

composed = cache(config.compose)


@cache
def stage(name: str, *overrides: str) -> StageSpec:
    return method_of(config.compose("two-phase", "paper", overrides)).stages[name]


def problem(*overrides: str) -> str:
    """The error that a user sees for ``--set`` with these overrides."""
    with pytest.raises(UsageError) as error:
        method_of(config.compose("two-phase", "paper", overrides))
    assert "\n" not in str(error.value)
    return str(error.value)


# --- what there is ---------------------------------------------------------------------------------------------------


def test_the_whole_run() -> None:
    run = composed("two-phase", "paper")
    assert {k: run[k] for k in ("seed", "folds", "keep_best", "chain")} == {
        "seed": 0, "folds": 5, "keep_best": 5, "chain": ["coarse", "fine"],
    }  # fmt: skip
    assert run["labels"] == json.loads(json.dumps(KITS19.plain()))
    assert run["published"] == {"kidney": 0.968, "tumor": 0.75}
    built = [config.build(step) for step in run["postprocess"].values()]
    assert [(type(step).__name__, vars(step)) for step in built] == [
        (
            "KeepKidneys",
            {
                "most": 2,
                "min_ratio": 0.05,
                "min_ml": 20,
                "by_tissue": False,
                "min_probability": 0.0,
                "max_gap": math.inf,
            },
        ),
        ("RemoveLowHuTumors", {"threshold": 10}),
    ]


@pytest.mark.parametrize(("method", "size"), SIZES)
def test_every_method_composes_builds_and_is_read_again_at_every_size(tmp_path: Path, method: str, size: str) -> None:
    run = composed(method, size)
    (tmp_path / "config.yaml").write_text(trust.dump(run), encoding="utf-8")
    assert config.read(tmp_path / "config.yaml") == run
    found = method_of(run)
    assert found.name == method
    assert list(found.stages) == run["chain"]
    assert {source.stage for source in found.outputs.values()} <= set(found.stages)
    assert set(run["published"]) <= {"kidney", "tumor"}
    assert "tumor" in found.outputs
    for step in found.postprocess.values():
        config.build(step)
    for name, spec in found.stages.items():
        earlier = run["chain"][: run["chain"].index(name)]
        assert set(spec.inputs) <= set(earlier)
        assert set(OPTIONAL) <= set(run["stages"][name])
        with torch.device("meta"):
            stage = Stage.of(spec)
        for key in spec.parts.keys() - {"module"}:
            config.build(spec.parts[key])
        assert isinstance(stage.model, StageModel)
        assert sum(p.numel() for p in stage.model.net.parameters()) > 0
        assert len(stage.loss.weights) == len(spec.heads)


def test_a_smaller_size_keeps_the_method() -> None:
    lines = config.differences(composed("two-phase", "paper"), composed("two-phase", "tiny"))
    assert "stages.coarse.module.net.width: 16 → 8" in lines
    assert not [line for line in lines if line.startswith("size")]
    assert not [line for line in lines if line.startswith(("outputs", "postprocess", "published", "chain"))]


# --- what a user may change ------------------------------------------------------------------------------------------


def test_a_key_of_the_size_of_every_stage_and_of_one() -> None:
    for changes, epochs in (
        (["size.epochs=7"], (7, 7)),
        (["stages.fine.epochs=7"], (600, 7)),
        (["stages.fine.epochs=7", "stages.*.epochs=3"], (3, 7)),
    ):
        assert (stage("coarse", *changes).epochs, stage("fine", *changes).epochs) == epochs
    assert stage("fine", "stages.fine.module.optimizer.lr=0.5").parts["module"]["optimizer"]["lr"] == 0.5


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("stop_after=4", "stop_after", 4),
        ("micro_batch_size=1", "micro_batch_size", 1),
        ("rounds={most: 2, share: 0.5, epochs: 3}", "rounds", Rounds(2, 0.5, 3)),
        ("guide=out_of_fold", "guide", "out_of_fold"),
    ],
)
def test_an_optional_key_that_the_file_leaves_out(override: str, key: str, value: Any) -> None:
    assert getattr(stage("coarse", f"stages.coarse.{override}"), key) == value


def test_copies_of_lesions_that_never_happen_are_not_in_a_run() -> None:
    """So that a run of before there were copies resumes."""

    def masses(*overrides: str) -> list[Any]:
        found: list[Any] = config.compose("resenc", "M", overrides)["stages"]["masses"]["augmentation"]
        return found

    changes = {"_target_": "kitseg.augmentation.batched.Augmentation"}
    assert masses() == [changes]
    assert masses("size.copies=0.5") == [{"_target_": "kitseg.patches.lesion_copies.LesionCopies", "p": 0.5}, changes]


def test_parts_that_the_file_leaves_out() -> None:
    flip = "stages.coarse.augmentation=[{_target_: torchio.RandomFlip, axes: [2]}]"
    link = "stages.fine.link={_target_: kitseg.links.guides.SliceGate, fill_gaps: true}"
    assert stage("coarse", flip).parts["augmentation"] == [{"_target_": "torchio.RandomFlip", "axes": [2]}]
    same = [f"stages.{name}.grid.inplane=2" for name in ("coarse", "fine")]
    assert stage("fine", link, *same).parts["link"]["fill_gaps"] is True


@pytest.mark.parametrize(
    ("override", "key", "known"),
    [
        ("stages.fine.epoch=3", "stages.fine.epoch", ["epochs", "batch", "validate_every"]),
        ("stages.*.epoch=3", "stages.*.epoch", ["epochs"]),
        ("stages.find.epochs=3", "stages.find.epochs", ["coarse", "fine"]),
        ("sed=3", "sed", ["seed", "folds", "stages", "size"]),
        ("size.with=8", "size.with", ["vnet_width", "epochs", "patch"]),
        ("stages.fine.module.optimizer.rate=1", "stages.fine.module.optimizer.rate", ["lr", "betas", "eps"]),
    ],
)
def test_a_mistyped_key(override: str, key: str, known: list[str]) -> None:
    text = problem(override)
    assert f"{key}:" in text
    listed = text.split("Choose from ")[1].split(", ")
    assert set(known) <= set(listed)


@pytest.mark.parametrize(
    "override",
    ["seed=[1", "name='x", "seed=???", "seed=${nope}", "seed", "", "stages.fine.epochs=many", "stages.fine.epochs=0",
     "stages.fine.batch=-1", "folds=1", "stages.fine.epochs=1.5", "stages.fine.epochs=null",
     "stages.fine.grid.slices=0",
     "stages.fine.grid.inplane=-1", "stages.fine.grid.slices=thick", "stages.fine.grid=[3,1,1]", "keep_best=0"],
)  # fmt: skip
def test_a_value_of_the_wrong_form_is_named(override: str) -> None:
    key = override.partition("=")[0]
    assert key.removesuffix(".slices").removesuffix(".inplane") in problem(override)


@pytest.mark.parametrize(("stage", "before"), [("coarse", "fine"), ("fine", "fine"), ("fine", "nowhere")])
def test_a_stage_builds_on_an_earlier_one(stage: str, before: str) -> None:
    made = config.compose("two-phase", "tiny", [f"stages.{stage}.inputs=[{before}]"])
    with pytest.raises(UsageError, match=rf"stages.{stage}.inputs names {before}, which is not before it in chain"):
        config.method_of(made)


def test_an_unknown_method_or_size() -> None:
    with pytest.raises(UsageError, match=r"unknown method 'two-fase'. Choose from .*two-phase"):
        config.compose("two-fase", "paper")
    with pytest.raises(UsageError, match=r"two-phase has no size 'large'. Choose from paper, small, tiny"):
        config.compose("two-phase", "large")


# --- what may be built -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    ["os.system", "torch.load", "builtins.eval", "subprocess.Popen", "kitseg.cli.main", "kitseg.cli.App",
     "kitseg.models.run_folder.RunFolder", "kitseg.config.build", "kitseg.volumes.nifti.Path",
     "torch.nn.modules.module.Module",
     "torch.nn.init.ones_", "torch.hub.load", "torch.optim.swa_utils.SWALR", "kitseg.nets.vnet.checkpoint",
     "kitseg.nets.VNet", "xkitseg.nets.vnet.VNet", "torch.nn.ReLU; os", "torch.nn.ReLU\n", "",
     "kitseg.nets.vnet.Tensor", "kitseg.stages.base.Callable", "kitseg.models.engines.OpenVino",
     "kitseg.patches.subjects.Path", "torchio.RandomFlip.__init__", "hydra.utils.instantiate"],
)  # fmt: skip
def test_targets_that_are_not_on_the_list(target: str) -> None:
    for spec in ({"_target_": target}, {"a": [{"b": {"_target_": target}}]}):
        with pytest.raises(UsageError, match="not a part that kitseg builds from"):
            config.build(spec)


@pytest.mark.parametrize(
    "spec",
    [
        {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "os.mkdir", "path": "MADE"}]},
        [{"_target_": "torch.nn.ReLU"}, {"_target_": "os.mkdir", "path": "MADE"}],
        {"_target_": "torch.nn.Identity", "x": "${oc.create:{_target_: os.mkdir, path: MADE}}"},
    ],
)
def test_nothing_runs_before_the_refusal(tmp_path: Path, spec: Any) -> None:
    made = tmp_path / "made"
    with pytest.raises(UsageError, match=r"os\.mkdir"):
        config.build(json.loads(json.dumps(spec).replace("MADE", str(made))))
    assert not made.exists()


@pytest.mark.parametrize("target", ["torch.nn.Nope", "kitseg.nets.vnet.Nope", "kitseg.nets.nope.Nope"])
def test_an_allowed_target_that_is_not_there(target: str) -> None:
    with pytest.raises(UsageError, match=target):
        config.build({"_target_": target})


def test_arguments_that_a_part_does_not_take() -> None:
    with pytest.raises(UsageError, match="colour"):
        config.build({"_target_": "torch.nn.ReLU", "colour": "red"})


def test_what_is_allowed_is_built() -> None:
    spec = {"_target_": "kitseg.nets.vnet.VNet", "width": 4, "down": [1, 1, 1, 1], "up": [1, 1, 1, 1]}
    with torch.device("meta"):
        net = config.build(spec, classes=2)
    assert isinstance(net, VNet)
    assert net.head[-1].out_channels == 2
    assert isinstance(config.build([{"_target_": "torch.nn.ReLU"}])[0], torch.nn.ReLU)


# --- a method's graph ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stages() -> Any:
    return method_of(composed("two-phase", "paper")).stages


def test_sources_and_heads(stages: Any) -> None:
    assert method.parse_source("fine.1.tumor", stages) == Source("fine", "1", "tumor")
    assert method.parse_source("fine.tumor", stages) == Source("fine", "2", "tumor")  # the last head
    assert method.parse_source("coarse.kidney", stages) == Source("coarse", "main", "kidney")
    assert method.stage_outputs("fine", stages)["tumor"] == Source("fine", "2", "tumor")
    assert method.stage_outputs("fine.1", stages)["tumor"] == Source("fine", "1", "tumor")
    assert list(method.stage_outputs("coarse", stages)) == ["background", "kidney", "tumor"]


@pytest.mark.parametrize(
    ("find", "text", "expected"),
    [
        (method.parse_source, "nope.kidney", "no stage 'nope'; there are coarse, fine"),
        (method.parse_source, "fine.3.kidney", "no head of fine '3'; there are 1, 2"),
        (method.parse_source, "fine.2.cyst", "no channel of fine 'cyst'; there are background, kidney, tumor"),
        (method.parse_source, "fine", "fine"),
        (method.parse_source, "fine.2.kidney.more", "fine.2.kidney.more"),
        (method.parse_source, "", "no stage ''"),
        (method.stage_outputs, "nope", "no stage 'nope'; there are coarse, fine"),
        (method.stage_outputs, "fine.2.kidney", "no head of fine '2.kidney'; there are 1, 2"),
    ],
)
def test_sources_and_heads_that_are_not_there(stages: Any, find: Any, text: str, expected: str) -> None:
    with pytest.raises(UsageError) as error:
        find(text, stages)
    assert expected in str(error.value)


# --- written and read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b"", b"a: [1", b"- 1\n", b"word", b"\x00", b"\xff\xfe\x00", b"x: !!python/name:os", b"a: &a [1]\nb: *a\n",
     b"x: !!python/object/apply:os.system [ls]", b"[" * 5000, b"a: 1\n" * 300_000, b"a: ${oc.env:HOME}\n",
     b"a: {_target_: os.system, command: ls}\n"],
)  # fmt: skip
def test_a_damaged_configuration(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        config.read(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_a_configuration_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be read"):
        config.read(tmp_path / "config.yaml")


def test_differences_by_hand() -> None:
    old = {"seed": 0, "net": {"width": 16, "patch": [1, 2]}, "gone": 1, "same": {"a": 1}, "size": {"a": 1}}
    new = {"seed": 0, "net": {"width": 8, "patch": [1, 3]}, "same": {"a": 1}, "new": {"b": 2}, "size": {"a": 2}}
    assert config.differences(old, new) == [
        "gone: 1 → None",
        "net.patch: [1, 2] → [1, 3]",
        "net.width: 16 → 8",
        "new: None → {'b': 2}",
    ]
    assert config.differences(old, old) == []
