"""Checkpoints: which are kept, what is read of them alone, and what becomes of damaged ones."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from engine.config import OptimConfig, StageConfig
from engine.train import checkpoint, loop, optim, step
from engine.train.checkpoint import Checkpoints, restore_params
from engine.types import UserError
from tests.train.tiny_run import steps_in

CONFIG = StageConfig(
    steps=6,
    batch_size=4,
    ema=(0.9, 0.5),
    ema_sigma_rel=(0.1,),
    ema_snapshot_every=4,
    checkpoint_every=2,
    keep_last=4,
    max_skipped=3,
    optim=OptimConfig(learning_rate=0.1, warmup_steps=0, decay_steps=0),
)
NAMES = ["ema_0.5", "ema_0.9", "power_0.1"]
PARAMS = {"layers": {i: {"kernel": jnp.full((16, 24), i + 1.0), "bias": jnp.zeros(24)} for i in range(11)}}
SMALL = {"layers": {i: PARAMS["layers"][i] for i in (0, 1)}}  # as many kinds of files, read in less time


def squares(params, frozen, batch, key):
    x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
    y = sum(x @ layer["kernel"] + layer["bias"] for layer in params["layers"].values())
    return jnp.mean(jnp.square(y)), {}


def batch_at(i: int):
    return {"x": np.random.default_rng(i).standard_normal((4, 16), np.float32)}


def fit(workdir, config=CONFIG, batch_at=batch_at, loss=squares):
    optimizer = optim.optimizer(config.optim, config.steps)
    return loop.fit("tiny", loss, PARAMS, {}, optimizer, config, seed=0, batch_at=batch_at, workdir=workdir)


def fresh(config=CONFIG, params=PARAMS) -> step.TrainState:
    return step.init(params, optim.optimizer(config.optim, config.steps), config)


def state_at(number: int, loss: float = 1.0, params=PARAMS) -> step.TrainState:
    """A state in which every array tells the step."""

    def told(x):
        noise = np.random.default_rng([number, x.size]).standard_normal(x.shape)  # no file of it is small
        return x + jnp.asarray(number if x.dtype == jnp.int32 else noise, x.dtype)

    state = jax.tree.map(told, fresh(params=params))
    return state._replace(step=jnp.int32(number), tally=state.tally._replace(loss=jnp.float32(loss)))


def same(a, b) -> bool:
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    """A folder with the checkpoints of steps 1 and 2."""
    return written(tmp_path_factory.mktemp("saved") / "stage", PARAMS)


@pytest.fixture(scope="module")
def saved_small(tmp_path_factory) -> pathlib.Path:
    return written(tmp_path_factory.mktemp("saved") / "small", SMALL)


def written(folder, params) -> pathlib.Path:
    with Checkpoints(folder) as checkpoints:
        for number in (1, 2):
            checkpoints.save(state_at(number, params=params), {"seed": 0})
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(saved, tmp_path / "stage"))


def restored(folder, params=PARAMS) -> step.TrainState | None:
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(fresh(params=params))


def test_the_whole_state_comes_back(folder):
    assert same(restored(folder), state_at(2))


def test_there_is_nothing_to_restore_in_a_new_folder(tmp_path):
    assert restored(tmp_path / "new") is None


def test_the_newest_and_the_best_are_kept(tmp_path):
    """Losses 5, 1, 4, 2, 6, 7, and then 3 in another process: the last two, and the two lowest."""
    with Checkpoints(tmp_path, keep_last=2, keep_best=2) as checkpoints:
        for number, loss in enumerate([5, 1, 4, 2, 6, 7], 1):
            checkpoints.save(state_at(number, loss), {})
    assert steps_in(tmp_path) == [2, 4, 5, 6]
    with Checkpoints(tmp_path, keep_last=2, keep_best=2) as checkpoints:
        checkpoints.save(state_at(7, 1.5), {})
    assert steps_in(tmp_path) == [2, 6, 7]
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(state_at(8, 9.0), {})
    assert steps_in(tmp_path) == [8]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state_at(1), {})

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device [os_error_code='28']")

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    message = f"no space for a checkpoint in {tmp_path}; that of step 1 is whole: free some"
    with pytest.raises(UserError, match=message), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state_at(2), {})


@pytest.mark.parametrize("which", ["params", *NAMES])
def test_params_are_read_alone(folder, which):
    for item in ("opt_state", *({"params", *NAMES} - {which})):
        shutil.rmtree(folder / "2" / item)
    found = restore_params(folder, which)
    state = state_at(2)
    expected = {"params": state.params, **state.ema_params}[which]
    assert jax.tree.structure(found) == jax.tree.structure(expected)  # layers 0..10 are numbers, in order
    assert same(found, expected)


def test_what_is_not_there_is_named(folder):
    assert same(restore_params(folder, step=1), state_at(1).params)
    with pytest.raises(
        UserError, match=r"has no ema_0\.7: write one of ema_0\.5, ema_0\.9, params, power_0\.1"
    ):
        restore_params(folder, "ema_0.7")
    with pytest.raises(UserError, match=r"has no checkpoint 3; it has \[1, 2\]"):
        restore_params(folder, step=3)
    DAMAGES["one bit"](max((folder / "2/params").rglob("d/*"), key=lambda file: file.stat().st_size))
    with pytest.raises(UserError, match="params cannot be read"):
        restore_params(folder)


DAMAGES = {
    "deleted": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "one bit": lambda file: flip(file),
}


def flip(file: pathlib.Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


@pytest.mark.parametrize("item", ["params", "opt_state"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(folder, capsys, item, damage):
    """The largest file holds the arrays."""
    DAMAGES[damage](max((folder / "2" / item).rglob("d/*"), key=lambda file: file.stat().st_size))
    with Checkpoints(folder) as checkpoints:
        assert same(checkpoints.restore(fresh()), state_at(1))
        told = capsys.readouterr().out
        assert told.startswith(f"{folder}/2 cannot be read (") and told.count("\n") == 1
        checkpoints.save(state_at(2), {})  # as the run comes to it again
    assert steps_in(folder) == [1, 2] and (folder / "broken-2").is_dir()
    assert same(restored(folder), state_at(2))


def test_a_step_that_is_damaged_again_has_another_name(folder):
    for _ in range(3):
        DAMAGES["empty"](folder / "2/position/metadata")
        with Checkpoints(folder) as checkpoints:
            assert same(checkpoints.restore(fresh()), state_at(1))
            checkpoints.save(state_at(2), {})
    assert {file.name for file in folder.glob("broken-*")} == {"broken-2", "broken-2-2", "broken-2-3"}


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damage_to_any_file_passes_for_a_checkpoint(saved_small, tmp_path, damage):
    """Some files are not needed: then all is there. Of every kind of file, one."""
    saved, told = saved_small, {number: state_at(number, params=SMALL) for number in (1, 2)}
    files = [file.relative_to(saved) for file in sorted((saved / "2").rglob("*")) if file.is_file()]
    kinds = {(str(file.parent), file.name if file.parent.name != "d" else file): file for file in files}
    for i, file in enumerate(each for each in kinds.values() if "ema" not in str(each)):
        folder = pathlib.Path(shutil.copytree(saved, tmp_path / str(i)))
        DAMAGES[damage](folder / file)
        state = restored(folder, SMALL)
        assert same(state, told[int(state.step)]), file


def test_a_position_of_another_version_cannot_be_read(folder, capsys):
    file = folder / "2/position/metadata"
    position = json.loads(file.read_text())
    del position["digest"], position["skipped"]
    file.write_text(json.dumps(position | {"digest": checkpoint._digest(position)}))
    assert same(restored(folder), state_at(1))
    assert "it lacks skipped" in capsys.readouterr().out


def test_where_none_can_be_read_nothing_is_touched(folder):
    for number in (1, 2):
        (folder / str(number) / "position/metadata").unlink()
    with pytest.raises(UserError, match=f"no checkpoint in {folder} can be read"):
        restored(folder)
    assert steps_in(folder) == [1, 2]


@pytest.mark.parametrize(
    "change, named",
    [
        ({"ema": (0.9,)}, "another ema_0.5: give another --workdir"),
        ({"ema_sigma_rel": (0.2,)}, "another power_0.1, power_0.2"),
        ({"optim": OptimConfig(name="lion")}, "another opt_state"),
    ],
    ids=["ema", "power", "optimizer"],
)
def test_the_checkpoints_of_another_run_are_refused(folder, change, named):
    config = StageConfig(**{**{"ema": CONFIG.ema, "ema_sigma_rel": CONFIG.ema_sigma_rel}, **change})
    with Checkpoints(folder) as checkpoints, pytest.raises(UserError, match=named):
        checkpoints.restore(fresh(config))
    assert steps_in(folder) == [1, 2]


def test_bits_tell_any_one_bit_and_any_two_places():
    x = np.random.default_rng(0).standard_normal((3, 4, 5), np.float32)

    def bits(array, start=(0, 0, 0)):
        return int(checkpoint.bits(jnp.asarray(array), np.array(start, np.uint32), x.shape))

    whole = bits(x)
    raw = x.view(np.uint32).reshape(-1)
    expected = sum((2 * i + 1) * int(value) for i, value in enumerate(raw)) % 2**32
    assert whole == expected
    for bit in range(32):
        other = raw.copy()
        other[17] ^= np.uint32(1 << bit)
        assert bits(other.view(np.float32).reshape(x.shape)) != whole
    assert bits(x[:, ::-1]) != whole
    parts = bits(x[:, :1]) + bits(x[:2, 1:], (0, 1, 0)) + bits(x[2:, 1:], (2, 1, 0))
    assert parts % 2**32 == whole, "wherever the parts of an array lie, the sum is the same"


def test_a_run_with_a_damaged_checkpoint_ends_as_one_without(tmp_path):
    """And it leaves snapshots, of every fourth step and of the last."""
    whole = fit(tmp_path / "whole")
    assert same(whole, restore_params(tmp_path / "whole/tiny", "ema_0.9"))
    assert [each.step for each in loop.ema.snapshots(tmp_path / "whole/tiny/ema")] == [4, 6]

    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again/tiny/6/params")
    assert same(fit(tmp_path / "again"), whole)
    for which in ("params", *NAMES):
        assert same(*(restore_params(tmp_path / run / "tiny", which) for run in ("whole", "again")))


def poisoned(first: int, last: int):
    def batch(i: int):
        return {"x": batch_at(i)["x"] * (np.float32("nan") if first <= i <= last else np.float32(1))}

    return batch


def test_bad_steps_are_skipped_and_counted(tmp_path, capsys):
    params = fit(tmp_path, batch_at=poisoned(2, 3))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert steps_in(tmp_path / "tiny") == [2, 6]  # not of step 4, in the middle of them
    assert "2 skipped" in capsys.readouterr().out


def test_too_many_bad_steps_in_a_row_stop_the_run(tmp_path):
    """At the third; the checkpoint is that of step 2, and the same command without the cause goes on."""
    with pytest.raises(
        UserError, match="tiny: stopped at step 5, where the gradients were not finite"
    ) as error:
        fit(tmp_path, batch_at=poisoned(2, 5))
    assert "learning_rate" in str(error.value) and "\n" not in str(error.value)
    assert steps_in(tmp_path / "tiny") == [2]
    assert same(fit(tmp_path), fit(tmp_path / "other"))


def test_bad_steps_at_the_very_end_stop_the_run_too(tmp_path):
    with pytest.raises(UserError, match="tiny: stopped at step 6"):
        fit(tmp_path, batch_at=poisoned(3, 5))
    assert steps_in(tmp_path / "tiny") == [2]
