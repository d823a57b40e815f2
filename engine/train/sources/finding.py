"""Which kind of source a path is, and that source."""

import os
import pathlib

from engine.train.sources.files import Files, list_files
from engine.train.sources.item import PICTURES, Source
from engine.train.sources.records import Records
from engine.train.sources.tables import Tables
from engine.train.sources.tars import Tars
from engine.types import UserError

SUFFIXES = {
    "files": PICTURES,
    "webdataset": (".tar",),
    "arrayrecord": (".arrayrecord", ".array_record"),
    "parquet": (".parquet",),
}
KIND_OF = {suffix: kind for kind, suffixes in SUFFIXES.items() for suffix in suffixes}
WHAT_TO_WRITE = "write a folder of pictures, or shards (.tar, .arrayrecord, .parquet)"


def open_source(path: str, kind: str = "auto", field: str = "", controlled: bool = False) -> Source:
    """The pictures of a folder, of a shard, or of all shards below a folder.

    Args:
      kind, field: `kind` and `caption_field` of DataConfig.
      controlled: whether what a ControlNet is to be shown is read, too.

    Raises:
      UserError: there is nothing of the kind, or auto finds several kinds.
    """
    root = os.path.expanduser(path)
    if os.path.isdir(root):
        shards = [os.path.join(root, name) for name in list_files(root)[0]]
    elif os.path.isfile(root):
        shards = [root]
    else:
        raise UserError(f"{path}: no such folder or file; {WHAT_TO_WRITE}")
    kinds = {shard: KIND_OF.get(pathlib.Path(shard).suffix.lower()) for shard in shards}
    if kind == "auto":
        found = sorted(set(filter(None, kinds.values())))
        if len(found) > 1:
            raise UserError(
                f"{path} holds {' and '.join(found)}: write data.kind={found[0]!r} or {found[1]!r}"
            )
        kind = found[0] if found else "none"
    chosen = [shard for shard in shards if kinds[shard] == kind]
    if not chosen:
        raise UserError(f"{path}: no {'pictures' if kind in ('none', 'files') else kind}; {WHAT_TO_WRITE}")
    if kind == "files":
        if not os.path.isdir(root):
            raise UserError(f"{path} is one picture: write the folder that it lies in")
        return Files(root, field, controlled)
    if kind == "arrayrecord":
        return Records(chosen)
    return Tars(chosen, field) if kind == "webdataset" else Tables(chosen, field, controlled)
