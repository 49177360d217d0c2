"""Build the emoji data set from npm and pip packages, byte for byte the same each time.

    pip install resvg-py==0.5.0 && python examples/emoji/build.py [--packages FOLDER]

Needs npm. See README.md beside this file for what comes out.
"""

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import resvg_py
from concepts import TONES, Concept, read_concepts, squeeze, words
from PIL import Image, ImageDraw

from laclip.prepare.index import index
from laclip.prepare.tokenize import tokenize

HERE = Path(__file__).resolve().parent
PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
    "text": "emojibase-data@17.0.0",
}
PIXELS, QUALITY = 64, 85
SHARD_SAMPLES = 1024
HELD_OUT = 340  # concepts of the bases that training never sees
RESERVED = 430  # names that training never uses (a few share their picture with another concept)
EVALUATION = 400  # at most so many items in the other two sets
# FxEmoji's file names that name another picture today, or one that is drawn quite differently.
WRONG_NAMES = {
    *("compression", "hand", "heavylargecircle", "kiss", "pistol", "pout", "pouting", "speaker"),
    "wave",
}
TEMPLATES = (
    "a small drawing of {}",
    "an icon that shows {}",
    "{}, drawn in flat colours on a white ground",
    "a picture of {} from the family of {}",
    "{}, one of the {} emoji",
)

Item = tuple[str, bytes, str, Concept, str]  # key, JPEG, caption, concept, skin tone


def rank(*parts: str) -> str:
    """A fixed pseudo-random order."""
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


class Art:
    """One vendor's drawings."""

    def __init__(self, folder: Path):
        icons = json.loads((folder / "icons.json").read_text())
        self.icons, self.aliases = icons["icons"], icons.get("aliases", {})
        self.size = icons["width"]
        self.names: dict[str, str] = json.loads((folder / "chars.json").read_text())

    def name(self, code: str) -> str | None:
        code = code.lower()
        return self.names.get(code) or self.names.get(code.replace("-fe0f", ""))

    def render(self, name: str) -> bytes:
        """A drawing as JPEG on white, PIXELS high and wide."""
        flip = self.aliases.get(name, {}).get("hFlip", False)
        icon = self.icons[self.aliases.get(name, {}).get("parent", name)]
        width, height = icon.get("width", self.size), icon.get("height", self.size)
        body = icon["body"]
        if flip:
            body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
        side = max(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {side} {side}">{body}</svg>'
        )
        png = resvg_py.svg_to_bytes(
            svg_string=svg, width=PIXELS, height=PIXELS, background="white", skip_system_fonts=True
        )
        jpeg = io.BytesIO()
        image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
        image.save(jpeg, "JPEG", quality=QUALITY, optimize=True)
        return jpeg.getvalue()


def name_old_drawings(art: Art, concepts: list[Concept]) -> None:
    """FxEmoji has file names alone: match them with label, Unicode name and other names."""
    kinds: list[Callable[[Concept], Iterable[str]]] = [
        lambda c: [c.label],
        lambda c: [c.unicode_name],
        lambda c: c.names,
    ]
    tables = []
    for kind in kinds:
        table = defaultdict(set)
        for concept in concepts:
            for name in kind(concept):
                table[squeeze(name)].add(concept.code)
        tables.append(table)
    for icon in sorted(set(art.icons) - WRONG_NAMES):
        for table in tables:
            codes = table.get(squeeze(icon), set())
            if len(codes) == 1:
                art.names.setdefault(next(iter(codes)).lower(), icon)
                break


def hold_out(concepts: list[Concept], drawn: set[str]) -> set[str]:
    """Bases that training never sees: whole ones, in a fixed random order."""
    members = defaultdict(list)
    for concept in concepts:
        if concept.code in drawn:
            members[concept.base].append(concept)
    held: set[str] = set()
    count = 0
    for base in sorted(members, key=lambda base: rank("hold out", base)):
        # Large families, such as 26 drawings of families, would fill the set alone.
        if count < HELD_OUT and len(members[base]) <= 6 and members[base][0].group != "flags":
            held.add(base)
            count += len(members[base])
    return held


