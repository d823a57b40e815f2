"""Which pictures to train on, and in what shape."""

import dataclasses
import warnings

from engine.config.reader import nearest
from engine.errors import UserError, UserNotice

DRAWN = "world"
DATA_KINDS = ("auto", "files", "webdataset", "arrayrecord", "parquet", DRAWN)
CROPS = ("center", "random")


@dataclasses.dataclass
class DataConfig:
    """Pictures with captions.

    A path is a folder of pictures (captions beside them, or in a metadata.jsonl), a shard (.tar,
    .arrayrecord, .parquet) or a folder of shards. What cannot be used is skipped, and listed.
    """

    paths: tuple[str, ...] = ()  # none: the drawn world, from scratch alone
    kind: str = "auto"  # what the paths hold, where that is not plain; or "world", the drawn one
    repeats: tuple[int, ...] = (1,)  # how often an epoch shows each picture: of all paths, or one for each
    caption_field: str = ""  # in JSON and Parquet; none: the first of caption, text, prompt
    size: int = 0  # pixels: a square of this size has the area of every picture; 0: what the model has
    buckets: int = 1  # shapes of about that area, from tall to wide; 1: squares alone
    max_aspect: float = 2.0  # of the widest and the tallest shape
    multiple: int = 64  # pixels, which divides all sides where there are several shapes
    min_size: int = 1  # pixels of the shorter side; smaller pictures are skipped
    crop: str = "center"  # or "random": where a picture sticks out of its shape
    flip: float = 0.0  # the probability of being mirrored
    seed: int = 0  # of order, crops and flips
    workers: int = 8  # threads that decode
    tellers: int = 0  # processes that tell the drawn scenes, for a GPU or TPU; 0: none but this one

    def validate(self, where: str = "data") -> None:
        """Raises UserError; `where` is what the config calls this part."""
        for name, known in (("kind", DATA_KINDS), ("crop", CROPS)):
            if (value := getattr(self, name)) not in known:
                raise UserError(
                    f"{where}.{name}={value!r} is unknown{nearest(value, known)}; write {', '.join(known)}"
                )
        if isinstance(self.paths, str) or not all(self.paths):
            raise UserError(f"{where}.paths={self.paths!r}: write a tuple, such as ('pictures',)")
        if self.paths and self.kind == DRAWN:
            raise UserError(f"{where}.kind={self.kind!r} draws its pictures: leave out {where}.paths")
        if self.paths and self.tellers:
            raise UserError(
                f"{where}.tellers={self.tellers} tell drawn scenes, and {where}.paths are other pictures: "
                f"write {where}.tellers=0"
            )
        if not self.paths and self.kind not in ("auto", DRAWN):
            raise UserError(f"{where}.kind={self.kind!r} without pictures: write {where}.paths too")
        ranges = {"buckets": (1, 99), "multiple": (1, 1024), "workers": (1, 256), "flip": (0, 1)}
        ranges |= {"size": (0, 2**14), "min_size": (1, 2**14), "max_aspect": (1, 16), "seed": (0, 2**64 - 1)}
        ranges["tellers"] = (0, 256)
        for name, (low, high) in ranges.items():
            if not low <= (value := getattr(self, name)) <= high:
                raise UserError(f"{where}.{name}={value} is out of range; write {low} to {high}")
        self._check_repeats(where)
        for name, usual in (("max_aspect", DataConfig.max_aspect), ("multiple", DataConfig.multiple)):
            if self.buckets == 1 and (value := getattr(self, name)) != usual:
                told = f"{where}.{name}={value} does nothing with {where}.buckets=1, which is squares alone"
                warnings.warn(told, UserNotice, 3)
        if self.buckets > 1 and self.size % self.multiple:
            raise UserError(
                f"{where}.size={self.size}: write a multiple of {where}.multiple={self.multiple}, "
                f"or another {where}.multiple"
            )

    def _check_repeats(self, where: str) -> None:
        if not isinstance(self.repeats, tuple):
            raise UserError(f"{where}.repeats={self.repeats!r}: write a tuple, with a comma")
        if len(self.repeats) not in (1, len(self.paths)) or not all(1 <= n <= 1000 for n in self.repeats):
            raise UserError(
                f"{where}.repeats={self.repeats}: write a number from 1 to 1000, or one for each path"
            )
