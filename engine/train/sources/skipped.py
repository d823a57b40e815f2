"""The list of what was skipped: skipped.jsonl, a line for each picture with its file and the reason."""

import json
import pathlib
import threading


class Skipped:
    """Appends to the list; what stands there already, from before a stop, is not written again."""

    def __init__(self, file: pathlib.Path):
        self._file, self._lock = file, threading.Lock()
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = file.read_bytes().split(b"\n") if file.exists() else [b""]
        self._lines = set(lines)
        if lines[-1]:  # half a line, where a run was killed
            file.write_bytes(b"".join(line + b"\n" for line in lines[:-1]))
            self._lines.discard(lines[-1])

    def add(self, name: str, reason: str) -> None:
        line = json.dumps({"file": name, "reason": reason}).encode()
        with self._lock:
            if line not in self._lines:
                self._lines.add(line)
                with self._file.open("ab") as file:
                    file.write(line + b"\n")
