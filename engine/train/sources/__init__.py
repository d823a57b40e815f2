"""Pictures with captions, wherever they lie: one small class for each way, behind `item.Source`.

batch_at = training_batches(DataConfig(paths=("pictures",)), 32, tokenizer, size=512, workdir=workdir)
"""

from engine.train.sources.batches import PictureBatches, batches_of, open_pictures, training_batches
from engine.train.sources.finding import open_source
from engine.train.sources.item import Item, Source, Unusable
from engine.train.sources.skipped import Skipped

__all__ = [
    "Item",
    "PictureBatches",
    "Skipped",
    "Source",
    "Unusable",
    "batches_of",
    "open_pictures",
    "open_source",
    "training_batches",
]
