"""The kernels in C++ compute what PyTorch does in float64; skipped where they were not compiled.

``nox -s wheel`` fails where there is a compiler and the wheel lacks them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kitseg.native import library
from kitseg.native.arena import Arena
from kitseg.native.compiled import compile_network
from kitseg.native.layers import Layer, kinds_of, memory_needs
from kitseg.native.pointwise import affine, moments
from kitseg.native.product import Product, is_product
from kitseg.native.winograd import F43, F45, F63, F65, KINDS, Convolution, Kind, cheapest

pytestmark = pytest.mark.skipif(library.library() is None, reason="the kernels are not compiled: pip install -e .")
each_kind = pytest.mark.parametrize("kind", KINDS, ids=["F43", "F45", "F25", "F43_2D", "F23", "F63", "F65", "F63_2D"])
SHAPES = [  # images, channels in and out, D, H, W
    (1, 1, 1, (1, 1, 1)),
    (1, 1, 16, (5, 7, 9)),
    (1, 3, 5, (2, 13, 3)),
    (1, 17, 33, (1, 3, 13)),
    (1, 40, 70, (9, 10, 11)),
    (1, 130, 200, (3, 5, 4)),
    (2, 8, 8, (6, 7, 8)),
    (1, 16, 32, (8, 8, 40)),
]


CPU = torch.device("cpu")


def sets() -> list[int]:
    """The instruction sets of this CPU, by the floats of a vector."""
    return [lanes for lanes in (16, 8) if lanes <= library.lanes()] or [0]


@pytest.fixture(autouse=True, params=sets(), ids=lambda lanes: library.WIDTHS.get(lanes, "none"))
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "lanes", lambda: request.param)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kernel(kind: Kind, inputs: int, outputs: int) -> Tensor:
    taps = kind.size[0] * kind.size[1] * kind.size[2]
    return noise(outputs, inputs, *kind.size, seed=1) / (inputs * taps) ** 0.5


def exact(x: Tensor, weight: Tensor, bias: Tensor | None = None, replicate: bool = False) -> Tensor:
    edges = [edge for n in reversed(weight.shape[2:]) for edge in (n // 2, n // 2)]
    padded = functional.pad(x.double(), edges, mode="replicate" if replicate else "constant")
    return functional.conv3d(padded, weight.double(), None if bias is None else bias.double())


def error(kind: Kind) -> float:
    """What an output may differ from the exact one, in its deviation."""
    return {F65: 5e-3, F45: 5e-4, F63: 5e-4}.get(kind, 2e-4)


def leaky(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x > 0, x, x * slope[:, None, None, None])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_kind
def test_convolution_is_pytorchs(kind: Kind, shape: tuple[int, int, int, tuple[int, ...]]) -> None:
    images, inputs, outputs, size = shape
    x, weight = noise(images, inputs, *size), kernel(kind, inputs, outputs)
    bias, slope = noise(outputs, seed=2), noise(outputs, seed=3).abs()
    for replicate in (False, True):
        expected = leaky(exact(x, weight, bias, replicate), slope)
        found = Convolution(weight, (kind,), bias, slope, replicate)(x, Arena())
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=error(kind))


def test_the_kind_with_the_fewest_multiplications_is_used() -> None:
    """Tiles of 6 voxels, where they cover a shape as well as those of 4; weights follow a change of shape."""
    layer = Convolution(kernel(F43, 3, 5), (F43, F63))
    shapes = {(4, 8, 8): F43, (6, 12, 12): F63, (7, 7, 7): F43, (33, 40, 35): F63}
    for shape, kind in shapes.items():
        x = noise(1, 3, *shape)
        assert cheapest(layer.kinds, shape) == kind
        torch.testing.assert_close(layer(x, Arena()).double(), exact(x, kernel(F43, 3, 5)), rtol=0, atol=5e-4)
    assert kinds_of(nn.Conv3d(64, 64, 5, padding=2)) == (F45, F65)
    assert kinds_of(nn.Conv3d(128, 128, 5, padding=2)) == (F45,)  # F(6, 5) would keep 66 MB


def test_the_memory_of_weights_is_that_of_the_kinds() -> None:
    """Where there is a choice, with the original weights."""
    one, two = nn.Conv3d(128, 128, 5, padding=2, bias=False), nn.Conv3d(32, 32, 5, padding=2, bias=False)
    assert memory_needs(one)[0] == 4 * 512 * 128 * 128
    assert memory_needs(two)[0] == 4 * (1000 + 125) * 32 * 32


def test_results_that_are_larger_than_the_caches() -> None:
    x, weight, slope = noise(1, 1, 64, 64, 64), kernel(F43, 1, 16), noise(16, seed=3).abs()
    found = Convolution(weight, (F43,), None, slope)(x, Arena())
    torch.testing.assert_close(found.double(), leaky(exact(x, weight), slope), rtol=0, atol=5e-4)
    up = nn.ConvTranspose3d(1, 16, 2, 2).requires_grad_(False)
    torch.testing.assert_close(Product(up)(x, Arena()), up(x))


PRODUCTS = [
    (nn.Conv3d, 3, 5, {"kernel_size": 3, "stride": 2, "padding": 1}),
    (nn.Conv3d, 16, 40, {"kernel_size": 2, "stride": 2}),
    (nn.Conv3d, 20, 17, {"kernel_size": (3, 1, 5), "stride": (1, 2, 3), "padding": (2, 0, 1)}),
    (nn.Conv3d, 3, 3, {"kernel_size": 1, "bias": False}),
    (nn.Conv3d, 130, 70, {"kernel_size": (1, 3, 3), "stride": (1, 2, 2), "padding": (0, 1, 1)}),
    (nn.Conv3d, 4, 6, {"kernel_size": (7, 1, 1), "padding": "same"}),
    (nn.Conv2d, 2, 64, {"kernel_size": 7, "stride": 2, "padding": 3}),
    (nn.ConvTranspose3d, 40, 16, {"kernel_size": 2, "stride": 2}),
    (nn.ConvTranspose3d, 5, 35, {"kernel_size": (1, 3, 2), "stride": (1, 3, 2)}),
    (nn.ConvTranspose2d, 7, 3, {"kernel_size": 2, "stride": 2, "bias": False}),
]


@pytest.mark.parametrize(("kind", "inputs", "outputs", "how"), PRODUCTS, ids=str)
def test_products_are_pytorchs(kind: Any, inputs: int, outputs: int, how: dict[str, Any]) -> None:
    """Alone with an activation, of several images; and with an instance norm, which takes the kernel's moments."""
    module = kind(inputs, outputs, **how).requires_grad_(False)
    x = noise(2, inputs, *(5, 13, 38)[-2 if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) else -3 :])
    norm = nn.InstanceNorm2d(outputs) if x.dim() == 4 else nn.InstanceNorm3d(outputs)
    assert is_product(module)
    for follows in (None, norm):
        found = Layer(module.float(), follows, nn.LeakyReLU(), None, Arena())(x)
        plain = module.double()(x.double())
        expected = functional.leaky_relu(plain if follows is None else follows(plain))
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)


