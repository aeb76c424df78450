# SPDX-License-Identifier: Apache-2.0
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from t2p_fast.benchmarks import registry, report, run, timing
from t2p_fast.benchmarks.registry import Benchmark, Case, GateError, Inputs, Provider, Workload
from t2p_fast.benchmarks.run import Settings, main, measure

FOLDER = Path(run.__file__).parent


def double_inputs(sizes, device) -> Inputs:
    return {"x": torch.ones(sizes["n"], device=device)}


def double_gate(inputs: Inputs, result: torch.Tensor, ours: bool) -> None:  # noqa: ARG001
    if not torch.equal(result, 2 * inputs["x"]):
        raise GateError("not the double")


def double(inputs: Inputs):
    return lambda: 2 * inputs["x"]


def triple(inputs: Inputs):
    return lambda: 3 * inputs["x"]


def broken(inputs: Inputs):  # noqa: ARG001
    raise RuntimeError("out of\nluck")


def make_benchmark(*providers: Provider, gate=lambda _: None) -> Benchmark:
    workload = Workload(
        name="double",
        title="doubles a vector",
        cases=(Case({"n": 100}, quick=True), Case({"n": 200})),
        providers=providers,
        inputs=double_inputs,
        gate=double_gate,
        flops=lambda sizes: float(sizes["n"]),
        bytes_moved=lambda sizes: 8.0 * sizes["n"],
    )
    return Benchmark(op="double", workloads=(workload,), gate=gate)


OURS = Provider("t2p_fast", double, ours=True)
QUICK = Settings(quick=True)


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch):
    monkeypatch.setattr(Settings, "seconds", 0.01)
    monkeypatch.setattr(run, "ceilings", lambda _: (1e9, 1e9))


def test_load_every_op_has_a_benchmark():
    assert "vq" in registry.ops()
    for op in registry.ops():
        benchmark = registry.load(op)
        assert benchmark.op == op
        names = [workload.name for workload in benchmark.workloads]
        assert len(set(names)) == len(names)
        for workload in benchmark.workloads:
            assert not all(p.ours for p in workload.providers)
            assert workload.providers[0].ours
            cases = [case.name for case in workload.cases]
            assert len(set(cases)) == len(cases)
            for case in workload.cases:
                assert workload.flops(case.sizes) > 0
                assert workload.bytes_moved(case.sizes) > 0
        assert any(case.quick for workload in benchmark.workloads for case in workload.cases)


@pytest.mark.parametrize("op", registry.ops())
def test_every_workload_runs_and_passes_its_gate(op):
    for workload in registry.load(op).workloads:
        cases = [case for case in workload.cases if "cpu" in case.devices]
        if not cases:
            continue
        case = next((case for case in cases if case.quick), cases[0])
        inputs = workload.inputs(case.sizes, "cpu")
        for provider in workload.providers:
            if provider.ours and "cpu" in provider.devices:
                workload.gate(inputs, provider.build(inputs)(), True)


def test_load_unknown_op():
    with pytest.raises(ValueError, match=r"no benchmark for op 'nothing', there is one for .*vq"):
        registry.load("nothing")


def test_measure_times_providers_that_are_right():
    ours, peer = measure(make_benchmark(OURS, Provider("torch", double)), QUICK)
    for row in (ours, peer):
        assert row.status == "ok"
        assert 0 < row.min_ms <= row.median_ms
        assert row.samples >= 3
        assert row.floor_ms == pytest.approx(8 * 100 / 1e9 * 1e3)
        assert row.malloc == "default"
        assert row.torch == torch.__version__
    report.add_ratios([ours, peer])
    assert ours.best_peer == peer.best_peer == "torch"
    assert ours.ratio == pytest.approx(peer.median_ms / ours.median_ms)
    assert peer.ratio == peer.cpu_ratio == 1


