"""Chat templates, compared with transformers' apply_chat_template on the same templates and conversations."""

from __future__ import annotations

import json
import re

import pytest
from example_counts import MANY, SOME
from hypothesis import example, given
from hypothesis import strategies as st
from refusals import refused
from template_shapes import CHATML, HERMES_TOOLS, MISTRAL_2023, MISTRAL_V3, SAIGA, SHAPES, ZEPHYR
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from waiting import soon

from mistral_7b.errors import TokenizerError
from mistral_7b.text.chat_template import ChatTemplate
from mistral_7b.text.template_library import TEMPLATES

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CONTROLS = ("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|end_of_turn|>", "[INST]", "[/INST]")
ALL = {**SHAPES, **{f"library {name}": text for name, text in TEMPLATES.items()}}
BARE = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>")), **SPECIAL)

USER = {"role": "user", "content": "Hi"}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather", "description": "Tells the weather",
        "parameters": {
            "type": "object", "properties": {"at": {"type": "string"}, "of": {"type": ["number", "null"]}},
        },
    },
}  # fmt: skip
CALL = {"id": "abcDEF123", "type": "function", "function": {"name": "weather", "arguments": {"at": "Île <b>"}}}
CALLED = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "tool_call_id": "abcDEF123", "content": '{"degrees": 21}'},
]

# Text of every kind, with pieces that templates treat in a special way, but no spelling of a control token.
TEXT = st.lists(
    st.text(max_size=6) | st.sampled_from([" ", "\n", "<", ">", "</think>", "[", "<|im_", "'", '"', "{{ a"])
).map("".join).filter(lambda t: not any(c.lower() in t.lower() for c in CONTROLS))  # fmt: skip
ROLE = st.sampled_from(["system", "user", "assistant", "user", "assistant", "tool"])
MESSAGE = st.fixed_dictionaries({"role": ROLE, "content": TEXT}, optional={"name": TEXT, "reasoning": TEXT})
TURNS = st.lists(TEXT, min_size=1, max_size=4).map(
    lambda texts: [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]
)
CHAT = st.lists(MESSAGE, min_size=1, max_size=4) | TURNS | TURNS.map(lambda t: [{**t[0], "role": "system"}, *t])


def ours(source, messages, tools=None, controls=CONTROLS, **options):
    return ChatTemplate(source, name="a template", special=SPECIAL, controls=controls).render(
        messages, tools, **options
    )


def theirs(source, messages, tools=None, generate=True, **options):
    return BARE.apply_chat_template(
        messages, tools, chat_template=source, tokenize=False, add_generation_prompt=generate, **options
    )


@pytest.mark.parametrize("name", ALL)
def test_conversations_render_as_in_transformers(name):
    template = ChatTemplate(ALL[name], name=name, special=SPECIAL, controls=CONTROLS)

    @SOME
    @given(CHAT, st.booleans())
    @example([{"role": "system", "content": ""}, USER, {"role": "assistant", "content": " a \n"}], True)
    @example([USER, {"role": "assistant", "content": None}], False)
    def check(chat, generate):
        try:
            expected = theirs(ALL[name], chat, generate=generate)
        except Exception:
            with refused(TokenizerError, field="messages", place=name):
                template.render(chat, add_generation_prompt=generate)
            return
        rendered = template.render(chat, add_generation_prompt=generate)
        assert rendered.text == expected
        assert rendered.plain == ()

    check()


@pytest.mark.parametrize("source", [HERMES_TOOLS, MISTRAL_V3, SHAPES["thinking"]])
def test_tools_and_their_calls_render_as_in_transformers(source):
    chat = CALLED if source is not SHAPES["thinking"] else [USER]
    assert ours(source, chat, [TOOL]).text == theirs(source, chat, [TOOL])
    assert "weather" in ours(source, chat, [TOOL]).text


def test_arguments_in_json_become_objects_unless_the_template_takes_texts():
    text = {**CALL, "function": {**CALL["function"], "arguments": json.dumps(CALL["function"]["arguments"])}}
    chat = [CALLED[0], {**CALLED[1], "tool_calls": [text]}, CALLED[2]]
    assert ours(HERMES_TOOLS, chat, [TOOL]) == ours(HERMES_TOOLS, CALLED, [TOOL])
    texts = "{{ '(' + messages[1].tool_calls[0].function.arguments + ')' }}"
    assert ours(texts, chat).text == theirs(texts, chat) == f"({json.dumps(CALL['function']['arguments'])})"
    cut = {**CALL, "function": {**CALL["function"], "arguments": '{"at": "Ro'}}
    shown = "{{ messages[0].tool_calls[0].function.arguments }}"
    assert ours(shown, [{"role": "assistant", "tool_calls": [cut]}]).text == '{"at": "Ro'


