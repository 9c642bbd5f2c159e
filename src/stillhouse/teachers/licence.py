"""What a teacher's own card says of its licence, which may bind what is trained on its outputs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stillhouse.base.errors import ModelError, one_line


@dataclass(frozen=True)
class Licence:
    """The terms a teacher comes with.

    Attributes:
        teacher: its directory.
        name: the licence as its card names it (an SPDX identifier, or a name of its own); None if it names none.
        link: where the text is, if the card says so.
    """

    teacher: str
    name: str | None
    link: str | None = None

    @property
    def note(self) -> str:
        """One sentence for people. It states no terms: those are in the licence's text alone."""
        if self.name is None:
            return f"{self.teacher} states no licence; find out whether its outputs may train other models"
        where = f" ({self.link})" if self.link else ""
        return f"{self.teacher} is under {self.name}{where}; read there whether its outputs may train other models"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "note": self.note}


def licence_of(folder: str) -> Licence:
    """The licence in the metadata of a model's card (``README.md``), and the licence file beside it.

    Raises:
        ModelError: there is no such directory, or its card's metadata cannot be read.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ModelError(f"{folder}: not a directory; give the teacher's own, with its README.md")
    files = sorted(file.name for file in path.iterdir() if file.stem.upper() in ("LICENSE", "LICENCE", "USE_POLICY"))
    link = str(path / files[0]) if files else None
    card = path / "README.md"
    if not card.exists():
        return Licence(folder, files[0] if files else None, link)
    from huggingface_hub import ModelCard

    try:
        data = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=False).data.to_dict()
    except Exception as error:
        raise ModelError(f"{card}: its metadata cannot be read ({one_line(error)}); put them right") from error
    name = data.get("license_name") if data.get("license") in (None, "other") else data["license"]
    return Licence(folder, name or (files[0] if files else None), data.get("license_link") or link)