def reserve_phrasings(train: list[Concept]) -> None:
    """Keep one name out of training for RESERVED concepts, first for those with a second one."""
    used: dict[str, int] = defaultdict(int)
    for concept in train:
        for text in {squeeze(t) for t in (concept.label, concept.unicode_name, *concept.names)}:
            used[text] += 1
    left = RESERVED
    for concept in sorted(train, key=lambda c: (len(c.names) < 2, rank("reserve", c.code))):
        # A name of two concepts asks for neither.
        free = [name for name in concept.names if used[squeeze(name)] == 1]
        if free and left:
            concept.reserved = free[0]
            concept.names.remove(free[0])
            left -= 1


def several_words(text: str) -> str:
    """Training passes over captions of one word."""
    return text if " " in text else f"{text} emoji"


def rewrites_of(concept: Concept, key: str, tone: str) -> dict[str, str]:
    """The training texts of one image beside its label."""
    suffix = f", {tone}" if tone else ""
    texts = {}
    if squeeze(concept.unicode_name) not in ("", squeeze(concept.label)):
        texts["unicode"] = several_words(concept.unicode_name + suffix)
    if concept.names:
        texts["name"] = several_words(concept.names[-1] + suffix)
    label_words = set(words(concept.label))
    tags = [tag for tag in concept.tags if not set(words(tag)) <= label_words]
    reserved = squeeze(concept.reserved) if concept.reserved else None
    tags = [tag for tag in tags if squeeze(tag) != reserved]
    tags = sorted(tags, key=lambda tag: rank(key, tag))[:4]
    if tags:
        listed = tags[0] if len(tags) == 1 else ", ".join(tags[:-1]) + " and " + tags[-1]
        texts["tags"] = f"something about {listed}{suffix}"
    template = TEMPLATES[int(rank("template", key), 16) % len(TEMPLATES)]
    family = re.sub(r"[^a-z]+", " ", concept.subgroup)
    texts["sentence"] = template.format(concept.label, family) + suffix
    return texts


def captioned(concept: Concept, tone: str) -> str:
    return f"{concept.label}: {tone}" if tone else concept.label


def build_items(concepts: list[Concept], arts: dict[str, Art]) -> dict[str, list[Item]]:
    """The items of every split."""
    drawn = {
        c.code for c in concepts if any(arts[vendor].name(c.code) for vendor in ("noto", "fluent"))
    }
    held = hold_out(concepts, drawn)
    inside = [c for c in concepts if c.code in drawn and c.base not in held]
    outside = [c for c in concepts if c.code in drawn and c.base in held]
    reserve_phrasings(inside)

    def item(vendor: str, concept: Concept, code: str | None = None, text: str = "") -> Item:
        code = code or concept.code
        tone = next((TONES[part] for part in code.split("-") if part in TONES), "")
        name = arts[vendor].name(code)
        assert name
        image = arts[vendor].render(name)
        return (
            f"{vendor}-{code.lower()}",
            image,
            text or captioned(concept, tone),
            concept,
            tone,
        )

    train, concept_set, vendor_set, phrasing_set = [], [], [], []
    for concept in inside:
        for vendor in ("noto", "fluent"):
            if arts[vendor].name(concept.code):
                train.append(item(vendor, concept))
            # One skin tone a vendor, so that tones do not outweigh the rest.
            tones = [code for code in concept.tones if arts[vendor].name(code)]
            if tones:
                train.append(item(vendor, concept, min(tones, key=lambda c: rank(vendor, c))))
        if concept.reserved:
            vendors = [v for v in ("noto", "fluent") if arts[v].name(concept.code)]
            vendor = min(vendors, key=lambda v: rank("phrasing", v, concept.code))
            phrasing_set.append(item(vendor, concept, text=concept.reserved))
        if arts["fxemoji"].name(concept.code):
            vendor_set.append(item("fxemoji", concept))
    for concept in outside:
        vendors = [v for v in ("noto", "fluent") if arts[v].name(concept.code)]
        concept_set.append(
            item(min(vendors, key=lambda v: rank("vendor", v, concept.code)), concept)
        )
    splits = {
        "unseen_concept": distinct(concept_set, 10**6),
        "unseen_vendor": distinct(vendor_set, EVALUATION),
        "unseen_phrasing": distinct(phrasing_set, EVALUATION),
    }
    # Some pictures serve two concepts: none of a held-out concept may stand in training.
    tested = {image for _, image, *_ in splits["unseen_concept"] + splits["unseen_vendor"]}
    phrased = {image for _, image, *_ in splits["unseen_phrasing"]}
    splits["train"] = [i for i in train if i[1] not in tested]
    assert phrased <= {image for _, image, *_ in splits["train"]}
    return splits


