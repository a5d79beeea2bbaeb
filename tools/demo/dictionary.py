"""WordNet as (words, meaning) pairs: general language that names any concept, held-out ones included.

Princeton WordNet 3.0 in its own format, as in Debian's `wordnet-base`: https://wordnet.princeton.edu/documentation.
"""

import re
from pathlib import Path

FOLDER = Path("/usr/share/wordnet")
# Lexicographer files: animals, artifacts, food, plants, bodies, objects, people, substances, events, phenomena,
# locations and shapes.
THINGS = (5, 6, 13, 20, 8, 17, 18, 27, 11, 19, 15, 25)
LETTERS = re.compile("[a-z]+")
EXAMPLE = re.compile(r';? *"[^"]*"')


def read_dictionary(folder: Path, known: set[str], limit: int | None = None) -> list[tuple[str, str]]:
    """(words joined by commas, gloss) of the noun synsets, those of things first; at most `limit` of them.

    Args:
        known: usual words. A synset with no name made of these is left out, and so are capitalized words: most are
            Latin names of species or names of people.
    """
    entries = []
    for line in (folder / "data.noun").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(" "):  # the license
            continue
        data, _, gloss = line.partition(" | ")
        fields = data.split()
        kind, count = int(fields[1]), int(fields[3], 16)
        words = [fields[4 + 2 * n].replace("_", " ") for n in range(count)]
        common = [word for word in words if word.islower()]
        meaning = EXAMPLE.sub("", gloss).strip(" ;")
        usual = any(known.issuperset(LETTERS.findall(word)) for word in common)
        if usual and meaning:
            order = THINGS.index(kind) if kind in THINGS else len(THINGS)
            entries.append((order, ", ".join(common), meaning))
    entries.sort(key=lambda entry: entry[0])
    return list(dict.fromkeys((words, meaning) for _, words, meaning in entries))[:limit]
