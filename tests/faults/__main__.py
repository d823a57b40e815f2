"""The long form of the tests of faults.

python -m tests.faults [--kills 50] [--elastic_kills 20] [--training_kills 20] [--seed 0]
"""

import argparse
import pathlib
import random
import tempfile

from tests.faults import kills as faults
from tests.faults.training import School, kill_and_go_on

PICTURES_A_KILL, STEPS_A_KILL = 160, 100  # so that the work outlives its killers


def main() -> None:
    parser = argparse.ArgumentParser(description="Workers that die at random moments of a job.")
    parser.add_argument("--kills", type=int, default=50, help="of the one worker")
    parser.add_argument("--elastic_kills", type=int, default=20, help="of the four workers with claims")
    parser.add_argument("--training_kills", type=int, default=20, help="of a training")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    dice = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        if options.kills or options.elastic_kills:
            drawing(folder, options, dice)
        if options.training_kills:
            training(folder / "training", options, dice)


def drawing(folder: pathlib.Path, options: argparse.Namespace, dice: random.Random) -> None:
    """Workers of a job."""
    shop = faults.Workshop(folder, PICTURES_A_KILL * max(options.kills, options.elastic_kills))
    shop.finish(folder / "undisturbed")
    right = faults.hashes(folder / "undisturbed")
    faults.kill_and_restart(shop, folder / "killed", options.kills, dice)
    shop.verify(folder / "killed")
    assert faults.hashes(folder / "killed") == right
    print(f"{options.kills} kills: every picture is there once, and the same as undisturbed")
    faults.come_and_go(shop, folder / "elastic", 4, options.elastic_kills, dice)
    shop.verify(folder / "elastic")
    assert faults.hashes(folder / "elastic") == right
    print(f"{options.elastic_kills} kills among 4 workers: the same")


def training(folder: pathlib.Path, options: argparse.Namespace, dice: random.Random) -> None:
    """A fine-tuning."""
    folder.mkdir()
    school = School(folder, STEPS_A_KILL * options.training_kills)
    faults.check(school.command("undisturbed"), None)
    kill_and_go_on(school, "killed", options.training_kills, dice)
    assert school.weights("killed") == school.weights("undisturbed")
    print(f"{options.training_kills} kills of a training: its weights are those of the undisturbed one")


if __name__ == "__main__":
    main()
