"""The base of every settings class: frozen, unknown keys are errors, and numbers are finite."""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, model_validator

from marlin_tools.errors import unnamed_model


class Settings(BaseModel):
    """What a stage can be told. Lives beside the code that it configures; a recipe is made of these."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_flag_as_a_number(cls, data: object) -> object:
        """Python counts with true and false, and so would pydantic."""
        for name, value in data.items() if isinstance(data, dict) else ():
            if isinstance(value, bool) and (field := cls.model_fields.get(name)) and not _takes_flags(field.annotation):
                raise ValueError(f"`{name}` is no flag, not `{str(value).lower()}`")
        return data


def _takes_flags(annotation: Any) -> bool:
    return annotation in (bool, Any, object) or any(_takes_flags(each) for each in get_args(annotation))


def _model(name: str) -> str:
    if not name:
        raise ValueError(f"{(told := unnamed_model()).message}; {told.hint}")
    return name


def _folder(name: object) -> object:
    if name == "":
        raise ValueError("no directory is named; `.` is the working directory")
    return name


ModelName = Annotated[str, AfterValidator(_model)]
Folder = Annotated[Path, BeforeValidator(_folder)]
"""Names that may not be empty: as paths they would be the working directory."""


def one_of(kind: str, known: Collection[str]) -> AfterValidator:
    """To annotate a setting with that is the name of a `kind`, say a "preset"."""

    def check(name: str) -> str:
        if name not in known:
            raise ValueError(f"unknown {kind} `{name}`; known: {', '.join(known)}")
        return name

    return AfterValidator(check)
