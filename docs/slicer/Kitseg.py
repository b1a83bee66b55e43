"""3D Slicer module: `kitseg predict` on a loaded volume, the result as a segmentation with names and colors.

kitseg is installed outside Slicer; the module runs its command.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import ctk
import qt
import slicer
from slicer.ScriptedLoadableModule import (
    ScriptedLoadableModule,
    ScriptedLoadableModuleLogic,
    ScriptedLoadableModuleWidget,
)


class Kitseg(ScriptedLoadableModule):
    """The module's entry in Slicer's menu."""

    def __init__(self, parent: object) -> None:
        super().__init__(parent)
        parent.title = "Kitseg"
        parent.categories = ["Segmentation"]
        parent.contributors = ["The kitseg developers"]
        parent.helpText = "Finds kidneys, kidney tumors and cysts in a CT with kitseg. Research use only."


class KitsegWidget(ScriptedLoadableModuleWidget):
    """Choose the command and the volume, and run."""

    def setup(self) -> None:
        """Build the form."""
        super().setup()
        box = ctk.ctkCollapsibleButton()
        box.text = "Kidneys, tumors, cysts"
        self.layout.addWidget(box)
        form = qt.QFormLayout(box)
        self.command = qt.QLineEdit(qt.QSettings().value("Kitseg/command") or shutil.which("kitseg") or "kitseg")
        self.model = qt.QLineEdit("builtin")
        self.volume = slicer.qMRMLNodeComboBox()
        self.volume.nodeTypes = ["vtkMRMLScalarVolumeNode"]
        self.volume.addEnabled = self.volume.removeEnabled = False
        self.volume.setMRMLScene(slicer.mrmlScene)
        self.button = qt.QPushButton("Predict")
        self.button.connect("clicked(bool)", self.on_predict)
        for name, part in (("kitseg command", self.command), ("Model", self.model), ("CT", self.volume)):
            form.addRow(name, part)
        form.addRow(self.button)
        self.layout.addStretch(1)

    def on_predict(self) -> None:
        """Run, with Slicer waiting; errors are shown in a dialog."""
        qt.QSettings().setValue("Kitseg/command", self.command.text)
        with slicer.util.tryWithErrorDisplay("kitseg failed.", waitCursor=True):
            KitsegLogic().predict(self.volume.currentNode(), self.command.text, self.model.text)


class KitsegLogic(ScriptedLoadableModuleLogic):
    """What the module does, without its window."""

    def predict(self, volume: object, command: str = "kitseg", model: str = "builtin") -> object:
        """The segmentation node of a volume node. Raises RuntimeError: there is none, or what kitseg printed."""
        if volume is None:
            raise RuntimeError("Load a CT and choose it.")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if not slicer.util.saveNode(volume, str(folder / "scan.nii.gz")):
                raise RuntimeError("The volume could not be saved.")
            call = [command, "predict", "scan.nii.gz", "-o", "out", "--format", "seg.nrrd", "--model", model]
            done = subprocess.run(
                call,
                cwd=folder,
                env=slicer.util.startupEnvironment(),  # without the variables of Slicer's own Python
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            if done.returncode:
                raise RuntimeError(done.stdout)
            segmentation = slicer.util.loadSegmentation(str(folder / "out" / "scan.seg.nrrd"))
        segmentation.SetName(f"{volume.GetName()} kitseg")
        segmentation.SetAndObserveTransformNodeID(volume.GetTransformNodeID())  # which the file doesn't have
        segmentation.SetReferenceImageGeometryParameterFromVolumeNode(volume)
        return segmentation
