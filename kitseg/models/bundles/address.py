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
from kitseg.models.bundles.bundle import SUFFIX, Bundle, cache_folder, cached, open_bundle
from kitseg.runtime.provenance import FileFormat

SCHEMA = 1
SCHEME = "hf://"


@dataclass(frozen=True)
class Address:
    """A bundle's repository and the revision in it: a commit, a tag or a branch."""

    repo: str
    revision: str

    def __str__(self) -> str:
        return f"{SCHEME}{self.repo}@{self.revision}"

    @property
    def record(self) -> Path:
        """The file in the cache that holds the hash of its bundle."""
        return cache_folder() / "addresses" / f"{quote(f'{self.repo}@{self.revision}', safe='@')}.json"


@dataclass(frozen=True)
class Found:
    """A file on the server, the commit that holds it, and the hash that the server states."""

    file: str
    commit: str
    sha256: str


_FOUND = FileFormat(Found, SCHEMA)


def fetch_bundle(text: str) -> Bundle:
    """The bundle at an address, from the cache where it was fetched before.

    Raises:
        UsageError: not of the form of an address. KitsegError: the download fails, or gives another bundle than before.
        InputError: the file is not a valid bundle.
    """
    match = re.fullmatch(rf"{SCHEME}([\w.-]+/[\w.-]+)@([\w./-]+)", text, re.ASCII)
    if not match:
        raise UsageError(f"{text}: write it as hf://owner/name@revision, where the revision is a commit or a tag")
    address = Address(match[1], match[2])
    pinned = _FOUND.read(address.record).sha256 if address.record.exists() else None
    if pinned and (bundle := cached(pinned)):
        return bundle
    found = _ask(address)
    if pinned not in (None, found.sha256):
        raise KitsegError(
            f"{address}: holds another bundle than before. Give a commit as revision, or remove {address.record}"
        )
    bundle = open_bundle(_download(address, found), found.sha256)
    _FOUND.write(address.record, {"address": str(address), **asdict(found)})
    return bundle


def _ask(address: Address) -> Found:
    """Ask the server for the bundle at an address."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(address.repo, revision=address.revision, files_metadata=True)
    except Exception as error:  # any failure of the network or the server
        raise _unreachable(address, error) from error
    files = [file for file in info.siblings or [] if file.rfilename.endswith(SUFFIX)]
    if len(files) != 1 or not files[0].lfs or not info.sha:
        raise KitsegError(f"{address}: has {len(files)} {SUFFIX} files; it needs exactly one, stored with Git LFS")
    return Found(files[0].rfilename, info.sha, files[0].lfs.sha256)


def _download(address: Address, found: Found) -> Path:
    """The file in Hugging Face's own cache, where an interrupted download resumes."""
    from huggingface_hub import HfApi

    try:
        return Path(HfApi().hf_hub_download(address.repo, found.file, revision=found.commit))
    except Exception as error:
        raise _unreachable(address, error) from error


def _unreachable(address: Address, error: Exception) -> KitsegError:
    reason = " ".join(str(error).split())[:200]
    return KitsegError(
        f"{address}: the download failed ({type(error).__name__}: {reason}). Try again with a network connection."
    )
