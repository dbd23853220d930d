"""JSON Schemas of the files that people write, for editors."""

from typing import Any, Literal

from pydantic import BaseModel

from twotower_sim.plan_file import PlanFile
from twotower_sim.scenario import Scenario
from twotower_sim.study import Study

Kind = Literal["scenario", "study", "plan"]
FILES: dict[Kind, type[BaseModel]] = {"scenario": Scenario, "study": Study, "plan": PlanFile}


def schema_of(kind: Kind) -> dict[str, Any]:
    return FILES[kind].model_json_schema()
