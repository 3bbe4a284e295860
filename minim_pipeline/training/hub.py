"""`--push_to_hub` and `--hub_model_id`, as in diffusers' examples: a training script publishes what it made."""

import argparse
import shutil
import tempfile
from pathlib import Path

from minim_pipeline import MinimPipeline
from minim_pipeline.licenses import license_of
from minim_pipeline.publishing import check_folder, check_target, connect, license_note, publish, told, upload
from minim_pipeline.training.config import HubOptions


CARD = """---
{license}
library_name: diffusers
pipeline_tag: text-to-image
tags:
- medical
- synthetic
- diffusers
---

# {name}

Parts of a `MinimPipeline`, trained by `train/{script}.py`: {parts}.

**Not a medical device.** For research and teaching, never for diagnosis.
{note}"""


def add_hub_arguments(parser: argparse.ArgumentParser) -> None:
    hub = parser.add_argument_group("Hugging Face Hub")
    hub.add_argument("--push_to_hub", action="store_true", help="Publish the result; needs `hf auth login`.")
    hub.add_argument("--hub_model_id", help="Where to, owner/name; default: the name of --output_dir, one's own.")


def check_hub_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError if the result could not be published, before any time is spent on making it."""
    if args.push_to_hub:
        check_target(connect(), target(args), "model")
    elif args.hub_model_id:
        raise ValueError(f"--hub_model_id {args.hub_model_id} is of no use without --push_to_hub.")


def check_hub(config: HubOptions) -> None:
    """Raises ValueError if the result could not be published, before any time is spent on making it."""
    if config.push_to_hub:
        check_target(connect(), config.hub_target, "model")


def target(args: argparse.Namespace) -> str:
    return args.hub_model_id or Path(args.output_dir).resolve().name


def push_pipeline(args: argparse.Namespace, folder: str | Path) -> None:
    """Publishes a whole pipeline, if that was asked for."""
    if args.push_to_hub:
        print(f"published: {publish(MinimPipeline.from_pretrained(folder), target(args))}")


def push_parts(args: argparse.Namespace, script: str, *parts: str | Path) -> None:
    """Publishes parts of a pipeline, if that was asked for: a folder under its name, a file at the top."""
    if not args.push_to_hub:
        return
    api, repo_id = connect(), target(args)
    with tempfile.TemporaryDirectory(prefix="minim-") as temporary:
        folder = Path(temporary)
        for part in map(Path, parts):
            if part.is_dir():
                shutil.copytree(part, folder / part.name)
            else:
                shutil.copyfile(part, folder / part.name)
        with told(f"reach {repo_id}"):
            known = api.repo_exists(repo_id) and api.file_exists(repo_id, "README.md")
        if not known:
            names = ", ".join(f"`{Path(part).name}`" for part in parts)
            base = getattr(args, "pretrained_model_name_or_path", None)
            inherited = (license_of(base) if base else None) or {"license": "unknown"}
            lines = "\n".join(f"{field}: {value}" for field, value in inherited.items() if field != "of")
            named = {"name": repo_id.split("/")[-1], "script": script, "parts": names}
            card = CARD.format(license=lines, note=license_note(inherited), **named)
            (folder / "README.md").write_text(card, encoding="utf-8")
        check_folder(folder)
        replaced = [f"{Path(part).name}/*" for part in parts if Path(part).is_dir()]
        print(f"published: {upload(api, folder, repo_id, 'model', replaced=replaced, commit_message=f'{script}.py')}")
