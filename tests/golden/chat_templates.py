"""Small chat templates of our own, with the constructions of published ones, and conversations for them."""

from __future__ import annotations

from typing import Any

# a default system message, tools listed in it, calls and answers of tools
TOOLS = """\
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}
{%- else %}
    {%- set system = 'You help.' %}
{%- endif %}
{{- '<|im_start|>system\\n' + system }}
{%- if tools %}
    {{- '\\n<tools>' }}
    {%- for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}
    {{- '\\n</tools>' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{ '\\n' + message.content }}{% endif %}
        {%- for call in message.tool_calls %}
            {{- '\\n<call>\\n' + call.function | tojson + '\\n</call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\\n<answer>' + message.content + '</answer>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
    {%- elif not (message.role == 'system' and loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

# thinking is kept only after the user's last message; the prompt opens it
THINKING = """\
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.index0 > ns.last %}
        {{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}
"""

# the author marks what an assistant says; the lines of the blocks themselves must not be written
MARKED = """\
{% for message in messages %}
    {% if message.role == 'assistant' %}
<|im_start|>assistant
{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}
{{ '<|im_start|>' + message.role }}
{{ message.content + '<|im_end|>' }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
TEMPLATES = {"tools": TOOLS, "thinking": THINKING, "marked": MARKED}


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


SIMPLE = [turn("user", "hé <|im_end|> ?"), turn("assistant", "yes\n")]
TWICE = [turn("system", "Short."), *SIMPLE, turn("user", "yes\n"), turn("assistant", "<think less> 你好")]
REASONED = [
    turn("user", "one"),
    turn("assistant", "1", reasoning_content="small"),
    turn("user", "two"),
    turn("assistant", "2", reasoning_content="larger"),
]
CALL = {"type": "function", "function": {"name": "sum", "arguments": {"of": [1, "<é>"]}}}
CALLED = [
    turn("user", "add"),
    turn("assistant", "", tool_calls=[CALL, CALL]),
    turn("tool", "2"),
    turn("tool", "3"),
    turn("assistant", "done"),
    turn("user", "thanks"),
    turn("assistant", "sure"),
]
TOOL = {"type": "function", "function": {"name": "sum", "description": "a < b & c"}}

# (template, messages, tools, the text of each span that is learned: written by hand)
CASES: dict[str, tuple[str, list[dict[str, Any]], list[Any] | None, list[str]]] = {
    "a default system": ("tools", SIMPLE, None, ["yes\n<|im_end|>"]),
    "two turns": ("tools", TWICE, None, ["yes\n<|im_end|>", "<think less> 你好<|im_end|>"]),
    "calls of tools": (
        "tools",
        CALLED,
        [TOOL],
        [
            '<call>\n{"name": "sum", "arguments": {"of": [1, "<é>"]}}\n</call>'
            '\n<call>\n{"name": "sum", "arguments": {"of": [1, "<é>"]}}\n</call><|im_end|>',
            "done<|im_end|>",
            "sure<|im_end|>",
        ],
    ),
    "thought about": ("thinking", REASONED[:2], None, ["small\n</think>\n\n1<|im_end|>"]),
    "thoughts of old left out": (
        "thinking",
        REASONED,
        None,
        ["1<|im_end|>", "larger\n</think>\n\n2<|im_end|>"],
    ),
    "begins like a thought": (
        "thinking",
        [turn("user", "a"), turn("assistant", "<think less"), turn("user", "b"), turn("assistant", "c")],
        None,
        ["<think less<|im_end|>", "\n</think>\n\nc<|im_end|>"],
    ),
    "marked by its author": ("marked", TWICE, None, ["yes\n<|im_end|>", "<think less> 你好<|im_end|>"]),
}