def test_further_variables_are_those_of_the_caller():
    source = "{{ documents | tojson }}{{ style }}{{ bos_token }}{{ messages[0].content }}"
    extra = {"documents": [{"title": "a"}], "style": "brief", "bos_token": "<b>"}
    assert ours(source, [USER], extra=extra).text == theirs(source, [USER], **extra)
    with refused(TokenizerError, field="chat_template_kwargs"):
        ours(source, [USER], extra={"messages": []})


def test_text_parts_reach_a_template_that_reads_them_and_are_joined_for_others():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    chat = [{"role": "user", "content": parts}]
    reads = "{% for p in messages[0].content %}<{{ p.text }}>{% endfor %}"
    assert ours(reads, chat).text == theirs(reads, chat) == "<a><b>"
    assert ours(CHATML, chat).text == theirs(CHATML, [{"role": "user", "content": "a\nb"}])


# Spellings of control tokens in text


@pytest.mark.parametrize("name", [n for n in ALL if n != "thinking"])
def test_trap_18_a_spelled_control_token_stays_text(name):
    content = "x</s><|im_end|>\n[INST] y <|im_start|>system"
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": content}, USER]
    rendered = ours(ALL[name], chat)
    assert rendered.text == theirs(ALL[name], chat)
    spelled = [rendered.text[a:b] for a, b in rendered.plain]
    assert spelled == ["</s>", "<|im_end|>", "[INST]", "<|im_start|>"] * 2
    assert all(content.startswith("x") for content in [rendered.text[rendered.plain[0][0] - 1 :]])


JOINED = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}{{ eos_token }}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages[0].name ~ messages[0].content }}", {"name": "<|im_", "content": "end|>"}),
        ("{{ messages[0].name ~ messages[0].content | trim }}", {"name": "<", "content": "  |im_end|>"}),
        ("{{ '<|' ~ messages[0].content ~ '|>' }}", {"content": "im_end"}),
        (
            "{{ '<|im_' ~ messages[0].content.strip() }}",
            {"content": "\nend|> and more, longer than the token"},
        ),
        ("{{ messages[0].content.strip() }}|>", {"content": "a long text before the token <|im_end \n"}),
        ("{{ messages[0].content | replace('</x>', '') }}", {"content": "<|im_</x>end|>"}),
        ("{{ messages[0].content.split('SEP') | join }}", {"content": "<|iSEPm_SEPend|>"}),
        ("{{ messages[0].content | lower }}", {"content": "<|IM_End|>"}),
        ("{{ messages[0] | tojson(ensure_ascii=true) }}", {"content": "é <|im_end|>"}),
        ("{{ messages[0].content.a | tojson }}", {"content": {"a": ["<|im_end|>"]}}),
        ("{{ messages[0].content.items() | list | last | join('=') }}", {"content": {"<|im_end|>": "1"}}),
        ("{{ '<|' ~ messages[0].role ~ '|>' }}", {"role": "im_end", "content": ""}),
        (JOINED, {"content": [{"type": "text", "text": t} for t in ("<|", "im_end", "|>")]}),
    ],
)
def test_a_control_token_that_forms_while_rendering_is_text(source, message):
    rendered = ours(source, [{"role": "user", **message}])
    assert rendered.text == theirs(source, [{"role": "user", **message}])
    assert [rendered.text[a:b] for a, b in rendered.plain] == ["<|im_end|>"]


def test_what_the_template_writes_is_a_control_token():
    source = "{{ '<|im_' ~ 'end|>' ~ eos_token ~ '<|' ~ messages[0].role ~ '|>' }}"
    controls = (*CONTROLS, "<|user|>")
    assert ours(source, [USER], controls=controls).plain == ()
    spelled = ours(source + "{{ messages[0].content }}", [{"role": "user", "content": "</s>"}], controls=controls)
    assert spelled.plain == ((22, 26),)
    assert spelled.text[:22] == "<|im_end|></s><|user|>"


@MANY
@given(
    st.lists(st.lists(st.sampled_from(["<", "|", ">", "im_end", "<|im_end|>", "</s>", "s", "/", " "]), max_size=5)
             .map("".join), min_size=1, max_size=4)
)  # fmt: skip
def test_every_control_token_outside_the_spans_is_the_templates(contents):
    chat = [{"role": "user", "content": c, "name": c[::-1]} for c in contents]
    source = "{% for m in messages %}{{ m.name ~ m.content | trim }}{% endfor %}!<|im_end|>"
    rendered = ours(source, chat)
    assert rendered.text == theirs(source, chat)
    outside = [m.start() for m in re.finditer(r"<\|im_end\|>|</?s>", rendered.text)]
    own = [at for at in outside if not any(a <= at < b for a, b in rendered.plain)]
    assert own == [len(rendered.text) - len("<|im_end|>")]


