"""Weights and long prompts in a pipeline: what a picture depends on, and what is compiled."""

import jax.numpy as jnp
import numpy as np
import pytest

import engine
from engine.conditions import told, weighted
from engine.requests import Request
from engine.text.reading import cut
from tests.compiled import COMPILED
from tests.tiny import XL, shallow, tiny_folder

pytestmark = pytest.mark.usefixtures("quick_compiler")

TWO_PARTS = "a red fox at night, a blue car"
STEPS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "model", **shallow({}))


@pytest.fixture(scope="module")
def plain(folder):
    return engine.load(folder)


@pytest.fixture(scope="module")
def pipe(folder):
    return engine.load(folder, prompt_weights=True, long_prompts=True)


def draw(pipe, prompts, negatives=None, **options):
    return pipe.generate(prompts, negatives, **{"seed": 7, "steps": STEPS, "batch_size": 2} | options)


def test_weights_are_a_line_through_a_prompt_of_no_words():
    rng = np.random.default_rng(0)
    z, empty = rng.standard_normal((2, 4, 3), np.float32)
    w = np.repeat(np.float32([[1], [0], [2], [-0.5]]), 3, axis=1)
    np.testing.assert_allclose(weighted(z, w, empty), empty + w * (z - empty), rtol=1e-6)
    half, half_empty = z.astype(jnp.bfloat16), empty.astype(jnp.bfloat16)
    found = weighted(half, w, half_empty)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found[:2], [half[0], half_empty[1]])  # once is exact, and so is never


def test_what_is_plain_stays_bit_for_bit(plain, pipe):
    prompts = ["a red fox", "a (cat:1) above a [(dog:1.1)"]  # 1.1 / 1.1
    expected = draw(plain, ["a red fox", "a cat above a dog"], "a car")
    np.testing.assert_array_equal(draw(pipe, prompts, "a (car:1.0)"), expected)


def test_without_the_options_marks_are_letters_and_what_is_too_long_is_cut(plain):
    marked, unmarked = draw(plain, ["a (red) fox", "a red fox"])
    assert (marked != unmarked).any()
    kept = TWO_PARTS.removesuffix(cut(TWO_PARTS, plain.model.tokenizer))
    assert kept == "a red fox at night, a "
    long, short = draw(plain, [TWO_PARTS, kept], latents=np.ones((2, 8, 8, 4), np.float32))
    np.testing.assert_array_equal(long, short)


def test_weights_move_the_picture_the_more_the_further_they_are_from_one(plain, pipe):
    (expected,) = draw(plain, ["a red fox at night"], latents=np.ones((1, 8, 8, 4), np.float32))

    def distance(weight):
        (image,) = draw(pipe, [f"a (red fox:{weight}) at night"], latents=np.ones((1, 8, 8, 4), np.float32))
        return np.abs(image.astype(int) - expected).mean()

    assert 0 < distance(1.2) < distance(2) < distance(4)
    assert 0 < distance(0.8) < distance(0)


def test_a_picture_depends_on_its_own_words_alone(pipe):
    """Neighbours of another length change nothing, wherever they stand; they are drawn apart."""
    prompts = ["a fox", TWO_PARTS, "a cat", "a dog", "a car", TWO_PARTS]
    settings = pipe.settings(STEPS, batch_size=2)
    batches = list(pipe.stream(prompts, None, settings, seed=7))
    assert [(batch.first, len(batch.images)) for batch in batches] == [(0, 1), (1, 1), (2, 2), (4, 1), (5, 1)]
    for batch in batches:
        for place, image in enumerate(batch.images, batch.first):
            (alone,) = draw(pipe, [prompts[place]], first_index=place)
            np.testing.assert_array_equal(image, alone)


def test_a_long_negative_prompt_counts_only_where_there_is_guidance(pipe):
    prompts, noise = ["a fox", "a fox"], {"latents": np.ones((2, 8, 8, 4), np.float32)}
    short, long = draw(pipe, prompts, ["a dog", f"a dog BREAK {TWO_PARTS}"], **noise)
    assert (short != long).any()
    short, long = draw(pipe, prompts, ["a dog", f"a dog BREAK {TWO_PARTS}"], **noise, guidance_scale=1)
    np.testing.assert_array_equal(short, long)


def test_a_model_that_has_learned_guidance_reads_no_negative_prompt(tmp_path):
    model = shallow({"unet": {"time_cond_proj_dim": 8}})
    pipe = engine.load(tiny_folder(tmp_path / "model", **model), long_prompts=True)
    noise = {"latents": np.ones((2, 8, 8, 4), np.float32)}
    short, long = draw(pipe, ["a fox", "a fox"], ["a dog", TWO_PARTS], **noise)
    np.testing.assert_array_equal(short, long)
    assert pipe.length("a fox", TWO_PARTS, 5.0) == (1,)


