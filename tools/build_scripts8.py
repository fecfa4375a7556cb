"""Build the `scripts8` pack: the letters of eight alphabets in fonts whose families are learned from or tested on.

Fetches pinned Debian packages with `apt-get download`, unpacks them with `dpkg-deb -x` (nothing is installed), renders
the letters and writes the pack to `bench/memsyn_bench/data/packs/scripts8/`. The same packages and Pillow give the same
bytes. Needs Debian's apt and dpkg, and pillow.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
PACK = ROOT / "bench" / "memsyn_bench" / "data" / "packs" / "scripts8"
BUILD = ROOT / "build" / "scripts8"
SIZE = 28  # pixels a side of one letter
INNER = 24  # the longer side of its ink
DRAWN = 192  # the font size it is drawn at before it is made smaller

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Package:
    """One Debian package: its version, its archive's checksum, and whose fonts it holds under which licence."""

    name: str
    version: str
    sha256: str
    licence: str
    attribution: str


@dataclass(frozen=True)
class Family:
    """Fonts that look alike, all of them on one side of the split: file names without their ending, by script."""

    name: str
    split: str  # "train" or "test"
    packages: tuple[str, ...]
    fonts: dict[str, str]  # script -> stems with blanks between


GOOGLE = "Copyright Google Inc"
SIL = "Copyright SIL International"
PACKAGES = (
    Package(
        "fonts-noto-core",
        "20201225-1",
        "58f4f0bb6720f919f92096b3508e1412a0f1544424ade6c5b5bf1eb694dd64ba",
        "OFL-1.1",
        GOOGLE,
    ),
    Package(
        "fonts-noto-extra",
        "20201225-1",
        "a44b0c7b9e3c72caf4237ab46846652d6d6eea296abfe675f6f604b6562ffd40",
        "OFL-1.1",
        GOOGLE,
    ),
    Package(
        "fonts-dejavu-core",
        "2.37-6",
        "8892669e51aab4dc56682c8e39d8ddb7d70fad83c369344e1e240bf3ca22bb76",
        "Bitstream-Vera",
        "Copyright (c) 2003 by Bitstream, Inc.; DejaVu changes are in public domain",
    ),
    Package(
        "fonts-dejavu-extra",
        "2.37-6",
        "6cb7ed32de6df209c065e9e5cc5154a2f36d4c334d9a0af534fabb67d38ab75b",
        "Bitstream-Vera",
        "Copyright (c) 2003 by Bitstream, Inc.; DejaVu changes are in public domain",
    ),
    Package(
        "fonts-roboto-unhinted",
        "2:0~20170802-3",
        "f89cf7d8a589489daecf750031ec50456ab3e648d49ff544f0f08753268fbd91",
        "Apache-2.0",
        "Copyright 2015 Google Inc",
    ),
    Package(
        "fonts-lato",
        "2.0-2.1",
        "86f50af146a7df9eca4e69f0262e73e708908435ebfa833df797adfa08843bc5",
        "OFL-1.1",
        "Copyright (c) 2010-2011 Łukasz Dziedzic",
    ),
    Package(
        "fonts-gfs-didot",
        "1.1-7",
        "2addbd2cdb7d938878e8e7ccdf943004c55d1312a6a8ec5e07914a57246178db",
        "OFL-1.1",
        "Copyright (c) 2007 Greek Font Society",
    ),
    Package(
        "fonts-gfs-neohellenic",
        "1.1-7",
        "41169eb825b0ea8264d997c6c14f2cbb17278b25984d19bbf753e71f558c14a3",
        "OFL-1.1",
        "Copyright (c) 2007 Greek Font Society",
    ),
    Package(
        "fonts-comfortaa",
        "3.001-3",
        "33c65e81b201177a56e6528f7ea5fd6b19f2db0bb6f4f95346b9483691851929",
        "OFL-1.1",
        "Copyright 2008-2017 Johan Aakerlund",
    ),
    Package(
        "fonts-sil-charis",
        "6.101-1",
        "bc1a774ed29af7be47aea74b0afbcffb1e379c9e61e3f322ccf60c9325ff88af",
        "OFL-1.1",
        SIL,
    ),
    Package(
        "fonts-sil-ezra",
        "2.51-9",
        "c3645c7490739dc898bfe7f1793c8d5ef38e016fa4318d31bd0906e43fe8c621",
        "OFL-1.1",
        SIL,
    ),
    Package(
        "fonts-hosny-amiri",
        "0.113-1",
        "9960dfd0dd13077d8922e0fb742d735377e8eb62c8b08816a86abbc9cd8b9612",
        "OFL-1.1",
        "Copyright 2010-2017 Khaled Hosny",
    ),
    Package(
        "fonts-sil-scheherazade",
        "2.100-2.1",
        "81b583ef38fc0e977031ad8efe310459c10552dfa0acebfb09440f9b6836870d",
        "OFL-1.1",
        SIL,
    ),
    Package(
        "fonts-sil-harmattan",
        "2.000-1",
        "77b0064ccf235d7634b3f892458e3ff5b0078695667de3291712e1c90ad3529a",
        "OFL-1.1",
        f"{SIL}; The C&MA Guinea Fulbe Team; George W. Nuss",
    ),
    Package(
        "fonts-lohit-deva",
        "2.95.4-5",
        "f872a508d33322c1c24199656c1edac637c1df63d62cb47e2d23629aa770652f",
        "OFL-1.1",
        "Copyright 2006 Modular Infotech Pvt Ltd., 2009 Red Hat, Inc",
    ),
    Package(
        "fonts-lohit-beng-bengali",
        "2.91.5-3",
        "11051cfa522e259988283009a18d30c94367bdf934f06ee57c59c222e692706d",
        "OFL-1.1",
        "Copyright 2006 Modular Infotech Pvt Ltd., 2009 Red Hat, Inc",
    ),
    Package(
        "fonts-sil-annapurna",
        "1.204-2",
        "514e1e885b3ef41f0d25741fcfd95008d18abe4878315656d7be48d07bc4c41a",
        "OFL-1.1",
        SIL,
    ),
    Package(
        "fonts-arundina",
        "0.3.2-1",
        "6dca34164427e011422379b38e9b62d4ff9cfafbe10d6c8f8290fadfda5e0839",
        "Bitstream-Vera",
        "Copyright 2003 Bitstream, Inc., 2007 Software Industry Promotion Agency (Public Organization)",
    ),
)


