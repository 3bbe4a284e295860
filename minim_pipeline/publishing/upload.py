"""From a pipeline to a repository on the Hub, in one commit or not at all."""

import json
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, get_token, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import httpx, validate_repo_id

from .. import EMBEDDED_CHECKPOINT
from .card import license_name, read_card, write_card
from .leaks import check_folder
from .reports import find_page, gather_reports, read_sections
from .staging import stage


# In a checkout the embedded model's card and reports lie where people read them.
CHECKOUT = Path(__file__).parents[2]
KINDS = ("model", "dataset", "space")


def publish(
    pipe,
    repo_id: str,
    *,
    card: str | Path | None = None,
    report: str | Path | None = None,
    samples: int = 1,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    safe_serialization: bool = True,
    variant: str | None = None,
) -> str:
    """Uploads a pipeline in one commit: weights, their fp16 variant, code, card, report and sample pictures.

    Everything is made and checked before the repository is touched. A cut connection leaves the repository as it was;
    what had come through by then is not sent again. Returns the address of the commit, or of the pull request.

    Args:
        repo_id: `"name"` or `"owner/name"`; made if it is not there yet.
        card: a file that becomes README.md. By default the one beside the weights that the pipeline was loaded from,
            if these are unchanged, and otherwise a bare one.
        report: report.json of the model, or of `research/report_model.py` or `minim evaluate`; default as for `card`.
        samples: pictures drawn of each modality, for the card.
        private: makes a new repository private; an old one stays what it is.
        revision: branch that is committed to, made if it is not there yet; default `main`.
        create_pr: opens a pull request instead.
        token: with the right to write; by default the one that `hf auth login` stored, or `HF_TOKEN`.
        safe_serialization: only `True`; pickles are not published.
        variant: None or "fp16"; both are published whatever it is.

    Raises:
        ValueError: there is no token, or none that may write there; `repo_id` is of another kind, or holds something
            else; the card lacks fields; or something in the model must not be uploaded. Nothing was uploaded then.
        OSError: the Hub could not be reached, or the connection broke.
    """
    if not safe_serialization:
        raise ValueError("safe_serialization=False would publish pickles, which run code when they are loaded.")
    if variant not in (None, "fp16"):
        raise ValueError(f"variant has to be None or 'fp16', got {variant!r}.")
    api = connect(token)
    check_target(api, repo_id, "model")
    replaced = [*(f"{name}/*" for name in pipe.components), "samples/*", "evaluation/*", "report.json"]
    commit: dict[str, Any] = {"revision": revision, "create_pr": create_pr, "private": private, "replaced": replaced}
    commit["commit_message"] = commit_message or "Upload MinimPipeline"
    with staged(pipe, repo_id, card=card, report=report, samples=samples) as folder:
        return upload(api, folder, repo_id, "model", **commit)


@contextmanager
def staged(
    pipe, repo_id: str, *, card: str | Path | None = None, report: str | Path | None = None, samples: int = 1
) -> Iterator[Path]:
    """A temporary folder with all that would be uploaded, checked; arguments and errors as for `publish`."""
    found_card, figures, page = find_papers(pipe)
    if report is not None:
        figures, page = read_sections(report), None
    card = card or found_card
    if card is not None:
        front = read_card(card)
        inherited, said = pipe.weights_license, license_name(front.data.to_dict())
        if inherited and said != license_name(inherited):
            warnings.warn(
                f"The card says license {said!r}, but the weights were made from those of {inherited['of']}, which are"
                f" under {license_name(inherited)!r}.",
                stacklevel=4,
            )
    else:
        origin = str(pipe.config.get("_name_or_path") or "")
        front = write_card(pipe, repo_id.split("/")[-1], bool(figures), origin if is_hub_id(origin) else None)
    with tempfile.TemporaryDirectory(prefix="minim-") as temporary:
        folder = Path(temporary)
        stage(pipe, folder, repo_id, front, figures, page, samples)
        check_folder(folder)
        yield folder


