"""The files in which an observer keeps its sums: one file of importance or factors per segment and set of weights.

Owns the files' names, and that no file of other sums is overwritten. Must not know how sums are computed.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from typing import Any, final
from urllib.parse import quote

from torch import Tensor

from memsyn.errors import MemoryFileError, MissingFileError
from memsyn.live.window import BucketHeader, Window
from memsyn.matrices import Matrix
from memsyn.storage.reading_and_writing import (
    FACTORS,
    IMPORTANCE,
    MOMENTS,
    Groups,
    checked,
    read,
    read_entry,
    record,
    well_formed,
    write,
)
from memsyn.storage.writer_locks import WriterLocks
from memsyn.values.factors import KroneckerFactors
from memsyn.values.importance import Importance, check_same_shapes


@final
class SegmentFiles:
    """Finds, reads and writes the file of each segment.

    Args:
        store: path or URL of the file for samples without a segment; the other names are made from it.
        settings: all that must be equal for sums to be added: fingerprint, parameters, estimator, window.
        locks: of the observer; each file that is found is locked.
        kind: IMPORTANCE or FACTORS.

    For the store `traffic.safetensors` the files are

        traffic.safetensors                      samples without a segment
        traffic+tenant-a.safetensors             segment "tenant-a"
        traffic+tenant-a.1a2b3c4d.safetensors    the same segment, if the file above holds sums of other settings

    where `1a2b3c4d` begins the SHA-256 of the settings.
    """

    def __init__(self, store: str | os.PathLike[str], settings: list[Any], locks: WriterLocks, kind: str) -> None:
        self._store, self._locks, self._kind = store, locks, kind
        self._digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
        self._paths: dict[str | None, str] = {}
        self._writer = secrets.token_hex(8)
        """Stands in the headers that are written here: by it, a file is known as one's own."""
        self._found: dict[str, str] = {}
        """Path -> checksum of the file from which the sums go on."""

    def open(self, segment: str | None, window: Window, zeros: dict[str, Tensor]) -> dict[str, Matrix]:
        """Find a segment's file, and restore its sums into an empty window, if they are of the same settings.

        Args:
            zeros: for each sum, a tensor of its shape, in its dtype and on its device. A file of factors may have
                further sums, or lack some.

        Returns:
            The matrices in a file of factors.

        Raises:
            MemoryFileError: the file cannot be read, another observer writes to it, or there is no name for a file of
                these settings.
        """
        paths = [_path(self._store, segment), _path(self._store, segment, self._digest[:8])]
        for path in paths:
            self._locks.hold(path)
            try:
                matrices = self._restored(path, segment, window, zeros)
            except MissingFileError:
                matrices = {}
            except MemoryFileError as error:
                # An error of the disk or the network: the file may hold the sums that are looked for.
                if isinstance(error.__cause__, OSError):
                    raise
                continue
            self._paths[segment] = path
            return matrices
        raise MemoryFileError(
            f"the sums cannot be stored: {paths[0]} and {paths[1]} are damaged, or were written with other weights "
            "or settings. Move them to another folder."
        )

    def _restored(self, path: str, segment: str | None, window: Window, zeros: dict[str, Tensor]) -> dict[str, Matrix]:
        """Restore the sums of a file, and return its matrices.

        Raises:
            MemoryFileError: the file is missing, damaged, forged, or of other settings; the window is as it was.
        """
        header, groups = read(path, self._kind)
        matrices: dict[str, Matrix] = {}
        with well_formed(path):
            observed = checked(dict, header["observed"], "observed")
            if (observed["of"], observed["segment"]) != (self._digest, segment):
                raise ValueError("it is of other weights, settings, or another segment")
            if self._kind == FACTORS:
                factors = KroneckerFactors.from_file(path, header, groups)
                matrices, moments = factors.matrices, groups.pop(MOMENTS)
                groups["importance"] = {name.removeprefix("diagonal/"): own for name, own in moments.items()}
                count = factors.num_samples
            else:
                count = Importance.from_file(path, header, groups).num_samples
            for sums in groups.values():
                # Factors may have other names. Those that both have are compared.
                known = {**sums, **groups["importance"], **zeros}
                expected = {name: known[name] for name in sums} if self._kind == FACTORS else zeros
                check_same_shapes(sums, expected, path, "the model")
                negative = [n for n, own in sums.items() if self._kind == IMPORTANCE and bool((own < 0).any())]
                if negative:
                    raise ValueError(f"{negative[0]} holds negative values")
            buckets = checked(list, observed["buckets"], "buckets")
            weight = sum(record(BucketHeader, checked(dict, own, "buckets")).weight for own in buckets)
            if count != max(1, round(weight)):
                raise ValueError(f"num_samples is {count}, but the weights of the buckets add up to {weight:g}")
            window.restore(observed, groups, zeros)
        self._found[path] = header["checksum"]
        return matrices

    def write(
        self,
        segment: str | None,
        held: Importance | KroneckerFactors,
        observed: Mapping[str, Any],
        buckets: Groups,
    ) -> None:
        """Replace a segment's file, atomically.

        Args:
            held: what the file holds.
            observed: what its header says of the window.
            buckets: the tensors of the window's parts, if it slides.

        Raises:
            MemoryFileError: the file cannot be written, or is no longer the one that was read or written here.
        """
        path = self._paths[segment]
        self._locks.hold(path)  # again, if it could not be locked before
        self._refuse_another(path)
        own = {**observed, "of": self._digest, "segment": segment, "writer": self._writer}
        group = MOMENTS if self._kind == FACTORS else "importance"
        write(path, self._kind, {**held.header(), "observed": own}, {group: held.sums, **buckets})
        self._found.pop(path, None)

    def _refuse_another(self, path: str) -> None:
        """Refuse to replace a file that another writer has put there: its samples would be lost.

        A file that is gone is written anew. So is half a file at a URL, which an interrupted upload may leave.

        Raises:
            MemoryFileError: it is another file, or cannot be read.
        """
        try:
            entry = read_entry(path)
        except MissingFileError:
            return
        except MemoryFileError as error:
            if isinstance(error.__cause__, OSError):
                raise
            if "://" in path:
                return
            raise MemoryFileError(
                f"the sums are not stored, so that {path} is not overwritten: {error} Move that file away."
            ) from error
        observed = entry.get("observed")
        is_own = isinstance(observed, dict) and observed.get("writer") == self._writer
        if not is_own and entry.get("checksum") != self._found.get(path):
            raise MemoryFileError(
                f"the sums are not stored: somebody else has written {path} since this observer read it, and those "
                "samples would be lost. Give each observer a store of its own: each replica needs one."
            )


def _path(store: str | os.PathLike[str], segment: str | None, digest: str = "") -> str:
    """`folder/name.end`, `folder/name+segment.end` or `folder/name.digest.end`."""
    # On Windows, a folder ends at either slash: "C:\\my.models\\traffic.safetensors".
    name = os.path.basename(str(store))
    folder = str(store)[: len(str(store)) - len(name)]
    stem, dot, end = name.partition(".")
    # A dot would end the stem and a slash would name a folder: "a.b" becomes `traffic+a%2Eb.safetensors`.
    quoted = "" if segment is None else "+" + quote(segment, safe="").replace(".", "%2E")
    return f"{folder}{stem}{quoted}{'.' + digest if digest else ''}{dot}{end}"
