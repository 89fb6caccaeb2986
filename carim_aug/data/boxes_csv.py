"""Grey images with the boxes that a plain CSV lists, as torchvision's detectors take them."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from carim_aug.data.io import IMAGE_SUFFIXES, Box, DataError, clip_box, images_below, number, read_header, read_rows
from carim_aug.data.items import Items, check_choice, check_names, detection_target
from carim_aug.ops.findings import NORMAL_WORDS, plain

CORNERS, SIDES = ("x1", "y1", "x2", "y2"), ("x", "y", "w", "h")
SPELLINGS: dict[str, tuple[str, ...]] = {
    "file": ("file", "filename", "filepath", "image", "imageid", "imagename", "imagepath", "imageindex", "path"),
    "class": ("class", "classname", "label", "labelname", "category", "categoryname", "finding", "findinglabel"),
    "x1": ("x1", "xmin", "left", "xtl"),
    "y1": ("y1", "ymin", "top", "ytl"),
    "x2": ("x2", "xmax", "right", "xbr"),
    "y2": ("y2", "ymax", "bottom", "ybr"),
    "x": ("x", "bboxx"),
    "y": ("y", "bboxy"),
    "w": ("w", "width", "bboxw", "bboxwidth"),
    "h": ("h", "height", "bboxh", "bboxheight"),
}
"""How columns may be called, in lower case, without blanks, underscores and hyphens."""

BACKGROUND = "__background__"
_SLACK = 1.0  # pixels by which a box may overhang


class BoxCSV(Items):
    """Grey images with boxes, one a row of a table.

    Its columns are file, class, and x1, y1, x2, y2 or x, y, w, h, in pixels of the file; usual spellings are known
    (`SPELLINGS`). Several rows of a file are several boxes, one with empty coordinates is none, and an image below the
    folder that has no row is one without boxes. A name without a suffix finds its file.

    `paths` are in order of first mention, then those without a row; `targets` are 1 with a box and else 0. `classes`
    are "__background__" and then those given, or the table's, sorted: for several tables, such as training's and
    validation's, give them, so that numbers agree.

    An item is (image, target): a uint8 `tv_tensors.Image` (channels, H, W); `boxes`, `tv_tensors.BoundingBoxes` (k, 4)
    XYXY, and `labels` (k,) int64, the place in `classes`.

    Args:
        root: folder that the file column is relative to.
        csv: the table; a relative path is tried as it is, then from `root`.
        columns: what columns are called, where no usual spelling fits or two do: such as `{"file": "patientId"}`.
        classes: names of the classes, in order of their numbers; a table without class column takes the only one. If
            the column has numbers, "__background__" must come first, so that number and place are the same.
        only_listed: leave out files without a row.
        transform: torchvision v2 transform, called with (image, target).
        channels: 1, or 3 equal ones.

    Raises:
        DataError: the table is missing or breaks its rules, or a listed image has no file; of an item: the file is
            unreadable, or a box overhangs the image by more than a pixel.
        ValueError, TypeError: an argument that breaks its rule.
    """

    def __init__(
        self,
        root: str | Path,
        csv: str | Path,
        *,
        columns: Mapping[str, str] | None = None,
        classes: Sequence[str] | None = None,
        only_listed: bool = False,
        transform: Callable[..., Any] | None = None,
        channels: int = 1,
    ) -> None:
        check_choice("channels", channels, (1, 3))
        check_names("classes", classes)
        self.root, self.transform, self.channels = Path(root), transform, channels
        if not self.root.is_dir():
            raise DataError(f"{self.root}: no such folder")
        self.csv = Path(csv) if Path(csv).exists() else self.root / csv
        numbered = classes is not None and list(classes[:1]) == [BACKGROUND]
        names = list(classes or ())[numbered:]
        if len({*names, BACKGROUND}) <= len(names) or classes is not None and not names:
            raise ValueError(f"classes must be different names, {BACKGROUND!r} first or left out, got {classes}")
        given = _find_columns(self.csv, columns or {}, one_class=len(names) == 1)

        # Rows, by file; with the line, so that errors name it.
        rows: dict[str, list[tuple[int, Box, str]]] = {}
        seen: dict[tuple[str, Box, str], int] = {}
        for line, row in read_rows(self.csv, tuple(given.values())):
            path = self._find_file(line, row[given["file"]])
            boxes, box = rows.setdefault(path, []), _read_box(self.csv, line, row, given)
            if box is None:
                continue
            name = row[given["class"]] if "class" in given else names[0]
            first = seen.setdefault((path, box, name), line)
            if first != line:
                raise DataError(f"{self.csv}, line {line}: row must not repeat line {first}: leave one of them out")
            boxes.append((line, box, name))
        if not rows:
            raise DataError(f"{self.csv}: no rows")
        found = [own for boxes in rows.values() for own in boxes]
        if found and all(0 <= value <= 1 for _, box, _ in found for value in box):
            box = found[0][1]
            raise DataError(f"{self.csv}: boxes must be in pixels of the files, got parts of 1: {box}: multiply them")

        # Classes, and what is in no row.
        numbers = self._number_classes(names, numbered, found)
        self._boxes = [[(line, box, numbers[name]) for line, box, name in boxes] for boxes in rows.values()]
        listed = {os.path.realpath(path) for path in rows}
        below = [] if only_listed else images_below(self.root)
        unlisted = [path for path in below if os.path.realpath(path) not in listed]
        self.paths = [*rows, *unlisted]
        self._boxes += [[] for _ in unlisted]
        self.targets = [int(bool(boxes)) for boxes in self._boxes]

    def _find_file(self, line: int, name: str) -> str:
        path = os.path.normpath(self.root / name)
        for suffix in ("", *IMAGE_SUFFIXES):
            if name and os.path.isfile(path + suffix):
                return path + suffix
        raise DataError(f"{path}: no such image file, listed in {self.csv}, line {line}: root must be their folder")

    def _number_classes(self, names: list[str], numbered: bool, found: list[tuple[int, Box, str]]) -> dict[str, int]:
        """Set `classes`, and return the number of each entry of the class column."""
        lines = {name: line for line, _, name in reversed(found)}
        self.classes = (BACKGROUND, *(names or sorted(lines)))
        numbers = {name: i for i, name in enumerate(self.classes) if name and i}
        numbers |= {str(i): i for i in numbers.values()} if numbered else {}
        for name, line in lines.items():
            if plain(name) in NORMAL_WORDS:
                rule, remedy = "be a finding's", "leave the coordinates of an image without boxes empty"
            elif not numbered and name.lstrip("+-").replace(".", "", 1).isdigit():
                rule = f"be a name where classes do not begin with {BACKGROUND!r}"
                remedy = f"pass classes=({BACKGROUND!r}, 'Nodule', ...) in the order of the numbers"
            elif name not in numbers:
                rule, remedy = f"be one of {list(numbers)}", "pass all in classes=(...), or mend the row"
            else:
                continue
            raise DataError(f"{self.csv}, line {line}: class must {rule}, got {name!r}: {remedy}")
        return numbers

    def _target(self, i: int, height: int, width: int) -> dict[str, Tensor]:
        remedy = "boxes are in pixels of the file itself, not of a copy of another size"
        size = (width, height)
        boxes = [clip_box(self.csv, line, box, size, _SLACK, remedy=remedy) for line, box, _ in self._boxes[i]]
        return detection_target(boxes, [label for _, _, label in self._boxes[i]], height, width)


def _find_columns(path: Path, columns: Mapping[str, str], *, one_class: bool) -> dict[str, str]:
    """Return the names of a table's columns of file, class and box; DataError if some are missing or could be two."""
    header = read_header(path)
    if unknown := [role for role in columns if role not in SPELLINGS]:
        raise ValueError(f"columns must have keys among {', '.join(SPELLINGS)}, got {unknown[0]!r}")

    def called(role: str) -> list[str]:
        if role in columns:
            return [name for name in header if name == columns[role]]
        return [name for name in header if _plain(name) in SPELLINGS[role]]

    def one(role: str, other: str = "") -> str:
        found = called(role) or (called(other) if other and role not in columns else [])
        if len(found) != 1:
            got = f"one column for {role!r}, got {' and '.join(map(repr, found)) or 'none'}"
            shown = ", ".join(map(repr, header)) or "none"
            more = ", or classes=('Nodule',) if all boxes are of one class" if role == "class" and not found else ""
            remedy = f"pass columns={{{role!r}: '...'}}{more}"
            raise DataError(f"{path}: the table must have {got}; columns found: {shown}: {remedy}")
        return found[0]

    def has(roles: Iterable[str]) -> bool:
        return all(called(role) for role in roles)

    # Which form the boxes have. Width and height beside corners are the image's, unless x and y are there, too.
    corners, sides = bool(columns.keys() & set(CORNERS)), bool(columns.keys() & set(SIDES))
    if corners and sides or not (corners or sides) and has(CORNERS) and has(SIDES):
        remedy = (
            f"pass columns={{'x1': {(called('x1') or ['...'])[0]!r}}} or columns={{'x': ...}} for the one that holds"
        )
        raise DataError(f"{path}: boxes must be x1, y1, x2, y2 or x, y, w, h, got columns for both: {remedy}")
    if sides or not corners and not has(CORNERS) and has("wh"):
        box = {"x": one("x", "x1"), "y": one("y", "y1"), "w": one("w"), "h": one("h")}
    else:
        box = {role: one(role) for role in CORNERS}
    found = {"file": one("file"), **box}
    return found if one_class and not called("class") and "class" not in columns else found | {"class": one("class")}


def _read_box(path: Path, line: int, row: Mapping[str, str], given: Mapping[str, str]) -> Box | None:
    """Return the box XYXY of a row, or None where its cells are empty."""
    names = [given[role] for role in (CORNERS if "x1" in given else SIDES)]
    empty = [name for name in names if not row[name]]
    if len(empty) == 4:
        return None
    if empty:
        raise DataError(f"{path}, line {line}: {empty[0]} is empty though other coordinates are not")
    x1, y1, x2, y2 = (number(path, line, name, row[name]) for name in names)
    if "x1" in given:
        rule, fits = "have x1 < x2 and y1 < y2", x1 < x2 and y1 < y2
        remedy = f"if these are width and height, pass columns={{'w': {names[2]!r}, 'h': {names[3]!r}}}"
    else:
        rule, fits = "have a width and height above 0", x2 > 0 and y2 > 0
        remedy = "leave its cells empty if there is no box"
    if not fits:
        raise DataError(f"{path}, line {line}: box must {rule}, got {(x1, y1, x2, y2)}: {remedy}")
    return (x1, y1, x2, y2) if "x1" in given else (x1, y1, x1 + x2, y1 + y2)


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace(" ", "").replace("-", "")
