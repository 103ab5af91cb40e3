"""All benchmarks of speed and memory in one go: their results as JSON, and the tables and plots of docs/performance.md.

Results that are there already are kept; ``--only`` measures some of them again.

    python benchmarks/performance.py
    python benchmarks/performance.py --only sweep scaling
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leaderboard_page import chart, table

BENCHMARKS: Mapping[str, list[str]] = {
    "step_cost": ["step_cost.py", "--cycles", "20"],
    "sweep": ["sweep.py"],
    "scaling": ["scaling.py"],
    "plan_check": ["plan_check.py"],
    "memory": ["memory.py"],
    "startup": ["startup.py"],
    "save": ["faults.py", "--cost-alone"],
    "reader": ["reader.py"],
}
PAGE, RESULTS, IMAGES = Path("docs/performance.md"), Path("docs/performance.json"), Path("docs/images/performance")
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def measure(name: str) -> dict[str, Any]:
    """Run a benchmark; the object on its last line.

    Raises:
        RuntimeError: if it fails.
    """
    script, *flags = BENCHMARKS[name]
    command = [sys.executable, str(Path(__file__).with_name(script)), *flags]
    print("python benchmarks/" + " ".join(BENCHMARKS[name]), flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {done.returncode}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def ratios(results: Mapping[str, Any]) -> list[str]:
    """What ``step_cost.py`` found."""
    found = results["step_cost"]
    named = {
        "as it comes": found["framework_overhead"],
        "with `compile_blocks` and `keep_freed_memory`": found["with_options"],
    }
    rows = [{"a DMD2 cycle": name, "of the loop": ratio} for name, ratio in (named | found["options"]).items()]
    calls = ", ".join(f"{role} {count}" for role, count in found["calls_per_cycle"].items())
    loop = f"{found['loop_ms_per_cycle']:.0f} ms"
    head = f"Medians of {found['cycles']} cycles in turn with the loop, as shares of its {loop} ({calls}):"
    return [head, "", *table(rows, {"a DMD2 cycle": "{}", "of the loop": "{:.2f}"})]


def sweeps(results: Mapping[str, Any]) -> list[str]:
    """A plot per axis and its points."""
    lines = []
    for axis, points in results["sweep"]["axes"].items():
        series = {"of a cycle": [(float(point[axis]), point["milliseconds"]) for point in points]}
        (IMAGES / f"{axis}.svg").write_text(
            chart("milliseconds of a DMD2 cycle", axis, series) + "\n", encoding="utf-8"
        )
        columns = {axis: "{:,.0f}", "milliseconds": "{:.0f}", "of_the_loop": "{:.2f}"}
        lines += ["", f"![Time of a cycle against {axis}](images/performance/{axis}.svg)", "", *table(points, columns)]
    return lines


def scaling(results: Mapping[str, Any]) -> list[str]:
    """Two processes beside one, and beside two that know nothing of each other."""
    found = results["scaling"]
    columns = {"layout": "{}", "of one": "{:.2f}"} | ({"of two apart": "{:.2f}"} if found["of_apart"] else {})
    rows = [
        {"layout": n, "of one": e, "of two apart": found["of_apart"].get(n)} for n, e in found["efficiency"].items()
    ]
    head = f"Two processes with a core each, 42 million parameters, {found['batch_size']} videos per process: "
    head += "samples per second, as a share of twice those of one process alone"
    head += ", and of two processes that run apart at the same time:" if found["of_apart"] else ":"
    return ["", head, "", *table(rows, columns)]


def memory(results: Mapping[str, Any]) -> list[str]:
    """Predicted and measured peaks, and bytes per layout of roles."""
    rows = [{"layout": name, **row} for name, row in results["plan_check"]["layouts"].items()]
    columns = {"layout": "{}", "predicted_mib": "{:.0f}", "measured_mib": "{:.0f}", "ratio": "{:.3f}"}
    held = [{"layout": n, "copies": c} for n, c in results["memory"]["copies_of_the_base"].items()]
    three = "Weights, gradients and optimizer of three roles of Wan2.1 1.3B, in copies of the network in bfloat16:"
    lines = ["", "Peak memory as `fastvideo plan` predicts it and as processes took it:", "", *table(rows, columns)]
    return [*lines, "", three, "", *table(held, {"layout": "{}", "copies": "{:.2f}"})]


def startup(results: Mapping[str, Any]) -> list[str]:
    """What a user waits for."""
    found = results["startup"]
    seconds = (
        f"`fastvideo --help` {found['help_seconds']:.2f} s; `fastvideo distill` to the first step of the tiny recipe"
    )
    return ["", f"Start-up: {seconds} {found['first_step_seconds']:.1f} s."]


def files(results: Mapping[str, Any]) -> list[str]:
    """What a run writes and reads."""
    save, recipes = results["save"], results["reader"]["recipes"]
    rows = [{"recipe": f"`{name}`", **found} for name, found in recipes.items()]
    columns = {"recipe": "{}", "waiting": "{:.2%}", "milliseconds_per_batch": "{:.2f}"}
    cost = f"A save in a thread every 50 steps of {save['step_seconds']:.2f} s costs {save['save_seconds']:.3f} s, "
    cost += f"{save['async_save_overhead']:.2%} of the training. Waiting for the reader, as a share of a step, and"
    return ["", f"{cost} processor time of reading a batch where nothing is read ahead:", "", *table(rows, columns)]


def write_page(results: Mapping[str, Any]) -> None:
    """Put tables and plots of everything that is measured into the page."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    needs = {ratios: ("step_cost",), sweeps: ("sweep",), scaling: ("scaling",)}
    needs |= {memory: ("plan_check", "memory"), startup: ("startup",), files: ("save", "reader")}
    lines = [line for part, names in needs.items() if all(n in results for n in names) for line in part(results)]
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text("\n".join([before + BEGIN, "", *lines, "", END + after]), encoding="utf-8")


def main() -> None:
    """Measure what is missing or asked for, then write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=BENCHMARKS, help="measure these again, and nothing else")
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in arguments.only if arguments.only is not None else [n for n in BENCHMARKS if n not in results]:
        results[name] = measure(name)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    write_page(results)
    print(PAGE)


if __name__ == "__main__":
    main()
