"""Options of `kitseg train`: more epochs, weights to start from, the trainer's settings, a dry run, devices."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SMALLEST, Result, kitseg, once

from kitseg import config, trust
from kitseg.cli.app import choose_ranks
from kitseg.errors import UsageError
from kitseg.models.run_folder import Run
from kitseg.nets.vnet import VNet
from kitseg.runtime.device import Machine
from kitseg.splits import read_split
from kitseg.stages.model import build_model
from kitseg.training import cost
from kitseg.training.callbacks import MeanOfWeights
from kitseg.training.epochs import only_more_epochs
from kitseg.training.plan import Start
from kitseg.training.trainer import precision_on, settings_of
from kitseg.volumes.kits import labelled_cases

slow = pytest.mark.slow
QUICK = (
    *SMALLEST, "--stage=coarse", "--set=size.validate_every=1", "--set=size.coarse_samples=2", "--jobs=1",
    "--device=cpu",
)  # fmt: skip
COARSE = Path("two-phase-tiny/fold_0/coarse")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Path:
    """A working folder with the coarse stage trained for two epochs, and the same for four epochs in ``long``."""

    def make(folder: Path) -> None:
        (folder / "data").symlink_to(phantoms / "data")
        for runs, epochs in (("runs", 2), ("long", 4)):
            train(folder, f"--epochs={epochs}", f"--runs={runs}")

    return once(tmp_path_factory, "train-options", make)


def train(folder: Path, *options: str) -> Result:
    done = kitseg(folder, "train", *QUICK, *options)
    assert done.code == 0, done.text
    return done


def last(folder: Path, runs: str) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / runs / COARSE / "last.ckpt", weights_only=True)["state_dict"]
    return state


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def best(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The run's best checkpoint: its row in ``done.json``, and its weights."""
    row = json.loads((folder / "runs" / COARSE / "done.json").read_text())["checkpoints"][0]
    return row, torch.load(folder / "runs" / COARSE / row["file"], weights_only=True)["state_dict"]


# --- more epochs -----------------------------------------------------------------------------------------------------


@slow
def test_raised_epochs_give_what_so_many_epochs_give(work: Path) -> None:
    train(work, "--epochs=2", "--runs=raised")
    fewer = kitseg(work, "train", *QUICK, "--epochs=1", "--runs=raised")
    assert fewer.code == 2
    assert "epochs: 2 → 1" in fewer.text
    other = kitseg(work, "train", *QUICK, "--epochs=4", "--seed=7", "--runs=raised")
    assert other.code == 2
    assert "seed: 0 → 7" in other.text
    assert same(last(work, "raised"), last(work, "runs"))

    (scores := work / "raised/two-phase-tiny/validation/scores.json").parent.mkdir()
    scores.touch()
    again = train(work, "--epochs=4", "--runs=raised")
    assert "2 more epochs" in again.text
    assert [path.name for path in scores.parent.iterdir()] == ["scores.json.old-1"]
    assert same(last(work, "raised"), last(work, "long"))
    for name in ("history.csv", "done.json"):
        one, long = ((work / runs / COARSE / name).read_text() for runs in ("raised", "long"))
        assert one == long or name == "done.json"
    record = json.loads((work / "raised/two-phase-tiny/epochs.json").read_text())
    assert [(row["from"]["coarse"], row["to"]["coarse"]) for row in record["raised"]] == [(2, 4)]
    assert "trained already" in train(work, "--epochs=4", "--runs=raised").text


@slow
def test_epochs_of_a_training_that_an_earlier_version_finished(work: Path) -> None:
    """Its ``done.json`` states no epochs."""
    train(work, "--epochs=2", "--runs=old")
    done = work / "old" / COARSE / "done.json"
    content = json.loads(done.read_text())
    assert content.pop("epochs") == 2
    done.write_text(json.dumps(content))
    config_file = work / "old/two-phase-tiny/config.yaml"
    made = config.read(config_file)
    config_file.write_text(trust.dump({key: value for key, value in made.items() if key != "trainer"}))
    assert "trained already" in train(work, "--epochs=2", "--runs=old").text
    assert "2 more epochs" in train(work, "--epochs=4", "--runs=old").text
    assert same(last(work, "old"), last(work, "long"))


