"""Where a template comes from, and what one of a stranger cannot do."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lora.data import chat_template, template_budget
from lora.data.chat_template import CHATML, ChatTemplate
from lora.errors import DataError, FileFormatError, LoraError
from tests.data.hostile_templates import HOSTILE, UNREADABLE
from tests.golden.chat_templates import TEMPLATES

MOST_BYTES_A_STEP = 16
MESSAGES = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, CHATML),
        ({"tokenizer_config.json": {"chat_template": "own"}}, "own"),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [
                        {"name": "tool_use", "template": "t"},
                        {"name": "default", "template": "d"},
                    ]
                }
            },
            "d",
        ),
        (
            {"chat_template.json": {"chat_template": "j"}, "tokenizer_config.json": {"chat_template": "c"}},
            "j",
        ),
        ({"chat_template.jinja": "x", "tokenizer_config.json": {"chat_template": "c"}}, "x"),
    ],
)
def test_where_it_comes_from(files: dict, expected: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert ChatTemplate.load(tmp_path).source == expected


@pytest.mark.parametrize("token", ["<end>", {"content": "<end>", "lstrip": False}])
def test_special_tokens_are_known_to_it(token: object, tmp_path: Path) -> None:
    config = {"eos_token": token, "chat_template": "{{ eos_token }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate.load(tmp_path).render(MESSAGES) == "<end>"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"chat_template": 3}'),
        ("tokenizer_config.json", '{"chat_template": [{"name": "other"}, 3]}'),
        ("chat_template.jinja", "{% for %}"),
        ("chat_template.jinja", "{{ a "),
    ],
)
def test_a_broken_file_is_named(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(FileFormatError):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__code__.co_code }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(1000000) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content.nothing.more }}",
    ],
)
def test_what_a_template_of_a_stranger_may_not_do(source: str) -> None:
    with pytest.raises(DataError, match="the chat template fails"):
        ChatTemplate(source).render(MESSAGES)


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_a_template_without_end_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # what is not bounded at all is not bounded by fewer steps either, and measured memory is slow memory
    monkeypatch.setattr(template_budget, "STEPS", 10**6)
    template = ChatTemplate(source)
    with measured_memory() as peak, pytest.raises((DataError, FileFormatError)) as refusal:
        template.render(MESSAGES)
    assert str(refusal.value).startswith(("the chat template fails: ", "the chat template is refused: "))
    assert len(str(refusal.value)) < 2000
    assert peak[0] < MOST_BYTES_A_STEP * 10**6


@pytest.mark.parametrize(
    "name", ["loops in loops", "branching macros", "doubled by a tilde", "shared lists as text"]
)
def test_all_steps_of_a_row_are_soon_taken(name: str) -> None:
    with pytest.raises(FileFormatError, match="more than 50,000,000 steps"):
        ChatTemplate(HOSTILE[name]).render(MESSAGES)


@contextmanager
def measured_memory() -> Iterator[list[int]]:
    """Give a list that holds, at the end, the most bytes that were taken."""
    peak = [0]
    tracemalloc.start()
    try:
        yield peak
    finally:
        peak[0] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


@pytest.mark.parametrize("source", UNREADABLE.values(), ids=UNREADABLE)
def test_a_template_that_cannot_be_compiled_is_refused(source: str) -> None:
    with pytest.raises(FileFormatError, match=r"not a Jinja template: \S") as refusal:
        ChatTemplate(source)
    assert len(str(refusal.value)) < 2000


def test_a_template_s_own_message_is_cut_short() -> None:
    with pytest.raises(DataError) as refusal:
        ChatTemplate("{{ raise_exception('no ' * 99999) }}").render(MESSAGES)
    assert len(str(refusal.value)) < 2000


def test_a_row_of_very_many_characters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_CHARACTERS", 100)
    assert ChatTemplate(100 * "a").render(MESSAGES) == 100 * "a"
    with pytest.raises(FileFormatError, match="more than 100 characters"):
        ChatTemplate(101 * "a").render(MESSAGES)


def test_a_long_conversation_is_far_from_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = 1000 * [{"role": "user", "content": 400 * "a"}, {"role": "assistant", "content": 400 * "b"}]
    monkeypatch.setattr(template_budget, "STEPS", template_budget.STEPS // 10)
    for source in (CHATML, *TEMPLATES.values()):
        assert len(ChatTemplate(source).render(messages)) > 800_000


MARKED = "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        MARKED,
        f"{{% set x %}}{MARKED}{{% endset %}}{{{{ x|trim }}}}",
        f"{{% macro f() %}}{MARKED}{{% endmacro %}}{{{{ f()|lower }}}}",
    ],
)
def test_what_is_marked_is_told_and_no_text_is_changed(source: str) -> None:
    messages = [{"role": "user", "content": content} for content in ("a", "", "\x02é\n")]
    template = ChatTemplate(source)
    text, spans = template.render_marked(messages)
    assert template.marks_turns
    assert text == template.render(messages) == "user:a;user:;user:\x02é\n;"
    assert [text[start:end] for start, end in spans] == ["a", "\x02é\n"]
    assert not ChatTemplate(CHATML).marks_turns


@pytest.mark.parametrize(
    "source",
    [
        f"{{% set x %}}{MARKED}{{% endset %}}{{{{ x|length }}}}",
        f"{{% set x %}}{MARKED}{{% endset %}}{{{{ x[:9] }}}}",
        "{% generation %}a{% generation %}b{% endgeneration %}c{% endgeneration %}",
        "{% set x %}{% generation %}a{% endgeneration %}{% endset %}{{ x|reverse }}",
    ],
)
def test_marks_that_are_lost_are_missed(source: str) -> None:
    with pytest.raises(DataError, match="mark"):
        ChatTemplate(source).render_marked(MESSAGES)


EXPRESSIONS = [
    "1 < 2 < 3 > 2 != 4",
    "'a' in 'abc' and 'x' not in messages[0]",
    "messages[0].content[::-1] ~ [1, 'b'] ~ none ~ 1.5",
    "messages[1:][0].role + '!' * 3",
    "[1, 2] + [3] * 2",
    "2**10 % 7 // 2 - -3",
    "'%5.2f|%s' % (1.5, 'a')",
    "'%s-%d'|format('a', 3)",
    "'{:>5}{a!r}'.format(1, a='b')",
    "messages|map(attribute='role')|join(', ')",
    "messages|selectattr('role', 'equalto', 'user')|list|length",
    "messages|rejectattr('role', 'in', ['user'])|map(attribute='content')|first",
    "range(9)|select('odd')|map('string')|map('replace', '3', 'x')|list",
    "[3, 1, 2]|sort|reverse|list ~ ([3, 1]|max) ~ ([1, 2]|sum)",
    "'a b'.split()|last|upper|center(5)",
    "' a '.strip().replace('a', 'bb').join(['x', 'y'])",
    "{'b': 1, 'a': [2]}|dictsort ~ ({'b': 1}|items|list)",
    "'a\nb'|indent(2) ~ ('abc'|truncate(2, true, '')) ~ (1.256|round(2))",
    "[1, 2, 3]|batch(2, 0)|list ~ ([1, 2, 3]|slice(2)|list)",
    "nothing|default('d') ~ (nothing is defined) ~ ('a' is string) ~ (1 is lt 2)",
    "'Ab' is lower ~ ('ab' is eq 'ab') ~ ([1] is iterable)",
    "dict(a=1).items()|list ~ namespace(a=2).a ~ cycler(1, 2).next()",
    "messages[0].get('name', 'none') ~ messages[0].keys()|list",
    "'a' if messages|length > 1 else 'b'",
    "[1, 1, 2]|unique|list ~ ('a,b'.split(',')|map('title')|list)",
    "'<'|escape ~ ('x'|safe) ~ ('7'|int + 1) ~ ('1.5'|float)",
]
STATEMENTS = [
    "{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ loop.length }}{{ m }}{% endfor %}",
    "{% for i in [] %}{{ i }}{% else %}-{% endfor %}",
    "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% elif i > 2 %}{% break %}{% endif %}{{ i }}"
    "{% endfor %}",
    "{% macro f(a, b='c') %}{{ a }}{{ b }}{{ caller() if caller }}{% endmacro %}{{ f(1) }}"
    "{% call f(2, 3) %}x{% endcall %}",
    "{% set x %}{{ messages[0].content }}!{% endset %}{{ x|upper }}{% set a, b = (1, 2) %}{{ a + b }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% for i in [[1, [2]], [3]] recursive %}{{ loop(i) if i is iterable else i }};{% endfor %}",
    "{% with a = 1 %}{{ a }}{% endwith %}{% filter upper %}a{{ 1 }}{% endfilter %}",
    "{% block b %}{{ a is defined }}{% endblock %}{{ self.b() }}",
    "{% for a, b in {'x': 1}.items() %}{{ a ~ b }}{{ loop.cycle('p') }}{{ loop.changed(a) }}{% endfor %}",
]


@pytest.mark.parametrize("source", [f"{{{{ {expression} }}}}" for expression in EXPRESSIONS] + STATEMENTS)
def test_the_budget_changes_no_text(source: str) -> None:
    messages = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "dé"}]
    plain = ImmutableSandboxedEnvironment(extensions=[loopcontrols])
    assert ChatTemplate(source).render(messages) == plain.from_string(source).render(messages=messages)


PIECES = st.sampled_from(
    [
        *("{{", "}}", "{%", "%}", "for m in messages", "endfor", "if", "endif", "m.role", "generation"),
        *("endgeneration", "macro f()", "endmacro", "f()", "set x = ", "x", "range(99999)", "'a'", "**"),
        *("*", "~", "+", "|join(x)", "|tojson", "|list", ".replace('', x)", "9999999999", "|center(", ")"),
    ]
)


@given(source=st.lists(PIECES | st.text(max_size=4), max_size=16).map(" ".join))
@example("{% generation %}")
@example("{{ strftime_now('%') }}")
def test_a_hostile_template_renders_or_is_refused(source: str) -> None:
    with suppress(LoraError):
        assert len(ChatTemplate(source).render(MESSAGES)) <= chat_template.MAX_CHARACTERS


GROWING = st.sampled_from(
    [
        "ns.x ~ ns.x",
        "ns.x + ns.x",
        "ns.x * 9",
        "[ns.x, ns.y]",
        "ns.x|string",
        "ns.x|replace('a', 'aaa')",
        "ns.x|join(ns.y)",
        "ns.y.join([ns.y, ns.y])",
        "'%s%s' % (ns.x, ns.y)",
        "'{0}{0}'.format(ns.x)",
        "ns.x|indent(99)|center(999)",
        "ns.x|list",
        "ns.x|tojson(indent=9)",
        "ns.x[1:] + ns.y[:9]",
        "{'a': ns.x, ns.y|string: ns.y}",
        "f(ns.x)",
        "range(999)|map('replace', 1, ns.x)|list",
    ]
)


@given(
    steps=st.lists(st.tuples(st.sampled_from("xy"), GROWING), min_size=1, max_size=8), loops=st.integers(0, 2)
)
def test_nothing_grows_beyond_the_budget(steps: list[tuple[str, str]], loops: int) -> None:
    body = "".join(f"{{% set ns.{name} = {made} %}}" for name, made in steps)
    start = "{% macro f(a) %}{{ a }}{{ a }}{% endmacro %}{% set ns = namespace(x='a', y='a') %}"
    looped = f"{loops * '{% for i in range(99999) %}'}{body}{loops * '{% endfor %}'}"
    template = ChatTemplate(f"{start}{looped}{{{{ ns.x }}}}")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(template_budget, "STEPS", 10**5)
        with measured_memory() as peak, suppress(LoraError):
            template.render(MESSAGES)
    assert peak[0] < MOST_BYTES_A_STEP * 10**5
