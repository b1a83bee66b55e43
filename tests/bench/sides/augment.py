"""Processor milliseconds of random changes of one patch and its label: augment.py LIBRARY [EDGE] (one thread)."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from kitseg.types import Triple

EDGE = int(sys.argv[2]) if len(sys.argv) > 2 else 64
SIZE: Triple = (EDGE, EDGE, EDGE)
IMAGE, LABEL = 100 * torch.randn(1, *SIZE), torch.randint(0, 3, (1, *SIZE), dtype=torch.uint8)
Change = Callable[[], Any]


def kitseg() -> dict[str, Change]:
    """kitseg.augmentation."""
    from kitseg.augmentation.batched import NEUTRAL, Augmentation

    off: dict[str, Any] = dict.fromkeys(
        (*NEUTRAL, "rotation", "scale", "bend", "low_resolution", "thick_slices"), (0, 1, 1)
    )
    affine = {"rotation": (1, 10, 20), "scale": (1, 0.8, 1.25)}
    bend = {"bend": (1, 2, 8)}
    intensity = {"blur": (1, 0.4, 1), "low_resolution": (1, 1.2, 2), "noise": (1, 2, 25), "gamma": (1, 0.7, 1.5)}

    def change(**stated: Any) -> Change:
        augmentation = Augmentation(**{**off, "mirror": 0, **stated})

        def once() -> Any:
            drawn = {name: value[None] for name, value in augmentation.draw(SIZE, (1.0, 1, 1)).items()}
            return augmentation(IMAGE[None], LABEL[None], drawn, SIZE)

        return once

    return {
        "affine": change(**affine), "elastic": change(**bend), "both": change(**affine, **bend),
        "blur, low resolution, noise, gamma": change(**intensity),
    }  # fmt: skip


def torchio() -> dict[str, Change]:
    """TorchIO on tensors."""
    import torchio as tio

    subject = tio.Subject(image=tio.ScalarImage(tensor=IMAGE), label=tio.LabelMap(tensor=LABEL))
    affine, bend = tio.RandomAffine(0.2, 20), tio.RandomElasticDeformation()
    intensity = [tio.RandomBlur(1), tio.RandomAnisotropy(), tio.RandomNoise(0, 25), tio.RandomGamma()]
    return _of(lambda parts: tio.Compose(parts)(subject), [affine], [bend], intensity)


def monai() -> dict[str, Change]:
    """MONAI's dictionary transforms."""
    from monai import transforms as mt

    keys, mode = ["image", "label"], ["bilinear", "nearest"]
    affine = mt.RandAffined(keys, prob=1, rotate_range=0.35, scale_range=0.2, mode=mode)
    bend = mt.Rand3DElasticd(keys, prob=1, sigma_range=(8, 8), magnitude_range=(50, 100), mode=mode)
    intensity = [
        mt.RandGaussianSmoothd("image", prob=1, sigma_x=(0.4, 1), sigma_y=(0.4, 1), sigma_z=(0.4, 1)),
        mt.RandSimulateLowResolutiond("image", prob=1),
        mt.RandGaussianNoised("image", prob=1, std=25),
        mt.RandAdjustContrastd("image", prob=1),
    ]
    return _of(lambda parts: mt.Compose(parts)({"image": IMAGE, "label": LABEL}), [affine], [bend], intensity)


def batchgeneratorsv2() -> dict[str, Change]:
    """nnU-Net's transforms."""
    from batchgeneratorsv2.transforms.intensity import gamma, gaussian_noise
    from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
    from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
    from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms

    def spatial(elastic: float, affine: float) -> Any:
        return SpatialTransform(
            SIZE, 0, False, p_elastic_deform=elastic, p_rotation=affine, rotation=(-0.35, 0.35), p_scaling=affine,
            scaling=(0.8, 1.25), bg_style_seg_sampling=False,
        )  # fmt: skip

    intensity = [
        GaussianBlurTransform((0.4, 1.0)), SimulateLowResolutionTransform((0.5, 0.9), False, True, 0),
        gaussian_noise.GaussianNoiseTransform((0, 25.0)), gamma.GammaTransform((0.7, 1.5), 0, False, 1, 1),
    ]  # fmt: skip
    run = lambda parts: ComposeTransforms(parts)(image=IMAGE, segmentation=LABEL.short())  # noqa: E731
    return {**_of(run, [spatial(0, 1)], [spatial(1, 0)], intensity), "both": lambda: run([spatial(1, 1)])}


def kornia() -> dict[str, Change]:
    """kornia's 3D augmentation; it has no elastic deformation, blur or gamma in 3D."""
    from kornia.augmentation import RandomAffine3D

    affine = RandomAffine3D(20.0, scale=(0.8, 1.25), p=1.0)  # AugmentationSequential takes no 3D masks: a second call
    again = RandomAffine3D(20.0, scale=(0.8, 1.25), p=1.0, resample="nearest")
    both = IMAGE[None], LABEL[None].float()
    return {"affine": lambda: (affine(both[0]), again(both[1], params=affine._params))}


def _of(run: Callable[[list[Any]], Any], affine: list[Any], bend: list[Any], intensity: list[Any]) -> dict[str, Change]:
    return {
        "affine": lambda: run(affine), "elastic": lambda: run(bend), "both": lambda: run([*affine, *bend]),
        "blur, low resolution, noise, gamma": lambda: run(intensity),
    }  # fmt: skip


warnings.simplefilter("ignore")
torch.set_num_threads(1)
for name, change in globals()[sys.argv[1]]().items():
    change()
    spent = []
    for _ in range(9):
        begun = time.process_time()
        change()
        spent.append(time.process_time() - begun)
    print(f"{sys.argv[1]} | {EDGE} | {name} | {1000 * sorted(spent)[4]:.1f} ms", flush=True)
