"""Chat templates that would not end, or fill the memory, if nothing bounded them; each by what it does."""

from __future__ import annotations

_MANY = "{% for i in range(99999) %}"
_END = "{% endfor %}"


def _doubled(step: str, start: str = "'a'") -> str:
    """Return a template that does `step` to ns.x a hundred times."""
    return f"{{% set ns = namespace(x={start}) %}}{100 * f'{{% {step} %}}'}{{{{ ns.x|length }}}}"


def _shared(use: str) -> str:
    """Return a template that uses two lists of two references, a hundred deep."""
    start = "{% set ns = namespace(x=['a'], y=['a']) %}"
    step = "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}"
    return f"{start}{100 * step}{use}"


HOSTILE = {
    "a text times a number": "{{ 'a' * 10**10 }}",
    "a number times a text": "{{ 9999999999 * 'a' }}",
    "a list times a number": "{{ ([0] * 10**10)|length }}",
    "a power": "{{ 9**99999999 }}",
    "a product of products": _doubled("set ns.x = ns.x * ns.x", "9"),
    "loops in loops": f"{3 * _MANY}{3 * _END}",
    "loops that a test empties": "{% for a in range(99999) %}{% for b in range(99999) if false %}" + 2 * _END,
    "doubled by a tilde": _doubled("set ns.x = ns.x ~ ns.x"),
    "doubled by a sum": _doubled("set ns.x = ns.x + ns.x"),
    "a doubled list": _doubled("set ns.x = ns.x + ns.x", "[1]"),
    "doubled by a block": _doubled("set ns.x %}{{ ns.x }}{{ ns.x }}{% endset"),
    "doubled by a macro": "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}" + _doubled("set ns.x = f(ns.x)"),
    "doubled by a filter block": _doubled(
        "set ns.x %}{% filter replace('a', 'aa') %}{{ ns.x }}{% endfilter %}{% endset"
    ),
    "doubled by the filter join": _doubled("set ns.x = [ns.x, ns.x]|join"),
    "doubled by the filter's separator": _doubled("set ns.x = ['', '', '']|join(ns.x)"),
    "doubled by the method join": _doubled("set ns.x = ns.x.join(['', '', ''])"),
    "doubled by the method replace": _doubled("set ns.x = ns.x.replace('a', 'aa')"),
    "doubled by the filter replace": _doubled("set ns.x = ns.x|replace('', ns.x)"),
    "doubled by printf": _doubled("set ns.x = '%s%s' % (ns.x, ns.x)"),
    "doubled by a named printf": _doubled("set ns.x = '%(a)s%(a)s'|format(a=ns.x)"),
    "doubled by format": _doubled("set ns.x = '{0}{0}'.format(ns.x)"),
    "doubled by format_map": _doubled("set ns.x = '{a}{a}'.format_map({'a': ns.x})"),
    "doubled by an indent": _doubled("set ns.x = 'a\\na\\na'|indent(ns.x)"),
    "shared lists as text": _shared("{{ ns.x }}"),
    "shared lists as JSON": _shared("{{ ns.x|tojson }}"),
    "shared lists joined": _shared("{{ ns.x|join }}"),
    "shared lists by a tilde": _shared("{{ ns.x ~ '' }}"),
    "shared lists compared": _shared("{{ ns.x == ns.y }}"),
    "shared lists tested": _shared("{{ ns.x is equalto(ns.y) }}"),
    "shared lists looked for": _shared("{{ ns.x in [ns.y] }}"),
    "shared lists counted": _shared("{{ [ns.x].index(ns.y) }}"),
    "shared lists sorted": _shared("{{ [ns.x, ns.y]|sort|length }}"),
    "shared lists in a loop": _shared("{% for a in [ns.x, ns.y] %}{{ loop.changed(a) }}{% endfor %}"),
    "slices kept": "{% set ns = namespace(x=[]) %}{% set y = 'a' * 999999 %}"
    + _MANY
    + "{% set ns.x = [ns.x, y[1:]] %}"
    + _END,
    "literals kept": "{% set ns = namespace(x=[]) %}"
    + _MANY
    + f"{{% set ns.x = [ns.x, {9999 * '1,'}] %}}"
    + _END,
    "lists kept": "{% set ns = namespace(x=[]) %}"
    + _MANY
    + "{% set ns.x = [ns.x, range(9999)|list] %}"
    + _END,
    "long texts compared": "{% set x = 'a' * 9999999 %}{% set y = x ~ '' %}" + _MANY + "{{ x == y }}" + _END,
    "a long text searched": "{% set x = 'a' * 9999999 %}" + _MANY + "{{ 'b' in x }}" + _END,
    "branching macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(99) }}",
    "branching loops": "{% for i in [1] recursive %}{% if loop.depth < 99 %}{{ loop([1]) }}{{ loop([1]) }}"
    "{% endif %}{% endfor %}",
    "blocks in blocks": "{% block a %}" + _MANY + "{{ self.b() }}" + _END + "{% endblock %}"
    "{% block b %}" + 999 * "a" + "{% endblock %}",
    "callers in callers": "{% macro f() %}" + _MANY + "{{ caller() }}" + _END + "{% endmacro %}"
    "{% call f() %}{% call f() %}a{% endcall %}{% endcall %}",
    "macros without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "defaults of macros": f"{{% macro f(x=[{9999 * '1,'}]) %}}{{% endmacro %}}" + _MANY + "{{ f() }}" + _END,
    "a wide centre": "{{ 'a'|center(9999999999) }}",
    "a wide method": "{{ 'a'.ljust(9999999999) }}",
    "zeros": "{{ 'a'.zfill(9999999999) }}",
    "wide tabs": "{{ '\t'.expandtabs(9999999999) }}",
    "bytes": "{{ (1).to_bytes(9999999999, 'big') }}",
    "translated": "{{ ('a' * 9999).translate({97: 'a' * 9999}) }}",
    "a wide printf": "{{ '%9999999999d' % 1 }}",
    "a printf as wide as told": "{{ '%*d' % (9999999999, 1) }}",
    "a precise printf": "{{ '%.9999999999f' % 1 }}",
    "a wide format filter": "{{ '%09999999999d'|format(1) }}",
    "a wide format": "{{ '{:9999999999}'.format(1) }}",
    "a format as wide as told": "{{ '{:{}}'.format(1, 9999999999) }}",
    "a wide indent": "{{ 'a\nb'|indent(9999999999) }}",
    "a wide JSON": "{{ [[1]]|tojson(indent=9999999999) }}",
    "JSON by a long separator": "{% set x = 'a' * 99999 %}{{ range(9999)|list|tojson(separators=(x, x)) }}",
    "a deep JSON": "{% set ns = namespace(x=range(9999)|list) %}{% for i in range(800) %}"
    "{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x|tojson(indent=100) }}",
    "slices without end": "{% for x in [1]|slice(9999999999) %}{% endfor %}",
    "a filled batch": "{{ [1]|batch(9999999999, 0)|list }}",
    "precise rounding": "{{ 1.5|round(9999999999, 'ceil') }}",
    "a sum of lists": "{{ ([[1]] * 99999)|sum(start=[])|length }}",
    "filters that are asked once": _MANY + "{{ range(99999)|reject('integer')|first }}" + _END,
    "maps of maps": _MANY + "{{ range(99999)|map('string')|map('upper')|join }}" + _END,
    "starred arguments": _MANY + "{{ cycler(*range(99999)).next() }}" + _END,
    "lorem ipsum": "{{ lipsum(n=9999999) }}",
    "a long date": "{{ strftime_now('%c' * 999999) }}",
    "a long separator": "{{ range(99999)|join('a' * 99999) }}",
    "written without end": _MANY + 999 * "a" + _END,
    "kept without end": "{% set x %}" + _MANY + 999 * "a" + _END + "{% endset %}",
}
UNREADABLE = {
    "nested loops": 60 * "{% for i in [1] %}" + 60 * _END,
    "parentheses": "{{ " + 5000 * "(" + "1" + 5000 * ")" + " }}",
    "a long sum": "{{ " + "+".join(20_000 * "1") + " }}",
    "minus signs": "{{ " + 50_000 * "-" + "1 }}",
    "a long number": "{{ " + 100_000 * "9" + " }}",
    "too long": 200_001 * " ",
    "open comments": 90_000 * "{#",
    "open expressions": 90_000 * "{{",
    "attributes": "{{ a" + 90_000 * ".a" + " }}",
    "conditions": "{{ 1" + 9000 * " if 1 else 1" + " }}",
    "branches": "{% if 1 %}" + 15_000 * "{% elif 1 %}" + "{% endif %}",
    "an unknown filter": "{{ 'http://a'|urlize }}",
}
