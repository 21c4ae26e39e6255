"""What an optimizer's update costs on an H100 and on TPUs, counted without a device.

XLA's compilers for these devices run on any machine. An update is compiled by them for
a device that is not there, and what the compiled program does in a step is counted:
the launches, the calls of libraries, the bytes that go through the memory.

    python -m benchmarks.accelerators --targets h100 --cases mlorc_adamw --list
    python -m benchmarks.accelerators --targets h100 --cases mlorc_adamw
    python -m benchmarks.accelerators.measure h100 --optimizer "lro.mlorc_lion(1e-3)"
    python -m benchmarks.accelerators.check --subset ci

The environment needs `jax[cuda13]` for the H100 and `jax[tpu]` for the TPUs; both fit
into one. `make test-accelerators` makes it.

- `hlo` reads XLA's text, and `counting` counts in it; `pallas` and `triton` count in
  kernels, of which XLA knows nothing.
- `targets` are the devices, `cases` the optimizers, `programs` the steps.
- `meshes` counts what a step moves between eight devices.
- `measure` makes one row, in a process of its own; `table` keeps the rows, and
  `aims` says which figures were aimed at, and why some are missed.
"""
