#!/usr/bin/env python3
"""Compares kvarn's chat templates with jinja2, set up as Hugging Face's transformers sets it up.

    template_oracle.py TOOL TOKENIZER_CONFIG_JSON [--chats N] [--random N] [--seed S]

TOOL is the test binary template_tool. Three corpora, made here from a fixed seed: message lists for
the model's own template; small templates written out below, each for one part of the language; and
random expressions. Texts must be equal byte for byte; where jinja2 raises, kvarn must refuse.
"""
import argparse
import datetime
import json
import random
import subprocess
import sys
import warnings

try:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
except ImportError as error:
    print(f"SKIPPED: {error}; pip install -r tests/requirements.txt")
    sys.exit(77)


class Generation(Extension):
    """{% generation %} marks the assistant's text for training; rendering does not change."""
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_keep"), [], [], body).set_lineno(line)

    def _keep(self, caller):
        return caller()


def make_environment():
    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda f: datetime.datetime.now().strftime(f)
    return environment


TEXTS = ["Hello", "What is 2+2?", "", " ", "\n", "line one\nline two\n", "  indented\t", "naïve café ☕ 漢字 🙂", "<b>&amp;\"'</b>",
         "<|im_start|>system\nfake<|im_end|>", "{{ not a template }} {% raw %}", "<think>\nhm\n</think>\n\nanswer",
         "<think>open only", "closed only</think>rest", "</think>", "a</think>b</think>\n\nc", "<think></think>",
         "<tool_response>\nx\n</tool_response>", "<tool_response>", "<tool_response>x</tool_response> no", "\n\nleading",
         "trailing\n\n", "\u2028\u00a0spaces\u3000", "tab\tquote\"back\\slash", "e\u0301 é", "\x01\x1f\x7f"]
NAMES = ["get_weather", "search", "läs_fil", "f"]
VALUES = [1, -5, 0, 1.5, 1e22, 1e-7, 100000.0, 3.0, True, False, None, "Oslo", "çà \"q\" \n", "</tool_call>", [], {}, [1, "a", None],
          {"b": 1, "a": {"z": [True], "y": "ø"}}, 18446744073709551615, -9223372036854775808, "\u2028", "<&>'"]


def make_chat(rng):
    def text():
        return rng.choice(TEXTS) if rng.random() < 0.8 else rng.choice(TEXTS) + rng.choice(TEXTS)

    def arguments():
        made = {rng.choice(["city", "n", "ключ", "x y", "nested", "items", "keys"]): rng.choice(VALUES)
                for _ in range(rng.randint(0, 3))}
        return json.dumps(made, ensure_ascii=False) if rng.random() < 0.4 else made

    def call():
        function = {"name": rng.choice(NAMES), "arguments": arguments()}
        return function if rng.random() < 0.2 else {"id": "call_1", "type": "function", "function": function}

    messages = []
    if rng.random() < 0.4:
        messages.append({"role": "system", "content": text()})
    for _ in range(rng.randint(0 if messages else 1, 7)):
        role = rng.choice(["user", "user", "assistant", "assistant", "tool", "tool", "system"])
        message = {"role": role, "content": text()}
        if role == "assistant":
            if rng.random() < 0.3:
                message["reasoning_content"] = rng.choice([text(), text(), None])
            if rng.random() < 0.35:
                message["tool_calls"] = [call() for _ in range(rng.randint(0, 3))]
        if role == "tool":
            message["tool_call_id"] = "call_1"
        if rng.random() < 0.05:
            message["name"] = "someone"
        if rng.random() < 0.03:
            message["content"] = rng.choice([None, 5, ["part"]])  # what the server never passes on
        messages.append(message)
    variables = {"messages": messages}
    if rng.random() < 0.4:
        variables["tools"] = [
            {"type": "function", "function": {
                "name": rng.choice(NAMES), "description": text(), "strict": rng.random() < 0.5,
                "parameters": {"type": "object", "properties": {"city": {"type": "string", "default": rng.choice(VALUES)}},
                               "required": ["city"]}}} for _ in range(rng.randint(0, 3))]
    if rng.random() < 0.8:
        variables["add_generation_prompt"] = rng.random() < 0.8
    if rng.random() < 0.5:
        variables["enable_thinking"] = rng.choice([True, False, False, None])
    return variables


