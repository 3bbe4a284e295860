"""`--push_to_hub` and `--hub_model_id`, as in diffusers' examples: a training script publishes what it made."""

import shutil
import tempfile
from pathlib import Path

from minim_pipeline import MinimPipeline
from minim_pipeline.licenses import license_of
from minim_pipeline.publishing import check_folder, check_target, connect, hub_errors, publish, upload
from minim_pipeline.publishing.card import license_note
from minim_pipeline.training.config import HubOptions


CARD = Path(__file__).with_name("parts_card.md")


def check_hub(config: HubOptions) -> None:
    """Raises ValueError if the result could not be published, before any time is spent on making it."""
    if config.push_to_hub:
        check_target(connect(), config.hub_target, "model")


def push_pipeline(config: HubOptions, folder: str | Path) -> None:
    """Publishes a whole pipeline, if that was asked for."""
    if config.push_to_hub:
        print(f"published: {publish(MinimPipeline.from_pretrained(folder), config.hub_target)}")


def push_parts(config: HubOptions, script: str, *parts: str | Path) -> None:
    """Publishes parts of a pipeline, if that was asked for: a folder under its name, a file at the top."""
    if not config.push_to_hub:
        return
    api, repo_id = connect(), config.hub_target
    with tempfile.TemporaryDirectory(prefix="minim-") as temporary:
        folder = Path(temporary)
        for part in map(Path, parts):
            copy = shutil.copytree if part.is_dir() else shutil.copyfile
            copy(part, folder / part.name)
        with hub_errors(f"reach {repo_id}"):
            known = api.repo_exists(repo_id) and api.file_exists(repo_id, "README.md")
        if not known:
            names = ", ".join(f"`{Path(part).name}`" for part in parts)
            base = getattr(config, "pretrained_model_name_or_path", None)
            inherited = (license_of(base) if base else None) or {"license": "unknown"}
            lines = "\n".join(f"{field}: {value}" for field, value in inherited.items() if field != "of")
            place = script if "/" in script else f"train/{script}"
            named = {"name": repo_id.split("/")[-1], "script": place, "parts": names}
            card = CARD.read_text(encoding="utf-8").format(license=lines, note=license_note(inherited), **named)
            (folder / "README.md").write_text(card, encoding="utf-8")
        check_folder(folder)
        replaced = [f"{Path(part).name}/*" for part in parts if Path(part).is_dir()]
        print(f"published: {upload(api, folder, repo_id, 'model', replaced=replaced, commit_message=f'{script}.py')}")
