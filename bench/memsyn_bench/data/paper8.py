"""The paper's eight data sets, read from folders in the layouts they are published in. None comes with memsyn-bench.

Put each into a folder of its own under `data/paper8`, or under the folder that the environment variable MEMSYN_PAPER8
names. `SOURCES` says whose they are; what has to lie where:

    flowers/   jpg/*.jpg  imagelabels.mat  setid.mat
    scenes/    Images/<class>/*.jpg  TrainImages.txt  TestImages.txt
    birds/     CUB_200_2011/{images/, images.txt, image_class_labels.txt, train_test_split.txt, classes.txt}
    cars/      cars_train/*.jpg  cars_test/*.jpg  cars_test_annos_withlabels.mat
               devkit/{cars_meta.mat, cars_train_annos.mat}
    aircraft/  fgvc-aircraft-2013b/data/{images/, variants.txt, images_variant_trainval.txt, images_variant_test.txt}
    actions/   VOCdevkit/VOC2012/{JPEGImages/, Annotations/, ImageSets/Action/{train.txt, val.txt}}
    letters/   English/Img/GoodImg/Bmp/Sample011/*.png to Sample062/*.png
    svhn/      train_32x32.mat  test_32x32.mat

Owns these layouts, and `prepared/` beside them, where the pixels of pictures already read are kept: decoding is slow.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from memsyn import MemsynError
from memsyn_bench.extras import import_extra
from memsyn_bench.task import Task

FOLDER_VARIABLE = "MEMSYN_PAPER8"
ACTIONS = (
    "jumping",
    "phoning",
    "playinginstrument",
    "reading",
    "ridingbike",
    "ridinghorse",
    "running",
    "takingphoto",
    "usingcomputer",
    "walking",
)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
BANNER = 20
"""Rows at the bottom of a picture of an aircraft that name its photographer."""


@dataclass(frozen=True)
class Picture:
    """A file, the number of its class, and the box of it that counts: left, top, right, bottom in pixels.

    Values of right and bottom that are 0 or less count from the far side, so (0, 0, 0, 0) is the whole picture.
    """

    path: Path
    label: int
    box: tuple[int, int, int, int] = (0, 0, 0, 0)


Pixels = tuple[Tensor, Tensor]
"""Images (N, 3, S, S) uint8 and labels (N,) int64."""


@dataclass(frozen=True)
class Split:
    """What a folder holds, to train on and to test on: pictures, or pixels where it has no pictures."""

    class_names: tuple[str, ...]
    train: list[Picture] | Pixels
    test: list[Picture] | Pixels


def read_flowers(folder: Path) -> Split:
    """102 kinds, known by number; the images of the original training and validation sets to train on: 2,040, 6,149."""
    labels = _mat(folder / "imagelabels.mat")["labels"]
    sets = _mat(folder / "setid.mat")

    def of(*names: str) -> list[Picture]:
        numbers = [int(number) for name in names for number in np.atleast_1d(sets[name])]
        return [Picture(folder / f"jpg/image_{n:05d}.jpg", int(labels[n - 1]) - 1) for n in numbers]

    return Split(tuple(str(kind + 1) for kind in range(int(labels.max()))), of("trnid", "valid"), of("tstid"))


def read_scenes(folder: Path) -> Split:
    """67 indoor scenes, in the order of their names: 5,360 and 1,340."""
    paths = {split: _lines(folder / f"{split}Images.txt") for split in ("Train", "Test")}
    names = sorted({path.split("/")[0] for path in paths["Train"]})

    def of(split: str) -> list[Picture]:
        return [Picture(folder / "Images" / path, names.index(path.split("/")[0])) for path in paths[split]]

    return Split(tuple(names), of("Train"), of("Test"))


def read_birds(folder: Path) -> Split:
    """200 species: 5,994 and 5,794."""
    folder = folder / "CUB_200_2011"
    table = {
        name: dict(line.split(maxsplit=1) for line in _lines(folder / f"{name}.txt"))
        for name in ("classes", "images", "image_class_labels", "train_test_split")
    }

    def of(side: str) -> list[Picture]:
        numbers = [number for number, flag in table["train_test_split"].items() if flag == side]
        return [
            Picture(folder / "images" / table["images"][n], int(table["image_class_labels"][n]) - 1) for n in numbers
        ]

    return Split(tuple(table["classes"].values()), of("1"), of("0"))


def read_cars(folder: Path) -> Split:
    """196 models, whole pictures: 8,144 and 8,041."""
    names = np.atleast_1d(_mat(folder / "devkit/cars_meta.mat")["class_names"])

    def of(kind: str, annotations: str) -> list[Picture]:
        entries = np.atleast_1d(_mat(folder / annotations)["annotations"])
        return [Picture(folder / f"cars_{kind}" / str(entry["fname"]), int(entry["class"]) - 1) for entry in entries]

    train = of("train", "devkit/cars_train_annos.mat")
    return Split(tuple(map(str, names)), train, of("test", "cars_test_annos_withlabels.mat"))


def read_aircraft(folder: Path) -> Split:
    """100 variants, the photographers' banner cut off: 6,667 and 3,333."""
    folder = folder / "fgvc-aircraft-2013b/data"
    names = _lines(folder / "variants.txt")

    def of(split: str) -> list[Picture]:
        entries = [line.split(maxsplit=1) for line in _lines(folder / f"images_variant_{split}.txt")]
        return [
            Picture(folder / f"images/{number}.jpg", names.index(variant), (0, 0, 0, -BANNER))
            for number, variant in entries
        ]

    return Split(tuple(names), of("trainval"), of("test"))


