"""Hostile chat templates: each ends soon, in bounded memory, with one error that says what happened."""

from __future__ import annotations

import concurrent.futures
import contextlib
import re
import tracemalloc

import pytest
from refusals import refused
from template_shapes import CHATML, MISTRAL_V3
from waiting import soon

from mistral_7b.errors import TokenizerError
from mistral_7b.text import template_budget
from mistral_7b.text.chat_template import ChatTemplate

USER = {"role": "user", "content": "Hi"}
NS = "{% set ns = namespace(x='a'*1000) %}"
LONG = "{% set s = 'a'*1900000 %}{% set t = 'b' ~ 'a'*900000 %}"


def render(source, messages=(USER,), **options):
    template = ChatTemplate(source, name="hostile", special={"eos_token": "</s>"}, controls=())
    return template.render(messages, **options).text


def stopped(source, field="messages"):
    with refused(TokenizerError, field=field, place="hostile"):
        render(source)


TIME = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    NS + "{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set s = range(99999)|list %}{% for i in range(99999) %}{{ s == s[:] }}{% endfor %}",
    "{% for i in range(99999) %}{{ range(99999)|list|sort|length }}{% endfor %}",
    LONG + "{% for i in range(9999) %}{{ t in s }}{% endfor %}",
    LONG + "{% if t in s %}{% endif %}" * 1200,
    "{% for i in range(99999) %}{% for j in range(99999) if j is odd %}{% endfor %}{% endfor %}",
]

TOO_MUCH = [
    "{{ 'a' * 1000000000 }}", "{{ 1000000000 * 'a' }}", "{{ [0] * 1000000000 }}", "{{ 9**999999999 }}",
    "{{ 2**8000 * 2**8000 }}", "{{ '%1000000000d' % 1 }}", "{{ '%.1000000000f' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}", "{{ '%1000000000d' | format(1) }}", "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}", "{{ '{x:1000000000}'.format_map({'x': 1}) }}",
    "{{ 'a' | center(1000000000) }}", "{{ 'a'.center(1000000000) }}", "{{ 'a'.zfill(1000000000) }}",
    "{{ 'a\t'.expandtabs(1000000000) }}", "{{ 'a' | indent(1000000000, first=true) }}",
    "{{ ('a\n'*10000) | indent(100000) }}", "{{ [1,2]|batch(1000000000, 0)|list }}",
    "{{ [1,2]|slice(1000000000)|list }}", "{{ [1,2]|batch(linecount=1000000000, fill_with=0)|list }}",
    LONG + "{% set l = [s] %}{% for i in range(99999) %}{{ l }}{% endfor %}",
    "{{ range(9999)|list|tojson(indent=-1000000000) }}" + LONG + "{% for i in range(999) %}{{ s }}{% endfor %}",
    "{{ 1 | round(1000000000, 'ceil') }}",
    "{{ (1).to_bytes(1000000000, 'big') }}", "{{ 'a'.translate({97: 'a'}) }}", "{{ ''.encode() }}",
    "{{ range(99999)|list|tojson(indent=1000000) }}", "{{ strftime_now('%1000000000d') }}",
    "{{ strftime_now('%Y'*1000000) }}", "{{ ([[1]]*99999)|sum(start=[]) }}",
    "{{ dict.fromkeys(range(99999), 'a'*100000)|tojson }}", "{{ ('f'*1900000)|int(0, 16) }}",
    "{{ ('&'*1900000)|e|e|length }}", "{{ ''.join(range(99999)|map('string')|map('center', 90000)) }}",
    LONG + "{{ s.strip(t) }}", LONG + "{{ s|trim(t) }}", LONG + "{{ s.rfind(t) }}", LONG + "{{ s.rsplit(t) }}",
    LONG + "{{ s|list|length }}", LONG + "{{ s|map('upper')|list|length }}", LONG + "{{ s.split('a')|length }}",
    LONG + "{{ ('\n'*1900000).splitlines()|length }}", LONG + "{{ s.replace('', s)|length }}",
    LONG + "{{ s|title|length }}", LONG + "{% for i in range(99999) %}{{ s[i:]|length }}{% endfor %}",
    LONG + "{% for i in range(99999) %}{{ s|upper|length }}{% endfor %}",
    *(
        NS + "{% for i in range(60) %}{% set ns.x = " + growth + " %}{% endfor %}{{ ns.x }}"
        for growth in (
            "ns.x + ns.x", "ns.x ~ ns.x", "[ns.x, ns.x]", "(ns.x, ns.x)", "{'a': ns.x, 'b': ns.x}",
            "dict(a=ns.x, b=ns.x)", "ns.x|replace('a', 'aa')", "'%s%s' % (ns.x, ns.x)", "'{0}{0}'.format(ns.x)",
            "ns.x.join([ns.x]*100)", "([ns.x]*100)|join(ns.x)", "[ns.x, ns.x]|list|string",
            "ns.x|tojson|tojson * 2",
        )
    ),
    NS + "{% for i in range(60) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    LONG + NS + "{% for i in range(999) %}{% set ns.y = namespace(p=ns.y, s=s[i:]) %}{% endfor %}",
    "{% filter upper %}{% for i in range(99999) %}" + "d" * 2000 + "{% endfor %}{% endfilter %}",
    "{% macro f() %}{{ f(varargs, varargs) }}{% endmacro %}{{ f('a') }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "{% for i in range(10**9) %}{% endfor %}",
    # Numbers of equal hashes: each key is compared with all before it.
    *(
        "{% set n = 2305843009213693951 %}{% set r = range(0, 99999*n, n) %}" + use
        for use in (
            "{{ dict.fromkeys(r)|length }}", "{{ r|unique|list|length }}", "{{ dict(r|batch(2))|length }}",
            "{{ namespace(r|batch(2)) }}", "{{ r|batch(1)|unique(attribute=0)|list|length }}",
        )
    ),
    # One long text, which a filter reads, changes and keeps for every item.
    LONG + "{{ range(300)|map(attribute='x', default=s)|sort|length }}",
    LONG + "{{ range(300)|groupby('x', default=s)|length }}",
    LONG + "{% set ns = namespace(x=s) %}{{ ([ns]*300)|sort(attribute='x')|length }}",
    LONG + "{% set ns = namespace(x=s) %}{{ ([ns]*300)|max(attribute='x') }}",
]  # fmt: skip

