"""Text and tokens. This package itself imports no torch.

tokenizer    Tokenizer: encode, decode, chat prompts, and a streaming decoder
messages     validate a conversation and render it as mistral-common's request
tool_calls   parse tool calls out of generated text, whole or as a stream
"""
