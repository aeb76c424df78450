# SPDX-License-Identifier: Apache-2.0
"""Runs the benchmark of an op: the gate first, then all providers side by side.

Every setting (malloc, threads) is measured in a process of its own, because both are fixed when a
process starts. In it all providers of a case take turns, round after round, so that whatever else
the machine does meets all of them.
"""

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.markup import escape

from . import report
from .registry import Benchmark, Case, GateError, Inputs, Provider, Workload, load, ops
from .report import Row
from .timing import ceilings, take_turns, time_first

__all__ = [
    "Report",
    "Settings",
    "environment_of",
    "main",
    "measure",
    "run_benchmarks",
]

# glibc hands large temporaries back to the kernel at once and pays for fresh pages at every call.
# Eager torch suffers most from that, so claims are made against a malloc that keeps them.
MALLOC = {
    "glibc": {},
    "tuned": {
        "MALLOC_MMAP_THRESHOLD_": "2000000000",
        "MALLOC_TRIM_THRESHOLD_": "4000000000",
        "MALLOC_TOP_PAD_": "500000000",
    },
    "default": {},
}


@dataclass(frozen=True)
class Settings:
    """What one process measures.

    Attributes:
        quick: Few cases, few rounds.
        threads: Threads of torch and of every provider.
        device: ``cpu`` or ``cuda``.
        malloc: A key of `MALLOC`; the environment has been set accordingly.
        providers: Words; a peer is kept if its name contains one of them. Empty keeps all.
        workloads: The same for workloads.
        flags: Options that let slow providers in, such as ``compile``.
    """

    quick: bool = False
    threads: int = 1
    device: str = "cpu"
    malloc: str = "default"
    providers: tuple[str, ...] = ()
    workloads: tuple[str, ...] = ()
    flags: frozenset[str] = frozenset()

    @property
    def seconds(self) -> float:
        """How long the rounds of a case last, unless three rounds take longer."""
        return 0.5 if self.quick else 1.0

    @property
    def seconds_per_sample(self) -> float:
        """Calls shorter than this are repeated within a sample."""
        return 0.01


@dataclass(frozen=True)
class Report:
    """The result of `run_benchmarks`.

    Attributes:
        rows: One per provider, case and setting.
        ok: Whether the op passed all gates.
        csv: The file with the rows.
        plot: The picture beside it, if one was made.
        notes: What the user should know, a line each.
    """

    rows: list[Row]
    ok: bool
    csv: Path
    plot: Path | None
    notes: list[str]


# memory ------------------------------------------------------------------------------------------


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"no {field} in /proc/self/status")


def _peak_memory(call: Callable[[], Any], device: str) -> float | None:
    """MiB at the peak of one call beyond what was held before it; nothing where unknown."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what malloc keeps would hide what the call needs
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        held = _status_kib("VmRSS")
        call()
        return max(0, _status_kib("VmHWM") - held) / 1024
    except (OSError, AttributeError):
        return None


# one process -------------------------------------------------------------------------------------


def _matches(name: str, words: Sequence[str]) -> bool:
    return not words or any(word.lower() in name.lower() for word in words)


def measure(
    benchmark: Benchmark, settings: Settings, tell: Callable[[str], None] = lambda _: None
) -> list[Row]:
    """Measures one setting in this process.

    Args:
        benchmark: What to measure.
        settings: How; the number of threads is set here, malloc cannot be.
        tell: Is told what is being measured.

    Raises:
        GateError: The op fails its gate; nothing was timed.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        benchmark.gate(settings.device)
        flops, bandwidth = ceilings(settings.device)
        facts = report.machine_facts(settings.device)
        facts |= {"peak_gflops": flops / 1e9, "copy_gb_s": bandwidth / 1e9}
        rows = []
        for workload in benchmark.workloads:
            if not _matches(workload.name, settings.workloads):
                continue
            for case in workload.cases:
                if settings.device not in case.devices or (settings.quick and not case.quick):
                    continue
                tell(f"{workload.name}: {case.name}")
                rows += _measure_case(benchmark.op, workload, case, settings, facts)
    finally:
        torch.set_num_threads(threads)
    return rows