def read_actions(folder: Path) -> Split:
    """Ten actions: the boxes of the people who do one of them and no other; tested on the validation set.

    The test set's annotations are not public.
    """
    folder = folder / "VOCdevkit/VOC2012"

    def of(split: str) -> list[Picture]:
        pictures = []
        for name in _lines(folder / f"ImageSets/Action/{split}.txt"):
            path = folder / f"Annotations/{name}.xml"
            for person in ElementTree.fromstring(_need(path).read_text(encoding="utf-8")).iter("object"):
                doing = [label for label, x in enumerate(ACTIONS) if person.findtext(f"actions/{x}") == "1"]
                if len(doing) == 1:
                    left, top, right, bottom = (
                        round(float(person.findtext(f"bndbox/{side}", ""))) for side in ("xmin", "ymin", "xmax", "ymax")
                    )
                    # The corners are pixels counted from 1, both within the box.
                    box = (left - 1, top - 1, right, bottom)
                    pictures.append(Picture(folder / f"JPEGImages/{name}.jpg", doing[0], box))
        return pictures

    return Split(ACTIONS, of("train"), of("val"))


def read_letters(folder: Path) -> Split:
    """52 letters out of natural scenes. No split is published: every fifth of a class, by name, is tested on."""
    train: list[Picture] = []
    test: list[Picture] = []
    for label in range(len(LETTERS)):
        # Samples 1 to 10 are the digits, which SVHN has.
        sample = _need(folder / f"English/Img/GoodImg/Bmp/Sample{label + 11:03d}")
        for number, path in enumerate(sorted(sample.glob("*.png"))):
            (test if number % 5 == 4 else train).append(Picture(path, label))
    return Split(tuple(LETTERS), train, test)


def read_svhn(folder: Path) -> Split:
    """Ten digits, cropped, at 32x32 pixels: 73,257 and 26,032."""

    def of(kind: str) -> Pixels:
        file = _mat(folder / f"{kind}_32x32.mat")
        labels = torch.from_numpy(np.atleast_1d(file["y"]).astype(np.int64)) % 10  # there, 10 is the digit 0
        pixels = file["X"].reshape(32, 32, 3, len(labels)).transpose(3, 2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(pixels)), labels

    return Split(tuple("0123456789"), of("train"), of("test"))


@dataclass(frozen=True)
class Source:
    """A data set: how its folder is read, and where it comes from."""

    title: str
    read: Callable[[Path], Split]
    origin: str


SOURCES = {
    "flowers": Source(
        "Flowers",
        read_flowers,
        "102 Category Flower Dataset, Nilsback and Zisserman 2008, Visual Geometry Group, Oxford",
    ),
    "scenes": Source(
        "Scenes", read_scenes, "Indoor Scene Recognition (MIT Indoor 67), Quattoni and Torralba 2009, MIT"
    ),
    "birds": Source(
        "Birds", read_birds, "Caltech-UCSD Birds-200-2011, Wah, Branson, Welinder, Perona and Belongie 2011"
    ),
    "cars": Source("Cars", read_cars, "Stanford Cars (Cars196), Krause, Stark, Deng and Fei-Fei 2013"),
    "aircraft": Source(
        "Aircraft", read_aircraft, "FGVC-Aircraft 2013b, Maji, Kannala, Rahtu, Blaschko and Vedaldi 2013, VGG, Oxford"
    ),
    "actions": Source(
        "Actions",
        read_actions,
        "PASCAL VOC 2012 training/validation data, Everingham, Van Gool, Williams, Winn, Zisserman",
    ),
    "letters": Source("Letters", read_letters, "Chars74K, EnglishImg, de Campos, Babu and Varma 2009"),
    "svhn": Source(
        "SVHN", read_svhn, "Street View House Numbers, cropped digits, Netzer, Wang, Coates, Bissacco, Wu and Ng 2011"
    ),
}
"""By the name of their folder, in the order they are learned in."""