@pytest.mark.parametrize(
    ("change", "more"), [("size.epochs=9", True), ("size.epochs=9 seed=1", False), ("size.epochs=3", False)]
)
def test_more_epochs_where_a_schedule_ends_with_them(change: str, more: bool) -> None:
    old, new = (config.compose("resenc", "tiny", overrides) for overrides in (["size.epochs=5"], change.split()))
    assert old["stages"]["masses"]["module"]["scheduler"]["total_iters"] == 5
    assert only_more_epochs(old, new) is more


def test_a_setting_that_was_the_number_of_epochs_and_is_that_of_the_new_ones() -> None:
    steps = [config.compose("two-phase", "tiny", [f"size.decay_every={n}", f"size.epochs={n}"]) for n in (5, 9)]
    assert only_more_epochs(*steps)
    assert not only_more_epochs(steps[0], config.compose("two-phase", "tiny", ["size.decay_every=8", "size.epochs=9"]))


# --- the mean of the weights -----------------------------------------------------------------------------------------


def test_the_mean_of_the_weights_by_hand() -> None:
    net, mean = torch.nn.Linear(1, 1, bias=False), MeanOfWeights(0.5)
    trainer: Any = SimpleNamespace(global_step=0, global_rank=0)

    def after(step: int, weight: float) -> float:
        net.weight.data.fill_(weight)
        trainer.global_step = step
        mean.on_train_batch_end(trainer)
        return float(mean.mean[0])

    net.weight.data.fill_(8)
    mean.on_train_start(trainer, net)  # type: ignore[arg-type]
    found = [after(1, 0), after(1, 100), after(100, 4)]  # the second is a part of a batch, without a step
    first = 8 * 2 / 11
    assert found == pytest.approx([first, first, first / 2 + 2])
    mean.on_validation_start(trainer, net)  # type: ignore[arg-type]
    assert net.weight.item() == pytest.approx(first / 2 + 2)
    mean.on_train_epoch_end(trainer, net)  # type: ignore[arg-type]
    assert net.weight.item() == 4


@slow
def test_the_best_checkpoint_holds_the_mean_and_a_resumed_training_has_the_same(work: Path) -> None:
    ema = "--set=trainer.ema=0.9"
    for runs, epochs in (("mean", (2, 4)), ("mean-long", (4,))):
        for count in epochs:
            train(work, f"--epochs={count}", f"--runs={runs}", ema)
    states = [torch.load(work / runs / COARSE / "last.ckpt", weights_only=True) for runs in ("mean", "mean-long")]
    parts = [state["callbacks"]["MeanOfWeights"] for state in states]
    one, long = ([*part["parameters"], *part["buffers"][0]] for part in parts)
    assert all(torch.equal(a, b) for a, b in zip(one, long, strict=True))
    assert same(states[0]["state_dict"], states[1]["state_dict"])
    assert same(states[0]["state_dict"], last(work, "long"))  # training itself does not change
    (path,) = (work / "mean" / COARSE / "best").glob("0003-*")
    validated = torch.load(path, weights_only=True)["state_dict"]
    floats = [name for name, value in validated.items() if value.is_floating_point()]
    names = sorted(floats, key=lambda name: "running_" in name)  # parameters, then buffers
    assert all(torch.equal(validated[name], mean) for name, mean in zip(names, long, strict=True))
    assert not same(validated, states[0]["state_dict"])


# --- weights to start from -------------------------------------------------------------------------------------------

STILL = "--set=stages.coarse.module.optimizer.lr=0"  # so that the weights stay those that the training starts from