def test_of_alternating_lengths_no_batch_is_larger_than_its_run(pipe):
    """So that a batch of one is not filled up to all of them."""
    prompts = ["a fox", TWO_PARTS] * 3
    sizes = []
    settings = pipe.settings
    pipe.settings = lambda *options: (found := settings(*options), sizes.append(found.batch_size))[0]
    try:
        assert len(pipe.generate(prompts, seed=7, steps=STEPS)) == 6
    finally:
        del pipe.settings
    assert sizes == [1]


def test_batches_of_one_length_are_the_neighbours_of_it(pipe, plain):
    short, long = "a fox", TWO_PARTS
    guided, alone = pipe.settings(STEPS, batch_size=2), pipe.settings(STEPS, guidance_scale=1, batch_size=2)

    def batches(pipe, settings, *pairs):
        return [(b.start, b.stop) for b in pipe.batches(*map(list, zip(*pairs, strict=True)), settings)]

    assert batches(pipe, guided, *[(short, "")] * 5) == [(0, 2), (2, 4), (4, 5)]
    assert batches(pipe, guided, (long, ""), (short, long), (short, "")) == [(0, 2), (2, 3)]
    assert batches(pipe, alone, (long, ""), (short, long), (short, "")) == [(0, 1), (1, 3)]
    assert batches(plain, guided, (long, ""), (short, long), (short, "")) == [(0, 2), (2, 3)]


def test_another_weight_compiles_nothing_and_a_length_once(pipe):
    draw(pipe, ["a fox"])
    before = COMPILED.copy()
    draw(pipe, ["a (fox:1.3)", "[a cat] above"], "a (dog)")
    assert before == COMPILED
    draw(pipe, [f"{TWO_PARTS} BREAK a fox BREAK a fox"])  # as long as no other test has it
    more = COMPILED.copy()
    assert more != before and more["jit(_encode)"] == before["jit(_encode)"]
    draw(pipe, [f"({TWO_PARTS}:1.2) BREAK a cat BREAK a cat", f"a BREAK a BREAK {TWO_PARTS}"], "a dog")
    assert more == COMPILED


def test_dispatch_draws_as_stream_does(pipe):
    """The way of jobs: requests and contexts, words once for all."""
    settings = pipe.settings(STEPS, batch_size=2)
    requests = [
        Request(TWO_PARTS, negative, 7, i, settings.guidance_scale)
        for i, negative in enumerate(("", "a dog"))
    ]
    texts = [text for r in requests for text in (r.prompt, r.negative_prompt)]
    contexts = pipe.encode([*texts, *pipe.beside], 2)
    images, *_ = pipe.dispatch(requests, contexts, settings)
    np.testing.assert_array_equal(np.asarray(images), draw(pipe, [TWO_PARTS] * 2, ["", "a dog"]))


def test_sdxl_without_a_negative_prompt_is_steered_away_from_zeros_of_any_length(tmp_path):
    folder = tiny_folder(tmp_path / "model", **shallow(XL))
    pipe = engine.load(folder, long_prompts=True)
    assert pipe.model.zeros
    context = pipe.encode([TWO_PARTS, ""], 1)
    request = [Request(TWO_PARTS, "", 0, 0, 5.0)]
    cond, uncond = told(pipe.model, request, context, pipe.settings(STEPS))
    assert cond.context.words.shape == uncond.context.words.shape == (1, 2 * 16, 44)
    assert not uncond.context.words.any() and not uncond.context.pooled.any()
    assert np.isfinite(draw(pipe, [TWO_PARTS])).all()
    marked = engine.load(folder, prompt_weights=True)
    noise = {"latents": np.ones((2, 8, 8, 4), np.float32)}
    nothing, brackets = draw(marked, ["a fox"] * 2, ["", "()"], **noise)
    np.testing.assert_array_equal(nothing, brackets)


def test_heat_of_words_in_later_parts(pipe):
    settings = pipe.settings(3, batch_size=1)
    (batch,) = pipe.stream([TWO_PARTS], None, settings, seed=7, heat=True)
    assert batch.heat.shape == (1, 8, 8, 32)
    np.testing.assert_allclose(batch.heat.sum(-1), 1, rtol=1e-5)
    places = dict(pipe.words(TWO_PARTS))
    assert min(places["car"]) > 16 and max(places["car"]) < 32
