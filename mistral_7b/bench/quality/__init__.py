"""The loss by quantization: the distance of each format from the model's float32, beside llama.cpp's formats.

run.py        the plan, the rows of the text, and each format in turn
ours.py       this package's models: in float32, and quantized
llama_cpp.py  llama.cpp's quantizer and logits, under the peer's Python
records.py    the records; report.py  presents them
"""

from __future__ import annotations
