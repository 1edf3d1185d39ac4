#!/usr/bin/env python3
"""sbatch, squeue, scancel and scontrol with a queue in a file; jobs are run by the tests.

FAKE_SLURM is the file. {"say": "..."} in it makes the next sbatch answer that, after it took the
job; {"refuse": "..."} makes it refuse.
"""

import json
import os
import sys
from pathlib import Path

FILE = Path(os.environ["FAKE_SLURM"])


def main():
    program, words = Path(sys.argv[0]).name, sys.argv[1:]
    state = json.loads(FILE.read_text()) if FILE.exists() else {"jobs": []}
    if program == "sbatch":
        if "refuse" in state:
            sys.exit(f"sbatch: error: {state['refuse']}")
        script = Path(words[-1]).read_text()
        name = script.split("--job-name=")[1].splitlines()[0]
        number = str(100 + len(state["jobs"]))
        state["jobs"].append({"id": number, "name": name, "words": words, "state": "PENDING"})
        say = state.pop("say", number)
        FILE.write_text(json.dumps(state))
        if say == "broken":
            sys.exit("sbatch: error: Socket timed out on send/recv operation")
        print(say)
    elif program == "squeue":
        for job in state["jobs"]:
            if job["state"] in ("PENDING", "RUNNING"):
                print(job["id"], job["name"], job["state"], "None")
    elif program == "scancel":
        for job in state["jobs"]:
            if job["id"] == words[-1]:
                job["state"] = "CANCELLED"
        FILE.write_text(json.dumps(state))
    else:
        print("\n".join(words[-1].split(",")))


main()
