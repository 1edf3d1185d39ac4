"""Clusters, and what of a user is in no tracked file."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from tanren.config.fields import SECRET_NAME, NonNegative, Positive, PositiveFloat, Strict
from tanren.config.training import Tracking


class NodeType(Strict):
    """One resource type of a site: what a node of it has and what a job of it may ask for."""

    gpus: NonNegative
    cores: Positive
    memory_gib: PositiveFloat
    nodes: Positive
    walltime_hours: PositiveFloat
    points_per_hour: PositiveFloat | None = None


class SiteGpu(Strict):
    """The GPU of a site's nodes, as the driver names it."""

    name: str
    memory_gib: PositiveFloat


class Site(Strict):
    """A cluster: its scheduler, its resource types and limits, what its jobs need.

    `found_by` are folders that all its machines have and others have not, by which it is found
    out; a site without any must be named. `setup` are shell lines at the start of a job (modules).
    `environment` reaches the stage (NCCL, InfiniBand).
    """

    scheduler: Literal["pbs", "gridengine", "slurm"]
    found_by: tuple[str, ...] = ()
    gpu: SiteGpu | None = None
    types: Annotated[dict[str, NodeType], Field(min_length=1)]
    gpu_type: str
    cpu_type: str
    node_hours: PositiveFloat | None = None
    group_required: bool = False
    setup: tuple[str, ...] = ()
    environment: dict[str, str] = Field(default_factory=dict)
    binds: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _types_exist(self) -> Site:
        for field, name in (("gpu_type", self.gpu_type), ("cpu_type", self.cpu_type)):
            if name not in self.types:
                raise ValueError(f"{field} {name} is none of the types {', '.join(self.types)}")
        return self

    @model_validator(mode="after")
    def _no_secrets(self) -> Site:
        for name in self.environment:
            if re.search(SECRET_NAME, name):
                raise ValueError(
                    f"environment.{name} would be written into every job script: take it out, and "
                    f"export {name} in the shell"
                )
        return self


class User(Strict):
    """user.toml: what is yours and never in a tracked file.

    `runs`, `data`, `images` and `cache` are folders; `binds` are folders that containers see as
    well; `site` is a file's name in recipes/sites, `group` what its scheduler charges. `tracking`
    is for runs whose recipe states none.
    """

    site: str | None = None
    group: str | None = None
    runs: str | None = None
    data: str | None = None
    images: str | None = None
    cache: str | None = None
    binds: tuple[str, ...] = ()
    debian_mirror: str | None = None
    tracking: Tracking = Tracking()
