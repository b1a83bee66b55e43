"""The slice networks and the foreground network against their papers' figures and against what they promise."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kitseg.nets.attention_unet import AttentionGate, AttentionUNet
from kitseg.nets.foreground import SLICE, VOLUME, DownStage, ForegroundNet, block, convolution, space_to_depth
from kitseg.nets.foreground import UpStage as ForegroundUpStage
from kitseg.nets.resnet import ResNet
from kitseg.nets.unet import UNet
from kitseg.nets.unetpp import UNetPlusPlus

Net = Callable[[], nn.Module]

#: Each network at width 8, and an input for it.
TINY: dict[str, tuple[Net, tuple[int, ...]]] = {
    "U-Net": (partial(UNet, width=8), (2, 1, 32, 48)),
    "ResNet-18": (partial(ResNet, 18, width=8), (2, 1, 64, 64)),
    "ResNet-34": (partial(ResNet, 34, width=8), (2, 1, 64, 64)),
    "ResNet-50": (partial(ResNet, 50, width=8), (2, 1, 64, 64)),
    "foreground": (partial(ForegroundNet, width=8), (2, 1, 8, 32, 48)),
    "UNet++": (partial(UNetPlusPlus, width=8, dropout=0.0), (2, 3, 32, 48)),
    "attention U-Net": (partial(AttentionUNet, width=8), (2, 1, 32, 48)),
}


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def millions(expected: float) -> Any:
    return pytest.approx(expected * 1e6, rel=0.005)


def on_meta(make: Net) -> nn.Module:
    with torch.device("meta"):
        return make().eval()


def seeded(make: Net) -> Any:
    torch.manual_seed(0)
    return make()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def outputs_of(stages: Iterable[nn.Module]) -> list[Tensor]:
    """A list that the stages' outputs will be appended to."""
    seen: list[Tensor] = []
    for stage in stages:
        stage.register_forward_hook(lambda module, args, out: seen.append(out))
    return seen


def inputs_of(stages: Iterable[nn.Module]) -> list[tuple[Any, ...]]:
    """A list that the stages' inputs will be appended to; lists in them are copied, for they may grow."""
    seen: list[tuple[Any, ...]] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(tuple(list(a) if isinstance(a, list) else a for a in args))

    for stage in stages:
        stage.register_forward_pre_hook(keep)
    return seen


