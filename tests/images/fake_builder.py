#!/usr/bin/env python3
"""A container program for tests: strict about its words as the real ones are, and instant.

FAKE_FAIL says where a build fails: post, test, squash (no file although all went well) or never
(it goes on for a minute, for the tests that kill it).
"""

import json
import os
import re
import struct
import sys
import time
from pathlib import Path

OPTIONS = {
    "build": {
        "--bind": 1,
        "--build-arg": 1,
        "--mksquashfs-args": 1,
        "--nv": 0,
        "--fakeroot": 0,
        "--force": 0,
    },
    "inspect": {"-e": 0, "-d": 0, "-l": 0, "-r": 0, "-H": 0, "-t": 0, "--json": 0},
    "exec": {"--cleanenv": 0, "--no-mount": 1, "--home": 1, "--pwd": 1, "--bind": 1, "--nv": 0},
}


def say(text):
    print(f"INFO:    {text}", file=sys.stderr, flush=True)


def parse(verb, words):
    options, rest = [], list(words)
    while rest and rest[0].startswith("-"):
        name = rest.pop(0)
        if name not in OPTIONS[verb]:
            sys.exit(f"Error for command {verb}: unknown flag: {name}")
        options.append((name, rest.pop(0) if OPTIONS[verb][name] else ""))
    return options, rest


def build(words):
    options, (image, recipe) = parse("build", words)
    for name, value in options:
        if name == "--bind" and not Path(value.split(":")[0]).exists():
            sys.exit(f"FATAL: bind {value}: no such file")
    text = Path(recipe).read_text()
    given = dict(value.split("=", 1) for name, value in options if name == "--build-arg")
    wanted = set(re.findall(r"\{\{ (\w+) \}\}", text))
    if wanted != set(given):
        sys.exit(f"FATAL: build arguments {wanted ^ set(given)} are missing or unused")
    text = re.sub(r"\{\{ (\w+) \}\}", lambda match: given[match[1]], text)
    for line in re.search(r"^%files\n((?:[ \t]+.*\n)*)", text, re.M)[1].splitlines():
        if not Path(line.split()[0]).exists():
            sys.exit(f"FATAL: copying {line}")
    fail = os.environ.get("FAKE_FAIL")
    # More than a pipe holds: a builder that nobody reads from would stop here.
    for number in range(3000):
        say(f"line {number} " + "x" * 60)
    say("Running post scriptlet")
    if fail == "never":
        Path(image).write_bytes(b"half")
        time.sleep(60)
    if fail == "post":
        sys.exit("no space: No space left on device")
    say("Running testscript")
    if fail == "test":
        sys.exit("check.py: the error of the FP8 product is 0.2, over 0.06")
    if fail == "squash":
        return
    labels = re.search(r"^%labels\n((?:[ \t]+.*\n)*)", text, re.M)[1]
    content = json.dumps(dict(line.strip().split(" ", 1) for line in labels.splitlines()))
    header = bytearray(128)
    header[32:42] = b"SIF_MAGIC\0"
    header[48:64] = os.urandom(16)
    struct.pack_into("<qq", header, 88, 1, 128)
    descriptor = bytearray(585)
    descriptor[4] = 1
    struct.pack_into("<qq", descriptor, 41, time.time_ns(), time.time_ns())
    Path(image).write_bytes(bytes(header + descriptor) + content.encode())


def inspect(words):
    _, (image,) = parse("inspect", words)
    labels = json.loads(Path(image).read_bytes()[128 + 585 :])
    print(json.dumps({"data": {"attributes": {"labels": labels}}, "type": "container"}))


def execute(words):
    options, rest = parse("exec", words)
    if rest[1:] == ["cat", "/opt/tanren/packages.json"]:
        print(json.dumps({"python": {"torch": "2.13.0+cpu"}, "system": {"libc6": "2.36"}}))
        return
    prefix = "APPTAINERENV_"
    inside = {k.removeprefix(prefix): v for k, v in os.environ.items() if k.startswith(prefix)}
    print(json.dumps({"options": options, "words": rest, "environment": inside}))


def main():
    verb, *words = sys.argv[1:]
    if verb == "--version":
        print("apptainer version 1.4.5")
    elif verb == "build" and words == ["--help"]:
        print("  --bind --build-arg --fakeroot --mksquashfs-args --nv")
    else:
        {"build": build, "inspect": inspect, "exec": execute}[verb](words)


main()