@slow
@pytest.mark.parametrize("source", ["runs/two-phase-tiny", "checkpoint"])
def test_a_training_starts_from_a_models_weights(work: Path, source: str) -> None:
    row, weights = best(work)
    runs, model = f"from-{Path(source).name}", source
    if source == "checkpoint":
        model = str(work / "runs" / COARSE / row["file"])
    done = train(work, "--epochs=1", STILL, f"--runs={runs}", f"--init-from={model}")
    assert same(last(work, runs), weights)
    assert f"coarse: {len(weights)} of {len(weights)} weights from" in done.text
    record = json.loads((work / runs / COARSE / "initial.json").read_text())
    assert (record["sha256"], record["taken"]) == (row["sha256"], len(weights))
    assert (record["fresh"], record["unused"]) == ({}, [])
    assert "trained already" in train(work, "--epochs=1", STILL, f"--runs={runs}").text
    other = kitseg(work, "train", *QUICK, "--epochs=1", STILL, f"--runs={runs}", "--init-from=long/two-phase-tiny")
    assert (other.code, "began with the weights of" in " ".join(other.text.split())) == (2, True), other.text


@slow
def test_what_does_not_fit_is_listed(work: Path) -> None:
    """A level with another number of convolutions: some weights have another shape, or are not there."""
    deeper = "--set=size.down_convs=[1,2,1,1]"
    done = train(work, "--epochs=1", STILL, deeper, "--runs=part", "--init-from=runs/two-phase-tiny")
    record = json.loads((work / "part" / COARSE / "initial.json").read_text())
    mine, theirs = last(work, "part"), best(work)[1]
    assert record["taken"] + len(record["fresh"]) == len(mine)
    assert record["fresh"]
    assert set(record["fresh"].values()) == {"not there"}
    assert "start fresh" in done.text
    assert next(iter(record["fresh"])) in " ".join(done.text.split())
    assert sum(torch.equal(mine[name], theirs[name]) for name in mine if name in theirs) == record["taken"]


@slow
def test_validation_cases_that_the_weights_have_seen(work: Path) -> None:
    done = train(work, "--epochs=1", "--fold=1", "--runs=other", "--init-from=runs/two-phase-tiny/fold_0")
    held_out = read_split(work / "splits.json").folds[1].val[0]
    assert "was trained on validation cases of fold 1" in done.text
    assert held_out in done.text


class Call:
    """What a hostile checkpoint holds."""

    def __reduce__(self) -> Any:
        return os.system, ("touch was-run",)


@slow
@pytest.mark.parametrize(
    ("model", "code", "words"),
    [("missing", 2, "missing"), ("hostile.ckpt", 1, "in it was run"), ("other.ckpt", 1, "no weights that match")],
)
def test_a_model_that_no_training_can_start_from(work: Path, model: str, code: int, words: str) -> None:
    torch.save({"state_dict": Call()}, work / "hostile.ckpt", pickle_module=pickle)
    torch.save({"state_dict": {"weight": torch.zeros(3)}}, work / "other.ckpt")
    refused = kitseg(work, "train", *QUICK, "--runs=refused", f"--init-from={model}")
    assert (refused.code, words in " ".join(refused.text.split())) == (code, True), refused.text
    assert not (work / "was-run").exists()
    assert not (work / "refused" / COARSE / "last.ckpt").exists()


# --- the trainer -----------------------------------------------------------------------------------------------------


