"""The table of classes: which name in a file is which label."""

import dataclasses
import pathlib

from fedjax_dp.data.annotations.shapes import AnnotationError
from fedjax_dp.data.tiles import IGNORE_INDEX

IGNORED = "ignore"


@dataclasses.dataclass(frozen=True)
class ClassTable:
    """Names and labels.

    Attributes:
        names: K names, background first; the index is the label. Where shapes overlap, the class
            that stands last wins.
        others: other name, folded -> label; `IGNORE_INDEX` for names that are to be ignored.
    """

    names: tuple[str, ...]
    others: dict[str, int]

    @classmethod
    def from_text(cls, text: str) -> "ClassTable":
        """Reads a table like "background; tumour = Tumor, Carcinoma; stroma; ignore = Artefact".

        Classes are separated by semicolons or line breaks, background first, each with the other
        names it has in files after an equals sign. `ignore` takes names whose pixels shall not be
        seen. Upper and lower case do not matter.

        Raises:
            AnnotationError: a name that stands for two classes, or less than two classes.
        """
        names: list[str] = []
        others: dict[str, int] = {}
        for part in text.replace("\n", ";").split(";"):
            name, _, more = (piece.strip() for piece in part.partition("="))
            if not name:
                continue
            label = IGNORE_INDEX
            if name.casefold() != IGNORED:
                label = len(names)
                names.append(name)
            for other in (name, *(piece.strip() for piece in more.split(","))):
                if not other or (other.casefold() == IGNORED and label == IGNORE_INDEX):
                    continue
                if others.setdefault(other.casefold(), label) != label:
                    raise AnnotationError(
                        f"Expected every name in one class, got {other!r} in two of {text!r}."
                    )
        if not 2 <= len(names) < IGNORE_INDEX:
            raise AnnotationError(
                f"Expected 2 to {IGNORE_INDEX - 1} classes, background first, like "
                f'"background; tumour = Tumor, Carcinoma", got {text!r}.'
            )
        return cls(tuple(names), others)

    def label(self, name: str) -> int | None:
        """The label of a class as a file names it; None where the table does not know it.

        A derived class of QuPath ("Tumor: Positive") is its base class where it is not listed.
        """
        folded = name.strip().casefold()
        while folded not in self.others and ":" in folded:
            folded = folded.rpartition(":")[0].strip()
        return self.others.get(folded)


def table_text(argument: str) -> str:
    """The text of a class table that is given as such, or as a file.

    Raises:
        AnnotationError: the file is no UTF-8 text.
    """
    if ";" in argument or "=" in argument:
        return argument
    path = pathlib.Path(argument)
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else argument
    except (OSError, UnicodeDecodeError) as error:
        raise AnnotationError(f"Cannot read the table of classes {path}: {error}.") from error
