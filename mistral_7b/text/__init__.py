"""Text and tokens. This package itself imports no torch.

tokenizer          Tokenizer: encode, decode, chat prompts, and a streaming decoder
messages           validate a conversation and render it as mistral-common's request
chat_template      render a conversation by a model's own Jinja template
template_choice    find the template in a model's files, by name, or Mistral's own
template_library   templates by name
template_marks     tell text that spells a control token from the template's control tokens
template_sandbox   compile and render within limits; template_filters and template_budget hold the limits
facts              what a tokenizer is, in words and numbers
tool_calls         parse tool calls out of generated text, whole or as a stream
"""
