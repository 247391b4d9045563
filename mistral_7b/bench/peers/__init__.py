"""The engines that are measured, each with one interface: `begin` prefills, `step` decodes one token per row.

ours             this package
llama_cpp        llama.cpp; llama_file.py writes its model file
hf_transformers  transformers
"""