def between(first: int, last: int, without: str = "") -> str:
    return "".join(chr(code) for code in range(first, last + 1) if chr(code) not in without)


SCRIPTS = {
    "Latin": between(0x61, 0x7A),
    "Greek": between(0x3B1, 0x3C9, "ς"),  # the sigma that only ends words is left out
    "Cyrillic": between(0x430, 0x44F),
    "Hebrew": between(0x5D0, 0x5EA),
    "Arabic": between(0x627, 0x63A) + between(0x641, 0x64A),
    "Devanagari": between(0x915, 0x939, "\u0929\u0931\u0934"),  # letters with a dot below are left out
    "Bengali": between(0x995, 0x9B9, "\u09a9\u09b1\u09b3\u09b4\u09b5"),  # not assigned
    "Thai": between(0xE01, 0xE2E),
}
NOTO = ("fonts-noto-core", "fonts-noto-extra")
DEJAVU = ("fonts-dejavu-core", "fonts-dejavu-extra")
WESTERN = ("Latin", "Greek", "Cyrillic")
SERIF = "Light Regular Bold Black Condensed"
SANS = "ExtraLight Light Regular Medium SemiBold Bold Black SemiCondensed Condensed ExtraCondensed"


def styles(stem: str, names: str) -> str:
    return " ".join(f"{stem}-{name}" for name in names.split())


