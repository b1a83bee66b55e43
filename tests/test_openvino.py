"""OpenVINO computes what PyTorch does; skipped where it isn't installed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from method_runs import METHODS
from torch import Tensor

from kitseg import config
from kitseg.config import StageSpec
from kitseg.errors import UsageError
from kitseg.inference.windows import Slices
from kitseg.models.engines import Engine, OpenVino, Torch, has_openvino
from kitseg.models.stage import build_input_transform, choose_engine, open_stage
from kitseg.models.weights import Checkpoint
from kitseg.stages.model import StageModel, build_model

STAGES = [(name, stage) for name in METHODS for stage in config.compose(name, "tiny")["chain"]]
CPU = torch.device("cpu")
installed = pytest.mark.skipif(not has_openvino(), reason="OpenVINO is not installed")


@cache
def spec_of(method: str, stage: str) -> StageSpec:
    return config.method_of(config.compose(method, "tiny")).stages[stage]


def stage_of(spec: StageSpec, seed: int = 0) -> StageModel:
    torch.manual_seed(seed)
    return build_model(spec).eval().requires_grad_(False)


def region(spec: StageSpec, *shape: int) -> Tensor:
    """Noise as a network's input; where it takes a mask as its last channel, half of it."""
    link = build_input_transform(spec).link
    channels = 1 if link is None else link.channels
    x = torch.randn(2, channels, *shape, generator=torch.Generator().manual_seed(1))
    if channels > 1:
        x[:, -1] = (x[:, -1] > 0).float()
    return x


@dataclass
class Weights:
    """A stage that is never without its weights."""

    name: str
    module: StageModel

    def load(self) -> StageModel:
        return self.module

    def drop(self) -> None:
        pass


def see(engine: Engine, module: StageModel, x: Tensor, head: int = -1, name: str = "") -> Tensor:
    with torch.inference_mode():
        return engine(Weights(name, module), head)(x)


@installed
@pytest.mark.parametrize(("method", "stage"), STAGES)
def test_every_network_gives_the_same_labels(method: str, stage: str) -> None:
    """At shapes other than the traced one: the sizes inside a network follow its input."""
    spec = spec_of(method, stage)
    module, engine = stage_of(spec), OpenVino()
    slices = spec.grid.pixels is not None and stage != "foreground"
    x = region(spec, *(1, 64, 96) if slices else (32, 48, 64))
    for head in {0, len(spec.heads) - 1}:
        found, expected = see(engine, module, x, head), see(Torch(), module, x, head)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
        assert (found.argmax(1) == expected.argmax(1)).double().mean() >= 0.9999


@installed
def test_other_weights_are_noticed() -> None:
    spec, engine = spec_of("dual-unet", "kidneys"), OpenVino()
    module, x = stage_of(spec, 0), region(spec, 1, 32, 32)
    first, other = see(engine, module, x), stage_of(spec, 1)
    module.load_state_dict(other.state_dict())
    found = see(engine, module, x, name="other")
    torch.testing.assert_close(found, see(Torch(), other, x), rtol=0, atol=1e-4)
    assert not torch.allclose(first, found, atol=1e-2)


@installed
def test_weights_are_in_memory_once(tmp_path: Path) -> None:
    """Compiled for two windows of a shape and once more for another; the network gives its own weights back."""
    spec, engine = spec_of("dual-unet", "kidneys"), OpenVino()
    module, x, larger = stage_of(spec), region(spec, 1, 32, 32), region(spec, 1, 64, 32)
    expected = see(Torch(), module, larger)
    path = tmp_path / "weights.ckpt"
    torch.save({"state_dict": module.state_dict()}, path)
    weights = Checkpoint(path, module)
    with torch.inference_mode():
        look = engine(weights, 0)
        look(x)
        assert module.device.type == "meta"
        first = engine._compiled
        look(x)
        assert engine._compiled is first
        torch.testing.assert_close(look(larger), expected, rtol=0, atol=1e-4)
        assert module.device.type == "meta"
        torch.testing.assert_close(Torch()(weights, 0)(larger), expected)
    assert module.device == CPU


@pytest.mark.parametrize("engine", [Torch, pytest.param(OpenVino, marks=installed)])
def test_bfloat16_is_close_but_coarser(engine: type[Torch] | type[OpenVino]) -> None:
    spec = spec_of("two-stage", "segment")
    module, x = stage_of(spec), region(spec, 1, 64, 64)
    exact, found = see(Torch(), module, x), see(engine(torch.bfloat16), module, x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0, atol=0.06)


def test_on_a_cpu_slices_go_one_by_one() -> None:
    spec = spec_of("two-stage", "segment")
    assert open_stage(spec, CPU).window == Slices(batch=1)
    assert open_stage(spec, torch.device("meta")).window != Slices(batch=1)


def test_engines_by_name() -> None:
    spec = spec_of("dual-unet", "kidneys")
    assert choose_engine("torch", CPU, "auto", spec) == Torch()
    assert choose_engine("torch", CPU, "bf16", spec) == Torch(torch.bfloat16)
    assert isinstance(choose_engine("auto", CPU, "f32", spec), OpenVino if has_openvino() else Torch)
    cuda = torch.device("cuda")
    assert choose_engine("auto", cuda, "auto", replace(spec, precision="16-mixed")) == Torch(torch.float16)
    assert choose_engine("auto", cuda, "f32", spec) == Torch()


@pytest.mark.parametrize(
    ("name", "device", "precision", "problem"),
    [
        ("onnx", "cpu", "auto", "unknown engine 'onnx'"),
        ("torch", "cpu", "int8", "unknown precision 'int8'"),
        ("openvino", "cuda", "auto", "--device cpu"),
    ],
)
def test_engines_that_are_not_there(name: str, device: str, precision: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        choose_engine(name, torch.device(device), precision, spec_of("dual-unet", "kidneys"))


def test_missing_openvino_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kitseg.models.stage.has_openvino", lambda: False)
    spec = spec_of("dual-unet", "kidneys")
    with pytest.raises(UsageError, match="pip install"):
        choose_engine("openvino", CPU, "auto", spec)
    assert choose_engine("auto", CPU, "auto", spec) == Torch()


@pytest.mark.parametrize(("method", "stage"), STAGES)
def test_an_empty_stage_holds_what_is_loaded(method: str, stage: str) -> None:
    """Nothing of a network is left without a value: every buffer is in the checkpoint."""
    spec = spec_of(method, stage)
    module, trained = open_stage(spec, CPU).model, stage_of(spec)
    module.load_state_dict(trained.state_dict())
    kept = dict(trained.state_dict())
    assert {name for name, _ in [*module.named_parameters(), *module.named_buffers()]} == set(kept)
    for name, value in module.state_dict().items():
        assert np.array_equal(value.numpy(), kept[name].numpy())
    assert module.device == CPU


@installed
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc on this system")
def test_a_network_that_is_not_used_any_more_leaves_memory() -> None:
    engine, module = OpenVino(), stage_of(spec_of("two-phase", "fine"))
    x, sizes = region(spec_of("two-phase", "fine"), 32, 32, 32), []
    for number in range(9):
        see(engine, module, x, name=f"checkpoint {number}")
        sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6)
    assert sizes[-1] - sizes[2] < 50, f"{np.round(sizes)} MB"
