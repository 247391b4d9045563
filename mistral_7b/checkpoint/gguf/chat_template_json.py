"""Jinja macro that normalizes JSON: reread(text) is json.dumps(json.loads(text)).

If the text is not valid JSON, it is json.dumps(text). Strings are split off first, so that a step handles one
JSON token and not one character. `want` is what may come next, `stack` the open brackets. JSON that Jinja
cannot spell as json.dumps does is `odd` and rejected with raise_exception:

    escapes other than \\" \\\\ \\b \\f \\n \\r \\t       "\\u00e9" is "é", which Jinja cannot decode
    numbers not spelled as by Python      1.50, -0, and all with an exponent
    duplicate keys in an object           the last value is used, at the first position
"""

from __future__ import annotations

JSON = r"""
{%- macro digits(text) -%}
{{- 'yes' if text != '' and text.strip('0123456789') == '' else '' -}}
{%- endmacro -%}
{%- macro number(word) -%}
{%- set size = word.lstrip('-') -%}
{%- set parts = size.replace('E', 'e').split('e') -%}
{%- set places = parts[0].split('.') -%}
{%- set power = (parts | last).lstrip('+-') -%}
{%- if (size | length) + 1 < (word | length) or not digits(places[0])
    or (places[0] != '0' and places[0].startswith('0'))
    or (places | length) > 2 or not digits(places | last) or (parts | length) > 2
    or ((parts | length) == 2 and (not digits(power) or (power | length) + 1 < (parts | last | length))) -%}
{{- 'none' -}}
{%- elif (parts | length) == 2 or word == '-0' -%}
{{- 'odd' -}}
{%- elif (places | length) == 1 or (word | float | string) == word -%}
{{- 'plain' -}}
{%- elif ((places[0] ~ places[1]).lstrip('0') | length) < 16
    and (places[1] == '0' or not places[1].endswith('0') and not (size.startswith('0.0000'))) -%}
{{- 'plain' -}}
{%- else -%}
{{- 'odd' -}}
{%- endif -%}
{%- endmacro -%}
{%- macro escapes(string) -%}
{%- set rest = string.replace('\\\\', '  ').replace('\\"', '  ').replace('\\b', '  ').replace('\\f', '  ') -%}
{%- set rest = rest.replace('\\n', '  ').replace('\\r', '  ').replace('\\t', '  ') -%}
{%- set bare = rest.replace('\\/', '  ').replace('\\u', '  ') -%}
{%- set ns = namespace(kind='odd' if '\\' in rest else 'plain') -%}
{%- for piece in rest.split('\\u') -%}
{%- if not loop.first
    and ((piece[0:4] | length) < 4 or piece[0:4].strip('0123456789abcdefABCDEF') != '') -%}
{%- set ns.kind = 'none' -%}
{%- endif -%}
{%- endfor -%}
{{- 'none' if '\\' in bare or (bare | tojson | length) != (bare | length) + 2 else ns.kind -}}
{%- endmacro -%}
{%- macro reread(text) -%}
{%- set ns = namespace(ok=true, odd='', want='value', stack=[], objects=0, keys='') -%}
{%- set ns.open = false -%}
{%- set ns.string = '' -%}
{%- set ns.out = '' -%}
{%- for part in text.split('"') -%}
{%- if ns.open -%}
{%- set escaped = ((part | length) - (part.rstrip('\\') | length)) % 2 == 1 -%}
{%- set ns.string = ns.string ~ part ~ ('"' if escaped else '') -%}
{%- set ns.open = escaped -%}
{%- set ns.ok = ns.ok and not loop.last -%}
{%- else -%}
{%- set words = part.replace('\n', ' ').replace('\t', ' ').replace('\r', ' ').replace(',', ' , ') -%}
{%- set words = words.replace(':', ' : ').replace('[', ' [ ').replace(']', ' ] ') -%}
{%- set words = words.replace('{', ' { ').replace('}', ' } ').split(' ') -%}
{%- for token in ([] if loop.first else ['"']) + words -%}
{%- if token != '' and ns.ok -%}
{%- set top = ns.stack | last -%}
{%- if token == '"' and ns.want in ['value', 'value or ]', 'key', 'key or }'] -%}
{%- set kind = escapes(ns.string) -%}
{%- set ns.ok = kind != 'none' -%}
{%- set ns.odd = 'escapes other than \\" \\\\ \\b \\f \\n \\r \\t' if kind == 'odd' else ns.odd -%}
{%- set ns.out = ns.out ~ '"' ~ ns.string ~ '"' -%}
{%- if ns.want in ['key', 'key or }'] -%}
{%- set key = '\n' ~ top ~ ns.string ~ '\n' -%}
{%- set ns.odd = 'a key twice' if key in ns.keys else ns.odd -%}
{%- set ns.keys = ns.keys ~ key -%}
{%- set ns.want = ':' -%}
{%- else -%}
{%- set ns.want = ',' -%}
{%- endif -%}
{%- elif token == ':' and ns.want == ':' -%}
{%- set ns.out = ns.out ~ ': ' -%}
{%- set ns.want = 'value' -%}
{%- elif token == ',' and ns.want == ',' and ns.stack -%}
{%- set ns.out = ns.out ~ ', ' -%}
{%- set ns.want = 'value' if top == '[' else 'key' -%}
{%- elif (token == ']' and top == '[' and ns.want in [',', 'value or ]'])
    or (token == '}' and ns.stack and top != '[' and ns.want in [',', 'key or }']) -%}
{%- set ns.stack = ns.stack[:-1] -%}
{%- set ns.out = ns.out ~ token -%}
{%- set ns.want = ',' -%}
{%- elif ns.want not in ['value', 'value or ]'] -%}
{%- set ns.ok = false -%}
{%- elif token == '[' or token == '{' -%}
{%- set ns.objects = ns.objects + 1 -%}
{%- set ns.stack = ns.stack + ['[' if token == '[' else '{' ~ ns.objects ~ ' '] -%}
{%- set ns.out = ns.out ~ token -%}
{%- set ns.want = 'value or ]' if token == '[' else 'key or }' -%}
{%- else -%}
{%- set known = token in ['true', 'false', 'null', 'NaN', 'Infinity', '-Infinity'] -%}
{%- set kind = 'plain' if known else number(token) -%}
{%- set ns.ok = kind != 'none' -%}
{%- set ns.odd = 'the number ' ~ token if kind == 'odd' else ns.odd -%}
{%- set ns.out = ns.out ~ token -%}
{%- set ns.want = ',' -%}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- set ns.open = not loop.last -%}
{%- set ns.string = '' -%}
{%- endif -%}
{%- endfor -%}
{%- if text == '' -%}
{{- '{}' -}}
{%- elif not ns.ok or ns.want != ',' or ns.stack -%}
{{- text | tojson -}}
{%- elif ns.odd -%}
{{- raise_exception('JSON with ' ~ ns.odd ~ ': a template cannot spell it as Mistral does') -}}
{%- else -%}
{{- ns.out -}}
{%- endif -%}
{%- endmacro -%}
"""
