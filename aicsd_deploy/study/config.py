"""The settings of a study; apart from what runs it, so that a wrong flag is told before torch is imported."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import Field, NonNegativeInt, field_validator

from aicsd_deploy.config import OF_A_TEACHER, DistillConfig, Method, validated
from aicsd_deploy.errors import InputError

METHODS: tuple[str, ...] = get_args(Method)


class StudyConfig(DistillConfig):
    """The recipe that all cells share, and which cells there are."""

    methods: list[str] = Field(
        default=["none", "kd", "aicsd"],
        min_length=1,
        description="methods, or names under `variants` in the file of --config",
    )
    seeds: list[NonNegativeInt] = Field(
        [0, 1, 2], min_length=1, description="seeds; each gives its weights and order to every method"
    )
    variants: dict[str, dict[str, Any]] = Field(
        {}, description="settings that a cell of this name has otherwise than the recipe"
    )
    teacher_recipe: dict[str, Any] = Field(
        {}, description="settings that the teacher has otherwise, where none is given and it is trained first"
    )

    @field_validator("methods", "seeds")
    @classmethod
    def _once(cls, values: list[Any]) -> list[Any]:
        return list(dict.fromkeys(values))  # a cell that counts twice would look like evidence

    def cell(self, name: str, seed: int, *, teacher: str) -> DistillConfig:
        """Return the settings of one cell: the recipe, then what the method or variant `name` has otherwise.

        Raises:
            InputError: there is no such method or variant, or a setting of it is wrong.
        """
        if name not in self.variants and name not in METHODS:
            known = ", ".join([*METHODS, *self.variants])
            raise InputError(f"There is no method or variant {name!r}. There are {known}.")
        given = self.model_dump(exclude_unset=True)  # what is not given may follow from --qat
        recipe = {k: v for k, v in given.items() if k in DistillConfig.model_fields}
        changes = self.variants.get(name, {"method": name})
        values = recipe | {"teacher": teacher} | changes | {"seed": seed}
        if values.get("method") == "none":
            values = {k: v for k, v in values.items() if k not in OF_A_TEACHER}
        return validated(DistillConfig, values)
