"""The base of every settings class: frozen, and unknown keys are errors."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """What a stage can be told. Lives beside the code that it configures; a recipe is made of these."""

    model_config = ConfigDict(extra="forbid", frozen=True)
