"""ArrayRecord shards: each record is a picture whole, with its prompt in its settings."""

import io
from collections.abc import Sequence
from typing import Any

from engine.train.sources.item import Item, Unusable, check_size
from engine.types import UserError


class Records:
    """The records of several shards, one shard after the other."""

    def __init__(self, paths: Sequence[str]):
        module = _array_record(paths[0])
        self._paths = paths
        self._readers: list[Any] = []
        self._places: list[tuple[int, int]] = []  # shard and record; -1: the shard cannot be read
        for shard, path in enumerate(paths):
            self._readers.append(reader := module.ArrayRecordReader(path))
            if reader.ok():
                self._places += [(shard, place) for place in range(reader.num_records())]
            else:
                self._places.append((shard, -1))

    def __len__(self) -> int:
        return len(self._places)

    def name(self, i: int) -> str:
        shard, place = self._places[i]
        return self._paths[shard] if place < 0 else f"{self._paths[shard]}/{place}"

    def read(self, i: int) -> Item:
        shard, place = self._places[i]
        if place < 0:
            raise Unusable("damaged or no ArrayRecord")
        try:
            (data,) = self._readers[shard].read([place])
        except (RuntimeError, OSError, ValueError, IndexError) as error:
            raise Unusable(f"a damaged record ({' '.join(str(error).split())[:80]})") from None
        check_size(len(data))
        return Item(io.BytesIO(data), None)


def _array_record(where: str) -> Any:
    try:
        from array_record.python import array_record_module
    except ImportError:
        raise UserError(f"{where}: needs a package; write pip install 'fogsculpt[jobs]'") from None
    return array_record_module
