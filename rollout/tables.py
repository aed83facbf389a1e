"""Prompts from a table: Parquet, or a Hugging Face dataset that `save_to_disk` wrote. Rows are read when sampled."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from rollout.folder import Splits, decode_picture, fit, read_picture, read_tracks, read_visible
from rollout.prompts import DragPrompt, PromptError
from rollout.seeds import numpy_generator

HELDOUT_SHARE = 0.1
NAMES = {"string": "text", "binary": "bytes", "bool": "bool", "null": "text"}
REQUIRED = ("image", "tracks")
COLUMNS = {
    "image": ("{bytes, path}", "bytes", "text"),
    "tracks": ("number[][][]",),
    "visible": ("bool[][]",),
    "text": ("text",),
    "split": ("text",),
}
DATASET_SPLITS = {"train": "train", "heldout": "heldout", "test": "heldout", "validation": "heldout"}


class TablePrompts:
    """A `PromptSource` over a Parquet file, a folder of them (and its subfolders), or a dataset on disk. Columns:

        image              a picture's bytes, a path relative to the file, or Hugging Face's `Image`, {bytes, path}
        tracks             numbers [T][N][2]: per video frame the points (x, y), px of the image
        visible, optional  bool [T][N]
        text, optional
        split, optional    "train" or "heldout"

    Pictures are cut and resized as those of `FolderPrompts`. Rows are held out (`Splits`) by the column `split`, or by
    the names of a dataset's splits (DATASET_SPLITS); without either, `seed` draws HELDOUT_SHARE of the rows.

    At the start only the columns' types and `split` are read. A row is read and checked when it is sampled, from a
    memory map (datasets) or with its row group (Parquet), of which one is kept in memory.

    size: side of a square picture, or (height, width), px. frames: T. seed: of the draw of held-out rows.
    Raises PromptError naming the file, and the row counted from 0 in that file, at the first thing that is wrong.
    """

    def __init__(self, path: str | Path, size: int | tuple[int, int], frames: int, seed: int = 0) -> None:
        self.path, self.size, self.frames = Path(path), size, frames
        listed = list(_list_files(self.path))
        self.files = [_open(file) for file, _ in listed]
        self._starts = list(accumulate((file.rows for file in self.files), initial=0))
        if not self._starts[-1]:
            raise PromptError(f"{self.path}: no prompts; write one row per prompt")
        splits = [file.splits(split) for file, (_, split) in zip(self.files, listed)]
        if any(marks is not None for marks in splits):
            marks = [m for file, own in zip(self.files, splits) for m in own or ["train"] * file.rows]
            heldout = np.array(marks) == "heldout"
        else:
            count = self._starts[-1]
            drawn = numpy_generator("table", seed, "heldout").permutation(count)
            heldout = np.zeros(count, bool)
            heldout[drawn[: max(1, round(HELDOUT_SHARE * count)) if count > 1 else 0]] = True
        self.splits = Splits(self.path, (~heldout).nonzero()[0].tolist(), heldout.nonzero()[0].tolist())
        self.has_heldout = bool(heldout.any())
        self._chunk = lru_cache(maxsize=1)(lambda file, chunk: self.files[file].read(chunk, self.files[file].columns))

    def prompt(self, split: str, index: int) -> DragPrompt:
        row = self.splits.row(split, index)
        return DragPrompt(*self._row(row), self.splits.id("table", split, index))

    def truth(self, prompt: DragPrompt) -> None:
        return None

    def _row(self, row: int) -> tuple[np.ndarray, str, np.ndarray, np.ndarray]:
        """first_frame, text, tracks and visible of the DragPrompt of a row, counted through all files."""
        which = bisect_right(self._starts, row) - 1
        file, row = self.files[which], row - self._starts[which]
        chunk = bisect_right(file.starts, row) - 1
        try:
            values = self._chunk(which, chunk).slice(row - file.starts[chunk], 1).to_pylist()[0]
            return self._read(values, file.path.parent)
        except (PromptError, pa.ArrowException, OSError) as error:
            raise PromptError(f"{file.path}: row {row}: {error}") from None

    def _read(self, row: dict[str, Any], folder: Path) -> tuple[np.ndarray, str, np.ndarray, np.ndarray]:
        tracks = read_tracks(self._by_point("tracks", row["tracks"]), self.frames)
        visible = row.get("visible")
        visible = None if visible is None else self._by_point("visible", visible)
        visible = read_visible(visible, self.frames, tracks.shape[1])
        frame, tracks = fit(_picture(row["image"], folder), tracks, visible, self.size)
        return frame, row.get("text") or "", tracks, visible

    def _by_point(self, name: str, values: list | None) -> list[list]:
        """[T][N] -> [N][T], the order of `prompts.jsonl`."""
        counts = [len(points or ()) for points in values or ()]
        if len(counts) != self.frames:
            raise PromptError(f"{name} has {len(counts)} frames; it needs {self.frames}, one per video frame")
        for t, count in enumerate(counts):
            if count != counts[0]:
                raise PromptError(f"{name} has {counts[0]} points in frame 0 and {count} in frame {t}; hide, not omit")
        return [list(track) for track in zip(*values)]


@dataclass(frozen=True)
class TableFile:
    """rows: how many. starts: the first row of each chunk that can be read by itself. read: a chunk's given columns."""

    path: Path
    schema: pa.Schema
    rows: int
    starts: list[int]
    read: Callable[[int, list[str]], pa.Table]

    @property
    def columns(self) -> list[str]:
        return [name for name in COLUMNS if name in self.schema.names]

    def splits(self, split: str | None) -> list[str] | None:
        """The split of every row: the given one, else that of the column; None where there is neither."""
        if split is not None:
            return [split] * self.rows
        if "split" not in self.schema.names:
            return None
        chunks = (self.read(chunk, ["split"]) for chunk in range(len(self.starts)))
        marks = [mark for table in chunks for mark in table["split"].to_pylist()]
        for row, mark in enumerate(marks):
            if mark not in ("train", "heldout", None):
                raise PromptError(f'{self.path}: row {row}: split must be "train" or "heldout", not {mark!r}')
        return [mark or "train" for mark in marks]