def find_papers(pipe) -> tuple[Path | None, dict, Path | None]:
    """Card, report and its page of what a pipeline was loaded from, if its weights are still those."""
    name = str(pipe.config.get("_name_or_path") or "")
    source = Path(snapshot_download(name)) if is_hub_id(name) else Path(name)
    if not (source / "model_index.json").is_file() or not is_unchanged(pipe, source):
        return None, {}, None
    if source.resolve() == EMBEDDED_CHECKPOINT.resolve() and (CHECKOUT / "pipeline_card.md").is_file():
        docs = CHECKOUT / "docs"
        return CHECKOUT / "pipeline_card.md", gather_reports(docs, source), find_page(docs)
    card, report, page = source / "README.md", source / "report.json", source / "evaluation" / "report.html"
    figures = read_sections(report) if report.is_file() else {}
    return card if card.is_file() else None, figures, page if page.is_file() else None


def is_hub_id(name: str) -> bool:
    """Whether a pipeline that was loaded by this name came from the Hub."""
    return name.count("/") == 1 and not Path(name).is_absolute() and not Path(name).exists()


def is_unchanged(pipe, source: Path) -> bool:
    """Whether the pipeline's weights are those of the folder, but for their dtype."""
    before = type(pipe).from_pretrained(source).components
    for name, component in pipe.components.items():
        parts = component, before[name]
        now, then = (part.state_dict() if isinstance(part, torch.nn.Module) else {} for part in parts)
        if now.keys() != then.keys() or not all(torch.equal(now[k].cpu(), then[k].to(now[k].dtype)) for k in now):
            return False
    return True


def connect(token: str | None = None) -> HfApi:
    """The Hub's client with the token given, or with the one that is stored; raises ValueError if there is none."""
    token = token or get_token()
    if not token:
        raise ValueError("There is no token for the Hub: run `hf auth login`, or set HF_TOKEN to one that may write.")
    return HfApi(token=token)


def check_target(api: HfApi, repo_id: str, kind: str) -> None:
    """Raises ValueError if a repository of this name and kind cannot take the upload; asks, and changes nothing."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no id of a repository: it is to be 'owner/name'.") from error
    with hub_errors("reach the Hub"):
        user = api.whoami()
        repo_id = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
        kinds = [other for other in KINDS if api.repo_exists(repo_id, repo_type=other)]
    if kinds and kind not in kinds:
        raise ValueError(f"{repo_id} is a {kinds[0]} on the Hub, not a {kind}: choose another name.")
    if kind in kinds:
        with hub_errors(f"write to {repo_id}"):
            api.auth_check(repo_id, repo_type=kind, write=True)
    if kind == "model" and kind in kinds:
        check_class(api, repo_id)


def check_class(api: HfApi, repo_id: str) -> None:
    """Raises ValueError if the repository holds a pipeline of another class."""
    try:
        index = json.loads(Path(hf_hub_download(repo_id, "model_index.json", token=api.token)).read_text())
    except EntryNotFoundError:
        return
    if index.get("_class_name") != "MinimPipeline":
        other = index.get("_class_name")
        raise ValueError(f"{repo_id} holds a {other}, which would be overwritten: choose another name.")


def upload(
    api: HfApi,
    folder: Path,
    repo_id: str,
    kind: str,
    *,
    replaced: list[str],
    private: bool | None = None,
    space_sdk: str | None = None,
    **commit: Any,
) -> str:
    """Commits a folder to a repository, made if need be, and returns the address of the commit or the pull request.

    Args:
        replaced: patterns of old files that the commit removes.
        commit: `commit_message`, `revision` and `create_pr`, as of `HfApi.upload_folder`.
    """
    where: dict[str, Any] = {"repo_type": kind, "exist_ok": True}
    with hub_errors(f"write to {repo_id}"):
        repo_id = api.create_repo(repo_id, private=private, space_sdk=space_sdk, **where).repo_id
        if commit.get("revision") and not commit.get("create_pr"):
            api.create_branch(repo_id, branch=commit["revision"], **where)
        commit |= {"folder_path": folder, "delete_patterns": replaced}
        done = api.upload_folder(repo_id=repo_id, repo_type=kind, **commit)
    return done.pr_url or done.commit_url


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turns what the Hub refuses into one line."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        why = {401: "the token is not valid", 403: "the token has no right to"}.get(status)
        if isinstance(error, RepositoryNotFoundError):
            why = "there is no such repository, or the token may not see it"
        reason = why or " ".join(str(error.server_message or error).split())
        raise ValueError(f"Could not {what}: {reason}.") from error
    except httpx.HTTPError as error:
        raise OSError(f"Could not {what}: the connection failed ({error or type(error).__name__}).") from error
