"""Receives studies over DICOM (C-STORE, C-ECHO) into a spool, within limits that a hostile peer can't exceed."""

from __future__ import annotations

import logging
import os
import socket
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pynetdicom
from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, AllStoragePresentationContexts, evt
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    CTImageStorage,
    EnhancedCTImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
    Verification,
)

from kitseg.runtime.console import print_plain
from kitseg.service.spool import Spool
from kitseg.volumes.dicom.headers import Header, read_dicom_header

DEFLATED = "1.2.840.10008.1.2.1.99"  # unpacks in memory to any size, so it isn't accepted
#: Transfer syntaxes of CT images that kitseg reads: uncompressed, JPEG, JPEG-LS, JPEG 2000, RLE.
READABLE = [f"1.2.840.10008.1.2{end}" for end in ("", ".1", ".2", ".5")]
READABLE += [f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 57, 70, 80, 81, 90, 91)]
SUCCESS, NO_ROOM, UNREADABLE = 0x0000, 0xA700, 0xC000
ASSOCIATIONS = 8  # at once
LARGEST = 256 << 20  # bytes of an object on its way to the disk
LARGEST_IMAGE = 32 << 20  # bytes; headers are read in memory
_PDU = 1 << 16  # bytes, as negotiated
_MEMORY = 1 << 20  # bytes of a PDU, and of a message that doesn't go to the disk
SECONDS = 60.0  # for a PDU, and between two
SILENT = 15.0  # seconds of a connection before its association


@dataclass
class _Session:
    """An association: the instances of each study that it brought, the objects whose study is not known, its bytes."""

    studies: dict[Path, set[str]] = field(default_factory=dict)
    lost: int = 0
    pending: float = 0.0
    memory: int = 0


class Receiver:
    """A storage provider.

    title: its AE title; callers: the AE titles that may call it; spool: where CT images go. Other objects are accepted,
    so that whole studies can be sent, and not kept; those of kitseg mark their study as known.
    """

    def __init__(self, title: str, callers: Sequence[str], spool: Spool) -> None:
        self.spool = spool
        logging.getLogger("pynetdicom").setLevel(logging.CRITICAL + 1)  # its lines may quote patient data
        warnings.simplefilter("ignore")  # so may pydicom's; a filter of one thread ends with that of any other
        pynetdicom._config.STORE_RECV_CHUNKED_DATASET = True  # straight to a temporary file
        self._ae = AE(title)
        self._ae.require_called_aet = True
        self._ae.require_calling_aet = list(callers)
        self._ae.maximum_associations, self._ae.maximum_pdu_size = ASSOCIATIONS, _PDU
        self._ae.network_timeout = self._ae.dimse_timeout = SECONDS
        self._ae.acse_timeout = SILENT
        others = [uid for uid in ALL_TRANSFER_SYNTAXES if uid != DEFLATED]
        for uid in (str(context.abstract_syntax) for context in AllStoragePresentationContexts):
            self._ae.add_supported_context(uid, READABLE if uid == CTImageStorage else others)
        self._ae.add_supported_context(Verification)

    def start(self, host: str, port: int) -> None:
        """Listen, in threads of its own. Raises OSError: the address can't be used."""
        handlers: list[Any] = [
            (evt.EVT_CONN_OPEN, self._opened),
            (evt.EVT_C_ECHO, self._echo),
            (evt.EVT_C_STORE, self._store),
            (evt.EVT_RELEASED, self._released),
            (evt.EVT_CONN_CLOSE, self._closed),
        ]
        self._server = self._ae.start_server((host, port), block=False, evt_handlers=handlers)

    def stop(self) -> None:
        """Listen no more, and abort the open associations."""
        if self._server:
            self._server.shutdown()
        open_ones = [one for one in self._ae.active_associations if one.is_established]
        for association in open_ones:
            association.abort()
        for association in open_ones:
            association.join(SECONDS)

    def is_receiving(self, study: Path) -> bool:
        """Whether an association that brought a part of the study is still open."""
        return any(study in _session(one).studies for one in self._ae.active_associations if hasattr(one, "kitseg"))

    def _opened(self, event: evt.Event) -> None:
        association: Any = event.assoc
        association.kitseg = session = _Session()
        link = association.dul.socket
        link.recv = _bounded(association, session, link.socket)

    def _closed(self, event: evt.Event) -> None:
        """Remove the object whose transfer broke off; an image is noted as refused."""
        if path := getattr(event.assoc.dimse.message, "_data_set_path", None):
            with suppress(OSError):
                header = _header(Path(path))
                if header and header.sop_class == CTImageStorage and header.manufacturer != "kitseg":
                    self.spool.refuse(self.spool.study(header.patient, header.study), header.instance)
            with suppress(OSError):
                Path(path).unlink()

    def _echo(self, event: evt.Event) -> int:
        _session(event.assoc).memory = 0
        return SUCCESS

    def _store(self, event: evt.Event) -> int:
        session, path = _session(event.assoc), event.dataset_path
        session.memory, session.lost = 0, session.lost + 1  # until the spool knows, whatever happens meanwhile
        session.pending = max(0.0, session.pending - 1.01 * path.stat().st_size - 4096)  # with what the protocol adds
        status = self._file(path, event.request.AffectedSOPClassUID == CTImageStorage, session)
        session.lost -= status != UNREADABLE
        return status

    def _file(self, path: Path, is_ct: bool, session: _Session) -> int:
        is_too_large, header = path.stat().st_size > LARGEST_IMAGE, _header(path)
        if header is None:
            return UNREADABLE if is_ct else SUCCESS
        study = self.spool.study(header.patient, header.study)
        if header.manufacturer == "kitseg":
            self.spool.mark_known(study)
            session.studies.setdefault(study, set())
        elif header.sop_class == CTImageStorage:
            if is_too_large:
                self.spool.refuse(study, header.instance)
            if is_too_large or not self.spool.add(study, header.instance, path):
                return NO_ROOM
            session.studies.setdefault(study, set()).add(header.instance)
        elif header.sop_class in (EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage):
            print_plain(f"study {study.name[:8]}: an enhanced multi-frame CT, which can't be predicted, is dropped")
        return SUCCESS

    def _released(self, event: evt.Event) -> None:
        session = _session(event.assoc)
        if not session.lost and event.assoc.dimse.msg_queue.empty():  # it did not leave before its last answer
            self.spool.close(session.studies)


def _header(path: Path) -> Header | None:
    """The header of an object; None: it doesn't state its study and instance. A large file is cut off behind it."""
    if path.stat().st_size > LARGEST_IMAGE:
        os.truncate(path, LARGEST_IMAGE)
    found = read_dicom_header(path)
    return found if found and not found.broken and found.study and found.instance else None


def _session(association: Any) -> _Session:
    found: _Session = association.kitseg
    return found


def _bounded(association: Any, session: _Session, link: socket.socket) -> Callable[[int], bytearray]:
    """Reads from a connection, which ends when a peer sends more than it may, or too slowly."""

    def receive(count: int) -> bytearray:
        if getattr(association.dimse.message, "_data_set_file", None):
            session.pending += count
        else:
            session.memory += count
        if count > _MEMORY or session.memory > _MEMORY or session.pending > LARGEST:
            raise ConnectionError("more than a peer may send")
        found, ends = bytearray(), time.monotonic() + SECONDS
        while len(found) < count:
            link.settimeout(max(ends - time.monotonic(), 0.001))
            if not (part := link.recv(min(count - len(found), 1 << 16))):
                break
            found += part
        link.settimeout(SECONDS)
        return found

    return receive
