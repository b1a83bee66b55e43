"""Every method's networks against their papers' figures, and the fused V-Nets against what they promise."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from method_runs import SIZES
from torch import Tensor, nn

from kitseg import config
from kitseg.config import StageSpec
from kitseg.models.stage import build_input_transform
from kitseg.nets.vnet import FusedVNet, InputStage, ThinConv, VNet
from kitseg.stages.model import build_model
from kitseg.types import Geometry, Triple
from kitseg.volumes.resample import grid_geometry

V_NET, COMMON_V_NET = 65.19, 45.60
#: Millions of parameters of each stage's network at size=paper.
U_NET = 31.04
PARAMETERS = {
    "two-phase": {"coarse": V_NET, "fine": 2 * V_NET},
    "two-stage": {"slices": 11.17, "segment": U_NET},
    "guided-unetpp": {"foreground": 8.53, "segment": 9.04},
    "progressive": {"segment": 8.58},
    "dual-unet": {"kidneys": U_NET, "tumors": U_NET},
}

ENCODER = [(16, 80, 240, 384), (32, 40, 120, 192), (64, 20, 60, 96), (128, 10, 30, 48), (256, 5, 15, 24)]
DECODER = [(256, 10, 30, 48), (128, 20, 60, 96), (64, 40, 120, 192), (32, 80, 240, 384)]
LOGITS = (3, 80, 240, 384)

Hooked = Callable[..., None]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def millions(net: nn.Module) -> float:
    return sum(p.numel() for p in net.parameters()) / 1e6


@cache
def stages_of(method: str, size: str) -> dict[str, StageSpec]:
    return dict(config.method_of(config.compose(method, size)).stages)


def paper_net(method: str, stage: str) -> nn.Module:
    """The network as the method's YAML describes it, without memory."""
    spec = stages_of(method, "paper")[stage]
    with torch.device("meta"):
        net: nn.Module = config.build(spec.parts["module"]["net"])
    return net.eval()


def tiny_vnet(channels_in: int = 1, **settings: Any) -> VNet:
    return VNet(channels_in, 3, **{"width": 4, "down": (1, 1, 1, 1), "up": (1, 1, 1, 1), "dropout": 0.0, **settings})


def tiny_pair(seed: int = 0, **settings: Any) -> FusedVNet:
    torch.manual_seed(seed)
    return FusedVNet(tiny_vnet(1, **settings), tiny_vnet(4, **settings))


def scan(shape: tuple[int, ...] = (1, 1, 32, 32, 32), seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- against the papers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "stage"), [(m, s) for m, stages in PARAMETERS.items() for s in stages])
def test_parameters_as_in_the_paper(method: str, stage: str) -> None:
    assert millions(paper_net(method, stage)) == pytest.approx(PARAMETERS[method][stage], rel=0.005)


@pytest.mark.parametrize(("method", "size"), SIZES)
@pytest.mark.parametrize("shape", [(60, 512, 512), (48, 512, 796)])
def test_every_network_takes_the_patches_and_regions_it_is_given(method: str, size: str, shape: Triple) -> None:
    """On a typical scan and on the unusual one of KiTS19; without memory."""
    lattice = Geometry(shape, np.diag([3.0, 0.8, 0.8, 1.0]))
    for spec in stages_of(method, size).values():
        region = config.build(spec.parts["region"]).shape(grid_geometry(lattice, spec.grid))
        sampler, channels = config.build(spec.parts["sampler"]), build_input_transform(spec).channels
        patch = sampler.size(region)
        assert sampler.expected(region) >= 1
        with torch.device("meta"):
            module = build_model(spec).eval()
            x = torch.empty(1, channels, *patch)
        heads = module.logits(x)
        assert len(heads) == len(spec.heads)
        assert {head.shape[1] for head in heads} == {len(spec.channels)}
        assert heads[-1].shape == (1, len(spec.channels), *patch)


def test_size_small_is_the_common_v_net() -> None:
    with torch.device("meta"):
        net = config.build(stages_of("two-phase", "small")["coarse"].parts["module"]["net"])
    assert millions(net) == pytest.approx(COMMON_V_NET, rel=0.005)


def record(into: list[tuple[int, ...]], module: nn.Module, inputs: Any, output: Tensor) -> None:
    into.append(tuple(output.shape[1:]))