def _list_files(path: Path) -> Iterator[tuple[Path, str | None]]:
    """The files of a table in order, each with the split that a dataset gives it."""
    if (path / "dataset_dict.json").is_file():
        for name in _read_json(path / "dataset_dict.json", "splits"):
            if name not in DATASET_SPLITS:
                raise PromptError(f"{path}: split {name!r} is none of {', '.join(DATASET_SPLITS)}; give {path / name}")
            yield from ((file, DATASET_SPLITS[name]) for file, _ in _list_files(path / name))
    elif (path / "state.json").is_file():
        for file in _read_json(path / "state.json", "_data_files"):
            yield path / file["filename"], None
    elif files := [path] if path.is_file() else sorted(path.rglob("*.parquet")):
        yield from ((file, None) for file in files)
    else:
        raise PromptError(f"{path}: no table; give a Parquet file, a folder of them, or what save_to_disk wrote")


def _read_json(file: Path, key: str) -> list:
    try:
        return list(json.loads(file.read_bytes())[key])
    except (ValueError, KeyError, TypeError) as error:
        raise PromptError(f"{file} is damaged ({error!r}); write the dataset again with save_to_disk") from None


def _open(path: Path) -> TableFile:
    """Raises PromptError where the file is missing or damaged, or a column is missing or of another type."""
    try:
        table = _open_arrow(path) if path.suffix == ".arrow" else _open_parquet(path)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise PromptError(f"{path} cannot be read as {path.suffix.lstrip('.') or 'parquet'}: {reason}") from None
    names = table.schema.names
    if missing := [name for name in REQUIRED if name not in names]:
        raise PromptError(f"{path}: the column {missing[0]!r} is missing; it has {', '.join(names)}")
    for name in table.columns:
        if (kind := _kind(table.schema.field(name).type)) not in COLUMNS[name]:
            raise PromptError(f"{path}: the column {name!r} must be {' or '.join(COLUMNS[name])}, not {kind}")
    return table


def _open_parquet(path: Path) -> TableFile:
    metadata = pq.read_metadata(path)
    ends = list(accumulate(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)))

    def read(group: int, columns: list[str]) -> pa.Table:
        return pq.ParquetFile(path).read_row_group(group, columns, use_threads=False)

    return TableFile(path, pq.read_schema(path), metadata.num_rows, [0, *ends[:-1]], read)


def _open_arrow(path: Path) -> TableFile:
    """The stream format of `save_to_disk`, mapped: reading it costs no memory until a row is used."""
    table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    return TableFile(path, table.schema, len(table), [0], lambda _, columns: table.select(columns))


def _picture(image: str | bytes | dict | None, folder: Path) -> np.ndarray:
    if isinstance(image, dict):
        image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
    if image is None:
        raise PromptError("image is null; give a path or the bytes of a picture")
    if isinstance(image, bytes):
        return decode_picture(image, f"image ({len(image)} bytes)")
    return read_picture(folder, image)


def _kind(kind: pa.DataType) -> str:
    """What a column holds, in the words of COLUMNS."""
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return f"{_kind(kind.value_type)}[]"
    if types.is_dictionary(kind):
        return _kind(kind.value_type)
    if types.is_floating(kind) or types.is_integer(kind):
        return "number"
    if types.is_struct(kind) and {"bytes", "path"} & {kind.field(i).name for i in range(kind.num_fields)}:
        return "{bytes, path}"
    return NAMES.get(str(kind).removeprefix("large_").removesuffix("_view"), str(kind))