DATA = {
    "n": 7, "zero": 0, "neg": -3, "x": 2.5, "big": 1e16, "tiny": 0.00001, "yes": True, "no": False, "nil": None,
    "s": "Hello, World", "empty": "", "u": "Ünïcödé 漢字 🙂", "spaced": "  a b\tc \n", "lines": "one\ntwo\r\nthree\n",
    "quote": "it's \"q\"", "csv": "a,b,,c", "num": " 42 ", "flt": "3.75", "html": "<a href='x'>&</a>",
    "l": [3, 1, 2], "words": ["b", "A", "c", "a", "B"], "mixed": [1, "two", None, True, 2.0, [3], {"k": 4}], "none_list": [],
    "d": {"b": 1, "a": 2, "items": 3, "c d": "e"}, "nested": {"p": {"q": [{"r": "deep"}]}},
    "users": [{"name": "Ann", "age": 30, "tags": ["x"]}, {"name": "bob", "age": 25, "tags": []}, {"name": "Cid", "age": 30}],
    "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}],
}

# Each line (or block between lines of ----) is one template, rendered with DATA.
TEMPLATES = r"""
{{ n }} {{ x }} {{ big }} {{ tiny }} {{ yes }} {{ nil }} {{ missing }}|
{{ 1.0 }} {{ 1e22 }} {{ 1e16 }} {{ 123456789012345.6 }} {{ 0.1 + 0.2 }} {{ 1e-5 }} {{ 0.0001 }} {{ -0.0 }} {{ 1_000 }}
{{ l }} {{ mixed }} {{ d }} {{ (1, 2) }} {{ (1,) }} {{ () }} {{ quote }} {{ [quote, html, lines, u] }}
{{ 7 // 2 }} {{ -7 // 2 }} {{ 7 % 3 }} {{ -7 % 3 }} {{ 7 / 2 }} {{ 2 ** 10 }} {{ 2 ** -1 }} {{ -2 ** 2 }} {{ 7.5 // 2 }} {{ -7.5 % 2 }}
{{ 2 ** 3 ** 2 }} {{ 1 + 2 * 3 - 4 }} {{ (1 + 2) * 3 }} {{ "a" * 3 }} {{ 2 * [1] }} {{ "a" + "b" ~ 1 ~ none ~ 2.0 }} {{ +3 }} {{ -x }}
{{ 1 < 2 < 3 }} {{ 1 < 3 < 2 }} {{ "a" < "b" }} {{ 1 == 1.0 }} {{ "1" == 1 }} {{ true == 1 }} {{ [1] == [1] }} {{ (1,) == [1] }} {{ {"a": 1} == {"a": 1.0} }}
{{ 1 in l }} {{ 9 not in l }} {{ "ell" in s }} {{ "a" in d }} {{ "z" in missing }} {{ none in mixed }} {{ not 1 in l }}
{{ yes and n }} {{ zero or "x" }} {{ not empty }} {{ nil or missing or zero }} {{ n if yes else "no" }} {{ n if no }}| {{ "a" if no else "b" if no else "c" }}
{{ l[0] }} {{ l[-1] }} {{ l[5] }}| {{ s[0] }} {{ s[-1] }} {{ u[1] }} {{ u[-1] }} {{ d["a"] }} {{ d.b }} {{ d["c d"] }} {{ d.zzz }}| {{ nested.p.q[0].r }} {{ l.0 }}
{{ l[1:] }} {{ l[:-1] }} {{ l[::-1] }} {{ l[::2] }} {{ s[1:5] }} {{ s[::-1] }} {{ u[1:3] }} {{ u[::-2] }} {{ l[5:] }} {{ l[-2:] }} {{ l[2:0:-1] }} {{ (1,2,3)[1:] }} {{ l[none:2] }}
{{ s|upper }} {{ s|lower }} {{ u|upper }} {{ "hELLO wORLD"|capitalize }} {{ "hello world-foo (bar) it's"|title }} {{ spaced|trim }}| {{ "xxaxx"|trim("x") }}
{{ s|length }} {{ u|length }} {{ l|count }} {{ d|length }} {{ l|first }} {{ l|last }} {{ none_list|first }}| {{ s|first }} {{ s|last }} {{ missing|length }}
{{ l|join }} {{ l|join(", ") }} {{ users|join("; ", attribute="name") }} {{ words|join("-")|upper }} {{ u|join("|") }} {{ mixed|join(",") }}
{{ missing|default("d") }} {{ empty|default("d") }}| {{ empty|default("d", true) }} {{ nil|default("d") }} {{ nil|d("d", boolean=True) }} {{ missing|default }}|
{{ d|items|list }} {{ d|list }} {{ s|list }} {{ d.items()|list }}
{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}{% for k in d.keys() %}{{ k }},{% endfor %}{% for v in d.values() %}{{ v }},{% endfor %}{{ d.get("a") }} {{ d.get("q") }} {{ d.get("q", 5) }}
{{ "42"|int }} {{ num|int }} {{ "x"|int }} {{ "x"|int(-1) }} {{ flt|int }} {{ flt|float }} {{ "q"|float }} {{ x|int }} {{ yes|int }} {{ "ff"|int(base=16) }} {{ "0x1f"|int(base=16) }} {{ "1_0"|int }} {{ 3|float }} {{ "1e3"|float }} {{ nil|int }}
{{ n|string ~ "!" }} {{ nil|string }} {{ l|string|length }} {{ x|string }}
{{ s|replace("l", "L") }} {{ s|replace("l", "L", 1) }} {{ "aaa"|replace("", "-") }} {{ s|reverse }} {{ l|reverse|list }} {{ u|reverse }}
{{ l|sort }} {{ words|sort }} {{ words|sort(case_sensitive=true) }} {{ words|sort(reverse=true) }} {{ users|sort(attribute="age")|map(attribute="name")|list }} {{ words|unique|list }} {{ words|unique(true)|list }}
{{ users|map(attribute="name")|list }} {{ users|map(attribute="tags.0")|list|length }} {{ words|map("upper")|list }} {{ users|map(attribute="zip", default="-")|list }} {{ l|map("string")|join }}
{{ users|selectattr("age", "eq", 30)|map(attribute="name")|list }} {{ users|selectattr("tags")|list|length }} {{ users|rejectattr("tags", "defined")|map(attribute="name")|join }} {{ mixed|select("string")|list }} {{ mixed|reject("none")|list }} {{ l|select("odd")|list }} {{ l|select("gt", 1)|list }} {{ mixed|select|list }}
{{ 2.5|round }} {{ 3.5|round }} {{ 2.675|round(2) }} {{ 42.55|round(1, "floor") }} {{ 42.51|round(1, "ceil") }} {{ 5|round }} {{ 1234.5|round(-2) }} {{ -3|abs }} {{ -2.5|abs }} {{ -n|abs }}
{{ l|sum }} {{ users|sum(attribute="age") }} {{ l|max }} {{ l|min }} {{ words|max }} {{ users|max(attribute="age") }} {{ none_list|max }}| {{ l|sum(start=10) }}
{{ d|tojson }} {{ mixed|tojson }} {{ u|tojson }} {{ html|tojson }} {{ lines|tojson }} {{ quote|tojson }} {{ x|tojson }} {{ big|tojson }} {{ "\x00\x1f\x7f\u2028"|tojson }}
{{ nested|tojson(indent=2) }}|{{ mixed|tojson(indent=4) }}|{{ {}|tojson(indent=2) }}|{{ []|tojson(indent=1) }}|{{ d|tojson(separators=(",", ":")) }}|{{ d|tojson(sort_keys=true) }}|{{ u|tojson(ensure_ascii=true) }}
{{ n is defined }} {{ missing is defined }} {{ missing is undefined }} {{ nil is none }} {{ n is not none }} {{ s is string }} {{ n is string }} {{ d is mapping }} {{ l is mapping }} {{ l is iterable }} {{ n is iterable }} {{ s is sequence }} {{ d is sequence }} {{ n is sequence }}
{{ n is number }} {{ x is number }} {{ yes is number }} {{ yes is boolean }} {{ n is boolean }} {{ yes is true }} {{ no is false }} {{ n is true }} {{ n is integer }} {{ yes is integer }} {{ x is float }} {{ n is odd }} {{ n is even }} {{ 9 is divisibleby 3 }} {{ 9 is divisibleby(2) }}
{{ n is eq 7 }} {{ n is equalto(8) }} {{ n is ne 7 }} {{ n is lt 8 }} {{ n is gt 8 }} {{ n is ge 7 }} {{ n is in l }} {{ 3 is in l }} {{ "a" is in "abc" }} {{ "A" is upper }} {{ "a" is lower }} {{ nil is sameas none }} {{ n is sameas 7 }} {{ range is callable }} {{ missing is iterable }} {{ "upper" is filter }} {{ "odd" is test }}
{{ s.startswith("He") }} {{ s.endswith(("x", "ld")) }} {{ s.split(", ") }} {{ csv.split(",") }} {{ csv.split(",", 1) }} {{ csv.rsplit(",", 1) }} {{ spaced.split() }} {{ spaced.split(none, 1) }} {{ lines.splitlines() }} {{ lines.splitlines(true) }} {{ "".split() }} {{ "".split(",") }}
{{ spaced.strip() }}|{{ spaced.lstrip() }}|{{ spaced.rstrip() }}|{{ "xyx".strip("x") }}|{{ "xyzzy".lstrip("xy") }}|{{ "abcba".rstrip("ab") }}|{{ u.strip("Ü🙂") }}|
{{ s.upper() }} {{ s.lower() }} {{ s.title() }} {{ "they're bill's".title() }} {{ "ab cD".capitalize() }} {{ s.replace("o", "0") }} {{ s.replace("o", "0", 1) }} {{ s.find("World") }} {{ s.find("z") }} {{ s.rfind("o") }} {{ u.find("漢") }} {{ s.count("l") }} {{ ",".join(["a", "b"]) }} {{ s.index("W") }}
{{ "{} and {}".format(1, "b") }} {{ "{0}{1}{0}".format("a", "b") }} {{ "{x}{{}}".format(x=5) }} {{ "%s=%d" % ("a", 5) }} {{ "%5.2f|%-5s|%05d|%x" % (3.14159, "ab", 42, 255) }} {{ "%s" % "one" }} {{ "%%" % () }} {{ "%(k)s" % {"k": "v"} }} {{ "%s %s"|format("a", 2) }}
{{ "abc".ljust(5) }}|{{ "abc".rjust(5, "*") }}|{{ "abc".center(6) }}|{{ "abcd".center(7, "-") }}|{{ "-5".zfill(4) }}|{{ "abc".removeprefix("a") }} {{ "abc".removesuffix("bc") }} {{ "a=b=c".partition("=") }} {{ "a=b=c".rpartition("=") }} {{ "ab".partition("x") }}
{{ "1".isdigit() }} {{ "a1".isalnum() }} {{ "a1".isalpha() }} {{ " ".isspace() }} {{ "A".isupper() }} {{ "aB".islower() }} {{ "".isdigit() }} {{ s.startswith("ello", 1) }} {{ s.find("o", 5) }} {{ s.count("o", 0, 5) }} {{ s.find("", 99) }}
{% for i in l %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.previtem }}{{ loop.nextitem }} {% endfor %}
{% for i in none_list %}x{% else %}empty{% endfor %}{% for i in missing %}x{% else %}missing{% endfor %}{% for c in "añ" %}[{{ c }}]{% endfor %}{% for i in l if i > 1 %}{{ i }}{{ loop.index }}/{{ loop.length }} {% else %}none{% endfor %}
{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %} {{ range(3)|list }} {{ range(2, 8, 3)|list }} {{ range(3, 0, -1)|list }}
{% for a, b in [(1, 2), [3, 4]] %}{{ a }}-{{ b }} {% endfor %}{% for a, (b, c) in [(1, (2, 3))] %}{{ a }}{{ b }}{{ c }}{% endfor %}{% for x in l %}{% for y in l %}{{ loop.index }}{% endfor %}{{ loop.index }} {% endfor %}{{ x }}
{% for i in l %}{{ loop.cycle("odd", "even") }} {{ loop.changed(i // 2) }} {% endfor %}
{% set a = 1 %}{% set b, c = 2, 3 %}{{ a }}{{ b }}{{ c }}{% set t = 1, 2 %}{{ t }}{% set a = a + 1 %}{{ a }}{% for i in l %}{% set a = i %}{{ a }}{% endfor %}{{ a }}{% if yes %}{% set a = "if" %}{% endif %}{{ a }}
{% set ns = namespace(x=1, y="b") %}{% for i in l %}{% set ns.x = ns.x + i %}{% endfor %}{{ ns.x }}{{ ns.y }}{{ ns.z }}|{% set ns.z = [1] %}{{ ns.z + [2] }}{{ ns["x"] }}
{% set x %}block {{ n }}{% endset %}{{ x }}|{% set y | upper | trim %} up {% endset %}{{ y }}|{% filter upper %}text {{ s }}{% endfilter %}
{% macro m(a, b=2, c=a) %}[{{ a }},{{ b }},{{ c }}]{% endmacro %}{{ m(1) }}{{ m(1, 3) }}{{ m(b=5, a=6) }}{{ m() }}{{ m(1)|length }}{% macro v() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ v(1, 2, k=3) }}
{% macro outer(x) %}{% for i in x %}{{ inner(i) }}{% endfor %}{% endmacro %}{% macro inner(i) %}<{{ i }}{{ n }}>{% endmacro %}{{ outer(l) }}{% macro fact(k) %}{% if k > 1 %}{{ k * fact(k - 1)|int }}{% else %}1{% endif %}{% endmacro %}{{ fact(5) }}
{% with a = 1, b = n %}{{ a + b }}{% endwith %}{{ a }}|{% generation %}gen {{ n }}{% endgeneration %}|{% raw %}{{ raw }} {% if %}{% endraw %}|{# comment {{ x }} #}|{% if no %}a{% elif n > 5 %}b{% else %}c{% endif %}
{{ "a\nb\t\"q\" \\ \x41 \u00e9 \U0001F642 \q \101" }} {{ 'single \' "double"' }} {{ "con" "cat" 'enated' }} {{ "multi
line" }}
{{ messages[-1]["role"] }} {{ messages[0].content }} {{ (messages|last).content }} {{ messages[1:]|map(attribute="role")|join(",") }} {{ messages|selectattr("role", "equalto", "user")|list|length }} {{ messages|length - 1 }} {{ messages[::-1][0].role }}
{{ {"a": {"b": {"c": 1}}}["a"].b.c }} {{ {"x": 1}.x }} {{ [[1, 2], [3]][0][1] }} {{ {} }} {{ [] }} {{ {"k": none, "t": true, "f": 1.5, "s": 'it\'s'} }} {{ {'a': 1, }['a'] }} {{ [1, 2,] }} {{ dict(a=1, b=2) }} {{ dict({"z": 1}, y=2) }}
{{ users|dictsort if no else d|dictsort }} {{ d|dictsort(by="value") }} {{ d|dictsort(reverse=true) }} {{ html|e }} {{ html|safe }} {{ l|batch(2)|list }} {{ l|batch(2, "x")|list }} {{ lines|indent }}| {{ lines|indent(2, true) }}| {{ lines|indent(2, blank=true) }}|{{ "a\n\nb"|indent("> ") }}
{{ s|attr("upper") is callable }} {{ d|attr("a") }}| {{ (n, x)|first }} {{ -5|abs + 1 }} {{ "a" ~ 1 + 2 }} {{ n is defined and n > 5 }} {{ not n is none }} {{ n is not string and true }} {{ "x" if n is defined else "y" }} {{ n|string is string }}
{{ 1 if 0 else 2 if 0 else 3 }} {{ [1, 2]|length == 2 }} {{ "abc"[1] in "xbx" }} {{ ("a", "b") }} {{ 3, 4 }} {{ *[1] }}
{{ missing.attr }}
{{ missing + 1 }}
{{ nil.x }}| {{ n.x }}| {{ s.nope }}| {{ l.nope }}| {{ l["x"] }}|
{{ nil.x.y }}
{{ n + s }}
{{ s + n }}
{{ 1 / 0 }}
{{ 5 % 0 }}
{{ l.append(1) }}
{{ d.update({}) }}
{{ raise_exception("stop") }}
{{ s() }}
{{ missing() }}
{{ l|nofilter }}
{{ l is notest }}
{{ n|length }}
{{ n < s }}
{{ 5 in 5 }}
{{ nil[1:] }}
{% for i in n %}{% endfor %}
{% for a, b in l %}{% endfor %}
{% set s.x = 1 %}
{% if %}x{% endif %}
{% if n %}
{{ n
{{ "open }}
{{ (1 }}
{{ 1 + }}
{% endfor %}
{% for %}{% endfor %}
{% for i in l %}
{% unknown %}
{{ [1, 2 }}
{{ l|join(1, 2, 3) }}
{{ m(1) }}
{% macro q(a) %}{% endmacro %}{{ q(1, 2) }}
{% macro q(a) %}{% endmacro %}{{ q(z=2) }}
{{ missing|tojson }}
{{ range(200000)|list }}
{{ {1: 2}|length if no else 1 }} {{ "a" "b" ~ "c" }}
----
{% if yes %}
  indented
{% endif %}
    {% for i in l %}
    {{ i }}
    {% endfor %}
tail
----
  {%- if yes -%}
   tight
  {%- endif -%}
  end {{- n -}} joined   {{ n -}}

after
----
{%+ if yes %}plus{%+ endif %}
  {%+ if yes %}kept{% endif +%}

x
----
{# a comment #}
  {# indented comment #}
text {#- tight -#} more
  {{ n }}  {# trailing #}  
{{ n }}
----
a {% raw -%}  {{ x }}  {%- endraw %} b
  {% raw %}
  kept {% if %}
  {% endraw %}
c
----
{{ n }}
{{ s }}  {% if yes %}  y  {% endif %}  
	{% set q = 1 %}
	{{ q }}

----
line1
{%- for m in messages %}
    {%- if loop.first %}
        {{- "<" + m.role + ">" }}
    {%- elif not loop.last %}
        {{- m.content|trim }}
    {%- else %}
        {{- raise_exception("no") if no else "ok" }}
    {%- endif %}
{%- endfor %}
----
{%- macro render_extra(obj, skip) %}
    {%- if obj is mapping %}
        {%- for key in obj if key not in skip %}
            {%- if obj[key] is mapping or (obj[key] is sequence and obj[key] is not string) %}
                {{- '\n<' ~ key ~ '>' ~ (obj[key] | tojson | safe) ~ '</' ~ key ~ '>' }}
            {%- else %}
                {{- '\n<' ~ key ~ '>' ~ (obj[key] | string) ~ '</' ~ key ~ '>' }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{{- render_extra(d, ["a"]) }}{{ render_extra(users[0], []) }}{{ render_extra(n, []) }}
----
{%- set ns = namespace(found=false, text='') -%}
{%- for m in messages|reverse -%}
  {%- if m.role == 'user' and not ns.found -%}
    {%- set ns.found = true -%}{%- set ns.text = m.content ~ loop.index -%}
  {%- endif -%}
{%- endfor -%}
{{ ns.text }}{{ ns.found }}
----
{%- for message in messages %}
{%- if message['role'] in ['user', 'system'] and message.content is string %}
<|{{ message.role }}|>
{{ message['content'].strip() + eos|default('</s>') }}
{% elif message.role == 'assistant' %}
{% set content = message.content.split('</think>')[-1].lstrip('\n') if '</think>' in message.content else message.content %}
{{ content }}
{% endif %}
{%- endfor %}
"""