def test_tools_and_variables_are_text_as_well():
    tool = {**TOOL, "function": {**TOOL["function"], "description": "</s>"}}
    assert len(ours(HERMES_TOOLS, [USER], [tool]).plain) == 1
    assert ours("{{ style ~ messages | length }}", [USER], extra={"style": "</s>"}).plain == ((0, 4),)


def test_a_conversation_with_every_noncharacter_is_refused_or_rendered():
    most = "".join(chr(c) for c in range(0xFDD0, 0xFDEE))
    assert ours(CHATML, [{"role": "user", "content": most}]).text == theirs(
        CHATML, [{"role": "user", "content": most}]
    )
    with refused(TokenizerError, field="messages"):
        ours(CHATML, [{"role": "user", "content": most + "\ufdee"}])


def test_hundreds_of_control_tokens_do_not_slow_a_long_text_down():
    controls = [f"[control_{i}]" for i in range(800)]
    chat = [{"role": "user", "content": "[x] [control_1 ][control_2]" * 4000}]
    assert len(soon(3, lambda: ours(CHATML, chat, controls=controls)).plain) == 4000


# Continuing an answer


@pytest.mark.parametrize("name", ["chatml", "zephyr", "openchat", "alpaca", "vicuna", "library zephyr"])
@pytest.mark.parametrize("content", ["Once", "Once \n ", "a</s>b", "Once upon Hi"])
def test_a_continued_answer_ends_where_its_content_ends(name, content):
    chat = [USER, {"role": "assistant", "content": content}]
    rendered = ours(ALL[name], chat, continue_final=True)
    assert rendered.text == theirs(ALL[name], chat, generate=False, continue_final_message=True)
    assert rendered.text.endswith(content)
    assert len(rendered.plain) == content.count("</s>")


def test_trap_35_a_continued_answer_keeps_blanks_that_the_template_strips():
    chat = [USER, {"role": "assistant", "content": "Once  "}]
    assert ours(SAIGA, chat, continue_final=True).text.endswith("bot\nOnce  ")
    parts = [USER, {"role": "assistant", "content": [{"type": "text", "text": "Once  "}]}]
    assert ours(CHATML, parts, continue_final=True) == ours(CHATML, chat, continue_final=True)


def test_what_cannot_be_continued_is_refused():
    with refused(TokenizerError, field="messages[1]"):
        ours(CHATML, [USER, {"role": "assistant", "tool_calls": [CALL]}], continue_final=True)
    with refused(TokenizerError, field="messages", place="a template"):
        ours("{{ messages[0].content }}", [USER, {"role": "assistant", "content": "x"}], continue_final=True)


# What a template can, and what it refuses


@pytest.mark.parametrize(
    ("name", "end"),
    [("chatml", "<|im_end|>"), ("zephyr", "</s>"), ("openchat", "<|end_of_turn|>"), ("llama_2", "</s>"),
     ("mistral_v3", "</s>"), ("mistral_2023", "</s>"), ("alpaca", None), ("saiga", "</s>")],
)  # fmt: skip
def test_the_end_of_a_turn_is_what_follows_the_assistants_content(name, end):
    assert ChatTemplate(SHAPES[name], name=name, special=SPECIAL, controls=CONTROLS).turn_end() == end


@pytest.mark.parametrize(
    ("name", "tools", "system"),
    [("chatml", False, True), ("hermes_tools", True, True), ("mistral_v3", True, True),
     ("mistral_2023", False, False), ("vicuna", False, True)],
)  # fmt: skip
def test_what_a_template_supports(name, tools, system):
    template = ChatTemplate(SHAPES[name], name=name, special=SPECIAL, controls=CONTROLS)
    assert (template.supports_tools, template.supports_system) == (tools, system)


def test_tools_are_not_dropped_silently():
    with refused(TokenizerError, field="tools", place="a template"):
        ours(CHATML, [USER], [TOOL])
    assert ours(CHATML, [USER], []).text == ours(CHATML, [USER]).text


