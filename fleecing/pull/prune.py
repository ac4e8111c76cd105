"""Making the oldest point that is kept a full image, so that those before it can go.

    1  .merge-NAME.qcow2 is written and made durable           readers see nothing of it
    2  NAME+full.chunks is written
    3  the manifest says `merging`
    4  .merge-NAME.qcow2 replaces NAME.qcow2                    the same contents, without a backing file
    5  the manifest has one full point instead of all of those
    6  what nobody needs is removed

The point after NAME names NAME.qcow2 as its backing file all the time, and finds the same contents there at every
moment. After a crash NAME.qcow2 itself says whether step 4 was done.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator

from fleecing.pull.chain import Chain, merged_point
from fleecing.pull.chain_read import ProgressCall, contents
from fleecing.pull.manifest import ZERO, Chunk, write_chunks
from fleecing.pull.qcow2_codec import Compression
from fleecing.pull.qcow2_target import Qcow2Options, Qcow2Target
from fleecing.pull.target import sync_folder


def prune(chain: Chain, keep: int, progress: ProgressCall, *, compression: Compression) -> list[str]:
    """Leave the last `keep` points (at least 1); the names of those that went. Raises ImageError and OSError."""
    first = len(chain.points) - keep
    if first <= 0:
        chain.sweep()
        return []
    gone = [point.name for point in chain.points[:first]]
    if chain.points[first].backing is not None:
        _merge(chain, first, progress, compression)
    else:
        chain.drop(*chain.points[:first])
        del chain.manifest.points[:first]
        chain.manifest.save(chain.folder)
    chain.sweep()
    return gone


def _merge(chain: Chain, index: int, progress: ProgressCall, compression: Compression) -> None:
    point = chain.points[index]
    file, name = chain.begin_merge(point)
    full = chain.path(file)
    target = Qcow2Target.create(str(full), point.size, Qcow2Options(compression))
    chunks: list[Chunk] = []
    try:
        chunks.extend(_copy(chain, index, target, progress))
        target.finish()
    except BaseException:
        target.abandon()
        raise
    sha256 = write_chunks(chain.path(name), chunks)
    data = sum(chunk.length for chunk in chunks if chunk.check != ZERO)
    chain.manifest.merging = merged_point(point, chunks=name, sha256=sha256, data=data)
    chain.manifest.save(chain.folder)
    os.replace(full, chain.path(point.file))
    sync_folder(str(chain.folder))
    chain.finish_merge()


def _copy(chain: Chain, index: int, target: Qcow2Target, progress: ProgressCall) -> Iterator[Chunk]:
    for part in contents(chain, index):
        if part.data is None:
            target.zero(part.offset, part.length)
            check = ZERO
        else:
            target.write(part.offset, memoryview(part.data))
            check = hashlib.sha256(part.data).hexdigest()
        progress(part.length)
        yield Chunk(part.offset, part.length, check)
