"""Benchmarks: speed, memory and quality, compared with hardware limits and other engines.

    roofline.py    measured ceilings of this machine
    work.py        the minimum bytes and operations of a workload
    jobs.py        one measurement as data: engine, scheme, workload; timing.py  runs it, alike for every engine
    peers/         the engines that are measured: mistral_7b, llama.cpp, transformers
    process.py     runs one job in its own process, for its own peak memory
    run.py         runs jobs and collects records; report.py, plot.py  present them
    serving/       concurrent requests at given arrival rates
    quality/       the distance of quantized models from float32

Nothing here imports torch before a measurement starts.
"""

from __future__ import annotations
