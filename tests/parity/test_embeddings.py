"""An embedding means the same here and in PyTorch diffusers: ids, context and picture are the same."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import engine
from engine.weights import embeddings
from engine.weights.folder import load_folder
from tests.parity.common import assert_same
from tests.parity.pictures import PROMPTS, STEPS, psnr
from tests.parity.test_lora import GUIDANCE, LATENTS, drawn_by, in_pytorch
from tests.tiny import tiny_folder

pytestmark = pytest.mark.usefixtures("quick_compiler")

WIDTH = 24
ABOUT = [
    "a <my-thing> at night",
    "<my-thing>",
    "a cat above<my-thing>, and a <my-thing>.",
    "a red fox",
    "<my-thing> " * 9,  # cut in the middle of it
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("inversion") / "model")


def vectors(count: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, WIDTH), np.float32)


def their_ids(pipeline, prompts) -> torch.Tensor:
    """As StableDiffusionPipeline.encode_prompt takes them."""
    converted = pipeline.maybe_convert_prompt(list(prompts), pipeline.tokenizer)
    length = pipeline.tokenizer.model_max_length
    options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
    return pipeline.tokenizer(converted, **options).input_ids


def assert_same_words(folder, files, pipeline, prompts) -> None:
    pipe = engine.load(folder, embeddings=files)
    ids = their_ids(pipeline, prompts)
    np.testing.assert_array_equal(pipe.model.tokenizer.encode(list(prompts)), ids.numpy())
    with torch.no_grad():
        theirs = pipeline.text_encoder(ids).last_hidden_state
    ours = pipe.encode(prompts, len(prompts))
    assert_same(np.stack([ours[prompt].words for prompt in prompts]), theirs)


@pytest.mark.parametrize("count", [1, 3])
def test_diffusers_reads_our_file(folder, tmp_path, count):
    embeddings.save(tmp_path, embeddings.Embedding("<my-thing>", vectors(count)))
    pipeline = in_pytorch(folder)
    pipeline.load_textual_inversion(tmp_path)
    assert_same_words(folder, [tmp_path], pipeline, ABOUT)


@pytest.mark.parametrize("shape", [(1, WIDTH), (3, WIDTH), (WIDTH,)], ids=str)
def test_we_read_what_diffusers_writes(folder, tmp_path, shape):
    """Its example script, textual_inversion.py, writes {placeholder: rows of the table} by safetensors."""
    learned = torch.from_numpy(vectors(3)).flatten()[: np.prod(shape)].reshape(shape)
    save_file({"<my-thing>": learned}, tmp_path / "learned_embeds.safetensors", metadata={"format": "pt"})
    pipeline = in_pytorch(folder)
    pipeline.load_textual_inversion(tmp_path)
    assert_same_words(folder, [tmp_path], pipeline, ABOUT)


def test_two_files_one_of_them_in_the_format_of_automatic1111(folder, tmp_path):
    # One vector: of words in capitals with several, diffusers 0.42 with transformers 5 reads the first alone.
    ours = embeddings.save(tmp_path, embeddings.Embedding("<My-Thing>", vectors(1)))
    save_file({"emb_params": torch.from_numpy(vectors(4))}, tmp_path / "zzbad.safetensors")
    pipeline = in_pytorch(folder)
    pipeline.load_textual_inversion(tmp_path)
    pipeline.load_textual_inversion(tmp_path, weight_name="zzbad.safetensors", token="zzbad")
    prompts = ["a <My-Thing>, zzbad", "zzbad <my-thing> zzbad", "a cat"]
    assert_same_words(folder, [ours, tmp_path / "zzbad.safetensors"], pipeline, prompts)


def test_a_folder_that_diffusers_saved_with_its_words(folder, tmp_path):
    embeddings.save(tmp_path, embeddings.Embedding("<my-thing>", vectors(3)))
    pipeline = in_pytorch(folder)
    pipeline.load_textual_inversion(tmp_path)
    pipeline.save_pretrained(tmp_path / "model")
    ours = load_folder(tmp_path / "model").tokenizer.encode(ABOUT)
    np.testing.assert_array_equal(ours, their_ids(pipeline, ABOUT).numpy())
    assert_same_words(tmp_path / "model", [], pipeline, ABOUT)


def test_the_same_picture(folder, tmp_path):
    file = embeddings.save(tmp_path, embeddings.Embedding("fox at", vectors(3)))  # in the first of PROMPTS
    pipeline = in_pytorch(folder)
    pipeline.load_textual_inversion(tmp_path)
    theirs = drawn_by(pipeline)
    options = {"steps": STEPS, "guidance_scale": GUIDANCE, "latents": LATENTS}
    ours = engine.load(folder, embeddings=[file]).generate(PROMPTS, **options)
    assert psnr(ours, theirs) >= 40
    plain = engine.load(folder).generate(PROMPTS, **options)
    assert psnr(plain[:1], theirs[:1]) < 30 and psnr(plain[1:], theirs[1:]) >= 40