def shapes(tensors: Iterable[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(t.shape[1:]) for t in tensors]


def fill(module: nn.Module, weight: float, bias: float | None = None) -> None:
    nn.init.constant_(module.weight, weight)
    if bias is not None:
        nn.init.constant_(module.bias, bias)


def train_like(ours: nn.Module, theirs: nn.Module) -> None:
    """Give another implementation our weights, which stand in the same order."""
    state = theirs.state_dict()
    assert shapes(v[None] for v in state.values()) == shapes(v[None] for v in ours.state_dict().values())
    theirs.load_state_dict(dict(zip(state, ours.state_dict().values(), strict=True)))


@pytest.mark.parametrize("name", TINY)
def test_gradients_reach_every_parameter(name: str) -> None:
    make, shape = TINY[name]
    net = seeded(make).train()
    outputs = net(noise(*shape))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(out.square().mean() for out in outputs).backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None, key
        assert 0 < parameter.grad.abs().max() < torch.inf, key


@pytest.mark.parametrize(("classes", "height"), [(3, 256), (1, 128)])  # two-stage; the tumor model of dual-unet
def test_shapes_of_the_u_net(classes: int, height: int) -> None:
    net: Any = on_meta(partial(UNet, classes=classes))
    downs, ups = outputs_of(net.downs), outputs_of(net.ups)
    logits = net(torch.empty(2, 1, height, 256, device="meta"))
    sizes = [(64 * 2**i, height // 2**i, 256 // 2**i) for i in range(5)]
    assert (shapes(downs), shapes(ups)) == (sizes, sizes[3::-1])
    assert logits.shape == (2, classes, height, 256)
    assert parameters(net) == millions(31.04)


@pytest.mark.parametrize("training", [True, False])
def test_u_net_is_monais(training: bool) -> None:
    nets = pytest.importorskip("monai.networks.nets.basic_unet")
    settings = {"act": ("relu", {"inplace": True}), "norm": "batch", "bias": False}
    theirs = nets.BasicUNet(2, 1, 3, (4, 8, 16, 32, 64, 4), **settings)
    theirs.upcat_1 = nets.UpCat(2, 8, 4, 4, **settings, dropout=0.0, upsample="deconv")  # its own keeps 8 channels here
    ours = seeded(partial(UNet, width=4))
    ours(noise(4, 1, 64, 64))  # BatchNorm statistics that are not 0 and 1
    train_like(ours, theirs)
    with torch.no_grad():
        x = noise(2, 1, 32, 48)
        torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x))


@pytest.mark.parametrize("make", [UNet, UNetPlusPlus])
def test_weights_are_he_normal_and_biases_zero(make: Callable[..., nn.Module]) -> None:
    net = seeded(partial(make, width=16))
    convs = {k: m for k, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 20_000}
    assert len(convs) >= 8
    scale = 0.5 if make is UNetPlusPlus else 1.0  # 1 − dropout
    for key, conv in convs.items():
        expected = (scale * 2 / (9 * conv.in_channels)) ** 0.5
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.03), key
        beyond = (conv.weight.abs() > 2 * expected).float().mean().item()
        assert beyond == pytest.approx(0.0455, abs=0.01), key  # as of a Gaussian; a uniform one has none there
    assert {p.any().item() for key, p in net.named_parameters() if key.endswith("bias")} == {False}


@pytest.mark.parametrize(("depth", "expansion", "exact"), [(18, 1, 11171266), (34, 1, 21279426), (50, 4, 23505858)])
def test_shapes_of_the_resnet(depth: int, expansion: int, exact: int) -> None:
    net: Any = on_meta(partial(ResNet, depth))
    stem, stages = outputs_of([net.stem]), outputs_of(net.stages)
    logits = net(torch.empty(32, 1, 256, 256, device="meta"))
    assert shapes(stem) == [(64, 64, 64)]
    assert shapes(stages) == [(64 * 2**i * expansion, 64 // 2**i, 64 // 2**i) for i in range(4)]
    assert logits.shape == (32, 2)
    assert parameters(net) == exact


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("depth", [18, 34, 50])
def test_resnet_is_monais(depth: int, training: bool) -> None:
    nets = pytest.importorskip("monai.networks.nets")
    kind, counts = {18: ("basic", [2, 2, 2, 2]), 34: ("basic", [3, 4, 6, 3]), 50: ("bottleneck", [3, 4, 6, 3])}[depth]
    settings = {"spatial_dims": 2, "n_input_channels": 1, "num_classes": 2, "bias_downsample": False}
    theirs = nets.ResNet(kind, counts, [4, 8, 16, 32], conv1_t_stride=2, **settings)
    ours = seeded(partial(ResNet, depth, width=4))
    ours(noise(4, 1, 64, 64))
    train_like(ours, theirs)
    with torch.no_grad():
        x = noise(4, 1, 96, 64)
        torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x), rtol=1e-4, atol=1e-5)


def test_no_resnet_of_another_depth() -> None:
    with pytest.raises(ValueError, match="18, 34 or 50, not 101"):
        ResNet(101)


