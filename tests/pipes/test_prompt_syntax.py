"""The syntax of prompts against slow references, and its errors."""

import random
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.inputs.prompt_syntax import (
    MAX_CHOICES,
    MAX_DEPTH,
    PromptSyntaxError,
    Span,
    escape_weights,
    expand,
    has_choices,
    has_weights,
    parse_template,
    parse_weights,
    plain_text,
    write_weights,
)
from tests.pipes.prompt_syntax_reference import characters, every_expansion

PIECES = st.lists(
    st.sampled_from(["a", " b", "(", ")", "[", "]", "\\", ":", ":1.2)", ": 0.5 )", ":-1)", ":1.2.3)", ":)", "1"]),
    max_size=14,
)


def of_spans(spans):
    return [(character, span.weight) for span in spans for character in span.text]


@settings(max_examples=400, deadline=None)
@given(PIECES, st.booleans())
def test_weights_are_those_of_the_reference(pieces, bare):
    text = "".join(pieces)
    found, wanted = of_spans(parse_weights(text, bare)), characters(text, bare)
    assert [one for one, _ in found] == [one for one, _ in wanted]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in wanted])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.builds(Span, st.text(string.printable, min_size=1, max_size=6), st.floats(-9, 9)), max_size=5))
def test_written_spans_are_read_again(spans):
    again = parse_weights(write_weights(spans))
    assert plain_text(again) == plain_text(spans)
    assert of_spans(again) == of_spans(spans)


@given(st.text(max_size=40))
def test_escaped_text_is_text(text):
    assert plain_text(parse_weights(escape_weights(text))) == text
    assert not has_weights(parse_weights(escape_weights(text)))


# The examples in the docstring of AUTOMATIC1111's `parse_prompt_attention`.
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
             ("sky", 1.4641), (".", 1.1)],
        ),
    ],
)  # fmt: skip
def test_bare_brackets_are_those_of_automatic1111(text, wanted):
    found = parse_weights(text, bare=True)
    assert [span.text for span in found] == [one for one, _ in wanted]
    assert [span.weight for span in found] == pytest.approx([weight for _, weight in wanted])


@pytest.mark.parametrize("text", ["a cat (cute)", "[x] and {y}", "f(x)[0]", "smile :) (:", r"C:\new", "at 3:2)", "__"])
def test_plain_language_stays_what_it_is(text):
    assert parse_weights(text) == (Span(text),)
    assert parse_template(text) == (text,)


def test_a_weight_out_of_range_is_refused_with_the_range():
    with pytest.raises(PromptSyntaxError, match=r"'red' has the weight 100.*-10 to 10"):
        parse_weights("a (red:100) apple")
    with pytest.raises(PromptSyntaxError, match="from -10 to 10"):
        parse_weights("(" * 2000 + "a", bare=True)


# --------------------------------------------------------------------------- alternatives

LISTS = {"colours": ["red", "blue"], "animals": ["cat", "{big|small} dog", "__colours__ fox"]}
NESTED = st.recursive(
    st.sampled_from(["a", "b ", "__colours__", "__animals__", ""]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: "{" + "|".join(parts) + "}"),
        st.lists(inner, max_size=2).map("".join),
    ),
    max_leaves=5,
)


def expanded(text, seed=0, lists=LISTS):
    return expand(parse_template(text), random.Random(seed), lists.__getitem__)


@settings(max_examples=150, deadline=None)
@given(NESTED, st.integers(0, 2**32))
def test_an_expansion_is_one_of_all(text, seed):
    found = expanded(text, seed)
    assert found in every_expansion(text, LISTS)
    assert found == expanded(text, seed)


@pytest.mark.parametrize("text", ["{red|blue} {a|{b|c}}", "__animals__", "x{|y}"])
def test_every_expansion_comes(text):
    assert {expanded(text, seed) for seed in range(300)} == every_expansion(text, LISTS)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (r"\{a|b\}", "{a|b}"),
        (r"\__colours__", "__colours__"),
        (r"{a\|b|a\|b}", "a|b"),
        (r"\(x\)", r"\(x\)"),
        ("{a}", "{a}"),
        ("{a|a", "{a|a"),
        ("a|b}", "a|b}"),
        ("{2$$a|a}", "a, a"),
        ("{2$$ and $$a|a}", "a and a"),
        ("{0::a|b}", "b"),
        ("{a::0|b}", "b"),
        ("{(a:1.2)|(a:1.2)}", "(a:1.2)"),
    ],
)
def test_what_a_prompt_becomes(text, wanted):
    assert {expanded(text, seed) for seed in range(20)} == {wanted}


def test_several_are_different_ones_in_any_order():
    found = {expanded("{2$$a|b|c}", seed) for seed in range(200)}
    assert found == {f"{one}, {other}" for one in "abc" for other in "abc" if one != other}
    assert {len(expanded("{1-3$$a|b|c}", seed).split(", ")) for seed in range(100)} == {1, 2, 3}
    assert {expanded("{2$$__colours__}", seed) for seed in range(50)} == {"red, blue", "blue, red"}


def test_odds_say_how_often_one_comes():
    found = [expanded("{3::a|b}", seed) for seed in range(2000)]
    assert found.count("a") / len(found) == pytest.approx(0.75, abs=0.04)
    found = [expanded("{a::0.5|b::1.5}", seed) for seed in range(2000)]
    assert found.count("a") / len(found) == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize(
    ("text", "lists", "message"),
    [
        ("__a__", {"a": ["__a__"]}, "in itself"),
        ("__a__", {"a": []}, "empty list"),
        ("{3$$a|b}", {}, "asks for 3 to 3 of 2"),
        ("{3$$__a__}", {"a": ["x", "y"]}, "has 2 lines, not 3"),
        ("{2$$0::a|b}", {}, "1 that may come"),
        ("{0::a|0::b}", {}, "offers nothing"),
        ("{a|" * (MAX_DEPTH + 1) + "b" + "}" * (MAX_DEPTH + 1), {}, "too many braces"),
        ("__a__", {"a": ["{5$$__b__}" * 5], "b": ["__c__"] * 5, "c": ["{5$$__d__}"], "d": ["{x|y}"] * 5}, "choices"),
        ("__a__", {"a": ["x" * 20_000]}, "longer than"),
    ],
)
def test_what_cannot_be_had_is_refused(text, lists, message):
    lists = {name: lines * 5 if name == "a" and message == "choices" else lines for name, lines in lists.items()}
    with pytest.raises(PromptSyntaxError, match=message):
        expanded(text * (MAX_CHOICES if message == "choices" else 1), 0, lists)


def test_unclosed_braces_take_no_longer_than_their_number():
    text = "{" * 2000 + "__a__"
    assert not has_choices(parse_template("{" * 2000))
    assert expanded(text, 0, {"a": ["x"]}) == "{" * 2000 + "x"
