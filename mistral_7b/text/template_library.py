"""Chat templates by name, for `--chat-template NAME`: for weights that bring none of their own.

chatml      OpenHermes, Dolphin, SmolLM2    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n
zephyr      Zephyr                          <|user|>\\nHi</s>\\n<|assistant|>\\n
openchat    OpenChat 3.5, Starling          <s>GPT4 Correct User: Hi<|end_of_turn|>GPT4 Correct Assistant:
llama-2     Llama 2 Chat and its kin        <s>[INST] <<SYS>>\\n...\\n<</SYS>>\\n\\nHi [/INST]
alpaca      instruction tunes               ### Instruction:\\nHi\\n\\n### Response:\\n
vicuna      Vicuna                          <s>... USER: Hi ASSISTANT:
mistral-v1, mistral-v2, mistral-v3          mistral-common's own: no Jinja
"""

from __future__ import annotations

CHATML = """\
{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}
{% endfor %}
{% if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' -}}
{% endif %}
"""

ZEPHYR = """\
{% for message in messages %}
{% if message['role'] in ('system', 'user', 'assistant') %}
{{- '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' -}}
{% else %}
{{- raise_exception('This template knows the roles system, user and assistant, not ' + message['role']) -}}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{- '<|assistant|>\\n' -}}
{% endif %}
"""

OPENCHAT = """\
{{- bos_token -}}
{% for message in messages %}
{% if message['role'] == 'system' %}
{{- message['content'] + '<|end_of_turn|>' -}}
{% elif message['role'] in ('user', 'assistant') %}
{{- 'GPT4 Correct ' + message['role'].title() + ': ' + message['content'] + '<|end_of_turn|>' -}}
{% else %}
{{- raise_exception('This template knows the roles system, user and assistant, not ' + message['role']) -}}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{- 'GPT4 Correct Assistant:' -}}
{% endif %}
"""

# What the templates of pairs of turns have in common: the system text and the turns, which must alternate.
PAIRS = """\
{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}
{% set turns = messages[1:] if messages[0]['role'] == 'system' else messages %}
{% for message in turns %}
{% if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}
{{- raise_exception('After a first system message, user and assistant must take turns, beginning with user') -}}
{% endif %}
{% endfor %}
"""

LLAMA_2 = (
    PAIRS
    + """\
{% for message in turns %}
{% if message['role'] == 'user' %}
{% set head = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if system and loop.first else '' %}
{{- bos_token + '[INST] ' + head + message['content'].strip() + ' [/INST]' -}}
{% else %}
{{- ' ' + message['content'].strip() + ' ' + eos_token -}}
{% endif %}
{% endfor %}
"""
)

ALPACA = (
    PAIRS
    + """\
{{- bos_token + (system or 'Below is an instruction that describes a task. Write a response that appropriately \
completes the request.') + '\\n\\n' -}}
{% for message in turns %}
{% if message['role'] == 'user' %}
{{- '### Instruction:\\n' + message['content'] + '\\n\\n' -}}
{% else %}
{{- '### Response:\\n' + message['content'] + eos_token + '\\n\\n' -}}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{- '### Response:\\n' -}}
{% endif %}
"""
)

VICUNA = (
    PAIRS
    + """\
{{- bos_token + (system or 'A chat between a curious user and an artificial intelligence assistant. The assistant \
gives helpful, detailed, and polite answers to the user\\'s questions.') -}}
{% for message in turns %}
{% if message['role'] == 'user' %}
{{- ' USER: ' + message['content'] -}}
{% else %}
{{- ' ASSISTANT: ' + message['content'] + eos_token -}}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{- ' ASSISTANT:' -}}
{% endif %}
"""
)

TEMPLATES = {
    "chatml": CHATML,
    "zephyr": ZEPHYR,
    "openchat": OPENCHAT,
    "llama-2": LLAMA_2,
    "alpaca": ALPACA,
    "vicuna": VICUNA,
}

MISTRAL = {
    "mistral-v1": "v1",
    "mistral-v2": "v2",
    "mistral-v3": "v3",
}  # of mistral-common's templates
