"""Augmentation on the device: what each change does, and that a patch depends on nothing but its address."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import kitseg
from method_runs import quick
from nifti_files import stored_case
from torch import Tensor

from kitseg import config
from kitseg.augmentation import intensity, spatial
from kitseg.augmentation.batched import Augmentation
from kitseg.errors import UsageError
from kitseg.links.guides import GuidedByForeground
from kitseg.links.input_transform import InputTransform
from kitseg.links.intensity import ClipScale
from kitseg.patches.datamodule import Feed, StageCases, StageData
from kitseg.patches.queue import seeded
from kitseg.patches.samplers import ForegroundSampler, PaddedSampler, SliceSampler
from kitseg.patches.subjects import StageInput
from kitseg.training.fit import make_feed
from kitseg.training.rehearsal import _random_patch
from kitseg.types import Box, Geometry, Triple

NOTHING: dict[str, Any] = {field.name: 0 if field.name == "mirror" else (0, 1, 1) for field in fields(Augmentation)}
SIZE: Triple = (8, 12, 10)
#: Each change with certainty.
SINGLY: dict[str, dict[str, Any]] = {
    "mirror": {"mirror": 1},
    "rotation": {"rotation": (1, 10, 30)},
    "scale": {"scale": (1, 0.8, 0.9)},
    "bend": {"bend": (1, 4, 4)},
    "phase": {"phase": (1, 1.5, 1.5)},
    "blur": {"blur": (1, 0.8, 0.8)},
    "low_resolution": {"low_resolution": (1, 2, 2)},
    "thick_slices": {"thick_slices": (1, 6, 6)},
    "noise": {"noise": (1, 20, 20)},
    "brightness": {"brightness": (1, 10, 10)},
    "contrast": {"contrast": (1, 0.8, 0.8)},
    "gamma": {"gamma": (1, 0.7, 0.7)},
}


def patches(size: Triple = SIZE, count: int = 2) -> tuple[Tensor, Tensor]:
    """Random tissue, with a block of kidney and one of tumor in it."""
    generator = torch.Generator().manual_seed(3)
    label = torch.zeros(count, 1, *size, dtype=torch.uint8)
    label[:, :, 2:6, 3:9, 2:8], label[:, :, 3:5, 5:7, 3:6] = 1, 2
    hu = 40 + 20 * torch.randn(count, 1, *size, generator=generator) + 100 * (label > 0)
    return hu, label


def changed(augmentation: Augmentation, hu: Tensor, label: Tensor, size: Triple = SIZE) -> tuple[Tensor, Tensor]:
    drawn = []
    for number in range(len(hu)):
        with seeded(number):
            drawn.append(augmentation.draw(size, (3.0, 1.0, 1.0)))
    changes = {name: torch.stack([one[name] for one in drawn]) for name in drawn[0]}
    return augmentation(hu, label, changes, size)


@pytest.mark.parametrize("margin", [0, 2])
def test_nothing_drawn_is_the_patch_itself(margin: int) -> None:
    hu, label = patches((8 + 2 * margin, 12 + 2 * margin, 10 + 2 * margin))
    out, ids = changed(Augmentation(**NOTHING), hu, label)
    inner = (..., *(slice(margin, margin + n) for n in SIZE))
    assert torch.equal(out, hu[inner])
    assert torch.equal(ids, label[inner])


def test_left_and_right_are_exchanged_exactly() -> None:
    hu, label = patches()
    out, ids = changed(Augmentation(**{**NOTHING, "mirror": 1}), hu, label)
    assert torch.equal(out, hu.flip(-1))
    assert torch.equal(ids, label.flip(-1))


@pytest.mark.parametrize("name", SINGLY)
def test_each_change_alone(name: str) -> None:
    """It changes the image; the label only where the image moves. A batch changes its input nowhere."""
    hu, label = patches()
    before = hu.clone(), label.clone()
    out, ids = changed(Augmentation(**{**NOTHING, **SINGLY[name]}), hu, label)
    assert not torch.allclose(out, hu, atol=0.5)
    assert out.isfinite().all()
    moves = name in ("mirror", "rotation", "scale", "bend")
    assert torch.equal(ids, label) is not moves
    assert torch.equal(hu, before[0])
    assert torch.equal(label, before[1])


def test_a_quarter_turn_moves_each_voxel_to_its_place() -> None:
    matrix = spatial.rotation((90, 0, 0))
    assert torch.allclose(matrix @ torch.tensor([0.0, 0, 1]), torch.tensor([0.0, -1, 0]), atol=1e-6)
    hu, label = patches((4, 9, 9), count=1)
    label[0, 0, 1, 2, 7], hu[0, 0, 1, 2, 7] = 3, 500
    grid = spatial.sampling_grid((4, 9, 9), (4, 9, 9), torch.tensor([[3.0, 1, 1]]), matrix[None], _straight())
    out, ids = spatial.resample(hu, label, grid)
    assert torch.allclose(out, hu.rot90(-1, (3, 4)), atol=1e-2)
    assert torch.equal(ids, label.rot90(-1, (3, 4)))


def test_millimetres_count_not_voxels() -> None:
    """Slices 3 mm apart, a quarter turn about the columns: from 1 slice above the centre to 3 rows from it."""
    hu, label = torch.zeros(1, 1, 9, 9, 9), torch.zeros(1, 1, 9, 9, 9, dtype=torch.uint8)
    hu[0, 0, 3, 4, 4] = 100
    matrix = spatial.rotation((0, 0, 90))
    grid = spatial.sampling_grid((9, 9, 9), (9, 9, 9), torch.tensor([[3.0, 1, 1]]), matrix[None], _straight())
    found = spatial.resample(hu, label, grid)[0][0, 0]
    assert float(found.max()) == pytest.approx(100, abs=0.01)
    assert torch.argwhere(found > 99).tolist() in ([[4, 1, 4]], [[4, 7, 4]])


def _straight() -> Tensor:
    return torch.zeros(1, 3, *[spatial.CONTROL_POINTS] * 3)


def test_an_even_displacement_shifts_by_millimetres() -> None:
    """B-splines sum to 1: control points that all move by 2 mm along columns of 1 mm shift the patch by two columns."""
    hu, label = patches(count=1)
    bend = _straight()
    bend[:, 2] = 2
    grid = spatial.sampling_grid(SIZE, SIZE, torch.tensor([[3.0, 1, 1]]), torch.eye(3)[None], bend)
    out, ids = spatial.resample(hu, label, grid)
    assert torch.allclose(out[..., :-2], hu[..., 2:], atol=1e-2)
    assert torch.equal(ids[..., :-2], label[..., 2:])


@pytest.mark.parametrize("size", [SIZE, (1, 24, 20), (20, 20, 20)])
def test_labels_follow_their_images(size: Triple) -> None:
    """HU that are 100 times the label stay within an interpolation of it, whatever moves them."""
    label = torch.zeros(6, 1, *size, dtype=torch.uint8)
    label[:, :, :, 4:9, 3:8] = 1
    moving = Augmentation(
        **{**NOTHING, "mirror": 0.5, "rotation": (1, 10, 30), "scale": (1, 0.8, 1.2), "bend": (1, 1, 3)}
    )
    out, ids = changed(moving, 100 * label.float(), label, size)
    assert not torch.equal(ids, label)
    assert torch.equal(out[:, 0] > 50.01, (ids[:, 0] > 0) & (out[:, 0] > 50.01))
    assert bool((ids[out < 49.99] == 0).all())


def test_slices_and_flat_patches_stay_in_their_plane() -> None:
    """Slices that are even stay even: nothing of the neighbours comes in."""
    hu = 100 * torch.arange(4.0).view(1, 1, 4, 1, 1).expand(3, 1, 4, 40, 40).clone()
    label = torch.zeros(3, 1, 4, 40, 40, dtype=torch.uint8)
    moving = Augmentation(**{**NOTHING, "rotation": (1, 40, 40), "scale": (1, 0.7, 0.8), "bend": (1, 5, 5)})
    out, _ = changed(moving, hu, label, (4, 40, 40))
    assert torch.allclose(out, hu, atol=1e-2)


def test_noise_is_nearly_normal_and_depends_on_its_key_alone() -> None:
    flat = torch.zeros(3, 1, 32, 32, 32)
    made = intensity.noise(flat, torch.tensor([20.0, 20, 10]), torch.tensor([7, 8, 7]))
    assert made.flatten(1).std(1).tolist() == pytest.approx([20, 20, 10], rel=0.02)
    assert made.flatten(1).mean(1).tolist() == pytest.approx([0, 0, 0], abs=0.4)
    assert torch.allclose(made[0], 2 * made[2], atol=1e-4)
    sides = torch.corrcoef(torch.stack([made[0].flatten(), made[1].flatten(), made[0].roll(1, -1).flatten()]))
    assert float((sides - torch.eye(3)).abs().max()) < 0.02
    alone = intensity.noise(flat[:1], torch.tensor([20.0]), torch.tensor([8]))
    assert torch.equal(alone[0], made[1])


def test_intensities_at_hand_checked_values() -> None:
    hu = torch.tensor([-1000.0, -200, 75, 350, 900]).view(1, 1, 1, 1, 5)
    values = {
        "contrast": (intensity.contrast(hu, torch.tensor([2.0])), [-2050, -450, 100, 650, 1750]),
        "brightness": (intensity.brightness(hu, torch.tensor([5.0])), [-995, -195, 80, 355, 905]),
        "gamma": (intensity.gamma(hu, torch.tensor([2.0])), [-1000, -200, -62.5, 350, 900]),
    }
    for found, expected in values.values():
        assert found.flatten().tolist() == pytest.approx(expected, abs=1e-3)
    kidney = torch.ones(1, 1, 1, 1, 5, dtype=torch.uint8)
    assert intensity.phase(hu, kidney, torch.tensor([0.5])).flatten().tolist() == [-1000, -200, 52.5, 190, 465]
    assert torch.equal(intensity.phase(hu, 0 * kidney, torch.tensor([0.5])), hu)


def test_blur_and_coarse_voxels_keep_the_mean() -> None:
    point = torch.zeros(1, 1, 9, 9, 9)
    point[0, 0, 4, 4, 4] = 1
    blurred = intensity.blur(point, torch.tensor([0.8]))
    assert float(blurred.sum()) == pytest.approx(1, abs=1e-5)
    assert torch.allclose(blurred, blurred.permute(0, 1, 4, 2, 3), atol=1e-7)
    steps = torch.arange(8.0).view(1, 1, 8, 1, 1).expand(1, 1, 8, 4, 4)
    thick = intensity.coarser(steps, torch.tensor([[2.0, 1, 1]]))
    assert thick[0, 0, :, 0, 0].tolist() == pytest.approx([0.5, 1, 2, 3, 4, 5, 6, 6.5])
    assert torch.allclose(thick, thick[..., :1, :1])


# --- as training uses it ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two cases with a bright kidney."""
    root, native = tmp_path_factory.mktemp("stored"), Geometry((14, 30, 30), np.diag([-2.0, -1, 1, 1])[[2, 1, 0, 3]])
    found = []
    for number in range(2):
        label = np.zeros(native.shape, np.uint8)
        label[3:11, 8:22, 6 + number : 20], label[5:8, 10:14, 9:13] = 1, 2
        hu = np.random.default_rng(number).normal(0, 20, native.shape) + 150 * (label > 0)
        found.append(stored_case(root, hu, label, native, number))
    return found


