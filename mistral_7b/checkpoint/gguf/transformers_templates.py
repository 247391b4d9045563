"""Mistral's chat templates for transformers, which inserts no space after a special token.

They are written where a GGUF file with a template of chat_templates.py, for llama.cpp, becomes a folder of Hugging
Face's layout. What they write is what mistral-common encodes, which this package uses for such a folder too.
"""

from __future__ import annotations

V1 = r"""{{- bos_token -}}
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set ns.system = message['content'] ~ '\n\n' -%}
{%- elif message['role'] == 'user' -%}
{{- '[INST] ' ~ ns.system ~ message['content'] ~ ' [/INST]' -}}
{%- set ns.system = '' -%}
{%- elif message['role'] == 'assistant' -%}
{{- ' ' ~ message['content'] ~ eos_token -}}
{%- else -%}
{{- raise_exception('Mistral 7B v0.1 and v0.2 know no role ' ~ message['role']) -}}
{%- endif -%}
{%- endfor -%}
"""

V3 = r"""{{- bos_token -}}
{%- set ns = namespace(system='', last=-1, calls='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set ns.system = ns.system ~ message['content'] ~ '\n\n' -%}
{%- elif message['role'] == 'user' -%}
{%- set ns.last = loop.index0 -%}
{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{%- if loop.index0 == ns.last and tools -%}
{{- '[AVAILABLE_TOOLS] ' ~ (tools | tojson) ~ '[/AVAILABLE_TOOLS]' -}}
{%- endif -%}
{{- '[INST] ' ~ (ns.system if loop.index0 == ns.last else '') ~ message['content'] ~ '[/INST]' -}}
{%- elif message['role'] == 'assistant' and message['tool_calls'] -%}
{%- set ns.calls = '' -%}
{%- for call in message['tool_calls'] -%}
{%- set ns.calls = ns.calls ~ (', ' if ns.calls else '') ~ '{"name": ' ~ (call['function']['name'] | tojson)
    ~ ', "arguments": ' ~ (call['function']['arguments'] | tojson) ~ ', "id": ' ~ (call['id'] | tojson) ~ '}' -%}
{%- endfor -%}
{{- '[TOOL_CALLS] [' ~ ns.calls ~ ']' ~ eos_token -}}
{%- elif message['role'] == 'assistant' -%}
{{- ' ' ~ message['content'] ~ eos_token -}}
{%- elif message['role'] == 'tool' -%}
{{- '[TOOL_RESULTS] {"content": ' ~ (message['content'] | tojson) ~ ', "call_id": '
    ~ (message['tool_call_id'] | tojson) ~ '}[/TOOL_RESULTS]' -}}
{%- elif message['role'] != 'system' -%}
{{- raise_exception('Mistral 7B v0.3 knows no role ' ~ message['role']) -}}
{%- endif -%}
{%- endfor -%}
"""

TEMPLATES = {"v1": V1, "v3": V3}
