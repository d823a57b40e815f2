"""What launch.generate says of a job with --status, --verify and --merge."""

import datetime
import itertools
import sys

from tqdm import tqdm

from engine.config import JobConfig
from engine.jobs import folder
from engine.jobs import report as reports
from engine.jobs.store import Store, open_store
from launch import cli

SHOWN_FAILURES = 10
SHOWN_PROBLEMS = 50


def report(kind: str, url: str) -> int:
    """--status, --verify and --merge; returns the exit code."""
    store = open_store(url, JobConfig.patience, cli.tell, writable=kind == "merge", pause=cli.pause)
    return {"status": tell_status, "verify": verify, "merge": merge}[kind](store)


def tell_status(store: Store) -> int:
    """How far the job is, and the newest failures."""
    status = reports.status(store)
    done, whole = status.pictures_done, status.pictures
    left = status.seconds_left
    cli.say(f"shards    {status.shards_done} of {status.shards} done, {status.claimed} claimed")
    cli.say(f"pictures  {done} of {whole} ({done / max(whole, 1):.1%})")
    if done < whole and left is not None:
        cli.say(f"speed     {status.rate:.3g} images/s, {datetime.timedelta(seconds=round(left))} left")
    elif done < whole:
        cli.say("speed     no worker has finished a shard lately")
    cli.say(f"failures  {status.failures}")
    for failure in itertools.islice(folder.read_failures(store), SHOWN_FAILURES):
        cli.say(
            cli.one_line(f"          row {failure['row']} (id {failure['id'][:40]}): {failure['reason']}")
        )
    if status.failures > SHOWN_FAILURES:
        cli.say(f"          ... and {status.failures - SHOWN_FAILURES} more")
    return cli.DONE


def verify(store: Store) -> int:
    """Reads all pictures again; exit code 1 where something is wrong or open."""
    shown, found = 0, reports.Found()
    total = folder.read_job(store)["shards"]
    with tqdm(total=total, unit=" shards", disable=None, dynamic_ncols=True, file=sys.stderr) as bar:
        for name, problems, found in reports.verify(store):  # noqa: B007, the last sum is the whole
            cli.stop_if_asked()
            bar.update(bool(name))
            for problem in problems:
                shown += 1
                if shown <= SHOWN_PROBLEMS:
                    cli.say(cli.one_line(problem))
    if shown > SHOWN_PROBLEMS:
        cli.say(f"... and {shown - SHOWN_PROBLEMS} more")
    verdict = "all sound" if not found.problems else f"{found.problems} problems"
    open_ = f", {found.open_shards} shards are not done" if found.open_shards else ""
    cli.say(f"{found.pictures} pictures and {found.failures} failures: {verdict}{open_}")
    return cli.FAILED if found.problems or found.open_shards else cli.DONE


def merge(store: Store) -> int:
    """One index of all that is done."""
    count = reports.merge(store)
    cli.tell(f"{count} pictures in the index")
    cli.say(f"{store.url}/index.jsonl")
    return cli.DONE
