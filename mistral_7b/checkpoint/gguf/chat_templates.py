"""Jinja chat templates in GGUF files, for llama.cpp; this package never executes them.

A conversation rendered by a template and tokenized by llama.cpp has the ids of `Tokenizer.encode_chat`.
llama.cpp inserts a space before text that follows a special token, so the templates write none.
(Tokenizers of transformers do not: transformers_templates.py has templates for them.) A template needs what both
engines provide: `raise_exception`, and a `tojson` equal to Python's json.dumps with ensure_ascii=False.

A template calls raise_exception where it cannot match encode_chat:

    text that spells a special token              rendered text cannot distinguish the two
    call ids that are not 9 letters or digits     encode_chat hashes them, Jinja cannot (v3, v7)
    some JSON in arguments and results            see chat_template_json.py (v2, v3; v7: in arguments)

A final assistant message is rendered as given, for `continue_final_message` of transformers; with "prefix" it
has no EOS. Tool calls without results are rendered, although encode_chat rejects them, because llama.cpp
probes templates with such. Without Jinja, llama.cpp selects its built-in format by searching a template for
certain strings: v1 has one in its comment; no other may have a space before [INST] or double quotes around it.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable

from .chat_template_json import JSON

HEADS = {
    "v1": "{#- Mistral 7B v0.1 and v0.2 (v1). As llama.cpp knows it: ' [INST] ' + system_message -#}\n",
    "v2": "{#- Mistral's template v2. -#}\n",
    "v3": "{#- Mistral 7B v0.3 (v3): tools and the system text stand with the last message of the user. -#}\n",
    "v7": "{#- Mistral's template v7. -#}\n",
}

# text(content): the text of a message. plain(text): the text, checked to contain no control token.
TEXTS = r"""
{%- macro join(first, second) -%}
{{- first ~ ('\n\n' if first and second else '') ~ second -}}
{%- endmacro -%}
{%- macro text(content) -%}
{%- if content is string -%}
{{- content -}}
{%- elif content is mapping or content is none or content is not sequence or content is undefined -%}
{{- raise_exception('content must be a text or a list of text parts') -}}
{%- else -%}
{%- set ns = namespace(text='') -%}
{%- for part in content -%}
{%- if part['type'] != 'text' -%}
{{- raise_exception('content part of another type than text: Mistral 7B reads text only') -}}
{%- endif -%}
{%- set ns.text = join(ns.text, part['text']) -%}
{%- endfor -%}
{{- ns.text -}}
{%- endif -%}
{%- endmacro -%}
{%- macro plain(text) -%}
{%- for name in controls -%}
{%- if name in text -%}
{{- raise_exception('a text spells the control token ' ~ name ~ ': a template cannot tell the two apart') -}}
{%- endif -%}
{%- endfor -%}
{{- text -}}
{%- endmacro -%}
"""

# name(function), arguments(given), nine(id): fields of a tool or tool call. Some engines ignore the argument of
# strip and strip only blanks; the first lines detect that.
CALLS = r"""
{%- if 'xaa'.rstrip('a') ~ 'axa'.strip('a') ~ 'aax'.lstrip('a') != 'xxx' -%}
{{- raise_exception('this template needs strip, lstrip and rstrip that take the characters to strip') -}}
{%- endif -%}
{%- macro name(function) -%}
{%- if function['name'] is not string -%}
{{- raise_exception('a tool or a call has no function with a name') -}}
{%- endif -%}
{{- function['name'] | tojson -}}
{%- endmacro -%}
{%- macro arguments(given) -%}
{%- if given is undefined or given is none -%}
{{- '{}' -}}
{%- elif given is mapping -%}
{{- given | tojson -}}
{%- elif given is string -%}
{{- reread(given) -}}
{%- else -%}
{{- raise_exception('the arguments of a call must be an object or a text') -}}
{%- endif -%}
{%- endmacro -%}
{%- macro nine(id) -%}
{%- if id is not string or (id | length) != 9
    or id.strip('0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ') != '' -%}
{{- raise_exception('the id of a tool call must be 9 letters or digits') -}}
{%- endif -%}
{{- id -}}
{%- endmacro -%}
"""

# Validates the roles, and collects what the first rendered message depends on.
SURVEY = r"""
{{- bos_token -}}
{%- set ns = namespace(system='', systems=false, first='', last=-1, begin=0, before='', text='', calls=[]) -%}
{%- for message in messages -%}
{%- set role = 'system' if message['role'] == 'developer' else message['role'] -%}
{%- if role not in ['system', 'user', 'assistant', 'tool'] -%}
{{- raise_exception('a message has a role other than system, user, assistant and tool') -}}
{%- elif (role == 'tool' and ns.before in ['system', 'user'])
    or (role == 'system' and ns.before in ['assistant', 'tool']) -%}
{{- raise_exception('a message with role ' ~ role ~ ' may not follow one with role ' ~ ns.before) -}}
{%- elif role == 'system' and message['content'] -%}
{%- set ns.system = ns.system ~ ('\n\n' if ns.systems else '') ~ text(message['content']) -%}
{%- set ns.systems = true -%}
{%- elif role == 'user' and ns.before != 'user' -%}
{%- set ns.last = loop.index0 -%}
{%- endif -%}
{%- set ns.first = ns.first or (role if role != 'system' else '') -%}
{%- set ns.before = role -%}
{%- endfor -%}
{%- if ns.last == -1 -%}
{{- raise_exception("the conversation has no message with role 'user' to answer") -}}
{%- endif -%}
{%- set ns.before = '' -%}
"""

# Consecutive messages of one role form one turn: `turn` is true at the last, and ns.text is the joined text.
TURN = r"""
{%- for message in messages -%}
{%- set role = 'system' if message['role'] == 'developer' else message['role'] -%}
{%- set turn = loop.last or loop.nextitem['role'] != role -%}
{%- if role != ns.before -%}
{%- set ns.text = '' -%}
{%- set ns.begin = loop.index0 -%}
{%- endif -%}
{%- set ns.before = role -%}
{%- if role == 'user' or (role == 'assistant' and message['content'] and not message['tool_calls']) -%}
{%- set ns.text = join(ns.text, text(message['content'])) -%}
{%- endif -%}
{%- if role == 'assistant' and (message['tool_calls'] and not turn
    or turn and not message['tool_calls'] and ns.text == '') -%}
{{- raise_exception("an assistant's message needs content or tool_calls, and calls need their results") -}}
{%- endif -%}
"""

V1 = r"""
{%- if ns.first != 'user' -%}
{{- '[INST] ' ~ plain(ns.system ~ ('\n\n' if ns.system else '')) ~ ' [/INST]' -}}
{%- set ns.system = '' -%}
{%- endif -%}
{%- set ns.space = ' ' if ns.first != 'user' else '' -%}
@TURN
{%- if role == 'tool' or message['tool_calls'] or tools -%}
{{- raise_exception('Mistral 7B v0.1 and v0.2 know no tools') -}}
{%- elif role == 'user' and turn -%}
{{- ns.space ~ '[INST] ' ~ plain(ns.system ~ ('\n\n' if ns.system else '') ~ ns.text) ~ ' [/INST]' -}}
{%- set ns.system = '' -%}
{%- set ns.space = ' ' -%}
{%- elif role == 'assistant' and turn -%}
{{- ' ' ~ plain(ns.text) ~ ('' if loop.last and message['prefix'] else eos_token) -}}
{%- set ns.space = '' -%}
{%- endif -%}
{%- endfor -%}"""

# v2, v3 and v7. @SYSTEM and the other placeholders are filled from PARTS.
LATER = r"""@FIRST
@TURN@SYSTEM
{%- if role == 'user' and turn -%}
{%- if ns.begin == ns.last and tools -%}
{%- set ns.json = '' -%}
{%- for tool in tools -%}
{%- set function = tool['function'] -%}
{%- set ns.json = ns.json ~ (', ' if ns.json else '') ~ '{"type": "function", "function": {"name": '
    ~ name(function) ~ ', "description": ' ~ ((function['description'] or '') | tojson)
    ~ ', "parameters": ' ~ ((function['parameters'] or {}) | tojson) ~ '}' ~ '}' -%}
{%- endfor -%}
{{- '[AVAILABLE_TOOLS]' ~ plain('[' ~ ns.json ~ ']') ~ '[/AVAILABLE_TOOLS]' -}}
{%- endif -%}
{{- '[INST]' ~ plain(@JOINED ns.text) ~ '[/INST]' -}}
{%- elif role == 'assistant' and turn@SHOWN -%}
{%- if ns.text -%}
{{- plain(ns.text if loop.last else ns.text.rstrip(' ')) -}}
{%- endif -%}
{%- if message['tool_calls'] -%}@BESIDE
{%- set ns.json = '' -%}
{%- for call in message['tool_calls'] -%}
{%- set ns.json = ns.json ~ (', ' if ns.json else '') ~ '{"name": ' ~ name(call['function'])
    ~ ', "arguments": ' ~ arguments(call['function']['arguments'])@ID ~ '}' -%}
{%- endfor -%}
{{- '[TOOL_CALLS]' ~ plain('[' ~ ns.json ~ ']') -}}
{%- endif -%}
{{- '' if loop.last and message['prefix'] else eos_token -}}
{%- elif role == 'tool' -%}@RESULT
{%- endif -%}
{%- endfor -%}"""

JOINED = r"(ns.system ~ '\n\n' if ns.system and ns.begin == ns.last else '') ~"
FIRST = r"{{- '[INST][/INST]' if ns.first != 'user' else '' -}}"
BESIDE = r"""
{%- if ns.text -%}
{{- raise_exception('the template has no place for text beside tool calls in one turn') -}}
{%- endif -%}"""
ID = """ ~ ', "id": "' ~ nine(call['id']) ~ '"'"""

PARTS = {
    "v2": {
        "FIRST": FIRST, "JOINED": JOINED, "BESIDE": BESIDE, "ID": "",
        "SYSTEM": "\n{%- set ns.calls = (message['tool_calls'] or []) if role == 'assistant' else ns.calls -%}",
        "SHOWN": " and not (message['tool_calls'] and loop.index0 < ns.last)",
        "RESULT": r"""
{%- set ns.name = message['name'] or none -%}
{%- for call in ns.calls -%}
{%- if not ns.name and (call['id'] == message['tool_call_id'] or not message['tool_call_id']) -%}
{%- set ns.name = call['function']['name'] -%}
{%- endif -%}
{%- endfor -%}
{%- if loop.index0 > ns.last -%}
{{- '[TOOL_RESULTS]' ~ plain('[{"name": ' ~ (ns.name | tojson) ~ ', "content": ' ~ reread(text(message['content']))
    ~ '}]') ~ '[/TOOL_RESULTS]' -}}
{%- endif -%}""",
    },
    "v3": {
        "FIRST": FIRST, "SYSTEM": "", "JOINED": JOINED, "BESIDE": BESIDE, "ID": ID, "SHOWN": "",
        "RESULT": r"""
{{- '[TOOL_RESULTS]' ~ plain('{"content": ' ~ reread(text(message['content'])) ~ ', "call_id": "'
    ~ nine(message['tool_call_id']) ~ '"}') ~ '[/TOOL_RESULTS]' -}}""",
    },
    "v7": {
        "FIRST": "", "JOINED": "", "BESIDE": "", "ID": ID, "SHOWN": "",
        "SYSTEM": r"""
{%- if role == 'system' -%}
{{- '[SYSTEM_PROMPT]' ~ plain(text(message['content'])) ~ '[/SYSTEM_PROMPT]' -}}
{%- endif -%}""",
        "RESULT": r"""
{{- '[TOOL_RESULTS]' ~ nine(message['tool_call_id']) ~ '[TOOL_CONTENT]' ~ plain(text(message['content']))
    ~ '[/TOOL_RESULTS]' -}}""",
    },
}  # fmt: skip


def chat_template(version: str, special: Iterable[str]) -> str:
    """Return the template of a version for a vocabulary whose special tokens are `special`."""
    # Hundreds of tokens [control_8], [control_9], ... are covered by rejecting the prefix [control_.
    names = sorted({re.sub(r"^(\[\w*[A-Za-z_])\d+\]$", r"\1", name) for name in special})
    text = HEADS[version] + f"{{%- set controls = {names!r} -%}}" + TEXTS
    if version == "v1":
        return text + (SURVEY + V1).replace("@TURN", TURN)
    body = LATER
    for name, part in PARTS[version].items():
        body = body.replace(f"@{name}", part)
    return text + JSON + CALLS + SURVEY + body.replace("@TURN", TURN)


def template_version(controls: Container[str], name: str) -> str:
    """Return the template version of a vocabulary, determined by its control tokens.

    v2 and v3 have the same control tokens. Only v3 was released for a 7B model, so v2 is chosen only by a file
    name that ends in `.v2`.
    """
    if "[INST]" not in controls:
        return "v1"
    if "[SYSTEM_PROMPT]" in controls:
        return "v7"
    return "v2" if name.endswith(".v2") else "v3"