def test_what_products_are_not() -> None:
    for module in (
        nn.Conv3d(4, 4, 3, stride=2, dilation=2),
        nn.Conv3d(4, 4, 2, stride=2, groups=2),
        nn.Conv3d(4, 4, 2, stride=2, padding=1, padding_mode="replicate"),
        nn.Conv3d(4, 4, 2, padding="same"),
        nn.ConvTranspose3d(4, 4, 3, stride=2),
        nn.ConvTranspose3d(4, 4, 2, stride=2, output_padding=1),
    ):
        assert not is_product(module)


@each_kind
def test_two_parts_of_a_tensor(kind: Kind) -> None:
    """Read where they are if the first part fills vectors; else from a copy of both."""
    weight, bias, residual = kernel(kind, 23, 6), noise(6, seed=3), noise(1, 23, 5, 9, 10, seed=4)
    for first in (16, 7):
        parts = noise(1, first, 5, 9, 10), noise(1, 23 - first, 5, 9, 10, seed=1)
        found = Convolution(weight, (kind,), bias)(parts, Arena())
        torch.testing.assert_close(found.double(), exact(torch.cat(parts, 1), weight, bias), rtol=0, atol=error(kind))
        added = affine(residual.clone(), torch.ones(23), torch.zeros(23), None, parts)
        torch.testing.assert_close(added, residual + torch.cat(parts, 1))
    with pytest.raises(ValueError, match="differ in their channels only"):
        Convolution(weight, (kind,), bias)((noise(1, 16, 5, 9, 10), noise(1, 7, 5, 9, 9)), Arena())