def test_shapes_of_the_foreground_network() -> None:
    net: Any = on_meta(ForegroundNet)
    given = inputs_of(net.downs[:1])
    downs, to_3d, ups = outputs_of(net.downs), outputs_of(net.downs[1].entry), outputs_of(net.ups)
    logits = net(torch.empty(1, 1, 32, 512, 512, device="meta"))
    assert shapes(given[0]) == [(4, 32, 256, 256)]
    assert shapes(to_3d) == [(32, 32, 128, 128), (64, 32, 128, 128)]
    assert shapes(downs) == [(32, 32, 256, 256), (64, 32, 128, 128), (128, 16, 64, 64), (256, 8, 32, 32)]
    assert shapes(ups) == [(128, 16, 64, 64), (64, 32, 128, 128), (32, 32, 256, 256)]
    assert logits.shape == (1, 2, 32, 512, 512)
    assert parameters(net) == millions(8.53)


def test_2d_then_3d_then_2d_without_biases_but_the_heads() -> None:
    convs = [m for m in on_meta(ForegroundNet).modules() if isinstance(m, nn.Conv3d | nn.ConvTranspose3d)]
    assert [c.kernel_size for c in convs] == [SLICE] * 3 + [VOLUME] * 14 + [SLICE] * 4
    assert [c.bias is None for c in convs] == [True] * 20 + [False]


def test_the_foreground_network_starts_at_two_percent() -> None:
    net = seeded(partial(ForegroundNet, width=8)).eval()
    with torch.no_grad():
        probability = net(noise(1, 1, 8, 32, 32)).softmax(1)[:, 1]
    assert 0.005 < probability.median() < 0.1


def test_space_to_depth_reads_each_cell_row_by_row() -> None:
    slices = torch.tensor([[[1, 2, 5, 6], [3, 4, 7, 8]], [[9, 10, 13, 14], [11, 12, 15, 16]]]).view(1, 1, 2, 2, 4)
    cells = space_to_depth(slices)
    assert cells[0, :, 0, 0].T.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert cells[0, :, 1, 0].T.tolist() == [[9, 10, 11, 12], [13, 14, 15, 16]]


def test_3d_convolutions_pad_by_replication_and_2d_ones_with_zeros() -> None:
    ones = torch.ones(1, 1, 3, 3, 3)
    volume, flat = convolution(1, 1, VOLUME), convolution(1, 1, SLICE)
    fill(volume, 1)
    fill(flat, 1)
    assert volume(ones).unique().tolist() == [27]
    assert flat(ones)[0, 0].tolist() == [[[4, 6, 4], [6, 9, 6], [4, 6, 4]]] * 3


@pytest.mark.parametrize("convs", [1, 2])
def test_the_way_down_has_a_residual(convs: int) -> None:
    stage = seeded(lambda: DownStage(block(convolution(2, 4, VOLUME, halve=True)), 4, VOLUME, convs))
    x, last = noise(1, 2, 4, 4, 4), stage.convs[-1]
    assert isinstance(last, nn.Conv3d)  # without norm and ReLU
    assert (stage(x) - stage.act(stage.entry(x))).abs().max() > 0.01
    fill(last, 0)
    assert torch.equal(stage(x), stage.act(stage.entry(x)))


def test_the_way_up_has_a_residual_from_the_transposed_convolution() -> None:
    stage = seeded(lambda: ForegroundUpStage(4, VOLUME))
    x, skip = noise(1, 8, 2, 2, 2), noise(1, 4, 4, 4, 4)
    joined = inputs_of([stage.convs])
    up = stage.up(x)
    assert (stage(x, skip) - stage.act(up)).abs().max() > 0.01
    assert torch.equal(joined[0][0], torch.cat([up, skip], dim=1))
    fill(stage.convs[-1], 0)
    assert torch.equal(stage(x, skip), stage.act(up))


