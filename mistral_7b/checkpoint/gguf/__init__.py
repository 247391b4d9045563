"""GGUF files. This package itself imports no torch.

file                 the container: header, metadata, tensor table
splits               one model in several files
reading              metadata -> ModelArgs, and the tensors
blocks               quantized blocks: dequantize, and rearrange for the kernels
modules              Linears and an embedding that keep the blocks
quantizing           values -> blocks
vocabulary           tokenizer metadata, validated
tokenizer            tokenizer metadata -> a folder of tokenizer files; tokenizer_metadata is the other direction
sentencepiece_model  a `llama` vocabulary <-> a SentencePiece file
tokenizer_json       a vocabulary -> tokenizer.json; pre_tokenizers lists how `gpt2` vocabularies split text
writing              write a file, one tensor at a time
chat_templates       chat templates for GGUF files; chat_template_json is the part that parses JSON
"""
