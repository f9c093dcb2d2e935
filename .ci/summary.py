"""Ends .ci/run: prints the logs of failed stages and what was skipped, then one line that counts everything.

A stage that ran pytest counts with each of its tests, any other stage as one. Exits 1 when anything failed.
"""

import re
import sys
from collections import Counter
from pathlib import Path

WORDS = {"passed": "passed", "failed": "failed", "error": "failed", "errors": "failed", "skipped": "skipped"}


def count(log: str, status: str) -> Counter:
    """Counts from pytest's last lines ("== 2 failed, 40 passed, 1 error in 5.02s =="), else one for the stage."""
    counts = Counter()
    for line in re.findall(r"^=* ?((?:\d+ \w+,? )+)in [\d.]+s", log, re.MULTILINE):
        for number, word in re.findall(r"(\d+) (\w+)", line):
            counts[WORDS.get(word, "")] += int(number)
    if status not in ("0", "77") and not counts["failed"]:
        counts["failed"] += 1  # no pytest, or a crash outside its tests
    elif not counts:
        counts["skipped" if status == "77" else "passed"] += 1
    return counts


def main(logs: Path) -> int:
    counts = Counter()
    for name, status in (line.split() for line in (logs / "results").read_text().splitlines()):
        log = (logs / f"{name}.log").read_text(errors="replace")
        counts += count(log, status)
        if status not in ("0", "77"):
            print(f"\n==== {name} failed ====", *log.splitlines()[-400:], sep="\n")
        listed = re.search(r"^=+ skipped, and why =+\n((?: +\d+  .*\n)+)", log, re.MULTILINE)
        if listed or status == "77":
            print(f"\nSkipped in {name}:", listed[1].rstrip() if listed else log.strip(), sep="\n")
    print(f"\n{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
