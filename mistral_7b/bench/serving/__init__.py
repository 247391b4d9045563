"""Serving benchmark: throughput and latency of concurrent requests over arrival rates.

    traffic.py       requests and arrival times, drawn beforehand, the same for every engine
    client.py        sends them on time, in an open loop, and records the time of every token
    ours.py          this package's engine in its own process; llama_server.py  llama.cpp's server
    records.py       results; report.py, plot.py  present them
    run.py           runs the engines alternately

Nothing here imports torch before a measurement starts.
"""

from __future__ import annotations
