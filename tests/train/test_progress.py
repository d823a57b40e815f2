"""What a training tells: the terminal, metrics.jsonl, TensorBoard, and the plot at its end."""

import json
import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from engine.config import StageConfig
from engine.train import plot
from engine.train.progress import Arithmetic, Progress

STAGE = StageConfig(steps=4, batch_size=8)


def metrics(loss: float, sums: list[float], counts: list[float]) -> dict:
    return {
        "loss": jnp.float32(loss),
        "loss_by_time": jnp.array(sums),
        "count_by_time": jnp.array(counts),
        "skipped": jnp.int32(0),
    }


def events(folder):
    """Of the files that TensorBoard reads: (length, checksum, event, checksum), again and again."""
    found = []
    for file in sorted(folder.glob("events*")):
        data, place = file.read_bytes(), 0
        while place < len(data):
            length = int.from_bytes(data[place : place + 8], "little")
            found.append(event_pb2.Event.FromString(data[place + 12 : place + 12 + length]))
            place += 16 + length
    return found


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_sums_cover_all_steps_since_the_last_line(tmp_path, capsys):
    progress = Progress("diffusion", tmp_path, 0, STAGE)
    progress.add(1, metrics(1.0, [0.25, 0.0], [1, 0]))
    progress.add(1, metrics(1.0, [0.25, 0.0], [1, 0]))  # once is enough
    progress.report(2, metrics(0.5, [0.5, 2.0], [1, 1]), force=True)
    progress.add(3, metrics(0.5, [0.0, 1.0], [0, 1]))
    progress.report(4, metrics(0.25, [0.125, 0.0], [1, 0]), force=True)
    first, second = lines(tmp_path)
    assert (first["loss"], first["loss_by_time"], first["count_by_time"]) == (0.5, [0.75, 2.0], [2, 1])
    assert (second["loss"], second["loss_by_time"], second["count_by_time"]) == (0.25, [0.125, 1.0], [1, 1])
    out = capsys.readouterr().out
    assert out.startswith("diffusion: 4 steps to go; the first compiles\ndiffusion 2/4  loss 0.5000")
    assert "by_time" not in out and "0:00:00 left" in out


def test_a_skipped_step_does_not_spoil_the_sums(tmp_path):
    progress = Progress("diffusion", tmp_path, 0, STAGE)
    progress.add(1, metrics(1.0, [0.25, 0.0], [1, 0]))
    progress.add(2, metrics(float("nan"), [float("nan"), 1.0], [1, 1]))
    progress.report(3, metrics(0.5, [0.5, 2.0], [1, 1]), force=True)
    (line,) = lines(tmp_path)
    assert (line["loss_by_time"], line["count_by_time"]) == ([0.75, 2.0], [2, 1])


def test_the_rate_of_arithmetic(tmp_path, monkeypatch, capsys):
    clock = iter([0.0, 60.0, 62.0, 62.0, 62.0])  # of a minute that the first step compiles, and two seconds
    monkeypatch.setattr("engine.train.progress.time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    progress = Progress("unet", tmp_path, 0, StageConfig(steps=5, batch_size=8), Arithmetic(3e12, 12e12))
    progress.add(1, {"loss": jnp.float32(1.0)})
    progress.report(5, {"loss": jnp.float32(1.0)}, force=True)  # 2 steps a second
    (line,) = lines(tmp_path)
    assert (line["images/s"], line["TFLOP/s a device"], line["mfu"]) == (16.0, 6.0, 0.5)
    assert "images/s 16.0  TFLOP/s a device 6  mfu 0.5000" in capsys.readouterr().out


def test_tensorboard_has_the_curves_and_the_pictures(tmp_path):
    sheet = tmp_path / "00000002.png"
    Image.new("RGB", (20, 10), "red").save(sheet)
    progress = Progress("unet", tmp_path, 0, STAGE)
    progress.report(2, {"loss": jnp.float32(0.5)}, force=True)
    progress.picture(2, sheet)
    progress.close()
    values = {(e.step, v.tag): v for e in events(tmp_path / "tensorboard" / "unet") for v in e.summary.value}
    assert values[2, "loss"].simple_value == 0.5
    assert (values[2, "samples"].image.width, values[2, "samples"].image.height) == (20, 10)
    resumed = Progress("unet", tmp_path, 1, STAGE)  # step 2 was not saved
    resumed.report(2, {"loss": jnp.float32(0.25)}, force=True)
    resumed.close()
    forgotten = [e.step for e in events(tmp_path / "tensorboard" / "unet") if e.session_log.status]
    assert forgotten == [2]  # TensorBoard leaves out what has this step or more


def test_one_host_tells(tmp_path, capsys):
    progress = Progress("unet", tmp_path, 0, STAGE, tells=False)
    progress.report(4, {"loss": jnp.float32(1.0)}, force=True)
    progress.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_a_stretch_that_was_run_twice_counts_once(tmp_path):
    told = [("vae", 9), ("unet", 1), ("unet", 2), ("unet", 3), ("unet", 2), ("unet", 4)]
    text = "".join(json.dumps({"stage": s, "step": n, "place": i}) + "\n" for i, (s, n) in enumerate(told))
    (tmp_path / "metrics.jsonl").write_text(text + '{"stage": "unet", "st')  # a kill
    assert [(line["step"], line["place"]) for line in plot.lines_of(tmp_path, "unet")] == [
        (1, 1),
        (2, 4),
        (4, 5),
    ]


@pytest.mark.parametrize("timed", [False, True])
def test_the_plot(tmp_path, timed):
    for step in range(1, 9):
        line = {"stage": "unet", "step": step, "loss": 1 / step}
        if timed:
            line |= {"loss_by_time": [0.1, 0.0, 1 / step], "count_by_time": [1, 0, 1]}
        with (tmp_path / "metrics.jsonl").open("a") as f:
            f.write(json.dumps(line) + "\n")
    image = np.asarray(Image.open(plot.loss_plot(tmp_path, "unet")).convert("L"))
    assert image.shape == (400, 1100 if timed else 550)
    assert (image[:, :550] < 128).any() and (not timed or (image[:, 550:] < 128).any())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["loss-unet.png", "metrics.jsonl"]