def small_templates():
    blocks = TEMPLATES.strip("\n").split("\n----\n")
    # The first block holds one template a line, but for strings that go over two.
    lines, pending = [], ""
    for line in blocks[0].split("\n"):
        pending = pending + "\n" + line if pending else line
        if pending.endswith('"multi'):
            continue
        lines.append(pending)
        pending = ""
    return lines + blocks[1:]


def random_expression(rng, depth):
    if depth <= 0 or rng.random() < 0.2:
        return rng.choice(list(DATA) + ["missing", "1", "0", "-2", "3.5", "''", "'a'", "'Ab c'", "[]", "none", "true", "false", "{'k': 1}"])
    sub = lambda: random_expression(rng, depth - 1)
    kind = rng.randrange(13)
    if kind == 0:
        return f"({sub()} {rng.choice(['+', '-', '*', '/', '//', '%', '~', '~', '~'])} {sub()})"
    if kind == 1:
        return f"({sub()} {rng.choice(['==', '!=', '<', '>=', 'in', 'not in', 'and', 'or'])} {sub()})"
    if kind == 2:
        return f"({sub()} if {sub()} else {sub()})"
    if kind == 3:
        return f"{sub()}[{rng.choice(['0', '-1', '1:', ':-1', '::-1', '::2', chr(39) + 'a' + chr(39), sub()])}]"
    if kind == 4:
        return f"{sub()}|" + rng.choice(["length", "upper", "lower", "string", "list", "first", "last", "join(',')", "trim", "title",
                                         "capitalize", "tojson", "default('d')", "default('d', true)", "int", "float", "reverse|list",
                                         "sort", "unique|list", "abs", "round(1)", "items|list", "replace('a', 'b')", "e",
                                         "map('string')|list", "select|list", "reject('none')|list", "sum", "max", "tojson(indent=2)"])
    if kind == 5:
        return f"({sub()} is {rng.choice(['', 'not '])}" + rng.choice(["defined", "none", "string", "mapping", "iterable", "sequence",
                                                                       "number", "boolean", "true", "false", "odd", "in " + sub()]) + ")"
    if kind == 6:
        return f"(not {sub()})"
    if kind == 7:
        return f"[{sub()}, {sub()}]"
    if kind == 8:
        return "{'a': %s, 'b': %s}" % (sub(), sub())
    if kind == 9:
        return f"{rng.choice(['s', 'u', 'csv', 'spaced', 'lines', 'empty'])}." + rng.choice(
            ["split()", "split(',')", "strip()", "upper()", "title()", "startswith('H')", "find('o')", "replace('l', 'L')", "splitlines()",
             "rsplit(' ', 1)", "partition(',')", "count('a')", "lower()", "capitalize()", "rstrip('\\n')", "center(20)"])
    if kind == 10:
        return f"d.{rng.choice(['a', 'get', 'zzz', 'get(%s)' % chr(34).join(['', 'b', '']), 'keys()|list', 'values()|list'])}"
    if kind == 11:
        return f"(-{sub()})"
    return f"({sub()}, {sub()})"


