"""OpenVINO and kitseg's kernels compute what PyTorch does; skipped where they aren't installed."""

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
from kitseg.models.engines import Compiling, Engine, OpenVino, Torch, Winograd, has_kernels, has_openvino
from kitseg.models.stage import FASTER_WITH_KERNELS, build_input_transform, choose_engine, open_stage
from kitseg.models.weights import Checkpoint
from kitseg.stages.model import StageModel, build_model

STAGES = [(name, stage) for name in METHODS for stage in config.compose(name, "tiny")["chain"]]
CPU = torch.device("cpu")
installed = pytest.mark.skipif(not has_openvino(), reason="OpenVINO is not installed")
compiled = pytest.mark.skipif(not has_kernels(), reason="the kernels are not compiled")
both = pytest.mark.parametrize(
    "make", [pytest.param(OpenVino, marks=installed), pytest.param(Winograd, marks=compiled)]
)


@cache
def spec_of(method: str, stage: str) -> StageSpec:
    return config.method_of(config.compose(method, "tiny")).stages[stage]


def stage_of(spec: StageSpec, seed: int = 0) -> StageModel:
    torch.manual_seed(seed)
    return build_model(spec).eval().requires_grad_(False)


def region(spec: StageSpec, *shape: int) -> Tensor:
    """Noise as a network's input; where it takes a mask as its last channel, half of it."""
    channels = build_input_transform(spec).channels
    x = torch.randn(2, channels, *shape, generator=torch.Generator().manual_seed(1))
    if channels > 1:
        x[:, -1] = (x[:, -1] > 0).float()
    return x


@dataclass
class Weights:
    """A stage that is never without its weights."""

    name: str
    module: StageModel
    once: bool = False

    def load(self) -> StageModel:
        return self.module

    def drop(self) -> None:
        pass


def see(engine: Engine, module: StageModel, x: Tensor, head: int = -1, name: str = "") -> Tensor:
    with torch.inference_mode():
        return engine(Weights(name, module), head)(x)


@both
@pytest.mark.parametrize(("method", "stage"), STAGES)
def test_every_network_gives_the_same_labels(
    method: str, stage: str, make: type[Compiling], capsys: pytest.CaptureFixture[str]
) -> None:
    """At shapes other than the traced one: the sizes inside a network follow its input."""
    spec = spec_of(method, stage)
    module, engine = stage_of(spec), make()
    slices = spec.grid.pixels is not None and stage != "foreground"
    x = region(spec, *(1, 64, 96) if slices else (32, 48, 64))
    for head in {0, len(spec.heads) - 1}:
        found, expected = see(engine, module, x, head), see(Torch(), module, x, head)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
        assert (found.argmax(1) == expected.argmax(1)).double().mean() >= 0.9999
    assert "PyTorch computes a network" not in capsys.readouterr().out


@both
def test_other_weights_are_noticed(make: type[Compiling]) -> None:
    spec, engine = spec_of("dual-unet", "kidneys"), make()
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


@compiled
def test_the_kernels_need_no_weights_of_pytorchs(tmp_path: Path) -> None:
    """Compiled once for windows of any shape; the weights in memory are the kernels' own."""
    spec, engine = spec_of("two-phase", "fine"), Winograd()
    module, x, larger = stage_of(spec), region(spec, 16, 16, 32), region(spec, 32, 16, 16)
    expected = see(Torch(), module, larger)
    path = tmp_path / "weights.ckpt"
    torch.save({"state_dict": module.state_dict()}, path)
    with torch.inference_mode():
        look = engine(Checkpoint(path, module), 1)
        look(x)
        assert module.device.type == "meta"
        first = engine._compiled
        torch.testing.assert_close(look(larger), expected, rtol=0, atol=1e-3)
        assert engine._compiled is first


class Odd(torch.nn.Module):
    """What no method's network has: sums of other shapes, inputs changed in place, a convolution used twice."""

    def __init__(self) -> None:
        super().__init__()
        nn = torch.nn
        self.start, self.one = nn.Conv3d(1, 6, 3, padding="same"), nn.Conv3d(6, 1, 1)
        self.twice, self.groups = nn.Conv3d(6, 6, 3, padding=1), nn.Conv3d(6, 6, 3, padding=1, groups=2)
        self.coarse, self.drop = nn.Conv3d(6, 6, 3, stride=2, padding=1), nn.Dropout3d(0.5)
        self.norm, self.batch, self.act = nn.InstanceNorm3d(6), nn.BatchNorm3d(6), nn.ReLU(inplace=True)
        self.prelu, self.head = nn.PReLU(), nn.Conv3d(6, 2, 3, padding=1, padding_mode="replicate")

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        y = self.twice(x)
        x = self.act(x)
        y = y + x
        y = self.prelu(self.one(y) + self.batch(y))
        y = self.norm(self.twice(self.drop(y))) + self.one(y)
        y = y + self.coarse(y).mean((2, 3, 4), keepdim=True) + self.groups(y)
        found: Tensor = self.head(self.norm(y) + 1)
        return found


@compiled
def test_operations_that_no_method_has() -> None:
    torch.manual_seed(0)
    module, x = StageModel(Odd(), ("background", "kidney")).eval(), torch.randn(1, 1, 9, 10, 11)
    before = x.clone()
    torch.testing.assert_close(see(Winograd(), module, x, 0), see(Torch(), module, x, 0), rtol=0, atol=1e-4)
    assert torch.equal(x, before)


