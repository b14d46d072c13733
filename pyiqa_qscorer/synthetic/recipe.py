"""Recipes of rendered pictures: what a set consists of, and the YAML file that names several."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ..data.settings import Section, check_settings, read_yaml
from .distortions import KADID_TYPES

RECIPE_FOLDER = Path(__file__).with_name("recipes")
SEEN_SIDE = 512  # longer side of KADID-10k's pictures


class Recipe(Section):
    """What a set consists of; the same recipe and photos give the same pictures and labels."""

    kind: Literal["kadid", "chains", "clean"] = Field(
        description="`kadid`: the 25 types x 5 levels of KADID-10k, labelled with the human mean and spread of the "
        "cell; `chains`: realistic chains, labelled by calibrated full-reference metrics; `clean`: not distorted"
    )
    count: int = Field(ge=1, description="pictures")
    seed: int = Field(0, ge=0, description="of everything random")
    type_shares: dict[int, float] = Field(
        {}, description="how often a KADID type (1..25) is drawn against the others; 1 where not named"
    )
    smallest_crop: float = Field(
        0.8, gt=0, le=1, description="side of the part of a photo that is distorted, as a share, drawn from here to 1"
    )
    longer_sides: tuple[int, int] | None = Field(
        None,
        description="pixels that the longer side of that part is resized to, drawn between the two; default: 512, as "
        "in KADID-10k, for `kadid`, and 448 to 768 for `chains`",
    )
    region: tuple[float, float] | None = Field(
        None,
        description="distort a part of the picture only, half a picture or a rectangle, its share of the area drawn "
        "between the two; default: all of it",
    )
    photo_opinions: Path | None = Field(
        None,
        description="table of what each undistorted photo scores, 1 to 5, columns path and score as the score command "
        "writes them; a label is then what the damage leaves of that; default: every photo is perfect",
    )
    severity: float = Field(
        1.0, gt=0, le=1, description="share of the fall below the undistorted photo that a label keeps"
    )
    calibration_photos: int = Field(24, ge=1, description="photos that the calibration of chains is fitted on")

    @field_validator("type_shares")
    @classmethod
    def _known_types(cls, shares: dict[int, float]) -> dict[int, float]:
        if unknown := sorted(set(shares) - set(KADID_TYPES)):
            raise ValueError(f"type_shares must name KADID types 1..25, got {unknown}")
        if any(share < 0 for share in shares.values()):
            raise ValueError("type_shares must be >= 0")
        return shares

    @field_validator("region")
    @classmethod
    def _shares_of_an_area(cls, region: tuple[float, float] | None) -> tuple[float, float] | None:
        if region is not None and not 0 < region[0] <= region[1] < 1:
            raise ValueError(f"region must be [from, to], 0 < from <= to < 1, got {list(region)}")
        return region

    @property
    def sides(self) -> tuple[int, int]:
        """`longer_sides` with its default."""
        return self.longer_sides or ((SEEN_SIDE, SEEN_SIDE) if self.kind == "kadid" else (448, 768))

    def facts(self) -> dict[str, Any]:
        """As JSON keeps it, without the folders of the photos."""
        return {**self.model_dump(mode="json", exclude={"photos"}), "longer_sides": list(self.sides)}


class PhotoRecipe(Recipe):
    """One set of a recipe file: a recipe, and the folders of its photos."""

    photos: list[Path] = Field(min_length=1, description="folders of undistorted pictures, below the file's `photos`")

    @model_validator(mode="after")
    def _shares_go_with_types(self) -> PhotoRecipe:
        if self.kind != "kadid" and self.type_shares:
            raise ValueError("type_shares goes with kind: kadid")
        if self.kind == "clean" and self.region:
            raise ValueError("region goes with kind: kadid or chains")
        return self


class RecipeFile(Section):
    """A recipe file. Each set becomes `output`/train/NAME or `output`/validation/NAME: a table and its pictures."""

    output: Path = Field(description="folder that is written")
    photos: Path = Field(Path(), description="folder that the photo folders of the sets are below")
    train: dict[str, PhotoRecipe] = Field({}, description="sets to train on, by name")
    validation: dict[str, PhotoRecipe] = Field({}, description="sets to validate on, by name; of other photos")
    allow_overlap: bool = Field(False, description="let training and validation sets share photos")
    workers: int = Field(2, ge=1, description="processes")

    @model_validator(mode="after")
    def _some_set(self) -> RecipeFile:
        if not self.train and not self.validation:
            raise ValueError("name at least one set below train or validation")
        return self

    def sets(self) -> dict[str, PhotoRecipe]:
        """Every set by its folder below `output`."""
        parts = {"train": self.train, "validation": self.validation}
        return {f"{phase}/{name}": recipe for phase, recipes in parts.items() for name, recipe in recipes.items()}


def read_recipe(path: Path, overrides: Mapping[str, Any] | None = None) -> RecipeFile:
    """Read and check a recipe file; a bare name without folder is also looked up among the package's recipes.

    Raises:
        TrainingConfigError: unreadable, an unknown key, or a value outside its rule.
    """
    return check_settings(RecipeFile, read_yaml(path, RECIPE_FOLDER, overrides), str(path))
