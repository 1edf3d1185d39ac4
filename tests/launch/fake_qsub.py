#!/usr/bin/env python3
"""qsub, qstat and qdel of PBS and of Grid Engine with a queue in a file; jobs are run by the tests.

FAKE_QUEUE is the file, as fake_slurm.py keeps it. Which of the two speaks, the first job's script
says.
"""

import json
import os
import sys
from pathlib import Path

FILE = Path(os.environ["FAKE_QUEUE"])
STATES = {"PENDING": ("Q", "qw"), "RUNNING": ("R", "r")}


def main():
    program, words = Path(sys.argv[0]).name, sys.argv[1:]
    state = json.loads(FILE.read_text()) if FILE.exists() else {"jobs": []}
    if program == "qsub":
        script = Path(words[-1]).read_text()
        pbs = "#PBS" in script
        name = script.split("#PBS -N " if pbs else "#$ -N ")[1].splitlines()[0]
        number = f"{100 + len(state['jobs'])}" + (".pbs1" if pbs else "")
        state["jobs"].append({"id": number, "name": name, "words": words, "state": "PENDING"})
        FILE.write_text(json.dumps(state))
        print(number if pbs else f'Your job {number} ("{name}") has been submitted')
    elif program == "qstat":
        for job in state["jobs"]:
            letters = STATES.get(job["state"])
            if letters and words == ["-f"]:
                print(f"Job Id: {job['id']}\n    Job_Name = {job['name']}")
                print(f"    job_state = {letters[0]}\n")
            elif letters:
                print(f"  {job['id']} 0.5 x root {letters[1]} 11/21/2026 13:55:35 all.q 1")
                print(f"       Full jobname:     {job['name']}")
    else:
        for job in state["jobs"]:
            if job["id"] == words[-1]:
                job["state"] = "CANCELLED"
        FILE.write_text(json.dumps(state))


main()
