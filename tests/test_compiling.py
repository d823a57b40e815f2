"""Programs are compiled beside each other, in threads, and each of them once."""

import threading

import jax
import numpy as np
import pytest

import engine
from engine.compiling import Compiling
from engine.requests import Given
from engine.texts import Texts
from tests.compiled import COMPILED
from tests.tiny import shallow, tiny_folder

pytestmark = pytest.mark.usefixtures("quick_compiler")

PROMPTS, AHEAD = ["a red fox", "a cat"], {"jit(segment)", "jit(_decode)"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "model", **shallow({}))


@pytest.fixture
def told(monkeypatch):
    """What began, in its order: programs to compile, and words to read."""
    order = []

    def spy(kind, name, tell):
        plain = getattr(kind, name)
        monkeypatch.setattr(
            kind, name, lambda self, *given: (order.append(tell(*given)), plain(self, *given))[1]
        )

    spy(Compiling, "begin", lambda program, *_: program.__name__)
    spy(Texts, "encode", lambda *_: "encode")
    return order


def draw(pipe, **options):
    return pipe.generate(PROMPTS, **{"seed": 7, "steps": 2, "batch_size": 2} | options)


@pytest.mark.parametrize("mode", ["shard_map", "jit"])
def test_before_words_are_read_and_once(folder, told, mode):
    before = COMPILED.copy()
    draw(engine.load(folder, parallel=mode))
    assert told == ["segment", "_decode", "encode"]
    assert {name: (COMPILED - before)[name] for name in AHEAD} == dict.fromkeys(AHEAD, 1)


def test_with_pmap_when_they_are_called(folder, told):
    draw(engine.load(folder, parallel="pmap"))
    assert told == ["encode"]


@pytest.mark.parametrize("what", ["long prompts", "a picture"])
def test_where_more_must_be_known_behind_the_words(folder, told, what):
    pipe = engine.load(folder, long_prompts=what == "long prompts")
    given = [Given(np.zeros((16, 16, 3), np.uint8))] * 2 if what == "a picture" else None
    before = COMPILED.copy()
    draw(pipe, given=given)
    assert told == ["encode", "segment", "_decode"]
    assert {name: (COMPILED - before)[name] for name in AHEAD} == dict.fromkeys(AHEAD, 1)


def test_another_size_begins_again_and_the_same_does_not(folder, told):
    pipe = engine.load(folder)
    draw(pipe)
    draw(pipe, seed=8)
    assert told.count("segment") == 1
    draw(pipe, height=24)
    assert told.count("segment") == 2


def test_what_fails_in_a_thread_is_compiled_where_it_is_called(folder, monkeypatch):
    expected = draw(engine.load(folder))

    def submit(self, compile_):
        def fail():
            assert threading.current_thread() is not threading.main_thread()
            raise MemoryError

        return plain(self, fail)

    pipe = engine.load(folder)
    kind = type(pipe.programs.compiling._threads)
    plain = kind.submit
    monkeypatch.setattr(kind, "submit", lambda self, given: submit(self, given))
    np.testing.assert_array_equal(draw(pipe), expected)


@pytest.mark.parametrize("mode", ["shard_map", "jit"])
def test_once_within_what_jax_keeps_for_a_thread(folder, mode):
    """Where a call waits for what was begun: what the thread compiles is found in another context, too."""
    before = COMPILED.copy()
    with jax.default_matmul_precision("highest"):
        draw(engine.load(folder, parallel=mode))
    assert {name: (COMPILED - before)[name] for name in AHEAD} == dict.fromkeys(AHEAD, 1)


def test_what_the_compiler_says_is_told(folder, monkeypatch):
    def fail(self):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    pipe = engine.load(folder)
    kind = type(pipe.programs.compiling._threads)
    plain = kind.submit
    monkeypatch.setattr(kind, "submit", lambda self, given: plain(self, fail, None))
    before = COMPILED.copy()
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        draw(pipe)
    assert (COMPILED - before)["jit(segment)"] == 0


def test_what_is_compiled_already_is_not_prepared_again(folder, told, monkeypatch):
    pipe = engine.load(folder)
    draw(pipe)
    monkeypatch.setattr(Texts, "blank", None)  # to be called again
    draw(pipe, seed=8)
