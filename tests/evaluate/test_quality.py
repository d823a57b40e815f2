"""FID and CLIP score in one pass: the figures of the parts; and few pictures in memory."""

import weakref

import numpy as np
import pytest

from engine.evaluate.clip_score import ClipScorer
from engine.evaluate.fid import Features
from engine.evaluate.frechet import Moments, frechet_distance
from engine.evaluate.quality import SHOWN, Instruments, measure
from engine.types import UserError
from tests.compiled import COMPILED
from tests.instruments import random_inception, tiny_clip

SIZES = [(16, 16)] * 5 + [(16, 24)] + [(20, 12)] * 2
PICTURES = [np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8) for i, size in enumerate(SIZES)]
CAPTIONS = [f"a {'very ' * i}red fox" for i in range(len(SIZES))]  # those from 4 on are cut


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    file = random_inception(tmp_path_factory.mktemp("inception") / "inception.safetensors")
    yield Features(file, batch_size=2)
    file.unlink()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return ClipScorer(tiny_clip(tmp_path_factory.mktemp("clip")), batch_size=3)


def batches(*lengths):
    first = 0
    for length in lengths:
        yield PICTURES[first : first + length], CAPTIONS[first : first + length]
        first += length


def test_figures_are_those_of_the_parts(features, clip):
    """However the pictures come, whatever their sizes."""
    reference = features.moments([np.stack([picture // 2 for picture in PICTURES[:5]])])
    by_hand = features.moments([picture[None] for picture in PICTURES])
    scores = clip.score([(PICTURES, CAPTIONS)])
    counted = []
    found = measure(batches(1, 5, 0, 2), Instruments(features, reference, clip), counted.append)
    assert found.fid == pytest.approx(frechet_distance(by_hand, reference), rel=1e-4)
    assert found.fid > 1
    assert found.clip_score == pytest.approx(scores.mean, rel=1e-6)
    assert found.clip_error == pytest.approx(scores.scores.std(ddof=1) / 8**0.5, rel=1e-5)
    assert found.truncated == scores.truncated > 0
    assert (found.pictures, sum(counted)) == (8, 8)
    assert len(found.shortages) == 2 and "the judged pictures are 8" in found.shortages[0]


def test_pictures_of_many_sizes_compile_nothing_anew(features):
    many = [np.full((10 + i, 12, 3), 40 * i, np.uint8) for i in range(5)]
    features.features_of(many[:1])  # the network itself
    before = COMPILED.copy()
    found = features.features_of(many)
    assert before == COMPILED
    by_hand = np.concatenate(list(features.features(picture[None] for picture in many)))
    np.testing.assert_allclose(found, by_hand, rtol=1e-4, atol=1e-4)


def test_each_instrument_may_be_left_out(features, clip):
    found = measure(batches(8), Instruments(clip=clip))
    assert found.fid is None and found.shortages == ()
    assert found.clip_score == pytest.approx(clip.score([(PICTURES, CAPTIONS)]).mean, rel=1e-6)
    reference = Moments(None, np.zeros(2048), np.zeros((2048, 2048)))
    found = measure(batches(2), Instruments(features, reference))
    assert found.clip_score is None and found.best == () and found.fid > 0


def test_the_best_and_the_worst(clip):
    scores = clip.score([(PICTURES, CAPTIONS)]).scores
    found = measure(batches(3, 5), Instruments(clip=clip))
    order = sorted(range(8), key=lambda i: -scores[i])
    assert [one.number for one in found.best] == order[:4]
    assert [one.score for one in found.worst] == sorted(scores.tolist())[:4]
    assert not {one.number for one in found.best} & {one.number for one in found.worst}
    for one in (*found.best, *found.worst):
        np.testing.assert_array_equal(one.picture, PICTURES[one.number])
        assert one.caption == CAPTIONS[one.number]
        assert one.score == pytest.approx(scores[one.number])
    repeated = ((PICTURES, CAPTIONS) for _ in range(5))
    found = measure(repeated, Instruments(clip=clip))
    assert len(found.best) == len(found.worst) == SHOWN
    # one picture five times: scores that are equal but for the last bit, which the place in a batch decides
    assert {one.number for one in found.best[:5]} == {order[0] + 8 * i for i in range(5)}


def test_few_pictures_are_in_memory(clip):
    alive, most = [], 0

    class Traced(np.ndarray):
        """An array that can be watched; its pictures are views, which keep it."""

    def drawn():
        nonlocal most
        for i in range(30):
            batch = Traced((3, 16, 16, 3), np.uint8)
            batch[:] = np.random.default_rng(i).integers(0, 256, batch.shape)
            alive.append(weakref.ref(batch))
            most = max(most, sum(each() is not None for each in alive))
            yield batch, ["a fox"] * 3
            del batch

    assert measure(drawn(), Instruments(clip=clip)).pictures == 90
    assert most <= 4  # those at hand; of the best and the worst only copies


def test_what_cannot_be_measured(features, clip):
    with pytest.raises(UserError, match="no pictures"):
        measure([], Instruments(clip=clip))
    with pytest.raises(ValueError, match="2 pictures for 1 captions"):
        measure([(PICTURES[:2], CAPTIONS[:1])], Instruments(clip=clip))
    with pytest.raises(ValueError, match="without a reference"):
        measure(batches(8), Instruments(features))
    other = Moments(None, np.zeros(64), np.zeros((64, 64)))
    with pytest.raises(UserError, match="are of 64 features, and FID's are 2048"):
        measure((pytest.fail("asked for pictures") for _ in [0]), Instruments(features, other))
