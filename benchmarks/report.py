# SPDX-License-Identifier: Apache-2.0
"""Measurements as rows: the CSV, the table, the plot, and what is said about the machine."""

import csv
import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import t2p_fast

from .registry import Workload

__all__ = [
    "COLUMNS",
    "Row",
    "add_ratios",
    "machine_facts",
    "plot",
    "print_tables",
    "provider_version",
    "read_csv",
    "write_csv",
]


@dataclass
class Row:
    """One provider on one case; the fields are the columns of the CSV.

    Times are milliseconds a call, over samples of one or more calls each. `median_ms`, `min_ms` and
    `spread_ms` (third minus first quartile) are of the wall clock, `cpu_ms` is the least processor
    time of the whole process, which a busy machine hardly disturbs. `memory_mib` is the peak
    beyond what was held before the call. `floor_ms` is the larger of flops over `peak_gflops` and
    bytes over `copy_gb_s`, both measured in the same process. `ratio` is the best
    peer's `median_ms` over this one: above 1 is faster than every peer; `cpu_ratio` is the same of
    `cpu_ms`, the number to trust for one thread on a busy machine.
    """

    op: str
    workload: str
    case: str
    provider: str
    ours: bool
    status: str
    device: str
    threads: int
    malloc: str
    min_ms: float | None = None
    median_ms: float | None = None
    spread_ms: float | None = None
    cpu_ms: float | None = None
    samples: int | None = None
    calls: int | None = None
    memory_mib: float | None = None
    floor_ms: float | None = None
    share_of_floor: float | None = None
    best_peer: str = ""
    ratio: float | None = None
    cpu_ratio: float | None = None
    flops: float | None = None
    bytes: float | None = None
    peak_gflops: float | None = None
    copy_gb_s: float | None = None
    provider_version: str = ""
    machine: str = ""
    cpu: str = ""
    isa: str = ""
    commit: str = ""
    t2p_fast: str = ""
    torch: str = ""
    python: str = ""
    date: str = ""
    yardstick: bool = False


COLUMNS = tuple(field.name for field in fields(Row))

_FACTS = ("machine", "cpu", "isa", "commit", "t2p_fast", "torch", "python", "date")


def machine_facts(device: str) -> dict[str, Any]:
    """The columns that are the same for all rows of a run."""
    info = t2p_fast.build_info()
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    chip = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    facts = {
        "machine": f"{platform.system()} {platform.machine()}, {cpus} cpus",
        "cpu": chip,
        "isa": str(info.get("isa", "")),
        "commit": _commit(),
        "t2p_fast": t2p_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
    }
    assert tuple(facts) == _FACTS
    return facts


