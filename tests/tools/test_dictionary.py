"""WordNet's nouns as the base reads them."""

from pathlib import Path

import pytest

from tools.demo.dictionary import read_dictionary

# license, an idea, an animal, a name, a rare word, and a glossed example
DATA = """\
  1 This software and database is being provided to you, the LICENSEE
00000010 09 n 01 plan 0 000 | something intended
00000020 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 001 @ 00000010 n 0000 | a tame animal; "the dog barked; it ran"
00000030 18 n 01 Ada_Lovelace 0 000 | English mathematician
00000040 20 n 01 zzyzx 0 000 | a plant nobody knows
00000050 06 n 01 tent 0 000 | a shelter; of cloth; "he slept in his tent"; "two tents"
"""
KNOWN = {"plan", "dog", "domestic", "tent"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data.noun").write_text(DATA)
    return tmp_path


def test_words_and_glosses_without_examples_things_first(folder):
    assert read_dictionary(folder, KNOWN) == [
        ("dog, domestic dog", "a tame animal"),
        ("tent", "a shelter; of cloth"),
        ("plan", "something intended"),
    ]


def test_limit_keeps_the_things(folder):
    assert [words for words, _ in read_dictionary(folder, KNOWN, 2)] == ["dog, domestic dog", "tent"]


def test_a_name_of_several_words_needs_all_of_them(folder):
    assert [words for words, _ in read_dictionary(folder, {"domestic"})] == []
