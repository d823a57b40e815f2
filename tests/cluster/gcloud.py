"""A stand-in for gcloud: notes its calls, plays the states it was told, and runs what ssh would run.

  python gcloud.py FOLDER ARGUMENTS OF gcloud

In the folder: plan.json (what is to happen), calls.jsonl (what did), and the home folders of the TPU's hosts:
host-0, host-1, ...
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

UV = """#!/bin/bash
echo "uv $*" >>installed
[ "$1" = venv ] || exit 0
mkdir -p fogsculpt-venv/bin
cp python fogsculpt-venv/bin/python
"""
PYTHON = """#!/bin/bash
[ "$2" != pip ] || exit 0
printf '%s\\0' "$@" >arguments
echo drew
exit $(cat exit_code)
"""


def main(folder: pathlib.Path, argv: list[str]) -> int:
    plan = json.loads((folder / "plan.json").read_text())
    with (folder / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(argv) + "\n")
    words = [word for word in argv if not word.startswith("--")]
    hosts = sorted(folder.glob("host-*"))
    code = 0
    match words:
        case ["compute", "tpus", kind, "list"]:
            state = take(plan[kind])
            if state:
                print(f"another\tFAILED\nfog\t{state}\nfog-2\tFAILED")
        case ["compute", "tpus", "queued-resources", "create" | "delete", "fog"]:
            pass
        case ["compute", "tpus", "tpu-vm", "scp", *files, "fog:"]:
            for host in hosts:
                for file in files:
                    (shutil.copytree if os.path.isdir(file) else shutil.copy)(
                        file, host / os.path.basename(file)
                    )
        case ["compute", "tpus", "tpu-vm", "ssh", "fog"]:
            command = next(word for word in argv if word.startswith("--command=")).partition("=")[2]
            if "launch.generate" in command:
                code = take(plan["exit codes"])
            for host in hosts:
                (host / "exit_code").write_text(str(code))
                subprocess.run(["bash", "-c", command], cwd=host, env=environ(host), check=code == 0)
        case _:
            sys.exit(f"ERROR: (gcloud) {argv} is unknown")
    (folder / "plan.json").write_text(json.dumps(plan))
    return code


def take(steps: list) -> object:
    """The next step; the last one stays."""
    return steps.pop(0) if len(steps) > 1 else steps[0]


def environ(host: pathlib.Path) -> dict[str, str]:
    """Of a host that has stand-ins for uv and python."""
    tools = host / ".local/bin"
    tools.mkdir(parents=True, exist_ok=True)
    for file, text in ((tools / "uv", UV), (tools / "python3", PYTHON), (host / "python", PYTHON)):
        file.write_text(text)
        file.chmod(0o755)
    return {**os.environ, "HOME": str(host), "PATH": f"{tools}:{os.environ['PATH']}"}


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1]), sys.argv[2:]))
