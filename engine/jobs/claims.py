"""Shards taken by leases in the output folder, so that workers come and go as they like.

A claim is a file that exactly one worker manages to create: claims/000012.0. Its owner writes a new number of
heartbeats into it now and then. Who has watched a claim for a whole lease without a heartbeat may create the
next generation, claims/000012.1, and then the shard is theirs. Only creation is exclusive, which every file
system and object store can do; and no clock is compared with that of another host.

Should two workers ever draw the same shard, as when one slept through its lease, no harm is done: the
pictures are the same, and the first manifest counts.
"""

import json
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple

from engine.jobs.store import Store

BEATS = 4  # in a lease


class Seen(NamedTuple):
    """A claim of somebody else's, as it was last found."""

    file: str
    data: bytes
    since: float  # time.monotonic() when it was first found so


class Claims:
    """The claims of one worker. A thread keeps their hearts beating while the context is open."""

    def __init__(self, store: Store, lease: float, tell: Callable[[str], None] | None = None):
        """Args:
        lease: seconds without a heartbeat after which a claim is taken over.
        """
        self._store, self._lease, self._tell = store, lease, tell
        self._owner = {"worker": secrets.token_hex(8), **_this_process()}
        self._mine: dict[str, str] = {}  # shard -> file
        self._seen: dict[str, Seen] = {}
        self._beats = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="claims", daemon=True)

    def __enter__(self) -> "Claims":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        for shard in list(self._mine):
            self.release(shard)

    def listing(self) -> dict[str, int]:
        """Shard -> the newest generation of its claim, of all shards that are claimed."""
        newest: dict[str, int] = {}
        for file in self._store.names("claims"):
            shard, _, generation = file.partition(".")
            if generation.isdecimal():
                newest[shard] = max(newest.get(shard, 0), int(generation))
        return newest

    def has(self, shard: str) -> bool:
        """Whether this worker has taken the shard and not given it back."""
        with self._lock:
            return shard in self._mine

    def take_first(self, shards: Sequence[str]) -> str | None:
        """Claims the first of these that can be had."""
        newest = self.listing()
        return next((shard for shard in shards if self.take(shard, newest.get(shard))), None)

    def take(self, shard: str, newest: int | None) -> bool:
        """Claims a shard, if nobody has it or its owner is gone.

        Args:
          newest: from `listing`; None where there is no claim.
        """
        if newest is None:
            generation = 0
        elif self._is_stale(shard, f"{shard}.{newest}"):
            generation = newest + 1
        else:
            return False
        file = f"{shard}.{generation}"
        if not self._store.create(f"claims/{file}", self._content()):
            return False
        with self._lock:
            self._mine[shard] = file
        self._seen.pop(shard, None)
        if generation and self._tell:
            self._tell(f"shard {shard} is taken over from a worker that is gone")
        return True

    def holds(self, shard: str) -> bool:
        """Whether the shard is still ours. It is not when we slept so long that another took it over."""
        with self._lock:
            file = self._mine.get(shard)
        return file is not None and f"{shard}.{self.listing().get(shard)}" == file

    def release(self, shard: str) -> None:
        """Gives a shard back; no matter whether it is done."""
        with self._lock:
            file = self._mine.pop(shard, None)
        if file is None:
            return
        generation = int(file.partition(".")[2])
        for older in range(generation + 1):  # those that were taken over, too
            self._store.delete(f"claims/{shard}.{older}")

    def _is_stale(self, shard: str, file: str) -> bool:
        try:
            data = self._store.read(f"claims/{file}")
        except FileNotFoundError:  # given back this moment; the next look will show
            return False
        if _owner_has_died(data):
            return True
        seen, now = self._seen.get(shard), time.monotonic()
        if seen is None or (seen.file, seen.data) != (file, data):
            self._seen[shard] = Seen(file, data, now)
            return False
        return now - seen.since > self._lease

    def _content(self) -> bytes:
        return json.dumps({**self._owner, "beat": self._beats}).encode()

    def _keep_alive(self) -> None:
        while not self._ended.wait(self._lease / BEATS):
            self._beats += 1
            with self._lock:
                files = list(self._mine.items())
            for shard, file in files:
                self._beat(shard, file)

    def _beat(self, shard: str, file: str) -> None:
        with self._lock:
            if self._mine.get(shard) != file:  # given back meanwhile: must not appear again
                return
            try:
                self._store.write_once(f"claims/{file}", self._content())
            except Exception as error:  # the work itself will meet the same trouble, and stop for it
                if self._tell:
                    self._tell(f"no heartbeat for shard {shard}: {error}")


def _this_process() -> dict[str, Any]:
    """Tells this process from all others of this boot of this machine; empty where the system can't say."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")  # containers have process numbers of their own
    except OSError:
        return {"host": socket.gethostname(), "pid": os.getpid()}
    place = f"{boot} {space}"
    return {
        "host": socket.gethostname(),
        "place": place,
        "pid": os.getpid(),
        "started": _start_of(os.getpid()),
    }


def _start_of(pid: int) -> str | None:
    """When the process started, in ticks since boot; None where there is none of that number."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]  # dead, but not yet buried by its parent


def _owner_has_died(data: bytes) -> bool:
    """Whether the claim is of a process of this very machine that is no more: no need to wait then."""
    try:
        owner = json.loads(data)
        place, pid, started = owner["place"], int(owner["pid"]), owner["started"]
    except (ValueError, KeyError, TypeError):
        return False  # a claim of another system, or one that is damaged: the lease decides
    return place == _this_process().get("place") and _start_of(pid) != started