@slow
def test_the_trainers_settings_reach_lightning(work: Path) -> None:
    """With eps=1, Adam moves in a step by no more than the rate times the norm of the clipped gradients."""
    options = (
        "--set=trainer.logger=csv", "--set=trainer.gradient_clip=1e-3",
        "--set=trainer.callbacks=[{_target_: pytorch_lightning.callbacks.LearningRateMonitor}]",
        "--set=stages.coarse.module.optimizer.lr=0.5", "--set=stages.coarse.module.optimizer.eps=1.0",
    )  # fmt: skip
    train(work, "--epochs=1", *options, "--runs=clipped", "--init-from=runs/two-phase-tiny")
    before, after, steps = best(work)[1], last(work, "clipped"), 10
    moved = torch.stack([(after[name] - before[name]).double().norm() for name in before]).norm()
    assert 0 < moved <= 0.5 * 1e-3 * steps * 1.001
    [metrics] = (work / "clipped" / COARSE / "csv").rglob("metrics.csv")
    header = metrics.read_text().splitlines()[0]
    assert "train/loss" in header
    assert "lr-Adam" in header
    assert not (work / "clipped" / COARSE / "tensorboard").exists()


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"logger": "paper"}, "trainer.logger is 'paper'; it must be one of tensorboard, csv, wandb, mlflow"),
        ({"gradient_clip": -1}, "trainer.gradient_clip is -1"),
        ({"ema": 1}, "trainer.ema is 1"),
        ({"callbacks": [{"_target_": "torch.nn.ReLU"}]}, "trainer.callbacks holds a ReLU"),
    ],
)
def test_settings_that_can_not_be_used(block: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as refused:
        settings_of({"trainer": block})
    assert words in str(refused.value)


@pytest.mark.parametrize("stated", ["32-true", "64-true", "bf16-true"])
def test_a_precision_that_is_not_mixed_is_the_same_on_every_device(stated: str) -> None:
    assert {precision_on(accelerator, stated) for accelerator in ("cpu", "mps", "cuda")} == {stated}
    assert {precision_on("cpu", mixed) for mixed in ("bf16-mixed", "16-mixed")} <= {"bf16-mixed", "32-true"}


@pytest.mark.parametrize(("short", "full"), [("32", "32-true"), ("16", "16-mixed"), ("bf16", "bf16-mixed")])
def test_short_names_of_precisions_mean_the_full_ones(short: str, full: str) -> None:
    made = config.compose("two-phase", "tiny", [f"stages.fine.precision={short}"])
    assert config.method_of(made).stages["fine"].precision == full


@pytest.mark.parametrize(
    ("capability", "size", "noted"), [((7, 5), "paper", True), ((8, 0), "paper", False), ((7, 5), "small", False)]
)
def test_a_gpu_without_bfloat16_is_named(
    capability: tuple[int, int], size: str, noted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = config.method_of(config.compose("two-phase", size))
    assert cost.slow_precision(method, Machine("cpu")) == []
    for name, value in {
        "is_available": True,
        "get_device_capability": capability,
        "get_device_name": "Tesla T4",
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    notes = cost.slow_precision(method, Machine("cuda"))
    assert bool(notes) is noted
    assert all("Tesla T4 is slow in bfloat16 (coarse, fine): train with --set" in note for note in notes)


# --- a dry run -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("stages.fine.module.optimizer.lr=-1", "stage fine: one training step"),
        ("stages.coarse.module.net.classes=2", "stage coarse: one training step"),
        ("stages.fine.module.loss._target_=kitseg.losses.cross_entropy.CrossEntropi", "CrossEntropi"),
        ("stages.fine.precision=fp16", "stages.fine.precision is 'fp16'; it must be one of 32-true, bf16-mixed"),
        ("stages.fine.inputs=[coarse,coarse]", "stages.fine.inputs names several stages, but a stage builds on one"),
    ],
)
def test_a_dry_run_finds_what_would_fail_later(phantoms: Path, tmp_path: Path, change: str, words: str) -> None:
    (tmp_path / "data").symlink_to(phantoms / "data")
    options = [option for option in QUICK if option != "--stage=coarse"]
    refused = kitseg(tmp_path, "train", *options, "--dry-run", f"--set={change}")
    assert refused.code == 2
    assert words in " ".join(refused.text.split())
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.skipif(torch.cuda.device_count() >= 4, reason="there are so many GPUs here")
def test_a_dry_run_plans_for_gpus_that_are_elsewhere(phantoms: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(phantoms / "data")
    options = [option for option in QUICK if option != "--device=cpu"]
    shown = kitseg(tmp_path, "train", *options, "--gpus=4", "--dry-run")
    assert shown.code == 0, shown.text
    assert "4 × GPU" in shown.text
    assert "coarse: one training step works" in shown.text
    assert kitseg(tmp_path, "train", *options, "--gpus=4").code == 2


@slow
def test_loading_that_takes_longer_than_computing_is_stated(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config.compose("two-phase", "tiny", [option.removeprefix("--set=") for option in SMALLEST[2:]])
    start = Start(made, Run(work / "none"), 0, work / "splits.json", work / "preprocessed", Machine("cpu"))
    cases = labelled_cases([work / "data"])
    plan = start.rehearse(cases)
    assert cost.seconds_to_load(plan.method.stages["coarse"], next((work / "preprocessed/6mm-6.25mm").glob("case_*")))
    for seconds, workers, noted in ((0.0, 0, False), (3600.0, 0, True), (3600.0, 10**9, False)):
        monkeypatch.setattr(cost, "seconds_to_load", lambda spec, folder, seconds=seconds: seconds)
        _, notes = cost.estimates(replace(plan, machine=Machine("cpu", workers=workers)), cases[0], "coarse")
        assert any("loading patches takes" in note for note in notes) == noted


@pytest.mark.parametrize(("checkpointing", "gigabytes"), [(True, 10.4), (False, 25.6)])
def test_the_estimated_memory_includes_what_checkpointing_computes_again(checkpointing: bool, gigabytes: float) -> None:
    """Of two-phase's phase 2 in float32, beside 2.1 GB of weights; half of it is 7.3 and 14.9 GB in all in bfloat16."""
    made = config.compose("two-phase", "paper", [f"size.checkpointing={str(checkpointing).lower()}"])
    with torch.device("meta"):
        model, x = build_model(config.method_of(made).stages["fine"]).train(), torch.empty(1, 1, 80, 240, 384)
    assert cost.peak_bytes(model, x) / 1e9 == pytest.approx(gigabytes, abs=0.2)
    assert not config.compose("two-phase", "paper")["size"]["checkpointing"]


# --- the way to the network ------------------------------------------------------------------------------------------


class Reached(Exception):
    """Raised where the trip ends."""


@slow
def test_the_trip_from_the_command_line_to_the_network_is_short(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kitseg's own frames in a training step: main, train, fit, training_step, losses, logits, forward."""
    forward = VNet.forward

    def reached(self: VNet, x: torch.Tensor, *more: Any) -> Any:
        if x.device.type == "meta":  # the estimate's
            return forward(self, x, *more)
        raise Reached

    monkeypatch.setattr(VNet, "forward", reached)
    with pytest.raises(Reached) as caught:
        kitseg(work, "train", *QUICK, "--runs=trip")
    own = Path(config.__file__).parent
    frames = [entry.name for entry in caught.traceback if own in Path(entry.path).parents]
    assert frames[0] == "main"
    assert "training_step" in frames
    assert len(frames) + 1 <= 9, [*frames, "forward"]


# --- devices ---------------------------------------------------------------------------------------------------------


def test_devices_and_loader_processes_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_ranks(None, 1, "auto") == ("auto", 1)
    assert choose_ranks(0, 1, "auto") == ("cpu", 1)
    assert choose_ranks(0, 3, "auto") == ("cpu", 3)
    assert choose_ranks(4, 1, "auto") == ("cuda", 4)
    with pytest.raises(UsageError, match="--gpus 0"):
        choose_ranks(0, 1, "cuda")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    assert Machine("cpu").loaders == 0
    assert Machine("cuda").loaders == 8
    assert Machine("cuda", ranks=4).loaders == 3
    assert Machine("cuda", workers=5).loaders == 5
    assert Machine("cpu", workers=2).loaders == 2
