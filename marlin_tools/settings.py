"""The base of every settings class: frozen, unknown keys are errors, and numbers are finite."""

from collections.abc import Collection

from pydantic import AfterValidator, BaseModel, ConfigDict


class Settings(BaseModel):
    """What a stage can be told. Lives beside the code that it configures; a recipe is made of these."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def one_of(kind: str, known: Collection[str]) -> AfterValidator:
    """To annotate a setting with that is the name of a `kind`, say a "preset"."""

    def check(name: str) -> str:
        if name not in known:
            raise ValueError(f"unknown {kind} `{name}`; known: {', '.join(known)}")
        return name

    return AfterValidator(check)