def random_template(rng):
    parts = []
    for _ in range(rng.randint(1, 4)):
        expression = random_expression(rng, rng.randint(1, 3))
        space = rng.choice(["", " ", "\n", "  \n\n  "])
        dash = rng.choice(["", "", "-"])
        parts.append(rng.choice([
            "{{%s %s }}" % (dash, expression),
            "{%%%s if %s %%}yes{%% else %%}no{%% endif %s%%}" % (dash, expression, dash),
            "{%%%s for i in %s %%}%s{{ i }}{{ loop.index }}{%% else %%}none{%% endfor %%}" % (dash, expression, space),
            "{%%%s set v = %s %%}{{ v }}" % (dash, expression),
            "{# %s #}" % dash]) + space)
    return rng.choice(["", " ", "\n"]).join(parts)


# What jinja2 accepts and kvarn refuses or prints otherwise on purpose: numbers beyond 64 bits, keys that are no
# strings, what prints as an address, views and ranges (lists here), the type of escaped text, and slices of
# literals, which jinja2's optimiser turns into undefined.
def is_known_difference(template, theirs, error):
    return ("64 bits" in error or "key must be a string" in error or "cannot be printed" in error
            or "cannot be sliced" in error or "Markup(" in theirs
            or any(view in theirs for view in ("dict_items(", "dict_keys(", "dict_values(", "range("))
            or "<generator" in theirs or "<built-in" in theirs or "<bound method" in theirs)


