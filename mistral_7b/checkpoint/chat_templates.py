"""The chat templates that go into GGUF files, for llama.cpp: nothing in this package executes them.

Tokenised by llama.cpp, a conversation gives the ids that `Tokenizer.encode_chat` gives. Its tokenizer puts a
space before any text that follows a special token, so none is written here. (transformers does not; to it,
these strings are not for use.) What llama.cpp does without Jinja it chooses by looking for certain texts in
a template: v1 names one of them in its comment.
"""

V1 = """\
{#- Mistral 7B v0.1 and v0.2. As llama.cpp knows it: ' [INST] ' + system_message -#}
{{- bos_token -}}
{%- set joined = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set joined.system = joined.system + message['content'] + '\n\n' -%}
{%- elif message['role'] == 'user' -%}
{{- '[INST] ' + joined.system + message['content'] + ' [/INST]' -}}
{%- set joined.system = '' -%}
{%- elif message['role'] == 'assistant' -%}
{{- ' ' + message['content'] + eos_token -}}
{%- else -%}
{{- raise_exception('Mistral 7B v0.1 and v0.2 know the roles system, user and assistant') -}}
{%- endif -%}
{%- endfor -%}"""

V3 = """\
{#- Mistral 7B v0.3: tools and the system text stand with the last message of the user. -#}
{{- bos_token -}}
{%- set joined = namespace(system='', last=-1) -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set joined.system = joined.system + message['content'] + '\n\n' -%}
{%- elif message['role'] == 'user' -%}
{%- set joined.last = loop.index0 -%}
{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{%- if loop.index0 == joined.last and tools -%}
{{- '[AVAILABLE_TOOLS]' -}}{{- tools | tojson -}}{{- '[/AVAILABLE_TOOLS]' -}}
{%- endif -%}
{{- '[INST]' + (joined.system if loop.index0 == joined.last else '') + message['content'] + '[/INST]' -}}
{%- elif message['role'] == 'assistant' and message['tool_calls'] -%}
{{- '[TOOL_CALLS][' -}}
{%- for call in message['tool_calls'] -%}
{%- set arguments = call['function']['arguments'] -%}
{{- '{"name": ' -}}{{- call['function']['name'] | tojson -}}{{- ', "arguments": ' -}}
{%- if arguments is string -%}{{- arguments -}}{%- else -%}{{- arguments | tojson -}}{%- endif -%}
{{- ', "id": ' -}}{{- call['id'] | tojson -}}{{- '}' if loop.last else '}, ' -}}
{%- endfor -%}
{{- ']' + eos_token -}}
{%- elif message['role'] == 'assistant' -%}
{{- message['content'] + eos_token -}}
{%- elif message['role'] == 'tool' -%}
{{- '[TOOL_RESULTS]{"content": ' -}}{{- message['content'] | tojson -}}
{{- ', "call_id": ' -}}{{- message['tool_call_id'] | tojson -}}{{- '}[/TOOL_RESULTS]' -}}
{%- elif message['role'] != 'system' -%}
{{- raise_exception('Mistral 7B v0.3 knows the roles system, user, assistant and tool') -}}
{%- endif -%}
{%- endfor -%}"""

TEMPLATES = {"v1": V1, "v3": V3}