def test_results_share_memory_once_they_are_not_used() -> None:
    """A chain of results needs room for two."""
    arena, shape = Arena(), (1, 2, 1, 32, 32)

    def run(device: torch.device) -> list[int]:
        last = arena.empty(shape, device)
        places = [last.data_ptr()]
        for _ in range(3):
            new = arena.empty(shape, device)
            last = new
            places.append(last.data_ptr())
        return places

    arena.watch()
    run(torch.device("meta"))
    assert arena.plan() == 2 * 4 * 2048
    arena.start()
    first, second, third, fourth = run(CPU)
    assert (first, second) == (third, fourth)
    assert abs(second - first) == 4 * 2048


@pytest.mark.parametrize("used_later", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_result_may_replace_a_part_of_a_concatenation(used_later: bool, threads: int) -> None:
    class Joins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Conv3d(n, 16, 3, padding=1) for n in (1, 16))
            self.joined = nn.Conv3d(32, 16, 3, padding=1)

        def logits(self, x: Tensor) -> tuple[Tensor, ...]:
            one = self.first(x)
            two = self.second(one)
            three = self.joined(torch.cat([two, one], 1))
            return (three * one * two if used_later else three,)

    model, x = Joins().eval().requires_grad_(False), noise(1, 1, 50, 21, 26)
    network, before = compile_network(model, "logits", 0), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            found = network(x)
            expected = model.double().logits(x.double())[0]
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-4)
    planned = network._arena._memory.numel() / (16 * x.numel())  # type: ignore[attr-defined]
    assert (2.9 < planned < 3.1) if used_later else (2 < planned < 2.3)


def test_a_sum_lies_where_a_summand_that_nothing_else_uses_was() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Conv3d(n, 16, 3, padding=1) for n in (1, 16, 16))
            self.small = nn.Conv3d(1, 1, 1)

        def logits(self, x: Tensor) -> tuple[Tensor, ...]:
            one = self.first(x)
            two = self.second(one).sigmoid()
            return (self.small(x) + self.third(self.third(one) + (two + one)) + one,)

    model, x = Sums().eval().requires_grad_(False), noise(1, 1, 7, 8, 9)
    network = compile_network(model, "logits", 0)
    for _ in range(2):
        with torch.inference_mode():
            torch.testing.assert_close(network(x), model.logits(x)[0], rtol=0, atol=3e-4)


def test_a_result_that_would_overwrite_its_input_too_early_is_refused() -> None:
    memory, weight = torch.zeros(2 * 16 * 4 * 32 * 32), kernel(F43, 16, 16)

    class Overlapping(Arena):
        def empty(self, shape: Any, device: torch.device, over: Any = (), lead: int = 0) -> Tensor:
            place = memory[1024 : 1024 + 16 * 4 * 32 * 32]
            return place.view(1, 4, 32, 32, 16).movedim(-1, 1)

    x = memory[2048 : 2048 + 16 * 4 * 32 * 32].view(1, 4, 32, 32, 16).movedim(-1, 1)
    with pytest.raises(ValueError, match="can't be used with these sizes"):
        Convolution(weight, (F43,))(x, Overlapping())


