# SPDX-License-Identifier: Apache-2.0
"""An emulator of PTX: runs what nvcc emitted for a GPU on tensors in ordinary memory, with checks.

The way of a launch, file by file:

=================  ================================================================================
`build.py`         compiles the package's kernels against `cudart/`, a CUDA runtime that has no GPU
`device.py`        that runtime's other half: launches and copies arrive here, with real addresses
`parser.py`        PTX text to kernels; text that it does not know is an error
`compiler.py`      a kernel to basic blocks of Python closures, calls inlined, registers numbered
`instructions/`    one file per family; every accepted opcode is written out in a pattern
`warps.py`         the registers of many threads as numpy arrays, and which threads are active
`scheduler.py`     runs blocks of code, lowest address first; barriers, warps, exits
`memory.py`        buffers, their bounds, what was written, which copies are in flight
`races.py`         who touched what in which barrier interval
`values.py`        types; roundings that numpy lacks; approximations within their documented error
`faults.py`        what is reported, with kernel, line, instruction, thread, buffer and offset
`emulation.py`     gives the ops of the package this device for CPU tensors (`--device emulated`)
=================  ================================================================================

Whether it computes what a GPU does is told by tables: `table.py` has single instructions,
`programs_memory.py` and `programs_products.py` what takes a block and shared memory, each with a
reference of its own. `record.py` runs them on a GPU.

What it does not know: timing, occupancy, ptxas (it runs PTX, not SASS), and what the memory model
allows beyond "ordered by a barrier or not ordered".
"""
