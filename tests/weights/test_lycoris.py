"""LoHa, LoKr and LoCon: what they add to weights, against PyTorch and against plain LoRAs that are equal."""

import numpy as np
import pytest
import torch
from flax import traverse_util
from safetensors.numpy import save_file

import engine
from engine.types import UserError
from engine.weights.folder import load_folder
from engine.weights.names import to_flax, to_torch
from tests.tiny import XL, shallow, tiny_folder

LINEAR = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"  # 16 -> 16
WORDS = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"  # 24 -> 24
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"  # 3 x 3, 16 -> 16
PATHS = {
    LINEAR: ("unet", "down_blocks", 0, "attentions", 0, "transformer_blocks", 0, "attn1", "to_q"),
    WORDS: ("text_encoder", "text_model", "encoder", "layers", 0, "self_attn", "q_proj"),
    CONV: ("unet", "down_blocks", 0, "resnets", 0, "conv1"),
}
WIDTH = {LINEAR: 16, WORDS: 24, CONV: 16}
RANK, ALPHA = 3, 1.5


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return (0.3 * np.random.default_rng([seed, *shape]).standard_normal(shape)).astype(np.float32)


def loha(layer: str, core: bool = False) -> dict[str, np.ndarray]:
    n = WIDTH[layer]
    if core:
        thin = {
            f"hada_w{i}_{side}": drawn(RANK, n, seed=10 * i + j)
            for i in (1, 2)
            for j, side in enumerate("ab")
        }
        return thin | {f"hada_t{i}": drawn(RANK, RANK, 3, 3, seed=i) for i in (1, 2)}
    inputs = 9 * n if layer == CONV else n
    found = {f"hada_w{i}_a": drawn(n, RANK, seed=i) for i in (1, 2)}
    return found | {f"hada_w{i}_b": drawn(RANK, inputs, seed=i) for i in (1, 2)}


def lokr(layer: str, *whole: int, core: bool = False) -> dict[str, np.ndarray]:
    """w1 is 4 x 2, w2 has what is left; those of `whole` are not made of thin ones."""
    outputs, inputs = WIDTH[layer] // 4, WIDTH[layer] // 2
    window = (3, 3) if layer == CONV else ()
    found = (
        {"lokr_w1": drawn(4, 2)} if 1 in whole else {"lokr_w1_a": drawn(4, RANK), "lokr_w1_b": drawn(RANK, 2)}
    )
    if 2 in whole:
        return found | {"lokr_w2": drawn(outputs, inputs, *window)}
    if core:
        thin = {"lokr_w2_a": drawn(RANK, outputs), "lokr_w2_b": drawn(RANK, inputs)}
        return found | thin | {"lokr_t2": drawn(RANK, RANK, 3, 3)}
    return found | {
        "lokr_w2_a": drawn(outputs, RANK),
        "lokr_w2_b": drawn(RANK, inputs * (9 if window else 1)),
    }


def locon(layer: str, core: bool = False) -> dict[str, np.ndarray]:
    n = WIDTH[layer]
    if not core:
        window = (3, 3) if layer == CONV else ()
        one = (1, 1) if window else ()
        return {"lora_up.weight": drawn(n, RANK, *one), "lora_down.weight": drawn(RANK, n, *window)}
    thin = {"lora_up.weight": drawn(n, RANK, 1, 1), "lora_down.weight": drawn(RANK, n, 1, 1)}
    return thin | {"lora_mid.weight": drawn(RANK, RANK, 3, 3)}


