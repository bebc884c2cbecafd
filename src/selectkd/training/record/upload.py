"""A finished run on the hub: its card, the files beside it, and the one commit that carries them.

The token is that of the environment or of `hf auth login`; nothing here reads, prints or writes it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from selectkd.config import recipe_from
from selectkd.errors import ConfigError, RemoteError
from selectkd.models.folder import weight_files
from selectkd.models.load import PACKAGED
from selectkd.training.record.card import Facts, as_yaml, model_card
from selectkd.training.record.manifest import read_manifest
from selectkd.training.record.result import facts_of

CARD = "README.md"
OF_A_RUN = {
    "manifest.json": "what the run was made of: recipe, versions, hashes, held-out measures",
    "metrics.jsonl": "one line a step",
    "report.html": "the run's report",
}
"""Files of a run that go along where they are there."""
LICENSES = {PACKAGED: "apache-2.0"}
"""Licences of teachers that no model card can be read of."""
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
HUB_NAME = REPOSITORY
EXPORTS = "exports"


@dataclass(frozen=True)
class Upload:
    """card: the README. files: path in the repository -> file here. left_out: results in the run folder that are not of
    its student, by their models' names.
    """

    card: str
    files: dict[str, Path]
    left_out: Sequence[str] = ()

    @property
    def bytes(self) -> int:
        """Of all files together."""
        return len(self.card.encode()) + sum(path.stat().st_size for path in self.files.values())


def plan_upload(run: Path, repo: str, *, export: Path | None = None, license: str | None = None) -> Upload:
    """The card and the files of a finished run. export: a folder of `selectkd export`, which goes along.

    ConfigError for a name that is no repository, a run that is not finished, and a folder that is no export.
    """
    if not REPOSITORY.fullmatch(repo):
        raise ConfigError(f"{repo!r} is no repository of the hub. Name it OWNER/NAME.")
    manifest = read_manifest(run)
    student = run / "student"
    if not (student / "config.json").is_file():
        raise ConfigError(f"the run {run} has left no student. Finish it first.")
    weight_files(student)
    files = {path.name: path for path in sorted(student.iterdir()) if path.is_file() and path.name != CARD}
    beside = {name: text for name, text in OF_A_RUN.items() if (run / name).is_file()}
    files |= {name: run / name for name in beside}
    if export is not None:
        if not (export / "export-report.json").is_file():
            raise ConfigError(
                f"{export} has no export-report.json, so it is no export. Make one: selectkd export."
            )
        of_export = {path for path in sorted(export.rglob("*")) if path.is_file()}
        files |= {f"{EXPORTS}/{export.name}/{path.relative_to(export)}": path for path in of_export}
        target = json.loads((export / "export-report.json").read_bytes())
        beside[f"{EXPORTS}/{export.name}"] = f"{target['target']} in {target['type']}, with its own report"
    evaluations, without = evaluations_of(run)
    facts = replace(_facts(manifest, repo, beside, license), evaluations=evaluations)
    return Upload(model_card(facts), files, without)


def evaluations_of(run: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The student's rows of each result that ``selectkd eval RUN --json RUN/NAME.json`` left in a run folder, and the
    names of those results that have none.
    """
    found: list[dict[str, Any]] = []
    without: list[str] = []
    for file in sorted(path for path in run.glob("*.json") if path.is_file()):
        try:
            content = json.loads(file.read_bytes())
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict) and {"rows", "comparisons"} <= content.keys():
            rows = content["rows"] if isinstance(content["rows"], list) else []
            own = [row for row in rows if _of_run(row, run)]
            found += own
            without += [] if own else [file.name]
    return found, without


def _of_run(row: Any, run: Path) -> bool:
    """Whether a row is of the run's student, by the folder's name, with words and numbers in its cells."""
    words, numbers = ("model", "task", "metric"), ("value", "low", "high", "n")
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in words):
        return False
    if not all(type(row.get(key)) in (int, float) and math.isfinite(row[key]) for key in numbers):
        return False
    parts = [part for part in row["model"].replace("\\", "/").split("/") if part]
    return (parts[:-1] if parts[-1:] == ["student"] else parts)[-1:] == [run.resolve().name]


def upload(plan: Upload, repo: str, *, revision: str | None = None, private: bool = False) -> str:
    """Sends card and files as one commit and returns its address; what the hub has already is not sent again.

    revision: a branch, made where it is missing. RemoteError where the hub refuses or cannot be reached: the same call
    goes on with what is missing.
    """
    from httpx2 import HTTPError
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    api = HfApi(library_name="selectkd")
    operations = [CommitOperationAdd(CARD, plan.card.encode())]
    operations += [CommitOperationAdd(name, str(path)) for name, path in plan.files.items()]
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        done = api.create_commit(
            repo, operations, commit_message="A student distilled with selectkd", revision=revision
        )
    except LocalTokenNotFoundError as error:
        raise ConfigError("the hub needs a token. Log in with `hf auth login`, or set HF_TOKEN.") from error
    except HFValidationError as error:
        raise ConfigError(f"the hub does not take the name {repo!r}: {_line(error)}") from error
    except HfHubHTTPError as error:
        raise _refused(error, repo) from error
    except (OfflineModeIsEnabled, ConnectionError, OSError, HTTPError) as error:
        raise RemoteError(
            f"{api.endpoint} cannot be reached: {_line(error)}. The same command goes on with what is missing."
        ) from error
    except RuntimeError as error:  # how the client reports a file that did not arrive
        raise _refused(error.__cause__ or error, repo) from error
    return str(done.commit_url)


def _facts(manifest: Mapping[str, Any], repo: str, files: Mapping[str, str], license: str | None) -> Facts:
    """The facts of a run's own card, with what an upload adds."""
    config, data = manifest["config"], manifest["data"]
    teacher, student = config["teacher"], config["student"]
    origin = student.get("model") or (teacher.get("model") if isinstance(teacher, dict) else None)
    hashes = {"text": data["fingerprint"], "tokenizer": manifest["tokenizer"]["fingerprint"]}
    license = license or LICENSES.get(str(origin))
    note = f"The student is made of {origin}; its licence holds for the student too."
    if license is None:
        note += " No licence is stated here: see that of the model it is made of."
    return replace(
        facts_of(recipe_from(config), manifest),
        name=repo.rpartition("/")[2],
        base_model=origin
        if origin and HUB_NAME.fullmatch(str(origin)) and not Path(origin).exists()
        else None,
        teacher_revision=_text(manifest["teacher"]["revision"]),
        data_hashes={name: str(value) for name, value in hashes.items()},
        license=license,
        license_note=note,
        recipe=as_yaml(_without_none(config)),
        files=files,
    )


def _text(value: Any) -> str | None:
    return None if value is None else value if isinstance(value, str) else json.dumps(value)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, list) else value


def _refused(error: Any, repo: str) -> Exception:
    """What the hub's refusal means for the user, without anything of the request."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return ConfigError(
            f"the hub refuses to write {repo} ({status}): the token is missing or may not write there. Log in with "
            "`hf auth login`, or set HF_TOKEN."
        )
    return RemoteError(
        f"the hub refused {repo}: {_line(error)}. The same command goes on with what is missing."
    )


def _line(error: BaseException) -> str:
    """The first line of an error, shortened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
