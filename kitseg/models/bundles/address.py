"""Model bundles on Hugging Face: ``hf://owner/name@revision``.

The revision is resolved once, and the hash of the bundle is kept in the cache: the same address gives the same bundle
from then on, without a network, too.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote

from kitseg.errors import KitsegError, UsageError
from kitseg.models.bundles.bundle import Bundle, cache_folder, cached, open_bundle
from kitseg.runtime.provenance import FileFormat
from kitseg.volumes.names import BUNDLE

SCHEMA = 1
SCHEME = "hf://"


@dataclass(frozen=True)
class Found:
    """A file on the server, the commit that holds it, and the hash that the server states."""

    file: str
    commit: str
    sha256: str


_FOUND = FileFormat(Found, SCHEMA)


def fetch_bundle(address: str) -> Bundle:
    """The bundle at an address, from the cache where it was fetched before.

    Raises:
        UsageError: not of the form of an address. KitsegError: the download fails, or gives another bundle than before.
        InputError: the file is not a valid bundle.
    """
    match = re.fullmatch(rf"{SCHEME}([\w.-]+/[\w.-]+)@([\w./-]+)", address, re.ASCII)
    if not match:
        raise UsageError(f"{address}: write it as hf://owner/name@revision, where the revision is a commit or a tag")
    record = cache_folder() / "addresses" / f"{quote(address.removeprefix(SCHEME), safe='@')}.json"
    pinned = _FOUND.read(record).sha256 if record.exists() else None
    if pinned and (bundle := cached(pinned)):
        return bundle
    path, found = _download(address, match[1], match[2], pinned, record)
    bundle = open_bundle(path, found.sha256)
    _FOUND.write(record, {"address": address, **asdict(found)})
    return bundle


def _download(address: str, repo: str, revision: str, pinned: str | None, record: Path) -> tuple[Path, Found]:
    """The file in Hugging Face's own cache, where an interrupted download resumes."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        files = [file for file in info.siblings or [] if file.rfilename.endswith(BUNDLE)]
        if len(files) != 1 or not files[0].lfs or not info.sha:
            raise KitsegError(f"{address}: has {len(files)} {BUNDLE} files; it needs exactly one, stored with Git LFS")
        found = Found(files[0].rfilename, info.sha, files[0].lfs.sha256)
        if pinned not in (None, found.sha256):
            remedy = f"Give a commit as revision, or remove {record}"
            raise KitsegError(f"{address}: holds another bundle than before. {remedy}")
        return Path(HfApi().hf_hub_download(repo, found.file, revision=found.commit)), found
    except KitsegError:
        raise
    except Exception as error:  # any failure of the network or the server
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        remedy = "Try again with a network connection."
        raise KitsegError(f"{address}: the download failed ({reason}). {remedy}") from error