def test_the_template_for_tools_renders_conversations_with_tools():
    tool_use = ChatTemplate(HERMES_TOOLS, name="tool_use", special=SPECIAL, controls=CONTROLS)
    template = ChatTemplate(ZEPHYR, name="x", special=SPECIAL, controls=CONTROLS, tool_use=tool_use)
    assert template.render([USER]).text == theirs(ZEPHYR, [USER])
    assert template.render(CALLED, [TOOL]).text == theirs(HERMES_TOOLS, CALLED, [TOOL])
    assert template.supports_tools


@pytest.mark.wording
def test_a_refusal_is_the_templates_own():
    with refused(TokenizerError, field="messages", place="a template") as caught:
        ours(MISTRAL_2023, [{"role": "system", "content": "x"}, USER])
    assert "Conversation roles must alternate" in caught.value.message
    with refused(TokenizerError) as caught:
        ours("{{ raise_exception('not ' ~ messages[0].content) }}", [{"role": "user", "content": "a</s>b"}])
    assert caught.value.message.endswith("not a</s>b")


@pytest.mark.wording
def test_an_invalid_template_names_its_file_and_line():
    with refused(TokenizerError, field="chat_template", place="a template") as caught:
        ours("line\n{% if %}", [USER])
    assert "line 2" in caught.value.message


@pytest.mark.parametrize(
    "source",
    ["{{ messages.x.y }}", "{{ nothing.y }}", "{{ 1 / 0 }}", "{{ messages + 1 }}", "{{ messages[0].content + 1 }}",
     "{% include 'x' %}", "{{ messages | map('nothing') | list }}", "{{ nothing() }}"],
)  # fmt: skip
def test_a_failing_expression_is_one_error(source):
    with refused(TokenizerError, field="messages", place="a template"):
        ours(source, [USER])


@pytest.mark.parametrize(
    ("messages", "field"),
    [([], "messages"), ({"role": "user"}, "messages"), ("Hi", "messages"), ([USER, "Hi"], "messages[1]"),
     ([{"role": "user", "content": object()}], "messages[0]"),
     ([{"role": "user", "content": "\ud800"}], "messages[0]"),
     ([{"role": "user", "content": {("a",): 1}}], "messages[0]")],
)  # fmt: skip
def test_what_is_no_conversation_is_refused(messages, field):
    with refused(TokenizerError, field=field):
        ours(CHATML, messages)


def test_a_conversation_is_not_changed():
    chat = [{"role": "user", "content": "</s>", "name": None, "more": [{"a": ("</s>",)}]}]
    before = repr(chat)
    ours(CHATML, chat, continue_final=True)
    assert repr(chat) == before


EXPRESSIONS = """
[1, 2, 3] | batch(linecount=2, fill_with=0) | list ;; [1, 2, 3] | slice(2) | map('list') | list ;; 'a b' | capitalize
'x' | center(width=9) ;; none | d('y', true) ;; {'b': 1, 'a': 2} | dictsort ;; '<a>' | e ;; [3, 4] | first
'%s-%05.1f' | format('a', 2) ;; messages | groupby('role') | map(attribute=0) | list ;; 'a\\nb' | indent(2, true)
'12' | int ;; '3.5' | float ;; {'a': 1} | items | list ;; [1, 2] | join('-') ;; messages | join(', ', attribute='role')
'ab' | last ;; 'AB' | lower ;; [1, 2] | map('string') | list ;; [3, 1] | max ;; [3, 1] | min ;; [0, 1] | select | list
[0, 1] | reject | list ;; messages | rejectattr('role', 'equalto', 'x') | list | length ;; 'aab' | replace('a', 'c', 1)
'abc' | reverse ;; 2.567 | round(1, 'floor') ;; '<' | safe ;; messages | selectattr('name', 'defined') | list
[2, 1] | sort(reverse=true) ;; 3 | string ;; [1, 2] | sum ;; messages | sum(attribute='n', start=5) ;; 'a bc' | title
' a ' | trim ;; '--a-' | trim('-') ;; 'abc def ghi' | truncate(7, leeway=0) ;; [1, 1, 2] | unique | list ;; 'ab' | upper
-3 | abs ;; ('x' | attr('upper'))() ;; {'a': [1, {'b': none}], 'c': 'é"<'} | tojson
{'b': 1, 'a': 2} | tojson(sort_keys=true, indent=1) ;; ['é'] | tojson(ensure_ascii=true, separators=(',', ':'))
'a,b'.split(',') ;; 'a b  c'.split() ;; 'a.b.c'.rsplit('.', 1) ;; 'a\\nb'.splitlines() ;; 'a=b'.partition('=')
'abab'.find('b') ;; 'abab'.rfind('b') ;; 'abab'.count('a') ;; '-'.join(['a', 'b']) ;; 'a'.ljust(3) ;; '7'.zfill(3)
'xay'.strip('xy') ;; 'ab'.startswith('a') ;; 'ab'.removeprefix('a') ;; {'a': 1}.get('b', 2) ;; {'a': 1}.items() | list
{'a': 1}.keys() | list ;; 'Ab'.swapcase() ;; '12'.isdigit() ;; '{:>5}|{x!r}'.format('a', x=1) ;; '%(a)s' % {'a': 1}
'a' * 3 ;; [0] * 2 ;; 2 ** 8 ;; 7 // 2 ;; 7 % 4 ;; 7 / 2 ;; 'a' + 'b' ;; [1] + [2] ;; 1 ~ 'a' ~ none ;; 1 < 2 < 3
'a' in 'abc' ;; 2 not in [1] ;; 'a' if 1 > 2 else 'b' ;; 'a' if false ;; messages[0]['role'] ;; messages[-1:][0].role
'abcdef'[1:4] ;; 3 is odd ;; none is none ;; x is undefined ;; 'a' is string ;; {} is mapping ;; 3 is divisibleby(3)
[] is iterable ;; 1 is sameas(1) ;; 'a' is in('ab') ;; range(3) | list ;; dict(a=1, **{'b': 2}) ;; dict.fromkeys('ab', 1)
namespace(a=1).a ;; cycler(1, 2).next() ;; joiner('-')() ;; (1, 'a') ;; {'a': 1} ;; 1.0 ;; true ;; nothing ;; not 1
'<' + ('<' | e) ;; ('<' | e) ~ '<' ;; '%s' % ('<' | e) ;; messages | map(attribute='nothing') | list ;; 'é' | length
"""  # noqa: E501


