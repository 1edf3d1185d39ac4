"""Stands for the harness's Python: `-m lm_eval run --config FILE`, which scores nothing.

Each task gets the scores that FAKE_SCORES (JSON, by task) states; without, it is not found.
"""

import json
import os
import sys
from pathlib import Path


def main() -> int:
    assert sys.argv[1:4] == ["-m", "lm_eval", "run"], sys.argv
    asked = json.loads(Path(sys.argv[5]).read_text())
    known = json.loads(os.environ["FAKE_SCORES"])
    (Path(asked["output_path"]) / "world.json").write_text(
        json.dumps({"cwd": str(Path.cwd()), "environment": dict(os.environ)})
    )
    if "FAKE_ERROR" in os.environ:
        print(os.environ["FAKE_ERROR"], file=sys.stderr)
        return 1
    unknown = [task for task in asked["tasks"] if task not in known]
    if unknown:
        print(f"ValueError: Tasks not found: {', '.join(unknown)}.", file=sys.stderr)
        return 1
    tasks = asked["tasks"]
    results = {
        "results": {task: {"alias": task, "sample_len": 12, **known[task]} for task in tasks},
        "group_subtasks": {},
        "versions": dict.fromkeys(tasks, 1.0),
        "n-shot": dict.fromkeys(tasks, 0),
        "n-samples": {
            task: {"original": 12, "effective": asked.get("limit", 12)} for task in tasks
        },
        "higher_is_better": {task: {"acc": True} for task in tasks},
        "lm_eval_version": "0.4.13",
        "transformers_version": "5",
    }
    folder = Path(asked["output_path"]) / "model"
    folder.mkdir()
    (folder / "results_now.json").write_text(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