def distinct(items: list[Item], limit: int) -> list[Item]:
    """Items of which no two share an image or a caption, in a fixed random order."""
    images: set[bytes] = set()
    captions: set[str] = set()
    kept = []
    for item in sorted(items, key=lambda item: rank("keep", item[0])):
        if item[1] in images or squeeze(item[2]) in captions or len(kept) == limit:
            continue
        images.add(item[1])
        captions.add(squeeze(item[2]))
        kept.append(item)
    return kept


def write_split(folder: Path, items: list[Item], with_rewrites: bool) -> None:
    """Tars, rewrites and sidecars of one split."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    items = sorted(items, key=lambda item: rank("order", item[0]))
    for at in range(0, len(items), SHARD_SAMPLES):
        tar_path = folder / f"{at // SHARD_SAMPLES:05}.tar"
        with tarfile.open(tar_path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, image, caption, *_ in items[at : at + SHARD_SAMPLES]:
                for extension, payload in (("jpg", image), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(payload)
                    tar.addfile(member, io.BytesIO(payload))
    rewrites: dict[str, list[str]] = defaultdict(list)
    for key, _, caption, concept, tone in items if with_rewrites else []:
        for variant, text in rewrites_of(concept, key, tone).items():
            if text.lower() != caption.lower():
                line = json.dumps({"key": key, "text": text}, ensure_ascii=False)
                rewrites[variant].append(line)
    files = {}
    for variant in sorted(rewrites):
        files[variant] = folder / f"{variant}.jsonl"
        files[variant].write_text("\n".join(rewrites[variant]) + "\n")
    print(index(folder))
    print(tokenize(folder, files))


def contact_sheet(splits: dict[str, list[Item]], path: Path) -> None:
    """Twelve pictures of every split with their captions."""
    columns, cell = 12, (84, 106)
    sheet = Image.new("RGB", (columns * cell[0], len(splits) * (cell[1] + 18)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, items) in enumerate(splits.items()):
        top = row * (cell[1] + 18)
        draw.text((4, top + 3), f"{name}: {len(items)} images", fill="black")
        for column, item in enumerate(sorted(items, key=lambda i: rank("sheet", i[0]))[:columns]):
            sheet.paste(Image.open(io.BytesIO(item[1])), (column * cell[0] + 10, top + 20))
            text, lines = item[2].encode("ascii", "replace").decode(), [""]
            for word in text.split():
                if len(lines[-1]) + len(word) > 13:
                    lines.append("")
                lines[-1] = (lines[-1] + " " + word).strip()[:13]
            draw.multiline_text(
                (column * cell[0] + 3, top + 86), "\n".join(lines[:3]), fill="#444", spacing=0
            )
    sheet.save(path, optimize=True)


def fetch(folder: Path) -> None:
    """Download and unpack the packages that are not there yet."""
    for name, package in PACKAGES.items():
        if (folder / name).is_dir():
            continue
        packed = subprocess.run(
            ["npm", "pack", "--silent", "--pack-destination", folder, package],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()[-1]
        with tarfile.open(folder / packed) as tar:
            tar.extractall(folder / f"{name}.part", filter="data")
        (folder / f"{name}.part/package").rename(folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, help="folder that keeps the npm packages")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        packages = args.packages or Path(temporary)
        packages.mkdir(parents=True, exist_ok=True)
        fetch(packages)
        concepts = read_concepts(packages / "text")
        arts = {vendor: Art(packages / vendor) for vendor in ("noto", "fluent", "fxemoji")}
    name_old_drawings(arts["fxemoji"], concepts)
    splits = build_items(concepts, arts)
    order = ("train", "unseen_vendor", "unseen_concept", "unseen_phrasing")
    for name in order:
        write_split(args.out / name, splits[name], with_rewrites=name == "train")
    contact_sheet({name: splits[name] for name in order}, args.out / "contact_sheet.png")


if __name__ == "__main__":
    main()