def batches(folders: list[Path], sampler: PaddedSampler, batch: int, workers: int = 0) -> list[Any]:
    """An epoch's batches as a training step gets them."""
    feed = Feed(sampler, [Augmentation()], InputTransform(ClipScale(-200, 200, 200), None), batch, batch, 5, workers)
    data = StageData(lambda: StageCases(dict.fromkeys(folders, StageInput(Box((0, 0, 0), (14, 30, 30)))), {}), feed)
    data.setup("fit")
    cpu = torch.device("cpu")
    moved = (data.transfer_batch_to_device(found, cpu, 0) for found in data.train_dataloader())
    return [data.on_after_batch_transfer(found, 0) for found in moved]


@pytest.mark.parametrize("sampler", [ForegroundSampler((8, 16, 16), 0.5, 6), SliceSampler()])
def test_the_same_address_is_the_same_patch_in_any_batch(folders: list[Path], sampler: PaddedSampler) -> None:
    def epoch(batch: int, workers: int = 0) -> tuple[Tensor, Tensor]:
        found = batches(folders, sampler, batch, workers)
        return tuple(torch.cat([one[name]["data"] for one in found]) for name in ("image", "label"))  # type: ignore[return-value]

    image, label = epoch(1)
    assert (
        image.shape[2:] == label.shape[2:] == (torch.Size([8, 16, 16]) if len(image) == 12 else torch.Size([1, 30, 30]))
    )
    assert len({one.numpy().tobytes() for one in image}) == len(image)
    for other in (epoch(2), epoch(4, workers=1)):
        assert torch.allclose(other[0], image, atol=1e-5)
        assert torch.equal(other[1], label)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("size", [(8, 24, 20), (1, 24, 20), (20, 20, 20)])