FAMILIES = (
    Family(
        "Noto Sans",
        "train",
        NOTO,
        dict.fromkeys(WESTERN, styles("NotoSans", "Light Regular Bold Black Italic Condensed"))
        | {script: styles(f"NotoSans{script}", SANS) for script in ("Hebrew", "Devanagari", "Bengali")}
        | {script: styles(f"NotoSans{script}", SERIF) for script in ("Arabic", "Thai")},
    ),
    Family("Noto Looped Thai", "train", NOTO, {"Thai": styles("NotoLoopedThai", SERIF)}),
    Family("Noto Kufi Arabic", "train", NOTO, {"Arabic": styles("NotoKufiArabic", "Light Regular Bold Black")}),
    Family(
        "DejaVu",
        "train",
        DEJAVU,
        dict.fromkeys(
            WESTERN,
            "DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSerif DejaVuSerif-Bold DejaVuSerif-Italic",
        )
        | {
            "Hebrew": "DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSansCondensed",
            "Arabic": "DejaVuSans DejaVuSans-Bold DejaVuSansCondensed DejaVuSansMono",
        },
    ),
    Family(
        "Roboto",
        "train",
        ("fonts-roboto-unhinted",),
        dict.fromkeys(WESTERN, styles("Roboto", "Light Regular Bold Italic")),
    ),
    Family("Lato", "train", ("fonts-lato",), dict.fromkeys(WESTERN, styles("Lato", "Light Regular Bold Italic"))),
    Family("GFS Didot", "train", ("fonts-gfs-didot",), {"Greek": "GFSDidot GFSDidotBold GFSDidotItalic"}),
    Family("Amiri", "train", ("fonts-hosny-amiri",), {"Arabic": styles("Amiri", "Regular Bold Slanted")}),
    Family(
        "Lohit",
        "train",
        ("fonts-lohit-deva", "fonts-lohit-beng-bengali"),
        {script: f"Lohit-{script}" for script in ("Devanagari", "Bengali")},
    ),
    Family(
        "Noto Serif",
        "test",
        NOTO,
        dict.fromkeys(WESTERN, styles("NotoSerif", "Light Regular Bold Italic"))
        | {script: styles(f"NotoSerif{script}", SERIF) for script in ("Hebrew", "Devanagari", "Bengali", "Thai")},
    ),
    Family("Noto Naskh Arabic", "test", NOTO, {"Arabic": styles("NotoNaskhArabic", "Regular Bold")}),
    Family(
        "Charis SIL",
        "test",
        ("fonts-sil-charis",),
        dict.fromkeys(("Latin", "Cyrillic"), styles("CharisSIL", "Regular Bold Italic")),
    ),
    Family(
        "GFS Neohellenic",
        "test",
        ("fonts-gfs-neohellenic",),
        {"Greek": "GFSNeohellenic GFSNeohellenicBold GFSNeohellenicIt"},
    ),
    Family(
        "Comfortaa",
        "test",
        ("fonts-comfortaa",),
        dict.fromkeys(WESTERN, styles("Comfortaa", "Regular Bold")),
    ),
    Family("Ezra SIL", "test", ("fonts-sil-ezra",), {"Hebrew": "SILEOT"}),
    Family("Scheherazade", "test", ("fonts-sil-scheherazade",), {"Arabic": styles("Scheherazade", "Regular Bold")}),
    Family("Harmattan", "test", ("fonts-sil-harmattan",), {"Arabic": styles("Harmattan", "Regular Bold")}),
    Family("Annapurna SIL", "test", ("fonts-sil-annapurna",), {"Devanagari": styles("AnnapurnaSIL", "Regular Bold")}),
    Family("Arundina", "test", ("fonts-arundina",), {"Thai": "ArundinaSans ArundinaSans-Bold ArundinaSerif"}),
)


def fetch_fonts(package: Package, cache: Path) -> dict[str, Path]:
    """Return the package's font files by stem, fetching and unpacking it if it is not there; checks the sum."""
    cache.mkdir(parents=True, exist_ok=True)
    if not list(cache.glob(f"{package.name}_*.deb")):
        command = ["apt-get", "download", f"{package.name}={package.version}"]
        subprocess.run(command, cwd=cache, check=True, capture_output=True)
    (archive,) = cache.glob(f"{package.name}_*.deb")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != package.sha256:
        raise SystemExit(f"{archive}: expected sha256 {package.sha256}, found {found}; delete it, run again")
    folder = cache / package.name
    if not folder.exists():
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True)
    return {path.stem: path for path in sorted(folder.rglob("*.[to]tf"))}


