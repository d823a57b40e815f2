"""How the pictures of a shard lie in files: single PNGs, a tar for WebDataset, ArrayRecord or Parquet.

Each picture is a whole PNG with its settings inside, whatever lies around it. Equal pictures in equal order
give equal bytes in every format.

  files        shards/000012/00003072-a-fox.png, ...
  webdataset   shards/000012.tar       00003072.png, 00003072.txt (the prompt), 00003072.json, ...
  arrayrecord  shards/000012.arrayrecord    record i is picture i of the shard, as PNG (read it with grain)
  parquet      shards/000012.parquet   image {bytes, path} (as Hugging Face datasets read it), id, prompt, ...
"""

import errno
import io
import json
import os
import pathlib
import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

from engine import finish
from engine.config import FORMATS
from engine.jobs.store import Store
from engine.types import UserError

ROWS_AT_ONCE = 64  # pictures of one Parquet row group
READ_AT_ONCE = 8  # pyarrow reads no more than 2 GB of them
# By this Hugging Face datasets know that the column holds pictures.
PICTURES = {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})}


class Entry(NamedTuple):
    """A picture as it goes into a shard."""

    png: bytes
    facts: dict[str, Any]  # number, id, row, prompt, negative_prompt, seed, index, ..., sha256, extra


def member_name(facts: Mapping[str, Any]) -> str:
    """What stands for the picture in a shard: 00003072. Ids may be anything, so they are no names."""
    return f"{facts['number']:08d}"


def member_of(format: str, facts: Mapping[str, Any], place: int) -> str | int:
    """Where in its shard the picture is: the name of a file, or (arrayrecord, parquet) its place from 0."""
    if format == "files":
        return f"{member_name(facts)}-{finish.slug(facts['prompt'])}.png"
    return f"{member_name(facts)}.png" if format == "webdataset" else place


def path_of(format: str, name: str) -> str:
    """Of a shard, in the output folder."""
    return f"shards/{name}{SUFFIXES[format]}"


def _write_files(path: pathlib.Path, entries: Sequence[Entry]) -> None:
    path.mkdir()
    for place, entry in enumerate(entries):
        (path / str(member_of("files", entry.facts, place))).write_bytes(entry.png)


def _write_tar(path: pathlib.Path, entries: Sequence[Entry]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for entry in entries:
            facts = json.dumps(entry.facts, ensure_ascii=True).encode()
            caption = entry.facts.get("caption", entry.facts["prompt"])
            parts = {"png": entry.png, "txt": caption.encode(), "json": facts}
            for ending, data in parts.items():
                info = tarfile.TarInfo(f"{member_name(entry.facts)}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def _write_arrayrecord(path: pathlib.Path, entries: Sequence[Entry]) -> None:
    # group_size 1: a reader that shuffles decodes one picture, not a group of them. PNGs are compressed.
    try:
        writer = _array_record().ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        for entry in entries:
            writer.write(entry.png)
        writer.close()
    except RuntimeError as error:  # it knows no OSErrors
        full = os.strerror(errno.ENOSPC) in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from None


ADDED = ("caption", "clip_score")  # columns that are there where some picture has one


def _write_parquet(path: pathlib.Path, entries: Sequence[Entry]) -> None:
    pa = _pyarrow()
    schema = _schema(pa, [name for name in ADDED if any(name in entry.facts for entry in entries)])
    # PNGs are compressed.
    with pa.parquet.ParquetWriter(path, schema, compression="NONE", write_page_checksum=True) as writer:
        for first in range(0, len(entries), ROWS_AT_ONCE):
            rows = [_table_row(entry) for entry in entries[first : first + ROWS_AT_ONCE]]
            writer.write_table(pa.Table.from_pylist(rows, schema))


def _table_row(entry: Entry) -> dict[str, Any]:
    image = {"bytes": entry.png, "path": f"{member_name(entry.facts)}.png"}
    told = {name: json.dumps(entry.facts[name]) for name in ("extra", "edit") if name in entry.facts}
    return {**entry.facts, "image": image, **told}


def _schema(pa: Any, added: Sequence[str]) -> Any:
    caption = [name for name in added if name == "caption"]
    texts = ("id", "prompt", *caption, "negative_prompt", "sampler", "sha256", "extra", "edit")
    whole = ("number", "row", "index", "steps", "height", "width")
    return pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]
        + [(name, pa.string()) for name in texts]
        + [(name, pa.int64()) for name in whole]
        + [("seed", pa.uint64()), ("guidance_scale", pa.float64())]
        + [(name, pa.float64()) for name in added if name not in caption],
        PICTURES,
    )


SUFFIXES = dict(zip(FORMATS, ("", ".tar", ".arrayrecord", ".parquet"), strict=True))
WRITERS = dict(zip(FORMATS, (_write_files, _write_tar, _write_arrayrecord, _write_parquet), strict=True))


def check_installed(format: str) -> None:
    """Raises UserError where the format needs a package that is not there."""
    if format in NEEDS:
        NEEDS[format]()


def write_shard(folder: pathlib.Path, name: str, format: str, entries: Sequence[Entry]) -> pathlib.Path:
    """Writes pictures as one shard into a local folder; returns its path. Leftovers of that name go."""
    path = folder / f"{name}{SUFFIXES[format]}"
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    WRITERS[format](path, entries)
    return path


def read_pngs(store: Store, format: str, name: str) -> Iterator[bytes]:
    """The PNGs of a shard, in the order in which they were written.

    Raises:
      FileNotFoundError: there is no such shard.
      ValueError: it cannot be read as what it should be.
    """
    path = path_of(format, name)
    if format == "files":
        files = sorted(store.names(path), key=_number_in)
        if not files:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        for file in files:
            yield store.read(f"{path}/{file}")
        return
    with store.open(path) as file:
        try:
            yield from READERS[format](file)
        except UserError:
            raise
        except Exception as error:  # each reader has its own, and damage brings up still others
            raise ValueError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from None


def _number_in(name: str) -> int:
    number = name.split("-")[0]
    return int(number) if number.isdecimal() else -1


def _read_tar(file: BinaryIO) -> Iterator[bytes]:
    """Stricter than tarfile, to which a damaged header is the end."""
    while any(header := file.read(tarfile.BLOCKSIZE)):
        member = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        data = file.read(member.size)
        file.read(-member.size % tarfile.BLOCKSIZE)
        if member.name.endswith(".png"):
            yield data
    if not header or any(file.read()):
        raise ValueError("it ends where no end is marked")


def _read_arrayrecord(file: BinaryIO) -> Iterator[bytes]:
    reader = _array_record().ArrayRecordReader(file.name)  # it reads paths, not open files
    for i in range(reader.num_records()):
        yield reader.read([i])[0]
    reader.close()


def _read_parquet(file: BinaryIO) -> Iterator[bytes]:
    table = _pyarrow().parquet.ParquetFile(file, page_checksum_verification=True)
    for batch in table.iter_batches(READ_AT_ONCE, columns=["image"]):
        for image in batch.column(0).to_pylist():
            yield image["bytes"]


READERS = {"webdataset": _read_tar, "arrayrecord": _read_arrayrecord, "parquet": _read_parquet}


def _array_record() -> Any:
    try:
        from array_record.python import array_record_module
    except ImportError:
        raise UserError("format=arrayrecord needs a package; write pip install 'fogsculpt[jobs]'") from None
    return array_record_module


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("format=parquet needs a package; write pip install 'fogsculpt[jobs]'") from None
    return pyarrow


NEEDS = {"arrayrecord": _array_record, "parquet": _pyarrow}