def test_results_of_an_earlier_plan_that_are_freed_late_change_nothing() -> None:
    arena, shape, meta = Arena(), (1, 2, 1, 32, 32), torch.device("meta")
    arena.watch()
    late = arena.empty(shape, meta)
    arena.plan()
    arena.watch()
    last = arena.empty(shape, meta)
    del late
    assert arena.plan() == 0
    assert last.shape == shape


class Repeats(nn.Module):
    """Convolutions to which a tensor of fewer channels is added several times, as a V-Net's first stage does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv3d(n, 48, 3, padding=1) for n in (1, 3, 4, 16, 48))
        self.thin, self.act = nn.Conv3d(4, 1, 1), nn.PReLU()

    def logits(self, x: Tensor) -> tuple[Tensor, ...]:
        widths = (1, 3, 4, 16, 48)
        parts = [x[:, :n].contiguous() for n in widths]
        sums = [
            self.act(layer(part) + part.repeat(1, 48 // n, 1, 1, 1))
            for layer, part, n in zip(self.layers, parts, widths, strict=True)
        ]
        one = torch.ones(1, 1, 1)
        return (
            *sums,
            self.act(self.thin(parts[2]) + parts[2].repeat(1, 2, 1, 1, 1)),
            self.thin(parts[2]) + one.repeat(1, 8, 1, 1, 1),
        )


@pytest.mark.parametrize("output", range(7))
def test_residuals_that_are_repeated(output: int) -> None:
    model, x = Repeats().eval().requires_grad_(False), noise(2, 48, 3, 4, 5)
    network = compile_network(model, "logits", output)
    assert "repeat" not in {node.target for node in network.graph.nodes}  # type: ignore[attr-defined]
    with torch.inference_mode():
        torch.testing.assert_close(network(x), model.logits(x)[output], rtol=0, atol=3e-4)


class Broadcast(nn.Module):
    """What a layer adds has other dimensions, is repeated as a part of something else, or is changed in place."""

    SIZES = ((1,), (), (6,), (8, 1, 1, 1), (1, 8, 1, 1, 1), (1, 1, 4, 5, 6), (8, 4, 5, 6), (2, 8, 4, 5, 6))

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.wide = nn.Conv3d(8, 8, 3, padding=1), nn.Conv3d(8, 32, 3, padding=1)
        self.normed = nn.Sequential(nn.Conv3d(8, 8, 3, padding=1), nn.InstanceNorm3d(8))
        self.up, self.relu = nn.ConvTranspose3d(8, 8, 2, 2, groups=8), nn.ReLU(inplace=True)
        self.norm, self.narrow = nn.BatchNorm3d(8), nn.Conv3d(8, 16, 1)
        for number, size in enumerate(self.SIZES):
            self.register_buffer(f"added_{number}", noise(*size) if size else torch.tensor(0.7))

    def logits(self, x: Tensor) -> tuple[Tensor, ...]:
        added = [getattr(self, f"added_{number}") for number in range(len(self.SIZES))]
        first = self.convolution(x)
        joined = torch.cat([first.repeat(1, 2, 1, 1, 1), x, x], 1)
        changed = self.convolution(x)
        before = changed.repeat(1, 2, 1, 1, 1)
        return (
            *(self.convolution(x) + other for other in added),
            *(self.normed(x) + other for other in added),
            self.wide(first) + joined,
            self.narrow(self.relu(changed)) + before,
            self.norm(self.up(x)),
        )


@pytest.mark.parametrize("output", range(19))
def test_what_a_layer_adds_is_broadcast_as_by_pytorch(output: int) -> None:
    model, x = Broadcast().eval().requires_grad_(False), noise(2, 8, 4, 5, 6)
    network = compile_network(model, "logits", output)
    with torch.inference_mode():
        torch.testing.assert_close(network(x), model.logits(x)[output], rtol=0, atol=3e-4)


class Resized(nn.Module):
    """A transposed convolution that is given the size of its result."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.ConvTranspose3d(4, 4, 2, 2), nn.InstanceNorm3d(4)

    def logits(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.norm(self.up(x, output_size=(5, 7, 9))),)


