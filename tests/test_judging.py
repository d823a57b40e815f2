"""Pictures judged by a CLIP: the scores, which of several is kept, and that it is a picture like others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import engine
from engine.evaluate.clip_score import ClipScorer
from engine.judging import arrived, better, drawn_at_once, spread
from engine.parts import module
from engine.requests import Candidates, Finished, Given, Request
from engine.types import UserError
from engine.weights.clip_pixels import prepare
from tests.compiled import COMPILED
from tests.instruments import tiny_clip
from tests.tiny import shallow, tiny_folder
from tests.upscalers import tiny_upscaler

pytestmark = pytest.mark.usefixtures("quick_compiler")

PROMPTS, STEPS, SEED, N = ["a red fox", "a blue car", "a cat"], 2, 7, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "model", **shallow({}))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def pipe(folder, clip):
    return engine.load(folder, judge=clip)


@pytest.fixture(scope="module")
def every(folder):
    """All candidates of each prompt, drawn without a judge."""
    pipe = engine.load(folder)
    asked = {"seed": SEED, "steps": STEPS, "batch_size": N}
    return {p: pipe.generate([p] * N, first_index=N * i, **asked) for i, p in enumerate(PROMPTS)}


@pytest.fixture(scope="module")
def chosen(clip, every):
    """The index of the best of each prompt."""
    scorer = ClipScorer(clip)
    model, tokenizer, found = scorer.model, scorer.tokenizer, []
    for i, (prompt, images) in enumerate(every.items()):
        cosines = cosines_of(model, tokenizer, scorer.pixels, images, prompt)
        best, second = np.sort(cosines)[::-1][:2]
        assert best - second > 0.5  # so that the last digits do not matter
        found.append(N * i + int(cosines.argmax()))
    assert {index % N for index in found} != {0}
    return found


def cosines_of(model, tokenizer, pixels, images, prompt):
    """100 cos, which ClipScorer cuts off at 0, of pictures that Pillow has prepared."""
    clip = module(model, model.params)
    seen = clip.image_features(jnp.stack([prepare(image, pixels) for image in images]))
    return 100 * np.asarray(seen @ clip.text_features(jnp.asarray(tokenizer.encode([prompt])))[0])


def kept(pipe, prompts=PROMPTS, batch_size=3, **how):
    """The batches of a run, and all of their pictures, indices and scores."""
    seen = {name: how.pop(name) for name in ("frames", "heat", "first_index") if name in how}
    settings = pipe.settings(STEPS, batch_size=batch_size, **{"best_of": N} | how)
    batches = list(pipe.stream(prompts, None, settings, seed=SEED, **seen))
    images, scores = (np.concatenate([getattr(b, name) for b in batches]) for name in ("images", "scores"))
    return images, [index for b in batches for index in b.index], scores, batches


def test_scores_are_those_of_clip_score(pipe, clip):
    images, index, scores, _ = kept(pipe, best_of=None)
    scorer = ClipScorer(clip)
    for image, prompt, score in zip(images, PROMPTS, scores, strict=True):
        (expected,) = cosines_of(scorer.model, scorer.tokenizer, scorer.pixels, image[None], prompt)
        assert score == pytest.approx(expected, abs=0.1)  # a level here and there
    assert index == [0, 1, 2] and np.ptp(scores) > 1


@pytest.mark.parametrize("batch_size", [1, 3, 4, 6, 12])
def test_the_best_is_kept_however_many_are_drawn_at_once(pipe, every, chosen, batch_size):
    images, index, _, _ = kept(pipe, batch_size=batch_size)
    assert index == chosen
    for image, prompt, i in zip(images, PROMPTS, index, strict=True):
        assert np.abs(image.astype(int) - every[prompt][i % N]).max() <= 1


def test_what_is_kept_is_drawn_again_by_its_index(pipe, chosen):
    images, index, _, _ = kept(pipe)
    for image, prompt, i in zip(images, PROMPTS, index, strict=True):
        again = pipe.generate([prompt], seed=SEED, first_index=i, steps=STEPS, batch_size=3)
        np.testing.assert_array_equal(again[0], image)
    np.testing.assert_array_equal(
        pipe.generate(PROMPTS, seed=SEED, steps=STEPS, batch_size=3, best_of=N), images
    )


def test_stages_and_words_are_of_what_is_kept(pipe, chosen):
    images, index, _, (batch,) = kept(pipe, PROMPTS[:1], frames=3, heat=True)
    settings = pipe.settings(STEPS, batch_size=3)
    (alone,) = pipe.stream(PROMPTS[:1], None, settings, seed=SEED, first_index=index[0], frames=3, heat=True)
    np.testing.assert_array_equal(batch.frames.noisy, alone.frames.noisy)
    np.testing.assert_array_equal(batch.frames.denoised[0, -1], images[0])
    np.testing.assert_array_equal(batch.heat, alone.heat)
    assert index == chosen[:1]


def test_steps_are_told_as_many_as_are_taken(pipe):
    for batch_size, frames, passes in ((1, 0, 4), (3, 0, 2), (4, 0, 1), (4, 2, 2)):
        settings, told = pipe.settings(STEPS, batch_size=batch_size, best_of=N), []
        list(pipe.stream(["a cat"], None, settings, seed=1, frames=frames, progress=told.append))
        assert sum(told) == STEPS * passes == STEPS * pipe.passes_of(1, settings, frames > 0)


def test_other_words_and_more_candidates_compile_nothing(pipe):
    kept(pipe, batch_size=2)
    before = COMPILED.copy()
    kept(pipe, ["a dog above a cat", "two trees"], batch_size=2, best_of=7)
    assert before == COMPILED


def test_pictures_are_judged_before_an_upscaler_and_behind_hires(folder, clip, tmp_path, chosen):
    net = tiny_upscaler(tmp_path / "net.safetensors", scale=3)
    pipe = engine.load(folder, judge=clip, upscaler=net)
    images, index, _, _ = kept(pipe)
    assert index == chosen and images.shape == (3, 48, 48, 3)
    larger, index, *_ = kept(pipe, PROMPTS[:1], hires=2, hires_strength=0.9)
    settings = {"seed": SEED, "steps": STEPS, "batch_size": 3, "hires": 2, "hires_strength": 0.9}
    again = pipe.generate(PROMPTS[:1], first_index=index[0], **settings)
    np.testing.assert_array_equal(again, larger)
    candidates = [
        kept(pipe, PROMPTS[:1], first_index=i, best_of=None, hires=2, hires_strength=0.9) for i in range(N)
    ]
    assert int(np.argmax([one[2][0] for one in candidates])) == index[0]


def test_weighted_words_are_judged_without_their_marks(folder, clip):
    plain = engine.load(folder, judge=clip).encode(["a red fox"], 1)["a red fox"]
    marked = engine.load(folder, judge=clip, prompt_weights=True).encode(["a (red:1.3) fox"], 1)
    np.testing.assert_array_equal(marked["a (red:1.3) fox"].judged, plain.judged)


def test_mistakes_are_one_line(folder, pipe, tmp_path):
    with pytest.raises(UserError, match=r"best_of=4 without a judge.*judge=FOLDER"):
        engine.load(folder).settings(STEPS, best_of=4)
    with pytest.raises(UserError, match="best_of=0: write how many"):
        pipe.settings(STEPS, best_of=0)
    with pytest.raises(UserError, match="best_of=2 with latents"):
        pipe.generate(["a cat"], steps=STEPS, best_of=2, latents=np.zeros((1, 8, 8, 4), np.float32))
    with pytest.raises(UserError, match=f"{tmp_path} is no CLIP: looked for config.json"):
        engine.load(folder, judge=tmp_path)


# what is kept, on the host and on the devices


def asked(count):
    return [Request(f"{i}", "", 3, 100 * i, 5.0, Given()) for i in range(count)]


@pytest.mark.parametrize(
    ("count", "best_of", "size"), [(1, 1, 4), (1, 8, 4), (3, 5, 8), (4, 3, 4), (2, 2, 9)]
)
def test_every_candidate_is_drawn(count, best_of, size):
    batches, of = spread(asked(count), best_of, size)
    drawn = {(r.prompt, r.index) for batch in batches for r in batch}
    assert drawn == {(f"{i}", 100 * i + k) for i in range(count) for k in range(best_of)}
    assert {len(batch) for batch in batches} == {size}
    assert all(r.prompt == f"{i}" for batch in batches for r, i in zip(batch, of.tolist(), strict=True))
    assert len(batches) == -(-best_of // drawn_at_once(count, best_of, size))
    if best_of == 1:
        assert batches == [[*asked(count), *[asked(count)[-1]] * (size - count)]]


def candidates(scores, finite=None, safe=None, first=0):
    count = len(scores)
    index = np.arange(first, first + count, dtype=np.uint32)
    images = np.broadcast_to(index.astype(np.uint8)[:, None, None, None], (count, 1, 1, 3))
    finite, safe = (np.ones(count, bool) if x is None else np.array(x, bool) for x in (finite, safe))
    return images, finite, finite & safe, index, np.float32(scores)


def test_nan_and_what_is_held_back_are_kept_last_of_all():
    best = candidates([10, -90, 10, 10, 99], finite=[1, 1, 0, 1, 0], safe=[1, 0, 1, 1, 1])
    new = candidates([11, -99, -99, 10, 0], finite=[0, 1, 1, 1, 0], safe=[1, 1, 0, 1, 1], first=5)
    found = better(*(Candidates(*map(jax.numpy.asarray, each)) for each in (best, new)))
    assert found.index.tolist() == [0, 6, 7, 3, 4]
    assert found.images[:, 0, 0, 0].tolist() == found.index.tolist()


def test_what_fills_a_batch_is_taken_away():
    found = arrived(Finished(*candidates([1, 2, 3, 9, 0, 4]), np.int32([0, 1, 0, 1, 0, 1])), 2)
    assert found.index.tolist() == [2, 3] and found.scores.tolist() == [3, 9]
    unjudged = arrived(Finished(*candidates([1, 2, 3])[:4]), 2)
    assert unjudged.index.tolist() == [0, 1] and unjudged.scores is None