def render_all(environment, requests):
    results = []
    for request in requests:
        try:
            template = environment.from_string(request["template"])
            results.append(("text", template.render(**request["variables"])))
        except Exception as error:  # whatever jinja2 or Python raises is a refusal
            results.append(("error", f"{type(error).__name__}: {error}"))
    return results


def compare(what, requests, ours, theirs):
    wrong, errors, known = 0, 0, 0
    for request, mine, (kind, text) in zip(requests, ours, theirs):
        errors += kind == "error"
        if kind == "text" and mine.get("text") == text:
            continue
        if kind == "error" and "error" in mine:
            if not mine["error"].startswith("chat template"):
                print(f"  error does not say where: {mine['error']}")
                wrong += 1
            continue
        if kind == "text" and is_known_difference(request["template"], text, mine.get("error", "")):
            known += 1
            continue
        wrong += 1
        if wrong <= 8:
            print(f"  template  {request['template'][:700]!r}\n  kvarn     {json.dumps(mine, ensure_ascii=True)[:700]}\n"
                  f"  jinja2    {kind} {json.dumps(text)[:700]}")
    print(f"{what}: {len(requests)} compared ({errors} refused by jinja2, {known} documented exceptions), {wrong} differences")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tool")
    parser.add_argument("config")
    parser.add_argument("--chats", type=int, default=600)
    parser.add_argument("--random", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # of Python about odd expressions
    rng = random.Random(args.seed)
    environment = make_environment()
    with open(args.config, encoding="utf-8") as file:
        source = json.load(file)["chat_template"]

    def run(what, requests):
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in requests)
        tool = subprocess.run([args.tool], input=text.encode(), stdout=subprocess.PIPE, timeout=200)
        if tool.returncode != 0:
            sys.exit(f"{args.tool} exited with {tool.returncode}")
        ours = [json.loads(line) for line in tool.stdout.split(b"\n") if line]
        if len(ours) != len(requests):
            sys.exit(f"{len(requests)} requests, {len(ours)} answers")
        return compare(what, requests, ours, render_all(environment, requests))

    failures = run("the model's template", [{"template": source, "variables": make_chat(rng)} for _ in range(args.chats)])
    small = small_templates()
    failures += run("small templates", [{"template": t, "variables": DATA} for t in small])
    # One template a line also checks each expression on its own, so that one refusal hides nothing.
    singles = [part + "}}" for t in small if "{%" not in t and "{#" not in t for part in t.split("}}") if "{{" in part]
    failures += run("single expressions", [{"template": t, "variables": DATA} for t in singles])
    failures += run("random templates", [{"template": random_template(rng), "variables": DATA} for _ in range(args.random)])
    print(f"jinja2 {jinja2.__version__}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
