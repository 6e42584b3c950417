"""Read a packed data set from the node's own disk, if the cluster profile names one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from data_prep.shards.manifest import Manifest
from hpc.storage.node_cache import SharedFile, cached_copy


@contextmanager
def local_shards(folder: str | Path, node_local: str) -> Iterator[Manifest]:
    """Yield the manifest of the data set in `folder`, with its shards on the node's disk.

    The shards lie in the node's folder `node_local` while the block runs. They stay in `folder` if
    `node_local` is "" or has too little space.

    Raises:
        UserError: `folder` holds no packed data set.
        Damaged: the manifest or a shard is damaged.
    """
    manifest = Manifest.load(folder)
    if not node_local:
        yield manifest
        return
    shards = [shard for summary in manifest.splits.values() for shard in summary.shards]
    files = [SharedFile(shard.file, shard.bytes, shard.sha256) for shard in shards]
    with cached_copy(manifest.folder, files, manifest.fingerprint, node_local) as place:
        yield replace(manifest, folder=place)
