"""Sharded checkpoints: a folder to which each rank writes its part, read without running code from it.

torch's own reader can call any function while it loads the metadata and non-tensor values.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult

from opsd_lightning.types import ConfigError

META = "meta.pt"  # all values except the tensors of weights and optimizer, as in Lightning
_METADATA = ".metadata"
_FIX = "Give a folder that save_distributed_checkpoint of this version wrote"
# Classes of the metadata. They only store values, so constructing them is safe.
_CLASSES: list[Any] = [
    Metadata, MetadataIndex, TensorStorageMetadata, BytesStorageMetadata, ChunkStorageMetadata, TensorProperties,
    StorageMeta, _StorageInfo, _MEM_FORMAT_ENCODING,
]  # fmt: skip


def is_shards(folder: Path) -> bool:
    """Return True if a folder is a sharded checkpoint."""
    return folder.is_dir() and (folder / META).is_file() and (folder / _METADATA).is_file()


def is_shard_file(name: str) -> bool:
    """Return True for the name of a file of a sharded checkpoint."""
    return name in (META, _METADATA, f"{_METADATA}.tmp") or (name.startswith("__") and name.endswith(".distcp"))


def write_shards(state: dict[str, Any], folder: Path) -> None:
    """Write this rank's part of a state to an existing folder. All ranks must call this function."""
    save(state, storage_writer=_Writer(folder))


def write_meta(values: dict[str, Any], folder: Path) -> None:
    """Write `META`, the values apart from weights and optimizer, and wait until it is on disk. Call on one rank only."""
    with open(folder / META, "xb") as file:
        torch.save(values, file)
        file.flush()
        os.fsync(file.fileno())


def read_shards(state: dict[str, Any], folder: Path, every_rank: bool = True) -> None:
    """Read a state in place.

    Args:
        state: Tensors with any sharding, and other values, by their saved names.
        folder: A sharded checkpoint.
        every_rank: If True, all ranks call this function and each reads its part.

    Raises:
        ConfigError: The folder is not a complete sharded checkpoint, or does not contain this state.
    """
    try:
        with warnings.catch_warnings():
            # One process reads the shards on purpose.
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            load(state, storage_reader=_Reader(folder), planner=_Planner(), no_dist=not every_rank)
    except ConfigError:
        raise
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            raise
        raise _damaged(folder, _cause_text(error)) from error


def read_state(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Read the full tensors whose names begin with a prefix. The prefix is removed from the returned names.

    Raises:
        ConfigError: See `read_shards`.
    """
    described = _Reader(folder).read_metadata().state_dict_metadata
    found = {
        key: _unfilled(entry)
        for key, entry in described.items()
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    read_shards(found, folder, every_rank=False)
    return {key.removeprefix(prefix): value for key, value in found.items()}


def _unfilled(entry: TensorStorageMetadata) -> Tensor:
    """Return a tensor to read into, filled with NaN, so that elements that are not read are detected."""
    found = torch.empty(entry.size, dtype=entry.properties.dtype)
    return found.fill_(torch.nan) if found.is_floating_point() else found.zero_()


class _Writer(FileSystemWriter):
    """Writer whose metadata file can be read with ``torch.load(weights_only=True)``."""

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        metadata.storage_data = {result.index: result.storage_data for part in results for result in part}
        metadata.storage_meta = None  # contains a path object
        with open(Path(self.path) / _METADATA, "xb") as file:
            torch.save(metadata, file)
            file.flush()
            os.fsync(file.fileno())


class _Reader(FileSystemReader):
    """Reader that loads and checks the metadata without running code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        folder = Path(self.path)
        try:
            with torch.serialization.safe_globals(_CLASSES), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = torch.load(folder / _METADATA, map_location="cpu", weights_only=True)
            _check(found, folder)
        except ConfigError:
            raise
        except Exception as error:  # each part of the format raises its own errors
            raise _damaged(folder, _cause_text(error)) from error
        found.storage_meta = StorageMeta(load_id=self.load_id)
        return found


class _Planner(DefaultLoadPlanner):
    """Planner that loads non-tensor values without running code."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Load a non-tensor value like the base class, but with ``weights_only=True``."""
        found = torch.load(value, map_location="cpu", weights_only=True)
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], found)


def _check(found: Any, folder: Path) -> None:
    """Check that metadata names existing files in the folder, and no more values than they contain."""
    if not isinstance(found, Metadata) or not isinstance(found.state_dict_metadata, Mapping):
        raise _damaged(folder, "its metadata has an unknown type")
    if not isinstance(found.storage_data, Mapping):
        raise _damaged(folder, "its metadata names no files")
    held = 0
    for name in {info.relative_path for info in found.storage_data.values()}:
        if not isinstance(name, str) or not is_shard_file(name) or Path(name).name != name:
            raise _damaged(folder, f"its metadata names the file {name!r}")
        if (folder / name).is_symlink() or not (folder / name).is_file():
            raise _damaged(folder, f"it has no file {name}")
        held += (folder / name).stat().st_size
    described = 0
    for key, entry in found.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            size = [int(length) for length in entry.size]
            if min(size, default=0) < 0:
                raise _damaged(folder, f"{key} has a negative size")
            if sum(torch.Size(chunk.sizes).numel() for chunk in entry.chunks) != torch.Size(size).numel():
                raise _damaged(folder, f"parts of {key} are missing")
            described += torch.Size(size).numel() * torch.empty(0, dtype=entry.properties.dtype).element_size()
        if described > held:
            raise _damaged(folder, "its metadata describes more values than its files contain")


def _damaged(folder: Path, reason: str) -> ConfigError:
    return ConfigError(f"{folder} is not a complete sharded checkpoint ({reason})", "ckpt_path", _FIX)


def _cause_text(error: BaseException) -> str:
    """Return the message of an error, or of the first rank's error if torch has collected those of all ranks."""
    failures = getattr(error, "failures", None)
    if isinstance(failures, Mapping) and failures:
        error = next(iter(failures.values()))[0]
    words = str(error).strip().splitlines()
    return f"{type(error).__name__}: {words[0]}" if words else type(error).__name__