def test_a_layer_that_is_called_with_more_than_its_input_is_not_compiled() -> None:
    with pytest.raises(ValueError, match="more than its input"):
        compile_network(Resized().eval(), "logits", 0)


class ChangedInPlace(nn.Module):
    """A part of a concatenation, and what a convolution reads, are changed after they were used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.fourth = (nn.Conv3d(16, 16, 3, padding=1) for _ in range(4))
        self.joined, self.norm, self.relu = (
            nn.Conv3d(32, 16, 3, padding=1),
            nn.InstanceNorm3d(16),
            nn.ReLU(inplace=True),
        )

    def logits(self, x: Tensor) -> tuple[Tensor]:
        first = self.first(x)
        both, read = torch.cat([first, self.second(x)], dim=1), self.third(first)
        changed = self.fourth(self.relu(first))
        return (self.joined(both) + changed + self.norm(read),)


def test_what_is_changed_in_place_is_read_before() -> None:
    model, x = ChangedInPlace().eval(), noise(1, 16, 6, 7, 8)
    with torch.inference_mode():
        expected, network = model.logits(x.clone())[0], compile_network(model, "logits", 0)
        for _ in range(2):
            torch.testing.assert_close(network(x.clone()), expected, rtol=0, atol=3e-4)


class Standardized(nn.Conv3d):
    """A convolution with a forward of its own, which the kernels' convolution would not compute."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(dim=(1, 2, 3, 4), keepdim=True)
        return functional.conv3d(x, 3 * weight, self.bias, self.stride, self.padding)


class Unusual(nn.Module):
    """Own convolutions, sums in place of tensors that are used again, a residual that changes in place later."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.halved = Standardized(4, 4, 3, padding=1), Standardized(4, 4, 3, stride=2, padding=1)
        self.one, self.two, self.three = (nn.Conv3d(4, 4, 3, padding=1) for _ in range(3))
        self.norm, self.batch = nn.InstanceNorm3d(4), nn.BatchNorm3d(4)
        self.act, self.relu = nn.LeakyReLU(), nn.ReLU(inplace=True)

    def logits(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.act(self.norm(self.own(x)))
        small = self.relu(self.batch(self.halved(y)))
        skips = [y]
        y += self.one(y)
        y *= 0.5
        total = self.two(y) + skips[0]
        residual = self.three(y)
        summed = self.one(x) + residual
        changed = self.relu(residual)
        again = self.act(summed) + changed
        alone = self.two(x)
        alone += x
        return small, total, again, self.act(alone)


@pytest.mark.parametrize("output", range(4))
def test_own_convolutions_and_changes_in_place(output: int) -> None:
    torch.manual_seed(0)
    model, x = Unusual().eval(), noise(1, 4, 6, 8, 10)
    with torch.inference_mode():
        expected = model.logits(x.clone())[output]
        found = compile_network(model, "logits", output)(x.clone())
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-4)


def test_a_network_with_hooks_is_not_compiled() -> None:
    model = Unusual()
    model.one.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="one has hooks"):
        compile_network(model, "logits", 0)


@each_kind
def test_moments_of_a_convolution_far_from_zero(kind: Kind) -> None:
    """One of many blocks of tiles, with a mean of 30 deviations."""
    x, weight, bias = noise(1, 4, 9, 22, 41), kernel(kind, 4, 6), torch.full((6,), 30.0)
    expected = exact(x, weight, bias)[0]
    y, mean, variance = Convolution(weight, (kind,), bias).with_moments(x, Arena())
    torch.testing.assert_close(y[0].double(), expected, rtol=0, atol=error(kind))
    torch.testing.assert_close(mean, expected.mean((1, 2, 3)), rtol=0, atol=1e-4)
    torch.testing.assert_close(variance, expected.var((1, 2, 3), unbiased=False), rtol=1e-4, atol=0)


@pytest.mark.parametrize("channels", [1, 7, 16, 40])
def test_moments_and_affine_are_pytorchs(channels: int) -> None:
    x, residual = noise(1, channels, 3, 41, 57) + 20, noise(1, channels, 3, 41, 57, seed=1)
    mean, variance = moments(x)
    torch.testing.assert_close(mean, x.double().mean((0, 2, 3, 4)), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance, x.double().var((0, 2, 3, 4), unbiased=False), rtol=1e-4, atol=0)
    scale, shift, first, second = (noise(channels, seed=n) for n in range(4))
    plain = x * scale[:, None, None, None] + shift[:, None, None, None]
    torch.testing.assert_close(affine(x.clone(), scale, shift), plain)
    torch.testing.assert_close(affine(x.clone(), scale, shift, None, residual), plain + residual)
    found = affine(x.clone(), scale, shift, first, residual, second)
    torch.testing.assert_close(found, leaky(leaky(plain, first) + residual, second))


@pytest.mark.parametrize("kind", [F43, F63, F65], ids=["F43", "F63", "F65"])
def test_the_same_bits_for_any_number_of_threads(kind: Kind) -> None:
    x, layer = noise(1, 20, 9, 20, 30), Convolution(kernel(kind, 20, 70), (kind,))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = layer.with_moments(x, Arena())
        torch.set_num_threads(3)
        for one, other in zip(alone, layer.with_moments(x, Arena()), strict=True):
            assert torch.equal(one, other)
    finally:
        torch.set_num_threads(before)


def test_kernels_of_other_sources_are_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As after an update of a checkout without installing it again: results would be wrong."""
    kernels = library.library()
    assert kernels is not None
    assert not library.is_outdated(kernels)
    (tmp_path / "kernels.cpp").write_text("// changed")
    monkeypatch.delenv(library.CHOSEN, raising=False)
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    assert library.is_outdated(kernels)
    (tmp_path / "kernels.cpp").unlink()
    assert not library.is_outdated(kernels)  # a wheel has no sources


