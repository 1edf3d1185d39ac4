"""How much of its quota a folder has used, where the file system tells: Lustre, NFS, ext4, XFS."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tanren.launch.outside import Outside


@dataclass(frozen=True)
class Quota:
    """GiB used, and the GiB at which writing is refused."""

    used_gib: float
    limit_gib: float


def quota_of(folder: Path, outside: Outside) -> Quota | None:
    """The tightest quota over a folder; None where there is none, or nobody tells.

    Lustre counts a group area by its group or its project, and a home by its user.
    """
    kind = (outside.run(["stat", "-f", "-c", "%T", str(folder)]) or "").strip()
    if kind == "lustre":
        user = outside.environment.get("USER", "")
        group = (outside.run(["stat", "-c", "%G", str(folder)]) or "").strip()
        answers = [
            outside.run(["lfs", "quota", "-q", *who, str(folder)])
            for who in (["-u", user], ["-g", group])
            if who[1]
        ]
    elif outside.which("quota"):
        mount = (outside.run(["stat", "-c", "%m", str(folder)]) or "").strip()
        listed = outside.run(["quota", "-wp"]) or ""
        # Of all file systems with a quota, the one that the folder is on.
        source = (outside.run(["findmnt", "-n", "-o", "SOURCE", mount]) or "").strip()
        answers = ["\n".join(line for line in listed.splitlines()
                             if source and line.split()[:1] == [source])]  # fmt: skip
    else:
        return None
    found = [quota for answer in answers if answer for quota in [_read(answer)] if quota]
    return min(found, key=lambda one: one.limit_gib - one.used_gib, default=None)


def _read(answer: str) -> Quota | None:
    """`NAME kbytes quota limit grace ...`; a star marks what is over. A limit of 0 is none."""
    row = re.search(r"(\d+)\*?\s+(\d+)\s+(\d+)\s+\S+\s+\d+\*?", answer)
    if row is None:
        return None
    used, soft, hard = (int(number) / 2**20 for number in row.groups())
    return Quota(used, hard or soft) if hard or soft else None
