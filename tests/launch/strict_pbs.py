"""A reader of PBS job scripts that refuses what ABCI's PBS Professional is documented to refuse.

PBS Professional itself cannot be had for tests; the imitation that runs in test-schedulers takes
more than PBS would. This one takes less.
"""

from __future__ import annotations

import re
import shlex

from tanren.config.site import Site

OPTIONS = {"-N", "-P", "-q", "-l", "-j", "-o", "-v", "-W", "-k", "-m", "-e"}


def check(text: str, site: Site) -> None:
    """Assert that PBS would take this script."""
    lines = text.splitlines()
    assert lines[0].startswith("#!"), "a script begins with #!"
    options: dict[str, str] = {}
    resources: dict[str, str] = {}
    ended = False
    for line in lines[1:]:
        if not line.startswith("#PBS"):
            ended = ended or (bool(line.strip()) and not line.startswith("#"))
            continue
        assert not ended, f"{line!r} comes after the first command, where PBS does not look"
        name, *value = shlex.split(line[4:])
        assert name in OPTIONS, f"unknown option {name}"
        assert len(value) == 1, f"{name} takes one value"
        if name == "-l":
            key, _, amount = value[0].partition("=")
            assert key not in resources, f"{key} twice"
            resources[key] = amount
        else:
            options[name] = value[0]
    for name in ("-P", "-q"):
        assert name in options, f"{name} is mandatory"
    assert len(options["-N"]) <= 230
    assert re.fullmatch(r"[A-Za-z][\w.+-]*", options["-N"]), "a name begins with a letter"
    queue = options["-q"]
    if re.fullmatch(r"R\d+", queue):
        match = re.fullmatch(r"RTYPE=(\w+)", options.get("-v", ""))
        assert match, "a reservation takes its type as -v RTYPE=..."
        queue = match[1]
    assert queue in site.types, f"no queue {queue}"
    kind = site.types[queue]
    nodes = re.fullmatch(r"(\d+)(?::mpiprocs=\d+)?", resources.get("select", ""))
    assert nodes, "select is mandatory"
    assert 1 <= int(nodes[1]) <= kind.nodes, f"{queue} takes at most {kind.nodes} nodes"
    clock = re.fullmatch(r"(\d+):(\d\d):(\d\d)", resources.get("walltime", "1:00:00"))
    assert clock, "walltime is HH:MM:SS"
    hours = int(clock[1]) + int(clock[2]) / 60
    assert hours <= kind.walltime_hours, f"{queue} takes at most {kind.walltime_hours:g} h"
    assert hours * int(nodes[1]) <= (site.node_hours or hours * int(nodes[1])), "node-hours"