def _measure_case(
    op: str, workload: Workload, case: Case, settings: Settings, facts: dict[str, Any]
) -> list[Row]:
    inputs = workload.inputs(case.sizes, settings.device)
    flops, moved = workload.flops(case.sizes), workload.bytes_moved(case.sizes)
    floor_ms = 1e-6 * max(flops / facts["peak_gflops"], moved / facts["copy_gb_s"])
    rows, calls, first, timed = [], [], [], []
    for provider in workload.providers:
        if not provider.ours and not _matches(provider.name, settings.providers):
            continue
        row = Row(
            op=op,
            workload=workload.name,
            case=case.name,
            provider=provider.name,
            ours=provider.ours,
            yardstick=provider.yardstick,
            status=provider.obstacle(settings.device, settings.flags),
            device=settings.device,
            threads=settings.threads,
            malloc=settings.malloc,
            floor_ms=floor_ms,
            flops=flops,
            bytes=moved,
            provider_version=report.provider_version(provider.package or "torch"),
            **facts,
        )
        if provider.ours:
            row.provider_version = row.t2p_fast
        rows.append(row)
        if row.status:
            continue
        call, seconds, row.status = _admit(workload, provider, inputs, settings.device)
        if call is not None:
            row.memory_mib = _peak_memory(call, settings.device)
            calls.append(call)
            first.append(seconds)
            timed.append(row)
    if any(row.ours and row.status != "ok" for row in rows):
        for row in timed:
            row.status, row.memory_mib = "not timed: the gate of the op is red", None
        return rows
    taken = take_turns(
        calls,
        first,
        seconds=settings.seconds,
        seconds_per_sample=settings.seconds_per_sample,
        device=settings.device,
    )
    for row, (samples, repeat) in zip(timed, taken, strict=True):
        wall = [1e3 * sample[0] for sample in samples]
        quarters = quantiles(wall, n=4)
        row.min_ms, row.median_ms = min(wall), median(wall)
        row.spread_ms = quarters[2] - quarters[0]
        row.cpu_ms = min(1e3 * sample[1] for sample in samples)
        row.samples, row.calls = len(samples), repeat
        row.share_of_floor = floor_ms / row.min_ms
    return rows


def _admit(
    workload: Workload, provider: Provider, inputs: Inputs, device: str
) -> tuple[Callable[[], Any] | None, float, str]:
    """Builds a provider and runs its gate: the call, how long the first one took, the status."""
    try:
        call = provider.build(inputs)
        result, seconds = time_first(call, device)
        workload.gate(inputs, result, provider.ours)
    except GateError as error:
        return None, 0.0, f"wrong: {error}"
    except Exception as error:  # a peer may fail in any way, and the others go on
        return None, 0.0, f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return call, seconds, "ok"


# all settings ------------------------------------------------------------------------------------


