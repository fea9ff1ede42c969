"""Sharded checkpoints: a folder to which each rank writes its part, described without objects that could run code.

torch's own reader lets the folder's description, and values that are no tensors, call any function as they are read.
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

META = "meta.pt"  # what is no tensor of weights or optimizer, as in Lightning
_DESCRIPTION = ".metadata"
_FIX = "Give a folder that save_distributed_checkpoint of this version wrote"
# Classes of a description, which hold values and do nothing when they are made.
_CLASSES: list[Any] = [
    Metadata, MetadataIndex, TensorStorageMetadata, BytesStorageMetadata, ChunkStorageMetadata, TensorProperties,
    StorageMeta, _StorageInfo, _MEM_FORMAT_ENCODING,
]  # fmt: skip


def is_shards(folder: Path) -> bool:
    """Tell whether a folder is a sharded checkpoint."""
    return folder.is_dir() and (folder / META).is_file() and (folder / _DESCRIPTION).is_file()


def is_shard_file(name: str) -> bool:
    """Tell whether a sharded checkpoint has a file of that name."""
    return name in (META, _DESCRIPTION, f"{_DESCRIPTION}.tmp") or (name.startswith("__") and name.endswith(".distcp"))


def write_shards(state: dict[str, Any], folder: Path) -> None:
    """Write every rank's part of a state to a folder that exists. Every rank must call."""
    save(state, storage_writer=_Writer(folder))


def write_meta(values: dict[str, Any], folder: Path) -> None:
    """Write what is no tensor of weights or optimizer, once, and wait for the disk."""
    with open(folder / META, "xb") as file:
        torch.save(values, file)
        file.flush()
        os.fsync(file.fileno())


def read_shards(state: dict[str, Any], folder: Path, every_rank: bool = True) -> None:
    """Read a state in place.

    Args:
        state: Tensors, sharded in whatever way, and other values, by the names that they were written under.
        folder: A sharded checkpoint.
        every_rank: Every rank calls, and reads its part.

    Raises:
        ConfigError: The folder is not a whole sharded checkpoint, or holds something else.
    """
    try:
        load(state, storage_reader=_Reader(folder), planner=_Planner(), no_dist=not every_rank)
    except ConfigError:
        raise
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            raise
        raise _damaged(folder, _cause_text(error)) from error


def read_state(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Read all tensors whose names begin with a prefix, whole; returned under the rest of their names.

    Raises:
        ConfigError: As for `read_shards`.
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
    """A tensor to read into, of values that no checkpoint may have where nothing is read."""
    found = torch.empty(entry.size, dtype=entry.properties.dtype)
    return found.fill_(torch.nan) if found.is_floating_point() else found.zero_()


class _Writer(FileSystemWriter):
    """Describes the folder in a file that `torch.load` reads safely."""

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        metadata.storage_data = {result.index: result.storage_data for part in results for result in part}
        metadata.storage_meta = None  # holds a path
        with open(Path(self.path) / _DESCRIPTION, "xb") as file:
            torch.save(metadata, file)
            file.flush()
            os.fsync(file.fileno())


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        folder = Path(self.path)
        try:
            with torch.serialization.safe_globals(_CLASSES), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = torch.load(folder / _DESCRIPTION, map_location="cpu", weights_only=True)
            _check(found, folder)
        except ConfigError:
            raise
        except Exception as error:  # each part of the format fails in its own way
            raise _damaged(folder, _cause_text(error)) from error
        found.storage_meta = StorageMeta(load_id=self.load_id)
        return found


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Load a value that is no tensor, as torch's own does, but safely."""
        found = torch.load(value, map_location="cpu", weights_only=True)
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], found)


def _check(found: Any, folder: Path) -> None:
    """Check that a description is of files in the folder, and of no more values than they hold."""
    if not isinstance(found, Metadata) or not isinstance(found.state_dict_metadata, Mapping):
        raise _damaged(folder, "its description is of another kind")
    if not isinstance(found.storage_data, Mapping):
        raise _damaged(folder, "its description names no files")
    held = 0
    for name in {info.relative_path for info in found.storage_data.values()}:
        if not isinstance(name, str) or not is_shard_file(name) or Path(name).name != name:
            raise _damaged(folder, f"its description names {name!r}")
        if (folder / name).is_symlink() or not (folder / name).is_file():
            raise _damaged(folder, f"it has no file {name}")
        held += (folder / name).stat().st_size
    described = 0
    for key, entry in found.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            size = [int(length) for length in entry.size]
            if min(size, default=0) < 0:
                raise _damaged(folder, f"{key} has a size below 0")
            if sum(torch.Size(chunk.sizes).numel() for chunk in entry.chunks) != torch.Size(size).numel():
                raise _damaged(folder, f"parts of {key} are missing")
            described += torch.Size(size).numel() * torch.empty(0, dtype=entry.properties.dtype).element_size()
        if described > held:
            raise _damaged(folder, "its description is of more values than its files hold")


def _damaged(folder: Path, reason: str) -> ConfigError:
    return ConfigError(f"{folder} is not a whole sharded checkpoint ({reason})", "ckpt_path", _FIX)


def _cause_text(error: BaseException) -> str:
    """The cause of an error, also where torch wraps those of all ranks."""
    failures = getattr(error, "failures", None)
    if isinstance(failures, Mapping) and failures:
        error = next(iter(failures.values()))[0]
    words = str(error).strip().splitlines()
    return f"{type(error).__name__}: {words[0]}" if words else type(error).__name__
