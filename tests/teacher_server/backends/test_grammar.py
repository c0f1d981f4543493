"""The text of a grammar for an engine that compiles it itself: it admits what is JSON of the schema, and nothing else."""

import json

import pytest
import xgrammar

from teacher_server.backends.grammar import strict_text

SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["a", "b", "c"],
    "properties": {
        "a": {"enum": ["x", 'y"]', "\u00e9\n[^", 3]},
        "b": {"type": "array", "items": {"anyOf": [{"type": "boolean"}, {"$ref": "#/$defs/word"}]}, "maxItems": 2},
        "c": {"type": "string"},
    },
    "$defs": {"word": {"type": "string", "maxLength": 3}},
}  # fmt: skip


def admits(grammar, text):
    tokenizer = xgrammar.TokenizerInfo([bytes([byte]) for byte in range(256)] + [b"</s>"], stop_token_ids=[256])
    matcher = xgrammar.GrammarMatcher(xgrammar.GrammarCompiler(tokenizer).compile_grammar(grammar))
    return all(matcher.accept_token(byte) for byte in text.encode()) and matcher.accept_token(256)


def written(a, b, c):
    return json.dumps({"a": a, "b": b, "c": c}, separators=(",", ":"), ensure_ascii=False)


@pytest.mark.parametrize("a", SCHEMA["properties"]["a"]["enum"])
@pytest.mark.parametrize("b", [[], [True, "abc"], ["\u00e9"]])
def test_what_obeys_the_schema_is_admitted(a, b):
    assert admits(strict_text(json.dumps(SCHEMA)), written(a, b, "any length"))


@pytest.mark.parametrize("byte", [*range(32), 34])
def test_a_string_of_bounded_length_holds_no_control_character(byte):
    text = written("x", [">?P"], "").replace("?", chr(byte))
    assert not admits(strict_text(json.dumps(SCHEMA)), text)


def test_the_test_can_fail():
    """xgrammar's own grammar admits them: once it does not, `strict_text` and `Grammars.clean_V` have had their day."""
    own = str(xgrammar.Grammar.from_json_schema(json.dumps(SCHEMA), any_whitespace=False, separators=(",", ":")))
    assert admits(own, written("x", [">?P"], "").replace("?", "\x05"))


@pytest.mark.parametrize("wrong", [written("z", [], ""), written("x", ["four"], ""), written("x", [], "")[:-1], "{}"])
def test_what_does_not_obey_the_schema_is_not_admitted(wrong):
    assert not admits(strict_text(json.dumps(SCHEMA)), wrong)