# Tuples that nest. When they are ten times as deep, hashing them overflows the stack and ends the process.
DEEP = (
    "{% set ns = namespace(x=0) %}{% for i in range(500) %}{% set ns.x = " + "cycler(" * 20 + "ns.x"
    + ").items" * 20 + " %}{% endfor %}{{ {ns.x: 1}|length }}"
)  # fmt: skip

FORBIDDEN = [
    "{{ ''.__class__.__mro__ }}", "{{ ''['__class__'].x }}", "{{ (''|attr('__class__')).x }}",
    "{{ raise_exception.__globals__.x }}", "{{ cycler.__init__.__globals__ }}", "{{ namespace(__class__=1) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "{{ messages.append(1) }}",
    "{{ messages[0].update({}) }}",
    "{{ '{0.__class__.x.y}'.format(1) }}", "{{ lipsum.__globals__ }}", "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}", "{{ self._TemplateReference__context.x }}", "{{ loop.x }}",
]  # fmt: skip


def shown(source):
    return re.sub(r"(.)\1{20,}", r"\1..", source)[-60:]


@pytest.mark.parametrize("source", TIME, ids=shown)
def test_a_template_that_takes_long_is_stopped(source, monkeypatch):
    monkeypatch.setattr(template_budget, "SECONDS", 0.2)
    stopped(source)  # compiled from here on: a source has a limit of its own
    soon(1, lambda: stopped(source))


def test_trying_what_a_hostile_template_can_adds_little():
    def tried():
        template = ChatTemplate(TIME[0], name="hostile", special={}, controls=())
        assert not (template.supports_tools)
        assert not (template.supports_system)
        assert not (template.turn_end())
        with refused(TokenizerError, field="messages", place="hostile"):
            template.render([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], [{"name": "x"}])

    soon(1.8, tried)


