"""What a site can compute with: discovery of its devices, a module per vendor, and their measured speed.

`spec` reads `--device` options, `cpu`, `cuda`, `rocm`, `mps` and `xpu` look for hardware, `calibration` measures it and
`cache` keeps what was measured. torch is imported only where an accelerator is looked for or something is measured, and
only in the process of `python -m mesh.devices`; the daemon calls that through `local.discover`.
"""
