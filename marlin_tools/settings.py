"""The base of every settings class: frozen, unknown keys are errors, and numbers are finite."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from marlin_tools.errors import MarlinToolsError, check_named


def complaint(path: tuple[str | int, ...], rule: str, value: object = None) -> InitErrorDetails:
    """What is wrong with a value inside, for the `ValidationError` of who looks at several at once."""
    return InitErrorDetails(type=PydanticCustomError("value_error", "{rule}", {"rule": rule}), loc=path, input=value)


class Settings(BaseModel):
    """What a stage can be told. Lives beside the code that it configures; a recipe is made of these."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_flag_as_a_number(cls, data: object) -> object:
        """Python counts with true and false, and so would pydantic. The complaint is about the value, not all of them."""
        wrong = []
        for name, value in data.items() if isinstance(data, dict) else ():
            if isinstance(value, bool) and (field := cls.model_fields.get(name)) and not _takes_flags(field.annotation):
                wrong.append(complaint((name,), f"`{name}` is no flag, not `{str(value).lower()}`", value))
        if wrong:
            raise ValidationError.from_exception_data(cls.__name__, wrong)
        return data


def _takes_flags(annotation: Any) -> bool:
    return annotation in (bool, Any, object) or any(_takes_flags(each) for each in get_args(annotation))


def checked(check: Callable[[str], object]) -> AfterValidator:
    """To annotate a setting with that `check` refuses, as elsewhere, with an error of ours; here that is a complaint."""

    def validate(value: str) -> str:
        try:
            check(value)
        except MarlinToolsError as error:
            raise ValueError("; ".join(filter(None, (error.message, error.hint)))) from error
        return value

    return AfterValidator(validate)


def _folder(name: object) -> object:
    if name == "":
        raise ValueError("no directory is named; `.` is the working directory")
    return name


ModelName = Annotated[str, checked(check_named)]
Folder = Annotated[Path, BeforeValidator(_folder)]
"""Names that may not be empty: as paths they would be the working directory."""


def one_of(kind: str, known: Collection[str]) -> AfterValidator:
    """To annotate a setting with that is the name of a `kind`, say a "preset"."""

    def check(name: str) -> str:
        if name not in known:
            raise ValueError(f"unknown {kind} `{name}`; known: {', '.join(known)}")
        return name

    return AfterValidator(check)
