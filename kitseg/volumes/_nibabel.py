"""nibabel, imported without pydicom, which takes a quarter of a second and is for a NIfTI extension that isn't read."""

from __future__ import annotations

import sys

_blocked = "pydicom" not in sys.modules
if _blocked:
    sys.modules["pydicom"] = None  # type: ignore[assignment]
try:
    import nibabel
finally:
    if _blocked:
        del sys.modules["pydicom"]

__all__ = ["nibabel"]
