"""What a job asks of a site, checked against the site's limits before it is submitted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tanren.config.errors import RequestError
from tanren.config.fields import Job
from tanren.config.site import NodeType, Site

# A stage stops so long before the end of its walltime, to save; at most this share of it.
SAVE_SECONDS, SAVE_SHARE = 600.0, 0.15


@dataclass(frozen=True)
class Place:
    """Where a job runs: a site, one of its types, and how much of it."""

    site_name: str
    site: Site
    type_name: str
    nodes: int
    hours: float
    group: str | None
    reservation: str | None = None
    # Before the end of the walltime training stops so long, to save.
    save_seconds: float = 0.0

    @property
    def title(self) -> str:
        """The site's name, also where it is a file of one's own."""
        return Path(self.site_name).stem

    @property
    def type(self) -> NodeType:
        return self.site.types[self.type_name]

    @property
    def gpus(self) -> int:
        """GPUs of the whole job."""
        return self.nodes * self.type.gpus

    @property
    def points(self) -> float | None:
        """What the whole requested time costs; a site gives back what was not used."""
        rate = self.type.points_per_hour
        return None if rate is None else rate * self.nodes * self.hours


@dataclass(frozen=True)
class Wish:
    """What the command line says about the job; None leaves it to the recipe and the site."""

    nodes: int | None = None
    hours: float | None = None
    type: str | None = None
    reservation: str | None = None


def make_place(
    site_name: str, site: Site, job: Job, wish: Wish, group: str | None, *, trains: bool
) -> Place:
    """The place of a stage on a site.

    Args:
        trains: the stage wants GPUs where the site has them, as an evaluation does too; others take
            the site's CPU type.
    Raises:
        RequestError: the site has no such type, or not so much of it.
    """
    name = wish.type or job.type or (site.gpu_type if trains else site.cpu_type)
    # A stage without GPUs is one process, whatever its recipe's training sister takes.
    nodes = wish.nodes or job.nodes if trains else 1
    hours = wish.hours or job.walltime_hours
    if name not in site.types:
        raise RequestError(
            f"TYPE={name}", f"{site_name} has no such resource type",
            f"it has {', '.join(site.types)} (recipes/sites/{site_name}.yaml)",
        )  # fmt: skip
    kind = site.types[name]
    if nodes > kind.nodes:
        larger = [other for other, facts in site.types.items()
                  if facts.nodes >= nodes and facts.gpus >= kind.gpus]  # fmt: skip
        raise RequestError(
            f"NODES={nodes}", f"a job of {name} on {site_name} may have {kind.nodes}",
            f"NODES={kind.nodes}" + (f" or TYPE={larger[0]}" if larger else ""),
        )  # fmt: skip
    if hours > kind.walltime_hours:
        raise RequestError(
            f"HOURS={hours:g}",
            f"a job of {name} on {site_name} may take {kind.walltime_hours:g} hours",
            f"HOURS={kind.walltime_hours:g} and CHAIN=n: each job goes on where the last stopped",
        )
    if site.node_hours is not None and nodes * hours > site.node_hours:
        raise RequestError(
            f"NODES={nodes} HOURS={hours:g}",
            f"are {nodes * hours:,.0f} node-hours, and a job on {site_name} may have "
            f"{site.node_hours:,.0f}",
            f"HOURS={int(site.node_hours / nodes)} and CHAIN=n",
        )
    save_seconds = min(SAVE_SECONDS, SAVE_SHARE * hours * 3600)
    if job.save_minutes is not None:
        save_seconds = job.save_minutes * 60
        if save_seconds >= hours * 3600:
            raise RequestError(
                "job.save_minutes", f"{job.save_minutes:g} are the whole of {hours:g} hours",
                f"use fewer than {hours * 60:g}, or more HOURS=",
            )  # fmt: skip
    return Place(site_name, site, name, nodes, hours, group, wish.reservation, save_seconds)


def check_group(place: Place) -> None:
    """Refuse a job that nobody would pay for.

    Raises:
        RequestError: the site charges a group, and the user has named none.
    """
    if place.site.group_required and not place.group:
        raise RequestError(
            "user.toml", f"names no group, and {place.site_name} charges one",
            'write group = "YOUR-GROUP" into user.toml, or SET="user.group=YOUR-GROUP"',
        )  # fmt: skip
