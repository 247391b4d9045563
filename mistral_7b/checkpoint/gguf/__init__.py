"""GGUF files. This package itself imports no torch.

file                 the container: header, metadata, tensor table
splits               one model in several files
reading              metadata -> ModelArgs, and the tensors
blocks               quantized blocks: dequantize, and rearrange for the kernels
modules              Linears and an embedding that keep the blocks
quantizing           values -> blocks
tokenizer            tokenizer metadata <-> SentencePiece model
writing              write a file, one tensor at a time
chat_templates       chat templates for GGUF files; chat_template_json is the part that parses JSON
"""
