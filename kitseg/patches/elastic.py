"""Elastic deformation of slices, as in the two-stage paper's code."""

from __future__ import annotations

import torch
import torchio as tio


class ElasticSlices(tio.RandomElasticDeformation):
    """Cubic B-spline deformation in the plane of the slices; none along them.

    The displacements of the control points are normally distributed, in pixels of the slice and the same in all slices
    of a patch. TorchIO's own are uniform, in millimetres, and smoothed along the slices too.

    Args:
        points: control points along rows and columns (7: a mesh of 4 × 4).
        deviation: of a control point's displacement, as a fraction of the slice's width.
        p: probability of a deformation.
    """

    def __init__(self, points: int, deviation: float, p: float = 1.0) -> None:
        super().__init__(num_control_points=(points, points, 4), locked_borders=0, p=p)  # columns, rows, slices
        self.deviation = deviation

    def apply_transform(self, subject: tio.Subject) -> tio.Subject:
        """A patch with its images and labels deformed alike."""
        _, row_mm, column_mm = subject.spacing
        points, _, slices = self.num_control_points
        deviation = self.deviation * subject.spatial_shape[2] * torch.tensor([column_mm, row_mm, 0])
        control = (torch.randn(points, points, 1, 3) * deviation).expand(-1, -1, slices, -1)  # mm
        x, y, z = control.abs().amax((0, 1, 2)).tolist()
        deformed: tio.Subject = tio.ElasticDeformation(control.numpy(), (x, y, z))(subject)
        return deformed