def test_yardsticks_are_no_peers():
    copy = Provider("copy", double, yardstick=True)
    ours, peer, yardstick = measure(make_benchmark(OURS, Provider("torch", double), copy), QUICK)
    yardstick.median_ms = yardstick.min_ms = 1e-9
    report.add_ratios([ours, peer, yardstick])
    assert ours.best_peer == "torch"
    assert (ours.yardstick, peer.yardstick, yardstick.yardstick) == (False, False, True)


def test_measure_quick_keeps_the_quick_cases():
    benchmark = make_benchmark(OURS)
    assert [row.case for row in measure(benchmark, QUICK)] == ["n100"]
    assert [row.case for row in measure(benchmark, replace(QUICK, quick=False))] == ["n100", "n200"]


def test_measure_leaves_out_cases_for_other_devices():
    benchmark = make_benchmark(OURS)
    (workload,) = benchmark.workloads
    cases = (replace(workload.cases[0], devices=("cuda",)), workload.cases[1])
    benchmark = replace(benchmark, workloads=(replace(workload, cases=cases),))
    assert [row.case for row in measure(benchmark, replace(QUICK, quick=False))] == ["n200"]


def test_measure_does_not_time_a_wrong_peer():
    rows = measure(make_benchmark(OURS, Provider("wrong", triple)), QUICK)
    assert [row.status for row in rows] == ["ok", "wrong: not the double"]
    assert rows[0].min_ms is not None
    assert rows[1].min_ms is None


def test_measure_times_nobody_if_the_op_is_wrong():
    wrong = Provider("t2p_fast", triple, ours=True)
    rows = measure(make_benchmark(wrong, Provider("torch", double)), QUICK)
    assert rows[0].status == "wrong: not the double"
    assert rows[1].status == "not timed: the gate of the op is red"
    assert all(row.min_ms is None for row in rows)


def test_measure_stops_if_the_gate_on_awkward_data_is_red():
    def gate(_):
        raise GateError("ties")

    with pytest.raises(GateError, match="ties"):
        measure(make_benchmark(OURS, gate=gate), QUICK)


def test_measure_names_peers_that_take_no_part():
    peers = (
        Provider("absent", double, module="no_such_module", package="no-such-package"),
        Provider("slow", double, flag="compile"),
        Provider("gpu", double, devices=("cuda",)),
        Provider("broken", broken),
    )
    benchmark = make_benchmark(OURS, *peers)
    statuses = {row.provider: row.status for row in measure(benchmark, QUICK)}
    assert statuses == {
        "t2p_fast": "ok",
        "absent": "not installed (pip install no-such-package)",
        "slow": "left out (--compile)",
        "gpu": "not available on cpu",
        "broken": "failed: RuntimeError: out of luck",
    }
    rows = measure(benchmark, replace(QUICK, flags=frozenset({"compile"}), providers=("SLOW",)))
    assert {row.provider: row.status for row in rows} == {"t2p_fast": "ok", "slow": "ok"}


def test_vq_gate_refuses_wrong_results():
    benchmark = registry.load("vq")
    benchmark.gate("cpu")
    nearest = benchmark.workloads[0]
    inputs = nearest.inputs({"n": 40, "k": 30, "d": 5}, "cpu")
    right = nearest.providers[0].build(inputs)()
    nearest.gate(inputs, right, True)
    for wrong, message in (
        ((right + 1) % 30, "40 of 40 rows have a nearer code"),
        (right - 30, "outside"),
        (right[1:], "expected 40 integers"),
    ):
        with pytest.raises(GateError, match=message):
            nearest.gate(inputs, wrong, False)


def test_every_vq_provider_passes_its_gate():
    sizes = {"n": 300, "k": 20, "d": 6}
    for workload in registry.load("vq").workloads:
        for provider in workload.providers:
            if not provider.obstacle("cpu", frozenset()):
                inputs = workload.inputs(sizes, "cpu")
                workload.gate(inputs, provider.build(inputs)(), provider.ours)


