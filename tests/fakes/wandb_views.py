"""What the stand-in W&B server knows of pages: workspaces and reports, by id, in their newest form."""

from __future__ import annotations

import base64
import json
from typing import Any

Json = dict[str, Any]


class Views:
    """Operations about projects and their pages; a part of the server."""

    entity: str

    def __init__(self) -> None:
        self.views: dict[str, Json] = {}

    def views_of(self, kind: str) -> list[Json]:
        """Pages of a type: project-view (a workspace) or runs (a report), `spec` parsed."""
        return [view for view in self.views.values() if view["type"] == kind]

    def _on_ProjectInternalId(self, variables: Json) -> Json:
        return {"project": {"id": "UHJvamVjdDox", "internalId": "UHJvamVjdEludGVybmFsSWQ6MQ=="}}

    def _on_GetProjects(self, variables: Json) -> Json:
        node = {"__typename": "Project", "id": "1", "internalId": "1", "name": "lbi", "entityName": self.entity}
        node |= {"createdAt": "2026-01-01T00:00:00Z", "isBenchmark": False, "user": None}
        page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        return {"models": {"edges": [{"node": node, "cursor": "1"}], "pageInfo": page}}

    def _on_UpsertView2(self, variables: Json) -> Json:
        known = variables.get("id")
        if known and known not in self.views:
            raise LookupError(f"there is no view {known}")
        identity = known or base64.b64encode(f"View:{len(self.views) + 1}".encode()).decode().rstrip("=")
        self.views[identity] = {**variables, "id": identity, "spec": json.loads(variables["spec"])}
        moment = "2026-01-01T00:00:00"
        view = {name: variables.get(name) for name in ("type", "name", "displayName", "description", "spec")}
        project = {"id": "1", "name": variables["projectName"], "entityName": variables["entityName"]}
        view |= {"id": identity, "updatedAt": moment, "createdAt": moment, "project": project}
        return {"upsertView": {"inserted": not known, "view": view}}

    _on_upsertView = _on_UpsertView2