def test_a_gpu_makes_the_same_patches(size: Triple) -> None:
    hu, label = torch.randn(8, 1, *size) * 100, torch.randint(0, 4, (8, 1, *size), dtype=torch.uint8)
    image, ids = changed(Augmentation(), hu, label, size)
    there, ids_there = changed(Augmentation(), hu.cuda(), label.cuda(), size)
    assert torch.allclose(there.cpu(), image, atol=0.05)
    assert float((ids_there.cpu() == ids).float().mean()) > 0.999


def test_a_guide_moves_with_the_image(folders: list[Path], tmp_path: Path) -> None:
    link, guides = GuidedByForeground((2, 2, 2)), {}
    for folder in folders:
        label = np.load(folder / "label.npy")
        np.save(tmp_path / f"{folder.name}.npy", link.guide(label.astype(np.float32), label > 0))
        guides[folder] = StageInput(Box((0, 0, 0), (14, 30, 30)), tmp_path / f"{folder.name}.npy")
    feed = Feed(
        ForegroundSampler((8, 16, 16), 1, 3),
        [Augmentation()],
        InputTransform(ClipScale(-200, 200, 200), link),
        2,
        2,
        0,
        0,
    )
    data = StageData(lambda: StageCases(guides, {}), feed)
    data.setup("fit")
    for raw in data.train_dataloader():
        found = feed.on_device(raw)
        assert found["image"]["data"].shape == (2, 4, 8, 16, 16)
        mask, label = found["image"]["data"][:, 3] > 0, found["label"]["data"][:, 0] > 0
        assert float((mask & label).sum() / label.sum()) > 0.98


