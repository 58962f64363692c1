"""Omniglot and mini-ImageNet as they lie on disk, and any folder of class folders."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from metanudge.errors import SettingsError
from metanudge.settings import check_flag, check_steps
from metanudge.tasks.seeding import stream

Split = Literal["train", "validation", "test", "train+validation"]
SUFFIXES = {".png", ".jpg", ".jpeg"}
OMNIGLOT_PARTS = ("images_background", "images_evaluation")
FOLDERS = {"train": ("train",), "validation": ("val", "validation"), "test": ("test",)}
WHERE = """put there one of
  Omniglot        {root}/images_background/Greek/character01/0394_01.png and {root}/images_evaluation/..., as the
                  archives of github.com/brendenlake/omniglot unpack
  mini-ImageNet   {root}/images/n0153282900000005.jpg and {root}/train.csv, val.csv, test.csv with lines filename,label
  class folders   {root}/train/CLASS/*.jpg, and likewise val and test"""


class ImageFolders(Dataset[tuple[Tensor, int]]):
    """A labelled image dataset; ``few_shot`` takes it.

    Attributes:
        paths: File of every item.
        targets: Class of every item.
        classes: Names of the classes.
        turns: Quarter turns of every item.
    """

    def __init__(
        self, paths: list[Path], targets: list[int], classes: list[str], turns: list[int], size: int | None, gray: bool
    ) -> None:
        self.paths, self.targets, self.classes, self.turns = paths, targets, classes, turns
        self.size, self.gray = size, gray
        self._decoded: dict[Path, Tensor] = {}

    def __len__(self) -> int:
        """Return the number of images, turned ones counted."""
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The image ``[C, H, W]`` in [0, 1] and its class."""
        path = self.paths[index]
        if path not in self._decoded:
            self._decoded[path] = self._decode(path)
        image = torch.rot90(self._decoded[path], self.turns[index], (1, 2)).float() / 255
        return image, self.targets[index]

    def _decode(self, path: Path) -> Tensor:
        from PIL import Image  # only here, so that the rest works without it

        with Image.open(path) as opened:
            image = opened.convert("L" if self.gray else "RGB")
            if self.size is not None:
                image = image.resize((self.size, self.size), Image.Resampling.LANCZOS)
            pixels = np.asarray(image, dtype=np.uint8)
        return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1).copy()).permute(2, 0, 1)


def image_folders(
    root: str | Path,
    split: Split = "train",
    *,
    size: int | None = None,
    gray: bool | None = None,
    rotations: bool = False,
    counts: tuple[int, int] = (1100, 100),
    seed: int = 0,
) -> ImageFolders:
    """Read Omniglot, mini-ImageNet, or class folders in ``train``, ``val`` and ``test`` from disk, for ``few_shot``.

    Which of the three is seen from what lies in ``root``. Omniglot's 1,623 characters are shuffled by ``seed`` and
    split 1,100 / 100 / 423 (of the usual 1,200 training characters 100 are kept for validation; "train+validation"
    gives all 1,200). mini-ImageNet is split by its csv files or its folders. Images are decoded when they are first
    drawn, and kept.

    Args:
        root: The folder.
        split: "train", "validation", "test" or "train+validation".
        size: Resize to size x size; None for 28 with Omniglot, 84 with mini-ImageNet's csv layout, and no resizing of
            class folders.
        gray: Whether images have one channel; None for one with Omniglot and three otherwise.
        rotations: Whether every class turned by 90, 180 and 270 degrees is a further class (usual on Omniglot's train
            split).
        counts: Of Omniglot: characters in train and in validation; the others are the test's.
        seed: Of Omniglot's split.

    Returns:
        A dataset of (image ``[C, H, W]`` in [0, 1], class).

    Raises:
        SettingsError: Nothing there that could be read, with what belongs where; an unknown split; a csv file that
            names a missing image.

    Example:
        >>> import metanudge as mn
        >>> data = mn.tasks.image_folders("nowhere")
        Traceback (most recent call last):
        ...
        metanudge.errors.SettingsError: there are no images in nowhere; put there one of
        ...
    """
    root = Path(root)
    if split not in (*FOLDERS, "train+validation"):
        raise SettingsError(f"split must be one of {', '.join(FOLDERS)} or train+validation, got {split!r}")
    if size is not None:
        check_steps(size, "size")
    if gray is not None:
        check_flag(gray=gray)
    parts = ["train", "validation"] if split == "train+validation" else [split]
    if all((root / part).is_dir() for part in OMNIGLOT_PARTS):
        kinds, default, one = _omniglot(root, split, counts, seed), 28, True
    elif (root / "images").is_dir() and (root / "train.csv").is_file():
        kinds, default, one = _listed(root, parts), 84, False
    else:
        kinds, default, one = _foldered(root, parts), None, False
    if not kinds:
        raise SettingsError(f"there are no images in {root}; {WHERE.format(root=root)}")
    paths, targets, names, turns = [], [], [], []
    for turn in range(4 if rotations else 1):
        for name, files in kinds.items():
            names.append(f"{name}@{90 * turn}" if turn else name)
            paths += files
            targets += [len(names) - 1] * len(files)
            turns += [turn] * len(files)
    return ImageFolders(paths, targets, names, turns, default if size is None else size, one if gray is None else gray)


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def _omniglot(root: Path, split: str, counts: tuple[int, int], seed: int) -> dict[str, list[Path]]:
    characters = sorted(
        (character for part in OMNIGLOT_PARTS for character in (root / part).glob("*/*") if character.is_dir()),
        key=lambda path: (path.parent.name, path.name),
    )
    if len(characters) <= sum(counts):
        raise SettingsError(
            f"{root} holds {len(characters)} characters, too few for counts={counts} and a test (all of Omniglot has "
            "1623); unpack both images_background and images_evaluation, or give other counts"
        )
    order = torch.randperm(len(characters), generator=stream(seed, 0), device="cpu")
    shuffled = [characters[place] for place in order.tolist()]
    first, second = counts[0], sum(counts)
    bounds = {
        "train": (0, first),
        "validation": (first, second),
        "test": (second, None),
        "train+validation": (0, second),
    }
    begin, end = bounds[split]
    return {f"{path.parent.name}/{path.name}": _images(path) for path in shuffled[begin:end]}


def _listed(root: Path, parts: Sequence[str]) -> dict[str, list[Path]]:
    kinds: dict[str, list[Path]] = {}
    for part in parts:
        name = "val" if part == "validation" else part
        table = root / f"{name}.csv"
        if not table.is_file():
            raise SettingsError(f"there is no {table}; {WHERE.format(root=root)}")
        with table.open(newline="") as file:
            rows: Any = csv.DictReader(file)
            if not {"filename", "label"} <= set(rows.fieldnames or ()):
                raise SettingsError(f"{table} must begin with the line filename,label, but has {rows.fieldnames}")
            for row in rows:
                path = root / "images" / row["filename"]
                if not path.is_file():
                    raise SettingsError(f"{table} names {row['filename']}, but there is no {path}")
                kinds.setdefault(row["label"], []).append(path)
    return kinds


def _foldered(root: Path, parts: Sequence[str]) -> dict[str, list[Path]]:
    kinds: dict[str, list[Path]] = {}
    for part in parts:
        for folder in (root / name for name in FOLDERS[part]):
            for kind in sorted(folder.iterdir()) if folder.is_dir() else []:
                if kind.is_dir() and (files := _images(kind)):
                    kinds.setdefault(kind.name, []).extend(files)
    return kinds