def render(font: ImageFont.FreeTypeFont, letter: str) -> Pixels:
    """Return the letter as (SIZE, SIZE) pixels, black on white: its ink fitted into INNER, centred."""
    left, top, right, bottom = font.getbbox(letter)
    width, height = int(right - left), int(bottom - top)
    ink = Image.new("L", (width, height), 255)
    ImageDraw.Draw(ink).text((-left, -top), letter, font=font, fill=0)
    scale = INNER / max(width, height)
    fitted = ink.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BOX)
    paper = Image.new("L", (SIZE, SIZE), 255)
    paper.paste(fitted, ((SIZE - fitted.width) // 2, (SIZE - fitted.height) // 2))
    return np.array(paper)


def draw_sheet(script: str, files: dict[str, dict[str, Path]]) -> tuple[Pixels, list[dict[str, str]]]:
    """Return a script's sheet, a row for each font and a column for each letter, and what its rows are."""
    rows, fonts = [], []
    for family in FAMILIES:
        for stem in family.fonts.get(script, "").split():
            package = next(name for name in family.packages if stem in files[name])
            font = ImageFont.truetype(files[package][stem], DRAWN, layout_engine=ImageFont.Layout.BASIC)
            absent = render(font, "\U0010fffd")  # what the font draws for a letter it does not have
            letters = [render(font, letter) for letter in SCRIPTS[script]]
            lacking = [x for x, drawn in zip(SCRIPTS[script], letters, strict=True) if np.array_equal(drawn, absent)]
            if lacking:
                raise SystemExit(f"{stem} has no {' '.join(lacking)}")
            rows.append(np.concatenate(letters, axis=1))
            fonts.append({"family": family.name, "font": stem, "split": family.split, "package": package})
    return np.concatenate(rows), fonts


def write_licences() -> None:
    """Write who made the fonts, under which licence, and what was changed."""
    lines = [
        "# Whose fonts these are",
        "",
        "The sheets in this folder hold small pictures of letters drawn with the fonts of these Debian packages; no "
        f"font is in it. Changes: each letter was drawn alone, fitted into {SIZE}x{SIZE} pixels and set beside others, "
        "a row for each font. `manifest.json` says which font drew which row.",
        "",
        "| package | licence | attribution |",
        "|---|---|---|",
    ]
    lines += [f"| Debian `{p.name}` {p.version} | {p.licence} | {p.attribution} |" for p in PACKAGES]
    lines += ["", LICENCE_NOTES]
    (PACK / "LICENSES.md").write_text("\n".join(lines), encoding="utf-8")


LICENCE_NOTES = """\
## OFL-1.1

SIL Open Font License, Version 1.1, https://openfontlicense.org. It asks that fonts stay under it, and not
what is drawn with them.

## Apache-2.0

Apache License, Version 2.0, https://www.apache.org/licenses/LICENSE-2.0; its text is this project's
own `LICENSE`.

## Bitstream Vera

In short; the whole text is in the packages.

Permission is hereby granted, free of charge, to any person obtaining a copy of the fonts accompanying
this license ("Fonts") and associated documentation files (the "Font Software"), to reproduce and
distribute the Font Software, including without limitation the rights to use, copy, merge, publish,
distribute, and/or sell copies of the Font Software, and to permit persons to whom the Font Software is
furnished to do so, under conditions on the names and the sale of fonts; no font is in this folder. THE FONT SOFTWARE
IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND. Bitstream Vera is a trademark of Bitstream, Inc.
"""


def main() -> None:
    """Build the pack."""
    parser = argparse.ArgumentParser(description="Build the scripts8 pack.")
    parser.add_argument("--cache", type=Path, default=BUILD, help="folder that keeps the fetched packages")
    cache: Path = parser.parse_args().cache.resolve()
    files = {package.name: fetch_fonts(package, cache) for package in PACKAGES}
    PACK.mkdir(parents=True, exist_ok=True)
    entries = []
    for script, letters in SCRIPTS.items():
        sheet, fonts = draw_sheet(script, files)
        path = PACK / f"{script.lower()}.webp"
        Image.fromarray(sheet).convert("RGB").save(path, lossless=True, quality=100, method=6)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        entries.append({"name": script, "sheet": path.name, "sha256": sha256, "letters": letters, "fonts": fonts})
    manifest = {
        "format": 1,
        "size": SIZE,
        "layout": "a row for each font, a column for each letter, in the order given here",
        "tasks": entries,
    }
    (PACK / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_licences()
    print(f"{PACK}: {sum(path.stat().st_size for path in PACK.iterdir()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