def test_any_method_takes_it_with_one_setting(tmp_path: Path, phantoms: Path) -> None:
    """Whole slices take a training step with it, through the command line."""
    setting = "--set=stages.*.augmentation=[{_target_: kitseg.augmentation.batched.Augmentation, mirror: 0}]"
    (tmp_path / "data").symlink_to(phantoms / "data")
    found = kitseg(tmp_path, "train", *quick("progressive"), "--dry-run", setting)
    assert found.code == 0, found.text


def test_a_class_with_a_side_is_not_mirrored() -> None:
    spec = config.method_of(config.compose("resenc", "tiny")).stages["kidneys"]
    (part,) = spec.parts["augmentation"]

    def fed(*augmentation: Any) -> Feed:
        parts = {**spec.parts, "augmentation": augmentation}
        return make_feed(replace(spec, channels=("background", "kidney_left"), parts=parts), 0, 0)

    with pytest.raises(UsageError, match="kidney_left has a side"):
        fed(part)
    assert fed({**part, "mirror": 0}).batched is not None
    with pytest.raises(UsageError, match="scale is"):
        fed({**part, "mirror": 0, "scale": [0.3, 0, 1]})
    with pytest.raises(UsageError, match="must be the last"):
        fed({**part, "mirror": 0}, {"_target_": "torchio.RandomNoise"})


def test_changes_of_intensity_leave_a_guide_as_it_is() -> None:
    noise = "{_target_: torchio.RandomNoise, std: [25, 25]}"
    either = f"[{noise}, {{_target_: torchio.OneOf, transforms: [{noise}]}}]"
    composed = config.compose("guided-unetpp", "tiny", [f"stages.segment.augmentation={either}"])
    feed = make_feed(config.method_of(composed).stages["segment"], 0, 0)
    for change in feed.augmentation:
        patch = _random_patch(feed, (1, 8, 8))
        hu, guide = patch["image"].data.clone(), patch["guide"].data.clone()
        patch = change(patch)
        assert torch.equal(patch["guide"].data, guide)
        assert float((patch["image"].data - hu).std()) > 15


def test_an_augmentation_that_would_not_be_used_is_refused() -> None:
    composed = config.compose("resenc", "tiny", ["stages.kidneys.augmentation=[{_target_: torch.nn.Identity}]"])
    with pytest.raises(UsageError, match=r"stages.kidneys.augmentation: Identity must be a torchio.Transform"):
        make_feed(config.method_of(composed).stages["kidneys"], 0, 0)