def run_benchmarks(
    op: str,
    *,
    quick: bool = False,
    threads: int | Sequence[int] | None = None,
    device: str = "cpu",
    providers: Sequence[str] = (),
    workloads: Sequence[str] = (),
    flags: Sequence[str] = (),
    out: str | Path = "bench-results",
    plot: bool = True,
    console: Console | None = None,
) -> Report:
    """Measures an op, prints tables and writes ``<op>-<device>.csv`` and ``.png`` into `out`.

    Args:
        op: The stem of the op, such as ``vq``.
        quick: Few cases, the tuned malloc only; less than a minute.
        threads: One or more numbers of threads; all CPUs if absent.
        device: ``cpu`` or ``cuda``.
        providers: Words; a peer takes part if its name contains one. Empty means all.
        workloads: The same for workloads.
        flags: Lets providers in that are slow to set up: ``compile``.
        out: The folder for the results; made if missing.
        plot: Whether to draw; needs matplotlib.
        console: Where tables go; standard output if absent.

    Raises:
        ValueError: An argument is wrong.
        RuntimeError: A measuring process died.
    """
    benchmark = load(op)
    counts = _check_threads(threads)
    _check_choices(benchmark, providers, workloads)
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device: is {device!r}, expected 'cpu' or 'cuda'")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: is 'cuda', but torch sees no CUDA device")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out: {folder} is a file, expected a folder")
    folder.mkdir(parents=True, exist_ok=True)
    csv = folder / f"{op}-{device}.csv"

    rows: list[Row] = []
    notes: list[str] = []
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if device == "cpu" and load_average > 0.5 * _cpus():
        notes.append(
            f"the machine was busy (load {load_average:.1f} on {_cpus()} cpus): trust cpu times "
            "and ratios more than milliseconds"
        )
    for count in counts:
        for malloc in _mallocs(device, quick):
            settings = Settings(
                quick=quick,
                threads=count,
                device=device,
                malloc=malloc,
                providers=tuple(providers),
                workloads=tuple(workloads),
                flags=frozenset(flags),
            )
            new, problem = _measure_elsewhere(op, settings)
            rows += new
            if problem and problem not in notes:
                notes.append(problem)
    report.add_ratios(rows)
    ok = bool(rows) and not any(row.ours and row.status != "ok" for row in rows)
    report.write_csv(rows, csv)
    notes += _notes(rows)
    console = console or Console()
    report.print_tables(rows, benchmark.workloads, console)
    png: Path | None = None
    if plot and any(row.min_ms is not None for row in rows):
        try:
            report.plot(rows, benchmark.workloads, csv.with_suffix(".png"))
            png = csv.with_suffix(".png")
        except ImportError:
            notes.append("no plot: matplotlib is not installed (pip install 't2p-fast[bench]')")
    for note in notes:
        console.print(escape(note), highlight=False, soft_wrap=True)
    written = f"{csv} and {png}" if png else str(csv)
    console.print(escape(f"wrote {written}"), highlight=False, soft_wrap=True)
    return Report(rows, ok, csv, png, notes)


def _mallocs(device: str, quick: bool) -> tuple[str, ...]:
    if device != "cpu" or platform.libc_ver()[0] != "glibc":
        return ("default",)
    return ("tuned",) if quick else ("glibc", "tuned")


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_threads(threads: int | Sequence[int] | None) -> list[int]:
    cpus = _cpus()
    counts = [cpus] if threads is None else [threads] if isinstance(threads, int) else [*threads]
    for count in counts:
        if not 1 <= count <= cpus:
            raise ValueError(f"--threads: is {count}, expected 1 to {cpus}")
    return counts


def _check_choices(
    benchmark: Benchmark, providers: Sequence[str], workloads: Sequence[str]
) -> None:
    for option, words, names in (
        ("--providers", providers, benchmark.provider_names()),
        ("--workloads", workloads, [workload.name for workload in benchmark.workloads]),
    ):
        for word in words:
            if not any(_matches(name, [word]) for name in names):
                raise ValueError(f"{option}: {word!r} is in none of {', '.join(names)}")