def job(**changes: int) -> library.Convolution:
    """A convolution of 4 to 3 channels on 5 x 6 x 7 voxels in buffers that are exactly large enough."""
    numbers = {"images": 1, "depth": 5, "height": 6, "width": 7, "channels_in": 4, "channels_x": 4, "channels_out": 3}
    numbers |= {"pixel_in": 4, "pixel_out": 3, "kind": 3, "lanes": library.lanes(), "threads": 1}
    plan = library.Plan()
    library.call("plan", library.Convolution(**numbers), plan)
    sizes = {"x": 840, "y": 630, "bias": 3, "slope": 3, "weights": plan.weights, "scratch": plan.scratch}
    made = library.Convolution(**{**numbers, **{f"size_{name}": size for name, size in sizes.items()}, **changes})
    buffers = {name: torch.ones(max(1, size)) for name, size in sizes.items()}
    buffers["moments"] = torch.ones(3 * 3 * plan.blocks, dtype=torch.float64)
    for name, buffer in buffers.items():
        setattr(made, name, buffer.data_ptr())
    made.size_moments = changes.get("size_moments", len(buffers["moments"]))
    made.kept = buffers  # alive as long as the job
    return made


WRONG = [
    *({f"size_{name}": size} for name, size in {"x": 839, "y": 629, "bias": 2, "slope": 2, "moments": 8}.items()),
    {"size_weights": 5},
    {"size_scratch": 5},
    *({name: 0} for name in ("images", "depth", "height", "width", "channels_in", "channels_out", "threads", "lanes")),
    *({name: -1} for name in ("depth", "pixel_in", "kind", "threads")),
    *({name: 2**40} for name in ("images", "depth", "height", "width", "channels_in", "pixel_in", "pixel_out")),
    {"kind": 5},
    {"lanes": 32},
    {"pixel_out": 2},
    {"depth": 2**31, "height": 2**31, "width": 4},
]


