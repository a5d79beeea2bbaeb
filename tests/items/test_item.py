"""What counts as an item, and what as nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umarvel_ray.errors import UserError
from umarvel_ray.items.encoder import ItemEncoder
from umarvel_ray.items.item import check_item
from umarvel_ray.recipe import ModelSettings


@pytest.mark.parametrize("text", ["", " ", "\n\t\r", "\u200b", "\ufeff \u2060", "\u00a0\u3000", "\u202e"])
def test_text_that_shows_nothing_is_nothing(text):
    with pytest.raises(UserError, match="x: nothing to embed"):
        check_item({"text": text}, "x")
    assert check_item({"text": text, "image": b"png", "instruction": text}, "x") == {"image": b"png"}


@given(st.text(alphabet=st.characters(min_codepoint=0xD7F0, max_codepoint=0xE010, categories=["Cs", "Co", "Lo"])))
def test_half_characters_become_the_replacement_character(text):
    expected = "".join("\ufffd" if 0xD800 <= ord(character) <= 0xDFFF else character for character in text)
    assert check_item({"text": f"a{text}"}, "x") == {"text": f"a{expected}"}


def test_half_characters_can_be_encoded(tiny_base):
    encoder = ItemEncoder.from_pretrained(tiny_base, ModelSettings())
    broken = encoder.encode({"text": "a fox \ud83e", "instruction": "find \udd8a"}, "query")
    assert broken.input_ids.tolist() == (
        encoder.encode({"text": "a fox \ufffd", "instruction": "find \ufffd"}, "query").input_ids.tolist()
    )
