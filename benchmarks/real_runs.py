"""Figures of real runs that need no GPU, section by section, and one JSON object with all of them as the last line.

A section is a module beside this file with a function ``measured``: what it returns goes into the object, under keys
that name the figures. Each is also a program of its own.

    python benchmarks/real_runs.py                  # all sections
    python benchmarks/real_runs.py --only NAME
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Mapping

SECTIONS: Mapping[str, str] = {
    "doctor": "doctor_time",
    "judge": "judge_proof",
    "mirror": "mirror_kills",
    "plan": "real_plan",
    "prompts": "prompts_start",
    "sigterm": "sigterm_stops",
    "validation": "real_validation",
}
"""Section -> its module."""


def main() -> None:
    """Measure, print each section as it comes, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=SECTIONS, help="these sections; all without it")
    chosen = parser.parse_args().only or list(SECTIONS)
    found: dict[str, object] = {"benchmark": "real_runs"}
    for name in chosen:
        figures = importlib.import_module(SECTIONS[name]).measured()
        print(f"{name}: {json.dumps(figures)}", flush=True)
        found |= figures
    print(json.dumps(found))


if __name__ == "__main__":
    main()