def test_sizes_that_fit_are_accepted() -> None:
    library.call("convolve", job())


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_sizes_are_checked_before_memory_is_used(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="sizes"):
        library.call("convolve", job(**wrong))


def strided(**changes: int) -> library.Product:
    """A convolution of 3 to 5 channels, 2 x 3 x 2 with a stride of 2, on 4 x 5 x 6 voxels in buffers of its size."""
    numbers = {"images": 1, "channels_in": 3, "channels_out": 5, "lanes": library.lanes(), "threads": 1}
    sizes = {"in": (4, 5, 6), "out": (2, 3, 3), "kernel": (2, 3, 2), "stride": (2, 2, 2), "pad": (0, 1, 0)}
    numbers |= {f"{name}_{axis}": n for name, row in sizes.items() for axis, n in zip("zyx", row, strict=True)}
    plan = library.Plan()
    library.call("product_plan", library.Product(**numbers), plan)
    counts = {"x": 360, "y": 90, "bias": 5, "slope": 5, "weights": plan.weights, "scratch": plan.scratch}
    made = library.Product(**{**numbers, **{f"size_{name}": size for name, size in counts.items()}, **changes})
    buffers = {name: torch.ones(size) for name, size in counts.items()}
    buffers["moments"] = torch.ones(15 * plan.blocks, dtype=torch.float64)
    for name, buffer in buffers.items():
        setattr(made, name, buffer.data_ptr())
    made.size_moments = changes.get("size_moments", len(buffers["moments"]))
    made.kept = buffers
    return made


@pytest.mark.parametrize(
    "wrong",
    [
        *({f"size_{name}": 4} for name in ("x", "y", "bias", "slope", "weights", "scratch", "moments")),
        *({name: 0} for name in ("images", "channels_in", "channels_out", "in_z", "kernel_x", "stride_y", "lanes")),
        *({name: 2**40} for name in ("images", "channels_in", "in_x", "out_y", "kernel_z", "stride_x", "pad_y")),
        *({name: 2} for name in ("pad_z", "transposed", "images")),
        {"stride_y": 1},
        {"transposed": 1},
        {"out_z": 3},
    ],
    ids=str,
)
def test_sizes_of_products_are_checked(wrong: dict[str, int]) -> None:
    library.call("product", strided())
    with pytest.raises(ValueError, match="sizes"):
        library.call("product", strided(**wrong))


def test_tensors_of_other_shapes_or_types_are_refused() -> None:
    layer = Convolution(kernel(F43, 4, 3), (F43,))
    for x in (noise(1, 5, 4, 4, 4), noise(1, 4, 4, 4, 4).double()):
        with pytest.raises(ValueError, match="channels"):
            layer(x, Arena())
    with pytest.raises(ValueError, match="kernel"):
        Convolution(kernel(F43, 4, 3), (F45,))
    with pytest.raises(ValueError, match="residual"):
        affine(noise(1, 4, 4, 4, 4), torch.ones(4), torch.ones(4), residual=noise(1, 4, 4, 4, 3))
    with pytest.raises(ValueError, match="each channel"):
        affine(noise(1, 4, 4, 4, 4), torch.ones(4), torch.ones(3))
    with pytest.raises(ValueError, match="float32"):
        moments(noise(1, 4, 4, 4, 4).double())


def test_only_its_own_channels_of_a_larger_tensor_are_written() -> None:
    """And nothing before or behind it, where the last tiles are not whole."""
    made = job(pixel_out=5, size_y=1050)
    y = torch.full((1070,), 0.123)
    made.y = y[10:].data_ptr()
    library.call("convolve", made)
    inside = y[10:1060].view(210, 5)
    assert (inside[:, 3:] == y[0]).all()
    assert (inside[:, :3] != y[0]).all()
    assert (y[:10] == y[0]).all()
    assert (y[1060:] == y[0]).all()