@pytest.mark.parametrize("source", TOO_MUCH, ids=shown)
def test_a_template_that_makes_much_is_stopped_before_it_does(source):
    tracemalloc.start()  # which takes more time than the template
    try:
        stopped(source)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    soon(1.8, lambda: stopped(source))
    assert peak < 300 << 20


def test_deep_tuples_cannot_be_made(monkeypatch):
    monkeypatch.setattr(template_budget, "SECONDS", 0.2)
    stopped(DEEP)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ('{' ~ ':'*60000) % () }}",
        "{% set t = (1,)*900000 %}{% set d = {} %}" + "{% set x = d[t] %}" * 1200,
    ],
    ids=shown,
)
def test_long_operations_are_counted(source):
    def ended():
        with contextlib.suppress(TokenizerError):
            render(source)

    ended()  # compiled from here on: a source has a limit of its own
    soon(1.5, ended)


@pytest.mark.parametrize("source", FORBIDDEN, ids=shown)
def test_what_python_keeps_inside_is_out_of_reach(source):
    stopped(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{a}}" * 19000, "{{" + "a+" * 40000 + "a}}", "{{" + "[" * 40000 + "]" * 40000 + "}}",
        "{% for i in a %}" * 2000 + "{% endfor %}" * 2000, "{{" + "a<" * 45000 + "a}}",
        "{{a" + "|d" * 45000 + "}}",
        "{{a" + ".a" * 40000 + "}}", "{{" + "not " * 20000 + "a}}", "{{1" + "1" * 90000 + "}}", "x" * 200_000,
        "{% call a() %}" * 1000 + "{% endcall %}" * 1000, "{{ a|urlize }}", "{% nothing %}", "{{ 'a",
        "{% autoescape true %}{% endautoescape %}", "{% for i in a %}{% for i in a %}" * 15 + "{% endfor %}" * 30,
    ],
    ids=shown,
)  # fmt: skip
def test_a_template_that_cannot_be_compiled_is_refused_soon(source):
    soon(1.8, lambda: stopped(source, field="chat_template"))


@pytest.mark.wording
def test_the_error_says_what_happened():
    with refused(TokenizerError) as caught:
        render(TIME[0])
    assert "CPU time" in caught.value.message
    with refused(TokenizerError) as caught:
        render("{{ 'a' * 1000000000 }}")
    assert "more than 2,000,0" in caught.value.message
    with refused(TokenizerError) as caught:
        render("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}")
    assert "nests more than 50 calls" in caught.value.message


def test_limits_hold_on_any_thread_and_for_each_rendering_alone():
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        hostile = [pool.submit(render, TIME[0]) for _ in range(2)]
        usual = [pool.submit(render, CHATML) for _ in range(20)]
        assert {f.result() for f in usual} == {render(CHATML)}
        for future in hostile:
            with refused(TokenizerError, field="messages"):
                future.result()
    assert render(CHATML) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("source", [CHATML, MISTRAL_V3])
def test_long_conversations_are_rendered(source):
    chat = [{"role": ("user", "assistant")[i % 2], "content": f"text {i} " * 20} for i in range(2000)]
    assert len(render(source, chat)) > 2000 * 150
    assert len(render(source, [{"role": "user", "content": "long " * 600_000}])) > 3_000_000


def test_long_strings_in_a_template_are_not_searched_in_messages():
    literals = "{{ '" + "a" * 20000 + "b' ~ '" + "a" * 20000 + "c' }}" + "{{ messages[0].content }}"
    text = soon(1, lambda: render(literals, [{"role": "user", "content": "a" * 100_000}]))
    assert text.endswith("a" * 100_000)


@pytest.mark.parametrize("controls", [["a" * 300_000], ["<" + "a" * i for i in range(1, 1500)]])
def test_control_tokens_of_absurd_lengths_are_refused(controls):
    with refused(TokenizerError, field="added_tokens", place="hostile"):
        ChatTemplate("{{ messages[0].content }}", name="hostile", special={}, controls=controls)