def provider_version(package: str) -> str:
    """The installed version of a peer's package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    values: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        values.setdefault(key.strip(), value.strip())
    family, model = values.get("cpu family", "?"), values.get("model", "?")
    return f"{values.get('model name', platform.processor())} (family {family}, model {model})"


def _commit() -> str:
    """The commit of the checkout that this file lies in, with + if sources were changed since."""
    folder = Path(__file__).parent
    if not (folder.parent / ".git").exists():
        return ""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        sources = [str(folder.parent / name) for name in ("benchmarks", "csrc", "python")]
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *sources)
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def add_ratios(rows: Sequence[Row]) -> None:
    """Fills `best_peer` and the ratios within each case and setting."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = (row.op, row.workload, row.case, row.device, row.threads, row.malloc)
        groups.setdefault(key, []).append(row)
    for group in groups.values():
        timed = [row for row in group if row.min_ms]
        peers = [row for row in timed if not row.ours and not row.yardstick]
        if not peers:
            continue
        best = min(peers, key=lambda row: row.median_ms or 0.0)
        for row in timed:
            row.best_peer = best.provider
            row.ratio = (best.median_ms or 0.0) / (row.median_ms or 1.0)
        quickest = min(peers, key=lambda row: row.cpu_ms or 0.0)
        for row in timed:
            row.cpu_ratio = (quickest.cpu_ms or 0.0) / row.cpu_ms if row.cpu_ms else None


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """Writes all columns, floats to four digits."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = asdict(row).items()
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in values})


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of `write_csv` as text."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# the table ---------------------------------------------------------------------------------------


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return ""
    if value < 0.1:
        return f"{value:.4f}"  # never wider than its column, however short the call
    return f"{value:.0f}" if value >= 10**digits else f"{value:.{digits}g}"


def print_tables(rows: Sequence[Row], workloads: Sequence[Workload], console: Console) -> None:
    """One table a workload and setting, fit for 80 columns."""
    settings = list(dict.fromkeys((row.threads, row.malloc) for row in rows))
    for workload in workloads:
        for threads, malloc in settings:
            chosen = [
                row
                for row in rows
                if (row.workload, row.threads, row.malloc) == (workload.name, threads, malloc)
            ]
            if chosen:
                console.print(_table(chosen, workload.title))
    if not rows:
        return
    row = rows[-1]
    commit = f", commit {row.commit}" if row.commit else ""
    for line in (
        f"{row.cpu}, {row.machine}: {row.peak_gflops:.0f} GFLOP/s, copy {row.copy_gb_s:.1f} GB/s",
        f"t2p_fast {row.t2p_fast} ({row.isa}{commit}), torch {row.torch}, Python {row.python}",
        "Times in ms a call: by the wall clock, cpu by the processor's. MiB: peak beyond what was "
        "held before. vs peer: the best peer's median over this one, above 1 is faster.",
    ):
        console.print(line, style="dim", highlight=False)


def _table(rows: Sequence[Row], title: str) -> Table:
    first = rows[0]
    where = f"{first.device}, {first.threads} thread{'s' * (first.threads != 1)}"
    if first.malloc != "default":
        where += f", malloc {first.malloc}"
    table = Table(
        title=f"{title}\n{where}",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    for head in ("min", "median", "spread", "cpu", "MiB", "vs peer"):
        table.add_column(head, justify="right", no_wrap=True)
    for case in dict.fromkeys(row.case for row in rows):
        mine = [row for row in rows if row.case == case]
        table.add_row(f"[cyan]{case}[/] fp32 floor {_number(mine[0].floor_ms)}")
        for row in mine:
            if row.min_ms is None:
                continue
            table.add_row(
                f"  {row.provider}",
                _number(row.min_ms),
                _number(row.median_ms),
                _number(row.spread_ms, 2),
                _number(row.cpu_ms),
                _number(row.memory_mib),
                "" if row.ratio is None else f"{row.ratio:.2f}x",
                style="bold" if row.ours else "",
            )
    return table


# the plot ----------------------------------------------------------------------------------------


def plot(rows: Sequence[Row], workloads: Sequence[Workload], path: Path) -> None:
    """Bars for workloads of single cases, lines for those over one size; log axes.

    Shows the setting that claims are made against: the last malloc, the fewest threads.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    timed = [row for row in rows if row.min_ms is not None]
    if not timed:
        return
    malloc, threads = timed[-1].malloc, min(row.threads for row in timed)
    timed = [row for row in timed if (row.malloc, row.threads) == (malloc, threads)]
    drawn = [w for w in workloads if any(row.workload == w.name for row in timed)]
    names = list(dict.fromkeys(row.provider for row in timed))
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    figure, axes = plt.subplots(
        len(drawn), 1, figsize=(10, 2.8 * len(drawn)), squeeze=False, layout="constrained"
    )
    for workload, axis in zip(drawn, axes[:, 0], strict=True):
        axis.set_yscale("log")
        chosen = [row for row in timed if row.workload == workload.name]
        (_lines if workload.line else _bars)(axis, chosen, workload, colours)
        axis.set_title(workload.title, loc="left", fontsize=10)
        axis.set_ylabel("ms")
        axis.grid(axis="y", alpha=0.3)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    one = timed[-1]
    note = f", malloc {malloc}" if malloc != "default" else ""
    figure.suptitle(f"{one.op}: {one.cpu}, threads: {threads}{note}", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _bars(axis: Any, rows: Sequence[Row], _: Workload, colours: dict[str, str]) -> None:
    cases = list(dict.fromkeys(row.case for row in rows))
    names = list(dict.fromkeys(row.provider for row in rows))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        mine = {row.case: row.min_ms for row in rows if row.provider == name}
        places = [j + (i - (len(names) - 1) / 2) * width for j, c in enumerate(cases) if c in mine]
        axis.bar(places, list(mine.values()), width, label=name, color=colours[name])
    # A bar has no zero to stand on where the axis is logarithmic.
    axis.set_ylim(bottom=0.3 * min(min(row.min_ms or 0, row.floor_ms or 0) for row in rows))
    floors = {row.case: row.floor_ms for row in rows}
    axis.hlines(
        [floors[case] for case in cases],
        [j - 0.45 for j in range(len(cases))],
        [j + 0.45 for j in range(len(cases))],
        colors="black",
        linestyles="dotted",
        label="fp32 floor",
    )
    # Above a few, names stand in each other's way.
    turned = {"rotation": 20, "ha": "right"} if len(cases) > 4 else {}
    axis.set_xticks(range(len(cases)), cases, fontsize=7, **turned)


def _lines(axis: Any, rows: Sequence[Row], workload: Workload, colours: dict[str, str]) -> None:
    sizes = {case.name: case.sizes[workload.line] for case in workload.cases}
    for name in dict.fromkeys(row.provider for row in rows):
        mine = [row for row in rows if row.provider == name]
        axis.plot(
            [sizes[row.case] for row in mine],
            [row.min_ms for row in mine],
            marker="o",
            markersize=3,
            label=name,
            color=colours[name],
        )
    floors = {sizes[row.case]: row.floor_ms for row in rows}
    axis.plot(list(floors), list(floors.values()), "k:", label="fp32 floor")
    axis.set_xscale("log", base=2)
    axis.set_xlabel(workload.line)
