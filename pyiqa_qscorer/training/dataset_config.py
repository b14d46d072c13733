"""Settings of one dataset of a training run: one that pyiqa knows by name, or an own table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, field_validator

from ..data.settings import Section, kind_tag


class _Dataset(Section):
    name: str | None = Field(None, description="in reports; default: the dataset's or the CSV file's")
    mos_range: tuple[float, float] | None = Field(None, description="scale of the MOS; default: what pyiqa states")
    std_range: tuple[float, float] | None = Field(None, description="scale of the spreads, where it is another")
    lower_better: bool = Field(False, description="small MOS mean good quality (DMOS)")
    weight: float = Field(1.0, gt=0, description="how often each image comes in an epoch; for training data")
    crop: tuple[int, int] | None = Field(
        None,
        description="train on one random square of every image, side in pixels from..to, even in the logarithm",
    )

    @field_validator("mos_range", "std_range", "crop")
    @classmethod
    def _ascending(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not value[0] < value[1]:
            raise ValueError("must be [low, high] with low < high")
        return value


class PyiqaDataset(_Dataset):
    """A dataset that pyiqa knows by name, in pyiqa's layout."""

    dataset: str = Field(description="pyiqa's name, e.g. koniq10k")
    data_root: Path = Field(
        Path("datasets"), description="folder of pyiqa's datasets; default: that of the data section"
    )
    download: bool = Field(False, description="let pyiqa fetch a missing dataset")
    split: str | int | None = Field(None, description="pyiqa's split column or index; default: the dataset's")


class FolderDataset(_Dataset):
    """An own table, and the folder of its images."""

    csv: Path = Field(description="table with a header")
    folder: Path | None = Field(None, description="where its images lie; default: the folder of the table")
    file_column: str | None = Field(None, description="default: the first")
    mos_column: str | None = Field(None, description="default: the second")
    std_column: str | None = Field(None, description="spread of single opinions; not read by default")
    split_column: str | None = Field(None, description="its values `train` and `val` say what a row is for")
    mos_range: tuple[float, float] = Field(description="scale of the MOS, [low, high]")


def _dataset_kind(content: Any) -> str | None:
    if not isinstance(content, dict):
        return kind_tag(type(content))
    given = [kind for key, kind in (("dataset", PyiqaDataset), ("csv", FolderDataset)) if key in content]
    return kind_tag(given[0]) if len(given) == 1 else None


DatasetConfig = Annotated[
    Annotated[PyiqaDataset, Tag(kind_tag(PyiqaDataset))] | Annotated[FolderDataset, Tag(kind_tag(FolderDataset))],
    Discriminator(
        _dataset_kind,
        custom_error_type="dataset_kind",
        custom_error_message="give either dataset (a pyiqa name), or csv (an own table) with mos_range",
    ),
]
