"""What the stand-in W&B server knows of artifacts: kept in versions, whole only once committed."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]


@dataclass(slots=True)
class FakeArtifact:
    """One version. `files` are the bytes that were uploaded."""

    id: str
    name: str
    type: str
    version: int
    digest: str
    run: str
    entity: str
    project: str
    state: str = "PENDING"
    manifest: bytes = b""
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def node(self) -> Json:
        """As wandb's public API reads it."""
        owner = {"id": "1", "internalId": "1", "name": self.project, "entity": {"name": self.entity}}
        sequence = {"__typename": "ArtifactSequence", "name": self.name, "project": owner}
        alias = {"__typename": "ArtifactAlias", "id": "a", "alias": "latest", "artifactCollection": sequence}
        return {
            "__typename": "Artifact",
            "id": self.id,
            "artifactSequence": sequence,
            "versionIndex": self.version,
            "artifactType": {"name": self.type},
            "description": None,
            "metadata": None,
            "ttlDurationSeconds": -2,
            "ttlIsInherited": True,
            "tags": [],
            "historyStep": None,
            "state": self.state,
            "size": sum(map(len, self.files.values())),
            "digest": self.digest,
            "commitHash": "c",
            "fileCount": len(self.files),
            "createdAt": "2026-01-01T00:00:00Z",
            "updatedAt": None,
            "aliases": [alias],
        }


class Artifacts:
    """Operations about artifacts; a part of the server."""

    url: str

    def __init__(self) -> None:
        self._versions: list[FakeArtifact] = []

    def artifacts(self, kind: str) -> dict[str, FakeArtifact]:
        """The newest committed version of every artifact of a type, by name."""
        return {item.name: item for item in self._versions if item.type == kind and item.state == "COMMITTED"}

    @property
    def uncommitted(self) -> list[str]:
        """Names of artifacts that were begun, and of which no version was ever committed."""
        whole = {item.name for item in self._versions if item.state == "COMMITTED"}
        return sorted({item.name for item in self._versions} - whole)

    @property
    def versions(self) -> dict[str, int]:
        """How many committed versions each artifact has."""
        names = [item.name for item in self._versions if item.state == "COMMITTED"]
        return {name: names.count(name) for name in names}

    def _put_artifact(self, path: str, body: bytes) -> None:
        identity, _, name = path.partition("/")
        item = self._artifact(identity)
        if name:
            item.files[name] = body
        else:
            item.manifest = body

    def _get_artifact(self, path: str) -> bytes:
        identity, _, name = path.partition("/")
        item = self._artifact(identity)
        return item.files[name] if name else item.manifest

    def _artifact(self, identity: str) -> FakeArtifact:
        return next(item for item in self._versions if item.id == identity)

    def _named(self, variables: Json, name: str) -> Iterator[FakeArtifact]:
        for item in self._versions:
            place = (item.entity, item.project, item.name)
            if place == (variables.get("entity"), variables.get("project"), name) and item.state == "COMMITTED":
                yield item

    def _on_ArtifactType(self, variables: Json) -> Json:
        return {"project": {"artifact": None}}

    def _on_CreateArtifact(self, variables: Json) -> Json:
        said = variables["input"]
        name = said["artifactCollectionName"]
        versions = [item for item in self._versions if item.name == name]
        same = [item for item in versions if item.digest == said["digest"] and item.state == "COMMITTED"]
        if same:
            # The same content is the version that is there already, and is not uploaded again.
            made = same[0]
        else:
            identity = base64.b64encode(f"Artifact:{len(self._versions) + 1}".encode()).decode().rstrip("=")
            place = (said["runName"], said["entityName"], said["projectName"])
            made = FakeArtifact(identity, name, said["artifactTypeName"], len(versions), said["digest"], *place)
            self._versions.append(made)
        committed = [item for item in versions if item.state == "COMMITTED"]
        latest = {"id": committed[-1].id} if committed else None
        sequence = {"latestArtifact": latest}
        return {"createArtifact": {"artifact": {"id": made.id, "state": made.state, "artifactSequence": sequence}}}

    def _on_CreateArtifactManifest(self, variables: Json) -> Json:
        identity = variables["artifactID"]
        file: Json = {"id": "f"}
        if variables.get("includeUpload"):
            file |= {"uploadUrl": f"{self.url}/artifacts/{identity}", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": f"m:{identity}", "file": file}}}

    def _on_CreateArtifactFiles(self, variables: Json) -> Json:
        wanted = variables["input"]["artifactFiles"] if "input" in variables else variables["artifactFiles"]
        nodes = [
            {
                "storagePath": f"{spec['artifactID']}/{spec['name']}",
                "uploadUrl": f"{self.url}/artifacts/{spec['artifactID']}/{spec['name']}",
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": spec["artifactID"]},
            }
            for spec in wanted
        ]
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def _on_CommitArtifact(self, variables: Json) -> Json:
        item = self._artifact(variables["artifactID"])
        wanted = set(json.loads(item.manifest)["contents"])
        if wanted != set(item.files):
            raise ValueError(f"{item.name} is committed with {sorted(item.files)} of {sorted(wanted)}")
        item.state = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": item.id, "digest": item.digest}}}

    def _on_ArtifactByID(self, variables: Json) -> Json:
        return {"artifact": self._artifact(variables["id"]).node}

    def _on_ArtifactMembershipByName(self, variables: Json) -> Json:
        name, _, version = variables["name"].partition(":")
        found = [item for item in self._named(variables, name) if version in ("latest", f"v{item.version}")]
        if not found:
            return {"project": {"artifactCollectionMembership": None}}
        node = found[-1].node
        membership = {
            "__typename": "ArtifactCollectionMembership",
            "id": "m",
            "versionIndex": found[-1].version,
            "createdAt": node["createdAt"],
            "aliases": [{key: alias[key] for key in ("__typename", "id", "alias")} for alias in node["aliases"]],
            "artifactCollection": node["artifactSequence"],
            "artifact": node,
        }
        return {"project": {"artifactCollectionMembership": membership}}

    def _on_FetchArtifactManifest(self, variables: Json) -> Json:
        return {"artifact": {"currentManifest": {"file": {"directUrl": f"{self.url}/artifacts/{variables['id']}"}}}}

    def _on_GetArtifactMembershipFileUrls(self, variables: Json) -> Json:
        found = list(self._named(variables, variables["collection"]))
        alias = variables["alias"]
        item = next(item for item in reversed(found) if alias in ("latest", f"v{item.version}"))
        edges = [
            {"node": {"__typename": "File", "name": name, "directUrl": f"{self.url}/artifacts/{item.id}/{name}"}}
            for name in item.files
        ]
        page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        membership = {"files": {"pageInfo": page, "edges": edges}}
        return {"project": {"artifactCollection": {"__typename": "ArtifactSequence", "artifactMembership": membership}}}
