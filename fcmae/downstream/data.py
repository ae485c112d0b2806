"""Labelled images to train and to validate on, as `data.train` and `data.val` name them."""

from __future__ import annotations

import csv
import math
import os

import numpy as np

from fcmae.data.sources import ImageFiles, PathTable, open_source
from fcmae.downstream.labelled import LABEL_COLUMNS, Labelled, by_class
from fcmae.errors import UsageError

FEWEST = 2  # classes


def open_parts(train: str, val: str, in_chans: int, fraction: float, seed: int) -> Labelled:
    """The images of `data.train` and `data.val`: class folders, or lists (.csv, .tsv) with a path and a label a row.

    fraction: the share of every class of train that is kept, one image at least, chosen by the seed. Raises UsageError
    when there are fewer than two classes, an empty one, or one in val that train lacks.
    """
    parts = {"data.train": _listed("data.train", train, in_chans), "data.val": _listed("data.val", val, in_chans)}
    classes = sorted(parts["data.train"])
    if len(classes) < FEWEST:
        raise UsageError(f"data.train={train} has only the class {classes[0]}; there must be two or more")
    unknown = sorted(set(parts["data.val"]) - set(classes))
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UsageError(f"data.val={val} has the class {unknown[0]}{more}, which data.train={train} lacks")
    kept = {name: _share(parts["data.train"][name], fraction, [seed, i]) for i, name in enumerate(classes)}
    held = {name: parts["data.val"].get(name, []) for name in classes}
    split = "data.train and data.val" + (f", {fraction:g} of every class to train on" if fraction < 1 else "")
    return Labelled(_numbered(kept, classes), _numbered(held, classes), classes, split)


def open_val(val: str, in_chans: int, classes: list[str] | None, count: int, where: str) -> Labelled:
    """Only images to validate on. classes: what a classifier of `count` classes calls them, None if it does not say.

    Raises UsageError when the classes are not the classifier's.
    """
    found = _listed("data.val", val, in_chans)
    if classes is None and len(found) != count:
        raise UsageError(f"{where} tells {count} classes and data.val={val} has {len(found)}")
    classes = sorted(found) if classes is None else classes
    if unknown := sorted(set(found) - set(classes)):
        raise UsageError(f"data.val={val} has the class {unknown[0]}, which {where} does not know")
    return Labelled([], _numbered({name: found.get(name, []) for name in classes}, classes), classes, "data.val")


def _listed(key: str, spec: str, in_chans: int) -> dict[str, list[str]]:
    """The images of each class."""
    path = os.path.abspath(os.path.expanduser(spec))
    if os.path.isdir(path):
        found = by_class(path, in_chans)
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            if entry.is_dir() and not entry.name.startswith(".") and entry.name not in found:
                raise UsageError(f"{key}={spec}: the class folder {entry.name} holds no image; fill or remove it")
        if not found:
            raise UsageError(f"{key}={spec} holds no class folders with images; it needs one folder for each class")
        return found
    if os.path.isfile(path) and path.lower().endswith((".csv", ".tsv")):
        return _from_list(path, in_chans)
    if os.path.exists(path):
        raise UsageError(f"{key}={spec} will not do: give a folder of class folders, or a .csv of path,label")
    raise UsageError(f"{key}={spec} does not exist (looked for {path})")


def _from_list(path: str, in_chans: int) -> dict[str, list[str]]:
    source = open_source(path, in_chans)  # which checks that every file is there
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t" if path.lower().endswith(".tsv") else ","))
    rows = [row for row in rows if any(cell.strip() for cell in row)]
    header = [cell.strip().lower() for cell in rows[0]]
    columns = [header.index(name) for name in LABEL_COLUMNS if name in header]
    if not columns or len(rows) - 1 != len(source):
        raise UsageError(f"{path}: its first row must name the columns, one of them path and one of them label")
    found: dict[str, list[str]] = {}
    for i, row in enumerate(rows[1:]):
        label = row[columns[0]].strip() if columns[0] < len(row) else ""
        if not label:
            raise UsageError(f"{path}: {source.name(i)} has no label")
        found.setdefault(label, []).append(source.name(i))
    return found


def _share(paths: list[str], fraction: float, seed: list[int]) -> list[str]:
    if fraction >= 1:
        return paths
    chosen = np.random.default_rng(seed).permutation(len(paths))[: max(1, math.floor(len(paths) * fraction + 0.5))]
    return [paths[i] for i in sorted(chosen)]


def _numbered(parts: dict[str, list[str]], classes: list[str]) -> list[tuple[str, int]]:
    return [(path, label) for label, name in enumerate(classes) for path in parts[name]]


def as_source(files: list[tuple[str, int]], in_chans: int) -> tuple[ImageFiles, np.ndarray]:
    """Labelled files as a source of images and their labels (N,) int64, both shared by worker processes."""
    labels = np.array([label for _, label in files], dtype=np.int64)
    return ImageFiles("", PathTable(path for path, _ in files), in_chans), labels
