// The template language where jinja2 is not at hand: one case for each part, with what jinja2 3.1.6
// prints. The oracle (tools/oracles/template_oracle.py) holds many more against jinja2 itself.
#include <random>
#include <string>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "server/chat_template.h"

namespace kvarn {
namespace {

using nlohmann::ordered_json;

std::string render(const std::string& source) {
  static const ordered_json variables = ordered_json::parse(R"({
    "n": 7, "x": 2.5, "s": "Hello", "u": "é漢🙂", "l": [3, 1, 2], "d": {"b": 1, "a": 2}, "nil": null,
    "users": [{"name": "Ann", "age": 30}, {"name": "bob", "age": 25}]})");
  const auto compiled = ChatTemplate::compile(source);
  if (!compiled.is_ok()) return compiled.status().message();
  const auto text = (*compiled)->render(variables);
  return text.is_ok() ? *text : text.status().message();
}

struct Case {
  const char* source;
  const char* expected;
};

class JinjaTest : public testing::TestWithParam<Case> {};
TEST_P(JinjaTest, PrintsWhatJinja2Prints) {
  EXPECT_EQ(render(GetParam().source), GetParam().expected) << GetParam().source;
}

INSTANTIATE_TEST_SUITE_P(
    Printing, JinjaTest,
    testing::Values(Case{"{{ true }} {{ nil }} {{ missing }}|", "True None |"},
                    Case{"{{ 1.0 }} {{ 1e16 }} {{ 1e-5 }} {{ 0.1 + 0.2 }} {{ 100000.0 }}",
                         "1.0 1e+16 1e-05 0.30000000000000004 100000.0"},
                    Case{"{{ [1, 'a', none, true, 2.0] }}", "[1, 'a', None, True, 2.0]"},
                    Case{"{{ {'k': \"it's\"} }} {{ (1,) }}", "{'k': \"it's\"} (1,)"},
                    Case{"{{ {'a': [1, 2], 'é': none}|tojson }}", "{\"a\": [1, 2], \"é\": null}"},
                    Case{"{{ [1, {}]|tojson(indent=2) }}", "[\n  1,\n  {}\n]"},
                    Case{"{{ '<&>\\n\\u0001'|tojson }}", "\"<&>\\n\\u0001\""}));

INSTANTIATE_TEST_SUITE_P(
    Operators, JinjaTest,
    testing::Values(
        Case{"{{ -7 // 2 }} {{ -7 % 3 }} {{ 7 / 2 }} {{ 2 ** 3 ** 2 }} {{ -2 ** 2 }}",
             "-4 2 3.5 64 4"},
        Case{"{{ 'a' ~ 1 ~ none }} {{ 'ab' * 2 }} {{ [1] + [2] }}", "a1None abab [1, 2]"},
        Case{"{{ 1 < 2 < 3 }} {{ 1 in l }} {{ 'z' not in d }} {{ 'el' in s }}",
             "True True True True"},
        Case{"{{ nil or 'x' }} {{ n and 'y' }} {{ not n }} {{ 1 if nil }}|", "x y False |"},
        Case{"{{ l[-1] }} {{ l[::-1] }} {{ u[1] }} {{ s[1:3] }} {{ l[9] }}|",
             "2 [2, 1, 3] 漢 el |"}));

INSTANTIATE_TEST_SUITE_P(
    FiltersTestsMethods, JinjaTest,
    testing::Values(
        Case{"{{ u|length }} {{ l|sort }} {{ l|join('-') }} {{ d|items|list }}",
             "3 [1, 2, 3] 3-1-2 [('b', 1), ('a', 2)]"},
        Case{"{{ users|map(attribute='name')|join(',') }}", "Ann,bob"},
        Case{"{{ users|selectattr('age', 'gt', 26)|list|length }}", "1"},
        Case{"{{ missing|default('d') }} {{ ''|default('e', true) }}", "d e"},
        Case{"{{ 2.5|round }} {{ '42'|int }} {{ 'x'|int(-1) }} {{ -3|abs }}", "2.0 42 -1 3"},
        Case{"{{ s is string }} {{ d is mapping }} {{ l is sequence }} {{ n is odd }} "
             "{{ x is defined }} {{ nil is none }} {{ n is not divisibleby 2 }}",
             "True True True True True True True"},
        Case{"{{ ' a b '.strip().split() }} {{ s.startswith(('x', 'H')) }} "
             "{{ 'a,b'.split(',')[-1] }} {{ s.find('l') }}",
             "['a', 'b'] True b 2"},
        Case{"{{ d.items()|list }} {{ d.get('q', 5) }} {{ d['a'] }}", "[('b', 1), ('a', 2)] 5 2"},
        Case{"{{ '{}-{x}'.format(1, x=2) }} {{ '%s=%05.1f' % ('a', 2.25) }}", "1-2 a=002.2"}));

INSTANTIATE_TEST_SUITE_P(
    Statements, JinjaTest,
    testing::Values(
        Case{"{% for i in l if i > 1 %}{{ loop.index }}:{{ i }}{{ ',' if not loop.last }}"
             "{% else %}none{% endfor %}",
             "1:3,2:2"},
        Case{"{% for k, v in d.items() %}{{ k }}{{ v }}{% endfor %}", "b1a2"},
        Case{"{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}"
             "{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
             "02"},
        Case{"{% set a = 1 %}{% for i in l %}{% set a = i %}{% endfor %}{{ a }}", "1"},
        Case{"{% set ns = namespace(t=0) %}{% for i in l %}{% set ns.t = ns.t + i %}"
             "{% endfor %}{{ ns.t }}",
             "6"},
        Case{"{% macro m(a, b=a) %}[{{ a }}{{ b }}]{% endmacro %}{{ m(1) }}{{ m(1, b=2) }}",
             "[11][12]"},
        Case{"{% set x %}in {{ n }}{% endset %}{{ x|upper }}", "IN 7"},
        Case{"{% generation %}g{% endgeneration %}{% raw %}{{ r }}{% endraw %}{# c #}",
             "g{{ r }}"}));

INSTANTIATE_TEST_SUITE_P(WhiteSpace, JinjaTest,
                         testing::Values(Case{"  {% if n %}\n  a\n  {% endif %}\nb\n", "  a\nb"},
                                         Case{"a  {%- if n -%}  b  {%- endif %}\n c", "ab c"},
                                         Case{"a {{- n -}} b", "a7b"}, Case{"  {# c #}\nx", "x"},
                                         Case{"  {%+ if n %}x{% endif +%}\ny", "  x\ny"},
                                         Case{"{{ n }}  {% if n %}x{% endif %}", "7  x"},
                                         Case{"a\r\nb\n", "a\nb"}));

TEST(JinjaFuzz, MutatedTemplatesNeverCrash) {
  const std::string seeds[] = {
      "{%- for m in messages %}{% if loop.first and m is not none %}{{ m.role|upper ~ 'x' }}{% "
      "endif %}{% endfor -%}",
      "{% macro f(a, b=[1, 2]) %}{{ a[1:-1]|tojson(indent=2) }}{% endmacro %}{{ f('abc', b={'k': "
      "1.5}) }}",
      "{% set ns = namespace(x=0) %}{% for k, v in d.items() if v > 0 %}{% set ns.x = ns.x + v "
      "%}{% else %}-{% endfor %}{{ ns.x }}",
      "{# c #}{% raw %}{{ }}{% endraw %}{{ users|selectattr('age', 'gt', "
      "26)|map(attribute='name')|join(', ') }}",
      "{{ 'a\\n\\u00e9' 'b' }}{{ (1, 2)[0] if n is odd else -n ** 2 // 3 % 4 }}{{ "
      "s.split('l')[::-1] }}",
  };
  const std::string pieces[] = {"{{",   "}}",  "{%",   "%}", "{#", "#}",   "-",   "|",
                                "(",    ")",   "[",    "]",  "'",  "\\",   "if ", "for ",
                                " in ", "end", "not ", ".",  "~",  "**",   "é",   "\xFF",
                                "0",    "9e9", ":",    ",",  "=",  "set ", "is "};
  std::mt19937 rng(1);
  int compiled = 0;
  for (int round = 0; round < 6000; ++round) {
    std::string source = seeds[rng() % std::size(seeds)];
    for (size_t i = 0; i < 1 + rng() % 4; ++i) {
      const size_t at = rng() % (source.size() + 1);
      switch (rng() % 4) {
        case 0:
          source.insert(at, pieces[rng() % std::size(pieces)]);
          break;
        case 1:
          source.erase(at, rng() % 6);
          break;
        case 2: {
          const std::string& other = seeds[rng() % std::size(seeds)];
          source.insert(at, other.substr(rng() % other.size(), rng() % 20));
          break;
        }
        default:
          if (at < source.size()) source[at] = static_cast<char>(rng() % 256);
      }
    }
    const std::string text = render(source);
    compiled += text.starts_with("chat template") ? 0 : 1;
  }
  EXPECT_GT(compiled, 500);
  EXPECT_LT(compiled, 5500);
}

TEST(JinjaFuzz, RandomBytesNeverCrash) {
  std::mt19937 rng(2);
  for (int round = 0; round < 3000; ++round) {
    std::string source = "{{";
    for (size_t i = 0; i < rng() % 60; ++i) source += static_cast<char>(rng() % 256);
    render(source);
  }
}

}  // namespace
}  // namespace kvarn