def expected(parts: dict[str, np.ndarray], layer: str) -> np.ndarray:
    """In PyTorch, from the definitions."""
    p = {name: torch.from_numpy(array) for name, array in parts.items()}
    n = WIDTH[layer]
    shape = (n, n, 3, 3) if layer == CONV else (n, n)

    def product(a: torch.Tensor, b: torch.Tensor, t: torch.Tensor | None) -> torch.Tensor:
        return a @ b if t is None else torch.einsum("io,ijhw,jc->ochw", a, t, b)

    scale = ALPHA / RANK
    if "hada_w1_a" in p:
        first, second = (product(p[f"hada_w{i}_a"], p[f"hada_w{i}_b"], p.get(f"hada_t{i}")) for i in (1, 2))
        return (scale * first * second).reshape(shape).numpy()
    if "lora_up.weight" in p:
        # what the layers do, one after another, to every unit picture
        convolved = torch.nn.functional.conv2d
        if layer != CONV:
            return (scale * p["lora_up.weight"] @ p["lora_down.weight"]).numpy()
        units = torch.eye(n * 25).reshape(n * 25, n, 5, 5)
        x = convolved(units, p["lora_down.weight"])
        x = convolved(x, p["lora_mid.weight"]) if "lora_mid.weight" in p else x
        answers = scale * convolved(x, p["lora_up.weight"])  # (n 25, n, 3, 3)
        centre = answers[:, :, 1, 1].reshape(n, 5, 5, n)[:, 1:4, 1:4]
        return centre.permute(3, 0, 1, 2).numpy()
    w1 = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
    w2 = p["lokr_w2"] if "lokr_w2" in p else product(p["lokr_w2_a"], p["lokr_w2_b"], p.get("lokr_t2"))
    w2 = w2.reshape(n // 4, n // 2, *shape[2:])
    both = "lokr_w1" in p and "lokr_w2" in p
    blocks = [torch.cat([w1[i, j] * w2 for j in range(2)], 1) for i in range(4)]
    return ((1 if both else scale) * torch.cat(blocks, 0)).numpy()


CASES = {
    "LoHa": (LINEAR, loha(LINEAR)),
    "LoHa of words": (WORDS, loha(WORDS)),
    "LoHa of a convolution": (CONV, loha(CONV)),
    "LoHa with a core": (CONV, loha(CONV, core=True)),
    "LoKr": (LINEAR, lokr(LINEAR, 1, 2)),
    "LoKr, a thin second": (LINEAR, lokr(LINEAR, 1)),
    "LoKr, a thin first": (LINEAR, lokr(LINEAR, 2)),
    "LoKr, both thin": (WORDS, lokr(WORDS)),
    "LoKr of a convolution": (CONV, lokr(CONV, 1, 2)),
    "LoKr of a convolution, thin": (CONV, lokr(CONV, 1)),
    "LoKr with a core": (CONV, lokr(CONV, 1, core=True)),
    "LoCon": (CONV, locon(CONV)),
    "LoCon with a core": (CONV, locon(CONV, core=True)),
    "LoRA": (LINEAR, locon(LINEAR)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny", **shallow({}))


@pytest.fixture(scope="module")
def plain(folder):
    return params_of(folder)


def params_of(folder, *loras) -> dict:
    parts = load_folder(folder, loras=loras).parts
    return traverse_util.flatten_dict({kind: part.params for kind, part in parts.items()})


def written(path, layers, alpha: float | None = ALPHA):
    tensors = {f"{layer}.{name}": array for layer, parts in layers.items() for name, array in parts.items()}
    tensors |= {} if alpha is None else {f"{layer}.alpha": np.array(alpha, np.float32) for layer in layers}
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_as_in_pytorch(folder, plain, tmp_path, case, scale):
    layer, parts = CASES[case]
    marker = {LINEAR: loha(LINEAR)} if case == "LoRA" or case == "LoCon" else {}  # beside one of another kind
    if layer == LINEAR:
        marker = {WORDS: loha(WORDS)} if marker else {}
    file = written(tmp_path / "file.safetensors", {layer: parts} | marker)
    found = params_of(folder, (file, scale))
    path = (*PATHS[layer], "kernel")
    added = to_flax(path, scale * expected(parts, layer), plain[path].ndim)
    assert np.abs(added).max() > 1e-3
    np.testing.assert_allclose(found[path], plain[path] + added, atol=1e-6)
    changed = {path for path in plain if (np.asarray(plain[path]) != np.asarray(found[path])).any()}
    assert changed == {(*PATHS[name], "kernel") for name in ({layer: 0} | marker)}


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize("case", ["LoRA", "LoCon", "LoHa", "LoKr with a core"])
def test_a_dora_says_how_long_rows_or_columns_are(folder, plain, tmp_path, case, rows):
    """The changed kernel, in PyTorch, its rows or columns of these lengths; a scale goes part of the way."""
    layer, parts = CASES[case]
    path = (*PATHS[layer], "kernel")
    W = torch.from_numpy(np.array(to_torch(path, np.asarray(plain[path]))))
    lengths = torch.from_numpy(np.abs(drawn(16, seed=9)) + 0.1)
    axis = 0 if rows else 1
    shape = [16 if i == axis else 1 for i in range(W.ndim)]
    whole = W + torch.from_numpy(expected(parts, layer))
    norms = whole.transpose(0, axis).reshape(16, -1).norm(dim=1).reshape(shape)
    wanted = whole * lengths.reshape(shape) / norms
    file = written(
        tmp_path / "a.safetensors", {layer: parts | {"dora_scale": lengths.reshape(shape).numpy()}}
    )
    for scale in (1.0, 0.4, 0.0):
        found = to_torch(path, np.asarray(params_of(folder, (file, scale))[path]))
        np.testing.assert_allclose(found, W + scale * (wanted - W), atol=2e-6)
    assert (wanted - W).abs().max() > 0.05


def test_a_dora_of_a_layer_that_is_not_square(folder, plain, tmp_path):
    """16 -> 64, two halves; rows of one file, and columns of another, which changes nothing of the first."""
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj"
    path = (*PATHS[LINEAR][:-2], "ff", "net", 0, "proj", "kernel")
    W = np.asarray(plain[path]).T  # (O, I)
    assert W.shape == (128, 16)
    files, wanted = [], W.copy()
    for i, (axis, lengths) in enumerate(((0, drawn(128, 1)), (1, drawn(1, 16)))):
        up, down = drawn(128, RANK, seed=i), drawn(RANK, 16, seed=i)
        parts = {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": lengths}
        files.append((written(tmp_path / f"{i}.safetensors", {layer: parts}, alpha=None), 1.0))
        whole = W + up @ down
        wanted += whole * lengths / np.linalg.norm(whole, axis=1 - axis, keepdims=True) - W
    for order in (files, files[::-1]):
        np.testing.assert_allclose(params_of(folder, *order)[path].T, wanted, atol=5e-6)


def test_without_alpha_the_scale_is_one(folder, plain, tmp_path):
    file = written(tmp_path / "file.safetensors", {LINEAR: loha(LINEAR)}, alpha=None)
    path = (*PATHS[LINEAR], "kernel")
    added = expected(loha(LINEAR), LINEAR).T * RANK / ALPHA
    np.testing.assert_allclose(params_of(folder, (file, 1.0))[path], plain[path] + added, atol=1e-6)


def test_names_of_the_wild(folder, plain, tmp_path):
    """LyCORIS' own prefix; an alpha that is a whole number, or alone."""
    parts = loha(LINEAR) | {"alpha": np.array(2, np.int64)}
    layers = {LINEAR.replace("lora_unet", "lycoris"): parts, CONV: {"alpha": np.array(1.0, np.float32)}}
    file = written(tmp_path / "file.safetensors", layers, alpha=None)
    path = (*PATHS[LINEAR], "kernel")
    added = expected(loha(LINEAR), LINEAR).T * 2 / ALPHA
    np.testing.assert_allclose(params_of(folder, (file, 1.0))[path], plain[path] + added, atol=1e-6)


def test_an_infinite_alpha_beside_whole_factors_says_nothing(folder, tmp_path):
    """Of a dimension so large that there are no thin ones, in half precision."""
    path, parts = (*PATHS[LINEAR], "kernel"), lokr(LINEAR, 1, 2)
    files = [
        written(
            tmp_path / f"{name}.safetensors",
            {LINEAR: parts | {"alpha": np.array(alpha, np.float16)}},
            alpha=None,
        )
        for name, alpha in (("one", 1), ("many", np.inf))
    ]
    one, many = (params_of(folder, (file, 1.0))[path] for file in files)
    np.testing.assert_array_equal(one, many)


def test_thin_parts_of_a_convolution_that_are_one_too(folder, plain, tmp_path):
    """w2_b as LyCORIS may shape it: (rank, I, K, K)."""
    flat = lokr(CONV, 1)
    shaped = flat | {"lokr_w2_b": flat["lokr_w2_b"].reshape(RANK, 8, 3, 3)}
    found = [
        params_of(folder, (written(tmp_path / f"{i}.safetensors", {CONV: parts}), 1.0))
        for i, parts in enumerate((flat, shaped))
    ]
    path = (*PATHS[CONV], "kernel")
    np.testing.assert_array_equal(found[0][path], found[1][path])
    assert (found[0][path] != plain[path]).any()


def test_several_files_one_after_another(folder, plain, tmp_path):
    """A LoHa, a plain LoRA and a LoKr of the same layer add up."""
    files = [
        written(tmp_path / f"{i}.safetensors", {LINEAR: parts})
        for i, parts in enumerate((loha(LINEAR), locon(LINEAR), lokr(LINEAR, 1)))
    ]
    path = (*PATHS[LINEAR], "kernel")
    added = sum(expected(parts, LINEAR).T for parts in (loha(LINEAR), locon(LINEAR), lokr(LINEAR, 1)))
    found = params_of(folder, *((file, 1.0) for file in files))
    np.testing.assert_allclose(found[path], plain[path] + added, atol=1e-6)


def test_a_picture_by_one_that_is_a_plain_lora_too(folder, tmp_path):
    """w1 of one by one makes of a LoKr a LoRA: the same picture, and another than without."""
    a, b = drawn(16, RANK), drawn(RANK, 16, seed=1)
    thin = {"lokr_w1": np.ones((1, 1), np.float32), "lokr_w2_a": a, "lokr_w2_b": b}
    files = [
        written(tmp_path / "lokr.safetensors", {LINEAR: thin}),
        written(tmp_path / "lora.safetensors", {LINEAR: {"lora_up.weight": a, "lora_down.weight": b}}),
    ]
    draw = {"prompts": ["a red fox"], "seed": 3, "steps": 2}
    first, second = (engine.load(folder, lora=[(file, 1.0)]).generate(**draw) for file in files)
    np.testing.assert_array_equal(first, second)
    assert (engine.load(folder).generate(**draw) != first).any()


def test_of_sdxl(tmp_path):
    folder = tiny_folder(tmp_path / "model", **shallow(XL))
    layer = WORDS.replace("lora_te_", "lora_te1_")
    file = written(tmp_path / "file.safetensors", {layer: loha(WORDS)})
    path = (*PATHS[WORDS], "kernel")
    added = expected(loha(WORDS), WORDS).T
    np.testing.assert_allclose(
        params_of(folder, (file, 1.0))[path], params_of(folder)[path] + added, atol=1e-6
    )


def without(parts, name):
    return {key: array for key, array in parts.items() if key != name}


@pytest.mark.parametrize(
    ("layers", "fault"),
    [
        ({LINEAR: loha(LINEAR) | {"dora_scale": drawn(15, 1)}}, "wrong shape, or parts that are missing"),
        (
            {
                LINEAR: {
                    "lora_up.weight": drawn(16, 1),
                    "lora_down.weight": np.array(1, np.float32),
                    "dora_scale": drawn(16, 1),
                }
            },
            "wrong shape, or parts that are missing",
        ),
        ({LINEAR: {"dora_scale": drawn(16, 1)}}, "wrong shape, or parts that are missing"),
        (
            {LINEAR: loha(LINEAR), CONV: {"diff": drawn(16, 16, 3, 3)}},
            r"whole differences, which are not read: \(1\) .*conv1\.diff$",
        ),
        ({LINEAR: loha(LINEAR) | {"scalar": drawn(1)}}, r"unknown keys: \(1\) .*to_q\.scalar$"),
        ({LINEAR: loha(LINEAR) | locon(LINEAR)}, "wrong shape, or parts that are missing"),  # of two kinds
        ({LINEAR: loha(LINEAR) | {"hada_w1_a": drawn(8, RANK)}}, "wrong shape, or parts that are missing"),
        ({LINEAR: lokr(LINEAR, 1, 2) | {"lokr_w1": np.zeros((0, 2), np.float32)}}, "wrong shape, or parts"),
        (
            {
                LINEAR: {
                    f"hada_w{i}_{side}": np.zeros((16, 0) if side == "a" else (0, 16), np.float32)
                    for i in (1, 2)
                    for side in "ab"
                }
            },
            "wrong shape, or parts that are missing",
        ),
        # as many numbers in another shape
        (
            {WORDS: loha(WORDS), LINEAR: {"lora_up.weight": drawn(8, 3), "lora_down.weight": drawn(3, 32)}},
            "wrong shape",
        ),
        ({WORDS: loha(WORDS), WORDS.replace("lora_te_", "lora_te1_"): loha(WORDS)}, r"given twice: \(5\) "),
        ({"lora_unet_none": loha(LINEAR)}, r"layers that the model does not have: \(5\) "),
        ({LINEAR: loha(WORDS)}, r"wrong shape, or parts that are missing: \(1\) unet\..*to_q$"),
        ({LINEAR: without(loha(LINEAR), "hada_w2_b")}, "wrong shape, or parts that are missing"),
        ({LINEAR: without(lokr(LINEAR, 1), "lokr_w1")}, "wrong shape, or parts that are missing"),
        ({LINEAR: lokr(LINEAR, 1, 2) | {"lokr_w1": drawn(5, 2)}}, "wrong shape, or parts that are missing"),
        ({LINEAR: lokr(LINEAR, 1, 2) | {"lokr_w1": drawn(32, 2)}}, "wrong shape, or parts that are missing"),
        ({LINEAR: loha(LINEAR) | {"alpha": np.float32([1, 2])}}, "wrong shape, or parts that are missing"),
        (
            {LINEAR: loha(LINEAR) | {"alpha": np.array(np.nan, np.float32)}},
            "wrong shape, or parts that are missing",
        ),
        (
            {LINEAR: loha(LINEAR) | {"hada_w1_a": np.zeros((16, RANK), np.int32)}},
            r"wrong type I32: \(1\) .*hada_w1_a$",
        ),
    ],
)
def test_another_file_is_one_line(folder, tmp_path, layers, fault):
    file = written(
        tmp_path / "file.safetensors", layers, None if any("alpha" in p for p in layers.values()) else ALPHA
    )
    with pytest.raises(UserError, match=rf"{file} does not fit this model: .*{fault}") as error:
        load_folder(folder, loras=[(file, 1.0)])
    assert "\n" not in str(error.value)
