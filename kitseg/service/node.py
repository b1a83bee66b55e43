"""A DICOM node: studies that it receives are predicted, and the results sent to another node."""

from __future__ import annotations

import re
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pynetdicom
from pynetdicom import AE
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    ComprehensiveSRStorage,
    EncapsulatedPDFStorage,
    SegmentationStorage,
)

from kitseg.commands.predict import output_endings
from kitseg.errors import KitsegError, UsageError, is_of_machine
from kitseg.runtime.console import print_plain
from kitseg.runtime.locks import folder_lock
from kitseg.service.receiver import SECONDS, Receiver
from kitseg.service.spool import MOST_TRIES, Spool
from kitseg.service.work import MachineFailure, NoScan, internal_error, scratch

EXPLICIT = "1.2.840.10008.1.2.1"  # the transfer syntax of kitseg's files
FIRST_WAIT, LONGEST_WAIT = 5.0, 600.0  # seconds before another try, each twice the one before
POLL = 0.5  # seconds
_TITLE, _PORT = r"[!-9;-?A-\[\]-~]{1,16}", r"([1-9]\d{0,4})"


@dataclass(frozen=True)
class Address:
    """A DICOM node's AE title, and where it listens."""

    title: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.title}@{self.host}:{self.port}"


@dataclass(frozen=True)
class NodeOptions:
    """own: where the node listens; to: what gets the results; callers: the AE titles that may send.

    endings: of the results' files, as in ``PredictOptions``, with ``anonymous``; quiet: seconds after which a study
    whose association was released is complete.
    """

    own: Address
    to: Address
    callers: Sequence[str]
    endings: Sequence[str] = (".dcm", ".sr.dcm", ".pdf.dcm")
    anonymous: bool = False
    quiet: float = 30.0

    @property
    def kind(self) -> str:
        """Of the results, as the spool distinguishes them."""
        return f"{'-anonymous' if self.anonymous else ''}{''.join(self.endings)}"

    @classmethod
    def parse(
        cls, own: tuple[str, str], to: str, callers: Sequence[str], formats: str, anonymous: bool, quiet: float
    ) -> NodeOptions:
        """From the options of the command line; own: AET:PORT, and the host. Raises UsageError."""
        here = re.fullmatch(rf"({_TITLE}):{_PORT}", own[0])
        there = re.fullmatch(rf"({_TITLE})@(\[[\da-fA-F:]+\]|[\w.-]+):{_PORT}", to)
        if not here or not there or max(int(here[2]), int(there[3])) > 65535:
            raise UsageError(
                f"--dicom {own[0]} --send-to {to}: give AET:PORT and AET@HOST:PORT, an AET of 1 to 16 letters"
            )
        if odd := [title for title in callers if not re.fullmatch(_TITLE, title)]:
            raise UsageError(f"--allow-aet {odd[0]}: give an AE title of 1 to 16 letters")
        endings = output_endings(formats)
        if not all(ending.endswith(".dcm") for ending in endings) or not endings:
            raise UsageError(
                f"--format {formats}: give dicom-seg, dicom-sr or dicom-pdf, or several with commas between"
            )
        receiver = Address(there[1], there[2].strip("[]"), int(there[3]))
        every = tuple(dict.fromkeys((receiver.title, *callers)))
        return cls(Address(here[1], own[1], int(here[2])), receiver, every, endings, anonymous, quiet)