def test_shapes_of_the_second_phase() -> None:
    net = paper_net("two-phase", "fine")
    assert isinstance(net, FusedVNet)
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for name, part in (("first", net.first), ("second", net.second)):
        for side, stages in (("down", [part.input, *part.downs]), ("up", list(part.ups))):
            seen = shapes.setdefault(f"{name} {side}", [])
            for stage in stages:
                stage.register_forward_hook(partial(record, seen))
    first, second = net(torch.empty(1, 1, *LOGITS[1:], device="meta"))
    assert shapes == {"first down": ENCODER, "first up": DECODER, "second down": ENCODER, "second up": DECODER}
    assert first.shape == second.shape == (1, *LOGITS)


def test_shapes_of_the_first_phase() -> None:
    logits, features = paper_net("two-phase", "coarse")(torch.empty(1, 1, 64, 128, 128, device="meta"))
    assert logits.shape == (1, 3, 64, 128, 128)
    sizes = [(256, 8, 16, 16), (128, 16, 32, 32), (64, 32, 64, 64), (32, 64, 128, 128)]
    assert [tuple(f.shape[1:]) for f in features] == sizes


def test_dropout_only_at_the_two_deepest_stages() -> None:
    net = paper_net("two-phase", "coarse")
    assert isinstance(net, VNet)
    assert [stage.dropout.p for stage in net.downs] == [0, 0, 0.5, 0.5]  # the last one is the deepest
    assert [stage.dropout.p for stage in net.ups] == [0.5, 0.5, 0, 0]  # the first one is the deepest