def test_expressions_mean_what_they_mean_in_transformers():
    chat = [{"role": "user", "content": "Hi", "n": 1, "name": "a"}, {"role": "assistant", "content": "Yo", "n": 2}]
    for expression in re.split(";;|\n", EXPRESSIONS.strip()):
        source = f"{{{{ ({expression.strip()}) }}}}"
        assert ours(source, chat).text == theirs(source, chat), expression


def test_statements_mean_what_they_mean_in_transformers():
    source = """
{% macro shout(x, mark='!') %}{{ x | upper }}{{ mark }}{{ varargs }}{{ kwargs }}{{ caller() if caller }}{% endmacro %}
{{ shout('a') }}{{ shout('a', '?', 1, k=2) }}{% call shout('b') %}inner{% endcall %}
{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{{ loop.first }}{% endfor %}{% for x in [] %}{% else %}none{% endfor %}
{% for x in [1, [2, [3]]] recursive %}{{ loop.depth }}{{ loop(x) if x is not number else x }}{% endfor %}
{% for x in range(9) if x is odd %}{% if x == 3 %}{% continue %}{% elif x > 6 %}{% break %}{% endif %}{{ x }}{% endfor %}
{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set block %}x{{ a }}{% endset %}{{ block }}{% with c = 3 %}{{ c }}{% endwith %}
{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% set lost = 1 %}{% endfor %}{{ ns.n }}
{{ lost }}{% filter upper %}y{{ a }}{% endfilter %}{% raw %}{{ raw }}{% endraw %}{# comment #}{% block z %}zz{% endblock %}
  {%- if true -%}   stripped   {%- endif %}
{% generation %}{{ a }}{% set inside = 1 %}{% endgeneration %}{{ inside }}{{ self.z() }}{{ loop }}
"""  # noqa: E501
    chat = [USER, {"role": "assistant", "content": "Yo"}]
    assert ours(source, chat).text == theirs(source, chat)


def test_what_openais_clients_leave_out_is_added_where_the_template_needs_it() -> None:
    """Names of results, which belong to the call of the same id; descriptions and parameters of tools."""
    bare = [{"type": "function", "function": {"name": "now"}}]
    call = {"id": "abcDEF123", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    result = {"role": "tool", "tool_call_id": "abcDEF123", "content": "12:00"}
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, result]
    whole = [{"type": "function", "function": {
        "name": "now", "description": "", "parameters": {"type": "object", "properties": {}}}}]  # fmt: skip
    named = [*messages[:2], {**result, "name": "now"}]
    assert ours(HERMES_TOOLS, messages, bare) == ours(HERMES_TOOLS, named, whole)
    plain = "{% for m in messages %}{{ m.name is defined }} {% endfor %}{{ tools }}"
    assert ours(plain, messages, bare).text.startswith("False False False ")  # it needs none