class Node:
    """Receives, predicts and delivers inside a ``with`` block.

    predict: writes the results of a folder of images (``work.Predictor.predict``), in the service's only thread for it.
    """

    def __init__(
        self, options: NodeOptions, spool: Spool, predict: Callable[..., list[Path]], thread: ThreadPoolExecutor
    ) -> None:
        self.options, self.spool, self.predict, self.thread = options, spool, predict, thread
        self.receiver = Receiver(options.own.title, options.callers, spool)
        self._stop, self._stack = threading.Event(), ExitStack()
        self._predicted: Path | None = None
        spool.open()
        spool.kind = options.kind
        pynetdicom._config.STORE_SEND_CHUNKED_DATASET = True

    def __enter__(self) -> Node:
        own = self.options.own
        with ExitStack() as stack:
            stack.enter_context(folder_lock(self.spool.folder, "studies"))
            stack.enter_context(scratch(self.spool.folder))
            self.spool.clean()
            stack.callback(setattr, threading, "excepthook", threading.excepthook)
            threading.excepthook = _thread_failed  # pynetdicom's threads may fail where a peer breaks its rules
            try:
                self.receiver.start(own.host, own.port)
            except OSError as error:
                raise UsageError(f"--dicom: can't listen on {own.host}, port {own.port} ({error.strerror})") from error
            for step in (self._work, self._deliver):
                thread = threading.Thread(target=self._repeat, args=(step,))
                thread.start()
                stack.callback(thread.join)
            stack.callback(self._stop.set)
            stack.callback(self.receiver.stop)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        if study := self._predicted:  # the process may end before its prediction does
            self.spool.forgive(study)
        self._stack.close()

    def _repeat(self, step: Callable[[Path], bool]) -> None:
        """Do a step for each study until the node stops; where it fails, again after a while, and then a longer one."""
        due: dict[Path, tuple[float, float]] = {}
        while not self._stop.wait(POLL):
            try:
                studies = self.spool.studies()
            except OSError as error:  # such as a disk that is not there for a while
                print_plain(f"{self.spool.folder}: can't be read ({error.strerror})")
                continue
            due = {study: due[study] for study in studies if study in due}
            for study in studies:
                when, wait = due.get(study, (0.0, FIRST_WAIT))
                if self._stop.is_set() or time.monotonic() < when:
                    continue
                if self._done(step, study):
                    due.pop(study, None)
                else:
                    due[study] = (time.monotonic() + wait, min(2 * wait, LONGEST_WAIT))

    def _done(self, step: Callable[[Path], bool], study: Path) -> bool:
        try:
            return step(study)
        except Exception as error:  # whatever goes wrong with one study, the next one has its turn
            self._tell(study, internal_error(error))
            return False

    def _work(self, study: Path) -> bool:
        """Predict a study if it is its turn; False: it failed."""
        if self.receiver.is_receiving(study):
            return True
        if self.spool.abandon(study):
            self._tell(study, "not complete or not predicted within a day, removed")
            return True
        if not self.spool.is_due(study, self.options.quiet):
            return True
        if (study / "known").exists():
            self._tell(study, "its sender has kitseg's results already")
            return self.spool.finish(study, self.spool.images(study))
        images, begun = self.spool.begin(study), time.perf_counter()
        self._predicted = study
        try:
            with tempfile.TemporaryDirectory() as folder:
                to, options = Path(folder) / "out", self.options
                made = self.thread.submit(self.predict, study / "images", to, options.endings, options.anonymous)
                self.spool.keep(study, made.result(), images)
        except NoScan as error:
            self._tell(study, f"removed, {error}")
            return self.spool.finish(study, images)
        except Exception as error:
            text = str(error) if isinstance(error, KitsegError) else internal_error(error)
            if isinstance(error, MachineFailure) or is_of_machine(error):
                self.spool.forgive(study)
                self._tell(study, f"not predicted, tried again later: {text}")
            else:
                self._tell(study, f"try {self.spool.tries(study)} of {MOST_TRIES}: {text}")
            return False
        finally:
            self._predicted = None
        self._tell(study, f"{images} images predicted in {time.perf_counter() - begun:.1f} s")
        return True

    def _deliver(self, study: Path) -> bool:
        """Send a study's results if there are some; False: not all were accepted."""
        images, files = self.spool.images(study), self.spool.results(study)
        if files is None:
            return True
        if problem := send(files, self.options.to, self.options.own.title):
            self._tell(study, f"not delivered: {self.options.to} {problem}")
            return False
        self._tell(study, "delivered")
        self.spool.finish(study, images)
        return True

    def _tell(self, study: Path, text: str) -> None:
        print_plain(f"study {study.name[:8]}: {text}")


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    print_plain(f"an association ended with an internal error: {failure.exc_type.__name__}")


def send(files: Sequence[Path], to: Address, title: str) -> str:
    """Send results with this calling AE title, and remove what was accepted; the problem, empty if there was none.

    What is refused doesn't hold up the others: a PACS may take reports, but no segmentations.
    """
    ae = AE(title)
    ae.connection_timeout = ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = SECONDS
    for uid in (SegmentationStorage, ComprehensiveSRStorage, EncapsulatedPDFStorage):
        ae.add_requested_context(uid, EXPLICIT)
    association = ae.associate(to.host, to.port, ae_title=to.title)
    if not association.is_established:
        return "rejects the association" if association.is_rejected else "does not answer"
    problem = ""
    try:
        for file in files:
            try:
                status = association.send_c_store(file).get("Status")
            except ValueError:
                problem = "does not accept such objects"
                continue
            if status is None:
                return "does not answer"
            if status and status & 0xF000 != 0xB000:  # 0xBnnn: accepted, with a warning
                problem = f"refuses an object (status {status:04X})"
                continue
            file.unlink()
    except RuntimeError:
        return "ended the association"
    finally:
        association.release()
    return problem