def test_dropout_takes_whole_channels() -> None:
    torch.manual_seed(0)
    net = tiny_vnet(dropout=0.5).train()
    kept: list[Tensor] = []

    def look(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        zero, doubled = (output == 0).flatten(2).all(2), torch.isclose(output, 2 * inputs[0]).flatten(2).all(2)
        assert (zero | doubled).all()
        kept.append(doubled)

    for stage in (*net.downs[2:], *net.ups[:2]):
        stage.dropout.register_forward_hook(look)
    net(scan())
    assert len(kept) == 4
    assert all(0 < k.sum() < k.numel() for k in kept)


# --- the input -------------------------------------------------------------------------------------------------------


def zeroed(stage: InputStage) -> InputStage:
    """The stage with a convolution of zero weights, so that only the tiled input comes through."""
    for parameter in stage.conv.parameters():
        nn.init.zeros_(parameter)
    return stage


@pytest.mark.parametrize("channels", [1, 4])
def test_input_channels_are_tiled_to_sixteen(channels: int) -> None:
    x = torch.arange(1.0, channels + 1).view(1, channels, 1, 1, 1).expand(1, channels, 2, 2, 2)
    found = zeroed(InputStage(channels, 16))(x)[0, :, 0, 0, 0].tolist()
    assert found == [*range(1, channels + 1)] * (16 // channels)


@pytest.mark.parametrize(("channels_in", "width"), [(3, 16), (4, 6), (5, 4)])
def test_channels_that_cannot_be_tiled(channels_in: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"{channels_in} .*{width}"):
        VNet(channels_in, width=width)


@pytest.mark.parametrize(("channels", "kernel"), [(3, 5), (1, 5), (4, 3)])
def test_a_convolution_to_few_channels_is_a_convolution(channels: int, kernel: int) -> None:
    conv = ThinConv(8, channels, kernel).double()
    x = torch.randn(2, 8, 6, 7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.conv3d(x, conv.weight, conv.bias, padding=kernel // 2)
    torch.testing.assert_close(conv(x), expected)
    torch.testing.assert_close(conv.eval()(x), expected)


def test_a_convolution_count_for_each_stage() -> None:
    with pytest.raises(ValueError, match="zip"):
        VNet(down=(1, 2, 3))


# --- the fused pair --------------------------------------------------------------------------------------------------


class Seen:
    """What the second network is given and what it makes of it, in one pass of a fused pair."""

    def __init__(self, net: FusedVNet, x: Tensor) -> None:
        self.given: list[tuple[Any, ...]] = []
        self.features: list[Tensor] = []
        self.made: list[Tensor] = []
        self.taken: list[Tensor] = []
        hooks = [
            net.second.register_forward_pre_hook(lambda m, args: self.given.append(args)),
            net.first.register_forward_hook(lambda m, args, out: self.features.extend(out[1])),
        ]
        for up in net.second.ups:
            hooks.append(up.register_forward_hook(lambda m, args, out: self.made.append(out)))
        for later in (*net.second.ups[1:], net.second.head):
            hooks.append(later.register_forward_pre_hook(lambda m, args: self.taken.append(args[0])))
        with torch.no_grad():
            self.first, self.second = net(x)
        for hook in hooks:
            hook.remove()


def test_the_second_network_sees_the_scan_and_the_firsts_softmax() -> None:
    x = scan()
    seen = Seen(tiny_pair().eval(), x)
    image, guidance = seen.given[0]
    assert image.shape == (1, 4, 32, 32, 32)
    assert torch.equal(image[:, :1], x)
    assert torch.equal(image[:, 1:], seen.first.softmax(1))
    assert all(a is b for a, b in zip(guidance, seen.features, strict=True))


def test_each_decoder_map_is_added_before_the_next_stage() -> None:
    seen = Seen(tiny_pair().eval(), scan())
    assert len(seen.features) == len(seen.made) == len(seen.taken) == 4
    for added, made, taken in zip(seen.features, seen.made, seen.taken, strict=True):
        assert added.abs().max() > 0
        assert torch.equal(taken, made + added)


@pytest.mark.parametrize("level", range(4))
def test_the_seconds_loss_trains_the_first_through_each_map(level: int) -> None:
    """With the softmax and the three other maps cut off, gradients reach the up stages that the map comes from."""
    net = tiny_pair().eval()

    def cut(module: nn.Module, args: tuple[Tensor, list[Tensor]]) -> tuple[Tensor, list[Tensor]]:
        image, guidance = args
        return image.detach(), [g if i == level else g.detach() for i, g in enumerate(guidance)]

    net.second.register_forward_pre_hook(cut)
    _, fused = net(scan())
    nn.functional.cross_entropy(fused, torch.randint(3, (1, 32, 32, 32))).backward()
    reached = [[p.grad for p in up.convs.parameters()] for up in net.first.ups]
    for grads in reached[: level + 1]:
        assert all(g is not None for g in grads)
        assert max(g.abs().max() for g in grads if g is not None) > 0
    for grads in (*reached[level + 1 :], [p.grad for p in net.first.head.parameters()]):
        assert all(g is None for g in grads)


def test_the_seconds_loss_trains_the_first_through_the_softmax_too() -> None:
    net = tiny_pair().eval()
    _, fused = net(scan())
    nn.functional.cross_entropy(fused, torch.randint(3, (1, 32, 32, 32))).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert max(p.grad.abs().max() for p in net.first.head.parameters() if p.grad is not None) > 0


# --- checkpointing ---------------------------------------------------------------------------------------------------


def gradients(checkpointing: bool, dropout: float) -> tuple[Tensor, list[Tensor], list[int]]:
    """Logits, gradients, and how often each part of the second network ran."""
    net = tiny_pair(checkpointing=checkpointing, dropout=dropout).train()
    parts = [net.second.input, *net.second.downs, *net.second.ups, net.second.head]
    runs = [0] * len(parts)

    def count(index: int, module: nn.Module, args: Any) -> None:
        runs[index] += 1

    for i, part in enumerate(parts):
        part.register_forward_pre_hook(partial(count, i))
    torch.manual_seed(1)
    first, second = net(scan())
    target = torch.arange(32**3).view(1, 32, 32, 32) % 3
    (nn.functional.cross_entropy(first, target) + nn.functional.cross_entropy(second, target)).backward()
    return second.detach(), [p.grad for p in net.parameters() if p.grad is not None], runs


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_changes_memory_not_gradients(dropout: float) -> None:
    plain, plain_grads, plain_runs = gradients(False, dropout)
    saved, saved_grads, saved_runs = gradients(True, dropout)
    assert (plain_runs, saved_runs) == ([1] * 10, [2] * 10)
    assert torch.equal(plain, saved)
    assert len(plain_grads) == len(saved_grads) == len(list(tiny_pair().parameters()))
    for a, b in zip(plain_grads, saved_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