class Looks(torch.nn.Module):
    """A network that can't be traced: it looks at its values."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv3d(1, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.convolution(x)
        return found if found.mean() > 0 else -found


@compiled
def test_pytorch_computes_what_the_kernels_cannot(capsys: pytest.CaptureFixture[str]) -> None:
    module, x, engine = StageModel(Looks(), ("background", "kidney")).eval(), torch.randn(1, 1, 4, 5, 6), Winograd()
    assert torch.equal(see(engine, module, x, 0), see(Torch(), module, x, 0))
    see(engine, module, x, 0, "another")
    assert capsys.readouterr().out.count("PyTorch computes a network") == 1
    assert str(engine) == "PyTorch, float32"


class Attends(torch.nn.Module):
    """A network that can be traced, but whose memory can't be planned."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv3d(1, 4, 3, padding=1)
        self.attention = torch.nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = torch.nn.Conv3d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolution(x)
        flat = y.flatten(2).transpose(1, 2)
        flat = self.attention(flat, flat, flat)[0]
        found: Tensor = self.head(flat.transpose(1, 2).reshape(y.shape))
        return found


@compiled
def test_pytorch_computes_what_can_not_be_planned(capsys: pytest.CaptureFixture[str]) -> None:
    module, x, engine = StageModel(Attends(), ("background", "kidney")).eval(), torch.randn(1, 1, 4, 5, 6), Winograd()
    torch.testing.assert_close(see(engine, module, x, 0), see(Torch(), module, x, 0))
    assert capsys.readouterr().out.count("PyTorch computes a network") == 1
    assert str(engine) == "PyTorch, float32"


@compiled
def test_layers_without_a_kernel_are_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    net = torch.nn.Sequential(
        torch.nn.Conv3d(1, 2, 3, padding=1), torch.nn.Conv3d(2, 2, 3, dilation=2), torch.nn.Tanh()
    )
    module, x, engine = StageModel(net, ("background", "kidney")).eval(), torch.randn(1, 1, 8, 8, 8), Winograd()
    assert str(engine).startswith("Winograd with")
    for name in ("one", "another"):
        see(engine, module, x, 0, name)
    said = "PyTorch computes layers that --engine winograd has no kernel for: Conv3d, Tanh"
    assert capsys.readouterr().out.splitlines() == [said]
    assert str(engine).startswith("Winograd with")


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
    cuda = torch.device("cuda")
    assert choose_engine("auto", cuda, "auto", replace(spec, precision="16-mixed")) == Torch(torch.float16)
    assert choose_engine("auto", cuda, "f32", spec) == Torch()


@pytest.mark.parametrize(("floats", "first"), [(16, Winograd), (8, None), (0, None)])
def test_auto_takes_the_kernels_where_they_were_measured_to_be_faster(
    monkeypatch: pytest.MonkeyPatch, floats: int, first: type[Engine] | None
) -> None:
    monkeypatch.setattr("kitseg.models.stage.lanes", lambda: floats)
    spec, other = spec_of("dual-unet", "kidneys"), OpenVino if has_openvino() else Torch
    for precision in ("auto", "f32"):
        assert isinstance(choose_engine("auto", CPU, precision, spec), first or other)
    assert isinstance(choose_engine("auto", CPU, "bf16", spec), other)
    module = {**spec.parts["module"], "net": {"_target_": "mine.Net"}}
    own = replace(spec, parts={**spec.parts, "module": module})
    assert isinstance(choose_engine("auto", CPU, "auto", own), other)


def test_auto_knows_the_networks_that_were_measured() -> None:
    nets = {spec_of(method, stage).parts["module"]["net"]["_target_"] for method, stage in STAGES}
    assert nets == FASTER_WITH_KERNELS[16]
    assert nets > FASTER_WITH_KERNELS[8]


@pytest.mark.parametrize(
    ("name", "device", "precision", "problem"),
    [
        ("onnx", "cpu", "auto", "unknown engine 'onnx'"),
        ("torch", "cpu", "int8", "unknown precision 'int8'"),
        ("openvino", "cuda", "auto", "--device cpu"),
        ("winograd", "cuda", "auto", "--device cpu"),
        ("winograd", "cpu", "bf16", "--precision bf16"),
    ],
)
def test_engines_that_are_not_there(name: str, device: str, precision: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        choose_engine(name, torch.device(device), precision, spec_of("dual-unet", "kidneys"))


def test_missing_openvino_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kitseg.models.stage.has_openvino", lambda: False)
    monkeypatch.setattr("kitseg.errors.find_spec", lambda name: None)
    monkeypatch.setattr("kitseg.models.stage.lanes", lambda: 0)
    spec = spec_of("dual-unet", "kidneys")
    with pytest.raises(UsageError, match="pip install"):
        choose_engine("openvino", CPU, "auto", spec)
    assert choose_engine("auto", CPU, "auto", spec) == Torch()


def test_missing_kernels_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kitseg.models.stage.has_kernels", lambda: False)
    with pytest.raises(UsageError, match="GCC"):
        choose_engine("winograd", CPU, "auto", spec_of("dual-unet", "kidneys"))


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