def test_the_triton_peer_finds_nearest_codes():
    """In Triton's interpreter, which is chosen when it is imported."""
    # That of 3.2 corrupts memory here, that of 3.5 does not know NumPy 2.5.
    pytest.importorskip("triton", minversion="3.7")
    code = """
import torch
from t2p_fast.benchmarks.triton_vq import nearest
for n, k, d in ((130, 300, 32), (65, 129, 8), (70, 200, 100)):
    x, codes = torch.randn(n, d), torch.randn(k, d)
    assert torch.equal(nearest(x, codes).long(), torch.cdist(x.double(), codes.double()).argmin(1))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_main_quick_writes_csv_and_tables(tmp_path, capfd):
    words = ["--providers", "addmm", "--workloads", "train", "--no-plot"]
    code = main(["vq", "--quick", "--threads", "1", "--out", str(tmp_path / "new"), *words])
    printed = capfd.readouterr().out
    assert code == 0, printed
    rows = report.read_csv(tmp_path / "new" / "vq-cpu.csv")
    assert [row["provider"] for row in rows] == ["t2p_fast", "torch addmm+argmin"]
    assert tuple(rows[0]) == report.COLUMNS
    for row in rows:
        assert row["status"] == "ok"
        assert row["threads"] == "1"
        for column in ("min_ms", "cpu_ms", "floor_ms", "peak_gflops", "copy_gb_s", "ratio"):
            assert float(row[column]) > 0
        assert row["cpu"]
    assert "vq_quantize" in printed
    assert "n1024-k1024-d64" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: op"),
        (["nothing"], "no benchmark for op 'nothing'"),
        (["vq", "--threads", "0"], "--threads: is 0, expected 1 to"),
        (["vq", "--threads", "x"], "invalid int value: 'x'"),
        (["vq", "--device", "tpu"], "--device: is 'tpu', expected 'cpu' or 'cuda'"),
        (["vq", "--providers", "nobody"], "--providers: 'nobody' is in none of t2p_fast, "),
        (["vq", "--workloads", "nowhere"], "--workloads: 'nowhere' is in none of nearest, "),
        (["vq", "--out", __file__], "is a file, expected a folder"),
        (["vq", "--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_main_says_what_is_wrong_in_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_main_help(capsys):
    assert main(["--help"]) == 0
    assert "--quick" in capsys.readouterr().out


def test_tables_fit_80_columns(capsys):
    peers = (Provider("vector-quantize-pytorch", double), Provider("wrong", triple))
    benchmark = make_benchmark(OURS, *peers)
    rows = measure(benchmark, QUICK)
    report.add_ratios(rows)
    report.print_tables(rows, benchmark.workloads, Console(width=80))
    printed = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in printed.splitlines()) <= 80
    assert "vector-quantize-pytorch" in printed
    assert "…" not in printed


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    benchmark = make_benchmark(OURS, Provider("torch", double))
    line = replace(benchmark.workloads[0], name="line", line="n")
    benchmark = replace(benchmark, workloads=(*benchmark.workloads, line))
    rows = measure(benchmark, replace(QUICK, quick=False))
    report.plot(rows, benchmark.workloads, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_peak_memory_counts_a_temporary():
    peak = run._peak_memory(lambda: torch.ones(8 << 20), "cpu")
    assert peak is None or 30 < peak < 64


def test_time_is_per_call():
    wall, cpu = timing.time_call(lambda: time.sleep(0.01), 3, "cpu")
    assert wall >= 0.01
    assert cpu < wall


def test_only_timing_looks_at_a_clock():
    clock = re.compile(r"perf_counter|process_time|timeit|cuda\.Event|\btime\.time\(|import time\b")
    files = sorted(FOLDER.glob("*.py"))
    assert len(files) >= 5
    assert [file.name for file in files if clock.search(file.read_text())] == ["timing.py"]
