"""The concepts of the emoji data set: their texts, and which of them no split may part."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}
SHORTCODES = ("emojibase", "github", "joypixels", "iamcal", "emojibase-legacy")
COMPONENTS = 2  # the group of skin tones and hair styles: parts, not pictures

# Sequences that differ in who is shown become one: man, woman, person; boy, girl, child; ...
_PERSONS = {
    "1F468": "P", "1F469": "P", "1F9D1": "P",
    "1F466": "C", "1F467": "C", "1F9D2": "C",
    "1F474": "O", "1F475": "O", "1F9D3": "O",
    "1F934": "crown", "1F478": "crown", "1FAC5": "crown",
    "1F385": "claus", "1F936": "claus",
    "1F483": "dancing", "1F57A": "dancing",
    "1F930": "pregnant", "1FAC3": "pregnant", "1FAC4": "pregnant",
    "1F46B": "hands", "1F46C": "hands", "1F46D": "hands",
}  # fmt: skip
_GENDER = {"2640", "2642", "FE0F", "200D", "27A1"}
# Digits, and letters that stand for members of a family ("family wwg").
_UNSPOKEN = re.compile(r"\d|\b[mwbgp]{2,4}\b")
_GENDER_WORDS = re.compile(
    r"\b(man|woman|person|men|women|people|boy|girl|child|male|female|prince|princess|"
    r"facing right)\b"
)


@dataclass
class Concept:
    """One emoji: its code points, texts, and the base that it shares with its variants."""

    code: str
    label: str
    group: str
    subgroup: str
    tags: list[str]
    names: list[str]  # other names, most different from the label first
    unicode_name: str
    tones: list[str]
    base: str = ""
    reserved: str = field(default="")  # a name that training never uses


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def squeeze(text: str) -> str:
    """What two spellings of one name share."""
    return "".join(words(text))


def read_concepts(data: Path) -> list[Concept]:
    """Every emoji of emojibase-data that is a picture, in Unicode's order, without skin tones."""
    emojis = json.loads((data / "en/data.json").read_text())
    groups = json.loads((data / "meta/groups.json").read_text())
    unicode_names = json.loads((data / "meta/unicode-names.json").read_text())
    shortcodes = [json.loads((data / f"en/shortcodes/{s}.json").read_text()) for s in SHORTCODES]
    concepts = []
    for emoji in sorted(emojis, key=lambda e: e.get("order", 0)):
        if emoji.get("group") in (None, COMPONENTS):
            continue
        code = emoji["hexcode"]
        unicode_name = unicode_names.get(code, "").lower() if "-" not in code else ""
        known = {squeeze(emoji["label"]), squeeze(unicode_name)}
        names = {}
        for source in shortcodes:
            listed = source.get(code, [])
            for shortcode in [listed] if isinstance(listed, str) else listed:
                name = re.sub(r"[_-]+", " ", shortcode).strip().lower()
                if not _UNSPOKEN.search(name) and len(name) > 2 and squeeze(name) not in known:
                    names.setdefault(squeeze(name), name)
        label_words = set(words(emoji["label"]))
        concepts.append(
            Concept(
                code=code,
                label=emoji["label"],
                group=groups["groups"][str(emoji["group"])],
                subgroup=groups["subgroups"][str(emoji["subgroup"])],
                tags=[tag for tag in emoji.get("tags", []) if not re.search(r"[^\w\s’'-]", tag)],
                names=sorted(
                    names.values(),
                    key=lambda name: (len(label_words & set(words(name))), name),
                ),
                unicode_name=unicode_name,
                tones=[s["hexcode"] for s in emoji.get("skins", []) if isinstance(s["tone"], int)],
            )
        )
    _set_bases(concepts)
    return concepts


def base_of_code(code: str) -> str:
    """The code points without skin tone, gender, direction and kind of person."""
    parts = [part for part in code.split("-") if part not in TONES and part not in _GENDER]
    parts = [_PERSONS.get(part, part) for part in parts]
    if not parts:  # a gender sign or an arrow on its own
        return code
    if parts[0] in ("P", "C") and len(parts) > 1:
        if set(parts) <= {"P", "C"}:
            return "family"
        if "1F384" in parts:
            return "claus"
        parts = [part for part in parts if part != "P"]
    return "-".join(parts)


def _set_bases(concepts: list[Concept]) -> None:
    """Give variants one base: those of one code base, and those whose labels differ in gender."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            key = parent[key]
        return key

    for concept in concepts:
        label = " ".join(words(_GENDER_WORDS.sub(" ", concept.label.lower())))
        code = "code " + base_of_code(concept.code)
        if label:
            parent[root("label " + label)] = root(code)
        else:
            root(code)
    for concept in concepts:
        concept.base = root("code " + base_of_code(concept.code))