def environment_of(malloc: str, threads: int) -> dict[str, str]:
    """This process's environment for one that starts with a malloc of `MALLOC` and threads."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environment |= MALLOC[malloc]
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment[name] = str(threads)
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return environment


def _measure_elsewhere(op: str, settings: Settings) -> tuple[list[Row], str]:
    """`measure` in a process that starts with the malloc and the threads wanted."""
    environment = environment_of(settings.malloc, settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        order, answer = Path(folder, "order.json"), Path(folder, "answer.json")
        fields = dataclasses.asdict(settings) | {"flags": sorted(settings.flags)}
        order.write_text(json.dumps({"op": op, "settings": fields, "answer": str(answer)}))
        command = [sys.executable, "-m", f"{__package__}.run", "--worker", str(order)]
        code = subprocess.run(command, env=environment, check=False).returncode
        if code != 0 or not answer.exists():
            raise RuntimeError(f"bench: the measuring process ended with code {code}")
        result = json.loads(answer.read_text())
    return [Row(**row) for row in result["rows"]], result["problem"]


def _work(order: Path) -> None:
    """The other end of `_measure_elsewhere`."""
    task = json.loads(order.read_text())
    fields = task["settings"]
    settings = Settings(
        quick=fields["quick"],
        threads=fields["threads"],
        device=fields["device"],
        malloc=fields["malloc"],
        providers=tuple(fields["providers"]),
        workloads=tuple(fields["workloads"]),
        flags=frozenset(fields["flags"]),
    )
    setting = f"{settings.threads} thread{'s' * (settings.threads != 1)}, malloc {settings.malloc}"

    def tell(what: str) -> None:
        sys.stderr.write(f"{setting}: {what}\n")

    rows: list[Row] = []
    problem = ""
    try:
        rows = measure(load(task["op"]), settings, tell)
    except GateError as error:
        problem = f"nothing was timed: t2p_fast fails the gate of {task['op']}: {error}"
    Path(task["answer"]).write_text(
        json.dumps({"rows": [dataclasses.asdict(row) for row in rows], "problem": problem})
    )


def _notes(rows: Sequence[Row]) -> list[str]:
    """Peers that are missing, left out or wrong."""
    notes = []
    for provider in dict.fromkeys(row.provider for row in rows):
        for status in dict.fromkeys(row.status for row in rows if row.provider == provider):
            if status != "ok":
                cases = [row for row in rows if (row.provider, row.status) == (provider, status)]
                everywhere = len(cases) == sum(row.provider == provider for row in rows)
                where = "" if everywhere else f" on {', '.join({row.case: 0 for row in cases})}"
                notes.append(f"{provider}{where}: {status}")
    return notes


# the command line --------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="t2p-fast bench",
        description="Times an op against what people use otherwise, after checking its results.",
    )
    parser.add_argument("op", help=f"one of: {', '.join(ops())}")
    parser.add_argument("--quick", action="store_true", help="few cases, under a minute")
    parser.add_argument("--threads", type=int, nargs="+", metavar="N", help="default: all CPUs")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--providers", nargs="+", default=[], metavar="WORD", help="peers whose name contains WORD"
    )
    parser.add_argument(
        "--workloads", nargs="+", default=[], metavar="WORD", help="workloads, likewise"
    )
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile as a peer; slow to set up"
    )
    parser.add_argument(
        "--out", default="bench-results", metavar="FOLDER", help="default: %(default)s"
    )
    parser.add_argument("--no-plot", action="store_true", help="CSV only")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``t2p-fast bench``: 0 if all is well, 1 if the op fails its gate, 2 for a mistake."""
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) == 2 and argv[0] == "--worker":
        _work(Path(argv[1]))
        return 0
    try:
        if argv and argv[0] == "markovgen":
            from .markovgen import main as compare_pipelines

            return compare_pipelines(argv[1:])
        if argv and argv[0] == "drop-in":
            from .drop_in import main as compare_drop_in

            return compare_drop_in(argv[1:])
        options = _parser().parse_args(argv)
        result = run_benchmarks(
            options.op,
            quick=options.quick,
            threads=options.threads,
            device=options.device,
            providers=options.providers,
            workloads=options.workloads,
            flags=["compile"] if options.compile else [],
            out=options.out,
            plot=not options.no_plot,
        )
    except SystemExit as done:  # argparse has printed the help, or what is wrong
        return int(done.code or 0)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        sys.stderr.write(f"t2p-fast bench: error: {' '.join(str(error).split())}\n")
        return 2
    except RuntimeError as error:
        sys.stderr.write(f"t2p-fast bench: error: {error}\n")
        return 1
    return 0 if result.ok else 1


if __name__ == "__main__":
    sys.exit(main())