def load_paper8(size: int, root: Path | None = None) -> list[Task]:
    """Return the eight tasks, images (N, 3, S, S) uint8 in 0..255; S is `size`, and 32 for SVHN.

    A picture's shorter side is brought to `size`, and its middle taken. Pixels lie in files under `root`, not in
    memory: at 224 some 9 GB. `root` is the folder that MEMSYN_PAPER8 names, or `data/paper8`.

    Raises:
        MemsynError: a data set or a file of it is missing, or scipy, which reads three of them, is not installed.
    """
    root = data_folder() if root is None else root
    lacking = [f"{name}/ ({source.origin})" for name, source in SOURCES.items() if not (root / name).is_dir()]
    if lacking:
        raise MemsynError(
            f"paper8: {root} has no {'; no '.join(lacking)}. Get them from their authors and put each into its folder "
            f"as memsyn_bench.data.paper8 tells, or name another place in the environment variable {FOLDER_VARIABLE}."
        )
    return [load_data_set(name, size, root) for name in SOURCES]


def data_folder() -> Path:
    """Where the data sets lie."""
    return Path(os.environ.get(FOLDER_VARIABLE, "data/paper8"))


def load_data_set(name: str, size: int, root: Path) -> Task:
    """Return one of `SOURCES` as a task.

    Raises:
        MemsynError: a file of it is missing, or scipy is not installed.
    """
    source = SOURCES[name]
    split = source.read(root / name)
    train, test = (
        part if isinstance(part, tuple) else prepared(part, size, root, f"{name}-{kind}")
        for kind, part in (("train", split.train), ("test", split.test))
    )
    return Task(source.title, split.class_names, *train, *test)


def prepared(pictures: Sequence[Picture], size: int, root: Path, name: str) -> Pixels:
    """Read the pictures' pixels, once until one of them changes: they are then in a file, mapped into memory."""
    listing = []
    for picture in pictures:
        state = _need(picture.path).stat()
        listing.append((str(picture.path.relative_to(root)), picture.box, state.st_size, state.st_mtime_ns))
    digest = hashlib.sha256(repr(listing).encode()).hexdigest()[:12]
    path = root / "prepared" / f"{name}-{size}-{digest}.npy"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            shape = (len(pictures), 3, size, size)
            pixels = np.lib.format.open_memmap(unfinished, "w+", np.uint8, shape)  # type: ignore[no-untyped-call]
            for place, picture in enumerate(tqdm(pictures, desc=name, unit="picture", disable=None)):
                pixels[place] = _decode(picture, size).transpose(2, 0, 1)
            pixels.flush()
            del pixels  # Windows does not rename a file that is mapped into memory
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    labels = torch.tensor([picture.label for picture in pictures], dtype=torch.int64)
    return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False)), labels


def _decode(picture: Picture, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    with _opened(picture.path) as image:
        left, top, right, bottom = picture.box
        right, bottom = (far if far > 0 else far + side for far, side in zip((right, bottom), image.size, strict=True))
        part = image.convert("RGB").crop((left, top, right, bottom))
    return np.array(ImageOps.fit(part, (size, size), Image.Resampling.BICUBIC))


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except UnidentifiedImageError:
        raise MemsynError(f"paper8: {path} is no picture that can be read. Get it again, or leave it out.") from None


def _need(path: Path) -> Path:
    if not path.exists():
        raise MemsynError(f"paper8: {path} is missing. Unpack the data set again, as memsyn_bench.data.paper8 tells.")
    return path


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in _need(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def _mat(path: Path) -> dict[str, Any]:
    scipy_io = import_extra("scipy.io", purpose=f"reading {path.name}", install="memsyn-bench[paper8]")
    content: dict[str, Any] = scipy_io.loadmat(_need(path), squeeze_me=True)
    return content


def shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images (N, 3, S, S) in 0..255 as float32, each moved by up to an eighth of its side, its border repeated.

    No mirror images, which would turn letters and digits round. All randomness is drawn from `generator`.
    """
    size, most = images.shape[-1], images.shape[-1] // 8
    wide = F.pad(images.to(torch.float32), (most,) * 4, mode="replicate")
    places = torch.randint(2 * most + 1, (len(images), 2), generator=generator).tolist()
    return torch.stack([image[:, y : y + size, x : x + size] for image, (y, x) in zip(wide, places, strict=True)])