def test_shapes_of_unet_plus_plus() -> None:
    net: Any = on_meta(UNetPlusPlus)
    backbone = outputs_of(net.backbone)
    nested = {key: outputs_of([node]) for key, node in net.nested.items()}
    logits = net(torch.empty(8, 3, 512, 512, device="meta"))
    sizes = [(32 * 2**i, 512 // 2**i, 512 // 2**i) for i in range(5)]
    assert shapes(backbone) == sizes
    assert sorted(nested) == ["0,1", "0,2", "0,3", "0,4", "1,1", "1,2", "1,3", "2,1", "2,2", "3,1"]
    assert all(shapes(out) == [sizes[int(key[0])]] for key, out in nested.items())
    assert [tuple(out.shape) for out in logits] == [(8, 3, 512, 512)] * 4
    assert parameters(net) == millions(9.04)
    published: Any = on_meta(partial(UNetPlusPlus, channels_in=1, classes=1))
    assert parameters(published) - parameters(published.heads[:3]) == 9_041_601  # of L4 without deep supervision


def test_every_node_joins_all_earlier_ones_and_the_one_below() -> None:
    net = seeded(partial(UNetPlusPlus, width=8)).eval()
    nodes = {(int(key[0]), int(key[2])): node for key, node in net.nested.items()}
    everything = nodes | {(i, 0): stage for i, stage in enumerate(net.backbone)}
    made = {place: outputs_of([node]) for place, node in everything.items()}
    given = {place: inputs_of([node]) for place, node in nodes.items()}
    joined = {place: inputs_of([node.convs]) for place, node in nodes.items()}
    pooled, x = inputs_of(net.backbone), noise(1, 3, 32, 32)
    with torch.no_grad():
        logits = net(x)
        x_ = {place: out for place, (out,) in made.items()}
        assert torch.equal(pooled[0][0], x)
        for i in range(1, 5):
            assert torch.equal(pooled[i][0], nn.functional.max_pool2d(x_[i - 1, 0], 2))
        for (i, j), [(skips, below)] in given.items():
            assert below is x_[i + 1, j - 1]
            assert all(a is b for a, b in zip(skips, [x_[i, k] for k in range(j)], strict=True))
            assert torch.equal(joined[i, j][0][0], torch.cat([*skips, nodes[i, j].up(below)], dim=1))
        for j, (head, out) in enumerate(zip(net.heads, logits, strict=True), start=1):
            assert torch.equal(out, head(x_[0, j]))


def test_unet_plus_plus_drops_values_in_training_only_and_has_no_norm() -> None:
    net = seeded(partial(UNetPlusPlus, width=8))
    drops = [m for m in net.modules() if isinstance(m, nn.Dropout)]
    assert [m.p for m in drops] == [0.5] * 30  # after both convolutions of fifteen nodes
    assert not any("Norm" in type(m).__name__ for m in net.modules())
    x = noise(1, 3, 16, 16)
    with torch.no_grad():
        assert not torch.equal(net.train()(x)[3], net(x)[3])
        assert torch.equal(net.eval()(x)[3], net(x)[3])


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropout_does_not_blow_up_the_logits_of_unet_plus_plus(dropout: float) -> None:
    """The second moment in training stays that of the input; without the weights' scale, 0.5 gave 415 at width 32."""
    net = seeded(partial(UNetPlusPlus, width=16, dropout=dropout)).train()
    with torch.no_grad():
        logits = net(noise(2, 3, 64, 64))
    assert all(0.1 < head.std() < 5 for head in logits)


def test_shapes_of_the_attention_u_net() -> None:
    net: Any = on_meta(AttentionUNet)
    features = outputs_of([net.first, *net.downs, net.center])
    gated, ups = outputs_of(up.gate for up in net.ups), outputs_of(up.up for up in net.ups)
    branches, given = outputs_of(head[0] for head in net.heads), inputs_of([net.first, *net.downs])
    logits = net(torch.empty(16, 1, 256, 256, device="meta"))
    assert [tuple(x.shape) for x, *_ in given] == [(16, 1, n, n) for n in (256, 128, 64, 32)]
    sizes = [(32, 256, 256), (64, 128, 128), (128, 64, 64), (256, 32, 32)]
    assert shapes(features) == [*sizes, (512, 16, 16)]
    assert shapes(gated) == shapes(branches) == sizes[::-1]
    assert shapes(ups) == [(32, 32, 32), (64, 64, 64), (32, 128, 128), (32, 256, 256)]
    assert shapes(logits) == [(3, 32, 32), (3, 64, 64), (3, 128, 128), (3, 256, 256)]
    assert [up.gate.theta.out_channels for up in net.ups] == [128, 64, 32, 16]
    assert parameters(net) == millions(8.58)


def test_the_input_pyramid_is_of_means_of_2x2_pixels() -> None:
    net = seeded(partial(AttentionUNet, width=8)).eval()
    given, features = inputs_of([net.first, *net.downs]), outputs_of([net.first, *net.downs])
    joined = inputs_of(down.convs for down in net.downs)
    x = noise(1, 1, 16, 32)
    with torch.no_grad():
        net(x)
        assert torch.equal(given[0][0], x)
        for i, side in enumerate((2, 4, 8), start=1):
            means = x.view(1, 1, 16 // side, side, 32 // side, side).mean(dim=(3, 5))
            torch.testing.assert_close(given[i][0], means)
            pooled = nn.functional.max_pool2d(features[i - 1], 2)
            assert torch.equal(joined[i - 1][0], torch.cat([net.downs[i - 1].scale(given[i][0]), pooled], dim=1))


def test_each_gate_sees_its_skip_and_the_level_below() -> None:
    net = seeded(partial(AttentionUNet, width=8)).eval()
    features, made = outputs_of([net.first, *net.downs, net.center]), outputs_of(net.ups)
    given, supervised = inputs_of(up.gate for up in net.ups), inputs_of(net.heads)
    with torch.no_grad():
        net(noise(1, 1, 32, 32))
        for i, up in enumerate(net.ups):
            below = made[i - 1] if i else features[4]
            assert given[i][0] is features[3 - i]
            assert given[i][1] is below
            assert torch.equal(made[i], torch.cat([up.up(below), up.gate(features[3 - i], below)], dim=1))
            assert supervised[i][0] is made[i]


def plain_gate() -> AttentionGate:
    """A gate of one channel without a 1×1 convolution and BatchNorm at its end, and with zeros in the level below."""
    gate = AttentionGate(1, 1, 1).eval()
    gate.out = nn.Sequential()
    fill(gate.theta, 1, 0)
    fill(gate.phi[0], 1, 0)
    fill(gate.phi[1], 0, 0)
    fill(gate.psi[1], 1, 0)
    return gate


def test_a_gate_weighs_each_cell_by_hand() -> None:
    """The attention of a 2×2 cell is the sigmoid of its sum, cut at 0, and the same for its four pixels."""
    skip = torch.tensor([[1.0, 0.0, -1.0, -2.0], [0.5, 0.5, -3.0, 4.0]]).view(1, 1, 2, 4)
    attention = torch.tensor([2.0, 2.0, 0.0, 0.0]).sigmoid()
    torch.testing.assert_close(plain_gate()(skip, torch.zeros(1, 1, 1, 2)), skip * attention)


def test_the_level_below_opens_and_closes_a_gate() -> None:
    gate = plain_gate()
    fill(gate.signal[0], 1)
    fill(gate.theta, 0, 0)
    fill(gate.psi[1], 1, -50)  # closed unless the level below is 100
    gate.phi[1].weight.data[0, 0, 1, 1] = 1  # looks at its own cell only
    skip = torch.arange(1.0, 9.0).view(1, 1, 2, 4)
    out = gate(skip, torch.tensor([0.0, 100.0]).view(1, 1, 1, 2))
    expected = torch.tensor([[0.0, 0.0, 3.0, 4.0], [0.0, 0.0, 7.0, 8.0]]).view(1, 1, 2, 4)
    torch.testing.assert_close(out, expected)
